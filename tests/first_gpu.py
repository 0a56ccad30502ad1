"""What a machine with a GPU is asked first: does each script train there and go on, how fast, and
does a CPU agree with what came out?

    python -m tests.first_gpu OUT [--only NAME ...]   about a quarter of an hour on a GPU, estimated
    python -m tests.first_gpu OUT --bench             then the steps of tests/bench.py, too
    python -m tests.first_gpu OUT --tiny              the same path on a CPU, to test this file

Each script trains for three short epochs on what it draws, with all flags for speed, as the one
process of a torchrun, so that nccl and DistributedDataParallel are met; it goes on for a fourth
without torchrun and --compile, and a CPU evaluates in float32 what it left. A line for each; what
was printed stays in OUT, and of a failure its end is shown. Exit code 1 if anything failed.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHES = ("sdfl_step", "heatmap_step", "lddmm_step", "stn_step", "vit_step")
FAST = "--amp --cache device --compile"
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 1"
CASES = {  # networks and sizes of the papers; epochs of 30 steps, of gait fewer
    "sdfl": "sdfl.py --backbone resnet34 --size 256 --batch-size 32 --limit 960",
    "heatmaps": "heatmap_landmarks.py --backbone mobilenetv2_1.0 --filters 256 --sigma 2 --size 192 "
                "--batch-size 16 --limit 240",
    "stn": "stn_align.py --data faces --depth 34 --width 64 --size 112 --batch-size 32 --limit 960",
    "kprpe": "kprpe.py --model small --size 112 --batch-size 32 --limit 960",
    "dfa": "kprpe.py --task dfa --batch-size 32 --limit 960",
    "gait": "kprpe.py --task gait --limit 64",
    "lddmm": "lddmm_face.py --backbone hrnet_w18 --size 256 --batch-size 32 --limit 960",  # longest
}
SMALLER = {"sdfl": "--size 64", "heatmaps": "--size 64", "lddmm": "--size 64",
           "stn": "--size 48 --depth 10", "kprpe": "--model own --size 48", "dfa": "", "gait": ""}
MOST = 300  # seconds for one run: a hang takes no more
# As the scripts' --eval, but the numbers as JSON.
EVALUATE = """
import importlib, json, sys
script = importlib.import_module(sys.argv[1])
scores = getattr(script, "main", script.train)(script.parse_args(sys.argv[2:]))
print("\\n" + json.dumps({name: float(value) for name, value in scores.items()}))
"""


def flags_of(case: str, tiny: bool) -> list[str]:
    """A run's command after `python`: the script and its flags."""
    words = f"{CASES[case]} --epochs 3 --eval-every 3"
    if tiny:
        words += f" --device cpu --limit 16 --batch-size 8 {SMALLER[case]}"
    return words.split()


def call(words: list[str], log: Path) -> tuple[int, str]:
    """Runs Python with these words, writes what it prints to `log`, and shows its end if it failed.
    Returns: its exit code, 124 after MOST seconds, and how it ended, in words."""
    began = time.time()
    with log.open("w") as file:
        try:
            code = subprocess.run([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT,
                                  cwd=ROOT, timeout=MOST).returncode
        except subprocess.TimeoutExpired:
            code = 124
    if code:
        print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), flush=True)
    return code, f"exit code {code}, {time.time() - began:.0f} s"


def rows_of(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def agree(seen: dict, found: dict) -> list[str]:
    """The scores that differ by more than 2 % of themselves and 0.02, with both values."""
    return [f"{name} {seen[name]:.4f}, on a CPU {found[name]:.4f}"
            for name in ("nme", "accuracy", "rank1") if name in seen and name in found
            and abs(seen[name] - found[name]) > max(0.02, 0.02 * abs(seen[name]))]


def check(case: str, out: Path, tiny: bool) -> bool:
    """Trains, goes on and evaluates; prints a line for each.   Returns: whether all went well."""
    words = flags_of(case, tiny)
    folder = ["--output", str((out / case).resolve())]
    fast = [] if tiny else FAST.split()
    code, ended = call([*TORCHRUN.split(), *words, *fast, *folder], out / f"{case}.txt")
    rates = [f"{row['images_per_second']:.0f}" for row in rows_of(out / case)]
    print(f"{case}: {ended}, images a second by epoch, the first compiles: {', '.join(rates)}",
          flush=True)
    words[words.index("--epochs") + 1] = "4"
    again, ended = call([*words, "--resume", *folder], out / f"{case}-resumed.txt")
    print(f"{case}, resumed, without --compile: {ended}", flush=True)
    if code or again:
        return False
    task = words[1:3] if "--task" in words else []
    command = ["-c", EVALUATE, words[0].removesuffix(".py"), *task, "--eval",
               str(out / case / "last.pt"), "--device", "cpu", "--no-amp"]
    code, ended = call(command, out / f"{case}-cpu.txt")
    differ = ["not evaluated"]
    if not code:
        found = json.loads((out / f"{case}-cpu.txt").read_text().splitlines()[-1])
        differ = agree(rows_of(out / case)[-1], found)
    print(f"{case}, on a CPU: {ended}, {'; '.join(differ) or 'the same scores'}", flush=True)
    return not differ


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--only", nargs="+", default=CASES, choices=CASES, metavar="NAME")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [case for case in args.only if not check(case, args.out, args.tiny)]
    if args.bench:
        smoke = ["--smoke"] if args.tiny else []
        subprocess.run([sys.executable, "-m", "tests.bench", *BENCHES, *smoke], cwd=ROOT, check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
