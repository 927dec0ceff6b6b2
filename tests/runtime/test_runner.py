"""Runner: a toy program is compiled, called, counted, and led over two processes.

The runner needs no change for it.
"""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from slipway import mesh as meshes
from tests.runtime import toy_program

pytestmark = pytest.mark.xdist_group("nodes")


def test_a_toy_program_is_compiled_called_and_counted():
    runner = toy_program.runner(meshes.make_mesh(data=2, devices=jax.devices()[:2]))
    runner.compile([("double", 4), ("double", 8), ("double", 4)])
    assert runner.num_compiled == 2
    assert runner.temp_bytes() > 0
    assert toy_program.run(runner, key=4) == toy_program.EXPECTED[4]
    assert toy_program.run(runner, key=8) == toy_program.EXPECTED[8]
    assert runner.num_compiled == 2


def test_device_state_is_freed():
    runner = toy_program.runner(meshes.make_mesh())
    runner.allocate("hidden")
    (held,) = jax.tree.leaves(runner.state["hidden"])
    runner.free("hidden")
    assert held.is_deleted()
    assert runner.state == {}
    runner.free("hidden")  # nothing is there


def test_a_shape_that_was_not_compiled_is_refused():
    runner = toy_program.runner(meshes.make_mesh())
    runner.compile([("double", 4)])
    runner.allocate("hidden")
    with pytest.raises(KeyError):
        runner.call("double", 8, np.zeros(8, np.float32))


def test_a_toy_program_is_led_over_two_processes(free_port):
    command = [sys.executable, "-m", "tests.runtime.toy_program"]
    processes = [
        subprocess.Popen([*command, str(rank), str(free_port)], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        printed = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], (
            "the follower ends with its leader"
        )
    finally:
        for process in processes:
            process.kill()
    led, followed = map(json.loads, printed)
    assert led["results"] == toy_program.EXPECTED[4]
    assert led["hidden"] == followed["hidden"], "both hold the same state at the end"
