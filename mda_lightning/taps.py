"""Layer inputs and output gradients of chosen Linear layers, and nothing else.

For a linear layer y = Wx everything influence needs of a sample is x[t] and δ[t] = ∂L/∂y[t].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor, nn


class Taps:
    """Forward hooks on named Linear layers that keep their inputs and outputs.

    Use as a context manager. Within it every forward of the model records, per name, the input
    (detached) and the output (in the graph; made to require a gradient where the graph starts).

    Args:
        model: the model that holds the layers.
        names: dotted names of Linear layers in ``model``.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._modules = {name: model.get_submodule(name) for name in dict.fromkeys(names)}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def __enter__(self) -> Taps:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._record(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.inputs.clear()
        self.outputs.clear()

    def _record(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_(True)
            self.inputs[name] = args[0].detach()
            self.outputs[name] = output

        return hook

    def gradients(
        self,
        value: Tensor,
        names: Iterable[str] | None = None,
        *,
        grad_output: Tensor | None = None,
        retain_graph: bool = False,
    ) -> dict[str, Tensor]:
        """∂value/∂output of the tapped layers; zeros where ``value`` does not depend on one.

        ``grad_output`` weighs a ``value`` that is not a scalar. Never touches ``.grad``.
        """
        wanted = list(self.outputs if names is None else names)
        outputs = [self.outputs[name] for name in wanted]
        found = torch.autograd.grad(
            value, outputs, grad_outputs=grad_output, retain_graph=retain_graph, allow_unused=True
        )
        return {
            name: torch.zeros_like(output) if gradient is None else gradient
            for name, output, gradient in zip(wanted, outputs, found, strict=True)
        }
