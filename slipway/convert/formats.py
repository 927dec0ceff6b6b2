"""Detection of a checkpoint's format, by the contents of a path and not only by its name.

Not here: the readers (archives.py, orbax.py, source.py), buckets (remote.py).
"""

import json
import re
import shutil
import tempfile
import weakref
from pathlib import Path

from slipway.checkpoint import files
from slipway.convert import remote
from slipway.convert.archives import open_h5, open_msgpack, open_npz
from slipway.convert.orbax import is_orbax, open_orbax
from slipway.convert.source import JoinedSource, SafetensorsSource, Source
from slipway.errors import CheckpointError

_ARCHIVES = ("params.npz", "model.npz", "flax_model.msgpack")  # in a directory
# Index of a model that transformers' Flax classes saved in shards.
_INDEX = "flax_model.msgpack.index.json"
# Flax's and Orbax's file of a tree, except for arrays in separate files beside it.
_AGGREGATE = "checkpoint"
_NUMBERED = re.compile(r"checkpoint_(\d+)")
_HDF5, _ZIP = b"\x89HDF", b"PK\x03\x04"


def open_source(location: str | Path) -> Source:
    """Open the checkpoint at a path or at a ``gs://`` or ``s3://`` address.

    An address must hold an Orbax tree or an HF directory. Raises CheckpointError where there is no
    checkpoint, or listing every problem of one.
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
            raise CheckpointError(
                location, [f"several checkpoints in this directory: {names}; give one by its path"]
            )
        return _open_file(held[0])
    if (path / _INDEX).is_file():
        return _open_shards(path)
    if (newest := _newest(path)) is not None:
        return _open_aggregate(newest) if newest.is_dir() else _open_file(newest)
    if is_orbax(path):
        return open_orbax(path)
    known = ", ".join(("Orbax", "safetensors", *_ARCHIVES, "checkpoint_N"))
    expected = f"{known}; or a .msgpack, .npz, .h5 or .safetensors file"
    raise CheckpointError(location, [f"no checkpoint found in this directory; expected {expected}"])


def _open_remote(address: str) -> Source:
    """Open an Orbax tree in place, or a copy of safetensors that lives as long as the source."""
    place = remote.find(address)
    if any(path.name.endswith(".safetensors") for path in place.iterdir()):
        directory = Path(tempfile.mkdtemp(prefix="slipway-"))
        try:
            remote.copy_safetensors(place, directory)
            source = SafetensorsSource(files.open_tensors(directory), address)
        except BaseException:  # after an interruption, too, nothing stays
            shutil.rmtree(directory)
            raise
        weakref.finalize(source, shutil.rmtree, directory, ignore_errors=True)
        return source
    if is_orbax(place):
        return open_orbax(place)
    expected = (
        "an Orbax checkpoint or an HF directory of safetensors; "
        "copy anything else to a local directory first"
    )
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
    archive = open_msgpack(path)
    if archive.elsewhere:
        others = len(archive.elsewhere) - 1
        problem = (
            f"{archive.elsewhere[0]} and {others} others lie beside this file: "
            "give the directory, as it was written"
        )
        raise CheckpointError(path, [problem])
    return archive


def _open_shards(path: Path) -> Source:
    """Open the shards of transformers' Flax classes, which the index lists.

    Raises CheckpointError.
    """
    try:
        files_of = json.loads((path / _INDEX).read_bytes())["weight_map"]
        names = {key.replace("/", "."): str(file) for key, file in files_of.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(path, [f"{_INDEX}: no JSON with a weight_map: {error}"]) from error
    if missing := sorted(file for file in set(names.values()) if not (path / file).is_file()):
        raise CheckpointError(path, [f"{file}: missing; {_INDEX} names it" for file in missing])
    source = JoinedSource.of(
        path, [_open_file(path / file) for file in sorted(set(names.values()))]
    )
    problems = [
        f"{name}: {_INDEX} names it, no shard holds it"
        for name in sorted(names.keys() - source.specs.keys())
    ]
    problems += [
        f"{name}: in a shard, not in {_INDEX}"
        for name in sorted(source.specs.keys() - names.keys())
    ]
    if problems:
        raise CheckpointError(path, problems)
    return source


def _newest(path: Path) -> Path | None:
    """Return the newest file or folder of ``flax.training.checkpoints`` or old releases of Orbax.

    A folder contains an aggregate file. ``path`` is such a folder, or contains numbered ones; None
    for anything else.
    """
    if (path / _AGGREGATE).is_file():
        return path
    steps = {
        int(found[1]): entry
        for entry in path.iterdir()
        if (found := _NUMBERED.fullmatch(entry.name))
    }
    newest = steps[max(steps)] if steps else path
    return newest if newest.is_file() or (newest / _AGGREGATE).is_file() else None


def _open_aggregate(folder: Path) -> Source:
    """Open an aggregate, and the arrays that it only names.

    Raises CheckpointError, listing those that are missing.
    """
    archive = open_msgpack(folder / _AGGREGATE)
    if not archive.elsewhere:
        return archive
    beside = open_orbax(folder)
    if missing := [name for name in archive.elsewhere if name not in beside.specs]:
        raise CheckpointError(
            folder, [f"{name}: {_AGGREGATE} names it, no array of this name" for name in missing]
        )
    return JoinedSource.of(folder, [archive, beside])
