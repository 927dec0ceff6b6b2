"""Layers of a Flax Linen module, found by running the module on an example.

A Linen module has no layers until it runs. Each call of a layer is intercepted; it shows the
layer's class, its attributes, its path among the variables, and the shapes of the arrays that one
layer of a stack sees. Not here: the torch form of a layer's arrays (layers.py), the layers of NNX
modules (nnx_walk.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
from flax import linen
from flax.core import meta

from slipway.convert.layers import (
    ATTENTION_NAMES,
    LINEN_FORMS,
    Layer,
    NotLinear,
    Shape,
    deviations,
    facts_of,
    fitted,
    own_form,
)
from slipway.convert.nnx_walk import Found, Own
from slipway.convert.tracing import Trace, trace
from slipway.errors import InvalidConfig

Path = tuple[str, ...]
_KINDS = {"Dense": "Linear", "DenseGeneral": "LinearGeneral"}  # NNX's names of the same layers
_REPARAMETRIZED = (linen.WeightNorm, linen.SpectralNorm)
_STATE = ("cache", "intermediates", "perturbations")  # collections that hold no weights


def walk(module: linen.Module, variables: Any, own: Own, example: Any) -> tuple[Found, Trace]:
    """Run ``module`` on an example and return its layers and the trace.

    ``own``: for user-defined classes, rows, or the class with the same rows. Raises InvalidConfig
    if the module does not run with these variables on this example.
    """
    if example is None:
        raise InvalidConfig(
            "example",
            None,
            "an input of the module: the layers of a Linen module are known only once it runs",
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise InvalidConfig(
            "variables",
            got,
            "the module's collections, {'params': ..., and 'batch_stats' and others}",
        )
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(meta.unbox(dict(variables))))
    weights = {path: np.asarray(x)[...] for path, x in flat.items() if path[0] not in _STATE}
    state = {path: x for path, x in flat.items() if path[0] in _STATE}
    recorder = _Recorder(weights, own)
    jax.make_jaxpr(_check_parents)(0)

    def call(values: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        given = flax.traverse_util.unflatten_dict(dict(zip(weights, values)) | state)
        with linen.intercept_methods(recorder.intercept):
            return module.apply(given, *args, **kwargs)

    try:
        traced = trace(
            call, list(weights.values()), [id(x) for x in weights.values()], example=example
        )
    except (flax.errors.FlaxError, TypeError) as error:
        raise InvalidConfig(
            "example",
            str(error),
            "arguments with which the module computes inference with these variables",
        ) from error
    return recorder.finish(), traced


class _Recorder:
    """Layers that one run of a module has called."""

    def __init__(self, weights: Mapping[Path, np.ndarray], own: Own):
        self.own = own
        self.found = Found()
        self.weights = weights
        self.seen: dict[Path, linen.Module] = {}
        self.claimed: set[Path] = set()

    def intercept(
        self,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        """Record the module of an intercepted method, then call the method."""
        node = context.module
        # A lifted class (nn.scan, nn.remat) calls a wrapper without a name first, then the class's
        # own method.
        if (
            context.method_name != "setup"
            and hasattr(type(node), context.method_name)
            and node.scope is not None
        ):
            if isinstance(node, linen.BatchNorm) and context.method_name == "__call__":
                _check_running(node, args, kwargs)
            self._visit(node, context.method_name)
        return method(*args, **kwargs)

    def finish(self) -> Found:
        """Return the layers; variables that no layer has taken are ``bare``."""
        for path, array in self.weights.items():
            if path in self.claimed:
                continue
            name = ".".join(path[1:])
            if name in self.found.bare:
                self.found.problems.append(
                    f"{name}: several collections hold a variable of this path"
                )
            self.found.bare[name] = array
        return self.found

    def _visit(self, node: linen.Module, method: str) -> None:
        """Record ``node`` if it is a layer; of other modules, inner calls record the layers."""
        try:
            if isinstance(node, _REPARAMETRIZED):
                raise NotLinear(
                    "computes another kernel from the one that it holds; "
                    "fold it into the layer first"
                )
            told = next((told for kind, told in self.own.items() if isinstance(node, kind)), None)
            known = next((kind for kind in type(node).__mro__ if kind in LINEN_FORMS), None)
            if told is None and known is None:
                return
            if told is None and known is not None:
                if reasons := list(deviations(node, known)):
                    raise NotLinear("; ".join(reasons))
                if getattr(type(node), method) is not getattr(known, method, None):
                    raise NotLinear(
                        f"computes in a method of its own, {method}; give its rows in layers="
                    )
            if isinstance(told, type) and (told not in LINEN_FORMS or not isinstance(node, told)):
                raise NotLinear(
                    f"layers={{{type(node).__name__}: {told.__name__}}}: "
                    f"expected a class of Flax's that it extends"
                )
            before = self.seen.setdefault(node.path, node)
            if type(before) is not type(node) or facts_of(before) != facts_of(node):
                raise NotLinear(
                    f"another layer, {type(before).__name__}, "
                    f"has the same variables and other settings"
                )
            held = _held(node)
            if any(_is_computed(x) for x in held.values()):
                raise NotLinear(
                    "its arrays are computed from the variables (nn.map_variables); "
                    "store what it computes"
                )
            if not any(layer.path == node.path for layer in self.found.layers):
                self._note(node, told if told is not None else known, held)
        except NotLinear as error:
            self._refuse(node, str(error))

    def _note(self, node: linen.Module, told: Any, held: Mapping[str, Any]) -> None:
        """Add the layer with its stored arrays. ``told``: the known class, or a user's rows."""
        shapes = {attribute: tuple(x.shape) for attribute, x in held.items()}
        form = LINEN_FORMS[told](node, shapes) if isinstance(told, type) else own_form(told, shapes)
        stored = {
            path[-1]: path for path in self.weights if path[1:-1] == node.path and path[-1] in held
        }
        rows, variables = fitted(
            form, {attribute: self.weights[path] for attribute, path in stored.items()}
        )
        kind = next(
            (kind.__name__ for kind in type(node).__mro__ if kind in LINEN_FORMS),
            type(node).__name__,
        )
        is_attention = isinstance(node.parent, linen.MultiHeadDotProductAttention)
        layer = Layer(
            node.path,
            _name(node),
            _KINDS.get(kind, kind),
            rows=rows,
            variables=variables,
            shapes={a: shapes[a] for a in variables},
            facts=facts_of(node) | _groups(node, shapes),
            is_attention=is_attention,
        )
        self.found.layers.append(layer)
        self.claimed |= {stored[a] for a in variables}

    def _refuse(self, node: linen.Module, reason: str) -> None:
        """Record a problem once; the layer's variables then need no further problem."""
        problem = f"{'.'.join(node.path) or 'the module'}: {type(node).__name__}: {reason}"
        if problem not in self.found.problems:
            self.found.problems.append(problem)
        self.claimed |= {path for path in self.weights if path[1 : len(node.path) + 1] == node.path}


def _held(node: linen.Module) -> dict[str, Any]:
    """Return the arrays directly below a module as one call sees them.

    In a stack, these are the arrays of one layer.
    """
    return {
        name: x
        for collection, held in node.variables.items()
        if collection not in _STATE
        for name, x in held.items()
        if not isinstance(x, Mapping)
    }


def _is_computed(value: Any) -> bool:
    """Return whether a traced array is the result of an operation, not an input of the trace."""
    while hasattr(value, "batch_dim"):  # under vmap: the array that is mapped
        value = value.val
    # Other tracers, such as those of remat, were seen in the first run.
    return getattr(value, "parent", None) is not None


def _check_parents(x: Any) -> Any:
    """Raise an error, when traced, if this JAX lacks the attribute of ``_is_computed``.

    That attribute is private.
    """
    if x.parent is not None or (x + 1).parent is None:
        raise RuntimeError(
            f"JAX {jax.__version__} traces otherwise than Slipway's export of Linen modules knows"
        )
    return x


def _check_running(node: linen.BatchNorm, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise InvalidConfig for a BatchNorm that would compute statistics of the example's batch."""
    given = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
    if not (node.use_running_average if given is None else given):
        raise InvalidConfig(
            "example",
            f"{'.'.join(node.path)} computes the statistics of the batch",
            "arguments with which every BatchNorm uses its running averages, such as {'x': "
            "x, 'train': False}",
        )


def _groups(node: linen.Module, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the number of groups of a GroupNorm, which may be given by their size."""
    features = next((shape[0] for shape in shapes.values()), 0)
    if isinstance(node, linen.GroupNorm) and node.num_groups is None and node.group_size:
        return {"num_groups": features // node.group_size}
    return {}


def _name(node: linen.Module) -> Path:
    """Return the path with torch's names for the projections of an attention."""
    if isinstance(node.parent, linen.MultiHeadDotProductAttention):
        return (*node.path[:-1], ATTENTION_NAMES.get(node.path[-1], node.path[-1]))
    return node.path
