"""Qwen, the first (Bai et al., Qwen technical report, 2023).

The reference is the code of the model's authors; transformers has no class for it.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from slipway.models.config import DenseConfig
from slipway.models.decoder import DecoderLayer
from slipway.models.naming import Naming
from slipway.nn.attention import Attention
from slipway.nn.mlp import MLP
from slipway.nn.rope import LongQueries, Rope, Scaling

NAMING = Naming(
    {
        "model.embed_tokens": "transformer.wte",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.w1",
        "mlp.gate_proj": "mlp.w2",
        "mlp.down_proj": "mlp.c_proj",
    },
    {"attn.c_attn": tuple(f"self_attn.{name}_proj" for name in "qkv")},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenConfig(DenseConfig):
    """Fields of a Qwen: ``intermediate_size`` is that of both halves of the MLP together.

    Beyond ``seq_length`` positions, the base of rotation grows with the prompt
    (``use_dynamic_ntk``) and queries grow with their position (``use_logn_attn``).
    """

    aliases: ClassVar[Mapping[str, str]] = {
        "kv_channels": "head_dim",
        "layer_norm_epsilon": "rms_norm_eps",
        "rotary_emb_base": "rope_theta",
    }
    without_effect = (
        "attn_dropout_prob", "bf16", "emb_dropout_prob", "fp16", "fp32", "onnx_safe",
        "padded_vocab_size", "softmax_in_fp32", "use_cache_kernel", "use_cache_quantization",
        "use_flash_attn",
    )  # fmt: skip

    seq_length: int = 8192
    rotary_pct: float = 1.0
    no_bias: bool = True
    scale_attn_weights: bool = True
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True

    @property
    def ropes(self) -> tuple[Rope | LongQueries, ...]:
        """Rotary embedding of keys, and that of queries."""
        scaling = Scaling()
        if self.use_dynamic_ntk:
            scaling = Scaling("dynamic_of_prompt", original_max_position_embeddings=self.seq_length)
        rope = Rope(self.head_dim, self.rope_theta, scaling)
        return rope, LongQueries(rope, self.seq_length) if self.use_logn_attn else rope

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of a decoder, and of values that the family's code does not have."""
        yield from super().checks()
        yield "rotary_pct", self.rotary_pct, self.rotary_pct == 1.0, "1.0"
        yield "no_bias", self.no_bias, self.no_bias, "true"
        yield "scale_attn_weights", self.scale_attn_weights, self.scale_attn_weights, "true"
        size, is_even = self.intermediate_size, self.intermediate_size % 2 == 0
        yield "intermediate_size", size, is_even, "an even number: that of both halves"


def declare_layer(config: QwenConfig, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    attention = Attention.declare(config, config.windows[index], qkv_bias=True, ropes=(1, 0))
    mlp = MLP.declare(config.hidden_size, config.intermediate_size // 2)
    return DecoderLayer.declare(config, attention, mlp)
