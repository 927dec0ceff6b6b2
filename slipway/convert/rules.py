"""Rules of a conversion: tensors of a JAX tree and of an HF directory with the same numbers.

A rule is three strings: ``("layers.attn.q.kernel", "model.layers.{layers}.q_proj.weight",
"embed layers heads head_dim -> layers (heads head_dim) embed")``. The inverse is the same rule read
from right to left. In addition to layout.py's axis notation:

``{layers}`` in a name      one tensor per index of that axis, which the tensor itself then lacks
``{blocks cycle}``          two axes merged: index 5 is block 2, place 1 in a cycle of 2
``{dense+moe}``             one tensor per index of ``moe``, counted after all of ``dense``
``{qkv}``, a part axis      one tensor per named part of that axis:
                            ``parts={"qkv": {"q": "heads", "k": ...}}``
``-h``                      the axis runs backwards
``vocab+pad``               the axis has ``pad`` more rows at its end, which hold nothing
an axis on one side only    that side holds the same numbers once per index

Not here: files and values (executor.py), rules of particular models (mappings/).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from slipway import layout

ARROW = "->"
_TOKEN = re.compile(r"[()]|[^\s()]+")
_PLACEHOLDER = re.compile(r"\{(?:(\w+)\+)?(\w+(?: \w+)*)\}")  # the axis counted before, the axes
_SCALE = re.compile(r"\* (\w+|\d+\.?\d*)(?: \*\* (-?\d+\.?\d*))?")

# Parts of an axis: label and size of each; the size is a number or another axis.
Parts = Mapping[str, Mapping[str, int | str]]


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a rule: the names of its tensors, and the axes of each."""

    name: str  # with placeholders
    axes: str  # in layout.py's notation, of one tensor
    flipped: frozenset[str]
    pads: Mapping[str, str]  # padded axis -> the axis that counts the rows added
    labels: tuple[tuple[str, tuple[str, ...]], ...]  # part axes, and the labels of their parts

    @functools.cached_property
    def _counters(self) -> tuple["_Counter", ...]:
        return tuple(
            _Counter(found[0], found[1] or "", tuple(found[2].split()))
            for found in _PLACEHOLDER.finditer(self.name)
        )

    @functools.cached_property
    def indices(self) -> tuple[str, ...]:
        """Axes that have a tensor for every index, or part."""
        return tuple(axis for counter in self._counters for axis in counter.axes)

    def format(self, labels: Mapping[str, str], sizes: Mapping[str, int]) -> str:
        """Return the tensor's name for one label of each of ``indices``."""
        name = self.name
        for counter in self._counters:
            name = name.replace(counter.text, counter.format(labels, sizes))
        return name

    def match(self, name: str, sizes: Mapping[str, int]) -> dict[str, str] | None:
        """Return the labels for which ``format`` gives ``name``.

        None if there are none, or if ``sizes`` lacks one that determines them.
        """
        found = self._pattern.fullmatch(name)
        if found is None:
            return None
        labels: dict[str, str] = {}
        for counter, text in zip(dict.fromkeys(self._counters), found.groups()):
            read = counter.read(text, sizes)
            if read is None or any(labels.get(axis, read[axis]) != read[axis] for axis in read):
                return None
            labels |= read
        return labels

    def waits(self, name: str, sizes: Mapping[str, int]) -> bool:
        """Return whether a size that ``sizes`` lacks decides if the side has a tensor ``name``."""
        return not sizes.keys() >= self._needs and self._pattern.fullmatch(name) is not None

    @functools.cached_property
    def _needs(self) -> frozenset[str]:
        return frozenset(axis for counter in self._counters for axis in counter.needs)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return _pattern(self.name, self.labels)


@dataclasses.dataclass(frozen=True)
class _Counter:
    """A placeholder of a name: axes merged into one index, which may begin after another axis."""

    text: str
    after: str
    axes: tuple[str, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """Axes with sizes that determine the index."""
        return (*self.axes[1:], *([self.after] if self.after else []))

    def format(self, labels: Mapping[str, str], sizes: Mapping[str, int]) -> str:
        """Return the index of one label of each axis, or the label of a single axis."""
        if not self.needs:
            return labels[self.axes[0]]
        index = int(labels[self.axes[0]])
        for axis in self.axes[1:]:
            index = index * sizes[axis] + int(labels[axis])
        return str(index + (sizes[self.after] if self.after else 0))

    def read(self, text: str, sizes: Mapping[str, int]) -> dict[str, str] | None:
        """Return the labels of which ``format`` makes ``text``; None if there are none."""
        if not self.needs:
            return {self.axes[0]: text}
        if not sizes.keys() >= set(self.needs) or not all(sizes[axis] for axis in self.axes[1:]):
            return None
        index = int(text) - (sizes[self.after] if self.after else 0)
        labels = {}
        for axis in reversed(self.axes[1:]):
            index, label = divmod(index, sizes[axis])
            labels[axis] = str(label)
        return {self.axes[0]: str(index), **labels} if index >= 0 else None


@functools.cache
def _pattern(template: str, parts: tuple[tuple[str, tuple[str, ...]], ...]) -> re.Pattern[str]:
    """Return a pattern with one group for each placeholder, in the order of their first places."""
    labels, regex, end = dict(parts), "", 0
    numbers: dict[str, int] = {}
    for found in _PLACEHOLDER.finditer(template):
        axis = found[2]
        values = "|".join(map(re.escape, labels[axis])) if axis in labels else r"0|[1-9]\d*"
        regex += re.escape(template[end : found.start()])
        regex += f"(?:\\{numbers[found[0]]})" if found[0] in numbers else f"({values})"
        numbers.setdefault(found[0], len(numbers) + 1)
        end = found.end()
    return re.compile(regex + re.escape(template[end:]))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor, or one family of tensors, on both sides.

    ``scale`` is the factor of the HF side, ``"* head_dim ** 0.5"`` or ``"* 2.0"``, computed in
    float32. An ``optional`` rule may match nothing.
    """

    jax: str
    hf: str
    axes: str
    scale: str = ""
    optional: bool = False

    def sides(self, parts: Parts) -> tuple[Side, Side]:
        """Return the JAX side and the HF side.

        Raises ValueError if the pattern cannot be read or the two sides do not fit together.
        """
        ours, arrow, theirs = self.axes.partition(ARROW)
        if not arrow:
            raise ValueError(
                f"pattern {self.axes!r}: expected two sides and {ARROW!r} between them"
            )
        return _side(self.jax, ours, parts), _side(self.hf, theirs, parts)

    def factor(self, sizes: Mapping[str, int]) -> float:
        """Return the factor of the HF side."""
        if not self.scale:
            return 1.0
        found = _SCALE.fullmatch(self.scale)
        if found is None:
            raise ValueError(f"scale {self.scale!r}: expected '* axis ** power' or '* number'")
        base = float(sizes[found[1]]) if found[1].isidentifier() else float(found[1])
        return base ** float(found[2] or 1)


def _side(name: str, text: str, parts: Parts) -> Side:
    flipped, pads, words = set(), {}, []
    for token in _TOKEN.findall(text):
        axis, plus, pad = token.partition("+")
        if axis.startswith("-"):
            axis = axis[1:]
            flipped.add(axis)
        if plus:
            pads[axis] = pad
        words.append(axis)
    axes = " ".join(words).replace("( ", "(").replace(" )", ")")
    groups = layout.parse(axes).groups
    named = _axes(name)
    kept = [
        group
        for group in groups
        if not (len(group) == 1 and group[0] in named and _vanishes(group[0], parts))
    ]
    rest = " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in kept)
    labels = tuple((axis, tuple(sizes)) for axis, sizes in parts.items())
    return Side(name, rest, frozenset(flipped), pads=pads, labels=labels)


def _axes(name: str) -> set[str]:
    """Return the axes with an index in a name."""
    return {axis for found in _PLACEHOLDER.finditer(name) for axis in found[2].split()}


def _vanishes(axis: str, parts: Parts) -> bool:
    """Return whether a tensor with one index of the axis has no dimension for it."""
    return axis not in parts or all(size == 1 for size in parts[axis].values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeMapping:
    """All rules of one family of trees, and further facts about it.

    ``fields`` names the config.json field that states an axis's size, or that of several, in the
    notation of names (``"dense+moe": "num_hidden_layers"``); ``config`` the fields that the tree
    itself determines, ``required`` the fields that do not follow from the tree. ``roots``
    are prefixes that the tree may have; the first is written. ``ignored`` are globs of names, roots
    included, without weights. ``tied`` maps an HF key to the key that it repeats where
    ``tie_word_embeddings`` is true. ``jax_constants`` and ``hf_constants`` exist on one side only,
    by their whole names: integers, or empty mappings. ``note`` is printed and reported with every
    conversion: the choice between several possible rules, and its reason. ``undecided`` is a
    problem by itself: an option that must be given before the rules can be trusted. Axes of
    ``absent`` have size 0 if no tensor has them; then the tree lacks all tensors of their rules.
    """

    name: str
    rules: tuple[Rule, ...]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    parts: Parts = dataclasses.field(default_factory=dict)
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, object] = dataclasses.field(default_factory=dict)
    required: tuple[str, ...] = ()
    roots: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    jax_constants: Mapping[str, int | Mapping] = dataclasses.field(default_factory=dict)
    hf_constants: Mapping[str, int] = dataclasses.field(default_factory=dict)
    note: str = ""
    undecided: str = ""
    absent: tuple[str, ...] = ()

    def sides(self) -> Iterator[tuple[Rule, Side, Side]]:
        """Return every rule with its JAX and its HF side."""
        for rule in self.rules:
            yield rule, *rule.sides(self.parts)

    def is_global(self, axis: str) -> bool:
        """Return whether the axis has the same meaning in every rule.

        Any other name has a meaning only in its own rule.
        """
        return (
            axis in self.fields or axis in self.sizes or axis in self.parts or axis in self._indices
        )

    @functools.cached_property
    def _indices(self) -> frozenset[str]:
        return frozenset(axis for rule in self.rules for axis in _axes(rule.jax) | _axes(rule.hf))

    def size(self, expression: str, sizes: Mapping[str, int]) -> int | None:
        """Return the size of an axis, or of axes in the notation of names; None if unknown."""
        axes = re.findall(r"\w+", expression)
        if not sizes.keys() >= set(axes):
            return None
        counts = [sizes[axis] for axis in axes]
        return sum(counts) if "+" in expression else math.prod(counts)


def rules(rows: Sequence[Sequence[str]]) -> tuple[Rule, ...]:
    """Return rules from rows of (JAX name, HF key, pattern[, scale]).

    A JAX name that ends in ``?`` is optional.
    """
    return tuple(
        Rule(
            row[0].removesuffix("?"),
            row[1],
            row[2],
            scale=row[3] if len(row) > 3 else "",
            optional=row[0].endswith("?"),
        )
        for row in rows
    )


def within(jax: str, hf: str, rows: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Return the rows with a prefix to their JAX names and one to their HF keys."""
    return tuple((f"{jax}{row[0]}", f"{hf}{row[1]}", *row[2:]) for row in rows)
