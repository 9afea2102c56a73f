"""The documentation as a static site, by Sphinx, with the API reference by pdoc (extra `[docs]`).

python colab/guides/build.py [FOLDER]        into site/, which git ignores; open site/index.html
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gptjax.config import describe, yaml_value
from gptjax.config.schema import leaf_fields

HERE = Path(__file__).parent


def config_page() -> str:
    """The reference of all settings, in Markdown, made from the schema."""
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


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "site").resolve())
