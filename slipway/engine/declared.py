"""Model of an engine as its devices will hold it: declared, sized and checked, not yet loaded.

Not here: loading and compilation (launch.py), declarations themselves (models/).
"""

import dataclasses
import logging
import math
from typing import Any

import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from slipway import mesh as meshes
from slipway import models, tree
from slipway.checkpoint import files, quantize
from slipway.engine.batch import Bucket, buckets
from slipway.engine.caches import Caches
from slipway.engine.config import EngineConfig
from slipway.engine.drafts import loading
from slipway.engine.drafts.draft_program import DRAFT, FILL
from slipway.engine.drafts.loading import Drafting
from slipway.errors import InvalidConfig, UnsupportedModel
from slipway.models.decoder import LanguageModel
from slipway.nn import moe
from slipway.ops import backend
from slipway.runtime import load
from slipway.runtime.load import ModelFiles

logger = logging.getLogger(__name__)

SCHEMES = {"int8": quantize.Scheme(8, 0), "int4": quantize.Scheme(4, 32)}
NAMED_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Declared:
    """Model on a mesh, and its draft model if drafts come from one.

    ``checkpoint``: the files, every tensor checked; None: random weights. ``dtype``: of floats.
    ``shapes``: the buckets of steps.
    """

    model: LanguageModel
    checkpoint: files.Checkpoint | None
    drafting: Drafting | None
    raw_config: dict[str, Any]
    mesh: Mesh
    dtype: Any
    max_model_len: int
    caches: Caches
    shapes: list[Bucket]

    @property
    def platform(self) -> str:
        """Platform of the devices."""
        return self.mesh.devices.flat[0].platform

    @property
    def ignored(self) -> tuple[str, ...]:
        """Glob patterns of tensors that a checkpoint may hold and the model does not use."""
        return _ignored(self.model)

    @property
    def weights_bytes(self) -> int:
        """Size of the model's weights on one device."""
        return _weights_bytes(self.model, self.mesh, self.dtype)

    @property
    def draft_bytes(self) -> int:
        """Size of the draft model's weights on one device."""
        if self.drafting is None:
            return 0
        return _weights_bytes(self.drafting.declaration, self.mesh, self.dtype)

    @property
    def further_programs(self) -> tuple[str, ...]:
        """Names of programs that are called for each bucket beside the forward pass."""
        return () if self.drafting is None else (DRAFT, FILL)


def declare(held: ModelFiles, config: EngineConfig) -> Declared:
    """Declare the model of ``held`` files on the mesh of a configuration; check every tensor.

    Raises CheckpointError, UnsupportedModel and InvalidConfig; no device memory is used.
    """
    checkpoint, raw = held.checkpoint, held.raw_config
    mesh = _mesh(config)
    scheme = _scheme(config.quantization, raw)
    fields = {key: value for key, value in raw.items() if key != quantize.FIELD}
    layer_form = backend.of(mesh.devices.flat[0].platform).layer_form
    dtype = _dtype(config.dtype, raw, checkpoint)
    model: LanguageModel = load.on_mesh(
        models.declare(fields), mesh, dtype, layer_form=layer_form, scheme=scheme
    )
    model = _with_exchange(model, mesh, dtype, config=config)
    length = _max_model_len(config.max_model_len, model.config.max_context)
    weights_of = None
    if not held.is_dummy:
        ignored = _ignored(model)
        weights_of = load.checked(model, checkpoint, dtype, ignored=ignored, scheme=scheme)
    asked = config.speculation
    if asked is not None and asked.num_speculative_tokens >= length:
        field = "speculative_config: num_speculative_tokens"
        expected = f"less than max_model_len ({length})"
        raise InvalidConfig(field, asked.num_speculative_tokens, expected)
    drafting = loading.prepare(
        config.speculation,
        held,
        mesh,
        dtype=dtype,
        scheme=scheme,
        target=model,
    )
    draft_specs = () if drafting is None else drafting.specs
    return Declared(
        model=model,
        checkpoint=weights_of,
        drafting=drafting,
        raw_config=raw,
        mesh=mesh,
        dtype=dtype,
        max_model_len=length,
        caches=Caches(model, draft_specs, mesh, dtype=dtype, page_size=config.page_size),
        shapes=_buckets(config),
    )


def _ignored(declaration: LanguageModel) -> tuple[str, ...]:
    """Return glob patterns of tensors that a checkpoint may hold and the model does not use."""
    return (*load.IGNORED_TENSORS, *declaration.config.unused_tensors)


def _with_exchange(
    declaration: LanguageModel, mesh: Mesh, dtype: Any, *, config: EngineConfig
) -> LanguageModel:
    """Return the declaration with the way in which groups of experts join their results; log it.

    Raises InvalidConfig for groups of devices with different experts, if the model has none.
    """
    groups, exchange = config.expert_parallel_size, config.expert_exchange
    if groups == 1:
        return declaration
    if not declaration.load_shape[0]:
        raise InvalidConfig("expert_parallel_size", groups, "1: the model has no experts")
    platform = mesh.devices.flat[0].platform
    if exchange == "auto" and "send_rows" not in backend.of(platform).bodies:
        exchange = "sum"
    declaration = moe.with_exchange(declaration, exchange)
    layer = moe.layers(declaration)[0]
    sizes = {"groups": groups, "parts": meshes.parts("expert_mlp", mesh)}
    embed, itemsize = layer.gate.weight.sizes["embed"], np.dtype(dtype).itemsize
    tokens = {shape.num_tokens for shape in _buckets(config)}
    sending = [n for n in sorted(tokens) if layer.sends_rows((n, embed), itemsize, **sizes)]
    steps = (
        f"all-to-all in steps of {', '.join(map(str, sending))} tokens, else " if sending else ""
    )
    logger.info("%d groups of experts join their results by %sone sum", groups, steps)
    return declaration


def _buckets(config: EngineConfig) -> list[Bucket]:
    return buckets(config.max_num_seqs, config.max_num_batched_tokens, config.max_rows)


def _mesh(config: EngineConfig) -> Mesh:
    copies, devices = config.data_parallel_size, config.tensor_parallel_size
    return meshes.make_mesh(copies, devices, expert=config.expert_parallel_size)


def _weights_bytes(declaration: Any, mesh: Mesh, dtype: Any) -> int:
    """Return the size of the weights on one device."""

    def size(param: tree.Param) -> int:
        shape = NamedSharding(mesh, meshes.partition(param, mesh)).shard_shape(param.shape)
        return math.prod(shape) * param.held_as(dtype).itemsize

    return sum(size(leaf.param) for leaf in tree.leaves(declaration))


def _scheme(asked: str | None, raw: dict[str, Any]) -> quantize.Scheme | None:
    """Return the packing of the projections: that of the files, or the one asked for.

    Raises InvalidConfig if the two differ.
    """
    held = quantize.read_scheme(raw)
    if asked is None:
        return held
    if held is not None and SCHEMES[asked] != held:
        expected = f"none, for files of {held.bits} bits in groups of {held.group or 'a row'}"
        raise InvalidConfig("quantization", asked, expected)
    return SCHEMES[asked]


def _dtype(name: str, raw: dict[str, Any], checkpoint: files.Checkpoint) -> Any:
    """Return the dtype ``name``; for "auto" that of config.json, else that of most tensors.

    Raises UnsupportedModel if config.json has another dtype than those of NAMED_DTYPES.
    """
    stated = raw.get("dtype") or raw.get("torch_dtype")
    if name == "auto" and stated is not None:
        if stated not in NAMED_DTYPES:
            raise UnsupportedModel("config.json: dtype", stated, " | ".join(NAMED_DTYPES))
        name = stated
    if name == "auto":
        held = [files.DTYPES[tensor.dtype].name for tensor in checkpoint.tensors.values()]
        name = max(NAMED_DTYPES, key=held.count) if held else "bfloat16"
    return NAMED_DTYPES[name]


def _max_model_len(asked: int | None, longest: int) -> int:
    if asked is not None and asked > longest:
        raise InvalidConfig("max_model_len", asked, f"at most {longest}, the model's context")
    return asked or longest
