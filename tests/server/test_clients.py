"""Clients of other projects: LangChain's ChatOpenAI, and lm-eval's local-completions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from slipway import LLM, SamplingParams
from slipway.llm import NANO
from tests.server.conftest import templated

pytestmark = pytest.mark.xdist_group("server")
TEMPLATE = """{#- <tool_call> -#}
{%- if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content or '' }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


class Answer(BaseModel):
    """Structured output with a bounded number."""

    number: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def tools_server(tmp_path_factory):
    with templated(TEMPLATE, tmp_path_factory) as server:
        yield server


@pytest.fixture(scope="module")
def chat(tools_server):
    return ChatOpenAI(
        model="nano",
        base_url=f"{tools_server.url}/v1",
        api_key="none",
        temperature=0,
        max_retries=0,
        max_tokens=60,
        stream_usage=True,
    )


@pytest.fixture(scope="module")
def offline():
    return LLM(dtype="float32", max_num_seqs=8, max_num_batched_tokens=64)


def test_langchain_invokes_and_streams(chat, offline):
    messages = [{"role": "user", "content": "def read(path):"}]
    params = SamplingParams(temperature=0, max_tokens=60)
    prompt = "user: def read(path):\nassistant: "
    expected = offline.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    answer = chat.invoke(messages)
    assert answer.content == expected.text
    assert answer.usage_metadata["output_tokens"] == len(expected.token_ids)
    chunks = list(chat.stream(messages))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    assert len(chunks) > 2
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [usage["output_tokens"] for usage in usages] == [len(expected.token_ids)]
    stop = answer.content[3:]
    assert chat.bind(stop=[stop]).invoke(messages).content == answer.content.partition(stop)[0]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_structured_output(chat, method):
    found = chat.with_structured_output(Answer, method=method).invoke("Give me a number.")
    assert isinstance(found, Answer)
    assert 0 <= found.number <= 9


def test_langchain_binds_tools(chat):
    answer = chat.bind_tools([Answer], tool_choice="required").invoke("Give me a number.")
    (call,) = answer.tool_calls
    assert call["name"] == "Answer"
    assert 0 <= Answer(**call["args"]).number <= 9
    assert call["id"]


DOCS = [
    {"context": "import", "continuation": " os"},
    {"context": "def f(self", "continuation": "):\n    return"},
    {"context": "class A", "continuation": ":\n    pass"},
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
target_delimiter: ""
{more}
"""
MORE = {
    "loglikelihood": "metric_list: [{metric: acc}, {metric: perplexity}]",
    "generate_until": 'generation_kwargs: {until: ["return"], max_gen_toks: 16, do_sample: false}\n'
    "metric_list: [{metric: exact_match}]",
}


def lm_eval(server, folder, kind):
    """Run lm-eval; return the responses it logged, in the order of the documents."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (folder / f"{kind}.yaml").write_text(
        TASK.format(name=kind, data=data, kind=kind, more=MORE[kind])
    )
    url = f"{server.url}/v1/completions"
    arguments = f"model=nano,base_url={url},tokenizer={NANO},num_concurrent=2,max_retries=1"
    command = [
        *(sys.executable, "-m", "lm_eval"),
        *("--model", "local-completions", "--model_args", arguments, "--tasks", kind),
        *("--include_path", folder, "--output_path", folder / "out"),
        *("--log_samples", "--batch_size", "1"),
    ]
    offline = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | offline,
        timeout=300,
        cwd=folder,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in Path(samples).read_text().splitlines()]
    return [each["resps"][0][0] for each in sorted(found, key=lambda each: each["doc_id"])]


def test_lm_eval_reads_loglikelihoods(server, offline, tmp_path):
    tokenizer = offline.engine.tokenizer
    for doc, found in zip(DOCS, lm_eval(server, tmp_path, "loglikelihood")):
        context, whole = (
            tokenizer.encode(text)
            for text in (doc["context"], doc["context"] + doc["continuation"])
        )
        assert context == whole[: len(context)], "the continuation begins with a new token"
        params = SamplingParams(max_tokens=1, prompt_logprobs=1)
        (scored,) = offline.generate({"prompt_token_ids": whole}, params, use_tqdm=False)
        entries = [
            entry[token] for token, entry in zip(whole, scored.prompt_logprobs) if entry is not None
        ]
        expected = entries[len(context) - 1 :]
        np.testing.assert_allclose(
            float(found[0]), sum(entry.logprob for entry in expected), atol=1e-3
        )
        assert str(found[1]) == str(all(entry.rank == 1 for entry in expected))


def test_lm_eval_generates(server, offline, tmp_path):
    params = SamplingParams(temperature=0, max_tokens=16, stop=["return"])
    expected = offline.generate([doc["context"] for doc in DOCS], params, use_tqdm=False)
    assert lm_eval(server, tmp_path, "generate_until") == [
        output.outputs[0].text for output in expected
    ]
