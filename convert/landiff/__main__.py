"""`python -m convert.landiff`."""

import sys

from convert.landiff.command import main

if __name__ == "__main__":
    sys.exit(main())
