"""Two hosts, made of network namespaces: train over both, cut the link, see both end, go on, compare with one process.

    sudo python tests/faults/soak_two_hosts.py

Needs root and `ip` (iproute2). Each host is a namespace with one end of a cable (a veth pair) and nothing else;
torchrun meets over it (c10d rendezvous) and so does gloo. Both share the output folder, as hosts of a cluster do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from runs import command, distance, environment, final_weights, ledger, metrics, start, write_data  # noqa: E402

from vlft.checkpoint import complete  # noqa: E402

STEPS, SAVE_STEPS, CUT_AFTER = 16, 2, 7
BOUND = 120.0
"""Seconds within which both hosts must have ended after the cut."""
RETRIES = 7
"""TCP sends again so often before it gives a connection up: 7 are 51 s, Linux's own 15 are 15 minutes."""


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=not check)


@dataclass(frozen=True)
class Host:
    name: str
    cable: str
    address: str

    def start(self, words: list[str], first: Host, log: Path, seconds: float) -> subprocess.Popen[bytes]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{first.address}:29400", "--rdzv_id", "soak"]
        # Both namespaces have this machine's name, so neither would know that the address is its own.
        torchrun += ["--rdzv_conf", f"is_host={int(self is first)}"]
        torchrun += ["--local_addr", self.address, str(HERE / "spoiled.py"), *words]
        fault = json.dumps({"kind": "slow", "seconds": seconds})
        env = environment(GLOO_SOCKET_IFNAME=self.cable, ACCELERATE_USE_CPU="true", FAULT=fault)
        with log.open("wb") as out:
            return subprocess.Popen(  # `ip netns exec` becomes torchrun, so that its exit code is this one's
                ["ip", "netns", "exec", self.name, *torchrun], env=env, stdout=out, stderr=subprocess.STDOUT
            )

    def end(self) -> None:
        """Every process in the namespace."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False).stdout
        for pid in found.split():
            os.kill(int(pid), signal.SIGKILL)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    mark = os.getpid() % 100_000
    a, b = (Host(f"vlft-{mark}-{x}", f"v{mark}{x}", f"10.213.7.{n}") for n, x in ((1, "a"), (2, "b")))
    try:
        for host in (a, b):
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
            retries = f"echo {RETRIES} > /proc/sys/net/ipv4/tcp_retries2"
            ip("netns", "exec", host.name, "sh", "-c", retries)
        ip("link", "add", a.cable, "netns", a.name, "type", "veth", "peer", "name", b.cable, "netns", b.name)
        for host in (a, b):
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.cable)
        link(a, b, up=True)
        yield a, b
    finally:
        for host in (a, b):
            host.end()
            ip("netns", "del", host.name, check=False)


def link(*hosts: Host, up: bool) -> None:
    for host in hosts:
        ip("-n", host.name, "link", "set", host.cable, "up" if up else "down")


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(metrics(out)) if path.exists() and path.read_text().endswith("\n") else 0


def wait(what: str, until: Any, limit: float) -> float:
    began = time.monotonic()
    while not until():
        if time.monotonic() - began > limit:
            raise TimeoutError(f"after {limit:.0f} s still waiting for {what}")
        time.sleep(0.1)
    return time.monotonic() - began


def soak(folder: Path) -> None:
    from vlft.testing.tiny import make_checkpoint

    model, registry, out = make_checkpoint("qwen2_5_vl", folder / "tiny"), write_data(folder / "data"), folder / "two"
    shared = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "mixed_precision": "no", "learning_rate_llm": 1e-4}
    whole = folder / "one"
    start(command(model, registry, whole, "full", **shared))
    two = command(model, registry, out, "full", **shared, per_device_train_batch_size=2)
    two += ["--resume_from_checkpoint", "latest"]
    with two_hosts() as hosts:

        def launch(seconds: float) -> list[subprocess.Popen[bytes]]:
            return [host.start(two, hosts[0], folder / host.name, seconds) for host in hosts]

        def ended() -> bool:
            for host, run in zip(hosts, runs, strict=True):
                if run.poll() is not None and host.name not in when:
                    when[host.name] = time.monotonic() - began
                    said = (folder / host.name).read_text(errors="replace")
                    why = next((line[:160] for line in said.splitlines() if re.match(r".*\]: \w*Error: ", line)), "")
                    print(f"  {host.name}: exit {run.returncode} after {when[host.name]:.0f} s  {why}", flush=True)
            return len(when) == len(runs)

        runs = launch(seconds=0.3)
        wait("the first steps", lambda: steps_done(out) >= CUT_AFTER, 200)
        card = json.loads((out / "run_card.json").read_text())
        assert (card["world_size"], card["distributed_type"]) == (2, "MULTI_CPU"), card
        link(*hosts, up=False)
        when: dict[str, float] = {}
        began = time.monotonic()
        print(f"{card['world_size']} hosts; after step {steps_done(out)} of {STEPS} the link is cut", flush=True)
        try:
            wait("both hosts to end", ended, float(os.environ.get("BOUND", BOUND)))
        except TimeoutError:
            for host in hosts:
                print(f"--- {host.name}\n{(folder / host.name).read_text(errors='replace')[-6000:]}")
            raise
        done = steps_done(out)
        (saved,) = complete(out / "checkpoints")[-1:]
        assert done - int(saved.name.removeprefix("step-")) <= SAVE_STEPS
        assert done < STEPS
        link(*hosts, up=True)
        print(f"the link is back; going on from {saved.name}", flush=True)
        runs, when, began = launch(seconds=0.0), {}, time.monotonic()
        wait("the end of the run", ended, 200)
        assert [run.returncode for run in runs] == [0, 0]
    gap = distance(final_weights(whole), final_weights(out))
    print(f"distance to the undisturbed run of one process: {gap:.1e} in the norm of all weights", flush=True)
    assert gap < 1e-5
    assert ledger(out) == ledger(whole) == []
    for a, b in zip(metrics(whole), metrics(out), strict=True):
        assert (a["step"], a["tokens"], a["samples"]) == (b["step"], b["tokens"], b["samples"])
        assert abs(a["loss"] - b["loss"]) < 1e-4 * abs(a["loss"])


if __name__ == "__main__":
    if os.geteuid() or shutil.which("ip") is None:
        sys.exit("soak_two_hosts.py makes network namespaces: run it as root, with iproute2 installed.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="vlft-hosts-") as made:
        soak(Path(made))
