"""TAPS: the split, the attack in the latent box, the gradient connector and the product loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from certify.graph import Snapshot
from certify.interval import Interval
from certify.spec import other_classes
from certify.tracing import capture
from robust.objectives.sabr import SABR
from robust.objectives.shi_ibp import ShiIBP
from robust.objectives.staps import STAPS
from robust.objectives.taps import TAPS, LatentAttack, _Connect, split_before_relus
from tests.robust.objectives import oracle

EPS = 0.05


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def model(request):
    return oracle.small_net(batch_norm=request.param, hidden=4)


def latent_of(model, x, relus, shrink=1.0, eps=EPS):
    """(dense stretches of the classifier, lower, upper bounds of its input), by the oracle."""
    _, stats = oracle.clean_pass(model, x)
    stretches = oracle.segments(model, stats)
    cut = len(stretches) - 1 - relus
    low, high = oracle.hidden_boxes([*stretches[:cut], stretches[cut]], *oracle.pixel_box(x, eps), shrink)[-1]
    return stretches[cut:], low, high


def classify(stretches, points):
    for matrix, offset in stretches[:-1]:
        points = (points @ matrix.T + offset).relu()
    return points @ stretches[-1][0].T + stretches[-1][1]


@pytest.mark.parametrize("relus", [1, 2, 3])
def test_both_parts_of_every_split_make_the_whole_network(model, relus):
    x, y = oracle.images()
    snapshot = capture(model, x).snapshot()
    features, classifier = split_before_relus(snapshot, relus)
    torch.testing.assert_close(classifier(features(x)), snapshot(x))
    assert sum(type(node.op).__name__ == "ReLU" for node in classifier.nodes[1:]) == relus
    assert type(features.nodes[-1].op).__name__ == "ReLU"
    # Bounds too, also with the statistics of the batch.
    views = oracle.views_of(model, x, y, EPS)
    features, classifier = split_before_relus(views.snapshot, relus)
    latent, _ = views.walk(features, views.box)
    torch.testing.assert_close(views.margins(latent, classifier), views.margins(views.box))


@pytest.mark.parametrize("relus", [0, 4, 9])
def test_a_split_without_a_relu_on_both_sides_is_refused(model, relus):
    snapshot = capture(model, oracle.images()[0]).snapshot()
    with pytest.raises(ValueError, match=f"classifier_relus={relus}: the model has 4 ReLUs, expected 1 to 3"):
        split_before_relus(snapshot, relus)


def test_a_split_through_a_skip_connection_is_refused():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three, self.out = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x):
            h = self.one(x).relu()
            h = h + self.two(h).relu()
            return self.out(self.three(h).relu())

    snapshot = capture(Skip(), torch.rand(2, 6)).snapshot()
    x = torch.rand(3, 6)
    features, classifier = split_before_relus(snapshot, 2)
    torch.testing.assert_close(classifier(features(x)), snapshot(x))
    with pytest.raises(ValueError, match="skip connection crosses the split"):
        split_before_relus(snapshot, 1)


@pytest.mark.parametrize("at", [0.0, 0.2, 0.5, 0.7, 1.0])
def test_connector_passes_gradients_to_the_nearer_end_and_fades_towards_the_middle(at):
    low, high = torch.tensor([[-1.0]]).double(), torch.tensor([[3.0]]).double()
    low.requires_grad_(), high.requires_grad_()
    points = (low + at * (high - low)).detach()
    out = _Connect.apply(points, low, high)
    assert torch.equal(out, points)
    to_low, to_high = torch.autograd.grad(out.sum() * 5.0, (low, high))
    small = 0.5e-5 / 2.0  # tol / 2 over the reach, half the width of 4
    expected = {0.0: (1.0, 0.0), 0.2: (0.6, 0.0), 0.5: (small, small), 0.7: (0.0, 0.4), 1.0: (0.0, 1.0)}[at]
    torch.testing.assert_close((to_low.item() / 5, to_high.item() / 5), expected)


def test_connector_stays_finite_in_a_box_without_width_and_sums_over_points():
    low = torch.zeros(2, 1, 3, dtype=torch.float64, requires_grad=True)
    high = torch.zeros(2, 1, 3, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(_Connect.apply(torch.zeros(2, 5, 3).double(), low, high).sum(), (low, high))
    for grad in grads:
        torch.testing.assert_close(grad, torch.full((2, 1, 3), 5 * 0.5).double())


def connected(points, low, high):
    """Points as a function of the box's ends with the connector's derivative, written with detached coefficients."""
    width = (high - low).detach()
    half = (width / 2).clamp(min=1e-5)
    above = (points >= high.detach() - width / 2) * (points - (high.detach() - width / 2)).clamp(min=0.5e-5) / half
    below = (points <= low.detach() + width / 2) * ((low.detach() + width / 2) - points).clamp(min=0.5e-5) / half
    return points + above * (high - high.detach()) + below * (low - low.detach())


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize(("relus", "shrink"), [(1, 1.0), (2, 1.0), (2, 0.8), (3, 1.0)])
def test_value_and_gradient_of_the_product_agree_with_the_oracle(model, relus, shrink, scale):
    x, y = oracle.images()
    objective = TAPS(classifier_relus=relus, steps=5, gradient_scale=scale, relu_shrink=shrink)
    (term,) = objective(oracle.views_of(model, x, y, EPS)).values()
    stretches, low, high = latent_of(model, x, relus, shrink)
    # Where the attack ends is taken from the suite; its quality has a test of its own.
    views = oracle.views_of(model, x, y, EPS)
    _, classifier = split_before_relus(views.snapshot, relus)
    box = Interval.from_box(*(end.detach().view(len(x), *classifier.nodes[0].shape) for end in (low, high)))
    points = LatentAttack(5, 1)(classifier.without_gradient(), box, y, torch.Generator().manual_seed(0)).flatten(2)
    linked = connected(points, low.unsqueeze(1), high.unsqueeze(1))
    z = classify(stretches, linked)
    columns = []
    for b, label in enumerate(y.tolist()):
        others = [k for k in range(oracle.CLASSES) if k != label]
        columns.append(torch.stack([z[b, t, label] - z[b, t, k] for t, k in enumerate(others)]))
    attacked = (1 + (-torch.stack(columns)).exp().sum(1)).log().mean()
    _, stats = oracle.clean_pass(model, x)
    sound = oracle.loss_of_margins(
        oracle.margin_bounds(oracle.segments(model, stats), *oracle.pixel_box(x, EPS), y, shrink), y
    ).mean()
    torch.testing.assert_close(term, (attacked * sound).expand(len(x)))
    expected = [
        scale * sound.detach() * a + attacked.detach() * s
        for a, s in zip(oracle.gradients(attacked, model), oracle.gradients(sound, model), strict=True)
    ]
    oracle.assert_same_gradients(oracle.gradients(term.mean(), model), expected)


def test_while_the_radius_grows_taps_is_interval_training_and_staps_is_sabr(model):
    x, y = oracle.images()
    for ramp in (0.0, 0.5, 0.999):
        grown = TAPS(relu_shrink=0.8, classifier_relus=9)(oracle.views_of(model, x, y, EPS, ramp=ramp))
        plain = SABR(box_ratio=1.0, relu_shrink=0.8)(oracle.views_of(model, x, y, EPS))
        torch.testing.assert_close(grown["ibp"], plain["sabr"])
        small = STAPS(box_ratio=0.3)(oracle.views_of(model, x, y, EPS, ramp=ramp))
        torch.testing.assert_close(small["ibp"], SABR(box_ratio=0.3)(oracle.views_of(model, x, y, EPS))["sabr"])
    unshrunk = TAPS()(oracle.views_of(model, x, y, EPS, ramp=0.5))
    torch.testing.assert_close(unshrunk, ShiIBP()(oracle.views_of(model, x, y, EPS)))


@pytest.mark.parametrize("relus", [1, 3])
def test_staps_on_the_whole_ball_is_taps(model, relus):
    x, y = oracle.images()
    fields = {"classifier_relus": relus, "steps": 4, "restarts": 2, "gradient_scale": 3.0, "relu_shrink": 0.9}
    taps = TAPS(**fields, robust_weight=0.7)(oracle.views_of(model, x, y, EPS))
    # The search around the input takes no noise here, so that both latent attacks draw the same.
    staps = STAPS(box_ratio=1.0, attack=oracle.Fixed(), **fields, robust_weight=0.7)(oracle.views_of(model, x, y, EPS))
    torch.testing.assert_close(taps, staps)
    oracle.assert_same_gradients(
        oracle.gradients(oracle.loss_of(taps), model), oracle.gradients(oracle.loss_of(staps), model)
    )


def test_taps_loss_lies_between_attacked_points_and_bounds(model):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, EPS)
    (term,) = TAPS()(views).values()
    sound = oracle.loss_of(ShiIBP()(views))
    # Both factors are losses over the same latent box, the attacked one never above the sound one.
    assert term[0] <= sound.square() + 1e-12


@pytest.fixture
def latent(model):
    """(classifier with two ReLUs, box, labels, function: points `[B, K - 1, ...]` -> their margins `[B, K - 1]`)."""
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, 0.15)
    with torch.no_grad():
        features, classifier = split_before_relus(views.frozen, 2)
        box, _ = views.walk(features, views.box)

    def margins(points):
        z = classifier(points.flatten(0, 1)).view(*points.shape[:2], -1)
        own = z.gather(2, y[:, None, None].expand(-1, points.shape[1], 1)).squeeze(2)
        return own - z.gather(2, other_classes(y, oracle.CLASSES).unsqueeze(2)).squeeze(2)

    return classifier, box, y, margins


def test_latent_points_stay_in_the_box_and_beat_random_ones(latent):
    classifier, box, y, margins = latent
    points = LatentAttack(20, 1)(classifier, box, y, torch.Generator().manual_seed(0))
    assert points.shape == (len(y), oracle.CLASSES - 1, *box.lb.shape[1:]) and not points.requires_grad
    lb, ub = box.lb.unsqueeze(1), box.ub.unsqueeze(1)
    assert ((points >= lb) & (points <= ub)).all()
    start = margins(lb + (ub - lb) * torch.rand(points.shape, generator=torch.Generator().manual_seed(0)).double())
    noise = torch.Generator().manual_seed(7)
    random = torch.stack(
        [margins(lb + (ub - lb) * torch.rand(points.shape, generator=noise).double()) for _ in range(50)]
    )
    # An ascent may stop on a plateau of dead neurons, so single margins of fifty random draws may be lower.
    found = margins(points)
    assert found.mean() < random.amin(0).mean() and (found < random.mean(0)).double().mean() > 0.8
    assert found.mean() < start.mean()


def test_latent_attack_keeps_the_best_point_of_its_path_and_of_its_restarts(latent):
    classifier, box, y, margins = latent
    draws = []
    for attack in (LatentAttack(1, 1), LatentAttack(1, 4)):
        draws.append(margins(attack(classifier, box, y, torch.Generator().manual_seed(3))))
    # The first restart of both starts from the same noise.
    assert (draws[1] <= draws[0]).all() and (draws[1] < draws[0]).any()


def test_every_margin_has_a_point_of_its_own(latent):
    classifier, box, y, margins = latent
    points = LatentAttack(10, 1)(classifier, box, y, torch.Generator().manual_seed(0))
    own = margins(points)
    for t in range(1, points.shape[1]):
        assert own.mean() < margins(points.roll(t, 1)).mean() - 0.1


@pytest.fixture
def linear():
    """(dense classifier of five latent neurons, box, labels, signs of every margin's rows `[B, K - 1, 5]`)."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(5, 4)).double()
    nodes = capture(model, torch.zeros(2, 5, 1).double()).snapshot().nodes
    classifier = Snapshot((nodes[2], replace(nodes[3], inputs=(0,)))).without_gradient()
    low = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    y, weight = torch.tensor([0, 3, 1]), model[2].weight.detach()
    signs = [[(weight[k] - weight[j]).sign() for j in range(4) if j != k] for k in y.tolist()]
    return classifier, Interval.from_box(low, low + 0.5), y, torch.stack([torch.stack(rows) for rows in signs])


def test_latent_attack_on_a_linear_classifier_finds_the_exact_minimum(linear):
    classifier, box, y, signs = linear
    # Five steps of 0.4 widths cross the box from anywhere, and the best corner of a linear function is known.
    points = LatentAttack(5, 1)(classifier, box, y, torch.Generator().manual_seed(1))
    torch.testing.assert_close(points, torch.where(signs > 0, box.lb.unsqueeze(1), box.ub.unsqueeze(1)))


def test_a_latent_step_is_measured_in_whole_widths_of_the_box(linear, monkeypatch):
    classifier, box, y, signs = linear
    monkeypatch.setattr(LatentAttack, "lengths", lambda self: [0.1, 0.05])
    points = LatentAttack(2, 1)(classifier, box, y, torch.Generator().manual_seed(1))
    noise = torch.rand(signs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = ((noise - 0.1 * signs).clamp(0, 1) - 0.05 * signs).clamp(0, 1)
    torch.testing.assert_close(points, box.lb.unsqueeze(1) + 0.5 * share)


@pytest.mark.parametrize(
    ("steps", "first", "turns"),
    [
        (1, 2.0, []),
        (5, 0.4, []),
        (9, 2 / 9, []),
        (10, 0.2, [7]),
        (20, 0.2, [14]),
        (50, 0.2, [35]),
        (51, 0.2, [20, 35]),
        (80, 0.2, [32, 56]),
        (81, 0.2, [24, 48, 64]),
        (100, 0.2, [30, 60, 80]),
    ],
)
def test_step_lengths_follow_the_published_schedule(steps, first, turns):
    expected = [first * 0.2 ** sum(step >= turn for turn in turns) for step in range(steps)]
    assert LatentAttack(steps, 1).lengths() == pytest.approx(expected)


def test_latent_noise_comes_from_the_steps_generator(model):
    x, y = oracle.images()
    first, again, other = (TAPS(steps=1)(oracle.views_of(model, x, y, EPS, seed=s))["taps"] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
