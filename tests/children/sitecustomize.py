"""Python imports a module of this name when it starts: tests/conftest.py puts this folder on PYTHONPATH, so that every
Python that a test starts can be slowed or held without a word about tests in the product."""

import moa_test_hold as moa_test_hold
import moa_test_slow as moa_test_slow
