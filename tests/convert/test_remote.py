"""Checkpoints at gs:// and s3:// addresses, on servers of 127.0.0.1.

They give the same bits as on the disk, or one error.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slipway import errors
from slipway.convert import remote
from slipway.convert.conversion import ConvertConfig, convert
from slipway.convert.formats import open_source
from slipway.convert.source import Source, fingerprint
from tests.convert import buckets
from tests.convert.twins import MAXTEXT, assert_same, tensors

TREES = {"llama_scan_orbax": "hf_llama", "qwen3_unscan_orbax": "hf_qwen3"}


@pytest.fixture(scope="module")
def held() -> dict[str, buckets.Objects]:
    """Contents of both kinds of bucket."""
    objects: buckets.Objects = {"runs of may/": b"", "runs of mayhem/x": b"x", "plain.npz": b"PK"}
    for name in (*TREES, *TREES.values()):
        objects |= buckets.files(MAXTEXT / name, f"runs of may/{name}")
    step = MAXTEXT / "qwen3_unscan_orbax" / "0"
    objects |= buckets.files(step, "runs of may/qwen3_unscan_orbax/7")
    objects["runs of may/qwen3_unscan_orbax/9/items/_METADATA"] = b"{}"
    llama = buckets.files(MAXTEXT / "llama_scan_orbax", "torn")
    objects |= {
        name: body[: len(body) // 2] if "/d/" in name else body for name, body in llama.items()
    }
    objects |= buckets.files(MAXTEXT / "llama_scan_orbax", "copy")
    objects["runs of may/hf_llama/special_tokens_map.json"] = (
        b"{}"  # shorter than a safetensors file's first field
    )
    objects["short/model.safetensors"] = (MAXTEXT / "hf_qwen3" / "model.safetensors").read_bytes()[
        :-100
    ]
    objects["odd/model.safetensors"] = b"\x03\0\0\0\0\0\0\0[1]"
    return {"a-bucket": objects}


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """Requests that the GCS server received."""
    return []


@pytest.fixture(scope="module", params=["gs", "s3"])
def scheme(request, held, asked, tmp_path_factory) -> Iterator[str]:
    """Address scheme of a running server, to which the environment points."""
    none = str(tmp_path_factory.mktemp("aws") / "none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", buckets.TOKEN)
        for name, value in (
            ("ACCESS_KEY_ID", "key"),
            ("SECRET_ACCESS_KEY", "secret"),
            ("DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(f"AWS_{name}", value)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, none)
        with buckets.gcs(held, asked) if request.param == "gs" else buckets.s3(held) as url:
            patch.setenv(
                "TENSORSTORE_GCS_HTTP_URL" if request.param == "gs" else "AWS_ENDPOINT_URL", url
            )
            yield request.param


@pytest.mark.parametrize(
    ("tree", "below"), [("llama_scan_orbax", ""), ("qwen3_unscan_orbax", "/7/items/")]
)
def test_orbax_in_a_bucket_is_orbax_on_the_disk(scheme, tree, below, tmp_path):
    options = ConvertConfig(config=MAXTEXT / TREES[tree])
    address = f"{scheme}://a-bucket/runs of may/{tree}{below}"
    convert(open_source(address), tmp_path / "there", options)
    convert(open_source(MAXTEXT / tree), tmp_path / "here", options)
    assert_same(tensors(tmp_path / "there"), tensors(tmp_path / "here"))
    assert (tmp_path / "there/config.json").read_text() == (
        tmp_path / "here/config.json"
    ).read_text()


def test_the_newest_complete_step_is_read(scheme, asked):
    asked.clear()
    source = open_source(f"{scheme}://a-bucket/runs of may/qwen3_unscan_orbax")
    assert "/7/items:" in source.stamp, "neither the older 0 nor the incomplete 9"
    assert not [path for path in asked if "orbax%2F0%2F" in path and "alt=media" in path]


def test_an_hf_directory_in_a_bucket_goes_the_way_back(scheme, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(remote, "PIECE_BYTES", 1000)
    source = open_source(f"{scheme}://a-bucket/runs of may/hf_llama/")
    # config.json is that of the directory.
    convert(source, tmp_path / "there", ConvertConfig(to="maxtext"))
    convert(open_source(MAXTEXT / "hf_llama"), tmp_path / "here", ConvertConfig(to="maxtext"))
    there, here = open_source(tmp_path / "there"), open_source(tmp_path / "here")
    assert_same(arrays(there), arrays(here))
    again = open_source(source.location)
    assert fingerprint(again) == fingerprint(source), "--resume knows it again"
    del source, again
    gc.collect()
    assert not list(tmp_path.glob("slipway-*")), "the copies are gone"


def test_a_tree_that_was_rewritten_is_not_gone_on_with(scheme, held):
    address, name = f"{scheme}://a-bucket/copy", "copy/0/items/_METADATA"
    before = fingerprint(open_source(address))
    assert fingerprint(open_source(address)) == before
    held["a-bucket"][name] += b" "
    if scheme == "s3":
        buckets.put_s3(os.environ["AWS_ENDPOINT_URL"], "a-bucket", {name: held["a-bucket"][name]})
    assert fingerprint(open_source(address)) != before
    elsewhere = open_source(f"{scheme}://a-bucket/runs of may/llama_scan_orbax")
    assert fingerprint(elsewhere) != before, "of the same shapes"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("://no-such-bucket/x", "nothing lies there|NoSuchBucket|NOT_FOUND|404"),
        ("://a-bucket/runs", "nothing lies there"),
        ("://a-bucket/runs of may/qwen3_unscan_orbax/9", "no arrays found"),
        ("://a-bucket/plain.npz", "copy anything else to a local directory"),
        ("://a-bucket/runs of mayhem", "expected an Orbax checkpoint or an HF directory"),
        ("://a-bucket/short", "model.safetensors: 1 problem\n  - cannot be copied: OUT_OF_RANGE"),
        ("://a-bucket/odd", "cannot be copied: the header is not safetensors'"),
        ("://X/y", "cannot be listed: .*bucket"),
        ("://", "expected a local path, gs://bucket/path or s3://bucket/path"),
    ],
)
def test_what_is_not_there_or_not_read(scheme, address, told, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(errors.CheckpointError, match=told) as raised:
        open_source(f"{scheme}{address}")
    assert len(raised.value.problems) == 1
    assert not list(tmp_path.iterdir())


def test_a_torn_store(scheme, tmp_path):
    with pytest.raises(errors.CheckpointError):
        convert(
            open_source(f"{scheme}://a-bucket/torn"),
            tmp_path / "out",
            ConvertConfig(config=MAXTEXT / "hf_llama"),
        )
    assert not (tmp_path / "out").exists()


def test_without_permission_the_store_says_so(tmp_path, held):
    """Run in a process of its own: tensorstore keeps a token as long as it runs."""
    with buckets.gcs(held, []) as url:
        told = command(
            "gs://a-bucket/torn",
            tmp_path,
            GOOGLE_AUTH_TOKEN_FOR_TESTING="x",
            TENSORSTORE_GCS_HTTP_URL=url,
        )
    assert told.returncode == 2
    assert (
        "slipway: CheckpointError: gs://a-bucket/torn: 1 problem\n  - cannot be read: "
        "PERMISSION_DENIED"
    ) in told.stderr
    assert "Traceback" not in told.stderr


def test_the_command_reads_a_bucket_or_refuses(scheme, tmp_path):
    tree = f"{scheme}://a-bucket/runs of may/llama_scan_orbax"
    told = command(tree, tmp_path / "out", "--config", str(MAXTEXT / "hf_llama"))
    assert told.returncode == 0, told.stderr
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_llama"))
    told = command(f"{scheme}://a-bucket/runs", tmp_path / "none")
    assert told.returncode == 2
    assert "Traceback" not in told.stderr
    assert "nothing lies there" in told.stderr


@pytest.mark.parametrize("out", ["gs://a-bucket/out", "s3://a-bucket/out"])
def test_nothing_is_written_to_buckets(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.InvalidConfig, match=r"out_dir: .*expected a local directory"):
        convert(open_source(MAXTEXT / "hf_llama"), Path(out), ConvertConfig(to="maxtext"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["http://host/x", "hdfs://host/x", "gcs://a-bucket/x"])
def test_other_addresses(address):
    with pytest.raises(
        errors.CheckpointError, match="expected a local path, gs://bucket/path or s3://bucket/path"
    ):
        open_source(address)


def command(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `slipway convert` in a process of its own."""
    call = [
        sys.executable,
        "-c",
        "from slipway.cli import main; main()",
        "convert",
        *map(str, words),
    ]
    return subprocess.run(
        call, capture_output=True, text=True, env=os.environ | variables, check=False
    )


def arrays(source: Source) -> dict[str, np.ndarray]:
    """Return all arrays of a source."""
    held = {}
    for name in source.specs:
        with source.open(name) as array:
            held[name] = array.copy()
    return held


def test_an_empty_access_key_counts_as_unset(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    assert "aws_credentials" not in remote.store_spec("s3", "bucket", "")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA")
    assert remote.store_spec("s3", "bucket", "")["aws_credentials"] == {"type": "environment"}
