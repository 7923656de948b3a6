"""What painting takes on this machine's GPU, beside what its compiled programs are bounded by.

    python -m benchmarks.gpu --minutes 8 --out gpu.json

Models of full size with random weights, in half precision; nothing is downloaded. Each program is
compiled once and timed: a clip at 50, 20 and 10 steps, deep tokens of the language model, a minute
of video through the pipeline, 2, 4 and 8 clips at once, and a profile with the costliest
operations. What no longer fits into the minutes is left out and named; compiled programs are kept,
so that a second run goes further. A bound is that of `gpu_kernels`, read from the very program that
ran, with the bandwidth and flops of this chip. `--tiny` runs small models, on any device, and has
no bounds.
"""

import argparse
import collections
import dataclasses
import functools
import gc
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import aot_gpu, gpu_kernels
from benchmarks.cpu_peers import filled
from configs import gpt2_large, tokenizer_256
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.decoder import ClipDecoder
from dicode_jax.nn.layer_stack import without_scan
from dicode_jax.pipelines.base import auto_dtype
from dicode_jax.pipelines.dicode import DiCoDePipeline, PipelineConfig
from dicode_jax.runtime import compile_cache
from dicode_jax.runtime.platform import keep_products_apart
from dicode_jax.storage.files import atomic_path, check_output
from dicode_jax.text.gpt import learn

# Bytes and bfloat16 flops a second in data sheets, and the shares of them that `gpu_kernels` takes
# a good kernel of an H200 to reach.
CHIPS = {
    "H200": (4.8e12, 989e12),
    "H100": (3.35e12, 989e12),
    "A100": (2.0e12, 312e12),
    "L40S": (0.864e12, 362e12),
    "RTX 4090": (1.008e12, 165e12),
}
SHARES = (
    gpu_kernels.BYTES_PER_SECOND / CHIPS["H200"][0],
    gpu_kernels.FLOPS_PER_SECOND / CHIPS["H200"][1],
)
PROMPT = "a red circle moves right on a black background"
TOP = 10


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
      steps: Denoising steps of a clip, the model's own first; the last are those of many clips.
      at_once: Clips in one call, besides one.
      num_clips: Of the video.
      rounds: Timed calls, after one that is not.
    """

    steps: tuple[int, ...] = (50, 20, 10)
    at_once: tuple[int, ...] = (2, 4, 8)
    num_clips: int = 30
    num_frames: int = 16
    text_length: int = 80
    rounds: int = 3


TINY = Sizes(steps=(3, 2), at_once=(2,), num_clips=2, num_frames=4, text_length=14, rounds=1)


def rates(device_kind: str) -> tuple[float, float] | None:
    """Bytes and flops a second that good kernels of a chip reach; None for one not listed."""
    for name, peak in CHIPS.items():
        if name in device_kind:
            return peak[0] * SHARES[0], peak[1] * SHARES[1]
    return None


def bound(text: str, device_kind: str) -> float | None:
    """Seconds that no such chip stays below with the program of this text; None if not known."""
    if (found := rates(device_kind)) is None:
        return None
    return sum(
        k.times * max(k.bytes / found[0], k.flops / found[1]) for k in gpu_kernels.kernels(text)
    )


def costliest(folder: pathlib.Path, count: int = TOP) -> list[dict]:
    """The operations of a trace by the time that all their calls took, with their shares of it."""
    (path,) = folder.rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    seconds: collections.Counter = collections.Counter()
    calls: collections.Counter = collections.Counter()
    for plane in devices or planes:
        for line in plane.lines:
            for event in line.events:
                if devices:
                    is_kernel = line.name.startswith("Stream")
                else:
                    is_kernel = any(name == "hlo_op" for name, _ in event.stats)
                if is_kernel:
                    seconds[event.name] += event.duration_ns / 1e9
                    calls[event.name] += 1
    whole = sum(seconds.values())
    return [
        {"name": name, "seconds": took, "calls": calls[name], "share": took / whole}
        for name, took in seconds.most_common(count)
    ]


def configs(tiny: bool):
    """Of the clip decoder and of the language model."""
    clip, lm = tokenizer_256.get_config().decoder, without_scan(gpt2_large.get_config().model)
    if not tiny:
        return clip, lm
    unet = dataclasses.replace(
        clip.unet,
        model_channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(1,),
        head_dim=8,
        context_dim=8,
        text_context_len=2,
        image_tokens_per_frame=2,
        temporal_attention=False,
        temporal_conv=False,
        init_attention=False,
        num_groups=4,
    )
    autoencoder = dataclasses.replace(
        clip.autoencoder,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        resolution=16,
        num_groups=4,
        mid_attention=False,
    )
    clip = dataclasses.replace(clip, unet=unet, autoencoder=autoencoder, num_tokens=2)
    body = dataclasses.replace(lm.body, num_layers=1, num_heads=2, embed_dim=16, max_seq_len=64)
    return clip, dataclasses.replace(lm, body=body, num_tokens=2, token_dim=8, max_keyframes=6)


class Measured:
    """Rows of a report, as long as there is time.

    Args:
      minutes: From now on; what is expected to take as long as the longest row so far and would
        pass them is left out.
      rounds: Timed calls of a row.
    """

    def __init__(self, minutes: float, rounds: int):
        self._end, self._rounds, self._longest = time.perf_counter() + 60 * minutes, rounds, 0.0
        self.rows: list[dict] = []
        self.left_out: list[str] = []

    def row(self, name: str, make: Callable[[], tuple[Callable, dict]], per: int = 1) -> None:
        """Times a call after one warm-up.

        Args:
          name: Of the row.
          make: Compiles; gives the call and what is known of it.
          per: How many clips or tokens a call makes; seconds are of one.
        """
        if not self.has_time(name):
            return
        begun = time.perf_counter()
        call, known = make()
        known = known | {"compile_seconds": time.perf_counter() - begun}
        taken = []
        for _ in range(self._rounds + 1):
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken.append((time.perf_counter() - start) / per)
        seconds = statistics.median(taken[1:])
        least = known.pop("bound", None)
        least = least and least / per
        known |= {"bound_seconds": least, "measured_over_bound": least and seconds / least}
        self.rows.append({"name": name, "seconds": seconds, "first_seconds": taken[0], **known})
        self.took(begun)

    def has_time(self, name: str) -> bool:
        """Whether the next fits; its name is kept where it does not."""
        if time.perf_counter() + self._longest <= self._end:
            return True
        self.left_out.append(name)
        return False

    def took(self, begun: float) -> None:
        """Notes how long something took."""
        self._longest = max(self._longest, time.perf_counter() - begun)


def measure(minutes: float, tiny: bool) -> dict:
    """Runs all that fits into the time."""
    device, sizes = jax.devices()[0], TINY if tiny else Sizes()
    measured = Measured(minutes, sizes.rounds)
    clip_cfg, lm_cfg = configs(tiny)
    parts = (ClipDecoder, clip_cfg), (DiCoDeLM, lm_cfg)
    types = dict.fromkeys(("dtype", "param_dtype"), auto_dtype())
    graphs, states = zip(*(filled(*part, **types) for part in parts), strict=True)

    def compiled(lowered, *args):
        """The call and what is known of it."""
        program = lowered.compile()
        memory = program.memory_analysis()
        call = lambda: program(*args)  # noqa: E731
        return call, {
            "bound": bound(program.as_text(), device.device_kind),
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        }

    @functools.cache
    def clips(count: int, steps: int):
        sampling = SamplingConfig(
            batch_guidance=True, num_inference_steps=steps, num_frames=sizes.num_frames
        )
        tokens = jnp.ones((count, 2, clip_cfg.num_tokens, clip_cfg.token_dim))
        keys = jax.random.split(jax.random.key(1), count)
        lowered = aot_gpu.lower_decode(clip_cfg, device, count, sampling, types, True)
        return compiled(lowered, states[0], tokens, keys, sampling)

    def written():
        ids, keys = (
            jnp.zeros((1, sizes.text_length), jnp.int32),
            jax.random.split(jax.random.key(2), 1),
        )
        lowered = aot_gpu.lower_generate(lm_cfg, device, ids.shape, 2, types)
        return compiled(lowered, states[1], ids, keys)

    own, *fewer, fewest = sizes.steps
    measured.row(f"clip, {own} steps", lambda: clips(1, own))
    num_tokens = 2 * (lm_cfg.num_tokens + 1) - 2
    measured.row("language model, a token", written, num_tokens)
    video = f"{sizes.num_clips} clips of a video, {own} steps"
    if measured.has_time(video):
        begun = time.perf_counter()
        pipe = _pipeline(graphs, states, sizes, own)
        measured.rows += _stream(pipe, sizes.num_clips, video)
        measured.took(begun)
        del pipe
    measured.row(f"clip, {fewest} steps", lambda: clips(1, fewest))
    profile = _profile(clips(1, fewest)[0]) if measured.has_time("profile") else []
    for steps in fewer:
        measured.row(f"clip, {steps} steps", lambda steps=steps: clips(1, steps))
    for count in sizes.at_once:
        gc.collect()
        name = f"{count} clips at once, {fewest} steps, a clip"
        measured.row(name, lambda count=count: clips(count, fewest), count)
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "tiny": tiny,
        "rates": rates(device.device_kind),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "rows": measured.rows,
        "costliest": profile,
        "left_out": measured.left_out,
    }


def _pipeline(graphs, states, sizes: Sizes, steps: int) -> DiCoDePipeline:
    decoder, language_model = map(nnx.merge, graphs, states)
    sampling = SamplingConfig(
        batch_guidance=True, num_inference_steps=steps, num_frames=sizes.num_frames
    )
    side = decoder.cfg.autoencoder.resolution
    config = PipelineConfig(frame_size=side, text_length=sizes.text_length, sampling=sampling)
    parts = {"tokenizer": None, "decoder": decoder, "language_model": language_model}
    return DiCoDePipeline(**parts, text=learn([PROMPT], vocab_size=300), config=config)


def _stream(pipe: DiCoDePipeline, num_clips: int, name: str) -> list[dict]:
    """The first video, which compiles, and the second."""
    rows = []
    for what in ("first", "second"):
        start = time.perf_counter()
        shown = pipe.stream(PROMPT, num_clips=num_clips, seed=1)
        next(shown)
        first_clip = time.perf_counter() - start
        for _ in shown:
            pass
        seconds = time.perf_counter() - start
        rows.append({"name": f"{name}, the {what}", "seconds": seconds, "first_clip": first_clip})
    return rows


def _profile(call: Callable) -> list[dict]:
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        return costliest(pathlib.Path(folder))


def table(report: dict) -> str:
    """The report for people."""
    lines = [f"{report['device']}, jax {report['jax']}"]
    if report["rates"] is None:
        lines.append("no bounds: the rates of this chip are not in benchmarks/gpu.py")
    if report["peak_bytes"]:
        lines.append(f"peak of device memory {report['peak_bytes'] / 1e9:.2f} GB")
    for r in report["rows"]:
        line = f"{r['name']:<44} {1e3 * r['seconds']:10.2f} ms"
        if "first_clip" in r:
            line += f"  first clip {r['first_clip']:.2f} s"
        if "compile_seconds" in r:
            line += f"  compiled in {r['compile_seconds']:.1f} s"
            line += f"  temporaries {r['temporary_bytes'] / 1e9:.2f} GB"
        if r.get("measured_over_bound"):
            line += f"  {r['measured_over_bound']:.2f} of bound {1e3 * r['bound_seconds']:.2f} ms"
        lines.append(line)
    for op in report["costliest"]:
        lines.append(f"{100 * op['share']:5.1f} %  {op['calls']:6d} x  {op['name'][:80]}")
    return "\n".join(lines + [f"no time left: {name}" for name in report["left_out"]])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true", help="small models, on any device")
    parser.add_argument("--out", metavar="FILE", help="a .json of all numbers")
    args = parser.parse_args(argv)
    if args.out is not None:
        check_output(args.out, (".json",))
    if not args.tiny and jax.default_backend() != "gpu":
        raise UserError(f"jax finds no GPU here but a {jax.default_backend()}; --tiny runs on it")
    compile_cache.use()
    report = measure(args.minutes, args.tiny)
    print(table(report))
    if args.out is not None:
        with atomic_path(args.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    keep_products_apart()  # before the first program
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
