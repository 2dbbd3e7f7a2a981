"""What the tests of `make gpu` share, on a machine without a GPU."""

import pytest


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Of the processes that this one starts, too."""
    for name in ("OUT", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
