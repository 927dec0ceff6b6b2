"""Grouped-query attention layer (Ainslie et al., GQA, 2023): projections, norms of heads, rotation.

Not here: attention over cached keys and values (ops/kv_cache.py), the angles of rotation (rope.py).
"""

from typing import Any

from slipway import ops
from slipway.nn.linear import Linear, together
from slipway.nn.norm import RMSNorm
from slipway.tree import module, static


@module
class Attention:
    """Attention layer; ``q_norm`` and ``k_norm`` normalize each head, or are None.

    ``window``: the number of positions that a token sees, itself included; None: all. ``rope``:
    index of the layer's angles in ``StepInput.angles``.
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    head_dim: int = static()
    window: int | None = static()
    rope: int = static(default=0)

    @staticmethod
    def declare(
        config: Any,
        window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
    ) -> "Attention":
        """Declare a layer; ``hidden_size`` and number and size of heads are those of ``config``."""
        head_dim = config.head_dim
        sizes = {
            "embed": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": head_dim,
        }
        kv = Linear.declare("(kv_heads head_dim)", "embed", sizes, bias=qkv_bias)
        norm = RMSNorm.declare("head_dim", head_dim, config.rms_norm_eps) if qk_norm else None
        return Attention(
            q_proj=Linear.declare("(heads head_dim)", "embed", sizes, bias=qkv_bias),
            k_proj=kv,
            v_proj=kv,
            o_proj=Linear.declare("embed", "(heads head_dim)", sizes, bias=out_bias),
            q_norm=norm,
            k_norm=norm,
            head_dim=head_dim,
            window=window,
        )

    def __call__(self, x_TD, kv: ops.KVCache, layer, step: ops.StepInput):
        """Attend: [T, embed] -> ([T, embed], kv); ``layer``: the layer's index in the cache."""
        flat = together((self.q_proj, self.k_proj, self.v_proj), x_TD, step)
        q_TNH, k_TKH, v_TKH = (y_TO.reshape(x_TD.shape[0], -1, self.head_dim) for y_TO in flat)

        def rotated(x_TNH, norm: RMSNorm | None):
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            angles = step.angles[self.rope]
            return ops.rotate(x_TNH, weight, angles, num_tokens=step.num_tokens, eps=eps)

        q_TNH, k_TKH = rotated(q_TNH, self.q_norm), rotated(k_TKH, self.k_norm)
        options = {"scale": self.head_dim**-0.5, "window": self.window}
        o_TNH, kv = kv.attend(q_TNH, k_TKH, v_TKH, layer=layer, step=step, **options)
        return self.o_proj(o_TNH.reshape(x_TD.shape[0], -1), step), kv
