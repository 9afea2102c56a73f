"""Build the documentation as a static site with Sphinx, and the API reference with pdoc (extra `[docs]`).

    python colab/guides/build.py [FOLDER]        default: site/, which git ignores; open site/index.html

A warning is an error, and so is a link from one page to a file or an anchor that does not exist.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gptjax.config import describe, yaml_value
from gptjax.config.schema import leaf_fields

HERE = Path(__file__).parent


def config_page() -> str:
    """The reference of all settings as Markdown, generated from the schema."""
    lines = ["# Settings", "", "Set any of them in a YAML file, or as `a.b=c` on the command line.", ""]
    for group, what, rows in describe():
        lines += [
            f"## {group or 'The run itself'}",
            "",
            what,
            "",
            "| setting | default | value | meaning |",
            "|---|---|---|---|",
        ]
        for key, kind, text in rows:
            cells = (f"`{key}`", f"`{yaml_value(leaf_fields()[key].default)}`", kind, text)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def build(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "guides"
        shutil.copytree(HERE, source)
        shutil.copy(HERE.parent / "cookbook.md", scratch)
        (source / "config.md").write_text(config_page(), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", source, folder], check=True)
    subprocess.run([sys.executable, "-W", "error", "-m", "gptjax.reference", folder / "api"], check=True)


def dead_links(folder: Path) -> list[str]:
    """Relative links of all pages whose file does not exist, or, to other pages than pdoc's, whose anchor does not."""
    pages = {page: page.read_text(encoding="utf-8") for page in folder.rglob("*.html")}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    dead = []
    for page, text in pages.items():
        for link in re.findall(r'\b(?:href|src)="([^"]+)"', text):
            url = urlsplit(link)
            if url.scheme or url.netloc or "${" in link:  # a template in pdoc's search script
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            anchor = unquote(url.fragment) if "api" not in target.relative_to(folder).parts else ""
            if not target.exists() or (anchor and anchor not in anchors.get(target, set())):
                dead.append(f"{page.relative_to(folder)}: {link}")
    return sorted(set(dead))


if __name__ == "__main__":
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "site").resolve()
    build(site)
    if dead := dead_links(site):
        sys.exit("dead links:\n" + "\n".join(dead))
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    print(f"{site / 'index.html'}: {len(list(site.rglob('*.html')))} pages, {size / 2**20:.0f} MiB")
