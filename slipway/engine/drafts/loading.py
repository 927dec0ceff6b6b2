"""Draft model of an engine: its files, declaration, arrays and programs.

Not here: the target model (engine/launch.py), the computation (draft_program.py).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from slipway import mesh as meshes
from slipway import models
from slipway.checkpoint import files, names, quantize, tensor_reader
from slipway.checkpoint.swap import FromTensors, Mode, Values, Weights
from slipway.engine import programs
from slipway.engine.batch import Sizes
from slipway.engine.drafts import draft_program, rounds_program
from slipway.engine.drafts.config import SpeculativeConfig
from slipway.engine.drafts.device_drafts import Rounds
from slipway.engine.drafts.draft_program import DRAFT_CACHES, DRAFT_WEIGHTS, DraftModel
from slipway.errors import InvalidConfig, UnsupportedModel
from slipway.models import eagle
from slipway.models.decoder import LanguageModel
from slipway.models.draft_lm import DraftLM
from slipway.nn import moe
from slipway.ops import CacheSpec, backend
from slipway.runtime import load
from slipway.runtime.load import ModelFiles
from slipway.runtime.runner import Program, Runner, Shapes

# Folder of a model's directory that may hold its prediction layer as a directory of its own.
FOLDER = "mtp"


@dataclasses.dataclass(frozen=True)
class Drafting:
    """Draft model on a mesh, before its arrays are loaded.

    ``checkpoint``: checked; None: random weights. ``is_layer``: whether its tensors are a part of
    the target's. ``max_drafts``: most drafts of a row in a step.
    """

    declaration: DraftModel
    checkpoint: files.Checkpoint | None
    raw_config: dict[str, Any]
    mesh: Mesh
    dtype: Any
    is_layer: bool
    max_drafts: int

    @property
    def specs(self) -> tuple[CacheSpec, ...]:
        """Caches that the draft model needs."""
        return self.declaration.cache_specs

    @property
    def reads(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads, as in ``CausalLM.run``."""
        return self.declaration.reads

    def programs(self, target: Any, sizes: Sizes, rounds: Rounds) -> list[Program]:
        """Return its programs; ``target``: the declaration of the target model on the mesh."""
        structures = tuple(
            programs.operand_shapes(declaration, self.mesh, self.dtype)[1]
            for declaration in (target, self.declaration)
        )
        copies = self.mesh.shape[meshes.DATA]
        most = self.max_drafts
        return [
            *draft_program.programs(structures, copies, sizes, max_drafts=most),
            rounds_program.program(
                structures, copies, sizes, max_drafts=most, max_rounds=rounds.max_rounds
            ),
        ]

    def shapes(self, caches: tuple[Any, ...]) -> dict[str, Shapes]:
        """Return the shapes of its device state; ``caches``: of its caches, with shardings."""
        leaves = programs.operand_shapes(self.declaration, self.mesh, self.dtype)[0]
        return {DRAFT_WEIGHTS: lambda _: leaves, DRAFT_CACHES: lambda _: caches}

    def load(self, runner: Runner, seed: int) -> "DraftState":
        """Load the arrays, put them into the runner's state, and allocate the caches."""
        arrays = load.arrays(
            self.declaration, self.checkpoint, self.mesh, dtype=self.dtype, seed=seed
        )
        weights = Weights(
            self.declaration,
            self.mesh,
            self.dtype,
            arrays=arrays,
            config=self.raw_config,
            overrides={},
            ignored=("*",),
        )
        return DraftState(runner, weights, self.is_layer)


class DraftState:
    """Arrays and caches of a draft model on the devices.

    ``is_layer``: whether its tensors are a part of the target's.
    """

    def __init__(self, runner: Runner, weights: Weights, is_layer: bool):
        self._runner = runner
        self._weights = weights
        self._is_layer = is_layer
        # The arrays of a sleeping engine, if they were taken off the devices.
        self._kept: list[np.ndarray] | None = None
        self.wake_up()

    def among(self, values: Values) -> FromTensors | None:
        """Return the draft model's own part of new values for the target, checked.

        None if there is none. Raises CheckpointError for a part that is not whole.
        """
        if not self._is_layer or not isinstance(values, FromTensors):
            return None
        keys = tensor_reader.names(self._weights.declaration)
        found = names.declared(values.tensors, keys)
        if not any(key in found.tensors for key in keys):
            return None
        own = FromTensors(self._weights.packed(found))
        own.check(self._weights)
        return own

    def replace(self, values: FromTensors, version: str, mode: Mode) -> None:
        """Give the arrays new values, from ``among``."""
        self._kept = None
        self._weights.replace(values, version, mode)
        self._runner.state[DRAFT_WEIGHTS] = programs.operands(self._weights)

    def sleep(self) -> None:
        """Free the devices' memory; on a CPU the arrays stay where they are."""
        self._runner.free(DRAFT_CACHES)
        if not self._weights.on_cpu:
            self._kept = self._weights.to_host()
            self._weights.delete()

    def wake_up(self) -> None:
        """Bring the arrays back, and allocate the caches."""
        if self._kept is not None:
            self._weights.from_host(self._kept)
        self._kept = None
        self._runner.state[DRAFT_WEIGHTS] = programs.operands(self._weights)
        self._runner.allocate(DRAFT_CACHES)

    def delete(self) -> None:
        """Free all memory."""
        self._weights.delete()
        self._runner.free(DRAFT_CACHES)


def prepare(
    config: SpeculativeConfig | None,
    held: ModelFiles,
    mesh: Mesh,
    *,
    dtype: Any,
    scheme: quantize.Scheme | None,
    target: LanguageModel,
) -> Drafting | None:
    """Return the draft model that the options name, None if drafts come from elsewhere.

    ``held``: the files of the target; ``scheme``: of its packed weights. Raises InvalidConfig if
    there is no draft model of the method, or if it was made for another model; CheckpointError if
    tensors of it are missing; UnsupportedModel for a value in its config.json.
    """
    if config is None or config.method == "ngram":
        return None
    name, target_files = config.model, held
    folder = held.checkpoint.directory / FOLDER
    if config.method == "mtp" and not name and (folder / "config.json").exists():
        name = str(folder)
    if name:
        held = load.open_files(name, config.revision, is_dummy=held.is_dummy)
        scheme = quantize.read_scheme(held.raw_config) or scheme
    fields = {key: value for key, value in held.raw_config.items() if key != quantize.FIELD}
    declared, ignored = _declared(config.method, fields, held.checkpoint, target=target)
    _check_made_for(config.method, declared, target=target)
    if name and not held.is_dummy:
        _check_tokenizers(held.checkpoint, target_files.checkpoint)
    platform = mesh.devices.flat[0].platform
    form = backend.of(platform).layer_form
    declaration = load.on_mesh(declared, mesh, dtype, layer_form=form, scheme=scheme)
    exchange = moe.exchange_of(target)
    if exchange is not None and moe.layers(declaration):
        declaration = moe.with_exchange(declaration, exchange)
    checkpoint = None
    if not held.is_dummy:
        checkpoint = load.checked(
            declaration, held.checkpoint, dtype, ignored=ignored, scheme=scheme
        )
    return Drafting(
        declaration,
        checkpoint,
        held.raw_config,
        mesh=mesh,
        dtype=dtype,
        is_layer=config.method == "mtp",
        max_drafts=config.num_speculative_tokens,
    )


def _declared(
    method: str, fields: dict[str, Any], checkpoint: files.Checkpoint, *, target: LanguageModel
) -> tuple[Any, tuple[str, ...]]:
    """Declare a draft model: -> (declaration, patterns of further tensors in its files)."""
    if method == "mtp":
        try:
            return models.declare_mtp(fields), ("*",)
        except UnsupportedModel as error:
            expected = "a model with a prediction layer (num_nextn_predict_layers)"
            field = "speculative_config: method"
            raise InvalidConfig(field, method, f"{expected}: {error}") from error
    if method == "draft_model":
        model = models.declare(fields)
        return DraftLM.declare(model), (*load.IGNORED_TENSORS, *model.config.unused_tensors)
    tensors, key = checkpoint.tensors, eagle.OFFSETS
    head = eagle.declare(
        fields,
        is_third=method == "eagle3",
        target=target.config,
        names=tensors,
        offsets=checkpoint.array(key).tolist() if key in tensors else (),
    )
    return head, (*load.IGNORED_TENSORS, *eagle.UNUSED)


def _check_made_for(method: str, declared: Any, *, target: LanguageModel) -> None:
    """Raise InvalidConfig for a draft model of another vocabulary, or of other hidden states."""
    config, of_target = declared.config, target.config
    sizes = [("vocab_size", config.vocab_size, of_target.vocab_size)]
    is_eagle3 = method == "eagle3"
    shares = is_eagle3 and None in (declared.model.embed_tokens, declared.lm_head)
    if method in ("mtp", "eagle") or shares:
        sizes.append(("hidden_size", config.hidden_size, of_target.hidden_size))
    if is_eagle3 and config.target_hidden_size:
        sizes.append(("target_hidden_size", config.target_hidden_size, of_target.hidden_size))
    for name, got, expected in sizes:
        if got != expected:
            field = f"speculative_config: model: {name}"
            raise InvalidConfig(field, got, f"{expected}, as the model that it drafts for")


def _check_tokenizers(drafting: files.Checkpoint, target: files.Checkpoint) -> None:
    """Raise InvalidConfig if both directories have a vocabulary, with different tokens."""
    one, other = (_vocabulary(held.directory / "tokenizer.json") for held in (drafting, target))
    for number, token in one.items():
        if other.get(number, token) != token:
            field = f"speculative_config: model: tokenizer.json: token {number}"
            expected = f"{other[number]!r}, as for the model that it drafts for"
            raise InvalidConfig(field, repr(token), expected)


def _vocabulary(path: Path) -> dict[int, str]:
    """Return the tokens in a tokenizer.json by number; none without the file."""
    if not path.exists():
        return {}
    vocab = json.loads(path.read_text()).get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # Unigram: pairs of token and score
        return {number: token for number, (token, *_) in enumerate(vocab)}
    return {number: token for token, number in vocab.items()}
