"""Decides what a PEFT adapter adds to each HF tensor: ``scale * B @ A`` (Hu et al., 2021, arXiv:2106.09685).

Knows the adapter's files; neither the tensors it is added to nor where they go.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint import files
from slipway.checkpoint.shards import Spec
from slipway.convert.run import Delta
from slipway.errors import CheckpointError

PREFIX = "base_model.model."
# Fields that do not change what the adapter adds, or that are read below; any other that is set is refused.
_KNOWN = {
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "task_type", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "bias", "auto_mapping", "peft_version", "init_lora_weights", "layer_replication",
    "qalora_group_size", "corda_config", "eva_config", "loftq_config", "megatron_core", "ensure_weight_tying",
    "arrow_config", "runtime_config",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A pair of matrices for each adapted tensor, and what their product is multiplied by."""

    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
    scale: float

    def deltas(self) -> dict[str, Delta]:
        """What to add to a range of elements of each adapted tensor."""
        return {key: self._delta(*pair) for key, pair in self.pairs.items()}

    def _delta(self, a: np.ndarray, b: np.ndarray) -> Delta:
        def delta(start: int, stop: int) -> np.ndarray:
            columns = a.shape[1]
            first, last = start // columns, -(-stop // columns)
            rows = self.scale * (b[first:last].astype(np.float32) @ a.astype(np.float32))
            return rows.reshape(-1)[start - first * columns : stop - first * columns]

        return delta


def read_adapter(directory: Path, targets: Mapping[str, Spec]) -> Adapter:
    """The adapter in ``directory``, each of whose matrices must fit one of ``targets``.

    Raises CheckpointError, listing every part that is not understood or does not fit.
    """
    try:
        config = json.loads((directory / "adapter_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(directory, [f"adapter_config.json: {error}"]) from error
    checkpoint = files.open_file(directory / "adapter_model.safetensors")
    problems = [*_unsupported(config)]
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in checkpoint.tensors:
        if not name.endswith(".lora_A.weight"):
            if not name.endswith(".lora_B.weight"):
                problems.append(f"{name}: expected lora_A or lora_B")
            continue
        module = name.removesuffix(".lora_A.weight")
        key, other = f"{module.removeprefix(PREFIX)}.weight", f"{module}.lora_B.weight"
        if other not in checkpoint.tensors:
            problems.append(f"{other}: missing")
            continue
        a, b = checkpoint.array(name), checkpoint.array(other)
        shape = (*b.shape[:1], *a.shape[1:])
        if key not in targets:
            problems.append(f"{name}: the converted model has no {key}")
        elif a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or shape != targets[key].shape:
            problems.append(f"{name}: {b.shape} times {a.shape} does not give {key}'s {targets[key].shape}")
        else:
            pairs[key] = a, b
    if problems:
        raise CheckpointError(directory, problems)
    rank, alpha = config["r"], config["lora_alpha"]
    return Adapter(pairs, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    problems = (
        [] if config.get("peft_type") == "LORA" else [f"peft_type: got {config.get('peft_type')!r}, expected LORA"]
    )
    problems += [f"{field}: missing" for field in ("r", "lora_alpha") if not config.get(field)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias: got {config['bias']!r}, expected none")
    return problems + [
        f"adapter_config.json: {field}: {value!r} is not implemented"
        for field, value in config.items()
        if value and field not in _KNOWN
    ]
