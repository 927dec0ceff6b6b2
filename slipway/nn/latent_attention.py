"""Multi-head latent attention: keys and values of all heads from one cached vector per token.

Not here: attention over the cache (ops/kv_cache.py), grouped-query attention (attention.py).

DeepSeek-AI, DeepSeek-V2, 2024. The cache holds the latent vector and the rotated part of the key
only. Queries are brought into the space of the latents ("absorbed" form), so a token reads its
context once for all heads.
"""

from typing import Any

import jax.numpy as jnp

from slipway import ops, tree
from slipway.nn.linear import Linear
from slipway.nn.norm import RMSNorm
from slipway.ops.quantized import Quantized, dequantized
from slipway.tree import module, static

# The norms of latents have this epsilon, whatever ``rms_norm_eps`` of the model is.
LATENT_EPS = 1e-6


@module
class LatentAttention:
    """Latent attention layer; queries come from ``q_proj``, or from a latent of their own.

    ``kv_b_proj`` makes the unrotated keys and the values of each head from a latent.
    ``interleaved``: dimensions 2 i and 2 i + 1 of the rotated part are a pair, not i and i + half.
    ``nope_dim``: the unrotated dimensions of a head. ``scale``: factor of the scores.
    """

    q_proj: Linear | None
    q_a_proj: Linear | None
    q_a_layernorm: RMSNorm | None
    q_b_proj: Linear | None
    kv_a_proj_with_mqa: Linear
    kv_a_layernorm: RMSNorm
    kv_b_proj: Linear
    o_proj: Linear
    cache_spec: ops.CacheSpec = static()
    nope_dim: int = static()
    interleaved: bool = static()
    scale: float = static()

    @staticmethod
    def declare(config: Any, interleaved: bool, scale: float) -> "LatentAttention":
        """Declare a layer; all sizes are those of ``config``, under the names of DeepSeek."""
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        latent, bias, rank = config.kv_lora_rank, config.attention_bias, config.q_lora_rank
        sizes = {
            "embed": config.hidden_size,
            "heads": config.num_attention_heads,
            "qk_dim": nope + rope,
            "kv_dim": nope + config.v_head_dim,
            "v_dim": config.v_head_dim,
            "latent": latent,
            "latent_and_rope": latent + rope,
            "q_latent": rank or 0,
        }
        queries = "(heads qk_dim)"
        return LatentAttention(
            q_proj=None if rank else Linear.declare(queries, "embed", sizes),
            q_a_proj=Linear.declare("q_latent", "embed", sizes, bias=bias) if rank else None,
            q_a_layernorm=RMSNorm.declare("q_latent", rank, LATENT_EPS) if rank else None,
            q_b_proj=Linear.declare(queries, "q_latent", sizes) if rank else None,
            kv_a_proj_with_mqa=Linear.declare("latent_and_rope", "embed", sizes, bias=bias),
            kv_a_layernorm=RMSNorm.declare("latent", latent, LATENT_EPS),
            kv_b_proj=Linear.declare("(heads kv_dim)", "latent", sizes),
            o_proj=Linear.declare("embed", "(heads v_dim)", sizes, bias=bias),
            cache_spec=ops.CacheSpec(1, num_kv_heads=1, head_dim=latent + rope, latent_dim=latent),
            nope_dim=nope,
            interleaved=interleaved,
            scale=scale,
        )

    def __call__(self, x_TD, kv: ops.KVCache, layer, step: ops.StepInput):
        """Attend: [T, embed] -> ([T, embed], kv); ``layer``: the layer's index in the cache."""
        tokens, latent = x_TD.shape[0], self.cache_spec.latent_dim
        q_TO = self._queries(x_TD, step)
        both_TO = self.kv_a_proj_with_mqa(x_TD, step)
        latent_TL = self.kv_a_layernorm(both_TO[:, :latent], step)
        q_TNQ = q_TO.reshape(tokens, -1, self.nope_dim + both_TO.shape[1] - latent)
        q_rope_TNR = self._rotated(q_TNQ[..., self.nope_dim :], step)
        k_rope_T1R = self._rotated(both_TO[:, None, latent:], step)
        heads = q_TNQ.shape[1]
        q_TNL = self._per_head("tnd,ndl->tnl", q_TNQ[..., : self.nope_dim], heads, keys=True)
        o_TNL, kv = kv.attend(
            jnp.concatenate([q_TNL, q_rope_TNR], axis=-1),
            jnp.concatenate([latent_TL[:, None], k_rope_T1R], axis=-1),
            None,
            layer=layer,
            step=step,
            scale=self.scale,
        )
        o_TNV = self._per_head("tnl,nvl->tnv", o_TNL, heads, keys=False)
        return self.o_proj(o_TNV.reshape(tokens, -1), step), kv

    def _queries(self, x_TD, step):
        if self.q_a_proj is None or self.q_a_layernorm is None:
            of_queries, source_TD = self.q_proj, x_TD
        else:
            of_queries = self.q_b_proj
            source_TD = self.q_a_layernorm(self.q_a_proj(x_TD, step), step)
        assert of_queries is not None, "declared with one of the two forms"
        return of_queries(source_TD, step)

    def _rotated(self, x_TNR, step):
        if self.interleaved:  # the same permutation of queries and keys keeps their products
            pairs = x_TNR.reshape(*x_TNR.shape[:2], -1, 2)
            x_TNR = jnp.concatenate([pairs[..., 0], pairs[..., 1]], axis=-1)
        return ops.rotate(x_TNR, None, step.angles[0], num_tokens=step.num_tokens)

    def _per_head(self, product: str, x_TNI, heads: int, keys: bool):
        """Multiply each head by its rows of ``kv_b_proj``: those of keys, or those of values."""

        def multiply(matrix):
            rows = dequantized(matrix) if isinstance(matrix, Quantized) else matrix
            rows_NXL = rows.reshape(heads, -1, rows.shape[-1])
            rows_NXL = rows_NXL[:, : self.nope_dim] if keys else rows_NXL[:, self.nope_dim :]
            return jnp.einsum(
                product, x_TNI, rows_NXL.astype(x_TNI.dtype), preferred_element_type=jnp.float32
            )

        return tree.call(multiply, self.kv_b_proj.matrix).astype(x_TNI.dtype)
