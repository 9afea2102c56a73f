"""Loads, saves and exports models as gptjax folders, Hugging Face folders, GGUF files, PEFT adapters and StableHLO
programs."""

from gptjax.tokenizers import stop_ids
from gptjax.weights.export import export_gguf, export_hf, export_stablehlo
from gptjax.weights.load import Model, load, load_tokenizer, open_model, read_labels
from gptjax.weights.native import fingerprint, save
from gptjax.weights.peft import export_peft, load_peft

__all__ = [
    "Model", "export_gguf", "export_hf", "export_peft", "export_stablehlo", "fingerprint", "load", "load_peft",
    "load_tokenizer", "open_model", "read_labels", "save", "stop_ids",
]  # fmt: skip
