"""Faster forwards and backwards for the layers of both towers.

What they compute is transformers' own: `--reference` runs that instead, and tests/models/test_kernels.py compares.

* `pointwise.py`: norms, rotation, activations as plain functions; `on_gpu.py`: the same as Triton kernels.
* `product.py`: linear modules, plain or 4-bit, with or without adapters; `four_bit.py`: the matrices of 4-bit weights.
* `block.py`: a whole layer as one autograd node.
* `install.py`: finds the pieces in a model; `foreign.py`: notices what others have hung into them, which keeps its way.
* `held.py`: joined copies of weights, and whether they are still true.
* `loss.py`: cross entropy of the learnt tokens.
* `memory.py`: what each layer keeps for its backward pass.
"""

from vlft.models.kernels.block import Keep, compute_dtype
from vlft.models.kernels.foreign import Lying
from vlft.models.kernels.install import Installed, install
from vlft.models.kernels.loss import cross_entropy
from vlft.models.kernels.memory import Memory, memory_for, room_on_gpu

__all__ = [
    "Installed", "Keep", "Lying", "Memory", "compute_dtype", "cross_entropy", "install", "memory_for", "room_on_gpu",
]  # fmt: skip
