"""Which path a call takes through the package, why, and how far it is from what the machine can do."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pykernels import _native, backends
from pykernels.backends import OPERATORS, Cost, Implementation, Operator, recording

Shape: TypeAlias = tuple[int, ...]

#: Sizes of the measurements of the limits: a matrix that fills the arithmetic units, a copy that fits no cache.
_GEMM_SIZE, _COPY_BYTES, _SECONDS = 1024, 128 << 20, 0.1


class Considered(NamedTuple):
    """A backend, whether it can run the call, and if not, why not."""

    backend: str
    ok: bool
    reason: str


class Limits(NamedTuple):
    """What the machine was measured to do: matrix products and copies (bytes read and written)."""

    flop_per_s: float
    bytes_per_s: float

    def seconds(self, cost: Cost) -> float:
        """The least time for this work."""
        return max(cost.flops / self.flop_per_s, cost.bytes / self.bytes_per_s)


@dataclass
class Call:
    """One operator that ran.

    Attributes:
        operator: its name in :func:`pykernels.available_backends`.
        direction: ``"forward"`` or ``"backward"``.
        path: what ran: a kernel of the operator's own (``"fused stack"``, ``"single convolution"``, ...),
            ``"composite"`` if the operator was put together from others, or ``"reference"``, plain PyTorch.
        backend: that ran it.
        requested: who chose the backend; None for what was chosen earlier, in the forward or by ``torch.compile``.
        considered: every backend of the operator, in the order of the automatic choice.
        not_fused: why the call did not take the operator's own kernel; None if it did.
        raw: names of the raw operators that ran.
        shapes: of the tensors, by argument; a list of tensors has a list of shapes.
        dtype, device: of the first tensor.
        seconds: that the call took, on a GPU until it was finished.
        cost: flops and bytes, or None if the operator does not say.
        limits: of the machine for this dtype, or None without cost.
    """

    operator: str
    direction: str
    path: str
    backend: str
    requested: str | None
    considered: list[Considered]
    not_fused: str | None
    raw: list[str]
    shapes: dict[str, Shape | list[Shape]]
    dtype: torch.dtype
    device: torch.device
    seconds: float
    cost: Cost | None = None
    limits: Limits | None = None

    @property
    def bound(self) -> str | None:
        """``"compute"`` or ``"memory"``: the limit that this work would meet first."""
        if self.cost is None or self.limits is None:
            return None
        compute = self.cost.flops / self.limits.flop_per_s
        return "compute" if compute >= self.cost.bytes / self.limits.bytes_per_s else "memory"

    @property
    def share(self) -> float | None:
        """The least time that the machine needs for this work, over the time that the call took."""
        if self.cost is None or self.limits is None:
            return None
        return self.limits.seconds(self.cost) / self.seconds

    def lines(self, times: int = 1) -> Iterator[str]:
        """The call in words; ``seconds`` is the mean of so many calls."""
        count = f"{times} calls of " if times > 1 else ""
        yield f"{self.operator}, {self.direction}: {count}{_milliseconds(self.seconds)}"
        yield f"  path      {self.path}{f' ({self.not_fused})' if self.not_fused else ''}"
        chosen = f" ({self.requested})" if self.requested else ""
        yield f"  backend   {self.backend}{chosen}"
        for other in self.considered:
            if other.backend != self.backend:
                verdict = "could run this call" if other.ok else f"cannot, {other.reason}"
                yield f"            {other.backend} {verdict}"
        yield f"  tensors   {', '.join(_describe(name, shape) for name, shape in self.shapes.items())}"
        yield f"            {self.dtype} on {self.device}"
        if self.cost is not None and self.share is not None:
            work = f"{_si(self.cost.flops, 'flop')}, {_si(self.cost.bytes, 'B')}"
            yield f"  work      {work}: at {self.share:.0%} of the machine's limit, which is {self.bound}"


@dataclass
class Explanation:
    """What :func:`explain` found. Prints as a report.

    Attributes:
        calls: the operators that ran, in their order.
        seconds: that the function took, with all that is not from this package.
        capability: instruction set of the CPU kernels, :func:`pykernels.cpu_capability`.
        threads: :func:`torch.get_num_threads`.
        result: what the callable returned.
    """

    calls: list[Call]
    seconds: float
    capability: str | None
    threads: int
    result: Any = field(repr=False)

    def __str__(self) -> str:
        inside = sum(call.seconds for call in self.calls)
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        lines = [
            f"{len(self.calls)} call{'s' * (len(self.calls) != 1)} of pykernels took {_milliseconds(inside)} "
            f"of {_milliseconds(self.seconds)}",
            f"CPU capability {self.capability}, {threads}",
        ]
        for (dtype, device), limits in {(c.dtype, c.device): c.limits for c in self.calls if c.limits}.items():
            rates = f"{_si(limits.flop_per_s, 'flop/s')} in matrix products, {_si(limits.bytes_per_s, 'B/s')} in copies"
            lines.append(f"limits measured for {dtype} on {device}: {rates}")
        for calls in _alike(self.calls):
            mean = sum(call.seconds for call in calls) / len(calls)
            lines += ["", *replace(calls[0], seconds=mean).lines(len(calls))]
        return "\n".join(lines)


def explain(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Run ``function(*args, **kwargs)`` once and say which operators of this package ran, how and why.

    A layer, a model or a closure over a whole training step: forward and backward calls are reported alike. What it
    does is done: a step of an optimiser is taken. The machine's limits are measured at the first explanation, in a
    fraction of a second. The first call of anything is slower than the next ones; call it once before, and what comes
    from ``torch.compile`` in any case, whose first call would be the compilation.

    Calls of other threads at the same time are reported as well.

    Args:
        function: what to run; any callable.
        args, kwargs: its arguments.

    Returns:
        An :class:`Explanation`: print it, or read its fields.

    Raises:
        TypeError: if ``function`` is not callable.
        RuntimeError: inside another ``explain``. What ``function`` raises is passed on.
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    recorder = _Recorder()
    with recording(recorder):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds = time.perf_counter() - start
    for call in recorder.calls:
        if call.cost is not None and call.device.type != "meta":
            call.limits = _limits(call.device, call.dtype, torch.get_num_threads())
    return Explanation(recorder.calls, seconds, _native.cpu_capability(), torch.get_num_threads(), result)


class _Recorder:
    """Collects the calls. One that was chosen by ``select`` is *open* while it runs: raw operators belong to it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.open: dict[int, Call] = {}  # by thread

    def watch(self, operator: Operator, requested: str | None, chosen: Implementation, args: Any) -> Implementation:
        if threading.get_ident() in self.open:  # part of another call
            return chosen
        backend = next(name for name, other in operator.implementations.items() if other is chosen)
        considered = [Considered(name, *other.can_run(*args)) for name, other in operator.implementations.items()]
        names = _argument_names(operator, chosen)
        return replace(
            chosen, run=lambda *run_args: self._run(operator, chosen, backend, requested, considered, names, run_args)
        )

    def _run(
        self,
        operator: Operator,
        chosen: Implementation,
        backend: str,
        requested: str | None,
        considered: list[Considered],
        names: list[str],
        args: tuple[Any, ...],
    ) -> Any:
        call = _call(operator.name, names, args, backend, operator.cost)
        call.requested, call.considered = backends.requested_by(requested), considered
        thread = threading.get_ident()
        self.open[thread] = call
        try:
            result = _timed(call, chosen.run, args)
        finally:
            del self.open[thread]
        if backend == "reference":
            call.path = "reference"
        else:
            call.not_fused = _obstacle(operator.name, call, args)
            call.path = "composite" if call.not_fused else operator.path
        self.calls.append(call)
        return result

    def ran(self, op: torch._ops.OpOverload, run: Callable[..., Any], cost: Any, args: tuple[Any, ...]) -> Any:
        name = op._schema.name.partition("::")[2]
        owner = self.open.get(threading.get_ident())
        if owner is not None:
            owner.raw.append(name)
            return run(*args)
        operator = _operator_of(name)
        names = [argument.name for argument in op._schema.arguments]
        given = dict(zip(names, args, strict=False))
        call = _call(operator.name, names, args, given.get("backend", "cpu"), cost)
        call.raw, call.path = [name], operator.path
        if name.endswith("_backward"):
            call.direction = "backward"
        result = _timed(call, run, args)
        self.calls.append(call)
        return result


def _argument_names(operator: Operator, chosen: Implementation) -> list[str]:
    """Of ``run``: those of the raw operator with the same arguments, if there is one."""
    if hasattr(torch.ops.pykernels, operator.name):
        raw = getattr(torch.ops.pykernels, operator.name).default
        return [argument.name for argument in raw._schema.arguments]
    return list(inspect.signature(chosen.run).parameters)


def _operator_of(raw: str) -> Operator:
    """The operator that a raw operator belongs to, which may be none but itself."""
    name = max((name for name in OPERATORS if raw.startswith(name)), key=len, default=None)
    return Operator(raw, {}, check=lambda backend: backends.Check({}, {})) if name is None else OPERATORS[name]


def _obstacle(operator: str, call: Call, args: Sequence[Any]) -> str | None:
    """Why an operator was taken apart, as far as can be seen from outside, or None if it was not."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        stack = torch._C._functorch.get_interpreter_stack() or ()
        return f"inside torch.func: {', '.join(level.key().name.lower() for level in stack)}"
    if torch.autograd.forward_ad._current_level >= 0 and any(map(_is_dual, args)):
        return "inside forward-mode differentiation"
    if not hasattr(torch.ops.pykernels, operator):  # it calls its kernel itself
        return None
    if len(call.raw) == 1 and _operator_of(call.raw[0]).name == operator:
        return None
    return f"the {operator} kernel does not take these arguments of {call.dtype}"


def _is_dual(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_dual, value))
    return isinstance(value, Tensor) and torch.autograd.forward_ad.unpack_dual(value).tangent is not None


def _call(
    operator: str, names: Sequence[str], args: Sequence[Any], backend: str, cost: Callable[..., Cost] | None
) -> Call:
    shapes: dict[str, Shape | list[Shape]] = {}
    first: Tensor | None = None
    for name, value in _named(names, args):
        if isinstance(value, Tensor):
            shapes[name] = tuple(value.shape)
            first = value if first is None else first
        elif isinstance(value, (list, tuple)) and any(isinstance(t, Tensor) for t in value):
            tensors = [t for t in value if isinstance(t, Tensor)]
            shapes[name] = [tuple(t.shape) for t in tensors]
            first = tensors[0] if first is None else first
    assert first is not None
    work = None if cost is None else cost(*args)
    return Call(operator, "forward", "", backend, None, [], None, [], shapes, first.dtype, first.device, 0.0, work)


def _named(names: Sequence[str], args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Arguments with their names; those that come together in a named tuple one by one."""
    for name, value in zip(names, args, strict=False):
        if hasattr(value, "_asdict"):
            yield from value._asdict().items()
        else:
            yield name, value


def _timed(call: Call, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    _synchronize(call.device)
    start = time.perf_counter()
    result = run(*args)
    _synchronize(call.device)
    call.seconds = time.perf_counter() - start
    return result


def _synchronize(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


_measured: dict[tuple[str, torch.dtype, int], Limits] = {}


def _limits(device: torch.device, dtype: torch.dtype, threads: int) -> Limits:
    """The limits of the machine, measured once for each device, dtype and number of threads."""
    if device.type == "cpu" and dtype != torch.float64:
        dtype = torch.float32  # what the narrower types are computed in
    key = (str(device), dtype, threads)
    if key not in _measured:
        with torch.inference_mode():
            a = torch.ones(_GEMM_SIZE, _GEMM_SIZE, dtype=dtype, device=device)
            product = torch.empty_like(a)
            gemm = _best(lambda: torch.mm(a, a, out=product), device)
            source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
            target = torch.zeros_like(source)
            copy = _best(lambda: target.copy_(source), device)
        _measured[key] = Limits(2 * _GEMM_SIZE**3 / gemm, 2 * _COPY_BYTES / copy)
    return _measured[key]


def _best(run: Callable[[], Any], device: torch.device) -> float:
    """The shortest time of a run, of those that fit into a tenth of a second, after one that is not counted."""
    run()
    times: list[float] = []
    while len(times) < 2 or sum(times) < _SECONDS:
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _alike(calls: Sequence[Call]) -> list[list[Call]]:
    """Calls that differ in nothing but their time, together, in the order of the first of each."""
    groups: dict[str, list[Call]] = {}
    for call in calls:
        groups.setdefault(repr(replace(call, seconds=0.0)), []).append(call)
    return list(groups.values())


def _describe(name: str, shape: Shape | list[Shape]) -> str:
    if isinstance(shape, list):
        return f"{name} of {len(shape)} tensors"
    return f"{name} {'x'.join(map(str, shape)) or 'scalar'}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _si(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"
