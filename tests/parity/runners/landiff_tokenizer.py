"""LanDiff's semantic tokenizer. Bounds are those of the README beside the fixtures.

Arrays of the original have channels in front; a mask is compared whole, which the model makes block
by block. Features are decoded both ways, all frames at once and one after the other.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from convert import from_torch
from dicode_jax.models.landiff import semantic_tokenizer as model
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizerConfig
from dicode_jax.nn.masks import LabelMask
from parity.harness import Check, runner
from parity.runners.gpt2 import require_all

BOUND = {"atol": 2e-5}


def tokenizer_config(config) -> SemanticTokenizerConfig:
    """Sizes of a fixture."""
    return SemanticTokenizerConfig(
        frames=FrameTokens(
            iframe=config["iframe_tokens"],
            pframe=config["pframe_tokens"],
            segment=config["temporal_size"],
        ),
        grid=tuple(config["grid"]),
        feature_dim=config["feat_dim"],
        embed_dim=config["width"],
        num_layers=config["num_layers"],
        num_heads=config["num_heads"],
        token_dim=config["token_size"],
        codebook_size=config["codebook_size"],
        code_dim=config["codebook_dim"],
    )


def stored(features):
    """`[b, f, y, x, c]` in the original's order."""
    return rearrange(np.asarray(features), "b f y x c -> b f c y x")


@runner("landiff/tokenizer")
def run_tokenizer(fixture):
    inputs, want, done = fixture.npz("inputs"), fixture.npz("outputs"), set()
    cfg = tokenizer_config(fixture.config)
    tokenizer = from_torch("landiff_semantic_tokenizer", fixture.npz("weights"), cfg)
    features = jnp.asarray(rearrange(inputs["features"], "b f c y x -> b f y x c"))
    num_frames = features.shape[1]

    def check(name, got, **bound):
        done.add(name)
        return Check(name, np.asarray(got), want[name], **(bound or BOUND))

    at = model.places(cfg, num_frames)
    for name, table in zip(("rope_cos", "rope_sin"), model.rotary(cfg, at)):
        yield check(name, table[0])
    encoder, decoder, quantizer = tokenizer.encoder, tokenizer.decoder, tokenizer.quantizer
    masks = {}
    for f, head in ((num_frames, ""), (2, "t2_")):
        names = model.labels(cfg, f)
        for side, sees in (("encoder", model.sees_in_encoder), ("decoder", model.sees_in_decoder)):
            mask = masks[f, side] = LabelMask(names, names, sees)
            yield check(f"{head}{side}_mask", mask.dense(), exact=True)

    def first_block(side, name, x):
        stack = side.transformer
        mask, tables = masks[num_frames, name], model.rotary(cfg, at)
        return stack.blocks[0](stack.norm_pre(x), mask, rotary=tables)[0]

    tokens = encoder(features)
    yield check("encoder_block0", first_block(encoder, "encoder", encoder.embed(features)))
    yield check("encoder_out", rearrange(np.asarray(tokens), "b n e -> b e 1 n"))
    yield check("vq_project_in", quantizer.project_in(tokens))
    ids = quantizer.encode(tokens)
    yield check("indices", ids, exact=True)
    quantized = quantizer.decode(ids)
    yield check("quantized", quantized)
    yield check("decoder_block0", first_block(decoder, "decoder", decoder.embed(quantized)))

    for f, head in ((num_frames, ""), (2, "t2_"), (1, "t1_")):
        ids = tokenizer.encode(features[:, :f])
        if head:
            yield check(f"{head}indices", ids, exact=True)
        squeeze = (lambda x: x[:, 0]) if f == 1 else lambda x: x  # as the original does
        yield check(f"{head}decoded", squeeze(stored(tokenizer(features[:, :f]))))
        one_by_one = squeeze(stored(tokenizer.decode(ids)))
        name = f"{head}decoded"
        yield Check(f"{name}, frame by frame", one_by_one, want[name], **BOUND)
    first = tokenizer.decode(jnp.asarray(want["indices"][:1]))
    yield check("index_to_feature", stored(first))
    require_all(want, done)
