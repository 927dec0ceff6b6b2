"""Axes of a module's variables, followed through its traced operations (a jaxpr).

Each array is a list of axes (axes.py). An operation that keeps axes passes them on; one that breaks
them is recorded, and the order of a merged feature map before or after it is then unknown. Nothing
is computed. Not here: the run of the module (tracing.py).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from slipway.convert.axes import (
    Atom,
    Axis,
    Unclear,
    everything,
    fresh,
    index_order,
    leaves,
    lose,
    mark,
    regroup,
    size_of,
    unify,
)

Axes = list[Axis]

ELEMENTWISE = {
    "abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp", "convert_element_type",
    "copy", "copy_p", "cos", "cosh", "device_put", "div", "eq", "erf", "erf_inv", "erfc", "exp",
    "exp2", "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "lgamma",
    "digamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter",
    "not", "optimization_barrier", "or", "population_count", "pow", "pvary", "real",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "sharding_constraint",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh",
    "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor", "asin", "acos", "atan",
    "asinh", "acosh", "atanh", "reshard", "mesh_cast",
}  # fmt: skip
COMPUTING = frozenset(("dot_general", "conv_general_dilated", "gather"))
_REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
    "reduce_xor", "argmax", "argmin",
}  # fmt: skip
_ALONG = {
    "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp",
}  # fmt: skip
_NEW = {
    "iota", "random_bits", "random_wrap", "random_unwrap", "random_seed", "random_fold_in",
    "random_split", "threefry2x32",
}  # fmt: skip


def follow(closed: core.ClosedJaxpr, births: Sequence[str]) -> list[Axes]:
    """Return the axes of the jaxpr's arguments; ``births`` marks each as "param" or "input"."""
    flow = _Flow()
    avals: list[Any] = [var.aval for var in closed.jaxpr.invars]
    arguments = [[fresh(size, birth) for size in aval.shape] for aval, birth in zip(avals, births)]
    flow.run(closed.jaxpr, [_constant(const) for const in closed.consts], arguments)
    flow.settle()
    return arguments


def _constant(const: Any) -> Axes:
    return [fresh(size, "constant") for size in getattr(const, "shape", ())]


@dataclasses.dataclass
class _Flow:
    """Interpretation of one jaxpr and those inside it."""

    # (operation, axes before it, axes after it)
    broken: list[tuple[str, Axes, Axes]] = dataclasses.field(default_factory=list)

    def run(
        self, jaxpr: core.Jaxpr, consts: Sequence[Axes], arguments: Sequence[Axes]
    ) -> list[Axes]:
        """Return the axes of the jaxpr's results."""
        env: dict[Any, Axes] = {}

        def read(atom: Any) -> Axes:
            if isinstance(atom, core.Literal):
                return [None if size != 1 else () for size in getattr(atom.aval, "shape", ())]
            return env[atom]

        for var, axes in [*zip(jaxpr.constvars, consts), *zip(jaxpr.invars, arguments)]:
            env[var] = axes
        for eqn in jaxpr.eqns:
            known = [read(var) for var in eqn.invars]
            made = self._apply(eqn, known)
            env |= dict(zip(eqn.outvars, made))
        return [read(var) for var in jaxpr.outvars]

    def settle(self) -> None:
        """Carry merged feature maps on one side of a broken operation over to the other side."""
        changed = True
        while changed:
            changed = False
            for name, before, behind in self.broken:
                for one, other in ((before, behind), (behind, before)):
                    if any(_is_merged(axis, count_lost=one is before) for axis in one):
                        for axis in other:
                            changed |= any(not leaf.lost for leaf in everything(axis))
                            lose(axis, f"the operation {name}")

    def _apply(self, eqn: Any, known: list[Axes]) -> list[Axes]:
        name = eqn.primitive.name
        shapes = [tuple(var.aval.shape) for var in eqn.outvars]
        if name in COMPUTING or name in ELEMENTWISE:
            for leaf in (leaf for axes in known for axis in axes for leaf in leaves(axis)):
                leaf.is_used = True
        if name in ELEMENTWISE:
            return self._elementwise(eqn, known, shapes)
        if name in _REDUCTIONS:
            kept = [
                [axis for i, axis in enumerate(axes) if i not in eqn.params["axes"]]
                for axes in known
            ]
            return kept[: len(shapes)]
        if name in _NEW:
            return [[fresh(size, "constant") for size in shape] for shape in shapes]
        rule: Callable[..., list[Axes]] | None = getattr(self, f"_{name}", None)
        if rule is not None:
            return rule(eqn, known, shapes)
        if name in _ALONG:
            return [[self._derived(name, axis, size_of(axis)) for axis in known[0]]]
        if name.startswith("reduce_window"):
            return [self._windows(eqn, known[0], shapes[0])]
        inner = next(
            (eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params),
            None,
        )
        if inner is not None and name != "shard_map":
            return self._call(inner, known)
        return self._unknown(name, known, shapes)

    def _call(self, inner: Any, known: Sequence[Axes]) -> list[Axes]:
        jaxpr = getattr(inner, "jaxpr", inner)
        return self.run(jaxpr, [_constant(const) for const in getattr(inner, "consts", ())], known)

    def _unknown(
        self, name: str, known: Sequence[Axes], shapes: Sequence[tuple[int, ...]]
    ) -> list[Axes]:
        """Return the results of an operation without a rule.

        Equal sizes are taken as the same direction.
        """
        made = []
        for shape in shapes:
            before = next((axes for axes in known if len(axes) == len(shape)), [])
            axes: Axes = []
            for i, size in enumerate(shape):
                axis = fresh(size, "constant")
                if before and len(leaves(before[i])) == 1 and size > 1:
                    axis = (leaves(before[i])[0].derived(size),)
                elif any(leaves(axis) for axes_ in known for axis in axes_):
                    lose(axis, f"the operation {name}")
                axes.append(axis)
            made.append(axes)
        self.broken.append(
            (
                name,
                [axis for axes in known for axis in axes],
                [axis for axes in made for axis in axes],
            )
        )
        return made

    def _derived(self, name: str, axis: Axis, size: int) -> Axis:
        """Return the axis of a slice, pool or pad.

        It has the same direction for one atom, and is unknown for merged ones.
        """
        if size == 1 or axis is None:
            return axis if axis is None else ()
        found = leaves(axis)
        made = (found[0].derived(size),) if len(found) == 1 else fresh(size, "constant")
        self.broken.append((name, [axis], [made]))
        return made

    def _elementwise(
        self, eqn: Any, known: list[Axes], shapes: list[tuple[int, ...]]
    ) -> list[Axes]:
        if len(shapes) > 1:  # as many results as operands
            return [list(axes) for axes in known]
        made: Axes = [None if size != 1 else () for size in shapes[0]]
        for axes in known:
            for i, axis in enumerate(axes if len(axes) == len(made) else ()):
                if axis:  # not of size 1, which is broadcast, and not constant
                    made[i] = unify(made[i], axis)
        return [made]

    def _reshape(self, eqn: Any, known: list[Axes], shapes: list[tuple[int, ...]]) -> list[Axes]:
        shape = eqn.invars[0].aval.shape
        before = [axis if axis is not None else fresh(n) for axis, n in zip(known[0], shape)]
        if all(axis is None or not axis for axis in known[0]):
            return [[None if size != 1 else () for size in shapes[0]]]
        made = regroup(before, shapes[0])
        return self._unknown("reshape", [before], shapes) if made is None else [made]

    def _transpose(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        return [[known[0][i] for i in eqn.params["permutation"]]]

    def _squeeze(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        rank = len(known[0])
        gone = {i % rank for i in eqn.params["dimensions"]}
        return [[axis for i, axis in enumerate(known[0]) if i not in gone]]

    def _expand_dims(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        made = list(known[0])
        for i in sorted(eqn.params["dimensions"]):
            made.insert(i, ())
        return [made]

    def _broadcast_in_dim(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        made: Axes = [None if size != 1 else () for size in shapes[0]]
        before = eqn.invars[0].aval.shape
        for i, at in enumerate(eqn.params["broadcast_dimensions"]):
            if before[i] == shapes[0][at]:
                made[at] = known[0][i]
        return [made]

    def _dot_general(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        (contract, batch), (left, right) = eqn.params["dimension_numbers"], known
        free = [
            [
                axis
                for i, axis in enumerate(axes)
                if i not in contract[side] and i not in batch[side]
            ]
            for side, axes in enumerate(known)
        ]
        is_tokenwise = [len(axes) + len(batch[0]) > 1 for axes in reversed(free)]
        for side, axes in enumerate(free):
            summed = [leaf for i in contract[1 - side] for leaf in leaves(known[1 - side][i])]
            for axis in axes:
                for leaf in leaves(axis):
                    if not leaf.births - {"param"} and is_tokenwise[side]:
                        leaf.births.add("linear")
                # A map along the direction of the summed axis.
                if len(summed) == 1 and summed[0].kind == "space" and len(axes) == 1:
                    mark(axis, "space", summed[0].index)
        for i, j in zip(*contract):
            unify(left[i], right[j])
        shared = [unify(left[i], right[j]) for i, j in zip(*batch)]
        return [[*shared, *free[0], *free[1]]]

    def _conv_general_dilated(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
        (batch, feature, *space), (out, into, *_) = numbers.lhs_spec, numbers.rhs_spec
        x, kernel = known
        mark(x[feature], "channel")
        for index, i in enumerate(space):
            mark(x[i], "space", index)
        if groups == 1:
            unify(x[feature], kernel[into])
        else:
            self.broken.append(("grouped convolution", [x[feature]], [kernel[out]]))
        mark(kernel[out], "channel", birth="conv")
        made: Axes = [None] * len(shapes[0])
        out_batch, out_feature, *out_space = numbers.out_spec
        made[out_batch] = (
            x[batch] if eqn.params["batch_group_count"] == 1 else fresh(shapes[0][out_batch])
        )
        made[out_feature] = kernel[out]
        for index, i in enumerate(out_space):
            made[i] = (
                (Atom(shapes[0][i], "space", index, births=("conv",)),) if shapes[0][i] != 1 else ()
            )
        return [made]

    def _windows(self, eqn: Any, axes: Axes, shape: tuple[int, ...]) -> Axes:
        sizes = eqn.params.get("window_dimensions") or [2] * len(shape)
        before = eqn.invars[0].aval.shape
        return [
            axis
            if sizes[i] == 1 and before[i] == shape[i]
            else self._derived("pool", axis, shape[i])
            for i, axis in enumerate(axes)
        ]

    def _slice(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        starts, strides = eqn.params["start_indices"], eqn.params["strides"] or [1] * len(shapes[0])
        before = eqn.invars[0].aval.shape
        made: Axes = []
        for axis, start, stride, old, size in zip(known[0], starts, strides, before, shapes[0]):
            if old == size:
                made.append(axis)
            else:
                part = self._part(axis, start, size) if stride == 1 else None
                made.append(part if part is not None else self._derived("slice", axis, size))
        return [made]

    def _split(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        at, made, start = eqn.params["axis"], [], 0
        for size in map(int, eqn.params["sizes"]):
            part = self._part(known[0][at], start, size)
            part = part if part is not None else self._derived("split", known[0][at], size)
            made.append([part if i == at else axis for i, axis in enumerate(known[0])])
            start += size
        return made

    def _part(self, axis: Axis, start: int, size: int) -> Axis:
        """Return the rows of one part of a concatenation; None if the axis has none.

        An axis of one atom without kind is cut.
        """
        found = leaves(axis)
        if len(found) != 1 or found[0].kind == "space":
            return None
        whole = found[0]
        cuts = [0]
        for part in whole.parts or [axis]:
            cuts.append(cuts[-1] + size_of(part))
        parts = list(whole.parts)
        for cut in (start, start + size):
            if cut in cuts:
                continue
            at = next(i for i in range(len(cuts)) if cuts[i] > cut)
            if parts and len(leaves(parts[at - 1])) > 1:
                return None  # inside of a merged axis
            old = leaves(parts[at - 1])[0] if parts else whole
            if old.parts:
                return None
            halves: list[Axis] = [_piece(old, cut - cuts[at - 1]), _piece(old, cuts[at] - cut)]
            parts[at - 1 : at] = halves
            cuts.insert(at, cut)
        if not parts:
            return axis
        whole.parts = parts
        inside = parts[cuts.index(start) : cuts.index(start + size)]
        if len(inside) == 1:
            return inside[0]
        atom = Atom(size, whole.kind, whole.index, births=whole.births)
        atom.parts = inside
        return (atom,)

    def _concatenate(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        at = eqn.params["dimension"]
        made: Axes = []
        for i in range(len(shapes[0])):
            axis: Axis = None if shapes[0][i] != 1 else ()
            for axes in known if i != at else ():
                axis = unify(axis, axes[i])
            made.append(axis)
        sizes = [var.aval.shape[at] for var in eqn.invars]
        atom = Atom(shapes[0][at])
        atom.parts = [axes[at] or (Atom(n),) for axes, n in zip(known, sizes) if n]
        kinds = {(leaf.kind, leaf.index) for part in atom.parts for leaf in leaves(part)}
        if len(kinds) == 1:
            atom.kind, atom.index = kinds.pop()
        if (
            any(leaf.kind == "space" for part in atom.parts for leaf in leaves(part))
            and len(kinds) == 0
        ):
            atom.births = set().union(
                *(leaf.births for part in atom.parts for leaf in leaves(part))
            )
        made[at] = (atom,) if atom.size > 1 else ()
        return [made]

    def _pad(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        before = eqn.invars[0].aval.shape
        config = eqn.params["padding_config"]
        return [
            [
                axis if not any(config[i]) else self._derived("pad", axis, shapes[0][i])
                for i, axis in enumerate(known[0][: len(before)])
            ]
        ]

    def _rev(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        turned = eqn.params["dimensions"]
        return [
            [
                self._derived("rev", a, n) if i in turned else a
                for i, (a, n) in enumerate(zip(known[0], shapes[0]))
            ]
        ]

    def _sort(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        at = eqn.params["dimension"]
        return [
            [self._derived("sort", a, size_of(a)) if i == at else a for i, a in enumerate(axes)]
            for axes in known
        ]

    def _top_k(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        return [
            [*known[0][:-1], self._derived("top_k", known[0][-1], shape[-1])] for shape in shapes
        ]

    def _dynamic_slice(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        before = eqn.invars[0].aval.shape
        return [
            [
                axis
                if before[i] == shapes[0][i]
                else self._derived("dynamic_slice", axis, shapes[0][i])
                for i, axis in enumerate(known[0])
            ]
        ]

    def _dynamic_update_slice(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        made: Axes = []
        for i, axis in enumerate(known[0]):
            if eqn.invars[1].aval.shape[i] == shapes[0][i]:
                made.append(unify(axis, known[1][i]))
            else:
                self.broken.append(("dynamic_update_slice", [known[1][i]], [axis]))
                made.append(axis)
        return [made]

    def _gather(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        before = eqn.invars[0].aval.shape
        gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        kept = iter(
            axis if sizes[i] == before[i] else self._derived("gather", axis, sizes[i])
            for i, axis in enumerate(known[0])
            if i not in gone
        )
        batch = iter(known[1][:-1])
        made = [
            next(kept) if i in numbers.offset_dims else next(batch) for i in range(len(shapes[0]))
        ]
        for axis in made:
            if all(leaf.births == {"param"} for leaf in leaves(axis)):
                for leaf in leaves(axis):
                    leaf.births.add("linear")  # an embedding: channels last in torch, too
        return [made]

    def _scan(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        # The names of a scan's parameters differ between versions of JAX; ranks do not.
        body = eqn.params["jaxpr"].jaxpr
        carries, whole = _unstacked(eqn.outvars, body.outvars), _unstacked(eqn.invars, body.invars)
        consts, over = whole - carries, known[whole:]
        for axes in over:
            if len(found := leaves(axes[0])) == 1:
                found[0].is_scanned = True
        inside = [*known[:whole], *(axes[1:] for axes in over)]
        results = self._call(eqn.params["jaxpr"], inside)
        carried = [_unified(a, b) for a, b in zip(known[consts:whole], results[:carries])]
        stack = fresh(eqn.params["length"], "constant")
        return [*carried, *([stack, *axes] for axes in results[carries:])]

    def _while(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        first, last = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        inside = known[first:]
        return [
            _unified(a, b)
            for a, b in zip(inside[last:], self._call(eqn.params["body_jaxpr"], inside))
        ]

    def _cond(self, eqn: Any, known: list[Axes], shapes: Any) -> list[Axes]:
        branches = [self._call(branch, known[1:]) for branch in eqn.params["branches"]]
        made = branches[0]
        for branch in branches[1:]:
            made = [_unified(a, b) for a, b in zip(made, branch)]
        return made


def _unstacked(around: Sequence[Any], inside: Sequence[Any]) -> int:
    """Return how many of a scan's variables are whole in each turn: the first ones."""
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(around, inside))


def _piece(atom: Atom, size: int) -> Axis:
    piece = Atom(size, atom.kind, atom.index, births=atom.births)
    piece.lost = atom.lost
    return (piece,)


def _unified(one: Axes, other: Axes) -> Axes:
    return [unify(a, b) for a, b in zip(one, other)]


def _is_merged(axis: Axis, count_lost: bool) -> bool:
    """Return whether torch's order of an axis is different, or unknown.

    A lost order counts only after its operation.
    """
    found = leaves(axis)
    if not count_lost and any(leaf.lost for leaf in found):
        return False
    try:
        return index_order(found) is not None
    except Unclear:
        return True
