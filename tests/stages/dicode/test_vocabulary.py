"""A language model on a user's own captions: whatever they hold, it learns to spell them."""

import dataclasses
import random
import shutil

import pytest
from media_files import greys, write
from tiny import tiny_pipeline

from dicode_jax import cli
from dicode_jax import config as config_lib
from dicode_jax.data.config import DataConfig
from dicode_jax.data.records import name_hash
from dicode_jax.data.shapes_world import all_captions
from dicode_jax.errors import UserError
from dicode_jax.pipelines.dicode import DiCoDePipeline
from dicode_jax.stages.dicode import vocabulary
from dicode_jax.stages.dicode.configs import ARTrainConfig
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.text import gpt
from train import ar, loop

CAPTIONS = (
    "A dog runs, then it sits.",
    "25-year-old man's café: 3.5 stars",
    "日本語の字幕 🎬👩‍🚀 at 7 o'clock!",
)
OPTIONS = (
    *("--num-steps", "2", "--batch-size", "2", "--frame-size", "16", "--validation-examples", "2"),
    *("--model.num-tokens", "3", "--model.token-dim", "8", "--model.mlp-dim", "16"),
    *("--model.num-mixtures", "2", "--model.body.embed-dim", "16", "--model.body.num-heads", "2"),
    *("--model.body.num-layers", "1", "--optim.optimizer", "adamw", "--ema-decay", "0"),
)


@pytest.fixture(scope="module")
def pipe_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipe") / "pipe"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "videos").mkdir()
    for name, caption in zip("abc", CAPTIONS, strict=True):
        write(tmp_path / "videos" / f"{name}.mp4", greys(20, 16, 16))
        (tmp_path / "videos" / f"{name}.txt").write_text(caption, encoding="utf-8")
    return tmp_path / "videos"


def only_the_tokenizer(folder, names):
    """Leaves out the decoder, whose sample sheets take their time."""
    return {"decoder"} & set(names)


def train(workdir, videos, pipe_folder, *more):
    argv = ["--config", "configs/clips_ar.py", "--workdir", str(workdir), *OPTIONS]
    argv += ["--data.path", str(videos), "--tokenizer", str(pipe_folder), *more]
    return loop.main("train.ar", ar.build, (ARTrainConfig,), argv, settle=settle)


def test_a_learnt_vocabulary_spells_any_text():
    learnt = gpt.learn(CAPTIONS, vocab_size=400)
    texts = [*CAPTIONS, "never seen: ÄÖÜ €5 \U0001f9ff", "\x00\x7f tab\there", "  a  b\n c"]
    for text in texts:
        (row,) = learnt.encode(text, 120).ids
        assert learnt.decode(row) == text.strip()
    assert learnt.encode("A dog runs", 9).lengths == (3,)
    assert learnt.pad_id + 67 == learnt.vocab_size <= 400 + 66
    assert gpt.learn((), vocab_size=400).vocab_size == 256 + 1 + 66


def test_a_learnt_vocabulary_is_the_same_for_the_same_captions_in_any_order():
    captions = [*CAPTIONS * 5, *(f"{a} {b}." for a in "abcdefgh" for b in "12345678")]
    shuffled = random.Random(0).sample(captions, len(captions))
    first, second = (gpt.learn(x, vocab_size=330).to_json() for x in (captions, shuffled))
    assert first == second != gpt.learn(captions[1:], vocab_size=331).to_json()


@pytest.mark.slow
@pytest.mark.long
def test_a_run_spells_its_captions_and_so_does_its_model(videos, pipe_folder, tmp_path, caplog):
    run, out = tmp_path / "run", tmp_path / "model"
    reader = shutil.copytree(pipe_folder, tmp_path / "reader", ignore=only_the_tokenizer)
    assert train(run, videos, reader) == 0
    learnt = gpt.TextTokenizer.from_file(run)
    for caption in CAPTIONS:
        assert learnt.decode(learnt.encode(caption).ids[0]) == caption
    model = config_lib.from_json(ARTrainConfig, run / "config.json").model
    assert model.body.vocab_size == learnt.vocab_size
    assert (model.pad_token_id, model.image_token_id) == (learnt.pad_id, learnt.image_start_id)

    # Other captions: the run goes on with its vocabulary, says so once, and is exported with it.
    (videos / "a.txt").write_text("quite another caption, with words of its own")
    assert train(run, videos, reader, "--steps", "3") == 0
    assert caplog.text.count("others than those that this run learnt its vocabulary from") == 1
    moved = shutil.move(run, tmp_path / "moved")
    shutil.rmtree(videos)
    argv = ["export", str(moved), "--out", str(out), "--tokenizer", str(pipe_folder)]
    assert cli.main(argv) == 0
    pipe = DiCoDePipeline.from_pretrained(out)
    assert pipe.text.to_json() == learnt.to_json()
    assert pipe(CAPTIONS[2], num_clips=1, num_inference_steps=1).ndim == 5


def test_going_on_from_a_model_or_a_body_takes_its_vocabulary(videos, pipe_folder, tmp_path):
    config = ARTrainConfig(
        model=tiny_pipeline().language_model.cfg,
        tokenizer=str(pipe_folder),
        data=DataConfig(path=str(videos)),
        text_length=9,
    )
    learnt = gpt.learn(["some other words"], vocab_size=300)
    learnt.save(tmp_path / "body")
    learnt.save(tmp_path / "pipe/text")
    for start in ({"body_init": tmp_path / "body"}, {"init": tmp_path / "pipe/language_model"}):
        begun = dataclasses.replace(config, **{name: str(x) for name, x in start.items()})
        assert settle(begun, tmp_path / "run").model.body.vocab_size == learnt.vocab_size
    with pytest.raises(UserError, match="no tokenizer in"):
        settle(dataclasses.replace(config, body_init=str(tmp_path)), tmp_path / "run")


def test_the_drawn_world_and_a_named_vocabulary_give_the_ids(tmp_path, videos, pipe_folder):
    model = tiny_pipeline().language_model.cfg
    other = dataclasses.replace(model, pad_token_id=1, image_token_id=2)
    config = ARTrainConfig(model=other, tokenizer=str(pipe_folder), text_length=9)
    assert settle(config, tmp_path).model == model
    gpt.train_small(all_captions()).save(tmp_path / "named")
    data = DataConfig(path=str(videos))
    named = dataclasses.replace(config, data=data, text_tokenizer=str(tmp_path / "named"))
    assert settle(named, tmp_path).model == model


def test_what_is_held_out_teaches_no_words(videos):
    share = 0.8
    config = ARTrainConfig(
        model=tiny_pipeline().language_model.cfg,
        data=DataConfig(path=str(videos), validation=share),
        text_length=9,
    )
    sides = [name_hash(f"{x}.mp4") < share * 2**64 for x in "abc"]
    assert len(set(sides)) == 2
    want = sorted(c for c, out in zip(CAPTIONS, sides, strict=True) if not out)
    assert vocabulary.captions_of(config) == want
