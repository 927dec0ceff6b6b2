"""The whole engine: tokens depend on their request only, nothing compiles while it serves.

The memory that it uses is the budgeted one.
"""

import dataclasses

import jax
import numpy as np
import pytest

from slipway.engine import memory, pipeline, programs
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestSpec
from slipway.errors import OutOfMemory
from slipway.llm import LLM
from slipway.ops import cpu

pytestmark = pytest.mark.xdist_group("engine")  # one worker compiles the shared engine

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LENGTHS = (1, 2, 3, 5, 8, 13, 31, 33, 50)


def prompts(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 1000, length).tolist() for length in lengths]


def run(llm, prompts_, params=GREEDY):
    """Return the tokens of every sample, request by request."""
    outputs = llm.generate(prompts_, params, use_tqdm=False)
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def alone(_shared_llm):
    """Greedy tokens of each prompt when it runs alone, in as few chunks as possible."""
    found = [run(_shared_llm, [prompt])[0] for prompt in prompts()]
    assert len({tuple(tokens[0]) for tokens in found}) == len(found), (
        "a model that says one thing proves nothing"
    )
    assert all(len({*tokens[0]}) > 3 for tokens in found)
    return found


def test_greedy_tokens_do_not_depend_on_the_batch(llm, alone):
    noise = [
        SamplingParams(temperature=t, max_tokens=m, seed=m)
        for t, m in [(0.7, 3), (1.5, 9), (1.0, 17)]
    ]
    company = prompts((7, 40, 21), seed=1)
    mixed = [prompt for i, own in enumerate(prompts()) for prompt in (own, company[i % 3])]
    params = [each for i in range(len(LENGTHS)) for each in (GREEDY, noise[i % 3])]
    assert run(llm, mixed, params)[::2] == alone


PRECISIONS = [
    {},
    {"dtype": "bfloat16"},
    {"quantization": "int8"},
    {"dtype": "bfloat16", "tensor_parallel_size": 2},
]


@pytest.mark.skipif(
    cpu.isa() is None, reason="the portable bodies promise equal tokens, not equal bits"
)
@pytest.mark.parametrize("options", PRECISIONS, ids=str)
def test_log_probabilities_are_the_same_bits_in_any_company(tiny, options, monkeypatch):
    """Log probabilities and ranks of sampled, likeliest and prompt tokens.

    Alone, in a batch, behind a cached prefix, and in chunks.
    """
    llm = LLM(
        tiny,
        max_num_seqs=4,
        max_num_batched_tokens=40,
        page_size=16,
        skip_tokenizer_init=True,
        **options,
    )
    asked = dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=2)
    company = [SamplingParams(temperature=1.0, max_tokens=m, seed=m) for m in (3, 9, 17)]
    mixed = [
        prompt
        for i, own in enumerate(prompts())
        for prompt in (own, prompts((7, 40, 21), seed=1)[i % 3])
    ]
    params = [each for i in range(len(LENGTHS)) for each in (asked, company[i % 3])]
    alone_ = []
    for prompt in prompts():
        llm.engine.flush()
        alone_.append(llm.generate([prompt], asked, use_tqdm=False)[0])
    llm.engine.flush()
    together = llm.generate(mixed, params, use_tqdm=False)[::2]
    # Without scores, cached tokens are not computed again.
    unscored = dataclasses.replace(asked, prompt_logprobs=None)
    cached = llm.generate(prompts(), unscored, use_tqdm=False)
    assert cached[-1].num_cached_tokens >= 32
    llm.engine.flush()
    monkeypatch.setattr(llm.engine.schedulers[0], "max_num_tokens", 7)
    chunked = llm.generate(prompts(), asked, use_tqdm=False)
    for others in (together, cached, chunked):
        for one, other in zip(alone_, others, strict=True):
            assert one.outputs[0].token_ids == other.outputs[0].token_ids
            assert one.outputs[0].logprobs == other.outputs[0].logprobs
    assert [one.prompt_logprobs for one in alone_] == [other.prompt_logprobs for other in together]
    assert [one.prompt_logprobs for one in alone_] == [other.prompt_logprobs for other in chunked]


@pytest.mark.parametrize("budget", [4, 7, 32])
def test_greedy_tokens_do_not_depend_on_the_chunks(llm, alone, budget, monkeypatch):
    monkeypatch.setattr(llm.engine.schedulers[0], "max_num_tokens", budget)
    assert run(llm, prompts()) == alone


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_parallel_size": 2},
        {"data_parallel_size": 2},
        {"tensor_parallel_size": 4, "data_parallel_size": 2},
    ],
    ids=str,
)
def test_parallel_engines_give_one_devices_tokens(tiny, alone, sizes):
    """On 4 devices each KV head is held twice, and the odd vocabulary is padded."""
    llm = LLM(
        tiny,
        max_num_seqs=2,
        max_num_batched_tokens=2,
        page_size=4,
        skip_tokenizer_init=True,
        **sizes,
    )
    assert llm.engine.limits.copies == sizes.get("data_parallel_size", 1)
    assert run(llm, prompts()) == alone


def test_nothing_compiles_while_serving(llm):
    compiled = []
    listener = lambda event, seconds, **_: compiled.append(event)  # noqa: E731  must be the same object to unregister
    before = llm.engine.num_compiled
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for length in (*range(1, 12), 31, 32, 33, 60):
            kinds = (
                SamplingParams(max_tokens=3, logprobs=2),
                SamplingParams(max_tokens=4, top_p=0.5, n=3),
                GREEDY,
            )
            run(llm, prompts([length] * 3), kinds)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert [event for event in compiled if "compile" in event] == []
    assert llm.engine.num_compiled == before


SAMPLED = SamplingParams(temperature=1.0, max_tokens=8, seed=2**32 - 2, ignore_eos=True)


def test_a_seed_gives_the_same_tokens_in_any_company(llm):
    (prompt,) = prompts([9])
    first = run(llm, [prompt], SAMPLED)[0]
    assert (
        run(
            llm,
            [*prompts([3, 30], seed=2), prompt],
            [GREEDY, SamplingParams(max_tokens=20), SAMPLED],
        )[2]
        == first
    )


def test_samples_differ_and_equal_their_own_seeds(llm):
    (prompt,) = prompts([9])
    samples = run(
        llm,
        [prompt],
        SamplingParams(n=6, temperature=1.0, max_tokens=8, seed=2**32 - 2, ignore_eos=True),
    )[0]
    assert len({tuple(tokens) for tokens in samples}) == 6
    seeds = [(SAMPLED.seed + i) % 2**32 for i in range(6)]
    solo = [
        SamplingParams(temperature=1.0, max_tokens=8, seed=seed, ignore_eos=True) for seed in seeds
    ]
    assert [[tokens] for tokens in samples] == run(llm, [prompt] * 6, solo)


def test_without_seeds_equal_requests_differ(llm):
    tokens = run(
        llm, prompts([5]) * 4, SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    )
    assert len({tuple(sample) for (sample,) in tokens}) == 4


def test_abort_frees_pages_and_leaves_the_others_alone(llm, alone):
    engine, own = llm.engine, prompts()
    scheduler = engine.schedulers[0]
    ids = [engine.add(RequestSpec(prompt, GREEDY)) for prompt in own[:6]]  # four run, two wait
    finished, free = {}, []
    for step in range(200):
        for request in engine.step():
            finished[request.request_id] = request.output()
        if step == 2:
            free.append(scheduler.pages.num_free)
            aborted = [engine.abort(ids[0]), engine.abort(ids[5])]
            free.append(scheduler.pages.num_free)
        if not engine.has_work():
            break
    assert free[1] > free[0]
    assert [output.outputs[0].finish_reason for output in aborted] == ["abort", "abort"]
    assert aborted[0].finished and aborted[0].outputs[0].token_ids == alone[0][0][:2], (
        "the third is on the device"
    )
    for i in range(1, 5):
        assert [sample.token_ids for sample in finished[ids[i]].outputs] == alone[i]
    with pytest.raises(KeyError):
        engine.abort(ids[0])


@pytest.mark.parametrize(
    "long, at_an_end, waits", [(0, 0, "always"), (1e9, 0, "at an end"), (1e9, 1e9, "never")]
)
def test_who_comes_upon_the_results_of_a_long_step_is_in_the_next(
    llm, monkeypatch, long, at_an_end, waits
):
    monkeypatch.setattr(pipeline, "LONG", long)
    monkeypatch.setattr(pipeline, "LONG_AT_AN_END", at_an_end)
    engine, one_token = llm.engine, dataclasses.replace(GREEDY, max_tokens=1)
    engine.add(RequestSpec([5] * 3, GREEDY))
    engine.step()
    ending = engine.add(RequestSpec([5, 6, 7], one_token))
    steps, moved = engine.stats.steps, []
    while ending not in [request.request_id for request in moved]:
        steps, moved = engine.stats.steps, engine.step()
    assert (engine.stats.steps == steps) == (waits != "never"), (
        "the next step was planned without who may come now"
    )
    if waits == "at an end":
        engine.step()
        steps = engine.stats.steps
        assert engine.step() and engine.stats.steps == steps + 1, "steps that end nobody overlap"
    while engine.has_work():
        engine.step()


def test_stats_count_every_token_once(llm):
    stats = llm.engine.stats
    before = stats.prompt_tokens, stats.generated_tokens
    run(llm, prompts((5, 40)), SamplingParams(n=2, max_tokens=6, ignore_eos=True))
    assert (stats.prompt_tokens - before[0], stats.generated_tokens - before[1]) == (2 * 45, 4 * 6)


PAGE_BYTES = 2 * 4 * 2 * 2 * 8 * 4  # layers, slots, key and value, KV heads, head_dim, f32
WIDTH = 16  # pages of a full context


def launched(tiny, monkeypatch, free_bytes, **options):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free_bytes)
    return LLM(tiny, page_size=4, max_num_seqs=4, max_num_batched_tokens=8, **options).engine


def weights_bytes(engine):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(engine.weights.arrays))


def cache_bytes(engine):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(engine.runner.state[programs.CACHES]))


def test_the_cache_follows_the_budget(tiny, monkeypatch, uncompiled):
    plenty = launched(tiny, monkeypatch, 2**33)
    assert plenty.limits.num_pages == (4 * WIDTH,), "no more than could be useful"
    base = weights_bytes(plenty) + uncompiled
    for pages in (1, 10, 33):
        engine = launched(
            tiny, monkeypatch, base + pages * PAGE_BYTES + PAGE_BYTES // 2, memory_fraction=1.0
        )
        assert engine.limits.num_pages == (pages,)
        assert cache_bytes(engine) == pages * PAGE_BYTES
        half = launched(tiny, monkeypatch, 2 * (base + pages * PAGE_BYTES), memory_fraction=0.5)
        assert half.limits.num_pages == (pages,)


@pytest.mark.parametrize("missing", [PAGE_BYTES, 50_000, 10**6])
def test_too_little_memory_is_refused(tiny, monkeypatch, uncompiled, missing):
    needed = weights_bytes(launched(tiny, monkeypatch, 2**33)) + uncompiled + PAGE_BYTES
    with pytest.raises(OutOfMemory, match="memory_fraction"):
        launched(tiny, monkeypatch, needed - missing, memory_fraction=1.0)


def test_dummy_weights_are_a_function_of_the_seed(config_only, uncompiled):
    def weights(seed):
        engine = LLM(config_only(), load_format="dummy", skip_tokenizer_init=True, seed=seed).engine
        return [np.asarray(leaf) for leaf in jax.tree.leaves(engine.weights.arrays)]

    one, same, other = weights(1), weights(1), weights(2)
    assert all(np.array_equal(a, b) for a, b in zip(one, same))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other))
