"""Slipway serves JAX language models."""

from slipway.engine.request import SamplingParams
from slipway.llm import LLM

__all__ = ["LLM", "SamplingParams"]
__version__ = "0.1.0"
