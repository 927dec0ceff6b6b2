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
    topology: str | None = None
    """A TPU to compile for without having one, such as v6e:2x4; needs libtpu (jax[tpu]). Nothing runs then."""

    def run(self) -> None:
        """Measure each form in turn, and print."""
        from slipway.bench.forms import FORMS, measure  # with JAX, which other commands may not need

        figures = {name: measure(name, self.dtype, self.rows, self.rounds, self.topology) for name in FORMS}
        print(
            json.dumps({"topology": self.topology, "rows": self.rows, "dtype": self.dtype, "forms": figures}, indent=2)
        )
