"""How the docs are built: `make docs`, warnings as errors."""

from crisp import __version__

project = "crisp"
version = release = __version__
extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"crisp {version}"
nitpicky = True
