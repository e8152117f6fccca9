"""Every model family as an ONNX file: what onnxruntime and our own reader make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attacks import LinfBall
from certify import bound
from certify.formats.onnx import FormatError, load_onnx
from certify.formats.onnx_export import export_onnx
from robust.checkpoint import Checkpoint
from robust.cli import main
from robust.model import MODELS
from robust.plain import plain

pytest.importorskip("onnxscript", reason="needs the extra [onnx]")
pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")

SMALL = {
    "cnn7": "cnn7:width=2,hidden=8",
    "lipschitz_cnn": "lipschitz_cnn:width=4",
    "liresnet": "liresnet:depth=2,width=8",
    "low_rank": "low_rank:model=(cnn3:width=4)",
    "preactresnet18": "preactresnet18:width=4",
    "resnet18": "resnet18:width=4",
    "wide_resnet": "wide_resnet:depth=10,widen=1,activation=silu",
}
QUICK = ("cnn3", "lipschitz_cnn")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS.names()]


@pytest.mark.parametrize("name", NAMES)
def test_every_model_family_is_exported_and_read_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    size = 32
    model = MODELS.parse(SMALL.get(name, name))((3, size, size), 10, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)).eval()
    settings = {"model": SMALL.get(name, name), "input_shape": [3, size, size], "classes": 10}
    settings |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}
    Checkpoint(model, settings, LinfBall(0.01)).save(tmp_path / "checkpoint.safetensors")
    assert main(["export", str(tmp_path / "checkpoint.safetensors"), str(tmp_path / "model.onnx"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["onnx"] == str(tmp_path / "model.onnx") and 0 <= told["difference"] < 1e-3
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        read = load_onnx(tmp_path / "model.onnx").network
        found = torch.cat([read(image[None]) for image in x])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        box = bound(read, x[:1], LinfBall(1e-3), method="ibp")
    assert (box.lb <= expected[:1] + 1e-4).all() and (expected[:1] - 1e-4 <= box.ub).all()


def test_a_network_that_onnx_cannot_express_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    class Frequencies(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x[:, 0]).real

    with pytest.raises(FormatError, match="Frequencies cannot be written as ONNX: "):
        export_onnx(Frequencies().eval(), (1, 4, 4), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    class Forgetful(nn.Module):
        """Its answers depend on how often it was asked."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x.flatten(1) + self.calls

    with pytest.raises(FormatError, match="the file's logits differ from the model's by "):
        export_onnx(Forgetful().eval(), (1, 2, 2), tmp_path / "model.onnx")


def test_a_parametrised_network_is_exported_with_its_effective_weights(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(16, 3))).eval()
    assert export_onnx(plain(net), (1, 4, 4), tmp_path / "model.onnx") < 1e-5
