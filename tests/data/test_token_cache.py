"""The cache of deep tokens: what is written is read, and what is damaged is refused."""

import dataclasses
import json
import pickle

import ml_dtypes
import numpy as np
import pytest

from dicode_jax.data import token_cache
from dicode_jax.data.token_cache import BrokenVideo, CachedVideo, TokenCache
from dicode_jax.errors import UserError

N, Z = 3, 5
ABOUT = {"tokenizer": "abcdef" * 10, "num_tokens": N, "token_dim": Z, "settings": {"seed": 0}}


def video(name, k):
    tokens = np.random.default_rng(k).normal(size=(k, N, Z)).astype(ml_dtypes.bfloat16)
    captions = (f"caption of {name}", "a dög \udcff")  # the last is not UTF-8, as names can be
    return CachedVideo(
        name=name, captions=captions, source=f"/x/{name}", tokens=tokens, times=np.arange(k) * 2.0
    )


SHARDS = ([video("a", 1), BrokenVideo("b", "cut"), video("c", 4)], [], [video("d", 2)])


def write(folder):
    for i, videos in enumerate(SHARDS):
        token_cache.write_shard(token_cache.shard_path(folder, i, len(SHARDS)), videos)
    token_cache.write_manifest(folder, len(SHARDS), ABOUT)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path)
    return tmp_path


def test_videos_come_back_in_order_across_shards_and_processes(folder):
    cache = pickle.loads(pickle.dumps(TokenCache(folder)))
    assert cache.names == ["a", "c", "d"]
    assert cache.num_keyframes.tolist() == [1, 4, 2]
    assert cache.broken == {"b": "cut"}
    for i, wanted in enumerate([video("a", 1), video("c", 4), video("d", 2)]):
        got = cache[i]
        assert got.tokens.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(got.tokens, wanted.tokens)
        np.testing.assert_array_equal(got.times, wanted.times)
        assert (got.name, got.captions) == (wanted.name, wanted.captions)


def test_manifest_counts(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    counts = {name: manifest[name] for name in ("videos", "keyframes", "broken")}
    assert counts == {"videos": 3, "keyframes": 7, "broken": 1}


def test_the_same_videos_give_the_same_bytes(folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    write(again)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 7
    assert all((folder / n).read_bytes() == (again / n).read_bytes() for n in names)


def test_another_tokenizer_or_size_is_refused(folder):
    TokenCache(folder, tokenizer=ABOUT["tokenizer"], shape=(N, Z))
    with pytest.raises(UserError, match=r"another tokenizer \(abcdefabcdef, not 123\)"):
        TokenCache(folder, tokenizer="123")
    with pytest.raises(UserError, match="3 tokens of width 5 per keyframe, the model reads 3 of w"):
        TokenCache(folder, shape=(N, Z + 1))


def test_a_torn_shard_is_refused(folder):
    path = token_cache.shard_path(folder, 0, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"tokens-00000-of-00003\.array_record is torn"):
        TokenCache(folder)
    assert token_cache.read_index(path) is None
    path.unlink()
    with pytest.raises(UserError, match="has lost its shard"):
        TokenCache(folder)


def test_verify_finds_a_flipped_bit_and_names_the_file(folder):
    TokenCache(folder).verify()
    path = token_cache.shard_path(folder, 2, 3)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: tokens-00002-of-00003\.array_record;"):
        TokenCache(folder).verify()


def test_a_cache_that_is_not_finished_says_so(folder, tmp_path_factory):
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        TokenCache(folder)
    with pytest.raises(UserError, match=r"no manifest.json$"):
        TokenCache(tmp_path_factory.mktemp("empty"))


def test_a_shard_that_fails_halfway_leaves_nothing(tmp_path):
    def videos():
        yield video("a", 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        token_cache.write_shard(token_cache.shard_path(tmp_path, 0, 1), videos())
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot write"):
        token_cache.write_shard(token_cache.shard_path(tmp_path / "no", 0, 1), [])


def test_text_that_is_no_unicode_survives():
    odd = dataclasses.replace(video("a", 1), name="\udcfe.mp4")
    assert CachedVideo.from_bytes(odd.to_bytes()).name == odd.name
