"""Comparison of a twin's computation with that of an engine's Transformers backend.

Both engines replace a twin's attention, embedding and output head, and drop without an error what
they do not expect there: a mask, a scale behind the head, another head count. So the twin's layers
run here with a fake attention in place of the engine's paged attention: on torch's meta device, and
in two orders on random numbers. Its forward runs around a fake head. The rules are read off vLLM
0.32 (model_executor/models/transformers) and SGLang 0.5.23 (srt/models/transformers.py).

Not here: names and shapes of the tensors (twin.py).
"""

import contextlib
import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from slipway.adapters.twin import BASE, HEAD, Engine, Twin, running

_NAME = "slipway_check"
_TOKENS = 5
_INPUTS = ("input_ids", "position_ids", "inputs_embeds")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of one call of the attention interface by an attention layer."""

    module: Any
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    mask: Any
    options: dict[str, Any]


def misfits(twin: Twin, engine: Engine) -> list[str]:
    """Return everything that the engine would compute differently, or could not compute.

    Raises InvalidConfig if the code of the twin fails.
    """
    config = twin.config().get_text_config()
    if missing := [name for name in _SIZES if not isinstance(getattr(config, name, None), int)]:
        return [f"config.json: {name}: missing, {engine} reads it" for name in missing]
    calls: list[Call] = []
    problems = _run(twin, calls)
    if not problems:  # layers that failed to run have not called attention
        problems += _layers(calls, config, engine)
    if not problems and not _is_local(twin):
        problems.append(
            "layers: outside of attention a token's result depends on its neighbours, "
            "or not on its position_ids; "
            f"{engine} packs the tokens of several requests side by side"
        )
    problems += _head(twin, config, engine)
    return problems + ([*_norms(twin)] if engine == "sglang" else [])


def _run(twin: Twin, calls: list[Call]) -> list[str]:
    """Run the layers as the engines do, and append their attention calls to ``calls``.

    Return the reasons for which an engine could not run them.
    """
    import torch

    def record(module, query, key, value, attention_mask=None, **options):
        shapes = [tuple(x.shape) for x in (query, key, value)]
        calls.append(Call(module, *shapes, mask=attention_mask, options=options))
        # Flat, as the engines return it.
        return query.new_empty(query.shape[-2], query.shape[1] * value.shape[-1]), None

    config = twin.config()
    config._attn_implementation = _NAME
    with (
        _attending(record),
        running(twin.path, "with layers that run on torch's meta device"),
        torch.device("meta"),
    ):
        base = twin.base_class(config).eval()
        if absent := [
            name for name in _INPUTS if name not in inspect.signature(base.forward).parameters
        ]:
            return [f"{twin.base_class.__name__}.forward: {', '.join(absent)}: no such parameter"]
        ids, positions = torch.zeros(1, _TOKENS, dtype=torch.long), torch.arange(_TOKENS)[None]
        found = base(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            return_dict=False,
            **{_NAME: True},
        )
        table = base.get_input_embeddings()
    problems = []
    if type(table) is not torch.nn.Embedding:
        problems.append(
            f"input embedding: got {type(table).__name__}, "
            "expected nn.Embedding, which the engines replace"
        )
    expected = (1, _TOKENS, config.get_text_config().hidden_size)
    if tuple(found[0].shape) != expected:
        problems.append(
            f"{twin.base_class.__name__}.forward: got {tuple(found[0].shape)} first, "
            f"expected {expected}"
        )
    return problems


def _is_local(twin: Twin) -> bool:
    """Return whether a token's result depends only on its id and position, apart from attention.

    The same tokens run in two orders, with an attention that does not mix tokens. The weights are
    windows on one row of random numbers, so that a model of any size takes little memory; a matrix
    of them has full rank.
    """
    import torch
    from transformers.initialization import no_init_weights

    def attend(module, query, key, value, attention_mask=None, **options):
        alone = query + (key + value).repeat_interleave(query.shape[1] // key.shape[1], 1)
        return alone.transpose(1, 2).reshape(-1, query.shape[1] * query.shape[-1]), None

    config, random = twin.config(), torch.Generator().manual_seed(0)
    config._attn_implementation = _NAME
    with (
        _attending(attend),
        running(twin.path, "with layers that run on random weights"),
        torch.no_grad(),
    ):
        with no_init_weights():  # memory that is not written is not resident
            base = twin.base_class(config).float().eval()
        # Distance in the row between two neighbours along an axis, the last axis first.
        steps = (1, 3, 5, 7, 11)
        sizes = [[*zip(reversed(weight.shape), steps)] for weight in base.parameters()]
        row = 0.1 * torch.randn(
            max(1 + sum((n - 1) * step for n, step in size) for size in sizes), generator=random
        )
        for weight in base.parameters():
            weight.data = row.as_strided(weight.shape, steps[: weight.ndim][::-1])
        tokens = torch.arange(_TOKENS)[None] % config.get_text_config().vocab_size
        ids, positions = (torch.cat([x, x.flip(1)]) for x in (tokens, tokens + 2))
        there, back = base(
            input_ids=ids, position_ids=positions, use_cache=False, return_dict=False
        )[0]
    return torch.allclose(
        there, back.flip(0), rtol=1e-3, atol=1e-3 * float(there.abs().max()), equal_nan=True
    )


@contextlib.contextmanager
def _attending(function: Callable[..., Any]) -> Iterator[None]:
    """Register ``function`` as the attention of this module with transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, function)
    try:
        yield
    finally:
        del type(ALL_ATTENTION_FUNCTIONS)._global_mapping[_NAME]


def _layers(calls: list[Call], config: Any, engine: Engine) -> Iterator[str]:
    """Yield every call that the engine's own attention could not replace."""
    numbers = [getattr(call.module, "layer_idx", None) for call in calls]
    if numbers != list(range(config.num_hidden_layers)):
        yield (
            f"attention: layers {numbers} called ALL_ATTENTION_FUNCTIONS, expected each of 0 to "
            f"{config.num_hidden_layers - 1} once, in its module's layer_idx"
        )
        return
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shapes = [(1, n, _TOKENS, size) for n in (heads, kv_heads, kv_heads)]
    if getattr(config, "sliding_window", None) is not None and not getattr(
        config, "layer_types", None
    ):
        yield (
            "config.json: layer_types: missing beside sliding_window; "
            "it states which layers have the window"
        )
    for number, call in enumerate(calls):
        for name, shape in zip(("query", "key", "value"), shapes):
            if getattr(call, name) != shape:
                yield (
                    f"layer {number}: {name}: got {getattr(call, name)}, "
                    f"{engine} expects {shape} of config.json"
                )
        yield from (
            f"layer {number}: {problem}"
            for problem in _options(call, number, size, config=config, engine=engine)
        )


def _options(call: Call, number: int, size: int, config: Any, engine: Engine) -> Iterator[str]:
    types = getattr(config, "layer_types", None)
    window = config.sliding_window if types and types[number] == "sliding_attention" else None
    cap = getattr(config, "attn_logit_softcapping", None) if engine == "vllm" else None
    for name, expected in (("sliding_window", window), ("softcap", cap)):
        if (got := call.options.get(name)) != expected:
            yield f"{name}: got {got!r}, {engine} would take {expected!r}"
    if call.mask is not None:
        yield f"attention_mask: got a mask of the twin's own, which {engine} ignores"
    if not getattr(call.module, "is_causal", True):
        yield "is_causal: got False, expected causal attention"
    scale = call.options.get("scaling")
    source = inspect.getsource(type(call.module).forward)
    if (
        engine == "vllm"
        and scale not in (None, size**-0.5)
        and not re.search(r"\bscaling\s*=", source)
    ):
        yield (
            "scaling: vLLM reads it in forward's source, "
            "where it expects `scaling=self.<attribute>`"
        )
    if engine == "sglang" and call.options.get("s_aux") is not None:
        yield "s_aux: SGLang's Transformers backend has no attention sinks"
    if engine == "sglang" and _NAME not in call.options:
        yield (
            "**kwargs: forward's must reach the attention function; "
            "SGLang passes its batch through them"
        )


def _head(twin: Twin, config: Any, engine: Engine) -> Iterator[str]:
    """Yield how logits differ from the head applied to the result of ``model``.

    Only the scale and the cap that config.json states are allowed.
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Head(torch.nn.Module):
        def forward(self, x):
            asked.append(x)
            return given[:, -x.shape[1] :]

    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _TOKENS, config.hidden_size, generator=random)
    given = torch.randn(1, _TOKENS, config.vocab_size, generator=random)
    asked: list[Any] = []
    model = twin.whole()
    rows = tuple(getattr(model, HEAD).weight.shape)
    if rows != (config.vocab_size, config.hidden_size):
        expected = (config.vocab_size, config.hidden_size)
        yield f"{HEAD}.weight: got {rows}, {engine} expects {expected} of config.json"
        return
    output = BaseModelOutputWithPast(last_hidden_state=hidden)
    getattr(model, BASE).forward = lambda *_, **__: output
    setattr(model, HEAD, Head())
    with (
        running(twin.path, f"with a forward that passes the result of `{BASE}` to `{HEAD}`"),
        torch.no_grad(),
    ):
        logits = model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long), use_cache=False).logits
    if len(asked) != 1 or asked[0].shape != hidden.shape or not torch.equal(asked[0], hidden):
        yield f"{HEAD}: expected to be called once, with what `{BASE}` returns, unchanged"
    elif logits.shape != given.shape or not torch.allclose(
        logits.float(), _logits(given, config, engine), atol=1e-5
    ):
        yield (
            f"logits: expected {HEAD}'s, times config.json's logit_scale, "
            "capped by its final_logit_softcapping"
        )


def _logits(given: Any, config: Any, engine: Engine) -> Any:
    scale, cap = (
        getattr(config, name, None) for name in ("logit_scale", "final_logit_softcapping")
    )
    # SGLang scales before the cap, vLLM after it.
    first, last = (scale or 1.0, 1.0) if engine == "sglang" else (1.0, scale or 1.0)
    given = given * first
    return last * (given if cap is None else (given / cap).tanh() * cap)


def _norms(twin: Twin) -> Iterator[str]:
    """Yield every class named ...RMSNorm that does not compute it.

    SGLang replaces all classes of such names with an RMSNorm of its own.
    """
    import torch

    random = torch.Generator().manual_seed(0)
    seen: set[type] = set()
    for module in twin.whole().modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm") or kind in seen:
            continue
        seen.add(kind)
        names = [name for name, _ in module.named_parameters()]
        if names != ["weight"]:
            yield (
                f"{kind.__name__}: parameters {names}, "
                "but SGLang takes it by its name for an RMSNorm with a weight"
            )
            continue
        norm = copy.deepcopy(module).to_empty(device="cpu").float()
        weight, x = (
            torch.randn(shape, generator=random)
            for shape in (norm.weight.shape, (1, 3, *norm.weight.shape))
        )
        norm.weight.data.copy_(weight)
        eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 1e-6
        theirs = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + _offset(kind))
        with running(twin.path, f"with a {kind.__name__} that runs"), torch.no_grad():
            ours = norm(x)
        if not torch.allclose(ours, theirs, atol=1e-5):
            yield (
                f"{kind.__name__}: SGLang takes it by its name for an RMSNorm, "
                "which it does not compute; rename it"
            )


def _offset(kind: type) -> float:
    """Return 1 where SGLang treats a class as Gemma's norm, else 0.

    It does so for a class with a weight that begins as zeros.
    """
    try:
        begun = getattr(kind(1), "weight", None)
    except TypeError:  # SGLang also calls it with one number, and ignores this error
        return 0.0
    return float(begun is not None and not begun.any())
