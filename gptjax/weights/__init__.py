"""Parameters in and out of files."""

from gptjax.weights.door import export_gguf, export_hf, export_stablehlo, load, load_tokenizer, open_model, stop_ids
from gptjax.weights.native import save

__all__ = ["export_gguf", "export_hf", "export_stablehlo", "load", "load_tokenizer", "open_model", "save", "stop_ids"]
