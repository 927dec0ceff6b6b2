"""Qwen 1, Bailing (Ling) and MiMo in torch, from the published formulas, for models of any shape.

tests/models/test_families.py checks them against logits that the authors' own code computed, and
Slipway against them. Weights come by their names in the checkpoint. Everything is in float32.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize the last dimension by its root mean square."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotated(x: Tensor, base: float, size: int) -> Tensor:
    """Rotate the first ``size`` dimensions of heads [T, N, H]; pairs are i and i + size / 2."""
    frequencies = base ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.arange(x.shape[0], dtype=torch.float32)[:, None] * frequencies[None]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second, rest = x[..., : size // 2], x[..., size // 2 : size], x[..., size:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally: queries [T, N, H], keys and values [T, K, H] -> [T, N * H]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qnh,knh->nqk", q, k) / math.sqrt(q.shape[-1])
    mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("nqk,knh->qnh", weights, v).flatten(1)


def qwen_logits(weights: Weights, config: dict, ids: list[int], prompt_length: int) -> Tensor:
    """Compute the logits [T, V] of Qwen 1 for a prompt and the tokens generated after it.

    Beyond ``seq_length``, the base of rotation is that of the prompt's length (dynamic NTK), and
    queries are multiplied by the logarithm of their position to the base ``seq_length``.
    """
    size, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim, trained, eps = size // heads, config["seq_length"], config["layer_norm_epsilon"]
    base = float(config["rotary_emb_base"])
    if config["use_dynamic_ntk"]:
        doublings = math.ceil(math.log(prompt_length / trained, 2) + 1)
        base *= max(2**doublings - 1, 1) ** (head_dim / (head_dim - 2))
    x = weights["transformer.wte.weight"][ids]
    for n in range(config["num_hidden_layers"]):
        layer = {
            name.removeprefix(f"transformer.h.{n}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"transformer.h.{n}.")
        }
        y = rms_norm(x, layer["ln_1.weight"], eps)
        qkv = F.linear(y, layer["attn.c_attn.weight"], layer["attn.c_attn.bias"])
        q, k, v = (each.unflatten(-1, (heads, head_dim)) for each in qkv.chunk(3, -1))
        q, k = rotated(q, base, head_dim), rotated(k, base, head_dim)
        if config["use_logn_attn"]:
            positions = range(1, len(ids) + 1)
            factors = [math.log(p, trained) if p > trained else 1.0 for p in positions]
            q = q * torch.tensor(factors)[:, None, None]
        x = x + F.linear(attention(q, k, v), layer["attn.c_proj.weight"])
        y = rms_norm(x, layer["ln_2.weight"], eps)
        hidden = F.linear(y, layer["mlp.w1.weight"]) * F.silu(F.linear(y, layer["mlp.w2.weight"]))
        x = x + F.linear(hidden, layer["mlp.c_proj.weight"])
    x = rms_norm(x, weights["transformer.ln_f.weight"], eps)
    return F.linear(x, weights["lm_head.weight"])


def mlp(x: Tensor, weights: Weights, prefix: str) -> Tensor:
    """Compute a gated feed-forward layer."""
    gate, up, down = (weights[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def chosen(x: Tensor, weights: Weights, prefix: str, config: dict) -> tuple[Tensor, Tensor]:
    """Choose the experts of each token: -> (experts [T, K], weights [T, K])."""
    count, top_k = config["num_experts"], config["num_experts_per_tok"]
    logits = F.linear(x, weights[f"{prefix}.gate.weight"])
    if config["architectures"] != ["BailingMoeV2ForCausalLM"]:
        found, experts = logits.softmax(-1).topk(top_k, -1)
        if top_k > 1 and config["norm_topk_prob"]:
            found = found / found.sum(-1, keepdim=True)
        return experts, found
    scores = logits.sigmoid()
    values = scores + weights.get(f"{prefix}.gate.expert_bias", torch.zeros(count))
    groups = values.unflatten(-1, (config["n_group"], -1))
    best = groups.topk(2, -1)[0].sum(-1).topk(config["topk_group"], -1)[1]
    kept = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(1, best, True)
    values = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    experts = values.topk(top_k, -1)[1]
    found = scores.gather(1, experts)
    if top_k > 1:
        found = found / (found.sum(-1, keepdim=True) + 1e-20)
    return experts, found * config["routed_scaling_factor"]


def bailing_layer(x: Tensor, weights: Weights, n: int, config: dict) -> Tensor:
    """Compute the layer ``n`` of Ling or Ring, first or second form: [T, D] -> [T, D]."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, eps = config["head_dim"], config["rms_norm_eps"]
    size = int(head_dim * config.get("partial_rotary_factor", 1.0))
    layer = f"model.layers.{n}"
    y = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], eps)
    fused = f"{layer}.attention.query_key_value"
    qkv = F.linear(y, weights[f"{fused}.weight"], weights.get(f"{fused}.bias"))
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
    if (norm := weights.get(f"{layer}.attention.query_layernorm.weight")) is not None:
        q = rms_norm(q, norm, eps)
        k = rms_norm(k, weights[f"{layer}.attention.key_layernorm.weight"], eps)
    q, k = rotated(q, config["rope_theta"], size), rotated(k, config["rope_theta"], size)
    out = f"{layer}.attention.dense"
    x = x + F.linear(attention(q, k, v), weights[f"{out}.weight"], weights.get(f"{out}.bias"))
    y = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], eps)
    if n < config["first_k_dense_replace"]:
        return x + mlp(y, weights, f"{layer}.mlp")
    experts, found = chosen(y, weights, f"{layer}.mlp", config)
    rows = [
        sum(w * mlp(row, weights, f"{layer}.mlp.experts.{e}") for e, w in zip(es, ws))
        for row, es, ws in zip(y, experts.tolist(), found)
    ]
    shared = mlp(y, weights, f"{layer}.mlp.shared_experts") if config["num_shared_experts"] else 0
    return x + torch.stack(rows) + shared


def bailing_hidden(weights: Weights, config: dict, ids: list[int]) -> Tensor:
    """Compute the hidden states [T, D] of Ling or Ring behind the final norm."""
    x = weights["model.word_embeddings.weight"][ids]
    for n in range(config["num_hidden_layers"]):
        x = bailing_layer(x, weights, n, config)
    return rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])


def bailing_logits(weights: Weights, config: dict, ids: list[int]) -> Tensor:
    """Compute the logits [T, V] of Ling or Ring, first or second form."""
    head = weights["lm_head.weight"]
    if config.get("norm_head"):
        head = F.normalize(head, dim=0, p=2, eps=1e-7)
    return F.linear(bailing_hidden(weights, config, ids), head)


def bailing_draft_logits(weights: Weights, config: dict, ids: list[int]) -> Tensor:
    """Compute the logits [T - 1, V] of a Ling 2's prediction layer, as its authors' code does."""
    n, eps = config["num_hidden_layers"], config["rms_norm_eps"]
    layer = f"model.layers.{n}"
    hidden = bailing_hidden(weights, config, ids)[:-1]
    embeds = weights["model.word_embeddings.weight"][ids[1:]]
    joined = [
        rms_norm(embeds, weights[f"{layer}.enorm.weight"], eps),
        rms_norm(hidden, weights[f"{layer}.hnorm.weight"], eps),
    ]
    x = F.linear(torch.cat(joined, -1), weights[f"{layer}.eh_proj.weight"])
    x = bailing_layer(x, weights, n, config)
    y = rms_norm(x, weights[f"{layer}.final_layernorm.weight"], eps)
    return F.linear(y, weights["lm_head.weight"])


def qwen2_layer(x: Tensor, weights: Weights, prefix: str, config: dict) -> Tensor:
    """Compute a decoder layer of a Qwen2: [T, D] -> [T, D]."""
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    kv_heads, eps = config["num_key_value_heads"], config["rms_norm_eps"]
    y = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], eps)

    def project(name: str, count: int) -> Tensor:
        at = f"{prefix}.self_attn.{name}_proj"
        out = F.linear(y, weights[f"{at}.weight"], weights[f"{at}.bias"])
        return out.unflatten(-1, (count, head_dim))

    q, k = project("q", heads), project("k", kv_heads)
    q, k = (rotated(each, config["rope_theta"], head_dim) for each in (q, k))
    attended = attention(q, k, project("v", kv_heads))
    x = x + F.linear(attended, weights[f"{prefix}.self_attn.o_proj.weight"])
    y = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], eps)
    return x + mlp(y, weights, f"{prefix}.mlp")


def mimo_logits(weights: Weights, config: dict, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Compute the logits [T, V] of a MiMo, and its hidden states before the final norm."""
    x = weights["model.embed_tokens.weight"][ids]
    for n in range(config["num_hidden_layers"]):
        x = qwen2_layer(x, weights, f"model.layers.{n}", config)
    y = rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    return F.linear(y, weights["lm_head.weight"]), x


def mimo_draft_logits(weights: Weights, config: dict, ids: list[int]) -> Tensor:
    """Compute the logits [T - 1, V] of a MiMo's prediction layer.

    Row t reads the hidden state at position t and token t + 1, and predicts token t + 2. At
    position 0 the embedding counts as zero (vLLM's mimo_mtp.py).
    """
    prefix, eps = "model.mtp_layers.0", config["rms_norm_eps"]
    hidden = mimo_logits(weights, config, ids)[1][:-1]
    embeds = weights["model.embed_tokens.weight"][ids[1:]].clone()
    embeds[0] = 0
    joined = [
        rms_norm(hidden, weights[f"{prefix}.hidden_layernorm.weight"], eps),
        rms_norm(embeds, weights[f"{prefix}.token_layernorm.weight"], eps),
    ]
    x = F.linear(torch.cat(joined, -1), weights[f"{prefix}.input_proj.weight"])
    x = qwen2_layer(x, weights, prefix, config)
    y = rms_norm(x, weights[f"{prefix}.final_layernorm.weight"], eps)
    return F.linear(y, weights["lm_head.weight"])


def mimo_drafts(weights: Weights, config: dict, ids: list[int], count: int) -> list[int]:
    """Draft ``count`` tokens after ``ids`` with a MiMo's prediction layer, the likeliest each.

    For the drafts after the first, the layer reads its own hidden state before the final norm.
    """
    prefix, eps = "model.mtp_layers.0", config["rms_norm_eps"]
    hidden = mimo_logits(weights, config, ids)[1][:-1]
    tokens, drafts = list(ids[1:]), []
    for _ in range(count):
        embeds = weights["model.embed_tokens.weight"][tokens].clone()
        embeds[0] = 0
        joined = [
            rms_norm(hidden, weights[f"{prefix}.hidden_layernorm.weight"], eps),
            rms_norm(embeds, weights[f"{prefix}.token_layernorm.weight"], eps),
        ]
        x = F.linear(torch.cat(joined, -1), weights[f"{prefix}.input_proj.weight"])
        x = qwen2_layer(x, weights, prefix, config)
        y = rms_norm(x, weights[f"{prefix}.final_layernorm.weight"], eps)
        drafts.append(int(F.linear(y[-1], weights["lm_head.weight"]).argmax()))
        hidden, tokens = torch.cat([hidden, x[-1:]]), [*tokens, drafts[-1]]
    return drafts
