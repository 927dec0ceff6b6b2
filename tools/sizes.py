"""Check of lengths: lines a file and a function, and a docstring in every file.

Not here: language and density (plain.py).
"""

import ast
import sys
from pathlib import Path

FILE_LINES, FUNCTION_LINES = 500, 60
FOLDERS = ("slipway", "training", "tests", "tools", "benchmarks")


def main() -> int:
    """Print every breach; 1 if there is one."""
    breaches = []
    for path in sorted(path for folder in FOLDERS for path in Path(folder).rglob("*.py")):
        source = path.read_text()
        if (lines := source.count("\n")) > FILE_LINES:
            breaches.append(f"{path}: {lines} lines, at most {FILE_LINES}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.end_lineno - node.lineno + 1
                if body > FUNCTION_LINES:
                    breaches.append(
                        f"{path}:{node.lineno}: "
                        f"{node.name} has {body} lines, at most {FUNCTION_LINES}"
                    )
        if path.name != "__init__.py" and not ast.get_docstring(ast.parse(source)):
            breaches.append(f"{path}: no docstring")
    print("\n".join(breaches) or "file and function sizes: fine")
    return bool(breaches)


if __name__ == "__main__":
    sys.exit(main())
