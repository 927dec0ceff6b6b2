"""Streamed text of one sequence, ended by stop strings.

The text ends where the first stop string is complete. If several stop strings end at the same
character, the longest one counts. The result therefore depends only on the text, not on the tokens
that it is cut into.

Not here: the text of tokens (token_text.py).
"""

from collections import deque
from collections.abc import Sequence

from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest


class Detokenizer:
    """Text of one sequence, released as soon as no later token can change it.

    The results of `add` and `finish`, joined, equal `tokenizer.decode` of all ids, cut at the first
    stop string; `include_stop` keeps the stop string itself. After a `prompt` they equal the
    decoding of prompt and ids together, without the prompt's text. An unfinished character is held
    back, and so is the longest end of the text that may be the beginning of a stop string. Stop
    strings are not searched in the text of the first `min_tokens` tokens.

    `stopped` is the stop string that ended the text, or None. Raises InvalidRequest for an empty
    stop string.
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
        self._include_stop = include_stop
        self._num_exempt = min_tokens
        self._state = 0
        self._held = ""
        self._released: list[str] = []
        self._num_taken = 0

    @property
    def text(self) -> str:
        """Text released so far."""
        return "".join(self._released)

    def take(self) -> str:
        """Return the text released since the last call."""
        text = "".join(self._released[self._num_taken :])
        self._num_taken = len(self._released)
        return text

    def add(self, token_id: int) -> str:
        """Add one token; return the text to release, always "" after a stop string."""
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
        """End the sequence; return the text that was held back."""
        if self.stopped is not None:
            return ""
        text = self._stream.flush()
        if self._stops is not None and self._num_exempt < 0:
            text = self._scan(self._stops, text)
        if self.stopped is None:
            text = text + self._held
            self._held = ""
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
    """Aho-Corasick automaton (CACM 18:6, 1975) of all stop strings; reads each character once.

    A state stands for the longest prefix of a stop string with which the text read so far ends.
    `depth` is the length of that prefix, and so the number of characters to hold back. `complete`
    is the longest stop string with which the text ends, or "".
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
        """Read `text`; return the new state and the end of the first stop string, if any."""
        if not state and self._next[0].keys().isdisjoint(text):  # most tokens; costs a fifth
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
        """Set each state's `_shorter`: the longest shorter prefix with which the same text ends.

        States are visited in the order of their depth.
        """
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                queue.append(child)
                self._shorter[child] = self._follow(self._shorter[state], char)
                self.complete[child] = self.complete[child] or self.complete[self._shorter[child]]
