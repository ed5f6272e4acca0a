"""Pixels: a movement lands where the text's coordinates say, seeds decide, and the grid and the generator stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vlft.augmentation.geometry import draw, move_place, moved
from vlft.augmentation.ops import Op, _draws_pixels, certain, chance, read_op
from vlft.augmentation.policy import read_policy
from vlft.vision import augment
from vlft.vision.augment import augment_row, warp

STILL = torch.eye(3, dtype=torch.float64)[None]


@pytest.fixture
def picture() -> Tensor:
    ramp = torch.linspace(0, 255, 56).view(1, 1, 56).expand(3, 84, 56).clone()
    ramp[0] = 200
    return ramp.to(torch.uint8)


def flip() -> Tensor:
    return torch.tensor([[-1.0, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)


@pytest.mark.parametrize("policy", ["photometric", "geometric", "document"])
def test_a_seed_decides_and_the_global_generator_is_left_alone(picture: Tensor, policy: str) -> None:
    ops = read_policy(policy).photometric
    torch.manual_seed(5)
    (first,) = augment_row([picture], ops, [0], [11], STILL)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    torch.rand(7)
    assert torch.equal(first, augment_row([picture], ops, [0], [11], STILL)[0])
    assert first.shape == picture.shape
    assert first.dtype == torch.uint8
    assert any(not torch.equal(first, augment_row([picture], ops, [0], [s], STILL)[0]) for s in range(20, 24))


def test_a_flip_is_exact_and_the_size_stays(picture: Tensor) -> None:
    (out,) = augment_row([picture], (), [0], [1], flip()[None])
    assert torch.equal(out, picture.flip(-1))


def test_nothing_to_do_gives_the_same_tensor(picture: Tensor) -> None:
    assert augment_row([picture], (), [0], [1], STILL)[0] is picture
    out = augment_row([picture, picture], (), [0, 1], [1, 2], torch.cat([STILL, flip()[None]]))
    assert out[0] is picture
    assert torch.equal(out[1], picture.flip(-1))


def test_ops_change_as_many_pictures_as_they_say_and_are_not_run_for_others(
    picture: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kornia itself would run every op for every picture."""
    ops = [Op("RandomBrightness", (("brightness", (0.5, 0.6)), ("p", 0.25))), Op("RandomInvert", (("p", 0.0),))]
    ran: list[str] = []
    real = augment.certain
    monkeypatch.setattr(augment, "certain", lambda op, device: (ran.append(op.name), real(op, device))[1])
    out = augment_row([picture] * 200, ops, list(range(200)), list(range(200)), STILL.expand(200, 3, 3))
    changed = [x for x in out if x is not picture]
    assert ran == ["RandomBrightness"] * len(changed)
    assert 30 < len(changed) < 70
    assert all((x.float() < 0.8 * picture.float() + 1).all() for x in changed)
    certain = Op("RandomBrightness", (("brightness", (0.5, 0.6)), ("p", 1.0)))
    assert all(x is not picture for x in augment_row([picture] * 9, [certain], [0] * 9, [3], STILL))
    assert chance(Op("RandomBrightness", ())) == 1.0  # Kornia's default


def test_values_of_pixels_are_drawn_where_the_pictures_are() -> None:
    """On the CPU a picture's noise takes longer than all else; a few numbers are the same in a preview."""
    policies = [read_policy(name).photometric for name in ("photometric", "document")]
    found = {op.name for ops in policies for op in ops if _draws_pixels(certain(op, torch.device("cpu")))}
    assert found == {"RandomGaussianNoise"}
    rain = certain(Op("RandomRain", (("number_of_drops", (200, 900)),)), torch.device("cpu"))
    for seed in range(40):
        torch.manual_seed(seed)
        assert not _draws_pixels(rain)
    noise = next(op for op in policies[0] if op.name == "RandomGaussianNoise")
    assert certain(noise, torch.device("meta")).device == torch.device("meta")
    assert certain(policies[0][0], torch.device("meta")).device == torch.device("cpu")


def test_what_is_found_out_about_an_op_seeds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a row: the noise of the first picture would be another one than after a resume."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    fresh = {"RandomGaussianNoise": {"std": 0.0123, "p": 0.5}}
    kind, op, wrong = read_op(fresh)
    assert (kind, wrong) == ("photometric", [])
    assert op is not None
    certain(op, torch.device("meta"))
    draw(read_policy("geometric"), 5, (700, 504))
    assert seeded == []


def test_a_row_is_augmented_by_sample_not_by_place(picture: Tensor) -> None:
    ops = read_policy("photometric").photometric
    alone = augment_row([picture, picture], ops, [0, 0], [77], STILL)
    beside = augment_row([picture, picture, picture], ops, [0, 1, 1], [5, 77], STILL.expand(2, 3, 3))
    assert torch.equal(alone[0], beside[1])
    assert torch.equal(alone[1], beside[2])
    assert not torch.equal(alone[0], alone[1])


def test_all_pictures_of_a_sample_move_alike(picture: Tensor) -> None:
    unit = draw(read_policy("geometric"), 5, (56, 84))
    assert unit is not None
    both = augment_row([picture, picture], (), [0, 0], [1], torch.from_numpy(unit)[None])
    assert torch.equal(both[0], both[1])


@pytest.mark.parametrize("policy", ["geometric", "document"])
@pytest.mark.parametrize("size", [(448, 336), (140, 280)])
def test_a_box_is_where_its_thing_is(policy: str, size: tuple[int, int]) -> None:
    """A bright rectangle, moved by Kornia, against its box, moved by numpy: within a pixel and a half."""
    width, height = size
    chosen, seen = read_policy(policy), 0
    for seed in range(60):
        unit = draw(chosen, seed, size)
        box = (0.3, 0.4, 0.55, 0.65)
        places = move_place(unit, box) if unit is not None else None
        if unit is None or places is None:
            continue
        seen += 1
        x = torch.zeros(1, 3, height, width)
        x[..., round(0.4 * height) : round(0.65 * height), round(0.3 * width) : round(0.55 * width)] = 1.0
        out = warp(x, torch.from_numpy(unit))[0, 0]
        rows, columns = (torch.nonzero(out.amax(dim=d) > 0.5).flatten() for d in (1, 0))
        found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        wanted = [n * (width, height)[k % 2] for k, n in enumerate(places)]
        assert all(abs(float(a) - b) < 2.0 for a, b in zip(found, wanted, strict=True)), (seed, found, wanted)
    assert seen > 20


def test_a_point_is_where_its_dot_is() -> None:
    unit = draw(read_policy("geometric"), 3, (224, 224))
    assert unit is not None
    ((x, y),) = moved(unit, np.array([[0.5, 0.4]]))
    dot = torch.zeros(1, 3, 224, 224)
    dot[..., 88:91, 111:114] = 1.0
    at = int(warp(dot, torch.from_numpy(unit))[0, 0].flatten().argmax())
    assert abs(at % 224 - 224 * x) < 2.5
    assert abs(at // 224 - 224 * y) < 2.5
