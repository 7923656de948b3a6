"""CLIP's text tokenizer: the layout of ids, and both kinds of vocabulary files."""

import gzip
import json
import sys

import fake_open_clip
import numpy as np
import pytest

from dicode_jax.errors import UserError
from dicode_jax.text import clip as clip_text
from dicode_jax.text.clip import ClipTokenizer

MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]
SIZE = 512 + len(MERGES) + 2
START, END = SIZE - 2, SIZE - 1
CAT, DOG = 512 + 1, 512 + 3


@pytest.fixture(scope="module")
def tokenizer():
    return ClipTokenizer(clip_text.build(MERGES), SIZE)


def letters(word):
    """Ids of a word that no merge touches: the last letter carries the end of the word."""
    first = [ord(c) - ord("!") for c in word]
    return [*first[:-1], first[-1] + 256]


def test_an_installed_open_clip_brings_the_vocabulary_and_is_not_imported(tmp_path, monkeypatch):
    fake_open_clip.install(tmp_path, monkeypatch, MERGES)
    path = clip_text.installed_vocabulary(SIZE)
    assert path == tmp_path / "open_clip" / clip_text.VOCABULARY
    ids = ClipTokenizer.from_file(path, SIZE)(["cat dog"], 4)
    np.testing.assert_array_equal(ids, [[START, CAT, DOG, END]])
    assert clip_text.installed_vocabulary(SIZE + 1) is None  # of another text tower
    path.unlink()
    assert clip_text.installed_vocabulary(SIZE) is None
    assert "open_clip" not in sys.modules


def test_words_stand_between_start_and_end_and_zeros_follow(tokenizer):
    ids = tokenizer(["cat dog", "cat", ""], 6)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(
        ids, [[START, CAT, DOG, END, 0, 0], [START, CAT, END, 0, 0, 0], [START, END, 0, 0, 0, 0]]
    )


def test_single_letters_have_the_published_ids(tokenizer):
    assert tokenizer(["a"], 3)[0, 1] == 320  # of the full vocabulary too: letters come first
    np.testing.assert_array_equal(tokenizer(["xy!"], 5)[0, 1:4], [*letters("xy"), 256])
    # Bytes e6 97 a5; the middle one is no printable sign and comes after the 188 that are.
    np.testing.assert_array_equal(tokenizer(["日"], 5)[0, 1:4], [162, 245, 256 + 98])


@pytest.mark.parametrize("prompt", ["CAT  dog", " cat\n\tdog ", "cat dog", "CaT &#100;og"])
def test_case_white_space_and_html_do_not_matter(tokenizer, prompt):
    np.testing.assert_array_equal(tokenizer([prompt], 5), tokenizer(["cat dog"], 5))


def test_a_long_prompt_keeps_its_end_and_a_warning_names_the_words_that_are_left_out(tokenizer):
    with pytest.warns(UserWarning, match="has 4 tokens; .* first 2 and leaves out: dog cat$") as w:
        ids = tokenizer(["cat", "Cat cat  Dog cat"], 4)
    np.testing.assert_array_equal(ids[1], [START, CAT, CAT, END])
    assert len(w) == 1
    with pytest.warns(UserWarning, match="leaves out: xyz dog$"):  # in the middle of a word
        tokenizer(["cat xyz dog"], 5)


def test_what_fits_is_read_without_a_word(tokenizer, recwarn):
    tokenizer(["cat dog", ""], 4)
    assert not recwarn.list


def test_both_files_give_the_same_ids(tokenizer, tmp_path):
    lines = ["#version: 0.2", *MERGES]
    merges = tmp_path / "bpe.txt.gz"
    merges.write_bytes(gzip.compress("\n".join(lines).encode()))
    tokenizer.save(tmp_path / "text")
    want = tokenizer(["dog cat, é 7"], 9)
    for path in (merges, tmp_path / "text", tmp_path / "text/tokenizer.json"):
        np.testing.assert_array_equal(
            ClipTokenizer.from_file(path, SIZE)(["dog cat, é 7"], 9), want
        )


def test_as_many_merges_are_read_as_the_model_has_words(tmp_path, monkeypatch):
    assert 512 + clip_text._NUM_MERGES + 2 == 49408  # letters, merges, start and end
    monkeypatch.setattr(clip_text, "_NUM_MERGES", len(MERGES))
    lines = ["#version: 0.2", *MERGES, "t h", "th e</w>"]
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    ids = ClipTokenizer.from_file(tmp_path / "bpe.txt.gz", SIZE)(["cat dog"], 4)
    np.testing.assert_array_equal(ids, [[START, CAT, DOG, END]])


def test_without_a_vocabulary_only_the_empty_prompt_is_known(tmp_path):
    tokenizer = ClipTokenizer(None, 49408)
    np.testing.assert_array_equal(tokenizer([""], 4)[0], [49406, 49407, 0, 0])
    tokenizer.save(tmp_path / "text")
    assert not (tmp_path / "text").exists()
    assert not tokenizer.has_words
    with pytest.raises(UserError, match="without CLIP's vocabulary"):
        tokenizer(["cat"], 4)


def test_a_very_long_prompt_is_refused(tokenizer):
    with pytest.raises(UserError, match="has 20001 letters, at most 20000 are read"):
        tokenizer(["a" * 20_001], 4)


def test_other_vocabularies_and_broken_files_are_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match="not the vocabulary of this text tower"):
        ClipTokenizer.from_file(tmp_path, 49408)
    (tmp_path / "broken.json").write_text("{")
    bomb = gzip.compress(bytes(10**6)) * 40  # 40 KB, unpacked 40 MB
    (tmp_path / "bomb.txt.gz").write_bytes(bomb)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"a b\n" * 99)[:-9])
    (tmp_path / "words.txt.gz").write_bytes(gzip.compress(b"version\na b c\n"))
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Prepend", "prepend": "x" * 1000}
    (tmp_path / "grows").mkdir()
    (tmp_path / "grows/tokenizer.json").write_text(json.dumps(data))
    for path, message in (
        (tmp_path / "broken.json", "does not hold a CLIP vocabulary"),
        (tmp_path / "nothing", "no CLIP vocabulary"),
        (tmp_path / "bomb.txt.gz", "does not hold a CLIP vocabulary: it unpacks to more"),
        (tmp_path / "cut.txt.gz", "does not hold a CLIP vocabulary"),
        (tmp_path / "words.txt.gz", "does not hold a CLIP vocabulary|not the vocabulary"),
        (tmp_path / "grows", "make up to 100[0-9] letters of one"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            ClipTokenizer.from_file(path, SIZE)
        assert "\n" not in str(caught.value)
