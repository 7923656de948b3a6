"""Options of the command line that LanDiff alone has."""

import argparse
from typing import Any

from dicode_jax.pipelines.options import OPTIONS, OneOf, Real, Whole, number

LANDIFF = {
    "motion_score": ("X", "how much moves, mostly from 0 to 1"),
    "temperature": ("X", "of drawing tokens; below 1 keeps closer to what is likely"),
    "top_k": ("N", "draw from the N likeliest tokens alone"),
    "top_p": ("X", "draw from the likeliest tokens that make up so much together"),
    "caption": ("TEXT", "what the painter is told besides the tokens"),
    "diffusion_guidance_scale": ("X", "by how much the painter's guidance exceeds 1 at most"),
    "ramp": (None, "how that guidance changes: as the release has it, or smoothly up"),
    "carry": (None, "what a further clip goes on from: latents, or frames encoded anew"),
    "offload": (None, "load one part after the other, for a device that cannot hold all"),
}
"""Option -> what its value is called, and what it does."""


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds some of them, and those of all painting."""
    for name in (*names, "diffusion_guidance_scale", "ramp", "carry"):
        rule, (metavar, text) = OPTIONS.get(name), LANDIFF[name]
        is_name = isinstance(rule, OneOf)
        known: dict[str, Any] = {"choices": rule.names} if is_name else {"metavar": metavar}
        if isinstance(rule, Whole | Real):
            known["type"] = number(int if isinstance(rule, Whole) else float, rule)
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"for LanDiff: {text}", **known)
