"""MaxText models inside vLLM on TPU: a model class for tpu-inference and its configuration.

The contract for model classes is in docs/adapters.md. MaxText is optional, needs Python 3.12, and
is imported when a model is made.

Not here: Slipway's own architectures inside vLLM (vllm.py), conversion of MaxText's trees
(slipway/convert).
"""

import contextlib
import dataclasses
import importlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slipway.convert.mappings.maxtext import ROTATED, Rotation, rope_type, rotation
from slipway.errors import InvalidConfig

logger = logging.getLogger(__name__)
LANES = 128  # of a TPU's vector registers
# Characters kept of MaxText's error: for an unknown option it lists all of its 900 options.
REASON = 300
GET = (
    "pip install maxtext 'qwix>=0.1.6' omegaconf grain aqtp drjax jsonlines ml-collections, "
    "on Python 3.12 or later"
)


@dataclasses.dataclass(frozen=True)
class MaxText:
    """The parts of MaxText that are used."""

    initialize: Callable[..., Any]
    from_pretrained: Callable[..., Any]
    configs: Path
    mode: Any

    @staticmethod
    def load() -> "MaxText":
        """Import MaxText. Raises InvalidConfig where it is not installed, or incomplete."""
        try:
            pyconfig = importlib.import_module("maxtext.configs.pyconfig")
            creation = importlib.import_module("maxtext.utils.model_creation_utils")
            places = importlib.import_module("maxtext.utils.globals")
            types = importlib.import_module("maxtext.common.common_types")
        except ImportError as error:
            raise InvalidConfig(
                "model", "a MaxText model", f"MaxText beside it ({GET}): {error}"
            ) from error
        return MaxText(
            pyconfig.initialize,
            creation.from_pretrained,
            Path(places.MAXTEXT_CONFIGS_DIR),
            mode=types.MODEL_MODE_AUTOREGRESSIVE,
        )


def overrides(vllm_config: Any, lanes: int = LANES) -> dict[str, Any]:
    """Return MaxText's options for a vLLM configuration.

    These are the options of the user, and those that the shards need. Raises ValueError without an
    HF path, from which vLLM reads sizes and tokenizer.
    """
    if not getattr(vllm_config.model_config, "hf_config_path", None):
        raise ValueError(
            "model_config.hf_config_path: got None, expected the directory or hub id of the "
            "model's HF config (--hf-config-path): vLLM reads head counts and the tokenizer from it"
        )
    given = dict((vllm_config.additional_config or {}).get("maxtext_config") or {})
    if vllm_config.load_config.load_format == "dummy" and given.get("load_parameters_path"):
        path = given.pop("load_parameters_path")  # not set to None, which MaxText refuses
        logger.warning("load_parameters_path %s is not read: the load format is dummy", path)
    config, sharding = text_config(vllm_config), vllm_config.sharding_config
    shards = sharding.tp_size * sharding.expert_size
    for name, field in (
        ("base_num_kv_heads", "num_key_value_heads"),
        ("global_num_kv_heads", _GLOBAL),
    ):
        heads = getattr(config, field, None)
        if heads is not None and (raised := raised_kv_heads(heads, shards)) != heads:
            logger.info(
                "%s: %d KV heads are held %d times, one for each of %d shards",
                name,
                heads,
                shards // heads,
                shards,
            )
            given[name] = raised
    size = getattr(config, "moe_intermediate_size", None)
    if size is not None:
        padded = padded_moe_mlp_dim(size, sharding.tp_size * sharding.attn_dp_size, lanes)
        if padded != size:
            logger.warning(
                "experts are padded from %d to %d rows: %.3g times the memory",
                size,
                padded,
                padded / size,
            )
            given["padded_base_moe_mlp_dim"] = padded
    return given


_GLOBAL = "num_global_key_value_heads"


def text_config(vllm_config: Any) -> Any:
    """Return the part of the HF config that describes the decoder."""
    config = vllm_config.model_config.hf_config
    return getattr(config, "text_config", None) or config


def raised_kv_heads(heads: int, shards: int) -> int:
    """Return the number of KV heads, repeated until each shard has one.

    ``shards``: tensor times expert parallelism.
    """
    return shards if heads < shards and shards % heads == 0 else heads


def padded_moe_mlp_dim(size: int, shards: int, lanes: int = LANES) -> int:
    """Return the rows of an expert, padded for the grouped matrix product of tpu-inference.

    Powers of two are tried until each of ``shards`` holds a multiple of twice the lanes, which that
    product requires.
    """
    while size % shards or (size // shards) % (2 * lanes):
        size = 1 << size.bit_length()  # the next power of two above
    return size


def configuration(vllm_config: Any, maxtext: MaxText, lanes: int = LANES) -> Any:
    """Return MaxText's configuration: its file for inference under vLLM, and ``overrides``.

    Raises InvalidConfig with MaxText's reason where it refuses them.
    """
    given = overrides(vllm_config, lanes)
    try:
        return maxtext.initialize(["", str(maxtext.configs / "inference" / "vllm.yml")], **given)
    except (SystemExit, ValueError) as error:  # MaxText exits the process for a wrong option
        reason = error.__context__ if isinstance(error, SystemExit) else error
        expected = f"options that MaxText takes: {str(reason)[:REASON]}"
        raise InvalidConfig("maxtext_config", given, expected) from reason


def check(config: Any, hf_config: Any, mesh: jax.sharding.Mesh) -> None:
    """Raise InvalidConfig where MaxText's ``config`` contradicts the mesh or vLLM's HF config.

    The rotary embedding is compared with the rule by which `slipway convert` writes and reads
    MaxText's trees.
    """
    if missing := set(config.mesh_axes) - set(mesh.axis_names):
        raise InvalidConfig(
            "mesh",
            mesh.axis_names,
            f"{sorted(missing)} too: tpu-inference makes them with NEW_MODEL_DESIGN=1 set",
        )
    for name, field in (("emb_dim", "hidden_size"), ("num_decoder_layers", "num_hidden_layers")):
        got, expected = getattr(config, name), getattr(hf_config, field)
        if got != expected:
            raise InvalidConfig(
                f"{name} of maxtext_config", got, f"{expected}, the HF config's {field}"
            )
    if getattr(hf_config, "model_type", None) in ROTATED:
        ropes = {
            field: getattr(hf_config, field, None) for field in ("rope_scaling", "rope_parameters")
        }
        expected_rotation = rotation(ropes)
        if expected_rotation not in (None, computed_rotation(config)):
            names = "llama3.1" if expected_rotation == "interleaved" else "default"
            raise InvalidConfig(
                "rope_type of maxtext_config",
                str(getattr(config.rope_type, "value", config.rope_type)),
                f"{names!r} ({expected_rotation}), "
                f"since the HF config's rope_type is {rope_type(ropes)!r}",
            )


def computed_rotation(config: Any) -> Rotation | None:
    """Return the rotation of MaxText's Llama, Mistral, Mixtral under ``config``: pairs or halves.

    None for yarn, which supports both.
    """
    kind = str(getattr(config.rope_type, "value", config.rope_type)).lower()
    if config.model_name.startswith("llama3.1") or kind.startswith("llama3.1"):
        return "interleaved"
    return None if kind.startswith("yarn") else "halves"


class ByLayer:
    """Caches of a step as MaxText's decoder reads and replaces them: by the number of a layer.

    ``places``: the index in ``caches`` of each layer's cache; layers may share one. Raises
    InvalidConfig when None is stored. MaxText 0.2.5's Llama does that where layers are scanned:
    attention would be skipped in the next step.
    """

    def __init__(self, caches: list[Any], places: Mapping[int, int]):
        self.caches = list(caches)
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, layer: int) -> Any:
        return self.caches[self.places[layer]]

    def __setitem__(self, layer: int, cache: Any) -> None:
        if cache is None:
            raise InvalidConfig(
                "load_parameters_path",
                "scanned layers",
                "a checkpoint written with scan_layers=False",
            )
        self.caches[self.places[layer]] = cache


def places(names: Iterable[tuple[str, int]] | None, layers: int) -> dict[int, int]:
    """Return the index of each layer's cache.

    ``names`` are tpu-inference's, "layer.0" and so on; without them the layers are in order.
    """
    found = {
        int(name.removeprefix("layer.")): at
        for name, at in names or ()
        if re.fullmatch(r"layer\.\d+", name)
    }
    return found or {layer: layer for layer in range(layers)}


class MaxTextForCausalLM(nnx.Module):
    """A MaxText decoder with the interface of tpu-inference's models."""

    _self_manages_sharding = True  # made under its own mesh and rules, not in an outer jit

    def __init__(self, vllm_config: Any, rng_key: jax.Array, mesh: jax.sharding.Mesh):
        self.vllm_config = vllm_config
        self.mesh = mesh
        self._maxtext = MaxText.load()
        self.maxtext_config = configuration(vllm_config, self._maxtext)
        check(self.maxtext_config, text_config(vllm_config), mesh)
        self.model: Any = None
        if vllm_config.load_config.load_format == "dummy":
            self.load_weights(rng_key)
        elif not self.maxtext_config.load_parameters_path:
            logger.warning("maxtext_config has no load_parameters_path: the weights will be random")

    def load_weights(self, rng_key: jax.Array) -> None:
        """Make the model; a second call does nothing."""
        if self.model is not None:
            return
        with self._rules():
            model = self._maxtext.from_pretrained(
                self.maxtext_config, mesh=self.mesh, model_mode=self._maxtext.mode, rng_key=rng_key
            )
        self.model = nnx.data(model)

    def __call__(
        self,
        kv_caches: list[jax.Array],
        input_ids: jax.Array | None,
        attention_metadata: Any,
        inputs_embeds: jax.Array | None = None,
        _input_positions: jax.Array | None = None,
        _layer_name_to_kv_cache: Iterable[tuple[str, int]] | None = None,
        *_: Any,
        **__: Any,
    ) -> tuple[list[jax.Array], jax.Array, list[jax.Array], Any]:
        """Run the decoder on flat tokens [T], which MaxText reads as T sequences of one token.

        Return (caches, hidden states [T, embed], no auxiliary states, experts' indices or None).
        """
        model, embeds = self._made(), None
        caches = ByLayer(kv_caches, places(_layer_name_to_kv_cache, len(kv_caches)))
        if inputs_embeds is not None:
            embeds = inputs_embeds[:, None, :].astype(self.maxtext_config.dtype)
            input_ids = jnp.zeros(inputs_embeds.shape[:1], jnp.int32)
        assert input_ids is not None, "either ids or embeddings"
        metadata = attention_metadata
        one = next(iter(metadata.values())) if isinstance(metadata, Mapping) else metadata
        with self._rules():
            found = model(
                decoder_input_tokens=input_ids[:, None],
                decoder_input_embeddings=embeds,
                decoder_positions=one.input_positions[:, None],
                kv_caches=caches,
                attention_metadata=metadata,
                model_mode=self._maxtext.mode,
            )
        hidden, _, experts = found if len(found) == 3 else (*found, None)
        return caches.caches, hidden.reshape(-1, hidden.shape[-1]), [], experts

    def forward(
        self, *args: Any, **kwargs: Any
    ) -> tuple[list[jax.Array], jax.Array, list[jax.Array], Any]:
        """Call the model."""
        return self(*args, **kwargs)

    def compute_logits(self, hidden_states: jax.Array) -> jax.Array:
        """Return logits [T, vocab] of hidden states [T, embed], computed by the decoder's head."""
        model = self._made()
        with self._rules():
            head = model.decoder.apply_output_head
            inputs = model.token_embedder, hidden_states[:, None], True, self._maxtext.mode
            return head(*inputs)[:, 0]

    def embed_input_ids(self, input_ids: jax.Array, *_: Any, **__: Any) -> jax.Array:
        """Return embeddings [T, embed] of token ids [T]."""
        model = self._made()
        with self._rules():
            return model.token_embedder(input_ids)

    def get_input_embeddings(self) -> jax.Array:
        """Return the embedding table."""
        return self._made().token_embedder.embedding

    def _made(self) -> Any:
        if self.model is None:
            raise RuntimeError("the MaxText model has no weights yet: load_weights comes first")
        return self.model

    @contextlib.contextmanager
    def _rules(self) -> Iterator[None]:
        """Enter the mesh and the rules by which MaxText splits arrays over it.

        ``with mesh`` and not ``jax.set_mesh``: MaxText 0.2.5 reads the mesh of the former.
        """
        with self.mesh, nnx.logical_axis_rules(self.maxtext_config.logical_axis_rules):
            yield
