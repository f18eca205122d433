"""Trained models as programs that run without this package: ``torch.export`` and ONNX.

What is exported is the reference, plain PyTorch operations, with normalised weights computed once and for all. The
number of series and their length stay free.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

from pykernels._errors import InputError, require
from pykernels._files import replacing
from pykernels.backends import backend

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["FORMATS", "save", "to_program"]

#: File formats: a ``torch.export`` archive, read by ``torch.export.load``, and ONNX.
FORMATS = ("pt2", "onnx")


def to_program(module: nn.Module, in_channels: int) -> ExportedProgram:
    """Trace a module that maps series (B, C, T), as :class:`pykernels.nn.CausalCNNEncoder` does, for inference.

    Args:
        module: left as it is; traced in evaluation mode, on the device and in the dtype of its parameters.
        in_channels: C.

    Returns:
        A program of plain PyTorch operations for any B and any T. ``program.module()`` runs it; it computes the same up
        to rounding.

    Raises:
        TypeError: if ``module`` is no module with parameters.
        RuntimeError: if the trace needs pykernels all the same, because a part of the module chose its own backend.
    """
    first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if first is None:
        raise TypeError(f"module must be a torch.nn.Module with parameters, got {type(module).__name__}")
    plain = _without_parametrizations(module).eval()
    for part in plain.modules():
        if isinstance(getattr(part, "backend", None), str):
            part.backend = None  # type: ignore[assignment]
    # Sizes of 1 would count as fixed.
    example = torch.zeros((2, in_channels, 16), dtype=first.dtype, device=first.device)
    dynamic = {0: torch.export.Dim("batch"), 2: torch.export.Dim("time")}
    with backend(None), torch.no_grad():
        program = torch.export.export(plain, (example,), dynamic_shapes=(dynamic,), strict=False)
    own = sorted({str(n.target) for n in program.graph.nodes if str(n.target).startswith("pykernels.")})
    if own:
        raise RuntimeError(f"the program would need pykernels for {', '.join(own)}; use backend=None in the module")
    return program


def save(module: nn.Module, in_channels: int, path: str | Path, format: str | None = None) -> None:
    """Write a module as a program that runs without this package.

    Args:
        module, in_channels: see :func:`to_program`.
        path: file to write, whole or not at all.
        format: one of :data:`FORMATS`; None for the one that ``path`` ends with.

    Raises:
        InputError: if the format is none of them. A :class:`ValueError`.
        MissingExtraError: if the packages for ONNX are not installed. A :class:`ModuleNotFoundError`.
    """
    path = Path(path)
    format = check_format(path, format)
    program = to_program(module, in_channels)
    with replacing(path) as temporary:
        if format == "pt2":
            with temporary.open("wb") as file:
                torch.export.save(program, file)
        else:
            _save_onnx(program, temporary)


def _save_onnx(program: ExportedProgram, path: Path) -> None:
    names = ({0: "batch", 2: "time"},)
    # Of PyTorch's own code, and of no use to who exports: deprecations, and what torchvision would add.
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            onnx = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["series"],
                output_names=["features"],
                dynamic_shapes=names,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert onnx is not None
    onnx.save(path, external_data=False)


def check_format(path: Path, format: str | None) -> str:
    """The format of a file, once what it needs is known to be there.

    Raises:
        InputError, MissingExtraError: as :func:`save`.
    """
    chosen = path.suffix.removeprefix(".") if format is None else format
    if chosen not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, or the file must end so; got {format or path}")
    if chosen == "onnx":
        for package in ("onnx", "onnxscript"):
            require(package, package, "onnx", "an ONNX file")
    return chosen


def _without_parametrizations(module: nn.Module) -> nn.Module:
    """A copy whose parametrised tensors, such as normalised weights, are plain parameters.

    ``parametrize.remove_parametrizations`` on a copy would do, but it also takes the property off the class, which the
    original shares.
    """
    result = copy.deepcopy(module)
    for part in result.modules():
        if parametrize.is_parametrized(part):
            names = list(part.parametrizations)  # type: ignore[arg-type]
            with torch.no_grad():
                values = {name: getattr(part, name).clone() for name in names}
            part.__class__ = parametrize.type_before_parametrizations(part)
            del part.parametrizations
            for name, value in values.items():
                part.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return result
