"""Text that comes token by token."""

import random
from collections.abc import Sequence

import pytest

from hysparse_megatron.inference.text_stream import TextStream

TEXT = "na\u00efve \u20ac5 \U0001f600 end\n\u65e5\u672c"


def decode(tokens: Sequence[int]) -> str:
    """One token a byte."""
    return bytes(tokens).decode(errors="replace")


def stream(text: str, *stops: str) -> tuple[list[str], str, bool]:
    """What each byte gives, what the end gives, and whether a stop string came."""
    made = TextStream(decode, stops)
    pieces = []
    for byte in text.encode():
        pieces.append(made.push(byte))
        if made.stopped:
            break
    return pieces, made.finish(), made.stopped


def test_characters_come_whole() -> None:
    pieces, rest, stopped = stream(TEXT)
    assert "".join(pieces) == TEXT
    assert all("\ufffd" not in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == list(TEXT)
    assert (rest, stopped) == ("", False)


def test_half_a_character_comes_at_the_end() -> None:
    made = TextStream(decode)
    given = "a\u20ac".encode()[:-1]
    assert [made.push(byte) for byte in given] == ["a", "", ""]
    assert made.finish() == "\ufffd"
    assert made.finish() == ""


def test_spaces_that_depend_on_what_stands_before() -> None:
    words = ["I", "am", "not", "here"]
    made = TextStream(lambda tokens: " ".join(words[token] for token in tokens))
    assert [made.push(token) for token in range(4)] == ["I", " am", " not", " here"]


@pytest.mark.parametrize("stop", ["end", "\u20ac5 ", "n", TEXT[3:], "5 \U0001f600"])
def test_a_stop_string_and_what_follows_are_left_out(stop: str) -> None:
    pieces, rest, stopped = stream(TEXT, "nowhere", stop)
    assert stopped
    assert "".join(pieces) + rest == TEXT[: TEXT.index(stop)]


def test_the_first_of_several_stops_counts() -> None:
    pieces, rest, _ = stream("one two three", "three", "two t", "wo")
    assert "".join(pieces) + rest == "one t"


def test_what_only_began_like_a_stop_is_given_out() -> None:
    pieces, rest, stopped = stream("aab aac aa", "aaa")
    assert not stopped
    assert "".join(pieces) == "aab aac "
    assert rest == "aa"


def test_any_text_comes_out_as_it_is(rng: random.Random) -> None:
    for _ in range(50):
        text = "".join(rng.choices("ab\u00e9\u4e2d\U0001f40d \n", k=30))
        stop = "".join(rng.choices("ab\u00e9", k=3))
        pieces, rest, stopped = stream(text, stop)
        assert "".join(pieces) + rest == text.partition(stop)[0], (text, stop)
        assert stopped == (stop in text)
