"""Launch of an engine from the name of a model.

Not here: loading of any model (runtime/load.py), the programs (programs.py).

Launching reads the files, declares the model, fixes the sizes of the caches, loads the weights and
compiles the programs. The last two overlap: both need the declaration only.
"""

import dataclasses
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from slipway import mesh as meshes
from slipway import models, tree
from slipway.checkpoint import files, quantize
from slipway.checkpoint.swap import Weights
from slipway.codec.tokenizer import Tokenizer
from slipway.engine import compile_cache, memory, programs
from slipway.engine.admission import Limits
from slipway.engine.batch import Bucket, Repeat, Sizes, buckets
from slipway.engine.caches import Caches
from slipway.engine.config import EngineConfig
from slipway.engine.drafts.config import SpeculativeConfig
from slipway.engine.drafts.ngram import NgramDrafter
from slipway.engine.drafts.speculation import Speculation
from slipway.engine.engine import Engine
from slipway.engine.params import generation_defaults
from slipway.errors import InvalidConfig, UnsupportedModel
from slipway.models.decoder import LanguageModel, ModelConfig
from slipway.nn import moe
from slipway.ops import backend, kv_cache
from slipway.runtime import load, multihost
from slipway.runtime.runner import Runner

logger = logging.getLogger(__name__)

SCHEMES = {"int8": quantize.Scheme(8, 0), "int4": quantize.Scheme(4, 32)}
# With decode_steps "auto", one call makes several decode steps if the weights take at most
# SMALL_BYTES; and it does so for at most MAX_REPEATED_ROWS sequences. docs/log.md has the gain by
# size of the model and number of rows.
SMALL_BYTES = 32 * 2**20
MAX_REPEATED_ROWS = 32
NAMED_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Model with arrays on its devices, compiled programs, and facts from its files."""

    runner: Runner
    weights: Weights
    shapes: list[Bucket]
    repeats: Repeat | None
    limits: Limits
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    defaults: dict[str, Any]


def launch(model: str, config: EngineConfig) -> Engine:
    """Load ``model``, a directory or a hub id, and compile its programs.

    Raises CheckpointError, UnsupportedModel, InvalidConfig or OutOfMemory, and then holds no
    memory.
    """
    if config.node_rank:
        raise InvalidConfig(
            "node_rank", config.node_rank, "0 here; the other processes run `slipway follow`"
        )
    speculation = _speculation(config.speculation)
    loaded = _load(model, config)
    leader = None
    if config.nnodes > 1:
        leader = multihost.Leader(loaded.runner, config.nnodes - 1, config.dist_init_addr)
    return Engine(
        loaded.runner,
        loaded.weights,
        shapes=loaded.shapes,
        repeats=loaded.repeats,
        limits=loaded.limits,
        tokenizer=loaded.tokenizer,
        eos_ids=loaded.eos_ids,
        seed=config.seed,
        defaults=loaded.defaults,
        leader=leader,
        speculation=speculation,
    )


def follow(model: str, config: EngineConfig) -> None:
    """Load this process's part of ``model`` and repeat the calls of process 0 until it closes.

    Raises as ``launch`` does.
    """
    if not config.node_rank:
        raise InvalidConfig("node_rank", config.node_rank, "1 or more: process 0 leads")
    loaded = _load(model, config)
    multihost.follow(loaded.runner, config.dist_init_addr)


@compile_cache.keeping()
def _load(model: str, config: EngineConfig) -> Loaded:
    """Load and compile this process's part of a model, as described in ``launch``."""
    started = time.perf_counter()
    multihost.join(config.nnodes, config.node_rank, config.dist_init_addr)
    kept = compile_cache.use(config.compilation_cache)
    held = load.open_files(
        model,
        config.revision,
        overrides=config.hf_overrides,
        is_dummy=config.load_format == "dummy",
    )
    checkpoint, raw = held.checkpoint, held.raw_config
    tokenizer = None if config.skip_tokenizer_init else Tokenizer.load(checkpoint.directory)
    mesh = _mesh(config)
    scheme = _scheme(config.quantization, raw)
    fields = {key: value for key, value in raw.items() if key != quantize.FIELD}
    platform = mesh.devices.flat[0].platform
    layer_form = backend.of(platform).layer_form
    dtype = _dtype(config.dtype, raw, checkpoint)
    declaration: LanguageModel = load.on_mesh(
        models.declare(fields), mesh, dtype, layer_form=layer_form, scheme=scheme
    )
    declaration = _with_exchange(declaration, mesh, dtype, config=config)
    length = _max_model_len(config.max_model_len, declaration.config.max_context)
    # Every tensor is checked here, before anything takes time.
    weights_of = None
    if not held.is_dummy:
        ignored = _ignored(declaration)
        weights_of = load.checked(declaration, checkpoint, dtype, ignored=ignored, scheme=scheme)
    shapes = _buckets(config)
    weights_bytes = _weights_bytes(declaration, mesh, dtype)
    repeats = _repeats(config, mesh, weights_bytes, shapes=shapes)
    runner, num_pages = _compiled(
        declaration, mesh, dtype, length=length, config=config, shapes=shapes, repeats=repeats
    )
    wanted = programs.wanted(shapes, repeats)
    weights = _load_weights(
        declaration, weights_of, runner, dtype=dtype, raw=raw, config=config, wanted=wanted
    )
    limits = _limits(declaration, config, length=length, num_pages=num_pages, bodies=runner.bodies)
    logger.info("%s with %s; compiled programs in %s", model, config, kept)
    _announce(
        platform,
        np.dtype(dtype).name,
        mesh,
        limits=limits,
        repeats=repeats,
        seconds=time.perf_counter() - started,
    )
    return Loaded(
        runner=runner,
        weights=weights,
        shapes=shapes,
        repeats=repeats,
        limits=limits,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(raw, checkpoint.generation_config, tokenizer),
        defaults=generation_defaults(checkpoint.generation_config),
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


def _speculation(config: SpeculativeConfig | None) -> Speculation | None:
    """Return what proposes drafts, None without speculation. Raises InvalidConfig."""
    if config is None:
        return None
    return Speculation(
        NgramDrafter(
            config.prompt_lookup_min,
            config.prompt_lookup_max,
            config.num_speculative_tokens,
            shared_tokens=config.shared_tokens,
        )
    )


def _mesh(config: EngineConfig) -> Mesh:
    copies, devices = config.data_parallel_size, config.tensor_parallel_size
    return meshes.make_mesh(copies, devices, expert=config.expert_parallel_size)


def _load_weights(
    declaration: LanguageModel,
    checkpoint: files.Checkpoint | None,
    runner: Runner,
    *,
    dtype: Any,
    raw: dict[str, Any],
    config: EngineConfig,
    wanted: list[tuple[str, Bucket | int]],
) -> Weights:
    """Load the weights and allocate the device state, while the ``wanted`` programs compile."""
    mesh = runner.mesh
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(runner.compile, wanted)
        params = load.arrays(declaration, checkpoint, mesh, dtype=dtype, seed=config.seed)
        weights = Weights(
            declaration,
            mesh,
            dtype,
            arrays=params,
            config=raw,
            overrides=config.hf_overrides,
            ignored=_ignored(declaration),
        )
        runner.state[programs.WEIGHTS] = programs.operands(weights)
        runner.allocate(programs.CACHES)
        runner.allocate(programs.NEWEST)
        rest.result()
    return weights


def _limits(
    declaration: LanguageModel,
    config: EngineConfig,
    *,
    length: int,
    num_pages: tuple[int, ...],
    bodies: dict[str, str],
) -> Limits:
    """Return the limits of the engine, from the configuration and the sizes of its caches."""
    asked = config.speculation
    return Limits(
        vocab_size=declaration.config.vocab_size,
        max_model_len=length,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_rows=config.max_rows,
        page_size=config.page_size,
        num_pages=num_pages,
        windows=kv_cache.page_windows(declaration.cache_specs),
        copies=config.data_parallel_size,
        prefix_caching=_caches(config.enable_prefix_caching, declaration.config),
        stream_interval=config.stream_interval,
        max_logprobs=config.max_logprobs,
        speculation=None if asked is None else dataclasses.asdict(asked),
        bodies=bodies,
    )


def _compiled(
    declaration: LanguageModel,
    mesh: Mesh,
    dtype: Any,
    *,
    length: int,
    config: EngineConfig,
    shapes: list[Bucket],
    repeats: Repeat | None,
) -> tuple[Runner, tuple[int, ...]]:
    """Return the runner with its largest bucket compiled, and the pages of each pool that fit.

    The sizes of the caches are part of the programs, and the programs' temporaries limit the
    caches. So the largest bucket is first compiled with the caches that fit without temporaries,
    and again with fewer pages until everything fits. If the first caches are as large as could ever
    be useful, all programs are compiled at once.
    """
    caches = Caches(declaration, mesh, dtype, page_size=config.page_size)
    table_width = -(-length // config.page_size)
    mine = mesh.local_devices
    budget = memory.budget(
        config.memory_fraction,
        mine[0],
        len(mine),
        weights=_weights_bytes(declaration, mesh, dtype),
        pages=caches.costs(
            config.max_num_seqs, config.max_num_batched_tokens, table_width=table_width
        ),
    )
    budget = dataclasses.replace(budget, total=multihost.least(budget.total))
    vocab_size, temp = declaration.config.vocab_size, 0
    num_logprobs = vocab_size if config.max_logprobs < 0 else config.max_logprobs
    while True:
        num_pages = budget.fit(temp)
        sizes = Sizes(
            page_size=config.page_size,
            num_pages=num_pages,
            table_width=table_width,
            vocab_size=vocab_size,
            max_model_len=length,
            num_logprobs=num_logprobs,
        )
        runner = programs.runner(
            declaration,
            mesh,
            caches.shapes(num_pages, config.data_parallel_size),
            dtype=dtype,
            sizes=sizes,
            max_rows=shapes[-1].num_rows,
            repeats=repeats,
        )
        is_ample = num_pages == budget.useful
        runner.compile(programs.wanted(shapes if is_ample else shapes[-1:], repeats))
        temp = runner.temp_bytes()
        if budget.fit(temp) >= num_pages:
            return runner, num_pages


def _repeats(
    config: EngineConfig, mesh: Mesh, weights_bytes: int, shapes: list[Bucket]
) -> Repeat | None:
    """Return the bucket and the number of decode steps of one call, None for single steps.

    One bucket serves all numbers of sequences, as rows of padding cost little.
    """
    steps = config.decode_steps
    if steps == "auto":
        is_small = mesh.size == 1 and weights_bytes <= SMALL_BYTES
        steps = backend.of(mesh.devices.flat[0].platform).decode_steps if is_small else 1
    rows = min(config.max_num_seqs, MAX_REPEATED_ROWS)
    if steps <= 1:
        return None
    return Repeat(next(shape for shape in shapes if shape.num_tokens >= rows), steps)


def _weights_bytes(declaration: LanguageModel, mesh: Mesh, dtype: Any) -> int:
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


def _caches(asked: bool, config: ModelConfig) -> bool:
    """Whether equal prefixes may share pages: not if keys depend on the length of the prompt."""
    if asked and any(rope.follows_prompt for rope in config.ropes):
        logger.info(
            "prefix caching is off: with dynamic rope scaling, the keys of a prefix depend on the "
            "length of the whole prompt"
        )
        return False
    return asked


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


def _eos_ids(
    raw: dict[str, Any], generation: dict[str, Any], tokenizer: Tokenizer | None
) -> frozenset[int]:
    """Return the end tokens of config.json, generation_config.json and the tokenizer."""
    ids: set[int] = set() if tokenizer is None else set(tokenizer.eos_token_ids)
    for value in (raw.get("eos_token_id"), generation.get("eos_token_id")):
        if value is not None:
            ids.update(value if isinstance(value, list) else [value])
    return frozenset(ids)


def _announce(
    platform: str,
    dtype: str,
    mesh: Mesh,
    *,
    limits: Limits,
    repeats: Repeat | None,
    seconds: float,
) -> None:
    """Log platform, dtype, mesh, op bodies and sizes of the caches."""
    logger.info(
        "on %s in %s, mesh %s; op bodies %s", platform, dtype, dict(mesh.shape), limits.bodies
    )
    logger.info(
        "decode steps in one call: %s", "1" if repeats is None else f"up to {repeats.num_steps}"
    )
    if limits.speculation is not None:
        logger.info("speculation: %s", limits.speculation)
    tokens = limits.num_tokens
    logger.info(
        "cache: %d pages of %d tokens = %d tokens, %.1f requests of the full context (%d); "
        "ready in %.1f s",
        limits.num_pages[0],
        limits.page_size,
        tokens,
        tokens / limits.max_model_len,
        limits.max_model_len,
        seconds,
    )
    for window, num_pages in zip(limits.windows[1:], limits.num_pages[1:]):
        logger.info("cache of layers with a window of %d positions: %d pages", window, num_pages)
