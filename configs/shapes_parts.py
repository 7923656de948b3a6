"""Sizes that the configs of the small system share."""

from dicode_jax.models.clip import CLIPVisionConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizerConfig
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.stages.dicode.representation_model import RepresentationConfig

TOKEN_DIM = 32

TOKENIZER = DeepTokenizerConfig(
    vision=CLIPVisionConfig(
        image_size=64, patch_size=8, embed_dim=128, num_layers=3, num_heads=4, output_dim=None
    ),
    resampler=ResamplerConfig(
        dim=128, depth=2, head_dim=32, num_heads=4, embed_dim=128, output_dim=TOKEN_DIM
    ),
    preprocess="plain",
)

LATENT_HEAD = ResamplerConfig(
    dim=128,
    depth=2,
    head_dim=32,
    num_heads=4,
    num_queries=64,
    embed_dim=TOKEN_DIM,
    output_dim=128,
    output_shape=(8, 8, 16),
)


TOKEN_PATH = ResamplerConfig(
    dim=128,
    depth=3,
    head_dim=32,
    num_heads=4,
    num_queries=16,
    embed_dim=TOKEN_DIM + 2,
    output_dim=TOKEN_DIM,
)


def representation(
    head: ResamplerConfig, path: ResamplerConfig | None = None
) -> RepresentationConfig:
    """The tokenizer with a head, probed for colour, shape and background."""
    return RepresentationConfig(tokenizer=TOKENIZER, head=head, path=path, probe_classes=(8, 4, 4))
