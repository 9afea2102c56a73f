"""`gptjax tokenizer train | encode | inspect`: trains, applies and describes tokenizers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gptjax.cli import options
from gptjax.cli.manual import PAGES
from gptjax.config import resolve
from gptjax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from gptjax.tokenizers import Tokenizer

READS = PAGES["tokenizer train"].settings
USAGE = {
    "train": "gptjax tokenizer train KIND data.source=my.txt [tokenizer.vocab_size=N] [out=tokenizer.json]",
    "encode": 'gptjax tokenizer encode NAME "TEXT"   (without TEXT: from standard input)',
    "inspect": 'gptjax tokenizer inspect NAME ["TEXT"]',
}


def run(args: list[str]) -> int:
    action, *rest = args or [""]
    verbs = {"train": _train, "encode": _encode, "inspect": _inspect}
    if action not in verbs:
        raise UserError(f"tokenizer {action}: expected {', '.join(verbs)}{did_you_mean(action, verbs)}")
    verbs[action](rest)
    return 0


def _train(args: list[str]) -> None:
    parsed = options.parse(args, words=1)
    out = next((leaf.value for leaf in reversed(parsed.leaves) if leaf.key == "out"), "tokenizer.json")
    short = {"vocab_size": "tokenizer.vocab_size", "source": "data.source"}
    leaves = [leaf._replace(key=short.get(leaf.key, leaf.key)) for leaf in parsed.leaves if leaf.key != "out"]
    kind = [f"tokenizer.name={parsed.words[0]}"] if parsed.words else []
    if not kind and all(leaf.key != "tokenizer.name" for leaf in leaves):
        raise UserError(f"which kind? {USAGE['train']}")
    keys = options.keys_of(*READS)
    options.refuse_others(leaves, keys, "tokenizer train")
    cfg, provenance = resolve(None, *kind, leaves=leaves)
    path = Path(out) if Path(out).suffix == ".json" else Path(out) / "tokenizer.json"
    if path.exists():
        raise UserError(f"{path} exists already: choose another name with out=FILE.json")
    from gptjax import data, tokenizers

    if cfg.tokenizer.name not in tokenizers.TRAINED:
        known = ", ".join(tokenizers.TRAINED)
        hint = did_you_mean(cfg.tokenizer.name, tokenizers.TRAINED)
        raise UserError(f"cannot train a {cfg.tokenizer.name!r} tokenizer: expected {known}{hint}")
    if options.show_only(parsed, cfg, provenance, lambda _: [f"dry run: {path} is not written"], keys):
        return
    documents = data.documents(cfg.data)
    tokenizer = tokenizers.build(cfg.tokenizer, lambda: (document.text for document in documents))
    print(f"{tokenizer.save(path)}  {tokenizer.name}, vocabulary of {tokenizer.vocab_size:,}")


def _encode(args: list[str]) -> None:
    tokenizer, text = _load(args, "encode")
    text = sys.stdin.read() if text is None else text
    print(*tokenizer.encode(text, allowed_special="all"))


def _inspect(args: list[str]) -> None:
    tokenizer, text = _load(args, "inspect")
    print(f"name               {tokenizer.name}")
    print(f"vocabulary size    {tokenizer.vocab_size:,}")
    print(f"special tokens     {', '.join(f'{token} {i}' for token, i in tokenizer.special_tokens.items()) or 'none'}")
    print(f"fingerprint        {tokenizer.fingerprint}")
    if text is not None:
        ids = tokenizer.encode(text, allowed_special="all")
        size = len(text.encode("utf-8", "surrogatepass"))
        print(f"text               {len(ids)} tokens, {size / max(len(ids), 1):.2f} bytes per token")
        for i in ids:
            print(f"  {i:>7}  {tokenizer.decode([i])!r}")


def _load(args: list[str], action: str) -> tuple[Tokenizer, str | None]:
    """Loads the tokenizer that the first command-line argument names. Returns a pair (tokenizer, text), where `text` is
    the second command-line argument, or None if there is only one argument. The second command-line argument may
    contain `=`, because `gptjax tokenizer encode` and `gptjax tokenizer inspect` take no settings."""
    if not 1 <= len(args) <= 2:
        raise UserError(f"expected: {USAGE[action]}")
    from gptjax import tokenizers

    return tokenizers.load(args[0]), args[1] if len(args) == 2 else None
