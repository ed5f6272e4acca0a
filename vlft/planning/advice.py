"""What to change when a training does not fit, with what each change saves, as a command to paste.

First what changes nothing in the result (what layers compute again, how a batch is cut), then what changes the digits,
then what changes the model that comes out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vlft import discovery
from vlft.config import RATE_PARTS, Run
from vlft.errors import ConfigError, VlftError
from vlft.planning.estimate import Estimate
from vlft.strategy import StrategyConfig

Estimator = Callable[[Run], Estimate]
Reader = Callable[[Sequence[str]], Run]


@dataclass(frozen=True)
class Change:
    """Some flags and what they do."""

    flags: dict[str, str | None]
    """name -> value; None takes the flag away"""
    why: str


@dataclass(frozen=True)
class Advice:
    change: Change
    words: tuple[str, ...]
    found: Estimate

    @property
    def command(self) -> str:
        return command_of(self.words)


def command_of(words: Sequence[str]) -> str:
    """A plan needs no folder, a training does."""
    named = {word.split("=", 1)[0].replace("-", "_") for word in words if word.startswith("--")}
    if not named & {"__output_dir", "__config"}:
        words = [*words, "--output_dir", "output/planned"]
    return "accelerate launch -m vlft " + shlex.join(words)


def with_flags(words: Sequence[str], flags: dict[str, str | None]) -> list[str]:
    """The words with these flags in the place of those of the same name."""
    kept: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            name = word[2:].split("=", 1)[0].replace("-", "_")
            dropping = name in flags or name.removeprefix("no_") in flags
        if not dropping:
            kept.append(word)
    for name, value in flags.items():
        kept += [f"--{name}", value] if value is not None else []
    return kept


def changes(run: Run) -> Iterator[Change]:
    """All that is worth a try, in the order of what it costs."""
    c = run.config
    if c.memory != "low" and c.gradient_checkpointing is None:
        yield Change(
            {"memory": "low"}, "layers keep their inputs alone and compute the rest again: the same result, slower"
        )
    if c.per_device_train_batch_size > 1:
        rows = c.per_device_train_batch_size * c.gradient_accumulation_steps
        flags: dict[str, str | None] = {"per_device_train_batch_size": "1", "gradient_accumulation_steps": str(rows)}
        yield Change(flags, "one sample a forward, the same samples a step: the same result")
    if c.optim == "adamw" and not c.deepspeed and c.mixed_precision in (None, "bf16"):
        yield Change({"optim": "adamw_8bit"}, "no fp32 masters, states of 8 bits, stochastic rounding")
    if (rank := getattr(run.options, "lora_rank", None)) and rank > 8:
        yield Change({"lora_rank": str(max(8, rank // 2))}, "half the rank")
    if c.max_pixels and c.max_pixels > 250_000:
        yield Change({"max_pixels": str(c.max_pixels // 2)}, "half the pixels of a picture: small print suffers")
    if c.max_seq_length > 1024:
        yield Change({"max_seq_length": str(c.max_seq_length // 2)}, "half the tokens: longer samples shrink or go")
    lighter = getattr(run.strategy.Config, "lighter", None)
    if lighter and lighter != c.tuning_strategy:
        flags = {"tuning_strategy": lighter, **_left_behind(run, lighter)}
        if c.optim != "adamw":
            flags["optim"] = None
        yield Change(flags, "fewer trained weights, or smaller frozen ones")


def _left_behind(run: Run, strategy: str) -> dict[str, str | None]:
    """Flags that this strategy refuses: options of the other's own, rates of parts that it does not train."""
    try:
        own: type[StrategyConfig] = discovery.load_strategy(strategy)[0].Config
        kept = {name: getattr(run.options, name) for name in own.model_fields if name in run.options.model_fields_set}
        trained = own(**kept).rates()
    except (VlftError, ValueError):  # another plugin's: the attempt says what is wrong
        return {}
    names = [name for name in type(run.options).model_fields if name not in own.model_fields]
    names += [f"learning_rate_{part}" for part in RATE_PARTS if part not in trained]
    return dict.fromkeys(names)


def ladder(words: Sequence[str], before: Estimate, read: Reader, estimator: Estimator) -> list[Advice]:
    """Each change alone. One that the options or the plugin refuse, or that saves nothing, is left out.

    Args:
        before: the estimate of these words.
    """
    tried = (_try(words, change, read, estimator) for change in changes(before.run))
    return [one for one in tried if one and one.found.memory.peak < 0.99 * before.memory.peak]


def _try(words: Sequence[str], change: Change, read: Reader, estimator: Estimator) -> Advice | None:
    new = with_flags(words, change.flags)
    try:
        return Advice(change, tuple(new), estimator(read(new)))
    except VlftError:
        return None


def search(words: Sequence[str], run: Run, read: Reader, estimator: Estimator) -> Advice | None:
    """The fewest changes, the cheapest first, with which it fits; None where none do."""
    taken: list[Change] = []
    now: Advice | None = None
    current, now_words = run, list(words)
    for _ in range(12):
        best = None
        for change in changes(current):
            if (one := _try(now_words, change, read, estimator)) and (
                now is None or one.found.memory.peak < now.found.memory.peak
            ):
                best = one
                break
        if best is None:
            return None
        taken.append(best.change)
        now, now_words = best, list(best.words)
        current = read(now_words)
        if best.found.fits:
            return _without_needless(words, taken, read, estimator) or best
    return None


def _without_needless(
    words: Sequence[str], taken: Sequence[Change], read: Reader, estimator: Estimator
) -> Advice | None:
    """Without those changes that it fits without; the dearest are tried to be spared first."""
    needed, best = list(taken), _try(words, _together(taken), read, estimator)
    for change in reversed(taken):
        rest = [one for one in needed if one is not change]
        found = _try(words, _together(rest), read, estimator)
        if found and found.found.fits:
            needed, best = rest, found
    return best


def _together(some: Sequence[Change]) -> Change:
    flags: dict[str, str | None] = {}
    for one in some:
        flags |= one.flags
    return Change(flags, "; ".join(dict.fromkeys(one.why for one in some)))


_GOAL = re.compile(r"fit\s+(\d+(?:\.\d+)?)\s*gi?b", re.IGNORECASE)


def goal_of(text: str) -> float:
    """GB of `fit 24GB`.

    Raises:
        ConfigError: it is another sentence.
    """
    if found := _GOAL.fullmatch(text.strip()):
        return float(found[1])
    raise ConfigError(f"--goal {text}: write for example --goal 'fit 24GB'.")
