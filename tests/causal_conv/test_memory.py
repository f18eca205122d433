"""Where the operators read and write: strides, uninitialised outputs, and what lies beside a tensor in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pykernels.ops import BlockWeights, causal_conv1d, causal_conv_stack, weight_norm

from ..guarded import check_guarded
from .cases import CASES, FEW, Case, assert_agree, definition, results
from .modes import FEW_MODES, MODES, Mode, define

NAN = float("nan")


def inside(t: Tensor) -> Tensor:
    """The values of ``t``, as a view into memory that holds NaN everywhere around it and between its rows."""
    buffer = t.new_full([n + 6 for n in t.shape], NAN)
    view = buffer[(slice(3, -3),) * t.dim()]
    return view.copy_(t)


def every_second(t: Tensor) -> Tensor:
    view = t.new_full([2 * n for n in t.shape], NAN)[(slice(None, None, 2),) * t.dim()]
    return view.copy_(t)


def last_dimension_first(t: Tensor) -> Tensor:
    return inside(t.movedim(-1, 0)).movedim(0, -1)


def first_dimension_last(t: Tensor) -> Tensor:
    return inside(t.movedim(0, -1)).movedim(-1, 0)


def odd_offset(t: Tensor) -> Tensor:
    buffer = t.new_full((t.numel() + 14,), NAN)
    return buffer.as_strided(t.shape, t.contiguous().stride(), 7).copy_(t)


def negated(t: Tensor) -> Tensor:
    view = torch._neg_view(inside(-t))
    assert view.is_neg()
    return view


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    inside,
    every_second,
    last_dimension_first,
    first_dimension_last,
    odd_offset,
    negated,
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_any_strides(case: Case, dtype, layout, capability):
    """The same bits as for contiguous tensors, whichever argument is laid out otherwise, and if all are."""
    tensors, grad = case.tensors(dtype), case.grad(dtype)
    expected = results(causal_conv1d, tensors, grad, backend="cpu", **case.options())
    assert all(t.isfinite().all() for t in expected.values())
    for changed in [{name} for name in (*tensors, "grad")] + [{*tensors, "grad"}]:
        views = {name: layout(t) if name in changed else t for name, t in tensors.items()}
        grad_view = layout(grad) if "grad" in changed else grad
        actual = results(causal_conv1d, views, grad_view, backend="cpu", **case.options())
        for name, t in actual.items():
            assert torch.equal(t, expected[name]), (changed, name)
    assert actual["y"].is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", FEW_MODES, ids=str)
def test_any_strides_in_every_mode(mode: Mode, layout, capability):
    """Also of the state, the offsets and the lengths; channels-last inputs are among the layouts."""
    tensors, grad = mode.tensors(torch.float32), mode.grad(torch.float32)
    options = mode.options()
    expected = results(causal_conv1d, tensors, grad, backend="cpu", **options)
    for name in ("cu_seqlens", "lengths"):
        if options[name] is not None:
            options[name] = torch.stack([options[name]] * 2, 1)[:, 0]
    for changed in [{name} for name in (*tensors, "grad")] + [{*tensors, "grad"}]:
        views = {name: layout(t) if name in changed else t for name, t in tensors.items()}
        grad_view = layout(grad) if "grad" in changed else grad
        actual = results(causal_conv1d, views, grad_view, backend="cpu", **options)
        for name, t in actual.items():
            assert torch.equal(t, expected[name]), (changed, name)
        assert actual["y"].is_contiguous()
    states = [causal_conv1d(**t, backend="cpu", return_final_state=True, **options)[1] for t in (tensors, views)]
    assert torch.equal(*states)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_expanded_in_every_mode(groups, capability):
    """Strides of 0, and a state and a residual that are views of x."""
    mode = Mode(2, 6, 6, 50, 3, 4, groups, "gelu", "before", state=True)
    tensors, grad = mode.tensors(torch.float64), mode.grad(torch.float64)[:, :, :1].expand(2, 6, 50)
    for dim in range(3):
        views = {name: t.narrow(min(dim, t.dim() - 1), 0, 1).expand(t.shape) for name, t in tensors.items()}
        copies = {name: t.contiguous() for name, t in views.items()}
        expected = results(define(mode), copies, grad)
        assert_agree(results(causal_conv1d, views, grad, backend="cpu", **mode.options()), expected)
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    outcomes = []
    for function in (define(mode), lambda *t: causal_conv1d(*t[:3], residual=t[3], initial_state=t[4], backend="cpu",
                                                            **mode.options())):  # fmt: skip
        y = function(x, weight, weight[:, 0, 0], x, x[:, :, 20:28])
        grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
        outcomes.append({"y": y.detach(), "x": grad_x, "weight": grad_weight})
    assert_agree(*reversed(outcomes))


def two_blocks(batch, length, dtype=torch.float32, seed=0):
    """x and the weights of a block with a skip and of one without."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, 5, length), (7, 5, 3), (7,), (4, 7, 3), (4,), (4, 5, 1), (4,), (6, 4, 2), (6,), (4, 6, 2), (4,)]
    return [torch.randn(s, generator=g, dtype=dtype) for s in shapes]


def run_stack(leaves, pool, **where):
    blocks = [BlockWeights(*leaves[1:7]), BlockWeights(*leaves[7:])]
    return causal_conv_stack(leaves[0], blocks, [8, 3], pool=pool, backend="cpu", **where)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_stack_and_weight_norm(layout, pool, capability):
    tensors = two_blocks(3, 70)
    grad = random_like(run_stack(tensors, pool))

    def run(change):
        leaves = [change(t).detach().requires_grad_() for t in tensors]
        w = weight_norm([leaves[1], leaves[3]], [leaves[2], leaves[4]], backend="cpu")
        outputs = [run_stack(leaves, pool), *w]
        gradients = [change(grad), change(tensors[1]), change(tensors[3])]
        return outputs + list(torch.autograd.grad(outputs, leaves, gradients))

    for actual, expected in zip(run(layout), run(lambda t: t), strict=True):
        assert expected.isfinite().all()
        assert torch.equal(actual, expected)


def random_like(t: Tensor) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(9), dtype=t.dtype)


@pytest.mark.parametrize("pool", [False, True])
def test_stack_with_expanded_tensors(pool, capability):
    leaves = [t.narrow(-1, 0, 1).expand(t.shape) for t in two_blocks(3, 70, torch.float64)]
    outcomes = []
    for change in (lambda t: t, lambda t: t.contiguous()):
        tensors = [change(t).detach().requires_grad_() for t in leaves]
        y = run_stack(tensors, pool)
        outcomes.append([y, *torch.autograd.grad(y.sum(), tensors)])
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded(dim, capability):
    """Strides of 0 in every argument, and in the gradient that ``sum`` sends back."""
    case = Case(3, 5, 4, 97, 3, 4, "tanh")
    full = case.tensors(torch.float64)
    tensors = {name: t.narrow(min(dim, t.dim() - 1), 0, 1).expand(t.shape) for name, t in full.items()}
    assert all(0 in t.stride() for t in tensors.values())
    copies = {name: t.contiguous() for name, t in tensors.items()}
    grad = torch.ones((), dtype=torch.float64).expand(3, 4, 97)
    expected = results(definition, copies, grad.contiguous(), **case.options())
    assert_agree(results(causal_conv1d, tensors, grad, backend="cpu", **case.options()), expected)
    leaves = {name: t.requires_grad_() for name, t in copies.items()}
    causal_conv1d(**leaves, backend="cpu", **case.options()).sum().backward()
    assert_agree({name: t.grad for name, t in leaves.items()}, {name: expected[name] for name in leaves})


def test_flipped(capability):
    case = Case(2, 3, 4, 50, 3, 4, "relu")
    tensors, grad = case.tensors(torch.float64), case.grad(torch.float64)
    tensors = {name: t.flip(-1) for name, t in tensors.items()}
    expected = results(definition, tensors, grad.flip(-1), **case.options())
    assert_agree(results(causal_conv1d, tensors, grad.flip(-1), backend="cpu", **case.options()), expected)


def test_shared_memory(capability):
    """x as its own residual, and the bias as a slice of the weight's storage."""
    case = Case(2, 5, 5, 60, 3, 4, "tanh", residual=False)
    tensors, grad = case.tensors(torch.float64), case.grad(torch.float64)
    x, weight = (tensors[name].requires_grad_() for name in ("x", "weight"))

    def run(function, **backend):
        y = function(x, weight, weight[:, 0, 0], residual=x, **backend, **case.options())
        return dict(zip(("y", "x", "weight"), (y.detach(), *torch.autograd.grad(y, (x, weight), grad)), strict=True))

    assert_agree(run(causal_conv1d, backend="cpu"), run(definition))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_output_is_written(dtype, capability, poisoned):
    for case in [*CASES[:18:2], *FEW, *CASES[18::4]]:
        tensors, grad = case.tensors(dtype), case.grad(dtype)
        actual = results(causal_conv1d, tensors, grad, backend="cpu", **case.options())
        if dtype == torch.float64:
            expected = results(definition, tensors, grad, **case.options())
            assert_agree(actual, expected, case)
        assert all(t.isfinite().all() for t in actual.values()), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_output_of_stack_and_weight_norm_is_written(dtype, capability, poisoned):
    for batch, length, pool in ((3, 70, False), (3, 70, True), (0, 70, True), (3, 0, False), (1, 1, True)):
        leaves = [t.requires_grad_() for t in two_blocks(batch, length, dtype)]
        outputs = [run_stack(leaves, pool), *weight_norm([leaves[1]], [leaves[2]], backend="cpu")]
        gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
        assert all(t.isfinite().all() for t in (*outputs, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_output_is_written_in_every_mode(dtype, capability, poisoned):
    for mode in MODES[:: 1 if dtype == torch.float32 else 3]:
        tensors, grad = mode.tensors(dtype), mode.grad(dtype)
        actual = results(causal_conv1d, tensors, grad, backend="cpu", **mode.options())
        state = causal_conv1d(**tensors, backend="cpu", return_final_state=True, **mode.options())[1]
        assert all(t.isfinite().all() for t in (*actual.values(), state)), mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_output_of_a_stack_of_sequences_is_written(dtype, capability, poisoned):
    for offsets, lengths, length, pool in (
        ((0, 30, 31, 70), None, 70, True),
        ((0, 30, 31, 31, 70), None, 70, False),
        ((0,), None, 0, True),
        (None, (70, 1, 9), 70, True),
        (None, (70, 0, 9), 70, False),
        (None, (0, 0, 0), 5, False),
    ):
        where = {"lengths": None if lengths is None else torch.tensor(lengths)}
        if offsets is not None:
            where = {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32)}
        leaves = [t.requires_grad_() for t in two_blocks(1 if lengths is None else 3, length, dtype)]
        y = run_stack(leaves, pool, **where)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        with torch.no_grad():
            assert torch.equal(run_stack(leaves, pool, **where), y)
        assert all(t.isfinite().all() for t in (y, *gradients))


GUARDED = """
import itertools
import pykernels
from pykernels.ops import causal_conv1d, causal_conv_stack, weight_norm

def integers(dtype, *values):
    return guarded((len(values),), dtype).copy_(torch.tensor(values, dtype=dtype))


def random(*shape):
    return guarded(shape, dtype).copy_(torch.randn(shape)).requires_grad_()


for name, dtype in itertools.product(pykernels.cpu_capabilities(), (torch.float32, torch.float64)):
    pykernels.set_cpu_capability(name)
    for batch, c, o, length, k, dilation in [
        (1, 1, 1, 1, 1, 1), (2, 3, 5, 7, 3, 2), (3, 8, 9, 17, 3, 1), (2, 41, 40, 33, 3, 5), (1, 13, 7, 385, 2, 64),
        (2, 5, 4, 400, 3, 150), (10, 40, 40, 150, 3, 16), (1, 2, 3, 1100, 5, 63), (2, 1, 2, 5, 64, 2**40),
    ]:
        torch.set_num_threads(2 if length == 150 else 1)
        for activation in ("tanh", None):
            tensors = [random(batch, c, length), random(o, c, k), random(o)]
            residual = random(batch, o, length)
            y = causal_conv1d(*tensors, dilation=dilation, activation=activation, residual=residual, backend="cpu")
            gradients = torch.autograd.grad(y, [*tensors, residual], random(batch, o, length).detach())
            assert all(bool(t.isfinite().all()) for t in (y, *gradients))
        tensors = [random(batch, c, length), random(o, c, k), random(o), random(c, o, k), random(c)]
        widened = [random(o, c, k), random(o), random(o, o, k), random(o), random(o, c, 1), random(o)]
        for pool in (False, True):
            blocks = [tensors[1:], widened]
            y = causal_conv_stack(tensors[0], blocks, [dilation, 2], pool=pool, backend="cpu")
            w = weight_norm([tensors[1]], [tensors[2]], backend="cpu")
            leaves = [*tensors, *widened]
            gradients = torch.autograd.grad([y, *w], leaves, [random(*t.shape).detach() for t in (y, *w)])
            assert all(bool(t.isfinite().all()) for t in (y, *w, *gradients))
        del tensors, widened, residual, leaves, blocks, y, w, gradients
        kept.clear()
    if dtype == torch.float64 and name != pykernels.cpu_capabilities()[-1]:
        continue  # the slow part of this test: once in float64 will do
    for batch, c, o, groups, length, k, dilation, activation, before, state, where in [
        (2, 6, 6, 6, 97, 3, 4, "silu", True, True, {}), (1, 3, 3, 3, 4100, 5, 7, "gelu", False, False, {}),
        (2, 3, 3, 3, 5, 4, 3, None, False, True, {}), (2, 6, 9, 3, 50, 3, 2, "tanh", False, True, {}),
        (2, 4, 12, 4, 33, 2, 1, "gelu", True, False, {}), (2, 3, 5, 1, 385, 3, 64, "silu", True, True, {}),
        (3, 3, 5, 1, 4, 3, 5, None, False, True, {}), (2, 3, 5, 1, 40, 1, 2, "relu", True, True, {}),
        (1, 3, 5, 1, 70, 3, 4, "silu", True, True, {"cu_seqlens": (0, 30, 30, 31, 70)}),
        (1, 3, 3, 3, 70, 3, 4, "gelu", False, True, {"cu_seqlens": (0, 30, 30, 31, 70)}),
        (1, 3, 5, 1, 70, 3, 4, "gelu", False, False, {"cu_seqlens": (0, 30, 31, 70)}),
        (3, 3, 5, 1, 40, 3, 4, "gelu", False, False, {"lengths": (40, 1, 13)}),
        (1, 6, 4, 2, 70, 3, 40, "tanh", False, False, {"cu_seqlens": (0, 1, 69, 70)}),
        (1, 3, 5, 1, 70, 3, 4, "silu", True, True, {"cu_seqlens": (-9, 90, 30, 2**31 - 1, 0)}),
        (1, 3, 3, 3, 70, 3, 4, "gelu", False, True, {"cu_seqlens": (5, -(2**31), 80, 60)}),
        (3, 3, 5, 1, 40, 3, 4, "gelu", True, True, {"lengths": (40, 0, 13)}),
        (3, 4, 4, 4, 40, 3, 4, "silu", False, True, {"lengths": (1, 40, 13)}),
        (3, 4, 4, 4, 40, 3, 4, "silu", True, False, {"lengths": (2**62, -(2**62), 41)}),
        (2, 3, 5, 1, 40, 3, 4, "tanh", False, True, {"lengths": (41, -1)}),
    ]:
        torch.set_num_threads(2 if length > 4000 else 1)
        where = {name: integers(torch.int32 if name == "cu_seqlens" else torch.int64, *v) for name, v in where.items()}
        tensors = [random(batch, c, length), random(o, c // groups, k), random(o), random(batch, o, length)]
        if state:
            count = len(where["cu_seqlens"]) - 1 if "cu_seqlens" in where else batch
            tensors.append(random(count, c, (k - 1) * dilation))
        y, final = causal_conv1d(
            *tensors[:3], residual=tensors[3], initial_state=tensors[4] if state else None, dilation=dilation,
            groups=groups, activation=activation, residual_before_activation=before, return_final_state=True,
            validate=False, backend="cpu", **where,
        )
        gradients = torch.autograd.grad(y, tensors, random(*y.shape).detach())
        assert all(bool(t.isfinite().all()) for t in (y, final, *gradients))
        if groups == 1:
            tensors = [tensors[0], random(o, c, k), random(o), random(c, o, k), random(c)]
            sizes = where["cu_seqlens"].diff() if "cu_seqlens" in where else where.get("lengths", torch.ones(1))
            for pool in (False, True) if min(sizes) > 0 else (False,):
                y = causal_conv_stack(
                    tensors[0], [tensors[1:]], [dilation], pool=pool, validate=False, backend="cpu", **where
                )
                gradients = torch.autograd.grad(y, tensors, random(*y.shape).detach())
                assert all(bool(t.isfinite().all()) for t in (y, *gradients))
        del tensors, where, y, final, gradients
        kept.clear()
"""


def test_no_access_outside_the_tensors():
    """Every argument and result lies against a page without access, once with its start and once with its end."""
    check_guarded(GUARDED, 500)
