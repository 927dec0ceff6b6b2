"""`slipway bench serving` against a real server: every load, and its report."""

import pytest

from slipway.bench.serving import ServingBench, table

pytestmark = pytest.mark.xdist_group("server")


@pytest.mark.parametrize("load", ["random", "sharegpt", "shared-prefix", "multi-turn"])
def test_every_load_runs_to_its_end(server, load, capsys, tmp_path):
    sizes = {
        "prompt_tokens": (4, 40),
        "output_tokens": (2, 12),
        "num_prompts": 16,
        "concurrency": 4,
    }
    bench = ServingBench(
        base_url=f"{server.url}/v1",
        load=load,
        out=tmp_path / "out.json",
        plot=tmp_path / "plot.png",
        **sizes,
    )
    conversations = bench.conversations()
    before = server.metric("slipway_generated_tokens_total")
    bench.run()
    expected = sum(length for turns in conversations for _, length in turns)
    assert server.metric("slipway_generated_tokens_total") - before == expected
    text = capsys.readouterr().out
    assert "| requests | 16 |" in text and "| failed | 0 |" in text
    assert (tmp_path / "out.json").stat().st_size > 100 and (
        tmp_path / "plot.png"
    ).stat().st_size > 1000


def test_arrivals_may_be_poisson_and_failures_are_counted(server, capsys):
    bench = ServingBench(
        base_url=f"{server.url}/v1", rate=200.0, num_prompts=8, output_tokens=(2, 4), model="other"
    )
    bench.run()
    assert "| failed | 8 |" in capsys.readouterr().out


def test_a_table_has_a_column_for_each_side():
    figures = {"requests": 1, "errors": [], "ttft_ms": {"p50": 2.0}}
    assert "| ttft_ms p50 | 2.0 | 2.0 |" in table({"server": figures, "engine": figures})
