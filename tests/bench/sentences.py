"""Draws sentences from the docstrings, help texts and comments of gptjax, for readers to judge whether they are plain.

python tests/bench/sentences.py --seed 1            fifty, drawn at random
python tests/bench/sentences.py --all gptjax/ops    all sentences of some files, in order
"""

import argparse
import ast
import random
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]


def of_text(text: str, least: int) -> list[str]:
    """Sentences of at least `least` words, split at full stops, blank lines and `Args:` entries; code is left out."""
    text = re.sub(r"(?m)^( {4,}|>>>|\$ ).*$", "", re.sub(r"::\n\n(?: +.*\n|\n)+", "\n\n", text))
    pieces = re.split(r"\n\s*\n|(?<=[.!?])\s+(?=[A-Z`\"(])|\n\s*(?=[\w*]+: )", text)
    sentences = [" ".join(piece.split()) for piece in pieces]
    return [sentence for sentence in sentences if len(re.findall(r"[A-Za-z]{2,}", sentence)) >= least]


def of_file(path: Path) -> list[tuple[int, str]]:
    """(line, sentence) of docstrings, of strings given to `setting`, and of comments on lines of their own."""
    found: list[tuple[int, str]] = []
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            found += [(node.body[0].lineno, sentence) for sentence in of_text(text, 5)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setting":
            strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found += [(node.lineno, sentence) for text in strings for sentence in of_text(text, 5)]
    block: list[str] = []
    last = 0
    with open(path, "rb") as file:
        comments = [t for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT]
    for token in [*comments, None]:
        if block and (token is None or token.start[0] != last + 1):
            found += [(last, sentence) for sentence in of_text("\n".join(block), 4)]
            block = []
        if token is not None:
            block.append(token.string.lstrip("# -").replace("fmt: skip", "").replace("type: ignore", ""))
            last = token.start[0]
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / "gptjax"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--all", action="store_true", help="all sentences instead of a draw")
    args = parser.parse_args()
    files = [f for path in args.paths for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    sentences = [(f, line, sentence) for f in files for line, sentence in of_file(f)]
    if not args.all:
        random.Random(args.seed).shuffle(sentences)
        print(f"{args.n} of {len(sentences)} sentences, seed {args.seed}\n")
        sentences = sentences[: args.n]
    for file, line, sentence in sentences:
        print(f"{file.resolve().relative_to(ROOT)}:{line}: {sentence}" if args.all else sentence)


if __name__ == "__main__":
    main()
