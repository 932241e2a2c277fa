"""jaxmed: classify, detect and segment biomedical images in JAX, 2-D and 3-D."""

__version__ = "0.1.0"
