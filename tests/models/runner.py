"""Shared check of a model against transformers, with tiny random checkpoints.

An architecture is described by its transformers configuration only.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jax.sharding import PartitionSpec as P

from slipway import LLM, SamplingParams, mesh, models, ops
from slipway.checkpoint import files, save, tensor_reader
from slipway.nn import moe
from slipway.nn.expert_exchange import Exchange
from slipway.ops import backend, kv_cache
from slipway.ops.addresses import by_address
from slipway.runtime import load

PROMPT_LENGTHS = (1, 2, 3, 7, 16, 33, 64, 100)
OUTPUT_TOKENS = 64
PAGE_SIZE, PAGES = 16, 8  # a context of 128 for the bare forward pass
TOKENS = PAGE_SIZE * PAGES


@dataclasses.dataclass(frozen=True)
class Case:
    """One tiny model: a transformers model type and what differs from BASE."""

    name: str
    model_type: str
    fields: dict[str, Any]


BASE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def make_checkpoint(
    case: Case, directory: Path, dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    """Write a random checkpoint and return transformers' model of it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(case.model_type, **(BASE | case.fields))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # biases start at 0 and norms at 1: make them count
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias") or (parameter.ndim == 1 and "inv_freq" not in name):
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.to(dtype).save_pretrained(directory)
    return model


def prompts() -> list[list[int]]:
    """Eight prompts of length 1 to 100."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, BASE["vocab_size"], length).tolist() for length in PROMPT_LENGTHS]


def their_logits(model: transformers.PreTrainedModel, prompt: list[int]) -> np.ndarray:
    """Return the logits [T, V] of transformers."""
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0].float().numpy()


def their_tokens(
    model: transformers.PreTrainedModel, prompt: list[int], count: int = OUTPUT_TOKENS
) -> list[int]:
    """Return the greedy continuation of transformers."""
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
        return out[0, len(prompt) :].tolist()


def engine_of(directory: Path, **options: Any) -> LLM:
    """Start our engine, with steps so short that prompts are fed in chunks."""
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 8, "max_model_len": 176} | options
    return LLM(directory, skip_tokenizer_init=True, memory_fraction=0.1, **options)


def greedy(llm: LLM, asked: list[list[int]], count: int) -> list[list[int]]:
    """Return the greedy continuations of an engine, all in one run."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(asked, params, use_tqdm=False)]


def our_tokens(
    directory: Path, asked: list[list[int]], count: int = OUTPUT_TOKENS, **options: Any
) -> list[list[int]]:
    """Return the greedy continuations of a new engine."""
    return greedy(engine_of(directory, **options), asked, count)


class Forward:
    """Forward pass without the engine, over a cache for one sequence: logits of all its tokens.

    ``separate``: layers and experts in the form of a CPU, else stacked. ``exchange``: how the
    results of experts on several devices are joined.
    """

    def __init__(
        self,
        directory: Path,
        dtype: Any = np.float32,
        tensor: int = 1,
        separate: bool = True,
        expert: int = 1,
        exchange: Exchange = "sum",
    ):
        checkpoint = files.open_checkpoint(directory)
        self.mesh = mesh.make_mesh(1, tensor, expert=expert)
        declaration = moe.with_exchange(models.declare(checkpoint.config), exchange)
        form = backend.of("cpu").layer_form if separate else None
        self.declaration = load.on_mesh(declaration, self.mesh, dtype, form)
        ignored = declaration.config.unused_tensors
        self.params = tensor_reader.load(
            self.declaration, checkpoint, self.mesh, dtype, ignore=ignored
        )
        self._weights = by_address(self.params, self.mesh)
        self.empty_caches = kv_cache.allocate(
            declaration.cache_specs,
            [PAGES] * len(kv_cache.page_windows(declaration.cache_specs)),
            platform="cpu",
            page_size=PAGE_SIZE,
            dtype=jnp.dtype(dtype),
            tensor=tensor,
        )
        specs = jax.tree.map(lambda array: array.sharding.spec, self._weights)
        caches = tuple(
            dataclasses.replace(cache, kv=mesh.spec(cache.axes, self.mesh))
            for cache in self.empty_caches
        )
        self._num_numberings = len(kv_cache.page_windows(declaration.cache_specs))
        self._run = jax.jit(
            jax.shard_map(
                _logits,
                mesh=self.mesh,
                in_specs=(specs, caches, P()),
                out_specs=(P(), caches),
                check_vma=False,
            )
        )

    def __call__(self, prompt: list[int], chunks: list[int] | None = None) -> np.ndarray:
        """Return the logits [T, V] of a prompt, fed in chunks of these sizes; None: at once."""
        caches, parts, done = self.empty_caches, [], 0
        for count in chunks or [len(prompt)]:
            ids = np.zeros(TOKENS, np.int32)
            ids[:count] = prompt[done : done + count]
            step = _step(
                ids, done, count, prompt_length=len(prompt), num_numberings=self._num_numberings
            )
            logits, caches = self._run(self._weights, caches, step)
            parts.append(np.asarray(logits)[:count])
            done += count
        return np.concatenate(parts)

    def saved(self) -> dict[str, np.ndarray]:
        """Return the loaded tree as HF tensors."""
        return dict(save.hf_tensors(self.declaration, self.params))


def _logits(model: Any, caches: Any, step: ops.StepInput) -> tuple[jax.Array, Any]:
    x_TD, caches = model(step, caches)
    return model.logits(x_TD, jnp.int32(x_TD.shape[0])), caches


def _step(
    ids_T: np.ndarray, done: int, count: int, *, prompt_length: int, num_numberings: int
) -> ops.StepInput:
    positions = done + np.arange(TOKENS, dtype=np.int32)
    live = np.arange(TOKENS) < count
    row = np.array([0], np.int32)
    slots_T = np.where(live, positions, TOKENS).astype(np.int32)
    pages = ops.PageMap(slots_T, np.arange(PAGES, dtype=np.int32)[None])
    return ops.StepInput(
        num_tokens_1=row + np.int32(count),
        ids_T=ids_T,
        positions_T=np.where(live, positions, 0).astype(np.int32),
        prompt_lengths_T=np.full(TOKENS, prompt_length, np.int32),
        row_T=np.zeros(TOKENS, np.int32),
        pages=(pages,) * num_numberings,
        num_samples_1=row,
        sample_at_B=row,
        starts_B=row,
        counts_B=row + np.int32(count),
        lengths_B=row + np.int32(done + count),
    )
