"""The API reference as a static site, by pdoc (extra `[docs]`): every module, every docstring as it was written.

python -m gptjax.reference [FOLDER]        into site/, which git ignores; open site/index.html
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

_STYLE = "white-space: pre-wrap; overflow-wrap: anywhere; background: none; border: 0; padding: 0"


def build(folder: str | Path) -> Path:
    """Write the site into `folder` and return its first page. For a process of its own: see `_open`.

    Raises:
        UserError: pdoc is not there.
    """
    try:
        import pdoc
    except ImportError:
        raise UserError("the reference is made by pdoc, which is not installed: pip install -e '.[docs]'") from None
    _open("gptjax")
    pdoc.render.configure(docformat="markdown", footer_text="gptjax")
    pdoc.render.env.filters |= {"to_markdown": lambda docstring: docstring, "to_html": _page}
    pdoc.pdoc("gptjax", output_directory=Path(folder))
    return Path(folder) / "index.html"


def _open(name: str) -> None:
    """Import a package with all that is in it, so that pdoc finds what it would miss:

    names       that are imported when first used
    submodules  which `__all__` leaves out: they are added to it
    signatures  of NamedTuples, whose constructors name a module that does not exist
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
    """Columns and indentation carry meaning in these docstrings, and an asterisk is a product: nothing is Markdown
    but `names`, which become links where they are known."""
    from markupsafe import Markup

    text = re.sub("`([^`\n]+)`", r"<code>\1</code>", html.escape(docstring))
    return Markup(f'<pre style="{_STYLE}">{text}</pre>')


if __name__ == "__main__":
    try:
        print(build(sys.argv[1] if len(sys.argv) > 1 else "site"))
    except UserError as error:
        sys.exit(str(error))
