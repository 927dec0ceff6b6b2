"""Offline interface: ends of outputs, their contents, and typed errors for invalid input."""

import gc
import itertools
import json
import math

import jax
import numpy as np
import pytest

from slipway.engine import programs
from slipway.engine.config import EngineConfig
from slipway.engine.params import SamplingParams
from slipway.errors import (
    CheckpointError,
    InvalidBatch,
    InvalidConfig,
    InvalidInput,
    InvalidRequest,
    UnsupportedModel,
)
from slipway.llm import LLM
from slipway.ops import cpu

pytestmark = pytest.mark.xdist_group("engine")  # one worker compiles the shared engine

PROMPT = [5, 6, 7, 8]


def params(**fields):
    return SamplingParams(**({"temperature": 0, "max_tokens": 12, "ignore_eos": True} | fields))


def complete(llm, prompt=PROMPT, **fields):
    return llm.generate(prompt, params(**fields), use_tqdm=False)[0].outputs[0]


@pytest.fixture
def whole(llm):
    """The 12 greedy tokens of PROMPT, all different up to the fifth."""
    output = complete(llm)
    assert (output.finish_reason, output.stop_reason, len(output.token_ids)) == ("length", None, 12)
    assert output.text == llm.engine.tokenizer.decode(output.token_ids)
    assert len({*output.token_ids[:5]}) == 5
    return output


def test_a_stop_string_ends_the_text_before_itself(llm, whole):
    stop = whole.text[4:7]
    at = whole.text.index(stop)
    for include, text in ((False, whole.text[:at]), (True, whole.text[:at] + stop)):
        output = complete(llm, stop=[stop, "never, never"], include_stop_str_in_output=include)
        assert (output.text, output.finish_reason, output.stop_reason) == (text, "stop", stop)
        assert output.token_ids == whole.token_ids[: len(output.token_ids)]
        assert len(output.token_ids) < 12
    assert complete(llm, stop=stop).text == whole.text[:at], "one string may stand for a list of it"
    unstopped = complete(llm, stop="never, never")
    assert unstopped.text == whole.text, "text held back is released at the end"


def test_a_stop_token_ends_the_output_and_has_no_text(llm, whole):
    decode, ids = llm.engine.tokenizer.decode, whole.token_ids
    output = complete(llm, stop_token_ids=[ids[3], 1])
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (ids[:4], "stop", ids[3])
    assert output.text == decode(ids[:3])
    shown = complete(llm, stop_token_ids=[ids[3]], include_stop_str_in_output=True)
    assert shown.text == decode(ids[:4])


def test_the_models_end_token_ends_the_output_unless_ignored(llm, whole, monkeypatch):
    monkeypatch.setattr(llm.engine._admission, "_eos_ids", frozenset({whole.token_ids[2]}))
    output = complete(llm, ignore_eos=False)
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (
        whole.token_ids[:3],
        "stop",
        None,
    )
    assert complete(llm).token_ids == whole.token_ids


@pytest.mark.parametrize(
    "asked, given",
    [(1, 1), (5, 5), (60, 60), (61, 60), (10**12, 60), (None, 60)],
)
def test_max_tokens_is_met_and_the_context_is_the_limit(llm, asked, given):
    output = complete(llm, max_tokens=asked)
    assert (len(output.token_ids), output.finish_reason) == (given, "length")


@pytest.mark.parametrize("top", [0, 1, 5, 20])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logprobs_hold_the_chosen_token_and_the_likeliest(llm, top, temperature):
    output = complete(llm, logprobs=top, temperature=temperature, max_tokens=6, seed=1)
    assert len(output.logprobs) == 6
    for token, found in zip(output.token_ids, output.logprobs):
        assert len(found) in (top, top + 1)
        assert token in found
        assert all(entry.logprob <= 0 for entry in found.values())
        by_rank = sorted(found.values(), key=lambda entry: entry.rank)
        likeliest = [entry for entry in by_rank if entry.rank <= top]
        assert [entry.rank for entry in likeliest] == list(range(1, top + 1))
        assert likeliest == sorted(likeliest, key=lambda entry: -entry.logprob)
        assert math.fsum(math.exp(entry.logprob) for entry in found.values()) <= 1 + 1e-5
        if temperature == 0:
            assert found[token].rank == 1
    assert complete(llm).logprobs is None


def test_a_request_without_logprobs_gets_none_beside_one_with(llm):
    both = [params(logprobs=1), params()]
    with_them, without = llm.generate([PROMPT, PROMPT], both, use_tqdm=False)
    assert without.outputs[0].logprobs is None
    assert len(with_them.outputs[0].logprobs) == 12
    assert with_them.outputs[0].token_ids == without.outputs[0].token_ids


def test_every_form_of_a_prompt_means_the_same(llm):
    text = "def f(x):"
    ids = llm.engine.tokenizer.encode(text)
    forms = [
        text,
        ids,
        tuple(ids),
        {"prompt": text},
        {"prompt_token_ids": ids},
        {"prompt": text, "prompt_token_ids": ids},
    ]
    outputs = llm.generate(forms, params(), use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [ids] * len(forms)
    assert [output.prompt for output in outputs] == [text, None, None, text, None, text]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert llm.generate([], params()) == []


def test_a_stream_grows_to_what_generate_gives(llm, whole):
    outputs = list(llm.stream(PROMPT, params()))
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    assert counts[0] == 1
    assert counts == sorted({*counts})
    assert counts[-1] == 12
    assert len(counts) > 2
    assert [output.finished for output in outputs] == [False] * (len(counts) - 1) + [True]
    texts = [output.outputs[0].text for output in outputs]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == whole.text


def test_leaving_a_stream_aborts_it(llm):
    stream = llm.stream(PROMPT, params())
    next(stream)
    assert llm.engine.has_work()
    stream.close()
    assert not llm.engine.has_work()


def test_streams_may_take_turns_with_each_other_and_with_generate(llm, whole):
    long, short = llm.stream(PROMPT, params()), llm.stream(PROMPT, params(max_tokens=9))
    next(long), next(short), next(long)
    assert complete(llm).token_ids == whole.token_ids
    for stream, count in ((long, 12), (short, 9)):
        assert list(stream)[-1].outputs[0].token_ids == whole.token_ids[:count]


PARAMETERS = [
    ("n", 0),
    ("n", 1.0),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 2.5),
    ("temperature", math.nan),
    ("temperature", -0.1),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("top_k", -2),
    ("top_k", 2**31),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("seed", -1),
    ("seed", 2**32),
    ("seed", 0.5),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", 5),
    ("logprobs", -2),
    ("logprobs", 21),
    ("logprobs", True),
]


@pytest.mark.host
@pytest.mark.parametrize("field, value", PARAMETERS, ids=str)
def test_a_parameter_out_of_range_is_named(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert caught.value.expected
    assert field in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.host
def test_stop_may_be_absent():
    absent = SamplingParams(stop=None, stop_token_ids=None)
    assert (absent.stop, absent.stop_token_ids) == ((), ())


BAD_PROMPTS = {
    "empty text": ("", "prompt"),
    "no tokens": ([], "prompt_token_ids"),
    "beyond the context": ([5] * 64, "prompt"),
    "unknown id": ([5, 10**6], "prompt_token_ids"),
    "first unknown id": ([5, 4099], "prompt_token_ids"),
    "negative id": ([-1], "prompt_token_ids"),
    "a float": ([5, 6.0], "prompt_token_ids"),
    "a bool": ([5, True], "prompt_token_ids"),
    "text among ids": ([5, "a"], "prompt_token_ids"),
    "a number": (3.5, "prompt"),
    "nothing": (None, "prompt"),
    "an empty mapping": ({}, "prompt"),
    "ids as text": ({"prompt_token_ids": "abc"}, "prompt"),
    "text as a number": ({"prompt": 5}, "prompt"),
    "bytes": (b"abc", "prompt"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_is_refused_and_the_others_finish(llm, whole, name):
    prompt, field = BAD_PROMPTS[name]
    if name == "first unknown id":
        prompt = [5, llm.engine.limits.vocab_size]
    with pytest.raises(InvalidBatch) as caught:
        llm.generate([PROMPT, prompt, PROMPT], params(), use_tqdm=False)
    batch = caught.value
    assert list(batch.errors) == [1]
    assert isinstance(batch, ValueError)
    assert isinstance(batch.errors[1], InvalidRequest)
    assert not isinstance(batch.errors[1], InvalidBatch)
    assert batch.errors[1].field == field
    assert batch.errors[1].expected
    assert batch.field == f"prompts[1].{field}"
    assert batch.outputs[1] is None
    assert [batch.outputs[i].outputs[0].token_ids for i in (0, 2)] == [whole.token_ids] * 2


def test_several_bad_prompts_are_reported_at_once(llm):
    with pytest.raises(InvalidBatch, match=r"prompts\[0\].*\n.*prompts\[2\]") as caught:
        llm.generate([[], PROMPT, [-5]], params(), use_tqdm=False)
    assert list(caught.value.errors) == [0, 2]


def test_a_single_bad_prompt_raises_the_error_itself(llm):
    with pytest.raises(InvalidRequest) as caught:
        llm.generate("", params())
    assert type(caught.value) is InvalidRequest
    with pytest.raises(InvalidRequest):
        next(llm.stream(""))


@pytest.mark.parametrize(
    "bad",
    [[params()], [params()] * 3, [params(), None], {"temperature": 0}, 0.5],
    ids=str,
)
def test_parameters_that_do_not_match_the_prompts_are_refused(llm, bad):
    with pytest.raises(InvalidRequest) as caught:
        llm.generate([PROMPT, PROMPT], bad)
    assert caught.value.field == "sampling_params"


def test_text_needs_a_tokenizer(config_only, uncompiled):
    llm = LLM(config_only(), load_format="dummy", skip_tokenizer_init=True)
    for call, field in (
        (lambda: llm.generate("text"), "prompt"),
        (lambda: llm.generate([5], SamplingParams(stop="a")), "stop"),
        (lambda: llm.chat([{"role": "user", "content": "hi"}]), "messages"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert caught.value.field == field
    assert not llm.engine.has_work()


OPTIONS = [
    ("max_num_batched_tokens", {"max_num_batched_tokens": 3, "max_num_seqs": 4}),
    ("max_num_seqs", {"max_num_seqs": 0}),
    ("max_num_seqs", {"max_num_seqs": "4"}),
    ("page_size", {"page_size": 0}),
    ("dtype", {"dtype": "int8"}),
    ("load_format", {"load_format": "gguf"}),
    ("memory_fraction", {"memory_fraction": 0}),
    ("memory_fraction", {"memory_fraction": 1.5}),
    ("memory_fraction", {"memory_fraction": math.nan}),
    ("memory_fraction", {"memory_fraction": "half"}),
    ("seed", {"seed": -1}),
    ("hf_overrides", {"hf_overrides": 5}),
    ("max_model_len", {"max_model_len": 0}),
    ("max_model_len", {"max_model_len": 65}),
    ("revision", {"revision": "main"}),
    (
        "data_parallel_size x tensor_parallel_size",
        {"tensor_parallel_size": 4, "data_parallel_size": 3},
    ),
    ("tensor_parallel_size", {"tensor_parallel_size": 3}),
    ("max_num_seq", {"max_num_seq": 3}),
]


@pytest.mark.parametrize("field, options", OPTIONS, ids=str)
def test_a_bad_option_is_named(config_only, uncompiled, field, options):
    with pytest.raises(InvalidConfig) as caught:
        LLM(config_only(), **({"load_format": "dummy", "skip_tokenizer_init": True} | options))
    assert caught.value.field == field
    assert caught.value.expected
    assert isinstance(caught.value, ValueError)


@pytest.mark.host
def test_the_default_options_are_sound():
    assert EngineConfig() == EngineConfig(max_num_seqs=64)


MODELS = [
    ("architectures", {"architectures": ["GPT2LMHeadModel"]}),
    ("architectures", {"architectures": None}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("is_causal", {"is_causal": False}),
    ("hidden_size", {"hidden_size": None}),
    ("hidden_size", {"hidden_size": "32"}),
    ("num_key_value_heads", {"num_key_value_heads": 3}),
    ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}),
]


@pytest.mark.parametrize("field, fields", MODELS, ids=str)
def test_a_model_that_is_not_implemented_is_refused(config_only, uncompiled, field, fields):
    with pytest.raises(UnsupportedModel) as caught:
        LLM(config_only(**fields), load_format="dummy", skip_tokenizer_init=True)
    assert caught.value.field == f"config.json: {field}"
    assert caught.value.expected
    assert isinstance(caught.value, InvalidInput)


def test_a_field_can_be_overridden_away(config_only, uncompiled):
    directory = config_only(is_causal=False, max_position_embeddings=32)
    overrides = {"is_causal": None, "max_position_embeddings": 48}
    llm = LLM(directory, load_format="dummy", skip_tokenizer_init=True, hf_overrides=overrides)
    assert llm.engine.limits.max_model_len == 48


@pytest.mark.host
@pytest.mark.parametrize("name", ["empty", "absent", "file"])
def test_a_directory_that_is_no_model_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(CheckpointError) as caught:
        LLM(tmp_path / name)
    assert caught.value.problems
    assert str(tmp_path) in str(caught.value)


def test_an_interruption_leaves_nothing_behind(llm, monkeypatch):
    step = llm.engine.step

    def interrupted():
        moved = step()
        # some have ended but have not been handed over
        if any(request.finished for request in moved):
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 3, [params(max_tokens=n) for n in (2, 2, 9)], use_tqdm=False)
    assert not llm.engine.has_work()


@pytest.mark.skipif(cpu.isa() is None, reason="portable bodies give equal numbers, not equal bits")
def test_a_mean_embedding_is_the_same_bits_in_any_chunks(tiny, monkeypatch):
    options = {"max_num_seqs": 4, "page_size": 16, "skip_tokenizer_init": True}
    llm = LLM(tiny, max_num_batched_tokens=64, **options)
    asked = [np.random.default_rng(n).integers(3, 1000, n).tolist() for n in (40, 3, 17)]
    whole = llm.encode(asked, "mean", use_tqdm=False)
    monkeypatch.setattr(llm.engine.schedulers[0], "max_num_tokens", 5)
    llm.engine.flush()
    np.testing.assert_array_equal(llm.encode(asked, "mean", use_tqdm=False), whole)


def test_embeddings_are_transformers(tiny):
    """Embeddings of prompts longer and shorter than a chunk, cached or not."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModel  # beside torch, which takes seconds to import

    theirs = AutoModel.from_pretrained(tiny, dtype=torch.float32).eval()
    asked = [np.random.default_rng(n).integers(3, 1000, n).tolist() for n in (40, 3, 17)]
    with torch.inference_mode():
        hidden = [theirs(torch.tensor([prompt])).last_hidden_state[0].numpy() for prompt in asked]
    options = {"max_num_seqs": 4, "page_size": 16, "skip_tokenizer_init": True}
    with LLM(tiny, max_num_batched_tokens=16, **options) as llm:
        for _ in range(2):
            for pooling, pooled in (("last", lambda x: x[-1]), ("mean", lambda x: x.mean(0))):
                vectors = llm.encode(asked, pooling, normalize=False, use_tqdm=False)
                for got, x in zip(vectors, hidden, strict=True):
                    np.testing.assert_allclose(got, pooled(x), rtol=1e-4, atol=1e-4)
        unit = llm.encode(asked, use_tqdm=False)
        assert all(abs(np.linalg.norm(vector) - 1) < 1e-6 for vector in unit)
        scores = llm.score(asked[0], asked)
        assert scores == llm.score([asked[0]] * 3, asked)
        assert abs(scores[0] - 1) < 1e-6
        np.testing.assert_allclose(scores, [float(unit[0] @ vector) for vector in unit], rtol=1e-6)
        for call, field in (
            (lambda: llm.encode(asked, "max"), "pooling"),
            (lambda: llm.score(asked[:2], asked), "b"),
            (lambda: llm.encode([]) or llm.encode([[]]), "prompts[0].prompt_token_ids"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                call()
            assert caught.value.field == field


def test_closing_frees_the_devices_memory(tiny):
    def held():
        return sum(array.nbytes for array in jax.live_arrays())

    before = held()
    with LLM(tiny, max_num_seqs=2, max_num_batched_tokens=16, page_size=16) as llm:
        complete(llm, max_tokens=2)
        assert held() > before + 100_000
        state = llm.engine.runner.state
        freed = jax.tree.leaves([state[name] for name in (programs.CACHES, programs.NEWEST)])
    gc.collect()
    assert all(array.is_deleted() for array in freed)
    assert held() - before < 50_000, "what is left are the constants of a program"


def test_defaults_come_from_generation_config(tiny, tmp_path):
    for path in tiny.iterdir():
        (tmp_path / path.name).symlink_to(path)
    stated = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 7, "bos": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    llm = LLM(tmp_path, max_num_seqs=2, max_num_batched_tokens=16, page_size=16)
    defaults = llm.get_default_sampling_params()
    assert (defaults.temperature, defaults.top_k, defaults.max_tokens, defaults.top_p) == (
        0.6,
        20,
        7,
        1.0,
    )
    assert len(llm.generate(PROMPT)[0].outputs[0].token_ids) <= 7


def test_tokenize_is_the_tokenizers(llm):
    assert llm.tokenize("def f(x):") == llm.engine.tokenizer.encode("def f(x):")


def test_the_more_important_prompts_come_first(llm, monkeypatch):
    """Eight prompts for four rows: the last four are the more important."""
    ended = []
    step = llm.engine.step

    def watched():
        moved = step()
        ended.extend(request.request_id for request in moved if request.finished)
        return moved

    monkeypatch.setattr(llm.engine, "step", watched)
    priority = [1] * 4 + [0] * 4
    outputs = llm.generate([PROMPT] * 8, params(max_tokens=6), use_tqdm=False, priority=priority)
    assert len(outputs) == 8
    assert {*ended[:4]} == {output.request_id for output in outputs[4:]}
    with pytest.raises(InvalidRequest):
        llm.generate([PROMPT] * 2, params(), priority=[1])
