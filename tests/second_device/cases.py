"""The same work on the CPU and on the pretended device: `python -m tests.second_device.cases FAMILY`.

Prints one JSON object: what went wrong, by case. An empty one says that all cases agree.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.second_device.pretended import NAME, Elsewhere, begin

if __name__ == "__main__":
    begin()

from attacks import ATTACKS, LinfBall, make_ball
from certify import VERIFIERS, bound, local_lipschitz, margin_spec
from robust import evaluate, parse_dataset
from robust.hook import HOOKS
from robust.objective import OBJECTIVES
from robust.regularizer import REGULARIZERS
from robust.trainer import train
from robust.weight_perturbation import WEIGHT_PERTURBATIONS
from robust.weighting import WEIGHTINGS
from tests.attacks.test_contract import PACKAGES, shortened
from tests.certify.networks import CLASSES, INPUT, KINDS, network
from tests.robust.objectives import oracle
from tests.robust.runs import tiny, weights

Case = tuple[str, Callable[[], Any]]


def there(value: Any) -> Any:
    """A copy of a tensor or a network on the device."""
    return copy.deepcopy(value).to(NAME)


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert isinstance(found, Elsewhere), "the result is not on the device"
    torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=tolerance, atol=tolerance)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    ).eval()


def attacks() -> Iterator[Case]:
    net = small_net()
    far, x = there(net), torch.rand(6, 1, 8, 8)
    y = net(x).argmax(1)
    for name in ATTACKS.names():
        if name in PACKAGES:
            continue
        attack = ATTACKS.parse(shortened(name))
        for norm in attack.norms:

            def case(attack: Any = attack, norm: str = norm) -> None:
                ball = make_ball(norm, 0.1)
                assert_same(attack(far, there(x), there(y), ball), attack(net, x, y, ball), 1e-5)

            yield f"{name} {norm}", case


def bounds() -> Iterator[Case]:
    for kind in KINDS:
        net = network([KINDS[kind], KINDS["relu"]], 0)
        far, x = there(net), torch.rand(2, *INPUT)
        spec = margin_spec(net(x).argmax(1), CLASSES)
        for method in ("ibp", "crown_ibp", "crown", "alpha_crown"):

            def case(net: nn.Module = net, far: nn.Module = far, x: Tensor = x, spec: Tensor = spec, m=method) -> None:
                options = {"iterations": 3} if m == "alpha_crown" else {}
                mine = bound(far, there(x), LinfBall(0.02), spec=there(spec), method=m, **options)
                assert_same(mine.lb, bound(net, x, LinfBall(0.02), spec=spec, method=m, **options).lb)

            yield f"{method} of {kind}", case


def verifiers() -> Iterator[Case]:
    net = network([KINDS["relu"], KINDS["conv"], KINDS["relu"]], 0)
    far = there(net)
    x = torch.rand(4, *INPUT, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(1)
    for name in VERIFIERS.names():
        if name == "auto_lirpa":
            continue
        kind = VERIFIERS[name]
        verifier = VERIFIERS.parse(f"{name}:timeout=60" if hasattr(kind, "timeout") else name)
        for norm, eps in (("linf", 0.03), ("l2", 0.1)):
            if norm not in verifier.norms:
                continue

            def case(verifier: Any = verifier, norm: str = norm, eps: float = eps) -> None:
                ball = make_ball(norm, eps)
                mine, theirs = verifier(far, there(x[:2]), there(y[:2]), ball), verifier(net, x[:2], y[:2], ball)
                assert [v.status for v in mine] == [v.status for v in theirs]
                for one, other in zip(mine, theirs, strict=True):
                    torch.testing.assert_close(one.margin_lb, other.margin_lb, rtol=1e-3, atol=1e-4)

            yield f"{name} {norm}", case

    def searched() -> None:
        # Tens of domains, split by every kind of branching, with boxes tightened and linear programs.
        deep = network([KINDS["relu"], KINDS["conv"], KINDS["relu"], KINDS["conv"], KINDS["relu"]], 0)
        for options in ("", ",branching=babsr", ",branching=fsb", ",inputs=0"):
            verifier = VERIFIERS.parse(f"bab:timeout=60{options}")
            (mine,) = verifier(there(deep), there(x[3:]), there(deep(x[3:]).argmax(1)), LinfBall(0.015))
            (other,) = verifier(deep, x[3:], deep(x[3:]).argmax(1), LinfBall(0.015))
            assert (mine.status, mine.domains) == (other.status, other.domains)

    yield "bab with a search", searched


def lipschitz() -> Iterator[Case]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)
    ).requires_grad_(False)
    x = torch.rand(2, 6)
    for method in ("interval", "recurjac", "crown", "bab", "exact"):

        def case(method: Any = method) -> None:
            mine = local_lipschitz(there(net), there(x), LinfBall(0.05), method=method)
            assert_same(mine.ub, local_lipschitz(net, x, LinfBall(0.05), method=method).ub)

        yield method, case


def evaluation() -> Iterator[Case]:
    def case() -> None:
        data = parse_dataset("digits")()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)).eval()
        verifier, attack = VERIFIERS.parse("crown"), ATTACKS.parse("pgd:steps=5")
        mine, theirs = (
            evaluate(net, data, LinfBall(0.02), verifier, attack, limit=20, device=d) for d in (NAME, "cpu")
        )
        assert [row.status for row in mine.rows] == [row.status for row in theirs.rows]

    yield "report", case


PGD = "pgd:attack=(pgd:steps=2,keep=last,mode=keep)"


def same_weights(text: str, **changes: Any) -> Case:
    """A run of some steps on both devices. Plain descent: Adam's steps do not shrink where a gradient is rounding."""

    def case() -> None:
        with tempfile.TemporaryDirectory() as folder:
            chosen = {"epochs": 1, "batch_size": 512, "optimizer": "sgd:lr=0.01", **changes}
            for device in (NAME, "cpu"):
                train(tiny(**chosen), Path(folder) / device, device=device, progress=False)
            mine, theirs = (weights(Path(folder) / device) for device in (NAME, "cpu"))
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)

    return text, case


def objectives() -> Iterator[Case]:
    for name in OBJECTIVES.names():
        kind = OBJECTIVES[name]
        if name in ("dverge", *(n for n in OBJECTIVES.names() if oracle.required(OBJECTIVES[n]))):
            continue  # which need other networks
        if getattr(kind, "norms", ("linf",)) == ("l2",):
            net = "liresnet:depth=1,width=4,hidden=8"
            yield same_weights(name, objective=name, norm="l2", model=net, eps=0.3, validator="global_l2")
        else:
            text = OBJECTIVES.spell(oracle.objective(name))
            yield same_weights(text, objective=text)


def pieces() -> Iterator[Case]:
    yield same_weights("mtl_ibp", objective="mtl_ibp", init="ibp", regularizers=("shi", "l1"), optimizer="adam")
    yield same_weights("accumulation", micro_batch=128)
    yield same_weights(
        "pgd with awp and ema", objective=PGD, weight_perturbation="awp", hooks=("ema",), validator="pgd"
    )


def all_pieces() -> Iterator[Case]:
    late = {"dafa": "dafa:warmup_epochs=1"}
    for name in WEIGHTINGS.names():
        starts = "start_epoch" in WEIGHTINGS[name].__dataclass_fields__
        text = late.get(name, f"{name}:start_epoch=1" if starts else name)
        objective = "trades:kl_weight=1" if name in ("cfa", "frl") else PGD
        yield same_weights(f"weighting {text}", objective=objective, weightings=(text,), epochs=2)
    for name in REGULARIZERS.names():
        text = "fomo:start_epoch=0" if name == "fomo" else name
        # VAT's direction is the gradient of a divergence near its minimum, 0: mostly rounding.
        if name != "vat":
            yield same_weights(f"regularizer {text}", objective=PGD if name == "fomo" else "ibp", regularizers=(text,))
    for name in HOOKS.names():
        if name not in ("condlr", "fedavg"):  # which need other networks or processes
            yield same_weights(f"hook {name}", hooks=(name,))
    for name in WEIGHT_PERTURBATIONS.names():
        yield same_weights(f"perturbation {name}", objective=PGD, weight_perturbation=name)


FAMILIES = {f.__name__: f for f in (attacks, bounds, verifiers, lipschitz, evaluation, objectives, pieces, all_pieces)}


def main() -> None:
    torch.set_num_threads(1)
    failures, count = {}, 0
    for name, case in FAMILIES[sys.argv[1]]():
        count += 1
        try:
            case()
        except Exception:
            failures[name] = traceback.format_exc(limit=-4)
    print(json.dumps({"cases": count, "failures": failures}))


if __name__ == "__main__":
    main()
