"""Converts full-size checkpoints of random weights: wall time, peak memory, and a first clip.

    python -m benchmarks.convert_full_size --workdir full_size

Writes float16 files with the 2535 keys of the official tokenizer (5.2 GB) and the 498 of the
language model (1.8 GB), converts them with `python -m convert dicode` in a process of its own,
loads the result in bfloat16 and decodes one clip in two DDIM steps from the deep tokens of a video
(`--video`). Needs about 14 GB of disk and prints the figures as JSON.
"""

import argparse
import gzip
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

MANIFESTS = pathlib.Path(__file__).parents[1] / "tests" / "manifests"
BASE_VOCABULARY = 50257


def make(folder: pathlib.Path) -> None:
    """Writes the official layout with random weights that keep activations finite."""
    import torch

    from convert.dicode.found import RELEASED
    from convert.dicode.modules import LANGUAGE_MODEL
    from dicode_jax.diffusion.schedules import PERSISTENT_BUFFERS
    from dicode_jax.text.gpt import END_OF_TEXT

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def draw(key: str, shape: list[int]) -> torch.Tensor:
        if key in PERSISTENT_BUFFERS:
            return torch.from_numpy(np.asarray(RELEASED.table(key), np.float32))
        values = torch.empty(shape, dtype=torch.float16)
        if len(shape) < 2:  # norms and biases
            return values.fill_(1.0 if key.endswith("weight") else 0.0)
        fan_in = max(int(np.prod(shape[1:])), 1)
        return values.normal_(0, min(fan_in**-0.5, 0.02), generator=generator)

    def keys(name: str) -> dict[str, list[int]]:
        content = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
        return {key: entry["shape"] for key, entry in content.items()}

    system = {key: draw(key, shape) for key, shape in keys("dicode_tokenizer").items()}
    torch.save(system, folder / "pytorch_model.bin")
    del system
    agent = {
        LANGUAGE_MODEL + key: draw(key, shape)
        for key, shape in keys("dicode_llm_agent_only").items()
    }
    table, head = (f"{LANGUAGE_MODEL}llm.{key}.weight" for key in ("transformer.wte", "lm_head"))
    agent[head] = agent[table]
    torch.save(agent, folder / "gpt2_large.bin")
    text = folder / "gpt2-large"
    text.mkdir(exist_ok=True)
    letters = [chr(i) for i in range(33, 127)]
    fill = [f"<fill_{i}>" for i in range(BASE_VOCABULARY - 1 - len(letters))]
    vocabulary = {token: i for i, token in enumerate([*letters, *fill, END_OF_TEXT])}
    (text / "vocab.json").write_text(json.dumps(vocabulary))
    (text / "merges.txt").write_text("#version: 0.2\n")


def decode(model: pathlib.Path, video: str) -> dict[str, float]:
    """Loads tokenizer and decoder in bfloat16 and paints one clip in two steps."""
    import jax.numpy as jnp

    from dicode_jax import config as config_lib
    from dicode_jax.media.video import read_video
    from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
    from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
    from dicode_jax.nn.rngs import ShapeRngs
    from dicode_jax.pipelines.dicode import DiCoDePipeline, PipelineConfig
    from dicode_jax.storage import weights

    def load(name, kind, config_type):
        build = lambda cfg: kind(cfg, dtype=jnp.bfloat16, rngs=ShapeRngs())  # noqa: E731
        folder = model / name
        return weights.load_module(folder, build, config_type, param_dtype=jnp.bfloat16)[0]

    start = time.perf_counter()
    pipe = DiCoDePipeline(
        tokenizer=load("tokenizer", DeepTokenizer, DeepTokenizerConfig),
        decoder=load("decoder", ClipDecoder, ClipDecoderConfig),
        language_model=None,
        text=None,
        config=config_lib.from_json(PipelineConfig, model / weights.CONFIG_FILE),
    )
    loaded = time.perf_counter()
    tokens = pipe.encode(read_video(video).frames)
    encoded = time.perf_counter()
    clip = pipe.decode(tokens, num_inference_steps=2)
    done = time.perf_counter()
    assert clip.shape == (16, 256, 256, 3), clip.shape
    assert np.isfinite(tokens).all()
    return {
        "load_s": loaded - start,
        "encode_s": encoded - loaded,
        "decode_s": done - encoded,
        "pixels_std": float(clip.std()),
    }


def child(*args: str) -> tuple[float, float]:
    """Runs a command; seconds and peak memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *args])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(args)} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def size(folder: pathlib.Path) -> float:
    """GB of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--workdir", required=True, type=pathlib.Path)
    options.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options.add_argument("--video", help="its first and last frame are encoded")
    options.add_argument("--step", choices=("make", "decode"), help="one step, as a child process")
    args = options.parse_args()
    models, out = args.workdir / "models", args.workdir / "converted"
    if args.step == "make":
        make(models)
        return
    if args.step == "decode":
        figures = decode(out, args.video)
        figures["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        (args.workdir / "decode.json").write_text(json.dumps(figures))
        return
    here = ("-m", "benchmarks.convert_full_size", "--workdir", str(args.workdir))
    if not (models / "gpt2-large" / "merges.txt").is_file():
        child(*here, "--step", "make")
    seconds, peak = child(
        "-m", "convert", "dicode", str(models), "--out", str(out), "--dtype", args.dtype,
        "--overwrite",
    )  # fmt: skip
    figures = {
        "source_gb": size(models),
        "out_gb": size(out),
        "dtype": args.dtype,
        "convert_s": seconds,
        "convert_peak_gb": peak,
    }
    if args.video:
        child(*here, "--step", "decode", "--video", args.video)
        figures["decode"] = json.loads((args.workdir / "decode.json").read_text())
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
