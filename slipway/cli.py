"""Command line `slipway`: its subcommands and their output.

The fields of dataclasses are the flags, and the texts below fields their help. Not here: flags of
vLLM and SGLang (flags.py), options of the engine (engine/config.py), server (server/config.py) and
conversion (convert/conversion.py).
"""

import dataclasses
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from tyro.conf import OmitArgPrefixes, Positional

from slipway import expected_logits, flags
from slipway.adapters.package import adapt
from slipway.adapters.twin import Engine
from slipway.adapters.twin import load as load_twin
from slipway.bench.command import Bench
from slipway.checkpoint import hub
from slipway.checkpoint.quantize import Scheme
from slipway.checkpoint.shards import write_json
from slipway.convert.conversion import Conversion, ConvertConfig, convert, prepare, read_config
from slipway.convert.executor import Written
from slipway.convert.formats import open_source
from slipway.convert.quantize_directory import quantize_directory
from slipway.convert.verify import explain, report, summary, verify
from slipway.engine.config import EngineConfig
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestOutput
from slipway.errors import InvalidConfig, InvalidRequest, SlipwayError
from slipway.llm import LLM, NANO
from slipway.parity import compare as parity_of
from slipway.server.config import ServerConfig

# Modules that log the progress of what takes long: compiled programs, loading, downloads.
PROGRESS_LOGGERS = ("slipway.engine.launch", "slipway.runtime.runner", "slipway.convert.remote")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineFlags(EngineConfig):
    """Engine options of commands that print text.

    --seed is the request's, and a tokenizer is always needed.
    """

    seed: tyro.conf.Suppress[int] = 0
    skip_tokenizer_init: tyro.conf.Suppress[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingFlags(SamplingParams):
    """Sampling options of commands that print text, without those for other results."""

    logprobs: tyro.conf.Suppress[int | None] = None
    prompt_logprobs: tyro.conf.Suppress[int | None] = None
    structured_outputs: tyro.conf.Suppress[None] = None
    reasoning: tyro.conf.Suppress[None] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFlags(SamplingFlags):
    """Sampling options of a conversation, which has one answer for each message."""

    n: tyro.conf.Suppress[int] = 1


# packages with versions that a bug report needs
LIBRARIES = ("jax", "jaxlib", "numpy", "tokenizers", "llguidance")
PACKAGES = ("slipway", *LIBRARIES, "starlette", "uvicorn", "pyzmq")
_PROGRESS = (
    TextColumn("{task.description}"),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
)
# only two shapes to compile
ONE_AT_A_TIME = EngineFlags(max_num_seqs=1, max_num_batched_tokens=32, decode_steps=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Complete a prompt and stream the text."""

    model: Positional[str] = "nano"
    """A model directory or a hub id; "nano" is the model shipped with Slipway."""
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])]
    """The text to complete."""
    show_speed: bool = False
    """Print the time to the first token and the tokens per second."""
    engine: OmitArgPrefixes[EngineFlags] = ONE_AT_A_TIME
    sampling: OmitArgPrefixes[SamplingFlags] = SamplingFlags(max_tokens=128, temperature=0.0)

    def run(self) -> None:
        """Print the prompt and its completion."""
        if self.sampling.n > 1:
            if self.show_speed:
                expected = "one sample (n = 1), because only its text is streamed"
                raise InvalidConfig("show_speed", True, expected)
            n = self.sampling.n
            rows = dataclasses.replace(
                self.engine,
                max_num_seqs=max(n, self.engine.max_num_seqs),
                max_num_batched_tokens=max(n, self.engine.max_num_batched_tokens),
            )
            (request,) = _load(self.model, rows).generate(self.prompt, self.sampling)
            for output in request.outputs:
                print(f"--- {output.index}\n{self.prompt}{output.text}")
            return
        stream = _load(self.model, self.engine).stream(self.prompt, self.sampling)
        print(self.prompt, end="", flush=True)
        _print_stream(stream, self.show_speed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model over HTTP with OpenAI's API and those of vLLM and SGLang (docs/serving.md)."""

    model: Positional[str] = "nano"
    """A model directory or a hub id; "nano" is the model shipped with Slipway."""
    replicas: int = 1
    """Number of engine processes, each with a whole copy of the model."""
    engine: OmitArgPrefixes[EngineConfig] = EngineConfig()
    server: OmitArgPrefixes[ServerConfig] = ServerConfig()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        from slipway.server.serve import serve  # imports a web server

        if self.replicas < 1:
            raise InvalidConfig("replicas", self.replicas, "at least 1")
        serve(
            _path(self.model),
            self.model,
            self.engine,
            config=self.server,
            replicas=self.replicas,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunBatch:
    """Answer a file of OpenAI batch requests (one JSON object per line) without a server."""

    model: Positional[str] = "nano"
    """A model directory or a hub id; "nano" is the model shipped with Slipway."""
    input: Annotated[Path, tyro.conf.arg(aliases=["-i"])]
    """Lines of {custom_id, method, url, body}."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Lines of {id, custom_id, response, error}, in the same order."""
    engine: OmitArgPrefixes[EngineConfig] = EngineConfig()

    def run(self) -> None:
        """Answer all requests; exit with code 1 if some failed."""
        from slipway.server.serve import batch  # imports a web server

        if not self.input.is_file():
            raise InvalidConfig("input", str(self.input), "a file")
        failed = batch(
            _path(self.model),
            self.model,
            self.engine,
            source=self.input,
            target=self.output,
        )
        if failed:
            print(
                f"slipway: {failed} requests failed; {self.output} has their errors",
                file=sys.stderr,
            )
            sys.exit(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectEnv:
    """Print versions, processor, devices and kernels, for a bug report."""

    def run(self) -> None:
        """Print the facts as JSON."""
        import jax

        from slipway.ops import cpu

        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
        found = {
            "versions": {name: version(name) for name in PACKAGES},
            "python": sys.version,
            "platform": platform.platform(),
            "processor": next(models, "unknown"),
            "cores": len(os.sched_getaffinity(0)),
            "devices": [str(device) for device in jax.devices()],
            "c++ kernels": cpu.isa() or "none",
        }
        print(json.dumps(found, indent=2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Follow:
    """Run one of the further processes of an engine that spans several processes.

    The options are those of the first process, except --node-rank.
    """

    model: Positional[str] = "nano"
    """The model of the first process: a directory or a hub id."""
    engine: OmitArgPrefixes[EngineConfig] = EngineConfig()

    def run(self) -> None:
        """Load the model and repeat the first process's steps until it ends."""
        from slipway.engine.launch import follow  # imports JAX, which not every command needs

        follow(_path(self.model), self.engine)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """Chat with a model in the terminal; end with Ctrl-D."""

    model: Positional[str] = "nano"
    """A model directory or a hub id; "nano" is the model shipped with Slipway."""
    system: str | None = None
    """A system message to begin with."""
    chat_template: str | None = None
    """Name of one of the model's chat templates, or the text of a template; default: "default"."""
    engine: OmitArgPrefixes[EngineFlags] = ONE_AT_A_TIME
    sampling: OmitArgPrefixes[ChatFlags] = ChatFlags(max_tokens=256, temperature=0.6, top_p=0.9)

    def run(self) -> None:
        """Read a line from the terminal, answer it, and repeat."""
        llm = _load(self.model, self.engine)
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        while (line := _ask()) is not None:
            messages.append({"role": "user", "content": line})
            try:
                prompt = llm.chat_prompt(messages, self.chat_template)
                text = _print_stream(llm.stream(prompt, self.sampling), show_speed=False)
            except InvalidRequest as error:  # too long for the context, for example
                print(f"slipway: {error}", file=sys.stderr)
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a JAX checkpoint to a safetensors directory that vLLM and SGLang load, or back.

    See docs/convert.md.
    """

    source: Positional[str]
    """A directory (Orbax, HF; also gs://, s3://) or a .msgpack, .npz, .h5 or .safetensors file."""
    out_dir: Positional[Path]
    """Output directory, new or empty."""
    explain: bool = False
    """Only print how each tensor would be converted."""
    verify: bool = False
    """Read the result, compare each tensor through the inverse rule, compare Slipway's logits with
    those of transformers, and write report.json. This cannot find a wrong rule; --expect can."""
    expect: tuple[Path, Path] | None = None
    """IDS.npy LOGITS.npy: token ids (B, T) and the original model's logits (B, T, V) for them. The
    converted model must give the same logits for these ids. Implies --verify."""
    twin: str | None = None
    """FILE.py or FILE.py:CLASS: the torch class of the architecture, as for `slipway adapt`. Names
    of tensors that this class loads are kept."""
    expect_tolerance: float = 1e-3
    """Largest difference from --expect's logits, relative to the largest of them (at least 1)."""
    options: OmitArgPrefixes[ConvertConfig] = ConvertConfig()

    def run(self) -> None:
        """Convert the checkpoint and show a progress bar."""
        if self.explain and (self.verify or self.options.resume):
            raise InvalidConfig("explain", True, "no --verify, no --resume: nothing is written")
        if self.explain and self.expect:
            raise InvalidConfig("expect", str(self.expect[0]), "no --explain, which writes nothing")
        if self.expect and self.options.to != "hf":
            raise InvalidConfig("expect", str(self.expect[0]), "--to hf")
        if not self.expect and self.expect_tolerance != Convert.expect_tolerance:
            raise InvalidConfig("expect_tolerance", self.expect_tolerance, "--expect")
        if not self.expect_tolerance > 0:
            raise InvalidConfig("expect_tolerance", self.expect_tolerance, "a number above 0")
        expected = expected_logits.read(*self.expect) if self.expect else None
        source = open_source(self.source)
        twin = self._twin_class(source.path)
        if self.explain:
            print(explain(prepare(source, self.options, twin=twin)))
            return
        with Progress(*_PROGRESS) as bar:
            task = bar.add_task(f"{Path(self.source).name} -> {self.out_dir}", total=None)
            conversion, written = convert(
                source,
                self.out_dir,
                self.options,
                twin=twin,
                on_start=lambda size: bar.update(task, total=size),
                progress=lambda size: bar.advance(task, size),
            )
        size_gb = sum(tensor.nbytes for tensor in written) / 1e9
        print(f"{self.out_dir}: {len(written)} tensors, {size_gb:.2f} GB")
        if conversion.plan.mapping.note:
            print(conversion.plan.mapping.note)
        if self.verify or expected:
            self._verify(conversion, written, expected)

    def _twin_class(self, path: Path | None) -> Any:
        if self.twin is None:
            return None
        options = self.options
        names_change = options.mapping not in (None, "hf") or options.to == "maxtext"
        if names_change or options.allow_unknown_names:
            expected = "no --mapping, no --to maxtext and no --allow-unknown-names"
            raise InvalidConfig("twin", self.twin, expected)
        return load_twin(self.twin, read_config(options.config, path)).model_class

    def _verify(
        self,
        conversion: Conversion,
        written: list[Written],
        expected: expected_logits.Expected | None,
    ) -> None:
        compared = verify(conversion, written, self.out_dir)
        parity = None
        if self.options.to == "hf" and "vocab_size" in conversion.config:
            parity = dataclasses.asdict(parity_of(self.out_dir, conversion.config["vocab_size"]))
        original = None
        if expected is not None:
            agreement = expected_logits.compare(self.out_dir, expected, self.expect_tolerance)
            original = dataclasses.asdict(agreement)
        facts = report(conversion, written, compared, logits=parity)
        write_json(self.out_dir / "report.json", facts | {"original": original})
        print(summary(written, compared, parity, original=original))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantize the projections of an HF directory to 8 or 4 bits, as vLLM and SGLang read them.

    See docs/quantize.md.
    """

    model: Positional[str]
    """A directory of float weights, or a hub id; "nano" is the model shipped with Slipway."""
    out_dir: Positional[Path]
    """Output directory, new or empty."""
    bits: Literal[8, 4]
    """Bits of each weight."""
    group: Literal[32, 64, 128] | None = None
    """Number of weights that share a scale; default: 32 for 4 bits, a whole row for 8 bits."""
    shard_size: str = "5GB"
    """Largest size of one file."""

    def run(self) -> None:
        """Quantize the model and show a progress bar."""
        scheme = Scheme(self.bits, self.group or (32 if self.bits == 4 else 0))
        with Progress(*_PROGRESS) as bar:
            task = bar.add_task(f"{Path(self.model).name} -> {self.out_dir}", total=None)
            quantize_directory(
                NANO if self.model == "nano" else self.model,
                self.out_dir,
                scheme,
                shard_size=self.shard_size,
                on_start=lambda size: bar.update(task, total=size),
                progress=lambda size: bar.advance(task, size),
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt:
    """Write a package that adds a converted architecture to vLLM or SGLang (docs/adapters.md)."""

    model: Positional[str]
    """A converted model directory, or a hub id."""
    engine: Annotated[Engine, tyro.conf.arg(name="for")]
    """The engine to which the architecture is added."""
    twin: str
    """FILE.py[:CLASS]: the architecture as a transformers PreTrainedModel. The file is executed."""
    out: Path
    """Output directory, new or empty."""

    def run(self) -> None:
        """Check the architecture and write the package."""
        package = adapt(self.model, self.twin, self.engine, out_dir=self.out)
        print(package.summary())


@dataclasses.dataclass(frozen=True)
class Models:
    """List the implemented architectures, the shipped model, and the models in the hub cache."""

    def run(self) -> None:
        """Print the three lists."""
        from slipway.models import ARCHITECTURES  # imports JAX, which not every command needs

        print("architectures:", *sorted(ARCHITECTURES), sep="\n  ")
        print("shipped:", f"nano  ({NANO})", sep="\n  ")
        print("in the hub cache:", *(hub.cached() or ["nothing"]), sep="\n  ")


TEXT_COMMANDS = Generate | Chat | Serve | RunBatch | Follow
COMMANDS: Any = TEXT_COMMANDS | CollectEnv | Convert | Quantize | Adapt | Models | Bench


def main() -> None:
    """Run the command line.

    A SlipwayError is printed to stderr without a traceback, with exit code 2.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in PROGRESS_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        words = flags.expand(sys.argv[1:])
        tyro.cli(COMMANDS, prog="slipway", args=words, registry=flags.registry()).run()
    except SlipwayError as error:
        print(f"slipway: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _path(model: str) -> str:
    return NANO if model == "nano" else model


def _load(model: str, engine: EngineConfig) -> LLM:
    options = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)}
    return LLM(model, **options)


def _print_stream(outputs: Iterator[RequestOutput], show_speed: bool) -> str:
    """Print the text of a stream of outputs as it grows; return the whole text."""
    text, count, first = "", 0, time.perf_counter()
    for output in outputs:
        if not count:
            first = time.perf_counter()
        sample = output.outputs[0]
        print(sample.text[len(text) :], end="", flush=True)
        text, count = sample.text, len(sample.token_ids)
    print()
    if show_speed:
        seconds = time.perf_counter() - first
        rate = f"{(count - 1) / seconds:.1f} tokens/s after it, " if count > 1 else ""
        started = f"first token {first - _process_start():.1f} s after the process started"
        print(f"\n[{started}, {rate}{count} tokens]", file=sys.stderr)
    return text


def _process_start() -> float:
    """Return the start of this process on the clock of ``time.perf_counter``.

    Linux writes it to /proc, as ticks since the boot.
    """
    with open("/proc/self/stat") as f:
        ticks = int(f.read().rsplit(")", 1)[1].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - age_s


def _ask() -> str | None:
    """Return a line from the terminal; None at the end of the input."""
    try:
        return input("> ")
    except EOFError:
        print()
        return None
