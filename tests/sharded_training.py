"""Tiny stages of both kinds, and their losses on a mesh: run in processes with several devices.

python tests/sharded_training.py losses STAGE [MESH ...]
python tests/sharded_training.py averages STAGE
python tests/sharded_training.py run INDEX COUNT COORDINATOR FOLDER

What they found is the line that starts with REPORT; the runtime prints lines of its own.
"""

import dataclasses
import json
import os
import sys

NUM_STEPS = 5
MESHES = {  # axes, and rules
    "one": ((1, 1, 1), "fsdp"),
    "data": ((8, 1, 1), "fsdp"),
    "fsdp": ((1, 8, 1), "fsdp"),
    "all": ((2, 2, 2), "tensor"),
}
RULES = {
    "fsdp": ((r".*", "fsdp"),),
    "tensor": (
        (r"\.(qkv|up|q|k|v)\.kernel$", "fsdp,tensor"),
        (r"\.(out|down)\.kernel$", "tensor,fsdp"),
        (r".*", "fsdp"),
    ),
}
RANGES = {"offset": (0, 3), "features": (-1, 4 + 28)}  # of integers; else 3 to 39
MIN_SIZE = 512  # parameters with fewer numbers may be replicated


def language_model_stage(sizes, rules="fsdp", **kwargs):
    """A language model on deep tokens: two scanned layers, noise on its inputs."""
    from dicode_jax.data.config import DataConfig
    from dicode_jax.models.dicode.ar_config import DiCoDeLMConfig
    from dicode_jax.models.gpt2 import GPT2Config
    from dicode_jax.stages.dicode.configs import ARTrainConfig
    from dicode_jax.stages.registry import build_stage

    body = GPT2Config(
        num_layers=2,
        num_heads=2,
        embed_dim=32,
        max_seq_len=24,
        vocab_size=48,
        scan_layers=True,
        remat="full",
        dropout=0.1,
    )
    model = DiCoDeLMConfig(
        body=body,
        num_tokens=3,
        token_dim=8,
        max_keyframes=4,
        num_mixtures=4,
        image_token_id=2,
        pad_token_id=1,
    )
    config = ARTrainConfig(
        model=model,
        data=DataConfig(kind="cache", path="unused"),
        text_length=6,
        num_keyframes=3,
        input_noise=0.1,
        **{"batch_size": 16} | _run_settings(sizes, rules) | kwargs,
    )
    return build_stage(config)


def tokenizer_stage(sizes, rules="fsdp"):
    """A clip decoder and its tokenizer, with dropped conditions; autoencoder and ViT are frozen."""
    import tiny

    from dicode_jax.data.config import DataConfig
    from dicode_jax.stages.dicode.configs import TokenizerTrainConfig
    from dicode_jax.stages.registry import build_stage

    pipe = tiny.tiny_pipeline()
    config = TokenizerTrainConfig(
        tokenizer=pipe.tokenizer.cfg,
        decoder=pipe.decoder.cfg,
        data=DataConfig(num_frames=tiny.NUM_FRAMES),
        frame_size=16,
        batch_size=8,
        **_run_settings(sizes, rules),
    )
    return build_stage(config)


def denoiser_stage(sizes, rules="fsdp"):
    """AR-Diffusion's denoiser with classes, some of which are dropped."""
    from dicode_jax.data.config import DataConfig
    from dicode_jax.models.ar_diffusion.dit import DenoiserConfig, DiTConfig
    from dicode_jax.stages.ar_diffusion.config import DiTTrainConfig
    from dicode_jax.stages.registry import build_stage

    dit = DiTConfig(
        num_frames=3,
        num_tokens=2,
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        context_len=4,
        context_dim=8,
        scan_layers=True,
        remat=True,
    )
    config = DiTTrainConfig(
        model=DenoiserConfig(dit=dit, num_classes=50),
        data=DataConfig(kind="cache", path="unused", num_frames=3),
        context_dropout=0.3,
        batch_size=16,
        **_run_settings(sizes, rules),
    )
    return build_stage(config)


def landiff_lm_stage(sizes, rules="fsdp"):
    """LanDiff's language model and its text encoder, two sequences in a row, some without text."""
    import tiny_landiff_training as tiny

    from dicode_jax.stages.registry import build_stage

    wide = {"num_layers": 2, "embed_dim": 32, "scan_layers": True, "remat": "full"}
    body = dataclasses.replace(tiny.LM.body, vocab_size=48, max_seq_len=400, **wide)
    config = dataclasses.replace(
        tiny.LM_CONFIG,
        model=dataclasses.replace(tiny.LM, body=body, codebook_size=41),
        text=dataclasses.replace(tiny.TEXT, vocab_size=48),
        row_samples=2,
        segments=1,
        text_dropout=0.3,
        batch_size=16,
        **_run_settings(sizes, rules),
    )
    return build_stage(config)


def landiff_diffusion_stage(sizes, rules="fsdp"):
    """LanDiff's denoiser and control branch, some windows with a prefix, some without text."""
    import tiny_landiff_training as tiny

    from dicode_jax.stages.registry import build_stage

    model = tiny.DIFFUSION_CONFIG.model
    dit = dataclasses.replace(model.dit, embed_dim=32, time_dim=8, scan_layers=True, remat=True)
    config = dataclasses.replace(
        tiny.DIFFUSION_CONFIG,
        model=dataclasses.replace(model, dit=dit),
        semantic=dataclasses.replace(tiny.SEMANTIC, codebook_size=48),
        text=dataclasses.replace(tiny.TEXT, vocab_size=48),
        text_dropout=0.3,
        batch_size=16,
        **_run_settings(sizes, rules),
    )
    return build_stage(config)


def frame_vae_stage(sizes, rules="fsdp"):
    """AR-Diffusion's frame VAE and its discriminator, which take turns."""
    from tiny_ar_diffusion import VAE

    from dicode_jax.models.patch_discriminator import PatchDiscriminatorConfig
    from dicode_jax.stages.ar_diffusion.config import FrameVAETrainConfig
    from dicode_jax.stages.registry import build_stage
    from dicode_jax.training.optim import OptimConfig

    settings = _run_settings(sizes, rules)
    settings["optim"] = OptimConfig(optimizer="sgd", lr=0.05, warmup_steps=0, schedule="constant")
    config = FrameVAETrainConfig(
        model=VAE,
        frame_size=VAE.image_size,
        disc_start=1,
        discriminator=PatchDiscriminatorConfig(channels=4, num_layers=1),
        batch_size=8,
        **settings,
    )
    return build_stage(config)


def semantic_tokenizer_stage(sizes, rules="fsdp"):
    """LanDiff's tokenizer: codes move by averages and revival, the image tower is frozen."""
    import atexit
    import shutil
    import tempfile

    from dicode_jax import config as config_lib
    from dicode_jax.data.config import DataConfig
    from dicode_jax.models.clip import CLIPVisionConfig
    from dicode_jax.models.landiff.frames import FrameTokens
    from dicode_jax.models.landiff.semantic_tokenizer import SemanticTokenizerConfig
    from dicode_jax.stages.landiff.config import SemanticTokenizerTrainConfig
    from dicode_jax.stages.registry import build_stage

    tower = CLIPVisionConfig(
        image_size=8, patch_size=4, embed_dim=32, num_layers=1, num_heads=2, output_dim=None
    )
    model = SemanticTokenizerConfig(
        frames=FrameTokens(iframe=3, pframe=2, segment=2), grid=(2, 2), feature_dim=32,
        embed_dim=32, num_layers=1, num_heads=2, token_dim=16, codebook_size=64, code_dim=8,
    )  # fmt: skip
    folder = tempfile.mkdtemp(prefix="tower-")  # its config is read again as the model is built
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config_lib.to_json(tower, f"{folder}/config.json")
    config = SemanticTokenizerTrainConfig(
        model=model,
        features=folder,
        data=DataConfig(num_frames=5),
        frame_size=8,
        batch_size=16,
        **_run_settings(sizes, rules),
    )
    return build_stage(config)


MAKE = {
    "frame_vae": frame_vae_stage,
    "language_model": language_model_stage,
    "tokenizer": tokenizer_stage,
    "denoiser": denoiser_stage,
    "semantic_tokenizer": semantic_tokenizer_stage,
    "semantic_tokenizer_start": semantic_tokenizer_stage,
    "landiff_lm": landiff_lm_stage,
    "landiff_diffusion": landiff_diffusion_stage,
}


def _run_settings(sizes, rules):
    from dicode_jax.runtime.sharding import ShardingConfig
    from dicode_jax.training.optim import OptimConfig

    data, fsdp, tensor = sizes
    return {
        "optim": OptimConfig(optimizer="sgd", lr=0.05, warmup_steps=2),
        "num_steps": NUM_STEPS,
        "seed": 5,
        "sharding": ShardingConfig(
            data=data, fsdp=fsdp, tensor=tensor, rules=RULES[rules], min_size=MIN_SIZE
        ),
    }


def with_random_weights(stage, zero=()):
    """The stage with numpy's numbers as loaded weights; fresh ones would compile for long.

    Args:
      zero: Names of parameters that are zero.
    """
    import jax
    import numpy as np
    from flax import nnx

    from dicode_jax.nn.rngs import ShapeRngs

    def load():
        rng = np.random.default_rng(0)
        model = nnx.eval_shape(lambda: stage.create(ShapeRngs()))
        arrays = {}
        for path, leaf in nnx.to_flat_state(nnx.state(model)):
            values = rng.normal(scale=0.1, size=leaf.shape) + (len(leaf.shape) == 1)
            arrays[path] = values.astype(leaf.dtype) * (path[0] not in zero)
        return arrays

    jax.config.update("jax_default_matmul_precision", "highest")
    return dataclasses.replace(stage, load=load)


def make_batch(stage, step):
    """A random batch of the stage's shapes, the same everywhere."""
    import numpy as np

    rng = np.random.default_rng((7, step))

    def draw(name, x):
        if np.issubdtype(x.dtype, np.bool_):
            return np.ones(x.shape, bool)
        if np.issubdtype(x.dtype, np.integer):
            low, high = RANGES.get(name, (3, 40))
            return rng.integers(low, high, x.shape).astype(x.dtype)
        return rng.normal(size=x.shape).astype(x.dtype)

    shapes = stage.batch_shapes(stage.config.batch_size)
    return {name: draw(name, x) for name, x in shapes.items()}


def losses_on_meshes(stage_name: str, *meshes: str) -> dict:
    """Five losses of a stage on every mesh or some, and what fsdp leaves whole on a device."""
    import jax

    from dicode_jax.runtime.sharding import global_batch, make_mesh
    from dicode_jax.training.setup import prepare

    make_stage = MAKE[stage_name]
    report = {}
    for name in meshes or MESHES:
        sizes, rules = MESHES[name]
        fresh = ("counts", "sums") if stage_name.endswith("_start") else ()  # k-means is to come
        stage = with_random_weights(make_stage(sizes, rules), fresh)
        devices = jax.devices()[:1] if name == "one" else None
        mesh = make_mesh(stage.config.sharding, devices)
        prepared = prepare(stage, mesh)
        state, losses = prepared.state, []
        for step in range(NUM_STEPS):
            state, metrics = prepared.train_step(state, global_batch(make_batch(stage, step), mesh))
            losses.append(float(metrics["loss"]))
        entry = {"losses": losses, "grad_norm": float(metrics["grad_norm"])}
        arrays = [x for x in jax.tree.leaves((state, prepared.frozen)) if x.size >= MIN_SIZE]
        whole = [x.shape for x in arrays if x.sharding.is_fully_replicated]
        entry |= {"large": len(arrays), "whole": whole}
        report[name] = entry
    return report


def averages(stage_name: str) -> dict:
    """Loss and first update of a stage on one device and on eight, in 1, 2 and 4 parts.

    Rows have 1 and 3 keyframes in turn, which 2 and 4 parts split unevenly; dropout, noise and
    dropped conditions act.

    Returns:
      For each case its loss, and by how much its update differs from that of the whole batch on one
      device: the largest difference over the largest number of the update.
    """
    import jax
    import numpy as np

    from dicode_jax.runtime.sharding import global_batch, make_mesh
    from dicode_jax.training.optim import OptimConfig
    from dicode_jax.training.setup import prepare

    make_stage = MAKE[stage_name]
    report, whole = {}, None
    parts_of_one, parts_of_eight = (1, 2, 4), (2, 4)
    if stage_name == "tokenizer":  # compiles for longest
        parts_of_one, parts_of_eight = (1, 4), (2,)
    for devices, sizes, cases in ((1, (1, 1, 1), parts_of_one), (8, (2, 4, 1), parts_of_eight)):
        for parts in cases:
            stage = with_random_weights(make_stage(sizes))
            optim = OptimConfig(
                optimizer="sgd", lr=1.0, b1=0.0, warmup_steps=0, schedule="constant",
                clip_norm=0.0, weight_decay=0.0, accumulate_steps=parts,
            )  # fmt: skip
            config = dataclasses.replace(stage.config, optim=optim, batch_size=32)
            stage = dataclasses.replace(stage, config=config)
            batch = make_batch(stage, 0)
            if "frame_mask" in batch:
                lengths = np.where(np.arange(32) % 2, 3, 1)
                batch["frame_mask"] = np.arange(3) < lengths[:, None]
            mesh = make_mesh(config.sharding, jax.devices()[:devices])
            prepared = prepare(stage, mesh)
            entry = report[f"{devices} devices, {parts} parts"] = {}
            if stage_name == "language_model" and parts == cases[0]:
                entry["validation"] = _validation(stage, prepared, batch, 32 if devices == 1 else 8)
            before = [np.asarray(x) for x in jax.tree.leaves(prepared.state.params)]
            state, metrics = prepared.train_step(prepared.state, global_batch(batch, mesh))
            after = [np.asarray(x) for x in jax.tree.leaves(state.params)]
            update = np.concatenate([(b - a).ravel() for a, b in zip(before, after)])
            whole = update if whole is None else whole
            entry["loss"] = float(metrics["loss"])
            entry["differs"] = float(np.abs(update - whole).max() / np.abs(whole).max())
    return report


def _validation(stage, prepared, batch, batch_size: int) -> float:
    """The loss of all but the last rows of a batch, in batches of another size."""
    import jax

    from dicode_jax.training.evaluate import Evaluation

    count = len(batch["frame_mask"])
    parts = [
        {name: x[start : start + batch_size] for name, x in batch.items()}
        for start in range(0, count, batch_size)
    ]
    with jax.set_mesh(prepared.mesh):
        evaluate = Evaluation(stage.loss_fn, lambda: parts, count - 3)
        return evaluate(prepared.model_of(prepared.state))["validation_loss"]


def train_from_stream(index: int, count: int, address: str, folder: str) -> dict:
    """Trains the language model as one of several processes, from a stream and with checkpoints.

    Several processes (fsdp over all devices) save step 3 and stop. One process trains to the end,
    from the checkpoint if there is one, on another mesh.
    """
    import functools

    from dicode_jax.runtime import distributed

    if count > 1:
        assert distributed.initialize(address, count, index)
    import jax
    import numpy as np

    from dicode_jax.data.stream import BatchStream
    from dicode_jax.runtime.sharding import batch_share, global_batch, make_mesh
    from dicode_jax.training.checkpoint import Checkpointer
    from dicode_jax.training.setup import prepare

    stage = with_random_weights(language_model_stage((1, 4, 1) if count > 1 else (2, 2, 1)))
    assert jax.device_count() == 4
    mesh = make_mesh(stage.config.sharding)
    share = dict(zip(("process_index", "process_count"), batch_share(mesh)))
    example = functools.partial(_example, stage.batch_shapes(1))
    stream = BatchStream(
        example, 70, names=str, batch_size=stage.config.batch_size, seed=4, **share
    )
    prepared = prepare(stage, mesh)
    state = prepared.state
    checkpoints = Checkpointer(folder)
    if checkpoints.latest_step is not None:
        state, position = checkpoints.restore(state)
        stream.restore(position)
    report = {"steps": [], "losses": [], "ids": []}
    while (step := int(state.step)) < (3 if count > 1 else NUM_STEPS):
        batch = next(stream)
        report["ids"].append(batch.pop("ids").tolist())
        state, metrics = prepared.train_step(state, global_batch(batch, mesh))
        report["steps"].append(step)
        report["losses"].append(float(metrics["loss"]))
    if count > 1:
        assert any(not x.is_fully_addressable for x in jax.tree.leaves(state.params))
        checkpoints.save(int(state.step), state, stream.state())
    checkpoints.close()
    stream.close()
    assert np.isfinite(report["losses"]).all()
    return report


def _example(shapes, index, rng):
    import numpy as np

    def draw(x):
        if np.issubdtype(x.dtype, np.bool_):
            return np.ones(x.shape[1:], bool)
        if np.issubdtype(x.dtype, np.integer):
            return rng.integers(3, 40, x.shape[1:]).astype(x.dtype)
        return (rng.normal(size=x.shape[1:]) + index / 70).astype(x.dtype)

    return {name: draw(x) for name, x in shapes.items()}


def read_report(output: str) -> dict:
    """What such a process has found, from what it printed."""
    [line] = [line for line in output.splitlines() if line.startswith("REPORT ")]
    return json.loads(line.removeprefix("REPORT "))


def main(command: str, *arguments: str) -> dict:
    if command == "losses":
        return losses_on_meshes(*arguments)
    if command == "averages":
        return averages(*arguments)
    index, count, address, folder = arguments
    return train_from_stream(int(index), int(count), address, folder)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    num_devices = 8 if command in ("losses", "averages") else 4 // int(arguments[1])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (  # compiling is most of the time
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices} "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.stdout.write(f"\nREPORT {json.dumps(main(command, *arguments))}\n")
