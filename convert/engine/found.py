"""Configurations found from the keys and shapes of a checkpoint.

What shapes cannot tell (a dropout rate, an activation) is given by the caller as the released
value, and `Found.assumed` lists it: no default is silent.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dicode_jax.config import without_retired
from dicode_jax.errors import UserError
from dicode_jax.models.autoencoder_kl import AutoencoderKLConfig
from dicode_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from dicode_jax.models.gpt2 import GPT2Config
from dicode_jax.models.unet3d import UNet3DConfig
from dicode_jax.nn.resampler import ResamplerConfig

MAX_BLOCKS = 200  # in a row; the largest models have 126, and each takes a while to set up
HEAD_DIM = 64  # of everything but the wide CLIP towers and where weights tell
_VISION_HEAD_DIMS = {(1280, 32): 80, (1408, 40): 88, (1664, 48): 104, (1792, 56): 112}
"""(width, layers) of the image towers of OpenCLIP whose heads are not 64 wide: H, g, bigG, e."""


class Keys:
    """The shapes of a checkpoint below a prefix; asking for what is not there is a UserError."""

    def __init__(self, source: Mapping[str, Any], prefix: str = ""):
        self._source, self.prefix = source, prefix

    def below(self, prefix: str) -> "Keys":
        """The keys below a further prefix."""
        return Keys(self._source, self.prefix + prefix)

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self._source

    def any(self, start: str) -> bool:
        """Whether some key begins so."""
        return any(key.startswith(self.prefix + start) for key in self._source)

    def shape(self, key: str, ndim: int) -> tuple[int, ...]:
        """The shape of a tensor of `ndim` axes, none of them empty."""
        if key not in self:
            raise UserError(
                f"the checkpoint has no {self.prefix}{key}: {_why(self._source, self.prefix)}"
            )
        shape = tuple(self._source[self.prefix + key].shape)
        if len(shape) != ndim or 0 in shape:
            raise UserError(f"{self.prefix}{key} has shape {shape}, want {ndim} axes")
        return shape

    def count(self, start: str) -> int:
        """How many of `start0.`, `start1.`, ... there are, up to the first gap or `MAX_BLOCKS`."""
        head = self.prefix + start
        found = {k[len(head) :].split(".")[0] for k in self._source if k.startswith(head)}
        count = 0
        while str(count) in found:
            count += 1
        if count > MAX_BLOCKS:
            raise UserError(f"the checkpoint has {count} of {head}*, more than {MAX_BLOCKS}")
        return count


def _why(source: Mapping[str, Any], prefix: str) -> str:
    """What a checkpoint without the keys below a prefix is."""
    if any(key.startswith(("text_model.encoder.", "vision_model.encoder.")) for key in source):
        return "it is CLIP as transformers writes it; take OpenCLIP's own file of the same model"
    below = any(key.startswith(prefix) for key in source)
    if not below and prefix.startswith(("cond_stage_model.", "embedder.")):
        return "CLIP was taken out of it; give CLIP's own file as --clip"
    return "it is of another model"


@dataclasses.dataclass(frozen=True)
class Found:
    """A configuration.

    Attributes:
      config: The dataclass.
      assumed: Field (dotted below parts) -> value, for what the weights do not tell.
    """

    config: Any
    assumed: dict[str, Any]


def found(kind: type, told: Mapping[str, Any], assumed: Mapping[str, Any] | None = None) -> Found:
    """Builds a dataclass from what weights tell; every other field is listed as assumed.

    Args:
      kind: The dataclass.
      told: Field -> value, or `Found` for a part, whose own assumptions are passed on.
      assumed: Released values that differ from the defaults of `kind`.

    Raises:
      UserError: The values do not go together.
    """
    assumed = dict(assumed or {})
    parts = {name: part for name, part in told.items() if isinstance(part, Found)}
    plain = {name: part.config if name in parts else part for name, part in told.items()}
    try:
        plain = without_retired(kind, plain)
        config = kind(**plain, **assumed)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"the shapes make no {kind.__name__}: {error}") from error
    free = {f.name for f in dataclasses.fields(kind)} - set(plain)
    rest = {name: _plain(getattr(config, name)) for name in sorted(free)}
    for name, part in parts.items():
        rest |= {f"{name}.{key}": value for key, value in part.assumed.items()}
    return Found(config, rest)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def heads(width: int, head_dim: int, where: str) -> int:
    """Number of heads, where their width is known.

    Raises:
      UserError: The width is no multiple of it.
    """
    if width % head_dim:
        raise UserError(
            f"{where} is {width} wide, no multiple of heads of {head_dim}: give the configuration "
            "(--yaml, or --config for CLIP)"
        )
    return width // head_dim


def unet(
    keys: Keys,
    *,
    context_rule: str,
    default_fs: int,
    text_context_len: int,
    head_dim: int | None = None,
) -> Found:
    """The video UNet (keys below `model.diffusion_model.`).

    Args:
      context_rule: "per_frame" for DiCoDe, "length" for DynamiCrafter.
      default_fs: Released value.
      text_context_len: Positions of the text tower.
      head_dim: Known from elsewhere; by default from the layer in front, whose heads are eight.
    """
    width, in_channels = keys.shape("input_blocks.0.0.weight", 4)[:2]
    mult, attention, res_blocks, level = [], [], 0, 0
    for i in range(1, keys.count("input_blocks.")):
        stage = keys.below(f"input_blocks.{i}.")
        if "0.op.weight" in stage:
            level += 1
            continue
        if len(mult) == level:
            mult.append(stage.shape("0.out_layers.3.weight", 4)[0] // width)
        res_blocks += level == 0
        if stage.any("1.") and 2**level not in attention:
            attention.append(2**level)
    middle = keys.below("middle_block.")
    block = middle.below("1.transformer_blocks.0.")
    text = block.shape("attn2.to_k.weight", 2)[1]
    front = keys.below("init_attn.0.")
    init_attention = front.any("")
    told: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": keys.shape("out.2.weight", 4)[0],
        "model_channels": width,
        "channel_mult": tuple(mult),
        "num_res_blocks": res_blocks,
        "attention_resolutions": tuple(attention),
        "transformer_depth": middle.count("1.transformer_blocks."),
        "context_dim": text,
        "image_cross_attention": "attn2.to_k_ip.weight" in block,
        "learnable_image_scale": "attn2.alpha" in block,
        "temporal_attention": middle.any("2.transformer_blocks."),
        "init_attention": init_attention,
        "temporal_conv": middle.any("0.temopral_conv."),
        "fs_condition": keys.any("fps_embedding.") or keys.any("framestride_embed."),
        "use_relative_position": middle.any(
            "2.transformer_blocks.0.attn1.relative_position_k.embeddings_table"
        ),
        "use_scale_shift_norm": middle.shape("0.emb_layers.1.weight", 2)[0]
        == 2 * middle.shape("0.out_layers.3.weight", 4)[0],
        "context_rule": context_rule,
        "text_context_len": text_context_len,
    }
    if told["temporal_conv"]:
        told["spatial_aware_conv"] = middle.shape("0.temopral_conv.conv1.2.weight", 5)[3:] != (1, 1)
    assumed = {"default_fs": default_fs}
    if init_attention:
        inner = front.shape("transformer_blocks.0.attn1.to_q.weight", 2)[0]
        context = front.shape("transformer_blocks.0.attn2.to_k.weight", 2)[1]
        told["init_attention_context"] = context != inner
        told["init_attention_heads"] = 8  # fixed in the original
        told["head_dim"] = inner // 8
    else:
        assumed["head_dim"] = HEAD_DIM if head_dim is None else head_dim
    return found(UNet3DConfig, told, assumed)


def autoencoder(keys: Keys, *, resolution: int = 256, scale_factor: float = 0.18215) -> Found:
    """The KL autoencoder (keys below `first_stage_model.`).

    Args:
      resolution: Nominal, released value.
      scale_factor: Released value.
    """
    channels, in_channels = keys.shape("encoder.conv_in.weight", 4)[:2]
    levels = keys.count("encoder.down.")
    mult, attention = [], []
    for i in range(levels):
        down = keys.below(f"encoder.down.{i}.")
        mult.append(down.shape("block.0.conv1.weight", 4)[0] // channels)
        if down.any("attn."):
            attention.append(resolution // 2**i)
    moments = keys.shape("encoder.conv_out.weight", 4)[0]
    z = keys.shape("decoder.conv_in.weight", 4)[1]
    told = {
        "channels": channels,
        "channel_mult": tuple(mult),
        "num_res_blocks": keys.count("encoder.down.0.block."),
        "attn_resolutions": tuple(attention),
        "in_channels": in_channels,
        "out_channels": keys.shape("decoder.conv_out.weight", 4)[0],
        "z_channels": z,
        "embed_dim": keys.shape("post_quant_conv.weight", 4)[1],
        "double_z": moments == 2 * z,
        "resamp_with_conv": levels < 2 or keys.any("encoder.down.0.downsample."),
        "mid_attention": keys.any("encoder.mid.attn_1."),
    }
    return found(
        AutoencoderKLConfig, told, {"resolution": resolution, "scale_factor": scale_factor}
    )


def resampler(
    keys: Keys,
    *,
    head_dim: int = HEAD_DIM,
    video_length: int | None = None,
    image_channels: int | None = None,
) -> Found:
    """A resampler (keys below `image_proj_model.` and the like).

    Args:
      head_dim: Released value.
      video_length: Frames that one image is expanded to, released value.
      image_channels: Channels of the (square) image that its tokens make; None for tokens.
    """
    queries, dim = keys.shape("latents", 3)[1:]
    width, embed = keys.shape("proj_out.weight", 2)[0], keys.shape("proj_in.weight", 2)[1]
    frames = video_length or 1
    inner = keys.shape("layers.0.0.to_q.weight", 2)[0]
    told: dict[str, Any] = {
        "dim": dim,
        "depth": keys.count("layers."),
        "num_heads": heads(inner, head_dim, f"{keys.prefix}layers.0.0.to_q"),
        "num_queries": queries // frames,
        "embed_dim": embed,
        "output_dim": width,
        "ff_mult": _ratio(keys.shape("layers.0.1.1.weight", 2)[0], dim),
        "use_norm_out": keys.any("norm_out."),
        "extra_self_attn": keys.any("self_attn_layers."),
        "extra_output_proj": keys.any("final_proj_out.") and image_channels is None,
        "output_shape": None,
    }
    if image_channels is not None:
        if image_channels < 1:
            raise UserError(f"{keys.prefix}* makes an image, and the UNet has no channels for one")
        pixels = keys.shape("final_proj_out.weight", 2)[0] * queries // image_channels
        side = math.isqrt(pixels)
        told["output_shape"] = (side, side, image_channels)
    return found(ResamplerConfig, told, {"head_dim": head_dim, "video_length": video_length})


def clip_vision(keys: Keys, given: CLIPVisionConfig | None = None) -> Found:
    """An image tower (keys below `visual.`).

    Args:
      given: Its heads and activation are taken, and its `mlp_ratio`, which may have fewer digits.
        By default the heads are those of OpenCLIP's model of this size, the activation exact GELU.
    """
    width, _, patch, _ = keys.shape("conv1.weight", 4)
    patches = keys.shape("positional_embedding", 2)[0] - 1
    told = {
        "image_size": math.isqrt(max(patches, 0)) * patch,
        "patch_size": patch,
        "embed_dim": width,
        "output_dim": keys.shape("proj", 2)[1] if "proj" in keys else None,
    }
    return _tower(CLIPVisionConfig, keys, told, given)


def clip_text(keys: Keys, given: CLIPTextConfig | None = None) -> Found:
    """A text tower; `given` as of `clip_vision`."""
    vocab, width = keys.shape("token_embedding.weight", 2)
    told = {
        "max_seq_len": keys.shape("positional_embedding", 2)[0],
        "vocab_size": vocab,
        "embed_dim": width,
        "output_dim": keys.shape("text_projection", 2)[1],
    }
    return _tower(CLIPTextConfig, keys, told, given)


def _tower(kind: type, keys: Keys, told: dict[str, Any], given: Any) -> Found:
    """A tower of CLIP, of which what is its own is `told`."""
    width, layers = told["embed_dim"], keys.count("transformer.resblocks.")
    wide = keys.shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    told |= {"num_layers": layers, "mlp_ratio": _ratio(wide, width, given and given.mlp_ratio)}
    if given is not None:
        head_dim, activation = given.embed_dim // given.num_heads, given.activation
    else:
        head_dims = _VISION_HEAD_DIMS if kind is CLIPVisionConfig else {}
        head_dim, activation = head_dims.get((width, layers), HEAD_DIM), "gelu"
    number = heads(width, head_dim, f"{keys.prefix}transformer")
    return found(kind, told, {"num_heads": number, "activation": activation})


def gpt2(keys: Keys, given: GPT2Config | None = None) -> Found:
    """A GPT-2 (keys below `transformer.`).

    Args:
      given: Tells the width of the heads; it is the same in all published sizes.
    """
    vocab, width = keys.shape("wte.weight", 2)
    wide = keys.shape("h.0.mlp.c_fc.weight", 2)[1]
    told = {
        "kind": "gpt2",
        "num_layers": keys.count("h."),
        "embed_dim": width,
        "max_seq_len": keys.shape("wpe.weight", 2)[0],
        "vocab_size": vocab,
        "mlp_dim": None if wide == 4 * width else wide,
    }
    head_dim = HEAD_DIM if given is None else given.embed_dim // given.num_heads
    number = heads(width, head_dim, f"{keys.prefix}wte")
    released = {"num_heads": number, "dropout": 0.1}
    return found(GPT2Config, told, released)


def differences(kind: str, ours: Any, given: Any, assumed: Mapping[str, Any]) -> list[str]:
    """Where a given configuration contradicts what the weights tell.

    Args:
      kind: For the lines, "the YAML".
      ours: The configuration that was found, a dataclass.
      given: The same dataclass.
      assumed: Fields of `ours` that the weights do not tell, which may differ.

    Returns:
      One line each, sorted.
    """
    left, right = _flat(dataclasses.asdict(ours)), _flat(dataclasses.asdict(given))
    return [
        f"{name}: {left.get(name)} by the weights, {right.get(name)} by {kind}"
        for name in sorted(set(left) | set(right))
        if left.get(name) != right.get(name)
        and not any(name == free or name.startswith(f"{free}.") for free in assumed)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def _ratio(wide: int, narrow: int, given: float | None = None) -> float:
    """A factor that gives the wider of two widths, `given` where that one does."""
    if given is not None and int(narrow * given) == wide:
        return given
    ratio = wide / narrow
    return ratio if int(narrow * ratio) == wide else math.nextafter(ratio, math.inf)
