"""Plot of a head's acceptance length and loss over the number of training tokens."""

from __future__ import annotations

from pathlib import Path

__all__ = ["plot_acceptance"]


def plot_acceptance(lines: list[dict[str, float]], path: Path) -> None:
    """Plot the evaluations of a run.

    Args:
        lines: records of the metrics file.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, key, label in (
        (panels[0], "eval_acceptance_length", "tokens a round of a chain, held out"),
        (panels[1], "eval_loss_validation", "divergence, nats a token, held out"),
    ):
        points = [(line["tokens"], line[key]) for line in lines if key in line and "tokens" in line]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=3)
        axes.set(ylabel=label)
        axes.grid(alpha=0.3)
    panels[-1].set(xlabel="tokens learned from")
    figure.savefig(path, dpi=110)
