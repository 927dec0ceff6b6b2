"""Text, bytes and offsets of tokens over HTTP: sentencepiece tokens, incomplete characters."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.server.conftest import Server

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "i", "t", "n", "o", "w", "▁i", "▁it", "▁now", "now", "▁日", "A"]
VOCAB = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *PIECES])}
PROMPT = "it now"


def write_model(folder: Path) -> Path:
    """Write a tiny Llama of random weights, with a tokenizer like that of Llama 2."""
    raw = tokenizers.Tokenizer(
        models.BPE(
            VOCAB, [("▁", "i"), ("▁i", "t")], byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    raw.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "legacy": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def pieces(model, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"), model=str(model))
    try:
        yield server.wait_ready()
        assert server.stop() == 0
    finally:
        server.process.kill()


def written(ids: list[int]) -> dict:
    """Return fields that make the model write equal tokens.

    A grammar of bytes could not tell tokens with the same text apart.
    """
    assert len(set(ids)) == 1
    return {"allowed_token_ids": ids[:1], "max_tokens": len(ids), "temperature": 0}


def events(answer) -> list[dict]:
    lines = [line for line in answer.text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_completion_continues_the_text_of_its_prompt(pieces, model):
    reference = AutoTokenizer.from_pretrained(model)
    ids, new = reference(PROMPT)["input_ids"], [VOCAB["▁now"]] * 2
    wanted = reference.decode(ids + new)[len(reference.decode(ids)) :]
    assert wanted == " now now"
    request = written(new)
    for prompt in (PROMPT, ids):
        whole = pieces.complete(prompt=prompt, n=2, best_of=3, **request)["choices"]
        assert [choice["text"] for choice in whole] == [wanted] * 2
        assert pieces.choice(prompt=prompt, echo=True, **request)["text"] == PROMPT + wanted
        streamed = events(pieces.post("/v1/completions", prompt=prompt, stream=True, **request))
        assert "".join(event["choices"][0]["text"] for event in streamed) == wanted
        stopped = pieces.choice(prompt=prompt, stop=" now", **request)
        assert (stopped["text"], stopped["stop_reason"]) == ("", " now")
    chat = {"messages": [{"role": "user", "content": PROMPT}]}
    answer = pieces.post("/v1/chat/completions", **chat, **request).json()["choices"][0]
    assert answer["message"]["content"] == wanted
    sampling = {"max_new_tokens": 2, "temperature": 0, "logit_bias": {str(new[0]): 100}}
    assert pieces.post("/generate", text=PROMPT, sampling_params=sampling).json()["text"] == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_a_character_begun_in_the_prompt_is_whole_in_the_completion(pieces, stream):
    first, second = (VOCAB[f"<0x{byte:02X}>"] for byte in "é".encode())
    prompt = [*(VOCAB[piece] for piece in ("▁it", "▁now")), first]
    request = {"prompt": prompt, "echo": True, "logprobs": 0, "stream": stream} | written([second])
    answer = pieces.post("/v1/completions", **request)
    choices = [event["choices"][0] for event in (events(answer) if stream else [answer.json()])]
    assert "".join(choice["text"] for choice in choices) == "it nowé"
    assert [at for choice in choices for at in choice["logprobs"]["text_offset"]] == [0, 2, 6, 6]


@pytest.mark.parametrize("piece", ["<0xF0>", "▁now", "now", "▁", "▁日", "A", "<0x41>"])
def test_bytes_and_text_of_a_token(pieces, piece):
    wanted = piece.replace("▁", " ").encode()
    if piece.startswith("<0x"):
        wanted = bytes([int(piece[3:5], 16)])
    text, request = wanted.decode(errors="replace"), written([VOCAB[piece]])
    chat = {"messages": [{"role": "user", "content": PROMPT}], "logprobs": True, "top_logprobs": 0}
    answer = pieces.post("/v1/chat/completions", **chat, **request).json()
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    assert (bytes(entry["bytes"]), entry["token"]) == (wanted, text)
    prompt = {"prompt": [VOCAB["▁it"], VOCAB[piece]], "prompt_logprobs": 0, "max_tokens": 1}
    entry = pieces.choice(**prompt)["prompt_logprobs"][1][str(VOCAB[piece])]
    assert entry["decoded_token"] == text
    sampling = {"sampling_params": {"max_new_tokens": 1, "logit_bias": {str(VOCAB[piece]): 100}}}
    request = {"text": "it", "return_logprob": True, "return_text_in_logprobs": True} | sampling
    found = pieces.post("/generate", **request).json()
    assert found["meta_info"]["output_token_logprobs"][0][2] == text


def test_token_strs_join_to_the_text(pieces):
    found = pieces.post("/tokenize", prompt=PROMPT, return_token_strs=True).json()
    assert "".join(found["token_strs"]) == f" {PROMPT}"
    assert " it" in found["token_strs"]


def test_tokens_with_the_same_text_are_all_listed(pieces):
    """<0x41> and A have the same text: the chosen one keeps it, the other is written as its id."""
    ids = sorted([VOCAB["A"], VOCAB["<0x41>"]])
    for chosen in ids:
        request = {
            "prompt": PROMPT,
            "logprobs": 20,
            "allowed_token_ids": ids,
            "logit_bias": {str(chosen): 100},
        }
        logprobs = pieces.choice(**request, max_tokens=1)["logprobs"]
        (top,) = logprobs["top_logprobs"]
        assert logprobs["tokens"] == ["A"]
        assert top["A"] == logprobs["token_logprobs"][0]
        assert len(top) in (20, 21)
        (other,) = (token for token in ids if token != chosen)
        assert f"token_id:{chosen}" not in top
        assert top.get(f"token_id:{other}") != top["A"]


HALVES = {
    "prompt": "x",
    "structured_outputs": {"choice": ["🙂日🙂"]},
    "max_tokens": 30,
    "temperature": 0,
}


def test_incomplete_characters_are_written_as_bytes(server):
    logprobs = server.choice(**HALVES, logprobs=20)["logprobs"]
    assert all(len(top) in (20, 21) for top in logprobs["top_logprobs"])
    own = [top[token] for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"])]
    assert own == logprobs["token_logprobs"]
    spelled = [token for token in logprobs["tokens"] if token.startswith("bytes:")]
    joined = "".join(token.removeprefix("bytes:") for token in spelled)
    assert bytes.fromhex(joined.replace("\\x", "")).decode() in "🙂日🙂"


@pytest.mark.parametrize(
    "more", [{}, {"echo": True}, {"n": 2}, {"echo": True, "n": 2, "prompt": ["x 日", "def f("]}]
)
@pytest.mark.parametrize("stop", [[], ["日"], [" is", "e"]])
def test_offsets_of_a_stream_equal_those_of_the_whole_response(server, more, stop):
    request = {"prompt": "import os", "max_tokens": 24, "temperature": 0, "logprobs": 1}
    request |= {"stop": stop} | more
    if "is" not in "".join(stop):
        request["structured_outputs"] = HALVES["structured_outputs"]
    whole = sorted(server.complete(**request)["choices"], key=lambda choice: choice["index"])
    streamed: dict[int, dict] = {}
    for event in events(server.post("/v1/completions", stream=True, **request)):
        (choice,) = event["choices"]
        found = streamed.setdefault(choice["index"], {"text": "", "tokens": [], "text_offset": []})
        found["text"] += choice["text"]
        for name in ("tokens", "text_offset"):
            found[name] += choice["logprobs"][name]
        assert not found["text_offset"] or found["text_offset"][-1] <= len(found["text"])
    for choice in whole:
        text, logprobs = choice["text"], choice["logprobs"]
        expected = {
            "text": text,
            "tokens": logprobs["tokens"],
            "text_offset": logprobs["text_offset"],
        }
        assert streamed[choice["index"]] == expected
        offsets = logprobs["text_offset"]
        assert offsets == sorted(offsets)
        assert offsets[-1] <= len(text)
        assert len(offsets) == len(logprobs["tokens"])
        for at, token in zip(offsets, logprobs["tokens"]):
            assert (
                at == len(text) or token.startswith("bytes:") or text.startswith(token, at) or stop
            )
