"""Matrices: decides how a projection, an embedding and an output head are declared and split; knows no attention."""

import jax.numpy as jnp

from slipway import mesh, ops, tree
from slipway.tree import Param, Tensor, module, static


@module
class Linear:
    """``x @ weight.T + bias``, the weight (out, in) as checkpoints hold it."""

    weight: Tensor
    bias: Tensor | None
    sums_over: str = static()  # the input axis: where a mesh splits it, partial sums are added

    @staticmethod
    def declare(out: str, into: str, sizes: dict[str, int], bias: bool = False) -> "Linear":
        """A projection from the axes ``into`` to the axes ``out``, each ``"embed"`` or ``"(heads head_dim)"``."""
        bias_param = Param(out, sizes, init="zeros") if bias else None
        return Linear(Param(f"{out} {into}", sizes), bias_param, into.strip("()").split()[0])

    def __call__(self, x_TD, num_tokens):
        """[T, in] -> [T, out] in x's dtype; sums in f32, over devices too."""
        if not mesh.splits(self.sums_over):
            return ops.linear(x_TD, self.weight, num_tokens, self.bias, x_TD.dtype)
        y_TO = mesh.psum(ops.linear(x_TD, self.weight, num_tokens), self.sums_over)
        if self.bias is not None:
            y_TO = y_TO + tree.value(self.bias).astype(jnp.float32)[None]
        return y_TO.astype(x_TD.dtype)


@module
class Embedding:
    """A table of rows, split by rows over the mesh; tied, it is the output head too."""

    weight: Tensor

    @staticmethod
    def declare(vocab: int, embed: int, alias: str = "") -> "Embedding":
        """A table of ``vocab`` rows; ``alias`` names the head's key where the two are tied."""
        return Embedding(Param("vocab embed", {"vocab": vocab, "embed": embed}, alias=alias))

    def __call__(self, ids_T):
        """[T] token ids -> [T, embed]."""
        first = mesh.local_offset("vocab", self.weight.shape[0])
        return mesh.psum(ops.embed(ids_T - first, self.weight), "vocab")

    def logits(self, x_BD, vocab_size: int):
        """[B, embed] -> f32 [B, vocab_size], whole on every device, the mesh's padding cut off."""
        logits_BV = ops.linear(x_BD, self.weight, jnp.int32(x_BD.shape[0]))
        return mesh.all_gather(logits_BV, "vocab")[:, :vocab_size]
