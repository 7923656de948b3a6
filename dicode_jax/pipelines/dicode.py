"""Text to video with DiCoDe: prompt -> deep tokens -> clips, and video -> tokens -> video.

    pipe = DiCoDePipeline.from_pretrained()
    video = pipe("a red circle moves right on a black background", num_clips=2, seed=0)
    for clip in pipe.stream("a red circle grows on a navy background", num_clips=1800):
        ...  # each is there as soon as it is painted

Arrays go in and out; reading and writing videos is `media.video`.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.media.resize import resize_square
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import (
    ClipDecoder,
    ClipDecoderConfig,
    decode_clip,
    decode_latents,
)
from dicode_jax.models.dicode.generate import stream_keyframes
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.nn.rngs import fold, sample_keys
from dicode_jax.pipelines import base, checks, options, painting
from dicode_jax.pipelines.painting import Clip
from dicode_jax.text import cut
from dicode_jax.text.gpt import TextTokenizer
from dicode_jax.typing import Array, Float, UInt8

Progress = Callable[[str, int, int], None]  # (what, done, of how many)


PARTS = {
    "tokenizer": (DeepTokenizer, DeepTokenizerConfig),
    "decoder": (ClipDecoder, ClipDecoderConfig),
    "language_model": (DiCoDeLM, DiCoDeLMConfig),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How deep tokens are drawn; the defaults are those of the released demo.

    Attributes:
      do_sample: Draw from the mixture; False takes its mean.
      var_scale: Multiplies the variances of the mixture.
      logits_temperature: Divides the logits of its components; below 1 prefers the heavier ones.
      guidance_scale: Above 1, tokens are moved away from those of the empty prompt.
      window: Most keyframes in sight at once; None for as many as the model's tables hold.
      overlap: Keyframes that the next window sees of the last one; None for half a window.
    """

    do_sample: bool = True
    var_scale: float = 0.01
    logits_temperature: float = 1.0
    guidance_scale: float = 1.0
    window: int | None = None
    overlap: int | None = None

    def __post_init__(self):
        for name, least, most in (
            ("var_scale", 0.0, 1e6),
            ("logits_temperature", 1e-6, 1e6),
            ("guidance_scale", 1.0, options.MAX_GUIDANCE),
        ):
            options.named(name, options.Real(least, most), getattr(self, name))
        for name in ("window", "overlap"):
            if getattr(self, name) is not None:
                options.named(name, options.Whole(1), getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What a pipeline knows besides its parts.

    Attributes:
      frame_size: Height and width that videos are resized to before they are encoded; how, the
        tokenizer's config says.
      fps: Frames per second of the videos it makes.
      text_length: Text ids in front of the deep tokens; longer prompts are cut.
      sampling: How clips are painted.
      generation: How deep tokens are drawn.
    """

    frame_size: int = 256
    fps: float = 8.0
    text_length: int = 80
    sampling: SamplingConfig = SamplingConfig(batch_guidance=True)
    generation: GenerationConfig = GenerationConfig()

    def __post_init__(self):
        options.check_config(self)
        options.named("num_frames", options.Whole(1, is_even=True), self.sampling.num_frames)
        options.named("text_length", options.Whole(1), self.text_length)


class DiCoDePipeline(base.Pipeline):
    """Holds tokenizer, clip decoder, language model and text tokenizer.

    Args:
      tokenizer: Keyframes to deep tokens; None for a pipeline that only generates.
      decoder: Deep tokens of two keyframes to a clip.
      language_model: Prompts to deep tokens; None for a pipeline that only codes video.
      text: Prompts to ids; goes with the language model.
      config: Sizes and sampling defaults.
      metadata: Where the weights of each part come from (see `weights.read_metadata`); handed on
        when the pipeline is saved.
    """

    kind = "dicode"
    part_types = PARTS
    optional = frozenset({"tokenizer", "language_model"})
    config_type = PipelineConfig

    def __init__(
        self,
        *,
        tokenizer: DeepTokenizer | None,
        decoder: ClipDecoder,
        language_model: DiCoDeLM | None,
        text: TextTokenizer | None,
        config: PipelineConfig,
        metadata: Mapping[str, Mapping[str, str]] | None = None,
    ):
        parts = {"tokenizer": tokenizer, "decoder": decoder, "language_model": language_model}
        super().__init__(parts, config=config, text=text, metadata=metadata)
        self.tokenizer, self.decoder, self.language_model = tokenizer, decoder, language_model

    @classmethod
    def _check_fit(cls, config: PipelineConfig, configs: Mapping[str, Any]) -> None:
        if (lm := configs.get("language_model")) is None:
            return
        room = (lm.body.max_seq_len - config.text_length + 1) // (lm.num_tokens + 1)
        most = min(lm.max_keyframes, max(room, 0))
        window, overlap = config.generation.window or max(most, 1), config.generation.overlap or 0
        if window > most:
            raise UserError(
                f"behind a text of {config.text_length} tokens the tables of the language model "
                f"have room for {most} keyframes, {window} are to be in sight at once"
            )
        if overlap >= window:
            raise UserError(f"overlap must be below the window of {window}, got {overlap}")

    @classmethod
    def _read_text(cls, folder: pathlib.Path, configs: Mapping[str, Any]) -> TextTokenizer | None:
        if "language_model" not in configs:
            return None
        text = TextTokenizer.from_file(folder / base.TEXT_FOLDER)
        known = configs["language_model"].body.vocab_size
        if text.vocab_size > known:
            raise UserError(
                f"{folder}: the text tokenizer has {text.vocab_size} ids, the language model has "
                f"{known}"
            )
        return text

    @classmethod
    def _assemble(cls, parts: Mapping[str, Any], **known: Any) -> "DiCoDePipeline":
        return cls(**{name: parts.get(name) for name in PARTS}, **known)

    @property
    def _schedule(self) -> NoiseSchedule:
        return self.decoder.cfg.schedule

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_clips: int = 1,
        num_frames: int | None = None,
        seed: int | Sequence[int] = 0,
        clips_per_batch: int | str = "auto",
        progress: Progress | None = None,
        **changes: Unpack[options.SamplingOptions],
    ) -> UInt8[np.ndarray, "b f h w 3"]:
        """Generates a video for each prompt: what `stream` gives, gathered.

        Prompt i of a call with `seed=s` gives what it gives alone with `seed=s + i`: the same
        tokens, and frames within one grey level, as sums run in another order in another batch.
        That holds for any number of prompts, clips at once and devices.

        Args:
          prompt: One prompt or several.
          num_clips: Clips of two seconds; neighbours share a keyframe.
          num_frames: Frames per clip, even; the model's default is None.
          seed: Of all randomness, 0 to 2**32 - 1; or a seed for each prompt.
          clips_per_batch: Clips of all videos that each device paints at once; "auto" for as many
            as are fast and fit in the memory that is free.
          progress: Called as `(what, done, total)` while it works.
          changes: How clips are painted, see `options.SamplingOptions`.

        Returns:
          Frames in [0, 255], `num_clips * num_frames` for each prompt.

        Raises:
          UserError: A prompt is empty or cannot be spelled, or an option is impossible.
        """
        # What is wrong is known before the tokens are written.
        self._sampling(num_frames=num_frames, **changes)
        painting.check_clips(clips_per_batch)
        tokens = self.generate_tokens(prompt, num_clips=num_clips, seed=seed, progress=progress)
        return self.decode(
            tokens,
            seed=seed,
            num_frames=num_frames,
            clips_per_batch=clips_per_batch,
            progress=progress,
            **changes,
        )

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        num_clips: int = 1,
        num_frames: int | None = None,
        seed: int | Sequence[int] = 0,
        clips_per_batch: int | str = "auto",
        **changes: Unpack[options.SamplingOptions],
    ) -> Iterator[Clip]:
        """The clips of the pipeline's videos, each as soon as it is painted.

        The language model writes no further ahead than two micro-batches of clips need: memory on
        host and devices does not grow with the length. The clips of a prompt come in order, one
        prompt after the other; joined they are what the pipeline returns, within one grey level.

        Args:
          prompt, num_frames, seed, changes: As for the pipeline.
          num_clips: Of each prompt, up to a million.
          clips_per_batch: As for the pipeline; 1 gives the first clip soonest.

        Raises:
          UserError: As for the pipeline, at the call; later, when what came out is no video.
        """
        ids, seeds = self._read_prompts(prompt, seed)
        num_clips = options.named("num_clips", options.Whole(1, options.MAX_STREAM), num_clips)

        def rows():
            for sample, one in enumerate(seeds):
                text, keys = ids[sample : sample + 1], fold(sample_keys([one]), 0)
                written = (run[0, 0] for run in self._keyframes(text, keys, num_clips))
                for clip, pair in enumerate(itertools.pairwise(written)):
                    yield _row(*pair, one, clip)

        sampling = self._sampling(num_frames=num_frames, **changes)
        blame = "language_model and decoder"
        return self._clips(rows(), len(seeds), num_clips, sampling, clips_per_batch, blame)

    def generate_tokens(
        self,
        prompt: str | Sequence[str],
        *,
        num_clips: int = 1,
        seed: int | Sequence[int] = 0,
        progress: Progress | None = None,
    ) -> Float[np.ndarray, "b k n z"]:
        """Deep tokens of the `num_clips + 1` keyframes of each prompt's video.

        Those of prompt i are, bit for bit, those of that prompt alone with its own seed; see the
        pipeline for arguments and errors.
        """
        ids, seeds = self._read_prompts(prompt, seed)
        num_clips = options.named("num_clips", options.OPTIONS["num_clips"], num_clips)
        count, mesh = len(seeds), self._mesh(len(seeds))
        # One prompt at a time on each device: the products of a batch are rounded in another way
        # in each size.
        at_once = 1 if mesh is None else mesh.size
        tokens = []
        for start in range(0, count, at_once):
            if progress is not None:
                progress("keyframes", start, count)
            rows = np.minimum(np.arange(start, start + at_once), count - 1)
            keys = fold(sample_keys([seeds[i] for i in rows]), 0)
            written = self._keyframes(ids[rows], keys, num_clips, mesh)
            tokens.append(np.concatenate(list(written), axis=1))
        if progress is not None:
            progress("keyframes", count, count)
        return checks.finite_tokens(np.concatenate(tokens)[:count], "language_model")

    def _read_prompts(self, prompt, seed) -> tuple[np.ndarray, list[int]]:
        """Text ids `[b, l]` and seeds of prompts."""
        if self.language_model is None:
            raise UserError("this model has no language model; it can encode and decode only")
        prompts = options.check_prompts(prompt)
        seeds = options.check_seeds(seed, len(prompts))
        encoded = self.text.encode(prompts, self.config.text_length, allow_empty=False)
        for i in encoded.truncated:
            cut.warn(encoded.left_out[i], encoded.lengths[i], self.config.text_length, stacklevel=3)
        return np.asarray(encoded.ids), seeds

    def _keyframes(self, ids, keys, num_clips: int, mesh=None) -> Iterator[Array]:
        """Keyframes `[b, 1, n, z]`, dispatched and not waited for."""
        (graph,), (state,) = self._of("language_model", mesh=mesh)
        return stream_keyframes(
            nnx.merge(graph, state),
            jnp.asarray(ids),
            num_keyframes=num_clips + 1,
            keys=keys,
            mesh=mesh,
            **vars(self.config.generation),
        )

    def encode(
        self,
        video: UInt8[np.ndarray, "f h w 3"],
        keyframes: Sequence[int] | None = None,
    ) -> Float[np.ndarray, "k n z"]:
        """Deep tokens of the keyframes of a video of any size, cropped or stretched to a square.

        Which of the two is a fact of the tokenizer (`DeepTokenizerConfig.resize`).

        Args:
          video: Frames in [0, 255].
          keyframes: Indices of two keyframes or more, negative ones from the end; the first and
            the last frame by default.

        Raises:
          UserError: Fewer than two frames, an index outside of them, or this model has no
            tokenizer.
        """
        video = checks.as_array(video, "a video is uint8 [f, h, w, 3]")
        if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not video.size:
            raise UserError(f"a video is uint8 [f, h, w, 3], got {video.dtype} {video.shape}")
        if len(video) < 2:
            raise UserError("a clip needs two keyframes, the video has one frame")
        given = [0, -1] if keyframes is None else keyframes
        return self.encode_frames(video[i] for i in options.check_keyframes(given, len(video)))

    def encode_frames(
        self, frames: Iterable[UInt8[np.ndarray, "h w 3"]]
    ) -> Float[np.ndarray, "k n z"]:
        """`encode` of keyframes that come one by one, such as those of a file that is being read.

        One is held at a time, whatever its size; where it comes again next, its tokens do.
        """
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer; it can generate and decode only")
        graph, state = self._split["tokenizer"]
        tokens, last = [], None
        for frame in frames:
            if not tokens or frame is not last:
                small = _resized(frame, self.config.frame_size, self.tokenizer.cfg)
                encoded = np.asarray(_encode(graph, state, small))
            tokens.append(encoded)
            last = frame
        if len(tokens) < 2:
            raise UserError(f"a clip needs two keyframes, got {len(tokens)}")
        return checks.finite_tokens(np.stack(tokens), "tokenizer")

    def decode(
        self,
        tokens: Float[np.ndarray, "*b k n z"],
        *,
        seed: int | Sequence[int] = 0,
        num_frames: int | None = None,
        clips_per_batch: int | str = "auto",
        progress: Progress | None = None,
        **changes: Unpack[options.SamplingOptions],
    ) -> UInt8[np.ndarray, "*b f h w 3"]:
        """Paints the clips between neighbouring keyframes: what `decode_stream` gives, gathered.

        Args:
          tokens: Deep tokens of two or more keyframes, of one video or of a batch.
          seed, num_frames, clips_per_batch, progress, changes: As for the pipeline; video i of a
            batch is painted as it is alone with its own seed.

        Returns:
          `(k - 1) * num_frames` frames in [0, 255].

        Raises:
          UserError: The tokens are of another shape than the model's, or an option is impossible.
        """
        clips = self.decode_stream(
            tokens,
            seed=seed,
            num_frames=num_frames,
            clips_per_batch=clips_per_batch,
            **changes,
        )
        *batch, k, _, _ = np.shape(tokens)
        if k > options.MAX_CLIPS + 1:
            raise UserError(
                f"at most {options.MAX_CLIPS} clips are gathered at once, got {k} keyframes; "
                "decode_stream paints any number"
            )
        count = int(np.prod(batch)) * (k - 1)
        frames = base.gathered((clip.frames for clip in _counted(clips, count, progress)), count)
        return frames.reshape(*batch, -1, *frames.shape[2:])

    def decode_stream(
        self,
        tokens: Float[np.ndarray, "*b k n z"],
        *,
        seed: int | Sequence[int] = 0,
        num_frames: int | None = None,
        clips_per_batch: int | str = "auto",
        **changes: Unpack[options.SamplingOptions],
    ) -> Iterator[Clip]:
        """The clips between neighbouring keyframes, each as soon as it is painted.

        Those of a video come in order, one video after the other. For arguments see `decode`.

        Raises:
          UserError: As for `decode`, at the call; later, when what came out is no video.
        """
        cfg = self.decoder.cfg
        wanted = (
            f"this model decodes two or more keyframes of {cfg.num_tokens} tokens of width "
            f"{cfg.token_dim}"
        )
        tokens = checks.as_array(tokens, wanted, np.float32)
        shape = (cfg.num_tokens, cfg.token_dim)
        if tokens.ndim not in (3, 4) or tokens.shape[-2:] != shape or not tokens.size:
            raise UserError(f"{wanted}, got an array of shape {tokens.shape}")
        if tokens.shape[-3] < 2:
            raise UserError(f"{wanted}, got one keyframe")
        videos = tokens if tokens.ndim == 4 else tokens[None]
        seeds = options.check_seeds(seed, len(videos))
        rows = (
            _row(*pair, one, clip)
            for video, one in zip(videos, seeds)
            for clip, pair in enumerate(itertools.pairwise(video))
        )
        num_clips = videos.shape[1] - 1
        sampling = self._sampling(num_frames=num_frames, **changes)
        return self._clips(rows, len(videos), num_clips, sampling, clips_per_batch, "decoder")

    def _clips(
        self, rows: Iterable[Mapping], num_videos, num_clips, sampling, clips_per_batch, blame
    ) -> Iterator[Clip]:
        """Clips of the rows, which are those of one video after the other."""
        painted = self._paint(
            _decode,
            ["decoder"],
            rows,
            num_videos * num_clips,
            sampling,
            clips=num_clips,
            clips_per_batch=painting.check_clips(clips_per_batch),
            blame=blame,
        )
        return (Clip(*divmod(i, num_clips), frames) for i, frames in enumerate(painted))

    def reconstruct(
        self,
        video: UInt8[np.ndarray, "f h w 3"],
        keyframes: Sequence[int] | None = None,
        **changes: Any,
    ) -> UInt8[np.ndarray, "f h w 3"]:
        """`decode(encode(video, keyframes), **changes)`."""
        return self.decode(self.encode(video, keyframes), **changes)

    def _sampling(self, **changes: Any) -> SamplingConfig:
        config = super()._sampling(**changes)
        if config.num_frames % 2:
            raise UserError(f"num_frames must be even, got {config.num_frames}")
        return config


def _row(first, second, seed: int, clip: int) -> dict[str, Any]:
    """What a clip is painted from: tokens `[n, z]` of both keyframes, a seed and a number."""
    return {"first": first, "second": second, "seed": np.uint32(seed), "clip": np.int32(clip)}


def _counted(clips: Iterator[Clip], count: int, progress: Progress | None) -> Iterator[Clip]:
    """The clips, with a word of each."""
    for done, clip in enumerate(clips):
        if progress is not None:
            progress("clips", done, count)
        yield clip
    if progress is not None:
        progress("clips", count, count)


def _resized(frame: Any, size: int, cfg: DeepTokenizerConfig) -> Float[np.ndarray, "s s 3"]:
    """A frame as the tokenizer wants it, in [-1, 1]."""
    frame = checks.as_array(frame, "a keyframe is uint8 [h, w, 3]")
    if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8 or not frame.size:
        raise UserError(f"a keyframe is uint8 [h, w, 3], got {frame.dtype} {frame.shape}")
    h, w, _ = frame.shape
    height, width = (min(h, w),) * 2 if cfg.resize == "crop" else (h, w)
    left, top = (w - width) / 2, (h - height) / 2
    box = (left, top, left + width, top + height)
    return resize_square(frame, size, box, antialias=cfg.antialias) / 255 * 2 - 1


@functools.partial(jax.jit, static_argnames=("graph",))
def _encode(graph, state, image):
    return nnx.merge(graph, state)(image[None, None])[0, 0]


@painting.program
def _decode(decoder, rows, sampling):
    tokens = jnp.stack([rows["first"], rows["second"]], axis=1)
    keys = fold(sample_keys(rows["seed"]), 1 + rows["clip"])
    latents = decode_clip(decoder, tokens, keys, sampling)
    # A frame at a time: a clip's would take more memory than its latents' whole way here.
    return checks.quantize(decode_latents(decoder, latents, per_frame=True))
