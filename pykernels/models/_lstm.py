"""The LSTM encoder that the causal network is compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


class LSTMEncoder(nn.Module):
    """Encoder of time series into vectors: two layers of LSTM, the last output, linear map.

    Source: Franceschi, Dieuleveut and Jaggi, NeurIPS 2019, whose comparison uses the defaults here.

    Args:
        in_channels: channels of the series.
        hidden_size: of both layers.
        out_channels: size of the representation.

    Shape:
        input (B, in_channels, T) with T >= 1, output (B, out_channels). With ``cu_seqlens`` (N + 1,), the offsets of N
        series packed into (1, in_channels, total): (N, out_channels).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int = 256,
        out_channels: int = 160,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.lstm = nn.LSTM(in_channels, hidden_size, num_layers=2, device=device, dtype=dtype)
        self.linear = nn.Linear(hidden_size, out_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        if cu_seqlens is None:
            _, (hidden, _) = self.lstm(x.permute(2, 0, 1))
        else:
            series = list(torch.split(x[0].T, cu_seqlens.diff().tolist()))
            _, (hidden, _) = self.lstm(nn.utils.rnn.pack_sequence(series, enforce_sorted=False))
        y: Tensor = self.linear(hidden[-1])
        return y

    def folded(self) -> AbstractContextManager[None]:
        """Nothing to compute beforehand; here for :meth:`pykernels.nn.CausalCNNEncoder.folded`."""
        return nullcontext()
