"""What docs/security.md says is not trusted runs no code and is read in no format that could; each claim by an attack.

An attack is a file that, if it were run or unpickled, would make the file `ran`. That file must not come to be.
"""

from __future__ import annotations

import ast
import base64
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import command, environment, train, write_data
from safetensors.torch import load_file

from vlft import metrics, words
from vlft.data import images
from vlft.data.formats import ImageRef
from vlft.data.tokens import Chat
from vlft.errors import CheckpointError, ConfigError, ModelError, RecordError
from vlft.export import merged
from vlft.models.load import load_config, load_hf, open_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ran(tmp_path: Path) -> Iterator[Path]:
    """The file that an attack makes. It is not there at the end of the test either."""
    flag = tmp_path / "ran"
    yield flag
    assert not flag.exists(), "the attack's code was run"


class Attack:
    """Pickled, it makes a file when it is read."""

    def __init__(self, flag: Path) -> None:
        self.flag = str(flag)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.flag,))


def attack_file(path: Path, flag: Path) -> Path:
    path.write_bytes(pickle.dumps(Attack(flag)))
    return path


def python(flag: Path) -> str:
    return f"import os\nos.mkdir({str(flag)!r})\n"


@pytest.fixture
def copy(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny checkpoint of the test's own."""
    return Path(shutil.copytree(tiny(), tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_attacks_would_work(tmp_path: Path) -> None:
    """Without this, an attack that does nothing would prove everything."""
    pickle.loads(attack_file(tmp_path / "a.bin", tmp_path / "ran").read_bytes())
    assert (tmp_path / "ran").exists()
    torch.save(Attack(tmp_path / "again"), tmp_path / "b.bin")
    torch.load(tmp_path / "b.bin", weights_only=False)
    assert (tmp_path / "again").exists()


# ------------------------------------------------------------------ weights of a checkpoint


@pytest.mark.parametrize("honest", [True, False], ids=["honest", "attack"])
def test_weights_in_a_pickle_are_refused(copy: Path, ran: Path, honest: bool) -> None:
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(state if honest else Attack(ran), copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no weights in safetensors, only pytorch_model.bin.*save_pretrained"):
        load_hf(copy, "cpu")


def test_a_pickle_beside_safetensors_is_left_alone(copy: Path, ran: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pt"):
        attack_file(copy / name, ran)
    load_hf(copy, "cpu")


@pytest.mark.parametrize("named", ["weights.bin", "../model.safetensors", "/etc/model.safetensors", 3])
def test_an_index_names_safetensors_of_its_own_folder(copy: Path, named: Any) -> None:
    state = load_file(copy / "model.safetensors")
    shutil.copy(copy / "model.safetensors", copy.parent)
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "weights.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, named)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model.safetensors.index.json names .*safetensors"):
        load_hf(copy, "cpu")


def test_a_config_names_no_pickle(copy: Path, ran: Path) -> None:
    attack_file(copy / "adapter_model.bin", ran)
    edit(copy / "config.json", transformers_weights="adapter_model.bin")
    with pytest.raises(ModelError, match=r"config.json names adapter_model.bin"):
        load_hf(copy, "cpu")


@pytest.mark.parametrize("section", [None, "vision_config", "text_config"])
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_config_names_no_kernel_of_the_hub(copy: Path, section: str | None, key: str) -> None:
    """transformers fetches such a kernel, which is code, and lets the file win over the caller's choice."""
    config = json.loads((copy / "config.json").read_text())
    (config.setdefault(section, {}) if section else config)[key] = "someone/kernel"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config.json asks for the kernel 'someone/kernel'"):
        load_hf(copy, "cpu")


def test_a_model_folder_brings_no_adapter_of_its_own(copy: Path) -> None:
    """transformers would load it in silence, from wherever it says."""
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/model"}))
    with pytest.raises(ModelError, match=r"holds an adapter beside its model; merge it"):
        load_hf(copy, "cpu")


@pytest.mark.parametrize("honest", [True, False], ids=["honest", "attack"])
def test_an_adapter_in_a_pickle_is_refused(tiny: Callable[..., Path], tmp_path: Path, ran: Path, honest: bool) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"base_model_name_or_path": str(tiny()), "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({} if honest else Attack(ran), folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors; .*not read"):
        merged(folder)


# ------------------------------------------------------------------ code of a checkpoint


def with_code(folder: Path, flag: Path) -> None:
    text = "from transformers import Qwen2_5_VLConfig as C, Qwen2_5_VLForConditionalGeneration as M\n"
    text += "from transformers import PreTrainedTokenizerFast as T\n"
    (folder / "mine.py").write_text(text + python(flag))
    edit(folder / "config.json", auto_map={"AutoConfig": "mine.C", "AutoModelForImageTextToText": "mine.M"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]}, tokenizer_class="T")


def test_code_of_a_checkpoint_is_not_run(copy: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_code(copy, ran)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask, and take a yes
    checkpoint = open_checkpoint(str(copy))
    load_config(checkpoint)
    load_hf(copy, "cpu")
    Chat.load(copy, checkpoint.family)


def test_code_of_a_checkpoint_runs_by_the_flag(copy: Path, tmp_path: Path) -> None:
    """In a process of its own: transformers remembers the class."""
    with_code(copy, tmp_path / "asked")
    words = "from vlft.models.load import load_config, open_checkpoint as o; import sys; "
    words += "load_config(o(sys.argv[1], trust_remote_code=True))"
    env = environment(HF_MODULES_CACHE=str(tmp_path / "modules"))
    done = subprocess.run(
        [sys.executable, "-c", words, str(copy)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "asked").exists()


def test_a_chat_template_reaches_nothing_outside(copy: Path, ran: Path) -> None:
    for name in copy.glob("chat_template*"):
        name.unlink()
    attack = "{{ cycler.__init__.__globals__.os.mkdir(" + repr(str(ran)) + ") }}"
    (copy / "chat_template.jinja").write_text(attack)
    with pytest.raises(ModelError, match="is unsafe; copy the checkpoint's chat_template"):
        Chat.load(copy, open_checkpoint(str(copy)).family)


# ------------------------------------------------------------------ a run and its resume


def test_a_run_executes_only_what_its_command_names(tiny: Callable[..., Path], tmp_path: Path, ran: Path) -> None:
    """Pickles in the checkpoint, scripts beside the data, a script named inside the checkpoint; and the run card."""
    registry, out = write_data(tmp_path), tmp_path / "out"
    for folder in (tmp_path, tmp_path / "images"):
        for name in ("evaluate.py", "my_metric.py", "exact_match.py", "toy.py", "dataset.py", "conftest.py"):
            (folder / name).write_text(python(ran))
    words = command(tiny(), registry, out, "lora", max_steps=2, save_steps=1, train_split_ratio=0.5, eval_steps=1)
    train([*words, "--eval_dataset_scripts", "toy:exact_match"])
    card = out / "run_card.json"
    assert json.loads(card.read_text())["trust_remote_code"] is False
    shutil.rmtree(out / "checkpoints" / "step-000002")
    saved = out / "checkpoints" / "step-000001"
    for name in ("optimizer.pt", "optimizer.bin", "pytorch_model.bin", "training_args.bin", "scheduler.pt",
                 "random_states_0.pkl", "rng_state.pth", "weights.bin", "mp_rank_00_model_states.pt"):  # fmt: skip
        attack_file(saved / name, ran)
    state = json.loads((saved / "state.json").read_text())
    state["options"]["eval_dataset_scripts"] = {"toy": [str(tmp_path / "my_metric.py")]}
    (saved / "state.json").write_text(json.dumps(state))
    train([*words, "--resume_from_checkpoint", "latest", "--trust_remote_code"])
    assert json.loads(card.read_text())["trust_remote_code"] is True
    assert (out / "checkpoints" / "step-000002").is_dir()


def test_a_checkpoint_of_pickles_is_none(tiny: Callable[..., Path], tmp_path: Path, ran: Path) -> None:
    saved = tmp_path / "out" / "checkpoints" / "step-000001"
    saved.mkdir(parents=True)
    attack_file(saved / "optimizer.pt", ran)
    attack_file(saved / "weights-000-00.safetensors", ran)
    words = command(tiny(), write_data(tmp_path), tmp_path / "out", "lora", resume_from_checkpoint=saved)
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        train(words)


def test_a_metric_by_path_runs_when_it_is_named(tmp_path: Path) -> None:
    script = tmp_path / "my_metric.py"
    script.write_text(python(tmp_path / "asked") + "def evaluate(predictions):\n    return {}\n")
    metrics.load_script(str(script))
    assert (tmp_path / "asked").exists()


@pytest.mark.parametrize("word", ["!!python/object/apply:os.mkdir ['{ran}']", "!!python/name:os.mkdir"])
def test_yaml_makes_no_objects(tmp_path: Path, ran: Path, word: str) -> None:
    (tmp_path / "run.yaml").write_text(f"seed: {word.format(ran=ran)}\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        words.read_yaml(tmp_path / "run.yaml")


# ------------------------------------------------------------------ pictures


@pytest.mark.parametrize("embedded", [False, True], ids=["file", "embedded"])
def test_no_picture_starts_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: bool) -> None:
    from PIL import EpsImagePlugin

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_bytes(eps)
    for read in (images.probe, lambda source: images.decode(source, (28, 28))):
        with pytest.raises(RecordError) as caught:
            read(eps if embedded else str(tmp_path / "a.png"))
        assert caught.value.reason == "image_unreadable"


@pytest.mark.parametrize("path", ["../secret.png", "link.png", "{secret}", "~/../..{secret}", "sub/../../secret.png"])
def test_no_path_leaves_the_folder(tmp_path: Path, path: str) -> None:
    root, secret = tmp_path / "images", tmp_path / "secret.png"
    (root / "sub").mkdir(parents=True)
    secret.write_bytes(b"")
    (root / "link.png").symlink_to(secret)
    with pytest.raises(RecordError) as caught:
        images.resolve(ImageRef("path", path.format(secret=secret)), root, ())
    assert caught.value.reason == "path_outside_root"


def test_no_pipe_or_device_is_opened(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever; a device has no end."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name, reason in (("pipe.png", "image_missing"), ("zero.png", "path_outside_root")):
        with pytest.raises(RecordError) as caught:
            images.resolve(ImageRef("path", name), tmp_path, ())
        assert caught.value.reason == reason


class _Redirect(http.server.BaseHTTPRequestHandler):
    target = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.target)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_remote_picture_does_not_lead_to_a_local_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(base64.b64decode("iVBORw0KGgo="))
    _Redirect.target = secret.as_uri()
    with http.server.HTTPServer(("127.0.0.1", 0), _Redirect) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RecordError) as caught:
            images.fetch(f"http://127.0.0.1:{server.server_port}/a.png", tmp_path / "cache")
        server.shutdown()
    assert caught.value.reason == "remote_failed"
    assert "file" in str(caught.value)


# ------------------------------------------------------------------ the source

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "_pickle"}
LOADERS = {"torch": {"load"}, "np": {"load"}, "numpy": {"load"}, "os": {"system", "popen", "execv", "execvp"}}
EXECUTES = {
    ("vlft/metrics/__init__.py", "exec_module"),  # a metric that the command line names
    ("vlft/metrics/__init__.py", "import_module"),  # a library that a metric names in its own source
    ("vlft/discovery.py", "EntryPoint.load"),  # a plugin that is installed
    ("vlft/words.py", "yaml.load"),  # with a SafeLoader: see the test below
}
"""The only places that may run code or build objects from what they read."""


def findings(file: str, text: str) -> set[tuple[str, str]]:
    """(file, what) of everything that could run what it reads."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            found.add(node.module or "")
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in ("eval", "exec", "compile", "__import__", "import_module"):
            found.add(called.id)
        if isinstance(called, ast.Attribute):
            owner = called.value.id if isinstance(called.value, ast.Name) else ""
            made = called.value.func.id if isinstance(called.value, ast.Call) and isinstance(
                called.value.func, ast.Name) else ""  # fmt: skip
            if called.attr in LOADERS.get(owner, ()) or (owner == "yaml" and called.attr in _YAML):
                found.add(f"{owner}.{called.attr}")
            if called.attr in ("exec_module", "import_module", "load_module", "load_state", "load_checkpoint"):
                found.add(called.attr)
            if made == "EntryPoint" and called.attr == "load":
                found.add("EntryPoint.load")
        for word in node.keywords:
            value = word.value.value if isinstance(word.value, ast.Constant) else ...
            if (word.arg, value) in {("trust_remote_code", True), ("weights_only", False), ("allow_pickle", True),
                                     ("shell", True), ("use_safetensors", False)}:  # fmt: skip
                found.add(f"{word.arg}={value}")
        if isinstance(called, ast.Attribute) and called.attr == "from_pretrained" and _auto(called.value):
            trust = [w for w in node.keywords if w.arg in ("trust_remote_code", None)]
            if not trust:
                found.add("from_pretrained without trust_remote_code, which asks the terminal")
    return {(file, what) for what in found}


_YAML = {"load", "unsafe_load", "full_load", "load_all", "unsafe_load_all", "full_load_all"}


def _auto(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id.startswith("Auto")


def test_nothing_in_the_source_runs_what_it_reads() -> None:
    files = [path for top in ("vlft", "plugins") for path in (ROOT / top).rglob("*.py") if "tests" not in path.parts]
    assert len(files) > 40
    found: set[tuple[str, str]] = set()
    for path in files:
        found |= findings(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    assert found == EXECUTES
    assert issubclass(words._Loader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(p)",
        "import numpy as np\nnp.load(p)",
        "f(p, allow_pickle=True)",
        "f(p, weights_only=False)",
        "f(p, trust_remote_code=True)",
        "eval(text)",
        "exec(text)",
        "import yaml\nyaml.unsafe_load(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import os\nos.system(text)",
        "import importlib\nimportlib.import_module(text)",
        "AutoTokenizer.from_pretrained(folder)",
        "accelerator.load_state(folder)",
    ],
)
def test_the_source_is_really_read(text: str) -> None:
    assert findings("x.py", textwrap.dedent(text))
    assert not findings("x.py", "model.eval()\nre.compile('a')\njson.load(file)\nstrategy.load(source)")
