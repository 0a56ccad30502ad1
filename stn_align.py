"""Balanced Alignment for Face Recognition: A Joint Learning Approach.

Huawei Wei, Peng Lu, Yichen Wei; 2020. https://arxiv.org/abs/2003.10168

The method. A face is not aligned before recognition, but inside it: a small network, LocNet, looks at the
unaligned crop and moves an 8 x 8 lattice of points; the thin-plate spline through them is a grid, by which
the image, or better the feature map of the recognition network's first stage, is warped. Trained by
recognition alone (a spatial transformer) the alignment is weak; the alignment loss, weighted by lambda, draws
the warped faces' landmarks to a learned template. ANME, the scatter of aligned landmarks, says how strong an
alignment is: too weak, and pose remains; too strong, and what tells people apart is gone.

Where each equation is:
  Eq. (1)        ANME                                            common.metrics.anme
  Eq. (3), (4)   distance of the landmarks, and of the weights from 1   alignment_loss
  Eq. (2), (5)   alignment loss, loss                            Learner

Differs from the paper, or settles what it leaves open (the authors have published no code):
  - Blocks are ArcFace's IR units, as in Table 4's LResNet100E-IR; Table 1 draws two 3 x 3 convolutions and
    names no block. The dropout of the output layer is 0.4, and the last batch norm's gamma is 1: ArcFace's.
  - LocNet ends in one linear layer over its 7 x 7 x 64 map. "Slim ResNet18" may mean a mean over the map.
  - LocNet gives, and template and loss are in, px of a 112 px crop, whatever --size is. In normalised
    coordinates (1 = 56 px) gradients are 56 times as large, and the training diverges, already at lambda 0.
    The axes of Fig. 9 are px, too.
  - W leads from the aligned frame to the input: it warps by looking up, and W(T) is compared with the
    landmarks of the input, so that the loss needs no inverse. ANME does: y = W^-1(x), by Newton's method.
  - Norms of Eq. (3) are not squared, Eq. (4) is a sum over landmarks: as printed. Then the best weight of
    landmark s is 1 - D_s / (2 |S|), D_s being its mean distance in px, without regard to recognition: above
    0.9 for all that is aligned within 13 px, where Fig. 8(b) has 0.1 to 0.6. Those need squared px or a mean
    in Eq. (4), under which the weights collapse from an unaligned start.
  - T starts as the mean of frontal training faces, told by where the nose is between the eyes (paper: yaw
    within 15 degrees); weights start at 0.5, fixed ones are 1. Neither has weight decay, which would draw T
    to the crop's corner. Recognition reaches T and the weights only through LocNet.
  - "TPS-Grid-2" is 2 x 2 points (tps2), 8 numbers as the homography has, and fits landmarks less well than
    that; the paper's order of strength asks for 2 x 2 cells (tps3). Both are here.
  - Affine2D fits five points (eye centres, nose, mouth corners) to those of T; six numbers, not a similarity.
  - LocNet learns at a hundredth of the rate, on drawn faces three (--loc-lr). Its last layer sums thousands
    of features: at the full rate, on drawn faces, lambda 0 throws the lattice out of the image within an
    epoch, and lambda 3 folds four faces in ten.
  - Mirrored copies of half of the images, a linear warm-up of 500 steps: not in the paper.
  - Outside the image is mid-grey, outside the feature map 0. RGB. The embedding of a test image is the sum of
    its own and its mirror image's. The last epoch is reported.
  - The spline's grid is computed in float64, which costs no time at this size (see common/warp.py).
  - With --gpus N each process normalises its own share of the batch. On a GPU the gradient of sampling is
    summed in any order, so that two runs differ in their last digits.

Train on VGGFace2 on four GPUs (the paper: 90.20 % rank-1 on MegaFace, which is withdrawn; not run here):
  python stn_align.py --data vggface2 --data-root VGGFace2 --landmarks POINTS --gpus 4 --amp
Without any data, on drawn faces, lambda 3 and 0, three minutes on two CPU cores:
  python stn_align.py
Continue, evaluate on LFW and on a folder of your own, use:
  python stn_align.py --data vggface2 --gpus 4 --resume
  python stn_align.py --eval RUN/last.pt --test lfw.bin --data folder --data-root FOLDER
  python stn_align.py --predict photo.jpg --weights RUN/last.pt
"""
import argparse
import itertools
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import datasets, metrics, recognition, synthetic, warp

# ---- Settings ------------------------------------------------------------------------------------

# Sec. 5.1; rates fall "at the beginning of the 13th, 18th and 23rd epoch" of 24.
PAPER = dict(size=112, epochs=24, batch_size=256, lr=0.2, weight_decay=5e-4, drop_at="12/24,17/24,22/24",
             depth=34, width=64, method="tps8", align_at="fmap", lam=3.0, box="image", margin=1.4, warmup=500,
             loc_lr=0.01)
SMALL = dict(PAPER, depth=18, width=32, epochs=20, batch_size=64, lr=0.1, warmup=50, box="landmarks",
             cache="device", drop_at="1/2,3/4,9/10")
PRESETS = {
    "vggface2": dict(PAPER),  # Tables 2 and 3
    "ms1m": dict(PAPER, depth=100),  # Table 4, LResNet100E-IR
    "youtube": dict(SMALL),
    "folder": dict(SMALL),
    "faces": dict(SMALL, size=64, depth=10, width=16, epochs=6, batch_size=32, warmup=20, loc_lr=0.03,
                  also_lam="0", eval_every=3),
}
DRAWN = {"train": 1600, "test": 400}  # faces of --data faces
BOXES = ("image", "landmarks", "face")
METHODS = ("none", "affine2d", "proj", "tps2", "tps3", "tps8", "fullalign")  # as Sec. 3.1 orders them
BY_LOCNET = METHODS[2:6]  # learn to align
BY_LANDMARKS = ("affine2d", "fullalign")  # need those of every image, also to recognise
WHOLE = dict(box="image", cache="")  # how the sets of --test are read, which have no boxes
FRAME = 112  # px, the unit of LocNet, template and losses


def parse_args(argv=None):
    """Flags, with the defaults of the preset that --data names. `args.given` lists what was typed."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--data", default="faces", choices=PRESETS)
    preset = PRESETS[chooser.parse_known_args(argv)[0].data]
    parser = argparse.ArgumentParser(description="Balanced alignment for face recognition",
                                     allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("shared by all scripts").add_argument
    add("--data", default="faces", choices=PRESETS, help="data set, and the preset of all other flags")
    add("--data-root", default="", help="folder of the data set; the README shows the layout of each")
    add("--output", default="", help="folder of the run (default: runs/stn_align-DATA, or the next number)")
    add("--epochs", type=int, default=24, help="passes over the training set")
    add("--batch-size", type=int, default=256, help="faces a step, over all GPUs")
    add("--lr", type=float, default=0.2, help="learning rate at the start")
    add("--weight-decay", type=float, default=5e-4, help="weight decay, but for template and weights")
    add("--gpus", type=int, default=1, help="processes to start, one a GPU; batch norms see their own share")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"], help="auto: a GPU if there is one")
    add("--workers", type=int, default=-1, help="loader processes a GPU; -1: 8 for a GPU, none for a CPU")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    add("--amp", action=switch, default=False, help="bfloat16 convolutions on a GPU; the warp in float32")
    add("--compile", action=switch, default=False, help="torch.compile; minutes at first, then faster")
    add("--limit", type=int, default=0, help="at most so many faces a split (drawn ones: so many), 0: all; "
        "not of records")
    add("--resume", action="store_true", help="continue the run in --output, or the newest run on this data")
    add("--eval", default="", metavar="CKPT", help="evaluate this checkpoint and stop")
    add("--predict", nargs="+", default=[], metavar="PATH", help="images or folders to align and to embed")
    add("--weights", default="", metavar="CKPT", help="checkpoint for --predict")
    add("--box", default="image", help="what is cropped: 'image' (all of it), 'landmarks' (their box) or "
        "'face' (the set's own box); with --predict, x0,y0,x1,y1 in pixels")
    add("--cache", default="", help="keep decoded crops: a folder (one file, opened again by the next run), "
        "or 'device' (in the GPU's memory, where the warp then runs; on a CPU in memory)")
    add("--size", type=int, default=112, help="side of the crop in px, a multiple of 16")
    add("--margin", type=float, default=1.4, help="side of the crop over the longer side of the box")
    add("--eval-every", type=int, default=1, help="epochs between evaluations; the last is always evaluated")
    add("--points", type=int, default=68, help="landmarks of the drawn faces; every other set has its own")
    add("--detector", default="", metavar="ONNX", help="YuNet model file, to find the faces of --predict")
    add = parser.add_argument_group("Balanced alignment").add_argument
    add("--method", default="tps8", choices=METHODS, help="alignment, from none to all that landmarks allow "
        "(Sec. 3.1); affine2d and fullalign need landmarks in use, too")
    add("--align-at", default="fmap", choices=["input", "fmap"], help="what is warped (Sec. 3.2)")
    add("--lam", type=float, default=3.0, help="weight of the alignment loss, lambda in Eq. (5); higher "
        "aligns more, 0 leaves it to recognition")
    add("--also-lam", default="", help="weights to train with after it, for comparison, as 0,1")
    add("--template", default="learned", choices=["learned", "fixed"], help="whether T of Eq. (3) is trained")
    add("--template-file", default="", metavar="PTS", help="T to begin with, px of a 112 px crop, as a run "
        "leaves it in template.pts (Table 3's dagger); default: the mean of frontal training faces")
    add("--alpha", default="learned", choices=["learned", "fixed"], help="weights of Eq. (3), or all 1")
    add("--depth", type=int, default=34, choices=list(BLOCKS), help="layers of the recognition network")
    add("--width", type=int, default=64, help="channels of its first stage (Table 1: 64)")
    add("--dropout", type=float, default=0.4, help="before the last linear layer")
    add("--landmarks", default="", metavar="PATH", help="landmarks of a set that has none of its own: a CSV "
        "of image,x0,y0,..., or a folder with the images' tree of .pts, as the landmark scripts write it")
    add("--rotate", type=float, default=0.0, help="turns of training crops, degrees, up to this both ways")
    add("--scale", type=float, default=0.0, help="sizes of training crops, 1 - this to 1 + this")
    add("--shift", type=float, default=0.0, help="shifts of training crops, px of 112, up to this each way")
    add("--loc-lr", type=float, default=0.01, help="LocNet's learning rate over --lr; higher aligns sooner, "
        "and folds faces")
    add("--drop-at", default="12/24,17/24,22/24", help="parts of the run after which the rate falls by 10")
    add("--warmup", type=int, default=500, help="steps over which the rate rises to --lr")
    add("--test", nargs="+", default=[], metavar="PATH", help="sets to verify and identify on, beside the "
        "test split: a .bin, the folder of LFW, YTF, ..., a .csv of pairs or of roles; with landmarks, if "
        "any, in PATH.landmarks.csv")
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    # argparse fills in no default where the namespace has a value, so what is not None now was typed.
    typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    args.given = sorted(key for key, value in vars(typed).items() if value is not None)
    check_flags(args, parser.error)
    return args


def check_flags(args, error: Callable[[str], None]):
    """Calls `error` with a message for the first flag whose value cannot be meant."""
    wanted = [("size", args.size >= 16 and args.size % 16 == 0, "a multiple of 16, the stride")]
    wanted += [(name, getattr(args, name) >= least, f"at least {least}") for name, least in [
        ("epochs", 1), ("batch_size", 2), ("gpus", 1), ("limit", 0), ("seed", 0), ("eval_every", 1),
        ("width", 1), ("warmup", 0), ("weight_decay", 0), ("workers", -1), ("rotate", 0), ("shift", 0)]]
    wanted += [(name, 0 < getattr(args, name) < math.inf, "more than 0") for name in (
        "lr", "loc_lr", "margin")]
    wanted += [("lam", 0 <= args.lam < math.inf, "at least 0"), ("scale", 0 <= args.scale < 1, "0 to 1"),
               ("dropout", 0 <= args.dropout < 1, "0 to 1"),
               ("points", args.points in datasets.SCHEMES, f"one of {list(datasets.SCHEMES)}"),
               ("also_lam", all(0 <= lam < math.inf for lam in listed(args.also_lam)), "numbers, as 0,1"),
               ("drop_at", all(0 <= part <= 1 for part in listed(args.drop_at)), "parts, as 1/2,3/4")]
    for name, holds, what in wanted:
        if not holds:
            error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {what}")
    for name in ("lam", "also_lam", "template", "alpha"):
        if name in args.given and getattr(args, name) and args.method not in BY_LOCNET:
            error(f"--{name.replace('_', '-')} goes with a method that learns to align, not {args.method}")
    if args.batch_size < 2 * args.gpus:
        error(f"--batch-size {args.batch_size}: batch norms want two faces or more for each of --gpus")
    if args.batch_size % args.gpus:
        error(f"--batch-size {args.batch_size} does not divide over --gpus {args.gpus}")
    if args.box not in BOXES and (not args.predict or parse_box(args.box) is None):
        error(f"--box {args.box}: expected image, landmarks or face, with --predict x0,y0,x1,y1 in pixels, "
              f"x0 < x1, y0 < y1 (written --box=-5,... where x0 is negative)")
    if args.data == "ms1m" and args.box != "image" and not args.eval and not args.predict:
        error(f"--box {args.box}: records have no boxes; leave it out")
    if args.cache and args.box not in BOXES[1:]:
        if "cache" in args.given:
            error("--cache goes with --box landmarks or face; whole images are read anew")
        args.cache = ""
    for name in ("template_file", "detector"):
        if getattr(args, name) and not os.path.isfile(getattr(args, name)):
            error(f"--{name.replace('_', '-')}: no file {getattr(args, name)}")
    if bool(args.predict) != bool(args.weights):
        error("--predict PATH and --weights CKPT belong together: images, and a checkpoint of this script")
    if args.eval and (args.predict or args.resume):
        error("--eval goes neither with --predict nor with --resume")
    if args.detector and not args.predict:
        error("--detector belongs to --predict")


def listed(text: str) -> list:
    """The numbers of "0,1/2,3", exact; [nan] if they are none."""
    try:
        return [Fraction(word) for word in text.split(",")] if text else []
    except (ValueError, ZeroDivisionError):
        return [math.nan]


def parse_box(text: str) -> list[float] | None:
    """The numbers of "x0,y0,x1,y1" if they are a box."""
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
    except ValueError:
        return None
    return [x0, y0, x1, y1] if -math.inf < x0 < x1 < math.inf and -math.inf < y0 < y1 < math.inf else None


# ---- Recognition network: Table 1 ----------------------------------------------------------------

# Blocks in stages 1 to 4. 100: LResNet100E-IR (Table 4). 10, 18: for a CPU.
BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """(B, cin, H, W) -> (B, cout, H/stride, W/stride). No bias: the batch norm behind it has a shift."""
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)


def shortcut(cin: int, cout: int, stride: int) -> nn.Sequential | None:
    """Brings a block's input to the channels of its output, if it must. The caller takes every `stride`-th
    pixel itself: a strided 1 x 1 convolution of a channels_last map of few channels crashes in oneDNN."""
    return nn.Sequential(conv(cin, cout, 1), nn.BatchNorm2d(cout)) if stride > 1 or cin != cout else None


class IRBlock(nn.Module):
    """ArcFace's "improved residual" unit, whose stride is on the second convolution."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), conv(cin, cout, 3)
        self.bn2, self.prelu = nn.BatchNorm2d(cout), nn.PReLU(cout)
        self.conv2, self.bn3 = conv(cout, cout, 3, stride), nn.BatchNorm2d(cout)
        self.downsample, self.stride = shortcut(cin, cout, stride), stride

    def forward(self, x):
        y = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + (self.downsample(x[:, :, ::self.stride, ::self.stride]) if self.downsample else x)


class IRNet(nn.Module):
    """Table 1: image (B, 3, 112, 112) -> embedding (B, 512), in two parts, cut after stage 0 (Sec. 3.2).
    Parameters have the names of insightface's iresnets. `width` is the channels of stages 0 and 1."""

    def __init__(self, depth: int = 34, width: int = 64, size: int = 112, dropout: float = 0.4):
        super().__init__()
        self.conv1, self.bn1, self.prelu = conv(3, width, 3), nn.BatchNorm2d(width), nn.PReLU(width)
        channels = (width, width, 2 * width, 4 * width, 8 * width)
        for stage, (cin, cout) in enumerate(itertools.pairwise(channels)):
            more = (IRBlock(cout, cout, 1) for _ in range(BLOCKS[depth][stage] - 1))
            setattr(self, f"layer{stage + 1}", nn.Sequential(IRBlock(cin, cout, 2), *more))
        self.bn2, self.dropout = nn.BatchNorm2d(cout), nn.Dropout(dropout)
        self.fc, self.features = nn.Linear(cout * (size // 16)**2, 512), nn.BatchNorm1d(512)
        self.features.weight.requires_grad = False  # its scale is lost when embeddings are normalised
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def stem(self, image):
        """Stage 0, at the image's resolution: (B, 3, H, W) -> (B, width, H, W)."""
        return self.prelu(self.bn1(self.conv1(image)))

    def body(self, x):
        """Stages 1 to 4 and the output layer: (B, width, H, W) -> (B, 512) float32."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.dropout(self.bn2(x)).flatten(1)).float())


# ---- Alignment: Sec. 3.1 and 4.1 -----------------------------------------------------------------

class LocBlock(nn.Module):
    """ResNet's basic block."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(cin, cout, 3, stride), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = conv(cout, cout, 3), nn.BatchNorm2d(cout)
        self.downsample, self.stride = shortcut(cin, cout, stride), stride

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample(x[:, :, ::self.stride, ::self.stride]) if self.downsample else x))


class LocNet(nn.Module):
    """Localisation network, a slim ResNet18: unaligned image (B, 3, H, W) -> (B, outputs) float32, px of
    a 112 px crop. Its last layer begins at zero: nothing moves, and the first step trains only that layer."""

    def __init__(self, outputs: int, size: int = 112):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 8, 3), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(*(nn.Sequential(LocBlock(cin, cout, 2), LocBlock(cout, cout, 1))
                                      for cin, cout in itertools.pairwise((8, 16, 32, 64, 64))))
        self.fc = nn.Linear(64 * (size // 16)**2, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, image):
        x = self.layers(F.relu(self.bn1(self.conv1(image)))).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round 16 px to eighths
            return self.fc(x.float())


# A family of maps W from the aligned frame to the input's, all in px of a 112 px crop:
#   outputs                       how many numbers of LocNet it takes; 0: it is fitted to landmarks
#   fit(numbers or landmarks)     the W of each face
#   to_input(w, points)           W(y)
#   to_aligned(w, points, start)  W^-1(x); `start`, a guess, is for splines only
#   grid(w, size)                 W at the pixels of a crop of `size` px, normalised: what warp.sample takes

def pixel_grid(maps, w, size: int) -> torch.Tensor:
    """`grid` of a family, by its `to_input`: (B, size, size, 2)."""
    centres = warp.to_norm(warp.pixel_centres((size, size), w.device), (size, size))
    moved = maps.to_input(w, warp.to_px(centres, (FRAME, FRAME)))                        # (B, size * size, 2)
    return warp.to_norm(moved, (FRAME, FRAME)).unflatten(1, (size, size))


class Affine2D(nn.Module):
    """The affine map that fits five points of a face to T's, by least squares; W is its inverse."""
    outputs = 0

    def __init__(self, template: torch.Tensor):
        super().__init__()
        self.groups = datasets.SCHEMES[len(template)].five
        self.register_buffer("five", datasets.group_means(template, self.groups), persistent=False)

    def fit(self, landmarks):
        """Landmarks (B, S, 2) px -> (B, 2, 3)."""
        return warp.invert(warp.fit_affine(datasets.group_means(landmarks, self.groups), self.five))

    def to_input(self, w, points):
        return warp.apply_affine(w, points)

    def to_aligned(self, w, points, start=None):
        return warp.apply_affine(warp.invert(w), points)

    def grid(self, w, size):
        return pixel_grid(self, w, size)


class Projective(nn.Module):
    """STN-Proj: a homography, by eight numbers about the identity."""
    outputs = 8

    def fit(self, numbers):
        """(B, 8), of which 1 moves the crop's edge by 1 px -> (B, 3, 3), in normalised coordinates."""
        h = F.pad(numbers / (FRAME / 2), (0, 1)).unflatten(1, (3, 3))
        # |h7| + |h8| < 1 keeps the divisor positive all over the crop.
        h = torch.cat([h[:, :2], 0.45 * (h[:, 2:] / 0.45).tanh()], 1)
        return h + torch.eye(3, device=h.device)

    def to_input(self, w, points):
        return warp.to_px(warp.apply_projective(w, warp.to_norm(points, (FRAME, FRAME))), (FRAME, FRAME))

    def to_aligned(self, w, points, start=None):
        return self.to_input(torch.linalg.inv_ex(w.double())[0], points).to(points.dtype)

    def grid(self, w, size):
        return pixel_grid(self, w, size)


class Spline(nn.Module):
    """A thin-plate spline through fixed points of the aligned frame: a lattice, whose places in the input are
    LocNet's (STN-TPS-Grid-k), or the template, whose places are the landmarks (FullAlign)."""

    def __init__(self, lattice: int = 0, template: torch.Tensor | None = None):
        super().__init__()
        self.outputs = 2 * lattice**2
        if lattice:
            axis = torch.linspace(-1, 1, lattice).double()
            targets = torch.cartesian_prod(axis, axis).flip(1)
        else:
            targets = warp.to_norm(template.double(), (FRAME, FRAME))
        self.spline = warp.ThinPlateSpline(targets)

    def fit(self, numbers):
        """Moves of the lattice (B, 2 k^2) px, or landmarks (B, S, 2) px -> coefficients (B, K + 3, 2)."""
        if self.outputs:  # the lattice in px, moved
            numbers = numbers.unflatten(1, (-1, 2)) + warp.to_px(self.spline.targets, (FRAME, FRAME)).float()
        return self.spline.fit(warp.to_norm(numbers, (FRAME, FRAME)))

    def to_input(self, w, points):
        return warp.to_px(self.spline.transform(w, warp.to_norm(points, (FRAME, FRAME))), (FRAME, FRAME))

    def to_aligned(self, w, points, start=None):
        start = None if start is None else warp.to_norm(start, (FRAME, FRAME))
        found = self.spline.invert_points(w, warp.to_norm(points, (FRAME, FRAME)), start)
        return warp.to_px(found, (FRAME, FRAME))

    def grid(self, w, size):
        return self.spline.grid(w, (size, size))


def family(method: str, template: torch.Tensor | None) -> nn.Module | None:
    """The maps of --method, None for "none".   Raises: ValueError for one that needs landmarks, without."""
    if method in BY_LANDMARKS and template is None:
        raise ValueError(f"--method {method} needs landmarks: of training images, and of those to recognise; "
                         "see --landmarks")
    if method == "affine2d" and len(template) not in datasets.SCHEMES:
        raise ValueError(f"--method affine2d takes five points of a scheme {list(datasets.SCHEMES)}, not of "
                         f"{len(template)} landmarks")
    return {"none": lambda: None, "affine2d": lambda: Affine2D(template), "proj": Projective,
            "tps2": lambda: Spline(2), "tps3": lambda: Spline(3), "tps8": lambda: Spline(8),
            "fullalign": lambda: Spline(template=template)}[method]()


# ---- Network: Fig. 5 -----------------------------------------------------------------------------

class AlignedRecognizer(nn.Module):
    """Recognition network that aligns what it sees: image (B, 3, size, size) in [-1, 1] -> (B, 512).

    Args: method, of METHODS; align_at "fmap" (after stage 0) or "input"; depth, width, dropout: `IRNet`'s;
        template (S, 2), T in px of a 112 px crop, or None where no landmarks are known; size of the image in
        px; learn_template, learn_alpha: whether T and the weights are trained.
    Points and landmarks are (..., 2) px of a 112 px crop, whatever `size` is; see `to_frame`.
    """

    def __init__(self, method: str = "tps8", align_at: str = "fmap", depth: int = 34,
                 template: torch.Tensor | None = None, width: int = 64, size: int = 112, dropout: float = 0.4,
                 learn_template: bool = True, learn_alpha: bool = True):
        super().__init__()
        if method not in METHODS or align_at not in ("input", "fmap"):
            raise ValueError(f"method {method!r}, align_at {align_at!r}: expected one of {METHODS}, and "
                             "'input' or 'fmap'")
        self.method, self.align_at, self.size = method, align_at, size
        self.net = IRNet(depth, width, size, dropout)
        self.maps = family(method, template)
        self.locnet = LocNet(self.maps.outputs, size) if self.maps and self.maps.outputs else None
        self.template = self.alpha_logit = None
        if template is not None:
            learns = self.locnet is not None
            self.template = nn.Parameter(template.float().clone(), requires_grad=learn_template and learns)
            self.alpha_logit = nn.Parameter(torch.zeros(len(template)), requires_grad=learn_alpha and learns)

    def alpha(self) -> torch.Tensor:
        """Weights of the landmarks, (S,): in (0, 1), or 1 where they are not learned."""
        return self.alpha_logit.sigmoid() if self.alpha_logit.requires_grad else \
            torch.ones_like(self.alpha_logit)

    def fit(self, image, landmarks=None):
        """The map W of each face as its family keeps it, None for method "none".
        Raises: ValueError without landmarks where the method needs them; FloatingPointError when LocNet gives
            nan (on a GPU in training it is the loss that shows it: looking here would wait for the GPU)."""
        if self.maps is None:
            return None
        if self.locnet is None:
            found = 0 if landmarks is None else landmarks.shape[1]
            if found != len(self.template):
                raise ValueError(f"method {self.method} needs the {len(self.template)} landmarks of every "
                                 f"image, found {found}")
            return self.maps.fit(landmarks.float())
        numbers = self.locnet(image)
        if not (numbers.is_cuda and self.training):
            for i in (~numbers.isfinite().all(1)).nonzero()[:1, 0].tolist():
                raise FloatingPointError(f"LocNet gives nan or inf for image {i} of a batch: the training "
                                         "has diverged; a lower --lr is the usual cure")
        return self.maps.fit(numbers)

    def embed(self, image, w) -> torch.Tensor:
        """Embeddings (B, 512), not normalised, of images whose maps are `w`."""
        if self.align_at == "input":
            return self.net.body(self.net.stem(self.align(image, w)))
        return self.net.body(self.align(self.net.stem(image), w))

    def align(self, x, w):
        """An image or a map (B, C, H, W), warped; beyond its edge it is 0: mid-grey, or no activation."""
        if w is None:
            return x
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 the grid is half a pixel off
            warped = warp.sample(x, self.maps.grid(w, self.size))
            return warped.to(x.dtype, memory_format=torch.channels_last)  # as the next convolution wants it

    def forward(self, image, landmarks=None) -> torch.Tensor:
        """Image (B, 3, size, size) in [-1, 1], landmarks (B, S, 2) px of 112 if the method needs them."""
        return self.embed(image, self.fit(image, landmarks))

    def grid(self, image, landmarks=None) -> torch.Tensor:
        """Where the pixels of the aligned crop lie in the input: (B, size, size, 2), normalised."""
        w = self.fit(image, landmarks)
        if w is None:
            size = (self.size, self.size)
            centres = warp.to_norm(warp.pixel_centres(size, image.device), size)
            return centres.view(1, *size, 2).expand(len(image), -1, -1, -1)
        return self.maps.grid(w, self.size)

    def map_points(self, points, image, to: str = "input", landmarks=None):
        """Points (S, 2) or (B, S, 2), from one frame to the other by the maps of the images.
        Args: to: "input", from the aligned frame, W(y); "aligned", from the input's, W^-1(x).
        Returns: points (B, S, 2), and which converged (B, S): W of the answer is within 0.05 px of x. Where
            W folds, x has several answers; the search for a landmark starts at its place in the template."""
        if to not in ("input", "aligned"):
            raise ValueError(f"to={to!r}: expected 'input' or 'aligned'")
        return self.move(points, self.fit(image, landmarks), len(image), to)

    def move(self, points, w, count: int, to: str):
        """`map_points` by the maps `w` of `count` images."""
        points = points.expand(count, -1, -1)
        if w is None or to == "input":
            moved = points if w is None else self.maps.to_input(w, points)
            return moved, torch.ones_like(points[..., 0], dtype=torch.bool)
        known = self.template is not None and len(self.template) == points.shape[1]
        moved = self.maps.to_aligned(w, points, self.template.detach() if known else None)
        return moved, (self.maps.to_input(w, moved) - points).norm(dim=-1) < 0.05


def to_frame(points, size: int):
    """Points (..., 2) px of a crop of `size` px, as px of a 112 px crop."""
    return (points + 0.5) * (FRAME / size) - 0.5


def from_frame(points, size: int):
    """The inverse of `to_frame`."""
    return (points + 0.5) * (size / FRAME) - 0.5


def folded(grid: torch.Tensor) -> torch.Tensor:
    """Whether a grid (B, H, W, 2) turns over anywhere, so that a part of the face is seen mirrored: (B,)."""
    right, down = grid[:, :-1, 1:] - grid[:, :-1, :-1], grid[:, 1:, :-1] - grid[:, :-1, :-1]
    determinant = right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0]
    return (determinant <= 0).flatten(1).any(1)


# ---- Loss: Sec. 4.2 ------------------------------------------------------------------------------

class AMSoftmax(nn.Module):
    """Softmax over scaled cosines with an additive margin, the paper's [21]: embeddings (B, features) and
    labels (B,) -> loss.   Args: features, classes; m, the margin; s, the scale (Sec. 4.2)."""

    def __init__(self, features: int, classes: int, m: float = 0.35, s: float = 64.0):
        super().__init__()
        if classes < 2:
            raise ValueError(f"{classes} identities: recognition is learned from two or more")
        self.m, self.s = m, s
        self.weight = nn.Parameter(torch.empty(classes, features).normal_(std=0.01))

    def forward(self, embeddings, labels):
        with torch.autocast(embeddings.device.type, enabled=False):
            cosines = F.linear(F.normalize(embeddings.float()), F.normalize(self.weight.float()))   # (B, C)
            margin = torch.zeros_like(cosines).scatter_(1, labels[:, None], self.m)
            return F.cross_entropy(self.s * (cosines - margin), labels)


def alignment_loss(warped_template, landmarks, alpha):
    """L_align in its two terms.   Args: warped_template, W(T; I_i), and landmarks, (B, S, 2) px of a 112 px
    crop; alpha (S,).   Returns: L_lmk, L_reg, scalars."""
    # Eq. (3): L_lmk = 1/(N|S|) sum_i sum_s alpha^s ||W(T^s; I_i) - x_i^s||_2
    l_lmk = (alpha * (warped_template - landmarks).norm(dim=-1)).mean()
    # Eq. (4): L_reg = sum_s (1 - alpha^s)^2
    l_reg = (1 - alpha).square().sum()
    return l_lmk, l_reg


class Learner(nn.Module):
    """Network and losses in one forward, as DistributedDataParallel wants it."""

    def __init__(self, net: AlignedRecognizer, classes: int, lam: float):
        super().__init__()
        self.net, self.head = net, AMSoftmax(512, classes)
        self.lam = lam if net.locnet is not None else 0.0

    def forward(self, image, labels, landmarks=None):
        """Image (B, 3, size, size), labels (B,), landmarks (B, S, 2) -> (4,): L, L_fr, L_lmk, L_reg."""
        w = self.net.fit(image, landmarks)
        l_fr = self.head(self.net.embed(image, w), labels)
        if not self.lam:
            return torch.stack([l_fr, l_fr.detach(), *l_fr.new_zeros(2)])
        warped = self.net.maps.to_input(w, self.net.template)
        l_lmk, l_reg = alignment_loss(warped, landmarks, self.net.alpha())
        # Eq. (2): L_align = L_lmk + L_reg;  Eq. (5): L = L_fr + lambda L_align
        loss = l_fr + self.lam * (l_lmk + l_reg)
        return torch.stack([loss, *(term.detach() for term in (l_fr, l_lmk, l_reg))])


# ---- Data ----------------------------------------------------------------------------------------

GREY = 127.5  # pixels are x / 127.5 - 1 (Sec. 5.1)


def mean_frontal_template(landmarks: torch.Tensor) -> torch.Tensor:
    """T_fix (Sec. 5.3): the mean of the frontal ones of landmarks (N, S, 2): (S, 2), in their unit.
    Frontal is a face whose nose tip is 38 to 62 % of the way from one eye to the other, along x. Where fewer
    than ten are, it is the mean of all, with a warning.   Raises: ValueError for an unknown scheme."""
    if landmarks.shape[1] not in datasets.SCHEMES:
        raise ValueError(f"{landmarks.shape[1]} landmarks are no known scheme {list(datasets.SCHEMES)}: give "
                         "T by --template-file, or train without landmarks, --lam 0")
    five = datasets.group_means(landmarks, datasets.SCHEMES[landmarks.shape[1]].five)[..., 0]   # (N, 5) x
    frontal = ((five[:, 2] - five[:, 0]) / (five[:, 1] - five[:, 0]) - 0.5).abs() < 0.12
    if frontal.sum() < 10:
        warnings.warn(f"{int(frontal.sum())} of {len(landmarks)} faces are frontal: T is the mean of all")
        return landmarks.mean(0)
    return landmarks[frontal].mean(0)


def augment(rng: np.random.Generator, size: int, rotate=0.0, scale=0.0, shift=0.0):
    """Draws a training crop: matrix (2, 3) crop px -> crop px, about its middle; whether to mirror it; {}."""
    angle, zoom = math.radians(rng.uniform(-rotate, rotate)), rng.uniform(1 - scale, 1 + scale)
    move, middle = rng.uniform(-shift, shift, 2) * size / FRAME, (size - 1) / 2
    c, s = zoom * math.cos(angle), zoom * math.sin(angle)
    matrix = np.array([[c, s, middle - (c + s) * middle + move[0]],
                       [-s, c, middle - (c - s) * middle + move[1]]])
    return matrix, rng.random() < 0.5, {}


class Split(NamedTuple):
    """Images by index with their .labels; as faces, but for record files; landmarks (N, S, 2) px or None."""
    images: recognition.FolderImages | recognition.Records
    faces: list | None
    points: np.ndarray | None


def read_set(args, split: str) -> Split | None:
    """A split of args.data, None for a test split that is not there. What can be wrong with it is found here:
    Raises: FileNotFoundError; ValueError, also for landmarks that the flags need and images do not have."""
    if args.data == "faces":
        count = args.limit or DRAWN["train"]
        count = count if split == "train" else min(count, DRAWN["test"])
        faces = synthetic.read_faces(split, count, args.size, args.points)  # the same whatever --seed is
    elif args.data == "ms1m":
        if split == "test":
            return None
        if needs_landmarks(args) and not args.landmarks:
            raise ValueError(f"{needs_landmarks(args)} needs landmarks, and records have none: --landmarks")
        images = recognition.Records(args.data_root)  # --limit is for the sets of files
        return Split(images, None, recognition.read_landmarks(images.keys.astype(str), args.landmarks)
                     if args.landmarks else None)
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
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # minutes, for millions of files
        datasets.check_images(faces)
    if needs_landmarks(args, split):
        recognition.check_points(faces, needs_landmarks(args, split))
    points = [face.points for face in faces]
    points = None if any(one is None for one in points) else np.stack(points)
    if args.method == "affine2d" and points.shape[1] in datasets.SCHEMES:
        warp.check_points(datasets.group_means(points, datasets.SCHEMES[points.shape[1]].five), "affine")
    return Split(recognition.FolderImages(faces), faces, points)


def needs_landmarks(args, split: str = "train") -> str:
    """What asks for landmarks, in words for an error; "" if nothing does."""
    if args.method in BY_LANDMARKS:
        return f"--method {args.method}"
    lam = max([args.lam, *map(float, listed(args.also_lam))])
    if split == "train" and args.method in BY_LOCNET and lam:
        return f"--lam {lam:g}"
    return "--box landmarks" if args.box == "landmarks" else ""


def make_dataset(args, split, augmented: bool):
    """Images as crops of --size: about the box of --box, by --margin, or whole. `split` may be a test."""
    move = partial(augment, rotate=args.rotate, scale=args.scale, shift=args.shift) if augmented else None
    scheme = None if split.points is None else datasets.SCHEMES.get(split.points.shape[1])
    if args.box == "image":
        return recognition.WholeImages(split.images, args.size, split.points, move, scheme and scheme.flip,
                                       args.seed)
    frames = datasets.square_frames(datasets.face_boxes(split.faces, args.box), args.size, args.margin)
    # How much wider than the crop it may look: a crop turned by a is cos a + sin a as wide.
    angle = math.radians(min(args.rotate, 45))
    reach = (math.cos(angle) + math.sin(angle)) * (1 + 2 * args.shift / FRAME) / (1 - args.scale)
    flip = np.arange(0) if split.points is None else scheme and scheme.flip  # no points: none to swap
    return datasets.CropDataset(split.faces, frames, args.size, move, reach, 1 + args.scale, flip, args.seed)


def frame_points(data, most: int = 2000) -> torch.Tensor:
    """Landmarks of a set without augmentation, px of a 112 px crop: (N, S, 2); of whole images, whose sizes
    are not known before they are read, those of `most` at most, evenly spaced."""
    if isinstance(data, datasets.CropDataset):
        return to_frame(data.crop_points(), data.size)
    data = recognition.WholeImages(data.images, data.size, data.points)
    chosen = np.linspace(0, len(data) - 1, min(most, len(data))).astype(int).tolist()
    return to_frame(torch.cat([data.__getitems__([(0, i)])["points"] for i in chosen]), data.size)


def prepare(batch: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of a batch: images (B, 3, H, W) in [-1, 1]; landmarks (B, S, 2) px of a 112 px crop, if it has any."""
    image = batch["image"].to(device, non_blocking=True)
    if image.dtype == torch.uint8:  # (B, H, W, 3) of the loader; permuted, it is channels_last as it stands
        image = image.permute(0, 3, 1, 2).float()
    points = batch.get("points")
    if points is not None:
        points = to_frame(points.to(device, non_blocking=True), image.shape[-1])
    return (image / GREY - 1).contiguous(memory_format=torch.channels_last), points


# ---- Evaluation: Sec. 3.1 and 5 ------------------------------------------------------------------

@torch.inference_mode()
def look(net: AlignedRecognizer, loader, args) -> dict:
    """What the network makes of a set, in order, on the CPU: "features" (N, 512), of image and mirror image;
    "folded" (N,); and with landmarks "crops" (N, S, 2), these, px of 112, "aligned" (N, S, 2), where the warp
    brings them, "converged" (N, S), and "distance" (N, S), between them and W(T), px."""
    net.eval()
    device, found = net.net.fc.weight.device, {}
    for batch in loader:
        image, points = prepare(batch, device)
        mirrored = None
        if points is not None and points.shape[1] in datasets.SCHEMES:
            mirrored = points[:, torch.from_numpy(datasets.SCHEMES[points.shape[1]].flip).to(device)]
            mirrored = mirrored * mirrored.new_tensor([-1, 1]) + mirrored.new_tensor([FRAME - 1, 0])
        with precision(args, device):
            w = net.fit(image, points)
            features = net.embed(image, w)
            if net.locnet is not None or net.maps is None or mirrored is not None:
                features = features + net(image.flip(3), mirrored)
        row = {"features": features}
        if net.maps is not None:
            row["folded"] = folded(net.maps.grid(w, net.size))
        if points is not None:
            row["crops"] = points
            row["aligned"], row["converged"] = net.move(points, w, len(image), "aligned")
            if net.template is not None and len(net.template) == points.shape[1]:
                row["distance"] = (net.move(net.template, w, len(image), "input")[0] - points).norm(dim=-1)
        for key, value in row.items():
            found.setdefault(key, []).append(value.cpu())
    return {key: torch.cat(values) for key, values in found.items()}


def alignment_scores(seen: dict, net: AlignedRecognizer) -> dict:
    """ANME before and after alignment, Eq. (1), of the faces all of whose landmarks could be mapped, and
    their share; the mean distance of W(T) from the landmarks, px; the share of folded faces; weights."""
    scores = {}
    if "crops" in seen and (scheme := datasets.SCHEMES.get(seen["crops"].shape[1])):
        whole = seen["converged"].all(1)
        scores["converged"] = whole.double().mean().item()
        for name, key in (("anme/crops", "crops"), ("anme", "aligned")):
            points = seen[key][whole].double()
            pupils = datasets.group_means(points, scheme.pupils)
            d = (pupils[:, 0] - pupils[:, 1]).norm(dim=1)
            scores[name] = metrics.anme(points, d) if len(points) > 1 else math.nan
    if "distance" in seen:
        scores["distance"] = seen["distance"].double().mean().item()
    if "folded" in seen:
        scores["folded"] = seen["folded"].double().mean().item()
    if net.locnet is not None and net.alpha_logit is not None:
        alpha = net.alpha().detach()
        scores |= {"alpha/min": alpha.min().item(), "alpha/max": alpha.max().item()}
        if "distance" in seen and net.alpha_logit.requires_grad:  # from the optimum of L_align for these
            best = 1 - seen["distance"].mean(0) / (2 * len(alpha))
            scores["alpha/gap"] = (alpha.cpu() - best).abs().max().item()
    return scores


class TestSet(NamedTuple):
    """A set to evaluate on: its loader, in order; what is asked of it; the name in front of its scores."""
    loader: object
    protocols: list
    name: str = ""


def test_sets(args, device: torch.device) -> list[TestSet]:
    """The test split of --data, if it is there, with pairs and ranks of its own, and the sets of --test."""
    sets, own = [], read_set(args, "test")
    if own is not None:
        data = make_dataset(args, own, False)
        sets.append(TestSet(make_loader(args, data, datasets.in_order(len(data), 64), device),
                            [recognition.own_pairs(own.faces), recognition.own_identification(own.faces)]))
    for path in args.test:
        protocol, whole = recognition.read_test(path), argparse.Namespace(**vars(args) | WHOLE)
        beside = os.path.normpath(path) + ".landmarks.csv"
        if os.path.exists(beside):
            protocol = recognition.with_landmarks(protocol, beside)
        elif args.method in BY_LANDMARKS:
            raise FileNotFoundError(f"--test {path}: method {args.method} needs the landmarks of its images: "
                                    f"no {beside}")
        split = Split(protocol.images, None, protocol.points)
        if args.box == "landmarks" and protocol.points is not None:
            faces = [datasets.Face(partial(protocol.images.__getitem__, i), points)
                     for i, points in enumerate(protocol.points)]
            whole, split = argparse.Namespace(**vars(args) | dict(cache="")), split._replace(faces=faces)
        elif args.box != "image":
            print(f"--test {path}: whole images; the network was trained on crops about {args.box}")
        data = make_dataset(whole, split, False)
        sets.append(TestSet(make_loader(whole, data, datasets.in_order(len(data), 64), device), [protocol],
                            protocol.name))
    return sets


def evaluate(net: AlignedRecognizer, sets: Sequence[TestSet], args) -> dict:
    """Scores by name: accuracy, rank1 and alignment of the own test split; accuracy@NAME, ... of --test."""
    scores = {}
    for test in sets:
        seen = look(net, test.loader, args)
        found = alignment_scores(seen, net)
        for protocol in test.protocols:
            found |= recognition.score(protocol, seen["features"])
        scores |= {f"{key}@{test.name}" if test.name else key: value for key, value in found.items()}
    return scores


def print_table(rows: dict[str, dict], args):
    """A row for each network {title: scores}: recognition, and how strongly it aligns."""
    first = next(iter(rows.values()))
    print(f"{args.data}: {args.method} at {args.align_at}, crop {args.box}" +
          (f" x {args.margin}" if args.box != "image" else ""))
    shown = [("accuracy", "verified (%)", 100, 2), ("rank1", "rank-1 (%)", 100, 2),
             ("anme/crops", "ANME of crops", 1, 4), ("anme", "ANME aligned", 1, 4),
             ("distance", "W(T) - x (px)", 1, 2), ("folded", "folded (%)", 100, 2),
             ("converged", "inverted (%)", 100, 2)]
    shown = [column for column in shown if column[0] in first]
    print(" " * 12 + "".join(f"{title:>15}" for _, title, _, _ in shown))
    for title, found in rows.items():
        cells = (f"{scale * found[key]:>15.{digits}f}" for key, _, scale, digits in shown)
        print(f"{title:12}" + "".join(cells))
    for title, found in rows.items():
        for key in (key for key in found if "@" in key and key.startswith(("accuracy", "rank", "tar"))):
            print(f"{title}: {key} {100 * found[key]:.2f} %")


# ---- Pictures ------------------------------------------------------------------------------------

GREEN, RED, LINE = (60, 220, 60), (240, 50, 50), (250, 230, 120)


def write_image(path, image: np.ndarray):
    """Writes RGB uint8 (H, W, 3)."""
    if not cv2.imwrite(str(path), image[..., ::-1]):
        raise OSError(f"{path}: the picture could not be written")


def draw_points(image: np.ndarray, points, colour, radius: float) -> np.ndarray:
    """Draws points (N, 2) px on RGB uint8 (H, W, 3), in place, at sub-pixel places."""
    for x, y in np.round(16 * np.asarray(points, np.float64)).astype(int).tolist():  # 4 bits after the point
        cv2.circle(image, (x, y), max(round(16 * radius), 8), colour, -1, cv2.LINE_AA, 4)
    return image


def draw_lines(image: np.ndarray, lines, colour) -> np.ndarray:
    """Draws polylines (L, n, 2) px on RGB uint8 (H, W, 3), in place, at sub-pixel places."""
    lines = np.ascontiguousarray(np.round(16 * np.asarray(lines, np.float64)).astype(np.int32))
    cv2.polylines(image, list(lines), False, colour, 1, cv2.LINE_AA, 4)
    return image


def tile(tiles: list, columns: int) -> np.ndarray:
    """Images of one size side by side, `columns` in a row."""
    tiles = tiles + [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)])


@torch.inference_mode()
def draw_alignment(net: AlignedRecognizer, data, side: int = 224) -> np.ndarray:
    """Figs. 2, 5 and 6, for 8 test faces. Above: the crop, the lattice of the aligned frame as it lies in it,
    landmarks (green) and W(T) (red). Below: the aligned crop and its landmarks; beside them T (red)."""
    net.eval()
    device, above, below = net.net.fc.weight.device, [], []
    axis, fine = torch.linspace(-0.5, FRAME - 0.5, 8), torch.linspace(-0.5, FRAME - 0.5, 57)
    columns = torch.cartesian_prod(axis, fine).to(device)
    lattice = torch.cat([columns, columns.flip(1)])
    for i in np.linspace(0, len(data) - 1, min(8, len(data))).astype(int).tolist():
        image, points = prepare(data.__getitems__([(0, i)]), device)
        w = net.fit(image, points)
        crop, aligned = (((x[0] + 1) * GREY).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
                         for x in (image, net.align(image, w)))
        crop, aligned = (cv2.resize(x, (side, side)) for x in (crop, aligned))
        place = lambda p: from_frame(p[0].float().cpu().numpy(), side)
        if w is not None:
            draw_lines(crop, place(net.move(lattice, w, 1, "input")[0]).reshape(16, 57, 2), LINE)
        if points is not None:
            draw_points(crop, place(points), GREEN, side / 160)
            draw_points(aligned, place(net.move(points, w, 1, "aligned")[0]), GREEN, side / 160)
        if net.template is not None:
            draw_points(crop, place(net.move(net.template, w, 1, "input")[0]), RED, side / 200)
            draw_points(aligned, place(net.template[None]), RED, side / 200)
        above.append(crop)
        below.append(aligned)
    rows = [tile([*above[n:n + 4], *below[n:n + 4]], len(above[n:n + 4])) for n in range(0, len(above), 4)]
    return tile(rows if len(above) % 4 == 0 else rows[:1], 1)


def draw_template(net: AlignedRecognizer, start: torch.Tensor, side: int = 480) -> np.ndarray:
    """Figs. 8(b) and 9: T as it began, T as it was learned, the weights: dark where low; extremes below."""
    place = lambda p: from_frame(p.detach().cpu().numpy(), side)
    panels = [np.full((side + 40, side, 3), 255, np.uint8) for _ in range(3)]
    draw_points(panels[0], place(start), (90, 90, 90), 4)
    draw_points(panels[1], place(net.template), (40, 90, 200), 4)
    alpha = net.alpha().detach().cpu()
    low, high = alpha.min().item(), alpha.max().item()
    shades = ((alpha - low) / max(high - low, 1e-9) * 200).int().tolist()
    for point, shade in zip(place(net.template), shades):
        draw_points(panels[2], point[None], (shade, shade, 255 - shade // 2), 6)
    weights = f"weights {low:.3f} (dark) to {high:.3f}"
    for panel, text in zip(panels, ("T at the start", "T learned", weights)):
        cv2.putText(panel, text, (12, side + 26), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (40, 40, 40), 1, cv2.LINE_AA)
    return np.concatenate(panels, 1)


def write_pictures(folder: Path, net: AlignedRecognizer, sets: Sequence[TestSet], start: torch.Tensor | None):
    """What the paper's figures show, from this run: alignment.png; template.png, and T as template.pts."""
    if sets:
        write_image(folder / "alignment.png", draw_alignment(net, sets[0].loader.dataset))
    if start is not None:
        if net.template.requires_grad or net.alpha_logit.requires_grad:
            write_image(folder / "template.png", draw_template(net, start))
        datasets.write_pts(folder / "template.pts", net.template)


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
MACHINE = {"output", "gpus", "device", "workers", "compile", "resume", "eval", "predict",
           "weights", "cache", "given", "detector", "test", "also_lam"}
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


def build(args, template: torch.Tensor | None, device: torch.device) -> AlignedRecognizer:
    """The network that the flags describe, on `device`."""
    learns = args.lam > 0  # without the loss nothing reaches T and the weights
    net = AlignedRecognizer(args.method, args.align_at, args.depth, template, args.width, args.size,
                            args.dropout, learns and args.template == "learned", learns and
                            args.alpha == "learned")
    return net.to(device, memory_format=torch.channels_last)


def first_template(args, data) -> torch.Tensor | None:
    """T at the start: of --template-file, or the mean frontal face of the training set, px of a 112 px crop;
    None for a set without landmarks.   Raises: ValueError for a template that cannot serve."""
    count = None if data.points is None else data.points.shape[1]
    if args.template_file:
        template = torch.from_numpy(datasets.read_pts(args.template_file)).float()
        if count is not None and len(template) != count:
            raise ValueError(f"--template-file {args.template_file} has {len(template)} points, the "
                             f"landmarks of --data {args.data} are {count}")
    elif count is None or not needs_landmarks(args) and count not in datasets.SCHEMES:
        return None
    else:
        template = mean_frontal_template(frame_points(data))
    try:
        warp.check_points(template, "spline")
    except ValueError as error:
        raise ValueError(f"template {args.template_file or '(mean of training faces)'}: {error}") from None
    return template


def load_weights(net: nn.Module, weights: dict, path) -> None:
    """Gives a network a checkpoint's tensors.   Raises: ValueError for a name or shape that does not fit."""
    own, found = ({name: tuple(getattr(value, "shape", ())) for name, value in tensors.items()}
                  for tensors in (net.state_dict(), weights))
    if wrong := [name for name in own | found if own.get(name) != found.get(name)]:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit the network that its flags describe; the "
                         f"first, {wrong[0]}, is {found.get(wrong[0], 'missing')}, expected "
                         f"{own.get(wrong[0], 'none')}; the file was changed, or is of another version")
    net.load_state_dict(weights)


def open_checkpoint(args, path: str, free: set[str]) -> tuple[AlignedRecognizer, dict]:
    """A checkpoint's network, in evaluation mode, and its flags. `args` takes these over, but for `free`, the
    typed ones of DATA, and all of DATA where --data names another set."""
    args.gpus, given = 1, set(args.given)
    device = setup(args)[2]
    state = load(path, "stn_align")
    other = "data" in given and args.data != state["args"]["data"]
    restore_args(args, state["args"], MACHINE | free | (DATA if other else DATA & given))
    args.cache = args.cache if args.box in BOXES[1:] else ""
    net = build(args, state["model"].get("template"), device)
    load_weights(net, state["model"], path)
    return net.eval(), state["args"]


def evaluate_checkpoint(args) -> dict:
    """--eval: the numbers of a checkpoint on the test split of --data and on --test; with --output, the
    pictures too. Data and crop are those of its training, unless --data, --box or --margin are given."""
    net, _ = open_checkpoint(args, args.eval, {"box", "margin"} & set(args.given))
    folder = find_run(args, "stn_align")
    sets = test_sets(args, net.net.fc.weight.device)
    if not sets:
        raise ValueError(f"--data {args.data} has no test split in {args.data_root}; give --test")
    scores = evaluate(net, sets, args)
    print_table({f"lambda {args.lam:g}" if net.locnet else args.method: scores}, args)
    if folder:
        write_pictures(make_run(args, "stn_align", folder), net, sets, None)
    return scores


def open_detector(path: str):
    """cv2's detector from a YuNet model file.   Raises: ValueError for another kind of file."""
    try:
        return cv2.FaceDetectorYN.create(path, "", (320, 320))
    except cv2.error as error:
        raise ValueError(f"--detector {path}: no YuNet model that OpenCV can read ({error.err})") from None


def find_boxes(args, image: np.ndarray, detector) -> np.ndarray:
    """Boxes (M, 4) x0 y0 x1 y1 px of an image's faces: by the detector, from --box, or the whole image."""
    height, width = image.shape[:2]
    if detector is not None:
        detector.setInputSize((width, height))
        found = detector.detect(np.ascontiguousarray(image[..., ::-1]))[1]
        found = np.zeros((0, 4)) if found is None else found[:, :4].astype(np.float64)
        return np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], 1)
    if args.box in BOXES:
        return np.array([[-0.5, -0.5, width - 0.5, height - 0.5]])
    box = parse_box(args.box)
    if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
        raise ValueError(f"--box {args.box} lies outside an image of {width} x {height}")
    return np.array([box])


@torch.inference_mode()
def recognise(net: AlignedRecognizer, image: np.ndarray, box: np.ndarray, margins: list, points, args):
    """Aligned crop (size, size, 3) uint8, W(T) (S, 2) px of the image, None where T was not used, and unit
    embedding (512,) of the face in `box` (4,). A second margin is about the W(T) of the first look; `points`
    (S, 2) px of the image or None."""
    for margin in margins:
        frames = torch.from_numpy(datasets.square_frames(box[None], args.size, margin))
        batch = datasets.CropDataset([datasets.Face(image, points)], frames, args.size).__getitems__([(0, 0)])
        crop, landmarks = prepare(batch, net.net.fc.weight.device)
        w, places = net.fit(crop, landmarks), None
        if net.template is not None and (args.lam or net.locnet is None) and w is not None:
            places = from_frame(net.move(net.template, w, 1, "input")[0].cpu(), args.size)
            places = warp.apply_affine(warp.invert(frames), places.double())[0].numpy()
            box = np.concatenate([places.min(0), places.max(0)])
    aligned = ((net.align(crop, w)[0] + 1) * GREY).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return aligned, places, F.normalize(look(net, [batch], args)["features"].float())[0].numpy()


def predict(args) -> dict:
    """--predict: for each face writes its aligned crop as NAME.png, W(T), the landmarks by the network's
    alignment, as NAME.pts in px of the image, and its unit embedding as NAME.npy.

    A network that was trained with the alignment loss on crops about landmarks looks at a face twice: in the
    box that is given (by --detector, by --box, or the whole image), then in the box of W(T). A method that
    needs landmarks reads NAME.pts beside the image, which has one face then. A further face of an image is
    NAME.face2.png and so on. Pixels are taken as stored: turn a photo that has an orientation tag.
    Raises: FileNotFoundError for a path without images, or landmarks that are needed; ValueError for two
        images of one name, or one that cannot be read; FileExistsError before a file is written over."""
    net, trained = open_checkpoint(args, args.weights, DATA | {"box"} | ({"margin"} & set(args.given)))
    detector = open_detector(args.detector) if args.detector else None
    found = datasets.image_paths(args.predict)  # {name: path}
    datasets.check_images([datasets.Face(path) for path in found.values()])
    args.data = "predict"
    folder, count = find_run(args, "stn_align"), 0
    for target in (folder / f"{name}{end}" for name in found for end in (".png", ".pts", ".npy")) if folder \
            else ():
        if target.exists():
            raise FileExistsError(f"--output {folder}: {target} exists already; name another folder")
    folder = make_run(args, "stn_align", folder)
    about_points = trained["box"] == "landmarks"
    margins = [args.margin] * (2 if about_points and net.locnet and args.lam else 1)
    if not detector and args.box in BOXES or trained["box"] == "image" and "margin" not in args.given:
        margins[0] = 1.0  # the whole image has its margin in it
    for name, path in tqdm(found.items(), "predict"):
        image, points = datasets.load_image(path), None
        if args.method in BY_LANDMARKS:
            points = datasets.read_pts(os.path.splitext(path)[0] + ".pts")
            if len(points) != len(net.template):
                raise ValueError(f"{os.path.splitext(path)[0]}.pts has {len(points)} points, the network's "
                                 f"template {len(net.template)}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for i, box in enumerate(find_boxes(args, image, detector), 1):
            look_at = margins
            if points is not None and about_points:
                box, look_at = np.concatenate([points.min(0), points.max(0)]), [args.margin]
            aligned, places, feature = recognise(net, image, box, look_at, points, args)
            target = str(folder / name) + (f".face{i}" if i > 1 else "")
            write_image(target + ".png", aligned)
            np.save(target + ".npy", feature)
            if places is not None:
                datasets.write_pts(target + ".pts", places)
            count += 1
    print(f"{count} faces of {len(found)} images in {folder}")
    return {}


# ---- Training ------------------------------------------------------------------------------------

def learning_rate(step: int, steps: int, base: float, warmup: int, drop_at: Sequence[Fraction]) -> float:
    """Sec. 5.1: a tenth after each of the parts `drop_at` of the run; ours: a rise over `warmup` steps."""
    return base * min(1, (step + 1) / max(warmup, 1)) * 0.1 ** sum(step >= part * steps for part in drop_at)


def summary(row: dict) -> str:
    """A log's row as a line to read."""
    percent = ("accuracy", "rank1", "rank5", "folded", "converged")
    return ", ".join(f"{key} {100 * value:.2f} %" if key.split("@")[0] in percent else f"{key} {value:.4g}"
                     for key, value in row.items())


def make_learner(args, data, images, state: dict | None, device: torch.device, rank: int):
    """Network with losses, and its optimizer: new, the same on every rank, or as a checkpoint's `state` has
    them.   Returns: Learner, optimizer, T at the start or None."""
    seed_all(args.seed)
    classes, count = len(images.ids), len(images)
    if state and state["classes"] != [classes, count]:
        raise ValueError(f"--resume: {count} images of {classes} identities, the run was started on "
                         f"{state['classes'][1]} of {state['classes'][0]}; see --data-root")
    start = state["start"] if state else first_template(args, data)
    learner = Learner(build(args, start, device), classes, args.lam).to(device)
    net = learner.net
    trained = lambda *parts: [p for part in parts if part is not None for p in part.parameters()
                              if p.requires_grad]
    own = [p for p in (net.template, net.alpha_logit) if p is not None and p.requires_grad]
    optimizer = torch.optim.SGD([
        dict(params=trained(net.net, learner.head), weight_decay=args.weight_decay, scale=1.0),
        dict(params=trained(net.locnet), weight_decay=args.weight_decay, scale=args.loc_lr),
        dict(params=own, weight_decay=0.0, scale=1.0)], args.lr, momentum=0.9)
    if state:
        load_weights(net, state["model"], Path(args.output, "last.pt"))
        load_weights(learner.head, {"weight": state["head"]}, Path(args.output, "last.pt"))
        optimizer.load_state_dict(state["optimizer"])
    if rank == 0:
        sizes = {"recognition": net.net, "LocNet": net.locnet, "identities": learner.head}
        sizes = [f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in sizes.items()
                 if part is not None]
        print(f"{args.method} at {args.align_at}" + (f", lambda {args.lam:g}" if net.locnet else "") +
              f", {device.type}; parameters: " + ", ".join(sizes))
    return learner, optimizer, start


def load_sets(args, rank: int):
    """The training images and their dataset, augmented."""
    split = read_set(args, "train")
    if rank == 0:
        print(f"{len(split.images):,} training images of {len(split.images.ids):,} identities, " + (
            "no landmarks" if split.points is None else f"{split.points.shape[1]} landmarks"))
    return split.images, make_dataset(args, split, True)


def train(args) -> tuple[dict, Path]:
    """Trains by the flags; returns the numbers of the last evaluation, and the folder of the run."""
    # Set-up
    rank, world, device = setup(args)
    folder = find_run(args, "stn_align")
    state = load(folder / "last.pt", "stn_align") if args.resume else None
    if state:
        restore_args(args, state["args"], MACHINE | ({"data_root", "landmarks"} & set(args.given)))
        args.cache = args.cache if args.box in BOXES[1:] else ""
    # Data and network
    images, train_set = load_sets(args, rank)
    labels, drop_at = torch.as_tensor(images.labels), listed(args.drop_at)
    learner, optimizer, template = make_learner(args, train_set, images, state, device, rank)
    net, model = learner.net, torch.compile(learner) if args.compile else learner
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    batches = datasets.EpochBatches(len(train_set), args.batch_size, args.seed, rank, world)
    sets = test_sets(args, device) if rank == 0 else []  # before anything is written
    loader = make_loader(args, train_set, batches, device, everywhere=True)
    steps, start, scores, began = len(batches), state["epoch"] if state else 0, {}, time.time()
    if rank == 0:  # only the first process evaluates and writes
        folder = make_run(args, "stn_align", folder)
        print(f"run: {folder}, processes: {world}, epochs done: {start} of {args.epochs}", flush=True)
        first_drop = float(min(drop_at, default=1) * args.epochs * steps)
        if args.warmup > first_drop:
            print(f"note: the rate rises for {args.warmup} steps but drops after {first_drop:.0f}: it "
                  f"never is --lr {args.lr:g}; a run this short wants a smaller --warmup")
        if state and state["world"] != world:
            print(f"the run had {state['world']} processes: batch norms now see other shares, numbers change")
        cut_log(folder / "log.jsonl", start)
    del state
    bar = tqdm(total=args.epochs * steps, initial=start * steps, disable=rank > 0,
               mininterval=1 if sys.stderr.isatty() else 30)
    for epoch in range(start, args.epochs):
        # One pass over the training set
        seed_all(args.seed, epoch + 1, rank)
        batches.epoch, epoch_began, losses = epoch, time.time(), torch.zeros(steps, 4, device=device)
        learner.train()
        for step, batch in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate(epoch * steps + step, args.epochs * steps,
                                                             args.lr, args.warmup, drop_at)
            image, points = prepare(batch, device)
            with precision(args, device):
                terms = model(image, labels[batch["index"]].to(device, non_blocking=True), points)
            optimizer.zero_grad(set_to_none=True)
            terms[0].backward()
            optimizer.step()
            losses[step] = terms.detach()
            if step % 20 == 0:  # the only reading of the loss: it waits for the GPU
                if not losses[step].isfinite().all():
                    net.eval().fit(image, points)  # says so if it is LocNet's
                check_losses(losses[:, 0], epoch + 1)
                bar.set_postfix(epoch=epoch + 1, loss=f"{losses[step, 0].item():.3f}", refresh=False)
            bar.update()
        if world > 1:
            dist.all_reduce(losses, dist.ReduceOp.SUM)
        check_losses(losses[:, 0], epoch + 1)
        check_weights(learner, epoch + 1)
        # Evaluation, log and checkpoint
        if rank == 0:
            row = dict(zip(("loss", "fr", "lmk", "reg"), (losses.mean(0) / world).tolist()))
            row = dict(epoch=epoch + 1, **row, lr=optimizer.param_groups[0]["lr"], images_per_second=steps *
                       args.batch_size / (time.time() - epoch_began))
            if epoch + 1 == args.epochs or (epoch + 1) % args.eval_every == 0:
                scores = evaluate(net, sets, args)
                row |= scores
            row["minutes"] = (time.time() - began) / 60
            bar.write(summary(row))
            write_log(folder / "log.jsonl", **row)
            save(folder / "last.pt", script="stn_align", model=net.state_dict(), start=template,
                 head=learner.head.weight.data, optimizer=optimizer.state_dict(), epoch=epoch + 1,
                 args=vars(args), world=world, classes=[len(learner.head.weight), len(images)])
    bar.close()
    if rank == 0:
        if start >= args.epochs:  # it was killed after its last checkpoint
            scores = evaluate(net, sets, args)
        write_pictures(folder, net, sets, template)
    return scores, folder


def main(args) -> dict:
    """Trains, evaluates or predicts, as the flags say; returns the numbers of the last evaluation.
    The networks of --also-lam are trained after the first, in folders inside its own."""
    if args.eval or args.predict:
        return evaluate_checkpoint(args) if args.eval else predict(args)
    scores, folder = train(args)
    learns = args.method in BY_LOCNET
    rows = {f"lambda {args.lam:g}" if learns else args.method: scores}
    for lam in map(float, listed(args.also_lam) if learns else ()):
        torch.cuda.empty_cache()  # of the last network and its crops; nothing without a GPU
        shared = [str(folder)]
        if dist.is_initialized():
            dist.broadcast_object_list(shared)
        other = argparse.Namespace(**vars(args) | dict(
            lam=lam, also_lam="", output=str(Path(shared[0], f"lam{lam:g}")),
            given=sorted({"data_root", "landmarks"} & set(args.given))))
        other.resume = Path(other.output, "last.pt").exists()
        rows[f"lambda {lam:g}"] = train(other)[0]
        scores = scores | {f"{key}@lam{lam:g}": value for key, value in rows[f"lambda {lam:g}"].items()}
    if int(os.environ.get("RANK", 0)) == 0 and next(iter(rows.values())):
        print_table(rows, args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return scores


if __name__ == "__main__":
    run(main, parse_args())
