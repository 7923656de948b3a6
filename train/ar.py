"""Trains the language model: from a caption, deep token after deep token.

python -m train.ar --config configs/shapes_ar.py --workdir runs/ar
"""

import functools
import pathlib
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax import weights
from dicode_jax.data import batches
from dicode_jax.data.text import TextTokenizer, train_small
from dicode_jax.errors import UserError
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig, to_uint8
from dicode_jax.models.dicode.generate import generate
from dicode_jax.models.dicode.stages.configs import ARTrainConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.models.language_model import BodyConfig, build_body, compare_bodies
from dicode_jax.nn.layer_stack import with_scan_layers
from dicode_jax.nn.rngs import ShapeRngs
from train import loop
from train.cache import Cache


class _Reader(nnx.Module):
    """The trained language model beside the frozen tokenizer that makes its targets."""

    def __init__(self, lm: DiCoDeLM, tokenizer: DeepTokenizer):
        self.lm, self.tokenizer = lm, tokenizer


def loss_fn(config: ARTrainConfig, model: _Reader, batch, rng):
    """Loss of the deep tokens of every keyframe, given the caption and the tokens before."""
    noise_key, dropout_key, latent_key = jax.random.split(rng, 3)
    if config.cached_videos:
        tokens = batch["tokens"].astype(jnp.float32)
    else:
        tokens = jax.lax.stop_gradient(encode(model.tokenizer, batch["keyframes"]))
    inputs = None
    if config.input_noise:
        scale = config.input_noise * jnp.std(tokens)
        inputs = tokens + scale * jax.random.normal(noise_key, tokens.shape)
    out = model.lm.loss(
        batch["text_ids"],
        tokens,
        inputs=inputs,
        deterministic=False,
        rngs=nnx.Rngs(dropout=dropout_key),
        key=latent_key,
    )
    return out.loss, {}


@nnx.jit
def encode(tokenizer: DeepTokenizer, keyframes):
    """uint8 keyframes [b, k, h, w, 3] to deep tokens."""
    return tokenizer(batches.to_unit_range(keyframes))


def build(config: ARTrainConfig, workdir: pathlib.Path) -> loop.Task:
    """Trains the language model that writes deep tokens after a caption."""
    if config.tokenizer is None:
        raise UserError("no tokenizer: give the `model` folder of a tokenizer run as --tokenizer")
    folder = pathlib.Path(config.tokenizer)
    tokenizer, _ = weights.load_module(
        folder / "tokenizer", lambda c: DeepTokenizer(c, rngs=ShapeRngs()), DeepTokenizerConfig
    )
    text = train_small()
    if config.text_tokenizer is not None:
        text = TextTokenizer.from_file(config.text_tokenizer)
    if text.vocab_size > config.model.body.vocab_size:
        raise UserError(
            f"the text tokenizer has {text.vocab_size} ids, the model's vocabulary "
            f"{config.model.body.vocab_size}"
        )
    ids = (text.pad_id, text.image_start_id)
    wanted = (config.model.pad_token_id, config.model.image_token_id)
    if ids != wanted:
        raise UserError(
            f"the text tokenizer pads with id {ids[0]} and has <img> at {ids[1]}, the model's "
            f"config says {wanted[0]} and {wanted[1]}"
        )
    model = _Reader(DiCoDeLM(config.model, rngs=nnx.Rngs(config.seed)), tokenizer)
    if config.init is not None:
        earlier, earlier_config = weights.load_module(
            pathlib.Path(config.init), lambda c: DiCoDeLM(c, rngs=ShapeRngs()), DiCoDeLMConfig
        )
        if earlier_config != config.model:
            raise UserError(f"{config.init} holds a model of other sizes than --config's")
        nnx.update(model.lm, nnx.state(earlier))
    elif config.body_init is not None:
        body, _ = weights.load_module(
            pathlib.Path(config.body_init), lambda c: build_body(c, rngs=ShapeRngs()), BodyConfig
        )
        if (fault := compare_bodies(body.cfg, config.model.body)) is not None:
            raise UserError(f"{config.body_init} holds another body than --config's: {fault}")
        body = with_scan_layers(body, config.model.body.scan_layers)
        nnx.update(model.lm.body, nnx.state(body))
    graph, trained, frozen = nnx.split(model, lambda path, _: path[0] == "lm", ...)
    make_source = functools.partial(
        batches.KeyframeSource,
        tokenizer=text,
        text_length=config.text_length,
        num_keyframes=config.num_keyframes,
        frame_size=config.frame_size,
    )
    source = make_source(seed=config.seed)
    if config.cached_videos:

        def encode_keyframes(examples):
            keyframes = np.stack([e["keyframes"] for e in examples])
            ids = np.stack([e["text_ids"] for e in examples])
            return {"tokens": encode(tokenizer, keyframes), "text_ids": ids}

        cache = Cache(
            workdir / "cache.npz",
            source,
            encode_keyframes,
            count=config.cached_videos,
            batch_size=100,
        )
        dataset = grain.MapDataset.source(cache).shuffle(config.seed).repeat()
        data = iter(dataset.batch(config.batch_size).to_iter_dataset())
    else:
        data = batches.make_batches(source, config.batch_size)
    held_out = make_source(seed=config.seed + 1, split="test")
    examples = [held_out[i] for i in range(64)]
    test = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    decoder = None
    if (folder / "decoder").is_dir():
        decoder, _ = weights.load_module(
            folder / "decoder", lambda c: ClipDecoder(c, rngs=ShapeRngs()), ClipDecoderConfig
        )

    @nnx.jit
    def evaluate(model: _Reader):
        return model.lm.loss(test["text_ids"], encode(model.tokenizer, test["keyframes"])).loss

    @nnx.jit
    def paint(lm: DiCoDeLM, decoder: ClipDecoder, text_ids):
        keys = jax.random.split(jax.random.key(0), len(text_ids))
        tokens = generate(lm, text_ids, num_keyframes=2, keys=keys)
        return to_uint8(decoder.autoencoder.decode_latents(decoder.latent_images(tokens)))

    def sample(model: _Reader, folder: pathlib.Path, step: int) -> dict[str, float]:
        if decoder is not None and decoder.cfg.latent_head is not None:
            from dicode_jax.data.video import contact_sheet

            painted = np.asarray(paint(model.lm, decoder, test["text_ids"][:12]))
            rows = [np.concatenate([t[:2], p]) for t, p in zip(test["keyframes"], painted)]
            labels = [text.decode(ids) + ": true, generated" for ids in test["text_ids"][:12]]
            contact_sheet(folder / f"{step:06d}.png", rows, labels=labels)
        return {"held_out_loss": float(evaluate(model))}

    def export(model: _Reader, folder: pathlib.Path) -> None:
        weights.save_module(folder, model.lm, config.model)
        text.save(folder)

    return loop.Task(
        name="ar",
        config=config,
        graph=graph,
        trained=trained,
        frozen=frozen,
        loss_fn=functools.partial(loss_fn, config),
        batches=data,
        sample=sample,
        export=export,
    )


if __name__ == "__main__":
    sys.exit(loop.main("train.ar", build, (ARTrainConfig,)))
