"""Effect of every field of a request: each test would fail if its field were ignored."""

import json
import re

import pytest

from tests.server.conftest import events

pytestmark = pytest.mark.xdist_group("server")
PROMPT = "def read(path):"
SIZE = r"\s*\{\s*\"size\"\s*:\s*[0-9]\s*\}\s*"


@pytest.fixture(scope="module")
def plain(_server):
    return _server.choice(prompt=PROMPT, logprobs=0, return_token_ids=True)


def text(server, **fields):
    return server.choice(prompt=PROMPT, **fields)["text"]


SAMPLED = {"temperature": 1.0, "max_tokens": 16}
# Field -> value that changes a sampled text.
CHANGES = {
    "temperature": 0, "top_p": 0.05, "top_k": 1, "min_p": 1.0, "seed": 6, "repetition_penalty": 5.0,
    "frequency_penalty": 2.0, "presence_penalty": 2.0, "max_tokens": 3,
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_a_sampling_field_changes_the_sample(server, field):
    base = {"seed": 5} | SAMPLED
    if field.endswith("penalty"):
        base |= {"temperature": 0, "max_tokens": 40}
    assert text(server, **base) == text(server, **base), "the same seed gives the same text"
    assert text(server, **base | {field: CHANGES[field]}) != text(server, **base)


def test_banned_biased_and_allowed_tokens(server, plain):
    first = plain["token_ids"][0]
    assert text(server, logit_bias={str(first): -100}) != plain["text"]
    biased = server.choice(prompt=PROMPT, logit_bias={"300": 100}, return_token_ids=True)
    assert biased["token_ids"] == [300] * 12
    allowed = server.choice(prompt=PROMPT, allowed_token_ids=[300, 301], return_token_ids=True)
    assert {*allowed["token_ids"]} <= {300, 301}
    word = plain["text"].split()[0]
    assert word not in text(server, bad_words=[word])


def test_stop_conditions(server, plain):
    stop = plain["text"][3:6]
    cut = server.choice(prompt=PROMPT, stop=[stop])
    assert cut["text"] == plain["text"][: plain["text"].index(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert text(server, stop=stop, include_stop_str_in_output=True).endswith(stop)
    third = plain["token_ids"][2]
    ended = server.choice(prompt=PROMPT, stop_token_ids=[third], return_token_ids=True)
    assert ended["stop_reason"] == third
    assert ended["token_ids"][-1] == third
    later = server.choice(
        prompt=PROMPT, stop_token_ids=[third], min_tokens=8, return_token_ids=True
    )
    assert len(later["token_ids"]) >= 8
    eos = 2
    forced = {"logit_bias": {str(eos): 100}, "return_token_ids": True}
    ids = server.choice(prompt=PROMPT, **forced)["token_ids"]
    assert ids == [eos]
    assert server.choice(prompt=PROMPT, ignore_eos=True, **forced)["token_ids"] == [eos] * 12


def test_n_and_best_of(server):
    request = {"n": 3, "seed": 1} | SAMPLED
    choices = server.complete(prompt=PROMPT, **request)["choices"]
    assert len({choice["text"] for choice in choices}) == 3
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    best = server.complete(prompt=PROMPT, **request | {"n": 1, "best_of": 3})["choices"]
    assert len(best) == 1
    assert best[0]["text"] in {choice["text"] for choice in choices}


def test_prompt_logprobs_and_truncation(server, plain):
    whole = server.complete(prompt=PROMPT, prompt_logprobs=2, return_token_ids=True)
    choice = whole["choices"][0]
    assert len(choice["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    assert choice["prompt_logprobs"][0] is None
    for token, entry in zip(choice["prompt_token_ids"][1:], choice["prompt_logprobs"][1:]):
        assert len(entry) in (2, 3)
        assert entry[str(token)]["logprob"] <= 0
        assert entry[str(token)]["rank"] >= 1
    cut = server.complete(prompt=PROMPT, truncate_prompt_tokens=2, return_token_ids=True)
    assert cut["choices"][0]["prompt_token_ids"] == choice["prompt_token_ids"][-2:]
    assert cut["usage"]["prompt_tokens"] == 2


def test_special_tokens_are_shown_on_request(server):
    forced = {"logit_bias": {"0": 100}, "ignore_eos": True, "max_tokens": 2}
    assert text(server, **forced) == ""
    assert text(server, skip_special_tokens=False, **forced) != ""


def test_usage_in_streams(server):
    request = {"prompt": PROMPT, "temperature": 0, "max_tokens": 6, "stream": True}
    plain = events(server.post("/v1/completions", **request))
    assert all("usage" not in event for event in plain)
    options = {"include_usage": True}
    last = events(server.post("/v1/completions", **request, stream_options=options))[-1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    options = {"continuous_usage_stats": True}
    each = events(server.post("/v1/completions", **request, stream_options=options))
    counts = [event["usage"]["completion_tokens"] for event in each]
    assert counts == sorted(counts)
    assert counts[-1] == 6


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_obfuscation_hides_the_sizes_of_events(server, path):
    prompt = {"prompt": PROMPT}
    if path == "/v1/chat/completions":
        prompt = {"messages": [{"role": "user", "content": PROMPT}]}
    request = prompt | {"temperature": 0, "max_tokens": 30, "stream": True}
    options = {"include_usage": True}
    plain = server.post(path, **request, stream_options=options)
    options["include_obfuscation"] = True
    padded = server.post(path, **request, stream_options=options)
    sizes = [{len(line) for line in answer.text.split("\n\n")[:-2]} for answer in (plain, padded)]
    assert len(sizes[0]) > len(sizes[1])
    assert not any((size - len("data: ")) % 128 for size in sizes[1])
    seen = [event.pop("obfuscation") for event in events(padded)]
    assert len({*seen}) == len(seen)
    assert all(seen)
    assert all("obfuscation" not in event for event in events(plain))


def test_salts_keep_caches_apart(server):
    prompt = "import os\n" * 12
    for salt, cached in (("a", False), ("a", True), ("b", False)):
        usage = server.complete(prompt=prompt, max_tokens=1, cache_salt=salt)["usage"]
        assert bool(usage["prompt_tokens_details"]["cached_tokens"]) == cached


def test_priority_and_ids(server):
    answer = server.post(
        "/v1/completions", prompt=PROMPT, max_tokens=2, request_id="mine", priority=-5, user="me"
    )
    assert answer.json()["id"] == "mine"
    assert answer.headers["x-request-id"] == "mine"
    assert server.post("/v1/completions", prompt=PROMPT, priority=2**40).status_code == 400
    for bad in ("\u00e4", "a\nb: c", "x" * 129, " "):
        refused = server.post("/v1/completions", prompt=PROMPT, request_id=bad)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "request_id"


def test_chat_fields(server):
    chat = [
        {"role": "user", "content": "Write a function."},
        {"role": "assistant", "content": "def add("},
    ]

    def answer(**fields):
        body = {"messages": chat, "temperature": 0, "max_tokens": 10} | fields
        found = server.post("/v1/chat/completions", **body)
        assert found.status_code == 200, found.text
        return found.json()

    opened = answer()
    continued = answer(add_generation_prompt=False, continue_final_message=True)
    bare = answer(add_generation_prompt=False)
    sizes = [each["usage"]["prompt_tokens"] for each in (opened, continued, bare)]
    assert len({*sizes}) == 3
    assert sizes[1] < sizes[2] < sizes[0]
    assert (
        answer(n=2)["choices"][1]["message"]["content"]
        == opened["choices"][0]["message"]["content"]
    )
    assert answer(max_tokens=None, max_completion_tokens=4)["usage"]["completion_tokens"] == 4
    assert "token_ids" in answer(return_token_ids=True)["choices"][0]
    assert len(answer(prompt_logprobs=0)["prompt_logprobs"]) == sizes[0]


SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["size"],
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 9}},
}  # fmt: skip
STRUCTURES = {
    "OpenAI's schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        SIZE,
    ),
    "vLLM's schema": ({"structured_outputs": {"json": SCHEMA}}, SIZE),
    "SGLang's schema": ({"json_schema": json.dumps(SCHEMA)}, SIZE),
    "vLLM's former schema": ({"guided_json": SCHEMA}, SIZE),
    "a regex": ({"structured_outputs": {"regex": "[ab]{4}"}}, r"[ab]{4}"),
    "SGLang's regex": ({"regex": "[ab]{4}"}, r"[ab]{4}"),
    "vLLM's former regex": ({"guided_regex": "[ab]{4}"}, r"[ab]{4}"),
    "a choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    "vLLM's former choice": ({"guided_choice": ["yes", "no"]}, "yes|no"),
    "a grammar": ({"guided_grammar": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
    "SGLang's": ({"ebnf": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
    "any object": ({"response_format": {"type": "json_object"}}, r"\s*\{.*"),
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_structures_hold_on_both_routes(server, name, temperature):
    fields, pattern = STRUCTURES[name]
    fields = {"temperature": temperature, "seed": 1, "max_tokens": 40} | fields
    found = server.choice(prompt=PROMPT, **fields)["text"]
    assert re.fullmatch(pattern, found, re.DOTALL), found
    chat = server.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], **fields
    ).json()
    assert re.fullmatch(pattern, chat["choices"][0]["message"]["content"], re.DOTALL)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"guided_regex": "("},
        {"guided_regex": "a", "guided_choice": ["b"]},
        {"structured_outputs": {"regexp": "a"}},
        {"guided_choice": []},
        {"guided_grammar": "nonsense"},
        {"guided_json": {"type": "unicorn"}},
        {"structured_outputs": {}},
        {"response_format": {"type": "structural_tag"}},
        {"structured_outputs": {"structural_tag": "{"}},
        {"guided_grammar": "root ::= ("},
        {"ebnf": 'main ::= "a"'},
        {"ebnf": "root ::= TagDispatch((a, b))"},
        {"structured_outputs": {"choice": 5}},
        {"structured_outputs": {"json": 5}},
        {"guided_json": "[1]"},
    ],
    ids=str,
)
def test_invalid_structures_are_refused(server, fields):
    for streams in (False, True):
        answer = server.post("/v1/completions", prompt=PROMPT, stream=streams, **fields)
        assert answer.status_code == 400, answer.text
    assert server.complete(prompt=PROMPT, response_format={"type": "text"})["choices"]


TAGS = {
    "structures": [{"begin": "(x=", "schema": {"enum": [1, 2, 3]}, "end": ")"}],
    "triggers": ["("],
}
FORMAT = {
    "type": "triggered_tags", "triggers": ["("],
    "tags": [{"type": "tag", "begin": "(x=", "end": ")",
              "content": {"type": "json_schema", "json_schema": {"enum": [1, 2, 3]}}}],
}  # fmt: skip


def test_structural_tags_hold_on_every_route(server):
    """The bias makes the model prefer the trigger everywhere."""
    (token,) = server.post("/tokenize", prompt="(").json()["tokens"]
    request = {"logit_bias": {str(token): 100}, "temperature": 0}
    expected = r"(\(x=[123]\)){3,}(\(x?)?(\(x=[123]?)?"
    for fields in (
        {"response_format": {"type": "structural_tag"} | TAGS},
        {"structured_outputs": {"structural_tag": TAGS}},
        {"structured_outputs": {"structural_tag": json.dumps(TAGS)}},
        {"response_format": {"type": "structural_tag", "format": FORMAT}},
    ):
        assert re.fullmatch(expected, text(server, max_tokens=30, **request, **fields))
        body = (
            {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 30} | request | fields
        )
        chat = server.post("/v1/chat/completions", **body).json()
        assert re.fullmatch(expected, chat["choices"][0]["message"]["content"])
    for given in (TAGS, json.dumps(TAGS)):
        sampling = request | {"max_new_tokens": 30, "structural_tag": given}
        found = server.post("/generate", text=PROMPT, sampling_params=sampling).json()["text"]
        assert re.fullmatch(expected, found)


def test_tokenize_and_detokenize(server):
    assert server.post("/tokenize", prompt=PROMPT).json()["token_strs"] is None
    found = server.post("/tokenize", prompt=PROMPT, return_token_strs=True).json()
    assert found["count"] == len(found["tokens"])
    assert "".join(found["token_strs"]) == PROMPT
    assert server.post("/detokenize", tokens=found["tokens"]).json()["prompt"] == PROMPT
    chat = [{"role": "user", "content": "hi"}]
    with_turn = server.post("/tokenize", messages=chat).json()["count"]
    bare = server.post("/tokenize", messages=chat, add_generation_prompt=False).json()["count"]
    assert with_turn > bare
    answer = server.post("/v1/chat/completions", messages=chat, max_tokens=1).json()
    assert with_turn == answer["usage"]["prompt_tokens"]


def test_information_routes(server):
    assert server.http.get("/version").json()["version"]
    info = server.http.get("/server_info").json()
    assert info["engine"]["max_num_seqs"] == 8
    assert "api_key" not in info["server"]
    capabilities = server.http.get("/capabilities").json()
    assert "logit_bias" in capabilities["routes"]["/v1/completions"]["fields"]
    assert capabilities["kernels"]["linear"]
    assert capabilities["limits"]["num_pages"] > 0
    assert capabilities["limits"]["windows"] == {}
    assert server.http.get("/load").json() == {"server_load": 0}
    assert "slipway_generated_tokens_total" in server.http.get("/metrics").text
    document = server.http.get("/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    assert document["components"]["schemas"]["Chat"]["properties"]
    page = server.http.get("/docs").text
    assert "/v1/embeddings" in page
    assert "src=" not in page, "nothing is fetched from elsewhere"


REFUSED = {
    "no JSON": (b"{", "body"),
    "a list": (b"[]", "body"),
    "no prompt": (b"{}", "prompt"),
    "a wrong type": (b'{"prompt": 5}', "prompt"),
    "a wrong inner type": (b'{"prompt": ["a", 5]}', "prompt"),
    "deep": (b"[" * 100_000, "body"),
    "not UTF-8": (b'{"prompt": "\xff"}', "body"),
    "an empty prompt": (b'{"prompt": ""}', "prompt"),
    "no prompts": (b'{"prompt": []}', "prompt"),
    "too many prompts": (b'{"prompt": [' + b'"a",' * 2000 + b'"a"]}', "prompt"),
    "too many samples": (b'{"prompt": ["a", "b"], "n": 1000}', "n"),
    "an unknown id": (b'{"prompt": [99999999]}', "prompt"),
    "a huge integer": (b'{"prompt": "a", "max_tokens": 99999999999999999999999}', "max_tokens"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "body"),
    "a negative n": (b'{"prompt": "a", "n": -1}', "n"),
    "logprobs beyond the cap": (b'{"prompt": "a", "logprobs": 21}', "logprobs"),
    "a suffix": (b'{"prompt": "a", "suffix": "b"}', "suffix"),
    "a bias for no token": (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
    "stream options without stream": (b'{"prompt": "a", "stream_options": {}}', "stream_options"),
    "a lone surrogate": (b'{"prompt": "\\ud800"}', "body"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_bodies_name_the_field(server, name):
    body, field = REFUSED[name]
    answer = server.http.post("/v1/completions", content=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_a_prompt_beyond_the_context_is_refused_in_a_stream_too(server):
    for streams in (False, True):
        answer = server.post("/v1/completions", prompt=[5] * 5000, stream=streams)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt"
    huge = server.post("/v1/completions", prompt="a" * 4_000_000)
    assert huge.status_code == 400


def test_unknown_fields_are_named(server, launch):
    answer = server.post("/v1/completions", prompt=PROMPT, max_tokens=1, promt="x")
    assert answer.status_code == 200
    assert "promt" in answer.headers["x-slipway-warning"]
    strict = launch("--strict").wait_ready()
    refused = strict.post("/v1/completions", prompt=PROMPT, promt="x")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "promt"
    inner = {"stream": True, "stream_options": {"usage": True}, "max_tokens": 1}
    answer = server.post("/v1/completions", prompt=PROMPT, **inner)
    assert answer.status_code == 200
    assert answer.headers["x-slipway-warning"].endswith(": stream_options.usage")
    refused = strict.post("/v1/completions", prompt=PROMPT, **inner)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "stream_options.usage"


def test_tools_need_a_template_that_supports_them(server):
    chat = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "f"}}
    for fields, field in (
        ({"tools": [tool]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"documents": [{}]}, "documents"),
    ):
        answer = server.post("/v1/chat/completions", messages=chat, **fields)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
    none = {"messages": chat, "max_tokens": 1, "tool_choice": "none"}
    assert server.post("/v1/chat/completions", **none).status_code == 200
