from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlft.vision import augment as module
from vlft.vision.augment import augment, augment_row


@pytest.fixture
def picture() -> Tensor:
    ramp = torch.linspace(0, 255, 56).view(1, 1, 56).expand(3, 84, 56).clone()
    ramp[0] = 200
    return ramp.to(torch.uint8)


@pytest.mark.parametrize("policy", ["photometric", "geometric"])
def test_a_seed_decides_and_the_global_generator_is_left_alone(picture: Tensor, policy: Any) -> None:
    torch.manual_seed(5)
    first = augment(picture, 11, policy, values_only=False)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    torch.rand(7)
    assert torch.equal(first, augment(picture, 11, policy, values_only=False))
    assert first.shape == picture.shape
    assert first.dtype == torch.uint8
    assert any(not torch.equal(first, augment(picture, s, policy, values_only=False)) for s in range(20, 24))


def test_boxes_keep_a_picture_from_moving(picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A left-to-right ramp never falls if nothing is flipped; with geometry it does for some seed."""
    monkeypatch.setattr(module, "_photometric", lambda: torch.nn.Identity())
    falls = lambda x: bool((x[1, 40].int().diff() < 0).any())  # noqa: E731
    assert not any(falls(augment(picture, s, "geometric", values_only=True)) for s in range(12))
    assert any(falls(augment(picture, s, "geometric", values_only=False)) for s in range(12))


def test_a_row_is_augmented_by_sample_not_by_place(picture: Tensor) -> None:
    alone = augment_row([picture, picture], "photometric", [0, 0], [77], [False])
    beside = augment_row([picture, picture, picture], "photometric", [0, 1, 1], [5, 77], [False, False])
    assert torch.equal(alone[0], beside[1])
    assert torch.equal(alone[1], beside[2])
    assert not torch.equal(alone[0], alone[1])
    assert torch.equal(augment_row([picture], None, [0], [1], [False])[0], picture)
