"""Loader of the compiled C++ library (csrc/).

Not here: declarations of its functions (ops/cpu.py, checkpoint/).
"""

import ctypes
import functools
import importlib.util
import logging

logger = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library; None if slipway was installed without a C++ compiler."""
    spec = importlib.util.find_spec("slipway._native")
    if spec is None or spec.origin is None:
        logger.warning(
            "installed without a C++ compiler: the portable code is several times slower"
        )
        return None
    return ctypes.CDLL(spec.origin)
