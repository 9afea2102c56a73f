"""Builds the API reference as a static web site with pdoc (in the extra `[docs]`). Docstrings are shown verbatim.

    python -m gptjax.reference [FOLDER]    writes the site to FOLDER (default: site/, which is in .gitignore)

The start page of the API reference is FOLDER/index.html.
"""

from __future__ import annotations

import html
import importlib
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

from gptjax.errors import UserError

_STYLE = "font-size: 75%; white-space: pre-wrap; overflow-wrap: anywhere; background: none; border: 0; padding: 0"
_EXTENSION = '<span class="o">.</span><span class="n">jaxlib</span><span class="o">.</span><span class="n">_jax</span>'
# `_EXTENSION` is the HTML of the text ".jaxlib._jax", which is removed from all pages, so that the pages show jax.Array
# instead of jax.jaxlib._jax.Array.


def build(folder: str | Path) -> Path:
    """Writes the API reference into `folder`, and returns the path of its index page.

    Call this function in a separate process, because `_open` changes the modules of gptjax.

    Raises:
        UserError: pdoc is not installed.
    """
    try:
        import pdoc
    except ImportError:
        raise UserError("the reference needs pdoc, which is not installed: pip install -e '.[docs]'") from None
    _open("gptjax")
    pdoc.render.configure(docformat="markdown", footer_text="gptjax")
    pdoc.render.env.filters |= {"to_markdown": lambda docstring: docstring, "to_html": _page}
    pdoc.pdoc("gptjax", r"!gptjax\.(.+\.)?_.+", output_directory=Path(folder))
    for page in Path(folder).rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace(_EXTENSION, "").replace(".jaxlib._jax", ""), encoding="utf-8")
    return Path(folder) / "index.html"


def _open(name: str) -> None:
    """Imports a package and its submodules, and changes them so that pdoc documents all public names.

    `_open` imports the public names that a package imports lazily, and adds submodules to `__all__`. The constructor of
    a NamedTuple has a `__module__` that does not exist; `_open` replaces this `__module__` with the module of the
    class, so that pdoc finds the signature.
    """
    module: Any = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        getattr(module, public)
    inside = [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", ())) if info.name[0] != "_"]
    for submodule in inside:
        _open(f"{name}.{submodule}")
    if hasattr(module, "__all__"):
        module.__all__ = [*module.__all__, *(sub for sub in inside if sub not in module.__all__)]
    for cls in vars(module).values():
        if isinstance(cls, type) and hasattr(cls, "_fields") and cls.__module__ == name:
            cls.__new__.__module__ = name


def _page(docstring: str) -> Any:
    """Converts a docstring to preformatted HTML, in which known names in backticks are links.

    All other Markdown in a docstring is left as plain text, because columns and indentation are significant in these
    docstrings, and an asterisk means multiplication.
    """
    from markupsafe import Markup

    text = re.sub("`([^`\n]+)`", r"<code>\1</code>", html.escape(docstring))
    # The dot of a file suffix such as .gguf is put into a <span>, so that pdoc does not interpret the suffix as a
    # module name.
    text = re.sub(r"(?<=\s)\.(?=\w)", "<span>.</span>", text)
    return Markup(f'<pre style="{_STYLE}">{text}</pre>')


if __name__ == "__main__":
    try:
        print(build(sys.argv[1] if len(sys.argv) > 1 else "site"))
    except UserError as error:
        sys.exit(str(error))
