"""Execution of `slipway quantize`: a float HF directory written with packed projections.

Not here: the rounding (slipway/checkpoint/quantize.py).
"""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from slipway.checkpoint import files, hub, quantize
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
    wanted = tensor_reader.wanted(
        linear.quantize(declaration, scheme.bits, scheme.group, tables=False)
    )
    view = quantize.packed_view(checkpoint, wanted)
    specs = {
        name: Spec(files.DTYPES[tensor.dtype], tensor.shape)
        for name, tensor in view.tensors.items()
    }
    packed = [name.removesuffix(PACKED) for name in specs if name.endswith(PACKED)]
    shapes = {name + SHAPE: np.array(checkpoint.tensors[name].shape, np.int64) for name in packed}
    specs |= {name: Spec(shape.dtype, shape.shape) for name, shape in shapes.items()}
    on_start(sum(spec.nbytes for spec in specs.values()))
    try:
        with new_directory(out_dir, False):
            writer = SafetensorsWriter(
                out_dir, specs, size_bytes(shard_size), identity="", resume=False
            )

            def write(name: str) -> None:
                array = shapes[name] if name in shapes else np.ascontiguousarray(view.array(name))
                writer.write(name, iter([(0, array)]))
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


def _write_extras(aside: Path, checkpoint: files.Checkpoint, scheme: Scheme) -> None:
    """Write config.json with the scheme, and copy the files that belong to the model's text."""
    write_json(
        aside / "config.json", checkpoint.config | {quantize.FIELD: quantize.config_of(scheme)}
    )
    if (generation := generation_file(None, checkpoint.directory)) is not None:
        shutil.copyfile(generation, aside / GENERATION)
    copy_tokenizer(checkpoint.directory, aside)
