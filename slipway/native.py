"""Loader of the compiled C++ library (csrc/).

Not here: declarations of its functions (ops/cpu.py, checkpoint/).
"""

import ctypes
import functools
import importlib.util
import logging
from pathlib import Path

logger = logging.getLogger(__name__)
NOT_COMPILED = "installed without a C++ compiler: the portable code is several times slower"
FROM_SOURCE = (
    "imported from a source tree that is not compiled: the portable code is several times slower; "
    "start Python in another folder"
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library; None if slipway was installed without a C++ compiler."""
    spec = importlib.util.find_spec("slipway._native")
    if spec is None or spec.origin is None:
        is_source = (Path(__file__).parents[1] / "csrc").is_dir()
        logger.warning(FROM_SOURCE if is_source else NOT_COMPILED)
        return None
    return ctypes.CDLL(spec.origin)
