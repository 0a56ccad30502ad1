"""What a machine with a GPU is asked first: does each script train there and go on, and how fast?

    python -m tests.first_gpu OUT          about nine minutes on one GPU
    python -m tests.first_gpu OUT --tiny   the same path on a CPU, to test this file

Each script trains for two short epochs on what it draws, with all flags for speed, and goes on for
a third without --compile. A line for each; what was printed stays in OUT. Then the steps of
tests/bench.py, in float32, bf16 and compiled.
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
CASES = {  # networks and sizes of the papers; epochs of 30 steps, of gait fewer
    "sdfl": "sdfl.py --backbone resnet34 --size 256 --batch-size 32 --limit 960",
    "heatmaps": "heatmap_landmarks.py --backbone mobilenetv2_1.0 --filters 256 --sigma 2 --size 192 "
                "--batch-size 16 --limit 240",
    "lddmm": "lddmm_face.py --backbone hrnet_w18 --size 256 --batch-size 32 --limit 960",
    "stn": "stn_align.py --data faces --depth 34 --width 64 --size 112 --batch-size 32 --limit 960",
    "kprpe": "kprpe.py --model small --size 112 --batch-size 32 --limit 960",
    "dfa": "kprpe.py --task dfa --batch-size 32 --limit 960",
    "gait": "kprpe.py --task gait --limit 64",
}
SMALLER = {"sdfl": "--size 64", "heatmaps": "--size 64", "lddmm": "--size 64",
           "stn": "--size 48 --depth 10", "kprpe": "--model own --size 48", "dfa": "", "gait": ""}


def flags_of(case: str, tiny: bool) -> list[str]:
    """A run's command after `python`: the script and its flags."""
    words = f"{CASES[case]} --epochs 2 --eval-every 2"
    if tiny:
        words += f" --device cpu --limit 16 --batch-size 8 {SMALLER[case]}"
    return words.split()


def start(words: list[str], folder: Path, log: Path) -> str:
    """Runs a script, writes what it prints to `log`, and says how it ended."""
    began = time.time()
    command = [sys.executable, *words, "--output", str(folder.resolve())]
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    path = folder / "log.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []
    rates = ", ".join(f"{row['images_per_second']:.0f}" for row in rows)
    return f"exit code {code}, {time.time() - began:.0f} s, images a second by epoch: {rates}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", default=CASES, choices=CASES, metavar="NAME")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for case in args.only:
        words = flags_of(case, args.tiny)
        fast = [] if args.tiny else FAST.split()
        ended = start([*words, *fast], args.out / case, args.out / f"{case}.txt")
        print(f"{' '.join([case, *fast])}: {ended}", flush=True)
        words[words.index("--epochs") + 1] = "3"
        ended = start([*words, "--resume"], args.out / case, args.out / f"{case}-resumed.txt")
        print(f"{case}, resumed: {ended}", flush=True)
    smoke = ["--smoke"] if args.tiny else []
    subprocess.run([sys.executable, "-m", "tests.bench", *BENCHES, *smoke], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
