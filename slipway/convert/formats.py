"""Decides which format a path holds, by what lies there, not by its name alone. Knows the readers, no rules."""

import shutil
import tempfile
import weakref
from pathlib import Path

from slipway.checkpoint import files
from slipway.convert import remote
from slipway.convert.archives import open_h5, open_msgpack, open_npz
from slipway.convert.orbax import is_orbax, open_orbax
from slipway.convert.source import SafetensorsSource, Source
from slipway.errors import CheckpointError

_ARCHIVES = ("params.npz", "model.npz", "flax_model.msgpack")  # in a directory
_HDF5, _ZIP = b"\x89HDF", b"PK\x03\x04"


def open_source(location: str | Path) -> Source:
    """The checkpoint at a path, or at a ``gs://`` or ``s3://`` address that holds an Orbax tree or an HF directory.

    Raises CheckpointError for what is none, listing everything wrong with what is one.
    """
    if remote.is_address(location):
        return _open_remote(str(location))
    path = Path(location).expanduser()
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise CheckpointError(location, ["no such file or directory"])
    files.refuse_adapter(path)
    if any(path.glob("*.safetensors")) or (path / files.INDEX).exists():
        return SafetensorsSource(files.open_tensors(path))
    if held := [path / name for name in _ARCHIVES if (path / name).is_file()]:
        if len(held) > 1:
            names = ", ".join(file.name for file in held)
            raise CheckpointError(location, [f"several checkpoints in this directory: {names}; give one by its path"])
        return _open_file(held[0])
    if is_orbax(path):
        return open_orbax(path)
    expected = (
        "Orbax, safetensors, params.npz, model.npz, flax_model.msgpack; or a .msgpack, .npz, .h5 or .safetensors file"
    )
    raise CheckpointError(location, [f"no checkpoint found in this directory; expected {expected}"])


def _open_remote(address: str) -> Source:
    """Orbax is read where it lies; safetensors are copied, and the copy lives as long as the source."""
    place = remote.find(address)
    if any(path.name.endswith(".safetensors") for path in place.iterdir()):
        directory = Path(tempfile.mkdtemp(prefix="slipway-"))
        try:
            remote.copy_safetensors(place, directory)
            source = SafetensorsSource(files.open_tensors(directory), address)
        except BaseException:  # an interruption, too, leaves nothing behind
            shutil.rmtree(directory)
            raise
        weakref.finalize(source, shutil.rmtree, directory, ignore_errors=True)
        return source
    if is_orbax(place):
        return open_orbax(place)
    expected = "an Orbax checkpoint or an HF directory of safetensors; copy anything else to a local directory first"
    raise CheckpointError(address, [f"no checkpoint found at this address; expected {expected}"])


def _open_file(path: Path) -> Source:
    with path.open("rb") as file:
        head = file.read(4)
    if path.suffix == ".safetensors":
        return SafetensorsSource(files.open_file(path))
    if head == _HDF5:
        return open_h5(path)
    if head == _ZIP or path.suffix == ".npz":
        return open_npz(path)
    return open_msgpack(path)
