"""One padding-free row through the model, as ONE module: vision tower, scatter, language model, head, loss.

One module, because DDP, DeepSpeed and FSDP hook the forward of what they wrap: a tower called from outside would be
sharded or reduced wrongly. Nothing here knows a strategy.

T tokens of a row, B samples, P patches, I images, M = P / 4 image tokens, D width, V vocabulary, S supervised tokens.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlft.family import Parts
from vlft.grids import BLANK, Layout, TowerInputs, tower_inputs
from vlft.models import kernels
from vlft.models.attention import use_packed_attention
from vlft.optim import master_dtype

IGNORE = -100


def base_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """From page-locked memory: CUDA copies anything else only once all work before it is done, and the host waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def layout_of(tower: nn.Module) -> Layout:
    """How the tower divides pictures."""
    found: Any = tower
    # Another way of interpolation than that of `tower_inputs` is left to the tower.
    plain = getattr(found, "interpolation_mode", "") == "bilinear" and found.interpolation_align_corners
    return Layout(
        merge=int(found.config.spatial_merge_size), patch=int(found.config.patch_size),
        window=int(found.window_size) if hasattr(found, "window_size") else 0,
        table=int(found.num_grid_per_side) if plain else 0,
    )  # fmt: skip


class PackedVLM(nn.Module):
    """Wraps what a strategy prepared and computes the loss of one row."""

    def __init__(self, model: nn.Module, parts: Parts, image_token_id: int, *, reference: bool = False) -> None:
        """
        Args:
            reference: leave transformers' own forwards, and PyTorch's loss, as they are (attention is packed all the
                same).
        """
        super().__init__()
        self.model = model
        self.parts = parts
        self.image_token_id = image_token_id
        hf = self.hf
        self.has_deepstack = any("deepstack" in path for path in parts.projector)
        self.patch_dim = self._patch_dim(hf.config.vision_config)
        self.layout = layout_of(hf.get_submodule(parts.vit))
        use_packed_attention(hf)
        self.reference = reference
        self.installed = kernels.Installed() if reference else kernels.install(hf, parts)
        self.memory: kernels.Memory | None = None
        """What layers keep for their backward pass; None: all."""
        levels = len(getattr(hf.config.vision_config, "deepstack_visual_indexes", None) or ())
        # Where a feature level is added behind the last layer, its tokens must still be at their places.
        self.may_read_rows = levels < len(hf.get_submodule(parts.layers))
        self._gradients: torch.dtype | None = None
        self._lying: kernels.Lying | None = None
        self._of_tower: list[dict[str, nn.Parameter | None]] = []

    @property
    def hf(self) -> Any:
        """The Hugging Face model inside what a strategy prepared."""
        return base_model(self.model)

    @property
    def reads_rows(self) -> bool:
        """The last layer returns the learnt tokens alone."""
        return self.may_read_rows and self.installed.reads_rows

    def settle(self) -> None:
        """Before the first forward, when whoever wanted to put hooks on the model has done so; and as adapters come."""
        self._lying = kernels.Lying([self._part(self.parts.vit), self._part(self.parts.llm)])
        self._of_tower = [module._parameters for module in self._part(self.parts.vit).modules()]
        late = self.installed.settle()
        if self.memory is not None:
            self.memory.leave(late)
        if not late:
            return
        for layer in late:
            # Where Hugging Face's checkpointing was switched on for such layers (`vlft.setup.remember`).
            layer.gradient_checkpointing = hasattr(layer, "_gradient_checkpointing_func")  # type: ignore[assignment]
            for p in layer.parameters():
                if p.grad is None:  # as in every step whose gradients are narrow, before its only row
                    p.grad_dtype = master_dtype(p)
        reasons = "; ".join(self.installed.left)
        warnings.warn(f"{len(late)} layers keep transformers' forward after all: {reasons}.", stacklevel=2)

    def split_masters(self) -> None:
        """Have the layers' fp32 weights in bf16 with a remainder (`vlft.optim.remainder`), before the first forward.

        They are of use to products in bf16 alone, and to an optimizer that knows of remainders.
        """
        self.installed.split_masters()

    def narrow_gradients(self, kind: torch.dtype | None) -> None:
        """Have the layers' large gradients in `kind`, or in their masters' dtype; before a step's first row.

        In the compute dtype they are what autocast's own backward gives, which widens them without need where no
        second row's is added: half the memory, and half of what the optimizer reads.
        """
        if kind == self._gradients:
            return
        self.installed.narrow_gradients(kind)
        self._gradients = kind
        if self.memory is not None:
            self.memory.look_again()

    def _tower_learns(self) -> bool:
        # `parameters()` of a frozen tower takes a millisecond, in which the device waits.
        return any(p is not None and p.requires_grad for some in self._of_tower for p in some.values())

    def said(self) -> str:
        """One line for the start of a run: what runs faster, and what is computed again."""
        return f"{self.installed}; {self.memory}." if self.memory else f"{self.installed}."

    @staticmethod
    def _patch_dim(vision: Any) -> int:
        return int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)

    def _part(self, path: str) -> Any:
        return base_model(self.model).get_submodule(path)

    def _see(
        self,
        pixel_values: Tensor | None,
        grids_I3: npt.NDArray[np.int64],
        inputs: TowerInputs | None,
        like: Tensor,
    ) -> tuple[Tensor, list[Tensor], bool]:
        """(M, D) features, the deepstack levels' features, and whether they belong to a real picture.

        A row without pictures runs the tower on a blank of one merged patch: under ZeRO-3, FSDP and DDP every rank
        must call every module, and AdamW decays on a zero gradient but skips a missing one.
        """
        real = pixel_values is not None and len(grids_I3) > 0
        tower = self._part(self.parts.vit)
        if not real:
            pixel_values = torch.zeros(4, self.patch_dim, device=like.device)
        assert pixel_values is not None
        dtype = like.dtype if like.is_floating_point() else torch.float32
        if inputs is None or inputs.layout != self.layout:
            inputs = tower_inputs(grids_I3 if real else BLANK, self.layout).map(lambda x: to_device(x, like.device))
        # A frozen tower keeps nothing for a backward pass, also where something (Hugging Face's checkpointing, PEFT)
        # has asked that its input have a gradient: that would double its time and take most of a row's memory.
        learns = torch.is_grad_enabled() and self._tower_learns()
        with torch.set_grad_enabled(learns):
            out = tower(pixel_values.to(dtype), return_dict=True, **inputs.arguments)
        levels = list(out.deepstack_features or []) if self.has_deepstack else []
        return out.pooler_output, levels, real

    def _embed(
        self,
        input_ids_T: Tensor,
        pixel_values: Tensor | None,
        grids_I3: npt.NDArray[np.int64],
        pictured_M: Tensor | None,
        tower: TowerInputs | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        embeds = self._part(self.parts.embed)(input_ids_T)
        if torch.is_autocast_enabled(embeds.device.type):
            # fp32 masters would otherwise keep the whole residual stream in fp32, twice the memory and traffic.
            embeds = embeds.to(torch.get_autocast_dtype(embeds.device.type))
        features, levels, real = self._see(pixel_values, grids_I3, tower, embeds)
        features, levels = features.to(embeds.dtype), [x.to(embeds.dtype) for x in levels]
        if real:
            if pictured_M is None:
                pictured_M = (input_ids_T[0] == self.image_token_id).nonzero()[:, 0]
            embeds = embeds.index_copy(1, pictured_M, features.unsqueeze(0))
        else:
            # Into the embeddings, never into the loss: layer 0's input must have a gradient on every rank alike, or
            # sharded engines gather in different orders and hang.
            blank = features.sum() + sum(x.sum() for x in levels)
            embeds = embeds + 0.0 * blank
            levels = []
        if not levels:
            return embeds, {}
        return embeds, {"visual_pos_masks": input_ids_T == self.image_token_id, "deepstack_visual_embeds": levels}

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_4T: Tensor,
        labels_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values: Tensor | None,
        image_grid_thw: npt.ArrayLike,
        supervised_S: Tensor | None = None,
        pictured_M: Tensor | None = None,
        tower: TowerInputs | None = None,
    ) -> Tensor:
        """Cross entropy of every supervised token of the row.

        Args:
            input_ids_T: (1, T) int64, samples end to end.
            position_ids_4T: (4, 1, T) int64: row 0 restarts in each sample, rows 1-3 are M-RoPE. The (3, 1, T) form
                would leak across samples.
            labels_T: (1, T) int64, already shifted within each sample; -100 where nothing is learnt.
            cu_seqlens: (B + 1,) int32 sample borders.
            max_seqlen: an upper bound of the samples' lengths.
            pixel_values: (P, channels * temporal * patch * patch) float, or None.
            image_grid_thw: (I, 3) int64, for Python code: an array, or a tensor on the CPU where nothing moves it.
                FSDP2 brings tensors to the device, and the host would wait for all that it was asked for before.
            supervised_S: int64 places of the labels that are not -100.
            pictured_M: int64 places of the image tokens. Without these two they are searched for, which waits for the
                device.
            tower: what the vision tower is told of the pictures, on the device. Without it, or where it was made for
                another tower, it is worked out here.
        Returns:
            (S,) losses in fp32 (fp64 for fp64 weights), in the order of the tokens. S may be 0; the result still
            carries a (zero) gradient to every trainable weight.
        """
        if self._lying is None or not self._lying.same():
            self.settle()
        if supervised_S is None:
            supervised_S = (labels_T[0] != IGNORE).nonzero()[:, 0]
        grids_I3 = np.asarray(image_grid_thw)
        kind = kernels.compute_dtype(self._part(self.parts.embed).weight)
        self.installed.before_row(kind, input_ids_T.device)
        if self.memory is not None and torch.is_grad_enabled():
            longest = int(grids_I3[:, 1:].prod(1).max()) if len(grids_I3) else 4
            patches = 4 if pixel_values is None else len(pixel_values)
            self.memory.before_row(patches, longest, input_ids_T.shape[1], max_seqlen, len(supervised_S), kind)
        embeds, extra = self._embed(input_ids_T, pixel_values, grids_I3, pictured_M, tower)
        if self.reads_rows:
            extra["read_S"] = supervised_S
        hidden = self._part(self.parts.llm)(
            inputs_embeds=embeds,
            position_ids=position_ids_4T,
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen,
            max_length_k=max_seqlen,
            return_dict=True,
            **extra,
        ).last_hidden_state[0]
        hidden_SD = hidden if self.reads_rows else hidden[supervised_S]
        logits_SV = self._part(self.parts.head)(hidden_SD)
        labels_S = labels_T[0, supervised_S]
        if not self.reference:
            return kernels.cross_entropy(logits_SV, labels_S)
        logits_SV = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
        return F.cross_entropy(logits_SV, labels_S, reduction="none")
