"""`gptjax help`, `gptjax --help` and `gptjax COMMAND --help`: print the help pages in the modules `manual` and
`topics`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from gptjax.cli import ALL_VERBS, GROUPS
from gptjax.cli.topics import TOPICS
from gptjax.errors import UserError, did_you_mean


def run(args: list[str]) -> int:
    if not args:
        print(overview())
        return 0
    name = args[0]
    if name in TOPICS and (len(args) == 1 or name not in ALL_VERBS):
        if args[1:]:
            raise UserError(f"help {name}: expected no further word, got {args[1]}")
        print(topic(name), end="")
    elif name in ALL_VERBS:
        if len(args) > 1 and args[1] not in ALL_VERBS[name].actions:
            actions = ALL_VERBS[name].actions
            expected = f"expected one of {', '.join(actions)}" if actions else f"gptjax {name} has no actions"
            raise UserError(f"help {name} {args[1]}: {expected}{did_you_mean(args[1], actions)}")
        print(verb_help(name, args[1:]))
    else:
        raise UserError(
            f"no topic or command {name!r}{did_you_mean(name, [*TOPICS, *ALL_VERBS])}\n"
            f"  topics: {', '.join(TOPICS)}; commands: {', '.join(ALL_VERBS)}"
        )
    return 0


def overview() -> str:
    """Returns the text of `gptjax --help`, which lists the commands by group, and the help topics."""
    lines = [
        "gptjax trains, fine-tunes and runs GPT-style language models in JAX.",
        "",
        "Usage: gptjax COMMAND [arguments] [section.name=value ...]",
    ]
    for group in GROUPS:
        verbs = [(name, verb.summary) for name, verb in ALL_VERBS.items() if verb.group == group]
        lines += ["", f"{group}:", *(f"  {name:<11} {summary}" for name, summary in verbs)]
    lines += ["", "Topics (gptjax help TOPIC):"]
    lines += [f"  {name:<11} {title}." for name, (title, _) in TOPICS.items()]
    lines += [
        "",
        "gptjax COMMAND --help explains a command and its settings, with examples. --dry-run shows what it would do.",
        "To begin: gptjax pretrain. It takes a few minutes; gptjax pretrain tiny-gpt2, a test, takes seconds.",
    ]
    return "\n".join(lines)


def topic(name: str) -> str:
    title, text = TOPICS[name]
    return f"{title}\n\n{text}"


def verb_help(name: str, args: Sequence[str] = ()) -> str:
    """Returns the text of `gptjax NAME ARGS --help`. The help text shows each setting of the command with the value
    that results from the preset and the settings in ARGS."""
    from gptjax.cli.manual import PAGES

    args = list(args)
    title = name
    if args and args[0] in ALL_VERBS[name].actions and f"{name} {args[0]}" in PAGES:
        title = f"{name} {args.pop(0)}"
    page = PAGES[title]
    width = columns()
    lines = [*_wrapped(page.about, width), "", *_usage(page.usage, width)]
    if page.needs:
        lines += ["", "To try the examples, first make what they use:", *(f"  {command}" for command in page.needs)]
    lines += ["", "Examples:"]
    for command, what in page.examples:
        lines += [f"  {command}", *_wrapped(what, width, "      ")]
    if page.options:
        lines += ["", "Options:"]
        for option in page.options:
            head = f"  {option.name}{'' if option.name.endswith('=') or not option.value else ' '}{option.value}"
            choices = f" One of {', '.join(option.choices)}." if option.choices else ""
            lines += [head, *_wrapped(f"{option.text}{choices}", width, "      ")]
    for note in page.notes:
        lines.append("")
        for line in note.splitlines():
            lines += [line] if line.startswith("  ") else _wrapped(line, width)
    if page.settings or page.reads not in ("", "*"):
        from gptjax.cli import options

        lines += ["", options.values_help(page, args, width)]
    return "\n".join(lines)


def _usage(usage: str, width: int) -> list[str]:
    """Returns the usage text of a command as lines of at most `width` columns. A line is never broken inside square
    brackets, so that each optional argument stays on one line."""
    lines: list[str] = []
    for line in usage.splitlines():
        kept = re.sub(r"\[(?:[^][]|\[[^]]*\])*\]", lambda match: match[0].replace(" ", "\0"), line)
        first, *rest = _wrapped(kept, width - 9)
        lines += [first, *(f"  {line}" for line in rest)]
    starts = ["Usage: ", *["       "] * (len(lines) - 1)]
    return [start + line.replace("\0", " ") for start, line in zip(starts, lines, strict=True)]


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def columns() -> int:
    """Returns the number of columns of the help text: the width of the terminal, but at least 60 and at most 120."""
    # shutil is imported only here, because the import takes 10 ms, and `gptjax --help` does not need shutil
    import shutil

    return min(max(shutil.get_terminal_size((100, 0)).columns, 60), 120)
