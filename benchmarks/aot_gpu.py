"""Compiles a program for a GPU that is not there, and reads what it would move and compute.

    python -m benchmarks.aot_gpu --program clip --config configs/tokenizer_256.py
    python -m benchmarks.aot_gpu --program generate --config configs/gpt2_large.py --rows 2
    python -m benchmarks.aot_gpu --program frames --config configs/ar_diffusion/taichi_dit.py
    python -m benchmarks.aot_gpu --program landiff_write --config configs/landiff/released_lm.py

NVIDIA's part of XLA's compiler runs on any machine, told of the chip by `benchmarks/gpus/`. What it
shows is structure and a bound, never a time: each kernel takes at least what its bytes and flops
take at the rates in `gpu_kernels`. Autotuning and the cost of launches it does not show.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

PROGRAMS = (
    *("unet", "clip", "generate", "frames", "train_ar", "train_tokenizer", "train_dit"),
    *("landiff_write", "landiff_step", "landiff_chunk", "train_landiff"),
)
INSTALL = "pip install jax-cuda12-plugin=={0} jax-cuda12-pjrt=={0} nvidia-cuda-nvcc-cu12"
FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
CHIPS = pathlib.Path(__file__).parent / "gpus"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=[x.stem for x in CHIPS.iterdir()], default="h200")
    parser.add_argument("--program", choices=PROGRAMS, required=True)
    parser.add_argument("--config", type=pathlib.Path, required=True)
    parser.add_argument("--rows", type=int, default=1, help="clips, prompts or rows of a batch")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of a clip or frame")
    parser.add_argument("--keyframes", type=int, default=2, help="that `generate` writes")
    parser.add_argument("--depth", type=int, help="layers, or residual blocks of a level")
    parser.add_argument("--dtype", default="bfloat16", help="computing type outside training")
    parser.add_argument("--param-dtype", help="type of the weights; --dtype by default")
    parser.add_argument("--attention", default="auto", help="see dicode_jax.runtime.platform")
    parser.add_argument("--option", action="append", default=[], help="of XLA, NAME=VALUE")
    parser.add_argument("--text", type=pathlib.Path, help="write the compiled program here")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prepare_environment()
    report = measure(**{k: v for k, v in vars(args).items() if k != "json"})
    print(json.dumps(report) if args.json else table(report))


def prepare_environment() -> None:
    """Sets what must be set before jax is imported.

    Ends with one line when the compiler is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if importlib.util.find_spec("jax_plugins") is None or not (
        importlib.util.find_spec("jax_plugins.xla_cuda12")
        and importlib.util.find_spec("nvidia.cuda_nvcc")
    ):
        version = importlib.metadata.version("jax")
        sys.exit(f"error: XLA's compiler for NVIDIA is not installed: {INSTALL.format(version)}")


def measure(
    *,
    program: str,
    config: pathlib.Path,
    gpu: str = "h200",
    rows: int = 1,
    steps: int = 50,
    keyframes: int = 2,
    depth: int | None = None,
    dtype: str = "bfloat16",
    param_dtype: str | None = None,
    attention: str = "auto",
    option: Sequence[str] = (),
    text: pathlib.Path | None = None,
) -> dict:
    from benchmarks import aot_landiff, gpu_kernels
    from dicode_jax.config import load_config_file
    from dicode_jax.diffusion.guided import SamplingConfig
    from dicode_jax.nn.layer_stack import without_scan
    from dicode_jax.runtime.platform import tracing_for

    device = find_device(gpu)
    settings = load_config_file(config)
    if depth is not None:
        settings = shortened(settings, depth)
    types = {"dtype": dtype, "param_dtype": param_dtype or dtype}
    turns = ()  # of the loops whose turns are steps
    pretend_cudnn()
    with tracing_for(platform="gpu", attention=attention):
        if program.startswith("train"):
            lowered = lower_train(settings, device, rows)
            types = {"dtype": settings.dtype, "param_dtype": "float32"}
        elif program == "generate":
            n = settings.model.num_tokens  # of the first keyframe the prompt gives one
            turns = n - 1, *[n + 1] * (keyframes - 1)
            # As `storage.weights` loads it.
            model, ids = without_scan(settings.model), (rows, settings.text_length)
            lowered = lower_generate(model, device, ids, keyframes, types)
        elif program == "frames":
            settings = dataclasses.replace(settings, sample_steps=steps)
            turns = (steps + (settings.model.dit.num_frames - 1) * settings.sample_lag,)
            lowered = lower_frames(settings, device, rows, types)
        elif program == "landiff_write":
            num_frames = settings.model.frames.segment
            turns = (len(settings.model.layout(num_frames)),)
            run, inputs = aot_landiff.write(settings.model, rows, num_frames, types)
            lowered = lower(run, device, *inputs)
        elif program == "landiff_step":
            run, inputs = aot_landiff.step(settings.model, rows, types)
            lowered = lower(run, device, *inputs)
        elif program == "landiff_chunk":
            run, inputs = aot_landiff.chunk(settings.model, rows, types)
            lowered = lower(run, device, *inputs)
        else:
            turns = (steps,) if program == "clip" and steps > 1 else ()
            sampling = SamplingConfig(batch_guidance=True, num_inference_steps=steps)
            is_clip = program == "clip"
            lowered = lower_decode(settings.decoder, device, rows, sampling, types, is_clip)
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=dict(x.split("=", 1) for x in option) or None)
    seconds = time.perf_counter() - start
    written = compiled.as_text()
    if text is not None:
        text.write_text(written)
    memory = compiled.memory_analysis()
    return {
        "gpu": gpu,
        "program": program,
        "config": config.stem,
        "rows": rows,
        "steps": sum(turns) or 1,
        "depth": depth,
        **types,
        "attention": attention,
        "options": list(option),
        "compile_seconds": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        **gpu_kernels.summary(gpu_kernels.kernels(written), *turns),
    }


def find_device(gpu: str):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology="1x1x1",
        target_config=(CHIPS / f"{gpu}.txtpb").read_text(),
    )
    return topology.devices[0]


def pretend_cudnn(put: Callable = setattr) -> None:
    """Lets jax trace cuDNN's attention, which asks the devices of this machine if they can."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    put(fused, "check_cudnn_version", lambda: 91000)
    put(fused, "check_compute_capability", lambda least: float(least) <= 9.0)
    put(fused, "is_cuda_compute_capability_equal", lambda wanted: wanted == "9.0")


def shortened(settings, depth: int):
    """The config with fewer layers."""
    if hasattr(model := getattr(settings, "model", None), "dit"):
        own = {"dit": dataclasses.replace(model.dit, num_layers=depth)}
        if hasattr(model, "control_layers"):
            own["control_layers"] = min(model.control_layers, depth)
        return dataclasses.replace(settings, model=dataclasses.replace(model, **own))
    if hasattr(settings, "model"):
        body = dataclasses.replace(settings.model.body, num_layers=depth)
        return dataclasses.replace(settings, model=dataclasses.replace(settings.model, body=body))
    unet = dataclasses.replace(settings.decoder.unet, num_res_blocks=depth)
    vision = dataclasses.replace(settings.tokenizer.vision, num_layers=depth)
    return dataclasses.replace(
        settings,
        decoder=dataclasses.replace(settings.decoder, unet=unet),
        tokenizer=dataclasses.replace(settings.tokenizer, vision=vision),
    )


def lower_train(settings, device, rows: int):
    from dicode_jax.runtime.sharding import make_mesh
    from dicode_jax.stages.registry import build_stage
    from dicode_jax.training.setup import plan_stage

    changes = {"batch_size": rows}
    if hasattr(settings, "model"):  # its targets come from a cache of tokens or latents
        changes["data"] = dataclasses.replace(settings.data, kind="cache", path="unused")
    stage = build_stage(dataclasses.replace(settings, **changes))
    plan = plan_stage(stage, make_mesh(settings.sharding, [device]))
    return plan.lower(stage.batch_shapes(rows))


def lower_decode(cfg, device, rows: int, sampling, types: dict, whole: bool):
    """Clips and their pixels, of decoder, tokens, keys and sampling; or one guided step."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dicode_jax.diffusion.guided import guided_denoise, make_guide
    from dicode_jax.models.dicode import decoder as decoders
    from dicode_jax.nn.rngs import blank

    graph, state = nnx.split(blank(decoders.ClipDecoder, cfg, **types))
    tokens = jax.ShapeDtypeStruct((rows, 2, cfg.num_tokens, cfg.token_dim), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    latents = (rows, sampling.num_frames, *cfg.latent_shape)

    def clip(state, tokens, keys, sampling):
        decoder = nnx.merge(graph, state)
        painted = decoders.decode_clip(decoder, tokens, keys, sampling)
        return decoders.to_uint8(decoders.decode_latents(decoder, painted))

    def step(state, tokens, x, sampling):
        decoder = nnx.merge(graph, state)
        fs = jnp.full((rows,), sampling.fs, jnp.int32)
        denoise = guided_denoise(
            lambda x, times, condition: decoder.denoise(x, times, condition, fs),
            decoders.clip_conditions(decoder, tokens, sampling),
            make_guide(sampling),
            batched=True,
            spreads=True,
        )
        return denoise(x, jnp.full((rows,), 500, jnp.int32), 0)

    if whole:
        return lower(clip, device, state, tokens, keys, sampling)
    return lower(step, device, state, tokens, jax.ShapeDtypeStruct(latents, jnp.float32), sampling)


def lower_frames(settings, device, rows: int, types: dict):
    """Latents of a window of AR-Diffusion, all calls of the network."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dicode_jax.models.ar_diffusion.dit import Denoiser
    from dicode_jax.nn.rngs import blank
    from dicode_jax.stages.ar_diffusion.dit import generate

    graph, state = nnx.split(blank(Denoiser, settings.model, **types))

    def paint(state, classes):
        return generate(settings, nnx.merge(graph, state), classes)

    return lower(paint, device, state, jax.ShapeDtypeStruct((rows,), jnp.int32))


def lower_generate(cfg, device, ids: tuple[int, int], keyframes: int, types: dict):
    """Deep tokens, of language model, text ids of that shape and keys."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dicode_jax.models.dicode.ar import DiCoDeLM
    from dicode_jax.models.dicode.generate import generate
    from dicode_jax.nn.rngs import blank

    graph, state = nnx.split(blank(DiCoDeLM, cfg, **types))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ids[0]))

    def write(state, ids, keys):
        return generate(nnx.merge(graph, state), ids, num_keyframes=keyframes, keys=keys)

    return lower(write, device, state, jax.ShapeDtypeStruct(ids, jnp.int32), keys)


def lower(function, device, *args):
    import jax

    place = jax.sharding.SingleDeviceSharding(device)

    def on_device(x):
        if not hasattr(x, "shape"):
            x = jax.eval_shape(lambda: jax.numpy.asarray(x))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    traced = jax.jit(function).trace(*jax.tree.map(on_device, args))
    return traced.lower(lowering_platforms=("cpu" if device.platform == "cpu" else "cuda",))


def table(report: dict) -> str:
    """The report for people."""
    from benchmarks import gpu_kernels

    r, giga = report, 1e9
    kinds = r["bytes_by_kind"]
    lines = [
        f"{r['program']} of {r['config']}, {r['rows']} row(s), {r['steps']} step(s), "
        f"{r['dtype']} with weights in {r['param_dtype']}, for one {r['gpu']}",
        f"compiled in        {r['compile_seconds']:.0f} s",
        f"arguments          {r['argument_bytes'] / giga:.2f} GB",
        f"temporaries        {r['temporary_bytes'] / giga:.2f} GB",
        f"computes           {r['flops'] / 1e12:.2f} TFLOP",
        f"moves              {r['bytes'] / giga:.1f} GB in {r['kernels']} kernels",
        *(
            f"  {kind:<16} {kinds[kind] / giga:.1f} GB in {r['kernels_by_kind'][kind]}"
            for kind in sorted(kinds, key=lambda kind: -kinds[kind])
        ),
        f"a step             {r['bytes_per_step'] / giga:.2f} GB in "
        f"{r['kernels_per_step']} kernels",
        f"arguments changed inside loops, a step: {r['conversions_per_step']} conversions, "
        f"{r['copies_per_step']} copies, {r['wasted_bytes_per_step'] / giga:.3f} GB",
        f"in float32         {r['float32_products']} products, "
        f"{r['float32_convolutions']} convolutions",
        f"bound              {1e3 * r['bound_seconds']:.1f} ms: the sum over kernels of "
        f"max(bytes / {gpu_kernels.BYTES_PER_SECOND / 1e12:.1f} TB/s, "
        f"flops / {gpu_kernels.FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s)",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
