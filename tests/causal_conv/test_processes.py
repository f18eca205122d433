"""Calls from forked processes, from DataLoader workers, and from several Python threads at once."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pykernels.ops import causal_conv1d

from .cases import Case, results
from .modes import Mode

# Large enough to be shared between threads.
CASE = Case(4, 16, 16, 300, 3, 4, "tanh")
MODES = [
    Mode(1, 16, 16, 1200, 3, 4, 1, "gelu", "before", state=True, packed=(500, 0, 100, 600)),
    Mode(2, 64, 64, 800, 4, 1, 64, "silu", "after", state=True),
    Mode(4, 32, 32, 300, 3, 4, 4, "tanh", "after", lengths=(300, 0, 200, 299)),
]

PARENT = """
import os, signal, sys, warnings
import torch
from pykernels.ops import causal_conv1d
warnings.simplefilter("ignore")  # of forking with threads, which is what this is about
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
x, w = torch.randn(4, 16, 300, generator=g), torch.randn(16, 16, 3, generator=g)

offsets = torch.tensor([0, 500, 600, 1200], dtype=torch.int32)
wide, depthwise = torch.randn(4, 64, 300, generator=g), torch.randn(64, 1, 3, generator=g)

def run():
    y = causal_conv1d(x, w, dilation=4, activation="tanh", backend="cpu")
    packed, state = causal_conv1d(x.view(1, 16, 1200), w, activation="gelu", cu_seqlens=offsets,
                                  return_final_state=True, backend="cpu")
    filtered = causal_conv1d(wide, depthwise, groups=64, activation="silu", backend="cpu")
    half = causal_conv1d(x.bfloat16(), w.bfloat16(), backend="cpu")
    # One by one, since torch itself would compare more values in parallel, which it cannot in a forked process.
    return [y, packed, state, *filtered, half]
"""

FORK = """
def fork(depth):
    expected = run()
    pid = os.fork()
    if pid == 0:
        signal.alarm(100)
        torch.set_num_threads(2)
        same = all(torch.equal(a, b) for _ in range(3) for a, b in zip(run(), expected))
        os._exit(0 if same and (depth == 0 or fork(depth - 1) == 0) else 1)
    status = os.waitpid(pid, 0)[1]
    after = run()
    assert all(torch.equal(a, b) for a, b in zip(after, expected))
    return status

print("status", fork(depth=1))
"""

LOADER = """
class Convolved(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        torch.set_num_threads(2)
        return i, causal_conv1d(x + i, w, dilation=4, backend="cpu")

run()
signal.alarm(100)
seen = 0
loader = torch.utils.data.DataLoader(Convolved(), batch_size=2, num_workers=2, multiprocessing_context="fork")
for indices, ys in loader:
    for i, y in zip(indices.tolist(), ys):
        assert torch.equal(y, causal_conv1d(x + i, w, dilation=4, backend="cpu"))
        seen += 1
print("seen", seen)
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", PARENT + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_forked_process():
    """Also one forked from a forked one; the backward of torch itself does not run in a forked process."""
    run = run_python(FORK)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == "status 0\n"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_data_loader_workers():
    run = run_python(LOADER)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == "seen 8\n"


def test_calls_from_several_threads():
    """Each with its own inputs and its own scratch memory, each call in parallel itself."""
    cases = [CASE, *MODES]
    inputs = [(case.tensors(torch.float32, i), case.grad(torch.float32, i)) for i, case in enumerate(cases)]

    def run(i: int):
        torch.set_num_threads(2)
        tensors, grad = inputs[i % 4]
        return results(causal_conv1d, tensors, grad, backend="cpu", **cases[i % 4].options())

    expected = [run(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for i, actual in enumerate(pool.map(run, range(40))):
            for name, t in actual.items():
                assert torch.equal(t, expected[i % 4][name]), name
