"""`gptjax sample MODEL --prompt ...`: continue a text, or a file of them, with a model."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.cli import options
from gptjax.config import Config, ModelConfig, Provenance, SampleConfig, resolve, schema
from gptjax.config.leaves import Leaf, from_yaml, read_text
from gptjax.errors import UserError, complaints
from gptjax.files import new_file, one_line_end, refuse_existing
from gptjax.formats import tables

if TYPE_CHECKING:
    from gptjax.generation import Completion
    from gptjax.generation.text import Until
    from gptjax.tokenizers import Tokenizer
    from gptjax.types import Params
    from gptjax.weights import Model

USAGE = 'expected: gptjax sample MODEL --prompt "TEXT" [max_new_tokens=N ...]'


def run(args: list[str]) -> int:
    parsed = options.parse(args, words=2, example='--prompt "TEXT" or temperature=0')
    if not parsed.words:
        raise UserError(f"which model? {USAGE}")
    source, *stray = parsed.words
    if stray:
        raise UserError(f"{stray[0]!r}: a prompt is given as --prompt {shlex.quote(stray[0])}")
    options.refuse_others(parsed.leaves, options.keys_of("sample.*"), "sample", "sample.")
    cfg, provenance = configure(source, parsed.leaves)
    if parsed.print_config and not parsed.dry_run:
        options.show_only(parsed, cfg, provenance, lambda cfg: [], options.keys_of("sample.*"))
        return 0
    from gptjax.generation import prompt_ids
    from gptjax.model.gpt import refuse_classifier
    from gptjax.training.process import use_compile_cache
    from gptjax.weights import open_model

    use_compile_cache()
    if cfg.sample.out and not parsed.dry_run:
        new_file(cfg.sample.out, "sample.out")
    elif cfg.sample.out:
        refuse_existing(Path(cfg.sample.out), "sample.out")
    prompts = read_prompts(cfg)
    model = open_model(source)
    refuse_classifier(model.cfg, source)
    tokenizer = model.tokenizer()
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    draft = open_draft(cfg.sample, tokenizer)
    lines = [f"prompts            {len(ids)}, {sum(map(len, ids))} tokens", "dry run: nothing was written"]
    if options.show_only(parsed, cfg, provenance, lambda cfg: lines, options.keys_of("sample.*")):
        return 0
    write(model.params("float32", None), model.cfg, tokenizer, cfg.sample, prompts, ids, draft)
    return 0


def more_help(args: list[str]) -> str:
    return (
        "MODEL is a run directory, a folder that `gptjax import` made, a Hugging Face folder, a .gguf file, or a name\n"
        "such as smollm2-135m-instruct. Settings, with their defaults; those that a run's config.yaml names start\n"
        "from there:\n\n" + options.settings_help(Config(), ("sample.*",), strip="sample")
    )


def configure(source: str, leaves: list[Leaf]) -> tuple[Config, Provenance]:
    """defaults < the run's config.yaml < the command line, where `prompt=` means `sample.prompt=`."""
    file = Path(source) / "config.yaml"
    stored = from_yaml(read_text(file, "config"), str(file)) if file.exists() else []
    stored = [leaf for leaf in stored if leaf.key.startswith("sample.")]
    for leaf in leaves:
        key = f"sample.{leaf.key}"
        stored.append(leaf._replace(key=key) if key in schema() or "." not in leaf.key else leaf)
    return resolve(leaves=stored)


def read_prompts(cfg: Config) -> list[str]:
    """The one prompt, or those of a file: a .jsonl with "prompt" in each line, or a text with one a line."""
    if not cfg.sample.prompts:
        return [cfg.sample.prompt]
    path = Path(cfg.sample.prompts)
    lines = one_line_end(read_text(path, "prompts")).split("\n")
    if path.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    prompts, problems = [], []
    for number, row in tables.jsonl(lines):
        if isinstance(row, ValueError):
            problems.append(f"{path}:{number}: not JSON ({row})")
        elif isinstance(row, dict) and isinstance(row.get("prompt"), str):
            prompts.append(row["prompt"])
        else:
            problems.append(f'{path}:{number}: expected an object with a text "prompt"')
    if problems:
        raise UserError.all(problems[:20])
    if not prompts:
        raise UserError(f"{path}: no prompts in it")
    return prompts


def open_draft(settings: SampleConfig, tokenizer: Tokenizer) -> Model | None:
    """The model that proposes tokens, before any tensor is read; None without one, or where the text so far does.

    Raises:
        UserError: no such model, one of another vocabulary, or settings that speculation does not have.
    """
    if not settings.draft:
        return None
    from gptjax.generation import from_config
    from gptjax.generation.sampling import probabilities
    from gptjax.model.gpt import refuse_classifier
    from gptjax.weights import open_model

    problems = complaints(lambda: probabilities(from_config(settings)))
    draft = open_model(settings.draft) if settings.draft != "ngram" else None
    if draft:
        refuse_classifier(draft.cfg, "the draft", "name the model that it was made from")
        if draft.tokenizer().fingerprint != tokenizer.fingerprint:
            problems.append(f"sample.draft={settings.draft}: expected the model's tokenizer, got another")
    if problems:
        raise UserError.all(problems)
    return draft


def write(
    params: Params,
    model: ModelConfig,
    tokenizer: Tokenizer,
    settings: SampleConfig,
    prompts: list[str],
    ids: list[list[int]],
    draft: Model | None = None,
) -> None:
    """`settings.n` continuations of each prompt, printed or as JSONL; the speed goes to stderr."""
    import jax

    from gptjax.generation import complete, cut, for_decoding, from_config, speculate, stop_strings
    from gptjax.ops.quant import quantize
    from gptjax.weights import stop_ids

    params = for_decoding(quantize(params, settings.quantize), model)
    until = stop_strings(tokenizer.decode, settings.stop) if settings.stop else None
    draft_params = for_decoding(draft.params("float32", None), draft.cfg) if draft else None
    start, count, rounds, accepted = time.monotonic(), 0, 0, 0.0
    for first in range(0, len(ids), settings.batch_size):
        batch = ids[first : first + settings.batch_size]
        common: dict[str, Any] = dict(
            max_new_tokens=settings.max_new_tokens, sampler=from_config(settings), stop=stop_ids(tokenizer),
            key=jax.random.fold_in(jax.random.key(settings.seed), first), vocab_size=tokenizer.vocab_size,
            cache_dtype=settings.cache_dtype,
        )  # fmt: skip
        if settings.draft:
            batch = [prompt for prompt in batch for _ in range(settings.n)]
            out = speculate(params, draft_params, batch, model, draft and draft.cfg, ahead=settings.ahead, **common)
            rounds, accepted = rounds + out.rounds, accepted + out.accepted * out.rounds
            done = [_completion(new, until, settings.max_new_tokens) for new in out.tokens]
        else:
            logprobs = 0 if settings.out else None
            done = complete(params, batch, model, n=settings.n, until=until, logprobs=logprobs, **common)
        count += sum(len(c.tokens) for c in done)
        for at, completion in enumerate(done):
            row, new = first + at // settings.n, tokenizer.decode(completion.tokens)
            text = cut(new, settings.stop)
            if settings.out:
                line = dict(
                    prompt=prompts[row], text=text, finish=completion.finish, tokens=completion.tokens,
                    logprobs=[round(value, 4) for value in completion.logprobs],
                )  # fmt: skip
                with open(settings.out, "a", encoding="utf-8") as file:  # what is done stays if a later row fails
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            else:
                if row or at:
                    print("-" * 40)
                # prompt and continuation may share a character; a stop string counts in the continuation only
                whole = tokenizer.decode([*ids[row], *completion.tokens])
                print(whole[: len(whole) - len(new) + len(text)], flush=True)
    seconds = time.monotonic() - start
    stood = f"; {accepted / rounds:.0%} of the proposed tokens stood" if rounds else ""
    print(f"{count} tokens in {seconds:.1f} s, compilation included{stood}", file=sys.stderr)


def _completion(new: list[int], until: Until | None, room: int) -> Completion:
    """Of tokens that were not watched as they came: up to the first ones of which `until` is true."""
    from gptjax.generation import Completion

    enough = next((size for size in range(1, len(new) + 1) if until and until(new[:size])), None)
    return Completion(new[:enough], [], [], "length" if enough is None and len(new) == room else "stop")
