"""Hashes, near pairs, the second look, and languages."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
from doctor_data import form, photo
from PIL import Image

from vlft.doctor import languages
from vlft.doctor.languages import SHORT, apart, language, main_script, scripts
from vlft.doctor.pictures import DISTANCE, SIDE, detail, distance, look_the_same, near_pairs, signature


def pixels(picture: Image.Image, side: int) -> Any:
    small = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return Image.open(io.BytesIO(out.getvalue()))


def bits(a: Image.Image, b: Image.Image) -> int:
    one, other = signature(pixels(a, SIDE)), signature(pixels(b, SIDE))
    assert one is not None
    assert other is not None
    return int(distance(one, other))


def same(a: Image.Image, b: Image.Image) -> bool:
    side = detail(a.size, b.size)
    return look_the_same(pixels(a, side), pixels(b, side))


@pytest.mark.parametrize("made", [photo(1), photo(2), form(1), form(2)])
def test_copies_are_the_same(made: Image.Image) -> None:
    half = made.resize((made.width // 2, made.height // 2))
    for copy in (jpeg(made, 40), half, jpeg(half, 60), made.convert("RGBA")):
        assert bits(made, copy) <= DISTANCE
        assert same(made, copy)


def test_copies_of_small_pictures_are_the_same() -> None:
    """The demo's drawings have 112 pixels and hard edges."""
    from demo.draw import demo_picture

    drawn = [demo_picture(seed, "count")[0] for seed in range(12)]
    for made in drawn:
        for copy in (jpeg(made, 60), made.resize((90, 90)), jpeg(made.resize((90, 90)), 70), made.resize((224, 224))):
            assert bits(made, copy) <= DISTANCE
            assert same(made, copy)
    assert not any(same(a, b) for n, a in enumerate(drawn) for b in drawn[:n])
    assert [detail((90, 300), (112, 112)), detail((20, 20)), detail((4000, 3000))] == [88, 64, 256]


def test_others_are_not() -> None:
    for seed in range(20):
        assert bits(photo(seed), photo(seed + 100)) > 2 * DISTANCE
        assert not same(photo(seed), photo(seed + 100))
    near = [bits(form(seed), form(seed + 100)) <= DISTANCE for seed in range(8)]
    assert any(near), "the hash alone takes forms for copies"
    assert not any(same(form(seed), form(seed + 100)) for seed in range(8)), "the second look does not"
    tinted = Image.merge("RGB", [photo(1).split()[i] for i in (2, 0, 1)])
    assert not same(photo(1), tinted), "other colours, though perhaps the same light"


def test_an_empty_picture_has_no_hash() -> None:
    assert signature(pixels(Image.new("RGB", (50, 50), "white"), SIDE)) is None


def test_the_transform_is_a_dct() -> None:
    from scipy.fft import dctn

    from vlft.doctor.pictures import _DCT

    light = np.random.default_rng(0).uniform(0, 255, (SIDE, SIDE))
    np.testing.assert_allclose(_DCT @ light @ _DCT.T, dctn(light, norm="ortho")[1:17, 1:17], atol=1e-9)


def _flip(hashes: Any, rng: Any, count: int) -> Any:
    out = hashes.copy()
    for bit in rng.choice(256, count, replace=False):
        out[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return out


def test_near_pairs_are_those_of_all_comparisons() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (3000, 4), dtype=np.uint64)
    for n in range(300):
        hashes[2000 + n] = _flip(hashes[n], rng, n % 16)
    hashes = np.unique(hashes, axis=0)
    found, crowded = near_pairs(hashes)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2, dtype=np.int64)
    wanted = np.argwhere(np.triu(apart <= DISTANCE, 1))
    assert crowded == 0
    assert len(wanted) >= 280
    np.testing.assert_array_equal(found, wanted)


def test_most_pairs_at_the_full_distance_are_found() -> None:
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, (400, 4), dtype=np.uint64)
    others = np.stack([_flip(one, rng, DISTANCE) for one in hashes])
    found, _ = near_pairs(np.concatenate([hashes, others]))
    assert len(found) >= 0.85 * 400


def test_very_many_alike_stay_bounded_and_are_told() -> None:
    """All share most bands: each is compared with its neighbours, not with everyone."""
    rng = np.random.default_rng(2)
    first = rng.integers(0, 2**64, 4, dtype=np.uint64)
    hashes = np.unique(np.stack([_flip(first, rng, 4) for _ in range(5000)]), axis=0)
    found, crowded = near_pairs(hashes)
    assert len(found) < 16 * 64 * len(hashes)
    assert crowded > 4000
    linked = np.zeros(len(hashes), np.bool_)
    linked[found.ravel()] = True
    assert linked.all(), "every one has a pair"


def test_no_pictures() -> None:
    assert near_pairs(np.zeros((0, 4), np.uint64))[0].shape == (0, 2)


# ------------------------------------------------------------------ languages


def test_scripts() -> None:
    assert scripts("abc 猫 ねこ 12") == Counter({"Latin": 3, "Han": 1, "Kana": 2})
    assert main_script("привет hi") == "Cyrillic"
    assert main_script("12.5 %") == ""


def test_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert language("yes") == SHORT
    assert language("128.40") == SHORT
    if languages.tells_languages():
        assert language("What is the total of this invoice?") == "English"
        assert language("Was ist auf dem Bild zu sehen?") == "German"
        assert language("图片里有什么？") == "Chinese"
        assert language("この写真には何がありますか") == "Japanese"
    monkeypatch.setattr(languages, "tells_languages", lambda: False)
    assert language("What is the total of this invoice?") == "Latin script"
    assert language("图片里有什么？") == "Han script"


def test_mixes_apart() -> None:
    assert apart(Counter(a=10), Counter(a=3)) == 0
    assert apart(Counter(a=10), Counter(b=3)) == 1
    assert apart(Counter(a=5, b=5), Counter(a=3)) == 0.5
    assert apart(Counter(), Counter(a=3)) == 0
