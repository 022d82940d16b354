"""Scripts stored with releases of the old layout import their model from here; new ones from `moa.serving.pyfunc`."""

from moa.serving.pyfunc import python_model

__all__ = ["python_model"]
