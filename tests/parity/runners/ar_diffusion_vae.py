"""AR-Diffusion's frame VAE, and the one whose decoder looks at earlier frames.

Bounds are those of the README beside the fixtures.
"""

import functools
import re

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from convert import from_torch
from convert.engine.plan import below
from dicode_jax.distributions.diagonal_gaussian import DiagonalGaussian
from dicode_jax.models.ar_diffusion.frame_vae import FrameVAEConfig
from dicode_jax.models.ar_diffusion.temporal_decoder import frame_mask
from dicode_jax.models.maskgit_decoder import MaskGITDecoderConfig
from dicode_jax.models.patch_discriminator import PatchDiscriminatorConfig
from dicode_jax.models.query_tokenizer import QueryTransformerConfig
from dicode_jax.stages.ar_diffusion.adversarial import discriminator_loss, generator_loss
from parity.harness import Check, runner
from parity.runners.unets import captured
from parity.runners.vision import nchw, nhwc, require_all

VAE = {"atol": 3e-5}


def vae_config(config) -> FrameVAEConfig:
    """Sizes of a fixture: arguments of the original, whose table of sizes was made small."""
    size, given = config["size"], config["ctor"]
    sides = {
        side: QueryTransformerConfig(
            patch_size=given[f"vit_{name}_patch_size"],
            embed_dim=size["width"],
            num_layers=size["layers"],
            num_heads=size["heads"],
        )
        for side, name in (("encoder", "enc"), ("decoder", "dec"))
    }
    assert given["use_l2_norm"]
    return FrameVAEConfig(
        image_size=given["image_size"],
        num_tokens=given["num_latent_tokens"],
        token_dim=given["token_size"],
        codebook_size=size["codes"],
        **sides,
        pixel_decoder=MaskGITDecoderConfig(
            z_channels=size["z_channels"],
            channels=size["hidden_channels"],
            channel_mult=tuple(size["channel_mult"]),
            num_res_blocks=size["num_res_blocks"],
        ),
        temporal="num_frame" in given,
    )


def tokens(z):
    """`[b, f, c, 1, l]` to `[b, f, l, c]`."""
    return jnp.asarray(rearrange(z, "... c 1 l -> ... l c"))


def stored(z):
    return rearrange(np.asarray(z), "... l c -> ... c 1 l")


@runner("ar_diffusion/vae_kl", "ar_diffusion/vae_kl_wt")
def run_vae(fixture):
    inputs, want, done = fixture.npz("inputs"), fixture.npz("outputs"), set()
    model = from_torch("ar_diffusion_vae", fixture.npz("weights"), vae_config(fixture.config))
    video = nhwc(inputs["x"])
    num_frames = video.shape[1]
    images = rearrange(video, "b f h w c -> (b f) h w c")

    def check(name, got, **bound):
        done.add(name)
        return Check(name, np.asarray(got), want[name], **(bound or VAE))

    with captured(model) as outputs:
        latents = model.encode(video)
        decoded = model.decode(latents)
        outputs["moments"] = model.moments(images)
    yield check("encode_mode", stored(latents))
    yield check("decode", nchw(decoded))
    yield check("decode_of_random_z", nchw(model.decode(tokens(inputs["z"]))))
    for name in want:
        if name.startswith("inter/"):
            yield check(name, intermediate(model, name.removeprefix("inter/"), outputs, num_frames))

    noise = jnp.asarray(rearrange(want["posterior_noise"], "n c 1 l -> n l c"))
    done.add("posterior_noise")
    drawn, posterior = model(video, noise=noise)
    yield check("forward_sample", nchw(drawn))
    yield check("kl_after_sample", posterior.kl(), rtol=1e-5)
    yield check("forward_mode", nchw(model(video)[0]))
    # The original's mode() leaves the unit vector behind as the mean.
    overwritten = DiagonalGaussian(mean=posterior.mode(), logvar=posterior.gaussian.logvar)
    yield check("kl_after_mode", overwritten.kl(), rtol=1e-5)
    if model.temporal is not None:
        hidden = functools.partial(forbidden, num_frames)
        yield check("fine_mask_forbidden", hidden(1, 1), exact=True)
        yield check("coarse_mask_forbidden", hidden(1, model.cfg.num_tokens), exact=True)
        shifted = tokens(inputs["z"])
        leak = model.decode(shifted.at[:, -1].add(1.0)) - model.decode(shifted)
        leak = jnp.abs(leak).max((0, 2, 3, 4))
        done.add("leak_last_frame")
        yield Check("leak_last_frame[:-1]", leak[:-1], want["leak_last_frame"][:-1], exact=True)
    require_all(want, done)


def forbidden(num_frames, queries, keys):
    return ~np.asarray(frame_mask(num_frames, queries, keys))[0, 0]


def intermediate(model, name, outputs, num_frames):
    """The value that the original's hook of this name saw, in its layout."""
    if found := re.fullmatch(r"(enc|dec)_(ln_pre|ln_post|block(\d+)_LND)", name):
        side = {"enc": "encoder", "dec": "decoder"}[found[1]]
        if found[3] is None:
            return outputs[f"{side}.transformer.{found[2].replace('ln', 'norm')}"]
        return outputs[f"{side}.transformer.blocks.{found[3]}"][0].swapaxes(0, 1)
    if found := re.fullmatch(r"fine(\d+)_T_BN_D", name):
        return rearrange(outputs[f"temporal.fine.{found[1]}"], "b t n d -> t (b n) d")
    if found := re.fullmatch(r"coarse(\d+)_LND", name):
        count = model.cfg.num_tokens
        x = outputs[f"temporal.coarse.{found[1]}"]
        x = jnp.concatenate([x[:, :, -count:], x[:, :, :-count]], axis=2)
        return rearrange(x, "b t l d -> l (b t) d")
    if found := re.fullmatch(r"pix_(mid|up)(\d+)", name):
        path = {"mid": "middle", "up": "levels"}[found[1]]
        return nchw(outputs[f"pixel_decoder.{path}.{found[2]}"])
    if name == "moments":
        return stored(outputs["moments"])
    paths = {
        "code_logits": "code_logits",
        "soft_code": "codebook",
        "pix_conv_in": "pixel_decoder.conv_in",
    }
    return nchw(outputs[paths[name]])


LOSS = {"rtol": 1e-5}
LOGITS = {"atol": 3e-5}


@runner("ar_diffusion/vae_loss")
def run_vae_loss(fixture):
    config, inputs, want = fixture.config, fixture.npz("inputs"), fixture.npz("outputs")
    done = {"posterior_noise"}
    source = fixture.sibling_fixture(f"../{config['weights_from'].split()[0]}")
    model = from_torch("ar_diffusion_vae", source.npz("weights"), vae_config(config))
    weights = below(fixture.npz("weights"), "disc.")
    given = config["disc"]
    sizes = PatchDiscriminatorConfig(channels=given["ndf"], num_layers=given["n_layers"])
    judge = from_torch("ar_diffusion_discriminator", weights, sizes)
    names = [f"main.{3 * i}" for i in range(1, given["n_layers"] + 1)]
    before = tuple(
        {
            "mean": jnp.asarray(weights[f"{name}.running_mean"]),
            "variance": jnp.asarray(weights[f"{name}.running_var"]),
        }
        for name in names
    )
    video = nhwc(inputs["x"])
    frames = rearrange(video, "b f h w c -> (b f) h w c")
    noise = jnp.asarray(rearrange(want["posterior_noise"], "n c 1 l -> n l c"))

    def check(name, got, **bound):
        done.add(name)
        return Check(name, np.asarray(got), want[name], **(bound or LOSS))

    made = rearrange(model(video, noise=noise)[0], "b f h w c -> (b f) h w c")
    yield check("x_rec", nchw(made), **VAE)
    yield check("logits_fake_trainBN", judge(made, before, train=True)[0][:, None], **LOGITS)

    options = {"noise": noise, "kl_weight": config["kl_weight"]}
    for case, discriminator in (("before_start", None), ("gen", judge)):
        loss, (metrics, _) = generator_loss(model, discriminator, before, video, **options)
        yield check(f"{case}/loss", loss)
        yield check(f"{case}/train/total_loss", loss)
        yield check(f"{case}/train/nll_loss", metrics["nll"])
        yield check(f"{case}/train/kl_loss", metrics["kl"])
        yield check(f"{case}/train/rec_loss", metrics["l1"])
        # Neither a learned variance nor, in the fixture, a perceptual term.
        yield check(f"{case}/train/logvar", 0.0, exact=True)
        yield check(f"{case}/train/p_loss", 0.0, exact=True)
    yield check("gen/train/g_loss", metrics["adversarial"])
    yield check("gen/train/d_weight", metrics["scale"], rtol=1e-4)
    yield check("gen/train/disc_factor", 1.0, exact=True)

    loss, (metrics, after) = discriminator_loss(judge, before, frames, made)
    yield check("disc/loss", loss)
    yield check("disc/train/disc_loss", loss)
    yield check("disc/train/logits_real", metrics["logits_real"])
    yield check("disc/train/logits_fake", metrics["logits_made"])
    # A fixture may hold the statistics that the discriminator came with: how those of a batch are
    # blended in is compared with PyTorch in the discriminator's own tests.
    told = [want[f"disc/after_{name}.running_mean"] for name in names]
    same = [np.array_equal(x, state["mean"]) for x, state in zip(told, before, strict=True)]
    kept = before if all(same) else after
    for name, state in zip(names, kept, strict=True):
        yield check(f"disc/after_{name}.running_mean", state["mean"], atol=1e-6)
        yield check(f"disc/after_{name}.running_var", state["variance"], atol=1e-6)
    yield check("logits_real_evalBN", judge(frames, kept, train=False)[0][:, None], **LOGITS)
    require_all(want, done)
