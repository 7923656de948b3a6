"""AR-Diffusion on UCF-101, with its classes. Not measured.

The class of a video is the folder that it lies in, by the names of the data set's list.

python -m train.ar_diffusion --config configs/ar_diffusion/ucf101_class_dit.py \
    --vae runs/vae/model --class-list classInd.txt --workdir runs/dit
"""

import dataclasses

from configs.ar_diffusion import released_dit
from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig


def get_config() -> DiTTrainConfig:
    config = released_dit.of_set("ucf101")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=101, null="own"),
        context_dropout=0.2,
        class_of="folder",
    )
