"""Check of plain language and density: docstrings, comments, layout of code, commit headlines.

Not here: lengths of files and functions (sizes.py), line width (ruff, clang-format),
import order (ruff).
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("slipway", "training", "tests", "tools", "benchmarks", "examples", "csrc")
CXX_SUFFIXES = (".h", ".cc")
MIN_WORDS, HEADLINE_CHARACTERS, POSITIONAL_ARGUMENTS = 3, 72, 3
MIN_TABLE_ROWS = 3

# Openings of docstrings, and of the first line of a C++ file, that leave out what they describe.
MODULE_OPENINGS = (
    "Decides|Knows|Makes|Runs|Finds|Gives|Holds|Fails|"
    "From|What|Where|Which|How|Who|When|That|Whether"
)
FUNCTION_OPENINGS = (
    "The|A|An|What|Which|Who|Where|How|When|That|Those|These|All|Every|Each|One|No|None|Nothing|Nobody|Same|As|Of|See|"
    "Its|It|If|In|On|With|Without|For|From|Is|Has|Does"
)
CLASS_OPENINGS = "What|Who|Where|How|When|That|Those|Which|As|Of|See|It|Its"
UNCLEAR = re.compile(
    r"\b(who|whose|whom|whoever|nobody|no one|somebody|someone|anybody|"
    r"as many as may|ceases?|knows?|says? so)\b",
    re.IGNORECASE,
)
# A comment of C++ in the first group, or a string, in which `//` is no comment.
CXX_COMMENT = re.compile(r"//(.*)|\"(?:\\.|[^\"\\])*\"")
# Functions that take a list of equal arguments: names would add nothing.
LISTING = {
    "print", "max", "min", "zip", "chain", "product", "union", "gcd", "isinstance", "format",
    "join", "joinpath", "Path", "reshape", "transpose", "call", "P", "PartitionSpec", "debug",
    "info", "warning", "error", "exception", "log",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Print every breach in the named files or folders, by default all; return 1 for any."""
    roots = [Path(argument) for argument in arguments or FOLDERS]
    paths = [path for root in roots for path in ([root] if root.is_file() else source_files(root))]
    breaches = [f"{path}:{line}: {text}" for path in paths for line, text in file_breaches(path)]
    breaches += [] if arguments else headline_breaches()
    print("\n".join(breaches) or "language and density: fine")
    return bool(breaches)


def source_files(folder: Path) -> list[Path]:
    """Return the Python and C++ files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".py", *CXX_SUFFIXES))


def file_breaches(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and description of every breach in a file."""
    check = cxx_breaches if path.suffix in CXX_SUFFIXES else python_breaches
    yield from check(path)


def cxx_breaches(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the breaches in the first line and in the comments of a C++ file."""
    lines = path.read_text().splitlines()
    first = lines[0].removeprefix("//").strip()
    if len(first.split()) < MIN_WORDS:
        yield 1, f"first line of {len(first.split())} words: {first!r}"
    if found := re.match(rf"({MODULE_OPENINGS})\b", first):
        yield 1, f"file opens with {found.group()!r}; begin with a noun phrase"
    for number, line in enumerate(lines, 1):
        for comment in CXX_COMMENT.findall(line):
            if found := UNCLEAR.search(comment):
                yield number, f"comment with {found.group()!r}; name the thing"


def python_breaches(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the breaches in the docstrings, comments and layout of a Python file."""
    source = path.read_text()
    tree = ast.parse(source)
    in_tests = "tests" in path.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstring_breaches(node, in_tests)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else []
            unpacked = isinstance(node.value, ast.Tuple)
            if unpacked and any(isinstance(target, ast.Attribute) for target in targets):
                yield (
                    node.lineno,
                    "several fields assigned in one statement; write one assignment a line",
                )
        elif isinstance(node, ast.Call) and not in_tests:
            name = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            count = sum(not isinstance(argument, ast.Starred) for argument in node.args)
            count -= name in ("partial", "submit")
            if name not in LISTING and count > POSITIONAL_ARGUMENTS:
                yield (
                    node.lineno,
                    f"{name} has {count} positional arguments; name those after the third",
                )
    tables = {line for node in ast.walk(tree) for line in table_lines(node)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        if "fmt: " in token.string and line not in tables:
            yield line, f"{token.string!r} beside code that is no table of literals"
        if found := UNCLEAR.search(token.string):
            yield line, f"comment with {found.group()!r}; name the thing"


def docstring_breaches(node: ast.AST, in_tests: bool) -> Iterator[tuple[int, str]]:
    """Yield the breaches of a docstring; names of test functions speak for themselves."""
    docstring = ast.get_docstring(node)  # type: ignore[arg-type]
    if docstring is None:
        return
    body = node.body[0]  # type: ignore[attr-defined]
    first, words = docstring.split("\n\n")[0], docstring.split()
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if len(words) < MIN_WORDS:
        yield body.lineno, f"docstring of {len(words)} words: {docstring!r}"
    openings = MODULE_OPENINGS if isinstance(node, ast.Module) else CLASS_OPENINGS
    if is_function and not is_property(node) and not in_tests:
        openings = FUNCTION_OPENINGS
    if found := re.match(rf"({openings})\b", first):
        expected = "an imperative verb" if openings is FUNCTION_OPENINGS else "a noun phrase"
        yield body.lineno, f"docstring opens with {found.group()!r}; begin with {expected}"
    if found := UNCLEAR.search(docstring):
        yield body.lineno, f"docstring with {found.group()!r}; name the thing"


def is_property(node: ast.AST) -> bool:
    """Whether a function is read as a value: a property, or a pytest fixture."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]  # type: ignore[attr-defined]
    return any("property" in decorator or "fixture" in decorator for decorator in decorators)


def table_lines(node: ast.AST) -> Iterator[int]:
    """Yield the last line of a statement, or of a decorator, that holds a table of literals."""
    if not isinstance(node, ast.stmt):
        return
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        for decorator in node.decorator_list:
            if "parametrize" in ast.unparse(decorator):
                yield decorator.end_lineno or 0
        return
    displays = (ast.Dict, ast.List, ast.Tuple, ast.Set)
    value = getattr(node, "value", None)
    if isinstance(value, displays) and len(list(ast.iter_child_nodes(value))) > MIN_TABLE_ROWS:
        yield node.end_lineno or 0


def headline_breaches() -> Iterator[str]:
    """Yield a line for each of the last twenty commits with a headline that is too long."""
    log = ["git", "log", "-20", "--no-merges", "--format=%h %s"]
    found = subprocess.run(
        log, capture_output=True, text=True, check=False
    )  # empty outside a repository
    for line in found.stdout.splitlines():
        commit, _, headline = line.partition(" ")
        if len(headline) > HEADLINE_CHARACTERS:
            length = f"{len(headline)} characters, at most {HEADLINE_CHARACTERS}"
            yield f"commit {commit}: headline of {length}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
