"""Fuzzing by schemathesis: no data that the OpenAPI document allows, or nearly, causes a 5xx."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.xdist_group("server")


def test_no_request_data_causes_a_server_error(server, tmp_path):
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
        *("--checks", "not_a_server_error", "--phases", "coverage,fuzzing"),
        *("--max-examples", "25", "--request-timeout", "30", "--exclude-path", "/pause"),
        *("--seed", "7", "--no-color"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-5000:]
    assert "cases:" in run.stdout
    assert server.http.get("/readyz").status_code == 200
    assert server.complete(prompt="def f(")["choices"], "the engine must still run"
