"""KeyPoint Relative Position Encoding for Face Recognition (KP-RPE).

Minchul Kim, Yiyang Su, Feng Liu, Anil Jain, Xiaoming Liu; CVPR 2024.
https://arxiv.org/abs/2403.14852

The method. A vision transformer that learned from aligned faces fails on faces that are not. KP-RPE
tells it where the face is: five keypoints, of any detector, go into the relative position encoding.
What a query adds to the attention of a key at some distance (one of 49 quantised offsets) is not a
learned number but a linear function of where the query is from the keypoints, for each head of each
layer. The image is not touched.

Train on WebFace4M on four GPUs (the paper: TinyFace rank-1 75.80 %; not run here), its keypoints in
a file like CVLface's, those of TinyFace in tinyface.landmarks.csv:
  python kprpe.py --data webface-base --data-root WF4M --landmarks WF4M.csv --gpus 4 --amp \
      --test tinyface/
Without any data, on drawn faces, two minutes on two CPU cores; and the plain ViT beside it:
  python kprpe.py
  python kprpe.py --rpe none
Digits; continue; evaluate with noise on the keypoints; use:
  python kprpe.py --data affnist --data-root MNIST
  python kprpe.py --data webface-base --gpus 4 --resume
  python kprpe.py --eval RUN/last.pt --keypoint-noise 0.02,0.05,0.1 --test lfw/
  python kprpe.py --predict photo.jpg --weights RUN/last.pt        # photo.pts beside it, or
  --detector
The face aligner, on drawn faces, two to three minutes on a CPU; its keypoints instead of a file's:
  python kprpe.py --task dfa
  python kprpe.py --dfa runs/kprpe-dfa-faces/last.pt --fusion average,norm,landmark
Gait, on drawn walkers; Gait3D (the paper: rank-1 68.2 %; not run here):
  python kprpe.py --task gait
  python kprpe.py --task gait --data gait3d --data-root GAIT3D --gpus 4 --amp

Where each equation is:
  Eq. (1), (2)         attention                             Attention
  Eq. (3)              position embedding                    ViT
  Eq. (4)              iRPE, on queries, keys and values     ContextualRPE
  Eq. (5)              attention with a bias                 Attention
  Eq. (6)              bias from a learned table             StaticRPE
  Eq. (7)              f(P), absolute                        KPRPE
  Eq. (8), (9), (10)   f(P), relative                        KPRPE
  Eq. (11)             bias of a pair of patches             PairBias
  Eq. (12)             noise on keypoints                    add_keypoint_noise
  Eq. (13), (14)       face aligner: weights of its anchors  DFA
  Eq. (15)             face aligner: landmarks               DFA
  Eq. (16)             fusion weighted by norms              fuse
  Eq. (17), (18)       fusion weighted by landmarks          fuse

Where the paper is silent, or the authors' code (CVLface, mk-minchul/CVLface at d3d09c9) differs
from it:
  - f(P) of Eq. (10) is linear in M - P, so it is a part of the queries, the same for all images,
  plus
    a part of the keypoints, the same for all queries. We add the two after the product with W_L:
    196 times fewer numbers an image.
  - "Absolute" is the paper's formula. The code's adds one number to a whole row, which the softmax
    drops: that is the plain ViT, as which Table 2's first row looks.
  - B is divided by sqrt(d) as in Eq. (5); the code does not divide it, and so learns sqrt(d) times
  as
    fast. --rpe-lr makes up for that by default: sqrt(d) times --lr for the tables and W_L of Eq.
    (5) to (10), --lr for iRPE, which both divide. W_L has a bias as in the code, whose parameters
    are Table 3's.
  - Tables start at 0, from which a CPU's thousand steps do not bring them far enough. So the small
    presets have 50 times the rate for them, a softmax without margin, and --augment wide: Table 6's
    augmentation hardly moves the keypoints of aligned faces.
  - Keypoints and patch centres are (x + 0.5) / W. The code has keypoints at x / W, half a pixel off
    its grid. "No keypoints" is the plain ViT.
  - Eq. (12) is printed as a scaling, but the text has noise: normal, alpha of the crop's side in x
  and
    in y. That gives the NME of 0.12 which the supplement reports for alpha = 0.1.
  - What Table 6 leaves out is the code's: --clip 5, and what decays, matrices but no vectors and no
    embeddings.
  - Losses have their true gradients; the code passes them through the margin unchanged. The classes
    are spread over the processes, and not rounded up to a multiple of their number.
  - Sec. 4.1's "repeated augmentation" is the code's: the next image is one of the same person. A
    person's picture that is drawn twice in an epoch is augmented alike.
  - An image is warped once, by alignment and augmentation in one matrix; the code warps the aligned
    crop again. Outside the image is its reflection, in training and in test, so that no black frame
    shows how far a face was moved; the code has black. Greys are whole numbers after each step.
  - Aligned: a similarity takes five points to ArcFace's in 112 px. Unaligned: with --box image the
    whole image in a square (the paper resizes it); else the square about the box times --margin,
    which is scaled, shifted and turned at random by image. Without landmarks an image counts as
    aligned.
  - TAR is read at a false accept rate of at most the target; the code reads at the nearest.
  - Digits: the paper gives no settings. Trained on MNIST moved by up to 6 px on a canvas of 40 px,
    tested on affNIST made by its published ranges; a normalised softmax of 10 classes.
  - With --dfa keypoints are found once before training, on the crops that are not augmented, as the
    code's are (there with a border of 0.215); in a test in the crop and anew in its mirror image.
  - Of the face aligner's training, optimiser, learning rate, augmentation, the weight of its
    aggregation and the test split of WIDER FACE are ours. Its warps have align_corners=False.
  - Gait (Sec. 5): SwinGait-2D is not published; it is made of OpenGait's SwinGait-3D (class
  SwinGait).
    Here all of it is trained from scratch, at one rate, by a cosine without steps; OpenGait begins
    with trained convolutions. M is the grid of a window and serves all windows of a frame.
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

# ---- Settings ------------------------------------------------------------------------------------

# Table 6, in the supplement; its "large" is the text's "base". The flags' defaults are its, too.
PAPER = dict(epochs=34, batch_size=512, weight_decay=0.05, box="image", margin=1.4)
SMALL = dict(model="own", epochs=40, batch_size=64, lr=6e-4, warmup=1.0, repeat=0.0, rpe_lr=50.0,
             loss="softmax", scale=32.0, box="landmarks", unaligned=True, cache="device",
             eval_every=7, augment="wide")
PRESETS = {
    "ms1m-small": {},
    "webface-base": dict(model="base", epochs=36, batch_size=1024, lr=1e-4, sample_rate=0.6,
                         repeat=0.1),
    "folder": SMALL,
    "youtube": SMALL,
    "affnist": dict(SMALL, size=40, patch=4, dim=64, depth=4, heads=4, mlp_ratio=2.0, epochs=12,
                    lr=1e-3, scale=16.0, eval_every=2),
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


def parse_args(argv=None):
    """The flags of all scripts and those of --task, with the defaults of the preset of --data."""
    task = run.peek(argv, "--task", list(TASKS), "face")
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
    elif task == "gait":
        check_gait(args, parser.error)
    return args


def face_flags(parser):
    """Adds the flags of --task face."""
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("network").add_argument
    add("--size", type=run.within(int, 8, 1024), default=112, help="side of the crop in px")
    add("--model", default="small", choices=MODELS, help="of Table 3, or by the next four flags")
    add("--dim", type=run.positive, default=192, help="width of --model own")
    add("--depth", type=run.within(int, 1, 1000), default=6, help="layers of --model own")
    add("--heads", type=run.positive, default=6, help="attention heads of --model own")
    add("--mlp-ratio", type=run.above_zero, default=3.0, help="hidden width over --dim")
    add("--patch", type=run.positive, default=8, help="side of a patch in px")
    add("--drop-path", type=run.fraction, default=0.1, help="chance to skip the last block")
    add("--rpe", default="kp-multihead", choices=RPES, help="position encoding (Tables 1 and 2)")
    add("--num-keypoints", type=run.within(int, 0, 5), default=5, help="the first of the five "
        "keypoints that kp-* gets (supp. 2.2)")
    add("--draw-keypoints", action=switch, default=False, help="mark keypoints in the image "
        "(Fig. 1, Abs-PE*)")
    add = parser.add_argument_group("training").add_argument
    add("--loss", default="adaface", choices=MARGINS, help="margin of the softmax (supp. 2.1)")
    add("--scale", type=run.above_zero, default=64.0, help="what cosines are multiplied by")
    add("--sample-rate", type=run.within(float, 1e-6, 1), default=1.0, help="PartialFC: share of "
        "the classes that a step sees")
    add("--rpe-lr", type=run.nonnegative, default=0.0, help="learning rate of relative encodings "
        "over --lr; 0: sqrt(d) for biases, as the code's form of Eq. (5) learns; 1 for irpe")
    add("--augment", default="full", choices=[*MOVES, "none"], help="Table 6's; wide: with more "
        "shift and rotation; digits have their own")
    add("--repeat", type=run.fraction, default=0.5, help="chance that the next image is one of the "
        "same person")
    add("--landmarks", default="", metavar="PATH", help="landmarks of a set that has none: a CSV "
        "of image,x0,y0,..., or a folder with the images' tree of .pts, as of the landmark scripts")
    add("--dfa", type=run.file, default="", metavar="CKPT", help="find the keypoints by this "
        "checkpoint of --task dfa")
    add = parser.add_argument_group("evaluation").add_argument
    add("--unaligned", action=switch, default=False, help="also test on unaligned crops (Table 1)")
    add("--keypoint-noise", type=run.listed(run.fraction), default=[], help="at the end also test "
        "with noise on keypoints, shares of the crop's side, as 0.02,0.05,0.1 (Eq. 12)")
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
    convolutional = args.model.startswith("iresnet")
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
    # The code cuts to a whole number after the minimum, so that beta = 3.8 makes 3 the largest
    # index.
    return torch.where(x.abs() <= alpha, x.round(), x.sign() * far.round().clamp(max=beta)).long()


def bucket_ids(height: int, width: int, method: str) -> torch.Tensor:
    """d(i, j) of all pairs of N = height * width patches, query i and key j both counted row by
    row.

    Args: method, "euclidean" (the rounded distance, quantised: 7 ids, of which the lower 3 stay
        free, as no distance is negative), "product" (49 ids: quantised row offset times quantised
        column offset) or "cross" (7 ids of the rows and 7 others of the columns; the values of both
        are added).
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
        K), or None; their sum is the table -> (B, H, N, N).
    The table is read by a product with 0 and 1. The backward pass of a gather would add by atomics
    on a GPU, slowly and in no fixed order, and keep the sum of both, 14.8 MB an image for the base
    network.
    """

    def __init__(self, grid: tuple[int, int], method: str):
        super().__init__()
        self.patches = math.prod(grid)
        ids = bucket_ids(*grid, method).view(-1, self.patches, self.patches)  # (1 or 2, N, N)
        one_hot = (ids == torch.arange(DISTANCES[method])[:, None, None, None]).any(1).float()
        # A GPU's attention copies a bias whose rows are no multiple of 8 long: some zeros are
        # added.
        one_hot = F.pad(one_hot, (0, -self.patches % 8))
        self.register_buffer("one_hot", one_hot, persistent=False)            # (K, N, N + zeros)

    def forward(self, of_image, of_query=None):
        # Eq. (11): B_ij = f(P)[i, d(i, j)]
        bias = torch.einsum("bhk,kij->bhij", of_image, self.one_hot)
        if of_query is not None:
            bias = bias + torch.einsum("hik,kij->hij", of_query, self.one_hot)
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
    """Keypoint relative position encoding: keypoints P (B, L, 2) -> B of Eq. (5), (B, H, N, N),
    times `scale`, of one layer after the other.

    Keypoints are ((x + 0.5) / W, (y + 0.5) / H) for pixel centres at whole numbers, as the grid's
    are patch centres: so a mirrored image has the keypoints (1 - x, y), left and right renamed.
    They may lie outside [0, 1], and gradients reach them.
    Args: keypoints, L; grid, patches (height, width); depth, layers of the network; heads; variant,
        of Sec. 3.2: "kp-absolute" or "kp-relative" (one table for all layers and heads) or
        "kp-multihead" (one for each); scale, 1 / sqrt(d) of Eq. (5), here where B is still small.
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
        self.own = (depth, heads) if variant == "kp-multihead" else (1, 1)
        # W_L with a bias: code, and Table 3's parameters. At 0 the network is the plain ViT.
        self.keypoint_linear = nn.Linear(2 * keypoints, math.prod(self.own) * DISTANCES["product"])
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
            # Eq. (8), (9): D' = Expand(M) - Expand(P), a row of L offsets for each query (B, N, 2L)
            # Eq. (10): f(P) = D' W_L, which is Expand(M) W_L - Expand(P) W_L
            M = self.grid.repeat(1, self.keypoints)                           # (N, 2L)
            of_query = F.linear(M, W_L)
            of_image = self.keypoint_linear.bias - F.linear(P, W_L)
        return self.by_layer(of_image).transpose(1, 2), self.by_layer(of_query)

    def by_layer(self, f: torch.Tensor) -> torch.Tensor:
        """What W_L puts out, (A, depth * H * K) or one table's (A, K), times scale: (depth, H, A,
        K)."""
        f = (self.scale * f).unflatten(1, (*self.own, -1)).permute(1, 2, 0, 3)
        return f.expand(self.depth, self.heads, -1, -1)


def check_keypoints(points: torch.Tensor, count: int) -> torch.Tensor:
    """Keypoints (B, count, 2) as they are.   Raises: ValueError for another shape, and for values
    outside [-2, 3] or not finite; values on a GPU are not read, as that would wait for it."""
    if points.ndim != 3 or points.shape[1:] != (count, 2):
        raise ValueError(f"keypoints have the shape {tuple(points.shape)}: expected (B, {count}, "
                         "2)")
    if points.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(((points >= -2) & (points <= 3)).all()):
            raise ValueError(f"keypoints from {points.min():g} to {points.max():g}: expected about "
                             "[0, 1]; divide those in pixels, (x + 0.5) / width and (y + 0.5) / "
                             "height")
    return points


class ContextualRPE(nn.Module):
    """Attention with iRPE on queries, keys and values; its tables serve all heads of one layer.

    Args: dim, of a head; grid.   q, k, v (B, H, N, dim) -> (B, H, N, dim).
    Source: iRPE, contextual mode, product distance. Eq. (4) has a term R^Q R^K too; the code has
        none, and we follow it. R^Q is a table over d(j, i) as in the code; in the paper over d(i,
        j), the same but for the order of the buckets.
    """

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(DISTANCES["product"], dim))
        self.k = nn.Parameter(torch.zeros_like(self.q))
        self.v = nn.Parameter(torch.zeros_like(self.q))
        self.register_buffer("ids", bucket_ids(*grid, "product"), persistent=False)  # (N, N)

    def forward(self, q, k, v):
        ids = self.ids.expand(*q.shape[:2], -1, -1)                           # (B, H, N, N)
        # Eq. (4): e_ij = (Q_i K_j + Q_i R^K[d(i, j)] + R^Q[d(j, i)] K_j) / sqrt(d)
        on_keys = (q @ self.k.T).gather(-1, ids)
        on_queries = (k @ self.q.T).gather(-1, ids).mT
        a = ((q @ k.mT + on_keys + on_queries) * q.shape[-1] ** -0.5).softmax(-1)
        # Eq. (4): Y_i = sum_j a_ij (V_j + R^V[d(i, j)]), the a_ij of one bucket summed before its
        # R^V
        by_bucket = a.new_zeros(*a.shape[:-1], len(self.v))                   # (B, H, N, K)
        return a @ v + by_bucket.scatter_add(-1, ids, a) @ self.v


# ---- Network -------------------------------------------------------------------------------------

# Table 3. The code's names; the supplement's "large" is the text's "base".
VIT_SIZES = {"small": dict(dim=512, depth=12, heads=8, mlp_ratio=5, patch=8, image_size=112),
             "base": dict(dim=512, depth=24, heads=16, mlp_ratio=3, patch=8, image_size=112)}
MODELS = ("small", "base", "own", "iresnet50", "iresnet101")


class Attention(nn.Module):
    """Multi-head self-attention: tokens (B, N, dim) -> the same.
    Args: contextual, a `ContextualRPE` or None. `forward` takes a bias B / sqrt(d), (B, H, N,
        N)."""

    def __init__(self, dim: int, heads: int, contextual: ContextualRPE | None = None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.contextual = contextual

    def forward(self, x, bias=None):
        # Eq. (1): Q_i = x_i W_Q, K_j = x_j W_K, V_j = x_j W_V
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # (B, H, N, d) each
        if self.contextual is not None:
            y = self.contextual(q, k, v)
        else:
            # Eq. (2) without a bias, Eq. (5) with one: Y = softmax((Q K^T + B) / sqrt(d)) V
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
    Raises: ValueError.   Source: Sec. 4.1 and Table 3; insightface's class, whose names of weights
        are kept.
    """

    def __init__(self, size: str | Mapping = "small", rpe: str = "none", num_keypoints: int = 5,
                 channels: int = 3, features: int = 512, drop_path: float = 0.1):
        super().__init__()
        own = VIT_SIZES.get(size) if isinstance(size, str) else dict(size)
        if own is None or not own.keys() <= VIT_SIZES["small"].keys():
            raise ValueError(f"ViT of size {size!r}: expected {', '.join(VIT_SIZES)} or a dict of "
                             f"{', '.join(VIT_SIZES['small'])}")
        if rpe not in RPES or num_keypoints < 0:
            raise ValueError(f"rpe {rpe!r}, {num_keypoints} keypoints: expected one of "
                             f"{', '.join(RPES)}, and at least 0")
        dim, depth, heads, mlp_ratio, patch, image_size = (VIT_SIZES["small"] | own).values()
        side = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if dim % heads or side[0] % patch or side[1] % patch:
            raise ValueError(f"dim {dim} by {heads} heads, images of {side[0]} x {side[1]} px by "
                             f"patches of {patch}: expected no remainder")
        # Supp. 2.2 calls "no keypoints" the vanilla ViT, though W_L's bias would remain, an Eq.
        # (6).
        self.rpe_name = "none" if rpe in KEYPOINT and num_keypoints == 0 else rpe
        self.num_keypoints = num_keypoints
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
        self.feature = nn.Sequential(
            nn.Linear(tokens * dim, dim, bias=False), nn.BatchNorm1d(dim, eps=2e-5),
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
        """B / sqrt(d) of each block in turn, (B or 1, H, N, N), or None.   Raises: ValueError."""
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
        return at_least_float32(self.feature(self.norm(x).flatten(1)))        # (B, features)


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
    """What the three losses share: forward(cosines, norms, labels) -> logits (B, C), for cross
    entropy.

    Args: cosines (B, C) between embeddings and class centres; norms (B,) of the embeddings, used by
        AdaFace; labels (B,) long, -1 where the class is not among the C, as in another process's
        shard.
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

    def turned(self, cosine: torch.Tensor, angle) -> torch.Tensor:
        """cos(theta + angle), the sum kept within 0 and pi, beyond which the cosine would rise
        again."""
        return (cosine.acos() + angle).clamp(self.eps, math.pi - self.eps).cos()

    def forward(self, cosines, norms, labels):
        cosines = cosines.clamp(-1 + self.eps, 1 - self.eps)
        index = labels[:, None].clamp(min=0)
        own = cosines.gather(1, index)                                        # (B, 1)
        own = torch.where(labels[:, None] < 0, own, self.target(own, norms.detach()[:, None]))
        return self.scale * cosines.scatter(1, index, own)


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
    """s (cos(theta - m z) - (m + m z)) for the label, s cos(theta) for the others, with z in [-1,
    1] the embedding's norm, a sign of image quality, against the running mean and standard
    deviation of all norms.

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
    """The (B, ...) of all processes, one after another in the order of their ranks; all have the
    same B."""
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
    shard's, labels (B,) long, -1 where the class is in another shard -> scalar, the same in all
    processes. Its gradient is written out, as autograd does not reach through the sums over the
    processes."""

    @staticmethod
    def forward(ctx, logits, labels):
        index = labels.clamp(min=0)[:, None]
        own = labels >= 0
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
    """The classifier of a large number of identities with its loss: forward(embeddings, labels) ->
    scalar.

    Each process owns a shard of the class centres and sees the embeddings of all processes; their
    softmaxes meet in sums over the processes: none holds the logits of all classes. With a sample
    rate below 1 a step looks at the labels' own centres and a random choice of the others. In one
    process and at rate 1 the loss is F.cross_entropy(margin(cosines, norms, labels), labels).
    It is not wrapped in DistributedDataParallel: the gradient of its shard is complete as it
    stands.

    The gradient of the weights is dense, 0 for classes that were not sampled, as in the code: AdamW
    moves these on by what is left of their momentum, and decays them, which no cosine sees.
    Memory: weights, gradient and AdamW's two moments are four times the shard; the copy of
    normalised weights is one more (a backward pass by hand would save it: 0.4 GB at 206,000 classes
    in a process).

    Args: features, the length d of embeddings; classes, over all processes; margin, a `Margin`;
        sample_rate, the share of each shard's classes that a step looks at, or as many as the batch
        has faces if that is more (code: then exactly the labels' own, for whose number the host
        would wait).
    Shards differ by one class at most; neither the loss nor the initial weights, N(0, 0.01), depend
    on the number of processes.
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
        self.weight = nn.Parameter(torch.empty(stop - self.start, features))
        rows = 2048
        for first in range(0, classes, rows):  # every process draws all of them and keeps its own
            block = 0.01 * torch.randn(min(rows, classes - first), features)
            low = max(first, self.start)
            high = min(first + rows, stop)
            if low < high:
                mine = slice(low - self.start, high - self.start)
                self.weight.data[mine] = block[low - first:high - first]

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
        """Mean loss over the batches of all processes, which have the same size; the same value in
        each.

        Args: embeddings (B, features), not normalised; one that is 0 gets cosines and a gradient of
            0; labels (B,) long in [0, classes), best on the CPU, as the loader gives them: reading
            them on a GPU waits.
        """
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
        """For a checkpoint: weights (classes, features) and the state of their optimizer, of all
        shards, and the margin's buffers, on the CPU. All processes call it; rank 0 gets the
        whole."""
        moments = {}
        for name, value in optimizer.state[self.weight].items():
            sharded = value.shape == self.weight.shape
            moments[name] = self.whole(value) if sharded else value.cpu()
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
        moments = {name: value[start:stop].clone() if value.shape == shape else value
                   for name, value in state["optimizer"].items()}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: moments}})


# ---- Augmentation: supplement, Table 6 -----------------------------------------------------------

# The paper names the kinds and "magnitude 14/31"; numbers and order are the code's: geometry,
# cutout, blur, colour. All is drawn in the loader, from (seed, epoch, index). On a GPU too: there
# --cache device keeps faces in the host's memory, and 8 cores feed about 40,000 crops a second.

ZOOM = 0.2
TURN = math.radians(20)


def place(size: int, zoom: float, angle: float, shift: np.ndarray) -> np.ndarray:
    """p -> zoom (R (p - m) - shift) + m in px, m the crop's middle, R a turn by `angle`: (2, 3)."""
    middle = (size - 1) / 2
    c = math.cos(angle)
    s = math.sin(angle)
    linear = zoom * np.array([[c, s], [-s, c]])
    return np.column_stack([linear, middle - middle * linear.sum(1) - zoom * shift])


def draw_move(rng: np.random.Generator, size: int, shift: float = 0.1, turned: float = 0.2):
    """Draws zoom, turn, shift and mirror of one image, as `datasets.CropDataset` takes them.

    Args: shift, of half the side, beyond what the zoom lets the image move; turned, share of
        images.
    Returns: matrix (2, 3) crop px -> crop px; whether to mirror; {}.
    """
    zoom = rng.uniform(1 - ZOOM, 1 + ZOOM)
    angle = rng.uniform(-TURN, TURN) if rng.random() < turned else 0.0
    # U(-1, 1) (h / zoom - h + h e), h half the side: zoomed out, it stays in view but for h e.
    reach = size / 2 * (1 / zoom - 1 + rng.uniform(0, shift))
    matrix = place(size, zoom, angle, rng.uniform(-1, 1, 2) * reach)
    return matrix, bool(rng.random() < 0.5), {}


def reach_of(shift: float) -> float:
    """How far beyond the crop `draw_move` can look, over the crop's side."""
    return (2 / (1 - ZOOM) - 1 + shift) * (math.cos(TURN) + math.sin(TURN))


SHIFTS = {"full": 0.1, "wide": 0.4}  # wide: ours, aligned faces as far off as unaligned ones
MOVES = {"full": draw_move, "wide": functools.partial(draw_move, shift=0.4, turned=1.0)}


def cut_out(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
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


class Distorted(torch.utils.data.Dataset):
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
                image = cut_out(image, rng)
            if rng.random() < 0.2:
                image = blur(image, rng)
            for _ in range(2):
                image = recolour(image, *draw_colour(rng))
            batch["image"][i] = torch.from_numpy(image)
        return batch


def repeated(order: np.ndarray, labels: np.ndarray, p: float, rng: np.random.Generator):
    """The "repeated augmentation" of Table 6 on an epoch's order (L,) of indices into labels (N,):
    (L,).

    After each image, with probability p, the next is replaced by a random one of the same identity,
    but never two in a row: a share p / (1 + p) of all. The paper cites [24], which repeats an
    image.
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
    """`EpochBatches` with images replaced by others of the same person, as `repeated` says."""

    def __init__(self, labels: np.ndarray, p: float, batch: int, seed: int, rank: int, world: int):
        super().__init__(len(labels), batch, seed, rank, world)
        self.labels = labels
        self.p = p

    def order(self):
        rng = np.random.default_rng((self.seed, self.epoch, 1))
        return repeated(super().order(), self.labels, self.p, rng)


# ---- Data ----------------------------------------------------------------------------------------

class Split(NamedTuple):
    """Images by index, of training with their .labels and .ids; five points (N, 5, 2) px or None,
    where they are aligned as they stand; boxes (N, 4) of unaligned crops, None for whole images."""
    images: Sequence
    points: np.ndarray | None
    boxes: np.ndarray | None = None


def five_points(points: np.ndarray, where: str) -> np.ndarray:
    """Landmarks (N, P, 2) of the file or set `where` -> (N, 5, 2): eyes, nose tip and mouth
    corners, image-left first.   Raises: UserError for a number of landmarks of no known scheme."""
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


def read_faces(args, split: str) -> list[datasets.Face] | None:
    """The faces of a split of images in folders, or drawn; None for a test split that is not
    there."""
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
    datasets.check_images(faces)
    return faces


def face_split(args, faces: Sequence[datasets.Face]) -> Split:
    """Faces with their landmarks as five points, and the boxes of --box.   Raises: UserError where
    some have no landmarks, or none has and the network needs them."""
    images = recognition.FolderImages(faces)
    if all(face.points is None for face in faces):
        if wants_keypoints(args) and not args.dfa:
            raise UserError(f"--data {args.data}: the network needs keypoints, but the images have "
                            "no landmarks: give --landmarks or --dfa, or train with --rpe none")
        return Split(images, None)
    recognition.check_points(faces, "alignment, as other images have them,")
    boxes = None if args.box == "image" else datasets.face_boxes(faces, args.box)
    points = np.stack([face.points for face in faces])
    return Split(images, five_points(points, args.landmarks or f"--data {args.data}"), boxes)


def record_split(args) -> Split:
    """The images of a record set, with the landmarks of --landmarks.   Raises: UserError without
    any if the network needs them."""
    images = recognition.Records(args.data_root)
    if args.landmarks:
        points = recognition.read_landmarks(images.keys.astype(str), args.landmarks)
        return Split(images, five_points(points, args.landmarks))
    if wants_keypoints(args) and not args.dfa:
        raise UserError(f"--data {args.data}: the network needs the keypoints of its images: give "
                        "--landmarks, a file like CVLface's, or --dfa, or train with --rpe none")
    return Split(images, None)


def unaligned(boxes: np.ndarray, size: int, margin: float) -> torch.Tensor:
    """Crops (N, 2, 3) about boxes, each zoomed, turned and shifted at random, by its index
    alone."""
    moves = []
    for i in range(len(boxes)):
        rng = np.random.default_rng((0, i))
        moves.append(place(size, rng.uniform(1 - ZOOM, 1 + ZOOM), rng.uniform(-TURN, TURN),
                           rng.uniform(-0.15, 0.15, 2) * size))
    matrices = torch.from_numpy(datasets.square_crops(boxes, size, margin))
    return warp.compose(torch.from_numpy(np.stack(moves)), matrices)


def make_crops(args, split: Split, t: float, augment: str = "none"):
    """Crops of --size, one warp of each image: unaligned, t = 0, or aligned, t = 1, or, as of Fig.
    5, by (1 - t) times one matrix plus t times the other. Images without points are taken as they
    stand.
    Args: augment, whose geometry is in the matrix."""
    move = MOVES.get(augment)
    flip = datasets.SCHEMES[5].flip
    if split.points is None or t < 1 and split.boxes is None:
        align = None if split.points is None else (template(args.size), t)
        return recognition.WholeImages(split.images, args.size, split.points, move, flip, args.seed,
                                       align, reflect=True)
    points = torch.from_numpy(split.points).double()
    matrices = warp.fit_similarity(points, template(args.size))
    if t < 1:
        matrices = torch.lerp(unaligned(split.boxes, args.size, args.margin), matrices, t)
    faces = [datasets.Face(functools.partial(split.images.__getitem__, i), five)
             for i, five in enumerate(split.points)]
    reach = reach_of(SHIFTS[augment]) if move else 1.0
    return datasets.CropDataset(faces, matrices, args.size, move, reach, 1.0, flip, args.seed,
                                reflect=True)


class Digits(torch.utils.data.Dataset):
    """Digits as batches, as `datasets.CropDataset` has them, but gray: image (B, size, size, 1).
    Args: images (N, 28, 28) uint8, moved by up to 6 px anew in each epoch; or canvases (N, size,
    size) with their points (N, 5, 2), which stay."""

    def __init__(self, images, labels, size: int, points=None, seed: int = 0):
        self.images = images
        self.labels = labels.astype(np.int64)
        self.ids = np.arange(10)
        self.size = size
        self.points = points
        self.seed = seed

    def __len__(self):
        return len(self.images)

    def __getitems__(self, keys) -> dict:
        index = np.array([i for _, i in keys])
        image = self.images[index]
        if self.points is None:
            image, points = digits.mnist_canvas(image, (self.seed, *keys[0]), canvas=self.size)
        else:
            points = self.points[index]
        return {"image": torch.from_numpy(image)[..., None], "points": torch.from_numpy(points),
                "index": torch.from_numpy(index)}


def read_digits(args, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) uint8 of MNIST: its four idx files in --data-root, .gz or
    not."""
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        name = {"train": "train", "test": "t10k"}[split]
        path = os.path.join(args.data_root, f"{name}-{kind}-ubyte")
        array = digits.read_idx(path if os.path.isfile(path) else path + ".gz")
        arrays.append(array[:args.limit or None])
    images, labels = arrays
    if len(images) != len(labels) or images.ndim != 3 or labels.max() > 9:
        raise UserError(f"{args.data_root}: {split} has images {images.shape} and labels "
                        f"{labels.shape}, expected as many of both, and labels from 0 to 9")
    return images, labels


def training_set(args, device: torch.device):
    """Images with .labels and .ids, and their aligned crops, moved as --augment says, as a
    dataset."""
    if args.data == "affnist":
        data = Digits(*read_digits(args, "train"), args.size, seed=args.seed)
        return data, data
    if args.data in RECORDS:
        split = record_split(args)
        move = MOVES.get(args.augment)
        crops = recognition.WholeImages(split.images, args.size, split.points, move,
                                        datasets.SCHEMES[5].flip, args.seed, reflect=True)
    else:
        split = face_split(args, read_faces(args, "train"))
        crops = make_crops(args, split, 1.0, args.augment)
    if args.dfa and wants_keypoints(args):
        crops.points = find_keypoints(args, crops, device)
    return split.images, crops


@torch.inference_mode()
def find_keypoints(args, crops, device: torch.device) -> torch.Tensor:
    """The keypoints that --dfa finds in crops without augmentation, (N, 5, 2) float64 px of the
    images. Each process looks at its share."""
    still = copy.copy(crops)
    still.augment = None
    found = []
    for batch in crop_loader(args, still, shard_keys(len(crops), 256, *ranks()), device):
        points, _ = detect(args.dfa, to_device(batch, device)[0])
        to_image = warp.invert(batch["matrix"].double()).to(device)
        found.append(warp.apply_affine(to_image, points.double()))
    return gather_shards(torch.cat(found), len(crops)).cpu()


def crop_loader(args, data, batches, device: torch.device, kept: bool = True):
    """`run.make_loader` in all processes; --cache is for crops that are `kept`, and not for whole
    images and digits, which are read anew."""
    args = copy.copy(args)
    if not kept or getattr(data, "regions", None) is None:
        args.cache = ""
    return run.make_loader(args, data, batches, device, shared=True)


def to_device(batch: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch: images (B, C, H, W) in 0..255, keypoints (B, P, 2) px; ArcFace's if it has
    none."""
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
    """Parameters for AdamW, with and without weight decay; a group's rate is multiplied by its
    "scale".

    Vectors and names that match `free`, by default biases, the position embedding and tokens, do
    not decay; tables and projections of the relative encodings do (source: code). Those encodings
    have the rate times `scale`: a bias that is divided by c (Eq. 5: sqrt(d)) learns at c times the
    rate, its decay over c, as an undivided one would.
    """
    groups = [dict(params=[], weight_decay=weight_decay * decays / own, scale=own)
              for own in (1.0, scale) for decays in (1, 0)]
    for name, weight in net.named_parameters():
        encoding = name.startswith("rpe.") or ".table" in name or ".contextual." in name
        stays = weight.ndim < 2 or re.search(free, name) is not None
        groups[2 * encoding + stays]["params"].append(weight)
    return groups


def learning_rate(step: int, steps: int, warmup_steps: int, base: float) -> float:
    """From 0 to `base` in a line over the first warmup_steps, then to 0 at `steps` as half a
    cosine."""
    if step < warmup_steps:
        return base * step / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def clip_gradients(net: nn.Module, fc: PartialFC, limit: float):
    """Scales all gradients down to a common norm of `limit`. The network's are the same in all
    processes; of the class weights each has its own, and the squares are summed over the
    processes."""
    own = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    norm = (own**2 + all_reduce(fc.weight.grad.norm()**2)).sqrt()
    nn.utils.clip_grads_with_norm_([*net.parameters(), fc.weight], limit, norm)


def share_statistics(net: nn.Module):
    """Gives all processes the batch norms' statistics of the first, which the checkpoint has."""
    for module in net.modules() if dist.is_initialized() else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            dist.broadcast(module.running_mean, 0)
            dist.broadcast(module.running_var, 0)


def build(args, device: torch.device) -> nn.Module:
    """The network that the flags describe, on `device`."""
    if args.model.startswith("iresnet"):
        net = IResNet(int(args.model.removeprefix("iresnet")), args.size)
        return net.to(device, memory_format=torch.channels_last)
    own = dict(dim=args.dim, depth=args.depth, heads=args.heads, mlp_ratio=args.mlp_ratio)
    size = VIT_SIZES.get(args.model, own) | dict(patch=args.patch, image_size=args.size)
    channels = 1 if args.data == "affnist" else 3
    return ViT(size, args.rpe, args.num_keypoints, channels, drop_path=args.drop_path).to(device)


def train_faces(args) -> dict:
    """Trains, evaluates or predicts, as the flags say; returns the numbers of the last
    evaluation."""
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; the geometry is done on the CPU
    if args.eval:
        return evaluate_checkpoint(args)
    if args.predict:
        return predict(args)
    job = run.Job(args)
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
    data = Distorted(crops, args.seed) if coloured else crops
    loader = crop_loader(args, data, batches, job.device)
    # Network and classes, each with its optimizer
    net = build(args, job.device)
    fc = PartialFC(512, classes, MARGINS[args.loss](scale=args.scale), args.sample_rate)
    fc.to(job.device)
    divisor = net.rpe.scale**-1 if args.rpe in (*STATIC, *KEYPOINT) and net.rpe else 1.0
    groups = parameter_groups(net, args.weight_decay, args.rpe_lr or divisor)
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
    if job.rank == 0 and scores:
        print_table(scores, args)
        write_pictures(job.folder, net, conditions, args.dfa)
    return scores


def say_what_is_missing(args, job: run.Job, conditions: Sequence):
    """Says at the start what the user may not expect of a run by these flags."""
    if not conditions:
        job.say(f"note: --data {args.data} has no test split: without --test nothing is measured")
    elif args.unaligned and not any("@unaligned" in condition.suffix for condition in conditions):
        job.say("note: --unaligned has no effect: no test set has landmarks to align its images by")
    if 2 * args.warmup > args.epochs:
        job.say(f"note: the rate rises for {args.warmup:g} of {args.epochs} epochs; a run this "
                "short wants a smaller --warmup")


# ---- Evaluation: Sec. 4 and supplement -----------------------------------------------------------

class TestCondition(NamedTuple):
    """One way of looking at a test set: its data; what is asked of it; what is added to the names
    of scores; the noise on its keypoints, alpha of Eq. (12); whether it waits for the end of a
    run."""
    data: object
    loader: object
    protocols: list
    suffix: str = ""
    noise: float = 0.0
    late: bool = False
    __test__ = False  # no class of tests for pytest


def shard_keys(count: int, batch: int, rank: int = 0, world: int = 1) -> list[list[tuple]]:
    """The keys of a set, in order, that one process looks at: every world-th, as many in each
    process."""
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
    faces = None if args.data in RECORDS else read_faces(args, "test")
    if faces is not None:
        protocols = [recognition.own_pairs(faces), recognition.own_identification(faces)]
        if args.fusion:
            protocols.append(own_templates(faces))
        found[""] = face_split(args, faces), protocols
    elif args.fusion:
        raise UserError(f"--fusion: --data {args.data} has no test split, PERSON/VIDEO/*.jpg in "
                        "the folder test, whose videos could be fused")
    for path in args.test:
        test = recognition.read_test(path)
        if f"@{test.name}" in found:
            raise UserError(f"--test {path}: another set of --test is {test.name}, too; evaluate "
                            "them apart")
        found[f"@{test.name}"] = test_split(args, path, test), [test]
    return found


def test_split(args, path: str, test) -> Split:
    """The images of a set of --test at `path`, with its landmarks or those of PATH.landmarks.csv.
    Raises: UserError for landmarks that the network needs."""
    beside = os.path.normpath(path) + ".landmarks.csv"
    if os.path.exists(beside):
        test = recognition.with_landmarks(test, beside)
    if test.points is None:
        if wants_keypoints(args) and not args.dfa and not path.endswith(".bin"):
            raise UserError(f"--test {path}: the network needs the keypoints of its images: no "
                            f"{beside}, rows image,x0,y0,..., nor --dfa")
        if ranks()[0] == 0:
            print(f"--test {path}: no {beside}; its images are taken as aligned")
        return Split(test.images, None)
    boxes = None
    if args.box == "landmarks":
        corners = [test.points.min(1), test.points.max(1)]
        boxes = np.concatenate(corners, 1).astype(np.float64)
    if args.unaligned and ranks()[0] == 0:
        crop = "whole images"
        if boxes is not None:
            crop = f"crops about the box of {test.points.shape[1]} landmarks x {args.margin}"
        print(f"--test {path}: unaligned are {crop}")
    return Split(test.images, five_points(test.points, beside), boxes)


test_split.__test__ = False


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
        images, labels = read_digits(args, "test")
        image, points = digits.mnist_canvas(images, 0, canvas=args.size)
        add(Digits(image, labels, args.size, points), [labels], "")
        image, points, _ = digits.affnist(images, 0, canvas=args.size)
        add(Digits(image, labels, args.size, points), [labels], "@affine")
        return conditions
    for name, (split, protocols) in read_tests(args).items():
        add(make_crops(args, split, 1.0), protocols, name)
        if args.unaligned and split.points is not None:
            add(make_crops(args, split, 0.0), protocols, f"{name}@unaligned")
    return conditions


test_conditions.__test__ = False


def add_keypoint_noise(keypoints: torch.Tensor, index: torch.Tensor, alpha: float) -> torch.Tensor:
    """Keypoints (B, 5, 2) in [0, 1] with noise, the same for an image's index (B,) in every
    call."""
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
    for batch in copy.copy(condition.loader):  # whose workers end here, not with the run
        pixels, points = to_device(batch, device)
        score = points.new_ones(len(points))
        mirrored = torch.stack([pixels.shape[-1] - 1 - points[..., 0], points[..., 1]], -1)[:, flip]
        if args.dfa:
            points, score = detect(args.dfa, pixels)
            mirrored, _ = detect(args.dfa, pixels.flip(3))
        views = [(pixels, points)]
        if args.data != "affnist":
            views.append((pixels.flip(3), mirrored))
        features = 0
        for pixels, places in views:
            image, keypoints = inputs(pixels, places, args.draw_keypoints)
            keypoints = add_keypoint_noise(keypoints, batch["index"], condition.noise)
            with run.precision(args, device):
                features = features + net(image, keypoints)
        seen = inputs(pixels, points)[1]
        rows.append(torch.cat([features, seen.flatten(1), score[:, None]], 1))
    whole = gather_shards(torch.cat(rows), len(condition.data))
    if ranks()[0] == 0:
        whole = whole.cpu()
    features, keypoints, score = whole.split([whole.shape[1] - 11, 10, 1], 1)
    return Embedded(features, keypoints.unflatten(1, (5, 2)), score[:, 0])


def evaluate(net: nn.Module, centres: torch.Tensor | None, conditions: Sequence[TestCondition],
             args, device: torch.device) -> dict:
    """Scores by name, as accuracy, rank1, accuracy@unaligned, tar/0.0001@IJB-C, on rank 0, {} on
    others.
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


def print_table(scores: dict, args):
    """A line for each test condition: its scores in %."""
    box = f", unaligned: {args.box}" if args.unaligned else ""
    print(f"{args.data}: {args.model}, {args.rpe}, {args.size} px{box}")
    lines = {}
    for key, value in scores.items():
        name, _, condition = key.partition("@")
        if not name.endswith("/std"):
            lines.setdefault(condition or "test", []).append(f"{name} {100 * value:.2f} %")
    for condition, values in lines.items():
        print(f"  {condition:20} {', '.join(values)}")


def open_checkpoint(args, path: str) -> tuple[nn.Module, dict, torch.device]:
    """A checkpoint's network, in evaluation mode, its classifier's state, and the device; `args`
    takes its flags over.   Raises: UserError for a network of digits where faces are looked at, or
    reverse."""
    named = args.data if "data" in args.given or args.predict else None
    state, device = run.open_checkpoint(args, path, ("landmarks",))
    own = state["args"]["data"]
    if named not in (None, own) and "affnist" in (named, own):
        raise UserError(f"{path} is of a run on {own}, not for --data {named}")
    net = build(args, device)
    run.load_weights(net, state["model"], path)
    return net.eval(), state["head"], device


def evaluate_checkpoint(args) -> dict:
    """--eval: the numbers of a checkpoint on the test split of --data and on --test; with --output,
    the pictures too."""
    net, head, device = open_checkpoint(args, args.eval)
    folder = run.find_run(args)
    conditions = test_conditions(args, device)
    if not conditions:
        raise UserError(f"--data {args.data} has no test split in {args.data_root}; give --test")
    scores = evaluate(net, head["weight"], conditions, args, device)
    print_table(scores, args)
    if folder:
        write_pictures(run.make_run(args, folder), net, conditions, args.dfa)
    return scores


def predict(args) -> dict:
    """--predict: for each face writes the crop that the network saw as NAME.png, its unit embedding
    as NAME.npy, and its keypoints, if it has any, as NAME.pts in px of the image.

    Keypoints come from --detector, from NAME.pts beside the image, as the landmark scripts write
    it, or from --dfa. Faces are aligned by them; one without is cropped by --box, or taken as it
    stands.
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
    All that the detector finds; else one, of NAME.pts beside the image, or by --dfa, or in
    --box."""
    if detector is not None:
        found = photos.detect(detector, photo.image)
        return [(None, row[4:14].reshape(5, 2)) for row in found]  # the image-left eye comes first
    box = photos.find_boxes(args, photo.image, None)[0]
    beside = os.path.splitext(photo.path)[0] + ".pts"
    if os.path.isfile(beside):
        points = datasets.read_pts(beside)[None]
        return [(box, five_points(points, beside)[0].astype(np.float64))]
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
    """What the encoding adds to the logits of head 0, B_ij / sqrt(d): keypoints (B, L, 2) in [0, 1]
    -> (depth, B, N, N)."""
    return torch.stack([bias[:, 0].expand(len(keypoints), -1, -1)
                        for _, bias in zip(net.blocks, net.biases(keypoints))])


def draw_offset(values: np.ndarray, query: tuple[int, int], keypoints: np.ndarray, side: int):
    """One map (h, w), white at its lowest and blue at its highest value, with the query's patch
    (row, column) as a red star and the keypoints as circles."""
    height, width = values.shape
    share = (values - values.min()) / max(np.ptp(values), 1e-9)
    share = cv2.resize(share.astype(np.float32), (side, side), interpolation=cv2.INTER_NEAREST)
    image = 255 + share[..., None] * (np.array([30, 60, 170]) - 255)
    image = image.round().astype(np.uint8)
    star = (int((query[1] + 0.5) / width * side), int((query[0] + 0.5) / height * side))
    cv2.drawMarker(image, star, photos.RED, cv2.MARKER_STAR, side // 10, 2, cv2.LINE_AA)
    return framed(photos.draw_points(image, keypoints * side - 0.5, (30, 150, 30), side / 50))


def draw_offsets(net: ViT, data, dfa: str = "", side: int = 160) -> np.ndarray:
    """Fig. 12, then Fig. 13: an image, then maps of head 0. The first rows are one image, a row for
    each of three queries, a column for layers 0, 1, 3, 5, 7; the others three images, by the first
    query."""
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
    own = [test for test in conditions if test.suffix in ("", "@unaligned", "@affine")]
    if own and getattr(net, "rpe", None) is not None:
        datasets.write_image(folder / "offsets.png", draw_offsets(net, own[-1].data, dfa))


# ---- Face aligner: supplement, Eqs. 13 to 15 -----------------------------------------------------

# The supplement gives the size, batch and epochs of "widerface"; the rest is ours.
DFA_PAPER = dict(size=160, batch_size=320, epochs=750, lr=1e-3, weight_decay=0.05, augment="move",
                 box="face", eval_every=10)
SMALL_DFA = dict(batch_size=16, epochs=10, lr=2e-3, warmup=1.0, cache="device", eval_every=5)
DFA_PRESETS = {
    "widerface": {},
    "folder": dict(SMALL_DFA, box="landmarks"),
    "youtube": dict(SMALL_DFA, box="landmarks"),
    "faces": SMALL_DFA,
}


def dfa_flags(parser):
    """Adds the flags of --task dfa."""
    add = parser.add_argument_group("face aligner").add_argument
    add("--size", type=run.multiple(32), default=160, help="side of the crop in px")
    add("--augment", default="move", choices=["move", "none"], help="zoom, shift, turn and mirror")


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
    return gather_shard_keys(torch.cat(rows), len(data)).T.cpu()


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
    loader = make_loader(args, data, shard_keys(len(data), 64, *ranks()), device, True)
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
    looked_at = make_loader(args, test, shard_keys(len(test), 64, rank, world), device, True)
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

# Sec. 5: 32 people x 4 sequences, 60,000 steps (93 an epoch). The rest is OpenGait's.
GAIT_PAPER = dict(rpe="kp-multihead", dim=256, heads=16, epochs=645, batch_size=128, frames=30, lr=3e-4,
                  weight_decay=0.02, warmup=0.0, clip=0.0, eval_every=65)
GAIT_PRESETS = {
    "gait3d": {},
    "walkers": dict(dim=32, heads=2, epochs=20, batch_size=32, frames=4, lr=2e-3, warmup=1.0,
                    unaligned=True, eval_every=10),
}
DRAWN_WALKERS = {"train": dict(people=100), "test": dict(people=60, sequences=4, frames=16)}
SEQUENCES = 4  # of each person in a batch
SPOIL = dict(shift=6.0, zoom=0.2)  # of crops of 64 x 44 px, --unaligned
SWIN = ("none", "swin", *KEYPOINT)  # --rpe


def gait_flags(parser):
    """Adds the flags of --task gait."""
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("gait").add_argument
    add("--dim", type=run.positive, default=256, help="width of the first stage")
    add("--heads", type=run.positive, default=16, help="attention heads of the first stage")
    add("--drop-path", type=run.fraction, default=0.1, help="chance that a frame skips the last block")
    add("--rpe", default="kp-multihead", choices=SWIN, help="position encoding; swin: its own table")
    add("--rpe-lr", type=run.nonnegative, default=0.0, help="learning rate of the encoding over --lr; 0: "
        "sqrt(d) for kp-*, 1 for swin")
    add("--frames", type=run.positive, default=30, help="frames of a sequence that a step sees")
    add("--unaligned", action=switch, default=False, help="also test on sequences moved at random")


def check_gait(args, error: Callable):
    """Calls `error` for flags of --task gait that do not go together."""
    if args.batch_size % (SEQUENCES * args.gpus):
        error(f"--batch-size {args.batch_size}: expected a multiple of {SEQUENCES} sequences of a person x "
              f"--gpus {args.gpus}")
    if args.dim % args.heads or args.dim % 4:
        error(f"--dim {args.dim}: expected a multiple of 4 and of --heads {args.heads}")


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


def gait_arms(args, device: torch.device) -> list[TestCondition]:
    """The test split, and with --unaligned once more with every sequence scaled and moved at random. A
    sequence at a time, of which each process has its share.   Raises: ValueError if none can be found."""
    data = gait_set(args, "test")
    gait.mated(data.labels, data.probe)  # before anything is trained
    sets = [("", data)]
    if args.unaligned:
        sets.append(("@unaligned", gait.GaitDataset(gait.spoil(data.sequences, **SPOIL), None)))
    return [TestCondition(own, crop_loader(args, own, shard_keys(len(own), 1, *ranks()), device), [], suffix)
            for suffix, own in sets]


def gait_inputs(batch: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What SwinGait takes, of a batch: silhouettes (B, T, 64, 44) and joints (B, T, 17, 2)."""
    image, joints = (batch[key].to(device, non_blocking=True) for key in ("image", "points"))
    return image.float() / 255, joints


@torch.inference_mode()
@torch.backends.cudnn.flags(enabled=True, benchmark=False)  # else it tries its ways anew for each length
def evaluate_gait(net: SwinGait, arms: Sequence[TestCondition], args, device: torch.device) -> dict:
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
            x = gather_shard_keys(torch.cat(mine), len(arm.data))                 # (S, P, D)
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


def write_gait_pictures(folder: Path, net: SwinGait, arms: Sequence[TestCondition]):
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


# ---- Backbones: as published, nothing of this paper ----------------------------------------------

def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """(B, cin, H, W) -> (B, cout, H/stride, W/stride). No bias: the batch norm behind it has a
    shift."""
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_bn(cin: int, cout: int, kernel: int, stride=1, groups=1, act=None) -> nn.Sequential:
    """`conv` (0), batch norm (1) and, if its class is given, an activation (2); the shapes of
    `conv`."""
    layers = [conv(cin, cout, kernel, stride, groups), nn.BatchNorm2d(cout)]
    if act:
        layers.append(act(inplace=True))
    return nn.Sequential(*layers)


class IRBlock(nn.Module):
    """Batch norm, two 3x3 convolutions, shortcut: (B, cin, H, W) -> (B, planes, H/stride,
    W/stride).
    Source: Deng et al., "ArcFace", CVPR 2019 (improved residual unit); AdaFace's code."""

    def __init__(self, cin: int, planes: int, stride: int):
        super().__init__()
        same = cin == planes
        self.shortcut_layer = nn.MaxPool2d(1, stride) if same else conv_bn(cin, planes, 1, stride)
        self.res_layer = nn.Sequential(nn.BatchNorm2d(cin), *conv_bn(cin, planes, 3),
                                       nn.PReLU(planes), *conv_bn(planes, planes, 3, stride))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class IResNet(nn.Module):
    """Table 3's comparators, as AdaFace has them: images (B, 3, size, size) -> (B, features), not
    normalised. `forward` takes keypoints like `ViT` and does not use them.
    Args: depth, 50 or 101; size of the images in px, a multiple of 16.   Raises: ValueError.
    Source: AdaFace's code, whose names of weights are kept."""

    def __init__(self, depth: int = 50, size: int = 112, features: int = 512):
        super().__init__()
        units = {50: (3, 4, 14, 3), 101: (3, 13, 30, 3)}.get(depth)
        if units is None or size % 16 or size < 16:
            raise ValueError(f"IResNet{depth}, images of {size} px: expected 50 or 101, and a "
                             "multiple of 16")
        self.wanted = (3, size, size)
        self.input_layer = nn.Sequential(*conv_bn(3, 64, 3), nn.PReLU(64))
        cin = 64
        blocks = []
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


# ---- Main ----------------------------------------------------------------------------------------

TASKS = {"face": PRESETS, "dfa": DFA_PRESETS, "gait": GAIT_PRESETS}  # and the presets of --data


def main(args) -> dict:
    """Trains, evaluates or predicts in the task of the flags; returns the last numbers."""
    return {"face": train_faces, "dfa": train_dfa, "gait": train_gait}[args.task](args)


if __name__ == "__main__":
    run.main(main, parse_args())
