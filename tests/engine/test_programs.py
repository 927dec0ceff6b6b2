"""Programs of a step, as they are given to XLA."""

import jax

from slipway import LLM


def test_no_program_has_an_empty_constant(tiny, monkeypatch):
    """jaxlib 0.11.2 crashes on an empty constant of a program for several devices."""
    texts, compile_ = [], jax.stages.Lowered.compile

    def recorded(lowered, *args, **kwargs):
        texts.append(lowered.as_text())
        return compile_(lowered, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", recorded)
    LLM(tiny, max_num_seqs=4, max_num_batched_tokens=8, page_size=4, tensor_parallel_size=2)
    assert any("jit__sample" in text for text in texts)
    assert [text for text in texts if "constant dense<>" in text] == []
