"""Scores a model of the shapes world: do its clips show what held-out captions say?

    python scripts/score_shapes.py --model dicode_jax/assets/shapes --num-prompts 64 --sheet s.png

Draws captions of the test split (colour, shape and motion never seen together in training), makes
one clip for each, and lets `evaluation.shapes` read colour, shape, motion, background and size off
the pixels. With `--reconstruct` the clips of a DiCoDe model are painted from the true keyframes
instead, which leaves the language model out, and the PSNR to the true clips is printed too.
"""

import argparse
import sys

import numpy as np

from dicode_jax import load
from dicode_jax.data import shapes_world as synthetic
from dicode_jax.errors import UserError
from dicode_jax.evaluation import shapes
from dicode_jax.evaluation.quality import psnr
from dicode_jax.media.video import contact_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a pipeline's folder; the packaged model by default")
    parser.add_argument("--num-prompts", type=int, default=64, help="drawn from the seed")
    parser.add_argument("--seed", type=int, default=0, help="of captions and clips")
    parser.add_argument("--steps", type=int, help="of diffusion; the model's own by default")
    parser.add_argument("--guidance-scale", type=float, help="the model's own by default")
    parser.add_argument("--lag", type=int, help="of AR-Diffusion; the model's own by default")
    parser.add_argument("--batch-size", type=int, default=8, help="clips painted at once")
    parser.add_argument("--reconstruct", action="store_true", help="from the true keyframes")
    parser.add_argument("--sheet", help="a .png for a contact sheet of the first ten clips")
    args = parser.parse_args()
    if min(args.num_prompts, args.batch_size) < 1:
        raise UserError("--num-prompts and --batch-size must be at least 1")

    pipe = load(args.model)
    if args.reconstruct and pipe.kind != "dicode":
        raise UserError("--reconstruct is for DiCoDe models, which paint from keyframes")
    if args.lag is not None and pipe.kind != "ar_diffusion":
        raise UserError("--lag is for AR-Diffusion models")
    scenes = [synthetic.scene_at(args.seed + 1000, i, "test") for i in range(args.num_prompts)]
    captions = [scene.caption for scene in scenes]
    true = np.stack([synthetic.render(scene)[0] for scene in scenes])
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    if args.lag is not None:
        options["lag"] = args.lag
    clips = []
    for start in range(0, len(scenes), args.batch_size):
        batch = slice(start, start + args.batch_size)
        options["seed"] = args.seed + start
        if args.reconstruct:
            tokens = np.stack([pipe.encode(clip) for clip in true[batch]])
            clips.extend(pipe.decode(tokens, **options))
        else:
            clips.extend(pipe(captions[batch], **options))
    if args.reconstruct and clips[0].shape != true[0].shape:
        raise UserError(f"clips are {true[0].shape} in the shapes world, not {clips[0].shape}")
    for name, share in shapes.score(captions, clips).items():
        print(f"{name:<12} {share:.3f}")
    if args.reconstruct:
        print(f"{'psnr':<12} {psnr(true, np.stack(clips)):.2f}")
    if args.sheet:
        contact_sheet(args.sheet, clips[:10], labels=captions[:10])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
