"""Report of one export: reshapes that were followed, Flax's defaults that are not torch's, what was not checked."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slipway.convert.executor import Written

FILE = "report.txt"


@dataclasses.dataclass(frozen=True)
class Report:
    """What is known of an export beside its tensors.

    ``reshapes``: maps that were told or followed. ``differences``: what the twin must be given. ``unchecked``: what
    was not looked at. ``inputs`` and ``outputs``: the example's, one array for each.
    """

    name: str
    reshapes: Sequence[str]
    differences: Sequence[str]
    unchecked: Sequence[str]
    inputs: Sequence[np.ndarray] = ()
    outputs: Sequence[np.ndarray] = ()

    def __str__(self) -> str:
        """The report as text."""
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
                "The module's outputs for the example are in example_output_N.npy, its inputs in example_input_N.npy."
            )
        lines.append(
            "not compared with the original's logits: run the torch twin on the example's inputs"
        )
        return "\n".join(lines)


class Exported(list[Written]):
    """The tensors that were written, and the report."""

    def __init__(self, written: Sequence[Written], report: Report):
        super().__init__(written)
        self.report = report


def save(report: Report, directory: Path) -> None:
    """Write the report, and the example's inputs and outputs, beside the exported files."""
    (directory / FILE).write_text(f"{report}\n")
    for what, arrays in (("input", report.inputs), ("output", report.outputs)):
        for i, array in enumerate(arrays):
            kept = (
                array if array.dtype.kind in "biufc" else array.astype(np.float32)
            )  # bfloat16 is none of NumPy's
            np.save(directory / f"example_{what}_{i}.npy", kept)
