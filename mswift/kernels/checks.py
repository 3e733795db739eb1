"""What every face asks of its operands before it chooses between kernel and plain torch: the names in an error are those of the face."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Size = int | str


def expect(name: str, tensor: Tensor, shape: tuple[Size, ...], dtype: torch.dtype | None = None) -> None:
    """Refuse a tensor of another shape or dtype.

    Args:
        shape: of each dim its size, or what it is called where any will do; ``"..."`` in front: any number of dims.
        dtype: None: any.

    Raises:
        ValueError: with the name, what was got, what was wanted.
    """
    if (tensor.shape == shape or _fits(tensor.shape, shape)) and (dtype is None or tensor.dtype == dtype):
        return
    kind = "" if dtype is None else f"{short(dtype)} "
    raise ValueError(f"{name}: got {short(tensor.dtype)} {list(tensor.shape)}, wanted {kind}[{', '.join(map(str, shape))}]")


def expect_each(name: str, tensors: Sequence[Tensor], count: int, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """`expect` of each of a list that should have so many."""
    if len(tensors) != count:
        raise ValueError(f"{name}: got {len(tensors)}, wanted {count}, one for each of weights")
    for number, tensor in enumerate(tensors):
        if tensor.shape != shape or tensor.dtype != (dtype or tensor.dtype):
            expect(f"{name}[{number}]", tensor, shape, dtype)


def _fits(found: torch.Size, shape: tuple[Size, ...]) -> bool:
    if shape and shape[0] == "...":
        shape = shape[1:]
        if len(found) < len(shape):
            return False
        found = found[len(found) - len(shape) :]
    return len(found) == len(shape) and all(isinstance(size, str) or size == given for given, size in zip(found, shape))


def short(dtype: torch.dtype) -> str:
    """As it stands in errors."""
    return str(dtype).removeprefix("torch.")


def rate(name: str, p: float) -> None:
    """Refuse what is no rate of dropout."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name}: got {p}, wanted at least 0 and less than 1")


def at_least(name: str, number: int, least: int) -> None:
    if number < least:
        raise ValueError(f"{name}: got {number}, wanted at least {least}")


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: no device has to be waited for, and no graph is being traced."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def within(name: str, numbers: Tensor, least: int, most: int) -> None:
    """Refuse whole numbers outside of ``[least, most]``, where they can be read at no cost."""
    if not readable(numbers) or not numbers.numel():
        return
    low, high = (int(end) for end in numbers.aminmax())
    if low < least or high > most:
        raise ValueError(f"{name}: got {low if low < least else high}, wanted {least} to {most}")


def counts(name: str, numbers: Tensor, total: int) -> None:
    """Refuse numbers of rows that are negative or do not add up to all of them, where they can be read at no cost."""
    if not readable(numbers):
        return
    found = numbers.tolist()
    if sum(found) != total or min(found, default=0) < 0:
        raise ValueError(f"{name}: got {found}, wanted numbers from 0 that add up to the rows of x, {total}")


def rising(name: str, ends: Tensor, total: int) -> None:
    """Refuse places where rows of tokens begin and end that leave some out, where they can be read at no cost."""
    if not readable(ends):
        return
    found = ends.tolist()
    if found[:1] != [0] or found[-1] != total or any(end < start for start, end in itertools.pairwise(found)):
        raise ValueError(f"{name}: got {found if len(found) < 9 else [*found[:4], '...', *found[-4:]]}, wanted to rise from 0 to the tokens, {total}")
