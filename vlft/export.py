"""The result of a run as a Hugging Face folder, and merging an adapter into a whole model.

Two kinds of result are known here. A plain model is saved whole. A PEFT model is saved as its adapter PLUS every other
trained module in PEFT's `modules_to_save` layout, made at save time only: PEFT's own `save_pretrained` drops an
unfrozen tower in silence, and loading then returns base vision weights. A strategy with another format implements
`vlft.Exporter`.

    model/
        config.json + model*.safetensors               a plain model, or
        adapter_config.json + adapter_model.safetensors
        tokenizer and processor files                  the checkpoint's own, with the training pixel limits
        vlft.json                                      what merging needs to know
        README.md                                      the model card
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vlft import card
from vlft.discovery import load_strategy
from vlft.errors import ModelError, StrategyError, VlftError
from vlft.models.forward import base_model
from vlft.models.load import (
    META,
    Checkpoint,
    Source,
    load_hf,
    open_checkpoint,
    read_json,
    resolve_folder,
    weights_dtype,
)
from vlft.strategy import Exporter, Strategy

PEFT_PREFIX = "base_model.model."
SHARD = "5GB"
"""Largest file of a whole model, as most published ones."""
_CARRIED = (
    "tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "chat_template*", "preprocessor_config*",
    "processor_config*", "video_preprocessor_config*", "generation_config*",
)  # fmt: skip


def _with_limits(settings: dict[str, Any], min_pixels: int, max_pixels: int) -> dict[str, Any]:
    settings = dict(settings)
    for key, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if key in settings:
            settings[key] = value
    settings["size"] = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return settings


def carry_processor(source: Path, target: Path, min_pixels: int, max_pixels: int) -> None:
    """Copy the checkpoint's tokenizer and processor files, changing only the pixel limits of pictures.

    Inference must resize pictures as training did, or boxes and fine print no longer agree.
    """
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = target / name
        if not path.exists():
            continue
        whole = json.loads(path.read_text())
        if section is None:
            whole = _with_limits(whole, min_pixels, max_pixels)
        elif isinstance(whole.get(section), dict):
            whole[section] = _with_limits(whole[section], min_pixels, max_pixels)
        path.write_text(json.dumps(whole, indent=2))


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def modules_to_save(model: nn.Module, trained: Collection[str], whole_parts: tuple[str, ...]) -> list[str]:
    """Paths, inside the base model, of the fewest modules that hold all trained weights outside adapters.

    A part all of whose weights train is one module; otherwise each trained weight's own module.

    Raises:
        ModelError: a layer's own weight trains beside its adapter, which this layout cannot hold.
    """
    base = base_model(model)
    adapter = str(getattr(model, "active_adapter", "default"))
    loose = {n.removeprefix(PEFT_PREFIX) for n in trained if adapter not in n.split(".")}
    if inside := sorted(n for n in loose if ".base_layer." in n):
        raise ModelError(
            f"'{inside[0]}' trains beside its own adapter; only a strategy with an Exporter can save that."
        )
    chosen: list[str] = []
    for path in whole_parts:
        module = base.get_submodule(path)
        held = {f"{path}.{n}" for n, _ in module.named_parameters()}
        if held and held <= loose:
            # PEFT refuses to wrap a list of modules; its items it takes.
            chosen += [f"{path}.{i}" for i in range(len(module))] if isinstance(module, nn.ModuleList) else [path]
            loose -= held
    return chosen + sorted({_owner(n) for n in loose})


def needed(strategy: Strategy, model: nn.Module, source: Source) -> set[str]:
    """Names of the parameters that `save_result` reads: where weights are sharded, these must be gathered."""
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    if isinstance(strategy, Exporter):
        return trained
    if not hasattr(model, "peft_config"):
        return {n for n, _ in model.named_parameters()}
    modules = modules_to_save(model, trained, (source.parts.vit, *source.parts.projector))
    held = {f"{PEFT_PREFIX}{m}.{n}" for m in modules for n, _ in base_model(model).get_submodule(m).named_parameters()}
    return trained | held


def _save_adapter(model: Any, source: Source, whole: Mapping[str, Tensor], folder: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    parts = source.parts
    trained = {n: whole[n] for n, p in model.named_parameters() if p.requires_grad}
    modules = modules_to_save(model, trained.keys(), (parts.vit, *parts.projector))
    tensors = dict(get_peft_model_state_dict(model, state_dict=dict(trained), save_embedding_layers=False))
    dtype, base = weights_dtype(source.config), base_model(model)
    for path in modules:
        for name, _ in base.get_submodule(path).named_parameters():
            tensors[f"{PEFT_PREFIX}{path}.{name}"] = whole[f"{PEFT_PREFIX}{path}.{name}"].to(dtype)
    config = model.peft_config[model.active_adapter]
    written = config.to_dict() | {
        "base_model_name_or_path": _base_name(source),
        "modules_to_save": modules or None,
        "inference_mode": True,
    }
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in written.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, default=str))
    save_file(
        {k: v.cpu().contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
    )


def _base_name(source: Source) -> str:
    name = source.checkpoint.name
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _save_plain(model: Any, source: Source, whole: Mapping[str, Tensor], folder: Path) -> None:
    dtype = weights_dtype(source.config)
    first = {id(p): n for n, p in model.named_parameters()}
    state = {n: whole[first[id(p)]].to(dtype) for n, p in model.named_parameters(remove_duplicate=False)}
    state |= {n: b for n, b in model.state_dict().items() if n not in state}
    model.config.dtype = dtype
    model.save_pretrained(folder, state_dict=state)
    config = read_json(folder / "config.json")  # transformers has put the masters' dtype there
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2))
    _add_older_names(folder / "config.json")


def _add_older_names(path: Path) -> None:
    """Say the rotary embedding's settings by transformers 4's names, too.

    transformers 5 writes `rope_parameters` only. vLLM on transformers 4 and llama.cpp's converter look for
    `rope_scaling` with its `mrope_section`; without it they would take plain positions, or stop. transformers 5 reads
    both as one.
    """
    whole = json.loads(path.read_text())
    text = whole.get("text_config", {})
    if isinstance(settings := text.get("rope_parameters"), dict) and "rope_theta" in settings:
        text["rope_theta"] = settings["rope_theta"]
        text["rope_scaling"] = {key: value for key, value in settings.items() if key != "rope_theta"}
        path.write_text(json.dumps(whole, indent=2) + "\n")


def save_result(
    strategy: Strategy,
    model: nn.Module,
    source: Source,
    whole: Mapping[str, Tensor],
    folder: Path,
    *,
    min_pixels: int,
    max_pixels: int,
    facts: Mapping[str, Any],
) -> None:
    """Write the result of a run; call on one process.

    Args:
        model: what the strategy prepared.
        whole: the parameters that `needed` names, by their names in `model`, whole.
        facts: written to vlft.json beside what merging needs.
    """
    with _replacing(folder) as beside:
        if isinstance(strategy, Exporter):
            strategy.export(model, dict(whole), beside)
        elif hasattr(model, "peft_config"):
            _save_adapter(model, source, whole, beside)
        else:
            _save_plain(model, source, whole, beside)
        carry_processor(source.checkpoint.folder, beside, min_pixels, max_pixels)
        quantised = getattr(base_model(model), "hf_quantizer", None)
        config = quantised.quantization_config.to_dict() if quantised is not None else None
        meta = {"quantization": config, **facts}
        if isinstance(strategy, Exporter):
            meta["exported_from"] = _base_name(source)
        (beside / META).write_text(json.dumps(meta, indent=2, default=str))
        card.write(beside, card.title(folder))


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end: whole or not there, whatever ends the process.

    Raises:
        ModelError: it cannot be written.
    """
    beside, old = (folder.with_name(f".{word}-{folder.name}") for word in ("writing", "old"))
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except VlftError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise ModelError(
            f"{folder} could not be written: {error}; free some space and try again (a run goes on with "
            "--resume_from_checkpoint latest, its checkpoints are whole)."
        ) from error


def _bits_and_bytes(settings: dict[str, Any]) -> Any:
    from transformers import BitsAndBytesConfig

    kept = {k: v for k, v in settings.items() if k.startswith(("load_in_4bit", "bnb_4bit", "llm_int8_skip"))}
    return BitsAndBytesConfig(**kept)


def _quantised_base(folder: Path, settings: dict[str, Any], device: str) -> nn.Module:
    """The base as training saw it: quantised to NF4 and back."""
    model: Any = load_hf(folder, device, quantization_config=_bits_and_bytes(settings))
    dtype = weights_dtype(model.config)
    whole = model.dequantize()
    assert isinstance(whole, nn.Module)
    return whole.to(dtype)


def _meta(folder: Path) -> dict[str, Any]:
    """vlft.json of a result; empty for an adapter that vlft did not write."""
    return read_json(folder / META) if (folder / META).exists() else {}


def _merged_by_plugin(folder: Path, meta: Mapping[str, Any]) -> nn.Module:
    """What a strategy with a format of its own makes of its result."""
    cls, found = load_strategy(str(meta["strategy"]))
    strategy = cls(cls.Config(**meta["options"]))  # type: ignore[call-arg]  # a protocol says nothing of constructors
    if not isinstance(strategy, Exporter):
        raise ModelError(
            f"{folder} was written by {meta['distribution']}; {found.source} cannot merge it: install that."
        )
    try:
        return strategy.merge(folder, str(resolve_folder(str(meta["exported_from"]))))
    except VlftError:
        raise
    except Exception as error:  # a plugin may raise anything
        raise StrategyError(
            f"strategy '{meta['strategy']}' of {found.source} failed to merge {folder}: {type(error).__name__}: "
            f"{error}; ask its authors."
        ) from error


def merged(folder: Path, base: Literal["trained", "original"] = "trained", device: str = "cpu") -> nn.Module:
    """A whole plain model from an adapter folder.

    Args:
        base: "trained" merges onto the weights that training saw (dequantised NF4 for a quantised base, so logits
            agree); "original" merges onto the unquantised checkpoint, whose logits differ by the quantisation error.
    Raises:
        ModelError: the folder holds no adapter, or the base cannot be loaded.
    """
    checkpoint = open_checkpoint(str(folder))
    if checkpoint.adapter is None:
        raise ModelError(f"{folder} is already a whole model: there is nothing to merge, use it as it is.")
    meta = _meta(folder)
    if "exported_from" in meta:
        return _merged_by_plugin(folder, meta)
    where = _base_of(checkpoint)
    quantisation = meta.get("quantization")
    if quantisation and base == "trained":
        model = _quantised_base(where, quantisation, device)
    else:
        model = load_hf(where, device)
    whole = _attached(model, folder, device).merge_and_unload(safe_merge=True)
    assert isinstance(whole, nn.Module)
    return whole


def whole_model(checkpoint: Checkpoint, device: str, base: Literal["trained", "original"] = "trained") -> nn.Module:
    """A plain model, whatever the folder holds: an adapter is merged.

    Raises:
        ModelError: it cannot be loaded or merged.
    """
    if checkpoint.is_adapter:
        return merged(checkpoint.folder, base, device)
    return load_hf(checkpoint.folder, device, checkpoint.trust_remote_code)


def reloaded(folder: Path, device: str = "cpu") -> nn.Module | None:
    """A result as its user loads it, through transformers and PEFT: on the quantised base if it was trained on one.

    None for the result of a strategy with a format of its own.

    Raises:
        ModelError: it cannot be loaded.
    """
    checkpoint = open_checkpoint(str(folder))
    meta = _meta(folder)
    if "exported_from" in meta:
        return None
    if checkpoint.adapter is None:
        return load_hf(folder, device)
    where, quantisation = _base_of(checkpoint), meta.get("quantization")
    options = {"quantization_config": _bits_and_bytes(quantisation)} if quantisation else {}
    whole = _attached(load_hf(where, device, **options), folder, device)
    assert isinstance(whole, nn.Module)
    return whole


def _base_of(checkpoint: Checkpoint) -> Path:
    """Folder of the model that an adapter belongs to, after a look at the adapter's own weights."""
    assert checkpoint.adapter is not None
    if not (checkpoint.folder / "adapter_model.safetensors").exists():
        # PEFT would read a pickle instead, or look for the folder's name at the hub.
        raise ModelError(
            f"{checkpoint.folder} has no adapter_model.safetensors; pickles (adapter_model.bin) are not read: copy it."
        )
    return resolve_folder(str(checkpoint.adapter["base_model_name_or_path"]))


def _attached(model: nn.Module, folder: Path, device: str) -> Any:
    """The base with the adapter of `folder`, as PEFT loads it."""
    # After load_hf, which silences what bitsandbytes says about its optional kernels when peft imports it.
    import peft

    try:
        return peft.PeftModel.from_pretrained(model, str(folder), torch_device=device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # broken files raise SafetensorError, KeyError, TypeError and more
        text = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(f"the adapter in {folder} cannot be loaded: {text}; copy its files again.") from error


def merge(model: Path, output: Path, base: Literal["trained", "original"] = "trained") -> str:
    """`vlft merge`: write the merged model to `output` with the adapter's processor files; returns what was done.

    Raises:
        ModelError: `output` is not empty, or `model` cannot be merged.
    """
    check_empty(output)
    write_whole(merged(model, base, _device()), model, output, base)
    quantised = bool(_meta(model).get("quantization"))
    if quantised and base == "original":
        return f"merged onto the original weights into {output}; logits differ from training's by the NF4 rounding."
    onto = "the dequantised NF4 base, as trained" if quantised else "the base"
    return f"merged onto {onto}, into {output}."


def serve(
    model: str,
    output: Path,
    base: Literal["trained", "original"] = "trained",
    dtype: str | None = None,
    max_shard_size: str = SHARD,
) -> None:
    """A whole model ready to serve from an adapter, a whole model or a hub name.

    Args:
        dtype: of the written weights, as torch calls it; None: as they are.
        max_shard_size: of one file, such as "5GB".
    Raises:
        ModelError: `output` is not empty, or `model` cannot be loaded, merged or written.
    """
    check_empty(output)
    found = open_checkpoint(model)
    whole = whole_model(found, _device() if found.is_adapter else "cpu", base)
    if dtype:
        _recast(whole, getattr(torch, dtype))
    write_whole(whole, found.folder, output, base if found.is_adapter else None, max_shard_size)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_empty(output: Path) -> None:
    """Raises: ModelError if there is something in `output`."""
    if output.exists() and any(output.iterdir()):
        raise ModelError(f"{output} is not empty; choose another --output_dir.")


def _recast(whole: Any, dtype: torch.dtype) -> None:
    whole.to(dtype)
    for config in (whole.config, whole.config.text_config, whole.config.vision_config):
        config.dtype = dtype


def write_whole(
    whole: Any, source: Path, output: Path, onto: str | None = None, max_shard_size: str | int = SHARD
) -> None:
    """A plain model as a folder, with the tokenizer and processor files, the facts and the card of `source`.

    Args:
        onto: what an adapter was merged onto, for vlft.json.
    Raises:
        ModelError: it cannot be written.
    """
    meta = {key: value for key, value in _meta(source).items() if key != "exported_from"}
    if onto:
        meta |= {"quantization": None, "merged_onto": onto}
    with _replacing(output) as beside:
        whole.save_pretrained(beside, max_shard_size=max_shard_size)
        _add_older_names(beside / "config.json")
        for pattern in _CARRIED:
            for file in source.glob(pattern):
                shutil.copyfile(file, beside / file.name)
        if meta:
            (beside / META).write_text(json.dumps(meta, indent=2))
        if not meta and (source / card.NAME).exists():
            shutil.copyfile(source / card.NAME, beside / card.NAME)  # somebody else's model: its own card
        else:
            card.write(beside, card.title(output))
