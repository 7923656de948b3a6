"""Every door by which files of strangers come in: valid little files, and what reads them."""

import contextlib
import csv
import dataclasses
import io
import json
import pathlib
import warnings
import zipfile
from collections.abc import Callable

import numpy as np
from hugging_face_folder import draw, write_folder
from media_files import greys, mp4_bytes, write, write_tar
from PIL import Image

from fuzz.mutators import mutate

Use = Callable[[pathlib.Path], str | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Door:
    """A way in.

    Attributes:
      name: For `--door`.
      files: Patterns of the files that are changed.
      build: Writes valid files into an empty folder.
      use: Reads them. Returns None for a result, or the line of a refusal, which may as well be
        raised as `UserError`.
      mutate: Changes the bytes of one file.
      is_alone: Whether the others of those files are taken away then.
    """

    name: str
    files: tuple[str, ...]
    build: Callable[[pathlib.Path], None]
    use: Use
    mutate: Callable[[bytes, list[bytes], np.random.Generator], bytes] = mutate
    is_alone: bool = False


def _command(*args: str) -> str | None:
    """Runs `dicode`, of whose refusal one line is wanted."""
    from dicode_jax.cli.main import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(args)
    text = said.getvalue()
    if status == 0:
        return None
    lines = [line for line in text.splitlines() if not line.startswith("dicode: warning:")]
    if status != 2 or len(lines) != 1 or "memory" in text:
        raise AssertionError(f"exit status {status}: {text[:2000]}")
    return text


# Models


def _build_model(folder: pathlib.Path) -> None:
    from tiny import tiny_pipeline

    tiny_pipeline().save_pretrained(folder / "model")


def _use_model(folder: pathlib.Path) -> str | None:
    from dicode_jax.storage import model_card, weights

    model = folder / "model"
    refusal = _command("info", str(model))
    if refusal is None:
        model_card.render(model, name="x")
    weights.read_arrays(model / "language_model/model.safetensors", on_host=True)
    return refusal


def _build_text(folder: pathlib.Path) -> None:
    from dicode_jax.data.shapes_world import all_captions
    from dicode_jax.text import gpt

    gpt.train_small(all_captions()).save(folder / "text")


def _use_text(folder: pathlib.Path) -> None:
    from dicode_jax.text.gpt import TextTokenizer

    tokenizer = TextTokenizer.from_file(folder / "text")
    tokenizer.encode(["a red circle moves right", "blue"], 14)


# Checkpoints


def _build_words(folder: pathlib.Path) -> None:
    small = pathlib.Path(__file__).parents[1] / "text/small_spiece.model"
    (folder / "spiece.model").write_bytes(small.read_bytes())


def _use_words(folder: pathlib.Path) -> None:
    from dicode_jax.text.t5 import T5Tokenizer

    with warnings.catch_warnings():  # letters that a damaged vocabulary lacks
        warnings.simplefilter("ignore", UserWarning)
        T5Tokenizer.from_file(folder)("a red circle moves right", 14)


def _tensors() -> dict:
    import torch

    kinds = (torch.float32, torch.bfloat16, torch.int64)
    return {f"layer.{i}.weight": torch.ones(3, 4, dtype=kind) for i, kind in enumerate(kinds)}


def _build_torch(folder: pathlib.Path) -> None:
    import torch

    torch.save({"state_dict": _tensors(), "epoch": 1}, folder / "plain.pt")
    torch.save(_tensors(), folder / "bare.bin")
    many = {f"{i}.{j}": torch.zeros(1) for i in range(20) for j in range(5)}
    torch.save({"module": many, "optimizer": {"state": {0: {"step": 1}}}}, folder / "many.ckpt")


def _use_torch(folder: pathlib.Path) -> str | None:
    from convert.engine.sources import open_source
    from dicode_jax.errors import UserError

    refusal = None
    for path in sorted(folder.iterdir()):
        try:
            source = open_source(path)
            for key in source:
                source[key].numpy()
            source.sha256(progress=False)
        except UserError as error:
            refusal = str(error)
    return refusal


def _mutate_torch(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Changes the archive, or what is in it, which is then packed as torch does."""
    if rng.integers(3) == 0:
        return mutate(data, others, rng)
    held, out = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = held.namelist()
    changed = next(n for n in names if n.endswith("data.pkl"))
    if rng.integers(4) == 0:
        changed = names[int(rng.integers(len(names)))]
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            content = held.read(name)
            archive.writestr(name, mutate(content, [content], rng) if name == changed else content)
    return out.getvalue()


def _build_hugging_face(folder: pathlib.Path) -> None:
    width, vocab = 8, 11
    config = {"model_type": "gpt2", "activation_function": "gelu_new", "n_embd": width}
    config |= {"n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": vocab}
    config |= {"eos_token_id": 10, "layer_norm_epsilon": 1e-05}
    widths = {"ln_1": (), "ln_2": (), "attn.c_attn": (24,), "attn.c_proj": (8,)}
    widths |= {"mlp.c_fc": (32,)}
    shapes = {"wte.weight": (vocab, width), "wpe.weight": (16, width)}
    shapes |= {f"h.0.{name}.weight": (width, *out) for name, out in widths.items()}
    shapes |= {f"h.0.{name}.bias": out or (width,) for name, out in widths.items()}
    shapes |= {"h.0.mlp.c_proj.weight": (32, width), "h.0.mlp.c_proj.bias": (width,)}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    write_folder(folder / "gpt2", config, draw(shapes), num_shards=2)


def _use_hugging_face(folder: pathlib.Path) -> str | None:
    import shutil

    from convert.gpt2 import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main([str(folder / "gpt2"), "--out", str(folder / "out")])
    shutil.rmtree(folder / "out", ignore_errors=True)
    if status not in (0, 2):
        raise AssertionError(f"exit status {status}: {said.getvalue()[:2000]}")
    lines = [line for line in said.getvalue().splitlines() if "warn" not in line.lower()]
    if status and len(lines) != 1:
        raise AssertionError(said.getvalue()[:2000])
    return said.getvalue() if status else None


def _build_yaml(folder: pathlib.Path) -> None:
    (folder / "a.yaml").write_text(
        "model:\n  target: a.b.C\n  params:\n    rate: 1.0e-05\n    one: {a: [1, 2]}\n"
        "    when: 2024-01-01\n    text: 'it''s'\n"
    )


def _use_yaml(folder: pathlib.Path) -> None:
    from convert.engine.yaml import read_options

    read_options(folder / "a.yaml")


# Data


def _build_table(suffix: str) -> Callable[[pathlib.Path], None]:
    def build(folder: pathlib.Path) -> None:
        for name in ("a.mp4", "b.mp4"):
            (folder / name).write_bytes(mp4_bytes(greys(9, 16, 16)))
        rows = [{"video": f"{x}.mp4", "caption": f"a thing, called {x}", "n": 3} for x in "ab"]
        with (folder / f"table.{suffix}").open("w", newline="") as file:
            if suffix == "csv":
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    return build


def _use_data(pattern: str) -> Use:
    def use(folder: pathlib.Path) -> str | None:
        from dicode_jax.data import clips
        from dicode_jax.data.config import DataConfig
        from dicode_jax.data.sources.open import open_source
        from dicode_jax.errors import UserError

        path = str(folder / pattern)
        refusal = _command("data", "inspect", path)
        if refusal is not None:
            return refusal
        cfg = DataConfig(path=path, num_frames=4)
        source = open_source(cfg, split="all")
        for i in range(min(len(source), 4)):
            try:
                record = source.record(i)
                read = clips.read_frame if record.is_image else clips.read_clip
                read(record, cfg, 8, np.random.default_rng(0))
            except UserError as error:
                refusal = str(error)
        return refusal

    return use


def _build_tar(folder: pathlib.Path) -> None:
    video = mp4_bytes(greys(9, 16, 16))
    members = [("a.mp4", video), ("a.txt", b"first"), ("x/b.mp4", video)]
    write_tar(folder / "shard.tar", [*members, ("x/b.json", b'{"caption": "second"}')])


def _build_array_record(folder: pathlib.Path) -> None:
    from dicode_jax.data.sources.array_record import pack, write_shard

    video = mp4_bytes(greys(9, 16, 16))
    write_shard(folder / "a.array_record", [pack(n, [f"a {n}"], ".mp4", video) for n in "abc"])


def _build_pictures(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (24, 20, 3), np.uint8))
    folder = folder / "pictures"
    folder.mkdir()
    for suffix in ("png", "jpg", "webp", "bmp", "tif"):
        image.save(folder / f"{suffix}.{suffix}")
    image.convert("P").save(folder / "palette.png")
    image.save(folder / "packed.tif", compression="tiff_lzw")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)


VIDEOS = ("a.mp4", "b.gif", "c.webp", "d.avi", "e.mkv", "f.mov", "g.mpg", "h.webm", "i.ts")


def _build_videos(folder: pathlib.Path) -> None:
    frames = greys(9, 16, 24)
    (folder / "videos").mkdir()
    images = [Image.fromarray(frame) for frame in frames]
    for name in VIDEOS:
        path = folder / "videos" / name
        if path.suffix in (".gif", ".webp"):
            images[0].save(path, save_all=True, append_images=images[1:], duration=120)
        else:
            codec = {".webm": "libvpx", ".mpg": "mpeg1video", ".avi": "mpeg4"}.get(path.suffix)
            rate = 25 if path.suffix == ".mpg" else 8
            write(path, greys(rate + 1, 16, 24), rate=rate, codec=codec or "libx264")


def _use_videos(folder: pathlib.Path) -> str | None:
    from dicode_jax.errors import UserError

    refusal = None
    for path in sorted((folder / "videos").iterdir()):
        is_data = path.suffix != ".webp"  # in a data set it is a picture
        for read in (_frames, _keyframes, *([_clip_of_file, _clip_of_bytes] if is_data else [])):
            try:
                read(path)
            except UserError as error:
                refusal = str(error)
                assert len(refusal.splitlines()) == 1
    return refusal


def _frames(path: pathlib.Path) -> None:
    from dicode_jax.media import video

    video.probe(path)
    for _ in video.iter_frames(path):
        pass


def _keyframes(path: pathlib.Path) -> None:
    from dicode_jax.media import video

    for _ in video.iter_keyframes(path):
        pass


def _clip_of_file(path: pathlib.Path) -> None:
    from dicode_jax.data.records import MediaFile

    _clip(MediaFile(path=str(path), suffix=path.suffix))


def _clip_of_bytes(path: pathlib.Path) -> None:
    from dicode_jax.data.records import MediaBytes

    _clip(MediaBytes(data=path.read_bytes(), suffix=path.suffix))


def _clip(media) -> None:
    from dicode_jax.data import clips
    from dicode_jax.data.config import DataConfig
    from dicode_jax.data.records import Record

    record = Record(name="x", captions=(), media=media)
    clips.probe(record)
    clips.read_overview(record, 3)
    clips.read_clip(record, DataConfig(path="x", num_frames=4), 8, np.random.default_rng(0))


# What this package wrote


def _build_cache(folder: pathlib.Path) -> None:
    from dicode_jax.data import encoded_cache
    from dicode_jax.data.encoded_cache import Broken, Example, Spec

    schema = {"tokens": Spec("float32", (None, 2)), "fs": Spec("int32", ())}
    cache = folder / "cache"
    encoded_cache.write_plan(cache, {"encoder": "a" * 64, "settings": {"frame_size": 8}})
    for i in range(2):
        arrays = {"tokens": np.zeros((i + 1, 2), np.float32), "fs": np.int32(i)}
        examples = [Example(name=f"v{i}", arrays=arrays), Broken(f"b{i}", "cut")]
        path = encoded_cache.shard_path(cache, i, 2)
        encoded_cache.write_shard(path, examples, schema, {"files": str(i)})
    encoded_cache.write_manifest(cache, 2, schema)


def _use_cache(folder: pathlib.Path) -> None:
    from dicode_jax.data.encoded_cache import EncodedCache

    cache = EncodedCache(folder / "cache")
    for i in range(min(len(cache), 4)):
        cache[i]
    cache.lengths("tokens")
    assert cache.names is not None
    assert cache.broken is not None
    cache.verify()


def _build_tokens(folder: pathlib.Path) -> None:
    from safetensors.numpy import save_file

    save_file({"tokens": np.ones((3, 4, 8), np.float32)}, folder / "tokens.safetensors")
    features = {"features": np.ones((2, 5, 6), np.float32), "null_features": np.ones((5, 6), "f")}
    save_file(features, folder / "features.safetensors")


def _use_tokens(folder: pathlib.Path) -> str | None:
    from dicode_jax.cli.video import read_arrays

    for path in sorted(folder.iterdir()):
        read_arrays(path)
    return _command("info", str(path))


def _build_metrics(folder: pathlib.Path) -> None:
    lines = [{"step": i, "loss": 1 / i, "lr": 1e-4, "validation/loss": 2.0} for i in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _use_metrics(folder: pathlib.Path) -> str | None:
    return _command("metrics", str(folder))


# Names on the Hub


def _build_names(folder: pathlib.Path) -> None:
    (folder / "name").write_text("owner/model")
    (folder / "revision").write_text("v1.0")
    held = folder / "home/models--owner--model"
    (held / "refs").mkdir(parents=True)
    (held / "refs/v1.0").write_text("0" * 40)
    for place in (held / "snapshots" / ("0" * 40), folder / "home/elsewhere"):
        place.mkdir(parents=True)
        (place / "config.json").write_text('{"kind": "dicode", "version": 1}')


def _use_names(folder: pathlib.Path) -> str | None:
    from dicode_jax.errors import UserError
    from dicode_jax.storage import hub

    name, revision = (
        (folder / file).read_bytes().decode("utf-8", "surrogateescape")
        for file in ("name", "revision")
    )
    home = folder / "home"
    try:
        found = hub.find_model(name, revision=revision, cache_dir=home, local_files_only=True)
    except UserError as error:
        return str(error)
    assert found == home / "models--owner--model/snapshots" / ("0" * 40), found
    return None


DOORS = {
    door.name: door
    for door in (
        Door(name="safetensors", files=("model/*/*.safetensors",), build=_build_model,
             use=_use_model),
        Door(name="config", files=("model/config.json", "model/*/config.json"), build=_build_model,
             use=_use_model),
        Door(name="tokenizer", files=("text/*",), build=_build_text, use=_use_text),
        Door(name="words", files=("spiece.model",), build=_build_words, use=_use_words),
        Door(name="torch", files=("*.*",), build=_build_torch, use=_use_torch,
             mutate=_mutate_torch, is_alone=True),
        Door(name="hugging_face", files=("gpt2/*",), build=_build_hugging_face,
             use=_use_hugging_face),
        Door(name="yaml", files=("*",), build=_build_yaml, use=_use_yaml),
        Door(name="csv", files=("table.csv",), build=_build_table("csv"),
             use=_use_data("table.csv")),
        Door(name="jsonl", files=("table.jsonl",), build=_build_table("jsonl"),
             use=_use_data("table.jsonl")),
        Door(name="tar", files=("shard.tar",), build=_build_tar, use=_use_data("shard.tar")),
        Door(name="array_record", files=("a.array_record",), build=_build_array_record,
             use=_use_data("a.array_record")),
        Door(name="pictures", files=("pictures/*",), build=_build_pictures,
             use=_use_data("pictures"), is_alone=True),
        Door(name="videos", files=("videos/*",), build=_build_videos, use=_use_videos,
             is_alone=True),
        Door(name="cache", files=("cache/*",), build=_build_cache, use=_use_cache),
        Door(name="tokens", files=("*.safetensors",), build=_build_tokens, use=_use_tokens,
             is_alone=True),
        Door(name="metrics", files=("metrics.jsonl",), build=_build_metrics, use=_use_metrics),
        Door(name="hub", files=("name", "revision"), build=_build_names, use=_use_names),
    )
}  # fmt: skip
