"""LanDiff (arXiv 2503.04606): a language model writes semantic tokens, a painter makes frames.

    pipe = LanDiffPipeline.from_pretrained("models/landiff", dtype="auto")
    pipe("a dog surfs", num_clips=1, seed=0).save("dog.mp4")  # 49 frames of 480 x 720
    for clip in pipe.stream("a dog surfs", num_clips=19):
        ...  # a minute: 49 frames, then 24 a clip, each as soon as it is painted

The original makes one clip; how videos go on is in `models.landiff.streaming`.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dicode_jax import config as config_lib
from dicode_jax.diffusion.samplers.subsampled import subsampled_time_grid
from dicode_jax.errors import UserError
from dicode_jax.media.given import read_frames, read_last
from dicode_jax.media.resize import middle
from dicode_jax.models.autoencoder_causal3d import AutoencoderCausal3D, AutoencoderCausal3DConfig
from dicode_jax.models.clip import CLIPVision, CLIPVisionConfig
from dicode_jax.models.landiff.dit import Denoiser, DenoiserConfig
from dicode_jax.models.landiff.engine import Engine, Prompt, stages
from dicode_jax.models.landiff.features import STRIDE
from dicode_jax.models.landiff.frames import check_codes
from dicode_jax.models.landiff.language_model import (
    NUM_PREFIX,
    LanguageModel,
    LanguageModelConfig,
)
from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizer, SemanticTokenizerConfig
from dicode_jax.models.landiff.streaming import Window, num_latents, windows, written_frames
from dicode_jax.models.t5 import T5Encoder, T5EncoderConfig
from dicode_jax.models.vit import ViT, ViTConfig
from dicode_jax.pipelines import base, calls, checks, options, shelf
from dicode_jax.pipelines.landiff_config import (
    LanDiffConfig,
    LanDiffSamplingConfig,
    check_painting,
)
from dicode_jax.pipelines.painting import Clip, whole_videos
from dicode_jax.pipelines.progress import Progress
from dicode_jax.runtime import memory
from dicode_jax.storage.weights import CONFIG_FILE
from dicode_jax.text.t5 import T5Tokenizer, read
from dicode_jax.typing import Int, UInt8

PARTS: dict[str, tuple[type, type]] = {
    "text_encoder": (T5Encoder, T5EncoderConfig),
    "language_model": (LanguageModel, LanguageModelConfig),
    "painter_text": (T5Encoder, T5EncoderConfig),
    "semantic_tokenizer": (SemanticTokenizer, SemanticTokenizerConfig),
    "denoiser": (Denoiser, DenoiserConfig),
    "vae": (AutoencoderCausal3D, AutoencoderCausal3DConfig),
    "features": (ViT, ViTConfig),
}
FEATURES: dict[str | None, tuple[type, type]] = {
    "vit": PARTS["features"],
    "clip_vision": (CLIPVision, CLIPVisionConfig),
}
"""Kind of the part `features` -> its classes."""


class LanDiffPipeline(base.Pipeline):
    """Holds the text encoders, the language model, the semantic tokenizer, the denoiser and VAE.

    Without `painter_text` one text encoder serves both sides; without `features` no video can be
    given.

    Args:
      parts: A module for each name in `PARTS`.
      config: Sizes and sampling defaults.
      text: A vocabulary for each text encoder.
      metadata: Where the weights of each part come from (see `weights.read_metadata`).
      shelf: Where parts lie that are loaded when they run; their modules have no arrays.
    """

    kind = "landiff"
    overflows = True  # T5 does
    part_types = PARTS
    optional = frozenset({"painter_text", "features"})
    config_type = LanDiffConfig
    takes = calls.COMMON - {"last_image", "num_frames", "negative_prompt", "latent", "tokens"}

    def __init__(self, parts: Mapping[str, Any], *, shelf: shelf.OnDisk | None = None, **known):
        super().__init__(parts, **known)
        self._shelf = shelf

    @classmethod
    def _skipped(cls, folder: pathlib.Path, name: str) -> tuple[str, ...]:
        """Tokens are made of features alone, so that without these their encoder has no use."""
        has_use = name != "semantic_tokenizer" or (folder / "features").is_dir()
        return () if has_use else ("encoder.",)

    @classmethod
    def _types(cls, folder: pathlib.Path, name: str) -> tuple[Any, type]:
        if name == "semantic_tokenizer" and cls._skipped(folder, name):
            return functools.partial(SemanticTokenizer, has_encoder=False), PARTS[name][1]
        if name != "features":
            return PARTS[name]
        kind, _ = config_lib.read_json(folder / name / CONFIG_FILE)
        if kind not in FEATURES:
            raise UserError(
                f"{folder / name} is {kind!r}; want one of {', '.join(map(str, FEATURES))}"
            )
        return FEATURES[kind]

    @classmethod
    def _load_parts(
        cls,
        folder: pathlib.Path,
        *,
        dtype: Any,
        param_dtype: Any,
        offload: bool = False,
        devices: Sequence[Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `from_pretrained`.

        Args:
          offload: Load each part when it runs and free it then, for devices that hold one alone.
          devices: Over which all parts are split; None for all local ones.
        """
        if any(x is not None and jnp.dtype(x) == jnp.float16 for x in (dtype, param_dtype)):
            raise UserError("T5 overflows in float16; take bfloat16 or float32")
        devices = list(jax.local_devices() if devices is None else devices)
        names = cls._stored(folder)
        skipped = {name: cls._skipped(folder, name) for name in names}
        sizes = {n: shelf.part_bytes(folder / n, param_dtype, skipped[n]) for n in names}
        carry = config_lib.from_json(cls.config_type, folder / CONFIG_FILE).sampling.carry
        shelf.check_room(sizes, devices, offload=offload, stages=stages(carry))
        load = functools.partial(cls._load_part, folder, dtype=dtype, param_dtype=param_dtype)
        if not offload and len(devices) == 1:
            return {name: load(name) for name in names}, {}
        if not offload:
            return {n: shelf.spread(load(n, on_host=True), devices) for n in names}, {}
        types = {"dtype": dtype, "param_dtype": param_dtype}
        parts = {n: shelf.outline(folder / n, *cls._types(folder, n), **types) for n in names}
        return parts, {"shelf": shelf.OnDisk(load, sizes)}

    @classmethod
    def _read_text(cls, folder: pathlib.Path, configs: Mapping[str, Any]) -> dict[str, T5Tokenizer]:
        text = {}
        for name in ("text_encoder", "painter_text"):
            if name in configs:
                text[name] = T5Tokenizer.from_file(folder / name)
                text[name].check_fit(configs[name].vocab_size, name)
        return text

    def _write_text(self, folder: pathlib.Path) -> None:
        for name, vocabulary in self.text.items():
            vocabulary.save(folder / name)

    def save_pretrained(self, folder: Any, *, dtype: Any = None) -> None:
        if self._shelf is not None:
            raise UserError("parts that are on disk are not saved: copy the folder")
        super().save_pretrained(folder, dtype=dtype)

    @classmethod
    def check_fit(cls, config: LanDiffConfig, configs: Mapping[str, Any]) -> None:
        lm, tokenizer = configs["language_model"], configs["semantic_tokenizer"]
        denoiser, vae = configs["denoiser"], configs["vae"]
        painter = configs.get("painter_text", configs["text_encoder"])
        dit, upsampler = denoiser.dit, denoiser.upsampler
        grid = tuple(side * upsampler.upsampling for side in tokenizer.grid)
        pairs = {
            "frames of the language model and of the tokenizer": (lm.frames, tokenizer.frames),
            "their codes": (lm.codebook_size, tokenizer.codebook_size),
            "width of the language model's text": (lm.text_dim, configs["text_encoder"].embed_dim),
            "width of the painter's text": (dit.text_dim, painter.embed_dim),
            "width of features": (upsampler.feature_dim, tokenizer.feature_dim),
            "latents of the denoiser and of the features": ((dit.height, dit.width), grid),
            "channels of latents": (dit.channels, vae.z_channels),
            "frames for each latent and semantic frame": (vae.time_factor, STRIDE),
        }
        if "features" in configs:
            found = configs["features"]
            sides = dit.height * vae.downsampling, dit.width * vae.downsampling
            want = sides[0] // found.patch_size, sides[1] // found.patch_size
            pairs["grid of features"] = (tokenizer.grid, want)
            pairs["width of the encoder's features"] = (tokenizer.feature_dim, found.embed_dim)
        for what, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise UserError(f"the parts do not fit: {what} are {ours} and {theirs}")
        try:
            windows(dit.num_frames, dit.num_frames, config.prefix_latents)
        except ValueError as error:
            raise UserError(f"the parts do not fit: {error}") from error

    @contextlib.contextmanager
    def _use(self, name: str) -> Iterator[tuple[Any, Any]]:
        """Graph and state of a part for as long as it runs."""
        if self._shelf is None:
            yield self._split[name]
            return
        with self._shelf.use(name) as found:
            yield found

    @property
    def _engine(self) -> Engine:
        return Engine(
            use=self._use,
            stage=list if self._shelf is not None else lambda items: items,
            frames=self.parts["semantic_tokenizer"].cfg.frames,
            pad_id=self.text["text_encoder"].pad_id,
            text_length=self.config.text_length,
            prefix_latents=self.config.prefix_latents,
            max_segments=self.config.max_segments,
            painter_text="painter_text" if "painter_text" in self.text else "text_encoder",
            num_timesteps=self.parts["denoiser"].cfg.schedule.num_timesteps,
        )

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width."""
        dit, vae = self.parts["denoiser"].cfg.dit, self.parts["vae"].cfg
        return dit.height * vae.downsampling, dit.width * vae.downsampling

    def num_frames(self, num_clips: int) -> int:
        """Frames of a video of so many clips: 49, and 24 for each further one, in the release.

        Raises:
          UserError: It is no number of clips.
        """
        options.named("num_clips", options.Whole(1, options.MAX_STREAM), num_clips)
        window = self.parts["denoiser"].cfg.dit.num_frames
        return STRIDE * (num_latents(num_clips, window, self.config.prefix_latents) - 1) + 1

    def num_clips(self, num_tokens: int) -> int:
        """Clips of which the video of so many semantic tokens is painted.

        Raises:
          UserError: No video has so many.
        """
        return len(self._token_plan(num_tokens))

    def coded_frames(self, count: int) -> int:
        """How many of `count` frames, the first ones, have semantic tokens: 1, 9, 17 .."""
        return count - (count - 1) % (2 * STRIDE)

    def cache_bytes(
        self, num_clips: int, prompt: str | None = None, *, is_guided: bool = True
    ) -> int:
        """What the language model remembers of a video, in bytes; allocated once, in front of it.

        Args:
          prompt: What it reads; None for the longest text.
        """
        length = self.config.text_length
        if prompt is not None:
            words = self.text["text_encoder"](prompt.strip(), length)
            length = self._engine.padded(len(words))
        return self._cache_bytes(num_clips, length, is_guided)

    def _cache_bytes(self, num_clips: int, text_len: int, is_guided: bool) -> int:
        total = (self.num_frames(num_clips) - 1) // STRIDE + 1
        size = self._positions(total, text_len)
        body = nnx.merge(*self._split["language_model"]).body
        made = jax.eval_shape(lambda: body.init_cache(batch=1 + is_guided, size=size))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))

    def _positions(self, frames: int, text_len: int) -> int:
        """Of the language model for so many semantic frames, or for those that it sees of them."""
        tokens = self.parts["language_model"].cfg.frames
        seen = written_frames(tokens, frames, self.config.max_segments)
        return NUM_PREFIX + text_len + tokens.count(seen) + 2 * seen

    def _sampling(self, **changes: Any) -> LanDiffSamplingConfig:
        known = vars(self.config.sampling)
        if unknown := sorted(changes.keys() - known.keys()):
            raise UserError(f"there is no option {unknown[0]}; there are {', '.join(known)}")
        given = options.check(**changes)
        if {"top_k", "top_p"} <= given.keys():
            raise UserError("top_k and top_p exclude each other; give one of them")
        other = {"top_k": {"top_p": None}, "top_p": {"top_k": None}}
        off = next((other[name] for name in other if name in given), {})
        sampling = dataclasses.replace(self.config.sampling, **off, **given)
        cfg, schedule = self.parts["language_model"].cfg, self.parts["denoiser"].cfg.schedule
        if (sampling.top_k or 1) > cfg.body.vocab_size:
            raise UserError(f"top_k is at most {cfg.body.vocab_size}, got {sampling.top_k}")
        if sampling.history_noise >= schedule.num_timesteps:
            raise UserError(
                f"history_noise must be below the {schedule.num_timesteps} timesteps, got "
                f"{sampling.history_noise}"
            )
        try:
            subsampled_time_grid(sampling.num_inference_steps, schedule.num_timesteps)
        except ValueError as error:
            raise UserError(str(error)) from error
        if self._shelf is not None:
            there = stages(sampling.carry)
            shelf.check_room(self._shelf.sizes, jax.local_devices(), offload=True, stages=there)
        return sampling

    def _check_length(self, frames: int, text_len: int, sampling: LanDiffSamplingConfig) -> None:
        """Refuses a video that the language model has no positions, or the device no room for."""
        size = self._positions(frames, text_len)
        most = self.parts["language_model"].cfg.body.max_seq_len
        if size > most:
            raise UserError(
                f"{sampling.num_clips} clips are {size} positions of the language model, which has "
                f"{most}; ask for fewer, or set max_segments in {CONFIG_FILE}"
            )
        is_guided = sampling.guidance_scale != 1
        needed = self._cache_bytes(sampling.num_clips, text_len, is_guided)
        unread = 0 if self._shelf is None else self._shelf.sizes["language_model"]
        room = memory.available(jax.local_devices()[0])
        if room is not None and needed + unread > room[0]:
            beside = f" beside {unread / 1e9:.3g} GB of its weights" if unread else ""
            raise UserError(
                f"the language model needs {needed / 1e9:.3g} GB for what it has written of "
                f"{sampling.num_clips} clips{beside}, and {room[0] / 1e9:.3g} GB are free: ask for "
                f"fewer, or set max_segments in {CONFIG_FILE}"
            )

    def _read_prompts(self, prompt: Any, *, may_be_empty: bool) -> list[str]:
        if isinstance(prompt, list):
            prompt = ["" if one is None else one for one in prompt]
        prompts = [x.strip() for x in options.check_prompts("" if prompt is None else prompt)]
        if not may_be_empty and not all(prompts):
            raise UserError("the prompt is empty; say what to show")
        return prompts

    def _ids(self, prompt: str) -> Prompt:
        """Ids of a prompt for the language model and for the painter, with one warning of a cut."""
        words, length = self.text["text_encoder"], self.parts["denoiser"].cfg.dit.text_len
        painter = self.text.get("painter_text", words)
        readers = {
            "language model": (words, self.config.text_length),
            "painter": (painter, length),
        }
        written, painted = read(prompt, readers)
        return Prompt(written, [*painted, *[painter.pad_id] * (length - len(painted))])

    def fit_frame(self, frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "y x 3"]:
        """The middle part of the model's shape, in its size; a frame of that size as it is."""
        return middle(frame, self.frame_size)

    def given_frames(self, count: int) -> int:
        """How many of `count` frames a video can go on from: the last 1, 9, 17 .. of them."""
        most = STRIDE * (self.config.prefix_latents - 1) + 1
        return min(count - (count - 1) % (2 * STRIDE), most - (most - 1) % (2 * STRIDE))

    def read_end(
        self, path: str | os.PathLike, progress: Progress | None = None
    ) -> tuple[UInt8[np.ndarray, "g y x 3"], int]:
        """The last frames of a file, as many as a video goes on from, and how many it has.

        It is read at the model's rate; of a long file no more than the end is held.

        Args:
          progress: Called as `("frames read", done, total)`.

        Raises:
          UserError: The file cannot be read.
        """
        most, fps = self.given_frames(10**6), self.config.fps
        last, count = read_last(path, most, fps=fps, fit=self.fit_frame, progress=progress)
        return last[-self.given_frames(count) :], count

    def _fit_video(self, array: UInt8[np.ndarray, "f h w 3"]) -> UInt8[np.ndarray, "f y x 3"]:
        if array.shape[0] % (2 * STRIDE) != 1:
            raise UserError(
                f"a video has 1, {2 * STRIDE + 1}, {4 * STRIDE + 1} .. frames here "
                f"({2 * STRIDE} m + 1), so that none is lost, got {array.shape[0]}"
            )
        return np.stack([self.fit_frame(frame) for frame in array])

    def _read_given(self, image: Any, video: Any) -> UInt8[np.ndarray, "g y x 3"] | None:
        """Frames to go on from, in the size of the model."""
        if (given := checks.given_frames(image, video)) is None:
            return None
        self._check_features()
        given = self._fit_video(given)
        if len(given) != self.given_frames(len(given)):
            raise UserError(
                f"a video goes on from at most {self.given_frames(10**6)} frames, got "
                f"{len(given)}; give its last ones"
            )
        return given

    def _check_features(self) -> None:
        if self.parts.get("features") is None:
            raise UserError(
                "this model cannot read frames: it has no encoder of features (python -m convert "
                "landiff takes it by --theia)"
            )

    def stream(
        self,
        prompt: Any = None,
        *,
        image: UInt8[np.ndarray, "h w 3"] | None = None,
        video: UInt8[np.ndarray, "g h w 3"] | None = None,
        seed: int | Sequence[int] = 0,
        progress: Progress | None = None,
        callback_on_step_end: calls.OnStep | None = None,
        **changes: Any,
    ) -> Iterator[Clip]:
        """The clips of the videos, each as soon as it is painted, one video after the other.

        The first clip of a video has a window's frames, each other fewer (see `num_frames`). Sample
        i of a call with `seed=s` is what it is alone with `seed=s + i`, bit for bit.

        Args:
          prompt: What to show, one or several; with an image or a video it may be empty.
          image: The first frame; of another shape its middle is taken.
          video: The first frames instead: 1, 9, 17 or 25 in the release. Given frames come back as
            they were, in the model's size, and their semantic tokens are what the language model
            goes on from.
          seed: Of all randomness, 0 to 2**32 - 1; or a seed for each video.
          progress: Called as `("steps", done, total)`, of the steps of all windows.
          callback_on_step_end: As for the pipeline; of a window's latents, one video at a time.
          changes: The fields of `LanDiffSamplingConfig`; None for the model's default.

        Raises:
          UserError: An option is impossible, or something does not fit in memory.
        """
        prompts = self._read_prompts(prompt, may_be_empty=image is not None or video is not None)
        seeds = options.check_seeds(seed, len(prompts))
        sampling, given = self._sampling(**changes), self._read_given(image, video)
        ids = [self._ids(one) for one in prompts]
        total = (self.num_frames(sampling.num_clips) - 1) // STRIDE + 1
        self._check_length(
            total, max(self._engine.padded(len(one.written)) for one in ids), sampling
        )
        known = 0 if given is None else (len(given) - 1) // STRIDE + 1
        plan = self._plan(total, known)
        watch = self._watch(progress, callback_on_step_end)
        made = self._engine.generate(ids, seeds, sampling, given, plan, watch)
        return (Clip(*one) for one in made)

    def encode(self, video: Any) -> Int[np.ndarray, " n"]:
        """Semantic tokens of a video of 8 m + 1 frames, from 0 on; a path is read at `fps`.

        Raises:
          UserError: It is no such video, or the model has no encoder of features.
        """
        self._check_features()
        frames = read_frames(video, fps=self.config.fps)
        return self._engine.encode(self._fit_video(frames))

    def decode(self, tokens: Int[np.ndarray, " n"], prompt: Any = "", **arguments: Any):
        """Paints semantic tokens: what `decode_stream` gives, gathered; see there."""
        return whole_videos(self.decode_stream(tokens, prompt, **arguments))

    def decode_stream(
        self,
        tokens: Int[np.ndarray, " n"],
        prompt: Any = "",
        *,
        seed: int | Sequence[int] = 0,
        progress: Progress | None = None,
        callback_on_step_end: calls.OnStep | None = None,
        **changes: Any,
    ) -> Iterator[Clip]:
        """The clips of semantic tokens.

        Args:
          tokens: Of an odd number of semantic frames, as `encode` gives them.
          prompt: What the painter is told besides, one or several for as many videos.
          seed, progress, callback_on_step_end, changes: As of `stream`, but for those of the
            language model and the number of clips.

        Raises:
          UserError: The tokens are no video, or an option is impossible, or of their writing.
        """
        check_painting(changes)
        cfg: SemanticTokenizerConfig = self.parts["semantic_tokenizer"].cfg
        codes = checks.as_array(tokens, "semantic tokens are whole numbers [n]")
        if codes.ndim != 1 or codes.dtype.kind not in "iu":
            raise UserError(
                f"semantic tokens are whole numbers [n], got {codes.dtype} {codes.shape}"
            )
        try:
            check_codes(codes, cfg.codebook_size)
        except ValueError as error:
            raise UserError(str(error)) from error
        plan = self._token_plan(len(codes))
        prompts = self._read_prompts(prompt, may_be_empty=True)
        seeds, sampling = options.check_seeds(seed, len(prompts)), self._sampling(**changes)
        ids = [self._ids(one) for one in prompts]
        cuts = np.cumsum([cfg.frames.count(n) for n in cfg.frames.segments(plan[-1].stop)])[:-1]
        segments = [part[None].astype(np.int32) for part in np.split(codes, cuts)]
        written = [segments] * len(prompts)
        watch = self._watch(progress, callback_on_step_end)
        made = self._engine.show(ids, written, seeds, sampling, None, plan, watch)
        return (Clip(*one) for one in made)

    def reconstruct(self, video: Any, prompt: Any = "", **arguments: Any):
        """A video (of `encode`) through its semantic tokens and back, uint8 `[1, f, h, w, 3]`."""
        return self.decode(self.encode(video), prompt, **arguments)

    def _token_plan(self, num_tokens: int) -> tuple[Window, ...]:
        try:
            total = self.parts["semantic_tokenizer"].cfg.frames.num_frames(num_tokens)
        except ValueError as error:
            raise UserError(str(error)) from error
        if total % 2 == 0:
            raise UserError(
                f"{num_tokens} tokens are {total} semantic frames; latents are decoded in pairs "
                "behind the first one, so want an odd number"
            )
        return self._plan(total, 0)

    def _plan(self, total: int, known: int) -> tuple[Window, ...]:
        size = self.parts["denoiser"].cfg.dit.num_frames
        try:
            return windows(total, size, self.config.prefix_latents, known)
        except ValueError as error:
            raise UserError(str(error)) from error
