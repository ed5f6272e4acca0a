"""From a checkpoint's name to what the rest of vlft needs of it: folder, family, picture facts, and a `ModelSource`.

Only this file calls `from_pretrained`. Everything is read from a local folder; a hub name is fetched to one first.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlft.errors import ModelError
from vlft.family import Family, Parts, family_of
from vlft.grids import Layout

META = "vlft.json"
"""Beside a result: what merging it needs to know."""
WANTED_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.tiktoken", "README.md")


def resolve_folder(name: str, *, trust_remote_code: bool = False, weights: bool = True) -> Path:
    """The local folder of a checkpoint: `name` itself, or the hub's snapshot of it, with its code only if trusted.

    Args:
        weights: False: fetch what describes the model, and not the gigabytes.
    Raises:
        ModelError: neither a folder nor a repository that can be reached.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download

    wanted = [*WANTED_FILES, *(["*.py"] if trust_remote_code else [])]
    wanted = [pattern for pattern in wanted if weights or pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # of whichever HTTP library the client uses
        # The word may be a misspelt path as well as a name of the hub.
        raise ModelError(f"there is no folder {name} here, and {_refusal(error)}, or give a local folder.") from error


def _refusal(error: Exception) -> str:
    """What the hub said, and what to do; the client's own texts are half a page each."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    # Nor is it in the cache: why it was not fetched says more.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    if isinstance(cause, HFValidationError):
        return "it is no name of the hub (owner/name); correct it"
    if isinstance(cause, OfflineModeIsEnabled):
        return "the hub was not asked (HF_HUB_OFFLINE is set); unset it"
    if isinstance(cause, HfHubHTTPError):
        code, advice = cause.response.status_code, "try again"
        if code in (401, 403, 404):
            advice = "check the name, or accept its terms there and log in with 'hf auth login'"
        return f"the hub did not give it (it answered {code}); {advice}"
    if type(cause).__module__.startswith("httpx"):  # or httpx2, by the client's version
        return "the hub could not be reached (no connection); check the name and the network"
    return f"the hub did not give it ({_short(error)}); mend that"


def _short(error: Exception) -> str:
    """A library's error on one line; some are a page."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."


def read_json(path: Path) -> dict[str, Any]:
    """One object from a file of a model folder.

    Raises:
        ModelError: the file is absent, broken, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {_short(error)}; copy it again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__} where an object was expected; copy it again.")
    return found


@dataclass(frozen=True)
class PictureFacts:
    """How this checkpoint turns pictures into patches, from its preprocessor_config.json."""

    layout: Layout
    temporal_patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float
    min_pixels: int
    """Smallest picture area that the checkpoint's processor allows, in pixels."""
    max_pixels: int
    """Largest one."""

    @property
    def patch_size(self) -> int:
        return self.layout.patch

    @property
    def merge_size(self) -> int:
        return self.layout.merge


@dataclass(frozen=True)
class Checkpoint:
    name: str
    """As the user gave it: what an adapter's base is called."""
    folder: Path
    family: Family
    pictures: PictureFacts
    trust_remote_code: bool = False
    adapter: dict[str, Any] | None = field(default=None, repr=False)
    """adapter_config.json, where the folder is the adapter of an earlier run."""

    @property
    def is_adapter(self) -> bool:
        return self.adapter is not None


def processor_settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings: preprocessor_config.json, or its section in transformers 5's processor file."""
    if (folder / "preprocessor_config.json").exists():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").exists():
        nested = read_json(folder / "processor_config.json").get("image_processor")
        if isinstance(nested, dict):
            return nested
    raise ModelError(f"{folder} has no preprocessor_config.json: copy the checkpoint's processor files beside it.")


def _layout(family: Family, vision: dict[str, Any]) -> Layout:
    # A tower that has windows has them whatever else its section names, and one without ignores the key.
    window = int(vision.get("window_size", family.window_pixels)) if family.window_pixels else 0
    learnt = int(vision.get("num_position_embeddings", family.learnt_positions)) if family.learnt_positions else 0
    patch, merge = int(vision.get("patch_size", 14)), int(vision.get("spatial_merge_size", 2))
    return Layout(merge, patch, window, math.isqrt(learnt))


def _picture_facts(folder: Path, family: Family, vision: dict[str, Any]) -> PictureFacts:
    found = processor_settings(folder)
    layout = _layout(family, vision)
    smallest, largest = _limits(found, layout.factor)
    return PictureFacts(
        layout=layout,
        temporal_patch_size=int(vision.get("temporal_patch_size", 2)),
        mean=tuple(found.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
        std=tuple(found.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        rescale_factor=float(found.get("rescale_factor", 1 / 255)),
        min_pixels=int(smallest),
        max_pixels=int(largest),
    )


def picture_facts(checkpoint: Checkpoint) -> PictureFacts:
    """Those of the folder itself: the result of a run has the limits that it was trained with, its base may not."""
    if checkpoint.adapter is None or not any((checkpoint.folder / name).exists() for name in _PROCESSOR_FILES):
        return checkpoint.pictures
    facts, own = checkpoint.pictures, _limits(processor_settings(checkpoint.folder), checkpoint.pictures.layout.factor)
    return replace(facts, min_pixels=own[0], max_pixels=own[1])


_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def pixel_limits(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Smallest and largest picture area that image processor settings name, as written; None for what they do not."""
    size = settings.get("size") or {}
    low = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    return low, settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")


def _limits(settings: dict[str, Any], factor: int) -> tuple[int, int]:
    """The same in pixels, with the defaults of transformers' processor."""
    low, high = pixel_limits(settings)
    return int(low or 4 * factor**2), int(high or 16384 * factor**2)


def _base_folder(path: Path, adapter: dict[str, Any], trust_remote_code: bool, weights: bool) -> Path:
    """The folder of the model that an adapter was trained on."""
    base = adapter.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(f"{path} has no base_model_name_or_path; give the model that the adapter was trained on.")
    try:
        return resolve_folder(base, trust_remote_code=trust_remote_code, weights=weights)
    except ModelError as error:
        raise ModelError(f"base_model_name_or_path of {path}: {error}") from error


def open_checkpoint(name: str, *, trust_remote_code: bool = False, weights: bool = True) -> Checkpoint:
    """Find and read a checkpoint's description; no weights are loaded.

    Args:
        weights: False: they are not fetched from the hub either.
    Raises:
        ModelError: absent, unreadable, or of a type that vlft does not support.
    """
    folder = resolve_folder(name, trust_remote_code=trust_remote_code, weights=weights)
    adapter = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").exists() else None
    if adapter is None and (folder / META).exists() and "exported_from" in (meta := read_json(folder / META)):
        adapter = {"base_model_name_or_path": meta["exported_from"]}  # a strategy with a format of its own
    where = folder
    if adapter:
        where = _base_folder(folder / "adapter_config.json", adapter, trust_remote_code, weights)
    if not (where / "config.json").exists():
        raise ModelError(f"{where} has no config.json, so it is not a model folder; give output_dir/model of a run.")
    config = read_json(where / "config.json")
    family = family_of(str(config.get("model_type")), str(where))
    try:
        facts = _picture_facts(where, family, config.get("vision_config") or {})
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"the picture settings of {where} (vision_config in config.json, preprocessor_config.json) cannot be used: "
            f"{_short(error)}; copy these files again."
        ) from error
    return Checkpoint(name, folder, family, facts, trust_remote_code, adapter)


def load_config(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    except Exception as error:  # a config.json of nonsense fails anywhere inside
        raise ModelError(
            f"{checkpoint.folder / 'config.json'} cannot be used: {_short(error)}; copy it again."
        ) from error


def weights_dtype(config: Any) -> torch.dtype:
    """The dtype in which the checkpoint stores its weights (fp32 where it does not say)."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found


def compute_dtype(mixed_precision: str, config: Any) -> torch.dtype:
    """The dtype of products. With "no": fp32, or fp64 for an fp64 checkpoint, never less."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return named.get(mixed_precision) or torch.promote_types(weights_dtype(config), torch.float32)


@dataclass(frozen=True)
class Source:
    """The `ModelSource` that strategies load from."""

    checkpoint: Checkpoint
    config: Any
    compute_dtype: torch.dtype
    device: torch.device
    sharded: bool = False
    """Each process keeps a part of every weight; under ZeRO-3 weights are cut up while they are loaded."""
    packed_too: bool = False
    """Of packed 4-bit weights, too, which must then be stored as floats."""

    @property
    def parts(self) -> Parts:
        return self.checkpoint.family.parts

    @property
    def tied_head(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    @property
    def quant_storage(self) -> torch.dtype:
        return self.compute_dtype if self.packed_too else torch.uint8

    def load(self, **overrides: Any) -> nn.Module:
        """The Hugging Face model in the checkpoint's dtype; `cast` (below) gives each weight its own afterwards."""
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        folder, trust = self.checkpoint.folder, self.checkpoint.trust_remote_code
        if self.sharded and "quantization_config" in overrides:
            # Packed weights cannot be cut up while they are made: whole first, cut up by the engine afterwards.
            with without_zero3():
                return load_hf(folder, self.device, trust, **overrides)
        where = {"dtype": self.compute_dtype, "device_map": None} if self.sharded else {}
        model = load_hf(folder, self.device, trust, **where | overrides)
        if is_deepspeed_zero3_enabled():
            _make_buffers_anew(model)
        return model


def load_hf(folder: Path, device: torch.device | str, trust_remote_code: bool = False, **overrides: Any) -> nn.Module:
    """A plain Hugging Face model from a local folder.

    Raises:
        ModelError: the weights cannot be loaded, or not all of them are there; the cause is kept.
    """
    check_files(folder)
    quieten()
    from transformers import AutoModelForImageTextToText

    options: dict[str, Any] = {"dtype": "auto", "attn_implementation": "sdpa", "device_map": {"": str(device)}}
    options |= {"trust_remote_code": trust_remote_code, "local_files_only": True, "use_safetensors": True} | overrides
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(folder, **options)
    except torch.OutOfMemoryError:
        raise  # the files are as they should be
    except Exception as error:  # broken files raise SafetensorError, KeyError, UnpicklingError and more
        raise ModelError(f"the model in {folder} cannot be loaded: {_short(error)}; copy its files again.") from error
    _check_complete(folder, info)
    assert isinstance(model, nn.Module)
    _keep_packing(model)
    return model


def check_files(folder: Path) -> None:
    """A model folder may come from anyone: weights are read from its safetensors files alone, and it brings no code.

    transformers would read pickles, load an adapter that lies beside the model, and fetch a kernel that config.json
    names even where another attention is asked for.

    Raises:
        ModelError: what is found instead.
    """
    config = read_json(folder / "config.json")
    for section in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in ("_attn_implementation", "attn_implementation"):
            if "/" in str(section.get(key)):
                raise ModelError(
                    f"{folder / 'config.json'} asks for the kernel '{section[key]}', which is code from the hub; "
                    f"remove '{key}' there."
                )
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter beside its model; merge it, or move its files to their own folder."
        )
    indices = sorted(folder.glob("*.safetensors.index.json"))
    named = [(path, name) for path in indices for name in _weight_files(read_json(path))]
    if "transformers_weights" in config:
        named.append((folder / "config.json", config["transformers_weights"]))
    for path, name in named:
        inside = isinstance(name, str) and Path(name).name == name
        if not inside or not name.endswith((".safetensors", ".safetensors.index.json")):
            raise ModelError(f"{path} names {name} for weights, which is no safetensors file of {folder}; correct it.")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if not pickles:
            raise ModelError(f"{folder} has no weights in safetensors; copy them.")
        raise ModelError(
            f"{folder} has no weights in safetensors, only {pickles[0]}, which could run code when it is read; if you "
            "trust it, load it with transformers and write it again with save_pretrained."
        )


def _weight_files(index: Mapping[str, Any]) -> set[Any]:
    names = index.get("weight_map")
    return set(names.values()) if isinstance(names, dict) else set()


def _check_complete(folder: Path, info: Mapping[str, Any]) -> None:
    """transformers gives a weight that is absent, or of another shape, random numbers and only warns."""
    absent = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ModelError(
            f"the model in {folder} has no weights for {', '.join(absent[:3])}{more} (absent, or of another shape than "
            "config.json says); copy its files again."
        )


# Before a strategy or PEFT imports bitsandbytes or DeepSpeed: one would warn of an optional kernel, one of no GPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def quieten() -> None:
    """Libraries' notes that a user can do nothing about, as a progress bar a second long."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # It tells that 4-bit weights are made whole, which a merge asks for.
    logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def _keep_packing(model: nn.Module) -> None:
    """On CPUs with bf16 instructions bitsandbytes repacks 4-bit weights in place at the first forward in eval mode.

    From then on the layer computes in bf16 and passes no gradient, also back in training: an evaluation in the middle
    of a run would cut the LLM off in silence.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _make_buffers_anew(model: Any) -> None:
    """What a model works out while it is built, as without ZeRO-3.

    There DeepSpeed puts every number of it into the compute dtype, not its weights alone: the frequencies of rotary
    embeddings in bf16 are wrong by up to 1.2 radians for the token at 1,000. transformers keeps them from it in some
    versions only (not in 5.17).
    """
    from accelerate import init_empty_weights

    with without_zero3(), init_empty_weights(include_buffers=False):
        made = dict(type(model)._from_config(model.config).named_buffers(remove_duplicate=False))
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in saved and name in made:
            buffer.data = made[name].to(buffer.device)


@contextmanager
def without_zero3() -> Iterator[None]:
    """Inside, transformers loads as if ZeRO-3 were off: whole models."""
    from transformers.integrations import deepspeed as hf

    before = hf._hf_deepspeed_config_weak_ref
    hf.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf._hf_deepspeed_config_weak_ref = before


def source_of(
    checkpoint: Checkpoint,
    mixed_precision: str,
    device: torch.device,
    *,
    sharded: bool = False,
    packed_too: bool = False,
) -> Source:
    config = load_config(checkpoint)
    return Source(checkpoint, config, compute_dtype(mixed_precision, config), device, sharded, packed_too)


def cast(model: nn.Module, dtype: torch.dtype, *, masters: bool = True) -> None:
    """Trainable weights become fp32 masters (fp64 stays), frozen ones take the compute dtype; packed 4-bit stays.

    Args:
        masters: False where the engine keeps fp32 masters of its own, so that all weights take the compute dtype.

    An Adam step at rate 2e-5 leaves 70% of bf16 weights of scale 0.02 unchanged: hence the masters.
    """
    for p in model.parameters():
        # What ZeRO-3 has cut up was cut in its final dtype; packed 4-bit may be stored as floats, but holds no numbers.
        if p.is_floating_point() and not hasattr(p, "ds_id") and not hasattr(p, "quant_state"):
            target = torch.promote_types(p.dtype, torch.float32) if p.requires_grad and masters else dtype
            if p.dtype != target:
                p.data = p.data.to(target)


def is_quantised(module: nn.Module) -> bool:
    """By type, not by name: a linear layer whose weight is packed 4-bit or 8-bit."""
    return any(base.__name__ in ("Linear4bit", "Linear8bitLt") for base in type(module).__mro__)
