"""Configurations of original models: whatever a file holds, it is read or refused on one line."""

import os

import pytest

from convert.engine.yaml import read_options
from dicode_jax.errors import UserError

LAUGHS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)
)


def test_the_arguments_of_the_model_are_read(tmp_path):
    (tmp_path / "c.yaml").write_text("model:\n  target: x.Y\n  params: {a: 1, b: [2, null]}\n")
    assert read_options(tmp_path / "c.yaml") == {"a": 1, "b": [2, None]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("day: 2024-99-99", "not a readable YAML file: month must be in 1..12"),
        ("n: " + "9" * 5000, "not a readable YAML file: Exceeds the limit"),
        ("n: " + "[" * 3000 + "]" * 3000, "not a readable YAML file: maximum recursion depth"),
        (LAUGHS, "holds aliases"),
        ("a: &a [*a]", "holds aliases"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: {b: \x1b]0;x}", "not a readable YAML file"),
        ("- 1", "holds no configuration"),
        ("# " + "x" * (1 << 16), "too large"),
    ],
)
def test_a_hostile_file_is_refused_on_one_line(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        read_options(tmp_path / "c.yaml")
    assert "\n" not in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="is a pipe"):
        read_options(tmp_path / "c.yaml")
