"""Clip decoder: conditioning, guidance, sampling, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models.dicode.tiny_decoder import CONFIG, TOKENS, build, with_prior

from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.models.dicode import decoder as decoding
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.unet3d import UNet3D
from dicode_jax.nn.resampler import ResamplerConfig

SAMPLING = SamplingConfig(num_frames=4, num_inference_steps=3, batch_guidance=True)
KEYS = jax.random.split(jax.random.key(2), 3)


@pytest.fixture(scope="module")
def decoder():
    return build()


@pytest.fixture(scope="module")
def decode(decoder):
    """Compiled `decode_clip` of the decoder; one program per config and shape."""
    graph, state = nnx.split(decoder)

    def run(state, tokens, keys, cfg):
        return decoding.decode_clip(nnx.merge(graph, state), tokens, keys, cfg)

    compiled = jax.jit(run, static_argnums=3)
    return lambda *args: compiled(state, *args)


def test_the_first_half_of_the_frames_sees_the_head_and_the_second_the_rear_tokens(decoder):
    context, concat = decoder.condition(TOKENS, 4)
    assert context.shape == (3, 3 + 4 * 4, 6)
    np.testing.assert_array_equal(context[:, :3], np.broadcast_to(decoder.text_context, (3, 3, 6)))
    per_frame = context[:, 3:].reshape(3, 4, 4, 6)
    np.testing.assert_array_equal(per_frame, TOKENS[:, jnp.array([0, 0, 1, 1])])
    assert concat.shape == (3, 4, 4, 4, 3)
    np.testing.assert_array_equal(concat[:, 0], concat[:, 1])
    np.testing.assert_array_equal(concat[:, 2:], concat[:, jnp.array([3, 3])])
    assert np.abs(concat[:, 1] - concat[:, 2]).max() > 0.1


def test_every_frame_sees_the_image_of_tokens_between_and_its_place_where_asked(decoder):
    unet = dataclasses.replace(CONFIG.unet, in_channels=2 + 3 + 1)
    between = build(dataclasses.replace(CONFIG, unet=unet, latent_view="between"))
    context, concat = between.condition(TOKENS, 4)
    assert concat.shape == (3, 4, 4, 4, 4)
    for frame in range(4):
        tokens = TOKENS[:, :1] + (TOKENS[:, 1:] - TOKENS[:, :1]) * frame / 3
        image = between.latent_images(tokens)[:, 0]
        np.testing.assert_allclose(concat[:, frame, ..., :3], image, atol=1e-5)
        np.testing.assert_allclose(concat[:, frame, ..., 3], frame / 3, atol=1e-6)
    np.testing.assert_array_equal(context, decoder.condition(TOKENS, 4).context)
    clip = decoding.decode_clip(between, TOKENS, KEYS, SAMPLING)
    assert clip.shape == (3, 4, 4, 4, 2)
    assert np.isfinite(clip).all()


def test_the_unet_says_what_a_gaussian_about_the_latent_image_leaves_open(monkeypatch):
    decoder = build(with_prior(latent_prior=0.3))
    said = jax.random.normal(jax.random.key(3), (3, 4, 4, 4, 2))
    read = []
    monkeypatch.setattr(UNet3D, "__call__", lambda self, x, *_, **__: read.append(x) or said)
    condition = decoder.condition(TOKENS, 4)
    x = jax.random.normal(jax.random.key(4), said.shape)
    timesteps = jnp.array([0, 400, 999])
    got = decoder.denoise(x, timesteps, condition, None)

    tables = decoder.cfg.schedule.buffers
    wide = lambda name: tables[name].astype(np.float64)[timesteps][:, None, None, None, None]  # noqa: E731
    a, s = wide("sqrt_alphas_cumprod"), wide("sqrt_one_minus_alphas_cumprod")
    image, x = np.asarray(condition.concat, np.float64), np.asarray(x, np.float64)
    mean_x, var_x = a * image, a**2 * 0.3**2 + s**2
    mean_v, var_v = -s * image, a**2 + s**2 * 0.3**2
    both = a * s - a * s * 0.3**2  # covariance of x = a z + s e and v = a e - s z
    mean = mean_v + both / var_x * (x - mean_x)
    deviation = np.sqrt(var_v - both**2 / var_x)
    np.testing.assert_allclose(got, mean + deviation * np.asarray(said), atol=1e-4)
    np.testing.assert_allclose(read[0][..., :2], (x - mean_x) / np.sqrt(var_x), atol=1e-3)
    np.testing.assert_array_equal(read[0][..., 2:], condition.concat)
    std = decoder.cfg.prior.output_std(timesteps, 1)
    np.testing.assert_allclose(std, deviation.ravel(), rtol=1e-4)


def test_deep_features_say_the_same_beside_a_prior():
    decoder = build(with_prior(latent_prior=0.3))
    condition = decoder.condition(TOKENS, 4)
    x, timesteps = jax.random.normal(jax.random.key(4), (3, 4, 4, 4, 2)), jnp.array([0, 400, 999])
    got, _ = decoder.denoise_deep(x, timesteps, condition, None, None)
    np.testing.assert_allclose(got, decoder.denoise(x, timesteps, condition, None), atol=1e-5)
    clip = decoding.decode_clip(decoder, TOKENS, KEYS, SAMPLING)
    assert np.isfinite(clip).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_prior": 0.0}, "latent_prior: std must be positive and finite, got 0.0"),
        (
            {"latent_head": CONFIG.latent_head},
            r"images of the autoencoder's 2 latent channels, its output_shape is \(4, 4, 3\)",
        ),
        ({"latent_head": None}, "its output_shape is None"),
        (
            {"schedule": NoiseSchedule(parameterization="eps")},
            'a schedule with parameterization "v"',
        ),
    ],
)
def test_a_prior_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        with_prior(**{"latent_prior": 0.3, **options})


def test_null_condition_repeats_the_null_tokens_and_keeps_a_given_concat(decoder):
    cond = decoder.condition(TOKENS, 4)
    null = decoder.null_condition(3, 4, concat=cond.concat)
    np.testing.assert_array_equal(
        null.context[:, 3:].reshape(3, 4, 4, 6),
        np.broadcast_to(decoder.null_tokens[...], (3, 4, 4, 6)),
    )
    assert null.concat is cond.concat
    own = decoder.null_condition(3, 4)
    np.testing.assert_array_equal(own.context, null.context)
    assert np.abs(own.concat - cond.concat).max() > 0.1


def counted(decoder, monkeypatch):
    """Records the batch size of every network evaluation."""
    batches = []

    def fake(self, x, timesteps, condition, fs, **_):
        rows = len(condition.context)
        assert (len(timesteps), len(fs), rows % len(x)) == (len(x), rows, 0)
        batches.append(rows)
        mean = condition.context.mean((1, 2))[:, None, None, None, None]
        return jnp.tile(x, (rows // len(x), 1, 1, 1, 1)) * mean + condition.concat.mean(
            -1, keepdims=True
        )

    monkeypatch.setattr(ClipDecoder, "denoise", fake)
    return batches


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guidance_scale": 1.0}, [3]),
        ({}, [6]),
        ({"batch_guidance": False}, [3]),  # traced once, in a loop over branches
    ],
)
def test_guidance_decides_on_how_many_samples_the_network_runs(
    decoder, monkeypatch, options, expected
):
    batches = counted(decoder, monkeypatch)
    cfg = dataclasses.replace(SAMPLING, num_inference_steps=1, **options)
    decoding.decode_clip(decoder, TOKENS, KEYS, cfg)
    assert batches == expected


def test_a_model_trained_with_remat_paints(decoder):
    unet = dataclasses.replace(CONFIG.unet, remat="full")
    config = dataclasses.replace(CONFIG, unet=unet)
    other = build(config)
    cfg = dataclasses.replace(SAMPLING, num_inference_steps=2)
    want, got = (
        jax.jit(lambda d=d: decoding.decode_clip(d, TOKENS[:1], KEYS[:1], cfg))()
        for d in (decoder, other)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.long
def test_kernels_are_cast_once_before_the_loop_and_compute_the_same(monkeypatch):
    decoder = build(dtype=jnp.bfloat16)
    before = decoder.unet.conv_out.kernel[...]
    seen, denoise = set(), ClipDecoder.denoise

    def look(self, *args, **options):
        kernels = (self.unet.conv_out.kernel, self.unet.time_embed.up.bias)
        seen.update(x.dtype for x in (*kernels, self.unet.norm_out.scale))
        return denoise(self, *args, **options)

    monkeypatch.setattr(ClipDecoder, "denoise", look)
    cfg = dataclasses.replace(SAMPLING, num_inference_steps=2)
    got = decoding.decode_clip(decoder, TOKENS[:1], KEYS[:1], cfg)
    assert seen == {jnp.dtype("bfloat16"), jnp.dtype("float32")}  # norms keep theirs
    assert decoder.unet.conv_out.kernel[...] is before
    monkeypatch.setattr(decoding, "with_ready_kernels", lambda model: model)
    seen.clear()
    want = decoding.decode_clip(decoder, TOKENS[:1], KEYS[:1], cfg)
    assert seen == {jnp.dtype("float32")}
    np.testing.assert_array_equal(got, want)


def test_batched_and_separate_branches_agree(decoder, monkeypatch):
    counted(decoder, monkeypatch)
    noise = jax.random.normal(jax.random.key(5), (3, 3, 4, 4, 4, 2))
    together, apart = (
        decoding.decode_clip(
            decoder,
            TOKENS,
            None,
            dataclasses.replace(SAMPLING, batch_guidance=batched),
            x_init=noise[0],
            noise=noise,
        )
        for batched in (True, False)
    )
    np.testing.assert_allclose(together, apart, atol=1e-5)


def test_the_network_is_given_all_that_it_is_called_with(decoder, monkeypatch):
    monkeypatch.setattr(UNet3D, "__call__", lambda self, *args, **options: (args, options))
    x, times, fs = jnp.zeros((3, 4, 4, 4, 2)), jnp.arange(3), jnp.arange(3, 6)
    cond, rngs = decoder.condition(TOKENS, 4), nnx.Rngs(dropout=0)
    (seen, *told), options = decoder.denoise(x, times, cond, fs, deterministic=False, rngs=rngs)
    np.testing.assert_array_equal(seen, jnp.concatenate([x, cond.concat], axis=-1))
    for got, want in zip(told, (times, cond.context, fs), strict=True):
        np.testing.assert_array_equal(got, want)
    assert options == {"deterministic": False, "rngs": rngs}
    assert decoder.denoise(x, times, cond, fs)[1] == {"deterministic": True, "rngs": None}


def test_dropped_tokens_are_zero_in_the_context_and_the_latent_image(decoder):
    cfg = dataclasses.replace(SAMPLING, drop_tokens=1)
    cond, uncond = decoding.clip_conditions(decoder, TOKENS, cfg)
    seen = cond.context[:, 3:].reshape(3, 4, 4, 6)
    assert not seen[:, :, :2].any()
    np.testing.assert_array_equal(seen[:, 0, 2:], TOKENS[:, 0, 2:])
    zeroed = decoder.latent_images(TOKENS.at[:, :, :2].set(0))
    np.testing.assert_array_equal(cond.concat[:, 0], zeroed[:, 0])
    np.testing.assert_array_equal(uncond.context[0, 3:7], decoder.null_tokens[...])


def test_guidance_tells_the_branches_apart_by_their_context_alone(decoder):
    given = jax.random.normal(jax.random.key(8), (4, 6))
    for null in (None, given):
        cond, uncond = decoding.clip_conditions(decoder, TOKENS, SAMPLING, null_tokens=null)
        assert uncond.concat is cond.concat
        seen = uncond.context[:, 3:].reshape(3, 4, 4, 6)
        wanted = decoder.null_tokens[...] if null is None else null
        np.testing.assert_array_equal(seen, np.broadcast_to(wanted, seen.shape))
    alone = dataclasses.replace(SAMPLING, guidance_scale=1.0)
    (only,) = decoding.clip_conditions(decoder, TOKENS, alone)
    np.testing.assert_array_equal(only.context, cond.context)


def test_a_sample_does_not_depend_on_the_batch_it_is_in(decode):
    whole = decode(TOKENS, KEYS, SAMPLING)
    assert whole.shape == (3, 4, 4, 4, 2)
    alone = decode(TOKENS[1:2], KEYS[1:2], SAMPLING)
    # Another batch size rounds otherwise. A guidance of 7.5 multiplies that, the network mixes it
    # into all values, and so the largest one (5.7) is the measure: up to 5e-6 of it were seen.
    np.testing.assert_allclose(alone, whole[1:2], rtol=0, atol=1e-5 * np.abs(whole).max())
    other = decode(TOKENS[1:2], KEYS[2:3], SAMPLING)
    assert np.abs(other - alone).max() > 0.1


def test_eta_0_is_determined_by_the_starting_noise(decoder, monkeypatch):
    counted(decoder, monkeypatch)
    cfg = dataclasses.replace(SAMPLING, eta=0.0)
    x_init = jax.random.normal(jax.random.key(6), (3, 4, 4, 4, 2))
    first = decoding.decode_clip(decoder, TOKENS, None, cfg, x_init=x_init)
    second = decoding.decode_clip(decoder, TOKENS, KEYS, cfg, x_init=x_init)
    np.testing.assert_array_equal(first, second)


def test_latents_decode_to_frames_all_at_once_or_one_by_one(decoder):
    latents = jax.random.normal(jax.random.key(7), (2, 3, 4, 4, 2))
    graph, state = nnx.split(decoder)
    together, one_by_one = (
        jax.jit(
            lambda state, x, p=p: decoding.decode_latents(nnx.merge(graph, state), x, per_frame=p)
        )(state, latents)
        for p in (False, True)
    )
    assert together.shape == (2, 3, 8, 8, 3)
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
    default = jax.make_jaxpr(lambda x: decoding.decode_latents(decoder, x))(latents)
    assert "scan" not in str(default)  # all at once, which is faster


def test_saved_levels_are_clipped_and_truncated():
    pixels = jnp.array([-3.0, -1.0, 0.0, 0.999, 1.0, 7.0])
    np.testing.assert_array_equal(decoding.to_uint8(pixels), [0, 0, 127, 254, 255, 255])


def test_modules_hold_parameters_only(decoder):
    nnx.split(decoder, nnx.Param)
    constants = [p for p, _ in nnx.to_flat_state(nnx.state(decoder)) if decoding.is_constant(p)]
    assert sorted(constants) == [("null_tokens",), ("text_context",)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 0}, "num_tokens"),
        ({"latent_head": None}, "in_channels is 5"),
        ({"latent_head": ResamplerConfig(embed_dim=6)}, "output_shape"),
        (
            {"latent_head": dataclasses.replace(CONFIG.latent_head, embed_dim=7)},
            "embed_dim is 7",
        ),
        ({"autoencoder": dataclasses.replace(CONFIG.autoencoder, embed_dim=4)}, "out_channels"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"spacing": "linear"}, "'linear'"),
        ({"guidance_rescale": 1.5}, "1.5"),
        ({"eta": -0.1}, "-0.1"),
    ],
)
def test_impossible_sampling_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SAMPLING, **change)


def test_misshapen_inputs_are_refused(decoder):
    with pytest.raises(ValueError, match="multiple of 2, got 3"):
        decoder.condition(TOKENS, 3)
    with pytest.raises(ValueError, match="4 deep tokens of width 6, got 3"):
        decoder.condition(TOKENS[:, :, :3], 4)
    with pytest.raises(ValueError, match="keys"):
        decoding.decode_clip(decoder, TOKENS, None, SAMPLING)
    with pytest.raises(ValueError, match="6 frames"):
        decoding.decode_clip(decoder, TOKENS, KEYS, SAMPLING, x_init=jnp.zeros((3, 6, 4, 4, 2)))
    plain = dataclasses.replace(
        CONFIG, latent_head=None, unet=dataclasses.replace(CONFIG.unet, in_channels=2)
    )
    with pytest.raises(ValueError, match="no latent head"):
        build(plain).latent_images(TOKENS)


def test_the_default_is_the_released_model():
    cfg = ClipDecoderConfig()
    assert cfg.schedule == NoiseSchedule(zero_terminal_snr=True, parameterization="v")
    assert cfg.latent_shape == (32, 32, 4)
    assert (SamplingConfig().guidance_scale, SamplingConfig().fs) == (7.5, 6)
