"""Fields and routes beyond OpenAI's, for clients of vLLM, SageMaker, Jina and Cohere."""

import json
from pathlib import Path

import httpx
import openai
import pytest

from slipway.codec.tokenizer import Tokenizer
from slipway.llm import NANO
from tests.server.conftest import events, templated

pytestmark = pytest.mark.xdist_group("server")
PROMPT = "def read(path):"
CHAT = [{"role": "user", "content": "Write a function."}]
TOKENIZER = Tokenizer.load(Path(NANO))
THINKING = """{%- for m in messages -%}
{{ m.role }}: {{ m.reasoning_content }}|{{ m.reasoning }}|{{ m.content }}
{% endfor %}assistant: <think>
{#- </think> <tool_call> #}"""


def names(ids):
    return [f"token_id:{token}" for token in ids]


def test_completions_write_tokens_as_ids(server):
    request = {
        "prompt": PROMPT,
        "logprobs": 2,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }
    choice = server.choice(**request)
    assert choice["logprobs"]["tokens"] == names(choice["token_ids"])
    for token, own, top in zip(
        *(choice["logprobs"][name] for name in ("tokens", "token_logprobs", "top_logprobs"))
    ):
        assert top[token] == own
        assert all(name.startswith("token_id:") for name in top)
    streamed = events(
        server.post("/v1/completions", temperature=0, max_tokens=12, stream=True, **request)
    )
    received = [name for event in streamed for name in event["choices"][0]["logprobs"]["tokens"]]
    assert received == choice["logprobs"]["tokens"]
    echoed = server.choice(echo=True, **request | {"max_tokens": 0})
    assert echoed["logprobs"]["tokens"] == names(echoed["prompt_token_ids"])
    plain = server.choice(**request | {"return_tokens_as_token_ids": False, "prompt_logprobs": 0})
    assert "".join(plain["logprobs"]["tokens"]) == plain["text"] == choice["text"]
    named = server.choice(prompt_logprobs=0, **request)["prompt_logprobs"]
    assert named == plain["prompt_logprobs"], "as in vLLM, decoded_token stays a text"


def test_chats_write_tokens_as_ids(server):
    request = {
        "messages": CHAT,
        "temperature": 0,
        "max_tokens": 6,
        "logprobs": True,
        "top_logprobs": 2,
    }
    request |= {"return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = server.post("/v1/chat/completions", **request).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == names(choice["token_ids"])
    for entry, token in zip(content, choice["token_ids"]):
        assert bytes(entry["bytes"]) == TOKENIZER.token_bytes(token)
        assert entry["top_logprobs"][0]["token"] == entry["token"], "greedy"
    streamed = events(server.post("/v1/chat/completions", stream=True, **request))
    received = [
        entry
        for event in streamed
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert received == content


def test_a_server_option_writes_tokens_as_ids(launch):
    server = launch("--return-tokens-as-token-ids").wait_ready()
    request = {"prompt": PROMPT, "logprobs": 0, "return_token_ids": True}
    choice = server.choice(**request)
    assert choice["logprobs"]["tokens"] == names(choice["token_ids"])
    plain = server.choice(**request, return_tokens_as_token_ids=False)
    assert "".join(plain["logprobs"]["tokens"]) == plain["text"]


def test_a_prompt_is_cut_on_either_side(server):
    ids = list(range(300, 310))
    for side, kept in (("left", ids[-4:]), ("right", ids[:4]), (None, ids[-4:])):
        fields = {} if side is None else {"truncation_side": side}
        cut = server.complete(prompt=ids, truncate_prompt_tokens=4, return_token_ids=True, **fields)
        assert cut["choices"][0]["prompt_token_ids"] == kept
        assert cut["usage"]["prompt_tokens"] == 4
    whole = server.choice(prompt=ids, truncation_side="right", return_token_ids=True)
    assert whole["prompt_token_ids"] == ids
    echoed = server.complete(
        prompt=PROMPT, truncate_prompt_tokens=2, truncation_side="right", echo=True, max_tokens=0
    )
    assert echoed["choices"][0]["text"] == TOKENIZER.decode(TOKENIZER.encode(PROMPT)[:2])

    def chat(**fields):
        body = {"messages": CHAT, "max_tokens": 1, "return_token_ids": True} | fields
        return server.post("/v1/chat/completions", **body).json()["prompt_token_ids"]

    opened = chat()
    assert chat(truncate_prompt_tokens=3, truncation_side="right") == opened[:3]
    assert chat(truncate_prompt_tokens=3) == opened[-3:]

    def embedding(given, **fields):
        return server.post("/v1/embeddings", input=given, **fields).json()["data"][0]["embedding"]

    cut = embedding(ids, truncate_prompt_tokens=4, truncation_side="right")
    assert cut == embedding(ids[:4]) != embedding(ids[-4:])
    refused = server.post(
        "/v1/completions", prompt=ids, truncate_prompt_tokens=4, truncation_side="middle"
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "truncation_side"


def test_a_chat_echoes_an_assistants_last_message(server):
    begun = [*CHAT, {"role": "assistant", "content": "It is"}]
    request = {
        "max_tokens": 3,
        "temperature": 0,
        "add_generation_prompt": False,
        "continue_final_message": True,
    }

    def content(messages, **fields):
        body = {"messages": messages} | request | fields
        answer = server.post("/v1/chat/completions", **body).json()
        return answer["choices"][0]["message"]["content"]

    plain = content(begun)
    assert content(begun, echo=True) == "It is" + plain
    parts = [{"type": "text", "text": "It"}, {"type": "text", "text": " is"}]
    assert content([*CHAT, {"role": "assistant", "content": parts}], echo=True).startswith("It is")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    options = {name: request[name] for name in ("add_generation_prompt", "continue_final_message")}
    stream = client.chat.completions.create(
        model="nano",
        messages=begun,
        max_tokens=3,
        temperature=0,
        stream=True,
        extra_body={"echo": True} | options,
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == "It is" + plain
    of_user = {"add_generation_prompt": True, "continue_final_message": False}
    # A last message of the user is not repeated.
    assert content(CHAT, echo=True, **of_user) == content(CHAT, **of_user)


def test_responses_have_all_fields_of_vllm(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    choice = client.completions.create(model="nano", prompt=PROMPT, max_tokens=2).choices[0]
    assert (choice.prompt_logprobs, choice.prompt_token_ids, choice.token_ids) == (None, None, None)
    ids = TOKENIZER.encode(PROMPT)
    more = {"prompt_logprobs": 1, "return_token_ids": True}
    choice = client.completions.create(
        model="nano", prompt=PROMPT, max_tokens=2, extra_body=more
    ).choices[0]
    assert choice.prompt_token_ids == ids
    assert len(choice.prompt_logprobs) == len(ids)
    assert len(choice.token_ids) == 2
    chat = client.chat.completions.create(model="nano", messages=CHAT, max_tokens=2)
    assert (chat.prompt_logprobs, chat.prompt_token_ids) == (None, None)
    assert chat.choices[0].token_ids is None
    more |= {"temperature": 0}
    chat = client.chat.completions.create(
        model="nano", messages=CHAT, max_tokens=2, extra_body=more
    )
    assert len(chat.prompt_logprobs) == len(chat.prompt_token_ids) == chat.usage.prompt_tokens
    stream = client.chat.completions.create(
        model="nano", messages=CHAT, max_tokens=2, stream=True, extra_body=more
    )
    pieces = list(stream)
    assert pieces[0].prompt_token_ids == chat.prompt_token_ids
    streamed = [token for piece in pieces[1:] for token in piece.choices[0].token_ids]
    assert streamed == chat.choices[0].token_ids
    stream = client.completions.create(
        model="nano",
        prompt=[PROMPT, "a"],
        n=2,
        max_tokens=3,
        stream=True,
        extra_body={"return_token_ids": True},
    )
    received = {}
    for piece in stream:
        for choice in piece.choices:
            received.setdefault(choice.index, []).append(choice.prompt_token_ids)
    expected = [ids, ids, *[TOKENIZER.encode("a")] * 2]
    assert [received[index][0] for index in range(4)] == expected
    later = [ids for each in received.values() for ids in each[1:]]
    assert all(ids is None for ids in later), "only the first event has them"
    model = client.models.retrieve("nano")
    assert (model.root, model.parent, model.max_model_len) == ("nano", None, 1024)
    assert client.models.list().data == [model]


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    with templated(THINKING, tmp_path_factory) as server:
        yield server


def test_reasoning_has_both_names(thinking):
    request = {"messages": CHAT, "temperature": 0, "max_tokens": 40, "thinking_token_budget": 6}
    request["structured_outputs"] = {"choice": ["yes"]}
    message = thinking.post("/v1/chat/completions", **request).json()["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] != ""
    assert message["content"] == "yes"
    pieces = [
        event["choices"][0]["delta"]
        for event in events(thinking.post("/v1/chat/completions", **request, stream=True))
    ]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(piece.get(name, "") for piece in pieces) == message[name]
    answer = thinking.post("/v1/chat/completions", **request, include_reasoning=False).json()
    hidden = answer["choices"][0]["message"]
    assert not {"reasoning", "reasoning_content"} & hidden.keys()
    assert hidden["content"] == message["content"]
    silent = events(
        thinking.post("/v1/chat/completions", **request, include_reasoning=False, stream=True)
    )
    deltas = [event["choices"][0]["delta"] for event in silent]
    assert not any({"reasoning", "reasoning_content"} & delta.keys() for delta in deltas)
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_earlier_reasoning_reaches_the_template_by_both_names(thinking, name):
    earlier = {"role": "assistant", "content": "4", name: "two and two"}
    body = {"messages": [*CHAT, earlier, *CHAT], "max_tokens": 1, "return_token_ids": True}
    ids = thinking.post("/v1/chat/completions", **body).json()["prompt_token_ids"]
    assert "assistant: two and two|two and two|4" in TOKENIZER.decode(ids)


UNSUPPORTED = {
    "use_beam_search": True,
    "length_penalty": 0.5,
    "prompt_embeds": "UEsDBA==",
    "logprob_token_ids": [1, 2],
    "repetition_detection": {"max_pattern_size": 4},
    "vllm_xargs": {"a": 1},
    "kv_transfer_params": {"a": 1},
    "mm_processor_kwargs": {"a": 1},
    "spaces_between_special_tokens": False,
}
NEUTRAL = {
    "use_beam_search": False,
    "length_penalty": 1.0,
    "prompt_embeds": [],
    "logprob_token_ids": [],
    "vllm_xargs": {},
    "repetition_detection": {},
    "kv_transfer_params": {},
    "mm_processor_kwargs": {},
    "spaces_between_special_tokens": True,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_unsupported_fields_are_refused_by_name(server, field):
    bodies = {"/v1/completions": {"prompt": PROMPT}, "/v1/chat/completions": {"messages": CHAT}}
    if field == "prompt_embeds":
        bodies = {"/v1/completions": {}}
    for path, body in bodies.items():
        for more in ({}, {"n": 2}):
            refused = server.post(path, **body, **more, **{field: UNSUPPORTED[field]})
            assert refused.status_code == 400, refused.text
            assert refused.json()["error"]["param"] == field, refused.text
        taken = server.post(
            path, **{"prompt": PROMPT} | body | {"max_tokens": 1, field: NEUTRAL[field]}
        )
        assert taken.status_code == 200, taken.text
        assert field not in taken.headers.get("x-slipway-warning", ""), taken.text


PAIRS = [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]
TEXTS = ["import os", {"text": "a loop"}, {"content": [{"type": "text", "text": "class Stack:"}]}]


@pytest.mark.parametrize("first, second", PAIRS)
def test_scores_under_all_names_and_paths_are_cosines(server, first, second):
    request = {first: "a list", second: TEXTS}
    answers = [
        server.post(path, **request).json() for path in ("/v1/score", "/score", "/invocations")
    ]
    plain = ["a list", "import os", "a loop", "class Stack:"]
    given = [
        each["embedding"] for each in server.post("/v1/embeddings", input=plain).json()["data"]
    ]
    expected = [sum(a * b for a, b in zip(given[0], other)) for other in given[1:]]
    for answer in answers:
        assert [each["score"] for each in answer["data"]] == pytest.approx(expected, abs=1e-5)
    request = {first: ["a list", "a loop"], second: ["a loop", "a loop"]}
    pairwise = server.post("/score", **request).json()["data"]
    assert pairwise[1]["score"] == pytest.approx(1, abs=1e-5) != pairwise[0]["score"]


SIDES = {
    "mixed names": ({"queries": "a", "text_2": "b"}, "queries"),
    "one side": ({"data_1": "a"}, "data_1"),
    "nothing": ({}, "queries"),
    "two pairs": ({"text_1": "a", "text_2": "b", "data_1": "a", "data_2": "b"}, "data_1"),
    "unequal": ({"queries": ["a", "b"], "items": ["a"]}, "items"),
    "empty": ({"queries": "a", "items": []}, "items"),
    "no text": ({"queries": "a", "documents": ["a", {"title": "b"}]}, "documents[1]"),
    "a picture": (
        {"text_1": {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "text_2": "a"},
        "text_1",
    ),
    "an instruction": ({"queries": "a", "items": ["b"], "instruction": "c"}, "instruction"),
    "a limit below 0": (
        {"queries": "a", "items": ["b"], "max_tokens_per_doc": -1},
        "max_tokens_per_doc",
    ),
}


@pytest.mark.parametrize("name", SIDES)
def test_invalid_scores_are_refused(server, name):
    body, field = SIDES[name]
    refused = server.post("/score", **body)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == field, refused.text


def test_documents_are_ranked_on_every_path(server):
    documents = ["import os", "a list", {"text": "a loop"}]
    for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/invocations"):
        found = server.post(path, query="a list", documents=documents, model="nano").json()
        assert [set(each) for each in found["results"]] == [
            {"index", "document", "relevance_score"}
        ] * 3
        assert found["results"][0]["index"] == 1
        assert found["results"][0]["document"] == {"text": "a list"}
        scores = [each["relevance_score"] for each in found["results"]]
        assert scores == sorted(scores, reverse=True)
        assert found["usage"]["total_tokens"] > 0
        few = server.post(
            path, query="a list", documents=documents, top_n=1, return_documents=False
        ).json()
        assert few["results"] == [{"index": 1, "relevance_score": pytest.approx(1, abs=1e-5)}]
    alone = server.post("/rerank", query="a list", documents="a loop", top_n=0).json()["results"]
    assert len(alone) == 1


def test_texts_of_scores_are_truncated(server):
    ids = TOKENIZER.encode("import os, sys\nprint(sys.argv)")

    def score(query, document, **fields):
        answer = server.post("/score", queries=query, items=[document], **fields).json()
        return answer["data"][0]["score"], answer["usage"]["prompt_tokens"]

    long, begin, end = (TOKENIZER.decode(part) for part in (ids, ids[:2], ids[-3:]))
    assert score("a list", long, max_tokens_per_doc=2) == score("a list", begin)
    assert score(long, "a list", max_tokens_per_query=2) == score(begin, "a list")
    assert score(long, long, truncate_prompt_tokens=3)[1] == 6
    assert score(long, end, truncate_prompt_tokens=3)[0] == pytest.approx(1, abs=1e-5)


def test_invocations_accepts_every_kind_of_request(server):
    def invoke(**body):
        return server.post("/invocations", **body)

    assert invoke(prompt=PROMPT, max_tokens=3, temperature=0).json()["choices"][0]["text"]
    assert invoke(messages=CHAT, max_tokens=3).json()["object"] == "chat.completion"
    assert invoke(input="a list").json()["data"][0]["object"] == "embedding"
    assert len(events(invoke(prompt=PROMPT, max_tokens=3, stream=True))) >= 2
    for body in (b'{"nothing": 1}', b"{}", b"[]", b"[1", b'{"prompt": null}'):
        refused = server.http.post("/invocations", content=body)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == "body", refused.text
    assert invoke(prompt=5).json()["error"]["param"] == "prompt"
    assert invoke(prompt="a", model="other").status_code == 404
    large = server.http.post("/invocations", content=b'{"prompt": "' + b"a" * (8 * 2**20) + b'"}')
    assert large.status_code == 413
    schema = server.http.get("/openapi.json").json()["paths"]["/invocations"]["post"]["requestBody"]
    assert len(schema["content"]["application/json"]["schema"]["anyOf"]) == 5


def test_health_routes_of_other_servers(server):
    for path in ("/ping", "/health_generate"):
        assert server.http.get(path).status_code == 200
    assert server.http.post("/ping").status_code == 200


def test_tokenizer_info_needs_its_option(server, launch):
    assert server.http.get("/tokenizer_info").status_code == 404
    open_one = launch("--enable-tokenizer-info-endpoint", "--api-key", "key").wait_ready()
    assert httpx.get(f"{open_one.url}/tokenizer_info").status_code == 401
    found = httpx.get(
        f"{open_one.url}/tokenizer_info", headers={"authorization": "Bearer key"}
    ).json()
    described = json.loads((Path(NANO) / "tokenizer_config.json").read_text())
    assert found["eos_token"] == described["eos_token"]
    assert isinstance(found["tokenizer_class"], str)
    assert found["chat_template"] == TOKENIZER.chat_template


def test_full_vocabulary_logprobs_need_their_option(server, launch):
    chat = {"messages": CHAT, "max_tokens": 2, "temperature": 0, "logprobs": True}
    for path, body, field in (
        ("/v1/completions", {"prompt": PROMPT}, "logprobs"),
        ("/v1/completions", {"prompt": PROMPT}, "prompt_logprobs"),
        ("/v1/chat/completions", chat, "top_logprobs"),
        ("/v1/chat/completions", chat, "prompt_logprobs"),
    ):
        error = server.post(path, **body, **{field: -1}).json()["error"]
        assert error["param"] == field, error
        assert "max_logprobs" in error["message"], error
    refused = server.post("/generate", text=PROMPT, return_logprob=True, top_logprobs_num=-1)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "top_logprobs_num"
    unlimited = launch("--max-logprobs", "-1").wait_ready()
    request = {
        "prompt": PROMPT,
        "logprobs": -1,
        "prompt_logprobs": -1,
        "return_tokens_as_token_ids": True,
    }
    choice = unlimited.choice(**request, max_tokens=2)
    size = unlimited.http.get("/capabilities").json()["limits"]["vocab_size"]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [size, size]
    assert all(len(entry) == size for entry in choice["prompt_logprobs"][1:])
    answer = unlimited.post("/v1/chat/completions", **chat, top_logprobs=-1).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [size, size]


def test_embedding_fields(server):
    def length(**fields):
        (found,) = server.post("/v1/embeddings", input="a list", **fields).json()["data"]
        return sum(value * value for value in found["embedding"])

    assert length() == length(use_activation=True) == pytest.approx(1, abs=1e-5)
    assert length(use_activation=False) == length(normalize=False) > 2
    for field, value in (("embed_dtype", "float16"), ("endianness", "big")):
        refused = server.post(
            "/v1/embeddings", input="a list", encoding_format="base64", **{field: value}
        )
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == field, "other bytes must not be sent silently"


def test_every_bad_key_of_logit_bias_is_named(server):
    for bias in ({"one": 1, "7": 1, "-2": 1}, {"99998": 1, "7": 1, "99999": 1}):
        answer = server.post("/v1/completions", prompt=PROMPT, logit_bias=bias)
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert error["param"] == "logit_bias"
        assert all(key in error["message"] for key in bias if key != "7"), error


def test_a_conversation_is_embedded_like_its_prompt(server):
    ids = server.post("/tokenize", messages=CHAT, add_generation_prompt=False).json()["tokens"]

    def embedded(**fields):
        return server.post("/v1/embeddings", **fields)

    assert embedded(messages=CHAT).json()["data"] == embedded(input=ids).json()["data"]
    opened = server.post("/tokenize", messages=CHAT).json()["tokens"]
    assert opened != ids
    assert (
        embedded(messages=CHAT, add_generation_prompt=True).json()["data"]
        == embedded(input=opened).json()["data"]
    )
    for fields in ({}, {"input": None}, {"input": "a", "messages": CHAT}):
        refused = embedded(**fields)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "input"
    assert embedded(messages=[]).json()["error"]["param"] == "messages"
    tool = {"type": "function", "function": {"name": "look"}}
    for path, field, fields in (
        ("/v1/embeddings", "add_generation_prompt", {"input": "a", "add_generation_prompt": True}),
        (
            "/v1/embeddings",
            "continue_final_message",
            {"input": "a", "continue_final_message": True},
        ),
        (
            "/v1/embeddings",
            "chat_template_kwargs",
            {"input": "a", "chat_template_kwargs": {"x": 1}},
        ),
        ("/tokenize", "continue_final_message", {"prompt": "a", "continue_final_message": True}),
        ("/tokenize", "tools", {"prompt": "a", "tools": [tool]}),
    ):
        refused = server.post(path, **fields)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == field, "a field without effect must be refused"
