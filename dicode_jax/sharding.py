"""One mesh for one device or a thousand: how parameters and batches lie on it."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """The mesh, and ordered rules for parameters.

    Attributes:
      data: Devices along the axis that only splits the batch; -1 takes all that are left.
      fsdp: Devices along the axis that splits the batch and large parameters.
      tensor: Devices along the axis that splits matrices inside a layer.
      rules: `(regex, rule)` pairs over the dotted path of a parameter; the first that is found
        counts. A rule is `fsdp` (the largest axis that divides), `replicate`, or one entry per axis
        of the array separated by commas: `-`, `data`, `fsdp`, `tensor`, or several joined by `+`,
        as in `-,fsdp,tensor`.
      min_size: Parameters with fewer numbers are replicated by `fsdp`.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: tuple[tuple[str, str], ...] = ((r".*", "fsdp"),)
    min_size: int = 2**16
