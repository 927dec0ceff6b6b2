"""Writer of the card of nano's prediction layer: `python -m training.mtp_card`.

Figures are those of mtp_log.jsonl. Not here: training (mtp.py), speed (benchmarks/speculation.py).
"""

import json
from pathlib import Path
from string import Template

import matplotlib
from matplotlib.figure import Figure

from training.mtp import CHAIN, LOG, MTP_FOLDER

TEMPLATE = Path(__file__).with_name("mtp_card_template.md")


def main() -> None:
    """Write README.md and curve.png into the layer's directory."""
    lines = [json.loads(line) for line in LOG.read_text().splitlines()]
    draw_curve(lines, MTP_FOLDER / "curve.png")
    size = (MTP_FOLDER / "model.safetensors").stat().st_size
    header = int.from_bytes((MTP_FOLDER / "model.safetensors").read_bytes()[:8], "little")
    last = lines[-1]
    text = Template(TEMPLATE.read_text()).substitute(
        parameters=f"{(size - 8 - header) // 2:,}",
        minutes=f"{last['seconds'] / 60:.0f}",
        tokens=f"{last['tokens']:,}",
        chain=CHAIN,
        agreement=" | ".join(f"{share:.1%}" for share in last["agreement"]),
        loss=f"{last['held_out_loss']:.3f}",
    )
    (MTP_FOLDER / "README.md").write_text(text)


def draw_curve(lines: list[dict], path: Path) -> None:
    """Draw the agreement of each draft against tokens."""
    matplotlib.use("agg")
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    tokens = [line["tokens"] / 1e6 for line in lines]
    for index, name in enumerate(("first", "second", "third")):
        shares = [line["agreement"][index] for line in lines]
        axes.plot(tokens, shares, marker="o", markersize=3, linewidth=1, label=f"{name} draft")
    axes.set(xlabel="million tokens", ylabel="share of drafts that are right")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
