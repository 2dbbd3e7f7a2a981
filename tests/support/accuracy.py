"""The rule by which an implementation is judged, from `ecar_kernels.testing`."""

from ecar_kernels.testing import (  # noqa: F401
    assert_accurate,
    error,
    largest_error,
    run,
    tensors,
    ulp,
)
