from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vlft.data.positions import mrope


@pytest.fixture(scope="module")
def models(tiny: Any) -> dict[str, Any]:
    from transformers import AutoModelForImageTextToText

    tok = tiny.make_tokenizer()
    with torch.device("meta"):
        return {
            f: AutoModelForImageTextToText.from_config(tiny.make_config(f, tok, layers=1)).model for f in tiny.FAMILIES
        }


GRIDS = [[], [(1, 4, 6)], [(1, 2, 2), (1, 10, 4), (1, 4, 18)], [(1, 64, 2)]]


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_equal_to_hugging_face(models: dict[str, Any], family: str, grids: list[tuple[int, int, int]]) -> None:
    model = models[family]
    image = model.config.image_token_id
    ids = [20, 21, 22]
    for t, h, w in grids:
        ids += [9, *[image] * (t * h * w // 4), 10, 30, 31]
    ids += [40] * 5
    ours = mrope(np.array(ids), image, np.array(grids).reshape(-1, 3))
    tokens = torch.tensor([ids])
    theirs, _ = model.get_rope_index(
        tokens, (tokens == image).int(), image_grid_thw=torch.tensor(grids) if grids else None
    )
    assert ours.dtype == np.int64
    assert ours[0].tolist() == list(range(len(ids)))
    assert torch.equal(torch.from_numpy(ours[1:]), theirs[:, 0])


@pytest.mark.parametrize("grids", [[], [(1, 2, 2)], [(1, 2, 2), (1, 4, 4)], [(1, 2, 4), (1, 2, 2)]])
def test_image_tokens_that_do_not_fit_the_grids(grids: Any) -> None:
    with pytest.raises(ValueError, match="image tokens"):
        mrope(np.array([1, 7, 2, 7, 3]), 7, np.array(grids).reshape(-1, 3))
