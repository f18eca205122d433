"""The GPU benchmarks as far as they go without a GPU: cases, costs, checks and the report."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def cases(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    import gpu_cases

    return gpu_cases


@pytest.fixture
def family(cases, monkeypatch) -> ModuleType:
    import gpu_causal_conv

    layers = [gpu_causal_conv.Layer(2, 4, 30, 3, 4, False), gpu_causal_conv.Layer(2, 6, 30, 4, 1, True)]
    monkeypatch.setattr(gpu_causal_conv, "LAYERS", layers)
    return gpu_causal_conv


def test_contenders_agree_with_float64(cases, family, monkeypatch):
    from cases import relative_error

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # takes half a minute
    found = list(family.cases())
    assert len({case.name for case in found}) == len(found) == 8
    for case in found:
        runs, expected = case.prepare("cpu")
        assert len(expected) == (1 if "backward" not in case.name else 4 if "depthwise" in case.name else 5)
        assert list(runs) == ["pykernels", "eager", "compiled"]
        for name, run in runs.items():
            values = run()
            assert all(v.dtype == case.dtype for v in values)
            errors = [relative_error(v, e) for v, e in zip(values, expected, strict=True)]
            assert cases.wrong_results({name: max(errors)}, case.dtype) == {}


def test_costs_by_hand(cases, family):
    first = next(family.cases())
    assert first.flops == 2 * 2 * 4 * 4 * (30 + 26 + 22)
    assert first.bytes_moved == 4 * (3 * 2 * 4 * 30 + 4 * 4 * 3 + 4)


@pytest.fixture
def trajectories(cases, monkeypatch) -> ModuleType:
    import gpu_latent_ode

    small = [
        gpu_latent_ode.Trajectory(3, (4, 6, 4), "tanh", "rk4_classic", 5),
        gpu_latent_ode.Trajectory(3, (5, 6, 7, 3), "relu", "euler", 2, 3),
    ]
    monkeypatch.setattr(gpu_latent_ode, "TRAJECTORIES", small)
    return gpu_latent_ode


def test_trajectories_agree_with_float64(cases, trajectories, monkeypatch):
    from cases import relative_error

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    found = list(trajectories.cases())
    assert len({case.name for case in found}) == len(found) == 4
    for case, results in zip(found, (1, 6, 1, 9), strict=True):
        runs, expected = case.prepare("cpu")
        assert len(expected) == results
        assert list(runs) == ["pykernels", "eager", "compiled steps"]
        for name, run in runs.items():
            errors = [relative_error(v, e) for v, e in zip(run(), expected, strict=True)]
            assert cases.wrong_results({name: max(errors)}, case.dtype) == {}


def test_costs_of_trajectories_by_hand(trajectories):
    forward, both, controlled, _ = trajectories.cases()
    assert forward.flops == 2 * 3 * (4 * 6 + 6 * 4) * 4 * 5
    assert both.flops == 3 * forward.flops
    assert forward.bytes_moved == 4 * (4 * 6 + 6 + 6 * 4 + 4 + 3 * 4 + 6 * 3 * 4)
    assert controlled.bytes_moved == 4 * (5 * 6 + 6 + 6 * 7 + 7 + 7 * 3 + 3 + 3 * 3 + 2 * 3 * 2 + 3 * 3 * 3)


@pytest.fixture
def warps(cases, monkeypatch) -> ModuleType:
    import gpu_gaussian_warp

    shape = (2, 1, 24, 16)
    small = [gpu_gaussian_warp.Warp(shape, 2), gpu_gaussian_warp.Warp(shape, 3, steps=2)]
    small.append(gpu_gaussian_warp.Warp(shape, 9, varying=True))
    monkeypatch.setattr(gpu_gaussian_warp, "WARPS", small)
    return gpu_gaussian_warp


def test_warps_agree_with_float64(cases, warps, monkeypatch):
    from cases import relative_error

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    found = list(warps.cases())
    assert len({case.name for case in found}) == len(found) == 6
    for case, results in zip(found, (1, 3) * 3, strict=True):
        runs, expected = case.prepare("cpu")
        assert len(expected) == results
        assert list(runs) == ["pykernels", "eager", "compiled"][: 2 if "each pixel" in case.name else 3]
        for name, run in runs.items():
            errors = [relative_error(v, e) for v, e in zip(run(), expected, strict=True)]
            assert cases.wrong_results({name: max(errors)}, case.dtype) == {}


def test_costs_of_warps_by_hand(warps):
    bilinear, both, _, _, varying, _ = warps.cases()
    pixels = 2 * 24 * 16
    assert bilinear.flops == 2 * 4 * pixels
    assert both.flops == 4 * bilinear.flops
    assert bilinear.bytes_moved == 4 * (1 + 2 + 1) * pixels
    assert both.bytes_moved == 4 * (1 + 2 + 1 + 1 + 2 * 3) * pixels
    assert varying.bytes_moved == 4 * (1 + 2 + 1 + 1) * pixels


@pytest.fixture
def kernels(cases, monkeypatch) -> ModuleType:
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda f: f))
    monkeypatch.delitem(sys.modules, "ntk_peers", raising=False)  # it has a compiled function
    import gpu_ntk_gram

    small = [gpu_ntk_gram.Kernel("Gram", 6, None, 3, activation) for activation in ("relu", "erf")]
    small += [gpu_ntk_gram.Kernel("witness", 5, 8, 2, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    small.append(gpu_ntk_gram.Kernel("matvec", 7, 9, 4))
    monkeypatch.setattr(gpu_ntk_gram, "KERNELS", small)
    return gpu_ntk_gram


@pytest.mark.filterwarnings("ignore:.*runs on the slow")
def test_kernels_agree_with_float64(cases, kernels):
    from cases import relative_error

    found = list(kernels.cases())
    assert len({case.name for case in found}) == len(found) == 5
    for case, results in zip(found, (1, 1, 2, 2, 1), strict=True):
        runs, expected = case.prepare("cpu")
        assert len(expected) == results
        others = ["compiled, some rows at a time"] if "matvec" in case.name else ["eager", "compiled"]
        assert list(runs) == ["pykernels", *others]
        for name, run in runs.items():
            values = run()
            assert all(v.dtype == case.dtype for v in values)
            errors = [relative_error(v, e) for v, e in zip(values, expected, strict=True)]
            assert cases.wrong_results({name: max(errors)}, case.dtype) == {}


def test_bytes_of_kernels_by_hand(kernels):
    gram, _, witness, double, matvec = kernels.cases()
    assert gram.bytes_moved == 4 * (6 * 3 + 6 * 6)
    assert witness.bytes_moved == 4 * (2 * 5 * 2 + 8 * 2 + 8)
    assert double.bytes_moved == 2 * witness.bytes_moved
    assert matvec.bytes_moved == 4 * (7 * 4 + 9 * 4 + 9 + 7)


def test_judgement(cases):
    case = cases.Case("some case", torch.float32, flops=6_000, bytes_moved=1_000, prepare=lambda device: ({}, []))
    limits = cases.Limits(1e6, {torch.float32: 3e6})
    times = {"pykernels": [0.004] * 7, "eager": [0.01] * 6 + [0.9], "compiled": [0.008] * 7}
    result = cases.judge(case, times, {"pykernels": 1e-7, "eager": 1e-7, "compiled": 1e-7}, limits)
    assert result["speedup"] == pytest.approx(2)
    assert result["fastest_other"] == "compiled"
    assert result["limited_by"] == "products"
    assert result["share_of_limit"] == pytest.approx(0.5)
    assert result["flops_per_byte"] == 6
    wrong = cases.judge(case, {}, {"pykernels": float("nan"), "eager": 1e-7}, limits)
    assert list(wrong["wrong"]) == ["pykernels"]
    assert "contenders" not in wrong
    report = {
        "machine": {"gpu": "a GPU"},
        "limits": {"copy_bytes_per_s": 1e6, "gemm_flop_per_s": {"float32": 3e6}},
        "cases": {"some case": result, "a wrong one": wrong},
    }
    lines = cases.table(report).splitlines()
    assert len(lines) == 4
    assert "4.0000" in lines[2]
    assert "50%" in lines[2]
    assert "2.50 x eager, 2.00 x compiled (products)" in lines[2]
    assert "no time is reported" in lines[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and this would run all of it")
def test_without_a_gpu_the_script_says_so():
    run = subprocess.run([shutil.which("bash"), str(BENCH / "gpu.sh")], capture_output=True, text=True)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert "sees a GPU" in run.stderr
