"""`gptjax completion bash|zsh|fish`: scripts that complete the command line.

The scripts call `gptjax completion --words WORD ...` with the words before the cursor, the unfinished one last, and get
the words that it can become, one per line. It imports neither jax nor the modules of the verbs.

    --words pre                             pretrain, presets
    --words pretrain opt                    optim.
    --words pretrain optim.w                optim.warmup_steps=, optim.weight_decay=
    --words pretrain optim.name=            optim.name=adamw, optim.name=muon
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args, get_origin

from gptjax.cli import ALL_VERBS
from gptjax.errors import UserError, did_you_mean

BASH = r"""# bash completion of gptjax; load it with: eval "$(gptjax completion bash)"
_gptjax() {
  local line=${COMP_LINE:0:COMP_POINT} words current word drop="" IFS=$' \t\n'
  read -a words <<< "$line"  # COMP_WORDS is split at = as well
  [[ $line == *[[:blank:]] && $line != *\\[[:blank:]] ]] && words+=("")
  current=${words[${#words[@]} - 1]}
  # bash replaces only what follows the last of its word breaks
  [[ $current == *=* && $COMP_WORDBREAKS == *=* ]] && drop=${current%%=*}=
  COMPREPLY=()
  IFS=$'\n'
  for word in $(command gptjax completion --words "${words[@]:1}" 2>/dev/null); do
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
_gptjax() {
  local -a candidates unfinished finished
  candidates=(${(f)"$(command gptjax completion --words "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)"})
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

FISH = r"""# fish completion of gptjax; save it as ~/.config/fish/completions/gptjax.fish
function __gptjax_words
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    command gptjax completion --words $words[2..-1] "$current" 2>/dev/null
end
complete -c gptjax -a '(__gptjax_words)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
HELP = "--help"


def run(args: list[str]) -> int:
    if args[:1] == ["--words"]:
        print("\n".join(words(args[1:])))
        return 0
    if len(args) != 1 or args[0] not in SCRIPTS:
        shell = args[0] if args else ""
        hint = did_you_mean(shell, SCRIPTS)
        raise UserError(f"completion {shell or 'for which shell'}: expected one of {', '.join(SCRIPTS)}{hint}")
    print(SCRIPTS[args[0]], end="")
    return 0


def words(typed: Sequence[str]) -> list[str]:
    """The words that the last word of `typed` can become.

    Args:
        typed: the words after `gptjax`; the last is unfinished and may be "".
    """
    *before, current = typed or [""]
    return [word for word in dict.fromkeys(_candidates(before, current)) if word.startswith(current)]


def _candidates(before: Sequence[str], current: str) -> Iterator[str]:
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
    name = f"{verb} {rest.pop(0)}" if rest and rest[0] in actions else verb
    yield from _words_of_page(name, rest, current)


def _help_words(before: Sequence[str]) -> Iterator[str]:
    from gptjax.cli.topics import TOPICS

    if not before:
        yield from (*TOPICS, *ALL_VERBS)
    elif len(before) == 1 and before[0] in ALL_VERBS:
        yield from ALL_VERBS[before[0]].actions


def _words_of_page(name: str, before: Sequence[str], current: str) -> Iterator[str]:
    from gptjax.cli.manual import PAGES

    if name not in PAGES:
        return
    page = PAGES[name]
    key, is_set, _ = current.partition("=")
    for option in page.options:
        if option.name.startswith("--"):
            yield from (option.name,) if current.startswith("-") else ()
        elif is_set and option.name == f"{key}=":
            yield from (f"{option.name}{choice}" for choice in option.choices)
        elif not is_set:
            yield option.name
    flag = "--" if current.startswith("--") else ""  # --optim.lr=1 is the same as optim.lr=1
    yield from (flag + word for word in _settings(page.accepts or page.settings, page.section, current[len(flag) :]))
    if not is_set and not any("=" not in word and not word.startswith("-") for word in before):
        yield from page.words
        yield from _presets(page.tasks)


def _presets(tasks: Sequence[str]) -> Iterator[str]:
    if tasks:
        from gptjax.config.load import presets

        yield from (name for name, path in presets().items() if path.parent.name in tasks)


def _settings(patterns: Sequence[str], section: str, current: str) -> Iterator[str]:
    """Sections (optim.), names of a section that is typed (optim.lr=), and values of a name that is."""
    from gptjax.config.schema import schema
    from gptjax.config.uses import matches

    if not patterns:
        return
    key, is_set, _ = current.partition("=")
    for name in schema():
        if not any(matches(pattern, name) for pattern in patterns):
            continue
        short = name.removeprefix(f"{section}.") if section else name
        head, dot, _ = short.partition(".")
        if is_set:
            yield from (f"{key}={choice}" for choice in choices(name)) if key == short else ()
        elif dot and not current.startswith(head + dot):
            yield head + dot
        else:
            yield f"{short}="


def choices(name: str) -> list[str]:
    """The values of a setting that has few: true and false, or the words of a Literal, and null where it is allowed."""
    from gptjax.config.schema import leaf_fields, without_null

    field = leaf_fields()[name]
    kind = without_null(field.type)
    values = list(get_args(kind)) if get_origin(kind) is Literal else ["true", "false"] if kind is bool else []
    values = values or list(field.metadata["choices"])
    return [*values, "null"] if values and kind is not field.type else values
