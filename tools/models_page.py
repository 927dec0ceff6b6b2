"""Page of supported models (docs/models.md), written from the registry of architectures.

Not here: fields of config.json (config_fields.py).
"""

import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """# Supported models

Written by `tools/models_page.py` from the registry in `slipway/models`. A model is found by
`architectures` in its `config.json`.

| architecture | family | layers | drafts |
|---|---|---|---|
"""
TAIL = """
Every architecture is compared with transformers in float32 on tiny random models; Qwen 1, Ling and
MiMo, which transformers does not have, with data that their authors' code computed.
[speculation.md](speculation.md) says what a prediction layer is for.
[experts.md](experts.md) has the routing rules, [adding_a_model.md](adding_a_model.md) what another
architecture takes.
"""


def page() -> str:
    """Return the text of the page."""
    from slipway import models

    rows = []
    for name, entry in sorted(models.ARCHITECTURES.items()):
        module = sys.modules[entry.config_class.__module__]
        family = (module.__doc__ or "").split("\n")[0].partition(" (")[0].rstrip(".:")
        kinds = {"experts": ("MoE", "Router"), "latent attention": ("LatentAttention",)}
        found = [kind for kind, names in kinds.items() if any(hasattr(module, n) for n in names)]
        drafts = "own prediction layer" if entry.mtp is not None else ""
        rows.append(f"| `{name}` | {family} | {', '.join(found) or 'dense'} | {drafts} |")
    return HEAD + "\n".join(rows) + "\n" + TAIL


def main() -> int:
    """Write the page."""
    PAGE.write_text(page())
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
