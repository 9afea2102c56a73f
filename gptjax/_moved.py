"""Keeps deprecated import paths working for one more release, with a DeprecationWarning that names the new path.

To move a module, call `git mv`, change the imports in this repository, and add an entry to MOVED. An entry for a
package in MOVED also applies to all modules of the package that have no separate entry. To rename a function or
constant, or to move it to another module, add an entry to NAMES; if the old module of the function or constant still
exists, the function `__getattr__` of the old module must call `moved_name`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

MOVED: dict[str, str] = {  # maps the old path of each moved module to its new path
    "gptjax.config_io": "gptjax.config.leaves",
    "gptjax.config_uses": "gptjax.config.uses",
    "gptjax.data.check": "gptjax.data.quality",
    "gptjax.data.instructions": "gptjax.data.conversations",
    "gptjax.data.labelled": "gptjax.data.classification",
    "gptjax.data.records": "gptjax.formats.tables",
    "gptjax.data.skills": "gptjax.data.synthetic",
    "gptjax.finetuning": "gptjax.tasks",
    "gptjax.finetuning.answers": "gptjax.evaluation.generation_metrics",
    "gptjax.finetuning.base": "gptjax.tasks.trainable",
    "gptjax.finetuning.judge": "gptjax.evaluation.judge",
    "gptjax.finetuning.metrics": "gptjax.evaluation.classification",
    "gptjax.finetuning.score": "gptjax.evaluation.perplexity",
    "gptjax.research.report": "gptjax.research.audit.report",
    "gptjax.research.shelf": "gptjax.research.architectures",
    "gptjax.training.job": "gptjax.training.task",
    "gptjax.gguf": "gptjax.formats.gguf",
    "gptjax.lora.leaf": "gptjax.lora.weight",
    "gptjax.ops.feed_forward": "gptjax.from_scratch",
    "gptjax.weights.door": "gptjax.weights",
    "gptjax.weights.llama_cpp": "gptjax.weights.gguf",
    "gptjax.weights.safetensors": "gptjax.formats.safetensors",
    "gptjax.weights.tensorflow": "gptjax.formats.tensorflow",
}
NAMES: dict[str, str] = {  # maps the old path of each moved function or constant to its new path
    "gptjax.checkpoint.AT_LEAST": "gptjax.checkpoint.MIN_KEEP",
    "gptjax.config_io.ALIASES": "gptjax.config.aliases.ALIASES",
    "gptjax.config_io.did_you_mean": "gptjax.errors.did_you_mean",
    "gptjax.config_io.unknown_key": "gptjax.config.aliases.unknown_key",
    "gptjax.data.classification.Splits": "gptjax.data.split.LabelledSplits",
    "gptjax.data.classification.split": "gptjax.data.split.split_labelled",
    "gptjax.data.conversations.MARKS": "gptjax.data.conversations.LOSS_FLAGS",
    "gptjax.data.conversations.Piece": "gptjax.data.conversations.Span",
    "gptjax.data.conversations.TOGETHER": "gptjax.data.conversations.RENDER_BATCH",
    "gptjax.data.preferences.SIDES": "gptjax.data.preferences.RESPONSES",
    "gptjax.data.sources.Part": "gptjax.data.split.Subset",
    "gptjax.data.sources.split": "gptjax.data.split.split_documents",
    "gptjax.data.split.Part": "gptjax.data.split.Subset",
    "gptjax.evaluation.generation_metrics.held": "gptjax.evaluation.generation_metrics.is_met",
    "gptjax.generation.decode.read_prompts": "gptjax.generation.decode.prefill",
    "gptjax.generation.pieces": "gptjax.generation.text_chunks",
    "gptjax.generation.speculative.repeated": "gptjax.generation.speculative.prompt_lookup",
    "gptjax.generation.text.pieces": "gptjax.generation.text.text_chunks",
    "gptjax.lora.adapter.masked": "gptjax.lora.truncate_rank",
    "gptjax.lora.adapter.split": "gptjax.lora.init_from_weights",
    "gptjax.lora.adapter.unsplit": "gptjax.lora.to_lora",
    "gptjax.lora.masked": "gptjax.lora.truncate_rank",
    "gptjax.lora.split": "gptjax.lora.init_from_weights",
    "gptjax.lora.unsplit": "gptjax.lora.to_lora",
    "gptjax.model.activations.in_blocks": "gptjax.model.activations.block_taps",
    "gptjax.model.activations.of_all_layers": "gptjax.model.activations.stacked_patches",
    "gptjax.model.activations.of_one_layer": "gptjax.model.activations.layer_patches",
    "gptjax.model.gpt.layers_apart": "gptjax.model.gpt.unstack_layers",
    "gptjax.model.gpt.layers_stacked": "gptjax.model.gpt.stack_layers",
    "gptjax.planning.program.bytes_a_chip": "gptjax.planning.program.bytes_per_chip",
    "gptjax.parallel.distributed.together": "gptjax.parallel.distributed.synchronise_errors",
    "gptjax.research.influence.just_trained": "gptjax.training.task.identity",
    **{
        f"gptjax.tasks.classify.{old}": f"gptjax.tasks.classify.{new}"
        for old, new in {
            "AT_ONCE": "BATCH_SIZE",
            "ROW_TOKENS": "BATCH_TOKENS",
            "TEXT": "MIN_TEXT_TOKENS",
            "WIDTH": "PAD_TO",
        }.items()
    },
    "gptjax.tasks.classify.class_logits": "gptjax.losses.class_logits",
    "gptjax.tasks.classify.task": "gptjax.losses.classify",
    "gptjax.tasks.prefer.PAIR": "gptjax.tasks.prefer.MIN_PAIR_TOKENS",
    "gptjax.tasks.prefer.log_probs": "gptjax.losses.answer_log_probs",
    "gptjax.tasks.prefer.task": "gptjax.losses.preference",
    "gptjax.tasks.pretrain.task": "gptjax.losses.next_token",
    "gptjax.tasks.pretrain.token_log_probs": "gptjax.losses.token_log_probs",
    "gptjax.tasks.seeds.several": "gptjax.tasks.seeds.over_seeds",
    "gptjax.tasks.seeds.together": "gptjax.tasks.seeds.is_vmapped",
    "gptjax.tasks.trainable.rules": "gptjax.tasks.trainable.step_functions",
    "gptjax.training.loop.train": "gptjax.tasks.train",
    "gptjax.training.plot.LONGEST_LABEL": "gptjax.training.plot.MAX_LABEL_LENGTH",
    "gptjax.training.plot.MOST_LABELS": "gptjax.training.plot.MAX_LABELS",
    "gptjax.training.plot.MOST_NEIGHBOURS": "gptjax.training.plot.MAX_NEIGHBOURS",
    "gptjax.training.task.Rules": "gptjax.training.task.StepFunctions",
    "gptjax.training.task.just_trained": "gptjax.training.task.identity",
    "gptjax.tree.idle": "gptjax.tree.unmatched",
    **{
        f"gptjax.data.conversations.{name}": f"gptjax.tokenizers.chat.{name}"
        for name in ("STYLES", "Style", "default_style", "describe_style", "styled")
    },
    **{
        f"gptjax.ops.attention.{name}": f"gptjax.from_scratch.{name}"
        for name in ("causal_mask", "simple_attention", "multi_head_attention")
    },
    **{f"gptjax.data.classification.{name}": f"gptjax.formats.tables.{name}" for name in ("LABEL", "TEXT", "tsv")},
    **{f"gptjax.data.sources.{name}": f"gptjax.data.split.{name}" for name in ("Sizes", "hold_out", "measure")},
    **{
        f"gptjax.data.sources.{name}": f"gptjax.formats.tables.{name}"
        for name in ("BOM", "MAX_FIELD_CHARACTERS", "first_line", "hub_name", "kind_of", "lines", "names", "quoted")
    },
    **{
        f"gptjax.research.{old}": f"gptjax.research.{new}"
        for old, new in {
            "architectures.attention.joined": "architectures.attention.project_output",
            "architectures.attention.projected": "architectures.attention.project_qkv",
            "audit.FEWEST": "audit.MIN_DOCUMENTS",
            "audit.Snapshot": "audit.Checkpoint",
            "audit.alike": "audit.random_candidates",
            "audit.pieces": "audit.chunks",
            "audit.snapshots": "audit.checkpoints",
            "audit.trigger": "audit.backdoor_trigger",
            "curvature.along": "curvature.linear_interpolation",
            "curvature.at": "curvature.loss_on_batch",
            "influence.both": "privacy.pair",
            "influence.drawn": "privacy.poisson_sample",
            "influence.epsilon": "privacy.epsilon",
            "influence.noise_for": "privacy.noise_for",
            "influence.private": "privacy.private",
            "privacy.both": "privacy.pair",
            "privacy.drawn": "privacy.poisson_sample",
            "sweep.LAST_PART": "sweep.FINAL_FRACTION",
            "sweep.MOST_COMPLAINTS": "sweep.MAX_PROBLEMS",
            "sweep.MOST_RUNS": "sweep.MAX_RUNS",
            "sweep.MOST_STEPS_PER_CALL": "sweep.MAX_STEPS_PER_CALL",
            "sweep.Numbers": "sweep.Hyperparameters",
            "sweep.WHOLE": "sweep.INTEGERS",
            "sweep.bytes_a_run": "sweep.bytes_per_run",
            "sweep.with_numbers": "sweep.with_hyperparameters",
        }.items()
    },
}


def new_path(name: str) -> str | None:
    """Returns the new path of the module whose old path is `name`, or None if the module was not moved."""
    head, tail = name, ""
    while head:
        if head in MOVED:
            return MOVED[head] + tail
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
    return None


class _Finder:
    """Import hook for moved modules: importing the old path of a module imports the module at its new path, so that no
    module is loaded twice."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        # `_Finder` is also the loader, because it has the methods `create_module` and `exec_module`.
        is_old = name.startswith("gptjax.") and new_path(name)
        return ModuleSpec(name, self) if is_old else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Returns None, so that the import system creates an empty module and passes this module to `exec_module`."""

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, new_path(module.__name__)
        assert new is not None, f"{old} was not moved"
        warnings.warn(f"{old} is now {new}; the old path will be removed in 0.3.0", DeprecationWarning, stacklevel=2)
        found = importlib.import_module(new)
        if not hasattr(found, "__path__") and not any(row.startswith(f"{old}.") for row in (*MOVED, *NAMES)):
            sys.modules[old] = found  # the import system returns sys.modules[old] after `exec_module`
            return
        # `module` is not replaced with `found`, because the contents of the old module may have moved to different
        # modules. The attribute `__path__` makes `module` a package, so that its submodules can be imported from their
        # old paths.
        module.__path__ = []

        def __getattr__(name: str) -> Any:
            child = f"{old}.{name}"
            if child in NAMES:
                return moved_name(old, name)
            is_module = child in MOVED or isinstance(getattr(found, name), ModuleType)
            return importlib.import_module(child) if is_module else getattr(found, name)

        module.__getattr__ = __getattr__  # type: ignore[method-assign]


def install() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # The import finder `_Finder` must come before Python's own finders: the old folder of a moved package may still
        # exist, for example with a __pycache__ in the folder, and Python's own finders would import the folder as a
        # namespace package.
        sys.meta_path.insert(0, _Finder())


def moved_name(module: str, name: str) -> Any:
    """Returns the object that NAMES lists under the old path `module.name`, and issues a DeprecationWarning."""
    old = f"{module}.{name}"
    if old not in NAMES:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new = NAMES[old]
    warnings.warn(f"{old} is now {new}; the old name will be removed in 0.3.0", DeprecationWarning, stacklevel=3)
    home, _, name = new.rpartition(".")
    return getattr(importlib.import_module(home), name)


def old_task(loss: Callable, init_params: Callable) -> Callable[..., SimpleNamespace]:
    """Returns a function `task` as the modules of `gptjax.tasks` defined it in earlier releases: `task(cfg)` returns a
    namespace with the three functions prepare, init and loss."""

    def task(cfg: Any, *args: Any, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(
            prepare=lambda batch: batch, init=lambda key: init_params(key, cfg), loss=loss(cfg, *args, **options)
        )

    return task
