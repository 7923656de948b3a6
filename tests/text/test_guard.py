"""Tokenizer files from elsewhere: one line at load or at the prompt, whatever they hold."""

import copy
import json

import numpy as np
import pytest
import tokenizers

from dicode_jax.data import shapes_world
from dicode_jax.errors import UserError
from dicode_jax.text import gpt, guard

EVIL = {"Regex": "(a+)+$"}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SPLIT = {"type": "Split", "pattern": EVIL, "behavior": "Isolated", "invert": False}


def many(kind, name, count):
    return {"type": "Sequence", name: [kind] * count}


@pytest.fixture(scope="module")
def small():
    """Of letters, which are checked one by one."""
    return json.loads(gpt.train_small(shapes_world.all_captions()).to_json())


@pytest.fixture(scope="module")
def of_bytes():
    return json.loads(gpt.learn(shapes_world.all_captions(), vocab_size=300).to_json())


def write(path, data, **changes):
    data = copy.deepcopy(data)
    for name, value in changes.items():
        holder = data["model"] if name in ("vocab", "merges") else data
        holder[name] = value
    path.write_text(json.dumps(data))
    return path


def one_line(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 2500
    return str(caught.value)


def test_without_a_normalizer_letters_are_read_as_they_are(small, tmp_path):
    text = gpt.TextTokenizer.from_file(write(tmp_path / "a.json", small, normalizer=None))
    assert text.decode(text.encode("a red circle").ids[0]) == "a red circle"
    assert "'A'" in one_line(text.encode, "A red circle")


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_a_pattern_that_takes_for_ever_is_one_line_at_the_prompt(small, of_bytes, tmp_path, part):
    rule = SPLIT if part == "pre_tokenizer" else {**DOUBLE, "pattern": EVIL}
    for data in (small, of_bytes):
        text = gpt.TextTokenizer.from_file(write(tmp_path / "a.json", data, **{part: rule}))
        assert "fails at the prompt" in one_line(text.encode, "a" * 60 + "b")
        assert text.encode("b").lengths == (1,)


@pytest.mark.parametrize(
    "rules",
    [
        {"normalizer": many({**DOUBLE, "content": "a" * 100}, "normalizers", 3)},
        {"normalizer": many(DOUBLE, "normalizers", 40)},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
        {"decoder": many({**DOUBLE, "content": "a" * 100}, "decoders", 3)},
    ],
)
def test_rules_that_make_a_text_far_longer_are_refused_at_load(of_bytes, tmp_path, rules):
    path = write(tmp_path / "a.json", of_bytes, **rules)
    assert "letters of one, at most 16" in one_line(gpt.TextTokenizer.from_file, path)


@pytest.mark.parametrize("number", [-1, 2**31, 2**32 - 1, 5000, 0, "1"])
def test_ids_are_those_of_the_vocabulary_once_each(of_bytes, tmp_path, number):
    path = write(tmp_path / "a.json", of_bytes, vocab={**of_bytes["model"]["vocab"], "a": number})
    line = one_line(gpt.TextTokenizer.from_file, path)
    assert "readable tokenizer" in line or "not those from 0 on, once each" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens": []},
        {"added_tokens": {"a": 1}},
        {"merges": [["zz", "yy"]]},
        {"merges": [1]},
        {"vocab": []},
        {"model": None},
    ],
)
def test_parts_that_do_not_fit_are_one_line_at_load(of_bytes, tmp_path, changes):
    one_line(gpt.TextTokenizer.from_file, write(tmp_path / "a.json", of_bytes, **changes))


def test_files_are_read_within_bounds(of_bytes, tmp_path):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        folder = tmp_path / name[:5]
        folder.mkdir()
        (folder / "vocab.json").write_text("{}")
        (folder / "merges.txt").write_text("")
        with open(folder / name, "wb") as file:
            file.truncate(guard.MAX_FILE + 1)  # takes no room on the disk
        line = one_line(gpt.TextTokenizer.from_file, folder)
        assert "too large" in line or "no file of at most" in line


def test_a_very_long_prompt_is_refused(of_bytes, tmp_path):
    text = gpt.TextTokenizer.from_file(write(tmp_path / "a.json", of_bytes))
    assert "20001 letters" in one_line(text.encode, "a" * 20_001)
    assert text.encode("a" * 20_000).ids.shape == (1, 80)


def test_an_interruption_is_none_of_the_faults():
    with pytest.raises(KeyboardInterrupt), guard.refusing("the tokenizer"):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit), guard.refusing("the tokenizer"):
        raise SystemExit(3)


def test_a_panic_of_the_library_is_no_exception_and_yet_a_line():
    """Of the kind itself, which has no name that could be imported."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(EVIL["Regex"]), "isolated")
    with pytest.raises(BaseException, match="retry-limit") as caught:
        split.pre_tokenize_str("a" * 60 + "b")
    assert not isinstance(caught.value, Exception)
    assert "retry-limit" in one_line(raise_inside, caught.value)


def raise_inside(error):
    with guard.refusing("the tokenizer fails"):
        raise error


def test_what_the_library_makes_of_right_files_is_left_alone(small, of_bytes, tmp_path):
    for data in (small, of_bytes):
        text = gpt.TextTokenizer.from_file(write(tmp_path / "a.json", data))
        same = gpt.TextTokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)))
        np.testing.assert_array_equal(text.encode("a red one").ids, same.encode("a red one").ids)
