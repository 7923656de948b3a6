"""Prompts become ids in GPT-2's special-token layout; what cannot be spelled is named."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from dicode_jax.data import shapes_world as synthetic
from dicode_jax.errors import UserError
from dicode_jax.text import gpt as text

ROOT = pathlib.Path(__file__).parents[2]
PACKAGED = "dicode_jax/assets/shapes/text"


@pytest.fixture(scope="module")
def small():
    return text.train_small(synthetic.all_captions())


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A byte vocabulary with one merge, in GPT-2's two files, `<|endoftext|>` last."""
    folder = tmp_path_factory.mktemp("gpt2")
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "re", text.END_OF_TEXT]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\n")
    return folder


def test_special_tokens_follow_the_base_vocabulary_in_order(small):
    pad = small.pad_id
    ids = [small._tokenizer.token_to_id(t) for t in ("</img>", "<img>", "<img_00000>")]
    assert ids == [pad + 1, pad + 2, pad + 3]
    assert small._tokenizer.token_to_id("<img_00063>") == pad + 66 == small.vocab_size - 1
    assert small._tokenizer.token_to_id(text.END_OF_TEXT) == pad
    assert small.image_start_id == pad + 2


def test_every_caption_survives_encoding_and_decoding(small):
    captions = synthetic.all_captions()
    encoded = small.encode(captions, 20)
    assert encoded.ids.dtype == np.int32
    assert encoded.ids.shape == (len(captions), 20)
    assert encoded.truncated == ()
    decoded = [caption.replace("an orange", "a orange") for caption in captions]
    assert [small.decode(row) for row in encoded.ids] == decoded
    assert max(encoded.lengths) == 12  # each word of the grammar is one token


def test_ids_are_padded_on_the_right_with_end_of_text(small):
    encoded = small.encode(["", "a red circle"], 6)
    assert (encoded.ids[0] == small.pad_id).all()
    assert encoded.lengths == (0, 3)
    assert (encoded.ids[1, 3:] == small.pad_id).all()
    assert (encoded.ids[1, :3] < small.pad_id).all()


def test_a_long_prompt_is_cut_on_the_right_and_says_so(small):
    encoded = small.encode(["red " * 90, "red"], 80)
    assert encoded.truncated == (0,)
    assert encoded.lengths == (90, 1)
    assert (encoded.ids[0] == encoded.ids[1, 0]).all()
    cut = small.encode("red blue green circle", 2).ids
    np.testing.assert_array_equal(cut, small.encode("red blue", 2).ids)


def test_case_and_white_space_do_not_matter(small):
    one = small.encode("a red  circle\n grows ").ids
    np.testing.assert_array_equal(one, small.encode("A Red\tCircle grows").ids)


@pytest.mark.parametrize("which", ["new", "packaged"])
def test_an_orange_has_the_ids_of_a_orange_in_new_vocabularies_and_the_packaged_one(small, which):
    said = small if which == "new" else text.TextTokenizer.from_file(ROOT / PACKAGED)
    for rest in ("orange circle grows", "orange"):
        one = said.encode(f"An  {rest}").ids
        np.testing.assert_array_equal(one, said.encode(f"a {rest}").ids)
    assert said.decode(said.encode("a banana can grow").ids[0]) == "a banana can grow"


def test_any_lower_case_word_can_be_spelled(small):
    assert small.decode(small.encode("the quick brown fox jumps over lazy dogs").ids[0]) == (
        "the quick brown fox jumps over lazy dogs"
    )


def test_characters_outside_the_alphabet_are_named(small):
    with pytest.raises(UserError, match=r"'!' '7' 'ö'; it knows a-z"):
        small.encode("wörld no 7!")
    with pytest.raises(UserError, match="'日'"):
        small.encode(["a red circle", "日"])


def test_bytes_that_are_no_text_are_refused(small):
    with pytest.raises(UserError, match="not UTF-8"):
        small.encode(b"a red \xff circle".decode(errors="surrogateescape"))


def test_an_empty_prompt_is_refused_where_it_must_not_be(small):
    with pytest.raises(UserError, match="empty"):
        small.encode(" \n ", allow_empty=False)


def test_training_again_gives_the_same_bytes(small, tmp_path):
    small.save(tmp_path / "a")
    text.train_small(reversed(synthetic.all_captions())).save(tmp_path / "b" / "tokenizer.json")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (
        tmp_path / "b/tokenizer.json"
    ).read_bytes()


def test_a_saved_tokenizer_reads_back_the_same(small, tmp_path):
    small.save(tmp_path)
    read = text.TextTokenizer.from_file(tmp_path)
    caption = "a large blue cross moves in a circle on a navy background"
    np.testing.assert_array_equal(read.encode(caption).ids, small.encode(caption).ids)
    assert (read.pad_id, read.vocab_size) == (small.pad_id, small.vocab_size)
    with pytest.raises(UserError, match="'5'"):
        read.encode("5")


def test_a_gpt2_folder_gets_the_image_tokens(gpt2_folder, tmp_path):
    gpt2 = text.TextTokenizer.from_file(gpt2_folder)
    assert (gpt2.pad_id, gpt2.image_start_id, gpt2.vocab_size) == (257, 259, 258 + 66)
    encoded = gpt2.encode("  Bred wörld! 日 ", 16)
    assert gpt2.decode(encoded.ids[0]) == "Bred wörld! 日"  # bytes spell everything, case is kept
    assert encoded.lengths == (15,)  # 16 bytes, less one for the merge of `re`
    gpt2.save(tmp_path)
    again = text.TextTokenizer.from_file(tmp_path)
    np.testing.assert_array_equal(again.encode("  Bred wörld! 日 ", 16).ids, encoded.ids)


def test_image_tokens_follow_the_last_special_token_of_llama(tmp_path):
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "re"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    llama = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("r", "e")]))
    llama.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    llama.decoder = tokenizers.decoders.ByteLevel()
    llama.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_0|>"])
    llama.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 257)]
    )
    llama.save(str(tmp_path / "tokenizer.json"))
    for _ in range(2):  # as it came, and with the image tokens in the file
        got = text.TextTokenizer.from_file(tmp_path)
        assert (got.pad_id, got.image_start_id, got.vocab_size) == (258, 261, 260 + 66)
        assert set(got.encode("").ids[0]) == {258}  # all padding, nothing in front
        assert got.decode(got.encode(" Bred 日").ids[0]) == "Bred 日"
        got.save(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer in"),
        ({"tokenizer.json": "not json"}, "readable tokenizer"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "no <|endoftext|> token"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        text.TextTokenizer.from_file(tmp_path)
    assert message in str(error.value)


def test_words_that_are_left_out_are_known(small):
    prompts = ["a red circle moves to the left", "a red circle", " a red CIRCLE  Left"]
    encoded = small.encode(prompts, 3)
    assert encoded.left_out == ("moves to the left", "", "Left")
