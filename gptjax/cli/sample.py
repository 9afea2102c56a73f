"""`gptjax sample MODEL --prompt ...`: generates text from a prompt or from a file of prompts."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
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
    from gptjax.generation.choose import Pick
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
    ids = encode(tokenizer, prompts, cfg.sample.chat, source)
    draft = open_draft(cfg.sample, tokenizer)
    judge = open_reward_model(cfg.sample, tokenizer)
    lines = [f"prompts            {len(ids)}, {sum(map(len, ids))} tokens", "dry run: nothing was written"]
    if options.show_only(parsed, cfg, provenance, lambda cfg: lines, options.keys_of("sample.*")):
        return 0
    write(model.params("float32", None), model.cfg, tokenizer, cfg.sample, prompts, ids, draft, judge)
    return 0


def configure(source: str, leaves: list[Leaf]) -> tuple[Config, Provenance]:
    """Merges the settings of `gptjax sample`: the command line overrides the run's config.yaml, which overrides the
    defaults. On the command line, the prefix `sample.` may be omitted: `prompt=` means `sample.prompt=`."""
    file = Path(source) / "config.yaml"
    stored = from_yaml(read_text(file, "config"), str(file)) if file.exists() else []
    stored = [leaf for leaf in stored if leaf.key.startswith("sample.")]
    for leaf in leaves:
        key = f"sample.{leaf.key}"
        stored.append(leaf._replace(key=key) if key in schema() or "." not in leaf.key else leaf)
    return resolve(leaves=stored)


def read_prompts(cfg: Config) -> list[str]:
    """Returns the prompts in the file that the setting sample.prompts names, or the single prompt [sample.prompt] if
    sample.prompts is not set. A .jsonl file must have the field "prompt" in each record; any other file has one prompt
    per line."""
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
        raise UserError(f"{path} holds no prompts")
    return prompts


def encode(tokenizer: Tokenizer, prompts: list[str], chat: bool, source: str) -> list[list[int]]:
    """Returns the token ids of each prompt. If `chat` is True, each prompt is a user message, which is rendered with
    the chat template of the tokenizer.

    Args:
        source: name of the model, for error messages.

    Raises:
        UserError: a prompt cannot be encoded, or with `chat`, the model has no chat template.
    """
    from gptjax.generation import prompt_ids
    from gptjax.tokenizers.chat import encode_chat

    if not chat:
        return [prompt_ids(tokenizer, prompt) for prompt in prompts]
    _refuse_no_template(tokenizer, source)
    return [encode_chat(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]


def _refuse_no_template(tokenizer: Tokenizer, source: str) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"sample.chat=true: {source} has no chat template: it was not tuned for chat; leave sample.chat out, or "
            "fine-tune it with gptjax finetune, which stores a template with the model"
        )


def open_draft(settings: SampleConfig, tokenizer: Tokenizer) -> Model | None:
    """Opens the draft model for speculative decoding, without reading its tensors. Returns None if sample.draft is not
    set, or if sample.draft=ngram, which needs no draft model.

    Raises:
        UserError: the draft model does not exist, its tokenizer is not that of the main model, or speculative decoding
            does not support the sampling settings.
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
        refuse_classifier(draft.cfg, "the draft", "name the model it was fine-tuned from")
        if draft.tokenizer().fingerprint != tokenizer.fingerprint:
            problems.append(f"sample.draft={settings.draft}: expected the tokenizer of the model, got another one")
    if problems:
        raise UserError.all(problems)
    return draft


def open_reward_model(settings: SampleConfig, tokenizer: Tokenizer) -> Model | None:
    """Opens the reward model for sample.pick=reward, without reading its tensors. Returns None if sample.pick is not
    "reward".

    Raises:
        UserError: the reward model does not exist, is not a model with a head of one class, has another vocabulary
            than the model that writes, whose token ids it scores, or with sample.chat has no chat template.
    """
    if settings.pick != "reward" or settings.reward_model is None:
        return None
    from gptjax.generation.choose import refuse_no_reward_model
    from gptjax.tokenizers.base import SETTINGS
    from gptjax.weights import open_model

    place = f"sample.reward_model={settings.reward_model}"
    judge = open_model(settings.reward_model)
    refuse_no_reward_model(judge.cfg, place)
    # Only the vocabularies of the two tokenizers are compared, and not their settings, such as the chat template.
    own, other = (t.replace(**SETTINGS).fingerprint for t in (tokenizer, judge.tokenizer()))
    if own != other:
        raise UserError(
            f"{place}: expected the vocabulary of the model, got another one: train the reward model from the same base"
        )
    if settings.chat:
        _refuse_no_template(judge.tokenizer(), settings.reward_model)
    return judge


def write(
    params: Params,
    model: ModelConfig,
    tokenizer: Tokenizer,
    settings: SampleConfig,
    prompts: list[str],
    ids: list[list[int]],
    draft: Model | None = None,
    judge: Model | None = None,
) -> None:
    """Generates `settings.n` completions per prompt, and prints the completions or appends them to a JSONL file. If
    `settings.pick` is set, only one chosen completion per prompt is printed or appended. The number of generated
    tokens, the generation time and the scores of the chosen completions are printed to stderr.

    Args:
        ids: the token ids of each prompt.
        draft: the draft model for speculative decoding, or None if there is no draft model.
        judge: the reward model of sample.pick=reward, or None for any other pick.
    """
    import jax

    from gptjax.generation import complete, cut, for_decoding, from_config, speculate, stop_strings
    from gptjax.ops.quant import quantize
    from gptjax.tokenizers.chat import answer_ends
    from gptjax.weights import stop_ids

    params = for_decoding(quantize(params, settings.quantize), model)
    stop = answer_ends(tokenizer) if settings.chat else stop_ids(tokenizer)
    until = stop_strings(tokenizer.decode, settings.stop) if settings.stop else None
    draft_params = for_decoding(draft.params("float32", None), draft.cfg) if draft else None
    pick = _picker(tokenizer, settings, judge, prompts, ids)
    start, count, rounds, accepted = time.monotonic(), 0, 0, 0.0
    for first in range(0, len(ids), settings.batch_size):
        batch = ids[first : first + settings.batch_size]
        common: dict[str, Any] = dict(
            max_new_tokens=settings.max_new_tokens, sampler=from_config(settings), stop=stop,
            key=jax.random.fold_in(jax.random.key(settings.seed), first), vocab_size=tokenizer.vocab_size,
            cache_dtype=settings.cache_dtype,
        )  # fmt: skip
        if settings.draft:
            batch = [prompt for prompt in batch for _ in range(settings.n)]
            out = speculate(params, draft_params, batch, model, draft and draft.cfg, ahead=settings.ahead, **common)
            rounds, accepted = rounds + out.rounds, accepted + out.accepted * out.rounds
            completions = [_completion(new, until, settings.max_new_tokens) for new in out.tokens]
        else:
            logprobs = 0 if settings.out or settings.pick == "logprob" else None
            completions = complete(params, batch, model, n=settings.n, until=until, logprobs=logprobs, **common)
        count += sum(len(c.tokens) for c in completions)
        scores: list[float] = []
        if settings.pick:
            samples = [completions[i : i + settings.n] for i in range(0, len(completions), settings.n)]
            picks = [pick(first + i, of_prompt) for i, of_prompt in enumerate(samples)]
            scores = [chosen.score for chosen in picks]
            completions = [of_prompt[chosen.choice] for chosen, of_prompt in zip(picks, samples, strict=True)]
        for i, completion in enumerate(completions):
            row = first + i if settings.pick else first + i // settings.n
            new = tokenizer.decode(completion.tokens)
            text = cut(new, settings.stop)
            if settings.out:
                line: dict[str, Any] = dict(
                    prompt=prompts[row], text=text, finish=completion.finish, tokens=completion.tokens,
                    logprobs=[round(value, 4) for value in completion.logprobs],
                )  # fmt: skip
                if settings.pick:
                    line[settings.pick] = round(scores[i], 4)
                # Each completion is appended to the file immediately, so that the completion is not lost if a later
                # completion fails.
                with open(settings.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            else:
                if row or i:
                    print("-" * 40)
                # The prompt and the completion are decoded together, because a UTF-8 character may begin in the prompt
                # and end in the completion. Stop strings are searched only in the completion, not in the prompt.
                whole = new if settings.chat else tokenizer.decode([*ids[row], *completion.tokens])
                print(whole[: len(whole) - len(new) + len(text)], flush=True)
                if settings.pick:
                    print(f"{settings.pick} {scores[i]:.4f}, the largest of {settings.n} samples", file=sys.stderr)
    seconds = time.monotonic() - start
    acceptance = f"; {accepted / rounds:.0%} of the draft tokens accepted" if rounds else ""
    print(f"{count} tokens in {seconds:.1f} s, compilation included{acceptance}", file=sys.stderr)


def _picker(
    tokenizer: Tokenizer, settings: SampleConfig, judge: Model | None, prompts: list[str], ids: list[list[int]]
) -> Callable[[int, list[Completion]], Pick]:
    """Returns a function that takes the index of a prompt and the completions of this prompt, and chooses one
    completion by the method in `settings.pick`.

    A reward model scores a sequence that consists of the prompt, the completion and, if the completion has ended, the
    reward model's end-of-answer token. If `settings.chat` is True, the prompt is rendered with the chat template of the
    reward model. If a completion ended at a stop string, its text without the stop string is encoded again for the
    reward model.
    """
    from gptjax.generation import best_of_n, by_logprob, cut, majority, sequence_rewards
    from gptjax.tokenizers import stop_ids
    from gptjax.tokenizers.base import whole_tokens
    from gptjax.tokenizers.chat import end_of_answer

    def text_of(completion: Completion) -> str:
        return cut(tokenizer.decode(completion.tokens), settings.stop)

    if settings.pick == "logprob":
        return lambda prompt, completions: by_logprob(completions)
    if judge is None:
        return lambda prompt, completions: majority([text_of(completion) for completion in completions])
    params, words = judge.params("float32", None), judge.tokenizer()
    end = end_of_answer(words)
    end_ids = [whole_tokens(words)[end]] if end else stop_ids(words)[:1]
    if settings.chat:
        ids = encode(words, prompts, True, settings.reward_model or "")

    def answer_ids(completion: Completion) -> list[int]:
        new, text = tokenizer.decode(completion.tokens), text_of(completion)
        tokens = completion.tokens if new == text else words.encode(text, allowed_special="all")
        return [*tokens, *(end_ids if completion.finish == "stop" else [])]

    def by_reward(prompt: int, completions: list[Completion]) -> Pick:
        rewards = sequence_rewards(params, judge.cfg, [[*ids[prompt], *answer_ids(c)] for c in completions])
        return best_of_n(completions, rewards)

    return by_reward


def _completion(new: list[int], until: Until | None, max_new_tokens: int) -> Completion:
    """Truncates the output of `speculate` after the first stop string, because `speculate` stops only at stop tokens.

    Returns:
        The shortest prefix of the tokens `new` for which `until` is true, or all tokens if there is no such prefix, as
        a `Completion` without log-probabilities.
    """
    from gptjax.generation import Completion

    length = next((size for size in range(1, len(new) + 1) if until and until(new[:size])), None)
    return Completion(new[:length], [], [], "length" if length is None and len(new) == max_new_tokens else "stop")
