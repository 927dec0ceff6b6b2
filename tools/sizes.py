"""Check of lengths: lines of a file and of a Python function, and a description in every file.

Not here: language and density (plain.py).
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES, FUNCTION_LINES = 500, 60
FOLDERS = ("slipway", "training", "tests", "tools", "benchmarks", "csrc")
CXX_SUFFIXES = (".h", ".cc")


def main() -> int:
    """Print every breach; 1 if there is one."""
    paths = sorted(
        path
        for folder in FOLDERS
        for path in Path(folder).rglob("*")
        if path.suffix in (".py", *CXX_SUFFIXES)
    )
    breaches = [breach for path in paths for breach in file_breaches(path)]
    print("\n".join(breaches) or "file and function sizes: fine")
    return bool(breaches)


def file_breaches(path: Path) -> Iterator[str]:
    """Yield a line for each breach in a file."""
    source = path.read_text()
    if (lines := source.count("\n")) > FILE_LINES:
        yield f"{path}: {lines} lines, at most {FILE_LINES}"
    if path.suffix in CXX_SUFFIXES:
        if not source.startswith("// "):
            yield f"{path}: the first line is no comment"
        return
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.end_lineno - node.lineno + 1
            if body > FUNCTION_LINES:
                yield (
                    f"{path}:{node.lineno}: {node.name} has {body} lines, at most {FUNCTION_LINES}"
                )
    if path.name != "__init__.py" and not ast.get_docstring(tree):
        yield f"{path}: no docstring"


if __name__ == "__main__":
    sys.exit(main())
