"""Structured outputs: every output is in its grammar, alone, in a batch, and after a preemption."""

import json
import re

import pytest

from slipway import LLM, SamplingParams, StructuredOutputs
from slipway.errors import InvalidRequest

pytestmark = pytest.mark.xdist_group("engine")
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "size", "tags"],
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3},
    },
}  # fmt: skip


def run(llm, what, prompt="def f(x):", **fields):
    params = {"max_tokens": 50, "temperature": 1.0, "seed": 3} | fields
    return llm.generate(prompt, SamplingParams(structured_outputs=what, **params))[0].outputs


def test_json_fits_its_schema():
    """With nano, where outputs can end within the context: some must end, others are cut."""
    with LLM(max_num_seqs=12, max_num_batched_tokens=64) as llm:
        outputs = run(llm, StructuredOutputs(json=SCHEMA), n=12, temperature=1.0, max_tokens=300)
    ended = [output for output in outputs if output.finish_reason == "stop"]
    assert ended
    assert {output.finish_reason for output in outputs} <= {"stop", "length"}
    for output in ended:
        found = json.loads(output.text)
        assert set(found) == {"name", "size", "tags"}
        assert len(found["name"]) <= 12
        assert 0 <= found["size"] <= 99
        assert {*found["tags"]} <= {"red", "blue"}


def test_choices_patterns_grammars_and_objects(llm):
    (chosen,) = run(llm, StructuredOutputs(choice=("yes", "no way", 'qu"ote')))
    assert chosen.text in ("yes", "no way", 'qu"ote')
    assert chosen.finish_reason == "stop"
    (matched,) = run(llm, StructuredOutputs(regex=r"[a-c]{3}-\d{2}"))
    assert re.fullmatch(r"[a-c]{3}-\d{2}", matched.text)
    for grammar in ('start: "a" ("b" | "c")+ "d"', 'root ::= "a" ("b" | "c")+ "d"'):
        (parsed,) = run(llm, StructuredOutputs(grammar=grammar), logit_bias={})
        assert re.match(r"a[bc]*", parsed.text)
    (whole,) = run(llm, StructuredOutputs(json_object=True), temperature=0)
    assert whole.text.lstrip().startswith("{")


def test_every_sample_has_a_place_of_its_own(llm):
    outputs = run(llm, StructuredOutputs(regex=r"(ab|cd|ef){4}"), n=8)
    assert all(re.fullmatch(r"(ab|cd|ef){4}", output.text) for output in outputs)
    assert len({output.text for output in outputs}) > 1


def test_a_grammar_changes_nothing_for_the_others_and_nothing_compiles(llm):
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = llm.generate("class A:", plain)[0].outputs[0].token_ids
    alone = run(llm, StructuredOutputs(regex=r"\d{5}[a-z]{4}"))[0]
    compiled = llm.engine.num_compiled
    strict = SamplingParams(
        structured_outputs=StructuredOutputs(regex=r"\d{5}[a-z]{4}"),
        max_tokens=50,
        temperature=1.0,
        seed=3,
    )
    together = llm.generate(
        ["class A:", "def f(x):", "class A:"], [plain, strict, plain], use_tqdm=False
    )
    assert together[0].outputs[0].token_ids == together[2].outputs[0].token_ids == expected
    assert together[1].outputs[0].token_ids == alone.token_ids
    assert llm.engine.num_compiled == compiled


def test_grammars_and_other_bans_hold_together(llm):
    tokenizer = llm.engine.tokenizer
    (seven,) = tokenizer.encode("7", add_special_tokens=False)
    (output,) = run(
        llm,
        StructuredOutputs(regex=r"[0-9]+"),
        logit_bias={seven: -100},
        min_tokens=5,
        max_tokens=12,
    )
    assert re.fullmatch(r"[0-9]+", output.text)
    assert len(output.token_ids) >= 5
    (forced,) = run(llm, StructuredOutputs(regex="7"), allowed_token_ids=[300])
    assert forced.text == "7", "the grammar is never left"


def test_a_preempted_output_goes_on_where_it_stood(tiny):
    """There is room for two and a half sequences, and four want to run."""
    words = StructuredOutputs(regex=r"([a-z]{3} )*")
    params = [
        SamplingParams(structured_outputs=words, max_tokens=40, seed=i, min_tokens=40)
        for i in range(6)
    ]
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 16}
    expected = LLM(tiny, **sizes).generate(["def f("] * 6, params, use_tqdm=False)
    llm = LLM(tiny, **sizes)
    scheduler = llm.engine.schedulers[0]
    spare = scheduler.pages.take(scheduler.pages.num_pages - 8)
    got = llm.generate(["def f("] * 6, params, use_tqdm=False)
    assert scheduler.counts.preemptions > 0
    assert [o.outputs[0].text for o in got] == [o.outputs[0].text for o in expected]
    assert all(re.match(r"([a-z]{3} )*", output.outputs[0].text) for output in got)
    scheduler.pages.give_back(spare)


BAD = [
    ("structured_outputs", {}), ("structured_outputs", {"regex": "a", "choice": ("b",)}),
    ("regex", {"regex": ""}),
    ("choice", {"choice": ()}), ("choice", {"choice": ("",)}),
    ("choice", {"choice": ("a",) * 1025}),
    ("json", {"json": "{"}), ("json", {"json": "[1]"}), ("regex", {"regex": "a" * 300_000}),
    ("json", {"json": json.loads('{"items":' * 65 + "{}" + "}" * 65)}), ("grammar", {"grammar": 5}),
]  # fmt: skip


@pytest.mark.parametrize("field, fields", BAD, ids=lambda value: str(value)[:40])
def test_what_is_no_structure_is_refused(field, fields):
    with pytest.raises(InvalidRequest) as caught:
        StructuredOutputs(**fields)
    assert caught.value.field == field


EVIL = [
    {"regex": "("}, {"grammar": "start: undefined_rule"}, {"json": {"type": "unicorn"}},
    {"grammar": "nonsense"},
]  # fmt: skip


@pytest.mark.parametrize("fields", EVIL, ids=str)
def test_evil_grammars_are_refused_and_harm_nobody(llm, fields):
    with pytest.raises(InvalidRequest) as caught:
        run(llm, StructuredOutputs(**fields))
    assert caught.value.field == "structured_outputs"
    assert not llm.engine.has_work()


@pytest.mark.parametrize(
    "regex", ["(a{1000}){1000}", "(((a{50}){50}){50}){50}", "(a+)+b", "(x+x+)+y", "(.*)*z"]
)
def test_a_pattern_that_explodes_elsewhere_takes_no_time(llm, regex):
    """The output matches, or the matcher's fuel runs out and the output ends."""
    (output,) = run(llm, StructuredOutputs(regex=regex), max_tokens=8)
    assert output.finish_reason in ("length", "stop", "abort")


def test_grammars_need_a_tokenizer(config_only, uncompiled):
    llm = LLM(config_only(), load_format="dummy", skip_tokenizer_init=True)
    with pytest.raises(InvalidRequest):
        run(llm, StructuredOutputs(regex="a"), prompt=[5])
