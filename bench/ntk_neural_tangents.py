"""The worker of ntk_peers.py that runs neural-tangents, in an environment of its own: it needs an older jax and numpy.

    pip install 'jax==0.4.30' 'jaxlib==0.4.30' 'numpy<2' frozendict && pip install --no-deps neural-tangents==0.6.5

Started with the name of the data type it computes in. Reads requests from stdin and answers each with a line on
stdout, both JSON: ``problem``, a file with arrays x and perhaps y and a, which is loaded and computed once, its results
written to the file ``results``; or ``repeats``, how often to compute it again, answered by the seconds of each. Ends
with its input. XLA takes as many threads as there are cores.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np

sys.modules["neural_tangents.experimental"] = ModuleType("experimental")  # would import TensorFlow
from neural_tangents import stax  # noqa: E402


def kernel(depth: int, activation: str, weight_std: float, bias_std: float) -> Callable[..., Any]:
    """The kernel function of a network without a bias in its last layer."""
    nonlinearity = {"relu": stax.Relu, "erf": stax.Erf}[activation]
    layers = []
    for _ in range(depth):
        layers += [stax.Dense(1, W_std=weight_std, b_std=bias_std, parameterization="ntk"), nonlinearity()]
    return stax.serial(*layers, stax.Dense(1, W_std=weight_std, parameterization="ntk"))[2]


def prepare(request: dict[str, Any]) -> Callable[[], tuple[Any, ...]]:
    arrays = {name: jax.numpy.asarray(array) for name, array in np.load(request["problem"]).items()}
    function = kernel(**request["network"])
    x, y, a = (arrays.get(name) for name in ("x", "y", "a"))
    if a is None:
        gram = jax.jit(lambda x, y: function(x, y, "ntk"))
        return lambda: (gram(x, y).block_until_ready(),)

    def witness(x: Any, y: Any, a: Any) -> tuple[Any, Any]:
        value = function(x, y, "ntk") @ a
        return value.sum(), value

    jitted = jax.jit(jax.value_and_grad(witness, has_aux=True))

    def both() -> tuple[Any, Any]:
        (_, value), gradient = jitted(x, y, a)
        return value.block_until_ready(), gradient.block_until_ready()

    return both


def main() -> None:
    jax.config.update("jax_enable_x64", sys.argv[1] == "float64")  # otherwise the kernels of float32 would be float64
    for line in sys.stdin:
        request = json.loads(line)
        seconds = []
        if "problem" in request:
            run = prepare(request)
            np.savez(request["results"], *(np.asarray(result) for result in run()))
        for _ in range(request.get("repeats", 0)):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
