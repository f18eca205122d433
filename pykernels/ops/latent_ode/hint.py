"""Tells users, once, of vector fields that :func:`pykernels.fuse` would make fast."""

from __future__ import annotations

from torch import nn


def hint_once(func: nn.Module) -> None:
    """Warn once per class if ``func`` could be fused; called outside compilation and transforms only."""
