"""What some tests cannot do without."""

from __future__ import annotations

import pytest

import anyflow_kernels
from anyflow_kernels import _native

needs_extension = pytest.mark.skipif(
    _native.extension is None, reason=anyflow_kernels.describe().splitlines()[-1].replace("%", "%%")
)
