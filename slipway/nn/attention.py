"""Grouped-query attention layer (Ainslie et al., GQA, 2023): projections, norms of heads, rotation.

Not here: attention over cached keys and values (ops/kv_cache.py), the angles of rotation (rope.py).
"""

from typing import Any, Literal, Self

from slipway import ops, tree
from slipway.nn.linear import Linear, together
from slipway.nn.norm import JointNorm, RMSNorm
from slipway.tree import Param, Tensor, module, static


@module
class Attention:
    """Attention layer; ``q_norm`` and ``k_norm`` normalize each head, or all together, or are None.

    ``cache_spec``: the cache of one such layer. ``ropes``: indices of the angles of queries and of
    keys in ``StepInput.angles``.
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | JointNorm | None
    k_norm: RMSNorm | JointNorm | None
    sinks: Tensor | None
    cache_spec: ops.CacheSpec = static()
    ropes: tuple[int, int] = static(default=(0, 0))

    @classmethod
    def declare(
        cls,
        config: Any,
        window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: Literal["", "head", "all heads"] = "",
        ropes: tuple[int, int] = (0, 0),
        sinks: bool = False,
    ) -> Self:
        """Declare a layer; ``hidden_size`` and number and size of heads are those of ``config``.

        ``window``: the number of positions that a token sees, itself included; None: all.
        ``ropes``: indices in ``config.ropes``. ``sinks``: each head has a score without a value.
        """
        head_dim = config.head_dim
        sizes = {
            "embed": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": head_dim,
        }
        kv = Linear.declare("(kv_heads head_dim)", "embed", sizes, bias=qkv_bias)
        norms: tuple[Any, Any] = None, None
        if qk_norm == "head":
            norms = (RMSNorm.declare("head_dim", head_dim, config.rms_norm_eps),) * 2
        elif qk_norm == "all heads":
            norms = (
                JointNorm.declare("(heads head_dim)", sizes, config.rms_norm_eps),
                JointNorm.declare("(kv_heads head_dim)", sizes, config.rms_norm_eps),
            )
        return cls(
            q_proj=Linear.declare("(heads head_dim)", "embed", sizes, bias=qkv_bias),
            k_proj=kv,
            v_proj=kv,
            o_proj=Linear.declare("embed", "(heads head_dim)", sizes, bias=out_bias),
            q_norm=norms[0],
            k_norm=norms[1],
            sinks=Param("heads", sizes) if sinks else None,
            ropes=ropes,
            cache_spec=ops.CacheSpec(
                1, num_kv_heads=config.num_key_value_heads, head_dim=head_dim, window=window
            ),
        )

    def __call__(self, x_TD, kv: ops.KVCache, layer, step: ops.StepInput):
        """Attend: [T, embed] -> ([T, embed], kv); ``layer``: the layer's index in the cache."""
        spec = self.cache_spec
        q_TO, k_TO, v_TO = together((self.q_proj, self.k_proj, self.v_proj), x_TD, step)

        def heads(y_TO):
            return y_TO.reshape(x_TD.shape[0], -1, spec.head_dim)

        def rotated(y_TO, norm: RMSNorm | JointNorm | None, angles):
            weight, eps = (norm.weight, norm.eps) if isinstance(norm, RMSNorm) else (None, 0.0)
            y_TO = norm(y_TO, step) if isinstance(norm, JointNorm) else y_TO
            return ops.rotate(heads(y_TO), weight, angles, num_tokens=step.num_tokens, eps=eps)

        of_queries, of_keys = (step.angles[index] for index in self.ropes)
        q_TNH, k_TKH = rotated(q_TO, self.q_norm, of_queries), rotated(k_TO, self.k_norm, of_keys)
        v_TKH = heads(v_TO)
        sinks_N = None if self.sinks is None else tree.value(self.sinks)
        options = {"scale": spec.head_dim**-0.5, "window": spec.window, "sinks_N": sinks_N}
        o_TNH, kv = kv.attend(q_TNH, k_TKH, v_TKH, layer=layer, step=step, **options)
        return self.o_proj(o_TNH.reshape(x_TD.shape[0], -1), step), kv
