"""Our engine under the load of benchmarks/peers.py, and an engine that fails.

No other engine is installed in tests.
"""

import subprocess

from benchmarks import host_limits
from benchmarks.peers import PeersBench, summary
from slipway.bench.driver import drive
from slipway.bench.worker import Ours


class Engine:
    """Takes a tenth of a second for everything, or crashes."""

    def __init__(self, crashes: bool):
        self._crashes = crashes

    def decode(self, prompts, steps):
        if self._crashes:
            raise subprocess.CalledProcessError(-11, ["llama-batched-bench"])
        return 0.1

    def prefill(self, prompt):
        return 0.1


def test_what_a_rival_crashed_on_is_left_out_and_the_rest_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(host_limits, "read_bandwidth", lambda threads: 40.0)
    monkeypatch.setattr(host_limits, "matmul_rate", lambda: 700.0)
    engines = {"ours": Engine(False), "ours int4": Engine(False), "llama.cpp q4_0": Engine(True)}
    figures = PeersBench(engines=tuple(engines), rounds=2, loads=()).measure(engines, threads=2)
    assert figures["decode b8 tok/s"] == {"ours": [80.0, 80.0], "ours int4": [80.0, 80.0]}
    assert figures["prefill 512 tok/s"] == {"ours": [5120.0, 5120.0]}
    assert "decode b8 tok/s, llama.cpp q4_0: left out" in capsys.readouterr().err
    assert "decode b8 tok/s" not in summary(figures)["times_as_good"]


def test_a_load_counts_every_token_of_a_call_that_brings_several(tiny):
    engine, calls = Ours(str(tiny), "float32", 64, 4), []
    step = engine.step

    def counted():
        assert len(calls) < 10_000, "the load waits for tokens that it missed"
        calls.append(step())
        return calls[-1]

    engine.step = counted
    result = drive(engine, [[5, 6, 7]] * 6, max_tokens=40, concurrency=4)
    assert [len(times) for times in result["times"]] == [40] * 6
    shown = "no call brought several tokens: the test shows nothing"
    assert max(call.count(0) for call in calls) > 1, shown
