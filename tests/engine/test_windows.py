"""Two kinds of layers: those with a sliding window free the pages behind it.

The memory budget counts the pages of both kinds.
"""

import pytest
import torch
import transformers

from slipway import LLM, SamplingParams
from slipway.cache.windows import FREED
from slipway.engine import memory, programs
from slipway.engine.request import RequestSpec

WINDOW, PAGE_SIZE, LONGEST = 20, 4, 128
OPTIONS = {
    "skip_tokenizer_init": True, "page_size": PAGE_SIZE, "max_model_len": LONGEST,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
PROMPTS = [list(range(3, 40)), [*range(3, 35), 90, 91], [7] * 5]


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """Qwen2 with layers of full attention and of a window of 20, and transformers' model."""
    directory = tmp_path_factory.mktemp("sliding")
    config = transformers.Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        sliding_window=WINDOW,
        use_sliding_window=True,
        layer_types=[
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ],
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    model.save_pretrained(directory)
    return directory, model


def theirs(model, prompt):
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "options", [{}, {"decode_steps": 1}, {"data_parallel_size": 2}, {"tensor_parallel_size": 2}]
)
def test_tokens_are_transformers_over_windows_that_slide(sliding, options):
    directory, model = sliding
    with LLM(directory, dtype="float32", **OPTIONS, **options) as llm:
        assert [spec.window for spec in llm.engine.weights.declaration.cache_specs] == [
            WINDOW,
            None,
        ]
        for _ in range(2):  # the second time from the prefix cache
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == [
                theirs(model, p) for p in PROMPTS
            ]
        assert outputs[0].num_cached_tokens > 0


def test_pages_behind_the_window_are_freed_while_a_sequence_runs(sliding):
    directory, _ = sliding
    with LLM(directory, dtype="float32", **OPTIONS) as llm:
        engine = llm.engine
        request = engine.request(engine.add(RequestSpec(PROMPTS[0], GREEDY)))
        (pool,), (sequence,) = engine.schedulers[0].windows, request.sequences
        most = (
            WINDOW - 1 + 8 + 8
        ) // PAGE_SIZE + 2  # a chunk of eight tokens, or eight decode steps in a call
        held = []
        while engine.is_running(request.request_id):
            engine.step()
            if sequence.slot >= 0:
                held.append(sum(page != FREED for page in sequence.window_pages[0]))
                assert held[-1] <= most
                assert len(sequence.pages) == len(sequence.window_pages[0])
        assert len(sequence.token_ids) == 60
        assert max(held) > WINDOW // PAGE_SIZE
        assert pool.num_available == pool.num_pages


def test_the_page_budget_sums_both_kinds(sliding, monkeypatch):
    directory, _ = sliding
    page_bytes = 2 * 2 * PAGE_SIZE * 8 * 4  # keys and values of two heads of 8 numbers, float32
    with LLM(directory, dtype="float32", **OPTIONS) as llm:
        useful = llm.engine.limits.num_pages
        weights = sum(array.nbytes for array in llm.engine.weights.arrays)
        temp = llm.engine.runner.temp_bytes()
        assert useful == (4 * LONGEST // PAGE_SIZE,) * 2, (
            "where memory is ample, the prefix cache may keep all pages"
        )
        caches = llm.engine.runner.state[programs.CACHES]
        assert [cache.kv.nbytes for cache in caches] == [
            3 * useful[1] * page_bytes,
            2 * useful[0] * page_bytes,
        ]
    needed = 4 * ((WINDOW - 1) // PAGE_SIZE + 3) + 2
    few = 20
    free = weights + temp + few * 5 * page_bytes + page_bytes
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    with LLM(directory, dtype="float32", memory_fraction=1.0, **OPTIONS) as llm:
        full, sliding_pages = llm.engine.limits.num_pages
        assert full == sliding_pages, "below what sequences need, both have as many"
        assert few <= full <= few + 2  # temporaries depend a little on the number of pages
    more = 60
    free = weights + temp + (needed * 5 + (more - needed) * 2) * page_bytes + page_bytes
    with LLM(directory, dtype="float32", memory_fraction=1.0, **OPTIONS) as llm:
        full, sliding_pages = llm.engine.limits.num_pages
        assert sliding_pages == needed
        assert more <= full <= more + 5, "above it, the rest goes to the layers that see everything"
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == 60 for output in outputs)
