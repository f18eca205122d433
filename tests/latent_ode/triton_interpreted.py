"""The Triton kernels in Triton's interpreter, on the CPU: test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from pykernels.ops.latent_ode import triton as kernels

from .triton_cases import OPTIONS, PIECES, SIZES, Mode, check_accuracy, check_float64, error


@pytest.mark.parametrize("mode", OPTIONS + SIZES + PIECES, ids=str)
def test_float64(mode: Mode):
    check_float64(mode, "cpu")
