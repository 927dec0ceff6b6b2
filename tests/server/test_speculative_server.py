"""A server with speculation: the same answers, and the counts of drafts that clients see."""

import json

import pytest

from slipway.bench.serving import ServingBench

pytestmark = pytest.mark.xdist_group("server")
REPEATED = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\n" * 4
NGRAM = {"method": "ngram", "num_speculative_tokens": 6}
PREDICTION = ("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "2")
WORDS = ("--speculative-config", json.dumps(NGRAM), "--vllm-metric-names")


def test_answers_and_counts(server, launch):
    drafting = launch(*WORDS).wait_ready()
    request = {"prompt": REPEATED, "max_tokens": 200, "ignore_eos": True, "logprobs": 2}
    expected = server.complete(**request)
    found = drafting.complete(**request)
    for each in (expected, found):
        for name in ("id", "created"):
            del each[name]
    details = found["usage"].pop("completion_tokens_details")
    del expected["usage"], found["usage"]
    assert found == expected
    accepted, rejected = (details[f"{kind}_prediction_tokens"] for kind in ("accepted", "rejected"))
    assert accepted > 50
    assert 0 <= rejected < accepted

    native = drafting.post(
        "/generate",
        text=REPEATED,
        sampling_params={"temperature": 0, "max_new_tokens": 200, "ignore_eos": True},
    ).json()
    meta = native["meta_info"]
    assert meta["spec_accept_token_num"] <= meta["spec_draft_token_num"]
    assert meta["spec_accept_rate"] == pytest.approx(
        meta["spec_accept_token_num"] / meta["spec_draft_token_num"]
    )
    assert meta["spec_accept_length"] > 2
    assert meta["spec_verify_ct"] > 5

    total = accepted + meta["spec_accept_token_num"]
    for prefix in ("slipway_", "vllm:"):
        assert drafting.metric(f"{prefix}spec_decode_num_accepted_tokens_total") == total
        drafts = drafting.metric(f"{prefix}spec_decode_num_drafts_total")
        assert drafting.metric(f"{prefix}spec_decode_num_draft_tokens_total") >= drafts > 5
        lines = drafting.http.get("/metrics").text.splitlines()
        name = f"{prefix}spec_decode_num_accepted_tokens_per_pos_total"
        by_place = [float(line.split()[-1]) for line in lines if line.startswith(name)]
        assert sum(by_place) == total
        assert len(by_place) == 6

    limits = drafting.http.get("/capabilities").json()["limits"]
    assert limits["speculation"]["method"] == "ngram"
    assert limits["speculation"]["num_speculative_tokens"] == 6
    assert server.http.get("/capabilities").json()["limits"]["speculation"] is None
    assert "speculation: acceptance length" in drafting.log.read_text()


def test_the_benchmark_of_servers_states_the_acceptance_length(server, launch, capsys):
    for each in (server, launch(*WORDS).wait_ready()):
        # Long outputs of few tokens repeat themselves.
        sizes = {"prompt_tokens": (4, 8), "output_tokens": (200, 200), "num_prompts": 2}
        ServingBench(base_url=f"{each.url}/v1", concurrency=1, **sizes).run()
    plain, speculative = capsys.readouterr().out.split("| failed | 0 |")[1:]
    assert "acceptance_length" not in plain
    length = float(speculative.split("| acceptance_length | ")[1].split(" ")[0])
    assert 1.5 < length <= 7


@pytest.mark.parametrize("words", [WORDS, PREDICTION], ids=["ngram", "nextn"])
def test_streams_and_grammars(server, launch, words):
    drafting = launch(*words).wait_ready()
    schema = {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 6}},
            "required": ["name"],
        },
        "minItems": 3,
        "maxItems": 3,
    }
    request = {
        "prompt": "Names as JSON: ",
        "max_tokens": 120,
        "structured_outputs": {"json": schema},
        "temperature": 0.7,
    }
    for seed in range(4):
        assert drafting.choice(**request, seed=seed) == server.choice(**request, seed=seed)
    texts = []
    for each in (server, drafting):
        body = {"prompt": REPEATED, "max_tokens": 80, "temperature": 0, "stream": True}
        with each.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
        texts.append("".join(json.loads(line)["choices"][0]["text"] for line in lines))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--speculative-config", '{"method": "magic"}'), "speculative_config: num_speculative"),
        (("--speculative-algorithm", "EAGLE"), "speculative_config: num_speculative_tokens"),
        (
            ("--speculative-algorithm", "EAGLE3", "--speculative-num-steps", "2"),
            "speculative_config: model: got 'nothing'",
        ),
    ],
)
def test_options_that_cannot_be_honoured_end_the_start(launch, words, message):
    started = launch(*words)
    assert started.process.wait(120) != 0
    # The parser of flags draws a box around the message, which may break its lines.
    words = started.log.read_text().replace("│", " ").split()
    assert message in " ".join(words)
