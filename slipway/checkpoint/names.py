"""Names of tensors without the wrappers that training code puts around a model.

Not here: the names that a model declares (slipway/models), trees in the layout of another library
(slipway/convert).
"""

import dataclasses
import logging
import re
from collections.abc import Collection, Container, Iterable

from slipway.checkpoint import parts
from slipway.checkpoint.files import Checkpoint
from slipway.errors import CheckpointError

logger = logging.getLogger(__name__)
# Parts of a path that torch.compile, DataParallel, FSDP, activation checkpointing and a PEFT layer
# around a projection add.
_WRAPPERS = {
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "base_layer",
}
_ADAPTER = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")
_PEFT, _BASE = "base_model.model.", "model."


def plain(names: Iterable[str], wanted: Container[str]) -> dict[str, str]:
    """Return, for each of ``names``, the name among ``wanted`` that it has without its wrappers.

    A name that has none stays as it is. A name that lacks the leading ``model.`` is found too, as
    the base model of a causal language model is saved. Raises CheckpointError for tensors of an
    adapter that is not merged, and for two names of one tensor.
    """
    names = list(names)
    if adapted := [name for name in names if _ADAPTER.search(name)]:
        example = f"{adapted[0]} and {len(adapted) - 1} others" if len(adapted) > 1 else adapted[0]
        raise CheckpointError(
            "the tensors",
            [
                f"{example}: of a LoRA adapter that is not merged into its base model; merge it "
                "first (PEFT's merge_adapter(), or slipway convert --merge-lora) and leave its "
                "tensors out"
            ],
        )
    found: dict[str, str] = {}
    holders: dict[str, list[str]] = {}
    for name in names:
        found[name] = name if name in wanted else _below(name, wanted)
        holders.setdefault(found[name], []).append(name)
    if twice := [
        f"{' and '.join(held)}: two names of {name}"
        for name, held in holders.items()
        if len(held) > 1
    ]:
        raise CheckpointError("the tensors", twice)
    return found


def unwrapped(checkpoint: Checkpoint, wanted: Collection[str]) -> Checkpoint:
    """Return the checkpoint with its tensors under the names that ``plain`` gives them."""
    found = plain(checkpoint.tensors, wanted)
    renamed = [(name, new) for name, new in found.items() if name != new]
    if not renamed:
        return checkpoint
    logger.info(
        "%s: %d tensors under other names: %s is %s",
        checkpoint.directory,
        len(renamed),
        *renamed[0],
    )
    tensors = {
        found[name]: dataclasses.replace(t, name=found[name])
        for name, t in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


def declared(checkpoint: Checkpoint, keys: Collection[str]) -> Checkpoint:
    """Return the checkpoint with its tensors under declared ``keys``.

    Wrappers are left out of names; a fused tensor is split into the parts that are declared. Raises
    CheckpointError as ``plain`` and ``parts.split`` do.
    """
    return parts.split(unwrapped(checkpoint, {parts.whole(key) for key in keys}), keys)


def bare(name: str) -> str:
    """Return the name without the parts that wrappers add to a path."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS).removeprefix(_PEFT)


def _below(name: str, wanted: Container[str]) -> str:
    inner = bare(name)
    return next((guess for guess in (inner, _BASE + inner) if guess in wanted), name)
