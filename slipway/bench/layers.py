"""`slipway bench layers`: the command line of bench/forms.py, which brings JAX; decides nothing itself."""

import dataclasses
import json
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersBench:
    """One decode step of the Qwen3-0.6B shape with its layers scanned, looped over and unrolled."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rows: int = 2
    """Rows, each at a context of 128 tokens."""
    rounds: int = 5

    def run(self) -> None:
        """Measure each form in turn, and print."""
        from slipway.bench.forms import FORMS, measure  # with JAX, which other commands may not need

        figures = {name: measure(name, self.dtype, self.rows, self.rounds) for name in FORMS}
        print(json.dumps({"rows": self.rows, "dtype": self.dtype, "forms": figures}, indent=2))
