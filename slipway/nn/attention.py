"""Grouped-query attention over the paged cache; decides projections, norms and rotation; knows no pages.

Ainslie et al., GQA, 2023. Which tokens see which is in ``ragged``; the op reads and writes the cache.
"""

from typing import Any

from slipway import ops
from slipway.nn.linear import Linear, together
from slipway.nn.norm import RMSNorm
from slipway.tree import module, static


@module
class Attention:
    """Queries, keys and values of every token, and their mix. ``q_norm`` and ``k_norm``: per head, or None."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    head_dim: int = static()
    window: int | None = static()  # positions that a token sees, itself included; None: all

    @staticmethod
    def declare(
        config: Any, window: int | None = None, qkv_bias: bool = False, out_bias: bool = False, qk_norm: bool = False
    ) -> "Attention":
        """Sizes from ``config``'s hidden_size, num_attention_heads, num_key_value_heads and head_dim."""
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        sizes = {"embed": config.hidden_size, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        kv = Linear.declare("(kv_heads head_dim)", "embed", sizes, qkv_bias)
        norm = RMSNorm.declare("head_dim", head_dim, config.rms_norm_eps) if qk_norm else None
        return Attention(
            q_proj=Linear.declare("(heads head_dim)", "embed", sizes, qkv_bias),
            k_proj=kv,
            v_proj=kv,
            o_proj=Linear.declare("embed", "(heads head_dim)", sizes, out_bias),
            q_norm=norm,
            k_norm=norm,
            head_dim=head_dim,
            window=window,
        )

    def __call__(self, x_TD, kv, layer, ragged: ops.Ragged, angles):
        """[T, embed] -> ([T, embed], kv); ``layer`` is this layer's place in the cache, ``angles`` the rope's."""
        num_tokens = ragged.num_tokens
        flat = together((self.q_proj, self.k_proj, self.v_proj), x_TD, num_tokens)
        q_TNH, k_TKH, v_TKH = (y_TO.reshape(x_TD.shape[0], -1, self.head_dim) for y_TO in flat)

        def rotated(x_TNH, norm: RMSNorm | None):
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            return ops.rotate(x_TNH, weight, angles, num_tokens, eps)

        q_TNH, k_TKH = rotated(q_TNH, self.q_norm), rotated(k_TKH, self.k_norm)
        o_TNH, kv = ops.attend(q_TNH, k_TKH, v_TKH, kv, layer, ragged, self.head_dim**-0.5, self.window)
        return self.o_proj(o_TNH.reshape(x_TD.shape[0], -1), num_tokens), kv
