"""What the native code includes, defines and links."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pykernels import _cpu

ISA = "x86_64_v4"


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def compiler() -> list[str]:
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        pytest.skip("no C++ compiler is installed")
    return [found]


def test_kernels_include_neither_python_nor_torch(source_tree: Path) -> None:
    header = re.compile(r'^\s*#\s*include\s*[<"](Python\.h|pybind11/|torch/|ATen/|c10/)', re.MULTILINE)
    sources = [path for path in (source_tree / "kernels").rglob("*") if path.is_file()]
    assert sources
    assert [str(path) for path in sources if header.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="CPU capabilities are those of x86-64")
def test_a_unit_for_one_capability_shares_no_code_with_the_others(source_tree: Path, tmp_path: Path) -> None:
    """The linker keeps one copy of a weak symbol, for every capability: it must not be the one with AVX-512 in it.

    Without optimisation, so that no inline function is hidden by having been inlined.
    """
    nm = program("nm")
    for source in (source_tree / "kernels").glob("*/*_cpu.cpp"):
        unit = tmp_path / f"{source.stem}.o"
        flags = ["-std=c++17", "-O0", "-fPIC", "-march=x86-64-v4", f"-DPK_ISA={ISA}", f"-I{source_tree / 'kernels'}"]
        subprocess.run([*compiler(), *flags, "-c", str(source), "-o", str(unit)], check=True)
        listing = subprocess.run([nm, "-C", "--defined-only", str(unit)], check=True, capture_output=True, text=True)
        symbols = [line.split(maxsplit=2)[1:] for line in listing.stdout.splitlines()]
        # DW.ref.* are pointers that the compiler shares between all units, not code.
        weak = [name for kind, name in symbols if kind in "WVu" and not name.startswith("DW.ref.")]
        assert any(f"pk::{ISA}::" in name for _, name in symbols), "nm listed nothing of this unit"
        assert [name for name in weak if f"pk::{ISA}::" not in name] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_extension_needs_the_openmp_runtime_of_torch_and_not_torch_itself() -> None:
    run = subprocess.run([program("readelf"), "-d", _cpu.__file__], check=True, capture_output=True, text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run.stdout)
    assert [name for name in needed if re.match(r"lib(torch|c10|python)", name)] == []
    assert ("libgomp.so.1" in needed) == _cpu.has_openmp(), needed
