"""Which implementation of each operator is in use: its compiled kernel or its plain-torch reference (``--kernels auto|reference|LIST``).

An operator says with `register` for which tensors its kernel exists, and asks `compiled` at each call. ``auto`` takes a kernel wherever it
exists and measurement has shown it to win; a list takes those that it names and the reference for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from mswift.config.fields import nearest
from mswift.errors import ConfigError
from mswift.kernels import cuda, extension

AUTO, REFERENCE = "auto", "reference"


@dataclass(frozen=True, slots=True)
class Operator:
    """`fits`: None where the kernel can take these tensors, else why not. `wins`: part of ``auto``. `on_cpu`, `on_cuda`: where it has one."""

    name: str
    summary: str
    fits: Callable[..., str | None]
    wins: bool
    on_cpu: bool
    on_cuda: bool


_operators: dict[str, Operator] = {}
_chosen: frozenset[str] | None = None  # None: auto


def register(name: str, summary: str, fits: Callable[..., str | None], *, wins: bool = True, on_cpu: bool = True, on_cuda: bool = False) -> None:
    """Make an operator known; `fits` gets the tensors of a call (the first one decides the device)."""
    _operators[name] = Operator(name, summary, fits, wins, on_cpu, on_cuda)


def select(setting: str | Iterable[str]) -> None:
    """What ``--kernels`` says: ``auto``, ``reference``, or names of operators (with commas between them) to run compiled.

    Raises:
        ConfigError: a name that no operator has, or kernels asked for by name where there are none.
    """
    global _chosen
    names = [part.strip() for part in setting.split(",")] if isinstance(setting, str) else list(setting)
    if names == [AUTO]:
        _chosen = None
        return
    chosen = frozenset() if names == [REFERENCE] else frozenset(names)
    unknown = sorted(chosen - _operators.keys())
    if unknown:
        likely = nearest(unknown[0], [AUTO, REFERENCE, *sorted(_operators)])
        meant = f" (did you mean {likely}?)" if likely else ""
        raise ConfigError(f"--kernels: got {', '.join(unknown)}{meant}; wanted auto, reference, or some of {', '.join(sorted(_operators))}")
    if chosen and extension.missing() is not None:
        raise ConfigError(
            f"--kernels {','.join(sorted(chosen))}: no compiled kernel can run here ({extension.missing()}); --kernels auto runs what can"
        )
    _chosen = chosen


def selected() -> str:
    """The setting in force, as `select` takes it."""
    return AUTO if _chosen is None else ",".join(sorted(_chosen)) or REFERENCE


def hindrance(name: str, *tensors: Tensor) -> str | None:
    """Why the reference of this operator runs for these tensors; None: its kernel does."""
    operator = _operators[name]
    if _chosen is None and not operator.wins:
        return "plain torch is as fast"
    if _chosen is not None and name not in _chosen:
        return f"--kernels {selected()}"
    return extension.missing() or operator.fits(*tensors)


def compiled(name: str, *tensors: Tensor) -> bool:
    """Whether this operator's kernel runs for these tensors."""
    return hindrance(name, *tensors) is None


def table() -> list[tuple[str, str, str]]:
    """``(operator, "compiled" | "reference", what it does or why not)`` of every operator, for a run's log and for the documentation."""
    rows = []
    for name, operator in sorted(_operators.items()):
        off = (_chosen is None and not operator.wins) or (_chosen is not None and name not in _chosen) or extension.missing() is not None
        rows.append((name, REFERENCE if off else "compiled", operator.summary))
    return rows


def announcement(device: str = "cpu") -> str:
    """One line on what is in use on a device: the operators that run compiled, and for which instructions."""
    on_cuda = device == "cuda"
    names = [name for name, state, _ in table() if state == "compiled" and (_operators[name].on_cuda if on_cuda else _operators[name].on_cpu)]
    reason = extension.missing() or (cuda.missing() if on_cuda else None)
    if reason or not names:
        return f"plain torch ({reason or '--kernels ' + selected()})"
    return f"{', '.join(names)} compiled ({'CUDA' if on_cuda else extension.isa()}), the rest plain torch"
