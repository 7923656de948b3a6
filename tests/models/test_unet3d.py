"""Video UNet: conditioning, options, initialization, sizes, errors."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dicode_jax.models.unet3d import UNet3D, UNet3DConfig
from dicode_jax.nn.rngs import ShapeRngs

TINY = UNet3DConfig(
    in_channels=3,
    out_channels=5,
    model_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    head_dim=4,
    context_dim=6,
    text_context_len=2,
    init_attention_heads=1,
    num_groups=4,
)
FRAMES_ALONE = dataclasses.replace(
    TINY, temporal_conv=False, temporal_attention=False, init_attention=False
)
B, F, H, W = 2, 3, 4, 6


def build(cfg, seed=0):
    """A model whose parameters are all random: a new one predicts zero whatever goes in."""
    graph, state = nnx.split(nnx.eval_shape(lambda: UNet3D(cfg, rngs=ShapeRngs())))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan_in = math.prod(leaf.shape[:-1])
        noise = rng.normal(size=leaf.shape) / math.sqrt(max(fan_in, 1))
        return leaf.replace(jnp.asarray(noise + (path[-1] == "scale"), leaf.dtype))

    flat = nnx.to_flat_state(state)
    return graph, nnx.from_flat_state([(path, draw(path, leaf)) for path, leaf in flat])


def forward(graph, **static):
    return jax.jit(lambda state, *args: nnx.merge(graph, state)(*args, **static))


def inputs(b=B, num_context=2 + 2 * F, seed=5):
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (b, F, H, W, 3))
    timesteps = jnp.array([7, 800, 333])[:b]
    return x, timesteps, jax.random.normal(keys[1], (b, num_context, 6)), jnp.array([6, 3, 9])[:b]


@pytest.fixture(scope="module")
def tiny():
    graph, state = build(TINY)
    call = forward(graph)
    return lambda *args: call(state, *args)


@pytest.fixture(scope="module")
def frames_alone():
    graph, state = build(FRAMES_ALONE)
    call = forward(graph)
    return lambda *args: call(state, *args)


# Attention from the second level on, from the first, or nowhere, or text read by the first layer.
SPREADING = {
    "late": {},
    "early": {"attention_resolutions": (1,), "transformer_depth": 2},
    "nowhere": {"attention_resolutions": (), "channel_mult": (1,)},
    "at once": {"init_attention_context": True},
}


@pytest.mark.parametrize("name", SPREADING)
def test_rows_of_context_that_share_a_video_are_painted_as_if_each_had_its_own(name):
    graph, state = build(dataclasses.replace(TINY, **SPREADING[name]))
    deep = jax.jit(lambda state, *args: nnx.merge(graph, state).with_deep(*args))
    again = jax.jit(
        lambda state, *args, deep: nnx.merge(graph, state).with_deep(*args, deep=deep)[0]
    )
    x, timesteps, context, fs = inputs()
    context = jnp.concatenate([context, context[:, ::-1] + 1])
    twice = (jnp.concatenate([a, a]) for a in (x, timesteps))
    want, features = deep(state, *twice, context, jnp.concatenate([fs, fs]))
    got, same = deep(state, x, timesteps, context, fs)
    assert name == "nowhere" or np.abs(got[:B] - got[B:]).max() > 1e-2
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_allclose(same, features[: len(same)], atol=1e-4)
    got = again(state, x, timesteps, context, fs, deep=features)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.long
def test_one_timestep_for_all_frames_equals_the_same_timestep_per_frame(tiny):
    x, timesteps, context, fs = inputs()
    per_frame = jnp.broadcast_to(timesteps[:, None], (B, F))
    np.testing.assert_allclose(
        tiny(x, timesteps, context, fs), tiny(x, per_frame, context, fs), atol=1e-5
    )


def test_a_frames_timestep_moves_only_that_frame_without_temporal_layers(frames_alone):
    x, timesteps, context, fs = inputs()
    per_frame = jnp.broadcast_to(timesteps[:, None], (B, F))
    a = frames_alone(x, per_frame, context, fs)
    b = frames_alone(x, per_frame.at[:, 1].add(100), context, fs)
    np.testing.assert_array_equal(a[:, [0, 2]], b[:, [0, 2]])
    assert np.abs(a[:, 1] - b[:, 1]).max() > 1e-3


def test_a_frame_sees_its_own_image_tokens_only(frames_alone):
    x, timesteps, context, fs = inputs()
    a = frames_alone(x, timesteps, context, fs)
    # Tokens after the text: frame 0 has 2 and 3, frame 1 has 4 and 5.
    b = frames_alone(x, timesteps, context.at[:, 5].add(1.0), fs)
    np.testing.assert_array_equal(a[:, [0, 2]], b[:, [0, 2]])
    assert np.abs(a[:, 1] - b[:, 1]).max() > 1e-3


def test_every_frame_sees_the_text(frames_alone):
    x, timesteps, context, fs = inputs()
    a = frames_alone(x, timesteps, context, fs)
    b = frames_alone(x, timesteps, context.at[:, 1].add(1.0), fs)
    assert np.all(np.abs(a - b).max((0, 2, 3, 4)) > 1e-4)


def test_frames_share_image_tokens_that_do_not_match_the_length_rule():
    cfg = dataclasses.replace(FRAMES_ALONE, context_rule="length", image_tokens_per_frame=2)
    graph, state = build(cfg)
    call = forward(graph)
    x, timesteps, context, fs = inputs(num_context=2 + 4)
    a = call(state, x, timesteps, context, fs)
    b = call(state, x, timesteps, context.at[:, 3].add(1.0), fs)
    assert np.all(np.abs(a - b).max((0, 2, 3, 4)) > 1e-4)


def test_both_context_rules_agree_on_the_length_that_matches():
    x, timesteps, context, fs = inputs()
    outputs = []
    for rule in ("per_frame", "length"):
        cfg = dataclasses.replace(FRAMES_ALONE, context_rule=rule, image_tokens_per_frame=2)
        graph, state = build(cfg)
        outputs.append(forward(graph)(state, x, timesteps, context, fs))
    np.testing.assert_array_equal(*outputs)


def test_text_alone_leaves_the_image_branch_out(frames_alone):
    x, timesteps, context, fs = inputs()
    without = dataclasses.replace(FRAMES_ALONE, image_cross_attention=False)
    _, state = build(FRAMES_ALONE)
    paths = dict(nnx.to_flat_state(state))
    flat = nnx.to_flat_state(nnx.split(UNet3D(without, rngs=nnx.Rngs(0)))[1])
    shared = nnx.from_flat_state([(path, paths[path]) for path, _ in flat])
    graph_without = nnx.split(UNet3D(without, rngs=nnx.Rngs(0)))[0]
    expected = forward(graph_without)(shared, x, timesteps, context, fs)  # reads the text only
    np.testing.assert_allclose(frames_alone(x, timesteps, context[:, :2], fs), expected, atol=1e-5)


@pytest.mark.long
def test_a_video_does_not_depend_on_its_batch(tiny):
    args = inputs(b=3)
    together = tiny(*args)
    alone = tiny(*(arg[1:2] for arg in args))
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)


def test_missing_fs_is_the_default(tiny):
    x, timesteps, context, fs = inputs()
    default = jnp.full((B,), TINY.default_fs)
    np.testing.assert_array_equal(tiny(x, timesteps, context), tiny(x, timesteps, context, default))
    assert np.abs(tiny(x, timesteps, context, fs) - tiny(x, timesteps, context)).max() > 1e-3


def test_a_new_model_predicts_zero_and_its_residual_blocks_add_nothing():
    model = UNet3D(TINY, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.conv_out.kernel[...], 0.0)
    block = model.mid_stage.layers[0]
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 4, 16))
    np.testing.assert_array_equal(block(x, jnp.ones((1, 1, 32))), x)


@pytest.mark.long
def test_remat_changes_neither_loss_nor_gradients():
    x, timesteps, context, fs = inputs()
    small = dataclasses.replace(
        TINY, channel_mult=(1,), attention_resolutions=(), init_attention=False
    )
    results = []
    for remat in (False, True):
        graph, state = build(dataclasses.replace(small, remat=remat))

        @jax.jit
        @jax.value_and_grad
        def loss(state, graph=graph):
            rngs = nnx.Rngs(dropout=jax.random.key(3))
            model = nnx.merge(graph, state)
            y = model(x, timesteps, context, fs, deterministic=False, rngs=rngs)
            return jnp.mean(jnp.square(y - 1.0))

        results.append(loss(state))
    (loss_a, grads_a), (loss_b, grads_b) = results
    np.testing.assert_allclose(loss_a, loss_b, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads_a), jax.tree.leaves(grads_b)):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_dropout_is_off_by_default_and_asks_for_rngs():
    cfg = dataclasses.replace(FRAMES_ALONE, dropout=0.5)
    graph, state = build(cfg)
    args = inputs()

    def run(key):
        rngs = nnx.Rngs(dropout=key)
        return nnx.merge(graph, state)(*args, deterministic=False, rngs=rngs)

    run = jax.jit(run)
    assert np.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max() > 1e-3
    with pytest.raises(ValueError, match="rngs"):
        nnx.eval_shape(lambda: UNet3D(cfg, rngs=nnx.Rngs(0))(*args, deterministic=False))


OPTIONS = {
    "deep": {"transformer_depth": 2, "num_res_blocks": 2, "channel_mult": (1, 3)},
    "heads": {"head_dim": None, "num_heads": 2, "init_attention": False},
    "no image branch": {"image_cross_attention": False},
    "fixed image scale": {"learnable_image_scale": False},
    "init attention reads text": {"init_attention_context": True},
    "no fs": {"fs_condition": False},
    "no temporal layers": {"temporal_conv": False, "temporal_attention": False},
    "bfloat16": {},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.long
def test_every_option_keeps_the_shape_of_the_output(name):
    cfg = dataclasses.replace(TINY, **OPTIONS[name])
    dtype = jnp.bfloat16 if name == "bfloat16" else None

    def run():
        return UNet3D(cfg, dtype=dtype, rngs=nnx.Rngs(0))(*inputs())

    y = jax.eval_shape(run)
    assert y.shape == (B, F, H, W, 5)
    assert y.dtype == jnp.float32


def test_modules_hold_parameters_only():
    model = UNet3D(TINY, rngs=nnx.Rngs(0))
    nnx.split(model, nnx.Param)  # raises if anything else were held


def test_full_size_has_the_released_number_of_parameters():
    model = nnx.eval_shape(lambda: UNet3D(UNet3DConfig(), rngs=ShapeRngs()))
    leaves = jax.tree.leaves(nnx.split(model, nnx.Param)[1])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 1_438_843_476


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": (B, F, H, W, 4)}, "in_channels 3"),
        ({"x": (B, F, 5, W, 3)}, "multiples of 2, got 5x6"),
        ({"timesteps": (B, F + 1)}, r"\(2,\) or \(2, 3\), got \(2, 4\)"),
        ({"context": (B, 8, 7)}, "6 wide, got 7"),
        ({"context": (B, 2 + 4, 6)}, "4 image tokens .* 3 frames"),
    ],
)
def test_wrong_shapes_are_named(change, match):
    x, timesteps, context, _ = inputs()
    args = {"x": x.shape, "timesteps": timesteps.shape, "context": context.shape} | change
    arrays = [jnp.zeros(shape) for shape in args.values()]
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda: UNet3D(FRAMES_ALONE, rngs=nnx.Rngs(0))(*arrays))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"channel_mult": (2, 2)}, "channel_mult must start with 1"),
        ({"num_groups": 3}, "multiple of num_groups"),
        ({"num_heads": 2}, "not both"),
        ({"context_rule": "frame"}, "context_rule must be one of"),
        ({"head_dim": None, "num_heads": 2}, "init_attention needs head_dim"),
    ],
)
def test_impossible_configs_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(TINY, **options)


def test_deep_features_of_the_same_step_give_the_same_prediction():
    graph, state = build(FRAMES_ALONE)
    args = inputs()
    whole, deep = jax.jit(lambda state, *args: nnx.merge(graph, state).with_deep(*args))(
        state, *args
    )
    np.testing.assert_array_equal(whole, forward(graph)(state, *args))
    assert deep.shape == (B, F, H, W, 8)
    shallow = jax.jit(
        lambda state, deep, *args: nnx.merge(graph, state).with_deep(*args, deep=deep)
    )
    again, same = shallow(state, deep, *args)
    np.testing.assert_allclose(again, whole, atol=1e-5)
    np.testing.assert_array_equal(same, deep)
    # Both what is given and what is seen now count.
    assert np.abs(shallow(state, deep + 1, *args)[0] - whole).max() > 1e-2
    assert np.abs(shallow(state, deep, args[0] + 1, *args[1:])[0] - whole).max() > 1e-2


def test_with_deep_features_no_deep_stage_runs():
    graph, state = build(FRAMES_ALONE)
    model = nnx.merge(graph, state)
    _, deep = model.with_deep(*inputs())
    del model.mid_stage
    for stages in (model.down_stages, model.up_stages):
        count = len(stages)
        shallow = {0} if stages is model.down_stages else {count - 1}
        for i in set(range(count)) - shallow:
            stages[i] = None
    assert np.isfinite(model.with_deep(*inputs(), deep=deep)[0]).all()
