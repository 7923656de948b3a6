"""What layers make of their parameters in every call, made once before a loop."""

from typing import TypeVar

from flax import nnx

from dicode_jax.nn.resnet import Upsample

_Model = TypeVar("_Model", bound=nnx.Module)


def with_ready_kernels(model: _Model) -> _Model:
    """The model with kernels and biases in the type, and the form, that their layers compute in.

    Layers cast and sum them in every call and so compute the same; before a loop this is done
    once instead of in every turn.
    """
    model = nnx.merge(*nnx.split(model))
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Upsample) and layer.conv is not None:
            layer.conv.keep_phases()
        if isinstance(layer, nnx.Linear | nnx.Conv) and layer.dtype is not None:
            layer.kernel = nnx.Param(layer.kernel[...].astype(layer.dtype))
            if layer.bias is not None:
                layer.bias = nnx.Param(layer.bias[...].astype(layer.dtype))
    return model
