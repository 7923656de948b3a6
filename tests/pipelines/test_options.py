"""Options of pipelines: the last values that are allowed and the first that are not."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from dicode_jax import config as config_lib
from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.pipelines import checks, options
from dicode_jax.pipelines.dicode import PipelineConfig
from dicode_jax.pipelines.divot import DivotConfig
from dicode_jax.pipelines.dynamicrafter import DynamiCrafterConfig

ABOVE, BELOW = math.nextafter(1.0, 2.0), -math.nextafter(0.0, 1.0)
BOUNDS = {  # name: (lowest, the next below, highest, the next above)
    "num_clips": (1, 0, 1800, 1801),
    "num_frames": (1, 0, 256, 257),
    "num_inference_steps": (1, 0, 1000, 1001),
    "deep_cache_interval": (1, 0, 1000, 1001),
    "fs": (1, 0, 2**31 - 1, 2**31),
    "lag": (0, -1, 1000, 1001),
    "history_noise": (0, -1, 999, 1000),
    "guidance_scale": (-BELOW, 0.0, 100.0, 100.1),
    "guidance_rescale": (0.0, BELOW, 1.0, ABOVE),
    "eta": (0.0, BELOW, 1.0, ABOVE),
    "fps": (-BELOW, 0.0, 1000.0, 1000.1),
    "diffusion_guidance_scale": (0.0, BELOW, 100.0, 100.1),
    "motion_score": (0.0, BELOW, 1000.0, 1000.1),
    "temperature": (1e-6, math.nextafter(1e-6, 0.0), 100.0, 100.1),
    "top_k": (1, 0, 2**24, 2**24 + 1),
    "top_p": (-BELOW, 0.0, 1.0, ABOVE),
}


def test_every_option_has_its_bounds():
    assert {*BOUNDS, "sampler", "guidance_interval", "ramp", "carry"} == set(options.OPTIONS)


def test_an_interval_ascends_within_its_bounds():
    for value in ([0, 1], (0.2, 0.2), np.array([0.0, 0.5])):
        assert options.check(guidance_interval=value)["guidance_interval"] == tuple(value)
    for value in ((0.5, 0.2), (-0.1, 1), (0, ABOVE), (0, math.nan), (0, 0.5, 1), "01", 1, (0, "1")):
        with pytest.raises(UserError, match=r"^guidance_interval: want two numbers that ascend"):
            options.check(guidance_interval=value)


@pytest.mark.parametrize("name", BOUNDS)
def test_the_last_values_are_allowed_and_the_next_are_not(name):
    lowest, below, highest, above = BOUNDS[name]
    for value in (lowest, highest, np.asarray(lowest)):
        got = options.check(**{name: value})[name]
        assert got == value
        assert type(got) is type(lowest)
    for value in (below, above, True, "1", math.nan, math.inf, [1]):
        if value is not None:
            with pytest.raises(UserError, match=f"^{name}: want a (whole|finite) number"):
                options.check(**{name: value})


def test_a_name_is_one_of_those_there_are():
    assert options.check(sampler="dpm++", eta=None) == {"sampler": "dpm++"}
    for value in ("euler", 2, ["ddim"]):
        with pytest.raises(UserError, match=r"^sampler: want ddim or dpm\+\+ or unipc, got "):
            options.check(sampler=value)
    with pytest.raises(UserError, match="there is no option steps; there are num_clips, num_fr"):
        options.check(eta=1.0, steps=3)


@pytest.mark.parametrize("quality", options.QUALITIES)
def test_presets_set_what_they_say_and_options_go_before_them(quality):
    own = SamplingConfig(num_inference_steps=17, sampler="dpm++", guidance_scale=2.0)
    sampling_of = functools.partial(checks.sampling_of, own, NoiseSchedule(), quality=quality)
    found = {k: v for k, v in vars(sampling_of()).items() if v != getattr(own, k)}
    said = options.QUALITIES[quality]
    assert {k: vars(sampling_of())[k] for k in said} == said
    assert found.keys() <= said.keys()
    changed = sampling_of(num_inference_steps=3, deep_cache_interval=2, eta=None)
    changes = {"num_inference_steps": 3, "deep_cache_interval": 2}
    assert changed == dataclasses.replace(own, **{**said, **changes})


def test_standard_is_the_default_and_best_is_how_the_original_samples():
    own = SamplingConfig(num_inference_steps=7)
    schedule = NoiseSchedule()
    assert checks.sampling_of(own, schedule) == own
    assert checks.sampling_of(own, schedule, quality="standard") == own
    assert checks.sampling_of(own, schedule, quality="best") == SamplingConfig()


@pytest.mark.parametrize(("own", "steps"), [(7, 7), (10, 10), (50, 10)])
def test_a_draft_takes_ten_steps_or_the_models_own(own, steps):
    config, schedule = SamplingConfig(num_inference_steps=own), NoiseSchedule()
    draft = checks.sampling_of(config, schedule, quality="draft")
    assert draft.num_inference_steps == steps
    more = checks.sampling_of(config, schedule, quality="draft", num_inference_steps=20)
    assert more.num_inference_steps == 20


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"quality": "great"}, "^quality: want draft or standard or best, got 'great'$"),
        ({"sampler": "unipc", "eta": 0.5}, "^eta: unipc adds no noise, got eta 0.5; leave it out"),
        ({"guidance_scale": 1.0, "guidance_interval": (0, 0.5)}, "guidance is off; give a gui"),
        ({"lag": 2}, "^there is no option lag of sampling; there are quality, num_frames, "),
        ({"steps": 2}, "^there is no option steps of sampling"),
    ],
)
def test_what_would_change_nothing_is_refused(changes, line):
    with pytest.raises(UserError, match=line) as caught:
        checks.sampling_of(SamplingConfig(), NoiseSchedule(), **changes)
    assert "\n" not in str(caught.value)


def test_what_is_refused_when_asked_for_may_stand_in_a_preset_or_config():
    own = SamplingConfig(guidance_scale=1.0, guidance_interval=(0.0, 0.5))
    for changes in ({"quality": "best", "sampler": "unipc"}, {"sampler": "unipc", "eta": 0.0}):
        assert checks.sampling_of(own, NoiseSchedule(), **changes).sampler == "unipc"


def test_frames_may_have_to_be_even():
    rule = options.Whole(1, is_even=True)
    assert rule(4) == 4
    with pytest.raises(ValueError, match="want an even number, got 3"):
        rule(3)


def test_seeds_count_up_or_are_given_each():
    assert options.check_seeds(7, 3) == [7, 8, 9]
    assert options.check_seeds(2**32 - 2, 2) == [2**32 - 2, 2**32 - 1]
    assert options.check_seeds(np.array([5, 0]), 2) == [5, 0]
    for seed, count in ((2**32 - 2, 3), (-1, 1), (2**32, 1), ([1], 2), ([1, 2**32], 2)):
        with pytest.raises(UserError, match=r"^seed: "):
            options.check_seeds(seed, count)


def test_keyframes_are_two_or_more_and_inside():
    assert options.check_keyframes([0, -4, 3], 4) == [0, -4, 3]
    for keyframes in ([0, 4], [-5, 0], [1], "01", 1, np.array(1)):
        with pytest.raises(UserError, match=r"^keyframes: "):
            options.check_keyframes(keyframes, 4)


def test_prompts_are_texts():
    assert options.check_prompts("a") == ["a"]
    assert options.check_prompts(("a", "b")) == ["a", "b"]
    for prompt in ([], None, b"a", ["a", 1]):
        with pytest.raises(UserError, match="prompt"):
            options.check_prompts(prompt)


def test_a_value_is_shown_on_one_line_of_60_signs():
    assert options.shown("a\nb") == r"'a\nb'"
    assert options.shown([1, 2]) == "[1, 2]"
    assert options.shown(int("1" * 60)) == "1" * 60
    assert options.shown(int("1" * 61)) == "1" * 57 + "..."


GOOD = {"frame_size": 64, "fps": 8.0, "sampling": {"num_frames": 16, "drop_tokens": -1}}


@pytest.mark.parametrize("kind", [PipelineConfig, DynamiCrafterConfig, DivotConfig])
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        *(({"fps": x}, "fps: want a finite number above 0 ") for x in (0, -1, 1001)),
        ({"fps": math.nan}, "want a finite number, got nan"),
        *(({"frame_size": x}, "frame_size: want a whole number") for x in (0, -64, 2**14 + 1)),
        ({"sampling": {"num_frames": 10**6}}, "num_frames: want a whole number from 1 to 256"),
        ({"sampling": {"num_inference_steps": 10**9}}, "num_inference_steps: want a whole number"),
        ({"sampling": {"fs": 2**63}}, "fs: want a whole number from 1 to 2147483647"),
        ({"sampling": {"guidance_scale": -1.0}}, "guidance_scale: want a finite number above 0"),
        ({"sampling": {"deep_cache_interval": 1001}}, "deep_cache_interval: want a whole number"),
        ({"sampling": {"guidance_scale": 1e300}}, "guidance_scale: want a finite number above 0"),
        ({"sampling": {"drop_tokens": -2}}, "drop_tokens: want a whole number from -1"),
        ({"sampling": {"drop_tokens": 2**63}}, "drop_tokens: want a whole number from -1"),
        ({"sampling": {"table_dtype": "x"}}, "table_dtype: want float32 or float16, got 'x'"),
    ],
)
def test_the_config_of_a_pipeline_keeps_to_the_same_bounds(kind, changes, line):
    def pair(data):
        side = data["frame_size"]
        return data | {"frame_size": side if kind is PipelineConfig else [side] * 2}

    config_lib.from_dict(kind, pair(GOOD))
    with pytest.raises(UserError, match=line) as caught:
        config_lib.from_dict(kind, pair(GOOD | changes))
    assert "\n" not in str(caught.value)
