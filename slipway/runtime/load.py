"""Loading of any model onto its devices: files, declaration on a mesh, checks, arrays.

Not here: what a language model needs beside its arrays, such as tokenizer, cache and compiled steps (engine/launch.py).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from slipway import mesh as meshes
from slipway.checkpoint import files, hub, names, quantize, tensor_reader
from slipway.checkpoint.files import Checkpoint
from slipway.nn import linear

# Tensors that need no declaration: their numbers follow from config.json, or change nothing.
IGNORED_TENSORS = (*files.INERT_TENSORS, "*.weight_shape")


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Files of one model: config.json with overrides applied, and the checkpoint, which has no tensors for a dummy."""

    checkpoint: Checkpoint
    raw_config: dict[str, Any]
    is_dummy: bool  # random weights: no tensor is read


def open_files(
    model: str,
    revision: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    is_dummy: bool = False,
) -> ModelFiles:
    """Open a directory or a hub id. An override of None removes the field from config.json.

    Raises InvalidConfig and CheckpointError as ``hub.resolve`` and ``files.open_checkpoint`` do.
    """
    directory = hub.resolve(model, revision, hub.WITHOUT_WEIGHTS if is_dummy else hub.ALLOW_PATTERNS)
    checkpoint = files.open_without_weights(directory) if is_dummy else files.open_checkpoint(directory)
    merged = checkpoint.config | dict(overrides or {})
    removed = {field for field, value in (overrides or {}).items() if value is None}
    return ModelFiles(checkpoint, {k: v for k, v in merged.items() if k not in removed}, is_dummy)


def on_mesh(
    declaration: Any,
    mesh: Mesh,
    layer_form: Callable[[Any], Any] | None = None,
    scheme: quantize.Scheme | None = None,
) -> Any:
    """Return the declaration with packed weights where ``scheme`` is given, in its layer form, fitted to the mesh.

    ``layer_form`` turns stacked layers into another form (``tree.separate``); None keeps them. Raises InvalidConfig
    where the scheme or the mesh does not divide an axis.
    """
    if scheme is not None:
        declaration = linear.quantize(declaration, scheme.bits, scheme.group)
    if layer_form is not None:
        declaration = layer_form(declaration)
    return meshes.fit(declaration, mesh)


def checked(
    declaration: Any,
    checkpoint: Checkpoint,
    dtype: Any,
    ignored: Sequence[str] = IGNORED_TENSORS,
    scheme: quantize.Scheme | None = None,
) -> Checkpoint:
    """Return the checkpoint under the declaration's names, packed as ``scheme`` says, after comparing every tensor.

    ``ignored``: glob patterns of tensors that need no declaration. No device memory is taken. Raises CheckpointError,
    listing every mismatch.
    """
    checkpoint = names.unwrapped(checkpoint, tensor_reader.names(declaration))
    if scheme is not None:
        checkpoint = quantize.packed_view(checkpoint, tensor_reader.wanted(declaration))
    tensor_reader.check(declaration, checkpoint, dtype, ignored)
    return checkpoint


def arrays(declaration: Any, checkpoint: Checkpoint | None, mesh: Mesh, dtype: Any, seed: int = 0) -> Any:
    """Return the declaration's tree with arrays on the mesh: the tensors of a ``checked`` checkpoint.

    Without a checkpoint the weights are random, drawn from ``seed``.
    """
    if checkpoint is None:
        return tensor_reader.dummy(declaration, mesh, dtype, seed)
    return tensor_reader.read(declaration, checkpoint, mesh, dtype)
