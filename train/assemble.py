"""Puts the trained parts together into a pipeline folder.

python -m train.assemble --tokenizer runs/tokenizer/model --lm runs/ar/model --out OUT
"""

import dataclasses
import pathlib
import sys
from typing import Literal

import tyro

from dicode_jax.errors import UserError
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
from dicode_jax.models.dicode.decoder import ClipDecoder, ClipDecoderConfig
from dicode_jax.models.dicode.tokenizer import DeepTokenizer, DeepTokenizerConfig
from dicode_jax.nn.rngs import ShapeRngs
from dicode_jax.pipelines.dicode import DiCoDePipeline, PipelineConfig
from dicode_jax.runtime.interrupts import exit_status, polite_signals
from dicode_jax.storage import model_card, weights
from dicode_jax.storage.folders import check_folder
from dicode_jax.text.gpt import TextTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Puts the trained parts together into a pipeline folder.

    Attributes:
      tokenizer: `model` folder of a tokenizer run.
      lm: `model` folder of a language-model run.
      out: The pipeline folder to write.
      dtype: Storage type of the weights.
      pipeline: Frame size, rate, text length and sampling defaults.
    """

    tokenizer: pathlib.Path
    lm: pathlib.Path
    out: pathlib.Path
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    pipeline: PipelineConfig = PipelineConfig()


def assemble(args: Arguments) -> DiCoDePipeline:
    """Loads the parts, writes the folder and returns the pipeline.

    Raises:
      UserError: A part is missing or damaged, or `out` is in the way; a model that was written here
        is replaced, but for its card.
    """
    sources = (args.tokenizer, args.lm)
    check_folder(args.out, sources=sources, overwrite=True, keep=[model_card.CARD_FILE])

    def load(folder, kind, config_type):
        return weights.load_module(folder, lambda c: kind(c, rngs=ShapeRngs()), config_type)[0]

    pipe = DiCoDePipeline(
        tokenizer=load(args.tokenizer / "tokenizer", DeepTokenizer, DeepTokenizerConfig),
        decoder=load(args.tokenizer / "decoder", ClipDecoder, ClipDecoderConfig),
        language_model=load(args.lm, DiCoDeLM, DiCoDeLMConfig),
        text=TextTokenizer.from_file(args.lm),
        config=args.pipeline,
    )
    pipe.save_pretrained(args.out, dtype=args.dtype)
    return pipe


if __name__ == "__main__":
    try:
        with polite_signals():
            arguments = tyro.cli(Arguments, prog="python -m train.assemble")
            assemble(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interrupt:
        sys.exit(exit_status(interrupt))
    print(f"wrote {arguments.out}")
