"""What the benchmarks measure is what they say; how fast it is, no test asks."""

import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from test_gpu_kernels import LOOP

from benchmarks import cpu_peers, gpu, gpu_kernels, host_memory, packaged, train_step
from dicode_jax.errors import UserError
from dicode_jax.models.gpt2 import GPT2, GPT2Config
from dicode_jax.nn.rngs import blank
from dicode_jax.runtime import compile_cache
from dicode_jax.stages.registry import build_stage


def test_loss_is_the_mean_over_predictions_of_the_next_token():
    sizes = GPT2Config(num_layers=1, num_heads=2, embed_dim=8, max_seq_len=6, vocab_size=11)
    model = GPT2(sizes, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(0, 11, (3, 5), dtype=np.int32)
    loss, _ = train_step.cross_entropy(model, {"ids": ids}, None)
    hidden, _ = model(model.embed_tokens(ids))
    scores = np.exp(np.asarray(hidden @ model.token_embed.embedding[...].T, np.float64))
    shares = scores / scores.sum(-1, keepdims=True)
    rows, columns = np.indices((3, 4))
    want = -np.log(shares[rows, columns, ids[:, 1:]]).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_without_pytorch_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"pip install -e .*bench") as exit_:
        train_step.compare_language_models(1)
    assert "\n" not in str(exit_.value)


def test_small_tokenizer_has_the_parts_of_the_large_one():
    paths = []
    for config in (train_step.small_tokenizer_config(), train_step.tokenizer_256.get_config()):
        model = blank(lambda rngs, c=config: build_stage(c).create(rngs))
        paths.append({path for path, _ in nnx.to_flat_state(nnx.state(model))})
    small, large = ({path for path in found if path[1] != "vision"} for found in paths)
    assert small == large


def test_peers_run_in_turns_and_the_warm_up_does_not_count(monkeypatch):
    order, clock = [], [0.0]

    def side(name, *seconds):
        left = iter(seconds)

        def call():
            order.append(name)
            clock[0] += next(left)

        return cpu_peers.Side(call, parameters=len(name), flops=3)

    pair = side("ours", 100.0, 1.0, 2.0, 3.0), side("theirs", 200.0, 5.0, 8.0, 4.0)
    monkeypatch.setitem(cpu_peers.PAIRS, "vae", ("a pair", lambda: pair))
    monkeypatch.setattr(cpu_peers.time, "perf_counter", lambda: clock[0])
    result = cpu_peers.compare("vae", rounds=3, warm_up=1)
    assert order == ["ours", "theirs", "theirs", "ours"] * 2
    assert result["median_seconds"] == {"dicode_jax": 2.0, "pytorch": 5.0}
    assert (result["ratio"], result["ratio_of_least"]) == (2.5, 4.0)
    assert result["parameters"] == {"dicode_jax": 4, "pytorch": 6}
    assert "2.50 (least 4.00)" in cpu_peers.row(result)


@pytest.mark.torch
def test_the_denoiser_s_peer_is_of_its_sizes_and_work():
    pytest.importorskip("torch")
    sizes = {"num_frames": 4, "num_tokens": 8, "context_len": 7, "context_dim": 24}
    mine, peer = cpu_peers.dit(embed_dim=32, num_layers=2, num_heads=2, **sizes)
    assert mine.parameters == peer.parameters
    length, layers, products = 7 + 4 * 8, 2, 2
    uncounted = layers * products * 2 * length**2 * 32  # PyTorch's counter passes its attention by
    assert mine.flops == peer.flops + uncounted
    assert peer.call().shape == (1, 32, 4)
    assert mine.call().shape == (1, 4, 8, 4)


def test_without_peers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cpu_peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"torch, diffusers, transformers: pip install") as exit_:
        cpu_peers.require_peers()
    assert "\n" not in str(exit_.value)


def test_a_process_is_timed_to_its_first_clip_and_its_memory_is_its_peak(tmp_path):
    part, signal = tmp_path / "out.part.mp4", "import pathlib, sys, time; time.sleep(0.2); "
    signal += "pathlib.Path(sys.argv[1]).touch(); x = bytearray(10**8); time.sleep(0.2); del x; "
    done = packaged.run([sys.executable, "-c", signal + "time.sleep(0.2)", str(part)], part, {})
    assert 0.2 <= done.first_clip <= done.seconds - 0.4
    assert 10**8 < done.peak_bytes < 2 * 10**8
    with pytest.raises(SystemExit, match="no such thing"):
        packaged.run([sys.executable, "-c", "raise SystemExit('no such thing')"], part, {})


def test_starts_are_medians_behind_one_that_compiles(monkeypatch):
    asked, seconds = [], iter([90.0, 200.0, 3.0, 30.0, 9.0, 50.0, 4.0, 40.0])

    def generate(num_clips, programs, *options):
        asked.append((num_clips, options))
        took = next(seconds)
        return packaged.Run(took, took / 10, 0)

    monkeypatch.setattr(packaged, "generate", generate)
    report = packaged.measure(3, "--quality", "draft")
    assert report["first_start"] == {"one clip": 90.0, "a minute": 200.0}
    assert report["median"] == {"a minute's first clip": 4.0, "one clip": 4.0, "a minute": 40.0}
    assert asked == [(count, ("--quality", "draft")) for count in [1, 30] * 4]


def test_peaks_are_compared_behind_a_start_that_does_not_count(monkeypatch):
    peaks = iter([900, 100, 110, 111, 121])
    monkeypatch.setattr(host_memory, "generate", lambda *_: packaged.Run(1.0, None, next(peaks)))
    report = host_memory.measure([5, 300], steps=2, rounds=2)
    assert report["peak_bytes"] == {5: [100, 110], 300: [111, 121]}
    assert report["ratio"] == 1.1


@pytest.fixture
def quick_compiler():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.long
@pytest.mark.usefixtures("quick_compiler")
def test_the_script_for_gpus_runs_in_small(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--out", str(out)])
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]] == [
        "clip, 3 steps",
        "language model, a token",
        "2 clips of a video, 3 steps, the first",
        "2 clips of a video, 3 steps, the second",
        "clip, 2 steps",
        "2 clips at once, 2 steps, a clip",
    ]
    assert all(row["seconds"] > 0 for row in report["rows"])
    assert not report["left_out"]
    assert 1 <= len(report["costliest"]) <= gpu.TOP
    assert 0 < sum(op["share"] for op in report["costliest"]) <= 1 + 1e-9
    shown = capsys.readouterr().out
    assert "no bounds: the rates of this chip" in shown
    assert all(row["name"] in shown for row in report["rows"])


def test_the_script_for_gpus_names_all_that_it_has_no_time_for(monkeypatch, capsys):
    monkeypatch.setattr(compile_cache, "use", lambda: None)
    gpu.main(["--tiny", "--minutes", "-1"])
    assert [line for line in capsys.readouterr().out.splitlines() if "no time" in line] == [
        "no time left: clip, 3 steps",
        "no time left: language model, a token",
        "no time left: 2 clips of a video, 3 steps",
        "no time left: clip, 2 steps",
        "no time left: profile",
        "no time left: 2 clips at once, 2 steps, a clip",
    ]


def test_a_bound_is_that_of_the_chip():
    h200 = gpu_kernels.summary(gpu_kernels.kernels(LOOP))["bound_seconds"]
    assert gpu.bound(LOOP, "NVIDIA H200") == pytest.approx(h200)
    assert gpu.bound(LOOP, "NVIDIA H100 80GB HBM3") == pytest.approx(h200 * 4.8 / 3.35)  # of bytes
    assert gpu.bound(LOOP, "cpu") is None


def test_what_has_no_time_left_is_named(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock[0])

    def make():
        clock[0] += 20.0  # compiling

        def call():
            clock[0] += 5.0

        return call, {"bound": 2.0}

    measured = gpu.Measured(minutes=1.0, rounds=2)
    for name in "abc":
        measured.row(name, make, per=2)
    (row,) = measured.rows
    assert (row["name"], row["seconds"], row["compile_seconds"]) == ("a", 2.5, 20.0)
    assert row["measured_over_bound"] == 2.5
    assert measured.left_out == ["b", "c"]


def test_without_a_gpu_one_line_names_the_small_form():
    with pytest.raises(UserError, match="jax finds no GPU here but a cpu; --tiny runs on it"):
        gpu.main([])
