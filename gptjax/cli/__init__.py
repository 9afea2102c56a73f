"""The verbs of the command line: parse, call, print. Each module has `run(args: list[str]) -> int`."""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    module: str  # imported only when the verb is asked for
    what: str
    usage: str
    examples: tuple[str, ...]


VERBS: dict[str, Verb] = {
    "pretrain": Verb(
        "gptjax.cli.pretrain",
        "train a GPT on text, from characters to GPT-2 sizes",
        "gptjax pretrain [PRESET or CONFIG.yaml] [a.b=c ...] [--dry-run] [--print-config]",
        (
            "gptjax pretrain",
            "gptjax pretrain nanogpt-cpu data.source=input.txt",
            "gptjax pretrain shakespeare-char model.n_layer=6 optim.lr=3e-4 --dry-run",
        ),
    ),
    "sample": Verb(
        "gptjax.cli.sample",
        "let a trained model write",
        "gptjax sample RUN [--prompt TEXT] [max_new_tokens=N ...] [--dry-run] [--print-config]",
        (
            'gptjax sample runs/shakespeare-char --prompt "ROMEO:"',
            "gptjax sample runs/shakespeare-char temperature=0 max_new_tokens=500",
        ),
    ),
    "tokenizer": Verb(
        "gptjax.cli.tokenizer",
        "train, use and look into tokenizers",
        "gptjax tokenizer train|encode|inspect ...",
        (
            "gptjax tokenizer train bpe data.source=my.txt tokenizer.vocab_size=4096 out=my-bpe.json",
            'gptjax tokenizer encode gpt2 "Every effort moves you"',
            "gptjax tokenizer inspect runs/shakespeare-char",
        ),
    ),
    "data": Verb(
        "gptjax.cli.data",
        "prepare token files, look at documents and batches",
        "gptjax data prepare|inspect [PRESET or CONFIG.yaml] [a.b=c ...] [--dry-run] [--print-config]",
        (
            "gptjax data prepare shakespeare-char",
            "gptjax data inspect data.source=my-folder/ tokenizer.name=gpt2",
        ),
    ),
    "presets": Verb(
        "gptjax.cli.presets",
        "list, show and copy the configurations that come along",
        "gptjax presets ls | show PRESET | cp PRESET FILE.yaml",
        ("gptjax presets ls", "gptjax presets show nanogpt-cpu", "gptjax presets cp nanogpt-cpu mine.yaml"),
    ),
    "doctor": Verb(
        "gptjax.cli.doctor",
        "versions, devices, assets and folders: is this machine ready?",
        "gptjax doctor",
        ("gptjax doctor",),
    ),
}
