"""Where documents begin in rows that hold several, by their positions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["document_starts"]


def document_starts(position_ids: Tensor) -> Tensor:
    """Return bool [B, T], true where a document begins: in front of each row, and where positions don't go up by one.

    transformers' attention separates documents by the same rule.

    Args:
        position_ids: [B, T].
    """
    return F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
