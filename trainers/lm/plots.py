"""Plot of the loss curves of a training run, used by all trainers."""

from __future__ import annotations

from pathlib import Path

__all__ = ["plot_losses"]


def plot_losses(lines: list[dict[str, float]], path: Path) -> None:
    """Plot all training and held-out losses, accuracies and rewards over the steps.

    Args:
        lines: lines of the metrics file.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys(key for line in lines for key in line))
    lower = [key for key in keys if key == "reward" or key.startswith("eval_accuracy_")]
    figure = Figure(figsize=(8, 7 if lower else 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if lower else 1, 1, sharex=True, squeeze=False)[:, 0]
    smallest = 1.0
    for key in keys:
        points = [(line["step"], line[key]) for line in lines if key in line]
        if key == "loss" or key.startswith("loss_"):
            panels[0].plot(*zip(*points, strict=True), label=key, linewidth=1)
            smallest = min(smallest, *(loss for _, loss in points))
        elif key.startswith("eval_loss_"):
            name = key.removeprefix("eval_") + ", held out"
            panels[0].plot(*zip(*points, strict=True), "o--", label=name, markersize=3)
        elif key in lower:
            panels[1].plot(*zip(*points, strict=True), "o-", label=key.removeprefix("eval_accuracy_"), markersize=3)
    panels[0].set(ylabel="loss, nats a graded token", yscale="log" if smallest > 0 else "linear")
    if lower and "reward" not in lower:
        panels[1].set(ylabel="held-out answers right", ylim=(-0.02, 1.02))
    panels[-1].set(xlabel="step")
    for axes in panels:
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
