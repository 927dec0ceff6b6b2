"""Asynchronous engine: streamed deltas, limits, aborts, failures and several event loops."""

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from slipway.async_engine import AsyncEngine
from slipway.engine.engine import Engine
from slipway.engine.params import SamplingParams
from slipway.errors import EngineBusy, EngineDead, InvalidRequest
from slipway.llm import LLM

pytestmark = pytest.mark.xdist_group("engine")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)


@pytest.fixture
def launch(tiny):
    """Function that starts an engine; all are closed, and must be without work or pages then."""
    started = []

    def start(**options):
        llm = LLM(tiny, max_num_seqs=4, max_num_batched_tokens=32, page_size=16)
        started.append(AsyncEngine(llm.engine, **options))
        return started[-1]

    yield start
    for engine in started:
        if engine.error is None:
            snapshot = asyncio.run(engine.stats())
            assert (snapshot.running, snapshot.waiting, snapshot.pages_used) == (0, 0, 0)
        engine.close()


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 1000, int(rng.integers(1, 30))).tolist() for _ in range(count)]


async def collect(engine, prompt, params=GREEDY, **options):
    """Return the joined deltas of each sample, and the last item."""
    texts, ids, logprobs, last = {}, {}, {}, None
    async for last in engine.generate(prompt, params, **options):
        for sample in last.outputs:
            texts[sample.index] = texts.get(sample.index, "") + sample.text
            ids.setdefault(sample.index, []).extend(sample.token_ids)
            logprobs.setdefault(sample.index, []).extend(sample.logprobs or [])
    return texts, ids, logprobs, last


def test_deltas_add_up_to_what_generate_gives(launch, llm):
    asked = prompts(12)
    params = [
        dataclasses.replace(
            GREEDY,
            n=1 + i % 3,
            temperature=float(i % 2),
            seed=i,
            max_tokens=3 + 5 * (i % 4),
        )
        for i in range(12)
    ]
    expected = llm.generate(asked, params, use_tqdm=False)
    engine = launch()

    async def run():
        return await asyncio.gather(*(collect(engine, *each) for each in zip(asked, params)))

    for (texts, ids, logprobs, last), output in zip(asyncio.run(run()), expected):
        assert last.finished
        reasons = [sample.finish_reason for sample in output.outputs]
        assert [sample.finish_reason for sample in last.outputs] == reasons
        for sample in output.outputs:
            assert texts[sample.index] == sample.text
            assert ids[sample.index] == sample.token_ids
            assert len(logprobs[sample.index]) == len(sample.token_ids)
            for one, other in zip(logprobs[sample.index], sample.logprobs):
                assert one.keys() == other.keys()


def test_deltas_hold_as_many_tokens_as_the_interval_says(tiny, llm):
    (prompt,) = prompts(1)
    (expected,) = llm.generate([prompt], GREEDY, use_tqdm=False)
    options = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "decode_steps": 1,
        "stream_interval": 4,
    }
    engine = AsyncEngine(LLM(tiny, **options).engine)

    async def run():
        return [delta.outputs[0] async for delta in engine.generate(prompt, GREEDY)]

    deltas = asyncio.run(run())
    engine.close()
    sizes = [len(delta.token_ids) for delta in deltas]
    assert sizes == [1, 4, 4, 3], "the first and the last at once"
    assert [token for delta in deltas for token in delta.token_ids] == expected.outputs[0].token_ids
    assert "".join(delta.text for delta in deltas) == expected.outputs[0].text


def test_leaving_early_frees_the_pages(launch):
    engine = launch()

    async def run():
        async for output in engine.generate([5, 6, 7], dataclasses.replace(GREEDY, max_tokens=40)):
            assert not output.finished
            break  # the loop closes the generator as soon as it has time to
        assert await engine.drain(timeout_s=30)
        snapshot = await engine.stats()
        assert (snapshot.running, snapshot.waiting, snapshot.pages_used) == (0, 0, 0)
        assert snapshot.stats.finished == {"abort": 1}

    asyncio.run(run())


def test_a_task_that_is_cancelled_at_any_moment_leaves_nothing(launch):
    engine = launch()

    async def run():
        for seed in range(40):
            tasks = [asyncio.create_task(collect(engine, prompt)) for prompt in prompts(4, seed)]
            await asyncio.sleep(0.0005 * (seed % 8))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert await engine.drain(timeout_s=30)
        snapshot = await engine.stats()
        assert (snapshot.running, snapshot.waiting, snapshot.pages_used) == (0, 0, 0)

    asyncio.run(run())


def test_abort_ends_the_stream_with_what_there_is(launch):
    engine = launch()

    async def run():
        items = []
        async for output in engine.generate([5, 6, 7], dataclasses.replace(GREEDY, max_tokens=50)):
            items.append(output)
            if len(items) == 2:
                engine.abort(output.request_id)
        assert items[-1].finished
        assert items[-1].outputs[0].finish_reason == "abort"

    asyncio.run(run())


def test_the_queue_is_bounded_and_says_so(launch):
    engine = launch(max_requests=2, max_tokens=40)

    async def run():
        long = dataclasses.replace(GREEDY, max_tokens=30)
        first = [engine.generate([5] * 8, long) for _ in range(2)]
        for stream in first:
            await anext(stream)
        with pytest.raises(EngineBusy, match="2 requests") as caught:
            await anext(engine.generate([5], GREEDY))
        assert caught.value.retry_after_s > 0
        await first.pop().aclose()
        with pytest.raises(EngineBusy, match="prompt tokens"):
            await anext(engine.generate([5] * 35, GREEDY))
        await collect(engine, [5], GREEDY)
        await first.pop().aclose()

    asyncio.run(run())


def test_a_refused_request_takes_no_place(launch):
    engine = launch(max_requests=1)

    async def run():
        for bad in ([], [10**6], "", {"prompt": "a", "promt": "b"}):
            with pytest.raises(InvalidRequest):
                await anext(engine.generate(bad, GREEDY))
        await collect(engine, "def f(x):")

    asyncio.run(run())


def test_drain_waits_for_what_runs_and_admits_nobody(launch):
    engine = launch()

    async def run():
        tasks = [asyncio.create_task(collect(engine, prompt)) for prompt in prompts(6)]
        await asyncio.sleep(0)
        assert await engine.drain() is True
        assert {(await task)[3].outputs[0].finish_reason for task in tasks} == {"length"}
        with pytest.raises(EngineBusy, match="drain"):
            await anext(engine.generate([5], GREEDY))

    asyncio.run(run())


def test_a_drain_that_takes_too_long_aborts(launch):
    engine = launch()

    async def run():
        params = dataclasses.replace(GREEDY, max_tokens=40)
        tasks = [asyncio.create_task(collect(engine, prompt, params)) for prompt in prompts(40)]
        await asyncio.sleep(0.01)
        assert await engine.drain(timeout_s=0.0) is False
        assert "abort" in {(await task)[3].outputs[0].finish_reason for task in tasks}

    asyncio.run(run())


def test_an_engine_that_fails_ends_every_stream(launch, monkeypatch, caplog):
    engine = launch()

    async def run():
        stream = engine.generate([5, 6], dataclasses.replace(GREEDY, max_tokens=60))
        await anext(stream)

        def broken(self):
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(Engine, "step", broken)
        with pytest.raises(EngineDead, match="the device is gone"):
            while True:
                await anext(stream)
        with pytest.raises(EngineDead):
            await anext(engine.generate([5], GREEDY))

    asyncio.run(run())
    assert "the engine stops" in caplog.text


def test_close_ends_every_stream(launch):
    before = set(threading.enumerate())
    engine = launch()

    async def run():
        stream = engine.generate([5, 6], dataclasses.replace(GREEDY, max_tokens=60))
        await anext(stream)
        engine.close()
        with pytest.raises(EngineDead, match="closed"):
            while True:
                await anext(stream)

    asyncio.run(run())
    left = set(threading.enumerate()) - before
    assert not left, "the engine's thread has ended"


def test_several_event_loops_share_one_engine(launch, llm):
    asked, engine, found = prompts(6), launch(), {}
    outputs = llm.generate(asked, GREEDY, use_tqdm=False)
    expected = [output.outputs[0].token_ids for output in outputs]

    def thread(index):
        found[index] = asyncio.run(collect(engine, asked[index]))[1][0]

    threads = [threading.Thread(target=thread, args=(index,)) for index in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert [found[index] for index in range(6)] == expected


def test_best_of_comes_whole(launch, llm):
    params = SamplingParams(n=1, best_of=4, temperature=1.0, max_tokens=5, seed=3, ignore_eos=True)
    expected = llm.generate([5, 6, 7], params)[0]
    texts, ids, _, last = asyncio.run(collect(launch(), [5, 6, 7], params))
    assert last.finished
    assert ids == {0: expected.outputs[0].token_ids}
    assert texts[0] == expected.outputs[0].text


def test_embeddings_come_through(launch, llm):
    (vector,) = llm.encode("def f(x):", normalize=False)
    params = SamplingParams(max_tokens=1)
    last = asyncio.run(collect(launch(), "def f(x):", params, pooling="last"))[3]
    # the shared engine's pages of 4 tokens use the portable attention
    np.testing.assert_allclose(last.hidden, vector, rtol=1e-5, atol=1e-5)
