"""The shipped model: transformers loads it unchanged and completes as we do, text and chat."""

from pathlib import Path

import pytest
import transformers

from slipway import LLM, SamplingParams
from slipway.checkpoint import files
from slipway.llm import NANO
from tests.models import runner

PROMPTS = ["def read_lines(path):", "import os", "class Stack:\n    def push(self, item):", "x"]
pytestmark = pytest.mark.xdist_group("nano")


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Nano in float32."""
    return LLM(
        dtype="float32",
        max_num_seqs=4,
        max_num_batched_tokens=8,
        max_model_len=256,
        memory_fraction=0.1,
    )


@pytest.fixture(scope="module")
def theirs() -> transformers.PreTrainedModel:
    """transformers' nano, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(NANO, dtype="float32").eval()


def test_it_is_an_ordinary_directory():
    needed = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
    present = {path.name for path in Path(NANO).iterdir()}
    assert needed | {"chat_template.jinja", "README.md"} <= present
    tensors = files.open_checkpoint(Path(NANO)).tensors.values()
    assert {tensor.dtype for tensor in tensors} == {"BF16"}
    assert all(tensor.start % 64 == 0 for tensor in tensors), "mapped, not copied"


def test_greedy_completions_equal_transformers(llm, theirs):
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO)
    params = SamplingParams(temperature=0, max_tokens=48)
    for output, prompt in zip(llm.generate(PROMPTS, params, use_tqdm=False), PROMPTS, strict=True):
        assert output.prompt_token_ids == tokenizer(prompt).input_ids
        ids = output.outputs[0].token_ids
        assert ids == runner.their_tokens(theirs, output.prompt_token_ids, 48)
        assert output.outputs[0].text == tokenizer.decode(ids, skip_special_tokens=True)


def test_chat_prompt_equals_transformers(llm):
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO)
    messages = [{"role": "user", "content": "Write a Python function `area(width, height)`."}]
    prompt = llm.chat_prompt(messages)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert (prompt["prompt"], prompt["prompt_token_ids"]) == (
        expected,
        tokenizer(expected).input_ids,
    )
    assert llm.chat(messages, SamplingParams(max_tokens=4), use_tqdm=False)[0].outputs[0].token_ids
