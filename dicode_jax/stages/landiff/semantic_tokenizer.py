"""Training of LanDiff's semantic tokenizer: features of a frozen encoder through codes and back.

Yin et al. (arXiv 2503.04606). Loss, and how codes learn, are the release's: k-means start, moving
averages, revival, commitment, the rotation trick, no dropped tokens (`nn.codebook`). Codes move by
what all devices saw, behind the optimiser's step. The first step learns from tokens as they are,
and starts the codes.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from dicode_jax.data.windows import WindowReader
from dicode_jax.errors import UserError
from dicode_jax.media.transforms import to_float
from dicode_jax.models.clip import CLIPVision
from dicode_jax.models.landiff.features import (
    STRIDE,
    encoder_config,
    features_of,
    grid_of,
    load_encoder,
    num_semantic_frames,
)
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer, SemanticTokenizerConfig
from dicode_jax.models.vit import ViT, ViTConfig
from dicode_jax.nn.codebook import Codebook, averaged, revived, rotate, start
from dicode_jax.nn.linear import Linear
from dicode_jax.nn.quantizer import nearest
from dicode_jax.nn.rngs import stream
from dicode_jax.stages import parts, probes
from dicode_jax.stages.landiff.config import SemanticTokenizerTrainConfig
from dicode_jax.storage import packaged, weights
from dicode_jax.training.stage import STATISTICS, Path, Stage
from dicode_jax.typing import Array, Float, PyTree, UInt8

CODES = ("tokenizer", "quantizer", "codes"), ("counts",), ("sums",)  # of a `Codebook`


class Trained(nnx.Module):
    """The tokenizer, what its codes are averages of, and the frozen encoder."""

    def __init__(self, config: SemanticTokenizerTrainConfig, *, rngs: nnx.Rngs):
        cfg, dtype = config.model, parts.compute_dtype(config)
        self.tokenizer = SemanticTokenizer(cfg, dtype=dtype, rngs=rngs)
        self.counts = nnx.Param(jnp.zeros(cfg.codebook_size))
        self.sums = nnx.Param(jnp.zeros((cfg.codebook_size, cfg.code_dim)))
        classes = probes.CLASSES if config.probe_weight else ()
        # From zeros, so that they pull at the features only once they have learnt to read them.
        zeros = nnx.initializers.zeros_init()
        reader = functools.partial(Linear, cfg.feature_dim, kernel_init=zeros, rngs=rngs)
        self.probes = nnx.List([reader(n) for n in classes])
        side = config.frame_size // cfg.grid[0]
        self.patches = reader(3 * side**2) if config.patch_weight else None
        of_encoder = encoder_config(features_folder(config))
        make: Any = ViT if isinstance(of_encoder, ViTConfig) else CLIPVision
        self.encoder = make(of_encoder, dtype=dtype, rngs=rngs)

    @property
    def codebook(self) -> Codebook:
        """The codes, and what they are averages of."""
        return Codebook(self.tokenizer.quantizer.codes[...], self.counts[...], self.sums[...])


def features_folder(config: SemanticTokenizerTrainConfig) -> pathlib.Path:
    """Where the frozen encoder lies.

    Raises:
      UserError: None is named, and the package has no model.
    """
    if config.features is not None:
        return pathlib.Path(config.features)
    if (folder := packaged.models().get("shapes")) is None:
        raise UserError("name the folder of a frozen encoder: --features FOLDER")
    return folder / "tokenizer"


def tokenizer_folder(folder: str | pathlib.Path) -> pathlib.Path:
    """Where the tokenizer lies in the `model` of a run or in a converted model, or the folder."""
    folder = pathlib.Path(folder)
    known = (folder / name for name in ("tokenizer", "semantic_tokenizer"))
    return next((path for path in known if path.is_dir()), folder)


def make_stage(config: SemanticTokenizerTrainConfig) -> Stage:
    """Batches are `video` uint8 [b, f, h, w, 3]; for probes also `labels` int32 [b, p].

    Raises:
      UserError: The encoder is not there, or gives other features than the model takes; or nobody
        knows what the probes are to tell.
    """
    _check_features(config)
    if config.probe_weight:
        probes.check_labels(config.data)
    clip = (config.data.num_frames, *config.frame_shape, 3)

    def batch_shapes(b: int) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {"video": jax.ShapeDtypeStruct((b, *clip), jnp.uint8)}
        if config.probe_weight:
            shapes["labels"] = jax.ShapeDtypeStruct((b, len(probes.CLASSES)), jnp.int32)
        return shapes

    return Stage(
        name="landiff_tokenizer",
        config=config,
        create=lambda rngs: Trained(config, rngs=rngs),
        load=functools.partial(load, config),
        is_trained=lambda path, _: path[0] != "encoder",
        loss_fn=functools.partial(loss_fn, config),
        batch_shapes=batch_shapes,
        export=functools.partial(export, config),
        update=functools.partial(update, config),
    )


def reader(config: SemanticTokenizerTrainConfig) -> WindowReader:
    """Reads the clips of a run."""
    return WindowReader(
        data=config.data, frame_size=config.frame_shape, has_labels=bool(config.probe_weight)
    )


def _check_features(config: SemanticTokenizerTrainConfig) -> None:
    folder, model = features_folder(config), config.model
    cfg = encoder_config(folder)
    height, width = config.frame_shape
    found = (*grid_of(cfg, config.frame_shape), cfg.embed_dim)
    if not isinstance(cfg, ViTConfig) and {height, width} != {cfg.image_size}:
        raise UserError(
            f"the encoder in {folder} takes frames of {cfg.image_size} pixels, the run's are "
            f"{height} x {width} (frame_size, frame_width)"
        )
    if found != (*model.grid, model.feature_dim):
        raise UserError(
            f"the encoder in {folder} gives {found[0]} x {found[1]} features of {found[2]} numbers "
            f"for a frame of {height} x {width} pixels, the model takes {model.grid[0]} x "
            f"{model.grid[1]} of {model.feature_dim} (model.grid, model.feature_dim)"
        )
    used = tuple(cfg.patch_size * count for count in model.grid)
    if _reads_parts(config) and used != (height, width):
        raise UserError(
            f"patch_weight and detail_weight look at the pixels that features are of, {used[0]} x "
            f"{used[1]} of the frames of {height} x {width}: change frame_size and frame_width, or "
            "set both to 0"
        )


def _reads_parts(config: SemanticTokenizerTrainConfig) -> bool:
    """Whether the pixels count that each feature is of."""
    return bool(config.patch_weight or config.detail_weight)


def load(config: SemanticTokenizerTrainConfig) -> dict[Path, Array]:
    """The frozen encoder; of `init` the tokenizer, whose codes count as used equally often.

    A tokenizer may begin with fewer tokens for a frame than it is to have: see `_more_queries`.

    Raises:
      UserError: A folder is missing, or holds something else than the config says.
    """
    loaded = parts.leaves(load_encoder(features_folder(config), on_host=True), "encoder")
    if config.init is None:
        return loaded
    folder = tokenizer_folder(config.init)
    tokenizer, held = weights.load_module(
        folder, SemanticTokenizer, SemanticTokenizerConfig, on_host=True
    )
    before = parts.leaves(tokenizer, "tokenizer")
    before |= _more_queries(config, folder, held.frames, before)
    codes = tokenizer.quantizer.codes[...]
    frames = num_semantic_frames(config.data.num_frames)
    vectors = config.batch_size * config.model.frames.count(frames)
    counts = jnp.full(len(codes), max(vectors / len(codes), config.revive_below))
    averages = {CODES[1]: counts, CODES[2]: codes * counts[:, None]}
    return loaded | before | averages


def _more_queries(
    config: SemanticTokenizerTrainConfig,
    folder: pathlib.Path,
    held: FrameTokens,
    loaded: Mapping[Path, Array],
) -> dict[Path, Array]:
    """The queries of a tokenizer that is to have more tokens for a frame than are stored.

    Those of more tokens stand behind the others, and are drawn with their deviation.

    Raises:
      UserError: It is to have fewer, or other segments.
    """
    wanted, grown = config.model.frames, {}
    for name in ("iframe", "pframe"):
        path = ("tokenizer", "encoder", f"{name}_queries")
        known, count = np.asarray(loaded[path]), getattr(wanted, name) - getattr(held, name)
        if count < 0 or wanted.segment != held.segment:
            raise UserError(
                f"the tokenizer in {folder} has {held.iframe} and {held.pframe} tokens for the "
                f"frames of a segment of {held.segment}, the config {wanted.iframe} and "
                f"{wanted.pframe} of {wanted.segment}: begin with as many or more"
            )
        drawn = jax.random.normal(stream(config.seed, f"{name}_queries"), (count, known.shape[1]))
        grown[path] = np.concatenate([known, known.std() * np.asarray(drawn)])
    return grown


def loss_fn(
    config: SemanticTokenizerTrainConfig, model: Trained, batch, keys: Array
) -> tuple[Array, dict[str, Array]]:
    """Error of features through codes, and the commitment of tokens to them.

    `mse_iframe` and `mse_pframes` are the error's parts; `cosine` is the mean over features;
    `used` is the share of codes that more vectors go to than `revive_below`, and `perplexity` how
    many codes used equally often would say as much, both of the codes' averages. With their weights
    also `probe_loss`, the share of frames `probe_NAME` that each probe is right in, and `patches`,
    the squared error of colours.
    """
    del keys
    video = to_float(batch["video"])
    features = jax.lax.stop_gradient(features_of(model.encoder, video))
    tokenizer, book = model.tokenizer, jax.lax.stop_gradient(model.codebook)
    assert tokenizer.encoder is not None  # one that learns has both sides
    x = tokenizer.quantizer.project_in(tokenizer.encoder(features))
    ids = nearest(jax.lax.stop_gradient(x), book.codes)
    codes, started = book.codes[ids], book.is_started
    commitment = jnp.where(started, jnp.square(x - codes).mean(), 0.0)
    tokens = tokenizer.quantizer.project_out(jnp.where(started, rotate(x, codes), x))
    tokens = tokens if tokenizer.dtype is None else tokens.astype(tokenizer.dtype)
    made = tokenizer.decoder(tokens).astype(jnp.float32)
    errors = jnp.square(made - features).mean(-1)
    squares = errors.mean((0, 2, 3))
    mse = squares.mean()
    pixels, counts = None, 1.0
    if _reads_parts(config):
        shape, (rows, columns) = "b f (y p) (x q) c -> b f y x (p q) c", config.model.grid
        pixels = rearrange(video[:, ::STRIDE], shape, y=rows, x=columns)
    if pixels is not None and config.detail_weight:
        counts = 1 + config.detail_weight * detail(pixels)
    lengths = jnp.linalg.norm(made, axis=-1) * jnp.linalg.norm(features, axis=-1)
    cosine = jnp.sum(made * features, axis=-1) / jnp.maximum(lengths, 1e-6)
    metrics = {
        "mse": mse,
        "mse_iframe": squares[0],
        "mse_pframes": squares[1:].mean() if len(squares) > 1 else squares[0],
        "cosine": cosine.mean(),
        "commitment": commitment,
        "used": jnp.mean(book.counts > config.revive_below),
        "perplexity": book.perplexity,
        STATISTICS: {"vectors": jax.lax.stop_gradient(x), "ids": ids},
    }
    loss = (counts * errors).mean() + config.commitment_weight * commitment
    if config.probe_weight:
        of_frame = made.mean((2, 3))
        labels = jnp.repeat(batch["labels"], of_frame.shape[1], axis=0)
        flat = rearrange(of_frame, "b f c -> (b f) c")
        unsure, right = probes.probe_loss([probe(flat) for probe in model.probes], labels)
        loss += config.probe_weight * unsure
        metrics |= right
    if pixels is not None and model.patches is not None:
        wanted = rearrange(pixels, "b f y x n c -> b f y x (n c)")
        off = jnp.square(model.patches(made) - wanted).mean(-1)
        metrics["patches"] = off.mean()
        loss += config.patch_weight * (counts * off).mean()
    return loss, metrics


def detail(pixels: Float[Array, "b f y x n c"]) -> Float[Array, "b f y x"]:
    """How much of a frame's detail lies in each of its parts, 1 on the mean of a frame.

    Detail is the variance of colours within a part: that of a small object adds up to as much as
    that of a large one. A frame of one colour has none.

    Args:
      pixels: Colours in [-1, 1] of the parts.
    """
    spread = jnp.var(pixels, axis=-2).mean(-1)
    return spread / jnp.maximum(spread.mean((-2, -1), keepdims=True), 1e-6)


def update(
    config: SemanticTokenizerTrainConfig, params: nnx.State, statistics: PyTree, key: Array
) -> nnx.State:
    """The parameters with the codes after a batch; see `Stage.update`."""
    flat = dict(nnx.to_flat_state(params))
    book = Codebook(*(flat[path].get_value() for path in CODES))
    x = rearrange(statistics["vectors"], "b n c -> (b n) c")
    ids = statistics["ids"].reshape(-1)
    at_start, at_revival = jax.random.split(key)
    moved = jax.lax.cond(
        book.is_started,
        lambda: averaged(book, x, ids, decay=config.code_decay),
        lambda: start(x, at_start, len(book.codes), rounds=config.kmeans_rounds),
    )
    moved = revived(moved, x, at_revival, below=config.revive_below)
    new = {path: flat[path].replace(y) for path, y in zip(CODES, moved, strict=True)}
    return nnx.from_flat_state({**flat, **new})


def reconstruct(
    model: Trained, video: UInt8[Array, "b f h w 3"]
) -> tuple[Float[Array, "b g y x c"], Float[Array, "b g y x c"]]:
    """Features of clips, and what the codes give back of them."""
    features = features_of(model.encoder, to_float(video))
    return features, model.tokenizer(features).astype(jnp.float32)


def export(config: SemanticTokenizerTrainConfig, model: Trained, folder: pathlib.Path) -> None:
    """Writes `tokenizer`, and beside it the frozen encoder as `features`."""
    weights.save_module(folder / "tokenizer", model.tokenizer, config.model)
    weights.save_module(folder / "features", model.encoder, model.encoder.cfg)
