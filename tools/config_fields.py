"""Generator of slipway/models/reference.json: fields of config.json that transformers reads.

The table is read off the source of the installed transformers: every ``config.X``,
``getattr(config, "X")`` and ``kwargs.pop("X")`` in the code that an architecture's class reaches,
its configuration class, the attention masks, the caches and the rope functions. A new architecture:
add it to slipway/models, then run this file.

Not here: what becomes of a field that is read and not implemented, or not read
(slipway/models/config.py).
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

TABLE = Path(__file__).resolve().parents[1] / "slipway" / "models" / "reference.json"
# Modules that are followed where a model imports from them; the others (output classes, logging,
# ...) read nothing.
SHARED = (
    "modeling_rope_utils",
    "masking_utils",
    "cache_utils",
    "modeling_utils",
    "configuration_utils",
)
SHARED_BELOW = (
    "models.",
    "integrations.sdpa_attention",
    "integrations.heterogeneity",
    "quantizers.auto",
)
RECEIVERS = {"config", "text_config", "decoder_config", "effective_config", "layer_config"}
ROPE_RECEIVERS = {"rope_parameters", "rope_parameters_dict"}
# Methods of configuration classes that read, write or check one and compute nothing with it.
PASSIVE = (
    "from_",
    "to_",
    "save_",
    "push_",
    "get_config",
    "_get_config",
    "validate_",
    "_validate_",
    "get_mtp_config",
)
MISSING = object()


class Module:
    """Syntax tree of one transformers module: definitions by name, origins of imported names."""

    def __init__(self, name: str):
        self.name = name
        self.module = importlib.import_module(name)
        tree = ast.parse(inspect.getsource(self.module))
        self.definitions: dict[str, ast.AST] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                source = importlib.util.resolve_name(
                    "." * node.level + (node.module or ""), _package(self.module)
                )
                self.imported |= {
                    (alias.asname or alias.name): (source, alias.name) for alias in node.names
                }
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.definitions |= {
                    target.id: node for target in targets if isinstance(target, ast.Name)
                }


class Reader:
    """A walk through all code that one architecture reaches, and the fields that it has read."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self._modules: dict[str, Module] = {}
        self._seen: set[tuple[str, str]] = set()

    def visit(self, module_name: str, name: str) -> None:
        """Collect the reads of a definition and of everything that it refers to."""
        if (module_name, name) in self._seen or not _is_followed(module_name):
            return
        self._seen.add((module_name, name))
        if module_name not in self._modules:
            self._modules[module_name] = Module(module_name)
        module = self._modules[module_name]
        if name in module.imported and name not in module.definitions:
            self.visit(*module.imported[name])
        if (node := module.definitions.get(name)) is None:
            return
        is_config = isinstance(node, ast.ClassDef) and name.endswith(("Config", "ConfigMixin"))
        for field, default in _reads(node, is_config):
            if self.fields.get(field, MISSING) in (MISSING, None):
                self.fields[field] = default
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name):
                self.visit(module_name, inner.id)


def _package(module: ModuleType) -> str:
    return module.__package__ or module.__name__


def _is_followed(name: str) -> bool:
    inside = name.removeprefix("transformers.")
    return name != inside and (inside in SHARED or inside.startswith(SHARED_BELOW))


def _reads(node: ast.AST, is_config: bool) -> Iterator[tuple[str, Any]]:
    """Yield (field, default where the code states one) for each read of a configuration."""
    inside = list(_active(node) if is_config else ast.walk(node))
    called = {id(inner.func) for inner in inside if isinstance(inner, ast.Call)}

    def is_receiver(value: ast.AST) -> bool:
        if isinstance(value, ast.Name):
            return value.id in RECEIVERS or (is_config and value.id == "self")
        if isinstance(value, ast.Call):
            return isinstance(value.func, ast.Attribute) and value.func.attr == "get_text_config"
        return isinstance(value, ast.Attribute) and value.attr == "config"

    for inner in inside:
        match inner:
            case ast.Attribute(value=value, attr=field, ctx=ast.Load()) if (
                is_receiver(value) and id(inner) not in called
            ):
                yield field, None
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr"),
                args=[value, ast.Constant(value=str(field)), *rest],
            ):
                if is_receiver(value):
                    yield field, _literal(rest)
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="kwargs"), attr="pop" | "get"),
                args=[ast.Constant(value=str(field)), *rest],
            ) if is_config:
                yield field, _literal(rest)


def _active(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below ``node`` without those of passive methods."""
    yield node
    for inner in ast.iter_child_nodes(node):
        if not (isinstance(inner, ast.FunctionDef) and inner.name.startswith(PASSIVE)):
            yield from _active(inner)


def _literal(nodes: list[ast.expr]) -> Any:
    return nodes[0].value if nodes and isinstance(nodes[0], ast.Constant) else None


def rope_members() -> dict[str, dict[str, Any]]:
    """Return the members of ``rope_parameters`` that each rope type reads, with defaults."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found: dict[str, dict[str, Any]] = {
        "default": {"rope_theta": None}
    }  # a method of each model, not in this table
    for rope_type, function in ROPE_INIT_FUNCTIONS.items():
        members = found.setdefault(rope_type, {})
        for node in ast.walk(ast.parse(inspect.getsource(function))):
            match node:
                case ast.Subscript(value=receiver, slice=ast.Constant(value=str(member))) if (
                    _is_rope(receiver)
                ):
                    members.setdefault(member, None)
                case ast.Call(
                    func=ast.Attribute(value=receiver, attr="get"),
                    args=[ast.Constant(value=str(member)), *rest],
                ) if _is_rope(receiver):
                    members[member] = _literal(rest)
    return found


def _is_rope(node: ast.AST) -> bool:
    name = (
        node.id
        if isinstance(node, ast.Name)
        else node.attr
        if isinstance(node, ast.Attribute)
        else ""
    )
    return name in ROPE_RECEIVERS


def architecture(name: str) -> dict[str, dict[str, Any]]:
    """Return the fields that the class declares and those that any code reads, with defaults."""
    import transformers

    model = getattr(transformers, name)
    config = model.config_class
    declared = {}
    for field in dataclasses.fields(config):
        declared[field.name] = None if field.default is dataclasses.MISSING else field.default
    reader = Reader()
    for cls in (model, config):
        reader.visit(cls.__module__, cls.__name__)
    kept = {}
    for field, default in reader.fields.items():
        of_class = getattr(config, field, default)
        settable = not callable(of_class) and (
            not isinstance(of_class, property) or of_class.fset is not None
        )
        if settable and not field.startswith("_") and not field.isupper():
            is_plain = of_class is None or isinstance(of_class, bool | int | float | str)
            kept[field] = declared.get(field, of_class if is_plain else default)
    return {"declared": dict(sorted(declared.items())), "read": dict(sorted(kept.items()))}


def table() -> dict[str, Any]:
    """Return the content of reference.json for the installed transformers."""
    import transformers
    from transformers import GenerationConfig

    from slipway.models import ARCHITECTURES

    return {
        "transformers": transformers.__version__,
        "generation": sorted(GenerationConfig._get_default_generation_params()),
        "rope": rope_members(),
        "architectures": {
            name: architecture(name) for name in ARCHITECTURES if hasattr(transformers, name)
        },
    }


def main() -> int:
    """Write the table."""
    TABLE.write_text(json.dumps(table(), indent=1, sort_keys=True) + "\n")
    print(TABLE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
