"""The server against clients that obey no page. Skipped where Gradio is not installed."""

import contextlib
import json
import pathlib
import socket
import threading
import time
import urllib.parse

import pytest
from app_server import LIMITS, Client, file_of, free_port, serving
from grey_pipeline import NAME, GreyPipeline, grey_model
from PIL import Image

from dicode_jax.errors import UserError

pytest.importorskip("gradio")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of Gradio are its own to mend


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """An address, the folder that is served, and the pipeline."""
    folder, pipe = tmp_path_factory.mktemp("models"), GreyPipeline()
    with serving(folder, grey_model(folder), grey_model(folder, name="other"), pipe=pipe) as at:
        yield at, pipe


@pytest.fixture
def client(house):
    return Client(house[0])


def test_a_prompt_becomes_a_video_that_can_be_fetched(client):
    said = client.paint(clips=2, prompt="<script>alert(1)</script>")
    assert "s of video, painted in" in said
    path = said.split("script-alert-1-script-0.mp4")[0].rpartition('"')[2]
    got = client.http.get(f"/gradio_api/file={path}script-alert-1-script-0.mp4")
    assert got.status_code == 200
    assert got.content[4:8] == b"ftyp"


@pytest.mark.parametrize(
    ("wish", "line"),
    [
        ({"clips": 1000}, "1000"),
        ({"clips": "many"}, ""),
        ({"prompt": "x" * 41}, "at most 40"),
        ({"seed": -5}, ""),
        ({"seed": 2**40}, ""),
        ({"quality": "superb"}, ""),
        ({"model": "/etc"}, ""),
        ({"start": file_of("/etc/passwd")}, ""),
        ({"start": file_of(str(pathlib.Path("pyproject.toml").resolve()))}, ""),
        ({"start": file_of("http://127.0.0.1:1/a.png")}, "no file that was uploaded here"),
        ({"start": file_of("https://example.org/a.png")}, "no file that was uploaded here"),
        ({"last": file_of("/etc/passwd")}, ""),
        ({"start": "/etc/passwd"}, ""),
    ],
)
def test_limits_hold_without_the_page(client, house, wish, line):
    before = len(house[1].asked)
    said = client.paint(**wish)
    assert line in said
    assert "s of video" not in said
    assert "root:" not in said
    assert len(house[1].asked) == before


def test_a_file_beyond_the_limit_is_not_taken(client):
    sent = client.http.post(
        "/gradio_api/upload", files={"files": ("a.png", b"x" * (LIMITS.file_bytes + 1))}
    )
    assert sent.status_code == 413


def test_an_upload_is_what_a_video_begins_with(client, house, tmp_path):
    Image.new("RGB", (20, 20), (99, 99, 99)).save(tmp_path / "in.png")
    path = client.upload("in.png", (tmp_path / "in.png").read_bytes())
    assert "s of video" in client.paint(start=file_of(path))
    assert house[1].asked[-1]["image"].mean() == 99


def test_a_broken_upload_is_told_without_its_path(client):
    path = client.upload("broken.mp4", b"nothing at all")
    said = client.paint(start=file_of(path))
    assert "Not painted: broken.mp4" in said


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "pyproject.toml", "../pyproject.toml", "{root}/../../etc/passwd"]
)
def test_no_file_of_the_machine_is_served(client, path):
    uploaded = client.upload("a.png", b"x")
    root = pathlib.Path(uploaded).parents[1]
    for asked in (path.format(root=root), str(pathlib.Path(path).resolve())):
        got = client.http.get(f"/gradio_api/file={urllib.parse.quote(asked)}")
        assert got.status_code in (403, 404)
        assert b"root:" not in got.content
        assert b"build-backend" not in got.content


def test_calls_by_name_and_the_pages_of_the_server_itself_are_closed(client):
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert client.http.get(path).status_code == 404
    named = client.http.get("/gradio_api/info").json()
    assert named == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_only_what_the_page_asks_for_is_served(client, tmp_path):
    """Gradio runs FFmpeg's command on recordings, which reads playlists and fetches addresses."""
    sent = client.http.post("/gradio_api/process_recording", files={"video": ("a.mp4", b"x")})
    assert sent.status_code == 404
    client.paint()
    for path in (
        f"/gradio_api/deep_link?session_hash={client.session}", "/monitoring/summary",
        "/gradio_api/queue/status", "/gradio_api/vibe-code", "/gradio_api/file/etc/passwd",
    ):  # fmt: skip
        assert client.http.get(path).status_code == 404
    for path in ("component_server", "api/predict", "call/run"):
        assert client.http.post(f"/gradio_api/{path}", json={}).status_code == 404


def test_the_page_asks_no_other_server(client):
    policy = client.http.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self' ")
    assert "http" not in policy


def test_nobody_sees_what_another_one_painted(house):
    one, other = Client(house[0]), Client(house[0])
    one.paint(prompt="mine")
    assert "mine (0)" not in other.paint(prompt="theirs")
    assert "mine (0)" in one.paint(prompt="again")


def test_the_queue_has_an_end(tmp_path):
    pipe, gate, reached = GreyPipeline(), threading.Event(), threading.Event()
    pipe.before = lambda index: (reached.set(), gate.wait(20))
    with serving(tmp_path, pipe=pipe) as address:
        client = Client(address)
        wish = [None, 1, NAME, "grey", 0, 1, 4, "standard", None, None]
        run = client.event(10, 9)
        joined = [client.join(run, *wish)]
        assert reached.wait(20)
        joined += [client.join(run, *wish) for _ in range(LIMITS.waiting + 1)]
        gate.set()
    assert [one.status_code for one in joined[:-1]] == [200] * (LIMITS.waiting + 1)
    assert joined[-1].status_code in (429, 503)


def test_a_wish_that_was_stopped_in_the_queue_is_not_painted_with_the_next(tmp_path):
    pipe, gate, reached = GreyPipeline(), threading.Event(), threading.Event()
    pipe.before = lambda index: (reached.set(), gate.wait(20))
    with serving(tmp_path, pipe=pipe) as address:
        other, client = Client(address), Client(address)
        run, wish = client.event(10, 9), [0, 1, 4, "standard", None, None]
        other.join(run, None, other.ask(), NAME, "other", *wish)
        assert reached.wait(20)
        client.join(run, None, client.ask(), NAME, "old", *wish)
        client.call(1, 9, None)  # Stop
        client.join(run, None, client.ask(), NAME, "new", *wish)
        gate.set()
        said = json.dumps(client.messages(events=2))
    assert "Stopped. No clip was there yet." in said
    assert "new (0)" in said
    assert "old (0)" not in said
    assert len(pipe.asked) == 2


def test_a_password_keeps_others_out(tmp_path):
    with serving(tmp_path, auth=("me", "secret")) as address:
        client = pytest.importorskip("httpx").Client(base_url=address, trust_env=False)
        for path in ("/config", "/gradio_api/info", "/gradio_api/file=/tmp/a"):
            assert client.get(path).status_code == 401
        sent = client.post("/gradio_api/upload", files={"files": ("a.png", b"x")})
        assert sent.status_code == 401
        assert client.post("/login", data={"username": "me", "password": "x"}).status_code == 400
        client.post("/login", data={"username": "me", "password": "secret"}).raise_for_status()
        assert client.get("/config").status_code == 200


def test_all_files_are_gone_when_it_ends(tmp_path):
    with serving(tmp_path) as address:
        client = Client(address)
        root = pathlib.Path(client.upload("a.png", b"x")).parents[1]
        client.paint()
        assert any(root.rglob("*.mp4"))
    assert not root.exists()


def test_a_port_that_is_taken_is_a_mistake_of_one_line(house, tmp_path):
    from dicode_jax.app import page

    port = int(house[0].rpartition(":")[2])
    model = {NAME: grey_model(tmp_path)}
    with (
        pytest.raises(UserError, match=rf"cannot listen on 127.0.0.1, port {port}"),
        page.serving(model, host="127.0.0.1", port=port, load=lambda folder: GreyPipeline()),
    ):
        pass


def test_an_address_of_ipv6_can_be_followed(tmp_path):
    from dicode_jax.app import page

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        port = free_port()
        model = {NAME: grey_model(tmp_path)}
        with page.serving(model, host="::1", port=port, load=lambda folder: GreyPipeline()) as at:
            assert at == f"http://[::1]:{port}"
            assert Client(at).events


def test_a_model_that_is_broken_is_known_before_it_is_served(tmp_path):
    from dicode_jax.app import page

    def load(folder):
        raise UserError("its weights are cut short")

    start = time.monotonic()
    model = {NAME: grey_model(tmp_path)}
    with (
        pytest.raises(UserError, match="its weights are cut short"),
        page.serving(model, host="127.0.0.1", port=1, load=load),
    ):
        pass
    assert time.monotonic() - start < 20
