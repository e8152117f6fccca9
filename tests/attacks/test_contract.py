"""What every registered attack promises, whatever its method."""

from __future__ import annotations

import importlib.util
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from attacks import ATTACKS, Attack, as_torchattack, make_ball

SHORT = {
    "autoattack": "autoattack:steps=3,queries=8",
    "carlini_wagner": "carlini_wagner:steps=6,searches=3",
    "square": "square:queries=30",
}


def shortened(name: str) -> str:
    """The attack at its defaults, but for the length of its runs."""
    return SHORT.get(name, f"{name}:steps=12" if hasattr(ATTACKS[name], "steps") else name)


PACKAGES = {
    "torchattacks": "name=MIFGSM",
    "foolbox": "name=LinfProjectedGradientDescent,options=steps=5+random_start=false",
}
FOREIGN = [f"{name}:{text}" for name, text in PACKAGES.items() if importlib.util.find_spec(name)]
ATTACK_TEXTS = [
    *(shortened(name) for name in ATTACKS.names() if name not in PACKAGES),
    *FOREIGN,
    "fgsm:start=uniform,step_size=1.25",
    "pgd:keep=last,decay=0.1,decay_at=0.5+0.8,unit=box",
    "pgd:keep=best,restarts=3,steps=5,start=gaussian,loss=kl",
    "pgd:keep=fooled,loss=dlr,restarts=2,steps=5",
    "mifgsm:keep=first_fooled",
    "margin_pgd:restarts=2,rows=8,steps=6",
    "apgd:loss=dlr,restarts=2,steps=12",
    "apgd_t:restarts=2,steps=12",
    "apgd:wide_start=false,samples=2,steps=12",
    "fab:targets=3,restarts=2,steps=6",
]
CASES = [
    (text, norm)
    for text in ATTACK_TEXTS
    for norm in ATTACKS.parse(text).norms
    if not ("unit=box" in text and norm != "linf")
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request):
    """An attack and the norm of the ball to search."""
    text, norm = request.param
    return ATTACKS.parse(text), norm


def problem(small_net, examples, classes: int = 4, count: int = 7, dtype: torch.dtype = torch.float32):
    """Network, images and labels; most labels are right, the last one is wrong."""
    net, x = small_net(classes, dtype=dtype), examples(count, dtype=dtype)
    y = net(x).argmax(1)
    y[-1] = (y[-1] + 1) % classes
    return net, x, y


def exactly_inside(norm: str, point: torch.Tensor, x: torch.Tensor, eps: float) -> bool:
    """Membership of one example by rational arithmetic."""
    pixels = zip(point.flatten().tolist(), x.flatten().tolist(), strict=True)
    moves = [abs(Fraction(p) - Fraction(q)) for p, q in pixels]
    size = {"linf": max(moves), "l1": sum(moves), "l2": sum(m * m for m in moves)}[norm]
    in_range = all(0 <= p <= 1 for p in point.flatten().tolist())
    return in_range and size <= (Fraction(eps) ** 2 if norm == "l2" else Fraction(eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 8 / 255, 0.3, 1.0])
def test_points_are_truly_inside_the_ball_and_the_pixel_range(case, eps, dtype, small_net, examples):
    attack, norm = case
    net, x, y = problem(small_net, examples, dtype=dtype)
    x_adv = attack(net, x, y, make_ball(norm, eps))
    assert x_adv.shape == x.shape and x_adv.dtype == dtype and not x_adv.requires_grad
    assert all(exactly_inside(norm, p, q, eps) for p, q in zip(x_adv, x, strict=True))
    if eps == 0:
        assert torch.equal(x_adv, x)


def test_a_radius_per_example_is_respected(case, small_net, examples):
    attack, norm = case
    net, x, y = problem(small_net, examples)
    radii = torch.tensor([0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
    x_adv = attack(net, x, y, make_ball(norm, radii))
    assert all(exactly_inside(norm, p, q, e) for p, q, e in zip(x_adv, x, radii.tolist(), strict=True))


@pytest.mark.parametrize("difference", [-1, 2])
def test_radii_of_more_or_fewer_examples_are_refused(case, difference, small_net, examples):
    attack, norm = case
    net, x, y = problem(small_net, examples)
    with pytest.raises(ValueError, match=f"holds {len(x) + difference} radii, the batch {len(x)} examples"):
        attack(net, x, y, make_ball(norm, torch.full((len(x) + difference,), 0.1)))


def test_the_same_seed_or_generator_gives_the_same_points_and_the_global_stream_is_not_used(case, small_net, examples):
    attack, norm = case
    net, x, y = problem(small_net, examples)
    ball = make_ball(norm, 0.1)
    stream = torch.get_rng_state()
    assert torch.equal(attack(net, x, y, ball), attack(net, x, y, ball))
    drawn = [attack(net, x, y, ball, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert torch.equal(stream, torch.get_rng_state())


def test_the_model_is_left_as_it_was_also_when_it_fails(case, small_net, examples):
    attack, norm = case
    net, x, y = problem(small_net, examples)
    net.train()
    net[2].eval()
    net[1].weight.requires_grad_(False)

    def state() -> list:
        flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
        return [*flags, [p.grad for p in net.parameters()], {k: v.tolist() for k, v in net.state_dict().items()}]

    before, default = state(), torch.get_default_dtype()
    attack(net, x, y, make_ball(norm, 0.1))
    assert state() == before and torch.is_grad_enabled()

    calls = []

    def fail_later(module, inputs):
        calls.append(module)
        if len(calls) > 1 or type(attack).__name__ in ("FGSM", "MIFGSM"):
            raise ZeroDivisionError

    handle = net.register_forward_pre_hook(fail_later)
    with pytest.raises(ZeroDivisionError):
        attack(net, x, y, make_ball(norm, 0.1))
    handle.remove()
    assert state() == before and torch.get_default_dtype() == default


def test_the_inputs_are_left_as_they_were(case, small_net, examples):
    attack, norm = case
    net, x, y = problem(small_net, examples)
    x_before, y_before = x.clone(), y.clone()
    x_adv = attack(net, x, y, make_ball(norm, 0.1))
    assert torch.equal(x, x_before) and torch.equal(y, y_before)
    assert x_adv.data_ptr() != x.data_ptr() and x.grad is None


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_are_no_obstacle(case, classes, small_net, examples):
    attack, norm = case
    net, x, y = problem(small_net, examples, classes)
    x_adv = attack(net, x, y, make_ball(norm, 0.3))
    assert x_adv.isfinite().all()
    assert (net(x_adv).argmax(1) != y).sum() >= 1  # the example that is wrong from the start


def test_one_example_and_no_example_are_batches_too(case, small_net, examples):
    attack, norm = case
    net, x, y = problem(small_net, examples)
    ball = make_ball(norm, 0.1)
    assert attack(net, x[:1], y[:1], ball).shape == x[:1].shape
    assert attack(net, x[:0], y[:0], ball).shape == x[:0].shape


def test_a_batch_of_misclassified_examples_stays_misclassified(case, small_net, examples):
    attack, norm = case
    if getattr(attack, "keep", None) == "last" or type(attack).__name__ in ("FGSM", "FriendlyPGD"):
        pytest.skip("follows its path to the end, wherever that is")
    net, x, _ = problem(small_net, examples)
    y = (net(x).argmax(1) + 1) % 4
    x_adv = attack(net, x, y, make_ball(norm, 0.01))
    assert (net(x_adv).argmax(1) != y).all()
    if getattr(attack, "keep", "first_fooled") == "first_fooled":
        assert torch.equal(x_adv, x)


def test_an_example_is_fooled_or_not_whatever_its_batch(case, small_net, examples):
    attack, norm = case
    net, x, y = problem(small_net, examples, count=24, dtype=torch.float64)
    ball = make_ball(norm, {"linf": 0.06, "l2": 0.2, "l1": 0.4}[norm])
    index = torch.arange(24)
    together = attack(net, x, y, ball, index=index)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    parts = [attack(net, x[rows], y[rows], ball, index=index[rows]) for rows in order.split(5)]
    apart = torch.cat(parts)[order.argsort()]
    fooled = net(together).argmax(1) != y
    assert torch.equal(fooled, net(apart).argmax(1) != y)
    if type(attack).__name__ != "MarginPGD":  # its first successful target depends on how many run side by side
        torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)


def test_any_function_is_a_model_and_no_grad_is_no_obstacle(case, examples):
    attack, norm = case
    weight = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    x = examples(5)

    def model(x):
        return x.flatten(1) @ weight

    with torch.no_grad():
        x_adv = attack(model, x, model(x).argmax(1), make_ball(norm, 0.1))
    assert make_ball(norm, 0.1).contains(x_adv, x).all()


def test_images_that_want_gradients_get_detached_points(case, small_net, examples):
    attack, norm = case
    net, x, y = problem(small_net, examples)
    x_adv = attack(net, x.clone().requires_grad_(), y, make_ball(norm, 0.1))
    assert not x_adv.requires_grad
    assert torch.equal(x_adv, attack(net, x, y, make_ball(norm, 0.1)))


def test_reduced_precision_keeps_the_points_exact(case, small_net, examples):
    attack, norm = case
    net, x, y = problem(small_net, examples)
    low = type(attack)(**{**vars(attack), "precision": "bfloat16"})
    x_adv = low(net, x, y, make_ball(norm, 0.1))
    assert x_adv.dtype == torch.float32 and make_ball(norm, 0.1).contains(x_adv, x).all()


def test_every_attack_says_which_norms_it_searches_and_has_a_seed(case):
    attack, _ = case
    assert isinstance(attack, Attack)
    assert attack.seed == 0 and set(attack.norms) <= {"linf", "l2", "l1"}


def test_an_attack_serves_code_written_for_torchattacks(small_net, examples):
    net, x, y = problem(small_net, examples)
    ball = make_ball("linf", 0.1)
    attack = ATTACKS.parse("pgd:steps=3")
    images = as_torchattack(attack, net, ball)(x, y)
    assert torch.equal(images, attack(net, x, y, ball))
    with pytest.raises(ValueError, match="put the normalisation into the model's first layer"):
        as_torchattack(attack, net, ball)(x * 4 - 2, y)


def test_a_ball_that_an_attack_cannot_search_is_refused(small_net, examples):
    net, x, y = problem(small_net, examples)
    with pytest.raises(ValueError, match="DeepFool has no steps for the norm l1; it knows: linf, l2"):
        ATTACKS.parse("deepfool")(net, x, y, make_ball("l1", 1.0))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "text",
    [
        "pgd:steps=4,step_size=0.5",
        "margin_pgd:steps=4",
        "apgd:steps=6",
        "apgd_t:steps=6",
        "fab:steps=2",
        "fab:steps=1,targets=2",
        "square:queries=10",
    ],
)
def test_more_restarts_never_fool_fewer_examples(text, norm, small_net, examples):
    attack = ATTACKS.parse(text)
    if norm not in attack.norms:
        pytest.skip("not searched")
    net, x, y = problem(small_net, examples, count=60)
    ball = make_ball(norm, {"linf": 0.05, "l2": 0.2, "l1": 0.5}[norm])
    before = torch.zeros(60, dtype=torch.bool)
    for restarts in (1, 2, 4):
        fooled = net(type(attack)(**{**vars(attack), "restarts": restarts})(net, x, y, ball)).argmax(1) != y
        assert (fooled | ~before).all()
        before = fooled
    assert 0 < before.sum() < 60


@pytest.mark.parametrize(
    "text", ["pgd:steps=1", "pgd:steps=1,keep=best", "margin_pgd:steps=1", "apgd:steps=1", "apgd_t:steps=1"]
)
def test_every_restart_starts_elsewhere(text, small_net, examples):
    net, x, _ = problem(small_net, examples)
    y = net(x).argmax(1)
    seen = []
    handle = net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:7].clone()))
    attack = ATTACKS.parse(text)
    type(attack)(**{**vars(attack), "restarts": 3})(net, x, y, make_ball("linf", 1e-3))
    handle.remove()
    starts = seen if "keep" in text else seen[1:]  # the first pass classifies the clean points
    starts = starts[::2]  # one step: a start, an end
    distinct = {tuple(start[0].flatten().tolist()) for start in starts}
    assert len(starts) >= 3 and len(distinct) == len(starts)


def test_a_saturated_cross_entropy_stops_pgd_but_not_the_margin_losses(examples):
    # Logit gaps of 1e4 and more: in float32 the softmax is exactly one-hot and the cross-entropy has no slope at all.
    torch.manual_seed(0)
    hidden, out = nn.Linear(12, 12), nn.Linear(12, 3, bias=False)
    with torch.no_grad():
        hidden.weight.copy_(torch.eye(12))
        hidden.bias.zero_()
        out.weight.mul_(1e6)
    net = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), out)
    x = examples(200)
    logits = net(x).detach()
    y = logits.argmax(1)
    gap = logits.topk(2, dim=1).values.diff(dim=1).abs().squeeze(1)
    x, y = x[gap > 2e4], y[gap > 2e4]
    ball = make_ball("linf", 0.2)

    def robust(text: str) -> float:
        return (net(ATTACKS.parse(text)(net, x, y, ball)).argmax(1) == y).float().mean().item()

    assert robust("pgd:start=clean") == 1.0
    for text in ("pgd:start=clean,loss=margin", "pgd:start=clean,loss=dlr", "margin_pgd", "apgd:loss=dlr", "apgd_t"):
        assert robust(text) < 0.7, text


@pytest.mark.parametrize("text", ["pgd:steps=-1", "pgd:restarts=0", "pgd:keep=last,restarts=2", "apgd:steps=0"])
def test_counts_that_make_no_attack_are_refused(text):
    with pytest.raises(ValueError, match=r"expected|restarts"):
        ATTACKS.parse(text)


def test_pgd_climbs_further_with_more_steps(small_net, examples):
    net, x, y = problem(small_net, examples, count=60)
    ball = make_ball("linf", 0.05)
    losses = []
    for steps in (1, 4, 16):
        x_adv = ATTACKS.parse(f"pgd:steps={steps},keep=best,start=clean")(net, x, y, ball)
        losses.append(nn.functional.cross_entropy(net(x_adv), y).item())
    assert losses == sorted(losses) and math.isfinite(losses[-1])
