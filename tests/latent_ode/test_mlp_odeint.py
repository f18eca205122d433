"""Trajectories of MLP fields: values and gradients on every backend, their bits, and what the options mean."""

from __future__ import annotations

import pytest
import torch

from pykernels.ops.latent_ode.reference import ACTIVATIONS, INPUT_MAPS
from pykernels.ops.latent_ode.tableaux import TABLEAUX

from .trajectories import FEW, KERNELS, Problem, assert_agree, assert_equal, sample

THREADS = (1, 2, 3)

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
    *(Problem(batch=batch, control=2, norms=True) for batch in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 61)),
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
    for runner in KERNELS:
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
    check(problem, 1 + problem.batch % 3)


@pytest.mark.parametrize("chunk", range(10))
def test_options_together(chunk):
    for i, problem in enumerate(sample(15, seed=chunk)):
        check(problem, THREADS[i % 3])


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
