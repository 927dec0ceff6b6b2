"""Updates of the weights over HTTP, sleep and wake_up: keys, results, failed updates."""

import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from slipway.checkpoint import files
from slipway.checkpoint.shards import write_safetensors
from slipway.engine.params import SamplingParams
from slipway.llm import LLM, NANO
from tests.server.conftest import Server, events

pytestmark = pytest.mark.xdist_group("server")
PROMPT = "def fibonacci(n):\n    "
ADMIN = {"Authorization": "Bearer boss"}
USER = {"Authorization": "Bearer user"}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Directory of nano with changed weights, and the texts of both before and after."""
    directory = tmp_path_factory.mktemp("other") / "nano"
    shutil.copytree(NANO, directory)
    llm = LLM(load_format="auto", dtype="float32", max_num_seqs=8, max_num_batched_tokens=64)
    rng = np.random.default_rng(0)
    tensors = {}
    checkpoint = files.open_checkpoint(directory)
    for name in checkpoint.tensors:
        array = np.array(checkpoint.array(name))
        noise = rng.normal(size=array.shape) * 0.5 * array.astype(np.float32).std()
        tensors[name] = (array.astype(np.float32) + noise).astype(np.float32)
    write_safetensors(directory / "model.safetensors", tensors)
    params = SamplingParams(temperature=0, max_tokens=12)
    before = llm.generate(PROMPT, params)[0].outputs[0].text
    llm.update_weights(directory)
    after = llm.generate(PROMPT, params)[0].outputs[0].text
    llm.close()
    assert before != after
    return directory, before, after


@pytest.fixture(scope="module")
def admin(tmp_path_factory):
    server = Server(
        tmp_path_factory.mktemp("admin"), "--admin-api-key", "boss", "--api-key", "user"
    )
    server.http.headers.update(ADMIN)
    try:
        yield server.wait_ready()
        server.wait_idle()
        assert server.stop() == 0
    finally:
        server.process.kill()


@pytest.fixture
def fresh(admin):
    """Server with nano's own weights, before and after the test."""
    load_nano(admin)
    yield admin
    load_nano(admin)


def load_nano(server):
    """Load nano's own weights."""
    answer = server.post("/update_weights_from_disk", model_path=str(NANO), weight_version="nano")
    assert answer.status_code == 200, answer.text


def greedy(server):
    """Return the choice that the server generates for PROMPT."""
    return server.choice(prompt=PROMPT)


def test_without_an_admin_key_the_routes_do_not_exist(server):
    for path in (
        "/update_weights_from_disk",
        "/weights/begin",
        "/weights/update",
        "/weights/finish",
        "/sleep",
    ):
        assert server.post(path, model_path=str(NANO)).status_code == 404
    assert server.http.get("/weights_version").json()["weights_version"] == "0"


def test_only_an_admin_changes_weights(fresh, other):
    for headers in (USER, {"Authorization": ""}, {"Authorization": "Bearer bos"}):
        for path in (
            "/update_weights_from_disk",
            "/weights/begin",
            "/weights/update?update_id=x",
            "/sleep",
            "/wake_up",
        ):
            answer = fresh.http.post(path, json={"model_path": str(other[0])}, headers=headers)
            assert answer.status_code == 401, (path, answer.text)
    assert fresh.http.get("/weights_version", headers=USER).json()["weights_version"] == "nano"
    body = {"prompt": "a", "max_tokens": 1}
    assert fresh.http.post("/v1/completions", json=body, headers=USER).status_code == 200


def test_update_from_disk(fresh, other):
    directory, before, after = other
    assert greedy(fresh) | {"text": before, "weights_version": "nano"} == greedy(fresh)
    answer = fresh.post(
        "/update_weights_from_disk", model_path=str(directory), weight_version="v7"
    ).json()
    assert answer["success"] is True
    assert answer["weights_version"] == "v7"
    assert greedy(fresh) | {"text": after, "weights_version": "v7"} == greedy(fresh)
    version = fresh.http.get("/weights_version").json()
    assert version == {"weights_version": "v7", "engines": {"engine-0": "v7"}}
    stream = fresh.post("/v1/completions", prompt=PROMPT, max_tokens=3, stream=True)
    last = [event for event in events(stream) if event.get("choices")][-1]["choices"][0]
    assert last["weights_version"] == "v7"
    chat = fresh.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=2
    ).json()
    assert chat["choices"][0]["weights_version"] == "v7"
    unnamed = fresh.post("/update_weights_from_disk", model_path=str(directory)).json()
    assert unnamed["weights_version"].isdigit()


def test_openapi_describes_the_body_of_an_update(fresh):
    operation = fresh.http.get("/openapi.json").json()["paths"]["/weights/update"]["post"]
    assert list(operation["requestBody"]["content"]) == ["application/octet-stream"]
    assert [each["name"] for each in operation["parameters"]] == ["update_id"]


def test_update_in_pieces(fresh, other):
    directory, _, after = other
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    begun = fresh.post("/weights/begin", version="sent", policy="recompute").json()["update_id"]
    for part in (names[::2], names[1::2]):
        body = save({name: tensors[name] for name in part})
        answer = fresh.http.post("/weights/update", params={"update_id": begun}, content=body)
        assert answer.status_code == 200, answer.text
    assert answer.json()["tensors_in_all"] == len(names)
    assert greedy(fresh)["weights_version"] == "nano", "nothing changes before the end"
    answer = fresh.post("/weights/finish", update_id=begun)
    assert answer.status_code == 200, answer.text
    assert greedy(fresh) | {"text": after, "weights_version": "sent"} == greedy(fresh)
    assert fresh.post("/weights/finish", update_id=begun).status_code == 400, (
        "an update can be applied once only"
    )


def test_a_failed_update_is_explained_and_keeps_the_old_weights(fresh, other, tmp_path):
    directory, before, _ = other
    tensors = load_file(directory / "model.safetensors")
    answer = fresh.post("/update_weights_from_disk", model_path="/no/such/place")
    assert answer.status_code == 400
    assert "no such directory" in answer.json()["error"]["message"]
    for field, value in (
        ("policy", "soon"),
        ("mode", "x"),
        ("load_format", "dummy"),
        ("flush_cache", False),
    ):
        answer = fresh.post(
            "/update_weights_from_disk", model_path=str(directory), **{field: value}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
    shutil.copytree(directory, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(
        json.dumps(config | {"architectures": ["SomethingElse"]})
    )
    answer = fresh.post("/update_weights_from_disk", model_path=str(tmp_path / "other"))
    assert answer.status_code == 400
    assert "SomethingElse" in answer.json()["error"]["message"]
    first = fresh.post("/weights/begin").json()["update_id"]
    second = fresh.post("/weights/begin").json()["update_id"]

    def send(body, name=second):
        return fresh.http.post("/weights/update", params={"update_id": name}, content=body)

    assert send(save({"a": np.zeros(2)}), first).status_code == 400, "another update has begun"
    assert send(b"no safetensors").status_code == 400
    assert send(save({"model.norm.weight": tensors["model.norm.weight"]})).status_code == 200
    twice = send(save({"model.norm.weight": tensors["model.norm.weight"]}))
    assert twice.status_code == 400
    assert "sent twice" in twice.json()["error"]["message"]
    bad = np.full_like(tensors["model.embed_tokens.weight"], np.inf)
    assert send(save({"model.embed_tokens.weight": bad, "extra": np.zeros(3)})).status_code == 200
    answer = fresh.post("/weights/finish", update_id=second)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "extra: unexpected" in message
    assert "not finite" in message
    assert "q_proj.weight: missing" in message
    assert greedy(fresh) | {"text": before, "weights_version": "nano"} == greedy(fresh)


def test_an_update_waits_for_running_requests_and_for_a_pause(fresh, other):
    directory, before, after = other
    found = {}
    long = {"prompt": PROMPT, "max_tokens": 300, "ignore_eos": True, "temperature": 0}
    runs = threading.Thread(
        target=lambda: found.update(fresh.post("/v1/completions", **long).json())
    )
    runs.start()
    while not fresh.metric("slipway_running"):
        time.sleep(0.005)
    answer = fresh.post(
        "/update_weights_from_disk",
        model_path=str(directory),
        weight_version="new",
        policy="continue",
    )
    assert answer.status_code == 200
    runs.join()
    choice = found["choices"][0]
    assert choice["weights_version"] == "new"
    assert choice["weights_versions"][0] == [0, "nano"]
    assert choice["weights_versions"][1][1] == "new"
    assert greedy(fresh)["text"] == after
    fresh.post("/pause")
    load_nano(fresh)
    fresh.post("/resume")
    assert greedy(fresh)["text"] == before


@pytest.mark.parametrize("level", [1, 2])
def test_sleep(fresh, other, level):
    directory, before, after = other
    assert greedy(fresh)["text"] == before
    assert fresh.post("/sleep", level=level).status_code == 200
    assert fresh.http.get("/readyz").status_code == 503
    assert fresh.http.get("/livez").status_code == 200
    answer = fresh.post("/v1/completions", prompt=PROMPT)
    assert answer.status_code == 503
    assert "sleeps" in answer.json()["error"]["message"]
    assert "retry-after" in answer.headers
    assert fresh.post("/sleep", level=3).status_code == 400
    assert fresh.post("/wake_up").status_code == 200
    if level == 2:
        assert fresh.http.get("/readyz").status_code == 503
        answer = fresh.post("/v1/completions", prompt=PROMPT)
        assert "no weights" in answer.json()["error"]["message"]
        fresh.post("/update_weights_from_disk", model_path=str(directory))
    assert fresh.http.get("/readyz").status_code == 200
    assert greedy(fresh)["text"] == (after if level == 2 else before)


def test_a_restarted_engine_loads_its_updated_weights_again(tmp_path, other):
    directory, _, after = other
    server = Server(tmp_path, "--admin-api-key", "boss")
    server.http.headers.update(ADMIN)
    try:
        server.wait_ready()
        tensors = load_file(directory / "model.safetensors")
        begun = server.post("/weights/begin", version="mine").json()["update_id"]
        server.http.post("/weights/update", params={"update_id": begun}, content=save(tensors))
        assert server.post("/weights/finish", update_id=begun).status_code == 200
        assert greedy(server)["text"] == after
        (pid,) = server.engine_pids()
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while server.http.get("/readyz").status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.wait_ready()
        assert greedy(server) | {"text": after, "weights_version": "mine"} == greedy(server)
        assert server.stop() == 0
    finally:
        server.process.kill()
