"""The command line: `dicode COMMAND`."""

from dicode_jax.cli.main import main

__all__ = ["main"]
