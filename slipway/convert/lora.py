"""PEFT adapters of type LoRA: the change of each HF tensor by a merge.

The change is ``W + scale * B @ A`` (Hu et al., 2021, arXiv:2106.09685) for each adapted tensor, and
full tensors that replace those of the base model. Every field of adapter_config.json is read here,
has no part in the merged weights, or is refused. Not here: application of a change to the pieces of
a tensor (executor.py).
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from slipway.checkpoint import files
from slipway.checkpoint.shards import Spec
from slipway.convert.executor import Delta
from slipway.convert.hf_config import TIE
from slipway.errors import CheckpointError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Fields without a part in the merged weights: names and versions, training, and the initial
# distribution of A and B.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Initializations of an adapter that do not change the base model's weights; others are refused.
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
# transformers' architectures in which all projections, or some, are Conv1D modules, which store W
# as (in, out).
_CONV1D, _SOME_CONV1D = ("gpt2", "openai-gpt", "imagegpt"), ("decision_transformer", "clvp", None)
_TABLES = ("embed_tokens", "lm_head")  # PEFT saves these whole beside an adapter of them
# Modules that "all-linear" leaves out.
_NOT_LINEAR = re.compile(r"(.*\.)?([^.]*emb[^.]*|wte|wpe|shared|lm_head|score|classifier)")


_Rank = Annotated[int, msgspec.Meta(gt=0)]


class _Config(msgspec.Struct):
    """Fields of PEFT's LoraConfig that determine the merged weights."""

    r: _Rank
    lora_alpha: float
    target_modules: str | list[str]
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    peft_type: str = ""
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None

    def targets(self, module: str) -> bool:
        """Return whether PEFT adapts ``module``, which has a weight."""
        saved = any(
            re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save or ()
        )
        if saved or _matches(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return not _NOT_LINEAR.fullmatch(module)
        return _matches(self.target_modules, module) and self._in_layers(module)

    def saves(self, module: str) -> bool:
        """Return whether ``module`` is in ``modules_to_save``, or below one of them.

        PEFT compares ends of paths.
        """
        parts = module.split(".")
        paths = [".".join(parts[:stop]) for stop in range(1, len(parts) + 1)]
        return any(path.endswith(name) for path in paths for name in self.modules_to_save or ())

    def rank(self, module: str) -> int:
        """Return the number of rows of A."""
        return next(
            (n for pattern, n in (self.rank_pattern or {}).items() if _ends_with(pattern, module)),
            self.r,
        )

    def scale(self, module: str) -> float:
        """Return the factor of B @ A."""
        alphas = self.alpha_pattern or {}
        alpha = next(
            (n for pattern, n in alphas.items() if _ends_with(pattern, module)), self.lora_alpha
        )
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _in_layers(self, module: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == [] or isinstance(self.target_modules, str):
            return True
        names = (
            [self.layers_pattern]
            if isinstance(self.layers_pattern, str)
            else self.layers_pattern or []
        )
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names if name] or [
            r".*?\.[^.]*\.(\d+)\."
        ]
        found = (re.match(pattern, module) for pattern in patterns)
        index = next((int(match[1]) for match in found if match), None)
        return index in (layers if isinstance(layers, list) else [layers])


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A pair of matrices for each adapted tensor, and the factor of their product."""

    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
    scale: float

    def deltas(self) -> dict[str, Delta]:
        """Return functions of a range of elements, by adapted tensor, that compute its change."""
        return {key: product(a, b, self.scale) for key, (a, b) in self.pairs.items()}


@dataclasses.dataclass(frozen=True)
class Merge:
    """Changes of HF tensors by an adapter, and tensors that replace those of the base model.

    Replacement comes before the changes.
    """

    deltas: dict[str, Delta] = dataclasses.field(default_factory=dict)
    replaced: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def product(a: np.ndarray, b: np.ndarray, scale: float) -> Delta:
    """Return the change ``scale * b @ a`` as a function of a range of elements.

    It is computed in float32, for the rows that the range touches.
    """

    def delta(start: int, stop: int) -> np.ndarray:
        columns = a.shape[1]
        first, last = start // columns, -(-stop // columns)
        rows = scale * (b[first:last].astype(np.float32) @ a.astype(np.float32))
        return rows.reshape(-1)[start - first * columns : stop - first * columns]

    return delta


def read_adapter(
    directory: Path, targets: Mapping[str, Spec], model_config: Mapping[str, Any]
) -> Merge:
    """Read the adapter in ``directory`` for a model with this config.json.

    ``targets``: the HF tensors of the model. Raises CheckpointError, listing every part that is
    unsupported or does not fit.
    """
    try:
        raw = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(directory, [f"{CONFIG}: {error}"]) from error
    if not isinstance(raw, dict):
        raise CheckpointError(
            directory, [f"{CONFIG}: got {type(raw).__name__}, expected a JSON object"]
        )
    if not (directory / TENSORS).is_file():
        raise CheckpointError(
            directory, [f"{TENSORS}: missing; other formats of an adapter's tensors are not read"]
        )
    checkpoint = files.open_file(directory / TENSORS)
    problems = [f"{CONFIG}: {problem}" for problem in _refused(raw)]
    try:
        config = msgspec.convert(
            {name: value for name, value in raw.items() if value is not None}, _Config
        )
        reading = _Reading(config, checkpoint, targets, model_config=model_config)
        reading.all()
    except (msgspec.ValidationError, re.error) as error:
        raise CheckpointError(directory, [*problems, f"{CONFIG}: {error}"]) from error
    if problems := problems + reading.problems:
        raise CheckpointError(directory, problems)
    return reading.merge


def _refused(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of each field by itself."""
    if raw.get("peft_type") != "LORA":
        yield (
            f"peft_type: got {raw.get('peft_type')!r}, expected 'LORA'; "
            f"adapters of other types cannot be merged here"
        )
        return
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _KEEPS_BASE:
        yield (
            f"init_lora_weights: got {init!r}, with which training began on changed base "
            "weights, so that the adapter does not fit the base model; "
            "convert the adapter with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), which sets init_lora_weights to true"
        )
    if raw.get("bias") not in (None, "none", "all", "lora_only"):
        yield f"bias: got {raw['bias']!r}, expected 'none', 'all' or 'lora_only'"
    for field, value in raw.items():
        if value and field not in _INERT and field not in _Config.__struct_fields__:
            yield (
                f"{field}: got {value!r}, which cannot be merged here; "
                f"merge with PEFT's merge_and_unload() instead"
            )


class _Reading:
    """One pass over an adapter's tensors: the changes and problems found so far."""

    def __init__(
        self,
        config: _Config,
        checkpoint: files.Checkpoint,
        targets: Mapping[str, Spec],
        model_config: Mapping[str, Any],
    ):
        self.config = config
        self.checkpoint = checkpoint
        self.targets = targets
        self.tied = bool(model_config.get(TIE))
        self.model_type = model_config.get("model_type")
        self.merge = Merge()
        self.problems: list[str] = []

    def all(self) -> None:
        """Read every tensor; record modules in the configuration without a tensor."""
        if self.config.fan_in_fan_out and self.model_type in _SOME_CONV1D:
            self.problems.append(
                f"{CONFIG}: fan_in_fan_out: got True, which a model_type "
                f"{self.model_type!r} leaves open"
            )
        for name in self.checkpoint.tensors:
            module, _, part = name.removeprefix(PREFIX).partition(".lora_")
            match part:
                case "A.weight" | "embedding_A":
                    self._pair(name, module, part)
                case "B.weight" | "embedding_B":
                    other = name.removesuffix(part) + part.replace("B", "A")
                    if other not in self.checkpoint.tensors:
                        self.problems.append(f"{other}: missing")
                case "":
                    self._whole(name, module)
                case _:
                    self.problems.append(
                        f"{name}: expected lora_A.weight or lora_B.weight of a module"
                    )
        self._complete()
        self._tables()

    def _pair(self, name: str, module: str, part: str) -> None:
        """Record the change of the module's weight by A and its B."""
        key, other = f"{module}.weight", name.removesuffix(part) + part.replace("A", "B")
        if other not in self.checkpoint.tensors:
            self.problems.append(f"{other}: missing")
            return
        a, b = self.checkpoint.array(name), self.checkpoint.array(other)
        conv1d = self.model_type in _CONV1D and not module.endswith("lm_head")
        transposed = conv1d or part == "embedding_A"
        shape = (*b.shape[:1], *a.shape[1:])[:: -1 if transposed else 1]
        if key not in self.targets:
            self.problems.append(f"{name}: the converted model has no {key}")
        elif (
            a.ndim != 2
            or b.ndim != 2
            or a.shape[0] != b.shape[1]
            or shape != self.targets[key].shape
        ):
            self.problems.append(
                f"{name}: {b.shape} times {a.shape} does not give {key}'s {self.targets[key].shape}"
            )
        elif not self.config.targets(module):
            self.problems.append(
                f"{name}: {CONFIG} does not name {module} (target_modules and what restricts them)"
            )
        elif a.shape[0] != (rank := self.config.rank(module)):
            self.problems.append(
                f"{name}: rank {a.shape[0]}, but {CONFIG} says {rank} (r, rank_pattern)"
            )
        elif key in self.merge.deltas:
            self.problems.append(f"{name}: a second adapter of {key}")
        else:
            left, right = (b.T, a.T) if transposed else (a, b)
            self.merge.deltas[key] = product(left, right, self.config.scale(module))

    def _whole(self, name: str, key: str) -> None:
        """Record a tensor that replaces that of the base model."""
        key = key.replace(".base_layer.", ".")
        module = key.rpartition(".")[0]
        is_bias = key.endswith(".bias") and self.config.bias != "none"
        if not (is_bias or self.config.saves(module) or module.rpartition(".")[2] in _TABLES):
            self.problems.append(f"{name}: {CONFIG} does not name {key} (modules_to_save, bias)")
        elif key not in self.targets and not (self.tied and module.endswith("lm_head")):
            self.problems.append(f"{name}: the converted model has no {key}")
        elif key in self.targets and self.checkpoint.tensors[name].shape != self.targets[key].shape:
            shape = self.checkpoint.tensors[name].shape
            self.problems.append(
                f"{name}: shape {shape}, but {key} of the converted model has "
                f"{self.targets[key].shape}"
            )
        else:
            self.merge.replaced[key] = self.checkpoint.array(name)

    def _complete(self) -> None:
        """Record modules that the configuration names and no tensor adapts."""
        for key, spec in self.targets.items():
            module, _, kind = key.rpartition(".")
            if self.config.saves(module) and key not in self.merge.replaced:
                self.problems.append(f"{PREFIX}{key}: missing, though modules_to_save names it")
            is_target = kind == "weight" and len(spec.shape) == 2 and self.config.targets(module)
            if is_target and not any(
                f"{p}{module}.lora_" in name
                for name in self.checkpoint.tensors
                for p in ("", PREFIX)
            ):
                self.problems.append(
                    f"{PREFIX}{module}.lora_A.weight: missing, though target_modules names {module}"
                )

    def _tables(self) -> None:
        """Refuse a change of one of two tied tables.

        Drop a head that is saved beside an equal table.
        """
        if not self.tied:
            return
        replaced = self.merge.replaced
        heads = [key for key in replaced if key.endswith("lm_head.weight")]
        tables = [key for key in replaced if key.endswith("embed_tokens.weight")]
        both = len(heads) == len(tables) == 1 and np.array_equal(
            replaced[heads[0]], replaced[tables[0]]
        )
        adapted = [key for key in self.merge.deltas if key.split(".")[-2] in _TABLES]
        if both and not adapted:
            del replaced[heads[0]]
            return
        self.problems += [
            f"{PREFIX}{key}: input and output embeddings of the base model are one table "
            "(tie_word_embeddings), "
            "and the adapter changes one use of it; merge with PEFT's merge_and_unload() instead"
            for key in dict.fromkeys((*heads, *tables, *adapted))
        ]


def _matches(names: str | list[str] | None, module: str) -> bool:
    """Return whether a regular expression, or the end of a path, names ``module``."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _ends_with(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
