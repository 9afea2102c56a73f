"""`gptjax sample RUN --prompt ...`: continue a text with a trained model."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from gptjax.cli import options
from gptjax.config import Config, Provenance, resolve, to_yaml
from gptjax.config_io import Leaf, from_yaml, read_text
from gptjax.types import UserError

USAGE = 'expected: gptjax sample RUN --prompt "TEXT" [max_new_tokens=N ...]'


def run(args: list[str]) -> int:
    parsed = options.parse(args, words=1)
    if not parsed.words:
        raise UserError(f"which model? {USAGE}")
    folder = Path(parsed.words[0])
    cfg, provenance = configure(folder, parsed.leaves)
    if parsed.print_config or parsed.dry_run:
        print(_sample_part(to_yaml(cfg, provenance)), end="")
    if parsed.print_config and not parsed.dry_run:
        return 0
    from gptjax import tokenizers
    from gptjax.weights import load, native

    home = native.find(folder)
    tokenizer = tokenizers.load(home)
    if parsed.dry_run:
        ids = tokenizer.encode(cfg.sample.prompt, allowed_special="all")
        print(f"\nprompt             {len(ids)} tokens\ndry run: nothing was written")
        return 0
    params, model = load(home)
    write(params, model, tokenizer, cfg)
    return 0


def more_help() -> str:
    return (
        "RUN is a run directory or a folder with model.safetensors. Settings, with their defaults; those that the\n"
        "run's config.yaml names start from there:\n\n" + options.settings_help(["sample"], strip=True)
    )


def configure(folder: Path, leaves: list[Leaf]) -> tuple[Config, Provenance]:
    """defaults < the run's config.yaml < the command line, where `prompt=` means `sample.prompt=`."""
    if not folder.exists():
        raise UserError(f"{folder}: no such run; `gptjax pretrain` makes one under runs/")
    file = folder / "config.yaml"
    stored = from_yaml(read_text(file, "config"), str(file)) if file.exists() else []
    stored = [leaf for leaf in stored if leaf.key.startswith("sample.")]
    return resolve(leaves=[*stored, *(leaf._replace(key=_under_sample(leaf.key)) for leaf in leaves)])


def _under_sample(key: str) -> str:
    from gptjax.config import schema

    return f"sample.{key}" if f"sample.{key}" in schema() or "." not in key else key


def _sample_part(text: str) -> str:
    return text[text.index("sample:") :]


def write(params, model, tokenizer, cfg: Config) -> None:
    """Print `cfg.sample.n` continuations of the prompt; the speed goes to stderr."""
    import jax

    from gptjax.generation import from_config, generate

    settings = cfg.sample
    ids = tokenizer.encode(settings.prompt, allowed_special="all")
    if not ids and tokenizer.eot_id is not None:
        ids = [tokenizer.eot_id]
    if not ids:
        raise UserError(f"the prompt is empty and {tokenizer.name} has no start token: give at least one character")
    start = time.monotonic()
    new = generate(
        params,
        [ids] * settings.n,
        model,
        max_new_tokens=settings.max_new_tokens,
        key=jax.random.key(settings.seed),
        sampler=from_config(settings),
        stop=() if tokenizer.eot_id is None else (tokenizer.eot_id,),
    )
    seconds = time.monotonic() - start
    for number, tokens in enumerate(new):
        if number:
            print("-" * 40)
        print(tokenizer.decode([*ids, *tokens]))
    count = sum(map(len, new))
    print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
