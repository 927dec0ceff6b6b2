"""Layers of a Flax NNX module, found by walking its attributes.

Not here: the torch form of a layer's arrays (layers.py), the layers of Linen modules
(linen_walk.py).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from slipway.convert.layers import (
    ATTENTION_NAMES,
    NNX_FORMS,
    REPARAMETRIZED,
    STATE,
    Form,
    Layer,
    NotLinear,
    Row,
    deviations,
    facts_of,
    fitted,
    own_form,
)

Own = Mapping[type, Sequence[Row] | type]
_KNOWN = (*NNX_FORMS, nnx.LoRALinear)


@dataclasses.dataclass
class Found:
    """Contents of a module: layers, other variables, LoRA matrices, problems.

    LoRA matrices are by layer name. Variables are NNX variables or arrays; ``bare`` and the layers'
    variables are by attribute path.
    """

    layers: list[Layer] = dataclasses.field(default_factory=list)
    bare: dict[str, Any] = dataclasses.field(default_factory=dict)
    lora: list[tuple[tuple[str, ...], Any, Any]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def walk(module: nnx.Module, own: Own) -> Found:
    """Return the layers of ``module``.

    ``own``: for user-defined classes, rows, or the class with the same rows.
    """
    walker = _Walker(own)
    walker.visit(module, (), (), is_attention=False)
    return walker.found


class _Walker:
    """One walk through a module."""

    def __init__(self, own: Own):
        self.own = own
        self.found = Found()

    def visit(
        self, node: Any, path: tuple[str, ...], name: tuple[str, ...], is_attention: bool
    ) -> None:
        """Record the layers at and below ``node``; ``name`` is torch's name of ``path``."""
        if isinstance(node, nnx.LoRA):
            self._visit_lora(node, path, name)
            return
        try:
            form = self._form(node)
            if form is not None:
                self._note(node, path, name, form=form, is_attention=is_attention)
        except NotLinear as error:
            self._refuse(path, node, str(error))
            return
        if form is not None:
            return
        if isinstance(node, REPARAMETRIZED):
            self._refuse(
                path,
                node,
                "computes another kernel from the one that it holds; fold it into the layer first",
            )
            return
        names = _torch_names(node)
        for key, child in _children(node):
            if not isinstance(child, nnx.Variable):
                inside = isinstance(node, nnx.MultiHeadAttention)
                self.visit(child, (*path, key), (*name, names.get(key, key)), is_attention=inside)
            elif not isinstance(child, STATE):
                self.found.bare[".".join((*path, key))] = child

    def _form(self, node: Any) -> Form | None:
        """Return the layer's form; None for an unknown class. Raises NotLinear."""
        told = next((told for kind, told in self.own.items() if isinstance(node, kind)), None)
        if told is None:
            known = next((kind for kind in type(node).__mro__ if kind in _KNOWN), None)
            if known is None:
                return None
            if reasons := list(deviations(node, known)):
                raise NotLinear("; ".join(reasons))
            return NNX_FORMS[nnx.Linear if known is nnx.LoRALinear else known](node)
        if isinstance(told, type):
            if told not in NNX_FORMS or not isinstance(node, told):
                raise NotLinear(
                    f"layers={{{type(node).__name__}: {told.__name__}}}: "
                    f"expected a class of Flax's that it extends"
                )
            return NNX_FORMS[told](node)
        return own_form(told, {})

    def _note(
        self,
        node: Any,
        path: tuple[str, ...],
        name: tuple[str, ...],
        form: Form,
        is_attention: bool,
    ) -> None:
        kind = next(
            (kind.__name__ for kind in type(node).__mro__ if kind in NNX_FORMS), type(node).__name__
        )
        attributes = [row[0].removesuffix("?") for row in form.rows]
        held = {name: x for name in attributes if (x := getattr(node, name, None)) is not None}
        rows, variables = fitted(form, held)
        layer = Layer(
            path,
            name,
            kind,
            rows=rows,
            variables=variables,
            shapes=form.shapes,
            facts=facts_of(node),
            is_attention=is_attention,
        )
        self.found.layers.append(layer)
        for key, child in _children(node):
            if isinstance(child, nnx.LoRA) and isinstance(node, nnx.LoRALinear):
                self._visit_lora(child, (*path, key), name)
            elif not isinstance(child, nnx.Variable):
                self.visit(child, (*path, key), (*name, key), is_attention=False)
            elif key not in variables and not isinstance(child, STATE):
                self.found.bare[".".join((*path, key))] = child

    def _visit_lora(self, node: nnx.LoRA, path: tuple[str, ...], name: tuple[str, ...]) -> None:
        if type(node).__call__ is not nnx.LoRA.__call__:
            self._refuse(
                path, node, "computes in a __call__ of its own; merge it into its layer first"
            )
            return
        self.found.lora.append((name, node.lora_a, node.lora_b))
        if node.base_module is not None:
            self.visit(node.base_module, (*path, "base_module"), (*name, ""), is_attention=False)
        elif not any(
            tuple(filter(None, layer.name)) == tuple(filter(None, name))
            for layer in self.found.layers
        ):
            self.found.problems.append(f"{'.'.join(path)}: LoRA without a layer that it adapts")

    def _refuse(self, path: tuple[str, ...], node: Any, reason: str) -> None:
        self.found.problems.append(
            f"{'.'.join(path) or 'the module'}: {type(node).__name__}: {reason}"
        )


def _torch_names(node: Any) -> Mapping[str, str]:
    """Return torch's names of the attributes of a module, if it has a counterpart there.

    The name is "" for a level that torch lacks.
    """
    if isinstance(node, nnx.MultiHeadAttention):
        return ATTENTION_NAMES
    return {"layers": ""} if isinstance(node, nnx.Sequential) else {}


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the modules, containers and variables directly below ``node``, with their keys."""
    if isinstance(node, Mapping):
        items = [(str(key), child) for key, child in node.items()]
    elif isinstance(node, list | tuple | nnx.List):
        items = [(str(i), child) for i, child in enumerate(node)]
    elif isinstance(node, nnx.Module):
        items = [(key, child) for key, child in vars(node).items() if not key.startswith("_")]
    else:
        items = []
    for key, child in items:
        if isinstance(child, nnx.Module | nnx.Variable | Mapping | list | tuple):
            yield key, child
