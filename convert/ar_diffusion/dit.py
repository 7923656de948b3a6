"""The denoiser of AR-Diffusion: `DiT_crossattn`, alone or as `BaseModel` stores it.

Written against the release's `src.ardiff.base.BaseModel` (305 keys, 445 with rotary positions); its
configurations for Sky call the same classes `src.gen_model`. Which variant a checkpoint holds is
told by its keys: `class_emb` or `context_emb`, `pos_embed` or `rotary_emb.freqs`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.engine import found
from convert.engine.plan import Kind, below
from convert.engine.rules import Rule, Rules, Skip, affine, defaulted, dense, prefixed, to_numpy
from convert.parts import buffers
from dicode_jax.diffusion.schedules import PERSISTENT_BUFFERS, NoiseSchedule
from dicode_jax.errors import UserError
from dicode_jax.models.ar_diffusion.dit import (
    Denoiser,
    DenoiserConfig,
    DiT,
    DiTConfig,
    position_table,
)
from dicode_jax.nn.rotary import rotary_frequencies

NETWORK, DIFFUSION = "diffusion_model.model.", "diffusion_model."
BUFFERS = (*PERSISTENT_BUFFERS, "logvar")
CONTEXTS = ("context_emb", "class_emb")
TARGETS = ("src.ardiff.", "src.gen_model.")  # the same classes, before and after they were moved

RULES: Rules = (
    *dense(r"x_embedder", "token_embed"),
    *dense(r"c_embedder", "context_embed"),
    *dense(r"t_embedder\.mlp\.0", "time_embed.first"),
    *dense(r"t_embedder\.mlp\.2", "time_embed.last"),
    *dense(r"blocks\.(\d+)\.attn\.qkv", "blocks.{0}.attn.qkv"),
    *affine(r"blocks\.(\d+)\.attn\.(q|k)_norm", "blocks.{0}.attn.{1}_norm"),
    *dense(r"blocks\.(\d+)\.attn\.proj", "blocks.{0}.attn.out"),
    *dense(r"blocks\.(\d+)\.mlp\.fc1", "blocks.{0}.mlp.up"),
    *dense(r"blocks\.(\d+)\.mlp\.fc2", "blocks.{0}.mlp.down"),
    *dense(r"blocks\.(\d+)\.adaLN_modulation\.1", "blocks.{0}.modulation.linear"),
    *dense(r"final_layer\.1", "head"),
    Skip(r"pos_embed", why="fixed sinusoids, which the model computes"),
    Skip(r"rotary_emb\.freqs", why="fixed frequencies, which the model computes"),
    Skip(r"blocks\.\d+\.attn\.rotary_emb\.freqs", why="the same frequencies under another name"),
)

_SIZES = {
    "num_frames": ("num_frames", 16),
    "n_token_per_frame": ("num_tokens", 32),
    "in_channels": ("channels", 4),
    "hidden_size": ("embed_dim", 1152),
    "depth": ("num_layers", 28),
    "num_heads": ("num_heads", 16),
    "context_dim": ("context_dim", 768),
    "context_token": ("context_len", 77),
    "use_rotary_emb": ("rotary", False),
    "qk_norm": ("qk_norm", False),
}
_OTHER = {"mlp_ratio", "learn_sigma", "merge_mode", "causal_attn_mode", "class_dropout_prob"}


def dit_config(options: Mapping[str, Any]) -> DiTConfig:
    """The configuration of the constructor arguments of `DiT_crossattn`.

    Raises:
      ValueError: An option is unknown or not supported.
    """
    options = _params(options, "DiT_crossattn")
    if unknown := sorted(set(options) - set(_SIZES) - _OTHER):
        raise ValueError(f"unknown option(s) of a DiT: {', '.join(unknown)}")
    if options.get("learn_sigma"):
        raise ValueError("learn_sigma is not supported: no released model has it")
    if (mode := options.get("merge_mode", "share_norm")) != "share_norm":
        raise ValueError(f"merge_mode {mode!r} is not supported; released models have share_norm")
    sizes = defaulted(options, _SIZES)
    mlp_dim = int(sizes["embed_dim"] * options.get("mlp_ratio", 4))
    return DiTConfig(
        **sizes,
        mlp_dim=None if mlp_dim == 4 * sizes["embed_dim"] else mlp_dim,
        mask=options.get("causal_attn_mode") or "none",
    )


def denoiser_config(options: Mapping[str, Any]) -> DenoiserConfig:
    """The configuration of the constructor arguments of `BaseModel`.

    Raises:
      ValueError: An option is not supported.
      KeyError: `model_cfg` or `diffusion_cfg` is absent.
    """
    options = _params(options, "BaseModel")
    mode = options.get("condition_mode", "uncond")
    if mode not in ("uncond", "class_cond"):
        raise ValueError(f"condition_mode must be uncond or class_cond, got {mode!r}")
    if not options.get("norm_preprocess", False):
        raise ValueError("norm_preprocess must be True: tokens are unit vectors here")
    num_classes = options["num_class"] if mode == "class_cond" else 0
    return DenoiserConfig(
        dit=dit_config(options["model_cfg"]),
        num_classes=num_classes,
        null="first" if num_classes else "zero",
        schedule=buffers.schedule_from_original(_params(options["diffusion_cfg"], "Diffusion")),
    )


def _params(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The arguments of a `{target, params}` node, or the options themselves."""
    if "target" not in options:
        return options
    target = str(options["target"])
    if not target.startswith(TARGETS) or name not in target.rpartition(".")[2]:
        raise ValueError(f"{target} is no {name} of AR-Diffusion")
    return options.get("params", {})


def denoiser_rules(cfg: DenoiserConfig) -> Rules:
    """The table of a whole `BaseModel`."""
    return (
        Rule(CONTEXTS[bool(cfg.num_classes)], "context"),
        *prefixed(RULES, NETWORK, "dit."),
        *(Skip(rf"diffusion_model\.{name}", why="noise schedule, compared") for name in BUFFERS),
    )


def find_config(
    source: Mapping[str, Any], parameterization: str | None = None, mask: str | None = None
) -> found.Found:
    """The configuration of a `BaseModel` by keys, shapes and its noise schedule.

    Args:
      source: The checkpoint; the tables of its noise are read.
      parameterization: What it predicts, which nothing in it says: "x0" by default, but "v" with
        the noise of the diffusion-forcing baselines.
      mask: See `DiTConfig`; by default "video_temporal_causal", "none" for these baselines.

    Raises:
      UserError: It is no such checkpoint.
    """
    keys = found.Keys(source, NETWORK)
    has_classes = CONTEXTS[1] in source
    if has_classes == (CONTEXTS[0] in source) or not keys.any("x_embedder."):
        raise UserError(
            f"no denoiser of AR-Diffusion: want keys below {NETWORK} and one of "
            f"{' and '.join(CONTEXTS)}"
        )
    *rows, length, width = found.Keys(source).shape(CONTEXTS[has_classes], 2 + has_classes)
    embed_dim, channels = keys.shape("x_embedder.weight", 2)
    mlp_dim = keys.shape("blocks.0.mlp.fc1.weight", 2)[0]
    told = {
        "channels": channels,
        "embed_dim": embed_dim,
        "num_layers": keys.count("blocks."),
        "mlp_dim": None if mlp_dim == 4 * embed_dim else mlp_dim,
        "context_len": length,
        "context_dim": width,
        "rotary": "rotary_emb.freqs" in keys,
        "qk_norm": "blocks.0.attn.q_norm.weight" in keys,
    }
    schedule = _find_schedule(source)
    is_baseline = schedule.linear_start > 5e-4
    assumed: dict[str, Any] = {"mask": mask or ("none" if is_baseline else DiTConfig.mask)}
    assumed |= {"num_frames": 16, "rope_theta": DiTConfig.rope_theta}
    if told["rotary"]:
        told["num_heads"] = found.heads(
            embed_dim, 2 * keys.shape("rotary_emb.freqs", 1)[0], NETWORK
        )
        assumed["num_tokens"] = 32
    else:
        positions = keys.shape("pos_embed", 3)[1]
        if positions % assumed["num_frames"]:
            raise UserError(f"{NETWORK}pos_embed has {positions} positions, no 16 frames of tokens")
        assumed["num_tokens"] = positions // assumed["num_frames"]
        assumed["num_heads"] = DiTConfig.num_heads
    assumed["parameterization"] = parameterization or ("v" if is_baseline else "x0")
    dit = {k: v for k, v in assumed.items() if k != "parameterization"}
    try:
        cfg = DenoiserConfig(
            dit=DiTConfig(**told, **dit),
            num_classes=rows[0] - 1 if rows else 0,
            null="first" if rows else "zero",
            schedule=dataclasses.replace(schedule, parameterization=assumed["parameterization"]),
        )
    except ValueError as error:
        raise UserError(f"the shapes make no model: {error}") from error
    return found.Found(cfg, assumed)


def _find_schedule(source: Mapping[str, Any]) -> NoiseSchedule:
    """The noise by its first and last beta, to six digits."""
    if f"{DIFFUSION}betas" not in source:
        raise UserError(f"the checkpoint has no {DIFFUSION}betas")
    betas = to_numpy(source[f"{DIFFUSION}betas"]).astype(np.float64)
    if betas.ndim != 1 or not 2 <= len(betas) <= buffers.MAX_TIMESTEPS:
        raise UserError(f"{DIFFUSION}betas has shape {betas.shape}, want some thousand numbers")
    first, last = (float(f"{beta:.6g}") for beta in (betas[0], betas[-1]))
    try:
        return NoiseSchedule(num_timesteps=len(betas), linear_start=first, linear_end=last)
    except ValueError as error:
        raise UserError(f"{DIFFUSION}betas: {error}") from error


def check_values(source: Mapping[str, Any], cfg: DenoiserConfig) -> list[str]:
    """One line for each fixed table of a checkpoint that is not the configuration's."""
    schedule = cfg.schedule
    tables = below(source, DIFFUSION)
    if schedule.parameterization == "v":  # the tables do not depend on it in this family
        schedule = dataclasses.replace(schedule, parameterization="x0")
    lines = [f"{DIFFUSION}{line}" for line in buffers.compare(tables, schedule)]
    return lines + check_positions(below(source, NETWORK), cfg.dit, NETWORK)


def check_positions(source: Mapping[str, Any], cfg: DiTConfig, prefix: str = "") -> list[str]:
    """One line for each fixed table of positions that is not the configuration's."""
    lines = []
    for key, want in positions(cfg).items():
        if key not in source:
            continue
        got = to_numpy(source[key])
        tolerance = 1e-5 if got.dtype == np.float32 else 2e-2  # of what was stored in half
        if got.shape != want.shape or not np.allclose(
            got.astype(np.float64), want, rtol=0, atol=tolerance
        ):
            lines.append(f"{prefix}{key}: the positions in the checkpoint are others")
    return lines


def positions(cfg: DiTConfig) -> dict[str, np.ndarray]:
    """Original key -> the fixed table of positions that is stored under it."""
    if not cfg.rotary:
        return {"pos_embed": position_table(cfg.embed_dim, cfg.num_frames * cfg.num_tokens)[None]}
    freqs = rotary_frequencies(cfg.head_dim, theta=cfg.rope_theta)
    names = [f"blocks.{i}.attn.rotary_emb.freqs" for i in range(cfg.num_layers)]
    return dict.fromkeys(["rotary_emb.freqs", *names], freqs)


def stored_tables(cfg: DenoiserConfig) -> dict[str, np.ndarray]:
    """Everything that `BaseModel` stores beside its parameters, under original names."""
    schedule = cfg.schedule
    if schedule.parameterization == "v":
        schedule = dataclasses.replace(schedule, parameterization="x0")
    tables = {DIFFUSION + name: np.asarray(schedule.table(name)) for name in PERSISTENT_BUFFERS}
    tables[f"{DIFFUSION}logvar"] = np.zeros(schedule.num_timesteps, np.float32)
    return tables | {NETWORK + key: table for key, table in positions(cfg.dit).items()}


DIT = Kind(DiT, DiTConfig, dit_config, lambda source, cfg: RULES, check_positions)
KIND = Kind(
    Denoiser,
    DenoiserConfig,
    denoiser_config,
    lambda source, cfg: denoiser_rules(cfg),
    check_values,
)
