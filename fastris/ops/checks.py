"""What all operators share: the dtype rule under autocast, and checks of arguments whose errors name the argument."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(first: Tensor) -> torch.dtype:
    """The dtype of an operator's computation and result: autocast's if it is on for the device, else the input's."""
    kind = first.device.type
    if first.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return first.dtype


def check_tensors(operator: str, **tensors: Tensor | None) -> None:
    """Raise unless the tensors are on one device, floating point and, outside autocast, of one dtype.

    TypeError for dtypes, ValueError for devices. None stands for an optional argument that was not given.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        check_is_tensor(operator, name, tensor)
    first_name, first = next(iter(given.items()))
    autocast = torch.is_autocast_enabled(first.device.type)
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{operator}: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(
                f"{operator}: {name} is on {tensor.device} but {first_name} is on {first.device}; "
                "move them to one device"
            )
        if tensor.dtype != first.dtype and not autocast:
            raise TypeError(
                f"{operator}: {name} is {tensor.dtype} but {first_name} is {first.dtype}; "
                "convert them to one dtype or run under torch.autocast"
            )


def check_is_tensor(operator: str, name: str, value: object) -> None:
    """Raise TypeError, naming operator and argument, unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(value).__name__}")


def check_shape(operator: str, name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise ValueError unless the shape is ``expected``: for each axis its size, or a letter where any size fits."""
    check_is_tensor(operator, name, tensor)
    fits = tensor.ndim == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{operator}: {name} must be ({wanted}), got {tuple(tensor.shape)}")
