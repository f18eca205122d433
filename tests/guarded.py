"""Scripts whose tensors lie against pages that must not be touched.

:func:`run_guarded` runs one in a process of its own, in which this file is the program.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

#: The memory of the tensors that are still alive; scripts clear it when they have let go of all of theirs.
kept: list[mmap.mmap] = []
at_end = False
made = 0


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of NaN, or of integers as small as there are, that starts behind such a page or ends in front of one."""
    count = 1
    for n in shape:
        count *= n
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    page, size = mmap.PAGESIZE, count * dtype.itemsize
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    kept.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for which in (0, pages + 1):
        if libc.mprotect(ctypes.c_void_p(address + which * page), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page + (pages * page - size if at_end else 0)
    found = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
    if dtype.is_floating_point:
        return found.fill_(float("nan"))
    return found.fill_(dtype == torch.bool or torch.iinfo(dtype).min)


def copied(t: Tensor) -> Tensor:
    return guarded(tuple(t.shape), t.dtype).copy_(t)


def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    global made
    made += 1
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return guarded(tuple(shape), dtype or self.dtype)


def empty_like(t: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return new_empty(t, t.shape, dtype=dtype)


def main() -> None:
    global at_end
    script = compile(sys.stdin.read(), "script", "exec")
    torch.Tensor.new_empty, torch.empty_like = new_empty, empty_like
    for at_end in (False, True):
        exec(script, {"guarded": guarded, "copied": copied, "kept": kept, "torch": torch})
        print("end" if at_end else "start", made, flush=True)


def run_guarded(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script twice, against pages before the tensors and behind them; each time it prints how many it has made.

    The script knows ``guarded``, ``copied``, ``kept`` and ``torch``, whose own new tensors are such as well.
    """
    if sys.platform != "linux":
        pytest.skip("uses mprotect through ctypes")
    return subprocess.run([sys.executable, "-P", __file__], input=script, capture_output=True, text=True, timeout=200)


def check_guarded(script: str, at_least: int) -> None:
    """Assert that a script runs to its end, and that torch has made so many tensors for it, each time."""
    run = run_guarded(script)
    assert run.returncode == 0, (run.stdout, run.returncode, run.stderr[-2000:])
    (first, some), (second, all_of_them) = (line.split() for line in run.stdout.splitlines())
    assert (first, second) == ("start", "end")
    assert at_least < int(some) <= int(all_of_them) - at_least


if __name__ == "__main__":
    main()
