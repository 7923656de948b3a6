"""`dicode info`: what a model, a video or a file of deep tokens is, from headers alone."""

import argparse
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dicode_jax.cli import landiff
from dicode_jax.cli.token_files import read_arrays
from dicode_jax.cli.video import TOKEN_SUFFIXES, say
from dicode_jax.errors import printable


def info(args: argparse.Namespace) -> None:
    """Runs `dicode info`."""
    path = None if args.path is None else pathlib.Path(args.path)
    if path is not None and os.path.isfile(path):
        if path.suffix.lower() in TOKEN_SUFFIXES:
            arrays = read_arrays(path)
            if "features" in arrays:
                b, n, z = arrays["features"].shape
                say(f"{path}: features of {b} clips, {n} x {z} each")
            elif "semantic_tokens" in arrays:
                say(f"{path}: {len(arrays['semantic_tokens'])} semantic tokens of LanDiff")
            else:
                k, n, z = arrays["tokens"].shape
                say(f"{path}: deep tokens of {k} keyframes, {n} x {z} each: {k - 1} clips")
            return
        from dicode_jax.media import video

        if path.suffix.lower() == ".png":
            _tell(path, video.read_record(path))
            return
        info = video.probe(path)
        rate = f", {info.fps:.4g} frames a second" if info.fps else ""
        lasts = f", {info.duration:.2f} s" if info.duration else ""
        say(f"{path}: a video of {info.width} x {info.height}{rate}{lasts}")
        if info.record is not None:
            _tell(path, info.record)
        return
    from dicode_jax.storage import hub, packaged

    if path is None or not os.path.isdir(path):  # else it may hold parts, which are no pipeline
        path = hub.find_model(args.path)
    checked = [packaged.check(n) for n, p in packaged.models().items() if p.samefile(path)]
    _describe(path)
    if checked:
        print(f"{'verified':<16} {checked[0]} files are as they were packaged")


def _tell(path: pathlib.Path, record: Mapping[str, Any] | None) -> None:
    """How a file was made, as it says itself."""
    if record is None:
        say(f"{path}: a picture that does not say how it was made")
        return
    for name, value in record.items():
        say(f"  {printable(name, 60):<20} {printable(value, 500)}")


def _describe(folder: pathlib.Path) -> None:
    """Parts, their origin, and what a pipeline does unless told otherwise, from headers alone."""
    from dicode_jax.pipelines.load import PIPELINES, pipeline_class
    from dicode_jax.storage import model_card

    config, kind = None, _kind(folder)
    if kind in PIPELINES:
        config = pipeline_class(kind).check_folder(folder)
    parts = model_card.inspect(folder)
    if kind is not None:
        say(f"{'kind':<16} {kind}")
    for part in parts:
        types = printable(", ".join(part.dtypes), 200)
        say(f"{printable(part.name, 60):<16} {part.num_parameters:>13,} parameters, {types}")
    size = sum(part.num_bytes for part in parts)
    say(f"{'in all':<16} {sum(p.num_parameters for p in parts):>13,}, {size / 1e6:,.1f} MB")
    if config is not None and kind is not None:
        _describe_pipeline(folder, kind, config)
    for name in dict.fromkeys(part.metadata.get("converter") for part in parts):
        if name is not None:
            say(f"{'converted by':<16} {printable(name, 200)}")
    sources = {(str(x), str(digest)) for part in parts for x, digest in part.sources.items()}
    for file, digest in sorted(sources):
        say(f"{'source':<16} {printable(digest, 80)}  {printable(file, 200)}")
    for note in model_card.licence_notes(parts):
        say(f"{'licence':<16} {printable(note, 200)}")


def _kind(folder: pathlib.Path) -> str | None:
    """Of a pipeline or a single module; None for a folder of parts, and a module of old."""
    from dicode_jax import config as config_lib
    from dicode_jax.pipelines.load import pipeline_kind
    from dicode_jax.storage.weights import CONFIG_FILE, WEIGHTS_FILE

    if os.path.isfile(folder / WEIGHTS_FILE) and os.path.isfile(folder / CONFIG_FILE):
        return config_lib.read_json(folder / CONFIG_FILE)[0]
    return pipeline_kind(folder) if os.path.isfile(folder / CONFIG_FILE) else None


def _describe_pipeline(folder: pathlib.Path, kind: str, config) -> None:
    """Size of a clip, what goes in, and the sampling defaults."""
    if kind == "ar_diffusion":
        _describe_ar_diffusion(folder, config)
        return
    if kind == "landiff":
        landiff.describe(folder, config)
        return
    size, sampling = config.frame_size, config.sampling
    h, w = (size, size) if isinstance(size, int) else size
    say(f"{'clip':<16} {sampling.num_frames} frames of {w} x {h} at {config.fps:g} a second")
    if kind == "dicode":
        _describe_dicode(folder)
    guidance = f"guidance {sampling.guidance_scale:g}"
    steps = f"{sampling.num_inference_steps} steps of {sampling.sampler}"
    say(f"{'sampling':<16} {steps}, {guidance}, eta {sampling.eta:g}")
    if kind == "dicode" and (folder / "language_model").is_dir():
        say(f"{'text':<16} {config.text_length} tokens")


def _describe_ar_diffusion(folder: pathlib.Path, config) -> None:
    from dicode_jax import config as config_lib
    from dicode_jax.models.ar_diffusion.dit import DenoiserConfig
    from dicode_jax.models.ar_diffusion.frame_vae import FrameVAEConfig
    from dicode_jax.storage.weights import CONFIG_FILE

    vae = config_lib.from_json(FrameVAEConfig, folder / "vae" / CONFIG_FILE)
    denoiser = config_lib.from_json(DenoiserConfig, folder / "denoiser" / CONFIG_FILE)
    sampling, size = config.sampling, vae.image_size
    say(f"{'video':<16} {sampling.num_frames} frames of {size} x {size} at {config.fps:g} a second")
    say(f"{'frame':<16} {vae.num_tokens} tokens of {vae.token_dim} numbers")
    say(f"{'window':<16} {denoiser.dit.num_frames} frames")
    if denoiser.num_classes:
        names = f": {', '.join(config.class_names[:8])}" if config.class_names else ""
        more = ", ..." if len(config.class_names) > 8 else ""
        say(f"{'classes':<16} {denoiser.num_classes}{printable(names, 200)}{more}")
    guidance = f"guidance {sampling.guidance_scale:g}"
    if (shares := sampling.guidance_interval) != (0, 1):
        guidance += " from {:g} to {:g} of the steps".format(*shares)
    say(f"{'sampling':<16} {sampling.num_inference_steps} steps, lag {sampling.lag}, {guidance}")


def _describe_dicode(folder: pathlib.Path) -> None:
    """What is read of a frame, and what a keyframe becomes."""
    from dicode_jax import config as config_lib
    from dicode_jax.models.dicode.decoder import ClipDecoderConfig
    from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
    from dicode_jax.storage.weights import CONFIG_FILE

    decoder = config_lib.from_json(ClipDecoderConfig, folder / "decoder" / CONFIG_FILE)
    say(f"{'keyframe':<16} {decoder.num_tokens} deep tokens of {decoder.token_dim} numbers")
    if (folder / "tokenizer").is_dir():
        reads = config_lib.from_json(DeepTokenizerConfig, folder / "tokenizer" / CONFIG_FILE)
        part = "the largest square" if reads.resize == "crop" else "the whole, stretched"
        smooth = ", antialiased" if reads.antialias else ""
        say(f"{'of a frame':<16} {part}{smooth}")
