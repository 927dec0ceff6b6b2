"""The `slipway` command: which subcommands there are and how they print; flags come from the config dataclasses."""

import dataclasses
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from tyro.conf import OmitArgPrefixes, Positional
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from slipway import expected_logits, flags
from slipway.adapters.package import adapt
from slipway.adapters.twin import Engine
from slipway.adapters.twin import load as load_twin
from slipway.bench.command import Bench
from slipway.checkpoint import hub
from slipway.checkpoint.quantize import Scheme
from slipway.checkpoint.shards import write_json
from slipway.convert.conversion import Conversion, ConvertConfig, convert, prepare, read_config
from slipway.convert.formats import open_source
from slipway.convert.pack import pack
from slipway.convert.run import Written
from slipway.convert.verify import explain, report, summary, verify
from slipway.engine.config import EngineConfig
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestOutput
from slipway.errors import InvalidConfig, InvalidRequest, SlipwayError
from slipway.llm import LLM, NANO
from slipway.parity import compare as parity_of
from slipway.server.config import ServerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineFlags(EngineConfig):
    """The engine's options that make sense here: --seed is the request's, and text needs a tokenizer."""

    seed: tyro.conf.Suppress[int] = 0
    skip_tokenizer_init: tyro.conf.Suppress[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingFlags(SamplingParams):
    """How tokens are chosen and where they end; what is not printed is not asked for."""

    logprobs: tyro.conf.Suppress[int | None] = None
    prompt_logprobs: tyro.conf.Suppress[int | None] = None
    structured_outputs: tyro.conf.Suppress[None] = None
    reasoning: tyro.conf.Suppress[None] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFlags(SamplingFlags):
    """The same for a conversation, which has one answer."""

    n: tyro.conf.Suppress[int] = 1


_PROGRESS = (
    TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
)  # fmt: skip
ONE_AT_A_TIME = EngineFlags(max_num_seqs=1, max_num_batched_tokens=32, decode_steps=1)  # two shapes to compile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Complete a prompt and stream the text."""

    model: Positional[str] = "nano"
    """A directory or a hub id; nano is the shipped model."""
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])]
    """The text to complete."""
    show_speed: bool = False
    """Print the time to the first token and the tokens per second."""
    engine: OmitArgPrefixes[EngineFlags] = ONE_AT_A_TIME
    sampling: OmitArgPrefixes[SamplingFlags] = SamplingFlags(max_tokens=128, temperature=0.0)

    def run(self) -> None:
        """Print the prompt and what follows it."""
        if self.sampling.n > 1:
            if self.show_speed:
                raise InvalidConfig("show_speed", True, "one sample (n = 1), whose text is streamed")
            n = self.sampling.n
            rows = dataclasses.replace(
                self.engine,
                max_num_seqs=max(n, self.engine.max_num_seqs),
                max_num_batched_tokens=max(n, self.engine.max_num_batched_tokens),
            )
            for output in _load(self.model, rows).generate(self.prompt, self.sampling)[0].outputs:
                print(f"--- {output.index}\n{self.prompt}{output.text}")
            return
        stream = _load(self.model, self.engine).stream(self.prompt, self.sampling)
        print(self.prompt, end="", flush=True)
        _print_stream(stream, self.show_speed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model over HTTP, as OpenAI's API, vLLM and SGLang do (docs/serving.md)."""

    model: Positional[str] = "nano"
    """A directory or a hub id; nano is the shipped model."""
    replicas: int = 1
    """Engine processes, each with the model whole."""
    engine: OmitArgPrefixes[EngineConfig] = EngineConfig()
    server: OmitArgPrefixes[ServerConfig] = ServerConfig()

    def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        from slipway.server.serve import serve  # brings a web server, which other commands do without

        if self.replicas < 1:
            raise InvalidConfig("replicas", self.replicas, "at least 1")
        serve(_path(self.model), self.model, self.engine, self.server, self.replicas)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunBatch:
    """Answer a file of OpenAI batch requests, one JSON object a line, without a server."""

    model: Positional[str] = "nano"
    """A directory or a hub id; nano is the shipped model."""
    input: Annotated[Path, tyro.conf.arg(aliases=["-i"])]
    """Lines of {custom_id, method, url, body}."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Lines of {id, custom_id, response, error}, in the same order."""
    engine: OmitArgPrefixes[EngineConfig] = EngineConfig()

    def run(self) -> None:
        """Answer all; exit code 1 if some failed."""
        from slipway.server.serve import batch  # brings a web server, which other commands do without

        if not self.input.is_file():
            raise InvalidConfig("input", str(self.input), "a file")
        if failed := batch(_path(self.model), self.model, self.engine, self.input, self.output):
            print(f"slipway: {failed} requests failed: their errors stand in {self.output}", file=sys.stderr)
            sys.exit(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectEnv:
    """Print what a report of a fault should name: versions, processor, devices, and which kernels serve."""

    def run(self) -> None:
        """As JSON."""
        import jax

        from slipway.ops import cpu

        names = ("slipway", "jax", "jaxlib", "numpy", "tokenizers", "llguidance", "starlette", "uvicorn", "pyzmq")
        about = Path("/proc/cpuinfo").read_text().splitlines()
        found = {
            "versions": {name: version(name) for name in names}, "python": sys.version, "platform": platform.platform(),
            "processor": next((line.partition(": ")[2] for line in about if line.startswith("model name")), "unknown"),
            "cores": len(os.sched_getaffinity(0)), "devices": [str(device) for device in jax.devices()],
            "c++ kernels": cpu.isa() or "none",
        }  # fmt: skip
        print(json.dumps(found, indent=2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Follow:
    """Be one of the other processes of an engine that runs over several: the same options but for --node-rank."""

    model: Positional[str] = "nano"
    """A directory or a hub id, as the first process has it."""
    engine: OmitArgPrefixes[EngineConfig] = EngineConfig()

    def run(self) -> None:
        """Load, and repeat the first process's steps until it is done."""
        from slipway.engine.launch import follow  # with JAX, which other commands may not need

        follow(_path(self.model), self.engine)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk to a model in the terminal; end with Ctrl-D."""

    model: Positional[str] = "nano"
    """A directory or a hub id; nano is the shipped model."""
    system: str | None = None
    """A system message to begin with."""
    chat_template: str | None = None
    """The name of one of the model's chat templates, or a template's text; by default the one named "default"."""
    engine: OmitArgPrefixes[EngineFlags] = ONE_AT_A_TIME
    sampling: OmitArgPrefixes[ChatFlags] = ChatFlags(max_tokens=256, temperature=0.6, top_p=0.9)

    def run(self) -> None:
        """Read, answer, repeat."""
        llm = _load(self.model, self.engine)
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        while (line := _ask()) is not None:
            messages.append({"role": "user", "content": line})
            try:
                text = _print_stream(llm.stream(llm.chat_prompt(messages, self.chat_template), self.sampling), False)
            except InvalidRequest as error:  # longer than the context, say: the conversation so far is not lost
                print(f"slipway: {error}", file=sys.stderr)
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn a JAX checkpoint into the safetensors directory that vLLM and SGLang load, or back (docs/convert.md)."""

    source: Positional[str]
    """An Orbax or HF directory, also at gs:// and s3://, or a .msgpack, .npz, .h5 or .safetensors file."""
    out_dir: Positional[Path]
    """A new or an empty directory."""
    explain: bool = False
    """Print what would become of every tensor, and stop."""
    verify: bool = False
    """Read the result anew, compare every tensor through the inverse rule, then our engine with transformers; write
    report.json. A wrong rule passes: only --expect sees that."""
    expect: tuple[Path, Path] | None = None
    """IDS.npy LOGITS.npy: token ids (B, T) and the original model's logits (B, T, V) for them. The result is run on the
    ids and must give the same logits; with it comes --verify."""
    twin: str | None = None
    """FILE.py or FILE.py:CLASS: the torch class of the architecture, as for `slipway adapt`; the source's names are
    kept where they are those that it loads."""
    expect_tolerance: float = 1e-3
    """Largest difference from --expect's logits, as a share of the largest of them (at least 1)."""
    options: OmitArgPrefixes[ConvertConfig] = ConvertConfig()

    def run(self) -> None:
        """Convert, with a progress bar."""
        if self.explain and (self.verify or self.options.resume):
            raise InvalidConfig("explain", True, "neither --verify nor --resume, since nothing is written")
        if self.explain and self.expect:
            raise InvalidConfig("expect", str(self.expect[0]), "nothing with --explain, since nothing is written")
        if self.expect and self.options.to != "hf":
            raise InvalidConfig("expect", str(self.expect[0]), "nothing, since --to is not hf")
        if not self.expect and self.expect_tolerance != Convert.expect_tolerance:
            raise InvalidConfig("expect_tolerance", self.expect_tolerance, "--expect beside it")
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
        print(f"{self.out_dir}: {len(written)} tensors, {sum(w.nbytes for w in written) / 1e9:.2f} GB")
        if conversion.plan.mapping.note:
            print(conversion.plan.mapping.note)
        if self.verify or expected:
            self._verify(conversion, written, expected)

    def _twin_class(self, path: Path | None) -> Any:
        if self.twin is None:
            return None
        options = self.options
        if options.mapping not in (None, "hf") or options.to == "maxtext" or options.allow_unknown_names:
            raise InvalidConfig(
                "twin", self.twin, "neither --mapping, --to maxtext nor --allow-unknown-names beside it"
            )
        return load_twin(self.twin, read_config(options.config, path)).model_class

    def _verify(
        self, conversion: Conversion, written: list[Written], expected: expected_logits.Expected | None
    ) -> None:
        compared = verify(conversion, written, self.out_dir)
        parity = None
        if self.options.to == "hf" and "vocab_size" in conversion.config:
            parity = dataclasses.asdict(parity_of(self.out_dir, conversion.config["vocab_size"]))
        original = None
        if expected is not None:
            agreement = expected_logits.compare(self.out_dir, expected, self.expect_tolerance)
            original = dataclasses.asdict(agreement)
        facts = report(conversion, written, compared, parity)
        write_json(self.out_dir / "report.json", facts | {"original": original})
        print(summary(written, compared, parity, original))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Pack the projections of an HF directory in 8 or 4 bits, as vLLM and SGLang read them (docs/quantize.md)."""

    model: Positional[str]
    """A directory of float weights, or a hub id; nano is the shipped model."""
    out_dir: Positional[Path]
    """A new or an empty directory."""
    bits: Literal[8, 4]
    """Of each weight."""
    group: Literal[32, 64, 128] | None = None
    """Weights that share a scale: 32 by default with 4 bits; with 8, a whole row."""
    shard_size: str = "5GB"
    """Largest file."""

    def run(self) -> None:
        """Pack, with a progress bar."""
        scheme = Scheme(self.bits, self.group or (32 if self.bits == 4 else 0))
        with Progress(*_PROGRESS) as bar:
            task = bar.add_task(f"{Path(self.model).name} -> {self.out_dir}", total=None)
            pack(
                NANO if self.model == "nano" else self.model,
                self.out_dir,
                scheme,
                self.shard_size,
                on_start=lambda size: bar.update(task, total=size),
                progress=lambda size: bar.advance(task, size),
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt:
    """Write the package that registers a converted architecture with an engine that lacks it (docs/adapters.md)."""

    model: Positional[str]
    """A converted directory, or a hub id."""
    engine: Annotated[Engine, tyro.conf.arg(name="for")]
    """The engine."""
    twin: str
    """FILE.py[:CLASS]: the architecture as a transformers PreTrainedModel. The file is run."""
    out: Path
    """A new or an empty directory."""

    def run(self) -> None:
        """Check and write."""
        print(adapt(self.model, self.twin, self.engine, self.out).summary())


@dataclasses.dataclass(frozen=True)
class Models:
    """List the architectures that Slipway implements, the shipped model, and what the hub cache holds."""

    def run(self) -> None:
        """Print them."""
        from slipway.models import ARCHITECTURES  # brings JAX, which the other commands may not need

        print("architectures:", *sorted(ARCHITECTURES), sep="\n  ")
        print("shipped:", f"nano  ({NANO})", sep="\n  ")
        print("in the hub cache:", *(hub.cached() or ["nothing"]), sep="\n  ")


def main() -> None:
    """Run the command line. Where Slipway refuses: what is wrong, to stderr, no traceback, exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("slipway.engine.launch", "slipway.engine.step", "slipway.convert.remote"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        commands: Any = (
            Generate | Chat | Serve | RunBatch | Follow | CollectEnv | Convert | Quantize | Adapt | Models | Bench
        )
        tyro.cli(commands, prog="slipway", args=flags.expand(sys.argv[1:]), registry=_registry()).run()
    except SlipwayError as error:
        print(f"slipway: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _registry() -> ConstructorRegistry:
    """Mappings are written as JSON: ``--hf-overrides '{"rope_scaling": null}'``."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def mapping(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type_origin is not Mapping:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: json.loads(words[0]),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    return registry


def _path(model: str) -> str:
    return NANO if model == "nano" else model


def _load(model: str, engine: EngineConfig) -> LLM:
    options = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)}
    return LLM(model, **options)


def _print_stream(outputs: Iterator[RequestOutput], show_speed: bool) -> str:
    """Print text as it comes, and return it whole."""
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
    """When this process began, on the clock of ``time.perf_counter`` (Linux: since boot, as /proc counts)."""
    with open("/proc/self/stat") as f:
        ticks = int(f.read().rsplit(")", 1)[1].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - age_s


def _ask() -> str | None:
    """A line from the terminal; None at its end."""
    try:
        return input("> ")
    except EOFError:
        print()
        return None
