"""Files with the original model's logits, and both programs that compare with them."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from slipway import expected_logits
from slipway.convert.conversion import ConvertConfig, convert
from slipway.convert.formats import open_source
from slipway.errors import CheckpointError, InvalidConfig

DATA = Path(__file__).parent / "data" / "maxtext" / "llama3_default_rope_orbax"
IDS, LOGITS = np.load(DATA / "ids.npy"), np.load(DATA / "logits.npy")
READ = expected_logits.Expected(
    ids=np.atleast_2d(IDS).astype(np.int64),
    logits=LOGITS.reshape(-1, IDS.shape[-1], 96),
)


def files(folder, ids, logits):
    for name, array in (("ids", ids), ("logits", logits)):
        np.save(folder / f"{name}.npy", array)
    return folder / "ids.npy", folder / "logits.npy"


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return converted("maxtext-halves", tmp_path_factory.mktemp("right"))


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    return converted("maxtext-interleaved", tmp_path_factory.mktemp("wrong"))


def converted(mapping, folder):
    given = json.loads((DATA / "config.json").read_text())
    convert(open_source(DATA), folder / "out", ConvertConfig(mapping=mapping), given)
    return folder / "out"


@pytest.mark.host
def test_one_row_of_ids_and_bfloat16_are_read(tmp_path):
    logits = READ.logits[0].astype(ml_dtypes.bfloat16)
    found = expected_logits.read(*files(tmp_path, READ.ids[0], logits))
    assert found.ids.shape == READ.ids[:1].shape
    assert found.logits.dtype == np.float32
    np.testing.assert_allclose(found.logits, READ.logits[:1], rtol=2**-8)


@pytest.mark.host
@pytest.mark.parametrize(
    ("ids", "logits", "told"),
    [
        (READ.ids.astype(np.float32), READ.logits, "integers"),
        (READ.ids[:, :-1], READ.logits, "logits for ids of shape"),
        (READ.ids, READ.logits[0, 0], "floats"),
        (READ.ids, READ.logits * np.nan, "finite"),
        (READ.ids + 96, READ.logits, "ids from 0 to 95"),
        (READ.ids[:0], READ.logits[:0], "integers"),
    ],
    ids=["floats", "lengths", "rank", "nan", "beyond", "none"],
)
def test_files_that_do_not_belong_together_are_refused(ids, logits, told, tmp_path):
    with pytest.raises(InvalidConfig, match=told):
        expected_logits.read(*files(tmp_path, ids, logits))


@pytest.mark.parametrize("program", ["transformers", "slipway"])
def test_both_programs_see_the_wrong_rule(program, right, wrong, monkeypatch):
    if program == "slipway":
        monkeypatch.setattr(expected_logits.importlib.util, "find_spec", lambda name: None)
    found = expected_logits.compare(right, READ, 1e-4)
    assert found.program == program
    assert found.max_difference < 1e-4
    assert found.same_argmax == 1
    with pytest.raises(CheckpointError, match=f"in {program} differ from the original's"):
        expected_logits.compare(wrong, READ, 1e-3)


def test_another_vocabulary_is_refused(right):
    padded = expected_logits.Expected(READ.ids, np.pad(READ.logits, ((0, 0), (0, 0), (0, 32))))
    with pytest.raises(InvalidConfig, match=r"128 tokens.*96"):
        expected_logits.compare(right, padded, 1e-3)
