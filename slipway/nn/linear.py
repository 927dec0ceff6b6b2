"""Linear layers, token embedding and output head, with plain or packed weights.

Not here: the multiplications (ops/), the packing of numbers (checkpoint/quantize.py).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slipway import layout, mesh, ops, tree
from slipway.errors import InvalidConfig
from slipway.ops.quantized import Quantized
from slipway.tree import Param, Tensor, module, static

# Bits of packed embeddings and heads, with one scale for each row: 4 bits cost more there than they
# save.
TABLE_BITS = 8


@module
class Linear:
    """Linear layer ``x @ weight.T + bias``; the weight is (out, in), as in checkpoints, or packed.

    A packed layer has ``weight_packed`` and ``weight_scale`` (ops/quantized.py) instead of
    ``weight``. ``sums_over``: the input axis; where a mesh splits it, devices add partial sums.
    """

    weight: Tensor | None
    bias: Tensor | None
    weight_packed: Tensor | None = None
    weight_scale: Tensor | None = None
    sums_over: str = static(default="")
    bits: int = static(default=0)
    group: int = static(default=0)

    @staticmethod
    def declare(out: str, into: str, sizes: dict[str, int], bias: bool = False) -> "Linear":
        """Declare a projection from the axes ``into`` to the axes ``out``.

        Each is one axis or a group, such as ``"embed"`` or ``"(heads head_dim)"``.
        """
        weight = Param(f"{out} {into}", sizes)
        bias_param = Param(out, sizes, init="zeros") if bias else None
        return Linear(weight, bias_param, sums_over=into.strip("()").split()[0])

    @property
    def matrix(self) -> Any:
        """The weight as the ops take it."""
        packed = self.weight_packed, self.weight_scale
        return Quantized(*packed, self.bits, self.group) if self.weight is None else self.weight

    def __call__(self, x_TD, step):
        """Multiply: [T, in] -> [T, out] in the dtype of x, with sums in f32, over devices too."""
        if not mesh.splits(self.sums_over):
            return ops.linear(x_TD, self.matrix, step.num_tokens, bias=self.bias, dtype=x_TD.dtype)
        y_TO = mesh.psum(ops.linear(x_TD, self.matrix, step.num_tokens), self.sums_over)
        if self.bias is not None:
            y_TO = y_TO + tree.value(self.bias).astype(jnp.float32)[None]
        return y_TO.astype(x_TD.dtype)


def together(projections: Sequence[Linear], x_TD, step):
    """Apply several projections to the same tokens in one op: [T, in] -> [T, out] of each.

    The results are in the dtype of x. The mesh must not split the input axis.
    """
    assert not any(mesh.splits(p.sums_over) for p in projections), "partial sums are not added"
    matrices, biases = ([getattr(p, name) for p in projections] for name in ("matrix", "bias"))
    return ops.linears(x_TD, matrices, step.num_tokens, biases=biases, dtype=x_TD.dtype)


@module
class Embedding:
    """Table of rows, plain or packed, split by rows over the mesh; a tied one is the head too."""

    weight: Tensor | None
    weight_packed: Tensor | None = None
    weight_scale: Tensor | None = None

    @staticmethod
    def declare(vocab: int, embed: int, alias: str = "") -> "Embedding":
        """Declare a table of ``vocab`` rows; ``alias``: the head's key, if the two are tied."""
        return Embedding(Param("vocab embed", {"vocab": vocab, "embed": embed}, alias=alias))

    @property
    def matrix(self) -> Any:
        """The weight as the ops take it."""
        packed = self.weight_packed, self.weight_scale
        return Quantized(*packed, TABLE_BITS, 0) if self.weight is None else self.weight

    def __call__(self, ids_T, step):
        """Look up rows: [T] token ids -> [T, embed]."""
        held = self.weight_packed if self.weight is None else self.weight
        first = mesh.local_offset("vocab", held.shape[0])
        return mesh.psum(ops.embed(ids_T - first, self.matrix, step.num_tokens), "vocab")

    def divided_by_norms(self, x_BD):
        """Divide each column of x by the norm of that column of the table: [B, embed].

        With ``logits`` this is the normalized head of Bailing: its code divides the weight instead.
        """
        matrix = self.matrix
        rows_VD = ops.dequantized(matrix) if self.weight is None else matrix.astype(jnp.float32)
        squares_D = mesh.psum(jnp.sum(rows_VD * rows_VD, axis=0), "vocab")
        norms_D = jnp.maximum(jnp.sqrt(squares_D), 1e-7)
        return (x_BD.astype(jnp.float32) / norms_D[None]).astype(x_BD.dtype)

    def logits(self, x_BD, num_rows, vocab_size: int):
        """Multiply by the rows: [B, embed] -> f32 [B, vocab_size], whole on every device.

        Rows with which a mesh pads the vocabulary are cut off.
        """
        logits_BV = ops.linear(x_BD, self.matrix, num_rows)
        return mesh.all_gather(logits_BV, "vocab")[:, :vocab_size]


def quantize(declaration: Any, bits: int, group: int, tables: bool = True) -> Any:
    """Return the declaration with packed weights.

    Projections get ``bits`` and a scale for each ``group``; with ``tables``, embeddings and heads
    get TABLE_BITS. Raises InvalidConfig if the innermost axis of a row is no multiple of a word or
    a group, and for a matrix with rows that run along the outputs.
    """

    def packed(node: Any) -> Any:
        if isinstance(node, Linear):
            assert node.weight is not None, "a declaration of packed weights"
            if layout.parse(node.weight.axes).groups[-1][0] != node.sums_over:
                expected = "no packing: matrices of this model lie transposed"
                raise InvalidConfig("quantization", f"{bits} bits", expected)
            words, scales = _packed(node.weight, bits, group)
            return dataclasses.replace(
                node,
                weight=None,
                weight_packed=words,
                weight_scale=scales,
                bits=bits,
                group=group,
            )
        if isinstance(node, Embedding) and tables:
            return Embedding(None, *_packed(node.weight, TABLE_BITS, 0))
        return node

    def is_leaf(node: Any) -> bool:
        return isinstance(node, Linear | Embedding) or tree.is_param(node)

    return jax.tree.map(packed, declaration, is_leaf=is_leaf)


def _packed(weight: Any, bits: int, group: int) -> tuple[Param, Param]:
    """Declare the words and the scales of a weight."""
    *outer, last = layout.parse(weight.axes).groups
    axis, size = last[-1], weight.sizes[last[-1]]
    for name, unit in (("bits", 32 // bits), ("group", group)):
        if unit and size % unit:
            got = {"bits": bits, "group": group}[name]
            expected = f"rows of {axis} ({size}) in whole multiples of {unit}"
            raise InvalidConfig(f"quantization: {name}", got, expected)
    words = weight.sizes | {axis: size * bits // 32}
    scales = weight.sizes | {axis: size // group} if group else weight.sizes | {"one": 1}
    scale_axes = weight.axes if group else layout.Layout((*outer, ("one",))).text

    def replaced(suffix: str, **changes: Any) -> Param:
        names = {name: getattr(weight, name) for name in ("alias", "key")}
        names = {name: text and f"{text}{suffix}" for name, text in names.items()}
        return dataclasses.replace(weight, **names, **changes)

    packed = replaced("_packed", sizes=words, init="bits", dtype="int32")
    return packed, replaced("_scale", sizes=scales, init="scale", axes=scale_axes)
