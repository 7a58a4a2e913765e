"""Scores of a batch from its layer inputs and output gradients: −⟨G_i, V⟩, for many V at once.

G_i = Σ_t δ[t] x[t]ᵀ is formed once a layer, for the rows and columns that any unit needs, and
shared by all units and mechanisms; a score is then a dot product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import BlockName, describe
from mda_lightning.gradients import BlockVector
from mda_lightning.units import Head


@dataclass(frozen=True)
class Target:
    """What one mechanism scores: its units and blocks, and its columns of the scores.

    Attributes:
        units, blocks: U heads and K block names; every unit has every block.
        columns: U·K neighbouring columns, unit by unit.
    """

    units: tuple[Head, ...]
    blocks: tuple[BlockName, ...]
    columns: slice


@dataclass
class _Piece:
    """A part of a layer's G_i, and the IHVPs that are projected on it."""

    rows: slice
    columns: slice
    vectors: list[Tensor]
    places: list[int]


class _Layer:
    """The rows and columns of one linear layer's G_i that are needed, and the pieces of it."""

    def __init__(self) -> None:
        self.pieces: dict[tuple[int, int, int, int], _Piece] = {}

    def add(self, rows: slice, columns: slice, vector: Tensor, place: int) -> None:
        key = (rows.start, rows.stop, columns.start, columns.stop)
        piece = self.pieces.setdefault(key, _Piece(rows, columns, [], []))
        piece.vectors.append(vector)
        piece.places.append(place)

    def close(self) -> None:
        pieces = self.pieces.values()
        self.rows = slice(min(p.rows.start for p in pieces), max(p.rows.stop for p in pieces))
        self.columns = slice(
            min(p.columns.start for p in pieces), max(p.columns.stop for p in pieces)
        )
        for piece in pieces:
            piece.vectors = [torch.stack([v.flatten() for v in piece.vectors], dim=1)]


class Projection:
    """−⟨G_i, V⟩ of every block of several IHVPs for a batch's (x, δ).

    Args:
        model: the model that the IHVPs are of.
        ihvps: by mechanism's name, (H + λ)⁻¹∇f per (unit, block).

    Attributes:
        targets: by mechanism's name.
        width: columns of the scores, over all mechanisms.

    Raises:
        ValueError: nothing to score, or units with different blocks.
    """

    def __init__(self, model: PreTrainedModel, ihvps: Mapping[str, BlockVector]) -> None:
        if not ihvps or not all(ihvps.values()):
            raise ValueError("no blocks to score; the IHVP is empty")
        self.targets: dict[str, Target] = {}
        self.width = 0
        self._layers: dict[str, _Layer] = {}
        layout = describe(model)
        for name, ihvp in ihvps.items():
            units = tuple(dict.fromkeys(unit for unit, _ in ihvp))
            blocks = tuple(dict.fromkeys(block for _, block in ihvp))
            missing = [f"{u} {b}" for u in units for b in blocks if (u, b) not in ihvp]
            if missing:
                raise ValueError(
                    f"the IHVP lacks {', '.join(missing)}: every unit needs the same blocks"
                )
            first = self.width
            for unit in units:
                for block_name in blocks:
                    block, row = layout.block(unit, block_name), 0
                    for module, rows in block.parts:
                        own = ihvp[unit, block_name][row : row + rows.stop - rows.start]
                        row += len(own)
                        layer = self._layers.setdefault(module, _Layer())
                        layer.add(rows, block.columns, own, self.width)
                    self.width += 1
            self.targets[name] = Target(units, blocks, slice(first, self.width))
        for layer in self._layers.values():
            layer.close()

    @property
    def names(self) -> list[str]:
        """Dotted names of the linear layers to listen to."""
        return list(self._layers)

    def add(self, out: Tensor, module: str, x: Tensor, delta: Tensor) -> None:
        """Subtract this layer's ⟨G_i, V⟩ from ``out`` [B, width].

        Args:
            out: float32 [B, width].
            module: dotted name of the layer.
            x, delta: its input [B, T, in] and output gradient [B, T, out].
        """
        layer = self._layers[module]
        x, delta = x[..., layer.columns], delta[..., layer.rows]
        if x.dtype != torch.float64:
            x, delta = x.float(), delta.float()
        gradients = torch.bmm(delta.transpose(1, 2), x)
        for piece in layer.pieces.values():
            rows = slice(piece.rows.start - layer.rows.start, piece.rows.stop - layer.rows.start)
            first = layer.columns.start
            columns = slice(piece.columns.start - first, piece.columns.stop - first)
            own = gradients[:, rows, columns].flatten(1)
            out[:, piece.places] -= (own @ piece.vectors[0].to(own)).to(out)

    def split(self, out: Tensor) -> dict[str, Tensor]:
        """The scores [B, width] as [B, U, K] for each mechanism."""
        return {
            name: out[:, target.columns].reshape(len(out), len(target.units), len(target.blocks))
            for name, target in self.targets.items()
        }
