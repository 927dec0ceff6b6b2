"""Language model that drafts tokens for a larger one with the same vocabulary.

Not here: prediction layers and heads, which read hidden states of the larger one (mtp.py,
eagle.py).
"""

from typing import Any

from slipway import ops, tree
from slipway.models.decoder import CausalLM
from slipway.tree import module


@module
class DraftLM:
    """Draft model as engine/drafts/ runs it; it reads nothing of the target but its tokens."""

    lm: CausalLM

    @staticmethod
    def declare(lm: CausalLM) -> "DraftLM":
        """Declare the draft model with the tensors of a language model, under their names."""
        return tree.renamed(DraftLM(lm), lambda key, _: key.removeprefix("lm."))

    @property
    def config(self) -> Any:
        """Configuration of the language model."""
        return self.lm.config

    @property
    def cache_specs(self) -> tuple[ops.CacheSpec, ...]:
        """Caches of its layers."""
        return self.lm.cache_specs

    @property
    def reads(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads: none."""
        return ()

    @property
    def offset(self) -> int:
        """Position of a token in its caches, less that in the sequence."""
        return 0

    def features(self, hidden: tuple[Any, ...], step: ops.StepInput) -> None:
        """Return what it reads beside tokens: nothing."""
        del hidden, step

    def __call__(
        self, target: Any, h_TD: Any, step: ops.StepInput, *, caches: tuple[Any, ...]
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """Compute the tokens of a step: -> (hidden states, the same, caches)."""
        del target, h_TD
        x_TD, caches = self.lm(step, caches)
        return x_TD, x_TD, caches

    def logits(self, target: Any, y_BD: Any, num_rows: Any) -> Any:
        """Compute f32 logits [B, vocab] of results of ``__call__``."""
        del target
        return self.lm.logits(y_BD, num_rows)
