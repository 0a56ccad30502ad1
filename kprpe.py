"""KeyPoint Relative Position Encoding for Face Recognition (KP-RPE).

Minchul Kim, Yiyang Su, Feng Liu, Anil Jain, Xiaoming Liu; CVPR 2024. https://arxiv.org/abs/2403.14852

The method. A vision transformer that learned from aligned faces fails on faces that are not. KP-RPE tells it
where the face is: five keypoints, of any detector, go into the relative position encoding. What a query adds
to the attention of a key at some distance (one of 49 quantised offsets) is not a learned number but a linear
function of where the query is from the keypoints, for each head of each layer. The image is not touched.

Where each equation is:
  Eq. (1), (2)        attention                             Attention
  Eq. (3)             position embedding                    ViT
  Eq. (4)             iRPE, on queries, keys and values     ContextualRPE
  Eq. (5), (6)        attention with a bias, from a table   Attention
  Eq. (7)             f(P), absolute                        KPRPE
  Eq. (8), (9), (10)  f(P), relative; split in two parts    KPRPE
  Eq. (11)            the bias of a pair of patches         Attention
  Eq. (12)            noise on keypoints                    disturb
  Eq. (13), (14)      face aligner: weights of its anchors  DFA
  Eq. (15)            face aligner: landmarks               DFA
  Eq. (16)            fusion weighted by norms              fuse
  Eq. (17), (18)      fusion weighted by landmarks          fuse

Differs from the paper, or settles what it leaves open (code: CVLface, the authors'):
  - f(P) of Eq. (10) is linear in M - P, so it is the sum of a part of the keypoints that is the same for all
    queries and a part of the queries that is the same for all images: 196 times fewer numbers an image.
  - "Absolute" is the paper's formula. The code's adds one number to a whole row, which the softmax drops:
    that is the plain ViT, as which Table 2's first row looks. By the split, it lacks only a static table.
  - B is divided by sqrt(d) as Eq. (5) has it; code: it is not, and so learns sqrt(d) times as fast. By
    default --rpe-lr makes up for that: sqrt(d) times --lr for the tables and W_L of Eqs. 5 to 10, --lr for
    iRPE, which both divide. W_L has a bias as in the code (Table 3).
  - Tables start at 0, from which a CPU's thousand steps do not bring them far enough: the small presets
    have 50 times the rate for them, and a softmax without margin. Nor does Table 6's augmentation move the
    keypoints of aligned faces far enough for a short training to make use of them: --augment wide does.
  - Keypoints and patch centres are (x + 0.5) / W; code: keypoints x / W, half a pixel off. "No keypoints" is
    the plain ViT.
  - Eq. (12), printed as a scaling, is noise in the text: normal, alpha of the crop's side in x and in y. That
    gives the NME of 0.12 which the supplement reports for alpha = 0.1.
  - What Table 6 leaves out is the code's: --clip 5, and what decays: matrices, not vectors and embeddings.
  - Losses have their true gradients; code: the margin passes them through. Class weights are sharded.
  - Sec. 4.1's "repeated augmentation" is the code's: the next image is one of the same person.
  - Aligned: a similarity takes five points to ArcFace's in 112 px. Unaligned: the box of the landmarks times
    --margin, or the whole image, which keeps its aspect ratio between grey borders (paper: resized). Between
    the two (Fig. 5): (1 - t) times one matrix plus t times the other. Without landmarks an image is taken as
    aligned, with its keypoints at ArcFace's.
  - Outside the image is mid-grey in crops, black where the augmentation moves them (code: black).
  - TAR is read at a false accept rate of at most the target; code: at the nearest.
  - Digits: the paper gives no settings. Trained on MNIST moved by up to 6 px on a canvas of 40 px, tested on
    affNIST made by its published ranges; a normalised softmax of 10 classes.
  - Of the face aligner's training, optimiser, learning rate, augmentation, the weight of its aggregation and
    the test split of WIDER FACE are ours. Its warps have align_corners=False (code: True).
  - With --dfa keypoints are found, in training before the augmentation, and in the mirror image anew; on the
    crop as it is (code: in training with a border of 0.215).
  - Gait (Sec. 5): SwinGait-2D is not published; it is made of OpenGait's SwinGait-3D (class SwinGait). Here
    all of it is trained from scratch, at one rate, by a cosine without steps; OpenGait begins with trained
    convolutions. M is the grid of a window, in [0, 1], and serves all windows of a frame.

Train on WebFace4M on four GPUs (the paper: TinyFace rank-1 75.80 %; not run here), its keypoints in a file
like CVLface's, those of TinyFace in tinyface.landmarks.csv:
  python kprpe.py --data webface-base --data-root WF4M --landmarks WF4M.csv --gpus 4 --amp --test tinyface/
Without any data, on drawn faces, KP-RPE and the plain ViT, four minutes on two CPU cores:
  python kprpe.py
Digits; continue; evaluate with noise and between unaligned and aligned; use:
  python kprpe.py --data affnist --data-root MNIST --also-rpe none,product,irpe
  python kprpe.py --data webface-base --gpus 8 --resume
  python kprpe.py --eval RUN/last.pt --keypoint-noise 0.02,0.05,0.1 --align-steps 5 --test lfw/
  python kprpe.py --predict photo.jpg --weights RUN/last.pt        # photo.pts beside it, or --detector
The face aligner, on drawn faces, two to three minutes on a CPU; its keypoints instead of a file's:
  python kprpe.py --task dfa
  python kprpe.py --dfa runs/kprpe-dfa-faces/last.pt --fusion average,norm,landmark
Gait, drawn walkers with and without KP-RPE; Gait3D (the paper: rank-1 68.2 %; not run here):
  python kprpe.py --task gait
  python kprpe.py --task gait --data gait3d --data-root GAIT3D --gpus 4 --amp --also-rpe swin
"""
import argparse
import copy
import functools
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

from common import datasets, digits, gait, metrics, recognition, synthetic, warp

# ---- Settings ------------------------------------------------------------------------------------

# Table 6; its "large" is the text's "base".
ABLATION = dict(model="small", rpe="kp-multihead", size=112, patch=8, epochs=34, batch_size=512, lr=1e-3,
                weight_decay=0.05, warmup=3.0, drop_path=0.1, loss="adaface", sample_rate=1.0, augment="full",
                repeat=0.5, box="image", margin=1.4, unaligned=False, cache="", workers=-1)
SMALL = dict(ABLATION, model="own", epochs=40, batch_size=64, lr=6e-4, warmup=1.0, repeat=0.0, rpe_lr=50.0,
             loss="softmax", scale=32.0, box="landmarks", unaligned=True, cache="device", eval_every=7,
             augment="wide")
PRESETS = {
    "ms1m-small": dict(ABLATION),
    "webface-base": dict(ABLATION, model="base", epochs=36, batch_size=1024, lr=1e-4, sample_rate=0.6,
                         repeat=0.1),
    "folder": dict(SMALL),
    "youtube": dict(SMALL),
    "affnist": dict(SMALL, size=40, patch=4, dim=64, depth=4, heads=4, mlp_ratio=2.0, epochs=12, lr=1e-3,
                    scale=16.0, augment="none", eval_every=2),
    "faces": dict(SMALL, size=48, depth=4, dim=64, heads=4, limit=6000, epochs=12, batch_size=32,
                  also_rpe="none", align_steps=4, eval_every=6),
}
# The supplement gives the size, batch and epochs of "widerface"; the rest is ours.
WIDER = dict(size=160, batch_size=320, epochs=750, lr=1e-3, weight_decay=0.05, warmup=3.0, augment="full",
             clip=5.0, box="face", eval_every=10)
SMALL_WIDER = dict(WIDER, batch_size=16, epochs=10, lr=2e-3, warmup=1.0, augment="move", cache="device",
                   eval_every=5)
DFA_PRESETS = {
    "widerface": dict(WIDER),
    "folder": dict(SMALL_WIDER, box="landmarks"),
    "youtube": dict(SMALL_WIDER, box="landmarks"),
    "faces": dict(SMALL_WIDER),
}
# Sec. 5: 32 people x 4 sequences, 60,000 steps (93 an epoch). The rest is OpenGait's.
GAIT3D = dict(model="own", rpe="kp-multihead", dim=256, heads=16, epochs=645, batch_size=128, frames=30,
              lr=3e-4, weight_decay=0.02, warmup=0.0, clip=0.0, eval_every=65)
WALKERS = dict(GAIT3D, dim=32, heads=2, epochs=20, batch_size=32, frames=4, lr=2e-3, warmup=1.0,
               also_rpe="swin", unaligned=True, eval_every=10)
# --task, and the presets of its --data; without --data it is the last one, which needs no files.
TASKS = {"face": PRESETS, "dfa": DFA_PRESETS, "gait": {"gait3d": GAIT3D, "walkers": WALKERS}}
# Flags that a task other than "face" reads; the others are refused.
READ = {"dfa": {
    "task", "data", "data_root", "output", "epochs", "batch_size", "lr", "weight_decay", "gpus", "device",
    "workers", "seed", "amp", "compile", "limit", "resume", "eval", "predict", "weights", "box", "cache",
    "size", "eval_every", "points", "detector", "augment", "warmup", "clip"}, "gait": {
    "task", "data", "data_root", "output", "epochs", "batch_size", "lr", "weight_decay", "gpus", "device",
    "workers", "seed", "amp", "compile", "limit", "resume", "eval", "eval_every", "dim", "heads", "drop_path",
    "rpe", "also_rpe", "rpe_lr", "frames", "warmup", "clip", "unaligned"}}
RECORDS = ("ms1m-small", "webface-base")
DRAWN = {"train": 1600, "test": 400}  # faces of --data faces
DRAWN_WALKERS = {"train": dict(people=100), "test": dict(people=60, sequences=4, frames=16)}
SEQUENCES = 4  # of each person in a batch (gait)
SPOIL = dict(shift=6.0, zoom=0.2)  # of crops of 64 x 44 px, --unaligned (gait)
BOXES = ("image", "landmarks", "face")
MODELS = ("small", "base", "own", "iresnet50", "iresnet101")
CANVAS = 40  # px, side of a canvas of digits: affNIST's
# --rpe. With a bias by Eq. (5): "euclidean", "cross" and "product", from a learned table over that distance;
# kp-*, from tables made of the keypoints (Table 2), over the product distance. That is also "irpe"'s, which
# adds vectors to queries, keys and values by Eq. (4). Each keeps the positional embedding of Eq. (3).
STATIC = ("euclidean", "cross", "product")
KEYPOINT = ("kp-absolute", "kp-relative", "kp-multihead")
RPES = ("none", *STATIC, "irpe", *KEYPOINT)
SWIN = ("none", "swin", *KEYPOINT)  # of --task gait
FUSIONS = ("average", "norm", "landmark")  # --fusion


def parse_args(argv=None):
    """Flags, with the defaults of the preset of --task and --data. `args.given` lists what was typed."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--task", default="face", choices=TASKS)
    presets = TASKS[chooser.parse_known_args(argv)[0].task]
    chooser.add_argument("--data", default=[*presets][-1], choices=presets)
    data = chooser.parse_known_args(argv)[0].data
    parser = argparse.ArgumentParser(description="Keypoint relative position encoding", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("shared by all scripts").add_argument
    add("--task", default="face", choices=TASKS, help="what is learned")
    add("--data", default=data, choices=presets, help="data set, and the preset of all other flags")
    add("--data-root", default="", help="folder of the data set; the README shows the layout of each")
    add("--output", default="", help="folder of the run (default: runs/kprpe-DATA, or the next number)")
    add("--epochs", type=int, default=34, help="passes over the training set")
    add("--batch-size", type=int, default=512, help="images a step, over all GPUs")
    add("--lr", type=float, default=1e-3, help="learning rate at its highest")
    add("--weight-decay", type=float, default=0.05, help="weight decay of matrices and class weights")
    add("--gpus", type=int, default=1, help="processes to start, one a GPU; batch norms see their own share")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"], help="auto: a GPU if there is one")
    add("--workers", type=int, default=-1, help="loader processes a GPU; -1: 8 for a GPU, none for a CPU")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    add("--amp", action=switch, default=False, help="bfloat16 on a GPU; cosines and loss in float32")
    add("--compile", action=switch, default=False, help="torch.compile; minutes at first, then faster")
    add("--limit", type=int, default=0, help="at most so many images a split, but of records; "
        "of gait so many people; 0: all")
    add("--resume", action="store_true", help="continue the run in --output, or the newest run on this data")
    add("--eval", default="", metavar="CKPT", help="evaluate this checkpoint and stop")
    add("--predict", nargs="+", default=[], metavar="PATH", help="images or folders to embed")
    add("--weights", default="", metavar="CKPT", help="checkpoint for --predict")
    add("--box", default="image", help="the unaligned crop: 'image' (all of it), 'landmarks' (their box) or "
        "'face' (the set's own box); with --predict, x0,y0,x1,y1 in pixels")
    add("--cache", default="", help="keep decoded crops: a folder (one file, opened again by the next run), "
        "or 'device' (in the GPU's memory, where the warp then runs; on a CPU in memory)")
    add("--size", type=int, default=112, help="side of the crop in px, a multiple of --patch")
    add("--margin", type=float, default=1.4, help="side of the unaligned crop over the longer side of "
        "the box; 1.4 suits a box of 68 landmarks, 3 one of five")
    add("--eval-every", type=int, default=1, help="epochs between evaluations; the last is always evaluated")
    add("--points", type=int, default=68, help="landmarks of the drawn faces; every other set has its own")
    add("--detector", default="", metavar="ONNX", help="YuNet model file, to find the faces of --predict and "
        "their keypoints")
    own_flags(parser)
    parser.set_defaults(**presets[data])
    args = parser.parse_args(argv)
    # argparse fills in no default where the namespace has a value, so what is not None now was typed.
    typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    args.given = sorted(key for key, value in vars(typed).items() if value is not None)
    check_flags(args, parser.error)
    return args


def own_flags(parser: argparse.ArgumentParser):
    """Adds the flags of this script alone."""
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("network").add_argument
    add("--model", default="small", choices=MODELS, help="of Table 3, or a ViT by the next four flags")
    add("--dim", type=int, default=192, help="width of --model own")
    add("--depth", type=int, default=6, help="layers of --model own")
    add("--heads", type=int, default=6, help="attention heads of --model own")
    add("--mlp-ratio", type=float, default=3.0, help="hidden width over --dim of --model own")
    add("--patch", type=int, default=8, help="side of a patch in px")
    add("--drop-path", type=float, default=0.1, help="chance that an image skips the last block's branches")
    add("--rpe", default="kp-multihead", choices=(*RPES, "swin"), help="position encoding of ViTs (Tables 1 "
        "and 2); 'swin': --task gait's own, of which it also has none and kp-*")
    add("--also-rpe", default="", help="encodings to train with after it, for comparison, as none,irpe")
    add("--num-keypoints", type=int, default=5, help="the first 0 to 5 of the keypoints (supp. 2.2)")
    add("--draw-keypoints", action=switch, default=False, help="mark them in the image (Fig. 1, Abs-PE*)")
    add = parser.add_argument_group("training").add_argument
    add("--loss", default="adaface", choices=list(MARGINS), help="margin of the softmax (supp. 2.1)")
    add("--scale", type=float, default=64.0, help="what cosines are multiplied by in the softmax")
    add("--sample-rate", type=float, default=1.0, help="PartialFC: share of the classes that a step sees")
    add("--rpe-lr", type=float, default=0.0, help="learning rate of relative encodings (all of --rpe but "
        "none) over --lr; 0: sqrt(d) for biases, as the code's form of Eq. 5 learns, and 1 for irpe")
    add("--augment", default="full", choices=list(AUGMENTATIONS), help="'full' (Table 6), 'wide' "
        "(more shift and rotation), 'move' (more shift, geometry alone), 'plain' (AdaFace's: crop, low "
        "resolution, colour, mirror), 'mirror' or 'none'")
    add("--repeat", type=float, default=0.5, help="chance that the next image is one of the same person")
    add("--warmup", type=float, default=3.0, help="epochs over which the rate rises to --lr")
    add("--frames", type=int, default=30, help="frames of a sequence that a step sees (--task gait)")
    add("--clip", type=float, default=5.0, help="largest norm of the gradient; 0: any")
    add("--landmarks", default="", metavar="PATH", help="landmarks of a set that has none of its own: a CSV "
        "of image,x0,y0,..., or a folder with the images' tree of .pts, as the landmark scripts write it")
    add("--dfa", default="", metavar="CKPT", help="find the keypoints of crops, and of the images of "
        "--predict, by this checkpoint of --task dfa")
    add = parser.add_argument_group("evaluation").add_argument
    add("--fusion", default="", help="also identify templates of the test split, videos, by features that "
        "are fused so (Eqs. 16 to 18): some of average,norm,landmark")
    add("--unaligned", action=switch, default=False, help="also verify on unaligned crops (Tables 1, 2)")
    add("--align-steps", type=int, default=0, help="at the end also verify in so many steps between (Fig. 5)")
    add("--keypoint-noise", default="", help="at the end also verify with noise on keypoints, shares of "
        "the crop's side, as 0.02,0.05,0.1 (Eq. 12)")
    add("--test", nargs="+", default=[], metavar="PATH", help="sets to verify and identify on, beside the "
        "test split: a .bin, the folder of LFW, TinyFace, IJB-C, ..., a .csv of pairs or of roles; "
        "landmarks, if they have none, from PATH.landmarks.csv")
    add("--align", action=switch, default=True, help="whether --predict aligns faces by their keypoints")


def check_flags(args, error: Callable[[str], None]):
    """Calls `error` with a message for the first flag whose value cannot be meant."""
    wanted = [(name, getattr(args, name) >= least, f"at least {least}") for name, least in [
        ("epochs", 1), ("batch_size", 2), ("gpus", 1), ("limit", 0), ("seed", 0), ("eval_every", 1),
        ("dim", 1), ("depth", 1), ("heads", 1), ("patch", 1), ("size", 1), ("workers", -1),
        ("align_steps", 0), ("frames", 1)]]
    wanted += [(name, 0 <= getattr(args, name) < math.inf, "at least 0") for name in (
        "weight_decay", "warmup", "clip", "rpe_lr")]
    wanted += [(name, 0 < getattr(args, name) < math.inf, "more than 0") for name in (
        "lr", "margin", "mlp_ratio", "scale")]
    wanted += [(name, 0 <= getattr(args, name) < 1, "0 to 1, below 1") for name in ("drop_path", "repeat")]
    encodings = SWIN if args.task == "gait" else RPES
    side = 32 if args.task == "dfa" else 16 if args.model.startswith("iresnet") else args.patch
    wanted += [("size", args.size % max(side, 1) == 0, f"a multiple of {side}"),
               ("dim", args.dim % max(args.heads, 1) == 0, f"a multiple of --heads {args.heads}"),
               ("batch_size", args.task != "gait" or args.batch_size % (SEQUENCES * args.gpus) == 0,
                f"a multiple of {SEQUENCES} sequences of a person x --gpus {args.gpus}"),
               ("num_keypoints", 0 <= args.num_keypoints <= 5, "0 to 5"),
               ("sample_rate", 0 < args.sample_rate <= 1, "above 0, at most 1"),
               ("points", args.points in datasets.SCHEMES, f"one of {list(datasets.SCHEMES)}"),
               ("keypoint_noise", all(0 < a <= 0.3 for a in numbers(args.keypoint_noise)),
                "numbers above 0, at most 0.3, as 0.02,0.05"),
               ("rpe", args.rpe in encodings, f"one of {', '.join(encodings)} for --task {args.task}"),
               ("also_rpe", {*words(args.also_rpe)} <= {*encodings}, f"some of {', '.join(encodings)}"),
               ("fusion", {*words(args.fusion)} <= {*FUSIONS}, f"some of {', '.join(FUSIONS)}")]
    for name, holds, what in wanted:
        if not holds:
            error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {what}")
    if args.model.startswith("iresnet") and "also_rpe" not in args.given:
        args.also_rpe = ""  # a preset's
    if args.model.startswith("iresnet") and (args.rpe != "none" or args.also_rpe or args.data == "affnist"):
        error(f"--model {args.model} is for faces, and has no position encoding: give --rpe none")
    if args.batch_size % args.gpus:
        error(f"--batch-size {args.batch_size} does not divide over --gpus {args.gpus}")
    if args.box not in BOXES and (not args.predict or parse_box(args.box) is None):
        error(f"--box {args.box}: expected image, landmarks or face, with --predict x0,y0,x1,y1 in pixels, "
              f"x0 < x1, y0 < y1 (written --box=-5,... where x0 is negative)")
    if args.cache and "cache" in args.given and (args.box == "image" or args.data in (*RECORDS, "affnist")):
        error("--cache goes with --box landmarks or face; whole images are read anew")
    refuse_idle(args, error)
    if args.detector and not os.path.isfile(args.detector):
        error(f"--detector: no file {args.detector}")
    if bool(args.predict) != bool(args.weights):
        error("--predict PATH and --weights CKPT belong together: images, and a checkpoint of this script")
    if args.eval and (args.predict or args.resume):
        error("--eval goes neither with --predict nor with --resume")
    if args.detector and not args.predict:
        error("--detector belongs to --predict")


def refuse_idle(args, error: Callable[[str], None]):
    """Calls `error` with a message for the first flag that was typed and that nothing would read."""
    typed = lambda *names: [f"--{name.replace('_', '-')}" for name in names
                            if name in args.given and getattr(args, name)]
    for flag in typed(*sorted(vars(args).keys() - READ[args.task] if args.task in READ else {"frames"})):
        error(f"{flag} does not belong to --task {args.task}")
    trains = not (args.eval or args.predict or args.resume)  # else the checkpoint says what the data are
    if args.data == "affnist":
        for flag in typed("box", "margin", "landmarks", "test", "align_steps", "unaligned", "points", "dfa",
                          "fusion"):
            error(f"{flag} is for faces, not for --data affnist")
        if args.size != CANVAS or args.augment != "none":
            error(f"--data affnist: its canvas is its augmentation; expected --size {CANVAS} --augment none")
    if trains and args.data in (*RECORDS, "affnist") and not args.data_root:
        error(f"--data {args.data}: give --data-root, the folder of its files")
    if (trains or "data" in args.given) and args.data in ("faces", "youtube") and args.landmarks:
        error(f"--landmarks: the images of --data {args.data} have their own")
    for flag in typed("dim", "depth", "heads", "mlp_ratio") if args.model != "own" else ():
        error(f"{flag} belongs to --model own, not {args.model}")
    for flag in typed("also_rpe") if args.eval or args.predict else ():
        error(f"{flag} belongs to training, not to --eval and --predict")
    if trains and "num_keypoints" in args.given and not {args.rpe, *words(args.also_rpe)} & {*KEYPOINT}:
        error(f"--num-keypoints belongs to --rpe {', '.join(KEYPOINT)}, not {args.rpe}")


def words(text: str) -> list[str]:
    """The words of "none,irpe"."""
    return text.split(",") if text else []


def numbers(text: str) -> list[float]:
    """The numbers of "0.02,0.05"; [nan] if they are none."""
    try:
        return [float(word) for word in words(text)]
    except ValueError:
        return [math.nan]


def parse_box(text: str) -> list[float] | None:
    """The numbers of "x0,y0,x1,y1" if they are a box."""
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
    except ValueError:
        return None
    return [x0, y0, x1, y1] if -math.inf < x0 < x1 < math.inf and -math.inf < y0 < y1 < math.inf else None


# ---- Position encodings: Sec. 3 ------------------------------------------------------------------

DISTANCES = {"euclidean": 7, "cross": 14, "product": 49}  # K of each distance, on any grid


def quantise(x: torch.Tensor) -> torch.Tensor:
    """Piecewise index of Wu et al., "Rethinking and Improving Relative Position Encoding for Vision
    Transformer" (iRPE), ICCV 2021, at the code's ratio 1.9: whole offsets -> long, 0, +-1, +-2 (for 2 and 3)
    and +-3 (from 4 on)."""
    alpha, beta, gamma = 1.9, 2 * 1.9, 8 * 1.9
    far = alpha + (x.abs().clamp(min=1) / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
    # The code cuts to a whole number after the minimum, so that beta = 3.8 makes 3 the largest index.
    return torch.where(x.abs() <= alpha, x.round(), x.sign() * far.round().clamp(max=beta)).long()


def bucket_ids(height: int, width: int, method: str) -> torch.Tensor:
    """d(i, j) of all pairs of N = height * width patches, query i and key j both counted row by row.

    Args: method, "euclidean" (the rounded distance, quantised: 7 ids, of which the lower 3 stay free, as no
        distance is negative), "product" (49 ids: quantised row offset times quantised column offset) or
        "cross" (7 ids of the rows and 7 others of the columns; the values of both are added).
    Returns: (N, N) long; of "cross" (2, N, N).   Raises: ValueError.
    Source: Sec. 3.1; iRPE's code. Offsets are query - key: 24 is a patch's own product id, and on a 14 x 14
        grid the query (7, 7) of Fig. 3 has 48 at the key (0, 0).
    """
    if method not in DISTANCES or height < 1 or width < 1:
        raise ValueError(f"distance {method!r} on a grid of {height} x {width}: expected one of "
                         f"{', '.join(DISTANCES)}, and a positive height and width")
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2).double()
    rows, columns = (places[:, None] - places).unbind(-1)                     # (N, N) each, query - key
    if method == "euclidean":
        return quantise(rows.hypot(columns).round()) + 3
    rows, columns = quantise(rows) + 3, quantise(columns) + 3
    return 7 * rows + columns if method == "product" else torch.stack([rows, 7 + columns])


class GatherPairs(torch.autograd.Function):
    """keypoint (B, H, K) + static (H, N, K) or 0, read at ids (1 or 2, N, N) -> (B, H, N, N) of `dtype`.
    As torch.gather, which however keeps the sum, (B, H, N, K), for the backward pass."""

    @staticmethod
    def forward(ctx, keypoint, static, ids, dtype):
        ctx.save_for_backward(ids)
        ctx.type, (B, H, K), N = keypoint.dtype, keypoint.shape, ids.shape[1]
        ctx.shape = (B, H, N, K)
        table = (keypoint[:, :, None] + static).to(dtype).expand(ctx.shape)
        maps = [table.gather(-1, own.expand(B, H, -1, -1)) for own in ids]
        return sum(maps[1:], maps[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        table = grad.new_zeros(ctx.shape, dtype=ctx.type)
        for own in ctx.saved_tensors[0]:
            table.scatter_add_(-1, own.expand_as(grad), grad.to(ctx.type))
        return table.sum(2), table.sum(0) if ctx.needs_input_grad[1] else None, None, None


class PairBias(nn.Module):
    """From values by bucket to values by pair of patches: bias_ij = (keypoint + static_i)[d(i, j)].

    Args: grid, patches (height, width); method, as of `bucket_ids`. `forward`: keypoint (B, H, K); static (H,
    N, K) or 0; dtype, of the queries -> (B, H, N, N). The backward pass needs constants alone, and nothing of
    the images, whose tables f(P) would take 14.8 MB each for the base network.
    """

    def __init__(self, grid: tuple[int, int], method: str):
        super().__init__()
        ids = bucket_ids(*grid, method).view(-1, *(math.prod(grid),) * 2)
        pairs = (ids == torch.arange(DISTANCES[method])[:, None, None, None]).any(1)
        self.register_buffer("ids", ids, persistent=False)                    # (1 or 2, N, N)
        # M: N filled up with zeros to a multiple of 8. A GPU's attention copies a bias of other row lengths.
        # In bfloat16, which is exact for 0 and 1, all layers of a bfloat16 run share it without a cast.
        pairs = F.pad(pairs.bfloat16(), (0, -len(ids[0]) % 8))
        self.register_buffer("pairs", pairs, persistent=False)                # (K, N, M)

    def forward(self, keypoint, static, dtype):
        # On a GPU a gather's backward scatters with atomics; the product runs on the matrix units both ways,
        # and always adds in the same order. On one thread of a CPU, forward and backward (14 x 14 patches,
        # B = H = 8): gather 5.2 ms, product 17.5 ms, an index into the flattened tables 9.2 ms.
        return (self.product if keypoint.is_cuda else self.gather)(keypoint, static, dtype)

    def gather(self, keypoint, static, dtype):
        """By index, from a table (B, H, N, K) that is dropped at once."""
        static = static if isinstance(static, torch.Tensor) else keypoint.new_zeros(())
        return GatherPairs.apply(keypoint, static, self.ids, dtype)

    def product(self, keypoint, static, dtype):
        """By products with 0 and 1, one for each image and one for all; of a row's M keys a view of N."""
        pairs = self.pairs.to(dtype)
        bias = torch.einsum("bhk,kij->bhij", keypoint.to(dtype), pairs)       # (B, H, N, M)
        if isinstance(static, torch.Tensor):
            bias += torch.einsum("hik,kij->hij", static.to(dtype), pairs)
        return bias[..., :self.ids.shape[1]]                                  # (B, H, N, N)


class ContextualRPE(nn.Module):
    """Eq. (4): attention with iRPE on queries, keys and values; its tables serve all heads of one layer.

    Args: dim, of a head; buckets, K.   q, k, v (B, H, N, dim), ids (1, N, N) of d(i, j) -> (B, H, N, dim).
    Source: iRPE, contextual mode. Eq. (4) has a term R^Q R^K too: paper; code: none; we follow the code. R^Q
        is a table over d(j, i): code; paper: over d(i, j), the same but for the order of the buckets.
    """

    def __init__(self, dim: int, buckets: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.zeros(buckets, dim)) for _ in range(3))

    def forward(self, q, k, v, ids):
        ids = ids[None].expand(*q.shape[:2], -1, -1)                          # (B, H, N, N)
        # Eq. (4): e_ij = (Q_i K_j + Q_i R^K[d(i, j)] + R^Q[d(j, i)] K_j) / sqrt(d)
        on_k, on_q = (q @ self.k.T).gather(-1, ids), (k @ self.q.T).gather(-1, ids).mT
        a = ((q @ k.mT + on_k + on_q) * q.shape[-1] ** -0.5).softmax(-1)
        # Eq. (4): Y_i = sum_j a_ij (V_j + R^V[d(i, j)]), the a_ij of one bucket summed before its R^V
        by_bucket = a.new_zeros(*a.shape[:-1], len(self.v)).scatter_add(-1, ids, a)   # (B, H, N, K)
        return a @ v + by_bucket @ self.v


class KPRPE(nn.Module):
    """Keypoint relative position encoding: what each query adds to its attention by distance bucket.

    Keypoints are ((x + 0.5) / W, (y + 0.5) / H) for pixel centres at whole numbers, as the grid's are patch
    centres: so a mirrored image has the keypoints (1 - x, y), left and right renamed. (Code: x / W, half a
    pixel off its grid.) They may lie outside [0, 1], and gradients reach them.
    Args: keypoints, L; grid, patches (height, width); depth, layers of the network; heads; variant, of Sec.
        3.2: "absolute" or "relative" (one table for all layers and heads) or "multihead" (one for each), or
        the --rpe flag that names it.
    Raises: ValueError.
    """

    def __init__(self, keypoints: int, grid: tuple[int, int], depth: int, heads: int, variant: str):
        super().__init__()
        if f"kp-{variant.removeprefix('kp-')}" not in KEYPOINT or keypoints < 1:
            raise ValueError(f"variant {variant!r} of {keypoints} keypoints: expected absolute, relative or "
                             "multihead, and at least 1 keypoint")
        self.keypoints, self.depth, self.heads = keypoints, depth, heads
        self.variant = variant.removeprefix("kp-")
        self.own = (depth, heads) if self.variant == "multihead" else (1, 1)
        # W_L with a bias: code, and Table 3's parameters; paper: without. At 0 the net is the plain ViT.
        self.keypoint_linear = nn.Linear(2 * keypoints, math.prod(self.own) * DISTANCES["product"])
        nn.init.zeros_(self.keypoint_linear.weight)
        nn.init.zeros_(self.keypoint_linear.bias)
        rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid)
        self.register_buffer("grid", torch.cartesian_prod(rows, columns).view(-1, 2).flip(1),
                             persistent=False)                                # (N, 2) M, xy in [0, 1]

    def spread(self, f: torch.Tensor) -> torch.Tensor:
        """What W_L puts out, (..., depth * H * K) or one table's (..., K) -> (depth, H, ..., K)."""
        f = f.unflatten(-1, (*self.own, -1)).movedim((-3, -2), (0, 1))
        return f.expand(self.depth, self.heads, *f.shape[2:])

    def coordinates(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """P (B, L, 2) and M (N, 2), in the type of the weights.   Raises: see `check_keypoints`."""
        weight = self.keypoint_linear.weight
        return check_keypoints(points, self.keypoints).to(weight), self.grid.to(weight)

    def tables(self, points: torch.Tensor) -> torch.Tensor:
        """f(P) as the paper's equations read, for reference: (B, L, 2) in [0, 1] -> (depth, B, H, N, K)."""
        points, grid = self.coordinates(points)
        if self.variant == "absolute":
            # Eq. (7): B_ij = f(P)[d(i, j)], with f(P) = P' W_L: the same for every query
            # (Code: its bias has an axis of length 1 where the keys should be, which cancels in the softmax.)
            D = points.flatten(1)[:, None].expand(-1, len(grid), -1)          # (B, N, 2L)
        else:
            # Eq. (8): D = Expand(M, dim=1) - Expand(P, dim=0)
            D = grid[:, None] - points[:, None]                               # (B, N, L, 2)
            # Eq. (9): D' = Reshape(D)
            D = D.flatten(2)                                                  # (B, N, 2L)
        # Eq. (10): f(P) = D' W_L
        return self.spread(self.keypoint_linear(D)).transpose(1, 2)           # (depth, B, H, N, K)

    def split(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`tables` as a keypoint part (depth, B, H, K) and a static part (depth, H, N, K), to be added.

        f(P) is linear in M - P, so W_L acts on P and on M apart. What depends on the image does not depend on
        the query, and is N times smaller than the tables; what depends on the query is the same for all
        images ("absolute": 0), so that the paper's "unique for each query" holds of this part alone.
        """
        points, grid = self.coordinates(points)
        weight, bias = self.keypoint_linear.weight, self.keypoint_linear.bias
        with torch.autocast(points.device.type, enabled=False):
            # Eq. (10) for all i: sum_l (M_i - P_l) w_l + b = (b - sum_l P_l w_l) + M_i sum_l w_l
            absolute = self.variant == "absolute"
            keypoint = F.linear(points.flatten(1) * (1 if absolute else -1), weight, bias)      # (B, out)
            slope = weight.unflatten(1, (-1, 2)).sum(1)                       # (out, 2)
            static = F.linear(grid, torch.zeros_like(slope) if absolute else slope)             # (N, out)
        return self.spread(keypoint).transpose(1, 2), self.spread(static)


def check_keypoints(points: torch.Tensor, count: int) -> torch.Tensor:
    """Keypoints (B, count, 2) as they are.   Raises: ValueError for another shape, and for values outside
    [-2, 3] or not finite; values on a GPU are not read, as that would wait for it."""
    if points.ndim != 3 or points.shape[1:] != (count, 2):
        raise ValueError(f"keypoints have the shape {tuple(points.shape)}: expected (B, {count}, 2)")
    if points.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(((points >= -2) & (points <= 3)).all()):
            raise ValueError(f"keypoints from {points.min():g} to {points.max():g}: expected about [0, 1]; "
                             "divide those in pixels, (x + 0.5) / width and (y + 0.5) / height")
    return points


# ---- Networks ------------------------------------------------------------------------------------

# Table 3. The code's names; the supplement's "large" is the text's "base".
VIT_SIZES = {"small": dict(dim=512, depth=12, heads=8, mlp_ratio=5, patch=8, image_size=112),
             "base": dict(dim=512, depth=24, heads=16, mlp_ratio=3, patch=8, image_size=112)}


class Attention(nn.Module):
    """Multi-head self-attention: tokens (B, N, dim) -> the same, with the position encoding of one layer.

    Args: rpe, one of RPES; buckets, K. `forward` takes `pairs`, a PairBias unless rpe is "none", and of kp-*
    the `parts` of the layer's table, keypoint (B, H, K) and static (H, N, K). The bias (B, H, N, N) is made
    here: no other layer's exists besides, but what attention keeps for the backward pass.
    """

    def __init__(self, dim: int, heads: int, rpe: str, buckets: int):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.zeros(heads, buckets)) if rpe in STATIC else None
        self.contextual = ContextualRPE(dim // heads, buckets) if rpe == "irpe" else None

    def forward(self, x, pairs=None, parts=None):
        # Eq. (1): Q_i = x_i W_Q, K_j = x_j W_K, V_j = x_j W_V
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        if self.contextual is not None:
            y = self.contextual(q, k, v, pairs.ids)
        else:
            bias = None
            if self.table is not None:
                # Eq. (6): B_ij = W[d(i, j)]
                bias = pairs(self.table[None] * self.scale, 0, q.dtype)       # (1, H, N, N)
            elif parts is not None:
                # Eq. (11): B_ij = f(P)[i, d(i, j)]
                bias = pairs(*(part * self.scale for part in parts), q.dtype)                   # (B, H, N, N)
            # Eq. (2), Eq. (5): Y = softmax((Q K^T + B) / sqrt(d)) V, where the tables of B are divided before
            # they are spread. Code: Q K^T / sqrt(d) + B; its W_L and tables times sqrt(d) are ours.
            y = F.scaled_dot_product_attention(q, k, v, bias)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block (B, N, dim) -> the same: attention, then a hidden layer of ReLU6.
    drop: chance that a sample skips a branch (stochastic depth, Huang et al., ECCV 2016)."""

    def __init__(self, dim: int, heads: int, hidden: int, drop: float, rpe: str, buckets: int):
        super().__init__()
        self.drop = drop
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads, rpe, buckets)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, hidden), act=nn.ReLU6(), fc2=nn.Linear(hidden, dim)))

    def skip(self, x):
        """A branch's output, 0 for the samples that skip it, the others scaled up in exchange."""
        if not self.training or self.drop == 0:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop).div_(1 - self.drop)

    def forward(self, x, pairs=None, parts=None):
        x = x + self.skip(self.attn(self.norm1(x), pairs, parts))
        return x + self.skip(self.mlp(self.norm2(x)))


def check_image(image: torch.Tensor, wanted: tuple[int, int, int], training: bool) -> None:
    """Raises ValueError unless images are (B, *wanted), and B at least 2 in training."""
    if image.ndim != 4 or image.shape[1:] != wanted:
        raise ValueError(f"images have the shape {tuple(image.shape)}: expected (B, C, H, W) with C, H, W = "
                         f"{', '.join(map(str, wanted))}")
    if training and len(image) < 2:
        raise ValueError("a training batch of 1 image: batch norm needs at least 2; raise --batch-size")


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Embeddings out of autocast: norms and cosines are taken of them."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ViT(nn.Module):
    """Images (B, channels, H, W) [, keypoints] -> embeddings (B, features), not normalised.

    Args: size, "small", "base", or a dict with any of the keys of VIT_SIZES (the others as in "small";
        image_size is a side, or (height, width)); rpe, one of RPES; num_keypoints of kp-*, the first of the
        five (as the code has it), 0 for the plain ViT (supp. 2.2); channels; features; drop_path, of the last
        block, rising evenly from 0.
    Raises: ValueError.   Source: Sec. 4.1 and Table 3; insightface's class, whose names of weights are kept.
    """

    def __init__(self, size: str | Mapping = "small", rpe: str = "none", num_keypoints: int = 5,
                 channels: int = 3, features: int = 512, drop_path: float = 0.1):
        super().__init__()
        own = VIT_SIZES.get(size) if isinstance(size, str) else dict(size)
        if rpe not in RPES or num_keypoints < 0 or own is None or not own.keys() <= VIT_SIZES["small"].keys():
            raise ValueError(f"ViT of size {size!r}, rpe {rpe!r}, {num_keypoints} keypoints: expected "
                             f"{', '.join(VIT_SIZES)} or a dict of {', '.join(VIT_SIZES['small'])}; one of "
                             f"{', '.join(RPES)}; and at least 0")
        dim, depth, heads, mlp_ratio, patch, image_size = (VIT_SIZES["small"] | own).values()
        side = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if dim % heads or side[0] % patch or side[1] % patch:
            raise ValueError(f"dim {dim} by {heads} heads, images of {side[0]} x {side[1]} px by patches of "
                             f"{patch}: expected no remainder")
        # Supp. 2.2 calls "no keypoints" the vanilla ViT, though W_L's bias would remain, an Eq. (6).
        self.rpe_name = "none" if rpe in KEYPOINT and num_keypoints == 0 else rpe
        self.num_keypoints, self.wanted = num_keypoints, (channels, *side)
        grid = (side[0] // patch, side[1] // patch)
        tokens, distance = math.prod(grid), rpe if rpe in STATIC else "product"
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, dim, patch, patch)))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, int(dim * mlp_ratio), drop_path * i / max(depth - 1, 1), self.rpe_name,
                  DISTANCES[distance]) for i in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.feature = nn.Sequential(nn.Linear(tokens * dim, dim, bias=False), nn.BatchNorm1d(dim, eps=2e-5),
                                     nn.Linear(dim, features, bias=False),
                                     nn.BatchNorm1d(features, eps=2e-5))
        self.init_weights()
        # After the weights are drawn: its own start is 0.
        self.rpe = KPRPE(num_keypoints, grid, depth, heads, rpe) if self.rpe_name in KEYPOINT else None
        self.pairs = None if self.rpe_name == "none" else PairBias(grid, distance)

    def init_weights(self):
        """As insightface: normal weights of 0.02, cut at two units, biases 0; convolutions as torch draws."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def parts(self, keypoints: torch.Tensor | None):
        """`KPRPE.split` layer by layer, or None for each.   Raises: ValueError."""
        if self.rpe is None:
            return [None] * len(self.blocks)
        if keypoints is None:
            raise ValueError(f"--rpe kp-{self.rpe.variant} needs keypoints (B, {self.num_keypoints}, 2) in "
                             "[0, 1] beside the images")
        if keypoints.ndim == 3 and keypoints.shape[1] == 5:
            keypoints = keypoints[:, :self.num_keypoints]
        return zip(*self.rpe.split(keypoints))

    def forward(self, image: torch.Tensor, keypoints: torch.Tensor | None = None) -> torch.Tensor:
        check_image(image, self.wanted, self.training)
        x = self.patch_embed(image)                                           # (B, dim, h, w)
        # Eq. (3): x' = x + PE
        x = x.flatten(2).mT + self.pos_embed                                  # (B, N, dim)
        for block, parts in zip(self.blocks, self.parts(keypoints)):
            x = block(x, self.pairs, parts)
        return at_least_float32(self.feature(self.norm(x).flatten(1)))        # (B, features)


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """(B, cin, H, W) -> (B, cout, H/stride, W/stride). No bias: the batch norm behind it has a shift."""
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_bn(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, act=None) -> nn.Sequential:
    """`conv` (0), batch norm (1) and, if its class is given, an activation (2); the shapes of `conv`."""
    norm = nn.BatchNorm2d(cout)
    return nn.Sequential(conv(cin, cout, kernel, stride, groups), norm, *([act(inplace=True)] if act else []))


class IRBlock(nn.Module):
    """Batch norm, two 3x3 convolutions, shortcut: (B, cin, H, W) -> (B, planes, H/stride, W/stride).
    Source: Deng et al., "ArcFace", CVPR 2019 (improved residual unit); AdaFace's code."""

    def __init__(self, cin: int, planes: int, stride: int):
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride) if cin == planes else conv_bn(cin, planes, 1, stride)
        self.res_layer = nn.Sequential(nn.BatchNorm2d(cin), *conv_bn(cin, planes, 3), nn.PReLU(planes),
                                       *conv_bn(planes, planes, 3, stride))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class IResNet(nn.Module):
    """Table 3's comparators, as AdaFace has them: images (B, 3, size, size) -> (B, features), not normalised.
    `forward` takes keypoints like `ViT` and does not use them.
    Args: depth, 50 or 101; size of the images in px, a multiple of 16.   Raises: ValueError.
    Source: AdaFace's code, whose names of weights are kept."""

    def __init__(self, depth: int = 50, size: int = 112, features: int = 512):
        super().__init__()
        units = {50: (3, 4, 14, 3), 101: (3, 13, 30, 3)}.get(depth)
        if units is None or size % 16 or size < 16:
            raise ValueError(f"IResNet{depth}, images of {size} px: expected 50 or 101, and a multiple of 16")
        self.wanted = (3, size, size)
        self.input_layer = nn.Sequential(*conv_bn(3, 64, 3), nn.PReLU(64))
        cin, blocks = 64, []
        for planes, count in zip((64, 128, 256, 512), units):
            for i in range(count):
                blocks.append(IRBlock(cin, planes, 1 if i else 2))
                cin = planes
        self.body = nn.Sequential(*blocks)
        self.output_layer = nn.Sequential(nn.BatchNorm2d(512), nn.Dropout(0.4), nn.Flatten(),
                                          nn.Linear(512 * (size // 16) ** 2, features),
                                          nn.BatchNorm1d(features, affine=False))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: torch.Tensor, keypoints: torch.Tensor | None = None) -> torch.Tensor:
        check_image(image, self.wanted, self.training)
        return at_least_float32(self.output_layer(self.body(self.input_layer(image))))


# ---- Losses --------------------------------------------------------------------------------------

class MarginLogits(torch.autograd.Function):
    """s * (cosines, clamped to +-limit and with margin(.) on the labels' own).

    Autograd on the plain formula would keep or make six matrices of the logits' size; this keeps a byte for
    each cosine and d margin / d cos at the labels, which autograd finds, and makes one matrix each way.
    """

    @staticmethod
    def forward(ctx, cosines, index, margin, limit, scale):
        with torch.enable_grad():
            cosine = cosines.gather(1, index).detach().requires_grad_()                     # (B, 1)
            target = margin(cosine.clamp(-limit, limit))
            slope, = torch.autograd.grad(target.sum(), cosine)
        ctx.scale = scale
        ctx.save_for_backward(cosines.abs() <= limit, index, slope)
        return cosines.clamp(-limit, limit).scatter_(1, index, target.detach()).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inside, index, slope = ctx.saved_tensors
        own = slope * grad.gather(1, index)
        return (grad * inside).scatter_(1, index, own).mul_(ctx.scale), None, None, None, None


class Margin(nn.Module):
    """What the three losses share: forward(cosines, norms, labels) -> logits (B, C), for cross entropy.

    Args: cosines (B, C) between embeddings and class centres; norms (B,) of the embeddings, used by AdaFace;
        labels (B,) long, -1 where the class is not among the C, as in another process's shard.
    The gradient is that of the formulas, and finite at cos = +-1, with the clamps of the AdaFace repository.
    Code (CVLface, insightface): clamped to +-1 only, and the margin passes the gradient through unchanged.
    """

    def __init__(self, m: float, eps: float, scale: float):
        super().__init__()
        self.m, self.eps, self.scale = m, eps, scale

    def target(self, cosine: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """The label's cosine (B, 1) with the margin; norms (B, 1)."""
        raise NotImplementedError

    def turned(self, cosine: torch.Tensor, angle) -> torch.Tensor:
        """cos(theta + angle), the sum kept within 0 and pi, beyond which the cosine would rise again."""
        return (cosine.acos() + angle).clamp(self.eps, math.pi - self.eps).cos()

    def forward(self, cosines: torch.Tensor, norms: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        norms, labels = norms.detach()[:, None], labels[:, None]

        def margin(cosine):
            return torch.where(labels < 0, cosine, self.target(cosine, norms))

        return MarginLogits.apply(cosines, labels.clamp(min=0), margin, 1 - self.eps, self.scale)


class ArcFace(Margin):
    """s cos(theta + m) for the label, s cos(theta) for the others."""

    def __init__(self, m: float = 0.5, scale: float = 64.0):
        super().__init__(m, 1e-4, scale)

    def target(self, cosine, norms):
        return self.turned(cosine, self.m)


class CosFace(Margin):
    """s (cos(theta) - m) for the label, s cos(theta) for the others."""

    def __init__(self, m: float = 0.4, scale: float = 64.0):
        super().__init__(m, 1e-4, scale)

    def target(self, cosine, norms):
        return cosine - self.m


class AdaFace(Margin):
    """s (cos(theta - m z) - (m + m z)) for the label, s cos(theta) for the others, with z in [-1, 1] the
    embedding's norm, a sign of image quality, against the running mean and standard deviation of all norms.

    A training step updates these (buffers) before it uses them: `norms` are those of the batch over all
    processes, as PartialFC gives them. Code: t is 0.01 in every configuration, 1 by the class's default.
    """

    def __init__(self, m: float = 0.4, h: float = 0.333, t: float = 0.01, scale: float = 64.0):
        super().__init__(m, 1e-3, scale)
        self.h, self.t = h, t
        self.register_buffer("batch_mean", torch.full((1,), 20.0))
        self.register_buffer("batch_std", torch.full((1,), 100.0))

    @torch.no_grad()
    def quality(self, norms: torch.Tensor) -> torch.Tensor:
        """z (B, 1) in [-1, 1] of norms (B, 1)."""
        norms = norms.clamp(0.001, 100)
        if self.training:
            self.batch_mean.lerp_(norms.mean().to(self.batch_mean), self.t)
            if len(norms) > 1:  # one norm has no standard deviation
                self.batch_std.lerp_(norms.std().to(self.batch_std), self.t)
        return (self.h * (norms - self.batch_mean) / (self.batch_std + 1e-3)).clamp(-1, 1)

    def target(self, cosine, norms):
        z = self.quality(norms)
        # g_angle = -m z, g_add = m z + m
        return self.turned(cosine, -self.m * z) - (self.m * z + self.m)


MARGINS = {"adaface": AdaFace, "arcface": ArcFace, "cosface": CosFace,
           "softmax": functools.partial(CosFace, 0)}  # --loss


def ranks() -> tuple[int, int]:
    """The rank of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """Over all processes, in place; nothing in a single one."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """The (B, ...) of all processes, one after another in the order of their ranks; all have the same B."""
    if not dist.is_initialized():
        return tensor
    gathered = tensor.new_empty(ranks()[1] * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


class Gather(torch.autograd.Function):
    """`all_gather` with a gradient: for each process's part the sum over what all processes made of it, times
    their number R. The loss is a mean over the whole batch already: the gradient of the network is the sum
    over the ranks, of which DistributedDataParallel takes the mean."""

    @staticmethod
    def forward(ctx, tensor):
        return all_gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if not dist.is_initialized():
            return grad
        rank, world = ranks()
        return all_reduce(grad.contiguous().clone()).chunk(world)[rank] * world


ROWS = 2048  # classes whose weights are normalised at a time


class Cosines(torch.autograd.Function):
    """features @ normalize(weight[index]).T, without a copy of the weights: features (B, d), weight (C, d),
    index (S,) without repeats -> (B, S). The gradient of the weights is dense, and 0 outside `index`."""

    @staticmethod
    def forward(ctx, features, weight, index):
        ctx.save_for_backward(features, weight, index)
        cosines = features.new_empty(len(features), len(index))
        for rows, out in zip(index.split(ROWS), cosines.split(ROWS, 1)):
            out.copy_(features @ F.normalize(weight[rows]).T)
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight, index = ctx.saved_tensors
        grad_features, grad_weight = torch.zeros_like(features), torch.zeros_like(weight)
        for rows, part in zip(index.split(ROWS), grad.split(ROWS, 1)):
            unit = weight[rows]                                                             # (rows, d)
            norm = unit.norm(dim=1, keepdim=True).clamp(min=1e-12)
            unit /= norm
            grad_features.addmm_(part, unit)
            own = part.T @ features
            own -= unit * (own * unit).sum(1, keepdim=True)  # a unit vector cannot grow
            grad_weight.index_copy_(0, rows, own / norm)
        return grad_features, grad_weight, None


class ShardedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy, with the classes spread over the processes: logits (B, S) of this shard's, labels
    (B,) long, -1 where the class is in another shard -> scalar, the same in all processes."""

    @staticmethod
    def forward(ctx, logits, labels):
        index, own = labels.clamp(min=0)[:, None], labels >= 0
        top = all_reduce(logits.amax(1), dist.ReduceOp.MAX)                                 # (B,)
        exps = (logits - top[:, None]).exp_()
        target = torch.where(own, logits.gather(1, index)[:, 0] - top, 0)
        total, target = all_reduce(torch.stack([exps.sum(1), target]))
        ctx.save_for_backward(exps, total, index, own)
        # Code: -log(max(p, 1e-30)), which ends at 69 and has a gradient there all the same.
        return (total.log() - target).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        exps, total, index, own = ctx.saved_tensors
        grad_logits = exps / total[:, None]  # softmax minus one-hot
        grad_logits.scatter_add_(1, index, -own[:, None].to(exps))
        return grad_logits.mul_(grad / len(exps)), None


class PartialFC(nn.Module):
    """The classifier of a large number of identities with its loss: forward(embeddings, labels) -> scalar.

    Each process owns a shard of the class centres and sees the embeddings of all processes; their softmaxes
    meet in sums over the processes: none holds the logits of all classes. With a sample rate below 1 a step
    looks at the labels' own centres and a random choice of the others. In one process and at rate 1 the loss
    is F.cross_entropy(margin(cosines, norms, labels), labels).
    It is not wrapped in DistributedDataParallel: the gradient of its shard is complete as it stands.

    The gradient of the weights is dense, 0 for classes that were not sampled, as in the code: AdamW moves
    these on by what is left of their momentum, and decays them, which no cosine sees.
    Memory: weights, gradient and AdamW's two moments are four times the shard; give AdamW fused=True, whose
    other forms add one or two. Beside them: the sampled logits once, 2.25 times before the gradient is made.

    Args: features, the length d of embeddings; classes, over all processes; margin, a `Margin`; sample_rate,
        the share of each shard's classes that a step looks at, or as many as the batch has faces if that is
        more (code: then exactly the labels' own, whose number the host would have to wait for).
    Code: rounds the classes up to a multiple of the processes; here shards differ by one class, so that the
    loss does not depend on the number of processes. Nor do the initial weights, N(0, 0.01).
    Raises: ValueError.   Source: Partial FC, as insightface's arcface_torch has it.
    """

    def __init__(self, features: int, classes: int, margin: Margin, sample_rate: float = 1.0):
        super().__init__()
        self.rank, self.world = ranks()
        if classes < max(2, self.world):
            raise ValueError(f"{classes} classes on {self.world} processes: the loss needs two identities or "
                             "more, and one for each process")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample rate {sample_rate}, expected above 0 and at most 1")
        self.features, self.classes, self.margin, self.sample_rate = features, classes, margin, sample_rate
        self.start, stop = self.bounds(self.rank)
        self.weight = nn.Parameter(torch.empty(stop - self.start, features))
        for first in range(0, classes, ROWS):  # every process draws all of them and keeps its own
            block = 0.01 * torch.randn(min(ROWS, classes - first), features)
            low, high = max(first, self.start), min(first + ROWS, stop)
            if low < high:
                self.weight.data[low - self.start:high - self.start] = block[low - first:high - first]

    def bounds(self, rank: int) -> tuple[int, int]:
        """The first class of a process, and one past its last."""
        return self.classes * rank // self.world, self.classes * (rank + 1) // self.world

    def sample(self, local: torch.Tensor) -> torch.Tensor:
        """Classes (S,) of this shard that take part, sorted: those in `local` (B,), where -1 is none, and
        others at random. S does not depend on the labels."""
        count = len(self.weight)
        size = min(count, max(int(self.sample_rate * count), len(local)))
        if size == count:
            return torch.arange(count, device=local.device)
        scores = torch.rand(count + 1, device=local.device)  # of [0, 1); the last one is for labels elsewhere
        scores.index_fill_(0, torch.where(local < 0, count, local), 2.0)
        return scores[:count].topk(size).indices.sort().values

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss over the batches of all processes, which have the same size; the same value in each.

        Args: embeddings (B, features), not normalised; one that is 0 gets cosines and a gradient of 0; labels
            (B,) long in [0, classes), best on the CPU, as the loader gives them: reading them on a GPU waits.
        """
        low, high = labels.aminmax()
        if low < 0 or high >= self.classes:
            raise ValueError(f"labels from {int(low)} to {int(high)}, expected 0 to {self.classes - 1}: "
                             "the set has other identities than the classifier was made for")
        labels = all_gather(labels.to(self.weight.device, non_blocking=True)) - self.start
        local = torch.where((labels >= 0) & (labels < len(self.weight)), labels, -1)
        index = self.sample(local)
        local = torch.where(local >= 0, torch.searchsorted(index, local), -1)
        with torch.autocast(self.weight.device.type, enabled=False):  # bfloat16 logits: steps of 0.25
            embeddings = Gather.apply(embeddings.to(self.weight.dtype))
            norms = embeddings.norm(dim=1)
            unit = embeddings / torch.where(norms > 0, norms, torch.inf)[:, None]
            logits = self.margin(Cosines.apply(unit, self.weight, index), norms, local)
            return ShardedCrossEntropy.apply(logits, local)

    def whole(self, shard: torch.Tensor) -> torch.Tensor | None:
        """The (classes, ...) of all shards on the CPU of rank 0, one shard at a time."""
        if self.rank:
            dist.send(shard.detach().contiguous(), 0)
            return None
        whole = torch.empty(self.classes, *shard.shape[1:], dtype=shard.dtype)
        for rank in range(self.world):
            start, stop = self.bounds(rank)
            if rank:
                shard = shard.new_empty(stop - start, *shard.shape[1:])
                dist.recv(shard, rank)
            whole[start:stop] = shard.detach()
        return whole

    def gather_state(self, optimizer: torch.optim.Optimizer | None = None) -> dict:
        """For a checkpoint: weights (classes, features) and the optimizer's state of them, of all shards, and
        the margin's buffers, on the CPU. All processes call it; what it returns is whole on rank 0 only."""
        moments = optimizer.state.get(self.weight, {}) if optimizer else {}
        return {"weight": self.whole(self.weight),
                "margin": {key: value.detach().to("cpu", copy=True)
                           for key, value in self.margin.state_dict().items()},
                "optimizer": {key: self.whole(value) if value.shape == self.weight.shape else
                              value.detach().to("cpu", copy=True) for key, value in moments.items()}}

    @torch.no_grad()
    def load_shards(self, state: dict, optimizer: torch.optim.Optimizer | None = None):
        """Takes this process's part of what `gather_state` returned under any number of processes.
        Raises: ValueError for another number of classes or features."""
        shape = (self.classes, self.features)
        if state["weight"].shape != shape:
            raise ValueError(f"the checkpoint has class weights {tuple(state['weight'].shape)}, expected "
                             f"{shape} (classes, features): resume on the identities that it was trained on")
        start, stop = self.bounds(self.rank)
        self.weight.copy_(state["weight"][start:stop])
        self.margin.load_state_dict(state["margin"])
        if optimizer and state["optimizer"]:
            whole = optimizer.state_dict()
            order = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
            whole["state"][order.index(id(self.weight))] = {
                key: value[start:stop].clone() if value.shape == shape else value.clone()
                for key, value in state["optimizer"].items()}
            optimizer.load_state_dict(whole)


# ---- Augmentation: supplement --------------------------------------------------------------------

@dataclass(frozen=True)
class Augmentation:
    """Strengths of the training images' augmentation; the defaults are those of all released KP-RPE networks.

    The paper names the kinds and "magnitude 14/31"; numbers and order are the code's: geometry, cutout, blur,
    colour. Differs from it: images are not rounded to whole grey levels between the steps; the middle of the
    image is (W - 1) / 2 and a mirrored x is W - 1 - x (code: W / 2, W - x).
    """
    flip: float = 0.5                       # probability
    scale: float = 0.2                      # zoom by U(1 - scale, 1 + scale)
    shift: float = 0.1                      # of half the side, beyond what the zoom lets the image move
    rotate: float = 0.2                     # probability
    degrees: float = 20.0
    cutout: float = 0.2                     # probability
    holes: float = 0.05                     # share of cutouts that are holes; else all but a box is black
    blur: float = 0.2                       # probability
    blurs: tuple[float, float] = (0.8, 0.1)  # shares of resizes and boxes among them; the rest is Gaussian
    ops: int = 2                            # RandAug: operations an image
    magnitude: int = 14                     # RandAug: of 31; drawn from 9 below to 8 above
    jitter: float = 0.0                     # probability; brightness, saturation, contrast times U(0.5, 1.5)


# For networks without keypoints: crop, low resolution, colour, mirror.   Source: the AdaFace repository.
PLAIN = Augmentation(scale=0, shift=0, rotate=0, holes=0, blurs=(1, 0), ops=0, jitter=0.2)
WIDE = Augmentation(shift=0.4, rotate=1.0)  # ours: aligned faces as far off as unaligned ones
AUGMENTATIONS = {"full": Augmentation(), "wide": WIDE, "plain": PLAIN, "none": None,  # --augment
                 "move": Augmentation(shift=0.4, cutout=0, blur=0, ops=0),  # ours, of the face aligner
                 "mirror": Augmentation(scale=0, shift=0, rotate=0, cutout=0, blur=0, ops=0)}


@functools.cache
def constant(values: tuple, device: torch.device) -> torch.Tensor:
    """A float32 tensor, copied to a device once: a copy waits for what the GPU is at."""
    with torch.inference_mode(False):  # else, made in an evaluation, training could not use it
        return torch.tensor(values, device=device)


def uniform(low: float, high: float, *shape: int, device) -> torch.Tensor:
    """U(low, high), float32."""
    return low + (high - low) * torch.rand(shape, device=device)


def draw_geometry(batch: int, size: int, strength: Augmentation, device=None) -> tuple:
    """Draws zoom, shift, rotation and mirror of square images from PyTorch's generator of `device`.
    Returns: matrix (B, 2, 3), px of an image of `size` -> px of the augmented one; mirror (B,) bool."""
    draw = functools.partial(uniform, device=device)
    zoom = draw(1 - strength.scale, 1 + strength.scale, batch)
    radians = math.radians(strength.degrees)
    angle = torch.where(draw(0, 1, batch) < strength.rotate, draw(-radians, radians, batch), 0)
    mirror = draw(0, 1, batch) < strength.flip
    # t = U(-1, 1) (h / scale - h + h e), h half the side: zoomed out the image stays in view, but for h e.
    half, middle = size / 2, (size - 1) / 2
    extra = draw(0, strength.shift, batch)[:, None]
    shift = draw(-1, 1, batch, 2) * half * (1 / zoom[:, None] - 1 + extra)                  # (B, 2) px
    # p -> S (R (p - middle) - t) + middle, with S the zoom, and the mirror in x
    c, s = angle.cos(), angle.sin()
    rotation = torch.stack([c, s, -s, c], -1).unflatten(-1, (2, 2))
    zooms = torch.stack([torch.where(mirror, -zoom, zoom), zoom], -1)[..., None]            # (B, 2, 1)
    linear = zooms * rotation
    offset = middle - middle * linear.sum(-1, keepdim=True) - zooms * shift[..., None]
    return torch.cat([linear, offset], -1), mirror


def move_points(points: torch.Tensor, matrix: torch.Tensor, mirror: torch.Tensor, flip) -> torch.Tensor:
    """Points (B, P, 2) px through matrix (B, 2, 3); those of mirrored images in the order `flip` (P,), as the
    left eye of a mirrored face is its right one."""
    moved = warp.apply_affine(matrix, points)
    if flip is None:
        return moved
    order = constant(tuple(int(i) for i in flip), points.device)
    return torch.where(mirror[:, None, None], moved[:, order], moved)


def spans(low: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """Which of `size` places lie in [low, low + length), of whole numbers (...): (..., size) bool."""
    place = torch.arange(size, device=low.device)
    return (place >= low[..., None]) & (place < (low + length)[..., None])


def draw_cutout(batch: int, size: int, holes: float, device=None) -> torch.Tensor:
    """What a cutout leaves of images, (B, size, size) bool: a box of 0.2 to 1 of the area, or, in a share
    `holes` of images, all but 12 to 20 rectangles with sides of 1 to 16 px of 112."""
    draw = functools.partial(uniform, device=device)
    # As torchvision's RandomResizedCrop: ten tries to find a box within the image, else all of it.
    area, log_aspect = draw(0.2, 1, batch, 10), draw(math.log(3 / 4), math.log(4 / 3), batch, 10)
    sides = size * torch.stack([area * log_aspect.exp(), area / log_aspect.exp()]).sqrt()   # (2, B, 10) px
    fits = (sides.round() <= size).all(0)
    tried = fits.long().argmax(1).expand(2, batch)[..., None]
    sides = torch.where(fits.any(1), sides.round().gather(2, tried)[..., 0], size)          # (2, B)
    rows, columns = spans(((size - sides + 1) * draw(0, 1, 2, batch)).floor(), sides, size)
    box = rows[:, :, None] & columns[:, None]                                               # (B, size, size)
    sides = draw(1, max(1, 16 * size // 112) + 1, 2, batch, 20).floor()
    rows, columns = spans(((size - sides + 1) * draw(0, 1, 2, batch, 20)).floor(), sides, size)
    drawn = torch.arange(20, device=device) < draw(12, 21, batch, 1).floor()                # (B, 20)
    hidden = (rows & drawn[..., None]).float().mT @ columns.float()   # how many holes lie over a pixel
    return torch.where((draw(0, 1, batch) < holes)[:, None, None], hidden == 0, box)


METHODS = ("nearest", "linear", "cubic", "lanczos", "area")  # cv2's INTER_...


def resize_matrix(side: int, before: torch.Tensor, after: torch.Tensor, method: torch.Tensor):
    """cv2.resize of columns of pixels, `before` (B,) of them to `after`, both at most `side`: matrices
    (B, side, side), of which the first `after` rows count; method (B,) long, an index of METHODS.

    As in cv2, linear, cubic (a = -0.75) and lanczos (8 taps) are not widened when shrinking; area is the
    overlap of pixels, for which eight taps suffice if `after` is 1/6 of `before` or more."""
    i, scale = torch.arange(side, device=before.device), (before / after)[:, None]
    corner, centre = i * scale, (i + 0.5) * scale - 0.5                                     # (B, side)
    from_corner = ((method == METHODS.index("nearest")) | (method == METHODS.index("area")))[:, None]
    # 1e-3: 56 must not come out as 55.99999.
    first = torch.where(from_corner, (corner + 1e-3).floor(), centre.floor() - 3)
    taps = first[..., None] + torch.arange(8, device=before.device)                         # (B, side, 8)
    x, corner, scale = (taps - centre[..., None]).abs(), corner[..., None], scale[..., None]
    near, far = 1 + x * x * (1.25 * x - 2.25), -0.75 * (((x - 5) * x + 8) * x - 4)
    weights = torch.stack([
        (taps == first[..., None]).float(),
        (1 - x).clamp(min=0),
        torch.where(x < 1, near, torch.where(x < 2, far, 0)),
        torch.where(x < 4, torch.sinc(x) * torch.sinc(x / 4), 0),
        (torch.minimum(taps + 1, corner + scale) - torch.maximum(taps, corner)).clamp(min=0)])
    weights = weights[method, torch.arange(len(method), device=method.device)]              # (B, side, 8)
    weights = weights / weights.sum(-1, keepdim=True)
    taps = torch.minimum(taps.clamp(min=0), (before - 1)[:, None, None]).long()  # the border pixel goes on
    matrix = torch.zeros(len(before), side, side, device=before.device)
    for k in range(8):  # one at a time: taps that meet at the border would add up in no fixed order on a GPU
        matrix.scatter_add_(2, taps[..., k:k + 1], weights[..., k:k + 1])
    return matrix


def filter_matrix(side: int, weights: torch.Tensor) -> torch.Tensor:
    """Filters of columns of pixels as matrices (B, side, side): weights (B, 2 R + 1) of the offsets -R to R,
    mirrored at the border pixel, cv2's BORDER_REFLECT_101."""
    reach = weights.shape[1] // 2
    place = torch.arange(side, device=weights.device)
    at = (place + torch.arange(-reach, reach + 1, device=weights.device)[:, None]) % (2 * side - 2)
    at = torch.minimum(at, 2 * side - 2 - at)                                               # (2 R + 1, side)
    places = (at[..., None] == place).float()
    return (weights @ places.flatten(1)).unflatten(1, (side, side))


def blur(image: torch.Tensor, strength: Augmentation) -> torch.Tensor:
    """Blurs a share of images (B, 3, H, H): down to U(0.2, 1) of the size and up again, each way by a random
    method; or a box of 1 to 9 px; or a Gaussian of sigma U(0, 4) px.

    All are linear and act on rows as on columns: a matrix for each image, two products for the batch.
    """
    batch, side, device = len(image), image.shape[2], image.device
    draw = functools.partial(uniform, device=device)
    down, up = torch.randint(len(METHODS), (2, batch), device=device)
    full = torch.full((batch,), side, device=device)
    small = (draw(0.2, 1, batch) * side).floor().clamp(min=1)
    resize = resize_matrix(side, small, full, up) @ resize_matrix(side, full, small, down)
    offset, width = torch.arange(-12, 13, device=device), draw(1, 10, batch, 1).floor()     # 12 = 3 sigma
    box = ((offset >= -(width / 2).floor()) & (offset < (width / 2).ceil())).float()
    gaussian = (-0.5 * (offset / draw(0, 4, batch, 1).clamp(min=1e-3)) ** 2).exp()
    kind, chosen = draw(0, 1, batch), draw(0, 1, batch) < strength.blur
    weights = torch.where(kind[:, None] < sum(strength.blurs), box, gaussian)
    filtered = filter_matrix(side, weights / weights.sum(1, keepdim=True))
    matrix = torch.where((kind < strength.blurs[0])[:, None, None], resize, filtered)[:, None]
    return torch.where(chosen[:, None, None, None], (matrix @ image @ matrix.mT).clamp(0, 255), image)


def equalize(image: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W), channel by channel, with levels spread by PIL's ImageOps.equalize."""
    level = image.round().long().flatten(2)                                                 # (B, 3, H * W)
    histogram = torch.zeros(*level.shape[:2], 256, dtype=torch.long, device=image.device)
    histogram.scatter_add_(2, level, torch.ones_like(level))
    brightest = histogram.gather(2, level.amax(2, keepdim=True))
    step = (level.shape[2] - brightest) // 255
    table = ((histogram.cumsum(2) - histogram + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=image.device))
    return table.gather(2, level).view_as(image).to(image.dtype)


OPS = ("identity", "brightness", "saturation", "contrast", "sharpness", "equalize", "grayscale")
GREY = (0.299, 0.587, 0.114)


def recolour(image: torch.Tensor, op: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """One operation for each image, as PIL has it: base + factor (image - base), within 0..255.
    Args: image (B, 3, H, W); op (B,) long, an index of OPS; factor (B,) of the four ops that have one, 1 for
        no change: their base is black, the pixel's grey, the mean grey, or the image smoothed."""
    op, factor = op[:, None, None, None], factor[:, None, None, None]
    identity, _, saturation, contrast, sharpness, equalized, greyed = (op == i for i in range(len(OPS)))
    grey = (image * constant(GREY, image.device)[:, None, None]).sum(1, keepdim=True)
    mean = (grey.mean((2, 3), keepdim=True) + 0.5).floor()
    base = torch.where(saturation | greyed, grey, torch.where(contrast, mean, 0))           # (B, 1, H, W)
    # The filter 1 1 1, 1 5 1, 1 1 1 over 13; PIL keeps the border.
    inner = (9 * F.avg_pool2d(image, 3, 1) + 4 * image[..., 1:-1, 1:-1]) / 13
    smooth = image.clone()
    smooth[..., 1:-1, 1:-1] = inner
    base = torch.where(sharpness, smooth, base)                                             # (B, 3, H, W)
    base = torch.where(equalized, equalize(image), base)
    factor = torch.where(identity, 1, torch.where(equalized | greyed, 0, factor))
    return (base + factor * (image - base)).clamp(0, 255)


def colour(image: torch.Tensor, strength: Augmentation) -> torch.Tensor:
    """RandAug's operations on images (B, 3, H, W), then the jitter."""
    batch, device = len(image), image.device
    for _ in range(strength.ops):
        # Equalize and grayscale, the last two, are drawn again, up to twice; changes are of 31 from 0 to 0.9.
        tries = torch.randint(len(OPS), (3, batch), device=device)
        op = torch.where(tries[0] < 5, tries[0], torch.where(tries[1] < 5, tries[1], tries[2]))
        # paper: magnitude 14 of 31; code: 5 to 22 of them, a change by 0.15 to 0.66; we follow the code.
        low, high = max(0, strength.magnitude - 9), min(31, strength.magnitude + 9)
        sign = 2 * torch.randint(2, (batch,), device=device) - 1
        change = sign * torch.randint(low, high, (batch,), device=device) * (0.9 / 30)
        image = recolour(image, op, 1 + change)
    if strength.jitter:
        chosen = torch.rand(batch, device=device) < strength.jitter
        order = torch.rand(3, batch, device=device).argsort(0) + 1  # brightness to contrast
        for op in order:
            image = recolour(image, op, torch.where(chosen, uniform(0.5, 1.5, batch, device=device), 1))
    return image


@torch.no_grad()
def augment(image: torch.Tensor, points: torch.Tensor | None, strength: Augmentation, flip=None):
    """Augments a batch on its device, from PyTorch's generator there; nothing waits for a GPU.

    Args: image (B, 3, H, H) float, RGB in 0..255; points (B, P, 2) px or None; flip (P,), the order of points
        in a mirrored image (`datasets.SCHEMES[P].flip`).
    Returns: image and points, likewise. What comes in from outside the image is black.
    Raises: ValueError if points are to be mirrored without `flip`.
    """
    if points is not None and flip is None and strength.flip:
        raise ValueError(f"{points.shape[1]} points of unknown meaning cannot be mirrored: set flip to 0")
    with torch.autocast(image.device.type, enabled=False):
        size = image.shape[2]
        matrix, mirror = draw_geometry(len(image), size, strength, image.device)
        image = warp.warp_affine(image, matrix, (size, size))
        if strength.cutout:
            keep = draw_cutout(len(image), size, strength.holes, image.device)
            keep |= (torch.rand(len(image), device=image.device) >= strength.cutout)[:, None, None]
            image = image * keep[:, None]
        if strength.blur:
            image = blur(image, strength)
        image = colour(image, strength)
        return image, None if points is None else move_points(points, matrix, mirror, flip)


def repeated(order: np.ndarray, labels: np.ndarray, p: float, rng: np.random.Generator) -> np.ndarray:
    """The "repeated augmentation" of Table 6 on an epoch's order (L,) of indices into labels (N,): (L,).

    After each image, with probability p, the next is replaced by a random one of the same identity, but never
    two in a row: a share p / (1 + p) of all. Paper: cites [24], which repeats an image; code: this.
    """
    wish = rng.random(len(order)) < p
    wish[:1] = False
    place = np.arange(len(order))
    # Of wishes in a row the first, third, ... come true.
    since = place - np.maximum.accumulate(np.where(wish, 0, place))
    chosen = np.flatnonzero(since % 2)
    by_label = np.argsort(labels, kind="stable")
    count = np.bincount(labels)
    first, label = np.cumsum(count) - count, labels[order[chosen - 1]]
    order = order.copy()
    order[chosen] = by_label[first[label] + (rng.random(len(chosen)) * count[label]).astype(np.int64)]
    return order


# ---- Optimisation: supplement, Table 6 -----------------------------------------------------------

def parameter_groups(net: nn.Module, weight_decay: float, scale: float = 1.0,
                     free: str = "(?<!patch_)emb|token|bias$") -> list[dict]:
    """Parameters for AdamW, with and without weight decay; "scale" is what a group's rate is multiplied by.

    Vectors and names that match `free`, by default biases, the position embedding and tokens, do not decay;
    tables and projections of the relative encodings do, as do class weights (source: code). Those encodings
    have the rate times `scale`: a bias that is divided by c (Eq. 5: sqrt(d)) learns at c times the rate, its
    decay over c, as an undivided one would.
    """
    groups = [dict(params=[], weight_decay=weight_decay * decays / own, scale=own)
              for own in (1.0, scale) for decays in (1, 0)]
    for name, weight in net.named_parameters():
        if weight.requires_grad:
            encoding = name.startswith("rpe.") or ".table" in name or ".contextual." in name
            stays = weight.ndim < 2 or re.search(free, name) is not None
            groups[2 * encoding + stays]["params"].append(weight)
    return groups


def learning_rate(step: int, steps: int, warmup_steps: int, base: float) -> float:
    """From 0 to `base` in a line over the first warmup_steps, then back to 0 at `steps` as half a cosine."""
    if step < warmup_steps:
        return base * step / warmup_steps
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


# ---- Data ----------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Images by index, of training with their .labels and .ids; five points (N, 5, 2) px or None, where they
    are aligned as they stand; as faces with these points and boxes (N, 4), if unaligned crops have boxes."""
    images: Sequence
    points: np.ndarray | None
    faces: list | None = None
    boxes: np.ndarray | None = None


def five_points(points: np.ndarray, where="the landmarks") -> np.ndarray:
    """Landmarks (N, P, 2) of the file or set `where` -> (N, 5, 2): eyes, nose tip and mouth corners,
    image-left first.   Raises: ValueError for a number of landmarks of no known scheme."""
    if points.shape[1] not in datasets.SCHEMES:
        raise ValueError(f"{where}: {points.shape[1]} landmarks are no known scheme "
                         f"{list(datasets.SCHEMES)}: give 5, eyes, nose tip and mouth corners, image-left "
                         "first")
    return datasets.group_means(points, datasets.SCHEMES[points.shape[1]].five).astype(np.float32)


def template(size: int) -> np.ndarray:
    """ArcFace's five points in px of a crop of `size`, (5, 2)."""
    return (datasets.ARCFACE_5 + 0.5) * (size / 112) - 0.5


def drawn_faces(args, split: str) -> list[datasets.Face]:
    """A split of --data faces, the same whatever --seed is."""
    count = args.limit or DRAWN["train"]
    count = count if split == "train" else min(count, DRAWN["test"])
    return synthetic.read_faces(split, count, args.size, args.points)


def read_set(args, split: str) -> Split | None:
    """A split of args.data, None for a test split that is not there. What can be wrong with it is found here:
    Raises: FileNotFoundError; ValueError."""
    if args.data in RECORDS:
        if split == "test":
            return None
        images = recognition.Records(args.data_root)
        if not args.landmarks:
            return Split(images, None)
        points = recognition.read_landmarks(images.keys.astype(str), args.landmarks)
        return Split(images, five_points(points, args.landmarks))
    if args.data == "faces":
        faces = drawn_faces(args, split)
    elif args.data == "youtube":
        faces = datasets.read("youtube", args.data_root, split)
    else:
        folder = os.path.join(args.data_root, split)
        if split == "test" and not os.path.isdir(folder):
            return None
        faces = recognition.read_identities(folder)
        if args.landmarks:
            faces = recognition.attach_points(faces, args.landmarks, args.data_root)
    faces = faces[:args.limit or None]
    datasets.check_images(faces)
    images = recognition.FolderImages(faces)
    if all(face.points is None for face in faces):
        return Split(images, None, faces)
    recognition.check_points(faces, "alignment, as other images have them,")
    return marked(args, images, faces, args.landmarks or f"--data {args.data}")


def marked(args, images: Sequence, faces: list, where: str) -> Split:
    """A split of faces that have landmarks, read from `where`, with the boxes of --box."""
    boxes = None if args.box == "image" else datasets.face_boxes(faces, args.box)
    points = five_points(np.stack([face.points for face in faces]), where)
    return Split(images, points, [replace(face, points=own) for face, own in zip(faces, points)], boxes)


def make_dataset(args, split: Split, t: float):
    """Crops of --size between unaligned, t = 0, and aligned, t = 1: by (1 - t) times one matrix plus t times
    the other. Images without points are aligned as they stand."""
    to = torch.from_numpy(template(args.size))
    if split.boxes is None:
        return recognition.WholeImages(split.images, args.size, split.points,
                                       align=None if split.points is None else (to, t))
    frames = torch.from_numpy(datasets.square_frames(split.boxes, args.size, args.margin))
    if t:  # a face of --predict may have a box alone
        frames = frames.lerp(warp.fit_similarity(torch.from_numpy(split.points).double(), to), t)
    return datasets.CropDataset(split.faces, frames, args.size)


class Digits(torch.utils.data.Dataset):
    """Digits as batches, as `datasets.CropDataset` has them, but gray: image (B, 40, 40, 1).
    Args: images (N, 28, 28) uint8, moved by up to 6 px anew in each epoch; or canvases (N, 40, 40) with
    their points (N, 5, 2), which stay."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, points: np.ndarray | None = None, seed=0):
        self.images, self.points, self.seed = images, points, seed
        self.labels, self.ids = labels.astype(np.int64), np.arange(10)

    def __len__(self):
        return len(self.images)

    def __getitems__(self, keys) -> dict:
        index = np.array([i for _, i in keys])
        image, points = self.images[index], None if self.points is None else self.points[index]
        if points is None:
            image, points = digits.mnist_canvas(image, (self.seed, *keys[0]), canvas=CANVAS)
        return {"image": torch.from_numpy(image)[..., None], "points": torch.from_numpy(points),
                "index": torch.from_numpy(index)}


def read_digits(args, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) uint8 of MNIST: its four idx files, .gz or not, in --data-root."""
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        path = os.path.join(args.data_root, f"{dict(train='train', test='t10k')[split]}-{kind}-ubyte")
        arrays.append(digits.read_idx(path if os.path.isfile(path) else path + ".gz")[:args.limit or None])
    if len(arrays[0]) != len(arrays[1]) or arrays[0].ndim != 3 or arrays[1].max() > 9:
        raise ValueError(f"{args.data_root}: {split} has images {arrays[0].shape} and labels "
                         f"{arrays[1].shape}, expected as many of both, and labels from 0 to 9")
    return tuple(arrays)


def training_set(args):
    """The training set: images with .labels and .ids, and a dataset of aligned crops or of digits."""
    if args.data == "affnist":
        data = Digits(*read_digits(args, "train"), seed=args.seed)
        return data, data
    split = read_set(args, "train")
    # Records are aligned already, with landmarks beside them or not.
    data = recognition.WholeImages(split.images, args.size, split.points) if args.data in RECORDS else \
        make_dataset(args, split, 1.0)
    return split.images, data


class SubjectBatches(datasets.EpochBatches):
    """`EpochBatches` with images replaced by others of the same person, as `repeated` says."""

    def __init__(self, labels: np.ndarray, batch: int, p: float, seed: int, rank: int, world: int):
        super().__init__(len(labels), batch, seed, rank, world)
        self.labels, self.p = labels, p

    def order(self):
        order = super().order()
        rng = np.random.default_rng((self.seed, self.epoch, 1))
        return repeated(order, self.labels, self.p, rng) if self.p else order


def prepare(batch: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch: images (B, C, H, W) in 0..255, keypoints (B, 5, 2) px."""
    image = batch["image"].to(device, non_blocking=True)
    if image.dtype == torch.uint8:
        image = image.permute(0, 3, 1, 2).float()
    if "points" in batch:
        return image, batch["points"].to(device, non_blocking=True)
    return image, constant(tuple(template(image.shape[-1]).flatten().tolist()), device).view(1, 5, 2).expand(
        len(image), -1, -1)


def inputs(image: torch.Tensor, points: torch.Tensor, draw: bool = False):
    """What networks take, images in [-1, 1] and keypoints in [0, 1], of what `prepare` returns.
    Args: draw, whether white dots of about 2 px mark the keypoints in the image (Fig. 1)."""
    if draw:
        side = torch.arange(image.shape[-1], device=image.device)
        x, y = ((side - points[..., axis, None]).square() for axis in (0, 1))  # (B, 5, W), (B, 5, H)
        dots = (-(x[..., None, :] + y[..., None]) / 2).exp().amax(1, keepdim=True)  # (B, 1, H, W)
        image = image + (255 - image) * dots
    return image / 127.5 - 1, (points + 0.5) / image.shape[-1]


# ---- Evaluation: Sec. 4 and supplement -----------------------------------------------------------

class Arm(NamedTuple):
    """One way of looking at a test set: its data; what is asked of it; what is added to the names of scores;
    the noise on its keypoints, alpha of Eq. (12); whether it waits for the end of a run."""
    data: object
    loader: object
    protocols: list
    suffix: str = ""
    noise: float = 0.0
    late: bool = False


def shares(count: int, batch: int, rank: int = 0, world: int = 1) -> list[list[tuple[int, int]]]:
    """The keys of a set, in order, that one process looks at: every world-th, and as many in each process."""
    mine = np.arange(rank, rank + -(-count // world) * world, world) % count
    return [[(0, i) for i in mine[start:start + batch].tolist()] for start in range(0, len(mine), batch)]


def wants_keypoints(args, *rpes: str) -> bool:
    """Whether a network of one of these encodings looks at keypoints."""
    return args.draw_keypoints or bool(args.num_keypoints and {*rpes} & {*KEYPOINT})


def test_splits(args) -> list[tuple[Split, list, str]]:
    """The test split of --data, if there is one, and the sets of --test: images, what is asked of them, what
    ends the names of their scores.
    Raises: FileNotFoundError for landmarks that the network needs; ValueError for two sets of one name."""
    say = print if ranks()[0] == 0 else lambda *_: None
    needy = not args.dfa and wants_keypoints(args, args.rpe, *words(args.also_rpe))
    between, found, own = args.unaligned or args.align_steps, {}, read_set(args, "test")
    if args.fusion and own is None:
        raise ValueError(f"--fusion: --data {args.data} has no test split in {args.data_root}")
    if own is not None:
        found[""] = own, [recognition.own_pairs(own.faces), recognition.own_identification(own.faces)]
        found[""][1].extend([own_templates(own.faces)] if args.fusion else [])
        if between and own.points is None:
            say(f"--data {args.data}: no landmarks; test images are aligned as they stand, none unaligned")
    for path in args.test:
        test, beside = recognition.read_test(path), os.path.normpath(path) + ".landmarks.csv"
        if os.path.exists(beside):
            test = recognition.with_landmarks(test, beside)
        name, points = f"@{test.name}", test.points
        if name in found:
            raise ValueError(f"--test {path}: another set of --test is {test.name}, too; evaluate them apart")
        if points is None and not path.endswith(".bin"):  # those are aligned
            if needy:
                raise FileNotFoundError(f"--test {path}: the network needs the keypoints of its images: no "
                                        f"{beside}, rows image,x0,y0,..., nor --dfa")
            say(f"--test {path}: no {beside}; images are taken as they stand")
        if points is None or args.box != "landmarks":
            split = Split(test.images, None if points is None else five_points(points, beside))
            if between and points is not None and args.box == "face":
                say(f"--test {path}: has no boxes; unaligned are its whole images")
        else:
            split = marked(args, test.images, [
                datasets.Face(functools.partial(test.images.__getitem__, i), own)
                for i, own in enumerate(points)], beside)
            if between:
                say(f"--test {path}: unaligned is the box of {points.shape[1]} landmarks x {args.margin}")
        found[name] = split, [test]
    return [(split, protocols, name) for name, (split, protocols) in found.items()]


def test_arms(args, device: torch.device) -> list[Arm]:
    """All ways of looking at the test sets: aligned, and with --unaligned unaligned; `late`, the steps
    between and the noise. What is wrong with --dfa is found here.
    Names of scores end in @NAME for a set of --test; then, but for the aligned arm, @unaligned, ..."""
    arms, noises = [], numbers(args.keypoint_noise)
    if args.dfa:
        open_dfa(args.dfa, device)

    def add(data, protocols, suffix, late=False, noises=()):
        batches = shares(len(data), 64 if device.type == "cpu" else 256, *ranks())
        kept = not late and suffix in ("", "@unaligned")  # those that every evaluation reads
        loader = crop_loader(args, data, batches, device, kept)
        arms.append(Arm(data, loader, protocols, suffix, 0.0, late))
        arms.extend(Arm(data, loader, protocols, f"{suffix}@noise{alpha:g}", alpha, True) for alpha in noises)

    if args.data == "affnist":
        images, labels = read_digits(args, "test")
        upright = digits.mnist_canvas(images, 0, canvas=CANVAS)
        add(Digits(upright[0], labels, upright[1]), [labels], "", noises=noises)
        moved, points, _ = digits.affnist(images, 0, canvas=CANVAS)
        add(Digits(moved, labels, points), [labels], "@affine", noises=noises)
        return arms
    for split, protocols, name in test_splits(args):
        add(make_dataset(args, split, 1.0), protocols, name, noises=noises)
        if split.points is None:
            continue
        if args.unaligned or args.align_steps:
            add(make_dataset(args, split, 0.0), protocols, f"{name}@unaligned", not args.unaligned)
        for step in range(1, args.align_steps):
            add(make_dataset(args, split, step / args.align_steps), protocols, f"{name}@step{step}", True)
    return arms


def disturb(keypoints: torch.Tensor, index: torch.Tensor, alpha: float) -> torch.Tensor:
    """Keypoints (B, 5, 2) in [0, 1] with noise, the same for an image's index (B,) in every call."""
    if not alpha:
        return keypoints
    draw = lambda i: torch.randn(keypoints.shape[1:], generator=torch.Generator().manual_seed(i))
    # Eq. (12): L_pert = L + alpha L, where the text means L + alpha N(0, 1)
    return keypoints + alpha * torch.stack([draw(i) for i in index.tolist()]).to(keypoints)


class Embedded(NamedTuple):
    """What `embed` makes of N images, on the CPU of rank 0."""
    features: torch.Tensor   # (N, D)
    keypoints: torch.Tensor  # (N, 5, 2) in [0, 1], as the network had them
    score: torch.Tensor      # (N,) face score of --dfa, else 1


@torch.inference_mode()
def embed(net: nn.Module, arm: Arm, args, device: torch.device) -> Embedded:
    """Embeddings of a set, in order; of faces the sum of an image's and its mirror's, whose keypoints --dfa
    finds anew. Each process makes its share."""
    net.eval()
    flip, rows = torch.from_numpy(datasets.SCHEMES[5].flip).to(device), []
    for batch in copy.copy(arm.loader):  # whose workers end here; the original's would stay for the whole run

        def view(image, points):
            image, points = inputs(image, points, args.draw_keypoints)
            return image, disturb(points, batch["index"], arm.noise)

        pixels, points = prepare(batch, device)
        score = points.new_ones(len(points))
        if args.dfa:
            points, score = detect(args.dfa, pixels)
        image, points = view(pixels, points)
        if args.dfa:  # in float32, so not under autocast
            mirrored = view(pixels.flip(3), detect(args.dfa, pixels.flip(3))[0])
        else:
            mirrored = image.flip(3), torch.stack([1 - points[..., 0], points[..., 1]], -1)[:, flip]
        with precision(args, device):
            features = net(image, points)
            if args.data != "affnist":
                features = features + net(*mirrored)
        rows.append(torch.cat([features, points.flatten(1), score[:, None]], 1))
    whole = gather_shares(torch.cat(rows), len(arm.data))
    features, keypoints, score = (whole if ranks()[0] else whole.cpu()).split([whole.shape[1] - 11, 10, 1], 1)
    return Embedded(features, keypoints.unflatten(1, (5, 2)), score[:, 0])


def gather_shares(mine: torch.Tensor, count: int) -> torch.Tensor:
    """Rows (count, ...) of a set in its order, of each process's rows of its `shares`."""
    return all_gather(mine).unflatten(0, (ranks()[1], -1)).transpose(0, 1).flatten(0, 1)[:count]


def share_statistics(net: nn.Module):
    """Gives all processes the batch norms' statistics of the first, which the checkpoint has."""
    for module in net.modules() if dist.is_initialized() else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            dist.broadcast(module.running_mean, 0)
            dist.broadcast(module.running_var, 0)


def evaluate(net: nn.Module, centres: torch.Tensor | None, arms: Sequence[Arm], args, device) -> dict:
    """Scores by name, as accuracy, rank1, accuracy@unaligned, tar/0.0001@IJB-C, on rank 0, {} on others.
    Args: centres (C, D), the class weights, to classify digits by, on rank 0."""
    scores = {}
    for arm in arms:
        features, keypoints, faceness = embed(net, arm, args, device)
        if ranks()[0]:
            continue
        for protocol in arm.protocols:
            if isinstance(protocol, Templates):
                for rule in words(args.fusion):
                    pooled = fuse(features, protocol.template, rule, keypoints, faceness)
                    scores |= {f"rank{k}{arm.suffix}@{rule}": share
                               for k, share in identify_templates(pooled, protocol).items()}
                continue
            if isinstance(protocol, np.ndarray):
                cosines = features @ F.normalize(centres).T
                right = cosines.argmax(1) == torch.from_numpy(protocol.astype(np.int64))
                found = {"accuracy": right.double().mean().item()}
            else:
                # IJB, as CVLface has it for its results: unit features of images, times their faceness.
                unit = isinstance(protocol, recognition.TemplateSet)
                found = recognition.score(protocol, F.normalize(features) if unit else features)
            scores |= {f"{key}{arm.suffix}": value for key, value in found.items()}
    return scores


def print_table(rows: dict[str, dict], args):
    """A row for each network {title: scores}, then all other scores, a line each."""
    first = next(iter(rows.values()))
    if args.data == "affnist":
        shown = [("accuracy", "MNIST (%)"), ("accuracy@affine", "affNIST (%)")]
    else:
        shown = [("accuracy", "verified (%)"), ("accuracy@unaligned", "unaligned (%)"),
                 ("rank1", "rank-1 (%)"), ("rank1@unaligned", "unaligned (%)")]
    shown = [column for column in shown if column[0] in first]
    if shown:
        print(f"{args.data}: {args.model}, {args.size} px" + (
            f", unaligned: {args.box}" + (f" x {args.margin}" if args.box != "image" else "")
            if "accuracy@unaligned" in first else ""))
        print(" " * 14 + "".join(f"{title:>15}" for _, title in shown))
        for title, found in rows.items():
            print(f"{title:14}" + "".join(f"{100 * found[key]:>15.2f}" for key, _ in shown))
    for title, found in rows.items():
        for key in found:
            own = key in dict(shown) or "@" not in key or key.startswith("rank5") and "@unaligned" in key
            if not own and "/std" not in key.split("@")[0] and "@step" not in key:
                print(f"{title}: {key} {100 * found[key]:.2f} %")
        for name in [key.removesuffix("@step1") for key in found if key.endswith("@step1") and "/std@"
                     not in key]:
            values = ", ".join(f"{100 * value:.2f}" for _, value in curve(found, args.align_steps, name))
            print(f"{title}: {name} from unaligned to aligned {values} %")


def curve(scores: dict, steps: int, name: str = "accuracy") -> list[tuple[float, float]]:
    """Fig. 5 of a score, of the own test split or with @NAME: (t, score) from unaligned, 0, to aligned, 1."""
    keys = [f"{name}@unaligned", *(f"{name}@step{i}" for i in range(1, steps)), name]
    return [(i / steps, scores[key]) for i, key in enumerate(keys) if key in scores] if steps else []


# ---- Pictures ------------------------------------------------------------------------------------

GREEN, RED, BLUE = (60, 220, 60), (240, 50, 50), (40, 80, 230)


def write_image(path, image: np.ndarray):
    """Writes RGB uint8 (H, W, 3)."""
    if not cv2.imwrite(str(path), image[..., ::-1]):
        raise OSError(f"{path}: the picture could not be written")


def draw_points(image: np.ndarray, points, colour, radius: float) -> np.ndarray:
    """Draws points (N, 2) px on RGB uint8 (H, W, 3), in place, at sub-pixel places."""
    for x, y in np.round(16 * np.asarray(points, np.float64)).astype(int).tolist():  # 4 bits after the point
        cv2.circle(image, (x, y), max(round(16 * radius), 8), colour, -1, cv2.LINE_AA, 4)
    return image


def tile(tiles: list, columns: int) -> np.ndarray:
    """Images of one size side by side, `columns` in a row."""
    tiles = tiles + [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)])


def framed(image: np.ndarray) -> np.ndarray:
    """An image in a white frame of 4 px."""
    return cv2.copyMakeBorder(image, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def examples(data, count: int) -> list[int]:
    """Places of `count` images, evenly spread over a set."""
    return np.linspace(0, len(data) - 1, min(count, len(data))).astype(int).tolist()


def picture(data, i: int, side: int, dfa: str) -> tuple[np.ndarray, np.ndarray]:
    """Image i of a set as RGB uint8 (side, side, 3), and its keypoints (5, 2) in [0, 1], those of --dfa."""
    image, points = prepare(data.__getitems__([(0, i)]), torch.device("cpu"))
    points = detect(dfa, image)[0] if dfa else points
    pixels = image[0].permute(1, 2, 0).expand(-1, -1, 3).byte().numpy()
    pixels = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(pixels), inputs(image, points)[1][0].numpy()


def draw_arms(arms: Sequence[Arm], dfa: str = "", side: int = 160) -> np.ndarray:
    """Images of the own test split with their keypoints: a row for each arm, as aligned and unaligned."""
    tiles = []
    for arm in arms:
        for i in examples(arm.data, 6):
            image, points = picture(arm.data, i, side, dfa)
            tiles.append(framed(draw_points(image, points * side - 0.5, GREEN, side / 50)))
    return tile(tiles, len(tiles) // len(arms))


@torch.inference_mode()
def offsets(net: ViT, keypoints: torch.Tensor) -> torch.Tensor:
    """What the encoding adds to the logits of head 0, B_ij / sqrt(d): keypoints (B, 5, 2) in [0, 1] ->
    (depth, B, N, N)."""
    maps = []
    for block, parts in zip(net.blocks, net.parts(keypoints)):
        keypoint, static = (block.attn.table[None], None) if parts is None else parts
        keypoint, static = keypoint[:, :1], 0 if static is None else static[:1]
        maps.append(net.pairs.gather(keypoint * block.attn.scale, static * block.attn.scale, keypoint.dtype)
                    [:, 0].expand(len(keypoints), -1, -1))
    return torch.stack(maps)


def draw_offset(values: np.ndarray, query: tuple[int, int], keypoints: np.ndarray, side: int) -> np.ndarray:
    """One map (h, w), white at its lowest and blue at its highest value, with the query's patch (row, column)
    as a red star and the keypoints as circles."""
    height, width = values.shape
    share = (values - values.min()) / max(np.ptp(values), 1e-9)
    share = cv2.resize(share.astype(np.float32), (side, side), interpolation=cv2.INTER_NEAREST)[..., None]
    image = (255 + share * (np.array([30, 60, 170]) - 255)).round().astype(np.uint8)
    place = (int((query[1] + 0.5) / width * side), int((query[0] + 0.5) / height * side))
    cv2.drawMarker(image, place, RED, cv2.MARKER_STAR, side // 10, 2, cv2.LINE_AA)
    return framed(draw_points(image, keypoints * side - 0.5, (30, 150, 30), side / 50))


def draw_offsets(net: ViT, data, dfa: str = "", side: int = 160) -> np.ndarray:
    """Fig. 12, then Fig. 13: an image, then maps of head 0. The first rows are one image, a row for each of
    three queries and a column for layers 0, 1, 3, 5, 7; the others three images, by the last of these."""
    height, width = (n // net.patch_embed.proj.stride[0] for n in net.wanted[1:])
    layers = [layer for layer in (0, 1, 3, 5, 7) if layer < len(net.blocks)]
    chosen = [picture(data, i, side, dfa) for i in examples(data, 4)]
    device = net.pos_embed.device
    keypoints = torch.from_numpy(np.stack([points for _, points in chosen])).to(device)
    maps = offsets(net, keypoints).float().cpu().numpy()                      # (depth, 4, N, N)
    queries = [(height // 2, width // 2), (height // 4, width // 4), (height - 2, width // 2)]
    shown = [(0, query) for query in queries] + [(i, queries[0]) for i in range(1, len(chosen))]
    tiles = []
    for i, query in shown:
        image, points = chosen[i]
        tiles.append(framed(draw_points(image.copy(), points * side - 0.5, GREEN, side / 50)))
        for layer in layers:
            values = maps[layer, i, query[0] * width + query[1]].reshape(height, width)
            tiles.append(draw_offset(values, query, points, side))
    return tile(tiles, len(layers) + 1)


def draw_curves(curves: dict[str, list], width: int = 800, height: int = 480) -> np.ndarray:
    """Fig. 5: {title: [(t, accuracy)]}, t from unaligned to aligned, as RGB uint8 (600, 1200, 3)."""
    image, left, top = np.full((600, 1200, 3), 255, np.uint8), 90, 40
    low = math.floor(10 * min(y for points in curves.values() for _, y in points)) / 10
    place = lambda x, y: (round(left + width * x), round(top + height * (1 - y) / (1 - low + 1e-9)))
    font = dict(fontFace=cv2.FONT_HERSHEY_SIMPLEX, fontScale=0.5, color=(40,) * 3, lineType=cv2.LINE_AA)
    text = lambda string, x, y: cv2.putText(image, string, (x, y), **font)
    for i in range(6):
        y = low + (1 - low) * i / 5
        cv2.line(image, place(0, y), place(1, y), (222,) * 3)
        text(f"{100 * y:.0f}", left - 40, place(0, y)[1] + 5)
    text("verified (%)", left, top - 15)
    text("unaligned", left, top + height + 30)
    text("aligned", left + width - 50, top + height + 30)
    for i, (title, points) in enumerate(curves.items()):
        colour, x, y = metrics.CURVE_COLOURS[i % len(metrics.CURVE_COLOURS)], left + width + 30, top + 24 * i
        cv2.polylines(image, [np.array([place(*point) for point in points])], False, colour, 2, cv2.LINE_AA)
        cv2.line(image, (x, y + 8), (x + 28, y + 8), colour, 3)
        text(title, x + 40, y + 13)
    return image


def write_pictures(folder: Path, net: nn.Module, arms: Sequence[Arm], dfa: str):
    """What the paper's figures show, from this run: faces.png, and offsets.png of a ViT with a bias,
    whose keypoints differ most where faces are not aligned."""
    own = [arm for arm in arms if not arm.noise and arm.suffix in ("", "@unaligned", "@affine")]
    if own:
        write_image(folder / "faces.png", draw_arms(own, dfa))
        if isinstance(net, ViT) and net.rpe_name not in ("none", "irpe"):
            write_image(folder / "offsets.png", draw_offsets(net, own[-1].data, dfa))


# ---- Run-time: the same lines in all five scripts ------------------------------------------------

def setup(args) -> tuple[int, int, torch.device]:
    """Starts the processes that --gpus asks for; returns this one's rank, their number and its device.

    `python script.py --gpus 4` replaces itself by torchrun; under a torchrun of the user's (several machines)
    RANK is set and nothing is started. The processes talk through nccl on GPUs and gloo on CPUs.
    Raises: ValueError for fewer GPUs than asked for, or a batch that does not divide over the processes.
    """
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise ValueError("--device cuda: PyTorch sees no GPU here; take --device cpu")
    if args.gpus > 1 and "RANK" not in os.environ:
        if cuda and torch.cuda.device_count() < args.gpus:
            raise ValueError(f"--gpus {args.gpus}: PyTorch sees {torch.cuda.device_count()}")
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                  f"--nproc-per-node={args.gpus}", *sys.argv])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size < 1 or args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size} does not divide over {world} processes")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1 and not dist.is_initialized():  # two hours: the others wait while rank 0 evaluates
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    return rank, world, device


def seed_all(seed: int, epoch: int = 0, rank: int = 0):
    """Seeds PyTorch as a function of where the run is, so that no generator's state needs to be saved."""
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0]))


def precision(args, device: torch.device):
    """Autocast to bfloat16 with --amp on a GPU, else a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp and device.type == "cuda")


def find_run(args, name: str) -> Path | None:
    """The folder to resume or of --output, None for the default of a new run. Nothing is made yet.
    Raises: FileExistsError for an --output that holds a run, without --resume; FileNotFoundError for nothing
        to resume."""
    base = f"{name}-{args.data}"
    if args.resume and not args.output:  # the newest run, not an older one in its place
        found = [re.fullmatch(re.escape(base) + r"(?:-(\d+))?", path.name) for path in Path("runs").glob("*")]
        number = max((int(match[1] or 1) for match in found if match), default=1)
        args.output = str(Path("runs", base if number == 1 else f"{base}-{number}"))
    if args.resume and not Path(args.output, "last.pt").exists():
        raise FileNotFoundError(f"--resume: no checkpoint {Path(args.output, 'last.pt')}; name the run's "
                                f"folder by --output, or start it anew")
    if args.output and not args.resume and Path(args.output, "last.pt").exists():
        raise FileExistsError(f"--output {args.output} holds a run: continue it by --resume, or name another")
    return Path(args.output) if args.output else None


def make_run(args, name: str, folder: Path | None) -> Path:
    """Makes the folder of a run: `folder`, or runs/NAME-DATA with the next free number."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for number in itertools.count(1):  # mkdir is atomic: two runs that start at once get two folders
        folder = Path("runs", f"{name}-{args.data}" + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            pass


def save(path: Path, **state):
    """Writes tensors and plain values beside `path`, then renames the file: it is whole, or not there."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_tensors(path) -> dict:
    """Reads a dict of tensors and plain values to the CPU.   Raises: FileNotFoundError; ValueError."""
    if not os.path.isfile(path):
        hint = ", a folder: name the last.pt in it" if os.path.isdir(path) else ""
        raise FileNotFoundError(f"no checkpoint {path}{hint}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # zip, pickle and storage errors all mean the same here
        raise ValueError(f"{path} is cut short, or holds more than tensors and plain values") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a dict of tensors")
    return state


def load(path, script: str) -> dict:
    """Reads a checkpoint of `script`, to the CPU.   Raises: FileNotFoundError; ValueError."""
    state = read_tensors(path)
    if state.get("script") != script or not {"model", "args", "epoch"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of {script}.py, but of {state.get('script', 'another')}")
    return state


def restore_args(args, saved: dict, free: set[str]):
    """Gives `args` the flags of a checkpoint's run, except those in `free`, which stay the command's.
    Raises: ValueError for a flag that was typed and contradicts the run."""
    for key, value in saved.items():
        if key in free or key not in vars(args):
            continue
        if key in args.given and getattr(args, key) != value:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)}: the checkpoint was made with "
                             f"{value}; leave the flag out, or start a new run")
        setattr(args, key, value)


def write_log(path: Path, **row):
    """Appends one JSON line."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def cut_log(path: Path, epoch: int):
    """Drops the lines after `epoch`, which a run wrote before it was killed and will write again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        part = path.with_name(path.name + ".part")
        part.write_text("".join(line for line in lines if json.loads(line)["epoch"] <= epoch))
        os.replace(part, path)


def check_losses(losses: torch.Tensor, epoch: int):
    """Raises FloatingPointError for a loss (steps,) of an epoch that is not finite."""
    for step in (~losses.isfinite()).nonzero()[:1, 0].tolist():
        raise FloatingPointError(f"the loss is {losses[step].item()} at epoch {epoch}, step {step + 1}; the "
                                 f"last checkpoint is whole; a lower --lr is the usual cure")


def check_weights(net: nn.Module, epoch: int):
    """Raises FloatingPointError before a network is saved that holds something not finite."""
    bad = [name for name, value in net.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise FloatingPointError(f"epoch {epoch} left {bad[0]} and {len(bad) - 1} more tensors not finite; "
                                 "an earlier checkpoint is whole; a lower --lr is the usual cure")


def run(main, args):
    """Calls main(args); what is wrong with flags, files or numbers ends the program by its message alone."""
    try:
        main(args)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{Path(sys.argv[0]).name}: stopped; --resume continues after the last whole epoch")


# ---- Loaders and checkpoints ---------------------------------------------------------------------

# Flags of the machine or the command, not of the run whose checkpoint is opened; --eval also chooses DATA.
MACHINE = {"output", "gpus", "device", "workers", "compile", "resume", "eval", "predict", "weights", "cache",
           "given", "detector", "align"}
LOOK = {"test", "unaligned", "align_steps", "keypoint_noise", "also_rpe", "fusion"}  # the run's, unless typed
FILES = {"data_root", "landmarks", "dfa"}  # likewise: they may lie elsewhere now
DATA = {"data", "data_root", "amp", "limit", "batch_size", "landmarks", "points"}


def make_loader(args, data, batches, device: torch.device, everywhere: bool = False):
    """Loader over `batches`; keeps crops as --cache says, for data that is `everywhere` once a machine."""
    first, wait = int(os.environ.get("LOCAL_RANK", 0)) == 0, everywhere and dist.is_initialized()
    if args.cache:
        if wait and not first:
            dist.barrier()
        data.regions.keep(args.cache, verbose=first)
        if wait and first:
            dist.barrier()
    workers = args.workers if args.workers >= 0 else 8 if device.type == "cuda" else 0
    return datasets.make_loader(data, batches, workers, device, args.cache == "device")


def crop_loader(args, data, batches, device: torch.device, kept: bool = True):
    """`make_loader` in all processes; --cache is for crops that are `kept`, not whole images and digits."""
    cache = args.cache if kept and isinstance(data, datasets.CropDataset) else ""
    return make_loader(argparse.Namespace(workers=args.workers, cache=cache), data, batches, device, True)


def build(args, device: torch.device) -> nn.Module:
    """The network that the flags describe, on `device`."""
    if args.task == "gait":
        return SwinGait(args.dim, args.heads, args.rpe, drop_path=args.drop_path).to(device)
    if args.model.startswith("iresnet"):
        return IResNet(int(args.model.removeprefix("iresnet")), args.size).to(
            device, memory_format=torch.channels_last)
    own = dict(dim=args.dim, depth=args.depth, heads=args.heads, mlp_ratio=args.mlp_ratio)
    size = (own if args.model == "own" else VIT_SIZES[args.model]) | dict(
        patch=args.patch, image_size=args.size)
    return ViT(size, args.rpe, args.num_keypoints, 1 if args.data == "affnist" else 3,
               drop_path=args.drop_path).to(device)


def load_weights(net: nn.Module, weights: dict, path) -> None:
    """Gives a network a checkpoint's tensors.   Raises: ValueError for a name or shape that does not fit."""
    own, found = ({name: tuple(getattr(value, "shape", ())) for name, value in tensors.items()}
                  for tensors in (net.state_dict(), weights))
    if wrong := [name for name in own | found if own.get(name) != found.get(name)]:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit the network that its flags describe; the "
                         f"first, {wrong[0]}, is {found.get(wrong[0], 'missing')}, expected "
                         f"{own.get(wrong[0], 'none')}; the file was changed, or is of another version")
    net.load_state_dict(weights)


def load_task(path, task: str) -> dict:
    """Reads a checkpoint of --task `task`, to the CPU.   Raises: as `load`; ValueError for another task."""
    state = load(path, "kprpe")
    if (own := state["args"].get("task", "face")) != task:
        raise ValueError(f"{path} is a checkpoint of --task {own}, not {task}")
    return state


def open_checkpoint(args, path: str, free: set[str]) -> tuple[nn.Module, dict, torch.device]:
    """A checkpoint's network, in evaluation mode, its classifier's state, and the device; `args` takes its
    flags over, but for `free`, the typed ones of DATA, and all of DATA where --data names another set."""
    device, given = setup(args)[2], set(args.given)
    state = load_task(path, args.task)
    other = "data" in given and args.data != state["args"]["data"]
    if (other or args.predict) and "affnist" in (args.data, state["args"]["data"]):
        raise ValueError(f"--data {args.data}: {path} is of a run on {state['args']['data']}")
    restore_args(args, state["args"], MACHINE | LOOK | free | ({"dfa"} & given) |
                 (DATA if other else DATA & given))
    net = build(args, device)
    load_weights(net, state["model"], path)
    return net.eval(), state["head"], device


def evaluate_checkpoint(args) -> dict:
    """--eval: the numbers of a checkpoint on the test split of --data and on --test; with --output, the
    pictures too. The unaligned crop is that of its run, unless --box or --margin are given."""
    net, head, device = open_checkpoint(args, args.eval, {"box", "margin"} & set(args.given))
    folder = find_run(args, "kprpe")
    arms = test_arms(args, device)
    if not arms:
        raise ValueError(f"--data {args.data} has no test split in {args.data_root}; give --test")
    scores = evaluate(net, head["weight"], arms, args, device)
    if scores:
        print_table({args.rpe: scores}, args)
        if folder:
            folder = make_run(args, "kprpe", folder)
            write_pictures(folder, net, arms, args.dfa)
            draw_fig5(folder, {args.rpe: scores}, args)
    return scores


def open_detector(path: str):
    """cv2's detector from a YuNet model file.   Raises: ValueError for another kind of file."""
    try:
        return cv2.FaceDetectorYN.create(path, "", (320, 320))
    except cv2.error as error:
        raise ValueError(f"--detector {path}: no YuNet model that OpenCV can read ({error.err})") from None


def find_keypoints(args, path: str, image: np.ndarray, detector, device: torch.device) -> list[tuple]:
    """The faces of an image: box (4,) x0 y0 x1 y1 px, or None for the whole image; keypoints (5, 2) px, or
    None. By the detector; else one, of --box, and of the landmarks in NAME.pts beside the image or by --dfa.
    Raises: ValueError for a --box outside the image, or landmarks of no known scheme."""
    height, width = image.shape[:2]
    if detector is not None:
        detector.setInputSize((width, height))
        found = detector.detect(np.ascontiguousarray(image[..., ::-1]))[1]
        found = np.zeros((0, 15)) if found is None else found.astype(np.float64)
        # Behind the box, YuNet has the person's right eye, that is the image-left one, first.
        return [(np.concatenate([row[:2], row[:2] + row[2:4]]), row[4:14].reshape(5, 2)) for row in found]
    beside, points, box = os.path.splitext(path)[0] + ".pts", None, None
    if args.task == "face" and os.path.isfile(beside):
        points = datasets.read_pts(beside)
        box = np.concatenate([points.min(0), points.max(0)]) if args.box == "landmarks" else None
        points = five_points(points[None], beside)[0]
    if args.box not in BOXES:
        box = np.array(parse_box(args.box))
        if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
            raise ValueError(f"--box {args.box} lies outside an image of {width} x {height}")
    if points is None and args.dfa:
        points = find_face(open_dfa(args.dfa, device)[0], image, box)
    return [(box, points)]


def each_face(args, name: str, endings: Sequence[str], device: torch.device) -> Iterator[tuple]:
    """The faces of --predict: path of its image, image, box and keypoints by `find_keypoints`, and the path
    that its files have but for their `endings`, in a folder that is made, or of a run called `name`.
    Raises: ValueError for an image that cannot be read; FileExistsError before a file is written over."""
    detector = open_detector(args.detector) if args.detector else None
    found = datasets.image_paths(args.predict)  # {name: path}
    datasets.check_images([datasets.Face(path) for path in found.values()])
    args.data = "predict"
    folder, count = find_run(args, name), 0
    for target in (folder / f"{stem}{end}" for stem in found for end in endings) if folder else ():
        if target.exists():
            raise FileExistsError(f"--output {folder}: {target} exists already; name another folder")
    folder = make_run(args, name, folder)
    for stem, path in tqdm(found.items(), "predict"):
        image = datasets.load_image(path)
        (folder / stem).parent.mkdir(parents=True, exist_ok=True)
        for i, (box, points) in enumerate(find_keypoints(args, path, image, detector, device), 1):
            yield path, image, box, points, str(folder / stem) + (f".face{i}" if i > 1 else "")
            count += 1
    print(f"{count} faces of {len(found)} images in {folder}")


def predict(args) -> dict:
    """--predict: for each face writes the crop that the network saw as NAME.png, its unit embedding as
    NAME.npy, and its keypoints, if it has any, as NAME.pts in px of the image.

    Keypoints come from --detector, from NAME.pts beside the image, as the landmark scripts write it, or from
    --dfa, by which the network also sees the crop's own, as in an evaluation. Faces are aligned by them, but
    with --no-align; one without is cropped by --box, or taken as it stands. A further face of an image is
    NAME.face2.png and so on. Pixels are taken as stored: turn a photo that has an orientation tag.
    Raises: FileNotFoundError for a path without images; ValueError for two images of one name, one that
        cannot be read, or one without keypoints if the network needs them; FileExistsError before a file is
        written over."""
    args.gpus = 1
    net, _, device = open_checkpoint(args, args.weights, DATA | ({"box", "margin"} & set(args.given)))
    if args.dfa:
        open_dfa(args.dfa, device)  # or an error, before anything is written
    for path, image, box, points, target in each_face(args, "kprpe", (".png", ".pts", ".npy"), device):
        if points is None and getattr(net, "rpe", None) is not None:
            raise ValueError(f"{path}: the network needs keypoints: put {Path(path).stem}.pts beside it, as "
                             "the landmark scripts' --predict writes it, or give --dfa or --detector")
        own = points if points is None else points[None].astype(np.float32)
        face = datasets.Face(image, None if own is None else own[0])
        split = Split([image], own, [face], None if box is None else box[None])
        data = make_dataset(args, split, float(args.align and own is not None))
        batch = data.__getitems__([(0, 0)])
        feature = embed(net, Arm(data, [batch], []), args, device).features[0]
        write_image(target + ".png", batch["image"][0].numpy())
        np.save(target + ".npy", F.normalize(feature, dim=0).numpy())
        if points is not None:
            datasets.write_pts(target + ".pts", points)
    return {}


# ---- Training ------------------------------------------------------------------------------------

def summary(row: dict) -> str:
    """A log's row as a line to read."""
    words = []
    for key, value in row.items():
        kind, _, part = key.split("@")[0].partition("/")
        if "@step" in key or part and kind != "tar":
            continue
        percent = kind in ("accuracy", "rank1", "rank5", "rank10", "map", "minp", "tar")
        words.append(f"{key} {100 * value:.2f} %" if percent else f"{key} {value:.4g}")
    return ", ".join(words)


def make_learner(args, images, state: dict | None, device: torch.device, rank: int):
    """Network, classifier and their optimizer: new, or as a checkpoint's `state` has them."""
    seed_all(args.seed)
    classes, count = len(images.ids), len(images)
    if state and state["classes"] != [classes, count]:
        raise ValueError(f"--resume: {count} images of {classes} identities, the run was started on "
                         f"{state['classes'][1]} of {state['classes'][0]}; see --data-root")
    net = build(args, device)
    fc = PartialFC(512, classes, MARGINS[args.loss](scale=args.scale), args.sample_rate).to(device)
    divisor = 1 / net.blocks[0].attn.scale if args.rpe in (*STATIC, *KEYPOINT) else 1.0
    groups = parameter_groups(net, args.weight_decay, args.rpe_lr or divisor)
    groups[0]["params"].append(fc.weight)
    optimizer = torch.optim.AdamW(groups, args.lr, fused=True)
    if state:
        load_weights(net, state["model"], Path(args.output, "last.pt"))
        optimizer.load_state_dict(state["optimizer"])
        fc.load_shards(state["head"], optimizer)
    if rank == 0:
        print(f"{args.model}, {args.rpe}, {args.loss}, {device.type}; parameters: network "
              f"{sum(p.numel() for p in net.parameters()):,}, classes {classes * 512:,}")
    return net, fc, optimizer


def network_state(optimizer: torch.optim.Optimizer, fc: PartialFC) -> dict:
    """The optimizer's state without that of the class weights, which `PartialFC.gather_state` has."""
    state, weights = optimizer.state_dict(), [w for group in optimizer.param_groups for w in group["params"]]
    state["state"].pop([w is fc.weight for w in weights].index(True), None)
    return state


@torch.no_grad()
def clip_gradients(net: nn.Module, fc: PartialFC, limit: float):
    """Scales all gradients down to a common norm of `limit`. The network's are the same in all processes; of
    the class weights each process has its own, and the squares are summed over the processes."""
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    own = nn.utils.get_total_norm(grads)
    norm = (own**2 + all_reduce(fc.weight.grad.norm()**2)).sqrt()
    nn.utils.clip_grads_with_norm_([*net.parameters(), fc.weight], limit, norm)


def wrap(net: nn.Module, args, device: torch.device) -> nn.Module:
    """The network to step through: compiled, and in several processes with gradients that are means."""
    model = torch.compile(net) if args.compile else net
    if dist.is_initialized():  # buffers: see share_statistics
        model = nn.parallel.DistributedDataParallel(
            model, [device] if device.type == "cuda" else None, broadcast_buffers=False)
    return model


def begin_run(args, name: str, folder: Path | None, state: dict | None, what: str) -> Path | None:
    """On rank 0: makes the run's folder and says so, and `what` is trained on; cuts a killed run's log."""
    rank, world = ranks()
    if rank:
        return folder
    folder, done = make_run(args, name, folder), state["epoch"] if state else 0
    print(f"run: {folder}, {what}, processes: {world}, epochs done: {done} of {args.epochs}", flush=True)
    if 2 * args.warmup > args.epochs:
        print(f"note: the rate rises for {args.warmup:g} of {args.epochs} epochs; a run this short wants a "
              f"smaller --warmup")
    if state and state["world"] != world:
        print(f"the run had {state['world']} processes: batch norms now see other shares, numbers change")
    cut_log(folder / "log.jsonl", done)
    return folder


def progress(args, start: int, steps: int, rank: int) -> tqdm:
    """The bar of a run of epochs of `steps`, on rank 0."""
    return tqdm(total=args.epochs * steps, initial=start * steps, disable=rank > 0,
                mininterval=1 if sys.stderr.isatty() else 30)


def one_pass(args, epoch: int, steps: int, loader, loss_of: Callable, optimizer, bar: tqdm,
             device: torch.device, clip: Callable) -> torch.Tensor:
    """Training over one epoch's batches, each a step down `loss_of(batch)`; the losses (steps,).
    Args: clip(--clip), which scales the gradients.   Raises: FloatingPointError."""
    losses = torch.zeros(steps, device=device)
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(
                epoch * steps + step, args.epochs * steps, args.warmup * steps, args.lr)
        loss = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if args.clip:
            clip(args.clip)
        optimizer.step()
        losses[step] = loss.detach()
        if step % 20 == 0:  # the only reading of the loss: it waits for the GPU
            check_losses(losses, epoch + 1)
            bar.set_postfix(epoch=epoch + 1, loss=f"{losses[step].item():.3f}", refresh=False)
        bar.update()
    check_losses(losses, epoch + 1)
    return losses


def train(args) -> tuple[dict, Path]:
    """Trains by the flags; returns the numbers of the last evaluation, and the folder of the run."""
    # Set-up
    rank, world, device = setup(args)
    folder = find_run(args, "kprpe")
    state = load_task(folder / "last.pt", args.task) if args.resume else None
    if state:
        restore_args(args, state["args"], MACHINE | ((LOOK | FILES) & set(args.given)))
    # Data and network
    images, train_set = training_set(args)
    labels, strength = torch.from_numpy(images.labels), AUGMENTATIONS[args.augment]
    net, fc, optimizer = make_learner(args, images, state, device, rank)
    model = wrap(net, args, device)  # not fc: the classes are sharded
    batches = SubjectBatches(images.labels, args.batch_size, args.repeat, args.seed, rank, world)
    loader = crop_loader(args, train_set, batches, device)
    steps, start, scores, began = len(batches), state["epoch"] if state else 0, {}, time.time()
    arms, flip = test_arms(args, device), datasets.SCHEMES[5].flip  # before anything is written
    folder = begin_run(args, "kprpe", folder, state,
                       f"{len(images):,} training images of {len(images.ids):,} identities")
    del state

    def loss_of(batch):
        image, points = prepare(batch, device)
        if args.dfa and wants_keypoints(args, args.rpe):
            points = detect(args.dfa, image)[0]
        if strength is not None:
            image, points = augment(image, points, strength, flip)
        with precision(args, device):
            embeddings = model(*inputs(image, points, args.draw_keypoints))
        return fc(embeddings, labels[batch["index"]])  # over all processes

    bar = progress(args, start, steps, rank)
    for epoch in range(start, args.epochs):
        seed_all(args.seed, epoch + 1, rank)
        batches.epoch, epoch_began = epoch, time.time()
        net.train(), fc.train()
        losses = one_pass(args, epoch, steps, loader, loss_of, optimizer, bar, device,
                          functools.partial(clip_gradients, net, fc))
        for part in (net, fc):
            check_weights(part, epoch + 1)
        # Evaluation by all processes, log and checkpoint by the first
        share_statistics(net)
        head, last = fc.gather_state(optimizer), epoch + 1 == args.epochs
        row = dict(epoch=epoch + 1, loss=losses.mean().item(), lr=optimizer.param_groups[0]["lr"],
                   images_per_second=steps * args.batch_size / (time.time() - epoch_began))
        if last or (epoch + 1) % args.eval_every == 0:
            scores = evaluate(net, head["weight"], [a for a in arms if last or not a.late], args, device)
            row |= scores
        if rank == 0:
            row["minutes"] = (time.time() - began) / 60
            bar.write(summary(row))
            write_log(folder / "log.jsonl", **row)
            save(folder / "last.pt", script="kprpe", model=net.state_dict(), head=head, epoch=epoch + 1,
                 optimizer=network_state(optimizer, fc), args=vars(args), world=world,
                 classes=[len(images.ids), len(images)])
    bar.close()
    if start >= args.epochs:  # it was killed after its last checkpoint
        scores = evaluate(net, fc.whole(fc.weight), arms, args, device)
    if rank == 0:
        write_pictures(folder, net, arms, args.dfa)
        draw_fig5(folder, {args.rpe: scores}, args)
    return scores, folder


def draw_fig5(folder: Path, rows: dict[str, dict], args):
    """alignment.png: the curves of networks {title: scores}, if they were measured."""
    curves = {title: curve(scores, args.align_steps) for title, scores in rows.items()}
    if curves := {title: points for title, points in curves.items() if len(points) > 1}:
        write_image(folder / "alignment.png", draw_curves(curves))


# ---- Face aligner: supplement, Eqs. 13 to 15 -----------------------------------------------------

# Stride of each level in px, and the sides of its anchors.   Source: code; RetinaFace's own are 16 to 512.
ANCHORS = ((8, (64, 80)), (16, (96, 112)), (32, (128, 144)))
VARIANCE = (0.1, 0.2)  # units of encoded places and of encoded logarithms of sizes (SSD)
AGGREGATION = 30.0  # weight of the aggregated box and landmarks in the loss; ours
DFA_MARGIN = 1.2  # side of the crop over the longer side of the face's box: "padding of 0.1" (supp. 3)
leaky = functools.partial(nn.LeakyReLU, 0.1)


def prior_boxes(size: int = 160) -> torch.Tensor:
    """Anchors cx, cy, w, h in units of the image's side, (N, 4), 1,050 of them at 160 px. Order: level, row,
    column, side.   Args: size of the image in px, a multiple of 32.   Raises: ValueError."""
    if size < 32 or size % 32:
        raise ValueError(f"anchors of an image of {size} px: expected a multiple of 32, as 160")
    priors = []
    for stride, sides in ANCHORS:
        centres = (torch.arange(size // stride) + 0.5) * stride
        y, x, side = torch.meshgrid(centres, centres, torch.tensor(sides, dtype=torch.float32), indexing="ij")
        priors.append(torch.stack([x, y, side, side], -1).view(-1, 4) / size)
    return torch.cat(priors)


def encode_boxes(boxes: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """Boxes (..., 4) x0 y0 x1 y1 as anchors' offsets; boxes and priors (..., 4) broadcast."""
    low, high = boxes.split(2, -1)
    place = ((low + high) / 2 - priors[..., :2]) / (VARIANCE[0] * priors[..., 2:])
    return torch.cat([place, ((high - low) / priors[..., 2:]).log() / VARIANCE[1]], -1)


def decode_boxes(encoded: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_boxes`."""
    centre = priors[..., :2] + VARIANCE[0] * encoded[..., :2] * priors[..., 2:]
    half = priors[..., 2:] * (VARIANCE[1] * encoded[..., 2:]).exp() / 2
    return torch.cat([centre - half, centre + half], -1)


def encode_points(points: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """Points (..., P, 2) as anchors' offsets (..., 2P), x y x y; points and priors (..., 4) broadcast."""
    return ((points - priors[..., None, :2]) / (VARIANCE[0] * priors[..., None, 2:])).flatten(-2)


def decode_points(encoded: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_points`."""
    offset = VARIANCE[0] * encoded.unflatten(-1, (-1, 2)) * priors[..., None, 2:]
    return priors[..., None, :2] + offset


def separable(cin: int, cout: int, stride: int = 1) -> nn.Sequential:
    """Depthwise 3x3, then 1x1: (B, cin, H, W) -> (B, cout, H/stride, W/stride). Source: MobileNet (2017)."""
    return nn.Sequential(*conv_bn(cin, cin, 3, stride, cin, leaky), *conv_bn(cin, cout, 1, act=leaky))


class MobileNet(nn.Module):
    """MobileNetV1, a quarter wide: images (B, 3, H, W) -> features of strides 8, 16, 32, 64 to 256 channels.
    paper: MobileNetV2, code: V1; we follow the code, whose size Table 9 has."""

    def __init__(self):
        super().__init__()
        self.stage1 = nn.Sequential(conv_bn(3, 8, 3, 2, act=leaky), separable(8, 16), separable(16, 32, 2),
                                    separable(32, 32), separable(32, 64, 2), separable(64, 64))
        self.stage2 = nn.Sequential(separable(64, 128, 2), *(separable(128, 128) for _ in range(5)))
        self.stage3 = nn.Sequential(separable(128, 256, 2), separable(256, 256))

    def forward(self, image):
        fine = self.stage1(image)
        middle = self.stage2(fine)
        return fine, middle, self.stage3(middle)


class FPN(nn.Module):
    """Feature pyramid: levels of 64, 128, 256 channels -> three of 64, coarse ones added to the finer.
    Source: Lin et al., CVPR 2017, with RetinaFace's names."""

    def __init__(self):
        super().__init__()
        self.output1, self.output2, self.output3 = (conv_bn(c, 64, 1, act=leaky) for c in (64, 128, 256))
        self.merge1, self.merge2 = (conv_bn(64, 64, 3, act=leaky) for _ in range(2))

    def forward(self, fine, middle, coarse):
        coarse = self.output3(coarse)
        middle = self.merge2(self.output2(middle) + F.interpolate(coarse, scale_factor=2.0))
        fine = self.merge1(self.output1(fine) + F.interpolate(middle, scale_factor=2.0))
        return fine, middle, coarse


class SSH(nn.Module):
    """Context of 3, 5 and 7 px by stacked 3x3 convolutions: (B, 64, H, W) -> same shape.
    Source: Najibi et al., ICCV 2017, with RetinaFace's names."""

    def __init__(self):
        super().__init__()
        self.conv3X3 = conv_bn(64, 32, 3)
        self.conv5X5_1, self.conv5X5_2 = conv_bn(64, 16, 3, act=leaky), conv_bn(16, 16, 3)
        self.conv7X7_2, self.conv7x7_3 = conv_bn(16, 16, 3, act=leaky), conv_bn(16, 16, 3)

    def forward(self, x):
        wide = self.conv5X5_1(x)
        return F.relu(torch.cat([self.conv3X3(x), self.conv5X5_2(wide),
                                 self.conv7x7_3(self.conv7X7_2(wide))], 1))


class MixerBlock(nn.Module):
    """Mixes anchors, then channels: (B, N, channels) -> same shape. Source: Tolstikhin et al., 2021."""

    def __init__(self, anchors: int, channels: int = 16, token_dim: int = 8, channel_dim: int = 64):
        super().__init__()
        mlp = lambda dim, hidden: nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.norm1, self.across = nn.LayerNorm(channels, eps=1e-6), mlp(anchors, token_dim)
        self.norm2, self.within = nn.LayerNorm(channels, eps=1e-6), mlp(channels, channel_dim)

    def forward(self, x):
        x = x + self.across(self.norm1(x).mT).mT
        return x + self.within(self.norm2(x))


class Found(NamedTuple):
    """What the aligner sees in images; places are in [0, 1], (x + 0.5) / W."""
    landmarks: torch.Tensor  # (B, 5, 2) L of Eq. (15): eyes, nose tip, mouth corners, image-left first
    score: torch.Tensor      # (B,) face score of the same weights, 0 to 1
    best: torch.Tensor       # (B, 5, 2) landmarks of the one anchor of the highest face score
    weights: torch.Tensor    # (B, N) w of Eq. (14)
    fused: torch.Tensor      # (B, 16) w^T O: box x0 y0 x1 y1, logits of "no face" and "face", 10 coordinates
    boxes: torch.Tensor      # (B, N, 4) of each anchor, encoded
    logits: torch.Tensor     # (B, N, 2)
    points: torch.Tensor     # (B, N, 10), encoded


class DFA(nn.Module):
    """Differentiable face aligner: the five landmarks of the one face in each image.

    Takes square images (B, 3, S, S), RGB in [-1, 1] (code: BGR), and resizes those of another side than
    `size`; pixel centres go to pixel centres (code: corners to corners, up to half a pixel off).
    Returns: `Found`.   Args: size in px of what the network sees, a multiple of 32.   Raises: ValueError.
    Source: supp. 3; names of weights as in RetinaFace, but for the aggregation."""

    def __init__(self, size: int = 160):
        super().__init__()
        self.size = size
        self.register_buffer("priors", prior_boxes(size), persistent=False)
        self.body, self.fpn = MobileNet(), FPN()
        self.ssh1, self.ssh2, self.ssh3 = SSH(), SSH(), SSH()
        self.ClassHead, self.BboxHead, self.LandmarkHead = (nn.ModuleList(
            nn.Sequential(OrderedDict(conv1x1=nn.Conv2d(64, 2 * width, 1))) for _ in ANCHORS)
            for width in (2, 4, 10))                                          # two anchors a cell
        self.aggregation = nn.Sequential(*(MixerBlock(len(self.priors)) for _ in range(3)), nn.Linear(16, 1))

    def heads(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Logits (B, N, 2), encoded boxes (B, N, 4) and landmarks (B, N, 10) of images of the size."""
        fine, middle, coarse = self.fpn(*self.body(image))
        levels = self.ssh1(fine), self.ssh2(middle), self.ssh3(coarse)
        rows = lambda x, width: x.permute(0, 2, 3, 1).reshape(len(x), -1, width)
        return [at_least_float32(torch.cat([rows(head(x), width) for head, x in zip(heads, levels)], 1))
                for heads, width in ((self.ClassHead, 2), (self.BboxHead, 4), (self.LandmarkHead, 10))]

    def forward(self, image: torch.Tensor) -> Found:
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] != image.shape[3]:
            raise ValueError(f"images have the shape {tuple(image.shape)}: expected (B, 3, S, S)")
        if image.shape[2] != self.size:  # places in [0, 1] stay
            image = F.interpolate(image, (self.size,) * 2, mode="bilinear", antialias=True)
        if image.device.type == "cpu":  # a quarter faster there
            image = image.contiguous(memory_format=torch.channels_last)
        logits, boxes, points = self.heads(image)
        landmarks = decode_points(points, self.priors)                        # (B, N, 5, 2)
        # Eq. (13): O = Concat(F_bbox, F_score, F_ldmk).   paper: 4 + 1 + 10 channels, code: 4 + 2 + 10, which
        # the number of parameters has; we follow the code.
        O = torch.cat([decode_boxes(boxes, self.priors), logits, landmarks.flatten(2)], -1)  # (B, N, 16)
        # Eq. (14): w = Softmax(MixerMLP(O))
        weights = at_least_float32(self.aggregation(O)[..., 0]).softmax(-1)   # (B, N)
        # Eq. (15): L = w^T F_ldmk, and the same of the box and the score. No matrix product: bfloat16 would
        # round coordinates under autocast.
        fused = (weights[..., None] * O).sum(1)                               # (B, 16)
        top = (logits[..., 1] - logits[..., 0]).argmax(1)
        best = landmarks[torch.arange(len(image), device=image.device), top]
        return Found(fused[:, 6:].unflatten(-1, (5, 2)), fused[:, 4:6].softmax(-1)[:, 1], best, weights,
                     fused, boxes, logits, points)


class Target(NamedTuple):
    """The face in each image, in [0, 1] of it."""
    box: torch.Tensor        # (B, 4) x0 y0 x1 y1
    landmarks: torch.Tensor  # (B, 5, 2), anything where not marked
    marked: torch.Tensor     # (B,) bool: whether the landmarks are known, as not of all faces of WIDER FACE


def match(boxes: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """Which anchors stand for each box: an overlap (IoU) of at least 0.35, and the best one if 0.2 or more.
    Args: boxes (B, 4) x0 y0 x1 y1; priors (N, 4) cx cy w h.   Returns: (B, N) bool.
    Source: SSD; the thresholds are those of RetinaFace's usual code."""
    low, high = priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2
    first, last = boxes[:, None, :2], boxes[:, None, 2:]
    both = (last.minimum(high) - first.maximum(low)).clamp(min=0).prod(-1)                       # (B, N)
    overlap = both / ((last - first).prod(-1) + priors[:, 2:].prod(-1) - both)
    top = overlap.argmax(1, keepdim=True)
    return (overlap >= 0.35).scatter(1, top, overlap.gather(1, top) >= 0.2)


def smooth_l1(pred: torch.Tensor, target: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Sum of smooth L1 over the rows of (..., C) that `where` (...) marks, over their number (1 at least).
    The others may hold anything in `target`."""
    target = torch.where(where[..., None], target, pred.detach())
    return F.smooth_l1_loss(pred, target, reduction="sum") / where.sum().clamp(min=1)


def multibox_loss(found: Found, target: Target, priors: torch.Tensor) -> torch.Tensor:
    """Loss of each anchor for itself: (3,), of the class, the box and the landmarks, over the number of
    positive anchors (of this process). Of the negative ones the worst count in the class, 7 for each positive
    of an image.   Source: RetinaFace's usual code; the authors' training script is not published."""
    positive = match(target.box, priors)                                                         # (B, N)
    entropy = F.cross_entropy(found.logits.mT, positive.long(), reduction="none")
    rank = entropy.detach().masked_fill(positive, 0).argsort(dim=1, descending=True, stable=True).argsort(1)
    counted = positive | (rank < 7 * positive.sum(1, keepdim=True))
    return torch.stack([(entropy * counted).sum() / positive.sum().clamp(min=1),
                        smooth_l1(found.boxes, encode_boxes(target.box[:, None], priors), positive),
                        smooth_l1(found.points, encode_points(target.landmarks[:, None], priors),
                                  positive & target.marked[:, None])])


def aggregation_loss(found: Found, target: Target) -> torch.Tensor:
    """Loss of the weighted sum of all anchors, with places in [0, 1]: (3,), of the class, which is "face" in
    every crop, the box and the landmarks, a face's mean.   paper: "smooth L2", code: smooth L1; we follow
    the code. Errors below 1, as all are here, it halves and squares."""
    box, logits, points = found.fused.split((4, 2, 10), -1)
    return torch.stack([F.softplus(logits[:, 0] - logits[:, 1]).mean(),  # cross-entropy
                        F.smooth_l1_loss(box, target.box, reduction="sum") / len(box),
                        smooth_l1(points, target.landmarks.flatten(1), target.marked)])


def dfa_loss(found: Found, target: Target, priors: torch.Tensor) -> torch.Tensor:
    """What `--task dfa` minimises. Boxes count twice (RetinaFace). The weights of the aggregation are not
    published. With 1 for its places, errors of some hundredths, the class alone decides, and within some
    steps one anchor has all the weight; with 30 some share it."""
    face, box, points = multibox_loss(found, target, priors)
    fused_face, fused_box, fused_points = aggregation_loss(found, target)
    return face + 2 * box + points + fused_face + AGGREGATION * (2 * fused_box + fused_points)


def nme(landmarks: torch.Tensor, target: Target) -> torch.Tensor:
    """Error of landmarks (B, 5, 2), over the root of the area of the true box: (B,), float64."""
    return metrics.nme(landmarks, target.landmarks, (target.box[:, 2:] - target.box[:, :2]).prod(-1).sqrt())


# The five points and the corners of the box, in one array so that crops and augmentation move both alike.
FLIP_9 = np.array([1, 0, 2, 4, 3, 6, 5, 8, 7])


def dfa_dataset(faces: Sequence[datasets.Face], size: int = 160, box: str = "face") -> datasets.CropDataset:
    """Faces as the aligner sees them: the square about the box of each, padded by 0.1 of its side (supp. 3).
    The points of a batch are (B, 9, 2) px, see `targets`.   Raises: ValueError."""
    boxes, nine = datasets.face_boxes(faces, box), []
    for i, (face, (x0, y0, x1, y1)) in enumerate(zip(faces, boxes)):
        scheme = None if face.points is None else datasets.SCHEMES.get(len(face.points))
        if scheme is None:
            raise ValueError(f"{face.where or f'face {i}'}: landmarks {np.shape(face.points)}, the aligner "
                             f"learns from {list(datasets.SCHEMES)}")
        points = [*datasets.group_means(face.points, scheme.five), (x0, y0), (x1, y0), (x0, y1), (x1, y1)]
        nine.append(replace(face, points=np.array(points, np.float32)))
    return datasets.CropDataset(nine, datasets.square_frames(boxes, size, DFA_MARGIN), size)


def targets(points: torch.Tensor, size: int) -> Target:
    """Of points (B, 9, 2) px of `dfa_dataset`, moved by an augmentation or not. Unknown landmarks are nan."""
    landmarks, corners = ((points + 0.5) / size).split((5, 4), 1)
    marked = landmarks.isfinite().all(-1).all(-1)
    return Target(torch.cat([corners.amin(1), corners.amax(1)], -1), landmarks.nan_to_num(0.0), marked)


def align_112(image: torch.Tensor, landmarks: torch.Tensor, border: float = -1.0) -> torch.Tensor:
    """Faces with their five points at ArcFace's, by least-squares similarities: one warp, whose gradient
    reaches the landmarks (code: NumPy there, hence none).
    Args: image (B, C, H, W); landmarks (B, 5, 2) in [0, 1] of it, as `DFA` finds them; border, the number
        outside the image. An image of more than twice the resolution should be shrunk before.
    Returns: (B, C, 112, 112), float32 at least.
    Raises: ValueError if landmarks are not (B, 5, 2); on the CPU also if they determine no map."""
    if landmarks.shape != (len(image), 5, 2):
        raise ValueError(f"landmarks have the shape {tuple(landmarks.shape)} for {len(image)} images: "
                         "expected (B, 5, 2)")
    if landmarks.device.type == "cpu":  # elsewhere it would wait for the device
        warp.check_points(landmarks, "similarity")
    points = warp.to_px(2 * at_least_float32(landmarks) - 1, image.shape[-2:])
    five = constant(tuple(datasets.ARCFACE_5.flatten().tolist()), points.device).view(5, 2)
    return warp.warp_affine(image, warp.fit_similarity(points, five), (112, 112), border)


def aligner_set(args, split: str) -> datasets.CropDataset:
    """A split of --data of --task dfa.   Raises: FileNotFoundError; ValueError."""
    if args.data == "faces":
        faces = drawn_faces(args, split)
    else:
        faces = datasets.read(args.data, args.data_root, split)[:args.limit or None]
        datasets.check_images(faces)
    return dfa_dataset(faces, args.size, args.box)


def mean_face(data: datasets.CropDataset) -> torch.Tensor:
    """The mean landmarks of a set in its crops, (5, 2) in [0, 1].   Raises: ValueError if none are known."""
    target = targets(data.crop_points(), data.size)
    if not target.marked.any():
        raise ValueError(f"none of the {len(data)} training faces has landmarks to learn from")
    return target.landmarks[target.marked].mean(0)


ERRORS = ("nme", "nme@best", "nme@mean")  # of the aggregation, the best anchor, the mean training face


@torch.inference_mode()
def evaluate_dfa(net: DFA, mean: torch.Tensor, data, loader, args, device: torch.device) -> torch.Tensor:
    """Errors of each face, (3, N) float64, as ERRORS names them. Each process looks at its share."""
    net.eval()
    rows, mean = [], mean.to(device)
    for batch in copy.copy(loader):  # whose workers end here
        image, points = prepare(batch, device)
        target = targets(points, args.size)
        with precision(args, device):
            found = net(image / 127.5 - 1)
        rows.append(torch.stack([nme(landmarks, target) for landmarks in (
            found.landmarks, found.best, mean.expand_as(found.best))], 1))
    return gather_shares(torch.cat(rows), len(data)).T.cpu()


@torch.inference_mode()
def draw_aligned(net: DFA, data: datasets.CropDataset, device: torch.device, side: int = 160) -> np.ndarray:
    """Faces with true (green) and found (red) landmarks; below them aligned."""
    batch = data.__getitems__([(0, i) for i in examples(data, 8)])
    image, points = prepare(batch, device)
    found, rows = net.eval()(image / 127.5 - 1).landmarks, []
    for pixels, *fives in zip(batch["image"].numpy(), (points[:, :5] + 0.5) / data.size, found):
        rows.append(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_CUBIC))
        for colour, five in zip((GREEN, RED), fives):
            draw_points(rows[-1], five.cpu() * side - 0.5, colour, side / 64)
    for pixels in align_112(image, found, 0.0).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        rows.append(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_CUBIC))
    return tile([framed(pixels) for pixels in rows], len(found))


def report_dfa(folder: Path | None, net: DFA, data, errors: torch.Tensor, args, device) -> dict:
    """The mean errors; rank 0 prints them, and writes aligned.png and ced.png (Fig. 8) to a folder."""
    scores = dict(zip(ERRORS, errors.mean(1).tolist()))
    if ranks()[0] == 0:
        print(f"{args.data}: {len(data):,} faces, NME by the box: {scores['nme']:.4f}, best anchor "
              f"{scores['nme@best']:.4f}, mean face {scores['nme@mean']:.4f}")
        if folder:
            write_image(folder / "aligned.png", draw_aligned(net, data, device))
            names = ("aggregation", "best anchor", "mean face")
            write_image(folder / "ced.png", metrics.ced_plot(dict(zip(names, errors)), 0.2))
    return scores


@functools.cache
def open_dfa(path: str, device: torch.device) -> tuple[DFA, dict]:
    """The network of a checkpoint of --task dfa, to be used as it is, and the rest of the checkpoint; read
    once.   Raises: FileNotFoundError; ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint {path} of a face aligner: give --dfa, or with --task dfa "
                                "--eval or --weights, the last.pt of a run of --task dfa")
    state = load_task(path, "dfa")
    net = DFA(state["args"]["size"]).to(device)
    load_weights(net, state.pop("model"), path)
    return net.eval().requires_grad_(False), state


@torch.no_grad()
def detect(path: str, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keypoints (B, 5, 2) px and face scores (B,) that --dfa finds in images (B, 3, H, W) in 0..255.
    Code: with a black border of 0.215 in training, without when tested; here never, as errors were larger."""
    found = open_dfa(path, image.device)[0](image / 127.5 - 1)
    return found.landmarks * constant(tuple(map(float, image.shape[:1:-1])), image.device) - 0.5, found.score


@torch.inference_mode()
def find_face(net: DFA, image: np.ndarray, box: np.ndarray | None) -> np.ndarray:
    """Landmarks (5, 2) px of the face in a box (4,) x0 y0 x1 y1 px of an image, RGB uint8 (H, W, 3); without
    one, in the box that is found in the whole image."""
    margins = (1.0, DFA_MARGIN) if box is None else (DFA_MARGIN,)
    box = np.array([-0.5, -0.5, image.shape[1] - 0.5, image.shape[0] - 0.5]) if box is None else box
    for margin in margins:
        frame = torch.from_numpy(datasets.square_frames(box[None], net.size, margin))
        crop = datasets.CropDataset([datasets.Face(image)], frame, net.size).__getitems__([(0, 0)])
        found = net(prepare(crop, net.priors.device)[0] / 127.5 - 1)
        places = torch.cat([found.landmarks[0], found.fused[0, :4].view(2, 2)]).double().cpu()
        places = warp.apply_affine(warp.invert(frame[0]), places * net.size - 0.5).numpy()
        box = places[5:].flatten()
    return places[:5]


def predict_dfa(args) -> dict:
    """--task dfa --predict: writes each face's landmarks as NAME.pts, px of the image, for --landmarks, and
    the face aligned as NAME.png. Boxes are those of --detector or --box; else one is found in the image. A
    further face of an image is NAME.face2.pts and so on.   Raises: as `predict`."""
    args.gpus = 1
    device, to = setup(args)[2], torch.from_numpy(datasets.ARCFACE_5)
    net, state = open_dfa(args.weights, device)
    restore_args(args, state["args"], MACHINE | DATA | ({"box"} & set(args.given)))
    for _, image, box, _, target in each_face(args, "kprpe-dfa", (".png", ".pts"), device):
        points = find_face(net, image, box)
        aligned = recognition.WholeImages([image], 112, points[None], align=(to, 1.0)).__getitems__([(0, 0)])
        datasets.write_pts(target + ".pts", points)
        write_image(target + ".png", aligned["image"][0].numpy())
    return {}


def evaluate_aligner(args) -> dict:
    """--task dfa --eval: the errors of a checkpoint on the test split; with --output, the pictures too."""
    device, given = setup(args)[2], set(args.given)
    net, state = open_dfa(args.eval, device)
    other, free = "data" in given and args.data != state["args"]["data"], DATA | {"box"}
    restore_args(args, state["args"], MACHINE | (free if other else free & given))
    folder, data = find_run(args, "kprpe-dfa"), aligner_set(args, "test")
    loader = make_loader(args, data, shares(len(data), 64, *ranks()), device, True)
    errors = evaluate_dfa(net, state["mean"], data, loader, args, device)
    return report_dfa(folder and make_run(args, "kprpe-dfa", folder), net, data, errors, args, device)


def train_dfa(args) -> dict:
    """--task dfa: trains by the flags; returns the errors of the last evaluation."""
    # Set-up
    rank, world, device = setup(args)
    folder = find_run(args, "kprpe-dfa")
    state = load_task(folder / "last.pt", "dfa") if args.resume else None
    if state:
        restore_args(args, state["args"], MACHINE | ({"data_root"} & set(args.given)))
    # Data and network
    data, test = aligner_set(args, "train"), aligner_set(args, "test")
    mean, strength = mean_face(data), AUGMENTATIONS[args.augment]
    seed_all(args.seed)
    net = DFA(args.size).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(net, args.weight_decay), args.lr, fused=True)
    if state:
        if state["count"] != len(data):
            raise ValueError(f"--resume: {len(data)} training faces, the run was started on {state['count']}")
        load_weights(net, state["model"], folder / "last.pt")
        optimizer.load_state_dict(state["optimizer"])
    model = wrap(net, args, device)
    batches = datasets.EpochBatches(len(data), args.batch_size, args.seed, rank, world)
    loader = make_loader(args, data, batches, device, True)
    looked_at = make_loader(args, test, shares(len(test), 64, rank, world), device, True)
    start, began, errors = state["epoch"] if state else 0, time.time(), None
    folder = begin_run(args, "kprpe-dfa", folder, state, f"{len(data):,} training faces")

    def loss_of(batch):
        image, points = prepare(batch, device)
        if strength is not None:
            image, points = augment(image, points, strength, FLIP_9)
        with precision(args, device):
            found = model(image / 127.5 - 1)
        return dfa_loss(found, targets(points, args.size), net.priors)

    bar = progress(args, start, len(batches), rank)
    for epoch in range(start, args.epochs):
        seed_all(args.seed, epoch + 1, rank)
        batches.epoch, epoch_began = epoch, time.time()
        net.train()
        losses = one_pass(args, epoch, len(batches), loader, loss_of, optimizer, bar, device,
                          lambda limit: nn.utils.clip_grad_norm_(net.parameters(), limit))
        check_weights(net, epoch + 1)
        # Evaluation by all processes, log and checkpoint by the first
        share_statistics(net)
        row = dict(epoch=epoch + 1, loss=losses.mean().item(), lr=optimizer.param_groups[0]["lr"],
                   images_per_second=len(batches) * args.batch_size / (time.time() - epoch_began))
        if epoch + 1 == args.epochs or (epoch + 1) % args.eval_every == 0:
            errors = evaluate_dfa(net, mean, test, looked_at, args, device)
            row |= zip(ERRORS, errors.mean(1).tolist())
        if rank == 0:
            row["minutes"] = (time.time() - began) / 60
            bar.write(summary(row))
            write_log(folder / "log.jsonl", **row)
            save(folder / "last.pt", script="kprpe", model=net.state_dict(), epoch=epoch + 1, args=vars(args),
                 optimizer=optimizer.state_dict(), world=world, mean=mean, count=len(data))
    bar.close()
    if errors is None:  # it was killed after its last checkpoint
        errors = evaluate_dfa(net, mean, test, looked_at, args, device)
    return report_dfa(folder, net, test, errors, args, device)


# ---- Template fusion: Eqs. 16 to 18 --------------------------------------------------------------

def fuse(features: torch.Tensor, template, rule: str = "average", landmarks=None, score=None) -> torch.Tensor:
    """Unit features (T, D) of templates, as videos, of the features (N, D) of their images, norms kept.
    Args: template (N,) 0..T-1; rule, one of FUSIONS: "average" of unit features, "norm" weighted by their
        norms, "landmark" by what `DFA` finds in these images, landmarks (N, 5, 2) in [0, 1] and score (N,).
    Raises: ValueError for an unknown rule, or without landmarks and scores where it takes them."""
    features, template = at_least_float32(features), torch.as_tensor(template)
    if rule not in FUSIONS or (rule == "landmark" and (landmarks is None or score is None)):
        raise ValueError(f"fusion {rule!r}: expected one of {', '.join(FUSIONS)}, and landmarks and scores "
                         "for the last")
    unit, weight = F.normalize(features), torch.ones_like(features[:, 0])
    if rule == "norm":
        # Eq. (16): f = 1/N sum_i ||f_i||_2 fbar_i
        weight = features.norm(dim=1)
    if rule == "landmark":
        # Eq. (17): d_i = (h - min(||L_i - L^||_2, h)) / h, h = 0.2.   paper: a norm, code: the mean over the
        # five points of their distances; we follow the code, as h is of the size of such a mean.
        canonical = torch.as_tensor((datasets.ARCFACE_5 + 0.5) / 112).to(features)
        distance = (landmarks.to(features) - canonical).norm(dim=-1).mean(-1)
        d = (0.2 - distance.clamp(max=0.2)) / 0.2
        # Eq. (18): f = 1/N sum_i (d_i F_score^i) fbar_i; at least 1e-6 (code), so that a template of bad
        # images alone is their average.
        weight = (d * score.to(features)).clamp(min=1e-6)
    # Over the number of images, all of one medium, then L2: a factor of a template changes no cosine.
    return recognition.template_features(unit * weight[:, None], template, torch.zeros_like(template))


class Templates(NamedTuple):
    """Which template each image is of, (N,) 0..T-1; whose each template is, (T,); whether enrolled, (T,)."""
    template: np.ndarray
    identity: np.ndarray
    gallery: np.ndarray


def own_templates(faces: Sequence[datasets.Face], frames: int = 5) -> Templates:
    """Videos as templates: PERSON/VIDEO/*.jpg by their folders; images straight in a person's folder, or in
    one of all people, by their names less the last character, as 20.jpg, 21.jpg and PERSON_20.jpg,
    PERSON_21.jpg; drawn faces by `frames`. The first of each person is enrolled, the others are looked for.
    Raises: ValueError unless there are two people, and two templates of one."""
    keys, seen = [], Counter()
    for face in faces:
        folder, stem = "", str(seen[face.identity] // frames)
        if isinstance(face.image, (str, os.PathLike)):
            folder, stem = os.path.split(os.path.splitext(face.image)[0])
            flat = os.path.basename(folder) == face.identity or face.identity not in Path(folder).parts
            stem = stem[:-1] if flat else ""
        seen[face.identity] += 1
        keys.append((face.identity, folder, stem))
    names = sorted(set(keys), key=lambda key: tuple(map(recognition.natural, key)))
    people, identity = np.unique([person for person, _, _ in names], return_inverse=True)
    if len(people) < 2 or len(people) == len(names):
        raise ValueError(f"found {len(names)} templates of {len(people)} people: expected two people or more"
                         ", and two templates of one; PERSON/VIDEO/NAME.jpg, or PERSON/20.jpg of video 2")
    place = {key: i for i, key in enumerate(names)}
    first = np.zeros(len(names), bool)
    first[np.unique(identity, return_index=True)[1]] = True
    return Templates(np.array([place[key] for key in keys]), identity, first)


def identify_templates(pooled: torch.Tensor, templates: Templates, ks=(1, 5)) -> dict[int, float]:
    """Closed-set identification of features (T, D) of templates: {k: share found among the first k}."""
    identity, gallery = torch.from_numpy(templates.identity), torch.from_numpy(templates.gallery)
    return metrics.rank_k(pooled[~gallery], identity[~gallery], pooled[gallery], identity[gallery], ks)


# ---- Gait: Sec. 5 --------------------------------------------------------------------------------

FRAME, TOKENS, WINDOW = gait.SIDES, (15, 10), (3, 5)  # height and width, in px and in tokens
STAGES = (4, 2)  # blocks; the second stage has twice the width and the heads of the first


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, cin, H, W) -> (B, planes, H/stride, W/stride).
    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, Fig. 5 left."""
    expansion = 1

    def __init__(self, cin: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv(cin, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        reshape = stride > 1 or cin != planes  # the shortcut is the identity wherever the shapes allow it
        self.downsample = conv_bn(cin, planes, 1, stride) if reshape else nn.Identity()

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x), inplace=True)


def window_order(shift: tuple[int, int]) -> torch.Tensor:
    """Tokens, counted row by row, of each window, row by row: (10, 15) long. Windows lie `shift` further down
    and right; what they lose at one side of the frame comes in at the other."""
    places = torch.arange(math.prod(TOKENS)).view(TOKENS).roll((-shift[0], -shift[1]), (0, 1))
    places = places.unflatten(1, (-1, WINDOW[1])).unflatten(0, (-1, WINDOW[0]))             # (5, 3, 2, 5)
    return places.transpose(1, 2).flatten(2).flatten(0, 1)


class WindowAttention(Attention):
    """`Attention` within the windows of each frame: tokens (F, 150, dim) -> the same.

    Args: rpe, "swin" for Swin's own table over all 5 x 9 offsets within a window, else none; shifted, whether
        windows lie half a window further down and right; tokens from two sides of the frame, which meet in
        one, do not see each other. Of kp-* `forward` takes PairBias and parts, of each frame: the bias (F, H,
        15, 15) is the same in all its windows.
    Source: Liu et al., "Swin Transformer", ICCV 2021: its table is not divided by sqrt(d), and W_Q, W_K, W_V
        have biases, without which SwinGait has not the parameters that it has.
    """

    def __init__(self, dim: int, heads: int, rpe: str, shifted: bool):
        super().__init__(dim, heads, "none", 0)
        self.qkv = nn.Linear(dim, 3 * dim)
        height, width = WINDOW
        self.shift = (height // 2, width // 2) if shifted else (0, 0)
        offsets = (2 * height - 1) * (2 * width - 1)
        # At 0, where Swin draws it with 0.02: so all encodings start as one network.
        self.table = nn.Parameter(torch.zeros(heads, offsets)) if rpe == "swin" else None
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        rows, columns = (places[:, None] - places).unbind(-1)                 # (N, N) each, query - key
        ids = (2 * width - 1) * (rows + height - 1) + columns + width - 1
        order = window_order(self.shift)
        side = torch.stack([order // TOKENS[1] < self.shift[0], order % TOKENS[1] < self.shift[1]], -1)
        apart = (side[:, :, None] != side[:, None]).any(-1)[:, None]          # (W, 1, N, N)
        mask = torch.zeros(apart.shape).masked_fill(apart, -torch.inf)
        for name, value in dict(ids=ids, order=order.flatten(), back=order.flatten().argsort(),
                                mask=mask).items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x, pairs=None, parts=None):
        x = x.index_select(1, self.order).unflatten(1, (-1, math.prod(WINDOW)))             # (F, W, N, dim)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (F, W, H, N, d)
        bias = None
        if self.table is not None:
            bias = self.table[:, self.ids].to(q.dtype)                        # (H, N, N)
        elif parts is not None:
            # Eq. (5), Eq. (11), as in `Attention`
            bias = pairs(*(part * self.scale for part in parts), q.dtype)[:, None]          # (F, 1, H, N, N)
        if any(self.shift):
            bias = self.mask.to(q.dtype) + (0 if bias is None else bias)      # (1 or F, W, 1 or H, N, N)
        y = F.scaled_dot_product_attention(q, k, v, bias).transpose(2, 3).flatten(3)        # (F, W, N, dim)
        return self.proj(y).flatten(1, 2).index_select(1, self.back)


class SwinBlock(Block):
    """`Block` with attention in windows and a hidden layer of 4 dim by GELU; a sample is a frame."""

    def __init__(self, dim: int, heads: int, drop: float, rpe: str, shifted: bool):
        super().__init__(dim, heads, 4 * dim, drop, "none", 0)
        self.attn, self.mlp.act = WindowAttention(dim, heads, rpe, shifted), nn.GELU()


class SwinGait(nn.Module):
    """SwinGait-2D: silhouettes (B, T, 64, 44) in [0, 1] [, joints (B, T, joints, 2) in [0, 1]] -> parts of
    the body (B, 15, dim), from the head down, not normalised.

    Each frame goes through convolutions and a Swin transformer by itself. Of the maximum over the frames each
    row of tokens is a part, with a projection of its own.
    KP-RPE: M is the grid of one window, 3 x 5, in [0, 1], P the joints of the frame, so that all windows of a
    frame have one bias. It takes the place of Swin's table. Each stage has its own W_L, as its heads differ.
    Args: dim, of the first stage, a multiple of 4 and of heads; rpe, one of SWIN; drop_path, of
        the last block, rising evenly from 0.
    Raises: ValueError.
    Source: Sec. 5; Fan et al., "Exploring Deep Models for Practical Gait Recognition", arXiv 2303.03301.
        OpenGait's code has SwinGait-3D alone: here its convolutions are 2-D, and windows of 3 x 3 x 5 are
        3 x 5. Its 16th projection is a copy of the 15th strip's, left out of all outputs: not here.
    """

    def __init__(self, dim: int = 256, heads: int = 16, rpe: str = "swin", joints: int = gait.JOINTS,
                 drop_path: float = 0.1):
        super().__init__()
        if rpe not in SWIN or dim % 4 or dim % heads:
            raise ValueError(f"SwinGait of dim {dim}, {heads} heads, rpe {rpe!r}: expected a multiple of 4 "
                             f"and of the heads, and one of {', '.join(SWIN)}")
        self.joints, low, high = joints, dim // 4, dim // 2
        self.stem = nn.Sequential(
            conv_bn(1, low, 3, act=nn.ReLU), BasicBlock(low, low), BasicBlock(low, high, 2),
            *(BasicBlock(high, high) for _ in range(3)))
        self.patch_embed, self.patch_norm = nn.Conv2d(high, dim, 2, 2), nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(
            SwinBlock(dim * wide, heads * wide, drop_path * i / (sum(STAGES) - 1), rpe, i % 2 == 1)
            for i, wide in enumerate([1] * STAGES[0] + [2] * STAGES[1]))
        self.widen = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim, bias=False))
        self.norm = nn.LayerNorm(2 * dim)
        for module in self.modules():  # as Swin
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.project = nn.Parameter(torch.stack(
            [nn.init.xavier_uniform_(torch.empty(2 * dim, dim)) for _ in range(TOKENS[0])]))
        # After the weights are drawn: its own start is 0.
        self.rpe = nn.ModuleList(KPRPE(joints, WINDOW, depth, heads * 2**i, rpe)
                                 for i, depth in enumerate(STAGES)) if rpe in KEYPOINT else None
        self.pairs = PairBias(WINDOW, "product") if rpe in KEYPOINT else None

    def parts(self, joints: torch.Tensor | None):
        """`KPRPE.split` of joints (F, joints, 2), block by block, or None for each.   Raises: ValueError."""
        if self.rpe is None:
            return [None] * len(self.blocks)
        if joints is None:
            raise ValueError(f"--rpe kp-{self.rpe[0].variant} needs joints (B, T, {self.joints}, 2) in "
                             "[0, 1] beside the silhouettes")
        return [parts for stage in self.rpe for parts in zip(*stage.split(joints))]

    def forward(self, image: torch.Tensor, joints: torch.Tensor | None = None) -> torch.Tensor:
        if image.ndim != 4 or image.shape[2:] != FRAME:
            raise ValueError(f"silhouettes have the shape {tuple(image.shape)}: expected (B, T, 64, 44)")
        x = self.stem(image.flatten(0, 1)[:, None])                           # (F, dim / 2, 32, 22), F = B T
        x = F.interpolate(x, (2 * TOKENS[0], 2 * TOKENS[1]), mode="bilinear", align_corners=True)  # code's
        x = self.patch_norm(self.patch_embed(x).flatten(2).mT)                # (F, 150, dim)
        for i, (block, parts) in enumerate(zip(self.blocks, self.parts(
                None if joints is None else joints.flatten(0, 1)))):
            if i == STAGES[0]:
                x = self.widen(x)                                             # (F, 150, 2 dim)
            x = block(x, self.pairs, parts)
        x = self.norm(x).unflatten(0, image.shape[:2]).amax(1)                # (B, 150, 2 dim)
        x = x.unflatten(1, TOKENS)
        x = x.mean(2) + x.amax(2)                                             # (B, 15, 2 dim)
        return at_least_float32(torch.einsum("bpc,pcd->bpd", x, self.project))


def triplet_loss(parts: torch.Tensor, labels: torch.Tensor, margin: float = 0.2) -> torch.Tensor:
    """Mean of max(0, margin + d(a, p) - d(a, n)) over all triplets of a part in which it is not 0, then over
    the parts: parts (B, P, D), labels (B,) -> scalar; d is the Euclidean distance.
    Source: Hermans et al., arXiv 1703.07737. OpenGait counts an anchor as its own positive, too; not here."""
    x = parts.transpose(0, 1)                                                 # (P, B, D)
    # The product's form of it would lose the small distances, and have no gradient at 0.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")              # (P, B, B)
    same = labels[:, None] == labels
    triplets = same.clone().fill_diagonal_(False)[:, :, None] & ~same[:, None]             # (B, B, B), a p n
    # All of them, as to pick those out would wait for the GPU: 0.1 GB a tensor at Gait3D's batch.
    loss = (margin + distance[..., None] - distance[:, :, None]).clamp(min=0) * triplets   # (P, B, B, B)
    return (loss.sum((1, 2, 3)) / (loss > 0).sum((1, 2, 3)).clamp(min=1)).mean()


class GaitLoss(nn.Module):
    """Triplet loss plus cross entropy, over the batches of all processes, which have the same size: parts
    (B, P, D), labels (B,) long -> scalar, whole and the same in each process.

    BNNeck (Luo et al., CVPR workshops 2019): distances are taken of the parts as they are, cosines with the
    centres of the people behind a batch norm. Label smoothing spreads a share over all people.
    """

    def __init__(self, dim: int, people: int, strips: int = TOKENS[0], margin: float = 0.2,
                 scale: float = 16.0, smoothing: float = 0.1):
        super().__init__()
        self.margin, self.scale, self.smoothing = margin, scale, smoothing
        self.norm = nn.BatchNorm1d(strips * dim)
        self.centres = nn.Parameter(torch.stack(
            [nn.init.xavier_uniform_(torch.empty(people, dim)) for _ in range(strips)]))

    def cosines(self, parts: torch.Tensor) -> torch.Tensor:
        """Of each part with all people's: (B, P, D) -> (B, P, people)."""
        unit = F.normalize(self.norm(parts.flatten(1)).view_as(parts), dim=-1)
        return torch.einsum("bpd,pcd->bpc", unit, F.normalize(self.centres, dim=-1))

    def forward(self, parts: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        parts, labels = Gather.apply(parts), all_gather(labels)
        if parts.requires_grad:  # Gather adds up the gradients of all processes: a share each of a whole loss
            parts.register_hook(lambda grad: grad / ranks()[1])
        logits = self.scale * self.cosines(parts)
        labels = labels[:, None].expand(logits.shape[:2])
        return triplet_loss(parts, labels[:, 0], self.margin) + F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), label_smoothing=self.smoothing)


def gait_set(args, split: str) -> gait.GaitDataset:
    """A split of --data: of "train" clips of --frames, half of them mirrored; else whole sequences.
    Raises: FileNotFoundError; ValueError."""
    if args.data == "walkers":  # the same whatever --seed is
        found = gait.walkers(split, **DRAWN_WALKERS[split])
    else:
        found = gait.read_gait3d(args.data_root, split)
    people = {*list(dict.fromkeys(own.identity for own in found))[:args.limit or None]}
    return gait.GaitDataset([own for own in found if own.identity in people],
                            args.frames if split == "train" else None, args.seed, split == "train")


def gait_arms(args, device: torch.device) -> list[Arm]:
    """The test split, and with --unaligned once more with every sequence scaled and moved at random. A
    sequence at a time, of which each process has its share.   Raises: ValueError if none can be found."""
    data = gait_set(args, "test")
    gait.mated(data.labels, data.probe)  # before anything is trained
    sets = [("", data)]
    if args.unaligned:
        sets.append(("@unaligned", gait.GaitDataset(gait.spoil(data.sequences, **SPOIL), None)))
    return [Arm(own, crop_loader(args, own, shares(len(own), 1, *ranks()), device), [], suffix)
            for suffix, own in sets]


def gait_inputs(batch: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What SwinGait takes, of a batch: silhouettes (B, T, 64, 44) and joints (B, T, 17, 2)."""
    image, joints = (batch[key].to(device, non_blocking=True) for key in ("image", "points"))
    return image.float() / 255, joints


@torch.inference_mode()
@torch.backends.cudnn.flags(enabled=True, benchmark=False)  # else it tries its ways anew for each length
def evaluate_gait(net: SwinGait, arms: Sequence[Arm], args, device: torch.device) -> dict:
    """Scores by name, as rank1, map, minp@unaligned, on rank 0, {} on others; rank1@gei is what the mean
    silhouette alone tells (gait energy image). The distance of two sequences is the Euclidean distance of a
    part, averaged over the parts (source: OpenGait)."""
    net.eval()
    scores = {}
    for arm in arms:
        parts, means = [], []
        for batch in copy.copy(arm.loader):  # as in `embed`
            image, joints = gait_inputs(batch, device)
            with precision(args, device):
                parts.append(net(image, joints))                              # (1, 15, dim)
            means.append(image.mean(1).flatten(1)[:, None])                   # (1, 1, 64 * 44)
        for mine, name in ((parts, ""), (means, "@gei")):
            x = gather_shares(torch.cat(mine), len(arm.data))                 # (S, P, D)
            if ranks()[0] == 0:
                x, probe = x.transpose(0, 1).cpu(), arm.data.probe
                own = gait.identify(torch.cdist(x[:, probe], x[:, ~probe]).mean(0), arm.data.labels, probe)
                scores |= {f"{key}{arm.suffix}{name}": own[key] for key in own if not name or key == "rank1"}
    return scores


def print_gait(rows: dict[str, dict], args):
    """Table 5: a row for each network {title: scores}, and one for gait energy images."""
    shown = {"rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10", "map": "mAP", "minp": "mINP"}
    first = next(iter(rows.values()))
    print(f"{args.data} (%)".ljust(30) + "".join(f"{title:>9}" for title in shown.values()))
    for arm in [arm for arm in ("", "@unaligned") if f"rank1{arm}" in first]:
        energy = {f"rank1{arm}": first[f"rank1{arm}@gei"]}
        for title, found in (rows | {"gait energy image": energy}).items():
            cells = [f"{100 * found[key + arm]:>9.2f}" for key in shown if key + arm in found]
            print(f"{title}{arm.replace('@', ', ')}".ljust(30) + "".join(cells))


def draw_walk(data: gait.GaitDataset, i: int) -> tuple[np.ndarray, torch.Tensor]:
    """The middle frame of sequence i with its joints, RGB uint8 (168, 168, 3); the joints (17, 2)."""
    batch = data.__getitems__([(0, i)])
    image, joints = (batch[key][0, batch["image"].shape[1] // 2] for key in ("image", "points"))
    pixels = cv2.resize(image.numpy()[..., None].repeat(3, -1), (110, 160), interpolation=cv2.INTER_CUBIC)
    draw_points(pixels, joints.numpy() * (110, 160) - 0.5, GREEN, 2.5)
    return cv2.copyMakeBorder(pixels, 4, 4, 29, 29, cv2.BORDER_CONSTANT, value=(255,) * 3), joints


def write_gait_pictures(folder: Path, net: SwinGait, arms: Sequence[Arm]):
    """gait.png, silhouettes with their joints, a row for each arm; of kp-* offsets.png, Fig. 13 for gait:
    three frames, and what each block adds to the logits of the middle of a window, over the window."""
    tiles = [draw_walk(arm.data, i)[0] for arm in arms for i in examples(arm.data, 8)]
    write_image(folder / "gait.png", tile(tiles, len(tiles) // len(arms)))
    if net.rpe is not None:
        images, joints = zip(*(draw_walk(arms[0].data, i) for i in examples(arms[0].data, 3)))
        maps = offsets(net, torch.stack(joints).to(net.project.device)).float().cpu().numpy()
        query, tiles = (WINDOW[0] // 2, WINDOW[1] // 2), []
        for i, image in enumerate(images):
            values = maps[:, i, query[0] * WINDOW[1] + query[1]].reshape(-1, *WINDOW)       # (depth, 3, 5)
            tiles += [image, *(draw_offset(own, query, np.empty((0, 2)), 160) for own in values)]
        write_image(folder / "offsets.png", tile(tiles, len(net.blocks) + 1))


def gait_groups(args, net: SwinGait, loss_of: GaitLoss) -> list[dict]:
    """`parameter_groups` for AdamW. As in OpenGait, norms, tables and the patch embedding do not decay. It
    gives convolutions, projections and heads, which it takes from a trained network, a tenth of the rate."""
    # W_L is divided by sqrt(d) as in the ViT; Swin's table is not.
    divisor = 1 / net.blocks[0].attn.scale if args.rpe in KEYPOINT else 1.0
    groups = parameter_groups(net, args.weight_decay, args.rpe_lr or divisor, r"patch_embed|\.table|bias$")
    groups[0]["params"].append(loss_of.centres)
    groups[1]["params"] += loss_of.norm.parameters()
    return groups


def make_gait_learner(args, data: gait.GaitDataset, state: dict | None, device: torch.device):
    """Network, loss and their optimizer: new, or as a checkpoint's `state` has them."""
    seed_all(args.seed)
    size = [len(data.ids), len(data)]
    if state and state["classes"] != size:
        raise ValueError(f"--resume: {size[1]} sequences of {size[0]} people, the run was started on "
                         f"{state['classes'][1]} of {state['classes'][0]}; see --data-root")
    net, loss_of = build(args, device), GaitLoss(args.dim, len(data.ids)).to(device)
    optimizer = torch.optim.AdamW(gait_groups(args, net, loss_of), args.lr, fused=True)
    if state:
        path = Path(args.output, "last.pt")
        load_weights(net, state["model"], path)
        load_weights(loss_of, state["head"], path)
        optimizer.load_state_dict(state["optimizer"])
    return net, loss_of, optimizer


def train_gait(args) -> tuple[dict, Path]:
    """Trains by the flags; returns the numbers of the last evaluation, and the folder of the run."""
    # Set-up
    rank, world, device = setup(args)
    folder = find_run(args, "kprpe-gait")
    state = load_task(folder / "last.pt", args.task) if args.resume else None
    if state:
        restore_args(args, state["args"], MACHINE | ((LOOK | FILES) & set(args.given)))
    # Data and network
    data, arms = gait_set(args, "train"), gait_arms(args, device)
    batches = gait.PeopleBatches(data.labels, args.batch_size // SEQUENCES, SEQUENCES, args.seed, rank, world)
    loader, labels = crop_loader(args, data, batches, device), torch.from_numpy(data.labels)
    net, head, optimizer = make_gait_learner(args, data, state, device)
    model, whole = wrap(net, args, device), wrap(head, argparse.Namespace(compile=False), device)
    weights = [*net.parameters(), *head.parameters()]
    steps, start, scores, began = len(batches), state["epoch"] if state else 0, {}, time.time()
    folder = begin_run(args, "kprpe-gait", folder, state, f"{args.rpe}, {device.type}, {len(data):,} "
                       f"sequences of {len(data.ids):,} people")

    def loss_of(batch: dict) -> torch.Tensor:
        with precision(args, device):
            parts = model(*gait_inputs(batch, device))
        return whole(parts, labels[batch["index"]].to(device, non_blocking=True))  # over all processes

    bar = progress(args, start, steps, rank)
    for epoch in range(start, args.epochs):
        # One pass over the people. OpenGait's rate falls in steps of 1,000 iterations, and to 1e-6
        seed_all(args.seed, epoch + 1, rank)
        batches.epoch, epoch_began = epoch, time.time()
        net.train(), head.train()
        losses = one_pass(args, epoch, steps, loader, loss_of, optimizer, bar, device,
                          functools.partial(nn.utils.clip_grad_norm_, weights))
        for part in (net, head):
            check_weights(part, epoch + 1)
        # Evaluation by all processes, log and checkpoint by the first
        share_statistics(net)
        row = dict(epoch=epoch + 1, loss=losses.mean().item(), lr=optimizer.param_groups[0]["lr"],
                   sequences_per_second=steps * args.batch_size / (time.time() - epoch_began))
        if epoch + 1 == args.epochs or (epoch + 1) % args.eval_every == 0:
            scores = evaluate_gait(net, arms, args, device)
            row |= scores
        if rank == 0:
            row["minutes"] = (time.time() - began) / 60
            bar.write(summary(row))
            write_log(folder / "log.jsonl", **row)
            save(folder / "last.pt", script="kprpe", model=net.state_dict(), head=head.state_dict(),
                 optimizer=optimizer.state_dict(), epoch=epoch + 1, args=vars(args), world=world,
                 classes=[len(data.ids), len(data)])
    bar.close()
    if start >= args.epochs:  # it was killed after its last checkpoint
        scores = evaluate_gait(net, arms, args, device)
    if rank == 0:
        write_gait_pictures(folder, net, arms)
    return scores, folder


def evaluate_gait_checkpoint(args) -> dict:
    """--eval: the numbers of a checkpoint on the test split of --data; with --output, the pictures too."""
    net, _, device = open_checkpoint(args, args.eval, set())
    folder, arms = find_run(args, "kprpe-gait"), gait_arms(args, device)
    scores = evaluate_gait(net, arms, args, device)
    if scores:
        print_gait({args.rpe: scores}, args)
        if folder:
            write_gait_pictures(make_run(args, "kprpe-gait", folder), net, arms)
    return scores


# ---- Main ------------------------------------------------------------------------------------

def main(args) -> dict:
    """Trains, evaluates or predicts, as the flags say; returns the numbers of the last evaluation.
    The encodings of --also-rpe are trained after the first, in folders inside its own."""
    if args.predict:
        return predict_dfa(args) if args.task == "dfa" else predict(args)
    if args.task == "dfa":
        scores = evaluate_aligner(args) if args.eval else train_dfa(args)
    elif args.eval:
        scores = (evaluate_gait_checkpoint if args.task == "gait" else evaluate_checkpoint)(args)
    else:
        learn, show = (train_gait, print_gait) if args.task == "gait" else (train, print_table)
        scores, folder = learn(args)
        rows = {args.rpe: scores}
        for rpe in [rpe for rpe in dict.fromkeys(words(args.also_rpe)) if rpe != args.rpe]:
            torch.cuda.empty_cache()  # of the last network and its crops; nothing without a GPU
            shared = [str(folder)]
            if dist.is_initialized():
                dist.broadcast_object_list(shared)
            other = argparse.Namespace(**vars(args) | dict(
                rpe=rpe, also_rpe="", output=str(Path(shared[0], rpe)),
                given=sorted((LOOK | FILES) & set(args.given))))
            other.resume = Path(other.output, "last.pt").exists()
            rows[rpe] = learn(other)[0]
            scores = scores | {f"{key}@{rpe}": value for key, value in rows[rpe].items()}
        if ranks()[0] == 0:
            if next(iter(rows.values())):
                show(rows, args)
            draw_fig5(folder, rows, args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return scores


if __name__ == "__main__":
    run(main, parse_args())
