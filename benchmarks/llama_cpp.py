"""llama.cpp as another engine: its build, the GGUF file of a model, and the tools that time it.

It is built natively, once, in the user's cache, from the source package that llama-cpp-python
publishes. Its llama-bench and llama-batched-bench time prefill and decode, its server times
requests. Not here: the interface that peers.py uses (engines.py).
"""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint import files

SOURCE = "llama-cpp-python==0.3.36"
TOOLS = ("llama-bench", "llama-batched-bench", "llama-server", "llama-quantize")
OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF")
NATIVE = ("-DGGML_NATIVE=ON",)
AVX2_SETS = ("AVX", "AVX2", "FMA", "F16C", "BMI2")
AVX2 = ("-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in AVX2_SETS))
# HF's names of a layer's modules -> llama.cpp's
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def environment(folder: Path) -> Path:
    """Return the folder of llama.cpp's tools.

    The first call builds them, which takes some ten minutes on two cores.

    With SLIPWAY_ISA=avx2, which limits our kernels to that instruction set, llama.cpp is built for
    it, too.
    """
    is_avx2 = os.environ.get("SLIPWAY_ISA") == "avx2"
    build, source = folder / ("build-avx2" if is_avx2 else "build"), folder / "source"
    binaries = build / "bin"
    if all((binaries / tool).exists() for tool in TOOLS):
        return binaries
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", SOURCE, "--dest", str(folder)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(source, filter="data")
    root = next(source.glob("*/vendor/llama.cpp"))
    options = (*OPTIONS, *(AVX2 if is_avx2 else NATIVE))
    subprocess.run(["cmake", "-S", root, "-B", build, *options], check=True, stdout=sys.stderr)
    command = ["cmake", "--build", str(build), "-j", str(os.cpu_count()), "--target", *TOOLS]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return binaries


def write_gguf(directory: Path, out: Path, folder: Path) -> None:
    """Write a bf16 GGUF file of a Llama, Qwen3 or Qwen3-MoE directory.

    ``folder`` is where llama.cpp was built.

    The words of its vocabulary are invented, because requests consist of token ids.
    """
    # llama.cpp's own writer, from the source that was built
    sys.path.insert(0, str(next((folder / "source").glob("*/vendor/llama.cpp/gguf-py"))))
    import gguf

    checkpoint = files.open_checkpoint(directory)
    config = checkpoint.config
    has_experts = "num_experts" in config
    # The temporary file of tensors: those of the experts do not fit into memory beside the model.
    kind = "qwen3moe" if has_experts else config["model_type"]
    writer = gguf.GGUFWriter(out, kind, use_temp_file=has_experts)
    if has_experts:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    words = [f"<{i}>" for i in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges([f"{words[0]} {words[1]}"])
    writer.add_eos_token_id(0)
    for name, keys in by_gguf_name(checkpoint.tensors).items():
        array = checkpoint.array(keys[0])
        if array.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, array.astype(np.float32))
            continue
        if len(keys) > 1:
            array = np.stack([checkpoint.array(key) for key in keys])
        if kind == "llama" and (".attn_q." in name or ".attn_k." in name):
            # Llama's pairs of rotated dimensions are neighbours in a GGUF file.
            halves = array.reshape(-1, 2, head_dim // 2, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        bits = np.ascontiguousarray(array).view(np.uint8)
        writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        for key in keys:
            checkpoint.drop(key)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_gguf_name(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return the HF tensors of each of llama.cpp's: one, or the experts of a layer in order."""
    found: dict[str, list[str]] = {}
    for key in sorted(keys, key=lambda key: [int(n) for n in re.findall(r"\d+", key)]):
        found.setdefault(gguf_name(key), []).append(key)
    return found


def gguf_name(key: str) -> str:
    """Return llama.cpp's name of an HF tensor."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if key in fixed:
        return fixed[key]
    layer, name = key.removeprefix("model.layers.").split(".", 1)
    if (
        expert := re.fullmatch(r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight", name)
    ) is not None:
        return f"blk.{layer}.ffn_{expert[1]}_exps.weight"
    return f"blk.{layer}.{NAMES[name.removesuffix('.weight')]}.weight"


def quantize(binaries: Path, source: Path, out: Path, *, kind: str) -> None:
    """Write a GGUF file with weights of a kind such as Q8_0."""
    command = [str(binaries / "llama-quantize"), str(source), str(out), kind]
    subprocess.run(command, check=True, stdout=sys.stderr, stderr=sys.stderr)


def prefill(binaries: Path, model: Path, *, tokens: int, threads: int) -> float:
    """Return the seconds of a prompt of ``tokens``, measured by llama-bench."""
    words = ["llama-bench", "-m", model, "-p", tokens, "-n", 0, "-r", 1, "-t", threads]
    output = _output(binaries, *words, "-o", "json")
    return tokens / json.loads(output)[0]["avg_ts"]


def decode(binaries: Path, model: Path, *, batch: int, steps: int, threads: int) -> float:
    """Return the seconds of a step of ``batch`` sequences after prompts of 16 tokens.

    llama-batched-bench measures it.
    """
    words = ["llama-batched-bench", "-m", model, "-c", batch * (16 + steps) + 64, "-b", 2048]
    words += ["-t", threads, "-npp", 16, "-ntg", steps, "-npl", batch, "--output-format", "jsonl"]
    output = _output(binaries, *words)
    return batch / json.loads(output.strip().splitlines()[-1])["speed_tg"]


def _output(binaries: Path, tool: Any, *words: Any) -> str:
    """Run a tool and return its standard output. Raises CalledProcessError."""
    command = [str(binaries / tool), *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Server:
    """A llama-server process with ``slots`` sequences at a time."""

    def __init__(
        self,
        binaries: Path,
        model: Path,
        *,
        slots: int,
        max_model_len: int,
        threads: int,
        options: Sequence[Any] = (),
    ):
        """Start the server, with further ``options``, and wait until it is ready.

        Raises RuntimeError if it exits.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        words = [binaries / "llama-server", "-m", model, "--port", self._port, "-t", threads]
        words += ["-np", slots, "-c", slots * max_model_len, "--no-webui", "-b", 2048]
        # Slots keep their prompts. Copies of prompts outside them, 8 GB by default, gain nothing
        # under these loads.
        words += ["--cache-ram", 0, *options]
        self.process = subprocess.Popen(
            list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not self._is_ready():
            time.sleep(0.02)

    def drive(
        self, prompts: Sequence[list[int]], max_tokens: int, concurrency: int
    ) -> dict[str, Any]:
        """Run a load with a thread for each client, and return the times that driver.drive returns.

        Each client sends its next prompt when its last request has ended.
        """
        started = [0.0] * len(prompts)
        times: list[list[float]] = [[] for _ in prompts]
        waiting, lock, begin = iter(range(len(prompts))), threading.Lock(), time.perf_counter()

        def client() -> None:
            while True:
                with lock:
                    number = next(waiting, None)
                if number is None:
                    return
                started[number] = time.perf_counter() - begin
                for _ in self._tokens(prompts[number], max_tokens):
                    times[number].append(time.perf_counter() - begin)

        with ThreadPoolExecutor(concurrency) as pool:
            for end in [pool.submit(client) for _ in range(concurrency)]:
                end.result()
        return {"started": started, "times": times}

    def stop(self) -> None:
        """End the server."""
        self.process.terminate()
        self.process.wait()

    def _tokens(self, prompt: list[int], max_tokens: int) -> Iterator[bytes]:
        """Yield the event of each token as it arrives. Raises RuntimeError for an error."""
        body = {
            "prompt": prompt,
            "n_predict": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "samplers": ["temperature"],
        }
        headers = {"Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        connection.request("POST", "/completion", body=json.dumps(body), headers=headers)
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise RuntimeError(f"llama-server: {response.status} {response.read()[:500]!r}")
        for line in response:
            if line.startswith(b"error:"):
                raise RuntimeError(f"llama-server: {line.decode()}")
            if line.startswith(b"data:") and not json.loads(line[5:]).get("stop"):
                yield line
        connection.close()

    def _is_ready(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"llama-server exited with {self.process.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
