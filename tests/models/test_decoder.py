"""An architecture that Slipway does not have, added by a registry entry of less than 40 lines."""

from pathlib import Path

import numpy as np
import pytest

from slipway import models
from slipway.errors import UnsupportedModel
from tests.models import mistral
from tests.models.runner import (
    Case,
    Forward,
    make_checkpoint,
    our_tokens,
    prompts,
    their_logits,
    their_tokens,
)

ARCHITECTURE = "MistralForCausalLM"


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, ARCHITECTURE, mistral.MISTRAL)


@pytest.mark.parametrize("window", [None, 24])
def test_a_new_architecture_computes_transformers_logits_and_tokens(registered, window, tmp_path):
    theirs = make_checkpoint(Case("mistral", "mistral", {"sliding_window": window}), tmp_path)
    forward = Forward(tmp_path)
    for prompt in prompts():
        expected = their_logits(theirs, prompt)
        np.testing.assert_allclose(forward(prompt), expected, atol=1e-4)
        if len(prompt) > 30:
            np.testing.assert_allclose(forward(prompt, [20, len(prompt) - 20]), expected, atol=1e-4)
    asked = [prompt for prompt in prompts() if len(prompt) > 2]
    assert our_tokens(tmp_path, asked) == [their_tokens(theirs, prompt) for prompt in asked]


def test_it_takes_less_than_forty_lines():
    assert len(Path(mistral.__file__).read_text().splitlines()) < 40


def test_without_its_entry_it_is_refused_by_name(tmp_path):
    make_checkpoint(Case("mistral", "mistral", {}), tmp_path)
    with pytest.raises(UnsupportedModel, match=ARCHITECTURE):
        our_tokens(tmp_path, [[1, 2, 3]])
