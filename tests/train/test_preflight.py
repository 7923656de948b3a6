"""A full-size config as it is: what is found for it, how it is made to fit, and what is told."""

import dataclasses
import pathlib

import jax
import pytest
import tiny_training
from tiny import tiny_pipeline

from dicode_jax import config as config_lib
from dicode_jax.data.config import DataConfig
from dicode_jax.errors import Faults, UserError
from dicode_jax.runtime.distributed import Processes
from dicode_jax.stages.dicode.configs import ARTrainConfig, TokenizerTrainConfig
from dicode_jax.stages.dicode.reading import settle
from dicode_jax.stages.registry import build_stage
from dicode_jax.training import memory
from train import ar, command, loop, preflight

GB = 10**9


@pytest.fixture(scope="module")
def large():
    return config_lib.load_config_file("configs/gpt2_large.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipe") / "pipe"
    tiny_pipeline().save_pretrained(folder)
    return folder


def said(config, *names):
    return command.Command(
        options=None, processes=Processes(), config=config, said=frozenset(names)
    )


def test_a_full_size_config_takes_all_sizes_from_the_packaged_tokenizer(large):
    config = settle(large)
    assert (config.frame_size, config.model.num_tokens, config.model.token_dim) == (64, 16, 32)
    assert (config.model.pad_token_id, config.model.image_token_id) == (143, 145)
    assert config.model.body == large.model.body
    assert pathlib.Path(config.tokenizer).name == "shapes"
    assert settle(config) == config
    assert build_stage(config).batch_shapes(2)["keyframes"].shape == (2, 25, 64, 64, 3)


def test_sizes_are_those_of_the_tokenizer_that_is_named(large, folder):
    config = settle(dataclasses.replace(large, tokenizer=str(folder)))
    pipe_size = config_lib.read_json(folder / "config.json")[1]["frame_size"]
    assert (config.frame_size, config.model.num_tokens, config.model.token_dim) == (pipe_size, 3, 8)


def test_what_is_found_is_told_and_may_not_be_contradicted(large, capsys):
    config = settle(large)
    preflight.tell_found(said(large), config)
    told = capsys.readouterr().out
    assert "drawn world" in told
    assert "--data.path VIDEOS --tokenizer MODEL" in told
    assert "model.token_dim 1024 -> 32" in told
    wide = dataclasses.replace(large, frame_size=128)
    with pytest.raises(UserError, match=r"--frame-size 128 contradicts .* which say 64"):
        preflight.tell_found(said(wide, "frame_size"), settle(wide))
    preflight.tell_found(said(config, "data.path"), config)
    assert not capsys.readouterr().out


def test_everything_that_is_missing_is_told_at_once_in_order(large):
    config = dataclasses.replace(
        large, data=DataConfig(path="nowhere"), tokenizer="none", text_tokenizer="neither"
    )
    with pytest.raises(UserError) as caught:
        settle(config)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 things to mend:"
    assert lines[1].startswith("  1. nowhere does not exist")
    assert "none/tokenizer" in lines[2]
    assert "no tokenizer in neither" in lines[3]


def test_one_fault_is_one_line_and_none_is_silence():
    faults = Faults()
    faults.tell()
    for _ in range(2):
        with faults.gather():
            raise UserError("a thing")
    with pytest.raises(UserError, match=r"^a thing$"):
        faults.tell()


def test_a_first_try_on_a_cpu_is_small_unless_a_batch_is_said(large, tmp_path, capsys):
    config = settle(dataclasses.replace(large, text_length=4, num_keyframes=2))
    tried = preflight.fit(said(large), config, build_stage, tmp_path)
    assert 1 <= tried.batch_size < 256
    assert tried.validation_examples <= tried.batch_size
    told = capsys.readouterr().out
    assert "batch: 256 would be" in told
    assert "parameters learn" in told
    kept = preflight.fit(said(large, "batch_size"), config, build_stage, tmp_path)
    assert kept.batch_size == 256


@pytest.fixture
def tiny_room(monkeypatch):
    """Room for the state of the tiny model and two of its eight rows."""
    config = tiny_training.TinyConfig()
    config = dataclasses.replace(config, batch_size=8)
    monkeypatch.setattr(memory, "measure", lambda _: memory.Memory(held=1, trained=0))
    monkeypatch.setattr(memory, "row_bytes", lambda *_: GB)
    monkeypatch.setattr(memory, "available", lambda _: (int(2.5 * GB), 9 * GB))
    return config


def test_a_batch_is_split_as_memory_allows(tiny_room, tmp_path, capsys):
    fitted = preflight.fit(said(tiny_room), tiny_room, tiny_training.make_stage, tmp_path)
    assert (fitted.batch_size, fitted.optim.accumulate_steps) == (8, 4)
    assert "batches of 8 in 4 parts of 2" in capsys.readouterr().out
    named = said(tiny_room, "optim.accumulate_steps")
    assert preflight.fit(named, tiny_room, tiny_training.make_stage, tmp_path) == tiny_room


def test_a_run_that_goes_on_keeps_its_parts(tiny_room, tmp_path, monkeypatch):
    parts = dataclasses.replace(tiny_room.optim, accumulate_steps=2)
    earlier = dataclasses.replace(tiny_room, optim=parts)
    config_lib.to_json(earlier, tmp_path / "config.json")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    fitted = preflight.fit(said(tiny_room), tiny_room, tiny_training.make_stage, tmp_path)
    assert fitted == earlier


@pytest.mark.slow
def test_the_tokenizer_of_the_paper_says_what_it_needs_before_it_takes_it(tmp_path, monkeypatch):
    config = settle(config_lib.load_config_file("configs/tokenizer_256.py"))
    assert isinstance(config, TokenizerTrainConfig)
    monkeypatch.setattr(memory, "available", lambda _: (20 * GB, 24 * GB))
    with pytest.raises(UserError, match=r"need 26\.\d GB of each device, which has 24\.0 GB"):
        preflight.fit(said(config), config, build_stage, tmp_path)


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_running_out_of_memory_is_one_line(error, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(loop, "run", fail)
    config = tiny_training.write_config(tmp_path)
    status = tiny_training.main(["--config", str(config), "--workdir", str(tmp_path / "w")])
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--optim.accumulate-steps 2" in line
    assert "--batch-size" in line


def test_other_errors_of_the_runtime_are_not_taken_for_it(tmp_path, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(loop, "run", fail)
    config = tiny_training.write_config(tmp_path)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tiny_training.main(["--config", str(config), "--workdir", str(tmp_path / "w")])


def test_data_and_every_folder_that_is_missing_are_told_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = ["--config", "configs/gpt2_large.py", "--workdir", str(tmp_path / "run")]
    argv += ["--data.path", "nowhere", "--tokenizer", "no tokenizer", "--body-init", "no body"]
    options = {"settle": settle, "build_stage": build_stage}
    assert loop.main("train.ar", ar.build, (ARTrainConfig,), argv, **options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: 3 things to mend:"
    starts = ("1. nowhere does not exist", "2. --tokenizer no tokenizer", "3. --body-init no body")
    for line, start in zip(lines[1:], starts, strict=True):
        assert line.strip().startswith(start)
    assert "python -m train.tokenizer" in lines[2]
    assert "python -m convert" in lines[3]
    assert not (tmp_path / "run").exists()
