"""Directory in which JAX keeps compiled programs from one process to the next.

Not here: the programs (programs.py), their compilation (runtime/runner.py).

JAX keys a program by its computation, compiler and options, but not by the instruction sets of the
processor. The directory is therefore named after those, so that machines of different kinds may
share one home directory.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)
_config: Any = jax.config  # JAX adds the fields while it is imported: no type has them

# Beyond it JAX removes the least recently used programs. With a bound JAX also locks the directory,
# so that several processes may share it.
MAX_BYTES = 2 << 30
OFF = "off"


def use(directory: str) -> Path | None:
    """Let JAX keep compiled programs in a directory below ``directory``; return that directory.

    ``directory``: a path, ``"auto"`` for the user's cache, ``"off"`` to keep nothing (returns
    None). A directory that JAX was given otherwise (JAX_COMPILATION_CACHE_DIR, for example) stays
    in use. Returns None with a warning if the directory cannot be written.
    """
    if (given := _given()) is not None:
        return given
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
        logger.warning("compiled programs are not kept for the next start: %s", error)
        return None
    _tell(str(path))
    return path


# "path": the directory that ``use`` set in JAX.
_ours: dict[str, str | None] = {}
# Least seconds of compilation of a program that JAX keeps, as it was before this module changed it.
_least_s: float = _config.jax_persistent_cache_min_compile_time_secs


def _given() -> Path | None:
    """Return the directory that JAX was given by others; an empty variable counts as unset."""
    held = _config.jax_compilation_cache_dir
    return Path(held) if held and held != _ours.get("path") else None


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Keep each program that is compiled meanwhile, however short its compilation is.

    Not in a directory that JAX was given otherwise. Later programs of the process are kept as JAX
    is told, by default from a second on: for each, JAX reads the sizes of all files that it keeps.
    """
    if _given() is not None:
        yield
        return
    _config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        yield
    finally:
        _config.update("jax_persistent_cache_min_compile_time_secs", _least_s)


def _tell(path: str | None) -> None:
    if path == _config.jax_compilation_cache_dir:
        return
    _config.update("jax_compilation_cache_max_size", MAX_BYTES)
    _config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _config.update("jax_compilation_cache_dir", path)
    # JAX may have looked for a directory already, and found none.
    compilation_cache.reset_cache()
    _ours["path"] = path


@functools.cache
def machine() -> str:
    """Return a name of this processor's instruction sets, which compiled programs rely on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        listed = [line for line in lines if line.startswith(("flags", "Features"))]
        flags = sorted({word for line in listed for word in line.split()})
    except OSError:
        flags = [platform.processor()]
    return hashlib.sha256(" ".join([platform.machine(), *flags]).encode()).hexdigest()[:16]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slipway" / "compiled"
