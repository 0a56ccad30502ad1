"""Every preset whole, on a tiny tree in the true layout of its set; every command that is shown."""
import argparse
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import trees

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*in the official one")

# What the size of a test forces: few px, few channels, few faces a step. All else is the preset's.
TINY = {
    "sdfl": "--limit 8 --size 64 --batch-size 6 --backbone mobilenetv2",
    "heatmap_landmarks": "--limit 8 --size 64 --batch-size 6 --backbone mobilenetv2_0.25 "
                         "--filters 8",
    "lddmm_face": "--limit 8 --size 64 --batch-size 6 --backbone mobilenetv2",
    "stn_align": "--limit 12 --size 32 --batch-size 6 --depth 10 --width 8",
    "kprpe": "--limit 12 --size 32 --batch-size 6 --model own --dim 16 --depth 1 --heads 2",
    "kprpe-dfa": "--limit 8 --size 64 --batch-size 6",
    "kprpe-gait": "--limit 2 --batch-size 8 --dim 16 --heads 2",
}
# Beside the sets that have no landmarks of their own.
LANDMARKS = {"vggface2": "landmarks.csv", "ms1m": "ldmk_5points.csv",
             "ms1m-small": "ldmk_5points.csv", "webface-base": "ldmk_5points.csv"}


def presets_of(kind):
    """{--data: preset} of a key of TINY; a preset says what differs from the paper's settings."""
    script, _, task = kind.partition("-")
    module = importlib.import_module(script)
    prefix = f"{task.upper()}_" if task else ""
    presets = getattr(module, f"{prefix}PRESETS")
    paper = getattr(module, f"{prefix}PAPER", {})
    return {data: paper | preset for data, preset in presets.items()}


CASES = [(kind, data) for kind in TINY for data in presets_of(kind)]


def flags_of(kind, data, root, epochs):
    """The command line of a tiny run without the script's name, as a list."""
    script, _, task = kind.partition("-")
    flags = ["--data", data, "--device", "cpu", "--epochs", str(epochs), *TINY[kind].split()]
    if task:
        flags += ["--task", task]
    if data == "affnist":
        flags += ["--size", "40"]
    if root:
        flags += ["--data-root", root]
    if data in LANDMARKS:
        flags += ["--landmarks", os.path.join(root, LANDMARKS[data])]
    return flags


@pytest.fixture(scope="module")
def tree_of(tmp_path_factory):
    """Root of the tree of a set, which is written once."""
    made = {}

    def root(data):
        writer = trees.WRITERS.get(data)
        if writer not in made:
            made[writer] = trees.make(data, tmp_path_factory.mktemp("trees") / data)
        return made[writer]
    return root


def go(kind, *flags):
    """Runs the script in this process; returns its scores."""
    module = importlib.import_module(kind.partition("-")[0])
    main = getattr(module, "main", None) or module.train
    return main(module.parse_args(list(flags)))


def killed(kind, *flags):
    """Runs the script until it has written its first checkpoint, where the user presses Ctrl-C."""
    replace = os.replace

    def stop(source, target):
        replace(source, target)
        if Path(target).name == "last.pt":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            go(kind, *flags)


def check_schedule(kind, args, printed):
    """One line says if the run is too short for the rate; an epoch has the rows that it should."""
    wanted = ""
    if kind == "sdfl" and args.schedule == "steps":
        wanted = f"note: --drops {args.drops} leaves "
    if kind == "stn_align" or kind.startswith("kprpe") and args.warmup > args.epochs / 2:
        wanted = f"note: the rate rises for {args.warmup:g} "
    if kind == "lddmm_face":
        wanted = "note: the rate is halved after "
    noted = re.findall(r"^note: (?:--drops|the rate) .*", printed, re.M)
    assert len(noted) == bool(wanted) and all(line.startswith(wanted) for line in noted)
    rows = re.search(r"(\d+) training faces \((\d+) an epoch\)", printed)
    if kind == "sdfl":
        assert (int(rows[2]) > int(rows[1])) == bool(args.pdb)  # balanced by repetition
    if kind == "heatmap_landmarks":
        assert int(rows[2]) == 2 * int(rows[1]) and args.flip_copies  # with mirror images


@pytest.mark.parametrize("kind, data", CASES)
def test_a_preset_runs_whole(kind, data, tree_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = tree_of(data)
    flags = flags_of(kind, data, root, epochs=2)
    killed(kind, *flags, "--output", "run")
    state = torch.load("run/last.pt", weights_only=True)
    assert state["epoch"] == 1
    typed = {word[2:].replace("-", "_") for word in flags if word.startswith("--")}
    for key, value in presets_of(kind)[data].items():
        found = state["args"][key]
        if isinstance(found, list) and isinstance(value, str):  # "1/2,3/4"
            value = [float(Fraction(word)) for word in value.split(",")]
        assert key in typed or found == value, key
    args = argparse.Namespace(**state["args"])
    check_schedule(kind, args, capsys.readouterr().out)

    task = ["--task", kind.partition("-")[2]] if "-" in kind else []
    again = [*task, "--data", data, "--device", "cpu"]
    scores = go(kind, *again, "--output", "run", "--resume")
    rows = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert {row["epoch"] for row in rows} == {1, 2}
    assert np.isfinite([row.get("loss", 0) for row in rows]).all()

    again += TINY[kind].split()[:2]  # --limit
    if root:
        again += ["--data-root", root]
    if (Path(root) / "lfw.bin").exists():  # records have no test split
        again += ["--test", os.path.join(root, "lfw.bin")]
    found = go(kind, *again, "--eval", str(tmp_path / "run" / "last.pt"))
    assert found and np.isfinite(list(found.values())).all()
    for name in found.keys() & scores.keys():
        assert found[name] == pytest.approx(scores[name]), name


@pytest.mark.parametrize("kind, data", [("sdfl", "wflw"), ("kprpe", "webface-base")])
def test_two_processes_train_and_go_on(kind, data, tree_of, tmp_path):
    root = tree_of(data)
    script = [sys.executable, str(ROOT / f"{kind.partition('-')[0]}.py")]
    flags = flags_of(kind, data, root, epochs=1)
    flags += ["--gpus", "2", "--output", str(tmp_path / "run")]
    done = subprocess.run([*script, *flags], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes: 2" in done.stdout
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1


# ---- Commands that are shown ---------------------------------------------------------------------


def shown_commands(text, indent):
    """Commands of python and torchrun, also behind pip's, in lines indented by so many blanks.
    Lines that end in a backslash are joined."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line)  # a remark
        if not line.startswith(" " * indent):
            continue
        for command in line[indent:].split("&&"):
            if command.strip().startswith(("python ", "torchrun ")):
                commands.append(" ".join(command.split()))
    return commands


def alternatives(command):
    """["a", "a --x 1", "a --y"] of "a [--x 1 | --y]"."""
    choices = [choice for group in re.findall(r"\[(.*?)\]", command) for choice in group.split("|")]
    plain = re.sub(r"\[.*?\]", "", command)
    return [plain, *(f"{plain} {choice}" for choice in choices)]


class Parsed(Exception):
    """The argument parser of a module in tests/ has taken the words."""


README = (ROOT / "README.md").read_text()
SHOWN = {command: "README.md" for command in shown_commands(README, 4)}
SHOWN |= {command: "README.md" for command in re.findall(r"`(python [\w-]+\.py[^`]*)`", README)}
for path in sorted(ROOT.glob("*.py")):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    SHOWN |= {command: path.name for command in shown_commands(docstring, 2)}


def test_readme_shows_commands():
    scripts = {name for name in SHOWN for name in re.findall(r"\w+\.py", name)}
    assert {path.name for path in ROOT.glob("*.py")} <= scripts


@pytest.mark.parametrize("command", SHOWN)
def test_a_shown_command_has_flags_that_exist(command, tmp_path, monkeypatch):
    """The files that it names need not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    for line in alternatives(command):
        words = shlex.split(line.replace("x0,y0,x1,y1", "1,2,3,4").replace(" ...", ""))
        if words[:2] == ["python", "-m"]:
            module = importlib.import_module(words[2])
            parse = argparse.ArgumentParser.parse_args

            def parse_only(parser, argv=None, namespace=None):
                parse(parser, argv, namespace)
                raise Parsed

            with monkeypatch.context() as patch, pytest.raises(Parsed):
                patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
                module.main(words[3:])
            continue
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        module = importlib.import_module(words[script].removesuffix(".py"))
        try:
            module.parse_args(words[script + 1:])
        except SystemExit as end:
            assert end.code == 0, f"{SHOWN[command]}: {line}"  # --help
