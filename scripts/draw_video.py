"""Draws a video of the synthetic world.  python scripts/draw_video.py --out input.mp4 [--seed 0]

Prints the caption. The scene is one that training never saw, unless a caption is given.
"""

import argparse
import sys

import numpy as np

from dicode_jax.data import shapes_world as synthetic
from dicode_jax.errors import UserError
from dicode_jax.media.video import write_video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="mp4, gif or webp")
    parser.add_argument("--caption", help="a caption of the grammar; drawn from the seed if absent")
    parser.add_argument("--num-clips", type=int, default=2, help="of two seconds each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    attributes = synthetic.parse_caption(args.caption) if args.caption else None
    rng = np.random.default_rng(args.seed)
    scene = synthetic.sample_scene(rng, "test", attributes=attributes)
    video = synthetic.render(scene, args.num_clips)  # [k, f, h, w, 3]
    write_video(args.out, video.reshape(-1, *video.shape[2:]), synthetic.FPS)
    print(scene.caption)


if __name__ == "__main__":
    try:
        main()
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
