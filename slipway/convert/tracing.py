"""One run of a module on an example: its outputs, and the axes of its variables.

Not here: how axes are followed (dataflow.py).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from slipway.convert.axes import Axis, leaves
from slipway.convert.dataflow import follow

Axes = Sequence[Axis]


@dataclasses.dataclass(frozen=True)
class Trace:
    """Result of a run. ``axes`` are by the identity of the variable, or of the array."""

    axes: Mapping[int, Axes]
    jaxpr: Any
    inputs: Sequence[np.ndarray]
    outputs: Sequence[np.ndarray]

    def of(self, variable: Any) -> Axes | None:
        """Return the axes of a variable that the run has used; None for another one."""
        axes = self.axes.get(id(variable))
        if axes is None:
            return None
        found = [leaf for axis in axes for leaf in leaves(axis)]
        return axes if not found or any(leaf.is_used for leaf in found) else None

    def scanned(self, variable: Any) -> tuple[int, ...]:
        """Return the axes over which the run has scanned."""
        axes = self.axes.get(id(variable), ())
        return tuple(
            i for i, axis in enumerate(axes) if any(leaf.is_scanned for leaf in leaves(axis))
        )


def trace_nnx(module: nnx.Module, example: Any) -> Trace:
    """Run ``module`` on an example, in the state of ``module.eval()``."""
    graph, state = nnx.split(module)
    held = list(nnx.to_flat_state(state))
    variables = {
        path: node for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable)
    }

    def call(values: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        flat = [(path, variable.replace(value)) for (path, variable), value in zip(held, values)]
        run: Any = nnx.merge(graph, nnx.from_flat_state(flat))  # nnx.Module declares no __call__
        run.eval()
        return run(*args, **kwargs)

    values = [variable[...] for _, variable in held]
    return trace(call, values, [id(variables[path]) for path, _ in held], example=example)


def trace(
    call: Callable[[Sequence[Any], Sequence[Any], Mapping[str, Any]], Any],
    values: Sequence[Any],
    ids: Sequence[int],
    example: Any,
) -> Trace:
    """Run ``call`` on variables' values and an example.

    ``example``: an array, a tuple of arguments or a mapping of keyword arguments.
    """
    args, kwargs = arguments(example)
    given, structure = jax.tree.flatten((args, kwargs))
    at = [i for i, leaf in enumerate(given) if isinstance(leaf, np.ndarray | jax.Array)]
    inputs = [jax.numpy.asarray(given[i]) for i in at]

    def run(values: Sequence[Any], inputs: Sequence[Any]) -> Any:
        whole = list(given)
        for i, x in zip(at, inputs):
            whole[i] = x
        args, kwargs = jax.tree.unflatten(structure, whole)
        return [
            x
            for x in jax.tree.leaves(call(values, args, kwargs))
            if isinstance(x, jax.Array | np.ndarray)
        ]

    jaxpr = jax.make_jaxpr(run)(list(values), inputs)
    axes = follow(jaxpr, ["param"] * len(values) + ["input"] * len(inputs))
    outputs = run(list(values), inputs)
    return Trace(
        dict(zip(ids, axes)),
        jaxpr,
        [np.asarray(x) for x in inputs],
        outputs=[np.asarray(x) for x in outputs],
    )


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that an example stands for."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple) else ((example,), {})
