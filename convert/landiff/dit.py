"""LanDiff's denoiser: the main transformer of CogVideoX-2b, and the control branch of LanDiff.

Written against the release's two files `mp_rank_00_model_states.pt`, whose "module" holds the keys:
CogVideoX's own below `model.diffusion_model.` (557), LanDiff's below
`model.control_model.diffusion_model.` (404), perhaps with the main keys again, below
`model.main_model.diffusion_model.`, and with a copy of the semantic tokenizer. Either may hold what
else the engine is made of, its autoencoder and text encoder among it, which lie in files of their
own too.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.engine import found
from convert.engine.plan import Kind, below
from convert.engine.rules import (
    CONV1X1,
    CONV2D,
    DROP0,
    LINEAR,
    Rule,
    Rules,
    Skip,
    affine,
    dense,
    prefixed,
)
from dicode_jax.errors import UserError
from dicode_jax.models.landiff.dit import Denoiser, DenoiserConfig, DiTConfig, make_base
from dicode_jax.models.landiff.semantic import UpsamplerConfig

ALONE = "model.diffusion_model."  # of CogVideoX's own file
MAIN, CONTROL = "main_model.diffusion_model.", "control_model.diffusion_model."
TOKENIZER = "semantic_conditioner.semantic_model.model."
SEMANTIC = "semantic_conditioner."
BESIDE = Skip(
    r"(?:model\.)?(?:first_stage_model|conditioner|denoiser|sampler|loss_fn)\..*",
    why="a part of the engine beside the transformer, read of its own file where it has weights",
)

# What shapes do not tell.
NUM_FRAMES, TEXT_LEN, GRID = 13, 226, (30, 45)


def join(main: Mapping[str, Any], control: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of both files as those of one model.

    Main keys of the second file are left out where the first has them, as the release does.
    """
    out = {MAIN + key: value for key, value in below(main, ALONE).items()}
    out |= {key: value for key, value in main.items() if not key.startswith(ALONE)}
    for key, value in control.items():
        name = key.removeprefix("model.")
        if not (name.startswith(MAIN) and name in out):
            out[name] = value
    return out


def _layer(layer: str, number: str, target: str) -> Rules:
    """One layer; its modulation and the norms of its heads lie elsewhere, by its number."""
    block, mix = rf"{layer}transformer\.layers\.{number}", rf"{layer}mixins\.adaln_layer"
    return (
        *dense(rf"{mix}\.adaLN_modulations\.{number}\.1", f"{target}.modulation.linear"),
        *affine(rf"{mix}\.query_layernorm_list\.{number}", f"{target}.attn.q_norm"),
        *affine(rf"{mix}\.key_layernorm_list\.{number}", f"{target}.attn.k_norm"),
        *affine(rf"{block}\.input_layernorm", f"{target}.attn_norm"),
        *dense(rf"{block}\.attention\.query_key_value", f"{target}.attn.qkv"),
        *dense(rf"{block}\.attention\.dense", f"{target}.attn.out"),
        *affine(rf"{block}\.post_attention_layernorm", f"{target}.mlp_norm"),
        *dense(rf"{block}\.mlp\.dense_h_to_4h", f"{target}.mlp.up"),
        *dense(rf"{block}\.mlp\.dense_4h_to_h", f"{target}.mlp.down"),
    )


def _embed(source: str, target: str) -> Rules:
    return (
        *dense(rf"{source}mixins\.patch_embed\.proj", f"{target}.patch", CONV2D),
        *dense(rf"{source}mixins\.patch_embed\.text_proj", f"{target}.text"),
        *dense(rf"{source}time_embed\.0", f"{target}.time.first"),
        *dense(rf"{source}time_embed\.2", f"{target}.time.last"),
        Rule(rf"{source}mixins\.pos_embed\.pos_embedding", f"{target}.positions", DROP0),
    )


def _res_block(source: str, target: str) -> Rules:
    return (
        *affine(rf"{source}\.norm1", f"{target}.norm1"),
        *dense(rf"{source}\.conv1", f"{target}.conv1", CONV2D),
        *affine(rf"{source}\.norm2", f"{target}.norm2"),
        *dense(rf"{source}\.conv2", f"{target}.conv2", CONV2D),
        *dense(rf"{source}\.nin_shortcut", f"{target}.shortcut", CONV1X1),
    )


def base_rules(cfg: DiTConfig, num_lower: int) -> Rules:
    """The table of CogVideoX's own keys without a prefix, for a `DiT` of so many lower blocks."""
    lower = f"({'|'.join(map(str, range(num_lower)))})"
    numbers = range(num_lower, cfg.num_layers)
    upper = [_layer("", str(i), f"upper_blocks.{i - num_lower}") for i in numbers]
    return (
        *_embed("", "embed"),
        *_layer("", lower, "lower_blocks.{0}"),
        *(rule for layer in upper for rule in layer),
        *affine(r"transformer\.final_layernorm", "head.norm"),
        *affine(r"mixins\.final_layer\.norm_final", "head.last_norm"),
        *dense(r"mixins\.final_layer\.adaLN_modulation\.1", "head.modulation.linear"),
        *dense(r"mixins\.final_layer\.linear", "head.linear"),
    )


def rules(cfg: DenoiserConfig) -> Rules:
    """The table of the keys as `join` gives them."""
    control = re.escape(CONTROL)
    semantic = control + re.escape(SEMANTIC)
    up, ours = rf"{semantic}upsample_model", "semantic"
    return (
        *prefixed(base_rules(cfg.dit, cfg.control_layers), MAIN, "dit."),
        *_embed(control, "control.embed"),
        *_layer(control, r"(\d+)", "control.blocks.{0}.layer"),
        Rule(
            rf"{control}mixins\.adaln_layer\.zero_linears\.(\d+)\.weight",
            "control.blocks.{0}.zero.kernel",
            LINEAR,
        ),
        Skip(rf"{control}transformer\.final_layernorm\..*", why="its result is not used"),
        *dense(rf"{up}\.conv_(in|out)", f"{ours}.conv_{{0}}", CONV2D),
        *_res_block(rf"{up}\.mid\.block_(1|2)", f"{ours}.middle.block{{0}}"),
        *_res_block(rf"{up}\.up\.(\d+)\.block\.(\d+)", f"{ours}.levels.{{0}}.blocks.{{1}}"),
        *dense(rf"{up}\.up\.(\d+)\.upsample\.conv", f"{ours}.levels.{{0}}.resample.conv", CONV2D),
        *affine(rf"{up}\.norm_out", f"{ours}.norm_out"),
        *dense(rf"{semantic}conv_out", f"{ours}.to_latents", CONV2D),
        Skip(rf"{control}{re.escape(TOKENIZER)}.*", why="a copy of the semantic tokenizer"),
        BESIDE,
    )


def unused_norm(cfg: DenoiserConfig) -> dict[str, np.ndarray]:
    """What the original stores and does not use, as it is before training."""
    name, d = f"model.{CONTROL}transformer.final_layernorm", cfg.dit.embed_dim
    return {f"{name}.weight": np.ones(d, np.float32), f"{name}.bias": np.zeros(d, np.float32)}


def find_config(source: Mapping[str, Any]) -> found.Found:
    """The configuration by keys and shapes, as `join` gives them.

    Raises:
      UserError: They are not those of such a model.
    """
    main, control = found.Keys(source, MAIN), found.Keys(source, CONTROL)
    for keys, what in ((main, "CogVideoX's transformer"), (control, "LanDiff's control branch")):
        if not keys.any("transformer.layers.0."):
            raise UserError(
                f"the checkpoints lack {what}: want keys below {keys.prefix}transformer.layers."
            )
    d, channels, patch, _ = main.shape("mixins.patch_embed.proj.weight", 4)
    mlp_dim = main.shape("transformer.layers.0.mlp.dense_h_to_4h.weight", 2)[0]
    positions = main.shape("mixins.pos_embed.pos_embedding", 3)[1]
    rows, columns = GRID
    if positions != TEXT_LEN + NUM_FRAMES * rows * columns:
        raise UserError(
            f"{MAIN}mixins.pos_embed.pos_embedding has {positions} positions, want {TEXT_LEN} of "
            f"text and {NUM_FRAMES} frames of {rows}x{columns}"
        )
    head_dim = main.shape("mixins.adaln_layer.query_layernorm_list.0.weight", 1)[0]
    told = {
        "channels": channels,
        "patch_size": patch,
        "embed_dim": d,
        "num_layers": main.count("transformer.layers."),
        "num_heads": found.heads(d, head_dim, MAIN),
        "mlp_dim": None if mlp_dim == 4 * d else mlp_dim,
        "time_dim": main.shape("time_embed.0.weight", 2)[0],
        "text_dim": main.shape("mixins.patch_embed.text_proj.weight", 2)[1],
    }
    assumed = {"height": rows * patch, "width": columns * patch}
    dit = found.found(DiTConfig, told, assumed)
    told = {
        "dit": dit,
        "control_layers": control.count("transformer.layers."),
        "upsampler": _find_upsampler(control.below(SEMANTIC + "upsample_model.")),
    }
    return found.found(DenoiserConfig, told)


def _find_upsampler(keys: found.Keys) -> found.Found:
    levels = range(keys.count("up."))
    told = {
        "feature_dim": keys.shape("conv_in.weight", 4)[1],
        "channels": tuple(keys.shape(f"up.{i}.block.0.conv1.weight", 4)[0] for i in levels),
        "num_res_blocks": keys.count("up.0.block."),
        "hidden_dim": keys.shape("conv_out.weight", 4)[0],
    }
    return found.found(UpsamplerConfig, told)


KIND = Kind(Denoiser, DenoiserConfig, lambda x: DenoiserConfig(**x), lambda source, cfg: rules(cfg))
BASE = Kind(
    make_base,
    DiTConfig,
    lambda x: DiTConfig(**x),
    lambda source, cfg: (*prefixed(base_rules(cfg, cfg.num_layers), ALONE), BESIDE),
)
