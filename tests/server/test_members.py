"""Reading of null members and of unknown members in request bodies, without a server."""

import json

import msgspec
import pytest

from slipway.errors import InvalidRequest
from slipway.server import bodies, members, schema, sglang

pytestmark = pytest.mark.host
REQUIRED = {
    "Completion": {"prompt": "a"},
    "Chat": {"messages": [{"role": "user", "content": "a"}]},
    "Generate": {"text": "a"},
    "Embedding": {"input": "a"},
    "Score": {"text_1": "a", "text_2": "b"},
    "Rerank": {"query": "a", "documents": ["b"]},
    "Classify": {"input": "a"},
    "Tokenize": {"prompt": "a"},
    "Detokenize": {"tokens": [1]},
    "AbortRequest": {"rid": "a"},
    "UpdateFromDisk": {"model_path": "a"},
    "BeginWeights": {},
    "FinishWeights": {"update_id": "a"},
    "Sleep": {},
    "WakeUp": {},
}
TYPES = {name: getattr(sglang if name == "Generate" else schema, name) for name in REQUIRED}
OPTIONAL = [
    (name, field.encode_name)
    for name in REQUIRED
    for field in msgspec.structs.fields(TYPES[name])
    if not field.required and field.encode_name not in REQUIRED[name]
]
SAMPLING = [field.encode_name for field in msgspec.structs.fields(sglang.SGLangSampling)]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}


def read(name, strict=False, **fields):
    return bodies.read(json.dumps(REQUIRED[name] | fields).encode(), TYPES[name], strict)


@pytest.mark.parametrize(("name", "field"), OPTIONAL)
def test_a_null_field_counts_as_absent(name, field):
    assert read(name, strict=True, **{field: None}) == read(name)


@pytest.mark.parametrize("field", SAMPLING)
def test_a_null_sampling_parameter_counts_as_absent(field):
    absent = read("Generate", sampling_params={})
    assert read("Generate", sampling_params={field: None}) == absent
    assert read("Generate", sampling_params=[{field: None}]) == read(
        "Generate", sampling_params=[{}]
    )


@pytest.mark.parametrize(
    ("field", "given", "same"),
    [
        ("stream_options", {"include_usage": None, "include_obfuscation": None}, {}),
        ("response_format", {"type": "text", "json_schema": None}, {"type": "text"}),
        (
            "response_format",
            {
                "type": "json_schema",
                "json_schema": {"schema": {"const": None}, "strict": None, "name": None},
            },
            {"type": "json_schema", "json_schema": {"schema": {"const": None}}},
        ),
        ("structured_outputs", {"regex": "a", "json": None}, {"regex": "a"}),
        (
            "tools",
            [TOOL | {"function": TOOL["function"] | {"strict": None, "description": None}}],
            [TOOL],
        ),
        (
            "tools",
            [{"type": "function", "function": {"name": "f", "parameters": None}}],
            [{"type": "function", "function": {"name": "f"}}],
        ),
        ("functions", [{"name": "f", "description": None, "parameters": None}], [{"name": "f"}]),
        (
            "messages",
            [
                {
                    "role": "assistant",
                    "content": "a",
                    "refusal": None,
                    "tool_calls": [
                        {
                            "id": "c",
                            "index": None,
                            "type": "function",
                            "function": {"name": "f", "arguments": None},
                        }
                    ],
                }
            ],
            [
                {
                    "role": "assistant",
                    "content": "a",
                    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f"}}],
                }
            ],
        ),
    ],
)
def test_a_null_member_counts_as_absent(field, given, same):
    assert read("Chat", strict=True, **{field: given}) == read("Chat", **{field: same})


def test_free_form_values_keep_their_nulls():
    body, unknown = read(
        "Chat",
        chat_template_kwargs={"a": None},
        documents=[{"text": None}],
        tools=[
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"default": None, "x": {"y": None}}},
            }
        ],
        structured_outputs={"json": {"const": None}},
    )
    assert body.chat_template_kwargs == {"a": None}
    assert body.documents == [{"text": None}]
    assert not unknown
    assert body.tools[0]["function"]["parameters"] == {"default": None, "x": {"y": None}}
    assert body.structured_outputs == {"json": {"const": None}}


UNKNOWN = {
    "stream_options.usage": {"stream": True, "stream_options": {"usage": True}},
    "response_format.schema": {"response_format": {"type": "json_object", "schema": {}}},
    "response_format.json_schema.stict": {
        "response_format": {"type": "json_schema", "json_schema": {"schema": {}, "stict": True}}
    },
    "structured_outputs.regexp": {"structured_outputs": {"regex": "a", "regexp": "b"}},
    "tools[1].function.params": {
        "tools": [TOOL, {"type": "function", "function": {"name": "g", "params": {}}}]
    },
    "tools[0].cache_control": {"tools": [TOOL | {"cache_control": {}}]},
    "tool_choice.name": {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "f", "function": {"name": "f"}},
    },
    "functions[0].returns": {"functions": [{"name": "f", "returns": {}}]},
    "function_call.id": {"functions": [{"name": "f"}], "function_call": {"name": "f", "id": "c"}},
    "messages[0].foo": {"messages": [{"role": "user", "content": "a", "foo": 1}]},
    "messages[0].content[1].cache_control": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "text", "text": "b", "cache_control": {}},
                ],
            }
        ]
    },
    "messages[0].tool_calls[0].function.args": {
        "messages": [
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "f", "args": {}}}
                ],
            }
        ]
    },
    "messages[0].function_call.args": {
        "messages": [{"role": "assistant", "function_call": {"name": "f", "args": {}}}]
    },
}


@pytest.mark.parametrize("path", UNKNOWN)
def test_an_unknown_member_is_named_by_its_path(path):
    body, unknown = read("Chat", **UNKNOWN[path])
    assert unknown == [path]
    assert isinstance(body, schema.Chat)
    with pytest.raises(InvalidRequest) as caught:
        read("Chat", strict=True, **UNKNOWN[path])
    assert caught.value.field == path


def test_an_unknown_member_of_many_items_is_named_once():
    messages = [{"role": "user", "content": "a"}] + [
        {"role": "user", "content": "a", "foo": i, "bar": i} for i in range(9)
    ]
    _, unknown = read("Chat", messages=messages, baz=1)
    assert unknown == ["baz", "messages[1].foo", "messages[1].bar"]


def test_known_members_match_the_types_of_bodies():
    """The table of members and the types of bodies state the same names."""
    assert members.KNOWN["stream_options"] == {
        f.encode_name for f in msgspec.structs.fields(schema.StreamOptions)
    }
    tops = {path.partition(".")[0].removesuffix("[]") for path in members.NULLABLE}
    fields = {
        f.encode_name
        for kind in (schema.Chat, sglang.Generate)
        for f in msgspec.structs.fields(kind)
    }
    assert tops <= fields


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        ("Detokenize", {"tokens": None}, "tokens"),
        ("Chat", {"messages": None}, "messages"),
        ("Classify", {"input": None}, "input"),
        ("Completion", {"stop": [5]}, "stop[0]"),
        ("Chat", {"stream_options": {"include_usage": 5}}, "stream_options.include_usage"),
        ("Generate", {"sampling_params": {"foo": 1}}, "sampling_params.foo"),
        ("Generate", {"sampling_params": {"top_k": "a"}}, "sampling_params.top_k"),
    ],
)
def test_a_wrong_type_names_its_field(name, fields, field):
    with pytest.raises(InvalidRequest) as caught:
        read(name, **fields)
    assert caught.value.field == field
