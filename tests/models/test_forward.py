"""A packed row against one-by-one Hugging Face forwards, and what may and may not influence a sample's loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_rows import Example, Grids, gradients, packed_row
from torch import Tensor
from torch.nn import functional as F

from vlft.models.forward import IGNORE, PackedVLM
from vlft.models.load import load_hf, open_checkpoint, source_of
from vlft.testing.tiny import FAMILIES

CUTS: dict[str, list[Grids]] = {
    "no picture": [[], []],
    "one picture each": [[(1, 4, 6)], [(1, 12, 12)]],
    "none, one and three": [[(1, 4, 6)], [], [(1, 2, 4), (1, 8, 10), (1, 6, 2)], []],
}


def one_by_one(model: Any, example: Example) -> Tensor:
    """Summed loss by Hugging Face's own forward, positions and mask, of one sample alone."""
    image = model.config.image_token_id
    pictures = {}
    if example.pixels is not None:
        pictures = {"pixel_values": example.pixels, "image_grid_thw": example.grids}
    out = model(input_ids=example.ids, mm_token_type_ids=(example.ids == image).int(), **pictures)
    return F.cross_entropy(out.logits[0].float(), example.labels[0], ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", CUTS)
def test_a_packed_row_equals_one_by_one_forwards(tiny: Callable[..., Path], family: str, cut: str) -> None:
    folder = tiny(family)
    source = source_of(open_checkpoint(str(folder)), "no", torch.device("cpu"))
    examples = [Example(family, source, grids, seed) for seed, grids in enumerate(CUTS[cut])]
    reference = load_hf(folder, "cpu")
    expected = torch.stack([one_by_one(reference, e) for e in examples]).sum()
    expected.backward()
    packed = PackedVLM(source.load(), source.parts, source.config.image_token_id)
    found = packed(**packed_row(examples)).sum()
    found.backward()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    a, b = gradients(packed.model), gradients(reference)
    assert float((a - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_pictures_or_labels_still_reaches_every_weight(tiny: Callable[..., Path], family: str) -> None:
    """AdamW skips a missing gradient but decays on a zero one, and DDP waits for every weight."""
    source = source_of(open_checkpoint(str(tiny(family))), "no", torch.device("cpu"))
    packed = PackedVLM(source.load(), source.parts, source.config.image_token_id)
    row = {
        "input_ids_T": torch.tensor([[3]]),
        "position_ids_4T": torch.zeros(4, 1, 1, dtype=torch.int64),
        "labels_T": torch.tensor([[IGNORE]]),
        "cu_seqlens": torch.tensor([0, 1], dtype=torch.int32),
        "max_seqlen": 1,
        "pixel_values": None,
        "image_grid_thw": torch.zeros(0, 3, dtype=torch.int64),
    }
    losses = packed(**row)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert [n for n, p in packed.named_parameters() if p.grad is None] == []
    assert all(not p.grad.any() for p in packed.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_samples_loss_changes_only_with_the_sample(tiny: Callable[..., Path], family: str) -> None:
    """Perturb other samples' tokens and pixels: nothing moves. Perturb its own prompt, pixels, answer: it moves."""
    source = source_of(open_checkpoint(str(tiny(family))), "no", torch.device("cpu"))
    packed = PackedVLM(source.load(), source.parts, source.config.image_token_id).eval()
    base = [Example(family, source, grids, seed) for seed, grids in enumerate(CUTS["none, one and three"])]

    def loss_of(examples: list[Example], which: int) -> Tensor:
        with torch.no_grad():
            found = packed(**packed_row(examples))
        return found[5 * which : 5 * which + 5]

    before = loss_of(base, 2)
    others = [Example(family, source, grids, seed) for seed, grids in enumerate(CUTS["none, one and three"])]
    for i, example in enumerate(others):
        if i != 2:
            example.ids[example.ids > 19] += 3
            if example.pixels is not None:
                example.pixels += 1.0
    assert torch.allclose(loss_of(others, 2), before, atol=2e-6)
    for change in ("prompt", "pixels", "answer"):
        own = [Example(family, source, grids, seed) for seed, grids in enumerate(CUTS["none, one and three"])]
        if change == "prompt":
            own[2].ids[0, 1] += 3
        elif change == "pixels":
            assert own[2].pixels is not None
            own[2].pixels[:4] += 1.0
        else:
            own[2].ids[0, -3] += 3
            own[2].labels[0, -4] = own[2].ids[0, -3]
        assert (loss_of(own, 2) - before).abs().max() > 1e-4


def test_only_supervised_tokens_are_in_the_loss(tiny: Callable[..., Path]) -> None:
    """A row's losses are those of its learnt tokens, in order: each leaves with its label, the others stay."""
    source = source_of(open_checkpoint(str(tiny())), "no", torch.device("cpu"))
    packed = PackedVLM(source.load(), source.parts, source.config.image_token_id)
    example = Example("qwen2_5_vl", source, [(1, 4, 6)], 0)
    row = packed_row([example])
    length = example.ids.shape[1]
    row["labels_T"] = torch.cat([example.ids[:, 1:], torch.full((1, 1), IGNORE)], 1)
    with torch.no_grad():
        each = packed(**row)
        assert each.shape == (length - 1,)
        for learnt in (slice(3, None), slice(None, -4), slice(4, -2), slice(None, None, 2), slice(0, 0)):
            kept = torch.zeros(length, dtype=torch.bool)
            kept[:-1][learnt] = True
            found = packed(**row | {"labels_T": torch.where(kept, row["labels_T"], IGNORE)})
            assert torch.allclose(found, each[learnt], atol=1e-6)
    # Else the wrong ones would do as well.
    assert each.diff().abs().min() > 1e-4


def test_gradient_checkpointing_changes_nothing(tiny: Callable[..., Path]) -> None:
    source = source_of(open_checkpoint(str(tiny())), "no", torch.device("cpu"))
    found = []
    for checkpointing in (False, True):
        model: Any = source.load()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        packed = PackedVLM(model, source.parts, source.config.image_token_id).train()
        packed(**packed_row([Example("qwen2_5_vl", source, [(1, 4, 6)], 0)])).sum().backward()
        found.append(gradients(packed.model))
    assert torch.equal(found[0], found[1])
