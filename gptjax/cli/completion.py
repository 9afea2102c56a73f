"""`gptjax completion bash|zsh|fish`: prints a script for the shell, which completes `gptjax` command lines.

The shell script calls `gptjax completion --words WORD ...` with the words before the cursor. The last WORD is the word
that the user is typing, and `gptjax completion --words` prints the possible completions of this word, one per line. The
shell script passes the names of settings and presets to `gptjax completion` in an environment variable, because
importing the modules that define these names would take most of the time of each completion.

`gptjax completion` prints these completions for the words after `--words`:

    --words pre                             pretrain, presets
    --words pretrain opt                    optim.
    --words pretrain optim.w                optim.warmup_steps=, optim.weight_decay=, optim.weight_decay_schedule=
    --words pretrain optim.name=            optim.name=adamw, optim.name=muon
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, get_args, get_origin

from gptjax.cli import ALL_VERBS
from gptjax.cli.manual import PAGES, Page
from gptjax.cli.topics import TOPICS
from gptjax.errors import UserError, did_you_mean

VARIABLE = "GPTJAX_COMPLETION"

BASH = r"""# bash completion of gptjax; load it with: eval "$(gptjax completion bash)"
_gptjax_names='NAMES'
_gptjax() {
  local line=${COMP_LINE:0:COMP_POINT} words current word drop="" IFS=$' \t\n'
  read -a words <<< "$line"  # COMP_WORDS is split at = as well
  [[ $line == *[[:blank:]] && $line != *\\[[:blank:]] ]] && words+=("")
  current=${words[${#words[@]} - 1]}
  # bash replaces only what follows the last of its word breaks
  [[ $current == *=* && $COMP_WORDBREAKS == *=* ]] && drop=${current%%=*}=
  COMPREPLY=()
  IFS=$'\n'
  for word in $(VARIABLE=$_gptjax_names command gptjax completion --words "${words[@]:1}" 2>/dev/null); do
    word=${word#"$drop"}
    COMPREPLY+=("$(printf %q "$word")")
  done
  # no blank after a section (optim.) or a name (optim.lr=)
  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[.=] ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o bashdefault -o default -F _gptjax gptjax
"""

ZSH = r"""#compdef gptjax
# zsh completion of gptjax; load it after compinit with: eval "$(gptjax completion zsh)"
_gptjax_names='NAMES'
_gptjax() {
  local -a candidates unfinished finished typed
  typed=(${(Q)words[2,CURRENT-1]} "${(Q)PREFIX}")
  candidates=(${(f)"$(VARIABLE=$_gptjax_names command gptjax completion --words "${(@)typed}" 2>/dev/null)"})
  unfinished=(${(M)candidates:#*[.=]})
  finished=(${candidates:#*[.=]})
  if (( ${#candidates} )); then
    (( ${#unfinished} )) && compadd -S '' -a unfinished  # no blank after optim. or optim.lr=
    (( ${#finished} )) && compadd -a finished
    return 0
  fi
  compset -P '*='
  _files
}
if [[ "${funcstack[1]}" == _gptjax ]]; then
  _gptjax "$@"  # loaded from a file _gptjax in $fpath
else
  compdef _gptjax gptjax
fi
"""

FISH = r"""# fish completion of gptjax; load it with: gptjax completion fish | source
set -g __gptjax_names 'NAMES'
function __gptjax_find_words
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -e words[1]
    set -g __gptjax_found (env VARIABLE=$__gptjax_names gptjax completion --words $words "$current" 2>/dev/null)
    test -n "$__gptjax_found[1]"
end
complete -c gptjax -n __gptjax_find_words -f -a '$__gptjax_found'  # files only where there are no words
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
HELP = "--help"


class Names(NamedTuple):
    """The names of settings and presets, from which completions are chosen.

    Attributes:
        settings: dict from the key of each setting to its allowed values, or to [] if it takes any number or text.
        uses: dict from each task to the patterns of the settings that the task reads.
        presets: dict from the name of each preset to its task.
    """

    settings: dict[str, list[str]]
    uses: dict[str, list[str]]
    presets: dict[str, str]


def run(args: list[str]) -> int:
    if args[:1] == ["--words"]:
        text = os.environ.get(VARIABLE)
        print("\n".join(words(args[1:], Names(*json.loads(text)) if text else names())))
        return 0
    if len(args) != 1 or args[0] not in SCRIPTS:
        shell = args[0] if args else ""
        hint = did_you_mean(shell, SCRIPTS)
        raise UserError(f"completion {shell or 'for which shell'}: expected one of {', '.join(SCRIPTS)}{hint}")
    print(script(args[0]), end="")
    return 0


def script(shell: str) -> str:
    # The shell scripts enclose the JSON text of `names()` in single quotes. The JSON text of `names()` contains no
    # single quotes, so nothing in the text has to be escaped.
    text = json.dumps(names(), separators=(",", ":"))
    return SCRIPTS[shell].replace("VARIABLE", VARIABLE).replace("NAMES", text)


def names() -> Names:
    from gptjax.config.load import presets
    from gptjax.config.schema import schema
    from gptjax.config.uses import USES

    return Names(
        {key: choices(key) for key in schema()},
        {task: list(patterns) for task, patterns in USES.items()},
        {name: path.parent.name for name, path in presets().items()},
    )


def choices(key: str) -> list[str]:
    """Returns the allowed values of a setting: true and false for a bool, the choices of a Literal, and null if the
    setting can be null. Returns [] for a setting whose value can be any number or text."""
    from gptjax.config.schema import leaf_fields, without_null

    field = leaf_fields()[key]
    kind = without_null(field.type)
    values = list(get_args(kind)) if get_origin(kind) is Literal else ["true", "false"] if kind is bool else []
    values = values or list(field.metadata["choices"])
    return [*values, "null"] if values and kind is not field.type else values


def words(typed: Sequence[str], names: Names) -> list[str]:
    """Returns the possible completions of the last word of `typed`.

    Args:
        typed: the words after `gptjax` on the command line; the last word is unfinished and may be "".
    """
    *before, current = typed or [""]
    return [word for word in dict.fromkeys(_candidates(before, current, names)) if word.startswith(current)]


def _candidates(before: Sequence[str], current: str, names: Names) -> Iterator[str]:
    if not before:
        yield from ALL_VERBS
        yield from (HELP, "--version") if current.startswith("-") else ()
        return
    verb, *rest = before
    if verb not in ALL_VERBS:
        return
    if verb == "help":
        yield from _help_words(rest)
        return
    actions = ALL_VERBS[verb].actions
    if not rest:
        yield from actions
    yield from (HELP,) if current.startswith("-") else ()
    title = f"{verb} {rest.pop(0)}" if rest and rest[0] in actions else verb
    if title in PAGES:
        yield from _words_of_page(PAGES[title], rest, current, names)


def _help_words(before: Sequence[str]) -> Iterator[str]:
    if not before:
        yield from (*TOPICS, *ALL_VERBS)
    elif len(before) == 1 and before[0] in ALL_VERBS:
        yield from ALL_VERBS[before[0]].actions


def _words_of_page(page: Page, before: Sequence[str], current: str, names: Names) -> Iterator[str]:
    if before[-1:] == ["--on"]:
        from gptjax.planning.slices import SLICES

        yield from SLICES
        return
    key, is_set, _ = current.partition("=")
    if not is_set and not any("=" not in word and not word.startswith("-") for word in before):
        yield from page.words
        yield from (name for name, task in names.presets.items() if task in page.tasks)
    for option in page.options:
        if option.name.startswith("--"):
            yield from (option.name,) if current.startswith("-") else ()
        elif is_set and option.name == f"{key}=":
            yield from (f"{option.name}{choice}" for choice in option.choices)
        elif not is_set:
            yield option.name
    flag = "--" if current.startswith("--") else ""  # a setting may also be written with dashes: --optim.lr=1
    if flag and "." not in current:
        return
    patterns = page.settings if not page.reads else names.uses.get(page.reads, ["*"])
    keys = [key for key in names.settings if any(fnmatchcase(key, pattern) for pattern in patterns)]
    for word in _settings(keys, page.section, current.removeprefix(flag), names):
        yield flag + word


def _settings(keys: Sequence[str], section: str, current: str, names: Names) -> Iterator[str]:
    """Yields the possible completions of the unfinished setting `current`. If `current` does not name a section yet,
    the completions are the sections, such as `optim.`, and the settings outside of sections, such as `seed=`. If
    `current` begins with a section, the completions are the settings in this section, such as `optim.lr=`. If `current`
    contains `=`, the completions are the setting with each of its allowed values, such as `optim.name=muon`."""
    typed, is_set, _ = current.partition("=")
    for key in keys:
        short = key.removeprefix(f"{section}.") if section else key
        head, dot, _ = short.partition(".")
        if is_set:
            yield from (f"{typed}={choice}" for choice in names.settings[key] if typed == short)
        elif dot and not current.startswith(head + dot):
            yield head + dot
        else:
            yield f"{short}="
