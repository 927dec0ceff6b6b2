"""Compiled programs kept between processes.

They are found again, shared by processes, compiled anew when torn, and not kept when that is off.
"""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.xdist_group("compile_cache")

CODE = """
import dataclasses, json, sys
from slipway import LLM, SamplingParams
options = {"max_num_batched_tokens": 16, "max_model_len": 64, "memory_fraction": 0.05}
options |= json.loads(sys.argv[1])
llm = LLM("nano", max_num_seqs=2, **options)
output = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=6))[0].outputs[0]
print(json.dumps([output.token_ids, dataclasses.asdict(llm.engine.limits)]))
"""


def start(cache, variables=(), **options):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {
        "XDG_CACHE_HOME": str(cache)
    }
    return subprocess.Popen(
        [sys.executable, "-c", CODE, json.dumps(options)],
        env=environment | dict(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process):
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    return json.loads(out), errors


def programs(folder):
    """Return content and time of writing of each program's file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*-cache")}


def test_a_second_process_finds_every_program_and_a_torn_one_is_compiled_anew(tmp_path):
    first, _ = answer(start(tmp_path))
    held = programs(tmp_path / "slipway" / "compiled")
    assert len([path for path in held if "forward" in path.name]) >= 2
    assert len({path.parent for path in held}) == 1
    second, _ = answer(start(tmp_path))
    # The limits too: the size of the cache depends on the temporaries that a program states.
    assert second == first
    assert programs(tmp_path / "slipway" / "compiled") == held
    for path, (content, _) in held.items():
        path.write_bytes(content[: len(content) // 2])
    assert answer(start(tmp_path))[0] == first


def test_processes_that_start_together_share_it(tmp_path):
    both = [start(tmp_path) for _ in range(2)]
    one, two = (answer(process)[0] for process in both)
    assert one == two
    held = programs(tmp_path)
    assert answer(start(tmp_path))[0] == one
    assert programs(tmp_path) == held


def test_it_stays_where_it_was_asked_to(tmp_path):
    answer(start(tmp_path / "none", compilation_cache="off"))
    assert not (tmp_path / "none").exists()
    answer(start(tmp_path / "none", compilation_cache=str(tmp_path / "own")))
    assert programs(tmp_path / "own")
    assert not (tmp_path / "none").exists()
    jax = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    answer(start(tmp_path / "none", jax))
    assert programs(tmp_path / "jax")
    assert not (tmp_path / "none").exists()


def test_an_empty_variable_of_jax_counts_as_unset(tmp_path):
    answer(start(tmp_path, {"JAX_COMPILATION_CACHE_DIR": ""}))
    assert programs(tmp_path / "slipway" / "compiled")


def test_other_programs_of_the_process_are_kept_only_if_jax_would(tmp_path):
    """Each program that is kept makes JAX read the size of all others."""
    own = "import jax, numpy as np\ndef apart(x): return x * 3 + 1\njax.jit(apart)(np.ones(7))\n"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    words = [sys.executable, "-c", CODE + own, json.dumps({})]
    subprocess.run(words, env=environment, check=True, capture_output=True, timeout=120)
    names = {path.name.split("-")[0] for path in programs(tmp_path)}
    assert {"jit_forward", "jit__sample"} <= names
    assert "jit_apart" not in names


def test_a_place_that_cannot_be_written_is_said_and_done_without(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    _, errors = answer(start(tmp_path, compilation_cache=str(tmp_path / "file" / "below")))
    assert "compiled programs are not kept" in errors
