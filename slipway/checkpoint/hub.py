"""Local directory of a model: a given directory, or the downloaded snapshot of a hub id.

huggingface_hub honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.

Not here: the contents of the directory (files.py).
"""

import os
from collections.abc import Sequence
from pathlib import Path

from slipway.errors import CheckpointError, InvalidConfig

# No code, no pickles.
WITHOUT_WEIGHTS = ("*.json", "*.jinja", "tokenizer.model", "*.txt", "*.tiktoken")
FOLDER = "additional_chat_templates"  # the only folder that is downloaded
ALLOW_PATTERNS = (*WITHOUT_WEIGHTS, "*.safetensors")


def resolve(
    model: str, revision: str | None = None, patterns: Sequence[str] = ALLOW_PATTERNS
) -> Path:
    """Return a local directory of that name, else the snapshot of a hub id (``org/name``).

    ``patterns``: the files that a download takes, of the repository's top level and the folder of
    chat templates.

    Raises InvalidConfig for an empty name or a revision of a local directory, CheckpointError for a
    name that is neither a directory nor a hub id, and for a download that fails.
    """
    if not model:
        raise InvalidConfig("model", model, "a directory or a hub id")
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        if revision is not None:
            raise InvalidConfig("revision", revision, f"none, since {model} is a local directory")
        return path
    if path.exists() or model.startswith(("/", "./", "../", "~")):
        raise CheckpointError(model, ["not a directory" if path.exists() else "no such directory"])
    return _download(model, revision, patterns)


def _download(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    # Imported here: huggingface_hub takes half a second, which a local directory need not wait for.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        directory = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=_folders_but(FOLDER),
        )
        return Path(directory)
    except (errors.HFValidationError, errors.HTTPError, OSError) as error:
        match error:
            case errors.HFValidationError():
                problem = f"neither a local directory nor a hub id: {_first_line(error)}"
            case errors.GatedRepoError():  # before RepositoryNotFoundError, its base
                problem = "a gated repository: accept its terms on the hub, then set HF_TOKEN"
            case errors.RepositoryNotFoundError():
                problem = (
                    "no such directory here and no such repository on the hub; "
                    "if it is private, set HF_TOKEN"
                )
            case errors.RevisionNotFoundError():
                problem = f"the repository has no revision {revision!r}"
            case errors.LocalEntryNotFoundError():
                problem = (
                    "not in the local cache, and the hub is out of reach "
                    "(HF_HUB_OFFLINE is set, or no network)"
                )
            case _:
                problem = f"the download failed: {type(error).__name__}: {_first_line(error)}"
        raise CheckpointError(model, [problem]) from error


def _folders_but(name: str) -> list[str]:
    """Return patterns of all files in folders, except the files directly in the folder ``name``.

    The patterns are of fnmatch, where * also matches slashes.
    """
    shorter = [f"{name[:size]}/*" for size in range(1, len(name))]
    other = [f"{name[:size]}[!{name[size]}/]*/*" for size in range(len(name))]
    return [*shorter, *other, f"{name}[!/]*/*", f"{name}/*/*"]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def cached() -> list[str]:
    """Return the ids of the models in the hub's local cache."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        repositories = huggingface_hub.scan_cache_dir().repos
    except errors.CacheNotFound:
        return []
    return sorted(
        repository.repo_id for repository in repositories if repository.repo_type == "model"
    )
