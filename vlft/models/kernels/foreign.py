"""What a layer as one operation would not run, or would compute wrongly: others' hooks, forwards, classes.

One operation reads the weights of all modules inside and calls none of them. So a hook on one of them, a forward that
was put over an instance's own, a subclass with another formula would be left out in silence. Whoever meets one of these
leaves the layer its own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from vlft.models.kernels.block import Norm
from vlft.models.kernels.product import UnsupportedError

HOOKS = {
    "_forward_pre_hooks": "a forward hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward hook",
    "_backward_hooks": "a backward hook",
}
RMS_NORMS = ("Qwen2VLRMSNorm", "Qwen2_5_VLRMSNorm", "Qwen3VLTextRMSNorm")
"""Classes of transformers, all with the formula that `pointwise.norm` has."""


def foreign(layer: nn.Module) -> str | None:
    """What was put on a layer, or on a module inside, that its one operation would not run. Hooks of itself run."""
    for name, module in layer.named_modules():
        place = name or "the layer"
        if name:
            for held, what in HOOKS.items():
                if any(not _idle(hook) for hook in getattr(module, held).values()):
                    return f"{what} on {place}"
            if hasattr(module, "parametrizations"):
                return f"a parametrization of {place}"
        if not own_forward(module):
            return f"another forward on {place}"
    return None


def stale(layer: Any) -> str | None:
    """What of the modules that the layer's operation was made of has changed so that it would compute another thing."""
    inside = {module for name, module in layer.named_modules() if not name.endswith("base_layer")}
    for group in layer.vlft_block.groups():
        if any(p.outer not in inside or getattr(p.outer, "base_layer", p.outer) is not p.base for p in group.each):
            return "another module than at the start"
        try:
            group.check()
        except UnsupportedError as error:
            return str(error)
    return None


class Lying:
    """Which modules lie in some others: adapters come and go. Asked for every row, so in loops that run in C."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        named = [(name, module) for root in roots for name, module in root.named_modules() if module._modules]
        # Of what PEFT puts around a product only the place where every adapter has something.
        self._dicts = [
            module._modules for name, module in named
            if name.endswith("lora_dropout") or not ("lora_" in name or hasattr(module, "base_layer"))
        ]  # fmt: skip
        self._held = self._now()

    def _now(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self._dicts)))

    def same(self) -> bool:
        return self._now() == self._held


def own_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward: its own, or behind hooks that change nothing here."""
    held: dict[str, Any] = module.__dict__
    forward = _behind_moves(module, held.get("forward"))
    if "plain_forward" in held:  # one of ours lies over it
        if getattr(forward, "__module__", None) != f"{__package__}.install":
            return False
        forward = _behind_moves(module, held["plain_forward"])
    if forward is None:
        return True
    its = getattr(forward, "__func__", None)
    return getattr(forward, "__self__", None) is module and _equal(its, type(module).forward)


def _equal(a: Any, b: Any) -> bool:
    """FSDP2 gives a module a class of its own, with a copy of the forward."""
    return a is b or all(
        getattr(a, part, None) is not None and getattr(a, part) == getattr(b, part, None)
        for part in ("__code__", "__module__", "__qualname__")
    )


def _behind_moves(module: nn.Module, forward: Any) -> Any:
    """accelerate's hooks where a model was loaded with a device map, in 4 bits say: they bring what a module is called
    with to the device on which its weights are, where it is already. They wrap the forward; returns that."""
    hook: Any = getattr(module, "_hf_hook", None)
    moves = all(
        type(one).__name__ == "AlignDevicesHook" and not one.offload and not one.no_grad
        for one in getattr(hook, "hooks", (hook,))
    )
    wraps = isinstance(forward, partial) and forward.func.__module__ == "accelerate.hooks"
    return module.__dict__.get("_old_forward") if moves and wraps else forward


def _idle(hook: Any) -> bool:
    """transformers' hooks that hand out hidden states: they stay once someone has asked, and do nothing unasked."""
    return bool(getattr(hook, "__module__", None) == "transformers.utils.output_capturing")


def known(module: nn.Module, *names: str) -> Any:
    """The module, of a class whose formula the operation has, with all that will be looked for.

    Raises:
        UnsupportedError: it is of another class than transformers' for Qwen-VL, or holds other things.
    """
    kind = type(module)
    if not kind.forward.__module__.startswith("transformers.models.qwen"):
        raise UnsupportedError(f"a {kind.__name__}")
    if missing := [name for name in names if not hasattr(module, name)]:
        raise UnsupportedError(f"a {kind.__name__} without {', '.join(missing)}")
    return module


def norm(module: nn.Module) -> Norm:
    """
    Raises:
        UnsupportedError: a norm whose formula is another one, or not known.
    """
    kind = type(module)
    if kind is nn.LayerNorm:
        if module.weight is None or module.bias is None:
            raise UnsupportedError("a LayerNorm without weight or bias")
    elif kind.__name__ not in RMS_NORMS or not kind.__module__.startswith("transformers.models."):
        raise UnsupportedError(f"a {kind.__name__} as norm")
    return Norm(module)


def check_activation(mlp: nn.Module, name: str) -> None:
    """
    Raises:
        UnsupportedError: the MLP holds another activation than the configuration names.
    """
    held = getattr(mlp, "act_fn", None) or getattr(mlp, "act", None)
    if type(held) is not type(ACT2FN[name]):
        raise UnsupportedError(f"a {type(held).__name__} where the configuration says {name}")
