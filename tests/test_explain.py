"""What explain says is what happened."""

from __future__ import annotations

import time

import pytest
import torch

import pykernels
from pykernels import backends, explain
from pykernels.nn import CausalCNNEncoder, CausalConv1d
from pykernels.ops import causal_conv1d, causal_conv_stack, weight_norm
from pykernels.ops.causal_conv import cost

X = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
SMALL = {"channels": 4, "depth": 2, "reduced_size": 5, "out_channels": 6}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_one_convolution():
    layer = CausalConv1d(3, 8, 3, dilation=4)
    explanation = explain(layer, X)
    (call,) = explanation.calls
    assert (call.operator, call.direction, call.path, call.backend) == (
        "causal_conv1d",
        "forward",
        "single convolution",
        "cpu",
    )
    assert call.requested == "automatic choice"
    assert call.not_fused is None
    assert call.raw == ["causal_conv1d"]
    assert call.shapes == {"x": (2, 3, 50), "weight": (8, 3, 3), "bias": (8,)}
    assert (call.dtype, call.device.type) == (torch.float32, "cpu")
    assert {other.backend: other.ok for other in call.considered}["cpu"]
    assert 0 < call.seconds <= explanation.seconds
    # 2 samples, 8 outputs, 3 inputs, and taps that meet 50, 46 and 42 samples
    assert call.cost == (2 * 2 * 8 * 3 * (50 + 46 + 42), 4 * (2 * 3 * 50 + 8 * 3 * 3 + 8 + 2 * 8 * 50))
    assert call.bound in ("compute", "memory")
    assert 0 < call.share < 1.5
    assert explanation.capability == pykernels.cpu_capability()
    assert explanation.threads == 1
    assert torch.equal(explanation.result, layer(X))


def test_one_sample():
    state = pykernels.ConvState.zeros(2, 3, 4)
    with torch.no_grad():
        (call,) = explain(pykernels.causal_conv1d_step, X[:, :, 0], state, torch.ones(5, 3, 4)).calls
    assert (call.operator, call.path, call.backend) == ("causal_conv1d_step", "one sample", "cpu")
    assert call.not_fused is None
    assert call.shapes == {"x_t": (2, 3), "weight": (5, 3, 4)}
    assert call.cost == (2 * 2 * 5 * 3 * 4, 4 * (2 * 3 * (4 + 1) + 5 * 3 * 4 + 2 * 5))


def test_the_report_has_it_all():
    text = str(explain(CausalConv1d(3, 8, 3), X))
    for part in (
        "1 call of pykernels took",
        f"CPU capability {pykernels.cpu_capability()}, 1 thread\n",
        "flop/s in matrix products",
        "causal_conv1d, forward",
        "single convolution",
        "cpu (automatic choice)",
        "reference could run this call",
        "x 2x3x50, weight 8x3x3, bias 8",
        "torch.float32 on cpu",
        "of the machine's limit, which is",
    ):
        assert part in text
    assert str(explain(lambda: None)).startswith("0 calls of pykernels took 0 ms")


def test_calls_that_are_alike_are_printed_once():
    layer = CausalConv1d(3, 8, 3)
    text = str(explain(lambda: [layer(X) for _ in range(3)]))
    assert text.count("causal_conv1d, forward") == 1
    assert "causal_conv1d, forward: 3 calls of" in text


def test_a_training_step():
    encoder = CausalCNNEncoder(3, **SMALL)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
    before = encoder.linear.weight.detach().clone()

    def step(x, *, power):
        optimizer.zero_grad()
        loss = encoder(x).abs().pow(power).sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    explanation = explain(step, X, power=2)
    assert [(call.operator, call.direction, call.path) for call in explanation.calls] == [
        ("weight_norm", "forward", "all weights in one call"),
        ("causal_conv_stack", "forward", "fused stack"),
        ("causal_conv_stack", "backward", "fused stack"),
        ("weight_norm", "backward", "all weights in one call"),
    ]
    assert all(call.cost.flops > 0 and call.cost.bytes > 0 and call.seconds > 0 for call in explanation.calls)
    assert not torch.equal(encoder.linear.weight, before)
    assert isinstance(explanation.result, float)
    assert "weights of 16 tensors" in str(explanation)


def test_trajectories_name_their_tensors():
    field = pykernels.nn.MLPField((2, 4, 2), "tanh")
    explanation = explain(lambda: field.trajectory(X[0, :2].T, torch.linspace(0, 1, 5)).sum().backward())
    forward, backward = explanation.calls
    assert forward.shapes == {
        "y0": (50, 2),
        "t": (5,),
        "weights": [(4, 2), (2, 4)],
        "biases": [(4,), (2,)],
    }
    assert forward.shapes.items() <= backward.shapes.items()


@pytest.mark.parametrize("by", ["argument", "context"])
def test_the_reference_and_who_asked_for_it(by):
    w = torch.randn(4, 3, 2, requires_grad=True)
    with pykernels.backend("reference" if by == "context" else None):
        explanation = explain(causal_conv1d, X, w, backend="reference" if by == "argument" else None)
    (call,) = explanation.calls
    assert (call.path, call.backend, call.raw) == ("reference", "reference", [])
    assert by in call.requested
    assert call.cost.flops > 0


@pytest.mark.filterwarnings("ignore:causal_conv1d runs on the slow")
def test_why_a_backend_cannot_run_the_call():
    w = torch.randn(4, 3, 2)
    (call,) = explain(causal_conv1d, X.to("meta"), w.to("meta")).calls
    assert call.path == "reference"
    assert call.limits is None  # there is nothing to measure
    considered = {other.backend: other for other in call.considered}
    assert not considered["cpu"].ok
    assert "x is on meta" in considered["cpu"].reason
    assert "cpu cannot, x is on meta" in "\n".join(call.lines())


def test_transforms_take_an_operator_apart():
    weights = [torch.randn(4, 3, 2), None, torch.randn(4, 4, 2), None, torch.randn(4, 3, 1), None]

    def loss(x):
        return causal_conv_stack(x, [weights], [2]).sum()

    calls = explain(torch.func.grad(loss), X).calls
    (forward,) = [call for call in calls if call.operator == "causal_conv_stack"]
    assert forward.path == "composite"
    assert forward.not_fused == "inside torch.func: grad"
    assert set(forward.raw) <= {"causal_conv1d", "causal_conv1d_saving"}
    assert f"composite ({forward.not_fused})" in str(explain(torch.func.grad(loss), X))


def test_half_precision_stacks_are_taken_apart():
    weights = [torch.randn(4, 3, 2).bfloat16(), None, torch.randn(4, 4, 2).bfloat16(), None]
    weights += [torch.randn(4, 3, 1).bfloat16(), None]
    (call,) = explain(causal_conv_stack, X.bfloat16(), [weights], [2]).calls
    assert call.path == "composite"
    assert "torch.bfloat16" in call.not_fused
    assert len(call.raw) == 3


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # by Dynamo itself
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # by inductor
def test_compiled_code_shows_what_its_graph_calls():
    w = torch.randn(4, 3, 2, requires_grad=True)

    def loss(x):
        return causal_conv1d(x, w, activation="tanh").sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    compiled(X).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    calls = explain(lambda: compiled(X).backward()).calls
    assert [(call.operator, call.direction) for call in calls] == [
        ("causal_conv1d", "forward"),
        ("causal_conv1d", "backward"),
    ]
    assert all(call.requested is None and call.backend == "cpu" for call in calls)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # nothing was compiled again


def test_cost_of_a_stack_is_that_of_its_convolutions():
    g = torch.Generator().manual_seed(0)
    w1, w2, skip = (torch.randn(s, generator=g) for s in ((4, 3, 3), (5, 4, 3), (5, 3, 1)))
    weights = [w1, None, w2, None, skip, None]
    convolutions = [(X, w1, 2), (X.new_empty(2, 4, 50), w2, 2), (X, skip, 1)]
    singles = [
        cost.forward(x, w, None, None, None, None, None, d, 1, "none", 0.01, False, "cpu") for x, w, d in convolutions
    ]
    flops = sum(single.flops for single in singles)
    stack = cost.stack_forward(X, weights, None, None, [2], 0.01, False)
    assert stack.flops == flops
    assert stack.bytes == 4 * (X.numel() + sum(t.numel() for t in (w1, w2, skip)) + 2 * 5 * 50)
    grad = torch.randn(2, 5, 50)
    backward = cost.stack_backward(grad, X, weights, None, None, [], [2], 0.01, False, [True] * 7)
    assert backward.flops == 2 * flops
    without_x = cost.stack_backward(grad, X, weights, None, None, [], [2], 0.01, False, [False] + [True] * 6)
    assert without_x.flops == 2 * flops - singles[0].flops - singles[2].flops
    pooled = cost.stack_backward(grad[..., 0], X, weights, None, None, [], [2], 0.01, True, [True] * 7)
    assert pooled.flops == 2 * singles[0].flops + 2 * 2 * 2 * (w2.numel() + skip.numel())


@pytest.mark.parametrize(
    ("length", "kernel_size", "dilation"), [(50, 3, 4), (5, 3, 4), (1, 7, 9), (0, 2, 3), (9, 1, 1)]
)
def test_only_samples_that_a_tap_meets_count_as_work(length, kernel_size, dilation):
    expected = sum(max(0, length - j * dilation) for j in range(kernel_size))
    assert cost.live_samples(length, kernel_size, dilation) == expected


def test_every_operator_says_what_it_costs():
    for operator in backends.OPERATORS.values():
        assert operator.cost is not None, operator.name
        assert operator.path != "own kernel", operator.name


def test_errors():
    with pytest.raises(TypeError, match="function must be callable, got Tensor"):
        explain(X)
    with pytest.raises(RuntimeError, match="already running"):
        explain(lambda: explain(lambda: None))
    with pytest.raises(ZeroDivisionError):
        explain(lambda: 1 / 0)
    assert len(explain(weight_norm, [torch.ones(2, 3)], [torch.ones(2)]).calls) == 1


def test_costs_nothing_when_it_is_off():
    """The check in the path of every call, beside the time of the smallest call."""
    x, w = torch.ones(1, 1, 1), torch.ones(1, 1, 1)

    def best(run) -> float:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(200):
                run()
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(backends.is_recording) < 0.05 * best(lambda: causal_conv1d(x, w))
