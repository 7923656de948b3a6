"""One command for all conversions: `python -m convert NAME SOURCE --out DIR`.

`python -m convert` lists the names; `python -m convert.NAME` does the same as `convert NAME`.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

# Name -> the module whose `main` runs it, and what it does.
COMMANDS = {
    "dicode": ("convert.dicode.command", "the official files of DiCoDe to a pipeline"),
    "dynamicrafter": ("convert.dynamicrafter", "DynamiCrafter 256, 512, 512_interp or 1024"),
    "ar_diffusion": ("convert.ar_diffusion.command", "VAE and discriminator of AR-Diffusion"),
    "landiff": ("convert.landiff.command", "LanDiff's language model, tokenizer, text encoders"),
    "cogvideox": ("convert.cogvideox", "CogVideoX-2b of diffusers to a base of LanDiff"),
    "divot": ("convert.divot", "Divot's de-tokenizer to a clip decoder"),
    "open_clip": ("convert.open_clip", "any ViT of OpenCLIP"),
    "i3d": ("convert.i3d", "I3D of Kinetics, whose logits FVD is of"),
    "inception": ("convert.inception", "Inception-v3 of TensorFlow, whose features FID is of"),
    "gpt2": ("convert.gpt2", "Hugging Face's GPT-2 to the body of a language model"),
    "llama": ("convert.llama", "Hugging Face's Llama to the body of a language model"),
    "to_torch": ("convert.to_torch", "a model of this package under the original key names"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the named conversion and gives its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    if name in ("-h", "--help"):
        print("usage: python -m convert NAME SOURCE --out DIR (NAME --help says more)\n")
        print("\n".join(f"  {name:<15}{what}" for name, (_, what) in COMMANDS.items()))
        return 0
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)
    print(f"python -m convert: error: there is no {name!r}, nearest is {near[0]}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
