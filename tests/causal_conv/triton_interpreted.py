"""The Triton kernels in Triton's interpreter, on the CPU: test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from pykernels.ops import BlockWeights, causal_conv1d, causal_conv_stack
from pykernels.ops.causal_conv import triton as kernels
from pykernels.ops.causal_conv.reference import Options

from .cases import error, results
from .triton_cases import EPILOGUES, SEQUENCES, SIZES, Mode, check_accuracy, check_float64

NAN = float("nan")
SMALL = [Mode(2, 6, 6, 37, 3, 4, 1, "silu", "after"), Mode(2, 3, 3, 37, 3, 4, 3, "tanh", state=True)]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch, poisoned) -> None:
    """Few large tiles, since the interpreter's time goes by operations; sums over time still have several runs."""
    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", 3)


def test_kernels_are_interpreted():
    assert kernels.INTERPRETED


@pytest.mark.parametrize("mode", EPILOGUES + SIZES + SEQUENCES, ids=str)
def test_float64(mode: Mode):
    check_float64(mode, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_accuracy(dtype):
    check_accuracy([*EPILOGUES[2::7], *SIZES[10:18:2], *SEQUENCES[::5]], dtype, "cpu", seeds=2)


@pytest.mark.parametrize("groups", [1, 6])
def test_bfloat16(groups):
    """The interpreter cuts off what it stores, instead of rounding: one eps, where no activation enlarges it."""
    mode = Mode(2, 6, 6, 37, 3, 4, groups, "relu", "before", state=True)
    tensors, grad = mode.tensors(torch.bfloat16), mode.grad(torch.bfloat16)
    actual = results(causal_conv1d, tensors, grad, backend="triton", **mode.options())
    doubles = {name: t.double() for name, t in tensors.items()}
    expected = results(causal_conv1d, doubles, grad.double(), backend="reference", **mode.options())
    for name, value in actual.items():
        assert value.dtype == torch.bfloat16
        assert error(value, expected[name]) <= torch.finfo(torch.bfloat16).eps, name


def test_many_programs(monkeypatch):
    """Launch shapes as on a GPU: narrow tiles, many runs of the sums over time."""
    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", 512)
    for mode in (Mode(2, 6, 6, 150, 3, 3, 1, "tanh", "after"), Mode(3, 2, 2, 200, 3, 3, 2, "gelu")):
        check_float64(mode, "cpu")


@pytest.mark.parametrize("mode", SMALL, ids=str)
def test_bits_depend_on_neither_the_run_nor_the_strides(mode: Mode):
    tensors, grad = mode.tensors(torch.float32), mode.grad(torch.float32)
    first = results(causal_conv1d, tensors, grad, backend="triton", **mode.options())
    strided = {name: spread(t) for name, t in tensors.items()}
    again = results(causal_conv1d, strided, spread(grad), backend="triton", **mode.options())
    channels_last = {
        name: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() == 3 else t for name, t in tensors.items()
    }
    last = results(causal_conv1d, channels_last, grad.mT.contiguous().mT, backend="triton", **mode.options())
    for name, value in first.items():
        assert torch.equal(again[name], value)
        assert error(last[name], value) < 1e-5  # tiles of another shape add in another order
    assert again["y"].is_contiguous()
    assert last["y"].is_contiguous()


def spread(t: torch.Tensor) -> torch.Tensor:
    """The same values with gaps of NaN between all of them."""
    wide = torch.full([2 * n for n in t.shape], NAN, dtype=t.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


def test_one_value_for_all():
    """Strides of 0, in x, residual and grad_y."""
    mode = SMALL[0]
    tensors, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    tensors["x"] = tensors["x"][:, :, :1].expand(-1, -1, mode.length)
    tensors["residual"] = tensors["residual"][:1].expand(mode.batch, -1, -1)
    grad = grad[:, :1, :1].expand(grad.shape)
    actual = results(causal_conv1d, tensors, grad, backend="triton", **mode.options())
    expected = results(causal_conv1d, tensors, grad, backend="reference", **mode.options())
    for name, value in actual.items():
        assert error(value, expected[name]) <= 1e-12


@pytest.mark.parametrize("mode", SMALL, ids=str)
def test_wide_offsets(mode: Mode, monkeypatch):
    """Sizes beyond 2^31 take 64-bit offsets; with the limit lowered, the small problem does."""
    tensors, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    seen = []
    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *a, **k: (seen.append(k["INDEX"]), launch(*a, **k)))
    narrow = results(causal_conv1d, tensors, grad, backend="triton", **mode.options())
    assert set(seen) == {kernels.tl.int32}
    seen.clear()
    monkeypatch.setattr(kernels, "INT32_LIMIT", 0)
    wide = results(causal_conv1d, tensors, grad, backend="triton", **mode.options())
    assert set(seen) == {kernels.tl.int64}
    assert all(torch.equal(wide[name], narrow[name]) for name in narrow)


@pytest.mark.parametrize("groups", [1, 6])
def test_padding_is_never_read(groups):
    mode = Mode(3, 6, 6, 70, 3, 4, groups, "tanh", "after", state=True, lengths=(70, 0, 29))
    tensors, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    expected = results(causal_conv1d, tensors, grad, backend="triton", **mode.options())
    for length, *rows in zip(mode.lengths, tensors["x"], tensors["residual"], grad, strict=True):
        for row in rows:
            row[:, length:] = NAN
    actual = results(causal_conv1d, tensors, grad, backend="triton", **mode.options())
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize(
    ("offsets", "lengths"),
    [([5, 3, 99], None), ([-7, -7, -7], None), ([70, 0, 10], None), ([0, 10, 30], None), (None, [-5, 2**40])],
)
def test_wrong_offsets_and_lengths_do_not_reach_outside(groups, offsets, lengths):
    """On a GPU nobody checks them."""
    batch, options = (1, 2)[lengths is not None], Options(4, groups, "silu")
    around = torch.full((3 * batch, 6, 70), NAN, dtype=torch.float64)
    inside = slice(batch, 2 * batch)
    around[inside] = torch.randn(batch, 6, 70, dtype=torch.float64)
    state = torch.full((6, 6, 8), NAN, dtype=torch.float64)
    state[2:4] = 1.0
    weight = torch.randn(6, 6 // groups, 3, dtype=torch.float64)
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    sizes = None if lengths is None else torch.tensor(lengths)
    x = around[inside]
    y, saved = kernels.forward(x, weight, None, None, state[2:4], cu_seqlens, sizes, options, True)
    gradients = kernels.backward(x, saved, x, weight, state[2:4], cu_seqlens, sizes, options, True, True, True, True)
    for value in (y, saved, *gradients):
        assert value.isfinite().all()


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "tanh", "silu", "gelu"])
@pytest.mark.parametrize("groups", [1, 6])
def test_nan_reaches_what_depends_on_it_and_nothing_else(activation, groups):
    mode = Mode(2, 6, 6, 37, 3, 4, groups, activation)
    tensors, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    tensors["x"][1, 2, 9] = NAN
    actual = results(causal_conv1d, tensors, grad, backend="triton", **mode.options())
    expected = results(causal_conv1d, tensors, grad, backend="reference", **mode.options())
    assert expected["y"].isnan().any()
    for name, value in actual.items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "silu", "gelu"])
def test_large_and_small_values(activation):
    """Nothing overflows on the way (warnings are errors), and small values of tanh keep their digits."""
    values = torch.tensor(
        [0.0, 1e-30, 1e-9, 1e-3, 0.2499, 0.25, 0.2501, 1.0, 5.0, 30.0, 800.0, 1e30], dtype=torch.float64
    )
    x = torch.cat([values, -values])[None, None].requires_grad_()
    weight = torch.ones(1, 1, 1, dtype=torch.float64)
    y = causal_conv1d(x, weight, activation=activation, backend="triton")
    expected = causal_conv1d(x, weight, activation=activation, backend="reference")
    # tanh promises a few ulp everywhere; silu and gelu what float64 results are held to.
    torch.testing.assert_close(y, expected, rtol=1e-15 if activation == "tanh" else 1e-12, atol=1e-16)
    grads = [torch.autograd.grad(v.sum(), x)[0] for v in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", [(0, 6, 5), (2, 6, 0)])
def test_empty(shape):
    x = torch.zeros(shape, requires_grad=True)
    weight = torch.ones(4, 6, 3, requires_grad=True)
    state = torch.ones(shape[0], 6, 4, requires_grad=True)
    y = causal_conv1d(x, weight, dilation=2, initial_state=state, activation="silu", backend="triton")
    assert y.shape == (shape[0], 4, shape[2])
    gradients = torch.autograd.grad(y, [x, weight, state], torch.zeros_like(y))
    assert all(g.eq(0).all() for g in gradients)


def test_raw_operators_refuse_what_they_would_misread():
    x, weight, half = torch.randn(2, 6, 9), torch.randn(4, 3, 2), torch.randn(2, 4, 9).half()
    y = torch.randn(2, 4, 9)
    good = {"x": x, "weight": weight, "bias": None, "residual": y, "initial_state": x[:, :, :1]}
    good |= {"cu_seqlens": None, "lengths": None, "options": Options(groups=2, activation="tanh")}
    kernels.forward(**good, save=True)
    bad = {"weight": weight[:, :2], "bias": y[0, 0], "residual": half, "initial_state": x}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"^{name} must have shape"):
            kernels.forward(**{**good, name: value}, save=True)
    del good["bias"], good["residual"]
    needed = dict.fromkeys(("need_x", "need_weight", "need_bias", "need_state"), True)
    kernels.backward(**good, **needed, grad_y=y, saved=y)
    for name, value in {"grad_y": y[:1], "saved": half}.items():
        with pytest.raises(ValueError, match=f"^{name} must have shape"):
            kernels.backward(**{**good, **needed, "grad_y": y, "saved": y, name: value})


def test_only_the_gradients_that_are_needed():
    mode = Mode(2, 6, 6, 37, 3, 4, 1, "silu", state=True)
    tensors, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    expected = results(causal_conv1d, tensors, grad, backend="triton", **mode.options())
    for name in tensors:
        leaves = {n: t.clone().requires_grad_(n == name) for n, t in tensors.items()}
        causal_conv1d(**leaves, backend="triton", **mode.options()).backward(grad)
        assert torch.equal(leaves[name].grad, expected[name])


def test_derivatives_of_derivatives():
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 4, 5), (4, 4, 4), (4,)))

    def function(*t: torch.Tensor) -> torch.Tensor:
        return causal_conv1d(*t, dilation=2, activation="tanh", backend="triton")

    assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, weight, bias), fast_mode=True)


def test_stack():
    shapes = [(6, 2, 3), (6,), (6, 6, 3), (6,), (6, 2, 1), (6,)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(2, 2, 20), *shapes]]
    found = []
    for backend in ("triton", "reference"):
        y = causal_conv_stack(tensors[0], [BlockWeights(*tensors[1:])], [2], pool=True, backend=backend)
        found.append([y.detach(), *torch.autograd.grad(y.sum(), tensors)])
    for actual, expected in zip(*found, strict=True):
        assert error(actual, expected) <= 1e-12
