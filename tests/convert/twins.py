"""Shared parts of the tests of whole conversions: MaxText's files, Flax trees, exact comparison."""

from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from slipway.checkpoint import files
from slipway.convert.conversion import ConvertConfig, convert
from slipway.convert.formats import open_source

MAXTEXT = Path(__file__).parents[1] / "data" / "maxtext"
NANO = Path(__file__).parents[2] / "slipway" / "nano"
BF16 = np.dtype(ml_dtypes.bfloat16)


def tensors(directory: Path) -> dict[str, np.ndarray]:
    checkpoint = files.open_tensors(directory)
    return {name: checkpoint.array(name) for name in checkpoint.tensors}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape, name
        assert left[name].tobytes() == right[name].tobytes(), name


def restored(path: Path) -> dict:
    """Return the nested tree of an Orbax checkpoint, as Orbax restores it."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute())


def flax_tree(twin: str, folder: Path, mapping: str = "nnx") -> dict:
    """Return the nested Flax tree of an HF directory."""
    convert(open_source(MAXTEXT / twin), folder, ConvertConfig(to="npz", mapping=mapping))
    with np.load(folder / "params.npz") as archive:
        flat = {tuple(name.split(".")): archive[name] for name in archive.files}
    return unflatten_dict(
        {path: x.view(BF16) if x.dtype.kind == "V" else x for path, x in flat.items()}
    )
