"""Scores a model of the shapes world: do its clips show what held-out captions say?

    python scripts/score_shapes.py --model dicode_jax/assets/shapes --num-prompts 64 --sheet s.png

Draws captions of the test split (colour, shape and motion never seen together in training), makes
one clip for each, and lets `evaluation.shapes` read colour, shape, motion, background and size off
the pixels. With `--reconstruct` the clips are painted from the true keyframes instead, which leaves
the language model out.
"""

import dataclasses

import numpy as np
import tyro

from dicode_jax.data import shapes_world as synthetic
from dicode_jax.evaluation import shapes
from dicode_jax.evaluation.quality import psnr
from dicode_jax.media.video import contact_sheet
from dicode_jax.pipelines.dicode import DiCoDePipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to score.

    Attributes:
      model: Pipeline folder; the packaged model by default.
      num_prompts: Held-out captions, drawn from `seed`.
      seed: Of captions and generation.
      steps: Diffusion steps; None for the model's default.
      guidance_scale: None for the model's default.
      batch_size: Clips painted at once.
      reconstruct: Paint from the true keyframes.
      sheet: Where to write a contact sheet of the first ten clips.
    """

    model: str | None = None
    num_prompts: int = 64
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 8
    reconstruct: bool = False
    sheet: str | None = None


def main(args: Arguments) -> None:
    pipe = DiCoDePipeline.from_pretrained(args.model)
    scenes = [synthetic.scene_at(args.seed + 1000, i, "test") for i in range(args.num_prompts)]
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    clips = []
    for start in range(0, len(scenes), args.batch_size):
        batch = scenes[start : start + args.batch_size]
        if args.reconstruct:
            tokens = np.stack([pipe.encode(synthetic.render(scene)[0]) for scene in batch])
            clips.extend(pipe.decode(tokens, seed=args.seed + start, **options))
        else:
            captions = [scene.caption for scene in batch]
            clips.extend(pipe(captions, seed=args.seed + start, **options))
    captions = [scene.caption for scene in scenes]
    for name, share in shapes.score(captions, clips).items():
        print(f"{name:<12} {share:.3f}")
    if args.reconstruct:
        true = np.stack([synthetic.render(scene)[0] for scene in scenes])
        print(f"{'psnr':<12} {psnr(true, np.stack(clips)):.2f}")
    if args.sheet:
        contact_sheet(args.sheet, clips[:10], labels=captions[:10])


if __name__ == "__main__":
    main(tyro.cli(Arguments))
