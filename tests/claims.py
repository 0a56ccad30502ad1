"""The papers' claims as experiments: run what is missing, print the table.

    python -m tests.claims sdfl --seeds 3 --data folder --data-root DIR --small
    python -m tests.claims sdfl --seeds 3 --data faces --only head --epochs 10
    python -m tests.claims sdfl --data faces --small --table          # what has been run so far, nothing new

Each finished run leaves a line in runs/claims.jsonl, named by its flags, so that a long series can be broken
off and taken up again, and claims that share a run share its line. --small is each script's own setting for a
CPU; other flags of the script may follow `--` and go to every run.
"""
import argparse
import hashlib
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Claim:
    """One claim: `variants` maps a label to flags; the first is claimed to be the best by `metric`, in which
    {} stands for the label, or which names one for each label: runs with the same flags are one run. In flags
    @ is the folder of the run without a variant's flags, of the same seed, for which it waits."""

    name: str
    paper: str  # what the paper reports, in its own metric
    variants: dict[str, str]
    metric: str | dict[str, str] = "nme"
    lower_is_better: bool = True
    chain: bool = False  # each variant is claimed to be better than the next, not only the first than all


def strategies(*words: str, more: str = "") -> dict[str, str]:
    """Variants of --strategy with four letters: heatmaps twice as large as --small's, and so is sigma."""
    return {word: f"--strategy {word} --sigma 2 --kernel 11{more}" for word in words}


def lambdas(*values: int) -> dict[str, str]:
    """Variants of --lam; 3 is the preset's, so that its run is shared."""
    return {f"lambda {value}": "" if value == 3 else f"--lam {value}" for value in values}


SPARSE = "--train-points 50"
STN = {"affine2d": "--method affine2d", "proj": "--method proj --lam 0", "tps2": "--method tps2 --lam 0",
       "tps3": "--method tps3 --lam 0", "tps8": "--lam 0", "fullalign": "--method fullalign"}  # Sec. 3.1
RISES = "Fig. 3, rank-1 on MegaFace: 84.21 unaligned, rises, then falls to fullalign"
MORE_STN = STN | {"ours": ""}
DECODERS = "Sec. 2.2, by argument: NME of dark < shift < argmax, on heatmaps of this size"
DIGITS = ("--data affnist --size 40 --patch 4 --dim 64 --depth 4 --heads 4 --mlp-ratio 2 --epochs 10 "
          "--lr 0.001 --warmup 1 --loss softmax --scale 16 --augment none --batch-size 64 "
          "--no-unaligned")
# Of a run that is made before: python kprpe.py --task dfa --data ... --output runs/aligner
FUSED = "--dfa runs/aligner/last.pt --fusion average,norm,landmark"
CLAIMS = {  # by script, or script-task
    "sdfl": [
        Claim("head", "Table I, MobileNetV2: NME 4.70 against 4.86", {"graph": "", "fc": "--head fc"}),
        Claim("head-resnet18", "Table I, ResNet18: NME 4.65 against 4.95",
              {"graph": "--backbone resnet18", "fc": "--backbone resnet18 --head fc"}),
        Claim("loss", "Table VII, eps 0.5: soft wing 4.65, wing 4.76, L1 4.76",
              {"soft wing": "", "wing": "--loss wing", "L1": "--loss l1"}),
        Claim("relative", "Table VI, ResNet18: with 4.65, without 4.75",
              {"lambda 1": "", "lambda 0": "--lam 0"}),
        Claim("adjacency", "Table VI, ResNet18: dynamic 4.65, binary 4.85",
              {"dynamic": "", "binary": "--adjacency binary"}),
        Claim("k", "Fig. 8: best at k = 3 or 6, worse at 1 and N - 1",
              {"k 3": "", "k 1": "--k 1", "k 6": "--k 6", "k N-1": "--k 67"}),
        Claim("occluder", "Fig. 2, by eye: the FC head's visible points move, the graph's stay",
              {"graph": "", "fc": "--head fc"}, "moved@0.2"),
    ],
    "heatmap_landmarks": [
        Claim("D for S", "Table 3: AUC DDDD 82.20, SDSD 81.90", strategies("DDDD", "SDSD"), "auc", False),
        Claim("one D", "Table 3: AUC SSSD 81.71, SSSS 79.18", strategies("SSSD", "SSSS"), "auc", False),
        Claim("one D, 256 filters", "as one D", strategies("SSSD", "SSSS", more=" --filters 256"), "auc",
              False),
        Claim("D last", "Table 3: AUC SDSD 81.90, DSDS 80.92", strategies("SDSD", "DSDS"), "auc", False),
        Claim("one D last", "Table 3: AUC SSSD 81.71, DSSS 80.72", strategies("SSSD", "DSSS"), "auc", False),
        Claim("flip copies", "Sec. 5.1: AUC + 0.7", {"with": "--flip-copies", "without": ""}, "auc", False),
        Claim("flip test", "Sec. 5.1: AUC + 0.6 by coordinates; by heatmaps the same or worse than without",
              {"flip coordinates": "", "flip heatmaps": "", "flip none": ""}, "auc@{}", False),
        Claim("erasing", "Sec. 5.1: AUC + 0.2",
              {"with": "--erase 0.5 --erase-from 0.5", "without": ""}, "auc", False),
        Claim("rotation", "Sec. 5.1: AUC + 0.2", {"10 degrees": "--rotate 10", "without": ""}, "auc", False),
        Claim("scaling", "Sec. 5.1: AUC - 1.0", {"without": "", "0.1": "--scale 0.1"}, "auc", False),
        Claim("repositioning", "Sec. 5.1: AUC - 1.0", {"without": "", "10 px": "--shift 10"}, "auc", False),
        Claim("alignment", "Sec. 3.1, by argument: five points rather than the box",
              {"five points": "", "two passes": "--align two-pass", "box": "--align box"}),
        Claim("spread", "not measured: a landmark's rms distance from its mean, over the crop's side",
              {"five points": "", "box": "--align box"}, "spread"),
        Claim("decoders at 24 px", DECODERS, dict.fromkeys(["dark", "shift", "argmax"], ""), "nme@{}"),
        Claim("decoders at 48 px", DECODERS,
              dict.fromkeys(["dark", "shift", "argmax"], "--strategy SSSD --sigma 2 --kernel 11"), "nme@{}"),
        Claim("decoders at 96 px", DECODERS,
              dict.fromkeys(["dark", "shift", "argmax"], "--size 192 --strategy SSSD --sigma 2 --kernel 11"),
              "nme@{}"),
    ],
    "lddmm_face": [
        Claim("sparse to dense", "Table 2, 300W 50 %: NME_c HRNet 4.82, LDDMM-Face 2.94",
              {"lddmm": SPARSE, "coord": f"{SPARSE} --method coord",
               "heatmap": f"{SPARSE} --method heatmap --backbone hrnet_w18"}, "curves"),
        Claim("sparse to dense, honest", "no such baseline: displacements interpolated along the curves",
              {"flow": SPARSE, "interpolated": SPARSE},
              {"flow": "nme", "interpolated": "nme@interpolated"}),
        Claim("folds", "Table 1: DetJN 0", {"2 steps": "", "8 steps": "--steps 8"}, "detjn"),
        Claim("68 to 194", "Table 3, 300W to HELEN: NME_c HRNet 5.60, LDDMM-Face 4.13",
              {"194 predicted": "--also 194", "68 alone": "--also 194"},
              {"194 predicted": "curves@194", "68 alone": "curves@alone@194"}),
        Claim("68 to 98", "Table 3, 300W to WFLW: NME_c HRNet 6.61, LDDMM-Face 6.04",
              {"98 predicted": "--also 98", "68 alone": "--also 98"},
              {"98 predicted": "curves@98", "68 alone": "curves@alone@98"}),
        Claim("98 to 68", "Table 3, WFLW to 300W: NME_c HRNet 3.91, LDDMM-Face 3.88",
              {"68 predicted": "--points 98 --also 68", "98 alone": "--points 98 --also 68"},
              {"68 predicted": "curves@68", "98 alone": "curves@alone@68"}),
        Claim("beta", "Table 5, tested on all points: NME 3.67 at 0.1, 7.02 at 1, 5.78 at 0.01",
              {"0.1": SPARSE, "1": f"{SPARSE} --beta 1", "0.01": f"{SPARSE} --beta 0.01"}),
        Claim("occlusion", "Table 4, COFW-68: FR 1.18 against 3.16 of HRNet",
              {"lddmm": "", "coord": "--method coord"}, "fr@hidden"),
    ],
    "stn_align": [
        Claim("ladder, strength", "Fig. 2: ANME falls from affine2d to fullalign (0)",
              {name: flags for name, flags in reversed(STN.items())} | {"none": "--method none"},
              dict.fromkeys(STN, "anme") | {"none": "anme/crops"}, chain=True),
        Claim("ladder, verification", RISES, {"affine2d": STN["affine2d"], "none": "--method none"} | STN,
              "accuracy", False),
        Claim("ladder, rank-1", RISES, {"affine2d": STN["affine2d"], "none": "--method none"} | STN, "rank1",
              False),
        Claim("lambda, strength", "Fig. 7: ANME falls as lambda rises", lambdas(7, 5, 3, 1, 0), "anme",
              chain=True),
        Claim("lambda, verification", "Fig. 7, rank-1: best at 3", lambdas(3, 0, 1, 5, 7), "accuracy", False),
        Claim("lambda, rank-1", "Fig. 7, rank-1: best at 3", lambdas(3, 0, 1, 5, 7), "rank1", False),
        *(Claim(f"fmap, {name}", "Fig. 4 and Table 2, rank-1 on MegaFace: " + {
            "tps8": "89.71 against 88.71", "ours": "90.20 against 89.98"}.get(name, "fmap before input"),
            {"fmap": flags, "input": f"{flags} --align-at input".strip()}, "accuracy", False)
          for name, flags in MORE_STN.items()),
        Claim("template", "Table 3, rank-1 on MegaFace at fmap: learned 90.20, fixed 89.60, re-used 90.37",
              {"learned": "", "fixed": "--template fixed",
               "re-used": "--template fixed --template-file @/template.pts"}, "accuracy", False),
        Claim("weights", "Fig. 8(a): learned before fixed", {"learned": "", "fixed": "--alpha fixed"},
              "accuracy", False),
    ],
    "kprpe": [
        Claim("unaligned", "Table 1, CFP-FP unaligned: KP-RPE 93.56, iRPE 77.91, ViT 72.81",
              {"KP-RPE": "", "iRPE": "--rpe irpe", "ViT": "--rpe none"}, "accuracy@unaligned", False),
        Claim("aligned", "Table 1, CFP-FP aligned: KP-RPE 96.60, iRPE 97.01, ViT 96.11",
              {"KP-RPE": "", "iRPE": "--rpe irpe", "ViT": "--rpe none"}, "accuracy", False),
        Claim("f(P)", "Table 2, CFP-FP unaligned: multihead 93.56, relative 89.70, absolute 68.09",
              {"multihead": "", "relative": "--rpe kp-relative", "absolute": "--rpe kp-absolute"},
              "accuracy@unaligned", False),
        Claim("keypoints", "Supp. 2.2, TinyFace rank-1: 69.88 with 5, 69.58 with 4, 69.66 with 3, 69.26 with "
              "2, 68.24 with none",
              {"5": "", "4": "--num-keypoints 4", "3": "--num-keypoints 3", "2": "--num-keypoints 2",
               "none": "--rpe none"}, "accuracy@unaligned", False),
        Claim("noise", "Fig. 6: CFP-FP falls with alpha, by about 1.5 up to 0.1",
              dict.fromkeys(["0", "0.02", "0.05", "0.1"], ""),
              {"0": "accuracy", "0.02": "accuracy@noise0.02", "0.05": "accuracy@noise0.05",
               "0.1": "accuracy@noise0.1"}, False),
        Claim("losses", "Table 7, TinyFace rank-1: AdaFace 75.80, ArcFace 75.62, CosFace 75.48",
              {loss: f"--loss {loss.lower()}" for loss in ("AdaFace", "ArcFace", "CosFace")},
              "accuracy@unaligned", False),
        Claim("digits", "Fig. 1, affNIST: Abs-PE 77.27, KP-RPE the best (no number)",
              {"KP-RPE": DIGITS, "iRPE": f"{DIGITS} --rpe irpe", "RPE": f"{DIGITS} --rpe product",
               "Abs-PE*": f"{DIGITS} --rpe none --draw-keypoints", "Abs-PE": f"{DIGITS} --rpe none"},
              "accuracy@affine", False),
        Claim("fusion", "Table 8, WebFace4M, IJB-S rank-1: landmark based 72.78, average 65.95",
              dict.fromkeys(["landmark", "average", "norm"], FUSED), "rank1@{}", False),
        Claim("fusion, unaligned", "as fusion", dict.fromkeys(["landmark", "average", "norm"], FUSED),
              "rank1@unaligned@{}", False),
        Claim("found keypoints", "not measured: the code finds all of them",
              {"annotated": "", "found": FUSED}, "accuracy", False),
        Claim("found keypoints, unaligned", "as found keypoints", {"annotated": "", "found": FUSED},
              "accuracy@unaligned", False),
    ],
    "kprpe-dfa": [
        Claim("aggregation", "Supp. 3.1, WIDER FACE: NME 0.0518, without 0.0527",
              dict.fromkeys(["aggregation", "best anchor", "mean face"], ""),
              {"aggregation": "nme", "best anchor": "nme@best", "mean face": "nme@mean"}),
    ],
    "kprpe-gait": [  # on --data walkers
        Claim(name, paper, {"KP-RPE": "", "SwinGait-2D": "--rpe swin"}, metric, False)
        for name, paper, metric in [
            ("rank-1", "Table 5, Gait3D: KP-RPE 68.2, SwinGait-2D 67.1", "rank1"),
            ("rank-5", "Table 5, Gait3D: KP-RPE 84.4, SwinGait-2D 83.7", "rank5"),
            ("mAP", "Table 5, Gait3D: KP-RPE 60.81, SwinGait-2D 58.76", "map"),
            ("mINP", "Table 5, Gait3D: KP-RPE 36.19, SwinGait-2D 34.36", "minp"),
            ("rank-1, unaligned", "not measured", "rank1@unaligned")]
    ],
}
ALWAYS = {"sdfl": "--occluder-test --eval-every 1000",  # the last epoch is the one that counts
          "heatmap_landmarks": "--compare --eval-every 1000 --flip-test none --no-flip-copies --erase 0 "
                               "--rotate 0",  # the paper's baseline, without a trick of Sec. 5.1
          "lddmm_face": "--occluder-test --eval-every 1000",
          "stn_align": "--eval-every 1000",
          "kprpe": "--also-rpe= --eval-every 1000 --unaligned --keypoint-noise 0.02,0.05,0.1",
          "kprpe-dfa": "--task dfa --eval-every 1000",
          "kprpe-gait": "--task gait --also-rpe= --eval-every 1000 --unaligned"}
SMALL = {"sdfl": "--backbone mobilenetv2 --size 96 --batch-size 16 --lr 0.01 --drops 2 --epochs 12",
         "heatmap_landmarks": "--backbone mobilenetv2_0.25 --filters 64 --strategy SSD --sigma 1 --kernel 5 "
                              "--size 96 --batch-size 16 --lr 0.002 --epochs 10",
         "lddmm_face": "--backbone mobilenetv2 --size 96 --batch-size 16 --lr 0.001 --epochs 10",
         "stn_align": "--depth 10 --width 16 --size 48 --batch-size 32 --lr 0.1 --warmup 20 --loc-lr 0.03 "
                      "--epochs 20",
         "kprpe": "--size 48 --dim 64 --depth 4 --heads 4 --epochs 16 --batch-size 32 --lr 0.0006 "
                  "--warmup 1 --loss softmax --scale 32 --rpe-lr 50",
         "kprpe-dfa": "", "kprpe-gait": ""}


def run(script: str, flags: str, seed: int, results: Path, threads: int, base: str) -> dict:
    """Runs the script, or what is left of a run broken off, and adds its last numbers to `results`."""
    folder_of = lambda key: results.parent / "claims" / hashlib.sha1(key.encode()).hexdigest()[:12]
    key, other = (f"{script} {words} --seed {seed}" for words in (flags, base))
    folder, words = folder_of(key), shlex.split(flags)
    needed = [word.replace("@", str(folder_of(other))) for word in words if "@" in word]
    while not all(map(os.path.exists, needed)):
        time.sleep(5)
    words = [word.replace("@", str(folder_of(other))) for word in words]
    resume = ["--resume"] if (folder / "last.pt").exists() else []
    command = [sys.executable, f"{script.partition('-')[0]}.py", *words, "--seed", str(seed), "--output",
               str(folder), *resume]
    began = time.time()
    print("+", shlex.join(command[1:]), flush=True)
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode} from {shlex.join(command[1:])}\n{done.stderr[-2000:]}")
    row = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    row = {"key": key, "minutes": round((time.time() - began) / 60, 2), "result": row}
    with open(results, "a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def table(script: str, claims, base: str, seeds: int, done: dict) -> str:
    """Markdown: each claim's mean, spread (standard deviation over seeds) and in how many its order held."""
    lines = ["| claim | the paper | here: mean ± sd (x 100) | order held |", "|---|---|---|---|"]
    for claim in claims:
        metric = lambda label: claim.metric[label] if isinstance(claim.metric, dict) else \
            claim.metric.format(label)
        values = {label: [done[key]["result"][metric(label)] for seed in range(seeds)
                          if (key := f"{script} {join(base, flags)} --seed {seed}") in done]
                  for label, flags in claim.variants.items()}
        cells, counts = [], {len(v) for v in values.values()}
        for label, v in values.items():
            spread = f" ± {100 * statistics.stdev(v):.2f}" if len(v) > 1 else ""
            cells.append(f"{label} {100 * statistics.mean(v):.2f}{spread} "
                         f"({len(v)} seed{'s' * (len(v) != 1)})" if v else f"{label} not run")
        first, *others = values.values()
        sign = 1 if claim.lower_is_better else -1
        full = min(counts)
        better = list(itertools.pairwise(values.values())) if claim.chain else [(first, v) for v in others]
        held = sum(all(sign * a[s] < sign * b[s] for a, b in better) for s in range(full))
        lines.append(f"| {claim.name} | {claim.paper} | {'; '.join(cells)} | "
                     f"{f'{held} of {full}' if full else 'not run'} |")
    return "\n".join(lines)


def join(*flags: str) -> str:
    """Flags side by side, without double blanks."""
    return " ".join(" ".join(flags).split())


def main(argv=None):
    """Runs what is missing, seed by seed, so that a series that is broken off has whole seeds."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=CLAIMS)
    parser.add_argument("--data", help="faces, of kprpe-gait walkers, if it is not given")
    parser.add_argument("--data-root", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these claims, in this order")
    parser.add_argument("--epochs", type=int, default=0, help="0: the preset's")
    parser.add_argument("--small", action="store_true", help="the script's small setting, for a CPU")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out")
    parser.add_argument("--table", action="store_true", help="only print what has been run")
    parser.add_argument("--results", type=Path, default=Path("runs/claims.jsonl"))
    parser.add_argument("more", nargs="*", help="after --: flags of the script for every run")
    args = parser.parse_args(argv)
    known = {claim.name: claim for claim in CLAIMS[args.script]}
    unknown = [name for name in args.only if name not in known]
    if unknown:
        parser.error(f"--only {unknown[0]}: {args.script} has the claims {', '.join(known)}")
    claims = [known[name] for name in args.only] or list(known.values())
    data = args.data or ("walkers" if args.script == "kprpe-gait" else "faces")
    base = join(f"--data {data}", f"--data-root {shlex.quote(args.data_root)}" if args.data_root else "",
                ALWAYS[args.script], SMALL[args.script] if args.small else "",
                f"--epochs {args.epochs}" if args.epochs else "", *args.more)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    done = {row["key"]: row for row in map(json.loads, lines)}
    wanted = [(join(base, flags), seed) for seed in range(0 if args.table else args.seeds)
              for flags in dict.fromkeys(flags for claim in claims for flags in claim.variants.values())]
    missing = [(flags, seed) for flags, seed in wanted if f"{args.script} {flags} --seed {seed}" not in done]
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda one: run(args.script, *one, args.results, threads, base), missing):
            done[row["key"]] = row
    print(f"\n{args.script} {base}\n")
    print(table(args.script, claims, base, args.seeds, done))


if __name__ == "__main__":
    main()
