"""Which paths the server answers to, without a server."""

import asyncio

import pytest

from dicode_jax.app.routes import OnlyThePage, is_of_the_page


@pytest.mark.parametrize(
    "path",
    [
        "/", "/config", "/login", "/assets/index-1.js", "/theme.css", "/gradio_api/queue/join",
        "/gradio_api/heartbeat/abc", "/gradio_api/file=/tmp/a b/c.mp4", "/gradio_api/upload",
        "/gradio_api/run/predict", "/gradio_api/info/",
    ],
)  # fmt: skip
def test_the_page_is_served(path):
    assert is_of_the_page(path)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/process_recording", "/gradio_api/deep_link", "/gradio_api/component_server/",
        "/gradio_api/proxy=http://a", "/gradio_api/queue/status", "/gradio_api/uploads", "//config",
        "/monitoring/summary", "/docs", "/gradio_api/mcp/", "/gradio_api/config/x", "",
    ],
)  # fmt: skip
def test_nothing_else_is(path):
    assert not is_of_the_page(path)
    said = []

    async def send(message):
        said.append(message)

    async def behind(*of):
        raise AssertionError("it was asked")

    asyncio.run(OnlyThePage(behind)({"type": "http", "path": path}, None, send))
    assert [message.get("status") for message in said] == [404, None]
    reached = []

    async def open_to_all(scope, receive, send):
        reached.append(scope["type"])

    asyncio.run(OnlyThePage(open_to_all)({"type": "lifespan"}, None, send))
    assert reached == ["lifespan"]


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/upload/"])
def test_a_full_server_takes_no_file_and_goes_on_otherwise(path):
    said, reached = [], []

    async def send(message):
        said.append(message)

    async def gradio(scope, receive, send):
        reached.append(scope["path"])

    full, roomy = OnlyThePage(gradio, lambda: False), OnlyThePage(gradio, lambda: True)
    asyncio.run(full({"type": "http", "path": path}, None, send))
    assert said[0]["status"] == 507
    assert b"as many files as it may" in said[1]["body"]
    assert not reached
    asyncio.run(full({"type": "http", "path": "/gradio_api/queue/join"}, None, send))
    asyncio.run(roomy({"type": "http", "path": path}, None, send))
    assert reached == ["/gradio_api/queue/join", path]
