"""The Triton kernels of the penalties in Triton's interpreter: test_penalties_triton.py runs this file."""

from __future__ import annotations

import pytest
import torch

from pykernels.ops.gaussian_warp import penalties_triton as kernels

from .penalty_cases import PROBLEMS, SUBSETS, Problem, check_float32, check_float64, error


@pytest.fixture(autouse=True)
def _poisoned(poisoned):
    pass


def test_kernels_are_interpreted():
    assert kernels.INTERPRETED


@pytest.mark.parametrize("problem", [*PROBLEMS, *SUBSETS], ids=str)
def test_float64(problem):
    check_float64(problem, "triton")


@pytest.mark.parametrize("problem", [*PROBLEMS[::3], *SUBSETS[::3], Problem((200, 300), batch=1)], ids=str)
def test_float32(problem):
    check_float32(problem, "triton")


def test_sizes_beyond_31_bits(monkeypatch):
    monkeypatch.setattr(kernels, "INT32_LIMIT", 0)
    for sizes in ((3000,), (40, 50), (7, 13, 31)):
        check_float64(Problem(sizes), "triton")


def test_strides_and_second_derivatives():
    problem = Problem((6, 7))
    flow, grads = problem.flow(), problem.grads()
    expected = problem.results(flow, grads, "triton")
    found = problem.results(flow.contiguous(memory_format=torch.channels_last), grads, "triton")
    assert all(map(torch.equal, found, expected))
    leaf = problem.flow().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda w: problem.run(w, "triton"), leaf, fast_mode=True)


def test_empty_batch_and_half_precision():
    problem = Problem(batch=0)
    values, gradient = problem.results(problem.flow(), problem.grads(), "triton")
    assert values.shape == (0,)
    assert gradient.shape == (0, 2, 4, 5)
    problem = Problem((30, 31))
    flow, grads = problem.flow(torch.float16), problem.grads(torch.float32)
    values, gradient = problem.results(flow, grads, "triton")
    expected = problem.results(flow.double(), problem.grads(), "reference")
    assert error(values, expected[0]) <= 1e-6
    assert error(gradient, expected[1]) <= torch.finfo(torch.float16).eps


def test_nan():
    problem = Problem((9, 9))
    flow, grads = problem.flow(), problem.grads()
    expected = problem.results(flow, grads, "triton")
    flow[0, 1, 4, 4] = torch.nan
    values, gradient = problem.results(flow, grads, "triton")
    assert values.isnan().tolist() == [True, False]
    assert torch.equal(gradient[1], expected[1][1])
    assert gradient[0, :, 4, 4].isnan().all()
    assert torch.equal(gradient[0, :, :3], expected[1][0, :, :3])
