"""Sphinx's settings for the documentation; `python colab/guides/build.py` builds it."""

project = "gptjax"
author = "The gptjax authors"
copyright = author
extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["build.py"]
html_theme = "furo"
html_title = "gptjax"
html_copy_source = False
html_show_sourcelink = False
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]
suppress_warnings = ["myst.header"]
