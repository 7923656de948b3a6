"""Ids of T5's kind: those of sentencepiece itself, and of whole words."""

import pathlib

import pytest
import tokenizers
from tokenizers import models, normalizers

from dicode_jax.data.shapes_world import all_captions
from dicode_jax.errors import UserError
from dicode_jax.text import guard, t5

# Trained by sentencepiece 0.2.3 on words of the shapes world: 90 pieces, and rules that make "fi"
# of the ligature, 1 of a circled one, A of a wide one, and spaces of tabs and line ends.
SMALL = pathlib.Path(__file__).parent / "small_spiece.model"
# What sentencepiece 0.2.3 gives, `</s>` left out.
ITS_IDS = {
    "A large red circle grows": [3, 12, 45, 33, 27, 6, 3, 34, 15, 31, 25, 35, 36, 30, 18, 32, 7],
    "  a\tblue\xa0 cross\n moves  ": [3, 13, 28, 9, 6, 31, 44, 7, 7, 3, 21, 8, 22, 6, 7],
    "ﬁﬁ, ① Ａ.": [3, 5, 5, 11, 10, 3, 12, 14],
    "": [],
}


@pytest.fixture(scope="module")
def small():
    return t5.T5Tokenizer.from_file(SMALL)


@pytest.mark.parametrize("prompt", ITS_IDS)
def test_ids_are_those_of_sentencepiece(small, prompt):
    assert small(prompt, 99).tolist() == [*ITS_IDS[prompt], 1]
    assert (small.pad_id, small.end_id, small.vocab_size) == (0, 1, 90)


def test_letters_that_it_cannot_spell_are_told_and_stand_as_one(small):
    with pytest.warns(UserWarning, match="cannot spell, and leaves out: 😀日"):
        ids = small("red 😀日 circle", 99)
    assert ids.tolist() == [3, 34, 15, 3, 2, 31, 25, 35, 36, 30, 1]


def test_a_prompt_is_cut_before_its_end_and_the_words_are_known(small):
    prompt = "A large red circle grows"
    assert small(prompt, 6).tolist() == [*ITS_IDS[prompt][:5], 1]
    line = (
        "^the prompt has 18 tokens; the writer reads the first 6 and leaves out: large red circle "
        "grows; the painter reads the first 17 and leaves out: grows$"
    )
    with pytest.warns(UserWarning, match=line) as caught:
        ids = t5.read(prompt, {"writer": (small, 6), "painter": (small, 17), "other": (small, 18)})
    assert [len(one) for one in ids] == [6, 17, 18]
    assert [one[-1] for one in ids] == [small.end_id] * 3
    assert len(caught) == 1
    assert t5.read(prompt, {"other": (small, 18)}) == ids[2:]
    assert small.left_out(prompt, 6) == ("large red circle grows", 18)
    assert small.left_out(prompt, 18) == ("", 18)


def test_what_is_saved_gives_the_same_ids(small, tmp_path):
    small.save(tmp_path)
    loaded = t5.T5Tokenizer.from_file(tmp_path)
    assert all(loaded(prompt, 99).tolist() == [*ids, 1] for prompt, ids in ITS_IDS.items())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "spiece.model").write_bytes(SMALL.read_bytes())
    assert t5.T5Tokenizer.from_file(tmp_path).vocab_size == 90


def test_whole_words_are_learned_and_no_others_taken(tmp_path):
    words = t5.learn_words(all_captions())
    caption = "a large red circle moves in a circle on a navy background"
    assert words(caption.title(), 99).tolist() == words(caption, 99).tolist()
    assert len(words(caption, 99)) == len(caption.split()) + 1
    words.save(tmp_path)
    loaded = t5.T5Tokenizer.from_file(tmp_path)
    assert loaded(caption, 99).tolist() == words(caption, 99).tolist()
    with pytest.raises(UserError, match="has never seen: pink, horse"):
        loaded("a pink horse grows", 99)


def test_other_files_are_refused_in_a_line(tmp_path):
    for content, line in (
        (b"", "no whole model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        (SMALL.read_bytes()[:700], "no whole model"),
        (SMALL.read_bytes()[:701], "does not hold a readable vocabulary"),
        (b"\x12\x02\x18\x02\x1a\x00", "no unigram model"),  # of byte pairs
    ):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(UserError, match=line) as caught:
            t5.T5Tokenizer.from_file(tmp_path)
        assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "spiece.model").unlink()
    with pytest.raises(UserError, match=r"want tokenizer.json or spiece.model"):
        t5.T5Tokenizer.from_file(tmp_path)
    with pytest.raises(UserError, match="has no <pad>"):
        t5.T5Tokenizer(tokenizers.Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>")))


def test_a_table_that_makes_long_strings_of_letters_is_refused(small):
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    for length, is_taken in ((18, True), (19, False)):
        trie = bytes(1024)
        table = len(trie).to_bytes(4, "little") + trie + b"a" * length + b"\0"
        made.normalizer = normalizers.Precompiled(table)
        if is_taken:
            guard.check(made)
            continue
        with pytest.raises(UserError, match="rules of replacement make up to 19 letters"):
            guard.check(made)
