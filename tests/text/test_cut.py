"""What of a prompt is not read, word by word."""

import pytest

from dicode_jax.text import cut

TEXT = "a bcd efghij  k"


def test_a_word_that_is_cut_anywhere_is_left_out_whole():
    """Of tokens of one letter, or of a space and a letter, wherever the last one ends."""
    letters = [(i, i + 1) for i in range(len(TEXT)) if TEXT[i] != " "]
    spaced = [(i - (TEXT[i - 1 : i] == " "), i + 1) for i, _ in letters]
    words = ["a", *["bcd"] * 3, *["efghij"] * 6, "k"]
    for offsets in (letters, spaced):
        for length, word in enumerate(words):
            assert cut.left_out(TEXT, offsets, length) == TEXT[TEXT.index(word) :]
        assert cut.left_out(TEXT, offsets, len(words)) == ""


@pytest.mark.parametrize(("size", "shown"), [(200, "x" * 200), (201, "x" * 200 + "...")])
def test_a_warning_shows_200_signs_where_it_was_asked_for(size, shown):
    with pytest.warns(UserWarning, match="the prompt has 5 tokens") as caught:
        cut.warn("x" * size, 5, 3, stacklevel=1)
    message = "the prompt has 5 tokens; the model reads the first 3 and leaves out: "
    assert str(caught[0].message) == message + shown
    assert caught[0].filename == __file__


def test_what_is_left_out_is_shown_as_one_line():
    with pytest.warns(UserWarning, match=r"leaves out: a\\x1b\[2J b$"):
        cut.warn("a\x1b[2J\nb", 9, 4, stacklevel=1)
