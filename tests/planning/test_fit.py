"""Tests of `train.batch_size=auto`, the largest batch size that fits the memory."""

import pytest

import gptjax
from gptjax.__main__ import main
from gptjax.config import load_config
from gptjax.errors import UserError
from gptjax.planning import fit
from gptjax.training.memory import activation_bytes


def test_the_largest_batch_size_that_fits(monkeypatch):
    """More memory gives more rows, up to 524,288 tokens; if few rows fit, rematerialisation is switched on."""
    results = []
    for gib in (4, 8, 16, 80, 1000):
        monkeypatch.setattr(fit, "device_bytes", lambda gib=gib: gib * 2**30)
        cfg = fit.fitted(load_config("gpt2-124m", "train.batch_size=1", "train.accumulation=1"))
        results.append((cfg.train.batch_size, cfg.model.remat))
        assert activation_bytes(cfg.model, cfg.train.batch_size, 1024) + 16 * 124e6 < gib * 2**30
    rows = [n for n, _ in results]
    assert rows == sorted(rows) and results[-1] == (512, "none") and results[0][1] != "none"


def test_the_batch_size_is_a_multiple_of_the_micro_batches(monkeypatch):
    monkeypatch.setattr(fit, "device_bytes", lambda: 16 * 2**30)
    cfg = fit.fitted(load_config("gpt2-124m"))
    assert cfg.train.accumulation == 40 and cfg.train.batch_size % 40 == 0


def test_lora_fits_more_rows_than_full_fine_tuning(monkeypatch, tmp_path, tiny):
    cfg, params = tiny("llama", d_model=512, n_layer=4, context_length=512, vocab_size=257)
    gptjax.save(tmp_path / "base", params, cfg, gptjax.tokenizers.load("bytes"))
    monkeypatch.setattr(fit, "device_bytes", lambda: 2**27)
    settings = ("task=instruct", f"finetune.base={tmp_path / 'base'}", "instruct.source=x.json")
    rows = [
        fit.fitted(load_config("instruct", *settings, f"finetune.trainable={trainable}")).train.batch_size
        for trainable in ("all", "lora")
    ]
    assert rows[1] > rows[0] >= 1


def test_errors(monkeypatch):
    monkeypatch.setattr(fit, "device_bytes", lambda: 2**30)
    with pytest.raises(UserError, match="train.batch_size=auto: not even one row of 1024 tokens .* fits 1.0 GiB"):
        fit.fitted(load_config("gpt2-124m"))
    with pytest.raises(UserError, match="expected a number if several processes share a run"):
        fit.fitted(load_config("gpt2-124m", "distributed.coordinator=auto"))
    with pytest.raises(UserError, match="train.batch_size: expected int, got 'auto'"):
        load_config("gpt2-124m", "train.batch_size=auto")


@pytest.mark.slow
def test_the_batch_size_is_written_to_the_config_of_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fit, "_MOST_TOKENS", 512)
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 300)
    command = [
        "pretrain", "tiny-gpt2", "train.batch_size=auto", f"run_dir={tmp_path / 'run'}", "train.max_steps=2",
        f"data.source={tmp_path / 'text.txt'}", "tokenizer.name=bytes", "model.context_length=32", "data.split=tail",
        "model.n_layer=1", "model.d_model=16", "model.n_head=2",
    ]  # fmt: skip
    assert main([*command, "--dry-run"]) == 0
    assert "512 (16 windows of 32)" in capsys.readouterr().out
    assert main(command) == 0
    assert "batch_size: 16" in (tmp_path / "run" / "config.yaml").read_text()
    assert main(command) == 0 and "is finished" in capsys.readouterr().out
