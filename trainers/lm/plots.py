"""Loss curves as a picture."""

from __future__ import annotations

from pathlib import Path

__all__ = ["plot_losses"]


def plot_losses(lines: list[dict[str, float]], path: Path) -> None:
    """Draw every training and held-out loss, and every accuracy, over the steps.

    Args:
        lines: of the metrics file.
        path: a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(2, 1, sharex=True)
    for key in dict.fromkeys(key for line in lines for key in line):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if key == "loss" or key.startswith("loss_"):
            losses.plot(*zip(*points, strict=True), label=key, linewidth=1)
        elif key.startswith("eval_loss_"):
            losses.plot(*zip(*points, strict=True), "o--", label=key.removeprefix("eval_") + ", held out", markersize=3)
        elif key.startswith("eval_accuracy_"):
            accuracies.plot(*zip(*points, strict=True), "o-", label=key.removeprefix("eval_accuracy_"), markersize=3)
    losses.set(ylabel="loss, nats a graded token", yscale="log")
    accuracies.set(xlabel="step", ylabel="held-out answers right", ylim=(-0.02, 1.02))
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
