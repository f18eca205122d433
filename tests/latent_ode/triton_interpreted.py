"""The Triton kernels in Triton's interpreter, on the CPU: test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pykernels.ops.latent_ode import triton as kernels
from pykernels.ops.latent_ode.op import backward_op, saving_op

from .triton_cases import OPTIONS, PIECES, SIZES, Mode, arguments_of, check_accuracy, check_float64, error

NAN = float("nan")
#: Nearly every option in a narrow and a wide network.
MANY = [
    Mode(
        hidden=hidden,
        times=3,
        groups=2,
        activation="silu",
        method="heun2",
        controls=2,
        reinject=True,
        norms=True,
        energy="time",
        time_input=True,
        input_map="sin",
    )
    for hidden in ((7, 6), (70,))
]


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None:
    pass


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, int, dict]]:
    """Name, programs and arguments of every launch."""
    seen = []
    launch = kernels.launch

    def record(device, kernel, programs, **arguments):
        seen.append((kernel.fn.__name__, programs, arguments))
        launch(device, kernel, programs, **arguments)

    monkeypatch.setattr(kernels, "launch", record)
    return seen


def test_kernels_are_interpreted():
    assert kernels.INTERPRETED


@pytest.mark.parametrize("mode", OPTIONS + SIZES + MANY, ids=str)
def test_float64(mode: Mode, launches):
    check_float64(mode, "cpu")
    narrow = {arguments["NARROW"] for _, _, arguments in launches if "NARROW" in arguments}
    widths = [mode.dim, mode.controls + mode.time_input, *mode.hidden, *mode.correction * bool(mode.groups)]
    if mode.times > 1:
        assert narrow == {max(widths) <= 32}


@pytest.mark.parametrize("mode", PIECES, ids=str)
def test_pieces(mode: Mode, launches):
    check_float64(mode, "cpu")
    backward = [a["last"] - a["first"] for name, _, a in launches if name == "trajectory_backward"]
    assert len(backward) > 1
    assert sum(backward) == (mode.times - 1) * mode.substeps
    if mode.max_memory == 0:
        assert set(backward) == {1}


@pytest.mark.parametrize("block", [32, 64])
def test_large_blocks(block, monkeypatch, launches):
    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", 1)
    check_float64(Mode(batch=block + 3, method="midpoint", substeps=1), "cpu")
    assert {arguments["BLOCK"] for name, _, arguments in launches if name != "add_by_group"} == {block}


@pytest.mark.parametrize("shape", [(7, 6), (70,)])
def test_one_product_for_all_blocks(shape, monkeypatch):
    monkeypatch.setattr(kernels, "PARTIAL_SUMS", 0)
    check_float64(Mode(batch=33, hidden=shape, sets=2, groups=2, method="euler"), "cpu")


@pytest.mark.parametrize("mode", [*OPTIONS[1::5], *SIZES[::5], MANY[0]], ids=str)
def test_accuracy(mode: Mode):
    check_accuracy(mode, "cpu", seeds=2)


@pytest.mark.parametrize("mode", MANY, ids=str)
def test_bits_depend_on_neither_the_run_nor_the_strides(mode: Mode):
    tensors, grads = mode.tensors(torch.float32), mode.grads(torch.float32)
    first = mode.results(tensors, grads, "triton")
    strided = {name: spread(t) for name, t in tensors.items()}
    again = mode.results(strided, [spread(g) for g in grads], "triton")
    for name, value in first.items():
        assert torch.equal(again[name], value), name
    assert again["states"].is_contiguous()


def spread(t: Tensor) -> Tensor:
    """The same values with gaps of NaN between all of them."""
    wide = torch.full([2 * n for n in t.shape], NAN, dtype=t.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


def test_one_value_for_all():
    """Strides of 0."""
    mode = Mode(controls=2, reinject=True, method="heun2")
    tensors, grads = mode.tensors(torch.float64), mode.grads(torch.float64)
    for name in ("y0", "control", "injected"):
        tensors[name] = tensors[name][..., :1].expand(tensors[name].shape)
    grads = [g[:, :1, :1].expand(g.shape) for g in grads]
    actual, expected = (mode.results(tensors, grads, backend) for backend in ("triton", "reference"))
    for name, value in actual.items():
        assert error(value, expected[name]) <= 1e-12, name


@pytest.mark.parametrize(("dtype", "of_t"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_times_of_another_dtype(dtype, of_t):
    mode = MANY[0]
    tensors, grads = mode.tensors(dtype), mode.grads(dtype)
    tensors["t"] = tensors["t"].to(of_t)
    actual, expected = (mode.results(tensors, grads, backend) for backend in ("triton", "reference"))
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        assert error(value, expected[name]) <= 1e-5, name


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_samples_do_not_depend_on_each_other():
    mode = MANY[0]._replace(batch=18, reinject=False, input_map="none")
    tensors = mode.tensors(torch.float64)
    expected = mode.run(tensors, "triton", validate=False)
    tensors["y0"][3] = NAN
    tensors["y0"][5] = 1e300
    actual = mode.run(tensors, "triton", validate=False)
    others = [i for i in range(18) if i not in (3, 5)]
    for value, alone in zip(actual, expected, strict=True):
        assert torch.equal(value[:, others], alone[:, others])
    assert actual[0][:, 3].isnan().all()


@pytest.mark.parametrize(
    ("activation", "hidden"),
    [*((name, (7, 6)) for name in ("relu", "leaky_relu", "tanh", "softplus", "silu", "elu", "sin")), ("silu", (70,))],
)
def test_nan_reaches_what_depends_on_it_and_nothing_else(activation, hidden):
    mode = Mode(hidden=hidden, activation=activation, method="midpoint", substeps=1, norms=True, energy=True)
    tensors, grads = mode.tensors(torch.float64), mode.grads(torch.float64)
    tensors["y0"][2, 1] = NAN
    actual, expected = (mode.results(tensors, grads, backend, validate=False) for backend in ("triton", "reference"))
    assert expected["states"].isnan().any()
    for name, value in actual.items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("activation", ["tanh", "softplus", "silu", "elu", "sin"])
def test_large_and_small_values(activation):
    """Nothing overflows on the way (warnings are errors), and small values keep their digits."""
    values = torch.tensor([0.0, 1e-30, 1e-9, 1e-3, 0.2499, 0.25, 1.0, 5.0, 30.0, 800.0, 1e30], dtype=torch.float64)
    y0 = torch.cat([values, -values])[:, None].requires_grad_()
    one = torch.ones(1, 1, dtype=torch.float64)
    mode = Mode(batch=len(y0), dim=1, hidden=(1,), times=2, activation=activation, method="euler", substeps=1)
    tensors = {"weight 0": one, "weight 1": one, "bias 0": 0 * one[0], "bias 1": 0 * one[0], "y0": y0}
    tensors["t"] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = []
    for backend in ("triton", "reference"):
        states, energy = mode._replace(energy=True).run(tensors, backend)
        found.append([energy[0], states[1], *torch.autograd.grad(states.sum(), y0)])
    # The energy is the square of the activation, whatever the state.
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_validate_names_the_step_and_the_sample():
    mode = Mode(times=5, activation="relu")
    tensors = mode.tensors(torch.float64)
    tensors["y0"][3] = 1e308
    tensors["weight 0"] *= 1e10
    with pytest.raises(FloatingPointError, match="the state of sample 3 is not finite at t"):
        mode.run(tensors, "triton")
    assert not mode.run(tensors, "triton", validate=False)[0].isfinite().all()


@pytest.mark.parametrize(("batch", "times"), [(0, 3), (0, 1), (5, 1)])
def test_empty(batch, times):
    mode = MANY[0]._replace(batch=batch, times=times)
    tensors, (grad, *_) = mode.tensors(torch.float64), mode.grads(torch.float64)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    results = mode.run(leaves, "triton")
    assert [tuple(r.shape) for r in results] == [(times, batch, 3), (times - 1, batch), (times - 1, batch)]
    assert torch.equal(results[0], leaves["y0"].expand(times, -1, -1))
    gradients = torch.autograd.grad(results[0], list(leaves.values()), grad)
    assert torch.equal(gradients[0], grad[0] if batch else leaves["y0"])
    assert all(g.eq(0).all() for g in gradients[1:])


@pytest.mark.parametrize("mode", MANY, ids=str)
def test_only_the_gradients_that_are_needed(mode: Mode, launches):
    mode = mode._replace(times=2, substeps=1)
    tensors, grads = mode.tensors(torch.float64), mode.grads(torch.float64)
    expected = mode.results(tensors, grads, "triton")
    parameters = ("slope", "weight 0", "correction bias 1")
    for name in ("y0", "t", "injected", *parameters):
        launches.clear()
        leaves = {n: t.clone().requires_grad_(n == name) for n, t in tensors.items()}
        torch.autograd.backward(mode.run(leaves, "triton"), grads)
        assert torch.equal(leaves[name].grad, expected[f"grad of {name}"]), name
        arguments = next(a for kernel, _, a in launches if kernel == "trajectory_backward")
        assert arguments["KEEP"] == (name in parameters)
        assert (arguments["time_sums"] is not None) == (name == "t")


@pytest.mark.parametrize("which", ["norms", "energy"])
def test_gradients_of_one_result_alone(which):
    mode = Mode(norms=True, energy="time", method="heun2", substeps=3)
    tensors = mode.tensors(torch.float64)
    found = []
    for backend in ("triton", "reference"):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        _, norms, energy = mode.run(leaves, backend)
        found.append(torch.autograd.grad({"norms": norms, "energy": energy}[which].square().sum(), leaves.values()))
    for actual, expected in zip(*found, strict=True):
        assert error(actual, expected) <= 1e-12


def test_still_states_have_no_gradient_of_the_norm():
    mode = Mode(norms=True, method="midpoint")
    tensors = {name: 0 * t if "1" in name or "2" in name else t for name, t in mode.tensors(torch.float64).items()}
    grads = mode.grads(torch.float64)
    actual, expected = (mode.results(tensors, grads, backend) for backend in ("triton", "reference"))
    assert expected["norms"].eq(0).all()
    for name, value in actual.items():
        assert error(value, expected[name]) <= 1e-12, name


def test_wrong_groups_do_not_reach_outside():
    """On a GPU nobody checks them; they are clamped."""
    mode = Mode(groups=3, method="euler")
    tensors = mode.tensors(torch.float64)
    wrong, right = torch.tensor([-(2**40), 7, 1, 3, 0]), torch.tensor([0, 2, 1, 2, 0])
    states = [mode.run(tensors, "triton", group=group, validate=False)[0] for group in (wrong, right)]
    assert torch.equal(*states)


@pytest.mark.parametrize("mode", [OPTIONS[0], *PIECES[:3], *MANY, Mode(batch=0), Mode(times=1)], ids=str)
def test_what_is_saved_is_what_tracing_expects(mode: Mode):
    tensors, options = arguments_of(mode, torch.float64)
    *_, saved = saving_op(*tensors, *options, "triton")
    expected = kernels.saved_fake(tensors, options)
    assert [(t.shape, t.dtype) for t in saved] == [(t.shape, t.dtype) for t in expected]


def test_raw_operators_refuse_what_was_not_saved_for_them():
    tensors, options = arguments_of(Mode(method="euler"), torch.float64)
    states, _, _, saved = saving_op(*tensors, *options, "triton")
    needed = [True] * (6 + 2 * len(tensors.weights))
    for wrong in ([], [saved[0][:, :, 1:]], saved * 2):
        with pytest.raises(ValueError, match=r"^saved must be one tensor of shape"):
            backward_op(states, None, None, states, wrong, *tensors, *options, "triton", needed)
    assert len(backward_op(states, None, None, states, saved, *tensors, *options, "triton", needed)) == len(needed)


def test_derivatives_of_derivatives():
    mode = Mode(batch=2, dim=2, hidden=(3,), times=2, method="midpoint", substeps=1)
    tensors = mode.tensors(torch.float64)

    def function(*values: Tensor) -> Tensor:
        return mode.run(dict(zip(tensors, values, strict=True)), "triton", validate=False)[0]

    inputs = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
