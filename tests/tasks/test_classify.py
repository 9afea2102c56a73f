"""`gptjax finetune classify` with a tiny base model, from the data file to the classifier; classification metrics."""

import json
import shutil

import jax
import numpy as np
import pytest

import gptjax
from gptjax import weights
from gptjax.__main__ import main
from gptjax.evaluation import classification as metrics
from gptjax.evaluation.intervals import interval
from gptjax.tasks import classify
from gptjax.tasks.classify import classify_texts
from gptjax.training.run_dir import read_metrics

BASE = gptjax.ModelConfig(arch="llama", n_layer=2, n_head=2, d_model=32, d_ff=48, context_length=32, vocab_size=257)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify")
    params = gptjax.init_params(jax.random.key(0), BASE)
    gptjax.save(folder / "base", params, BASE, gptjax.tokenizers.load("bytes"))
    rng = np.random.default_rng(0)
    rows = [("up", "".join(rng.choice(list("ABCDEF"), 6))) for _ in range(60)]
    rows += [("down", "".join(rng.choice(list("abcdef"), 6))) for _ in range(60)]
    (folder / "data.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    return folder


def run(folder, name, *more):
    more = more if any(setting.startswith("classify.bias") for setting in more) else ("classify.bias=true", *more)
    adapter = [] if any(setting.startswith("finetune.trainable") for setting in more) else ["lora.rank=4"]
    return main(
        [
            "finetune", "classify", f"classify.source={folder / 'data.tsv'}", f"finetune.base={folder / 'base'}",
            f"run_dir={folder / name}", "train.epochs=null", "train.max_steps=30", "train.eval_every=15",
            "train.checkpoint_every=15", "optim.lr=1e-2", "optim.warmup_steps=2", *adapter, *more,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(folder):
    assert run(folder, "lora") == 0
    return folder / "lora"


def test_the_run_directory_holds_results_plots_and_labels(finished):
    scores = json.loads((finished / "test.json").read_text())
    assert scores["accuracy"] >= 0.9 and scores["n"] == 24
    assert set(scores) >= {"naive_bayes", "majority", "macro_f1", "calibration_error", "confusion", "leaked"}
    assert (finished / "confusion.png").read_bytes().startswith(b"\x89PNG")
    last = [row for row in read_metrics(finished) if "val/accuracy" in row][-1]
    assert last["val/accuracy"] >= 0.9 and "val/perplexity" not in last
    assert json.loads((finished / "final" / "labels.json").read_text())["labels"] == ["down", "up"]


def test_the_head_is_saved_and_loaded(finished):
    params, cfg = gptjax.load(finished)
    assert cfg.n_classes == 2 and params["cls_head"]["kernel"].shape == (32, 2)
    up, down = classify_texts(finished, ["ABCABC", "fedfed"])
    assert up["up"] > 0.5 > down["up"]
    assert sum(up.values()) == pytest.approx(1)


def test_the_adapter_is_also_saved_in_the_format_of_peft(finished, folder):
    """Merged into the base, it gives the weights of the final model, except the classification head."""
    base, cfg = gptjax.load(folder / "base")
    adapter, settings = weights.load_peft(finished / "final" / "adapter", cfg, base=base)
    merged, final = gptjax.lora.merge(base, adapter, settings), gptjax.load(finished)[0]
    final.pop("cls_head")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), merged, final)


def test_the_verb_classify(finished, folder, capsys):
    assert main(["classify", str(finished), "ABCABC", "fedfed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("up ") and lines[1].startswith("down ")
    assert main(["classify", str(folder / "base"), "x"]) == 2
    assert "is not a classifier" in capsys.readouterr().err
    assert main(["classify", str(finished)]) == 2


def test_a_finished_run_is_not_repeated(finished, folder, capsys):
    assert run(folder, "lora") == 0
    out = capsys.readouterr().out
    assert "is finished" in out and "accuracy" in out
    assert run(folder, "lora", "lora.alpha=3") == 2
    assert "lora.alpha: 3" in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(finished, folder, capsys):
    """Resumed from the checkpoint of step 15, it ends with bitwise equal weights."""
    shutil.copytree(finished, folder / "again")
    for name in ("final", "checkpoints/30"):
        shutil.rmtree(folder / "again" / name)
    (folder / "again" / "test.json").unlink()
    assert run(folder, "again") == 0
    assert "resuming from step 15" in capsys.readouterr().out
    for name in ("final/model.safetensors", "final/adapter/adapter_model.safetensors", "test.json"):
        assert (folder / "again" / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.slow
def test_several_seeds(folder, capsys):
    assert run(folder, "seeds", "finetune.seeds=2", "train.max_steps=15") == 0
    assert "95 % interval" in capsys.readouterr().out
    table = json.loads((folder / "seeds" / "seeds.json").read_text())
    scores = [json.loads((folder / "seeds" / f"seed-{k}" / "test.json").read_text()) for k in (0, 1)]
    low, high = table["accuracy"]["interval"]
    assert table["accuracy"]["values"] == [row["accuracy"] for row in scores] and low <= scores[0]["accuracy"] <= high


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize(
    "settings",
    [
        ["finetune.trainable=all", "optim.lr=3e-3"],
        ["finetune.trainable=blocks/1/** | ln_f/**"],
        ["finetune.quantize=nf4", "lora.dora=true"],
        ["lora.init=pissa", "classify.pooling=mean"],
        ["lora.miss=true", "lora.dropout=0.1"],
        ["lora.dropout=0.1", "lora.lr_ratio=4", "classify.split=grouped", "classify.deduplicate=false"],
    ],
    ids=["full", "last layer", "qdora", "pissa", "miss", "dropout"],
)
def test_other_settings(folder, settings, capsys, tmp_path):
    assert run(folder, tmp_path / "run", "train.max_steps=4", "train.eval_every=4", *settings) == 0
    assert "naive Bayes" in capsys.readouterr().out
    assert gptjax.load(tmp_path / "run")[1].n_classes == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["lora.targets=blocks/attn/w/*"], "matches no weight; there are"),
        (["finetune.trainable=blocks/9/*"], "finetune.trainable: 'blocks_9/*' matches no parameter"),
        (["finetune.trainable=all", "finetune.quantize=int8"], "quantised weights cannot be trained"),
        (["finetune.base=absent"], "no such run"),
        (["classify.labels=[up, dwn]"], "unknown label 'down'"),
        (["classify.val_fraction=0.5", "classify.test_fraction=0.5"], "leave no data to train on"),
        (["task=pretrain"], "this is gptjax finetune classify; use gptjax pretrain"),
    ],
)
def test_mistakes(folder, settings, words, capsys, tmp_path):
    assert run(folder, tmp_path / "run", *settings) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_dry_run(folder, capsys, tmp_path):
    assert run(folder, tmp_path / "run", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "84 + 12 + 24 texts" in out and "trained" in out
    assert not (tmp_path / "run").exists()


def test_the_confusion_table_names_its_axes():
    scores = {"n": 9, "accuracy": 1, "accuracy_interval": [0, 1], "macro_f1": 1, "calibration_error": 0}
    scores |= {"naive_bayes": 1, "majority": 1, "labels": ["ham", "unwanted"], "confusion": [[812, 3], [5, 110]]}
    assert classify.summary(scores)[2:] == [
        "        true \\ predicted    ham unwanted",
        "                     ham    812        3",
        "                unwanted      5      110",
    ]


def test_metrics():
    labels, p = np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]])
    scores = metrics.report(p, labels, ("a", "b"))
    assert scores["confusion"] == [[1, 1], [0, 2]] and scores["accuracy"] == 0.75
    assert scores["f1"] == pytest.approx({"a": 2 / 3, "b": 0.8})
    assert scores["calibration_error"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.3) / 4)
    low, high = interval(285, 300)  # the 95 % Wilson interval, computed by hand
    assert (low, high) == pytest.approx((0.9191, 0.9694), abs=1e-3)


@pytest.mark.slow
def test_a_classifier_with_default_settings_survives_an_export_to_hugging_face(folder, tmp_path, capsys):
    assert run(folder, "default", "classify.bias=false", "train.max_steps=5", "optim.warmup_steps=0") == 0
    assert main(["export", "hf", str(folder / "default"), str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["id2label"] == {"0": "down", "1": "up"}
    before, after = classify_texts(folder / "default", ["ABCABC"]), classify_texts(tmp_path / "hf", ["ABCABC"])
    assert before[0] == pytest.approx(after[0], abs=1e-5)
    assert main(["export", "peft", str(folder / "default"), str(tmp_path / "peft")]) == 0
    assert "bias" not in capsys.readouterr().err


@pytest.mark.slow
def test_the_adapter_is_exported_for_peft(finished, folder, tmp_path, capsys):
    assert main(["export", "peft", str(finished), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "peft.PeftModel.from_pretrained" in printed.out and "AutoModelForSequenceClassification" in printed.out
    assert "classify.bias=false" in printed.err and f"gptjax export hf {folder / 'base'}" in printed.err
    base, cfg = gptjax.load(folder / "base")
    ours, settings = weights.load_peft(tmp_path / "out", cfg, base=base)
    kept, _ = weights.load_peft(finished / "final" / "adapter", cfg)
    assert settings.rank == 4 and jax.tree.all(jax.tree.map(np.array_equal, ours, kept))
    assert main(["export", "peft", str(finished), str(tmp_path / "out")]) == 2  # nothing is overwritten
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", "peft", str(folder / "base"), str(tmp_path / "none")]) == 2
    assert "only fine-tuning makes one" in capsys.readouterr().err
    copied = tmp_path / "copied"
    shutil.copytree(finished, copied, ignore=shutil.ignore_patterns("adapter", "checkpoints"))
    config = (copied / "config.yaml").read_text()
    assert main(["export", "peft", str(copied), str(tmp_path / "none")]) == 2
    assert "peft's format cannot hold it" in capsys.readouterr().err
    (copied / "config.yaml").write_text(config.replace("trainable: lora", "trainable: all"))
    assert main(["export", "peft", str(copied), str(tmp_path / "none")]) == 2
    assert "finetune.trainable=all" in capsys.readouterr().err
