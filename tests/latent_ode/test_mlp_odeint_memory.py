"""Where mlp_odeint reads and writes: strides, uninitialised outputs, guard pages; forked processes and threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import pykernels
from pykernels import mlp_odeint

from ..guarded import check_guarded
from .trajectories import FEW, Problem, assert_agree, assert_equal

NAN = float("nan")


def inside(t: Tensor) -> Tensor:
    """The values of ``t``, as a view into memory that holds NaN everywhere around it and between its rows."""
    view = t.new_full([n + 6 for n in t.shape], NAN)[(slice(3, -3),) * t.dim()]
    return view.copy_(t)


def every_second(t: Tensor) -> Tensor:
    view = t.new_full([2 * n for n in t.shape], NAN)[(slice(None, None, 2),) * t.dim()]
    return view.copy_(t)


def transposed(t: Tensor) -> Tensor:
    return inside(t.movedim(-1, 0)).movedim(0, -1) if t.dim() > 0 else t


def negated(t: Tensor) -> Tensor:
    view = torch._neg_view(inside(-t))
    assert view.is_neg()
    return view


LAYOUTS: list[Callable[[Tensor], Tensor]] = [inside, every_second, transposed, negated]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("problem", [FEW[1], FEW[2]], ids=str)
def test_any_strides(problem: Problem, dtype, layout, capability):
    """The same bits as for contiguous tensors, if one argument is laid out otherwise, and if all are."""
    tensors = problem.tensors(dtype)
    expected = problem.results(tensors, backend="cpu")
    assert all(value.isfinite().all() for value in expected.values())
    views = {name: layout(value) for name, value in tensors.items()}
    for changed in [*({name: view} for name, view in views.items()), views]:
        assert_equal(problem.results(tensors | changed, backend="cpu"), expected, list(changed))


def test_strided_mask_and_group(capability):
    problem = FEW[3]
    tensors = problem.tensors()
    options = problem.arguments(tensors)[1]
    mask, group = options["reinject"][0], options["group"]
    changed = {
        "reinject": (torch.stack([mask, ~mask], 2)[:, :, 0], tensors["injected"]),
        "group": torch.stack([group, group + 99], 1)[:, 0],
    }
    expected = problem.run(tensors, backend="cpu")
    assert_equal(problem.run(tensors, backend="cpu", **changed), expected)


@pytest.mark.parametrize("batch", [3, 40])
def test_expanded(batch, capability):
    """Strides of 0, in the arguments and in the gradient that ``sum`` sends back."""
    problem = Problem(batch=batch, control=2, reinject=True, sets=2)
    tensors = {n: v if n == "t" else v.narrow(0, 0, 1).expand(v.shape) for n, v in problem.tensors().items()}
    copies = {name: value.contiguous() for name, value in tensors.items()}
    assert_equal(problem.results(tensors, backend="cpu"), problem.results(copies, backend="cpu"))
    gradients = []
    for backend in ("cpu", "reference"):
        leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
        problem.run(leaves, backend=backend)["states"].sum().backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    assert_agree(*gradients)


@pytest.mark.parametrize("batch", [3, 40])
def test_shared_memory(batch, capability):
    """One matrix for two layers and for a correction, a bias that is a row of it, and y0 as an injected state."""
    g = torch.Generator().manual_seed(0)
    w = (torch.randn(4, 4, generator=g, dtype=torch.float64) / 2).requires_grad_()
    y = torch.randn(batch, 4, generator=g, dtype=torch.float64).requires_grad_()
    outcomes = []
    for backend in ("cpu", "reference"):
        states = mlp_odeint(
            y,
            torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64),
            [w, w, w.T],
            [w[0], w[:, 1], None],
            activation="tanh",
            method="heun3",
            control=None,
            group=torch.arange(batch) % 2,
            correction=([w.expand(2, 4, 4)], None),
            reinject=(torch.arange(3 * batch).view(3, batch) % 3 == 0, y.expand(3, batch, 4)),
            backend=backend,
        )
        gradients = torch.autograd.grad(states.sin().sum(), (w, y))
        outcomes.append({"states": states.detach(), "w": gradients[0], "y": gradients[1]})
    assert_agree(*outcomes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "problem",
    [*FEW, *(FEW[2]._replace(batch=b, times=t, groups=g) for b, t, g in ((0, 3, 2), (5, 1, 2), (1, 2, 0), (9, 4, 5)))],
    ids=str,
)
def test_every_output_is_written(problem: Problem, dtype, capability, poisoned):
    for max_memory in (None, 0):
        results = problem.results(problem.tensors(dtype), backend="cpu", max_memory=max_memory)
        for name, value in results.items():
            assert value.isfinite().all(), name


@pytest.mark.parametrize("problem", FEW, ids=str)
def test_inputs_are_left_alone(problem: Problem, capability):
    tensors = problem.tensors()
    copies = {name: value.clone() for name, value in tensors.items()}
    problem.results(tensors, backend="cpu", max_memory=0)
    assert_equal(tensors, copies)


@pytest.mark.parametrize("name", FEW[3].tensors())
def test_any_subset_of_the_gradients(name):
    """A gradient does not depend on which others are computed; one that is not needed is not made."""
    problem = FEW[3]
    tensors = problem.tensors()
    expected = problem.results(tensors, backend="cpu")
    for wanted in ({name}, tensors.keys() - {name}):
        leaves = {n: v.clone().requires_grad_(n in wanted) for n, v in tensors.items()}
        outputs = problem.run(leaves, backend="cpu")
        torch.autograd.backward(list(outputs.values()), problem.grads(outputs))
        for n, leaf in leaves.items():
            assert (leaf.grad is not None) == (n in wanted)
            assert leaf.grad is None or torch.equal(leaf.grad, expected[f"grad of {n}"]), n


@pytest.mark.parametrize("output", range(3))
def test_the_gradient_of_each_output_alone(output, capability):
    problem = FEW[3]
    outcomes = []
    for backend in ("cpu", "reference"):
        leaves = {n: v.requires_grad_() for n, v in problem.tensors().items()}
        outputs = problem.run(leaves, backend=backend)
        chosen, grad = list(outputs.values())[output], problem.grads(outputs)[output]
        gradients = torch.autograd.grad(chosen, list(leaves.values()), grad, materialize_grads=True)
        outcomes.append(dict(zip(leaves, gradients, strict=True)))
    assert_agree(*outcomes)


@pytest.mark.skipif(len(pykernels.cpu_capabilities()) < 2, reason="this machine has one CPU capability")
@pytest.mark.parametrize("batch", [3, 16])
def test_backward_with_another_capability(batch):
    """What the forward keeps lies as its capability wants it, perhaps in as much memory as another would take."""
    y0 = Problem(batch=batch, dim=8, hidden=(8,)).tensors()["y0"].requires_grad_()
    weights = [torch.eye(8, dtype=torch.float64)] * 2
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for one in pykernels.cpu_capabilities():
        for other in pykernels.cpu_capabilities():
            pykernels.set_cpu_capability(one)
            states = mlp_odeint(y0, t, weights, None, activation="tanh", method="euler", backend="cpu")
            pykernels.set_cpu_capability(other)
            if one == other:
                states.sum().backward()
            else:
                with pytest.raises(ValueError, match="another CPU capability"):
                    states.sum().backward()


def test_the_number_of_threads_may_change_before_the_backward():
    problem = FEW[1]
    leaves = {n: v.requires_grad_() for n, v in problem.tensors().items()}
    gradients = []
    for threads in (2, 1, 3):
        torch.set_num_threads(2)
        states = problem.run(leaves, backend="cpu")["states"]
        torch.set_num_threads(threads)
        gradients.append(torch.autograd.grad(states.sin().sum(), list(leaves.values()), materialize_grads=True))
    for other in gradients[1:]:
        assert all(map(torch.equal, other, gradients[0]))


GUARDED = """
import pykernels
from pykernels.ops.latent_ode import mlp

g = torch.Generator().manual_seed(0)


def normal(*shape):
    return copied(torch.randn(shape, generator=g).to(dtype)).requires_grad_()


for name in pykernels.cpu_capabilities():
    pykernels.set_cpu_capability(name)
    for dtype in (torch.float32, torch.float64):
        for batch, dim, hidden, control, groups, threads in [
            (1, 1, (1,), 1, 0, 1), (2, 3, (5, 7), 2, 3, 1), (3, 8, (16, 33), 0, 0, 1), (7, 5, (), 3, 2, 1),
            (17, 3, (13,), 5, 2, 2), (33, 2, (64, 65), 0, 0, 1), (70, 17, (9,), 1, 3, 1), (65, 1, (), 0, 1, 1),
        ]:
            torch.set_num_threads(threads)
            inputs = dim + control
            widths = [inputs, *hidden, dim]
            layers = list(zip(widths[:-1], widths[1:]))
            weights, biases = [normal(2, o, i) for i, o in layers], [normal(2, o) for _, o in layers]
            t = copied(torch.tensor([0.0, 0.1, 0.3, 0.4], dtype=dtype)).requires_grad_()
            y0, injected, slope = normal(batch, dim), normal(4, batch, dim), normal(2, len(hidden))
            leaves = [y0, t, injected, slope, *weights, *biases]
            options = {"reinject": (copied(torch.rand(4, batch, generator=g) < 0.4), injected)}
            if control:
                options["control"] = normal(3, batch, control)
                leaves.append(options["control"])
            if groups:
                own = [normal(groups, 6, inputs), normal(groups, dim, 6)], [normal(groups, 6), normal(groups, dim)]
                options["group"] = copied(torch.arange(batch) % groups)
                options["correction"] = own
                leaves += own[0] + own[1]
            for max_memory in (None, 0):
                outputs = mlp.trajectory(
                    y0, t, weights, biases, activation="silu", slope=slope, method="heun3", substeps=3,
                    input_map="tanh", return_residual_norms=True, return_energy="time", max_memory=max_memory,
                    backend="cpu", **options,
                )
                grads = [normal(*o.shape).detach() for o in outputs]
                gradients = torch.autograd.grad(outputs, leaves, grads)
                assert all(bool(v.isfinite().all()) for v in (*outputs, *gradients))
            del y0, t, injected, slope, weights, biases, leaves, options, outputs, grads, gradients
            kept.clear()
"""


def test_no_access_outside_the_tensors():
    """Every argument and result lies against a page without access, once with its start and once with its end."""
    check_guarded(GUARDED, 500)


FORK = """
import os, signal, warnings
import torch
import pykernels
warnings.simplefilter("ignore")  # of forking with threads, which is what this is about
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
y, t = torch.randn(70, 3, generator=g), torch.linspace(0, 1, 5)
weights = [torch.randn(33, 3, generator=g), torch.randn(3, 33, generator=g) / 33]

def run():
    return pykernels.mlp_odeint(y, t, weights, None, activation="tanh", method="rk4", backend="cpu")

def fork(depth):
    expected = run()
    pid = os.fork()
    if pid == 0:
        signal.alarm(100)
        torch.set_num_threads(2)
        same = all(torch.equal(run(), expected) for _ in range(3))
        os._exit(0 if same and (depth == 0 or fork(depth - 1) == 0) else 1)
    status = os.waitpid(pid, 0)[1]
    assert torch.equal(run(), expected)
    return status

print("status", fork(depth=1))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_forked_process():
    """Also one forked from a forked one; the backward of torch itself does not run in a forked process."""
    run = subprocess.run([sys.executable, "-P", "-c", FORK], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == "status 0\n"


def test_calls_from_several_threads():
    """Each with its own inputs and its own scratch memory, each call in parallel itself."""

    def run(i: int):
        torch.set_num_threads(2)
        problem = FEW[i % 4]
        return problem.results(problem.tensors(torch.float32, i % 4), backend="cpu")

    expected = [run(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for i, actual in enumerate(pool.map(run, range(40))):
            assert_equal(actual, expected[i % 4], i)
