"""Trajectories of MLP fields: values and gradients on every backend, their bits, and what the options mean."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykernels import mlp_odeint
from pykernels.ops.latent_ode.reference import ACTIVATIONS, INPUT_MAPS
from pykernels.ops.latent_ode.tableaux import TABLEAUX

from .trajectories import COMPILED, FEW, RUNNERS, Problem, assert_agree, assert_equal, error, sample

#: Each option by itself, for few samples (blocks in rows) and for many (in lanes).
OPTIONS = [
    problem._replace(batch=batch)
    for batch in (3, 37)
    for problem in [
        *(Problem(method=method, time_input=True) for method in TABLEAUX),
        *(Problem(activation=activation) for activation in ACTIVATIONS),
        *(Problem(activation="leaky_relu", slope=slope) for slope in (0, 0.2, 1.0, 2.5)),
        *(Problem(activation="elu", slope=slope) for slope in (0, 0.2, 1.0, 2.5)),
        *(Problem(activation="silu", slope=slope, hidden=(6, 5), sets=3) for slope in (1.7, (), (2,), (3, 2))),
        *(Problem(input_map=input_map, time_input=timed) for input_map in INPUT_MAPS for timed in (False, True)),
        *(Problem(sets=sets, substeps=substeps) for sets in (1, 2, 3, 7) for substeps in (1, 3)),
        Problem(biases=False),
        Problem(biases=False, groups=2),
        *(Problem(control=control) for control in (0, 1, 8, 13)),
        *(Problem(groups=groups, correction=hidden) for groups in (1, 2, 5) for hidden in ((), (4,), (6, 33))),
        Problem(groups=3, activation="silu", slope=()),
        *(Problem(reinject=True, reverse=reverse) for reverse in (False, True)),
        *(Problem(reverse=True, sets=sets, control=2) for sets in (0, 4)),
        *(
            Problem(norms=norms, energy=energy, decreasing=decreasing)
            for norms, energy in ((True, False), (False, True), (False, "time"), (True, "time"))
            for decreasing in (False, True)
        ),
        *(Problem(times=times, substeps=substeps) for times in (1, 2, 6) for substeps in (1, 5)),
    ]
]

SIZES = [
    *(Problem(batch=batch, control=2, norms=True) for batch in (*range(10), 15, 16, 17, 31, 32, 33, 61)),
    *(Problem(batch=batch, groups=3, reinject=True) for batch in (0, 1, 13, 64, 65, 127, 128, 129)),
    *(Problem(batch=batch, dim=dim, hidden=()) for batch in (1, 11, 40) for dim in (1, 2, 17)),
    *(Problem(batch=batch, dim=dim, time_input=True) for batch in (2, 19) for dim in (1, 2, 16, 17)),
    *(
        Problem(batch=batch, hidden=(width,), dim=2)
        for batch in (2, 9, 30, 64)
        for width in (1, 3, 4, 5, 6, 7, 8, 11, 12, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65)
    ),
    Problem(batch=0, times=1),
    Problem(batch=3, times=1, control=2, reinject=True, norms=True, energy=True, groups=2),
    Problem(batch=0, groups=2, control=1, reinject=True, norms=True, energy=True),
    Problem(batch=20, hidden=(2, 65, 3, 33)),
    Problem(batch=12, dim=20, control=20, hidden=(96, 96), method="euler", activation="relu"),
]  # fmt: skip


def check(problem: Problem, threads: int) -> None:
    tensors = problem.tensors()
    expected = problem.results(tensors, backend="reference")
    torch.set_num_threads(threads)
    for runner in COMPILED:
        actual = problem.results(tensors, backend=runner.use())
        assert_agree(actual, expected, f"{problem} on {runner}, {threads} threads")
        with torch.no_grad():
            without_graph = problem.run(tensors, backend=runner.backend)
        assert_equal(without_graph, {name: actual[name] for name in without_graph}, runner)


@pytest.mark.parametrize("problem", OPTIONS, ids=str)
def test_every_option(problem: Problem):
    check(problem, 1)


@pytest.mark.parametrize("problem", SIZES, ids=str)
def test_every_size(problem: Problem):
    check(problem, {7: 2, 19: 3, 64: 2, 129: 3}.get(problem.batch, 1))


@pytest.mark.parametrize("chunk", range(6))
def test_options_together(chunk):
    for i, problem in enumerate(sample(12, seed=chunk)):
        check(problem, {3: 2, 9: 3}.get(i, 1))


@pytest.mark.parametrize("problem", [*FEW, FEW[0]._replace(batch=2)], ids=str)
def test_states_computed_again_give_the_same_gradients(problem: Problem, capability):
    """Where the memory does not hold all states. Only the order of sums over sub-steps may differ."""
    problem = problem._replace(times=4, substeps=7)
    tensors = problem.tensors()
    expected = problem.results(tensors, backend="cpu")
    for max_memory in (0, 20_000, 100_000, 10**12):
        actual = problem.results(tensors, backend="cpu", max_memory=max_memory)
        assert_agree(actual, expected, max_memory, tolerance=1e-13)
        for name in ("states", "grad of y0", "grad of control", "grad of injected"):
            assert name not in actual or torch.equal(actual[name], expected[name]), (max_memory, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("problem", FEW, ids=str)
def test_bits_do_not_depend_on_the_threads(problem: Problem, dtype, capability):
    """Outputs and the gradients of samples; gradients that sum over samples are the same for a number of threads."""
    tensors = problem.tensors(dtype)
    expected = problem.results(tensors, backend="cpu")
    of_samples = {name for name in expected if not name.startswith("grad of")}
    of_samples |= {"grad of y0", "grad of control", "grad of injected"} & expected.keys()
    for threads in (1, 2, 3, 5, problem.batch + 3):
        torch.set_num_threads(threads)
        actual = problem.results(tensors, backend="cpu")
        assert_equal({n: actual[n] for n in of_samples}, {n: expected[n] for n in of_samples}, threads)
        assert_equal(problem.results(tensors, backend="cpu"), actual, threads)


def alone(problem: Problem, tensors, options, samples):
    """The tensors and options of some of the samples."""
    dims = {"y0": 0, "control": 1, "injected": 1}
    some = {n: v.index_select(dims[n], samples) if n in dims else v for n, v in tensors.items()}
    changed = {}
    if problem.groups:
        changed["group"] = options["group"][samples]
    if problem.reinject:
        changed["reinject"] = (options["reinject"][0][:, samples], some["injected"])
    return some, changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bits_do_not_depend_on_the_other_samples(activation, dtype, capability):
    """A sample alone, and among 2 to 70."""
    slope = (2, 2) if activation == "silu" else None
    problem = FEW[3]._replace(batch=70, activation=activation, slope=slope)
    tensors = problem.tensors(dtype)
    options = problem.arguments(tensors)[1]
    expected = problem.run(tensors, backend="cpu")
    for count in (1, 2, 3, 5, 6, 8, 10, 11, 16, 21, 33, 69):
        samples = torch.arange(70 - count, 70)
        some, changed = alone(problem, tensors, options, samples)
        actual = problem._replace(batch=count).run(some, backend="cpu", **changed)
        assert_equal(actual, {name: v[:, samples] for name, v in expected.items()}, count)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


each_runner = pytest.mark.parametrize("runner", RUNNERS, ids=str)


@each_runner
def test_by_hand(runner):
    """dy/dt = 2 relu(y) + 1 from 1 and from -1, midpoint with steps of 1/2."""
    one = torch.ones(1, 1, dtype=torch.float64)
    states, norms, energy = mlp_odeint(
        times(1, -1).view(2, 1),
        times(0, 1),
        [one, 2 * one],
        [None, one[0]],
        activation="relu",
        method="midpoint",
        substeps=2,
        return_residual_norms=True,
        return_energy="time",
        backend=runner.use(),
    )
    # From 1: k1 = 3, k2 = 2 * 1.75 + 1 = 4.5, y = 3.25; k1 = 7.5, k2 = 2 * 5.125 + 1 = 11.25, y = 8.875.
    # From -1: k2 = 1, y = -0.5; k1 = 1, k2 = 1 (at -0.25), y = 0.
    assert states[:, :, 0].tolist() == [[1.0, -1.0], [8.875, 0.0]]
    assert norms.tolist() == [[7.875, 1.0]]
    assert energy.tolist() == [[(4.5**2 + 11.25**2) / 2, 1.0]]


@each_runner
def test_a_residual_network(runner):
    """K blocks with weights of their own, all frames alike: Euler with steps of 1, every K-th state being kept."""
    blocks, frames = 3, 4
    y = expected = normal(6, 2)
    w1, b1, w2, b2 = normal(blocks, 9, 2) / 2, normal(blocks, 9), normal(blocks, 2, 9) / 4, normal(blocks, 2)
    states, lengths = [y], []
    for _ in range(frames):
        length = 0
        for k in range(blocks):
            change = F.linear(F.relu(F.linear(expected, w1[k], b1[k])), w2[k], b2[k])
            expected, length = expected + change, length + change.norm(dim=1)
        states.append(expected)
        lengths.append(length)
    actual, norms = mlp_odeint(
        y,
        torch.arange(frames + 1, dtype=torch.float64) * blocks,
        [w1, w2],
        [b1, b2],
        activation="relu",
        method="euler",
        substeps=blocks,
        return_residual_norms=True,
        backend=runner.use(),
    )
    assert error(actual, torch.stack(states)) <= 1e-13
    assert error(norms, torch.stack(lengths)) <= 1e-13


@each_runner
@pytest.mark.parametrize("batch", [3, 40])
def test_a_control_is_held_over_the_sub_steps(runner, batch):
    """As the latent residual model: y <- y + f([y, z_i]) / n, n times for each frame i."""
    substeps, dim, control = 4, 5, normal(3, batch, 2)
    weights, biases = [normal(8, dim + 2) / 2, normal(dim, 8) / 2], [normal(8), normal(dim)]
    y = normal(batch, dim, seed=1)
    states = [y]
    for z in control:
        for _ in range(substeps):
            hidden = F.relu(F.linear(torch.cat([y, z], 1), weights[0], biases[0]))
            y = y + F.linear(hidden, weights[1], biases[1]) / substeps
        states.append(y)
    options = {"activation": "relu", "method": "euler", "substeps": substeps, "control": control}
    actual = mlp_odeint(states[0], times(0, 1, 2, 3), weights, biases, backend=runner.use(), **options)
    assert error(actual, torch.stack(states)) <= 1e-13


@each_runner
@pytest.mark.parametrize("batch", [4, 50])
def test_scheduled_sampling(runner, batch):
    """Every second step, and of every other sample, starts from the truth."""
    t, truth, y = times(0.1, 0.3, 0.6, 0.8), normal(4, batch, 3), normal(batch, 3, seed=1)
    w, b = normal(3, 3) / 2, normal(3)
    mask = (torch.arange(4)[:, None] + torch.arange(batch)) % 2 == 0
    states, y0 = [y], y
    for i in range(3):
        start = torch.where(mask[i][:, None], truth[i], states[-1])
        h = t[i + 1] - t[i]
        middle = start + h / 2 * F.linear(start, w, b)
        states.append(start + h * F.linear(middle, w, b))
    options = {"activation": "tanh", "method": "midpoint", "reinject": (mask, truth)}
    assert error(mlp_odeint(y0, t, [w], [b], backend=runner.use(), **options), torch.stack(states)) <= 1e-13


@each_runner
@pytest.mark.parametrize("batch", [7, 60])
def test_the_field_of_an_environment(runner, batch):
    """Shared network plus that of the sample's environment, each trajectory as if it were alone."""
    group = torch.arange(batch) * 7 % 3
    shared = [normal(6, 2), normal(2, 6) / 4]
    own = [normal(3, 4, 2), normal(3, 5, 4), normal(3, 2, 5) / 4]
    own_bias = [normal(3, 4), normal(3, 5), normal(3, 2)]
    y0, h = normal(batch, 2), 0.2

    def field(y: Tensor, e: int) -> Tensor:
        a = y
        for w, b in zip(own, own_bias, strict=True):
            a = w[e] @ (a if w is own[0] else a.tanh()) + b[e]
        return shared[1] @ (shared[0] @ y).tanh() + a

    expected = []
    for y, e in zip(y0, group.tolist(), strict=True):
        states = [y]
        for _ in range(3):
            k1 = field(y, e)
            y = y + h / 2 * (k1 + field(y + h * k1, e))
            states.append(y)
        expected.append(torch.stack(states))
    actual = mlp_odeint(
        y0,
        times(0, 0.2, 0.4, 0.6),
        shared,
        None,
        activation="tanh",
        method="heun2",
        group=group,
        correction=(own, own_bias),
        backend=runner.use(),
    )
    assert error(actual, torch.stack(expected, 1)) <= 1e-12


@each_runner
def test_reverse_is_the_flow_backwards(runner):
    """Of a linear field by Euler: y <- (I - h W_n) y with the sets in the opposite order, and the control too."""
    t, w, b, control = times(0, 0.5, 1.1), normal(3, 2, 4) / 2, normal(3, 2), normal(2, 5, 2)
    y = normal(5, 2, seed=1)
    states = [y]
    for n in reversed(range(4)):
        y = y - (t[n // 2 + 1] - t[n // 2]) / 2 * F.linear(torch.cat([y, control[n // 2]], 1), w[n % 3], b[n % 3])
        if n % 2 == 0:
            states.append(y)
    options = {"activation": "relu", "method": "euler", "substeps": 2, "control": control, "reverse": True}
    assert error(mlp_odeint(states[0], t, [w], [b], backend=runner.use(), **options), torch.stack(states)) <= 1e-13


@each_runner
@pytest.mark.parametrize("method", TABLEAUX)
def test_reverse_undoes(runner, method):
    problem = Problem(batch=3, method=method, time_input=True, control=2, times=4, substeps=100)
    tensors = problem.tensors()
    forth = problem.run(tensors, backend=runner.use())["states"]
    back = problem._replace(reverse=True).run(tensors | {"y0": forth[-1]}, backend=runner.backend)["states"]
    assert error(back, forth.flip(0)) <= {1: 1e-1, 2: 1e-4, 3: 1e-6, 4: 1e-8}[TABLEAUX[method].order]


@each_runner
@pytest.mark.parametrize("method", TABLEAUX)
def test_order_of_convergence(runner, method):
    """Slope of log error over log step, of a field that depends on time."""
    problem = Problem(batch=4, times=2, method=method, hidden=(16,), time_input=True)
    tensors = problem.tensors()
    tensors["t"] = times(0, 1)
    exact = problem._replace(method="rk4", substeps=1000).run(tensors, backend="cpu")["states"][-1]
    steps = (16, 32, 64)
    errors = [
        problem._replace(substeps=n).run(tensors, backend=runner.use())["states"][-1].sub(exact).abs().max()
        for n in steps
    ]
    for coarse, fine in pairwise(errors):
        assert abs(float((coarse / fine).log2()) - TABLEAUX[method].order) <= 0.2
