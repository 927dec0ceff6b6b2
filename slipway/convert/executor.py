"""Decides in which order a plan's tensors are read, checked and written, and by how many threads; knows no formats.

At most the largest group of tensors that depend on each other is in memory, and one target for each worker. What is
wrong with values is collected; then nothing that was written stays.
"""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from slipway.checkpoint.copying import on_a_page
from slipway.checkpoint.shards import Spec
from slipway.convert import transfer
from slipway.convert.plan import Move, Plan
from slipway.convert.source import Source
from slipway.convert.writer import Pieces, Writer
from slipway.errors import CheckpointError

MAX_ITEMSIZE = 4  # bytes; pieces of wider items get memory of their own
DROP_BYTES = 1 << 25  # between two times that a source's pages are given back
CONCURRENT_BYTES = 1 << 27  # of tensors that had to be read into memory, beyond the largest group
Arrays = Mapping[str, np.ndarray]
Delta = Callable[[int, int], np.ndarray]  # what to add, in float32, to the elements from .. to of a target


@dataclasses.dataclass
class Written:
    """What happened to one target."""

    name: str
    sources: tuple[str, ...]
    rule: str
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    max_ulp: int = 0  # the way back misses the source by at most so many representable numbers
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """The target's size."""
        return Spec(np.dtype(self.dtype), self.shape).nbytes

    @property
    def lossless(self) -> bool:
        """Whether the way back gives the source bit for bit."""
        return not self.max_ulp and not self.notes


@dataclasses.dataclass(frozen=True)
class Options:
    """How to write: each target's dtype, what is added to it, and what must be equal instead of being written.

    ``replaced``: targets whose numbers are not the source's but these, before anything is added.
    """

    dtypes: Mapping[str, np.dtype]
    deltas: Mapping[str, Delta] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, tuple[Move, Move]] = dataclasses.field(default_factory=dict)
    replaced: Arrays = dataclasses.field(default_factory=dict)
    workers: int = 0  # 0: one for each core, at most 8


def execute(
    plan: Plan, source: Source, writer: Writer, options: Options, progress: Callable[[int], None] = lambda count: None
) -> list[Written]:
    """Write every target of ``plan`` that the writer does not hold yet; ``progress`` is told the bytes of each.

    Raises CheckpointError, listing every value problem, after the writer has given up what was written.
    """
    run = _Run(plan, source, writer, options, progress)
    try:
        run.all_jobs()
        run.problems += [p for name, pair in options.tied.items() if (p := untied(name, pair, source))]
        if run.problems:
            raise CheckpointError(source.location, sorted(run.problems))
    except BaseException:  # an interruption, too, leaves nothing behind
        writer.abandon()
        raise
    return sorted(run.written, key=lambda w: w.name)


class _Run:
    """One execution: what was written and what was found so far."""

    def __init__(self, plan: Plan, source: Source, writer: Writer, options: Options, progress: Callable[[int], None]):
        self.plan, self.source, self.writer, self.options, self.progress = plan, source, writer, options, progress
        self.written: list[Written] = []
        self.problems: list[str] = []
        self._local = threading.local()

    def all_jobs(self) -> None:
        done = self.writer.done()
        self.written += [Written(**facts) for facts in done.values()]
        self.progress(sum(written.nbytes for written in self.written))
        jobs = [(names, [t for t in targets if t not in done]) for names, targets in self.plan.jobs()]
        jobs = sorted(((n, t) for n, t in jobs if t), key=lambda job: -sum(self.plan.sources[n].nbytes for n in job[0]))
        largest = max((self._memory(*job) for job in jobs), default=0)
        gate = MemoryGate(max(largest, CONCURRENT_BYTES))
        with ThreadPoolExecutor(self.options.workers or min(8, os.cpu_count() or 1)) as pool:
            ends: list[Future] = []
            for names, targets in jobs:
                size = self._memory(names, targets)
                gate.enter(size)
                ends += self._submit(pool, names, targets, functools.partial(gate.leave, size))
            try:
                for end in ends:
                    end.result()
            except BaseException:  # what has not begun never will
                pool.shutdown(cancel_futures=True)
                raise

    def _memory(self, names: list[str], targets: list[str]) -> int:
        """What a job holds in memory: sources that are no views of files, targets that have to be put together."""
        read = 0 if self.source.mapped else sum(self.plan.sources[name].nbytes for name in names)
        return read + sum(self.plan.targets[name].nbytes for name in targets if not self._leaves_in_pieces(name))

    def _memory_of_thread(self) -> np.ndarray:
        """Bytes for the pieces of one thread's targets, one after another."""
        if not vars(self._local):
            self._local.memory = on_a_page(transfer.PIECE_ELEMENTS * MAX_ITEMSIZE)
        return self._local.memory

    def _leaves_in_pieces(self, target: str) -> bool:
        moves = self.plan.moves[target]
        return len(moves) == 1 and moves[0].target.is_whole

    def _submit(
        self, pool: ThreadPoolExecutor, names: list[str], targets: list[str], then: Callable[[], None]
    ) -> list[Future]:
        """Read the sources here, so that the workers write what was read before; the last target lets go of them."""
        stack, left, lock = contextlib.ExitStack(), len(targets), threading.Lock()
        try:
            arrays = {name: stack.enter_context(self.source.open(name)) for name in names}
        except CheckpointError as error:
            self.problems += error.problems
            stack.close()
            then()
            return []

        def work(target: str) -> None:
            nonlocal left
            try:
                self._write(target, arrays)
            finally:
                with lock:
                    left -= 1
                    last = not left
                if last:
                    stack.close()
                    then()

        return [pool.submit(work, target) for target in targets]

    def _write(self, target: str, arrays: Arrays) -> None:
        moves, spec = self.plan.moves[target], Spec(self.options.dtypes[target], self.plan.targets[target].shape)
        first = self.plan.sources[moves[0].source.name]
        names = tuple(dict.fromkeys(move.source.name for move in moves))
        written = Written(target, names, moves[0].rule.axes, spec.shape, str(first.dtype), str(spec.dtype))
        if self._leaves_in_pieces(target):
            parts = transfer.pieces(moves[0], arrays[moves[0].source.name], spec.dtype, self._memory_of_thread())
        else:
            parts = self._assembled(moves, arrays, spec)
        changed = target in self.options.replaced or target in self.options.deltas
        if target in self.options.replaced:
            parts = iter([(0, self.options.replaced[target].reshape(-1).astype(spec.dtype))])
            written.notes.append("an adapter's tensor is in its place")
        if target in self.options.deltas:
            parts = _added(parts, self.options.deltas[target])
            written.notes.append("an adapter was added")
        faults = _Watch(self.source, names)
        self.writer.write(target, faults.watched(parts))
        if faults.not_finite:
            self.problems.append(f"{target}: {faults.not_finite} values are not finite as {spec.dtype}")
        for move in moves:
            array = arrays[move.source.name]
            self.problems += unequal_copies(move, array)
            written.notes += _cut(move, array)
            if (move.factor != 1.0 or spec.dtype != array.dtype) and not changed:
                written.max_ulp = max(written.max_ulp, _loss(move, array, spec.dtype))
        self.written.append(written)
        self.writer.mark(target, dataclasses.asdict(written))
        self.progress(spec.nbytes)

    def _assembled(self, moves: tuple[Move, ...], arrays: Arrays, spec: Spec) -> Pieces:
        """A target made of several sources, or with padding: put together in memory, and given away in one piece."""
        whole = transfer.assembled(moves, arrays, spec)
        for move in moves:
            self.source.drop(move.source.name)
        yield 0, whole.reshape(-1)


class MemoryGate:
    """Lets tensors into memory while a number of bytes is not exceeded."""

    def __init__(self, size_bytes: int):
        self._left, self._size, self._condition = size_bytes, size_bytes, threading.Condition()

    def enter(self, size: int) -> None:
        """Wait for room."""
        with self._condition:
            self._condition.wait_for(lambda: self._left >= min(size, self._size))
            self._left -= size

    def leave(self, size: int) -> None:
        """Give the room back."""
        with self._condition:
            self._left += size
            self._condition.notify_all()


class _Watch:
    """Counts what should not be in the pieces that pass by, and lets go of the pages that were read for them."""

    def __init__(self, source: Source, names: tuple[str, ...]):
        self.not_finite, self._source, self._names = 0, source, names

    def watched(self, parts: Pieces) -> Pieces:
        """The same pieces."""
        passed = 0
        for first, piece in parts:
            self.not_finite += transfer.not_finite(piece)
            yield first, piece
            passed += piece.nbytes
            if passed > DROP_BYTES:
                for name in self._names:
                    self._source.drop(name)
                passed = 0


def _added(parts: Pieces, delta: Delta) -> Pieces:
    for first, piece in parts:
        yield first, (piece.astype(np.float32) + delta(first, first + piece.size)).astype(piece.dtype)


def unequal_copies(move: Move, array: np.ndarray) -> Iterator[str]:
    """Copies that the source holds along an axis and that differ."""
    if not move.copies:
        return
    whole = move.source.view(array, (*move.copies, *move.order))
    kept = whole[(slice(0, 1),) * len(move.copies)]
    if (differing := int(np.count_nonzero(whole != kept))) > 0:
        yield f"{move.source.name}: the copies along {' and '.join(move.copies)} differ in {differing} numbers"


def _cut(move: Move, array: np.ndarray) -> Iterator[str]:
    """What padding held that is not carried over."""
    if move.source.data_size == array.size:
        return
    cut = int(np.count_nonzero(array)) - int(np.count_nonzero(move.source.view(array, move.source.axes)))
    if cut:
        yield f"{move.source.name}: {cut} numbers in its padding were not zero and are gone"


def _loss(move: Move, array: np.ndarray, dtype: np.dtype) -> int:
    """By how many representable numbers the way back misses the source, at most."""
    worst = 0
    exact = dataclasses.replace(move, factor=1.0)
    forth, same = transfer.pieces(move, array, dtype), transfer.pieces(exact, array, array.dtype)
    for (_, piece), (_, source) in zip(forth, same):
        back = np.empty(piece.shape, source.dtype)
        transfer.fill(back, piece, 1 / move.factor)
        if transfer.is_float(source.dtype):
            worst = max(worst, transfer.max_ulp(back, source))
        else:
            worst = max(worst, int((back != source).any()))
    return worst


def untied(name: str, pair: tuple[Move, Move], source: Source) -> str:
    """What two sources that must repeat each other differ in; empty if nothing."""
    one, two = pair
    with source.open(one.source.name) as a, source.open(two.source.name) as b:
        if a.dtype != b.dtype:
            return f"{one.source.name}: dtype {a.dtype}, but {two.source.name}, to which it is tied, {b.dtype}"
        left, right = transfer.pieces(one, a, a.dtype), transfer.pieces(two, b, b.dtype)
        differing = sum(int(np.count_nonzero(x != y)) for (_, x), (_, y) in zip(left, right, strict=True))
    return (
        f"{one.source.name}: {differing} numbers differ from {two.source.name}, to which {name} is tied"
        if differing
        else ""
    )
