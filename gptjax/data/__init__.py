"""The data pipeline reads text, encodes the text as token ids, and arranges the token ids in batches.

The package gptjax.data uses numpy only and does not import jax.

    prepared = data.prepare(cfg)                      the tokenizer, token stores of train and val, and a manifest
    loader   = data.Loader(prepared.train, cfg.data, batch_size=12, context_length=64, seed=0, vocab_size=81)
    batch    = loader.batch(step)                     a pure function of (seed, step)
    for batch in data.eval_batches(prepared.val, context_length=64, batch_size=12): ...
"""

from gptjax.data.loader import Loader, eval_batches, permute
from gptjax.data.prepare import Prepared, describe, prepare, refuse_missing
from gptjax.data.sources import Document, Documents, documents
from gptjax.data.split import split_documents as split
from gptjax.data.store import TokenStore
from gptjax.data.windows import windows

__all__ = [
    "Document",
    "Documents",
    "Loader",
    "Prepared",
    "TokenStore",
    "describe",
    "documents",
    "eval_batches",
    "permute",
    "prepare",
    "refuse_missing",
    "split",
    "windows",
]
