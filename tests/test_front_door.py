"""Files that a newcomer meets first: the paths and commands that they name exist."""

import re
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.host
ROOT = Path(__file__).parents[1]
PATH = re.compile(
    r"(?<![\w/.])((?:slipway|docs|tests|tools|csrc|examples|benchmarks|training)/[\w./]*\w)"
)


def test_every_file_of_the_package_is_in_the_architecture_page():
    named = set(re.findall(r"`([\w/]+\.py)`", (ROOT / "docs/architecture.md").read_text()))
    package = ROOT / "slipway"
    there = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    packages = {path for path in there if path.endswith("__init__.py")}
    assert not there - packages - named, "files that nobody describes"
    elsewhere = {path for path in named if (ROOT / path).exists()}  # tests/models/runner.py
    assert not named - there - elsewhere, "files that do not exist"


def test_every_file_of_csrc_is_in_the_architecture_page():
    named = set(re.findall(r"`csrc/([\w.]+)`", (ROOT / "docs/architecture.md").read_text()))
    assert named == {path.name for path in (ROOT / "csrc").iterdir()}


@pytest.mark.parametrize(
    "file", ["CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "docs/adding_a_model.md"]
)
def test_every_path_that_a_page_names_exists(file):
    named = set(PATH.findall((ROOT / file).read_text()))
    assert not {path for path in named if not (ROOT / path).exists()}


def test_every_make_target_that_contributing_names_exists():
    text, makefile = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake (\w+)", text))
    assert {"check", "test", "demo"} <= targets
    assert not {
        target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)
    }


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    assert ".ci/run" in steps and (ROOT / ".ci/run").stat().st_mode & 0o111


def test_hooks_before_a_commit_are_those_of_make_check():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    check = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    for hook in hooks:
        assert hook["entry"] in check, hook["id"]
