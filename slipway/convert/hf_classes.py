"""Comparison of tensor names with those that transformers' class of an architecture loads.

No memory of the model's size is allocated: the class is made on torch's meta device, and its own
loader is given meta tensors. Not here: rules between names (mappings/), architectures that Slipway
declares (slipway/models).
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from slipway.checkpoint.shards import Spec
from slipway.convert.plan import alternating

# transformers' loader needs accelerate for the meta device.
NEEDED = ("torch", "transformers", "accelerate")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Result of ``compare``."""

    class_name: str = ""
    differences: tuple[str, ...] = ()
    """One sentence for each tensor that the class does not have, lacks, or has in another shape."""
    unknown: str = ""
    """Reason for which there is no class to compare with; empty where there is one."""


def compare(
    config: Mapping[str, Any], specs: Mapping[str, Spec], model_class: Any = None
) -> Comparison:
    """Compare tensors with the names that a class's loader accepts.

    ``model_class``: by default the class in config.json's ``architectures``. The loader's renamings
    of published checkpoints (experts one by one, old names of norms) count as its names.
    """
    if model_class is not None:
        return _compared(model_class, f"the twin {model_class.__name__}", config, specs=specs)
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        return Comparison(
            unknown=f"config.json: architectures: got {names!r}, expected the name of one class"
        )
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return Comparison(
            unknown=(
                f"the names of {names[0]} are not known here: {' and '.join(missing)} not installed"
            )
        )
    # Optional and slow to import: only for architectures that no mapping declares.
    import transformers

    model_class = getattr(transformers, names[0], None)
    if not isinstance(model_class, type) or not issubclass(
        model_class, transformers.PreTrainedModel
    ):
        return Comparison(
            unknown=f"transformers {transformers.__version__} has no class {names[0]}"
        )
    return _compared(model_class, f"{names[0]} of transformers", config, specs=specs)


def _compared(
    model_class: Any, shown: str, config: Mapping[str, Any], specs: Mapping[str, Spec]
) -> Comparison:
    try:
        info = _load(model_class, config, specs)
    except _failures() as error:
        reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
        return Comparison(
            unknown=(
                f"transformers cannot make {model_class.__name__} from this config.json: {reason}"
            )
        )
    return Comparison(shown, tuple(_differences(shown, info, specs)))


def _load(model_class: Any, config: Mapping[str, Any], specs: Mapping[str, Spec]) -> dict[str, Any]:
    """Load meta tensors of these names and shapes; return the loader's report."""
    import torch

    fields = {name: value for name, value in config.items() if name != "quantization_config"}
    state = {name: torch.empty(spec.shape, device="meta") for name, spec in specs.items()}
    # torch lists the constructors that obey torch.device once, at its first use. transformers
    # replaces torch.linspace while it makes a model: a list made then would lack the real one.
    with torch.device("meta"):
        torch.empty(0)
    with _quiet():
        _, info = model_class.from_pretrained(
            None,
            config=model_class.config_class.from_dict(fields),
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported instead of raised
            device_map="meta",
        )
    return info


def _differences(
    class_name: str, info: Mapping[str, Any], specs: Mapping[str, Spec]
) -> Iterator[str]:
    """Yield sentences about the loader's report, unexpected and missing names alternating."""
    unexpected = [
        f"{name}: {class_name} has no such tensor (shape {specs[name].shape})"
        if name in specs
        else f"{name}: {class_name} has no such tensor"
        for name in sorted(info["unexpected_keys"])
    ]
    missing = [f"{name}: missing" for name in sorted(info["missing_keys"])]
    yield from alternating(unexpected, missing)
    for name, got, expected in sorted(info["mismatched_keys"], key=str):
        yield f"{name}: got shape {tuple(got)}, expected {tuple(expected)} ({class_name})"
    yield from info["error_msgs"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own report and progress bar."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def _failures() -> tuple[type[Exception], ...]:
    """Return the exceptions of a configuration or model class that refuses config.json."""
    from huggingface_hub.errors import StrictDataclassError  # imported late: it takes half a second

    return (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        NameError,
        OSError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    )
