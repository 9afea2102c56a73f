"""Defines the rules for llama.cpp's tensor names that most model families share.

GGUF files store matrices as [out, in], including the matrices of GPT-2.

Source: llama.cpp's constants.py (names) and convert_hf_to_gguf.py (layouts).
"""

from __future__ import annotations

from gptjax.weights.families.family import biases, kernels, scales
from gptjax.weights.rules import Rule, transposed

BLOCK = "blk.{i}."
_QKV = {f"attn/{x}": f"attn_{x}" for x in "qkv"}
_OUT = {"attn/o": "attn_output"}
_MLP = {f"mlp/{x}": f"ffn_{x}" for x in ("gate", "up", "down")}
TABLES = [Rule("wte/embedding", "token_embd.weight"), Rule("lm_head/kernel", "output.weight", transposed)]
ENDS = [*TABLES, Rule("ln_f/scale", "output_norm.weight")]
QKV = [*kernels(BLOCK, _QKV), *biases(BLOCK, _QKV)]
OUT = [*kernels(BLOCK, _OUT), *biases(BLOCK, _OUT)]
MLP = [*kernels(BLOCK, _MLP), *biases(BLOCK, _MLP)]
PRE = scales(BLOCK, {"ln_1": "attn_norm", "ln_2": "ffn_norm"})
POST = scales(BLOCK, {"ln_1_post": "post_attention_norm", "ln_2_post": "post_ffw_norm"})
QK_NORMS = [Rule(f"blocks/attn/{x}_norm", f"{BLOCK}attn_{x}_norm.weight") for x in "qk"]
