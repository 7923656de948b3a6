"""The sizes that a language model's config leaves to its tokenizer."""

import dataclasses
import json
import pathlib
import shutil

import pytest

from configs import shapes_ar
from dicode_jax.errors import UserError
from dicode_jax.stages.dicode.found import with_sizes

CONFIG = shapes_ar.get_config()
OLD = pathlib.Path(__file__).parents[2] / "old_models/dicode"


@pytest.mark.parametrize(
    "size", [True, False, 0, -16, 2**40, 16.5, "16", float("nan"), float("inf")]
)
def test_a_frame_size_that_is_none_is_refused(tmp_path, size):
    folder = tmp_path / "model"
    shutil.copytree(OLD, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frame_size": size}))
    with pytest.raises(
        UserError,
        match=r"(frame_size: want a whole|is no finite) number",
    ):
        with_sizes(dataclasses.replace(CONFIG, tokenizer=str(folder)))


def test_the_frame_size_is_that_of_the_pipeline():
    assert with_sizes(dataclasses.replace(CONFIG, tokenizer=str(OLD))).frame_size == 16
