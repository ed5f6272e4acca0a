"""The story of `vlft plan`: read, estimate, show, advise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlft.config import PlanOptions, Run
from vlft.errors import ConfigError
from vlft.models.kernels.memory import said
from vlft.models.load import quieten
from vlft.planning import advice, gpus
from vlft.planning.estimate import Estimate, estimate
from vlft.planning.gpus import GIB, Gpu
from vlft.planning.load import histogram
from vlft.terminal import duration, table, thousands
from vlft.words import counted


def main(options: PlanOptions, run: Run, words: Sequence[str], read: advice.Reader) -> None:
    """
    Args:
        words: of the training, without this command's own.
    Raises:
        VlftError: as training does.
    """
    quieten()
    gpu = gpus.by_name(options.gpu) if options.gpu else gpus.here()
    if gpu is None and not options.goal:
        raise ConfigError("there is no GPU here to plan for; name one, e.g. --gpu 'RTX 4090 24GB'.")
    if options.goal:
        size = advice.goal_of(options.goal)
        gpu = gpu or gpus.by_name("RTX 4090")
        gpu = replace(gpu, name=f"{size:g} GB of a GPU as fast as {gpu.name}", memory=gpus.usable(size))
    assert gpu is not None
    target: Gpu = gpu

    def estimator(one: Run) -> Estimate:
        return estimate(one, target, world_size=options.gpus)

    found = estimator(run)
    print(shown(found))
    if found.fits:
        print(f"It fits into {found.gpu.name}.")
        return
    if options.goal:
        best = advice.search(words, run, read, estimator)
        if best is None:
            print(f"Nothing that vlft can change makes it {options.goal}; take a smaller model or more GPUs.")
            return
        print(f"This does ({best.change.why}):\n")
        print(shown(best.found))
        print(f"It fits so:\n\n  {best.command}")  # last: a terminal shows the end
        return
    print(f"It does not fit into {found.gpu.name}. What would help, each alone:\n")
    for one in advice.ladder(words, found, read, estimator):
        saved = found.memory.peak - one.found.memory.peak
        fits = "fits" if one.found.fits else "does not fit"
        print(f"{one.change.why}: {gib(one.found.memory.peak)}, {gib(saved)} less, {fits}\n  {one.command}\n")


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def shown(e: Estimate) -> str:
    """Parameters, memory, time and data."""
    parts = [
        (p.part, f"{p.parameters:,}", f"{p.trainable:,}", gib(p.bytes)) for p in e.static.parts
    ]  # fmt: skip
    m, t = e.memory, e.time
    memory = [
        ("weights", m.weights), ("gradients", m.gradients), ("optimizer states", m.states),
        ("copies of weights, joined or cast", m.copies),
        ("kept by layers for the backward pass", m.kept), ("logits and their gradients", m.logits),
        ("buffers", m.buffers), ("peak", m.peak), (f"of {e.gpu.name}", e.gpu.memory),
    ]  # fmt: skip
    seconds = [
        ("products", t.products), ("attention", t.attention), ("computed again", t.again),
        ("norms, activations, casts", t.moving), ("adapters", t.adapters), ("optimizer", t.optimizer),
        ("the host, beside all these", t.host), ("a step", t.step),
    ]  # fmt: skip
    samples = e.steps.samples_per_epoch / e.steps.steps_per_epoch
    epoch = t.step * e.steps.steps_per_epoch
    fitted, train = e.data.fitted, e.data.plan.ids
    lengths = [
        (name, f"{a:,} to {b:,}", f"{n:,}")
        for name, values in (("tokens", fitted.length[train]), ("patches", fitted.patches[train]))
        for a, b, n in histogram(values)
    ]  # fmt: skip
    row = e.steps.largest
    return "\n".join([
        table(("part", "parameters", "trainable", "weights"), parts),
        table(("memory", "at the worst moment"), [(name, gib(size)) for name, size in memory]),
        f"{said(m.keeps) or 'nothing is computed again'}; "
        f"the largest row has {row.tokens:,} tokens, {row.patches:,} patches.",
        table(("time", "of a mean step"), [(name, f"{1000 * s:,.0f} ms") for name, s in seconds]),
        f"{samples / t.step:.2f} samples/s; an epoch of {thousands(e.steps.samples_per_epoch)} samples, "
        f"{counted(e.steps.steps_per_epoch, 'step')}: {duration(epoch)}.",
        table(("a sample's", "from to", "samples"), lengths),
    ])  # fmt: skip
