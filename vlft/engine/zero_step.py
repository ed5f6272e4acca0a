"""What DeepSpeed's ZeRO does between the backward pass and its optimizer's step, in a few launches.

DeepSpeed asks each gradient by itself whether it is finite, in ten small operations, copies it to fp64 for its norm,
and divides all of them before each step of a group, for which the host looks at the norm. Of 3B `full` under ZeRO-2
these are some 5000 launches and a pass over the gradients more, in which the GPU waits or could have been done. Here
one pass gives the norms and whether all is finite, and the step divides. What DeepSpeed makes of that stays its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlft.engine.base import norms_of
from vlft.engine.readback import readback
from vlft.optim import scales_gradients


class LeanStep:
    """Puts its own functions in the place of DeepSpeed's."""

    def __init__(self, zero: Any) -> None:
        """
        Args:
            zero: DeepSpeed's ZeRO optimizer, of any stage.
        """
        self._zero = zero
        self._heard: list[Callable[[], Tensor]] = []
        self._squares: dict[int, Tensor] = {}
        """Of the gradients that lie here, by the list that they are in."""
        zero.get_grad_norm_direct = self._norm
        if hasattr(zero, "bit16_groups"):  # ZeRO-1 and 2; ZeRO-3 looks at its flat buffer, which is fast
            zero.has_overflow_partitioned_grads_serial = self._overflow
        if scales_gradients(zero.optimizer):  # DeepSpeed's own Adam, of offloaded states, does not
            zero.unscale_and_clip_grads = self._leave_to_the_step
        offloaded = zero.complete_grad_norm_calculation_for_cpu_offload

        def hearing(*args: Any, **options: Any) -> Any:
            norm = offloaded(*args, **options)
            self._heard.append(readback(torch.as_tensor(norm)))
            return norm

        zero.complete_grad_norm_calculation_for_cpu_offload = hearing

    def begin(self) -> None:
        self._zero.optimizer.grad_scale = None
        self._heard.clear()
        self._squares.clear()

    def norms(self) -> list[float]:
        """Of every group of the step (ZeRO-3: of every sub-group), in their order; -1: it is not finite.

        Empty where an overflow ended the step before they were taken.
        """
        return [float(norm()) for norm in self._heard]

    def _overflow(self) -> Tensor:
        """(1,) bool: whether something is not finite here."""
        lists = [self._zero.averaged_gradients[group] for group in range(len(self._zero.bit16_groups))]
        self._squares = {id(gradients): self._square(gradients) for gradients in lists}
        return ~torch.stack([*self._squares.values()]).isfinite().all().reshape(1)

    def _norm(self, gradients: Sequence[Tensor | None], params: Sequence[Any], norm_type: float = 2) -> Tensor:
        """() fp32: of some gradients that are cut up over the ranks; -1, DeepSpeed's own sign, if it is not finite.

        Args:
            params: those of the gradients.
        """
        assert norm_type == 2
        square = self._squares.pop(id(gradients), None)
        square = self._square(gradients) if square is None else square
        choose = getattr(self._zero, "_get_param_partition_group", None)  # ZeRO-3's
        group = choose(params[0]) if choose and params else self._zero.dp_process_group
        torch.distributed.all_reduce(square, group=group)
        norm = square.sqrt().float()
        norm = torch.where(norm.isfinite(), norm, -1.0)
        self._heard.append(readback(norm))
        return norm

    def _square(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """() fp64."""
        there = [gradient for gradient in gradients if gradient is not None]
        if not there:
            return torch.zeros((), dtype=torch.float64, device=self._zero.device)
        return torch.stack(norms_of(there)).double().square().sum()

    def _leave_to_the_step(self, which: Any, norm: Tensor) -> None:  # noqa: ARG002
        """Of the next group, which DeepSpeed names in its own way at each stage: its step divides what it is given.

        Args:
            norm: of all gradients, times the loss scale; it is finite.
        """
        zero, scale = self._zero, float(self._zero.loss_scale)
        # No number goes to the GPU from the host, which would wait for all that it was asked for.
        if zero.clip_grad > 0:
            zero.optimizer.grad_scale = (((norm / scale + 1e-6) / zero.clip_grad).clamp(min=1.0) * scale).float()
        else:
            zero.optimizer.grad_scale = None if scale == 1 else torch.full_like(norm, scale, dtype=torch.float32)
