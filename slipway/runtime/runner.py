"""Compiled programs of one model on one mesh, and the device arrays that they pass to each other.

Not here: what the programs of a language model compute (engine/programs.py), other processes (multihost.py).
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

Key = Any  # hashable; what the shapes of a program depend on: a bucket, a number of rows
Shapes = Callable[[Key], Any]  # a pytree of ShapeDtypeStructs with shardings, of one name of device state


@dataclasses.dataclass(frozen=True)
class Program:
    """Computation that is compiled once per key, before it is first called.

    ``body`` is traced under shard_map with the device state ``reads``, then the inputs. It returns the new values of
    the device state ``writes``, then its results. ``donates`` are the names among ``reads`` whose arrays it consumes.
    ``inputs(key)`` makes neutral host arrays with the shapes of all copies of the weights, which lie one after the
    other along the first axis. ``results`` are the PartitionSpecs of the results.
    """

    name: str
    body: Callable[..., tuple[Any, ...]]
    inputs: Callable[[Key], tuple[Any, ...]]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    donates: tuple[str, ...] = ()
    results: tuple[P, ...] = ()


class Runner:
    """The programs of a model, compiled, and its device state by name.

    No shape but those compiled can be called, so nothing compiles later. ``announce``, where it is set, is called with
    the arguments of every ``call`` before the program starts (multihost.py).
    """

    def __init__(self, mesh: Mesh, shapes: Mapping[str, Shapes], programs: Sequence[Program]):
        self.mesh = mesh
        self.state: dict[str, Any] = {}
        self.bodies: dict[str, str] = {}  # which body serves each op that was traced
        self.announce: Callable[..., None] | None = None
        self._shapes = dict(shapes)
        self._programs = {program.name: program for program in programs}
        self._by_rows = NamedSharding(mesh, P(meshes.DATA))
        self._compiled: dict[tuple[str, Key], Any] = {}
        self._neutral: dict[tuple[str, Key], tuple[Any, ...]] = {}  # inputs that change nothing, on the devices
        self._populating: dict[str, list[Populating]] = {}
        self._options = _compiler_options(mesh)

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far, one for each key."""
        return len(self._compiled)

    @property
    def compiled_keys(self) -> list[tuple[str, Key]]:
        """Name and key of every compiled program."""
        return list(self._compiled)

    def inputs(self, name: str, key: Key) -> tuple[Any, ...]:
        """Make neutral host arrays for a call, to be filled in."""
        return self._programs[name].inputs(key)

    def call(self, name: str, key: Key, *inputs: Any) -> tuple[Any, ...]:
        """Start a program and return its results; does not wait for the device.

        An input of None stands for the neutral one, which lies on the devices already.
        """
        if self.announce is not None:
            self.announce(name, key, *inputs)
        program = self._programs[name]
        given = [self._neutral_inputs(name, key)[i] if x is None else x for i, x in enumerate(inputs)]
        outputs = self._compiled[name, key](*(self.state[read] for read in program.reads), *given)
        count = len(program.writes)
        self.state.update(zip(program.writes, outputs[:count]))
        return outputs[count:]

    def compile(self, wanted: Sequence[tuple[str, Key]]) -> None:
        """Compile programs for keys, where that has not been done, several at a time; log how many are left."""
        missing = [each for each in dict.fromkeys(wanted) if each not in self._compiled]
        started = time.perf_counter()
        with ThreadPoolExecutor(COMPILING_THREADS) as pool:
            futures = {each: pool.submit(self.compiled, *each) for each in missing}
            for count, _ in enumerate(as_completed(futures.values()), 1):
                left, seconds = len(missing) - count, time.perf_counter() - started
                logger.info("compiled %d programs, %d left: about %.1f s", count, left, seconds / count * left)
        self._compiled |= {each: future.result() for each, future in futures.items()}

    def compiled(self, name: str, key: Key) -> Any:
        """Compile one program for one key and return it (``jax.stages.Compiled``), without keeping it."""
        program = self._programs[name]
        shapes = [self._shapes[read](key) for read in program.reads]
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.inputs(key))
        specs = [jax.tree.map(lambda shape: shape.sharding.spec, shape) for shape in shapes]
        written = (jax.tree.map(lambda shape: shape.sharding.spec, self._shapes[name](key)) for name in program.writes)
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
        with jax.set_mesh(self.mesh), backend.recording(platform) as bodies:  # Pallas asks the mesh for the TPU's kind
            lowered = jitted.lower(*shapes, *inputs)
        self.bodies = bodies | self.bodies
        return lowered.compile(self._options)

    def temp_bytes(self) -> int:
        """Memory per device that the compiled programs need at most beside their inputs, outputs of a step included."""
        found = [compiled.memory_analysis() for compiled in self._compiled.values()]
        fresh = max(each.output_size_in_bytes - each.alias_size_in_bytes for each in found)
        return max(each.temp_size_in_bytes for each in found) + fresh

    def allocate(self, name: str) -> None:
        """Make device state of zeros; its shapes depend on no key."""
        shapes = self._shapes[name](None)
        specs = jax.tree.map(lambda shape: shape.sharding.spec, shapes)

        def zeros() -> Any:
            return jax.tree.map(lambda s: ops.zeros(s.sharding.shard_shape(s.shape), s.dtype), shapes)

        made = jax.jit(jax.shard_map(zeros, mesh=self.mesh, in_specs=(), out_specs=specs, check_vma=False))()
        self.state[name] = made
        if backend.of(self.mesh.devices.flat[0].platform).uses_host_memory:
            self._populating[name] = [Populating(array) for array in jax.tree.leaves(made)]

    def free(self, name: str) -> None:
        """Give back the memory of device state that ``allocate`` made, if there is any."""
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
    """Return the platform's compiler options, or none where this XLA refuses them: they change between versions."""
    options = dict(backend.of(mesh.devices.flat[0].platform).compiler_options)
    try:
        jax.jit(lambda: jnp.zeros(()), out_shardings=NamedSharding(mesh, P())).lower().compile(options)
    except jax.errors.JaxRuntimeError:
        logger.info("this XLA has no %s", ", ".join(options))
        return {}
    return options
