"""Defines the help pages that `gptjax help TOPIC` prints, in a dict from the name of each topic to the title and the
text of its help page. The guides in colab/guides explain the same topics in more detail."""

from __future__ import annotations

CONFIG = """\
Every setting has a section and a name, such as optim.lr or model.n_layer. The
value that is used is the last one in this order:

  1. the default of gptjax
  2. the default of the model family (model.arch)
  3. a preset, which is a file of settings that comes with gptjax
  4. your own YAML file
  5. section.name=value on the command line

  gptjax pretrain tiny-gpt2 optim.lr=1e-3 train.max_steps=200

tiny-gpt2 is the preset here. `gptjax presets ls` lists all of them, `gptjax
presets cp tiny-gpt2 mine.yaml` copies one. Without a preset, a command uses the
default preset that its --help names.

A file of your own
  The file holds only the settings that differ from those of the preset or file
  that `base:` names:

    # mine.yaml
    base: tiny-gpt2
    model:
      n_layer: 6
    optim:
      lr: 1e-3

  gptjax pretrain mine.yaml train.max_steps=200

  A run directory can be given instead of a file; its config.yaml is then read:
  gptjax pretrain runs/tiny-gpt2 seed=1 run_dir=runs/seed-1

Values
  numbers          3, 0.1, 1e-3; 1e3 also for whole numbers
  yes and no       true, false
  lists            data.source=[a.txt,b.txt]; in most shells quote the brackets:
                   'data.source=[a.txt,b.txt]'
  no value         null, for settings whose help text says what null means
  --optim.lr=1e-3 and --optim.lr 1e-3 are the same as optim.lr=1e-3.

What is used
  --print-config   print every setting, its value and where it comes from
  --dry-run        check the settings and the data and show what would be done
  gptjax COMMAND --help   list the settings of a command, with their meaning

  Unknown names, values of a wrong type and combinations that cannot work are
  reported all at once, with the name that was probably meant. A setting that
  the command would not use is an error, too.

Environment variables
  GPTJAX_CACHE     folder for downloads and tokens (`gptjax doctor` shows it)
  JAX_PLATFORMS    the devices to use, for example cpu
"""

DATA = """\
Files are UTF-8 text. hf:ORG/NAME is a data set of the Hugging Face Hub. A record
of another form is an error that names the file and the line; no record is left
out silently.

Pretraining: data.source
  .txt .md                 one document per file
  .jsonl .csv .parquet     one document per record, in the field data.text_field
                           (default: text)
  a folder                 its .txt and .md files at any depth; if it has none,
                           its .jsonl, .csv and .parquet files
  shakespeare, python-docs, ..   texts that gptjax knows: `gptjax doctor` lists
                           them; python-docs needs no network
  Several sources: 'data.source=[a.txt,b.jsonl]'

    {"text": "One document."}
    {"text": "Another document."}

  A tenth of the text is held out for validation (data.val_fraction): whole
  documents if there are ten or more, else the end of each file. data.val_source
  names other validation text instead.

Classification: classify.source (.csv .tsv .jsonl .json .parquet)
  A column of texts and a column of labels. Columns with usual names, such as
  text and label, are found; classify.text_field and classify.label_field name
  other columns. A .tsv file without a header has the columns label and text.

    text,label
    You have won a prize,spam

Instructions: instruct.source (.jsonl .json .csv .parquet)
  Each record has one of these forms:

    {"instruction": "Translate to French.", "input": "Good night", "output": "Bonne nuit"}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
    {"prompt": "2 + 2 =", "completion": " 4"}
    {"prompt": "2 + 2 =", "response": "4"}

  system, history and tools may be added. An answer may have tool_calls and
  reasoning_content, and messages of role tool may follow it. "weight" is the loss
  weight of an answer; with weight 0 it is read as context.

Preferences: prefer.source, reward_model.source (.jsonl .json .csv .parquet)

    {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A saw."}

  prompt, chosen and rejected may also be lists of messages. Scored answers, as in
  rollouts.jsonl of `gptjax finetune reward`, become pairs of the best and every
  worse answer to a prompt: {"prompt": "2 + 2 =", "answer": "5", "reward": 0}

Rewards: reward.source (.jsonl .json .csv .parquet)
  The formats of instruct.source. The last message of a record is the expected
  answer. A reward function gets the prompt, the answer of the model, and a
  dict with the keys prompt, expected, constraints, ..:

    def score(prompt, answer, example):
        return float(example["expected"] in answer)

  reward.functions=[mine.py:score,length:50] adds up two functions. These are
  built in: exact, normalised, number, boxed, format, format:REGEX, length:N,
  constraints and judge:MODEL@URL. A function runs in a process of its own; an
  answer for which it fails is counted and left out.
Distillation: distill.source has the formats of instruct.source, or plain text
  (.txt, .md, a folder), which has no prompts for distill.on_policy.

Look at the result before you train: gptjax data inspect data.source=my.txt shows
the first tokens; gptjax data check my.jsonl finds duplicates and secrets (near
duplicates need the extra [check]). See also gptjax data --help.
"""

RUNS = """\
A training run writes everything into one folder, run_dir. The default is runs/
and the name of the preset or file: runs/tiny-gpt2.

  config.yaml         every setting
  environment.json    versions, devices and the command
  metrics.jsonl       one JSON object per line: step, train/loss, val/loss, ..
  log.txt             what was printed
  loss.png            training and validation loss
  samples.txt         text that was generated at each evaluation
  checkpoints/        states to resume from
  final/              the model after the last step
  best/               the model with the lowest validation loss; finetune reward:
                      with the highest validation reward
  test.json           fine-tuning: scores on the test set
  responses.jsonl     finetune instruct: answers to the test questions;
                      responses-before.jsonl has those of the base model
  rollouts.jsonl      finetune reward, distill.on_policy: the answers that it was
                      trained on, with their rewards
  confusion.png       finetune classify: predicted and true classes
  seed-0/, seeds.json     with finetune.seeds: a run per seed, and their mean

Use a run
  Wherever a command takes a model, give the run directory: its final/ is used.

    gptjax sample runs/tiny-gpt2 --prompt "The "
    gptjax pretrain pretrain.base=runs/tiny-gpt2 run_dir=runs/continued

  final/ and best/ hold weights, settings and tokenizer, and can be moved.
  An adapter on a model that can be fetched again (smollm2-135m-instruct
  or hf:ORG/NAME) is saved without that model; finetune.save_merged=true saves
  all weights.

Interrupt and resume
  Ctrl-C saves a checkpoint and ends the run. The same command continues the run;
  on the same versions and devices the result is bitwise equal to that of a run
  without an interruption. A damaged checkpoint is set aside, and the checkpoint
  before it is used.

  If run_dir holds a run with other settings, the command stops and shows the
  differences: choose another run_dir. Nothing is overwritten. A run can be made
  longer with a larger train.max_steps if optim.schedule is constant, or wsd and
  the decay has not begun; otherwise start a new run with pretrain.base=RUN. A run
  that train.patience stopped early goes on with a larger train.patience.

Exit codes
  0      done
  1      a bug: please report the traceback
  2      wrong input or environment; the message says what was expected
  3      stopped: the loss or a gradient was not finite in several steps in a row
         (train.max_nonfinite)
  75     in a run with several processes, one died or hangs; start all of them again
  130    Ctrl-C; what was trained is saved
  143    SIGTERM; what was trained is saved
"""

TOPICS: dict[str, tuple[str, str]] = {
    "config": ("Settings, presets and YAML files", CONFIG),
    "data": ("Formats of the training data", DATA),
    "runs": ("Run directories, resuming, exit codes", RUNS),
}
