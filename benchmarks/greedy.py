"""Greedy tokens of vLLM or SGLang on a CPU beside Slipway's, from one directory, in float32.

An architecture that Slipway's engine lacks has a torch twin: then transformers runs the twin
instead of our engine, and the other engine runs it through the package that `slipway adapt` writes.
Not here: what runs in the other engines' environments (worker_greedy_vllm.py,
worker_greedy_sglang.py).
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from benchmarks import environments, script
from slipway.adapters import twin
from slipway.adapters.package import adapt
from slipway.adapters.twin import Engine
from slipway.checkpoint import files
from slipway.engine.params import SamplingParams
from slipway.llm import LLM, NANO

# Of each prompt: its greedy tokens and their log-probabilities.
Answers = list[tuple[list[int], list[float]]]


@dataclasses.dataclass(frozen=True)
class OtherEngine:
    """Another engine: how its Python is found or installed, and additions to its environment.

    What runs in it is worker_greedy_NAME.py.
    """

    python: Callable[[], Path]
    variables: Mapping[str, str]


ENGINES: dict[Engine, OtherEngine] = {
    # the build for CPUs
    "vllm": OtherEngine(
        environments.vllm, {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    ),
    # with torch's operations
    "sglang": OtherEngine(environments.sglang, {}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GreedyBench:
    """Greedy tokens and log-probabilities of a directory, ours beside another engine's.

    With --twin: those of transformers beside the other engine's. The engine is installed on first
    use.
    """

    model: Positional[Path] = Path(NANO)
    """An HF directory; by default nano."""
    against: Engine = "vllm"
    """The other engine."""
    prompts: int = 8
    """Random prompts."""
    prompt_tokens: int = 24
    max_tokens: int = 32
    """Tokens to generate after each prompt."""
    twin: str | None = None
    """FILE.py[:CLASS], as for `slipway adapt`: torch class of an architecture that both lack."""

    def run(self) -> None:
        """Compare and print."""
        print(json.dumps(self.measure(), indent=2))

    def measure(self) -> dict[str, Any]:
        """Count equal tokens before the first difference, and compare their log-probabilities."""
        config = json.loads((self.model / "config.json").read_bytes())
        rng, vocab = np.random.default_rng(0), config["vocab_size"]
        sizes = [self.prompt_tokens] * self.prompts
        prompts = [rng.integers(0, vocab, size).tolist() for size in sizes]
        theirs = self._of_other(prompts)
        if self.twin is None:
            ours = self._of_slipway(prompts)
        else:
            ours = self._of_transformers(self.twin, prompts)
        equal, worst = 0, 0.0
        for (tokens, logprobs), (other_tokens, other_logprobs) in zip(ours, theirs):
            differences = (i for i, (a, b) in enumerate(zip(tokens, other_tokens)) if a != b)
            same = next(differences, len(tokens))
            equal += same
            pairs = zip(logprobs[:same], other_logprobs)
            worst = max([worst, *(abs(a - b) for a, b in pairs)])
        return {
            "model": self.model.name,
            "architecture": config["architectures"][0],
            "tokens": self.prompts * self.max_tokens,
            "tokens_equal_before_the_first_difference": equal,
            "max_logprob_difference": worst,
        }

    def _of_slipway(self, prompts: list[list[int]]) -> Answers:
        llm = LLM(
            self.model,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=128,
            max_num_seqs=8,
        )
        params = SamplingParams(
            max_tokens=self.max_tokens, temperature=0.0, logprobs=0, ignore_eos=True
        )
        answers: Answers = []
        for output in llm.generate(prompts, params, use_tqdm=False):
            sample = output.outputs[0]
            entries = zip(sample.token_ids, sample.logprobs or [])
            logprobs = [entry[token].logprob for token, entry in entries]
            answers.append((list(sample.token_ids), logprobs))
        return answers

    def _of_transformers(self, file: str, prompts: list[list[int]]) -> Answers:
        import torch  # optional, as transformers is: serving needs neither

        checkpoint = files.open_checkpoint(self.model)
        found = twin.load(file, checkpoint.config)
        # not from_pretrained, which fills buffers that are in no file with zeros
        model = found.model_class(found.config()).float().eval()
        tensors = {
            name: torch.from_numpy(checkpoint.array(name).astype(np.float32))
            for name in checkpoint.tensors
        }
        # `adapt` has checked the names; those of tied weights may be absent
        model.load_state_dict(tensors, strict=False)
        ids = torch.tensor(prompts)
        logprobs: list[list[float]] = [[] for _ in prompts]
        with torch.inference_mode():
            for _ in range(self.max_tokens):
                logits = model(input_ids=ids, use_cache=False).logits[:, -1]
                best = torch.log_softmax(logits.float(), -1).max(-1)
                for row, value in zip(logprobs, best.values.tolist()):
                    row.append(value)
                ids = torch.cat([ids, best.indices[:, None]], 1)
        return list(zip(ids[:, self.prompt_tokens :].tolist(), logprobs))

    def _of_other(self, prompts: list[list[int]]) -> Answers:
        other = ENGINES[self.against]
        python = other.python()
        with tempfile.TemporaryDirectory() as folder:
            request, out = Path(folder, "request.json"), Path(folder, "answers.json")
            request.write_text(json.dumps({"prompts": prompts, "max_tokens": self.max_tokens}))
            worker = Path(__file__).with_name(f"worker_greedy_{self.against}.py")
            command = [python, "-P", worker, self.model.absolute(), request, out]
            variables = os.environ | other.variables | {"HF_HUB_OFFLINE": "1"}
            if self.twin is not None:
                package = adapt(
                    str(self.model), self.twin, self.against, out_dir=Path(folder, "package")
                )
                site = _installed(python, package.directory, Path(folder, "site"))
                variables |= package.variables | {"PYTHONPATH": str(site)}
            subprocess.run(
                list(map(str, command)), check=True, stdout=sys.stderr, env=variables, cwd=folder
            )
            answers = json.loads(out.read_text())
        return [(answer["token_ids"], answer["logprobs"]) for answer in answers]


def _installed(python: Path, package: Path, site: Path) -> Path:
    """Install a package into a folder for PYTHONPATH; the shared environment does not change."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(site), str(package)], check=True, stdout=sys.stderr)
    return site


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("greedy", GreedyBench)


if __name__ == "__main__":
    main()
