"""`python -m moa`."""

from moa.cli.main import main

main()
