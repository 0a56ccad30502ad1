"""A run's folder and its files, and published weights. Files stay data: nothing in them is run.

A checkpoint is a dict: script, model and optimizer (state dicts), epoch, args (the flags), world
(the number of processes), data (what was trained on), and what a script adds. It is checked whole
before any of it is used.
"""
import contextlib
import json
import math
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from common import UserError

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are not noticed there
    fcntl = None

# What a checkpoint must hold, and of which kind.
KINDS = dict(model=dict, optimizer=dict, args=dict, data=list, epoch=int, world=int)

# Flags of the command and the machine, never taken over from a checkpoint.
COMMAND = {"output", "gpus", "device", "workers", "compile", "resume", "eval", "predict", "weights",
           "init", "detector", "align_out", "given", "boxes", "script"}
# Flags that describe the data: another --data brings its own.
DATA = {"data", "data_root", "limit", "norm", "threshold", "points", "upright"}


def command(script: str) -> str:
    """What is typed for a script: of "kprpe-dfa", kprpe.py --task dfa."""
    name, _, task = script.partition("-")
    return f"{name}.py" + (f" --task {task}" if task else "")


def restore_args(args, saved: dict, path, data_flags: Sequence[str] = ()):
    """Gives `args` the flags of a checkpoint's run, but for what was typed now, and for COMMAND.
    Where --data names another set, its own DATA and `data_flags` stand."""
    kept = COMMAND | set(args.given)
    if "data" in args.given and args.data != saved.get("data"):
        kept |= DATA | set(data_flags)
    for key in vars(args).keys() - kept:
        value = saved.get(key, getattr(args, key))
        kinds = {type(value), type(getattr(args, key))}
        if len(kinds) > 1 and kinds != {int, float}:
            raise UserError(f"{path}: --{key.replace('_', '-')} is {value!r}: the file was changed")
        setattr(args, key, value)


def find_run(args) -> Path | None:
    """The folder to resume or of --output; None for the default of a new run. Nothing is made yet.
    Raises: UserError for nothing to resume, or an --output that holds a run without --resume."""
    if args.resume and not args.output:
        pattern = re.compile(re.escape(f"{args.script}-{args.data}") + r"(-\d+)?")
        found = [p for p in Path("runs").glob("*/last.pt") if pattern.fullmatch(p.parent.name)]
        if not found:
            raise UserError(f"--resume: no run on --data {args.data} in runs/; name it by --output")
        args.output = str(max(found, key=os.path.getmtime).parent)
    holds = bool(args.output) and Path(args.output, "last.pt").exists()
    if args.resume and not holds:
        raise UserError(f"--resume: no checkpoint {args.output}/last.pt; start the run anew")
    if holds and not args.resume:
        raise UserError(f"--output {args.output} holds a run: --resume it, or name another folder")
    return Path(args.output) if args.output else None


def make_run(args, folder: Path | None) -> Path:
    """Makes the folder of a run: `folder`, or runs/SCRIPT-DATA with the next free number."""
    number = 1
    while not folder:
        name = f"{args.script}-{args.data}" + (f"-{number}" if number > 1 else "")
        with contextlib.suppress(FileExistsError):  # mkdir is atomic: two runs get two folders
            Path("runs", name).mkdir(parents=True)
            folder = Path("runs", name)
        number += 1
    folder.mkdir(parents=True, exist_ok=True)
    args.output = str(folder)
    return folder


def lock(folder: Path):
    """A file that says "in use" while it is open.   Raises: UserError where another process has
    it."""
    file = open(folder / "lock", "w")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process trains here; name another --output") from None
    return file


def save(path: Path, **state):
    """Writes tensors and plain values beside `path`, then renames the file: it is whole, or not
    there.
    Raises: UserError where it cannot be written; an older file stays as it was."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer has its own error for a full disk
        size = part.stat().st_size if part.exists() else 0
        part.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written, after {size:,} bytes: {error}") from None


# Of .safetensors files, by their name there.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file: 8 bytes, the length of its header; the header, JSON, with
    the dtype, shape and place of each; their bytes.   Raises: for a file that is not so."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype = DTYPES[entry["dtype"]]
        count = math.prod(entry["shape"])
        first, last = entry["data_offsets"]
        if not 0 <= first < last <= len(data) - start or last - first != count * dtype.itemsize:
            raise ValueError(f"{name} {entry} does not fit into its {len(data) - start:,} bytes")
        whole = torch.frombuffer(data, dtype=dtype, count=count, offset=start + first)
        tensors[name] = whole.view(entry["shape"])
    return tensors


LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class Callback:
    """Stands for Lightning's class, by which a .ckpt names the state of a callback."""


def read_tensors(path) -> dict:
    """A file's dict of tensors and plain values, on the CPU.   Raises: UserError."""
    if not os.path.isfile(path):
        hint = ", but a folder: name the last.pt in it" if os.path.isdir(path) else ""
        raise UserError(f"no checkpoint {path}{hint}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch itself does not look at the checksums
            if damaged:
                raise ValueError(f"wrong checksum of {damaged}")
        # Mapped, each process reads what it takes: of 2 million classes' centres its own shard.
        mapped = zipfile.is_zipfile(path) and os.name == "posix"  # Windows cannot rename over it
        if str(path).endswith(".safetensors"):
            state = read_safetensors(path)
        else:
            with torch.serialization.safe_globals([(Callback, LIGHTNING)]):
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # zip, pickle and storage errors all mean the same here
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged, or holds more than tensors and plain values: "
                        f"{reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, expected a dict of tensors")
    return state


def read_state_dict(path) -> dict[str, torch.Tensor]:
    """A file's tensors by name, which may be in it as `state_dict` or `model`.
    Raises: UserError."""
    state = read_tensors(path)
    state = state.get("state_dict", state.get("model", state))
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise UserError(f"{path}: expected tensors by name, or a dict of them as state_dict")
    return {str(name): value for name, value in state.items()}


def load(path, script: str) -> dict:
    """A checkpoint of `script`, on the CPU.   Raises: UserError."""
    state = read_tensors(path)
    if state.get("script") != script:
        origin = command(str(state["script"])) if "script" in state else "something else"
        raise UserError(f"{path} is no checkpoint of {command(script)}, but of {origin}")
    for name, kind in KINDS.items():
        if not isinstance(state.get(name), kind):
            raise UserError(f"{path}: its {name} is {type(state.get(name)).__name__}, expected "
                            f"{kind.__name__}; the file was changed")
    return state


def load_weights(net: nn.Module, weights: dict, path):
    """Gives a network a checkpoint's tensors.   Raises: UserError if a name, shape or value does
    not fit."""
    own = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    found = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    wrong = [name for name in own | found if own.get(name) != found.get(name)]
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors do not fit the network that the flags "
                        f"describe; the first, {wrong[0]}, is {found.get(wrong[0], 'missing')}, "
                        f"expected {own.get(wrong[0], 'none')}")
    broken = not_finite(weights)
    if broken:
        raise UserError(f"{path}: {broken[0]} and {len(broken) - 1} more tensors are not finite")
    net.load_state_dict(weights)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, path):
    """Gives an optimizer a checkpoint's state.   Raises: UserError where a shape is not its
    parameter's: a fused optimizer would write beyond it."""
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: the optimizer's state does not fit ({error})") from None
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                raise UserError(f"{path}: the optimizer's {name} is {tuple(value.shape)} for a "
                                f"parameter of {tuple(parameter.shape)}; the file was changed")


def not_finite(tensors: dict) -> list[str]:
    """Names of the tensors that hold a value that is not finite."""
    return [name for name, value in tensors.items() if not value.isfinite().all()]


def init_backbone(backbone: nn.Module, path: str) -> str:
    """Loads what a published state dict and the backbone share by name, but for a last layer with
    another number of outputs; returns what matched.
    Raises: UserError when nothing matches, or a shared name has another shape."""
    state = read_state_dict(path)
    state = {re.sub(r"^(module\.|backbone\.)+", "", name): value for name, value in state.items()}
    own = backbone.state_dict()
    shared = {name: state[name] for name in own if name in state}
    if not shared:
        raise UserError(f"--init {path}: none of its {len(state)} names, as "
                        f"{', '.join([*state][:3])}, is one of the backbone's {len(own)}, as "
                        f"{', '.join([*own][:3])}")
    last = [*own][-1].rpartition(".")[0]
    for name, value in [*shared.items()]:
        if value.shape == own[name].shape:
            continue
        if name.rpartition(".")[0] == last and value.shape[1:] == own[name].shape[1:]:
            del shared[name]
        else:
            raise UserError(f"--init {path}: {name} is {tuple(value.shape)}, the backbone's is "
                            f"{tuple(own[name].shape)}")
    backbone.load_state_dict(own | shared)
    missing = [name for name in own if name not in shared]
    unused = [name for name in state if name not in shared]
    return (f"--init: {len(shared)} of {len(own)} backbone tensors from {path}; "
            f"left as they were: {', '.join(missing[:4]) or 'none'}; "
            f"not used of the file: {', '.join(unused[:4]) or 'none'}")
