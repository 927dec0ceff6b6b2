"""Options of the engine: their ranges, defaults and contradictions.

Not here: the flags made from them (flags.py), limits that depend on the model (launch.py).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from slipway.engine.drafts.config import SpeculativeConfig
from slipway.errors import InvalidConfig

MAX_DECODE_STEPS = 64
# Bounds of what runs and waits, for AsyncEngine and the server: requests, and their prompt tokens.
MAX_QUEUED_REQUESTS = 1024
MAX_QUEUED_TOKENS = 2**20
MAX_LOGPROBS = 20  # for a request, unless max_logprobs -1 allows the whole vocabulary

# Fields that are integers of at least 1.
COUNTS = (
    "tensor_parallel_size",
    "expert_parallel_size",
    "data_parallel_size",
    "nnodes",
    "max_num_seqs",
    "max_num_batched_tokens",
    "stream_interval",
    "page_size",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of loading and running a model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights, activations and cache. auto: the dtype of config.json, else that of most
    tensors."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto: the directory's safetensors; dummy: random weights, no weight file is read."""
    quantization: Literal["int8", "int4"] | None = None
    """Pack the weights while loading. int8: one scale for each row; int4: one scale for 32 numbers,
    and int8 for the token tables. None: as the files are."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tensor_parallel_size: int = 1
    """Devices that each layer is split over."""
    expert_parallel_size: int = 1
    """Groups of the tensor_parallel_size devices that hold different experts; the devices of one
    group split each of its experts."""
    expert_exchange: Literal["auto", "sum", "all-to-all"] = "auto"
    """How groups of devices with different experts join their results: by one sum over the devices,
    or all-to-all, where each device sends a token's result to the one that adds it. auto: the
    latter on a TPU in steps in which it moves at least 1 MiB less in a layer."""
    data_parallel_size: int = 1
    """Copies of the weights; each serves its own requests."""
    nnodes: int = 1
    """Processes that form one engine, each with its own devices."""
    node_rank: int = 0
    """Number of this process, from 0. Process 0 schedules and answers, the others follow it."""
    dist_init_addr: str = ""
    """host:port of process 0, where the processes connect."""
    max_model_len: int | None = None
    """Longest prompt plus output in tokens; default: the model's context length."""
    max_num_seqs: int = 64
    """Sequences that run at once, for each copy of the weights."""
    max_num_batched_tokens: int = 512
    """Most tokens of one step, chunks of prompts included, for each copy of the weights."""
    decode_steps: int | Literal["auto"] = "auto"
    """Decode steps in one call of the device, while all running sequences decode, none waits, and
    at most 32 run. A new request starts, and an aborted one ends, after at most twice as many
    tokens. 1: single steps; auto: 8 on one CPU device with at most 32 MiB of weights, else 1. Above
    1, one more program is compiled."""
    speculative_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Speculative decoding, with the fields of vLLM's --speculative-config
    (engine/drafts/config.py): {"method": "ngram", "num_speculative_tokens": 8}. Outputs do not
    change. Empty: off."""
    stream_interval: int = 1
    """Tokens of a sequence from one delta to the next; the first token and the end of the output
    are sent at once. A larger interval saves time of the host where steps are short and streams
    many."""
    max_logprobs: int = MAX_LOGPROBS
    """Most of the likeliest tokens that a request may ask for beside each token, 0 to 20. -1: up to
    the whole vocabulary (logprobs -1), which costs a sort of the vocabulary for each token, and an
    entry of the response for each token of the vocabulary."""
    page_size: int = 16
    """Tokens per page of the cache."""
    enable_prefix_caching: bool = True
    """Keep computed pages, and share them between prompts that begin with the same tokens."""
    memory_fraction: float | None = None
    """Share of the free memory that weights, cache and temporaries may take; default 0.25 on a CPU,
    else 0.9. On a CPU the system provides the cache's memory while the engine idles, or when a page
    is first written."""
    compilation_cache: str = "auto"
    """Where compiled programs are kept for the next start: a directory, auto (the user's cache), or
    off."""
    seed: int = 0
    """Seed of requests without a seed of their own, and of dummy weights."""
    skip_tokenizer_init: bool = False
    """Read no tokenizer: requests and outputs are token ids."""
    hf_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields to replace in config.json; None removes one."""

    def __post_init__(self):
        for name in ("hf_overrides", "speculative_config"):
            # vLLM's callers pass None.
            if getattr(self, name) is None:
                object.__setattr__(self, name, {})
        for field, fine, expected in self._checks():
            if not fine:
                raise InvalidConfig(field, getattr(self, field), expected)

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """Options of speculative decoding, None if it is off."""
        given = self.speculative_config
        return SpeculativeConfig.read(given) if given else None

    @property
    def max_rows(self) -> int:
        """Most rows of results of a step, for each copy of the weights."""
        drafts = 0 if self.speculation is None else self.speculation.num_speculative_tokens
        return min(self.max_num_batched_tokens, self.max_num_seqs * (1 + drafts))

    def _checks(self) -> Iterator[tuple[str, bool, str]]:
        """Yield name, validity and expected value of each field.

        A check may rely on those before it.
        """
        for name in COUNTS:
            yield name, _is_integer(getattr(self, name), 1), "an integer of at least 1"
        yield (
            "max_logprobs",
            _is_integer(self.max_logprobs, -1, MAX_LOGPROBS),
            f"an integer from 0 to {MAX_LOGPROBS}, or -1 for the whole vocabulary",
        )
        steps = self.decode_steps
        fine = steps == "auto" or _is_integer(steps, 1, MAX_DECODE_STEPS)
        yield "decode_steps", fine, f"an integer from 1 to {MAX_DECODE_STEPS}, or auto"
        last = self.nnodes - 1
        yield "node_rank", _is_integer(self.node_rank, 0, last), f"0 to nnodes - 1 ({last})"
        address = self.dist_init_addr if isinstance(self.dist_init_addr, str) else ""
        host, _, port = address.rpartition(":")
        fine = self.nnodes == 1 or (bool(host) and port.isdigit())
        yield "dist_init_addr", fine, "host:port, for more than one node"
        fine = self.max_model_len is None or _is_integer(self.max_model_len, 1)
        yield "max_model_len", fine, "at least 1, or None"
        fraction = self.memory_fraction
        fine = fraction is None or (type(fraction) in (int, float) and 0 < fraction <= 1)
        yield "memory_fraction", fine, "more than 0, at most 1, or None"
        fine = isinstance(self.speculative_config, Mapping)
        yield "speculative_config", fine, "a mapping"
        assert self.speculation or not self.speculative_config  # raises InvalidConfig
        yield "hf_overrides", isinstance(self.hf_overrides, Mapping), "a mapping"
        yield "seed", _is_integer(self.seed, 0, 2**32 - 1), "an integer from 0 to 2**32 - 1"
        fine = self.dtype in ("auto", "float32", "bfloat16", "float16")
        yield "dtype", fine, "a float type, or auto"
        fine = self.expert_exchange in ("auto", "sum", "all-to-all")
        yield "expert_exchange", fine, "auto, sum or all-to-all"
        fine = self.expert_exchange != "all-to-all" or self.expert_parallel_size > 1
        yield "expert_exchange", fine, "auto or sum where expert_parallel_size is 1"
        yield "quantization", self.quantization in (None, "int8", "int4"), "int8, int4 or None"
        fine = isinstance(self.enable_prefix_caching, bool)
        yield "enable_prefix_caching", fine, "True or False"
        kept = self.compilation_cache
        fine = isinstance(kept, str) and bool(kept)
        yield "compilation_cache", fine, "a directory, auto or off"
        yield "load_format", self.load_format in ("auto", "dummy"), "auto or dummy"
        yield (
            "max_num_batched_tokens",
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"at least max_num_seqs ({self.max_num_seqs}), "
            "or running requests could not all decode",
        )


def _is_integer(value: object, low: int, high: float = math.inf) -> bool:
    return type(value) is int and low <= value <= high
