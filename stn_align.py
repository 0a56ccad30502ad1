"""Balanced Alignment for Face Recognition: A Joint Learning Approach.

Huawei Wei, Peng Lu, Yichen Wei; 2020. https://arxiv.org/abs/2003.10168

The method. A face is not aligned before recognition, but inside it: a small network, LocNet, looks
at the unaligned crop and moves an 8 x 8 lattice of points. The thin-plate spline from the regular
lattice to the moved one gives the grid by which the image is warped, or better the feature map of
the recognition network's stage 0.
Trained by recognition alone (a spatial transformer) the alignment is weak; the alignment loss,
weighted by lambda, draws the warped faces' landmarks to a learned template. ANME, the scatter of
aligned landmarks, says how strong an alignment is: too weak, and pose remains; too strong, and what
tells people apart is gone.

Train on VGGFace2 on four GPUs (the paper: 90.20 % rank-1 on MegaFace, a set that has since been
withdrawn; not run here). POINTS are landmarks of its images, as a landmark script writes them:
  python sdfl.py --predict VGGFace2 --weights runs/sdfl-wflw/last.pt --detector yunet.onnx \
      --output POINTS
  python stn_align.py --data vggface2 --data-root VGGFace2 --landmarks POINTS --gpus 4 --amp
Without any data, on drawn faces, 90 s on two CPU cores; then the spatial transformer without the
alignment loss (Sec. 5.2's baseline):
  python stn_align.py
  python stn_align.py --lam 0
Table 2: --align-at input | fmap, --lam 3 | 0. Table 3: --template fixed; with a dagger: --template
fixed --template-file RUN/template.pts. Fig. 8(a): --alpha fixed. Table 4: --data ms1m.
Continue, evaluate on LFW and on a folder of your own, use:
  python stn_align.py --data vggface2 --gpus 4 --resume
  python stn_align.py --eval RUN/last.pt --test LFW --data folder --data-root FOLDER
  python stn_align.py --predict photo.jpg --weights RUN/last.pt

Where each equation and box is:
  Eq. (1)        ANME                                           common.metrics.anme
  Eq. (2), (5)   alignment loss, whole loss                     Learner
  Eq. (3), (4)   landmarks' distance, weights' regularisation   alignment_loss
  Fig. 2         Affine2D, STN-Proj                             Affine2D, Projective
                 STN-TPS-Grid-k, FullAlign                      TPSGrid, FullAlign
  Fig. 5         ConvNet, recognition network                   IRNet.stem, IRNet.body
                 LocNet, warp grid                              LocNet, Maps.grid
                 differentiable sampler                         AlignedRecognizer.align

What the paper leaves open, and where we differ (the authors have published no code):
  - The blocks are ArcFace's IR units, as in Table 4's LResNet100E-IR; Table 1 draws two 3 x 3
    convolutions and names no block. So are the dropout of 0.4 and the last batch norm's gamma of 1.
  - LocNet ends in one linear layer over its 7 x 7 x 64 map. The paper's "slim version of Resnet18"
    may mean a mean over the map.
  - LocNet's outputs, template and loss are in px of a 112 px crop, whatever --size is; so are the
    axes of Fig. 9. In normalised coordinates (1 = 56 px) gradients are 56 times as large, and the
    training diverges at lambda 0 already.
  - W maps a point of the aligned face to the input image, as in Fig. 6. The warp needs exactly this
    direction, and so does Eq. (3). Only ANME needs the inverse, y = W^-1(x), found by Newton's
    method.
  - The paper's 84 landmarks are of no public order. Any known scheme serves, as 68 or 98 points;
    with another number nothing is mirrored, there is no ANME, and T needs --template-file.
  - A homography's last two numbers are bounded, so that it stays finite all over the crop.
  - The norms of Eq. (3) are not squared and Eq. (4) is a sum over landmarks, as printed. The best
    weight of landmark s is then 1 - D_s / (2 |S|), D_s being its mean distance in px, whatever
    recognition wants: of 68 landmarks above 0.9 for all that is aligned within 13 px, where Fig.
    8(b) shows 0.1 to 0.6. Squared px or a mean in Eq. (4) give such weights, but then all fall to 0
    at the start. So Fig. 8(b) does not follow from the equations as printed. Of five landmarks the
    best weight is 0 from 10 px on, and the loss is gone: loose crops need --alpha fixed.
  - T starts as the mean of frontal, upright training faces, told by the place of the nose between
    the eyes, along x (the paper: yaw within 15 degrees). Weights start at 0.5; fixed ones are 1.
    Weight decay would draw T to the crop's corner, so neither has any. L_fr has no gradient to
    either: it acts on them only by changing LocNet.
  - "TPS-Grid-2" is 2 x 2 points (tps2), 8 numbers as the homography has, and fits landmarks less
    well than the homography, which the paper ranks below it. 2 x 2 cells (tps3) fit its order.
    Both are here.
  - Affine2D fits five points (eye centres, nose, mouth corners) to those of T, by six numbers.
  - LocNet's learning rate is 0.01 of --lr (--loc-lr; 0.03 on drawn faces); the paper has one rate.
    Its last layer sums thousands of features: at the full rate, lambda 0 throws the lattice out of
    the image within an epoch, and lambda 3 folds four drawn faces in ten: their warp turns over,
    and mirrors a part of the face. A number of the homography moves the whole face, one of tps8's
    a 64th of it: by the same gradient, alike all over the crop, the face would shift 58 times as
    far, by tps2 13, by tps3 10 times. So LocNet's outputs are multiplied, for these by 1/8, 2/8 and
    3/8, and one rate serves all: without it the homographies run away. Twice as much for proj and
    tps2, by a gradient at the landmarks alone, gave the same accuracy on drawn faces.
  - Half of the training images are mirrored, and the rate rises over the first 500 steps.
  - Outside the image is mid-grey, outside the feature map 0. Images are RGB. The embedding of a
    test image is the sum of its own and its mirror image's. We report the last epoch.
  - With --gpus N each process normalises its own share of the batch. On a GPU the gradient of the
    sampling is summed in any order, so that two runs differ in their last digits.
"""
import argparse
import math
import os
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, datasets, metrics, photos, recognition, run, synthetic, warp

# ---- Settings ------------------------------------------------------------------------------------

# Sec. 5.1; the rate falls "at the beginning of the 13th, 18th, and 23rd epoch" of 24.
PAPER = dict(size=112, epochs=24, batch_size=256, lr=0.2, weight_decay=5e-4, box="image",
             margin=1.4, depth=34, width=64, method="tps8", align_at="fmap", lam=3.0, warmup=500,
             loc_lr=0.01, drop_at=[12 / 24, 17 / 24, 22 / 24])
SMALL = dict(depth=18, width=32, epochs=20, batch_size=64, lr=0.1, warmup=50, box="landmarks",
             cache="device", drop_at=[0.5, 0.75, 0.9])
PRESETS = {
    "vggface2": {},  # Tables 2 and 3
    "ms1m": dict(depth=100),  # Table 4, LResNet100E-IR
    "youtube": SMALL,
    "folder": SMALL,
    "faces": dict(SMALL, size=64, depth=10, width=16, epochs=6, batch_size=32, warmup=20,
                  loc_lr=0.03, eval_every=3),
    "faces-geometry": dict(SMALL, size=48, depth=10, width=8, epochs=24, batch_size=32, warmup=20,
                           loc_lr=0.03, eval_every=8, limit=640),
}
DRAWN = {"train": 1600, "test": 400}  # faces of --data faces, and at most of faces-geometry
# From no alignment to all that landmarks allow, in the order of Sec. 3.1.
METHODS = ("none", "affine2d", "proj", "tps2", "tps3", "tps8", "fullalign")
BY_LOCNET = METHODS[2:6]  # learn to align
BY_LANDMARKS = ("affine2d", "fullalign")  # need those of every image, also to recognise
DATA_FLAGS = ("landmarks", "test")  # with another --data, these are not the run's


def part_of_run(text: str) -> float:
    """A flag's type: a part of the run, as 17/24."""
    return float(Fraction(text))


def parse_args(argv=None):
    """The flags of all scripts and this paper's, with the defaults of --data's preset."""
    parser = run.make_parser("stn_align", "Balanced alignment for face recognition", PAPER, PRESETS,
                             argv, boxes=("image", "landmarks", "face"))
    add = parser.add_argument_group("Balanced alignment").add_argument
    add("--size", type=run.multiple(16), default=112, help="side of the crop in px")
    add("--method", default="tps8", choices=METHODS, help="alignment, from none to all that "
        "landmarks allow (Sec. 3.1); affine2d and fullalign need landmarks in use, too")
    add("--align-at", default="fmap", choices=["input", "fmap"], help="what is warped (Sec. 3.2)")
    add("--lam", type=run.nonnegative, default=3.0, help="lambda of Eq. (5), weight of the "
        "alignment loss; higher aligns more, 0 leaves it to recognition")
    add("--template", default="learned", choices=["learned", "fixed"], help="T of Eq. (3)")
    add("--template-file", type=run.file, default="", metavar="PTS", help="T to begin with, px of "
        "a 112 px crop, as a run leaves it in template.pts (Table 3's dagger); default: the mean "
        "of frontal training faces")
    add("--alpha", default="learned", choices=["learned", "fixed"], help="weights of Eq. (3); "
        "fixed ones are 1")
    add("--depth", type=int, default=34, choices=list(BLOCKS), help="recognition network's layers")
    add("--width", type=run.within(int, 1, 1024), default=64, help="channels of its first stage")
    add("--dropout", type=run.fraction, default=0.4, help="before its last linear layer")
    add("--landmarks", default="", metavar="PATH", help="landmarks of a set that has none of its "
        "own: a CSV of image,x0,y0,..., or a folder with the images' tree of .pts, as the landmark "
        "scripts write it")
    add("--loc-lr", type=run.above_zero, default=0.01, help="LocNet's learning rate over --lr; "
        "higher aligns sooner, and folds faces")
    add("--drop-at", type=run.listed(part_of_run), default=[], help="parts of the run, as "
        "12/24,17/24, after which the rate falls by 10")
    add("--warmup", type=run.natural, default=500, help="steps over which the rate rises to --lr")
    add("--test", nargs="+", default=[], metavar="PATH", help="sets to verify and identify on, "
        "beside the test split: a .bin, the folder of LFW, YTF, ..., a .csv of pairs or of roles; "
        "with landmarks, if any, in PATH.landmarks.csv")
    args = run.parse(parser, argv)
    if args.batch_size < 2 * args.gpus:
        parser.error(f"--batch-size {args.batch_size}: batch norms want two faces for each process")
    return args


# ---- Alignment: Sec. 3.1 and 4.1 -----------------------------------------------------------------

SIDE = 112  # px; points, template, losses and LocNet's outputs are in px of a crop of this side
CROP = (SIDE, SIDE)


def to_112(points, size: int):
    """Points (..., 2) px of a crop of `size` px, as px of a 112 px crop."""
    return (points + 0.5) * (SIDE / size) - 0.5


def from_112(points, size: int):
    """The inverse of `to_112`."""
    return (points + 0.5) * (size / SIDE) - 0.5


class Maps(nn.Module):
    """A family of maps W from the aligned face to the input image; this one aligns nothing.
    A batch of maps is a tensor `w` of length B. Points are (S, 2) or (B, S, 2) px of a 112 px crop.
    Those that LocNet learns have `outputs`, how many numbers `fit` takes, and `gain`, by which
    LocNet's are multiplied.
    """

    def fit(self, given):
        """The w of each face: of LocNet's outputs, of landmarks, or here of any tensor (B, ...)."""
        return given.new_zeros(len(given), 0)

    def to_input(self, w, points):
        """W(y): where points of the aligned face lie in the input, (B, S, 2)."""
        return points.expand(len(w), -1, -1)

    def to_aligned(self, w, points, start=None):
        """W^-1(x): where points of the input lie in the aligned face, (B, S, 2), near `start`."""
        return points.expand(len(w), -1, -1)

    def grid(self, w, size: int):
        """Where the pixels of an aligned crop lie in the input: (B, size, size, 2), normalised."""
        pixels = to_112(warp.pixel_centres((size, size), w.device), size)
        return warp.to_norm(self.to_input(w, pixels), CROP).unflatten(1, (size, size))


class Affine2D(Maps):
    """The affine map that fits five points of a face to T's, by least squares; W is its inverse."""

    def __init__(self, template: torch.Tensor):
        super().__init__()
        # The five means are a matrix product: a list of indices would be copied to the GPU anew in
        # every step, which waits.
        means = torch.zeros(5, len(template), dtype=torch.float64)
        for row, group in zip(means, datasets.SCHEMES[len(template)].five):
            row[list(group)] = 1 / len(group)
        self.register_buffer("means", means, persistent=False)
        self.register_buffer("five", means @ template.detach().double(), persistent=False)

    def fit(self, given):
        """Landmarks (B, S, 2) px -> (B, 2, 3)."""
        five = self.means @ given.double()
        return warp.invert(warp.fit_affine(five, self.five)).to(given.dtype)

    def to_input(self, w, points):
        return warp.apply_affine(w, points)

    def to_aligned(self, w, points, start=None):
        return warp.apply_affine(warp.invert(w), points)


class Projective(Maps):
    """STN-Proj: a homography, by eight numbers about the identity."""
    outputs = 8
    gain = 1 / 8  # each number moves the whole face

    def fit(self, given):
        """(B, 8) px, by which the crop's edge moves -> (B, 3, 3), in normalised coordinates."""
        h = F.pad(given / (SIDE / 2), (0, 1)).unflatten(1, (3, 3))
        # |h7| + |h8| < 1 keeps the divisor positive all over the crop.
        h = torch.cat([h[:, :2], 0.45 * (h[:, 2:] / 0.45).tanh()], 1)
        return h + torch.eye(3, device=h.device)

    def to_input(self, w, points):
        return warp.to_px(warp.apply_projective(w, warp.to_norm(points, CROP)), CROP)

    def to_aligned(self, w, points, start=None):
        inverse = torch.linalg.inv_ex(w.double())[0]
        return self.to_input(inverse, points).to(points.dtype)


class ThinPlate(Maps):
    """Thin-plate splines from target points (K, 2) px of the aligned face to source points
    (B, K, 2) px of the input, which they meet exactly; w is their coefficients (B, K + 3, 2)."""

    def __init__(self, targets: torch.Tensor):
        super().__init__()
        self.spline = warp.ThinPlateSpline(warp.to_norm(targets.detach().double(), CROP))

    def fit(self, given):
        return self.spline.fit(warp.to_norm(given, CROP))

    def to_input(self, w, points):
        return warp.to_px(self.spline.transform(w, warp.to_norm(points, CROP)), CROP)

    def to_aligned(self, w, points, start=None):
        if start is not None:
            start = warp.to_norm(start, CROP)
        return warp.to_px(self.spline.invert_points(w, warp.to_norm(points, CROP), start), CROP)

    def grid(self, w, size):
        return self.spline.grid(w, (size, size))


class TPSGrid(ThinPlate):
    """STN-TPS-Grid-k: a lattice of k x k points over the crop, moved by LocNet."""

    def __init__(self, k: int):
        axis = torch.linspace(-0.5, SIDE - 0.5, k, dtype=torch.float64)  # from edge to edge
        lattice = torch.cartesian_prod(axis, axis).flip(1)               # (k^2, 2), row after row
        super().__init__(lattice)
        self.outputs = 2 * k**2
        self.gain = k / 8  # each point moves a k^2th of the face
        self.register_buffer("lattice", lattice.float(), persistent=False)

    def fit(self, given):
        """Moves of the lattice, (B, 2 k^2) px -> (B, k^2 + 3, 2)."""
        return super().fit(self.lattice + given.unflatten(1, (-1, 2)))


class FullAlign(ThinPlate):
    """The target points are T, the source points the landmarks: every face becomes T."""


def make_maps(method: str, template: torch.Tensor | None) -> Maps:
    """The maps of --method.   Raises: UserError where it needs landmarks and there are none."""
    if method in BY_LANDMARKS and template is None:
        raise UserError(f"--method {method} needs landmarks: of training images, and of those to "
                        "recognise; see --landmarks")
    if method == "none":
        return Maps()
    if method == "proj":
        return Projective()
    if method == "fullalign":
        return FullAlign(template)
    if method == "affine2d":
        if len(template) not in datasets.SCHEMES:
            raise UserError("--method affine2d takes five points of a scheme "
                            f"{list(datasets.SCHEMES)}, not of {len(template)} landmarks")
        return Affine2D(template)
    return TPSGrid(int(method.removeprefix("tps")))


class LocNet(nn.Module):
    """Localisation network, a slim ResNet18: unaligned image (B, 3, H, W) -> (B, outputs) float32,
    px of a 112 px crop. Its last layer begins at zero: nothing moves, and the first step trains
    only that layer."""

    def __init__(self, outputs: int, size: int = SIDE):
        super().__init__()
        self.conv1 = conv(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.layers = nn.Sequential(  # channels: Sec. 4.1
            LocBlock(8, 16, 2), LocBlock(16, 16, 1), LocBlock(16, 32, 2), LocBlock(32, 32, 1),
            LocBlock(32, 64, 2), LocBlock(64, 64, 1), LocBlock(64, 64, 2), LocBlock(64, 64, 1))
        self.fc = nn.Linear(64 * (size // 16)**2, outputs)
        init_convs(self, "relu")
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, image):
        x = F.relu(self.bn1(self.conv1(image)))
        x = self.layers(x).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round 16 px to eighths
            return self.fc(x.float())


# ---- Network: Fig. 5 -----------------------------------------------------------------------------

class AlignedRecognizer(nn.Module):
    """Recognition network that aligns what it sees: an image in [-1, 1] -> its embedding.

    Args: method, of METHODS; align_at "fmap" (the map of stage 0) or "input"; depth, width,
        dropout: `IRNet`'s; template (S, 2), T in px of a 112 px crop, or None where no landmarks
        are known; size of the image in px; learn_template, learn_alpha: whether T and the weights
        are trained."""

    def __init__(self, method: str = "tps8", align_at: str = "fmap", depth: int = 34,
                 template: torch.Tensor | None = None, width: int = 64, size: int = SIDE,
                 dropout: float = 0.4, learn_template: bool = True, learn_alpha: bool = True):
        super().__init__()
        self.method = method
        self.align_at = align_at
        self.size = size
        self.backbone = IRNet(depth, width, size, dropout)
        self.maps = make_maps(method, template)
        self.locnet = LocNet(self.maps.outputs, size) if method in BY_LOCNET else None
        learn_template = learn_template and self.locnet is not None  # else no loss reaches T
        self.learn_alpha = learn_alpha and self.locnet is not None
        self.template = None
        self.alpha_logit = None
        if template is not None:
            self.template = nn.Parameter(template.detach().float().clone(), learn_template)
            self.alpha_logit = nn.Parameter(torch.zeros(len(template)), self.learn_alpha)

    @property
    def device(self) -> torch.device:
        return self.backbone.fc.weight.device

    def alpha(self) -> torch.Tensor:
        """The landmarks' weights, (S,): in (0, 1) by the sigmoid, or 1 if they are not learned."""
        if self.learn_alpha:
            return self.alpha_logit.sigmoid()
        return torch.ones_like(self.alpha_logit)

    def find_map(self, image, landmarks=None):
        """The map W of each face, the w of `maps`.   Raises: UserError for missing landmarks."""
        if self.locnet is not None:
            return self.maps.fit(self.maps.gain * self.locnet(image))
        if self.method == "none":
            return self.maps.fit(image)  # the same for all
        found = 0 if landmarks is None else landmarks.shape[1]
        if found != len(self.template):
            raise UserError(f"method {self.method} needs the {len(self.template)} landmarks of "
                            f"every image, found {found}")
        return self.maps.fit(landmarks.float())

    def align(self, x, w):
        """Images or feature maps (B, C, H, W), aligned; 0 is what lies beyond their edge."""
        if self.method == "none":
            return x
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is half a pixel off
            warped = warp.sample(x, self.maps.grid(w, self.size))
            return warped.to(x.dtype, memory_format=torch.channels_last)

    def forward(self, image, landmarks=None):
        """Fig. 5: image (B, 3, size, size), and landmarks (B, S, 2) if the method needs them ->
        embeddings (B, 512), not normalised, and the map W of each face."""
        w = self.find_map(image, landmarks)
        if self.align_at == "input":
            x = self.backbone.stem(self.align(image, w))
        else:
            x = self.align(self.backbone.stem(image), w)
        return self.backbone.body(x), w

    def to_aligned(self, w, landmarks):
        """y = W^-1(x) of landmarks x (B, S, 2): (B, S, 2), and which could be inverted, (B, S)
        bool: W(y) is within 0.05 px of x. Where W folds, x has several y: the search starts at its
        place in T."""
        start = None
        if self.template is not None and len(self.template) == landmarks.shape[1]:
            start = self.template.detach()
        aligned = self.maps.to_aligned(w, landmarks, start)
        return aligned, (self.maps.to_input(w, aligned) - landmarks).norm(dim=-1) < 0.05


# ---- Loss: Sec. 4.2 ------------------------------------------------------------------------------

class AMSoftmax(nn.Module):
    """Softmax over cosines with an additive margin m and a scale s (Sec. 4.2), the paper's [21]:
    embeddings (B, features) and labels (B,) -> L_fr."""

    def __init__(self, features: int, classes: int, m: float = 0.35, s: float = 64.0):
        super().__init__()
        if classes < 2:
            raise UserError(f"{classes} identities: recognition is learned from two or more")
        self.m = m
        self.s = s
        self.weight = nn.Parameter(torch.empty(classes, features).normal_(std=0.01))

    def forward(self, embeddings, labels):
        with torch.autocast(embeddings.device.type, enabled=False):
            weight = F.normalize(self.weight.float())
            cosines = F.linear(F.normalize(embeddings.float()), weight)  # (B, classes)
            margin = torch.zeros_like(cosines).scatter_(1, labels[:, None], self.m)
            return F.cross_entropy(self.s * (cosines - margin), labels)


def alignment_loss(warped_template, landmarks, alpha):
    """L_align in its two terms.   Args: warped_template, W(T; I_i), and landmarks, (B, S, 2) px of
    a 112 px crop; alpha (S,).   Returns: L_lmk, L_reg, scalars."""
    # Eq. (3): L_lmk = 1/(N|S|) sum_i sum_s alpha^s ||W(T^s; I_i) - x_i^s||_2
    l_lmk = (alpha * (warped_template - landmarks).norm(dim=-1)).mean()
    # Eq. (4): L_reg = sum_s (1 - alpha^s)^2
    l_reg = (1 - alpha).square().sum()
    return l_lmk, l_reg


class Learner(nn.Module):
    """Network, classes and loss in one forward, as DistributedDataParallel wants it."""

    def __init__(self, net: AlignedRecognizer, classes: int, lam: float):
        super().__init__()
        self.net = net
        self.head = AMSoftmax(512, classes)
        self.lam = lam if net.locnet is not None else 0.0

    def forward(self, image, labels, landmarks=None):
        """As `AlignedRecognizer`'s, and labels (B,) -> scalars L, L_fr, L_lmk, L_reg."""
        embeddings, w = self.net(image, landmarks)
        l_fr = self.head(embeddings, labels)
        if not self.lam:
            return l_fr, l_fr, l_fr.new_zeros(()), l_fr.new_zeros(())
        warped_template = self.net.maps.to_input(w, self.net.template)
        l_lmk, l_reg = alignment_loss(warped_template, landmarks, self.net.alpha())
        l_align = l_lmk + l_reg            # Eq. (2)
        loss = l_fr + self.lam * l_align   # Eq. (5)
        return loss, l_fr, l_lmk, l_reg


# ---- Data ----------------------------------------------------------------------------------------

HALF_RANGE = 127.5  # pixels are x / 127.5 - 1 (Sec. 5.1)


def augment(rng: np.random.Generator, size: int):
    """Draws a training crop: not moved, mirrored or not, without extras for the batch."""
    return np.eye(2, 3), rng.random() < 0.5, {}


class Split(NamedTuple):
    """Images by index, with .labels; as faces, but for records; landmarks (N, S, 2) px or None."""
    images: recognition.FolderImages | recognition.Records
    faces: list[datasets.Face] | None
    points: np.ndarray | None


def needs_landmarks(args, split: str) -> str:
    """What asks for landmarks, in words for an error; "" if nothing does."""
    if args.method in BY_LANDMARKS:
        return f"--method {args.method}"
    if split == "train" and args.method in BY_LOCNET and args.lam:
        return f"--lam {args.lam:g}"
    return "--box landmarks" if args.box == "landmarks" else ""


def read_records(args) -> Split:
    """The training images of --data ms1m, records without boxes, and their --landmarks."""
    needed = needs_landmarks(args, "train")
    if args.box != "image":
        raise UserError(f"--box {args.box}: records have no boxes; leave it out")
    if needed and not args.landmarks:
        raise UserError(f"{needed} needs landmarks, and records have none: --landmarks")
    images = recognition.Records(args.data_root)
    points = None
    if args.landmarks:
        points = recognition.read_landmarks(images.keys.astype(str), args.landmarks)
    return Split(images, None, points)


def read_set(args, split: str) -> Split | None:
    """A split of args.data, None for a test split that is not there. What can be wrong with it is
    found here.   Raises: UserError, also for landmarks that the flags need and images lack."""
    if args.data == "ms1m":
        return read_records(args) if split == "train" else None
    recognition.refuse_second_landmarks(args)
    folder = os.path.join(args.data_root, split)
    drawn = args.data.startswith("faces")
    if split == "test" and not drawn and args.data != "youtube" and not os.path.isdir(folder):
        return None
    if drawn:  # the same for every --seed
        count = min(args.limit or DRAWN["train"], DRAWN[split])
        faces = synthetic.read_faces(split, count, args.size, args.points,
                                     geometry=args.data == "faces-geometry")
    elif args.data == "youtube":
        faces = datasets.read("youtube", args.data_root, split)
    else:
        faces = recognition.read_identities(folder)
        if args.landmarks:
            faces = recognition.attach_points(faces, args.landmarks, args.data_root)
    faces = faces[:args.limit or None]
    if args.upright or int(os.environ.get("LOCAL_RANK", 0)) == 0:  # minutes, for millions of files
        datasets.check_images(faces, args.upright)
    needed = needs_landmarks(args, split)
    if needed:
        recognition.check_points(faces, needed)
    points = None
    if all(face.points is not None for face in faces):
        points = np.stack([face.points for face in faces])
    if args.method == "affine2d" and points.shape[1] in datasets.SCHEMES:
        five = datasets.group_means(points, datasets.SCHEMES[points.shape[1]].five)
        warp.check_points(five, "affine")
    return Split(recognition.FolderImages(faces), faces, points)


def make_dataset(args, split: Split, augmented: bool):
    """Images as crops of --size: about the box of --box, by --margin, or whole."""
    move = augment if augmented else None
    flip = ()  # without landmarks there are none to swap
    if split.points is not None:
        scheme = datasets.SCHEMES.get(split.points.shape[1])
        flip = scheme.flip if scheme else None  # and without a scheme nothing is mirrored
    if args.box == "image":
        return recognition.WholeImages(split.images, args.size, split.points, move, flip, args.seed)
    boxes = datasets.face_boxes(split.faces, args.box)
    crops = datasets.square_crops(boxes, args.size, args.margin)
    return datasets.CropDataset(split.faces, crops, args.size, move, flip=flip, seed=args.seed)


def prepare(batch: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A batch's images (B, 3, H, W) in [-1, 1], and landmarks (B, S, 2) px of 112 or None."""
    image = batch["image"].to(device, non_blocking=True)
    if image.dtype == torch.uint8:  # (B, H, W, 3); permuted, it is channels_last as it stands
        image = image.permute(0, 3, 1, 2).float()
    points = batch.get("points")
    if points is not None:
        points = to_112(points.to(device, non_blocking=True), image.shape[-1])
    return (image / HALF_RANGE - 1).contiguous(memory_format=torch.channels_last), points


def mean_frontal_template(landmarks: torch.Tensor) -> torch.Tensor:
    """T_fix (Sec. 5.3): the mean of the frontal ones of landmarks (N, S, 2): (S, 2), in their unit.
    Frontal is a face whose nose tip is 38 to 62 % of the way from one eye to the other, along x: a
    turned head's is not, nor one's that leans, which would blur the mean.
    Where fewer than ten are, it is the mean of all, with a warning.   Raises: UserError for an
    unknown scheme."""
    count = landmarks.shape[1]
    if count not in datasets.SCHEMES:
        raise UserError(f"{count} landmarks are no known scheme {list(datasets.SCHEMES)}: give T "
                        "by --template-file, or train without landmarks, --lam 0")
    five = datasets.group_means(landmarks, datasets.SCHEMES[count].five)
    left, right, nose = five[:, :3, 0].unbind(1)  # x of the eyes and of the nose tip
    frontal = ((nose - left) / (right - left) - 0.5).abs() < 0.12
    if frontal.sum() < 10:
        warnings.warn(f"{int(frontal.sum())} of {len(landmarks)} faces are frontal and upright: T "
                      "is the mean of all")
        return landmarks.mean(0)
    return landmarks[frontal].mean(0)


def landmarks_of(data, most: int = 2000) -> torch.Tensor:
    """Landmarks of a set without augmentation, px of a 112 px crop: (N, S, 2). Of whole images,
    whose sizes are not known before they are read, those of `most` at most, evenly spaced."""
    if isinstance(data, datasets.CropDataset):
        return to_112(data.crop_points(), data.size)
    data = recognition.WholeImages(data.images, data.size, data.points)
    points = [data.__getitems__([(0, i)])["points"] for i in photos.spread(len(data), most)]
    return to_112(torch.cat(points), data.size)


def first_template(args, data) -> torch.Tensor | None:
    """T at the start, px of a 112 px crop: --template-file's, or the training set's mean frontal
    face; None for a set without landmarks.   Raises: UserError for a template that cannot serve."""
    count = None if data.points is None else data.points.shape[1]
    if args.template_file:
        template = torch.from_numpy(datasets.read_pts(args.template_file)).float()
        if count is not None and len(template) != count:
            raise UserError(f"--template-file {args.template_file} has {len(template)} points, the "
                            f"landmarks of --data {args.data} are {count}")
    elif count is None:
        return None
    elif count not in datasets.SCHEMES and not needs_landmarks(args, "train"):
        return None  # no T can be made of these landmarks, and nobody asks for one
    else:
        template = mean_frontal_template(landmarks_of(data))
    try:
        warp.check_points(template, "spline")
    except ValueError as error:
        origin = args.template_file or "(mean of training faces)"
        raise UserError(f"template {origin}: {error}") from None
    return template


def far_from_template(template: torch.Tensor | None, data) -> bool:
    """Whether the best weights at the start, 1 - D_s / (2 |S|), are below a half in the mean."""
    if template is None or len(template) > 20:  # faces are not 20 px from T, of 112
        return False
    distance = (landmarks_of(data) - template).norm(dim=-1).mean()
    return bool(distance > len(template))


# ---- Training: Sec. 5.1 --------------------------------------------------------------------------

def learning_rate(step: int, steps: int, base: float, warmup: int, drop_at) -> float:
    """A tenth after each of the parts `drop_at` of the run; a rise over `warmup` steps at first."""
    rise = min(1, (step + 1) / max(warmup, 1))
    drops = sum(step >= round(part * steps) for part in drop_at)
    return base * rise * 0.1**drops


def build(args, template: torch.Tensor | None, device: torch.device) -> AlignedRecognizer:
    """The network that the flags describe, on `device`."""
    learns = args.lam > 0  # without the alignment loss nothing reaches T and the weights
    net = AlignedRecognizer(args.method, args.align_at, args.depth, template, args.width, args.size,
                            args.dropout, learns and args.template == "learned",
                            learns and args.alpha == "learned")
    net.to(device, memory_format=torch.channels_last)
    if isinstance(net.maps, ThinPlate):  # the constants are made now, outside a compiled graph
        spline = net.maps.spline
        spline.grid(spline.fit(spline.targets[None]), (args.size, args.size))
    return net


def make_optimizer(args, learner: Learner) -> torch.optim.SGD:
    """SGD. LocNet has a rate of its own, T and the landmarks' weights have no decay."""
    net = learner.net
    recognition_part = [*net.backbone.parameters(), *learner.head.parameters()]
    groups = [dict(params=recognition_part, weight_decay=args.weight_decay, scale=1.0)]
    if net.locnet is not None:
        groups.append(dict(params=net.locnet.parameters(), weight_decay=args.weight_decay,
                           scale=args.loc_lr))
    if net.template is not None:
        groups.append(dict(params=[net.template, net.alpha_logit], weight_decay=0.0, scale=1.0))
    return torch.optim.SGD(groups, args.lr, momentum=0.9, fused=True)


def train(args) -> dict:
    """Trains, evaluates or predicts, as the flags say; returns the last evaluation's numbers."""
    if args.eval:
        return evaluate_checkpoint(args)
    if args.predict:
        return predict(args)
    job = run.Job(args, DATA_FLAGS)
    if args.box == "image":
        args.cache = ""  # whole images are read anew
    # Data
    split = read_set(args, "train")
    train_set = make_dataset(args, split, augmented=True)
    labels = torch.as_tensor(split.images.labels)
    classes = len(split.images.ids)
    landmarks = "no" if split.points is None else split.points.shape[1]
    job.say(f"{len(labels):,} training images of {classes:,} identities, {landmarks} landmarks")
    tests = test_sets(args, job.device) if job.rank == 0 else []
    # Network and optimizer
    start = job.state["start"] if job.state else first_template(args, train_set)
    net = build(args, start, job.device)
    if args.alpha == "learned" and args.lam and far_from_template(start, train_set):
        job.say("note: so few landmarks, so far from T, make the weights of Eq. (3) fall to 0, and "
                "the alignment loss with them: consider --alpha fixed")
    learner = Learner(net, classes, args.lam)
    learner.head.to(job.device)
    optimizer = make_optimizer(args, learner)
    job.restore(learner, optimizer, [len(labels), classes])
    model = job.wrap(learner)
    job.begin(train_set)
    steps = args.epochs * job.steps
    first_drop = round(min(args.drop_at, default=1) * steps)
    if args.warmup > first_drop:
        job.say(f"note: the rate rises for {args.warmup} steps but drops after {first_drop}: it "
                f"never is --lr {args.lr:g}; a run this short wants a smaller --warmup")
    scores = {}
    for epoch in job.epochs():
        learner.train()
        for step, batch in job.steps_of(epoch):
            rate = learning_rate(step, steps, args.lr, args.warmup, args.drop_at)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            image, points = prepare(batch, job.device)
            target = labels[batch["index"]].to(job.device, non_blocking=True)
            with run.precision(args, job.device):
                loss, l_fr, l_lmk, l_reg = model(image, target, points)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            job.note(step, loss=loss, fr=l_fr, lmk=l_lmk, reg=l_reg)
        if job.rank == 0 and job.due(epoch):
            scores = evaluate(net, tests, args)
        job.save(epoch, scores if job.due(epoch) else {}, start=start)
    if job.rank > 0:
        return {}
    scores = scores or evaluate(net, tests, args)
    print_table(scores, args)
    write_pictures(job.folder, net, tests, start)
    return scores


# ---- Evaluation: Sec. 3.1 and 5 ------------------------------------------------------------------

def folded(grid: torch.Tensor) -> torch.Tensor:
    """Whether grids (B, H, W, 2) turn over anywhere, and mirror a part of the face: (B,)."""
    right = grid[:, :-1, 1:] - grid[:, :-1, :-1]
    down = grid[:, 1:, :-1] - grid[:, :-1, :-1]
    determinant = right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0]
    return (determinant <= 0).flatten(1).any(1)


def mirrored(points: torch.Tensor | None) -> torch.Tensor | None:
    """Landmarks (B, S, 2) px of 112 of the mirror images; None where no scheme is known."""
    if points is None or points.shape[1] not in datasets.SCHEMES:
        return None
    flip = torch.from_numpy(datasets.SCHEMES[points.shape[1]].flip)
    points = points[:, flip.to(points.device)]
    return torch.stack([SIDE - 1 - points[..., 0], points[..., 1]], -1)


@torch.inference_mode()
def look(net: AlignedRecognizer, loader, args) -> dict:
    """What the network makes of a set, in order, on the CPU, a dict:

    features (N, 512)    of the image and its mirror image, added
    pixels (N, 192)      the same without a network
    folded (N,)          whether the warp turns over
    and with landmarks, in px of a 112 px crop:
    crops (N, S, 2)      the landmarks x
    aligned (N, S, 2)    y = W^-1(x)
    converged (N, S)     whether y was found
    distance (N, S)      from W(T) to x
    """
    net.eval()
    plain = recognition.Pixels()
    found = {}
    for batch in loader:
        image, points = prepare(batch, net.device)
        mirror_points = mirrored(points)
        with run.precision(args, net.device):
            features, w = net(image, points)
            if net.method not in BY_LANDMARKS or mirror_points is not None:
                features = features + net(image.flip(3), mirror_points)[0]
        row = {"features": features, "pixels": plain(image) + plain(image.flip(3)),
               "folded": folded(net.maps.grid(w, net.size))}
        if points is not None:
            row["crops"] = points
            row["aligned"], row["converged"] = net.to_aligned(w, points)
            if net.template is not None and len(net.template) == points.shape[1]:
                row["distance"] = (net.maps.to_input(w, net.template) - points).norm(dim=-1)
        for key, value in row.items():
            found.setdefault(key, []).append(value.cpu())
    return {key: torch.cat(values) for key, values in found.items()}


def alignment_scores(seen: dict, net: AlignedRecognizer) -> dict:
    """Of what `look` has seen: ANME before and after alignment, Eq. (1), of the faces with two
    pupils all of whose landmarks could be mapped, and their share; the mean distance of W(T) from
    the landmarks, px; the share of folded faces; the extremes of the weights."""
    scores = {"folded": seen["folded"].double().mean().item()}
    scheme = datasets.SCHEMES.get(seen["crops"].shape[1]) if "crops" in seen else None
    if scheme:
        pupils = datasets.group_means(seen["crops"], scheme.pupils)
        apart = (pupils[:, 0] != pupils[:, 1]).any(1)  # not in a full profile, whose d is 0
        whole = seen["converged"].all(1) & apart
        scores["converged"] = whole.double().mean().item()
        for name, key in (("anme/crops", "crops"), ("anme", "aligned")):
            points = seen[key][whole].double()
            pupils = datasets.group_means(points, scheme.pupils)
            d = (pupils[:, 0] - pupils[:, 1]).norm(dim=1)
            scores[name] = metrics.anme(points, d) if len(points) > 1 else math.nan
    if "distance" in seen:
        scores["distance"] = seen["distance"].double().mean().item()
    if net.learn_alpha and net.alpha_logit is not None:
        alpha = net.alpha().detach().cpu()
        scores["alpha/min"] = alpha.min().item()
        scores["alpha/max"] = alpha.max().item()
    return scores


class TestSet(NamedTuple):
    """A set to evaluate on: its loader, in order; what is asked of it; the name of its scores."""
    loader: object
    protocols: list
    name: str = ""


def test_sets(args, device: torch.device) -> list[TestSet]:
    """The test split of --data, if there is one, with pairs and ranks of its own, and --test."""
    sets = []
    own = read_set(args, "test")
    if own is not None:
        data = make_dataset(args, own, augmented=False)
        loader = run.make_loader(args, data, datasets.in_order(len(data), 64), device)
        protocols = [recognition.own_pairs(own.faces), recognition.own_identification(own.faces)]
        sets.append(TestSet(loader, protocols))
    for path in args.test:
        sets += [public_set(args, path, test, device)
                 for test in recognition.read_tests(path, args.upright)]
    return sets


def public_set(args, path: str, test, device: torch.device) -> TestSet:
    """A set of --test: crops about the box of its landmarks, if the network was trained on such and
    it has some, else its images as they are."""
    if test.points is None and args.method in BY_LANDMARKS:
        raise UserError(f"--test {path}: method {args.method} needs the landmarks of its images: "
                        f"no {recognition.landmarks_beside(path)}")
    flags = argparse.Namespace(**vars(args) | dict(cache="", box="image"))
    split = Split(test.images, None, test.points)
    if args.box == "landmarks" and test.points is not None:
        flags.box = "landmarks"
        faces = [datasets.Face(*both) for both in zip(test.images.sources, test.points)]
        split = Split(test.images, faces, test.points)
    elif path.endswith(".bin"):
        print(f"--test {test.name}: its images are aligned already, whatever --method does")
    elif args.box != "image":
        print(f"--test {test.name}: whole images; the network was trained on crops about "
              f"{args.box}")
    data = make_dataset(flags, split, augmented=False)
    loader = run.make_loader(flags, data, datasets.in_order(len(data), 64), device)
    return TestSet(loader, [test], test.name)


def evaluate(net: AlignedRecognizer, sets: Sequence[TestSet], args) -> dict:
    """Scores: accuracy, rank1, anme, ... of the test split; accuracy@NAME, ... of --test."""
    scores = {}
    for test in sets:
        seen = look(net, test.loader, args)
        found = alignment_scores(seen, net)
        for protocol in test.protocols:
            found |= recognition.score(protocol, seen["features"])
            plain = recognition.score(protocol, seen["pixels"])
            found |= {f"{key}/pixels": plain[key] for key in ("accuracy", "rank1") if key in plain}
        for key, value in found.items():
            scores[f"{key}@{test.name}" if test.name else key] = value
    return scores


def print_table(scores: dict, args):
    """Recognition and strength of the alignment on the test split; recognition on --test."""
    title = f"lambda {args.lam:g}" if args.method in BY_LOCNET else args.method
    margin = "" if args.box == "image" else f" x {args.margin}"
    print(f"{args.data}: {args.method} at {args.align_at}, crop {args.box}{margin}")
    header = " " * 12
    line = f"{title:12}"
    for key, name, scale, digits in (
            ("accuracy", "verified (%)", 100, 2), ("rank1", "rank-1 (%)", 100, 2),
            ("accuracy/pixels", "pixels (%)", 100, 2),
            ("anme/crops", "ANME of crops", 1, 4), ("anme", "ANME aligned", 1, 4),
            ("distance", "W(T) - x (px)", 1, 2), ("folded", "folded (%)", 100, 2),
            ("converged", "inverted (%)", 100, 2)):
        if key in scores:
            header += f"{name:>15}"
            line += f"{scale * scores[key]:>15.{digits}f}"
    if "accuracy" in scores:
        print(f"{header}\n{line}")
    for key, value in scores.items():
        if "@" in key and key.startswith("anme"):
            print(f"{title}: {key} {value:.4f}")
        elif "@" in key and key.startswith(("accuracy", "rank", "tar", "folded")):
            print(f"{title}: {key} {100 * value:.2f} %")


def open_checkpoint(args, path: str) -> tuple[AlignedRecognizer, str]:
    """A checkpoint's network, in evaluation mode, and its --box; `args` takes its flags over."""
    state, device = run.open_checkpoint(args, path, DATA_FLAGS)
    if args.box == "image":
        args.cache = ""
    weights = {name.removeprefix("net."): value for name, value in state["model"].items()
               if name.startswith("net.")}  # the rest are the classes
    net = build(args, weights.get("template"), device)
    run.load_weights(net, weights, path)
    return net.eval(), state["args"]["box"]


def evaluate_checkpoint(args) -> dict:
    """--eval: a checkpoint's numbers on the test split and --test; with --output, pictures too."""
    net, _ = open_checkpoint(args, args.eval)
    folder = run.find_run(args)
    sets = test_sets(args, net.device)
    if not sets:
        raise UserError(f"--data {args.data} has no test split in {args.data_root}; give --test")
    scores = evaluate(net, sets, args)
    print_table(scores, args)
    if folder:
        write_pictures(run.make_run(args, folder), net, sets, None)
    return scores


# ---- Photographs: --predict ----------------------------------------------------------------------

def to_picture(image: torch.Tensor) -> np.ndarray:
    """Network input (3, H, W) in [-1, 1] as RGB uint8 (H, W, 3)."""
    pixels = ((image + 1) * HALF_RANGE).round().clamp(0, 255).byte()
    return pixels.permute(1, 2, 0).cpu().numpy()


@torch.inference_mode()
def recognise(net: AlignedRecognizer, image: np.ndarray, box: np.ndarray, margins, points, args):
    """The face in `box` (4,) of an image: its aligned crop (size, size, 3) uint8, W(T) (S, 2) px of
    the image or None where T is not used, and its unit embedding (512,). Each further margin is
    about the W(T) found before; points (S, 2) px of the image, or None."""
    uses_template = net.method in BY_LANDMARKS or net.method in BY_LOCNET and args.lam > 0
    places = None
    for margin in margins:
        matrix = torch.from_numpy(datasets.square_crops(box[None], args.size, margin))
        data = datasets.CropDataset([datasets.Face(image, points)], matrix, args.size)
        batch = data.__getitems__([(0, 0)])
        crop, landmarks = prepare(batch, net.device)
        w = net.find_map(crop, landmarks)
        if uses_template:
            places = from_112(net.maps.to_input(w, net.template)[0].cpu().double(), args.size)
            places = warp.apply_affine(warp.invert(matrix), places)[0].numpy()
            box = datasets.landmark_boxes(places)
    aligned = to_picture(net.align(crop, w)[0])
    feature = look(net, [batch], args)["features"].float()
    return aligned, places, F.normalize(feature)[0].numpy()


def predict(args) -> dict:
    """--predict: for each face writes its aligned crop as NAME.png, W(T), the landmarks by the
    network's alignment, as NAME.pts in px of the image, and its unit embedding as NAME.npy.

    A network that was trained with the alignment loss on crops about landmarks looks at a face
    twice: in the box that is given (by --detector, by --box, or the whole image), then in the box
    of W(T). A method that needs landmarks reads NAME.pts beside the image, which has one face then.
    """
    net, trained_on = open_checkpoint(args, args.weights)
    detector = photos.open_detector(args.detector) if args.detector else None
    about_points = trained_on == "landmarks"
    margins = [args.margin]
    if net.method not in BY_LANDMARKS or not about_points:
        twice = about_points and net.locnet is not None and args.lam
        margins = photos.find_margins(args, 2 if twice else 1)
    for photo in photos.photos(args, (".png", ".pts", ".npy")):
        boxes = photos.find_boxes(args, photo.image, detector)
        points = None
        if net.method in BY_LANDMARKS:
            beside = os.path.splitext(photo.path)[0] + ".pts"
            points = datasets.read_pts(beside)
            if len(points) != len(net.template):
                raise UserError(f"{beside} has {len(points)} points, the network's template "
                                f"{len(net.template)}")
            if about_points:
                boxes = datasets.landmark_boxes(points)[None]
        for box in boxes:
            aligned, places, feature = recognise(net, photo.image, box, margins, points, args)
            target = photo.target()
            datasets.write_image(target + ".png", aligned)
            np.save(target + ".npy", feature)
            if places is not None:
                datasets.write_pts(target + ".pts", places)
    return {}


# ---- Figures -------------------------------------------------------------------------------------

def draw_lines(image: np.ndarray, lines: np.ndarray, colour) -> np.ndarray:
    """Draws polylines (L, n, 2) px on RGB uint8 (H, W, 3), in place, at sub-pixel places."""
    corners = np.round(16 * lines).astype(np.int32)  # cv2 takes 4 bits after the point
    cv2.polylines(image, list(corners), False, colour, 1, cv2.LINE_AA, 4)
    return image


@torch.inference_mode()
def draw_alignment(net: AlignedRecognizer, data, side: int = 224) -> np.ndarray:
    """Figs. 2, 5 and 6, for 8 test faces. Above: the crop, the lattice of the aligned face as it
    lies in it, landmarks (green) and W(T) (red). Below: the aligned crop, its landmarks (green) and
    T (red)."""
    net.eval()
    across = torch.linspace(-0.5, SIDE - 0.5, 8)
    along = torch.linspace(-0.5, SIDE - 0.5, 57)
    columns = torch.cartesian_prod(across, along)
    lattice = torch.cat([columns, columns.flip(1)]).to(net.device)  # 16 lines of 57 points

    def place(points):
        return from_112(points[0].float().cpu().numpy(), side)

    faces = []
    for i in photos.spread(len(data), 8):
        image, points = prepare(data.__getitems__([(0, i)]), net.device)
        w = net.find_map(image, points)
        crop = cv2.resize(to_picture(image[0]), (side, side))
        aligned = cv2.resize(to_picture(net.align(image, w)[0]), (side, side))
        lines = place(net.maps.to_input(w, lattice))
        draw_lines(crop, lines.reshape(16, 57, 2), (250, 230, 120))
        if points is not None:
            photos.draw_points(crop, place(points), photos.GREEN, side / 160)
            points = net.to_aligned(w, points)[0]
            photos.draw_points(aligned, place(points), photos.GREEN, side / 160)
        if net.template is not None:
            template = net.maps.to_input(w, net.template)
            photos.draw_points(crop, place(template), photos.RED, side / 200)
            photos.draw_points(aligned, place(net.template[None]), photos.RED, side / 200)
        faces.append(np.concatenate([crop, aligned]))
    return photos.tile(faces, 4)


def draw_template(net: AlignedRecognizer, start: torch.Tensor, side: int = 480) -> np.ndarray:
    """Figs. 8(b) and 9: T as it began, T as it was learned, and the weights, dark where low."""
    first = from_112(start.cpu().numpy(), side)
    last = from_112(net.template.detach().cpu().numpy(), side)
    alpha = net.alpha().detach().cpu()
    low = alpha.min().item()
    high = alpha.max().item()
    panels = [np.full((side + 40, side, 3), 255, np.uint8) for _ in range(3)]
    photos.draw_points(panels[0], first, (90, 90, 90), 4)
    photos.draw_points(panels[1], last, (40, 90, 200), 4)
    shades = ((alpha - low) / max(high - low, 1e-9) * 200).int().tolist()
    for point, shade in zip(last, shades):
        photos.draw_points(panels[2], point[None], (shade, shade, 255 - shade // 2), 6)
    texts = ("T at the start", "T learned", f"weights {low:.3f} (dark) to {high:.3f}")
    for panel, text in zip(panels, texts):
        cv2.putText(panel, text, (12, side + 26), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (40, 40, 40), 1,
                    cv2.LINE_AA)
    return np.concatenate(panels, 1)


def write_pictures(folder: Path, net: AlignedRecognizer, sets: Sequence[TestSet],
                   start: torch.Tensor | None):
    """What the paper's figures show, of this run: alignment.png, template.png; T, template.pts."""
    if sets:
        picture = draw_alignment(net, sets[0].loader.dataset)
        datasets.write_image(folder / "alignment.png", picture)
    if start is not None:
        if net.template.requires_grad or net.learn_alpha:
            datasets.write_image(folder / "template.png", draw_template(net, start))
        datasets.write_pts(folder / "template.pts", net.template)


# ---- Backbones: as published, nothing of this paper ----------------------------------------------

# Table 1's recognition network, of ArcFace's units, and the blocks of LocNet.

# Blocks in stages 1 to 4. 100: LResNet100E-IR (Table 4). 10, 18: for a CPU.
BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3),
          100: (3, 13, 30, 3)}


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """(B, cin, H, W) -> (B, cout, H/stride, W/stride). No bias: a batch norm follows."""
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)


def init_convs(net: nn.Module, nonlinearity: str):
    """Source: He et al., "Delving Deep into Rectifiers", ICCV 2015."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity=nonlinearity)


class Shortcut(nn.Sequential):
    """A block's input, (B, cin, H, W), in the shape of its output, (B, cout, H/stride, W/stride).
    """

    def __init__(self, cin: int, cout: int, stride: int):
        if stride > 1 or cin != cout:
            super().__init__(conv(cin, cout, 1), nn.BatchNorm2d(cout))
        else:
            super().__init__()
        self.stride = stride

    def forward(self, x):
        # Not by a strided convolution: one of 1 x 1, on a channels_last map of few channels,
        # crashes in oneDNN 3.12.
        return super().forward(x[:, :, ::self.stride, ::self.stride])


class LocBlock(nn.Module):
    """ResNet's basic block.   Source: He et al., CVPR 2016, Fig. 5 left."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1 = conv(cin, cout, 3, stride)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = conv(cout, cout, 3)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = Shortcut(cin, cout, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class IRBlock(nn.Module):
    """ArcFace's "improved residual" unit, whose stride is on the second convolution.
    Source: Deng et al., "ArcFace", CVPR 2019, and insightface's iresnet."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = conv(cin, cout, 3)
        self.bn2 = nn.BatchNorm2d(cout)
        self.prelu = nn.PReLU(cout)
        self.conv2 = conv(cout, cout, 3, stride)
        self.bn3 = nn.BatchNorm2d(cout)
        self.downsample = Shortcut(cin, cout, stride)

    def forward(self, x):
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        y = self.bn3(self.conv2(y))
        return y + self.downsample(x)


class IRNet(nn.Module):
    """Table 1: image (B, 3, 112, 112) -> embedding (B, 512), in two parts, cut after stage 0 (Sec.
    3.2). Parameters have the names of insightface's iresnets. `width` is the channels of stages 0
    and 1."""

    def __init__(self, depth: int = 34, width: int = 64, size: int = SIDE, dropout: float = 0.4):
        super().__init__()
        blocks = BLOCKS[depth]
        self.conv1 = conv(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.layer1 = self.stage(width, width, blocks[0])
        self.layer2 = self.stage(width, 2 * width, blocks[1])
        self.layer3 = self.stage(2 * width, 4 * width, blocks[2])
        self.layer4 = self.stage(4 * width, 8 * width, blocks[3])
        self.bn2 = nn.BatchNorm2d(8 * width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8 * width * (size // 16)**2, 512)
        self.features = nn.BatchNorm1d(512)
        self.features.weight.requires_grad = False  # embeddings are normalised
        init_convs(self, "leaky_relu")

    @staticmethod
    def stage(cin, cout, depth):
        rest = (IRBlock(cout, cout, 1) for _ in range(depth - 1))
        return nn.Sequential(IRBlock(cin, cout, 2), *rest)

    def stem(self, image):
        """Stage 0, at the image's resolution: (B, 3, H, W) -> (B, width, H, W)."""
        return self.prelu(self.bn1(self.conv1(image)))

    def body(self, x):
        """Stages 1 to 4 and the output layer: (B, width, H, W) -> (B, 512) float32."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(self.bn2(x)).flatten(1)
        return self.features(self.fc(x).float())


if __name__ == "__main__":
    run.main(train, parse_args())
