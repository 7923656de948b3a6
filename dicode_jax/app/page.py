"""The page itself, made with Gradio. What it is asked for is checked by `painter`, not here.

Prompts and names of files go into plain text boxes and captions alone: nothing that a visitor types
becomes markup. Nothing is asked of the network, neither by the server nor by the page.
"""

import contextlib
import functools
import os
import pathlib
import random
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import gradio  # pyright: ignore[reportMissingImports]
from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]

from dicode_jax.app.limits import Limits, has_room
from dicode_jax.app.models import Model
from dicode_jax.app.painter import News, Painter, Wish
from dicode_jax.app.routes import OnlyThePage
from dicode_jax.app.session import Made, Session
from dicode_jax.errors import UserError
from dicode_jax.pipelines import options

__all__ = ["build", "serving"]

gr: Any = gradio  # an extra, which type checkers see or do not see

_FONTS = ["system-ui", "sans-serif"]  # no fonts of other servers
_DAY = 24 * 3600
_PREVIEW = 320  # pixels
_PRIVATE = {"api_visibility": "private"}
_CSS = """
.gradio-container {max-width: 1180px !important; width: 100%; margin: auto;}
#video video, #tokens img, #history img, #preview img {image-rendering: pixelated;}
.bar {height: 8px; border-radius: 4px; background: var(--neutral-200); overflow: hidden;}
.bar > div {height: 8px; background: var(--color-accent);}
#examples button {font-size: var(--text-xs);}
#length {flex-wrap: nowrap;}
#length .form {min-width: 0 !important;}
#dice {font-size: 22px; align-self: stretch;}
#preview img {max-height: 140px; object-fit: contain;}
#history [data-testid="block-label"] {position: static; width: fit-content;}
#history .caption-label {font-size: var(--text-xs); max-width: 100%; left: 0; right: 0;}
#history .grid-wrap {min-height: 0;}
"""
_NO_PAGES = {"docs_url": None, "redoc_url": None, "openapi_url": None}
_LAUNCH = {
    "css": _CSS,
    "footer_links": [],
    "allowed_paths": [],
    "share": False,
    "ssr_mode": False,
    "mcp_server": False,
    "pwa": False,
    "enable_monitoring": False,
    "show_error": False,
    "quiet": True,
    "prevent_thread_lock": True,
}


def _upload(**looks: Any) -> Any:
    """A file of the visitor's own machine; Gradio's component would also fetch an address."""
    upload = gr.File(height=120, **looks)
    move, move_later = (
        upload.move_resource_to_block_cache,
        upload.async_move_resource_to_block_cache,
    )

    def check(path: Any) -> None:
        if "://" in str(path):
            raise gr.Error("this is no file that was uploaded here", print_exception=False)

    def checked(path: Any) -> str | None:
        check(path)
        return move(path)

    async def checked_later(path: Any) -> str | None:
        check(path)
        return await move_later(path)

    upload.move_resource_to_block_cache = checked
    upload.async_move_resource_to_block_cache = checked_later
    return upload


@contextlib.contextmanager
def serving(
    models: Mapping[str, Model],
    *,
    host: str,
    port: int,
    auth: tuple[str, str] | None = None,
    limits: Limits | None = None,
    load: Any = None,
) -> Iterator[str]:
    """Serves the page inside the block and gives its address; all files of visitors go after it.

    Args:
      models: Of the picker, the first one chosen.
      host, port: Where to listen.
      auth: Name and password that visitors must know.
      limits: The usual ones by default.
      load: Folder to pipeline; `dicode_jax.load` by default.

    Raises:
      UserError: The first model is broken, or the address is taken.
    """
    limits, named = limits or Limits(), f"[{host}]" if ":" in host else host
    with tempfile.TemporaryDirectory(prefix="dicode-app-") as root, _environment(root):
        folder = pathlib.Path(root).resolve()
        how = {} if load is None else {"load": load}
        painter = Painter(models, folder, limits, **how)
        painter.preload(next(iter(models)))
        blocks = build(painter)
        room = functools.partial(has_room, folder, limits)
        try:
            blocks.launch(
                server_name=named,
                server_port=port,
                auth=auth,
                theme=gr.themes.Soft(
                    primary_hue="indigo", font=_FONTS, font_mono=["ui-monospace", "monospace"]
                ),
                max_file_size=limits.file_bytes,
                app_kwargs=_NO_PAGES | {"middleware": [Middleware(OnlyThePage, room)]},
                **_LAUNCH,
            )
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}, port {port}: {error}; name another --port"
            ) from error
        try:
            yield f"http://{named}:{port}"
        finally:
            blocks.close(verbose=False)
            painter.close()


@contextlib.contextmanager
def _environment(root: str) -> Iterator[None]:
    """What Gradio reads of the environment: where it keeps files, and that it tells nobody."""
    wanted = {
        "GRADIO_TEMP_DIR": root,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def build(painter: Painter) -> Any:
    """The page of a painter, a `gradio.Blocks`, which is served with `launch`."""
    limits, models = painter.limits, painter.models
    first = next(iter(models.values()))
    with gr.Blocks(title="dicode", analytics_enabled=False, delete_cache=(3600, _DAY)) as page:
        session = gr.State(painter.session(), time_to_live=_DAY, delete_callback=Session.close)
        gr.Markdown("# dicode\nType what to show. Clips appear as they are painted.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5):
                model = gr.Dropdown(
                    list(models), value=first.name, label="Model", elem_id="model",
                    visible=len(models) > 1,
                )  # fmt: skip
                prompt = gr.Textbox(
                    label="Prompt", lines=2, max_length=limits.prompt, elem_id="prompt",
                    placeholder="what to show",
                )  # fmt: skip
                examples = gr.Dataset(
                    label="Examples", components=[prompt], elem_id="examples", type="values",
                    samples=[[one] for one in first.examples], visible=bool(first.examples),
                )  # fmt: skip
                with gr.Row(elem_id="length"):
                    clips = gr.Slider(
                        1, limits.clips, value=2, step=1, label="Clips", elem_id="clips",
                        min_width=140, scale=3, visible=first.has_clips,
                    )  # fmt: skip
                    frames = gr.Slider(
                        1, limits.frames, value=first.num_frames or 1, step=1, label="Frames",
                        elem_id="frames", min_width=140, scale=3, visible=first.has_frames,
                    )  # fmt: skip
                    seed = gr.Number(
                        0, label="Seed", precision=0, minimum=0, maximum=options.MAX_SEED,
                        elem_id="seed", min_width=110, scale=2,
                    )  # fmt: skip
                    dice = gr.Button("⚄", elem_id="dice", min_width=48, scale=0)
                quality = gr.Radio(
                    list(options.QUALITIES), value="standard", label="Quality", elem_id="quality",
                    visible=first.has_presets,
                )  # fmt: skip
                with gr.Accordion("Begin with a picture or a video", open=False) as given:
                    start = _upload(label=_begins(first), elem_id="start")
                    preview = gr.Image(
                        show_label=False, interactive=False, visible=False, elem_id="preview",
                        buttons=[], format="png",
                    )  # fmt: skip
                    last = _upload(
                        label="End with a picture", elem_id="last",
                        visible="last_image" in first.takes,
                    )  # fmt: skip
                with gr.Row():
                    paint = gr.Button("Paint", variant="primary", elem_id="paint")
                    stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
            with gr.Column(scale=6):
                video = gr.Video(
                    show_label=False, interactive=False, autoplay=True, loop=True, height=400,
                    elem_id="video", buttons=[],
                )  # fmt: skip
                bar = gr.HTML(_bar(0), elem_id="bar")
                said = gr.Textbox(
                    "Nothing painted yet.", label="Progress", interactive=False, elem_id="said",
                    lines=2, max_lines=4,
                )  # fmt: skip
                download = gr.DownloadButton(
                    "Download", interactive=False, elem_id="download", size="md"
                )
                tokens = gr.Image(
                    show_label=False, interactive=False, visible=False,
                    elem_id="tokens", buttons=["download"], format="png",
                )  # fmt: skip
        history = gr.Gallery(
            label="Painted on this page", columns=6, height=215, allow_preview=False,
            interactive=False, elem_id="history", object_fit="contain", buttons=[],
            fit_columns=False,
        )  # fmt: skip

        controls = [examples, clips, frames, quality, given, start, last]
        model.change(lambda name: _controls(models[name]), model, controls, queue=False, **_PRIVATE)
        examples.click(lambda sample: sample[0], examples, prompt, queue=False, **_PRIVATE)
        dice.click(
            lambda: random.randrange(options.MAX_SEED + 1), None, seed, queue=False, **_PRIVATE
        )

        def look(path):
            if path is None:
                return gr.update(visible=False, value=None), gr.update()
            try:
                pixels = painter.look(path)
            except UserError as error:
                return gr.update(visible=False, value=None), f"Not painted: {error}"
            small = pixels[:: -(-len(pixels) // _PREVIEW), :: -(-pixels.shape[1] // _PREVIEW)]
            return gr.update(visible=True, value=small), gr.update()

        start.change(look, start, [preview, said], show_progress="hidden", **_PRIVATE)

        number = gr.Number(visible=False)  # of a wish, which goes with it
        shown = [video, bar, said, download, tokens]
        ends = [*shown, history, paint, stop, session]

        def wait(session):
            off, on = gr.update(interactive=False), gr.update(interactive=True)
            return "Waiting.", _bar(0), off, on, session.ask()

        def run(session, number, *wish):
            asked = Wish(**dict(zip(_WISH, wish, strict=True)))
            is_made = False
            if not session.is_wanted(number):  # stopped before its turn came
                yield *_nothing("Stopped. No clip was there yet."), *_idle(session, True)
                return
            try:
                for news in painter.run(session, asked):
                    is_made = news.made is not None
                    yield *_news(news), *_idle(session, is_made)
            except UserError as error:
                yield *_nothing(f"Not painted: {error}"), *_idle(session, True)

        def halt(session):
            part = session.stop()
            if part is None:
                return *_nothing("Stopped. No clip was there yet."), *_idle(session, True)
            return *_result(part), *_idle(session, True)

        def pick(session, event: gradio.SelectData):
            if not (isinstance(event.index, int) and 0 <= event.index < len(session.history)):
                return [gr.update()] * (len(shown) + 2)
            made = session.history[event.index]
            return *_result(made), made.prompt, made.seed

        wishes = [model, prompt, seed, clips, frames, quality, start, last]
        begun = gr.on(
            [paint.click, prompt.submit], wait, session, [said, bar, paint, stop, number],
            queue=False, show_progress="hidden", **_PRIVATE,
        )  # fmt: skip
        begun.then(
            run, [session, number, *wishes], ends, concurrency_limit=1, concurrency_id="paint",
            show_progress="minimal", show_progress_on=said, **_PRIVATE,
        )  # fmt: skip
        # Without Gradio's `cancels`, which may come late, and take what was asked for since.
        stop.click(halt, session, ends, queue=False, show_progress="hidden", **_PRIVATE)
        history.select(pick, session, [*shown, prompt, seed], queue=False, **_PRIVATE)
        page.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)
    return page


_WISH = ("model", "prompt", "seed", "num_clips", "num_frames", "quality", "start", "last")


def _controls(model: Model) -> list[Any]:
    """What the page shows of a model."""
    samples = [[one] for one in model.examples]
    return [
        gr.update(samples=samples, visible=bool(samples)),
        gr.update(visible=model.has_clips),
        gr.update(visible=model.has_frames, value=model.num_frames or 1),
        gr.update(visible=model.has_presets),
        gr.update(visible=bool({"image", "video"} & model.takes)),
        gr.update(label=_begins(model)),
        gr.update(visible="last_image" in model.takes),
    ]


def _begins(model: Model) -> str:
    kinds = [("image", "a picture"), ("video", "a video")]
    return f"Begin with {' or '.join(word for name, word in kinds if name in model.takes)}"


def _bar(done: float) -> str:
    return f'<div class="bar"><div style="width: {100 * float(done):.1f}%"></div></div>'


def _news(news: News) -> list[Any]:
    """Video, bar, line, download and tokens after news."""
    if news.made is not None:
        return _result(news.made)
    video = gr.update() if news.video is None else str(news.video)
    none = gr.update(interactive=False)
    return [video, _bar(news.done), news.said, none, gr.update(visible=False)]


def _result(made: Made) -> list[Any]:
    """The same for a video of the history."""
    tokens = gr.update(visible=made.tokens is not None, value=made.tokens and str(made.tokens))
    download = gr.update(interactive=True, value=str(made.video))
    return [str(made.video), _bar(1), made.said, download, tokens]


def _nothing(said: str) -> list[Any]:
    """The same where nothing was made."""
    return [gr.update(), _bar(0), said, gr.update(), gr.update()]


def _idle(session: Session, is_idle: bool) -> list[Any]:
    """The history, the two buttons, and the visitor, who is forgotten so long after his last."""
    if not is_idle:
        return [*[gr.update()] * 3, session]
    entries = [(str(made.picture), _caption(made)) for made in session.history]
    return [
        gr.update(value=entries),
        gr.update(interactive=True),
        gr.update(interactive=False),
        session,
    ]


def _caption(made: Made) -> str:
    prompt = made.prompt if len(made.prompt) <= 60 else f"{made.prompt[:57]}..."
    return f"{prompt} ({made.seed})"
