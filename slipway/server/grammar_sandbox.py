"""A process of its own in which a client's grammar is built before an engine is given it: its end harms nobody.

llguidance bounds the time that it takes by its fuel, but recurses on the C stack: a thousand rules, or references in a
schema, each in the one before, end the process that builds them.
"""

import asyncio
import json
import resource
import sys
from collections import OrderedDict

from llguidance import LLMatcher, LLTokenizer

from slipway.codec.tokenizer import Tokenizer
from slipway.errors import EngineDead

TIMEOUT_S = 5.0
STACK_BYTES = (
    2 * 2**20
)  # a quarter of what an engine's main thread has: what passes here has room there
MEMORY_BYTES = 4 * 2**30  # of addresses
LINE_BYTES = 2**22
KEPT = 1024  # grammars that are known to be fine


class GrammarSandbox:
    """Grammars are tried one after another, with the model's vocabulary. All methods are called from one event loop."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._fine: OrderedDict[str, None] = OrderedDict()

    async def problem(self, grammar: str, vocab_size: int) -> str:
        """Return why a grammar cannot be built within bounds, as what is expected instead; empty if it can."""
        if grammar in self._fine:
            self._fine.move_to_end(grammar)
            return ""
        async with self._lock:
            problem = await self._check(grammar, vocab_size)
        if not problem:
            self._fine[grammar] = None
        while len(self._fine) > KEPT:
            self._fine.popitem(last=False)
        return problem

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._process = None

    async def _check(self, grammar: str, vocab_size: int) -> str:
        """What is wrong with a grammar; empty if nothing is."""
        if self._process is None:
            self._process = await self._started(vocab_size)
        process, done = self._process, False
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            line = await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)
            done = bool(line)
            return (
                json.loads(line)
                if done
                else "a grammar that is nested less deeply: compiling this one crashed"
            )
        except TimeoutError:
            return f"a grammar that is built within {TIMEOUT_S:.0f} s"
        finally:
            if not done:  # ended, too slow, or nobody waits for its answer any more
                self.close()

    async def _started(self, vocab_size: int) -> asyncio.subprocess.Process:
        """A process that has read the vocabulary: that is not the first grammar's time."""
        command, pipe = (
            [sys.executable, "-m", "slipway.server.grammar_sandbox"],
            asyncio.subprocess.PIPE,
        )
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, limit=LINE_BYTES
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([self._tokenizer.raw.to_str(), vocab_size]).encode() + b"\n")
        started = False
        try:
            started = bool(await process.stdout.readline())
        finally:
            if not started and process.returncode is None:
                process.kill()
        if not started:
            raise EngineDead("the process that tries grammars does not start")
        return process


def main() -> None:
    """A vocabulary in the first line, then a grammar a line, as JSON; for each what is wrong with it."""
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer, vocab_size = json.loads(sys.stdin.readline())
    vocabulary = LLTokenizer(tokenizer, n_vocab=vocab_size)
    print(flush=True)
    for line in sys.stdin:
        matcher = LLMatcher(vocabulary, json.loads(line), log_level=0)
        problem = f"a grammar: {matcher.get_error()[:300]}" if matcher.is_error() else ""
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main()
