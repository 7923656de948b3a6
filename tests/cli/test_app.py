"""`dicode app` before it serves: what it needs, and what it is told."""

import contextlib
import importlib.metadata
import sys
import threading
import types

import pytest

from dicode_jax import cli


@pytest.fixture
def gradio(monkeypatch):
    """Which Gradio is installed: a function that says so."""

    def install(version):
        known = importlib.metadata.version

        def asked(name):
            if name != "gradio":
                return known(name)
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", asked)

    return install


@pytest.fixture
def served(monkeypatch, gradio):
    """What the page is served with, once each; it ends at once."""
    gradio("6.31.0")
    calls = []

    @contextlib.contextmanager
    def serving(models, **how):
        calls.append((models, how))
        yield f"http://{how['host']}:{how['port']}"

    page = types.SimpleNamespace(serving=serving)
    monkeypatch.setitem(sys.modules, "dicode_jax.app.page", page)
    monkeypatch.setattr("dicode_jax.app.page", page, raising=False)
    monkeypatch.setattr(threading.Event, "wait", lambda self: None)
    return calls


@pytest.mark.parametrize("version", [None, "5.49.1", "6.30.2", "nonsense"])
def test_without_gradio_one_line_says_what_to_install(capsys, gradio, version):
    gradio(version)
    assert cli.main(["app"]) == 2
    said = capsys.readouterr()
    assert said.err == (
        "dicode: error: dicode app needs Gradio 6.31 or newer; install it: "
        'pip install "dicode-jax[app]"\n'
    )
    assert said.out == ""


def test_it_listens_on_this_machine_alone_unless_told(capsys, served):
    assert cli.main(["app"]) == 0
    said = capsys.readouterr()
    assert said.out == "http://127.0.0.1:7860  (Ctrl-C ends it)\n"
    assert said.err == ""
    (models, how), *_ = served
    assert next(iter(models)) == "shapes"
    assert how["auth"] is None
    assert how["limits"].clips == 10


def test_all_options_reach_the_page(capsys, served):
    options = "--model shapes --host 0.0.0.0 --port 80 --auth me:se:cret --max-clips 3"
    assert cli.main(["app", *options.split()]) == 0
    assert capsys.readouterr().err == ""
    (models, how), *_ = served
    assert next(iter(models)) == "shapes"
    assert (how["host"], how["port"], how["auth"]) == ("0.0.0.0", 80, ("me", "se:cret"))
    assert how["limits"].clips == 3


def test_other_machines_without_a_password_are_warned_of(capsys, served):
    assert cli.main(["app", "--host", "0.0.0.0"]) == 0
    assert capsys.readouterr().err == (
        "dicode: warning: whoever reaches 0.0.0.0 can use this machine; --auth USER:PASS asks "
        "visitors for a password\n"
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--auth", "me"], "want USER:PASS"),
        (["--auth", ":secret"], "want USER:PASS"),
        (["--auth", "me:"], "want USER:PASS"),
        (["--port", "0"], "from 1 to 65535"),
        (["--max-clips", "0"], "from 1 to 1800"),
        (["--model", "missing"], "missing"),
        (["--share"], "unknown option --share"),
    ],
)
def test_a_mistake_is_one_line(capsys, served, options, line):
    assert cli.main(["app", *options]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert "secret" not in said
    assert served == []
