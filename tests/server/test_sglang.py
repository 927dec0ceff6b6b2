"""SGLang's route /generate: format, names of fields, streams, refused requests."""

import itertools
import json
import re

import numpy as np
import pytest

from tests.server.conftest import events

pytestmark = pytest.mark.xdist_group("server")
PROMPT = "def read(path):"
GREEDY = {"temperature": 0, "max_new_tokens": 12}


def generate(server, sampling=GREEDY, **fields):
    answer = server.post("/generate", **({"text": PROMPT, "sampling_params": sampling} | fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def plain(_server):
    return _server.choice(prompt=PROMPT, return_token_ids=True, logprobs=3, echo=True)


def test_a_response_has_the_text_of_a_completion(server, plain):
    found = generate(server, rid="mine")
    assert PROMPT + found["text"] == plain["text"]
    assert found["output_ids"] == plain["token_ids"]
    meta = found["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 12}
    assert meta["prompt_tokens"] == len(plain["prompt_token_ids"])
    assert meta["completion_tokens"] == 12
    assert meta["weight_version"] == server.http.get("/weights_version").json()["weights_version"]
    again = generate(server, text=None, input_ids=plain["prompt_token_ids"])
    assert again["text"] == found["text"]
    assert "output_token_logprobs" not in meta


def test_cached_tokens_are_reported(server):
    prompt = "import sys\n" * 12
    counts = [
        generate(server, text=prompt, extra_key=key)["meta_info"]["cached_tokens"]
        for key in ("native a", "native a", "b")
    ]
    assert counts[0] == counts[2] == 0 < counts[1]


def test_defaults_are_those_of_sglang(server):
    found = generate(server, sampling={"temperature": 0, "ignore_eos": True})
    assert found["meta_info"]["completion_tokens"] == 128
    assert len(generate(server, sampling=None)["output_ids"]) <= 128


def test_lists_and_samples_keep_their_order(server, plain):
    many = generate(server, text=[PROMPT, "class Stack:"], rid="both")
    assert [each["meta_info"]["id"] for each in many] == ["both_0", "both_1"]
    assert PROMPT + many[0]["text"] == plain["text"]
    assert many[1]["text"] == generate(server, text="class Stack:")["text"]
    sampled = {"n": 3, "temperature": 1.0, "max_new_tokens": 8, "sampling_seed": 4}
    found = generate(server, sampling=sampled, text=[PROMPT, PROMPT])
    assert len(found) == 6
    assert len({each["text"] for each in found[:3]}) == 3
    texts = [each["text"] for each in found]
    assert texts[:3] == texts[3:], "the same seed gives the same texts"
    own = generate(server, text=[PROMPT] * 2, sampling=[GREEDY, GREEDY | {"max_new_tokens": 3}])
    assert [each["meta_info"]["completion_tokens"] for each in own] == [12, 3]
    ids = generate(server, text=None, input_ids=[plain["prompt_token_ids"]])
    assert PROMPT + ids[0]["text"] == plain["text"], "a list of one is a list"


def test_logprobs_of_both_sides(server, plain):
    size = len(plain["prompt_token_ids"])
    meta = generate(server, return_logprob=True, logprob_start_len=0, top_logprobs_num=2)[
        "meta_info"
    ]
    expected = plain["logprobs"]["token_logprobs"]
    output, given = meta["output_token_logprobs"], meta["input_token_logprobs"]
    ids = plain["prompt_token_ids"] + plain["token_ids"]
    assert [token for _, token, _ in given + output] == ids
    np.testing.assert_allclose([each[0] for each in given[1:] + output], expected[1:], atol=1e-5)
    assert given[0][0] is None
    assert all(text is None for _, _, text in given + output)
    assert len(meta["output_top_logprobs"]) == 12
    assert all(len(tops) == 2 for tops in meta["output_top_logprobs"])
    assert meta["output_top_logprobs"][0][0][:2] == output[0][:2], "greedy takes the likeliest"
    assert meta["input_top_logprobs"][0] is None
    assert len(meta["input_top_logprobs"]) == size
    request = {"return_logprob": True, "logprob_start_len": 2, "return_text_in_logprobs": True}
    late = generate(server, **request)["meta_info"]
    assert len(late["input_token_logprobs"]) == size - 2
    assert "output_top_logprobs" not in late
    assert late["input_token_logprobs"][0][0] is None
    assert late["input_token_logprobs"][1][:2] == given[3][:2]
    text = "".join(text for _, _, text in late["output_token_logprobs"])
    assert text == plain["text"][len(PROMPT) :]
    assert generate(server, return_logprob=True)["meta_info"]["input_token_logprobs"] == []


def test_streams_are_cumulative(server):
    whole = generate(server, return_logprob=True)
    request = {"text": PROMPT, "sampling_params": GREEDY, "return_logprob": True}
    found = events(server.post("/generate", **request, stream=True))
    for before, after in itertools.pairwise(found):
        assert after["text"].startswith(before["text"])
    assert all(event["meta_info"]["finish_reason"] is None for event in found[:-1])
    assert len(found) > 1
    for event in (whole, found[-1]):
        del event["meta_info"]["id"], event["meta_info"]["cached_tokens"]
    assert found[-1] == whole
    request = {"text": [PROMPT, "class Stack:"], "sampling_params": GREEDY | {"n": 2}}
    many = events(server.post("/generate", **request, stream=True))
    last = {event["index"]: event["text"] for event in many}
    assert last[0] == last[1] == whole["text"]
    assert last[2] == last[3] != whole["text"]
    assert len(last) == 4


SAMPLED = {"temperature": 1.0, "max_new_tokens": 16, "sampling_seed": 5}
CHANGES = {
    "temperature": 0,
    "top_p": 0.05,
    "top_k": 1,
    "min_p": 1.0,
    "sampling_seed": 6,
    "repetition_penalty": 5.0,
    "frequency_penalty": 2.0,
    "presence_penalty": 2.0,
    "max_new_tokens": 3,
    "logit_bias": {"300": 100},
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_sampling_field_changes_the_sample(server, field):
    base = SAMPLED | ({"temperature": 0, "max_new_tokens": 40} if field.endswith("penalty") else {})
    assert generate(server, base)["text"] == generate(server, base)["text"]
    assert (
        generate(server, base | {field: CHANGES[field]})["text"] != generate(server, base)["text"]
    )


def test_stop_conditions(server, plain):
    text, third = plain["text"][len(PROMPT) :], plain["token_ids"][2]
    cut = generate(server, GREEDY | {"stop": [text[3:6]]})
    assert cut["text"] == text[: text.index(text[3:6])]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": text[3:6]}
    assert generate(server, GREEDY | {"stop": text[3:6], "no_stop_trim": True})["text"].endswith(
        text[3:6]
    )
    ended = generate(server, GREEDY | {"stop_token_ids": [third]})
    assert ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": third}
    assert ended["output_ids"][-1] == third
    later = generate(server, GREEDY | {"stop_token_ids": [third], "min_new_tokens": 8})
    assert len(later["output_ids"]) >= 8
    forced = GREEDY | {"logit_bias": {"2": 100}}
    assert generate(server, forced)["meta_info"]["finish_reason"] == {"type": "stop", "matched": 2}
    shown = forced | {"ignore_eos": True, "max_new_tokens": 2}
    assert generate(server, shown)["text"] == ""
    assert generate(server, shown | {"skip_special_tokens": False})["text"] != ""


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
)
STRUCTURES = {
    "regex": ("[ab]{4}", "[ab]{4}"),
    "ebnf": ('root ::= "x" [0-9] "y"', "x[0-9]y"),
    "json_schema": (SCHEMA, r'\s*\{\s*"a"\s*:\s*[12]\s*(\}\s*)?'),
}


@pytest.mark.parametrize("field", STRUCTURES)
def test_structures_hold(server, field):
    given, pattern = STRUCTURES[field]
    found = generate(server, SAMPLED | {field: given, "max_new_tokens": 60})
    assert re.fullmatch(pattern, found["text"]), found
    opened = generate(server, SAMPLED | {"json_schema": "$$ANY$$"})["text"]
    assert opened.lstrip().startswith("{")


REFUSED = {
    "nothing": ({"text": None}, "text"),
    "both": ({"input_ids": [5]}, "text"),
    "mixed": ({"text": None, "input_ids": [5, [5]]}, "input_ids"),
    "no parameter": ({"sampling_params": {"max_tokens": 5}}, "sampling_params"),
    "out of range": ({"sampling_params": {"top_p": 2}}, "sampling_params.top_p"),
    "too few": ({"sampling_params": [{}, {}]}, "sampling_params"),
    "unlike n": ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params"),
    "two structures": ({"sampling_params": {"regex": "a", "ebnf": "b"}}, "sampling_params"),
    "spaces": ({"sampling_params": {"spaces_between_special_tokens": False}}, "sampling_params"),
    "top without logprobs": ({"top_logprobs_num": 2}, "return_logprob"),
    "a start without logprobs": ({"logprob_start_len": 2}, "return_logprob"),
    "a start beyond": ({"return_logprob": True, "logprob_start_len": 500}, "logprob_start_len"),
    "a negative start": ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
    "too many logprobs": ({"return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
    "a bad id": ({"rid": "a b"}, "rid"),
    "many ids": ({"rid": ["a"]}, "rid"),
    "too many samples": ({"text": ["a", "b"], "sampling_params": {"n": 1000}}, "sampling_params.n"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_requests_are_refused(server, name):
    fields, field = REFUSED[name]
    answer = server.post("/generate", **({"text": PROMPT} | fields))
    assert answer.status_code == 400, answer.text
    param = answer.json()["error"]["param"]
    assert param == field or param.startswith(f"{field}.")


def test_classification_is_refused(server):
    for body in ({"input": "x"}, {"model": "nano", "input": ["x", "y"]}):
        answer = server.post("/classify", **body)
        error = answer.json()["error"]
        assert answer.status_code == 400, answer.text
        assert error["type"] == "invalid_request_error", answer.text
        assert error["param"] == "model"
        assert "classification head" in error["message"]
    assert server.post("/classify", model="other", input="x").status_code == 404
    without_input = server.post("/classify", model="nano").json()["error"]
    assert without_input["param"] != "model", "a missing input is reported first"
    features = server.http.get("/capabilities").json()["features"]
    assert features["classification"] is False
    assert features["generation"]
    assert features["chat"]
