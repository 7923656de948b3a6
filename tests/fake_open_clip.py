"""An installed `open_clip_torch` that must not be imported."""

import gzip

from dicode_jax.text import clip


def install(folder, monkeypatch, merges):
    """Puts the distribution on `sys.path`; its vocabulary has these merges."""
    package, info = folder / "open_clip", folder / "open_clip_torch-9.9.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('open_clip is imported')")
    lines = ["#version: 0.2", *merges, "one too many</w>"]
    (package / clip.VOCABULARY).write_bytes(gzip.compress("\n".join(lines).encode()))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: open_clip_torch\nVersion: 9.9\n")
    (info / "RECORD").write_text(f"open_clip/__init__.py,,\nopen_clip/{clip.VOCABULARY},,\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(clip, "_NUM_MERGES", len(merges))
