"""I3D of Kinetics-400, whose logits FVD is of.

    python -m convert i3d i3d_pretrained_400.pt --out converted/i3d

SOURCE has the names of `pytorch-i3d`: its own `rgb_imagenet.pt`, or `i3d_pretrained_400.pt` of
VideoGPT and TATS, the weights of TensorFlow Hub that FVD was published with. A file that an early
PyTorch wrote has to be saved again first, and of a TorchScript program the state dict.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from convert.engine import command
from convert.engine.found import Found
from convert.engine.plan import Kind
from convert.engine.sources import open_source
from convert.parts import inception


def examine(
    origin: str, kind: Kind, find: Callable[[Mapping[str, Any]], Found], args: argparse.Namespace
) -> command.Conversion:
    """What is in the file of a network that has one file and no options.

    Raises:
      UserError: The file is missing, damaged or of another model, or OUT is in the way.
    """
    reads = command.check_out(args, either=("*.safetensors", "*.pt", "*.pth"))
    source = open_source(args.source)
    told = find(source)
    done = kind.plan(source, told.config)
    report = done.report() | {"left_out": source.left_out}
    return command.Conversion(
        origin=origin,
        sources=[source],
        reads=reads,
        parts={"": command.Part(done, told.config, origin)},
        report=report,
        problems=done.problems,
        summary=f"{args.out}: {kind.build.__name__}, {report['parameters']:,} parameters",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit status."""
    what = "a .pt or .safetensors with the names of pytorch-i3d, its folder, or a name on the Hub"
    options = command.parser("convert.i3d", __doc__, source=what)
    look = functools.partial(examine, "i3d", inception.I3D_KIND, inception.find_i3d)
    return command.run(look, options, argv)


if __name__ == "__main__":
    sys.exit(main())
