"""Sphinx: ``make docs``."""

from importlib import metadata

project = "sinktrack"
author = "the sinktrack authors"
release = version = metadata.version("sinktrack")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sinktrack {release}"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = ["olmo_core"]
nitpicky = False
linkcheck_ignore = [r"http://127\.0\.0\.1.*"]
