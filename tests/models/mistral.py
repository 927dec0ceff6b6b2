"""Mistral, added as a user adds an architecture: a configuration and a layer.

Jiang et al., Mistral 7B, 2023.
"""

import dataclasses

from slipway.models import Architecture
from slipway.models.config import DenseConfig
from slipway.models.decoder import DecoderLayer
from slipway.nn.attention import Attention
from slipway.nn.mlp import MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(DenseConfig):
    """Fields of a Mistral: every layer has the same sliding window."""

    sliding_window: int | None = 4096

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Return the sliding window of each layer in positions, None for full attention."""
        return (self.sliding_window,) * self.num_hidden_layers


def declare_layer(config: MistralConfig, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    attention = Attention.declare(config, config.windows[index])
    return DecoderLayer.declare(
        config, attention, MLP.declare(config.hidden_size, config.intermediate_size)
    )


MISTRAL = Architecture(MistralConfig, declare_layer)
