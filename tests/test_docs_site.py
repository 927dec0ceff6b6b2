"""The documentation site: navigation, links, quoted commands, width of lines, strict build.

Not here: tables of docs/ that list fields, flags and tests (server/test_docs.py), paths that pages
name (test_front_door.py).
"""

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown.extensions.toc import slugify

from benchmarks import draw_peers
from slipway import cli
from slipway.engine.config import EngineConfig
from slipway.server.config import ServerConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
MAX_WIDTH = 120
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
# What stands between the fixed parts of an error message: values, and words that InvalidInput adds.
SEPARATORS = re.compile(r"\.\.\.|: got|, expected |expected ")
OTHERS_MESSAGES = {"Unrecognized options"}  # tyro's
QUOTED = re.compile(r"`(slipway [^`]+)`")


def page_name(path: Path) -> str:
    """Return a page's path below the repository, as the identifier of a test."""
    return str(path.relative_to(ROOT))


def site_config() -> dict:
    """Return mkdocs.yml; names of Python functions in it stay texts."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, name, node: name)
    return yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=loader)


def pages_of(navigation: list | dict | str) -> list[str]:
    """Return the pages of a part of the navigation, in order."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in pages_of(part)]


def prose(path: Path) -> str:
    """Return a page without its blocks of code."""
    text = FENCE.sub("", path.read_text())
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as the site makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings}


def quoted_commands() -> dict[str, str]:
    """Return every `slipway` command of the pages, and the page that quotes it."""
    found: dict[str, str] = {}
    for path in [*PAGES, *FRONT]:
        text = path.read_text().replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines() if line.startswith("    slipway ")]
        lines += [re.sub(r"\s+", " ", command) for command in QUOTED.findall(text)]
        for line in lines:
            command = line.split("  #")[0].replace(" ...", "").strip()
            found.setdefault(command, page_name(path))
    return found


COMMANDS = quoted_commands()


@pytest.mark.host
def test_every_page_is_in_the_navigation_once():
    pages = pages_of(site_config()["nav"])
    assert sorted(pages) == sorted(str(path.relative_to(DOCS)) for path in PAGES)


@pytest.mark.host
@pytest.mark.parametrize("path", [*PAGES, *FRONT], ids=page_name)
def test_relative_links_and_anchors_resolve(path):
    broken = []
    for target in LINK.findall(CODE.sub("", prose(path))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path
        outside = path.is_relative_to(DOCS) and not to.is_relative_to(DOCS)
        if outside or not to.exists() or (anchor and anchor not in anchors(to)):
            broken.append(target)
    assert broken == []


@pytest.mark.host
@pytest.mark.parametrize("path", [*PAGES, *FRONT], ids=page_name)
def test_no_line_is_wider_than_the_limit(path):
    wide = [
        number
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > MAX_WIDTH
    ]
    assert wide == []


@pytest.mark.host
def test_commands_of_the_pages_are_many():
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("command", COMMANDS)
def test_quoted_commands_parse(command, monkeypatch, tmp_path, capsys):
    """Parse the command with the real command line; nothing is run."""
    parsed = []
    parse = cli.tyro.cli

    class Nothing:
        def run(self) -> None: ...

    def recorded(*arguments, **options):
        parsed.append(parse(*arguments, **options))
        return Nothing()

    (tmp_path / "FILE.yaml").write_text("port: 9000\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.tyro, "cli", recorded)
    command_line = re.sub(r"[\[\]]", "", command) if " [-" in command else command
    words = shlex.split(command_line.replace("HOST:PORT", "HOST:6789"))
    monkeypatch.setattr(sys, "argv", words)
    if not words[1:] or words[1:] == ["bench"]:
        return
    try:
        cli.main()
    except SystemExit as stop:
        # a command without its arguments, such as `slipway convert`, names the command
        names_only = len(words) <= 3 and not any(word.startswith("-") for word in words)
        shown = capsys.readouterr()
        known = "required" in (shown.out + shown.err).lower()
        assert stop.code == 0 or (names_only and known), f"{COMMANDS[command]}: {shown.err}"
    else:
        assert len(parsed) == 1


@pytest.mark.host
def test_modules_that_the_pages_run_exist():
    text = "\n".join(path.read_text() for path in [*PAGES, *FRONT])
    named = {
        name.replace(".", "/")
        for name in re.findall(r"python -m\s+((?:benchmarks|examples|training)\.\w+)", text)
    }
    assert len(named) > 10
    assert not {name for name in named if not (ROOT / f"{name}.py").exists()}


def source_text() -> str:
    """Return the package's source; texts of several lines are joined."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "slipway").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.mark.host
def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = (DOCS / "troubleshooting.md").read_text()
    source = source_text()
    heads = [
        line.partition("`: ")[0]
        for line in re.sub(r"\n  ", " ", page).splitlines()
        if line.startswith("- ")
    ]
    messages = [message for head in heads for message in re.findall(r"`([^`]+)`", head + "`")]
    pieces = {piece.strip(" :,(") for message in messages for piece in SEPARATORS.split(message)}
    pieces = {piece for piece in pieces if " " in piece and piece not in OTHERS_MESSAGES}
    assert len(pieces) > 30
    assert not {piece for piece in pieces if piece not in source}, "update docs/troubleshooting.md"


@pytest.mark.host
def test_charts_are_drawn_from_the_tables_of_the_performance_page():
    text = (DOCS / "performance.md").read_text()
    for heading, _, file in draw_peers.CHARTS:
        series = draw_peers.ratios(text, heading)
        assert series.keys() <= draw_peers.LABELS.keys()
        assert all(float(ratio) > 0 for rows in series.values() for ratio in rows.values())
        assert (DOCS / file).exists()


def test_the_site_builds_without_a_warning_and_shows_every_flag(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "api" / "flags" / "index.html").read_text()
    for config in (EngineConfig, ServerConfig):
        for field in dataclasses.fields(config):
            assert f'id="{config.__module__}.{config.__name__}.{field.name}"' in page


def test_the_page_of_models_is_that_of_the_registry():
    spec = importlib.util.spec_from_file_location("models_page", ROOT / "tools" / "models_page.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text() == tool.page(), "run tools/models_page.py"
