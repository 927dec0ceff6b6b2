"""MiMo 7B (Xiaomi, MiMo: unlocking the reasoning potential of language models, 2025).

A Qwen2 with a further layer that drafts tokens (multi-token prediction, mtp.py). transformers has
no class for it; the reference of that layer is vLLM.
"""

import dataclasses

from slipway.models.mtp import Mtp
from slipway.models.naming import Naming
from slipway.models.qwen2 import Qwen2Config

MTP = Mtp(
    naming=Naming(
        {
            "model.layers": "model.mtp_layers",
            "enorm": "token_layernorm",
            "hnorm": "hidden_layernorm",
            "eh_proj": "input_proj",
            "shared_head.norm": "final_layernorm",
        }
    ),
    is_numbered_apart=True,
    has_head=False,
    embeds_first=False,
    reads_normed=False,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiMoConfig(Qwen2Config):
    """Fields of a MiMo."""

    num_nextn_predict_layers: int = 0
    # The values of a Qwen2, which its config.json states.
    attention_bias: bool = True

    @property
    def unused_tensors(self) -> tuple[str, ...]:
        """Glob patterns of tensors that a checkpoint may hold and the model does not use."""
        return ("model.mtp_layers.*",)
