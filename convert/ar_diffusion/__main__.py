"""`python -m convert.ar_diffusion`."""

import sys

from convert.ar_diffusion.command import main

if __name__ == "__main__":
    sys.exit(main())
