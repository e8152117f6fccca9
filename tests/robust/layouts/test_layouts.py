"""Weights under the names of other projects give, in the suite's models, what the projects' networks compute."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.checkpoint import CheckpointError, load_state_dict_file
from robust.model import MODELS
from tests.robust.runs import REPOSITORY

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


class Sequence7(nn.Sequential):
    """The convolutional network of certified training as all these projects write it, at a small width."""

    def __init__(self, width: int = 2, hidden: int = 5) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((3, width, 1), (width, width, 1), (width, 2 * width, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.BatchNorm2d(2 * width), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(2 * width * 256, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden, 10))


class PostActivationBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """With the shortcut named as in PreActResNets ("shortcut.0") or as in WideResNets ("convShortcut")."""

    def __init__(self, before: int, after: int, stride: int, wide: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.changes = stride != 1 or before != after
        if self.changes:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            setattr(self, "convShortcut" if wide else "shortcut", conv if wide else nn.Sequential(conv))
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        if not self.changes:
            return out + x
        return out + (self.convShortcut(active) if self.wide else self.shortcut(active))


class ResNet(nn.Module):
    def __init__(self, width: int, pre: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        if not pre:
            self.bn1 = nn.BatchNorm2d(width)
        before = width
        for stage in range(4):
            after, stride = width * 2**stage, 1 if stage == 0 else 2
            make: Callable[..., nn.Module] = (
                (lambda b, a, s: PreActivationBlock(b, a, s, False)) if pre else PostActivationBlock
            )
            setattr(self, f"layer{stage + 1}", nn.Sequential(make(before, after, stride), make(after, after, 1)))
            before = after
        if pre:
            self.bn = nn.BatchNorm2d(before)
        self.linear = nn.Linear(before, 10)
        self.pre = pre

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x) if self.pre else F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        out = F.relu(self.bn(out)) if self.pre else out
        return self.linear(F.avg_pool2d(out, 4).flatten(1))


class Stage(nn.Module):
    def __init__(self, before: int, after: int, stride: int, count: int) -> None:
        super().__init__()
        rows = [
            PreActivationBlock(before if i == 0 else after, after, stride if i == 0 else 1, True) for i in range(count)
        ]
        self.layer = nn.Sequential(*rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideNet(nn.Module):
    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = Stage(16, 32, 1, 2)
        if unused:
            self.sub_block1 = Stage(16, 32, 1, 2)
        self.block2 = Stage(32, 64, 2, 2)
        self.block3 = Stage(64, 128, 2, 2)
        self.bn1 = nn.BatchNorm2d(128)
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(F.avg_pool2d(out, 8).flatten(1))


def lively(net: nn.Module) -> nn.Module:
    """In evaluation, with statistics that are not the initial ones."""
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean = 0.1 * torch.randn_like(layer.running_mean)
            layer.running_var = 0.5 + torch.rand_like(layer.running_var)
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.1)
    return net.eval()


def sequence(prefix: str) -> tuple[dict[str, Tensor], nn.Module]:
    net = lively(Sequence7())
    return {f"{prefix}{name}": value for name, value in net.state_dict().items()}, net


def ctbench() -> tuple[dict[str, Tensor], nn.Module]:
    """Layer 0 is the normalisation, stored with the weights; not the data set's numbers here."""
    net = lively(Sequence7())
    shifted = {f"layers.{int(n.split('.')[0]) + 1}.{n.partition('.')[2]}": v for n, v in net.state_dict().items()}
    mean, sigma = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1)

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net((x - mean) / sigma)

    return {"layers.0.mean": mean, "layers.0.sigma": sigma, **shifted}, Own()


CASES = {
    "ctbench": ("cnn7:width=2,hidden=5", ctbench, lambda x: x, None),
    "expressive_losses": ("cnn7:width=2,hidden=5", lambda: sequence(""), normalised, None),
    "ctrain": ("cnn7:width=2,hidden=5", lambda: sequence("layers."), normalised, None),
    "trades_resnet": ("resnet18:width=4", lambda: named(ResNet(4, pre=False)), lambda x: x, None),
    "awp_preactresnet": ("preactresnet18:width=4", lambda: named(ResNet(4, pre=True)), normalised, None),
    "trades_wide": ("wide_resnet:depth=16,widen=2", lambda: named(WideNet(True)), lambda x: x, None),
    "awp_wide": ("wide_resnet:depth=16,widen=2", lambda: named(WideNet(False)), normalised, "awp"),
    "mart_wide": ("wide_resnet:depth=16,widen=2", lambda: named(WideNet(False)), lambda x: x, "trades"),
}


def named(net: nn.Module) -> tuple[dict[str, Tensor], nn.Module]:
    return dict(lively(net).state_dict()), net


@pytest.mark.parametrize("case", CASES)
def test_the_suites_model_computes_what_the_projects_network_computes(case: str, tmp_path: Path) -> None:
    text, make, feed, layout = CASES[case]
    tensors, net = make()
    if case in ("expressive_losses", "ctrain"):  # files of old PyTorch, and what BoundedModules leave out
        tensors = {name: value for name, value in tensors.items() if "num_batches" not in name}
    wrapped = {"state_dict": {f"module.{name}": value for name, value in tensors.items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "weights.pt")
    model = MODELS.parse(text)((3, 32, 32), 10, MEAN, STD)
    load_state_dict_file(tmp_path / "weights.pt", model, layout)
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), net(feed(x)), rtol=1e-4, atol=1e-5)


def test_what_the_names_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    torch.save(named(WideNet(False))[0], tmp_path / "wide.pt")
    model = MODELS.parse("wide_resnet:depth=16,widen=2")((3, 32, 32), 10, MEAN, STD)
    with pytest.raises(CheckpointError, match="say whose it is: --layout awp or --layout trades"):
        load_state_dict_file(tmp_path / "wide.pt", model)
    with pytest.raises(CheckpointError, match="its names are not of the layout ctrain, or the model is another"):
        load_state_dict_file(tmp_path / "wide.pt", model, "ctrain")
    with pytest.raises(CheckpointError, match="the weights do not fit the model; missing"):
        load_state_dict_file(tmp_path / "wide.pt", MODELS.parse("cnn3:width=2")((3, 32, 32), 10, MEAN, STD))
    # Another depth than the file's: blocks that the model lacks, or that the file lacks.
    for depth, message in ((10, "its names are not of the layout trades"), (22, "the weights do not fit the model")):
        other = MODELS.parse(f"wide_resnet:depth={depth},widen=2")((3, 32, 32), 10, MEAN, STD)
        with pytest.raises(CheckpointError, match=message):
            load_state_dict_file(tmp_path / "wide.pt", other, "trades")


def test_the_command_line_certifies_such_a_file(tmp_path: Path) -> None:
    net = lively(
        nn.Sequential(
            nn.Conv2d(1, 2, 5, 2, 2), nn.ReLU(), nn.Conv2d(2, 4, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10)
        )
    )
    torch.save({"state_dict": net.state_dict(), "epoch": 1}, tmp_path / "weights.pt")
    flags = ["--model", "cnn3:width=2", "--data", "digits", "--eps", "0.01", "--verifier", "ibp", "--limit", "8"]
    command = [sys.executable, "-m", "robust", "certify", str(tmp_path / "weights.pt"), *flags, "--quiet", "--no-curve"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--out", str(tmp_path / "out")], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0 and "certified:" in done.stdout, done.stderr
