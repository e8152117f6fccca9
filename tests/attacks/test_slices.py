"""Passes in slices: same results, also for models that accept one memory layout only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attacks import APGD, LinfBall
from attacks.gradient import differentiate, prepared
from attacks.losses import margin
from attacks.slices import Sliced


class Viewing(nn.Module):
    """Convolution behind which the images are flattened by `view`, which needs channels apart in memory."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.linear = nn.Conv2d(2, 5, 2, padding=1), nn.Linear(5 * 4 * 3, 3)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.linear(x.view(len(x), -1))


def test_slices_change_nothing_but_rounding(examples):
    x = examples(100)
    y = torch.zeros(100, dtype=torch.long)
    net = Viewing().eval()
    whole = differentiate(net, margin, x, (y,))
    parts = differentiate(Sliced(net, channels_last=False, rows=7), margin, x, (y,))
    for left, right in zip(whole, parts, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
        assert right.is_contiguous()
    sizes = [len(part) for (part,) in Sliced(net, channels_last=True, rows=33).parts(x)]
    assert sum(sizes) == 100 and max(sizes) - min(sizes) <= 1 and len(sizes) == 3


def test_a_model_that_asks_for_a_layout_gets_it_and_other_errors_pass(examples):
    x = examples(40)
    net = Viewing().eval()
    sliced, logits = prepared(net, "eval", x)
    assert isinstance(sliced, Sliced) and not sliced.channels_last
    torch.testing.assert_close(logits, net(x).detach(), atol=1e-5, rtol=1e-5)
    reshaping = nn.Sequential(nn.Conv2d(2, 5, 2, padding=1), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    assert prepared(reshaping, "eval", x)[0].channels_last
    # Behind the first one only convolutions with strides, or none that can be seen.
    strided = nn.Sequential(nn.Conv2d(2, 5, 2, padding=1), nn.Conv2d(5, 4, 3, 2), nn.Flatten(), nn.Linear(4, 3)).eval()
    assert not prepared(strided, "eval", x)[0].channels_last
    assert prepared(lambda x: strided(x), "eval", x)[0].channels_last
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        prepared(nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), "eval", x)


def test_batch_statistics_are_never_taken_of_a_slice(examples):
    x = examples(100)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).train()
    assert prepared(net, "keep", x)[0] is net and prepared(net, "train_frozen", x)[0] is net
    sizes = []
    net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    APGD(steps=2, mode="keep")(net, x, net(x).argmax(1), LinfBall(1e-6))
    assert set(sizes) == {100}
