"""What the scores of ways of sampling are made of."""

import pytest
from source_tree import ROOT

from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.pipelines import options
from scripts import score_samplers

V = NoiseSchedule(zero_terminal_snr=True, parameterization="v")


def test_calls_are_counted_by_kind():
    cfg = SamplingConfig(num_inference_steps=4, guidance_interval=(0.0, 0.5), deep_cache_interval=2)
    assert score_samplers.calls(cfg, V) == {"calls": 3, "shallow_calls": 3}


def test_every_way_is_a_setting_and_its_row_is_shown():
    for changes in score_samplers.WAYS.values():
        SamplingConfig(**changes)
    row = {"calls": 3, "shallow_calls": 2, "seconds": 0.5, "all": [0.5, 0.25, 0.75]}
    assert "| x | 3 + 2 | 0.50 |" in score_samplers.table({"x": row})
    assert score_samplers.table({"x": row}).endswith("0.500 (0.250 to 0.750) |")


@pytest.mark.parametrize("name", options.QUALITIES)
def test_the_page_says_what_each_preset_sets(name):
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert f"| `{name}` | {options.described(name)} |" in page
