"""`python -m moa`."""

from moa.cli import main

main()
