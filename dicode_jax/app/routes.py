"""What the server answers to: what the page asks for, and nothing else that Gradio serves.

Gradio also turns any video with FFmpeg's command, which follows playlists and opens addresses, keeps
copies of pages for links, and shows figures of the queue; none of these is within our limits.
"""

import re
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


def is_of_the_page(path: str) -> bool:
    """Whether the page asks for such a path of the server."""
    return _OF_THE_PAGE.fullmatch(path) is not None


class OnlyThePage:
    """Answers 404 to all other paths, before Gradio sees them: an ASGI middleware."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or is_of_the_page(scope["path"]):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body"})
