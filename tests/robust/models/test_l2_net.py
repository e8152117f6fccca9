"""Networks that estimate their own l2 constant: the estimate, its state, and the layers it is made of."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from certify import capture, global_l2_radius
from certify.bounds.global_l2 import lipschitz_constants
from robust.initialization import INITIALIZATIONS
from robust.l2_net import L2Net, Residual, stored_weight
from robust.lipschitz_layer import LIPSCHITZ_LAYERS, mapped_patches
from robust.lipschitz_layers.cholesky import RIDGE, cholesky
from robust.model import MODELS

SHAPE = (3, 16, 16)
TEXTS = [
    "liresnet:depth=2,width=4,hidden=8",
    "liresnet:depth=1,width=4,hidden=8,residual_dense=2",
    "liresnet:depth=2,width=4,hidden=8,layer=(bro)",
    "gloro_cnn:channels=4+6,strides=2+2,hidden=8+6",
    "gloro_cnn:channels=4,strides=2,hidden=8,activation=relu,unit_rows=true",
    *(f"lipschitz_cnn:layer={name},width=4,stages=2,blocks=1,kernel=3,hidden=8" for name in LIPSCHITZ_LAYERS.names()),
]


def build(text: str, seed: int = 0) -> L2Net:
    model = MODELS.parse(text)(SHAPE, 5, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    INITIALIZATIONS["default"](model, torch.Generator().manual_seed(seed))
    return model.train()


def certified(model: L2Net) -> float:
    """The certified constant of everything before the last layer."""
    nodes = capture(model, torch.zeros(1, *SHAPE, dtype=next(model.parameters()).dtype)).snapshot().nodes
    return float(lipschitz_constants(nodes[:-1])[-1])


@pytest.mark.parametrize("text", TEXTS)
def test_the_estimate_of_training_comes_close_to_the_certified_constant(text: str) -> None:
    model = build(text).double()
    estimate = float(model.trunk_lipschitz(100).detach())
    if model.measured:  # from below
        assert 0.8 * certified(model) <= estimate <= certified(model) * (1 + 1e-9)
    else:  # 1 by construction, of which rounding may take or add a little
        assert estimate == 1 and 0.3 <= certified(model) <= 1 + 1e-6


@pytest.mark.parametrize("text", TEXTS)
def test_random_pairs_of_images_do_not_exceed_the_certified_constant(text: str) -> None:
    model = build(text).double().eval()
    trunk, constant = nn.Sequential(*list(model)[:-1]), certified(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, *SHAPE, dtype=torch.float64, generator=generator)
    step = 1e-3 * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for _ in range(5):  # towards the direction in which the trunk changes most
            change = (trunk(x + step) - trunk(x)).norm(dim=1)
            assert bool((change <= constant * step.flatten(1).norm(dim=1) * (1 + 1e-9)).all())
            step = step[change.argsort(descending=True)[torch.arange(50) // 2]] + 1e-4 * torch.randn_like(step)


def test_iterates_move_in_training_alone_and_go_on_where_they_stopped() -> None:
    model = build(TEXTS[0])
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.eval().trunk_lipschitz(10)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))
        model.train()
        for _ in range(6):
            model.trunk_lipschitz(1)
        stopped = copy.deepcopy(model).state_dict()
        resumed = build(TEXTS[0], seed=1)
        resumed.load_state_dict(stopped)
        assert torch.equal(resumed.trunk_lipschitz(3), model.trunk_lipschitz(3))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), resumed.buffers(), strict=True))
        # Six single steps and then three come as far as nine.
        assert torch.allclose(other.trunk_lipschitz(9), model.trunk_lipschitz(0), rtol=1e-5)


def test_the_gradient_of_the_estimate_is_that_of_the_norm() -> None:
    torch.manual_seed(0)  # singular values that lie close together take power iteration longer
    layer = nn.Linear(6, 5)
    model = L2Net(layer, nn.Linear(5, 2), measured={0: (6,)}).double().train()
    (estimated,) = torch.autograd.grad(model.trunk_lipschitz(500), layer.weight)
    (exact,) = torch.autograd.grad(torch.linalg.matrix_norm(layer.weight, 2), layer.weight)
    torch.testing.assert_close(estimated, exact, rtol=1e-6, atol=1e-8)


def test_two_estimates_can_be_differentiated_together() -> None:
    model = build(TEXTS[0])
    (model.trunk_lipschitz(1) + model.trunk_lipschitz(1)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_residual_convolution_is_the_sum_of_its_branches() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    plain = copy.deepcopy(layer)
    parametrize.register_parametrization(layer, "weight", Residual(layer.weight, 0.3))
    layer.parametrizations.weight[0].gain.data.uniform_(0.5, 2.0)
    gain = layer.parametrizations.weight[0].gain.view(-1, 1, 1)
    x = torch.randn(2, 4, 6, 6)
    branch = F.conv2d(x, plain.weight, padding=1)
    torch.testing.assert_close(layer(x), x + 0.3 * gain * branch + plain.bias.view(-1, 1, 1))


def test_the_last_layer_has_unit_rows_and_the_first_does_not_scale() -> None:
    model = build(TEXTS[0])
    torch.testing.assert_close(model[-1].weight.norm(dim=1), torch.ones(5))
    assert model[0].std.unique().tolist() == [1.0]


def test_liresnets_start_close_to_the_identity_with_norms_near_one() -> None:
    model = build("liresnet:depth=4,width=8,hidden=16")
    assert certified(model) < 2.5
    weight = stored_weight(model[3])
    assert weight.std().item() == pytest.approx(1 / (9 * 8), rel=0.1)


@pytest.mark.parametrize(
    ("shape", "stem"),
    [((1, 28, 28), (5, 2, 2)), ((3, 32, 32), (5, 2, 2)), ((3, 64, 64), (7, 4, 3)), ((3, 224, 224), (14, 14, 0))],
)
def test_the_stem_of_liresnet_follows_the_image(shape: tuple[int, int, int], stem: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = MODELS.parse("liresnet:depth=1,width=588,hidden=8")(shape, 10, (0.0,) * shape[0], (1.0,) * shape[0])
    assert (model[1].kernel_size[0], model[1].stride[0], model[1].padding[0]) == stem
    if shape[0] == 3:
        assert model[1](torch.empty(1, *shape, device="meta")).shape[2:] == (16, 16)


def test_patches_are_orthonormal_rows_up_to_the_ridge() -> None:
    layer = mapped_patches(cholesky, 3, 8, 2).double()
    squares = torch.linalg.svdvals(stored_weight(layer).flatten(1)).square()
    values = torch.linalg.svdvals(layer.weight.flatten(1))
    torch.testing.assert_close(values, (squares / (squares + RIDGE * squares.sum() / 8)).sqrt())
    assert 0.9 < values.min() and values.max() <= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("liresnet:width=7", "liresnet: MinMax pairs channels; expected an even width, got 7"),
        ("gloro_cnn:channels=4,strides=1+1", "1 channels need as many strides, got 2"),
        ("lipschitz_cnn:stages=5", "stage 3 of 5 would see 2x2 pixels, fewer than its kernel of 3; use fewer stages"),
        ("lipschitz_cnn:kernel=2", "expected positive sizes and an odd kernel"),
        ("liresnet:depth=1,stem_kernel=40,stem_stride=40", "a 40x40 convolution does not fit the 16x16 that reach it"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build(text)
    assert "\n" not in str(error.value)


def test_certificates_of_a_model_under_parametrizations_do_not_depend_on_its_mode() -> None:
    model = build(TEXTS[5])
    x: Tensor = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    in_training = global_l2_radius(model, x)
    assert model.training
    assert torch.equal(in_training[0], global_l2_radius(model.eval(), x)[0])
