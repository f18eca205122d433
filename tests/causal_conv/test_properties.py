"""What holds for every problem, tried on many: hypothesis draws the sizes and options, and shrinks what fails."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykernels.ops import causal_conv1d
from pykernels.ops.causal_conv.op import ACTIVATIONS

from .cases import COMPILED, error

NAN = float("nan")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OUTPUT, GRADIENT = 1e-12, 1e-10  # allowed errors in float64

# The thread count and the capability, which fixtures restore after a test, are the same for all examples of a test.
repeatable = settings(
    derandomize=True, database=None, deadline=None, max_examples=50, suppress_health_check=[*HealthCheck]
)
each_capability = pytest.mark.parametrize("runner", COMPILED, ids=str)


class Problem(NamedTuple):
    batch: int
    groups: int
    group_in: int
    group_out: int
    kernel_size: int
    dilation: int
    length: int
    activation: str
    negative_slope: float
    before: bool
    bias: bool
    residual: bool
    state: bool
    seed: int

    @property
    def reach(self) -> int:
        return (self.kernel_size - 1) * self.dilation

    def options(self, **others: Any) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("dilation", "groups", "negative_slope")}
        activation = None if self.activation == "none" else self.activation
        return {**options, "activation": activation, "residual_before_activation": self.before, **others}

    def tensors(self, dtype: torch.dtype = torch.float64, *, state: bool = True) -> dict[str, Tensor]:
        """x, weight and those of bias, residual and initial_state that the problem has."""
        g = torch.Generator().manual_seed(self.seed)
        channels, out = self.groups * self.group_in, self.groups * self.group_out
        shapes = {"x": (self.batch, channels, self.length), "weight": (out, self.group_in, self.kernel_size)}
        if self.bias:
            shapes["bias"] = (out,)
        if self.residual:
            shapes["residual"] = (self.batch, out, self.length)
        if self.state and state:
            shapes["initial_state"] = (self.batch, channels, self.reach)
        drawn = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
        drawn["weight"] *= (self.group_in * self.kernel_size) ** -0.5
        return {name: t.to(dtype) for name, t in drawn.items()}

    def grad(self, dtype: torch.dtype = torch.float64) -> Tensor:
        g = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.batch, self.groups * self.group_out, self.length)
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


#: Lengths around the kernels' vectors and tiles, and short ones, to which failures shrink.
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 191, 385, 500]))
PROBLEMS = st.builds(
    Problem,
    batch=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 3, 7]),
    group_in=st.sampled_from([1, 2, 5, 9]),
    group_out=st.sampled_from([1, 2, 4, 9]),
    kernel_size=st.integers(1, 5),
    dilation=st.one_of(st.integers(1, 9), st.sampled_from([64, 130, 1000])),
    length=LENGTHS,
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    negative_slope=st.sampled_from([0.0, 0.01, 1.5]),
    before=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    state=st.booleans(),
    seed=st.integers(0, 99),
)


def run(tensors: dict[str, Tensor], grad: Tensor, backend: str = "cpu", **options: Any) -> dict[str, Tensor]:
    """y and the gradient of every tensor."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = causal_conv1d(**leaves, backend=backend, **options)
    # An empty state, for K = 1, is not in the graph of the reference.
    gradients = torch.autograd.grad(y, list(leaves.values()), grad, materialize_grads=backend == "reference")
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert error(value, expected[name]) <= (OUTPUT if name == "y" else GRADIENT), name


@each_capability
@repeatable
@given(problem=PROBLEMS, mode=st.sampled_from(["plain", "packed", "lengths"]), cuts=st.lists(st.integers(0, 500)))
def test_agrees_with_the_reference(runner, problem: Problem, mode: str, cuts: list[int]):
    runner.use()
    options = problem.options()
    if mode == "packed":
        problem = problem._replace(batch=1)
        offsets = [0, *sorted(min(cut, problem.length) for cut in cuts), problem.length]
        options["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
    tensors = problem.tensors()
    if mode == "packed" and "initial_state" in tensors:
        shape = (len(offsets) - 1, *tensors["initial_state"].shape[1:])
        tensors["initial_state"] = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if mode == "lengths":
        options["lengths"] = torch.tensor([(7 * i + sum(cuts)) % (problem.length + 1) for i in range(problem.batch)])
    grad = problem.grad()
    assert_close(run(tensors, grad, **options), run(tensors, grad, "reference", **options))
    if mode != "packed" or problem.length > 0:
        finals = [
            causal_conv1d(**tensors, backend=backend, return_final_state=True, **options)[1]
            for backend in ("cpu", "reference")
        ]
        assert torch.equal(*finals)


@each_capability
@repeatable
@given(problem=PROBLEMS, dtype=st.sampled_from(DTYPES), where=st.floats(0, 1))
def test_the_past_does_not_see_the_future(runner, problem: Problem, dtype: torch.dtype, where: float):
    runner.use()
    time = int(where * (problem.length - 1))
    tensors = problem.tensors(dtype)
    y = causal_conv1d(**tensors, backend="cpu", **problem.options())
    tensors["x"][:, :, time:] = NAN
    changed = causal_conv1d(**tensors, backend="cpu", **problem.options())
    assert torch.equal(changed[:, :, :time], y[:, :, :time])
    assert changed[:, :, time].isnan().all()


@each_capability
@repeatable
@given(problem=PROBLEMS, lengths=st.lists(st.one_of(st.integers(0, 30), st.just(385)), min_size=1, max_size=5))
def test_packed_sequences_are_computed_as_if_alone(runner, problem: Problem, lengths: list[int]):
    """Same values, and gradients of what belongs to one sequence; those of the shared tensors are sums."""
    runner.use()
    problem = problem._replace(batch=1, length=sum(lengths))
    tensors, grad = problem.tensors(), problem.grad()
    shared = {name: t for name, t in tensors.items() if name in ("weight", "bias")}
    if problem.state:
        shape = (len(lengths), problem.groups * problem.group_in, problem.reach)
        g = torch.Generator().manual_seed(problem.seed)
        tensors["initial_state"] = torch.randn(shape, generator=g, dtype=torch.float64)
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    whole = run(tensors, grad, cu_seqlens=offsets, **problem.options())
    sums = {name: torch.zeros_like(t) for name, t in shared.items()}
    for i, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        own = {name: t[:, :, start:end] for name, t in tensors.items() if name in ("x", "residual")}
        if problem.state:
            own["initial_state"] = tensors["initial_state"][i : i + 1]
        alone = run({**own, **shared}, grad[:, :, start:end], **problem.options())
        for name in ("y", *own):
            part = whole[name][i : i + 1] if name == "initial_state" else whole[name][:, :, start:end]
            assert error(part, alone[name]) <= (OUTPUT if name == "y" else GRADIENT), name
        for name, total in sums.items():
            total += alone[name]
    for name, total in sums.items():
        assert error(whole[name], total) <= GRADIENT, name


@each_capability
@repeatable
@given(problem=PROBLEMS, where=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_lengths_are_the_same_as_cutting(runner, problem: Problem, where: list[float]):
    runner.use()
    lengths = [int(w * problem.length) for w in where[: problem.batch]]
    tensors, grad = problem.tensors(), problem.grad()
    for name in ("x", "residual"):
        for i, end in enumerate(lengths):
            if name in tensors:
                tensors[name][i, :, end:] = NAN
    padded = run(tensors, grad, lengths=torch.tensor(lengths), **problem.options())
    per_series = [name for name in ("x", "residual", "initial_state") if name in tensors]
    for i, end in enumerate(lengths):
        own = {name: tensors[name][i : i + 1] for name in per_series}
        own |= {name: own[name][:, :, :end] for name in ("x", "residual") if name in own}
        shared = {name: tensors[name] for name in ("weight", "bias") if name in tensors}
        cut = run({**own, **shared}, grad[i : i + 1, :, :end], **problem.options())
        for name in ("y", *per_series):
            part, expected = padded[name][i : i + 1], cut[name]
            if name != "initial_state":
                assert not part[:, :, end:].any()
                part = part[:, :, :end]
            assert error(part, expected) <= (OUTPUT if name == "y" else GRADIENT), name
    assert all(t.isfinite().all() for t in padded.values())


@each_capability
@repeatable
@given(problem=PROBLEMS, where=st.floats(0, 1))
def test_two_chunks_joined_by_a_state_are_the_whole(runner, problem: Problem, where: float):
    runner.use()
    cut = int(where * problem.length)
    tensors, grad = problem.tensors(), problem.grad()
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}

    def chunk(part: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        own = {name: t[:, :, part] for name, t in leaves.items() if name in ("x", "residual")}
        given = {name: t for name, t in leaves.items() if name in ("weight", "bias")}
        options = problem.options(return_final_state=True, initial_state=state, backend="cpu")
        return causal_conv1d(**own, **given, **options)

    first, state = chunk(slice(cut), leaves.get("initial_state"))
    second, end = chunk(slice(cut, None), state)
    whole, final = causal_conv1d(**leaves, **problem.options(return_final_state=True, backend="cpu"))
    joined = torch.cat([first, second], 2)
    assert error(joined, whole) <= OUTPUT
    assert torch.equal(end, final)
    past = torch.zeros(problem.batch, problem.groups * problem.group_in, problem.reach, dtype=torch.float64)
    past = leaves.get("initial_state", past)
    assert torch.equal(final, torch.cat([past, leaves["x"]], 2)[:, :, problem.length :])
    for name, a, b in zip(
        leaves, *(torch.autograd.grad(y, list(leaves.values()), grad) for y in (joined, whole)), strict=True
    ):
        assert error(a, b) <= GRADIENT, name


@each_capability
@repeatable
@given(problem=PROBLEMS, a=st.integers(-9, 9).map(lambda i: i / 4), b=st.integers(-9, 9).map(lambda i: i / 4))
def test_linear_without_activation(runner, problem: Problem, a: float, b: float):
    runner.use()
    problem = problem._replace(activation="none", bias=False)
    one, two = problem.tensors(), problem._replace(seed=problem.seed + 1).tensors()
    two["weight"] = one["weight"]
    sums = {name: a * one[name] + b * two[name] if name != "weight" else one[name] for name in one}
    y, y1, y2 = (causal_conv1d(**t, backend="cpu", **problem.options()) for t in (sums, one, two))
    assert (y - (a * y1 + b * y2)).abs().max() <= OUTPUT * (abs(a) * y1.abs().max() + abs(b) * y2.abs().max())


@each_capability
@repeatable
@given(problem=PROBLEMS)
def test_groups_are_a_dense_convolution_with_zeros_between_them(runner, problem: Problem):
    runner.use()
    tensors, grad = problem.tensors(), problem.grad()
    blocks = tensors["weight"].split(problem.group_out)
    dense = torch.cat(
        [torch.block_diag(*(w[:, :, k] for w in blocks))[..., None] for k in range(problem.kernel_size)], 2
    )
    grouped = run(tensors, grad, **problem.options())
    expected = run(tensors | {"weight": dense}, grad, **problem.options(groups=1))
    expected["weight"] = torch.cat(
        [
            expected["weight"][i * problem.group_out :][: problem.group_out, i * problem.group_in :][
                :, : problem.group_in
            ]
            for i in range(problem.groups)
        ]
    )
    assert_close(grouped, expected)


@each_capability
@repeatable
@given(problem=PROBLEMS, dtype=st.sampled_from(DTYPES), order=st.permutations(range(4)))
def test_bits_depend_on_neither_neighbours_nor_place_in_the_batch(runner, problem: Problem, dtype, order):
    runner.use()
    problem = problem._replace(batch=4)
    tensors, grad = problem.tensors(dtype), problem.grad(dtype)
    names = [name for name in ("x", "residual", "initial_state") if name in tensors]
    whole = run(tensors, grad, **problem.options())
    for chosen in (order, order[:1]):
        rows = torch.tensor(chosen)
        part = run(tensors | {name: tensors[name][rows] for name in names}, grad[rows], **problem.options())
        for name in ("y", *names):
            assert torch.equal(part[name], whole[name][rows]), name


def restrided(t: Tensor, how: str) -> Tensor:
    """The same values in memory laid out in another way."""
    if how == "channels last" and t.dim() == 3:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "every second sample":
        memory = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), NAN)
        memory[..., ::2] = t
        return memory[..., ::2]
    if how == "inside something larger":
        memory = t.new_full([n + 3 for n in t.shape], NAN)
        inside = memory[tuple(slice(1, n + 1) for n in t.shape)]
        return inside.copy_(t)
    return t.flip(0).contiguous().flip(0)  # another address, perhaps another alignment


HOW = st.sampled_from(["channels last", "every second sample", "inside something larger", "copied"])


@each_capability
@repeatable
@given(problem=PROBLEMS, dtype=st.sampled_from(DTYPES), how=st.lists(HOW, min_size=6, max_size=6))
def test_bits_do_not_depend_on_strides(runner, problem: Problem, dtype, how: list[str]):
    runner.use()
    tensors, grad = problem.tensors(dtype), problem.grad(dtype)
    expected = run(tensors, grad, **problem.options())
    other = {name: restrided(t, h) for (name, t), h in zip(tensors.items(), how, strict=False)}
    actual = run(other, restrided(grad, how[-1]), **problem.options())
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name
