"""What the comparisons with other engines share: the same greedy tokens from one directory, in float32?

Decides the prompts and what is compared; where the other engine lives and how it is asked, vllm.py and sglang.py say.
An architecture that our engine lacks has a torch twin: transformers runs it on our side, and the other engine through
the package that `slipway adapt` writes. It reads no figures of speed.
"""

import abc
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from slipway.adapters import twin
from slipway.adapters.package import adapt
from slipway.adapters.twin import Engine
from slipway.checkpoint import files
from slipway.engine.params import SamplingParams
from slipway.llm import LLM, NANO


@dataclasses.dataclass(frozen=True)
class Program:
    """What answers in the other engine's place: its Python, a script beside this file, the environment it needs."""

    engine: Engine
    python: Path
    script: str
    variables: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GreedyBench(abc.ABC):
    """Greedy tokens and log-probabilities of a directory, ours beside another engine's."""

    model: Positional[Path] = Path(NANO)
    """An HF directory; by default nano."""
    prompts: int = 8
    prompt_tokens: int = 24
    max_tokens: int = 32
    twin: str | None = None
    """FILE.py[:CLASS], as `slipway adapt` takes it: the architecture is one that both engines lack."""

    @abc.abstractmethod
    def program(self) -> Program:
        """The other engine, installed if need be."""

    def run(self) -> None:
        """Compare and print."""
        print(json.dumps(self.measure(self.program()), indent=2))

    def measure(self, program: Program) -> dict[str, Any]:
        """How often both choose the same token, and how far their log-probabilities lie apart where they do."""
        config = json.loads((self.model / "config.json").read_bytes())
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, config["vocab_size"], self.prompt_tokens).tolist() for _ in range(self.prompts)]
        theirs = self._theirs(program, prompts)
        ours = self._ours(prompts) if self.twin is None else self._transformers(self.twin, prompts)
        equal, worst = 0, 0.0
        for (tokens, logprobs), other in zip(ours, theirs):
            same = next(
                (i for i, (a, b) in enumerate(zip(tokens, other["token_ids"])) if a != b),
                len(tokens),
            )
            equal += same
            worst = max([worst, *(abs(a - b) for a, b in zip(logprobs[:same], other["logprobs"]))])
        return {
            "model": self.model.name,
            "architecture": config["architectures"][0],
            "tokens": self.prompts * self.max_tokens,
            "tokens_equal_before_the_first_difference": equal,
            "max_logprob_difference": worst,
        }

    def _ours(self, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        llm = LLM(self.model, dtype="float32", skip_tokenizer_init=True, max_model_len=128, max_num_seqs=8)
        params = SamplingParams(max_tokens=self.max_tokens, temperature=0.0, logprobs=0, ignore_eos=True)
        samples = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        return [
            (
                list(s.token_ids),
                [entry[token].logprob for token, entry in zip(s.token_ids, s.logprobs or [])],
            )
            for s in samples
        ]

    def _transformers(self, file: str, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        import torch  # optional, like transformers: neither is needed to serve

        checkpoint = files.open_checkpoint(self.model)
        found = twin.load(file, checkpoint.config)
        model = found.model_class(found.config()).float().eval()  # from_pretrained would empty buffers that no file has
        tensors = {name: torch.from_numpy(checkpoint.array(name).astype(np.float32)) for name in checkpoint.tensors}
        model.load_state_dict(tensors, strict=False)  # `adapt` has checked the names; those of tied ones may be absent
        ids = torch.tensor(prompts)
        logprobs: list[list[float]] = [[] for _ in prompts]
        with torch.inference_mode():
            for _ in range(self.max_tokens):
                best = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[:, -1].float(), -1).max(-1)
                for row, value in zip(logprobs, best.values.tolist()):
                    row.append(value)
                ids = torch.cat([ids, best.indices[:, None]], 1)
        return list(zip(ids[:, self.prompt_tokens :].tolist(), logprobs))

    def _theirs(self, program: Program, prompts: list[list[int]]) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            asked, out = Path(folder, "asked.json"), Path(folder, "answers.json")
            asked.write_text(json.dumps({"prompts": prompts, "max_tokens": self.max_tokens}))
            command = [
                program.python,
                "-P",
                Path(__file__).with_name(program.script),
                self.model.absolute(),
                asked,
                out,
            ]
            variables = os.environ | program.variables | {"HF_HUB_OFFLINE": "1"}
            if self.twin is not None:
                package = adapt(str(self.model), self.twin, program.engine, Path(folder, "package"))
                site = _installed(program.python, package.directory, Path(folder, "site"))
                variables |= package.variables | {"PYTHONPATH": str(site)}
            subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr, env=variables, cwd=folder)
            return json.loads(out.read_text())


def _installed(python: Path, package: Path, site: Path) -> Path:
    """``package`` in a folder for PYTHONPATH: the environment itself is shared, and stays as it is."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(site), str(package)], check=True, stdout=sys.stderr)
    return site
