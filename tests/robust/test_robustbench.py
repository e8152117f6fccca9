"""RobustBench, both ways: its benchmark judges a checkpoint of ours, ours attack and certify its networks."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks import APGD, PGD, LinfBall
from certify import VERIFIERS, bound, capture, margin_spec
from robust.checkpoint import Checkpoint, load
from robust.dataset import DataSet
from robust.evaluate import evaluate
from robust.images import MemoryImages
from robust.model import MODELS

pytestmark = pytest.mark.filterwarnings("ignore")  # of the package's own imports

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
EPS = 8 / 255


class StandIn:
    """The interface of the autoattack package, which RobustBench imports and PyPI does not have, over our APGD."""

    def __init__(self, model: nn.Module, norm: str, eps: float, version: str, device: Any, log_path: Any) -> None:
        assert norm == "Linf" and version == "standard"
        self.model, self.ball = model, LinfBall(eps)

    def run_standard_evaluation(self, x: Tensor, y: Tensor, bs: int, state_path: Any) -> Tensor:
        return APGD(steps=10)(self.model, x, y, self.ball)


@pytest.fixture(scope="module")
def robustbench() -> Iterator[Any]:
    added = {}
    if importlib.util.find_spec("autoattack") is None:
        added = {name: types.ModuleType(name) for name in ("autoattack", "autoattack.state")}
        added["autoattack"].AutoAttack = StandIn  # type: ignore[attr-defined]
        added["autoattack.state"].EvaluationState = object  # type: ignore[attr-defined]
        sys.modules.update(added)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield pytest.importorskip("robustbench", reason="robustbench cannot be imported", exc_type=ImportError)
    finally:
        for name in added:
            del sys.modules[name]


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_its_benchmark_judges_a_checkpoint_of_ours_as_we_do(
    robustbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(robustbench, "benchmark"):
        pytest.skip("this robustbench came with torchattacks, without its benchmark; reinstall robustbench by itself")
    torch.manual_seed(0)
    model = MODELS.parse("cnn3:width=4")((3, 32, 32), 10, MEAN, STD)
    settings = {"model": "cnn3:width=4", "input_shape": [3, 32, 32], "classes": 10, "mean": MEAN, "std": STD}
    Checkpoint(model, settings, LinfBall(EPS)).save(tmp_path / "ours.safetensors")
    checkpoint = load(tmp_path / "ours.safetensors")
    x = images(24)
    with torch.no_grad():
        logits = checkpoint.model(x)
    y = logits.argmax(1)
    y[::6] = logits.argmin(1)[::6]
    # The data cannot be downloaded here; everything else is RobustBench's.
    monkeypatch.setattr(sys.modules["robustbench.eval"], "load_clean_dataset", lambda *a, **k: (x, y))
    monkeypatch.setattr(sys.modules["robustbench.eval"], "AutoAttack", StandIn)
    theirs = robustbench.benchmark(
        checkpoint.model,
        n_examples=24,
        dataset="cifar10",
        threat_model="Linf",
        eps=0.5 / 255,
        device=torch.device("cpu"),
    )
    names, empty = tuple("0123456789"), MemoryImages(x[:0], y[:0])
    data = DataSet("cifar10", empty, MemoryImages(x, y), names, MEAN, STD, None, (3, 32, 32))
    report = evaluate(
        checkpoint, data, LinfBall(0.5 / 255), None, APGD(steps=10), out=tmp_path / "report", progress=False
    )
    rates = report.summary().rates
    assert theirs == pytest.approx((rates.clean.fraction, rates.under_attack.fraction))
    assert 0 < theirs[1] < theirs[0] < 1


def test_a_network_of_its_zoo_is_loaded_by_it_and_attacked_and_bounded_by_us(robustbench: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    zoo = robustbench.utils.all_models[robustbench.model_zoo.enums.BenchmarkDataset.cifar_10]
    entry = zoo[robustbench.model_zoo.enums.ThreatModel.Linf]["Wong2020Fast"]["model"]
    folder = tmp_path / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    torch.save(entry().state_dict(), folder / "Wong2020Fast.pt")
    net = robustbench.load_model("Wong2020Fast", model_dir=tmp_path, dataset="cifar10", threat_model="Linf").eval()
    x, ball = images(2), LinfBall(EPS)
    y = net(x).argmax(1)
    points = PGD(steps=2, keep="last")(net, x, y, ball)
    assert ball.contains(points, x).all()
    box = bound(net, x, LinfBall(1e-4), method="ibp")
    assert ((box.lb <= net(x) + 1e-4) & (net(x) - 1e-4 <= box.ub)).all()


def architectures() -> dict[str, Callable[[], nn.Module]]:
    from robustbench.model_zoo.architectures import dm_wide_resnet as dm
    from robustbench.model_zoo.architectures import resnet
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet

    return {
        "wide_resnet": lambda: WideResNet(depth=10, widen_factor=1),
        "dm_wide_resnet_relu": lambda: dm.DMWideResNet(depth=10, width=1, activation_fn=nn.ReLU),
        "dm_wide_resnet_swish": lambda: dm.DMWideResNet(depth=10, width=1, activation_fn=dm.Swish, padding=2),
        "preact_resnet": lambda: resnet.PreActResNet(resnet.PreActBlock, [1, 1, 1, 1]),
        "preact_resnet_v2": lambda: resnet.PreActResNet(
            resnet.PreActBlockV2, [1, 1, 1, 1], bn_before_fc=True, out_shortcut=True
        ),
        "bottleneck": lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1]),
    }


@pytest.mark.parametrize(
    "name",
    [
        "wide_resnet",
        pytest.param("dm_wide_resnet_relu", marks=pytest.mark.slow),
        "dm_wide_resnet_swish",
        pytest.param("preact_resnet", marks=pytest.mark.slow),
        pytest.param("preact_resnet_v2", marks=pytest.mark.slow),
        pytest.param("bottleneck", marks=pytest.mark.slow),
    ],
)
def test_its_architectures_are_captured_bounded_and_certified(robustbench: Any, name: str) -> None:
    torch.manual_seed(0)
    net = architectures()[name]().eval()
    last = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.bias[0] += 100  # margins that random weights alone do not give
    x = images(3)
    y = net(x).argmax(1)
    torch.testing.assert_close(capture(net, x).snapshot()(x), net(x), rtol=1e-4, atol=1e-4)
    ball = LinfBall(1e-4)
    lb, ub = bound(net, x, ball, method="ibp")
    for seed in range(5):
        with torch.no_grad():
            logits = net(ball.sample(x, torch.Generator().manual_seed(seed)))
        assert ((lb <= logits + 1e-4) & (logits - 1e-4 <= ub)).all()
    verdicts = VERIFIERS.parse("crown_ibp")(net, x, y, LinfBall(1e-6))
    points = PGD(steps=2)(net, x, y, LinfBall(1e-6))
    margins = (margin_spec(y, 10) @ net(points).unsqueeze(2)).squeeze(2).amin(1)
    if name not in ("preact_resnet_v2", "bottleneck"):  # random ones of these stretch a box ten million times
        assert any(verdict.status == "certified" for verdict in verdicts)
    assert all(verdict.margin_lb <= float(m) + 1e-5 for verdict, m in zip(verdicts, margins, strict=True))
