"""Pytest plugin that gives vLLM's server tests a Slipway server in place of vLLM's.

The plugin runs in the environment of the tests, which needs vllm and transformers, and where
slipway is not installed. Not here: the choice of files, their time limits and the report
(rivals_tests.py).

Environment:
- ``SLIPWAY_COMMAND``: JSON list of the words that start `slipway serve`
- ``SLIPWAY_MODELS``: JSON object from hub id to directory, with "" for all other hub ids
- ``SLIPWAY_TEMPLATE``: chat template of servers for which the test gives none
- ``SLIPWAY_THINKING_TEMPLATE``: the same where the test gives a reasoning parser
- ``SLIPWAY_REPORT``: file to which each outcome is appended as a JSON line
- ``SLIPWAY_TEST_TIMEOUT_S``: time limit of one test
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

COMMAND: list[str] = json.loads(os.environ["SLIPWAY_COMMAND"])
MODELS: dict[str, str] = json.loads(os.environ["SLIPWAY_MODELS"])
READY_TIMEOUT_S = 120
# Number of values of a flag: all up to the next flag.
ANY = -1
# Flags of vLLM without effect on a model's answers, with the number of their values. They are left
# out. Tests of adapters therefore find no adapter; their tests of the base model run.
INERT = {
    "--attention-backend": 1,
    "--chat-template-content-format": 1,
    "--disable-log-stats": 0,
    "--dtype": 1,
    "--enable-auto-tool-choice": 0,
    "--enable-chunked-prefill": 0,
    "--enable-lora": 0,
    "--enable-prompt-tokens-details": 0,
    "--enable-server-load-tracking": 0,
    "--enforce-eager": 0,
    "--gpu-memory-utilization": 1,
    "--limit-mm-per-prompt": 1,
    "--load-format": 1,
    "--lora-modules": ANY,
    "--max-cpu-loras": 1,
    "--max-lora-rank": 1,
    "--max-num-batched-tokens": 1,
    "--max-num-seqs": 1,
    "--no-async-scheduling": 0,
    "--reasoning-parser": 1,
    "--runner": 1,
    "--seed": 1,
    "--structured-outputs-config.backend": 1,
    "--tokenizer": 1,
    "--tool-call-parser": 1,
    "--trust-remote-code": 0,
}


class SlipwayServer:
    """A `slipway serve` process with the interface of vLLM's test class for servers."""

    DUMMY_API_KEY = "token-abc123"
    # vLLM's class, which makes the clients
    upstream: type

    def __init__(self, model: str, vllm_serve_args: list[str], **options: Any):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.host = "127.0.0.1"
        self.uds = None
        self.show_hidden_metrics = True
        words = [*translated(model, vllm_serve_args, options), "--port", str(self.port)]
        print("slipway", *words)
        self.proc = subprocess.Popen([*COMMAND, *words], start_new_session=True)
        try:
            self._wait_ready(words)
        except BaseException:
            # also after an interruption, no server must be left running
            self.__exit__()
            raise

    def __enter__(self) -> "SlipwayServer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.proc.poll() is None:
            self.proc.send_signal(signal.SIGTERM)
            try:
                self.proc.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.proc.pid, signal.SIGKILL)
                self.proc.wait()

    @property
    def url_root(self) -> str:
        """Return the address of the server."""
        return f"http://{self.host}:{self.port}"

    def url_for(self, *parts: str) -> str:
        """Return the address of a path."""
        return "/".join([self.url_root, *(part.strip("/") for part in parts if part)])

    def __getattr__(self, name: str) -> Any:
        # clients of OpenAI's and Anthropic's SDKs, made by vLLM's own methods
        if name.startswith("get_"):
            return getattr(self.upstream, name).__get__(self)
        raise AttributeError(name)

    def _wait_ready(self, words: list[str]) -> None:
        import requests

        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.proc.poll() is not None:
                raise RuntimeError(f"slipway does not start with {' '.join(words)}")
            try:
                if requests.get(self.url_for("readyz"), timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.1)
        raise RuntimeError("slipway was not ready in time")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Replace vLLM's server and all downloads before any module of the tests is imported."""
    huggingface_hub: Any = importlib.import_module("huggingface_hub")
    import tests.utils as utils
    import transformers
    import vllm.tokenizers as tokenizers

    SlipwayServer.upstream = utils.RemoteOpenAIServer
    utils.RemoteOpenAIServer = SlipwayServer
    _redirect(tokenizers, "get_tokenizer")
    # this also replaces adapters by a local directory; their flags are left out
    huggingface_hub.snapshot_download = lambda repo_id, *_, **__: directory(repo_id)
    huggingface_hub.HfApi.snapshot_download = lambda _, repo_id, *__, **___: directory(repo_id)
    for name in ("AutoTokenizer", "AutoConfig"):
        _redirect(getattr(transformers, name), "from_pretrained")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End a test that takes too long, its fixtures included."""
    limit_s = int(os.environ["SLIPWAY_TEST_TIMEOUT_S"])

    def end(*_: object) -> None:
        raise TimeoutError(f"the test took more than {limit_s} s")

    signal.signal(signal.SIGALRM, end)
    signal.alarm(limit_s)
    try:
        return (yield)
    finally:
        signal.alarm(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test's outcome: its call, or the set-up or tear-down that failed or skipped it."""
    if report.when == "call" or report.outcome != "passed":
        note(report.nodeid, report.outcome, report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a file that cannot be imported."""
    if report.failed:
        note(report.nodeid, "failed", report)


def note(test: str, outcome: str, report: pytest.TestReport | pytest.CollectReport) -> None:
    """Append an outcome and, for a failure, its message to the report file."""
    crash = getattr(report.longrepr, "reprcrash", None)
    why = "" if outcome == "passed" else str(crash.message if crash else report.longrepr)
    where = f"{Path(crash.path).name}:{crash.lineno}" if crash else ""
    with open(os.environ["SLIPWAY_REPORT"], "a") as file:
        path, _, name = test.partition("::")
        line = {
            "file": path,
            "test": name or path,
            "outcome": outcome,
            "why": why[-1500:],
            "where": where,
        }
        file.write(json.dumps(line) + "\n")


def directory(model: str) -> str:
    """Return the local directory that stands for a hub id."""
    return model if Path(model).is_dir() else MODELS.get(model, MODELS[""])


def _redirect(owner: ModuleType | type, name: str) -> None:
    real = getattr(owner, name)

    def redirected(*args: Any, **kwargs: Any) -> Any:
        names = {"tokenizer_name", "pretrained_model_name_or_path"} & kwargs.keys()
        kwargs |= {key: directory(str(kwargs[key])) for key in names}
        return real(*(directory(str(each)) for each in args[:1]), *args[1:], **kwargs)

    setattr(owner, name, redirected)


def translated(model: str, given: list[str], options: dict[str, Any]) -> list[str]:
    """Return the words of `slipway serve` for those of `vllm serve`.

    Flags that Slipway does not have are kept, and end its start with an error.
    """
    words, overrides = [directory(model), "--max-num-seqs", "16", "--dtype", "float32"], {}
    flags: list[str] = []
    for word in given:
        flags += word.split("=", 1) if word.startswith("--") else [word]
    while flags:
        flag = flags.pop(0)
        if flag == "--max-model-len":
            length = flags.pop(0)
            overrides["max_position_embeddings"] = int(length)
            words += [flag, length]
        elif flag == "--max-logprobs":
            number = int(flags.pop(0))
            words += [flag, str(number if number <= 20 else -1)]
        elif flag in INERT:
            count = INERT[flag]
            while flags and (count > 0 or (count == ANY and not flags[0].startswith("--"))):
                flags.pop(0)
                count -= count != ANY
        elif flag == "--chat-template":
            words += [flag, _as_file(flags.pop(0))]
        else:
            words.append(flag)
    if "--served-model-name" not in words:
        words += ["--served-model-name", model]
    if "--chat-template" not in words:
        name = "SLIPWAY_THINKING_TEMPLATE" if "--reasoning-parser" in given else "SLIPWAY_TEMPLATE"
        words += ["--chat-template", os.environ[name]]
    overrides |= options.get("override_hf_configs") or {}
    return [*words, "--hf-overrides", json.dumps(overrides)] if overrides else words


def _as_file(template: str) -> str:
    """Return a file that holds a chat template; vLLM accepts a file or the text itself."""
    if "\n" not in template and Path(template).is_file():
        return template
    path = Path(os.environ["SLIPWAY_TEMPLATE"]).with_suffix(f".{abs(hash(template))}")
    path.write_text(template)
    return str(path)
