from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vlft.models.attention import attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[7], [4, 4, 4], [3, 5, 3, 1, 5]])
def test_segments_do_not_see_each_other(causal: bool, lengths: list[int]) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = torch.randn(1, 4, total, 8), torch.randn(1, 2, total, 8), torch.randn(1, 2, total, 8)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    module: Any = SimpleNamespace(is_causal=causal)
    found, _ = attention(module, q, k, v, None, scaling=0.3, cu_seq_lens_q=cu, max_length_q=max(lengths))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        one = scaled_dot_product_attention(
            q[:, :, part], k[:, :, part].repeat_interleave(2, 1), v[:, :, part].repeat_interleave(2, 1),
            is_causal=causal, scale=0.3,
        )  # fmt: skip
        assert torch.allclose(found[0, part], one[0].transpose(0, 1), atol=1e-6)
        start += length


@pytest.mark.parametrize("wrong", [{"attention_mask": torch.ones(1, 1, 3, 3)}, {"dropout": 0.1}, {"sliding_window": 4}])
def test_what_packed_rows_cannot_do_is_refused(wrong: dict[str, Any]) -> None:
    x = torch.randn(1, 2, 3, 8)
    options = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32)} | wrong
    module: Any = SimpleNamespace(is_causal=True)
    with pytest.raises(ValueError, match="plain_attention"):
        attention(module, x, x, x, **options)
