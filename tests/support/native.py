"""What the tests of the C++ library share."""

import pytest

from ecar_kernels import _native

needs_native = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))
