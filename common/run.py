"""What surrounds a training run and stands in no paper: flags, processes, folders, checkpoints.

A script takes its flags from `make_parser` and `parse`, and starts by `main(train, args)`. Its
`train` makes a `Job`, which knows the processes, the run's folder and the checkpoint of --resume,
counts epochs, logs and saves. Forward, loss, backward and optimizer step stay in the script. A
killed run that is resumed ends in the same numbers, bit for bit on a CPU: order, augmentation and
PyTorch's seed are functions of (seed, epoch, rank).
"""
import argparse
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from tqdm import tqdm

from common import UserError, datasets, message_of
from common.checkpoint import (COMMAND, command, find_run, init_backbone, load, load_optimizer,
                               load_weights, lock, make_run, not_finite, read_tensors, restore_args,
                               save)

# ---- Flags ---------------------------------------------------------------------------------------

def within(kind: type, low: float, high: float = 1e9, of: int | None = None) -> Callable:
    """A flag's type: a number of `kind` from `low` to `high`, a multiple of `of`."""
    wanted = f"a multiple of {of}" if of else f"a number of at least {low:g}"

    def convert(text: str):
        value = kind(text)
        if not low <= value <= high or of and value % of:
            raise argparse.ArgumentTypeError(f"{text}: expected {wanted}, at most {high:,g}")
        return value

    convert.__name__ = "number"  # argparse's word for a text that `kind` does not read
    return convert


natural = within(int, 0)
positive = within(int, 1)
nonnegative = within(float, 0)
above_zero = within(float, 1e-12)
fraction = within(float, 0, 1)


def multiple(of: int) -> Callable:
    """A flag's type: a multiple of `of`, as the side of a crop."""
    return within(int, of, 4096, of)


def listed(kind: Callable) -> Callable:
    """A flag's type: "0.5,0.9" -> [0.5, 0.9]."""
    def convert(text: str) -> list:
        return [kind(word) for word in text.split(",")] if text else []

    convert.__name__ = "list"
    return convert


def file(path: str) -> str:
    """A flag's type: a file that exists, or none."""
    if path and not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"no file {path}")
    return path


def parse_box(text: str) -> list[float] | None:
    """The numbers of "x0,y0,x1,y1", a box of 1 px or more; None for anything else."""
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
    except ValueError:
        return None
    return [x0, y0, x1, y1] if 1 <= x1 - x0 < math.inf and 1 <= y1 - y0 < math.inf else None


def peek(argv: Sequence[str] | None, flag: str, choices: Sequence[str], default: str) -> str:
    """The value of one flag, on which the others depend."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument(flag, dest="value", default=default, choices=list(choices))
    return chooser.parse_known_args(argv)[0].value


def make_parser(script: str, description: str, paper: dict, presets: dict, argv,
                boxes: Sequence[str] = ("landmarks", "face")) -> argparse.ArgumentParser:
    """A parser with the flags of all scripts, and the defaults of `paper`, changed by --data's
    preset. The last of `presets` needs no data. Add the method's own flags, then call `parse`."""
    data = peek(argv, "--data", presets, list(presets)[-1])
    parser = argparse.ArgumentParser(f"{script}.py", description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("shared by all scripts").add_argument
    add("--data", default=data, choices=presets, help="data set, and the preset of all other flags")
    add("--data-root", default="", help="folder of the data set; README shows the layout of each")
    add("--output", default="", help=f"folder of the run (default: runs/{script}-DATA, -2, ...)")
    add("--epochs", type=within(int, 1, 1e5), default=30, help="passes over the training set")
    add("--batch-size", type=within(int, 1, 1e5), default=64, help="images a step, over all GPUs")
    add("--lr", type=above_zero, default=1e-3, help="learning rate at its highest")
    add("--weight-decay", type=nonnegative, default=0.0, help="weight decay")
    add("--gpus", type=within(int, 1, 64), default=1, help="processes to start, one a GPU")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"], help="auto: a GPU if any")
    add("--workers", type=within(int, -1, 256), default=-1, help="loaders of each GPU; -1: up to 8")
    add("--seed", type=natural, default=0, help="seed of weights, order and augmentation")
    add("--amp", action=switch, default=False, help="bfloat16 where matrices dominate")
    add("--compile", action=switch, default=False, help="torch.compile: minutes, then faster")
    add("--limit", type=natural, default=0, help="images (walks: people) of a split; 0: all")
    add("--resume", action="store_true", help="continue the run in --output, or --data's newest")
    add("--eval", default="", metavar="CKPT", help="evaluate this checkpoint and stop")
    add("--predict", nargs="+", default=[], metavar="PATH", help="images, folders for --weights")
    add("--weights", default="", metavar="CKPT", help="checkpoint for --predict, or for --test")
    add("--detector", type=file, default="", metavar="ONNX", help="YuNet model for --predict")
    add("--box", default=boxes[0], help=f"what is cropped: {', '.join(boxes)} (landmarks: their "
        "true box, brows to chin; face: the set's own); with --predict, x0,y0,x1,y1 in pixels")
    add("--upright", action=switch, default=False, help="turn photographs as their tags say")
    add("--margin", type=within(float, 0.1, 10), default=1.25, help="crop's side over the box's")
    add("--cache", default="", help="keep decoded crops: a folder, which the next run opens again, "
        "or 'device' (in the GPU's memory, where the warp then runs; on a CPU in memory)")
    add("--eval-every", type=positive, default=1, help="epochs between evaluations")
    add("--points", type=int, default=68, choices=[*datasets.SCHEMES], help="of the drawn faces")
    parser.set_defaults(script=script, boxes=list(boxes))
    parser.preset = paper | presets[data]
    return parser


def add_landmark_flags(parser: argparse.ArgumentParser):
    """Adds the flags that the scripts that find landmarks have in common."""
    add = parser.add_argument_group("shared by the landmark scripts").add_argument
    add("--size", type=multiple(32), default=256, help="side of the crop in px, a multiple of 32")
    add("--init", type=file, default="", metavar="CKPT", help="state dict for the backbone")
    add("--norm", default="auto", choices=["auto", "io", "ip", "box", "face", "io-published"],
        help="divisor of the error: inter-ocular, inter-pupil, sqrt(w h) of the landmarks' or the "
        "set's own box, HELEN's published one")
    add("--threshold", type=above_zero, default=0.10, help="NME of a failure; upper end of the AUC")


def parse(parser: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    """The flags; `args.given` lists those that were typed. Ends the program where one is wrong."""
    parser.set_defaults(**parser.preset)
    args = parser.parse_args(argv)
    # argparse fills in no default where the namespace has a value: what is not None was typed.
    typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    args.given = sorted(key for key, value in vars(typed).items() if value is not None)
    if args.batch_size % args.gpus:
        parser.error(f"--batch-size {args.batch_size} does not divide over --gpus {args.gpus}")
    if not (args.box in args.boxes or args.predict and not args.detector and parse_box(args.box)):
        parser.error(f"--box {args.box}: expected {', '.join(args.boxes)}; with --predict, without "
                     "--detector, x0,y0,x1,y1 in px, x0 < x1, y0 < y1 (--box=-5,... if x0 < 0)")
    if bool(args.predict) != bool(args.weights):
        if args.predict or args.eval or not getattr(args, "test", None):
            parser.error("--predict PATH and --weights CKPT belong together")
        args.eval = args.weights
    if bool(args.resume) + bool(args.eval) + bool(args.predict) > 1:
        parser.error("only one of --resume, --eval and --predict")
    return args


# ---- Processes -----------------------------------------------------------------------------------

def main(function: Callable, args):
    """Calls function(args), in --gpus processes. What the user can mend ends in its message, a bug
    in its traceback. Under torchrun, which sets RANK, nothing is launched: it may span machines."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.gpus > 1 and "RANK" not in os.environ and not (args.eval or args.predict):
            launch(function, args)
        else:
            call(function, args)
    except KeyboardInterrupt:
        sys.exit(f"{command(args.script)}: stopped; if the run has a last.pt, --resume goes on")
    except Exception as error:
        if message_of(error):
            sys.exit(f"{command(args.script)}: {message_of(error)}")
        raise


def call(function: Callable, args):
    """Calls function(args), and ends this process's part in a group of processes."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    first = os.environ.get("RANK", "0") == "0"  # it tells, but of PyTorch's own future nobody
    warnings.simplefilter("ignore", FutureWarning if first else Warning)
    function(args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def launch(function: Callable, args):
    """Runs function(args) in --gpus processes. The first error ends all, as does this one's end."""
    if args.device != "cpu" and 0 < torch.cuda.device_count() < args.gpus:
        raise UserError(f"--gpus {args.gpus}: PyTorch sees {torch.cuda.device_count()}")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells of each end
    messages = multiprocessing.get_context("spawn").SimpleQueue()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they leave Ctrl-C to this process
    ranks = multiprocessing.spawn(run_rank, (function, args, port, messages), args.gpus, join=False)
    signal.signal(signal.SIGINT, handler)
    try:
        while not ranks.join():
            pass
    except KeyboardInterrupt:
        for process in ranks.processes:
            process.kill()
        raise
    except Exception as error:
        if not messages.empty():
            raise UserError(messages.get()) from None
        if isinstance(error, multiprocessing.ProcessExitedException):
            raise UserError(str(error)) from None  # killed
        raise


def run_rank(rank: int, function: Callable, args, port: int, messages):
    """Process `rank` of `launch`, which ends with it: then Linux sends SIGINT, as PyTorch asks."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it even while it waits for the others
    tqdm.set_lock(threading.RLock())  # not a semaphore, which would outlive it
    ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=args.gpus, LOCAL_WORLD_SIZE=args.gpus)
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    try:
        call(function, args)
    except Exception as error:
        if not message_of(error):
            raise
        messages.put(message_of(error))
        sys.exit(1)


def setup(args) -> tuple[int, int, torch.device]:
    """This process's rank, the number of processes (they talk by nccl or gloo), and its device."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise UserError("--device cuda: PyTorch sees no GPU here; take --device cpu")
    wanted = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    found = {name: os.environ[name] for name in wanted if name in os.environ}
    whole = len(found) == 4 and all(found[name].isdecimal() for name in wanted[1:])
    if found.keys() & {"RANK", "WORLD_SIZE"} and not whole:
        raise UserError(f"the environment has {found}, expected {', '.join(wanted)}, numbers but "
                        "the first: left over from another job? unset RANK and WORLD_SIZE")
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if args.gpus != here and not (args.gpus == 1 and dist.is_torchelastic_launched()):
        raise UserError(f"--gpus {args.gpus}, but the environment is that of {here} processes: "
                        "unset RANK and WORLD_SIZE, or start all by torchrun, without --gpus")
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} does not divide over {world} processes")
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        if rank == 0 and args.amp and torch.cuda.get_device_capability(device) < (8, 0):
            print("warning: this GPU only emulates --amp's bfloat16, slowly", file=sys.stderr)
    elif rank == 0 and args.device == "auto" and (args.amp or args.gpus > 1):
        print("warning: PyTorch sees no GPU here; this runs on the CPU", file=sys.stderr)
    if whole and not dist.is_initialized():  # two hours: the others wait while rank 0 evaluates
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2),
                                device_id=device if cuda else None)
    return rank, world, device


def seed_all(seed: int, epoch: int = 0, rank: int = 0):
    """Seeds PyTorch as a function of where the run is, so that no generator's state is saved."""
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0]))


def precision(args, device: torch.device):
    """Autocast to bfloat16 with --amp, else a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp)


# ---- Folders and checkpoints ---------------------------------------------------------------------

def open_checkpoint(args, path: str, data_flags=(), read=load) -> tuple[dict, torch.device]:
    """A checkpoint's state for --eval or --predict, and the device; `args` takes its flags over."""
    args.gpus = 1
    device = setup(args)[2]
    state = read(path, args.script)
    restore_args(args, state["args"], path, data_flags)
    return state, device


def make_loader(args, data, batches, device: torch.device, shared: bool = False):
    """Loader over `batches`, lists of keys. Keeps decoded crops as --cache says; in a folder a
    machine's first process makes those of data that all load (`shared`), and the others open it."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    wait = shared and args.cache != "device" and dist.is_initialized()
    if args.cache:
        if wait and not first:
            dist.barrier()
        data.regions.keep(args.cache, verbose=first)
        if wait and first:
            dist.barrier()
    workers = args.workers
    if workers < 0:
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, share) if device.type == "cuda" else 0
    return datasets.make_loader(data, batches, workers, device, args.cache == "device")


# ---- The run -------------------------------------------------------------------------------------

class Job:
    """A training run, in the order of its methods: restore, wrap, begin, epochs and steps, save.
    `rank`, `world`, `device`: this process's. `state`: until `begin` the checkpoint of --resume."""

    def __init__(self, args, data_flags: Sequence[str] = ()):
        self.args = args
        self.rank, self.world, self.device = setup(args)
        self.folder = find_run(args)
        self.state = None
        if args.resume:
            path = self.folder / "last.pt"
            self.state = load(path, args.script)
            restore_args(args, self.state["args"], path, data_flags)
        self.start = self.state["epoch"] if self.state else 0
        seed_all(args.seed)

    def say(self, text: str):
        """Prints on the first process."""
        if self.rank == 0:
            print(text, flush=True)

    def restore(self, net: nn.Module, optimizer, data: list, backbone: nn.Module | None = None):
        """Gives both the checkpoint of --resume, or the `backbone` that of --init.
        Args: data, plain values that say what is trained on; a resumed run must have the same."""
        self.net, self.optimizer, self.data = net, optimizer, data
        self.say(f"{sum(p.numel() for p in net.parameters()):,} parameters, {self.device}")
        if self.state:
            path = self.folder / "last.pt"
            if self.state["data"] != data:
                raise UserError(f"--resume: the training data are {data}, those of the run were "
                                f"{self.state['data']}; see --data-root and --limit")
            load_weights(net, self.state["model"], path)
            load_optimizer(optimizer, self.state["optimizer"], path)
        elif backbone is not None and self.args.init:
            self.say(init_backbone(backbone, self.args.init))

    def wrap(self, net: nn.Module) -> nn.Module:
        """The network to step through: compiled, and in several processes with mean gradients."""
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"  # CUDA graphs
        model = torch.compile(net, mode=mode) if self.args.compile else net
        if not dist.is_initialized():
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, ids, broadcast_buffers=False)

    def begin(self, data, batches=None, loader=None):
        """The training set's loader, and on the first process the folder, which it locks.
        Args: batches, if not shares of a permutation; loader, if not `make_loader`'s."""
        args = self.args
        self.batches = batches or datasets.EpochBatches(len(data), args.batch_size, args.seed,
                                                        self.rank, self.world)
        self.loader = loader or make_loader(args, data, self.batches, self.device, shared=True)
        self.steps = len(self.batches)
        if self.rank == 0:
            self.folder = make_run(args, self.folder)
            self.lock = lock(self.folder)
            log = self.folder / "log.jsonl"
            if log.exists():  # without what a killed run wrote after its last checkpoint
                rows = [row for row in log.read_text().splitlines() if row.endswith("}")]
                kept = [f"{row}\n" for row in rows if json.loads(row)["epoch"] <= self.start]
                log.write_text("".join(kept))
            self.say(f"run: {self.folder}, processes: {self.world}, epochs done: {self.start} of "
                     f"{args.epochs}")
            if self.state and self.state["world"] != self.world:
                self.say(f"the run had {self.state['world']} processes: the numbers will differ")
        self.state = None
        self.bar = tqdm(total=args.epochs * self.steps, initial=self.start * self.steps,
                        disable=self.rank > 0, mininterval=1 if sys.stderr.isatty() else 30)
        self.began = time.time()

    def epochs(self) -> Iterator[int]:
        """The epochs that are left. PyTorch is seeded before each, by (seed, epoch, rank)."""
        for epoch in range(self.start, self.args.epochs):
            parent = multiprocessing.parent_process()
            if parent and not parent.is_alive():  # only Linux tells this process of it
                raise UserError("the process that started this one has ended")
            seed_all(self.args.seed, epoch + 1, self.rank)
            self.batches.epoch = epoch
            self.losses = {}
            self.epoch_began = time.time()
            yield epoch

    def steps_of(self, epoch: int) -> Iterator[tuple[int, dict]]:
        """The epoch's batches, each with the number of its step in the run.
        Raises: FloatingPointError after the last of them, before anything is evaluated or saved."""
        for i, batch in enumerate(self.loader):
            yield epoch * self.steps + i, batch
            self.bar.update()
        losses = torch.stack([values.mean() for values in self.losses.values()])
        if self.world > 1:
            dist.all_reduce(losses, dist.ReduceOp.SUM)
        self.means = dict(zip(self.losses, (losses / self.world).tolist()))
        self.seconds = time.time() - self.epoch_began  # of training: the GPU has been waited for
        if not all(map(math.isfinite, self.means.values())) or not_finite(self.net.state_dict()):
            raise FloatingPointError(f"epoch {epoch + 1} left a loss or weights that are not "
                                     "finite, and is not saved: try a lower --lr")

    def note(self, step: int, **losses: torch.Tensor):
        """Keeps a step's losses, the trained one first.   Raises: FloatingPointError."""
        for name, value in losses.items():
            if name not in self.losses:
                self.losses[name] = torch.zeros(self.steps, device=self.device)
            self.losses[name][step % self.steps] = value.detach()
        if step % 20 == 0:  # the only reading of the loss: it waits for the GPU
            name = next(iter(losses))
            value = losses[name].item()
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {step}: try a lower --lr")
            shown = {"epoch": step // self.steps + 1, name: f"{value:.3f}"}
            self.bar.set_postfix(shown, refresh=False)

    def due(self, epoch: int) -> bool:
        """Whether an evaluation ends the epoch: every --eval-every, and the last."""
        return epoch + 1 == self.args.epochs or (epoch + 1) % self.args.eval_every == 0

    def save(self, epoch: int, scores: dict, **more):
        """Ends an epoch: on the first process a row of the log, with `scores`, and the checkpoint.
        Args: more, what else, or instead, the checkpoint holds."""
        if self.rank > 0:
            return
        row = dict(epoch=epoch + 1, **self.means, lr=self.optimizer.param_groups[0]["lr"],
                   images_per_second=self.steps * self.args.batch_size / self.seconds)
        if self.device.type == "cuda":
            row["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row |= scores | dict(minutes=(time.time() - self.began) / 60)
        shown = [f"{name} {value:.4g}" for name, value in row.items() if name.isidentifier()]
        self.bar.write(", ".join(shown))  # without the subsets, whose names have a slash
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        args = {name: value for name, value in vars(self.args).items() if name not in COMMAND}
        state = dict(script=self.args.script, model=self.net.state_dict(), epoch=epoch + 1,
                     args=args, world=self.world, data=self.data) | more
        if "optimizer" not in state:
            state["optimizer"] = self.optimizer.state_dict()
        save(self.folder / "last.pt", **state)
