"""Errors as clients act on them: OpenAI's SDK, and programs that match the text or the code."""

import openai
import pytest

from slipway.errors import ClientBusy, EngineBusy, EngineDead, InvalidRequest
from slipway.server import middleware
from slipway.server.middleware import ModelNotFound
from tests.server.conftest import events

pytestmark = pytest.mark.xdist_group("server")
CHAT = [{"role": "user", "content": "hi"}]
LONG = "a b c d " * 4000
IDS = [5] * 5000
FIELDS = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def client(_server):
    with openai.OpenAI(base_url=f"{_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def error_of(answer, status):
    """The error object of an answer, which must be one as a whole."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == FIELDS and isinstance(error["message"], str) and error["message"], error
    assert isinstance(error["code"], str | None) and isinstance(error["param"], str | None)
    assert error["type"] in ("invalid_request_error", "rate_limit_error", "server_error")
    return error


TOO_LONG = {
    "a text": ("/v1/completions", {"prompt": LONG}, "prompt"),
    "ids": ("/v1/completions", {"prompt": IDS}, "prompt"),
    "a huge text": ("/v1/completions", {"prompt": "a" * 3_000_000}, "prompt"),
    "the second of two": ("/v1/completions", {"prompt": ["a", LONG]}, "prompt"),
    "a conversation": (
        "/v1/chat/completions",
        {"messages": [CHAT[0] | {"content": LONG}]},
        "messages",
    ),
    "an embedding's": ("/v1/embeddings", {"input": LONG}, "input"),
    "SGLang's text": ("/generate", {"text": LONG}, "text"),
    "SGLang's ids": ("/generate", {"input_ids": IDS}, "input_ids"),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_prompt_beyond_the_context_is_told_from_other_errors(server, name):
    path, body, field = TOO_LONG[name]
    size = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    for more in ({}, {"stream": True}) if path != "/v1/embeddings" else ({},):
        error = error_of(server.post(path, **body, **more), 400)
        assert error["code"] == "context_length_exceeded" and error["param"] == field
        assert f"maximum context length is {size} tokens" in error["message"]


def test_a_prompt_that_leaves_room_for_one_token_is_taken(server):
    size = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    assert (
        server.complete(prompt=[5] * (size - 1), max_tokens=1)["usage"]["prompt_tokens"] == size - 1
    )
    assert (
        error_of(server.post("/v1/completions", prompt=[5] * size), 400)["code"]
        == "context_length_exceeded"
    )


SENT = {  # what the engine refuses, by the client's names
    "max_completion_tokens": (
        "/v1/chat/completions",
        {"messages": CHAT, "max_completion_tokens": -1},
    ),
    "max_tokens": ("/v1/chat/completions", {"messages": CHAT, "max_tokens": -1}),
    "top_logprobs": (
        "/v1/chat/completions",
        {"messages": CHAT, "logprobs": True, "top_logprobs": 99},
    ),
    "messages[1].content": (
        "/v1/chat/completions",
        {"messages": [*CHAT, {"role": "user", "content": 5}]},
    ),
    "messages[0].role": ("/v1/chat/completions", {"messages": [{"content": "a"}]}),
    "messages": ("/v1/chat/completions", {"messages": []}),
    "logit_bias": ("/v1/chat/completions", {"messages": CHAT, "logit_bias": {"99999999": 1}}),
    "allowed_token_ids": (
        "/v1/chat/completions",
        {"messages": CHAT, "allowed_token_ids": [99999999]},
    ),
    "prompt": ("/v1/completions", {"prompt": [99999999]}),
    "logprobs": ("/v1/completions", {"prompt": "a", "logprobs": 99}),
    "input": ("/v1/embeddings", {"input": [99999999]}),
    "input_ids": ("/generate", {"input_ids": [99999999]}),
    "sampling_params.max_new_tokens": (
        "/generate",
        {"text": "a", "sampling_params": {"max_new_tokens": -1}},
    ),
    "sampling_params.top_p": ("/generate", {"text": "a", "sampling_params": {"top_p": 5}}),
    "top_logprobs_num": (
        "/generate",
        {"text": "a", "return_logprob": True, "top_logprobs_num": 99},
    ),
    "rid": ("/generate", {"text": "a", "rid": "a b"}),
    "request_id": ("/v1/completions", {"prompt": "a", "request_id": " "}),
}


@pytest.mark.parametrize("field", SENT)
def test_param_is_the_field_that_the_client_sent(server, field):
    path, body = SENT[field]
    for more in ({}, {"stream": True}) if path != "/v1/embeddings" else ({},):
        error = error_of(server.post(path, **body, **more), 400)
        assert error["param"] == field and error["message"].startswith(field), error


def test_openais_sdk_raises_its_own_classes(client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="nano", messages=[CHAT[0] | {"content": LONG}], stream=True
        )
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=CHAT)
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a cat")
    assert caught.value.code == "unknown_url"


def test_paths_and_methods_that_are_not_served(server):
    for method, path in (
        ("GET", "/v1/nothing"),
        ("POST", "/v1/images/generations"),
        ("GET", "/"),
        ("PUT", "/v1/a/b"),
    ):
        error = error_of(server.http.request(method, path), 404)
        assert (
            path in error["message"]
            and method in error["message"]
            and error["code"] == "unknown_url"
        )
    for method, path, allowed in (
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
    ):
        answer = server.http.request(method, path)
        error = error_of(answer, 405)
        assert allowed in answer.headers["allow"] and allowed in error["message"]
        assert error["code"] == "method_not_supported"


@pytest.mark.host
@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (InvalidRequest("n", -1, "more"), "invalid_request_error", None),
        (ModelNotFound("model", "a", "nano"), "invalid_request_error", "model_not_found"),
        (ClientBusy("full", 1.0), "rate_limit_error", "rate_limit_exceeded"),
        (EngineBusy("full", 1.0), "server_error", None),
        (EngineDead("gone"), "server_error", None),
    ],
)
def test_an_error_has_openais_type_in_a_stream_too(error, kind, code):
    class Stream:
        status_code, text = 200, middleware.failure_events(error).decode()

    (event,) = events(Stream)
    assert event["error"].keys() == FIELDS and (event["error"]["type"], event["error"]["code"]) == (
        kind,
        code,
    )
    assert event == middleware.error_object(error)
