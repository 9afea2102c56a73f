"""`gptjax import` and `gptjax export`: convert models from and to the formats of other tools."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from gptjax.cli import options
from gptjax.config.leaves import from_yaml, read_text
from gptjax.config.uses import TUNINGS
from gptjax.errors import UserError, did_you_mean
from gptjax.files import refuse_existing

FORMATS = ("hf", "gguf", "peft", "stablehlo")
TYPES = ("F32", "F16", "BF16", "Q8_0")
DTYPES = ("float32", "bfloat16", "float16")


def run_import(args: list[str]) -> int:
    """`gptjax import MODEL DIR [dtype=..]`: converts a model and its tokenizer to a gptjax model folder."""
    words, dtype = _take(args, "dtype", DTYPES, "float32")
    if len(words) != 2:
        raise UserError("expected: gptjax import MODEL DIR [dtype=float32|bfloat16|float16]")
    from gptjax import weights
    from gptjax.weights.export import new_folder
    from gptjax.weights.load import LABELS

    model = weights.open_model(words[0])
    tokenizer = model.tokenizer()
    new_folder(Path(words[1]))
    options.note(f"reading {model.location} ({model.kind})")
    files = {}
    if model.cfg.n_classes:
        files[LABELS] = json.dumps(weights.read_labels(words[0]), indent=1) + "\n"
    weights.save(words[1], model.params(dtype, None), model.cfg, tokenizer, files)
    use = {
        0: f"sample {words[1]} --prompt TEXT",
        1: f"sample MODEL chat=true n=8 pick=reward reward_model={words[1]} --prompt TEXT",
    }.get(model.cfg.n_classes, f'classify {words[1]} "TEXT"')
    print(f"{words[1]}  (use it: gptjax {use})")
    return 0


def run_export(args: list[str]) -> int:
    """`gptjax export hf|gguf|peft|stablehlo MODEL TARGET [type=..]`: writes a model in the format of another tool."""
    words, kind = _take(args, "type", TYPES, "F32")
    if len(words) != 3:
        raise UserError(
            "expected: gptjax export hf|stablehlo MODEL DIR, gptjax export gguf MODEL FILE.gguf [type=Q8_0], or "
            "gptjax export peft RUN DIR"
        )
    form, source, target = words
    if form not in FORMATS:
        raise UserError(f"export {form}: expected {', '.join(FORMATS)}{did_you_mean(form, FORMATS)}")
    # The target path of `gptjax export` is checked before the model is read, because reading a model may take a long
    # time.
    path = Path(target)
    if form == "gguf" or (path.exists() and not path.is_dir()):
        refuse_existing(path, "TARGET")
    elif path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is not empty: name a new folder")
    if form == "peft":
        return _export_adapter(source, path)
    from gptjax import weights
    from gptjax.model.gpt import refuse_classifier

    model = weights.open_model(source)
    if form != "hf":
        refuse_classifier(model.cfg, source, f"use gptjax classify {source}, or gptjax export hf {source} DIR")
    tokenizer = model.tokenizer()
    options.note(f"reading {model.location} ({model.kind})")
    params = model.params("float32", None)
    if form == "hf":
        labels = weights.read_labels(source) if model.cfg.n_classes else None
        path = weights.export_hf(target, params, model.cfg, tokenizer, labels)
        auto = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
        print(f"{path}  (use it: transformers.{auto}.from_pretrained({str(path)!r}))")
        if labels and labels["prompt"] != "{text}":
            options.note(f"wrap the texts in the prompt template yourself, transformers does not: {labels['prompt']!r}")
    elif form == "stablehlo":
        path = weights.export_stablehlo(target, params, model.cfg, tokenizer)
        print(f"{path}  (use it: jax.export.deserialize of {path / 'forward.stablehlo'}, then .call(params, tokens))")
    else:
        path = weights.export_gguf(target, params, model.cfg, tokenizer, kind)
        print(f"{path}  (use it: llama-cli -m {path})")
    return 0


def _export_adapter(source: str, target: Path) -> int:
    """Exports the LoRA adapter of a fine-tuning run, which the run directory contains in addition to the merged
    model."""
    from gptjax import weights
    from gptjax.weights import native, peft
    from gptjax.weights.export import new_folder

    run = native.find(source)
    folder = run / "adapter"
    if not (folder / peft.CONFIG).is_file():
        raise UserError(f"{source} has no separate adapter: {_why_none(Path(source))}")
    native.verify(run)
    body = json.loads(read_text(folder / peft.CONFIG, "adapter config"))
    params, cfg = weights.load(run)
    # The LoRA adapter is loaded only to check its files: `load_peft` raises UserError if the adapter is damaged.
    weights.load_peft(folder, dataclasses.replace(cfg, n_classes=0, cls_bias=True))
    new_folder(target)
    try:
        for name in (peft.CONFIG, peft.WEIGHTS):
            shutil.copyfile(folder / name, target / name)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    base, auto = body.get("base_model_name_or_path"), "CausalLM"
    if "cls_head" in params:
        auto = "SequenceClassification"
        if body.get("modules_to_save") is None:
            options.note("the classification head is not exported: peft cannot hold its bias (use classify.bias=false)")
    if base and not (Path(base) / "config.json").is_file():
        options.note(f"to export its base model for transformers: gptjax export hf {base} BASE")
        base = "BASE"
    print(
        f"{target}  (use it: peft.PeftModel.from_pretrained(transformers.AutoModelFor{auto}.from_pretrained({base!r}), "
        f"{str(target)!r}))"
    )
    return 0


def _why_none(run: Path) -> str:
    file = run / "config.yaml"
    stored = from_yaml(read_text(file, "config"), str(file)) if file.is_file() else []
    settings = {leaf.key: leaf.value for leaf in stored}
    trained = settings.get("finetune.trainable", "lora")
    if not file.is_file() or settings.get("task") not in TUNINGS:
        return "only fine-tuning makes one; to export the whole model: gptjax export hf"
    if trained != "lora":
        return f"it was trained with finetune.trainable={trained}; to export the whole model: gptjax export hf"
    return (
        "peft's format cannot hold it (DoRA initialised with PiSSA or OLoRA, MiSS on a GPT-2 model, an adapter on the "
        "embedding, or a model that is in no model family of Hugging Face); to export the whole model: gptjax export hf"
    )


def _take(args: list[str], name: str, known: tuple[str, ...], default: str) -> tuple[list[str], str]:
    """Splits the command-line arguments into the positional arguments and the value of `name=`, the only setting of the
    command.

    Args:
        known: the allowed values of the setting, compared case-insensitively.
        default: the value if the setting is not given.
    """
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
