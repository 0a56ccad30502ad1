"""KeyPoint Relative Position Encoding for Face Recognition (KP-RPE).

Minchul Kim, Yiyang Su, Feng Liu, Anil Jain, Xiaoming Liu; CVPR 2024.
https://arxiv.org/abs/2403.14852

The method. A vision transformer that learned from aligned faces fails on faces that are not. KP-RPE
tells it where the face is: five keypoints, of any detector, go into the relative position encoding.
What a query adds to the attention of a key at some distance (one of 49 quantised offsets) is not a
learned number but a linear function of where the query is from the keypoints, for each head of each
layer. The image is not touched.

Train on WebFace4M on four GPUs (the paper: TinyFace rank-1 75.80 %; not run here); the keypoints of
all images are found by a face aligner, CVLface's or one of --task dfa:
  python kprpe.py --data webface-base --data-root WF4M --dfa dfa/model.safetensors --gpus 4 --amp \
      --test agedb_30.bin cfp_fp.bin tinyface IJBC
Without any data, on drawn faces, three minutes on two CPU cores; the plain ViT, to compare:
  python kprpe.py
  python kprpe.py --rpe none
Digits; continue; evaluate with noise on the keypoints; use (photo.pts beside it, or --detector):
  python kprpe.py --data affnist --data-root MNIST
  python kprpe.py --data webface-base --gpus 4 --resume
  python kprpe.py --eval RUN/last.pt --keypoint-noise 0.02,0.05,0.1 --test lfw/
  python kprpe.py --predict photo.jpg --weights RUN/last.pt
Published weights, of CVLface, AdaFace or insightface, and their aligner; the same from there on:
  python kprpe.py --test lfw/ cfp/ --weights model.safetensors --dfa dfa/model.safetensors
  python kprpe.py --data folder --data-root PEOPLE --init model.safetensors
The face aligner, on drawn faces, two to three minutes on a CPU; its keypoints instead of a file's:
  python kprpe.py --task dfa
  python kprpe.py --dfa runs/kprpe-dfa-faces/last.pt --fusion average,norm,landmark
Gait, on drawn walkers; Gait3D (the paper: rank-1 68.2 %; not run here):
  python kprpe.py --task gait
  python kprpe.py --task gait --data gait3d --data-root GAIT3D --gpus 4 --amp

Where each equation, figure and task is:
  Eq. (1), (2), (5)        attention, without and with a bias     Attention
  Eq. (3)                  position embedding                     ViT
  Eq. (4)                  iRPE, on queries, keys and values      ContextualRPE
  Eq. (6)                  bias from a learned table              StaticRPE
  Eq. (7), (8), (9), (10)  f(P), absolute (7) and relative        KPRPE
  Eq. (11)                 bias of a pair of patches              PairBias
  Eq. (12), Fig. 6         noise on keypoints (--keypoint-noise)  add_keypoint_noise
  Eq. (13), (14), (15)     face aligner                           DFA
  Eq. (16), (17), (18)     fusion, by norms and by landmarks      fuse
  Fig. 1                   digits                                 --data affnist, --draw-keypoints
  Fig. 3                   distances from a query                 bucket_ids
  Fig. 4                   mesh grid M, f(P); B; MLP              KPRPE; PairBias; ViT.feature
  Fig. 5                   from unaligned to aligned              python -m tests.claims
  Fig. 8                   errors of the face aligner             report_dfa
  Fig. 12, 13              learned offsets                        draw_offsets
  supp. 3 (--task dfa)     face aligner                           section "Face aligner"
  Sec. 5 (--task gait)     gait                                   section "Gait"

Where the paper is silent, or the authors' code (CVLface at d3d09c9) differs from it:
  - f(P) of Eq. (10), linear in M - P, is a part of the queries, the same for all images, plus one
    of the keypoints, the same for all queries: 196 times fewer numbers an image.
  - "Absolute" is the paper's formula. The code's adds one number to a whole row, which the softmax
    drops: so it equals the plain ViT, and so does Table 2's first row, nearly.
  - Eq. (5) divides B by sqrt(d_k), the code does not. So the tables and W_L have sqrt(d_k) times
    --lr (--rpe-lr); iRPE, divided in both, has --lr. W_L has a bias, as in the code and Table 3.
  - Tables start at 0; a thousand steps on a CPU change them too little. So the small presets have
    50 times the rate for them, a softmax without margin, and --augment wide: Table 6's augmentation
    hardly moves the keypoints of aligned faces.
  - Keypoints and patch centres are (x + 0.5) / W. The code has keypoints at x / W, half a pixel off
    its grid. "No keypoints" is the plain ViT.
  - Eq. (12) is printed as a scaling, but the text has noise: normal, alpha of the crop's side in x
    and in y. That gives the NME of 0.12 which the supplement reports for alpha = 0.1.
  - What Table 6 leaves out is the code's: --clip 5, and what decays: matrices, no embeddings; in
    its "Cutout" all but a box is black, not the box.
  - The margin is differentiated; the code's gradient skips it.
  - Table 6's "RepeatedAug" is the code's: the next image is one of the same person.
  - An image is warped once, by alignment and augmentation in one matrix; the code warps the aligned
    crop again. Outside the image is its reflection, in training and in test, so that no black frame
    shows how far a face was moved; the code has black.
  - Aligned: a similarity takes five points to ArcFace's in 112 px. Unaligned: with --box image the
    whole image in a square (the paper resizes it); else the square about the box times --margin,
    zoomed, turned and shifted at random by image. Without landmarks an image counts as aligned.
  - TAR is read at a false accept rate of at most the target; the code reads at the nearest.
  - Digits: the paper gives no settings. Trained on MNIST moved by up to 6 px on a canvas of 40 px,
    tested on affNIST made by its published ranges; a normalised softmax of 10 classes, of the mean
    over the patches: a head that has them in a row learns where they are.
  - With --dfa keypoints are found once before training, on the crops that are not augmented, as the
    code's are (there with a border of 0.215); in a test in the crop and anew in its mirror image.
  - Of the face aligner's training, optimiser, learning rate, augmentation, the weight of its
    aggregation and the test split of WIDER FACE are ours.
  - Gait (Sec. 5): SwinGait-2D is not published; it is made of OpenGait's SwinGait-3D. Here it is
    trained from scratch, at one rate, by a cosine without steps; OpenGait begins with trained
    convolutions. M is the grid of a window and serves all windows of a frame.
"""
import argparse
import copy
import functools
import itertools
import math
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from common import (UserError, datasets, digits, gait, metrics, photos, recognition, run, synthetic,
                    warp)
from common.checkpoint import read_state_dict, read_tensors

# ---- Settings ------------------------------------------------------------------------------------

# Table 6, in the supplement; its "large" is the text's "base". box and margin are ours.
PAPER = dict(epochs=34, batch_size=512, lr=1e-3, warmup=3.0, weight_decay=0.05, repeat=0.5,
             loss="adaface", box="image", margin=1.4)
SMALL = dict(model="own", epochs=40, batch_size=64, lr=6e-4, warmup=1.0, repeat=0.0, rpe_lr=50.0,
             loss="softmax", scale=32.0, box="landmarks", unaligned=True, cache="device",
             eval_every=7, augment="wide")
PRESETS = {
    "ms1m-small": {},
    "webface-base": dict(model="base", epochs=36, batch_size=1024, lr=1e-4, sample_rate=0.6,
                         repeat=0.1),
    "folder": SMALL,
    "youtube": SMALL,
    "affnist": dict(SMALL, size=40, patch=5, dim=64, depth=3, heads=4, mlp_ratio=2.0, pool="mean",
                    epochs=16, lr=3e-3, rpe_lr=17.0, scale=16.0, eval_every=2, unaligned=False),
    "faces": dict(SMALL, size=48, depth=4, dim=64, heads=4, limit=6000, epochs=12, batch_size=32,
                  eval_every=6),
}
RECORDS = ("ms1m-small", "webface-base")  # sets of images that are aligned already
DRAWN = {"train": 1600, "test": 400}  # faces of --data faces
# --rpe. Biases by Eq. (5): euclidean, cross and product, from a learned table over that distance;
# kp-*, from tables made of the keypoints (Table 2), over the product distance. That is also irpe's,
# which adds vectors to queries, keys and values by Eq. (4). Each keeps the position embedding.
STATIC = ("euclidean", "cross", "product")
KEYPOINT = ("kp-absolute", "kp-relative", "kp-multihead")
RPES = ("none", *STATIC, "irpe", *KEYPOINT)
FUSIONS = ("average", "norm", "landmark")  # --fusion
TASKS = ("face", "dfa", "gait")  # --task; the settings of the last two stand in their sections


def parse_args(argv=None):
    """The flags of all scripts and those of --task, with the defaults of the preset of --data."""
    task = run.peek(argv, "--task", TASKS, "face")
    if task == "face":
        parser = run.make_parser("kprpe", "Keypoint relative position encoding", PAPER, PRESETS,
                                 argv, ("image", "landmarks", "face"))
        face_flags(parser)
    elif task == "dfa":
        parser = run.make_parser("kprpe-dfa", "KP-RPE's face aligner", DFA_PAPER, DFA_PRESETS,
                                 argv, ("face", "landmarks"))
        dfa_flags(parser)
    else:
        parser = run.make_parser("kprpe-gait", "KP-RPE on gait", GAIT_PAPER, GAIT_PRESETS, argv)
        gait_flags(parser)
    add = parser.add_argument_group("all tasks").add_argument
    add("--task", default="face", choices=TASKS, help="what is learned; each has its own flags")
    add("--warmup", type=run.nonnegative, default=3.0, help="epochs of the rate's rise to --lr")
    add("--clip", type=run.nonnegative, default=5.0, help="largest norm of the gradient; 0: any")
    parser.prog = "kprpe.py"
    args = run.parse(parser, argv)
    if task == "face":
        check_faces(args, parser.error)
    return args


def face_flags(parser):
    """Adds the flags of --task face."""
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("network").add_argument
    add("--size", type=run.within(int, 8, 1024), default=112, help="side of the crop in px")
    add("--model", default="small", choices=MODELS, help="of Table 3, or by the next four flags; "
        "arcface18, ...: iresnets with insightface's first shortcut")
    add("--dim", type=run.within(int, 1, 8192), default=192, help="width of --model own")
    add("--depth", type=run.within(int, 1, 1000), default=6, help="layers of --model own")
    add("--heads", type=run.within(int, 1, 1024), default=6, help="attention heads of --model own")
    add("--mlp-ratio", type=run.above_zero, default=3.0, help="hidden width over --dim")
    add("--patch", type=run.positive, default=8, help="side of a patch in px")
    add("--pool", default="flatten", choices=["flatten", "mean"], help="what the last layers read: "
        "every patch (the paper's sizes), or the mean over the patches")
    add("--drop-path", type=run.within(float, 0, 0.9), default=0.1, help="chance in the last block")
    add("--rpe", default="kp-multihead", choices=RPES, help="position encoding (Tables 1 and 2)")
    add("--num-keypoints", type=run.within(int, 0, 5), default=5, help="of kp-* (supp. 2.2)")
    add("--draw-keypoints", action=switch, default=False, help="mark keypoints (Fig. 1: Abs-PE*)")
    add = parser.add_argument_group("training").add_argument
    add("--loss", choices=MARGINS, help="margin of the softmax (supp. 2.1)")
    add("--scale", type=run.above_zero, default=64.0, help="what cosines are multiplied by")
    add("--sample-rate", type=run.within(float, 1e-6, 1), default=1.0, help="PartialFC: share of "
        "the classes that a step sees")
    add("--rpe-lr", type=run.nonnegative, default=0.0, help="learning rate of relative encodings "
        "over --lr; 0: sqrt(d_k) for biases, as the code's form of Eq. (5) learns; 1 for irpe")
    add("--augment", default="full", choices=[*MOVES, "none"], help="Table 6's; wide: moves more")
    add("--repeat", type=run.fraction, help="chance that the same person comes next")
    add("--landmarks", default="", metavar="PATH", help="landmarks of a set that has none: a CSV "
        "of image,x0,y0,..., or a folder with the images' tree of .pts, as of the landmark scripts")
    add("--dfa", type=run.file, default="", metavar="CKPT", help="find the keypoints by this "
        "checkpoint of --task dfa, or the published aligner")
    add("--init", type=run.file, default="", metavar="CKPT", help="start from these weights, a "
        "checkpoint's or published ones, and take over the flags of their network")
    add = parser.add_argument_group("evaluation").add_argument
    add("--unaligned", action=switch, default=False, help="also test on unaligned crops (Table 1)")
    add("--keypoint-noise", type=run.listed(run.within(float, 0, 0.3)), default=[], help="at the "
        "end also test with noise on keypoints, shares of the side, as 0.02,0.05,0.1 (Eq. 12)")
    add("--fusion", type=run.listed(fusion_rule), default=[], help="also identify templates of the "
        "test split, videos, by features fused so (Eqs. 16 to 18): some of average,norm,landmark")
    add("--test", nargs="+", default=[], metavar="PATH", help="sets to test on, beside "
        "the test split: a .bin, the folder of LFW, TinyFace, IJB-C, ..., a .csv of pairs or of "
        "roles; landmarks, if they have none, from PATH.landmarks.csv")


def fusion_rule(word: str) -> str:
    """One of FUSIONS, as a flag's type."""
    if word not in FUSIONS:
        raise ValueError(word)
    return word


def check_faces(args, error: Callable):
    """Calls `error` for flags of --task face that do not go together."""
    convolutional = args.model in IRESNETS
    side = 16 if convolutional else args.patch
    if args.size % side:
        error(f"--size {args.size}: expected a multiple of {side}")
    if args.model == "own" and args.dim % args.heads:
        error(f"--dim {args.dim}: expected a multiple of --heads {args.heads}")
    if convolutional and args.rpe != "none":
        error(f"--model {args.model} has no position encoding: give --rpe none")
    if args.data in (*RECORDS, "affnist") and not (args.data_root or args.eval or args.resume):
        error(f"--data {args.data}: give --data-root, the folder of its files")


# ---- Position encodings: Sec. 3 ------------------------------------------------------------------

DISTANCES = {"euclidean": 7, "cross": 14, "product": 49}  # K of each distance, on any grid


def quantise(x: torch.Tensor) -> torch.Tensor:
    """Piecewise index of Wu et al., "Rethinking and Improving Relative Position Encoding for Vision
    Transformer" (iRPE), ICCV 2021, at the code's ratio 1.9: whole offsets -> long, 0, +-1, +-2 (for
    2 and 3) and +-3 (from 4 on)."""
    alpha = 1.9
    beta = 2 * alpha
    gamma = 8 * alpha
    far = alpha + (x.abs().clamp(min=1) / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
    # The code cuts to a whole number after the minimum, so that beta = 3.8 means 3 at most.
    return torch.where(x.abs() <= alpha, x.round(), x.sign() * far.round().clamp(max=beta)).long()


def bucket_ids(height: int, width: int, method: str) -> torch.Tensor:
    """d(i, j) of all pairs of N = height * width patches, query i and key j counted row by row.

    Args: method, "euclidean" (the rounded distance, quantised: 7 ids, of which the lower 3 stay
        free, as no distance is negative), "product" (one id for each pair of quantised row and
        column offset, 49) or "cross" (7 ids of the rows and 7 of the columns, whose values add up).
    Returns: (N, N) long; of "cross" (2, N, N).   Raises: ValueError.
    Source: Sec. 3.1; iRPE's code. Offsets are query - key: 24 is a patch's own product id, and on a
        14 x 14 grid the query (7, 7) of Fig. 3 has 48 at the key (0, 0).
    """
    if method not in DISTANCES or height < 1 or width < 1:
        raise ValueError(f"distance {method!r} on a grid of {height} x {width}: expected one of "
                         f"{', '.join(DISTANCES)}, and a positive height and width")
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2).double()
    rows, columns = (places[:, None] - places).unbind(-1)             # (N, N) each, query - key
    if method == "euclidean":
        return quantise(rows.hypot(columns).round()) + 3
    rows = quantise(rows) + 3
    columns = quantise(columns) + 3
    return 7 * rows + columns if method == "product" else torch.stack([rows, 7 + columns])


class PairBias(nn.Module):
    """From tables by distance to a number for each pair of patches.

    Args: grid, patches (height, width); method, of `bucket_ids`. `forward`: a table of each image,
        the same for all queries (B, H, K), and one of each query, the same for all images (H, N,
        K), or None; their sum is the table -> bias (B, H, N, N).
    It is read by a product with 0 and 1: a gather's gradient is slow on a GPU, adds up in no fixed
    order, and keeps the sum of both, 14.8 MB an image of ViT-B.
    """

    def __init__(self, grid: tuple[int, int], method: str):
        super().__init__()
        self.patches = math.prod(grid)
        ids = bucket_ids(*grid, method).view(-1, self.patches, self.patches)  # (1 or 2, N, N)
        one_hot = (ids == torch.arange(DISTANCES[method])[:, None, None, None]).any(1).float()
        # A GPU's attention copies a bias whose rows are no multiple of 8 long: add some zeros.
        one_hot = F.pad(one_hot, (0, -self.patches % 8))
        self.register_buffer("one_hot", one_hot, persistent=False)            # (K, N, N + zeros)

    def forward(self, of_image, of_query=None):
        # Eq. (11): B_ij = f(P)[i, d(i, j)]
        bias = torch.einsum("bhk,kij->bhij", of_image, self.one_hot)
        if of_query is not None:
            bias += torch.einsum("hik,kij->hij", of_query, self.one_hot)
        return bias[..., :self.patches]                                       # (B, H, N, N)


class StaticRPE(nn.Module):
    """A learned table for each layer and head, by one of the three distances of Sec. 3.1.
    Args and `forward`, which ignores the keypoints: as of `KPRPE`."""

    def __init__(self, grid: tuple[int, int], depth: int, heads: int, method: str,
                 scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.table = nn.Parameter(torch.zeros(depth, heads, DISTANCES[method]))
        self.pair_bias = PairBias(grid, method)

    def forward(self, points=None):
        for table in self.table * self.scale:
            yield self.pair_bias(table[None])  # Eq. (6): B_ij = W[d(i, j)]   (1, H, N, N)


class KPRPE(nn.Module):
    """Keypoint relative position encoding: keypoints P (B, L, 2) -> B of Eq. (5).
    Yields the bias over sqrt(d_k), (B, H, N, N), of each layer in turn.

    Keypoints are ((x + 0.5) / W, (y + 0.5) / H) for pixel centres at whole numbers, as the grid's
    are patch centres: so a mirrored image has the keypoints (1 - x, y), left and right renamed.
    They may lie outside [0, 1], and gradients reach them.
    Args: keypoints, L; grid, patches (height, width); depth, layers of the network; heads; variant,
        of Sec. 3.2: "kp-absolute" or "kp-relative" (one table for all layers and heads) or
        "kp-multihead" (one for each); scale, 1 / sqrt(d_k), here where the bias is small.
    Raises: ValueError.
    """

    def __init__(self, keypoints: int, grid: tuple[int, int], depth: int, heads: int, variant: str,
                 scale: float = 1.0):
        super().__init__()
        if variant not in KEYPOINT or keypoints < 1:
            raise ValueError(f"variant {variant!r} of {keypoints} keypoints: expected one of "
                             f"{', '.join(KEYPOINT)}, and at least 1 keypoint")
        self.keypoints = keypoints
        self.depth = depth
        self.heads = heads
        self.variant = variant
        self.scale = scale
        self.table_counts = (depth, heads) if variant == "kp-multihead" else (1, 1)
        width = math.prod(self.table_counts) * DISTANCES["product"]
        # W_L with a bias: code, and Table 3's parameters. At 0 the network is the plain ViT.
        self.keypoint_linear = nn.Linear(2 * keypoints, width)
        nn.init.zeros_(self.keypoint_linear.weight)
        nn.init.zeros_(self.keypoint_linear.bias)
        rows, columns = ((torch.arange(n) + 0.5) / n for n in grid)
        centres = torch.cartesian_prod(rows, columns).view(-1, 2).flip(1)
        self.register_buffer("grid", centres, persistent=False)  # (N, 2), M: xy in [0, 1]
        self.pair_bias = PairBias(grid, "product")

    def forward(self, points: torch.Tensor) -> Iterator[torch.Tensor]:
        for of_image, of_query in zip(*self.tables(points)):
            yield self.pair_bias(of_image, of_query)

    def tables(self, points: torch.Tensor):
        """`scale` f(P) as the sum of a part of each image (depth, B, H, K) and one of each query
        (depth, H, N, K), depth times None if it has none."""
        W_L = self.keypoint_linear.weight
        P = check_keypoints(points, self.keypoints).to(W_L.dtype).flatten(1)  # (B, 2L)
        with torch.autocast(points.device.type, enabled=False):
            if self.variant == "kp-absolute":
                # Eq. (7): B_ij = f(P)[d(i, j)], f(P) = P W_L, the same for every query
                return self.by_layer(self.keypoint_linear(P)).transpose(1, 2), [None] * self.depth
            # Eq. (8): D = Expand(M) - Expand(P), L offsets for each query (B, N, L, 2)
            # Eq. (9): D' = Reshape(D), (B, N, 2L)
            # Eq. (10): f(P) = D' W_L, which is Expand(M) W_L - Expand(P) W_L, plus the bias
            M = self.grid.repeat(1, self.keypoints)                           # (N, 2L)
            of_query = F.linear(M, W_L)
            of_image = self.keypoint_linear.bias - F.linear(P, W_L)
        return self.by_layer(of_image).transpose(1, 2), self.by_layer(of_query)

    def by_layer(self, f: torch.Tensor) -> torch.Tensor:
        """What W_L puts out, (A, depth * H * K) or (A, K), times scale: (depth, H, A, K)."""
        f = (self.scale * f).unflatten(1, (*self.table_counts, -1)).permute(1, 2, 0, 3)
        return f.expand(self.depth, self.heads, -1, -1)


def check_keypoints(points: torch.Tensor, count: int) -> torch.Tensor:
    """Keypoints (B, count, 2) as they are.   Raises: ValueError for another shape, and for values
    outside [-2, 3] or not finite; values on a GPU are not read, as that would wait for it."""
    if points.ndim != 3 or points.shape[1:] != (count, 2):
        raise ValueError(f"keypoints have the shape {tuple(points.shape)}, not (B, {count}, 2)")
    if points.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(((points >= -2) & (points <= 3)).all()):
            raise ValueError(f"keypoints from {points.min():g} to {points.max():g}: expected about "
                             "[0, 1]; divide those in pixels, (x + 0.5) / width")
    return points


class ContextualRPE(nn.Module):
    """Attention with iRPE on queries, keys and values; its tables serve all heads of one layer.

    Args: dim, of a head; grid.   q, k, v (B, H, N, dim) -> (B, H, N, dim).
    Source: iRPE, contextual mode, product distance. Eq. (4) has a term R^Q R^K too; the code has
        none, and we follow it. R^Q is a table over d(j, i) as in the code; in the paper it is over
        d(i, j), the same but for the order of the buckets.
    """

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(DISTANCES["product"], dim))
        self.k = nn.Parameter(torch.zeros_like(self.q))
        self.v = nn.Parameter(torch.zeros_like(self.q))
        self.register_buffer("ids", bucket_ids(*grid, "product"), persistent=False)  # (N, N)

    def forward(self, q, k, v):
        ids = self.ids.expand(*q.shape[:2], -1, -1)                           # (B, H, N, N)
        # Eq. (4): e_ij = (Q_i K_j + Q_i R^K[d(i, j)] + R^Q[d(j, i)] K_j) / sqrt(d_k)
        on_keys = (q @ self.k.T).gather(-1, ids)
        on_queries = (k @ self.q.T).gather(-1, ids).mT
        a = ((q @ k.mT + on_keys + on_queries) * q.shape[-1] ** -0.5).softmax(-1)
        # Eq. (4): Y_i = sum_j a_ij (V_j + R^V[d(i, j)]), a_ij summed by bucket before R^V
        by_bucket = a.new_zeros(*a.shape[:-1], len(self.v))                   # (B, H, N, K)
        return a @ v + by_bucket.scatter_add(-1, ids, a) @ self.v


# ---- Network -------------------------------------------------------------------------------------

# Table 3. The code's names; the supplement's "large" is the text's "base".
VIT_SIZES = {"small": dict(dim=512, depth=12, heads=8, mlp_ratio=5, patch=8, image_size=112),
             "base": dict(dim=512, depth=24, heads=16, mlp_ratio=3, patch=8, image_size=112)}
IRESNETS = [f"{kind}{depth}" for kind in ("iresnet", "arcface") for depth in (18, 34, 50, 101)]
MODELS = ("small", "base", "own", *IRESNETS)
NETWORK = ("model", "size", "patch", "dim", "depth", "heads", "mlp_ratio", "pool", "rpe",
           "num_keypoints")


class Attention(nn.Module):
    """Multi-head self-attention: tokens (B, N, dim) -> the same.
    Args: contextual, a `ContextualRPE` or None. `forward`: bias over sqrt(d_k) (B, H, N, N)."""

    def __init__(self, dim: int, heads: int, contextual: ContextualRPE | None = None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.contextual = contextual

    def forward(self, x, bias=None):
        # Eq. (1): Q_i = x_i W_Q, K_j = x_j W_K, V_j = x_j W_V
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # (B, H, N, d_k) each
        if self.contextual is not None:
            y = self.contextual(q, k, v)
        else:
            # Eq. (2) without a bias, Eq. (5) with one: Y = softmax((Q K^T + B) / sqrt(d_k)) V
            y = F.scaled_dot_product_attention(q, k, v, bias)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block (B, N, dim) -> the same: attention, then a hidden layer of ReLU6.
    A sample skips each branch with probability `drop` in training (stochastic depth)."""

    def __init__(self, dim: int, heads: int, hidden: int, drop: float,
                 contextual: ContextualRPE | None = None):
        super().__init__()
        self.drop = drop
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, contextual)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.ReLU6(),
                                             fc2=nn.Linear(hidden, dim)))

    def forward(self, x, bias=None):
        x = x + drop_path(self.attn(self.norm1(x), bias), self.drop, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop, self.training)


def drop_path(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """A branch's output (B, N, dim), 0 for a share p of the samples, the others over 1 - p."""
    if not training or p == 0:
        return x
    return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - p).div_(1 - p)


class ViT(nn.Module):
    """Images (B, channels, H, W) [, keypoints] -> embeddings (B, features), not normalised.

    Args: size, "small", "base", or a dict with any of the keys of VIT_SIZES (the others as in
        "small"; image_size is a side, or (height, width)); rpe, one of RPES; num_keypoints of kp-*,
        the first of the five (as the code has it), 0 for the plain ViT (supp. 2.2); channels;
        features; drop_path, of the last block, rising evenly from 0.
    Raises: ValueError.   Source: Sec. 4.1, Table 3; insightface's class, with its weights' names.
    """

    def __init__(self, size: str | Mapping = "small", rpe: str = "none", num_keypoints: int = 5,
                 channels: int = 3, features: int = 512, drop_path: float = 0.1,
                 pool: str = "flatten"):
        super().__init__()
        config = VIT_SIZES.get(size) if isinstance(size, str) else dict(size)
        if config is None or not config.keys() <= VIT_SIZES["small"].keys():
            raise ValueError(f"ViT of size {size!r}: expected {', '.join(VIT_SIZES)} or a dict of "
                             f"{', '.join(VIT_SIZES['small'])}")
        if rpe not in RPES or num_keypoints < 0:
            raise ValueError(f"rpe {rpe!r}, {num_keypoints} keypoints: expected one of "
                             f"{', '.join(RPES)}, and at least 0")
        dim, depth, heads, mlp_ratio, patch, image_size = (VIT_SIZES["small"] | config).values()
        side = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if dim % heads or side[0] % patch or side[1] % patch:
            raise ValueError(f"dim {dim} by {heads} heads, images of {side[0]} x {side[1]} px by "
                             f"patches of {patch}: expected no remainder")
        # Supp. 2.2 calls "no keypoints" the vanilla ViT, though W_L's bias would remain.
        self.rpe_name = "none" if rpe in KEYPOINT and num_keypoints == 0 else rpe
        self.num_keypoints = num_keypoints
        self.pool = pool
        self.wanted = (channels, *side)
        grid = (side[0] // patch, side[1] // patch)
        tokens = math.prod(grid)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, dim, patch, patch)))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.ModuleList()
        for i in range(depth):
            contextual = ContextualRPE(dim // heads, grid) if rpe == "irpe" else None
            drop = drop_path * i / max(depth - 1, 1)
            self.blocks.append(Block(dim, heads, int(dim * mlp_ratio), drop, contextual))
        self.norm = nn.LayerNorm(dim)
        seen = dim if pool == "mean" else tokens * dim
        self.feature = nn.Sequential(
            nn.Linear(seen, dim, bias=False), nn.BatchNorm1d(dim, eps=2e-5),
            nn.Linear(dim, features, bias=False), nn.BatchNorm1d(features, eps=2e-5))
        init_transformer(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.rpe = None  # made after the weights are drawn: it starts at 0
        scale = (dim // heads) ** -0.5
        if self.rpe_name in STATIC:
            self.rpe = StaticRPE(grid, depth, heads, rpe, scale)
        elif self.rpe_name in KEYPOINT:
            self.rpe = KPRPE(num_keypoints, grid, depth, heads, rpe, scale)

    def biases(self, keypoints: torch.Tensor | None) -> Iterator:
        """Bias over sqrt(d_k) (B or 1, H, N, N) of each block, or None.   Raises: ValueError."""
        if self.rpe is None:
            return itertools.repeat(None)
        if isinstance(self.rpe, KPRPE):
            if keypoints is None:
                raise ValueError(f"--rpe {self.rpe_name} needs keypoints (B, "
                                 f"{self.num_keypoints}, 2) in [0, 1] beside the images")
            if keypoints.ndim == 3 and keypoints.shape[1] == 5:
                keypoints = keypoints[:, :self.num_keypoints]
        return self.rpe(keypoints)

    def forward(self, image: torch.Tensor, keypoints: torch.Tensor | None = None) -> torch.Tensor:
        check_image(image, self.wanted, self.training)
        x = self.patch_embed(image)                                           # (B, dim, h, w)
        # Eq. (3): x' = x + PE
        x = x.flatten(2).mT + self.pos_embed                                  # (B, N, dim)
        for block, bias in zip(self.blocks, self.biases(keypoints)):
            x = block(x, bias)
        x = self.norm(x)
        x = x.mean(1) if self.pool == "mean" else x.flatten(1)
        return at_least_float32(self.feature(x))                              # (B, features)


def init_transformer(net: nn.Module):
    """As insightface and Swin: linear weights normal with 0.02, cut at two units, their biases 0;
    convolutions as torch draws them."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_image(image: torch.Tensor, wanted: tuple[int, int, int], training: bool):
    """Raises: ValueError unless images are (B, *wanted); UserError for one image in training."""
    if image.ndim != 4 or image.shape[1:] != wanted:
        raise ValueError(f"images have the shape {tuple(image.shape)}: expected (B, C, H, W) with "
                         f"C, H, W = {', '.join(map(str, wanted))}")
    if training and len(image) < 2:
        raise UserError("a training batch of 1 image: batch norm needs two; raise --batch-size")


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Embeddings out of autocast: norms and cosines are taken of them."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- Losses: supplement, 2.1 ---------------------------------------------------------------------

class Margin(nn.Module):
    """What the losses share: forward(cosines, norms, labels) -> logits (B, C), for cross entropy.

    Args: cosines (B, C) between embeddings and class centres; norms (B,) of the embeddings, used by
        AdaFace; labels (B,) long, -1 where the class is not among the C, but in another shard.
    The gradient is that of the formulas, and finite at cos = +-1, with the clamps of the AdaFace
    repository; CVLface and insightface clamp to +-1 only.
    """

    def __init__(self, m: float, eps: float, scale: float):
        super().__init__()
        self.m = m
        self.eps = eps
        self.scale = scale

    def target(self, cosine: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """The label's cosine (B, 1) with the margin; norms (B, 1)."""
        raise NotImplementedError

    def add_angle(self, cosine: torch.Tensor, angle) -> torch.Tensor:
        """cos(theta + angle), the sum within 0 and pi, beyond which the cosine would rise again."""
        return (cosine.acos() + angle).clamp(self.eps, math.pi - self.eps).cos()

    def forward(self, cosines, norms, labels):
        cosines = cosines.clamp(-1 + self.eps, 1 - self.eps)
        index = labels[:, None].clamp(min=0)
        label_cosine = cosines.gather(1, index)                               # (B, 1)
        target = self.target(label_cosine, norms.detach()[:, None])
        target = torch.where(labels[:, None] < 0, label_cosine, target)
        return self.scale * cosines.scatter(1, index, target)


class ArcFace(Margin):
    """s cos(theta + m) for the label, s cos(theta) for the others."""

    def __init__(self, m: float = 0.5, scale: float = 64.0):
        super().__init__(m, 1e-4, scale)

    def target(self, cosine, norms):
        return self.add_angle(cosine, self.m)


class CosFace(Margin):
    """s (cos(theta) - m) for the label, s cos(theta) for the others."""

    def __init__(self, m: float = 0.4, scale: float = 64.0):
        super().__init__(m, 1e-4, scale)

    def target(self, cosine, norms):
        return cosine - self.m


class AdaFace(Margin):
    """s (cos(theta - m z) - (m + m z)) for the label, s cos(theta) for the others: z in [-1, 1] is
    the embedding's norm, a sign of image quality, against running mean and deviation of all norms.

    A training step updates these (buffers) before it uses them: `norms` are those of the batch over
    all processes, as PartialFC gives them. t is 0.01 in all of the code's configurations.
    """

    def __init__(self, m: float = 0.4, h: float = 0.333, t: float = 0.01, scale: float = 64.0):
        super().__init__(m, 1e-3, scale)
        self.h = h
        self.t = t
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
        return self.add_angle(cosine, -self.m * z) - (self.m * z + self.m)


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
    """The (B, ...) of all processes, in the order of their ranks; all have the same B."""
    if not dist.is_initialized():
        return tensor
    gathered = tensor.new_empty(ranks()[1] * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


class Gather(torch.autograd.Function):
    """`all_gather` with a gradient: for each process's part the sum over what all processes made of
    it, times their number R. The loss is a mean over the whole batch already: the gradient of the
    network is the sum over the ranks, of which DistributedDataParallel takes the mean."""

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


class ShardedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy, with the classes spread over the processes: logits (B, S) of this
    shard's, labels (B,) long, -1 where the class is in another shard -> scalar, the same in all.
    Its gradient is written out: autograd does not reach through the sums over the processes."""

    @staticmethod
    def forward(ctx, logits, labels):
        index = labels.clamp(min=0)[:, None]
        here = labels >= 0
        top = all_reduce(logits.amax(1), dist.ReduceOp.MAX)                   # (B,)
        exps = (logits - top[:, None]).exp_()
        target = torch.where(here, logits.gather(1, index)[:, 0] - top, 0)
        total, target = all_reduce(torch.stack([exps.sum(1), target]))
        ctx.save_for_backward(exps, total, index, here)
        # Code: -log(max(p, 1e-30)), which ends at 69 and has a gradient there all the same.
        return (total.log() - target).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        exps, total, index, here = ctx.saved_tensors
        grad_logits = exps / total[:, None]  # softmax minus one-hot
        grad_logits.scatter_add_(1, index, -here[:, None].to(exps))
        return grad_logits.mul_(grad / len(exps)), None


class PartialFC(nn.Module):
    """The classifier of many identities with its loss: forward(embeddings, labels) -> scalar.

    Each process owns a shard of the class centres and sees the embeddings of all processes; their
    softmaxes meet in sums over the processes: none holds the logits of all classes. With a sample
    rate below 1 a step looks at the labels' own centres and a random choice of the others. In one
    process and at rate 1 the loss is F.cross_entropy(margin(cosines, norms, labels), labels).
    It is not wrapped in DistributedDataParallel: the gradient of its shard is complete as it is,
    and 0 for classes that were not sampled (AdamW's momentum still moves them, as in the code). A
    step keeps the weights once more, normalised: 0.4 GB for 206,000 classes in one process.

    Args: features, the length d of embeddings; classes, over all processes; margin, a `Margin`;
        sample_rate, the share of each shard's classes that a step looks at, or as many as the batch
        has faces if that is more (code: then the labels' own, for whose number a GPU would wait).
        Shards differ by one class at most (code: rounded up), and neither the loss nor the initial
        weights, N(0, 0.01), depend on the number of processes.
    Raises: UserError; ValueError.   Source: Partial FC, as insightface's arcface_torch has it.
    """

    def __init__(self, features: int, classes: int, margin: Margin, sample_rate: float = 1.0):
        super().__init__()
        self.rank, self.world = ranks()
        if classes < max(2, self.world):
            raise UserError(f"{classes} classes on {self.world} processes: the loss needs two "
                            "identities or more, and one for each process")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample rate {sample_rate}, expected above 0 and at most 1")
        self.features = features
        self.classes = classes
        self.margin = margin
        self.sample_rate = sample_rate
        self.start, stop = self.bounds(self.rank)
        shard = []
        for first in range(0, classes, 2048):  # every process draws all of them and keeps its own
            block = 0.01 * torch.randn(min(2048, classes - first), features)
            shard.append(block[max(self.start - first, 0):max(stop - first, 0)].clone())
        self.weight = nn.Parameter(torch.cat(shard))

    def bounds(self, rank: int) -> tuple[int, int]:
        """The first class of a process, and one past its last."""
        return self.classes * rank // self.world, self.classes * (rank + 1) // self.world

    def sample(self, local: torch.Tensor) -> torch.Tensor:
        """Classes (S,) of this shard that take part, sorted: those in `local` (B,), where -1 is
        none, and others at random. S does not depend on the labels."""
        count = len(self.weight)
        size = min(count, max(int(self.sample_rate * count), len(local)))
        if size == count:
            return torch.arange(count, device=local.device)
        scores = torch.rand(count + 1, device=local.device)  # the last one: labels elsewhere
        scores.index_fill_(0, torch.where(local < 0, count, local), 2.0)
        return scores[:count].topk(size).indices.sort().values

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss over the batches of all processes, of one size; the same value in each.
        Args: embeddings (B, features), not normalised; one that is 0 gets a gradient of 0; labels
            (B,) long in [0, classes), on the CPU, as the loader gives them."""
        low, high = labels.aminmax()
        if low < 0 or high >= self.classes:
            raise ValueError(f"labels from {int(low)} to {int(high)}, expected 0 to "
                             f"{self.classes - 1}: the set has other identities")
        labels = all_gather(labels.to(self.weight.device, non_blocking=True)) - self.start
        local = torch.where((labels >= 0) & (labels < len(self.weight)), labels, -1)
        index = self.sample(local)
        local = torch.where(local >= 0, torch.searchsorted(index, local), -1)
        with torch.autocast(self.weight.device.type, enabled=False):  # bfloat16: steps of 0.25
            embeddings = Gather.apply(embeddings.to(self.weight.dtype))
            norms = embeddings.norm(dim=1)
            unit = embeddings / torch.where(norms > 0, norms, torch.inf)[:, None]
            sampled = len(index) < len(self.weight)
            centres = self.weight.index_select(0, index) if sampled else self.weight
            cosines = unit @ F.normalize(centres).T                           # (B, S)
            return ShardedCrossEntropy.apply(self.margin(cosines, norms, local), local)

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

    def gather_state(self, optimizer: torch.optim.Optimizer) -> dict:
        """For a checkpoint, on the CPU: weights (classes, features) and their optimizer's state, of
        all shards, and the margin's buffers. All processes call it; rank 0 gets the whole."""
        moments = {}
        for name, value in optimizer.state[self.weight].items():
            sharded = value.shape == self.weight.shape
            moments[name] = self.whole(value) if sharded else value.to("cpu", copy=True)
        return {"weight": self.whole(self.weight), "optimizer": moments,
                "margin": copy.deepcopy(self.margin).cpu().state_dict()}

    @torch.no_grad()
    def load_shards(self, state: dict, optimizer: torch.optim.Optimizer):
        """Takes this process's part of what `gather_state` returned under any number of processes.
        Raises: UserError for another number of classes or features."""
        shape = (self.classes, self.features)
        if state["weight"].shape != shape:
            raise UserError(f"the checkpoint has class weights {tuple(state['weight'].shape)}, "
                            f"expected {shape} (classes, features)")
        start, stop = self.bounds(self.rank)
        self.weight.copy_(state["weight"][start:stop])
        self.margin.load_state_dict(state["margin"])
        moments = {}
        for name, value in state["optimizer"].items():
            moments[name] = (value[start:stop] if value.shape == shape else value).clone()
        optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: moments}})


# ---- Augmentation: supplement, Table 6 -----------------------------------------------------------

# The paper names the kinds; numbers and order are the code's: geometry, cutout, blur, colour. On
# the CPU, 2,600 crops a second on each core; so with it --cache device keeps crops in host memory.

ZOOM = 0.2
TURN = math.radians(20)


def zoom_turn_shift(size: int, zoom: float, angle: float, shift: np.ndarray) -> np.ndarray:
    """p -> zoom (R (p - m) - shift) + m in px, m the crop's middle, R a turn by `angle`: (2, 3)."""
    middle = (size - 1) / 2
    c = math.cos(angle)
    s = math.sin(angle)
    linear = zoom * np.array([[c, s], [-s, c]])
    return np.column_stack([linear, middle - middle * linear.sum(1) - zoom * shift])


def draw_move(rng: np.random.Generator, size: int, shift: float = 0.1, turned: float = 0.2):
    """Draws zoom, turn, shift and mirror of one image, as `datasets.CropDataset` takes them.

    Args: shift, of half the side, beyond what the zoom lets it move; turned, a share of images.
    Returns: matrix (2, 3) crop px -> crop px; whether to mirror; {}.
    """
    zoom = rng.uniform(1 - ZOOM, 1 + ZOOM)
    angle = rng.uniform(-TURN, TURN) if rng.random() < turned else 0.0
    # U(-1, 1) (h / zoom - h + h e), h half the side: zoomed out, it stays in view but for h e.
    reach = size / 2 * (1 / zoom - 1 + rng.uniform(0, shift))
    matrix = zoom_turn_shift(size, zoom, angle, rng.uniform(-1, 1, 2) * reach)
    return matrix, bool(rng.random() < 0.5), {}


def reach_of(shift: float) -> float:
    """How far beyond the crop `draw_move` can look, over the crop's side."""
    return (2 / (1 - ZOOM) - 1 + shift) * (math.cos(TURN) + math.sin(TURN))


SHIFTS = {"full": 0.1, "wide": 0.4}  # wide: ours, aligned faces as far off as unaligned ones
MOVES = {"full": draw_move, "wide": functools.partial(draw_move, shift=0.4, turned=1.0)}


def keep_box(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Black but for a box of 20 to 100 % of the area. (Code: one in 20 has small holes instead.)"""
    side = len(image)
    area = rng.uniform(0.2, 1)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(round(side * math.sqrt(area * aspect)), side)
    height = min(round(side * math.sqrt(area / aspect)), side)
    x = rng.integers(side - width + 1)
    y = rng.integers(side - height + 1)
    kept = np.zeros_like(image)
    kept[y:y + height, x:x + width] = image[y:y + height, x:x + width]
    return kept


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """To 20 to 100 % of the size and back, each way by a method of cv2; or a box; or a Gaussian."""
    side = len(image)
    kind = rng.random()
    if kind < 0.8:
        small = max(int(rng.uniform(0.2, 1) * side), 1)
        down, up = rng.integers(5, size=2).tolist()  # cv2.INTER_NEAREST, ..., INTER_LANCZOS4
        image = cv2.resize(image, (small, small), interpolation=down)
        return cv2.resize(image, (side, side), interpolation=up)
    if kind < 0.9:
        width = int(rng.integers(1, 10))
        return cv2.blur(image, (width, width))
    return cv2.GaussianBlur(image, (0, 0), max(rng.uniform(0, 4), 0.01))


OPS = ("identity", "brightness", "saturation", "contrast", "sharpness", "equalize", "grayscale")
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's


def recolour(image: np.ndarray, op: str, factor: float) -> np.ndarray:
    """One of RandAug's operations, as in PIL: base + factor (image - base), within 0..255."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if op == "identity":
        return image
    if op == "equalize":
        return cv2.merge([cv2.equalizeHist(channel) for channel in cv2.split(image)])
    if op == "brightness":
        base = np.zeros_like(image)
    elif op == "contrast":
        base = np.full_like(image, round(grey.mean()))
    elif op == "sharpness":
        base = cv2.filter2D(image, -1, SMOOTH)
    else:
        base = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
        factor = 0.0 if op == "grayscale" else factor
    return cv2.addWeighted(image, factor, base, 1 - factor, 0)


def draw_colour(rng: np.random.Generator) -> tuple[str, float]:
    """An operation of `recolour` and its factor, 1 for no change."""
    op = OPS[rng.integers(7)]
    for _ in range(2):  # the last two are drawn again, up to twice
        if op in ("equalize", "grayscale"):
            op = OPS[rng.integers(7)]
    # The paper: magnitude 14 of 31. The code: 5 to 22 of them, a change by 0.15 to 0.66; so do we.
    change = rng.integers(5, 23) * 0.9 / 30
    return op, 1 + change if rng.random() < 0.5 else 1 - change


class PhotometricAugmentation(torch.utils.data.Dataset):
    """The crops of another dataset, with Table 6's cutout, blur and two changes of colour."""

    def __init__(self, crops, seed: int):
        self.crops = crops
        self.regions = getattr(crops, "regions", None)  # what --cache keeps
        self.seed = seed

    def __len__(self):
        return len(self.crops)

    def __getitems__(self, keys) -> dict:
        batch = self.crops.__getitems__(keys)
        for i, key in enumerate(keys):
            rng = np.random.default_rng((self.seed, *key, 1))  # another stream than the geometry's
            image = batch["image"][i].numpy()
            if rng.random() < 0.2:
                image = keep_box(image, rng)
            if rng.random() < 0.2:
                image = blur(image, rng)
            for _ in range(2):
                image = recolour(image, *draw_colour(rng))
            batch["image"][i] = torch.from_numpy(image)
        return batch


def repeated(order: np.ndarray, labels: np.ndarray, p: float, rng: np.random.Generator):
    """The "repeated augmentation" of Table 6: an epoch's order (L,) of indices into labels (N,).

    After each image, with probability p, the next is replaced by a random one of the same identity,
    but never two in a row: a share p / (1 + p) of all. The paper's [24] repeats an image.
    """
    wish = rng.random(len(order)) < p
    wish[:1] = False
    index = np.arange(len(order))
    # Of wishes in a row the first, third, ... come true.
    since = index - np.maximum.accumulate(np.where(wish, 0, index))
    chosen = np.flatnonzero(since % 2)
    by_label = np.argsort(labels, kind="stable")
    count = np.bincount(labels)
    label = labels[order[chosen - 1]]
    which = (rng.random(len(chosen)) * count[label]).astype(np.int64)
    order = order.copy()
    order[chosen] = by_label[(np.cumsum(count) - count)[label] + which]
    return order


class SubjectBatches(datasets.EpochBatches):
    """`EpochBatches` with images replaced by others of the same person, as `repeated` says. A key
    has its place in the run for the epoch: an image that is drawn twice is augmented anew."""

    def __init__(self, labels: np.ndarray, p: float, batch: int, seed: int, rank: int, world: int):
        super().__init__(len(labels), batch, seed, rank, world)
        self.labels = labels
        self.p = p

    def order(self):
        rng = np.random.default_rng((self.seed, self.epoch, 1))
        return repeated(super().order(), self.labels, self.p, rng)

    def __iter__(self):
        place = self.epoch * len(self) * self.batch + self.rank * (self.batch // self.world)
        for keys in super().__iter__():
            yield [(place + k, i) for k, (_, i) in enumerate(keys)]
            place += self.batch


# ---- Data ----------------------------------------------------------------------------------------

class Split(NamedTuple):
    """Images of a set, of training with their .labels and .ids."""
    images: Sequence                 # by index
    points: np.ndarray | None        # (N, 5, 2) px; None: already aligned
    boxes: np.ndarray | None = None  # (N, 4) of unaligned crops; None: whole image


def five_points(points: np.ndarray, where: str) -> np.ndarray:
    """Landmarks (N, P, 2) of the file or set `where` -> (N, 5, 2): eyes, nose tip and mouth
    corners, image-left first. Of 98, Fig. 10 takes 57, below the nose, for its tip: here it is 54.
    Raises: UserError for a number of landmarks of no known scheme."""
    if points.shape[1] not in datasets.SCHEMES:
        raise UserError(f"{where}: {points.shape[1]} landmarks are no known scheme "
                        f"{list(datasets.SCHEMES)}: give 5, eyes, nose tip and mouth corners, "
                        "image-left first")
    five = datasets.group_means(points, datasets.SCHEMES[points.shape[1]].five)
    return five.astype(np.float32)


def template(size: int) -> torch.Tensor:
    """ArcFace's five points in px of a crop of `size`, (5, 2) float64."""
    return torch.from_numpy((datasets.ARCFACE_5 + 0.5) * (size / 112) - 0.5)


def drawn_faces(args, split: str) -> list[datasets.Face]:
    """A split of --data faces, the same whatever --seed is."""
    count = args.limit or DRAWN["train"]
    if split == "test":
        count = min(count, DRAWN["test"])
    return synthetic.read_faces(split, count, args.size, args.points)


def wants_keypoints(args) -> bool:
    """Whether the network looks at keypoints."""
    return args.draw_keypoints or bool(args.num_keypoints and args.rpe in KEYPOINT)


def identity_faces(args, split: str) -> list[datasets.Face] | None:
    """The faces of a split, in folders or drawn; None for a test split that is not there."""
    recognition.refuse_second_landmarks(args)
    if args.data == "faces":
        return drawn_faces(args, split)
    folder = os.path.join(args.data_root, split)
    if args.data == "youtube":
        faces = datasets.read("youtube", args.data_root, split)
    elif split == "test" and not os.path.isdir(folder):
        return None
    else:
        faces = recognition.read_identities(folder)
        if args.landmarks:
            faces = recognition.attach_points(faces, args.landmarks, args.data_root)
    faces = faces[:args.limit or None]
    datasets.check_images(faces, args.upright)
    return faces


def check_keypoints_known(args, split: Split, where: str):
    """Raises: UserError for images without keypoints where the network needs them."""
    if split.points is None and wants_keypoints(args) and not args.dfa:
        raise UserError(f"{where}: the network needs the keypoints of its images, and there are no "
                        "landmarks: give them (--landmarks; for a set of --test PATH.landmarks.csv "
                        "beside it) or --dfa, or train with --rpe none")


def face_split(args, faces: Sequence[datasets.Face]) -> Split:
    """Faces with their landmarks, all or none, as five points, and the boxes of --box."""
    images = recognition.FolderImages(faces)
    split = Split(images, None)
    if any(face.points is not None for face in faces):
        recognition.check_points(faces, "alignment, as other images have them,")
        points = np.stack([face.points for face in faces])
        boxes = None if args.box == "image" else datasets.face_boxes(faces, args.box)
        where = args.landmarks or f"--data {args.data}"
        split = Split(images, five_points(points, where), boxes)
    check_keypoints_known(args, split, f"--data {args.data}")
    return split


def unaligned(boxes: np.ndarray, size: int, margin: float) -> torch.Tensor:
    """Crops (N, 2, 3) about boxes, each zoomed, turned, shifted at random by its index alone."""
    moves = []
    for i in range(len(boxes)):
        rng = np.random.default_rng((0, i))
        zoom = rng.uniform(1 - ZOOM, 1 + ZOOM)
        angle = rng.uniform(-TURN, TURN)
        moves.append(zoom_turn_shift(size, zoom, angle, rng.uniform(-0.15, 0.15, 2) * size))
    matrices = torch.from_numpy(datasets.square_crops(boxes, size, margin))
    return warp.compose(torch.from_numpy(np.stack(moves)), matrices)


def make_crops(args, split: Split, t: float, augment: str = "none"):
    """Crops of --size, one warp of each image: unaligned, t = 0, or aligned, t = 1, or between, by
    (1 - t) times one matrix plus t times the other; Fig. 5: python -m tests.claims. Without points
    images are taken as they stand.   Args: augment, --augment, whose geometry is in the matrix."""
    move = MOVES.get(augment)
    flip = datasets.SCHEMES[5].flip
    if split.points is None or (t < 1 and split.boxes is None):
        align = None if split.points is None else (template(args.size), t)
        return recognition.WholeImages(split.images, args.size, split.points, move, flip, args.seed,
                                       align, reflect=True)
    points = torch.from_numpy(split.points).double()
    matrices = warp.fit_similarity(points, template(args.size))
    if t < 1:
        matrices = torch.lerp(unaligned(split.boxes, args.size, args.margin), matrices, t)
    faces = [datasets.Face(*both) for both in zip(split.images.sources, split.points)]
    reach = reach_of(SHIFTS[augment]) if move else 1.0
    zoom = 1 + ZOOM if move else 1.0
    return datasets.CropDataset(faces, matrices, args.size, move, reach, zoom, flip, args.seed,
                                reflect=True)


def refuse_flags_of_faces(args):
    """Raises: UserError for --data affnist with a flag that only faces have."""
    given = [name for name in ("test", "fusion", "dfa") if getattr(args, name)]
    if given:
        raise UserError(f"--{given[0]}: --data affnist has digits, no faces")


def training_set(args, device: torch.device):
    """Images with .labels and .ids, and their crops, aligned, then moved as --augment says."""
    if args.data == "affnist":
        refuse_flags_of_faces(args)
        images, labels = digits.read_mnist(args.data_root, "train", args.limit)
        data = digits.Digits(images, labels, args.size, seed=args.seed)
        return data, data
    if args.data in RECORDS:
        images = recognition.Records(args.data_root)
        points = None
        if args.landmarks:
            points = recognition.read_landmarks(images.keys.astype(str), args.landmarks)
            points = five_points(points, args.landmarks)[:args.limit or None]
        images.keep(args.limit or len(images))
        check_keypoints_known(args, Split(images, points), f"--data {args.data}")
        flip = datasets.SCHEMES[5].flip
        crops = recognition.WholeImages(images, args.size, points, MOVES.get(args.augment), flip,
                                        args.seed, reflect=True)
    else:
        split = face_split(args, identity_faces(args, "train"))
        images = split.images
        crops = make_crops(args, split, 1.0, args.augment)
    if args.dfa and wants_keypoints(args):
        crops.points = find_keypoints(args, crops, device)
    return images, crops


@torch.inference_mode()
def find_keypoints(args, crops, device: torch.device) -> torch.Tensor:
    """Keypoints that --dfa finds in crops, not augmented, (N, 5, 2) float64 px of the images."""
    still = copy.copy(crops)
    still.augment = None
    found = []
    keys = shard_keys(len(crops), 256, *ranks())
    for batch in crop_loader(args, still, keys, device, kept=False):
        points, _ = detect(args.dfa, to_device(batch, device)[0])
        to_image = warp.invert(batch["matrix"].double()).to(device)
        found.append(warp.apply_affine(to_image, points.double()))
    return gather_shards(torch.cat(found), len(crops)).cpu()


def crop_loader(args, data, batches, device: torch.device, kept: bool = True):
    """`run.make_loader` in all processes; --cache is for crops that are `kept`, if they can be."""
    args = copy.copy(args)
    if not kept or getattr(data, "regions", None) is None:
        args.cache = ""
    return run.make_loader(args, data, batches, device, shared=True)


def to_device(batch: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch: images (B, C, H, W) in 0..255, keypoints (B, P, 2) px, ArcFace's for none."""
    image = batch["image"].to(device, non_blocking=True)
    if image.dtype == torch.uint8:
        image = image.permute(0, 3, 1, 2).float()
    points = batch.get("points")
    if points is None:
        points = template(image.shape[-1]).float().expand(len(image), -1, -1)
    return image, points.to(device, non_blocking=True)


def inputs(image: torch.Tensor, points: torch.Tensor, draw: bool = False):
    """What networks take, images in [-1, 1] and keypoints in [0, 1], of what `to_device` returns.
    Args: draw, whether white dots of about 2 px mark the keypoints in the image (Fig. 1)."""
    if draw:
        side = torch.arange(image.shape[-1], device=image.device)
        x = (side - points[..., 0, None]).square()                            # (B, 5, W)
        y = (side - points[..., 1, None]).square()                            # (B, 5, H)
        dots = (-(x[..., None, :] + y[..., None]) / 2).exp().amax(1, keepdim=True)
        image = image + (255 - image) * dots                                  # dots: (B, 1, H, W)
    return image / 127.5 - 1, (points + 0.5) / image.shape[-1]


# ---- Training: supplement, Table 6 ---------------------------------------------------------------

def parameter_groups(net: nn.Module, weight_decay: float, scale: float = 1.0,
                     free: str = "(?<!patch_)emb|token|bias$") -> list[dict]:
    """Parameters for AdamW, with and without weight decay; "scale" multiplies a group's rate.

    Vectors and names that match `free`, by default biases, the position embedding and tokens, do
    not decay; tables and projections of the relative encodings do (source: code). Those encodings
    have the rate times `scale`: a bias that is divided by c (Eq. 5: sqrt(d_k)) learns at c times
    the rate and the decay / c, so the product is unchanged.
    """
    groups = {}
    for encoding, rate in ((False, 1.0), (True, scale)):
        for decays in (True, False):
            decay = weight_decay / rate if decays else 0.0
            groups[encoding, decays] = dict(params=[], weight_decay=decay, scale=rate)
    for name, weight in net.named_parameters():
        encoding = name.startswith("rpe.") or ".table" in name or ".contextual." in name
        decays = weight.ndim >= 2 and not re.search(free, name)
        groups[encoding, decays]["params"].append(weight)
    return list(groups.values())


def learning_rate(step: int, steps: int, warmup_steps: int, base: float) -> float:
    """From 0 to `base` in a line over warmup_steps, then to 0 at `steps` as half a cosine."""
    if step < warmup_steps:
        return base * step / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def clip_gradients(net: nn.Module, fc: PartialFC, limit: float):
    """Scales all gradients down to a common norm of `limit`. The network's are the same in all
    processes; of the class weights each has its own, whose squares are summed over them."""
    norm = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    norm = (norm**2 + all_reduce(fc.weight.grad.norm()**2)).sqrt()
    nn.utils.clip_grads_with_norm_([*net.parameters(), fc.weight], limit, norm)


def share_statistics(net: nn.Module):
    """Gives all processes the batch norms' statistics of the first, which the checkpoint has."""
    for module in net.modules() if dist.is_initialized() else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            dist.broadcast(module.running_mean, 0)
            dist.broadcast(module.running_var, 0)


def build(args, device: torch.device, features: int = 512) -> nn.Module:
    """The network that the flags describe, on `device`."""
    if args.model in IRESNETS:
        depth = int(args.model.removeprefix("iresnet").removeprefix("arcface"))
        net = IResNet(depth, args.size, features, args.model.startswith("arcface"))
        return net.to(device, memory_format=torch.channels_last)
    config = dict(dim=args.dim, depth=args.depth, heads=args.heads, mlp_ratio=args.mlp_ratio)
    seen = args.size - args.size % args.patch  # insightface: 108 of 112 px by patches of 9
    size = VIT_SIZES.get(args.model, config) | dict(patch=args.patch, image_size=seen)
    channels = 1 if args.data == "affnist" else 3
    net = ViT(size, args.rpe, args.num_keypoints, channels, features, args.drop_path, args.pool)
    net.wanted = (channels, args.size, args.size)  # patches begin at the top left
    return net.to(device)


def train(args) -> dict:
    """Trains, evaluates or predicts, as the flags say; returns the last evaluation's numbers."""
    if args.eval:
        return evaluate_checkpoint(args)
    if args.predict:
        return predict(args)
    job = run.Job(args)
    initial = None if job.state else take_initial(args)
    # Data
    images, crops = training_set(args, job.device)
    conditions = test_conditions(args, job.device)  # what is wrong with them is said now
    labels = torch.from_numpy(images.labels)
    classes = len(images.ids)
    say_what_is_missing(args, job, conditions)
    job.say(f"{len(images):,} training images of {classes:,} identities; {args.model}, {args.rpe}")
    batches = SubjectBatches(images.labels, args.repeat, args.batch_size, args.seed, job.rank,
                             job.world)
    coloured = args.augment != "none" and args.data != "affnist"
    data = PhotometricAugmentation(crops, args.seed) if coloured else crops
    loader = crop_loader(args, data, batches, job.device)
    # Network and classes, each with its optimizer
    net = build(args, job.device)
    if initial:
        run.load_weights(net, initial["model"], args.init)
    fc = PartialFC(512, classes, MARGINS[args.loss](scale=args.scale), args.sample_rate)
    fc.to(job.device)
    divided = args.rpe in (*STATIC, *KEYPOINT) and net.rpe is not None  # B by sqrt(d_k)
    rpe_lr = args.rpe_lr or (1 / net.rpe.scale if divided else 1.0)
    groups = parameter_groups(net, args.weight_decay, rpe_lr)
    optimizer = torch.optim.AdamW(groups, fused=True)
    class_optimizer = torch.optim.AdamW([fc.weight], weight_decay=args.weight_decay, fused=True)
    job.restore(net, optimizer, [len(images), classes])
    if job.state:
        fc.load_shards(job.state["head"], class_optimizer)
    model = job.wrap(net)  # not fc: the classes are sharded
    job.begin(data, batches, loader)
    scores = {}
    for epoch in job.epochs():
        net.train()
        fc.train()
        for step, batch in job.steps_of(epoch):
            rate = learning_rate(step, args.epochs * job.steps, args.warmup * job.steps, args.lr)
            class_optimizer.param_groups[0]["lr"] = rate
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            image, keypoints = inputs(*to_device(batch, job.device), args.draw_keypoints)
            with run.precision(args, job.device):
                embeddings = model(image, keypoints)
            loss = fc(embeddings, labels[batch["index"]])  # over all processes
            optimizer.zero_grad(set_to_none=True)
            class_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if args.clip:
                clip_gradients(net, fc, args.clip)
            optimizer.step()
            class_optimizer.step()
            job.note(step, loss=loss)
        share_statistics(net)
        head = fc.gather_state(class_optimizer)
        if job.due(epoch):
            last = epoch + 1 == args.epochs
            now = [condition for condition in conditions if last or not condition.late]
            scores = evaluate(net, head["weight"], now, args, job.device)
        job.save(epoch, scores if job.due(epoch) else {}, head=head)
    if job.start >= args.epochs:  # it was killed after its last checkpoint
        scores = evaluate(net, fc.whole(fc.weight), conditions, args, job.device)
    if args.data == "faces":
        scores |= pixel_scores(conditions, args, job.device)
    if job.rank == 0 and scores:
        print_table(scores, args)
        write_pictures(job.folder, net, conditions, args.dfa)
    return scores


def take_initial(args) -> dict | None:
    """The checkpoint or published weights of --init, whose network `args` describes from now on."""
    if not args.init:
        return None
    state = read_checkpoint(args.init, args.script)
    network = {name: state["args"][name] for name in NETWORK if name in state["args"]}
    run.restore_args(args, network, args.init)
    return state


def note_warmup(job: run.Job):
    """Says so if the rate rises for most of the run."""
    if 2 * job.args.warmup > job.args.epochs:
        job.say(f"note: the rate rises for {job.args.warmup:g} of {job.args.epochs} epochs; a run "
                "this short wants a smaller --warmup")


def say_what_is_missing(args, job: run.Job, conditions: Sequence):
    """Says at the start what the user may not expect of a run by these flags."""
    if not conditions:
        job.say(f"note: --data {args.data} has no test split: without --test nothing is measured")
    elif args.unaligned and not any("@unaligned" in condition.suffix for condition in conditions):
        job.say("note: --unaligned has no effect: no test set has landmarks to align its images by")
    note_warmup(job)


# ---- Evaluation: Sec. 4 and supplement -----------------------------------------------------------

class TestCondition(NamedTuple):
    """One way of looking at a test set: its data; what is asked of it; what is added to the names
    of scores; noise on its keypoints, alpha of Eq. (12); whether it waits for the run's end."""
    data: object
    loader: object
    protocols: list
    suffix: str = ""
    noise: float = 0.0
    late: bool = False


def shard_keys(count: int, batch: int, rank: int = 0, world: int = 1) -> list[list[tuple]]:
    """Batches of a set's keys that one process looks at: every world-th, as many in each."""
    mine = np.arange(rank, rank + -(-count // world) * world, world) % count
    keys = [(0, i) for i in mine.tolist()]
    return [keys[start:start + batch] for start in range(0, len(keys), batch)]


def gather_shards(mine: torch.Tensor, count: int) -> torch.Tensor:
    """Rows (count, ...) of a set in its order, of each process's rows of its `shard_keys`."""
    by_rank = all_gather(mine).unflatten(0, (ranks()[1], -1))
    return by_rank.transpose(0, 1).flatten(0, 1)[:count]


def read_tests(args) -> dict[str, tuple[Split, list]]:
    """The test split of --data, if there is one, and the sets of --test, by what ends the names of
    their scores: images, and what is asked of them.
    Raises: UserError for two sets of one name, and for --fusion without a test split."""
    found = {}
    faces = None if args.data in (*RECORDS, "") else identity_faces(args, "test")
    if faces is not None:
        protocols = [recognition.own_pairs(faces), recognition.own_identification(faces)]
        if args.fusion:
            protocols.append(own_templates(faces))
        found[""] = face_split(args, faces), protocols
    elif args.fusion:
        raise UserError(f"--fusion: --data {args.data} has no test split, PERSON/VIDEO/*.jpg in "
                        "the folder test, whose videos could be fused")
    for path in args.test:
        for test in recognition.read_tests(path, args.upright):
            if f"@{test.name}" in found:
                raise UserError(f"--test {path}: another set is {test.name}, too; evaluate them "
                                "apart")
            found[f"@{test.name}"] = test_split(args, path, test), [test]
    return found


def test_split(args, path: str, test) -> Split:
    """The images of a set of --test, with its landmarks."""
    beside = recognition.landmarks_beside(path)
    note = f"no {beside}: its images are taken as aligned"
    split = Split(test.images, None)
    if test.points is not None:
        note = "unaligned are whole images" if args.unaligned else ""
        boxes = None
        if args.box == "landmarks":
            boxes = datasets.landmark_boxes(test.points.astype(np.float64))
            if args.unaligned:
                count = test.points.shape[1]
                note = f"unaligned are crops about the box of {count} landmarks x {args.margin}"
        split = Split(test.images, five_points(test.points, beside), boxes)
    elif not path.endswith(".bin"):
        check_keypoints_known(args, split, f"--test {path}")
    elif wants_keypoints(args) and not args.dfa:  # a .bin is aligned
        note += ", and all their keypoints as ArcFace's five points; --dfa finds their own"
    if note and ranks()[0] == 0:
        print(f"--test {test.name}: {note}")
    return split


def test_conditions(args, device: torch.device) -> list[TestCondition]:
    """All ways of looking at the test sets: aligned, and with --unaligned unaligned; `late` the
    noise, and the templates of IJB, whose millions of pairs take a minute.
    Names of scores end in @NAME for a set of --test, then in @unaligned, in @noise..."""
    conditions = []

    def add(data, protocols, suffix: str):
        keys = shard_keys(len(data), 64 if device.type == "cpu" else 256, *ranks())
        loader = crop_loader(args, data, keys, device, kept=suffix in ("", "@unaligned"))
        late = any(isinstance(test, recognition.TemplateSet) for test in protocols)
        conditions.append(TestCondition(data, loader, protocols, suffix, late=late))
        for alpha in args.keypoint_noise:
            conditions.append(TestCondition(data, loader, protocols, f"{suffix}@noise{alpha:g}",
                                            alpha, late=True))

    if args.data == "affnist":
        refuse_flags_of_faces(args)
        images, labels = digits.read_mnist(args.data_root, "test", args.limit)
        image, points = digits.mnist_canvas(images, 0, canvas=args.size)
        add(digits.Digits(image, labels, args.size, points), [labels], "")
        image, points, _ = digits.affnist(images, 0, canvas=args.size)
        add(digits.Digits(image, labels, args.size, points), [labels], "@affine")
        return conditions
    for name, (split, protocols) in read_tests(args).items():
        add(make_crops(args, split, 1.0), protocols, name)
        if args.unaligned and split.points is not None:
            add(make_crops(args, split, 0.0), protocols, f"{name}@unaligned")
    return conditions


def add_keypoint_noise(keypoints: torch.Tensor, index: torch.Tensor, alpha: float) -> torch.Tensor:
    """Keypoints (B, 5, 2) in [0, 1] with noise, always the same for an image's index (B,)."""
    if not alpha:
        return keypoints
    noise = [np.random.default_rng((1, i)).standard_normal((5, 2)) for i in index.tolist()]
    # Eq. (12): L_pert = L + alpha L, where the text means L + alpha N(0, 1)
    return keypoints + alpha * torch.from_numpy(np.stack(noise)).to(keypoints)


class Embedded(NamedTuple):
    """What `embed` makes of N images, on the CPU of rank 0."""
    features: torch.Tensor   # (N, D)
    keypoints: torch.Tensor  # (N, 5, 2) in [0, 1], as the network had them
    score: torch.Tensor      # (N,) face score of --dfa, else 1


@torch.inference_mode()
def embed(net: nn.Module, condition: TestCondition, args, device: torch.device) -> Embedded:
    """Embeddings of a set, in order; of faces the sum of an image's and its mirror's, whose
    keypoints --dfa finds anew. Each process makes its share."""
    net.eval()
    flip = torch.from_numpy(datasets.SCHEMES[5].flip).to(device)
    rows = []
    for batch in copy.copy(condition.loader):  # a copy, so that its workers end with this loop
        pixels, points = to_device(batch, device)
        score = points.new_ones(len(points))
        mirrored = torch.stack([pixels.shape[-1] - 1 - points[..., 0], points[..., 1]], -1)[:, flip]
        if args.dfa:
            points, score = detect(args.dfa, pixels)
            mirrored, _ = detect(args.dfa, pixels.flip(3))
        views = [(pixels, points), (pixels.flip(3), mirrored)]
        if args.data == "affnist":
            views.pop()
        features = 0
        seen = []
        for pixels, points in views:
            image, keypoints = inputs(pixels, points, args.draw_keypoints)
            seen.append(add_keypoint_noise(keypoints, batch["index"], condition.noise))
            with run.precision(args, device):
                features = features + net(image, seen[-1])
        rows.append(torch.cat([features, seen[0].flatten(1), score[:, None]], 1))
    whole = gather_shards(torch.cat(rows), len(condition.data))
    if ranks()[0] == 0:
        whole = whole.cpu()
    features, keypoints, score = whole.split([whole.shape[1] - 11, 10, 1], 1)
    return Embedded(features, keypoints.unflatten(1, (5, 2)), score[:, 0])


def evaluate(net: nn.Module, centres: torch.Tensor | None, conditions: Sequence[TestCondition],
             args, device: torch.device) -> dict:
    """Scores by name, as rank1, accuracy@unaligned, tar/0.0001@IJB-C, on rank 0, {} on others.
    Args: centres (C, D), the class weights, to classify digits by, on rank 0."""
    scores = {}
    for condition in conditions:
        found = embed(net, condition, args, device)
        for protocol in condition.protocols if ranks()[0] == 0 else ():
            if isinstance(protocol, Templates):
                for rule in args.fusion:
                    pooled = fuse(found.features, protocol.template, rule, found.keypoints,
                                  found.score)
                    for k, share in identify_templates(pooled, protocol).items():
                        scores[f"rank{k}{condition.suffix}@{rule}"] = share
                continue
            if isinstance(protocol, np.ndarray):  # labels of digits
                cosines = found.features @ F.normalize(centres).T
                right = cosines.argmax(1) == torch.from_numpy(protocol.astype(np.int64))
                answers = {"accuracy": right.double().mean().item()}
            elif isinstance(protocol, recognition.TemplateSet):
                # IJB, as CVLface has it: unit features of images, times their faceness.
                answers = recognition.score(protocol, F.normalize(found.features))
            else:
                answers = recognition.score(protocol, found.features)
            for name, value in answers.items():
                scores[f"{name}{condition.suffix}"] = value
    return scores


def pixel_scores(conditions: Sequence[TestCondition], args, device: torch.device) -> dict:
    """What needs no network: scores as of `evaluate`, accuracy@pixels, rank1@pixels unaligned."""
    soon = [condition for condition in conditions if not condition.late]
    scores = {}
    for key, value in evaluate(recognition.Pixels(), None, soon, args, device).items():
        name, _, condition = key.partition("@")
        scores[f"{name}@pixels {condition}".strip()] = value
    return scores


def print_table(scores: dict, args):
    """A line for each test condition: its scores in %."""
    box = f", unaligned: {args.box}" if args.unaligned else ""
    print(f"{args.data or args.eval}: {args.model}, {args.rpe}, {args.size} px{box}")
    lines = {}
    for key, value in scores.items():
        name, _, condition = key.partition("@")
        if not name.endswith("/std"):
            lines.setdefault(condition or "test", []).append(f"{name} {100 * value:.2f} %")
    for condition, values in lines.items():
        print(f"  {condition:20} {', '.join(values)}")


def open_checkpoint(args, path: str) -> tuple[nn.Module, dict, torch.device]:
    """The network of a checkpoint or of published weights, its classifier's state, and the device;
    `args` takes its flags over.   Raises: UserError for a network of digits and faces."""
    named = args.data if "data" in args.given or args.predict else None
    state, device = run.open_checkpoint(args, path, ("landmarks",), read_checkpoint)
    data = state["args"]["data"]
    if named not in (None, data) and "affnist" in (named, data):
        raise UserError(f"{path} is of a run on {data}, not for --data {named}")
    net = build(args, device, state["args"].get("features", 512))
    run.load_weights(net, state["model"], path)
    return net.eval(), state["head"], device


def evaluate_checkpoint(args) -> dict:
    """--eval: a checkpoint's numbers on the test split and --test; with --output, pictures too."""
    net, head, device = open_checkpoint(args, args.eval)
    folder = run.find_run(args)
    conditions = test_conditions(args, device)
    if not conditions:
        where = f"--data {args.data}" if args.data else args.eval
        raise UserError(f"{where} has no test split in {args.data_root!r}; give --test")
    scores = evaluate(net, head["weight"], conditions, args, device)
    print_table(scores, args)
    if folder:
        write_pictures(run.make_run(args, folder), net, conditions, args.dfa)
    return scores


def predict(args) -> dict:
    """--predict: for each face writes the crop that the network saw as NAME.png, its unit embedding
    as NAME.npy, and its keypoints, if it has any, as NAME.pts in px of the image.

    Keypoints come from --detector, from NAME.pts beside the image, as the landmark scripts write
    it, or from --dfa. Faces are aligned by them; one without is cropped by --box, or taken whole.
    Raises: UserError for a face without keypoints if the network needs them.
    """
    net, _, device = open_checkpoint(args, args.weights)
    detector = photos.open_detector(args.detector) if args.detector else None
    for photo in photos.photos(args, (".png", ".pts", ".npy")):
        for box, points in photo_faces(args, photo, detector, device):
            if points is not None:
                matrix = warp.fit_similarity(torch.from_numpy(points)[None], template(args.size))
                points = points.astype(np.float32)
            elif wants_keypoints(args):
                raise UserError(f"{photo.path}: the network needs keypoints: put its .pts beside "
                                "it, as the landmark scripts write it, or give --dfa or --detector")
            else:
                margin = 1.0 if args.box in args.boxes else args.margin
                matrix = torch.from_numpy(datasets.square_crops(box[None], args.size, margin))
            face = datasets.Face(photo.image, points)
            data = datasets.CropDataset([face], matrix, args.size, reflect=True)
            batch = data.__getitems__([(0, 0)])
            feature = embed(net, TestCondition(data, [batch], []), args, device).features[0]
            target = photo.target()
            datasets.write_image(target + ".png", batch["image"][0].numpy())
            np.save(target + ".npy", F.normalize(feature, dim=0).numpy())
            if points is not None:
                datasets.write_pts(target + ".pts", points)
    return {}


def photo_faces(args, photo, detector, device: torch.device) -> list[tuple]:
    """The faces of an image of --predict: box (4,) px, and keypoints (5, 2) float64 px or None.
    All that the detector finds; else one, of NAME.pts beside the image, by --dfa, or in --box."""
    if detector is not None:
        found = photos.detect(detector, photo.image)
        return [(None, row[4:14].reshape(5, 2)) for row in found]  # the image-left eye comes first
    box = photos.find_boxes(args, photo.image, None)[0]
    beside = os.path.splitext(photo.path)[0] + ".pts"
    if os.path.isfile(beside):
        points = five_points(datasets.read_pts(beside)[None], beside)[0].astype(np.float64)
        if not np.ptp(points, axis=0).any():
            raise UserError(f"{beside}: its eyes, nose tip and mouth corners coincide, which "
                            "aligns nothing; correct it, or take it away")
        return [(box, points)]
    if args.dfa:
        typed = None if args.box in args.boxes else box
        return [(box, find_face(open_dfa(args.dfa, device), photo.image, typed))]
    return [(box, None)]


# ---- Figures -------------------------------------------------------------------------------------

def framed(image: np.ndarray) -> np.ndarray:
    """An image in a white frame of 4 px."""
    return cv2.copyMakeBorder(image, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def picture(data, i: int, side: int, dfa: str) -> tuple[np.ndarray, np.ndarray]:
    """Image i of a set as RGB uint8 (side, side, 3), and its keypoints (5, 2) in [0, 1]."""
    image, points = to_device(data.__getitems__([(0, i)]), torch.device("cpu"))
    if dfa:
        points = detect(dfa, image)[0]
    pixels = image[0].permute(1, 2, 0).expand(-1, -1, 3).byte().numpy()
    pixels = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(pixels), inputs(image, points)[1][0].numpy()


@torch.inference_mode()
def offsets(net: nn.Module, keypoints: torch.Tensor) -> torch.Tensor:
    """What the encoding adds to the logits of head 0: keypoints (B, L, 2) -> (depth, B, N, N)."""
    return torch.stack([bias[:, 0].expand(len(keypoints), -1, -1)
                        for _, bias in zip(net.blocks, net.biases(keypoints))])


def draw_offset(values: np.ndarray, query: tuple[int, int], keypoints: np.ndarray, side: int):
    """One map (h, w), white at its lowest and blue at its highest value, with the query's patch
    (row, column) as a red star and the keypoints as green circles (in the paper blue)."""
    height, width = values.shape
    share = (values - values.min()) / max(np.ptp(values), 1e-9)
    share = cv2.resize(share.astype(np.float32), (side, side), interpolation=cv2.INTER_NEAREST)
    image = 255 + share[..., None] * (np.array([30, 60, 170]) - 255)
    image = image.round().astype(np.uint8)
    star = (int((query[1] + 0.5) / width * side), int((query[0] + 0.5) / height * side))
    cv2.drawMarker(image, star, photos.RED, cv2.MARKER_STAR, side // 10, 2, cv2.LINE_AA)
    return framed(photos.draw_points(image, keypoints * side - 0.5, (30, 150, 30), side / 50))


def draw_offsets(net: ViT, data, dfa: str = "", side: int = 160) -> np.ndarray:
    """Fig. 12, then Fig. 13: an image, then maps of head 0. First one image, a row for each of
    three queries, a column for layers 0, 1, 3, 5, 7; then three images, by the first query."""
    height, width = (n // net.patch_embed.proj.stride[0] for n in net.wanted[1:])
    layers = [layer for layer in (0, 1, 3, 5, 7) if layer < len(net.blocks)]
    chosen = [picture(data, i, side, dfa) for i in photos.spread(len(data), 4)]
    keypoints = torch.from_numpy(np.stack([points for _, points in chosen]))
    maps = offsets(net, keypoints.to(net.pos_embed.device))                   # (depth, 4, N, N)
    maps = maps.float().cpu().numpy()
    queries = [(height // 2, width // 2), (height // 4, width // 4), (height - 2, width // 2)]
    shown = [(0, query) for query in queries] + [(i, queries[0]) for i in range(1, len(chosen))]
    tiles = []
    for i, query in shown:
        image, points = chosen[i]
        image = photos.draw_points(image.copy(), points * side - 0.5, photos.GREEN, side / 50)
        tiles.append(framed(image))
        for layer in layers:
            values = maps[layer, i, query[0] * width + query[1]].reshape(height, width)
            tiles.append(draw_offset(values, query, points, side))
    return photos.tile(tiles, len(layers) + 1)


def write_pictures(folder: Path, net: nn.Module, conditions: Sequence[TestCondition], dfa: str):
    """What the paper's figures show, from this run: offsets.png of a ViT with a bias, on the own
    test split, unaligned if it was tested so: there keypoints differ most."""
    tests = [test for test in conditions if test.suffix in ("", "@unaligned", "@affine")]
    if tests and getattr(net, "rpe", None) is not None:
        datasets.write_image(folder / "offsets.png", draw_offsets(net, tests[-1].data, dfa))


# ---- Face aligner: supplement 3, Eqs. (13) to (15) -----------------------------------------------

# RetinaFace for a crop with one face: what its anchors find is not sorted out but averaged, with
# weights that a small network gives. Its convolutions, as published, stand at the end of the file.

# The supplement gives the size, batch and epochs of "widerface"; the rest is ours.
DFA_PAPER = dict(size=160, batch_size=320, epochs=750, lr=1e-3, weight_decay=0.05, box="face",
                 eval_every=10)
SMALL_DFA = dict(batch_size=16, epochs=10, lr=2e-3, warmup=1.0, cache="device", eval_every=5)
DFA_PRESETS = {
    "widerface": {},
    "folder": dict(SMALL_DFA, box="landmarks"),
    "youtube": dict(SMALL_DFA, box="landmarks"),
    "faces": SMALL_DFA,
}
# The stride of each level and the sides of its anchors, px: code. RetinaFace's sides are 16 to 512.
ANCHORS = ((8, (64, 80)), (16, (96, 112)), (32, (128, 144)))
VARIANCE = (0.1, 0.2)  # units of encoded places and of encoded logarithms of sizes (SSD)
AGGREGATION = 30.0  # weight of the aggregated box and landmarks in the loss; ours
DFA_MARGIN = 1.2  # side of the crop over the longer side of the face's box: "padding of 0.1"
FLIP_9 = (1, 0, 2, 4, 3, 6, 5, 8, 7)  # five landmarks, then the corners of the box
DFA_SHIFT = 0.4  # of the augmentation, `draw_move`; ours


def dfa_flags(parser):
    """Adds the flags of --task dfa."""
    add = parser.add_argument_group("face aligner").add_argument
    add("--size", type=run.multiple(32), default=160, help="side of the crop in px")


def prior_boxes(size: int = 160) -> torch.Tensor:
    """Anchors cx, cy, w, h in units of the image's side: (N, 4), 1,050 at 160 px, in the order
    level, row, column, side.   Args: size of the image in px.   Raises: ValueError."""
    if size < 32 or size % 32:
        raise ValueError(f"anchors of an image of {size} px: expected a multiple of 32, as 160")
    priors = []
    for stride, sides in ANCHORS:
        centres = (torch.arange(size // stride) + 0.5) * stride
        sides = torch.tensor(sides, dtype=torch.float32)
        y, x, side = torch.meshgrid(centres, centres, sides, indexing="ij")
        priors.append(torch.stack([x, y, side, side], -1).view(-1, 4) / size)
    return torch.cat(priors)


def encode_boxes(boxes: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """Boxes (..., 4) x0 y0 x1 y1 as offsets of anchors (..., 4); the two broadcast."""
    low, high = boxes.split(2, -1)
    place = ((low + high) / 2 - priors[..., :2]) / (VARIANCE[0] * priors[..., 2:])
    return torch.cat([place, ((high - low) / priors[..., 2:]).log() / VARIANCE[1]], -1)


def decode_boxes(encoded: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_boxes`."""
    centre = priors[..., :2] + VARIANCE[0] * encoded[..., :2] * priors[..., 2:]
    half = priors[..., 2:] * (VARIANCE[1] * encoded[..., 2:]).exp() / 2
    return torch.cat([centre - half, centre + half], -1)


def encode_points(points: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """Points (..., P, 2) as offsets (..., 2P), x y x y, of anchors (..., 4); the two broadcast."""
    offsets = (points - priors[..., None, :2]) / (VARIANCE[0] * priors[..., None, 2:])
    return offsets.flatten(-2)


def decode_points(encoded: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_points`."""
    offsets = encoded.unflatten(-1, (-1, 2))
    return priors[..., None, :2] + VARIANCE[0] * offsets * priors[..., None, 2:]


class MixerBlock(nn.Module):
    """Mixes the anchors of each channel, then the channels of each anchor: (B, N, 16) -> same.
    Source: Tolstikhin et al., "MLP-Mixer", NeurIPS 2021."""

    def __init__(self, anchors: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(16, eps=1e-6)
        self.across = nn.Sequential(nn.Linear(anchors, 8), nn.GELU(), nn.Linear(8, anchors))
        self.norm2 = nn.LayerNorm(16, eps=1e-6)
        self.within = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x):
        x = x + self.across(self.norm1(x).mT).mT
        return x + self.within(self.norm2(x))


class Found(NamedTuple):
    """What the aligner sees in images; places are in [0, 1], (x + 0.5) / W."""
    landmarks: torch.Tensor  # (B, 5, 2) L of Eq. (15): eyes, nose tip, mouth corners, left first
    score: torch.Tensor      # (B,) face score of the same weights, 0 to 1
    best: torch.Tensor       # (B, 5, 2) landmarks of the one anchor of the highest face score
    weights: torch.Tensor    # (B, N) w of Eq. (14)
    fused: torch.Tensor      # (B, 16) w^T O: x0 y0 x1 y1; logits of "none", "face"; 10 coordinates
    boxes: torch.Tensor      # (B, N, 4) of each anchor, encoded
    logits: torch.Tensor     # (B, N, 2)
    points: torch.Tensor     # (B, N, 10), encoded


class DFA(nn.Module):
    """Differentiable face aligner: the five landmarks of the one face in each image.

    Takes square images (B, 3, S, S), RGB in [-1, 1], and resizes those of another side than `size`,
    pixel centres on pixel centres.
    Args: size in px of what the network sees; published, whether it is for the published weights,
        for which images are resized as the authors' code does: corners on corners, up to half a
        pixel off, without antialiasing. Their places are x / S; here half a pixel is added.
    Returns: `Found`.   Raises: ValueError.
    """

    def __init__(self, size: int = 160, published: bool = False):
        super().__init__()
        self.size = size
        self.published = published
        self.register_buffer("priors", prior_boxes(size), persistent=False)
        self.body = MobileNet()
        self.fpn = FPN()
        self.ssh1, self.ssh2, self.ssh3 = SSH(), SSH(), SSH()
        self.ClassHead = nn.ModuleList(Head(2) for _ in ANCHORS)
        self.BboxHead = nn.ModuleList(Head(4) for _ in ANCHORS)
        self.LandmarkHead = nn.ModuleList(Head(10) for _ in ANCHORS)
        mixer = [MixerBlock(len(self.priors)) for _ in range(3)]
        self.aggregation = nn.Sequential(*mixer, nn.Linear(16, 1))

    def per_anchor(self, image: torch.Tensor) -> list[torch.Tensor]:
        """What each anchor finds: logits (B, N, 2), boxes (B, N, 4), points (B, N, 10), encoded."""
        fine, middle, coarse = self.fpn(*self.body(image))
        levels = self.ssh1(fine), self.ssh2(middle), self.ssh3(coarse)
        found = []
        for heads in (self.ClassHead, self.BboxHead, self.LandmarkHead):
            found.append(torch.cat([head(x) for head, x in zip(heads, levels)], 1))
        return [at_least_float32(rows) for rows in found]

    def forward(self, image: torch.Tensor) -> Found:
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] != image.shape[3]:
            raise ValueError(f"images have the shape {tuple(image.shape)}: expected (B, 3, S, S)")
        side = image.shape[2]
        if side != self.size and self.published:
            image = F.interpolate(image, (self.size,) * 2, mode="bilinear", align_corners=True)
        elif side != self.size:  # places in [0, 1] stay
            image = F.interpolate(image, (self.size,) * 2, mode="bilinear", antialias=True)
        if image.device.type == "cpu":  # a quarter faster there
            image = image.contiguous(memory_format=torch.channels_last)
        logits, boxes, points = self.per_anchor(image)
        landmarks = decode_points(points, self.priors)  # (B, N, 5, 2)
        # Eq. (13): O = Concat(F_bbox, F_score, F_ldmk).   Paper: 4 + 1 + 10 channels; code: 4 + 2 +
        # 10, which the number of parameters has; we follow the code.
        O = torch.cat([decode_boxes(boxes, self.priors), logits, landmarks.flatten(2)], -1)
        # Eq. (14): w = Softmax(MixerMLP(O))
        weights = at_least_float32(self.aggregation(O)[..., 0]).softmax(-1)  # (B, N)
        # Eq. (15): L = w^T F_ldmk, and the same of the box and the score. A sum, as autocast would
        # round the coordinates of a matrix product to bfloat16.
        fused = (weights[..., None] * O).sum(1)  # (B, 16)
        score = fused[:, 4:6].softmax(-1)[:, 1]
        top = (logits[..., 1] - logits[..., 0]).argmax(1)
        best = landmarks[torch.arange(len(image), device=image.device), top]
        if self.published:
            best = best + 0.5 / side
            fused[:, :4] += 0.5 / side
            fused[:, 6:] += 0.5 / side
        return Found(fused[:, 6:].unflatten(-1, (5, 2)), score, best, weights, fused, boxes, logits,
                     points)


def align_112(image: torch.Tensor, landmarks: torch.Tensor, border: float = -1.0) -> torch.Tensor:
    """Faces with their five points at ArcFace's, by least-squares similarities: one warp, whose
    gradient reaches the landmarks (code: NumPy there, hence none).
    Args: image (B, C, H, W); landmarks (B, 5, 2) in [0, 1] of it, as `DFA` finds them; border, the
        number outside the image. One of more than twice the resolution should be shrunk before.
    Returns: (B, C, 112, 112), float32 at least.
    Raises: ValueError for another shape; on the CPU also for landmarks that determine no map."""
    if landmarks.shape != (len(image), 5, 2):
        raise ValueError(f"landmarks have the shape {tuple(landmarks.shape)} for {len(image)} "
                         "images: expected (B, 5, 2)")
    if landmarks.device.type == "cpu":  # elsewhere it would wait for the device
        warp.check_points(landmarks, "similarity")
    points = warp.to_px(2 * at_least_float32(landmarks) - 1, image.shape[-2:])
    five = torch.tensor(datasets.ARCFACE_5).to(points)
    return warp.warp_affine(image, warp.fit_similarity(points, five), (112, 112), border)


def match(boxes: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """Which anchors stand for each box: IoU of 0.35 or more, and the best one from 0.2 on.
    Args: boxes (B, 4) x0 y0 x1 y1; priors (N, 4) cx cy w h.   Returns: (B, N) bool.
    Source: SSD; the thresholds are those of RetinaFace's usual code."""
    low = priors[:, :2] - priors[:, 2:] / 2
    high = priors[:, :2] + priors[:, 2:] / 2
    first, last = boxes[:, None].split(2, -1)  # (B, 1, 2) each
    both = (last.minimum(high) - first.maximum(low)).clamp(min=0).prod(-1)  # (B, N)
    overlap = both / ((last - first).prod(-1) + priors[:, 2:].prod(-1) - both)
    top = overlap.argmax(1, keepdim=True)
    return (overlap >= 0.35).scatter(1, top, overlap.gather(1, top) >= 0.2)


def smooth_l1(pred: torch.Tensor, target: torch.Tensor, where=True) -> torch.Tensor:
    """Sum of smooth L1 over the rows of (..., C) that `where` (...) marks and whose target is
    known, not nan, over their number, 1 at least."""
    where = target.isfinite().all(-1) & where
    target = torch.where(where[..., None], target, pred.detach())
    return F.smooth_l1_loss(pred, target, reduction="sum") / where.sum().clamp(min=1)


def multibox_loss(found: Found, box, landmarks, priors) -> tuple[torch.Tensor, ...]:
    """Losses of each anchor for itself, scalars, of the class, the box and the landmarks, over the
    number of positive anchors; of an image's negative ones the worst count, 7 for each positive.
    Source: RetinaFace's usual code; the authors' training script is not published."""
    positive = match(box, priors)  # (B, N)
    entropy = F.cross_entropy(found.logits.mT, positive.long(), reduction="none")
    negative = entropy.detach().masked_fill(positive, 0)
    worst_first = negative.argsort(dim=1, descending=True, stable=True)
    rank = worst_first.argsort(dim=1)  # of each anchor among its image's
    counted = positive | (rank < 7 * positive.sum(1, keepdim=True))
    return ((entropy * counted).sum() / positive.sum().clamp(min=1),
            smooth_l1(found.boxes, encode_boxes(box[:, None], priors), positive),
            smooth_l1(found.points, encode_points(landmarks[:, None], priors), positive))


def aggregation_loss(found: Found, box, landmarks) -> tuple[torch.Tensor, ...]:
    """Losses of the weighted sum, scalars, a face's mean, of the class, "face" in every crop, the
    box and the landmarks. Paper: "smooth L2"; code: smooth L1, which halves and squares errors
    below 1, as all are in [0, 1]; we follow the code."""
    own_box, logits, points = found.fused.split((4, 2, 10), 1)
    return (F.softplus(logits[:, 0] - logits[:, 1]).mean(),  # cross entropy
            smooth_l1(own_box, box), smooth_l1(points, landmarks.flatten(1)))


def dfa_loss(found: Found, box, landmarks, priors) -> torch.Tensor:
    """What --task dfa minimises; boxes count twice (RetinaFace). The weight of the aggregation is
    not published: with 1, as errors are some hundredths, the class alone decides, and within some
    steps one anchor has all the weight.
    Args: box (B, 4) x0 y0 x1 y1 and landmarks (B, 5, 2), nan if unknown, in [0, 1] of the crop."""
    face, own_box, points = multibox_loss(found, box, landmarks, priors)
    fused_face, fused_box, fused_points = aggregation_loss(found, box, landmarks)
    places = 2 * fused_box + fused_points
    return face + 2 * own_box + points + fused_face + AGGREGATION * places


def dfa_dataset(faces: Sequence[datasets.Face], size: int = 160, box: str = "face",
                augment: Callable | None = None, seed: int = 0) -> datasets.CropDataset:
    """Faces as the aligner sees them: the square about the box of each, padded by 0.1 of its side.
    The points of a batch are (B, 9, 2) px: five landmarks, nan if unknown, and the box's corners,
    which crops and augmentation move alike.   Raises: UserError."""
    boxes = datasets.face_boxes(faces, box)
    nine = []
    for face, (x0, y0, x1, y1) in zip(faces, boxes):
        scheme = None if face.points is None else datasets.SCHEMES.get(len(face.points))
        if scheme is None:
            raise UserError(f"{face.where or 'a face'}: landmarks {np.shape(face.points)}; the "
                            f"aligner learns from {', '.join(map(str, datasets.SCHEMES))} of them")
        five = datasets.group_means(face.points, scheme.five)
        points = np.array([*five, (x0, y0), (x1, y0), (x0, y1), (x1, y1)], np.float32)
        nine.append(replace(face, points=points))
    crops = datasets.square_crops(boxes, size, DFA_MARGIN)
    return datasets.CropDataset(nine, crops, size, augment, reach_of(DFA_SHIFT), 1 + ZOOM, FLIP_9,
                                seed, reflect=True)


def targets(points: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The points (B, 9, 2) px of a batch in [0, 1]: box (B, 4) and landmarks (B, 5, 2)."""
    landmarks, corners = ((points + 0.5) / size).split((5, 4), 1)
    return torch.cat([corners.amin(1), corners.amax(1)], -1), landmarks


def aligner_set(args, split: str) -> datasets.CropDataset:
    """A split of --data of --task dfa, of "train" augmented."""
    if args.data == "faces":
        faces = drawn_faces(args, split)
    else:
        faces = datasets.read(args.data, args.data_root, split)[:args.limit or None]
        datasets.check_images(faces, args.upright)
    augment = functools.partial(draw_move, shift=DFA_SHIFT) if split == "train" else None
    return dfa_dataset(faces, args.size, args.box, augment, args.seed)


def train_dfa(args) -> dict:
    """--task dfa: trains, evaluates or predicts, as the flags say; returns the errors."""
    if args.eval:
        return evaluate_aligner(args)
    if args.predict:
        return predict_dfa(args)
    job = run.Job(args)
    # Data
    train_set = aligner_set(args, "train")
    test_set = aligner_set(args, "test")
    mean_face = targets(train_set.crop_points(), args.size)[1].nanmean(0)  # (5, 2)
    if not mean_face.isfinite().all():
        raise UserError(f"none of the {len(train_set)} training faces has landmarks to learn from")
    job.say(f"{len(train_set):,} training faces, {len(test_set):,} test faces")
    note_warmup(job)
    # Network and optimizer
    net = DFA(args.size).to(job.device)
    groups = parameter_groups(net, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, args.lr, fused=True)
    job.restore(net, optimizer, [len(train_set)])
    model = job.wrap(net)
    job.begin(train_set)
    if job.rank == 0:
        batches = datasets.in_order(len(test_set), 64)
        loader = run.make_loader(args, test_set, batches, job.device)
    results = None
    for epoch in job.epochs():
        net.train()
        for step, batch in job.steps_of(epoch):
            rate = learning_rate(step, args.epochs * job.steps, args.warmup * job.steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            image, points = to_device(batch, job.device)
            box, landmarks = targets(points, args.size)
            with run.precision(args, job.device):
                found = model(image / 127.5 - 1)
            loss = dfa_loss(found, box, landmarks, net.priors)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if args.clip:
                nn.utils.clip_grad_norm_(net.parameters(), args.clip)
            optimizer.step()
            job.note(step, loss=loss)
        if job.rank == 0 and job.due(epoch):
            results = evaluate_dfa(net, mean_face, loader, args)
        job.save(epoch, results[0] if results and job.due(epoch) else {}, mean=mean_face)
    if job.rank > 0:
        return {}
    scores, errors = results or evaluate_dfa(net, mean_face, loader, args)
    report_dfa(job.folder, net, test_set, scores, errors, args)
    return scores


@torch.inference_mode()
def evaluate_dfa(net: DFA, mean_face: torch.Tensor, loader, args) -> tuple[dict, dict]:
    """Errors over the root of the area of the true box (supp. 3.1): "nme" of the aggregation,
    "nme@best" of the best anchor, "nme@mean" of a constant answer, the mean training face (5, 2).
    Returns: their means over the faces; by the same names those of each face, (M,) float64."""
    net.eval()
    device = net.priors.device
    rows = []
    for batch in loader:
        image, _ = to_device(batch, device)
        box, landmarks = targets(batch["points"], args.size)
        side = (box[:, 2:] - box[:, :2]).prod(-1).sqrt()
        with run.precision(args, device):
            found = net(image / 127.5 - 1)
        answers = found.landmarks.cpu(), found.best.cpu(), mean_face.expand_as(landmarks)
        rows.append(torch.stack([metrics.nme(answer, landmarks, side) for answer in answers]))
    errors = dict(zip(("nme", "nme@best", "nme@mean"), torch.cat(rows, 1)))
    return {name: values.mean().item() for name, values in errors.items()}, errors


def report_dfa(folder: Path | None, net: DFA, data, scores: dict, errors: dict, args):
    """Prints the mean errors; with a folder, writes aligned.png and ced.png (Fig. 8)."""
    print(f"{args.data}: {len(data):,} faces, NME by the box: {scores['nme']:.4f}, best anchor "
          f"{scores['nme@best']:.4f}, mean face {scores['nme@mean']:.4f}")
    if folder:
        datasets.write_image(folder / "aligned.png", draw_aligned(net, data))
        curves = dict(zip(("aggregation", "best anchor", "mean face"), errors.values()))
        datasets.write_image(folder / "ced.png", metrics.ced_plot(curves, 0.2))


@functools.cache
def open_dfa(path: str, device: torch.device) -> DFA:
    """The network of a checkpoint of --task dfa, or published; frozen, read once.
    Raises: UserError."""
    state = read_checkpoint(path, "kprpe-dfa")
    net = DFA(state["args"]["size"], state["args"].get("published", False)).to(device)
    run.load_weights(net, state["model"], path)
    return net.eval().requires_grad_(False)


def evaluate_aligner(args) -> dict:
    """--task dfa --eval: the errors of a checkpoint on the test split; with --output, pictures."""
    state, device = run.open_checkpoint(args, args.eval, ["box"], read_checkpoint)
    net = open_dfa(args.eval, device)
    folder = run.find_run(args)
    data = aligner_set(args, "test")
    loader = run.make_loader(args, data, datasets.in_order(len(data), 64), device)
    scores, errors = evaluate_dfa(net, state["mean"], loader, args)
    report_dfa(folder and run.make_run(args, folder), net, data, scores, errors, args)
    return scores


@torch.inference_mode()
def draw_aligned(net: DFA, data: datasets.CropDataset, side: int = 160) -> np.ndarray:
    """Eight faces with true (green) and found (red) landmarks; below them aligned."""
    chosen = photos.spread(len(data), 8)
    image, _ = to_device(data.__getitems__([(0, i) for i in chosen]), net.priors.device)
    landmarks = net.eval()(image / 127.5 - 1).landmarks
    found = landmarks.double().cpu() * data.size - 0.5
    found = warp.apply_affine(warp.invert(data.crop_matrices[chosen]), found)
    tiles = []
    for i, points in zip(chosen, found):
        truth = (data.points[i, :5], photos.GREEN)
        tiles.append(photos.draw_crop(data, i, side, truth, (points, photos.RED)))
    for pixels in align_112(image, landmarks, 0.0).permute(0, 2, 3, 1).cpu():
        tiles.append(cv2.resize(pixels.round().byte().numpy(), (side, side)))
    return photos.tile(tiles, len(chosen))


@torch.no_grad()
def detect(path: str, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keypoints (B, 5, 2) px and face scores (B,) that the aligner of --dfa finds in images
    (B, 3, S, S) in 0..255. Code: in training with a black border, whose errors were larger here."""
    found = open_dfa(path, image.device)(image / 127.5 - 1)
    return found.landmarks * image.shape[-1] - 0.5, found.score


@torch.inference_mode()
def find_face(net: DFA, image: np.ndarray, box: np.ndarray | None) -> np.ndarray:
    """Landmarks (5, 2) px of the face in a box (4,) x0 y0 x1 y1 px of an RGB uint8 image (H, W, 3);
    without one, in the box that it finds at a first look at the whole image."""
    margins = [DFA_MARGIN]
    if box is None:
        box = np.array([-0.5, -0.5, image.shape[1] - 0.5, image.shape[0] - 0.5])
        margins = [1.0, DFA_MARGIN]
    for margin in margins:
        size = net.size
        if net.published:  # it resizes itself; outside the image is black
            size = max(round(margin * np.ptp(box.reshape(2, 2), 0).max()), 1)
        matrix = torch.from_numpy(datasets.square_crops(box[None], size, margin))
        if net.published:
            pixels = cv2.warpAffine(image, matrix[0].numpy(), (size, size))
            batch = {"image": torch.from_numpy(pixels)[None]}
        else:
            data = datasets.CropDataset([datasets.Face(image)], matrix, size, reflect=True)
            batch = data.__getitems__([(0, 0)])
        found = net(to_device(batch, net.priors.device)[0] / 127.5 - 1)
        corners = found.fused[:, :4].unflatten(1, (2, 2))
        places = torch.cat([found.landmarks, corners], 1).double().cpu() * size - 0.5
        places = warp.apply_affine(warp.invert(matrix), places)[0].numpy()  # (7, 2)
        box = places[5:].flatten()
    return places[:5]


def predict_dfa(args) -> dict:
    """--task dfa --predict: each face's landmarks, px of the image, as NAME.pts, which --landmarks
    takes, and the face aligned as NAME.png. Without --detector and --box, one face an image."""
    device = run.open_checkpoint(args, args.weights, read=read_checkpoint)[1]
    net = open_dfa(args.weights, device)
    detector = photos.open_detector(args.detector) if args.detector else None
    to = torch.from_numpy(datasets.ARCFACE_5)
    for photo in photos.photos(args, (".pts", ".png")):
        boxes = [None]
        if detector or args.box not in args.boxes:
            boxes = photos.find_boxes(args, photo.image, detector)
        for box in boxes:
            points = find_face(net, photo.image, box)
            face = recognition.WholeImages([photo.image], 112, points[None], align=(to, 1.0))
            target = photo.target()
            datasets.write_pts(target + ".pts", points)
            datasets.write_image(target + ".png", face.__getitems__([(0, 0)])["image"][0].numpy())
    return {}


# ---- Template fusion: supplement 4, Eqs. (16) to (18) --------------------------------------------

def fuse(features: torch.Tensor, template, rule: str = "average", landmarks=None, score=None):
    """Unit features (T, D) of templates, as videos, of the features (N, D) of their images.
    Args: features, norms kept; template (N,) 0..T-1; rule, one of FUSIONS: "average" of unit
        features, "norm" weighted by their norms, "landmark" by what `DFA` finds in these images,
        landmarks (N, 5, 2) in [0, 1] and score (N,).
    Raises: ValueError for an unknown rule, or without landmarks and scores where it takes them."""
    if rule not in FUSIONS or (rule == "landmark" and (landmarks is None or score is None)):
        raise ValueError(f"fusion {rule!r}: expected one of {', '.join(FUSIONS)}, and landmarks "
                         "and scores for the last")
    features = at_least_float32(features)
    weight = torch.ones_like(features[:, 0])
    if rule == "norm":
        # Eq. (16): f = 1/N sum_i ||f_i||_2 fbar_i
        weight = features.norm(dim=1)
    if rule == "landmark":
        # Eq. (17): d_i = (h - min(||L_i - L^||_2, h)) / h, h = 0.2.   Paper: a norm; code: the mean
        # of the five points' distances, whose size h has; we follow the code.
        canonical = torch.tensor((datasets.ARCFACE_5 + 0.5) / 112).to(features)
        distance = (landmarks.to(features) - canonical).norm(dim=-1).mean(-1)
        d = (0.2 - distance.clamp(max=0.2)) / 0.2
        # Eq. (18): f = 1/N sum_i (d_i F_score^i) fbar_i; at least 1e-6 (code), so that a template
        # of bad images alone is their average.
        weight = (d * score.to(features)).clamp(min=1e-6)
    # The mean of one medium, then made a unit vector: a template's length changes no cosine.
    template = torch.as_tensor(template)
    weighted = F.normalize(features) * weight[:, None]
    return recognition.template_features(weighted, template, torch.zeros_like(template))


class Templates(NamedTuple):
    """Videos as templates."""
    template: np.ndarray  # (N,) 0..T-1, of each image
    identity: np.ndarray  # (T,)
    gallery: np.ndarray   # (T,) bool: enrolled; the others are looked for


def own_templates(faces: Sequence[datasets.Face], frames: int = 5) -> Templates:
    """The videos of a set: PERSON/VIDEO/*.jpg by folder; images straight in a person's folder, or
    in one of all people, by name less the last character, as 20.jpg, 21.jpg and PERSON_20.jpg,
    PERSON_21.jpg; drawn faces by `frames`. The first of each person is enrolled.
    Raises: UserError unless there are two people, and two templates of one."""
    keys = []
    seen = Counter()
    for face in faces:
        video = str(seen[face.identity] // frames)
        if isinstance(face.image, (str, os.PathLike)):
            video, name = os.path.split(os.path.splitext(face.image)[0])
            if os.path.basename(video) == face.identity or face.identity not in Path(video).parts:
                video = os.path.join(video, name[:-1])
        seen[face.identity] += 1
        keys.append((face.identity, video))
    videos = sorted(set(keys), key=lambda key: tuple(map(recognition.natural, key)))
    people, first, identity = np.unique([person for person, _ in videos], return_index=True,
                                        return_inverse=True)
    if len(people) < 2 or len(people) == len(videos):
        raise UserError(f"found {len(videos)} templates of {len(people)} people: expected two "
                        "people or more, and two templates of one; PERSON/VIDEO/NAME.jpg, or "
                        "PERSON/20.jpg of video 2")
    place = {key: i for i, key in enumerate(videos)}
    gallery = np.isin(np.arange(len(videos)), first)
    return Templates(np.array([place[key] for key in keys]), identity, gallery)


def identify_templates(pooled: torch.Tensor, templates: Templates, ks=(1, 5)) -> dict[int, float]:
    """Closed-set identification of templates (T, D): {k: share found among the first k}."""
    identity = torch.from_numpy(templates.identity)
    gallery = torch.from_numpy(templates.gallery)
    return metrics.rank_k(pooled[~gallery], identity[~gallery], pooled[gallery], identity[gallery],
                          ks)


# ---- Gait: Sec. 5 --------------------------------------------------------------------------------

# SwinGait-2D: each silhouette passes convolutions and a Swin transformer by itself, whose windows
# have Swin's table of relative positions, or KP-RPE by the 17 joints of the frame.

# Sec. 5: 32 people x 4 walks, 60,000 steps (93 an epoch). The rest is OpenGait's; tested last.
GAIT_PAPER = dict(rpe="kp-multihead", dim=256, heads=16, epochs=645, batch_size=128, frames=30,
                  lr=3e-4, weight_decay=0.02, warmup=0.0, clip=0.0, eval_every=1000)
GAIT_PRESETS = {
    "gait3d": {},
    "walkers": dict(dim=32, heads=2, epochs=20, batch_size=32, frames=4, lr=2e-3, warmup=1.0,
                    unaligned=True),
}
SWIN = ("none", "swin", *KEYPOINT)  # --rpe
TOKENS = (15, 10)  # height and width of a frame, in tokens
WINDOW = (3, 5)  # of a window
STAGES = (4, 2)  # blocks; the second stage has twice the width and the heads of the first
SEQUENCES = 4  # walks of each person in a batch
DRAWN_WALKERS = {"train": dict(people=100, frames=18),
                 "test": dict(people=60, sequences=4, frames=16)}
SPOIL = dict(shift=6.0, zoom=0.2)  # of silhouettes of 64 x 44 px, for --unaligned


def gait_flags(parser):
    """Adds the flags of --task gait."""
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("gait").add_argument
    add("--dim", type=run.within(int, 1, 8192), default=256, help="width of the first stage")
    add("--heads", type=run.within(int, 1, 1024), default=16, help="heads of the first stage")
    add("--drop-path", type=run.within(float, 0, 0.9), default=0.1, help="chance that a frame "
        "skips a branch of the last block")
    add("--rpe", default="kp-multihead", choices=SWIN, help="relative positions: Swin's or KP-RPE")
    add("--rpe-lr", type=run.nonnegative, default=0.0, help="learning rate of the encoding over "
        "--lr; 0: sqrt(d_k) for kp-*, 1 for swin")
    add("--frames", type=run.within(int, 1, 1000), default=30, help="frames of a walk in a step")
    add("--unaligned", action=switch, default=False, help="also test on walks moved at random")


def window_order(shift: tuple[int, int]) -> torch.Tensor:
    """Tokens, counted row by row, of each window, row by row: (W, N) long, 10 windows of 15. They
    lie `shift` further down and right; what they lose on one side comes in on the other."""
    places = torch.arange(math.prod(TOKENS)).view(TOKENS).roll((-shift[0], -shift[1]), (0, 1))
    places = places.unflatten(1, (-1, WINDOW[1])).unflatten(0, (-1, WINDOW[0]))  # (5, 3, 2, 5)
    return places.transpose(1, 2).flatten(2).flatten(0, 1)


class WindowAttention(nn.Module):
    """Attention within the windows of each frame: tokens (F, 150, dim) -> the same.

    Args: table, whether it has Swin's (Liu et al., ICCV 2021): a number for each head and each of
        the 5 x 9 offsets in a window, not divided by sqrt(d_k); shifted, whether windows lie half a
        window further down and right. Tokens from two sides of the frame, which then meet in one,
        do not see each other. `forward`: bias (F, H, N, N) of the windows of each frame, or None.
    """

    def __init__(self, dim: int, heads: int, table: bool, shifted: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # with biases: SwinGait's number of parameters has them
        self.proj = nn.Linear(dim, dim)
        height, width = WINDOW
        self.shift = (height // 2, width // 2) if shifted else (0, 0)
        offsets = (2 * height - 1) * (2 * width - 1)
        # At 0, where Swin draws it with 0.02: so all encodings start as one network.
        self.table = nn.Parameter(torch.zeros(heads, offsets)) if table else None
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        rows, columns = (places[:, None] - places).unbind(-1)  # (N, N) each, query - key
        ids = (2 * width - 1) * (rows + height - 1) + columns + width - 1
        order = window_order(self.shift)  # (W, N)
        top = order // TOKENS[1] < self.shift[0]  # of the frame, where windows at its bottom go on
        left = order % TOKENS[1] < self.shift[1]
        apart = (top[:, :, None] != top[:, None]) | (left[:, :, None] != left[:, None])
        mask = torch.zeros(apart.shape).masked_fill(apart, -math.inf)[None, :, None]
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("order", order.flatten(), persistent=False)
        self.register_buffer("back", order.flatten().argsort(), persistent=False)
        self.register_buffer("mask", mask if shifted else mask[:, :1], persistent=False)

    def forward(self, x, bias=None):
        windows = x[:, self.order].view(-1, len(self.ids), x.shape[-1])  # (F W, N, dim)
        # Four axes, (F W, H, N, d) each: with five, none of a GPU's fused kernels would run.
        q, k, v = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.every_window(bias, len(x)).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, bias)
        return self.proj(y.transpose(1, 2).reshape(x.shape))[:, self.back]

    def every_window(self, bias, frames: int) -> torch.Tensor:
        """What is added to the logits, bias or table, and mask: (F W, H, N, N), or 1 instead of F W
        where it is the same in all windows, and of H in all heads."""
        if self.table is not None:
            bias = self.table[None, :, self.ids]
        bias = self.mask if bias is None else bias[:, None] + self.mask  # (F, W, H, N, N), or 1s
        if bias.shape[:2] == (1, 1):
            return bias[0]
        windows = len(self.order) // len(self.ids)
        return bias.expand(frames, windows, -1, -1, -1).flatten(0, 1)


class SwinBlock(Block):
    """`Block` of frames with attention in windows, and a hidden layer of 4 dim by GELU."""

    def __init__(self, dim: int, heads: int, drop: float, table: bool, shifted: bool):
        super().__init__(dim, heads, 4 * dim, drop)
        self.attn = WindowAttention(dim, heads, table, shifted)
        self.mlp.act = nn.GELU()


class SwinGait(nn.Module):
    """SwinGait-2D: silhouettes (B, T, 64, 44) in [0, 1] [, joints (B, T, joints, 2) in [0, 1]] ->
    15 strips of the body (B, 15, dim), from the head down, not normalised.

    KP-RPE takes the place of Swin's table: M is the grid of one window, 3 x 5, in [0, 1], P the
    joints of the frame, so that all windows of a frame have one bias. A stage has its own W_L.
    Args: dim and heads of the first stage; rpe, one of SWIN; drop_path, of the last block, rising
        evenly from 0.   Raises: UserError.
    Source: Fan et al., "Exploring Deep Models for Practical Gait Recognition", arXiv 2303.03301.
        OpenGait's code has SwinGait-3D alone: here its convolutions are 2-D, and windows of
        3 x 3 x 5 are 3 x 5. Its 16th projection, which no output has, is not here.
    """

    def __init__(self, dim: int = 256, heads: int = 16, rpe: str = "swin",
                 joints: int = gait.JOINTS, drop_path: float = 0.1):
        super().__init__()
        if rpe not in SWIN or dim % 4 or dim % heads:
            raise UserError(f"--dim {dim}, --heads {heads}, --rpe {rpe}: expected a multiple of 4 "
                            f"and of the heads, and one of {', '.join(SWIN)}")
        low, high = dim // 4, dim // 2
        self.stem = nn.Sequential(
            conv_bn(1, low, 3, act=nn.ReLU), BasicBlock(low, low), BasicBlock(low, high, 2),
            *(BasicBlock(high, high) for _ in range(3)))
        self.patch_embed = nn.Conv2d(high, dim, 2, 2)
        self.patch_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList()
        for i in range(sum(STAGES)):
            wide = 1 if i < STAGES[0] else 2
            drop = drop_path * i / (sum(STAGES) - 1)
            self.blocks.append(SwinBlock(wide * dim, wide * heads, drop, rpe == "swin", i % 2 == 1))
        self.widen = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim, bias=False))
        self.norm = nn.LayerNorm(2 * dim)
        self.project = nn.Parameter(torch.empty(TOKENS[0], 2 * dim, dim))
        for strip in self.project.data:
            nn.init.xavier_uniform_(strip)
        init_transformer(self)
        # After the weights are drawn: its own start is 0.
        self.rpe = None
        if rpe in KEYPOINT:
            scale = (dim // heads) ** -0.5
            self.rpe = nn.ModuleList([KPRPE(joints, WINDOW, STAGES[0], heads, rpe, scale),
                                      KPRPE(joints, WINDOW, STAGES[1], 2 * heads, rpe, scale)])

    def biases(self, joints: torch.Tensor | None) -> list:
        """Bias over sqrt(d_k), (F, H, N, N), of each block, by joints (F, joints, 2), or None."""
        if self.rpe is None:
            return [None] * len(self.blocks)
        if joints is None:
            raise ValueError(f"--rpe {self.rpe[0].variant} needs joints (B, T, "
                             f"{self.rpe[0].keypoints}, 2) in [0, 1] beside the silhouettes")
        return [bias for stage in self.rpe for bias in stage(joints)]

    def forward(self, image: torch.Tensor, joints: torch.Tensor | None = None) -> torch.Tensor:
        if image.ndim != 4 or image.shape[2:] != gait.SIDES:
            raise ValueError(f"silhouettes of {tuple(image.shape)}: expected (B, T, 64, 44)")
        biases = self.biases(None if joints is None else joints.flatten(0, 1))
        x = self.stem(image.flatten(0, 1)[:, None])  # (F, dim / 2, 32, 22), F = B T
        size = (2 * TOKENS[0], 2 * TOKENS[1])
        x = F.interpolate(x, size, mode="bilinear", align_corners=True)  # code
        x = self.patch_norm(self.patch_embed(x).flatten(2).mT)  # (F, 150, dim)
        for i, (block, bias) in enumerate(zip(self.blocks, biases)):
            if i == STAGES[0]:
                x = self.widen(x)  # (F, 150, 2 dim)
            x = block(x, bias)
        x = self.norm(x).unflatten(0, image.shape[:2]).amax(1)  # over the frames: (B, 150, 2 dim)
        x = x.unflatten(1, TOKENS)
        x = x.mean(2) + x.amax(2)  # a row of tokens is a strip: (B, 15, 2 dim)
        return at_least_float32(torch.einsum("bpc,pcd->bpd", x, self.project))


def triplet_loss(strips: torch.Tensor, labels: torch.Tensor, margin: float = 0.2) -> torch.Tensor:
    """Mean of max(0, margin + d(a, p) - d(a, n)) over a strip's triplets in which it is not 0, then
    over the strips: (B, P, D), labels (B,) -> scalar; d is the Euclidean distance.
    Source: Hermans et al., arXiv 1703.07737. OpenGait also takes an anchor as its own positive."""
    x = strips.transpose(0, 1)  # (P, B, D)
    # The product's form of it would lose the small distances, and have no gradient at 0.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # (P, B, B)
    same = labels[:, None] == labels
    positive = same.clone().fill_diagonal_(False)
    triplets = positive[:, :, None] & ~same[:, None]  # (B, B, B): anchor, positive, negative
    # All of them, as to pick those out would wait for the GPU: 0.1 GB a tensor at Gait3D's batch.
    loss = (margin + distance[..., None] - distance[:, :, None]).clamp(min=0) * triplets
    return (loss.sum((1, 2, 3)) / (loss > 0).sum((1, 2, 3)).clamp(min=1)).mean()


class GaitLoss(nn.Module):
    """Triplet loss plus cross entropy over the batches of all processes, which have the same size:
    strips (B, P, D), labels (B,) long -> scalar, whole and the same in each process.

    BNNeck (Luo et al., CVPR workshops 2019): distances are taken of the strips as they are, cosines
    with the centres of the people behind a batch norm. Source of the numbers: OpenGait.
    """

    def __init__(self, dim: int, people: int, strips: int = TOKENS[0]):
        super().__init__()
        self.norm = nn.BatchNorm1d(strips * dim)
        self.centres = nn.Parameter(torch.empty(strips, people, dim))
        for strip in self.centres.data:
            nn.init.xavier_uniform_(strip)

    def cosines(self, strips: torch.Tensor) -> torch.Tensor:
        """Of each strip with all people's: (B, P, D) -> (B, P, people)."""
        unit = F.normalize(self.norm(strips.flatten(1)).view_as(strips), dim=-1)
        return torch.einsum("bpd,pcd->bpc", unit, F.normalize(self.centres, dim=-1))

    @torch.compiler.disable  # it talks to the other processes
    def forward(self, strips: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        strips = Gather.apply(strips)
        labels = all_gather(labels)
        if strips.requires_grad:  # Gather adds the gradients of all processes; each has the whole
            strips.register_hook(lambda grad: grad / ranks()[1])
        logits = 16 * self.cosines(strips)
        entropy = F.cross_entropy(logits.mT, labels[:, None].expand(logits.shape[:2]),
                                  label_smoothing=0.1)
        return triplet_loss(strips, labels) + entropy


def gait_set(args, split: str) -> gait.GaitDataset:
    """A split of --data: of "train" clips of --frames, half of them mirrored; else whole walks."""
    if args.data == "walkers":  # the same for every --seed
        walks = gait.walkers(split, **DRAWN_WALKERS[split])
    else:
        walks = gait.read_gait3d(args.data_root, split)
    people = list(dict.fromkeys(walk.identity for walk in walks))
    people = set(people[:args.limit or None])
    walks = [walk for walk in walks if walk.identity in people]
    if args.data == "walkers":
        walks = [drawn_once(walk) for walk in walks]
    train = split == "train"
    return gait.GaitDataset(walks, args.frames if train else None, args.seed, train)


def drawn_once(walk: gait.Sequence) -> gait.Sequence:
    """The same walk with its frames in memory, 3 kB each: to draw one takes 0.8 ms."""
    silhouettes, joints = walk.load(np.arange)
    return walk._replace(load=functools.partial(kept_frames, silhouettes, joints))


def kept_frames(silhouettes: np.ndarray, joints: np.ndarray, pick: Callable):
    """`Sequence.load` of frames in memory."""
    chosen = pick(len(joints))
    return silhouettes[chosen], joints[chosen]


def gait_inputs(batch: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What SwinGait takes of a batch: silhouettes (B, T, 64, 44) and joints (B, T, 17, 2)."""
    image = batch["image"].to(device, non_blocking=True)
    return image.float() / 255, batch["points"].to(device, non_blocking=True)


def gait_groups(args, net: SwinGait, head: GaitLoss) -> list[dict]:
    """Parameters for AdamW. As in OpenGait, norms, tables and the patch embedding do not decay; it
    gives a tenth of the rate to what it takes from a trained network, convolutions and heads."""
    # W_L is divided by sqrt(d_k) as in the ViT; Swin's table is not.
    root_d = (args.dim // args.heads) ** 0.5 if args.rpe in KEYPOINT else 1.0
    groups = parameter_groups(net, args.weight_decay, args.rpe_lr or root_d,
                              r"patch_embed|\.table|bias$")
    groups[0]["params"].append(head.centres)
    groups[1]["params"] += head.norm.parameters()
    return groups


def train_gait(args) -> dict:
    """--task gait: trains or evaluates, as the flags say; returns the scores."""
    args.cache = ""  # crops are what it keeps
    if args.predict:
        raise UserError("--predict: --task gait recognises walks, not images; see --eval")
    if args.eval:
        return evaluate_gait_checkpoint(args)
    job = run.Job(args)
    if args.batch_size % (SEQUENCES * job.world):
        raise UserError(f"--batch-size {args.batch_size}: expected a multiple of {SEQUENCES} walks "
                        f"of a person x {job.world} processes")
    # Data
    train_set = gait_set(args, "train")
    test_sets = gait_tests(args)
    people = len(train_set.ids)
    labels = torch.from_numpy(train_set.labels)
    batches = gait.PeopleBatches(train_set.labels, args.batch_size // SEQUENCES, SEQUENCES,
                                 args.seed, job.rank, job.world)
    job.say(f"{len(train_set):,} walks of {people:,} people, {len(test_sets['']):,} to test on")
    note_warmup(job)
    # Network, head and optimizer
    net = SwinGait(args.dim, args.heads, args.rpe, drop_path=args.drop_path).to(job.device)
    head = GaitLoss(args.dim, people).to(job.device)
    optimizer = torch.optim.AdamW(gait_groups(args, net, head), args.lr, fused=True)
    if job.state:
        run.load_weights(head, job.state["head"], job.folder / "last.pt")
    job.restore(net, optimizer, [people, len(train_set)])
    model = job.wrap(net)
    loss_of = job.wrap(head)
    job.begin(train_set, batches)
    scores = None
    for epoch in job.epochs():  # one pass over the people
        net.train()
        head.train()
        for step, batch in job.steps_of(epoch):
            # OpenGait's rate falls in steps of 1,000 iterations, and to 1e-6.
            rate = learning_rate(step, args.epochs * job.steps, args.warmup * job.steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            person = labels[batch["index"]].to(job.device, non_blocking=True)
            with run.precision(args, job.device):
                strips = model(*gait_inputs(batch, job.device))
            loss = loss_of(strips, person)  # over all processes
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if args.clip:
                nn.utils.clip_grad_norm_([*net.parameters(), *head.parameters()], args.clip)
            optimizer.step()
            job.note(step, loss=loss)
        if job.rank == 0 and job.due(epoch):
            scores = evaluate_gait(net, test_sets, args)
        job.save(epoch, scores if scores and job.due(epoch) else {}, head=head.state_dict())
    if job.rank > 0:
        return {}
    scores = scores or evaluate_gait(net, test_sets, args)
    print_gait(scores, args)
    datasets.write_image(job.folder / "gait.png", draw_walks(test_sets))
    return scores


def gait_tests(args) -> dict[str, gait.GaitDataset]:
    """By the end of their scores' names: the test split, and with --unaligned the same, every walk
    scaled and moved at random.   Raises: UserError if nobody can be found in it."""
    data = gait_set(args, "test")
    gait.mated(data.labels, data.probe)  # before anything is trained
    tests = {"": data}
    if args.unaligned:
        tests["@unaligned"] = gait.GaitDataset(gait.spoil(data.sequences, **SPOIL), None)
    return tests


@torch.inference_mode()
@torch.backends.cudnn.flags(enabled=True, benchmark=False)  # or it tries its ways for each length
def evaluate_gait(net: SwinGait, test_sets: dict, args) -> dict:
    """Scores by name, as rank1, map, minp@unaligned; rank1@gei is that of mean silhouettes, gait
    energy images. The distance of two walks is the mean of their strips' (OpenGait)."""
    net.eval()
    device = net.project.device
    scores = {}
    for suffix, data in test_sets.items():
        strips = []
        energy = []
        for batch in run.make_loader(args, data, datasets.in_order(len(data), 1), device):
            image, joints = gait_inputs(batch, device)
            with run.precision(args, device):
                strips.append(net(image, joints)[0])  # (15, dim)
            energy.append(image[0].mean(0).view(1, -1))  # (1, 64 * 44)
        for name, value in identify_walks(strips, data).items():
            scores[name + suffix] = value
        scores[f"rank1{suffix}@gei"] = identify_walks(energy, data)["rank1"]
    return scores


def identify_walks(strips: Sequence[torch.Tensor], data: gait.GaitDataset) -> dict[str, float]:
    """Scores of the probes among the others, by the strips (P, D) of each walk."""
    x = torch.stack(strips, 1).cpu()  # (P, S, D)
    distance = torch.cdist(x[:, data.probe], x[:, ~data.probe]).mean(0)
    return gait.identify(distance, data.labels, data.probe)


def print_gait(scores: dict, args):
    """Table 5: for each test set a row of the network, and one of gait energy images."""
    titles = {"rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10", "map": "mAP",
              "minp": "mINP"}
    print(f"{args.data} (%)".ljust(30) + "".join(f"{title:>9}" for title in titles.values()))
    for suffix, where in (("", ""), ("@unaligned", ", unaligned")):
        if f"rank1{suffix}" in scores:
            cells = "".join(f"{100 * scores[name + suffix]:>9.2f}" for name in titles)
            print(f"{args.rpe}{where}".ljust(30) + cells)
            energy = scores[f"rank1{suffix}@gei"]
            print(f"gait energy image{where}".ljust(30) + f"{100 * energy:>9.2f}")


def evaluate_gait_checkpoint(args) -> dict:
    """--eval: the numbers of a checkpoint on the test split of --data; with --output, gait.png."""
    state, device = run.open_checkpoint(args, args.eval, ["unaligned"])
    net = SwinGait(args.dim, args.heads, args.rpe).to(device)
    run.load_weights(net, state["model"], args.eval)
    folder = run.find_run(args)
    test_sets = gait_tests(args)
    scores = evaluate_gait(net, test_sets, args)
    print_gait(scores, args)
    if folder:
        datasets.write_image(run.make_run(args, folder) / "gait.png", draw_walks(test_sets))
    return scores


def draw_walks(test_sets: dict) -> np.ndarray:
    """The middle frames of eight walks with their joints, a row for each test set."""
    tiles = []
    for data in test_sets.values():
        chosen = photos.spread(len(data), 8)
        for i in chosen:
            batch = data.__getitems__([(0, i)])
            middle = batch["image"].shape[1] // 2
            pixels = batch["image"][0, middle, :, :, None].expand(-1, -1, 3).numpy()
            pixels = cv2.resize(pixels, (110, 160), interpolation=cv2.INTER_CUBIC)
            joints = batch["points"][0, middle].numpy() * (110, 160) - 0.5
            tiles.append(photos.draw_points(pixels, joints, photos.GREEN, 2.5))
    return photos.tile(tiles, len(chosen))


# ---- Published weights ---------------------------------------------------------------------------

# Files of CVLface (Hugging Face's model.safetensors, or model.pt), AdaFace (.ckpt) and insightface
# (backbone.pth) become checkpoints of this script. Names and shapes tell which network it is.

# By how a file's names begin.
SOURCES = {"model.net.": "CVLface, model.safetensors", "net.": "CVLface, model.pt",
           "model.": "AdaFace, .ckpt", "": "insightface, backbone.pth"}
# Flags of a recogniser: what all have in common, and how the paper tests.
PUBLISHED = dict(data="", size=112, pool="flatten", rpe="none", num_keypoints=5, drop_path=0.1,
                 unaligned=False, box="image", margin=1.4)


def load_published(path) -> tuple[nn.Module, dict]:
    """The network of the authors' file, in evaluation mode, with the outputs of their code: a
    recogniser, images (B, 3, 112, 112) RGB in [-1, 1] and, of KP-RPE, keypoints (B, 5, 2),
    (x + 0.5) / W -> embeddings (B, 512), not normalised; or the face aligner, `DFA`.

    Returns: the network; and a dict: kind; colour, the order that the authors' network takes, which
        is turned to RGB in the weights here; size of images in px; source.   Raises: UserError.
    """
    state = read_published(path)
    args = argparse.Namespace(**state["args"])
    if state["script"] == "kprpe-dfa":
        net = DFA(args.size, published=True)
    else:
        net = build(args, torch.device("cpu"), args.features)
    run.load_weights(net, state["model"], path)
    return net.eval(), state["info"]


def read_checkpoint(path, script: str) -> dict:
    """A checkpoint of `script`, "kprpe" or "kprpe-dfa", or published weights as one.
    Raises: UserError."""
    if "script" in read_tensors(path):
        return run.load(path, script)
    state = read_published(path)
    if state["script"] != script:
        wanted = "a face aligner" if script == "kprpe-dfa" else "a recogniser"
        raise UserError(f"{path} holds {state['info']['kind']}, expected {wanted}")
    return state


def read_published(path) -> dict:
    """Published weights as a checkpoint: script, args, model, head; and info, as `load_published`
    returns it.   Raises: UserError."""
    found = read_state_dict(path)
    begins = next((start for start in SOURCES if any(name.startswith(start) for name in found)), "")
    state = {}
    for name, value in found.items():
        if not name.startswith("head."):  # AdaFace's classes
            name = re.sub(r"^(module\.|model\.|net\.)+", "", name)
            state[name] = value.float() if value.is_floating_point() else value
    first = next((name for name in CONVERTERS if name in state), None)  # the first convolution
    if first is None:
        raise UserError(f"{path}: its names, as {', '.join([*found][:3])}, are those of no "
                        "checkpoint, and of no published network that is known here")
    bgr = first == DFA_FIRST or begins == "model." or says_bgr(path)
    try:
        if bgr:
            state[first] = state[first].flip(1)
        kind, flags, weights = CONVERTERS[first](state)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not the tensors of a published network ({error!r})") from None
    info = dict(kind=kind, colour="BGR" if bgr else "RGB", size=flags["size"],
                source=SOURCES[begins])
    return dict(script="kprpe-dfa" if kind == "DFA" else "kprpe", args=flags, model=weights,
                head={"weight": None}, mean=torch.full((5, 2), math.nan), info=info)


def says_bgr(path) -> bool:
    """Whether CVLface's model.yaml, beside the file or in pretrained_model/, says BGR."""
    files = [Path(path).parent / name for name in ("model.yaml", "pretrained_model/model.yaml")]
    texts = [file.read_text("utf-8", "replace") for file in files if file.is_file()]
    return any(re.search(r"^color_space:\W*BGR", text, re.MULTILINE) for text in texts)


# Each of these turns tensors by the authors' names into: kind, flags and tensors by our names.

def convert_vit(state: dict) -> tuple[str, dict, dict]:
    """CVLface's ViT, plain, with iRPE or KP-RPE; insightface's, which sees 108 of 112 px."""
    dim = len(state["blocks.0.attn.proj.weight"])
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    patch = state["patch_embed.proj.weight"].shape[2]
    kind = "ViT"
    heads = 16 if (depth, patch) == (24, 8) else 8  # the file does not say: base 16; others 8
    encoding = {}
    weights = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.+)\.rpe_([qkv])\.lookup_table_weight", name)
        if match:  # (1, d, 49); of the values (1, 49, d)
            kind = "iRPE"
            table = value[0] if match[2] == "v" else value[0].T
            weights[f"{match[1]}.contextual.{match[2]}"] = table
            heads = dim // table.shape[1]
            encoding = dict(rpe="irpe")
        elif name != "mask_token":  # of insightface, unused
            weights[name] = value
    if "keypoint_linear.weight" in state:
        kind = "KP-RPE"
        W_L = weights.pop("keypoint_linear.weight")
        bias = weights.pop("keypoint_linear.bias")
        heads = len(W_L) // (depth * DISTANCES["product"])
        encoding = dict(rpe="kp-multihead", num_keypoints=W_L.shape[1] // 2)
        # Their keypoints are x / W, half a pixel less than ours; their B not over sqrt(d_k).
        root_d = math.sqrt(dim // heads)
        weights["rpe.keypoint_linear.weight"] = root_d * W_L
        weights["rpe.keypoint_linear.bias"] = root_d * (bias + 0.5 / 112 * W_L.sum(1))
    if dim % heads or not 4 <= patch <= 112:
        raise ValueError(f"{heads} heads of a width of {dim}, patches of {patch} px")
    ratio = len(state["blocks.0.mlp.fc1.weight"]) / dim
    flags = dict(model="own", dim=dim, depth=depth, heads=heads, mlp_ratio=ratio, patch=patch,
                 features=len(state["feature.2.weight"]))
    return kind, PUBLISHED | flags | encoding, weights


def convert_iresnet(state: dict) -> tuple[str, dict, dict]:
    """AdaFace's and CVLface's IResNet, whose names are ours."""
    blocks = len({name.split(".")[1] for name in state if name.startswith("body.")})
    depth = {8: 18, 16: 34, 24: 50, 49: 101}[blocks]
    model = ("arcface" if "body.0.shortcut_layer.0.weight" in state else "iresnet") + str(depth)
    flags = dict(model=model, features=len(state["output_layer.3.bias"]))
    return f"IR-{depth}", PUBLISHED | flags, state


def convert_arcface(state: dict) -> tuple[str, dict, dict]:
    """insightface's iresnet, which is also CVLface's arcface_ir101."""
    outer = dict(conv1="input_layer.0", bn1="input_layer.1", prelu="input_layer.2",
                 bn2="output_layer.0", fc="output_layer.3", features="output_layer.4")
    inner = dict(bn1="res_layer.0", conv1="res_layer.1", bn2="res_layer.2", prelu="res_layer.3",
                 conv2="res_layer.4", bn3="res_layer.5", downsample="shortcut_layer")
    blocks = {tuple(name.split(".")[:2]) for name in state if name.startswith("layer")}
    blocks = sorted(blocks, key=lambda block: (block[0], int(block[1])))  # a file has any order
    weights = {}
    for name, value in state.items():
        part, *rest = name.split(".")
        if part.startswith("layer"):
            block, unit, *rest = rest
            part = f"body.{blocks.index((part, block))}.{inner[unit]}"
        else:
            part = outer[part]
        weights[".".join([part, *rest])] = value
    # Their last batch norm has a weight and a shift, ours has none: they go into its statistics.
    last = "output_layer.4."
    deviation = (weights[last + "running_var"] + 1e-5).sqrt() / weights.pop(last + "weight")
    weights[last + "running_mean"] = (weights[last + "running_mean"]
                                      - weights.pop(last + "bias") * deviation)
    weights[last + "running_var"] = deviation.square() - 1e-5
    return convert_iresnet(weights)


def convert_dfa(state: dict) -> tuple[str, dict, dict]:
    """CVLface's face aligner with a MobileNet."""
    names = {"aggregator": "aggregation", "mlp_tokens": "across", "mlp_channels": "within",
             "fc1": "0", "fc2": "2"}
    weights = {}
    for name, value in state.items():
        weights[".".join(names.get(word, word) for word in name.split("."))] = value
    return "DFA", dict(size=160, published=True), weights


DFA_FIRST = "body.stage1.0.0.weight"
# By the name of the first convolution.
CONVERTERS = {"patch_embed.proj.weight": convert_vit, "input_layer.0.weight": convert_iresnet,
              "conv1.weight": convert_arcface, DFA_FIRST: convert_dfa}


# ---- Backbones: as published, nothing of this paper ----------------------------------------------

def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """(B, cin, H, W) -> (B, cout, H/stride, W/stride). No bias: a batch norm follows."""
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_bn(cin: int, cout: int, kernel: int, stride=1, groups=1, act=None) -> nn.Sequential:
    """`conv` (0), batch norm (1) and, if its class is given, an activation (2)."""
    layers = [conv(cin, cout, kernel, stride, groups), nn.BatchNorm2d(cout)]
    if act:
        layers.append(act(inplace=True))
    return nn.Sequential(*layers)


class IRBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, cin, H, W) -> (B, planes, H/stride, W/stride).
    Source: Deng et al., "ArcFace", CVPR 2019 (improved residual unit); AdaFace's code."""

    def __init__(self, cin: int, planes: int, stride: int, convolution: bool = False):
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride)  # takes every `stride`-th pixel
        if convolution or cin != planes:
            self.shortcut_layer = conv_bn(cin, planes, 1, stride)
        self.res_layer = nn.Sequential(nn.BatchNorm2d(cin), *conv_bn(cin, planes, 3),
                                       nn.PReLU(planes), *conv_bn(planes, planes, 3, stride))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class IResNet(nn.Module):
    """Table 3's comparators, as AdaFace has them: images (B, 3, size, size) -> (B, features), not
    normalised. `forward` takes keypoints like `ViT` and does not use them.
    Args: depth, 18, 34, 50 or 101; size of the images in px, a multiple of 16; arcface, whether the
        first shortcut is a convolution, as in insightface's code.   Raises: ValueError.
    Source: AdaFace's code, whose names of weights are kept."""

    def __init__(self, depth: int = 50, size: int = 112, features: int = 512,
                 arcface: bool = False):
        super().__init__()
        units = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 101: (3, 13, 30, 3)}
        if depth not in units or size % 16 or size < 16:
            raise ValueError(f"IResNet{depth}, images of {size} px: expected one of {[*units]}, "
                             "and a multiple of 16")
        self.wanted = (3, size, size)
        self.input_layer = nn.Sequential(*conv_bn(3, 64, 3), nn.PReLU(64))
        cin = 64
        blocks = []
        for planes, count in zip((64, 128, 256, 512), units[depth]):
            for i in range(count):
                blocks.append(IRBlock(cin, planes, 1 if i else 2, arcface and not blocks))
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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, cin, H, W) -> (B, planes, H/stride, W/stride).
    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, Fig. 5 left."""
    expansion = 1

    def __init__(self, cin: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv(cin, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        reshape = stride > 1 or cin != planes  # else the shortcut is the identity
        self.downsample = conv_bn(cin, planes, 1, stride) if reshape else nn.Identity()

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x), inplace=True)


# RetinaFace's network, of the face aligner, with the names of its weights.
leaky = functools.partial(nn.LeakyReLU, 0.1)


def separable(cin: int, cout: int, stride: int = 1) -> nn.Sequential:
    """Depthwise 3x3, then 1x1: (B, cin, H, W) -> (B, cout, H/stride, W/stride)."""
    depthwise = conv_bn(cin, cin, 3, stride, cin, leaky)
    return nn.Sequential(*depthwise, *conv_bn(cin, cout, 1, act=leaky))


class MobileNet(nn.Module):
    """MobileNetV1 (Howard et al., 2017), a quarter wide: images (B, 3, H, W) -> features of strides
    8, 16, 32 with 64, 128, 256 channels. Paper: V2; code: V1, whose size Table 9 has, as here."""

    def __init__(self):
        super().__init__()
        self.stage1 = nn.Sequential(conv_bn(3, 8, 3, 2, act=leaky), separable(8, 16),
                                    separable(16, 32, 2), separable(32, 32),
                                    separable(32, 64, 2), separable(64, 64))
        self.stage2 = nn.Sequential(separable(64, 128, 2), *(separable(128, 128) for _ in range(5)))
        self.stage3 = nn.Sequential(separable(128, 256, 2), separable(256, 256))

    def forward(self, image):
        fine = self.stage1(image)
        middle = self.stage2(fine)
        return fine, middle, self.stage3(middle)


class FPN(nn.Module):
    """Feature pyramid (Lin et al., CVPR 2017): levels of 64, 128, 256 channels -> three of 64."""

    def __init__(self):
        super().__init__()
        self.output1 = conv_bn(64, 64, 1, act=leaky)
        self.output2 = conv_bn(128, 64, 1, act=leaky)
        self.output3 = conv_bn(256, 64, 1, act=leaky)
        self.merge1 = conv_bn(64, 64, 3, act=leaky)
        self.merge2 = conv_bn(64, 64, 3, act=leaky)

    def forward(self, fine, middle, coarse):
        coarse = self.output3(coarse)
        middle = self.merge2(self.output2(middle) + F.interpolate(coarse, scale_factor=2.0))
        fine = self.merge1(self.output1(fine) + F.interpolate(middle, scale_factor=2.0))
        return fine, middle, coarse


class SSH(nn.Module):
    """Context of 3, 5 and 7 px by 3x3 convolutions (Najibi et al., ICCV 2017): shapes stay."""

    def __init__(self):
        super().__init__()
        self.conv3X3 = conv_bn(64, 32, 3)
        self.conv5X5_1 = conv_bn(64, 16, 3, act=leaky)
        self.conv5X5_2 = conv_bn(16, 16, 3)
        self.conv7X7_2 = conv_bn(16, 16, 3, act=leaky)
        self.conv7x7_3 = conv_bn(16, 16, 3)

    def forward(self, x):
        wide = self.conv5X5_1(x)
        wider = self.conv7x7_3(self.conv7X7_2(wide))
        return F.relu(torch.cat([self.conv3X3(x), self.conv5X5_2(wide), wider], 1))


class Head(nn.Module):
    """`width` numbers for each of two anchors a cell: (B, 64, h, w) -> (B, 2 h w, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.conv1x1 = nn.Conv2d(64, 2 * width, 1)

    def forward(self, x):
        return self.conv1x1(x).permute(0, 2, 3, 1).reshape(len(x), -1, self.width)


# ---- Main ----------------------------------------------------------------------------------------

def main(args) -> dict:
    """Trains, evaluates or predicts in the task of the flags; returns the last numbers."""
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; warps are in float64
    return {"face": train, "dfa": train_dfa, "gait": train_gait}[args.task](args)


if __name__ == "__main__":
    run.main(main, parse_args())
