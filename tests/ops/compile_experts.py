"""Compilation of one layer of experts for a TPU that is not there; test_tpu.py starts it.

Argument: a topology, such as v6e:2x2. Prints the number of grouped products and of exchanges of
rows in the program, and the results with the size of all experts of a device.
"""

import os
import re
import sys

from benchmarks.compile import MOVES, WITHOUT_DEVICE

os.environ.update(WITHOUT_DEVICE)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slipway import mesh as meshes
from slipway import ops, tree

TOKENS, CHOSEN, LAYERS, EXPERTS, SIZE, HIDDEN = 256, 8, 2, 32, 512, 256


def main() -> None:
    """Compile, and print what the program has."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
    groups = len(devices)
    mesh = meshes.make_mesh(tensor=groups, devices=devices, expert=groups)
    local = EXPERTS // groups

    def layer(x_TD, experts_TK, weights_TK, gate, up, down, counts_NN, index):
        gate, up, down = (tree.StackedArray(array, index) for array in (gate, up, down))
        matrices = ops.ExpertMatrices((gate, up), down)
        routed = x_TD, experts_TK, weights_TK, matrices, jnp.int32(TOKENS)
        y_TD = ops.experts(*routed, num_experts=local)
        return ops.send_rows(y_TD, counts_NN, capacity=TOKENS, axis=meshes.EXPERT)

    whole, split = P(), P(None, meshes.EXPERT)
    run = jax.shard_map(
        layer,
        mesh=mesh,
        in_specs=(whole, whole, whole, split, split, split, whole, whole),
        out_specs=P(meshes.EXPERT),
        check_vma=False,
    )

    def shape(spec, dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    arguments = (
        shape(whole, jnp.bfloat16, TOKENS, SIZE),
        shape(whole, jnp.int32, TOKENS, CHOSEN),
        shape(whole, jnp.float32, TOKENS, CHOSEN),
        shape(split, jnp.bfloat16, LAYERS, EXPERTS, HIDDEN, SIZE),
        shape(split, jnp.bfloat16, LAYERS, EXPERTS, HIDDEN, SIZE),
        shape(split, jnp.bfloat16, LAYERS, EXPERTS, SIZE, HIDDEN),
        shape(whole, jnp.int32, groups, groups),
        shape(whole, jnp.int32),
    )
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(*arguments).compile().as_text()
    products = len(re.findall(r'custom_call_target="tpu_custom_call"', text))
    exchanges = len(re.findall(r" ragged-all-to-all(?:-start)?\(", text))
    matrices = f"{HIDDEN},{SIZE}", f"{SIZE},{HIDDEN}"
    counts = local, LAYERS * local, f"{LAYERS},{local}"
    sizes = [f"{count},{matrix}" for count in counts for matrix in matrices]
    copies = sum(bool(re.search(rf"= bf16\[{each}\]\S* (?:{MOVES})\(", text)) for each in sizes)
    print(products, exchanges, copies)


if __name__ == "__main__":
    main()
