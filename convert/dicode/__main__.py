"""`python -m convert.dicode`, see `convert.dicode.command`."""

import sys

from convert.dicode.command import main

if __name__ == "__main__":
    sys.exit(main())
