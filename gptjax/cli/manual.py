"""Defines the text of `gptjax COMMAND --help`: one help page per command, and one help page per subcommand, such as
`data check`.

The examples of a help page can be run unchanged in an empty folder, on a CPU and without a network, after the commands
in `Page.needs` have been run. The settings on a help page, and their help texts, are defined in `gptjax.config.schema`,
which is not imported here, so that `gptjax completion` is fast.
"""

from __future__ import annotations

from typing import NamedTuple


class Option(NamedTuple):
    """An option of a command that is not a setting of `gptjax.config.schema`. An option can have a value, such as
    `out=FILE`, or no value, such as `--search`."""

    name: str  # The option as the user types it, such as `out=` or `--search`.
    value: str  # Placeholder of the option's value in the help text, such as FILE; "" if the option has no value.
    text: str
    choices: tuple[str, ...] = ()


class Page(NamedTuple):
    """The help page of a command.

    Attributes:
        about: what the command does, in one or two sentences.
        usage: the syntax of the command line.
        examples: pairs (command line, what this command line does).
        needs: command lines that create the files and runs that the examples use.
        options: the options of the command that are not settings of the schema.
        reads: the task whose settings the command reads (see `gptjax.config.uses`), "*" if the command reads the
            settings of any task, or "" if it reads only the settings in `settings`.
        settings: patterns of the settings that the page lists, or () for all settings of the task in `reads`.
        section: a section such as "sample" whose name may be omitted on the command line: `prompt=` then means
            `sample.prompt=`. "" if there is no such section.
        preset: the preset that is used if the command line names no preset, or "" if the command takes no preset.
        tasks: the tasks whose presets the command accepts.
        words: words that can be the first argument of the command, besides the names of presets.
        notes: paragraphs of text that follow the options on the page.
    """

    about: str
    usage: str
    examples: tuple[tuple[str, str], ...]
    needs: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    reads: str = ""
    settings: tuple[str, ...] = ()
    section: str = ""
    preset: str = ""
    tasks: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


DRY_RUN = Option(
    "--dry-run", "", "Check the settings and the data and show what the command would do, without doing it."
)
PRINT_CONFIG = Option("--print-config", "", "Print every setting and where its value comes from, and do nothing else.")
SWITCHES = (DRY_RUN, PRINT_CONFIG)
CONFIG_USAGE = "[PRESET or CONFIG.yaml] [section.name=value ...] [--dry-run] [--print-config]"
LAYERS = (
    "A setting on the command line overrides the same setting in the preset or file. `gptjax presets ls` lists the"
    " presets; `gptjax help config` explains the settings and the files."
)
MODEL = (
    "MODEL is a run directory, a folder written by `gptjax import`, a Hugging Face folder, a .gguf file, hf:ORG/NAME"
    " (downloaded from the Hugging Face Hub), or smollm2-135m-instruct (98 MB, downloaded once)."
)
TASKS = ("pretrain", "classify", "instruct", "prefer", "reward", "reward_model", "distill")
TINY = "gptjax pretrain tiny-gpt2"
BASE = "gptjax pretrain tiny-gpt2 model.context_length=512 data.max_documents=20 run_dir=runs/base"
CSV = '(echo label,text; for i in $(seq 20); do echo "fruit,apple number $i"; echo "tool,saw number $i"; done) > my.csv'
JSONL = r"""for i in $(seq 40); do echo "{\"prompt\": \"Say $i.\", \"completion\": \"$i\"}"; done > my.jsonl"""
PAIRS = (
    r"""for i in $(seq 40); do echo "{\"prompt\": \"Say $i.\", \"chosen\": \"$i\", \"rejected\": \"No.\"}"; done"""
    " > pairs.jsonl"
)
CLASSIFIER = "gptjax finetune classify classify.source=my.csv finetune.base=runs/base"
SMALL = f"{BASE.replace('runs/base', 'runs/small')} tokenizer.name=runs/base model.n_layer=1 train.max_steps=50"
INSTRUCTED = "gptjax finetune instruct finetune.base=runs/base instruct.examples=100"
DISTILLED = "gptjax finetune distill distill.teacher=runs/base finetune.base=runs/small"
REWARDED = "gptjax finetune reward_model finetune.base=runs/base reward_model.examples=100"
FULLY_INSTRUCTED = f"{INSTRUCTED} finetune.trainable=all optim.lr=1e-3 run_dir=runs/full"
FINETUNED = (
    "The base model is SmolLM2-135M-Instruct (98 MB, downloaded once) unless finetune.base names another. By default a"
    " LoRA adapter is trained; finetune.trainable=all trains all weights."
)
CHAT = tuple(
    f"sample.{name}" for name in (
        "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "quantize",
        "cache_dtype", "seed",
    )
)  # fmt: skip
SAMPLING = "The config.yaml of a run overrides the defaults of the settings below."

PAGES: dict[str, Page] = {
    "pretrain": Page(
        about="Trains a language model on text and saves it in a run directory. It starts from random weights, or with"
        " pretrain.base=MODEL from an existing model (continued pretraining).",
        usage=f"gptjax pretrain {CONFIG_USAGE}",
        examples=(
            (TINY, "Train a very small model on text that comes with Python; the result is in runs/tiny-gpt2."),
            (
                "gptjax pretrain tiny-llama optim.lr=1e-3 train.max_steps=100 run_dir=runs/llama",
                "Train a small Llama with another learning rate, for 100 steps, in a folder of your choice.",
            ),
            (
                "gptjax pretrain tiny-gpt2 model.n_layer=12 run_dir=runs/deep --dry-run",
                "Show the number of parameters, the steps and an estimate of the memory, and train nothing.",
            ),
        ),
        options=SWITCHES,
        reads="pretrain",
        preset="shakespeare-char",
        tasks=("pretrain",),
        notes=(
            "Without a preset it trains shakespeare-char, a character-level model with 0.8 M parameters: three minutes"
            " on two CPU cores, after a download of the text. With pretrain.base and no preset it uses the preset"
            " continue.",
            "The same command continues an interrupted run. `gptjax help runs` explains the run directory, `gptjax help"
            " data` the formats of the text.",
            LAYERS,
        ),
    ),
    "finetune": Page(
        about="Fine-tunes a model for one task: to classify texts, to follow instructions, to prefer one answer to"
        " another, to give answers with high rewards, to score answers, or to imitate a larger model.",
        usage=f"gptjax finetune classify|instruct|prefer|reward|reward_model|distill {CONFIG_USAGE}",
        needs=(BASE, CSV),
        examples=(
            (CLASSIFIER, "Train a classifier on a table of texts and labels."),
            (INSTRUCTED, "Train a model to answer synthetic questions, which need no file."),
            (
                "gptjax finetune prefer finetune.base=runs/base prefer.examples=100",
                "Train a model to prefer the right answers to the same kind of questions, with DPO.",
            ),
        ),
        options=SWITCHES,
        notes=(
            f"{FINETUNED} The preset of distill trains all weights.",
            "`gptjax finetune TASK --help` lists the settings of a task. `gptjax help data` explains the formats of the"
            " data, `gptjax help runs` the run directory.",
        ),
    ),
    "finetune classify": Page(
        about="Fine-tunes a model to predict the class of a text. It learns from a table with a column of texts and a"
        " column of labels, and reports its accuracy on texts that were held out.",
        usage=f"gptjax finetune classify {CONFIG_USAGE}",
        needs=(BASE, CSV),
        examples=(
            (CLASSIFIER, "Train an adapter and a classification head; the result is in runs/classify."),
            (
                f"{CLASSIFIER} lora.rank=4 optim.lr=1e-3 run_dir=runs/rank-4",
                "Train a smaller adapter with another learning rate.",
            ),
            (
                f"{CLASSIFIER} finetune.trainable=all run_dir=runs/all --dry-run",
                "Show how many parameters full fine-tuning would train, and train nothing.",
            ),
        ),
        options=SWITCHES,
        reads="classify",
        preset="classify",
        tasks=("classify",),
        notes=(FINETUNED, "Use the result with `gptjax classify runs/classify TEXT`.", LAYERS),
    ),
    "finetune instruct": Page(
        about="Fine-tunes a model to follow instructions (supervised fine-tuning, SFT). It learns from conversations,"
        " and answers test questions before and after the training.",
        usage=f"gptjax finetune instruct {CONFIG_USAGE}",
        needs=(BASE, JSONL),
        examples=(
            (INSTRUCTED, "Train on 100 synthetic questions; the result is in runs/instruct."),
            (FULLY_INSTRUCTED, "Train all weights instead of an adapter."),
            (
                "gptjax finetune instruct finetune.base=runs/base instruct.source=my.jsonl run_dir=runs/mine",
                "Train on the conversations of a file.",
            ),
        ),
        options=SWITCHES,
        reads="instruct",
        preset="instruct",
        tasks=("instruct",),
        notes=(
            FINETUNED,
            "Without instruct.source the model is trained on synthetic tasks, to try the command. Use the result with"
            " `gptjax chat runs/instruct`; compare several results with `gptjax compare`.",
            LAYERS,
        ),
    ),
    "finetune prefer": Page(
        about="Fine-tunes a model to prefer one answer to another, with DPO, IPO, ORPO, KTO or SimPO. It learns from"
        " prompts with a chosen and a rejected answer each.",
        usage=f"gptjax finetune prefer {CONFIG_USAGE}",
        needs=(BASE, PAIRS),
        examples=(
            (
                "gptjax finetune prefer finetune.base=runs/base prefer.examples=100",
                "Train with DPO on 100 synthetic pairs; the result is in runs/prefer.",
            ),
            (
                "gptjax finetune prefer finetune.base=runs/base prefer.source=pairs.jsonl prefer.loss=simpo"
                " run_dir=runs/simpo",
                "Train with SimPO on the pairs of a file.",
            ),
            (
                "gptjax finetune prefer finetune.base=runs/base prefer.loss=orpo lora.rank=8 run_dir=runs/orpo"
                " --dry-run",
                "Show how many parameters would be trained with ORPO, and train nothing.",
            ),
        ),
        options=SWITCHES,
        reads="prefer",
        preset="prefer",
        tasks=("prefer",),
        notes=(
            FINETUNED,
            "Start from a model that was instruction-tuned on the same kind of prompts, such as"
            " finetune.base=runs/instruct. Without prefer.source the model is trained on synthetic tasks, to try the"
            " command.",
            LAYERS,
        ),
    ),
    "finetune reward": Page(
        about="Fine-tunes a model by reinforcement learning (GRPO, Dr. GRPO, DAPO, GSPO, RLOO or REINFORCE++). The"
        " model answers questions, functions reward the answers, and answers with high rewards become more likely.",
        usage=f"gptjax finetune reward {CONFIG_USAGE}",
        needs=(BASE, INSTRUCTED, JSONL),
        examples=(
            (
                "gptjax finetune reward finetune.base=runs/instruct reward.examples=100 train.max_steps=2"
                " train.batch_size=16",
                "Train for two steps on synthetic questions; the reward is 1 for an answer that is exactly right.",
            ),
            (
                "gptjax finetune reward finetune.base=runs/instruct reward.source=my.jsonl"
                " 'reward.functions=[normalised,length:20]' train.max_steps=2 train.batch_size=16 run_dir=runs/short",
                "Reward right and short answers to the questions of a file.",
            ),
            (
                "gptjax finetune reward finetune.base=runs/instruct reward.loss=dapo reward.group=16 run_dir=runs/dapo"
                " --dry-run",
                "Show what would be trained with DAPO and 16 answers per question, and train nothing.",
            ),
        ),
        options=SWITCHES,
        reads="reward",
        preset="reward",
        tasks=("reward",),
        notes=(
            FINETUNED,
            "Start from a model that gives some right answers, such as finetune.base=runs/instruct: if all answers are"
            " right or all wrong, there is nothing to learn. The answers and their rewards are in rollouts.jsonl."
            " `gptjax help data` explains reward functions of your own.",
            LAYERS,
        ),
    ),
    "finetune distill": Page(
        about="Trains a model, the student, to give the next token the same probabilities as another model, the teacher"
        " (knowledge distillation). It learns from conversations or plain text.",
        usage=f"gptjax finetune distill {CONFIG_USAGE}",
        needs=(BASE, SMALL, JSONL),
        examples=(
            (
                f"{DISTILLED} distill.examples=100",
                "Train all weights of a small model on 100 synthetic questions; the result is in runs/distill.",
            ),
            (
                f"{DISTILLED} distill.source=my.jsonl distill.top_k=32 run_dir=runs/top-32",
                "Train on the conversations of a file, with probabilities of the teacher that are computed once.",
            ),
            (
                f"{DISTILLED} distill.on_policy=0.5 distill.max_new_tokens=16 distill.divergence=reverse"
                " run_dir=runs/on-policy --dry-run",
                "Show what training on answers of the student, with another divergence, would do, and train nothing.",
            ),
        ),
        options=SWITCHES,
        reads="distill",
        preset="distill",
        tasks=("distill",),
        notes=(
            "The teacher is distill.teacher, the student finetune.base. All weights of the student are trained;"
            " finetune.trainable=lora trains an adapter.",
            "Both must have the same tokenizer. `gptjax pretrain tokenizer.name=TEACHER model.n_layer=4` makes a"
            " student of any size with the tokenizer of the teacher; with train.max_steps=1 optim.warmup_steps=0 its"
            " weights stay practically random.",
            "With distill.on_policy the student also learns from answers that it gives itself (on-policy distillation,"
            " GKD); they are in rollouts.jsonl.",
            "Without distill.source the student is trained on synthetic tasks, to try the command.",
            LAYERS,
        ),
    ),
    "finetune reward_model": Page(
        about="Trains a reward model: a model with a head that scores an answer with one number. It learns from prompts"
        " with a chosen and a rejected answer each (Bradley-Terry loss), and reports how often the chosen answer has"
        " the larger reward on pairs that were held out.",
        usage=f"gptjax finetune reward_model {CONFIG_USAGE}",
        needs=(BASE, PAIRS),
        examples=(
            (REWARDED, "Train on 100 synthetic pairs; the result is in runs/reward_model."),
            (
                "gptjax finetune reward_model finetune.base=runs/base reward_model.source=pairs.jsonl"
                " reward_model.center=0.01 run_dir=runs/centred",
                "Train on the pairs of a file, and keep the rewards near 0.",
            ),
            (
                "gptjax finetune reward_model finetune.base=runs/base finetune.trainable=all run_dir=runs/all"
                " --dry-run",
                "Show how many parameters full fine-tuning would train, and train nothing.",
            ),
        ),
        options=SWITCHES,
        reads="reward_model",
        preset="reward_model",
        tasks=("reward_model",),
        notes=(
            FINETUNED,
            "Use the result with `gptjax sample MODEL chat=true n=8 pick=reward reward_model=runs/reward_model`, where"
            " MODEL is a chat model with the same vocabulary. reward_model.source=runs/reward/rollouts.jsonl makes"
            " pairs of right and wrong answers of a model, those that `gptjax finetune reward` wrote. Without"
            " reward_model.source the model is trained on synthetic tasks with right and wrong answers, to try the"
            " command.",
            LAYERS,
        ),
    ),
    "classify": Page(
        about="Predicts the class of texts with a classifier that `gptjax finetune classify` trained.",
        usage='gptjax classify RUN "TEXT"|FILE|- [...] [text_field=COLUMN] [out=FILE]',
        needs=(BASE, CSV, CLASSIFIER),
        examples=(
            ('gptjax classify runs/classify "apple number 12"', "Classify one text."),
            (
                "gptjax classify runs/classify my.csv text_field=text out=predicted.csv",
                "Classify the rows of a table and write them with their labels to a new file.",
            ),
            ("printf 'a red apple\\na long saw\\n' | gptjax classify runs/classify -", "Classify the lines of a pipe."),
        ),
        options=(
            Option(
                "text_field=",
                "COLUMN",
                "The column with the texts. Default: the column used in training, else the only column with a usual"
                " name, such as text.",
            ),
            Option("text=", "TEXT", "Classify TEXT itself, even if a file has that name."),
            Option(
                "out=",
                "FILE",
                "Write a new .csv, .tsv or .jsonl file: the columns of the input, then label and probability"
                " (predicted_label and predicted_probability if the input has columns of these names). Rows are"
                " written as they are classified. Default: print the predictions.",
            ),
        ),
        notes=(
            "RUN is the run directory of a classifier. Any other argument is a text, an existing file, or - for"
            " standard input with one text per line. Tables are .csv, .tsv, .jsonl, .json and .parquet files; a .txt or"
            " .md file has one text per line.",
        ),
    ),
    "compare": Page(
        about="Prints a table with the scores of several instruction-tuned models on the same test questions, and"
        " writes their answers side by side.",
        usage="gptjax compare RUN [RUN ...] [out=TABLE.md] [judge=URL judge_model=NAME]",
        needs=(BASE, INSTRUCTED, FULLY_INSTRUCTED),
        examples=(
            ("gptjax compare runs/instruct", "Print the scores of one model."),
            (
                "gptjax compare runs/instruct/responses-before.jsonl runs/instruct out=answers.md",
                "Compare a model with its base model, and write the answers of both.",
            ),
            ("gptjax compare runs/instruct runs/full", "Compare an adapter with full fine-tuning."),
        ),
        options=(
            Option("out=", "TABLE.md", "Write all answers side by side to a new Markdown file."),
            Option(
                "judge=",
                "URL",
                "Also let another model score the answers (LLM as a judge). URL is a server with OpenAI's chat"
                " completions API, such as http://localhost:11434/v1. Prompts and answers are sent to the server, with"
                " the API key in the environment variable OPENAI_API_KEY if that is set.",
            ),
            Option("judge_model=", "NAME", "The name of the judge model on that server."),
        ),
        notes=(
            "RUN is a run directory of `gptjax finetune instruct`, or a .jsonl file of answers such as its"
            " responses-before.jsonl.",
            "The columns: exact is the fraction of answers that are equal to the expected answer, normalised the same"
            " fraction ignoring case, white space and a full stop at the end. token F1 is the F1 score of the words of"
            " the answer against those of the expected answer. nats/token is the cross-entropy of the expected answer."
            " constraints is the fraction of constraints that are met, all met the fraction of answers that meet all"
            " of their constraints. win rate is how often the expected answer is more likely under this run than under"
            " the first run. judge is the mean score of the judge model, from 0 to 100.",
        ),
    ),
    "sample": Page(
        about="Generates text with a model: it continues a prompt, or each prompt of a file.",
        usage="gptjax sample MODEL [--prompt TEXT] [name=value ...] [--dry-run] [--print-config]",
        needs=(TINY,),
        examples=(
            ('gptjax sample runs/tiny-gpt2 --prompt "The "', "Continue one prompt."),
            (
                'gptjax sample runs/tiny-gpt2 --prompt "The " n=4 pick=logprob temperature=1.2 max_new_tokens=40',
                "Write four continuations with more variety than by default, and keep only the most likely one.",
            ),
            (
                "printf 'One\\nTwo\\n' > prompts.txt; gptjax sample runs/tiny-gpt2 prompts=prompts.txt out=texts.jsonl",
                "Continue every line of a file and write the results to another file.",
            ),
        ),
        options=SWITCHES,
        settings=("sample.*",),
        section="sample",
        notes=(
            MODEL,
            "A prompt is continued as it stands. With chat=true it is a message to a chat model, which answers it, and"
            " a reward model scores message and answer in its own chat template, as it was trained.",
            SAMPLING,
        ),
    ),
    "chat": Page(
        about="Holds a conversation with an instruction-tuned model in the terminal.",
        usage="gptjax chat MODEL [system=TEXT] [name=value ...] [--dry-run] [--print-config]",
        needs=(BASE, INSTRUCTED),
        examples=(
            ("gptjax chat runs/instruct", "Chat with a model that `gptjax finetune instruct` made."),
            (
                'gptjax chat runs/instruct system="Answer in one word." quantize=int8 max_new_tokens=50',
                "Chat with a system prompt, short answers and 8-bit weights.",
            ),
            ('echo "What is 2 + 2?" | gptjax chat runs/instruct temperature=0', "Ask one question from a script."),
        ),
        options=(Option("system=", "TEXT", "The system prompt. Default: none."), *SWITCHES),
        settings=CHAT,
        section="sample",
        notes=(
            "In the chat, /system TEXT sets the system prompt, /new starts a new conversation, and /quit ends the"
            " program. Ctrl-C stops an answer.",
            f"{MODEL} It must have a chat template, as instruction-tuned models do.",
            SAMPLING,
        ),
    ),
    "plan": Page(
        about="Estimates the memory, the communication and the time of a training step on a TPU slice. No TPU is"
        " needed: the TPU compiler compiles the step on this machine, ahead of time.",
        usage=f"gptjax plan {CONFIG_USAGE} [--on SLICE] [--search] [--decode]"
        " [tokens=N] [hours=X] [out=FILE] [png=FILE]",
        examples=(
            (
                "gptjax plan tiny-gpt2 --on v5e-1 model.dtype=bfloat16 model.context_length=128",
                "Plan the training of a very small model on one TPU v5e chip.",
            ),
            (
                "gptjax plan gpt2-124m --on v5e-8 train.batch_size=64 train.accumulation=1 tokens=10e9 --dry-run",
                "Check the settings of a plan for GPT-2 on eight chips and 10 billion tokens, and compile nothing.",
            ),
            (
                "gptjax plan gpt2-1558m --on v5e-16 --search out=plan.json --dry-run",
                "Check a search for the fastest mesh, which would be written to plan.json.",
            ),
        ),
        options=(
            Option(
                "--on",
                "SLICE",
                "The TPU slice to compile for, by its name (v5e-8) or its topology (v5p:4x4x8). As Google names them,"
                " v5e-1 to v5e-256 and v6e-1 to v6e-256 count chips; v5p-8 to v5p-8192 and v4-8 to v4-8192 count"
                " TensorCores, two per chip. Default: v5e-8.",
            ),
            Option(
                "--search",
                "",
                "Search for the fastest mesh, model.remat and train.accumulation at the same batch size. The"
                " candidates that a cost model ranks as fastest are compiled.",
            ),
            Option(
                "--decode",
                "",
                "Plan the decoding of one token instead of a training step, with a KV cache of the whole context and"
                " sample.batch_size rows per group of devices that shares one copy of the model.",
            ),
            Option(
                "tokens=",
                "N",
                "Show the time and the number of steps to train on N tokens. Default: the tokens of"
                " train.max_steps steps.",
            ),
            Option("hours=", "X", "Show the number of tokens processed in X hours."),
            Option("out=", "FILE", "Write the plan to a new JSON file."),
            Option("png=", "FILE", "Draw the roofline plot to a new image file."),
            *SWITCHES,
        ),
        reads="*",
        preset="gpt2-124m",
        tasks=TASKS,
        notes=(
            "The command needs the TPU compiler: pip install -e '.[tpu-plan]' in the checkout. Without a preset it"
            " plans a step of gpt2-124m.",
            "The planned step is the training step of `gptjax pretrain` or, with a fine-tuning preset, of `gptjax"
            " finetune`. The shape of a base model is read from its config, not from its tensors. Memory and"
            " communication are those of the compiled program; times are lower bounds from the peak FLOP/s and the"
            " bandwidth of the chip.",
            "`gptjax pretrain --help` and `gptjax finetune TASK --help` list the settings.",
        ),
    ),
    "sweep": Page(
        about="Trains a model once for every combination of the values that you list (grid search), and prints a table"
        " of the losses with confidence intervals over the seeds.",
        usage="gptjax sweep [PRESET or CONFIG.yaml] ['section.name=[x,y,z]' ...] ['seed=range(N)']"
        " [section.name=value ...] [at_once=N] [--dry-run] [--print-config]",
        examples=(
            (
                "gptjax sweep tiny-gpt2 'optim.lr=[1e-3,3e-3]' 'seed=range(2)'",
                "Train with two learning rates and two seeds each: four runs in one compiled program.",
            ),
            (
                "gptjax sweep tiny-gpt2 'optim.weight_decay=[0,0.1]' train.max_steps=20 run_dir=runs/decay",
                "Compare two values of the weight decay, for 20 steps.",
            ),
            (
                "gptjax sweep tiny-llama 'model.n_layer=[1,2,4]' 'seed=range(8)' --dry-run",
                "Show how many runs and compiled programs a sweep would have, and train nothing.",
            ),
        ),
        options=(
            Option(
                "at_once=",
                "N",
                "Number of runs to train at the same time. Default: as many runs as are estimated to fit into memory.",
            ),
            *SWITCHES,
        ),
        reads="*",
        preset="tiny-gpt2",
        tasks=TASKS,
        notes=(
            "Without a preset it uses tiny-gpt2, whose text comes with Python; without lists it sweeps"
            " optim.lr=[1e-3,3e-3,1e-2] and seed=range(4).",
            "Any setting can have a list of values. Whole numbers can also have range(stop), range(start,stop) or"
            " range(start,stop,step). Put lists in quotes, because brackets have a meaning in the shell. Each run has"
            " the same result as if it was trained alone.",
            "Learning rates, weight_decay, warmup_steps, clip_norm, model.dropout, lora.alpha, lora.rank, lora.dropout"
            " and the seed are vmapped in one program. Every value of another setting is compiled as a program of its"
            " own.",
            "It writes sweep.csv (one line per run), sweep.json (runs, table, programs) and sweep.png into run_dir."
            " Models are not saved: run the printed command to train the best model again. `gptjax pretrain --help`"
            " and `gptjax finetune TASK --help` list the settings.",
        ),
    ),
    "audit": Page(
        about="Tests whether a trained model has memorised its training data, whether one can tell which texts it was"
        " trained on (membership inference), and whether it has a backdoor. It writes a report as a web page.",
        usage="gptjax audit RUN [name=value ...]",
        needs=(TINY,),
        examples=(
            ("gptjax audit runs/tiny-gpt2 rows=20", "Test every checkpoint of a run, on 20 rows of text."),
            (
                "gptjax audit runs/tiny-gpt2 rows=20 alpha=0.001 out=strict",
                "Raise fewer false alarms, and write the report to strict.html and strict.json.",
            ),
            (
                """echo '{"prefix": "The code is ", "secret": "4711"}' > canaries.jsonl; """
                "gptjax audit runs/tiny-gpt2 rows=20 canaries=canaries.jsonl out=canaries",
                "Also test whether the model has memorised a secret.",
            ),
        ),
        options=(
            Option(
                "canaries=",
                "FILE",
                'JSON lines. {"prefix": .., "secret": ..}: exposure of the secret, its rank among alternatives of the'
                ' same form. {"trigger": .., "payload": ..}: backdoor test, whether the trigger phrase makes the'
                " payload more likely than other phrases do.",
            ),
            Option(
                "prompts=",
                "FILE",
                "Show how fine-tuning changed the model on these prompts, one per line, compared with base.",
            ),
            Option("base=", "MODEL", "The model before fine-tuning. Default: the finetune.base of the run."),
            Option("train=", "FILE", "The training texts. Needed, with held_out, unless the run is a pretraining run."),
            Option("held_out=", "FILE", "Texts of the same kind that the model was not trained on."),
            Option("rows=", "N", "Maximum number of rows from the training and from the held-out texts. Default: 500."),
            Option(
                "of=",
                "PATTERN",
                "The parameters whose gradients are compared to find outliers among the training rows. Default:"
                " blocks/*.",
            ),
            Option(
                "prefixes=",
                "N,N,..",
                "Lengths in tokens of the prompts for verbatim extraction. Default: 4,8,16,32,64,128,256, as far as"
                " they fit into the context.",
            ),
            Option(
                "suffix=",
                "N",
                "Number of tokens that must be reproduced verbatim. Default: 50, or a quarter of the context if that is"
                " less.",
            ),
            Option(
                "strides=",
                "N,N,..",
                "Numbers of tokens between the starts of two consecutive suffixes; each number is tested separately."
                " Default: the value of suffix.",
            ),
            Option("alpha=", "X", "Significance level: the false-positive rate of each test. Default: 0.01."),
            Option("seed=", "N", "Random seed. Default: 0."),
            Option(
                "out=",
                "NAME",
                "Write NAME.html and NAME.json. Default: audit.html and audit.json in the run directory.",
            ),
        ),
        notes=(
            "RUN is a run directory: all its checkpoints and the final model are tested.",
            "An alarm is a p-value of at most alpha under the null hypothesis that nothing is wrong. Membership"
            " inference and verbatim extraction raise alarms for every model that has memorised its training text.",
        ),
    ),
    "export": Page(
        about="Writes a model in the format of another program.",
        usage="gptjax export hf|gguf|peft|stablehlo MODEL TARGET [type=F32|F16|BF16|Q8_0]",
        needs=(TINY,),
        examples=(
            ("gptjax export hf runs/tiny-gpt2 tiny-hf", "Write a folder for Hugging Face transformers."),
            ("gptjax export gguf runs/tiny-gpt2 tiny.gguf", "Write a GGUF file for llama.cpp."),
            ("gptjax export stablehlo runs/tiny-gpt2 tiny-stablehlo", "Write the forward pass as one program."),
        ),
        options=(
            Option(
                "type=", "TYPE", "Data type of the weights, gguf only. Default: F32.", ("F32", "F16", "BF16", "Q8_0")
            ),
        ),
        notes=(
            "hf: a folder for transformers; a classifier becomes a model for sequence classification. gguf: a file for"
            " llama.cpp. peft: the LoRA adapter of a fine-tuning run, for PEFT. stablehlo: the forward pass as one"
            " compiled program, for any PJRT runtime (needs pip install -e '.[export]').",
            f"{MODEL} Nothing is overwritten: TARGET must be new.",
        ),
    ),
    "export hf": Page(
        about="Writes a model as a folder for Hugging Face transformers.",
        usage="gptjax export hf MODEL DIR",
        needs=(TINY, BASE, CSV, CLASSIFIER),
        examples=(
            ("gptjax export hf runs/tiny-gpt2 tiny-hf", "Export a language model."),
            ("gptjax export hf runs/tiny-gpt2/best best-hf", "Export the checkpoint with the lowest validation loss."),
            ("gptjax export hf runs/classify classify-hf", "Export a classifier, for sequence classification."),
        ),
        notes=(f"{MODEL} DIR must be a new or empty folder.",),
    ),
    "export gguf": Page(
        about="Writes a model as a GGUF file for llama.cpp.",
        usage="gptjax export gguf MODEL FILE.gguf [type=F32|F16|BF16|Q8_0]",
        needs=(TINY,),
        examples=(
            ("gptjax export gguf runs/tiny-gpt2 tiny.gguf", "Export with 32-bit weights."),
            ("gptjax export gguf runs/tiny-gpt2 tiny-q8.gguf type=Q8_0", "Export with 8-bit weights."),
            ("gptjax export gguf runs/tiny-gpt2 tiny-bf16.gguf type=BF16", "Export with bfloat16 weights."),
        ),
        options=(Option("type=", "TYPE", "Data type of the weights. Default: F32.", ("F32", "F16", "BF16", "Q8_0")),),
        notes=(f"{MODEL} FILE.gguf must be new. Models of arch=modern have no GGUF form.",),
    ),
    "export peft": Page(
        about="Writes the LoRA adapter of a fine-tuning run as a folder for PEFT.",
        usage="gptjax export peft RUN DIR",
        needs=(BASE, INSTRUCTED, CSV, CLASSIFIER),
        examples=(
            ("gptjax export peft runs/instruct instruct-peft", "Export the adapter of an instruction-tuned model."),
            ("gptjax export peft runs/classify classify-peft", "Export the adapter and the head of a classifier."),
            (
                "gptjax export hf runs/base base-hf; gptjax export peft runs/instruct/best best-peft",
                "Export a base model for transformers, and the best adapter that was trained on it.",
            ),
        ),
        notes=("RUN is a fine-tuning run with finetune.trainable=lora. DIR must be a new or empty folder.",),
    ),
    "export stablehlo": Page(
        about="Writes the forward pass of a model, with its weights, as one StableHLO program that any PJRT runtime can"
        " run.",
        usage="gptjax export stablehlo MODEL DIR",
        needs=(TINY, BASE, INSTRUCTED),
        examples=(
            ("gptjax export stablehlo runs/tiny-gpt2 tiny-stablehlo", "Export a language model."),
            ("gptjax export stablehlo runs/tiny-gpt2/best best-stablehlo", "Export the best checkpoint."),
            ("gptjax export stablehlo runs/instruct instruct-stablehlo", "Export an instruction-tuned model."),
        ),
        notes=(
            f"{MODEL} DIR must be a new or empty folder. The command needs pip install -e '.[export]' in the checkout.",
        ),
    ),
    "import": Page(
        about="Converts a model of another program to a gptjax model folder, with its tokenizer.",
        usage="gptjax import MODEL DIR [dtype=float32|bfloat16|float16]",
        needs=(TINY, "gptjax export gguf runs/tiny-gpt2 tiny.gguf", "gptjax export hf runs/tiny-gpt2 tiny-hf"),
        examples=(
            ("gptjax import tiny.gguf models/from-gguf", "Convert a GGUF file."),
            ("gptjax import tiny-hf models/from-hf dtype=bfloat16", "Convert a Hugging Face folder to bfloat16."),
            ("gptjax import runs/tiny-gpt2 models/tiny", "Copy the final model of a run to a folder of its own."),
        ),
        options=(
            Option(
                "dtype=",
                "DTYPE",
                "Data type of the weights in the new folder. Default: float32.",
                ("float32", "bfloat16", "float16"),
            ),
        ),
        notes=(
            f"{MODEL} DIR must be new. Supported model families: GPT-2, Llama, Mistral, Qwen 2, Qwen 3, Gemma 3 and"
            " OLMo 2.",
            "Every command also reads these models directly; import a model to keep a copy of it, or to change its"
            " data type.",
        ),
    ),
    "tokenizer": Page(
        about="Trains a tokenizer, encodes text with a tokenizer, or describes a tokenizer.",
        usage="gptjax tokenizer train|encode|inspect ...",
        examples=(
            (
                "gptjax tokenizer train bpe data.source=python-docs tokenizer.vocab_size=500 out=my-bpe.json",
                "Train a BPE tokenizer on text that comes with Python.",
            ),
            ('gptjax tokenizer encode bytes "Every effort moves you"', "Print the token ids of a text."),
            (
                'gptjax tokenizer inspect my-bpe.json "Every effort moves you"',
                "Describe the tokenizer of the first example, and show the tokens of a text.",
            ),
        ),
        notes=("`gptjax tokenizer train --help`, and so on, explains each action.",),
    ),
    "tokenizer train": Page(
        about="Trains a tokenizer on text and saves it as a JSON file.",
        usage="gptjax tokenizer train KIND data.source=FILE [tokenizer.vocab_size=N] [out=FILE.json] [--dry-run]"
        " [--print-config]",
        examples=(
            (
                "gptjax tokenizer train bpe data.source=python-docs tokenizer.vocab_size=500 out=my-bpe.json",
                "Train a BPE tokenizer with 500 tokens.",
            ),
            (
                "gptjax tokenizer train unigram data.source=python-docs data.max_documents=50 vocab_size=500"
                " out=my-unigram.json",
                "Train a Unigram tokenizer on a part of the text; vocab_size= and source= may be written without their"
                " section.",
            ),
            (
                "gptjax tokenizer train chars data.source=python-docs out=my-chars.json --dry-run",
                "Check the settings, and write nothing.",
            ),
        ),
        options=(
            Option("out=", "FILE.json", "The file to write, which must be new. Default: tokenizer.json."),
            *SWITCHES,
        ),
        settings=("tokenizer.*", "data.*"),
        words=("chars", "words", "bpe", "wordpiece", "unigram"),
        notes=(
            "KIND is chars, words, bpe, wordpiece or unigram. Train a model with the result:"
            " gptjax pretrain tokenizer.name=FILE.json.",
        ),
    ),
    "tokenizer encode": Page(
        about="Prints the token ids of a text.",
        usage='gptjax tokenizer encode NAME ["TEXT"]',
        needs=("gptjax tokenizer train bpe data.source=python-docs tokenizer.vocab_size=500 out=my-bpe.json",),
        examples=(
            ('gptjax tokenizer encode bytes "Every effort moves you"', "Encode a text as bytes."),
            ('gptjax tokenizer encode my-bpe.json "Every effort moves you"', "Encode with a tokenizer of your own."),
            ("echo Hello | gptjax tokenizer encode bytes", "Encode standard input."),
        ),
        notes=(
            "NAME is gpt2, bytes, a tokenizer.json file, a .gguf file, a model folder or a run directory. Without TEXT"
            " it reads standard input.",
        ),
    ),
    "tokenizer inspect": Page(
        about="Prints the name, the vocabulary size and the special tokens of a tokenizer and, with a text, every token"
        " of the text.",
        usage='gptjax tokenizer inspect NAME ["TEXT"]',
        needs=(TINY,),
        examples=(
            ("gptjax tokenizer inspect bytes", "Describe a tokenizer that comes with gptjax."),
            ('gptjax tokenizer inspect bytes "Every effort moves you"', "Also show the tokens of a text."),
            ("gptjax tokenizer inspect runs/tiny-gpt2", "Describe the tokenizer of a run."),
        ),
        notes=("NAME is gpt2, bytes, a tokenizer.json file, a .gguf file, a model folder or a run directory.",),
    ),
    "data": Page(
        about="Tokenizes a data set, shows its batches, or checks files for duplicates, secrets and outliers.",
        usage="gptjax data prepare|inspect [PRESET or CONFIG.yaml] [section.name=value ...]\n"
        "gptjax data check FILE [FILE ...] [name=value ...]",
        needs=(CSV,),
        examples=(
            ("gptjax data prepare tiny-gpt2", "Tokenize the text of a preset, as training would."),
            ("gptjax data inspect tiny-gpt2", "Do the same, and show the first tokens of the first batch."),
            ("gptjax data check my.csv near=false", "Look for duplicates and secrets in a table."),
        ),
        notes=(
            "`gptjax data prepare --help`, and so on, explains each action. `gptjax help data` explains the formats.",
        ),
    ),
    "data prepare": Page(
        about="Tokenizes the text of data.source and caches the tokens, which training runs then reuse.",
        usage=f"gptjax data prepare {CONFIG_USAGE}",
        examples=(
            ("gptjax data prepare tiny-gpt2", "Tokenize text that comes with Python."),
            (
                "seq 1000 > my.txt; gptjax data prepare tiny-gpt2 data.source=my.txt data.val_fraction=0.2",
                "Tokenize a file of your own and hold out a fifth of it for validation.",
            ),
            (
                "gptjax data prepare tiny-gpt2 tokenizer.name=bpe tokenizer.vocab_size=500",
                "Train a BPE tokenizer on the text first.",
            ),
        ),
        options=SWITCHES,
        settings=("data.*", "tokenizer.*"),
        reads="pretrain",
        preset="shakespeare-char",
        tasks=("pretrain",),
        notes=("Without a preset it uses shakespeare-char, whose text is downloaded once.", LAYERS),
    ),
    "data inspect": Page(
        about="Tokenizes like `gptjax data prepare`, and prints the first tokens of the first batch and their targets."
        " With a config of `finetune instruct` it prints one conversation, as it is trained.",
        usage=f"gptjax data inspect {CONFIG_USAGE}",
        needs=(BASE,),
        examples=(
            ("gptjax data inspect tiny-gpt2", "Show text that comes with Python as bytes."),
            (
                "gptjax data inspect tiny-gpt2 tokenizer.name=bpe tokenizer.vocab_size=500",
                "Show the same text as tokens of a BPE vocabulary.",
            ),
            (
                "gptjax data inspect instruct finetune.base=runs/base",
                "Show a conversation of `gptjax finetune instruct`: the tokens in the loss, and its branches.",
            ),
        ),
        options=SWITCHES,
        settings=("data.*", "tokenizer.*", "seed", "model.context_length", "train.batch_size"),
        reads="pretrain",
        preset="shakespeare-char",
        tasks=("pretrain",),
        notes=("Without a preset it uses shakespeare-char, whose text is downloaded once.", LAYERS),
    ),
    "data check": Page(
        about="Reports duplicates, near duplicates, secrets and personal data in files that belong to one data set,"
        " such as its training and its test split.",
        usage="gptjax data check FILE [FILE ...] [field=NAME] [threshold=X] [near=false] [model=MODEL]"
        " [out=REPORT.json]",
        needs=(CSV, TINY),
        examples=(
            ("gptjax data check my.csv near=false", "Look for exact duplicates and secrets."),
            (
                "gptjax data check my.csv near=false field=text out=report.json",
                "Read only one column, and write all findings to a file.",
            ),
            (
                "gptjax data check my.csv near=false model=runs/tiny-gpt2",
                "Also report texts that are unusual for a model.",
            ),
        ),
        options=(
            Option("field=", "NAME", "Read only this column or JSON key. Default: all text of a record."),
            Option(
                "threshold=",
                "X",
                "Jaccard similarity from which two texts are near duplicates, above 0 and at most 1. Default: 0.8.",
            ),
            Option(
                "near=",
                "false",
                "Find exact duplicates only. Near duplicates need pip install -e '.[check]' in the checkout.",
                ("true", "false"),
            ),
            Option("model=", "MODEL", "Also report texts whose cross-entropy under this model is unusual."),
            Option("out=", "REPORT.json", "Write all findings to a new file."),
        ),
        notes=(
            "The command reads .txt files, in which each paragraph is a record, and .tsv, .csv, .json, .jsonl and"
            " .parquet files. The exit code is 0 even if something is found.",
        ),
    ),
    "presets": Page(
        about="Lists, prints or copies the presets: files of settings that come with gptjax.",
        usage="gptjax presets ls\ngptjax presets show PRESET\ngptjax presets cp PRESET FILE.yaml",
        examples=(
            ("gptjax presets ls", "List the presets."),
            ("gptjax presets show tiny-gpt2", "Print a preset."),
            ("gptjax presets cp tiny-gpt2 mine.yaml", "Copy a preset to change it: gptjax pretrain mine.yaml."),
        ),
    ),
    "presets ls": Page(
        about="Lists the presets, with one line about each preset.",
        usage="gptjax presets ls",
        examples=(
            ("gptjax presets ls", "List all presets."),
            ("gptjax presets", "Do the same, because ls is the default action."),
            ("gptjax presets ls | grep GPT-2", "Find the presets of one model."),
        ),
    ),
    "presets show": Page(
        about="Prints a preset. Its first lines say what it is for, which result to expect and how long it takes.",
        usage="gptjax presets show PRESET",
        examples=(
            ("gptjax presets show shakespeare-char", "Print the default preset of `gptjax pretrain`."),
            ("gptjax presets show instruct", "Print the default preset of `gptjax finetune instruct`."),
            ("gptjax presets show tiny-gpt2 | head -n 8", "Print only what a preset is for."),
        ),
        tasks=TASKS,
    ),
    "presets cp": Page(
        about="Copies a preset to a new file, which can then be changed and run.",
        usage="gptjax presets cp PRESET FILE.yaml",
        examples=(
            ("gptjax presets cp tiny-gpt2 mine.yaml", "Copy a preset; run it with `gptjax pretrain mine.yaml`."),
            (
                "mkdir -p configs; gptjax presets cp tiny-llama configs",
                "Copy a preset into a folder, as configs/tiny-llama.yaml.",
            ),
            (
                "gptjax presets cp instruct chat.yaml && gptjax finetune instruct chat.yaml --print-config",
                "Copy a fine-tuning preset and print all its settings.",
            ),
        ),
        tasks=TASKS,
        notes=("Nothing is overwritten: FILE.yaml must be new.",),
    ),
    "doctor": Page(
        about="Checks the installation: package versions, devices and drivers, cached files and folders. It ends with"
        " exit code 2 and says what to do if something is wrong.",
        usage="gptjax doctor",
        examples=(
            ("gptjax doctor", "Check this machine."),
            ("JAX_PLATFORMS=cpu gptjax doctor", "Check this machine for runs on the CPU."),
            ("GPTJAX_CACHE=cache gptjax doctor", "Check this machine with another folder for downloads and tokens."),
        ),
    ),
    "help": Page(
        about="Explains a topic or a command. Without an argument it lists the topics and the commands.",
        usage="gptjax help [TOPIC | COMMAND [ACTION]]",
        examples=(
            ("gptjax help", "List the topics and the commands."),
            ("gptjax help runs", "Explain what is in a run directory."),
            ("gptjax help data check", "Do the same as `gptjax data check --help`."),
        ),
    ),
    "completion": Page(
        about="Prints a script with which the shell completes commands, presets, settings and their values when you"
        " press TAB.",
        usage="gptjax completion bash|zsh|fish",
        examples=(
            ("gptjax completion bash", "Print the script for bash."),
            ('eval "$(gptjax completion bash)"', "Turn completion on in this bash."),
            ("mkdir -p completions; gptjax completion fish > completions/gptjax.fish", "Write the script for fish."),
        ),
        notes=(
            """bash: add this line to ~/.bashrc, and open a new terminal:
  eval "$(gptjax completion bash)\"""",
            """zsh: add these lines to ~/.zshrc, and open a new terminal:
  autoload -Uz compinit && compinit
  eval "$(gptjax completion zsh)\"""",
            """fish: add this line to ~/.config/fish/config.fish, and open a new terminal:
  gptjax completion fish | source""",
            "Settings are completed in two steps, section and name: `gptjax pretrain opt` TAB gives optim., and"
            " `optim.na` TAB gives optim.name=. After the = the allowed values of the setting are completed, or file"
            " names if the setting has no fixed values.",
        ),
    ),
}
