"""Rotary position embedding: angles of positions, and their scalings.

Not here: the rotation of heads by the angles (ops/).

Su et al., RoFormer, 2021, in the half-split form: dimension i is paired with i + head_dim / 2. The
scalings are those of ``modeling_rope_utils`` in transformers, and have the names used there.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Scaling of positions; the fields are the members of ``rope_scaling`` in config.json.

    ``rope_type``: default | linear | dynamic | yarn | llama3, or dynamic_of_prompt, which is that
    of Qwen (2023): the base grows with the length of the prompt, in powers of two.
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


def magnitude(factor: float, scale: float) -> float:
    """Return YaRN's factor on the size of queries and keys (Peng et al., 2023, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class Rope:
    """Angles of one model: ``head_dim / 2`` frequencies, and a factor on cosines and sines."""

    head_dim: int
    theta: float
    scaling: Scaling = Scaling()

    def __call__(self, positions_T, prompt_lengths_T):
        """Return cosines and sines at ``positions_T``: f32 [T, head_dim / 2] each.

        ``prompt_lengths_T``: the length of the prompt of each token's sequence; only dynamic
        scaling depends on it.
        """
        freqs_TH = jnp.asarray(self.frequencies())[None]
        if self.scaling.rope_type == "dynamic":
            # A generated token has a longer context than the prompt.
            freqs_TH = self._dynamic(jnp.maximum(prompt_lengths_T, positions_T + 1))
        elif self.scaling.rope_type == "dynamic_of_prompt":
            freqs_TH = self._dynamic_of_prompt(prompt_lengths_T)
        angles_TH = positions_T.astype(jnp.float32)[:, None] * freqs_TH
        factor = self.attention_factor()
        return jnp.cos(angles_TH) * factor, jnp.sin(angles_TH) * factor

    @property
    def follows_prompt(self) -> bool:
        """Whether the angles of a token depend on the length of its prompt."""
        return self.needs_prompt or self.scaling.rope_type == "dynamic"

    @property
    def needs_prompt(self) -> bool:
        """Whether that holds for generated tokens, too."""
        return self.scaling.rope_type == "dynamic_of_prompt"

    def frequencies(self) -> np.ndarray:
        """Return the frequencies in radians per position: f32 [head_dim / 2]."""
        dims = np.arange(0, self.head_dim, 2, dtype=np.float32)
        freqs = 1.0 / self.theta ** (dims / self.head_dim)
        scales = {"linear": self._linear, "yarn": self._yarn, "llama3": self._llama3}
        scale = scales.get(self.scaling.rope_type)
        return (freqs if scale is None else scale(freqs)).astype(np.float32)

    def attention_factor(self) -> float:
        """Return the factor on cosines and sines: 1 except for YaRN.

        Peng et al., YaRN, 2023, section 3.4.
        """
        s = self.scaling
        if s.rope_type != "yarn" or s.attention_factor is not None:
            return s.attention_factor or 1.0

        if s.mscale and s.mscale_all_dim:
            return magnitude(s.factor, s.mscale) / magnitude(s.factor, s.mscale_all_dim)
        return magnitude(s.factor, 1.0)

    def _linear(self, freqs: np.ndarray) -> np.ndarray:
        """Divide all frequencies by the factor."""
        return freqs / self.scaling.factor

    def _llama3(self, freqs: np.ndarray) -> np.ndarray:
        """Divide low frequencies by the factor, keep high ones, and blend those between.

        As in the code that came with Llama 3.1.
        """
        s = self.scaling
        turns = s.original_max_position_embeddings * freqs / (2 * math.pi)
        share = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        kept = np.clip(share, 0.0, 1.0)
        return (1 - kept) * freqs / s.factor + kept * freqs

    def _yarn(self, freqs: np.ndarray) -> np.ndarray:
        """Divide low frequencies by the factor, keep high ones, and blend those between.

        Low are those of dimensions with less than beta_slow turns in the original context, high
        those with more than beta_fast.
        """
        s, dim = self.scaling, self.head_dim

        def dimension(turns: float) -> float:
            ratio = s.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(ratio) / (2 * math.log(self.theta))

        low, high = dimension(s.beta_fast), dimension(s.beta_slow)
        if s.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        above_low = np.arange(dim // 2, dtype=np.float32) - low
        ramp = np.clip(above_low / max(high - low, 0.001), 0.0, 1.0)
        return freqs / s.factor * ramp + freqs * (1 - ramp)

    def _dynamic(self, contexts_T):
        """Return the frequencies of each token: [T, head_dim / 2], by NTK-aware scaling.

        The base grows with contexts that are longer than those of the model's training.
        """
        s, dim = self.scaling, self.head_dim
        length_T = jnp.maximum(contexts_T, s.original_max_position_embeddings).astype(jnp.float32)
        stretch_T = s.factor * length_T / s.original_max_position_embeddings - (s.factor - 1)
        return self._with_base(self.theta * stretch_T ** (dim / (dim - 2)))

    def _dynamic_of_prompt(self, prompt_lengths_T):
        """Return the frequencies of each token: [T, head_dim / 2], as in the code of Qwen (2023).

        With n the number of doublings of the original length that the prompt takes, rounded up, the
        base is multiplied by (2^(n + 1) - 1)^(head_dim / (head_dim - 2)), and by 1 if n <= 0.
        """
        original, dim = self.scaling.original_max_position_embeddings, self.head_dim
        # Lengths are compared as integers: a logarithm of a power of two is not always whole.
        doublings = original * 2 ** np.arange(32, dtype=np.int64)
        doublings = jnp.asarray(np.minimum(doublings, np.iinfo(np.int32).max), jnp.int32)
        n_T = jnp.sum(prompt_lengths_T[:, None] > doublings[None], axis=1)
        alpha_T = 2.0 ** (n_T.astype(jnp.float32) + 1) - 1
        return self._with_base(self.theta * alpha_T ** (dim / (dim - 2)))

    def _with_base(self, base_T):
        """Return the frequencies for a base of each token: [T, head_dim / 2]."""
        powers_H = np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim
        return 1.0 / base_T[:, None] ** powers_H[None]


@dataclasses.dataclass(frozen=True)
class LongQueries:
    """Angles of queries that grow with the logarithm of the context: log-n attention.

    Beyond ``length`` positions, cosines and sines of ``rope`` are multiplied by the logarithm of
    the context's length to the base ``length`` (Su, 2021; Qwen technical report, 2023).
    """

    rope: Rope
    length: int

    @property
    def follows_prompt(self) -> bool:
        """Whether the angles of a token depend on the length of its prompt."""
        return self.rope.follows_prompt

    @property
    def needs_prompt(self) -> bool:
        """Whether that holds for generated tokens, too."""
        return self.rope.needs_prompt

    def __call__(self, positions_T, prompt_lengths_T):
        """Return cosines and sines at ``positions_T``, as ``Rope`` does."""
        context_T = jnp.maximum(positions_T + 1, self.length).astype(jnp.float32)
        factor_T1 = (jnp.log(context_T) / math.log(self.length))[:, None]
        cos_TH, sin_TH = self.rope(positions_T, prompt_lengths_T)
        return cos_TH * factor_T1, sin_TH * factor_T1
