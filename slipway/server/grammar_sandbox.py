"""Child process that compiles a client's grammar first, so that a crash does not harm an engine.

llguidance bounds the time of compilation by its fuel, but recurses on the C stack. A thousand
rules, or references in a schema, each nested in the one before, crash the process that compiles
them.

Not here: grammars and their notation (codec/grammar.py), their use in an engine (engine/).
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
# A quarter of the stack of an engine's main thread: grammars that pass here fit there.
STACK_BYTES = 2 * 2**20
ADDRESS_SPACE_BYTES = 4 * 2**30
LINE_BYTES = 2**22
MAX_KNOWN_GRAMMARS = 1024


class GrammarSandbox:
    """Child process that compiles grammars one after another, with the model's vocabulary.

    All methods are called from one event loop.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._compiled: OrderedDict[str, None] = OrderedDict()  # grammars without a problem

    async def problem(self, grammar: str, vocab_size: int) -> str:
        """Return the problem of a grammar, worded as the expected value; empty if it compiles.

        Raises EngineDead if the child process cannot be started.
        """
        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
            return ""
        async with self._lock:
            problem = await self._check(grammar, vocab_size)
        if not problem:
            self._compiled[grammar] = None
        while len(self._compiled) > MAX_KNOWN_GRAMMARS:
            self._compiled.popitem(last=False)
        return problem

    def close(self) -> None:
        """End the child process."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._process = None

    async def _check(self, grammar: str, vocab_size: int) -> str:
        """Compile a grammar in the child process; return its problem, or an empty text."""
        if self._process is None:
            self._process = await self._start(vocab_size)
        process, answered = self._process, False
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            line = await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)
            answered = bool(line)
            if not answered:
                return "a grammar that is nested less deeply: compiling this one crashed"
            return json.loads(line)
        except TimeoutError:
            return f"a grammar that compiles within {TIMEOUT_S:.0f} s"
        finally:
            if not answered:  # crashed, too slow, or this task was cancelled
                self.close()

    async def _start(self, vocab_size: int) -> asyncio.subprocess.Process:
        """Return a child process that has read the vocabulary.

        Reading it does not count towards the time limit of the first grammar.
        """
        command = [sys.executable, "-P", "-m", "slipway.server.grammar_sandbox"]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, limit=LINE_BYTES
        )
        assert process.stdin is not None and process.stdout is not None
        vocabulary = [self._tokenizer.raw.to_str(), vocab_size]
        process.stdin.write(json.dumps(vocabulary).encode() + b"\n")
        started = False
        try:
            started = bool(await process.stdout.readline())
        finally:
            if not started and process.returncode is None:
                process.kill()
        if not started:
            raise EngineDead("the process that compiles grammars does not start")
        return process


def main() -> None:
    """Compile grammars from stdin in the child process, and print the problem of each.

    The first line is the vocabulary, each further one a grammar, all as JSON.
    """
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
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
