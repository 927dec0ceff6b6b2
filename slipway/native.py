"""Finds and loads csrc's library; decides nothing else, and knows no function in it."""

import ctypes
import functools
import importlib.util
import logging

logger = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where slipway was installed without a C++ compiler."""
    spec = importlib.util.find_spec("slipway._native")
    if spec is None or spec.origin is None:
        logger.warning("slipway was installed without a C++ compiler: the portable paths serve, several times slower")
        return None
    return ctypes.CDLL(spec.origin)
