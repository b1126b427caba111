"""Plots of a pruning run: losses, kept shares, multipliers, and the distance of the masks from 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

__all__ = ["plot_kept", "plot_run"]

# For each panel: prefixes of the metrics that it shows, its label, and its scale.
_PANELS = (
    (("loss",), "loss, and its parts", "log"),
    (("eval_loss_",), "validation, nats a token", "linear"),
    (("kept_", "cost"), "kept share", "linear"),
    (("z_", "y_"), "multipliers", "log"),
    (("residual_", "undecided_", "softness"), "masks", "linear"),
)


def plot_run(lines: list[dict[str, float]], path: Path) -> None:
    """Plot all logged metrics over the steps.

    Args:
        lines: lines of the metrics file.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys(key for line in lines for key in line))
    panels = [(names, label, scale) for names, label, scale in _PANELS if any(k.startswith(names) for k in keys)]
    figure = Figure(figsize=(8, 1 + 2.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (names, label, scale) in zip(
        figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True
    ):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            if key.startswith(names):
                axes.plot(*zip(*points, strict=True), ".-", label=key, linewidth=1, markersize=3)
        is_positive = all(value > 0 for line in axes.lines for value in line.get_ydata())
        axes.set(ylabel=label, yscale=scale if is_positive else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    axes.set(xlabel="step")
    figure.savefig(path, dpi=110)


def plot_kept(kept: Mapping[str, Mapping[int, Tensor]], counts: Mapping[str, int], path: Path) -> None:
    """Draw which units are kept: one row of pixels for each set of each layer, black for removed units.

    Args:
        kept: indices of the kept units, `[n]` or `[R, n]`, by family and layer.
        counts: number of units per set, by family.
        path: PNG file to write.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 2 * len(kept)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (family, layers) in zip(figure.subplots(len(kept), 1, squeeze=False)[:, 0], kept.items(), strict=True):
        rows = [row for index in layers.values() for row in index.view(-1, index.shape[-1]).tolist()]
        picture = np.zeros((len(rows), counts[family]))
        for number, row in enumerate(rows):
            picture[number, row] = 1
        axes.imshow(picture, aspect="auto", interpolation="nearest", cmap="gray", vmin=0, vmax=1)
        axes.set(ylabel="layers", title=f"{family}: {len(rows[0])} of {counts[family]} stay", yticks=[])
    figure.savefig(path, dpi=110)
