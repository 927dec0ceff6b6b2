"""Trees that tunix 0.1.7 made (tests/data/tunix), and its logits against the converted
directory's.
"""

from pathlib import Path

import numpy as np
import pytest

from slipway import expected_logits
from slipway.convert.conversion import ConvertConfig, convert, prepare
from slipway.convert.formats import open_source
from slipway.convert.source import MemorySource
from slipway.convert.verify import explain, verify
from slipway.errors import CheckpointError
from tests.convert.twins import assert_same

DATA = Path(__file__).parent.parent / "data" / "tunix"
SHAPE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# tunix rotates with a theta of its own, whatever its ModelConfig states.
LLAMA = {
    "model_type": "llama",
    **SHAPE,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "rope_theta": 1e4}
QWEN3 = LLAMA | {"model_type": "qwen3"}
MOE = QWEN3 | {"model_type": "qwen3_moe", "num_experts_per_tok": 2}
GEMMA = {
    "model_type": "gemma", **SHAPE, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4,
}  # fmt: skip
GEMMA_2 = GEMMA | {
    "model_type": "gemma2",
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
}
GEMMA_3 = GEMMA_2 | {
    "model_type": "gemma3_text",
    "num_key_value_heads": 1,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
}
EQUAL_HEADS = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
CASES = {
    "llama": LLAMA,
    "llama_tied": LLAMA,
    "qwen2": QWEN2,
    "qwen3_tied": QWEN3,
    "qwen3_moe": MOE,
    "gemma": GEMMA,
    "gemma2": GEMMA_2,
    "gemma3": GEMMA_3,
    "gemma3_mha": GEMMA_3 | EQUAL_HEADS,
}


def made(case: str) -> tuple[dict[str, np.ndarray], expected_logits.Expected]:
    with np.load(DATA / f"{case}.npz") as archive:
        tree = {
            name.removeprefix("tree/"): archive[name]
            for name in archive.files
            if name.startswith("tree/")
        }
        return tree, expected_logits.Expected(archive["ids"].astype(np.int64), archive["logits"])


@pytest.mark.parametrize("case", CASES)
def test_a_tree_converts_by_its_names_to_tunixs_logits_and_back(case, tmp_path):
    tree, expected = made(case)
    conversion, written = convert(
        MemorySource(tree), tmp_path / "out", ConvertConfig(), CASES[case]
    )
    verify(conversion, written, tmp_path / "out")
    found = expected_logits.compare(tmp_path / "out", expected, 1e-4)
    assert found.program.startswith("transformers")
    assert found.quantity == "logits"
    options = ConvertConfig(to="npz", mapping="tunix")
    convert(open_source(tmp_path / "out"), tmp_path / "back", options)
    with np.load(tmp_path / "back" / "params.npz") as archive:
        assert_same({name: archive[name] for name in archive.files}, tree)


@pytest.mark.parametrize("case", ["llama", "qwen3_tied", "qwen3_moe"])
def test_theta_that_tunix_ignores_is_kept_and_told(case, tmp_path):
    tree, expected = made(case)
    given = CASES[case] | {"rope_theta": 5e5}
    conversion, _ = convert(MemorySource(tree), tmp_path / "out", ConvertConfig(), given)
    assert (
        "theta 1,000,000, whatever its ModelConfig states; config.json's 500000.0 is kept"
        in explain(conversion)
    )
    with pytest.raises(CheckpointError, match="differ from the original's"):
        expected_logits.compare(tmp_path / "out", expected, 1e-4)


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_scaled_rotation_that_tunix_lacks_is_told(where):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    given = {name: value for name, value in QWEN2.items() if name != "rope_theta"} | {
        where: rope,
        "rope_theta": 1e4,
    }
    conversion = prepare(MemorySource(made("qwen2")[0]), ConvertConfig(), given)
    assert (
        "tunix 0.1.7 scales no rotary embedding; config.json's rope_type 'linear' is kept"
        in explain(conversion)
    )


def test_nothing_is_told_where_tunix_computes_what_config_says():
    for case in ("llama", "qwen2", "gemma"):
        assert (
            prepare(MemorySource(made(case)[0]), ConvertConfig(), CASES[case]).plan.mapping.note
            == ""
        )


def test_lora_leaves_are_refused_by_name():
    tree = made("llama")[0] | {"layers.0.attn.q_proj.w_lora_a": np.zeros((16, 2), np.float32)}
    problems = prepare(MemorySource(tree), ConvertConfig(), LLAMA).problems
    assert any("layers.0.attn.q_proj.w_lora_a" in problem for problem in problems)
