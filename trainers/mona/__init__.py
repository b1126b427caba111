"""MONA: Muon with a Nesterov-like acceleration (arXiv 2605.26842), as a PyTorch optimizer that depends on torch only.

:class:`MONA` orthogonalizes the updates of matrices with :class:`NewtonSchulz` and uses AdamW for all other parameters.
:func:`choose` decides which parameters are which, and a :class:`Layout` says which matrices a parameter holds.
"""

from __future__ import annotations

from effpass.trainers.mona.groups import Choice, choose
from effpass.trainers.mona.layout import Layout
from effpass.trainers.mona.newton_schulz import NewtonSchulz
from effpass.trainers.mona.optimizer import MONA

__all__ = ["MONA", "Choice", "Layout", "NewtonSchulz", "choose"]
