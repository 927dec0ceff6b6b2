"""Bytes that reach the files: the same with the page cache and without it."""

import errno
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from slipway.checkpoint.copying import on_a_page
from slipway.checkpoint.shards import PAGE, Spec
from slipway.convert.writer import SafetensorsWriter

pytestmark = pytest.mark.host
SIZES = (1, 63, 64, PAGE // 2, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 640, 17 * PAGE, 5 * PAGE - 1)


@pytest.mark.parametrize("refuses", ["nothing", "opening", "writing"])
def test_every_byte_is_written_whatever_the_file_system_can(tmp_path, monkeypatch, refuses):
    past, opened, wrote = set(), os.open, os.pwrite
    counts = {True: 0, False: 0}

    def open_(path, flags, *rest, **options):
        if flags & os.O_DIRECT and refuses == "opening":
            raise OSError(errno.EINVAL, "no such thing here")
        file = opened(path, flags, *rest, **options)
        if flags & os.O_DIRECT:
            past.add(file)
        return file

    def pwrite(file, data, offset):
        counts[file in past] += len(data)
        if file in past and refuses == "writing":
            raise OSError(errno.EINVAL, "not aligned as wanted")
        return wrote(file, data, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.integers(0, 256, size).astype(np.uint8) for i, size in enumerate(SIZES)}
    specs = {name: Spec(np.dtype(np.uint8), tensor.shape) for name, tensor in tensors.items()}
    writer = SafetensorsWriter(tmp_path / "out", specs, 20 * PAGE, "test", False)
    memory = on_a_page(2 * PAGE)
    for name, tensor in tensors.items():
        writer.write(name, _pieces(tensor, memory))
    writer.finish()
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    whole = sum(size - size % PAGE for size in SIZES if not size % PAGE)
    if past and refuses == "nothing":
        assert counts[True] >= whole and counts[False] < sum(SIZES), "whole pages, past the cache"


def _pieces(tensor, memory):
    for start in range(0, tensor.size, memory.size):
        part = tensor[start : start + memory.size]
        memory[: part.size] = part
        yield start, memory[: part.size]
