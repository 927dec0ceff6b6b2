"""The Dockerfile: sources that it copies, and its RUN steps in a fresh virtual environment.

Steps that install packages of the system (apt-get) are left out: the tests' machine has a compiler
already. To save time the kernels are compiled without optimization, and pip uses its cache.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions in order, as pairs of keyword and text."""
    lines = [
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


def value_of(keyword: str) -> str:
    """Return the text of the last instruction of a kind."""
    return [text for name, text in instructions() if name == keyword][-1]


def copied() -> list[tuple[list[str], str]]:
    """Return sources and target of every COPY from the tree."""
    words = [
        shlex.split(text)
        for name, text in instructions()
        if name == "COPY" and not text.startswith("--from")
    ]
    return [(sources, target) for *sources, target in words]


@pytest.mark.host
def test_what_is_copied_exists_and_is_sent_to_the_builder():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sources = {source for group, _ in copied() for source in group}
    assert not {source for source in sources if not (ROOT / source).exists()}
    assert ignore[1] == "*"
    assert sources == {line[1:] for line in ignore if line.startswith("!")}


@pytest.mark.host
def test_the_package_needs_no_file_that_is_not_copied():
    project = (ROOT / "pyproject.toml").read_text()
    sources = {source for group, _ in copied() for source in group}
    assert set(re.findall(r'(?:readme|license-files) = \W*"?([\w.]+)', project)) <= sources


@pytest.mark.host
def test_the_server_runs_without_root_and_is_probed():
    user = value_of("USER").split(":")[0]
    assert user.isdigit(), "Kubernetes' runAsNonRoot needs a number"
    assert int(user) > 0
    assert "/livez" in value_of("HEALTHCHECK")
    command = json.loads(value_of("ENTRYPOINT")) + json.loads(value_of("CMD"))
    assert command == ["slipway", "serve", "--host", "0.0.0.0"]


@pytest.mark.host
@pytest.mark.parametrize("extra", ["tpu", "cuda"])
def test_extras_of_the_build_argument_exist(extra):
    assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert ("ARG", "EXTRA=") in instructions()


def test_run_steps_make_an_environment_whose_entry_point_answers(tmp_path):
    source, prefix, cache = tmp_path / "src", tmp_path / "opt", tmp_path / "cache"
    source.mkdir()
    environment = os.environ | {"SKBUILD_CMAKE_BUILD_TYPE": "Debug"}
    for names, target in copied():
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name,
                    source / target,
                    ignore=shutil.ignore_patterns("_native.so", "__pycache__"),
                )
            else:
                shutil.copy(ROOT / name, source / target)
    for keyword, text in instructions():
        if keyword == "RUN" and "apt-get" not in text:
            step = text.replace("/opt/slipway", str(prefix)).replace("/cache", str(cache))
            step = step.replace("--no-cache-dir ", "")
            step = re.sub(r"^python ", f"{sys.executable} ", step)
            done = subprocess.run(
                ["sh", "-c", step],
                cwd=source,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, f"{step}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert cache.stat().st_mode & 0o7777 == 0o1777
    command = json.loads(value_of("ENTRYPOINT"))
    for words in (["--help"], ["serve", "--help"]):
        done = subprocess.run(
            [prefix / "bin" / command[0], *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "serve" in done.stdout
