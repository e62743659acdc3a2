"""What every test shares: the import path, one thread, no network, a full disk, and the marker for slow tests."""
import os
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("DUAL_LORA_SHARED") or ROOT.parent / "shared") / "data"  # published vocabularies and texts
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: toys are slower with more


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; runs only with --slow")


def pytest_runtest_setup(item):
    if "slow" in item.keywords and not item.config.getoption("--slow"):
        pytest.skip("slow: run with --slow")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for another machine fails by name, instead of passing only where there is a network."""
    connect = socket.socket.connect

    def only_loopback(sock, address):
        if sock.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to connect to {address}")
        return connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", only_loopback)


@pytest.fixture
def full_disk(monkeypatch):
    """Call it, and torch.save runs out of space midway."""
    def save(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    return lambda: monkeypatch.setattr("torch.save", save)
