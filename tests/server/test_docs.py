"""Agreement of the documentation with the code: fields, options, metrics, names of tests."""

import ast
import re
from pathlib import Path

import msgspec
import pytest
import yaml

from slipway.engine.config import EngineConfig
from slipway.flags import expand
from slipway.server import metrics, schema, sglang
from slipway.server.config import ServerConfig

pytestmark = pytest.mark.host
DOCS = Path(__file__).parents[2] / "docs"
KINDS = [
    kind
    for module in (schema, sglang)
    for kind in vars(module).values()
    if isinstance(kind, type)
    and issubclass(kind, msgspec.Struct)
    and kind.__module__ == module.__name__
]


def test_every_field_is_documented():
    text = (DOCS / "serving.md").read_text().partition("## Fields")[2].partition("## Structures")[0]
    named = set(re.findall(r"`([a-z_0-9]+)`", text))
    fields = {field.encode_name for kind in KINDS for field in msgspec.structs.fields(kind)}
    assert len(fields) > 80
    assert not fields - named, "fields without a description"
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    first = {name for cell in rows for name in re.findall(r"`([a-z_]+)`", cell)}
    assert not first - fields, "fields that do not exist"


def test_tests_named_in_security_exist():
    text = (DOCS / "security.md").read_text().partition("## What is not done")[0]
    attacks = text.split("\n- ")[1:]
    there = {
        node.name
        for path in DOCS.parent.glob("tests/*/test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(attacks) > 25
    for attack in attacks:
        named = re.findall(r"test_\w+", attack)
        assert named, attack
        assert not set(named) - there, attack


def test_examples_of_operations_are_valid(tmp_path):
    text = (DOCS / "operations.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "serve.yaml").write_text(blocks[0])
    words = expand(["serve", "--config", str(tmp_path / "serve.yaml")])
    known = {*ServerConfig.__dataclass_fields__, *EngineConfig.__dataclass_fields__}
    used = {word for word in words if word.startswith("--")} | set(
        re.findall(r"`(--[a-z-]+)", text)
    )
    assert len(used) > 12
    assert not {word[2:].replace("-", "_") for word in used} - known - {"replicas"}
    manifests = list(yaml.safe_load_all(blocks[1]))
    assert [each["kind"] for each in manifests] == ["Deployment", "Service"]
    names = {
        *metrics.GAUGES.values(),
        *metrics.COUNTERS.values(),
        *metrics.HISTOGRAMS.values(),
        "request_success",
    }
    assert all(name in text for name in names if name), "vLLM's metrics"
