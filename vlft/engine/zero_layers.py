"""How ZeRO-3 gathers a model's layers and sums gradients: a layer at once, the next one ahead, as FSDP does.

DeepSpeed does it weight by weight, in Python, with a wait of the host in each layer: of 7B `full` some 8 ms a layer, in
which the GPU has nothing to do for half of the time. It also copies what it gathers twice, and each gradient once or
twice. Here the weights of a layer come to where they are used, in one launch; so do their gradients to the rank that
owns them. What is gathered next is what followed in the row before.

All of it is in the order of the stream on which the model computes: what is gathered ahead waits for the layer before
that one, so that no more than two layers are there at once, and nothing needs a second stream's consent to be freed.
What is outside of layers (embeddings, head, merger) DeepSpeed gathers; its options of how far ahead and for how long
are about that alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _coalescing_manager

ALIGNED = 128
"""Elements: where a weight begins in what is gathered."""
GATHER = getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)
SCATTER = getattr(torch.distributed, "reduce_scatter_single", torch.distributed.reduce_scatter_tensor)
"""The second names are those of torch 2.11; newer ones warn of them at each call."""
ELSEWHERE = (
    "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "mics_shard_size",
    "stage3_use_all_reduce_for_fetch_params", "zenflow",
)  # fmt: skip
"""Keys of a DeepSpeed file that ask for other ways to gather or to sum."""
SUMS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
"""Where DeepSpeed has the sums of a step's rows."""
NEEDED = (
    SUMS, "reduce_ready_partitions_and_remove_grads", "independent_gradient_partition_epilogue",
    "_prepare_fp32_grad_for_sub_group", "zero_hpz_partition_size", "sequence_parallel_size", "zenflow",
    "offload_optimizer", "offload_param", "reduce_scatter", "ipg_buckets", "gradient_predivide_factor",
    "_get_param_partition_group", "_global_ranks", "leaf_parameters", "fp16_groups", "grad_partitions_flat_buffer",
)  # fmt: skip
"""Of DeepSpeed's optimizer: what is looked at or replaced. A version without one of them works in another way."""
HOOKS = tuple(f"{when}_sub_module_{what}_function" for what in ("forward", "backward") for when in ("pre", "post"))


def can_gather_layers(zero: Any, config: Mapping[str, Any], layers: Sequence[nn.Module]) -> bool:
    """Whether `LayerGathering` does what this DeepSpeed file asks for: ZeRO-3 on the device, over all ranks.

    Args:
        zero: DeepSpeed's ZeRO optimizer, of any stage.
        config: the file's `zero_optimization`.
        layers: of the model.
    """
    return (
        bool(layers)
        and hasattr(zero, "parameter_offload")
        and all(hasattr(zero, name) for name in NEEDED)
        and all(hasattr(zero.parameter_offload, name) for name in HOOKS)
        and not (zero.offload_optimizer or zero.offload_param or zero.zenflow)
        and zero.zero_hpz_partition_size == 1
        and zero.sequence_parallel_size == 1
        and zero.reduce_scatter
        and {*zero.ipg_buckets} == {zero.dtype}
        and zero.gradient_predivide_factor == 1.0
        and not any(config.get(key) for key in ELSEWHERE)
        and _own_their_weights(layers, zero)
    )


def _own_their_weights(layers: Sequence[nn.Module], zero: Any) -> bool:
    """Each weight is of one layer and of nothing outside, and cut up over all ranks."""
    model: nn.Module = zero.parameter_offload.module
    groups = {zero._get_param_partition_group(p) for p in model.parameters()}
    of_layers = [p for layer in layers for p in layer.parameters()]
    inside = {module for layer in layers for module in layer.modules()}
    outside = {p for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
    return (
        len(of_layers) == len({*of_layers})
        and not outside & {*of_layers}
        and [zero._global_ranks(group) for group in groups] == [zero._global_ranks(zero.dp_process_group)]
    )


@dataclass(eq=False)
class _Layer:
    module: nn.Module
    weights: list[Any]
    """Those of a dtype behind each other, else as DeepSpeed numbers them: the same order on all ranks."""
    trained: list[Any]
    """In the order in which DeepSpeed tells their gradients."""
    sizes: list[int]
    """Elements of each weight as it is gathered, from shards of one size."""

    def runs(self) -> Iterator[slice]:
        """Of weights of one dtype."""
        begin = 0
        for _, run in groupby(self.weights, key=lambda p: p.ds_tensor.dtype):
            end = begin + len(list(run))
            yield slice(begin, end)
            begin = end


@dataclass
class _Gathered:
    """A layer's weights on their way here, or here."""

    works: list[Any]
    weights: list[Tensor]

    def wait(self) -> None:
        """The stream's, not the host's."""
        for work in self.works:
            work.wait()
        self.works = []


@dataclass
class _Summed:
    """A layer's gradients on their way to their owners."""

    works: list[Any]
    sent: list[Tensor]
    """Held until they have arrived."""
    mine: list[Tensor]
    sums: list[Tensor]
    adds: bool
    """To what the rows before left; else it is the step's first row."""


class LayerGathering:
    """Puts its own functions in the place of DeepSpeed's."""

    def __init__(self, zero: Any, layers: Sequence[nn.Module]) -> None:
        """
        Args:
            zero: one that `can_gather_layers`.
            layers: leaf modules of DeepSpeed, each of which is called as one.
        """
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self._zero, self._status = zero, ZeroParamStatus
        self._stack: list[nn.Module] = parameter_offload.FWD_MODULE_STACK
        # That of DeepSpeed's own gathering. Another one of the same ranks would be a second communicator, whose kernels
        # could wait on one GPU for those that wait for them on another.
        self._group = zero._get_param_partition_group(next(layers[0].parameters()))
        self._rank = torch.distributed.get_rank(self._group)
        self._world = torch.distributed.get_world_size(self._group)
        self._layers = {layer: self._of(layer) for layer in layers}
        self._layer_of = {p: layer for layer in self._layers.values() for p in layer.trained}
        self._sums: Mapping[int, Tensor] = getattr(zero, SUMS)  # it stays: nobody asks DeepSpeed to take it to the host
        self._nothing: dict[torch.dtype, Tensor] = {}
        self._ahead: dict[_Layer, _Gathered] = {}
        self._here: dict[_Layer, _Gathered] = {}
        self._follows: dict[tuple[str, _Layer], tuple[str, _Layer]] = {}
        """(forward, backward or inference, layer) -> what came after it in the last row."""
        self._at: tuple[str, _Layer] | None = None
        self._summing: _Summed | None = None
        self._take_over()

    def passing_bytes(self) -> int:
        """What a row holds at the most of weights that are gathered and of gradients that are on their way: of a layer
        and of the next, and of what is outside of layers, which DeepSpeed keeps from the forward to the backward, but
        for its largest weight: that is the head, or as large (`beside_head` has it).
        """
        weights, gradients = [0], [0]
        for layer in self._layers.values():
            of = {p: size * p.ds_tensor.element_size() for p, size in zip(layer.weights, layer.sizes, strict=True)}
            weights.append(sum(of.values()))
            gradients.append(sum(of[p] for p in layer.trained))
        inside = {p for layer in self._layers.values() for p in layer.weights}
        others = [p for p in self._zero.parameter_offload.module.parameters() if p not in inside]
        outside = sorted(p.ds_numel * p.ds_tensor.element_size() for p in others)
        return int(2 * max(weights) + 2 * max(gradients) + sum(outside[:-1]))

    def _of(self, module: nn.Module) -> _Layer:
        weights: list[Any] = sorted(module.parameters(), key=lambda p: (str(p.ds_tensor.dtype), p.ds_id))
        sizes = [self._world * p.ds_tensor.numel() for p in weights]
        return _Layer(module, weights, list(self._zero.leaf_parameters.get(module, ())), sizes)

    def _take_over(self) -> None:
        zero, hooks = self._zero, self._zero.parameter_offload
        inside = {p for layer in self._layers.values() for p in layer.weights}
        for p in inside:
            p.ds_persist = False
            if p.ds_status == self._status.AVAILABLE:
                p.partition()
        zero.persistent_parameters = [p for p in zero.persistent_parameters if p not in inside]
        hooks.module.register_forward_pre_hook(lambda *_: self._begin())  # the whole model: a row
        own = self._before_forward, self._after_forward, self._before_backward, self._release
        for name, its_own in zip(HOOKS, own, strict=True):
            setattr(hooks, name, self._instead(its_own, getattr(hooks, name)))
        self._epilogue = zero.independent_gradient_partition_epilogue
        zero.reduce_ready_partitions_and_remove_grads = self._arrived
        zero.independent_gradient_partition_epilogue = self._finish
        if pieces := self._in_one_piece():
            zero._prepare_fp32_grad_for_sub_group = partial(self._give, pieces)
        for bucket in zero.ipg_buckets.values():
            bucket.buffer = None  # nothing comes there any more

    def _instead(self, own: Callable[[_Layer], None], theirs: Callable[[Any], None]) -> Callable[[Any], None]:
        def chosen(module: nn.Module) -> None:
            layer = self._layers.get(module)
            if layer is None:
                theirs(module)
            else:
                own(layer)

        return chosen

    # -- weights -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Of a row, and its end: an update may follow. What was gathered ahead of a generation is dropped, too."""
        if self._at is not None:
            self._follows.pop(self._at, None)
        self._at = None
        for gathered in self._ahead.values():
            gathered.wait()  # else its memory would be given to others while it is being written
        self._ahead.clear()
        for layer in list(self._here):
            self._release(layer)

    def _before_forward(self, layer: _Layer) -> None:
        self._stack.append(layer.module)
        self._need("forward" if torch.is_grad_enabled() else "inference", layer)

    def _after_forward(self, layer: _Layer) -> None:
        if self._at is None or self._follows.get(self._at) != ("backward", layer):
            self._release(layer)

    def _before_backward(self, layer: _Layer) -> None:
        self._need("backward", layer)

    def _need(self, when: str, layer: _Layer) -> None:
        now = when, layer
        if now == self._at:
            return  # another of its outputs
        if self._at is not None:
            self._follows[self._at] = now
        self._at = now
        if layer not in self._here:
            # Else it would come a second time, and DeepSpeed wait for a weight that is here.
            assert all(p.ds_status != self._status.INFLIGHT for p in layer.weights), "DeepSpeed gathers it, too"
            self._here[layer] = gathered = self._ahead.pop(layer, None) or self._gather(layer)
            gathered.wait()
            for p, whole in zip(layer.weights, gathered.weights, strict=True):
                p.data = whole
                p.ds_status = self._status.AVAILABLE
        _, following = self._follows.get(now, (None, None))
        if following is not None and following not in self._here and following not in self._ahead:
            self._ahead[following] = self._gather(following)

    def _gather(self, layer: _Layer) -> _Gathered:
        """Begin to."""
        works, weights = list[Any](), list[Tensor]()
        for run in layer.runs():
            first, sizes = layer.weights[run][0].ds_tensor, layer.sizes[run]
            room = [-(-size // ALIGNED) * ALIGNED for size in sizes]
            parts = torch.split(torch.empty(sum(room), dtype=first.dtype, device=first.device), room)
            whole = [part[:size] for part, size in zip(parts, sizes, strict=True)]
            shards = [p.ds_tensor for p in layer.weights[run]]
            works += self._together(GATHER, whole, shards)
            weights += [part[: p.ds_numel].view(p.ds_shape) for p, part in zip(layer.weights[run], whole, strict=True)]
        return _Gathered(works, weights)

    def _release(self, layer: _Layer) -> None:
        if self._here.pop(layer, None) is None:
            return
        for p in layer.weights:
            if p.dtype not in self._nothing:
                self._nothing[p.dtype] = torch.empty(0, dtype=p.dtype, device=p.device)
            p.data = self._nothing[p.dtype]
            p.ds_status = self._status.NOT_AVAILABLE

    def _together(self, collective: Callable[..., Any], outputs: list[Tensor], inputs: list[Tensor]) -> list[Any]:
        """`collective` of each pair, in one launch where the backend can; returns what to wait for."""
        with _coalescing_manager(group=self._group, async_ops=True) as begun:
            for output, given in zip(outputs, inputs, strict=True):
                collective(output, given, group=self._group)
        assert begun.works, "nothing to wait for"
        return list(begun.works)

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _arrived(self, p: nn.Parameter) -> None:
        """A gradient. Those of a layer come one after the other, when its backward pass is done."""
        layer = self._layer_of.get(p)
        if layer is None:
            self._sum([p])
        elif p is layer.trained[-1]:
            self._sum(layer.trained)

    @torch.no_grad()
    def _sum(self, weights: Sequence[Any]) -> None:
        """Begin to, over the ranks; and end it for those before."""
        sent, mine, sums = [], [], []
        for p in weights:
            assert p.grad is not None
            size = p.ds_tensor.numel()
            flat = p.grad.contiguous().view(-1)
            p.grad = None
            if flat.numel() < self._world * size:
                flat = torch.cat([flat, flat.new_zeros(self._world * size - flat.numel())])
            sent.append(flat)
            mine.append(flat.narrow(0, self._rank * size, size))
            sums.append(self._sums[p.ds_id])
        works = self._together(SCATTER, mine, sent)
        self._add()
        self._summing = _Summed(works, sent, mine, sums, adds=self._zero.micro_step_id > 0)

    def _add(self) -> None:
        """What has been summed over the ranks, to the sum of the step's rows."""
        summed, self._summing = self._summing, None
        if summed is None:
            return
        for work in summed.works:
            work.wait()
        if summed.adds:
            torch._foreach_add_(summed.sums, summed.mine)
        else:
            torch._foreach_copy_(summed.sums, summed.mine)

    @torch.no_grad()
    def _finish(self) -> None:
        """After a row's backward pass."""
        self._add()
        self._begin()
        self._epilogue()
        if self._zero.reduce_and_partition_stream is not None:
            # There DeepSpeed looks whether all is finite. Only now: its epilogue has the host wait for that stream,
            # which has nothing to do then. (It is the model's own where a file says no to `overlap_comm`.)
            self._zero.reduce_and_partition_stream.wait_stream(torch.accelerator.current_stream())

    def _in_one_piece(self) -> list[Tensor]:
        """The sums of each of DeepSpeed's sub-groups as one tensor; none where they lie otherwise."""
        zero, pieces, begin = self._zero, list[Tensor](), 0
        for group in zero.fp16_groups:
            parts = [self._sums[p.ds_id] for p in group]
            piece = zero.grad_partitions_flat_buffer[begin : begin + sum(map(len, parts))]
            at = piece.data_ptr()
            for part in parts:
                if part.data_ptr() != at:
                    return []
                at += part.numel() * part.element_size()
            pieces.append(piece)
            begin += len(piece)
        return pieces

    def _give(self, pieces: list[Tensor], sub_group_id: int) -> None:
        """To the optimizer, the sums of a sub-group, of which DeepSpeed would make a copy.

        It may divide them where they lie: the next step's first row has a gradient for every trained weight.
        """
        zero = self._zero
        for p in zero.fp16_groups[sub_group_id]:
            if not p.requires_grad:  # any more
                self._sums[p.ds_id].zero_()
        master = zero.fp32_partitioned_groups_flat[sub_group_id]
        master.grad = pieces[sub_group_id].to(master.dtype)
        zero.averaged_gradients[sub_group_id] = None
