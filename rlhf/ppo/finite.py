"""The stop at the first number that is not finite."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.errors import TrainingError


def require_finite(good: bool, what: str, update: int, rows: Sequence[str]) -> None:
    """TrainingError naming the tensor, the update and the rows, unless `good`. Nothing has been stepped by then, and
    the last checkpoint stays."""
    if not good:
        shown = ", ".join(rows[:3]) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")
        raise TrainingError(
            f"{what} is not finite in update {update}, rows {shown or 'unknown'}: the last checkpoint is kept; "
            "a lower learning rate or ppo.reward_clip is the usual mend"
        )
