"""What eight-bit weights of linear layers would save and cost, simulated.

    python -m scripts.int8_weights --num-clips 8

Every matrix of the packaged model's UNet and language model is rounded to whole numbers of -127 to
127 with a scale for each output channel, and put back as what these stand for: that is all that an
int8 form with computing in floats would lose. The report has the bytes of all weights in bfloat16
and with these layers in int8 beside their scales, of the packaged model and of full size; PSNR of
clips, painted as drafts, to those of the unrounded decoder; how many that follow prompts are still
read rightly; and by how much deep tokens move.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import gpt2_large, tokenizer_256
from dicode_jax.data import shapes_world
from dicode_jax.evaluation import shapes
from dicode_jax.evaluation.quality import psnr
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.decoder import ClipDecoder
from dicode_jax.nn.layer_stack import without_scan
from dicode_jax.nn.rngs import blank
from dicode_jax.pipelines.dicode import DiCoDePipeline
from scripts.score_samplers import interval

WHERE = {"decoder": lambda decoder: decoder.unet, "language_model": lambda lm: lm}


def linears(module: nnx.Module) -> list[nnx.Linear]:
    """All linear layers of a module."""
    return [x for _, x in nnx.iter_modules(module) if isinstance(x, nnx.Linear)]


def rounded(kernel):
    """What a kernel `[in, out]` is as int8 with a scale for each output channel."""
    scale = jnp.maximum(jnp.abs(kernel).max(0), 1e-30) / 127
    return jnp.round(kernel / scale) * scale


def sizes(module: nnx.Module) -> dict:
    """Bytes in bfloat16, and with the matrices in int8 and scales in float32."""
    kernels = [x.kernel for x in linears(module)]
    whole = sum(x.size for x in jax.tree.leaves(nnx.state(module)))
    linear, scales = sum(x.size for x in kernels), sum(x.shape[-1] for x in kernels)
    return {
        "bfloat16_bytes": 2 * whole,
        "int8_bytes": 2 * (whole - linear) + linear + 4 * scales,
        "share_of_linear": linear / whole,
    }


def full_sizes() -> dict:
    """`sizes` of UNet and language model as in the paper."""
    decoder = blank(ClipDecoder, tokenizer_256.get_config().decoder)
    lm = blank(DiCoDeLM, without_scan(gpt2_large.get_config().model))
    return {"decoder": sizes(decoder.unet), "language_model": sizes(lm)}


def measure(num_clips: int) -> dict:
    """Sizes and errors of the packaged model, each part rounded alone."""
    scenes = [shapes_world.scene_at(1000, i, "test") for i in range(num_clips)]
    prompts = [scene.caption for scene in scenes]
    pipe = DiCoDePipeline.from_pretrained()
    parts = {name: sizes(where(pipe.parts[name])) for name, where in WHERE.items()}
    true = [shapes_world.render(scene)[0] for scene in scenes]
    read = np.stack([pipe.encode(clip) for clip in true])

    def results() -> dict:
        clips, tokens = pipe.decode(read, quality="draft"), pipe.generate_tokens(prompts)
        painted = pipe.decode(tokens, quality="draft")
        judged = [shapes.judge(x).matches(s.attributes) for s, x in zip(scenes, painted)]
        return {"clips": clips, "tokens": tokens, "right": [all(m.values()) for m in judged]}

    plain = results()
    report = {"whole": {"right": interval(np.array(plain["right"], float))}}
    for name, where in WHERE.items():
        part = pipe.parts[name]
        kept = [(layer, layer.kernel[...]) for layer in linears(where(part))]
        for layer, kernel in kept:
            layer.kernel[...] = rounded(kernel)
        pipe = DiCoDePipeline(**pipe.parts, text=pipe.text, config=pipe.config)
        other = results()
        for layer, kernel in kept:
            layer.kernel[...] = kernel
        moved = other["tokens"] - plain["tokens"]
        near = [psnr(a[None], b[None]) for a, b in zip(plain["clips"], other["clips"])]
        near = np.minimum(near, 99.0)  # equal ones have no end
        report[name] = parts[name] | {
            "clips_psnr": interval(near),
            "tokens_moved": float(np.sqrt(np.mean(moved**2) / np.mean(plain["tokens"] ** 2))),
            "right": interval(np.array(other["right"], float)),
        }
    return {"num_clips": num_clips, "packaged": report, "full_size": full_sizes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-clips", type=int, default=8, help="of the test split")
    args = parser.parse_args()
    print(json.dumps(measure(args.num_clips), indent=1))


if __name__ == "__main__":
    main()
