"""AutoAttack: its composition, that survivors alone are passed on, and its agreement with the reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attacks import ATTACKS, AutoAttack, LinfBall, make_ball

SPELLED = {
    ("standard", "linf"): ["apgd", "apgd_t", "fab:targets=9", "square"],
    ("standard", "l2"): ["apgd", "apgd_t", "fab:targets=9", "square"],
    ("standard", "l1"): ["apgd:restarts=5", "apgd_t:targets=5", "fab:targets=9", "square"],
    ("plus", "linf"): [
        "apgd:restarts=5",
        "apgd:restarts=5,loss=dlr",
        "fab:restarts=5",
        "square",
        "apgd_t",
        "fab:targets=9",
    ],
    ("rand", "linf"): ["apgd:samples=20", "apgd:loss=dlr,samples=20"],
}


@pytest.mark.parametrize("version, norm", SPELLED)
def test_each_version_is_the_published_composition(version, norm):
    stages = AutoAttack(version=version).stages(make_ball(norm, 0.1))
    assert [ATTACKS.spell(stage) for stage in stages.values()] == SPELLED[version, norm]


def test_fields_reach_every_attack():
    attack = AutoAttack(steps=7, queries=9, seed=3, precision="bfloat16", mode="keep")
    for stage in attack.stages(LinfBall(0.1)).values():
        assert (stage.seed, stage.precision, stage.mode) == (3, "bfloat16", "keep")
        assert getattr(stage, "steps", 7) == 7 and getattr(stage, "queries", 9) == 9


def test_each_attack_sees_what_those_before_it_left(small_net, examples, monkeypatch):
    net, x = small_net(), examples(40)
    y = net(x).argmax(1)
    y[:5] = (y[:5] + 1) % 4
    ball = LinfBall(0.05)
    attack = AutoAttack(steps=10, queries=40)
    seen = {}

    def watched(self, ball, original=AutoAttack.stages):
        def watch(name, stage):
            def call(model, x, y, ball, **keys):
                points = stage(model, x, y, ball, **keys)
                seen[name] = keys["index"].tolist(), (net(points).argmax(1) != y).tolist()
                return points

            return call

        return {name: watch(name, stage) for name, stage in original(self, ball).items()}

    monkeypatch.setattr(AutoAttack, "stages", watched)
    points = attack(net, x, y, ball)
    left = list(range(5, 40))
    for numbers, fooled in seen.values():
        assert numbers == left
        left = [number for number, done in zip(numbers, fooled, strict=True) if not done]
    assert (net(points).argmax(1) == y).nonzero().flatten().tolist() == left
    assert 0 < len(left) < 35 and list(seen) == ["apgd_ce", "apgd_t", "fab_t", "square"]


def test_noise_of_the_model_is_averaged_by_the_version_for_it(examples):
    weight = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    calls = []

    def model(x):
        calls.append(len(x))
        return (x + 0.01 * torch.randn_like(x)).flatten(1) @ weight

    x = examples(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoAttack(version="rand", steps=2)(model, x, (x.flatten(1) @ weight).argmax(1), LinfBall(1e-4))
    # A clean pass; then for each attack a clean pass, start and first step of 20 samples each, the last point, and a
    # pass over the points returned.
    assert len(calls) == 1 + 2 * (1 + 2 * 20 + 1 + 1)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Small convolutional net trained on noisy blobs, with 60 examples near its boundaries."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(5, 3, 8, 8, generator=generator)
    y = torch.arange(300) % 5
    x = (0.3 * centres[y] + 0.35 + 0.16 * torch.randn(300, 3, 8, 8, generator=generator)).clamp(0, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 5),
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval(), x[:60], y[:60]


@pytest.mark.parametrize("norm, eps", [("linf", 0.03), ("l2", 0.3), ("l1", 1.5)])
def test_no_more_points_are_robust_than_for_the_reference(norm, eps, trained):
    reference = pytest.importorskip("pyautoattack", reason="the reference, pyautoattack on PyPI, is not installed")
    net, x, y = trained
    ball = make_ball(norm, eps)
    points = AutoAttack(steps=20, queries=100)(net, x, y, ball)
    assert ball.contains(points, x).all()
    other = reference.AutoAttack(
        net, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], eps=eps, seed=0, version="standard"
    )
    # Shorter runs, and no more targets than there are wrong classes: the reference fails on more.
    other.apgd.n_iter = other.apgd_targeted.n_iter = other.apgd_targeted.n_iter_orig = other.fab.n_iter = 20
    other.square.n_queries = 100
    other.apgd_targeted.n_target_classes = other.fab.n_target_classes = 4
    theirs, _ = other.run_standard_evaluation(x, y)
    with torch.no_grad():
        ours, theirs = net(points).argmax(1) == y, net(theirs).argmax(1) == y
    assert 5 < theirs.sum() < 55
    assert (ours & ~theirs).sum() <= 1 and (ours != theirs).float().mean() < 0.05
