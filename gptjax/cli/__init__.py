"""The commands of the `gptjax` command line. The module of each command parses the arguments, calls the library and
prints the results. The entry point of each command's module is the function `run(args: list[str]) -> int`, which
returns the exit code.

The module `manual` holds the text that `gptjax COMMAND --help` prints, and `topics` holds the pages of `gptjax help
TOPIC`. The module `help` prints the texts of `manual` and `topics`, and `completion` prints the scripts with which a
shell completes command lines.
"""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    module: str  # Name of the module with the entry point, which is imported only when the command is called.
    group: str  # Heading under which `gptjax --help` lists the command.
    summary: str  # Description of the command in `gptjax --help`.
    # Subcommands, such as `prepare` in `gptjax data prepare`, each of which has a help page.
    actions: tuple[str, ...] = ()


TRAIN, USE, STUDY, FILES = "Train", "Use a trained model", "Plan and examine", "Prepare and convert files"
INSTALLATION = "Installation and help"
GROUPS = (TRAIN, USE, STUDY, FILES, INSTALLATION)

VERBS: dict[str, Verb] = {
    "pretrain": Verb("gptjax.cli.pretrain", TRAIN, "Train a language model on text, from scratch or from a model."),
    "finetune": Verb(
        "gptjax.cli.finetune",
        TRAIN,
        "Fine-tune a model on labels, conversations, preferences or rewards, or to imitate another model.",
        ("classify", "instruct", "prefer", "reward", "reward_model", "distill"),
    ),
    "classify": Verb("gptjax.cli.classify", USE, "Predict the class of texts with a fine-tuned classifier."),
    "compare": Verb("gptjax.cli.compare", STUDY, "Score the answers of instruction-tuned models side by side."),
    "sample": Verb("gptjax.cli.sample", USE, "Generate text from a prompt or from a file of prompts."),
    "chat": Verb("gptjax.cli.chat", USE, "Chat with an instruction-tuned model in the terminal."),
    "plan": Verb("gptjax.cli.plan", STUDY, "Estimate memory and time of training on a TPU slice, without a TPU."),
    "sweep": Verb("gptjax.cli.sweep", TRAIN, "Train with many hyperparameters and seeds, in one compiled program."),
    "audit": Verb("gptjax.cli.audit", STUDY, "Test a model for memorised training data, leaks and backdoors."),
    "export": Verb(
        "gptjax.cli.transfer",
        FILES,
        "Write a model for transformers, llama.cpp, PEFT or StableHLO.",
        ("hf", "gguf", "peft", "stablehlo"),
    ),
    "import": Verb("gptjax.cli.transfer", FILES, "Convert a Hugging Face folder or a GGUF file to a model folder."),
    "tokenizer": Verb(
        "gptjax.cli.tokenizer",
        FILES,
        "Train a tokenizer, encode text, or describe a tokenizer.",
        ("train", "encode", "inspect"),
    ),
    "data": Verb(
        "gptjax.cli.data",
        FILES,
        "Tokenize a data set, look at its batches, or check files for defects.",
        ("prepare", "inspect", "check"),
    ),
    "presets": Verb(
        "gptjax.cli.presets", FILES, "List, print or copy the presets: files of settings.", ("ls", "show", "cp")
    ),
    "doctor": Verb("gptjax.cli.doctor", INSTALLATION, "Check package versions, devices, cached files and folders."),
}
# commands that are about the command line itself: the help pages and the shell completion
ABOUT_VERBS: dict[str, Verb] = {
    "help": Verb("gptjax.cli.help", INSTALLATION, "Explain a command or a topic."),
    "completion": Verb(
        "gptjax.cli.completion", INSTALLATION, "Print a script for completion with TAB.", ("bash", "zsh", "fish")
    ),
}
ALL_VERBS = {**VERBS, **ABOUT_VERBS}
