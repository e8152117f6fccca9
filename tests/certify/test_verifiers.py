"""What all verifiers have in common, and what the cascade adds."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from attacks.threat import Ball, L1Ball, L2Ball, LinfBall, make_ball
from certify.bounds.bound import bound
from certify.docket import Docket, Request, _padded
from certify.graph import Snapshot
from certify.precision import ALLOWANCES, exact_arithmetic
from certify.region import Region
from certify.spec import margin_spec
from certify.verdict import SoundnessError, Verdict
from certify.verifier import VERIFIERS
from certify.verifiers.alpha_crown import AlphaCROWN
from certify.verifiers.cascade import Cascade
from certify.verifiers.crown import CROWN
from certify.verifiers.ibp import IBP
from certify.verifiers.ibp import bound as ibp_bound
from tests.certify.networks import CLASSES, INPUT, KINDS, Apply, network

ALL = sorted({name for name in VERIFIERS.names()} & {"ibp", "crown_ibp", "crown", "alpha_crown", "cascade"})


def problem(seed: int = 0, count: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """A network and images with the labels that it predicts."""
    model = network([KINDS["relu"], KINDS["conv"], KINDS["relu"]], seed)
    x = torch.rand(count, *INPUT, generator=torch.Generator().manual_seed(seed))
    return model, x, model(x).argmax(1)


def facts(verdicts: list[Verdict]) -> list[tuple[str, str]]:
    return [(v.status, v.method) for v in verdicts]


@pytest.mark.parametrize("name", ALL)
def test_verifiers_can_be_written_as_text(name: str) -> None:
    method = VERIFIERS.parse(name)
    assert VERIFIERS.parse(VERIFIERS.spell(method)) == method
    other = dataclasses.replace(method, batch_size=3)
    assert VERIFIERS.spell(other) == f"{name}:batch_size=3" and VERIFIERS.parse(VERIFIERS.spell(other)) == other
    assert method.sound and set(method.norms) == {"linf", "l2", "l1"}


def test_the_attacks_of_the_cascade_are_part_of_its_text() -> None:
    method = VERIFIERS.parse("cascade:attack=none,long_attack=(margin_pgd:steps=7),timeout=20")
    assert method.attack is None and method.long_attack.steps == 7 and method.timeout == 20


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ball", [LinfBall(1e-3), L2Ball(1e-3), L1Ball(1e-3)], ids=lambda b: b.norm)
def test_tiny_balls_are_certified_and_wrong_predictions_are_misclassified(name: str, ball: Ball) -> None:
    model, x, y = problem()
    y[2] = (y[2] + 1) % CLASSES
    verdicts = VERIFIERS.parse(name)(model, x, y, ball)
    assert [v.status for v in verdicts] == ["certified"] * 2 + ["misclassified"] + ["certified"] * 3
    for verdict, logits, label in zip(verdicts, model(x).detach(), y, strict=True):
        others = logits[torch.arange(CLASSES) != label]
        if verdict.status == "certified":
            assert 0 < verdict.margin_lb <= float(logits[label] - others.max()) + 1e-5


@pytest.mark.parametrize("name", ALL)
def test_no_verifier_certifies_where_the_cascade_found_a_witness(name: str) -> None:
    model, x, y = problem(count=12)
    for eps in (0.03, 0.1):
        witnesses = Cascade(last=None, alpha=AlphaCROWN(iterations=5))(model, x, y, LinfBall(eps))
        for found, verdict in zip(witnesses, VERIFIERS.parse(name)(model, x, y, LinfBall(eps)), strict=True):
            assert {found.status, verdict.status} != {"falsified", "certified"}
    assert any(v.status == "falsified" for v in witnesses)


@pytest.mark.parametrize("name", ALL)
def test_a_verdict_does_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    model, x, y = problem(count=8)
    y[3] = (y[3] + 1) % CLASSES
    eps = torch.tensor([0.004, 0.02, 0.01, 0.02, 0.05, 0.1, 0.015, 0.025])
    method = VERIFIERS.parse(name)
    together = method(model, x, y, LinfBall(eps))
    for i in range(len(x)):
        (alone,) = method(model, x[i : i + 1], y[i : i + 1], LinfBall(float(eps[i])), index=torch.tensor([i]))
        assert (alone.status, alone.method) == (together[i].status, together[i].method)
        if alone.status == "unknown" and name != "cascade":
            assert alone.margin_lb == pytest.approx(together[i].margin_lb, abs=1e-4)
    assert facts(dataclasses.replace(method, batch_size=3)(model, x, y, LinfBall(eps))) == facts(together)


@pytest.mark.parametrize("name", ALL)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, x, y = problem()
    model.train()
    model.body[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    VERIFIERS.parse(name)(model, x, y, LinfBall(0.03))
    assert flags == [module.training for module in model.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_verifiers_accept_no_examples_and_float64_models() -> None:
    model, x, y = problem()
    assert IBP()(model, x[:0], y[:0], LinfBall(0.01)) == []
    verdicts = CROWN()(model.double(), x.double(), y, LinfBall(1e-3))
    assert all(v.status == "certified" for v in verdicts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, x, y: (m, x * 255, y), "outside the pixel range"),
        (lambda m, x, y: (m, x * math.nan, y), "not finite"),
        (lambda m, x, y: (m, x, y + 10), "the model has 4 classes"),
        (lambda m, x, y: (m, x, y - 5), "the model has 4 classes"),
        (lambda m, x, y: (m, x, y[:2]), "one label per example"),
        (lambda m, x, y: (m, x[0, 0, 0], y[:5]), "must be a batch"),
        (lambda m, x, y: (m.bfloat16(), x.bfloat16(), y), "need float32 or float64"),
        (lambda m, x, y: (m.double(), x, y), "the model has parameters of torch.float64"),
        (lambda m, x, y: (m, x, y.byte()), r"y is torch.uint8; labels are .* int64"),
        (lambda m, x, y: (m, x, y.float()), r"y is torch.float32; labels are .* int64"),
        (lambda m, x, y: (m, x, y.tolist()), r"y must be a tensor of labels .*, got a list"),
        (lambda m, x, y: (m, x.numpy(), y), "x must be a tensor of images"),
        (lambda m, x, y: (m, x, y.to("meta")), "on one device, got cpu, meta"),
        (lambda m, x, y: (m.forward, x, y), "model must be an nn.Module, got"),
        (lambda m, x, y: (m, torch.rand(6, 1, 9, 9), y), r"cannot take images of shape \(6, 1, 9, 9\)"),
        (lambda m, x, y: (Apply(lambda x, f: (f(x), x), m), x, y), r"one tensor of logits \[B, K\], got a tuple"),
    ],
)
@pytest.mark.parametrize("name", ["ibp", "auto_lirpa"])
def test_problems_that_make_no_sense_are_refused_in_one_line(change: object, message: str, name: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        VERIFIERS.parse(name)(*change(*problem()), LinfBall(0.01))  # type: ignore[operator]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ALL)
def test_balls_of_another_batch_and_no_balls_are_refused(name: str) -> None:
    verifier = VERIFIERS.parse(name)
    ball = make_ball(verifier.norms[0], torch.full((8,), 0.01))
    with pytest.raises(ValueError, match="the ball holds 8 radii, the batch 6 examples"):
        verifier(*problem(), ball)
    with pytest.raises(ValueError, match="ball must be a threat model such as LinfBall"):
        verifier(*problem(), 0.01)


@pytest.mark.parametrize("name", ALL)
def test_images_that_want_gradients_change_nothing(name: str) -> None:
    model, x, y = problem()
    verifier = VERIFIERS.parse(name)
    ball = make_ball(verifier.norms[0], 0.01)
    expected = [v.status for v in verifier(model, x, y, ball)]
    assert [v.status for v in verifier(model, x.clone().requires_grad_(), y, ball)] == expected


@pytest.mark.parametrize("name", VERIFIERS.names())
@pytest.mark.parametrize(
    ("field", "wrong"), [("batch_size", 0), ("batch", -1), ("timeout", math.nan), ("timeout", -1.0)]
)
def test_hyper_parameters_that_mean_nothing_are_refused(name: str, field: str, wrong: float) -> None:
    """With a timeout of nan every image was unknown; a negative size of batches split them from the other end."""
    verifier = VERIFIERS[name]
    if field in {f.name for f in dataclasses.fields(verifier)}:
        with pytest.raises(ValueError, match=rf"{verifier.__name__}: {field} must be at least \d, got {wrong}"):
            verifier(**{field: wrong})


def test_ascent_in_inference_mode_says_what_to_do() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside torch\.inference_mode"):
        VERIFIERS.parse("alpha_crown")(*problem(), LinfBall(0.1))


def test_labels_that_would_be_taken_for_a_mask_make_no_margins() -> None:
    y = torch.tensor([1, 2, 1])
    assert torch.equal(margin_spec(y.int(), 3), margin_spec(y, 3))
    for wrong in (y.byte(), y.bool(), y.float()):  # identity[bytes] is a selection of rows, of the shape of a right one
        with pytest.raises(ValueError, match="labels are numbers of classes in int64"):
            margin_spec(wrong, 3)
    with pytest.raises(IndexError):
        margin_spec(-y, 3)


def test_bounds_of_images_outside_the_pixel_range_and_of_odd_specs_are_refused() -> None:
    """The box of such an image ends before it begins; its bounds looked like proofs."""
    model, x, y = problem()
    for wrong, message in ((x * 255, "outside the pixel range"), (x * math.nan, "not finite")):
        with pytest.raises(ValueError, match=message):
            bound(model, wrong, LinfBall(0.01), spec=margin_spec(y, 4))
    spec = margin_spec(y, 4)
    for odd in (spec[0], spec[:3], spec[:, :, :3], spec.double()):
        with pytest.raises(ValueError, match=r"spec must be \[B, R, K\] = \[6, R, 4\] of torch.float32, got"):
            bound(model, x, LinfBall(0.01), spec=odd)


def test_an_unknown_norm_is_refused() -> None:
    class Odd(LinfBall):
        norm = "l0"

    with pytest.raises(ValueError, match="l0 ball; this verifier knows linf, l2, l1"):
        IBP()(*problem(), Odd(0.1))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", ALL)
def test_networks_that_overflow_are_never_certified(name: str, poison: float) -> None:
    model, x, y = problem()
    model.body[2].weight.data[0, 0, 0, 0] = poison
    if math.isinf(poison):
        # Finite logits on the images, overflow in the bounds only.
        model.body[2].weight.data[0] = 3e38
        model.body[2].bias.data[0] = -3e38
        y = model(x).nan_to_num(0, 0, 0).argmax(1)
    assert all(v.status in ("unknown", "misclassified") for v in VERIFIERS.parse(name)(model, x, y, LinfBall(0.05)))


def test_a_bound_of_nan_or_infinity_proves_nothing() -> None:
    model, x, y = problem()
    for value in (math.nan, math.inf):
        docket = Docket(model, x, y, LinfBall(0.01))

        def broken(snapshot: object, region: object, request: object, value: float = value) -> tuple[Tensor, Tensor]:
            return torch.full((len(x), CLASSES - 1), value), torch.ones(len(x), CLASSES - 1)

        docket.prove("broken", broken, 64)  # type: ignore[arg-type]
        assert all(v.status == "unknown" for v in docket.verdicts("broken"))


def test_a_float32_bound_within_its_allowance_is_decided_in_float64() -> None:
    model, x, y = problem(count=1)
    asked = []

    def small(snapshot: object, region: object, request: object) -> tuple[Tensor, Tensor]:
        dtype = region.center.dtype  # type: ignore[attr-defined]
        asked.append(dtype)
        shape = request.wanted.shape  # type: ignore[attr-defined]
        return torch.full(shape, 1e-6, dtype=dtype), torch.ones(shape, dtype=dtype)

    docket = Docket(model, x, y, LinfBall(0.01))
    docket.prove("small", small, 64)  # type: ignore[arg-type]
    (verdict,) = docket.verdicts("small")
    assert asked == [torch.float32, torch.float64]
    assert (verdict.status, verdict.precision) == ("certified", "float64")
    assert verdict.margin_lb == pytest.approx(1e-6)


def cancelling(seed: int) -> nn.Sequential:
    """Two logits, of which one is 0 and the other a sum of large terms that cancel but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    weight = 1e4 * torch.randn(64, 8, generator=generator)
    bias = torch.full((64,), 2e5)  # every neuron is active
    columns = torch.cat([weight, bias.unsqueeze(1)], 1).double()
    row = torch.randn(64, generator=generator, dtype=torch.float64)
    row -= columns @ torch.linalg.lstsq(columns, row.unsqueeze(1)).solution.squeeze(1)
    model[0].weight.data, model[0].bias.data = weight, bias
    model[2].weight.data = torch.stack([row.float(), torch.zeros(64)])
    model[2].bias.data = torch.zeros(2)
    return model


def wrongly_certified(name: str) -> int:
    """How often a verifier certifies labels that are wrong in exact arithmetic, though not in float32."""
    found = 0
    for seed in range(5):
        model = cancelling(seed)
        x = torch.rand(50, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            y = model(x).argmax(1)
            first, _, last = model
            exact = last.weight.double() @ (first.weight.double() @ x.double().T + first.bias.double().unsqueeze(1))
        for verdict, true in zip(VERIFIERS.parse(name)(model, x, y, LinfBall(0.0)), exact.argmax(0) == y, strict=True):
            found += verdict.status == "certified" and not bool(true)
    return found


@pytest.mark.parametrize("name", ["ibp", "crown_ibp", "crown", "alpha_crown"])
def test_cancellation_between_large_weights_is_never_decided_in_float32(name: str) -> None:
    assert wrongly_certified(name) == 0


@pytest.mark.parametrize("share", [(0.0, 0.0), (1e-4, 0.0)])
def test_without_the_allowance_for_the_whole_network_cancellation_deceives_float32(
    share: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALLOWANCES, torch.float32, share)
    assert wrongly_certified("ibp" if share[0] == 0 else "crown") > 0


def test_targets_are_padded_with_a_target_that_counts() -> None:
    asked = torch.tensor([[True, False, True], [False, True, False]])
    columns, counts = _padded(asked)
    assert columns.tolist() == [[0, 2], [1, 1]] and counts.tolist() == [[True, True], [True, False]]


def test_later_stages_see_only_open_examples_and_unproven_targets() -> None:
    model, x, y = problem(count=3)
    seen = []

    def partly(snapshot: object, region: object, request: object) -> tuple[Tensor, Tensor]:
        low = torch.full(request.wanted.shape, -1.0)  # type: ignore[attr-defined]
        low[0] = 5.0
        low[1, 0] = 5.0
        return low, torch.zeros_like(low)

    def record(snapshot: object, region: object, request: object) -> tuple[Tensor, Tensor]:
        seen.append((len(region.x), request.wanted.tolist()))  # type: ignore[attr-defined]
        low = torch.full(request.wanted.shape, 7.0)  # type: ignore[attr-defined]
        return low, torch.zeros_like(low)

    docket = Docket(model, x, y, LinfBall(0.01))
    docket.prove("first", partly, 64)  # type: ignore[arg-type]
    docket.prove("second", record, 64)  # type: ignore[arg-type]
    assert seen == [(2, [[True, True, False], [True, True, True]])]
    verdicts = docket.verdicts("none")
    assert facts(verdicts) == [("certified", "first"), ("certified", "second"), ("certified", "second")]
    # The margin is the least over targets of the best bounds.
    assert [v.margin_lb for v in verdicts] == [5.0, 5.0, 7.0]


def test_a_proposed_point_that_is_no_witness_falsifies_nothing() -> None:
    model, x, y = problem(count=2)

    def outside(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, **options: object) -> Tensor:
        return torch.rand(x.shape, generator=torch.Generator().manual_seed(1))

    docket = Docket(model, x, y, LinfBall(1e-3))
    docket.falsify("liar", outside, 64)  # type: ignore[arg-type]
    assert all(v.status == "unknown" for v in docket.verdicts("none"))


def test_every_stage_of_the_cascade_is_named_by_what_it_decides() -> None:
    model, x, y = problem(count=24)
    eps = torch.logspace(-4, -0.7, 24)
    verdicts = Cascade(last=None, alpha=AlphaCROWN(iterations=10))(model, x, y, LinfBall(eps))
    methods = {v.method for v in verdicts}
    assert {"cascade/attack", "cascade/ibp"} <= methods and methods & {"cascade/crown_ibp", "cascade/crown"}
    assert all(v.method == "cascade" for v in verdicts if v.status == "unknown")
    assert all((v.witness is not None) == (v.status == "falsified") for v in verdicts)
    assert all(v.seconds > 0 for v in verdicts)


def test_an_example_without_time_left_is_unknown() -> None:
    model, x, y = problem()
    verdicts = Cascade(timeout=0.0)(model, x, y, LinfBall(1e-3))
    assert facts(verdicts) == [("unknown", "cascade")] * len(x)


def test_alpha_crown_stops_when_time_is_up() -> None:
    model, x, y = problem()
    docket = Docket(model, x, y, LinfBall(0.1), timeout=0.05)
    docket.prove("alpha_crown", AlphaCROWN(iterations=100_000).bound, 64)
    assert len(docket.verdicts("alpha_crown")) == len(x)


def test_a_second_look_in_float64_has_no_time_of_its_own() -> None:
    model, x, y = problem()
    deadlines: dict[torch.dtype, set[float]] = {}

    def doubtful(snapshot: Snapshot, region: Region, request: Request) -> tuple[Tensor, Tensor]:
        deadlines.setdefault(region.center.dtype, set()).add(request.deadline)
        low = torch.full(request.wanted.shape, 1e-9, dtype=region.center.dtype)
        return low, torch.ones_like(low)

    docket = Docket(model, x, y, LinfBall(0.1), timeout=30.0)
    docket.prove("doubtful", doubtful, len(x))
    assert set(deadlines) == {torch.float32, torch.float64}
    assert deadlines[torch.float32] == deadlines[torch.float64] and len(deadlines[torch.float32]) == 1


def test_the_verifiers_are_ordered_by_tightness() -> None:
    model, x, y = problem(count=10)
    margins = [
        [v.margin_lb for v in VERIFIERS.parse(name)(model, x, y, LinfBall(0.05))]
        for name in ("ibp", "crown_ibp", "crown", "alpha_crown")
    ]
    for ibp, crown_ibp, crown, alpha in zip(*margins, strict=True):
        # crown_ibp takes the better of adaptive and zero lower lines, and the latter are never below intervals.
        assert ibp <= crown_ibp + 1e-4 and crown_ibp <= crown + 1e-2 and min(crown, 0) <= alpha + 1e-1


def test_reduced_precision_is_off_while_bounds_are_computed_and_back_afterwards() -> None:
    seen = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")))
            return x.flatten(1)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_arithmetic():
            product = torch.ones(64, 64) * (1 + 2**-10) @ torch.ones(64, 64)
            Probe()(product)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert product.dtype == torch.float32 and product[0, 0] == 64 * (1 + 2**-10)
    assert not seen[0][1]


def test_interval_bounds_are_what_the_docket_certifies_with() -> None:
    model, x, y = problem()
    docket = Docket(model, x, y, LinfBall(1e-3))
    docket.prove("ibp", ibp_bound, 2)
    assert [v.margin_lb for v in docket.verdicts("ibp")] == [v.margin_lb for v in IBP()(model, x, y, LinfBall(1e-3))]


def test_claims_without_evidence_are_errors_of_their_own_kind() -> None:
    assert issubclass(SoundnessError, RuntimeError)


@pytest.mark.parametrize("name", ["ibp", "crown", "alpha_crown", "bab", "cascade", "milp"])
def test_images_whose_channels_lie_side_by_side_get_the_same_verdicts(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    x = torch.rand(4, 5, 5, 3).permute(0, 3, 1, 2)
    y = model(x).argmax(1)
    verdicts = [VERIFIERS.parse(name)(model, images, y, LinfBall(0.02)) for images in (x, x.contiguous())]
    assert [v.status for v in verdicts[0]] == [v.status for v in verdicts[1]]
