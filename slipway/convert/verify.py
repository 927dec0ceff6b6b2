"""Verification of a conversion: the result is converted back and compared with the source.

Only the differences that the conversion reported while it wrote are allowed. Here are also the
reports. Not here: comparison of logits (slipway/parity.py, slipway/expected_logits.py).
"""

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slipway.convert import transfer
from slipway.convert.conversion import Conversion
from slipway.convert.executor import Options, Written, execute
from slipway.convert.formats import open_source
from slipway.convert.plan import inverse
from slipway.convert.source import Source
from slipway.convert.writer import Facts, Pieces
from slipway.errors import CheckpointError

NOT_COMPARED = "not compared with the original's logits"


@dataclasses.dataclass(frozen=True)
class Compared:
    """Differences of one source tensor from the result of the inverse conversion."""

    name: str
    differing: int
    max_ulp: int


class _Comparing:
    """Writer that compares the tensors that it gets with those of ``source``."""

    def __init__(self, source: Source):
        self._source = source
        self._lock = threading.Lock()
        self.compared: list[Compared] = []

    def write(self, name: str, pieces: Pieces) -> None:
        """Compare one tensor."""
        differing = ulp = 0
        with self._source.open(name) as array:
            flat = array.reshape(-1)
            for first, piece in pieces:
                held = flat[first : first + piece.size]
                if not np.array_equal(held.view(np.uint8), piece.view(np.uint8)):
                    differing += int(np.count_nonzero(held != piece))
                    ulp = max(
                        ulp, transfer.max_ulp(held, piece) if transfer.is_float(held.dtype) else 1
                    )
        with self._lock:
            self.compared.append(Compared(name, differing, ulp))

    def done(self) -> Mapping[str, Facts]:
        return {}

    def mark(self, name: str, facts: Facts) -> None:
        pass

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass


def verify(conversion: Conversion, written: Sequence[Written], directory: Path) -> list[Compared]:
    """Read ``directory`` anew, apply the inverse, and compare every source tensor.

    Raises CheckpointError, listing every tensor that differs by more than its conversion reported,
    or that does not follow from ``directory``.
    """
    plan, source = conversion.plan, conversion.source
    made = open_source(directory)
    back = inverse(plan, made.specs)
    comparing = _Comparing(source)
    dtypes = {name: plan.sources[name].dtype for name in back.moves if name in plan.sources}
    problems = [
        *_constants(conversion, made),
        *back.unmatched,
        *back.problems,
        *(f"{name}: not in the source" for name in back.moves if name not in dtypes),
    ]
    if problems:
        raise CheckpointError(directory, problems)
    execute(back, made, comparing, options=Options(dtypes))
    noted = {name for w in written if w.notes for name in w.sources}
    bounds: dict[str, int] = {}
    for name, ulp in ((name, w.max_ulp) for w in written for name in w.sources):
        bounds[name] = max(ulp, bounds.get(name, 0))
    tied = {pair[0].source.name for pair in conversion.options.tied.values()}
    for entry in comparing.compared:
        is_noted = entry.name in noted or entry.max_ulp <= bounds.get(entry.name, 0)
        if entry.differing and not is_noted:
            problems.append(
                f"{entry.name}: {entry.differing} numbers differ after the inverse, "
                f"by up to {entry.max_ulp} ulp"
            )
    missing = plan.sources.keys() - {entry.name for entry in comparing.compared} - tied
    problems += [f"{name}: does not follow from the result" for name in sorted(missing)]
    if problems:
        raise CheckpointError(directory, problems)
    return sorted(comparing.compared, key=lambda c: c.name)


def _constants(conversion: Conversion, made: Source) -> Iterator[str]:
    """Yield the mapping's constants that were written with another value."""
    mapping, to_hf = conversion.plan.mapping, conversion.plan.direction == "to_hf"
    for name, value in mapping.hf_constants.items() if to_hf else ():
        if name not in made.specs:
            yield f"{name}: missing"
            continue
        with made.open(name) as array:
            if array.shape or int(array) != value:
                yield f"{name}: got {array}, expected {value}"


def report(
    conversion: Conversion,
    written: Sequence[Written],
    compared: Sequence[Compared],
    logits: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return all facts about a conversion, as JSON."""
    return {
        "source": conversion.source.location,
        "mapping": conversion.plan.mapping.name,
        "note": conversion.plan.mapping.note,
        "direction": conversion.plan.direction,
        "ignored": list(conversion.plan.ignored),
        "tied": {name: pair[0].source.name for name, pair in conversion.options.tied.items()},
        "tensors": [{**dataclasses.asdict(w), "lossless": w.lossless} for w in written],
        "verified": [dataclasses.asdict(c) for c in compared],
        "logits": logits,
    }


def explain(conversion: Conversion) -> str:
    """Return text with every tensor's rule, shapes, dtypes and bytes, and all problems.

    No values are read.
    """
    plan, lines = conversion.plan, []
    for name, moves in plan.moves.items():
        spec = conversion.targets[name]
        for held in moves:
            source = plan.sources[held.source.name]
            scale = f"  {held.rule.scale}" if held.rule.scale else ""
            lines.append(
                f"{held.source.name} {source.dtype}{list(source.shape)} -> "
                f"{name} {spec.dtype}{list(spec.shape)}  {spec.nbytes:,} B\n"
                f"    {held.rule.axes}{scale}"
            )
    lines += [
        f"{name}: must equal what it is tied to, not written" for name in conversion.options.tied
    ]
    lines += [f"{name}: no weight, left out" for name in plan.ignored]
    if plan.mapping.note:
        lines.append(plan.mapping.note)
    total = sum(spec.nbytes for spec in conversion.targets.values())
    lines.append(
        f"mapping {plan.mapping.name!r}: {len(conversion.targets)} tensors, {total:,} bytes"
    )
    if conversion.problems:
        lines += [
            f"{len(conversion.problems)} problems:",
            *(f"  - {problem}" for problem in conversion.problems),
        ]
    return "\n".join(lines)


def summary(
    written: Sequence[Written],
    compared: Sequence[Compared],
    logits: Mapping[str, Any] | None,
    original: Mapping[str, Any] | None = None,
) -> str:
    """Return the report for a person.

    ``original``: the comparison with the original model's logits.
    """
    lossy = [w for w in written if not w.lossless]
    lines = [
        f"{len(compared)} source tensors compared through the inverse: "
        f"{len(written) - len(lossy)} of {len(written)} written ones are bit for bit",
        "  (consistent with the mapping's rules, right or wrong: a wrong rule has a wrong inverse)",
    ]
    lines += [
        f"  {w.name}: {w.source_dtype} -> {w.dtype}, "
        f"back within {w.max_ulp} ulp {'; '.join(w.notes)}"
        for w in lossy
    ]
    if logits and logits["max_logprob_difference"] is not None:
        lines.append(
            f"{' and '.join(logits['programs'])} agree on {logits['tokens']} tokens "
            f"of the converted model: "
            f"log-probabilities differ by at most {logits['max_logprob_difference']:.1e}"
        )
    lines += [f"not run: {reason}" for reason in (logits or {}).get("not_run", ())]
    if original is None:
        return "\n".join([*lines, NOT_COMPARED])
    lines.append(
        f"the original's {original['quantity']} against the converted model's in "
        f"{original['program']}: at most {original['max_difference']:.1e} apart "
        f"({original['tolerance']:.1e} allowed), likeliest token the same at "
        f"{original['same_argmax']:.1%} of {original['positions']} positions"
    )
    return "\n".join(lines)
