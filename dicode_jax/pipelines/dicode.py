"""Text to video with DiCoDe: prompt -> deep tokens -> clips, and video -> tokens -> video.

    pipe = DiCoDePipeline.from_pretrained()
    video = pipe("a red circle moves right on a black background", num_clips=2, seed=0)
    for clip in pipe.stream("a red circle grows on a navy background", num_clips=1800):
        ...  # each is there as soon as it is painted

Arrays go in and out; reading and writing videos is `media.video`.
"""

import functools
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax.diffusion.guided import SamplingConfig
from dicode_jax.diffusion.schedules import NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.media.given import read_frames
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.dicode.generate import keyframes_in_sight, stream_keyframes
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.nn.rngs import fold, sample_keys
from dicode_jax.pipelines import base, calls, checks, options, painting
from dicode_jax.pipelines import progress as progress_lib
from dicode_jax.pipelines.dicode_config import TEMPERATURE, PipelineConfig
from dicode_jax.pipelines.dicode_config import GenerationConfig as GenerationConfig
from dicode_jax.pipelines.dicode_programs import LATENTS, PIXELS, row
from dicode_jax.pipelines.frames import square
from dicode_jax.pipelines.painting import Clip
from dicode_jax.pipelines.progress import Progress
from dicode_jax.text import cut
from dicode_jax.text.gpt import TextTokenizer
from dicode_jax.typing import Array, Float, UInt8

PARTS = {
    "tokenizer": (DeepTokenizer, DeepTokenizerConfig),
    "decoder": (ClipDecoder, ClipDecoderConfig),
    "language_model": (DiCoDeLM, DiCoDeLMConfig),
}


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
    takes = calls.COMMON

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
    def check_fit(cls, config: PipelineConfig, configs: Mapping[str, Any]) -> None:
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

    def _answer(self, call: calls.Call) -> calls.Answer:
        """Keyframes that are given are encoded, the language model goes on, the decoder paints.

        A prompt may be empty where there are keyframes. `temperature` divides the logits of the
        mixture that tokens are drawn from; `negative_prompt` is what its guidance moves away from.
        """
        given = dict(call.options)
        writing = {name: given.pop(name, None) for name in ("temperature", "negative_prompt")}
        num_frames, batch = given.pop("num_frames", None), given.pop("clips_per_batch", "auto")
        # What is wrong is known before the tokens are written.
        sampling = self._sampling(num_frames=num_frames, **given)
        own = self.config.sampling.num_frames
        if call.video is not None and sampling.num_frames != own:
            raise UserError(f"num_frames: a video goes on in clips of {own} frames; leave it out")
        painting.check_clips(batch)
        known, last = self._given_tokens(call, sampling.num_frames)
        tokens = known
        if (new := call.num_clips - (last is not None)) or known is None:
            tokens = self.generate_tokens(
                call.prompts,
                num_clips=new,
                seed=call.seeds,
                progress=call.tell,
                prefix=known,
                **writing,
            )
        if last is not None:
            tokens = np.concatenate([tokens, last], axis=1)
        if call.output_type == "tokens":
            return calls.Answer(tokens=tokens)
        ends = tokens[:, -call.num_clips - 1 :]
        settings = {"num_frames": num_frames, "clips_per_batch": batch, **given, **call.listeners}
        if call.output_type == "latent":
            clips = self.decode_stream(ends, seed=call.seeds, result="latents", **settings)
            latents = painting.gathered((x.frames for x in clips), len(tokens) * call.num_clips)
            return calls.Answer(latents=latents.reshape(len(tokens), -1, *latents.shape[2:]))
        clips = self.decode_stream(ends, seed=call.seeds, **settings)
        frames = call.gather(clips, len(tokens) * call.num_clips)
        if call.video is not None:
            first = np.stack([self.fit_frame(frame) for frame in call.video])
            frames = np.concatenate([np.repeat(first[None], len(frames), 0), frames], axis=1)
        fps = self.config.fps * sampling.num_frames / own  # a clip lasts as long as ever
        return calls.Answer(frames=frames, tokens=tokens, fps=fps)

    def _given_tokens(self, call: calls.Call, num_frames: int) -> tuple[Any, Any]:
        """Deep tokens `[b, k, n, z]` of keyframes in front, and `[b, 1, n, z]` of the last one."""
        if call.images is None and call.video is None:
            return None, None
        if call.video is not None:
            # Backwards from the last frame, which the first new clip begins with.
            indices = range(len(call.video) - 1, -1, -num_frames)[: self._in_sight()]
            known = self._encoded([call.video[i] for i in reversed(indices)])[None]
            return np.repeat(known, len(call.seeds), axis=0), None
        images, lasts = call.images or [], call.last_images or []
        encoded = self._encoded([*images, *lasts])[:, None]
        return encoded[: len(images)], (encoded[len(images) :] if lasts else None)

    def fit_frame(self, frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
        """What the tokenizer sees of a frame, in the size of the model; one of that size as it is.

        Raises:
          UserError: This model has no tokenizer.
        """
        size = self.config.frame_size
        if frame.shape[:2] == (size, size):
            return frame
        return np.clip(np.round(square(frame, size, **self._reads())), 0, 255).astype(np.uint8)

    def _reads(self) -> dict[str, bool]:
        """How the tokenizer wants frames resized."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer; it can generate and decode only")
        cfg = self.tokenizer.cfg
        return {"is_cropped": cfg.resize == "crop", "antialias": cfg.antialias}

    def _in_sight(self) -> int:
        """Most keyframes that may be given."""
        if self.language_model is None:
            return 1
        most = keyframes_in_sight(self.language_model, self.config.text_length)
        return max(1, (self.config.generation.window or most) - 1)

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        num_clips: int = 1,
        num_frames: int | None = None,
        seed: int | Sequence[int] = 0,
        clips_per_batch: int | str = "auto",
        progress: Progress | None = None,
        callback_on_step_end: calls.OnStep | None = None,
        **changes: Unpack[options.SamplingOptions],
    ) -> Iterator[Clip]:
        """The clips of the pipeline's videos, each as soon as it is painted.

        The language model writes no further ahead than two micro-batches of clips need: memory on
        host and devices does not grow with the length. The clips of a prompt come in order, one
        prompt after the other; joined they are what the pipeline returns, within one grey level.

        Args:
          prompt, num_frames, seed: As for the pipeline.
          changes: How clips are painted, see `options.SamplingOptions`.
          num_clips: Of each prompt, up to a million.
          clips_per_batch: As for the pipeline; 1 gives the first clip soonest.
          progress: Called as `("steps", done, total)` while clips are painted.
          callback_on_step_end: As for the pipeline.

        Raises:
          UserError: As for the pipeline, at the call; later, when what came out is no video.
        """
        ids, seeds = self._read_prompts(prompt, seed)
        num_clips = options.named("num_clips", options.Whole(1, options.MAX_STREAM), num_clips)

        def rows():
            for sample, one in enumerate(seeds):
                text, keys = ids[sample : sample + 1], fold(sample_keys([one]), 0)
                written = (run[0, 0] for run in self._keyframes(text, keys, num_clips + 1))
                for clip, pair in enumerate(itertools.pairwise(written)):
                    yield row(*pair, one, clip)

        sampling = self._sampling(num_frames=num_frames, **changes)
        blame, watch = "language_model and decoder", self._watch(progress, callback_on_step_end)
        return self._clips(rows(), len(seeds), num_clips, sampling, clips_per_batch, blame, watch)

    def generate_tokens(
        self,
        prompt: str | Sequence[str],
        *,
        num_clips: int = 1,
        seed: int | Sequence[int] = 0,
        progress: Progress | None = None,
        prefix: Float[np.ndarray, "b f n z"] | None = None,
        temperature: float | None = None,
        negative_prompt: str | None = None,
    ) -> Float[np.ndarray, "b k n z"]:
        """Deep tokens of the `num_clips + 1` keyframes of each prompt's video.

        Those of prompt i are, bit for bit, those of that prompt alone with its own seed; see the
        pipeline for errors.

        Args:
          prompt, num_clips, seed, progress: See the pipeline.
          prefix: Keyframes of each prompt's video to go on from, as `encode` makes them. They come
            first in the result, with `num_clips` behind them; prompts may then be empty.
          temperature: Divides the logits of the mixture; None for the model's own.
          negative_prompt: Instead of the empty one, where the model's own guidance is above 1.
        """
        ids, seeds = self._read_prompts(prompt, seed, allow_empty=prefix is not None)
        num_clips = options.named("num_clips", options.OPTIONS["num_clips"], num_clips)
        drawing = self._drawing(temperature, negative_prompt)
        count, mesh, tell = len(seeds), self._mesh(len(seeds)), progress_lib.heard(progress)
        # One prompt at a time on each device: the products of a batch are rounded in another way
        # in each size.
        at_once = 1 if mesh is None else mesh.size
        tokens = []
        for start in range(0, count, at_once):
            if tell is not None:
                tell("keyframes", start, count)
            rows = np.minimum(np.arange(start, start + at_once), count - 1)
            keys = fold(sample_keys([seeds[i] for i in rows]), 0)
            known = None if prefix is None else np.asarray(prefix, np.float32)[rows]
            count_new = num_clips + (known is None)
            written = self._keyframes(ids[rows], keys, count_new, mesh, prefix=known, **drawing)
            tokens.append(np.concatenate([*([] if known is None else [known]), *written], axis=1))
        if tell is not None:
            tell("keyframes", count, count)
        return checks.finite_tokens(np.concatenate(tokens)[:count], "language_model")

    def _drawing(self, temperature: Any, negative_prompt: Any) -> dict[str, Any]:
        """What `stream_keyframes` is told in place of the model's own."""
        changes: dict[str, Any] = {}
        if temperature is not None:
            changes["logits_temperature"] = options.named("temperature", TEMPERATURE, temperature)
        if negative_prompt is not None:
            if self.config.generation.guidance_scale == 1:
                raise UserError(
                    "negative_prompt: this model's language model is not guided "
                    "(generation.guidance_scale is 1); leave it out"
                )
            (prompt,) = options.check_prompts([negative_prompt])
            ids = self.text.encode([prompt], self.config.text_length).ids
            changes["uncond_ids"] = jnp.asarray(ids[0])
        return changes

    def _read_prompts(self, prompt, seed, allow_empty=False) -> tuple[np.ndarray, list[int]]:
        """Text ids `[b, l]` and seeds of prompts."""
        if self.language_model is None:
            raise UserError("this model has no language model; it can encode and decode only")
        if allow_empty and isinstance(prompt, list):
            prompt = ["" if one is None else one for one in prompt]
        prompts = options.check_prompts(prompt)
        seeds = options.check_seeds(seed, len(prompts))
        encoded = self.text.encode(prompts, self.config.text_length, allow_empty=allow_empty)
        for i in encoded.truncated:
            cut.warn(encoded.left_out[i], encoded.lengths[i], self.config.text_length, stacklevel=3)
        return np.asarray(encoded.ids), seeds

    def _keyframes(
        self, ids, keys, num_keyframes: int, mesh=None, prefix=None, **changes
    ) -> Iterator[Array]:
        """Keyframes `[b, 1, n, z]`, dispatched and not waited for."""
        (graph,), (state,) = self._of("language_model", mesh=mesh)
        return stream_keyframes(
            nnx.merge(graph, state),
            jnp.asarray(ids),
            num_keyframes=num_keyframes,
            keys=keys,
            mesh=mesh,
            prefix=None if prefix is None else jnp.asarray(prefix),
            **{**vars(self.config.generation), **changes},
        )

    def encode(
        self, video: Any, keyframes: Sequence[int] | None = None
    ) -> Float[np.ndarray, "k n z"]:
        """Deep tokens of the keyframes of a video of any size, cropped or stretched to a square.

        Which of the two is a fact of the tokenizer (`DeepTokenizerConfig.resize`).

        Args:
          video: uint8 `[f, h, w, 3]`, a `Video`, or the path of a file, which is read.
          keyframes: Indices of two keyframes or more, negative ones from the end; the first and
            the last frame by default.

        Raises:
          UserError: Fewer than two frames, an index outside of them, or this model has no
            tokenizer.
        """
        video = read_frames(video)
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
        tokens = self._encoded(frames)
        if len(tokens) < 2:
            raise UserError(f"a clip needs two keyframes, got {len(tokens)}")
        return tokens

    def _encoded(self, frames: Iterable[Any]) -> Float[np.ndarray, "k n z"]:
        reads, (tokens, last) = self._reads(), ([], None)
        graph, state = self._split["tokenizer"]
        for frame in frames:
            if not tokens or frame is not last:
                small = square(frame, self.config.frame_size, **reads) / 255 * 2 - 1
                encoded = np.asarray(_encode(graph, state, small))
            tokens.append(encoded)
            last = frame
        if not tokens:
            raise UserError("a clip needs two keyframes, got 0")
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
          seed, num_frames: As for the pipeline; video i of a batch is painted as it is alone with
            its own seed.
          clips_per_batch: Clips of all videos that each device paints at once; "auto" for as many
            as are fast and fit in the memory that is free.
          progress: Called as `(what, done, total)` while it works.
          changes: How clips are painted, see `options.SamplingOptions`.

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
            progress=progress,
            **changes,
        )
        *batch, k, _, _ = np.shape(tokens)
        if k > options.MAX_CLIPS + 1:
            raise UserError(
                f"at most {options.MAX_CLIPS} clips are gathered at once, got {k} keyframes; "
                "decode_stream paints any number"
            )
        count = int(np.prod(batch)) * (k - 1)
        tell = progress_lib.heard(progress)
        told = clips if tell is None else calls.counted(clips, count, tell)
        frames = painting.gathered((clip.frames for clip in told), count)
        return frames.reshape(*batch, -1, *frames.shape[2:])

    def decode_stream(
        self,
        tokens: Float[np.ndarray, "*b k n z"],
        *,
        seed: int | Sequence[int] = 0,
        num_frames: int | None = None,
        clips_per_batch: int | str = "auto",
        result: str = "pixels",
        progress: Progress | None = None,
        callback_on_step_end: calls.OnStep | None = None,
        **changes: Unpack[options.SamplingOptions],
    ) -> Iterator[Clip]:
        """The clips between neighbouring keyframes, each as soon as it is painted.

        Those of a video come in order, one video after the other. For arguments see `decode`;
        `result="latents"` gives scaled latents in place of frames; `progress` and
        `callback_on_step_end` are those of `stream`.

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
            row(*pair, one, clip)
            for video, one in zip(videos, seeds)
            for clip, pair in enumerate(itertools.pairwise(video))
        )
        num_clips = videos.shape[1] - 1
        sampling = self._sampling(num_frames=num_frames, **changes)
        told = options.named("result", options.OneOf(("pixels", "latents")), result)
        watch = self._watch(progress, callback_on_step_end)
        settings = sampling, clips_per_batch, "decoder", watch
        return self._clips(rows, len(videos), num_clips, *settings, result=told)

    def _clips(self, rows, num_videos, num_clips, *settings, result="pixels") -> Iterator[Clip]:
        """Clips of the rows, which are those of one video after the other."""
        sampling, clips_per_batch, blame, watch = settings
        painted = self._paint(
            PIXELS if result == "pixels" else LATENTS,
            ["decoder"],
            rows,
            num_videos * num_clips,
            sampling,
            clips=num_clips,
            clips_per_batch=painting.check_clips(clips_per_batch),
            blame=blame,
            watch=watch,
        )
        return (Clip(*divmod(i, num_clips), frames) for i, frames in enumerate(painted))

    def reconstruct(
        self, video: Any, keyframes: Sequence[int] | None = None, **changes: Any
    ) -> UInt8[np.ndarray, "f h w 3"]:
        """`decode(encode(video, keyframes), **changes)`."""
        return self.decode(self.encode(video, keyframes), **changes)

    def _sampling(self, **changes: Any) -> SamplingConfig:
        config = super()._sampling(**changes)
        if config.num_frames % 2:
            raise UserError(f"num_frames must be even, got {config.num_frames}")
        if config.is_guided and self.decoder.cfg.latent_prior is not None:
            raise UserError(
                "guidance_scale: this model paints about what its deep tokens show (latent_prior) "
                "and has not learned to paint without them; leave it out"
            )
        return config


@functools.partial(jax.jit, static_argnames=("graph",))
def _encode(graph, state, image):
    return nnx.merge(graph, state)(image[None, None])[0, 0]
