"""Sizes that are read off the keys of a checkpoint."""

import numpy as np
import pytest

from convert.engine.found import MAX_BLOCKS, Keys, resampler
from dicode_jax.errors import UserError


def test_blocks_are_counted_to_the_first_gap_and_no_file_may_name_any_number():
    keys = [f"a.h.{i}.x" for i in (*range(MAX_BLOCKS), MAX_BLOCKS + 1)]
    source = dict.fromkeys(keys, np.zeros(1))
    assert Keys(source, "a.").count("h.") == MAX_BLOCKS
    source[f"a.h.{MAX_BLOCKS}.x"] = np.zeros(1)
    with pytest.raises(UserError, match=rf"202 of a\.h\.\*, more than {MAX_BLOCKS}"):
        Keys(source, "a.").count("h.")


@pytest.mark.parametrize("channels", [0, -1])
def test_an_image_without_channels_is_refused(channels):
    names = ("proj_out", "proj_in", "layers.0.0.to_q", "layers.0.1.1", "final_proj_out")
    source = {f"a.{name}.weight": np.zeros((8, 8)) for name in names}
    source["a.latents"] = np.zeros((1, 4, 8))
    with pytest.raises(UserError, match=r"a\.\* makes an image, and the UNet has no channels"):
        resampler(Keys(source, "a."), head_dim=8, image_channels=channels)
