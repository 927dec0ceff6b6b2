"""Tokens of each expert: counted on the device, summed by the engine, shown as metrics."""

from pathlib import Path

import numpy as np
import pytest

from slipway import LLM, SamplingParams
from slipway.engine.stats import ExpertCounts
from slipway.errors import InvalidConfig
from slipway.server.metrics import Metrics

LING = Path(__file__).parents[1] / "data" / "families" / "ling1"
LAYERS, TOP_K, EXPERTS = 2, 2, 8
PROMPTS = [[5, 17, 99, 3], [250, 42, 7, 8, 9, 10, 11]]


def served(**options):
    """Generate 6 tokens for each prompt; return the engine."""
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 64}
    llm = LLM(LING, skip_tokenizer_init=True, memory_fraction=0.05, **sizes, **options)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    llm.generate(PROMPTS, params, use_tqdm=False)
    return llm.engine


@pytest.fixture(scope="module")
def engine():
    return served()


def test_every_computed_token_counts_once_for_each_of_its_experts(engine):
    snapshot = engine.snapshot()
    assert len(snapshot.expert_tokens) == EXPERTS
    assert sum(snapshot.expert_tokens) == snapshot.computed_tokens * LAYERS * TOP_K
    assert engine.snapshot().expert_tokens == snapshot.expert_tokens
    assert snapshot.expert_imbalance >= 1


def test_metrics_have_the_load(engine):
    snapshot = engine.snapshot()
    text = Metrics("m", vllm_names=False).text([snapshot, snapshot], 1).decode()
    expected = 2 * snapshot.expert_tokens[3]
    assert f'slipway_expert_tokens_total{{expert="3",model_name="m"}} {expected:.1f}' in text
    assert "slipway_expert_imbalance" in text


@pytest.mark.parametrize(
    "sizes", [(2, 1, 1), (1, 4, 2), (2, 2, 2)], ids=["two copies", "groups", "both"]
)
def test_the_load_does_not_depend_on_the_devices(engine, sizes):
    names = "data_parallel_size", "tensor_parallel_size", "expert_parallel_size"
    split = served(**dict(zip(names, sizes))).snapshot()
    alone = engine.snapshot()
    assert split.expert_tokens == alone.expert_tokens
    assert split.expert_imbalance == pytest.approx(alone.expert_imbalance)


def test_counting_begins_anew_after_a_reset_and_goes_on_after_sleep():
    engine = served()
    before = engine.snapshot().expert_tokens
    engine.sleep(1)
    engine.step()
    engine.wake_up()
    engine.step()
    assert engine.snapshot().expert_tokens == before
    engine.reset_stats()
    assert sum(engine.snapshot().expert_tokens) == 0


def test_groups_of_experts_are_refused_for_a_model_without_any():
    with pytest.raises(InvalidConfig, match="the model has no experts"):
        LLM(tensor_parallel_size=2, expert_parallel_size=2)


def test_counters_that_wrap_are_summed():
    counts, most = ExpertCounts(), 2**32 - 1
    counts.read([np.array([[most, 5]], np.uint32)])
    counts.read([np.array([[2, 7]], np.uint32)])
    assert counts.of_experts() == [most + 3, 7]


def test_the_imbalance_is_the_mean_of_the_layers():
    counts = ExpertCounts()
    assert counts.imbalance() == 0.0
    counts.read([np.array([[4, 0], [3, 3]], np.uint32)])
    assert counts.imbalance() == pytest.approx(1.5)
