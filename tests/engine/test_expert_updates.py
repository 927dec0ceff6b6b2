"""New weights of a running MoE engine: by HF keys, as transformers 5 holds them, and on devices."""

import jax
import numpy as np
import pytest
import torch

from slipway.checkpoint import files
from slipway.errors import CheckpointError
from tests.models import runner
from tests.models.runner import Case

QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
CASES = [
    Case("qwen3-moe", "qwen3_moe", QWEN),
    Case("mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
]
PROMPTS = [[1, 2, 3], [7, 8, 9, 10, 11]]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def models(request, tmp_path):
    """Directories of two models of one architecture, and transformers' model of the second."""
    first, second = tmp_path / "first", tmp_path / "second"
    theirs = runner.make_checkpoint(request.param, first)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.roll(parameter, 1, 0))
    theirs.save_pretrained(second)
    return first, second, theirs


def tokens(llm):
    return runner.greedy(llm, PROMPTS, 8)


def in_memory(theirs):
    return {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}


def by_file(second):
    checkpoint = files.open_checkpoint(second)
    return {name: np.array(checkpoint.array(name)) for name in checkpoint.tensors}


@pytest.mark.parametrize("mode", ["inplace", "atomic"])
@pytest.mark.parametrize("kind", ["directory", "HF keys", "in memory", "on devices"])
def test_every_form_of_the_weights_gives_the_tokens_of_a_fresh_engine(models, kind, mode):
    first, second, theirs = models
    source = {
        "directory": lambda: str(second),
        "HF keys": lambda: by_file(second),
        "in memory": lambda: in_memory(theirs),
        "on devices": lambda: jax.device_put(in_memory(theirs), jax.devices()[1]),
    }[kind]()
    llm, expected = runner.engine_of(first), tokens(runner.engine_of(second))
    before, compiled = tokens(llm), llm.engine.num_compiled
    assert before != expected
    llm.update_weights(source, mode=mode)
    assert tokens(llm) == expected
    assert llm.engine.num_compiled == compiled
    llm.update_weights(str(first), mode=mode)
    assert tokens(llm) == before


def test_groups_of_devices_take_new_weights(models):
    first, second, theirs = models
    llm = runner.engine_of(first, tensor_parallel_size=4, expert_parallel_size=2)
    llm.update_weights(in_memory(theirs))
    assert tokens(llm) == tokens(runner.engine_of(second))


def test_a_stack_of_another_shape_is_refused_and_changes_nothing(models):
    first, _, theirs = models
    llm, arrays = runner.engine_of(first), in_memory(theirs)
    before = tokens(llm)
    name = next(name for name in arrays if name.endswith("gate_up_proj"))
    arrays[name] = arrays[name][:-1]
    with pytest.raises(CheckpointError, match="gate_up_proj: shape"):
        llm.update_weights(arrays)
    assert tokens(llm) == before
