"""Execution of a plan: tensors read, checked and written by several threads.

In memory are at most the largest group of tensors that depend on each other, and one target for
each worker. Problems of values are collected; if there are any, nothing that was written stays.

Not here: the plan (plan.py), copies between views (transfer.py), output formats (writer.py,
archives.py, orbax.py).
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
from slipway.convert.moves import Move
from slipway.convert.plan import Plan
from slipway.convert.source import Source
from slipway.convert.writer import Pieces, Writer
from slipway.errors import CheckpointError

MAX_ITEMSIZE = 4  # bytes; pieces of wider items get memory of their own
DROP_BYTES = 1 << 25  # written between two drops of a source's pages
CONCURRENT_BYTES = 1 << 27  # of tensors that had to be read into memory, beyond the largest group
Arrays = Mapping[str, np.ndarray]
# Returns what to add, in float32, to a target's elements from the first number to the second.
Delta = Callable[[int, int], np.ndarray]


@dataclasses.dataclass
class Written:
    """Report on one target that was written."""

    name: str
    sources: tuple[str, ...]
    rule: str
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    # Largest error of the inverse conversion, in representable numbers.
    max_ulp: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Size of the target in bytes."""
        return Spec(np.dtype(self.dtype), self.shape).nbytes

    @property
    def lossless(self) -> bool:
        """Whether the inverse conversion gives the source bit for bit."""
        return not self.max_ulp and not self.notes


@dataclasses.dataclass(frozen=True)
class Options:
    """Dtypes of the targets, and changes to their numbers.

    ``deltas``: what is added to a target. ``tied``: pairs that must be equal, of which one is not
    written. ``replaced``: targets that get these numbers instead of the source's, before anything
    is added.
    """

    dtypes: Mapping[str, np.dtype]
    deltas: Mapping[str, Delta] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, tuple[Move, Move]] = dataclasses.field(default_factory=dict)
    replaced: Arrays = dataclasses.field(default_factory=dict)
    workers: int = 0  # 0: one for each core, at most 8


def execute(
    plan: Plan,
    source: Source,
    writer: Writer,
    options: Options,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Written]:
    """Write every target of ``plan`` that the writer does not hold yet.

    ``progress`` is called with the size in bytes of each target. Raises CheckpointError, listing
    every problem of values, after the writer has removed what was written.
    """
    run = _Run(plan, source, writer, options=options, progress=progress)
    try:
        run.all_jobs()
        run.problems += [
            p for name, pair in options.tied.items() if (p := untied(name, pair, source))
        ]
        if run.problems:
            raise CheckpointError(source.location, sorted(run.problems))
    except BaseException:  # an interruption, too, leaves nothing behind
        writer.abandon()
        raise
    return sorted(run.written, key=lambda w: w.name)


class _Run:
    """One execution: targets written and problems found so far."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        writer: Writer,
        options: Options,
        progress: Callable[[int], None],
    ):
        self.plan = plan
        self.source = source
        self.writer = writer
        self.options = options
        self.progress = progress
        self.written: list[Written] = []
        self.problems: list[str] = []
        self._local = threading.local()

    def all_jobs(self) -> None:
        """Write all targets that are not done, the largest group of tensors first."""
        done = self.writer.done()
        self.written += [Written(**facts) for facts in done.values()]
        self.progress(sum(written.nbytes for written in self.written))
        jobs = [
            (names, [t for t in targets if t not in done]) for names, targets in self.plan.jobs()
        ]
        jobs = sorted(
            ((n, t) for n, t in jobs if t),
            key=lambda job: -sum(self.plan.sources[n].nbytes for n in job[0]),
        )
        largest = max((self._memory(*job) for job in jobs), default=0)
        gate = MemoryGate(max(largest, CONCURRENT_BYTES))
        with ThreadPoolExecutor(self.options.workers or min(8, os.cpu_count() or 1)) as pool:
            ends: list[Future] = []
            for names, targets in jobs:
                size = self._memory(names, targets)
                gate.enter(size)
                ends += self._submit(pool, names, targets, then=functools.partial(gate.leave, size))
            try:
                for end in ends:
                    end.result()
            except BaseException:  # tasks that have not begun are cancelled
                pool.shutdown(cancel_futures=True)
                raise

    def _memory(self, names: list[str], targets: list[str]) -> int:
        """Return the bytes of a job that are held in memory.

        These are sources that are no views of files, and targets that must be assembled.
        """
        read = 0 if self.source.mapped else sum(self.plan.sources[name].nbytes for name in names)
        return read + sum(
            self.plan.targets[name].nbytes for name in targets if not self._leaves_in_pieces(name)
        )

    def _memory_of_thread(self) -> np.ndarray:
        """Return memory for the pieces of this thread's targets, reused for one after another."""
        if not vars(self._local):
            self._local.memory = on_a_page(transfer.PIECE_ELEMENTS * MAX_ITEMSIZE)
        return self._local.memory

    def _leaves_in_pieces(self, target: str) -> bool:
        moves = self.plan.moves[target]
        return len(moves) == 1 and moves[0].target.is_whole

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        names: list[str],
        targets: list[str],
        then: Callable[[], None],
    ) -> list[Future]:
        """Read the sources in this thread and submit one task per target.

        The workers write what was read before. The last target of the group releases the sources.
        """
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
        moves = self.plan.moves[target]
        spec = Spec(self.options.dtypes[target], self.plan.targets[target].shape)
        first = self.plan.sources[moves[0].source.name]
        names = tuple(dict.fromkeys(move.source.name for move in moves))
        written = Written(
            target,
            names,
            moves[0].rule.axes,
            shape=spec.shape,
            source_dtype=str(first.dtype),
            dtype=str(spec.dtype),
        )
        if self._leaves_in_pieces(target):
            parts = transfer.pieces(
                moves[0], arrays[moves[0].source.name], spec.dtype, memory=self._memory_of_thread()
            )
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
            self.problems.append(
                f"{target}: {faults.not_finite} values are not finite as {spec.dtype}"
            )
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
        """Yield a target that has several sources or padding in one piece, assembled in memory."""
        whole = transfer.assembled(moves, arrays, spec)
        for move in moves:
            self.source.drop(move.source.name)
        yield 0, whole.reshape(-1)


class MemoryGate:
    """Admission of tensors to memory up to a number of bytes.

    A tensor larger than that enters when no other is in memory.
    """

    def __init__(self, size_bytes: int):
        self._left = size_bytes
        self._size = size_bytes
        self._condition = threading.Condition()

    def enter(self, size: int) -> None:
        """Wait until ``size`` bytes are free, and take them."""
        with self._condition:
            self._condition.wait_for(lambda: self._left >= min(size, self._size))
            self._left -= size

    def leave(self, size: int) -> None:
        """Give ``size`` bytes back."""
        with self._condition:
            self._left += size
            self._condition.notify_all()


class _Watch:
    """Count of values that are not finite in the pieces that pass; it also drops source pages."""

    def __init__(self, source: Source, names: tuple[str, ...]):
        self.not_finite = 0
        self._source = source
        self._names = names

    def watched(self, parts: Pieces) -> Pieces:
        """Yield the same pieces."""
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
        changed = piece.astype(np.float32) + delta(first, first + piece.size)
        yield first, changed.astype(piece.dtype)


def unequal_copies(move: Move, array: np.ndarray) -> Iterator[str]:
    """Yield a problem if copies that the source holds along an axis differ."""
    if not move.copies:
        return
    whole = move.source.view(array, (*move.copies, *move.order))
    kept = whole[(slice(0, 1),) * len(move.copies)]
    if (differing := int(np.count_nonzero(whole != kept))) > 0:
        axes = " and ".join(move.copies)
        yield f"{move.source.name}: the copies along {axes} differ in {differing} numbers"


def _cut(move: Move, array: np.ndarray) -> Iterator[str]:
    """Yield a note if padding held numbers, which are not converted."""
    if move.source.data_size == array.size:
        return
    kept = np.count_nonzero(move.source.view(array, move.source.axes))
    if cut := int(np.count_nonzero(array)) - int(kept):
        yield f"{move.source.name}: {cut} numbers in its padding were not zero and are gone"


def _loss(move: Move, array: np.ndarray, dtype: np.dtype) -> int:
    """Return the largest error of the inverse conversion, in representable numbers."""
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
    """Describe the differences of two sources that must be equal; empty if there are none."""
    one, two = pair
    with source.open(one.source.name) as a, source.open(two.source.name) as b:
        if a.dtype != b.dtype:
            return (
                f"{one.source.name}: dtype {a.dtype}, "
                f"but {two.source.name}, to which it is tied, has {b.dtype}"
            )
        left, right = transfer.pieces(one, a, a.dtype), transfer.pieces(two, b, b.dtype)
        differing = sum(
            int(np.count_nonzero(x != y)) for (_, x), (_, y) in zip(left, right, strict=True)
        )
    if not differing:
        return ""
    return (
        f"{one.source.name}: {differing} numbers differ from {two.source.name}, "
        f"to which {name} is tied"
    )
