"""What every test shares: threads, fresh but reproducible random inputs, the `gpu` marker.

Triton's kernels are interpreted where there is no GPU to compile them for.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each worker; it has to be said before torch starts its pool.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may depend on a server.
os.environ["HF_HUB_OFFLINE"] = "1"

import random
import secrets
import signal

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: before any test imports one. The commands that
    # tests run inherit it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As nohup and a script's & leave it, for the commands that tests run, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

SEED_VARIABLE = "ECAR_TEST_SEED"
SEED = pytest.StashKey[int]()

# derandomize is spelt out because Hypothesis would turn it on where it sees CI.
hypothesis.settings.register_profile(
    "fresh", deadline=None, max_examples=50, derandomize=False, print_blob=True
)
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("fresh"), max_examples=1000
)
hypothesis.settings.register_profile(
    "quick", hypothesis.settings.get_profile("fresh"), max_examples=5
)
hypothesis.settings.load_profile("fresh")


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    reason = f"needs a CUDA GPU; torch {torch.__version__} sees none here"
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seeds every generator anew for each test, before its fixtures run."""
    given = os.environ.get(SEED_VARIABLE)
    seed = secrets.randbits(32) if given is None else int(given)
    item.stash[SEED] = seed
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and SEED in item.stash:
        report.sections.append(
            ("random inputs", f"{SEED_VARIABLE}={item.stash[SEED]} repeats this test's inputs")
        )
    return report


@pytest.fixture
def seed(request) -> int:
    """The test's own seed, for generators that it makes itself."""
    return request.node.stash[SEED]


@pytest.fixture
def generator(seed) -> torch.Generator:
    """A CPU generator seeded for this test."""
    return torch.Generator().manual_seed(seed)
