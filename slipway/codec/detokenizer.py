"""Decides what text of one growing sequence may be released, and where a stop string ends it; knows no decoder.

The text stops where the first stop string is complete. Of several that end at the same character, the longest counts,
so the outcome depends on the text alone, never on how tokens cut it.
"""

from collections import deque
from collections.abc import Sequence

from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest


class Detokenizer:
    """Text of one sequence, released as early as it is certain.

    The pieces from `add` and `finish`, joined, equal `tokenizer.decode` of all ids, cut at the first stop string (which
    is kept with `include_stop`). Behind `prompt` they equal the decoding of both together without the prompt's text.
    Held back: an unfinished character, and the longest tail that a stop string might still claim. Text of the first
    `min_tokens` is no stop string's. Raises InvalidRequest for an empty stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        prompt: Sequence[int] = (),
    ):
        if isinstance(stop, str) or not all(stop):
            raise InvalidRequest("stop", stop, "a list of strings, none of them empty")
        self.stopped: str | None = None
        self._stream = tokenizer.stream(skip_special_tokens, prompt)
        self._stops = StopStrings(stop) if stop else None
        self._include_stop, self._num_exempt = include_stop, min_tokens
        self._state = 0
        self._held = ""
        self._released: list[str] = []
        self._num_taken = 0

    @property
    def text(self) -> str:
        """All the text released so far."""
        return "".join(self._released)

    def take(self) -> str:
        """The text released since the last call."""
        text = "".join(self._released[self._num_taken :])
        self._num_taken = len(self._released)
        return text

    def add(self, token_id: int) -> str:
        """Take one token and return the text to release, often ""; always "" once a stop string was found."""
        if self.stopped is not None:
            return ""
        text = self._stream.push(token_id)
        self._num_exempt -= 1
        if self._stops is not None and text and self._num_exempt < 0:
            text = self._scan(self._stops, text)
        if text:
            self._released.append(text)
        return text

    def finish(self) -> str:
        """End the sequence: return what was held back."""
        if self.stopped is not None:
            return ""
        text = self._stream.flush()
        if self._stops is not None and self._num_exempt < 0:
            text = self._scan(self._stops, text)
        if self.stopped is None:
            text, self._held = text + self._held, ""
        self._released.append(text)
        return text

    def _scan(self, stops: "StopStrings", new: str) -> str:
        text = self._held + new
        self._state, end = stops.advance(self._state, new)
        if end is None:
            certain = len(text) - stops.depth[self._state]
            self._held = text[certain:]
            return text[:certain]
        self.stopped = stop = stops.complete[self._state]
        self._held = ""
        end += len(text) - len(new)
        return text[:end] if self._include_stop else text[: end - len(stop)]


class StopStrings:
    """Aho-Corasick automaton (CACM 18:6, 1975): all stop strings in one pass, each character read once.

    A state is a prefix of some stop string: the longest one that ends the text read so far. `depth` is its length,
    which is just what must be held back; `complete` is the longest stop string that ends there, "" if none does.
    """

    def __init__(self, stop: Sequence[str]):
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [0]
        self.depth = [0]
        self.complete = [""]
        for text in stop:
            state = 0
            for char in text:
                state = self._next[state].get(char) or self._grow(state, char)
            self.complete[state] = text
        self._link()

    def advance(self, state: int, text: str) -> tuple[int, int | None]:
        """Read `text`: the state after it and None, or the state and the end within `text` of the first stop string."""
        if not state and self._next[0].keys().isdisjoint(text):  # most tokens, at a fifth of the cost
            return 0, None
        for end, char in enumerate(text, start=1):
            state = self._follow(state, char)
            if self.complete[state]:
                return state, end
        return state, None

    def _follow(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(char, 0)

    def _grow(self, state: int, char: str) -> int:
        new = self._next[state][char] = len(self._next)
        self._next.append({})
        self._shorter.append(0)
        self.depth.append(self.depth[state] + 1)
        self.complete.append("")
        return new

    def _link(self) -> None:
        """Point each state at the longest shorter prefix that ends the same text, nearest the root first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                queue.append(child)
                self._shorter[child] = self._follow(self._shorter[state], char)
                self.complete[child] = self.complete[child] or self.complete[self._shorter[child]]
