"""Slipway serves JAX language models."""

from typing import Any

from slipway.codec.grammar import StructuredOutputs
from slipway.engine.params import SamplingParams
from slipway.llm import LLM

__all__ = ["LLM", "SamplingParams", "StructuredOutputs", "export"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`slipway.export` needs Flax, which serving does not: it is imported when it is asked for."""
    if name != "export":
        raise AttributeError(f"module 'slipway' has no attribute {name!r}")
    from slipway.convert.export import export

    return export
