"""Registration packages for vLLM and SGLang, written by `slipway adapt`.

The package registers the twin with transformers, and its architecture with the engine as a model of
the engine's own Transformers backend, which runs the twin's layers over paged attention. It is
written completely, after every check, or not at all. Contracts: vLLM 0.32
(docs/design/plugin_system, model_executor/models/registry.py), SGLang 0.5.23 (srt/plugins,
srt/models/registry.py).

Not here: the twin's file (twin.py), the check of its computation (check.py).
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from slipway.adapters import check, twin
from slipway.adapters.twin import Engine, Twin
from slipway.checkpoint import files, hub
from slipway.convert.writer import new_directory
from slipway.errors import CheckpointError, UnsupportedModel

GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
_REGISTRIES = {"vllm": "vllm", "sglang": "sglang.srt.models.registry"}
_ASK_TIMEOUT_S = 600
_EXTERNAL = "SGLANG_EXTERNAL_MODEL_PACKAGE"


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that was written.

    ``asked`` states whether the engine could be asked for its architectures.
    """

    directory: Path
    module: str
    architecture: str
    engine: Engine
    num_tensors: int
    asked: str

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that the engine needs."""
        return {_EXTERNAL: self.module} if self.engine == "sglang" else {}

    def summary(self) -> str:
        """Return a text for a terminal: what was found, and how to use the package."""
        serve = (
            "vllm serve"
            if self.engine == "vllm"
            else f"{_EXTERNAL}={self.module} sglang serve --model-path"
        )
        return (
            f"{self.directory}: {self.architecture} for {self.engine}; "
            f"{self.num_tensors} tensors, each with a parameter in the twin\n"
            f"{self.asked}\npip install --no-deps {self.directory}\n{serve} MODEL"
        )


def adapt(model: str, twin_file: str, engine: Engine, out_dir: Path) -> Package:
    """Write the package of ``model``, a directory or a hub id, for the torch twin in ``twin_file``.

    ``twin_file``: FILE or FILE:CLASS. Raises UnsupportedModel for an architecture that the
    installed engine or transformers already has, InvalidConfig for a file that is no twin,
    CheckpointError with every tensor, parameter and computation that does not fit.
    """
    checkpoint = files.open_checkpoint(hub.resolve(model))
    found = twin.load(twin_file, checkpoint.config)
    asked = _ask(engine, found.architecture)
    if problems := [*twin.mismatches(found, checkpoint, engine), *check.misfits(found, engine)]:
        raise CheckpointError(checkpoint.directory, problems)
    name = re.sub(r"[^a-z0-9]+", "_", found.config_class.model_type.lower()).strip("_")
    module = f"{name}_for_{engine}"
    try:
        with new_directory(out_dir, False):
            (out_dir / module).mkdir()
            for name, text in contents(found, engine, module).items():
                (out_dir / name).write_text(text)
    except OSError as error:
        raise CheckpointError(out_dir, [f"cannot be written: {error}"]) from error
    return Package(
        out_dir,
        module,
        found.architecture,
        engine=engine,
        num_tensors=len(checkpoint.tensors),
        asked=asked,
    )


def contents(found: Twin, engine: Engine, module: str) -> dict[str, str]:
    """Return names and texts of the files of the package."""
    config, base, model = (
        part.__name__ for part in (found.config_class, found.base_class, found.model_class)
    )
    words = {
        "module": module,
        "architecture": found.architecture,
        "engine": engine,
        "group": GROUPS[engine],
        "model_type": found.config_class.model_type,
        "project": module.replace("_", "-"),
        "config": config,
        "base": base,
        "model": model,
        "names": ", ".join(sorted({config, base, model})),
    }
    texts = {
        "pyproject.toml": _PROJECT.format(**words),
        f"{module}/__init__.py": (_INIT + (_IN_VLLM if engine == "vllm" else "")).format(**words),
        f"{module}/twin.py": found.path.read_text(),
    }
    return texts | (
        {f"{module}/model.py": _IN_SGLANG.format(**words)} if engine == "sglang" else {}
    )


def _ask(engine: Engine, architecture: str) -> str:
    """Ask the engine for its architectures.

    Return a sentence that states whether that was possible. Raises UnsupportedModel if the engine
    has this one. It is asked in a process of its own: importing an engine takes seconds, and may
    start what must not be started here.
    """
    if importlib.util.find_spec(engine) is None:
        return f"{engine} is not installed here: it is unknown whether it has {architecture}"
    code = (
        f"import json; from {_REGISTRIES[engine]} import ModelRegistry; "
        "print(json.dumps(sorted(ModelRegistry.get_supported_archs())))"
    )
    environment = {name: value for name, value in os.environ.items() if name != _EXTERNAL}
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_ASK_TIMEOUT_S,
            check=True,
        )
        known = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        return f"{engine} is installed here, but could not be asked for {architecture}: {error}"
    if architecture in known:
        expected = (
            f"an architecture that {engine} lacks; "
            f"the installed {engine} has this one and needs no package"
        )
        raise UnsupportedModel("architectures", architecture, expected)
    return f"{engine} is installed here, and lacks {architecture}"


_PROJECT = """\
[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"

[project]
name = "{project}"
version = "0.1.0"
description = "{architecture} in {engine}: its Transformers backend over the torch twin"
requires-python = ">=3.10"

[project.entry-points."{group}"]
{module} = "{module}:register"

[tool.setuptools]
packages = ["{module}"]
"""

_INIT = '''\
"""{architecture} in {engine}, written by `slipway adapt`."""


def register():
    """Register the twin with transformers; the engine may call this repeatedly in each process."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from {module}.twin import {names}

    AutoConfig.register("{model_type}", {config}, exist_ok=True)
    AutoModel.register({config}, {base}, exist_ok=True)
    AutoModelForCausalLM.register({config}, {model}, exist_ok=True)
'''

_IN_VLLM = """\
    from vllm import ModelRegistry

    # vLLM's own class, not a subclass: vLLM recognizes models of its Transformers backend by name.
    backend = "vllm.model_executor.models.transformers:TransformersForCausalLM"
    ModelRegistry.register_model("{architecture}", backend)
"""

_IN_SGLANG = '''\
"""Model class that SGLang loads from the package named by SGLANG_EXTERNAL_MODEL_PACKAGE."""

from sglang.srt.models.transformers import TransformersForCausalLM


class {architecture}(TransformersForCausalLM):
    """SGLang's Transformers backend, under the name in config.json."""


EntryClass = {architecture}
'''
