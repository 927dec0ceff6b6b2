"""Error responses as clients use them: classes of OpenAI's SDK, texts and codes."""

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
    """Return the error object of a response, after checking its status and fields."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == FIELDS, error
    assert isinstance(error["message"], str), error
    assert error["message"], error
    assert isinstance(error["code"], str | None)
    assert isinstance(error["param"], str | None)
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
def test_a_prompt_beyond_the_context_has_its_own_error_code(server, name):
    path, body, field = TOO_LONG[name]
    size = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    for more in ({}, {"stream": True}) if path != "/v1/embeddings" else ({},):
        error = error_of(server.post(path, **body, **more), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == field
        assert f"maximum context length is {size} tokens" in error["message"]


def test_a_prompt_that_leaves_room_for_one_token_is_accepted(server):
    size = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    fitting = server.complete(prompt=[5] * (size - 1), max_tokens=1)
    assert fitting["usage"]["prompt_tokens"] == size - 1
    error = error_of(server.post("/v1/completions", prompt=[5] * size), 400)
    assert error["code"] == "context_length_exceeded"


COMPLETIONS, CHATS, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
UNKNOWN_ID = 99999999
BAD_MESSAGE = {"role": "user", "content": 5}
# Requests that the engine refuses, by the client's name of the wrong field.
SENT = {
    "max_completion_tokens": (CHATS, {"messages": CHAT, "max_completion_tokens": -1}),
    "max_tokens": (CHATS, {"messages": CHAT, "max_tokens": -1}),
    "top_logprobs": (CHATS, {"messages": CHAT, "logprobs": True, "top_logprobs": 99}),
    "messages[1].content": (CHATS, {"messages": [*CHAT, BAD_MESSAGE]}),
    "messages[0].role": (CHATS, {"messages": [{"content": "a"}]}),
    "messages": (CHATS, {"messages": []}),
    "logit_bias": (CHATS, {"messages": CHAT, "logit_bias": {str(UNKNOWN_ID): 1}}),
    "allowed_token_ids": (CHATS, {"messages": CHAT, "allowed_token_ids": [UNKNOWN_ID]}),
    "prompt": (COMPLETIONS, {"prompt": [UNKNOWN_ID]}),
    "logprobs": (COMPLETIONS, {"prompt": "a", "logprobs": 99}),
    "input": ("/v1/embeddings", {"input": [UNKNOWN_ID]}),
    "input_ids": (GENERATE, {"input_ids": [UNKNOWN_ID]}),
    "sampling_params.max_new_tokens": (
        GENERATE,
        {"text": "a", "sampling_params": {"max_new_tokens": -1}},
    ),
    "sampling_params.top_p": (GENERATE, {"text": "a", "sampling_params": {"top_p": 5}}),
    "top_logprobs_num": (GENERATE, {"text": "a", "return_logprob": True, "top_logprobs_num": 99}),
    "rid": (GENERATE, {"text": "a", "rid": "a b"}),
    "request_id": (COMPLETIONS, {"prompt": "a", "request_id": " "}),
}


@pytest.mark.parametrize("field", SENT)
def test_param_is_the_field_that_the_client_sent(server, field):
    path, body = SENT[field]
    for more in ({}, {"stream": True}) if path != "/v1/embeddings" else ({},):
        error = error_of(server.post(path, **body, **more), 400)
        assert error["param"] == field, error
        assert error["message"].startswith(field), error


def test_openai_sdk_raises_its_error_classes(client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="nano", messages=[CHAT[0] | {"content": LONG}], stream=True
        )
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
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


def test_unknown_paths_and_methods_are_errors(server):
    for method, path in (
        ("GET", "/v1/nothing"),
        ("POST", "/v1/images/generations"),
        ("GET", "/"),
        ("PUT", "/v1/a/b"),
    ):
        error = error_of(server.http.request(method, path), 404)
        assert path in error["message"]
        assert method in error["message"]
        assert error["code"] == "unknown_url"
    for method, path, allowed in (
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
    ):
        answer = server.http.request(method, path)
        error = error_of(answer, 405)
        assert allowed in answer.headers["allow"]
        assert allowed in error["message"]
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
def test_errors_have_openai_types_in_streams_too(error, kind, code):
    class Stream:
        status_code, text = 200, middleware.failure_events(error).decode()

    (event,) = events(Stream)
    assert event["error"].keys() == FIELDS
    assert event["error"]["type"] == kind
    assert event["error"]["code"] == code
    assert event == middleware.error_object(error)
