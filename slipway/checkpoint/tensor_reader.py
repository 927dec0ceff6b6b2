"""Reader of a checkpoint's tensors into the arrays of a declaration on a mesh.

Everything is checked before any device memory is allocated. Then the block of each device is read
by itself: a CPU device maps the file where layout, dtype and alignment allow it. Any other block is
filled a few megabytes at a time, and the pages of the file behind it are dropped, so that the host
never holds a second copy of the weights.

Not here: file formats (files.py), writing (save.py), the loading of a whole model
(slipway/runtime/load.py).
"""

import functools
import itertools
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from slipway import layout, tree
from slipway.checkpoint import parts
from slipway.checkpoint.copying import copy_bits, count_above, stream
from slipway.checkpoint.files import DTYPES, Checkpoint, Tensor
from slipway.checkpoint.quantize import PACKED
from slipway.errors import CheckpointError
from slipway.mesh import shardings
from slipway.ops import backend

WEIGHT_DTYPES = ("BF16", "F16", "F32")
# bytes: JAX uses a host buffer on this boundary on a CPU device without a copy
ALIGNMENT = 64
DUMMY_STD = 0.02
_SCAN_BYTES = 1 << 18  # compared at a time, of each of two tensors
_COPY_BYTES = 1 << 21  # copied between two drops of the file's pages
logger = logging.getLogger(__name__)

Bounds = tuple[tuple[int, int], ...]  # start and stop of a block in every dimension


def load(
    declaration: Any, checkpoint: Checkpoint, mesh: Mesh, dtype: Any, ignore: Sequence[str] = ()
) -> Any:
    """Return the declaration's tree with arrays for Params, sharded as ``mesh.shardings`` states.

    On CPU devices, arrays may be the files of the checkpoint themselves: these must not change
    while the arrays live. Raises CheckpointError as ``check`` does.
    """
    checkpoint = parts.split(checkpoint, wanted(declaration))
    check(declaration, checkpoint, dtype, ignore=ignore)
    return read(declaration, checkpoint, mesh, dtype=dtype)


def read(declaration: Any, checkpoint: Checkpoint, mesh: Mesh, dtype: Any) -> Any:
    """Return the tree of ``load`` for a checkpoint that has passed ``check``."""
    dtype, start = np.dtype(dtype), time.monotonic()
    pairs = list(zip(tree.leaves(declaration), jax.tree.leaves(shardings(declaration, mesh))))
    arrays = [
        load_leaf(leaf, checkpoint, sharding, dtype=leaf.param.held_as(dtype))
        for leaf, sharding in pairs
    ]
    size_gb = sum(array.nbytes for array in arrays) / 1e9
    seconds = time.monotonic() - start
    logger.info(
        "%s: %d arrays, %.2f GB, loaded in %.1f s",
        checkpoint.directory,
        len(arrays),
        size_gb,
        seconds,
    )
    return _unflatten(declaration, arrays)


def wanted(declaration: Any) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a checkpoint may hold, including aliases."""
    return {key: leaf.param.hf_shape for leaf in tree.leaves(declaration) for key in leaf.names()}


def names(declaration: Any) -> set[str]:
    """Return the names that tensors of the declaration may have in a checkpoint, packed or not."""
    held = wanted(declaration)
    return {*held, *(name.removesuffix(PACKED) for name in held)}


def check(
    declaration: Any,
    checkpoint: Checkpoint,
    dtype: Any,
    ignore: Sequence[str] = (),
    overflow_of: Callable[[str, Checkpoint, np.dtype], str] | None = None,
) -> None:
    """Compare presence, shape, dtype and values of every tensor with the declaration.

    ``ignore`` holds glob patterns of tensors that may be present without being declared. A value
    must be finite as ``dtype``; ``overflow_of`` returns a description of the values that are not,
    by default ``overflow``. A Param's alias may be absent, but where present it must equal the
    Param bit for bit. Raises CheckpointError, listing every mismatch.
    """
    leaves = list(tree.leaves(declaration))
    params = {key: leaf.param for leaf in leaves for key in leaf.keys.values()}
    misfits = {
        key: _misfit(key, param, checkpoint.tensors.get(key)) for key, param in params.items()
    }
    # A fused tensor that is missing lacks all of its parts: one problem.
    problems = list(dict.fromkeys(misfit for misfit in misfits.values() if misfit))
    sound = [key for key, misfit in misfits.items() if not misfit]
    # Threads: NumPy releases the interpreter lock while it scans.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(
            lambda key: (overflow_of or overflow)(key, checkpoint, np.dtype(dtype)), sound
        )
        problems += [problem for problem in found if problem]
    aliases = [(params[key].alias, key) for key in sound if params[key].alias in checkpoint.tensors]
    problems += [
        f"{alias}: differs from {key}"
        for alias, key in aliases
        if not _equal(alias, key, checkpoint)
    ]
    declared = {*params, *(param.alias for param in params.values())}
    problems += [
        f"{name}: unexpected"
        for name in checkpoint.tensors
        if name not in declared and not any(fnmatchcase(name, pattern) for pattern in ignore)
    ]
    if problems:
        raise CheckpointError(checkpoint.directory, problems)


def _misfit(key: str, param: tree.Param, tensor: Tensor | None) -> str:
    """Return what is wrong with a tensor apart from its values; empty if nothing is."""
    if tensor is None:
        return f"{parts.whole(key)}: missing"
    if tensor.shape != param.hf_shape:
        return f"{key}: shape {tensor.shape} in the file, {param.hf_shape} declared"
    expected: Sequence[str] = WEIGHT_DTYPES
    if param.dtype and np.dtype(param.dtype).kind != "f":
        expected = [name for name, dtype in DTYPES.items() if dtype == param.dtype]
    if tensor.dtype not in expected:
        return f"{key}: dtype {tensor.dtype}, expected one of {', '.join(expected)}"
    return ""


def overflow(key: str, checkpoint: Checkpoint, dtype: np.dtype) -> str:
    """Describe the values of a tensor that are not finite as ``dtype``; empty if there are none.

    Without its sign, the bits of a float order as its magnitude does, with infinities and NaN last:
    one integer comparison finds them.
    """
    source, shape = DTYPES[checkpoint.tensors[key].dtype], checkpoint.tensors[key].shape
    if source.kind == "i":
        return ""
    limit = _limit(source, dtype)
    if not (count := checkpoint.count_above(key, limit)):
        return ""
    flat, unsigned = checkpoint.array(key).reshape(-1), np.dtype(f"u{source.itemsize}").type
    first = int(((flat.view(unsigned) & unsigned(np.iinfo(unsigned).max >> 1)) > limit).argmax())
    place, value = tuple(map(int, np.unravel_index(first, shape))), flat[first]
    checkpoint.drop(key)
    return f"{key}: {count} values are not finite as {dtype}, the first {value} at {place}"


@functools.cache
def _limit(source: np.dtype, target: np.dtype) -> int:
    """Return the bits of the largest ``source`` number not above the largest of ``target``."""
    largest = float(ml_dtypes.finfo(target).max)
    nearest = np.asarray(min(largest, float(ml_dtypes.finfo(source).max))).astype(source)
    return int(nearest.view(f"u{source.itemsize}")) - (float(nearest) > largest)


def _equal(alias: str, key: str, checkpoint: Checkpoint) -> bool:
    """Return whether two tensors agree in dtype, shape and every bit."""
    one, two = checkpoint.array(alias), checkpoint.array(key)
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    one, two = one.reshape(-1).view(np.uint8), two.reshape(-1).view(np.uint8)
    cuts = range(0, one.size, _SCAN_BYTES)
    equal = all(
        np.array_equal(one[cut : cut + _SCAN_BYTES], two[cut : cut + _SCAN_BYTES]) for cut in cuts
    )
    checkpoint.drop(alias)
    checkpoint.drop(key)
    return equal


def load_leaf(
    leaf: tree.Leaf,
    checkpoint: Checkpoint,
    sharding: NamedSharding,
    dtype: np.dtype,
    memory: dict[Bounds, np.ndarray] | None = None,
    faults: list[str] | None = None,
) -> jax.Array:
    """Return one array of the declaration, with its tensors read from the checkpoint.

    ``memory``: receives the blocks, which are then all copies; on a CPU the array is a view of
    them. Without it the array may be the file of the checkpoint. ``faults``: receives the leaf's
    key where a number is not finite.
    """
    blocks = {} if memory is None else memory
    for bounds in _placed(leaf.param.shape, sharding).values():
        # Devices that hold the same block read it once.
        if bounds not in blocks:
            view = _mapped(leaf, checkpoint, bounds, dtype=dtype) if memory is None else None
            blocks[bounds] = _aligned_empty(_size(bounds), dtype) if view is None else view
            if view is None:
                _fill(blocks[bounds], leaf, checkpoint, bounds=bounds, faults=faults)
    array = place(leaf.param.shape, sharding, blocks)
    # An accelerator has copied even a view.
    if not backend.of(sharding.mesh.devices.flat[0].platform).uses_host_memory:
        for key in leaf.keys.values():
            checkpoint.drop(key)
    return array


def place(
    shape: tuple[int, ...], sharding: NamedSharding, blocks: Mapping[Bounds, np.ndarray]
) -> jax.Array:
    """Return the array with the given blocks; on a CPU it is a view of them.

    On other devices the transfer is complete when this returns.
    """
    places = _placed(shape, sharding)
    parts = [
        jax.device_put(blocks[bounds], device, may_alias=True) for device, bounds in places.items()
    ]
    # Waiting bounds the number of blocks that are in host memory, on their way to the devices.
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, parts))


def _placed(shape: tuple[int, ...], sharding: NamedSharding) -> dict[jax.Device, Bounds]:
    """Return the bounds of the block on each of this process's devices."""
    found = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None, "an addressable device holds a part"
        found[device] = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
    return found


def refill(
    leaf: tree.Leaf,
    checkpoint: Checkpoint,
    memory: Mapping[Bounds, np.ndarray],
    faults: list[str] | None = None,
) -> None:
    """Read the tensors of one array into its blocks; ``faults`` as in ``load_leaf``."""
    for bounds, block in memory.items():
        _fill(block, leaf, checkpoint, bounds=bounds, faults=faults)


def _size(bounds: Bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds)


def _mapped(
    leaf: tree.Leaf, checkpoint: Checkpoint, bounds: Bounds, dtype: np.dtype
) -> np.ndarray | None:
    """Return one device's part of a leaf as a view of the file.

    None unless the file holds it in the same form and aligned.
    """
    view = _as_it_lies(leaf, checkpoint, bounds, dtype=dtype)
    return view if view is not None and view.ctypes.data % ALIGNMENT == 0 else None


def _as_it_lies(
    leaf: tree.Leaf, checkpoint: Checkpoint, bounds: Bounds, dtype: np.dtype
) -> np.ndarray | None:
    """Return one device's part of a leaf as a contiguous view of its tensor, or None."""
    param = leaf.param
    if not _lies_as_declared(param):
        return None
    array, shape = checkpoint.array(leaf.keys[()]), _size(bounds)
    if array.dtype != dtype:
        return None
    whole = math.prod(shape) == array.size
    view = (
        array.reshape(shape)
        if whole
        else param.read(array, tuple(slice(*bound) for bound in bounds))
    )
    return view if view.flags.c_contiguous else None


def _is_whole(leaf: tree.Leaf, checkpoint: Checkpoint, bounds: Bounds, dtype: np.dtype) -> bool:
    """Return whether one device's part of a leaf is a whole tensor, number for number.

    The data of the tensor is not read.
    """
    if not _lies_as_declared(leaf.param):
        return False
    tensor = checkpoint.tensors[leaf.keys[()]]
    return DTYPES[tensor.dtype] == dtype and math.prod(_size(bounds)) == math.prod(tensor.shape)


def _fill(
    block: np.ndarray,
    leaf: tree.Leaf,
    checkpoint: Checkpoint,
    bounds: Bounds,
    faults: list[str] | None,
) -> None:
    """Copy one device's part of a leaf; with ``faults``, look for numbers that are not finite."""
    counts = faults is not None and block.dtype.kind != "i"
    limit = _limit(block.dtype, block.dtype) if counts else None
    if _is_whole(leaf, checkpoint, bounds, dtype=block.dtype):
        found = checkpoint.copy(leaf.keys[()], block, limit)
    elif (view := _as_it_lies(leaf, checkpoint, bounds, dtype=block.dtype)) is not None:
        found = stream(block, view, limit)
        checkpoint.drop(leaf.keys[()])
    else:
        _rearrange(block, leaf, checkpoint, bounds=bounds)
        found = 0 if limit is None else count_above(block.reshape(-1), limit)
    if found and faults is not None:
        faults.append(next(leaf.names()))


def _rearrange(block: np.ndarray, leaf: tree.Leaf, checkpoint: Checkpoint, bounds: Bounds) -> None:
    """Copy a block that has another order or dtype in its tensors."""
    param, stacked = leaf.param, len(leaf.param.stacks)
    index = tuple(slice(*bound) for bound in bounds[stacked:])
    for at in itertools.product(*(range(start, stop) for start, stop in bounds[:stacked])):
        key = leaf.keys[at]
        place: tuple[Any, ...] = (*(i - start for i, (start, _) in zip(at, bounds)), ...)
        target = block[place]
        for rows, part in _pieces(param, index, block.itemsize):
            source = param.read(checkpoint.array(key), part)
            if source.dtype == block.dtype:
                copy_bits(target[rows], source)
            else:
                target[rows] = source
            checkpoint.drop(key)


def _lies_as_declared(param: tree.Param) -> bool:
    """Return whether the file holds the parameter in the order in which it is declared."""
    same_order = layout.parse(param.hf_layout).axes == layout.parse(param.axes).axes
    return same_order and not (param.stacks or param.repeats or param.pads)


def _pieces(
    param: tree.Param, index: tuple[slice, ...], itemsize: int
) -> Iterator[tuple[Any, tuple[slice, ...]]]:
    """Yield the block at ``index`` in pieces along its first dimension.

    Each piece is (its rows in the block, its index in the parameter).
    """
    if not index:
        yield ..., ()
        return
    first, rest = index[0], index[1:]
    inner = math.prod(param.sizes[axis] for axis in layout.parse(param.axes).groups[0][1:])
    row_bytes = math.prod(part.stop - part.start for part in rest) * inner * itemsize
    # Each piece faults in all pages of a transposed tensor anew: at most 16 pieces.
    piece_bytes = max(_COPY_BYTES, row_bytes * ((first.stop - first.start) // inner) // 16)
    step = max(1, piece_bytes // max(1, row_bytes)) * inner
    for start in range(first.start, first.stop, step):
        stop = min(start + step, first.stop)
        yield slice(start - first.start, stop - first.start), (slice(start, stop), *rest)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return uninitialised memory on a boundary that JAX accepts without a copy.

    NumPy aligns its own memory to 16 bytes.
    """
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def dummy(declaration: Any, mesh: Mesh, dtype: Any, seed: int = 0) -> Any:
    """Return the declaration's tree with random weights, made on the devices.

    Each tensor of the checkpoint has its own numbers, a function of the seed, its HF key and the
    position in it: they do not depend on the mesh, nor on whether layers are stacked.
    """
    arrays = []
    for leaf, sharding in zip(
        tree.leaves(declaration), jax.tree.leaves(shardings(declaration, mesh))
    ):
        param = leaf.param
        salts = [zlib.crc32(f"{seed}:{key}".encode()) for key in leaf.keys.values()]
        shape = [n for _, n in param.stacks] + [1] * (len(param.shape) - len(param.stacks))
        salt = np.array(salts, np.uint32).reshape(shape)
        arrays.append(_draw(param.init, param.held_as(dtype), sharding)(salt, _positions(param)))
    return _unflatten(declaration, arrays)


def _positions(param: tree.Param) -> list[np.ndarray]:
    """Return the share of each index in the position in the checkpoint's tensor, per dimension.

    Stacked dimensions are left out. Padding has the share -1.
    """
    shares, stride, ndim = [], 1, len(param.shape)
    for dim, group in reversed(list(enumerate(layout.parse(param.axes).groups, len(param.stacks)))):
        outer, inner = group[0], math.prod(param.sizes[axis] for axis in group[1:])
        row, within = np.divmod(np.arange(param.shape[dim]), inner)
        row //= param.repeats.get(outer, 1)
        # Wraps beyond 2^31 elements, where the numbers begin to repeat.
        share = np.where(
            row < param.sizes[outer], ((row * inner + within) * stride) & 0x7FFFFFFF, -1
        )
        shares.append(share.astype(np.int32).reshape([-1 if d == dim else 1 for d in range(ndim)]))
        stride *= inner * param.sizes[outer]
    return shares


@functools.cache
def _draw(init: str, dtype: np.dtype, sharding: NamedSharding) -> Callable[..., jax.Array]:
    """Return a compiled draw: a hash of the position of every element.

    Each device computes its own part. Threefry took 12 times as long on two cores, because it runs
    one block cipher for each element. The hash is lowbias32
    (https://nullprogram.com/blog/2018/07/31/) with the tensor's salt applied half-way.
    """

    def draw(salt: jax.Array, positions: list[jax.Array]) -> jax.Array:
        shape = jnp.broadcast_shapes(salt.shape, *(share.shape for share in positions))
        held = functools.reduce(
            jnp.logical_and, [share >= 0 for share in positions], jnp.ones_like(salt, bool)
        )
        if init == "zeros":
            x = jnp.zeros(shape, dtype)
        elif init == "ones":
            x = jnp.ones(shape, dtype)
        elif init == "scale":  # of whole numbers of 4 or 8 bits
            x = jnp.full(shape, DUMMY_STD / 64, dtype)
        else:
            bits = functools.reduce(
                jnp.add, [share.astype(jnp.uint32) for share in positions], jnp.zeros_like(salt)
            )
            bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D)
            bits = bits ^ salt
            bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B)
            bits = bits ^ (bits >> np.uint32(16))
            whole = jax.lax.bitcast_convert_type(bits, jnp.int32)
            uniform = whole.astype(jnp.float32) * np.float32(DUMMY_STD * math.sqrt(3) / 2**31)
            x = whole if init == "bits" else uniform.astype(dtype)
        return jnp.where(held, x, jnp.zeros((), dtype))

    return jax.jit(draw, out_shardings=sharding)


def _unflatten(declaration: Any, arrays: Sequence[jax.Array]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(declaration, is_leaf=tree.is_param), arrays)
