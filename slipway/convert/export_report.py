"""Report of one export: reshapes, differing defaults, and parts that were not checked.

Not here: the export (export.py), the differences (differences.py).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slipway.convert.executor import Written

FILE = "report.txt"


@dataclasses.dataclass(frozen=True)
class Report:
    """Facts about an export beside its tensors.

    ``reshapes``: flattened maps that were given or traced. ``differences``: settings that the twin
    needs. ``unchecked``: parts that were not examined. ``inputs`` and ``outputs``: those of the
    example, one array each.
    """

    name: str
    reshapes: Sequence[str]
    differences: Sequence[str]
    unchecked: Sequence[str]
    inputs: Sequence[np.ndarray] = ()
    outputs: Sequence[np.ndarray] = ()

    def __str__(self) -> str:
        """Return the report as text."""
        sections = (
            ("Flattened maps and reshapes to maps:", self.reshapes or ["none"]),
            (
                "Defaults of Flax that the torch twin must be given:",
                self.differences or ["none found"],
            ),
            ("Not checked:", self.unchecked),
        )
        lines = [f"Export of {self.name}"]
        for title, held in sections:
            lines += [title, *(f"  {line}" for line in held)]
        if self.outputs:
            lines.append(
                "The module's outputs for the example are in example_output_N.npy, "
                "its inputs in example_input_N.npy."
            )
        lines.append(
            "not compared with the original's logits: run the torch twin on the example's inputs"
        )
        return "\n".join(lines)


class Exported(list[Written]):
    """List of the tensors that were written, with the report."""

    def __init__(self, written: Sequence[Written], report: Report):
        super().__init__(written)
        self.report = report


def save(report: Report, directory: Path) -> None:
    """Write the report, and the example's inputs and outputs, beside the exported files."""
    (directory / FILE).write_text(f"{report}\n")
    for what, arrays in (("input", report.inputs), ("output", report.outputs)):
        for i, array in enumerate(arrays):
            # NumPy has no bfloat16.
            kept = array if array.dtype.kind in "biufc" else array.astype(np.float32)
            np.save(directory / f"example_{what}_{i}.npy", kept)
