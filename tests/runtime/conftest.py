"""Fixture: a free port on which processes connect."""

import socket

import pytest


@pytest.fixture
def free_port():
    """A port of 127.0.0.1 that was free just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
