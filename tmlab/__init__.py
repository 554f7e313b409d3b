__version__ = "0.1.0"

from .core.compat import drop_stale_kernels as _drop_stale_kernels

_drop_stale_kernels()  # before a kernel of an older checkout can be loaded: numba does not notice that what it calls has changed
