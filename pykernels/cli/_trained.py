"""``pykernels encode`` and ``pykernels export``: what to do with a trained model."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pykernels import _files, export
from pykernels._errors import InputError, require
from pykernels.cli._options import Parser, add_device, check_device
from pykernels.models._run import run_model

if TYPE_CHECKING:
    from pykernels.models._usrl_checkpoint import SavedModel


def add(commands: Any) -> None:
    """Add the commands ``encode`` and ``export``."""
    encode: Parser = commands.add_parser("encode", help="features of a file of series", description=_encode.__doc__)
    _add_checkpoint(encode)
    encode.add_argument("file", type=Path, metavar="FILE", help="of series, .ts or .tsv")
    encode.add_argument("--out", type=Path, metavar="FILE", help=".csv or .npy to write (default: CSV on stdout)")
    encode.add_argument("--no-labels", action="store_true", help="the .tsv file has no column of labels")
    add_device(encode)
    encode.set_defaults(run=_encode)

    parser: Parser = commands.add_parser(
        "export", help="a trained encoder as a program that needs no pykernels", description=_export.__doc__
    )
    _add_checkpoint(parser)
    parser.add_argument("--format", choices=export.FORMATS, help="default: as the name of the file ends")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="to write")
    parser.set_defaults(run=_export)


def _add_checkpoint(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a saved model, or the folder of a run")


def _open(path: Path, device: str = "cpu") -> SavedModel:
    """The model in a file, or in the folder of a run."""
    require("sklearn", "scikit-learn", "models", "a trained model")
    from pykernels.models._usrl_checkpoint import SavedModel

    return SavedModel(run_model(path), device)


def _encode(args: argparse.Namespace) -> int:
    """Write the features of series, one row for each. If the model was fitted on normalised series, these are too."""
    if args.out is not None:
        _files.check_output(args.out, "--out")
        if args.out.suffix not in (".csv", ".npy"):
            raise InputError(f"--out {args.out} must end in .csv or .npy")
    check_device(args.device)
    saved = _open(args.checkpoint, args.device)
    from pykernels.data import normalised, read_series
    from pykernels.models.usrl import USRLTransformer

    series, labels = read_series(args.file, labels=not args.no_labels)
    model = saved.model(USRLTransformer)
    if saved.normalisation is not None and len(series[0]) == model.n_features_in_:
        series = normalised(series, *saved.normalisation)
    features = model.transform(series)
    if args.out is not None and args.out.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, features, allow_pickle=False)
        _files.write(args.out, buffer.getvalue())
        return 0
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    names = [f"feature_{i}" for i in range(features.shape[1])]
    rows.writerow(names if labels is None else ["label", *names])
    for i, row in enumerate(features):
        values = [str(value) for value in row]  # as many digits as it takes to read the same numbers back
        rows.writerow(values if labels is None else [labels[i], *values])
    if args.out is None:
        sys.stdout.write(text.getvalue())
    else:
        _files.write(args.out, text.getvalue().encode())
    return 0


class _Features(nn.Module):
    """What ``pykernels encode`` computes, from raw series (B, C, T) to features (B, F)."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoders: list[nn.Module], mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        return torch.cat([encoder(x) for encoder in self.encoders], 1)


def _export(args: argparse.Namespace) -> int:
    """Write a trained encoder as a program of plain PyTorch operations or ONNX, for any number and length of series.

    It takes raw series of shape (batch, channels, time): what normalises them is inside.
    """
    _files.check_output(args.out, "--out")
    format = export.check_format(args.out, args.format)
    saved = _open(args.checkpoint)
    from pykernels.models.usrl import USRLTransformer

    model = saved.model(USRLTransformer)
    if model.encoder == "lstm":  # torch.export writes its loop out, step by step, for one length
        raise InputError(f"{args.checkpoint} is an LSTM, which cannot be exported for series of any length")
    channels: int = model.n_features_in_
    module: nn.Module = model.encoders_[0]
    if saved.normalisation is not None or len(model.encoders_) > 1:
        mean, std = saved.normalisation or (np.zeros((channels, 1)), np.ones((channels, 1)))
        like = next(module.parameters())
        module = _Features(model.encoders_, torch.as_tensor(mean).to(like), torch.as_tensor(std).to(like))
    export.save(module, channels, args.out, format)
    print(f"{args.out} maps series (batch, {channels}, time) to features (batch, {model._n_features_out})")
    return 0
