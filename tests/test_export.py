"""Exported programs: plain PyTorch operations, any batch and length, and they run where pykernels is not."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import pykernels

SHAPES = [(1, 2, 1), (1, 2, 3), (3, 2, 200), (2, 2, 16)]


def small_encoder(**options):
    torch.manual_seed(0)
    return pykernels.nn.CausalCNNEncoder(2, channels=4, depth=2, reduced_size=6, out_channels=5, **options)


def series(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


class Layers(nn.Sequential):
    def __init__(self, **options):
        super().__init__(
            pykernels.nn.CausalConv1d(2, 3, 5, dilation=3, activation="tanh", **options),
            pykernels.nn.CausalConvBlock(3, 4, 3, 2, **options),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [small_encoder, Layers, lambda: small_encoder(backend="cpu")])
def test_program_computes_the_same_for_any_batch_and_length(make, dtype):
    module = make().to(dtype)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    program = pykernels.export.to_program(module, 2)
    assert not any("pykernels" in name for name in operators(program))
    assert not any("norm" in name for name in operators(program))  # done once, before
    run = program.module()
    for shape in SHAPES:
        x = series(*shape, dtype=dtype)
        torch.testing.assert_close(run(x), module(x).detach())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert module.training


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_of_the_module_itself_traces_the_reference(strict):
    encoder = small_encoder()
    dynamic = {0: torch.export.Dim("batch"), 2: torch.export.Dim("time")}
    program = torch.export.export(encoder, (series(2, 2, 16),), dynamic_shapes=(dynamic,), strict=strict)
    assert not any("pykernels" in name for name in operators(program))
    x = series(3, 2, 40)
    torch.testing.assert_close(program.module()(x), encoder(x))


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pykernels":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
program, x, y = sys.argv[1:]
torch.save(torch.export.load(program).module()(torch.load(x)), y)
assert not any(name.split(".")[0] == "pykernels" for name in sys.modules)
"""


def test_a_saved_program_runs_without_pykernels(tmp_path):
    encoder, x = small_encoder(), series(3, 2, 40)
    program, inputs, outputs = (str(tmp_path / name) for name in ("encoder.pt2", "x.pt", "y.pt"))
    pykernels.export.save(encoder, 2, program)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.pt2"]
    torch.save(x, inputs)
    subprocess.run([sys.executable, "-P", "-c", ALONE, program, inputs, outputs], check=True, timeout=120)
    torch.testing.assert_close(torch.load(outputs), encoder(x).detach())


def test_onnx(tmp_path, capfd):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    encoder = small_encoder()
    pykernels.export.save(encoder, 2, tmp_path / "encoder.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]
    assert capfd.readouterr().err == ""
    session = runtime.InferenceSession(str(tmp_path / "encoder.onnx"))
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("series", ["batch", 2, "time"])]
    for shape in SHAPES:
        x = series(*shape)
        (y,) = session.run(["features"], {"series": x.numpy()})
        np.testing.assert_allclose(y, encoder(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_wrong_arguments(tmp_path, monkeypatch):
    encoder = small_encoder()
    with pytest.raises(TypeError, match=r"module must be a torch\.nn.Module with parameters, got function"):
        pykernels.export.to_program(pykernels.causal_conv1d, 2)
    with pytest.raises(ValueError, match=r"format must be one of pt2, onnx.* got .*encoder\.tar"):
        pykernels.export.save(encoder, 2, tmp_path / "encoder.tar")
    with pytest.raises(ValueError, match=r"format must be one of pt2, onnx.* got zip"):
        pykernels.export.save(encoder, 2, tmp_path / "encoder.pt2", "zip")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", sys)
    with pytest.raises(ModuleNotFoundError, match=r"an ONNX file needs onnxscript: run pip install '\.\[onnx\]'"):
        pykernels.export.save(encoder, 2, tmp_path / "encoder.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_insists_on_a_compiled_operator_is_refused():
    class Insists(nn.Linear):
        def forward(self, x):
            return pykernels.causal_conv1d(x, self.weight[..., None], backend="cpu")

    with pytest.raises(RuntimeError, match=r"would need pykernels for pykernels\.causal_conv1d"):
        pykernels.export.to_program(Insists(2, 3), 2)
