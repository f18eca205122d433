"""The documentation says what is true: its examples, tutorials and pictures run, and nothing public is left out."""

from __future__ import annotations

import doctest
import os
import re
import runpy
from pathlib import Path

import pytest
import torch

import pykernels
import pykernels.data
import pykernels.nn

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.rst")) + sorted(DOCS.glob("families/*.rst")) + sorted(DOCS.glob("systems/*.rst"))
SCRIPTS = sorted(DOCS.glob("tutorials/*.py")) + sorted(DOCS.glob("gallery/*.py"))
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason=f"there is no {DOCS}")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's forward mode, and of GPyTorch
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_examples_of_the_pages_print_what_they_say(page: Path):
    with torch.random.fork_rng(devices=[]):
        outcome = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert outcome.failed == 0


def test_pages_of_families_have_examples():
    parser = doctest.DocTestParser()
    for page in (DOCS / "index.rst", *DOCS.glob("families/*.rst")):
        assert parser.get_examples(page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_tutorials_and_pictures_run(script: Path, monkeypatch: pytest.MonkeyPatch):
    for package in ("matplotlib", "sklearn", "aeon"):
        pytest.importorskip(package)
    # Before pyplot is there, only the variable decides; afterwards only the call does.
    monkeypatch.setenv("MPLBACKEND", "agg")
    from matplotlib import pyplot as plt

    before = os.listdir()
    plt.switch_backend("agg")
    with plt.rc_context(), torch.random.fork_rng(devices=[]):
        runpy.run_path(str(script), run_name="__main__")
        figures = plt.get_fignums()
        for number in figures:
            plt.figure(number).canvas.draw()
        plt.close("all")
    assert figures
    assert os.listdir() == before


def test_every_public_name_is_documented():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for module in (pykernels, pykernels.nn):
        for name in set(module.__all__) - {"nn"}:
            assert re.search(rf"auto\w+:: {module.__name__}\.{name}\n", text), name
    assert re.search(r"automodule:: pykernels.data\n   :members:\n   :imported-members:", text)
    table = (DOCS / "index.rst").read_text(encoding="utf-8")
    for page in DOCS.glob("families/*.rst"):
        assert f":doc:`families/{page.stem}`" in table
