"""SDFL: Structure-Coherent Deep Feature Learning for Robust Face Alignment.

Chunze Lin, Beier Zhu, Quan Wang, Renjie Liao, Chen Qian, Jiwen Lu, Jie Zhou; IEEE Transactions on Image
Processing 30, 2021. https://arxiv.org/abs/1912.04530

The method. A backbone turns a 256 px face into an 8 x 8 feature map. Two convolutions give every landmark
four channels of it, which become the features of one graph node (map-to-node). The graph joins each landmark
to the k landmarks whose coordinates correlate most with its own over the training set; a small network weighs
these edges anew for every image, so that an occluded landmark can be muted. Ten graph convolutions, residual
in pairs, pass features along the edges and end in the coordinates. The loss is a soft wing on the coordinates
and, by the graph's Laplacian, on each landmark's place among its neighbours.

Where each equation is:
  Eq. (1), (2)  correlation, neighbourhood M     neighbour_mask
  Eq. (3), (4)  graph convolution                GraphConv, GraphLayer
  Eq. (5)       graph residual block             GraphBlock
  Eq. (6), (7)  Laplacian                        laplacian
  Eq. (8)       Delta = L P                      sdfl_loss
  Eq. (9)       soft wing                        soft_wing
  Eq. (10)      loss                             sdfl_loss
  Eq. (11)      wing                             wing
  Eq. (12)      NME                              common.metrics.nme

Differs from the paper, or settles what it leaves open ("code" is the authors' repository,
BeierZhu/Sturcture-Coherency-Face-Alignment at 97513e9):
  - sigma in Eq. (4) is taken over the edges of a node only: over the zeros of A as well it would join every
    pair. Code: over the edges, but the dynamic A is transposed afterwards, so that columns sum to 1.
  - One W a graph layer, M as Eq. (2) has it (k + 1 entries a row, not symmetric), dynamic weights: paper.
    Code: two W (self, neighbours), M symmetrised, and in the released model static learned edges.
  - Losses are means over the coordinates: code. Eq. (10) is a sum, 2N times larger, with which lr 0.01 does
    not train. The relative term uses the l(.) of the absolute one: paper. Code: soft wing always.
  - The loss sees coordinates in px of a 256 px crop whatever --size is: so are the constants of Eq. (9).
  - The head's output is added to the training set's mean face, a constant. Paper and code: to zero. All nodes
    share the weights and bias of the last layer, so that each landmark's mean place would have to grow out of
    the batch norms of the node embedding, for tens of epochs. Also for the FC head, which has 2N biases.
  - A crop is the square about the ground-truth landmarks, 1.25 times as wide, cut from the image by a single
    warp; grey 127 outside. Paper: "center-cropped"; code: files cropped beforehand. See --box and --margin.
  - Paper silent, as in the code: z-score of each image and channel; 256 channels in map-to-node, 2N inside
    the weighting network (there with a batch norm); an occluder in half of the images, 20 % of the area,
    aspect 0.4 to 2.5, of one random colour; the absolute value and even bins of the pose balancing.
  - Pose balancing aligns the shapes before it takes the principal component: the paper's [2]. Code: does not.
  - RGB, mirror at x -> W - 1 - x. Code: BGR, W - x. Backbones as torchvision, timm and HRNet lay them out.
  - The last epoch is reported. Code: the best of all epochs on the test set.
  - With --gpus N each process normalises its own share of the batch, as is usual for batch norms.
  - Table V's 5.165 GFLOPs counts a multi-scale node embedding that the paper does not describe; with the
    embedding that it does describe, ResNet34 has 4.918 G multiply-adds in its convolutions.

Train on WFLW on four GPUs (the paper: NME 4.35 %; not run here, see the README):
  python sdfl.py --data wflw --data-root WFLW --gpus 4 --amp --cache device
Without any data, on drawn faces, three minutes on two CPU cores (NME 9.4 %, the mean face 19.2 %):
  python sdfl.py
Continue, evaluate, use:
  python sdfl.py --data wflw --gpus 4 --cache device --resume
  python sdfl.py --data wflw --data-root WFLW --eval runs/sdfl-wflw/last.pt
  python sdfl.py --predict photo.jpg --weights runs/sdfl-wflw/last.pt
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

# Sec. IV-B. The paper names no backbone for its best rows; Table I has HRNetW18C at the 4.35 % of Table II.
PAPER = dict(size=256, epochs=500, batch_size=64, lr=0.01, weight_decay=5e-4, backbone="hrnet_w18", k=3,
             lam=1.0, pdb=9, drops=4, norm="io", threshold=0.10, margin=1.25, eval_every=10)
SMALL = dict(size=128, epochs=30, batch_size=32, drops=2, backbone="mobilenetv2", cache="device")
PRESETS = {
    "wflw": dict(PAPER),  # Table II
    "300w": dict(PAPER),  # Table IV
    "cofw": dict(PAPER),  # Table III, left
    "cofw68": dict(PAPER),  # Table III, right: trained on 300W; --data-root is the folder of both sets
    "helen": dict(PAPER),
    "aflw": dict(PAPER, norm="face"),
    "jd106": dict(PAPER, norm="box", threshold=0.08),  # the challenge's own measure
    "csv": dict(PAPER, norm="auto"),  # HRNet's tables of any set
    "youtube": dict(SMALL),
    "folder": dict(SMALL),
    "faces": dict(SMALL, size=96, batch_size=16, epochs=12, eval_every=3),
}
DRAWN = {"train": 1600, "test": 400}  # faces of --data faces
BOXES = ("landmarks", "face")


def parse_args(argv=None):
    """Flags, with the defaults of the preset that --data names. `args.given` lists what was typed."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--data", default="faces", choices=PRESETS)
    preset = PRESETS[chooser.parse_known_args(argv)[0].data]
    parser = argparse.ArgumentParser(description="Structure-coherent face alignment", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("shared by all scripts").add_argument
    add("--data", default="faces", choices=PRESETS, help="data set, and the preset of all other flags")
    add("--data-root", default="", help="folder of the data set; the README shows the layout of each")
    add("--output", default="", help="folder of the run (default: runs/sdfl-DATA, or the next free number)")
    add("--epochs", type=int, default=30, help="passes over the training set")
    add("--batch-size", type=int, default=64, help="faces a step, over all GPUs")
    add("--lr", type=float, default=0.01, help="learning rate at the start")
    add("--weight-decay", type=float, default=5e-4, help="weight decay, on every parameter")
    add("--gpus", type=int, default=1, help="processes to start, one a GPU; batch norms see their own share")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"], help="auto: a GPU if there is one")
    add("--workers", type=int, default=-1, help="loader processes a GPU; -1: 8 for a GPU, none for a CPU")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    add("--amp", action=switch, default=False, help="bfloat16 convolutions on a GPU; the graph in float32")
    add("--compile", action=switch, default=False, help="torch.compile; minutes at first, then faster")
    add("--limit", type=int, default=0, help="at most so many faces a split (drawn ones: so many), 0: all")
    add("--resume", action="store_true", help="continue the run in --output, or the newest run on this data")
    add("--eval", default="", metavar="CKPT", help="evaluate this checkpoint and stop")
    add("--predict", nargs="+", default=[], metavar="PATH", help="images or folders to find landmarks in")
    add("--weights", default="", metavar="CKPT", help="checkpoint for --predict")
    add("--box", default="landmarks", help="what is cropped: 'landmarks' (their ground-truth box) or 'face' "
        "(the set's own box); with --predict, x0,y0,x1,y1 in pixels")
    add("--cache", default="", help="keep decoded crops: a folder (one file, opened again by the next run), "
        "or 'device' (in the GPU's memory, where the warp then runs; on a CPU in memory)")
    add("--init", default="", metavar="CKPT", help="state dict (torchvision, timm, HRNet) for the backbone")
    add("--size", type=int, default=256, help="side of the crop in px, a multiple of 32")
    add("--margin", type=float, default=1.25, help="side of the crop over the longer side of the box")
    add("--norm", default="auto", choices=["auto", "io", "ip", "box", "face", "io-published"], help="divisor "
        "of the error: inter-ocular, inter-pupil, sqrt(w h) of the landmarks' or the set's box, HELEN's own; "
        "auto: io, else ip or box")
    add("--threshold", type=float, default=0.10, help="NME above which a face fails; upper end of the AUC")
    add("--eval-every", type=int, default=1, help="epochs between evaluations; the last is always evaluated")
    add("--points", type=int, default=68, help="landmarks of the drawn faces; every other set has its own")
    add("--detector", default="", metavar="ONNX", help="YuNet model file, to find the faces of --predict")
    add = parser.add_argument_group("SDFL").add_argument
    add("--backbone", default="resnet34", choices=BACKBONES, help="convolutional network (Table I)")
    add("--head", default="graph", choices=["graph", "fc"], help="graph layers, or the baseline of Table I")
    add("--loss", default="softwing", choices=LOSSES, help="l(.) of Eq. (10), for both of its terms")
    add("--epsilon", type=float, default=0.5, help="curvature of the wing losses (Table VII)")
    add("--lam", type=float, default=1.0, help="lambda of Eq. (10): weight of the relative location loss")
    add("--k", type=int, default=3, help="neighbours of a landmark (Fig. 8); many make the nodes alike")
    add("--adjacency", default="dynamic", choices=["dynamic", "binary"], help="edge weights by face or equal")
    add("--pdb", type=int, default=0, help="bins of pose-based data balancing, 0: none; an epoch gets longer")
    add("--drops", type=int, default=4, help="how often the rate is divided by 5, evenly over the run")
    add("--flip-test", action=switch, default=False, help="average with the prediction of the mirrored image")
    add("--occluder-test", action=switch, default=False, help="Fig. 2: how far occluders move visible points")
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    # argparse fills in no default where the namespace has a value, so what is not None now was typed.
    typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    args.given = sorted(key for key, value in vars(typed).items() if value is not None)
    check_flags(args, parser.error)
    return args


def check_flags(args, error: Callable[[str], None]):
    """Calls `error` with a message for the first flag whose value cannot be meant."""
    wanted = [("size", args.size >= 32 and args.size % 32 == 0, "a multiple of 32, the backbones' stride")]
    wanted += [(name, getattr(args, name) >= least, f"at least {least}") for name, least in [
        ("epochs", 1), ("batch_size", 1), ("gpus", 1), ("limit", 0), ("seed", 0), ("eval_every", 1), ("k", 0),
        ("lam", 0), ("pdb", 0), ("drops", 0), ("weight_decay", 0), ("workers", -1)]]
    wanted += [(name, 0 < getattr(args, name) < math.inf, "more than 0") for name in (
        "lr", "margin", "threshold", "epsilon")]
    for name, holds, what in wanted:
        if not holds:
            error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {what}")
    if args.batch_size % args.gpus:
        error(f"--batch-size {args.batch_size} does not divide over --gpus {args.gpus}")
    if args.box not in BOXES and (not args.predict or parse_box(args.box) is None):
        error(f"--box {args.box}: expected landmarks or face, with --predict x0,y0,x1,y1 in pixels, x0 < x1, "
              f"y0 < y1 (written --box=-5,... where x0 is negative)")
    for name in ("init", "detector"):
        if getattr(args, name) and not os.path.isfile(getattr(args, name)):
            error(f"--{name}: no file {getattr(args, name)}")
    if bool(args.predict) != bool(args.weights):
        error("--predict PATH and --weights CKPT belong together: images, and a checkpoint of this script")
    if args.eval and (args.predict or args.resume):
        error("--eval goes neither with --predict nor with --resume")
    if args.detector and not args.predict:
        error("--detector belongs to --predict")


def parse_box(text: str) -> list[float] | None:
    """The numbers of "x0,y0,x1,y1" if they are a box."""
    try:
        x0, y0, x1, y1 = map(float, text.split(","))
    except ValueError:
        return None
    return [x0, y0, x1, y1] if -math.inf < x0 < x1 < math.inf and -math.inf < y0 < y1 < math.inf else None


# ---- Backbones: Table I --------------------------------------------------------------------------

# Table I's eight networks, each up to its last map: image (B, 3, H, W) -> (B, channels, H/32, W/32), H and W
# multiples of 32. Parameters are named as in the usual checkpoints (torchvision's; timm's for Res2Net; its
# authors' for HRNet), which load by name once the layers behind that map are dropped. Paper: from scratch.


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
            if m.bias is not None:  # VGG's; and squeeze-excitation's, whose gates so start about half open
                nn.init.zeros_(m.bias)
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


class Bottle2neck(nn.Module):
    """Bottleneck whose 3x3 is one on each of 4 splits: (B, cin, H, W) -> (B, 4 planes, H/stride, W/stride).
    Splits 2 and 3 first add the output of the split before; split 4 passes as it is. The first block of a
    stage, where outputs are smaller than splits if it strides, adds nothing and average-pools split 4.
    Source: Gao et al., "Res2Net", TPAMI 2021, Fig. 2b. 26w_4s: 4 splits of 26 channels at planes = 64."""
    expansion = 4

    def __init__(self, cin: int, planes: int, stride: int = 1):
        super().__init__()
        width, self.stride, self.first = planes * 26 // 64, stride, stride > 1 or cin != 4 * planes
        self.conv1, self.bn1 = conv(cin, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.convs = nn.ModuleList(conv(width, width, 3, stride) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.conv3, self.bn3 = conv(4 * width, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.downsample = conv_bn(cin, 4 * planes, 1, stride) if self.first else nn.Identity()

    def forward(self, x):
        *splits, last = F.relu(self.bn1(self.conv1(x)), inplace=True).chunk(4, dim=1)  # 4 of (B, width, H, W)
        outs = []
        for split, conv3x3, bn in zip(splits, self.convs, self.bns):
            split = split if self.first or not outs else split + outs[-1]
            outs.append(F.relu(bn(conv3x3(split)), inplace=True))             # (B, width, H/stride, W/stride)
        outs.append(F.avg_pool2d(last, 3, self.stride, 1) if self.first else last)
        out = self.bn3(self.conv3(torch.cat(outs, dim=1)))
        return F.relu(out + self.downsample(x), inplace=True)


class ResNet(nn.Module):
    """7x7 stem and four stages of `depths` blocks: (B, 3, H, W) -> (B, 512 expansion, H/32, W/32).
    Source: He et al., CVPR 2016, Table 1. Code: batch-norm momentum 0.01 in stem and shortcuts; here 0.1."""

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


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate in (0, 1) made of the means of all: (B, C, H, W) -> the same.
    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018; SiLU for ReLU as in EfficientNet."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        hidden = F.silu(self.fc1(x.mean((2, 3), keepdim=True)), inplace=True)  # (B, squeezed, 1, 1)
        return x * self.fc2(hidden).sigmoid()


class MBConv(nn.Module):
    """Inverted residual with squeeze-excitation: (B, cin, H, W) -> (B, cout, H/stride, W/stride). In training
    an image skips a residual block with chance `drop` (stochastic depth: Huang et al., ECCV 2016).
    Source: Tan & Le, "EfficientNet", ICML 2019, Sec. 4 and the authors' code."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, expand: int, drop: float):
        super().__init__()
        hidden, self.drop, self.residual = cin * expand, drop, stride == 1 and cin == cout
        widen = [conv_bn(cin, hidden, 1, act=nn.SiLU)] if expand > 1 else []
        depthwise = conv_bn(hidden, hidden, kernel, stride, groups=hidden, act=nn.SiLU)
        squeeze = SqueezeExcitation(hidden, cin // 4)  # a quarter of the input width, not of the hidden
        self.block = nn.Sequential(*widen, depthwise, squeeze, conv_bn(hidden, cout, 1))

    def forward(self, x):
        out = self.block(x)
        if self.training and self.residual and self.drop > 0:
            keep = 1 - self.drop  # divided out: evaluation, which drops none, then has the same expectation
            out = out * out.new_empty(len(out), 1, 1, 1).bernoulli_(keep).div_(keep)
        return x + out if self.residual else out


class Features(nn.Module):
    """A chain of layers under the name `features`: (B, 3, H, W) -> (B, channels, H/32, W/32)."""

    def __init__(self, layers: Sequence[nn.Module], channels: int):
        super().__init__()
        self.features, self.channels = nn.Sequential(*layers), channels
        init_weights(self)

    def forward(self, image):
        return self.features(image)


def mobilenetv2() -> Features:
    """Sandler et al., CVPR 2018, Table 2, without the last 1x1 convolution, to 1280 channels (as code)."""
    cin, layers = 32, [conv_bn(3, 32, 3, 2, act=nn.ReLU6)]
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
             (6, 320, 1, 1))
    for expand, cout, depth, stride in table:
        for i in range(depth):
            layers.append(InvertedResidual(cin, cout, 1 if i else stride, expand))
            cin = cout
    return Features(layers, 320)


def efficientnet(depths: Sequence[int]) -> Features:
    """Tan & Le, ICML 2019, Table 1, `depths` blocks in the 7 stages; with the last 1x1 convolution (1280).
    Padding is symmetric; code: TensorFlow's, with a strided layer's odd row and column below and right."""
    cin, done, layers = 32, 0, [conv_bn(3, 32, 3, 2, act=nn.SiLU)]
    table = ((1, 3, 16, 1), (6, 3, 24, 2), (6, 5, 40, 2), (6, 3, 80, 2), (6, 5, 112, 1), (6, 5, 192, 2),
             (6, 3, 320, 1))
    for (expand, kernel, cout, stride), depth in zip(table, depths):
        blocks = []
        for i in range(depth):
            drop = 0.2 * done / sum(depths)  # rises with depth: all later blocks build on an early one
            blocks.append(MBConv(cin, cout, kernel, 1 if i else stride, expand, drop))
            cin, done = cout, done + 1
        layers.append(nn.Sequential(*blocks))
    return Features([*layers, conv_bn(320, 1280, 1, act=nn.SiLU)], 1280)


def vgg16() -> Features:
    """Simonyan & Zisserman, ICLR 2015, Table 1 column D, all five max-pools; with batch norm (as code)."""
    cin, layers = 3, []
    for cout, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):  # the bias, useless before a batch norm, is there because checkpoints have it
            layers += [nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]
            cin = cout
        layers.append(nn.MaxPool2d(2))
    return Features(layers, 512)


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
    """HRNetV2-W18: (B, 3, H, W) -> (B, 270, H/32, W/32), branches of 18 to 144 channels at strides 4 to 32.
    All are brought to stride 32 (Sec. IV-B): bilinearly, without a filter against aliasing (code).
    Source: Wang et al., TPAMI 2021. HRNet's code: batch-norm momentum 0.01; here 0.1."""

    def __init__(self, widths: Sequence[int] = (18, 36, 72, 144)):
        super().__init__()
        self.channels = sum(widths)
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
        size = xs[-1].shape[-2:]                                               # (H/32, W/32)
        xs[:-1] = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in xs[:-1]]
        return torch.cat(xs, dim=1)                                            # (B, 270, H/32, W/32)


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "mobilenetv2": mobilenetv2,
    "efficientnet_b0": lambda: efficientnet((1, 2, 2, 3, 3, 4, 1)),
    "efficientnet_b1": lambda: efficientnet((2, 3, 3, 4, 4, 5, 2)),            # 1.1 times as deep, rounded up
    "vgg16": vgg16,
    "resnet18": lambda: ResNet(BasicBlock, (2, 2, 2, 2)),
    "resnet34": lambda: ResNet(BasicBlock, (3, 4, 6, 3)),
    "res2net50": lambda: ResNet(Bottle2neck, (3, 4, 6, 3)),
    "hrnet_w18": HRNet,
}


# ---- Network: Sec. III-A to III-C, Fig. 3 and 5 --------------------------------------------------

EXPANSION = 4  # n of Sec. III-A: channels of the feature map that become one node


def neighbour_mask(landmarks: torch.Tensor, k: int) -> torch.Tensor:
    """The neighbourhood M of Eq. (2): each landmark's k most correlated others, and itself.

    Args: landmarks (M, N, 2), the training set in a common frame (crops, before augmentation: in the images'
        own pixels every landmark correlates with every other). k: 0 <= k < N.
    Returns: (N, N) bool, True on the diagonal, k + 1 True in each row; in general not symmetric.
    Raises: ValueError for fewer than 2 images, k out of range, or a landmark that never moves in x nor in y.
        One that moves in x or y only (a crop's box can pin the other) is uncorrelated there, with a warning.
    """
    count, points = landmarks.shape[:2]
    if count < 2:
        raise ValueError(f"neighbours are mined from landmarks of at least 2 training images, found {count}")
    if not 0 <= k < points:
        raise ValueError(f"--k {k}: expected 0 to {points - 1}, one less than the {points} landmarks")
    centred = landmarks.double() - landmarks.double().mean(0)  # (M, N, 2)
    if not centred.isfinite().all():
        raise ValueError("the training landmarks hold values that are not finite")
    scale = centred.norm(dim=0)  # (N, 2)
    still = scale <= 1e-9 * landmarks.double().abs().amax().clamp(min=1) * math.sqrt(count)
    if still.all(1).any():
        raise ValueError(f"landmark {int(still.all(1).nonzero()[0])} has the same place in all {count} "
                         f"training images, so it has no neighbours; check the annotation, or train on more")
    if still.any():
        warnings.warn(f"landmark {int(still.any(1).nonzero()[0])} is constant in one coordinate over the "
                      f"training set: taken as correlation 0 there", stacklevel=2)
    unit = torch.where(still, 0, centred / scale).permute(2, 1, 0)  # (2, N, M): zero mean, length 1
    correlation = unit @ unit.mT  # (2, N, N): Pearson's C_x and C_y
    correlation = correlation.abs().mean(0)  # Eq. (1): C = (abs(C_x) + abs(C_y)) / 2
    # Eq. (2): the k + 1 largest of each row. A landmark is its own first, so that ties cannot displace it.
    correlation.fill_diagonal_(math.inf)
    nearest = correlation.argsort(dim=1, descending=True, stable=True)[:, :k + 1]
    return torch.zeros(points, points, dtype=torch.bool, device=landmarks.device).scatter_(1, nearest, True)


class MapToNode(nn.Module):
    """Sec. III-A: feature map -> node features, by two blocks of convolution, batch norm and ReLU.
    (B, C, h, w) -> (B, 4N, h, w); node i owns channels 4i to 4i + 3, so `.reshape(B, N, -1)` is H^0."""

    def __init__(self, in_channels: int, points: int):
        super().__init__()
        self.blocks = nn.Sequential(conv_bn(in_channels, 256, 3, act=nn.ReLU),
                                    conv_bn(256, EXPANSION * points, 3, act=nn.ReLU))  # 256: code

    def forward(self, features):
        return self.blocks(features)


class DynamicAdjacency(nn.Module):
    """Sec. III-B: a weight for each edge of M from the image: global average pooling and two linear layers.
    (B, 4N, h, w) -> sigma(A) (B, N, N), the softmax over a row's edges: rows sum to 1, the rest is 0."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.points, nodes = len(mask), EXPANSION * len(mask)
        self.register_buffer("edges", mask.flatten().nonzero()[:, 0])  # row by row, in the flattened matrix
        # Hidden width: code, which has a batch norm behind it as well.
        self.mlp = nn.Sequential(nn.Linear(nodes, nodes // 2), nn.ReLU(inplace=True),
                                 nn.Linear(nodes // 2, len(self.edges)))

    def forward(self, maps):
        a = self.mlp(maps.mean((2, 3)))  # (B, edges)
        A = a.new_full((len(a), self.points**2), -math.inf)
        A = A.index_copy(1, self.edges, a).view(-1, self.points, self.points)
        return A.softmax(dim=2)


class GraphConv(nn.Module):
    """sigma(A) H W of Eq. (4): (B, N, in), (B, N, N) -> (B, N, out); all nodes share `.weight` (in, out)."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(in_features, out_features)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, nodes, sigma_A):
        nodes = sigma_A @ (nodes @ self.weight)  # H W first: out_features is never the larger side
        return nodes if self.bias is None else nodes + self.bias


class GraphLayer(nn.Module):
    """Eq. (3): H^(l+1) = f(H^l, A), a graph convolution, then batch norm over images and nodes, then ReLU."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.conv, self.norm = GraphConv(in_features, out_features, bias=False), nn.BatchNorm1d(out_features)

    def forward(self, nodes, sigma_A):
        # Eq. (4): H^(l+1) = psi(sigma(A) H^l W^l), psi = batch norm and ReLU
        return F.relu(self.norm(self.conv(nodes, sigma_A).flatten(0, 1))).view(*nodes.shape[:2], -1)


class GraphBlock(nn.Module):
    """Eq. (5): two graph layers and the identity; nothing after the addition."""

    def __init__(self, features: int):
        super().__init__()
        self.first, self.second = GraphLayer(features, features), GraphLayer(features, features)

    def forward(self, nodes, sigma_A):
        # Eq. (5): H^(l+1) = f(H^l, A);  H^(l+2) = f(H^(l+1), A) + H^l
        return self.second(self.first(nodes, sigma_A), sigma_A) + nodes


class GraphHead(nn.Module):
    """Fig. 3 right of the backbone, and Fig. 5: map-to-node, a graph layer, four blocks, a graph convolution.
    (B, C, h, w), `cells` = h w -> (B, N, 2) px of a 256 px crop, from the mean face on; one softmax of A."""

    def __init__(self, in_channels: int, mask: torch.Tensor, cells: int, dynamic: bool = True):
        super().__init__()
        features = 128  # Sec. IV-B
        self.map_to_node = MapToNode(in_channels, len(mask))
        self.adjacency = DynamicAdjacency(mask) if dynamic else None
        if not dynamic:  # Table VI's binary adjacency: the softmax of equal weights
            self.register_buffer("uniform", mask / mask.sum(1, keepdim=True))
        self.first = GraphLayer(EXPANSION * cells, features)
        self.blocks = nn.ModuleList(GraphBlock(features) for _ in range(4))
        self.last = GraphConv(features, 2, bias=True)

    def forward(self, features):
        maps = self.map_to_node(features)  # (B, 4N, h, w)
        with torch.autocast(maps.device.type, enabled=False):  # bfloat16 rounds 200 px to a whole pixel
            maps = maps.float()
            sigma_A = self.adjacency(maps) if self.adjacency else self.uniform.expand(len(maps), -1, -1)
            nodes = maps.reshape(len(maps), sigma_A.shape[1], -1)  # (B, N, 4hw)
            nodes = self.first(nodes, sigma_A)  # (B, N, 128)
            for block in self.blocks:
                nodes = block(nodes, sigma_A)
            return self.last(nodes, sigma_A)  # (B, N, 2)


class FCHead(nn.Module):
    """Table I's baseline: feature map (B, C, h, w) -> 256 units with ReLU -> (B, N, 2) px, like GraphHead."""

    def __init__(self, in_channels: int, points: int, cells: int):
        super().__init__()
        self.hidden, self.last = nn.Linear(in_channels * cells, 256), nn.Linear(256, 2 * points)

    def forward(self, features):
        hidden = F.relu(self.hidden(features.flatten(1)))
        with torch.autocast(hidden.device.type, enabled=False):  # coordinates in float32, as in GraphHead
            return self.last(hidden.float()).unflatten(1, (-1, 2))


class SDFL(nn.Module):
    """Fig. 3: image (B, 3, size, size), normalised -> landmarks (B, N, 2) in px of the crop.

    Args: backbone, a name of BACKBONES; mask (N, N) bool, a buffer, so that a checkpoint brings its graph
        along; size, the crop's side in px; head, "graph" or "fc"; dynamic, edge weights by image or equal.
    Buffer: mean_face (N, 2) px of a 256 px crop, to which the head adds; until it is set, the crop's middle.
    Raises: ValueError for a backbone or head that does not exist.
    """

    def __init__(self, backbone: str, mask: torch.Tensor, size: int = 256, head: str = "graph",
                 dynamic: bool = True):
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone {backbone!r}: expected one of {', '.join(BACKBONES)}")
        if head not in ("graph", "fc"):
            raise ValueError(f"head {head!r}: expected 'graph' or 'fc'")
        self.size, cells = size, (size // 32) ** 2
        self.register_buffer("mask", mask)
        self.register_buffer("mean_face", torch.full((len(mask), 2), 127.5))
        self.backbone = BACKBONES[backbone]()
        self.head = GraphHead(self.backbone.channels, mask, cells, dynamic) if head == "graph" else \
            FCHead(self.backbone.channels, len(mask), cells)

    def forward(self, image):
        return (self.mean_face + self.head(self.backbone(image))) * (self.size / 256)


# ---- Loss: Sec. III-D ----------------------------------------------------------------------------

def laplacian(mask: torch.Tensor) -> torch.Tensor:
    """Uniform Laplacian L of Eq. (7) for M (N, N): (N, N) float32. Rows sum to 0, to 1 without neighbours."""
    neighbours = mask.float()
    neighbours.fill_diagonal_(0)  # N_i holds the others only: k of them
    omega = neighbours / neighbours.sum(1, keepdim=True).clamp(min=1)  # omega_ij = 1 / |N_i|
    # Eq. (7), and row i of L P is Eq. (6): delta_i = p_i - sum_j omega_ij p_j
    return torch.eye(len(mask), device=mask.device) - omega


def soft_wing(x: torch.Tensor, omega1: float = 2.0, omega2: float = 20.0, eps: float = 0.5) -> torch.Tensor:
    """Soft wing loss of each element of x, px of a 256 px crop: linear below omega1, a logarithm above."""
    x = x.abs()
    B = omega1 - omega2 * math.log(1 + omega1 / eps)
    return torch.where(x < omega1, x, omega2 * torch.log1p(x / eps) + B)  # Eq. (9)


def wing(x: torch.Tensor, omega: float = 20.0, eps: float = 0.5) -> torch.Tensor:
    """Wing loss [2] of every element of x, in px of a 256 px crop; omega as in Fig. 6."""
    x = x.abs()
    C = omega - omega * math.log(1 + omega / eps)
    return torch.where(x < omega, omega * torch.log1p(x / eps), x - C)  # Eq. (11)


LOSSES = {"softwing": soft_wing, "wing": wing, "l1": lambda x, eps=None: x.abs()}


def sdfl_loss(pred: torch.Tensor, target: torch.Tensor, L: torch.Tensor, lam: float, loss) -> torch.Tensor:
    """The overall loss, a scalar: the mean over images and coordinates of both terms.

    Args: pred, target (B, N, 2) px of a 256 px crop; L (N, N) of `laplacian`; lam, the weight lambda; loss, a
        callable on (B, N, 2) that works on every element (`soft_wing`, `wing`, abs).
    """
    error = pred - target
    relative = L @ error  # Eq. (8): Delta = L P, and hence L P^ - L P = L (P^ - P)
    return loss(error).mean() + lam * loss(relative).mean()  # Eq. (10)


# ---- Data: augmentation and pose balancing of Sec. IV-B ------------------------------------------

ROTATION, ZOOM, SHIFT, HIDDEN = 40.0, 0.10, 30 / 256, 0.20  # degrees; of 1; of the crop's side; of its area
# How far beyond the crop its own corners can come to lie: rotated by 40 degrees, shifted, zoomed out.
REACH = math.sqrt(2) * math.cos(math.radians(45 - ROTATION)) * (1 + 2 * SHIFT) / (1 - ZOOM)


def augment(rng: np.random.Generator, size: int):
    """Draws rotation, scale, shift, mirror and an occluding rectangle for one face.
    Returns: matrix (2, 3) crop px -> crop px; whether to mirror; {"occluder": (7,) x0 y0 x1 y1 px r g b}."""
    angle, zoom = math.radians(rng.uniform(-ROTATION, ROTATION)), rng.uniform(1 - ZOOM, 1 + ZOOM)
    c, s, middle = zoom * math.cos(angle), zoom * math.sin(angle), (size - 1) / 2
    shift = rng.uniform(-SHIFT, SHIFT, 2) * size
    matrix = np.array([[c, s, middle - (c + s) * middle + shift[0]],
                       [-s, c, middle - (c - s) * middle + shift[1]]])
    mirror, hide = rng.random(2) < 0.5
    aspect, x, y = rng.uniform(0.4, 2.5), *rng.uniform(0, size, 2)
    w, h = size * math.sqrt(HIDDEN * aspect) / 2, size * math.sqrt(HIDDEN / aspect) / 2
    colour = rng.integers(0, 256, 3)
    occluder = np.array([x - w, y - h, x + w, y + h, *colour]) if hide else np.full(7, -1.0)
    return matrix, mirror, {"occluder": occluder}


def prepare(batch: dict, device: torch.device) -> torch.Tensor:
    """Network input (B, 3, H, W) from a batch: occluded if it says so, each image and channel z-scored."""
    image = batch["image"].to(device, non_blocking=True)
    if image.dtype == torch.uint8:  # (B, H, W, 3) of the loader; permuted, it is channels_last as it stands
        image = image.permute(0, 3, 1, 2).float()
    if "occluder" in batch:
        image = occlude(image, batch["occluder"].to(device, non_blocking=True))
    std, mean = torch.std_mean(image, (2, 3), correction=0, keepdim=True)
    return ((image - mean) / std.clamp(min=1e-6)).contiguous(memory_format=torch.channels_last)


def occlude(image: torch.Tensor, occluder: torch.Tensor) -> torch.Tensor:
    """Fills the rectangles (B, 7) x0 y0 x1 y1 r g b of images (B, 3, H, W) in 0..255."""
    y, x = (torch.arange(n, device=image.device, dtype=torch.float32) for n in image.shape[2:])
    x0, y0, x1, y1 = occluder[:, :4, None].unbind(1)  # (B, 1) each
    columns, rows = (x >= x0) & (x < x1), (y >= y0) & (y < y1)  # (B, W), (B, H)
    return torch.where(columns[:, None, None] & rows[:, None, :, None], occluder[:, 4:, None, None], image)


def pose_bins(landmarks: torch.Tensor, bins: int) -> torch.Tensor:
    """Pose bins of the pose-based data balancing [2]: (M, N, 2) -> (M,) long in 0..bins - 1.

    Shapes are aligned to their mean by similarities (Procrustes), projected on the first principal component,
    for faces the yaw, and binned evenly by its absolute value: its sign means nothing, and a mirror flips it.
    """
    shapes = landmarks.double()
    shapes = shapes - shapes.mean(1, keepdim=True)
    mean = shapes[0]
    for _ in range(5):  # the mean shape settles within two or three rounds
        aligned = warp.apply_affine(warp.fit_similarity(shapes, mean.expand_as(shapes)), shapes)
        mean = aligned.mean(0)
        mean = (mean - mean.mean(0)) / mean.norm() * shapes[0].norm()  # or it would shrink every round
    flat = (aligned - aligned.mean(0)).flatten(1)  # (M, 2N)
    component = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -1]
    score = (flat @ component).abs()
    edges = torch.linspace(float(score.min()), float(score.max()), bins + 1, dtype=score.dtype)
    return torch.bucketize(score, edges[1:-1], right=True)


def balanced(landmarks: torch.Tensor, bins: int) -> np.ndarray:
    """Index (L,) repeating faces of rare poses until each bin is about as full as the fullest, after [2]."""
    bin_of = pose_bins(landmarks, bins).numpy()
    size = np.bincount(bin_of, minlength=bins)
    copies = np.round(size.max() / np.maximum(size, 1)).astype(int)[bin_of]
    return np.repeat(np.arange(len(bin_of)), copies)


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
    scheme = datasets.SCHEMES.get(len(faces[0].points))
    if not augmented:
        return datasets.CropDataset(faces, frames, args.size)
    data = datasets.CropDataset(faces, frames, args.size, augment, REACH, 1 + ZOOM, scheme and scheme.flip,
                                args.seed)
    if args.pdb:
        index = balanced(data.crop_points(), args.pdb)
        data.rows = np.stack([index, np.zeros_like(index)], 1)
    return data


# ---- Evaluation: Sec. IV-A -----------------------------------------------------------------------

@torch.inference_mode()
def predict_points(net: SDFL, image: torch.Tensor, flip=None) -> torch.Tensor:
    """Points (B, N, 2) px of prepared crops; with a `flip` permutation, averaged with the mirrored crop's."""
    pred = net(image).float()
    if flip is not None:
        mirrored = net(image.flip(3)).float()
        mirrored[..., 0] = net.size - 1 - mirrored[..., 0]
        pred = (pred + mirrored[:, torch.as_tensor(flip, device=pred.device)]) / 2
    return pred


def flip_of(args, points: int):
    """The permutation for --flip-test, or None without the flag or without a known scheme."""
    return datasets.SCHEMES[points].flip if args.flip_test and points in datasets.SCHEMES else None


@torch.inference_mode()
def occluder_test(net: SDFL, loader, args, shares=(0.05, 0.1, 0.2, 0.3, 0.4)) -> dict:
    """Fig. 2: how far predictions of visible points move when a grey square hides `shares` of a crop's area.

    The square is about one of the face's landmarks, for every model the same; points outside it are visible.
    Returns: {"moved@0.2": ..., ...}, means over visible points, as fractions of d in Eq. (12).
    """
    net.eval()
    device, data = net.mask.device, loader.dataset
    moved, seen, d = dict.fromkeys(shares, 0.0), dict.fromkeys(shares, 0.0), data.divisors(args.norm)
    for batch in loader:
        points, index = batch["points"].to(device), batch["index"]
        scale = (batch["matrix"][:, 0, :2].norm(dim=1) * d[index].float()).to(device)  # d in px of the crop
        centre = points[torch.arange(len(index)), (7 * index) % points.shape[1]]
        with precision(args, device):
            clean = predict_points(net, prepare(batch, device))
        for share in shares:
            half = math.sqrt(share) * args.size / 2
            square = torch.cat([centre - half, centre + half, centre.new_full((len(centre), 3), 127)], 1)
            with precision(args, device):
                hidden = predict_points(net, prepare(batch | {"occluder": square}, device))
            visible = ((points - centre[:, None]).abs().amax(2) > half).float()
            moved[share] += float(((hidden - clean).norm(dim=2) / scale[:, None] * visible).sum())
            seen[share] += float(visible.sum())
    return {f"moved@{share}": moved[share] / max(seen[share], 1) for share in shares}


def evaluate(net: SDFL, loader, args, occlude: bool = False) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """NME, FR and AUC in the pixels of the images, over the test set and its subsets.

    Args: loader, in order, of a CropDataset without augmentation; occlude, add the scores of `occluder_test`.
    Returns: fractions "nme", "fr", "auc", "auc20" (authors' 20 steps), "nme/pose", ... and "nme/mean face"
        (as a constant answer) by name; the NME of each face (M,); the predictions (M, N, 2) px of the images.
    """
    net.eval()
    device, data = net.mask.device, loader.dataset
    with precision(args, device):
        pred = torch.cat([predict_points(net, prepare(batch, device), flip_of(args, len(net.mask))).cpu()
                          for batch in loader])
    target, d, back = data.points, data.divisors(args.norm), warp.invert(data.frames)  # crop px -> image px
    points = warp.apply_affine(back, pred.double())
    errors, scores = metrics.nme(points, target, d), {}  # Eq. (12)
    for subset, chosen in datasets.subsets(data.faces).items():
        end = f"/{subset}" if subset else ""
        scores |= {f"nme{end}": float(errors[chosen].mean()),
                   f"fr{end}": metrics.failure_rate(errors[chosen], args.threshold),
                   f"auc{end}": metrics.auc(errors[chosen], args.threshold),
                   f"auc20{end}": metrics.auc_steps(errors[chosen])}
    constant = warp.apply_affine(back, (net.mean_face.cpu().double() * (net.size / 256)).expand_as(target))
    scores["nme/mean face"] = float(metrics.nme(constant, target, d).mean())
    return scores | (occluder_test(net, loader, args) if occlude else {}), errors, points


def print_table(scores: dict, args, points: int):
    """The rows of Tables II to IV: a column for the full set and each subset, in the papers' order."""
    print(f"{args.data}: NME by {datasets.norm_kind(args.norm, points)}, FR and AUC at {args.threshold:.2f}, "
          f"crop {args.box} x {args.margin}" + (", flip test" if args.flip_test else ""))
    columns = [key[2:] for key in scores if key == "fr" or key.startswith("fr/")]
    print(" " * 16 + "".join(f"{column[1:] or 'full':>14}" for column in columns))
    rows = [("NME (%)", "nme", 100, 2), ("FR (%)", "fr", 100, 2), ("AUC", "auc", 1, 4)]
    rows += [("AUC as Table II", "auc20", 1, 4)] * (args.data == "wflw")
    for title, name, scale, digits in rows:
        print(f"{title:16}" + "".join(f"{scale * scores[name + column]:>14.{digits}f}" for column in columns))
    print(f"NME of a constant mean face: {100 * scores['nme/mean face']:.2f} %")
    moved = {float(key[6:]): value for key, value in scores.items() if key.startswith("moved@")}
    if moved:
        print("visible points moved by an occluder (% of d): " +
              ", ".join(f"{100 * value:.2f} at {share:.0%}" for share, value in moved.items()))


# ---- Pictures ------------------------------------------------------------------------------------

def write_image(path, image: np.ndarray):
    """Writes RGB uint8 (H, W, 3)."""
    if not cv2.imwrite(str(path), image[..., ::-1]):
        raise OSError(f"{path}: the picture could not be written")


def draw_points(image: np.ndarray, points, colour, radius: float) -> np.ndarray:
    """Draws points (N, 2) px on RGB uint8 (H, W, 3), in place, at sub-pixel places."""
    for x, y in np.round(16 * np.asarray(points, np.float64)).astype(int).tolist():  # 4 bits after the point
        cv2.circle(image, (x, y), max(round(16 * radius), 8), colour, -1, cv2.LINE_AA, 4)
    return image


def draw_graph(mask: torch.Tensor, mean_face: torch.Tensor, side: int = 640) -> np.ndarray:
    """Fig. 4: the adjacency matrix, and beside it its edges on the mean face (N, 2) px of a 256 px crop."""
    cells = np.repeat(255 - 255 * mask.cpu().numpy().astype(np.uint8)[..., None], 3, 2)
    matrix = cv2.resize(cells, (side, side), interpolation=cv2.INTER_NEAREST)
    cv2.rectangle(matrix, (0, 0), (side - 1, side - 1), (160, 160, 160))
    face, places = np.full((side, side, 3), 255, np.uint8), (mean_face.cpu().numpy() + 0.5) * side / 256 - 0.5
    for i, j in mask.cpu().nonzero().tolist():
        ends = [tuple(np.round(16 * places[n]).astype(int).tolist()) for n in (i, j)]
        cv2.line(face, *ends, (90, 140, 220), 1, cv2.LINE_AA, 4)
    return np.concatenate([matrix, draw_points(face, places, (200, 40, 40), 3)], 1)


def draw_predictions(data: datasets.CropDataset, points: torch.Tensor, side: int = 192) -> np.ndarray:
    """Fig. 7: 24 test crops over the whole set, truth in green, predictions (M, N, 2) image px in red."""
    tiles = []
    for i in np.linspace(0, len(data) - 1, min(24, len(data))).astype(int).tolist():
        tile = cv2.resize(data.__getitems__([(0, i)])["image"][0].numpy(), (side, side))
        to_tile = lambda p: (warp.apply_affine(data.frames[i], p) + 0.5) * side / data.size - 0.5
        draw_points(tile, to_tile(data.points[i]), (60, 220, 60), side / 160)
        tiles.append(draw_points(tile, to_tile(points[i]), (240, 50, 50), side / 160))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % 6)
    return np.concatenate([np.concatenate(tiles[i:i + 6], 1) for i in range(0, len(tiles), 6)])


def write_pictures(folder: Path, net: SDFL, data, errors, points, threshold: float):
    """What the paper's figures show, from this run: graph.png, predictions.png, ced.png."""
    write_image(folder / "graph.png", draw_graph(net.mask, net.mean_face))
    write_image(folder / "predictions.png", draw_predictions(data, points))
    curves = {name or "full": errors[chosen] for name, chosen in datasets.subsets(data.faces).items()}
    write_image(folder / "ced.png", metrics.ced_plot(curves, threshold))


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
           "weights", "cache", "init", "given", "detector"}
DATA = {"data", "data_root", "amp", "limit", "norm", "threshold", "batch_size", "flip_test", "occluder_test"}


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


def build(args, mask: torch.Tensor, device: torch.device) -> SDFL:
    """The network that the flags describe, on `device`."""
    net = SDFL(args.backbone, mask, args.size, args.head, args.adjacency == "dynamic")
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


def open_checkpoint(args, path: str, free: set[str]) -> tuple[SDFL, dict]:
    """A checkpoint's network, in evaluation mode, and its flags. `args` takes these over, but for `free`, the
    typed ones of DATA, and all of DATA where --data names another set."""
    args.gpus = 1
    device = setup(args)[2]
    state = load(path, "sdfl")
    given = set(args.given)
    other = "data" in given and args.data != state["args"]["data"]
    restore_args(args, state["args"], MACHINE | free | (DATA if other else DATA & given))
    if "mask" not in state["model"]:
        raise ValueError(f"{path}: its weights have no mask of neighbours; the file was changed: train anew")
    net = build(args, state["model"]["mask"], device)
    load_weights(net, state["model"], path)
    args.points = len(net.mask)
    return net.eval(), state["args"]


def evaluate_checkpoint(args) -> dict:
    """--eval: the numbers of a checkpoint on the test set of --data; with --output, the pictures too.
    Data and crop are those that the network was trained with, unless --data, --box or --margin are given."""
    net, _ = open_checkpoint(args, args.eval, {"box", "margin"} & set(args.given))
    folder = find_run(args, "sdfl")
    data = make_dataset(args, read_faces(args, "test"), augmented=False)
    if data.points.shape[1] != len(net.mask):
        raise ValueError(f"--eval {args.eval}: the model has {len(net.mask)} landmarks, the faces of --data "
                         f"{args.data} have {data.points.shape[1]}")
    data.divisors(args.norm)
    loader = make_loader(args, data, datasets.in_order(len(data), args.batch_size), net.mask.device)
    scores, errors, points = evaluate(net, loader, args, args.occluder_test)
    print_table(scores, args, len(net.mask))
    if folder:
        write_pictures(make_run(args, "sdfl", folder), net, data, errors, points, args.threshold)
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


def find_points(net: SDFL, image: np.ndarray, box: np.ndarray, margins: list, args) -> np.ndarray | None:
    """Landmarks (N, 2) px of the face in `box` (4,), or None; a second margin is about those of the first."""
    for margin in margins:
        frames = datasets.square_frames(box[None], args.size, margin)
        batch = datasets.CropDataset([datasets.Face(image)], frames, args.size).__getitems__([(0, 0)])
        with precision(args, net.mask.device):
            pred = predict_points(net, prepare(batch, net.mask.device), flip_of(args, len(net.mask))).cpu()
        points = warp.apply_affine(warp.invert(torch.from_numpy(frames)), pred.double())[0].numpy()
        box = np.concatenate([points.min(0), points.max(0)])
        if not np.ptp(points, 0).max() > 0:  # one place, or not finite
            return None
    return points


def predict(args) -> dict:
    """--predict: for each face writes its landmarks as NAME.pts, and for each image NAME.png with them drawn.

    A network that was trained on crops about landmarks looks at a face twice: in the box that is given (by
    --detector, by --box, or the whole image), then in the box of its first answer. A further face of an image
    is NAME.face2.pts and so on. Pixels are taken as stored: turn a photo that has an orientation tag.
    Raises: FileNotFoundError for a path without images; ValueError for two images of one name, or one that
        cannot be read; FileExistsError where a result would be written over a file."""
    free = DATA | {"box"} | ({"margin"} & set(args.given))
    net, trained = open_checkpoint(args, args.weights, free)
    detector = open_detector(args.detector) if args.detector else None
    found = datasets.image_paths(args.predict)  # {name: path}
    datasets.check_images([datasets.Face(path) for path in found.values()])
    args.data = "predict"
    folder, faceless = find_run(args, "sdfl"), []
    for target in (folder / f"{name}{end}" for name in found for end in (".pts", ".png")) if folder else ():
        if target.exists():
            raise FileExistsError(f"--output {folder}: {target} exists already; name another folder")
    folder = make_run(args, "sdfl", folder)
    margins = [args.margin] * (2 if trained["box"] == "landmarks" else 1)
    if not detector and args.box in BOXES:
        margins[0] = 1.0  # the whole image has its margin in it
    for name, path in tqdm(found.items(), "predict"):
        image = datasets.load_image(path)
        picture, count = image.copy(), 0
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for box in find_boxes(args, image, detector):
            points = find_points(net, image, box, margins, args)
            if points is not None:
                count += 1
                datasets.write_pts(folder / f"{name}{f'.face{count}' if count > 1 else ''}.pts", points)
                draw_points(picture, points, (60, 220, 60), max(1.0, float(np.ptp(points, 0).max()) / 120))
        write_image(folder / f"{name}.png", picture)
        faceless += [] if count else [path]
    print(f"{len(found) - len(faceless)} images with landmarks in {folder}" +
          (f"; no face found in {len(faceless)}, the first is {faceless[0]}: try --box" if faceless else ""))
    return {}


# ---- Training ------------------------------------------------------------------------------------

def learning_rate(step: int, steps: int, base: float, drops: int = 4) -> float:
    """Sec. IV-B: divided by 5, `drops` times, evenly over the run (with 4: every 100 epochs of 500)."""
    return base * 0.2 ** ((drops + 1) * step // steps)


def summary(row: dict) -> str:
    """A log's row as a line to read, without the subsets."""
    return ", ".join(f"{key} {100 * value:.2f} %" if key in ("nme", "fr") else f"{key} {value:.4g}"
                     for key, value in row.items() if key.isidentifier() and key != "auc20")


def load_sets(args, rank: int) -> tuple[datasets.CropDataset, datasets.CropDataset]:
    """The training set, augmented, and the test set; what can be wrong with them is found here."""
    train_set, test_set = (make_dataset(args, read_faces(args, split), split == "train")
                           for split in ("train", "test"))
    points = train_set.points.shape[1]
    if test_set.points.shape[1] != points:
        raise ValueError(f"training faces have {points} landmarks, test faces {test_set.points.shape[1]}")
    test_set.divisors(args.norm)
    if rank == 0:
        print(f"{len(train_set.faces)} training faces ({len(train_set)} an epoch), {len(test_set)} test faces"
              f", {points} landmarks" + ("" if points in datasets.SCHEMES else
                                         ", which are no known scheme: no mirroring, errors over their box"))
    return train_set, test_set


def make_model(args, train_set, state: dict | None, device: torch.device, rank: int):
    """The network and its optimizer: new, the same on every rank, or as a checkpoint's `state` has them."""
    seed_all(args.seed)
    landmarks = train_set.crop_points()
    faces = [len(train_set), landmarks.shape[1]]
    if state and state["faces"] != faces:
        raise ValueError(f"--resume: {faces[0]} training faces of {faces[1]} landmarks, the run was started "
                         f"on {state['faces'][0]} of {state['faces'][1]}; see --data-root")
    net = build(args, state["model"]["mask"] if state else neighbour_mask(landmarks, args.k), device)
    net.mean_face.copy_(landmarks.mean(0) * (256 / args.size))
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    size = sum(p.numel() for p in net.parameters())
    report = f"{args.backbone} + {args.head}: {size:,} parameters, {device.type}"
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
    folder = find_run(args, "sdfl")
    state = load(folder / "last.pt", "sdfl") if args.resume else None
    if state:
        restore_args(args, state["args"], MACHINE | ({"data_root"} & set(args.given)))
    # Data, network, loss
    train_set, test_set = load_sets(args, rank)
    net, optimizer = make_model(args, train_set, state, device, rank)
    L, loss_function = laplacian(net.mask), partial(LOSSES[args.loss], eps=args.epsilon)
    model = torch.compile(net) if args.compile else net
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    batches = datasets.EpochBatches(len(train_set), args.batch_size, args.seed, rank, world)
    loader = make_loader(args, train_set, batches, device, everywhere=True)
    steps, scale, scores, began = len(batches), 256 / args.size, {}, time.time()
    start = state["epoch"] if state else 0
    if rank == 0:  # only the first process evaluates and writes
        folder = make_run(args, "sdfl", folder)
        print(f"run: {folder}, processes: {world}, epochs done: {start} of {args.epochs}", flush=True)
        between = args.epochs / (args.drops + 1)  # epochs from one drop of the rate to the next
        if args.drops > 1 and between < 4:
            print(f"note: --drops {args.drops} leaves {between:.1f} of {args.epochs} epochs at the full rate; "
                  f"in a short run fewer drops learn more")
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
                group["lr"] = learning_rate(epoch * steps + step, args.epochs * steps, args.lr, args.drops)
            with precision(args, device):
                pred = model(prepare(batch, device))
            target = batch["points"].to(device, non_blocking=True)
            loss = sdfl_loss(pred * scale, target * scale, L, args.lam, loss_function)
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
                scores, errors, points = evaluate(net, test_loader, args, last and args.occluder_test)
                row |= scores
            row["minutes"] = (time.time() - began) / 60
            bar.write(summary(row))
            write_log(folder / "log.jsonl", **row)
            save(folder / "last.pt", script="sdfl", model=net.state_dict(), optimizer=optimizer.state_dict(),
                 epoch=epoch + 1, args=vars(args), world=world, faces=[len(train_set), len(net.mask)])
    bar.close()
    # Table and pictures
    if rank == 0:
        if start >= args.epochs:  # it was killed after its last checkpoint
            scores, errors, points = evaluate(net, test_loader, args, args.occluder_test)
        print_table(scores, args, len(net.mask))
        write_pictures(folder, net, test_set, errors, points, args.threshold)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return scores


if __name__ == "__main__":
    run(train, parse_args())
