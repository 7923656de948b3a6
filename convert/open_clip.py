"""`python -m convert.open_clip`, see `convert.parts.clip`."""

import sys

from convert.parts.clip import main

if __name__ == "__main__":
    sys.exit(main())
