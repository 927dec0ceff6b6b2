"""Training text of nano: Python's standard library as one stream of tokens, and chat samples.

This module selects the files, holds some of them out, derives the chat samples, and cuts the tokens
into rows for each step. All of it is deterministic: the same Python version gives the same rows.

Not here: model (model.py), optimizer and loss (train.py).
"""

import ast
import hashlib
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

# Packages of other projects, code of tools rather than of the library, and tables without use.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "__pycache__", "idlelib", "turtledemo", "ensurepip", "encodings"}
)
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
HELD_OUT_PERCENT = 4
# A chat sample must fit into one training row together with its question.
MAX_CHAT_CHARACTERS = 1400


@dataclass(frozen=True)
class Document:
    """Source file; `path` is relative to the library's root, with forward slashes."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        """Whether the file belongs to a test suite."""
        return not TEST_FOLDERS.isdisjoint(self.path.split("/")[:-1])

    @property
    def is_held_out(self) -> bool:
        """Whether the file is held out: only a hash of its path decides.

        The split therefore stays the same for a new Python release.
        """
        return not self.is_test and int(_digest(self.path), 16) % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True)
class Corpus:
    """Disjoint groups of files: trained on, trained on with less weight, never trained on."""

    library: tuple[Document, ...]
    tests: tuple[Document, ...]
    held_out: tuple[Document, ...]


@dataclass(frozen=True)
class Tokens:
    """Corpus as token ids, uint16, with an end-of-text id after each text.

    ``library_lines`` is the library once more, with each line encoded by itself. In ``library``,
    ``"):"`` and the line break after it are one token, so that a prompt that ends in ``"):"`` would
    end where no training text continues.
    """

    library: np.ndarray
    library_lines: np.ndarray
    chat: np.ndarray
    tests: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int

    def sizes(self) -> dict[str, int]:
        """Return the number of tokens of each group, and the held-out text's size in bytes."""
        return {
            "library": len(self.library),
            "library_lines": len(self.library_lines),
            "chat": len(self.chat),
            "tests": len(self.tests),
            "held_out": len(self.held_out),
            "held_out_bytes": int(self.held_out_bytes),
        }

    def epoch(self, seed: int, context: int) -> np.ndarray:
        """Return the rows [N, context + 1] of one epoch, in an order drawn from the seed.

        An epoch is the library in both forms, the conversations and half of the tests. Each part is
        cut at a random offset of its own, so that the borders of rows differ from epoch to epoch.
        """
        generator = np.random.default_rng(seed)
        parts = (self.library, self.library_lines, self.chat, self.tests)
        rows = [_rows(part, int(generator.integers(context)), context) for part in parts]
        rows[-1] = generator.permutation(rows[-1])[::2]
        return generator.permutation(np.concatenate(rows))

    def held_out_rows(self, context: int) -> np.ndarray:
        """Return the rows [N, context + 1] of the held-out text, without the last, partial row."""
        return _rows(self.held_out, 0, context)


class Batches:
    """Batches by step, computed from the seed: resuming needs no state except the step."""

    def __init__(self, tokens: Tokens, seed: int, context: int, rows_per_batch: int):
        self._tokens = tokens
        self._seed = seed
        self._context = context
        self._rows_per_batch = rows_per_batch
        self._batches_per_epoch = len(tokens.epoch(seed, context)) // rows_per_batch
        self._epoch_rows: tuple[int, np.ndarray] | None = None

    def __getitem__(self, step: int) -> np.ndarray:
        """Return the token ids of a step, int32 [rows_per_batch, context + 1]."""
        # The random cut changes an epoch's length by a few rows; one batch less is safe for all
        # epochs.
        epoch, batch = divmod(step, self._batches_per_epoch - 1)
        if self._epoch_rows is None or self._epoch_rows[0] != epoch:
            self._epoch_rows = (epoch, self._tokens.epoch(self._seed + epoch, self._context))
        start = batch * self._rows_per_batch
        return self._epoch_rows[1][start : start + self._rows_per_batch].astype(np.int32)


def read_corpus(root: Path | None = None) -> Corpus:
    """Read the sources below `root`; the default is the library of the running Python."""
    documents = list(_documents(root or Path(sysconfig.get_path("stdlib"))))
    return Corpus(
        library=tuple(d for d in documents if not d.is_test and not d.is_held_out),
        tests=tuple(d for d in documents if d.is_test),
        held_out=tuple(d for d in documents if d.is_held_out),
    )


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
    """Encode each group; chat samples are made only from the library, never from held-out files."""
    return Tokens(
        library=_encode((d.text for d in corpus.library), tokenizer),
        library_lines=_encode_lines((d.text for d in corpus.library), tokenizer),
        chat=_encode(chat_samples(corpus.library), tokenizer),
        tests=_encode((d.text for d in corpus.tests), tokenizer),
        held_out=_encode((d.text for d in corpus.held_out), tokenizer),
        held_out_bytes=sum(len(d.text.encode()) for d in corpus.held_out),
    )


def held_out_rows(tokenizer: Tokenizer, context: int) -> np.ndarray:
    """Return the rows [N, context + 1] of the running Python's held-out text."""
    return _rows(_encode((d.text for d in read_corpus().held_out), tokenizer), 0, context)


def chat_samples(documents: tuple[Document, ...]) -> Iterator[str]:
    """Yield two conversations for each documented function that fits: writing and explaining it."""
    seen: set[str] = set()
    for document in documents:
        for node in ast.walk(_parse(document.text)):
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
                continue
            source = _function_source(document.text, node)
            if len(source) <= MAX_CHAT_CHARACTERS and source not in seen:
                seen.add(source)
                yield _writing_sample(node, source)
                yield _explaining_sample(node, source)


def chat_text(question: str, answer: str) -> str:
    """Return a question and its answer as the chat template renders them.

    The template is tokenizer.CHAT_TEMPLATE; a test compares the two.
    """
    return f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n{answer}{TURN_END}\n"


def _writing_sample(node: ast.FunctionDef, source: str) -> str:
    summary = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
    signature = f"{node.name}({ast.unparse(node.args)})"
    questions = (
        f"Write a Python function `{signature}`: {summary}",
        f"Write a Python function `{node.name}`. {summary}",
        f"Implement `{signature}` in Python.\n\n{summary}",
        f"Write a Python function. {summary}",
    )
    return chat_text(_choose(questions, source), f"```python\n{source}\n```")


def _explaining_sample(node: ast.FunctionDef, source: str) -> str:
    first, last = node.body[0], node.body[0].end_lineno - node.lineno
    lines = source.splitlines()
    # The docstring is the answer, so the question must not hold it. Decorators shift no line,
    # because
    # the source starts at `def`.
    code = "\n".join(lines[: first.lineno - node.lineno] + lines[last + 1 :]).rstrip()
    questions = (
        f"What does this function do?\n\n```python\n{code}\n```",
        f"Explain this Python function.\n\n```python\n{code}\n```",
        f"Write a docstring for this function.\n\n```python\n{code}\n```",
    )
    return chat_text(_choose(questions, source), ast.get_docstring(node))


def _function_source(text: str, node: ast.FunctionDef) -> str:
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    return textwrap.dedent("\n".join(lines))


def _documents(root: Path) -> Iterator[Document]:
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.isdisjoint(relative.parts):
            continue
        text = _python_text(path)
        if text is not None and _digest(text) not in seen:
            seen.add(_digest(text))
            yield Document(relative.as_posix(), text)


def _python_text(path: Path) -> str | None:
    """Return the file's text; None if it is not Python in UTF-8.

    The test suite holds files that are broken on purpose.
    """
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        _parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return None
    return text if text.strip() else None


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def _encode(texts: Iterator[str], tokenizer: Tokenizer) -> np.ndarray:
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [
        np.array([*encoding.ids, end], np.uint16)
        for encoding in tokenizer.encode_batch(list(texts))
    ]
    return np.concatenate(pieces)


def _encode_lines(texts: Iterator[str], tokenizer: Tokenizer) -> np.ndarray:
    """Encode each text line by line.

    A line break begins a piece, together with the indentation and the line after it.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces: list[np.ndarray] = []
    for text in texts:
        encodings = tokenizer.encode_batch(re.split(r"(?<!\n)(?=\n)", text))
        pieces.append(
            np.array([*(i for encoding in encodings for i in encoding.ids), end], np.uint16)
        )
    return np.concatenate(pieces)


def _rows(stream: np.ndarray, offset: int, context: int) -> np.ndarray:
    """Cut a stream into rows of context + 1 ids.

    Neighbouring rows share one id: it is a target in the first and an input in the second.
    """
    count = (len(stream) - offset - 1) // context
    starts = offset + context * np.arange(count)
    return stream[starts[:, None] + np.arange(context + 1)]


def _choose(options: tuple[str, ...], key: str) -> str:
    return options[int(_digest(key), 16) % len(options)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
