"""Training of a model of a few thousand parameters: data, tokenizer, model, resume, export."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.data import Batches, Tokens, chat_samples, chat_text, read_corpus, tokenize
from training.export import keep_checkpoint, read_kept_checkpoint, write_model
from training.model import Model, ModelConfig
from training.tokenizer import train_tokenizer, write_tokenizer_files
from training.train import Checkpoints, Progress, TrainConfig, Trainer, learning_rate, train

TINY = ModelConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=32, initializer_range=0.2
)
RUN = TrainConfig(seconds=1e9, steps=6, context=16, rows_per_batch=2, evaluation_rows=2)
SOURCE = '''\
def area(width, height):
    """Return the area of a rectangle."""
    return width * height


def undocumented(x):
    return [x] * 3
'''


@pytest.fixture(autouse=True)
def _usual_promotion():
    """The recipe is plain Flax code: it broadcasts, unlike the engine's strict code."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of 60 modules, a test package, a folder to skip and a file that is no Python."""
    root = tmp_path_factory.mktemp("library")
    files = {f"module{i}.py": f"NUMBER = {i}\n\n\n{SOURCE}" for i in range(60)}
    files |= {
        "test/test_area.py": f"assert True\n{SOURCE}",
        "test/bad.py": "def (",
        "idlelib/tool.py": "x = 1\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(scope="module")
def tokenizer(library: Path) -> Tokenizer:
    return train_tokenizer(document.text for document in read_corpus(library).library)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    """One for all tests: its compiled step is what takes their time."""
    return Trainer(TINY, RUN)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    generator = np.random.default_rng(0)
    streams = [generator.integers(0, TINY.vocab_size, 300).astype(np.uint16) for _ in range(5)]
    return Tokens(*streams, held_out_bytes=1200)


def test_groups_of_files_are_disjoint_and_complete(library: Path) -> None:
    corpus = read_corpus(library)
    names = [
        {document.path for document in group}
        for group in (corpus.library, corpus.tests, corpus.held_out)
    ]
    assert names[1] == {"test/test_area.py"}
    assert names[2], "some of the modules are held out"
    assert names[0] | names[2] == {f"module{i}.py" for i in range(60)}
    assert names[0].isdisjoint(names[2])


def test_chat_samples_come_from_documented_functions_only(library: Path) -> None:
    samples = list(chat_samples(read_corpus(library).library))
    assert len(samples) == 2, "one per direction: the same function of 60 modules counts once"
    assert "return width * height\n```<|im_end|>" in samples[0]
    assert samples[1].endswith("assistant\nReturn the area of a rectangle.<|im_end|>\n")
    assert "Return the area" not in samples[1].split("assistant")[0]


def test_rows_overlap_by_one_token(library: Path, tokenizer: Tokenizer) -> None:
    rows = tokenize(read_corpus(library), tokenizer).held_out_rows(context=16)
    assert rows.shape[1] == 17
    np.testing.assert_array_equal(rows[:-1, -1], rows[1:, 0])


def test_lines_read_by_themselves_hold_the_same_text(library: Path, tokenizer: Tokenizer) -> None:
    tokens = tokenize(read_corpus(library), tokenizer)
    assert tokenizer.decode(tokens.library_lines.tolist()) == tokenizer.decode(
        tokens.library.tolist()
    )
    pieces = {tokenizer.decode([int(i)]) for i in tokens.library_lines}
    assert not any("\n" in piece.lstrip("\n") for piece in pieces), (
        "a line break only begins a token"
    )


def test_batches_follow_from_the_step_alone(tokens: Tokens) -> None:
    one, other = (Batches(tokens, seed=3, context=16, rows_per_batch=2) for _ in range(2))
    in_order = [one[step] for step in range(60)]
    np.testing.assert_array_equal(other[59], in_order[59])
    assert not np.array_equal(in_order[0], in_order[1])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert (
        tokenizer.decode(
            tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
        )
        == text
    )


def test_a_line_break_and_its_indentation_are_one_token(tokenizer: Tokenizer) -> None:
    pieces = [
        tokenizer.decode([token_id])
        for token_id in tokenizer.encode("height):\n    return width").ids
    ]
    assert pieces[-3:] == ["):\n   ", " return", " width"]


def test_transformers_reads_tokenizer_and_chat_template(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer_files(tokenizer, tmp_path, max_length=1024)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(SOURCE).input_ids == tokenizer.encode(SOURCE).ids
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Bye"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == chat_text("Hello", "Bye")
    prompt = loaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert chat_text("Hello", "").removesuffix("<|im_end|>\n") == prompt


def test_model_equals_transformers_on_the_exported_weights(tmp_path: Path) -> None:
    """Logits in float32 within 1e-4."""
    params = _bfloat16_params(seed=1)
    write_model(tmp_path, params, TINY)
    structure = nnx.graphdef(Model(TINY, nnx.Rngs(0)))
    model = nnx.merge(structure, jax.tree.map(lambda x: x.astype(np.float32), params))
    # more than one block of attention, and less than two
    token_ids = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 70))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(token_ids)).logits.numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(np.asarray(model(token_ids)), expected, atol=1e-4, rtol=0)


def test_exported_tensors_start_on_64_bytes(tmp_path: Path) -> None:
    write_model(tmp_path, _bfloat16_params(seed=1), TINY)
    path = tmp_path / "model.safetensors"
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + header_bytes) % 64 == 0
    assert load_file(path)["model.layers.0.mlp.gate_proj.weight"].shape == (64, 32)


def test_a_resumed_run_equals_an_uninterrupted_one(
    trainer: Trainer, tokens: Tokens, tmp_path: Path
) -> None:
    """A resumed run equals an uninterrupted one of six steps, optimizer state included."""
    batches = Batches(tokens, RUN.seed, RUN.context, RUN.rows_per_batch)
    whole = _advance(trainer, trainer.start(), batches, until=6)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(_advance(trainer, trainer.start(), batches, until=3))
        resumed = checkpoints.restore(trainer.start())
    assert resumed.step == 3
    _advance(trainer, resumed, batches, until=6)
    _assert_equal((resumed.params, resumed.optimizer_state), (whole.params, whole.optimizer_state))


def test_a_run_ends_and_its_kept_checkpoint_gives_the_export(
    trainer: Trainer, tokens: Tokens, tmp_path: Path
) -> None:
    progress = train(tmp_path / "run", trainer, tokens)
    assert progress.step == RUN.steps
    assert keep_checkpoint(tmp_path / "run", tmp_path / "kept", TINY) == RUN.steps
    kept = read_kept_checkpoint(tmp_path / "kept", TINY)
    _assert_equal(kept, jax.tree.map(lambda x: x.astype(jnp.bfloat16), progress.params))
    write_model(tmp_path / "one", kept, TINY)
    write_model(tmp_path / "other", read_kept_checkpoint(tmp_path / "kept", TINY), TINY)
    one, other = (tmp_path / name / "model.safetensors" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_learning_rate_rises_holds_and_falls_to_zero() -> None:
    rates = [learning_rate(fraction, RUN) for fraction in (0.0, 0.1, 0.4, 0.75, 1.0)]
    assert 0 < rates[0] < rates[1] == rates[2] == RUN.peak_learning_rate
    assert rates[3] == pytest.approx(RUN.peak_learning_rate / 2)
    assert rates[4] == 0


def _advance(trainer: Trainer, progress: Progress, batches: Batches, until: int) -> Progress:
    while progress.step < until:
        trainer.step(progress, batches[progress.step])
    return progress


def _bfloat16_params(seed: int) -> nnx.State:
    params = nnx.state(Model(TINY, nnx.Rngs(seed)), nnx.Param)
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def _assert_equal(ours: object, theirs: object) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
