"""Settings of the documentation site: ``make docs``."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import vitmix

project = "vitmix"
author = copyright = "the vitmix authors"
release = version = vitmix.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "conf.py"]
nitpicky = True

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook lies there with its output; the tests run it

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes and units, which types don't
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Other libraries' names, which this site has no page for.
nitpick_ignore_regex = [
    ("py:.*", r"(abc|collections|enum|torch|typing|nn)\b.*"),
    ("py:.*", r"(ABC|Module|NamedTuple|ValueError|RuntimeError|tuple|object)"),
]

html_theme = "furo"
html_title = "vitmix"
html_static_path: list[str] = []
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0067a3", "color-brand-content": "#0067a3"},
    "dark_css_variables": {"color-brand-primary": "#6cbcf0", "color-brand-content": "#6cbcf0"},
}


def _visit(translator: Any, node: nodes.Element, display: str) -> None:
    """Equations as MathML, which browsers show without a script from elsewhere."""
    mathml = convert(node.astext(), display=display)
    if display == "block":
        mathml = f'<div class="math" style="overflow-x: auto">{mathml}</div>'
    translator.body.append(mathml)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Show equations without a network."""
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: _visit(self, node, "inline"), None),
        block_renderers=(lambda self, node: _visit(self, node, "block"), None),
    )


html_math_renderer = "mathml"
