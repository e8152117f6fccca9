"""GAT: adversarial training guided by self-supervised tasks."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from attacks.attack import ATTACKS, Attack
from attacks.methods.pgd import PGD
from attacks.noise import uniform
from attacks.registry import method_field
from certify.tracing import capture
from robust.active import Active, RunFacts
from robust.objective import OBJECTIVES, cross_entropy
from robust.training_attack import BatchNormOf, BatchNormStatistics, adversarial, logits_and_features_at
from robust.views import Views


@OBJECTIVES.register("gat")
@dataclass(frozen=True)
class GAT:
    """CE at attacked images whose sections were swapped and that were turned, plus the losses of two heads that tell
    how (Ghamizi et al. 2023).

    A jigsaw permutation of the sections, then a turn by a multiple of 90 degrees, both drawn for every image; then the
    attack on the main task; then all tasks at the attacked image. The heads read the inputs of the network's last
    layer. The paper's curvature term is not built.

    Args:
        weights: of the tasks. equal: 1 each. mgda: those of the shortest convex combination of the tasks' gradients in
            the layers that they share, which no task's loss grows along (Desideri 2012; Sener & Koltun 2018). They sum
            to 1 and count for the tasks' own last layers, too; of a micro_batch they are that part's.
        sections: of an image, a square number. permutations: number of them, drawn once. turns: 4, or 1 for none.
        seed: of permutations and heads.
        attack: inner search.
        statistics: BatchNorm statistics under the attack.
        batch_norm: BatchNorm statistics of the loss's pass.
    """

    sections: int = 16
    permutations: int = 10
    turns: int = 4
    weights: Literal["equal", "mgda"] = "equal"
    seed: int = 0
    attack: Attack = method_field(ATTACKS, PGD(steps=10, step_size=0.125, keep="last", mode="keep"))
    statistics: BatchNormStatistics = "eval"
    batch_norm: BatchNormOf = "own"

    def start(self, run: RunFacts) -> Active:
        side = math.isqrt(self.sections)
        _, height, width = run.input_shape
        if side * side != self.sections or height % side or width % side:
            raise ValueError(
                f"gat: {height}x{width} images do not fall into sections={self.sections} equal parts, a square number"
            )
        if self.turns > 1 and height != width:
            raise ValueError(f"gat: {height}x{width} images cannot be turned; set turns=1")
        return _Active(self, run)


class _Active(Active):
    def __init__(self, gat: GAT, run: RunFacts) -> None:
        self.gat = gat
        parameter = next(run.model.parameters())
        example = torch.zeros(1, *run.input_shape, dtype=parameter.dtype, device=parameter.device)
        (features,) = capture(run.model, example).steps[-2].shape
        self.parameters_of_run = [p for p in run.model.parameters() if p.requires_grad]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(gat.seed)
            self.orders = torch.stack([torch.randperm(gat.sections) for _ in range(gat.permutations)])
            self.heads = nn.ModuleDict(
                {"jigsaw": nn.Linear(features, gat.permutations), "rotation": nn.Linear(features, gat.turns)}
            ).to(parameter)
        self.orders = self.orders.to(parameter.device)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.heads.parameters())

    def state(self) -> dict[str, Tensor]:
        return dict(self.heads.state_dict())

    def restore(self, state: dict[str, Tensor]) -> None:
        self.heads.load_state_dict(state)

    def __call__(self, views: Views) -> dict[str, Tensor]:
        gat = self.gat
        shown, order, turn = views.once("gat", lambda: self._shown(views))
        seen = replace(views, x=shown)
        x_adv = adversarial(seen, gat.attack, statistics=gat.statistics)
        logits, features = logits_and_features_at(seen, x_adv, gat.batch_norm)
        views.logits["adversarial"], views.moved = logits, views.moved or seen.moved
        terms = {
            "adversarial": cross_entropy(logits, views.y),
            "jigsaw": cross_entropy(self.heads["jigsaw"](features), order),
            "rotation": cross_entropy(self.heads["rotation"](features), turn),
        }
        return terms if gat.weights == "equal" else self._balanced(terms)

    def _balanced(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms times the weights of MGDA."""
        found = [
            torch.autograd.grad(term.mean(), self.parameters_of_run, retain_graph=True, allow_unused=True)
            for term in terms.values()
        ]
        # What all tasks reach is shared; the network's last layer is the main task's own.
        shared = [gradients for gradients in zip(*found, strict=True) if all(g is not None for g in gradients)]
        rows = [torch.cat([gradient.flatten() for gradient in row]) for row in zip(*shared, strict=True)]
        weights = shortest_combination(torch.stack(rows))
        return {name: weight * term for weight, (name, term) in zip(weights, terms.items(), strict=True)}

    def _shown(self, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        """(images cut and turned, numbers of their permutations `[B]`, of quarter turns `[B]`)."""
        x = views.x
        counts = x.new_tensor([self.gat.permutations, self.gat.turns])
        order, turn = (counts * uniform((len(x), 2), x, views.generator)).long().unbind(1)
        return turned(jigsaw(x, self.orders[order]), turn), order, turn


def shortest_combination(vectors: Tensor) -> Tensor:
    """Weights `[T]`, not negative and of sum 1, for which the sum of the weighted vectors `[T, n]` is shortest.

    For every set of vectors the shortest point of the plane through them is that of a small linear system; the shortest
    of those whose weights are not negative is the solution. Meant for a handful of vectors.
    """
    products = (vectors @ vectors.T).double().cpu()
    products = products / products.diagonal().max().clamp(min=torch.finfo(torch.float64).tiny)
    count = len(products)
    best, least = products.new_zeros(count), math.inf
    for rows in _subsets(count):
        weights = products.new_zeros(count)
        weights[rows] = _on_plane(products[rows][:, rows])
        length = float(weights @ products @ weights)
        if bool((weights >= 0).all()) and length < least:
            best, least = weights, length
    return best.to(vectors)


def _subsets(count: int) -> list[list[int]]:
    numbers = range(count)
    return [list(some) for size in range(1, count + 1) for some in itertools.combinations(numbers, size)]


def _on_plane(products: Tensor) -> Tensor:
    """Weights `[S]` of sum 1 that make w' P w least, from w' P + m = 0; P `[S, S]` may be singular."""
    size = len(products)
    system = products.new_ones(size + 1, size + 1)
    system[:size, :size], system[size, size] = products, 0.0
    right = products.new_zeros(size + 1)
    right[size] = 1.0
    return torch.linalg.lstsq(system, right, driver="gelsd").solution[:size]


def jigsaw(x: Tensor, order: Tensor) -> Tensor:
    """Images `[B, C, H, W]` whose section i, row by row, is section order[i] of the image, order `[B, S]`."""
    count, channels, height, width = x.shape
    side = math.isqrt(order.shape[1])
    cut = x.view(count, channels, side, height // side, side, width // side).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    mixed = cut[torch.arange(count, device=x.device)[:, None], order]
    return mixed.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Images turned by so many quarter turns, `[B]`, anticlockwise."""
    out = x.clone()
    for number in range(1, 4):
        rows = turns == number
        out[rows] = x[rows].rot90(number, (2, 3))
    return out
