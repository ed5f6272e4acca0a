"""What data workers tell the vision tower is what it would have worked out itself, bit for bit."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_rows import Example, Grids, packed_row
from torch import Tensor

from vlft.data.collate import Row, empty_row
from vlft.family import FAMILIES
from vlft.grids import BLANK, TowerInputs, tower_inputs
from vlft.models.forward import PackedVLM, layout_of
from vlft.models.load import open_checkpoint, source_of

PICTURES: list[Grids] = [[*BLANK], [(1, 2, 2)], [(1, 14, 6)], [(1, 4, 4), (1, 26, 18), (1, 2, 32), (1, 10, 10)]]


def prepared(folder: Path) -> tuple[PackedVLM, Any]:
    source = source_of(open_checkpoint(str(folder)), "no", torch.device("cpu"))
    return PackedVLM(source.load(), source.parts, source.config.image_token_id), source


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_would_have_worked_out_the_same(tiny: Callable[..., Path], family: str) -> None:
    packed, source = prepared(tiny(family))
    tower, layout = packed.hf.model.visual, source.checkpoint.pictures.layout
    assert layout == layout_of(tower) == packed.layout
    seen: list[Any] = []

    def note(_: Any, inputs: tuple[Tensor], named: dict[str, Any]) -> None:
        cos, sin = named["position_embeddings"]
        seen.append([*inputs, cos, sin, named["cu_seqlens"], torch.tensor(int(named["max_seqlen"]))])

    for block in tower.blocks:
        block.register_forward_pre_hook(note, with_kwargs=True)
    for grids in PICTURES:
        pixels = torch.randn(sum(h * w for _, h, w in grids), packed.patch_dim)
        both = []
        for arguments in ({"grid_thw": torch.tensor(grids)}, tower_inputs(grids, layout).arguments):
            seen.clear()
            out = tower(pixels, **arguments).pooler_output
            both.append([*seen, [out]])
        assert len(both[0]) == 1 + len(tower.blocks)
        for own, told in zip(*both, strict=True):
            assert all(map(torch.equal, own, told))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_for_the_tower_to_work_out(
    tiny: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these would wait for the device."""
    packed, _ = prepared(tiny(family))
    inputs = tower_inputs([(1, 4, 6), (1, 8, 4)], packed.layout)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the tower reads the grid")

    for name in ("repeat_interleave", "meshgrid", "unique_consecutive", "floor"):
        monkeypatch.setattr(torch, name, fail)
    packed.hf.model.visual(torch.randn(56, packed.patch_dim), **inputs.arguments)
    with pytest.raises(AssertionError, match="reads the grid"):
        packed.hf.model.visual(torch.randn(56, packed.patch_dim), grid_thw=inputs.tensors["grid_thw"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("samples", [[[]], [[], [(1, 4, 6)], [(1, 2, 4), (1, 12, 10)]]])
def test_a_row_that_brings_them_gives_the_same_losses(
    tiny: Callable[..., Path], family: str, samples: list[Grids]
) -> None:
    packed, source = prepared(tiny(family))
    row = packed_row([Example(family, source, grids, seed) for seed, grids in enumerate(samples)])
    told = tower_inputs(row["image_grid_thw"], packed.layout)
    assert told.tensors["grid_thw"].tolist() == [list(g) for grids in samples for g in grids] or [*map(list, BLANK)]
    strange = tower_inputs([(1, 2, 2)], type(packed.layout)(merge=1, patch=3))
    expected = packed(**row)
    assert packed(**row, tower=told).equal(expected)
    assert packed(**row, tower=strange).equal(expected), "inputs made for another tower"


def test_a_config_that_names_no_window_has_its_familys(tiny: Callable[..., Path], tmp_path: Path) -> None:
    for family, key in (("qwen2_5_vl", "window_size"), ("qwen3_vl", "num_position_embeddings")):
        folder = tmp_path / family
        folder.mkdir()
        for path in tiny(family).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        del config["vision_config"][key]
        (folder / "config.json").write_text(json.dumps(config))
        checkpoint = open_checkpoint(str(folder))
        layout = checkpoint.pictures.layout
        hf = source_of(checkpoint, "no", torch.device("cpu")).config.vision_config
        assert (layout.window, layout.table**2) == (112, 0) if key == "window_size" else (0, 2304)
        assert getattr(hf, key) == max(layout.window, layout.table**2)


def test_they_cross_to_another_process_without_descriptors(tiny: Callable[..., Path]) -> None:
    layout = open_checkpoint(str(tiny())).pictures.layout
    row = empty_row(7, layout)
    found: Row = pickle.loads(pickle.dumps(row))
    assert found.same_as(row)
    assert isinstance(found.tower, TowerInputs)
    assert not found.same_as(empty_row(7))
    assert not found.tower.equal(tower_inputs([(1, 2, 4)], layout))
    assert row.to("cpu").same_as(row)
