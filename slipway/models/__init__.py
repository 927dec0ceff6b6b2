"""Registry of architectures: their configuration class and declaration, by name.

Not here: layers (nn/), files (checkpoint/).

Names are those in ``architectures`` of config.json.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from slipway.errors import UnsupportedModel
from slipway.models import (
    bailing_moe,
    deepseek,
    glm4_moe,
    gpt_oss,
    llama,
    mimo,
    minimax_m2,
    mixtral,
    olmoe,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from slipway.models.config import DenseConfig
from slipway.models.decoder import CausalLM
from slipway.models.mtp import Mtp, MtpModel
from slipway.models.naming import Naming


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Registry entry: the class that parses config.json, and the function that declares a layer.

    ``naming``: the HF names of the tensors that are not those of Llama. ``mtp``: the form of the
    prediction layers that its checkpoints may hold.
    """

    config_class: type[DenseConfig]
    declare_layer: Callable[[Any, int], Any]
    naming: Naming = Naming()
    mtp: Mtp | None = None

    def declare(self, raw_config: Mapping[str, Any]) -> CausalLM:
        """Declare the model of a config.json.

        Raises UnsupportedModel for a value that is not implemented.
        """
        config = self.config_class.read(raw_config)
        return self.naming.apply(CausalLM.declare(config, self.declare_layer))


BAILING = Architecture(bailing_moe.BailingMoeConfig, bailing_moe.declare_layer, bailing_moe.NAMING)

ARCHITECTURES = {
    "BailingMoEForCausalLM": BAILING,
    "BailingMoeForCausalLM": BAILING,
    "BailingMoeV2ForCausalLM": Architecture(
        bailing_moe.BailingMoeV2Config,
        bailing_moe.declare_layer,
        bailing_moe.NAMING,
        mtp=bailing_moe.MTP,
    ),
    "DeepseekV2ForCausalLM": Architecture(deepseek.DeepseekV2Config, deepseek.declare_layer),
    "DeepseekV3ForCausalLM": Architecture(
        deepseek.DeepseekV3Config, deepseek.declare_layer, mtp=Mtp()
    ),
    "Glm4MoeForCausalLM": Architecture(glm4_moe.Glm4MoeConfig, glm4_moe.declare_layer, mtp=Mtp()),
    "GptOssForCausalLM": Architecture(gpt_oss.GptOssConfig, gpt_oss.declare_layer, gpt_oss.NAMING),
    "LlamaForCausalLM": Architecture(llama.LlamaConfig, llama.declare_layer),
    "MiMoForCausalLM": Architecture(mimo.MiMoConfig, qwen2.declare_layer, mtp=mimo.MTP),
    "MiniMaxM2ForCausalLM": Architecture(
        minimax_m2.MiniMaxM2Config, minimax_m2.declare_layer, minimax_m2.NAMING
    ),
    "MixtralForCausalLM": Architecture(
        mixtral.MixtralConfig, mixtral.declare_layer, mixtral.NAMING
    ),
    "OlmoeForCausalLM": Architecture(olmoe.OlmoeConfig, olmoe.declare_layer),
    "QWenLMHeadModel": Architecture(qwen.QwenConfig, qwen.declare_layer, qwen.NAMING),
    "Qwen2ForCausalLM": Architecture(qwen2.Qwen2Config, qwen2.declare_layer),
    "Qwen2MoeForCausalLM": Architecture(
        qwen2_moe.Qwen2MoeConfig, qwen2_moe.declare_layer, qwen2_moe.NAMING
    ),
    "Qwen3ForCausalLM": Architecture(qwen3.Qwen3Config, qwen3.declare_layer, mtp=qwen3.MTP),
    "Qwen3MoeForCausalLM": Architecture(qwen3_moe.Qwen3MoeConfig, qwen3_moe.declare_layer),
}


def declare(raw_config: Mapping[str, Any]) -> CausalLM:
    """Declare the model of a config.json; its ``config`` is the typed configuration.

    Raises UnsupportedModel for an unknown architecture and for a value that is not implemented.
    """
    return _entry(raw_config).declare(raw_config)


def declare_mtp(raw_config: Mapping[str, Any]) -> MtpModel:
    """Declare the prediction layer that drafts tokens for the model of a config.json.

    Raises UnsupportedModel as ``declare`` does, and if the model has no such layer.
    """
    entry = _entry(raw_config)
    if entry.mtp is None:
        having = [name for name, each in ARCHITECTURES.items() if each.mtp is not None]
        name = raw_config["architectures"][0]
        raise UnsupportedModel("config.json: architectures", name, " | ".join(having))
    config: Any = entry.config_class.read(raw_config)
    if not config.num_nextn_predict_layers:
        raise UnsupportedModel("config.json: num_nextn_predict_layers", 0, "at least 1")
    return entry.mtp.declare(config, entry.declare_layer)


def _entry(raw_config: Mapping[str, Any]) -> Architecture:
    names = raw_config.get("architectures") or [None]
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModel("config.json: architectures", names[0], " | ".join(ARCHITECTURES))
    return ARCHITECTURES[names[0]]
