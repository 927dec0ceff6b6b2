"""The tests of the ops, once for each instruction set of this processor and for the portable
bodies.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slipway import native
from slipway.ops import cpu

DISPATCH = Path(__file__).parents[2] / "csrc" / "dispatch.cc"
SETS = {*re.findall(r"visit\((\w+)::table", DISPATCH.read_text()), "portable"}


def isa_if_asked_for(name: str | None) -> subprocess.CompletedProcess[str]:
    """Run a process with SLIPWAY_ISA set to ``name``, or unset for None.

    The process prints the instruction set that it uses.
    """
    code = "from slipway.ops import cpu; print(cpu.isa())"
    variables = {key: value for key, value in os.environ.items() if key != "SLIPWAY_ISA"}
    variables |= {} if name is None else {"SLIPWAY_ISA": name}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True
    )


def has(name: str) -> bool:
    """Return whether this processor has the set.

    An error must name the set and those that the processor has.
    """
    run = isa_if_asked_for(name)
    if run.returncode == 0:
        return True
    error = run.stderr.strip().splitlines()[-1]
    assert error.startswith(
        f"slipway.errors.InvalidConfig: SLIPWAY_ISA: got {name!r}, expected "
    ), run.stderr
    assert "portable xla)" in error
    return False


def test_an_empty_variable_is_an_unset_one():
    unset = isa_if_asked_for(None)
    assert unset.returncode == 0, unset.stderr
    assert isa_if_asked_for("").stdout == unset.stdout
    if native.library() is not None:
        assert unset.stdout.strip() in SETS


@pytest.mark.skipif(native.library() is None, reason="installed without a C++ compiler")
@pytest.mark.parametrize("name", ["AVX2", "none", " avx2", "avx2,portable"])
def test_an_unknown_instruction_set_is_an_error_that_names_the_choices(name):
    assert not has(name)


@pytest.fixture
def compile_cache(tmp_path_factory):
    """Variables with which JAX keeps compiled programs for the next set.

    The programs call kernels by name, so they serve every set.
    """
    folder = tmp_path_factory.getbasetemp() / "programs"
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.mark.xdist_group("isa")
@pytest.mark.skipif(native.library() is None, reason="installed without a C++ compiler")
@pytest.mark.parametrize("name", [*sorted(SETS), "xla"])
def test_ops_hold_on_every_instruction_set_of_this_processor(name, compile_cache):
    if name == cpu.isa():
        pytest.skip("the set in use: the other tests of this folder run on it")
    if not has(name):
        pytest.skip(f"this processor has no {name}")
    assert isa_if_asked_for(name).stdout.strip() == ("None" if name == "xla" else name)
    folder = Path(__file__).parent
    names = ("test_ops.py", "test_quantized.py", "test_experts.py")
    tests = [str(folder / name) for name in names]
    if name == "xla":  # what the prefix cache promises differs there
        tests.append(str(folder.parent / "engine" / "test_prefix.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *tests]
    variables = os.environ | compile_cache | {"SLIPWAY_ISA": name}
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
