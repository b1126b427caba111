"""Plot of the balance of a run: imbalance, waiting time, budgets and coverage over the steps."""

from __future__ import annotations

from pathlib import Path

__all__ = ["plot_balance"]

# Metrics and axis label of each panel.
_PANELS = (
    (("balance_imbalance", "balance_imbalance_fixed"), "slowest / mean"),
    (("balance_bubble", "balance_bubble_fixed"), "share of time waited"),
    (("balance_budget_least", "balance_budget", "balance_budget_most"), "keys of a budget"),
    (("balance_coverage", "balance_changed"), "share"),
)


def plot_balance(lines: list[dict[str, float]], path: Path) -> None:
    """Plot the metrics of :meth:`.tuner.SparsityTuner.metrics`, predicted from the latency table, over the steps.

    Args:
        lines: lines of the metrics file.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (names, label) in zip(figure.subplots(len(_PANELS), 1, sharex=True), _PANELS, strict=True):
        for name in names:
            if points := [(line["step"], line[name]) for line in lines if name in line]:
                axes.plot(
                    *zip(*points, strict=True), ".-", label=name.removeprefix("balance_"), linewidth=1, markersize=3
                )
        axes.set(ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    axes.set(xlabel="step")
    figure.savefig(path, dpi=110)
