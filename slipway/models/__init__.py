"""Registry of architectures: their configuration class and declaration, by name.

Not here: layers (nn/), files (checkpoint/).

Names are those in ``architectures`` of config.json.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from slipway.errors import UnsupportedModel
from slipway.models import llama, qwen2, qwen3
from slipway.models.config import DenseConfig
from slipway.models.decoder import CausalLM


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Registry entry: the class that parses config.json, and the function that declares a layer."""

    config_class: type[DenseConfig]
    declare_layer: Callable[[Any, int | None], Any]

    def declare(self, raw_config: Mapping[str, Any]) -> CausalLM:
        """Declare the model of a config.json.

        Raises UnsupportedModel for a value that is not implemented.
        """
        return CausalLM.declare(self.config_class.read(raw_config), self.declare_layer)


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(llama.LlamaConfig, llama.declare_layer),
    "Qwen2ForCausalLM": Architecture(qwen2.Qwen2Config, qwen2.declare_layer),
    "Qwen3ForCausalLM": Architecture(qwen3.Qwen3Config, qwen3.declare_layer),
}


def declare(raw_config: Mapping[str, Any]) -> CausalLM:
    """Declare the model of a config.json; its ``config`` is the typed configuration.

    Raises UnsupportedModel for an unknown architecture and for a value that is not implemented.
    """
    names = raw_config.get("architectures") or [None]
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModel("config.json: architectures", names[0], " | ".join(ARCHITECTURES))
    return ARCHITECTURES[names[0]].declare(raw_config)
