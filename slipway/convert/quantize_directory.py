"""Execution of `slipway quantize`: a float HF directory written with packed projections.

Not here: the rounding (slipway/checkpoint/quantize.py).
"""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from slipway.checkpoint import files, hub, parts, quantize
from slipway.checkpoint.quantize import PACKED, SHAPE, Scheme
from slipway.checkpoint.shards import Spec, write_json
from slipway.convert.conversion import size_bytes
from slipway.convert.tokenizer import GENERATION, copy_tokenizer, generation_file
from slipway.convert.writer import ASIDE, SafetensorsWriter, new_directory
from slipway.errors import CheckpointError, InvalidConfig


def quantize_directory(
    model: str,
    out_dir: Path,
    scheme: Scheme,
    shard_size: str = "5GB",
    on_start: Callable[[int], None] = lambda size_bytes: None,
    progress: Callable[[int], None] = lambda size_bytes: None,
) -> None:
    """Write ``model``, a directory or a hub id, to ``out_dir``, which must be new or empty.

    Embedding tables stay floats. On any error nothing stays in ``out_dir``. Raises UnsupportedModel
    for an architecture that Slipway does not run, InvalidConfig for a model that is packed already
    or a group that does not divide a row, CheckpointError for problems of the files.
    """
    checkpoint, wanted = _checked(model, scheme)
    view = quantize.packed_view(checkpoint, wanted)
    # The parts of a fused tensor are packed one by one and written as one tensor.
    held = parts.by_tensor(view.tensors)
    specs = {
        name: Spec(files.DTYPES[view.tensors[keys[0]].dtype], _shape(keys, view))
        for name, keys in held.items()
    }
    shapes = {
        name + SHAPE: np.array(_shape(keys, checkpoint), np.int64)
        for name, keys in parts.by_tensor(checkpoint.tensors).items()
        if name + PACKED in specs
    }
    specs |= {name: Spec(shape.dtype, shape.shape) for name, shape in shapes.items()}
    on_start(sum(spec.nbytes for spec in specs.values()))
    try:
        with new_directory(out_dir, False):
            writer = SafetensorsWriter(
                out_dir, specs, size_bytes(shard_size), identity="", resume=False
            )

            def write(name: str) -> None:
                array = shapes.get(name)
                if array is None:
                    array = parts.joined({key: view.array(key) for key in held[name]})
                writer.write(name, iter([(0, np.ascontiguousarray(array))]))
                progress(specs[name].nbytes)

            try:
                with ThreadPoolExecutor() as pool:
                    list(pool.map(write, specs))
                _write_extras(out_dir / ASIDE, checkpoint, scheme)
            except BaseException:  # after an interruption, too, nothing stays
                writer.abandon()
                raise
            writer.finish()
    except OSError as error:
        raise CheckpointError(out_dir, [f"cannot be written: {error}"]) from error


def _checked(model: str, scheme: Scheme) -> tuple[files.Checkpoint, dict[str, tuple[int, ...]]]:
    """Return the checkpoint under declared names, and the shapes of its packed tensors.

    Raises as ``quantize_directory`` does.
    """
    from slipway import models  # imports JAX, which the other commands of this folder do not need
    from slipway.checkpoint import names, tensor_reader
    from slipway.nn import linear

    checkpoint = files.open_checkpoint(hub.resolve(model))
    if checkpoint.config.get(quantize.FIELD) is not None:
        raise InvalidConfig(
            "model", model, f"float weights; its config.json has a {quantize.FIELD}"
        )
    declaration = models.declare(checkpoint.config)
    checkpoint = names.declared(checkpoint, tensor_reader.wanted(declaration))
    ignored = (*files.INERT_TENSORS, *declaration.config.unused_tensors)
    tensor_reader.check(declaration, checkpoint, np.float32, ignore=ignored)
    packed = linear.quantize(declaration, scheme.bits, scheme.group, tables=False)
    return checkpoint, tensor_reader.wanted(packed)


def _shape(keys: list[str], checkpoint: files.Checkpoint) -> tuple[int, ...]:
    """Return the shape of the tensor of which ``keys`` are the parts."""
    return parts.shape({key: checkpoint.tensors[key].shape for key in keys})


def _write_extras(aside: Path, checkpoint: files.Checkpoint, scheme: Scheme) -> None:
    """Write config.json with the scheme, and copy the files that belong to the model's text."""
    write_json(
        aside / "config.json", checkpoint.config | {quantize.FIELD: quantize.config_of(scheme)}
    )
    if (generation := generation_file(None, checkpoint.directory)) is not None:
        shutil.copyfile(generation, aside / GENERATION)
    copy_tokenizer(checkpoint.directory, aside)
