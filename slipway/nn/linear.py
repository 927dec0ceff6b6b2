"""Linear layers, token embedding and output head: their declaration, packed weights, sums over devices."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slipway import layout, mesh, ops, tree
from slipway.errors import InvalidConfig
from slipway.ops.quantized import Quantized
from slipway.tree import Param, Tensor, module, static

TABLE_BITS = 8  # of embeddings and heads, one scale a row: 4 bits cost more there than they save


@module
class Linear:
    """``x @ weight.T + bias``, the weight (out, in) as checkpoints hold it, or packed."""

    weight: Tensor | None
    bias: Tensor | None
    weight_packed: Tensor | None = None  # where weight is None, as ops.quantized says
    weight_scale: Tensor | None = None
    sums_over: str = static(default="")  # the input axis: where a mesh splits it, partial sums are added
    bits: int = static(default=0)
    group: int = static(default=0)

    @staticmethod
    def declare(out: str, into: str, sizes: dict[str, int], bias: bool = False) -> "Linear":
        """A projection from the axes ``into`` to the axes ``out``, each ``"embed"`` or ``"(heads head_dim)"``."""
        bias_param = Param(out, sizes, init="zeros") if bias else None
        return Linear(Param(f"{out} {into}", sizes), bias_param, sums_over=into.strip("()").split()[0])

    @property
    def matrix(self) -> Any:
        """The weight as the ops take it."""
        packed = self.weight_packed, self.weight_scale
        return Quantized(*packed, self.bits, self.group) if self.weight is None else self.weight

    def __call__(self, x_TD, step):
        """[T, in] -> [T, out] in x's dtype; sums in f32, over devices too."""
        if not mesh.splits(self.sums_over):
            return ops.linear(x_TD, self.matrix, step.num_tokens, bias=self.bias, dtype=x_TD.dtype)
        y_TO = mesh.psum(ops.linear(x_TD, self.matrix, step.num_tokens), self.sums_over)
        if self.bias is not None:
            y_TO = y_TO + tree.value(self.bias).astype(jnp.float32)[None]
        return y_TO.astype(x_TD.dtype)


def together(projections: Sequence[Linear], x_TD, step):
    """Apply several projections to the same tokens in one op: [T, in] -> [T, out] each, in x's dtype."""
    assert not any(mesh.splits(projection.sums_over) for projection in projections), "no partial sums"
    matrices, biases = ([getattr(p, name) for p in projections] for name in ("matrix", "bias"))
    return ops.linears(x_TD, matrices, step.num_tokens, biases=biases, dtype=x_TD.dtype)


@module
class Embedding:
    """A table of rows, split by rows over the mesh, or packed; tied, it is the output head too."""

    weight: Tensor | None
    weight_packed: Tensor | None = None
    weight_scale: Tensor | None = None

    @staticmethod
    def declare(vocab: int, embed: int, alias: str = "") -> "Embedding":
        """A table of ``vocab`` rows; ``alias`` names the head's key where the two are tied."""
        return Embedding(Param("vocab embed", {"vocab": vocab, "embed": embed}, alias=alias))

    @property
    def matrix(self) -> Any:
        """The weight as the ops take it."""
        packed = self.weight_packed, self.weight_scale
        return Quantized(*packed, TABLE_BITS, 0) if self.weight is None else self.weight

    def __call__(self, ids_T, step):
        """[T] token ids -> [T, embed]."""
        held = self.weight_packed if self.weight is None else self.weight
        first = mesh.local_offset("vocab", held.shape[0])
        return mesh.psum(ops.embed(ids_T - first, self.matrix, step.num_tokens), "vocab")

    def logits(self, x_BD, num_rows, vocab_size: int):
        """[B, embed] -> f32 [B, vocab_size], whole on every device, the mesh's padding cut off."""
        logits_BV = ops.linear(x_BD, self.matrix, num_rows)
        return mesh.all_gather(logits_BV, "vocab")[:, :vocab_size]


def quantize(declaration: Any, bits: int, group: int, tables: bool = True) -> Any:
    """The declaration with packed weights: projections of ``bits`` with a scale for each ``group``, ``tables`` of 8.

    Raises InvalidConfig where a row's innermost axis holds no whole words or groups.
    """

    def packed(node: Any) -> Any:
        if isinstance(node, Linear):
            words, scales = _packed(node.weight, bits, group)
            return Linear(None, node.bias, words, scales, node.sums_over, bits, group)
        return Embedding(None, *_packed(node.weight, TABLE_BITS, 0)) if isinstance(node, Embedding) and tables else node

    matrices = (Linear, Embedding)
    return jax.tree.map(packed, declaration, is_leaf=lambda node: isinstance(node, matrices) or tree.is_param(node))


def _packed(weight: Any, bits: int, group: int) -> tuple[Param, Param]:
    """Words and scales of a declared weight."""
    *outer, last = layout.parse(weight.axes).groups
    axis, size = last[-1], weight.sizes[last[-1]]
    for name, unit in (("bits", 32 // bits), ("group", group)):
        if unit and size % unit:
            got = {"bits": bits, "group": group}[name]
            raise InvalidConfig(f"quantization: {name}", got, f"rows of {axis} ({size}) in whole multiples of {unit}")
    words = weight.sizes | {axis: size * bits // 32}
    scales = weight.sizes | {axis: size // group} if group else weight.sizes | {"one": 1}
    scale_axes = weight.axes if group else layout.Layout((*outer, ("one",))).text
    alias = weight.alias
    return (
        dataclasses.replace(weight, sizes=words, init="bits", dtype="int32", alias=alias and f"{alias}_packed"),
        dataclasses.replace(weight, sizes=scales, init="scale", axes=scale_axes, alias=alias and f"{alias}_scale"),
    )
