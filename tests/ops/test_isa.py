"""The op tests once for every instruction set that this processor has, and once for the portable bodies."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slipway import native
from slipway.ops import cpu

DISPATCH = Path(__file__).parents[2] / "csrc" / "dispatch.cc"
SETS = {*re.findall(r"return &(\w+)::table", DISPATCH.read_text()), "portable"}


def isa_if_asked_for(name: str) -> str:
    """What a process uses that asks for an instruction set."""
    code = "from slipway.ops import cpu; print(cpu.isa())"
    environment = os.environ | {"SLIPWAY_ISA": name}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(native.library() is None, reason="installed without a C++ compiler")
@pytest.mark.parametrize("name", [*sorted(SETS), "xla"])
def test_ops_hold_on_every_instruction_set_of_this_processor(name):
    used = isa_if_asked_for(name)
    if name == cpu.isa():
        pytest.skip("the set in use: the other tests of this folder run on it")
    if name == "xla":
        assert used == "None"
    elif used == "None":
        pytest.skip(f"this processor has no {name}")
    else:
        assert used == name
    folder = Path(__file__).parent
    tests = [str(folder / "test_ops.py"), str(folder / "test_quantized.py")]
    if name == "xla":  # what the prefix cache promises differs there
        tests.append(str(folder.parent / "engine" / "test_prefix.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *tests]
    run = subprocess.run(command, env=os.environ | {"SLIPWAY_ISA": name}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
