"""`gptjax import` and `gptjax export`: models from and for other tools."""

from __future__ import annotations

import json
from pathlib import Path

from gptjax.cli import options
from gptjax.config_io import did_you_mean
from gptjax.files import refuse_existing
from gptjax.types import UserError

FORMATS = ("hf", "gguf", "stablehlo")
TYPES = ("F32", "F16", "BF16", "Q8_0")
DTYPES = ("float32", "bfloat16", "float16")


def run_import(args: list[str]) -> int:
    """MODEL DIR [dtype=..]: a folder of ours, with the tokenizer that came along."""
    words, dtype = _take(args, "dtype", DTYPES, "float32")
    if len(words) != 2:
        raise UserError("expected: gptjax import MODEL DIR [dtype=float32|bfloat16|float16]")
    from gptjax import weights
    from gptjax.weights.door import LABELS, check_vocabulary, new_folder

    model = weights.open_model(words[0])
    tokenizer = model.tokenizer()
    check_vocabulary(tokenizer, model.cfg)
    new_folder(Path(words[1]))
    options.note(f"reading {model.where} ({model.kind})")
    files = {}
    if model.cfg.n_classes:
        files[LABELS] = json.dumps(weights.read_labels(words[0]), indent=1) + "\n"
    weights.save(words[1], model.params(dtype, None), model.cfg, tokenizer, files)
    print(f"{words[1]}  (use it: gptjax sample {words[1]} --prompt TEXT)")
    return 0


def run_export(args: list[str]) -> int:
    """hf|gguf MODEL TARGET [type=..]"""
    words, kind = _take(args, "type", TYPES, "F32")
    if len(words) != 3:
        raise UserError(
            "expected: gptjax export hf|stablehlo MODEL DIR, or gptjax export gguf MODEL FILE.gguf [type=Q8_0]"
        )
    form, source, target = words
    if form not in FORMATS:
        raise UserError(f"export {form}: expected {', '.join(FORMATS)}{did_you_mean(form, FORMATS)}")
    _refuse_taken(Path(target), form)
    from gptjax import weights

    model = weights.open_model(source)
    tokenizer = model.tokenizer()
    options.note(f"reading {model.where} ({model.kind})")
    params = model.params("float32", None)
    if form == "hf":
        labels = weights.read_labels(source) if model.cfg.n_classes else None
        path = weights.export_hf(target, params, model.cfg, tokenizer, labels)
        auto = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
        print(f"{path}  (use it: transformers.{auto}.from_pretrained({str(path)!r}))")
        if labels and labels["prompt"] != "{text}":
            options.note(f"texts stand in a prompt, which transformers does not put there: {labels['prompt']!r}")
    elif form == "stablehlo":
        path = weights.export_stablehlo(target, params, model.cfg, tokenizer)
        print(f"{path}  (use it: jax.export.deserialize of {path / 'forward.stablehlo'}, then .call(params, tokens))")
    else:
        path = weights.export_gguf(target, params, model.cfg, tokenizer, kind)
        print(f"{path}  (use it: llama-cli -m {path})")
    return 0


def _refuse_taken(path: Path, form: str) -> None:
    """Before the model is read. Raises UserError if something is there that would be overwritten."""
    if form == "gguf" or (path.exists() and not path.is_dir()):
        refuse_existing(path, "TARGET")
    elif path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is not empty: name a new folder")


def _take(args: list[str], name: str, known: tuple[str, ...], default: str) -> tuple[list[str], str]:
    """The words, and the value of the one setting `name=`."""
    words, value = [], default
    for arg in args:
        key, equals, text = arg.removeprefix("--").partition("=")
        if equals and key == name:
            value = next((k for k in known if k.lower() == text.lower()), "")
            if not value:
                raise UserError(f"{name}={text}: expected {', '.join(known)}")
        elif arg.startswith("--") or (equals and not Path(arg).exists()):
            raise UserError(f"unknown setting {arg}: only {name}= is known here")
        else:
            words.append(arg)
    return words, value
