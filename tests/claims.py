"""The papers' claims as experiments: run what is missing, print the table, write tests/CLAIMS.md.

    python -m tests.claims sdfl --data folder --data-root DIR --small
    python -m tests.claims sdfl --only head loss --epochs 10 --jobs 2
    python -m tests.claims sdfl --small --table        # what has been run so far, nothing new
    python -m tests.claims --report --hardware "two cores of an AMD EPYC"   # all that has been run
    python -m tests.claims --report --results tests/claims.jsonl            # the runs of CLAIMS.md

Each finished run leaves a line in runs/claims.jsonl, named by its flags: a long series can be
broken off and taken up again, and claims that share a run share its line. --small is each script's
own setting for a CPU; other flags of the script may follow `--` and go to every run. What a claim
needs beyond a run's own numbers is measured from its checkpoint afterwards, by tests/measures.py.
"""
import argparse
import hashlib
import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTANT = "--constant-keypoints"  # not kprpe.py's: `measures.hold_keypoints` before it starts
MEASURED = ("sdfl", "heatmap_landmarks", "lddmm_face", "kprpe")  # by tests/measures.py


# ---- The claims ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Claim:
    """One claim: `variants` maps a label to flags, and the first is claimed to be the best by
    `metric`, in which {} stands for the label, or which names one for each label. Variants with the
    same flags are one run. In flags, @SCRIPT/ is the folder of that script's run without a
    variant's flags, of the same seed and data, which is then made before. Of `own`, variants that
    the paper does not rank, the numbers are shown, with a dagger, and no order is asked."""

    name: str
    paper: str  # what the paper reports, in its own metric
    variants: dict[str, str]
    metric: str | dict[str, str] = "nme"
    lower_is_better: bool = True
    chain: bool = False  # each variant is claimed to be better than the next, not only the first
    own: tuple[str, ...] = ()
    beside: dict[str, str] = field(default_factory=dict)  # {label: metric}, shown: of the first
    scale: float = 100  # numbers are shown times this

    def metric_of(self, label: str) -> str:
        if isinstance(self.metric, dict):
            return self.metric[label]
        return self.metric.format(label)


def higher(name: str, paper: str, variants: dict[str, str], metric="accuracy", own=(),
           chain=False) -> Claim:
    """A claim by a metric of which more is better."""
    return Claim(name, paper, variants, metric, lower_is_better=False, own=own,
                 chain=chain)


def strategies(*words: str, more: str = "") -> dict[str, str]:
    """Variants of --strategy with four letters: twice --small's heatmaps, and twice its sigma."""
    return {word: f"--strategy {word} --sigma 2 --kernel 11{more}" for word in words}


def same(flags: str, *labels: str) -> dict[str, str]:
    """Variants that are one run, and differ by what is measured."""
    return dict.fromkeys(labels, flags)


FC = "--head fc --lr 0.002"  # on photographs 0.005 kills all hidden units of the FC head, and at
#                              0.01 the graph head has a bad run in two
SDFL = [
    Claim("head", "Table I, MobileNetV2: NME 4.70 against 4.86",
          {"graph": "", "fc": FC, "fc, lr 0.005": "--head fc",
           "graph, lr 0.01": "--lr 0.01"}, own=("fc, lr 0.005", "graph, lr 0.01")),
    Claim("head-resnet18", "Table I, ResNet18: NME 4.65 against 4.95",
          {"graph": "--backbone resnet18", "fc": f"--backbone resnet18 {FC}"}),
    Claim("loss", "Table VII, eps 0.5: soft wing 4.65, wing 4.76, L1 4.76",
          {"soft wing": "--epsilon 0.5", "wing": "--epsilon 0.5 --loss wing", "L1": "--loss l1"}),
    Claim("epsilon", "Table VII, soft wing: eps 0.5 4.65, eps 2 4.72",
          {"0.5": "--epsilon 0.5", "2": "--epsilon 2", "the preset's, small 5": ""},
          own=("the preset's, small 5",)),
    Claim("relative", "Table VI, ResNet18: with 4.65, without 4.75",
          {"lambda 1": "", "lambda 0": "--lam 0"}),
    Claim("adjacency", "Table VI, ResNet18: dynamic 4.65, binary 4.85",
          {"dynamic": "", "binary": "--adjacency binary"}),
    Claim("k", "Fig. 8: best at k = 3 or 6, worse at 1 and N - 1",
          {"k 3": "", "k 1": "--k 1", "k 6": "--k 6", "k N-1": "--k 67"}, own=("k 6",)),
    Claim("occluder", "Fig. 2, by eye: the FC head's visible points move, the graph's stay",
          {"graph": "", "fc": FC}, "moved@0.2"),
]

TWO = "--align two-pass"
MOVED = "--align box --rotate 10 --scale 0.1 --shift 6"  # as --align two-pass moves its crops
DECODERS = "Sec. 2.2, by argument: NME of dark < shift < argmax, on heatmaps of this size"
HEATMAP = [
    higher("D for S", "Table 3: AUC DDDD 82.20, SDSD 81.90", strategies("DDDD", "SDSD"), "auc"),
    higher("one D", "Table 3: AUC SSSD 81.71, SSSS 79.18", strategies("SSSD", "SSSS"), "auc"),
    higher("one D, 256 filters", "as one D", strategies("SSSD", "SSSS", more=" --filters 256"),
           "auc"),
    higher("D last", "Table 3: AUC SDSD 81.90, DSDS 80.92", strategies("SDSD", "DSDS"), "auc"),
    higher("one D last", "Table 3: AUC SSSD 81.71, DSSS 80.72", strategies("SSSD", "DSSS"), "auc"),
    higher("flip copies", "Sec. 5.1: AUC + 0.7", {"with": "--flip-copies", "without": ""}, "auc"),
    higher("flip test", "Sec. 5.1: AUC + 0.6 by coordinates; by heatmaps no gain",
           same("", "flip coordinates", "flip heatmaps", "flip none"), "auc@{}"),
    higher("erasing", "Sec. 5.1: AUC + 0.2",
           {"with": "--erase 0.5 --erase-from 0.5", "without": ""}, "auc"),
    higher("rotation", "Sec. 5.1: AUC + 0.2", {"10 degrees": "--rotate 10", "without": ""}, "auc"),
    higher("scaling", "Sec. 5.1: AUC - 1.0", {"without": "", "0.1": "--scale 0.1"}, "auc"),
    higher("repositioning", "Sec. 5.1: AUC - 1.0", {"without": "", "10 px": "--shift 10"}, "auc"),
    Claim("alignment", "Sec. 3.1, by argument: five points rather than the box",
          {"five points": "", "two passes": TWO, "the first of them": TWO,
           "box": "--align box"},
          {"five points": "nme", "two passes": "nme", "the first of them": "nme/first pass",
           "box": "nme"}, own=("two passes", "the first of them")),
    Claim("rough boxes", "not in the paper: boxes turned by up to 10 degrees, zoomed by 10 %, "
          "shifted by 5 %",
          {"two passes": TWO, "the first of them": TWO, "box": MOVED},
          {"two passes": "nme@rough", "the first of them": "nme@rough@first",
           "box": "nme@rough"}),
    Claim("spread", "not measured: a landmark's rms distance from its mean, over the crop's side",
          {"five points": "", "box": "--align box"}, "spread"),
    Claim("decoders at 24 px", DECODERS, same("", "dark", "shift", "argmax"), "nme@{}",
          chain=True),
    Claim("decoders at 48 px", DECODERS,
          same("--strategy SSSD --sigma 2 --kernel 11", "dark", "shift", "argmax"), "nme@{}",
          chain=True),
    Claim("decoders at 96 px", DECODERS,
          same("--size 192 --strategy SSSD --sigma 2 --kernel 11", "dark", "shift", "argmax"),
          "nme@{}", chain=True),
]

SPARSE = "--train-points 50"


def across(own: int, other: int, paper: str) -> Claim:
    """Table 3: another annotation is predicted, or the landmarks of the own one stand for it, in
    the paper those of HRNet's heatmaps, here of the same network."""
    labels = (f"{other} predicted", f"{own} alone")
    names = dict(zip(labels, (f"curves@{other}", f"curves@alone@{other}")))
    flags = "" if own == 68 else f"--points {own}"
    return Claim(f"{own} to {other}", paper, same(flags, *labels), names,
                 beside={f"true {own} alone": f"curves@floor@{other}"})


LDDMM = [
    Claim("sparse to dense", "Table 2, 300W 50 %: NME_c HRNet 4.82, LDDMM-Face 2.94",
          {"lddmm": SPARSE, "coord": f"{SPARSE} --method coord"}, "curves",
          beside={"its training landmarks alone": "curves@alone", "true ones alone": "curves@floor",
                  "interpolated": "curves@interpolated", "by one spline": "curves@spline"}),
    Claim("sparse to dense, HRNet", "as sparse to dense",
          {"lddmm": f"{SPARSE} --backbone hrnet_w18",
           "heatmap": f"{SPARSE} --method heatmap --backbone hrnet_w18"}, "curves"),
    Claim("sparse to dense, honest", "no such baseline: NME of the landmarks that were not "
          "learned, by displacements of those that were, interpolated along the curves or by one "
          "thin-plate spline", same(SPARSE, "flow", "interpolated", "spline"),
          {"flow": "nme@unseen", "interpolated": "nme@unseen@interpolated",
           "spline": "nme@unseen@spline"}),
    Claim("folds", "Table 1: DetJN 0", {"2 steps": "", "8 steps": "--steps 8"}, "detjn", scale=1),
    across(68, 194, "Table 3, 300W to HELEN: NME_c HRNet's 68 5.60, LDDMM-Face 4.13"),
    across(68, 98, "Table 3, 300W to WFLW: NME_c HRNet's 68 6.61, LDDMM-Face 6.04"),
    across(98, 68, "Table 3, WFLW to 300W: NME_c HRNet's 98 3.91, LDDMM-Face 3.88"),
    Claim("beta", "Table 5, tested on all points: NME 3.67 at 0.1, 7.02 at 1, 5.78 at 0.01",
          {"0.1": SPARSE, "1": f"{SPARSE} --beta 1", "10": f"{SPARSE} --beta 10",
           "0.01": f"{SPARSE} --beta 0.01"}, own=("10",)),
    Claim("beta, squared", "as beta, in the form of the authors' code",
          {"0.1": f"{SPARSE} --squared", "1": f"{SPARSE} --squared --beta 1",
           "10": f"{SPARSE} --squared --beta 10"}),
    Claim("sigma", "not measured: sigma_V is the curve's own scale",
          {"1": SPARSE, "0.5": f"{SPARSE} --sigma-factor 0.5", "2": f"{SPARSE} --sigma-factor 2"}),
    Claim("occlusion", "Table 4, COFW-68: FR 1.18 against 3.16 of HRNet",
          {"lddmm": "", "coord": "--method coord"}, "fr@hidden"),
]

STN = {"affine2d": "--method affine2d", "proj": "--method proj --lam 0",
       "tps2": "--method tps2 --lam 0", "tps3": "--method tps3 --lam 0",
       "tps8": "--lam 0", "fullalign": "--method fullalign"}  # Sec. 3.1
# Text and Table 2 put tps8 before no alignment and before fullalign; the rest is in a figure alone.
LADDER = {label: STN[label] for label in ("tps8", "fullalign")} | {"none": "--method none"} | STN
NOT_RANKED = ("affine2d", "proj", "tps2", "tps3")
RISES = ("Fig. 3, rank-1 on MegaFace: unaligned 84.21, rises from affine2d on, then falls to "
         "fullalign; tps8 at fmap 89.71 (Table 2)")
LAMBDA = {f"lambda {value}": f"--lam {value}" if value != 3 else "" for value in (3, 0, 1, 5, 7)}
JOINT = {"lambda 3": "", "lambda 0": "--lam 0", "none": "--method none",
         "affine2d": "--method affine2d"}
FMAP = {"tps8": "89.71 against 88.71", "ours": "90.20 against 89.98"}
ALIGN = [
    Claim("ladder, strength", "Fig. 2: ANME falls from affine2d to fullalign (0)",
          dict(reversed(STN.items())) | {"none": "--method none"},
          dict.fromkeys(STN, "anme") | {"none": "anme/crops"}, chain=True),
    higher("ladder, verification", RISES, LADDER, own=NOT_RANKED),
    higher("ladder, rank-1", RISES, LADDER, "rank1", own=NOT_RANKED),
    Claim("lambda, strength", "Fig. 7: ANME falls as lambda rises",
          {label: LAMBDA[label] for label in sorted(LAMBDA, reverse=True)}, "anme", chain=True),
    higher("lambda, verification", "Fig. 7, rank-1: best at 3", LAMBDA),
    higher("lambda, rank-1", "Fig. 7, rank-1: best at 3", LAMBDA, "rank1"),
    *(higher(f"joint{where}", "Table 2, rank-1 on MegaFace: lambda 3 90.20, lambda 0 89.71, "
             "unaligned 84.21", JOINT, f"accuracy{end}", own=("affine2d",))
      for where, end in ((", own pairs", ""), (", CFP-FP by --test", "@CFP-FP"),
                         (", CFP-FF by --test", "@CFP-FF"))),
    *(higher(f"fmap, {name}", "Fig. 4 and Table 2, rank-1 on MegaFace: "
             f"{FMAP.get(name, 'fmap before input')}",
             {"fmap": flags, "input": f"{flags} --align-at input".strip()})
      for name, flags in (STN | {"ours": ""}).items()),
    higher("template", "Table 3, rank-1 on MegaFace at fmap: learned 90.20, fixed 89.60, re-used "
           "90.37", {"re-used": "--template fixed --template-file @stn_align/template.pts",
                     "learned": "", "fixed": "--template fixed"}, chain=True),
    higher("weights", "Fig. 8(a): learned before fixed", {"learned": "", "fixed": "--alpha fixed"}),
]

IRPE = "--rpe irpe --rpe-lr 12"  # its best of 1, 12 and 50 on LFW
ENCODINGS = {"KP-RPE": "", "constant keypoints": CONSTANT, "iRPE": IRPE, "ViT": "--rpe none"}
ALIGNED = {"iRPE": IRPE} | ENCODINGS  # the order of Table 1's aligned column
HELD = ("constant keypoints",)
NOISE = {"0": "", "0.02": "@noise0.02", "0.05": "@noise0.05", "0.1": "@noise0.1"}
FUSED = "--dfa @kprpe-dfa/last.pt --fusion average,norm,landmark"
RULES = ("landmark", "average", "norm")
KPRPE = [
    higher("unaligned", "Table 1, CFP-FP (here the test split's own pairs): KP-RPE 93.56, iRPE "
           "77.91, ViT 72.81", ENCODINGS, "accuracy@unaligned", own=HELD),
    higher("aligned", "Table 1, CFP-FP (here own pairs): iRPE 97.01, KP-RPE 96.60, ViT 96.11",
           ALIGNED, chain=True, own=HELD),
    *(higher(f"{test} unaligned, by --test", "Table 1, as unaligned", ENCODINGS,
             f"accuracy@{test}@unaligned", own=HELD) for test in ("CFP-FP", "CFP-FF")),
    *(higher(f"{test} aligned, by --test", "Table 1, as aligned", ALIGNED, f"accuracy@{test}",
             chain=True, own=HELD) for test in ("CFP-FP", "CFP-FF")),
    *(higher(f"{t:.0%} aligned", "Fig. 5, CFP-FP (here own pairs): KP-RPE stays, the others fall "
             "from aligned to unaligned", ENCODINGS, f"accuracy@t{t:g}", own=HELD)
      for t in (0.75, 0.5, 0.25)),
    higher("iRPE's rate", "not in the paper: rate of its tables over --lr, against KP-RPE",
           {"KP-RPE": "", **{f"iRPE x {rate}": f"--rpe irpe --rpe-lr {rate}" for rate in (1, 12)},
            "iRPE x 50": "--rpe irpe"}, "accuracy@unaligned"),
    higher("f(P)", "Table 2, CFP-FP unaligned: multihead 93.56, relative 89.70, absolute 68.09",
           {"multihead": "", "relative": "--rpe kp-relative", "absolute": "--rpe kp-absolute"},
           "accuracy@unaligned"),
    higher("keypoints", "Supp. 2.2, TinyFace rank-1: 69.88 with 5, 69.58 with 4, 69.66 with 3, "
           "69.26 with 2, 68.24 with none",
           {"5": "", "4": "--num-keypoints 4", "3": "--num-keypoints 3", "2": "--num-keypoints 2",
            "none": "--rpe none"}, "accuracy@unaligned"),
    *(higher(f"noise{where}", "Fig. 6: CFP-FP falls with alpha, by about 1.5 at realistic noise",
             same("", *NOISE), {label: f"accuracy{where}{end}" for label, end in NOISE.items()})
      for where in ("", "@unaligned")),
    higher("losses", "Table 7, TinyFace rank-1: AdaFace 75.80, ArcFace 75.62, CosFace 75.48",
           {loss: f"--loss {loss.lower()}" for loss in ("AdaFace", "ArcFace", "CosFace")},
           "accuracy@unaligned"),
    higher("fusion", "Table 8, WebFace4M, IJB-S rank-1: landmark based 72.78, average 65.95",
           same(FUSED, *RULES), "rank1@{}"),
    higher("fusion, unaligned", "as fusion", same(FUSED, *RULES), "rank1@unaligned@{}"),
    higher("found keypoints", "not measured: the code finds all of them",
           {"annotated": "", "found": FUSED}),
    higher("found keypoints, unaligned", "as found keypoints", {"annotated": "", "found": FUSED},
           "accuracy@unaligned"),
]
DIGITS = [
    higher("digits", "Fig. 1, affNIST: Abs-PE 77.27, KP-RPE the best (no number)",
           {"KP-RPE": "", "constant keypoints": CONSTANT, "iRPE": "--rpe irpe",
            "RPE": "--rpe product", "Abs-PE*": "--rpe none --draw-keypoints",
            "Abs-PE": "--rpe none"}, "accuracy@affine", own=HELD),
]
DFA = [
    Claim("aggregation", "Supp. 3.1, WIDER FACE: NME 0.0518, without 0.0527",
          same("", "aggregation", "best anchor", "mean face"),
          {"aggregation": "nme", "best anchor": "nme@best", "mean face": "nme@mean"}),
]
GAIT = [
    higher(name, paper, {"KP-RPE": "", "SwinGait-2D": "--rpe swin"}, metric)
    for name, paper, metric in [
        ("rank-1", "Table 5, Gait3D: KP-RPE 68.2, SwinGait-2D 67.1", "rank1"),
        ("rank-5", "Table 5, Gait3D: KP-RPE 84.4, SwinGait-2D 83.7", "rank5"),
        ("mAP", "Table 5, Gait3D: KP-RPE 60.81, SwinGait-2D 58.76", "map"),
        ("mINP", "Table 5, Gait3D: KP-RPE 36.19, SwinGait-2D 34.36", "minp"),
        ("rank-1, unaligned", "not measured", "rank1@unaligned")]
]
CLAIMS = {"sdfl": SDFL, "heatmap_landmarks": HEATMAP, "lddmm_face": LDDMM, "stn_align": ALIGN,
          "kprpe": KPRPE, "kprpe-digits": DIGITS, "kprpe-dfa": DFA, "kprpe-gait": GAIT}
DATA = dict.fromkeys(CLAIMS, "faces") | {"kprpe-digits": "affnist", "kprpe-gait": "walkers"}
LAST = "--eval-every 1000"  # the last epoch is the one that counts
ALWAYS = {
    "sdfl": LAST,
    # The paper's baseline, without a trick of Sec. 5.1.
    "heatmap_landmarks": f"{LAST} --flip-test none --no-flip-copies --erase 0 --rotate 0",
    "lddmm_face": LAST,
    "stn_align": f"{LAST} --method tps8 --align-at fmap --lam 3",
    "kprpe": f"{LAST} --unaligned --keypoint-noise 0.02,0.05,0.1",
    "kprpe-digits": LAST,
    "kprpe-dfa": f"--task dfa {LAST}",
    "kprpe-gait": f"--task gait {LAST} --unaligned",
}
SMALL = dict.fromkeys(CLAIMS, "") | {
    "sdfl": "--backbone mobilenetv2 --size 96 --batch-size 16 --optimizer adam --lr 0.005 "
            "--weight-decay 0 --schedule cosine --epsilon 5 --rotate 20 --shift 8 --occlude 0.25 "
            "--epochs 12",
    "heatmap_landmarks": "--backbone mobilenetv2_0.25 --filters 64 --strategy SSD --sigma 1 "
                         "--kernel 5 --size 96 --batch-size 16 --lr 0.002 --epochs 10",
    "lddmm_face": "--backbone mobilenetv2 --size 96 --batch-size 16 --lr 0.001 --epochs 10",
    "stn_align": "--depth 10 --width 16 --size 48 --batch-size 32 --lr 0.1 --warmup 20 "
                 "--loc-lr 0.03 --epochs 20",
    "kprpe": "--size 48 --dim 64 --depth 4 --heads 4 --epochs 16 --batch-size 32 --lr 0.0006 "
             "--warmup 1 --loss softmax --scale 32 --rpe-lr 50",
}


# ---- Runs ----------------------------------------------------------------------------------------

def join(*flags: str) -> str:
    """Flags side by side, without double blanks."""
    return " ".join(" ".join(flags).split())


def base_of(script: str, args) -> str:
    """The flags of all runs of a script in this series, without those of a variant."""
    root = f"--data-root {shlex.quote(args.data_root)}" if args.data_root else ""
    small = SMALL[script] if args.small else ""
    epochs = f"--epochs {args.epochs}" if args.epochs else ""
    more = args.more if script == args.script else []
    return join(f"--data {args.data or DATA[script]}", root, ALWAYS[script], small, epochs,
                shlex.join(more))


def key_of(script: str, flags: str, seed: int) -> str:
    return f"{script} {flags} --seed {seed}"


def folder_of(args, key: str) -> Path:
    return args.results.parent / "claims" / hashlib.sha1(key.encode()).hexdigest()[:12]


def needs_of(flags: str) -> list[str]:
    """The scripts whose runs `flags` name, as @SCRIPT/."""
    return re.findall(r"@([\w-]+)/", flags)


def call(words: list[str], threads: int) -> str:
    """Runs Python with these arguments and returns what it prints.   Raises: SystemExit."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode} from {shlex.join(words)}\n"
                         f"{done.stderr[-2000:]}")
    return done.stdout


def make(args, script: str, flags: str, seed: int, threads: int, needed: list) -> dict:
    """Makes a run, or what is left of one that was broken off, measures it, and adds a line to
    args.results.   Args: needed, futures of the runs that `flags` name."""
    for future in needed:
        future.result()
    key = key_of(script, flags, seed)
    folder = folder_of(args, key)
    words = shlex.split(flags)
    for name in needs_of(flags):
        made = folder_of(args, key_of(name, base_of(name, args), seed))
        words = [word.replace(f"@{name}", str(made)) for word in words]
    words += ["--seed", str(seed), "--output", str(folder)]
    if (folder / "last.pt").exists():
        words.append("--resume")
    constant = [word for word in words if word == CONSTANT]
    start = [str(ROOT / f"{script.partition('-')[0]}.py")]
    if constant:
        words.remove(CONSTANT)
        start = ["-c", "from tests import measures; measures.train_with_constant_keypoints()"]
    print("+", key, flush=True)
    began = time.time()
    call(start + words, threads)
    result = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    if script in MEASURED:
        also = [word for data, root in args.also for word in ("--also", data, root)]
        out = call(["-m", "tests.measures", script, str(folder / "last.pt"), *also, *constant],
                   threads)
        result |= json.loads(out.splitlines()[-1])
    row = dict(key=key, script=script, base=base_of(script, args), command=command_of(script, args),
               seed=seed, minutes=round((time.time() - began) / 60, 2), result=result)
    with open(args.results, "a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def run_missing(args, claims: list[Claim], done: dict):
    """Makes the runs that are not in `done` {key: row}, seed by seed, and adds them."""
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    base = base_of(args.script, args)
    futures = {}
    with ThreadPoolExecutor(args.jobs) as pool:

        def submit(script: str, flags: str, seed: int):
            key = key_of(script, flags, seed)
            if key in done or key in futures:
                return
            names = needs_of(flags)
            for name in names:  # submitted first, so that it is under way before it is waited for
                submit(name, base_of(name, args), seed)
            needed = [key_of(name, base_of(name, args), seed) for name in names]
            futures[key] = pool.submit(make, args, script, flags, seed, threads,
                                       [futures[one] for one in needed if one in futures])

        for seed in range(args.seeds):
            for claim in claims:
                for flags in claim.variants.values():
                    submit(args.script, join(base, flags), seed)
        try:
            for key, future in futures.items():
                done[key] = future.result()
        finally:
            pool.shutdown(cancel_futures=True)


# ---- Tables --------------------------------------------------------------------------------------

def cell(label: str, values: list[float], scale: float) -> str:
    """Mean and spread of the seeds."""
    if not values:
        return f"{label} not run"
    spread = f" ± {scale * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    seeds = "1 seed" if len(values) == 1 else f"{len(values)} seeds"
    return f"{label} {scale * statistics.mean(values):.2f}{spread} ({seeds})"


def order_held(claim: Claim, values: dict[str, dict[int, float]]) -> str:
    """In how many of the seeds that all ranked variants have the claim holds: "2 of 3".
    Args: values, of each variant a number by seed."""
    first, *others = ranked = [of for label, of in values.items() if label not in claim.own]
    pairs = list(itertools.pairwise(ranked)) if claim.chain else [(first, v) for v in others]
    sign = 1 if claim.lower_is_better else -1
    seeds = [seed for seed in first if all(seed in other for other in others)]
    held = sum(all(sign * a[seed] < sign * b[seed] for a, b in pairs) for seed in seeds)
    return f"{held} of {len(seeds)}" if seeds else "not run"


def table(script: str, claims: list[Claim], base: str, seeds: int, done: dict) -> str:
    """Markdown: each claim's mean, spread (standard deviation) and in how many seeds its order
    held; below it, the claims with fewer than two variants run.   Args: done {key: row}."""
    def values_of(flags: str, metric: str) -> dict[int, float]:
        found = {}
        for seed in range(seeds):
            key = key_of(script, join(base, flags), seed)
            if key in done and metric in done[key]["result"]:
                found[seed] = done[key]["result"][metric]
        return found

    lines = ["| claim | the paper | here: mean ± sd, rates x 100 | order held |",
             "|---|---|---|---|"]
    missing = []
    for claim in claims:
        values = {}
        cells = []
        for label, flags in claim.variants.items():
            values[label] = values_of(flags, claim.metric_of(label))
            mark = "†" if label in claim.own else ""
            cells.append(cell(label + mark, list(values[label].values()), claim.scale))
        for label, metric in claim.beside.items():
            found = values_of(next(iter(claim.variants.values())), metric)
            if found:
                cells.append(f"[{cell(label, list(found.values()), claim.scale)}]")
        if sum(map(bool, values.values())) < 2:  # one alone says nothing of a claim
            missing.append(claim.name)
            continue
        lines.append(f"| {claim.name} | {claim.paper} | {'; '.join(cells)} | "
                     f"{order_held(claim, values)} |")
    if missing:
        lines += ["", f"Not run: {'; '.join(missing)}."]
    return "\n".join(lines)


def command_of(script: str, args) -> str:
    """The command of a series, as a report shows it: of folders the name alone."""
    words = ["python -m tests.claims", script, f"--data {args.data or DATA[script]}"]
    if args.data_root:
        words.append(f"--data-root {Path(args.data_root).name}")
    for name, root in args.also:
        words.append(f"--also {name} {Path(root).name}")
    if args.small:
        words.append("--small")
    if args.epochs:
        words.append(f"--epochs {args.epochs}")
    if args.more and script == args.script:
        words.append(f"-- {shlex.join(args.more)}")
    return " ".join(words)


def report(rows: list[dict], hardware: str) -> str:
    """tests/CLAIMS.md: a table for each script and series of runs."""
    text = ["# The papers' claims, measured small", "",
            "Written by `python -m tests.claims --report --results tests/claims.jsonl`, which holds "
            "a line for each run. The order is the paper's: the first before all others, or each "
            "before the next; †: not ranked. In brackets: of the first variant's run.",
            "Hardware: " + (hardware or "not said") + "."]
    for script, claims in CLAIMS.items():
        series = {row["base"]: row["command"] for row in rows if row["script"] == script}
        for base, command in series.items():
            own = {row["key"]: row for row in rows
                   if row["script"] == script and row["base"] == base}
            minutes = sum(row["minutes"] for row in own.values())
            seeds = 1 + max(row["seed"] for row in own.values())
            text += ["", f"## {script}", "", f"`{command}`: runs: {len(own)}, minutes: {minutes:.0f}",
                     "", table(script, claims, base, seeds, own)]
    return "\n".join(text) + "\n"


def parse_args(argv=None):
    """The flags; args.more, what stands after --."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("script", choices=CLAIMS, nargs="?")
    add("--data", default="", help="; ".join(f"{key}: {name}" for key, name in DATA.items()))
    add("--data-root", default="")
    add("--also", nargs=2, action="append", default=[], metavar=("DATA", "ROOT"),
        help="lddmm_face: a set of another annotation, whose landmarks are predicted, too")
    add("--seeds", type=int, default=3)
    add("--only", nargs="+", default=[], metavar="NAME", help="these claims, in this order")
    add("--epochs", type=int, default=0, help="0: the preset's")
    add("--small", action="store_true", help="the script's small setting, for a CPU")
    add("--jobs", type=int, default=1, help="runs at a time; the cores are shared out")
    add("--table", action="store_true", help="only print what has been run")
    add("--report", action="store_true", help="write --output of all that has been run")
    add("--hardware", default="", metavar="TEXT", help="for the report")
    add("--output", type=Path, default=ROOT / "tests" / "CLAIMS.md", help="of the report")
    add("--results", type=Path, default=Path("runs/claims.jsonl"))
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.more = argv[end + 1:]  # flags of the script for every run
    if not args.report and not args.script:
        parser.error(f"name a script, one of {', '.join(CLAIMS)}, or --report")
    names = [claim.name for claim in CLAIMS.get(args.script, [])]
    unknown = [name for name in args.only if name not in names]
    if unknown:
        parser.error(f"--only {unknown[0]}: {args.script} has the claims {', '.join(names)}")
    return args


def main(argv=None):
    args = parse_args(argv)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    rows = [json.loads(line) for line in lines]
    if args.report:
        args.output.write_text(report(rows, args.hardware))
        print(f"wrote {args.output}")
        return
    by_name = {claim.name: claim for claim in CLAIMS[args.script]}
    claims = [by_name[name] for name in args.only] or list(by_name.values())
    done = {row["key"]: row for row in rows}
    if not args.table:
        run_missing(args, claims, done)
    base = base_of(args.script, args)
    print(f"\n{args.script} {base}\n\n{table(args.script, claims, base, args.seeds, done)}")


if __name__ == "__main__":
    main()
