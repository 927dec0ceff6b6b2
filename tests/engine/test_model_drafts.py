"""Drafts that a layer of the model makes on the device: those of torch, and plain outputs.

The tiny MiMo of tests/data has a random prediction layer, which is never right. So that steps
accept drafts, the true continuations are verified in their place; the layer's own drafts after
them are compared with tests/models/published.py.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slipway.checkpoint import files
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestSpec
from slipway.errors import CheckpointError, InvalidConfig
from slipway.llm import LLM
from tests.engine.test_speculation import outputs_of, run
from tests.models import published

pytestmark = pytest.mark.xdist_group("mimo")
MIMO = Path(__file__).parents[1] / "data" / "families" / "mimo"
OPTIONS = {"skip_tokenizer_init": True, "max_num_seqs": 4, "max_num_batched_tokens": 32}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 512, length).tolist() for length in (1, 7, 40, 3, 90)]


def asked():
    """Greedy and sampled requests, one with a rule; the long prompts are computed in chunks."""
    sampled = [
        SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True, seed=5, top_p=0.9),
        SamplingParams(temperature=0.7, max_tokens=20, seed=6, repetition_penalty=1.4),
        SamplingParams(temperature=0.0, max_tokens=17, prompt_logprobs=1, logit_bias={3: 2.0}),
    ]
    kinds = [GREEDY, *sampled, GREEDY]
    return [RequestSpec(prompt, params) for prompt, params in zip(prompts(), kinds)]


def engine(directory=MIMO, count=3, **options):
    config = {"method": "mtp", "num_speculative_tokens": count}
    return LLM(directory, speculative_config=config, **OPTIONS, **options)


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory):
    """MiMo with a prediction layer that is right for most tokens.

    Layers add nothing to the residual stream, so the next token follows from the last one alone;
    the prediction layer computes the same from the next token, but for some noise.
    """
    directory = tmp_path_factory.mktemp("agreeing")
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(MIMO / files.SINGLE)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        elif "norm" in name:
            tensor.fill_(1.0)
    projection = tensors["model.mtp_layers.0.input_proj.weight"]
    size = projection.shape[0]
    projection[:, :size] = 0.01 * torch.randn((size, size), generator=generator)
    projection[:, size:] = torch.eye(size)
    save_file(tensors, directory / files.SINGLE)
    (directory / "config.json").write_text((MIMO / "config.json").read_text())
    return directory


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"decode_steps": 1},
        {"tensor_parallel_size": 2, "decode_steps": 4},
        {"tensor_parallel_size": 2, "data_parallel_size": 2, "decode_steps": 3},
    ],
)
def test_rounds_on_the_device_give_plain_outputs(agreeing, sizes):
    """Drafts are made, verified and accepted in several rounds of one call."""
    with LLM(agreeing, decode_steps=1, **OPTIONS) as llm:
        expected = run(llm, asked())
    with engine(agreeing, **sizes) as llm:
        dice = random.Random(4)
        # Rounds alternate with steps without drafts, which are dispatched ahead.
        llm.engine._speculation.lengths.choose = lambda rates, most: most * dice.randint(0, 1)
        results = [run(llm, asked(), each) for each in (None, random.Random(1), random.Random(2))]
        stats, before = llm.engine.stats, llm.engine.num_compiled
        for scheduler in llm.engine.schedulers:
            free = scheduler.pages.num_free + scheduler.tree.num_unlocked
            assert free == scheduler.pages.num_pages
        assert llm.engine.num_compiled == before
    for got in results:
        for one, other in zip(got, expected):
            if "tensor_parallel_size" in sizes:
                assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]
            else:
                assert outputs_of(one) == outputs_of(other)
    accepted, drafted = stats.spec_decode_num_accepted_tokens, stats.spec_decode_num_draft_tokens
    assert 0.3 * drafted < accepted < drafted
    assert len(stats.spec_decode_accepted_per_pos) == 3
    assert sum(one.drafts.accepted for got in results for one in got) == accepted


def always(llm, expected, seed=0):
    """Let an engine verify true continuations of random length; return the layer's own drafts.

    The result fills with (tokens of a sequence, drafts of the layer after them).
    """
    speculation, dice, own = llm.engine._speculation, random.Random(seed), []
    drafter = speculation.on_device
    known = {tuple(r.prompt_token_ids): r.outputs[0].token_ids for r in expected}

    def put(sequence, drafts):
        own.append((sequence.tokens[: sequence.num_tokens].tolist(), drafts))
        start = sequence.num_tokens - sequence.num_prompt
        true = known[tuple(sequence.tokens[: sequence.num_prompt].tolist())][start:]
        drafter._held[sequence] = (
            sequence.num_tokens,
            [*true[: dice.randint(0, 2)], dice.randrange(512)],
        )

    drafter.put = put
    speculation.lengths.choose = lambda rates, most: most
    return own


@pytest.fixture(scope="module")
def expected():
    with LLM(MIMO, decode_steps=1, **OPTIONS) as llm:
        return run(llm, asked())


@pytest.mark.parametrize(
    "sizes",
    [{}, {"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "data_parallel_size": 2}],
)
def test_outputs_are_plain_and_drafts_those_of_torch(expected, sizes):
    weights = load_file(MIMO / files.SINGLE)
    config = json.loads((MIMO / "config.json").read_text())
    with engine(**sizes, decode_steps=2) as llm:
        own = always(llm, expected)
        got = run(llm, asked(), random.Random(3))
        stats = llm.engine.stats
    for one, other in zip(got, expected):
        if sizes:
            assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]
        else:
            assert outputs_of(one) == outputs_of(other)
    assert 20 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens
    greedy = [tuple(prompts()[0]), tuple(prompts()[4])]
    compared = 0
    for tokens, drafts in own:
        if not any(tuple(tokens[: len(prompt)]) == prompt for prompt in greedy):
            continue
        for draft in drafts[:1]:
            logits = published.mimo_draft_logits(weights, config, tokens)[-1]
            best, second = torch.topk(logits, 2).values.tolist()
            assert draft == int(logits.argmax()) or best - second < 1e-4
            compared += 1
    assert compared >= 12


def test_further_drafts_of_a_chain(expected):
    """The layer is applied to its own hidden state and draft, at the next position."""
    weights = load_file(MIMO / files.SINGLE)
    config = json.loads((MIMO / "config.json").read_text())
    with engine(decode_steps=2) as llm:
        own = always(llm, expected)
        run(llm, asked()[:1])
    # The last drafts are those behind the longest length.
    chains = [(tokens, drafts) for tokens, drafts in own[:-1] if len(drafts) == 3]
    assert len(chains) > 3
    for tokens, drafts in chains:
        assert drafts == published.mimo_drafts(weights, config, tokens, 3)


def test_the_engine_chooses_by_itself(expected):
    """Drafts of a random layer are never right: they are given up."""
    with engine() as llm:
        got = run(llm, asked())
        again = run(llm, asked())
        stats = llm.engine.stats
    for each in (got, again):
        assert [outputs_of(one) for one in each] == [outputs_of(other) for other in expected]
    assert stats.spec_decode_num_accepted_tokens < 5


def test_a_model_without_the_layer_is_refused(tiny, tmp_path):
    with pytest.raises(InvalidConfig, match="speculative_config: method: got 'mtp'"):
        engine(tiny)
    config = json.loads((MIMO / "config.json").read_text())
    tensors = load_file(MIMO / files.SINGLE)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    files_of = {name: t for name, t in tensors.items() if "mtp_layers" not in name}
    save_file(files_of, tmp_path / files.SINGLE)
    with pytest.raises(InvalidConfig, match="num_nextn_predict_layers"):
        engine(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mtp_layers\.0\.input_proj\.weight: missing"):
        engine(tmp_path)
    assert len(LLM(tmp_path, **OPTIONS).generate([1, 2], GREEDY)[0].outputs[0].token_ids) == 24


def test_a_prediction_layer_gets_new_weights(agreeing):
    """A source with the layer's tensors changes it too; a part of them changes nothing."""
    weights = {name: t.numpy() for name, t in load_file(agreeing / files.SINGLE).items()}
    layer = [name for name in weights if "mtp_layers" in name]
    spoilt = {name: np.roll(weights[name], 1, axis=0) for name in layer}
    accepted = []
    with engine(agreeing) as llm:
        llm.engine._speculation.lengths.choose = lambda rates, most: most

        def measure():
            before = llm.engine.stats.spec_decode_num_accepted_tokens
            tokens = [o.outputs[0].token_ids for o in run(llm, [RequestSpec([5, 6], GREEDY)])]
            accepted.append(llm.engine.stats.spec_decode_num_accepted_tokens - before)
            return tokens

        first = measure()
        with pytest.raises(CheckpointError, match=rf"{layer[0]}: missing"):
            llm.update_weights({n: a for n, a in weights.items() if n != layer[0]})
        others = {name: array for name, array in weights.items() if name not in layer}
        for source in (weights | spoilt, others, weights):
            llm.update_weights(source)
            assert measure() == first
    assert accepted[1] == accepted[2] < accepted[0] == accepted[3]


def test_sleep_and_new_weights(expected):
    with engine() as llm:
        always(llm, expected)
        llm.sleep()
        llm.wake_up()
        tensors = {name: t.numpy() for name, t in load_file(MIMO / files.SINGLE).items()}
        llm.update_weights(tensors)
        got = run(llm, asked())
    assert [outputs_of(one) for one in got] == [outputs_of(other) for other in expected]
