"""The story of `vlft doctor`: the model, the data, the machine; a page, a few lines, and go or no-go."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from vlft.config import DoctorOptions, deepspeed_path
from vlft.data.prepare import DataOptions
from vlft.doctor import looked, machine, model, records, sampled
from vlft.doctor.findings import Finding, ordered, verdict
from vlft.doctor.looked import Sampled
from vlft.doctor.machine import GIB
from vlft.doctor.page import Checkup, grades, render
from vlft.errors import ConfigError
from vlft.models.load import picture_facts, quieten
from vlft.report import write_page
from vlft.setup import Alone, check_pixels, check_scored, shared_data_options


def main(options: DoctorOptions) -> None:
    """Look at everything, write the page, and say what was found.

    Raises:
        VlftError: no-go; a ModelError or DataError where all errors are of that kind.
        CheckpointError: the page cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("vlft doctor starts what it needs on every GPU itself; run it without a launcher.")
    quieten()
    checkup = examine(options)
    page = write_page(render(checkup), options.page)
    for one in ordered(checkup.findings):
        print(f"{one.grade:<8} {one.area:<12} {one.text}")
    print(f"{grades(checkup.findings)}: {page}")
    if error := verdict(checkup.findings, str(page)):
        raise error
    print("go")


def examine(options: DoctorOptions) -> Checkup:
    """All findings, with what the page shows beside them."""
    checkup = Checkup(options.look)
    checkup.about = [("Model", options.model_name_or_path), ("Data", str(options.dataset_config_path))]
    if options.tuning_strategy:
        checkup.about.append(("Strategy", options.tuning_strategy))
    plan = machine.Plan(
        options.num_workers, options.per_device_train_batch_size, options.gradient_accumulation_steps,
        options.max_pixels, checkpoints=options.save_total_limit,
        deepspeed=deepspeed_path(options.deepspeed).stem if options.deepspeed else "",
    )  # fmt: skip
    found = None
    if {"model", "data"} & {*options.look}:
        found, findings = model.examine(
            options.model_name_or_path, trust_remote_code=options.trust_remote_code, weights="model" in options.look,
            max_seq_length=options.max_seq_length,
        )  # fmt: skip
        # Without a tokenizer there are no samples, so the model's errors count even where it was not asked for.
        checkup.findings += [f for f in findings if "model" in options.look or f.grade == "error"]
    if "data" in options.look:
        pixels = _data(options, found, checkup)
        plan = replace(plan, pixels=pixels or plan.pixels)
    if "environment" in options.look:
        plan = replace(plan, weights=found.weights if found else 0)
        folders = [("output_dir", options.output_dir or Path()), ("cache_dir", options.cache_dir)]
        here = machine.look(options.mixed_precision, folders)
        checkup.findings += machine.examine(here, plan)
        checkup.machine, checkup.packages = _described(here), sorted(here.versions.items())
    return checkup


def data_options(options: DoctorOptions, found: model.Examined) -> DataOptions:
    """What training would ask of the data."""
    return shared_data_options(
        options, Alone(), found.checkpoint, picture_facts(found.checkpoint), global_batch=1, train_batch_size=1,
        rows_per_rank=1, eval_batch_size=1,
    )  # fmt: skip


def _data(options: DoctorOptions, found: model.Examined | None, checkup: Checkup) -> int:
    """Look at the data.

    Returns:
        Pixels of all pictures of a usual sample as the model sees them; 0: unknown.
    """
    if found is None or found.chat is None:
        text = "the data was not looked at, for without the model's tokenizer there are no samples; mend that first."
        checkup.findings.append(Finding("note", "data", "not_looked_at", text))
        return 0
    try:
        check_pixels(options, found.checkpoint.pictures)
    except ConfigError as error:
        checkup.findings.append(Finding("error", "data", "max_pixels", str(error)))
        return 0
    data, findings = records.read(data_options(options, found), found.chat)
    checkup.findings += findings
    if data is None:
        return 0
    scored = options.eval_dataset_scripts
    try:
        check_scored(scored, data.names, {data.name_of(int(i)) for i in data.held_out})
    except ConfigError as error:
        checkup.findings += [Finding("error", "data", "not_held_out", problem) for problem in error.problems]
    checkup.findings += records.examine(data, options.eval_max_new_tokens, list(scored))
    checkup.counts = records.counts(data)
    seen = looked.look(data, options.sample_limit or None)
    checkup.findings += sampled.examine(seen)
    checkup.languages, checkup.sheet = sampled.mixes(seen), sampled.contact_sheet(seen)
    checkup.figures = _figures(seen)
    patches = data.fitted.patches[data.used]
    return int(patches.mean() * data.options.layout.patch**2) if len(patches) else 0


def _figures(seen: Sampled) -> list[tuple[str, str, str]]:
    data = seen.data
    pictures = sum(len(one.hashes) for one in seen.seen)
    left = data.index.total - int(data.fitted.usable.sum())
    return [
        ("Records", f"{data.index.total:,}", f"in {len(data.names)} data set{'s' * (len(data.names) > 1)}"),
        ("Left out", f"{left:,}", "reasons below" if left else "every record is used"),
        ("Train", f"{len(data.train):,}", "samples"),
        ("Held out", f"{len(data.held_out):,}", "samples"),
        ("Looked into", f"{len(seen.chosen.ids):,}", f"samples, {pictures:,} pictures"),
    ]


def _described(here: machine.Machine) -> list[tuple[str, str]]:
    """Rows of the page about the machine."""
    gpus = [f"{gpu.name}, {gpu.total / GIB:.0f} GiB, {gpu.free / GIB:.0f} free" for gpu in here.gpus]
    rows = [(f"GPU {i}", text) for i, text in enumerate(gpus)] or [("GPU", "none")]
    rows += [
        ("torch for", f"CUDA {here.torch_cuda}" if here.torch_cuda else "the CPU"), ("Precision", here.precision),
        ("Processors", str(here.processors)), ("Free memory", f"{here.memory / GIB:.1f} GiB"),
        ("/dev/shm", f"{here.shared_free / GIB:.1f} of {here.shared / GIB:.1f} GiB free"),
    ]  # fmt: skip
    return rows + [(f"Disk of {disk.what}", f"{disk.free / GIB:.1f} GiB free at {disk.path}") for disk in here.disks]
