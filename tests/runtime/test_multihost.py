"""One engine over two processes of four devices each.

It gives the tokens of one process, and no process waits for one that was killed.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from slipway.engine.config import EngineConfig
from slipway.engine.launch import follow
from slipway.errors import InvalidConfig
from slipway.llm import LLM
from tests.runtime.two_processes import OPTIONS, found

pytestmark = pytest.mark.xdist_group("nodes")


@pytest.fixture
def start(tiny, tmp_path, free_port):
    """Function that starts both processes; those left at the end are killed."""
    running = []

    def both(*arguments):
        for rank in (0, 1):
            command = [
                sys.executable,
                "-m",
                "tests.runtime.two_processes",
                str(rank),
                str(free_port),
                str(tiny),
                *arguments,
            ]
            with (tmp_path / f"{rank}.log").open("w") as log:
                root = Path(__file__).parents[2]
                running.append(
                    subprocess.Popen(
                        command, cwd=root, stdout=subprocess.PIPE, stderr=log, text=True
                    )
                )
        return running

    yield both
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_processes_give_the_tokens_of_one(start, tiny):
    leader, follower = start()
    got = json.loads(leader.communicate(timeout=240)[0].splitlines()[-1])  # after lines of Gloo's
    assert (leader.returncode, follower.wait(30)) == (0, 0), "the follower ends with its leader"
    for options in (OPTIONS, {}):  # the same on eight devices of one process, and on one
        with LLM(tiny, skip_tokenizer_init=True, **options) as llm:
            expected = found(llm)
        np.testing.assert_allclose(got["pooled"], expected["pooled"], atol=1e-5)
        assert got | {"pooled": []} == expected | {"pooled": []}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other_within_ten_seconds(start, rank):
    processes = start("endless")
    assert any(line.startswith('{"tokens"') for line in iter(processes[0].stdout.readline, "")), (
        "it runs"
    )
    processes[rank].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert processes[1 - rank].wait(60) != 0, "an error, no quiet end"
    # The documented limit, no speed: heartbeats are sent every few seconds.
    assert time.monotonic() - killed < 10


def test_who_leads_and_who_follows_is_told(tiny):
    with pytest.raises(InvalidConfig, match="slipway follow"):
        LLM(tiny, nnodes=2, node_rank=1, dist_init_addr="127.0.0.1:1")
    with pytest.raises(InvalidConfig, match="process 0 leads"):
        follow(str(tiny), EngineConfig(nnodes=2, dist_init_addr="127.0.0.1:1"))
    for bad in (
        {"nnodes": 0},
        {"node_rank": 1},
        {"nnodes": 2},
        {"nnodes": 2, "dist_init_addr": "here"},
    ):
        with pytest.raises(InvalidConfig):
            EngineConfig(**bad)
