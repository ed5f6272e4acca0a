"""README.md of a result: the hub's model card, made from what a run has written about itself.

`facts` reads a run folder once, when its result is written; they stay in the result's vlft.json, so that merging,
exporting or moving a result later keeps its card true.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from vlft.errors import ModelError
from vlft.models.load import META, processor_settings, read_json

NAME = "README.md"
_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
_LICENSE = ("license", "license_name", "license_link")


# ---------------------------------------------------------------------------------------------------------------------
# What a run says about itself
# ---------------------------------------------------------------------------------------------------------------------


def facts(root: Path, step: int | None = None) -> dict[str, Any]:
    """What a card tells about the run in `root`, as plain values for `run` of vlft.json.

    Args:
        step: the step whose weights the result has; None: the last one.
    """
    options = _options(root / "run.yaml")
    ran = read_json(root / "run_card.json") if (root / "run_card.json").exists() else {}
    lines = list(_lines(root / "metrics.jsonl"))
    steps = [int(line["step"]) for line in lines if line.get("kind") == "train"]
    done = step if step is not None else max(steps, default=0)
    base = str(options.get("model_name_or_path") or "")
    return {
        "base_model": hub_name(base), "base": Path(base).name, "base_license": base_license(base),
        "command": shown_command(ran.get("command") or [], ran.get("world_size") or 1),
        "versions": ran.get("versions", {}), "device": ran.get("device"), "precision": ran.get("mixed_precision"),
        "step": done, "global_batch": ran.get("global_batch"), "seed": options.get("seed"),
        "epoch": next((line.get("epoch") for line in lines if line["step"] == done and line["kind"] == "train"), None),
        "rates": {k.removeprefix("learning_rate_"): v for k, v in options.items() if _is_rate(k, v)},
        "datasets": _datasets(root, options), "metrics": _metrics(lines, done), "best": _best(root / "best.json"),
    }  # fmt: skip


def shown_command(argv: list[Any], world_size: int) -> list[str]:
    """A run's command as others can give it: by its name, and without where things lie on this machine.

    Args:
        argv: `sys.argv` of one of its processes, or what this made of it.
    """
    if not argv:
        return []
    first, *rest = (str(word) for word in argv if not re.match("--local[_-]rank=", str(word)))
    if first == "accelerate":
        head = [first]
    elif world_size > 1:
        head = ["accelerate", "launch", "--num_processes", str(world_size), "-m", "vlft"]
    else:
        head = ["vlft"]
    shown = []
    for word in rest:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        shown.append(flag + equals + (Path(value).name or value if value.startswith("/") else value))
    return [*head, *shown]


def _is_rate(key: str, value: Any) -> bool:
    return key.startswith("learning_rate_") and isinstance(value, int | float)


def _options(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of metrics.jsonl; one that a kill cut is passed over."""
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line and "kind" in line:
            yield line


def _metrics(lines: list[dict[str, Any]], step: int) -> dict[str, float]:
    """The evaluation of `step`, or of the last evaluated step before it."""
    evals = [line for line in lines if line["kind"] == "eval" and line["step"] <= step]
    found = evals[-1] if evals else {}
    return {k: v for k, v in found.items() if k.startswith("eval/") and isinstance(v, int | float)}


def _best(path: Path) -> dict[str, Any] | None:
    found = read_json(path) if path.exists() else {}
    return {k: found[k] for k in ("metric", "step", "value")} if {"metric", "step", "value"} <= found.keys() else None


def _datasets(root: Path, options: Mapping[str, Any]) -> dict[str, dict[str, int | None]]:
    """Name -> samples that train and that are held out (data.json), or the names alone."""
    if (root / "data.json").exists():
        named = read_json(root / "data.json").get("datasets")
        if isinstance(named, dict):
            return {str(name): {side: one.get(side) for side in ("train", "held_out")} for name, one in named.items()}
    names = options.get("dataset_names")
    registry = Path(str(options.get("dataset_config_path")))
    if not names and registry.is_file():
        names = read_json(registry).get("datasets") or {}
    return {str(name): {"train": None, "held_out": None} for name in names or ()}


def hub_name(base: str) -> str | None:
    """What the hub calls the model that a run started from; None where only a folder of this machine is known.

    A folder may be a snapshot of the hub's, or the result of an earlier stage, which knows its own base.
    """
    path = Path(base)
    if not path.is_dir():
        return base if _HUB_NAME.fullmatch(base) else None
    if found := _SNAPSHOT.search(f"{path.resolve()}/"):
        return f"{found[1]}/{found[2]}"
    for folder in (path, path.parent / "model"):  # the second: output_dir/base of a second stage
        if (folder / META).exists():
            run = read_json(folder / META).get("run") or {}
            return str(run["base_model"]) if run.get("base_model") else None
    return None


def base_license(base: str) -> dict[str, str]:
    """license, license_name and license_link of the base's own card, as far as its folder has one."""
    folder = _local(base)
    if folder is None or not (folder / NAME).exists():
        return {}
    head = re.match(r"\A---\s*\n(.*?)\n---", (folder / NAME).read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        said = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    if not isinstance(said, dict):
        return {}
    found = {key: str(said[key]) for key in _LICENSE if said.get(key)}
    named = hub_name(base)
    if "license_link" in found and "://" not in found["license_link"] and named:
        found["license_link"] = f"https://huggingface.co/{named}/blob/main/{found['license_link']}"
    return found


def _local(base: str) -> Path | None:
    """The base's folder here; for a hub name its snapshot in the cache, without asking the network."""
    if Path(base).is_dir():
        return Path(base)
    if not _HUB_NAME.fullmatch(base):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base, NAME)
    return Path(found).parent if isinstance(found, str) else None


# ---------------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------------


def title(folder: Path) -> str:
    """What a result is called: its folder's name; a run's result lies in a folder "model", so it takes the run's."""
    whole = folder.resolve()
    return whole.parent.name if whole.name in ("model", "merged") else whole.name


def write(folder: Path, name: str) -> None:
    """Write README.md into a result's folder, from its vlft.json and model files.

    Raises:
        ModelError: vlft.json, which may be a stranger's, holds something else than a run's facts.
    """
    try:
        made = card(folder, name)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(
            f"the facts of the run in {META} cannot be used ({type(error).__name__}: {error}); remove 'run' there."
        ) from error
    made.save(folder / NAME)


def card(folder: Path, name: str) -> Any:
    """The `huggingface_hub.ModelCard` of a result, or of any Hugging Face folder (which then says less)."""
    from huggingface_hub import ModelCard

    meta = read_json(folder / META) if (folder / META).exists() else {}
    run = meta.get("run") or {}
    adapter = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").exists() else None
    base = run.get("base_model")
    strategy = meta.get("strategy")
    lead = "A vision-language model" + (f", fine-tuned from {_link(base)}" if base else "")
    lead += f" with vlft's strategy `{strategy}`." if strategy else "."
    return ModelCard.from_template(
        _data(name, run, adapter, strategy), template_path=str(_TEMPLATE), name=name, folder=name, lead=lead,
        adapter=adapter is not None, modules=", ".join(f"`{m}`" for m in (adapter or {}).get("modules_to_save") or ()),
        quantization=meta.get("quantization"), python=_python(name, base, adapter), pixels=_pixels(folder), run=run,
        rows=list(_rows(meta, run)) if run else [], datasets=_dataset_rows(run),
        command=shlex.join(shown_command(run.get("command") or [], 1)),
        metrics=[(key, _number(value)) for key, value in run.get("metrics", {}).items()], step=run.get("step"),
        best=_other_best(run),
    )  # fmt: skip


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})"


def _data(name: str, run: Mapping[str, Any], adapter: Mapping[str, Any] | None, strategy: str | None) -> Any:
    from huggingface_hub import ModelCardData

    base, results = run.get("base_model"), _results(run)
    tags = ["vlft", *([strategy] if strategy else [])]
    more: dict[str, Any] = dict(run.get("base_license", {}))
    if base:
        more["base_model_relation"] = "adapter" if adapter is not None else "finetune"
    library = "peft" if adapter is not None else "transformers"
    # A registry's own name would link to whatever the hub has under it.
    named = [n for n in run.get("datasets", {}) if _HUB_NAME.fullmatch(n)]
    return ModelCardData(
        base_model=base, library_name=library, pipeline_tag="image-text-to-text", tags=tags, datasets=named or None,
        model_name=name if results else None, eval_results=results or None, **more,
    )  # fmt: skip


def _results(run: Mapping[str, Any]) -> list[Any]:
    """The hub's model-index entries of `eval/<dataset>/<metric>`."""
    from huggingface_hub import EvalResult

    found = []
    for key, value in run.get("metrics", {}).items():
        _, dataset, metric = key.split("/", 2)
        found.append(
            EvalResult(
                task_type="image-text-to-text", dataset_type=dataset, dataset_name=dataset, dataset_split="held out",
                metric_type=metric.rsplit("/", 1)[-1], metric_name=metric, metric_value=value,
            )
        )  # fmt: skip
    return found


def _other_best(run: Mapping[str, Any]) -> dict[str, Any] | None:
    best = run.get("best")
    return {**best, "value": _number(best["value"])} if best and best["step"] != run.get("step") else None


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _rows(meta: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    def told(value: Any) -> str:
        if isinstance(value, list):
            return " ".join(map(told, value))
        return str(value).lower() if isinstance(value, bool) else _number(value)

    yield "base", _link(run["base_model"]) if run.get("base_model") else f"`{run.get('base')}`, a local folder"
    options = ", ".join(f"{k} {told(v)}" for k, v in (meta.get("options") or {}).items() if v is not None)
    yield "strategy", f"`{meta.get('strategy')}` of {meta.get('distribution')}"
    if options:
        yield "its options", options
    yield "peak learning rate", ", ".join(f"{part} {_number(rate)}" for part, rate in run["rates"].items())
    epochs = f" ({run['epoch']:.3g} epochs)" if run.get("epoch") else ""
    yield "steps", f"{run['step']}{epochs} of {run['global_batch']} samples"
    yield "precision", f"{'fp32' if run['precision'] == 'no' else run['precision']} on {run['device']}"
    yield "seed", str(run["seed"])
    yield "versions", ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    if meta.get("merged_onto"):
        yield "adapters merged onto", f"the {meta['merged_onto']} base weights"


def _dataset_rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, counts in run.get("datasets", {}).items():
        shown = {side: "" if counts.get(side) is None else counts[side] for side in ("train", "held_out")}
        rows.append({"name": name, **shown})
    return rows


def _pixels(folder: Path) -> tuple[int, int] | None:
    try:
        size = processor_settings(folder).get("size") or {}
        return int(size["shortest_edge"]), int(size["longest_edge"])
    except Exception:  # any Hugging Face folder may have other settings, or none: the card then says nothing of it
        return None


def _python(name: str, base: str | None, adapter: Mapping[str, Any] | None) -> str:
    load = 'AutoModelForImageTextToText.from_pretrained("{}", dtype="auto", device_map="auto")'
    lines = ["from transformers import AutoModelForImageTextToText, AutoProcessor", ""]
    if adapter is None:
        lines.append(f"model = {load.format(name)}")
    else:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f"base = {load.format(base or adapter.get('base_model_name_or_path'))}")
        lines.append(f'model = PeftModel.from_pretrained(base, "{name}")')
    return "\n".join([*lines, f'processor = AutoProcessor.from_pretrained("{name}")'])
