"""Inception-v3 of TensorFlow, whose features FID is of.

    python -m convert inception pt_inception-2015-12-05-6726825d.pth --out converted/inception

SOURCE is the file of `pytorch-fid`, which an early PyTorch wrote: save it again first. The weights
of torchvision have the same names and are refused, since distances on them are no FID.
"""

import functools
import sys
from collections.abc import Sequence

from convert.engine import command
from convert.i3d import examine
from convert.parts import inception


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit status."""
    what = "the .pth of pytorch-fid or a .safetensors of it, its folder, or a name on the Hub"
    options = command.parser("convert.inception", __doc__, source=what)
    kind, find = inception.INCEPTION_KIND, inception.find_inception
    return command.run(functools.partial(examine, "inception", kind, find), options, argv)


if __name__ == "__main__":
    sys.exit(main())
