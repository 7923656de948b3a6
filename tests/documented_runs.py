"""Runs the commands of a page or docstring, one after the other, with models of a few numbers.

A command is run as it stands but for this: its config is that of the same name with the sizes of
`tiny_pipeline`, options that say how much is worked off are lowered (`LESS`), and what it reads and
no command before it has made is laid there (`supply`). Of a training all is done, its data read,
its weights loaded, checkpoint and model written, but the step: its loss is traced on a batch and
the weights stay as they are, since compiling would take most of the time. What is not run is in
`NOT_RUN`.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import pathlib
import re
import shutil
import tempfile
import unittest.mock

import documented
import jax
import jax.numpy as jnp
import numpy as np
import tiny_ar_diffusion
from flax import nnx
from hugging_face_folder import draw, write_folder
from media_files import greys, write
from PIL import Image
from source_tree import ROOT
from tiny import NUM_TOKENS, random_module, tiny_pipeline

from dicode_jax.data.shapes_world import all_captions
from dicode_jax.media.videos import Video, Videos
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.nn.resampler import ResamplerConfig
from dicode_jax.nn.rngs import ShapeRngs, stream
from dicode_jax.pipelines import painting
from dicode_jax.pipelines.dicode import DiCoDePipeline
from dicode_jax.runtime import distributed
from dicode_jax.runtime.sharding import ShardingConfig
from dicode_jax.stages.dicode.representation_model import RepresentationConfig, RepresentationModel
from dicode_jax.storage import weights
from dicode_jax.text import gpt as text
from dicode_jax.training import setup
from dicode_jax.training.optim import OptimConfig
from train import loop, preflight

# Commands that are parsed and not run, and why.
NOT_RUN = {
    r"^make ": "makes environments; .ci/run and tests/test_ci.py are for it",
    r"--coordinator": "several processes; tests/runtime/test_distributed.py starts them",
    r"--sharding|/shared/": "a pod; the same command without a mesh is run",
    r"dynamicrafter|open_clip|divot|dc512": "tests/convert runs this on tiny checkpoints",
    r"landiff|cogvideox": "tests/convert and tests/cli have tiny ones",
    r"convert dicode models": "tests/convert/dicode/test_command.py runs it on the official layout",
    r"to_torch|NAME": "tests/convert/test_to_torch.py and test_main.py run it",
    r"benchmarks\.": "measurements of minutes; tests/test_benchmarks.py",
    r"tests\.fuzz": "minutes; tests/fuzz/test_doors.py tries thirty of each",
    r"int8_weights": "clips of 64 x 64; tests/test_scripts.py tries a layer",
    r"encode_in_chunks": "half a minute; tests/test_scripts.py tries a tiny one",
    r"score_samplers": "clips of 64 x 64; tests/test_score_samplers.py",
    r"scale_language_models": "finished runs; tests/test_scale_language_models.py",
    r"ar_diffusion|runs/dit": "tests/stages/ar_diffusion, tests/convert have tiny ones",
    r"train_shapes_features|--videos": "clips of 64 x 64; tests/test_shapes_features.py",
    r"--suite text": "a CLIP with words; tests/cli/test_evaluate.py, tests/evaluation/test_text.py",
    r"convert (i3d|inception)": "tests/convert/parts/test_inception.py runs it on narrow ones",
    r"--suite tokens": "as many paintings as tokens; tests/cli/test_evaluate.py",
    r"data (cut|filter)|clips/captions": "the extra; tests/data/test_scenes.py, test_filtering.py",
    r"^dicode app": "serves until it is stopped; tests/app and tests/cli/test_app.py",
    r"mutation_trial": "an hour; tests/test_scripts.py tries it on a toy",
}
LESS = {
    "--num-steps": "1", "--steps": "1", "--batch-size": "2", "--cached-videos": "2",
    "--cached-clips": "0", "--data.num-workers": "0", "--num-keyframes": "3", "--num": "1",
    "--num-clips": "2", "--num-frames": "8",
}  # fmt: skip
HEAD = ResamplerConfig(
    dim=16, depth=1, head_dim=8, num_heads=2, embed_dim=8, output_dim=16, output_shape=(8, 8, 4)
)
PATH = dataclasses.replace(
    HEAD, num_queries=NUM_TOKENS, embed_dim=10, output_dim=8, output_shape=None
)
CONFIG_FILE = """import documented_runs


def get_config():
    return documented_runs.shrink({!r})
"""
_traced = set()  # programs, by kind and shapes
BASE = 144  # ids of the small vocabulary without those of images


def why_not(command):
    """Why a command is not run; None for one that is."""
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


@functools.cache
def tiny():
    return tiny_pipeline()


@functools.cache
def _saved():
    folder = pathlib.Path(tempfile.mkdtemp()) / "pipe"
    tiny().save_pretrained(folder)
    return folder


@functools.cache
def shrink(name):
    """The config of `configs/NAME.py` with the sizes of `tiny_pipeline`."""
    config, pipe = importlib.import_module(f"configs.{name}").get_config(), tiny()
    less = {
        "num_steps": 1, "batch_size": 2, "frame_size": 16, "validation_examples": 2,
        "optim": OptimConfig(warmup_steps=0), "sharding": ShardingConfig(),
    }  # fmt: skip
    if hasattr(config, "decoder"):
        told, seen = config.decoder, 0
        if told.latent_head is not None:
            seen = 5 if told.latent_view == "between" else 4
        unet = dataclasses.replace(pipe.decoder.cfg.unet, in_channels=4 + seen)
        less["tokenizer"] = pipe.tokenizer.cfg
        less["decoder"] = dataclasses.replace(
            pipe.decoder.cfg,
            unet=unet,
            latent_head=HEAD if seen else None,
            latent_view=told.latent_view,
            latent_prior=told.latent_prior,
            token_path=PATH if told.token_path else None,
        )
        less["cached_clips"] = 0
        less["data"] = dataclasses.replace(config.data, num_frames=4)
    elif hasattr(config, "probe_weight"):
        less["model"] = representation(config.model.probe_classes, has_path=bool(config.model.path))
    elif hasattr(config, "num_keyframes"):
        model = pipe.language_model.cfg
        if isinstance(config.model.body, LlamaConfig):
            model = dataclasses.replace(
                model, body=LlamaConfig(vocab_size=BASE + 66, max_seq_len=64, **LLAMA)
            )
        less |= {"model": model, "text_length": 14, "num_keyframes": 2}
        less["cached_videos"] = min(config.cached_videos, 2)
    else:
        less["model"] = pipe.decoder.cfg.autoencoder
    return dataclasses.replace(config, **less)


LLAMA = {
    "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "mlp_dim": 8,
    "rope_theta": 1e4, "rope_scaling": None,
}  # fmt: skip


def representation(probe_classes=(8, 4, 4), *, has_path=False):
    return RepresentationConfig(
        tokenizer=tiny().tokenizer.cfg,
        head=HEAD,
        path=PATH if has_path else None,
        probe_classes=probe_classes,
    )


def write_body(folder, *, is_llama):
    """A Hugging Face folder that fits `shrink`'s language models, with the small vocabulary."""
    d, shapes = 16, {}
    if is_llama:
        shapes = {"model.embed_tokens.weight": (BASE, d), "model.norm.weight": (d,)}
        layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        layer |= {f"self_attn.{x}_proj": (d, d) for x in "qo"}
        layer |= {f"self_attn.{x}_proj": (d // 2, d) for x in "kv"}
        layer |= {"mlp.gate_proj": (8, d), "mlp.up_proj": (8, d), "mlp.down_proj": (d, 8)}
        shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
        config = {
            "hidden_size": d, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
            "vocab_size": BASE,
        }  # fmt: skip
    else:
        shapes = {"wte.weight": (BASE, d), "wpe.weight": (64, d), "ln_f.weight": (d,)}
        layer = {
            "ln_1": (d,), "ln_2": (d,), "attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d),
            "mlp.c_fc": (d, 4 * d), "mlp.c_proj": (4 * d, d),
        }  # fmt: skip
        shapes |= {f"h.0.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"h.0.{name}.bias": shape[-1:] for name, shape in layer.items()}
        shapes["ln_f.bias"] = (d,)
        config = {
            "model_type": "gpt2", "n_embd": d, "n_head": 2, "n_layer": 1, "n_positions": 64,
            "vocab_size": BASE, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
        }  # fmt: skip
    text.train_small(all_captions()).save(write_folder(folder, config, draw(shapes)))


def supply(option, path, command):
    """Lays down what a command reads at `path`, by the option that names it, unless it is there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    is_llama = "llama" in command
    if option == "--data.path" and path.name == "cache":
        name = "llama_1b" if is_llama else "gpt2_small"
        run(
            f"python -m train.encode --config configs/{name}.py --tokenizer TOKENIZER "
            f"--data.path VIDEOS --out {path}"
        )
    elif option in ("--data.path", "inspect"):
        path.mkdir()
        for name, caption in {"a": "a red circle", "b": "a blue square"}.items():
            write(path / f"{name}.mp4", greys(20, 16, 16))
            (path / f"{name}.txt").write_text(caption)
    elif option in ("--body-init", "--text-tokenizer"):
        family = "llama" if is_llama else "gpt2"
        run(f"python -m convert {family} HF_FOLDER --for-dicode --out {path}")
    elif option in ("gpt2", "llama", "convert.gpt2", "convert.llama"):
        write_body(path, is_llama=is_llama)
    elif option in ("--prompts", "--vbench-prompts"):
        path.write_text("a red circle\n")
    elif path.suffix == ".png" and option in ("--image", "interpolate", "first.png", "last.png"):
        Image.fromarray(greys(1, 16, 16)[0]).save(path)
    elif option in ("reconstruct", "encode", "--video", "continue"):
        write(path, greys(20, 16, 16))
    elif path.name == "taichi":
        tiny_ar_diffusion.make(num_classes=0).save_pretrained(path)
    elif option == "decode":
        run(f"dicode encode in.mp4 --out {path}")
    elif (
        option in ("info", "evaluate", "--model", "--tokenizer")
        or "tokenizer" in path.parts
        or "start" in path.parts
    ):
        shutil.copytree(_saved(), path)
    elif option in ("--autoencoder", "--representation", "--init"):
        pipe = tiny()
        module, config = pipe.language_model, pipe.language_model.cfg
        if "autoencoder" in str(path):
            module, config = pipe.decoder.autoencoder, pipe.decoder.cfg.autoencoder
        elif "representation" in str(path) or "path" in path.parts:
            config = representation(has_path="path" in path.parts)
            module = random_module(lambda: RepresentationModel(config, rngs=ShapeRngs()))
        weights.save_module(path, module, config)


def prepare(command):
    """The words of a command as they are run in the present folder, all that they read supplied."""
    words = documented.words_of(command)
    for i, word in enumerate(words[:-1]):
        if words[0] != "dicode" or words[1] == "evaluate":
            words[i + 1] = LESS.get(word, words[i + 1])
    if "taichi" in command and "--num-frames" in words:  # a video of its length is another program
        words[words.index("--num-frames") + 1] = "6"
    named = dict(itertools.pairwise(words))
    for option, value in named.items():
        if option == "--config":
            name = pathlib.Path(value).stem
            pathlib.Path("configs").mkdir(exist_ok=True)
            pathlib.Path(value).write_text(CONFIG_FILE.format(name))
            fields = ("autoencoder", "representation", "init", "tokenizer", "body_init")
            for field in fields:
                held = getattr(shrink(name), field, None)
                if isinstance(held, str) and f"--{field}".replace("_", "-") not in words:
                    supply(f"--{field}".replace("_", "-"), pathlib.Path(held), command)
            if "--data.path" not in words and shrink(name).data.path not in ("shapes", "cache"):
                supply("--data.path", pathlib.Path(shrink(name).data.path), command)
        elif option in ("--workdir", "--out"):  # another command of this page may have made it
            shutil.rmtree(value, ignore_errors=True)
        elif not value.startswith("-") and value != "shapes":
            supply(option, pathlib.Path(value), command)
    painting_ones = ("generate", "continue", "interpolate", "reconstruct", "encode", "decode")
    if words[0] == "dicode" and words[1] in painting_ones:
        words += ["--steps", "1"] if words[1] != "encode" and "taichi" not in command else []
        if "converted/" in command:  # what lies there has the vocabulary of the shapes world
            words[2] = "a red circle"
        if "--model" not in words:
            supply("--model", pathlib.Path("PIPE"), command)
            words += ["--model", "PIPE"]
    return words


def without_painting(pipe, prompt, *, num_clips=1, **given):
    """Black videos, once the prompts have been read; tests/e2e paints with every option."""
    prompts = [prompt or ""] if not isinstance(prompt, list) else prompt
    ids = pipe.text.encode(prompts, pipe.config.text_length).ids
    size = pipe.config.frame_size
    length = num_clips * pipe.config.sampling.num_frames
    length += 0 if (first := given.get("video")) is None else len(first)
    frames = np.zeros((length, size, size, 3), np.uint8)
    return Videos([Video(frames=frames, fps=pipe.config.fps)] * len(ids))


def without_clips(pipe, prompt, *, num_clips=1, **_):
    """What `without_painting` gives, clip by clip."""
    frames = without_painting(pipe, prompt, num_clips=num_clips)[0]
    return (painting.Clip(0, i, clip) for i, clip in enumerate(np.split(frames, num_clips)))


def without_looks(task, options, run=loop.run):
    """A run whose model nobody looks at, for which more would be compiled."""
    return run(dataclasses.replace(task, evaluate=None, sample=None), options)


def with_traced_step(stage, mesh):
    """`training.setup.prepare` without a compiler: random numbers where none are loaded."""
    plan = setup.plan_stage(stage, mesh)
    loaded, rng = dict(stage.load()), np.random.default_rng(0)

    def fill(states):
        flat = nnx.to_flat_state(states)
        drawn = [
            (p, x.replace(rng.normal(scale=0.1, size=x.shape).astype(x.dtype))) for p, x in flat
        ]
        return nnx.from_flat_state([(p, x.replace(loaded.pop(p, x.get_value()))) for p, x in drawn])

    params, frozen = fill(plan.state.params), fill(plan.frozen)
    assert not loaded
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), plan.state.opt_state)
    state = plan.state.replace(
        step=jnp.zeros((), int), params=params, opt_state=empty, rng=stream(0, "training"),
        ema=None if plan.state.ema is None else params, skipped=jnp.zeros((), int),
    )  # fmt: skip

    def step(state, frozen, batch):
        shapes = repr(jax.tree.map(jnp.shape, (params, frozen, batch)))
        if (stage.name, shapes) not in _traced:
            keys = jax.random.split(state.rng, stage.config.batch_size)
            loss = lambda *x: stage.loss_fn(nnx.merge(plan.graph, *x[:2]), *x[2:])  # noqa: E731
            jax.eval_shape(loss, params, frozen, batch, keys)
            _traced.add((stage.name, shapes))
        metrics = dict.fromkeys(("loss", "grad_norm", "lr", "finite"), 1.0)
        return state.replace(step=state.step + 1), metrics

    return setup.Prepared(plan=dataclasses.replace(plan, step=step), state=state, frozen=frozen)


def run(command):
    """Runs a command in the present folder.

    Raises:
      documented.Wrong: It ends with a status other than 0, or in a traceback.
    """
    words = prepare(command)
    module, args = documented.program(words)
    path = ROOT / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    said = io.StringIO()

    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        unittest.mock.patch.object(distributed, "initialize", return_value=False),
        unittest.mock.patch.object(loop, "run", without_looks),
        unittest.mock.patch.object(preflight, "fit", lambda said, config, *_: config),
        unittest.mock.patch.object(loop, "prepare", with_traced_step),
        unittest.mock.patch.object(DiCoDePipeline, "__call__", without_painting),
        unittest.mock.patch.object(DiCoDePipeline, "stream", without_clips),
        unittest.mock.patch("sys.argv", [module, *args]),
    ):
        try:
            documented.execute(path)
        except SystemExit as end:
            if end.code:
                raise documented.Wrong(f"{' '.join(words)}\n{said.getvalue()}{end}") from end
        except Exception as error:
            raise documented.Wrong(f"{' '.join(words)}: {error!r}") from error
