"""Values and derivatives in the other modes of the convolution, on every backend and CPU capability."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import pykernels
from pykernels.ops import BlockWeights, causal_conv1d, causal_conv_stack

from .cases import ACTIVATIONS, COMPILED, RUNNERS, assert_agree, error, plain, pooled_error, results
from .modes import FEW_MODES, MODES, Mode, define, final_states

EPS = torch.finfo(torch.float32).eps
BEST = COMPILED[-1]


def test_the_definition_by_hand():
    """Depthwise, with a state, packed and padded, in numbers."""
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]], dtype=torch.float64)
    weight = torch.tensor([[[10.0, 1.0]], [[0.0, -1.0]]], dtype=torch.float64)
    state = torch.tensor([[[0.5], [9.0]], [[0.25], [9.0]]], dtype=torch.float64)
    packed = Mode(1, 2, 2, 4, 2, groups=2, state=True, packed=(1, 3))
    expected = torch.tensor([[[6.0, 4.5, 23.0, 34.0], [-5.0, -6.0, -7.0, -8.0]]], dtype=torch.float64)
    assert torch.equal(define(packed)(x, weight, initial_state=state), expected)
    for runner in RUNNERS:
        options = {**packed.options(), "backend": runner.use(), "return_final_state": True}
        y, last = causal_conv1d(x, weight, initial_state=state, **options)
        assert torch.equal(y, expected)
        assert last.tolist() == [[[1.0], [5.0]], [[4.0], [8.0]]]
    padded = Mode(1, 2, 2, 4, 2, groups=2, residual="before", activation="relu", lengths=(3,))
    expected = torch.tensor([[[0.0, 11.0, 22.0, 0.0], [0.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    residual = torch.full((1, 2, 4), -1.0, dtype=torch.float64)
    for function in (define(padded), lambda *t: causal_conv1d(*t[:2], residual=t[3], **padded.options())):
        assert torch.equal(function(x, weight, None, residual), expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_float64(mode: Mode):
    """Every backend against the definition, one group of one sequence at a time."""
    tensors, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    expected = results(define(mode), tensors, grad)
    for runner in RUNNERS:
        options = {**mode.options(), "backend": runner.use()}
        actual = results(causal_conv1d, tensors, grad, **options)
        assert_agree(actual, expected, runner)
        assert torch.equal(causal_conv1d(**tensors, **options), actual["y"]), runner


@pytest.mark.parametrize("runner", COMPILED, ids=str)
def test_float32_against_plain_pytorch(runner):
    """The rule of ``test_accuracy.py``: errors at most two and three times those of plain PyTorch, up to 2 eps.

    Over all problems of an activation together it holds as it stands.
    """
    totals: dict[tuple[str, str | None], list[float]] = {}
    for mode in MODES:
        theirs, ours, expected = [], [], []
        for seed in range(2):
            tensors, grad = mode.tensors(torch.float32, seed), mode.grad(torch.float32, seed)
            exact = {name: t.double() for name, t in tensors.items()}
            linear = mode._replace(activation=None, residual=mode.residual if mode.residual == "before" else None)
            unused = {"residual"} if linear.residual is None else set()
            z = define(linear, plain)(**{n: t for n, t in exact.items() if n not in unused})
            grad[z.abs() < 1e-5] = 0
            expected.append(results(define(mode, plain), exact, grad.double()))
            theirs.append(results(define(mode, plain), tensors, grad))
            ours.append(results(causal_conv1d, tensors, grad, backend=runner.use(), **mode.options()))
        for name in expected[0]:
            our_error, their_error = (
                pooled_error([r[name] for r in run], [e[name] for e in expected]) for run in (ours, theirs)
            )
            factor = 2 if name == "y" else 3
            assert our_error <= factor * their_error + 2 * EPS, (str(mode), name, our_error, their_error)
            total = totals.setdefault((name, mode.activation), [0.0, 0.0])
            total[0] += our_error
            total[1] += their_error
    assert {name for name, _ in totals} == {"y", "x", "weight", "bias", "residual", "initial_state"}
    for (name, activation), (our_error, their_error) in totals.items():
        assert our_error <= (2 if name == "y" else 3) * their_error, (name, activation)


SMALL = [
    Mode(2, 2, 3, 5, 3, 2, 1, "silu", "before"),
    Mode(1, 2, 3, 5, 2, 2, 1, "gelu", "after", state=True),
    Mode(2, 3, 3, 5, 3, 1, 3, "gelu", "before", state=True),
    Mode(1, 4, 4, 5, 3, 2, 2, "tanh", "before"),
    Mode(1, 2, 4, 5, 2, 2, 2, "silu", "after"),
    Mode(1, 2, 3, 7, 3, 2, 1, "silu", "after", state=True, packed=(3, 0, 1, 3)),
    Mode(1, 3, 3, 7, 3, 1, 3, "gelu", "before", state=True, packed=(4, 1, 2)),
    Mode(2, 2, 3, 6, 3, 2, 1, "gelu", "before", state=True, lengths=(6, 3)),
    Mode(3, 3, 3, 5, 3, 2, 3, "tanh", "after", lengths=(5, 0, 2)),
    Mode(2, 2, 2, 5, 3, 2, 1, "leaky_relu", "before", state=True),
    Mode(2, 2, 2, 4, 1, 2, 1, "silu", "after", state=True),
]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch itself still uses it, in forward mode
@pytest.mark.parametrize("mode", SMALL, ids=str)
def test_gradcheck(mode: Mode):
    """Of every argument and of the final state; gradgradcheck and forward mode on the newest capability."""
    tensors = mode.tensors(torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]
    for runner in RUNNERS:
        options = {**mode.options(), "backend": runner.use(), "return_final_state": True}

        def function(*args, options=options):
            return causal_conv1d(**dict(zip(tensors, args, strict=True)), **options)

        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=runner == BEST, fast_mode=runner != BEST)
        if runner == BEST:
            assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("mode", FEW_MODES, ids=str)
def test_any_subset_of_the_gradients(mode: Mode):
    """The others do not change, bit by bit; what is not asked for is not there."""
    tensors, grad = mode.tensors(torch.float32), mode.grad(torch.float32)
    everything = results(causal_conv1d, tensors, grad, backend="cpu", **mode.options())
    for needed in itertools.product((False, True), repeat=len(tensors)):
        leaves = {n: t.detach().requires_grad_(need) for (n, t), need in zip(tensors.items(), needed, strict=True)}
        y = causal_conv1d(**leaves, backend="cpu", **mode.options())
        assert y.requires_grad == any(needed)
        if any(needed):
            y.backward(grad)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == leaf.requires_grad
            assert leaf.grad is None or torch.equal(leaf.grad, everything[name]), name


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_final_state(runner):
    for mode in [*MODES[:40], *SMALL]:
        tensors = mode.tensors(torch.float64)
        y, state = causal_conv1d(**tensors, **mode.options(), return_final_state=True, backend=runner.use())
        assert torch.equal(state, final_states(mode, tensors["x"], tensors.get("initial_state"))), mode
        assert torch.equal(y, causal_conv1d(**tensors, **mode.options(), backend=runner.backend))
        assert state.shape == (mode.sequences, mode.in_channels, mode.reach)
        if state.numel() > 0:
            assert state.untyped_storage().data_ptr() != tensors["x"].untyped_storage().data_ptr()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_series_may_be_cut_anywhere(groups, capability):
    """The final state of one piece is the initial state of the next, also where a piece is shorter than the state."""
    whole = Mode(2, 6, 6, 90, 3, 7, groups, "silu", "before")
    tensors, grad = whole.tensors(torch.float64), whole.grad(torch.float64)
    expected = results(causal_conv1d, tensors, grad, backend="cpu", **whole.options())
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    state, pieces = None, []
    for begin, end in itertools.pairwise([0, 1, 2, 10, 40, 41, 90]):
        piece = {name: leaves[name][:, :, begin:end] for name in ("x", "residual")}
        y, state = causal_conv1d(
            **{**leaves, **piece}, initial_state=state, return_final_state=True, backend="cpu", **whole.options()
        )
        pieces.append(y)
    y = torch.cat(pieces, 2)
    gradients = torch.autograd.grad(y, list(leaves.values()), grad)
    assert_agree({"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}, expected)
    assert torch.equal(state, tensors["x"][:, :, -14:])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("state", [False, True])
def test_nothing_to_do(backend, groups, state):
    """No sequences, sequences without samples, no samples: zeros where there is something to return, and states."""
    modes = [
        Mode(1, 3, 3, 0, 3, 2, groups, "gelu", "after", state=state, packed=()),
        Mode(1, 3, 3, 0, 3, 2, groups, "gelu", "after", state=state, packed=(0,)),
        Mode(1, 3, 3, 0, 3, 2, groups, "gelu", "before", state=state, packed=(0, 0, 0)),
        Mode(2, 3, 3, 6, 3, 2, groups, "silu", "after", state=state, lengths=(0, 0)),
        Mode(0, 3, 3, 6, 3, 2, groups, "silu", "before", state=state, lengths=()),
        Mode(2, 3, 3, 0, 3, 2, groups, "silu", "before", state=state, lengths=(0, 0)),
        Mode(2, 3, 3, 0, 3, 2, groups, "silu", "before", state=state),
        Mode(0, 3, 3, 6, 3, 2, groups, "silu", "after", state=state),
    ]
    for mode in modes:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            tensors, grad = mode.tensors(dtype), mode.grad(dtype)
            actual = results(causal_conv1d, tensors, grad, backend=backend, **mode.options())
            assert torch.equal(actual.pop("y"), torch.zeros_like(grad)), mode
            for name, t in tensors.items():
                assert torch.equal(actual[name], torch.zeros_like(t)), (mode, name)
            state_after = causal_conv1d(**tensors, return_final_state=True, backend=backend, **mode.options())[1]
            expected = final_states(mode, tensors["x"], tensors.get("initial_state"))
            assert torch.equal(state_after, expected), mode


@pytest.mark.parametrize("mode", [mode for mode in FEW_MODES if mode.lengths], ids=str)
def test_what_lies_behind_the_ends_does_not_matter(mode: Mode, capability):
    """Not even NaN, in x, in the residual and in the gradient."""
    tensors, grad = mode.tensors(torch.float32), mode.grad(torch.float32)
    changed = {name: t.clone() for name, t in tensors.items()}
    changed_grad = grad.clone()
    for i, end in enumerate(mode.lengths):
        changed["x"][i, :, end:] = float("nan")
        if "residual" in changed:
            changed["residual"][i, :, end:] = float("inf")
        changed_grad[i, :, end:] = float("nan")
    for backend in ("cpu", "reference"):
        expected = results(causal_conv1d, tensors, grad, backend=backend, **mode.options())
        actual = results(causal_conv1d, changed, changed_grad, backend=backend, **mode.options())
        states = [
            causal_conv1d(**t, backend=backend, **mode.options(), return_final_state=True)[1]
            for t in (tensors, changed)
        ]
        assert torch.equal(*states)
        for name, t in actual.items():
            assert torch.equal(t, expected[name]), name
        for i, end in enumerate(mode.lengths):
            for name in {"y", "x", "residual"} & actual.keys():
                assert (actual[name][i, :, end:] == 0).all(), name


def test_second_derivatives_with_nan_behind_the_ends(capability):
    mode = Mode(2, 3, 4, 12, 3, 2, 1, "gelu", "before", state=True, lengths=(12, 5))
    clean = mode.tensors(torch.float64)
    dirty = {name: t.clone() for name, t in clean.items()}
    for name in ("x", "residual"):
        dirty[name][1, :, 5:] = float("nan")
    outcomes = []
    for tensors in (clean, dirty):
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        y = causal_conv1d(**dict(zip(tensors, leaves, strict=True)), backend="cpu", **mode.options())
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        outcomes.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert all(t.isfinite().all() for t in outcomes[1])
    assert all(map(torch.equal, *outcomes))


def sequences_alone(mode: Mode, tensors, grad, **options):
    """Every sequence as a batch of one, with its results where they are in ``mode``'s."""
    for i, (sample, time) in enumerate(mode.spans()):
        if time.stop == time.start:
            continue
        one = dict(tensors)
        for name in {"x", "residual"} & tensors.keys():
            one[name] = tensors[name][sample, :, time]
        if "initial_state" in tensors:
            one["initial_state"] = tensors["initial_state"][i : i + 1]
        alone = mode._replace(batch=1, length=time.stop - time.start, packed=None, lengths=None)
        yield i, sample, time, results(causal_conv1d, one, grad[sample, :, time], **alone.options(), **options)


@pytest.mark.parametrize("mode", [m for m in MODES if m.sequences > 1], ids=str)
def test_bits_of_a_sequence_do_not_depend_on_the_others(mode: Mode):
    """Packed, padded, or alone: the same bits of y and of the gradients of x, residual and state."""
    tensors, grad = mode.tensors(torch.float32), mode.grad(torch.float32)
    for runner in COMPILED if mode in FEW_MODES or mode in MODES[:35] else [BEST]:
        whole = results(causal_conv1d, tensors, grad, backend=runner.use(), **mode.options())
        for i, sample, time, alone in sequences_alone(mode, tensors, grad, backend="cpu"):
            for name in {"y", "x", "residual"} & alone.keys():
                assert torch.equal(alone[name], whole[name][sample, :, time]), (runner, i, name)
            if mode.state:
                assert torch.equal(alone["initial_state"], whole["initial_state"][i : i + 1]), (runner, i)


@pytest.mark.parametrize("mode", [m for m in FEW_MODES if m.packed or m.lengths], ids=str)
def test_bits_do_not_depend_on_the_place(mode: Mode, capability):
    """The sequences in reverse order."""
    count = mode.sequences
    order = list(reversed(range(count)))
    tensors, grad = mode.tensors(torch.float32), mode.grad(torch.float32)
    moved = dict(tensors)
    if mode.packed is not None:
        other = mode._replace(packed=tuple(reversed(mode.packed)))
        times = [torch.arange(mode.length)[time] for _, time in mode.spans()]
        index = torch.cat([times[i] for i in order])
        move = lambda t: t[:, :, index]  # noqa: E731
    else:
        other = mode._replace(lengths=tuple(reversed(mode.lengths)))
        move = lambda t: t[order]  # noqa: E731
    for name in {"x", "residual"} & tensors.keys():
        moved[name] = move(tensors[name])
    if mode.state:
        moved["initial_state"] = tensors["initial_state"][order]
    expected = results(causal_conv1d, tensors, grad, backend="cpu", **mode.options())
    actual = results(causal_conv1d, moved, move(grad), backend="cpu", **other.options())
    for name in {"y", "x", "residual"} & actual.keys():
        assert torch.equal(actual[name], move(expected[name])), name
    if mode.state:
        assert torch.equal(actual["initial_state"], expected["initial_state"][order])


LARGE = [  # enough to be shared between threads
    Mode(4, 16, 16, 300, 3, 4, 4, "silu", "after"),
    Mode(2, 48, 48, 1000, 4, 1, 48, "silu", "before", state=True),
    Mode(1, 20, 20, 4000, 3, 8, 1, "gelu", "after", state=True, packed=(1500, 3, 0, 497, 2000)),
    Mode(1, 64, 64, 1500, 3, 8, 64, "gelu", None, packed=(700, 3, 0, 297, 500)),
    Mode(8, 16, 16, 300, 3, 8, 1, "tanh", "before", lengths=(300, 1, 0, 299, 100, 300, 7, 250)),
    Mode(2, 6, 96, 500, 3, 2, 2, "gelu", "after"),
]


@pytest.mark.parametrize("mode", LARGE, ids=str)
def test_bits_depend_on_neither_the_run_nor_the_thread_count(mode: Mode, capability):
    tensors, grad = mode.tensors(torch.float32), mode.grad(torch.float32)
    expected = results(causal_conv1d, tensors, grad, backend="cpu", **mode.options())
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        actual = results(causal_conv1d, tensors, grad, backend="cpu", **mode.options())
        for name, t in actual.items():
            assert torch.equal(t, expected[name]), (threads, name)


@pytest.mark.parametrize("mode", FEW_MODES, ids=str)
def test_the_future_does_not_change_the_past(mode: Mode, capability):
    tensors = mode.tensors(torch.float32)
    y = causal_conv1d(**tensors, backend="cpu", **mode.options())
    for i, (sample, time) in enumerate(mode.spans()):
        if time.stop - time.start < 4:
            continue
        cut = (time.start + time.stop) // 2
        changed = dict(tensors, x=tensors["x"].clone())
        changed["x"][sample, :, cut : time.stop] = float("nan")
        other = causal_conv1d(**changed, backend="cpu", **mode.options())
        touched = torch.zeros_like(y, dtype=torch.bool)
        touched[sample, :, cut : time.stop] = True
        assert torch.equal(other[~touched], y[~touched]), i
        assert other[sample, :, cut].isnan().all()
        if mode.state:
            changed = dict(tensors, initial_state=tensors["initial_state"].clone())
            changed["initial_state"][i] = float("nan")
            other = causal_conv1d(**changed, backend="cpu", **mode.options())
            touched = torch.zeros_like(y, dtype=torch.bool)
            touched[sample, :, time.start : min(time.stop, time.start + mode.reach)] = True
            assert torch.equal(other.isnan(), touched), i


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", FEW_MODES + MODES[:12], ids=str)
def test_half_precision(mode: Mode, name):
    """Sums in float32: against float64 of the rounded inputs, an output is off by its own rounding and little more.

    The gradients pass through one more rounding, of what the forward saves.
    """
    dtype = getattr(torch, name)
    eps = torch.finfo(dtype).eps
    tensors, grad = mode.tensors(dtype), mode.grad(dtype)
    exact = results(define(mode), {n: t.double() for n, t in tensors.items()}, grad.double())
    for runner in COMPILED if mode in FEW_MODES[:3] else [BEST]:
        actual = results(causal_conv1d, tensors, grad, backend=runner.use(), **mode.options())
        for key, value in actual.items():
            assert value.dtype == dtype
            if key == "y":
                allowed = exact["y"].abs() * (eps / 2 * 1.01) + 4 * EPS + torch.finfo(dtype).smallest_normal * eps
                assert ((value.double() - exact["y"]).abs() <= allowed).all()
            elif not mode.activation or mode.activation == "leaky_relu":
                assert error(value, exact[key]) <= 0.51 * eps, key
            else:
                assert error(value, exact[key]) <= 2 * eps, key


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast(backend):
    """As ``conv1d`` under autocast: bfloat16 unless switched off, and float64 stays what it is."""
    mode = Mode(2, 6, 6, 40, 3, 2, 2, "silu", "before", state=True)
    tensors, grad = mode.tensors(torch.float32), mode.grad(torch.float32)
    options = {**mode.options(), "backend": backend}
    plainly = results(causal_conv1d, tensors, grad, **options)
    halves = {name: t.bfloat16() for name, t in tensors.items()}
    expected = results(causal_conv1d, halves, grad.bfloat16(), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        y, state = causal_conv1d(**leaves, **options, return_final_state=True)
        assert y.dtype == state.dtype == torch.bfloat16
        assert F.conv1d(tensors["x"], tensors["weight"], groups=2).dtype == y.dtype
        assert torch.equal(y, expected["y"])
        mixed = dict(tensors, weight=tensors["weight"].bfloat16())
        assert torch.equal(causal_conv1d(**mixed, **options), expected["y"])
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(causal_conv1d(**tensors, **options), plainly["y"])
        doubles = {name: t.double() for name, t in tensors.items()}
        assert causal_conv1d(**doubles, **options).dtype == torch.float64
        assert_agree(results(causal_conv1d, doubles, grad.double(), **options),
                     results(define(mode), doubles, grad.double()))  # fmt: skip
        with pytest.raises(TypeError, match=r"^weight must have the dtype of x"):
            causal_conv1d(tensors["x"].double(), tensors["weight"], groups=2, backend=backend)
    gradients = torch.autograd.grad(y, list(leaves.values()), grad.bfloat16())
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype == torch.float32
        assert torch.equal(gradient, expected[name].float()), name
    with torch.autocast("cpu", dtype=torch.float16):
        assert causal_conv1d(**tensors, **options).dtype == torch.float16


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("pool", [False, True])
def test_stack_is_that_of_every_sequence(kind, pool, capability):
    """Values and gradients of packed and padded sequences against those of each alone."""
    g = torch.Generator().manual_seed(0)
    lengths, widths, dilations = (30, 1, 77, 130), (3, 7, 7, 5), (1, 8, 60)
    weights = []
    for c, o in itertools.pairwise(widths):
        shapes = [(o, c, 3), (o,), (o, o, 3), (o,)] + ([] if c == o else [(o, c, 1), (o,)])
        weights.append([(torch.randn(s, generator=g, dtype=torch.float64) / 3).requires_grad_() for s in shapes])
    flat = [t for block in weights for t in block]
    series = [torch.randn(1, 3, n, generator=g, dtype=torch.float64).requires_grad_() for n in lengths]
    if kind == "packed":
        x = torch.cat(series, 2)
        where = {"cu_seqlens": torch.tensor([0, 30, 31, 108, 238], dtype=torch.int32)}
    else:
        x = torch.cat([F.pad(t, (0, 140 - t.shape[2]), value=float("nan")) for t in series])
        where = {"lengths": torch.tensor(lengths)}
    blocks = [BlockWeights(*block) for block in weights]
    alone = [causal_conv_stack(t, blocks, dilations, pool=pool, backend="reference") for t in series]
    targets = [torch.randn(y.shape, generator=g, dtype=torch.float64) for y in alone]
    expected = torch.autograd.grad(alone, [*series, *flat], targets)
    for backend in ("cpu", "reference"):
        together = x.detach().requires_grad_()
        y = causal_conv_stack(together, blocks, dilations, pool=pool, backend=backend, **where)
        if pool:
            parts = y.split(1)
        elif kind == "packed":
            parts = y.split(lengths, 2)
        else:
            parts = [y[i : i + 1, :, :n] for i, n in enumerate(lengths)]
            assert all((y[i, :, n:] == 0).all() for i, n in enumerate(lengths))
        for actual, e in zip(parts, alone, strict=True):
            assert error(actual.detach(), e.detach()) <= 1e-12
        grad_x, *others = torch.autograd.grad(parts, [together, *flat], targets)
        for i, n in enumerate(lengths):
            if kind == "packed":
                own = grad_x.split(lengths, 2)[i]
            else:
                own = grad_x[i : i + 1, :, :n]
                assert (grad_x[i, :, n:] == 0).all()
            assert error(own, expected[i]) <= 1e-10
        for actual, e in zip(others, expected[len(series) :], strict=True):
            assert error(actual, e) <= 1e-10
        with torch.no_grad():
            assert torch.equal(causal_conv_stack(together, blocks, dilations, pool=pool, backend=backend, **where), y)


@pytest.mark.parametrize("pool", [False, True])
def test_bits_of_a_stack_do_not_depend_on_how_sequences_are_stored(pool, capability):
    g = torch.Generator().manual_seed(0)
    lengths = (30, 1, 77, 400)
    weights = [torch.randn(s, generator=g) / 3 for s in ((9, 3, 3), (9,), (8, 9, 3), (8,), (8, 3, 1), (8,))]
    series = [torch.randn(1, 3, n, generator=g) for n in lengths]

    def run(x, **where):
        leaves = [x.clone().requires_grad_(), *weights]
        y = causal_conv_stack(leaves[0], [BlockWeights(*leaves[1:])], [16], pool=pool, backend="cpu", **where)
        return y.detach(), torch.autograd.grad(y.sin().sum(), leaves[0])[0]

    alone = [run(t) for t in series]
    packed = run(torch.cat(series, 2), cu_seqlens=torch.tensor([0, 30, 31, 108, 508], dtype=torch.int32))
    padded = run(torch.cat([F.pad(t, (0, 450 - t.shape[2])) for t in series]), lengths=torch.tensor(lengths))
    for i, n in enumerate(lengths):
        y, grad_x = alone[i]
        assert torch.equal(packed[1].split(lengths, 2)[i], grad_x)
        assert torch.equal(padded[1][i : i + 1, :, :n], grad_x)
        if pool:
            assert torch.equal(packed[0][i : i + 1], y)
            assert torch.equal(padded[0][i : i + 1], y)
        else:
            assert torch.equal(packed[0].split(lengths, 2)[i], y)
            assert torch.equal(padded[0][i : i + 1, :, :n], y)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pool_of_ties_and_nan_in_packed_sequences(backend):
    """The first of equal maxima has the gradient; NaN counts as the maximum of its own sequence only."""
    x = torch.randint(-1, 2, (1, 3, 60), generator=torch.Generator().manual_seed(0)).double()
    one = torch.eye(3, dtype=torch.float64)[:, :, None]
    block = BlockWeights(one, None, 0 * one, None)  # y = x
    offsets = torch.tensor([0, 25, 26, 60], dtype=torch.int32)
    x.requires_grad_()
    y = causal_conv_stack(x, [block], [1], pool=True, cu_seqlens=offsets, backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    expected = torch.zeros_like(x)
    for i, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        best = x[0, :, begin:end].max(1)
        assert torch.equal(y[i], best.values)
        expected[0, range(3), begin + best.indices] = 1
    assert torch.equal(gradient, expected)
    with torch.no_grad():
        x[0, 1, 40] = float("nan")
        y = causal_conv_stack(x, [block], [1], pool=True, cu_seqlens=offsets, backend=backend)
    assert y.isnan().any(1).tolist() == [False, False, True]


def test_half_precision_of_a_stack(capability):
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 3, 40), (6, 3, 3), (6,), (5, 6, 3), (5,), (5, 3, 1), (5,)]
    tensors = [(torch.randn(s, generator=g) / 2).bfloat16() for s in shapes]
    for pool, where in itertools.product((False, True), ({}, {"lengths": torch.tensor([40, 3, 17])})):
        eps = torch.finfo(torch.bfloat16).eps
        outcomes = []
        for convert in (torch.Tensor.bfloat16, torch.Tensor.double):
            leaves = [convert(t).requires_grad_() for t in tensors]
            y = causal_conv_stack(leaves[0], [BlockWeights(*leaves[1:])], [4], pool=pool, backend="cpu", **where)
            assert y.dtype == leaves[0].dtype
            # Rounded values reach their maximum elsewhere: its gradient is not comparable.
            outcomes.append([y] if pool else [y, *torch.autograd.grad(y.sum(), leaves)])
        for i, (actual, expected) in enumerate(zip(*outcomes, strict=True)):
            assert error(actual.detach(), expected.detach()) <= 4 * eps, i


def test_modes_are_what_they_are_called():
    """The tests above would be vacuous if the list missed a mode or a capability."""
    assert {m.activation for m in MODES} == set(ACTIVATIONS)
    assert {m.residual for m in MODES} == {None, "after", "before"}
    dense, depthwise = lambda m: m.groups == 1, lambda m: m.groups == m.in_channels > 1
    for groups in (dense, depthwise, lambda m: 1 < m.groups < m.in_channels):
        for state, where in itertools.product((False, True), ("packed", "lengths", None)):
            assert any(
                groups(m) and m.state == state and (where is None or getattr(m, where) is not None) for m in MODES
            )
    assert [r.capability for r in COMPILED] == list(pykernels.cpu_capabilities())


UNCHECKED = [  # offsets of sequences in 40 samples, and what they are taken for
    ([0, 50, 20, 40], [0, 40, 40, 40]),
    ([0, 20, 10, 40], [0, 20, 20, 40]),
    ([5, 10, 12, 99], [0, 10, 12, 40]),
    ([-3, -2, 4, 30], [0, 0, 4, 40]),
    ([7, 2**31 - 1, -(2**31), 0], [0, 40, 40, 40]),
]


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_unchecked_offsets_are_clamped(backend, groups, state, poisoned):
    mode = Mode(1, 3, 3, 40, 3, 4, groups, "silu", "before", state=state, packed=(1, 2, 37))
    tensors, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    outcomes: list[dict] = [{}, {}]
    for wrong, right in UNCHECKED:
        with pytest.raises(ValueError, match=r"^cu_seqlens must start with 0, not decrease"):
            causal_conv1d(**tensors, **{**mode.options(), "cu_seqlens": torch.tensor(wrong, dtype=torch.int32)})
        for i, offsets in enumerate((wrong, right)):
            where = {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32), "validate": False, "backend": backend}
            options = {**mode.options(), **where}
            outcomes[i] = results(causal_conv1d, tensors, grad, **options)
            outcomes[i]["state"] = causal_conv1d(**tensors, **options, return_final_state=True)[1]
            leaves = [t.clone().requires_grad_() for t in tensors.values()]
            y = causal_conv1d(**dict(zip(tensors, leaves, strict=True)), **options)
            first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            outcomes[i] |= {f"second {name}": g for name, g in zip(tensors, second, strict=True)}
        for name, t in outcomes[0].items():
            assert t.isfinite().all(), (wrong, name)
            assert torch.equal(t, outcomes[1][name]), (wrong, name)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_unchecked_lengths_are_clamped(backend, dtype, state, poisoned):
    mode = Mode(3, 3, 4, 40, 3, 4, 1, "silu", "before", state=state, lengths=(40, 0, 7))
    tensors, grad = mode.tensors(torch.float64), mode.grad(torch.float64)
    far = torch.iinfo(dtype).max
    for wrong in ([41, -1, 7], [far, -far, 7]):
        outcomes = []
        for lengths in (wrong, mode.lengths):
            options = {**mode.options(), "lengths": torch.tensor(lengths, dtype=dtype), "backend": backend}
            if lengths is wrong:
                with pytest.raises(ValueError, match=r"^lengths must be between 0 and 40, got -\d+"):
                    causal_conv1d(**tensors, **options)
            options["validate"] = False
            outcome = results(causal_conv1d, tensors, grad, **options)
            outcome["state"] = causal_conv1d(**tensors, **options, return_final_state=True)[1]
            outcomes.append(outcome)
        for name, t in outcomes[0].items():
            assert t.isfinite().all(), name
            assert torch.equal(t, outcomes[1][name]), name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("pool", [False, True])
def test_unchecked_sequences_of_a_stack(backend, pool):
    """Clamped as those of a convolution; without a sample there is no maximum, which is an error at any rate."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((1, 3, 40), (3, 3, 3), (3, 3, 3))]
    block = BlockWeights(tensors[1], None, tensors[2], None)

    def run(x, **where):
        x = x.clone().requires_grad_()
        y = causal_conv_stack(x, [block], [2], pool=pool, backend=backend, **where)
        return y.detach(), *torch.autograd.grad(y.sin().sum(), x)

    def packed(*offsets, **options):
        return run(tensors[0], cu_seqlens=torch.tensor(offsets, dtype=torch.int32), **options)

    def padded(*lengths, **options):
        return run(tensors[0].expand(2, 3, 40), lengths=torch.tensor(lengths), **options)

    for actual, expected in (
        (packed(5, 10, 12, 99, validate=False), packed(0, 10, 12, 40)),
        (padded(99, 7, validate=False), padded(40, 7)),
    ):
        assert all(map(torch.equal, actual, expected))
    for wrong in (lambda: packed(5, 10, 12, 99), lambda: packed(0, 12, 10, 40), lambda: padded(99, 7)):
        with pytest.raises(ValueError, match=r"^(cu_seqlens|lengths) must"):
            wrong()
    if pool:
        for empty in (
            lambda **v: packed(0, 10, 10, 40, **v),
            lambda **v: packed(0, 40, 40, **v),
            lambda **v: padded(40, 0, **v),
        ):
            with pytest.raises(ValueError, match="empty series"):
                empty()
            if backend == "cpu":
                with pytest.raises(ValueError, match="at least one sample"):
                    empty(validate=False)
