"""Compiled programs of one model on one mesh, and the device arrays that they pass to each other.

Not here: the programs of a language model (engine/programs.py), other processes (multihost.py).
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slipway import mesh as meshes
from slipway import ops
from slipway.ops import backend
from slipway.runtime.populating import Populating

logger = logging.getLogger(__name__)
COMPILING_THREADS = 2

# Value that the shapes of a program depend on, such as a bucket or a number of rows; hashable.
Key = Any
# Function from a key to the shapes of one name of device state: a pytree of ShapeDtypeStructs with
# shardings.
Shapes = Callable[[Key], Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computation that is compiled once for each key, before it is first called.

    ``body`` is traced under shard_map. It gets the device state named in ``reads``, then the
    inputs; it returns the new values of the device state named in ``writes``, then its results.
    ``donates``: the names among ``reads`` of arrays that the call consumes. ``inputs(key)`` makes
    neutral host arrays for all copies of the weights, which follow each other along the first axis.
    ``results``: the PartitionSpecs of the results.
    """

    name: str
    body: Callable[..., tuple[Any, ...]]
    inputs: Callable[[Key], tuple[Any, ...]]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    donates: tuple[str, ...] = ()
    results: tuple[P, ...] = ()


class Runner:
    """Compiled programs of a model, and its device state by name.

    Only programs and keys that were compiled can be called, so nothing compiles during a call.
    ``bodies``: for each op that was traced, the body that computes it. ``announce``: if set, it is
    called with the arguments of every ``call``, before the program starts (multihost.py).
    """

    def __init__(self, mesh: Mesh, shapes: Mapping[str, Shapes], programs: Sequence[Program]):
        self.mesh = mesh
        self.state: dict[str, Any] = {}
        self.bodies: dict[str, str] = {}
        self.announce: Callable[..., None] | None = None
        self._shapes = dict(shapes)
        self._programs = {program.name: program for program in programs}
        self._by_rows = NamedSharding(mesh, P(meshes.DATA))
        self._compiled: dict[tuple[str, Key], Any] = {}
        # Neutral inputs that lie on the devices.
        self._neutral: dict[tuple[str, Key], tuple[Any, ...]] = {}
        self._populating: dict[str, list[Populating]] = {}
        self._options = _compiler_options(mesh)

    @property
    def num_compiled(self) -> int:
        """Number of programs compiled so far; each key counts."""
        return len(self._compiled)

    @property
    def compiled_keys(self) -> list[tuple[str, Key]]:
        """Name and key of every compiled program."""
        return list(self._compiled)

    def inputs(self, name: str, key: Key) -> tuple[Any, ...]:
        """Make neutral host arrays for a call, which the caller may fill in."""
        return self._programs[name].inputs(key)

    def call(self, name: str, key: Key, *inputs: Any) -> tuple[Any, ...]:
        """Start a program and return its results; does not wait for the device.

        An input of None stands for the neutral one, which lies on the devices already.
        """
        if self.announce is not None:
            self.announce(name, key, *inputs)
        program = self._programs[name]
        given = [
            self._neutral_inputs(name, key)[i] if x is None else x for i, x in enumerate(inputs)
        ]
        outputs = self._compiled[name, key](*(self.state[read] for read in program.reads), *given)
        count = len(program.writes)
        self.state.update(zip(program.writes, outputs[:count]))
        return outputs[count:]

    def compile(self, wanted: Sequence[tuple[str, Key]]) -> None:
        """Compile the wanted (program, key) pairs that are missing, several at a time.

        Logs the number of programs left and the seconds that they will take.
        """
        missing = [each for each in dict.fromkeys(wanted) if each not in self._compiled]
        started = time.perf_counter()
        with ThreadPoolExecutor(COMPILING_THREADS) as pool:
            futures = {each: pool.submit(self.compiled, *each) for each in missing}
            for count, _ in enumerate(as_completed(futures.values()), 1):
                left = len(missing) - count
                left_s = (time.perf_counter() - started) / count * left
                logger.info("compiled %d programs, %d left: about %.1f s", count, left, left_s)
        self._compiled |= {each: future.result() for each, future in futures.items()}

    def compiled(self, name: str, key: Key) -> Any:
        """Compile one program for one key and return it, a ``jax.stages.Compiled``; not kept."""
        program = self._programs[name]
        shapes = [self._shapes[read](key) for read in program.reads]
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.inputs(key))
        specs = [jax.tree.map(lambda shape: shape.sharding.spec, shape) for shape in shapes]
        written = (
            jax.tree.map(lambda shape: shape.sharding.spec, self._shapes[name](key))
            for name in program.writes
        )
        mapped = jax.shard_map(
            program.body,
            mesh=self.mesh,
            in_specs=(*specs, *(P(meshes.DATA) for _ in inputs)),
            out_specs=(*written, *program.results),
            check_vma=False,
        )
        donated = [i for i, read in enumerate(program.reads) if read in program.donates]
        shardings = (*(None for _ in shapes), *(self._by_rows for _ in inputs))
        jitted = jax.jit(mapped, donate_argnums=donated, in_shardings=shardings)
        platform = self.mesh.devices.flat[0].platform
        # Pallas reads the kind of the TPU from the mesh that is set.
        with jax.set_mesh(self.mesh), backend.recording(platform) as bodies:
            lowered = jitted.lower(*shapes, *inputs)
        for op, body in bodies.items():  # one by one: other threads add theirs meanwhile
            self.bodies.setdefault(op, body)
        return lowered.compile(self._options)

    def temp_bytes(self) -> int:
        """Return the most bytes that a compiled program needs on a device beside its inputs.

        That is its temporaries and its outputs, without those that reuse the memory of inputs.
        """
        found = [compiled.memory_analysis() for compiled in self._compiled.values()]
        fresh = max(each.output_size_in_bytes - each.alias_size_in_bytes for each in found)
        return max(each.temp_size_in_bytes for each in found) + fresh

    def allocate(self, name: str) -> None:
        """Make device state of zeros; its shapes must not depend on the key."""
        shapes = self._shapes[name](None)
        specs = jax.tree.map(lambda shape: shape.sharding.spec, shapes)

        def zeros() -> Any:
            return jax.tree.map(
                lambda s: ops.zeros(s.sharding.shard_shape(s.shape), s.dtype), shapes
            )

        mapped = jax.shard_map(zeros, mesh=self.mesh, in_specs=(), out_specs=specs, check_vma=False)
        made = jax.jit(mapped)()
        self.state[name] = made
        if backend.of(self.mesh.devices.flat[0].platform).uses_host_memory:
            self._populating[name] = [Populating(array) for array in jax.tree.leaves(made)]

    def free(self, name: str) -> None:
        """Free the memory of device state that ``allocate`` made, if there is any."""
        for populating in self._populating.pop(name, []):
            populating.end()
        for array in jax.tree.leaves(self.state.pop(name, ())):
            array.delete()

    def _neutral_inputs(self, name: str, key: Key) -> tuple[Any, ...]:
        if (name, key) not in self._neutral:
            self._neutral[name, key] = jax.tree.map(self._put, self.inputs(name, key))
        return self._neutral[name, key]

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._by_rows, lambda index: array[index])


@functools.cache
def _compiler_options(mesh: Mesh) -> dict[str, str | bool]:
    """Return the platform's compiler options, or none if this version of XLA refuses them."""
    options = dict(backend.of(mesh.devices.flat[0].platform).compiler_options)
    probe = jax.jit(lambda: jnp.zeros(()), out_shardings=NamedSharding(mesh, P()))
    try:
        probe.lower().compile(options)
    except jax.errors.JaxRuntimeError:
        logger.info("this version of XLA refuses the options %s", ", ".join(options))
        return {}
    return options
