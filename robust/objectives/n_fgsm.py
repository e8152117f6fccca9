"""N-FGSM: one step from strong noise, without a projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks.gradient import differentiate
from attacks.losses import cross_entropy as climbed
from attacks.noise import uniform
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial_logits, attacked_network
from robust.views import Views


@OBJECTIVES.register("n_fgsm")
@dataclass(frozen=True)
class NFGSM:
    """Cross-entropy at x + u + s eps sign(gradient at x + u), u uniform in a box of `noise` times the radius
    (de Jorge et al. 2022).

    The points leave the ball and the pixel range, both on purpose, so this search is no attack of its own. Linf only.

    Args:
        noise: half-width of the noise, in units of eps.
        step_size: s.
        statistics: BatchNorm statistics under the search.
        batch_norm: BatchNorm statistics of the adversarial pass.
    """

    noise: float = 2.0
    step_size: float = 1.0
    statistics: BatchNormStatistics = "train"
    batch_norm: BatchNormOf = "own"

    def __call__(self, views: Views) -> dict[str, Tensor]:
        if views.ball.norm != "linf":
            raise ValueError(f"n_fgsm steps along signs, which is for linf; the run's norm is {views.ball.norm}")
        x_adv = views.once(("n_fgsm", self), lambda: self._search(views))
        return {"adversarial": cross_entropy(adversarial_logits(views, x_adv, self.batch_norm), views.y)}

    def _search(self, views: Views) -> Tensor:
        eps = views.ball.eps_of(views.x)
        start = views.x + self.noise * eps * (2 * uniform(views.x.shape, views.x, views.generator) - 1)
        gradient, _, _ = differentiate(attacked_network(views, self.statistics), climbed, start, (views.y,))
        pace = 1.0 if views.pace is None else views.pace.view(-1, 1, 1, 1).to(views.x)
        return start + self.step_size * pace * eps * gradient.sign()
