"""Which backend runs a call, and why.

The choice is made in this order: the ``backend=`` argument of the call, the :func:`backend` context, the environment
variable ``PYKERNELS_BACKEND`` (read when pykernels is imported), and else the first backend in :data:`BACKENDS` that
can run the call. A backend asked for by name either runs the call or raises; the automatic choice warns, once per
reason, when it has to fall back to ``reference``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from pykernels._errors import users_line

#: Every backend, in the order in which the automatic choice tries them.
BACKENDS = ("cpu", "triton", "reference")


class Answer(NamedTuple):
    """Whether a backend can do something, and if not, why not."""

    ok: bool
    reason: str = ""


YES = Answer(True)


@dataclass(frozen=True)
class Implementation:
    """One backend of one operator.

    Args:
        run: the operator on this backend.
        can_run: whether it can run on these arguments (those of ``run``).
        available: whether it can run on this machine at all.
    """

    run: Callable[..., Any]
    can_run: Callable[..., Answer]
    available: Callable[[], Answer]


class Cost(NamedTuple):
    """The work of a call: floating-point operations, and bytes that have to be read or written at least once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Operator:
    """An operator and its backends.

    Args:
        name: also what the names of its raw operators start with.
        implementations: by backend, in the order in which the automatic choice tries them.
        check: compares a backend, given by name, with the reference.
        path: what a call that runs in a kernel of its own is called by :func:`pykernels.explain`.
        cost: the work of a forward call, from the arguments of ``run``.
    """

    name: str
    implementations: dict[str, Implementation]
    check: Callable[[str], Check]
    path: str = "own kernel"
    cost: Callable[..., Cost] | None = None


@dataclass(frozen=True)
class Check:
    """Largest relative errors of a backend against the float64 reference, and what is allowed, by quantity."""

    errors: dict[str, float]
    allowed: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(self.errors[name] <= self.allowed[name] for name in self.allowed)


@dataclass
class _State:
    requested: str | None = None
    warned: set[str] = field(default_factory=set)


OPERATORS: dict[str, Operator] = {}


class Recorder(Protocol):
    """What :func:`pykernels.explain` puts between the calls and the kernels."""

    def watch(self, operator: Operator, requested: str | None, chosen: Implementation, args: Any) -> Implementation: ...

    def ran(self, op: torch._ops.OpOverload, run: Callable[..., Any], cost: Any, args: tuple[Any, ...]) -> Any: ...


_recorder: Recorder | None = None


def is_recording() -> bool:
    """A function, so that torch.compile puts no guard on the answer, and recompiles nothing to have it explained."""
    return _recorder is not None


# As by torch.compiler.assume_constant_result, which imports the whole compiler, and Triton with it.
is_recording._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Tell ``recorder`` of every choice of a backend and of every raw operator that runs, in the whole process.

    Raises:
        RuntimeError: inside itself.
    """
    global _recorder
    if _recorder is not None:
        raise RuntimeError("pykernels.explain is already running, and cannot explain itself")
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None


def observed(
    op: torch._ops.OpOverload, run: Callable[..., Any], cost: Callable[..., Cost] | None = None
) -> Callable[..., Any]:
    """``run``, which implements the raw operator ``op``, in sight of :func:`pykernels.explain`.

    ``cost`` is the work of a call, from the arguments of ``run``.
    """

    def kernel(*args: Any) -> Any:
        if _recorder is None:
            return run(*args)
        return _recorder.ran(op, run, cost, args)

    return kernel


def register(operator: Operator) -> Operator:
    OPERATORS[operator.name] = operator
    return operator


def _check_name(name: object, source: str) -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))} or None, got {name!r}")


_state = _State(os.environ.get("PYKERNELS_BACKEND") or None)
_check_name(_state.requested, "the environment variable PYKERNELS_BACKEND")


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run the calls inside the ``with`` block on one backend.

    Like other PyTorch switches, it holds for the whole process, not for the current thread alone.

    Args:
        name: one of :data:`BACKENDS`, or None for the automatic choice.

    Raises:
        ValueError: if there is no such backend.
    """
    _check_name(name, "backend")
    previous = _state.requested
    _state.requested = name
    try:
        yield
    finally:
        _state.requested = previous


def exporting() -> bool:
    """Whether ``torch.export`` is tracing the call (always False before torch 2.7, which cannot tell)."""
    ask = getattr(torch.compiler, "is_exporting", None)
    return ask is not None and bool(ask())


def select(operator: Operator, requested: str | None, *args: Any) -> Implementation:
    """The implementation that runs ``operator`` on ``args``.

    Raises:
        ValueError: if ``requested`` is no backend.
        RuntimeError: if a backend asked for by name cannot run the call, with its reason.
    """
    name = requested or _state.requested
    if name is None and exporting() and "reference" in operator.implementations:
        return operator.implementations["reference"]  # what is exported should run without this package
    if name is None:
        first_reason = ""
        for candidate, implementation in operator.implementations.items():
            answer = implementation.can_run(*args)
            if answer.ok:
                if candidate == "reference":
                    _warn_fallback(operator.name, first_reason)
                return _watched(operator, requested, implementation, args) if is_recording() else implementation
            first_reason = first_reason or f"{candidate}: {answer.reason}"
        raise RuntimeError(f"no backend can run {operator.name} ({first_reason})")
    _check_name(name, "backend")
    if name not in operator.implementations:
        raise RuntimeError(f"{operator.name} has no backend {name!r}; it has {', '.join(operator.implementations)}")
    implementation = operator.implementations[name]
    answer = implementation.can_run(*args)
    if not answer.ok:
        raise RuntimeError(f"backend {name!r} cannot run {operator.name}: {answer.reason}")
    return _watched(operator, requested, implementation, args) if is_recording() else implementation


def _watched(operator: Operator, requested: str | None, chosen: Implementation, args: Any) -> Implementation:
    if _recorder is None or torch.compiler.is_compiling():  # what is compiled shows when its raw operators run
        return chosen
    return _recorder.watch(operator, requested, chosen, args)


def requested_by(argument: str | None) -> str:
    """In words, who asked for a backend in a call whose ``backend`` is ``argument``."""
    if argument is not None:
        return "backend= argument"
    return "automatic choice" if _state.requested is None else "pykernels.backend context or PYKERNELS_BACKEND"


def _warn_fallback(operator: str, reason: str) -> None:
    if torch.compiler.is_compiling():
        return
    message = (
        f"{operator} runs on the slow 'reference' backend ({reason}); pass backend='reference' to silence this warning"
    )
    if message not in _state.warned:
        _state.warned.add(message)
        warnings.warn(message, RuntimeWarning, users_line())


def available_backends() -> dict[str, dict[str, Answer]]:
    """For every operator and backend, whether it can run on this machine, and if not, why not.

    Returns:
        ``{operator: {backend: (ok, reason)}}``.
    """
    return {
        name: {key: implementation.available() for key, implementation in operator.implementations.items()}
        for name, operator in OPERATORS.items()
    }
