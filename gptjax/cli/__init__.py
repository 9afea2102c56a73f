"""The verbs of the command line. Each module parses its arguments, calls the library and prints; its entry point is
`run(args: list[str]) -> int`."""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    module: str  # imported only when the verb is called
    what: str  # one line of `gptjax --help`
    usage: str
    examples: tuple[str, ...]


VERBS: dict[str, Verb] = {
    "pretrain": Verb(
        "gptjax.cli.pretrain",
        "train a language model on text, from scratch or from an existing model (continued pretraining)",
        "gptjax pretrain [PRESET or CONFIG.yaml] [a.b=c ...] [--dry-run] [--print-config]",
        (
            "gptjax pretrain",
            "gptjax pretrain nanogpt-cpu data.source=input.txt",
            "gptjax pretrain shakespeare-char model.n_layer=6 optim.lr=3e-4 --dry-run",
        ),
    ),
    "finetune": Verb(
        "gptjax.cli.finetune",
        "fine-tune a model, with LoRA or in full: classification, instruction tuning (SFT), preferences (DPO)",
        "gptjax finetune classify|instruct|prefer [PRESET or CONFIG.yaml] [a.b=c ...] [--dry-run] [--print-config]",
        (
            "gptjax finetune classify classify.source=SMSSpamCollection.tsv classify.balance=true",
            "gptjax finetune classify classify.source=reviews.csv finetune.base=runs/mine lora.rank=8",
            'gptjax finetune classify classify.source=reviews.csv "finetune.trainable=blocks/29/** | ln_f/**"',
            "gptjax finetune instruct instruct.source=instruction-data.json",
            "gptjax finetune instruct instruct.source=chats.jsonl finetune.quantize=nf4 lora.rank=8",
            "gptjax finetune instruct instruct.source=chats.jsonl finetune.trainable=all optim.lr=1e-5 --dry-run",
            "gptjax finetune prefer prefer.source=preferences.jsonl finetune.base=runs/instruct",
            "gptjax finetune prefer prefer.source=preferences.jsonl finetune.base=runs/instruct prefer.loss=simpo",
            "gptjax finetune prefer prefer.source=preferences.jsonl prefer.loss=orpo lora.rank=8 --dry-run",
        ),
    ),
    "classify": Verb(
        "gptjax.cli.classify",
        "predict the class of texts with a fine-tuned classifier",
        'gptjax classify RUN "TEXT"|FILE|- [...] [text_field=COLUMN] [out=FILE.csv]',
        (
            'gptjax classify runs/classify "You have won a prize, call now"',
            "gptjax classify runs/classify tickets.csv text_field=body out=sorted.csv",
            "gptjax classify runs/classify - < texts.txt",
        ),
    ),
    "compare": Verb(
        "gptjax.cli.compare",
        "evaluate the answers of instruction-tuned models side by side: exact match, F1, loss, LLM as a judge",
        "gptjax compare RUN [RUN ...] [out=TABLE.md] [judge=URL judge_model=NAME]",
        (
            "gptjax compare runs/instruct",
            "gptjax compare runs/lora runs/full out=answers.md",
            "gptjax compare runs/instruct judge=http://localhost:11434/v1 judge_model=llama3",
        ),
    ),
    "sample": Verb(
        "gptjax.cli.sample",
        "generate text from a prompt, or from a file of prompts",
        "gptjax sample MODEL [--prompt TEXT] [max_new_tokens=N ...] [--dry-run] [--print-config]",
        (
            'gptjax sample runs/shakespeare-char --prompt "ROMEO:"',
            'gptjax sample runs/shakespeare-char --prompt "ROMEO:" max_new_tokens=500 temperature=0.8 top_k=50',
            "gptjax sample smollm2-135m-instruct prompts=questions.jsonl out=answers.jsonl temperature=0",
        ),
    ),
    "chat": Verb(
        "gptjax.cli.chat",
        "chat with an instruction-tuned model in the terminal",
        "gptjax chat MODEL [system=TEXT] [temperature=X ...]",
        (
            "gptjax chat smollm2-135m-instruct",
            'gptjax chat runs/instruct system="Answer in one word." temperature=0',
            "gptjax chat smollm2-135m-instruct quantize=int8 max_new_tokens=300",
        ),
    ),
    "plan": Verb(
        "gptjax.cli.plan",
        "estimate memory, communication and time of a training step on a TPU slice, without a TPU",
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
        "hyperparameter sweep: train many configurations and seeds in one compiled, vmapped program",
        "gptjax sweep [PRESET or CONFIG.yaml] [a.b=[x,y,z] ...] ['seed=range(8)'] [a.b=c ...] [at_once=N] [--dry-run]",
        (
            "gptjax sweep",
            "gptjax sweep tiny-gpt2 'optim.lr=[1e-4,3e-4,1e-3]' 'seed=range(8)'",
            "gptjax sweep instruct 'lora.rank=[4,16]' 'lora.alpha=[8,32]' 'seed=range(2)' --dry-run",
        ),
    ),
    "audit": Verb(
        "gptjax.cli.audit",
        "test a trained model for memorised training data, membership inference, data poisoning and backdoors",
        "gptjax audit RUN [canaries=FILE.jsonl] [prompts=FILE base=MODEL] [rows=N alpha=X ...] [out=NAME]",
        (
            "gptjax audit runs/shakespeare-char",
            "gptjax audit runs/shakespeare-char canaries=canaries.jsonl rows=100 out=audit-100",
            "gptjax audit runs/instruct train=train.jsonl held_out=test.jsonl prompts=questions.txt",
        ),
    ),
    "export": Verb(
        "gptjax.cli.transfer",
        "export a model to Hugging Face transformers, GGUF (llama.cpp) or StableHLO, or a LoRA adapter to PEFT",
        "gptjax export hf|gguf|peft|stablehlo MODEL TARGET [type=F32|F16|BF16|Q8_0]",
        (
            "gptjax export hf runs/mine mine-hf",
            "gptjax export gguf runs/mine mine.gguf type=Q8_0",
            "gptjax export peft runs/instruct my-adapter",
        ),
    ),
    "import": Verb(
        "gptjax.cli.transfer",
        "convert a model from a Hugging Face folder, the Hugging Face Hub or a GGUF file",
        "gptjax import MODEL DIR [dtype=float32|bfloat16|float16]",
        (
            "gptjax import hf:openai-community/gpt2 models/gpt2",
            "gptjax import SmolLM2-135M models/smollm2",
            "gptjax import model.gguf models/mine dtype=bfloat16",
        ),
    ),
    "tokenizer": Verb(
        "gptjax.cli.tokenizer",
        "train a tokenizer (BPE, WordPiece, Unigram), encode text, or show a tokenizer's vocabulary",
        "gptjax tokenizer train|encode|inspect ...",
        (
            "gptjax tokenizer train bpe data.source=my.txt tokenizer.vocab_size=4096 out=my-bpe.json",
            'gptjax tokenizer encode gpt2 "Every effort moves you"',
            "gptjax tokenizer inspect runs/shakespeare-char",
        ),
    ),
    "data": Verb(
        "gptjax.cli.data",
        "tokenize a data set, inspect its batches, or check files for duplicates, secrets and outliers",
        "gptjax data prepare|inspect [PRESET or CONFIG.yaml] [a.b=c ...] | check FILE [FILE ...] [model=MODEL]",
        (
            "gptjax data prepare shakespeare-char",
            "gptjax data inspect data.source=my-folder/ tokenizer.name=gpt2",
            "gptjax data check train.jsonl test.jsonl model=smollm2-135m-instruct out=report.json",
        ),
    ),
    "presets": Verb(
        "gptjax.cli.presets",
        "list, print or copy the built-in configuration files",
        "gptjax presets ls | show PRESET | cp PRESET FILE.yaml",
        ("gptjax presets ls", "gptjax presets show nanogpt-cpu", "gptjax presets cp nanogpt-cpu mine.yaml"),
    ),
    "doctor": Verb(
        "gptjax.cli.doctor",
        "check the installation: package versions, accelerator, drivers, cached assets, folders",
        "gptjax doctor",
        ("gptjax doctor",),
    ),
}
