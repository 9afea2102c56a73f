# %% [markdown]
# # 01 Tokenizing: from text to ids and back
#
# What you learn: what the ids are that a model reads; what characters, words and byte pairs cost; how byte-pair
# encoding learns its vocabulary, written out in thirty lines and equal to the package's; what special tokens are.
#
# What it costs: CPU 10 s (2 cores); v5e-1: nothing of it runs on the TPU, a CPU runtime is as good.

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

# %% [markdown]
# The figures that stand in "Build a Large Language Model (From Scratch)" are about Edith Wharton's story *The Verdict*.
# It comes from the network; where that is closed, the cells about it say so and the others go on.

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
# The simplest vocabularies need no learning. Characters give few ids but long texts, and a character that the training
# text lacks cannot be written at all. The 256 bytes of UTF-8 hold every text, at up to four ids a character.

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
# The other end: every different word or mark has an id. Texts get short and the vocabulary large, and a word that never
# came up has no id. The book's first tokenizer refuses it, its second writes `<|unk|>`.

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
# Between the two: start from bytes, so that nothing is unknown, and give an id to what often stands together. Frequent
# words become one token (with the blank before them), rare ones fall into parts.

# %%
gpt2 = tokenizers.load("gpt2")
assert (gpt2.vocab_size, gpt2.eot_id) == (50_257, 50_256)
ids = gpt2.encode(
    "Hello, do you like tea? <|endoftext|> In the sunlit terracesof someunknownPlace.",
    allowed_special={"<|endoftext|>"},
)
print(ids)
the_books = [15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554, 262, 4252, 18250, 8812, 2114, 1659, 617, 34680]
assert ids == [*the_books, 27271, 13]
assert gpt2.encode("Every effort moves you") == [6109, 3626, 6100, 345]
show.tokens(gpt2, ids)

# %%
if verdict:
    print(f"The Verdict: {len(gpt2.encode(verdict)):,} tokens")
    assert len(gpt2.encode(verdict)) == 5145
show.tokens(gpt2, gpt2.encode(play[:700]))

# %% [markdown]
# Where English is one token a word, other scripts and rare words are not; a token may even be half a character (shown
# as �), which is why text that streams waits for the other half. Numbers fall apart in ways that make arithmetic hard.

# %%
odd = "supercalifragilistic 1234567 東京 🦙\n    return x"
ids = gpt2.encode(odd)
assert gpt2.decode(ids) == odd  # lossless as a whole
print(len(odd), "characters,", len(ids), "tokens")
show.tokens(gpt2, ids)

# %% [markdown]
# ## Learning the pairs
# The whole algorithm: count neighbours, join the most frequent pair everywhere, repeat. Words are counted once each and
# never joined across their border, which is what the pattern cuts first. Ties go to the pair whose parts are older.


# %%
def learn(text, n_merges):
    """The first merges of byte-pair encoding, as `Ġ t` (Ġ stands for a blank): the book's and GPT-2's algorithm."""
    found = Counter(regex.findall(bpe.PATTERN, text))
    split = {tuple(bpe.printable(bytes([b])) for b in word.encode()): n for word, n in found.items()}
    age = dict(bpe.alphabet())
    merges = []
    for _ in range(n_merges):
        pairs = Counter()
        for parts, n in split.items():
            for pair in pairwise(parts):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        merges.append(" ".join(best))
        age["".join(best)] = len(age)
        split = {joined(parts, best): n for parts, n in split.items()}
    return merges


def joined(parts, pair):
    out = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


ours = learn(play, 50)
theirs = tokenizers.train("bpe", [play], 257 + 50)
print("  ".join(merge.replace(" ", "+") for merge in ours))
assert ours == theirs.merges

# %% [markdown]
# The same line with more and more merges: a text gets shorter, the table of embeddings longer. Each id costs `d_model`
# numbers in the model, each token a step of attention; 50,257 was GPT-2's choice between the two.

# %%
sizes = (257, 300, 400, 600, 1000, 2000, 4000)
learned = {size: tokenizers.train("bpe", [play], size) for size in sizes}
for size in (257, 400, 2000):
    print(f"{size:5}  ", " | ".join(learned[size].decode([i]) for i in learned[size].encode(line)))
length = {size: len(tok.encode(play)) for size, tok in learned.items()}
assert all(a > b for a, b in pairwise(length.values()))
show.curves(
    {"learned on Hamlet": (sizes, [len(play) / n for n in length.values()]),
     "GPT-2's": ([sizes[0], sizes[-1]], [len(play) / len(gpt2.encode(play))] * 2)},
    x="ids in the vocabulary", y="characters a token", log_x=True, marker="o",
)  # fmt: skip

# %% [markdown]
# ## All kinds side by side
# `wordpiece` (BERT's) and `unigram` (SentencePiece's) are two other ways to learn pieces. What is learned on one play
# is tried on another, since a vocabulary fits its own text best.

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
    print(f"{name:10} {tok.vocab_size:6} ids  {per_token[name]:.2f} characters a token  "
          f"{'lossless' if lossless else f'{unknown:.1%} unknown'}")  # fmt: skip
    assert lossless == (name != "words")
assert per_token["chars"] == 1 and per_token["gpt2"] > per_token["bpe"] > 2

# %% [markdown]
# ## Special tokens
# `<|endoftext|>` stands between documents. It has an id, and it can also stand in a text that somebody typed. If that
# text turned into the id, users could end documents or speak as the assistant. So each call says what it means:

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
# New special tokens go behind the last id, and all other ids stay. A model grows with it
# (`gptjax.grow_vocabulary`), and its logits for the old words do not change. A tokenizer is saved as one file.

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
# 1. Which words of `play` does GPT-2 cut into the most tokens? (`words.split`, and mind the blank before a word.)
# 2. In `learn`, print how often each chosen pair came up. How does the count fall with the number of the merge?
# 3. `tokenizers.load("smollm2-135m-instruct")` fetches a model of 98 MB and reads the vocabulary inside it. How does it
#    cut `1234567`, and four blanks before `return`? Why would one want that?
# 4. Train `bpe` on the program text of this package instead of a play, and try it on the play: what does it cost?
# 5. Draw the length in tokens of `play` in English and of any text in your own language under `gpt2`, per UTF-8 byte.
