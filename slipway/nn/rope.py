"""Rotary position embedding: angles of positions, and their scalings.

Su et al., RoFormer, 2021, in the half-split form: dimension i turns with i + head_dim / 2. Scalings follow
transformers' ``modeling_rope_utils``, whose checkpoints name them.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How a model stretches its positions; the fields are those of config.json's ``rope_scaling``, where it has them.

    ``rope_type``: default | linear | dynamic | yarn | llama3.
    """

    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class Rope:
    """The angles of one model: ``head_dim / 2`` frequencies, and a factor on their cosines and sines."""

    head_dim: int
    theta: float
    scaling: Scaling = Scaling()

    def __call__(self, positions_T, contexts_T):
        """f32 cosines and sines [T, head_dim / 2] at ``positions_T``.

        ``contexts_T`` matters to dynamic scaling alone, whose frequencies follow the length of what is read.
        """
        freqs_TH = jnp.asarray(self.frequencies())[None]
        if self.scaling.rope_type == "dynamic":
            freqs_TH = self._dynamic(contexts_T)
        angles_TH = positions_T.astype(jnp.float32)[:, None] * freqs_TH
        factor = self.attention_factor()
        return jnp.cos(angles_TH) * factor, jnp.sin(angles_TH) * factor

    def frequencies(self) -> np.ndarray:
        """Radians per position, f32 [head_dim / 2]."""
        freqs = 1.0 / self.theta ** (np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim)
        scale = {"linear": self._linear, "yarn": self._yarn, "llama3": self._llama3}.get(self.scaling.rope_type)
        return (freqs if scale is None else scale(freqs)).astype(np.float32)

    def attention_factor(self) -> float:
        """The factor on cosines and sines: 1 but for YaRN (Peng et al., 2023, section 3.4)."""
        s = self.scaling
        if s.rope_type != "yarn" or s.attention_factor is not None:
            return s.attention_factor or 1.0

        def magnitude(scale: float) -> float:
            return 1.0 if s.factor <= 1 else 0.1 * scale * math.log(s.factor) + 1.0

        if s.mscale and s.mscale_all_dim:
            return magnitude(s.mscale) / magnitude(s.mscale_all_dim)
        return magnitude(1.0)

    def _linear(self, freqs: np.ndarray) -> np.ndarray:
        return freqs / self.scaling.factor

    def _llama3(self, freqs: np.ndarray) -> np.ndarray:
        """Long waves slowed by the factor, short ones kept, those between blended (Llama 3.1's own code)."""
        s = self.scaling
        turns = s.original_max_position_embeddings * freqs / (2 * math.pi)
        kept = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
        return (1 - kept) * freqs / s.factor + kept * freqs

    def _yarn(self, freqs: np.ndarray) -> np.ndarray:
        """Interpolated where a dimension turns less than beta_slow times in the original context, kept where more."""
        s, dim = self.scaling, self.head_dim

        def dimension(turns: float) -> float:
            return (
                dim * math.log(s.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            )

        low, high = dimension(s.beta_fast), dimension(s.beta_slow)
        if s.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0.0, 1.0)
        return freqs / s.factor * ramp + freqs * (1 - ramp)

    def _dynamic(self, contexts_T):
        """NTK-aware scaling: a larger base once more tokens are read than the model was trained on."""
        s, dim = self.scaling, self.head_dim
        length_T = jnp.maximum(contexts_T, s.original_max_position_embeddings).astype(jnp.float32)
        stretch_T = s.factor * length_T / s.original_max_position_embeddings - (s.factor - 1)
        base_T = self.theta * stretch_T ** (dim / (dim - 2))
        return 1.0 / base_T[:, None] ** (np.arange(0, dim, 2, dtype=np.float32) / dim)[None]
