"""How mlp_odeint fits into torch: registration, compilation, transforms, derivatives of every kind and order."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pykernels import mlp_odeint
from pykernels.backends import OPERATORS
from pykernels.ops.latent_ode.mlp import trajectory
from pykernels.ops.latent_ode.op import problem as grouped
from pykernels.ops.latent_ode.reference import ACTIVATIONS, INPUT_MAPS, solve
from pykernels.ops.latent_ode.tableaux import TABLEAUX

from .trajectories import FEW, RUNNERS, Problem, assert_agree, assert_equal, error

# torch itself still uses torch.jit, in forward mode and in inductor.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
ops = torch.ops.pykernels

#: Small problems that together have every option.
SMALL = {
    "plain": Problem(2, 2, (3,), substeps=1),
    "linear": Problem(2, 2, (), method="euler", control=1),
    "everything": FEW[2]._replace(batch=3, dim=2, hidden=(3, 2), groups=2, correction=(2,), control=1),
    "many": FEW[3]._replace(batch=20, dim=2, hidden=(3, 2), groups=2, correction=(2,), control=1, substeps=1),
}
each_problem = pytest.mark.parametrize("problem", SMALL.values(), ids=SMALL)
each_runner = pytest.mark.parametrize("runner", RUNNERS, ids=str)


def function(problem: Problem, names, **changed) -> Callable[..., tuple[Tensor, ...]]:
    """The trajectory of tensors with these names."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(problem.run(dict(zip(names, tensors, strict=True)), **changed).values())

    return run


def loss(problem: Problem, names, **changed) -> Callable[..., Tensor]:
    """A number that depends on all outputs."""
    run = function(problem, names, **changed)

    def total(*tensors: Tensor) -> Tensor:
        result: Tensor = sum(value.sin().sum() / (i + 1) for i, value in enumerate(run(*tensors)))
        return result

    return total


def agree(actual, expected, tolerance: float = 1e-12) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert error(a, e) <= tolerance


@each_runner
@pytest.mark.parametrize(
    "problem",
    [
        *(Problem(2, 2, (3,), method=method, time_input=True) for method in TABLEAUX),
        *(Problem(2, 2, (3, 2), activation=activation, substeps=1) for activation in ACTIVATIONS),
        Problem(2, 2, (3, 2), activation="silu", slope=(2,), substeps=1),
        *(Problem(2, 2, (), input_map=input_map, method="heun2") for input_map in INPUT_MAPS),
        *SMALL.values(),
    ],
    ids=str,
)
def test_gradcheck(problem: Problem, runner):
    """Of every differentiable argument."""
    tensors = problem.tensors()
    leaves = [value.requires_grad_() for value in tensors.values()]
    fast = problem.batch > 3
    assert torch.autograd.gradcheck(function(problem, tensors, backend=runner.use()), leaves, fast_mode=fast)


@pytest.mark.parametrize("problem", [SMALL["plain"], SMALL["everything"]], ids=str)
def test_second_derivatives(problem: Problem):
    tensors = problem.tensors()
    leaves = [value.requires_grad_() for value in tensors.values()]
    assert torch.autograd.gradgradcheck(function(problem, tensors, backend="cpu"), leaves, fast_mode=True)


@each_problem
def test_gradient_penalty(problem: Problem):
    """Double backward, of parameters through the gradient of the start, and a third derivative."""
    tensors = problem.tensors()
    outcomes = []
    for backend in ("cpu", "reference"):
        leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
        value = loss(problem, tensors, backend=backend)(*leaves.values())
        (gradient,) = torch.autograd.grad(value, leaves["y0"], create_graph=True)
        second = torch.autograd.grad(gradient.square().sum(), list(leaves.values()), create_graph=True,
                                     materialize_grads=True)  # fmt: skip
        third = torch.autograd.grad(sum(g.square().sum() for g in second), leaves["y0"])
        outcomes.append([*second, *third])
    agree(*outcomes)


@each_problem
def test_forward_mode(problem: Problem):
    tensors = problem.tensors()
    run = function(problem, tensors, backend="cpu")
    g = torch.Generator().manual_seed(5)
    tangents = [torch.randn(v.shape, generator=g, dtype=v.dtype) for v in tensors.values()]
    values, derivatives = torch.func.jvp(run, tuple(tensors.values()), tuple(tangents))
    agree(values, run(*tensors.values()))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, d) for v, d in zip(tensors.values(), tangents, strict=True)]
        agree([forward_ad.unpack_dual(v).tangent for v in run(*duals)], derivatives)
        plain = [forward_ad.unpack_dual(v) for v in run(*tensors.values())]  # no tangent among the inputs
        assert all(v.tangent is None for v in plain)
    step = 1e-6
    ahead, behind = (run(*(v + s * step * d for v, d in zip(tensors.values(), tangents, strict=True))) for s in (1, -1))
    agree(derivatives, [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)], 1e-6)


@each_problem
def test_function_transforms(problem: Problem):
    """``grad`` of every argument, ``vmap`` over every one alone and over all, and ``vmap(grad)``."""
    tensors = problem.tensors()
    names, values = list(tensors), list(tensors.values())
    run, number = function(problem, names, backend="cpu"), loss(problem, names, backend="cpu")
    every = tuple(range(len(values)))
    leaves = [value.clone().requires_grad_() for value in values]
    expected = torch.autograd.grad(number(*leaves), leaves)
    agree(torch.func.grad(number, every)(*values), expected)
    many = [torch.stack([v, 1.1 * v]) for v in values]
    for chosen in [[i] for i in every] + [list(every)]:
        dims = tuple(0 if i in chosen else None for i in every)
        args = [many[i] if i in chosen else v for i, v in enumerate(values)]
        actual = torch.func.vmap(run, dims)(*args)
        for which in range(2):
            agree([a[which] for a in actual], run(*(a[which] if i in chosen else a for i, a in enumerate(args))))
    dims = (0, *[None] * (len(values) - 1))
    actual = torch.func.vmap(torch.func.grad(number, every), dims)(many[0], *values[1:])
    agree([a[0] for a in actual], expected)


#: Dynamo itself instantiates the autograd functions that it traces.
compiles = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


def compiled(fn: Callable, **options) -> Callable:
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, **{"backend": "aot_eager", **options})


@compiles
@pytest.mark.parametrize("problem", [*SMALL.values(), Problem(2, times=1, norms=True), Problem(0)], ids=str)
def test_compile(problem: Problem):
    """Forward and backward, with memory for all states and without."""
    tensors = problem.tensors()
    for max_memory in (None, 0):
        outcomes = []
        for runs in (compiled(trajectory), trajectory):
            run = partial(problem.run, function=runs)
            leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
            outputs = run(leaves, backend="cpu", max_memory=max_memory)
            recorded = [v for v in outputs.values() if v.requires_grad]
            gradients = torch.autograd.grad(
                recorded, list(leaves.values()), [v.cos() for v in recorded], materialize_grads=True
            )
            named = {f"grad of {name}": value for name, value in zip(leaves, gradients, strict=True)}
            outcomes.append({name: value.detach() for name, value in outputs.items()} | named)
            with torch.no_grad():
                assert_equal(run(tensors, backend="cpu"), {n: v.detach() for n, v in outputs.items()})
        assert_agree(*outcomes)


@compiles
def test_compile_once_for_every_batch():
    tensors = Problem().tensors()
    weights = [tensors[f"w{i}"].requires_grad_() for i in range(2)]

    def direct(y0: Tensor, t: Tensor) -> Tensor:
        result: Tensor = mlp_odeint(y0, t, weights, None, activation="tanh", method="rk4", backend="cpu")
        return result.sin()

    fn = compiled(direct, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (5, 70, 9):
            y0 = Problem(batch).tensors()["y0"].requires_grad_()
            states = [f(y0, tensors["t"]) for f in (fn, direct)]
            agree(*([s.detach(), *torch.autograd.grad(s.sum(), [y0, *weights])] for s in states))


def raw(problem: Problem, dtype: torch.dtype = torch.float64) -> tuple[tuple, tuple]:
    """The tensors and the options of the raw operators, as the public function passes them."""
    seen: list[tuple] = []

    def record(tensors, options):
        seen.append((tuple(tensors), tuple(options)))
        return solve(tensors, options)

    implementations = OPERATORS["mlp_odeint"].implementations
    recording = dataclasses.replace(implementations["reference"], run=record)
    with mock.patch.dict(implementations, {"reference": recording}):
        problem.run(problem.tensors(dtype), backend="reference")
    return seen[0]


def backward_arguments(problem: Problem, dtype: torch.dtype = torch.float64, needed=None) -> tuple:
    tensors, options = raw(problem, dtype)
    states, norms, energy, saved = ops.mlp_odeint_saving(*tensors, *options, "cpu")
    g = torch.Generator().manual_seed(3)
    grads = [torch.randn(v.shape, generator=g, dtype=torch.float64).to(dtype) for v in (states, norms, energy)]
    count = 6 + sum(map(len, tensors[6:10]))
    some = [True] * count if needed is None else needed(count)
    grad_norms, grad_energy = (v if v.numel() else None for v in grads[1:])
    return (grads[0], grad_norms, grad_energy, states, saved, *tensors, *options, "cpu", some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_problem
def test_opcheck(problem: Problem, dtype):
    tensors, options = raw(problem, dtype)
    calls = [
        (ops.mlp_odeint, (*tensors, *options, "cpu")),
        (ops.mlp_odeint_saving, (*tensors, *options, "cpu")),
        (ops.mlp_odeint_backward, backward_arguments(problem, dtype)),
        (ops.mlp_odeint_backward, backward_arguments(problem, dtype, lambda n: [i % 2 == 0 for i in range(n)])),
    ]
    for operator, args in calls:
        if operator is ops.mlp_odeint_saving:  # what lies between its records is not written
            args = tuple(v.clone() if isinstance(v, Tensor) else v for v in args)
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        assert set(torch.library.opcheck(operator.default, args, test_utils=tests).values()) == {"SUCCESS"}


@each_problem
def test_raw_operators(problem: Problem):
    """They compute what the public function does, and refuse to drop a gradient."""
    tensors, options = raw(problem)
    args = (*tensors, *options, "cpu")
    expected = list(problem.run(problem.tensors(), backend="cpu").values())
    for results in (ops.mlp_odeint(*args), ops.mlp_odeint_saving(*args)[:3]):
        assert all(map(torch.equal, [v for v in results if v.numel() > 0], expected))
    calls = (
        (ops.mlp_odeint, args),
        (ops.mlp_odeint_saving, args),
        (ops.mlp_odeint_backward, backward_arguments(problem)),
    )
    for operator, arguments in calls:
        for i, value in enumerate(arguments):
            tracked = list(arguments)
            if isinstance(value, Tensor) and value.is_floating_point():
                tracked[i] = value.clone().requires_grad_()
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                tracked[i] = [value[0].clone().requires_grad_(), *value[1:]]
            else:
                continue
            with pytest.raises(RuntimeError, match="no derivative of its own"):
                operator(*tracked)
            with torch.no_grad():
                operator(*tracked)


def test_raw_operators_refuse_what_does_not_fit_together():
    """Whoever goes round the public function gets an exception and no access outside the tensors."""
    problem = SMALL["everything"]
    tensors, options = raw(problem)
    names = [*grouped((*tensors, *options))[0]._fields, *grouped((*tensors, *options))[1]._fields]
    given = dict(zip(names, (*tensors, *options), strict=True))
    w, b, cw, cb = (given[name] for name in ("weights", "biases", "correction_weights", "correction_biases"))
    changes = [
        {"y0": given["y0"][0]},
        {"y0": given["y0"].float()},
        {"y0": given["y0"][:, :1]},
        {"y0": given["y0"][1:]},
        {"t": given["t"][:-1]},
        {"t": given["t"][0]},
        {"t": given["t"][:0]},
        {"slopes": given["slopes"][:1]},
        {"slopes": given["slopes"][:, :1]},
        {"slopes": given["slopes"].float()},
        {"control": given["control"][:1]},
        {"control": given["control"][:, :1]},
        {"control": given["control"][:, :, :0]},
        {"control": given["control"][0]},
        {"control": None},
        {"correction_slopes": given["correction_slopes"][:1]},
        {"injected": given["injected"][1:]},
        {"injected": given["injected"].float()},
        {"injected": None},
        {"mask": None},
        {"mask": given["mask"][1:]},
        {"mask": given["mask"].long()},
        {"group": None},
        {"group": given["group"][1:]},
        {"group": given["group"].int()},
        {"group": given["group"] + 7},
        {"group": given["group"] - 1},
        {"weights": []},
        {"weights": w[:-1]},
        {"weights": [w[0], w[1][:1], w[2]]},
        {"weights": [w[0], w[1][0], w[2]]},
        {"weights": [w[0][:, :, :1], *w[1:]]},
        {"weights": [*w[:-1], w[2][:, :1]]},
        {"weights": [v.float() for v in w]},
        {"weights": [v[:0] for v in w], "biases": [v[:0] for v in b], "slopes": given["slopes"][:0]},
        {"weights": [v[None] for v in w], "biases": [v[None] for v in b], "slopes": given["slopes"][None]},
        {"biases": b[:-1]},
        {"biases": [b[0][:1], *b[1:]]},
        {"biases": [b[0][:, :1], *b[1:]]},
        {"correction_weights": [], "correction_biases": []},
        {"correction_weights": [v[0] for v in cw], "correction_biases": [v[0] for v in cb]},
        {"correction_weights": [cw[0][:, :, :1], cw[1]]},
        {"correction_weights": [cw[0][:1], cw[1]]},
        {"correction_weights": [v[:1] for v in cw], "correction_biases": [v[:1] for v in cb],
         "correction_slopes": given["correction_slopes"][:1], "group": given["group"] + 1},
        {"substeps": 0},
        {"substeps": -1},
        {"method": "dopri5"},
        {"activation": "gelu"},
        {"input_map": "exp"},
        {"energy": "space"},
        {"time_input": False},
        {"backend": "abacus"},
    ]  # fmt: skip
    accepted: list[object] = []
    wrong = (ValueError, TypeError, RuntimeError, LookupError, ImportError)
    for i, changed in enumerate(changes):
        args = tuple((given | {"backend": "cpu"} | changed).values())
        for operator in (ops.mlp_odeint, ops.mlp_odeint_saving):
            with contextlib.suppress(*wrong):
                operator(*args)
                accepted.append((i, list(changed)))
    good = backward_arguments(problem)
    grad, grad_norms, grad_energy, states, (tape,), *rest = good
    ops.mlp_odeint_backward(*good)
    swapped = tape.clone()
    swapped[0] = float("nan")
    for i, results in enumerate([
        (grad[1:], grad_norms, grad_energy, states, [tape]),
        (grad[:0], grad_norms, grad_energy, states, [tape]),
        (grad.float(), grad_norms, grad_energy, states, [tape]),
        (grad, grad_norms[1:], grad_energy, states, [tape]),
        (grad, grad_norms, grad_energy[:, 1:], states, [tape]),
        (grad, grad_norms.float(), grad_energy, states, [tape]),
        (grad[:1, :1], None, None, states[:1, :1], [tape]),
        (grad, grad_norms, grad_energy, states, []),
        (grad, grad_norms, grad_energy, states, [tape, tape]),
        (grad, grad_norms, grad_energy, states, [tape[:-1]]),
        (grad, grad_norms, grad_energy, states, [tape[:0]]),
        (grad, grad_norms, grad_energy, states, [tape.float()]),
        (grad, grad_norms, grad_energy, states, [torch.stack([tape, tape], 1)[:, 0]]),
        (grad, grad_norms, grad_energy, states, [torch.zeros_like(tape)]),
        (grad, grad_norms, grad_energy, states, [swapped]),
    ]):  # fmt: skip
        with contextlib.suppress(*wrong):
            ops.mlp_odeint_backward(*results, *rest)
            accepted.append(("backward", i))
    with contextlib.suppress(*wrong):
        ops.mlp_odeint_backward(grad, grad_norms, grad_energy, states, [tape], *rest[:-1], [True])
        accepted.append("needed")
    # The states of a forward with other options take another tape.
    other = list(rest)
    other[names.index("substeps")] = 7
    with contextlib.suppress(*wrong):
        ops.mlp_odeint_backward(grad, grad_norms, grad_energy, states, [tape], *other)
        accepted.append("substeps")
    assert not accepted


@pytest.mark.parametrize("name", SMALL["everything"].tensors())
def test_changing_a_saved_tensor_is_noticed(name):
    problem = SMALL["everything"]
    leaves = {n: v.requires_grad_() for n, v in problem.tensors().items()}
    states = problem.run(leaves, backend="cpu")["states"]
    with torch.no_grad():
        leaves[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        states.sum().backward()


def test_changing_the_mask_or_the_groups_is_noticed():
    problem = SMALL["everything"]
    leaves = {n: v.requires_grad_() for n, v in problem.tensors().items()}
    options = problem.arguments(leaves)[1]
    mask, group = options["reinject"][0], options["group"]
    for changed in (mask, group):
        states = problem.run(leaves, backend="cpu", reinject=(mask, leaves["injected"]), group=group)["states"]
        changed.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            states.sum().backward()


@each_problem
def test_modes_without_gradients(problem: Problem):
    leaves = {n: v.requires_grad_() for n, v in problem.tensors().items()}
    expected = problem.run(leaves, backend="cpu")
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            outputs = problem.run(leaves, backend="cpu")
        assert not any(v.requires_grad for v in outputs.values())
        assert_equal(outputs, expected)
    total = sum(v.sum() for v in expected.values())
    twice = [torch.autograd.grad(total, list(leaves.values()), retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *twice))


@each_problem
def test_autocast_leaves_it_alone(problem: Problem):
    tensors = problem.tensors(torch.float32)
    expected = problem.results(tensors, backend="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = problem.results(tensors, backend="cpu")
    assert_equal(actual, expected)


def test_times_of_another_dtype():
    """t keeps its dtype, its gradient too; steps are computed in float64 whatever it is."""
    problem = Problem()
    tensors = problem.tensors(torch.float32)
    single = problem.results(tensors, backend="cpu")
    double = problem.results(tensors | {"t": tensors["t"].double()}, backend="cpu")
    assert double["grad of t"].dtype == torch.float64
    assert torch.equal(double.pop("grad of t").float(), single.pop("grad of t"))
    assert_equal(double, single)
    late = tensors | {"t": tensors["t"].double() + 1e9}  # where float32 does not tell these times apart
    assert error(problem.run(late, backend="cpu")["states"], single["states"]) <= 1e-6


def test_a_batch_of_output_gradients():
    """``is_grads_batched``, as ``torch.autograd.functional.jacobian(vectorize=True)`` uses it."""
    problem = SMALL["plain"]
    leaves = [v.requires_grad_() for v in problem.tensors().values()]
    (states,) = function(problem, problem.tensors(), backend="cpu")(*leaves)
    many = torch.stack([problem.grads({"states": states}, seed)[0] for seed in range(3)])
    found = torch.autograd.grad(states, leaves, many, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(many):
        agree([f[i] for f in found], torch.autograd.grad(states, leaves, grad, retain_graph=True))
