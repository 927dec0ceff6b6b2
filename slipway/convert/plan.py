"""Plan of a conversion: rules resolved against names and shapes, before values are read.

Either side may be the source. Every mismatch is collected. A plan without mismatches accounts for
each source tensor exactly once. Not here: the meaning of a rule (rules.py), one move of
numbers (moves.py), its execution (executor.py).
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from slipway import layout
from slipway.checkpoint.shards import Spec
from slipway.convert.moves import End, Move
from slipway.convert.rules import Rule, Side, TreeMapping

Direction = Literal["to_hf", "to_jax"]
Sizes = dict[str, int]
Labels = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Targets of all tensors. ``moves`` are grouped by target, in the order of writing."""

    mapping: TreeMapping
    direction: Direction
    root: str
    sizes: Sizes
    local_sizes: tuple[Sizes, ...]  # for each rule, of the axes that only this rule has
    moves: Mapping[str, tuple[Move, ...]]
    targets: Mapping[str, Spec]
    sources: Mapping[str, Spec]
    ignored: tuple[str, ...]
    # Problems of names: tensors that no rule names, and missing tensors that a rule needs.
    unmatched: tuple[str, ...]
    problems: tuple[str, ...]  # all other problems

    @property
    def fits(self) -> bool:
        """Whether every source tensor has a target, and every required tensor exists."""
        return not self.unmatched and not self.problems

    def jobs(self) -> Iterator[tuple[list[str], list[str]]]:
        """Yield sources and targets in the smallest groups that are independent of each other."""
        group_of: dict[str, list[str]] = {}
        for target, moves in self.moves.items():
            groups = {
                id(g): g
                for g in (group_of.get(move.source.name) for move in moves)
                if g is not None
            }
            merged = [target, *itertools.chain.from_iterable(groups.values())]
            for name in merged:
                for move in self.moves[name]:
                    group_of[move.source.name] = merged
        done: set[int] = set()
        for group in group_of.values():
            if id(group) not in done:
                done.add(id(group))
                yield (
                    sorted({move.source.name for name in group for move in self.moves[name]}),
                    sorted(group),
                )


def resolve(
    mapping: TreeMapping,
    direction: Direction,
    sources: Mapping[str, Spec],
    known: Mapping[str, int],
) -> Plan:
    """Resolve every rule against the source's tensors.

    ``known``: axis sizes that a configuration states. Where tensors contradict it, the tensors take
    precedence, unless they then contradict each other, and do so less with it. Nothing is raised:
    mismatches are in the plan's ``problems``.
    """
    root = _root(mapping, sources) if direction == "to_hf" else mapping.roots[0]
    local: tuple[Sizes, ...] = ({},) * len(mapping.rules)
    plan = _resolve(mapping, direction, sources, root=root, first={}, then=known, local_sizes=local)
    if plan.fits:
        return plan
    other = _resolve(
        mapping, direction, sources, root=root, first=known, then={}, local_sizes=local
    )
    return min(plan, other, key=lambda p: len(p.unmatched) + len(p.problems))


def inverse(plan: Plan, sources: Mapping[str, Spec]) -> Plan:
    """Return the plan from ``sources``, written by ``plan``, back to its own sources."""
    back: Direction = "to_jax" if plan.direction == "to_hf" else "to_hf"
    return _resolve(
        plan.mapping,
        back,
        sources,
        root=plan.root,
        first=plan.sizes,
        then={},
        local_sizes=plan.local_sizes,
    )


def _resolve(
    mapping: TreeMapping,
    direction: Direction,
    sources: Mapping[str, Spec],
    root: str,
    first: Mapping[str, int],
    then: Mapping[str, int],
    local_sizes: Sequence[Mapping[str, int]],
) -> Plan:
    constants = mapping.jax_constants if direction == "to_hf" else mapping.hf_constants

    def is_ignored(name: str, spec: Spec) -> bool:
        # A scalar beside the tree, such as a step or a rate.
        is_beside = direction == "to_hf" and spec.shape == () and not name.startswith(root)
        return (
            is_beside
            or name in constants
            or any(fnmatchcase(name, glob) for glob in mapping.ignored)
        )

    ignored = tuple(name for name, spec in sources.items() if is_ignored(name, spec))
    kept = {name: spec for name, spec in sources.items() if name not in ignored}
    turn = 1 if direction == "to_hf" else -1
    rules = [
        _Rule(rule, source, target, local=dict(local))
        for (rule, *sides), local in zip(mapping.sides(), local_sizes)
        for source, target in [sides[::turn]]
    ]
    resolver = _Resolver(mapping, rules, {**mapping.sizes, **first})
    prefixes = (root, "")[::turn]
    resolver.match(kept, prefixes[0])
    resolver.solve(then)
    resolver.complete(prefixes[0])
    moves = resolver.moves(*prefixes)
    targets = {
        name: Spec(kept[group[0].source.name].dtype, group[0].target.shape)
        for name, group in moves.items()
    }
    undecided = (mapping.undecided,) if mapping.undecided else ()
    problems = (*undecided, *resolver.problems, *_gaps(moves, kept))
    local = tuple(rule.local for rule in rules)
    unmatched = alternating(resolver.unnamed, resolver.missing)
    return Plan(
        mapping,
        direction,
        root,
        sizes=resolver.sizes,
        local_sizes=local,
        moves=moves,
        targets=targets,
        sources=kept,
        ignored=ignored,
        unmatched=unmatched,
        problems=problems,
    )


def alternating(one: Sequence[str], two: Sequence[str]) -> tuple[str, ...]:
    """Return the items of both alternately, so that the first few show both."""
    pairs = itertools.zip_longest(one, two)
    return tuple(item for pair in pairs for item in pair if item is not None)


def _root(mapping: TreeMapping, sources: Iterable[str]) -> str:
    """Return the first root under which any rule finds a tensor."""
    names = list(sources)
    for root in mapping.roots:
        held = [name.removeprefix(root) for name in names if name.startswith(root)]
        if any(
            ours.match(name, mapping.sizes) is not None
            for _, ours, _ in mapping.sides()
            for name in held
        ):
            return root
    return mapping.roots[0]


@dataclasses.dataclass
class _Rule:
    """A rule with its matches, and the sizes of its own axes.

    Its sides are in the direction of the conversion.
    """

    rule: Rule
    source: Side
    target: Side
    local: Sizes
    found: dict[str, tuple[Labels, Spec]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def axes(self) -> frozenset[str]:
        """Every axis of the rule's pattern."""
        return frozenset(re.findall(r"\w+", self.rule.axes))


class _Resolver:
    """Collection of sizes and problems over all rules."""

    def __init__(self, mapping: TreeMapping, rules: list[_Rule], sizes: Sizes):
        self.mapping = mapping
        self.rules = rules
        self.sizes = sizes
        self.problems: list[str] = []
        self.unnamed: list[str] = []
        self.missing: list[str] = []

    def match(self, sources: Mapping[str, Spec], prefix: str) -> None:
        """Give each source tensor to the first rule that names it.

        Count the indices in the names. A name that only a counted size gives to a rule waits for
        it.
        """
        left = sorted(sources.items())
        for name, spec in left:
            if not name.startswith(prefix):
                self._refuse(name, spec)
        left = [item for item in left if item[0].startswith(prefix)]
        indices: dict[str, set[int]] = {}
        while left:
            before, left = left, [item for item in left if not self._match(*item, prefix, indices)]
            for axis, numbers in indices.items():
                self._settle(axis, max(numbers) + 1, "the names' indices")
            if len(left) == len(before) and not self._settle_absent():
                break
        self._settle_absent()
        for name, spec in left:
            self._refuse(name, spec)

    def _match(self, name: str, spec: Spec, prefix: str, indices: dict[str, set[int]]) -> bool:
        """Give a tensor to the first rule that names it; return False if it has to wait."""
        bare = name.removeprefix(prefix)
        for rule in self.rules:
            if rule.source.waits(bare, self.sizes):
                return False
            if (labels := rule.source.match(bare, self.sizes)) is None:
                continue
            rule.found[name] = (labels, spec)
            for axis, label in labels.items():
                if axis not in self.mapping.parts:
                    indices.setdefault(axis, set()).add(int(label))
            return True
        self._refuse(name, spec)
        return True

    def _refuse(self, name: str, spec: Spec) -> None:
        """Record a tensor that no rule names."""
        told = f"no rule of mapping {self.mapping.name!r} names it (shape {spec.shape})"
        self.unnamed.append(f"{name}: {told}")

    def _settle_absent(self) -> bool:
        """Set axes to 0 that may be absent and that no tensor has; return whether there are any."""
        found = [rule for rule in self.rules if rule.found]
        absent = [
            axis
            for axis in self.mapping.absent
            if axis not in self.sizes and not any(axis in rule.axes for rule in found)
        ]
        self.sizes |= dict.fromkeys(absent, 0)
        return bool(absent)

    def solve(self, then: Mapping[str, int]) -> None:
        """Infer axis sizes from shapes until nothing more follows.

        Then use the sizes of ``then`` that are still open, and last the padded axes that nothing
        else determined.
        """
        for more, final in (({}, False), (then, False), ({}, True)):
            self.sizes = {**more, **self.sizes}
            before = None
            while before != (before := self._known()):
                for rule in self.rules:
                    for name, (labels, spec) in rule.found.items():
                        self._solve_one(rule, name, labels, spec=spec, final=final)
        self.problems = list(dict.fromkeys(self.problems))

    def complete(self, prefix: str) -> None:
        """Record every tensor that a rule needs and the source lacks."""
        for rule in self.rules:
            is_absent = any(self.sizes.get(axis) == 0 for axis in rule.axes)
            if (rule.rule.optional or is_absent) and not rule.found:
                continue
            for labels in self._combinations(rule.source.indices):
                name = prefix + rule.source.format(labels, self.sizes)
                if name not in rule.found:
                    self.missing.append(f"{name}: missing")

    def moves(self, source_prefix: str, target_prefix: str) -> dict[str, tuple[Move, ...]]:
        """Return every move, by target; none of a rule with tensors that did not fit."""
        moves: dict[str, list[Move]] = {}
        for rule in self.rules:
            sizes = self.sizes | rule.local
            indices = dict.fromkeys((*rule.source.indices, *rule.target.indices))
            for labels in self._combinations(tuple(indices)) if rule.found else ():
                name = source_prefix + rule.source.format(labels, sizes)
                if name not in rule.found:
                    continue
                try:
                    source = self._end(
                        rule.source,
                        name,
                        labels,
                        sizes=sizes,
                        flipped=rule.source.flipped ^ rule.target.flipped,
                    )
                    target_name = target_prefix + rule.target.format(labels, sizes)
                    target = self._end(rule.target, target_name, labels, sizes=sizes)
                except KeyError as error:
                    self.problems.append(
                        f"{name}: the size of axis {error.args[0]!r} follows from nothing here"
                    )
                    break
                if source.shape != rule.found[name][1].shape:
                    continue  # solve() has recorded it
                moves.setdefault(target.name, []).append(
                    Move(rule.rule, source, target, factor=self._factor(rule, sizes))
                )
        return {name: tuple(group) for name, group in moves.items()}

    def _factor(self, rule: _Rule, sizes: Sizes) -> float:
        factor = rule.rule.factor(sizes)
        return factor if rule.source.name == rule.rule.jax else 1 / factor

    def _known(self) -> tuple[int, int]:
        return len(self.sizes), sum(len(rule.local) for rule in self.rules)

    def _solve_one(self, rule: _Rule, name: str, labels: Labels, spec: Spec, final: bool) -> None:
        side, parts = rule.source, self.mapping.parts
        known = {
            axis: size for axis, size in (self.sizes | rule.local).items() if axis not in side.pads
        }
        for axis, label in labels.items():
            known[axis] = 1
            if axis in parts:
                known.pop(axis)
                if (size := self._part_size(parts[axis][label], rule)) is not None:
                    known[axis] = size
        for axis in parts:  # of a tensor that holds all parts
            sizes = [self._part_size(expression, rule) for expression in parts[axis].values()]
            if axis not in labels and None not in sizes:
                known[axis] = sum(size for size in sizes if size is not None)
        try:
            solved = layout.solve_sizes(side.axes, spec.shape, known)
        except ValueError as error:
            self.problems.append(f"{name}: shape {spec.shape}: {error}")
            return
        for axis in layout.parse(side.axes).axes:
            if axis not in solved:
                continue
            if axis in side.pads:
                self._settle_padded(axis, side.pads[axis], solved[axis], name=name, final=final)
            elif axis in parts:
                self._settle_part(axis, labels.get(axis), solved[axis], name=name, rule=rule)
            elif axis not in side.indices:
                self._settle(axis, solved[axis], name, rule=rule)

    def _part_size(self, expression: int | str, rule: _Rule) -> int | None:
        return (
            expression if isinstance(expression, int) else (self.sizes | rule.local).get(expression)
        )

    def _settle(self, axis: str, size: int, where: str, rule: _Rule | None = None) -> None:
        sizes = self.sizes if rule is None or self.mapping.is_global(axis) else rule.local
        if sizes.setdefault(axis, size) != size:
            self.problems.append(f"{where}: axis {axis} has size {size}, elsewhere {sizes[axis]}")

    def _settle_part(self, axis: str, label: str | None, size: int, name: str, rule: _Rule) -> None:
        """Settle the size of the part ``label``; without one, of the only unknown part."""
        parts = self.mapping.parts[axis]
        counts = {part: self._part_size(expression, rule) for part, expression in parts.items()}
        unknown = [label] if label else [part for part, count in counts.items() if count is None]
        expression = parts[unknown[0]] if len(unknown) == 1 else 0
        if isinstance(expression, str):
            others = sum(count or 0 for part, count in counts.items() if part not in unknown)
            self._settle(expression, size - (0 if label else others), name)

    def _settle_padded(self, axis: str, pad: str, size: int, name: str, final: bool) -> None:
        if axis not in self.sizes and not final:
            return
        held = self.sizes.setdefault(axis, size)
        if size < held:
            self.problems.append(
                f"{name}: axis {axis} has size {size}, but "
                f"{self.mapping.fields.get(axis, axis)} is {held}"
            )
        else:
            self._settle(pad, size - held, name)

    def _combinations(self, axes: tuple[str, ...]) -> Iterator[Labels]:
        """Return every combination of labels; none where an axis's size is unknown."""
        if all(axis in self.mapping.parts or axis in self.sizes for axis in axes):
            labels = [
                list(self.mapping.parts[a])
                if a in self.mapping.parts
                else list(map(str, range(self.sizes[a])))
                for a in axes
            ]
            yield from (dict(zip(axes, values)) for values in itertools.product(*labels))

    def _end(
        self,
        side: Side,
        name: str,
        labels: Labels,
        sizes: Sizes,
        flipped: frozenset[str] = frozenset(),
    ) -> End:
        """Return one tensor's share in the move at ``labels``.

        Raises KeyError for an axis of unknown size.
        """
        held, take, data = {}, {}, {}
        for axis in layout.parse(side.axes).axes:
            start, stop = 0, None
            if axis in self.mapping.parts:
                held[axis], start, stop = self._part(
                    axis, labels.get(axis), sizes, own=axis in side.indices
                )
            elif axis in side.pads:
                stop, held[axis] = sizes[axis], sizes[axis] + sizes.get(side.pads[axis], 0)
                data[axis] = stop
            else:
                held[axis] = sizes[axis]
                if axis in labels and axis not in side.indices:
                    start, stop = int(labels[axis]), int(labels[axis]) + 1
            take[axis] = slice(start, held[axis] if stop is None else stop)
            if axis in flipped:
                take[axis] = _backwards(take[axis])
        parsed = layout.parse(side.axes)
        split = tuple(held[axis] for axis in parsed.axes)
        takes, data_size = (
            tuple(take[axis] for axis in parsed.axes),
            math.prod(parsed.shape(held | data)),
        )
        return End(
            name, parsed.shape(held), parsed.axes, split=split, take=takes, data_size=data_size
        )

    def _part(
        self, axis: str, label: str | None, sizes: Sizes, own: bool
    ) -> tuple[int, int, int | None]:
        """Return the axis's size in a tensor, and the rows of the part ``label`` in it.

        ``own``: the tensor holds only that part.
        """
        counts = {
            k: v if isinstance(v, int) else sizes[v] for k, v in self.mapping.parts[axis].items()
        }
        if own:
            assert label is not None
            return counts[label], 0, None
        if label is None:
            return sum(counts.values()), 0, None
        before = list(counts).index(label)
        start = sum(list(counts.values())[:before])
        return sum(counts.values()), start, start + counts[label]


def _backwards(part: slice) -> slice:
    return slice(part.stop - 1, None if part.start == 0 else part.start - 1, -1)


def _gaps(moves: Mapping[str, tuple[Move, ...]], sources: Mapping[str, Spec]) -> Iterator[str]:
    """Yield targets that are filled incompletely or twice, or from tensors of different dtypes."""
    for name, group in moves.items():
        filled, size = sum(move.target.filled for move in group), group[0].target.data_size
        if filled != size:
            yield f"{name}: {filled} of {size} elements have a source"
        dtypes = {str(sources[move.source.name].dtype) for move in group}
        if len(dtypes) > 1:
            yield f"{name}: made of tensors of different dtypes, {' and '.join(sorted(dtypes))}"
