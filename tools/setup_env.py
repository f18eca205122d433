"""Bring an environment up to date for `make demo`, `make test`, `make bench`, `make docs` or `make lint`.

Without --venv it makes and reuses .venv, pinned by constraints.txt. With --venv it completes an environment that has
torch and leaves that torch as it is. Where nothing has changed since the last run it installs nothing and needs no
network.

Standard library only, and nothing newer than Python 3.6 before the version is checked, so that an old Python gets a
message and not a traceback.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
MINIMUM_PYTHON = (3, 11)
EXTRAS = ("models", "data", "plot", "netcdf", "gantk", "gpytorch")
MORE_EXTRAS = {"test": ("triton",)}
GROUPS = {"demo": (), "bench": ("test", "bench"), "test": ("test",), "docs": ("docs",), "lint": ("lint",)}
# scikit-build-core asks for these under build isolation only. Without isolation a rebuild works offline.
BUILD_PROGRAMS = ("cmake>=3.18", "ninja")
PACKAGE_SOURCES = ("pyproject.toml", "CMakeLists.txt", "kernels", "csrc", "pykernels")
COMPILERS = ("c++", "g++", "clang++")
CXX17_PROGRAM = b"#include <optional>\nint main() { std::optional<int> x{0}; if constexpr (true) return *x; }\n"

# Runs in the Python that is looked at, which may be old or lack everything.
LOOK = """
import hashlib, json, os, sys, sysconfig
def distribution(name):
    try:
        from importlib.metadata import distribution
        return distribution(name)
    except ImportError:
        return None
versions = {name: getattr(distribution(name), "version", None) for name in ("pip", "torch")}
package = distribution("pykernels")
include = sysconfig.get_paths()["include"]
json.dump({
    "path": sys.executable,
    "python": sys.version_info[:2],
    "include": include,
    "headers": os.path.exists(os.path.join(include, "Python.h")),
    "record": hashlib.sha256((package.read_text("RECORD") or "").encode()).hexdigest() if package else None,
    **versions,
}, sys.stdout)
"""

NO_TORCH = """\
VENV={venv} has no torch, and none is installed into an environment of your own. Install it there first; the install
selector on pytorch.org gives the command, also for the CPU build."""

TORCH_DOWNLOAD = """\
torch {version} is missing from {venv} and is downloaded now: {size}.
To bring a CPU build instead, interrupt this and do one of these. The install selector on pytorch.org, set to pip and
CPU, shows the address that the first two need.
  - export PIP_EXTRA_INDEX_URL=<that address> and repeat the command
  - install torch from it into an environment of your own and add VENV=path/to/environment
  - add TORCH=path/to/torch.whl, a wheel of torch {version} that you have"""


def stop(message, status=2):
    print(message, file=sys.stderr)
    sys.exit(status)


def look_at(python):
    """What there is in a Python, or None where it does not run."""
    try:
        run = subprocess.run([str(python), "-c", LOOK], stdout=subprocess.PIPE, cwd=str(ROOT / "tools"))
    except OSError:
        return None
    return json.loads(run.stdout.decode()) if run.returncode == 0 else None


class Environment:
    """A virtual environment and, in a file inside it, what was last put there."""

    def __init__(self, path, pinned):
        self.path = path
        self.pinned = pinned
        self.python = path / "bin" / "python"
        self.state_file = path / "pykernels-setup.json"
        try:
            self.state = json.loads(self.state_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.state = {"requirements": {}, "package": None}

    def look(self):
        return look_at(self.python)

    def make(self):
        print(f"Making {self.path}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.path)], check=True)
        self.state = {"requirements": {}, "package": None}

    def remember(self, **what):
        self.state.update(what)
        self.state_file.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")

    def has_requirements(self, found, purpose):
        return self.state["requirements"].get(purpose) == requirements_digest(found, purpose, self.pinned)

    def has_package(self, found):
        return self.state["package"] == [package_digest(), found["record"]] and self.import_error() is None

    def is_current(self, found, purpose):
        return self.has_requirements(found, purpose) and self.has_package(found)

    def import_error(self):
        """What importing the installed package prints when it fails, or None."""
        command = [str(self.python), "-P", "-c", "import pykernels"]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return run.stdout.decode(errors="replace") if run.returncode else None

    def pip_install(self, *arguments):
        command = [str(self.python), "-P", "-m", "pip", "--disable-pip-version-check", "install", *arguments]
        status = subprocess.run(command, cwd=str(ROOT)).returncode
        if status:
            stop(f"pip failed: {' '.join(map(shlex.quote, command))}", status)


def missing_compiler():
    """What is wrong with the C++ compiler, or None: it has to build a C++17 program."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [[name] for name in COMPILERS if shutil.which(name)]
    if not candidates:
        return f"a C++17 compiler (there is no {', no '.join(COMPILERS)})"
    shown = f"CXX={named}" if named else candidates[0][0]
    with tempfile.TemporaryDirectory() as folder:
        command = [*candidates[0], "-std=c++17", "-x", "c++", "-", "-o", os.path.join(folder, "program")]
        try:
            run = subprocess.run(command, input=CXX17_PROGRAM, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            return f"a C++17 compiler ({shown}: {error.strerror})"
    if run.returncode == 0:
        return None
    lines = run.stdout.decode(errors="replace").splitlines() or ["no message"]
    return f"a C++17 compiler ({shown} does not build C++17: {lines[0]})"


def has_module(package):
    try:
        # A directory without code may be left where the package was split off.
        return importlib.util.find_spec(f"{package}.__main__") is not None
    except ImportError:
        return False


def missing(found, create):
    """Everything that is missing, as (what, what brings it)."""
    problems = []
    minimum = "{}.{}".format(*MINIMUM_PYTHON)
    pythons = {tuple(found["python"]): found["path"], sys.version_info[:2]: sys.executable}
    for version, path in pythons.items():
        if version < MINIMUM_PYTHON:
            bring = f"package python{minimum} or newer; PYTHON= names it (a .venv with an old Python has to be removed)"
            problems.append(("Python {} or newer; {} is {}.{}".format(minimum, path, *version), bring))
    new_enough = not problems
    if new_enough and create:
        absent = [name for name in ("venv", "ensurepip") if not has_module(name)]
        if absent:
            problems.append((f"Python's {' and '.join(absent)}", "package python3-venv (Debian, Ubuntu)"))
    if new_enough and not found["headers"]:
        bring = "package python3-dev (Debian, Ubuntu), python3-devel (Fedora)"
        problems.append((f"Python.h, expected in {found['include']}", bring))
    compiler = missing_compiler()
    if compiler:
        bring = "package g++ (Debian, Ubuntu), gcc-c++ (Fedora); xcode-select --install (macOS)"
        problems.append((compiler, bring))
    return problems


def requirements(purpose):
    """What the environment needs beside the package itself."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["build-system"]["requires"], *BUILD_PROGRAMS, *project["project"]["dependencies"]]
    for extra in (*EXTRAS, *MORE_EXTRAS.get(purpose, ())):
        wanted += project["project"]["optional-dependencies"][extra]
    for group in GROUPS[purpose]:
        wanted += project["dependency-groups"][group]
    return wanted


def requirements_digest(found, purpose, pinned):
    constraints = CONSTRAINTS.read_text(encoding="utf-8") if pinned else None
    inputs = [requirements(purpose), constraints, found["python"], found["torch"]]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def package_digest():
    digest = hashlib.sha256()
    for name in PACKAGE_SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix not in (".pyc", ".so"):
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def install_torch(environment, wheel):
    version = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE).group(1)
    installed = environment.look()["torch"]
    if installed and installed.split("+")[0] == version:
        return
    if not wheel:
        size = "about 190 MB for a CPU build"
        if (sys.platform, platform.machine()) == ("linux", "x86_64"):
            size = f"about 3 GB for the default build, which brings the CUDA libraries, {size}"
        print(TORCH_DOWNLOAD.format(version=version, venv=environment.path, size=size), flush=True)
    environment.pip_install("-c", str(CONSTRAINTS), str(wheel or "torch"))


def install_requirements(environment, purpose):
    torch = environment.look()["torch"]
    new = not environment.state["requirements"]
    size = (
        "540 MB of downloads, half of it Triton" if "triton" in MORE_EXTRAS.get(purpose, ()) else "230 MB of downloads"
    )
    print(f"Installing what else is needed{f': up to about {size}' if new else ''}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        keep_torch = Path(folder) / "constraints.txt"
        keep_torch.write_text(f"torch=={torch}\n", encoding="utf-8")
        pins = ["-c", str(CONSTRAINTS)] if environment.pinned else []
        quiet = [] if new else ["--quiet"]
        environment.pip_install(*quiet, "-c", str(keep_torch), *pins, *requirements(purpose))
    found = environment.look()
    if found["torch"] != torch:
        stop(f"torch {torch} in {environment.path} was replaced by {found['torch']}", 1)
    digest = requirements_digest(found, purpose, environment.pinned)
    environment.remember(requirements={**environment.state["requirements"], purpose: digest})


def install_package(environment):
    print("Building and installing pykernels", flush=True)
    sources = package_digest()  # as they are now: a file edited during the build is built again next time
    # A build folder for each environment: CMake's cache remembers its pybind11 and the option below.
    name = hashlib.sha256(str(environment.path).encode()).hexdigest()[:8]
    environment.pip_install(
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--force-reinstall",
        f"--config-settings=build-dir=build/make-{name}",
        f"--config-settings=cmake.define.PYKERNELS_WERROR={'ON' if environment.pinned else 'OFF'}",
        ".",
    )
    error = environment.import_error()
    if error:
        stop(f"pykernels is installed in {environment.path} but cannot be imported:\n{error}", 1)
    environment.remember(package=[sources, environment.look()["record"]])


def bring_up_to_date(environment, purpose, torch_wheel):
    found = environment.look()
    # An environment without pip is one whose making was interrupted.
    create = environment.pinned and not (found and found["pip"])
    if create:
        found = look_at(sys.executable)
    old = min(tuple(found["python"]), sys.version_info[:2]) < MINIMUM_PYTHON
    if not (create or old) and environment.is_current(found, purpose):
        return
    problems = missing(found, create)
    if problems:
        lines = [f"  - {what}\n    {bring}" for what, bring in problems]
        stop("\n".join(["Missing, and nothing has been installed:", *lines]))
    if create:
        environment.make()
    if environment.pinned:
        install_torch(environment, torch_wheel)
    if not environment.has_requirements(environment.look(), purpose):
        install_requirements(environment, purpose)
    if not environment.has_package(environment.look()):
        install_package(environment)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--for", dest="purpose", choices=sorted(GROUPS), required=True)
    parser.add_argument("--venv", type=Path, help="an existing environment with torch, instead of .venv")
    parser.add_argument("--torch", type=Path, help="a wheel of torch for .venv")
    options = parser.parse_args()

    environment = Environment(Path(os.path.abspath(str(options.venv or ROOT / ".venv"))), pinned=options.venv is None)
    if options.torch and not options.torch.is_file():
        stop(f"TORCH={options.torch}: there is no such file")
    if not environment.pinned:
        if options.torch:
            stop("TORCH= is for .venv; an environment given by VENV= keeps the torch that it has")
        found = environment.look()
        if not found:
            stop(f"VENV={options.venv}: {environment.python} does not run")
        if not found["torch"]:
            stop(NO_TORCH.format(venv=options.venv))
        if not found["pip"]:
            stop(f"VENV={options.venv} has no pip; this brings it: {environment.python} -m ensurepip")
    bring_up_to_date(environment, options.purpose, options.torch and options.torch.resolve())


if __name__ == "__main__":
    main()
