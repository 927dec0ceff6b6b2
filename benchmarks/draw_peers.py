"""Charts of the comparison with other engines, drawn from the tables of docs/performance.md.

    python -m benchmarks.draw_peers      # writes docs/peers_*.png; extra `training`

Not here: measuring the figures (peers.py; its --plot draws the figures of one run).
"""

import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

DOCS = Path(__file__).parents[1] / "docs"
# Heading of the table, title of the chart, file.
CHARTS = (
    (
        "AVX-512",
        "Qwen3-0.6B shape, bf16, two cores of an AMD EPYC with AVX-512",
        "peers_avx512.png",
    ),
    ("AMX", "Qwen3-0.6B shape, bf16, two cores of an Intel Xeon with AMX", "peers_amx.png"),
    ("AVX2", "Qwen3-0.6B shape, packed weights, AMD EPYC restricted to AVX2", "peers_avx2.png"),
)
# Dark and light, with a hatch each: the bars differ in grey, too.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#1b4965", "edgecolor": "black"},
    {"color": "#f4a261", "edgecolor": "black", "hatch": "///"},
)
TICKS = (0.5, 1, 2, 4, 8, 16, 32)
LABELS = {
    "llama.cpp": "against llama.cpp",
    "vLLM": "against vLLM",
    "q8_0": "int8 against llama.cpp's q8_0",
    "q4_0": "int4 against llama.cpp's q4_0",
}
ROW_INCHES, WIDTH_INCHES = 0.5, 9


def main() -> None:
    """Draw one chart for each class of hosts."""
    text = (DOCS / "performance.md").read_text()
    for heading, title, file in CHARTS:
        draw(ratios(text, heading), title, DOCS / file)


def ratios(text: str, heading: str) -> dict[str, dict[str, str]]:
    """Return the columns "times ..." of the first table below a heading.

    Keys: name of the other engine, then name of the row. Raises ValueError without a table.
    """
    below = text.partition(f"\n### {heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    if lines is None:
        raise ValueError(f"docs/performance.md has no table below {heading!r}")
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines.group().splitlines()
    ]
    columns = {
        name.removeprefix("times "): at
        for at, name in enumerate(header)
        if name.startswith("times ")
    }
    # ratios have no unit
    names = [
        re.sub(r",? (?:output tok|tok/s|ms|s|MB)(?:/s)?$", _without_unit, row[0]) for row in rows
    ]
    return {
        other: {name: row[at] for name, row in zip(names, rows)} for other, at in columns.items()
    }


def _without_unit(match: re.Match) -> str:
    return " throughput" if "output" in match.group() else ""


def draw(series: dict[str, dict[str, str]], title: str, out: Path) -> None:
    """Draw a bar from 1 (equal) to the ratio, for each row and other engine; write a PNG file."""
    rows = list(next(iter(series.values())))
    figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(series)
    for number, (other, texts) in enumerate(series.items()):
        at = [row + number * height for row in range(len(rows))]
        values = [float(text) for text in texts.values()]
        widths = [value - 1 for value in values]
        axes.barh(at, widths, height, left=1, label=LABELS[other], **STYLES[number])
        for y, value, text in zip(at, values, texts.values()):
            left = value < 1
            axes.annotate(
                text,
                (value, y),
                xytext=(-3 if left else 3, 0),
                textcoords="offset points",
                va="center",
                ha="right" if left else "left",
                fontsize=8,
            )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.set_xscale("log")
    every = [float(text) for texts in series.values() for text in texts.values()]
    axes.set_xlim(min(0.6, min(every) * 0.85), max(2.2, max(every) * 1.35))
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} x")
    axes.set_xlabel(
        "how many times as good Slipway is (right of 1: Slipway is better; logarithmic)"
    )
    axes.set_title(title, fontsize=11)
    axes.grid(axis="x", color="0.85")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right")
    figure.savefig(out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
