"""The public API, which `import moa` offers: facades over the packages below. What `moa.__all__` lacks is internal."""
