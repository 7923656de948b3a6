"""How long this project's models take on a CPU beside PyTorch's of the same sizes, in one process.

    python -m benchmarks.cpu_peers --what unet_32x32 vae gpt2
    python -m benchmarks.cpu_peers --json

Both run in turns, float32, on the cores that the process may use, with random weights: diffusers'
`UNet3DConditionModel` and `AutoencoderKL`, transformers' `GPT2Model` and `CLIPVisionModel`, the
parts that these lack in plain PyTorch. Parameters and FLOPs of both are printed, since the nets are
alike and not equal. A ratio is PyTorch's median over ours: above 1, ours is faster. The load of the
machine is noted before and after; where it is above the cores, repeat. `unet_*` at full width and
`gpt2` take up to 15 GB.
"""

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from configs import gpt2_large, gpt2_small
from dicode_jax.models.ar_diffusion.dit import (
    DiT,
    DiTConfig,
    attention_mask,
    position_table,
)
from dicode_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dicode_jax.models.clip import CLIPVision, CLIPVisionConfig
from dicode_jax.models.dicode.ar import DiCoDeLM
from dicode_jax.models.dicode.generate import generate
from dicode_jax.models.unet3d import UNet3D, UNet3DConfig
from dicode_jax.nn.layer_stack import without_scan
from dicode_jax.nn.rngs import blank
from dicode_jax.training.flops import count_flops
from dicode_jax.training.state import create_state, make_train_step

INSTALL = "pip install torch diffusers transformers, torch from its index of CPU builds"
PEERS = ("torch", "diffusers", "transformers")
FRAMES, TEXT, IMAGE = 16, 77, 16  # context of a frame: the text and its image tokens
PROMPT, KEYFRAMES, LM_ROWS, LM_KEYFRAMES = 80, 6, 2, 25


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
      call: Does the work once and waits for it.
      parameters: How many the net has.
      flops: Of one call, products and convolutions.
    """

    call: Callable[[], Any]
    parameters: int
    flops: int


# Ours


def filled(kind, *sizes):
    """A module with random weights, which are not drawn one by one."""
    graph, state = nnx.split(blank(kind, *sizes))
    some = np.random.default_rng(0).normal(0.0, 0.02, 2**20).astype(np.float32)
    state = jax.tree.map(lambda x: jnp.asarray(np.resize(some, x.shape), x.dtype), state)
    return graph, state


def ours(kind, sizes: tuple, run: Callable, *args) -> Side:
    graph, state = filled(kind, *sizes)
    jitted = jax.jit(lambda state, *args: run(nnx.merge(graph, state), *args))
    flops = count_flops(jitted, state, *args).model
    return Side(lambda: jax.block_until_ready(jitted(state, *args)), size_of(state), flops)


def size_of(state) -> int:
    return sum(x.size for x in jax.tree.leaves(state))


def normal(*shape) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


# Theirs


def theirs(net, call: Callable[[], Any], with_gradient: bool = False) -> Side:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def run():
        with torch.inference_mode(not with_gradient):
            return call()

    with FlopCounterMode(display=False) as counter:
        run()
    return Side(run, sum(x.numel() for x in net.parameters()), counter.get_total_flops())


def tensor(x: np.ndarray):
    import torch

    return torch.from_numpy(x)


def new_tokens(cfg):
    """In PyTorch: the MLPs that deep tokens go in and out by."""
    from torch import nn

    def mlp(*dims):
        return nn.Sequential(nn.Linear(*dims[:2]), nn.GELU(), nn.Linear(*dims[1:]))

    d = cfg.body.embed_dim
    return mlp(cfg.token_dim, d, d), mlp(d, d, cfg.head_dim)


def mixture(raw, cfg):
    """In PyTorch: means, variances and logits of the head's output."""
    from torch.nn.functional import softplus

    m, z = cfg.num_mixtures, cfg.token_dim
    means, variances, logits = raw.float().split((m * z, m * z, m), -1)
    shape = (*raw.shape[:-1], m, z)
    return means.reshape(shape), softplus(variances.reshape(shape)).clamp_min(1e-5), logits


def their_gpt2(cfg):
    import torch
    import transformers

    options = transformers.GPT2Config(
        vocab_size=cfg.body.vocab_size,
        n_positions=cfg.body.max_seq_len,
        n_embd=cfg.body.embed_dim,
        n_layer=cfg.body.num_layers,
        n_head=cfg.body.num_heads,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    into, out = new_tokens(cfg)
    return torch.nn.ModuleDict({"body": transformers.GPT2Model(options), "into": into, "out": out})


# The pairs


def unet(size: int, clips: int = 1, **changes) -> tuple[Side, Side]:
    import diffusers

    cfg = UNet3DConfig(**changes)
    x, steps = normal(clips, FRAMES, size, size, 4), np.full(clips, 500, np.int32)
    context = normal(clips, TEXT + FRAMES * IMAGE, cfg.context_dim)
    mine = ours(UNet3D, (cfg,), lambda m, *args: m(*args), x, steps, context)
    net = diffusers.UNet3DConditionModel(
        block_out_channels=tuple(m * cfg.model_channels for m in cfg.channel_mult),
        layers_per_block=cfg.num_res_blocks,
        cross_attention_dim=cfg.context_dim,
        attention_head_dim=cfg.head_dim,
        norm_num_groups=cfg.num_groups,
    ).eval()
    x = tensor(x).permute(0, 4, 1, 2, 3).contiguous()
    steps, context = tensor(steps), tensor(context[:, : TEXT + IMAGE])
    return mine, theirs(net, lambda: net(x, steps, context).sample)


def vae() -> tuple[Side, Side]:
    import diffusers

    cfg, latents = AutoencoderKLConfig(), normal(1, 32, 32, 4)
    mine = ours(AutoencoderKL, (cfg,), lambda m, z: m.decode(z), latents)
    net = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(m * cfg.channels for m in cfg.channel_mult),
        layers_per_block=cfg.num_res_blocks,
        sample_size=cfg.resolution,
    ).eval()
    latents = tensor(latents).permute(0, 3, 1, 2).contiguous()
    return mine, theirs(net, lambda: net.decode(latents).sample)


def vit() -> tuple[Side, Side]:
    import transformers

    cfg = CLIPVisionConfig(output_dim=None)
    image = normal(1, cfg.image_size, cfg.image_size, 3)
    mine = ours(CLIPVision, (cfg,), lambda m, x: m(x), image)
    options = transformers.CLIPVisionConfig(
        hidden_size=cfg.embed_dim,
        intermediate_size=int(cfg.mlp_ratio * cfg.embed_dim),
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        patch_size=cfg.patch_size,
        image_size=cfg.image_size,
        hidden_act="gelu",
    )
    net = transformers.CLIPVisionModel(options).eval()
    pixels = tensor(image).permute(0, 3, 1, 2).contiguous()
    return mine, theirs(net, lambda: net(pixels).last_hidden_state)


def gpt2(settings=None) -> tuple[Side, Side]:
    """96 deep tokens behind a prompt, drawn from the mixture; separators are fed as well."""
    import torch

    cfg = without_scan((settings or gpt2_large.get_config()).model)
    graph, state = filled(DiCoDeLM, cfg)
    lm, ids = nnx.merge(graph, state), jnp.zeros((1, PROMPT), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 1)

    def write():
        return jax.block_until_ready(generate(lm, ids, num_keyframes=KEYFRAMES, keys=keys))

    feeds = KEYFRAMES * (cfg.num_tokens + 1) - 2  # the prompt gives the first, the last is not fed
    flops = count_flops(
        lambda s: generate(nnx.merge(graph, s), ids, num_keyframes=KEYFRAMES, keys=keys), state
    )
    mine = Side(write, size_of(state), flops.model)
    net = their_gpt2(cfg).eval()

    def draw(hidden):
        means, variances, logits = mixture(net["out"](hidden[:, -1]), cfg)
        chosen = torch.multinomial(logits.softmax(-1), 1)[0, 0]
        return torch.normal(means[:, chosen], variances[:, chosen].sqrt() / 10)

    def their_write():
        words = net["body"].wte(torch.zeros(1, PROMPT + 1, dtype=torch.long))
        seen = net["body"](inputs_embeds=words, use_cache=True)
        for _ in range(feeds):
            embed = net["into"](draw(seen.last_hidden_state))[:, None]
            past = seen.past_key_values
            seen = net["body"](inputs_embeds=embed, past_key_values=past, use_cache=True)
        return draw(seen.last_hidden_state)

    return mine, theirs(net, their_write)


def train(settings=None) -> tuple[Side, Side]:
    """Forward, backward and AdamW on videos of 25 keyframes: 505 positions a row."""
    import torch

    cfg = (settings or gpt2_small.get_config()).model
    body = dataclasses.replace(cfg.body, scan_layers=False, remat="none", dropout=0.0)
    cfg = dataclasses.replace(cfg, body=body)
    graph, state = filled(DiCoDeLM, cfg)
    ids = np.zeros((LM_ROWS, PROMPT), np.int32)
    tokens = normal(LM_ROWS, LM_KEYFRAMES, cfg.num_tokens, cfg.token_dim)

    def loss_of(lm, batch, keys):
        return lm.loss(batch["ids"], batch["tokens"]).loss, {}

    tx, batch = optax.adamw(1e-4, weight_decay=0.01), {"ids": ids, "tokens": tokens}
    step = make_train_step(graph, loss_of, tx, optax.constant_schedule(1e-4))
    compiled = jax.jit(step, donate_argnums=0)
    held = [create_state(state, tx, jax.random.key(0), use_ema=False)]
    frozen = nnx.state(nnx.merge(graph, state), lambda path, x: False)
    flops = count_flops(step, held[0], frozen, batch).model

    def run():
        held[0], metrics = compiled(held[0], frozen, batch)
        return float(metrics["loss"])

    mine, net = Side(run, size_of(state), flops), their_gpt2(cfg).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    ids, tokens = tensor(ids).long(), tensor(tokens)

    def their_step():
        optimizer.zero_grad(set_to_none=True)
        words = net["body"].wte(ids)
        image = net["body"].wte(torch.zeros(LM_ROWS, LM_KEYFRAMES, 1, dtype=torch.long))
        frames = torch.cat([image, net["into"](tokens)], 2).flatten(1, 2)
        embeds = torch.cat([words, frames], 1)
        hidden = net["body"](inputs_embeds=embeds, use_cache=False).last_hidden_state[:, PROMPT:]
        hidden = hidden.unflatten(1, (LM_KEYFRAMES, -1))[:, :, :-1]
        means, variances, logits = mixture(net["out"](hidden), cfg)
        errors = (tokens[..., None, :] - means).square() / variances + variances.log()
        loss = -torch.logsumexp(logits.log_softmax(-1) - errors.sum(-1) / 2, -1).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return mine, theirs(net, their_step, with_gradient=True)


def dit(**changes) -> tuple[Side, Side]:
    """AR-Diffusion's denoiser on a window of 16 frames: 77 context and 512 video tokens."""
    import torch

    cfg = DiTConfig(**changes)
    f, n, c = cfg.num_frames, cfg.num_tokens, cfg.channels
    x, context = normal(1, f, n, c), normal(1, cfg.context_len, cfg.context_dim)
    steps = np.linspace(0, 999, f, dtype=np.int32)[None]
    mine = ours(DiT, (cfg,), lambda m, *args: m(*args), x, steps, context)
    net = their_dit(cfg).eval()
    x, steps, context = tensor(x).flatten(1, 2), tensor(steps), tensor(context)
    mask = torch.from_numpy(attention_mask(cfg, f))
    table = tensor(position_table(cfg.embed_dim, f * n))
    return mine, theirs(net, lambda: net(x, steps, context, mask, table))


def their_dit(cfg):
    """In PyTorch: the same blocks, of `torch.nn` and its fused attention."""
    import torch
    from torch import nn
    from torch.nn import functional

    d, heads, length, n = cfg.embed_dim, cfg.num_heads, cfg.context_len, cfg.num_tokens
    gelu = nn.GELU(approximate="tanh")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.mlp = nn.Sequential(nn.Linear(d, 4 * d), gelu, nn.Linear(4 * d, d))

        def attention(self, x, mask):
            q, k, v = self.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.out(y.transpose(1, 2).flatten(2))

        def forward(self, x, times, mask):
            factors = self.modulation(times).repeat_interleave(n, dim=1).chunk(6, dim=-1)
            shift1, scale1, gate1, shift2, scale2, gate2 = factors
            for call, shift, scale, gate in (
                (lambda y: self.attention(y, mask), shift1, scale1, gate1),
                (self.mlp, shift2, scale2, gate2),
            ):
                x = self.norm(x)
                context, frames = x[:, :length], x[:, length:]
                y = call(torch.cat([context, frames * (1 + scale) + shift], 1))
                x = x + torch.cat([y[:, :length], gate * y[:, length:]], 1)
            return x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.context = nn.Linear(cfg.channels, d), nn.Linear(cfg.context_dim, d)
            self.times = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
            self.blocks = nn.ModuleList([Block() for _ in range(cfg.num_layers)])
            self.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
            self.head = nn.Linear(d, cfg.channels)

        def forward(self, x, steps, context, mask, table):
            angles = steps[..., None] * torch.exp(-np.log(1e4) * torch.arange(128) / 128)
            times = self.times(torch.cat([angles.cos(), angles.sin()], -1))
            x = torch.cat([self.context(context), self.tokens(x) + table], 1)
            for block in self.blocks:
                x = block(x, times, mask)
            return self.head(self.norm(x[:, length:]))

    return Net()


NARROW = {"model_channels": 32, "head_dim": 32, "context_dim": 128}
PAIRS: dict[str, tuple[str, Callable[[], tuple[Side, Side]]]] = {
    "unet_32x32": ("UNet forward, 16 frames of 32x32 latents", lambda: unet(32)),
    "unet_16x16": ("UNet forward, 16 frames of 16x16 latents", lambda: unet(16)),
    "unet_8x8": ("UNet forward, 16 frames of 8x8 latents", lambda: unet(8)),
    "unet_narrow": ("UNet of width 32, 4 clips of 8x8", lambda: unet(8, 4, **NARROW)),
    "vae": ("VAE decode, a frame of 256x256", vae),
    "gpt2": ("GPT-2 large, 96 deep tokens after 80", gpt2),
    "vit": ("ViT-H/14, one image", vit),
    "dit": ("AR-Diffusion's denoiser, 77 + 512 tokens, 4 layers", lambda: dit(num_layers=4)),
    "train": ("GPT-2 small, training step, 2 x 505", train),
}


def compare(what: str, rounds: int, warm_up: int) -> dict:
    """Times both sides of a pair in turns."""
    before = os.getloadavg()[0]
    sides = dict(zip(("dicode_jax", "pytorch"), PAIRS[what][1](), strict=True))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warm_up + rounds):
        for name in (list(sides), list(sides)[::-1])[i % 2]:
            start = time.perf_counter()
            sides[name].call()
            times[name].append(time.perf_counter() - start)
    medians, least = (
        {name: f(x[warm_up:]) for name, x in times.items()} for f in (statistics.median, min)
    )
    return {
        "what": what,
        "name": PAIRS[what][0],
        "rounds": rounds,
        "threads": len(os.sched_getaffinity(0)),
        "load": [round(x, 1) for x in (before, os.getloadavg()[0])],
        "median_seconds": medians,
        "least_seconds": least,
        "ratio": medians["pytorch"] / medians["dicode_jax"],
        "ratio_of_least": least["pytorch"] / least["dicode_jax"],
        "parameters": {name: side.parameters for name, side in sides.items()},
        "flops": {name: side.flops for name, side in sides.items()},
    }


def row(r: dict) -> str:
    """One line for people."""
    seconds = " / ".join(f"{r['median_seconds'][x]:.3f}" for x in ("pytorch", "dicode_jax"))
    sizes = " / ".join(f"{r['parameters'][x] / 1e6:.0f}" for x in ("pytorch", "dicode_jax"))
    flops = " / ".join(f"{r['flops'][x] / 1e9:.0f}" for x in ("pytorch", "dicode_jax"))
    return (
        f"{r['name']:<42} {seconds:>17} s  {r['ratio']:5.2f} (least {r['ratio_of_least']:.2f})  "
        f"{sizes:>13} M  {flops:>13} GFLOP  load {r['load'][0]} - {r['load'][1]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--rounds", type=int, default=5, help="measured calls (default: 5)")
    parser.add_argument("--warm-up", type=int, default=1, help="calls before (default: 1)")
    parser.add_argument("--json", action="store_true", help="one object a line")
    args = parser.parse_args()
    require_peers(("torch",) if set(args.what) <= {"dit"} else PEERS)
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if not args.json:
        print(f"PyTorch / dicode_jax, medians of {args.rounds}; torch {torch.__version__}")
    for what in args.what:
        result = compare(what, args.rounds, args.warm_up)
        print(json.dumps(result) if args.json else row(result), flush=True)
        jax.clear_caches()
        gc.collect()


def require_peers(peers: Sequence[str] = PEERS) -> None:
    """Ends with one line when PyTorch's side is not installed."""
    missing = [x for x in peers if not importlib.util.find_spec(x)]
    if missing:
        sys.exit(f"error: the peers need {', '.join(missing)}: {INSTALL}")


if __name__ == "__main__":
    main()
