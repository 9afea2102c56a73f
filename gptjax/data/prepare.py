"""Prepares the data of a config: reads and splits text, trains or loads the tokenizer, encodes and caches tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from gptjax import assets, tokenizers
from gptjax.config import Config
from gptjax.data import store as token_store
from gptjax.data.sources import Documents, cache_root, documents, missing
from gptjax.data.split import Subset, split_documents
from gptjax.data.store import TokenStore
from gptjax.errors import UserError
from gptjax.files import json_sha256
from gptjax.tokenizers import Tokenizer


class Prepared(NamedTuple):
    """The tokenizer, the tokens and the manifest of the prepared data. `manifest["key"]` is a hash of the text of all
    sources, the split and the tokenizer."""

    tokenizer: Tokenizer
    train: TokenStore
    val: TokenStore
    manifest: dict


def prepare(
    cfg: Config,
    tokenizer: Tokenizer | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Encode the text of `cfg.data` with `tokenizer`, or load the tokens from the cache.

    The key of the cached tokens covers the contents of all sources, the split and the tokenizer. The seed is not part
    of the key of the cached tokens, because the tokens do not depend on the seed. The tokenizer `chars` is fitted on
    all text, because the characters of the validation text need token ids too. Trained tokenizers other than `chars`
    are fitted on the training text only.

    Args:
        tokenizer: the tokenizer to use. None: the tokenizer that `cfg.tokenizer` describes.
        log: function that is called with a line of text before each slow step.
        progress: function that is called after each document with two arguments: the number of bytes encoded so far,
            and the total number of bytes.

    Raises:
        UserError: a text cannot be read, there is too little text, or model.vocab_size is not 0 and the tokenizer has
            more token ids than that.
    """
    refuse_missing(cfg)
    train_documents = documents(cfg.data)
    val_documents = documents(cfg.data, cfg.data.val_source) if cfg.data.val_source else None
    loaded = tokenizer
    if loaded is None and cfg.tokenizer.name not in tokenizers.TRAINED:
        loaded = tokenizers.build(cfg.tokenizer, lambda: iter(()))
    key = _key(cfg, train_documents, val_documents, loaded)

    def make(folder: Path) -> dict:
        log(f"reading {', '.join(source.name for source in train_documents.sources)}")
        train, val, how = split_documents(train_documents, cfg.data, val_documents)
        if empty := [split["source"] for split in how if not split["bytes"]]:
            raise UserError(
                f"data.source={','.join(empty)}: no text in it; one window of model.context_length={cfg.window} "
                f"needs at least {cfg.window + 1} tokens"
            )
        fit_on = (train, val) if cfg.tokenizer.name == "chars" else (train,)
        tokenizer = loaded or tokenizers.build(
            cfg.tokenizer, lambda: (text for subset in fit_on for _, text, _ in subset)
        )
        tokenizer.save(folder / "tokenizer.json")
        log(f"encoding with {tokenizer.name}, {tokenizer.vocab_size} ids")
        return {
            "key": key,
            "tokenizer": {
                "name": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
            },
            "sources": _describe_sources(train_documents),
            "val_sources": _describe_sources(val_documents) if val_documents else [],
            "split": how,
            **_encode(folder, train, val, tokenizer, sum(split["bytes"] for split in how), progress),
        }

    folder, manifest = token_store.build(cache_root(cfg.data) / "tokens", key, make, log)
    tokenizer = loaded or tokenizers.load(str(folder / "tokenizer.json"))
    ready = Prepared(
        tokenizer,
        token_store.open_split(folder, "train", manifest, tokenizer),
        token_store.open_split(folder, "val", manifest, tokenizer),
        dict(manifest, folder=str(folder)),
    )
    check(ready, cfg)
    return ready


def refuse_missing(cfg: Config) -> None:
    """Check that the data sources and the tokenizer exist, before any text is read or downloaded.

    If pretrain.base is set, the run uses the tokenizer of the base model, and the tokenizer settings are not checked.

    Raises:
        UserError: sources or the tokenizer do not exist; the message names everything that is missing.
    """
    problems = [problem for name in (*cfg.data.source, *cfg.data.val_source) if (problem := missing(name))]
    name = cfg.tokenizer.name
    if cfg.pretrain.base is None and name not in (*tokenizers.TRAINED, *tokenizers.READY, *assets.ASSETS):
        try:
            tokenizers.load(name)
        except UserError as error:
            problems.append(f"tokenizer.name={name}: {error}")
    if problems:
        raise UserError.all(list(dict.fromkeys(problems)))


def check(ready: Prepared, cfg: Config) -> None:
    """Checks that there is enough text, and that the embedding table has a row for every token id.

    The training text must have at least one token more than a window, and the validation text must have at least 2
    tokens.

    Raises:
        UserError: a text is too short, or the embedding table is too small; the message lists all problems.
    """
    needed, problems = cfg.window + 1, []
    if len(ready.train) < needed:
        problems.append(
            f"data.source={','.join(cfg.data.source)}: {len(ready.train)} training tokens found, at least {needed} "
            f"needed for one window of model.context_length={cfg.window}: give more text or lower it"
        )
    if len(ready.val) < 2:
        problems.append(
            f"{len(ready.val)} validation tokens found, at least 2 needed: give more text, raise data.val_fraction "
            f"({cfg.data.val_fraction}) or name data.val_source"
        )
    if 0 < cfg.model.vocab_size < ready.tokenizer.vocab_size:
        problems.append(
            f"tokenizer {ready.tokenizer.name} has {ready.tokenizer.vocab_size} ids and model.vocab_size="
            f"{cfg.model.vocab_size} rows: set model.vocab_size to 0 (the tokenizer's own) or at least "
            f"{ready.tokenizer.vocab_size}"
        )
    if problems:
        raise UserError.all(problems)


def describe(ready: Prepared, *, context_length: int = 64) -> Iterator[str]:
    """Yields the lines that `gptjax data inspect` prints about the prepared data."""
    manifest, tokenizer = ready.manifest, ready.tokenizer
    yield f"tokenizer   {tokenizer.name}, {tokenizer.vocab_size} ids, {tokenizer.fingerprint[:12]}"
    for source in manifest["sources"]:
        yield f"source      {source['name']}, {source['files']} files, sha256 {source['fingerprint'][:12]}"
    for source in manifest["val_sources"]:
        yield f"val source  {source['name']}, {source['files']} files, sha256 {source['fingerprint'][:12]}"
    for how in manifest["split"]:
        if how["split"] == "none":
            continue
        if how["split"] == "tail":
            yield f"split       {how['source']}: the end of each file is held out"
        else:
            held_out = how["held_out"]
            shown = ", ".join(held_out[:8]) + (f" and {len(held_out) - 8} more" if len(held_out) > 8 else "")
            yield f"split       {how['source']}: {how['split']}s held out: {shown}"
    total = manifest["train"]["bytes"] + manifest["val"]["bytes"]
    for name in ("train", "val"):
        split = manifest[name]
        yield (
            f"{name:<11} {split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes "
            f"({split['bytes'] / max(total, 1):.1%}), {split['bytes'] / max(split['tokens'], 1):.2f} bytes per token"
        )
    yield f"stored      {manifest['train']['dtype']} in {manifest['folder']}"
    window = [int(i) for i in ready.train.tokens[:context_length]]
    yield f"begins      {tokenizer.decode(window)!r}"


def _encode(
    folder: Path, train: Subset, val: Subset, tokenizer: Tokenizer, total: int, progress: Callable[[int, int], None]
) -> dict:
    done = 0

    def advance(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        progress(done, total)

    def write(name: str, subset: Subset) -> dict:
        texts = [
            ((document.text, begins, ends) for document, begins, ends in subset.source(k))
            for k in range(len(subset.documents.sources))
        ]
        return token_store.write(folder, name, texts, tokenizer, advance)

    return {"train": write("train", train), "val": write("val", val)}


def _describe_sources(documents: Documents) -> list[dict]:
    return [{"name": s.name, "files": len(s.files), "fingerprint": s.fingerprint} for s in documents.sources]


def _key(cfg: Config, train: Documents, val: Documents | None, loaded: Tokenizer | None) -> str:
    """Returns a hash of everything that the token ids depend on.

    If the tokenizer is not trained yet, the hash covers the settings of the tokenizer instead of its vocabulary. The
    settings of a tokenizer that is not trained yet suffice, because the hash covers the fingerprint of the text on
    which the tokenizer will be trained.
    """
    data = cfg.data
    if loaded:
        tokenizer: str | list[str | int] = loaded.fingerprint
    elif cfg.tokenizer.name in ("chars", "words"):
        tokenizer = cfg.tokenizer.name
    else:
        tokenizer = [cfg.tokenizer.name, cfg.tokenizer.vocab_size, metadata.version("tokenizers")]
    contents = {
        "version": token_store.VERSION,
        "sources": [source.fingerprint for source in train.sources],
        "val_sources": [source.fingerprint for source in val.sources] if val else None,
        "text": [data.text_field, data.max_documents],
        "split": None if val else [data.split, data.val_fraction],
        "tokenizer": tokenizer,
    }
    return json_sha256(contents)[:32]
