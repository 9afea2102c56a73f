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
    "finetune": Verb(
        "gptjax.cli.finetune",
        "tune a model to classify texts, to follow instructions or to prefer some answers",
        "gptjax finetune classify|instruct|prefer [PRESET or CONFIG.yaml] [a.b=c ...] [--dry-run] [--print-config]",
        (
            "gptjax finetune classify classify.source=SMSSpamCollection.tsv classify.balance=true",
            "gptjax finetune classify classify.source=reviews.csv finetune.base=runs/mine lora.rank=8",
            "gptjax finetune instruct instruct.source=instruction-data.json",
            "gptjax finetune prefer finetune.base=runs/instruct prefer.loss=simpo",
            'gptjax finetune classify classify.source=reviews.csv "finetune.trainable=blocks/29/** | ln_f/**"',
        ),
    ),
    "classify": Verb(
        "gptjax.cli.classify",
        "the class of texts, by a model that was tuned for it",
        'gptjax classify RUN "TEXT"|FILE|- [...] [text_field=COLUMN] [out=FILE.csv]',
        (
            'gptjax classify runs/classify "You have won a prize, call now"',
            "gptjax classify runs/classify tickets.csv text_field=body out=sorted.csv",
            "gptjax classify runs/classify - < texts.txt",
        ),
    ),
    "compare": Verb(
        "gptjax.cli.compare",
        "the answers of instruction-tuned runs, in numbers and side by side",
        "gptjax compare RUN [RUN ...] [out=TABLE.md] [judge=URL judge_model=NAME]",
        (
            "gptjax compare runs/lora runs/full out=answers.md",
            "gptjax compare runs/instruct judge=http://localhost:11434/v1 judge_model=llama3",
        ),
    ),
    "sample": Verb(
        "gptjax.cli.sample",
        "let a trained model write",
        "gptjax sample MODEL [--prompt TEXT] [max_new_tokens=N ...] [--dry-run] [--print-config]",
        (
            'gptjax sample runs/shakespeare-char --prompt "ROMEO:"',
            "gptjax sample smollm2-135m-instruct prompts=questions.jsonl out=answers.jsonl temperature=0",
        ),
    ),
    "chat": Verb(
        "gptjax.cli.chat",
        "talk with a model that was tuned for it",
        "gptjax chat MODEL [system=TEXT] [temperature=X ...]",
        ("gptjax chat smollm2-135m-instruct", 'gptjax chat MODEL system="Answer in one word." temperature=0'),
    ),
    "plan": Verb(
        "gptjax.cli.plan",
        "what a run would take on a TPU slice you do not have: memory, traffic, time",
        "gptjax plan [PRESET or CONFIG.yaml] [a.b=c ...] [--on SLICE] [--search] [--decode] [tokens=N] [hours=X] "
        "[out=PLAN.json] [png=PLAN.png]",
        (
            "gptjax plan gpt2-124m --on v5e-1 train.batch_size=32 train.accumulation=1",
            "gptjax plan gpt2-1558m --on v5e-16 --search tokens=30e9",
            "gptjax plan llama-3.1-8b --on v5p-128 --search out=plan.json png=plan.png",
        ),
    ),
    "sweep": Verb(
        "gptjax.cli.sweep",
        "many runs in one compiled program: learning rates, seeds, ranks, side by side",
        "gptjax sweep [PRESET or CONFIG.yaml] [a.b=[x,y,z] ...] ['seed=range(8)'] [a.b=c ...] [at_once=N] [--dry-run]",
        (
            "gptjax sweep",
            "gptjax sweep tiny-gpt2 'optim.lr=[1e-4,3e-4,1e-3]' 'seed=range(8)'",
            "gptjax sweep instruct 'lora.rank=[4,16]' 'lora.alpha=[8,32]' 'seed=range(2)' --dry-run",
        ),
    ),
    "audit": Verb(
        "gptjax.cli.audit",
        "what a run has kept of its text, and whether something was planted there",
        "gptjax audit RUN [canaries=FILE.jsonl] [prompts=FILE base=MODEL] [rows=N alpha=X ...] [out=NAME]",
        (
            "gptjax audit runs/shakespeare-char",
            "gptjax audit runs/instruct train=train.jsonl held_out=test.jsonl prompts=questions.txt",
        ),
    ),
    "export": Verb(
        "gptjax.cli.transfer",
        "write a model for transformers, llama.cpp or as one program, or an adapter for peft",
        "gptjax export hf|gguf|peft|stablehlo MODEL TARGET [type=F32|F16|BF16|Q8_0]",
        (
            "gptjax export hf runs/mine mine-hf",
            "gptjax export gguf runs/mine mine.gguf type=Q8_0",
            "gptjax export peft runs/instruct my-adapter",
        ),
    ),
    "import": Verb(
        "gptjax.cli.transfer",
        "bring in a model: Hugging Face folder, GGUF file, hf:org/name",
        "gptjax import MODEL DIR [dtype=float32|bfloat16|float16]",
        ("gptjax import hf:openai-community/gpt2 models/gpt2", "gptjax import model.gguf models/mine dtype=bfloat16"),
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
        "prepare token files, look at batches, find repetitions and secrets",
        "gptjax data prepare|inspect [PRESET or CONFIG.yaml] [a.b=c ...] | check FILE [FILE ...] [model=MODEL]",
        (
            "gptjax data prepare shakespeare-char",
            "gptjax data inspect data.source=my-folder/ tokenizer.name=gpt2",
            "gptjax data check train.jsonl test.jsonl model=smollm2-135m-instruct out=report.json",
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
