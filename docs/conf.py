"""Sphinx settings."""

import ssl_matfeat

project = "ssl_matfeat"
author = "The ssl_matfeat developers"
copyright = "2026, The ssl_matfeat developers"
release = version = ssl_matfeat.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "numpydoc"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Self-supervised features for crystals"}

# `name` in a docstring links to what it names.
default_role = "autolink"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
