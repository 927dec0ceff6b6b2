"""MaxText's models behind Slipway's adapter class in tpu-inference, compared with transformers.

It runs in an environment that has vLLM for TPUs and MaxText. Argument: the number of devices that
share each layer. Prints one JSON object. A random model of each family is saved in Hugging Face's
layout, converted to a checkpoint by MaxText's own converter, and loaded from that.
Not here: the steps (worker_tpu_inference.py).
"""

import dataclasses
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.sharding import Mesh

from benchmarks import worker_tpu_inference as host
from slipway.adapters import vllm as adapter

CONVERTER = "maxtext.checkpoint_conversion.to_maxtext"
HF_CONFIGS = "maxtext.checkpoint_conversion.utils.hf_model_configs"
LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model family: MaxText's name for it, its HF config, and further options of MaxText."""

    model_name: str
    config: transformers.PretrainedConfig
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "qwen3": Case("qwen3-0.6b", transformers.Qwen3Config(**host.SIZES, tie_word_embeddings=True)),
    "llama": Case("llama3.1-8b", transformers.LlamaConfig(**host.SIZES, rope_parameters=LLAMA_31)),
    "qwen3_moe": Case(
        "qwen3-30b-a3b",
        host.CONFIGS["Qwen3MoeForCausalLM"],
        host.EXPERTS | {"base_moe_mlp_dim": 96},
    ),
}


def main(devices: int) -> None:
    """Compare and print."""
    adapter.register()
    host.replace_tpu_parts(importlib.import_module("tpu_inference.models.common.model_loader"))
    replace_fused_experts()
    axes = importlib.import_module("tpu_inference.layers.common.sharding").MESH_AXIS_NAMES
    shape = [devices if axis == "model" else 1 for axis in axes]
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(shape), axes)
    version = importlib.import_module("importlib.metadata").version
    report = {
        "tpu_inference": version("tpu_inference"),
        "maxtext": version("maxtext"),
        "jax": jax.__version__,
        "tensor_parallel_size": devices,
        **{name: measure(case, mesh) for name, case in CASES.items()},
    }
    print(json.dumps(report))


def measure(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Compare one family; return the differences, and sizes that MaxText has padded."""
    options = {"model_name": case.model_name, "dtype": "float32", "weight_dtype": "float32"}
    options |= sizes(case.config) | case.options
    with tempfile.TemporaryDirectory() as folder:
        model = host.random_model(case.config, folder)
        convert(case, folder, options)
        path = {"load_parameters_path": f"{folder}/maxtext/0/items"}
        loaded = interface(folder, mesh, options | path)
        nowhere = {"load_parameters_path": "/not/there"}
        dummy = interface(folder, mesh, options | nowhere, load_format="dummy")
    config, ids = loaded.model.maxtext_config, np.arange(32, dtype=np.int32)
    embeddings = loaded.multimodal_fns.embed_input_ids_fn(loaded.state_leaves, ids)
    table = model.state_dict()["model.embed_tokens.weight"].numpy()
    dummy_logits = host.Runner(dummy, mesh, case.config).step([(0, [1, 2])], 0)
    return {
        "kv_heads": config.num_kv_heads,
        "expert_rows": config.padded_base_moe_mlp_dim,
        **host.compare(model, host.Runner(loaded, mesh, case.config)),
        "embeddings_equal": bool((embeddings == table[:32]).all()),
        "dummy_logits_finite": bool(np.isfinite(dummy_logits).all()),
    }


def interface(folder: str, mesh: Mesh, options: dict[str, Any], **engine: Any) -> Any:
    """Load a MaxText model with tpu-inference's loader."""
    loader = importlib.import_module("tpu_inference.models.common.model_loader")
    config = host.vllm_config(
        folder,
        "MaxTextForCausalLM",
        hf_config_path=folder,
        tensor_parallel_size=mesh.shape["model"],
        additional_config={"maxtext_config": options},
        **engine,
    )
    with importlib.import_module("vllm.config").set_current_vllm_config(config):
        return loader.get_flax_model(config, jax.random.PRNGKey(0), mesh)


def sizes(config: Any) -> dict[str, Any]:
    """Return the sizes of an HF config under MaxText's names."""
    return {
        "base_emb_dim": config.hidden_size,
        "base_num_query_heads": config.num_attention_heads,
        "base_num_kv_heads": config.num_key_value_heads,
        "base_mlp_dim": config.intermediate_size,
        "base_num_decoder_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rope_max_timescale": int(config.rope_parameters["rope_theta"]),
        "normalization_layer_epsilon": config.rms_norm_eps,
        "logits_via_embedding": config.tie_word_embeddings,
    }


def convert(case: Case, folder: str, options: dict[str, Any]) -> None:
    """Convert an HF directory to a MaxText checkpoint with MaxText's converter.

    The converter's table of configs has only published sizes; the case's config replaces one of
    them.
    """
    importlib.import_module(HF_CONFIGS).HF_MODEL_CONFIGS[case.model_name] = case.config
    base = importlib.import_module("maxtext.utils.globals").MAXTEXT_CONFIGS_DIR
    given = options | {
        "base_output_directory": f"{folder}/maxtext",
        "scan_layers": False,
        "override_model_config": True,
        "skip_jax_distributed_system": True,
        "hardware": "cpu",
    }
    words = [f"{key}={value}" for key, value in given.items()]
    importlib.import_module(CONVERTER).main(
        ["", str(Path(base) / "base.yml"), *words],
        hf_model_path=folder,
        save_dtype="float32",
        simulated_cpu_devices_count=1,
        lazy_load_tensors=False,
    )


def replace_fused_experts() -> None:
    """Replace tpu-inference's fused experts by their reference, which needs no TPU."""
    kernels = importlib.import_module("tpu_inference.kernels.fused_moe.v1.kernel")

    def experts(
        hidden_states, w1, w2, gating_output, topk, renormalize, activation, scoring_fn, **_
    ):
        rows_E2DF = jnp.stack(jnp.split(w1, 2, axis=-1), axis=1)
        arrays = (hidden_states, rows_E2DF, w2, gating_output)
        return kernels.ref_moe(
            *arrays,
            topk,
            renormalize_topk_logits=renormalize,
            act_fn=activation,
            scoring_fn=scoring_fn,
        )

    fused: Any = importlib.import_module("tpu_inference.layers.common.fused_moe_gmm")
    fused.fused_moe_func = experts


if __name__ == "__main__":
    main(int(sys.argv[1]))
