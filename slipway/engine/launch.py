"""Launch of an engine from the name of a model.

Not here: loading of any model (runtime/load.py), the programs (programs.py).

Launching reads the files, declares the model, fixes the sizes of the caches, loads the weights and
compiles the programs. The last two overlap: both need the declaration only.
"""

import dataclasses
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from slipway.checkpoint.swap import Weights
from slipway.codec.tokenizer import Tokenizer
from slipway.engine import compile_cache, memory, programs
from slipway.engine.admission import Limits
from slipway.engine.batch import Bucket, Repeat, Sizes
from slipway.engine.config import EngineConfig
from slipway.engine.declared import Declared, declare
from slipway.engine.drafts.config import SpeculativeConfig
from slipway.engine.drafts.device_drafts import Rounds
from slipway.engine.drafts.loading import DraftState
from slipway.engine.drafts.model_drafter import ModelDrafter
from slipway.engine.drafts.ngram import NgramDrafter
from slipway.engine.drafts.rounds_program import ROUNDS
from slipway.engine.drafts.speculation import Speculation
from slipway.engine.engine import Engine
from slipway.engine.params import generation_defaults
from slipway.errors import InvalidConfig
from slipway.models.decoder import ModelConfig
from slipway.ops import backend
from slipway.runtime import load, multihost
from slipway.runtime.runner import Runner

logger = logging.getLogger(__name__)

# With decode_steps "auto", one call makes several decode steps if the weights take at most
# SMALL_BYTES; and it does so for at most MAX_REPEATED_ROWS sequences. docs/log.md has the gain by
# size of the model and number of rows.
SMALL_BYTES = 32 * 2**20
MAX_REPEATED_ROWS = 32
# Rows of the smaller buckets of rounds of speculation.
ROUNDS_ROWS = (2, 8)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Model with arrays on its devices, compiled programs, and facts from its files."""

    runner: Runner
    weights: Weights
    draft_state: DraftState | None
    shapes: list[Bucket]
    repeats: Repeat | None
    rounds: Rounds | None
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
        draft_state=loaded.draft_state,
        rounds=loaded.rounds,
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
    checkpoint = held.checkpoint
    tokenizer = None if config.skip_tokenizer_init else Tokenizer.load(checkpoint.directory)
    # Every tensor is checked here, before anything takes time.
    declared = declare(held, config)
    repeats = _repeats(config, declared)
    rounds = _rounds(config, declared, repeats)
    runner, num_pages = _compiled(declared, config, repeats, rounds=rounds)
    wanted = _wanted(declared, declared.shapes, repeats, rounds=rounds)
    weights, draft_state = _load_weights(declared, runner, config, wanted=wanted)
    if config.speculation is not None:
        # The number of drafts follows from times of steps.
        programs.call_once(runner, declared.shapes, wanted)
    limits = _limits(declared, config, num_pages, bodies=runner.bodies)
    logger.info("%s with %s; compiled programs in %s", model, config, kept)
    _announce(declared, limits, repeats, seconds=time.perf_counter() - started)
    return Loaded(
        runner=runner,
        weights=weights,
        draft_state=draft_state,
        shapes=declared.shapes,
        repeats=repeats,
        rounds=rounds,
        limits=limits,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(held.raw_config, checkpoint.generation_config, tokenizer),
        defaults=generation_defaults(checkpoint.generation_config),
    )


def _speculation(config: SpeculativeConfig | None) -> Speculation | None:
    """Return what proposes drafts, None without speculation. Raises InvalidConfig."""
    if config is None:
        return None
    most = config.num_speculative_tokens
    if config.method != "ngram":
        return Speculation(ModelDrafter(most))
    return Speculation(
        NgramDrafter(
            config.prompt_lookup_min,
            config.prompt_lookup_max,
            most,
            shared_tokens=config.shared_tokens,
        )
    )


def _load_weights(
    declared: Declared, runner: Runner, config: EngineConfig, *, wanted: list[tuple[str, Any]]
) -> tuple[Weights, DraftState | None]:
    """Load the weights and allocate the device state, while the ``wanted`` programs compile."""
    model, mesh, dtype = declared.model, declared.mesh, declared.dtype
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(runner.compile, wanted)
        params = load.arrays(model, declared.checkpoint, mesh, dtype=dtype, seed=config.seed)
        weights = Weights(
            model,
            mesh,
            dtype,
            arrays=params,
            config=declared.raw_config,
            overrides=config.hf_overrides,
            ignored=declared.ignored,
        )
        runner.state[programs.WEIGHTS] = programs.operands(weights)
        runner.allocate(programs.CACHES)
        runner.allocate(programs.NEWEST)
        drafting = declared.drafting
        draft_state = None if drafting is None else drafting.load(runner, config.seed)
        rest.result()
    return weights, draft_state


def _limits(
    declared: Declared,
    config: EngineConfig,
    num_pages: tuple[int, ...],
    *,
    bodies: dict[str, str],
) -> Limits:
    """Return the limits of the engine, from the configuration and the sizes of its caches."""
    asked, fields = config.speculation, declared.model.config
    return Limits(
        vocab_size=fields.vocab_size,
        max_model_len=declared.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_rows=config.max_rows,
        page_size=config.page_size,
        num_pages=num_pages,
        windows=declared.caches.windows,
        copies=config.data_parallel_size,
        prefix_caching=_caches(config.enable_prefix_caching, fields),
        stream_interval=config.stream_interval,
        max_logprobs=config.max_logprobs,
        speculation=None if asked is None else dataclasses.asdict(asked),
        bodies=bodies,
    )


def _compiled(
    declared: Declared, config: EngineConfig, repeats: Repeat | None, *, rounds: Rounds | None
) -> tuple[Runner, tuple[int, ...]]:
    """Return the runner with its largest bucket compiled, and the pages of each pool that fit.

    The sizes of the caches are part of the programs, and the programs' temporaries limit the
    caches. So the largest bucket is first compiled with the caches that fit without temporaries,
    and again with fewer pages until everything fits. If the first caches are as large as could ever
    be useful, all programs are compiled at once.
    """
    caches, shapes = declared.caches, declared.shapes
    table_width = -(-declared.max_model_len // config.page_size)
    mine = declared.mesh.local_devices
    budget = memory.budget(
        config.memory_fraction,
        mine[0],
        len(mine),
        weights=declared.weights_bytes + declared.draft_bytes,
        pages=caches.costs(
            config.max_num_seqs, config.max_num_batched_tokens, table_width=table_width
        ),
    )
    budget = dataclasses.replace(budget, total=multihost.least(budget.total))
    vocab_size, temp = declared.model.config.vocab_size, 0
    while True:
        num_pages = budget.fit(temp)
        sizes = Sizes(
            page_size=config.page_size,
            num_pages=num_pages,
            table_width=table_width,
            vocab_size=vocab_size,
            max_model_len=declared.max_model_len,
            num_logprobs=vocab_size if config.max_logprobs < 0 else config.max_logprobs,
        )
        runner = _runner(declared, sizes, repeats, rounds=rounds)
        is_ample = num_pages == budget.useful
        runner.compile(
            _wanted(declared, shapes if is_ample else shapes[-1:], repeats, rounds=rounds)
        )
        temp = runner.temp_bytes()
        if budget.fit(temp) >= num_pages:
            return runner, num_pages


def _wanted(
    declared: Declared, shapes: list[Bucket], repeats: Repeat | None, *, rounds: Rounds | None
) -> list[tuple[str, Any]]:
    """Return (name, key) of the programs for steps of these shapes."""
    others = [] if rounds is None else [(ROUNDS, bucket) for bucket in rounds.buckets]
    return programs.wanted(shapes, repeats, declared.further_programs, others=others)


def _runner(
    declared: Declared, sizes: Sizes, repeats: Repeat | None, *, rounds: Rounds | None
) -> Runner:
    """Return the runner of the programs of the model and its draft model, none compiled yet."""
    caches, draft_caches = declared.caches.shapes(sizes.num_pages)
    drafting, further = declared.drafting, dict[str, Any]()
    if drafting is not None and rounds is not None:
        further = {
            "reads": drafting.reads,
            "further": drafting.programs(declared.model, sizes, rounds),
            "further_shapes": drafting.shapes(draft_caches),
        }
    return programs.runner(
        declared.model,
        declared.mesh,
        caches,
        dtype=declared.dtype,
        sizes=sizes,
        max_rows=declared.shapes[-1].num_rows,
        repeats=repeats,
        **further,
    )


def _repeats(config: EngineConfig, declared: Declared) -> Repeat | None:
    """Return the bucket and the number of decode steps of one call, None for single steps.

    One bucket serves all numbers of sequences, as rows of padding cost little.
    """
    steps = config.decode_steps
    if steps == "auto":
        is_small = declared.mesh.size == 1 and declared.weights_bytes <= SMALL_BYTES
        steps = backend.of(declared.platform).decode_steps if is_small else 1
    rows = min(config.max_num_seqs, MAX_REPEATED_ROWS)
    if steps <= 1:
        return None
    return Repeat(next(shape for shape in declared.shapes if shape.num_tokens >= rows), steps)


def _rounds(config: EngineConfig, declared: Declared, repeats: Repeat | None) -> Rounds | None:
    """Return the rounds of one call if a model drafts: as many as decode steps without drafts."""
    if declared.drafting is None:
        return None
    largest, most = min(config.max_num_seqs, MAX_REPEATED_ROWS), declared.drafting.max_drafts
    sizes = sorted({*(rows for rows in ROUNDS_ROWS if rows < largest), largest})
    return Rounds(
        tuple(Bucket(rows * (1 + most), rows) for rows in sizes),
        max_rounds=1 if repeats is None else repeats.num_steps,
        max_drafts=most,
    )


def _caches(asked: bool, config: ModelConfig) -> bool:
    """Whether equal prefixes may share pages: not if keys depend on the length of the prompt."""
    if asked and any(rope.follows_prompt for rope in config.ropes):
        logger.info(
            "prefix caching is off: with dynamic rope scaling, the keys of a prefix depend on the "
            "length of the whole prompt"
        )
        return False
    return asked


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
    declared: Declared, limits: Limits, repeats: Repeat | None, *, seconds: float
) -> None:
    """Log platform, dtype, mesh, op bodies and sizes of the caches."""
    logger.info(
        "on %s in %s, mesh %s; op bodies %s",
        declared.platform,
        np.dtype(declared.dtype).name,
        dict(declared.mesh.shape),
        limits.bodies,
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
