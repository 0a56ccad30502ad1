"""Sub-pixel face landmarks using heatmaps and a bag of tricks.

Samuel W. F. Earp, Aubin Samacoits, Sanjana Jain, Pavit Noinongyao, Siwa Boonpunmongkol (Sertis Vision Lab);
2021. https://arxiv.org/abs/2103.03059

The method. Five rough landmarks of a detector (eyes, nose tip, mouth corners) turn, scale and shift the face
into one place of a 192 px crop; the network then sees faces that hardly move. A MobileNetV2 ends in a 6 x 6
map. A string of letters enlarges it, each letter a block that doubles its side: S, pixel shuffle, is cheap
and stands where the map is small, D, deconvolution, where the answer is made. The result is one heatmap for
each landmark, trained to be a Gaussian about it. Its centre is read off between the pixels: a Gaussian's
logarithm is a parabola, whose top one Newton step finds. The answer goes back to the image through the
inverse of the alignment. Tricks: mirrored copies of the training set, the mean of the answers for the image
and its mirror image, random erasing late in the training, and rotation.

Where each equation is:
  Eq. (1)  argmax of a heatmap       decode_argmax
  Eq. (2)  shift along the gradient  decode_shift
  Eq. (3)  Gaussian, its centre      gaussian_heatmaps, decode_dark
  Eq. (4)  NME                       common.metrics.nme

There is no code by the authors. They used GluonCV, whose pose networks and training script fill the gaps
("GluonCV" below): every size in the paper's tables but DDSS's is then met within 0.01 MB, every GFLOPS but
ResNet18's within 1 %.
Differs from the paper, or settles what it leaves open:
  - Architecture: as GluonCV. A 1x1 convolution without batch norm brings the backbone's map to 256 channels;
    a D is 4x4, an S 3x3 before its shuffle; S hands on a quarter of its filters. Heatmaps come from a 1x1
    convolution behind the last block: the paper's words put it before, its own sizes exclude that. Three
    letters give 48 x 48 maps, four give 96 x 96. MobileNetV2 widths are cut to whole numbers, not to
    multiples of 8, and its first block does not widen.
  - Misprints of the tables: DDSS has 13.00 MB, not 12.00; "SDDSD" in Table 4 is SDSD. ResNet18's 1.13 GFLOPS
    is not explained: that backbone alone has 1.33 G multiply-adds at 192 px, with SDD 1.54.
  - The loss is not named. Here the squared error of a map's pixels, summed, over that of an empty map, so
    that 1 means "nothing learned". The Gaussians have height 1 and sigma 2 px of the heatmap (GluonCV), their
    centres are not rounded (DARK; GluonCV rounds, which costs up to half a heatmap px). A landmark whose
    3-sigma box misses the map has no weight. Weights start as in GluonCV: Kaiming, the head N(0, 0.001).
  - Eq. (2) as its source (Xiao et al.) computes it: a quarter of a px towards the larger neighbour in x and
    in y, not c times the mixed derivative that is printed. Eq. (3) as its source (Zhang et al., DARK) does,
    blur, step-2 differences and all; but a step is cut at 1 px, where theirs may leave the map.
  - "Affine": a similarity, as for recognition; with all six numbers a profile face is sheared. The reference
    landmarks are not given: LaPa's mean face, 0.64 of the crop wide, which left 0.1 % of the 68 points of
    3,462 video frames outside. Grey 127 outside the image. Pixel centres are whole numbers in crop and
    heatmap, x_h = (x + 0.5) / s - 0.5.
  - The five points come from --five FILE (a detector's), of several faces those nearest to the annotated
    face (paper: the centre-most). Without it training and test crops are placed by the true points with
    Gaussian noise of 3 % of the face's scale, one draw for each face: a stand-in for a detector.
    --align two-pass and box, for those who have only a box, are not the paper's.
  - Random erasing: in the second half of the run, as the paper's [AID] erases in a second stage; half of
    the images, 2 to 15 % of the area, filled with the mean colour. Rotation: up to 15 degrees; the paper
    tried 1 to 15 and does not say which it kept.
  - Colour: one affine map of RGB for each image holds the PCA shift, the jitter in its random order and the
    normalisation; nothing is clipped between them. No weight decay (not mentioned).
  - The flip test doubles the cost (MNetV2-1.0 SDD: 0.87 G multiply-adds), and the challenge forbade it: it is
    switched off by --flip-test none.
  - With --gpus N each process normalises its own share of the batch; the paper trained on one GPU. The last
    epoch is reported. For other --epochs than 40 the rate falls at the same fractions, 1/2 and 3/4.

Train on LaPa, the open set in the paper's 106 points (not run here, see the README):
  python heatmap_landmarks.py --data lapa --data-root LaPa --amp --cache device
Without any data, on drawn faces, two to three minutes on two CPU cores (NME 3.1 %, AUC 61 %):
  python heatmap_landmarks.py
Continue, evaluate, use, and cut 112 px crops for face recognition (Sec. 5.4):
  python heatmap_landmarks.py --data lapa --cache device --resume
  python heatmap_landmarks.py --data lapa --data-root LaPa --eval runs/heatmap_landmarks-lapa/last.pt
  python heatmap_landmarks.py --predict photo.jpg --detector yunet.onnx --weights RUN/last.pt
  python heatmap_landmarks.py --predict photos/ --detector yunet.onnx --weights RUN/last.pt --align-out DIR
"""
import argparse
import functools
import hashlib
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
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import datasets, metrics, synthetic, warp

# ---- Settings ------------------------------------------------------------------------------------

# Sec. 3.3, Table 4 and Sec. 5.1: the final MNetV2-1.0 with all tricks that helped.
PAPER = dict(size=192, epochs=40, batch_size=16, lr=1e-3, backbone="mobilenetv2_1.0", strategy="SDD",
             filters=128, sigma=2.0, flip_copies=True, flip_test="coordinates", erase=0.5, erase_from=0.5,
             rotate=15.0, norm="box", threshold=0.08)
SMALL = dict(PAPER, size=128, epochs=20, batch_size=32, lr=2e-3, sigma=1.5, kernel=7, cache="device")
PRESETS = {
    "jd106": dict(PAPER),  # Table 5
    "lapa": dict(PAPER),
    "wflw": dict(PAPER, norm="io", threshold=0.10),  # the set's own measure
    "300w": dict(PAPER, norm="io"),
    "cofw": dict(PAPER, norm="io", threshold=0.10),
    "youtube": dict(SMALL),
    "folder": dict(SMALL),
    "faces": dict(SMALL, size=96, batch_size=16, epochs=8, eval_every=4, rotate=0.0,
                  backbone="mobilenetv2_0.5", filters=64, strategy="SSD", sigma=1.0, kernel=5),
}
DRAWN = {"train": 1600, "test": 400}  # faces of --data faces
BOXES = ("landmarks", "face")
FLIP_TESTS = ("none", "coordinates", "heatmaps")


def parse_args(argv=None):
    """Flags, with the defaults of the preset that --data names. `args.given` lists what was typed."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--data", default="faces", choices=PRESETS)
    preset = PRESETS[chooser.parse_known_args(argv)[0].data]
    parser = argparse.ArgumentParser(description="Sub-pixel landmarks from heatmaps", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("shared by all scripts").add_argument
    add("--data", default="faces", choices=PRESETS, help="data set, and the preset of all other flags")
    add("--data-root", default="", help="folder of the data set; the README shows the layout of each")
    add("--output", default="", help="folder of the run (default: runs/heatmap_landmarks-DATA[-2, ...])")
    add("--epochs", type=int, default=40, help="passes over the training set")
    add("--batch-size", type=int, default=16, help="faces a step, over all GPUs")
    add("--lr", type=float, default=1e-3, help="learning rate at the start")
    add("--weight-decay", type=float, default=0.0, help="Adam's, added to the gradient")
    add("--gpus", type=int, default=1, help="processes to start, one a GPU; batch norms see their own share")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"], help="auto: a GPU if there is one")
    add("--workers", type=int, default=-1, help="loader processes a GPU; -1: 8 for a GPU, none for a CPU")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    add("--amp", action=switch, default=False, help="bfloat16 network on a GPU; heatmaps read in float32")
    add("--compile", action=switch, default=False, help="torch.compile; minutes at first, then faster")
    add("--limit", type=int, default=0, help="at most so many faces a split (drawn ones: so many), 0: all")
    add("--resume", action="store_true", help="continue the run in --output, or the newest run on this data")
    add("--eval", default="", metavar="CKPT", help="evaluate this checkpoint and stop")
    add("--predict", nargs="+", default=[], metavar="PATH", help="images or folders to find landmarks in")
    add("--weights", default="", metavar="CKPT", help="checkpoint for --predict")
    add("--box", default="landmarks", help="box of --align box and two-pass: 'landmarks' (their ground-truth "
        "box) or 'face' (the set's own); with --predict, x0,y0,x1,y1 in pixels")
    add("--cache", default="", help="keep decoded crops: a folder (one file, opened again by the next run), "
        "or 'device' (in the GPU's memory, where the warp then runs; on a CPU in memory)")
    add("--init", default="", metavar="CKPT", help="state dict (torchvision's names) for the backbone")
    add("--size", type=int, default=192, help="side of the crop in px, a multiple of 32")
    add("--margin", type=float, default=1.6, help="side of a box crop over the longer side of the box")
    add("--norm", default="auto", choices=["auto", "io", "ip", "box", "face"], help="d of Eq. (4): inter-"
        "ocular, inter-pupil, sqrt(w h) of the landmarks' or the set's box; auto: io, else ip or box")
    add("--threshold", type=float, default=0.08, help="NME above which a face fails; upper end of the AUC")
    add("--eval-every", type=int, default=1, help="epochs between evaluations; the last is always evaluated")
    add("--points", type=int, default=106, help="landmarks of the drawn faces; every other set has its own")
    add("--detector", default="", metavar="ONNX", help="YuNet model file: faces and five points of --predict")
    add = parser.add_argument_group("the network and its maps").add_argument
    add("--backbone", default="mobilenetv2_1.0", help="mobilenetv2_WIDTH, resnet18 or resnet50")
    add("--strategy", default="SDD", help="a block a letter, from the small map on: S pixel shuffle, cheap, "
        "D deconvolution, better at the end; each doubles the map (Table 3)")
    add("--filters", type=int, default=128, help="filters of each D and S (256 in Tables 1 to 3)")
    add("--sigma", type=float, default=2.0, help="of the target Gaussians, in px of the heatmap")
    add("--decode", default="dark", choices=DECODERS, help="argmax: Eq. (1), shift: Eq. (2), dark: Eq. (3)")
    add("--kernel", type=int, default=11, help="blur of --decode dark in heatmap px, odd: about 5 sigma")
    add = parser.add_argument_group("alignment: Sec. 3.1").add_argument
    add("--align", default="five", choices=["five", "two-pass", "box"], help="crop by five points (the "
        "paper); by a box, then by five points of the answer (trained on both crops); by the box alone")
    add("--five", default="", metavar="CSV", help="a detector's five points, or all of a scheme: rows "
        "image,x0,y0,... in px from 0, images below --data-root; without it the true five, with noise")
    add("--five-noise", type=float, default=0.03, help="standard deviation of the noise on the true "
        "five points, over the face's scale: the distance of the eyes, or from eyes to mouth if longer")
    add("--align-out", default="", metavar="DIR", help="with --predict or --eval: 112 px recognition crops "
        "by the predicted five points, with .pts (Sec. 5.4); of --eval's faces, found as --align says")
    add = parser.add_argument_group("the bag of tricks: Sec. 3.3 and 5.1").add_argument
    add("--lighting", type=float, default=0.05, help="PCA colour shift: standard deviation of its weights")
    add("--jitter", type=float, default=0.4, help="brightness, contrast and saturation, 1 - j to 1 + j")
    add("--flip-copies", action=switch, default=False, help="a mirrored copy of each face: an epoch doubles")
    add("--flip-test", default="none", choices=FLIP_TESTS, help="average over the image and its mirror image")
    add("--erase", type=float, default=0.0, help="chance of random erasing")
    add("--erase-from", type=float, default=0.0, help="part of the run after which the erasing begins")
    add("--rotate", type=float, default=0.0, help="random rotation, up to so many degrees")
    add("--scale", type=float, default=0.0, help="random scaling, up to 1 - s and 1 + s (the paper: hurts)")
    add("--shift", type=float, default=0.0, help="random shift, up to so many px of a 192 px crop (hurts)")
    add("--compare", action=switch, default=False, help="at the end also score each decoder and flip test")
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    # argparse fills in no default where the namespace has a value, so what is not None now was typed.
    typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    args.given = sorted(key for key, value in vars(typed).items() if value is not None)
    check_flags(args, parser.error)
    return args


def check_flags(args, error: Callable[[str], None]):
    """Calls `error` with a message for the first flag whose value cannot be meant."""
    wanted = [("size", args.size >= 32 and args.size % 32 == 0, "a multiple of 32, the backbones' stride"),
              ("kernel", args.kernel > 0 and args.kernel % 2 == 1, "an odd number"),
              ("erase", 0 <= args.erase <= 1, "a chance, 0 to 1"),
              ("erase_from", 0 <= args.erase_from <= 1, "a part of the run, 0 to 1"),
              ("jitter", 0 <= args.jitter <= 1, "0 to 1"),
              ("rotate", 0 <= args.rotate <= 180, "0 to 180 degrees"),
              ("scale", 0 <= args.scale < 1, "0 to below 1")]
    wanted += [(name, getattr(args, name) >= least, f"at least {least}") for name, least in [
        ("epochs", 1), ("batch_size", 1), ("gpus", 1), ("limit", 0), ("seed", 0), ("eval_every", 1),
        ("weight_decay", 0), ("workers", -1)]]
    wanted += [(name, 0 < getattr(args, name) < math.inf, "more than 0") for name in (
        "lr", "margin", "threshold", "sigma")]
    wanted += [(name, 0 <= getattr(args, name) < math.inf, "at least 0") for name in (
        "five_noise", "lighting", "shift")]
    for name, holds, what in wanted:
        if not holds:
            error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {what}")
    for check in (partial(check_strategy, args.strategy, args.filters), partial(backbone_of, args.backbone)):
        try:
            check()
        except ValueError as problem:
            error(f"--{problem}")
    if args.batch_size % args.gpus:
        error(f"--batch-size {args.batch_size} does not divide over --gpus {args.gpus}")
    if args.box not in BOXES and (not args.predict or parse_box(args.box) is None):
        error(f"--box {args.box}: expected landmarks or face, with --predict x0,y0,x1,y1 in pixels, x0 < x1, "
              f"y0 < y1 (written --box=-5,... where x0 is negative)")
    for name in ("init", "detector", "five"):
        if getattr(args, name) and not os.path.isfile(getattr(args, name)):
            error(f"--{name}: no file {getattr(args, name)}")
    if bool(args.predict) != bool(args.weights):
        error("--predict PATH and --weights CKPT belong together: images, and a checkpoint of this script")
    if args.eval and (args.predict or args.resume):
        error("--eval goes neither with --predict nor with --resume")
    if args.detector and not args.predict:
        error("--detector belongs to --predict; for a whole set write its points to a file, see --five")
    if args.align_out and not (args.predict or args.eval):
        error("--align-out belongs to --predict or --eval: crops are made by a trained network")
    if args.align_out and args.output and os.path.abspath(args.align_out) == os.path.abspath(args.output):
        error(f"--align-out {args.align_out} is --output too: both would write NAME.png there")
    if os.path.exists(args.align_out) and (not os.path.isdir(args.align_out) or os.listdir(args.align_out)):
        error(f"--align-out {args.align_out} is not empty: name another folder")


def parse_box(text: str) -> list[float] | None:
    """The numbers of "x0,y0,x1,y1" if they are a box."""
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
    except ValueError:
        return None
    return [x0, y0, x1, y1] if -math.inf < x0 < x1 < math.inf and -math.inf < y0 < y1 < math.inf else None


# ---- Backbones: Sec. 4.1 and 5.2 -----------------------------------------------------------------

# Image (B, 3, H, W) -> (B, channels, H/32, W/32), H and W multiples of 32. Parameters are named as in
# torchvision's checkpoints, which load by name (another shape is an error). The paper trains from scratch.


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """(B, cin, H, W) -> (B, cout, H/stride, W/stride). No bias: the batch norm behind it has a shift."""
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_bn(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, act=None) -> nn.Sequential:
    """`conv` (0), batch norm (1) and, if its class is given, an activation (2); the shapes of `conv`."""
    norm = nn.BatchNorm2d(cout)
    return nn.Sequential(conv(cin, cout, kernel, stride, groups), norm, *([act(inplace=True)] if act else []))


def init_weights(module: nn.Module) -> None:
    """Initialises all convolutions and batch norms of `module`, in place.   Source: He et al., ICCV 2015."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            # Variance 2 / fan_out keeps the gradient's variance from layer to layer. torch counts a depthwise
            # convolution's fan over all groups, too many; the batch norm behind it undoes any scale.
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


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


class ResNet(nn.Module):
    """7x7 stem and four stages of `depths` blocks: (B, 3, H, W) -> (B, 512 expansion, H/32, W/32).
    Source: He et al., CVPR 2016, Table 1."""

    def __init__(self, block: type[nn.Module], depths: Sequence[int]):
        super().__init__()
        self.channels = 512 * block.expansion
        self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.layer1 = self.stage(block, 64, 64, depths[0], 1)  # the max-pool before it has strided already
        self.layer2 = self.stage(block, 64 * block.expansion, 128, depths[1], 2)
        self.layer3 = self.stage(block, 128 * block.expansion, 256, depths[2], 2)
        self.layer4 = self.stage(block, 256 * block.expansion, 512, depths[3], 2)
        init_weights(self)

    @staticmethod
    def stage(block, cin, planes, depth, stride):
        rest = (block(planes * block.expansion, planes) for _ in range(depth - 1))
        return nn.Sequential(block(cin, planes, stride), *rest)

    def forward(self, image):
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)                 # (B, 64, H/2, W/2)
        x = self.layer1(F.max_pool2d(x, 3, 2, 1))                             # (B, 64 expansion, H/4, W/4)
        return self.layer4(self.layer3(self.layer2(x)))                       # (B, 512 expansion, H/32, W/32)


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


class Features(nn.Module):
    """A chain of layers under the name `features`: (B, 3, H, W) -> (B, channels, H/32, W/32)."""

    def __init__(self, layers: Sequence[nn.Module], channels: int):
        super().__init__()
        self.features, self.channels = nn.Sequential(*layers), channels
        init_weights(self)

    def forward(self, image):
        return self.features(image)


def mobilenetv2(width: float) -> Features:
    """Sandler et al., CVPR 2018, Table 2, with the last 1x1 convolution, to 1280 channels at any width <= 1.
    As in GluonCV, `width` times the table's channels are cut, not rounded to multiples of 8 (torchvision)."""
    cin = int(32 * width)
    layers = [conv_bn(3, cin, 3, 2, act=nn.ReLU6)]
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
             (6, 320, 1, 1))
    for expand, cout, depth, stride in table:
        for i in range(depth):
            layers.append(InvertedResidual(cin, int(cout * width), 1 if i else stride, expand))
            cin = int(cout * width)
    last = int(1280 * max(width, 1.0))
    return Features([*layers, conv_bn(cin, last, 1, act=nn.ReLU6)], last)


def backbone_of(name: str) -> Callable[[], nn.Module]:
    """What builds the backbone of a name: mobilenetv2_WIDTH, resnet18, resnet50.   Raises: ValueError."""
    found = re.fullmatch(r"mobilenetv2_(\d+(?:\.\d+)?)", name)
    if found and 0.1 <= float(found[1]) <= 4:  # below 0.1 the first block would have no channel
        return partial(mobilenetv2, float(found[1]))
    known = {"resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
             "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3))}
    if name not in known:
        raise ValueError(f"backbone {name!r}: expected resnet18, resnet50 or mobilenetv2_WIDTH with a width "
                         f"of 0.1 to 4, as mobilenetv2_0.25")
    return known[name]


# ---- Network: Sec. 4 -----------------------------------------------------------------------------

def check_strategy(strategy: str, filters: int):
    """Raises ValueError for an upsampling strategy that cannot be built on a map of stride 32."""
    if not strategy or set(strategy) - set("SD"):
        raise ValueError(f"strategy {strategy!r}: expected letters S (pixel shuffle) and D (deconvolution)")
    if len(strategy) > 5:
        raise ValueError(f"strategy {strategy!r}: {len(strategy)} letters enlarge the input's 1/32 by "
                         f"{2**len(strategy)}, to heatmaps larger than the input; at most 5")
    if filters < 4 or filters % 4:
        raise ValueError(f"filters {filters}: expected a multiple of 4, as a shuffle hands on a quarter")


class Deconvolution(nn.Sequential):
    """D: (B, cin, h, w) -> (B, filters, 2h, 2w).   Source: Xiao et al., "Simple Baselines", ECCV 2018."""

    def __init__(self, cin: int, filters: int):
        super().__init__(nn.ConvTranspose2d(cin, filters, 4, 2, 1, bias=False), nn.BatchNorm2d(filters),
                         nn.ReLU(inplace=True))
        nn.init.kaiming_normal_(self[0].weight, mode="fan_out", nonlinearity="relu")


class PixelShuffle(nn.Sequential):
    """S: (B, cin, h, w) -> (B, filters / 4, 2h, 2w); each 2 x 2 px come from 4 channels of one place.
    Source: Sec. 2.3; Shi et al., "Real-Time Single Image and Video Super-Resolution", CVPR 2016."""

    def __init__(self, cin: int, filters: int):
        super().__init__(conv(cin, filters, 3), nn.BatchNorm2d(filters), nn.ReLU(inplace=True),
                         nn.PixelShuffle(2))
        init_weights(self)


class HeatmapNet(nn.Module):
    """Image (B, 3, H, W), normalised, H and W multiples of 32 -> heatmaps (B, P, H / stride, W / stride).

    Args: backbone, "mobilenetv2_1.0" (any width), "resnet18" or "resnet50"; strategy, letters S and D, the
        first one for the smallest map; points, P; filters of each block, a multiple of 4.
    Attributes: stride, 32 / 2^letters: input px of a heatmap px; points.
    Raises: ValueError for a name, a word or filters that cannot be built.   Source: the facts of Sec. 4.
    """

    def __init__(self, backbone: str = "mobilenetv2_1.0", strategy: str = "SDD", points: int = 106,
                 filters: int = 128):
        super().__init__()
        check_strategy(strategy, filters)
        self.stride, self.points = 32 // 2 ** len(strategy), points
        self.backbone = backbone_of(backbone)()
        self.project, cin, blocks = conv(self.backbone.channels, 256, 1), 256, []
        for letter in strategy:
            blocks.append({"D": Deconvolution, "S": PixelShuffle}[letter](cin, filters))
            cin = filters if letter == "D" else filters // 4
        self.upsample = nn.Sequential(*blocks)
        self.head = nn.Conv2d(cin, points, 1, bias=False)  # behind the last block, at the maps' full size
        nn.init.kaiming_normal_(self.project.weight, mode="fan_in", nonlinearity="linear")
        nn.init.normal_(self.head.weight, std=1e-3)  # GluonCV: training starts from empty maps

    def forward(self, image):
        heatmaps = self.head(self.upsample(self.project(self.backbone(image))))
        return heatmaps.contiguous()  # map after map, as loss and decoders go through them


# ---- Heatmaps and back: Sec. 2.2 -----------------------------------------------------------------

def to_heatmap(points, stride: float):
    """Crop px -> heatmap px, elementwise: a heatmap px covers `stride` px, and both count pixel centres."""
    return (points + 0.5) / stride - 0.5


def to_crop(points, stride: float):
    """Heatmap px -> crop px, the inverse of `to_heatmap`. Commutes with mirroring; p * stride would not."""
    return (points + 0.5) * stride - 0.5


def gaussian_heatmaps(points: torch.Tensor, size: int | tuple[int, int], stride: float, sigma: float):
    """Target heatmaps: a Gaussian of height 1 about each landmark, whose centre is not rounded.

    Args: points (B, P, 2) px of the crop; size of the heatmaps, a side or (height, width) px; stride, px of
        the crop in a px of the heatmap; sigma in px of the heatmap.
    Returns: (B, P, height, width), the type of `points`, float32 at least.
    """
    height, width = (size, size) if isinstance(size, int) else size
    centre = to_heatmap(points.to(torch.promote_types(points.dtype, torch.float32)), stride)
    x, y = (torch.arange(n, device=points.device) for n in (width, height))
    # Eq. (3)'s numerator with Sigma = sigma^2 I: the product of a Gaussian in x and one in y
    row = ((x - centre[..., :1]) ** 2 / (-2 * sigma**2)).exp()        # (B, P, width)
    column = ((y - centre[..., 1:]) ** 2 / (-2 * sigma**2)).exp()     # (B, P, height)
    return column[..., :, None] * row[..., None, :]


def landmark_weights(points: torch.Tensor, size: int | tuple[int, int], stride: float, sigma: float):
    """1 for each landmark (B, P, 2) px whose 3-sigma box touches its heatmap, else 0: (B, P) float32.
    Source: DARK's rule (Zhang et al., CVPR 2020, code), without its rounding; as `gaussian_heatmaps`."""
    height, width = (size, size) if isinstance(size, int) else size
    (x, y), reach = to_heatmap(points, stride).unbind(-1), 3 * sigma
    return ((x >= -reach) & (x <= width - 1 + reach) & (y >= -reach) & (y <= height - 1 + reach)).float()


def pixels(heatmaps: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Values of each map of (B, P, h, w) at its own x, y (B, P, ...) px, which broadcast: (B, P, ...)."""
    (B, P, h, w), ones = heatmaps.shape, (1,) * (y.dim() - 2)
    first = torch.arange(B * P, device=y.device).view(B, P, *ones) * (h * w)
    index = (first + y * w) + x  # one flat index: several times as fast as four
    return heatmaps.reshape(-1).index_select(0, index.reshape(-1)).view(index.shape)


def find_peaks(heatmaps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest px of each map, the first in reading order, and its value.

    Args: heatmaps (B, P, h, w) float.   Returns: (B, P, 2) long, (B, P). A map without a positive value has
        its peak at 0, 0; the value of one with nan or inf is not finite (-inf is merely low).
    Raises: ValueError for another shape or type.
    """
    if heatmaps.dim() != 4 or not heatmaps.is_floating_point() or not heatmaps.numel():
        raise ValueError(f"heatmaps {heatmaps.dtype} {tuple(heatmaps.shape)}: expected float (B, P, h, w)")
    # Rows first: amax streams through memory, several times as fast as an argmax of the flat map on a CPU.
    height, y = heatmaps.amax(3).max(2)                                                     # (B, P) each
    row = pixels(heatmaps, torch.arange(heatmaps.shape[3], device=y.device), y[..., None])  # (B, P, w)
    # Eq. (1): (x, y) = argmax H
    peak = torch.stack([row.argmax(2), y], 2)
    return peak * (height > 0)[..., None], height


def finish(coordinates: torch.Tensor, height: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoders' answer: float coordinates and confidences, nan and 0 where a map is not finite."""
    dtype = torch.promote_types(height.dtype, torch.float32)
    good = height.isfinite() & coordinates.isfinite().all(-1)
    return coordinates.to(dtype).where(good[..., None], torch.nan), height.to(dtype).where(good, 0)


def decode_argmax(heatmaps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (1): the highest px of each map. (B, P, h, w) -> coordinates (B, P, 2) in heatmap px, and the peaks
    (B, P), a confidence. Exact to half a px. The first of equal ones counts; a map without a positive value
    gives 0, 0; one that holds nan or inf gives nan, with confidence 0."""
    return finish(*find_peaks(heatmaps))


def decode_shift(heatmaps: torch.Tensor, c: float = 0.25) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (2): the highest px, and from there `c` px towards the larger neighbour in x and in y, if its x is
    in 2 ... w - 2 and its y in 2 ... h - 2. Shapes and bad maps as `decode_argmax`.
    Source: Xiao et al., ECCV 2018, code: the sign of the gradient, and these borders, which a mirror image
    does not share; the paper prints c dH/dxdy."""
    (peak, height), (h, w) = find_peaks(heatmaps), heatmaps.shape[2:]
    px, py = peak.unbind(-1)
    inside = (1 < px) & (px < w - 1) & (1 < py) & (py < h - 1)
    x, y = px.clamp(1, max(w - 2, 1)), py.clamp(1, max(h - 2, 1))
    if min(h, w) < 3:
        return finish(peak, height)
    gradient = torch.stack([pixels(heatmaps, x + 1, y) - pixels(heatmaps, x - 1, y),
                            pixels(heatmaps, x, y + 1) - pixels(heatmaps, x, y - 1)], -1)
    # Eq. (2): (x, y) = argmax H + c dH
    return finish(peak + c * gradient.sign() * inside[..., None], height)


def blur_matrix(length: int, kernel: int, like: torch.Tensor) -> torch.Tensor:
    """A Gaussian blur of zero-padded rows as a matrix: (length, length + kernel - 1), float64, on `like`'s
    device. The weights are OpenCV's, which takes sigma 0.3 ((kernel - 1) / 2 - 1) + 0.8 (from 9 px on)."""
    weights = torch.from_numpy(cv2.getGaussianKernel(kernel, 0)[:, 0])
    rows = torch.zeros(length, length + kernel - 1, dtype=torch.float64)
    for i in range(length):
        rows[i, i:i + kernel] = weights
    return rows.to(like.device)


def blurred_peaks(heatmaps: torch.Tensor, chosen: torch.Tensor, kernel: int) -> torch.Tensor:
    """The highest value after the blur of `blur_matrix` of the K maps `chosen`, (B, P) bool: (K,) float64."""
    rows, columns = (blur_matrix(n, kernel, heatmaps)[:, kernel // 2:kernel // 2 + n].float()
                     for n in heatmaps.shape[2:])
    return torch.cat([(rows @ heatmaps[b, p].float() @ columns.T).amax((1, 2))  # 64 at a time, for memory
                      for b, p in (part.unbind(1) for part in chosen.nonzero().split(64))]).double()


def decode_dark(heatmaps: torch.Tensor, kernel: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (3): the centre of the Gaussian that each map is, between the px. Shapes and bad maps as
    `decode_argmax`; `kernel`: side of the blur in px, odd.

    Of a Gaussian, log G is a parabola, whose top is a Newton step away from any px: mu = m - H^-1 g with the
    gradient g and the Hessian H of log G at the highest px m. A blur first, as real maps are rough. All of it
    happens in the px about the peak, for all maps at once. Noise alone asks for large steps: they end at 1 px
    in x and in y. A peak less than 2 px from the outermost px stays where it is.
    Source: Zhang et al., "Distribution-Aware Coordinate Representation", CVPR 2020, and its code, ilovepose/
    DarkPose lib/core/inference.py, to rounding: differences of step 2 in H, zeros around the map, the map
    brought back to its height after the blur (which matters for the floor of the logarithm alone).
    Raises: ValueError for an even kernel.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel {kernel}: expected an odd number of px")
    (peak, height), (h, w) = find_peaks(heatmaps), heatmaps.shape[2:]
    px, py = peak.unbind(-1)
    inside = (1 < px) & (px < w - 2) & (1 < py) & (py < h - 2) & height.isfinite()          # (B, P)
    # The px about each peak that the blur of 5 x 5 of them needs: n = kernel + 4 a side, zero off the map.
    offset = torch.arange(kernel + 4, device=heatmaps.device) - kernel // 2 - 2
    x, y = px[..., None] + offset, py[..., None] + offset                                   # (B, P, n)
    patch = pixels(heatmaps, x.clamp(0, w - 1)[..., None, :], y.clamp(0, h - 1)[..., :, None])
    patch *= ((y >= 0) & (y < h))[..., :, None] & ((x >= 0) & (x < w))[..., None, :]        # (B, P, n, n)
    blur = blur_matrix(5, kernel, heatmaps)
    blurred = patch.flatten(2).double() @ torch.kron(blur, blur).T  # one product, not B P small ones
    blurred = blurred.unflatten(2, (5, 5))                                                  # (B, P, 5, 5)
    # A factor does not change the derivatives of a logarithm, except at its floor. Only noise comes there.
    low = inside & (blurred <= 1e-10).flatten(2).any(2)
    if low.any():
        blurred[low] *= (height[low].double() / blurred_peaks(heatmaps, low, kernel))[:, None, None]
    L = blurred.clamp(min=1e-10).log()
    dx, dy = (L[..., 2, 3] - L[..., 2, 1]) / 2, (L[..., 3, 2] - L[..., 1, 2]) / 2
    dxx = (L[..., 2, 4] - 2 * L[..., 2, 2] + L[..., 2, 0]) / 4
    dyy = (L[..., 4, 2] - 2 * L[..., 2, 2] + L[..., 0, 2]) / 4
    dxy = (L[..., 3, 3] - L[..., 1, 3] - L[..., 3, 1] + L[..., 1, 1]) / 4
    # Eq. (3): -(m - mu) / sigma^2 is the gradient of log G, -1 / sigma^2 its Hessian
    determinant = dxx * dyy - dxy**2
    step = torch.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], -1) / determinant[..., None]
    step = step.clamp(-1, 1).where((inside & step.isfinite().all(-1))[..., None], 0)
    return finish(peak + step, height)


DECODERS = {"argmax": decode_argmax, "shift": decode_shift, "dark": decode_dark}


# ---- Loss ----------------------------------------------------------------------------------------

def heatmap_loss(heatmaps: torch.Tensor, points: torch.Tensor, stride: float, sigma: float) -> torch.Tensor:
    """Squared error of heatmaps (B, P, h, w) against Gaussians about points (B, P, 2) px of the crop: summed
    over a map, divided by pi sigma^2, the sum of a whole Gaussian's squares, and averaged over the landmarks
    that have a weight. 1 is the loss of empty maps, 0 is perfect. Scalar, float32."""
    size = tuple(heatmaps.shape[2:])
    target = gaussian_heatmaps(points, size, stride, sigma)
    error = (heatmaps.float() - target).square().sum((2, 3)) / (math.pi * sigma**2)         # (B, P)
    weight = landmark_weights(points, size, stride, sigma)
    return (error * weight).sum() / weight.sum().clamp(min=1)


# ---- Data: alignment of Sec. 3.1, augmentation of Sec. 3.3 and 5.1 --------------------------------

# Eye centres, nose tip and mouth corners in a 192 px crop: LaPa's mean face, made symmetric, 122 px wide.
REFERENCE_5 = torch.tensor([[69.1, 56.6], [121.9, 56.6], [95.5, 87.6], [72.0, 114.5], [119.0, 114.5]],
                           dtype=torch.float64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1] over ImageNet
GREY = (0.299, 0.587, 0.114)
# Columns: ImageNet's principal components of RGB in 0..255, each times its eigenvalue [AlexNet].
PCA = ((-0.5675 * 55.46, 0.7192 * 4.794, 0.4009 * 1.148),
       (-0.5808 * 55.46, -0.0045 * 4.794, -0.8140 * 1.148),
       (-0.5836 * 55.46, -0.6948 * 4.794, 0.4203 * 1.148))


@functools.cache
def constant(values: tuple, device: torch.device) -> torch.Tensor:
    """A float32 tensor, copied to a device once: a copy waits for what the GPU is at."""
    with torch.inference_mode(False):  # else, made in an evaluation, training could not use it
        return torch.tensor(values, device=device)


def align_five(points5, size: int = 192) -> torch.Tensor:
    """The similarity that brings five landmarks to REFERENCE_5: the alignment of Sec. 3.1.

    Args: points5 (..., 5, 2) px of the image, array or tensor: eye, eye, nose tip, mouth corner, corner, the
        image-left one first; size of the crop in px.
    Returns: (..., 2, 3) float64, image px -> crop px; `warp.invert` gives the way back.
    Raises: ValueError for another shape, or five points that coincide or are not finite.
    """
    points5 = torch.as_tensor(points5).double()
    if points5.shape[-2:] != (5, 2):
        raise ValueError(f"points5 {tuple(points5.shape)}: expected (..., 5, 2)")
    warp.check_points(points5, "similarity")
    reference = to_heatmap(REFERENCE_5, 192 / size).to(points5)  # px of 192 -> px of size
    return warp.fit_similarity(points5, reference.expand_as(points5))


def five_of(points):
    """The five points (..., 5, 2) in landmarks (..., P, 2) of a known scheme, array or tensor."""
    count = points.shape[-2]
    if count not in datasets.SCHEMES:
        raise ValueError(f"{count} landmarks are no known scheme ({', '.join(map(str, datasets.SCHEMES))}): "
                         "eyes, nose and mouth cannot be found among them; take --align box")
    return datasets.group_means(points, datasets.SCHEMES[count].five)


def faces_among(five: torch.Tensor) -> torch.Tensor:
    """Which of the five points (M, 5, 2) px could be a face: (M,) bool. Not if they are within 1 px or not
    finite; nor if no rotation and scaling brings them near REFERENCE_5, as a face seen in a mirror, for which
    the best scale is about 0 and the crop endless."""
    finite = five.isfinite().flatten(1).all(1)[:, None, None]
    a, b = (p - p.mean(1, keepdim=True) for p in (five.double().where(finite, 0), REFERENCE_5[None]))
    a, b = (torch.view_as_complex(p.contiguous()) for p in (a, b))
    likeness = (a.conj() * b).sum(1).abs() / (a.abs().square().sum(1) * b.abs().square().sum(1)).sqrt()
    return (a.abs().amax(1) > 1) & (likeness > 0.25)  # 1: similar, 0: a mirror image, or nothing


def rough_five(args, faces: list) -> np.ndarray:
    """Five points (M, 5, 2) px as a detector has them: of --five, else true ones with noise.
    The noise is one draw for each face of a set, the same in every run: so is a detector's answer."""
    five = five_of(np.stack([face.points for face in faces]).astype(np.float64))
    across, down = five[:, 1] - five[:, 0], five[:, :2].mean(1) - five[:, 3:].mean(1)
    scale = np.linalg.norm([across, down], axis=2).max(0)  # (M,): of a profile face the eyes coincide
    noise = [np.random.default_rng((5, i)).normal(size=(5, 2)) for i in range(len(faces))]
    rough = five + args.five_noise * scale[:, None, None] * np.stack(noise)
    if args.five:
        found, missed = datasets.read_points_csv(args.five), []
        for i, face in enumerate(faces):
            name = os.path.relpath(face.image, args.data_root or ".") if isinstance(face.image, str) else ""
            rows = five_of(found[name]) if name in found else np.full((1, 5, 2), np.inf)
            distance = np.linalg.norm(rows - five[i], axis=2).mean(1)
            if distance.min() < scale[i]:  # of several faces in one image the nearest, but no neighbour
                rough[i] = rows[distance.argmin()]
            else:
                missed.append(name or f"face {i}")
        if len(missed) == len(faces):
            raise ValueError(f"--five {args.five}: none of its images ({', '.join(list(found)[:3])}, ...) is "
                             f"one of the set's ({', '.join(missed[:3])}, ...), as paths below --data-root")
        if missed:
            warnings.warn(f"--five {args.five} has no points for {len(missed)} of {len(faces)} faces, the "
                          f"first is {missed[0]}: the true ones with noise are taken", stacklevel=2)
    return rough


def first_frames(args, faces: list, align: str) -> np.ndarray:
    """Maps image px -> crop px of the crops that a network sees first: (M, 2, 3) float64."""
    if align == "five":
        five = rough_five(args, faces)
        for i in np.flatnonzero(~(np.ptp(five, axis=1).max(1) > 0))[:1]:
            name = faces[i].image if isinstance(faces[i].image, (str, os.PathLike)) else f"face {i}"
            raise ValueError(f"{name}: its eyes, nose tip and mouth corners coincide, which aligns nothing; "
                             "correct or leave out that face")
        return align_five(five, args.size).numpy()
    return datasets.square_frames(datasets.face_boxes(faces, args.box), args.size, args.margin)


def next_frames(args, points: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Maps of the second pass, (M, 2, 3): by the five points of the first answer (M, P, 2) px of the image,
    or, for a network of boxes, by its box. Where that answer is no face, the crop stays as it is."""
    if args.align != "box":
        five = five_of(points)
        good = faces_among(five)
        chosen = torch.where(good[:, None, None], five, REFERENCE_5)
        return torch.where(good[:, None, None], align_five(chosen, args.size), frames)
    low, high = points.amin(1), points.amax(1)
    good = ((high - low).amax(1) > 1) & points.isfinite().all(2).all(1)
    boxes = torch.where(good[:, None], torch.cat([low, high], 1), points.new_tensor([0, 0, 1, 1]))
    frames_of_boxes = torch.from_numpy(datasets.square_frames(boxes.numpy(), args.size, args.margin))
    return torch.where(good[:, None, None], frames_of_boxes, frames)


def augment(rng: np.random.Generator, size: int, rotate=0.0, scale=0.0, shift=0.0, lighting=0.0, jitter=0.0,
            erase=0.0):
    """Draws the tricks of one face; every draw is made, so that a trick leaves the others' draws alone.
    Returns: matrix (2, 3) crop px -> crop px, about the crop's middle; False; {"colour": (9,) three PCA
        weights, factors of brightness, contrast, saturation, their order; "erase": (4,) x0 y0 x1 y1 px}."""
    angle, zoom = math.radians(rng.uniform(-rotate, rotate)), rng.uniform(1 - scale, 1 + scale)
    move = rng.uniform(-shift, shift, 2) * size / 192
    c, s, middle = zoom * math.cos(angle), zoom * math.sin(angle), (size - 1) / 2
    matrix = np.array([[c, s, middle - (c + s) * middle + move[0]],
                       [-s, c, middle - (c - s) * middle + move[1]]])
    colour = np.concatenate([rng.normal(0, lighting, 3), rng.uniform(1 - jitter, 1 + jitter, 3),
                             rng.permutation(3)])
    chance, area, aspect = rng.random(), rng.uniform(0.02, 0.15), math.exp(rng.uniform(-1.2, 1.2))
    w, h = size * math.sqrt(area * aspect), size * math.sqrt(area / aspect)
    x, y = rng.uniform(0, size - w), rng.uniform(0, size - h)
    hidden = [x, y, x + w, y + h] if chance < erase else [-1.0] * 4
    return matrix, False, {"colour": colour, "erase": np.array(hidden)}


def colour_map(draws: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour jitter and PCA shift as one affine map of RGB in 0..255 for each image: x -> M x + t.

    Brightness, contrast and saturation all send a colour x to f x + (1 - f) a, with a black, the image's mean
    grey, or the grey of x: an affine map, and so is one after another in any order.
    Args: draws (B, 9) of `augment`; mean (B, 3), the image's mean colour.   Returns: M (B, 3, 3), t (B, 3).
    """
    weights, factors, order = draws.split(3, 1)
    grey, one = constant(GREY, draws.device), torch.eye(3, device=draws.device)
    M, t = one.expand(len(draws), 3, 3), torch.zeros_like(mean)
    for kind in order.long().unbind(1):                                                     # (B,) 0, 1 or 2
        f = factors.gather(1, kind[:, None])                                                # (B, 1)
        to_grey = ((1 - f) * (kind == 2)[:, None])[..., None] * grey                        # (B, 1, 3)
        A = f[..., None] * one + to_grey                                                    # (B, 3, 3)
        mean_grey = ((M @ mean[..., None])[..., 0] + t) @ grey                              # (B,)
        contrast = (1 - f) * (mean_grey * (kind == 1))[:, None]                             # (B, 1)
        M, t = A @ M, (A @ t[..., None])[..., 0] + contrast
    return M, t + weights @ constant(PCA, draws.device).T


def prepare(batch: dict, device: torch.device, erase: bool = False) -> torch.Tensor:
    """Network input (B, 3, H, W), normalised, from a batch; with its colour and, if so, its erasing."""
    image = batch["image"].to(device, non_blocking=True)
    if image.dtype == torch.float32:  # (B, 3, H, W) of the DeviceLoader
        image = image.permute(0, 2, 3, 1)
    image = image.float()                                                                   # (B, H, W, 3)
    mean, std = (255 * constant(values, device) for values in (MEAN, STD))
    if "colour" in batch:
        M, t = colour_map(batch["colour"].to(device, non_blocking=True), image.mean((1, 2)))
        image = torch.baddbmm(((t - mean) / std)[:, None], image.flatten(1, 2),
                              (M / std[:, None]).mT).view_as(image)
    else:
        image = (image - mean) / std
    image = image.permute(0, 3, 1, 2)  # channels_last as it stands
    if erase:
        x0, y0, x1, y1 = batch["erase"].to(device, non_blocking=True)[..., None].unbind(1)  # (B, 1) each
        y, x = (torch.arange(n, device=device) for n in image.shape[2:])
        hidden = ((x >= x0) & (x < x1))[:, None, None] & ((y >= y0) & (y < y1))[:, None, :, None]
        image = image.masked_fill(hidden, 0)  # the mean colour
    return image.contiguous(memory_format=torch.channels_last)


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
    """Faces as crops, as --align says; augmented by the tricks, or as they are.
    A network for two passes is trained on each face twice, aligned and as it stands in its box."""
    if not augmented:
        frames = first_frames(args, faces, "five" if args.align == "five" else "box")
        return datasets.CropDataset(faces, frames, args.size)
    aligns = {"five": ["five"], "two-pass": ["five", "box"], "box": ["box"]}[args.align]
    frames = np.concatenate([first_frames(args, faces, align) for align in aligns])
    faces = [*faces] * len(aligns)
    turn = min(math.radians(args.rotate), math.pi / 4)
    reach = (math.cos(turn) + math.sin(turn)) * (1 + 2 * args.shift / 192) / (1 - args.scale)
    draw = partial(augment, rotate=args.rotate, scale=args.scale, shift=args.shift, lighting=args.lighting,
                   jitter=args.jitter, erase=args.erase)
    flip = datasets.SCHEMES[len(faces[0].points)].flip if args.flip_copies else None
    data = datasets.CropDataset(faces, frames, args.size, draw, reach, 1 + args.scale, flip, args.seed)
    if args.flip_copies:  # the set, then its mirror image
        data.rows = np.concatenate([data.rows, data.rows + [0, 1]])
    return data


def without_copies(train: list, test: list) -> list:
    """Sec. 3.2: training faces whose image is no copy, byte for byte, of a test image (JD-landmark-2 has
    JD-landmark's test images in it)."""
    digest = lambda face: hashlib.sha1(Path(face.image).read_bytes()).digest()
    size = lambda face: os.path.getsize(face.image)
    tested = {}
    for face in test:
        tested.setdefault(size(face), []).append(face)
    common = {size(face) for face in train} & tested.keys()  # few files need to be read
    digests = {length: set(map(digest, tested[length])) for length in common}
    return [face for face in train if size(face) not in digests or digest(face) not in digests[size(face)]]


# ---- Evaluation: Sec. 3.2 ------------------------------------------------------------------------

@torch.inference_mode()
def predict_points(net: HeatmapNet, image: torch.Tensor, decode: str = "dark", kernel: int = 11,
                   flip_test: str = "none", flip=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Landmarks of prepared crops (B, 3, H, W): (B, P, 2) px of the crop and confidences (B, P).

    flip_test: "coordinates", the mean of the answers for the image and its mirror image (Sec. 5.1);
    "heatmaps", the answer of the mean heatmaps. `flip` (P,) is then the scheme's permutation.
    """
    read = partial(decode_dark, kernel=kernel) if decode == "dark" else DECODERS[decode]
    if flip_test == "none":
        points, confidence = read(net(image).float())
        return to_crop(points, net.stride), confidence
    flip, width = constant(tuple(flip), image.device).long(), image.shape[3]
    heatmaps, mirrored = net(torch.cat([image, image.flip(3)])).float().chunk(2)
    if flip_test == "heatmaps":
        points, confidence = read((heatmaps + mirrored.flip(3)[:, flip]) / 2)
        return to_crop(points, net.stride), confidence
    points, confidence = read(torch.cat([heatmaps, mirrored]))
    points, back = to_crop(points, net.stride).chunk(2)
    back = torch.stack([width - 1 - back[..., 0], back[..., 1]], -1)[:, flip]
    points, (confidence, other) = (points + back) / 2, confidence.chunk(2)
    return points, ((confidence + other[:, flip]) / 2).where(points.isfinite().all(-1), 0)


def predict_faces(net: HeatmapNet, batches, frames: torch.Tensor, args) -> tuple[torch.Tensor, torch.Tensor]:
    """Landmarks (M, P, 2) px of the images, float64, and confidences (M, P) of the faces of all batches,
    whose crops are `frames` (M, 2, 3)."""
    net.eval()
    device = net.head.weight.device
    flip = datasets.SCHEMES[net.points].flip if net.points in datasets.SCHEMES else None
    answers = []
    for batch in batches:
        image = prepare(batch, device)
        with precision(args, device):
            points, confidence = predict_points(net, image, args.decode, args.kernel, args.flip_test, flip)
        answers.append((points.cpu().double(), confidence.cpu()))
    points, confidence = map(torch.cat, zip(*answers))
    return warp.apply_affine(warp.invert(frames), points), confidence


def recropped(args, data: datasets.CropDataset, points: torch.Tensor) -> datasets.CropDataset:
    """The same faces, cropped by the answers (M, P, 2) px of the images of a first pass."""
    return datasets.CropDataset(data.faces, next_frames(args, points, data.frames), args.size)


def predict_set(net: HeatmapNet, loader, args) -> tuple[torch.Tensor, object]:
    """Landmarks (M, P, 2) px of the images in the passes of --align, and the loader of the last one."""
    points, _ = predict_faces(net, loader, loader.dataset.frames, args)
    if args.align == "two-pass":
        data = recropped(args, loader.dataset, points)
        plain = argparse.Namespace(**{**vars(args), "cache": ""})  # these crops are not seen again
        loader = make_loader(plain, data, datasets.in_order(len(data), 64), net.head.weight.device)
        points, _ = predict_faces(net, loader, data.frames, args)
    return points, loader


def evaluate(net: HeatmapNet, loader, args, compare: bool = False) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """NME, FR and AUC in the pixels of the images, over the test set and its subsets.

    Args: loader, in order, of a CropDataset without augmentation; compare, score the other decoders and flip
        tests too.
    Returns: fractions "nme", "fr", "auc", "nme/pose", ... by name; "nme/plain" of the faces without a tag
        beside "nme/floor", what the argmax of perfect heatmaps of this size has there; "nme/mean face", of
        the mean crop as a constant answer; "spread", a landmark's rms distance from its mean, over the crop's
        side; "nme@dark", ... of the comparison. The NME of each face (M,); predictions (M, P, 2) px.
    """
    points, last = predict_set(net, loader, args)
    data = last.dataset
    target, d, crops = data.points, data.divisors(args.norm), warp.apply_affine(data.frames, data.points)
    error_of = lambda answer: metrics.nme(answer, target, d)  # Eq. (4)
    errors, tags, back = error_of(points), datasets.subsets(data.faces), warp.invert(data.frames)
    plain = ~np.logical_or.reduce([chosen for tag, chosen in tags.items() if tag] or [~tags[""]])
    plain = torch.from_numpy(plain if plain.any() else tags[""])
    scores = {}
    for subset, chosen in tags.items():
        end = f"/{subset}" if subset else ""
        scores |= {f"nme{end}": float(errors[chosen].mean()),
                   f"fr{end}": metrics.failure_rate(errors[chosen], args.threshold),
                   f"auc{end}": metrics.auc(errors[chosen], args.threshold)}
    cells = to_heatmap(crops, net.stride).round().clamp(0, args.size // net.stride - 1)
    floor = error_of(warp.apply_affine(back, to_crop(cells, net.stride)))
    constant = error_of(warp.apply_affine(back, crops.mean(0).expand_as(crops)))
    scores |= {"nme/plain": float(errors[plain].mean()), "nme/floor": float(floor[plain].mean()),
               "nme/mean face": float(constant.mean()),
               "spread": float((crops - crops.mean(0)).square().sum(2).mean(0).sqrt().mean()) / args.size}
    if compare:
        flips = FLIP_TESTS if net.points in datasets.SCHEMES else ()
        for name, flags in [*((decode, {"decode": decode}) for decode in DECODERS),
                            *((f"flip {kind}", {"flip_test": kind}) for kind in flips)]:
            asked = argparse.Namespace(**{**vars(args), **flags})
            other = error_of(predict_faces(net, last, data.frames, asked)[0])
            scores |= {f"nme@{name}": float(other.mean()), f"auc@{name}": metrics.auc(other, args.threshold)}
    return scores, errors, points


def how_aligned(args) -> str:
    """What the crops of a set were made from, in words."""
    box = f"the {args.box} box x {args.margin}"
    five = args.five and f"five points of {args.five}" or f"true five points with {args.five_noise:.0%} noise"
    return {"five": five, "two-pass": f"{box}, then five points of the answer", "box": box}[args.align]


def print_table(scores: dict, args, points: int):
    """The columns of Table 5 as rows, with a column for the full set and each subset."""
    print(f"{args.data}: NME by {datasets.norm_kind(args.norm, points)}, FR and AUC at {args.threshold:.2f}, "
          f"aligned by {how_aligned(args)}, decoded by {args.decode}, flip test: {args.flip_test}")
    columns = [key[2:] for key in scores if key == "fr" or key.startswith("fr/")]
    print(" " * 16 + "".join(f"{column[1:] or 'full':>14}" for column in columns))
    for name in ("nme", "fr", "auc"):
        print(f"{name.upper() + ' (%)':16}" +
              "".join(f"{100 * scores[name + column]:>14.2f}" for column in columns))
    side = args.size >> (5 - len(args.strategy))
    print(f"NME of plain faces: {100 * scores['nme/plain']:.2f} %; the argmax of perfect {side} x {side} "
          f"heatmaps has {100 * scores['nme/floor']:.2f} %")
    print(f"NME of the mean landmarks as the answer for every crop: {100 * scores['nme/mean face']:.2f} %; a "
          f"landmark is {192 * scores['spread']:.1f} px (rms, of 192) from its mean")
    for name in (key[4:] for key in scores if key.startswith("nme@")):
        print(f"  {name:18} NME {100 * scores['nme@' + name]:.2f} %, AUC {100 * scores['auc@' + name]:.2f} %")


# ---- Pictures and recognition crops --------------------------------------------------------------

def write_image(path, image: np.ndarray):
    """Writes RGB uint8 (H, W, 3)."""
    if not cv2.imwrite(str(path), image[..., ::-1]):
        raise OSError(f"{path}: the picture could not be written")


def draw_points(image: np.ndarray, points, colour, radius: float) -> np.ndarray:
    """Draws points (N, 2) px on RGB uint8 (H, W, 3), in place, at sub-pixel places."""
    for x, y in np.round(16 * np.asarray(points, np.float64)).astype(int).tolist():  # 4 bits after the point
        cv2.circle(image, (x, y), max(round(16 * radius), 8), colour, -1, cv2.LINE_AA, 4)
    return image


GREEN, RED = (60, 220, 60), (240, 50, 50)


def tile(tiles: list, columns: int) -> np.ndarray:
    """Images of one size side by side, `columns` in a row."""
    tiles = tiles + [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)])


def chosen(data: datasets.CropDataset, count: int) -> list[int]:
    """`count` faces over the whole set."""
    return np.linspace(0, len(data) - 1, min(count, len(data))).astype(int).tolist()


def draw_crop(data: datasets.CropDataset, i: int, side: int, *layers) -> np.ndarray:
    """Crop i, enlarged to `side` px, with (points (P, 2) px of the image, colour) drawn on it."""
    picture = cv2.resize(data.__getitems__([(0, i)])["image"][0].numpy(), (side, side))
    for points, colour in layers:
        places = to_heatmap(warp.apply_affine(data.frames[i], points), data.size / side)
        draw_points(picture, places, colour, side / 160)
    return picture


def draw_predictions(data: datasets.CropDataset, points: torch.Tensor, side: int = 192) -> np.ndarray:
    """24 test crops, truth in green, predictions (M, P, 2) image px in red."""
    return tile([draw_crop(data, i, side, (data.points[i], GREEN), (points[i], RED))
                 for i in chosen(data, 24)], 6)


def draw_alignment(data: datasets.CropDataset, side: int = 192) -> np.ndarray:
    """Fig. 1: 12 test images, each beside its crop, with the true landmarks."""
    tiles = []
    for i in chosen(data, 12):
        height, width = datasets.load_image(data.faces[i].image).shape[:2]
        whole = datasets.square_frames(np.array([[0, 0, width - 1, height - 1]]), side, 1.0)
        whole, layer = datasets.CropDataset([data.faces[i]], whole, side), (data.points[i], GREEN)
        tiles.append(np.concatenate([draw_crop(whole, 0, side, layer), draw_crop(data, i, side, layer)], 1))
    return tile(tiles, 3)


@torch.inference_mode()
def draw_heatmaps(net: HeatmapNet, data: datasets.CropDataset, args, side: int = 256) -> np.ndarray:
    """The highest of all heatmaps over the face, for 8 test faces, and below it where they are read."""
    tiles = []
    for i in chosen(data, 8):
        batch = data.__getitems__([(0, i)])
        heatmaps = net(prepare(batch, net.head.weight.device)).float()
        heat = heatmaps[0].amax(0).clamp(0, 1).cpu().numpy()
        heat = cv2.resize(heat, (side, side), interpolation=cv2.INTER_NEAREST)[..., None]
        warm = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
        points, _ = predict_faces(net, [batch], data.frames[i:i + 1], args)
        over = (draw_crop(data, i, side) * (1 - 0.8 * heat) + warm * 0.8 * heat).astype(np.uint8)
        tiles.append(np.concatenate([over, draw_crop(data, i, side, (points[0], RED))]))
    return tile(tiles, 4)


def write_pictures(folder: Path, net: HeatmapNet, data, errors, points, args):
    """From this run: Fig. 1 (alignment.png), heatmaps.png, predictions.png and the errors (ced.png)."""
    data = recropped(args, data, points) if args.align == "two-pass" else data
    write_image(folder / "alignment.png", draw_alignment(data))
    write_image(folder / "heatmaps.png", draw_heatmaps(net, data, args))
    write_image(folder / "predictions.png", draw_predictions(data, points))
    curves = {name or "full": errors[chosen] for name, chosen in datasets.subsets(data.faces).items()}
    write_image(folder / "ced.png", metrics.ced_plot(curves, args.threshold))


def write_aligned(folder: Path, name: str, image, points: torch.Tensor):
    """Sec. 5.4: the 112 px crop for recognition, NAME.png, of the face with landmarks (P, 2) px of the image,
    and NAME.pts, these landmarks in the crop."""
    frame = warp.fit_similarity(five_of(points), torch.from_numpy(datasets.ARCFACE_5).to(points))
    crop = datasets.CropDataset([datasets.Face(image)], frame[None], 112).__getitems__([(0, 0)])["image"][0]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_image(folder / f"{name}.png", crop.numpy())
    datasets.write_pts(folder / f"{name}.pts", warp.apply_affine(frame, points))


def align_set(net: HeatmapNet, args, folder: Path, split: str):
    """--align-out with --eval: crops of a whole split, as a set of --data folder: SPLIT/IDENTITY/NAME.png."""
    data = make_dataset(args, read_faces(args, split), augmented=False)
    loader = make_loader(args, data, datasets.in_order(len(data), args.batch_size), net.head.weight.device)
    points, _ = predict_set(net, loader, args)
    good, written = faces_among(five_of(points)), set()
    for i in tqdm(good.nonzero()[:, 0].tolist(), f"aligned {split}"):
        image, person = data.faces[i].image, data.faces[i].identity
        on_disk = isinstance(image, (str, os.PathLike))
        stem = os.path.splitext(os.path.relpath(image, args.data_root))[0] if on_disk else f"{i:06d}"
        stem = stem.removeprefix(split + os.sep)
        stem = f"{person}/{Path(stem).name}" if person else stem  # `read_folder` takes a folder for a person
        names = itertools.chain([stem], (f"{stem}.face{k}" for k in itertools.count(2)))
        stem = next(name for name in names if name not in written)  # an image may hold several faces
        written.add(stem)
        write_aligned(folder / split, stem, image, points[i])
    print(f"{len(written)} aligned faces in {folder / split}; left out {len(good) - len(written)} without an "
          f"answer; they were looked for by {how_aligned(args)}")


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

# Flags of the machine or the command, not of the run whose checkpoint is opened; --eval also chooses DATA
# and, where they are given, TEST: how the network is asked.
MACHINE = {"output", "gpus", "device", "workers", "compile", "resume", "eval", "predict",
           "weights", "cache", "init", "given", "detector", "align_out", "compare"}
DATA = {"data", "data_root", "amp", "limit", "norm", "threshold", "batch_size", "five"}
TEST = {"box", "margin", "align", "decode", "kernel", "flip_test", "five_noise"}


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


def build(args, points: int, device: torch.device) -> HeatmapNet:
    """The network that the flags describe, on `device`."""
    net = HeatmapNet(args.backbone, args.strategy, points, args.filters)
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


def check_scheme(args, points: int):
    """Raises ValueError where the flags need to know what the landmarks mean, and nobody does."""
    wants = [cure for cure, wanted in (("add --no-flip-copies", args.flip_copies),
                                       ("add --flip-test none", args.flip_test != "none"),
                                       ("add --align box", args.align != "box"),
                                       ("leave out --align-out", args.align_out)) if wanted]
    if points not in datasets.SCHEMES and wants:
        raise ValueError(f"{points} landmarks are no known scheme ({', '.join(map(str, datasets.SCHEMES))}), "
                         f"so they cannot be mirrored or aligned: {', '.join(wants)}")


def load_weights(net: nn.Module, weights: dict, path) -> None:
    """Gives a network a checkpoint's tensors.   Raises: ValueError for a name or shape that does not fit."""
    own, found = ({name: tuple(getattr(value, "shape", ())) for name, value in tensors.items()}
                  for tensors in (net.state_dict(), weights))
    if wrong := [name for name in own | found if own.get(name) != found.get(name)]:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit the network that its flags describe; the "
                         f"first, {wrong[0]}, is {found.get(wrong[0], 'missing')}, expected "
                         f"{own.get(wrong[0], 'none')}; the file was changed, or is of another version")
    net.load_state_dict(weights)


def open_checkpoint(args, path: str, free: set[str]) -> tuple[HeatmapNet, dict]:
    """A checkpoint's network, in evaluation mode, and its flags. `args` takes these over, but for `free`, the
    typed ones of DATA and TEST, and all of DATA where --data names another set."""
    args.gpus, given = 1, set(args.given)
    device = setup(args)[2]
    state = load(path, "heatmap_landmarks")
    other = "data" in given and args.data != state["args"]["data"]
    restore_args(args, state["args"], MACHINE | free | (TEST & given) | (DATA if other else DATA & given))
    if "head.weight" not in state["model"]:
        raise ValueError(f"{path}: its weights have no head.weight; the file was changed: train anew")
    args.points = len(state["model"]["head.weight"])
    net = build(args, args.points, device)
    load_weights(net, state["model"], path)
    check_scheme(args, args.points)
    return net.eval(), state["args"]


def evaluate_checkpoint(args) -> dict:
    """--eval: the numbers of a checkpoint on the test set of --data; with --output, the pictures too; with
    --align-out, both splits as recognition crops. Data and how the network is asked are those that it was
    trained with, unless flags of DATA or TEST say otherwise."""
    net, _ = open_checkpoint(args, args.eval, set())
    folder = find_run(args, "heatmap_landmarks")
    data = make_dataset(args, read_faces(args, "test"), augmented=False)
    if data.points.shape[1] != net.points:
        raise ValueError(f"--eval {args.eval}: the model has {net.points} landmarks, the faces of --data "
                         f"{args.data} have {data.points.shape[1]}")
    data.divisors(args.norm)
    loader = make_loader(args, data, datasets.in_order(len(data), args.batch_size), net.head.weight.device)
    scores, errors, points = evaluate(net, loader, args, args.compare)
    print_table(scores, args, net.points)
    if folder:
        write_pictures(make_run(args, "heatmap_landmarks", folder), net, data, errors, points, args)
    for split in ("train", "test") if args.align_out else ():
        align_set(net, args, Path(args.align_out), split)
    return scores


def open_detector(path: str):
    """cv2's detector from a YuNet model file.   Raises: ValueError for another kind of file."""
    try:
        return cv2.FaceDetectorYN.create(path, "", (320, 320))
    except cv2.error as error:
        raise ValueError(f"--detector {path}: no YuNet model that OpenCV can read ({error.err})") from None


def find_frames(args, image: np.ndarray, detector) -> tuple[torch.Tensor, int]:
    """Crops of an image's faces, (M, 2, 3) image px -> crop px, and how often the network is to look.
    A detector's five points are aligned at once; a box, or the whole image, is a first guess."""
    height, width = image.shape[:2]
    if detector is not None:
        detector.setInputSize((width, height))
        found = detector.detect(np.ascontiguousarray(image[..., ::-1]))[1]
        found = np.zeros((0, 15)) if found is None else found.astype(np.float64)
        five = torch.from_numpy(found[:, 4:14].reshape(-1, 5, 2))  # behind x y w h; image-left eye first
        five, boxes = five[faces_among(five)], found[found[:, 2:4].min(1, initial=np.inf) > 0, :4]
        if args.align != "box":
            return align_five(five, args.size), 1
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        return torch.from_numpy(datasets.square_frames(boxes, args.size, args.margin)), 2
    whole = args.box in BOXES
    box = [0, 0, width - 1, height - 1] if whole else parse_box(args.box)
    if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
        raise ValueError(f"--box {args.box} lies outside an image of {width} x {height}")
    frames = datasets.square_frames(np.array([box], np.float64), args.size, 1.0 if whole else args.margin)
    return torch.from_numpy(frames), 3 if whole else 2


def find_points(net: HeatmapNet, image: np.ndarray, frame: torch.Tensor, looks: int, args):
    """Landmarks (P, 2) px and confidences (P,) of the face in a crop `frame` (2, 3); after each look but the
    last, the crop is aligned by the answer."""
    frames = frame[None]
    for look in range(looks):
        data = datasets.CropDataset([datasets.Face(image)], frames, args.size)
        points, confidence = predict_faces(net, [data.__getitems__([(0, 0)])], frames, args)
        frames = next_frames(args, points, frames)
    return points[0], confidence[0]


def predict(args) -> dict:
    """--predict: for each face writes its landmarks as NAME.pts, and for each image NAME.png with them drawn,
    those with a confidence below 0.2 in orange; with --align-out DIR also 112 px crops, DIR/NAME.png, .pts.

    Where to look is said by --detector (whose five points align the face), by --box, or is the whole image,
    which the face should fill; after a box the network looks again, at the face aligned by its first answer.
    That answer is only good if the network has seen box crops: --align two-pass or box in its training.
    A further face of an image is NAME.face2.pts and so on. Pixels are taken as stored: turn a photo that has
    an orientation tag.
    Raises: FileNotFoundError for a path without images; ValueError for two images of one name, or one that
        cannot be read; FileExistsError where a result would be written over a file."""
    net, trained = open_checkpoint(args, args.weights, DATA | {"box"})
    detector = open_detector(args.detector) if args.detector else None
    found = datasets.image_paths(args.predict)  # {name: path}
    for name in found:
        if (first := re.sub(r"\.face\d+$", "", name)) != name and first in found:
            raise ValueError(f"{found[name]} has the name of a further face of {found[first]}: rename it")
    datasets.check_images([datasets.Face(path) for path in found.values()])
    args.data = "predict"
    folder, faceless = find_run(args, "heatmap_landmarks"), []
    for target in (folder / f"{name}{end}" for name in found for end in (".pts", ".png")) if folder else ():
        if target.exists():
            raise FileExistsError(f"--output {folder}: {target} exists already; name another folder")
    folder = make_run(args, "heatmap_landmarks", folder)
    if trained["align"] == "five" and not detector:
        print("note: this network has seen no faces but those aligned by five points; in the crop of a box "
              "its answer hardly moves: give --detector, or train with --align two-pass")
    for name, path in tqdm(found.items(), "predict"):
        image = datasets.load_image(path)
        picture, count = image.copy(), 0
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        frames, looks = find_frames(args, image, detector)
        for frame in frames:
            points, confidence = find_points(net, image, frame, looks, args)
            extent = float(np.ptp(points.numpy(), 0).max())
            aligned = args.align != "box" or args.align_out
            if not extent > 1 or aligned and not faces_among(five_of(points[None])):
                continue
            count += 1
            this = name if count == 1 else f"{name}.face{count}"
            if count > 1 and (folder / f"{this}.pts").exists():
                raise FileExistsError(f"{folder / this}.pts exists already; name another folder")
            datasets.write_pts(folder / f"{this}.pts", points)
            if args.align_out:
                write_aligned(Path(args.align_out), this, image, points)
            draw_points(picture, points[confidence >= 0.2], (60, 220, 60), max(1.0, extent / 120))
            draw_points(picture, points[confidence < 0.2], (255, 150, 0), max(1.0, extent / 120))
        write_image(folder / f"{name}.png", picture)
        faceless += [] if count else [path]
    print(f"{len(found) - len(faceless)} images with landmarks in {folder}" +
          (f"; no face found in {len(faceless)}, the first is {faceless[0]}: try --box" if faceless else ""))
    return {}


# ---- Training ------------------------------------------------------------------------------------

def learning_rate(step: int, steps: int, base: float) -> float:
    """Sec. 3.3: a tenth after half of the run and again after three quarters (epochs 20 and 30 of 40)."""
    return base * 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))


def summary(row: dict) -> str:
    """A log's row as a line to read, without the subsets."""
    return ", ".join(f"{key} {100 * value:.2f} %" if key in ("nme", "fr", "auc") else f"{key} {value:.4g}"
                     for key, value in row.items() if key.isidentifier())


def load_sets(args, rank: int) -> tuple[datasets.CropDataset, datasets.CropDataset]:
    """The training set, augmented, and the test set; what can be wrong with them is found here."""
    train, test = read_faces(args, "train"), read_faces(args, "test")
    points = len(train[0].points)
    if len(test[0].points) != points:
        raise ValueError(f"training faces have {points} landmarks, test faces {len(test[0].points)}")
    check_scheme(args, points)
    if args.data == "jd106":
        count, train = len(train), without_copies(train, test)
        if rank == 0 and len(train) < count:
            print(f"left out {count - len(train)} training images that are test images too")
    train_set, test_set = make_dataset(args, train, True), make_dataset(args, test, False)
    test_set.divisors(args.norm)
    if rank == 0:
        print(f"{len(train_set.faces)} training faces ({len(train_set)} an epoch), {len(test_set)} test faces"
              f", {points} landmarks" + ("" if points in datasets.SCHEMES else ", which are no known scheme"))
    return train_set, test_set


def make_model(args, train_set, state: dict | None, device: torch.device, rank: int):
    """The network and its optimizer: new, the same on every rank, or as a checkpoint's `state` has them."""
    seed_all(args.seed)
    faces = [len(train_set), train_set.points.shape[1]]
    if state and state["faces"] != faces:
        raise ValueError(f"--resume: {faces[0]} training faces an epoch of {faces[1]} landmarks, the run was "
                         f"started on {state['faces'][0]} of {state['faces'][1]}; see --data-root")
    net = build(args, faces[1], device)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay)
    side = args.size // net.stride
    report = (f"{args.backbone} + {args.strategy}: {sum(p.numel() for p in net.parameters()):,} parameters, "
              f"heatmaps of {side} x {side}, {device.type}")
    if state:
        load_weights(net, state["model"], Path(args.output, "last.pt"))
        optimizer.load_state_dict(state["optimizer"])
    elif args.init:
        report += "\n" + init_backbone(net.backbone, args.init)
    if rank == 0:
        print(report)
    return net, optimizer


def train(args) -> dict:
    """Trains, evaluates or predicts, as the flags say; returns the numbers of the last evaluation."""
    if args.eval or args.predict:
        return evaluate_checkpoint(args) if args.eval else predict(args)
    # Set-up
    rank, world, device = setup(args)
    folder = find_run(args, "heatmap_landmarks")
    state = load(folder / "last.pt", "heatmap_landmarks") if args.resume else None
    if state:
        restore_args(args, state["args"], MACHINE | ({"data_root"} & set(args.given)))
    # Data and network
    train_set, test_set = load_sets(args, rank)
    net, optimizer = make_model(args, train_set, state, device, rank)
    model = torch.compile(net) if args.compile else net
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    batches = datasets.EpochBatches(len(train_set), args.batch_size, args.seed, rank, world)
    loader = make_loader(args, train_set, batches, device, everywhere=True)
    steps, start, scores, began = len(batches), state["epoch"] if state else 0, {}, time.time()
    if rank == 0:  # only the first process evaluates and writes
        folder = make_run(args, "heatmap_landmarks", folder)
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
                group["lr"] = learning_rate(epoch * steps + step, args.epochs * steps, args.lr)
            image = prepare(batch, device, args.erase > 0 and epoch >= args.erase_from * args.epochs)
            with precision(args, device):
                heatmaps = model(image)
            points = batch["points"].to(device, non_blocking=True)
            loss = heatmap_loss(heatmaps, points, net.stride, args.sigma)
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
                scores, errors, found = evaluate(net, test_loader, args, last and args.compare)
                row |= scores
            row["minutes"] = (time.time() - began) / 60
            bar.write(summary(row))
            write_log(folder / "log.jsonl", **row)
            save(folder / "last.pt", script="heatmap_landmarks", model=net.state_dict(),
                 optimizer=optimizer.state_dict(), epoch=epoch + 1, args=vars(args), world=world,
                 faces=[len(train_set), net.points])
    bar.close()
    # Table and pictures
    if rank == 0:
        if start >= args.epochs:  # it was killed after its last checkpoint
            scores, errors, found = evaluate(net, test_loader, args, args.compare)
        print_table(scores, args, net.points)
        write_pictures(folder, net, test_set, errors, found, args)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return scores


if __name__ == "__main__":
    run(train, parse_args())
