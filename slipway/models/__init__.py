"""The table of architectures: which class serves the name in config.json; knows no layers and no files."""

from collections.abc import Mapping
from typing import Any

from slipway.errors import UnsupportedModel
from slipway.models.llama import LlamaForCausalLM
from slipway.models.qwen2 import Qwen2ForCausalLM
from slipway.models.qwen3 import Qwen3ForCausalLM

ARCHITECTURES: dict[str, Any] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def declare(raw_config: Mapping[str, Any]) -> Any:
    """The declaration of the model that a config.json describes; its ``config`` is the typed configuration.

    Raises UnsupportedModel if the architecture is unknown or a config value is not implemented.
    """
    names = raw_config.get("architectures") or [None]
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModel("config.json: architectures", names[0], " | ".join(ARCHITECTURES))
    architecture = ARCHITECTURES[names[0]]
    return architecture.declare(architecture.Config.read(raw_config))
