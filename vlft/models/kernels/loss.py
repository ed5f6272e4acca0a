"""Cross entropy of the learnt tokens: logits are read as the head left them, and nothing as large lies beside them.

In PyTorch's own functions a logit in bf16 takes 14 bytes at the worst moment (itself, in fp32, the log of its softmax,
the gradients of these); here it takes its own two. (The idea is Liger Kernel's.)

S learnt tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlft.models.kernels import pointwise


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_SV: Tensor, labels_S: Tensor) -> Tensor:
        logits_SV = logits_SV.contiguous()
        losses_S, sums_S = pointwise.cross_entropy(logits_SV, labels_S)
        if ctx.needs_input_grad[0]:
            # Not by save_for_backward: the gradient is put in the logits' place.
            ctx.kept = logits_SV, labels_S, sums_S
        return losses_S

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_losses_S: Tensor) -> tuple[Tensor, None]:
        if ctx.kept is None:
            raise RuntimeError("The gradient of these logits is in their place already; a row goes backward once.")
        logits_SV, labels_S, sums_S = ctx.kept
        ctx.kept = None
        d_logits_SV = pointwise.cross_entropy_backward(logits_SV, labels_S, sums_S, d_losses_S)
        # A kernel writes unseen by autograd, which must know if a head of its own kind has saved its output.
        torch.autograd.graph.increment_version(logits_SV)
        return d_logits_SV, None


def cross_entropy(logits_SV: Tensor, labels_S: Tensor) -> Tensor:
    """(S,) losses in fp32 (fp64 for fp64 logits).

    The backward pass destroys the logits, and goes once.

    Args:
        labels_S: int64.
    """
    losses_S: Tensor = _CrossEntropy.apply(logits_SV, labels_S)  # type: ignore[no-untyped-call]
    return losses_S
