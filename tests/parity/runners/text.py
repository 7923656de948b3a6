"""Ids of the text tokenizers. Their vocabularies are no part of this package or of the fixtures.

`--vocabularies DIR` names a folder with any of `gpt2/` and `llama3/` (Hugging Face's tokenizer
files) and `clip/` (`tokenizer.json`, or OpenCLIP's `bpe_simple_vocab_16e6.txt.gz`); without it the
fixture is skipped.
"""

import json
import pathlib
import warnings

import numpy as np
import pytest

from dicode_jax.text.clip import ClipTokenizer
from dicode_jax.text.gpt import IMAGE_TOKENS, TextTokenizer
from parity import harness
from parity.harness import Check, runner

# Where ours differ on purpose, as `dicode_jax.text.clip` says: wrongly decoded text is not
# repaired, and names of special tokens are read as the text that they are.
NOT_AS_CLIP = ("\u00c3", "<end_of_text>")


@runner("text_and_vision/tokenizers")
def run_tokenizers(fixture):
    folder = pathlib.Path(harness.VOCABULARIES or "")
    found = [name for name in ("clip", "gpt2", "llama3") if (folder / name).is_dir()]
    if harness.VOCABULARIES is None or not found:
        pytest.skip("needs the published vocabularies: --vocabularies DIR")
    for name in found:
        data = json.loads((fixture.path / f"{name}_bpe.json").read_text())
        yield from (clip if name == "clip" else words)(name, folder / name, data)


def words(name, folder, data):
    tokenizer = TextTokenizer.from_file(folder)
    sizes = [tokenizer.vocab_size, tokenizer.pad_id]
    want = [data["vocab_size"] + len(IMAGE_TOKENS), data.get("endoftext", data.get("eos"))]
    yield Check(f"{name}.sizes", np.asarray(sizes), np.asarray(want), exact=True)
    for i, case in enumerate(data["cases"]):
        if name == "llama3" and "<|" in case["text"]:
            continue  # we read special tokens in the text, the fixture has them as bytes only
        # Our prompts are stripped, the fixture's are not.
        got = tokenizer._tokenizer.encode(case["text"], add_special_tokens=False).ids
        want = case.get("ids_with_special_token_parsing", case["ids"])
        yield Check(f"{name}.{i}", np.asarray(got), np.asarray(want), exact=True)


def clip(name, folder, data):
    files = sorted(folder.iterdir())
    tokenizer = ClipTokenizer.from_file(files[0], data["vocab_size"])
    for i, case in enumerate(data["cases"]):
        if any(mark in case["text"] for mark in NOT_AS_CLIP):
            continue
        length, want = data["context_length"], case["context_77"]
        with warnings.catch_warnings():  # some are longer than what is read
            warnings.filterwarnings("ignore", "the prompt has .* tokens")
            got = tokenizer([case["text"]], length)[0]
        want = np.pad(want, (0, length - len(want)))
        yield Check(f"{name}.{i}", got, want, exact=True)
