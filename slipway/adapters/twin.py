"""Torch twins: classes loaded from a user's file, and their parameters compared with a checkpoint.

A twin is the user's own Python file, named on the command line and run here: a transformers
PreTrainedModel of a JAX architecture that was converted. Tensors are compared by name and shape on
torch's meta device: apart from tied tables no values are read.

Not here: the check of what a twin computes (check.py), the package for an engine (package.py).
"""

import contextlib
import dataclasses
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slipway.checkpoint.files import Checkpoint
from slipway.errors import InvalidConfig, UnsupportedModel

Engine = Literal["vllm", "sglang"]
# Attributes where the Transformers backends of both engines find the layers and the output head.
BASE, HEAD = "model", "lm_head"
EXPECTED = (
    "a transformers PreTrainedModel with a config_class of its own, "
    "its layers in `model`, its head in `lm_head` (docs/adapters.md)"
)
# Parts of names of tensors that SGLang skips without an error.
SKIPPED = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".masked_bias")
_MODULE = "slipway_twin"


@dataclasses.dataclass(frozen=True)
class Twin:
    """Classes that a twin's file defines, and the config.json from which they are made."""

    path: Path
    architecture: str
    model_class: Any
    base_class: Any
    config_class: Any
    raw_config: Mapping[str, Any]

    def config(self) -> Any:
        """Return a new object of ``config_class``.

        Raises InvalidConfig if its code rejects config.json.
        """
        with running(self.path, f"that makes {self.config_class.__name__} from config.json"):
            return self.config_class.from_dict(dict(self.raw_config))

    def whole(self) -> Any:
        """Return the model with its head on the meta device.

        Raises InvalidConfig if its code fails.
        """
        return _on_meta(self.path, self.model_class, self.config())


@contextlib.contextmanager
def running(path: Path, what: str) -> Iterator[None]:
    """Convert errors of the twin's own code to InvalidConfig.

    The error names the last line of the file that ran. ``what``: a clause that describes the code,
    for the error.
    """
    try:
        yield
    except _failures() as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        place = f"{path.name}:{lines[-1]}" if lines else path.name
        raise InvalidConfig(
            "twin", place, f"code {what}: {type(error).__name__}: {error}"
        ) from error


def _failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that the twin's code may raise.

    Called only after an error: huggingface_hub takes half a second to import.
    """
    from huggingface_hub.errors import StrictDataclassError

    return (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        NameError,
        RuntimeError,
        StrictDataclassError,
        SyntaxError,
        TypeError,
        ValueError,
    )


def load(twin: str, raw_config: Mapping[str, Any]) -> Twin:
    """Load the twin ``FILE`` or ``FILE:CLASS`` for a config.json.

    Its architecture is the default class. Raises UnsupportedModel for fields of config.json that
    are missing or in use, InvalidConfig for a file that is no twin.
    """
    architecture, model_type = _named(raw_config)
    if missing := [
        name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None
    ]:
        expected = f"{' and '.join(missing)} installed here, to load the twin"
        raise InvalidConfig("twin", twin, expected)
    file, _, name = twin.partition(":")
    module = _imported(Path(file))
    model_class = getattr(module, name or architecture, None)
    if model_class is None:
        raise InvalidConfig("twin", twin, f"a file that defines {name or architecture}")
    base_class, config_class = _classes(Path(file).resolve(), model_class, raw_config)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config_class.model_type != model_type:
        raise InvalidConfig(
            f"{config_class.__name__}.model_type",
            config_class.model_type,
            f"config.json's {model_type!r}",
        )
    if model_type in CONFIG_MAPPING_NAMES:
        raise UnsupportedModel(
            "model_type", model_type, "a new name; transformers has a model of this model_type"
        )
    for part in (model_class, base_class, config_class):
        if getattr(module, part.__name__, None) is not part:
            raise InvalidConfig("twin", twin, f"a file that defines {part.__name__} itself")
    path = Path(file).resolve()
    return Twin(
        path,
        architecture,
        model_class,
        base_class=base_class,
        config_class=config_class,
        raw_config=raw_config,
    )


def mismatches(twin: Twin, checkpoint: Checkpoint, engine: Engine) -> list[str]:
    """Return every difference between the tensors of a checkpoint and the parameters of the twin.

    These are tensors and parameters without a counterpart, unequal shapes, and ties that an engine
    does not support.
    """
    model, config = twin.whole(), twin.config()
    places = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})  # set by post_init
    problems = []
    for name, tensor in sorted(checkpoint.tensors.items()):
        if name not in places:
            problems.append(f"{name}: the twin has no parameter for this tensor {tensor.shape}")
        elif tensor.shape != places[name]:
            problems.append(f"{name}: got {tensor.shape}, the twin has {places[name]}")
    for name, shape in sorted(places.items()):
        if name not in checkpoint.tensors and tied.get(name) not in checkpoint.tensors:
            problems.append(f"{name}: no tensor for the twin's {shape}")
    head = f"{HEAD}.weight"
    for name, source in sorted(tied.items()):
        if name != head:
            problems.append(
                f"{name}: tied to {source}; an engine ties only {head} to the embedding"
            )
        elif {name, source} <= checkpoint.tensors.keys() and not _equal(checkpoint, name, source):
            problems.append(f"{name}: differs from {source}, to which it is tied")
    if bool(getattr(config, "tie_word_embeddings", False)) != (head in tied):
        is_tied = "ties" if head in tied else "does not tie"
        problems.append(
            f"config.json: tie_word_embeddings: got {head not in tied}, "
            f"but the twin {is_tied} {head}"
        )
    known = (head,) if engine == "sglang" else (head, f"{HEAD}.bias")
    outside = [name for name in places if not name.startswith(f"{BASE}.") and name not in known]
    skipped = [
        name for name in places if engine == "sglang" and any(part in name for part in SKIPPED)
    ]
    problems += [f"{name}: SGLang does not load tensors of such names" for name in skipped]
    return problems + [
        f"{name}: {engine} loads only tensors in {BASE}. and {', '.join(known)}" for name in outside
    ]


def _named(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the architecture and the model_type of a config.json."""
    model_type = config.get("model_type")
    match config.get("architectures"):
        case [str(architecture)] if architecture.isidentifier():
            pass
        case got:
            raise UnsupportedModel(
                "architectures", got, "one class name, such as ['MyForCausalLM']"
            )
    if not isinstance(model_type, str) or not re.fullmatch(
        r"[A-Za-z][\w.-]*", model_type, re.ASCII
    ):
        raise UnsupportedModel("model_type", model_type, "letters and digits, such as 'my_model'")
    return architecture, model_type


def _imported(path: Path) -> Any:
    path = path.resolve()
    if not path.is_file() or path.suffix != ".py":
        raise InvalidConfig("twin", str(path), "a Python file, FILE.py or FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    # transformers and annotations look up the module of a class in sys.modules.
    sys.modules[_MODULE] = module
    with running(path, "that can be imported by itself"):
        spec.loader.exec_module(module)
    return module


def _classes(path: Path, model_class: Any, raw_config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the class of the module in ``model``, and the configuration class."""
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    shown = getattr(model_class, "__name__", repr(model_class))
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise InvalidConfig("twin", shown, EXPECTED)
    config_class = model_class.config_class
    if not isinstance(config_class, type) or not issubclass(config_class, PreTrainedConfig):
        raise InvalidConfig(
            f"{shown}.config_class", config_class, "the twin's own subclass of PreTrainedConfig"
        )
    if model_class.base_model_prefix != BASE:
        raise InvalidConfig(
            f"{shown}.base_model_prefix", model_class.base_model_prefix, f"{BASE!r}"
        )
    with running(path, f"that makes {config_class.__name__} from config.json"):
        config = config_class.from_dict(dict(raw_config))
    model = _on_meta(path, model_class, config)
    base, head = getattr(model, BASE, None), getattr(model, HEAD, None)
    if not isinstance(base, PreTrainedModel) or type(base).config_class is not config_class:
        raise InvalidConfig(
            f"{shown}.{BASE}",
            type(base).__name__,
            f"a PreTrainedModel made from {config_class.__name__}",
        )
    if type(head) is not nn.Linear:
        raise InvalidConfig(
            f"{shown}.{HEAD}", type(head).__name__, "nn.Linear, which the engines replace"
        )
    return type(base), config_class


def _on_meta(path: Path, model_class: Any, config: Any) -> Any:
    import torch

    with (
        running(path, f"that makes {model_class.__name__} on torch's meta device"),
        torch.device("meta"),
    ):
        return model_class(config).eval()


def _equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    same_type = checkpoint.tensors[name].dtype == checkpoint.tensors[other].dtype
    return same_type and np.array_equal(
        checkpoint.array(name).view(np.uint8), checkpoint.array(other).view(np.uint8)
    )
