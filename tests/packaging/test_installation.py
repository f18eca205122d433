"""The installed package: where it is, what it brings, and what importing it does."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import pykernels


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_tests_run_on_the_installed_package(source_tree: Path) -> None:
    assert not Path(pykernels.__file__).is_relative_to(source_tree / "pykernels")


def test_version() -> None:
    assert pykernels.__version__ == version("pykernels")


def test_type_annotations_are_installed() -> None:
    assert Path(pykernels.__file__).with_name("py.typed").is_file()


def test_import_loads_no_optional_dependency() -> None:
    """Beside what torch itself loads, which may include tqdm."""
    run = run_python("import sys, torch; old = set(sys.modules); import pykernels; print(*set(sys.modules) - old)")
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert "pykernels.ops" in loaded
    assert loaded & {"sklearn", "aeon", "gpytorch", "matplotlib", "tqdm", "safetensors"} == set()
    assert "pykernels.ops.causal_conv.triton" not in loaded


def test_unknown_cpu_capability_in_the_environment() -> None:
    run = run_python("import pykernels", PYKERNELS_CPU_CAPABILITY="sse9")
    assert run.returncode != 0
    error = run.stderr.splitlines()[-1]
    assert error.startswith("ImportError: PYKERNELS_CPU_CAPABILITY='sse9'")
    assert all(name in error for name in pykernels.cpu_capabilities())


def test_unknown_backend_in_the_environment() -> None:
    run = run_python("import pykernels", PYKERNELS_BACKEND="abacus")
    assert run.returncode != 0
    error = run.stderr.splitlines()[-1]
    assert error.startswith("ValueError: ")
    assert all(word in error for word in ("PYKERNELS_BACKEND", "'abacus'", "'cpu'", "'reference'"))


def test_nothing_tells_users_to_install_from_an_index(source_tree: Path) -> None:
    """The name on the public index is not ours: an installation goes from the sources or a wheel."""
    git = shutil.which("git")
    if git is None or not (source_tree / ".git").exists():
        pytest.skip("needs git and a clone")
    files = subprocess.run([git, "ls-files", "-z"], cwd=source_tree, check=True, capture_output=True, text=True).stdout
    command = re.compile(r"pip3? install (-\S+ +)*[\"'`]?" + "pykernels\\b", re.IGNORECASE)
    telling = [
        name
        for name in files.rstrip("\0").split("\0")
        if (source_tree / name).is_file() and command.search((source_tree / name).read_text(errors="replace"))
    ]
    assert telling == []
