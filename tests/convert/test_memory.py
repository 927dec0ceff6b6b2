"""Memory of a conversion: bounded by its largest tensors, not by the model.

Half a gigabyte of zeros is converted in both directions.
"""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from slipway.checkpoint import shards
from slipway.checkpoint.shards import Spec
from slipway.convert.mappings import BUILT_IN
from slipway.convert.plan import resolve

pytestmark = pytest.mark.host
EMBED, MLP, LAYERS, HEAD_DIM = 2048, 4096, 8, 128
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "vocab_size": 1024,
    "hidden_size": EMBED,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
CHILD = """
import sys
from pathlib import Path
from slipway.convert.conversion import ConvertConfig, convert
from slipway.convert.formats import open_source
source, out, config, to, mapping = sys.argv[1:]
options = ConvertConfig(config=Path(config), to=to, mapping=mapping)
convert(open_source(source), Path(out), options)
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def hf_shapes() -> dict[str, Spec]:
    bf16 = np.dtype(ml_dtypes.bfloat16)
    shapes = {"model.embed_tokens.weight": (1024, EMBED), "model.norm.weight": (EMBED,)}
    for i in range(LAYERS):
        inner = {
            "q": (4 * HEAD_DIM, EMBED),
            "k": (2 * HEAD_DIM, EMBED),
            "v": (2 * HEAD_DIM, EMBED),
            "o": (EMBED, 4 * HEAD_DIM),
        }
        key = f"model.layers.{i}"
        shapes |= {f"{key}.self_attn.{name}_proj.weight": shape for name, shape in inner.items()}
        shapes |= {f"{key}.self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
        shapes |= {
            f"{key}.{name}_layernorm.weight": (EMBED,) for name in ("input", "post_attention")
        }
        shapes |= {f"{key}.mlp.{name}_proj.weight": (MLP, EMBED) for name in ("gate", "up")}
        shapes[f"{key}.mlp.down_proj.weight"] = (EMBED, MLP)
    return {name: Spec(bf16, shape) for name, shape in shapes.items()}


def sparse(path: Path, specs: dict[str, Spec]) -> int:
    """Write a safetensors file of zeros that takes no disk space; return its size."""
    header, places = shards.header(path, specs)
    size = max(start + specs[name].nbytes for name, start in places.items())
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
    return size


@pytest.mark.parametrize("to", ["hf", "npz", "maxtext"])
def test_peak_memory_follows_the_largest_tensor(to, tmp_path):
    specs, kind = hf_shapes(), "nnx" if to != "maxtext" else "maxtext"
    if to == "hf":
        mapping = next(m for m in BUILT_IN["nnx"] if m.name == "qwen3 in Flax, layers one by one")
        plan = resolve(mapping, "to_jax", specs, {"head_dim": HEAD_DIM, "heads": 4, "kv_heads": 2})
        specs = dict(plan.targets)
    source = tmp_path / ("hf" if to != "hf" else "")
    source.mkdir(exist_ok=True)
    size = sparse(source / "model.safetensors", specs)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = source if to != "hf" else source / "model.safetensors"
    words = [str(source), str(tmp_path / "out"), str(tmp_path / "config.json"), to, kind]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # MaxText's tensor is the stack of all layers.
    largest = MLP * EMBED * 2 * (LAYERS if to == "maxtext" else 1)
    bound, peak = 2 * largest + 200e6, int(done.stdout) * 1024
    assert size > 450e6 and peak < bound, (
        f"{peak / 1e6:.0f} MB for tensors of {largest / 1e6:.0f} MB"
    )
