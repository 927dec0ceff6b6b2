"""Steps of `slipway convert`: options, source, mapping, plan, checks and writer.

Every problem that can be found before a value is read is collected into one error. On any error
nothing stays in the output directory.

Not here: meaning of rules (rules.py), the plan (plan.py), execution (executor.py), the comparison
afterwards (verify.py).
"""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from slipway.checkpoint import shards
from slipway.checkpoint.shards import Spec
from slipway.convert import executor, hf_classes, mappings, transfer, wrapped
from slipway.convert.archives import NpzWriter
from slipway.convert.executor import Delta, Options, Written
from slipway.convert.hf_config import TIE, configure, known_sizes
from slipway.convert.lora import Merge, read_adapter
from slipway.convert.mappings import hf
from slipway.convert.moves import Move
from slipway.convert.orbax import OrbaxWriter
from slipway.convert.plan import Direction, Plan, resolve
from slipway.convert.rules import TreeMapping
from slipway.convert.source import Source, fingerprint
from slipway.convert.tokenizer import (
    GENERATION,
    copy_tokenizer,
    generation_file,
    tokenizer_problems,
)
from slipway.convert.writer import ASIDE, SafetensorsWriter, Writer, new_directory
from slipway.errors import CheckpointError, InvalidConfig

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
MAX_DIFFERENCES = 3  # of names, in one error
Dtype = Literal["float32", "bfloat16", "float16"]
MAXTEXT = ("maxtext", "maxtext-interleaved", "maxtext-halves")
To = Literal["hf", "maxtext", "orbax", "npz"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Options of a conversion."""

    mapping: str | None = None
    """maxtext, maxtext-interleaved, maxtext-halves, tunix, nnx, linen, hf, or a Python or YAML file
    with a mapping; by default the one that fits. MaxText's Llama, Mistral, Mixtral and DeepSeek
    rotate either interleaved pairs or halves of a head: maxtext chooses by rope_type in
    config.json, the other two choose explicitly.
    """
    allow_unknown_names: bool = False
    """Accept a tree's names as Hugging Face's own, although the architecture is unknown here
    (mapping hf).
    """
    config: Path | None = None
    """An HF directory or a JSON file with fields of config.json, at least those that do not follow
    from the tensors.
    """
    tokenizer: Path | None = None
    """A directory with tokenizer files to copy."""
    dtype: Dtype | None = None
    """Dtype that floats are converted to; by default they keep theirs."""
    shard_size: str = "5GB"
    """The largest size of one .safetensors file: a number with KB, MB, GB or TB."""
    to: To = "hf"
    """hf: write an HF directory. Otherwise read an HF directory and write MaxText's Orbax, any
    mapping's tree in Orbax, or an .npz.
    """
    scan_layers: bool = True
    """Stack the layers in MaxText's tree (only with --to maxtext)."""
    merge_lora: Path | None = None
    """A PEFT adapter to add to the weights."""
    resume: bool = False
    """Continue a conversion that was killed."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A conversion that was checked as far as possible without reading values."""

    plan: Plan
    source: Source
    options: Options
    targets: Mapping[str, Spec]  # with the dtypes that are written
    config: Mapping[str, Any]
    problems: tuple[str, ...]


def convert(
    source: Source,
    out_dir: Path,
    options: ConvertConfig,
    given: Mapping[str, Any] | None = None,
    candidates: Sequence[TreeMapping] | None = None,
    deltas: Mapping[str, Delta] | None = None,
    twin: Any = None,
    on_start: Callable[[int], None] = lambda size_bytes: None,
    progress: Callable[[int], None] = lambda size_bytes: None,
) -> tuple[Conversion, list[Written]]:
    """Convert ``source`` into ``out_dir``.

    The directory must be new, empty, or hold a conversion to resume. ``given``: fields of
    config.json that are not from ``options.config``. ``candidates``: mappings to use instead of the
    built-in ones. ``deltas``: what to add to a target. ``twin``: a torch class (a transformers
    PreTrainedModel) with the names of the source. ``on_start`` is called with the number of bytes
    to write, ``progress`` with the bytes of each tensor written. Raises InvalidConfig for an
    option, and CheckpointError for all other problems, listing all of them.
    """
    conversion = prepare(source, options, given, candidates=candidates, deltas=deltas, twin=twin)
    if conversion.problems:
        raise CheckpointError(source.location, [*conversion.problems, *_values(conversion)])
    on_start(sum(spec.nbytes for spec in conversion.targets.values()))
    try:
        with new_directory(out_dir, options.resume):
            writer = _writer(conversion, out_dir, options)
            written = executor.execute(
                conversion.plan,
                conversion.source,
                writer,
                options=conversion.options,
                progress=progress,
            )
            if options.to == "hf":
                for name, value in conversion.plan.mapping.hf_constants.items():
                    writer.write(name, iter([(0, np.array([value]))]))
                _write_extras(out_dir / ASIDE, conversion, options)
            writer.finish()
    except OSError as error:
        raise CheckpointError(out_dir, [f"cannot be written: {error}"]) from error
    return conversion, written


def prepare(
    source: Source,
    options: ConvertConfig,
    given: Mapping[str, Any] | None = None,
    candidates: Sequence[TreeMapping] | None = None,
    deltas: Mapping[str, Delta] | None = None,
    twin: Any = None,
) -> Conversion:
    """Find and resolve the mapping; mismatches are in the ``problems`` of the result.

    Raises InvalidConfig for an option that cannot be honoured.
    """
    _check(options)
    given = dict(given if given is not None else read_config(options.config, source.path))
    if not candidates and options.mapping in (None, *MAXTEXT, "hf") and hf.is_declared(given):
        source = wrapped.declared(source, hf.DeclaredNames(given)) or source
    plan, source = _plan(source, options, given, candidates=candidates, twin=twin)
    if isinstance(source, wrapped.RenamedSource):
        note = "; ".join(filter(None, (source.note, plan.mapping.note)))
        plan = dataclasses.replace(plan, mapping=dataclasses.replace(plan.mapping, note=note))
    plan, tied = _without_tied(plan, given)
    targets = {
        name: Spec(_dtype(options.dtype, spec.dtype), spec.shape)
        for name, spec in plan.targets.items()
    }
    problems = _misfits(plan)
    # Contradictions to config.json add nothing if the nearest mapping is of another architecture.
    is_foreign = len(plan.unmatched) > MAX_DIFFERENCES and _contradicts(plan, given)
    if options.to == "hf":
        configured = configure(plan, given, targets)
        problems += () if is_foreign else configured.problems
        generation = generation_file(options.config, source.path)
        problems += tokenizer_problems(options.tokenizer, generation, configured.config)
        given = configured.config
    else:
        problems += () if is_foreign else configure(plan, given, _hf_side(plan)).problems
    merge = read_adapter(options.merge_lora, targets, given) if options.merge_lora else Merge()
    dtypes = {name: spec.dtype for name, spec in targets.items()}
    run_options = Options(dtypes, {**(deltas or {}), **merge.deltas}, tied, replaced=merge.replaced)
    return Conversion(
        plan,
        source,
        run_options,
        targets=targets,
        config=given,
        problems=tuple(dict.fromkeys(problems)),
    )


def read_config(path: Path | None, source: Path | None) -> dict[str, Any]:
    """Return the fields of config.json of the directory or file ``path``.

    Without ``path``, of the source if it is an HF directory. Raises InvalidConfig where ``path``
    has none.
    """
    file = path / "config.json" if path is not None and path.is_dir() else path
    if file is None and source is not None and (source / "config.json").is_file():
        file = source / "config.json"
    if file is None:
        return {}
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidConfig("config", str(file), f"a readable JSON file ({error})") from error
    if not isinstance(config, dict):
        raise InvalidConfig("config", str(file), "a JSON object")
    return config


def size_bytes(text: str) -> int:
    """Parse a size such as ``"5GB"``, in decimal units, as Hugging Face's ``max_shard_size``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise InvalidConfig("shard_size", text, "a size such as 500MB or 5GB")
    return size


def _check(options: ConvertConfig) -> None:
    size_bytes(options.shard_size)
    backward = options.to != "hf"
    for field, is_set in (("tokenizer", options.tokenizer), ("merge_lora", options.merge_lora)):
        if backward and is_set:
            raise InvalidConfig(field, str(is_set), "nothing, since --to is not hf")
    if backward and options.shard_size != ConvertConfig.shard_size:
        raise InvalidConfig("shard_size", options.shard_size, "nothing, since --to is not hf")
    if options.to == "npz" and options.resume:
        raise InvalidConfig("resume", True, "False: --resume is not supported with --to npz")
    if not options.scan_layers and options.to != "maxtext":
        raise InvalidConfig("scan_layers", False, "True, since --to is not maxtext")
    if options.to == "maxtext" and options.mapping not in (None, *MAXTEXT):
        raise InvalidConfig(
            "mapping", options.mapping, f"{' | '.join(MAXTEXT)}, since --to is maxtext"
        )
    if options.allow_unknown_names and (
        options.to == "maxtext" or options.mapping not in (None, "hf")
    ):
        raise InvalidConfig(
            "allow_unknown_names", True, "False, since only mapping hf keeps names as they are"
        )


def _plan(
    source: Source,
    options: ConvertConfig,
    given: Mapping[str, Any],
    candidates: Sequence[TreeMapping] | None,
    twin: Any,
) -> tuple[Plan, Source]:
    """Return the plan of the mapping that fits best, and the source.

    It leaves the fewest tensors without a counterpart. The source may be one that reads tensors
    under other names.
    """
    backward = options.to != "hf"
    name = options.mapping or {"hf": None, "maxtext": "maxtext"}.get(options.to, "hf")
    found = list(candidates or mappings.find(name, given))
    if options.to == "maxtext":
        found = [
            mapping for mapping in found if ("not scanned" in mapping.name) != options.scan_layers
        ]
    plans = []
    direction: Direction = "to_jax" if backward else "to_hf"
    for mapping in found:
        plans.append(resolve(mapping, direction, source.specs, known=known_sizes(mapping, given)))
        if backward and plans[-1].fits and not _contradicts(plans[-1], given):
            break
    # By names first, so that the right mapping that meets a wrong shape stays the right one.
    best = min(
        plans, key=lambda plan: (len(plan.unmatched), _contradicts(plan, given), len(plan.problems))
    )
    fits = not (best.unmatched or _contradicts(best, given))
    if not backward and best.fits:
        best = _only(best, [plan for plan in plans if plan.fits])
    if candidates or name not in (None, "hf") or (fits and twin is None):
        return best, source
    return _own_names(best, source, options, given=given, twin=twin)


def _only(best: Plan, fitting: Sequence[Plan]) -> Plan:
    """Return ``best``, with a problem if the shapes fit another mapping of its model_type, too."""
    model_type = best.mapping.config.get("model_type")
    names = [
        repr(plan.mapping.name)
        for plan in fitting
        if plan.mapping.config.get("model_type") == model_type
    ]
    if len(names) < 2:
        return best
    told = f"mapping: {' and '.join(names)} fit alike, but read the tree differently; "
    told += "give the right rules with --mapping FILE"
    return dataclasses.replace(best, problems=(*best.problems, told))


def _contradicts(plan: Plan, given: Mapping[str, Any]) -> bool:
    """Return whether config.json is of another architecture than the mapping."""
    settled = plan.mapping.config
    return any(
        given.get(f, settled.get(f)) != settled.get(f)
        for f in ("model_type", "architectures")
        if f in settled
    )


def _own_names(
    best: Plan, source: Source, options: ConvertConfig, given: Mapping[str, Any], twin: Any
) -> tuple[Plan, Source]:
    """Return the plan that keeps every name if they are the architecture's, else the nearest plan.

    ``best`` is the plan of the built-in mapping that fits best. Names that transformers' class does
    not load count as tensors without a counterpart. If it loads all of them without their wrappers,
    the returned source has the names without wrappers.
    """
    direction: Direction = "to_hf" if options.to == "hf" else "to_jax"
    if options.allow_unknown_names:
        note = "names: taken as they are, unchecked, because of --allow-unknown-names"
        return resolve(hf.identity(source.specs, note), direction, source.specs, known={}), source
    if hf.is_declared(given) and twin is None:
        return best, source
    found = _compared(source, given, twin)
    if (
        found.differences
        and (bare := wrapped.bare(source))
        and not (inner := _compared(bare, given, twin)).differences
    ):
        source, found = bare, inner
    if found.unknown:
        unknown = (
            f"mapping 'hf' was not tried: {found.unknown}; "
            "--allow-unknown-names takes names as they are"
        )
        return dataclasses.replace(best, problems=(unknown, *best.problems)), source
    theirs = f"names that {found.class_name} loads"
    mapping = hf.identity(source.specs, f"names: {theirs}")
    own = dataclasses.replace(
        resolve(mapping, direction, source.specs, known={}), unmatched=found.differences
    )
    if own.fits or len(own.unmatched) <= len(best.unmatched):
        return own, source
    other = f"mapping 'hf' does not fit either: {len(own.unmatched)} differences from the {theirs}"
    return dataclasses.replace(best, problems=(other, *best.problems)), source


def _compared(source: Source, given: Mapping[str, Any], twin: Any) -> hf_classes.Comparison:
    """Compare the source's names, without the root that all share, with those of a torch class."""
    root = hf.identity(source.specs, "").roots[0]
    inside = {
        name.removeprefix(root): spec
        for name, spec in source.specs.items()
        if name.startswith(root)
    }
    return hf_classes.compare(given, inside, twin)


def _misfits(plan: Plan) -> list[str]:
    """Return why the source does not fit the plan's mapping; of many reasons only the first few."""
    if len(plan.unmatched) <= MAX_DIFFERENCES:
        return [*plan.unmatched, *plan.problems]
    first = "; ".join(plan.unmatched[:MAX_DIFFERENCES])
    more = len(plan.problems) - MAX_DIFFERENCES
    return [
        f"no mapping names these tensors; the nearest is {plan.mapping.name!r} "
        f"with {len(plan.unmatched)} differences, the first {MAX_DIFFERENCES}: {first}",
        *plan.problems[:MAX_DIFFERENCES],
        *([f"{more} more problems of shapes"] if more > 0 else []),
    ]


def _without_tied(
    plan: Plan, given: Mapping[str, Any]
) -> tuple[Plan, dict[str, tuple[Move, Move]]]:
    """Return the plan without tensors that repeat another, and those pairs.

    The pairs are compared and not written.
    """
    if not given.get(TIE):
        return plan, {}
    by_hf = {_hf_name(plan, group[0]): target for target, group in plan.moves.items()}
    tied = {
        head: table for head, table in plan.mapping.tied.items() if head in by_hf and table in by_hf
    }
    pairs = {
        head: (plan.moves[by_hf[head]][0], plan.moves[by_hf[table]][0])
        for head, table in tied.items()
    }
    gone = {by_hf[head] for head in tied}
    moves = {name: group for name, group in plan.moves.items() if name not in gone}
    targets = {name: spec for name, spec in plan.targets.items() if name not in gone}
    return dataclasses.replace(plan, moves=moves, targets=targets), pairs


def _hf_name(plan: Plan, move: Move) -> str:
    return move.target.name if plan.direction == "to_hf" else move.source.name


def _hf_side(plan: Plan) -> dict[str, Spec]:
    """Return the HF tensors that a plan with direction "to_jax" reads."""
    used = {move.source.name for group in plan.moves.values() for move in group}
    return {name: spec for name, spec in plan.sources.items() if name in used}


def _dtype(asked: str | None, source: np.dtype) -> np.dtype:
    return DTYPES[asked] if asked and transfer.is_float(source) else source


def _values(conversion: Conversion) -> Iterator[str]:
    """Yield problems of the source's values, for an error that already lists other problems."""
    for name in conversion.source.specs:
        if name in conversion.plan.ignored:
            continue
        try:
            with conversion.source.open(name) as array:
                count = transfer.not_finite(array)
        except CheckpointError as error:
            yield from error.problems
        else:
            if count:
                yield f"{name}: {count} values are not finite"


def _writer(conversion: Conversion, out_dir: Path, options: ConvertConfig) -> Writer:
    identity = conversion_identity(conversion, options)
    mapping = conversion.plan.mapping
    match options.to:
        case "hf":
            constants = {
                name: Spec(np.dtype(np.int64), ()) for name in conversion.plan.mapping.hf_constants
            }
            specs = {**conversion.targets, **constants}
            return SafetensorsWriter(
                out_dir,
                specs,
                size_bytes(options.shard_size),
                identity=identity,
                resume=options.resume,
            )
        case "npz":
            return NpzWriter(out_dir, conversion.targets)
        case _:
            numbers = {
                name: value
                for name, value in mapping.jax_constants.items()
                if isinstance(value, int)
            }
            empties = tuple(
                name for name, value in mapping.jax_constants.items() if not isinstance(value, int)
            )
            item = "0/items" if options.to == "maxtext" else ""
            return OrbaxWriter(
                out_dir,
                conversion.targets,
                identity,
                resume=options.resume,
                item=item,
                constants=numbers,
                empties=empties,
            )


def conversion_identity(conversion: Conversion, options: ConvertConfig) -> str:
    """Return a text that is equal for two runs exactly if they would write the same."""
    adapter = options.merge_lora and [
        (p.name, p.stat().st_mtime_ns) for p in sorted(options.merge_lora.iterdir())
    ]
    parts = (
        fingerprint(conversion.source),
        [(rule.jax, rule.hf, rule.axes, rule.scale) for rule in conversion.plan.mapping.rules],
        sorted((name, str(spec.dtype), spec.shape) for name, spec in conversion.targets.items()),
        options.shard_size,
        options.to,
        shards.PAGE,  # decides where tensors are in the files
        adapter,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _write_extras(aside: Path, conversion: Conversion, options: ConvertConfig) -> None:
    """Write config.json, and copy the files that belong beside it."""
    shards.write_json(aside / "config.json", conversion.config)
    if (generation := generation_file(options.config, conversion.source.path)) is not None:
        shutil.copyfile(generation, aside / GENERATION)
    copy_tokenizer(options.tokenizer, aside)
