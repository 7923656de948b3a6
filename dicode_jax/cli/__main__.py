"""`python -m dicode_jax.cli`, for where the `dicode` command is not on the path."""

import sys

from dicode_jax.cli.main import main

sys.exit(main())
