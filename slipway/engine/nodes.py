"""One engine over several processes: the first schedules, the others repeat its steps; decides what goes between them.

Every process holds its devices' part of the weights and of the cache, and must start the same programs in the same
order. The first one sends each step's bucket and arrays over ZeroMQ, as msgspec frames and raw numbers. Who dies is
found by jax.distributed's heartbeat, which ends all processes. The network between them must be trusted, as it must be
for jax.distributed itself.
"""

import logging
from typing import Any, Literal

import jax
import msgspec
import numpy as np
import zmq
from jax.experimental import multihost_utils

from slipway.engine import batch as batches
from slipway.engine.batch import Batch, Bucket, Repeat, Sampling, Sizes, Tokens
from slipway.engine.config import EngineConfig
from slipway.engine.edits import Edits
from slipway.engine.sample import Sampled
from slipway.engine.step import Step

logger = logging.getLogger(__name__)
HEARTBEAT_TIMEOUT_S = 5  # everyone has ended two seconds later


class Header(msgspec.Struct):
    """What comes before the arrays of a half of a step, or of several steps. ``bucket``: its place in the shapes."""

    what: Literal["forward", "choose", "repeat", "stop"]
    bucket: int = 0
    has_edits: bool = False
    num_steps: int = 1


def join(config: EngineConfig) -> None:
    """Meet the other processes; before anything else asks JAX for devices. Raises RuntimeError if they do not come."""
    if config.nnodes == 1 or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        config.dist_init_addr, config.nnodes, config.node_rank, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S
    )
    devices = jax.local_device_count(), jax.device_count()
    logger.info("process %d of %d, with %d devices of %d", config.node_rank, config.nnodes, *devices)


def least(value: int) -> int:
    """The smallest of all processes' values."""
    return value if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int64(value)).min())


class Leading:
    """A Step whose calls the other processes repeat."""

    def __init__(self, step: Step, shapes: list[Bucket], config: EngineConfig):
        self._step, self._numbers = step, {bucket: number for number, bucket in enumerate(shapes)}
        self._socket: zmq.Socket = zmq.Context.instance().socket(zmq.XPUB)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # never drop a step
        host = config.dist_init_addr.rpartition(":")[0]
        port: int = self._socket.bind_to_random_port(f"tcp://{host}")
        multihost_utils.broadcast_one_to_all(np.int32(port))
        for _ in range(config.nnodes - 1):
            self._socket.recv()  # a subscription

    def first_newest(self) -> jax.Array:
        """As Step's."""
        return self._step.first_newest()

    def empty_kv(self) -> jax.Array:
        """As Step's."""
        return self._step.empty_kv()

    def free_kv(self, kv: jax.Array) -> None:
        """As Step's."""
        self._step.free_kv(kv)

    @property
    def num_compiled(self) -> int:
        """As Step's."""
        return self._step.num_compiled

    @property
    def repeats(self) -> Repeat | None:
        """As Step's."""
        return self._step.repeats

    def no_edits(self, bucket: Bucket) -> Edits:
        """As Step's."""
        return self._step.no_edits(bucket)

    def forward(
        self, leaves: list[jax.Array], kv: jax.Array, newest: jax.Array, bucket: Bucket, tokens: Tokens
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As Step's, here and in all other processes."""
        self._send(Header("forward", self._numbers[bucket]), tokens)
        return self._step.forward(leaves, kv, newest, bucket, tokens)

    def choose(
        self, logits_BV: jax.Array, newest: jax.Array, bucket: Bucket, sampling: Sampling, edits: Edits | None
    ) -> tuple[Sampled, jax.Array]:
        """As Step's, here and in all other processes."""
        self._send(Header("choose", self._numbers[bucket], edits is not None), (sampling, edits))
        return self._step.choose(logits_BV, newest, bucket, sampling, edits)

    def repeat(
        self, leaves: list[jax.Array], kv: jax.Array, newest: jax.Array, batch: Batch, num_steps: int
    ) -> tuple[jax.Array, Sampled, jax.Array]:
        """As Step's, here and in all other processes."""
        assert self.repeats is not None
        self._send(Header("repeat", self._numbers[self.repeats.bucket], num_steps=num_steps), batch)
        return self._step.repeat(leaves, kv, newest, batch, num_steps)

    def _send(self, header: Header, arrays: Any) -> None:
        frames = [array.tobytes() for array in jax.tree.leaves(arrays)]
        self._socket.send_multipart([msgspec.msgpack.encode(header), *frames])

    def close(self) -> None:
        """Let the other processes go."""
        self._send(Header("stop"), ())
        self._socket.close(linger=1000)


def follow(
    step: Step, leaves: list[jax.Array], kv: jax.Array, shapes: list[Bucket], sizes: Sizes, config: EngineConfig
) -> None:
    """Repeat the first process's steps until it closes its engine."""
    socket: zmq.Socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.RCVHWM, 0)
    port = int(multihost_utils.broadcast_one_to_all(np.int32(0)))
    host = config.dist_init_addr.rpartition(":")[0]
    socket.connect(f"tcp://{host}:{port}")
    socket.subscribe(b"")
    newest: jax.Array = step.first_newest()
    logits: Any = None  # of the forward pass that came before
    while True:
        first, *frames = socket.recv_multipart()
        header = msgspec.msgpack.decode(first, type=Header)
        if header.what == "stop":
            socket.close()
            return
        bucket = shapes[header.bucket]
        batch = batches.join([batches.empty(bucket, sizes)] * config.data_parallel_size)
        if header.what == "forward":
            kv, _, logits = step.forward(leaves, kv, newest, bucket, _filled(batch.tokens, frames))
        elif header.what == "repeat":
            kv, _, newest = step.repeat(leaves, kv, newest, _filled(batch, frames), header.num_steps)
        else:
            edits = step.no_edits(bucket) if header.has_edits else None
            _, newest = step.choose(logits, newest, bucket, *_filled((batch.sampling, edits), frames))


def _filled(shapes: Any, frames: list[bytes]) -> Any:
    """The arrays of a message, shaped like ``shapes``."""
    templates, structure = jax.tree.flatten(shapes)
    pairs = zip(frames, templates, strict=True)
    arrays = [np.frombuffer(frame, like.dtype).reshape(like.shape) for frame, like in pairs]
    return jax.tree.unflatten(structure, arrays)
