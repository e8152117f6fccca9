"""Networks with fixed weights, for export."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from robust.lipschitz_layer import LIPSCHITZ_LAYERS
from robust.model import MODELS
from robust.plain import plain


def own_modules(network: nn.Module) -> set[str]:
    """Classes of layers with parameters that are not torch's."""
    owners = [m for m in network.modules() if list(m.parameters(recurse=False))]
    return {type(m).__qualname__ for m in owners if not type(m).__module__.startswith("torch.nn.modules")}


@pytest.mark.parametrize(
    "text",
    [
        "gloro_cnn:channels=4,strides=2,hidden=8,unit_rows=true",
        "liresnet:width=4,depth=2",
        *(f"lipschitz_cnn:layer=({name}),width=4,stages=1,blocks=1,hidden=8" for name in LIPSCHITZ_LAYERS.names()),
    ],
)
def test_it_computes_the_same_with_plain_layers_and_leaves_the_original(text: str) -> None:
    torch.manual_seed(0)
    network = MODELS.parse(text)((3, 16, 16), 4, (0.5,) * 3, (0.2,) * 3).double()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    copy = plain(network)
    assert not own_modules(copy) and not any(parametrize.is_parametrized(m) for m in copy.modules())
    assert not any(p.requires_grad for p in copy.parameters())
    torch.testing.assert_close(copy(x), network.eval()(x), rtol=1e-12, atol=1e-13)
    before = copy(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    assert torch.equal(copy(x), before) and not torch.allclose(network(x), before)
