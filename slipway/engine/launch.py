"""From a model's name to an engine that runs: reads, declares, sizes the cache, loads and compiles; keeps nothing.

Loading and compiling overlap: both need only the declaration.
"""

import dataclasses
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from slipway import mesh as meshes
from slipway import models, ops, tree
from slipway.checkpoint import files, quantize
from slipway.checkpoint.swap import Weights
from slipway.codec.tokenizer import Tokenizer
from slipway.engine import batch as batches
from slipway.engine import compile_cache, memory, nodes
from slipway.engine.admission import Limits
from slipway.engine.batch import Bucket, Repeat, Sizes
from slipway.engine.config import EngineConfig
from slipway.engine.engine import Engine
from slipway.engine.params import generation_defaults
from slipway.engine.step import Step
from slipway.errors import InvalidConfig, UnsupportedModel
from slipway.runtime import load

logger = logging.getLogger(__name__)

LAYERS = {"cpu": tree.separate}  # docs/adr/003: arrays per layer on a CPU, stacked and scanned elsewhere
SCHEMES = {"int8": quantize.Scheme(8, 0), "int4": quantize.Scheme(4, 32)}
# Several decode steps in a call: docs/log.md has what it gained, by size of the model and number of rows.
SMALL_BYTES, AUTO_STEPS, MAX_REPEATED_ROWS = 32 * 2**20, 8, 32
NAMED_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model whose arrays are on their devices and whose programs are compiled, and what its files say."""

    step: Step
    weights: Weights
    kv: jax.Array
    shapes: list[Bucket]
    limits: Limits
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    defaults: dict[str, Any]


def launch(model: str, config: EngineConfig) -> Engine:
    """Load ``model``, a directory or a hub id, and compile it.

    Raises CheckpointError, UnsupportedModel, InvalidConfig or OutOfMemory; nothing is held then.
    """
    if config.node_rank:
        raise InvalidConfig("node_rank", config.node_rank, "0 here; the other processes run `slipway follow`")
    it = _load(model, config)
    step = it.step if config.nnodes == 1 else nodes.Leading(it.step, it.shapes, config)
    return Engine(
        step, it.weights, it.kv, it.shapes, it.limits, it.tokenizer, it.eos_ids, config.seed, it.defaults
    )  # fmt: skip


def follow(model: str, config: EngineConfig) -> None:
    """Load this process's part of ``model`` and repeat the first process's steps until it closes its engine.

    Raises as ``launch`` does.
    """
    if not config.node_rank:
        raise InvalidConfig("node_rank", config.node_rank, "1 or more: process 0 leads")
    it = _load(model, config)
    nodes.follow(it.step, it.weights.arrays, it.kv, it.shapes, it.limits.sizes, config)


def _load(model: str, config: EngineConfig) -> Loaded:
    started = time.perf_counter()
    nodes.join(config)
    kept = compile_cache.use(config.compilation_cache)
    held = load.open_files(model, config.revision, config.hf_overrides, config.load_format == "dummy")
    checkpoint, raw = held.checkpoint, held.raw_config
    tokenizer = None if config.skip_tokenizer_init else Tokenizer.load(checkpoint.directory)
    mesh = meshes.make_mesh(config.data_parallel_size, config.tensor_parallel_size)
    scheme = _scheme(config.quantization, raw)
    declaration = models.declare({key: value for key, value in raw.items() if key != quantize.FIELD})
    model_config, platform = declaration.config, mesh.devices.flat[0].platform
    declaration = load.on_mesh(declaration, mesh, LAYERS.get(platform), scheme)
    dtype = _dtype(config.dtype, raw, checkpoint)
    length = _max_model_len(config.max_model_len, model_config.max_context)
    weights_of = None  # the checkpoint of the weights, checked before anything takes time
    if not held.is_dummy:
        weights_of = load.checked(declaration, checkpoint, dtype, scheme=scheme)
    step, shapes, num_pages = _compiled(declaration, mesh, dtype, length, config)

    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(step.compile, shapes)
        params = load.arrays(declaration, weights_of, mesh, dtype, config.seed)
        kv = step.empty_kv()
        rest.result()
    weights = Weights(declaration, mesh, dtype, params, raw, config.hf_overrides, load.IGNORED_TENSORS)
    limits = Limits(
        vocab_size=model_config.vocab_size, max_model_len=length, max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens, page_size=config.page_size, num_pages=num_pages,
        copies=config.data_parallel_size, prefix_caching=_caches(config.enable_prefix_caching, model_config),
        stream_interval=config.stream_interval, max_logprobs=config.max_logprobs,
        bodies=ops.bodies(platform, step.kv, dtype),
    )  # fmt: skip
    logger.info("%s with %s; compiled programs in %s", model, config, kept)
    _announce(platform, np.dtype(dtype).name, mesh, limits, step.repeats, time.perf_counter() - started)
    return Loaded(
        step, weights, kv, shapes, limits, tokenizer, _eos_ids(raw, checkpoint.generation_config, tokenizer),
        generation_defaults(checkpoint.generation_config),
    )  # fmt: skip


def _compiled(
    declaration: Any, mesh: Mesh, dtype: Any, length: int, config: EngineConfig
) -> tuple[Step, list[Bucket], int]:
    """The step with its largest shape compiled, all its shapes, and the pages that fit beside what that shape needs.

    The cache's size is part of the program: it is first compiled as if it needed no temporaries, which is final where
    the cache is as large as could be useful, and compiled once more with fewer pages where they do not fit.
    """
    model, platform = declaration.config, mesh.devices.flat[0].platform
    heads = max(model.num_key_value_heads, mesh.shape[meshes.TENSOR])
    empty = jax.eval_shape(
        lambda: ops.allocate_kv(platform, model.num_hidden_layers, 1, config.page_size, heads, model.head_dim, dtype)
    )
    devices = mesh.shape[meshes.TENSOR]
    page_bytes = math.prod(empty.shape) * empty.dtype.itemsize // devices
    weights = sum(_shard_bytes(leaf.param, mesh, dtype) for leaf in tree.leaves(declaration))
    mine = mesh.local_devices
    budget = memory.budget(config.memory_fraction, mine[0], len(mine), weights, page_bytes)
    budget = dataclasses.replace(budget, total=nodes.least(budget.total))
    table_width = -(-length // config.page_size)
    shapes = batches.buckets(config.max_num_seqs, config.max_num_batched_tokens)
    repeats = _repeats(config, mesh, weights, shapes)
    temp, useful = 0, config.max_num_seqs * table_width
    while True:
        num_pages = budget.pages(temp, useful)
        shape = (empty.shape[0], config.data_parallel_size * num_pages, *empty.shape[2:])
        kv = jax.ShapeDtypeStruct(shape, empty.dtype, sharding=NamedSharding(mesh, meshes.spec(ops.kv_axes(empty))))
        num_logprobs = model.vocab_size if config.max_logprobs < 0 else config.max_logprobs
        sizes = Sizes(config.page_size, num_pages, table_width, model.vocab_size, length, num_logprobs)
        step = Step(declaration, mesh, kv, dtype, sizes, shapes[-1].num_rows, repeats)
        # memory is ample where the cache can be as large as useful: then all shapes compile at once
        step.compile(shapes if num_pages == useful else shapes[-1:])
        temp = step.temp_bytes(shapes[-1])
        if budget.pages(temp, useful) >= num_pages:
            return step, shapes, num_pages


def _repeats(config: EngineConfig, mesh: Mesh, weights: int, shapes: list[Bucket]) -> Repeat | None:
    """How many decode steps one call may make, and its shape: one for any number of rows, as padding costs little."""
    steps = config.decode_steps
    if steps == "auto":
        alone_on_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
        steps = AUTO_STEPS if alone_on_cpu and weights <= SMALL_BYTES else 1
    rows = min(config.max_num_seqs, MAX_REPEATED_ROWS)
    return Repeat(next(shape for shape in shapes if shape.num_tokens >= rows), steps) if steps > 1 else None


def _shard_bytes(param: tree.Param, mesh: Mesh, dtype: Any) -> int:
    shape = NamedSharding(mesh, meshes.partition(param)).shard_shape(param.shape)
    return math.prod(shape) * param.held_as(dtype).itemsize


def _scheme(asked: str | None, raw: dict[str, Any]) -> quantize.Scheme | None:
    """How the projections are packed: as the files are, or as asked."""
    held = quantize.read_scheme(raw)
    if asked is None:
        return held
    if held is not None and SCHEMES[asked] != held:
        expected = f"none, for files of {held.bits} bits in groups of {held.group or 'a row'}"
        raise InvalidConfig("quantization", asked, expected)
    return SCHEMES[asked]


def _caches(asked: bool, model: Any) -> bool:
    """Whether equal prefixes may share pages: not where a token's keys depend on how long its prompt is."""
    scaling = model.rope_scaling
    if asked and scaling is not None and scaling.rope_type == "dynamic":
        logger.info("no prefix caching: dynamic rope scaling turns a prefix by the length of the whole prompt")
        return False
    return asked


def _dtype(name: str, raw: dict[str, Any], checkpoint: files.Checkpoint) -> Any:
    """The option, else what config.json says, else what most tensors are."""
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
        raise InvalidConfig("max_model_len", asked, f"at most {longest}, what the model can read")
    return asked or longest


def _eos_ids(raw: dict[str, Any], generation: dict[str, Any], tokenizer: Tokenizer | None) -> frozenset[int]:
    """Every token that ends an output: config.json's, generation_config.json's and the tokenizer's."""
    stated = [raw.get("eos_token_id"), generation.get("eos_token_id")]
    ids = [token for value in stated if value is not None for token in (value if isinstance(value, list) else [value])]
    return frozenset(ids) | (frozenset() if tokenizer is None else tokenizer.eos_token_ids)


def _announce(platform: str, dtype: str, mesh: Mesh, limits: Limits, repeats: Repeat | None, seconds: float) -> None:
    tokens = limits.num_pages * limits.page_size
    logger.info("on %s in %s, mesh %s; op bodies %s", platform, dtype, dict(mesh.shape), limits.bodies)
    logger.info("decode steps in one call: %s", "1" if repeats is None else f"up to {repeats.num_steps}")
    logger.info(
        "cache: %d pages of %d tokens = %d tokens, %.1f requests of the full context (%d); ready in %.1f s",
        limits.num_pages, limits.page_size, tokens, tokens / limits.max_model_len, limits.max_model_len, seconds,
    )  # fmt: skip
