"""A GPU that is not there (tools.fake_gpu), in processes of their own: tests/test_fake_gpu.py.

Elsewhere these files are not collected: a process that has Triton's interpreter, or a real GPU,
cannot have a fake one.
"""

import os

import pytest

if "ECAR_FAKE_GPU" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def gpus():
    """An H100 as cuda:0, an RTX 5090 as cuda:1; kernels are not compiled."""
    from tools.fake_gpu import H100, FakeGPU, chip_of

    with FakeGPU(H100, chip_of(120), compile_kernels=False) as found:
        yield found
