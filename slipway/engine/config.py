"""The engine's options, their ranges and which contradict each other; knows no model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from slipway.errors import InvalidConfig

MAX_DECODE_STEPS = 64
MAX_LOGPROBS = 20  # unless a request may ask for the whole vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is loaded and run."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights, activations and cache; auto: what config.json says, else the tensors."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto: the directory's safetensors; dummy: random weights, no weight file is read."""
    quantization: Literal["int8", "int4"] | None = None
    """Pack the weights while loading: int8, a scale for each row; int4, one for 32 numbers, tables in int8. None: as
    the files are."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tensor_parallel_size: int = 1
    """Devices that share each layer."""
    data_parallel_size: int = 1
    """Copies of the weights, each serving its own requests."""
    nnodes: int = 1
    """Processes that are one engine together, each with its devices."""
    node_rank: int = 0
    """Which of them this is; 0 schedules and answers, the others follow."""
    dist_init_addr: str = ""
    """host:port of process 0, where all meet."""
    max_model_len: int | None = None
    """Longest prompt plus output in tokens; default: what the model can read."""
    max_num_seqs: int = 64
    """Sequences that run at once, per copy of the weights."""
    max_num_batched_tokens: int = 512
    """Tokens of one step, prompts' chunks included."""
    decode_steps: int | Literal["auto"] = "auto"
    """Tokens of each sequence that one call of the device may compute while all only decode, nobody waits, and at most
    32 run; who arrives or is aborted meanwhile waits for twice as many at the most. 1: single steps; auto: 8 on one
    CPU device with at most 32 MiB of weights, else 1. Above 1, one more program is compiled."""
    stream_interval: int = 1
    """Tokens of a sequence from one delta to the next, after its first; its last come at once. More cost the host less,
    where steps are short and streams many."""
    max_logprobs: int = MAX_LOGPROBS
    """The most of the likeliest tokens that a request may ask for beside each token, at most 20; -1: up to the whole
    vocabulary (logprobs -1), which costs each token's row a sort, and its answer as many entries."""
    page_size: int = 16
    """Tokens per page of the cache."""
    enable_prefix_caching: bool = True
    """Keep the pages of what was computed, for prompts that begin alike."""
    memory_fraction: float | None = None
    """Share of the free memory that weights, cache and temporaries may take; default 0.25 on a CPU, else 0.9. A CPU's
    cache takes its part while nothing runs, or as it is written."""
    compilation_cache: str = "auto"
    """Where compiled programs are kept for the next start: a directory, auto (the user's cache), or off."""
    seed: int = 0
    """Of requests that bring none, and of dummy weights."""
    skip_tokenizer_init: bool = False
    """Token ids in, token ids out; no tokenizer is read."""
    hf_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields to replace in config.json; None removes one."""

    def __post_init__(self):
        for name in (
            "tensor_parallel_size",
            "data_parallel_size",
            "nnodes",
            "max_num_seqs",
            "max_num_batched_tokens",
            "stream_interval",
            "page_size",
        ):
            _need(name, value := getattr(self, name), type(value) is int and value >= 1, "an integer of at least 1")
        steps = self.decode_steps
        fine = steps == "auto" or (type(steps) is int and 1 <= steps <= MAX_DECODE_STEPS)
        top = self.max_logprobs
        fine_top = type(top) is int and -1 <= top <= MAX_LOGPROBS
        _need("max_logprobs", top, fine_top, f"an integer from 0 to {MAX_LOGPROBS}, or -1 for the whole vocabulary")
        _need("decode_steps", steps, fine, f"an integer from 1 to {MAX_DECODE_STEPS}, or auto")
        rank, address = self.node_rank, self.dist_init_addr
        _need("node_rank", rank, type(rank) is int and 0 <= rank < self.nnodes, f"0 to nnodes - 1 ({self.nnodes - 1})")
        host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
        fine = self.nnodes == 1 or (bool(host) and port.isdigit())
        _need("dist_init_addr", address, fine, "host:port, for more than one node")
        length, fraction = self.max_model_len, self.memory_fraction
        _need("max_model_len", length, length is None or (type(length) is int and length >= 1), "at least 1, or None")
        fine = fraction is None or (type(fraction) in (int, float) and 0 < fraction <= 1)
        _need("memory_fraction", fraction, fine, "more than 0, at most 1, or None")
        _need("hf_overrides", self.hf_overrides, isinstance(self.hf_overrides, Mapping), "a mapping")
        _need("seed", self.seed, type(self.seed) is int and 0 <= self.seed < 2**32, "an integer from 0 to 2**32 - 1")
        _need("dtype", self.dtype, self.dtype in ("auto", "float32", "bfloat16", "float16"), "a float type, or auto")
        packed = self.quantization
        _need("quantization", packed, packed in (None, "int8", "int4"), "int8, int4 or None")
        caching = self.enable_prefix_caching
        _need("enable_prefix_caching", caching, isinstance(caching, bool), "True or False")
        kept = self.compilation_cache
        _need("compilation_cache", kept, isinstance(kept, str) and bool(kept), "a directory, auto or off")
        _need("load_format", self.load_format, self.load_format in ("auto", "dummy"), "auto or dummy")
        tokens = self.max_num_batched_tokens
        expected = f"at least max_num_seqs ({self.max_num_seqs}), or running requests could not all decode"
        _need("max_num_batched_tokens", tokens, tokens >= self.max_num_seqs, expected)


def _need(field: str, value: object, fine: bool, expected: str) -> None:
    if not fine:
        raise InvalidConfig(field, value, expected)
