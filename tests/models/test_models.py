"""Every architecture against transformers in float32, on tiny random models that differ in
shape."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from slipway import tree
from slipway.checkpoint import files
from slipway.ops import cpu
from tests.models import runner
from tests.models.runner import Case, Forward

LOGITS = 1e-4  # float32, absolute; logits of these models are of size 10
# Share of the largest logit in bfloat16: 15 roundings of 2**-8, as both sides round the results of
# each layer.
BF16_LOGITS = 0.06

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500000.0,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
WINDOW_ONLY = {"sliding_window": 16}
DEFAULT = {"rope_type": "default", "rope_theta": 1000000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {"shared_expert_intermediate_size": 48}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 32}
GROUPED = {
    "head_dim": 32, "n_routed_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2, "routed_scaling_factor": 1.5,
}  # fmt: skip
LATENT_SIZES = {
    "num_key_value_heads": 8, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12, "head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = GROUPED | LATENT_SIZES
FAR = {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.9}}
TIED, BIASES = {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}


def shape(kv_heads: int, head_dim: int, rope: dict, **fields) -> dict:
    """Return the fields of a configuration with 8 heads."""
    return {
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rope_parameters": rope,
        **fields,
    }


CASES = [
    Case("llama2", "llama", shape(8, 24, {"rope_type": "default", "rope_theta": 10000.0})),
    Case("llama3", "llama", shape(4, 64, LLAMA3, vocab_size=131)),
    Case("llama-linear-biases-tied", "llama", shape(4, 40, LINEAR, **BIASES, **TIED)),
    Case("llama-dynamic", "llama", shape(2, 80, DYNAMIC, max_position_embeddings=64)),
    Case("llama-yarn-mqa", "llama", shape(1, 128, YARN)),
    Case("qwen2", "qwen2", {"num_key_value_heads": 2, "rope_parameters": DEFAULT}),
    Case("qwen2-window-tied", "qwen2", {"num_key_value_heads": 4, **WINDOW, **TIED}),
    Case("qwen3-tied", "qwen3", shape(4, 128, DEFAULT, **TIED)),
    Case("qwen3-bias-yarn", "qwen3", shape(1, 24, YARN, attention_bias=True, vocab_size=131)),
    Case("qwen3-window", "qwen3", shape(8, 40, DEFAULT, **WINDOW)),
    Case("qwen2-moe-every-second", "qwen2_moe", MOE | SHARED | {"decoder_sparse_step": 2}),
    Case("qwen2-moe-window", "qwen2_moe", MOE | SHARED | WINDOW | {"norm_topk_prob": True}),
    Case("qwen3-moe-one-dense", "qwen3_moe", shape(4, 32, DEFAULT, mlp_only_layers=[0], **MOE)),
    Case("qwen3-moe-norm", "qwen3_moe", shape(2, 24, YARN, norm_topk_prob=True, **MOE)),
    Case("mixtral", "mixtral", LOCAL | WINDOW_ONLY),
    Case("olmoe", "olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "attention_bias": True}),
    Case("glm4-moe", "glm4_moe", GROUPED | {"use_qk_norm": True, "n_shared_experts": 2}),
    Case("glm4-moe-bias", "glm4_moe", GROUPED | {"head_dim": 24, "attention_bias": True}),
    Case("minimax-m2", "minimax_m2", LOCAL),
    Case("gpt-oss", "gpt_oss", LOCAL | WINDOW_ONLY),
    Case("deepseek-v2", "deepseek_v2", LATENT | {"topk_method": "group_limited_greedy"}),
    Case("deepseek-v2-lite", "deepseek_v2", LATENT | FAR | {"q_lora_rank": None}),
    Case("deepseek-v3", "deepseek_v3", LATENT | FAR | {"attention_bias": True}),
]


@pytest.fixture(
    scope="module",
    params=[pytest.param(c, marks=pytest.mark.xdist_group(c.name), id=c.name) for c in CASES],
)
def model(request, tmp_path_factory):
    """Checkpoint and transformers' model of it."""
    directory = tmp_path_factory.mktemp(request.param.name)
    return directory, runner.make_checkpoint(request.param, directory)


@pytest.fixture(scope="module")
def forward(model) -> Forward:
    """Our forward pass of the same checkpoint."""
    return Forward(model[0])


def test_logits(model, forward):
    for prompt in runner.prompts():
        np.testing.assert_allclose(
            forward(prompt), runner.their_logits(model[1], prompt), atol=LOGITS, rtol=0
        )


def test_prefill_equals_token_by_token(forward):
    prompt = runner.prompts()[-1]
    whole = forward(prompt)
    np.testing.assert_allclose(forward(prompt, [1] * len(prompt)), whole, atol=LOGITS, rtol=0)
    np.testing.assert_allclose(forward(prompt, [37, 1, 40, 22]), whole, atol=LOGITS, rtol=0)


def test_greedy_tokens(model):
    asked = runner.prompts()
    assert runner.our_tokens(model[0], asked) == [_fresh(model[1], prompt) for prompt in asked]


def _fresh(theirs, prompt: list[int]) -> list[int]:
    theirs(torch.tensor([[0]]))  # a short input brings dynamic rope's frequencies back to the start
    return runner.their_tokens(theirs, prompt)


# Devices, groups of them with different experts, and how these join their results.
DENSE_SPLITS = [(2, 1, "sum"), (4, 1, "sum"), (8, 1, "sum")]
EXPERT_SPLITS = [(2, 2, "sum"), (4, 1, "sum"), (8, 4, "all-to-all"), (8, 8, "sum")]


def splits():
    """Return a parameter for each model and each way in which its kind of layers is split."""
    for case in CASES:
        has_experts = any("expert" in field for field in case.fields)
        for tensor, expert, exchange in EXPERT_SPLITS if has_experts else DENSE_SPLITS:
            name = f"{case.name}-{tensor}-{expert}"
            group = pytest.mark.xdist_group(case.name)
            yield pytest.param(case, tensor, expert, exchange, id=name, marks=group)


@pytest.mark.parametrize("model, tensor, expert, exchange", splits(), indirect=["model"])
def test_several_devices_equal_one(model, forward, tensor, expert, exchange):
    prompt = runner.prompts()[5]
    split = Forward(model[0], tensor=tensor, expert=expert, exchange=exchange)
    np.testing.assert_allclose(split(prompt), forward(prompt), atol=LOGITS, rtol=0)


@pytest.mark.skipif(cpu.isa() is None, reason="no compiled kernels")
def test_a_cpu_reads_the_experts_where_they_lie(forward):
    nodes = jax.tree.leaves(forward.params, is_leaf=lambda node: isinstance(node, tree.Stack))
    assert not [node for node in nodes if isinstance(node, tree.Stack) and node.axis == "experts"]


def test_stacked_layers_equal_separate_ones(model, forward):
    prompt = runner.prompts()[5]
    np.testing.assert_allclose(
        Forward(model[0], separate=False)(prompt), forward(prompt), atol=LOGITS, rtol=0
    )


def test_round_trip_is_exact(model, forward):
    checkpoint = files.open_checkpoint(model[0])
    for held in (forward, Forward(model[0], tensor=8)):
        saved = held.saved()
        assert saved.keys() == checkpoint.tensors.keys()
        for name, array in saved.items():
            np.testing.assert_array_equal(array, checkpoint.array(name), err_msg=name)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3-tied"])
def test_bf16_logits(name, tmp_path: Path):
    case = next(case for case in CASES if case.name == name)
    theirs = runner.make_checkpoint(case, tmp_path, torch.bfloat16)
    ours = Forward(tmp_path, ml_dtypes.bfloat16)
    for prompt in runner.prompts():
        expected = runner.their_logits(theirs, prompt)
        np.testing.assert_allclose(
            ours(prompt), expected, atol=BF16_LOGITS * abs(expected).max(), rtol=0
        )


@pytest.mark.parametrize(
    "name, copies, tensor, expert, exchange",
    [
        ("llama3", 2, 1, 1, "auto"),
        ("llama3", 2, 4, 1, "auto"),
        ("qwen3-bias-yarn", 2, 4, 1, "auto"),
        ("qwen2-moe-every-second", 2, 4, 2, "all-to-all"),
        ("qwen3-moe-norm", 2, 4, 4, "sum"),
    ],
)
def test_data_parallel_equals_one_device(name, copies, tensor, expert, exchange, tmp_path: Path):
    case = next(case for case in CASES if case.name == name)
    runner.make_checkpoint(case, tmp_path)
    asked = runner.prompts()
    alone = runner.our_tokens(tmp_path, asked, 16)
    assert (
        runner.our_tokens(
            tmp_path,
            asked,
            16,
            data_parallel_size=copies,
            tensor_parallel_size=tensor,
            expert_parallel_size=expert,
            expert_exchange=exchange,
        )
        == alone
    )
