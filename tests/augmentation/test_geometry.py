"""Movements: what they are called, what they do to boxes, and that a seed decides them."""

from __future__ import annotations

import numpy as np
import pytest

from vlft.augmentation.geometry import area, clipped, draw, fitted, kinds, move_place, moved
from vlft.augmentation.ops import Matrix, Op, matrix
from vlft.augmentation.policy import Policy, read_policy

FLIP = np.array([[-1.0, 0, 1], [0, 1, 0], [0, 0, 1]])
UPSIDE = np.array([[1.0, 0, 0], [0, -1, 1], [0, 0, 1]])


def zoom(scale: float, x: float = 0.0, y: float = 0.0) -> Matrix:
    return np.array([[scale, 0, x], [0, scale, y], [0, 0, 1.0]])


def turn(degrees: float) -> Matrix:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    back = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    rotation: Matrix = back @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]) @ np.linalg.inv(back)
    return rotation


@pytest.mark.parametrize(
    ("unit", "said"),
    [
        (np.eye(3), ""),
        (FLIP, "mirror"),
        (FLIP @ FLIP, ""),
        (UPSIDE, "mirror turn shift"),
        (FLIP @ UPSIDE, "turn shift"),
        (turn(90), "turn shift"),
        (turn(2), ""),
        (zoom(1.25, -0.1, -0.1), "crop shift"),
        (zoom(0.95, 0.02, 0.02), ""),
        (zoom(0.7, 0.3, 0.3), "shift"),
    ],
)
def test_a_movement_is_called_by_what_it_does(unit: Matrix, said: str) -> None:
    assert kinds(unit) == {"any", *said.split()}


def test_boxes_are_clipped_or_refused() -> None:
    assert move_place(FLIP, (0.1, 0.2, 0.3, 0.4)) == pytest.approx((0.7, 0.2, 0.9, 0.4))
    assert move_place(FLIP, (0.1, 0.2)) == pytest.approx((0.9, 0.2))
    right = zoom(1.0, 0.3)
    assert move_place(right, (0.1, 0.2, 0.3, 0.4)) == pytest.approx((0.4, 0.2, 0.6, 0.4))
    assert move_place(right, (0.6, 0.2, 0.8, 0.4)) is None, "half of it is outside"
    assert move_place(right, (0.55, 0.2, 0.75, 0.4)) == pytest.approx((0.85, 0.2, 1.0, 0.4)), (
        "three quarters are inside"
    )
    assert move_place(right, (0.9, 0.5)) is None
    assert move_place(turn(45), (0.4, 0.4, 0.6, 0.6)) is None, "the upright box would be twice as large"
    assert move_place(turn(3), (0.05, 0.48, 0.95, 0.5)) is None, "a long thin box gets much too high"
    assert move_place(turn(90), (0.4, 0.4, 0.6, 0.6)) == pytest.approx((0.4, 0.4, 0.6, 0.6))


def test_fit_keeps_everything_in_the_frame() -> None:
    policy = read_policy("document")
    corners = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    some = 0
    for seed in range(80):
        unit = draw(policy, seed, (600, 800))
        if unit is None:
            continue
        some += 1
        places = moved(unit, corners)
        assert places.min() > -1e-9
        assert places.max() < 1 + 1e-9
        assert kinds(unit) <= {"any", "shift"}
    assert some > 40
    still = zoom(0.9, 0.05, 0.05)
    assert np.allclose(fitted(still), still), "what is inside is left alone"


def test_a_seed_decides() -> None:
    policy = read_policy("geometric")
    many = [draw(policy, seed, (300, 200)) for seed in range(20)]
    assert all((a is None) == (b is None) and (a is None or np.array_equal(a, b))  # type: ignore[arg-type]
               for a, b in zip(many, [draw(policy, seed, (300, 200)) for seed in range(20)], strict=True))  # fmt: skip
    assert len({None if m is None else m.tobytes() for m in many}) > 10


def test_torchs_generator_is_left_alone() -> None:
    import torch

    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    draw(read_policy("geometric"), 3, (300, 200))
    assert torch.equal(wanted, torch.rand(1))


@pytest.mark.parametrize(
    "op",
    [
        Op("RandomAffine", (("degrees", (10.0, 10.0)), ("p", 1.0), ("translate", (0.1, 0.1)))),
        Op("RandomRotation", (("degrees", (7.0, 7.0)), ("p", 1.0))),
        Op("RandomPerspective", (("distortion_scale", 0.3), ("p", 1.0))),
        Op("RandomHorizontalFlip", (("p", 1.0),)),
        Op("RandomVerticalFlip", (("p", 1.0),)),
        Op("RandomShear", (("p", 1.0), ("shear", (8.0, 8.0)))),
        Op("RandomTranslate", (("p", 1.0), ("translate_x", (0.1, 0.2)))),
        Op("RandomRotation90", (("p", 1.0), ("times", (1, 1)))),
        Op("RandomResizedCrop", (("p", 1.0), ("scale", (0.5, 0.6)))),
    ],
    ids=lambda op: op.name,
)
def test_our_warp_moves_as_kornias_op_does(op: Op) -> None:
    """The same draw, applied by Kornia's own op and by our warp: the middle of a smooth picture agrees."""
    import torch

    from vlft.augmentation.ops import module
    from vlft.vision.augment import warp

    height = width = 120
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    picture = torch.stack([x, y, 0.5 + 0.2 * torch.sin(6 * x + 4 * y)])[None]
    torch.manual_seed(4)
    theirs = module(op, height, width)(picture)
    unit = draw(Policy("one", (op,), (), ()), 4, (width, height))
    torch.manual_seed(4)
    assert matrix(op, height, width) is not None
    assert unit is not None
    ours = warp(picture, torch.from_numpy(unit))
    inner = (theirs - ours)[..., 40:80, 40:80].abs()
    assert float(inner.max()) < 0.02, float(inner.max())


def test_polygons() -> None:
    square = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    assert area(clipped(square + 0.25)) == pytest.approx(0.75**2)
    assert area(clipped(square + 2.0)) == 0.0
    assert area(clipped(square)) == pytest.approx(1.0)
