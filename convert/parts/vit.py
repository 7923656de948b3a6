"""Vision transformers under the names that transformers' `ViTModel` writes.

The pooler is skipped: nothing here reads it.
"""

from convert.engine import found
from convert.engine.rules import CONV2D, DROP0, Layout, Rule, Rules, Skip, affine, dense
from dicode_jax.errors import UserError
from dicode_jax.models.vit import ViTConfig

HEAD_DIM = 64
_LAYER, _OURS = r"encoder\.layer\.(\d+)", "blocks.{0}"

RULES: Rules = (
    Rule(r"embeddings\.cls_token", "class_embed", Layout("drop01", drop=(0, 1))),
    Rule(r"embeddings\.position_embeddings", "position_embed", DROP0),
    *dense(r"embeddings\.patch_embeddings\.projection", "patch_embed", CONV2D),
    *affine(rf"{_LAYER}\.layernorm_before", f"{_OURS}.attn_norm"),
    *dense(rf"{_LAYER}\.attention\.attention\.query", f"{_OURS}.attn.q"),
    *dense(rf"{_LAYER}\.attention\.attention\.key", f"{_OURS}.attn.k"),
    *dense(rf"{_LAYER}\.attention\.attention\.value", f"{_OURS}.attn.v"),
    *dense(rf"{_LAYER}\.attention\.output\.dense", f"{_OURS}.attn.out"),
    *affine(rf"{_LAYER}\.layernorm_after", f"{_OURS}.mlp_norm"),
    *dense(rf"{_LAYER}\.intermediate\.dense", f"{_OURS}.mlp.up"),
    *dense(rf"{_LAYER}\.output\.dense", f"{_OURS}.mlp.down"),
    *affine(r"layernorm", "final_norm"),
    Skip(r"pooler\..*|embeddings\.mask_token", why="not part of the vectors of patches"),
)


def find_config(keys: found.Keys) -> found.Found:
    """Sizes by shapes; heads are 64 wide.

    Raises:
      UserError: It is no such model.
    """
    width, _, patch, _ = keys.shape("embeddings.patch_embeddings.projection.weight", 4)
    patches = keys.shape("embeddings.position_embeddings", 3)[1] - 1
    side = round(patches**0.5)
    if side * side != patches:
        raise UserError(f"{keys.prefix}embeddings.position_embeddings is of no square image")
    told = {
        "image_size": side * patch,
        "patch_size": patch,
        "embed_dim": width,
        "num_layers": keys.count("encoder.layer."),
        "mlp_dim": keys.shape("encoder.layer.0.intermediate.dense.weight", 2)[0],
    }
    number = found.heads(width, HEAD_DIM, f"{keys.prefix}embeddings")
    return found.found(ViTConfig, told, {"num_heads": number})
