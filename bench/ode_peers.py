"""The same trajectories by other libraries: ``python bench/ode_peers.py 2-64-64-2 --batch 32``.

An autonomous network, float32, 100 Runge-Kutta steps on [0, 1], all 101 states as the result; and the gradients for y0
and all parameters of a weighted sum of these states. Everyone gets the same weights, and is compared with float64.

torchdiffeq has Kutta's 3/8 rule only, everyone else here takes the classical tableau; both have four stages, and each
is compared with its own method. torchode has no method of order 4 without error control, so it gets the tableau from
here. Peers that are not installed are left out with a line that says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from measure import Contender, compare
from torch import Tensor, nn

import pykernels
from pykernels.ops.latent_ode.tableaux import TABLEAUX


@dataclass(frozen=True)
class Problem:
    """``dy/dt = W_L tanh(... tanh(W_1 y + b_1) ...) + b_L`` from y0 (B, D) at the times t (T,), weights (out, in)."""

    y0: Tensor
    t: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    grad: Tensor  # of the loss with respect to the states (T, B, D)

    @classmethod
    def random(cls, dims: Sequence[int], batch: int, steps: int = 100, seed: int = 0) -> Problem:
        g = torch.Generator().manual_seed(seed)

        def uniform(*shape: int, fan_in: int) -> Tensor:
            return (2 * torch.rand(shape, generator=g) - 1) / fan_in**0.5

        return cls(
            torch.randn(batch, dims[0], generator=g),
            torch.linspace(0, 1, steps + 1),
            [uniform(o, i, fan_in=i) for i, o in pairwise(dims)],
            [uniform(o, fan_in=i) for i, o in pairwise(dims)],
            torch.randn(steps + 1, batch, dims[0], generator=g),
        )

    def leaves(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Copies of y0, weights and biases that require gradients."""
        copy = [t.clone().requires_grad_() for t in (self.y0, *self.weights, *self.biases)]
        n = len(self.weights)
        return copy[0], copy[1 : n + 1], copy[n + 1 :]

    def module(self) -> nn.Sequential:
        """The network, with the weights as parameters."""
        modules: list[nn.Module] = []
        for w, b in zip(self.weights, self.biases, strict=True):
            layer = nn.Linear(w.shape[1], w.shape[0])
            layer.load_state_dict({"weight": w, "bias": b})
            modules += [layer, nn.Tanh()]
        return nn.Sequential(*modules[:-1])


class Peer(NamedTuple):
    """One way to solve a problem.

    Args:
        method: the tableau that it takes.
        forward: returns the states (T, B, D).
        forward_backward: returns the states and the gradients of y0, weights and biases, in this order.
    """

    method: str
    forward: Callable[[], Any]
    forward_backward: Callable[[], tuple[Any, list[Any]]]


def _torch_peer(problem: Problem, method: str, solve: Callable[[Tensor, list[Tensor], list[Tensor]], Tensor]) -> Peer:
    """A peer from a function of y0, weights and biases, differentiated by autograd."""
    y0, weights, biases = problem.leaves()
    wanted = [y0, *weights, *biases]

    def forward() -> Tensor:
        with torch.no_grad():
            return solve(y0, weights, biases)

    def forward_backward() -> tuple[Tensor, list[Tensor]]:
        states = solve(y0, weights, biases)
        return states.detach(), list(torch.autograd.grad(states, wanted, problem.grad))

    return Peer(method, forward, forward_backward)


def _module_peer(problem: Problem, method: str, solve: Callable[[nn.Sequential, Tensor], Tensor]) -> Peer:
    """A peer from a function of the network as a module, and y0."""
    network, y0 = problem.module(), problem.y0.clone().requires_grad_()
    layers = [m for m in network if isinstance(m, nn.Linear)]
    wanted = [y0, *(layer.weight for layer in layers), *(layer.bias for layer in layers)]

    def forward() -> Tensor:
        with torch.no_grad():
            return solve(network, y0)

    def forward_backward() -> tuple[Tensor, list[Tensor]]:
        states = solve(network, y0)
        return states.detach(), list(torch.autograd.grad(states, wanted, problem.grad))

    return Peer(method, forward, forward_backward)


def fused(problem: Problem, method: str = "rk4_classic") -> Peer:
    def solve(y0: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        return pykernels.mlp_odeint(y0, problem.t, weights, biases, activation="tanh", method=method)

    return _torch_peer(problem, method, solve)


def fused_three_eighths(problem: Problem) -> Peer:
    """With the method that torchdiffeq takes."""
    return fused(problem, "rk4")


def _step(y: Tensor, h: float, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """One classical Runge-Kutta step, as users write it."""

    def f(y: Tensor) -> Tensor:
        for w, b in zip(weights[:-1], biases[:-1], strict=True):
            y = torch.tanh(F.linear(y, w, b))
        return F.linear(y, weights[-1], biases[-1])

    k1 = f(y)
    k2 = f(y + h / 2 * k1)
    k3 = f(y + h / 2 * k2)
    k4 = f(y + h * k3)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def _loop(problem: Problem, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    steps = len(problem.t) - 1

    def solve(y: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        states = [y]
        for _ in range(steps):
            states.append(step(states[-1], 1 / steps, weights, biases))
        return torch.stack(states)

    return solve


def loop(problem: Problem) -> Peer:
    """A Python loop, eager."""
    return _torch_peer(problem, "rk4_classic", _loop(problem, _step))


def loop_of_compiled_steps(problem: Problem) -> Peer:
    """A Python loop around one step in one graph."""
    return _torch_peer(problem, "rk4_classic", _loop(problem, torch.compile(_step, fullgraph=True, dynamic=False)))


def compiled_loop(problem: Problem) -> Peer:
    """The whole loop in one graph, unrolled by the compiler, which takes minutes."""
    return _torch_peer(problem, "rk4_classic", torch.compile(_loop(problem, _step), fullgraph=True, dynamic=False))


def torchdiffeq(problem: Problem) -> Peer:
    from torchdiffeq import odeint

    return _module_peer(
        problem, "rk4", lambda network, y0: odeint(lambda t, y: network(y), y0, problem.t, method="rk4")
    )


def torchode(problem: Problem) -> Peer:
    """Fixed steps of a method of our own in torchode's terms, its times in float64; it interpolates all outputs."""
    import torchode as to
    from torchode.interpolation import ThirdOrderPolynomialInterpolation
    from torchode.single_step_methods.runge_kutta import ButcherTableau, ExplicitRungeKutta

    tableau = TABLEAUX["rk4_classic"]

    class Classic(ExplicitRungeKutta):
        def __init__(self, term: Any) -> None:
            # Its error estimate is never looked at.
            low_order = [1.0, 0.0, 0.0, 0.0]
            coefficients = ButcherTableau.from_lists(
                c=list(tableau.c), a=[list(row) for row in tableau.a], b=list(tableau.b), b_low_order=low_order
            )
            super().__init__(term, coefficients)

        def convergence_order(self) -> int:
            return tableau.order

        def build_interpolation(self, data: Any) -> Any:
            return ThirdOrderPolynomialInterpolation.from_k(data.t0, data.dt, data.y0, data.y1, data.k)

    batch, times = problem.y0.shape[0], problem.t.double()
    t_eval = times.expand(batch, -1).contiguous()
    dt0 = torch.full((batch,), 1 / (len(times) - 1), dtype=torch.float64)

    def solve(network: nn.Sequential, y0: Tensor) -> Tensor:
        term = to.ODETerm(lambda t, y: network(y))
        adjoint = to.AutoDiffAdjoint(Classic(term), to.FixedStepController())
        states: Tensor = adjoint.solve(to.InitialValueProblem(y0=y0, t_eval=t_eval), dt0=dt0).ys
        return states.transpose(0, 1)

    return _module_peer(problem, "rk4_classic", solve)


def jax_scan(problem: Problem) -> Peer:
    """``jax.lax.scan`` over the steps, jitted, and its gradient jitted as well."""
    import jax
    import jax.numpy as jnp

    steps = len(problem.t) - 1
    y0 = jnp.asarray(problem.y0.numpy())
    weights = [jnp.asarray(w.numpy()) for w in problem.weights]
    biases = [jnp.asarray(b.numpy()) for b in problem.biases]
    grad = jnp.asarray(problem.grad.numpy())

    def f(y: Any, weights: Any, biases: Any) -> Any:
        for w, b in zip(weights[:-1], biases[:-1], strict=True):
            y = jnp.tanh(y @ w.T + b)
        return y @ weights[-1].T + biases[-1]

    def solve(y0: Any, weights: Any, biases: Any) -> Any:
        h = 1 / steps

        def step(y: Any, _: None) -> Any:
            k1 = f(y, weights, biases)
            k2 = f(y + h / 2 * k1, weights, biases)
            k3 = f(y + h / 2 * k2, weights, biases)
            k4 = f(y + h * k3, weights, biases)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            return y, y

        return jnp.concatenate([y0[None], jax.lax.scan(step, y0, None, length=steps)[1]])

    def loss(y0: Any, weights: Any, biases: Any, grad: Any) -> Any:
        states = solve(y0, weights, biases)
        return (states * grad).sum(), states

    jitted = jax.jit(solve)
    with_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    def forward() -> Any:
        return jitted(y0, weights, biases).block_until_ready()

    def forward_backward() -> tuple[Any, list[Any]]:
        (_, states), (grad_y0, grad_weights, grad_biases) = with_gradients(y0, weights, biases, grad)
        return states, jax.block_until_ready([grad_y0, *grad_weights, *grad_biases])

    return Peer("rk4_classic", forward, forward_backward)


PEERS: dict[str, Callable[[Problem], Peer]] = {
    "fused": fused,
    "fused 3/8": fused_three_eighths,
    "torchdiffeq": torchdiffeq,
    "loop": loop,
    "loop of compiled steps": loop_of_compiled_steps,
    "compiled loop": compiled_loop,
    "torchode": torchode,
    "jax scan": jax_scan,
}


def peers(problem: Problem, names: Sequence[str] = tuple(PEERS)) -> dict[str, Peer]:
    """The peers of these names; one that is not installed is left out and named."""
    found = {}
    for name in names:
        try:
            found[name] = PEERS[name](problem)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")
    return found


def errors(problem: Problem, peer: Peer) -> tuple[float, float]:
    """Largest errors of states and gradients relative to the largest value of each tensor, against float64."""
    doubled = Problem(
        problem.y0.double(),
        problem.t.double(),
        [w.double() for w in problem.weights],
        [b.double() for b in problem.biases],
        problem.grad.double(),
    )
    with pykernels.backend("reference"):
        expected, expected_grads = fused(doubled, peer.method).forward_backward()

    def error(value: Any, reference: Tensor) -> float:
        found = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        return float((found.double() - reference).abs().max() / reference.abs().max())

    states, grads = peer.forward_backward()
    plain = error(peer.forward(), expected)
    return max(plain, error(states, expected)), max(map(error, grads, expected_grads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dims", help="widths, for example 20-128-128-20")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20, help="for the timing of all, forward and with gradients")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[n for n in PEERS if n != "compiled loop"])
    args = parser.parse_args()
    problem = Problem.random([int(d) for d in args.dims.split("-")], args.batch)
    found = peers(problem, args.peers)
    for name, peer in found.items():
        start = time.perf_counter()
        states, gradients = errors(problem, peer)
        took = time.perf_counter() - start
        print(f"{name:24} errors {states:.1e} {gradients:.1e}, checked in {took:.1f} s, compilation included")
    for kind in ("forward", "forward_backward"):
        runs = [Contender(name, getattr(peer, kind)) for name, peer in found.items()]
        for name, summary in compare(runs, seconds=args.seconds / 2, most_threads=torch.get_num_threads()).items():
            print(f"{kind:18} {name:24} {1e3 * summary['median_s']:8.3f} ms  {summary['threads']} threads")


if __name__ == "__main__":
    main()
