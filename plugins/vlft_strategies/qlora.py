"""QLoRA (Dettmers et al. 2023): the LLM's linear layers in NF4 with adapters; ViT, projector and head stay whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft import ModelSource, VlftError
from vlft_strategies.lora import Lora

if TYPE_CHECKING:
    from torch import nn


class QLora(Lora):
    """Adapters on a 4-bit LLM. `--train_vit` trains ViT and projector in full precision beside it."""

    def prepare_model(self, source: ModelSource) -> nn.Module:
        try:
            import bitsandbytes  # noqa: F401  (asked early, for an error that says how to install it)
        except ImportError as error:
            raise VlftError("qlora needs bitsandbytes: pip install 'vlft[qlora]'.") from error
        from transformers import BitsAndBytesConfig

        self.source = source
        parts = source.parts
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=source.compute_dtype,
            bnb_4bit_quant_storage=source.quant_storage,
            # Real module paths. transformers 5 matches from the start of the name, so "visual" alone would skip
            # nothing, quantise the whole tower and freeze it in silence; and a list given replaces the default
            # that protects the head.
            llm_int8_skip_modules=[parts.vit, parts.head, parts.embed],
        )
        model = source.load(quantization_config=quantisation)
        self._check_quantised(model)
        return self.adapt(model)

    def _check_quantised(self, model: nn.Module) -> None:
        from bitsandbytes.nn import Linear4bit
        from torch import nn

        layers = self.source.parts.layers
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and isinstance(module, Linear4bit) != name.startswith(layers + "."):
                state = "quantised" if isinstance(module, Linear4bit) else "not quantised"
                raise VlftError(f"'{name}' is {state}; qlora quantises exactly the linear layers of {layers}.")
