"""The page, served with the grey pipeline, and what a client sends that obeys no page."""

import contextlib
import json
import secrets
import socket

from grey_pipeline import NAME, GreyPipeline, grey_model

from dicode_jax.app.limits import Limits

LIMITS = Limits(clips=3, prompt=40, frames=20, file_bytes=20_000, waiting=2)
WAIT = 30  # seconds


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(folder, *models, pipe=None, **options):
    """Gives the address of a page with the grey pipeline under the names of the models."""
    from dicode_jax.app import page

    pipe = pipe or GreyPipeline()
    offered = {model.name: model for model in models or [grey_model(folder)]}
    with page.serving(
        offered, host="127.0.0.1", port=free_port(), limits=LIMITS, load=lambda folder: pipe,
        **options,
    ) as address:  # fmt: skip
        yield address


class Client:
    """Speaks to the server as the page's own script does, with whatever data it likes."""

    def __init__(self, address):
        import httpx

        self.http = httpx.Client(base_url=address, timeout=WAIT, trust_env=False)
        self.session = secrets.token_hex(8)
        self.events = self.http.get("/config").json()["dependencies"]

    def event(self, inputs, outputs):
        """Number of the event with so many inputs and outputs."""
        (found,) = (
            one["id"]
            for one in self.events
            if (len(one["inputs"]), len(one["outputs"])) == (inputs, outputs)
        )
        return found

    def upload(self, name, content):
        """The path on the server."""
        sent = self.http.post("/gradio_api/upload", files={"files": (name, content)})
        assert sent.status_code == 200, sent.text
        return sent.json()[0]

    def join(self, event, *data):
        return self.http.post(
            "/gradio_api/queue/join",
            json={"data": data, "fn_index": event, "session_hash": self.session},
        )

    def messages(self, events=1):
        """All that the server says until so many events are over."""
        found = []
        path = f"/gradio_api/queue/data?session_hash={self.session}"
        with self.http.stream("GET", path) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    found.append(json.loads(line[5:]))
                    events -= found[-1]["msg"] in ("process_completed", "unexpected_error")
                    if not events:
                        break
        return found

    def call(self, inputs, outputs, *data):
        """What the server answers to an event that does not wait in the queue."""
        sent = {"data": data, "fn_index": self.event(inputs, outputs), "session_hash": self.session}
        answer = self.http.post("/gradio_api/run/predict", json=sent)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def ask(self):
        """The number of a wish that is about to be joined."""
        return self.call(1, 5, None)[-1]

    def paint(self, **changes):
        """What the server answers to a wish, as text."""
        wish = {
            "model": NAME, "prompt": "grey", "seed": 0, "clips": 1, "frames": 4,
            "quality": "standard", "start": None, "last": None,
        } | changes  # fmt: skip
        joined = self.join(self.event(10, 9), None, self.ask(), *wish.values())
        assert joined.status_code == 200, joined.text
        return json.dumps(self.messages())


def file_of(path, **more):
    """An uploaded file as the page's script names it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}} | more
