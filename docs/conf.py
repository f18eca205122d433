"""Settings of the documentation, built by `make docs` without network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import pykernels

project = "pykernels"
author = copyright = "The pykernels authors"
version = release = pykernels.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_gallery.gen_gallery"]
html_theme = "furo"
html_title = f"pykernels {release}"
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = False
default_role = "literal"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types, and shapes as well
autodoc_default_options = {"exclude-members": "forward, load_state_dict"}
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]

# A new tutorial or picture is a Python file in one of these two folders; tests/test_docs.py runs it as well.
_FOLDERS = ["tutorials", "gallery"]
exclude_patterns = ["_build", *_FOLDERS]
sphinx_gallery_conf = {
    "examples_dirs": _FOLDERS,
    "gallery_dirs": [f"generated/{name}" for name in _FOLDERS],
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
}


def _mathml(block: bool) -> Any:
    """Formulas as MathML, which browsers draw themselves: nothing is fetched when a page is opened."""

    def visit(self: Any, node: nodes.Element) -> None:
        tag = "div" if block else "span"
        self.body.append(f'<{tag} class="math">{tex2mathml(node.astext(), as_block=block)}</{tag}>')
        raise nodes.SkipNode

    return visit


def _escape_shapes(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """The star of shapes like (B, C, *S), which is no emphasis."""
    lines[:] = [re.sub(r"(?<=[ (])\*S\b", r"\\*S", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _escape_shapes)
    app.add_html_math_renderer("mathml", (_mathml(block=False), None), (_mathml(block=True), None))
