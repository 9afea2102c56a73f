"""From tokens to text: stop strings, and text chunks for streaming."""

import jax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.generation import complete, cut, generate, programs, stop_strings, stream, text_chunks

CONTEXT, NEW = 64, 20
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
KEY = jax.random.key(0)


def decode(tokens):
    return "".join(chr(ord("a") + t) for t in tokens)


def utf8(tokens):
    return bytes(tokens).decode("utf-8", "replace")


def first(row, until):
    """The shortest prefix of the row for which `until` is true; the whole row if there is none."""
    return next((row[:n] for n in range(1, len(row) + 1) if until(row[:n])), row)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("gpt2", context_length=CONTEXT)


@pytest.fixture(scope="module")
def rows(model):
    """New tokens of every prompt, sampled so that they differ."""
    cfg, params = model
    return generate(params, PROMPTS, cfg, max_new_tokens=NEW, key=KEY, sampler=sampler())


def sampler():
    from gptjax.generation import chain, temperature

    return chain(temperature(5.0))


@pytest.mark.slow
def test_a_row_ends_with_the_token_that_completes_a_stop_string(model, rows):
    """Stop strings that span two tokens, before and after the first call of `until`; the other rows continue."""
    cfg, params = model
    for start in (2, 11):
        string = decode(rows[0][start : start + 2])
        until = stop_strings(decode, [string, "never"])
        got = complete(params, PROMPTS, cfg, max_new_tokens=NEW, key=KEY, sampler=sampler(), until=until, logprobs=2)
        assert [c.tokens for c in got] == [first(row, until) for row in rows]
        for c, row in zip(got, rows, strict=True):
            assert len(c.tokens) == len(c.logprobs) == len(c.top)
            assert c.finish == ("stop" if until(row) else "length")
        assert string not in cut(decode(got[0].tokens), [string])


@pytest.mark.slow
def test_ragged_rows_are_what_each_is_alone(model):
    cfg, params = model
    options = dict(
        max_new_tokens=NEW, key=KEY, logprobs=0, until=lambda tokens: len(tokens) > 2 and sum(tokens) % 7 == 0
    )
    batched = complete(params, PROMPTS, cfg, **options)
    alone = [complete(params, [prompt], cfg, **options)[0] for prompt in PROMPTS]
    assert [(c.tokens, c.finish) for c in batched] == [(c.tokens, c.finish) for c in alone]
    assert len({len(c.tokens) for c in batched}) > 1
    for c, other in zip(batched, alone, strict=True):
        assert c.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_all_rows_done_is_the_end(model, rows):
    cfg, params = model
    lengths = []
    got = complete(
        params, PROMPTS, cfg, max_new_tokens=NEW, key=KEY, sampler=sampler(), until=lambda t: not lengths.append(len(t))
    )
    assert [c.tokens for c in got] == [row[:1] for row in rows]
    assert lengths == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.first_cases(1)
@pytest.mark.parametrize("placed", [False, True], ids=["anywhere", "on a mesh"])
def test_several_samples_and_no_new_programs(model, placed):
    cfg, params = model
    if placed:
        params = jax.device_put(params, NamedSharding(Mesh(jax.devices()[:1], ("data",)), PartitionSpec()))
    options = dict(max_new_tokens=NEW, key=KEY, sampler=sampler(), n=2)
    whole = [c.tokens for c in complete(params, PROMPTS, cfg, **options)]
    before = programs()
    until = stop_strings(decode, [decode(whole[1][3:5])])
    assert [c.tokens for c in complete(params, PROMPTS, cfg, **options, until=until)] == [
        first(row, until) for row in whole
    ]
    assert programs() == before


@pytest.mark.parametrize("every", [1, 3])
def test_stream(model, every):
    cfg, params = model
    row = generate(params, [PROMPTS[1]], cfg, max_new_tokens=NEW, key=KEY, sampler=sampler())[0]
    until = stop_strings(decode, [decode(row[6:8])])
    got = stream(params, PROMPTS[1], cfg, max_new_tokens=NEW, key=KEY, sampler=sampler(), until=until, every=every)
    assert [token for new in got for token in new] == first(row, until)


def test_cut():
    assert cut("one\n\ntwo###", ["###", "\n\n"]) == "one"
    assert cut("one", ["\n\n"]) == "one"
    assert cut("one", []) == "one"


def test_an_empty_string_ends_nothing():
    assert cut("one two", ["", " "]) == "one"
    assert not stop_strings(utf8, [""])(list(b"one"))
    assert "".join(text_chunks([list(b"one")], utf8, [""])) == "one"


def test_pieces_hold_back_half_characters_and_beginnings():
    text = "naïve \U0001f600 end.\n\nmore"
    tokens = [[byte] for byte in text.encode()]
    assert "".join(text_chunks(tokens, utf8)) == text
    shown = list(text_chunks(tokens, utf8, ["\n\nUser:", "\n\nmore"]))
    assert "".join(shown) == "naïve \U0001f600 end."
    assert all("\n" not in piece and "\ufffd" not in piece for piece in shown)


def test_what_waited_is_shown_at_the_end():
    assert "".join(text_chunks([[byte] for byte in b"end.\n"], utf8, ["\n\n"])) == "end.\n"
    assert list(text_chunks([[0xC3]], utf8)) == ["\ufffd"]


def test_the_stream_is_not_read_past_a_stop_string():
    tokens = iter([[byte] for byte in b"a##b"])
    assert list(text_chunks(tokens, utf8, ["##"])) == ["a"]
    assert list(tokens) == [[ord("b")]]


def test_a_stop_string_closes_the_stream():
    tokens = ([byte] for byte in b"a##b")
    assert list(text_chunks(tokens, utf8, ["##"])) == ["a"]
    assert list(tokens) == []
