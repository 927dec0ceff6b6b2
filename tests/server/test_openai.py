"""OpenAI's SDK against the server, with the same engine offline as the reference."""

import asyncio
import base64

import numpy as np
import openai
import pytest

from slipway import LLM, SamplingParams

pytestmark = pytest.mark.xdist_group("server")
PROMPT = "def read(path):"
CHAT = [{"role": "user", "content": "Write a function that adds two numbers."}]


@pytest.fixture(scope="module")
def client(_server):
    with openai.OpenAI(base_url=f"{_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def offline():
    return LLM(dtype="float32", max_num_seqs=8, max_num_batched_tokens=64)


def params(**fields):
    return SamplingParams(**({"temperature": 0, "max_tokens": 12} | fields))


def test_a_completion_equals_offline_generate(client, offline, server):
    expected = offline.generate(PROMPT, params())[0]
    answer = client.completions.create(model="nano", prompt=PROMPT, temperature=0, max_tokens=12)
    (choice,) = answer.choices
    assert choice.text == expected.outputs[0].text
    assert (choice.finish_reason, choice.index) == ("length", 0)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "nano"
    usage = answer.usage
    assert usage.prompt_tokens == len(expected.prompt_token_ids)
    assert (usage.completion_tokens, usage.total_tokens) == (12, usage.prompt_tokens + 12)


def test_streams_add_up_to_the_whole_response(client, server):
    whole = client.completions.create(
        model="nano", prompt=PROMPT, temperature=0, max_tokens=20, n=2, logprobs=1
    )
    stream = client.completions.create(
        model="nano",
        prompt=PROMPT,
        temperature=0,
        max_tokens=20,
        n=2,
        logprobs=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, tokens, reasons, usage = {0: "", 1: ""}, {0: [], 1: []}, {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert reasons[choice.index] == choice.finish_reason == "length"
        assert tokens[choice.index] == choice.logprobs.tokens
        assert len(choice.logprobs.tokens) == 20
    assert usage == whole.usage or (usage.completion_tokens == whole.usage.completion_tokens == 40)


def test_a_chat_equals_offline_chat(client, offline, server):
    expected = offline.chat(CHAT, params(max_tokens=24))[0].outputs[0].text
    answer = client.chat.completions.create(
        model="nano", messages=CHAT, temperature=0, max_completion_tokens=24
    )
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model="nano", messages=CHAT, temperature=0, max_tokens=24, stream=True
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason


def test_logprobs_equal_those_of_the_engine(client, offline, server):
    expected = offline.generate(PROMPT, params(logprobs=3, max_tokens=5))[0].outputs[0]
    own = [entry[token].logprob for token, entry in zip(expected.token_ids, expected.logprobs)]
    legacy = client.completions.create(
        model="nano", prompt=PROMPT, temperature=0, max_tokens=5, logprobs=3
    )
    np.testing.assert_allclose(legacy.choices[0].logprobs.token_logprobs, own, atol=1e-5)
    assert all(len(entry) in (3, 4) for entry in legacy.choices[0].logprobs.top_logprobs)
    expected = offline.chat(CHAT, params(logprobs=3, max_tokens=5))[0].outputs[0]
    chat = client.chat.completions.create(
        model="nano", messages=CHAT, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    own = [entry[token].logprob for token, entry in zip(expected.token_ids, expected.logprobs)]
    np.testing.assert_allclose([entry.logprob for entry in content], own, atol=1e-5)
    for entry, token in zip(content, expected.token_ids):
        assert bytes(entry.bytes) == offline.engine.tokenizer.token_bytes(token)
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert len(tops) == 3
        assert entry.top_logprobs[0].token == entry.token


def test_echo_scores_the_prompt_as_lm_eval_needs(client, offline, server):
    expected = offline.generate(PROMPT, params(prompt_logprobs=1, logprobs=1, max_tokens=1))[0]
    answer = client.completions.create(
        model="nano", prompt=PROMPT, temperature=0, max_tokens=1, logprobs=1, echo=True
    )
    (choice,) = answer.choices
    ids = [*expected.prompt_token_ids, *expected.outputs[0].token_ids]
    entries = [*expected.prompt_logprobs, *expected.outputs[0].logprobs]
    assert choice.text == PROMPT + expected.outputs[0].text
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == len(ids)
    wanted = [entry[token].logprob for token, entry in zip(ids[1:], entries[1:])]
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], wanted, atol=1e-5)
    assert "".join(choice.logprobs.tokens) == choice.text
    starts = choice.logprobs.text_offset
    assert all(
        choice.text[start:].startswith(token)
        for start, token in zip(starts, choice.logprobs.tokens)
    )
    only = client.completions.create(
        model="nano", prompt=PROMPT, temperature=0, max_tokens=0, echo=True
    )
    assert only.choices[0].text == PROMPT


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_streamed_echo_adds_up_to_the_whole_response(client, server, logprobs):
    # A prompt that is scored in several steps, while a sample of it is generated already.
    long = "import os\n\n" + "x = read(path)\n" * 12 + PROMPT
    request = dict(
        model="nano",
        prompt=[long, "class A:"],
        temperature=0,
        max_tokens=6,
        n=2,
        logprobs=logprobs,
        echo=True,
    )
    whole = client.completions.create(**request).choices
    assert all(choice.text.startswith(request["prompt"][choice.index // 2]) for choice in whole)
    assert all((choice.logprobs is None) == (logprobs is None) for choice in whole)
    texts, tokens, scores = ({index: [] for index in range(4)} for _ in range(3))
    for chunk in client.completions.create(**request, stream=True):
        for choice in chunk.choices:
            texts[choice.index].append(choice.text)
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens
                scores[choice.index] += choice.logprobs.token_logprobs
    assert ["".join(texts[choice.index]) for choice in whole] == [choice.text for choice in whole]
    assert all(len(pieces) > 1 for pieces in texts.values()), (
        "each text must arrive in several events"
    )
    for choice in whole if logprobs is not None else ():
        assert tokens[choice.index] == choice.logprobs.tokens
        assert "".join(tokens[choice.index]) == choice.text
        assert scores[choice.index][0] is None
        np.testing.assert_allclose(
            scores[choice.index][1:], choice.logprobs.token_logprobs[1:], atol=1e-5
        )


def test_many_prompts_of_every_form(client, offline, server):
    ids = offline.tokenize(PROMPT)
    expected = offline.generate(PROMPT, params())[0].outputs[0].text
    for prompt in (PROMPT, ids, [PROMPT, "class A:"], [ids, offline.tokenize("class A:")]):
        answer = client.completions.create(
            model="nano", prompt=prompt, temperature=0, max_tokens=12
        )
        assert answer.choices[0].text == expected
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    streamed = client.completions.create(
        model="nano", prompt=[PROMPT, "class A:"], temperature=0, max_tokens=12, stream=True
    )
    texts = {0: "", 1: ""}
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts[0] == expected
    assert texts[1] == offline.generate("class A:", params())[0].outputs[0].text


def test_embeddings_scores_and_ranks(client, offline, server):
    texts = ["def f(x):", "class Stack:", "import os"]
    expected = np.array(offline.encode(texts, use_tqdm=False))
    answer = client.embeddings.create(model="nano", input=texts)  # base64, the SDK's default
    np.testing.assert_allclose([each.embedding for each in answer.data], expected, atol=1e-5)
    plain = server.post(
        "/v1/embeddings", input=texts[0], encoding_format="float", dimensions=7
    ).json()
    (vector,) = (each["embedding"] for each in plain["data"])
    np.testing.assert_allclose(vector, expected[0, :7] / np.linalg.norm(expected[0, :7]), atol=1e-5)
    raw = server.post(
        "/v1/embeddings", input=texts[0], encoding_format="base64", normalize=False, pooling="mean"
    ).json()
    mean = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), np.float32)
    np.testing.assert_allclose(
        mean, offline.encode(texts[0], "mean", normalize=False)[0], atol=1e-4
    )
    scores = server.post("/v1/score", text_1=texts[0], text_2=texts).json()
    np.testing.assert_allclose(
        [each["score"] for each in scores["data"]], expected @ expected[0], atol=1e-5
    )
    ranked = server.post("/v1/rerank", query=texts[0], documents=texts, top_n=2).json()["results"]
    assert [each["index"] for each in ranked] == np.argsort(-(expected @ expected[0]))[:2].tolist()
    assert ranked[0]["document"]["text"] == texts[0]


def test_asynchronous_clients_share_the_server(_server, offline, server):
    prompts = [f"def f{i}(" for i in range(20)]
    expected = [
        output.outputs[0].text for output in offline.generate(prompts, params(), use_tqdm=False)
    ]

    async def run():
        async with openai.AsyncOpenAI(
            base_url=f"{_server.url}/v1", api_key="none", max_retries=0
        ) as client:

            async def one(prompt, streams):
                request = {"model": "nano", "prompt": prompt, "temperature": 0, "max_tokens": 12}
                if not streams:
                    return (await client.completions.create(**request)).choices[0].text
                stream = await client.completions.create(**request, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(prompt, i % 2) for i, prompt in enumerate(prompts)))

    assert asyncio.run(run()) == expected


def test_models_and_unknown_models(client, server):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="nano", prompt="x", temperature=-1)
    assert caught.value.body["param"] == "temperature"
    assert caught.value.body["type"] == "invalid_request_error"
