"""Loading of any model onto its devices: files, declaration on a mesh, checks, arrays.

Not here: what a language model needs beside its arrays, such as tokenizer, cache and compiled steps
(engine/launch.py).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from slipway import mesh as meshes
from slipway.checkpoint import files, hub, names, quantize, tensor_reader
from slipway.checkpoint.files import Checkpoint
from slipway.nn import linear

# Tensors that need no declaration: their values follow from config.json, or have no effect.
IGNORED_TENSORS = (*files.INERT_TENSORS, "*.weight_shape")


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Files of one model: the checkpoint, and config.json with overrides applied.

    ``is_dummy``: the weights are random; the checkpoint then has no tensors.
    """

    checkpoint: Checkpoint
    raw_config: dict[str, Any]
    is_dummy: bool


def open_files(
    model: str,
    revision: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    is_dummy: bool = False,
) -> ModelFiles:
    """Open the files of a model, a directory or a hub id.

    ``overrides``: fields to replace in config.json; None removes a field. Raises InvalidConfig and
    CheckpointError as ``hub.resolve`` and ``files.open_checkpoint`` do.
    """
    directory = hub.resolve(
        model, revision, hub.WITHOUT_WEIGHTS if is_dummy else hub.ALLOW_PATTERNS
    )
    checkpoint = (
        files.open_without_weights(directory) if is_dummy else files.open_checkpoint(directory)
    )
    merged = checkpoint.config | dict(overrides or {})
    removed = {field for field, value in (overrides or {}).items() if value is None}
    return ModelFiles(checkpoint, {k: v for k, v in merged.items() if k not in removed}, is_dummy)


def on_mesh(
    declaration: Any,
    mesh: Mesh,
    dtype: Any,
    layer_form: Callable[[Any, Mesh, Any], Any] | None = None,
    scheme: quantize.Scheme | None = None,
) -> Any:
    """Return the declaration as the devices hold it.

    Its weights are packed by ``scheme``, if that is given; its axes are fitted to the mesh; and its
    stacks are converted by ``layer_form``, unless that is None. ``dtype``: of floats. Raises
    InvalidConfig if the scheme or the mesh does not divide an axis.
    """
    if scheme is not None:
        declaration = linear.quantize(declaration, scheme.bits, scheme.group)
    declaration = meshes.fit(declaration, mesh)
    return declaration if layer_form is None else layer_form(declaration, mesh, dtype)


def checked(
    declaration: Any,
    checkpoint: Checkpoint,
    dtype: Any,
    ignored: Sequence[str] = IGNORED_TENSORS,
    scheme: quantize.Scheme | None = None,
) -> Checkpoint:
    """Return the checkpoint under the declaration's names, after checking every tensor.

    Its weights are packed by ``scheme``, if that is given. ``ignored``: glob patterns of tensors
    that need no declaration. No device memory is used. Raises CheckpointError, listing every
    mismatch.
    """
    checkpoint = names.declared(checkpoint, tensor_reader.names(declaration))
    if scheme is not None:
        checkpoint = quantize.packed_view(checkpoint, tensor_reader.wanted(declaration))
    tensor_reader.check(declaration, checkpoint, dtype, ignore=ignored)
    return checkpoint


def arrays(
    declaration: Any, checkpoint: Checkpoint | None, mesh: Mesh, dtype: Any, seed: int = 0
) -> Any:
    """Return the declaration's tree with arrays on the mesh.

    ``checkpoint``: a ``checked`` one; None: random weights, drawn from ``seed``.
    """
    if checkpoint is None:
        return tensor_reader.dummy(declaration, mesh, dtype, seed=seed)
    return tensor_reader.read(declaration, checkpoint, mesh, dtype=dtype)
