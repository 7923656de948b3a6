"""The discriminator of the frame VAE's training: whose turn it is, what it changes, its losses."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_training
from flax import nnx
from tiny_ar_diffusion import VAE, alive

from dicode_jax.errors import UserError
from dicode_jax.models.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from dicode_jax.runtime.sharding import ShardingConfig, make_mesh
from dicode_jax.stages.ar_diffusion import adversarial, frame_vae
from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig
from dicode_jax.stages.registry import build_stage
from dicode_jax.storage import weights
from dicode_jax.training.optim import OptimConfig
from dicode_jax.training.setup import prepare

CONSTANT = {"warmup_steps": 0, "schedule": "constant"}
CONFIG = FrameVAETrainConfig(
    model=VAE,
    frame_size=VAE.image_size,
    optim=OptimConfig(lr=1e-2, **CONSTANT),
    num_steps=30,
    batch_size=4,
    disc_start=2,
    discriminator=PatchDiscriminatorConfig(channels=4, num_layers=1),
)
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3)), jnp.uint8)


def equal(a, b, part):
    """Whether all that is kept of a part of the model, moments too, is the same."""
    picked = [
        [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if f"'{part}'" in str(path)]
        for tree in (a, b)
    ]
    assert len(picked[0]) > 3
    return all(np.array_equal(x, y) for x, y in zip(*picked, strict=True))


def test_optimisers_take_turns_and_the_discriminator_s_does_not_clip():
    config = OptimConfig(optimizer="sgd", b1=0.0, lr=1.0, clip_norm=0.5, **CONSTANT)
    tx = adversarial.make_optimizer(2, config, 9)
    params = {"vae": {"kernel": jnp.zeros(4)}, "discriminator": {"kernel": jnp.zeros(4)}}
    grads = jax.tree.map(jnp.ones_like, params)  # each of norm 2

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, _: tx.update(grads, s, params)[::-1], state, length=5)[1]

    steps = run(tx.init(params))
    np.testing.assert_allclose(steps["vae"]["kernel"][:, 0], [-0.25, -0.25, -0.25, 0, -0.25])
    np.testing.assert_allclose(steps["discriminator"]["kernel"][:, 0], [0, 0, 0, -1, 0])


@pytest.mark.long
def test_vae_and_discriminator_take_turns_from_the_start_on():
    stage = build_stage(CONFIG)
    prepared = prepare(stage, make_mesh(ShardingConfig(), jax.devices()[:1]))
    state, changed, told = prepared.state, [], []
    for _ in range(5):
        before = jax.device_get((state.params, state.opt_state))
        state, metrics = prepared.train_step(state, {"image": IMAGES})
        after = jax.device_get((state.params, state.opt_state))
        changed.append([not equal(before, after, part) for part in ("vae", "discriminator")])
        told.append({name for name, x in metrics.items() if np.isfinite(x)})
        assert metrics["finite"] == 1
    vae, judge = [True, False], [False, True]
    assert changed == [vae, vae, vae, judge, vae]
    always = {"loss", "l1", "edges", "psnr", "kl", "std", "grad_norm", "lr", "finite"}
    of_vae, of_judge = {"logits_made", "scale"}, {"hinge", "logits_real", "logits_made"}
    more = [set(), set(), of_vae, of_judge, of_vae]
    assert told == [always | some for some in more]


@pytest.mark.long
def test_gradients_are_those_of_the_original_s_losses():
    config = dataclasses.replace(CONFIG, edge_weight=0.0, token_noise=0.0, disc_weight=0.7)
    model = alive(frame_vae.Trained(config, rngs=nnx.Rngs(0)), 0, 0.1)
    model.vae.moments_proj.bias[...] = model.vae.moments_proj.bias[...].at[VAE.token_dim :].set(-30)
    graph, state = nnx.split(model)
    keys, frames = jax.random.split(jax.random.key(1), 4), frame_vae.to_unit(IMAGES)
    numbers = frames[0].size

    def ours(state, step):
        model = nnx.merge(graph, state)
        return frame_vae.loss_fn(config, model, {"image": IMAGES}, keys, step)

    def originals(state):
        model = nnx.merge(graph, state)
        judge = frame_vae._still(model.discriminator)
        noise = jnp.zeros((4, VAE.num_tokens, VAE.token_dim))
        loss, (metrics, _) = adversarial.generator_loss(
            model.vae, judge, judge.statistics(), frames[:, None], noise=noise, weight=0.7
        )
        return loss / numbers, metrics

    def judges(state):
        model = nnx.merge(graph, state)
        made = model.vae.decode(model.vae.posterior(frames).mode()[:, None])[:, 0]
        judge = model.discriminator
        return adversarial.discriminator_loss(judge, judge.statistics(), frames, made)[0]

    @jax.jit
    def run(state):
        of = lambda step: jax.grad(ours, has_aux=True)(state, jnp.int32(step))  # noqa: E731
        return of(4), jax.grad(originals, has_aux=True)(state), of(5), jax.grad(judges)(state)

    (got, metrics), (want, original), (got_judge, _), want_judge = run(state)
    np.testing.assert_allclose(metrics["scale"], original["scale"] / numbers, rtol=1e-4)
    assert 0 < original["scale"] < 0.7 * adversarial.MAX_WEIGHT
    for part, mine, theirs in (("vae", got, want), ("discriminator", got_judge, want_judge)):
        for path, x in nnx.to_flat_state(theirs):
            if path[0] == part:
                near = dict(nnx.to_flat_state(mine))[path]
                np.testing.assert_allclose(near[...], x[...], rtol=1e-3, atol=1e-6)
    for part, mine in (("vae", got_judge), ("discriminator", got)):
        assert not any(x[...].any() for path, x in nnx.to_flat_state(mine) if path[0] == part)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"disc_start": -1}, "must not be negative, got -1"),
        ({"disc_weight": float("nan")}, "must not be negative"),
        ({"optim": OptimConfig(warmup_steps=0)}, "set optim.schedule to constant"),
        ({"discriminator": PatchDiscriminatorConfig()}, "needs frames of 24 pixels at least"),
        ({"disc_start": None, "discriminator_init": "x"}, "of no use without disc_start"),
        ({"model": dataclasses.replace(VAE, temporal=True), "init": "x"}, "no disc_start"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **changes)


def test_a_converted_discriminator_is_gone_on_from(tmp_path):
    judge = PatchDiscriminator(CONFIG.discriminator, rngs=nnx.Rngs(7))
    weights.save_module(tmp_path / "judge", judge, CONFIG.discriminator)
    config = dataclasses.replace(CONFIG, discriminator_init=str(tmp_path / "judge"))
    loaded = build_stage(config).load()
    kernel = loaded["discriminator", "convs", 0, "kernel"]
    np.testing.assert_array_equal(kernel, judge.convs[0].kernel[...])
    other = dataclasses.replace(
        config, discriminator=PatchDiscriminatorConfig(channels=3, num_layers=1)
    )
    with pytest.raises(UserError, match="discriminator of other sizes"):
        build_stage(other).load()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.multi_device
def test_eight_devices_give_the_losses_of_one():
    """Batch norm sees the batch of all devices, in turns of both."""
    command = [sys.executable, sharded_training.__file__, "losses", "frame_vae", "one", "all"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = sharded_training.read_report(done.stdout)
    np.testing.assert_allclose(found["all"]["losses"], found["one"]["losses"], rtol=1e-5)
    assert len(set(found["one"]["losses"])) == 5
