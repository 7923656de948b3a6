"""How a video was made, as text inside the file itself: the comment of an mp4, a chunk of a png.

A record is an object of JSON with what is needed to make the video again: model, prompt, seed,
settings, and the version of this package, under the key `dicode_jax`.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from dicode_jax.errors import UserError
from dicode_jax.storage.files import MAX_TEXT, parse_json

COMMENT = "comment"  # what FFmpeg calls the tag of an mp4
KEY = "dicode_jax"  # of the chunk of a png, and in the record itself


def to_text(record: Mapping[str, Any]) -> str:
    """A record as it is written, in ASCII."""
    return json.dumps(dict(record), allow_nan=False)


def from_text(text: Any, name: str | os.PathLike) -> Mapping[str, Any] | None:
    """The record in a text; None for the text of another program.

    Args:
      text: Of a file of anyone.
      name: What it is called.
    """
    if not isinstance(text, str) or len(text) > MAX_TEXT or not text.startswith("{"):
        return None
    try:
        found = parse_json(text, name)
    except UserError:
        return None
    return found if isinstance(found, dict) and KEY in found else None
