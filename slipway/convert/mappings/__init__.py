"""Table of built-in mappings, and mappings from a user's file.

Not here: trees with Hugging Face's names of undeclared architectures (conversion.py,
hf_classes.py).
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slipway.convert.mappings import flax, gemma, hf, maxtext, tunix
from slipway.convert.rules import TreeMapping, rules
from slipway.errors import InvalidConfig

BUILT_IN: Mapping[str, Sequence[TreeMapping]] = {
    "maxtext": maxtext.MAPPINGS,
    "maxtext-interleaved": maxtext.given("interleaved"),
    "maxtext-halves": maxtext.given("halves"),
    "tunix": (*tunix.MAPPINGS, *gemma.NNX),
    "nnx": (*flax.MAPPINGS, *gemma.NNX),
    "linen": (*flax.MAPPINGS, *gemma.LINEN),
    "hf": hf.DECODERS,
}
_TRIED = ("maxtext", "tunix", "nnx", "linen", "hf")  # if the user names no mapping
_FIELDS = (
    "sizes",
    "parts",
    "fields",
    "config",
    "tied",
    "jax_constants",
    "hf_constants",
    "required",
    "roots",
    "ignored",
    "absent",
)


def find(name: str | None, given: Mapping[str, Any]) -> list[TreeMapping]:
    """Return the mappings that ``name`` stands for, all built-in ones if it is None.

    Mappings of another model_type than ``given`` states are left out, unless none is left. Raises
    InvalidConfig for an unknown name or a file without a mapping.
    """
    if name is not None and name.endswith((".py", ".yaml", ".yml")):
        return [read_file(Path(name))]
    if name is not None and name not in BUILT_IN:
        raise InvalidConfig("mapping", name, f"{' | '.join(BUILT_IN)}, or a .py or .yaml file")
    groups = [BUILT_IN[name]] if name else [BUILT_IN[group] for group in _TRIED]
    found = list({mapping.name: mapping for group in groups for mapping in group}.values())
    if name in (None, "maxtext"):
        found = maxtext.chosen(found, given)
    if name in (None, "tunix"):
        found = tunix.noted(found, given)
    stated = given.get("model_type")
    return [
        mapping
        for mapping in found
        if stated is not None and mapping.config["model_type"] == stated
    ] or found


def read_file(path: Path) -> TreeMapping:
    """Return the mapping in a Python or YAML file.

    A Python file defines ``MAPPING``, a TreeMapping; docs/convert.md describes YAML files. Raises
    InvalidConfig for anything else.
    """
    if not path.is_file():
        raise InvalidConfig("mapping", str(path), "a file that exists")
    if path.suffix == ".py":
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        mapping = vars(module).get("MAPPING")
        if not isinstance(mapping, TreeMapping):
            raise InvalidConfig(
                "mapping", str(path), "a Python file that defines MAPPING, a slipway TreeMapping"
            )
    else:
        mapping = _from_yaml(path)
    try:
        for rule in mapping.rules:
            rule.sides(mapping.parts)
    except ValueError as error:
        raise InvalidConfig("mapping", str(path), f"rules that can be read: {error}") from error
    return mapping


def _from_yaml(path: Path) -> TreeMapping:
    import yaml  # only needed for such a file

    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InvalidConfig("mapping", str(path), f"YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("rules"), list):
        raise InvalidConfig("mapping", str(path), "a mapping with a list of rules")
    if unknown := sorted(content.keys() - {"rules", *_FIELDS}):
        raise InvalidConfig("mapping", f"{path}: {unknown[0]}", f"rules | {' | '.join(_FIELDS)}")
    for row in content["rules"]:
        is_list = isinstance(row, list) and len(row) in (3, 4)
        if not is_list or not all(isinstance(item, str) for item in row):
            expected = "[JAX name, HF key, pattern] or with a scale as a fourth"
            raise InvalidConfig("mapping", f"{path}: {row}", expected)
    extra = {field: content[field] for field in _FIELDS if field in content}
    for field in ("required", "roots", "ignored", "absent"):
        if field in extra:
            extra[field] = tuple(extra[field])
    return TreeMapping(name=path.stem, rules=rules(content["rules"]), **extra)
