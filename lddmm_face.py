"""LDDMM-Face: Large Deformation Diffeomorphic Metric Learning for Cross-annotation Face Alignment.

Huilin Yang, Junyan Lyu, Pujin Cheng, Xiaoying Tang; submitted to ICLR 2022.
https://arxiv.org/abs/2108.00690

The method. A face is about twelve curves (contour, brows, nose, eyes, lips). The network does not
say where the landmarks are: it gives each a momentum, and the momenta of a curve make a smooth
velocity field around it (a sum of Gaussians) along which the curve of the mean face flows to its
place on the image. The field moves every point near the curve, not only the landmarks: a network
that was trained on half of the landmarks, or on 68 points, predicts all of them, or the 194 of
another annotation, without retraining. The loss compares landmarks and whole curves (Eq. 4).

Train on 300W on four GPUs (the paper: NME 3.53 %; not run here, see README):
  python lddmm_face.py --data 300w --data-root 300W --gpus 4 --cache device
Without any data, on drawn faces, two minutes on two CPU cores: 68 landmarks learned, 194 predicted:
  python lddmm_face.py
Continue; evaluate, also on a set of another annotation; use, also for another annotation, whose
landmarks are then placed by the mean face of drawn faces:
  python lddmm_face.py --data 300w --gpus 4 --cache device --resume
  python lddmm_face.py --data helen --data-root HELEN --eval runs/lddmm_face-300w/last.pt
  python lddmm_face.py --predict photo.jpg --as-points 194 --weights runs/lddmm_face-300w/last.pt
The baseline of Tables 8 and 9 by HRNet's own weights; --predict takes them as --weights:
  python lddmm_face.py --data wflw --data-root WFLW --eval HR18-WFLW.pth

Where each equation is:
  Eq. (1)       inner product and norm of curves  inner
  Eq. (2), (3)  energy (gamma is 0), discrepancy  lddmm_loss
  Eq. (4)       curve discrepancy                 curve_discrepancy
  Eq. (5)       landmark discrepancy              landmark_discrepancy
  Eq. (6), (7)  flow                              flow
  Eq. (8)       loss                              lddmm_loss
  Fig. 1        momentum estimator, flow 1 to N   LDDMMFace.stage, deform
  Sec. 3.3      a_k(t), extra landmarks           flow(extra=)
  Sec. 4        NME_l, NME_c                      common.metrics.nme, curve_error
  Sec. 4.1      determinant of Jacobian (DetJ)    jacobian
  Sec. 4.2      sparse-to-dense                   sparse_to_dense
  Sec. 4.3      affine map of mean faces          cross_annotation

Where the paper is silent, or the authors' code (CRazorback/LDDMM-Face at cb45e96) differs from it:
  - The paper writes momenta alpha(t) and names no number of time steps. The code predicts one
    momentum for each landmark, holds it constant, and takes two Euler steps; so do we (--steps).
    Two steps can fold the plane where the exact flow cannot; DetJN counts it.
  - sigma_V is the scale of a curve of the mean face, as in the paper; we take the mean of width and
    height, as the code does. The code measures it in another frame than it flows in, so that its
    sigma_V is 0.35 of that for 300W (0.80 with half of the landmarks: at 0.35 the flow leaves those
    between them behind), 0.44 for HELEN, 1 for WFLW: --sigma-factor. sigma_W is half of sigma_V for
    each curve, as in the paper; a wrong index in the code takes that of the contour for nearly all.
  - Eq. (8) is taken with the curve discrepancy as a norm, summed over the curves. The code squares
    it, over the number of landmarks, and averages the other term over all landmarks: --squared.
  - The mean face is the training set's, in the crop; the code has a fixed one. That of another
    annotation is brought onto it by the affine map that fits what both mark; the code's is by hand.
  - WFLW's pupils lie on no curve; here the flow of their eye carries them, the code leaves them
    out. HELEN has 11 curves here and in the code, one of them the nose; in the paper N is 12.
  - The "50 %" and "33 %" of Sec. 4.2 are the code's lists, which hold 68 % of 300W's landmarks,
    55 % of WFLW's, and 51 and 40 % of HELEN's.
  - NME_c is called an ICP error in the paper. The code, and we, take distances to the nearest
    points, both ways, by part of the face, and move nothing.
  - The paper's augmentation is "normal, +-20 degrees, +-25 %": we read a standard deviation of half
    of that, clipped there. The code turns evenly up to 30 degrees in 6 of 10 images.
  - Coordinates keep their fractions; the code's whole pixels cost it 0.4 to 1.2 % NME.
  - WFLW has the paper's schedule; the code's: --epochs 150 --drop-at 0.5,0.667,0.833.
  - Everything is trained from scratch, unless --init names weights. The code starts HRNet from
    weights for landmarks, and for 300W and WFLW leaves them as they are.
  - Images are normalised by ImageNet's mean and deviation, as in the code; the paper has the
    training set's. Crops are about the true landmarks.
  - d_ipd is the distance of the pupils, or of the eyes' centres where none are marked; in the code
    it is that of the outer eye corners. HELEN's published NME is --norm io-published.
  - DAN has blocks of VGG13, and stage weights 0.3 and 0.7, as in the code; the paper names VGG11.
  - The baselines, --method coord (added to the mean face; in the code to zero) and heatmap, have
    the same schedule. NME_l interpolates their other landmarks along curves, NME_c does without.
  - With --gpus N each process normalises its own share of the batch. The last epoch is reported.
"""
import copy
import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, datasets, metrics, photos, run, synthetic, warp
from common.checkpoint import read_state_dict, read_tensors

# ---- Settings ------------------------------------------------------------------------------------

# Appendix B: Adam 3e-4, halved thrice, 300 epochs, batch 32, 256 px, crops 1.25 times the box.
PAPER = dict(size=256, epochs=300, batch_size=32, lr=3e-4, backbone="hrnet_w18",
             drop_at="0.25,0.5,0.75", norm="io", threshold=0.10, margin=1.25, eval_every=5)
SMALL = dict(size=128, epochs=30, lr=1e-3, backbone="mobilenetv2", cache="device", eval_every=1)
PRESETS = {
    "300w": {},
    "wflw": {},
    "helen": {},
    "cofw68": {},  # Table 4: trained on 300W; --data-root is the folder of both sets
    "youtube": SMALL,
    "folder": SMALL,
    "faces": dict(SMALL, size=96, batch_size=16, epochs=8, eval_every=4),
}
DRAWN = {"train": 1600, "test": 400}  # faces of --data faces
ANNOTATIONS = [points for points in datasets.SCHEMES if points > 5]  # five points make no curve


def parse_args(argv=None):
    """The flags of all scripts and this paper's, with the defaults of the preset of --data."""
    parser = run.make_parser("lddmm_face", "Diffeomorphic face alignment across annotations", PAPER,
                             PRESETS, argv)
    run.add_landmark_flags(parser)
    add = parser.add_argument_group("LDDMM-Face").add_argument
    add("--backbone", default="hrnet_w18", choices=[*BACKBONES, "dan"], help="convolutional "
        "network (Table 7); mobilenetv2 is for a CPU; --method heatmap always has HRNet")
    add("--method", default="lddmm", choices=["lddmm", "coord", "heatmap"], help="coord and "
        "heatmap are baselines without a flow")
    add("--train-points", type=run.listed(run.natural), default="100", help="percent of the "
        "landmarks that have momenta (Sec. 4.2: 50, HELEN also 33), or their indices i,j,...")
    add("--steps", type=run.within(int, 1, 1000), default=2, help="Euler steps of Eq. (7); too few "
        "can fold the face (DetJN > 0)")
    add("--sigma-factor", type=run.above_zero, default=1.0, help="sigma_V over its curve's scale")
    add("--beta", type=run.nonnegative, default=0.1, help="weight of curves, Eq. (3) (Table 5)")
    add("--squared", action="store_true", help="the loss in the form of the authors' code")
    add("--drop-at", type=run.listed(run.fraction), default="0.25,0.5,0.75", help="parts of the "
        "run after which the rate is halved")
    add("--as-points", type=int, default=0, choices=[0, *ANNOTATIONS], help="with --predict, the "
        "annotation to predict; 0: that of the training")
    args = run.parse(parser, argv)
    if args.backbone == "hourglass" and args.method != "heatmap" and args.size % 64:
        parser.error(f"--size {args.size}: expected a multiple of 64 with --backbone hourglass")
    return args


# ---- Curves and training landmarks ---------------------------------------------------------------

# Letters of shapes: B faces, P landmarks of an annotation, K of them that the network is trained on
# ("training landmarks", which have momenta), N points that flow (these and extra ones), C curves
# (the paper's N); of one curve n landmarks and m extra ones, as in the paper.

# Sec. 4.2: the training landmarks by annotation and percent, a list for each curve, in the order of
# `datasets.SCHEMES[points].curves`. Source: code (46, 54, 98 and 78 landmarks); the paper has none.
# WFLW's list halves the eyes, Appendix B keeps them whole. Of 68, a corner of the mouth, which ends
# both lips, has a momentum on each. In the code HELEN's 162 stands twice, 172 not at all; here 172.
SUBSETS: dict[int, dict[int, list[list[int]]]] = {
    68: {50: [[0, 2, 4, 6, 8], [9, 11, 13, 16], [17, 19, 21], [22, 24, 26], [27, 28, 29, 30],
              [31, 33, 35], [*range(36, 42)], [*range(42, 48)], [48, 50, 51, 52, 54],
              [54, 56, 57, 58, 48], [60, 62, 64], [64, 66, 60]]},
    98: {50: [[*range(0, 17, 2)], [*range(18, 33, 2)], [33, 35, 37, 38, 40], [42, 44, 46, 48, 50],
              [51, 52, 53, 54], [55, 57, 59], [60, 62, 64, 66], [68, 70, 72, 74], [76, 78, 80, 82],
              [83, 85, 87], [88, 90, 92], [93, 95]]},
    194: {50: [[*range(0, 21, 2)], [21, *range(24, 41, 2)], [*range(41, 58, 2)],
               [*range(58, 72, 2)], [*range(72, 86, 2)], [*range(86, 100, 2)],
               [*range(100, 114, 2)], [*range(114, 134, 2)], [*range(134, 154, 2)],
               [*range(154, 174, 2)], [*range(174, 194, 2)]],
          33: [[*range(0, 21, 3), 20], [21, *range(25, 41, 3)], [41, 44, 47, 49, 51, 54, 57],
               [58, 61, 64, 65, 68, 71], [72, 75, 78, 79, 82, 85], [86, 89, 92, 93, 96, 99],
               [100, 103, 106, 107, 110, 113], [114, 116, 119, 122, 124, 126, 129, 132],
               [134, 136, 139, 142, 144, 146, 149, 152], [154, 156, 159, 162, 164, 166, 169, 172],
               [174, 176, 179, 182, 184, 186, 189, 192]]},
}


def training_landmarks(scheme: int, points: int | Sequence[int] = 100) -> dict[str, list[int]]:
    """Which landmarks have momenta: {curve: landmarks, in the order along it}.

    Args: scheme, number of landmarks, of ANNOTATIONS; points, percent of Sec. 4.2 (100: all that
        lie on curves), or indices.
    Raises: UserError for a percent without a list, an index on no curve or twice, an empty curve.
    """
    curves = datasets.SCHEMES[scheme].curves
    if isinstance(points, int):
        subsets = {100: list(curves.values())} | SUBSETS.get(scheme, {})
        if points not in subsets:
            known = ", ".join(map(str, subsets))
            raise UserError(f"--train-points: no list of {points} % of {scheme} landmarks; "
                            f"expected {known}, or indices i,j,...")
        return dict(zip(curves, subsets[points]))
    on_curves = sum(curves.values(), [])
    for index in points:
        if index not in on_curves:
            raise UserError(f"--train-points: landmark {index} lies on no curve of the {scheme}")
        if list(points).count(index) > 1:
            raise UserError(f"--train-points: landmark {index} is given more than once")
    chosen = {name: [index for index in line if index in points] for name, line in curves.items()}
    for name, line in chosen.items():
        if not line:
            raise UserError(f"--train-points: none lies on {name}, where nothing would move the "
                            f"other landmarks; give at least one of {curves[name]}")
    return chosen


class Curves(nn.Module):
    """The points of a face (..., N, 2) <-> by curve (..., C, L, 2), with L points on the longest.

    A shorter curve repeats its last point. The copies end tangents of length 0, which add nothing
    to Eq. (1); they are given no momenta, so that they move nothing.
    Args: table, the points of each curve, in the order along it; together all of 0 to N - 1, once.
    """

    def __init__(self, table: Collection[Sequence[int]]):
        super().__init__()
        longest = max(map(len, table))
        padded = torch.tensor([[*line, *line[-1:] * (longest - len(line))] for line in table])
        real = torch.arange(longest) < torch.tensor([[len(line)] for line in table])
        slot = real.flatten().nonzero()[:, 0][padded[real].argsort()]
        self.register_buffer("padded", padded, persistent=False)  # (C, L) the point of each slot
        self.register_buffer("real", real, persistent=False)  # (C, L) False for a copy
        self.register_buffer("slot", slot, persistent=False)  # (N,) the slot of each point

    def split(self, points: torch.Tensor) -> torch.Tensor:
        """(..., N, 2) -> (..., C, L, 2)."""
        return points.index_select(-2, self.padded.flatten()).unflatten(-2, self.padded.shape)

    def join(self, points: torch.Tensor) -> torch.Tensor:
        """(..., C, L, 2) -> (..., N, 2)."""
        return points.flatten(-3, -2).index_select(-2, self.slot)


def positions_by_curve(subset: dict[str, list[int]]) -> dict[str, list[int]]:
    """{curve: which of the K training landmarks are on it}; they are numbered curve after curve."""
    number = itertools.count()
    return {name: [next(number) for _ in line] for name, line in subset.items()}


def curve_scale(mean: torch.Tensor, curves: Curves) -> torch.Tensor:
    """sigma_V of each curve (C,), px of the mean face (N, 2): mean of width and height of its box.
    Any sigma moves a curve of one point alike; it takes the mean scale of the others, or 1."""
    points = curves.split(mean)  # (C, L, 2)
    scale = (points.amax(1) - points.amin(1)).mean(1)
    extended = scale > 0
    other = scale[extended].mean() if extended.any() else torch.ones_like(scale[0])
    return torch.where(extended, scale, other)


# ---- Deformation layer: Sec. 3.1 and 3.3 ---------------------------------------------------------

def kernel(a: torch.Tensor, b: torch.Tensor, sigma) -> torch.Tensor:
    """k_V, k_W between all points a (..., m, 2) and b (..., n, 2): (..., m, n); sigma (..., 1, 1).
    Differences are taken directly: |a|^2 + |b|^2 - 2ab would lose three digits in float32."""
    a = a / sigma
    b = b / sigma
    dx = a[..., :, None, 0] - b[..., None, :, 0]
    dy = a[..., :, None, 1] - b[..., None, :, 1]
    return (-(dx * dx + dy * dy)).exp()  # Sec. 3.1.1: k(a, b) = exp(-|a - b|^2 / sigma^2)


def as_column(sigma, like: torch.Tensor) -> torch.Tensor:
    """sigma, a number or (...,), as (..., 1, 1)."""
    return torch.as_tensor(sigma, dtype=like.dtype, device=like.device)[..., None, None]


def flow(x: torch.Tensor, alpha: torch.Tensor, sigma, steps: int = 2,
         extra: torch.Tensor | None = None):
    """The points of a curve, moved by their momenta for a unit of time in `steps` Euler steps.

    Extra points have no momentum: they move no other and are carried along (Sec. 3.3).
    It is surely one-to-one if the norms of the momenta sum to less than sqrt(e / 2) sigma steps.
    Use as many steps as the network was trained with.
    Args: x (..., n, 2) px; alpha (..., n, 2) px; sigma, a number or (...,) px; extra (..., m, 2)
        px. Leading dimensions broadcast, as those of many faces and curves.
    Returns: path (..., steps + 1, n, 2), from the start on; with extra the pair of both paths.
    """
    n = x.shape[-2]
    if extra is not None:
        lead = torch.broadcast_shapes(x.shape[:-2], extra.shape[:-2])
        x = torch.cat([x.expand(*lead, -1, -1), extra.expand(*lead, -1, -1)], -2)
    sigma = as_column(sigma, x)
    path = [x]
    for _ in range(steps):
        # Eq. (6): dx_i/dt = sum_j k_V(x_j, x_i) alpha_j
        velocity = kernel(x, x[..., :n, :], sigma) @ alpha
        # Eq. (7): x_i(t) = x_i(0) + int_0^t (sum_j k_V(x_j, x_i) alpha_j) dt
        x = x + velocity / steps
        path.append(x)
    path = torch.stack(torch.broadcast_tensors(*path), -3)
    return path if extra is None else (path[..., :n, :], path[..., n:, :])


def jacobian(x: torch.Tensor, alpha: torch.Tensor, sigma, steps: int,
             points: torch.Tensor) -> torch.Tensor:
    """The derivative of the flow's end by its start at `points` (..., m, 2): (..., m, 2, 2), whose
    rows are the gradients of x and y. A determinant of at most 0 is a fold (DetJ of Sec. 4.1)."""
    path, moved = flow(x, alpha, sigma, steps, points)
    sigma = as_column(sigma, path)
    J = torch.eye(2, dtype=path.dtype, device=path.device)
    for step in range(steps):
        x = path[..., step, :, :]
        y = moved[..., step, :, :]
        away = (y[..., :, None, :] - x[..., None, :, :]) / sigma[..., None]  # (..., m, n, 2)
        # dv^a/dy^b = sum_j alpha_j^a k_V(x_j, y) (-2 (y - x_j)^b / sigma^2)
        slope = -2 * kernel(y, x, sigma)[..., None] * away / sigma[..., None]
        Dv = alpha.mT[..., None, :, :] @ slope  # (..., m, 2, 2)
        # The chain rule for a step of Eq. (7): J <- (I + Dv dt) J
        J = J + Dv @ J / steps
    return J


def deform(points: torch.Tensor, momenta: torch.Tensor, curves: Curves, sigma, steps: int = 2):
    """Flow 1 to flow N (Sec. 3.1.2): each curve of a face by its own momenta only, all at once.
    Args: points (B or 1, N, 2) px; momenta (B, N, 2) px; sigma, a number or (C,) px.
    Returns: path (B, steps + 1, N, 2)."""
    alpha = curves.split(momenta) * curves.real[..., None]
    path = flow(curves.split(points), alpha, sigma, steps)  # (B, C, steps + 1, L, 2)
    return curves.join(path.movedim(-4, -3))


# ---- Network: Fig. 1 -----------------------------------------------------------------------------

FRAME = 256  # momenta, mean face and flow are in px of a crop of this side, whatever --size is


def to_frame(points, size: int):
    """Px of a size x size crop -> px of a 256 px crop of the same face, elementwise."""
    return (points + 0.5) * (FRAME / size) - 0.5


def from_frame(points, size: int):
    """The inverse of `to_frame`."""
    return (points + 0.5) * (size / FRAME) - 0.5


class ExtraLandmarks(NamedTuple):
    """Points that the flows carry besides the training landmarks (Sec. 3.3), and the annotation
    that all of these make up. Together they are N points, the K training landmarks first."""
    points: torch.Tensor  # (N - K, 2) px of a 256 px crop, in the mean face
    curves: Curves  # of all N
    order: torch.Tensor  # (P,) which of the N each landmark of the annotation is


class Prediction(NamedTuple):
    """What a network says of B images, in px of a 256 px crop; of heatmaps, these alone."""
    stages: list[torch.Tensor]  # (B, N, 2) where each stage leaves the points; the last counts
    start: torch.Tensor | None = None  # (B or 1, N, 2) where the last stage's flow begins
    momenta: torch.Tensor | None = None  # (B, N, 2) of the last stage, 0 of extra points
    heatmaps: torch.Tensor | None = None  # (B, K, size / 4, size / 4)


class LDDMMFace(nn.Module):
    """Fig. 1: images (B, 3, size, size), normalised -> backbone, momentum estimator, deformation
    layer -> `Prediction`.

    Args: backbone, a name of BACKBONES or "dan"; scheme, P; mean (P, 2), the mean face in px of a
        256 px crop; points, which landmarks have momenta, as `training_landmarks` takes or returns
        them; steps of the flow; sigma_factor, sigma_V over a curve's scale; method, "lddmm" or a
        baseline: "coord" (the estimator's output is added to the mean face, nothing flows) or
        "heatmap".
    Raises: UserError as `training_landmarks` does.
    """

    def __init__(self, backbone: str, scheme: int, mean: torch.Tensor,
                 points: int | Sequence[int] | dict = 100, steps: int = 2,
                 sigma_factor: float = 1.0, method: str = "lddmm", size: int = 256):
        super().__init__()
        self.scheme = scheme
        self.steps = steps
        self.method = method
        self.size = size
        self.offset = 0.0  # px of a 256 px crop, added to the peaks of heatmaps
        self.subset = points  # {curve: landmarks}
        if not isinstance(points, dict):
            self.subset = training_landmarks(scheme, points)
        self.landmarks = sum(self.subset.values(), [])  # (K,) the number of each training landmark
        count = len(self.landmarks)
        self.curves = Curves(positions_by_curve(self.subset).values())
        self.register_buffer("ids", torch.tensor(self.landmarks), persistent=False)
        pupils = torch.tensor(datasets.SCHEMES[scheme].pupils)
        self.register_buffer("pupils", pupils, persistent=False)  # (2, points of each)
        self.register_buffer("mean", mean.float())
        scale = curve_scale(self.start, self.curves)
        self.register_buffer("sigma", sigma_factor * scale)  # (C,) sigma_V
        weights = interpolation(scheme, self.subset)
        self.register_buffer("interpolate", weights, persistent=False)
        self.connection = None
        if method == "heatmap":
            self.backbone = HRNetHeatmaps(count)
            return
        if backbone == "dan":
            self.backbone = nn.ModuleList([DANStage(3, size), DANStage(5, size)])
            self.connection = DANConnection()
        else:
            self.backbone = nn.ModuleList([BACKBONES[backbone](count, size)])
        # Sec. 4: the momentum estimator is a pooling, here in the backbones, and a linear layer.
        self.estimators = nn.ModuleList(nn.Linear(net.channels, 2 * count) for net in self.backbone)

    @property
    def start(self) -> torch.Tensor:
        """The training landmarks of the mean face, (K, 2)."""
        return self.mean[self.ids]

    def stage(self, i: int, image, start, curves: Curves):
        """Backbone, estimator and flow i, which begins at the points `start` (B or 1, N, 2).
        Returns: features (B, F), momenta (B, N, 2), where the flow ends (B, N, 2)."""
        features = self.backbone[i](image)
        with torch.autocast(image.device.type, enabled=False):  # bfloat16 rounds 200 px to 1 px
            features = features.float()
            momenta = self.estimators[i](features).unflatten(1, (-1, 2))  # (B, K, 2)
            momenta = F.pad(momenta, (0, 0, 0, start.shape[1] - len(self.ids)))  # 0 of extra points
            if self.method == "coord":
                points = start + momenta
            else:
                points = deform(start, momenta, curves, self.sigma, self.steps)[:, -1]
        return features, momenta, points

    def forward(self, image, extra: ExtraLandmarks | None = None) -> Prediction:
        if self.method == "heatmap":
            return Prediction([], heatmaps=self.backbone(image))
        curves = self.curves
        start = self.start[None]
        if extra is not None:
            curves = extra.curves
            start = torch.cat([self.start, extra.points])[None]
        features, momenta, first = self.stage(0, image, start, curves)
        if self.connection is None:
            return Prediction([first], start, momenta)
        # DAN: stage 2 sees the image moved so that stage 1's landmarks lie about the mean face.
        with torch.autocast(image.device.type, enabled=False):
            trained = first[:, :len(self.ids)]
            image, theta = self.connection(image.float(), trained, features, self.start)
            start = warp.apply_affine(theta, first)
        _, momenta, second = self.stage(1, image, start, curves)
        return Prediction([first, warp.apply_affine(warp.invert(theta), second)], start, momenta)


# ---- Loss: Sec. 3.2 ------------------------------------------------------------------------------

def inner(a: torch.Tensor, b: torch.Tensor, sigma) -> torch.Tensor:
    """Inner product in W* of curves (..., n, 2) and (..., m, 2): (...,); sigma (..., 1, 1). All
    curves are open, as in the code: n - 1 tangents of n points. Eq. (1) prints the double sum, of
    a = b, as the norm; it is the norm's square."""
    # Sec. 3.1.1: c_i = (x_i + x_{i+1}) / 2, tau_i = x_{i+1} - x_i
    c_a = (a[..., 1:, :] + a[..., :-1, :]) / 2
    c_b = (b[..., 1:, :] + b[..., :-1, :]) / 2
    tau_a = a.diff(dim=-2)
    tau_b = b.diff(dim=-2)
    # Eq. (1): sum_i sum_j k_W(c_i, c_j) tau_i . tau_j
    return (kernel(c_a, c_b, sigma) @ tau_b * tau_a).sum((-2, -1))


def curve_discrepancy(z: torch.Tensor, y: torch.Tensor, sigma, squared: bool = False):
    """D_c of curves z, y (..., n, 2) px: (...,) px, or squared; sigma_W a number or (...,) px."""
    sigma = as_column(sigma, z)
    # Eq. (4): D_c = || sum_i tau_z,i delta_c_z,i - sum_j tau_y,j delta_c_y,j ||_W*
    square = inner(z, z, sigma) - 2 * inner(z, y, sigma) + inner(y, y, sigma)
    if squared:
        return square.clamp(min=0)
    # The root of 0 has no gradient: below this, which is nothing in px, D_c is taken as constant.
    smallest = (1e-6 * sigma[..., 0, 0]) ** 2
    return torch.maximum(square, smallest).sqrt()


def landmark_discrepancy(z: torch.Tensor, y: torch.Tensor, real: torch.Tensor | None = None):
    """D_l of points z and y, both (..., n, 2) px: (...,) px; only of the `real` (..., n) ones."""
    distance = (z - y).norm(dim=-1)
    if real is None:
        return distance.mean(-1)  # Eq. (5): D_l = 1/n sum_i |z_i - y_i|
    return (distance * real).sum(-1) / real.sum(-1)


def lddmm_loss(pred: torch.Tensor, target: torch.Tensor, curves: Curves, sigma: torch.Tensor,
               d: torch.Tensor, beta: float = 0.1, squared: bool = False) -> torch.Tensor:
    """The loss, a scalar: the mean over faces of the discrepancies of all curves over d_ipd. The
    energy of Eq. (2) does not appear, as its gamma is 0 (Sec. 3.2): D of Eq. (3) is all.

    Args: pred, target (B, N, 2) px; sigma (C,), sigma_V of `curve_scale`; d (B,), d_ipd px of the
        target; squared, the form of the authors' code, whose balance depends on the size of a px.
    """
    z = curves.split(pred)
    y = curves.split(target)
    sigma_W = sigma / 2  # Sec. 4
    if squared:  # code: (beta sum_p D_pc^2 / N + D_l of all N points) / d
        D_c = curve_discrepancy(z, y, sigma_W, squared=True)  # (B, C)
        D_l = landmark_discrepancy(pred, target)  # (B,)
        return ((beta * D_c.sum(1) / pred.shape[1] + D_l) / d).mean()
    # Eq. (3), of each curve p: D = beta D_pc + D_pl
    D = beta * curve_discrepancy(z, y, sigma_W) + landmark_discrepancy(z, y, curves.real)  # (B, C)
    # Eq. (8): sum_p (beta D_pc + D_pl) / d_ipd
    return (D.sum(1) / d).mean()


def loss_of(net: LDDMMFace, prediction: Prediction, points: torch.Tensor, args) -> torch.Tensor:
    """The loss of a batch, a scalar; points (B, P, 2) px of the crop. For the baselines it is Eq.
    (5) over d_ipd, or the squared error of the heatmaps. DAN's stages weigh 0.3 and 0.7 (code)."""
    if net.method == "heatmap":
        return heatmap_loss(prediction.heatmaps.float(), points[:, net.ids], net.size)
    points = to_frame(points, net.size)
    target = points[:, net.ids]
    pupils = points[:, net.pupils].mean(2)  # (B, 2, 2)
    d = (pupils[:, 0] - pupils[:, 1]).norm(dim=1)
    losses = []
    for pred in prediction.stages:
        if net.method == "coord":
            losses.append((landmark_discrepancy(pred, target) / d).mean())
        else:
            losses.append(lddmm_loss(pred, target, net.curves, net.sigma, d, args.beta,
                                     args.squared))
    return losses[0] if len(losses) == 1 else 0.3 * losses[0] + 0.7 * losses[1]


# ---- The landmarks that are not trained on: Sec. 3.3 and 3.4 -------------------------------------

def curves_and_pupils(scheme: int) -> dict[str, list[int]]:
    """{curve: landmarks}; a pupil on no curve (98 landmarks: 96 and 97) goes with its eye."""
    curves = datasets.SCHEMES[scheme].curves
    on_curves = sum(curves.values(), [])
    found = {name: list(line) for name, line in curves.items()}
    for side in ("left", "right"):
        for pupil in datasets.SCHEMES[scheme].anchors[f"pupil_{side}"]:
            if pupil not in on_curves:
                found[f"eye_{side}"].append(pupil)
    return found


def extra_landmarks(net: LDDMMFace, points: torch.Tensor, names: Sequence[str],
                    order: Sequence[int]) -> ExtraLandmarks:
    """Points (E, 2) px of a 256 px crop, each with the name of the curve that it goes with."""
    table = positions_by_curve(net.subset)
    for i, name in enumerate(names, len(net.landmarks)):
        table[name].append(i)
    order = torch.tensor(order, device=net.mean.device)
    return ExtraLandmarks(points, Curves(table.values()).to(order.device), order)


def sparse_to_dense(net: LDDMMFace) -> ExtraLandmarks:
    """The other landmarks of the network's own annotation (Sec. 4.2), on their curves. A corner of
    the mouth that is a training landmark of both lips is predicted by the lower, as in the code."""
    ids = []
    names = []
    for name, line in curves_and_pupils(net.scheme).items():
        for index in line:
            if index not in net.landmarks:
                ids.append(index)
                names.append(name)
    position = {index: k for k, index in enumerate(net.landmarks + ids)}
    order = [position[index] for index in range(net.scheme)]
    return extra_landmarks(net, net.mean[ids], names, order)


def cross_annotation(net: LDDMMFace, mean: torch.Tensor) -> ExtraLandmarks:
    """The landmarks of another annotation (Sec. 4.3), given its mean face (P, 2) in any frame.

    The affine map that fits the shared anchors best brings that mean face onto the network's. A
    point goes with the curve of its own curve's name; where there is none (a nose of one curve,
    pupils), with that of the nearest training landmark in the same part of the face.
    """
    own = datasets.SCHEMES[net.scheme]
    other = datasets.SCHEMES[len(mean)]
    # Not the ends of the contour: annotations begin it at other heights.
    shared = [name for name in other.anchors
              if name in own.anchors and not name.startswith("contour_end")]
    mean = mean.to(net.mean)
    theirs = datasets.group_means(mean, [other.anchors[name] for name in shared])
    ours = datasets.group_means(net.mean, [own.anchors[name] for name in shared])
    placed = warp.apply_affine(warp.fit_affine(theirs, ours), mean)  # (P, 2)
    distance = (placed[:, None] - net.start).norm(dim=2).tolist()  # P lists of K
    curve_of = {i: name for name, line in other.curves.items() for i in line}
    part_of = {i: part for part, ids in other.parts.items() for i in ids}
    own_part = {i: part for part, ids in own.parts.items() for i in ids}
    own_curve = [name for name, line in net.subset.items() for _ in line]  # (K,)
    names = []
    for index in range(len(mean)):
        name = curve_of.get(index)
        if name not in net.subset:
            part = part_of.get(index)  # None of a pupil: then any part
            near = [k for k, i in enumerate(net.landmarks) if part in (None, own_part[i])]
            name = own_curve[min(near, key=distance[index].__getitem__)]
        names.append(name)
    count = len(net.landmarks)
    return extra_landmarks(net, placed, names, range(count, count + len(mean)))


# ---- Data: Appendix B ----------------------------------------------------------------------------

ROTATION, ZOOM = 20.0, 0.25  # degrees; of 1
# How far beyond the crop its own corners can come to lie.
REACH = math.sqrt(2) * math.cos(math.radians(45 - ROTATION)) / (1 - ZOOM)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1] over ImageNet


def augment(rng: np.random.Generator, size: int):
    """Draws rotation, scale and mirror for a face: matrix (2, 3) crop px -> crop px; mirror; {}."""
    angle, zoom = rng.normal(0, 0.5, 2).clip(-1, 1) * [math.radians(ROTATION), ZOOM]
    c = (1 + zoom) * math.cos(angle)
    s = (1 + zoom) * math.sin(angle)
    middle = (size - 1) / 2
    matrix = np.array([[c, s, middle - (c + s) * middle], [-s, c, middle - (c - s) * middle]])
    return matrix, rng.random() < 0.5, {}


@functools.cache
def constant(values: tuple, device: torch.device) -> torch.Tensor:
    """A float32 tensor. Cached: a copy in each step would make the CPU wait for the GPU."""
    with torch.inference_mode(False):  # else, made in an evaluation, training could not use it
        return torch.tensor(values, device=device)


def prepare(batch: dict, device: torch.device) -> torch.Tensor:
    """Network input (B, 3, H, W) from a batch, normalised."""
    image = batch["image"].to(device, non_blocking=True)
    if image.dtype == torch.uint8:  # (B, H, W, 3); permuted, it is channels_last as it stands
        image = image.permute(0, 3, 1, 2).float()
    mean = 255 * constant(MEAN, device)[:, None, None]
    std = 255 * constant(STD, device)[:, None, None]
    return ((image - mean) / std).contiguous(memory_format=torch.channels_last)


def read_faces(args, split: str) -> list[datasets.Face]:
    """The faces of args.data: drawn ones, or those of a set on disk whose files have been looked
    at."""
    if args.data == "faces":
        count = min(args.limit or DRAWN["train"], DRAWN[split])
        return synthetic.read_faces(split, count, args.size, args.points)  # whatever --seed is
    faces = datasets.read(args.data, args.data_root, split)[:args.limit or None]
    datasets.check_images(faces, args.upright)
    return faces


def make_dataset(args, split: str) -> datasets.CropDataset:
    """A split as crops by --box, --margin and --size; the training split augmented.
    Raises: UserError for an annotation without curves, or faces that --norm cannot measure."""
    faces = read_faces(args, split)
    points = len(faces[0].points)
    if points not in ANNOTATIONS:
        raise UserError(f"--data {args.data}: faces of {points} landmarks, which have no table of "
                        f"curves; expected {', '.join(map(str, ANNOTATIONS))}")
    boxes = datasets.face_boxes(faces, args.box)
    crops = datasets.square_crops(boxes, args.size, args.margin)
    if split == "test":
        data = datasets.CropDataset(faces, crops, args.size)
        data.divisors(args.norm)  # raises here, not after an epoch
        return data
    flip = datasets.SCHEMES[points].flip
    return datasets.CropDataset(faces, crops, args.size, augment, REACH, 1 + ZOOM, flip, args.seed)


def mean_face(data: datasets.CropDataset) -> torch.Tensor:
    """The mean of a set's landmarks in their crops, (P, 2) float32 px of a 256 px crop."""
    return to_frame(data.crop_points().mean(0), data.size)


# ---- Training: Appendix B ------------------------------------------------------------------------

def learning_rate(step: int, steps: int, base: float, drop_at: Sequence[float]) -> float:
    """Halved after each of the parts `drop_at` of the run."""
    return base * 0.5 ** sum(step >= part * steps for part in drop_at)


def build(args, mean: torch.Tensor, device: torch.device) -> LDDMMFace:
    """The network that the flags describe, for a mean face (P, 2) px of a 256 px crop."""
    points = args.train_points[0] if len(args.train_points) == 1 else args.train_points
    net = LDDMMFace(args.backbone, len(mean), mean, points, args.steps, args.sigma_factor,
                    args.method, args.size)
    return net.to(device, memory_format=torch.channels_last)


def train(args) -> dict:
    """Trains, evaluates or predicts, as the flags say; returns the last evaluation's numbers."""
    if args.eval:
        return evaluate_checkpoint(args)
    if args.predict:
        return predict(args)
    job = run.Job(args)
    # Data
    train_set = make_dataset(args, "train")
    test_set = make_dataset(args, "test")
    points = train_set.points.shape[1]
    if test_set.points.shape[1] != points:
        raise UserError(f"training faces have {points} landmarks, test faces "
                        f"{test_set.points.shape[1]}")
    # Network and optimizer
    net = build(args, mean_face(train_set), job.device)
    job.say(f"{len(train_set)} training faces, {len(test_set)} test faces, {points} landmarks, "
            f"{len(set(net.landmarks))} of them trained on, {len(net.subset)} curves")
    # 4 epochs on 800 drawn faces: NME 14.7 % with the three halvings, 11.4 % with the last alone.
    first_drop = min(args.drop_at, default=1) * args.epochs
    if args.drop_at and first_drop < 2:
        job.say(f"note: the rate is halved after {first_drop:.1f} of {args.epochs} epochs; in a "
                "short run fewer --drop-at learn more")
    optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay,
                                 fused=True)
    backbone = net.backbone if args.method == "heatmap" else net.backbone[0]
    job.restore(net, optimizer, [len(train_set), points], backbone)
    model = job.wrap(net)
    job.begin(train_set)
    if job.rank == 0:
        test_batches = datasets.in_order(len(test_set), 64)
        test_loader = run.make_loader(args, test_set, test_batches, job.device)
    results = None
    for epoch in job.epochs():
        net.train()
        for step, batch in job.steps_of(epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.epochs * job.steps, args.lr, args.drop_at)
            image = prepare(batch, job.device)
            target = batch["points"].to(job.device, non_blocking=True)
            with run.precision(args, job.device):
                prediction = model(image)
            loss = loss_of(net, prediction, target, args)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            job.note(step, loss=loss)
        if job.rank == 0 and job.due(epoch):
            results = evaluate(net, test_loader, args)
        job.save(epoch, results[0] if results and job.due(epoch) else {})
    if job.rank > 0:
        return {}
    scores, errors, found = results or evaluate(net, test_loader, args)
    print_table(scores, args, points)
    write_pictures(job.folder, net, test_set, errors, found, args.threshold)
    if args.data == "faces":  # the same faces in another annotation, as Sec. 4.3
        other = copy.copy(args)
        other.points = 194 if points != 194 else 68
        evaluate_set(net, other, job.folder, f"-{other.points}")
    return scores


# ---- Evaluation: Sec. 4 --------------------------------------------------------------------------

def extra_to_predict(net: LDDMMFace, args, points: int) -> ExtraLandmarks:
    """What a network carries to predict `points` landmarks: of another annotation than its own,
    whose mean face is that of the training split of --data, or, for a baseline, of its own."""
    if points == net.scheme or net.method != "lddmm":
        return sparse_to_dense(net)
    return cross_annotation(net, mean_face(make_dataset(args, "train")))


@torch.inference_mode()
def predict_points(net: LDDMMFace, image: torch.Tensor, extra: ExtraLandmarks, args):
    """The landmarks of prepared crops: (B, P, 2) px of the crop, of the annotation of `extra`,
    (B, K, 2) px those that were trained on, and the `Prediction`. A baseline carries nothing: it
    gives its own annotation, by `interpolation`."""
    with run.precision(args, image.device):
        prediction = net(image, extra if net.method == "lddmm" else None)
    if net.method == "lddmm":
        found = prediction.stages[-1]
        points = found[:, extra.order]
        trained = found[:, :len(net.ids)]
    else:
        if net.method == "coord":
            trained = prediction.stages[-1]
        else:
            maps = prediction.heatmaps.float()
            trained = to_frame(peaks(maps), maps.shape[3]) + net.offset
        points = net.mean + net.interpolate @ (trained - net.start)
    return from_frame(points, net.size), from_frame(trained, net.size), prediction


def jacobians(net: LDDMMFace, prediction: Prediction, extra: ExtraLandmarks) -> torch.Tensor:
    """Of the flow at each landmark: (B, P, 2, 2). Not of DAN, which has two flows."""
    curves = extra.curves
    start = curves.split(prediction.start)
    momenta = curves.split(prediction.momenta) * curves.real[..., None]
    J = jacobian(start, momenta, net.sigma, net.steps, start)  # (B, C, L, 2, 2)
    return curves.join(J.flatten(-2))[:, extra.order].unflatten(2, (2, 2))


def predict_set(net: LDDMMFace, loader, args, extra: ExtraLandmarks):
    """Of a whole set, in float64 and px of the images: landmarks (M, P, 2), the training landmarks
    (M, K, 2); and `jacobians` (M, P, 2, 2), but None for DAN, a baseline, or another annotation."""
    net.eval()
    one_flow = net.method == "lddmm" and net.connection is None and len(extra.order) == net.scheme
    points, trained, J = [], [], []
    for batch in loader:
        found, own, prediction = predict_points(net, prepare(batch, net.mean.device), extra, args)
        points.append(found.cpu().double())
        trained.append(own.cpu().double())
        if one_flow:
            J.append(jacobians(net, prediction, extra).cpu().double())
    to_image = warp.invert(loader.dataset.crop_matrices)  # crop px -> image px
    return (warp.apply_affine(to_image, torch.cat(points)),
            warp.apply_affine(to_image, torch.cat(trained)), torch.cat(J) if J else None)


def evaluate(net: LDDMMFace, loader, args, extra: ExtraLandmarks | None = None):
    """NME_l, FR, AUC and NME_c in the pixels of the images, over a test set and its subsets; DetJ.

    Args: loader, in order, of a CropDataset without augmentation; extra, of `extra_to_predict` if
        the set has another annotation than the network.
    Returns: scores by name, the NME of each face (M,), the landmarks (M, P, 2) px of the images.
        Scores are fractions: "nme" (NME_l), "fr", "auc", "curves" (NME_c), by part of the face
        "curves@contour", ..., all these also of subsets, "nme/pose", ...; "curves@alone", of the
        training landmarks without the others; what `scores_without_flow` gives; "detja", "detjn",
        "detjam" (Table 1).
    """
    extra = extra or sparse_to_dense(net)
    points, trained, J = predict_set(net, loader, args, extra)
    data = loader.dataset
    target = data.points
    divisors = data.divisors(args.norm)
    if points.shape == target.shape:
        errors = metrics.nme(points, target, divisors)
    else:  # a baseline in another annotation: only curves can be compared (Table 3)
        errors = torch.full((len(target),), math.nan, dtype=torch.float64)
    subsets = datasets.subsets(data.faces)
    scores = metrics.landmark_scores(errors, subsets, args.threshold)
    # A baseline is compared by the landmarks that it has (Tables 2 and 3), each once.
    own_parts = {part: [net.landmarks.index(i) for i in ids if i in net.landmarks]
                 for part, ids in datasets.SCHEMES[net.scheme].parts.items()}
    parts = datasets.SCHEMES[target.shape[1]].parts
    alone = metrics.curve_error(trained, target, parts, divisors, pred_parts=own_parts)
    curves = alone
    if net.method == "lddmm":
        curves = metrics.curve_error(points, target, parts, divisors)
    for part, error in curves.items():
        name = "curves" if part == "overall" else f"curves@{part}"
        for subset, chosen in subsets.items():
            scores[f"{name}/{subset}" if subset else name] = float(error[chosen].mean())
    scores["curves@alone"] = float(alone["overall"].mean())
    if target.shape[1] == net.scheme and net.mean.any():  # 0 of published weights
        scores |= scores_without_flow(net, trained, data, divisors)
    if J is not None:
        det = torch.linalg.det(J)  # (M, P)
        scores["detja"] = float(det.mean())
        scores["detjn"] = int((det <= 0).sum())
        scores["detjam"] = float(torch.linalg.det(J.mean(0)).mean())  # of the averaged flow
    return scores, errors, points


def print_table(scores: dict, args, points: int):
    """The numbers of Tables 1 to 5, 8 and 9: a column for the full set and each subset."""
    norm = datasets.norm_kind(args.norm, points)
    print(f"{args.data}: {points} landmarks, NME by {norm}, FR and AUC at {args.threshold:.2f}, "
          f"crop {args.box} x {args.margin}")
    rows = {"NME (%)": "nme", "FR (%)": "fr", "AUC (%)": "auc"}
    if math.isnan(scores["nme"]):
        rows = {}
    rows["NME_c (%)"] = "curves"
    rows |= {f"  {part} (%)": f"curves@{part}" for part in datasets.SCHEMES[points].parts}
    print(metrics.landmark_table(scores, rows))
    percent = {name: f"{100 * value:.2f} %" for name, value in scores.items()}
    print(f"NME_c of the training landmarks alone {percent['curves@alone']}")
    if "nme/mean face" in scores:
        print(f"without a flow: NME of the mean face {percent['nme/mean face']}, of displacements "
              f"interpolated along the curves {percent['nme@interpolated']}, NME_c "
              f"{percent['curves@interpolated']}")
    if "detja" in scores:
        print("DetJA {detja:.4f}, DetJN {detjn}, DetJAM {detjam:.4f}".format(**scores))


def evaluate_set(net: LDDMMFace, args, folder: Path | None = None, end: str = "") -> dict:
    """Evaluates a network on the test set of --data, in whose annotation its landmarks are
    predicted (Sec. 4.3), and prints the table; pictures go to `folder`, if there is one."""
    data = make_dataset(args, "test")
    points = data.points.shape[1]
    extra = extra_to_predict(net, args, points)
    batches = datasets.in_order(len(data), args.batch_size)
    loader = run.make_loader(args, data, batches, net.mean.device)
    scores, errors, found = evaluate(net, loader, args, extra)
    print_table(scores, args, points)
    if folder:
        folder = run.make_run(args, folder)
        write_pictures(folder, net, data, errors, found, args.threshold, end)
    return scores


def open_checkpoint(args, path: str) -> tuple[LDDMMFace, dict]:
    """The network of a checkpoint, or of HRNet's weights, in evaluation mode; and its flags, which
    `args` takes over."""
    state, device = run.open_checkpoint(args, path, read=read_checkpoint)
    if "published" in state:
        net = state["published"].to(device, memory_format=torch.channels_last)
        net.size = args.size
        return net, state["args"]
    mean = state["model"].get("mean")
    if not isinstance(mean, torch.Tensor) or mean.shape not in [(n, 2) for n in ANNOTATIONS]:
        raise UserError(f"{path}: its weights have no mean face; the file was changed")
    net = build(args, mean, device)
    run.load_weights(net, state["model"], path)
    return net.eval(), state["args"]


def evaluate_checkpoint(args) -> dict:
    """--eval: a checkpoint's numbers on the test set of --data; with --output, pictures too."""
    net, _ = open_checkpoint(args, args.eval)
    return evaluate_set(net, args, run.find_run(args))


def predict(args) -> dict:
    """--predict: each face's landmarks as NAME.pts, in the annotation of --as-points, each image as
    NAME.png with them drawn. The mean face of another annotation is that of drawn faces."""
    net, trained = open_checkpoint(args, args.weights)
    photos.fold_batch_norms(net, args.size)
    own = sparse_to_dense(net)
    wanted = own
    if args.as_points not in (0, net.scheme):
        if net.method != "lddmm":
            raise UserError(f"--as-points {args.as_points}: --method {net.method} predicts its own "
                            f"{net.scheme} landmarks alone; only a flow carries others along")
        drawn = copy.copy(args)
        vars(drawn).update(data="faces", points=args.as_points, limit=400, box="landmarks")
        wanted = cross_annotation(net, mean_face(make_dataset(drawn, "train")))

    def answer(crop: dict, last: bool) -> torch.Tensor:
        image = prepare(crop, net.mean.device)
        return predict_points(net, image, wanted if last else own, args)[0].cpu()

    photos.predict_landmarks(args, answer, passes=1 if trained.get("box") == "face" else 2)
    return {}


# ---- Baselines: no flow (Sec. 4.2) ---------------------------------------------------------------

def interpolation(scheme: int, subset: dict[str, list[int]]) -> torch.Tensor:
    """Weights (P, K) that interpolate displacements of the training landmarks between neighbours on
    a curve, and hold them beyond the outermost; a pupil has the mean of its eye."""
    curves = datasets.SCHEMES[scheme].curves
    ids = sum(subset.values(), [])
    weights = torch.zeros(scheme, len(ids))
    for name, columns in positions_by_curve(subset).items():
        line = curves[name]
        along = []  # where on the curve each is; a mouth corner of the other lip ends this one
        for k, index in enumerate(subset[name]):
            outside = -1 if k == 0 else len(line)
            along.append(line.index(index) if index in line else outside)
        for column, unit in zip(columns, np.eye(len(columns))):
            values = np.interp(range(len(line)), along, unit)
            weights[line, column] = torch.from_numpy(values).float()
        for pupil in curves_and_pupils(scheme)[name][len(line):]:
            weights[pupil, columns] = 1 / len(columns)
    for k, index in enumerate(ids):  # a training landmark is where it is
        weights[index] = F.one_hot(torch.tensor(k), len(ids)).float()
    return weights


def interpolated(net: LDDMMFace, trained: torch.Tensor, data) -> torch.Tensor:
    """All landmarks (M, P, 2) px of the images without a flow: the mean face's, moved as its
    training landmarks were, `trained` (M, K, 2), interpolated along the curves."""
    mean = from_frame(net.mean.cpu().double(), data.size)
    start = from_frame(net.start.cpu().double(), data.size)
    moved = warp.apply_affine(data.crop_matrices, trained) - start
    moved = net.interpolate.cpu().double() @ moved  # (M, P, 2)
    return warp.apply_affine(warp.invert(data.crop_matrices), mean + moved)


def scores_without_flow(net: LDDMMFace, trained: torch.Tensor, data, divisors) -> dict:
    """What the flow has to beat: "nme@interpolated" and "curves@interpolated", displacements of the
    training landmarks (M, K, 2) image px interpolated along curves; "nme/mean face", of none."""
    between = interpolated(net, trained, data)
    mean = from_frame(net.mean.cpu().double(), data.size)
    still = warp.apply_affine(warp.invert(data.crop_matrices), mean.expand_as(data.points))
    parts = datasets.SCHEMES[net.scheme].parts
    curves = metrics.curve_error(between, data.points, parts, divisors)["overall"]
    return {"nme@interpolated": float(metrics.nme(between, data.points, divisors).mean()),
            "curves@interpolated": float(curves.mean()),
            "nme/mean face": float(metrics.nme(still, data.points, divisors).mean())}


def heatmap_loss(maps: torch.Tensor, points: torch.Tensor, size: int) -> torch.Tensor:
    """Mean squared error of heatmaps (B, K, h, w) against Gaussians of sigma 1 px about points
    (B, K, 2) px of a size x size crop."""
    height, width = maps.shape[2:]
    centre = (points + 0.5) * (width / size) - 0.5
    x = torch.arange(width, device=points.device)
    y = torch.arange(height, device=points.device)
    row = (-(x - centre[..., :1]) ** 2 / 2).exp()  # (B, K, w)
    column = (-(y - centre[..., 1:]) ** 2 / 2).exp()  # (B, K, h)
    return (maps - column[..., :, None] * row[..., None, :]).square().mean()


def peaks(maps: torch.Tensor) -> torch.Tensor:
    """Highest px of heatmaps (B, K, h, w), a quarter towards the larger neighbour: (B, K, 2)."""
    height, width = maps.shape[2:]
    best = maps.flatten(2).argmax(2)  # (B, K)
    x = best % width
    y = best // width
    around = F.pad(maps, (1, 1, 1, 1)).flatten(2)
    centre = (y + 1) * (width + 2) + x + 1

    def neighbour(step: int) -> torch.Tensor:
        return around.gather(2, (centre + step)[..., None])[..., 0]

    shift_x = (neighbour(1) - neighbour(-1)).sign() / 4
    shift_y = (neighbour(width + 2) - neighbour(-width - 2)).sign() / 4
    return torch.stack([x + shift_x, y + shift_y], -1)


# HRNet's own networks for landmarks: HR18-300W.pth and HR18-WFLW.pth.

def load_published(path) -> LDDMMFace:
    """The network of HRNet's file, as of --method heatmap, in evaluation mode: with a map for each
    landmark, also for the pupils, in the order of its `ids`. It has no mean face.
    Raises: UserError."""
    state = {re.sub(r"^module\.", "", name): value for name, value in read_state_dict(path).items()}
    head = ("head.3.weight", "head.3.bias")
    rows = {len(state.get(name, ())) for name in head}
    if rows not in ({68}, {98}):
        raise UserError(f"{path}: expected a checkpoint, or HRNet's weights for 68 or 98 landmarks "
                        f"(HR18-300W.pth, HR18-WFLW.pth); found maps: {', '.join(map(str, rows))}")
    points = rows.pop()
    net = LDDMMFace("hrnet_w18", points, torch.zeros(points, 2), curves_and_pupils(points),
                    method="heatmap")
    net.offset = 1.0  # what its own crops have lies 1 px of 256 further right and down than in ours
    for name in head:
        state[name] = state[name][net.ids.tolist()]
    run.load_weights(net.backbone, state, path)
    return net.eval()


def read_checkpoint(path, script: str) -> dict:
    """A checkpoint of this script, or one that has HRNet's network as `published`.
    Raises: UserError."""
    if "script" in read_tensors(path):
        return run.load(path, script)
    return dict(args=dict(method="heatmap", size=FRAME), published=load_published(path))


# ---- Figures -------------------------------------------------------------------------------------

BLUE, GREY = (70, 120, 255), (200, 200, 200)


def draw_dense(net: LDDMMFace, data: datasets.CropDataset, points: torch.Tensor) -> np.ndarray:
    """Fig. 2B: 12 test faces, training landmarks in green, those that go with them in red."""
    own = points.shape[1] == net.scheme
    trained = torch.tensor([own and index in net.landmarks for index in range(points.shape[1])])
    tiles = []
    for i in photos.spread(len(data), 12):
        layers = ((points[i, ~trained], photos.RED), (points[i, trained], photos.GREEN))
        tiles.append(photos.draw_crop(data, i, 256, *layers))
    return photos.tile(tiles, 4)


@torch.inference_mode()
def draw_flow(net: LDDMMFace, data: datasets.CropDataset, side: int = 384) -> np.ndarray:
    """Fig. 2A, for 6 test faces: the plane bent by the flow of one curve (grey); initial landmarks
    (red), momenta (green arrows), trajectories (blue lines), true landmarks (blue diamonds)."""
    names = list(net.subset)
    c = names.index("contour_right") if "contour_right" in names else 0
    line = net.curves.padded[c][net.curves.real[c]]  # the training landmarks of that curve
    axis = torch.linspace(0, FRAME - 1, 25, device=net.mean.device)
    fine = torch.linspace(0, FRAME - 1, 97, device=net.mean.device)
    lines = torch.cat([torch.cartesian_prod(axis, fine), torch.cartesian_prod(axis, fine).flip(1)])
    tiles = []
    for i in photos.spread(len(data), 6):
        batch = data.__getitems__([(0, i)])
        prediction = net(prepare(batch, net.mean.device))
        momenta = prediction.momenta
        path = deform(prediction.start, momenta, net.curves, net.sigma, net.steps)[0]
        grid = flow(path[0, line], momenta[0, line], net.sigma[c], net.steps, lines)[1][-1]
        picture = cv2.resize(batch["image"][0].numpy(), (side, side)) // 2 + 100
        for bent, colour in ((grid.view(50, 97, 2), GREY), (path.transpose(0, 1), BLUE)):
            corners = 16 * from_frame(bent, side)  # cv2 takes 4 bits after the point
            corners = list(corners.round().int().cpu().contiguous().numpy())
            cv2.polylines(picture, corners, False, colour, 1, cv2.LINE_AA, 4)
        for tail, alpha in zip(path[0], momenta[0]):
            ends = 16 * from_frame(torch.stack([tail, tail + alpha]), side)
            cv2.arrowedLine(picture, *ends.round().int().tolist(), photos.GREEN, 1, cv2.LINE_AA, 4)
        photos.draw_points(picture, from_frame(path[0].cpu(), side), photos.RED, side / 250)
        truth = from_frame(to_frame(batch["points"][0, net.landmarks], net.size), side)
        for x, y in truth.round().int().tolist():
            cv2.drawMarker(picture, (x, y), BLUE, cv2.MARKER_DIAMOND, side // 50)
        tiles.append(picture)
    return photos.tile(tiles, 3)


def write_pictures(folder: Path, net: LDDMMFace, data, errors, points, threshold: float, end=""):
    """What the paper's figures show, from this run: dense.png, flow.png, ced.png."""
    datasets.write_image(folder / f"dense{end}.png", draw_dense(net, data, points))
    if not end and net.method == "lddmm" and net.connection is None:
        datasets.write_image(folder / "flow.png", draw_flow(net, data))
    subsets = datasets.subsets(data.faces)
    curves = {name or "full": errors[chosen] for name, chosen in subsets.items()}
    datasets.write_image(folder / f"ced{end}.png", metrics.ced_plot(curves, threshold))


# ---- Backbones: as published, nothing of this paper ----------------------------------------------

# Sec. 4: HRNetV2-W18; Appendix C: a 2-stack hourglass and DAN. Each turns images into the features
# (B, 2048) that the momentum estimator reads, by the average pooling that the paper has in it, and,
# as in the code, a convolution before that.


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """(B, cin, H, W) -> (B, cout, H/stride, W/stride). No bias: a batch norm follows."""
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_bn(cin: int, cout: int, kernel: int, stride=1, groups=1, act=None) -> nn.Sequential:
    """`conv` (0), batch norm (1) and, if its class is given, an activation (2)."""
    layers = [conv(cin, cout, kernel, stride, groups), nn.BatchNorm2d(cout)]
    if act:
        layers.append(act(inplace=True))
    return nn.Sequential(*layers)


def init_weights(module: nn.Module) -> None:
    """Initialises all convolutions and batch norms of `module`, in place.   Source: He et al., ICCV
    2015."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            # Variance 2 / fan_out keeps the gradient's variance. Of a depthwise convolution torch
            # counts too large a fan; the batch norm behind it undoes any scale.
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:  # those of the heads
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


def to_features(cin: int) -> nn.Sequential:
    """1x1 convolution, batch norm, ReLU before the pooling: (B, cin, H, W) -> (B, 2048, H, W)."""
    return nn.Sequential(nn.Conv2d(cin, 2048, 1), nn.BatchNorm2d(2048), nn.ReLU(inplace=True))


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


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, shortcut: (B, cin, H, W) -> (B, 4 planes, H/stride, W/stride).
    Source: He et al., CVPR 2016, Fig. 5 right; the 3x3 strides: a 1x1 would skip three pixels of
    four."""
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
    """Every branch to every other: output i is the ReLU of the sum over j of paths [i][j] of branch
    j. List of (B, C_j, H/2^j, W/2^j) -> list of the same shapes.   Source: Wang et al., "Deep
    High-Resolution Representation Learning for Visual Recognition" (HRNet), TPAMI 2021."""

    def __init__(self, channels: Sequence[int]):
        n = range(len(channels))
        super().__init__(nn.ModuleList(self.path(channels, j, i) for j in n) for i in n)

    @staticmethod
    def path(channels, j, i):
        """Down: i - j strided 3x3, the last of which changes the width. Up: a 1x1, enlarged in
        `forward`."""
        if j < i:
            c = channels[j]
            halvings = [conv_bn(c, c, 3, 2, act=nn.ReLU) for _ in range(i - j - 1)]
            return nn.Sequential(*halvings, conv_bn(c, channels[i], 3, 2))
        return conv_bn(channels[j], channels[i], 1) if j > i else nn.Identity()

    def forward(self, xs):
        outs = []
        for i, paths in enumerate(self):
            terms = [path(x) for path, x in zip(paths, xs)]
            # Bilinear, as HRNet's code for landmarks and segmentation; elsewhere by nearest pixel.
            for j in range(i + 1, len(terms)):
                terms[j] = F.interpolate(terms[j], xs[i].shape[-2:], mode="bilinear")
            outs.append(F.relu(sum(terms[1:], terms[0]), inplace=True))
        return outs


class HRModule(nn.Module):
    """Four BasicBlocks on each branch, then `Fuse`: list of (B, C_j, H/2^j, W/2^j) -> the same
    shapes."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        blocks = [[BasicBlock(c, c) for _ in range(4)] for c in channels]
        self.branches = nn.ModuleList(nn.Sequential(*own) for own in blocks)
        self.fuse_layers = Fuse(channels)

    def forward(self, xs):
        return self.fuse_layers([branch(x) for branch, x in zip(self.branches, xs)])


class HRNet(nn.Module):
    """HRNetV2-W18's branches, 18 to 144 channels: (B, 3, H, W), sides multiples of 32 -> a list of
    (B, C_j, H/2^(j+2), W/2^(j+2)). Parameters, also of both heads, are named as in its checkpoints.
    Source: Wang et al., TPAMI 2021. HRNet's code: batch-norm momentum 0.01; here 0.1, by which the
    running statistics of a short run are right, too."""

    def __init__(self, widths: Sequence[int] = (18, 36, 72, 144)):
        super().__init__()
        self.widths = tuple(widths)
        self.conv1, self.bn1 = conv(3, 64, 3, 2), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = conv(64, 64, 3, 2), nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Bottleneck(64, 64), *(Bottleneck(256, 64) for _ in range(3)))
        # A transition grows a branch out of the lowest resolution so far. Older ones pass as they
        # are, but for layer1's 256 channels. The outer Sequential is a level of checkpoints' names.
        low = [nn.Sequential(conv_bn(cin, cout, 3, 2, act=nn.ReLU))
               for cin, cout in itertools.pairwise((256, *widths[1:]))]
        self.transition1 = nn.ModuleList([conv_bn(256, widths[0], 3, act=nn.ReLU), low[0]])
        self.stage2 = nn.Sequential(HRModule(widths[:2]))
        self.transition2 = nn.ModuleList([nn.Identity(), nn.Identity(), low[1]])
        self.stage3 = nn.Sequential(*(HRModule(widths[:3]) for _ in range(4)))
        self.transition3 = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity(), low[2]])
        self.stage4 = nn.Sequential(*(HRModule(widths) for _ in range(3)))
        init_weights(self)

    def forward(self, image):
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        xs = [self.layer1(F.relu(self.bn2(self.conv2(x)), inplace=True))]  # (B, 256, H/4, W/4)
        for transition, stage in ((self.transition1, self.stage2), (self.transition2, self.stage3),
                                  (self.transition3, self.stage4)):
            xs = stage([path(x) for path, x in zip(transition, [*xs, xs[-1]])])
        return xs


class HRNetFeatures(HRNet):
    """HRNet with its head for classification: (B, 3, H, W) -> (B, 2048). A bottleneck widens each
    branch; from the finest on, strided convolutions bring one to the next, where they add up."""
    channels = 2048

    def __init__(self):
        super().__init__()
        planes = (32, 64, 128, 256)
        self.incre_modules = nn.ModuleList(
            nn.Sequential(Bottleneck(width, p)) for width, p in zip(self.widths, planes))
        self.downsamp_modules = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4 * p, 8 * p, 3, 2, 1), nn.BatchNorm2d(8 * p),
                          nn.ReLU(inplace=True)) for p in planes[:-1])
        self.final_layer = to_features(4 * planes[-1])
        for head in (self.incre_modules, self.downsamp_modules, self.final_layer):
            init_weights(head)

    def forward(self, image):
        xs = [widen(x) for widen, x in zip(self.incre_modules, super().forward(image))]
        y = xs[0]  # (B, 128, H/4, W/4)
        for x, down in zip(xs[1:], self.downsamp_modules):
            y = x + down(y)  # at last (B, 1024, H/32, W/32)
        return self.final_layer(y).mean((2, 3))


class HRNetHeatmaps(HRNet):
    """The baseline, HRNet with its head for landmarks, on all branches enlarged to the finest (270
    channels): (B, 3, H, W) -> heatmaps (B, points, H/4, W/4)."""

    def __init__(self, points: int):
        super().__init__()
        width = sum(self.widths)
        self.head = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width),
                                  nn.ReLU(inplace=True), nn.Conv2d(width, points, 1))
        init_weights(self.head)

    def forward(self, image):
        xs = super().forward(image)
        size = xs[0].shape[-2:]  # (H/4, W/4)
        xs[1:] = [F.interpolate(x, size, mode="bilinear") for x in xs[1:]]
        return self.head(torch.cat(xs, dim=1))


class PreBottleneck(nn.Module):
    """Batch norm and ReLU before each of three convolutions, and a shortcut: (B, cin, H, W) ->
    (B, 2 planes, H, W).
    Source: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, Fig. 4e."""

    def __init__(self, cin: int, planes: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), nn.Conv2d(cin, planes, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, padding=1)
        self.bn3, self.conv3 = nn.BatchNorm2d(planes), nn.Conv2d(planes, 2 * planes, 1)
        reshape = cin != 2 * planes
        self.shortcut = nn.Conv2d(cin, 2 * planes, 1) if reshape else nn.Identity()

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        out = self.conv3(F.relu(self.bn3(out), inplace=True))
        return out + self.shortcut(x)


def pre_bottlenecks() -> nn.Sequential:
    """The four blocks at every position of an hourglass: (B, 256, H, W) -> the same shape."""
    return nn.Sequential(*(PreBottleneck(256, 128) for _ in range(4)))


class HourglassLevel(nn.Module):
    """One resolution and, inside it, the `depth` - 1 lower ones: (B, 256, H, W) -> the same shape;
    H and W multiples of 2^depth.
    Source: Newell et al., "Stacked Hourglass Networks", ECCV 2016, Fig. 3."""

    def __init__(self, depth: int):
        super().__init__()
        self.skip = pre_bottlenecks()
        self.down = pre_bottlenecks()
        self.up = pre_bottlenecks()
        self.inner = HourglassLevel(depth - 1) if depth > 1 else pre_bottlenecks()

    def forward(self, x):
        low = self.up(self.inner(self.down(F.max_pool2d(x, 2))))  # (B, 256, H/2, W/2)
        return self.skip(x) + F.interpolate(low, scale_factor=2.0, mode="nearest")


class Hourglass(nn.Module):
    """Two stacked hourglasses: (B, 3, H, W), sides multiples of 64 -> (B, 2048), the average of
    both stacks' features. The second stack sees what the first saw, its features and its heatmaps,
    added. As in the code, the first heatmaps have no target, the last are unused: their layer stays
    for the code's number of parameters.   Source: Newell et al., ECCV 2016, Fig. 4."""
    channels = 2048

    def __init__(self, points: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64),
                                  nn.ReLU(inplace=True), PreBottleneck(64, 64), nn.MaxPool2d(2),
                                  PreBottleneck(128, 128), PreBottleneck(256, 128))
        self.stacks = nn.ModuleList(
            nn.Sequential(HourglassLevel(4), pre_bottlenecks(), nn.Conv2d(256, 256, 1),
                          nn.BatchNorm2d(256), nn.ReLU(inplace=True)) for _ in range(2))
        self.heads = nn.ModuleList(nn.Conv2d(256, points, 1) for _ in range(2))
        self.heads[1].requires_grad_(False)  # DistributedDataParallel would wait for its gradient
        self.features_back = nn.ModuleList([nn.Conv2d(256, 256, 1)])
        self.heatmaps_back = nn.ModuleList([nn.Conv2d(points, 256, 1)])
        self.final_layer = to_features(2 * 256)
        init_weights(self.final_layer)  # not the rest: no batch norm follows a block's sum

    def forward(self, image):
        x = self.stem(image)  # (B, 256, H/4, W/4)
        first = self.stacks[0](x)
        x = x + self.features_back[0](first) + self.heatmaps_back[0](self.heads[0](first))
        return self.final_layer(torch.cat([first, self.stacks[1](x)], dim=1)).mean((2, 3))


class DANStage(nn.Module):
    """A stage of DAN to its features: (B, in_channels, size, size) -> (B, 2048), 32 divides `size`.
    Source: Kowalski et al., "Deep Alignment Network", CVPR Workshops 2017 (with the last ReLU)."""
    channels = 2048

    def __init__(self, in_channels: int = 3, size: int = 256):
        super().__init__()
        cin = in_channels
        layers = []
        for cout in (64, 128, 256, 512, 512):
            layers += [conv_bn(cin, cout, 3, act=nn.ReLU), conv_bn(cout, cout, 3, act=nn.ReLU)]
            layers.append(nn.MaxPool2d(2))
            cin = cout
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(512 * (size // 32) ** 2, self.channels)
        init_weights(self)

    def forward(self, x):
        return F.relu(self.fc(self.dropout(self.layers(x).flatten(1))), inplace=True)


def landmark_image(points: torch.Tensor, size: int) -> torch.Tensor:
    """Image (B, 1, size, size) of landmarks (B, n, 2) px: 1 / (1 + px to the nearest landmark) in
    the 7 x 7 pixels about each, elsewhere 0. Passes gradients.
    Source: Kowalski et al.; 7 x 7: code."""
    offset = warp.pixel_centres((7, 7), points.device) - 3  # (49, 2)
    pixel = points.detach().round()[:, :, None] + offset  # (B, n, 49, 2)
    value = 1 / (1 + (points[:, :, None] - pixel).norm(dim=-1))  # (B, n, 49)
    value = value * ((pixel >= 0) & (pixel < size)).all(-1)
    x, y = pixel.long().clamp(0, size - 1).flatten(1, 2).unbind(-1)  # (B, 49 n) each
    image = value.new_zeros(len(points), size * size)
    image = image.scatter_reduce(1, y * size + x, value.flatten(1), "amax")
    return image.view(-1, 1, size, size)


class DANConnection(nn.Module):
    """What DAN's stage 2 sees of stage 1's answer: the image, moved so that the landmarks lie about
    the mean face (3 channels), an image of them (1) and one made of the features (1), both 64 x 64
    px and enlarged. All pass gradients.
    Source: Kowalski et al.; 64 x 64: code. Its faults are not copied: the first pixel's bilinear
    weights serve for all of the image, and landmarks are drawn without scaling them to 64 px.
    Args: image (B, 3, size, size); stage 1's landmarks (B, n, 2), features (B, 2048); mean (n, 2).
    Returns: stage 2's image (B, 5, size, size); theta (B, 2, 3), the similarity into its frame.
        Points and theta are in px of a 256 px crop."""
    canvas = 64

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(DANStage.channels, self.canvas**2)

    def forward(self, image, points, features, mean):
        size = image.shape[-1]
        theta = warp.fit_similarity(points, mean)
        in_px = warp.fit_similarity(from_frame(points, size), from_frame(mean, size))  # the same
        moved = warp.warp_affine(image, in_px, (size, size))
        start = warp.apply_affine(theta, points)
        drawn = landmark_image(from_frame(start, self.canvas), self.canvas)
        small = F.relu(self.fc(features), inplace=True).view(-1, 1, self.canvas, self.canvas)
        small = torch.cat([drawn, small.to(drawn.dtype)], dim=1)  # (B, 2, 64, 64)
        small = F.interpolate(small, (size, size), mode="bilinear")
        return torch.cat([moved, small], dim=1), theta


class InvertedResidual(nn.Module):
    """1x1 to `expand` times the width, depthwise 3x3, 1x1: (B, cin, H, W) -> (B, cout, H/stride,
    W/stride).
    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
    Fig. 4d."""

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
    """Sandler et al., CVPR 2018, Table 2, without the last 1x1 convolution, and a hidden layer of
    256 on all of its last map, which keeps the places that an average forgets: it learns from
    scratch in minutes. Ours, not the paper's. (B, 3, size, size) -> (B, 256); 32 divides `size`."""
    channels = 256

    def __init__(self, size: int):
        super().__init__()
        cin = 32
        layers = [conv_bn(3, cin, 3, 2, act=nn.ReLU6)]
        table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
                 (6, 160, 3, 2), (6, 320, 1, 1))
        for expand, cout, depth, stride in table:
            for i in range(depth):
                layers.append(InvertedResidual(cin, cout, 1 if i else stride, expand))
                cin = cout
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(320 * (size // 32) ** 2, self.channels)
        init_weights(self)

    def forward(self, image):
        return F.relu(self.hidden(self.features(image).flatten(1)), inplace=True)


# Images -> features (B, channels), for K training landmarks. DAN is not here: it has a flow inside.
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "hrnet_w18": lambda points, size=256: HRNetFeatures(),
    "hourglass": lambda points, size=256: Hourglass(points),
    "mobilenetv2": lambda points, size=256: MobileNetV2(size),
}


if __name__ == "__main__":
    run.main(train, parse_args())
