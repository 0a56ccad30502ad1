"""LDDMM-Face: Large Deformation Diffeomorphic Metric Learning for Cross-annotation Face Alignment.

Huilin Yang, Junyan Lyu, Pujin Cheng, Xiaoying Tang; submitted to ICLR 2022. https://arxiv.org/abs/2108.00690

The method. A face is twelve curves or so (contour, brows, nose, eyes, lips). The network does not say where
the landmarks are: it gives each a momentum, and the momenta of a curve make a smooth velocity field around it
(a sum of Gaussians) along which the curve of the mean face flows to its place on the image. The field moves
every point near the curve, not only the landmarks: a network that was trained on half of the landmarks, or on
68 points, predicts all of them, or the 194 of another annotation, without retraining.
The loss compares landmarks, and curves as wholes (the vector measures of their tangents).

Where each equation is:
  Eq. (1)            inner product and norm of curves   inner
  Eq. (2), (3), (8)  loss (gamma of Eq. (2) is 0)       lddmm_loss
  Eq. (4)            curve discrepancy                  curve_discrepancy
  Eq. (5)            landmark discrepancy               landmark_discrepancy
  Eq. (6), (7)       flow                               flow

Differs from the paper, or settles what it leaves open ("code" is the authors' repository,
CRazorback/LDDMM-Face at cb45e96):
  - Time: two Euler steps with the same momenta in both (code; paper: momenta alpha(t), no number of steps).
    --steps, --per-step-momenta. Two steps can fold the plane where the exact flow cannot; DetJN counts it.
  - sigma_V is the scale of a curve (mean of width and height) in the mean face, where the flow runs: paper.
    Code: of a mean face in another frame, so 0.35 (300W) and 0.44 (HELEN) of it. --sigma-factor. sigma_W is
    half of it, for each curve: paper. Code: the contour's for nearly all curves, by a wrong index.
  - Eq. (8) with D_C as a norm, summed over the curves: paper. Code: its square over the number of landmarks,
    and the mean over landmarks for D_l: --squared.
  - The mean face is the training set's, in the crop (code: a fixed face); that of another annotation comes by
    least squares on shared landmarks (code: by hand).
  - WFLW has 98 points here: the pupils, on no curve, go with the flow of their eye. Code: 96. HELEN has 11
    curves, one for the nose. Paper: 12.
  - "50 %" and "33 %" are the code's lists: 68 % of 300W's points, 55 % of WFLW's, 51 and 40 % of HELEN's.
  - NME_c has no ICP, as in the code: distances to the nearest points, both ways, by part.
  - Rotation and scale are normal with standard deviations of 10 degrees and 12.5 %, clipped at 20 and 25 %.
    Paper: normal, "+-20", "+-25 %". Code: even up to 30 degrees in 6 of 10 images.
  - Coordinates keep their fractions. Code: cut to whole px, which costs 0.4 to 1.2 % NME.
  - All is trained from scratch (--init loads a backbone). Code: HRNet starts from its landmark weights, and
    for 300W and WFLW stays as it is. Images are normalised by ImageNet's mean and standard deviation (code;
    paper: the training set's). Crops are about the ground-truth landmarks.
  - d_ipd is the distance of the pupils, or of the eyes' centres where none are marked. Code: of the outer eye
    corners. HELEN's published NME is --norm io-published.
  - DAN: blocks of VGG13 and stage weights 0.3 and 0.7, as the code; paper: VGG11.
  - The baselines run on this schedule. --method coord adds the head's output to the mean face (code: to
    zero); sparse ones are completed along the curves for NME_l, and compared by their own points for NME_c.
  - With --gpus N each process normalises its own share of the batch. The last epoch is reported.

Train on 300W on four GPUs (the paper: NME 3.53 %; not run here, see the README):
  python lddmm_face.py --data 300w --data-root 300W --gpus 4 --cache device
Without any data, on drawn faces, two minutes on two CPU cores: 68 points learned (NME 7.1 %), 194 predicted
(7.2 %); the mean face has 19.2 %:
  python lddmm_face.py
Continue; evaluate, also on a set of another annotation; use, also for another annotation:
  python lddmm_face.py --data 300w --gpus 4 --cache device --resume
  python lddmm_face.py --data helen --data-root HELEN --eval runs/lddmm_face-300w/last.pt
  python lddmm_face.py --predict photo.jpg --as-points 194 --weights runs/lddmm_face-300w/last.pt
"""
import argparse
import functools
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import datasets, metrics, synthetic, warp

# ---- Settings ------------------------------------------------------------------------------------

# Appendix: Adam 3e-4, halved thrice, 300 epochs, batch 32, 256 px, crops 1.25 times the box.
PAPER = dict(size=256, epochs=300, batch_size=32, lr=3e-4, backbone="hrnet_w18", drop_at="0.25,0.5,0.75",
             beta=0.1, norm="io", threshold=0.10, margin=1.25, eval_every=5)
SMALL = dict(PAPER, size=128, epochs=30, lr=1e-3, backbone="mobilenetv2", cache="device", eval_every=1)
PRESETS = {
    "300w": dict(PAPER),
    "wflw": dict(PAPER, epochs=150, drop_at="0.5,0.667,0.833"),  # code's schedule
    "helen": dict(PAPER),
    "cofw68": dict(PAPER),  # Table 4: trained on 300W; --data-root is the folder of both sets
    "youtube": dict(SMALL),
    "folder": dict(SMALL),
    "faces": dict(SMALL, size=96, batch_size=16, epochs=8, eval_every=4, also="194"),
}
DRAWN = {"train": 1600, "test": 400}  # faces of --data faces
BOXES = ("landmarks", "face")
STRIDES = {"hourglass": 64}  # --size is a multiple of it; of other backbones 32
ANNOTATIONS = [points for points in datasets.SCHEMES if points > 5]  # five points make no curve
METHODS = ("lddmm", "coord", "heatmap")


def parse_args(argv=None):
    """Flags, with the defaults of the preset that --data names. `args.given` lists what was typed."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--data", default="faces", choices=PRESETS)
    preset = PRESETS[chooser.parse_known_args(argv)[0].data]
    parser = argparse.ArgumentParser(description="Diffeomorphic face alignment across annotations",
                                     allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("shared by all scripts").add_argument
    add("--data", default="faces", choices=PRESETS, help="data set, and the preset of all other flags")
    add("--data-root", default="", help="folder of the data set; the README shows the layout of each")
    add("--output", default="", help="folder of the run (default: runs/lddmm_face-DATA, or the next number)")
    add("--epochs", type=int, default=30, help="passes over the training set")
    add("--batch-size", type=int, default=32, help="faces a step, over all GPUs")
    add("--lr", type=float, default=3e-4, help="learning rate at the start")
    add("--weight-decay", type=float, default=0.0, help="Adam's, added to the gradient")
    add("--gpus", type=int, default=1, help="processes to start, one a GPU; batch norms see their own share")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"], help="auto: a GPU if there is one")
    add("--workers", type=int, default=-1, help="loader processes a GPU; -1: 8 for a GPU, none for a CPU")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    add("--amp", action=switch, default=False, help="bfloat16 network on a GPU; the flow in float32")
    add("--compile", action=switch, default=False, help="torch.compile; minutes at first, then faster")
    add("--limit", type=int, default=0, help="at most so many faces a split (drawn ones: so many), 0: all")
    add("--resume", action="store_true", help="continue the run in --output, or the newest run on this data")
    add("--eval", default="", metavar="CKPT", help="evaluate it and stop; --data may have another annotation")
    add("--predict", nargs="+", default=[], metavar="PATH", help="images or folders to find landmarks in")
    add("--weights", default="", metavar="CKPT", help="checkpoint for --predict")
    add("--box", default="landmarks", help="what is cropped: 'landmarks' (their ground-truth box) or 'face' "
        "(the set's own box); with --predict, x0,y0,x1,y1 in pixels")
    add("--cache", default="", help="keep decoded crops: in this folder, for the next run too, or 'device' "
        "(in the GPU's memory, where the warp then runs; on a CPU in memory)")
    add("--init", default="", metavar="CKPT", help="state dict (HRNet's names) for the backbone")
    add("--size", type=int, default=256, help="side of the crop in px, a multiple of 32 (hourglass: 64)")
    add("--margin", type=float, default=1.25, help="side of the crop over the longer side of the box")
    add("--norm", default="auto", choices=["auto", "io", "ip", "box", "face", "io-published"], help="divisor "
        "of the error: inter-ocular, inter-pupil, sqrt(w h) of the landmarks' or the set's box, HELEN's own; "
        "auto: io, else ip or box")
    add("--threshold", type=float, default=0.10, help="NME above which a face fails; upper end of the AUC")
    add("--eval-every", type=int, default=1, help="epochs between evaluations; the last is always evaluated")
    add("--points", type=int, default=68, help="landmarks of the drawn faces; every other set has its own")
    add("--detector", default="", metavar="ONNX", help="YuNet model file, to find the faces of --predict")
    add = parser.add_argument_group("LDDMM-Face").add_argument
    add("--backbone", default="hrnet_w18", choices=[*BACKBONES, "dan"], help="mobilenetv2 is for a CPU")
    add("--method", default="lddmm", choices=METHODS, help="baselines: coordinates, or heatmaps of HRNet")
    add("--train-points", default="100", help="percent of the landmarks that carry momenta (Sec. 4.2: 50, "
        "HELEN also 33), or indices i,j,...; all are evaluated")
    add("--steps", type=int, default=2, help="Euler steps of Eq. (7); too few can fold the face (DetJN > 0)")
    add("--per-step-momenta", action=switch, default=False, help="momenta of their own for each step")
    add("--sigma-factor", type=float, default=1.0, help="sigma_V over the scale of its curve")
    add("--beta", type=float, default=0.1, help="weight of the curves in Eq. (8) (Table 5)")
    add("--squared", action=switch, default=False, help="the published code's form of Eq. (8)")
    add("--drop-at", default="0.25,0.5,0.75", help="parts of the run after which the rate is halved")
    add("--also", default="", help="numbers of points (98,194) to evaluate the drawn faces in as well")
    add("--as-points", type=int, default=0, help="with --predict, landmarks to write: 29, 68, 98, ...")
    add("--occluder-test", action=switch, default=False, help="score with a fifth of each crop hidden too")
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    # argparse fills in no default where the namespace has a value, so what is not None now was typed.
    typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    args.given = sorted(key for key, value in vars(typed).items() if value is not None)
    check_flags(args, parser.error)
    return args


def check_flags(args, error: Callable[[str], None]):
    """Calls `error` with a message for the first flag whose value cannot be meant."""
    stride = STRIDES.get(args.backbone, 32)
    wanted = [("size", args.size > 0 and args.size % stride == 0, f"a multiple of {stride}, the stride")]
    least = dict(epochs=1, batch_size=1, gpus=1, eval_every=1, steps=1, limit=0, seed=0, weight_decay=0,
                 workers=-1)
    wanted += [(name, getattr(args, name) >= low, f"at least {low}") for name, low in least.items()]
    wanted += [(name, 0 < getattr(args, name) < math.inf, "more than 0") for name in (
        "lr", "margin", "threshold", "sigma_factor")]
    wanted += [("beta", 0 <= args.beta < math.inf, "at least 0"),
               ("drop_at", all(0 <= part <= 1 for part in listed(args.drop_at, float)),
                "parts of the run, as 0.25,0.5"),
               ("also", all(points in ANNOTATIONS for points in listed(args.also, int)),
                f"numbers of points, of {ANNOTATIONS}, as 98,194"),
               ("train_points", all(n >= 0 for n in listed(args.train_points or "-1", int)),
                "a percentage (100, 50, 33) or indices i,j,..."),
               ("as_points", args.as_points in (0, *ANNOTATIONS), f"one of {ANNOTATIONS}"),
               ("box", args.box in BOXES or args.predict and parse_box(args.box), "landmarks or face, with "
                "--predict x0,y0,x1,y1 in pixels, x0 < x1, y0 < y1 (written --box=-5,... if x0 is negative)")]
    wanted += [(name, not getattr(args, name) or os.path.isfile(getattr(args, name)), "a file that exists")
               for name in ("init", "detector")]
    for name, holds, what in wanted:
        if not holds:
            error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {what}")
    flow_flags = {"steps", "per_step_momenta", "sigma_factor", "beta", "squared"} & set(args.given)
    for wrong, message in [
            (args.method != "lddmm" and flow_flags, f"--{', --'.join(sorted(flow_flags)).replace('_', '-')}: "
             f"only --method lddmm has a flow and Eq. (8), --method {args.method} has neither"),
            (args.method == "heatmap" and args.backbone != "hrnet_w18",
             f"--method heatmap goes with --backbone hrnet_w18, not {args.backbone}"),
            (args.also and args.data != "faces",
             "--also belongs to --data faces; on disk, evaluate the run by --data OTHER --eval CKPT"),
            (args.as_points and not args.predict, "--as-points belongs to --predict"),
            (args.detector and not args.predict, "--detector belongs to --predict"),
            (args.batch_size % args.gpus,
             f"--batch-size {args.batch_size} does not divide over --gpus {args.gpus}"),
            (bool(args.predict) != bool(args.weights),
             "--predict PATH and --weights CKPT belong together: images, and a checkpoint of this script"),
            (args.eval and (args.predict or args.resume),
             "--eval goes neither with --predict nor with --resume")]:
        if wrong:
            error(message)


def listed(text: str, kind: type) -> list:
    """The numbers of "1,2,3"; [nan] if they are none."""
    try:
        return [kind(word) for word in text.split(",")] if text else []
    except ValueError:
        return [math.nan]


def parse_box(text: str) -> list[float] | None:
    """The numbers of "x0,y0,x1,y1" if they are a box."""
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
    except ValueError:
        return None
    return [x0, y0, x1, y1] if -math.inf < x0 < x1 < math.inf and -math.inf < y0 < y1 < math.inf else None


# ---- Backbones: Sec. 4 and Appendix --------------------------------------------------------------

# Sec. 4: HRNetV2-W18; Appendix C: a 2-stack hourglass and DAN. Each turns images into the features (B, 2048)
# that the momentum estimator reads. Paper: an average pooling before it; the convolutions there: code.


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """(B, cin, H, W) -> (B, cout, H/stride, W/stride). No bias: the batch norm behind it has a shift."""
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_bn(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, act=None) -> nn.Sequential:
    """`conv` (0), batch norm (1) and, if its class is given, an activation (2); the shapes of `conv`."""
    norm = nn.BatchNorm2d(cout)
    return nn.Sequential(conv(cin, cout, kernel, stride, groups), norm, *([act(inplace=True)] if act else []))


def init_weights(module: nn.Module) -> None:
    """Draws the weights of all convolutions, in place; the rest stays as torch has it.
    Source: He et al., ICCV 2015. Code: N(0, 0.001^2), for pretrained weights; too small from scratch."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


def to_features(cin: int) -> nn.Sequential:
    """1x1 convolution, batch norm, ReLU before the average pooling: (B, cin, H, W) -> (B, 2048, H, W)."""
    return nn.Sequential(nn.Conv2d(cin, 2048, 1), nn.BatchNorm2d(2048), nn.ReLU(inplace=True))


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


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, shortcut: (B, cin, H, W) -> (B, 4 planes, H/stride, W/stride).
    Source: He et al., CVPR 2016, Fig. 5 right; the 3x3 strides: a 1x1 would skip three pixels of four."""
    expansion = 4

    def __init__(self, cin: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv(cin, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        reshape = stride > 1 or cin != 4 * planes
        self.downsample = conv_bn(cin, 4 * planes, 1, stride) if reshape else nn.Identity()

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.downsample(x), inplace=True)


class Fuse(nn.ModuleList):
    """Every branch to every other: output i is the ReLU of the sum over j of paths [i][j] of branch j.
    List of (B, C_j, H/2^j, W/2^j) -> list of the same shapes.   Source: Wang et al., "Deep High-Resolution
    Representation Learning for Visual Recognition" (HRNet), TPAMI 2021."""

    def __init__(self, channels: Sequence[int]):
        n = range(len(channels))
        super().__init__(nn.ModuleList(self.path(channels, j, i) for j in n) for i in n)

    @staticmethod
    def path(channels, j, i):
        """Down: i - j strided 3x3, the last of which changes the width. Up: a 1x1, enlarged in `forward`."""
        if j < i:
            halvings = [conv_bn(channels[j], channels[j], 3, 2, act=nn.ReLU) for _ in range(i - j - 1)]
            return nn.Sequential(*halvings, conv_bn(channels[j], channels[i], 3, 2))
        return conv_bn(channels[j], channels[i], 1) if j > i else nn.Identity()

    def forward(self, xs):
        outs = []
        for i, paths in enumerate(self):
            terms = [path(x) for path, x in zip(paths, xs)]
            # HRNet's code enlarges bilinearly for landmarks and segmentation, by nearest pixel elsewhere.
            terms[i + 1:] = [F.interpolate(t, xs[i].shape[-2:], mode="bilinear", align_corners=False)
                             for t in terms[i + 1:]]
            outs.append(F.relu(sum(terms[1:], terms[0]), inplace=True))
        return outs


class HRModule(nn.Module):
    """Four BasicBlocks on each branch, then `Fuse`: list of (B, C_j, H/2^j, W/2^j) -> the same shapes."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(c, c) for _ in range(4))) for c in channels)
        self.fuse_layers = Fuse(channels)

    def forward(self, xs):
        return self.fuse_layers([branch(x) for branch, x in zip(self.branches, xs)])


class HRNet(nn.Module):
    """HRNetV2-W18's branches, 18 to 144 channels: (B, 3, H, W) -> list of (B, C_j, H/2^(j+2), W/2^(j+2)).
    Parameters, also of the two heads below, are named as in HRNet's checkpoints; sides are multiples of 32.
    Source: Wang et al., TPAMI 2021. Batch-norm momentum 0.1; code: 0.01."""

    def __init__(self, widths: Sequence[int] = (18, 36, 72, 144)):
        super().__init__()
        self.widths = tuple(widths)
        self.conv1, self.bn1 = conv(3, 64, 3, 2), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = conv(64, 64, 3, 2), nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Bottleneck(64, 64), *(Bottleneck(256, 64) for _ in range(3)))
        # A transition grows a branch out of the lowest resolution so far. Older ones pass unchanged, but for
        # layer1's 256 channels. The outer Sequential is a level that the checkpoints' names have.
        low = [nn.Sequential(conv_bn(*p, 3, 2, act=nn.ReLU)) for p in itertools.pairwise((256, *widths[1:]))]
        self.transition1 = nn.ModuleList([conv_bn(256, widths[0], 3, act=nn.ReLU), low[0]])
        self.stage2 = nn.Sequential(HRModule(widths[:2]))
        self.transition2 = nn.ModuleList([nn.Identity(), nn.Identity(), low[1]])
        self.stage3 = nn.Sequential(*(HRModule(widths[:3]) for _ in range(4)))
        self.transition3 = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity(), low[2]])
        self.stage4 = nn.Sequential(*(HRModule(widths) for _ in range(3)))
        init_weights(self)

    def forward(self, image):
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        xs = [self.layer1(F.relu(self.bn2(self.conv2(x)), inplace=True))]      # (B, 256, H/4, W/4)
        for transition, stage in ((self.transition1, self.stage2), (self.transition2, self.stage3),
                                  (self.transition3, self.stage4)):
            xs = stage([path(x) for path, x in zip(transition, [*xs, xs[-1]])])
        return xs


class HRNetFeatures(HRNet):
    """HRNet with its head for classification: (B, 3, H, W) -> (B, 2048). A bottleneck widens each branch;
    from the finest on, strided convolutions bring one to the next, where they add up."""
    channels = 2048

    def __init__(self):
        super().__init__()
        planes = (32, 64, 128, 256)
        self.incre_modules = nn.ModuleList(nn.Sequential(Bottleneck(*p)) for p in zip(self.widths, planes))
        self.downsamp_modules = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4 * p, 8 * p, 3, 2, 1), nn.BatchNorm2d(8 * p), nn.ReLU(inplace=True))
            for p in planes[:-1])
        self.final_layer = to_features(4 * planes[-1])
        for head in (self.incre_modules, self.downsamp_modules, self.final_layer):
            init_weights(head)

    def forward(self, image):
        xs = [widen(x) for widen, x in zip(self.incre_modules, super().forward(image))]
        y = xs[0]                                                              # (B, 128, H/4, W/4)
        for x, down in zip(xs[1:], self.downsamp_modules):
            y = x + down(y)                                                    # to (B, 1024, H/32, W/32)
        return self.final_layer(y).mean((2, 3))                                # (B, 2048)


class HRNetHeatmaps(HRNet):
    """The baseline, HRNet with its head for landmarks, on all branches enlarged to the finest (270 channels):
    (B, 3, H, W) -> heatmaps (B, points, H/4, W/4)."""

    def __init__(self, points: int):
        super().__init__()
        width = sum(self.widths)
        self.head = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                                  nn.Conv2d(width, points, 1))
        init_weights(self.head)

    def forward(self, image):
        xs = super().forward(image)
        size = xs[0].shape[-2:]                                                # (H/4, W/4)
        xs[1:] = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in xs[1:]]
        return self.head(torch.cat(xs, dim=1))


class PreBottleneck(nn.Module):
    """Batch norm and ReLU before each of three convolutions, shortcut: (B, cin, H, W) -> (B, 2 planes, H, W).
    Source: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, Fig. 4e."""

    def __init__(self, cin: int, planes: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), nn.Conv2d(cin, planes, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, padding=1)
        self.bn3, self.conv3 = nn.BatchNorm2d(planes), nn.Conv2d(planes, 2 * planes, 1)
        self.shortcut = nn.Conv2d(cin, 2 * planes, 1) if cin != 2 * planes else nn.Identity()

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        out = self.conv3(F.relu(self.bn3(out), inplace=True))
        return out + self.shortcut(x)


def pre_bottlenecks() -> nn.Sequential:
    """The four blocks at every position of an hourglass: (B, 256, H, W) -> the same shape."""
    return nn.Sequential(*(PreBottleneck(256, 128) for _ in range(4)))


class HourglassLevel(nn.Module):
    """One resolution and, inside it, the `depth` - 1 lower ones: (B, 256, H, W) -> the same shape; H and W
    multiples of 2^depth.   Source: Newell et al., "Stacked Hourglass Networks", ECCV 2016, Fig. 3."""

    def __init__(self, depth: int):
        super().__init__()
        self.skip, self.down, self.up = pre_bottlenecks(), pre_bottlenecks(), pre_bottlenecks()
        self.inner = HourglassLevel(depth - 1) if depth > 1 else pre_bottlenecks()

    def forward(self, x):
        low = self.up(self.inner(self.down(F.max_pool2d(x, 2))))               # (B, 256, H/2, W/2)
        return self.skip(x) + F.interpolate(low, scale_factor=2.0, mode="nearest")


class Hourglass(nn.Module):
    """Two stacked hourglasses: (B, 3, H, W), sides multiples of 64 -> (B, 2048), the average of both stacks'
    features at 2048 channels. The second stack sees what the first saw, its features and its heatmaps, added.
    As in the code, the first heatmaps have no target, and the last are not used: their layer only counts
    among the parameters.   Source: Newell et al., ECCV 2016, Fig. 4."""
    channels = 2048

    def __init__(self, points: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
                                  PreBottleneck(64, 64), nn.MaxPool2d(2), PreBottleneck(128, 128),
                                  PreBottleneck(256, 128))
        self.stacks = nn.ModuleList(
            nn.Sequential(HourglassLevel(4), pre_bottlenecks(), nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256),
                          nn.ReLU(inplace=True)) for _ in range(2))
        self.heads = nn.ModuleList(nn.Conv2d(256, points, 1) for _ in range(2))
        self.heads[1].requires_grad_(False)  # DistributedDataParallel would wait for its gradient
        self.features_back = nn.ModuleList([nn.Conv2d(256, 256, 1)])
        self.heatmaps_back = nn.ModuleList([nn.Conv2d(points, 256, 1)])
        self.final_layer = to_features(2 * 256)
        init_weights(self.final_layer)  # the rest as torch has it: no batch norm follows a block's sum

    def forward(self, image):
        x = self.stem(image)                                                   # (B, 256, H/4, W/4)
        first = self.stacks[0](x)
        x = x + self.features_back[0](first) + self.heatmaps_back[0](self.heads[0](first))
        return self.final_layer(torch.cat([first, self.stacks[1](x)], dim=1)).mean((2, 3))


class DANStage(nn.Module):
    """A stage of DAN up to its features: (B, in_channels, size, size) -> (B, 2048), `size` a multiple of 32.
    Source: Kowalski et al., "Deep Alignment Network", CVPR Workshops 2017 (which has the last ReLU)."""
    channels = 2048

    def __init__(self, in_channels: int = 3, size: int = 256):
        super().__init__()
        cin, layers = in_channels, []
        for cout in (64, 128, 256, 512, 512):
            layers += [conv_bn(c, cout, 3, act=nn.ReLU) for c in (cin, cout)] + [nn.MaxPool2d(2)]
            cin = cout
        self.layers, self.dropout = nn.Sequential(*layers), nn.Dropout(0.5)
        self.fc = nn.Linear(512 * (size // 32) ** 2, self.channels)
        init_weights(self)

    def forward(self, x):
        return F.relu(self.fc(self.dropout(self.layers(x).flatten(1))), inplace=True)


def landmark_image(points: torch.Tensor, size: int) -> torch.Tensor:
    """Image of landmarks: 1 / (1 + px to the nearest landmark) in the 7 x 7 pixels about each, elsewhere 0.
    Landmarks beyond the border draw what reaches inside. Passes gradients. Args: points (B, n, 2) px of that
    image; size, its side in px. Returns: (B, 1, size, size).   Source: Kowalski et al.; 7 x 7: code."""
    offset = warp.pixel_centres((7, 7), points.device) - 3                     # (49, 2)
    pixel = points.detach().round()[:, :, None] + offset                       # (B, n, 49, 2)
    value = 1 / (1 + (points[:, :, None] - pixel).norm(dim=-1))                # (B, n, 49)
    value = value * ((pixel >= 0) & (pixel < size)).all(-1)
    x, y = pixel.long().clamp(0, size - 1).flatten(1, 2).unbind(-1)            # (B, 49 n)
    image = value.new_zeros(len(points), size * size)
    return image.scatter_reduce(1, y * size + x, value.flatten(1), "amax").view(-1, 1, size, size)


class DANConnection(nn.Module):
    """What DAN's stage 2 sees of stage 1's answer: the image, moved so that the landmarks lie about the mean
    face (3 channels), an image of them (1) and one made of the features (1), both 64 x 64 px and enlarged.
    All pass gradients.   Source: Kowalski et al.; 64 x 64: code. Its faults are not copied: the first pixel's
    bilinear weights serve for all of the image, and landmarks are drawn without scaling them to 64 px.
    Args: image (B, 3, size, size); stage 1's points (B, n, 2) px, features (B, 2048); mean (n, 2) px.
    Returns: stage 2's image (B, 5, size, size); theta (B, 2, 3), the similarity into its frame, px to px; the
        points in that frame (B, n, 2) px, where stage 2 starts."""
    canvas = 64

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(DANStage.channels, self.canvas**2)

    def forward(self, image, points, features, mean):
        size = image.shape[-1]
        theta = warp.fit_similarity(points, mean)                              # (B, 2, 3)
        moved, start = warp.warp_affine(image, theta, (size, size)), warp.apply_affine(theta, points)
        drawn = landmark_image((start + 0.5) * (self.canvas / size) - 0.5, self.canvas)
        small = F.relu(self.fc(features), inplace=True).view(-1, 1, self.canvas, self.canvas)
        small = torch.cat([drawn, small.to(drawn.dtype)], dim=1)               # (B, 2, 64, 64)
        small = F.interpolate(small, (size, size), mode="bilinear", align_corners=False)
        return torch.cat([moved, small], dim=1), theta, start


class InvertedResidual(nn.Module):
    """1x1 to `expand` times the width, depthwise 3x3, 1x1: (B, cin, H, W) -> (B, cout, H/stride, W/stride).
    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, Fig. 4d."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int):
        super().__init__()
        hidden = cin * expand
        widen = [conv_bn(cin, hidden, 1, act=nn.ReLU6)] if expand > 1 else []
        depthwise = conv_bn(hidden, hidden, 3, stride, groups=hidden, act=nn.ReLU6)
        # No activation at the end: on so few channels a ReLU would lose too much.
        self.conv = nn.Sequential(*widen, depthwise, conv(hidden, cout, 1), nn.BatchNorm2d(cout))
        self.residual = stride == 1 and cin == cout

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Sandler et al., CVPR 2018, Table 2, without the last 1x1 convolution, and a hidden layer of 256 on all
    of its last map, which keeps the places that an average forgets: it learns from scratch in minutes. Ours,
    not the paper's. (B, 3, size, size) -> (B, 256), `size` a multiple of 32."""
    channels = 256

    def __init__(self, size: int):
        super().__init__()
        cin, layers = 32, [conv_bn(3, 32, 3, 2, act=nn.ReLU6)]
        table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
                 (6, 320, 1, 1))
        for expand, cout, depth, stride in table:
            for i in range(depth):
                layers.append(InvertedResidual(cin, cout, 1 if i else stride, expand))
                cin = cout
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(320 * (size // 32) ** 2, self.channels)
        init_weights(self)

    def forward(self, image):
        return F.relu(self.hidden(self.features(image).flatten(1)), inplace=True)


# Images -> features (B, channels), given the number of carriers. DAN's stages stand apart: a flow is between.
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "hrnet_w18": lambda points, size=256: HRNetFeatures(),
    "hourglass": lambda points, size=256: Hourglass(points),
    "mobilenetv2": lambda points, size=256: MobileNetV2(size),
}


# ---- Curves --------------------------------------------------------------------------------------

# Sec. 4.2: the landmarks that are trained on, by scheme and nominal percent; a list for each curve, in the
# order of `datasets.SCHEMES[scheme].curves`. Paper: no lists, and no landmark of an eye left out; code:
# these, 46, 54, 98 and 78 different ones. Of 68, a mouth corner that ends both lips is a carrier of each,
# with a momentum of its own. Code: HELEN's 162 stands twice, 172 not at all; here it is 172.
SUBSETS: dict[int, dict[int, list[list[int]]]] = {
    68: {50: [[0, 2, 4, 6, 8], [9, 11, 13, 16], [17, 19, 21], [22, 24, 26], [27, 28, 29, 30], [31, 33, 35],
              [*range(36, 42)], [*range(42, 48)], [48, 50, 51, 52, 54], [54, 56, 57, 58, 48], [60, 62, 64],
              [64, 66, 60]]},
    98: {50: [[*range(0, 17, 2)], [*range(18, 33, 2)], [33, 35, 37, 38, 40], [42, 44, 46, 48, 50],
              [51, 52, 53, 54], [55, 57, 59], [60, 62, 64, 66], [68, 70, 72, 74], [76, 78, 80, 82],
              [83, 85, 87], [88, 90, 92], [93, 95]]},
    194: {50: [[*range(0, 21, 2)], [21, *range(24, 41, 2)], *([*range(start, stop, 2)] for start, stop in (
                (41, 58), (58, 72), (72, 86), (86, 100), (100, 114), (114, 134), (134, 154), (154, 174),
                (174, 194)))],
          33: [[*range(0, 21, 3), 20], [21, *range(25, 41, 3)], [41, 44, 47, 49, 51, 54, 57],
               *([start + i for i in (0, 3, 6, 7, 10, 13)] for start in (58, 72, 86, 100)),
               *([start + i for i in (0, 2, 5, 8, 10, 12, 15, 18)] for start in (114, 134, 154, 174))]},
}


class Carriers(NamedTuple):
    """The landmarks that carry momenta, and how the P landmarks of the whole scheme follow from them."""
    scheme: int                     # P
    ids: list[int]                  # (K,) landmark of each carrier, curve after curve
    curves: dict[str, list[int]]    # curve -> places among the K carriers: disjoint, together all
    extras: dict[str, list[int]]    # curve -> the landmarks that its flow carries besides (Sec. 3.3)
    place: list[int]                # (P,) of each landmark in the carriers and, behind them, the extras


def carriers(scheme: int, points: int | Sequence[int] = 100) -> Carriers:
    """Which landmarks carry momenta, the curve of each, and which landmarks go with them.

    Every other landmark is an extra of its own curve; a pupil that is on no curve (98 points: 96 and 97), of
    the eye curve of its side. A landmark that is a carrier takes that carrier's place, of two the later one's
    (as code: the mouth corners end up on the lower lip).
    Args: scheme, number of points; points, the nominal percent (100: all that lie on curves), or indices.
    Raises: ValueError for a scheme without curves, a percent without a table, an index outside the scheme,
        twice or on no curve, and a curve without a carrier.
    """
    if scheme not in ANNOTATIONS:
        raise ValueError(f"no curve table for {scheme} points, only for {', '.join(map(str, ANNOTATIONS))}")
    table, anchors = datasets.SCHEMES[scheme].curves, datasets.SCHEMES[scheme].anchors
    lines, subsets = {i for own in table.values() for i in own}, SUBSETS.get(scheme, {})
    if not isinstance(points, int):
        chosen = [int(index) for index in points]
        for wrong, what in [
                ([i for i in chosen if not 0 <= i < scheme], f"outside the scheme; wanted 0 to {scheme - 1}"),
                ([i for i in chosen if chosen.count(i) > 1], "given more than once; wanted each once"),
                ([i for i in chosen if i not in lines], f"on no curve of the {scheme} points and can carry "
                 "nothing; leave them out: the eye curves carry them")]:
            if wrong:
                raise ValueError(f"landmarks {sorted(set(wrong))} are {what}")
        lists = [[index for index in own if index in chosen] for own in table.values()]
    elif points != 100 and points not in subsets:
        raise ValueError(f"no table of {points} % of {scheme} points; wanted one of {[100, *subsets]} or "
                         "indices")
    else:
        lists = subsets.get(points, table.values())
    if empty := [name for name, own in zip(table, lists) if not own]:
        raise ValueError(f"no carrier on {', '.join(empty)}: nothing would move the other landmarks there; "
                         "give at least one index of each curve")
    ids = [index for own in lists for index in own]
    number = itertools.count()
    curves = {name: [next(number) for _ in own] for name, own in zip(table, lists)}
    extras = {}
    for name, own in table.items():
        pupil = [i for i in anchors.get("pupil" + name.removeprefix("eye"), ()) if i not in lines]
        if carried := [index for index in [*own, *pupil] if index not in ids]:
            extras[name] = carried
    place = {index: k for k, index in enumerate([*ids, *(i for own in extras.values() for i in own)])}
    return Carriers(scheme, ids, curves, extras, [place[index] for index in range(scheme)])


class Layout(nn.Module):
    """Curves as one padded tensor: (..., N, 2) landmarks <-> (..., C, P, 2), P points in the longest curve.

    A shorter curve repeats its last point. Such a copy has no momentum, so that it moves nothing, and ends a
    tangent of length 0, which adds nothing to Eq. (1).
    Args: curves, name -> indices in the order along the curve; points, N (default: as many as there are).
    Raises: ValueError unless the curves hold every index of 0 to N - 1 once and each at least one."""

    def __init__(self, curves: Mapping[str, Sequence[int]], points: int | None = None):
        super().__init__()
        ids = [[int(index) for index in own] for own in curves.values()]
        flat = [index for own in ids for index in own]
        self.names, self.points = list(curves), len(flat) if points is None else points
        if not ids or not all(ids):
            raise ValueError(f"curves {dict(curves)}: wanted one point or more on each")
        wrong = {"on two curves or twice on one": {index for index in flat if flat.count(index) > 1},
                 f"outside 0 to {self.points - 1}": set(flat) - set(range(self.points)),
                 "on no curve; give them as extra": set(range(self.points)) - set(flat)}
        if any(wrong.values()):
            raise ValueError("; ".join(f"points {sorted(bad)} are {what}"
                                       for what, bad in wrong.items() if bad))
        longest = max(map(len, ids))
        padded = torch.tensor([own + own[-1:] * (longest - len(own)) for own in ids])
        real = torch.tensor([[k < len(own) for k in range(longest)] for own in ids])
        place = real.flatten().nonzero()[:, 0][torch.tensor(flat).argsort()]
        self.register_buffer("padded", padded, persistent=False)              # (C, P) landmark of each slot
        self.register_buffer("real", real, persistent=False)                  # (C, P) slots that are no copy
        self.register_buffer("place", place, persistent=False)                # (N,) slot of each landmark

    def gather(self, points: torch.Tensor) -> torch.Tensor:
        """(..., N, 2) -> (..., C, P, 2)."""
        return points.index_select(-2, self.padded.flatten()).unflatten(-2, self.padded.shape)

    def gather_momenta(self, momenta: torch.Tensor, per_step: bool) -> torch.Tensor:
        """(..., [steps,] N, 2) -> (..., C, [steps,] P, 2), 0 for copies."""
        momenta = self.gather(momenta) * self.real[..., None]
        return momenta.movedim(-4, -3) if per_step else momenta

    def gather_extra(self, extra: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Curve -> (..., m, 2) points of its own -> (..., C, M, 2), of the type of `like`; copies are 0."""
        own = [extra[name] if name in extra else like.new_zeros(0, 2) for name in self.names]
        lead = torch.broadcast_shapes(*(points.shape[:-2] for points in own))
        longest = max(points.shape[-2] for points in own)
        return torch.stack([F.pad(points, (0, 0, 0, longest - points.shape[-2])).expand(*lead, -1, -1)
                            for points in own], -3)

    def scatter(self, points: torch.Tensor) -> torch.Tensor:
        """(..., C, P, 2) -> (..., N, 2)."""
        return points.flatten(-3, -2).index_select(-2, self.place)


def as_layout(curves: Layout | Mapping[str, Sequence[int]], points: torch.Tensor) -> Layout:
    """The layout of a curve table for landmarks (..., N, 2), made anew each time; a layout as it is.
    Raises: ValueError, see `Layout`, or if the layout has another N."""
    count = points.shape[-2]
    layout = curves if isinstance(curves, Layout) else Layout(curves, count).to(points.device)
    if layout.points != count:
        raise ValueError(f"found {count} points, wanted the {layout.points} that are on the curves; give "
                         "others as extra")
    return layout


def curve_scale(mean: torch.Tensor, curves: Layout | Mapping[str, Sequence[int]]) -> torch.Tensor:
    """sigma_V of each curve (..., C), in units of `mean` (..., N, 2): mean of width and height of its box. A
    curve of one point, of scale 0, takes the mean scale of the others (1 if there is none): any moves it
    alike.   Source: Sec. 4, "the scale of the coordinates of each curve"; code: by this rule."""
    points = as_layout(curves, mean).gather(mean)                             # (..., C, P, 2)
    scale = (points.amax(-2) - points.amin(-2)).mean(-1)                      # (..., C)
    extended = scale > 0
    other = scale.sum(-1, keepdim=True) / extended.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(extended, scale, torch.where(other > 0, other, torch.ones_like(other)))


# ---- Deformation layer: Sec. 3.1 and 3.3 ---------------------------------------------------------

def full_precision(function):
    """Decorator: autocast off, so that a flow and a loss keep the precision of what they are given."""
    return torch.autocast("cuda", enabled=False)(torch.autocast("cpu", enabled=False)(function))


def kernel(a: torch.Tensor, b: torch.Tensor, sigma) -> torch.Tensor:
    """k_V, k_W between all points a (..., m, 2) and b (..., n, 2): (..., m, n). sigma: number or (..., 1, 1).
    Differences are taken directly: as |a|^2 + |b|^2 - 2ab they lose three digits in float32."""
    a, b = a / sigma, b / sigma
    dx = a[..., :, None, 0] - b[..., None, :, 0]                              # (..., m, n)
    dy = a[..., :, None, 1] - b[..., None, :, 1]
    # Sec. 3.1: k(a, b) = exp(-|a - b|^2 / sigma^2)
    return (-(dx * dx + dy * dy)).exp()


def _sigma(sigma, like: torch.Tensor) -> torch.Tensor:
    """sigma, a number or (...,), as (..., 1, 1) in the type of `like`.   Raises: ValueError unless all are
    positive; numbers on an accelerator are not read, as that would wait for it."""
    unread = isinstance(sigma, torch.Tensor) and sigma.device.type != "cpu" or torch.compiler.is_compiling()
    if not unread and not bool((torch.as_tensor(sigma) > 0).all()):
        raise ValueError(f"sigma is {torch.as_tensor(sigma).min():g}, wanted more than 0")
    return torch.as_tensor(sigma, dtype=like.dtype, device=like.device)[..., None, None]


def _check_flow(points, momenta, sigma, steps, extra) -> bool:
    """Whether the momenta are one set per step.   Raises: ValueError, see `flow`."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps}, wanted a whole number of at least 1")
    p, a, s, e = (tuple(getattr(value, "shape", ())) for value in (points, momenta, sigma, extra))
    per_step = len(a) == len(p) + 1
    wanted = (steps, *p[-2:]) if per_step else p[-2:]
    fits = len(a) <= len(p) + 1 and a[-len(wanted):] == wanted and all(
        shape[1:] and shape[-1] == 2 for shape in (p, e)[:1 if extra is None else 2])
    try:
        torch.broadcast_shapes(p[:-2], a[:-len(wanted)], s, e[:-2])
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"found points {p}, momenta {a}, sigma {s}, extra {e}; wanted points (..., n, 2), "
                         "momenta (..., n, 2) or, with one dimension more than the points, one set per step "
                         f"(..., {steps}, n, 2), sigma (...), extra (..., m, 2), all broadcast")
    return per_step


@full_precision
def flow(points: torch.Tensor, momenta: torch.Tensor, sigma, steps: int = 2,
         extra: torch.Tensor | None = None):
    """Moves points by their momenta, and `extra` points with them: the flow of one curve, or of many at once.

    Time runs from 0 to 1 in `steps` explicit Euler steps, each one-to-one for certain only if the norms of
    the momenta add up to less than 1.1658 sigma * steps. Use as many as the model was trained with.
    Args: points (..., n, 2), any unit; momenta (..., n, 2), constant, or (..., steps, n, 2), one set a step,
        known by having one dimension more than the points; sigma, a number or (...,), in the unit of points;
        extra (..., m, 2). Leading dimensions broadcast. A point without momentum moves along and moves none.
    Returns: trajectory (..., steps + 1, n, 2), start included; with extra the pair of both. Float32 or 64.
    Raises: ValueError for steps < 1, sigma <= 0 (not read on an accelerator) or shapes that do not match.
    """
    per_step = _check_flow(points, momenta, sigma, steps, extra)
    n, x = points.shape[-2], points
    if extra is not None:
        lead = torch.broadcast_shapes(points.shape[:-2], extra.shape[:-2])
        x = torch.cat([points.expand(*lead, -1, -1), extra.expand(*lead, -1, -1)], -2)    # (..., n + m, 2)
    dtype = functools.reduce(torch.promote_types, (x.dtype, momenta.dtype, torch.float32))
    x, momenta = x.to(dtype), momenta.to(dtype)
    sigma, trajectory = _sigma(sigma, x), [x]
    for step in range(steps):
        alpha = momenta[..., step, :, :] if per_step else momenta             # (..., n, 2)
        # Eq. (6): dx_i/dt = sum_j k_V(x_j, x_i) alpha_j; Sec. 3.3: da_k/dt = sum_j k_V(x_j, a_k) alpha_j
        velocity = kernel(x, x[..., :n, :], sigma) @ alpha                    # (..., n + m, 2)
        # Eq. (7): x_i(t) = x_i(0) + int_0^t (sum_j k_V(x_j, x_i) alpha_j) dt
        x = x + velocity / steps
        trajectory.append(x)
    trajectory = torch.stack(torch.broadcast_tensors(*trajectory), -3)        # (..., steps + 1, n + m, 2)
    return trajectory if extra is None else (trajectory[..., :n, :], trajectory[..., n:, :])


def deform(mean: torch.Tensor, momenta: torch.Tensor, curves: Layout | Mapping[str, Sequence[int]], sigma,
           steps: int = 2, extra: Mapping[str, torch.Tensor] | None = None):
    """`flow` of whole faces: each curve by its own momenta only (Sec. 3.1.2: flow 1 to flow N), all at once.

    Args: mean (..., N, 2), the face to start from; momenta (..., N, 2), or (..., steps, N, 2), one dimension
        more than `mean` (so for B faces one mean is (1, N, 2)); curves, name -> indices, together all N, or
        their layout, which is quicker; sigma, a number or (C,); extra, curve -> (..., m, 2) points that the
        flow of that curve carries.
    Returns: trajectory (..., steps + 1, N, 2); with extra the pair of it and curve -> (..., steps + 1, m, 2).
    Raises: ValueError as `flow` and `Layout` do, and for extra of an unknown curve.
    """
    layout = as_layout(curves, mean)
    if momenta.ndim < 2 or momenta.shape[-2:] != mean.shape[-2:]:
        raise ValueError(f"momenta have the shape {tuple(momenta.shape)}, wanted (..., {layout.points}, 2)")
    if unknown := sorted(set(extra or ()) - set(layout.names)):
        raise ValueError(f"extra points of {', '.join(unknown)}: no such curve; wanted one of "
                         f"{', '.join(layout.names)}")
    points, alpha = layout.gather(mean), layout.gather_momenta(momenta, momenta.ndim > mean.ndim)
    if not extra:
        moved = layout.scatter(flow(points, alpha, sigma, steps).movedim(-4, -3))
        return moved if extra is None else (moved, {})
    moved, carried = flow(points, alpha, sigma, steps, layout.gather_extra(extra, mean))
    ends = {name: carried[..., layout.names.index(name), :, :own.shape[-2], :] for name, own in extra.items()}
    return layout.scatter(moved.movedim(-4, -3)), ends


@full_precision
def jacobian(points: torch.Tensor, momenta: torch.Tensor, sigma, steps: int,
             at: torch.Tensor) -> torch.Tensor:
    """Derivative of the flow's end by its start, at the points `at` (..., m, 2): (..., m, 2, 2), in rows the
    gradients of x and y. Other arguments and errors are those of `flow`. A negative determinant is a fold.
    Source: the Euler steps of `flow`, differentiated (DetJ of Sec. 4.1; no code is published)."""
    x, y = flow(points, momenta, sigma, steps, at)
    sigma, per_step = _sigma(sigma, x), momenta.ndim == points.ndim + 1
    D = torch.eye(2, dtype=x.dtype, device=x.device)
    for step in range(steps):
        alpha = (momenta[..., step, :, :] if per_step else momenta).to(x) / sigma
        carrier, point = x[..., step, :, :] / sigma, y[..., step, :, :] / sigma  # D has no unit: sigma as one
        away = point[..., :, None, :] - carrier[..., None, :, :]              # (..., m, n, 2)
        # Sec. 4.1: dv^a/dy^b = sum_j alpha_j^a k_V(x_j, y) (-2 (y - x_j)^b / sigma^2)
        slope = -2 * kernel(point, carrier, 1)[..., None] * away              # (..., m, n, 2)
        Dv = alpha.mT[..., None, :, :] @ slope                                # (..., m, 2, 2)
        # The chain rule for a step of Eq. (7): D <- (I + Dv dt) D
        D = D + Dv @ D / steps
    return D


# ---- Loss: Sec. 3.2 ------------------------------------------------------------------------------

# Eq. (2): gamma is 0 (Sec. 3.2), so that its energy of the flow does not appear: D of Eq. (3) is all.

def inner(a: torch.Tensor, b: torch.Tensor, sigma) -> torch.Tensor:
    """Inner product in W* of two curves, (..., n, 2) and (..., m, 2): (...,). With a = b it is the right side
    of Eq. (1), which is the square of the norm on the left. sigma: number or (..., 1, 1)."""
    # c_i = (x_i + x_{i+1}) / 2, tau_i = x_{i+1} - x_i: n - 1 of n points, as all curves are open (code too)
    c_a, c_b = ((x[..., 1:, :] + x[..., :-1, :]) / 2 for x in (a, b))
    tau_a, tau_b = a.diff(dim=-2), b.diff(dim=-2)                             # (..., n - 1, 2)
    # Eq. (1): <mu_a, mu_b> = sum_i sum_j k_W(c_a,i, c_b,j) tau_a,i . tau_b,j
    return (kernel(c_a, c_b, sigma) @ tau_b * tau_a).sum((-2, -1))


@full_precision
def curve_discrepancy(a: torch.Tensor, b: torch.Tensor, sigma, squared: bool = False) -> torch.Tensor:
    """D_C of curves a, b (..., n, 2), as many points on both: (...,) in their unit, or its square. sigma:
    sigma_W, a number or (...,). A closed curve repeats its first point; one point alone has D_C = 0.
    Raises: ValueError for sigma <= 0 or shapes that do not match."""
    if a.shape[-2:] != b.shape[-2:] or a.shape[-1] != 2:
        raise ValueError(f"curves have the shapes {tuple(a.shape)} and {tuple(b.shape)}, wanted (..., n, 2) "
                         "for both")
    sigma = _sigma(sigma, a)
    # Eq. (4): D_C = || sum_i tau_z,i delta_c_z,i - sum_i tau_y,i delta_c_y,i ||_W*
    square = (inner(a, a, sigma) - 2 * inner(a, b, sigma) + inner(b, b, sigma)).clamp(min=0)
    if squared:
        return square
    # A bare root has no gradient at a = b. eps goes with sigma, so that D_C scales with the face. It lowers
    # D_C by less than eps, and a D_C of 0 not at all.
    eps = 1e-4 * sigma[..., 0, 0]
    return (square + eps ** 2) ** 0.5 - eps


@full_precision
def landmark_discrepancy(a: torch.Tensor, b: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """D_l of points a, b (..., n, 2): (...,). With `real` (..., n) bool, of those points alone."""
    distance = (a - b).norm(dim=-1)                                           # (..., n)
    # Eq. (5): D_l = 1/n sum_i |z_i - y_i|, not squared
    return distance.mean(-1) if real is None else (distance * real).sum(-1) / real.sum(-1)


@full_precision
def lddmm_loss(pred: torch.Tensor, target: torch.Tensor, curves: Layout | Mapping[str, Sequence[int]],
               sigma: torch.Tensor, d: torch.Tensor, beta: float = 0.1,
               squared: bool = False) -> torch.Tensor:
    """The loss, a scalar: mean over faces of the discrepancies of all curves, by the distance of the pupils.

    Args: pred, target (B, N, 2) px; curves, name -> indices, or their layout; sigma (C,), sigma_V of
        `curve_scale`; d (B,), d_ipd px of the target; beta, weight of the curves; squared, the code's form,
        which keeps its px: there the balance of both terms depends on the size of the frame.
    Raises: ValueError for shapes that do not match, sigma <= 0 and curves as `Layout` does.
    """
    if pred.ndim != 3 or pred.shape != target.shape or pred.shape[-1] != 2 or d.shape != pred.shape[:1]:
        raise ValueError(f"pred, target and d have the shapes {tuple(pred.shape)}, {tuple(target.shape)} and "
                         f"{tuple(d.shape)}, wanted (B, N, 2), (B, N, 2) and (B,)")
    layout = as_layout(curves, pred)
    if sigma.shape != (len(layout.names),):
        raise ValueError(f"sigma has the shape {tuple(sigma.shape)}, wanted ({len(layout.names)},)")
    z, y = layout.gather(pred), layout.gather(target)                         # (B, C, P, 2)
    # Sec. 4: sigma_W is half of sigma_V
    D_C = curve_discrepancy(z, y, sigma / 2, squared)                         # (B, C)
    # Eq. (3): D = beta D_C + D_l of each curve, here summed over them (code: both over the number of points)
    D = (beta * D_C + landmark_discrepancy(z, y, layout.real)).sum(-1) if not squared else \
        beta * D_C.sum(-1) / layout.points + landmark_discrepancy(pred, target)             # (B,)
    # Eq. (8): sum_p (beta D_pC + D_pl) / d_ipd
    return (D / d).mean()


# ---- Network: Fig. 1 -----------------------------------------------------------------------------

FRAME = 256  # momenta, mean face and flow are in px of a crop of this side, whatever --size is


def to_frame(points, size: int):
    """Px of a size x size crop -> px of a 256 px crop of the same face, elementwise."""
    return (points + 0.5) * (FRAME / size) - 0.5


def from_frame(points, size: int):
    """The inverse of `to_frame`."""
    return (points + 0.5) * (size / FRAME) - 0.5


class Answer(NamedTuple):
    """What a network says about B images, in px of a 256 px crop; a heatmap network gives its maps alone."""
    stages: list[torch.Tensor]          # (B, K, 2) the carriers where each stage leaves them; the last counts
    momenta: torch.Tensor | None        # (B, [steps,] K, 2) of the last stage, None of --method coord
    start: torch.Tensor | None          # (B or 1, K, 2) where its flow begins
    extra: dict[str, torch.Tensor]      # curve -> (B, m, 2) points carried along
    heatmaps: torch.Tensor | None       # (B, K, size / 4, size / 4) of --method heatmap


class LDDMMFace(nn.Module):
    """Images (B, 3, size, size), normalised -> `Answer`: backbone, momentum estimator, deformation layer.

    Args: backbone, a name of BACKBONES or "dan"; scheme, P, the points of the annotation; mean (P, 2), its
        mean face in px of a 256 px crop; points, which landmarks carry momenta, as `carriers` takes them;
        steps of the flow; sigma_factor, sigma_V over a curve's scale; per_step, momenta for each step;
        method, "lddmm", "coord" (the head's output is added to the mean face, no flow) or "heatmap"; size of
        the images in px, a multiple of 32 (hourglass: 64).
    Raises: ValueError for what cannot be built, and in `forward` for images of another size.
    """

    def __init__(self, backbone: str, scheme: int, mean: torch.Tensor, points=100, steps: int = 2,
                 sigma_factor: float = 1.0, per_step: bool = False, method: str = "lddmm", size: int = 256):
        super().__init__()
        if backbone not in (*BACKBONES, "dan"):
            raise ValueError(f"backbone {backbone!r}: expected one of {', '.join((*BACKBONES, 'dan'))}")
        if method not in METHODS or mean.shape != (scheme, 2):
            raise ValueError(f"method {method!r}, mean face {tuple(mean.shape)}: expected one of "
                             f"{', '.join(METHODS)}, and ({scheme}, 2)")
        if size < 1 or size % STRIDES.get(backbone, 32):
            raise ValueError(f"size {size}: expected a multiple of {STRIDES.get(backbone, 32)}")
        self.carriers = carriers(scheme, points)
        self.steps, self.per_step = steps, per_step and method == "lddmm"
        self.method, self.size = method, size
        self.layout, count = Layout(self.carriers.curves), len(self.carriers.ids)
        self.register_buffer("mean", mean.float())
        scale = curve_scale(mean.float()[self.carriers.ids], self.layout)
        self.register_buffer("sigma", sigma_factor * scale)                                 # (C,) sigma_V
        self.register_buffer("between", interpolation(self.carriers), persistent=False)
        self.register_buffer("ids", torch.tensor(self.carriers.ids), persistent=False)
        pupils = torch.zeros(scheme, 2)
        for side, group in enumerate(datasets.SCHEMES[scheme].pupils):
            pupils[list(group), side] = 1 / len(group)
        self.register_buffer("pupils", pupils, persistent=False)        # (P, 2) weights of both pupils
        if method == "heatmap":
            self.backbone = HRNetHeatmaps(count)
            return
        stages = [DANStage(3, size), DANStage(5, size)] if backbone == "dan" else \
            [BACKBONES[backbone](count, size)]
        self.connection = DANConnection() if backbone == "dan" else None
        self.backbone, momenta = nn.ModuleList(stages), 2 * count * (steps if self.per_step else 1)
        self.estimators = nn.ModuleList(nn.Linear(stage.channels, momenta) for stage in stages)  # Sec. 3

    @property
    def start(self) -> torch.Tensor:
        """The carriers in the mean face, (1, K, 2)."""
        return self.mean[None, self.ids]

    def move(self, output: torch.Tensor, start: torch.Tensor, extra: Mapping[str, torch.Tensor]):
        """The estimator's output (B, ...), the carriers and the points with them (B or 1, ..., 2) -> momenta,
        the carriers at their places (B, K, 2), and the points at theirs."""
        output = output.float().unflatten(1, (self.steps, -1, 2) if self.per_step else (-1, 2))
        if self.method == "coord":  # nothing flows: the extra points stay
            return None, start + output, dict(extra)
        moved, carried = deform(start, output, self.layout, self.sigma, self.steps, extra)
        return output, moved[:, -1], {name: path[..., -1, :, :] for name, path in carried.items()}

    def forward(self, image, extra: Mapping[str, torch.Tensor] | None = None) -> Answer:
        """extra: curve -> (m, 2) points on or about that curve in the mean face, to be carried along."""
        size = self.size
        if image.shape[1:] != (3, size, size):
            raise ValueError(f"images have the shape {tuple(image.shape)}: expected (B, 3, {size}, {size})")
        if self.method == "heatmap":
            return Answer([], None, None, {}, self.backbone(image))
        extra = {name: points[None] for name, points in (extra or {}).items()}
        start, features = self.start, self.backbone[0](image)
        momenta, points, extra = self.move(self.estimators[0](features), start, extra)
        if not self.connection:
            return Answer([points], momenta, start, extra, None)
        # DAN: the second stage sees the image turned and scaled so that the first answer is on the mean face
        with torch.autocast(image.device.type, enabled=False):
            seen, theta, there = self.connection(image.float(), from_frame(points, size), features.float(),
                                                 from_frame(start[0], size))
        follow = lambda m, p: to_frame(warp.apply_affine(m, from_frame(p, size)), size)
        start = to_frame(there, size)
        moved = {name: follow(theta, own.expand(len(image), -1, -1)) for name, own in extra.items()}
        momenta, second, moved = self.move(self.estimators[1](self.backbone[1](seen)), start, moved)
        moved = {name: follow(warp.invert(theta), own) for name, own in moved.items()}
        return Answer([points, follow(warp.invert(theta), second)], momenta, start, moved, None)


def interpolation(chosen: Carriers) -> torch.Tensor:
    """The honest baseline of Sec. 4.2: weights (P, K) by which the carriers' displacements are interpolated
    between neighbours along each curve, and held beyond its outermost carriers; a pupil's: its eye's mean."""
    weights, unit = torch.zeros(chosen.scheme, len(chosen.ids)), torch.eye(len(chosen.ids))
    table = datasets.SCHEMES[chosen.scheme].curves
    for name, places in chosen.curves.items():
        along = {index: k for k, index in enumerate(table[name])}
        # A mouth corner that the table counts to the other lip ends this one.
        at = [along.get(chosen.ids[p], -1 if p == places[0] else len(along)) for p in places]
        rows = [np.interp(range(len(along)), at, row) for row in np.eye(len(at))]
        weights[torch.tensor(table[name])[:, None], torch.tensor(places)] = \
            torch.tensor(np.stack(rows, 1)).float()
        pupil = [index for index in chosen.extras.get(name, ()) if index not in along]
        weights[pupil] = unit[places].mean(0)
    weights[chosen.ids] = unit[[chosen.place[index] for index in chosen.ids]]  # a carrier is where it is
    return weights


class Template(NamedTuple):
    """An annotation's mean face in the frame of a network's: the points that its flows carry."""
    points: dict[str, torch.Tensor]     # training curve -> (m, 2) px of a 256 px crop
    place: list[int]                    # (P,) of each landmark in the carriers and, behind them, these points


def make_template(net: LDDMMFace, mean: torch.Tensor | None = None) -> Template:
    """What a network's flows are to carry besides its carriers: without `mean`, the other landmarks of its
    own annotation (sparse-to-dense, Sec. 4.2); with it, all of another one (cross-annotation, Sec. 3.4, 4.3).

    The other mean face (P, 2) is brought onto the network's by the affine map that fits their shared anchors
    best. A point then goes with the curve of its own curve's name; where there is none (a nose of one curve,
    pupils), with that of the nearest carrier in the same part of the face.
    Raises: ValueError for a baseline, an annotation without curves, or fewer than 3 anchors.
    """
    chosen, own = net.carriers, datasets.SCHEMES[net.carriers.scheme]
    if mean is None:
        return Template({name: net.mean[ids] for name, ids in chosen.extras.items()}, chosen.place)
    if net.method != "lddmm":
        raise ValueError(f"--method {net.method} knows its own {chosen.scheme} points alone: only a flow "
                         "carries others along")
    if len(mean) not in ANNOTATIONS:
        raise ValueError(f"{len(mean)} points are no annotation with curves: {ANNOTATIONS}")
    other = datasets.SCHEMES[len(mean)]
    names = [name for name in other.anchors if name in own.anchors and not name.startswith("contour_end")]
    if len(names) < 3:
        raise ValueError(f"{len(mean)} and {chosen.scheme} points share {len(names)} anchors, wanted 3")
    groups = [datasets.group_means(face, [scheme.anchors[name] for name in names])
              for face, scheme in ((mean.to(net.mean), other), (net.mean, own))]
    placed = warp.apply_affine(warp.fit_affine(*groups), mean.to(net.mean))                  # (P, 2)
    distance = (placed[:, None] - net.start).norm(dim=2).tolist()                            # (P, K)
    curve_of, part_of, carried = ({index: name for name, ids in table.items() for index in ids}
                                  for table in (chosen.curves, own.parts, other.curves))
    parts, points = {i: part for part, ids in other.parts.items() for i in ids}, {}
    for index, row in enumerate(distance):
        name = carried.get(index)
        if name not in chosen.curves:
            near = [k for k, i in enumerate(chosen.ids) if parts.get(index) in (None, part_of.get(i))]
            name = curve_of[min(near, key=row.__getitem__)]
        points.setdefault(name, []).append(index)
    order = [index for ids in points.values() for index in ids]
    place = {index: len(chosen.ids) + k for k, index in enumerate(order)}
    return Template({name: placed[ids] for name, ids in points.items()}, [place[i] for i in range(len(mean))])


# ---- Data: Appendix ------------------------------------------------------------------------------

ROTATION, ZOOM = 20.0, 0.25  # degrees; of 1
# How far beyond the crop its own corners can come to lie.
REACH = math.sqrt(2) * math.cos(math.radians(45 - ROTATION)) / (1 - ZOOM)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1] over ImageNet


@functools.cache
def constant(values: tuple, device: torch.device) -> torch.Tensor:
    """A float32 tensor, copied to a device once: a copy waits for what the GPU is at."""
    with torch.inference_mode(False):  # else, made in an evaluation, training could not use it
        return torch.tensor(values, device=device)


def augment(rng: np.random.Generator, size: int):
    """Draws rotation, scale and mirror for one face: matrix (2, 3) crop px -> crop px; mirror; {}."""
    angle, zoom = rng.normal(0, 0.5, 2).clip(-1, 1) * [math.radians(ROTATION), ZOOM]
    c, s, middle = (1 + zoom) * math.cos(angle), (1 + zoom) * math.sin(angle), (size - 1) / 2
    matrix = np.array([[c, s, middle - (c + s) * middle], [-s, c, middle - (c - s) * middle]])
    return matrix, rng.random() < 0.5, {}


def prepare(batch: dict, device: torch.device) -> torch.Tensor:
    """Network input (B, 3, H, W), normalised, from a batch; with the square of batch["hidden"] in grey."""
    image = batch["image"].to(device, non_blocking=True)
    if image.dtype == torch.uint8:  # (B, H, W, 3) of the loader; permuted, it is channels_last as it stands
        image = image.permute(0, 3, 1, 2).float()
    if "hidden" in batch:
        x0, y0, x1, y1 = batch["hidden"].to(device)[..., None].unbind(1)                    # (B, 1) each
        y, x = (torch.arange(n, device=device) for n in image.shape[2:])
        inside = ((x >= x0) & (x < x1))[:, None, None] & ((y >= y0) & (y < y1))[:, None, :, None]
        image = image.masked_fill(inside, datasets.BORDER)
    mean, std = (255 * constant(values, device)[:, None, None] for values in (MEAN, STD))
    return ((image - mean) / std).contiguous(memory_format=torch.channels_last)


def read_faces(args, split: str) -> list:
    """The faces of args.data: drawn ones, or those of a set on disk whose files have been looked at."""
    if args.data == "faces":
        count = args.limit or DRAWN["train"]
        count = count if split == "train" else min(count, DRAWN["test"])
        return synthetic.read_faces(split, count, args.size, args.points)  # the same set whatever --seed is
    faces = datasets.read(args.data, args.data_root, split)[:args.limit or None]
    datasets.check_images(faces)
    return faces


def make_dataset(args, faces, augmented: bool) -> datasets.CropDataset:
    """Faces as crops by --box, --margin and --size, with this paper's augmentation or without."""
    frames = datasets.square_frames(datasets.face_boxes(faces, args.box), args.size, args.margin)
    if not augmented:
        return datasets.CropDataset(faces, frames, args.size)
    flip = datasets.SCHEMES[len(faces[0].points)].flip
    return datasets.CropDataset(faces, frames, args.size, augment, REACH, 1 + ZOOM, flip, args.seed)


def mean_face(args, data: datasets.CropDataset) -> torch.Tensor:
    """The mean of a set's landmarks in their crops, (P, 2) float32 px of a 256 px crop."""
    return to_frame(data.crop_points().mean(0), args.size)


def loss_of(net: LDDMMFace, answer: Answer, points: torch.Tensor, args) -> torch.Tensor:
    """The loss of a batch, a scalar; points (B, P, 2) px of the crop. DAN's stages weigh 0.3 and 0.7 (code).
    Baselines: Eq. (5) alone for coordinates, squared error against Gaussians of sigma 1 px for heatmaps."""
    if net.method == "heatmap":
        height, width = answer.heatmaps.shape[2:]
        centre = (points[:, net.ids] + 0.5) * (width / net.size) - 0.5              # (B, K, 2)
        x, y = (torch.arange(n, device=points.device) for n in (width, height))
        row, column = (-(x - centre[..., :1])**2 / 2).exp(), (-(y - centre[..., 1:])**2 / 2).exp()
        return (answer.heatmaps.float() - column[..., :, None] * row[..., None, :]).square().mean()
    points = to_frame(points, net.size)
    pupils = points.mT @ net.pupils                                                         # (B, 2 xy, 2)
    d, target = (pupils[..., 0] - pupils[..., 1]).norm(dim=1), points[:, net.ids]
    if net.method == "coord":
        losses = [(landmark_discrepancy(pred, target) / d).mean() for pred in answer.stages]
    else:
        losses = [lddmm_loss(pred, target, net.layout, net.sigma, d, args.beta, args.squared)
                  for pred in answer.stages]
    return losses[0] if len(losses) == 1 else 0.3 * losses[0] + 0.7 * losses[1]


# ---- Evaluation: Sec. 4 --------------------------------------------------------------------------

def peaks(heatmaps: torch.Tensor) -> torch.Tensor:
    """The highest px of each map (B, K, h, w), and a quarter px towards the larger neighbour: (B, K, 2)."""
    width = heatmaps.shape[3]
    best = heatmaps.flatten(2).argmax(2)                                                    # (B, K)
    x, y = best % width, best // width
    around = F.pad(heatmaps, (1, 1, 1, 1)).flatten(2)
    value = lambda dx, dy: around.gather(2, ((y + 1 + dy) * (width + 2) + x + 1 + dx)[..., None])[..., 0]
    shift = torch.stack([value(1, 0) - value(-1, 0), value(0, 1) - value(0, -1)], -1).sign() / 4
    return torch.stack([x, y], -1) + shift


@torch.inference_mode()
def predict_points(net: LDDMMFace, image: torch.Tensor, template: Template):
    """Landmarks (B, P, 2) px of prepared crops, the carriers (B, K, 2), and the network's answer.
    A baseline, which carries nothing along, gives its annotation's other landmarks by `interpolation`."""
    answer = net(image, template.points if net.method == "lddmm" else None)
    if net.method == "lddmm":
        carried = answer.stages[-1]
        points = torch.cat([carried, *(answer.extra[name] for name in template.points)], 1)[:, template.place]
    else:
        carried = answer.stages[-1] if answer.heatmaps is None else \
            to_frame((peaks(answer.heatmaps.float()) + 0.5) * 4 - 0.5, net.size)
        with torch.autocast(image.device.type, enabled=False):
            points = net.mean + net.between @ (carried - net.start)
    return from_frame(points, net.size), from_frame(carried, net.size), answer


def derivatives(net: LDDMMFace, answer: Answer, template: Template) -> torch.Tensor:
    """Of the flow, at each landmark of the network's own `template`: (B, P, 2, 2). Not for DAN."""
    layout, count = net.layout, net.layout.padded.shape[1]
    start, momenta = layout.gather(answer.start), layout.gather_momenta(answer.momenta, net.per_step)
    extra = layout.gather_extra(template.points, net.mean).expand(len(start), -1, -1, -1)    # (B, C, M, 2)
    at = torch.cat([start, extra], 2)
    D = jacobian(start, momenta, net.sigma, net.steps, at).flatten(3)                        # (B, C, ., 4)
    extra = [D[:, layout.names.index(name), count:][:, :len(own)] for name, own in template.points.items()]
    return torch.cat([layout.scatter(D[:, :, :count]), *extra], 1)[:, template.place].unflatten(2, (2, 2))


def predict_set(net: LDDMMFace, loader, args, template: Template, hidden: float = 0.0):
    """Landmarks (M, P, 2) and carriers (M, K, 2) px of the images, float64, and the derivatives of the flow
    at each landmark (M, P, 2, 2), or None. hidden: share of the crop behind a grey square about a landmark.
    """
    net.eval()
    device, data, rows = net.mean.device, loader.dataset, []
    own = net.method == "lddmm" and len(template.place) == net.carriers.scheme and not net.connection
    for batch in loader:
        if hidden:
            index, half = batch["index"], math.sqrt(hidden) * args.size / 2
            centre = batch["points"][torch.arange(len(index)), (7 * index) % batch["points"].shape[1]]
            centre = centre.clamp(half - 0.5, args.size - 0.5 - half)
            batch["hidden"] = torch.cat([centre - half, centre + half], 1)
        image = prepare(batch, device)
        with precision(args, device):
            points, carried, answer = predict_points(net, image, template)
        D = derivatives(net, answer, template).cpu().double() if own else None
        rows.append((points.cpu().double(), carried.cpu().double(), D))
    points, carried = (torch.cat(column) for column in list(zip(*rows))[:2])
    back = warp.invert(data.frames)
    derivative = torch.cat([D for _, _, D in rows]) if own else None
    return warp.apply_affine(back, points), warp.apply_affine(back, carried), derivative


def landmark_scores(errors: torch.Tensor, faces, threshold: float) -> dict:
    """NME_l, FR and AUC of the faces with these errors (M,), and of each subset."""
    scores = {}
    for subset, chosen in datasets.subsets(faces).items():
        end = f"/{subset}" if subset else ""
        scores |= {f"nme{end}": float(errors[chosen].mean()),
                   f"fr{end}": metrics.failure_rate(errors[chosen], threshold),
                   f"auc{end}": metrics.auc(errors[chosen], threshold)}
    return scores


def curve_scores(net: LDDMMFace, points, carried, target, d) -> dict:
    """NME_c, whole and by part, of the landmarks (M, P, 2) and of the carriers (M, K, 2) alone."""
    # A baseline is compared by the points that it has (Tables 2 and 3), each landmark once.
    first = {index: k for k, index in reversed(list(enumerate(net.carriers.ids)))}
    here = {part: [first[index] for index in ids if index in first]
            for part, ids in datasets.SCHEMES[net.carriers.scheme].parts.items()}
    parts = datasets.SCHEMES[target.shape[1]].parts
    alone = metrics.curve_error(carried, target, parts, d, pred_parts=here)
    curves = alone if net.method != "lddmm" else metrics.curve_error(points, target, parts, d)
    scores = {"curves" + ("" if part == "overall" else f"/{part}"): float(error.mean())
              for part, error in curves.items()}
    return scores | {"curves@alone": float(alone["overall"].mean())}


def baseline_scores(net: LDDMMFace, carried, data: datasets.CropDataset, d) -> dict:
    """NME_l, NME_c of the carriers' displacements, interpolated along the curves; NME_l of the mean face."""
    mean, start = (from_frame(points.cpu().double(), data.size) for points in (net.mean, net.start))
    moved = net.between.cpu().double() @ (warp.apply_affine(data.frames, carried) - start)   # (M, P, 2)
    between, still = (warp.apply_affine(warp.invert(data.frames), mean + moved * on) for on in (1, 0))
    curves = metrics.curve_error(between, data.points, datasets.SCHEMES[len(mean)].parts, d)["overall"]
    return {"nme@interpolated": float(metrics.nme(between, data.points, d).mean()),
            "curves@interpolated": float(curves.mean()),
            "nme/mean face": float(metrics.nme(still, data.points, d).mean())}


def evaluate(net: LDDMMFace, loader, args, template: Template | None = None, occlude: bool = False):
    """NME_l, FR, AUC and NME_c in the pixels of the images, over the test set and its subsets, and DetJ.

    Args: loader, in order, of a CropDataset without augmentation; template, of `make_template` where the
        set has another annotation than the network; occlude, score hidden crops too.
    Returns: fractions "nme", "fr", "auc", "nme/pose", ..., "curves" (NME_c) and its parts "curves/contour",
        "curves@alone" of the carriers without what goes with them, "nme@interpolated", "curves@interpolated"
        of the carriers' displacements, "nme/mean face", "detja", "detjn", "detjam" (Table 1), "nme@hidden",
        "fr@hidden" by name; the NME of each face (M,); the landmarks (M, P, 2) px of the images. No DetJ of
        DAN, whose two flows are not one; no NME, but nan, of a baseline in another annotation.
    """
    template = template or make_template(net)
    points, carried, derivative = predict_set(net, loader, args, template)
    data, target = loader.dataset, loader.dataset.points
    d = data.divisors(args.norm)
    # A baseline has no landmarks of another annotation: only its curves can be compared (Table 3).
    errors = metrics.nme(points if points.shape == target.shape else target * math.nan, target, d)
    scores = landmark_scores(errors, data.faces, args.threshold)
    scores |= curve_scores(net, points, carried, target, d)
    if target.shape[1] == net.carriers.scheme:
        scores |= baseline_scores(net, carried, data, d)
    if derivative is not None:
        det = torch.linalg.det(derivative)                                                  # (M, P)
        scores |= {"detja": float(det.mean()), "detjn": int((det <= 0).sum()),
                   "detjam": float(torch.linalg.det(derivative.mean(0)).mean())}
    if occlude:
        hidden = metrics.nme(predict_set(net, loader, args, template, 0.2)[0], target, d)
        scores |= {"nme@hidden": float(hidden.mean()),
                   "fr@hidden": metrics.failure_rate(hidden, args.threshold)}
    return scores, errors, points


def print_table(scores: dict, args, points: int, title: str = ""):
    """The rows of Tables 1, 2 and 9: a column for the full set and each subset; NME_c by part."""
    print(f"{title or args.data}: {points} points, NME by {datasets.norm_kind(args.norm, points)}, FR and "
          f"AUC at {args.threshold:.2f}, crop {args.box} x {args.margin}")
    columns = [key[2:] for key in scores if key == "fr" or key.startswith("fr/")]
    print(" " * 16 + "".join(f"{column[1:] or 'full':>14}" for column in columns))
    for name in ("nme", "fr", "auc"):
        row = "".join(f"{100 * scores[name + column]:>14.2f}" for column in columns)
        print(f"{name.upper() + ' (%)':16}{row}")
    parts = {key[7:] or "overall": scores[key] for key in scores if re.fullmatch("curves(/.*)?", key)}
    print("NME_c (%): " + ", ".join(f"{part} {100 * value:.2f}" for part, value in parts.items()))
    if "nme/mean face" in scores:
        print(f"NME of the mean face: {100 * scores['nme/mean face']:.2f} %; of the carriers' displacements, "
              f"interpolated along the curves: {100 * scores['nme@interpolated']:.2f} %, NME_c "
              f"{100 * scores['curves@interpolated']:.2f} %")
    if "detja" in scores:
        print(f"DetJA {scores['detja']:.4f}, DetJN {scores['detjn']}, DetJAM {scores['detjam']:.4f}")
    if "nme@hidden" in scores:
        print(f"with a fifth of the crop hidden: NME {100 * scores['nme@hidden']:.2f} %, FR "
              f"{100 * scores['fr@hidden']:.2f} %")


# ---- Pictures ------------------------------------------------------------------------------------

GREEN, RED, BLUE, GREY = (60, 220, 60), (240, 50, 50), (70, 120, 255), (200, 200, 200)


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


def draw_dense(net: LDDMMFace, data: datasets.CropDataset, points: torch.Tensor, side=256) -> np.ndarray:
    """Fig. 2B: 12 test faces, landmarks that carry momenta in green, those that go with them in red."""
    own, tiles = points.shape[1] == net.carriers.scheme, []
    known = torch.tensor([own and index in net.carriers.ids for index in range(points.shape[1])])
    for i in np.linspace(0, len(data) - 1, min(12, len(data))).astype(int).tolist():
        crop = cv2.resize(data.__getitems__([(0, i)])["image"][0].numpy(), (side, side))
        places = (warp.apply_affine(data.frames[i], points[i]) + 0.5) * side / data.size - 0.5
        draw_points(crop, places[~known], RED, side / 200)
        tiles.append(draw_points(crop, places[known], GREEN, side / 200))
    return tile(tiles, 4)


@torch.inference_mode()
def draw_flow(net: LDDMMFace, data: datasets.CropDataset, side: int = 384) -> np.ndarray:
    """Fig. 2A, for 6 test faces: the plane bent by the flow of one half of the contour (grey), the mean face
    (red), the paths of all its points (blue) and where they end (green)."""
    tiles, device, names = [], net.mean.device, net.layout.names
    curve = "contour_right" if "contour_right" in names else names[0]
    axis, fine = (torch.linspace(0, FRAME - 1, n, device=device) for n in (25, 97))
    lines = torch.cat([torch.cartesian_prod(axis, fine), torch.cartesian_prod(axis, fine).flip(1)])
    place = lambda p: from_frame(p.float().cpu().numpy(), side)
    for i in np.linspace(0, len(data) - 1, min(6, len(data))).astype(int).tolist():
        batch = data.__getitems__([(0, i)])
        answer = net(prepare(batch, device))
        path, grid = deform(answer.start, answer.momenta, net.layout, net.sigma, net.steps,
                            {curve: lines[None]})
        crop = cv2.resize(batch["image"][0].numpy(), (side, side)) // 2 + 100
        for own, colour in ((grid[curve][0, -1].view(50, 97, 2), GREY), (path[0].transpose(0, 1), BLUE)):
            path_px = np.round(16 * place(own.contiguous())).astype(np.int32)  # 4 bits after the point
            cv2.polylines(crop, list(path_px), False, colour, 1, cv2.LINE_AA, 4)
        draw_points(crop, place(path[0, 0]), RED, side / 250)
        tiles.append(draw_points(crop, place(path[0, -1]), GREEN, side / 250))
    return tile(tiles, 3)


def write_pictures(folder: Path, net: LDDMMFace, data, errors, points, threshold: float, end: str = ""):
    """What the paper's figures show, from this run: dense.png, flow.png, ced.png."""
    write_image(folder / f"dense{end}.png", draw_dense(net, data, points))
    if not end and net.method == "lddmm" and not net.connection:
        write_image(folder / "flow.png", draw_flow(net, data))
    curves = {name or "full": errors[chosen] for name, chosen in datasets.subsets(data.faces).items()}
    write_image(folder / f"ced{end}.png", metrics.ced_plot(curves, threshold))


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
           "weights", "cache", "init", "given", "detector", "as_points"}
DATA = {"data", "data_root", "amp", "limit", "norm", "threshold", "batch_size", "occluder_test", "also"}


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


def trained_points(args) -> int | list[int]:
    """--train-points as `carriers` takes it: one number is a percentage, several are indices."""
    chosen = listed(args.train_points, int)
    return chosen[0] if len(chosen) == 1 else chosen


def build(args, mean: torch.Tensor, device: torch.device) -> LDDMMFace:
    """The network that the flags describe, on `device`."""
    net = LDDMMFace(args.backbone, len(mean), mean, trained_points(args), args.steps, args.sigma_factor,
                    args.per_step_momenta, args.method, args.size)
    return net.to(device, memory_format=torch.channels_last)


def init_backbone(backbone: nn.Module, path: str) -> str:
    """Loads what a torchvision, timm or HRNet state dict and the backbone share by name; says what matched.
    Raises: FileNotFoundError; ValueError when nothing matches, or a shared name has another shape."""
    state = read_tensors(path)
    state = state.get("state_dict", state.get("model", state))
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"--init {path}: expected a dict of tensors, alone or under 'state_dict' or 'model'")
    state = {re.sub(r"^(module\.|backbone\.)+", "", name): value for name, value in state.items()}
    own = backbone.state_dict()
    shared = {name: state[name] for name in own if name in state}
    if not shared:
        raise ValueError(f"--init {path}: none of its {len(state)} names ({', '.join(list(state)[:3])}, ...) "
                         f"is one of the backbone's {len(own)} ({', '.join(list(own)[:3])}, ...)")
    for name, value in shared.items():
        if value.shape != own[name].shape:
            raise ValueError(f"--init {path}: {name} is {tuple(value.shape)}, the backbone's is "
                             f"{tuple(own[name].shape)}")
    backbone.load_state_dict(own | shared)
    some = lambda names: ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") or "none"
    return (f"--init: {len(shared)} of {len(own)} backbone tensors from {path}; "
            f"not in the file: {some([name for name in own if name not in state])}; "
            f"in the file only: {some([name for name in state if name not in own])}")


def load_weights(net: nn.Module, weights: dict, path) -> None:
    """Gives a network a checkpoint's tensors.   Raises: ValueError for a name or shape that does not fit."""
    own, found = ({name: tuple(getattr(value, "shape", ())) for name, value in tensors.items()}
                  for tensors in (net.state_dict(), weights))
    if wrong := [name for name in own | found if own.get(name) != found.get(name)]:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit the network that its flags describe; the "
                         f"first, {wrong[0]}, is {found.get(wrong[0], 'missing')}, expected "
                         f"{own.get(wrong[0], 'none')}; the file was changed, or is of another version")
    net.load_state_dict(weights)


def open_checkpoint(args, path: str, free: set[str]) -> LDDMMFace:
    """A checkpoint's network, in evaluation mode; `args` takes its flags over, but for `free`, the typed ones
    of DATA, and all of DATA where --data names another set."""
    args.gpus, given = 1, set(args.given)
    device = setup(args)[2]
    state = load(path, "lddmm_face")
    other = "data" in given and args.data != state["args"]["data"]
    points = args.points
    restore_args(args, state["args"], MACHINE | free | {"points"} | (DATA if other else DATA & given))
    if "mean" not in state["model"]:
        raise ValueError(f"{path}: its weights have no mean face; the file was changed: train anew")
    net = build(args, state["model"]["mean"], device)
    load_weights(net, state["model"], path)
    args.points = points if "points" in given else len(net.mean)
    return net.eval()


def cross_template(net: LDDMMFace, args, points: int) -> Template | None:
    """For a set of another annotation its mean face, of its training split, in the network's frame."""
    if points == net.carriers.scheme or net.method != "lddmm":
        return None
    return make_template(net, mean_face(args, make_dataset(args, read_faces(args, "train"), False)))


def evaluate_checkpoint(args) -> dict:
    """--eval: the numbers of a checkpoint on the test set of --data, in whose annotation the landmarks are
    given (Sec. 4.3); with --output, the pictures too. Data and crop are those that it was trained with,
    unless --data, --box or --margin are given."""
    net = open_checkpoint(args, args.eval, {"box", "margin"} & set(args.given))
    folder = find_run(args, "lddmm_face")
    data = make_dataset(args, read_faces(args, "test"), augmented=False)
    points = data.points.shape[1]
    if points not in ANNOTATIONS:
        raise ValueError(f"--data {args.data}: {points} points are no annotation with curves: {ANNOTATIONS}")
    data.divisors(args.norm)
    loader = make_loader(args, data, datasets.in_order(len(data), args.batch_size), net.mean.device)
    scores, errors, found = evaluate(net, loader, args, cross_template(net, args, points), args.occluder_test)
    print_table(scores, args, points)
    if folder:
        write_pictures(make_run(args, "lddmm_face", folder), net, data, errors, found, args.threshold)
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


def find_points(net: LDDMMFace, image: np.ndarray, box: np.ndarray, margins: list, args, template: Template):
    """Landmarks (P, 2) px of the face in `box` (4,) or None; a second margin is about those of the first."""
    for margin, wanted in zip(margins, [*[make_template(net)] * (len(margins) - 1), template]):
        frames = torch.from_numpy(datasets.square_frames(box[None], args.size, margin))
        batch = datasets.CropDataset([datasets.Face(image)], frames, args.size).__getitems__([(0, 0)])
        pred = prepare(batch, net.mean.device)
        with precision(args, net.mean.device):
            pred = predict_points(net, pred, wanted)[0].cpu()
        points = warp.apply_affine(warp.invert(frames), pred.double())[0].numpy()
        box = np.concatenate([points.min(0), points.max(0)])
        if not np.ptp(points, 0).max() > 0:  # one place, or not finite
            return None
    return points


def predict(args) -> dict:
    """--predict: for each face writes its landmarks as NAME.pts, in the annotation of --as-points, and for
    each image NAME.png with them drawn.

    The network looks at a face twice: in the box that is given (by --detector, by --box, or the whole image),
    then in the box of its first answer. A further face of an image is NAME.face2.pts and so on. Pixels are
    taken as stored: turn a photo that has an orientation tag. The mean face of another annotation than the
    network's is that of drawn faces.
    Raises: FileNotFoundError for a path without images; ValueError for two images of one name, or one that
        cannot be read; FileExistsError where a result would be written over a file."""
    net = open_checkpoint(args, args.weights, DATA | {"box"} | ({"margin"} & set(args.given)))
    detector = open_detector(args.detector) if args.detector else None
    found = datasets.image_paths(args.predict)  # {name: path}
    datasets.check_images([datasets.Face(path) for path in found.values()])
    template = make_template(net)
    if args.as_points not in (0, net.carriers.scheme):
        box = argparse.Namespace(**{**vars(args), "box": "landmarks"})
        drawn = make_dataset(box, synthetic.read_faces("train", 400, args.size, args.as_points), False)
        template = make_template(net, mean_face(args, drawn))
    args.data = "predict"
    folder, faceless = find_run(args, "lddmm_face"), []
    for target in (folder / f"{name}{end}" for name in found for end in (".pts", ".png")) if folder else ():
        if target.exists():
            raise FileExistsError(f"--output {folder}: {target} exists already; name another folder")
    folder = make_run(args, "lddmm_face", folder)
    margins = [args.margin] * 2
    if not detector and args.box in BOXES:
        margins[0] = 1.0  # the whole image has its margin in it
    for name, path in tqdm(found.items(), "predict"):
        image = datasets.load_image(path)
        picture, count = image.copy(), 0
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for box in find_boxes(args, image, detector):
            points = find_points(net, image, box, margins, args, template)
            if points is not None:
                count += 1
                datasets.write_pts(folder / f"{name}{f'.face{count}' if count > 1 else ''}.pts", points)
                draw_points(picture, points, GREEN, max(1.0, float(np.ptp(points, 0).max()) / 120))
        write_image(folder / f"{name}.png", picture)
        faceless += [] if count else [path]
    print(f"{len(found) - len(faceless)} images with landmarks in {folder}" +
          (f"; no face found in {len(faceless)}, the first is {faceless[0]}: try --box" if faceless else ""))
    return {}


# ---- Training ------------------------------------------------------------------------------------

def learning_rate(step: int, steps: int, base: float, drop_at: Sequence[float]) -> float:
    """Appendix: halved after each of the parts `drop_at` of the run."""
    return base * 0.5 ** sum(step >= part * steps for part in drop_at)


def summary(row: dict) -> str:
    """A log's row as a line to read, without the subsets."""
    percent = ("nme", "fr", "auc", "curves")
    return ", ".join(f"{key} {100 * value:.2f} %" if key in percent else f"{key} {value:.4g}"
                     for key, value in row.items() if key.isidentifier())


def load_sets(args, rank: int) -> tuple[datasets.CropDataset, datasets.CropDataset]:
    """The training set, augmented, and the test set; what can be wrong with them is found here."""
    train, test = read_faces(args, "train"), read_faces(args, "test")
    points = len(train[0].points)
    if len(test[0].points) != points:
        raise ValueError(f"training faces have {points} landmarks, test faces {len(test[0].points)}")
    used = len(set(carriers(points, trained_points(args)).ids))  # or its error
    train_set, test_set = make_dataset(args, train, True), make_dataset(args, test, False)
    test_set.divisors(args.norm)
    for other in listed(args.also, int):  # its errors now, not after the training
        drawn = synthetic.read_faces("test", 2, args.size, other)
        make_dataset(args, drawn, False).divisors(args.norm)
    if rank == 0:
        print(f"{len(train_set)} training faces, {len(test_set)} test faces, {points} landmarks, trained on "
              f"{used} of them ({used / points:.0%})")
    return train_set, test_set


def make_model(args, train_set, state: dict | None, device: torch.device, rank: int):
    """The network and its optimizer: new, the same on every rank, or as a checkpoint's `state` has them."""
    seed_all(args.seed)
    faces = [len(train_set), train_set.points.shape[1]]
    if state and state["faces"] != faces:
        raise ValueError(f"--resume: {faces[0]} training faces of {faces[1]} landmarks, the run was started "
                         f"on {state['faces'][0]} of {state['faces'][1]}; see --data-root")
    net = build(args, mean_face(args, train_set), device)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay)
    report = (f"{args.backbone}, {args.method}: {sum(p.numel() for p in net.parameters()):,} parameters, "
              f"{len(net.layout.names)} curves, {device.type}")
    if state:
        load_weights(net, state["model"], Path(args.output, "last.pt"))
        optimizer.load_state_dict(state["optimizer"])
    elif args.init:
        first = net.backbone if args.method == "heatmap" else net.backbone[0]
        report += "\n" + init_backbone(first, args.init)
    if rank == 0:
        print(report)
    return net, optimizer


def evaluate_also(net: LDDMMFace, args, folder: Path, scores: dict) -> dict:
    """--also: `scores`, and those of the drawn test faces in other annotations, as "nme@194", ..., which go
    into the log once more."""
    for points in listed(args.also, int):
        other = argparse.Namespace(**{**vars(args), "points": points})
        data = make_dataset(other, read_faces(other, "test"), False)
        loader = make_loader(other, data, datasets.in_order(len(data), 64), net.mean.device)
        found, errors, pred = evaluate(net, loader, other, cross_template(net, other, points))
        print_table(found, other, points, f"{net.carriers.scheme} points learned, predicted")
        write_pictures(folder, net, data, errors, pred, args.threshold, f"-{points}")
        scores = scores | {f"{key}@{points}": value for key, value in found.items()}
    log = folder / "log.jsonl"
    if args.also and not scores.keys() <= json.loads(log.read_text().splitlines()[-1]).keys():
        write_log(log, epoch=args.epochs, **scores)
    return scores


def train(args) -> dict:
    """Trains, evaluates or predicts, as the flags say; returns the numbers of the last evaluation."""
    if args.eval or args.predict:
        return evaluate_checkpoint(args) if args.eval else predict(args)
    # Set-up
    rank, world, device = setup(args)
    folder = find_run(args, "lddmm_face")
    state = load(folder / "last.pt", "lddmm_face") if args.resume else None
    if state:
        restore_args(args, state["args"], MACHINE | ({"data_root"} & set(args.given)))
    # Data and network
    train_set, test_set = load_sets(args, rank)
    net, optimizer = make_model(args, train_set, state, device, rank)
    model, drop_at = torch.compile(net) if args.compile else net, listed(args.drop_at, float)
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    batches = datasets.EpochBatches(len(train_set), args.batch_size, args.seed, rank, world)
    loader = make_loader(args, train_set, batches, device, everywhere=True)
    steps, start, scores, began = len(batches), state["epoch"] if state else 0, {}, time.time()
    if rank == 0:  # only the first process evaluates and writes
        folder = make_run(args, "lddmm_face", folder)
        print(f"run: {folder}, processes: {world}, epochs done: {start} of {args.epochs}", flush=True)
        if state and state["world"] != world:
            print(f"the run had {state['world']} processes: batch norms now see other shares, numbers change")
        cut_log(folder / "log.jsonl", start)
        test_loader = make_loader(args, test_set, datasets.in_order(len(test_set), 64), device)
    del state
    bar = tqdm(total=args.epochs * steps, initial=start * steps, disable=rank > 0,
               mininterval=1 if sys.stderr.isatty() else 30)
    for epoch in range(start, args.epochs):
        # One pass over the training set
        seed_all(args.seed, epoch + 1, rank)
        batches.epoch, epoch_began, losses = epoch, time.time(), torch.zeros(steps, device=device)
        net.train()
        for step, batch in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * steps + step, args.epochs * steps, args.lr, drop_at)
            image = prepare(batch, device)
            with precision(args, device):
                answer = model(image)
            loss = loss_of(net, answer, batch["points"].to(device, non_blocking=True), args)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
            if step % 20 == 0:  # the only reading of the loss: it waits for the GPU
                check_losses(losses, epoch + 1)
                bar.set_postfix(epoch=epoch + 1, loss=f"{losses[step].item():.3f}", refresh=False)
            bar.update()
        if world > 1:
            dist.all_reduce(losses, dist.ReduceOp.SUM)
        check_losses(losses, epoch + 1)
        check_weights(net, epoch + 1)
        # Evaluation, log and checkpoint
        if rank == 0:
            row = dict(epoch=epoch + 1, loss=float(losses.mean()) / world, lr=optimizer.param_groups[0]["lr"],
                       images_per_second=steps * args.batch_size / (time.time() - epoch_began),
                       gpu_gb=torch.cuda.max_memory_allocated() / 1e9)
            last = epoch + 1 == args.epochs
            if last or (epoch + 1) % args.eval_every == 0:
                scores, errors, found = evaluate(net, test_loader, args, None, last and args.occluder_test)
                row |= scores
            row["minutes"] = (time.time() - began) / 60
            bar.write(summary(row))
            write_log(folder / "log.jsonl", **row)
            save(folder / "last.pt", script="lddmm_face", model=net.state_dict(),
                 optimizer=optimizer.state_dict(), epoch=epoch + 1, args=vars(args), world=world,
                 faces=[len(train_set), len(net.mean)])
    bar.close()
    # Table and pictures
    if rank == 0:
        if start >= args.epochs:  # it was killed after its last checkpoint
            scores, errors, found = evaluate(net, test_loader, args, None, args.occluder_test)
        print_table(scores, args, len(net.mean))
        write_pictures(folder, net, test_set, errors, found, args.threshold)
        scores = evaluate_also(net, args, folder, scores)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return scores


if __name__ == "__main__":
    run(train, parse_args())
