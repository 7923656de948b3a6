"""A stand-in for the Hugging Face Hub: its repositories are folders on this disk."""

import fnmatch
import shutil
import types

import huggingface_hub
from huggingface_hub import errors


class FakeHub:
    """Gives of a folder what is asked for by patterns, as `snapshot_download` does.

    Attributes:
      asked: `(name, patterns)` of every call.
    """

    def __init__(self, cache, monkeypatch):
        self.cache, self.repositories, self.asked = cache, {}, []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._download)

    def _download(self, name, *, allow_patterns, **_):
        self.asked.append((name, tuple(allow_patterns)))
        if name not in self.repositories:
            response = types.SimpleNamespace(headers={}, request=None)
            raise errors.RepositoryNotFoundError("404", response=response)
        source, copy = self.repositories[name], self.cache / name.replace("/", "--")
        copy.mkdir(parents=True, exist_ok=True)
        for path in source.rglob("*"):
            inside = str(path.relative_to(source))
            if path.is_file() and any(fnmatch.fnmatch(inside, p) for p in allow_patterns):
                (copy / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy / inside)
        return str(copy)

    def files(self, name):
        """What was fetched of a repository."""
        root = self.cache / name.replace("/", "--")
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
