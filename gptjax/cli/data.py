"""`gptjax data prepare | inspect`: text to token files, and a look at what the model will read."""

from __future__ import annotations

from gptjax.cli import options
from gptjax.cli.pretrain import DEFAULT, report
from gptjax.config import Config
from gptjax.config_io import did_you_mean
from gptjax.types import UserError

ACTIONS = ("prepare", "inspect")


def run(args: list[str]) -> int:
    action, *rest = args or [""]
    if action not in ACTIONS:
        raise UserError(f"data {action}: expected {' or '.join(ACTIONS)}{did_you_mean(action, ACTIONS)}")
    parsed = options.parse(rest, words=1)
    cfg, provenance = options.configure(parsed, DEFAULT)
    if options.show_only(parsed, cfg, provenance, report):
        return 0
    from gptjax import data

    prepared = data.prepare(cfg, log=options.note)
    print("\n".join(data.describe(prepared)))
    if action == "inspect":
        print("\n".join(first_window(prepared, cfg)))
    return 0


def more_help() -> str:
    return f"Without a preset it is {DEFAULT}.\n\n{options.settings_help(['tokenizer', 'data'])}"


def first_window(prepared, cfg: Config, most: int = 24) -> list[str]:
    """The first tokens of the first window of the first step: input, target, and whether the target counts."""
    from gptjax.data import Loader

    batch = Loader(
        prepared.train,
        cfg.data,
        batch_size=cfg.train.batch_size,
        context_length=cfg.model.context_length,
        seed=cfg.seed,
        vocab_size=prepared.tokenizer.vocab_size,
    ).batch(0)
    show = prepared.tokenizer.decode
    rows = ["", f"step 0, window 0, first {min(most, cfg.model.context_length)} tokens", "  input -> target"]
    for t in range(min(most, cfg.model.context_length)):
        a, b = int(batch.tokens[0, t]), int(batch.targets[0, t])
        weight = 1.0 if batch.weights is None else float(batch.weights[0, t])
        rows.append(f"  {a:>6} {show([a])!r:<12} -> {b:>6} {show([b])!r:<12}{'' if weight else ' not counted'}")
    return rows
