from __future__ import annotations

import pytest
import torch

from vlft.engine import readback

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_what_was_asked_for_is_what_was_there_then(device: str) -> None:
    x = torch.arange(5.0, device=device)
    read, unread = readback(x * 2), readback(x * 3)
    del unread
    assert read().tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert readback(x[:0])().tolist() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_it_does_not_wait_for_what_is_asked_of_the_device_later() -> None:
    x = torch.ones(3, device="cuda")
    read = readback(x)
    torch.cuda._sleep(2_000_000_000)  # cycles of the device: about a second
    x.fill_(7.0)
    assert read().tolist() == [1.0, 1.0, 1.0]
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
