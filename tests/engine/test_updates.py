"""New weights while requests run, sleep and waking.

Requests end on the old version or continue on the new one; nothing computed with one version is
served as the other.
"""

import asyncio
import dataclasses
import threading

import jax
import numpy as np
import pytest
import safetensors.numpy

from slipway.async_engine import AsyncEngine
from slipway.checkpoint import files
from slipway.engine import programs
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestSpec
from slipway.errors import CheckpointError, EngineBusy, EngineDead, InvalidRequest, WeightsLost
from slipway.llm import LLM

pytestmark = pytest.mark.xdist_group("engine")
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=0)
PROMPT, OTHER = list(range(5, 26)), list(range(40, 55))


@pytest.fixture(scope="module")
def old(tiny):
    """The model's tensors."""
    checkpoint = files.open_checkpoint(tiny)
    return {name: np.array(checkpoint.array(name)) for name in checkpoint.tensors}


@pytest.fixture(scope="module")
def new(old):
    """Tensors of another version of the model."""
    rng = np.random.default_rng(1)
    return {
        name: x + rng.normal(size=x.shape).astype(np.float32) * 0.3 * x.std()
        for name, x in old.items()
    }


@pytest.fixture
def engine(llm, old):
    """The shared engine, with the model's weights before and after."""
    llm.update_weights(old, version="old")
    compiled = llm.engine.num_compiled
    yield llm
    assert llm.engine.num_compiled == compiled, "an update compiles nothing"
    llm.update_weights(old, version="old")


def tokens(llm, prompt, params=GREEDY):
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids


@pytest.fixture
def said(engine, old, new):
    """Tokens of each version for each prompt."""
    found = {"old": {}, "new": {}}
    for version, arrays in (("new", new), ("old", old)):
        engine.update_weights(arrays, version=version)
        for name, prompt in (("PROMPT", PROMPT), ("OTHER", OTHER)):
            found[version][name] = tokens(engine, prompt)
    assert found["old"]["PROMPT"] != found["new"]["PROMPT"]
    assert found["old"]["OTHER"] != found["new"]["OTHER"]
    return found


def begun(llm, prompt, count):
    """Return a request that has generated ``count`` tokens."""
    engine = llm.engine
    request = engine.request(engine.add(RequestSpec(prompt, GREEDY)))
    while request.num_generated < count:
        engine.step()
    return request


def finish(llm, *requests):
    while not all(request.finished for request in requests):
        llm.engine.step()
    return [request.output().outputs[0] for request in requests]


def test_dummy_weights_then_a_swap_are_a_direct_load(tiny, llm):
    dummy = LLM(tiny, load_format="dummy", max_num_seqs=4, max_num_batched_tokens=32, page_size=4)
    before = [(array.shape, array.dtype, array.sharding) for array in dummy.engine.weights.arrays]
    compiled = dummy.engine.num_compiled
    assert tokens(dummy, PROMPT) != tokens(llm, PROMPT)
    assert dummy.update_weights(tiny) == "1" == dummy.weights_version
    assert tokens(dummy, PROMPT) == tokens(llm, PROMPT)
    assert [
        (array.shape, array.dtype, array.sharding) for array in dummy.engine.weights.arrays
    ] == before
    assert dummy.engine.num_compiled == compiled
    dummy.close()


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"quantization": "int8"}, {"tensor_parallel_size": 2}]
)
def test_other_forms_of_the_weights_are_exchanged_too(tiny, new, options):
    options = (
        dict(max_num_seqs=4, max_num_batched_tokens=32, page_size=16, skip_tokenizer_init=True)
        | options
    )
    llm = LLM(tiny, **options)
    first = tokens(llm, PROMPT)
    llm.update_weights(new)
    assert tokens(llm, PROMPT) != first
    llm.update_weights(tiny)
    assert tokens(llm, PROMPT) == first
    llm.close()


def test_finish_lets_who_runs_end_on_the_old_version_and_nobody_begin(engine, said, new):
    request = begun(engine, PROMPT, 3)
    change = engine.engine.update_weights(_values(engine, new), version="new", policy="finish")
    later = engine.engine.request(engine.engine.add(RequestSpec(OTHER, GREEDY)))
    old_output, new_output = finish(engine, request, later)
    assert change.result() == "new" == engine.weights_version
    assert (old_output.token_ids, old_output.weights) == (said["old"]["PROMPT"], ((0, "old"),))
    assert (new_output.token_ids, new_output.weights) == (said["new"]["OTHER"], ((0, "new"),))


def test_recompute_goes_on_as_the_new_version_reads_what_was_said(engine, said, new):
    request = begun(engine, PROMPT, 5)
    change = engine.engine.update_weights(_values(engine, new), version="new", policy="recompute")
    waiting = engine.engine.request(engine.engine.add(RequestSpec(OTHER, GREEDY)))
    output, other = finish(engine, request, waiting)
    assert change.done()
    kept = output.weights[1][0]
    assert output.weights == ((0, "old"), (kept, "new"))
    assert 5 <= kept < 20
    assert output.token_ids[:kept] == said["old"]["PROMPT"][:kept]
    rest = dataclasses.replace(GREEDY, max_tokens=20 - kept)
    assert output.token_ids[kept:] == tokens(engine, PROMPT + output.token_ids[:kept], rest)
    assert other.token_ids == said["new"]["OTHER"]


def test_continue_goes_on_at_once_and_shares_nothing_of_what_is_mixed(engine, said, new):
    request = begun(engine, PROMPT, 5)
    engine.engine.update_weights(_values(engine, new), version="new", policy="continue")
    computed = engine.engine.snapshot().computed_tokens
    (output,) = finish(engine, request)
    kept = output.weights[1][0]
    assert output.weights == ((0, "old"), (kept, "new"))
    assert len(output.token_ids) == 20
    assert output.token_ids[:kept] == said["old"]["PROMPT"][:kept]
    assert engine.engine.snapshot().computed_tokens - computed <= 20, (
        "its keys and values were not computed anew"
    )
    assert tokens(engine, PROMPT) == said["new"]["PROMPT"], (
        "its pages, of two versions, are nobody's"
    )


def test_cached_prefixes_belong_to_their_version(engine, said, new):
    long = PROMPT * 2
    first = tokens(engine, long)
    assert engine.generate([long], GREEDY, use_tqdm=False)[0].num_cached_tokens > 0
    engine.update_weights(new, version="new")
    output = engine.generate([long], GREEDY, use_tqdm=False)[0]
    assert output.num_cached_tokens == 0
    assert output.outputs[0].token_ids != first


@pytest.mark.parametrize("policy", ["recompute", "continue"])
def test_a_prompt_that_is_scored_is_of_one_version_where_it_is_computed_anew(
    engine, old, new, policy
):
    asked = dataclasses.replace(GREEDY, prompt_logprobs=0, max_tokens=4)
    long = (PROMPT + OTHER)[:34]
    engine.update_weights(new, version="new")
    expected = engine.generate([long], asked, use_tqdm=False)[0].prompt_logprobs
    engine.update_weights(old, version="old")
    request = engine.engine.request(engine.engine.add(RequestSpec(long, asked)))
    engine.engine.step()  # a part of the prompt, at most 32 tokens a step
    engine.engine.update_weights(_values(engine, new), version="new", policy=policy)
    finish(engine, request)
    scored = request.output().prompt_logprobs
    assert len(scored) == len(long)
    assert (scored == expected) == (policy == "recompute")


def test_scores_of_what_was_said_equal_what_it_was_said_with(engine):
    """Scoring a sample again by prompt_logprobs gives its own log probabilities.

    Policy gradients need that.
    """
    params = SamplingParams(
        temperature=1.0, n=4, max_tokens=16, seed=3, logprobs=0, ignore_eos=True
    )
    for sample in engine.generate([PROMPT], params, use_tqdm=False)[0].outputs:
        said = [entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs)]
        scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        again = engine.generate([PROMPT + sample.token_ids], scored, use_tqdm=False)[
            0
        ].prompt_logprobs
        found = [
            entry[token].logprob for token, entry in zip(sample.token_ids, again[len(PROMPT) :])
        ]
        np.testing.assert_allclose(found, said, rtol=0, atol=1e-5)


def test_what_does_not_fit_leaves_who_runs_alone(engine, said, new):
    request = begun(engine, PROMPT, 3)
    broken = {name: x for name, x in new.items() if "layers.1" not in name}
    with pytest.raises(CheckpointError, match="11 problems"):
        engine.update_weights(broken)
    for field, options in (("policy", {"policy": "soon"}), ("mode", {"mode": "slowly"})):
        with pytest.raises(InvalidRequest, match=field):
            engine.update_weights(new, **options)
    (output,) = finish(engine, request)
    assert output.token_ids == said["old"]["PROMPT"]
    assert engine.weights_version == "old"


@pytest.mark.parametrize("policy", ["finish", "recompute", "continue"])
def test_a_failure_half_way_ends_requests_and_refuses_more_until_an_update_succeeds(
    engine, said, old, new, policy
):
    class Fails:
        def __init__(self, values):
            self.array = lambda target, at, *more: (
                1 / 0 if at == 5 else values.array(target, at, *more)
            )

    request = begun(engine, PROMPT, 3)
    change = engine.engine.update_weights(Fails(_values(engine, new)), policy=policy)
    waiting = engine.engine.request(engine.engine.add(RequestSpec(OTHER, GREEDY)))
    outputs = finish(engine, request, waiting)
    with pytest.raises(WeightsLost, match="half-way"):
        change.result()
    assert outputs[1].finish_reason == "abort"
    assert outputs[0].finish_reason == ("length" if policy == "finish" else "abort")
    with pytest.raises(WeightsLost):
        tokens(engine, PROMPT)
    engine.update_weights(old, version="old")
    assert tokens(engine, PROMPT) == said["old"]["PROMPT"]


def test_who_gives_up_an_update_holds_nobody_back(engine, said, new):
    request = begun(engine, PROMPT, 3)
    change = engine.engine.update_weights(_values(engine, new), policy="finish")
    engine.engine.step()  # from here on no other request begins
    later = engine.engine.request(engine.engine.add(RequestSpec(OTHER, GREEDY)))
    assert change.cancel()
    for _ in range(200):
        if not engine.engine.has_work():
            break
        engine.engine.step()
    assert request.finished and later.finished, "it waits for an update that nobody wants"
    assert later.output().outputs[0].token_ids == said["old"]["OTHER"]
    assert engine.weights_version == "old"


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_the_cache_and_what_ran_goes_on_after_waking(engine, said, old, level):
    request = begun(engine, PROMPT, 3)
    (cache,) = engine.engine.runner.state[programs.CACHES]
    engine.sleep(level)
    kv, held = cache.kv, engine.engine.weights.arrays
    assert kv.is_deleted()
    assert all(array.is_deleted() for array in held) == (level == 2)
    assert not engine.engine.has_work(), "nothing spins"
    with pytest.raises(EngineBusy, match="sleeps"):
        tokens(engine, OTHER)
    with pytest.raises(EngineBusy, match="sleeps"):
        engine.engine.step()
    engine.sleep(level)  # twice is once
    engine.wake_up()
    if level == 2:
        with pytest.raises(WeightsLost):
            tokens(engine, OTHER)
        assert not engine.engine.has_work()
        engine.update_weights(old, version="old")
    (output,) = finish(engine, request)
    assert output.token_ids == said["old"]["PROMPT"]
    assert tokens(engine, OTHER) == said["old"]["OTHER"]
    with pytest.raises(InvalidRequest, match="level"):
        engine.sleep(3)


def test_an_update_reaches_an_engine_that_sleeps(engine, said, new):
    engine.sleep(1)
    engine.update_weights(new, version="new")
    engine.wake_up()
    assert tokens(engine, PROMPT) == said["new"]["PROMPT"]


def test_updates_under_load_lose_nothing(tiny, old, new):
    """Requests and versions arrive together; each text is that of the versions it names."""
    llm = LLM(tiny, max_num_seqs=4, max_num_batched_tokens=32, page_size=4)
    engine = AsyncEngine(llm.engine)
    compiled = llm.engine.num_compiled

    async def one(number):
        await asyncio.sleep(number * 0.01)
        weights, ids, last = set(), [], None
        prompt = [5 + number % 3, *range(9, 20)]
        async for last in engine.generate({"prompt_token_ids": prompt}, GREEDY):
            ids += last.outputs[0].token_ids
            weights = last.outputs[0].weights
        return prompt, ids, weights, last.outputs[0].finish_reason

    async def all_of_them():
        requests = [asyncio.create_task(one(number)) for number in range(32)]
        for number in range(12):
            policy = ("finish", "recompute", "continue")[number % 3]
            arrays, version = ((new, "new"), (old, "old"))[number % 2]
            await engine.update_weights(arrays, version=version, policy=policy)
        await engine.update_weights(old, version="old")
        return await asyncio.gather(*requests)

    found = asyncio.run(all_of_them())
    assert len(found) == 32
    assert {reason for *_, reason in found} == {"length"}
    assert llm.engine.num_compiled == compiled
    asyncio.run(_compare(engine, found, old, new))
    engine.close()


async def _compare(engine, found, old, new):
    """Requests of a single version say what that version says."""
    assert engine.weights_version == "old"
    for version, arrays in (("old", old), ("0", old), ("new", new)):
        await engine.update_weights(arrays, version=version)
        for prompt, ids, weights, _ in found:
            assert len(ids) == 20
            if weights == ((0, version),):
                again = [
                    t async for d in engine.generate(prompt, GREEDY) for t in d.outputs[0].token_ids
                ]
                assert ids == again


def test_who_waits_for_an_update_learns_that_the_engine_is_closed(tiny, new, monkeypatch):
    engine = AsyncEngine(LLM(tiny, max_num_seqs=4, max_num_batched_tokens=32, page_size=16).engine)
    asked = threading.Event()
    # The change never may begin.
    updates = engine._engine._updates
    monkeypatch.setattr(updates, "may_begin", lambda: bool(asked.set()))

    async def close_meanwhile():
        async with asyncio.timeout(60):
            update = asyncio.create_task(engine.update_weights(new))
            await asyncio.to_thread(asked.wait)
            await asyncio.to_thread(engine.close)
            with pytest.raises(EngineDead):
                await update

    asyncio.run(close_meanwhile())


def _values(llm, arrays):
    from slipway.convert import weight_sources

    return weight_sources.values(arrays, llm.engine.weights)


def test_resharding_between_engines(tiny, said):
    """One device -> four -> two copies of four: each engine serves the weights of the last."""
    options = dict(
        max_num_seqs=4, max_num_batched_tokens=32, page_size=16, skip_tokenizer_init=True
    )
    source = LLM(tiny, **options)
    for data, tensor in [(1, 4), (2, 4)]:
        llm = LLM(
            tiny,
            load_format="dummy",
            data_parallel_size=data,
            tensor_parallel_size=tensor,
            **options,
        )
        llm.update_weights(source.engine.weights)
        source.close()
        assert tokens(llm, PROMPT) == said["old"]["PROMPT"]
        assert len(llm.engine.weights.arrays[0].sharding.device_set) == data * tensor
        source = llm
    source.close()
    assert jax.device_count() == 8


WRAPPED = [
    "module.{}", "_orig_mod.{}", "_fsdp_wrapped_module.{}", "base_model.model.{}",
]  # fmt: skip


@pytest.mark.parametrize("form", [*WRAPPED, "base model", "peft"])
def test_names_of_trainers(engine, said, new, form, tmp_path):
    """Names that RL trainers push: with the wrappers of torch and PEFT, as arrays and as a file."""

    def named(name):
        if form == "base model":
            return name.removeprefix("model.")
        if form == "peft":
            return "base_model.model." + name.replace("_proj.", "_proj.base_layer.")
        return form.format(name)

    renamed = {named(name): array for name, array in new.items()}
    engine.update_weights(renamed.items(), version="pushed")
    assert tokens(engine, PROMPT) == said["new"]["PROMPT"]
    safetensors.numpy.save_file(renamed, tmp_path / "model.safetensors")
    engine.update_weights(str(tmp_path), version="from a file")
    assert tokens(engine, PROMPT) == said["new"]["PROMPT"]


def test_an_adapter_pushed_beside_its_base_is_refused_as_one(engine, new):
    pushed = {"base_model.model." + name: array for name, array in new.items()}
    pushed["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = np.ones(
        (1, 32), np.float32
    )
    with pytest.raises(CheckpointError) as caught:
        engine.update_weights(pushed)
    assert "LoRA adapter that is not merged" in str(caught.value)
    assert "mapping" not in str(caught.value)
