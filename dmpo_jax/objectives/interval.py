"""Intervals of numbers in mathematical notation: "[0, 1)"."""

import dataclasses
import math
import re

from dmpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Interval:
    """An interval of finite numbers: "[0, 1)", "(0, inf)". A square bracket includes its end.

    Raises:
        ValueError: the text is not an interval.
    """

    text: str

    def __post_init__(self):
        if not re.fullmatch(r"[\[(][-\w.]+, [-\w.]+[\])]", self.text):
            raise UserError(f"an interval is written like [0, 1) or (0, inf), got {self.text!r}")

    @property
    def ends(self) -> tuple[float, float]:
        low, high = self.text[1:-1].split(", ")
        return float(low), float(high)

    def __contains__(self, value: float | int) -> bool:
        low, high = self.ends
        above = low <= value if self.text[0] == "[" else low < value
        below = value <= high if self.text[-1] == "]" else value < high
        return above and below and math.isfinite(value)

    @property
    def words(self) -> str:
        """Text after "must be": "in [0, 1)", "at least 1", "above 0"; '' if all numbers fit."""
        low, high = self.text[1:-1].split(", ")
        if self.ends == (-math.inf, math.inf):
            return ""
        if high == "inf":
            return f"at least {low}" if self.text[0] == "[" else f"above {low}"
        return f"in {self.text}"
