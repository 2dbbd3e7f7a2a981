"""The rule by which an implementation is judged, from `ecar_kernels.testing`."""

from ecar_kernels.testing import assert_accurate, error, largest_error, run, tensors, ulp  # noqa: F401
