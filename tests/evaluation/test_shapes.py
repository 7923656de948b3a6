"""The judge reads drawn clips right, also blurred and noisy ones, and says when it cannot tell."""

import collections
import dataclasses

import numpy as np
import pytest

from dicode_jax.data import shapes_world as synthetic
from dicode_jax.evaluation import shapes

COUNT = 60


@pytest.fixture(scope="module")
def scenes():
    return [synthetic.scene_at(7, index, "all") for index in range(COUNT)]


@pytest.fixture(scope="module")
def clips(scenes):
    return [synthetic.render(scene)[0] for scene in scenes]


def blurred(clip, sigma, noise, rng):
    """What a small decoder makes of a clip: corners rounded, edges soft, a grain over it all."""
    steps = np.arange(clip.shape[1])
    weights = np.exp(-0.5 * ((steps[:, None] - steps) / sigma) ** 2)
    weights /= weights.sum(1, keepdims=True)
    planes = np.moveaxis(clip.astype(float), -1, 1)  # [f, c, h, w]
    soft = np.moveaxis(weights @ planes @ weights.T, 1, -1)
    return np.clip(soft + rng.normal(0, noise, clip.shape), 0, 255).astype(np.uint8)


def recolored(scene, **words):
    return dataclasses.replace(scene, attributes=dataclasses.replace(scene.attributes, **words))


def wrong(scenes, clips):
    """What is read otherwise than it was said, of whole clips and of single frames."""
    found = []
    for scene, clip in zip(scenes, clips, strict=True):
        verdict = shapes.judge(clip)
        for kind in (verdict.matches, verdict.steady):
            found += [(scene.caption, x) for x, ok in kind(scene.attributes).items() if not ok]
    return found


def test_drawn_clips_are_read_right_in_all_and_in_every_frame(scenes, clips):
    assert not wrong(scenes, clips)


@pytest.mark.long
def test_of_a_thousand_drawn_clips_each_attribute_is_read_right_in_995():
    many = [synthetic.scene_at(70, index, "all") for index in range(1000)]
    found = wrong(many, (synthetic.render(scene)[0] for scene in many))
    counts = collections.Counter(field for _, field in found)
    assert max(counts.values(), default=0) <= 5, found


@pytest.mark.parametrize(("sigma", "noise"), [(1.0, 5.0), (1.8, 8.0)])
def test_blur_and_noise_do_not_mislead(scenes, clips, sigma, noise):
    rng = np.random.default_rng(0)
    for scene, clip in zip(scenes[:20], clips[:20], strict=True):
        verdict = shapes.judge(blurred(clip, sigma, noise, rng))
        assert all(verdict.matches(scene.attributes).values()), scene.caption


def with_frames(clip, other, places):
    """A clip with those frames of another."""
    mixed = clip.copy()
    mixed[places] = other[places]
    return mixed


@pytest.mark.parametrize(
    ("field", "word"),
    [("shape", "circle"), ("color", "blue"), ("size", "large"), ("background", "gray")],
)
def test_two_frames_of_another_word_are_held_against_a_clip_that_is_right_as_a_whole(field, word):
    said = synthetic.parse_caption("a cyan cross stays still on a navy background")
    scene = synthetic.Scene(attributes=said, x=30.0, y=33.0, radius=10.0)
    radius = 13.0 if field == "size" else 10.0
    other = dataclasses.replace(recolored(scene, **{field: word}), radius=radius)
    mixed = with_frames(synthetic.render(scene)[0], synthetic.render(other)[0], [6, 7])
    verdict = shapes.judge(mixed)
    assert all(verdict.matches(said).values())
    assert not verdict.steady(said)[field]
    told = getattr(verdict.frames, field)
    assert [i for i, one in enumerate(told) if one == word] == [6, 7]


def test_wobble_is_the_deviation_of_the_colour_over_frames():
    said = synthetic.parse_caption("a large white square stays still on a black background")
    scene = synthetic.Scene(attributes=said, x=30.0, y=33.0, radius=13.0)
    clip = synthetic.render(scene)[0]
    assert shapes.judge(clip).frames.wobble == 0
    darker = clip.copy()
    darker[::2] = np.where(clip[::2] > 200, clip[::2] - 12, clip[::2])
    np.testing.assert_allclose(shapes.judge(darker).frames.wobble, 6.0, rtol=1e-6)


def test_every_color_is_read_on_every_background():
    scene = synthetic.scene_at(0, 0)
    for color in synthetic.COLORS:
        for background in synthetic.BACKGROUNDS:
            clip = synthetic.render(recolored(scene, color=color, background=background))[0]
            verdict = shapes.judge(clip)
            assert (verdict.color, verdict.background) == (color, background)


@pytest.mark.parametrize("field", ["color", "shape", "motion", "background", "size"])
def test_a_wrong_word_is_held_against_the_clip(scenes, clips, field):
    others = {
        "color": list(synthetic.COLORS),
        "shape": list(synthetic.SHAPES),
        "motion": list(synthetic.MOTIONS),
        "background": list(synthetic.BACKGROUNDS),
        "size": list(synthetic.SIZES),
    }[field]
    for scene, clip in zip(scenes[:8], clips[:8], strict=True):
        word = getattr(scene.attributes, field)
        word = others[(others.index(word) + 1) % len(others)]
        matches = shapes.judge(clip).matches(dataclasses.replace(scene.attributes, **{field: word}))
        assert matches == {name: name != field for name in shapes.FIELDS}


def test_the_way_back_is_read_as_the_opposite():
    rng = np.random.default_rng(4)
    words = synthetic.parse_caption("a red cross moves left on a black background")
    back = synthetic.render(synthetic.sample_scene(rng, attributes=words), first_clip=1)[0]
    assert shapes.judge(back).motion == "moves right"


def test_any_frame_size_and_length_can_be_judged():
    scene = synthetic.scene_at(1, 5)
    clip = synthetic.render(scene, num_frames=7, frame_size=96)[0]
    assert all(shapes.judge(clip).matches(scene.attributes).values())


def test_an_empty_or_half_empty_clip_is_unclear():
    empty = np.full((16, 64, 64, 3), synthetic.BACKGROUNDS["navy"], np.uint8)
    verdict = shapes.judge(empty)
    assert verdict.background == "navy"
    assert verdict.color == verdict.shape == verdict.motion == shapes.UNCLEAR
    half = synthetic.render(synthetic.scene_at(1, 5))[0]
    half[8:] = half[0, 0, 0]
    assert shapes.judge(half).motion == shapes.UNCLEAR


def test_noise_shows_no_known_thing():
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    verdict = shapes.judge(noise)
    assert verdict.motion == shapes.UNCLEAR or verdict.color == shapes.UNCLEAR


def test_a_jumping_object_has_no_motion():
    scene = synthetic.scene_at(1, 5)
    words = dataclasses.replace(scene.attributes, motion="stays still", size="small")
    at = [dataclasses.replace(scene, attributes=words, x=x, y=32.0, radius=8.0) for x in (16, 48)]
    clip = np.concatenate([synthetic.render(at[i % 2], num_frames=2)[0, :1] for i in range(16)])
    assert shapes.judge(clip).motion == shapes.UNCLEAR


@pytest.mark.parametrize("shape", [(16, 64, 64), (1, 64, 64, 3), (16, 64, 48, 3), (4, 8, 8, 4)])
def test_what_is_no_clip_is_refused(shape):
    with pytest.raises(ValueError, match="want a clip"):
        shapes.judge(np.zeros(shape, np.uint8))
