import pytest
import regex

from gptjax.tokenizers.patterns import SCHEMES

TEXT = "We've 2024 reasons,\n\n  DON'T we?!\r\n\tx = caf\u00e9 + \u0661\u0662;  3.14\u3000 _a_ \U0001f642 \n"


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.split])
@pytest.mark.parametrize("text", [TEXT, TEXT[::-1], " ".join(TEXT), "a  ", "\n \n a", ""])
def test_both_spellings_of_a_pattern_find_the_same_words(name, text):
    scheme = SCHEMES[name]
    words = regex.findall(scheme.pattern, text)
    assert words == regex.findall(scheme.split, text) and "".join(words) == text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", ["We", " have", " 2024", " reasons"]),
        ("smollm", ["We", " have", " ", "2", "0", "2", "4", " reasons"]),
        ("llama3", ["We", " have", " ", "202", "4", " reasons"]),
    ],
)
def test_numbers_are_cut_differently(name, words):
    assert regex.findall(SCHEMES[name].pattern, "We have 2024 reasons") == words
