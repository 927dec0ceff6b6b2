"""One engine over several processes: the leader announces its calls, the followers repeat them.

Not here: the programs that are called (runner.py), the scheduling, which only the leader does
(engine/).

Every process holds the part of weights and caches that lies on its devices, and must start the same
programs in the same order. The leader sends each call over ZeroMQ: a msgspec header, then the raw
numbers of the inputs. The heartbeat of jax.distributed detects a process that died, and ends all
others. The network between the processes must be trusted, as jax.distributed requires.
"""

import logging
from typing import Any

import jax
import msgspec
import numpy as np
import zmq
from jax.experimental import multihost_utils

from slipway.runtime.runner import Runner

logger = logging.getLogger(__name__)
# After the death of one process, all others have ended two seconds later than this.
HEARTBEAT_TIMEOUT_S = 5


class Header(msgspec.Struct):
    """First frame of a message: the call of a program, or the end of all calls.

    ``key``: the repr of the program's key. ``given``: for each input whether its arrays follow; an
    input that does not follow is None.
    """

    program: str = ""
    key: str = ""
    given: list[bool] = []
    is_end: bool = False


def join(num_processes: int, rank: int, address: str) -> None:
    """Connect the processes; must be called before JAX is asked for devices.

    ``address``: host:port of process 0. Raises RuntimeError if another process does not connect.
    """
    if num_processes == 1 or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address, num_processes, rank, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S
    )
    devices = jax.local_device_count(), jax.device_count()
    logger.info("process %d of %d, with %d devices of %d", rank, num_processes, *devices)


def least(value: int) -> int:
    """Return the smallest of all processes' values."""
    return (
        value
        if jax.process_count() == 1
        else int(multihost_utils.process_allgather(np.int64(value)).min())
    )


class Leader:
    """Process 0 of an engine, which announces every call of its runner to the followers."""

    def __init__(self, runner: Runner, num_followers: int, address: str):
        self._socket: zmq.Socket = zmq.Context.instance().socket(zmq.XPUB)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # never drop a message
        port: int = self._socket.bind_to_random_port(f"tcp://{_host(address)}")
        multihost_utils.broadcast_one_to_all(np.int32(port))
        for _ in range(num_followers):
            self._socket.recv()  # the subscription of a follower
        runner.announce = self.announce

    def announce(self, program: str, key: Any, *inputs: Any) -> None:
        """Send the arguments of a ``Runner.call`` to the followers."""
        frames = [array.tobytes() for array in jax.tree.leaves(inputs)]
        self._send(Header(program, repr(key), [each is not None for each in inputs]), frames)

    def close(self) -> None:
        """Tell the followers that no more calls follow, and close the socket."""
        self._send(Header(is_end=True), [])
        self._socket.close(linger=1000)

    def _send(self, header: Header, frames: list[bytes]) -> None:
        self._socket.send_multipart([msgspec.msgpack.encode(header), *frames])


def follow(runner: Runner, address: str) -> None:
    """Repeat the calls of the leader until it closes."""
    socket: zmq.Socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.RCVHWM, 0)
    port = int(multihost_utils.broadcast_one_to_all(np.int32(0)))
    socket.connect(f"tcp://{_host(address)}:{port}")
    socket.subscribe(b"")
    keys = {(name, repr(key)): key for name, key in runner.compiled_keys}
    while True:
        first, *frames = socket.recv_multipart()
        header = msgspec.msgpack.decode(first, type=Header)
        if header.is_end:
            socket.close()
            return
        key = keys[header.program, header.key]
        shapes = runner.inputs(header.program, key)
        given = tuple(
            shape if is_given else None
            for shape, is_given in zip(shapes, header.given, strict=True)
        )
        runner.call(header.program, key, *_filled(given, frames))


def _filled(shapes: Any, frames: list[bytes]) -> Any:
    """Return the arrays of a message in the structure of ``shapes``."""
    templates, structure = jax.tree.flatten(shapes)
    pairs = zip(frames, templates, strict=True)
    arrays = [np.frombuffer(frame, like.dtype).reshape(like.shape) for frame, like in pairs]
    return jax.tree.unflatten(structure, arrays)


def _host(address: str) -> str:
    return address.rpartition(":")[0]
