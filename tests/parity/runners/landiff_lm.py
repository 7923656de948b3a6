"""LanDiff's language model. Bounds are those of the README beside the fixtures.

The release's cache holds heads whose neighbouring channels turned together, ours the same numbers
in the order of `halves_of_pairs`. Scores of single steps are those of the whole sequence at once,
fed what the scan over the cache drew.
"""

import jax
import jax.numpy as jnp
import numpy as np

from convert import from_torch
from dicode_jax.diffusion.guidance import guide
from dicode_jax.distributions.categorical import keep_top_k, keep_top_p
from dicode_jax.models.landiff import generate
from dicode_jax.models.landiff.frames import FrameTokens
from dicode_jax.models.landiff.language_model import RELEASED_BODY, LanguageModelConfig
from dicode_jax.models.llama import LlamaConfig
from dicode_jax.nn.embeddings import timestep_embedding
from dicode_jax.nn.masks import causal_mask
from dicode_jax.nn.rotary import halves_of_pairs, rotary_frequencies, rotary_tables
from parity.harness import Check, runner
from parity.runners.gpt2 import require_all

LOGITS, HIDDEN, PROBS = {"atol": 2e-4}, {"atol": 1e-4}, {"atol": 1e-4}


def model_config(config) -> LanguageModelConfig:
    """Sizes of a fixture."""
    body = LlamaConfig(
        **vars(RELEASED_BODY)
        | {
            "num_layers": config["num_layers"],
            "num_heads": config["num_heads"],
            "num_kv_heads": config["num_heads"],
            "embed_dim": config["hidden_dim"],
            "mlp_dim": config["mlp_dim"],
            "max_seq_len": config["rope_max_len"],
            "rope_theta": float(config["rope_theta"]),
            "vocab_size": config["codebook_size"] + 7,
        }
    )
    return LanguageModelConfig(
        body=body,
        frames=FrameTokens(
            iframe=config["iframe_len"],
            pframe=config["pframe_len"],
            segment=config["segment_length"],
        ),
        codebook_size=config["codebook_size"],
        text_dim=config["text_dim"],
        micro_dim=config["micro_hidden"],
        sinusoid_dim=config["freq_size"],
    )


@runner("landiff/lm")
def run_language_model(fixture):
    inputs, want, done = fixture.npz("inputs"), fixture.npz("outputs"), set()
    config = fixture.config
    lm = from_torch("landiff_language_model", fixture.npz("weights"), model_config(config))
    text = jnp.asarray(inputs["text_emb"])

    def check(name, got, **bound):
        done.add(name)
        return Check(name, np.asarray(got), want[name], **(bound or HIDDEN))

    yield from body(lm, config, jnp.asarray(inputs["x"]), check)

    yield check("text_mlp_out", lm.embed_text(text)[0])
    frames, motion = (jnp.asarray(inputs[f"micro_{name}_in"]) for name in ("frames", "motion"))
    yield check("micro_out", lm.embed_numbers(frames, motion))
    sinusoid = timestep_embedding(motion, config["freq_size"])
    yield check("micro_sinusoid_motion", sinusoid)
    absent = lm.embed_numbers(jnp.ones(1), jnp.zeros(1))  # what the release fills in
    yield check("micro_out_defaults", absent)

    for name, scale in (("guided", config["guidance"]), ("plain", 1.0)):
        yield from sampling(lm, config, text, scale, f"sample_{name}_", check)

    logits = jnp.asarray(inputs["topk_in_logits"])
    yield check("topk5_probs", jax.nn.softmax(keep_top_k(logits, 5)), atol=1e-6)
    yield check("topp08_probs", jax.nn.softmax(keep_top_p(logits, 0.8)), atol=1e-6)

    made = lm.lay_out(
        text, jnp.asarray(inputs["layout_codes"]), motion_score=jnp.asarray(inputs["motion"])
    )
    yield check("layout_tokens", made.tokens, exact=True)
    yield check("layout_loss_mask", made.is_learned, exact=True)
    yield check("layout_features", made.features)
    require_all(want, done)


def body(lm, config, x, check):
    """Blocks, cache and scores of an arbitrary sequence, at once and one by one."""
    model, cfg = lm.body, lm.body.cfg
    t, prefill = x.shape[1], config["prefill"]
    tables = rotary_tables(
        jnp.arange(t)[None], rotary_frequencies(cfg.width_of_head, theta=cfg.rope_theta)
    )
    for name, table in zip(("rope_cos", "rope_sin"), tables):
        yield check(name, table[0])
    y, slots = x, jnp.zeros((len(x), t, cfg.num_heads, cfg.width_of_head))
    for i, block in enumerate(model.blocks):
        y, past = block(y, causal_mask(t), (slots, slots), 0, rotary=tables)
        yield check(f"hidden_{i}", y)
        if i == 0:
            kept = jnp.stack(past)
            k, v = check("kv_block0", kept).want  # theirs, in our order
            turned = np.stack([halves_of_pairs(k), v])
            yield Check("kv_block0", np.asarray(kept), turned, **HIDDEN)
    yield check("logits", lm(x), **LOGITS)

    cache = model.init_cache(batch=len(x), size=t)
    step = jax.jit(lambda *args: lm.body(*args))
    hidden, cache = step(x[:, :prefill], None, None, cache)
    outs = [hidden[:, -1:]]
    for i in range(prefill, t):
        hidden, cache = step(x[:, i : i + 1], None, None, cache)
        outs.append(hidden)
    logits = model.logits(jnp.concatenate(outs, axis=1))
    yield check("logits_incremental", logits, **LOGITS)


def sampling(lm, config, text, scale, head, check):
    """Greedy tokens of the scan, and what the model scored on the way."""
    cfg, num_frames = lm.cfg, config["sample_frames"]
    layout, is_guided = cfg.layout(num_frames), scale != 1.0
    rows = 2 if is_guided else 1
    options = {"num_frames": num_frames, "motion_score": config["motion"]}
    options |= {"guidance_scale": scale, "do_sample": False}
    codes = generate.generate(lm, text, **options)
    yield check(f"{head}codes", codes, exact=True)

    numbers = jnp.asarray([[num_frames], [config["motion"]]], jnp.float32)
    prompts = [lm.embed_prompt(text, *numbers), lm.embed_prompt(text, *numbers, jnp.ones(1, bool))]
    prompt = jnp.concatenate(prompts[:rows])
    ends = jnp.asarray([[layout[0], cfg.mark("eos")]] * rows)
    features = jnp.concatenate([prompt, lm.body.embed_tokens(ends)], axis=1)
    yield check(f"{head}prompt_features", features)
    names = np.full((rows, prompt.shape[1]), -100)
    names[:, 0] = cfg.mark("bos")
    yield check(f"{head}prompt_tokens", np.concatenate([names, ends], axis=1), exact=True)

    seen = jnp.concatenate([x for _, x in generate.stream_tokens(lm, text, **options)], axis=1)
    fed = lm.body.embed_tokens(jnp.concatenate([seen] * rows))
    logits = jax.jit(lambda *args: lm(*args))(jnp.concatenate([prompt, fed], axis=1))
    steps = logits[:, prompt.shape[1] :].swapaxes(0, 1)
    yield check(f"{head}logits_rows", steps, **LOGITS)
    last = guide(steps[:, 0], steps[:, 1], scale) if is_guided else steps[:, 0]
    probs = np.array(jax.nn.softmax(last))
    may_end = config.get("predict_eos", False)
    for step, marks in allowed_at(cfg, num_frames, may_end=may_end).items():
        is_allowed = np.isin(np.arange(cfg.body.vocab_size), marks)
        probs[step] = jax.nn.softmax(jnp.where(is_allowed, last[step], -jnp.inf))
    yield check(f"{head}probs", probs, **PROBS)


def allowed_at(
    cfg: LanguageModelConfig, num_frames: int, *, may_end: bool = False
) -> dict[int, tuple[int, ...]]:
    """The marks that alone may be drawn in front of a frame, by step; no step draws the first.

    Args:
      may_end: Whether EOS may stand there too, behind each frame of every segment but the first
        (the release's `predict_eos`).
    """
    layout, eos = cfg.layout(num_frames), cfg.mark("eos")
    marks = cfg.mark("start_iframe"), cfg.mark("start_pframe")
    starts = enumerate(np.flatnonzero(np.isin(layout, marks)).tolist())
    return {
        at - 1: (int(layout[at]), eos)[: 1 + (may_end and frame > cfg.frames.segment)]
        for frame, at in starts
        if frame
    }
