"""Execution of `slipway convert`: from its options the source, mapping, plan, checks and writer, in that order.

Every problem that can be told before a value is read is collected into one error; on any error nothing stays behind.
"""

import contextlib
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
from slipway.convert.orbax import OrbaxWriter
from slipway.convert.plan import Direction, Move, Plan, resolve
from slipway.convert.remote import is_address
from slipway.convert.rules import TreeMapping
from slipway.convert.source import Source, fingerprint
from slipway.convert.tokenizer import GENERATION, copy_tokenizer, generation_file, tokenizer_problems
from slipway.convert.writer import ASIDE, SafetensorsWriter, Writer
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
    """What to convert, and how."""

    mapping: str | None = None
    """maxtext, maxtext-interleaved, maxtext-halves, tunix, nnx, linen, hf, or a Python or YAML file with a mapping;
    by default the one that fits. MaxText's Llama and Mistral turn pairs or halves of a head: maxtext follows
    config.json's rope_type, the other two say it."""
    allow_unknown_names: bool = False
    """Take a tree's names as Hugging Face's own although nothing here knows the architecture (mapping hf)."""
    config: Path | None = None
    """An HF directory or a JSON file: config.json's fields, those that no tensor tells at least."""
    tokenizer: Path | None = None
    """A directory whose tokenizer files are copied."""
    dtype: Dtype | None = None
    """What floats become; by default they stay as they are."""
    shard_size: str = "5GB"
    """The largest size of one .safetensors file: a number with KB, MB, GB or TB."""
    to: To = "hf"
    """hf: an HF directory; else from an HF directory to MaxText's Orbax, any mapping's tree in Orbax, or an .npz."""
    scan_layers: bool = True
    """Whether layers are stacked in MaxText's tree (only with --to maxtext)."""
    merge_lora: Path | None = None
    """A PEFT adapter whose matrices are added to the weights."""
    resume: bool = False
    """Go on where a conversion that was killed ended."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A conversion that has been checked as far as it can be without reading values."""

    plan: Plan
    source: Source
    options: Options
    targets: Mapping[str, Spec]  # in the dtypes to be written
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
    """Convert ``source`` into ``out_dir``, which must be new, empty, or hold a conversion to resume.

    ``given`` are config.json's fields where they do not come from ``options.config``, ``candidates`` mappings that
    are none of the built-in ones, ``deltas`` what to add to which target, ``twin`` the torch class (a transformers
    PreTrainedModel) whose names the source has. ``on_start`` is told the bytes to write,
    ``progress`` those of each tensor written. Raises InvalidConfig for an option, CheckpointError for everything else
    that does not fit, listing all of it.
    """
    conversion = prepare(source, options, given, candidates, deltas, twin)
    if conversion.problems:
        raise CheckpointError(source.location, [*conversion.problems, *_values(conversion)])
    on_start(sum(spec.nbytes for spec in conversion.targets.values()))
    try:
        with new_directory(out_dir, options.resume):
            writer = _sink(conversion, out_dir, options)
            written = executor.execute(conversion.plan, conversion.source, writer, conversion.options, progress)
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
    """Find the mapping and resolve it; what does not fit is in the conversion's ``problems``.

    Raises InvalidConfig for an option that cannot be honoured.
    """
    _check(options)
    given = dict(given if given is not None else read_config(options.config, source.path))
    if not candidates and options.mapping in (None, *MAXTEXT, "hf") and hf.is_declared(given):
        source = wrapped.declared(source, hf.DeclaredNames(given)) or source
    plan, source = _plan(source, options, given, candidates, twin)
    if isinstance(source, wrapped.RenamedSource):
        note = "; ".join(filter(None, (source.note, plan.mapping.note)))
        plan = dataclasses.replace(plan, mapping=dataclasses.replace(plan.mapping, note=note))
    plan, tied = _without_tied(plan, given)
    targets = {name: Spec(_dtype(options.dtype, spec.dtype), spec.shape) for name, spec in plan.targets.items()}
    problems = _misfits(plan)
    # What config.json states beside a mapping of another architecture that does not fit either is no news.
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
    return Conversion(plan, source, run_options, targets, given, tuple(dict.fromkeys(problems)))


def read_config(path: Path | None, source: Path | None) -> dict[str, Any]:
    """config.json's fields: of the directory or file ``path``, else of the source where it is an HF directory.

    Raises InvalidConfig where ``path`` holds none.
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
    """``"5GB"`` as a number, with decimal units as in Hugging Face's ``max_shard_size``."""
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
        raise InvalidConfig("resume", True, "False: an .npz cannot be gone on with")
    if not options.scan_layers and options.to != "maxtext":
        raise InvalidConfig("scan_layers", False, "True, since --to is not maxtext")
    if options.to == "maxtext" and options.mapping not in (None, *MAXTEXT):
        raise InvalidConfig("mapping", options.mapping, f"{' | '.join(MAXTEXT)}, since --to is maxtext")
    if options.allow_unknown_names and (options.to == "maxtext" or options.mapping not in (None, "hf")):
        raise InvalidConfig("allow_unknown_names", True, "False, since only mapping hf keeps names as they are")


def _plan(
    source: Source,
    options: ConvertConfig,
    given: Mapping[str, Any],
    candidates: Sequence[TreeMapping] | None,
    twin: Any,
) -> tuple[Plan, Source]:
    """Return the plan of the mapping that fits best: that which leaves the fewest tensors without a counterpart.

    And the source, whose tensors it may read under other names.
    """
    backward = options.to != "hf"
    name = options.mapping or {"hf": None, "maxtext": "maxtext"}.get(options.to, "hf")
    found = list(candidates or mappings.find(name, given))
    if options.to == "maxtext":
        found = [mapping for mapping in found if ("not scanned" in mapping.name) != options.scan_layers]
    plans = [
        resolve(mapping, "to_jax" if backward else "to_hf", source.specs, known_sizes(mapping, given))
        for mapping in found
    ]
    # By names first, so that the right mapping that meets a wrong shape stays the right one.
    best = min(plans, key=lambda plan: (len(plan.unmatched), _contradicts(plan, given), len(plan.problems)))
    fits = not (best.unmatched or _contradicts(best, given))
    if candidates or name not in (None, "hf") or (fits and twin is None):
        return best, source
    return _own_names(best, source, options, given, twin)


def _contradicts(plan: Plan, given: Mapping[str, Any]) -> bool:
    """Whether config.json is of another architecture than the mapping."""
    settled = plan.mapping.config
    return any(given.get(f, settled.get(f)) != settled.get(f) for f in ("model_type", "architectures") if f in settled)


def _own_names(
    best: Plan, source: Source, options: ConvertConfig, given: Mapping[str, Any], twin: Any
) -> tuple[Plan, Source]:
    """Return the plan that keeps every name, where the names are known to be the architecture's, else the nearest.

    ``best`` is the plan of the built-in mapping that fits best. Names that transformers' class does not load count as
    tensors without a counterpart. Where it loads all of them without their wrappers, the source is read so.
    """
    direction: Direction = "to_hf" if options.to == "hf" else "to_jax"
    if options.allow_unknown_names:
        note = "names: taken as they are, unchecked, as --allow-unknown-names says"
        return resolve(hf.identity(source.specs, note), direction, source.specs, {}), source
    if hf.is_declared(given) and twin is None:
        return best, source
    found = _compared(source, given, twin)
    if found.differences and (bare := wrapped.bare(source)) and not (inner := _compared(bare, given, twin)).differences:
        source, found = bare, inner
    if found.unknown:
        unknown = f"mapping 'hf' was not tried: {found.unknown}; --allow-unknown-names takes names as they are"
        return dataclasses.replace(best, problems=(unknown, *best.problems)), source
    theirs = f"names that {found.class_name} loads"
    mapping = hf.identity(source.specs, f"names: {theirs}")
    own = dataclasses.replace(resolve(mapping, direction, source.specs, {}), unmatched=found.differences)
    if own.fits or len(own.unmatched) <= len(best.unmatched):
        return own, source
    other = f"mapping 'hf' does not fit either: {len(own.unmatched)} differences from the {theirs}"
    return dataclasses.replace(best, problems=(other, *best.problems)), source


def _compared(source: Source, given: Mapping[str, Any], twin: Any) -> hf_classes.Comparison:
    """Return how the source's names, without the root that all share, compare with a torch class's."""
    root = hf.identity(source.specs, "").roots[0]
    inside = {name.removeprefix(root): spec for name, spec in source.specs.items() if name.startswith(root)}
    return hf_classes.compare(given, inside, twin)


def _misfits(plan: Plan) -> list[str]:
    """Return why the source does not fit the plan's mapping; of a tree that the mapping is not for, only the first."""
    if len(plan.unmatched) <= MAX_DIFFERENCES:
        return [*plan.unmatched, *plan.problems]
    first = "; ".join(plan.unmatched[:MAX_DIFFERENCES])
    more = len(plan.problems) - MAX_DIFFERENCES
    return [
        f"no mapping names these tensors; the nearest is {plan.mapping.name!r} with {len(plan.unmatched)} "
        f"differences, the first {MAX_DIFFERENCES}: {first}",
        *plan.problems[:MAX_DIFFERENCES],
        *([f"{more} more problems of shapes"] if more > 0 else []),
    ]


def _without_tied(plan: Plan, given: Mapping[str, Any]) -> tuple[Plan, dict[str, tuple[Move, Move]]]:
    """The plan without tensors that only repeat another, and those pairs: they are compared, not written."""
    if not given.get(TIE):
        return plan, {}
    by_hf = {_hf_name(plan, group[0]): target for target, group in plan.moves.items()}
    tied = {head: table for head, table in plan.mapping.tied.items() if head in by_hf and table in by_hf}
    pairs = {head: (plan.moves[by_hf[head]][0], plan.moves[by_hf[table]][0]) for head, table in tied.items()}
    gone = {by_hf[head] for head in tied}
    moves = {name: group for name, group in plan.moves.items() if name not in gone}
    targets = {name: spec for name, spec in plan.targets.items() if name not in gone}
    return dataclasses.replace(plan, moves=moves, targets=targets), pairs


def _hf_name(plan: Plan, move: Move) -> str:
    return move.target.name if plan.direction == "to_hf" else move.source.name


def _hf_side(plan: Plan) -> dict[str, Spec]:
    """The HF tensors that a plan away from them reads."""
    used = {move.source.name for group in plan.moves.values() for move in group}
    return {name: spec for name, spec in plan.sources.items() if name in used}


def _dtype(asked: str | None, source: np.dtype) -> np.dtype:
    return DTYPES[asked] if asked and transfer.is_float(source) else source


def _values(conversion: Conversion) -> Iterator[str]:
    """What is wrong with the source's values, for an error that already lists other things."""
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


def _sink(conversion: Conversion, out_dir: Path, options: ConvertConfig) -> Writer:
    identity = _identity(conversion, options)
    mapping = conversion.plan.mapping
    match options.to:
        case "hf":
            constants = {name: Spec(np.dtype(np.int64), ()) for name in conversion.plan.mapping.hf_constants}
            specs = {**conversion.targets, **constants}
            return SafetensorsWriter(out_dir, specs, size_bytes(options.shard_size), identity, options.resume)
        case "npz":
            return NpzWriter(out_dir, conversion.targets)
        case _:
            numbers = {name: value for name, value in mapping.jax_constants.items() if isinstance(value, int)}
            empties = tuple(name for name, value in mapping.jax_constants.items() if not isinstance(value, int))
            item = "0/items" if options.to == "maxtext" else ""
            return OrbaxWriter(out_dir, conversion.targets, identity, options.resume, item, numbers, empties)


def _identity(conversion: Conversion, options: ConvertConfig) -> str:
    """Equal for two runs exactly if what the first has written is what the second would write."""
    adapter = options.merge_lora and [(p.name, p.stat().st_mtime_ns) for p in sorted(options.merge_lora.iterdir())]
    parts = (
        fingerprint(conversion.source),
        [(rule.jax, rule.hf, rule.axes, rule.scale) for rule in conversion.plan.mapping.rules],
        sorted((name, str(spec.dtype), spec.shape) for name, spec in conversion.targets.items()),
        options.shard_size,
        options.to,
        shards.PAGE,  # where tensors lie in the files
        adapter,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _write_extras(aside: Path, conversion: Conversion, options: ConvertConfig) -> None:
    """config.json and what is copied beside it."""
    shards.write_json(aside / "config.json", conversion.config)
    if (generation := generation_file(options.config, conversion.source.path)) is not None:
        shutil.copyfile(generation, aside / GENERATION)
    copy_tokenizer(options.tokenizer, aside)


@contextlib.contextmanager
def new_directory(directory: Path, resume: bool) -> Iterator[None]:
    """``directory`` made for what is written inside the context; gone again if that fails and it was not there."""
    if is_address(directory):
        raise InvalidConfig("out_dir", str(directory), "a local directory: gs:// and s3:// know no rename and no fsync")
    existed = directory.exists()
    is_begun = resume and (directory / ASIDE).is_dir()  # its files may be among those in place already
    if existed and not is_begun and (not directory.is_dir() or any(path.name != ASIDE for path in directory.iterdir())):
        raise InvalidConfig("out_dir", str(directory), "a new or an empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:  # an interruption, too, leaves nothing behind
        if not existed:
            shutil.rmtree(directory)
        raise
