"""Wrong arguments of the warps."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import pykernels
from pykernels import backends, bilinear_warp, gaussian_warp, gaussian_warp_rollout

IMAGE, FLOW, FLOWS = torch.randn(2, 3, 5, 6), torch.randn(2, 2, 5, 6), torch.randn(2, 4, 2, 5, 6)
VARIANCE = torch.rand(2, 1, 5, 6)
NAN, INF = float("nan"), float("inf")
each_backend = pytest.mark.parametrize("backend", [None, "cpu", "reference"])


def test_the_arguments_that_the_errors_are_about_are_otherwise_right():
    assert gaussian_warp(IMAGE, FLOW, VARIANCE).shape == IMAGE.shape
    assert gaussian_warp_rollout(IMAGE, FLOWS, VARIANCE).shape == (2, 4, 3, 5, 6)
    assert bilinear_warp(IMAGE, FLOW).shape == IMAGE.shape


#: Of all three functions.
COMMON = [
    ({"image": None}, TypeError, "^image must be a tensor, got NoneType"),
    ({"image": IMAGE.numpy()}, TypeError, "^image must be a tensor, got ndarray"),
    ({"image": IMAGE.int()}, TypeError, r"^image must have a floating dtype, got torch\.int32"),
    ({"image": IMAGE.bool()}, TypeError, "^image must have a floating dtype"),
    ({"image": IMAGE.to(torch.complex64)}, TypeError, "^image must have a floating dtype, got torch.complex64"),
    ({"image": IMAGE[0, 0]}, ValueError, r"^image must have shape \(B, C, \*S\) .* one to three .* got \(5, 6\)"),
    ({"image": IMAGE[None, None]}, ValueError, r"^image must have shape .* got \(1, 1, 2, 3, 5, 6\)"),
    ({"image": IMAGE[..., :0]}, ValueError, r"^image must have shape .* at least one pixel, got \(2, 3, 5, 0\)"),
    ({"image": IMAGE[:, :, :0]}, ValueError, "^image must have shape .* at least one pixel"),
    ({"flow": None}, (TypeError, ValueError), "^flows? must .*got NoneType"),
    ({"flow": FLOW.long()}, (TypeError, ValueError), r"^flows? must "),
    ({"padding_mode": "wrap"}, ValueError, "^padding_mode must be .* 'reflection', 'periodic', got 'wrap'"),
    ({"padding_mode": None}, ValueError, "^padding_mode must be one of .* got None"),
    ({"padding_mode": 0}, ValueError, "^padding_mode must be one of .* got 0"),
    ({"units": "metres"}, ValueError, "^units must be one of 'pixels', 'normalized', got 'metres'"),
    ({"units": "normalized"}, ValueError, "^units='normalized' needs align_corners=True or False, got None"),
    ({"units": "normalized", "align_corners": 1}, ValueError, "needs align_corners=True or False, got 1"),
    ({"align_corners": True}, ValueError, "^align_corners is for units='normalized', got True with units='pixels'"),
    ({"align_corners": False}, ValueError, "^align_corners is for units='normalized', got False"),
    ({"indexing": "yx"}, ValueError, "^indexing must be one of 'xy', 'ij', got 'yx'"),
    ({"indexing": None}, ValueError, "^indexing must be one of"),
    ({"backend": "cuda!"}, ValueError, "^backend must be one of 'cpu', .*'reference' or None, got 'cuda!'"),
]  # fmt: skip

#: Of those that diffuse.
GAUSSIAN = [
    ({"variance": "small"}, TypeError, "^variance must be a number or a tensor, got str"),
    ({"variance": None}, TypeError, "^variance must be a number or a tensor, got NoneType"),
    ({"variance": True}, TypeError, "^variance must be a number or a tensor, got bool"),
    ({"variance": -0.1}, ValueError, "^variance must be at least 0 and finite, in pixels squared, got -0.1"),
    ({"variance": NAN}, ValueError, "^variance must be at least 0 and finite, .* got nan"),
    ({"variance": INF}, ValueError, "^variance must be at least 0 and finite, .* got inf"),
    ({"variance": 10**400}, ValueError, "^variance must be at least 0 and finite"),
    ({"variance": torch.tensor(3)}, TypeError, r"^variance must have a floating dtype, got torch\.int64"),
    ({"variance": VARIANCE.to("meta")}, ValueError, "^variance must be on the device of the image, cpu, got meta"),
    ({"variance": torch.tensor(-0.5)}, ValueError, "^variance must be at least 0, in pixels squared, got -0.5"),
    ({"variance": VARIANCE - 1}, ValueError, "^variance must be at least 0, in pixels squared, got -"),
    ({"variance": VARIANCE - 1, "validate": True}, ValueError, "^variance must be at least 0, in pixels squared"),
    ({"variance": torch.tensor([0.5, -INF, 1, 2, 3, 4])}, ValueError, "^variance must be at least 0, .* got -inf"),
    ({"variance": VARIANCE[:, :, :4]}, ValueError, r"^variance must .* here \(2, 1, 5, 6\), got \(2, 1, 4, 6\)"),
    ({"variance": VARIANCE.expand(2, 3, 5, 6)}, ValueError, r"^variance must broadcast to .* got \(2, 3, 5, 6\)"),
    ({"variance": VARIANCE.expand(3, 2, 1, 5, 6)}, ValueError, r"^variance must broadcast to .* got \(3, 2, 1, 5, 6\)"),
    ({"variance": VARIANCE[:0]}, ValueError, r"^variance must broadcast to .* got \(0, 1, 5, 6\)"),
    ({"variance": torch.zeros(2)}, ValueError, r"^variance must broadcast to .* got \(2,\)"),
    ({"variance": torch.zeros(1, 1, 1, 1, 1, 1)}, ValueError, "^variance must broadcast to"),
    ({"form": "linear"}, ValueError, "^form must be one of 'integrated', 'density', got 'linear'"),
    ({"form": None}, ValueError, "^form must be one of"),
    ({"normalize": True}, ValueError, "^normalize must be one of 'none', 'window', 'inside', got True"),
    ({"normalize": "all"}, ValueError, "^normalize must be one of"),
    ({"support": 0}, ValueError, "^support must be between 1 and 4095 taps, got 0"),
    ({"support": -3}, ValueError, "^support must be between 1 and 4095 taps, got -3"),
    ({"support": 4096}, ValueError, "^support must be between 1 and 4095 taps, got 4096"),
    ({"support": 10**30}, ValueError, "^support must be between"),
    ({"support": 3.0}, TypeError, "^support must be an int, got 3.0"),
    ({"support": True}, TypeError, "^support must be an int, got True"),
    ({"support": (3, 3)}, TypeError, r"^support must be an int, got \(3, 3\)"),
    ({"max_support": 0}, ValueError, "^max_support must be between 1 and 4095 taps, got 0"),
    ({"max_support": 4096}, ValueError, "^max_support must be between"),
    ({"max_support": None}, TypeError, "^max_support must be an int, got None"),
    ({"max_support": 9.0}, TypeError, "^max_support must be an int, got 9.0"),
    ({"tolerance": 0}, ValueError, "^tolerance must be between 0 and 1, got 0"),
    ({"tolerance": 1.0}, ValueError, "^tolerance must be between 0 and 1, got 1.0"),
    ({"tolerance": -1e-4}, ValueError, "^tolerance must be between 0 and 1, got -0.0001"),
    ({"tolerance": NAN}, ValueError, "^tolerance must be between 0 and 1, got nan"),
    ({"tolerance": None}, TypeError, "^tolerance must be a number, got None"),
    ({"tolerance": "1e-4"}, TypeError, "^tolerance must be a number, got '1e-4'"),
    ({"tolerance": True}, ValueError, "^tolerance must be between 0 and 1, got True"),
    ({"validate": 1}, TypeError, "^validate must be True, False or None, got 1"),
]  # fmt: skip


@each_backend
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *COMMON,
        *GAUSSIAN,
        ({"flow": FLOW.tolist()}, TypeError, "^flow must be a tensor, got list"),
        ({"flow": FLOW.int()}, TypeError, r"^flow must have a floating dtype, got torch\.int32"),
        ({"flow": FLOW.to("meta")}, ValueError, "^flow must be on the device of the image, cpu, got meta"),
        ({"image": IMAGE.to("meta")}, ValueError, "^flow must be on the device of the image, meta, got cpu"),
        ({"flow": FLOW[:1]}, ValueError, r"^flow must have shape \(2, 2, 5, 6\), .* got \(1, 2, 5, 6\)"),
        ({"flow": FLOW[:, :1]}, ValueError, r"^flow must have shape \(2, 2, 5, 6\), a displacement in 2 axes"),
        ({"flow": FLOW[..., :1]}, ValueError, r"^flow must have shape .* got \(2, 2, 5, 1\)"),
        ({"flow": FLOW[0]}, ValueError, r"^flow must have shape .* got \(2, 5, 6\)"),
        ({"flow": FLOWS}, ValueError, "^flow must have shape"),
        ({"flow": FLOW.movedim(1, -1)}, ValueError, r"^flow must have shape .* got \(2, 5, 6, 2\)"),
        ({"image": IMAGE[0]}, ValueError, r"^flow must have shape \(3, 1, 6\), a displacement in 1 axes"),
        ({"variance": VARIANCE[:, None].expand(2, 4, 1, 5, 6)}, ValueError, r"^variance must .* to \(B, 1, \*S\)"),
    ],
)  # fmt: skip
def test_gaussian_warp(change, error, message, backend):
    with pytest.raises(error, match=message):
        gaussian_warp(**{"image": IMAGE, "flow": FLOW, "variance": VARIANCE, "backend": backend, **change})


@each_backend
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *COMMON,
        *GAUSSIAN,
        ({"flow": FLOW}, ValueError, r"^flows must have shape \(B, T, R, \*S\), 5 dimensions .* got \(2, 2, 5, 6\)"),
        ({"flow": [FLOW]}, (TypeError, ValueError), r"^flows must .* got list"),
        ({"flow": FLOWS.int()}, TypeError, r"^flows must have a floating dtype, got torch\.int32"),
        ({"flow": FLOWS.to("meta")}, ValueError, "^flows must be on the device of the image, cpu, got meta"),
        ({"flow": FLOWS[:1]}, ValueError, r"^flows must have shape \(2, 4, 2, 5, 6\), .* got \(1, 4, 2, 5, 6\)"),
        ({"flow": FLOWS[:, :, :1]}, ValueError, "^flows must have shape"),
        ({"flow": FLOWS[..., 1:]}, ValueError, "^flows must have shape"),
        ({"variance": VARIANCE[:, None].expand(2, 3, 1, 5, 6)}, ValueError,
         r"^variance must broadcast to \(B, T, 1, \*S\), here \(2, 4, 1, 5, 6\), got \(2, 3, 1, 5, 6\)"),
        ({"variance": VARIANCE[:, None].expand(2, 4, 2, 5, 6)}, ValueError, r"^variance must broadcast to \(B, T"),
    ],
)  # fmt: skip
def test_gaussian_warp_rollout(change, error, message, backend):
    arguments = {"image": IMAGE, "flow": FLOWS, "variance": VARIANCE, "backend": backend, **change}
    with pytest.raises(error, match=message):
        gaussian_warp_rollout(arguments.pop("image"), arguments.pop("flow"), arguments.pop("variance"), **arguments)


@each_backend
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *COMMON,
        ({"flow": FLOW[:, :1]}, ValueError, r"^flow must have shape \(2, 2, 5, 6\)"),
        ({"flow": FLOW.to("meta")}, ValueError, "^flow must be on the device of the image, cpu, got meta"),
    ],
)
def test_bilinear_warp(change, error, message, backend):
    with pytest.raises(error, match=message):
        bilinear_warp(**{"image": IMAGE, "flow": FLOW, "backend": backend, **change})


def test_backend_by_name_that_cannot_run():
    meta = IMAGE.to("meta"), FLOW.to("meta")
    message = "backend 'cpu' cannot run gaussian_warp: the image is on meta, not on the CPU"
    with pytest.raises(RuntimeError, match=message):
        gaussian_warp(*meta, 0.5, backend="cpu")
    with pykernels.backend("cpu"), pytest.raises(RuntimeError, match=message):
        bilinear_warp(*meta)
    with pykernels.backend("cpu"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gaussian_warp(*meta, 0.5, backend="reference").is_meta


def test_automatic_fallback_warns_once(monkeypatch):
    monkeypatch.setattr(backends._state, "requested", None)
    monkeypatch.setattr(backends._state, "warned", set())
    meta = IMAGE.to("meta"), FLOW.to("meta")
    with pytest.warns(RuntimeWarning, match="gaussian_warp runs on the slow 'reference' backend.*meta") as seen:
        gaussian_warp(*meta, 0.5)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gaussian_warp(*meta, 0.5)


@each_backend
def test_what_is_accepted(backend):
    """Numbers of any kind, the extremes of the options, and dtypes that differ."""
    for variance in (0, 0.0, 1, math.pi):
        assert gaussian_warp(IMAGE, FLOW, variance, backend=backend).isfinite().all()
    for options in (
        {"support": 4095},
        {"max_support": 1},
        {"max_support": 4095},
        {"tolerance": 1e-300},
        {"tolerance": 0.999},
    ):
        small = IMAGE[:, :1, :1, :2], FLOW[:, :, :1, :2]
        assert gaussian_warp(*small, 0.5, backend=backend, **options).isfinite().all()
    for image, flow, variance in (
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float64),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ):
        tensors = IMAGE.to(image), FLOW.to(flow), VARIANCE.to(variance)
        out = gaussian_warp(*tensors, backend=backend)
        assert out.dtype == image
        exact = gaussian_warp(*(t.double() for t in tensors), backend="reference")
        torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(image).eps, atol=1e-3)
