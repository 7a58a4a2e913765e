"""Taps on someone else's forward and backward, which leave both as they are.

A layer's input x is held as autograd holds what it saves for a backward, so activation
checkpointing drops and recomputes it with everything else. Run eagerly, the graph of the training
is not touched at all: a hook on the layer's output sees its gradient pass. Compiled code knows no
such hooks; there the output passes through an identity whose backward calls out of the compiled
code. Dynamo guards on whether a tap listens, so switching compiles once each way.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

#: Columns of the logits that are read beside the label's.
N_COLUMNS = 8


class Listener(Protocol):
    """What is done with what the taps see; called without gradients and outside autocast."""

    def layer(self, name: str, x: Tensor, delta: Tensor) -> None:
        """A layer's input [B, T, in] and output gradient [B, T, out], in the backward."""
        ...

    def logits(self, logits: Tensor) -> Tensor:
        """The logits [..., V], in the forward; returns what the backward needs of them, as shaped
        by :func:`kept_of`."""
        ...

    def logit_gradient(self, kept: Tensor, delta: Tensor) -> None:
        """What :meth:`logits` returned, and the gradient of the logits [..., V]."""
        ...


#: Compiled code knows a set of taps by number: it may outlive them, and must then find nothing.
_listeners: weakref.WeakValueDictionary[int, Listener] = weakref.WeakValueDictionary()
_listening: dict[int, bool] = {}
_numbers = itertools.count(1)


class TrainingTaps:
    """Hooks that tell a listener each layer's (x, δ), and the logits and their gradient.

    Nothing is kept past the backward, and neither outputs nor gradients are changed. While
    ``listening`` is False the hooks do nothing, so that probing the same model is not taken for
    training; nor is a deep copy of it, unless the copy is compiled. A model that is compiled must
    not have been run before the hooks are on it: compiled code does not know hooks that come later.

    Args:
        model: the model that holds the layers.
        names: dotted names of Linear layers in ``model``.
        listener: told of them; kept alive by its owner.
        unembedding: the layer whose output is the logits, or None to leave them unread.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        listener: Listener,
        *,
        unembedding: nn.Module | None = None,
    ) -> None:
        self._number = next(_numbers)
        _listeners[self._number] = listener
        _listening[self._number] = False
        # A leaf of its own: what makes compiled code run the taps in its backward is that they
        # yield this tensor's gradient, which is zero.
        ticket = torch.zeros(1, device=next(model.parameters()).device, requires_grad=True)
        self._handles = []
        for name in dict.fromkeys(names):
            layer = model.get_submodule(name)
            hook = _layer_hook(self._number, name, ticket, weakref.ref(layer))
            self._handles.append(layer.register_forward_hook(hook))
        if unembedding is not None:
            hook = _logits_hook(self._number, ticket, weakref.ref(unembedding))
            self._handles.append(unembedding.register_forward_hook(hook))

    @property
    def listening(self) -> bool:
        return _listening.get(self._number, False)

    @listening.setter
    def listening(self, value: bool) -> None:
        if self._handles:
            _listening[self._number] = value

    def remove(self) -> None:
        """Take the hooks off; may be called more than once."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _listening.pop(self._number, None)
        _listeners.pop(self._number, None)


@contextmanager
def unheard() -> Iterator[None]:
    """Within the block no taps listen: a probe of a model is not taken for its training."""
    former = dict(_listening)
    for number in former:
        _listening[number] = False
    try:
        yield
    finally:
        _listening.update({number: former[number] for number in _listening if number in former})


Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


# A deep copy of a model (a teacher, a moving average) has its hooks, but not its compiled code.
def _layer_hook(number: int, name: str, ticket: Tensor, own: weakref.ref[nn.Module]) -> Hook:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not _listening[number] or not torch.is_grad_enabled() or not output.requires_grad:
            return None
        x = args[0].detach()
        if torch.compiler.is_compiling():
            passed: Tensor = _PassLayer.apply(output, x, ticket, number, name)  # type: ignore[no-untyped-call]
            return passed
        if module is not own():
            return None
        held = [_Hold.apply(ticket, x).grad_fn]  # type: ignore[no-untyped-call]

        def arrived(delta: Tensor) -> None:
            if held:
                (kept,) = held.pop().saved_tensors
                _layer_gradient(kept, delta, number, name)

        output.register_hook(arrived)  # type: ignore[no-untyped-call]
        return None

    return hook


def _logits_hook(number: int, ticket: Tensor, own: weakref.ref[nn.Module]) -> Hook:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not _listening[number] or not torch.is_grad_enabled() or not output.requires_grad:
            return None
        if torch.compiler.is_compiling():
            passed: Tensor = _PassLogits.apply(output, ticket, number)  # type: ignore[no-untyped-call]
            return passed
        if module is not own():
            return None
        held = [_look_at_logits(output.detach(), number)]

        def arrived(delta: Tensor) -> None:
            if held:
                _logit_gradient(held.pop(), delta, number)

        output.register_hook(arrived)  # type: ignore[no-untyped-call]
        return None

    return hook


def kept_of(logits: Tensor) -> Tensor:
    """An empty tensor for what is read of logits [..., V]: the label's column and N_COLUMNS, or all
    V where there are fewer; in float32 at least."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = (*logits.shape[:-1], 1 + min(N_COLUMNS, logits.shape[-1]))
    return torch.empty(shape, dtype=dtype, device=logits.device)


# -- what happens in either kind of code -----------------------------------------------------------


def _quietly(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False)


def _layer_gradient(x: Tensor, delta: Tensor, number: int, name: str) -> None:
    listener = _listeners.get(number)
    if listener is not None:
        with torch.no_grad(), _quietly(delta):
            listener.layer(name, x, delta.detach())


def _look_at_logits(logits: Tensor, number: int) -> Tensor:
    listener = _listeners.get(number)
    if listener is None:
        return kept_of(logits).fill_(torch.nan)
    with torch.no_grad(), _quietly(logits):
        return listener.logits(logits)


def _logit_gradient(kept: Tensor, delta: Tensor, number: int) -> None:
    listener = _listeners.get(number)
    if listener is not None:
        with torch.no_grad(), _quietly(delta):
            listener.logit_gradient(kept, delta.detach())


# -- eager -----------------------------------------------------------------------------------------


class _Hold(torch.autograd.Function):
    """A node beside the graph whose saved tensor a checkpoint may drop and recompute."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return ticket.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None  # nothing depends on it


# -- compiled --------------------------------------------------------------------------------------


@torch.library.custom_op("mda_lightning::layer_gradient", mutates_args=())
def _layer_gradient_op(x: Tensor, delta: Tensor, number: int, name: str) -> Tensor:
    _layer_gradient(x, delta, number, name)
    return torch.zeros(1, device=delta.device)


@_layer_gradient_op.register_fake
def _(x: Tensor, delta: Tensor, number: int, name: str) -> Tensor:
    return torch.zeros(1, device=delta.device)


@torch.library.custom_op("mda_lightning::look_at_logits", mutates_args=())
def _look_at_logits_op(logits: Tensor, number: int) -> Tensor:
    return _look_at_logits(logits, number)


@_look_at_logits_op.register_fake
def _(logits: Tensor, number: int) -> Tensor:
    return kept_of(logits)


@torch.library.custom_op("mda_lightning::logit_gradient", mutates_args=())
def _logit_gradient_op(kept: Tensor, delta: Tensor, number: int) -> Tensor:
    _logit_gradient(kept, delta, number)
    return torch.zeros(1, device=delta.device)


@_logit_gradient_op.register_fake
def _(kept: Tensor, delta: Tensor, number: int) -> Tensor:
    return torch.zeros(1, device=delta.device)


class _PassLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, ticket: Tensor, number: int, name: str
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.number, ctx.name = number, name
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        zero = _layer_gradient_op(x, gradients[0], ctx.number, ctx.name)
        return gradients[0], None, zero, None, None


class _PassLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, ticket: Tensor, number: int) -> Tensor:
        ctx.save_for_backward(_look_at_logits_op(output, number))
        ctx.number = number
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (kept,) = ctx.saved_tensors
        return gradients[0], _logit_gradient_op(kept, gradients[0], ctx.number), None
