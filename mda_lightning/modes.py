"""Temporary modes of a model, each restored module by module on leaving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode; on leaving each returns to the mode it had.

    A frozen submodule that its owner keeps in eval mode stays so, which ``model.train()`` on
    leaving would undo.
    """
    former = [(module, module.training) for module in model.modules()]
    for module, _ in former:
        module.training = False
    try:
        yield
    finally:
        for module, training in former:
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Take all parameters out of the autograd graph; on leaving each is as it was.

    The graph then starts at the first output that asks for a gradient, and the backward stops
    there: no parameter gradient is computed and no ``.grad`` is touched.
    """
    former = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in former:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in former:
            parameter.requires_grad_(requires_grad)
