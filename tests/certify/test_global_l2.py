"""Global l2 constants: never below an attained one, never guessed; and verdicts that no attack contradicts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import certify.bounds.global_l2 as module
from attacks.methods.pgd import PGD
from attacks.threat import L1Ball, L2Ball, LinfBall
from certify import VERIFIERS, bound, capture, global_l2_radius
from certify.bounds.global_l2 import lipschitz_constants
from certify.graph import Node
from certify.op import UnsupportedOp
from certify.ops.max_pool import MaxPool2d
from certify.ops.relu import ReLU
from certify.spec import margin_spec
from robust.lipschitz_layers.sll import SLL
from robust.lipschitz_layers.soc import SOC
from robust.min_max import MinMax
from robust.relu_shrinkage import ShrunkReLU
from tests.certify.networks import CLASSES, INPUT, KINDS, VARIANTS, Apply, network
from tests.certify.test_verifiers import cancelling

BLOCKS = {**KINDS, **VARIANTS}


def images(seed: int, count: int = 2) -> Tensor:
    return torch.rand(count, *INPUT, generator=torch.Generator().manual_seed(seed))


def constant_of(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Certified constant of a module from images to images, in float64."""
    net = nn.Sequential(model, nn.Flatten()).double().eval()
    return float(lipschitz_constants(capture(net, torch.zeros(1, *shape).double()).snapshot().nodes)[-1])


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    x = x.double()
    found = torch.autograd.functional.jacobian(lambda v: model(v.unsqueeze(0)).flatten(), x)
    return found.reshape(-1, x.numel())


@pytest.mark.parametrize("name", BLOCKS)
def test_points_of_the_ball_never_escape_the_bounds(name: str) -> None:
    model, x = network([BLOCKS[name]], 0).double(), images(0).double()
    ball = L2Ball(torch.tensor([0.01, 1.0]))
    lb, ub = bound(model, x, ball, method="global_l2")
    # From the extreme logits of random points on: uphill in each logit.
    noise = torch.Generator().manual_seed(0)
    points = torch.stack([ball.sample(x, noise) for _ in range(50)])
    for _ in range(3):
        points.requires_grad_()
        logits = model(points.flatten(0, 1)).unflatten(0, (50, 2))
        assert bool((lb - 1e-9 <= logits).all()) and bool((logits <= ub + 1e-9).all())
        signs = torch.where(torch.rand(50, 1, CLASSES, generator=noise) < 0.5, -1.0, 1.0)
        (gradient,) = torch.autograd.grad((logits * signs).sum(), points)
        steps = zip(points.detach(), gradient, strict=True)
        points = torch.stack([ball.project(p + ball.steepest(g, 1.0), x) for p, g in steps])


CONVS = [
    dict(zip(("kernel_size", "stride", "padding", "dilation", "groups"), values, strict=True))
    for values in itertools.product((1, 2, 3, (3, 2)), (1, 2, 3), (0, 1, 2), (1, 2), (1, 2))
]


def test_the_norm_of_a_convolution_is_never_below_the_exact_one_and_seldom_far_above() -> None:
    ratios = []
    for seed, options in enumerate(CONVS[::4]):
        torch.manual_seed(seed)
        layer = nn.Conv2d(4, 6, **options).double()
        try:
            exact = float(torch.linalg.svdvals(jacobian(layer, torch.zeros(4, 6, 7))).max())
        except RuntimeError:
            continue  # a kernel larger than the image
        ratios.append(constant_of(layer, (4, 6, 7)) / exact)
    assert len(ratios) > 25 and min(ratios) >= 1
    assert sorted(ratios)[len(ratios) // 2] < 1.1


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 1),
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d((3, 2), (1, 2)),
        nn.MaxPool2d(2, 1, dilation=2),
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 1, 1),
        nn.AdaptiveAvgPool2d(2),
        MinMax(),
        nn.Sigmoid(),
        nn.LeakyReLU(0.3),
        nn.ZeroPad2d(1),
    ],
    ids=str,
)
def test_the_constant_of_a_layer_without_weights_is_not_below_what_a_point_attains(layer: nn.Module) -> None:
    x = torch.zeros(2, 6, 6)
    x[:, 2, 2] = 1  # the maximum of every window that sees it: the worst point of a pool
    attained = float(torch.linalg.svdvals(jacobian(layer, x)).max())
    assert attained * (1 - 1e-12) <= constant_of(layer, (2, 6, 6))
    if isinstance(layer, nn.MaxPool2d):
        assert constant_of(layer, (2, 6, 6)) <= attained * (1 + 1e-9)


def test_the_hand_case_of_average_pooling_is_one_half() -> None:
    assert constant_of(nn.AvgPool2d(2), (1, 4, 4)) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_a_potential_step_is_known_by_its_weights_alone(kind: str) -> None:
    method, shape = SLL(), (3, 4, 4) if kind == "conv" else (6,)
    layer = method.conv(3, 3, (4, 4)) if kind == "conv" else method.dense(6)
    assert constant_of(layer, shape) == pytest.approx(1, abs=1e-9)
    inner = layer.double().inner().detach()
    # Another outer weight, and the constants of the branches add up.
    outer = 2 * _adjoint(inner)
    outer[0, 0] += 1e-3
    apply = (lambda x, w: F.conv2d(x, w, padding=1)) if kind == "conv" else F.linear
    changed = Apply(lambda x, w, v: x - apply(F.relu(apply(x, w)), v), inner, outer)
    assert constant_of(changed, shape) > 1.2
    # Weights too large for the form to be 1-Lipschitz.
    large = Apply(lambda x, w, v: x - apply(F.relu(apply(x, w)), v), 3 * inner, 6 * _adjoint(inner))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attained = float(torch.linalg.svdvals(jacobian(large, x)).max())
    assert 1 < attained <= constant_of(large, shape)


def _adjoint(weight: Tensor) -> Tensor:
    return weight.flip(2, 3).transpose(0, 1) if weight.dim() == 4 else weight.T


def test_the_radius_of_a_linear_model_is_the_distance_to_its_boundary() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 5)).double()
    x = images(0, 20).double()
    radius, prediction = global_l2_radius(model, x)
    logits, weight = model(x).detach(), model[1].weight.detach()
    for r, z, j in zip(radius, logits, prediction.tolist(), strict=True):
        others = [i for i in range(5) if i != j]
        exact = min(float((z[j] - z[i]) / (weight[j] - weight[i]).norm()) for i in others)
        assert exact * (1 - 1e-6) < float(r) <= exact


def test_the_bounds_of_a_linear_model_are_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 5)).double()
    x, y = images(0, 3).double(), torch.tensor([0, 3, 4])
    lb, ub = bound(model, x, L2Ball(0.3, None), spec=margin_spec(y, 5).double(), method="global_l2")
    rows = margin_spec(y, 5).double() @ model[1].weight
    margin = (margin_spec(y, 5).double() @ model(x).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(lb, margin - 0.3 * rows.norm(dim=2))
    torch.testing.assert_close(ub, margin + 0.3 * rows.norm(dim=2))


@pytest.mark.parametrize("terms", [1, 2, 3, 6])
def test_what_a_short_series_leaves_out_is_in_the_constant(terms: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        layer = SOC(terms=terms).conv(3, 3, (5, 5)).double().eval()
        layer.parametrizations.weight.original.data *= 100
        attained = float(torch.linalg.svdvals(jacobian(layer, torch.zeros(3, 5, 5))).max())
        assert attained > 1 or terms > 1
        assert attained * (1 - 1e-13) <= constant_of(layer, (3, 5, 5)) <= 1.5


def trained_like(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A small net whose constants are small enough for radii of the size of an attack's, with its predictions."""
    model = network([BLOCKS["min_max"]], seed, gain=0.5)
    x = images(seed, 12)
    return model, x, model(x).argmax(1)


def test_no_attack_succeeds_within_the_certified_radius_and_verdicts_agree_with_it() -> None:
    fooled_beyond = 0
    for seed in range(2):
        model, x, y = trained_like(seed)
        radius, prediction = global_l2_radius(model, x)
        assert torch.equal(prediction, y) and bool((radius > 0).all())
        ball = L2Ball(radius * 0.999, pixel_range=None)
        x_adv = PGD(steps=40, restarts=2)(model, x, y, ball)
        assert torch.equal(model(x_adv).argmax(1), y)
        assert all(v.status == "certified" for v in VERIFIERS.parse("global_l2")(model, x, y, ball))
        beyond = L2Ball(radius * 30, pixel_range=None)
        fooled = model(PGD(steps=40, restarts=2)(model, x, y, beyond)).argmax(1) != y
        fooled_beyond += int(fooled.sum())
        for wrong, verdict in zip(fooled, VERIFIERS.parse("global_l2")(model, x, y, beyond), strict=True):
            assert verdict.status == "unknown" or not wrong
    assert fooled_beyond > 5


def test_a_verdict_does_not_depend_on_the_rest_of_the_batch_nor_on_its_pieces() -> None:
    model, x, y = trained_like(5)
    y[3] = (y[3] + 1) % CLASSES
    eps = torch.linspace(0.01, 1.0, len(x))
    together = VERIFIERS.parse("global_l2")(model, x, y, L2Ball(eps))
    assert {v.status for v in together} == {"certified", "unknown", "misclassified"}
    pieces = VERIFIERS.parse("global_l2:batch_size=5")(model, x, y, L2Ball(eps))
    assert [v.status for v in pieces] == [v.status for v in together]
    for i, verdict in enumerate(together):
        (alone,) = VERIFIERS.parse("global_l2")(model, x[i : i + 1], y[i : i + 1], L2Ball(float(eps[i])))
        assert alone.status == verdict.status
        assert alone.margin_lb == pytest.approx(verdict.margin_lb, abs=1e-5)


def test_a_tie_is_no_certificate() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    x = torch.rand(2, 4)
    assert global_l2_radius(model, x)[0].tolist() == [0, 0]
    for eps in (0.0, 0.1):
        verdicts = VERIFIERS.parse("global_l2")(model, x, torch.zeros(2, dtype=torch.long), L2Ball(eps))
        assert [v.status for v in verdicts] == ["unknown", "unknown"]


def test_classes_that_can_never_draw_level_leave_an_infinite_radius() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.ones_(model[1].weight)
    model[1].bias.data = torch.tensor([1.0, 0.0])
    radius, prediction = global_l2_radius(model, torch.rand(2, 4))
    assert radius.tolist() == [torch.inf] * 2 and prediction.tolist() == [0, 0]


@pytest.mark.parametrize("hidden", [False, True])
def test_cancellation_between_large_weights_is_never_decided_in_float32(hidden: bool) -> None:
    for seed in range(3):
        model = cancelling(seed)
        if hidden:  # where the last layer's own terms are small
            model.append(nn.Linear(2, 2))
            model[3].weight.data, model[3].bias.data = torch.eye(2), torch.zeros(2)
        x = torch.rand(50, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            y = model(x).argmax(1)
            first, _, last = model[:3]
            exact = last.weight.double() @ (first.weight.double() @ x.double().T + first.bias.double().unsqueeze(1))
        wrong = exact.argmax(0) != y
        verdicts = VERIFIERS.parse("global_l2")(model, x, y, L2Ball(0.0))
        found = torch.tensor([v.status == "certified" for v in verdicts])
        assert bool(wrong.any()) and not bool((found & wrong).any())


@pytest.mark.parametrize("ball", [LinfBall(0.1), L1Ball(0.1)], ids=lambda ball: ball.norm)
def test_other_balls_are_refused_in_one_line(ball: LinfBall) -> None:
    model, x, y = trained_like(0)
    with pytest.raises(ValueError, match=f"an {ball.norm} ball; this verifier knows l2$"):
        VERIFIERS.parse("global_l2")(model, x, y, ball)
    with pytest.raises(ValueError, match=f"global_l2 bounds l2 balls, got an {ball.norm} ball") as error:
        bound(model, x, ball, spec=margin_spec(y, CLASSES), method="global_l2")
    assert "\n" not in str(error.value)


def test_an_op_without_a_constant_is_refused_by_name() -> None:
    nodes = [Node("pixels", ReLU(), (), (3,)), Node("shrunk", ShrunkReLU(ReLU(), 0.5), (0,), (3,))]
    with pytest.raises(
        UnsupportedOp, match="global_l2, node 'shrunk': ShrunkReLU has no rule for its Lipschitz constant"
    ):
        lipschitz_constants(nodes)


def test_norms_are_remembered_by_the_weights_and_not_by_where_they_lie() -> None:
    layer = nn.Linear(5, 4, bias=False).double()
    before = constant_of(layer, (5,))
    layer.weight.data *= 3
    assert constant_of(layer, (5,)) == pytest.approx(3 * before, rel=1e-12)
    pool = [constant_of(nn.AvgPool2d(k), (1, 12, 12)) for k in (2, 3, 4)]
    assert pool == pytest.approx([1 / 2, 1 / 3, 1 / 4], rel=1e-12)


BUGS = {
    "branches: the greater one": (
        module,
        "_constant",
        "skip",
        lambda rule: lambda op, c: c[0] if len(c) > 1 else rule(op, c),
    ),
    "pool: windows do not overlap": (MaxPool2d, "lipschitz", "max_pool", lambda rule: lambda pool, norm: 1.0),
    "norm: a tenth is lost": (module, "_norm", "conv", lambda rule: lambda op: 0.9 * rule(op)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_check_finds_a_constant_that_is_too_small(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, block, plant = BUGS[bug]
    monkeypatch.setattr(owner, name, plant(getattr(owner, name)))
    with pytest.raises(AssertionError):
        for seed in range(20):
            torch.manual_seed(seed)
            made = BLOCKS[block]((2, 6, 6)).double().eval()
            x = torch.zeros(2, 6, 6)
            x[:, 2, 2] = 1
            attained = float(torch.linalg.svdvals(jacobian(made, x)).max())
            assert attained <= constant_of(made, (2, 6, 6)) * (1 + 1e-12)
