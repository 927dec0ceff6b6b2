"""What config.json may say: both ways to write rope, nulls, windows, and refusals that name the field."""

import pytest

from slipway.errors import UnsupportedModel
from slipway.models.llama import LlamaConfig
from slipway.models.qwen2 import Qwen2Config
from slipway.nn.rope import Scaling

pytestmark = pytest.mark.host
BASE = {
    "vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0}


def read(kind=LlamaConfig, **fields):
    return kind.read(BASE | fields)


def test_derived_fields():
    config = read()
    assert (config.num_key_value_heads, config.head_dim, config.windows) == (4, 4, (None, None, None))


@pytest.mark.parametrize(
    "fields, theta, scaling",
    [
        ({"rope_theta": 5e5}, 5e5, Scaling()),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, Scaling()),
        ({"rope_scaling": None, "rope_theta": 7}, 7.0, Scaling()),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, Scaling("linear", 2.0, 64)),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, 1e4, Scaling("yarn", 4.0, 64)),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16}}, 1e4,
         Scaling("yarn", 4.0, 16)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}}, 1e4,
         Scaling("dynamic", 2.0, 64)),
    ],
)  # fmt: skip
def test_rope(fields, theta, scaling):
    config = read(**fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    "fields, windows",
    [
        ({"sliding_window": 16}, (None, None, None)),
        ({"sliding_window": 0}, (None, None, None)),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, (None, None, 16)),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, (16, 16, 16)),
        ({"use_sliding_window": True, "max_window_layers": 1}, (None, 4096, 4096)),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}, (None, None, None)),
        ({"use_sliding_window": True, "sliding_window": 16,
          "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, (16, None, 16)),
    ],
)  # fmt: skip
def test_windows(fields, windows):
    assert read(Qwen2Config, **fields).windows == windows


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 16}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "rope_scaling.full_attention"),
        ({"rope_scaling": YARN | {"finetuned": True}}, "rope_scaling.finetuned"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e6}, "rope_theta"),
    ],
)
def test_refusals_name_the_field(fields, field):
    with pytest.raises(UnsupportedModel) as caught:
        read(**fields)
    assert caught.value.field == f"config.json: {field}"
