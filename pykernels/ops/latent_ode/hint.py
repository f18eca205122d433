"""Tells users, once, of vector fields that :func:`pykernels.fuse` would make fast."""

from __future__ import annotations

import warnings
from weakref import WeakSet

from torch import nn

from pykernels._errors import users_line


class FusionHint(UserWarning):
    """A vector field that :func:`pykernels.odeint` calls step by step could run in one call."""


_seen: WeakSet[type[nn.Module]] = WeakSet()


def hint_once(func: nn.Module) -> None:
    """Warn once per class if ``func`` could be fused; called outside compilation and transforms only."""
    kind = type(func)
    if kind in _seen:
        return
    _seen.add(kind)
    from pykernels.nn.fuse import fusable  # layers are above operators

    if fusable(func):
        warnings.warn(
            f"{kind.__name__} is a multilayer perceptron: pykernels.odeint(pykernels.fuse(func), ...) runs the whole "
            "trajectory in one call, with the same parameters. To silence this hint: "
            "warnings.simplefilter('ignore', pykernels.FusionHint)",
            FusionHint,
            users_line(),
        )
