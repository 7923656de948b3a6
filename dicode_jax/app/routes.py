"""What the server answers to: what the page asks for, and nothing else that Gradio serves.

Browsers are told to ask no other server for anything: Gradio's own page may name a script of one.

Gradio also turns any video with FFmpeg's command, which follows playlists and opens addresses,
keeps copies of pages for links, and shows figures of the queue; none of these is within our limits.
"""

import re
from collections.abc import Callable
from typing import Any

__all__ = ["OnlyThePage", "is_of_the_page"]

_FIXED = ("config", "login", "logout", "favicon.ico", "manifest.json", "robots.txt", "theme.css")
_CALLS = ("app_id", "cancel", "info", "login_check", "queue/data", "queue/join", "reset")
_CALLS += ("run/predict", "startup-events", "theme.css", "token", "upload", "upload_progress")
_CALLS += ("user",)
_ALL = (
    rf"/(?:{'|'.join(map(re.escape, _FIXED))})?/?",
    r"/(?:assets|static|svelte)/.*",
    rf"/gradio_api/(?:{'|'.join(map(re.escape, _CALLS))})/?",
    r"/gradio_api/(?:heartbeat/|file=).*",
)
_OF_THE_PAGE = re.compile("|".join(_ALL), re.DOTALL)
_UPLOAD = "/gradio_api/upload"
_IS_FULL = b"this server keeps as many files as it may; try again later"
_POLICY = (
    b"content-security-policy",
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
)


def is_of_the_page(path: str) -> bool:
    """Whether the page asks for such a path of the server."""
    return _OF_THE_PAGE.fullmatch(path) is not None


class OnlyThePage:
    """Answers 404 to all other paths, before Gradio sees them: an ASGI middleware.

    All answers say that what is shown is of this server alone.

    Args:
      app: Gradio's.
      has_room: Whether a file may be uploaded; 507 is answered where not.
    """

    def __init__(self, app: Any, has_room: Callable[[], bool] = lambda: True):
        self._app, self._has_room = app, has_room

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_on(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), _POLICY]}
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not is_of_the_page(scope["path"]):
            status, said = 404, b""
        elif scope["path"].rstrip("/") == _UPLOAD and not self._has_room():
            status, said = 507, _IS_FULL
        else:
            await self._app(scope, receive, send_on)
            return
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": said})
