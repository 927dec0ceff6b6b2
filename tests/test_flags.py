"""Flags of other engines and from a file, translated into Slipway's without loss."""

import pytest

from slipway.errors import InvalidConfig
from slipway.flags import expand

pytestmark = pytest.mark.host
CASES = {
    "our own": ("serve M --port 1 --strict", "serve M --port 1 --strict"),
    "vLLM's": (
        "serve --model M --tp 2 --max-model-len 5 --gpu-memory-utilization=0.5 -dp 2",
        "serve M --tensor-parallel-size 2 --max-model-len 5 --memory-fraction 0.5 --replicas 2",
    ),
    "vLLM's pages": ("serve M --block-size 32", "serve M --page-size 32"),
    "SGLang's": (
        "serve --model-path M --tp-size 2 --context-length 9 --max-running-requests 7",
        "serve M --tensor-parallel-size 2 --max-model-len 9 --max-num-seqs 7",
    ),
    "SGLang's experts": (
        "serve M --tp-size=8 --ep-size 2",
        "serve M --tensor-parallel-size 8 --expert-parallel-size 2",
    ),
    "vLLM's experts": (
        "serve M --tp 4 --enable-expert-parallel",
        "serve M --tensor-parallel-size 4 --expert-parallel-size 4",
    ),
    "SGLang's n-grams": (
        "serve M --speculative-algorithm NGRAM --speculative-num-draft-tokens 9",
        'serve M --speculative-config {"method":"ngram","num_speculative_tokens":8}',
    ),
    "SGLang's MTP": (
        "serve M --speculative-algorithm EAGLE --speculative-num-steps 1 --speculative-eagle-topk 1"
        " --speculative-num-draft-tokens 2 --port 1",
        'serve M --port 1 --speculative-config {"method":"mtp","num_speculative_tokens":1}',
    ),
    "SGLang's EAGLE-3": (
        "serve M --speculative-algorithm EAGLE3 --speculative-draft-model-path D "
        "--speculative-num-steps=3",
        'serve M --speculative-config {"method":"eagle3","num_speculative_tokens":3,"model":"D"}',
    ),
    "SGLang's switch": (
        "serve --model-path M --disable-radix-cache",
        "serve M --no-enable-prefix-caching",
    ),
    "what changes nothing": ("serve M --trust-remote-code --port 1", "serve M --port 1"),
    "another command": ("generate M --tp 2", "generate M --tp 2"),
    "no command": ("", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_words_come_out_as_ours(name):
    words, expected = CASES[name]
    found = [word.replace(" ", "") for word in expand(words.split())]
    assert found == expected.split()


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("--speculative-algorithm MEDUSA", "--speculative-algorithm"),
        ("--speculative-num-steps 3", "--speculative-algorithm"),
        ("--speculative-algorithm EAGLE --speculative-eagle-topk 4", "--speculative-eagle-topk"),
        (
            "--speculative-algorithm EAGLE --speculative-num-steps 3 "
            "--speculative-num-draft-tokens 8",
            "--speculative-num-draft-tokens",
        ),
        ("--speculative-algorithm NGRAM --speculative-num-steps many", "--speculative-num-steps"),
    ],
)
def test_flags_of_speculation_that_cannot_be_honoured_are_named(words, field):
    with pytest.raises(InvalidConfig) as caught:
        expand(["serve", "M", *words.split()])
    assert str(caught.value).startswith(field)


def test_what_changes_nothing_is_said(capsys):
    expand(["serve", "--trust-remote-code"])
    assert "never imported" in capsys.readouterr().err


def test_a_file_gives_what_the_command_line_does_not(tmp_path):
    path = tmp_path / "serve.yaml"
    lines = ["model: M", "tp: 2", "port: 9000", "strict: true", "enable_prefix_caching: false"]
    path.write_text("\n".join([*lines, "api-key: [a, b]", ""]))
    switches = "--strict --no-enable-prefix-caching"
    expected = f"serve M --tensor-parallel-size 2 --port 9000 {switches} --api-key a b"
    assert expand(["serve", "--config", str(path)]) == expected.split()
    words = expand(
        [
            "serve",
            "N",
            "--config",
            str(path),
            "--port",
            "1",
            "--no-strict",
            "--enable-prefix-caching",
        ]
    )
    assert words == [
        "serve",
        "N",
        "--port",
        "1",
        "--no-strict",
        "--enable-prefix-caching",
        "--tensor-parallel-size",
        "2",
        "--api-key",
        "a",
        "b",
    ]


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", None, ""])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "serve.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidConfig, match="YAML"):
        expand(["serve", "--config", str(path)])
    with pytest.raises(InvalidConfig):
        expand(["serve", "--config"])
