"""Data sets of every known form, opened as one kind of source."""

from dicode_jax.data.sources.open import ClipSource, Record, kind_of, open_source, shard_paths

__all__ = ["ClipSource", "Record", "kind_of", "open_source", "shard_paths"]
