"""The kernels under AddressSanitizer and UBSan: no byte beyond a buffer, nothing undefined."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = {  # as CMakeLists.txt has them
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "avx512bf16": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx512bf16"],
}
FLAGS["amx"] = [*FLAGS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
NEEDED = {
    "portable": "",
    "avx2": "avx2",
    "avx512": "avx512vl",
    "avx512bf16": "avx512_bf16",
    "amx": "amx_bf16",
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build with")
@pytest.mark.parametrize("name", FLAGS)
def test_kernels_run_clean(name, tmp_path):
    flags = Path("/proc/cpuinfo").read_text() if NEEDED[name] else ""
    if NEEDED[name] not in flags:
        pytest.skip(f"this processor has no {NEEDED[name]}")
    program = tmp_path / "sanitize"
    sanitizers = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ]
    source = Path(__file__).parent / "sanitize.cc"
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-g1",
        "-Wno-psabi",
        *sanitizers,
        *FLAGS[name],
        f"-DSLIPWAY_ISA={name}",
    ]
    subprocess.run([*command, f"-I{CSRC}", source, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    if run.returncode == 77:
        pytest.skip(f"this system does not let a process use {NEEDED[name]}")
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) > 1000
