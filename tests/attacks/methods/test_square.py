"""Square attack: its published schedule, its windows, and that it needs no gradient."""

from __future__ import annotations

import pytest
import torch

from attacks import L1Ball, L2Ball, LinfBall, Square
from attacks.methods.square import PLACES, _Corners, _Mass, _profile, window_side
from attacks.noise import streams, uniform


def test_the_windows_shrink_as_published():
    attack = Square()
    sides = [window_side(attack._share_at(query), (32, 32)) for query in range(5000)]
    assert list(dict.fromkeys(sides)) == [29, 20, 14, 10, 7, 5, 4, 3]
    changes = [query for query in range(1, 5000) if sides[query] != sides[query - 1]]
    assert changes == [11, 51, 201, 501, 1001, 2001, 4001]
    assert [Square(rescaled=True, queries=100)._share_at(query) for query in (0, 1, 99)] == [0.8, 0.2, 0.8 / 512]
    assert window_side(0.8, (8, 40)) == 8 and window_side(1e-9, (4, 4)) == 1


def test_a_linf_proposal_changes_one_square_to_the_limits_and_any_position_may_come():
    x = torch.full((400, 3, 6, 5), 0.5)
    corners = _Corners(*LinfBall(0.1).box(x))
    point = x.clone()
    draws = uniform((400, 2, PLACES + 3), x, streams(0, range(400)))
    candidate, rows = corners.block([4, 2], draws).change(point, 1, skip=False)
    assert rows is None
    changed = candidate != point
    assert (changed.flatten(1).sum(1) == 3 * 4).all()
    assert torch.equal(candidate[changed], torch.where(candidate > point, corners.hi, corners.lo)[changed])
    # One colour per channel, and every upper left pixel of a window that fits, the last ones included.
    assert all(len(channel[moved].unique()) == 1 for channel, moved in zip(candidate[0], changed[0], strict=True))
    first = changed[:, 0].flatten(1).float().argmax(1)
    assert {(int(i) // 5, int(i) % 5) for i in first} == {(r, c) for r in range(5) for c in range(4)}


def test_the_start_in_linf_is_vertical_stripes_at_the_limits():
    x = torch.rand(5, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    corners = _Corners(*LinfBall(0.1).box(x))
    start = corners.start(streams(0, range(5)))
    raised = start == corners.hi
    assert torch.equal(raised, raised[:, :, :1].expand_as(raised)) and 0.2 < raised.float().mean() < 0.8
    assert torch.equal(start[~raised], corners.lo[~raised])


def test_the_profile_of_five_pixels_is_the_papers():
    # Heights of the two hills before scaling, by hand: sums of 1 / k^2 over the squares that hold a pixel.
    a, b, c = 1 + 1 / 4 + 1 / 9, 1 / 4 + 1 / 9, 1 / 9
    upper = torch.tensor([[c, b, b, b, c], [c, b, a, b, c]])
    lower = torch.tensor([[c, b, b, b, c], [c, b, a, b, c], [c, b, b, b, c]])
    expected = torch.cat([upper, -lower]).double()
    torch.testing.assert_close(_profile(5, "l2"), expected / expected.norm(), rtol=1e-6, atol=0)
    assert _profile(5, "l1").abs().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("ball", [L2Ball(0.5), L1Ball(3.0)], ids=lambda ball: ball.norm)
def test_mass_moves_between_windows_and_nothing_of_eps_is_lost(ball):
    x = torch.full((6, 2, 10, 10), 0.5)
    mass = _Mass(x, ball)
    point = mass.start(streams(0, range(6)))
    for query in range(20):
        torch.testing.assert_close(
            ball.length(point - x), torch.full((6,), float(ball.eps)).double(), rtol=2e-5, atol=0
        )
        assert ball.contains(point, x).all()
        point = mass.change(point, 3, uniform((6, PLACES + 2), x, streams(query, range(6))))


@pytest.mark.parametrize("ball", [LinfBall(0.3), L2Ball(2.0), L1Ball(12.0)], ids=lambda ball: ball.norm)
def test_a_model_without_gradients_is_fooled(ball, examples):
    weight = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    x = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def model(x):
        return ((x.flatten(1) @ weight) * 4).round()

    y = model(x).argmax(1)
    points = Square(queries=300)(model, x, y, ball)
    assert ball.contains(points, x).all()
    assert (model(points).argmax(1) != y).float().mean() > 0.6


def test_fooled_examples_leave_and_inputs_that_are_no_images_are_refused(small_net, examples):
    net, x = small_net(), examples(30)
    y = net(x).argmax(1)
    sizes = []
    handle = net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    Square(queries=200)(net, x, y, LinfBall(0.1))
    handle.remove()
    assert sizes[0] == 30 and max(sizes[-50:]) < 30
    with pytest.raises(
        ValueError, match="Square needs images \\[B, C, H, W\\] for its windows, got shape \\(30, 12\\)"
    ):
        Square()(net, x.flatten(1), y, LinfBall(0.1))


class Jittery:
    """A model whose first answers differ by less than rounding does anywhere else; it counts the images it is shown."""

    def __init__(self, net, jitter: float) -> None:
        self.net, self.jitter, self.calls, self.images = net, jitter, 0, []

    def __call__(self, x):
        self.calls += 1
        self.images.append(len(x))
        return self.net(x) + self.jitter * (self.calls == 1)


def test_queries_that_change_nothing_are_known_and_a_model_that_varies_is_asked_each_time(examples):
    weight = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = examples(30, dtype=torch.float64)

    def net(x):
        return (x.flatten(1) @ weight).sin()

    y, ball, attack = net(x).argmax(1), LinfBall(0.02), Square(queries=120)
    steady, varying = Jittery(net, 0.0), Jittery(net, 1e-3)
    points, asked_each_time = attack(steady, x, y, ball), attack(varying, x, y, ball)
    assert torch.equal(points, asked_each_time)
    # Clean twice, the start, and 120 queries, of which fewer are about another image than the one before.
    assert len(varying.images) == 3 + 120 and len(steady.images) <= 3 + 120
    assert sum(steady.images) < 0.9 * sum(varying.images)


def test_images_with_channels_side_by_side_get_the_same_points(examples):
    weight = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    x = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def model(x):
        return x.flatten(1) @ weight

    y, attack = model(x).argmax(1), Square(queries=60)
    points = attack(model, x, y, LinfBall(0.05))
    assert (points != x).any()
    torch.testing.assert_close(attack(model, x.to(memory_format=torch.channels_last), y, LinfBall(0.05)), points)
