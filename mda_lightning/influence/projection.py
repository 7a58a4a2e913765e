"""Scores of a batch from its layer inputs and output gradients: −⟨G_i, V⟩, for many V at once.

G_i = Σ_t δ[t] x[t]ᵀ is formed once a layer, for the rows and columns that any unit needs, and
shared by all units and mechanisms; a score is then a dot product.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import BlockName, describe, input_columns
from mda_lightning.gradients import BlockVector
from mda_lightning.units import Head

#: Numbers of (x, δ) that are converted to float32 at once (16 MiB).
_CAST_NUMBERS = 2**22


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
        self._by_place: dict[tuple[int, int, int, int], _Piece] = {}

    def take(self, rows: slice, columns: slice, vector: Tensor, place: int) -> None:
        key = (rows.start, rows.stop, columns.start, columns.stop)
        piece = self._by_place.setdefault(key, _Piece(rows, columns, [], []))
        piece.vectors.append(vector)
        piece.places.append(place)

    def close(self) -> None:
        """After the last vector: where G_i is formed, and the pieces' places in that."""
        self.pieces = list(self._by_place.values())
        self.rows = slice(
            min(p.rows.start for p in self.pieces), max(p.rows.stop for p in self.pieces)
        )
        self.columns = slice(
            min(p.columns.start for p in self.pieces), max(p.columns.stop for p in self.pieces)
        )
        for piece in self.pieces:
            piece.vectors = [torch.stack([_wide(v).flatten() for v in piece.vectors], dim=1)]
            piece.rows = _within(piece.rows, self.rows)
            piece.columns = _within(piece.columns, self.columns)

    def add(self, out: Tensor, x: Tensor, delta: Tensor) -> None:
        gradients = torch.bmm(delta.transpose(1, 2), x)
        for piece in self.pieces:
            own = gradients[:, piece.rows, piece.columns].flatten(1)
            found = own @ piece.vectors[0].to(own)
            for column, place in enumerate(piece.places):
                out[:, place] -= found[:, column]


def _wide(vector: Tensor) -> Tensor:
    return vector if vector.dtype == torch.float64 else vector.float()


def _within(inner: slice, outer: slice) -> slice:
    return slice(inner.start - outer.start, inner.stop - outer.start)


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
                        layer.take(rows, block.columns, own, self.width)
                    self.width += 1
            self.targets[name] = Target(units, blocks, slice(first, self.width))
        for layer in self._layers.values():
            layer.close()

    @property
    def names(self) -> list[str]:
        """Dotted names of the linear layers to listen to."""
        return list(self._layers)

    def columns_of(self, modules: Collection[str]) -> list[int]:
        """The columns of the scores that these layers have a part in."""
        pieces = [p for name in modules if name in self._layers for p in self._layers[name].pieces]
        return sorted({place for piece in pieces for place in piece.places})

    def add(self, out: Tensor, module: str, x: Tensor, delta: Tensor) -> None:
        """Subtract this layer's ⟨G_i, V⟩ from ``out`` [B, width], in float32 at least.

        Args:
            out: float32 [B, width].
            module: dotted name of the layer; one that no IHVP is about changes nothing.
            x, delta: its input [B, T, in] and output gradient [B, T, out].
        """
        layer = self._layers.get(module)
        if layer is None:
            return
        x, delta = input_columns(x, layer.columns), delta[..., layer.rows]
        if x.dtype == delta.dtype and x.dtype in (torch.float32, torch.float64):
            layer.add(out, x, delta)
            return
        # A few samples at a time, so that no copy of a whole batch in float32 is ever there.
        step = max(1, _CAST_NUMBERS // (x[0].numel() + delta[0].numel()))
        for first in range(0, len(x), step):
            own = slice(first, first + step)
            layer.add(out[own], x[own].float(), delta[own].float())

    def split(self, out: Tensor) -> dict[str, Tensor]:
        """The scores [B, width] as [B, U, K] for each mechanism."""
        return {
            name: out[:, target.columns].reshape(len(out), len(target.units), len(target.blocks))
            for name, target in self.targets.items()
        }
