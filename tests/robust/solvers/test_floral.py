"""FLORAL: the projection, the game's rounds by hand, and the SVM that it starts from."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize
from sklearn.svm import SVC
from torch import Tensor

from robust.solvers.floral import FLORAL, bias_of, project, rbf, solve_dual


def blobs(count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0).double()
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64) + 0.8 * y[:, None]
    return x, y


@pytest.mark.parametrize("seed", range(4))
def test_the_projection_is_the_nearest_feasible_point(seed):
    generator = torch.Generator().manual_seed(seed)
    a = 3 * torch.randn(7, generator=generator, dtype=torch.float64)
    y = torch.tensor([1.0, -1, 1, 1, -1, -1, 1], dtype=torch.float64)
    found = project(a, y, 1.5)
    assert (found >= 0).all() and (found <= 1.5).all() and float(y @ found) == pytest.approx(0, abs=1e-12)
    solved = minimize(
        lambda p: ((p - a.numpy()) ** 2).sum(),
        [0.5] * 7,
        bounds=[(0, 1.5)] * 7,
        constraints={"type": "eq", "fun": lambda p: float(y.numpy() @ p)},
        options={"ftol": 1e-14},
    )
    torch.testing.assert_close(found, torch.from_numpy(solved.x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounds", [0, 50])
def test_without_an_attacker_it_is_the_svm_and_stays_it(rounds):
    x, y = blobs()
    model = FLORAL(budget=0, c=2.0, gamma=0.5, rounds=rounds, step_size=0.01)(x, y)
    expected = SVC(C=2.0, gamma=0.5, tol=1e-6).fit(x.numpy(), y.numpy())
    points = blobs(seed=9)[0]
    scores = torch.from_numpy(expected.decision_function(points.numpy()))
    # The bias is the mean over all support vectors, also those at the bound, as in the authors' code.
    found = model(points)
    torch.testing.assert_close(found - found.mean(), scores - scores.mean(), rtol=1e-3, atol=1e-3)


def test_three_rounds_by_hand_each_with_flips_of_the_given_labels():
    x, y = blobs()
    floral = FLORAL(budget=3, c=1.0, gamma=0.5, rounds=3, step_size=0.05, seed=4)
    kernel = torch.tensor([[float(torch.exp(-0.5 * ((a - b) ** 2).sum())) for b in x] for a in x], dtype=torch.float64)
    torch.testing.assert_close(rbf(x, x, 0.5), kernel)
    alpha, flipped = solve_dual(kernel, y, 1.0), y
    generator = torch.Generator().manual_seed(4)
    for attacked in (True, True, False):
        used = flipped
        q = torch.outer(used, used) * kernel
        alpha = project(alpha - 0.05 * (q @ alpha - 1), used, 1.0)
        strongest = sorted(range(len(y)), key=lambda i: -float(alpha[i]))[:6]
        flipped = y.clone()
        for i in torch.randperm(6, generator=generator)[:3].tolist() if attacked else []:
            flipped[strongest[i]] *= -1
        assert int((flipped != y).sum()) == 3 * attacked
    flipped = used
    model = floral(x, y)
    torch.testing.assert_close(model.alpha, alpha)
    assert torch.equal(model.y, flipped)
    support = [i for i in range(len(y)) if alpha[i] > 1e-5]
    bias = sum(float(flipped[n] - kernel[n] @ (alpha * flipped)) for n in support) / len(support)
    assert model.bias == pytest.approx(bias)
    assert float(model(x[:1])) == pytest.approx(float(kernel[0] @ (alpha * flipped)) + bias)
    assert bias_of(kernel, y, torch.zeros_like(y)) == 0.0


def test_other_labels_are_refused():
    x, y = blobs()
    with pytest.raises(ValueError, match=r"expected labels -1 and 1, both of them, got \[0.0, 1.0\]"):
        FLORAL(budget=1)(x, (y + 1) / 2)
    with pytest.raises(ValueError, match="expected budget, rounds >= 0"):
        FLORAL(budget=-1)
