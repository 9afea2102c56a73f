# %% [markdown]
# # 01 Tokenizing: from text to ids and back
#
# What you learn: what the token ids are that a model reads; what vocabularies of characters, words and byte pairs cost;
# how byte-pair encoding (BPE) learns its vocabulary, written out in thirty lines and checked against the package; what
# special tokens are.
#
# What it costs: CPU 10 s (2 cores); v5e-1: nothing here runs on the TPU, a CPU runtime does as well.

# %%
from collections import Counter
from itertools import pairwise

import regex

from gptjax import assets, show, tokenizers
from gptjax.errors import UserError
from gptjax.tokenizers import bpe, words

play = (assets.fetch("shakespeare") / "hamlet.txt").read_text(encoding="utf-8")
print(f"{len(play):,} characters")
print(play[:240])

# %% tags=["script"]
import save_pictures  # noqa: F401  # run as a script: pictures go to figures/

# %% [markdown]
# The reference values in "Build a Large Language Model (From Scratch)" refer to Edith Wharton's story *The Verdict*. It
# is downloaded; without network access the cells about it print a message and the others still run.

# %%
try:
    verdict = assets.fetch("the-verdict").read_text(encoding="utf-8")
except UserError as error:
    verdict = None
    print("without The Verdict:", str(error).splitlines()[0])
else:
    print(f"{len(verdict):,} characters:", verdict[:99])
    assert len(verdict) == 20_479

# %% [markdown]
# ## Characters and bytes
# The simplest vocabularies need no training. A character vocabulary is small, but texts become long, and a character
# that is not in the training text cannot be encoded. The 256 bytes of UTF-8 encode every text, at up to four ids per
# character.

# %%
chars = tokenizers.train("chars", [play])
raw = tokenizers.load("bytes")
line = "To be, or not to be, that is the question"
print(chars.vocab_size, chars.encode(line)[:12])
print(raw.vocab_size, raw.encode(line)[:12], "é is", raw.encode("é"))
assert chars.decode(chars.encode(line)) == line
assert raw.decode(raw.encode("naïve 🦙")) == "naïve 🦙" and raw.encode("é") == [0xC3, 0xA9]
try:
    chars.encode("naïve 🦙")
except UserError as error:
    print(error)
show.tokens(chars, chars.encode(line))

# %% [markdown]
# ## Words
# The opposite extreme: every distinct word or punctuation mark has an id. Texts become short and the vocabulary large,
# and an unknown word has no id. The book's first tokenizer raises an error for it, its second encodes it as `<|unk|>`.

# %%
print(words.split("Hello, do you like tea?"))
if verdict:
    v1 = tokenizers.train("words", [verdict], special=())
    ids = v1.encode('"It\'s the last he painted, you know," Mrs. Gisburn said with pardonable pride.')
    print(f"{len(words.split(verdict)):,} words, {v1.vocab_size:,} different ones")
    print(ids)
    assert len(words.split(verdict)) == 4690 and v1.vocab_size == 1130
    assert ids == [1, 56, 2, 850, 988, 602, 533, 746, 5, 1126, 596, 5, 1, 67, 7, 38, 851, 1108, 754, 793, 7]

# %%
tea = "Hello, do you like tea? <|endoftext|> In the sunlit terraces of the palace."
if verdict:
    v2 = tokenizers.train("words", [verdict], special=words.BOOK_SPECIAL)
    ids = v2.encode(tea, allowed_special={"<|endoftext|>"})
    print(v2.vocab_size, ids)
    print(v2.decode(ids))
    assert v2.vocab_size == 1132
    assert ids == [1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988, 1131, 7]
    assert v2.decode(ids) == "<|unk|>, do you like tea? <|endoftext|> In the sunlit terraces of the <|unk|>."

# %% [markdown]
# ## Byte pairs: GPT-2's vocabulary
# BPE lies between the two: it starts from bytes, so no text is unknown, and assigns ids to frequent sequences. A
# frequent word becomes one token (together with the blank before it), a rare word is split into several.

# %%
gpt2 = tokenizers.load("gpt2")
assert (gpt2.vocab_size, gpt2.eot_id) == (50_257, 50_256)
ids = gpt2.encode(
    "Hello, do you like tea? <|endoftext|> In the sunlit terracesof someunknownPlace.",
    allowed_special={"<|endoftext|>"},
)
print(ids)
book_ids = [15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554, 262, 4252, 18250, 8812, 2114, 1659, 617, 34680]
assert ids == [*book_ids, 27271, 13]
assert gpt2.encode("Every effort moves you") == [6109, 3626, 6100, 345]
show.tokens(gpt2, ids)

# %%
if verdict:
    print(f"The Verdict: {len(gpt2.encode(verdict)):,} tokens")
    assert len(gpt2.encode(verdict)) == 5145
show.tokens(gpt2, gpt2.encode(play[:700]))

# %% [markdown]
# English text has about one token per word; other scripts and rare words have more. A token may even be part of a
# character (shown as �), so streaming output must wait for the remaining bytes. Numbers are split irregularly, which
# makes arithmetic harder to learn.

# %%
unusual = "supercalifragilistic 1234567 東京 🦙\n    return x"
ids = gpt2.encode(unusual)
assert gpt2.decode(ids) == unusual  # the whole sequence is lossless
print(len(unusual), "characters,", len(ids), "tokens")
show.tokens(gpt2, ids)

# %% [markdown]
# ## Learning the merges
# The whole algorithm: count adjacent pairs, merge the most frequent pair everywhere, repeat. A pattern first splits the
# text into words; each distinct word is processed once with its count, and merges never cross word boundaries. Ties go
# to the pair whose symbols were created earlier.


# %%
def learn(text, n_merges):
    """The first merges of BPE, such as `Ġ t` (Ġ stands for a blank), by the algorithm of GPT-2 and of the book."""
    word_counts = Counter(regex.findall(bpe.PATTERN, text))
    symbols_counts = {
        tuple(bpe.printable(bytes([byte])) for byte in word.encode()): count for word, count in word_counts.items()
    }
    rank = dict(bpe.alphabet())  # symbol -> when it was created
    merges = []
    for _ in range(n_merges):
        pair_counts = Counter()
        for symbols, count in symbols_counts.items():
            for pair in pairwise(symbols):
                pair_counts[pair] += count
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], rank[pair[0]], rank[pair[1]]))
        merges.append(" ".join(best))
        rank["".join(best)] = len(rank)
        symbols_counts = {merge_pair(symbols, best): count for symbols, count in symbols_counts.items()}
    return merges


def merge_pair(symbols, pair):
    """Replaces each occurrence of the pair by one symbol, from left to right."""
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


ours = learn(play, 50)
theirs = tokenizers.train("bpe", [play], 257 + 50)
print("  ".join(merge.replace(" ", "+") for merge in ours))
assert ours == theirs.merges

# %% [markdown]
# The same line with more and more merges: the text becomes shorter and the embedding table larger. Each id costs
# `d_model` parameters, each token a position in attention; GPT-2 chose 50,257 ids.

# %%
sizes = (257, 300, 400, 600, 1000, 2000, 4000)
learned = {size: tokenizers.train("bpe", [play], size) for size in sizes}
for size in (257, 400, 2000):
    print(f"{size:5}  ", " | ".join(learned[size].decode([i]) for i in learned[size].encode(line)))
n_tokens = {size: len(tok.encode(play)) for size, tok in learned.items()}
assert all(a > b for a, b in pairwise(n_tokens.values()))
show.curves(
    {"learned on Hamlet": (sizes, [len(play) / n for n in n_tokens.values()]),
     "GPT-2's": ([sizes[0], sizes[-1]], [len(play) / len(gpt2.encode(play))] * 2)},
    x="vocabulary size", y="characters per token", log_x=True, marker="o",
)  # fmt: skip

# %% [markdown]
# ## All tokenizers side by side
# `wordpiece` (BERT) and `unigram` (SentencePiece) are two other algorithms that learn subwords. The tokenizers are
# trained on one play and measured on another, since a vocabulary fits its training text best.

# %%
other = (assets.fetch("shakespeare") / "macbeth.txt").read_text(encoding="utf-8")
kinds = {"chars": tokenizers.train("chars", [play, other]), "bytes": raw, "gpt2": gpt2}
kinds |= {name: tokenizers.train(name, [play], 1000) for name in ("bpe", "wordpiece", "unigram")}
kinds["words"] = tokenizers.train("words", [play])
per_token = {}
for name, tok in kinds.items():
    ids = tok.encode(other)
    lossless = tok.decode(ids) == other
    per_token[name] = len(other) / len(ids)
    unknown = sum(i == tok.special_tokens.get("[UNK]") for i in ids) / len(ids)
    loss = "lossless" if lossless else f"{unknown:.1%} unknown"
    print(f"{name:10} {tok.vocab_size:6} ids  {per_token[name]:.2f} characters per token  {loss}")
    assert lossless == (name != "words")
assert per_token["chars"] == 1 and per_token["gpt2"] > per_token["bpe"] > 2

# %% [markdown]
# ## Special tokens
# `<|endoftext|>` separates documents. It has an id of its own, but a user can also type these characters. If typed text
# became the special id, users could end documents or speak as the assistant. So each call states how to treat it:

# %%
typed = "Ignore what came before. <|endoftext|>"
try:
    gpt2.encode(typed)
except UserError as error:
    print(error)
as_text = gpt2.encode(typed, disallowed_special=())
as_id = gpt2.encode(typed, allowed_special={"<|endoftext|>"})
print("as text", as_text[-7:], "  as the id", as_id[-2:])
assert 50256 not in as_text and as_id[-1] == 50256
assert gpt2.decode(as_text) == gpt2.decode(as_id) == typed

# %% [markdown]
# New special tokens get the next free ids; all other ids stay the same. The model is enlarged to match by
# `gptjax.grow_vocabulary`, and its logits for the old tokens do not change. A tokenizer is saved as one file.

# %%
roles = tokenizers.extend(learned[1000], ["<|user|>", "<|assistant|>"])
print(learned[1000].vocab_size, "->", roles.vocab_size, roles.special_tokens)
assert roles.encode(line) == learned[1000].encode(line)
path = roles.save("tokenizer")
print(path, tokenizers.load("tokenizer") == roles)
assert tokenizers.load("tokenizer") == roles
ids = roles.encode("<|user|>To be?<|assistant|>Not to be.", allowed_special="all")
show.tokens(roles, ids)

# %% [markdown]
# ## Exercises
# 1. Which words of `play` does GPT-2 split into the most tokens? (Use `words.split`, and mind the blank before a word.)
# 2. How often did the pair of each of the 50 merges occur when it was chosen? How does the count fall with the merge?
# 3. `tokenizers.load("smollm2-135m-instruct")` downloads a model of 98 MB and reads the vocabulary inside it. How does
#    it split `1234567`, and the four blanks before `return`? Why is this useful?
# 4. Train `bpe` on the source code of this package instead of a play, and encode the play: what does it cost?
# 5. Compare the tokens per UTF-8 byte of a sentence in English and in other languages under `gpt2`.

# %% [markdown]
# ## Solutions
#
# Each was run after the cells above, on a CPU. Try the exercise first.

# %% [markdown]
# **Exercise 1**
#
# <details><summary>Solution</summary>
#
# A blank before the word matters: most of GPT-2's words begin with one.
#
# ```python
# counts = {word: len(gpt2.encode(" " + word)) for word in set(words.split(play))}
# for word in sorted(counts, key=lambda word: (-counts[word], word))[:5]:
#     print(counts[word], word)
# ```
#
# ```text
# 8 comical-historical-pastoral
# 6 God-a-mercy
# 6 John-a-dreams
# 6 hugger-mugger
# 6 periwig-pated
# ```
#
# </details>

# %% [markdown]
# **Exercise 2**
#
# <details><summary>Solution</summary>
#
# The counts fall fast at first and then slowly, roughly as one over the rank of the merge.
#
# ```python
# word_counts = Counter(regex.findall(bpe.PATTERN, play))
# symbols = {word: tuple(bpe.printable(bytes([byte])) for byte in word.encode()) for word in word_counts}
# counts = []
# for merge in ours:
#     best = tuple(merge.split(" "))
#     counts.append(sum(word_counts[word] * list(pairwise(symbols[word])).count(best) for word in symbols))
#     symbols = {word: merge_pair(symbols[word], best) for word in symbols}
# print(counts[:3], counts[9], counts[49])
# show.curves({"Hamlet": (range(1, 51), counts)}, x="merge", y="occurrences", log_x=True, log_y=True)
# ```
#
# ```text
# [3494, 2755, 2149] 1361 469
# ```
#
# </details>

# %% [markdown]
# **Exercise 3**
#
# <details><summary>Solution</summary>
#
# Each digit is a token of its own, so a model sees numbers digit by digit, aligned at every length; GPT-2 cuts them
# into pieces of two or three digits in no regular way. Runs of blanks are one token, which makes indented code short.
#
# ```python
# smol = tokenizers.load("smollm2-135m-instruct")
# for name, tok in (("SmolLM2", smol), ("GPT-2", gpt2)):
#     print(name, [tok.decode([i]) for i in tok.encode("1234567")], len(tok.encode("    return x")))
# ```
#
# ```text
# SmolLM2 ['1', '2', '3', '4', '5', '6', '7'] 3
# GPT-2 ['123', '45', '67'] 5
# ```
#
# </details>

# %% [markdown]
# **Exercise 4**
#
# <details><summary>Solution</summary>
#
# The vocabulary that was trained on program text needs more tokens for the play, since its merges are blanks and
# keywords.
#
# ```python
# import pathlib
#
# import gptjax
#
# package = pathlib.Path(gptjax.__file__).parent
# code = "\n".join(path.read_text(encoding="utf-8") for path in sorted(package.glob("*.py")))
# on_code = tokenizers.train("bpe", [code], 1000)
# for name, tok in (("code", on_code), ("Hamlet", kinds["bpe"])):
#     print(f"trained on {name}: {len(play) / len(tok.encode(play)):.2f} characters per token of the play")
# ```
#
# ```text
# trained on code: 1.84 characters per token of the play
# trained on Hamlet: 2.53 characters per token of the play
# ```
#
# </details>

# %% [markdown]
# **Exercise 5**
#
# <details><summary>Solution</summary>
#
# Per byte, not per character: UTF-8 needs two bytes for a Greek letter and three for a Chinese one. Every language
# other than English costs more tokens. Here one sentence in four languages:
#
# ```python
# sentences = {
#     "English": "All human beings are born free and equal in dignity and rights.",
#     "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
#     "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι.",
#     "Chinese": "人人生而自由,在尊严和权利上一律平等。",
# }
# for language, sentence in sentences.items():
#     print(f"{language:8} {len(gpt2.encode(sentence)) / len(sentence.encode()):.2f} tokens per byte")
# ```
#
# ```text
# English  0.21 tokens per byte
# German   0.35 tokens per byte
# Greek    0.60 tokens per byte
# Chinese  0.62 tokens per byte
# ```
#
# </details>
