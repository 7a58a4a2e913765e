"""The picture of a run: heads by steps, and layers by heads, of one metric."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray


def heads_over_steps(
    steps: NDArray[np.int64], values: NDArray[np.float32], *, metric: str
) -> NDArray[np.uint8]:
    """Draw values [n, L, H] with heads down, steps across, and the last layer-by-head grid beside.

    Returns:
        An RGB image [height, width, 3]. Drawn without pyplot: no global figure, no backend chosen
        for the user.
    """
    n, layers, heads = values.shape
    flat = values.reshape(n, layers * heads).T
    names = [f"L{i // heads}H{i % heads}" for i in range(layers * heads)]
    height = min(2.0 + 0.22 * len(names), 12.0)
    figure = Figure(figsize=(9.0, height), dpi=110, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    over_time, now = figure.subplots(1, 2, width_ratios=(3, 1))
    top = max(float(np.nanmax(flat)) if np.isfinite(flat).any() else 0.0, 0.1)
    style: dict[str, Any] = {"cmap": "viridis", "vmin": 0.0, "vmax": top}
    edges = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if n > 1 else 1))
    over_time.pcolormesh(edges, np.arange(len(names) + 1), flat, **style)
    over_time.invert_yaxis()
    every = max(1, len(names) // 32)
    over_time.set_yticks(np.arange(0, len(names), every) + 0.5, names[::every], fontsize=7)
    over_time.set(xlabel="optimizer step", title=f"{metric}, every head")
    drawn = now.imshow(values[-1], aspect="auto", **style)
    now.set(xlabel="head", ylabel="layer", title=f"step {int(steps[-1])}")
    figure.colorbar(drawn, ax=now)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_png(image: NDArray[np.uint8], path: Any) -> None:
    """Write an RGB image [height, width, 3] as PNG to an open path."""
    from PIL import Image

    Image.fromarray(image).save(path, format="PNG")
