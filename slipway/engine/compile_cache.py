"""Decides where compiled programs are kept between processes, and under which key; knows no model and no program.

JAX keeps them and keys each by its computation, compiler and options. What it does not know is which instructions this
processor has: that is part of the directory's name, so that a home shared by unlike machines is safe.
"""

import functools
import hashlib
import logging
import os
import platform
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)
_config: Any = jax.config  # its fields are made as it is imported

# The oldest programs go first; with a bound JAX locks the directory, so several processes may share it.
MAX_BYTES = 2 << 30
OFF = "off"


def use(directory: str) -> Path | None:
    """Keep compiled programs below ``directory``: a path, ``"auto"`` for the user's cache, ``"off"`` for nowhere.

    Returns where. A directory that JAX was told of already (JAX_COMPILATION_CACHE_DIR, say) stays.
    """
    held = _config.jax_compilation_cache_dir
    if held and held != _ours.get("path"):  # an empty variable is an unset one
        return Path(held)
    if directory == OFF:
        _tell(None)
        return None
    base = _user_cache() if directory == "auto" else Path(directory).expanduser()
    path = base / machine()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} cannot be written")
    except OSError as error:
        logger.warning("compiled programs are not kept: %s", error)
        return None
    _tell(str(path))
    return path


_ours: dict[str, str | None] = {}  # the directory that JAX has from us


def _tell(path: str | None) -> None:
    if path == _config.jax_compilation_cache_dir:
        return
    _config.update("jax_compilation_cache_max_size", MAX_BYTES)
    _config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _config.update("jax_compilation_cache_dir", path)
    compilation_cache.reset_cache()  # it may have looked for a directory already, and found none
    _ours["path"] = path


@functools.cache
def machine() -> str:
    """A name for what programs compiled here can rely on: the processor's instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = sorted({word for line in lines if line.startswith(("flags", "Features")) for word in line.split()})
    except OSError:
        flags = [platform.processor()]
    return hashlib.sha256(" ".join([platform.machine(), *flags]).encode()).hexdigest()[:16]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slipway" / "compiled"
