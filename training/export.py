"""Export of nano's training checkpoint as a Hugging Face directory: `python -m training.export`.

This module sets the exported dtype and writes the configuration files. The kept checkpoint
(bfloat16) gives the exported file bit for bit.

Not here: names and layouts of tensors (slipway/convert), training (train.py).
"""

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from tokenizers import Tokenizer

from slipway.convert.conversion import ConvertConfig, convert
from slipway.convert.source import MemorySource
from training.model import Model, ModelConfig
from training.tokenizer import write_tokenizer_files
from training.train import RUN_FOLDER, Checkpoints, TrainConfig, Trainer

KEPT_CHECKPOINT = Path(__file__).parent / "checkpoint"
NANO_FOLDER = Path(__file__).parent.parent / "slipway" / "nano"


def keep_checkpoint(run_folder: Path, kept_folder: Path, model_config: ModelConfig) -> int:
    """Write the run's last weights as bfloat16, without optimizer state; return their step."""
    trainer = Trainer(model_config, TrainConfig())
    with Checkpoints(run_folder / "checkpoints") as checkpoints:
        progress = checkpoints.restore(trainer.start())
    if progress.step == 0:
        raise FileNotFoundError(f"no checkpoint in {run_folder / 'checkpoints'}")
    params = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), progress.params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(kept_folder.absolute(), params, force=True)
    return progress.step


def read_kept_checkpoint(kept_folder: Path, model_config: ModelConfig) -> nnx.State:
    """Return the kept weights as the NNX state of a Model of this configuration, in bfloat16."""
    params = nnx.eval_shape(lambda: nnx.state(Model(model_config, nnx.Rngs(0)), nnx.Param))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, ml_dtypes.bfloat16), params)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(kept_folder.absolute(), abstract)


def write_model(folder: Path, params: nnx.State, model_config: ModelConfig) -> None:
    """Write model.safetensors, config.json and generation_config.json.

    The weights are converted as by `slipway convert --mapping nnx`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {".".join(map(str, path)): param[...] for path, param in nnx.to_flat_state(params)}
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        converted = Path(aside) / "nano"
        convert(
            MemorySource(arrays),
            converted,
            ConvertConfig(mapping="nnx"),
            given=model_json(model_config),
        )
        for file in converted.iterdir():
            os.replace(file, folder / file.name)
    _write_json(folder / "generation_config.json", _generation_json())


def main() -> None:
    """Export the kept checkpoint, or a run's last weights after keeping them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, help="keep this run's last weights before", nargs="?", const=RUN_FOLDER
    )
    arguments = parser.parse_args()
    model_config = ModelConfig()
    if arguments.run:
        step = keep_checkpoint(arguments.run, KEPT_CHECKPOINT, model_config)
        for name in ("log.jsonl", "corpus.json"):
            shutil.copy(arguments.run / name, KEPT_CHECKPOINT.parent / name)
        tokenizer = Tokenizer.from_file(str(arguments.run / "tokenizer.json"))
        NANO_FOLDER.mkdir(parents=True, exist_ok=True)
        write_tokenizer_files(tokenizer, NANO_FOLDER, model_config.max_position_embeddings)
        print(f"kept step {step}")
    write_model(NANO_FOLDER, read_kept_checkpoint(KEPT_CHECKPOINT, model_config), model_config)


def model_json(model_config: ModelConfig) -> dict:
    """Return the content of a model's config.json."""
    shape = asdict(model_config)
    theta = shape.pop("rope_theta")
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **shape,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "use_cache": True,
    }


def _generation_json() -> dict:
    """Return the content of generation_config.json.

    A small model repeats itself when decoded greedily, and loses the thread at temperature 1.
    """
    return {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
        "eos_token_id": [2, 0],
        "pad_token_id": 0,
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
