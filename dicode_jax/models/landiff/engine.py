"""How LanDiff's parts make videos together, one after the other or all in memory.

The pipeline checks what is asked for; this runs it. Parts are borrowed by name for as long as they
run, so that they may lie on disk. Stages are lazy: what comes last asks for what it needs, and a
clip is there as soon as it is painted.
Shape letters: b videos, g frames, h w their pixels, n semantic tokens.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.diffusion.samplers.subsampled import subsampled_time_grid
from dicode_jax.diffusion.watching import Watch
from dicode_jax.errors import UserError
from dicode_jax.models.landiff import programs
from dicode_jax.models.landiff.features import STRIDE
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.language_model import LanguageModel
from dicode_jax.models.landiff.sampling import WindowSampling
from dicode_jax.models.landiff.streaming import Window, write_segments
from dicode_jax.nn.rngs import fold, sample_keys
from dicode_jax.typing import Int, UInt8

TEXT_STEP = 16  # prompts are padded to a multiple, so that few lengths are compiled
WRITING, PAINTING = 0, 1  # streams of a sample's randomness
NOT_FINITE = "the {} gave NaN or infinite numbers; look at its weights and at dtype"


def stages(carry: str) -> tuple[tuple[str, ...], ...]:
    """Parts that run together; each other one runs alone."""
    painting = ("semantic_tokenizer", "denoiser")
    return ((*painting, "vae") if carry == "frames" else painting,)


class Prompt(NamedTuple):
    """Ids of a prompt: for the language model, and padded for the painter."""

    written: Sequence[int]
    painted: Sequence[int]


class Shown(NamedTuple):
    """A clip of a sample, uint8 `[f, h, w, 3]`; `index` is its number in the video."""

    sample: int
    index: int
    frames: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """Parts that can be borrowed, and how a long video is cut.

    Attributes:
      use: Lends a part, graph and state.
      stage: Runs a stage: as it is, or whole, where the next one has no room beside it.
      frames: Tokens of a semantic frame.
      pad_id: Of the language model's text.
      text_length: Most ids of it.
      prefix_latents: Latents that a further window begins with.
      max_segments: Segments that the language model has before it at most; None for all.
      painter_text: The part that encodes text for the painter.
      num_timesteps: Of the denoiser's noise.
    """

    use: Callable[[str], AbstractContextManager[tuple[Any, Any]]]
    stage: Callable[[Iterable], Iterable]
    frames: FrameTokens
    pad_id: int
    text_length: int
    prefix_latents: int
    max_segments: int | None
    painter_text: str
    num_timesteps: int

    def padded(self, count: int) -> int:
        """Positions that a prompt of `count` ids has in the language model."""
        return min(count + -count % TEXT_STEP, self.text_length)

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        sampling: Any,
        given: UInt8[np.ndarray, "g h w 3"] | None,
        plan: Sequence[Window],
        watch: Watch,
    ) -> Iterator[Shown]:
        """The clips of a video for each prompt, as soon as they are painted.

        Args:
          sampling: A `LanDiffSamplingConfig` of the pipeline.
          given: The first frames, in the model's size.
          plan: Of `streaming.windows`.
          watch: Who is told of the steps of the windows.

        Raises:
          UserError: A text or a clip is not finite.
        """
        codes = None if given is None else self.encode(given)[None]
        texts = self.stage(self._embed_prompts([prompt.written for prompt in prompts]))
        written = self.stage(self._write(texts, seeds, sampling, codes, plan[-1].stop))
        yield from self.show(prompts, written, seeds, sampling, given, plan, watch)

    def _embed_prompts(self, ids) -> Iterator[tuple[Any, np.ndarray]]:
        """Text of the language model, padded on the left, and which of it is words."""
        with self.use("text_encoder") as (graph, state):
            for words in ids:
                behind = self.padded(len(words)) - len(words)
                row = np.asarray([[self.pad_id] * behind + list(words)], np.int32)
                valid = np.arange(row.shape[1])[None] >= behind
                yield _finite(programs.embed_text(graph, state, row, valid)), valid

    def _write(self, texts, seeds, sampling, given, total) -> Iterator[Iterable]:
        """Segments of semantic tokens `[1, n]` of each sample."""
        with self.use("language_model") as split:
            lm: LanguageModel = nnx.merge(*split)
            for (text, valid), seed in zip(texts, seeds):
                segments = write_segments(
                    lm,
                    text,
                    num_frames=total,
                    max_segments=self.max_segments,
                    keys=_keys(seed, WRITING),
                    text_valid=valid,
                    given=given,
                    motion_score=sampling.motion_score,
                    guidance_scale=sampling.guidance_scale,
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                )
                yield self.stage(segments)

    def show(
        self,
        prompts: Sequence[Prompt],
        written: Iterable[Iterable[Int[np.ndarray, "1 n"]]],
        seeds: Sequence[int],
        sampling: Any,
        given: UInt8[np.ndarray, "g h w 3"] | None,
        plan: Sequence[Window],
        watch: Watch,
    ) -> Iterator[Shown]:
        """The clips of what was written: of each sample its segments. See `generate`."""
        watch.expect(len(prompts) * len(plan) * sampling.num_inference_steps)
        texts = self.stage(self._embed_contexts([prompt.painted for prompt in prompts]))
        prefix = None
        if given is not None:
            with self.use("vae") as split:
                prefix = programs.encode_video(*split, _to_float(given[None]))
        painted = self.stage(
            self._paint_samples(texts, written, seeds, sampling, prefix, plan, watch)
        )
        with self.use("vae") as vae:
            for sample, latents in enumerate(painted):
                cache = None
                for i, (window, x, shown) in enumerate(latents):
                    if shown is None:
                        new = x if i == 0 else x[:, window.known :]
                        _, pixels, is_finite, cache = programs.decode_latents(*vae, new, cache)
                        shown = pixels, is_finite
                    watch.settle()
                    frames = np.array(shown[0])[0]
                    _check_shown(np.asarray(shown[1]), sample, sampling)
                    if i == 0 and given is not None:
                        frames[: len(given)] = given
                    yield Shown(sample, i, frames)

    def _embed_contexts(self, ids) -> Iterator[Any]:
        with self.use(self.painter_text) as (graph, state):
            for words in ids:
                yield _finite(
                    programs.embed_text(graph, state, np.asarray([words], np.int32), None)
                )

    def _paint_samples(
        self, texts, written, seeds, sampling, prefix, plan, watch
    ) -> Iterator[Iterable]:
        """Of each sample its windows, their latents, and what is shown where that is known."""
        with contextlib.ExitStack() as parts:
            use = {name: parts.enter_context(self.use(name)) for name in stages(sampling.carry)[0]}
            for context, segments, seed in zip(texts, written, seeds):
                yield self.stage(
                    self._paint_windows(use, context, segments, seed, sampling, prefix, plan, watch)
                )

    def _paint_windows(self, use, context, segments, seed, sampling, prefix, plan, watch):
        """One window after the other; of what came before only what the next one needs is kept."""
        cfg = WindowSampling(
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.diffusion_guidance_scale,
            ramp=sampling.ramp,
            history_noise=sampling.history_noise,
        )
        steered = zip(*(use[name] for name in ("semantic_tokenizer", "denoiser")))
        graphs, states = map(tuple, steered)
        ready, first, tail, past = None, 0, None, None
        segments = iter(segments)
        for i, window in enumerate(plan):
            ready = None if ready is None else ready[:, window.start - first :]
            first = window.start
            while ready is None or ready.shape[1] < window.size:
                codes = jnp.asarray(next(segments))
                more, past = programs.semantic_latents(graphs, states, codes, past)
                ready = more if ready is None else jnp.concatenate([ready, more], axis=1)
            if i and sampling.carry == "frames":
                prefix = programs.encode_video(*use["vae"], tail)
            keys = fold(_keys(seed, PAINTING), i)
            semantic = ready[:, : window.size]
            window_inputs = programs.WindowInputs(context, semantic, prefix, keys, cfg)
            x = self._paint_window(use["denoiser"], window_inputs, watch)
            if sampling.carry == "latents":
                prefix = x[:, -self.prefix_latents :]
                yield window, x, None
                continue
            cache, new = None, x
            if i:  # the autoencoder remembers what is shown of the window before
                *_, cache = programs.decode_latents(*use["vae"], x[:, : window.known], None)
                new = x[:, window.known :]
            frames, pixels, is_finite, _ = programs.decode_latents(*use["vae"], new, cache)
            tail = frames if tail is None else jnp.concatenate([tail, frames], axis=1)
            tail = tail[:, -(STRIDE * (self.prefix_latents - 1) + 1) :]
            yield window, x, (pixels, is_finite)

    def _paint_window(self, denoiser, given: programs.WindowInputs, watch: Watch) -> jax.Array:
        """Latents `[b, t, h, w, z]` of a window, dispatched and not waited for."""
        steps = subsampled_time_grid(given.cfg.num_inference_steps, self.num_timesteps)[:-1]
        place = _place(denoiser[1])

        def advance(carry, start, stop):
            # Always from the same devices, or other ones would be another program.
            carry = carry if place is None else jax.device_put(carry, place)
            return programs.advance_window(*denoiser, given, carry, start, stop)

        carry = watch.drive(advance, programs.begin_window(*denoiser, given), steps)
        return programs.finish_window(*denoiser, given, carry)

    def encode(self, video: UInt8[np.ndarray, "f h w 3"]) -> Int[np.ndarray, " n"]:
        """Semantic tokens of frames in the model's size, a segment at a time."""
        frames = self.frames
        count = (len(video) - 1) // STRIDE + 1
        starts = range(0, count, frames.segment)
        pieces = [video[STRIDE * i : STRIDE * (i + frames.segment - 1) + 1] for i in starts]
        with self.use("features") as split:
            found = [
                _finite(programs.features(*split, piece[None]), "encoder of features")
                for piece in pieces
            ]
        with self.use("semantic_tokenizer") as split:
            codes = [programs.encode_features(*split, piece) for piece in found]
        if not all(is_finite for _, is_finite in codes):
            raise UserError(NOT_FINITE.format("semantic tokenizer"))
        return np.concatenate([np.asarray(one)[0] for one, _ in codes])


def _place(state: Any) -> jax.sharding.NamedSharding | None:
    """Whole on all devices that weights are split over; None where there is one."""
    first = jax.tree.leaves(state)[0].sharding
    if not isinstance(first, jax.sharding.NamedSharding) or first.mesh.size == 1:
        return None
    return jax.sharding.NamedSharding(first.mesh, jax.sharding.PartitionSpec())


def _keys(seed: int, stream: int) -> jax.Array:
    return fold(sample_keys([seed]), stream)


def _to_float(video: np.ndarray) -> np.ndarray:
    return video.astype(np.float32) / 127.5 - 1


def _finite(made: jax.Array, part: str = "text encoder") -> jax.Array:
    """What a part made.

    Raises:
      UserError: It is not finite.
    """
    if not bool(jnp.isfinite(made).all()):
        raise UserError(NOT_FINITE.format(part))
    return made


def _check_shown(is_finite: Any, sample: int, sampling: Any) -> None:
    """Refuses a clip that is not finite, which would be shown as black.

    Raises:
      UserError: It is not.
    """
    if not is_finite:
        raise UserError(
            f"sample {sample} came out as NaN or infinite numbers, which are no picture: look at "
            "the weights of denoiser and vae, at diffusion_guidance_scale "
            f"{sampling.diffusion_guidance_scale:g} and at dtype"
        )
