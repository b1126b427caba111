"""MONA: Muon with Nesterov-like acceleration (arXiv 2605.26842). Needs torch alone."""

from __future__ import annotations

from effpass.trainers.mona.groups import Choice, choose
from effpass.trainers.mona.layout import Layout
from effpass.trainers.mona.newton_schulz import NewtonSchulz
from effpass.trainers.mona.optimizer import MONA

__all__ = ["MONA", "Choice", "Layout", "NewtonSchulz", "choose"]
