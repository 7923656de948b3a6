"""The synthetic world obeys its captions, is reproducible, and keeps its test split apart."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from dicode_jax.data import shapes_world as synthetic

BACKGROUND = synthetic.BACKGROUNDS


def measure(scene, frames):
    """Centre x, centre y and area of the object, in world units, for each frame."""
    color = np.array(synthetic.COLORS[scene.attributes.color], float)
    back = np.array(BACKGROUND[scene.attributes.background], float)
    axis = color - back
    cover = np.clip((frames - back) @ axis / (axis @ axis), 0, 1)  # [f, h, w]
    scale = synthetic.WORLD_SIZE / frames.shape[1]
    centers = (np.arange(frames.shape[1]) + 0.5) * scale
    area = cover.sum((1, 2))
    return (
        (cover.sum(1) @ centers) / area,
        (cover.sum(2) @ centers) / area,
        area * scale**2,
    )


def scene_of(caption, seed=0):
    rng = np.random.default_rng(seed)
    return synthetic.sample_scene(rng, attributes=synthetic.parse_caption(caption))


def test_every_caption_parses_to_what_it_was_made_from():
    captions = synthetic.all_captions()
    assert len(set(captions)) == 3 * 8 * 4 * 8 * 4
    assert [synthetic.parse_caption(c).caption for c in captions] == captions
    assert "a small red circle stays still on a black background" in captions
    assert "an orange cross grows on a gray background" in captions
    assert "a large orange cross grows on a gray background" in captions
    assert sum(caption.startswith("an ") for caption in captions) == 4 * 8 * 4


def test_the_article_that_was_said_before_orange_is_still_read():
    now, before = (f"{a} orange cross grows on a gray background" for a in ("an", "a"))
    assert synthetic.parse_caption(before).caption == now


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "a purple circle grows on a black background",
        "a red circle jumps on a black background",
        "a medium red circle grows on a black background",
    ],
)
def test_a_caption_outside_the_grammar_is_refused(caption):
    with pytest.raises(ValueError, match=r"does not read|unknown"):
        synthetic.parse_caption(caption)


def test_the_held_out_tenth_never_changes():
    held_out = {
        (c, s, m)
        for c in synthetic.COLORS
        for s in synthetic.SHAPES
        for m in synthetic.MOTIONS
        if synthetic.is_test(c, s, m)
    }
    assert len(held_out) == 27
    assert ("blue", "cross", "moves up") in held_out
    assert ("red", "circle", "moves right") not in held_out


def test_the_splits_share_nothing_and_cover_everything():
    train, test = (set(synthetic.all_captions(split)) for split in ("train", "test"))
    assert not train & test
    assert train | test == set(synthetic.all_captions())
    for index in range(200):
        assert synthetic.scene_at(3, index, "train").caption in train
        assert synthetic.scene_at(3, index, "test").caption in test


def test_a_clip_depends_on_seed_and_index_alone():
    late, early, other = (
        synthetic.render(synthetic.scene_at(seed, index, "train"), 2, first_clip=9)
        for seed, index in ((5, 7), (5, 3), (6, 7))
    )
    again = synthetic.render(synthetic.scene_at(5, 7, "train"), 2, first_clip=9)
    np.testing.assert_array_equal(again, late)
    assert not np.array_equal(late, other)
    assert not np.array_equal(late, early)
    assert (late.shape, late.dtype) == ((2, 16, 64, 64, 3), np.uint8)


@pytest.mark.parametrize("motion", synthetic.MOTIONS)
def test_the_first_clip_obeys_its_motion(motion):
    for seed in range(4):
        # Places and areas in pixels, read off soft edges.
        scene = scene_of(f"a red square {motion} on a gray background", seed)
        x, y, area = measure(scene, synthetic.render(scene)[0])
        moved = np.array([x[-1] - x[0], y[-1] - y[0]])
        growth = np.sqrt(area[-1] / area[0])
        if motion in ("grows", "shrinks"):
            low, high = synthetic.GROWTH_RANGE
            assert low - 0.05 < (growth if motion == "grows" else 1 / growth) < high + 0.05
            np.testing.assert_allclose(moved, 0, atol=0.05)
            continue
        np.testing.assert_allclose(area, area[0], rtol=0.01)
        if motion == "stays still":
            np.testing.assert_allclose(moved, 0, atol=1e-6)
        elif motion == "moves in a circle":
            steps = np.diff(np.unwrap(np.arctan2(y - scene.y, x - scene.x)))
            assert (steps > 0).all()  # clockwise on the screen
            assert steps.sum() == pytest.approx(2 * np.pi * 0.8, abs=5e-3)
        else:
            direction = synthetic._DIRECTIONS[motion]
            assert 23.9 < moved @ direction < 32.1
            assert abs(moved[::-1] @ direction) < 0.05
            np.testing.assert_allclose(np.diff(x, 2), 0, atol=0.1)  # uniform, no turn inside
            np.testing.assert_allclose(np.diff(y, 2), 0, atol=0.1)


@pytest.mark.parametrize("motion", ["moves left", "moves down", "grows", "shrinks"])
def test_motion_turns_at_keyframes_and_nowhere_else(motion):
    scene = scene_of(f"a cyan circle {motion} on a navy background", 1)
    clips = synthetic.render(scene, 5)
    np.testing.assert_array_equal(clips[0][::-1], clips[1])
    np.testing.assert_array_equal(clips[0], clips[2])
    np.testing.assert_array_equal(clips[1], clips[3])


@pytest.mark.parametrize("motion", synthetic.MOTIONS)
def test_neighbouring_clips_share_their_keyframe(motion):
    scene = scene_of(f"a large white triangle {motion} on a brown background", 2)
    clips = synthetic.render(scene, 7, num_frames=5)
    keyframes = synthetic.render_keyframes(scene, 8)
    np.testing.assert_array_equal(clips[:, 0], keyframes[:-1])
    np.testing.assert_array_equal(clips[:, -1], keyframes[1:])
    np.testing.assert_array_equal(
        synthetic.render(scene, 2, first_clip=4, num_frames=5), clips[4:6]
    )


def test_two_keyframes_tell_the_motions_apart():
    """A chord of the circle is always shorter than a straight move, so keyframes fix the clip."""
    longest_chord = 2 * synthetic.ORBIT_RANGE[1] * np.sin(np.pi * synthetic.TURNS_PER_CLIP)
    assert longest_chord < synthetic.SPAN_RANGE[0] - 2


def test_the_object_stays_inside_the_frame_and_is_visible():
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = synthetic.sample_scene(rng, "all")
        frames = synthetic.render(scene, 2, num_frames=8).reshape(-1, 64, 64, 3)
        back = np.array(BACKGROUND[scene.attributes.background])
        for edge in (frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]):
            assert (edge == back).all(), scene
        assert scene.radius >= 6.0
        assert (measure(scene, frames)[2] > 70).all(), scene


def test_sizes_do_not_overlap():
    ranges = list(synthetic.RADII.values())
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))


def test_drawing_is_anti_aliased_and_scales_with_the_frame():
    scene = scene_of("a large red circle stays still on a black background")
    small = synthetic.render(scene, frame_size=64)[0]
    large = synthetic.render(scene, frame_size=128)[0]
    reds = np.unique(small[0, ..., 0])
    assert len(reds) > 20  # between black and red
    np.testing.assert_allclose(measure(scene, small), measure(scene, large), rtol=4e-3)
    area = measure(scene, small)[2][0]
    assert area == pytest.approx(np.pi * scene.radius**2, rel=3e-3)


@pytest.mark.parametrize("wrong", [{"num_clips": 0}, {"num_frames": 1}, {"first_clip": -1}])
def test_rendering_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="want num_clips"):
        synthetic.render(synthetic.scene_at(0, 0), **wrong)


def test_workers_do_not_import_jax():
    code = "import sys, dicode_jax.data.shapes_world; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
