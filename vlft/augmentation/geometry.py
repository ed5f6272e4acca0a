"""How the pictures of one sample move: one matrix, drawn from the sample's seed, for all of its pictures and its boxes.

Coordinates are fractions of the picture: (0, 0) its upper left corner, (1, 1) its lower right one, so that one matrix
serves pictures of several sizes and the thousandths of a text. It is drawn for the first picture's size; another shape
of picture sees the same crop, and a turn as a slight shear.
"""

from __future__ import annotations

from functools import reduce

import numpy as np

from vlft.augmentation.ops import Matrix, matrix, seed_cpu
from vlft.augmentation.policy import Policy

TRIES = 8
"""Draws of a sample until one is admitted; after that it stays as it is."""
_TURNED = 20.0
"""Degrees by which "up" may lean before the picture counts as turned."""
_CUT = 0.02
"""Part of the picture that may leave the frame before it counts as cropped."""
_SHIFTED = 0.1
"""Part of a side by which a point may move before the picture counts as shifted."""
_KEPT = 0.7
"""Part of a box that must stay in the frame."""
_TIGHT = 0.8
"""A turned box over the upright one around it: below, the label would be looser than it was."""
_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
_GRID = np.stack(np.meshgrid(np.linspace(0, 1, 5), np.linspace(0, 1, 5)), axis=-1).reshape(-1, 2)


def draw(policy: Policy, seed: int, size: tuple[int, int]) -> Matrix | None:
    """One movement, (3, 3) on fractions; None where nothing moves.

    Args:
        seed: of the sample, the epoch and the try. Equal ones give equal matrices on every machine: Kornia draws
            parameters on the CPU.
        size: (width, height) of the first picture in pixels.
    """
    import torch

    width, height = size
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        seed_cpu(seed)
        drawn = [matrix(op, height, width) for op in policy.geometric]
    moved = [one for one in drawn if one is not None]
    if not moved:
        return None
    pixels = reduce(lambda before, after: after @ before, moved)
    to_centres = np.array([[width, 0, -0.5], [0, height, -0.5], [0, 0, 1.0]])
    unit = np.linalg.inv(to_centres) @ pixels @ to_centres
    unit = fitted(unit) if policy.fit else unit
    return None if np.allclose(unit / unit[2, 2], np.eye(3), atol=1e-6) else unit / unit[2, 2]


def moved(unit: Matrix, points: Matrix) -> Matrix:
    """(n, 2) fractions -> where they are now."""
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ unit.T
    places: Matrix = homogeneous[:, :2] / homogeneous[:, 2:]
    return places


def fitted(unit: Matrix) -> Matrix:
    """The movement, then shrunk and shifted as much as is needed for the whole picture to be in the frame."""
    corners = moved(unit, _CORNERS)
    low, high = corners.min(axis=0), corners.max(axis=0)
    scale = min(1.0, *(1.0 / (high - low)))
    low, high = low * scale, high * scale
    shift = np.clip(0.0, -low, 1.0 - high)
    return np.array([[scale, 0, shift[0]], [0, scale, shift[1]], [0, 0, 1.0]]) @ unit


def kinds(unit: Matrix) -> set[str]:
    """What a movement does to a picture, words of `rules.KINDS`."""
    found = {"any"}
    centre, up, side = moved(unit, np.array([[0.5, 0.5], [0.5, 0.49], [0.51, 0.5]]))
    (ux, uy), (sx, sy) = up - centre, side - centre
    if sx * uy - sy * ux > 0:  # y points down: an untouched picture has side x up < 0
        found.add("mirror")
    if np.degrees(np.arctan2(abs(ux), -uy)) > _TURNED:
        found.add("turn")
    corners = moved(unit, _CORNERS)
    if area(clipped(corners)) < (1 - _CUT) * area(corners):
        found.add("crop")
    # Of a mirrored picture what is left of the movement once it is mirrored back.
    grid = moved(unit, _GRID * [-1, 1] + [1, 0] if "mirror" in found and "turn" not in found else _GRID)
    if np.abs(grid - _GRID).max() > _SHIFTED:
        found.add("shift")
    return found


def area(polygon: Matrix) -> float:
    """Of a polygon, (n, 2); 0 for one of fewer than three corners."""
    x, y = polygon[:, 0], polygon[:, 1]
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))


def clipped(polygon: Matrix) -> Matrix:
    """The part of a convex polygon, (n, 2), that lies in the frame (Sutherland and Hodgman 1974, Reentrant Polygon
    Clipping)."""
    for axis in (0, 1):
        for sign, limit in ((1.0, 0.0), (-1.0, -1.0)):
            inside = sign * polygon[:, axis] - limit
            kept = []
            for k in range(len(polygon)):
                here, there = inside[k], inside[(k + 1) % len(polygon)]
                if here >= 0:
                    kept.append(polygon[k])
                if here * there < 0:
                    kept.append(polygon[k] + here / (here - there) * (polygon[(k + 1) % len(polygon)] - polygon[k]))
            polygon = np.array(kept).reshape(-1, 2)
    return polygon


def move_place(unit: Matrix, numbers: tuple[float, ...]) -> tuple[float, ...] | None:
    """A box (x1, y1, x2, y2) or a point (x, y) of fractions where it is now, upright and inside the frame.

    None: it is mostly outside, or the upright box would be much looser than the old one; the movement is then refused.
    """
    if len(numbers) == 2:
        ((x, y),) = moved(unit, np.array([numbers]))
        return (float(x), float(y)) if 0 <= x <= 1 and 0 <= y <= 1 else None
    x1, y1, x2, y2 = numbers
    corners = moved(unit, np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]))
    low, high = corners.min(axis=0), corners.max(axis=0)
    hull = float(np.prod(high - low))
    if hull > 0 and area(corners) < _TIGHT * hull:
        return None
    low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    if (high <= low).any() or float(np.prod(high - low)) < _KEPT * hull:
        return None
    return (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
