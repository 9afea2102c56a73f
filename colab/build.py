"""Builds the notebooks of this folder from their sources, checks that the two agree, and runs notebooks.

    python colab/build.py                                  writes every NN_name.ipynb from its NN_name.py
    python colab/build.py --check                          exit code 1 and the names of the notebooks that differ
    python colab/build.py --run out [--full] 00 04         runs notebooks from top to bottom: out/NN_name.ipynb with
                                                           outputs, out/NN_name-1.png, .. pictures, and the seconds

A source is in py:percent format (jupytext): edit the source, never the notebook. Its first cell is Markdown and begins
with the title. This script inserts what all notebooks share: the badges below the title, then the cells of
`first_cells.py`. It leaves out the cell tagged "script" (the import of `save_pictures.py`), which is for plain scripts.
Headless runs are small (GPTJAX_SMOKE=1) unless --full is given: a source that takes long defines
SMOKE = os.environ.get("GPTJAX_SMOKE") == "1". A source that asserts values first sets jax_default_matmul_precision to
"highest", since a TPU multiplies in bfloat16 by default.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat

HERE = Path(__file__).parent
REPOSITORY = "gptjax/gptjax"  # on GitHub, for the badges; first_cells.py installs from there
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{0}/blob/main/colab/{1}.ipynb) "
    "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
    "(https://kaggle.com/kernels/welcome?src=https://github.com/{0}/blob/main/colab/{1}.ipynb)"
)
METADATA = {  # as Colab writes it for a notebook whose runtime is a v5e TPU
    "accelerator": "TPU",
    "colab": {"gpuType": "V5E1", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_TIMEOUT_S = 600


def sources() -> list[Path]:
    """The sources of the notebooks, sorted by number."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def build(source: Path) -> str:
    """Builds the notebook of a source and returns the text of its .ipynb file.

    Raises:
        SystemExit: the first cell is not Markdown that begins with a title.
    """
    cells = jupytext.read(source).cells
    title, _, rest = cells[0].source.partition("\n") if cells else ("", "", "")
    if not cells or cells[0].cell_type != "markdown" or not title.startswith("# "):
        raise SystemExit(f"{source}: expected a first cell '# %% [markdown]' whose first line is '# # Title'")
    cells[0].source = f"{title}\n\n{BADGE.format(REPOSITORY, source.stem)}\n\n{rest.lstrip()}"
    shared = [cell for cell in jupytext.read(HERE / "first_cells.py").cells if "cellView" in cell.metadata]
    for cell in shared:
        cell.source = re.sub(
            r"^( +)# %pip", r"\1%pip", cell.source, flags=re.MULTILINE
        )  # jupytext uncomments only unindented lines
    cells[1:] = shared + [cell for cell in cells[1:] if "script" not in cell.metadata.get("tags", ())]
    for cell in cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "cellView"}
    name_cells(cells)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def name_cells(cells: list[Any]) -> None:
    """Gives each cell an id that is a hash of its text; equal cells get a number as suffix."""
    seen: dict[str, int] = {}
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"


def drifted() -> list[str]:
    """Names of the notebooks that differ from their source, have no source, or are missing."""
    expected = {source.with_suffix(".ipynb"): build(source) for source in sources()}
    actual = {path: path.read_text(encoding="utf-8") for path in HERE.glob("*.ipynb")}
    return sorted(path.name for path in expected.keys() | actual.keys() if expected.get(path) != actual.get(path))


def run(source: Path, out: Path, full: bool = False) -> str:
    """Runs a notebook in a kernel of this Python, in the folder `out`.

    Writes the notebook with its outputs, also if a cell fails. Returns the error of the failed cell, or "".
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.reads(build(source), as_version=4)
    os.environ["GPTJAX_SMOKE"] = "0" if full else "1"
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(out)}}
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return f"{error}\n"
    finally:
        nbformat.write(notebook, out / f"{source.stem}.ipynb")
        for i, png in enumerate(pictures(notebook), 1):
            (out / f"{source.stem}-{i}.png").write_bytes(png)
    return ""


def pictures(notebook: Any) -> list[bytes]:
    """The PNG images among the outputs of a notebook."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    encoded = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [base64.b64decode(text) for text in encoded]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, report differences")
    parser.add_argument("--run", type=Path, metavar="OUT", help="run notebooks and write their outputs to OUT")
    parser.add_argument("--full", action="store_true", help="with --run: full size instead of GPTJAX_SMOKE=1")
    parser.add_argument("names", nargs="*", help="with --run: prefixes of names; none: all notebooks")
    args = parser.parse_args(argv)
    if args.check:
        names = drifted()
        if names:
            print(
                f"they differ from their sources, run python colab/build.py: {', '.join(names)}",
                file=sys.stderr,
            )
        return bool(names)
    if args.run:
        chosen = [s for s in sources() if not args.names or s.name.startswith(tuple(args.names))]
        if not chosen:
            parser.error(f"no source begins with {' or '.join(args.names)}")
        args.run.mkdir(parents=True, exist_ok=True)
        failed = 0
        for source in chosen:
            start = time.perf_counter()
            error = run(source, args.run.resolve(), args.full)
            print(f"{source.stem}: {time.perf_counter() - start:.0f} s{', failed' * bool(error)}", flush=True)
            failed += bool(error)
            print(error, end="", file=sys.stderr, flush=True)
        return int(failed > 0)
    for source in sources():
        source.with_suffix(".ipynb").write_text(build(source), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
