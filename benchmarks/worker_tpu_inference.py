"""Slipway's model class behind tpu-inference's loader, compared with transformers.

It runs in an environment that has vLLM for TPUs. Argument: the number of devices that share each
layer. Prints one JSON object. The steps: two prompts, one of them in two chunks, then one token for
each; the logits of every position are compared.
"""

import dataclasses
import importlib
import json
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slipway.adapters import vllm as adapter
from slipway.adapters.engine_fields import FIELDS

PAGE_SIZE, NUM_PAGES, PAGES_PER_ROW, ROWS = 16, 64, 8, 4
# Tokens of a step, with padding.
STEP_TOKENS = 32
KERNEL = "tpu_inference.kernels.ragged_paged_attention.v3.kernel"
METADATA = "tpu_inference.layers.common.attention_metadata"
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 256,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "Qwen3ForCausalLM": transformers.Qwen3Config(**SIZES, tie_word_embeddings=False),
    "Qwen3MoeForCausalLM": transformers.Qwen3MoeConfig(
        **SIZES,
        **EXPERTS,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    ),
}


def main(devices: int) -> None:
    """Compare and print."""
    adapter.register()
    replace_tpu_parts(importlib.import_module("tpu_inference.models.common.model_loader"))
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), ("data", "model"))
    version = importlib.import_module("importlib.metadata").version
    report = {
        "tpu_inference": version("tpu_inference"),
        "jax": jax.__version__,
        "tensor_parallel_size": devices,
        **{name: measure(name, config, mesh) for name, config in CONFIGS.items()},
    }
    print(json.dumps(report))


def measure(name: str, config: Any, mesh: Mesh) -> dict[str, Any]:
    """Load a random model of one architecture through its registered class, and compare it."""
    loader = importlib.import_module("tpu_inference.models.common.model_loader")
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(config, folder)
        engine = vllm_config(folder, adapter.PREFIX + name)
        with importlib.import_module("vllm.config").set_current_vllm_config(engine):
            interface = loader.get_flax_model(engine, jax.random.PRNGKey(0), mesh)
    return {
        "class": type(interface.model).__name__,
        **compare(model, Runner(interface, mesh, config)),
        "fields_that_the_real_objects_lack": missing_fields(engine),
    }


def compare(model: torch.nn.Module, runner: "Runner") -> dict[str, float]:
    """Run the steps, and return the differences of their logits from transformers'."""
    worst, equal, compared = 0.0, 0, 0
    prompts = [np.random.default_rng(0).integers(0, 512, n).tolist() for n in (37, 5)]
    expected = [logits(model, prompt) for prompt in prompts]
    continued = [[*ids, int(row[-1].argmax())] for ids, row in zip(prompts, expected)]
    # of each step: first position and tokens of each row, expected logits, rows that decode
    steps: list[tuple[list[tuple[int, list[int]]], list[np.ndarray], int]] = [
        ([(0, prompts[0][:20]), (0, prompts[1])], [expected[0][:20], expected[1]], 0),
        ([(20, prompts[0][20:])], [expected[0][20:]], 0),
        (
            [(len(ids) - 1, ids[-1:]) for ids in continued],
            [logits(model, ids)[-1:] for ids in continued],
            2,
        ),
    ]
    for chunks, references, decoding in steps:
        found, reference = runner.step(chunks, decoding), np.concatenate(references)
        worst = max(worst, float(np.abs(found - reference).max()))
        equal += int((found.argmax(-1) == reference.argmax(-1)).sum())
        compared += len(reference)
    return {"positions": compared, "argmax_equal": equal, "max_logit_difference": worst}


def random_model(config: Any, folder: str) -> torch.nn.Module:
    """Save and return a model with random weights that are representable in bfloat16.

    Their spread makes the margins of greedy choices larger than rounding errors.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.normal_(std=0.1).bfloat16())
    model.save_pretrained(folder)
    return model


def vllm_config(folder: str, architecture: str, **options: Any) -> Any:
    """Return vLLM's configuration for a directory and one of our registered architectures."""
    arguments = importlib.import_module("vllm.engine.arg_utils").EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        hf_overrides={"architectures": [architecture]},
        **options,
    )
    return arguments.create_engine_config()


def replace_tpu_parts(loader: Any) -> None:
    """Remove compiler options for TPUs, and replace the attention kernel by its reference.

    The reference reads the values of its arguments, so it runs as a callback on the host.
    """
    loader.get_step_fn_compiler_options = dict
    kernels = importlib.import_module(KERNEL)

    def attend(q, k, v, cache, *where, update_kv_cache=True, **options):
        assert update_kv_cache, "the reference always writes its cache"

        def on_host(*args):
            out, new = kernels.ref_ragged_paged_attention(*map(jnp.asarray, args), **options)
            # the reference returns no rows for padding
            whole = np.zeros(q.shape, q.dtype)
            whole[: len(out)] = np.asarray(out)
            return whole, np.asarray(new)

        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, cache))
        arguments = (q, k, v, cache, *where)
        return jax.pure_callback(on_host, shapes, *arguments)

    interface: Any = importlib.import_module("tpu_inference.layers.common.attention_interface")
    interface.ragged_paged_attention = attend


class Runner:
    """A caller of the model that does what tpu-inference's runner does."""

    def __init__(self, interface: Any, mesh: Mesh, config: Any):
        self._metadata = importlib.import_module(METADATA).AttentionMetadata
        # every shard has a head at least
        heads = max(config.num_key_value_heads, mesh.shape["model"])
        shape = importlib.import_module(KERNEL).get_kv_cache_shape(
            *(NUM_PAGES, PAGE_SIZE, heads, config.head_dim, jnp.float32)
        )
        self._interface = interface
        self._rows = NamedSharding(mesh, P("data"))
        split = NamedSharding(mesh, P("data", None, "model", None, None))
        layers = range(config.num_hidden_layers)
        self._caches = [jax.device_put(jnp.zeros(shape), split) for _ in layers]
        self._tables = 1 + np.arange(ROWS * PAGES_PER_ROW, dtype=np.int32)

    def step(self, chunks: list[tuple[int, list[int]]], decoding: int) -> np.ndarray:
        """Return the logits of all tokens of a step.

        ``chunks``: of each row, the position of the first token, and token ids. ``decoding``:
        number of rows that decode; they come first.
        """
        ids, positions = list[int](), list[int]()
        lengths, starts = np.zeros(ROWS, np.int32), np.ones(ROWS + 1, np.int32)
        starts[0] = 0
        for row, (first, tokens) in enumerate(chunks):
            ids += tokens
            positions += range(first, first + len(tokens))
            lengths[row] = first + len(tokens)
            starts[row + 1] = len(ids)
        padding = [0] * (STEP_TOKENS - len(ids))
        counts = np.array([decoding, decoding, len(chunks)], np.int32)
        where = [np.array(positions + padding, np.int32), self._tables, lengths, starts, counts]
        metadata = self._metadata(*(jax.device_put(x, self._rows) for x in where))
        tokens_T = jax.device_put(np.array(ids + padding, np.int32), self._rows)
        leaves, nothing = self._interface.state_leaves, (None,) * 5
        arguments = (leaves, self._caches, tokens_T, metadata, *nothing, True, True)
        self._caches, hidden, *_ = self._interface.model_fn(*arguments)
        result = self._interface.compute_logits_fn(leaves, hidden, None)
        return np.asarray(result)[: len(ids)]


def logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """Return transformers' logits of every position."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def missing_fields(config: Any) -> list[str]:
    """Return fields that the adapters read and vLLM's and tpu-inference's objects do not have."""
    metadata = importlib.import_module(METADATA).AttentionMetadata
    names = SimpleNamespace(**{field.name: None for field in dataclasses.fields(metadata)})
    objects = {
        "VllmConfig": config,
        "ModelConfig": config.model_config,
        "LoadConfig": config.load_config,
        "ShardingConfig": config.sharding_config,
        "AttentionMetadata": names,
    }
    # hasattr, because some of the real fields are properties
    return [
        f"{name}.{field}"
        for name, fields in FIELDS.items()
        for field in fields
        if not hasattr(objects[name], field)
    ]


if __name__ == "__main__":
    main(int(sys.argv[1]))
