"""Numbers on a command line, by the rules of the library."""

import argparse
from collections.abc import Callable
from typing import Any

from dicode_jax.pipelines.options import Real, Whole


def number(kind: type, rule: Whole | Real) -> Callable[[str], Any]:
    """A parser of numbers that `rule` lets pass."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = text  # which the rule refuses as it is
        try:
            return rule(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
