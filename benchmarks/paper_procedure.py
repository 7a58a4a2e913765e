"""Algorithm 1 of the paper for one head as its appendices describe it: one sequence at a time.

Three passes over the data: second moments, eigenvalue correction, scores. Each is a forward and a
full backward of one sequence, in float32; a head's gradient is cut out of that of the whole model.
Labels of the first two passes are sampled from the model. It is written for comparison of cost,
without what makes ours fast, and without anything that would make it slower than it has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mda_lightning.architectures import HEAD_BLOCKS, Block, BlockName, describe
from mda_lightning.curvature import Fisher
from mda_lightning.mechanisms import Mechanism
from mda_lightning.units import Head


@dataclass
class _Curvature:
    basis_a: Tensor
    basis_s: Tensor
    eigenvalues: Tensor


class PaperProcedure:
    """Scores of one head.

    Args:
        model: at fixed weights.
        unit: the head.
        mechanism: whose f is asked; one value for all heads.
        fisher: whose labels the curvature is of; the paper's is "sampled".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        unit: Head,
        mechanism: Mechanism,
        *,
        fisher: Fisher = "sampled",
    ) -> None:
        self._model, self._mechanism = model, mechanism
        self._sampled = fisher == "sampled"
        self._layout = describe(model)
        self._blocks = {b.name: b for b in self._layout.blocks([unit], HEAD_BLOCKS)}

    def scores(
        self, tokens: Tensor, *, after_pass: Callable[[], object] = lambda: None
    ) -> dict[BlockName, Tensor]:
        """Scores by block, [N], of tokens [N, T+1].

        Args:
            after_pass: called after each of the three passes, and after the probe's gradient.
        """
        curvature = self._second_moments(tokens)
        after_pass()
        self._correct(curvature, tokens)
        after_pass()
        ihvp = self._ihvp(curvature)
        after_pass()
        rows = []
        for gradient in self._gradients(tokens, sampled=False):
            rows.append([-(gradient[name] * ihvp[name]).sum() for name in self._blocks])
        after_pass()
        values = torch.tensor(rows).T
        return dict(zip(self._blocks, values, strict=True))

    def _second_moments(self, tokens: Tensor) -> dict[BlockName, _Curvature]:
        sums: dict[tuple[str, BlockName], Tensor] = {}

        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str) -> None:
            x = args[0].detach()[0]
            output.register_hook(lambda gradient: add(name, x, gradient[0]))

        def add(name: str, x: Tensor, delta: Tensor) -> None:
            for block in self._blocks.values():
                if block.modules[0] == name:
                    own = {"A": block.of_input({name: x}), "S": block.of_output({name: delta})}
                    for kind, flat in own.items():
                        key = (kind, block.name)
                        sums[key] = sums.get(key, torch.zeros(())) + flat.T @ flat

        handles = [
            self._model.get_submodule(name).register_forward_hook(partial(watch, name=name))
            for name in {block.modules[0] for block in self._blocks.values()}
        ]
        for _ in self._gradients(tokens, sampled=self._sampled):
            pass
        for handle in handles:
            handle.remove()
        n = len(tokens) * (tokens.shape[1] - 1)
        return {
            name: _Curvature(
                torch.linalg.eigh(sums["A", name] / n).eigenvectors,
                torch.linalg.eigh(sums["S", name] / n).eigenvectors,
                torch.zeros(block.shape),
            )
            for name, block in self._blocks.items()
        }

    def _correct(self, curvature: dict[BlockName, _Curvature], tokens: Tensor) -> None:
        for gradient in self._gradients(tokens, sampled=self._sampled):
            for name, own in curvature.items():
                own.eigenvalues += (own.basis_s.T @ gradient[name] @ own.basis_a).square()
        for own in curvature.values():
            own.eigenvalues /= len(tokens)

    def _ihvp(self, curvature: dict[BlockName, _Curvature]) -> dict[BlockName, Tensor]:
        self._model.zero_grad()
        self._mechanism.probe(self._model).backward()
        found = {}
        for name, probe in self._own_gradients().items():
            own = curvature[name]
            rotated = own.basis_s.T @ probe @ own.basis_a
            rotated = rotated / (own.eigenvalues + 0.1 * own.eigenvalues.mean())
            found[name] = own.basis_s @ rotated @ own.basis_a.T
        return found

    def _gradients(self, tokens: Tensor, *, sampled: bool) -> Iterable[dict[BlockName, Tensor]]:
        """The head's gradient of each sequence's summed loss."""
        generator = torch.Generator().manual_seed(0)
        for row in tokens:
            self._model.zero_grad()
            logits = self._model(input_ids=row[None, :-1], use_cache=False).logits[0]
            labels = row[1:]
            if sampled:
                chances = logits.detach().softmax(-1)
                labels = torch.multinomial(chances, 1, generator=generator)[:, 0]
            F.cross_entropy(logits, labels, reduction="sum").backward()
            yield self._own_gradients()
        self._model.zero_grad()

    def _own_gradients(self) -> dict[BlockName, Tensor]:
        def of(block: Block) -> Tensor:
            gradient = self._model.get_submodule(block.modules[0]).weight.grad
            assert isinstance(gradient, Tensor)
            rows = [gradient[part.rows, block.columns] for part in block.parts]
            return torch.cat(rows).clone()

        return {name: of(block) for name, block in self._blocks.items()}
