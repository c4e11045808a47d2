"""A pull around any objective: the chosen images may not be predicted worse and worse."""

from typing import NamedTuple

import jax

from dmpo_jax.objectives.margins import decided, errors, gains
from dmpo_jax.objectives.registry import Images
from dmpo_jax.types import PerPair

SFT, HINGE = "sft", "hinge"
ANCHORS = (SFT, HINGE)


class Anchor(NamedTuple):
    """A term that is added to every pair's loss.

    kind: one of ANCHORS. weight: above 0.
    """

    kind: str
    weight: float | int

    @property
    def needs_reference(self) -> bool:
        return self.kind == HINGE

    def __call__(
        self, policy: Images, reference: Images | None, target: Images, preference: PerPair
    ) -> PerPair:
        """Computes `weight l_c` (sft) or `weight max(0, l_c - r_c)` (hinge), float32 `[B]`.

        hinge pulls only where the chosen image is predicted worse than by the reference. A tie
        has no chosen image, and no anchor.

        Source: Reg-DPO, arXiv 2511.01450; bghira/SimpleTuner, `anchor_alpha`, `sft_loss_weight`.
        """
        if self.kind == HINGE:
            assert reference is not None
            pull = jax.nn.relu(-gains(policy[:, :1], reference[:, :1], target[:, :1])[:, 0])
        else:
            pull = errors(policy[:, :1], target[:, :1])[:, 0]
        return self.weight * decided(preference) * pull
