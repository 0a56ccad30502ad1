"""Sub-pixel face landmarks using heatmaps and a bag of tricks.

Samuel W. F. Earp, Aubin Samacoits, Sanjana Jain, Pavit Noinongyao, Siwa Boonpunmongkol (Sertis
Vision Lab); 2021. https://arxiv.org/abs/2103.03059

The method. Five rough landmarks of a detector (eyes, nose tip, mouth corners) align the face: a
similarity maps them to fixed places in a 192 px crop, so that all faces have the same position,
size and angle. A MobileNetV2 ends in a 6 x 6 map. A string of letters, the upsampling strategy,
enlarges it, each letter a block that doubles its side: S, pixel shuffle, is cheap and stands where
the map is small; D, deconvolution, is better and stands at the end. The result is one heatmap for
each landmark, trained to be a Gaussian about it. Its centre is found between the pixels: the
logarithm of a Gaussian is a parabola, whose top one Newton step finds. The inverse of the alignment
brings the landmarks back to the image. Tricks: mirrored copies of the training set, the mean of the
predictions for the image and its mirror image, random erasing late in the training, and rotation.

Train on LaPa, the open set in the paper's 106 points, or on WFLW on four GPUs: --batch-size is over
all of them, and the 4 images that 16 leave for each are few for a batch norm (not run, see README):
  python heatmap_landmarks.py --data lapa --data-root LaPa --amp --cache device
  python heatmap_landmarks.py --data wflw --data-root WFLW --gpus 4 --batch-size 64 --amp
Without --five FILE, the five points of a detector, crops (of test images too) are made by the true
points with 3 % noise, as of a very good detector: such numbers cannot be compared with Table 5.
Without any data, on drawn faces, two to three minutes on two CPU cores:
  python heatmap_landmarks.py
Continue, evaluate, use, and cut 112 px crops for face recognition (Sec. 5.4):
  python heatmap_landmarks.py --data lapa --resume
  python heatmap_landmarks.py --data lapa --data-root LaPa --eval LAST
  python heatmap_landmarks.py --predict photo.jpg --detector yunet.onnx --weights LAST
  python heatmap_landmarks.py --data lapa --data-root LaPa --eval LAST --align-out CROPS
with LAST = runs/heatmap_landmarks-lapa/last.pt

Where each equation is:
  Eq. (1)  argmax of a heatmap       decode_argmax
  Eq. (2)  shift along the gradient  decode_shift
  Eq. (3)  Gaussian, its centre      gaussian_heatmaps, decode_dark
  Eq. (4)  NME                       common.metrics.nme

The authors have published no code. They used GluonCV; where the paper is silent we follow its pose
networks and training script ("GluonCV" below). Every size in the paper's tables but DDSS's is then
met within 0.01 MB, every GFLOPS but ResNet18's within 1 %. What we settle, or do in another way:
  - Architecture, as in GluonCV: a 1x1 convolution without batch norm brings the backbone's map to
    256 channels; a D is 4x4, an S has a 3x3 before its shuffle and hands on a quarter of its
    filters; widths of MobileNetV2 are cut to whole numbers, not to multiples of 8. Three letters
    give 48 x 48 heatmaps, four give 96 x 96. The heatmaps come from a 1x1 convolution behind the
    last block: for pixel shuffles the paper's words put it before that, which its sizes exclude.
  - Misprints: in Eq. (3) the exponent 1/2 belongs to |Sigma| only; Eq. (4) calls N the number of
    images, but the mean is over the landmarks of one. DDSS has 13.00 MB, not 12.00; "SDDSD" in
    Table 4 is SDSD. ResNet18's 1.13 GFLOPS in Table 6 cannot be: the backbone alone has 1.33 G
    multiply-adds at 192 px, with SDD 1.54.
  - The paper does not name its loss. Ours is the squared error of a map, summed over its pixels and
    divided by pi sigma^2, so that 1 means "nothing learned". Gaussians have height 1 and sigma 2 px
    of the heatmap, as in GluonCV; their centres are not rounded, as in DARK: GluonCV's rounding
    costs up to half a heatmap px. A landmark whose 3-sigma box misses the map has no weight.
  - Eq. (2) and (3) are computed as their sources' code does. For Eq. (2) (Xiao et al. 2018) that is
    a quarter of a px towards the larger neighbour in x and in y; the paper prints c times the mixed
    derivative. For Eq. (3) (Zhang et al., DARK) our step ends at 1 px; theirs may leave the map.
  - The paper's "affine transformation" is here a similarity, as is usual for recognition; with six
    free numbers a profile face is sheared. Its reference landmarks are not given: we take LaPa's
    mean face, 0.64 of the crop wide. Outside the image a crop is grey.
  - --five FILE may come from any detector; of several faces in an image those nearest to the
    annotated face count (the paper takes the centre-most). The noise without it is Gaussian, 3 % of
    the face's scale, one draw for each face. --align two-pass and box are not in the paper.
  - Random erasing hides 2 to 15 % of the area in half of the images, with the mean colour, in the
    second half of the run: the paper's source for it, AID, erases in a second stage too. Rotation
    is up to 15 degrees; the paper tried 1 to 15 and does not say which it kept.
  - The colour tricks are one affine map of RGB for each image; nothing is clipped between them.
  - The flip test doubles the cost: MNetV2-1.0 with SDD then has 0.87 G multiply-adds.
  - With --gpus N each process normalises its own share of the batch; the paper trained on one GPU.
    The last epoch is reported. In a run of E epochs the rate falls after E/2 and 3E/4.
"""
import argparse
import functools
import hashlib
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import UserError, datasets, metrics, photos, run, synthetic, warp

# ---- Settings ------------------------------------------------------------------------------------

# Sec. 3.3, Table 4 and Sec. 5.1: the final MNetV2-1.0 with all tricks that helped.
PAPER = dict(size=192, epochs=40, batch_size=16, lr=1e-3, backbone="mobilenetv2_1.0",
             strategy="SDD", filters=128, sigma=2.0, flip_copies=True, flip_test="coordinates",
             erase=0.5, erase_from=0.5, rotate=15.0, norm="box", threshold=0.08, margin=1.6,
             points=106)
# sigma: about 1/24 of the heatmap's side, as 2 of 48 px
SMALL = dict(size=128, epochs=20, batch_size=32, lr=2e-3, sigma=1.5, cache="device")
PRESETS = {
    "jd106": {},  # Table 5
    "lapa": {},
    "wflw": dict(norm="io", threshold=0.10),  # the set's own measure
    "300w": dict(norm="io"),
    "cofw": dict(norm="io", threshold=0.10),
    "youtube": SMALL,
    "folder": SMALL,
    "faces": dict(SMALL, size=96, batch_size=16, epochs=8, eval_every=4, rotate=0.0, sigma=1.0,
                  backbone="mobilenetv2_0.5", filters=64, strategy="SSD"),
}
# How far a first pass turns, scales and shifts the crop of a second, by flags. Noise of each point
# alone, as of --five-noise, shrinks training faces: a second look would then magnify each face.
SECOND_LOOK = dict(rotate=10.0, scale=0.1, shift=6.0)
NOISE_SEED = 5  # of the five points; not --seed, as a detector's error is the same in every run
DRAWN = {"train": 1600, "test": 400}  # faces of --data faces


def parse_args(argv=None):
    """The flags of all scripts and this paper's, with the defaults of --data's preset."""
    parser = run.make_parser("heatmap_landmarks", "Sub-pixel landmarks from heatmaps", PAPER,
                             PRESETS, argv)
    run.add_landmark_flags(parser)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("the network and its heatmaps").add_argument
    add("--backbone", default="mobilenetv2_1.0", help="mobilenetv2_WIDTH, resnet18 or resnet50")
    add("--strategy", default="SDD", help="a block a letter, from the small map on: S pixel "
        "shuffle, cheap, D deconvolution, better at the end; each doubles the map (Table 3)")
    add("--filters", type=run.multiple(4), default=128, help="filters of each D and S (256 in "
        "Tables 1 to 3)")
    add("--sigma", type=run.above_zero, default=2.0, help="of the target Gaussians, heatmap px")
    add("--decode", default="dark", choices=DECODERS, help="argmax: Eq. (1), shift: Eq. (2), "
        "dark: Eq. (3)")
    add("--kernel", type=int, choices=range(1, 34, 2), default=0, help="side of the blur of "
        "--decode dark in heatmap px (default: about 5 sigma)")
    add = parser.add_argument_group("alignment: Sec. 3.1").add_argument
    add("--align", default="five", choices=["five", "two-pass", "box"], help="crop by five points "
        "(the paper); by a box, then by the five points predicted there; by the box alone")
    add("--five", type=run.file, default="", metavar="CSV", help="a detector's five points, or all "
        "of a scheme: rows image,x0,y0,... in px from 0, images below --data-root; without it the "
        "true five, with noise")
    add("--five-noise", type=run.within(float, 0, 10), default=0.03, help="standard deviation of "
        "the noise, over the distance of the eyes, or from eyes to mouth if that is longer")
    add("--align-out", type=empty_folder, default="", metavar="DIR", help="with --predict or "
        "--eval: 112 px recognition crops by the predicted five points, with .pts (Sec. 5.4)")
    add = parser.add_argument_group("the bag of tricks: Sec. 3.3 and 5.1").add_argument
    add("--lighting", type=run.nonnegative, default=0.05, help="PCA colour shift: standard "
        "deviation of its weights")
    add("--jitter", type=run.fraction, default=0.4, help="brightness, contrast and saturation "
        "times 1 - j to 1 + j")
    add("--flip-copies", action=switch, default=False, help="train on mirrored copies too")
    add("--flip-test", default="none", choices=["none", "coordinates", "heatmaps"], help="average "
        "the coordinates, or the heatmaps, of the image and its mirror image")
    add("--erase", type=run.fraction, default=0.0, help="chance of random erasing")
    add("--erase-from", type=run.fraction, default=0.0, help="part of the run before it begins")
    add("--rotate", type=run.within(float, 0, 180), default=0.0, help="random rotation, degrees")
    add("--scale", type=run.within(float, 0, 0.9), default=0.0, help="random scaling by 1 - s to "
        "1 + s (Sec. 5.1: hurts)")
    add("--shift", type=run.within(float, 0, 192), default=0.0, help="random shift, up to so many "
        "px of a 192 px crop (Sec. 5.1: hurts)")
    args = run.parse(parser, argv)
    args.kernel = args.kernel or min(2 * int(2.5 * args.sigma) + 1, 33)  # odd
    args.trained_box = args.box  # a checkpoint keeps it; --predict --box 0,0,9,9 is another
    try:
        backbone_of(args.backbone)
        check_strategy(args.strategy)
    except UserError as error:
        parser.error(str(error))
    if args.align_out and not (args.predict or args.eval):
        parser.error(f"--align-out {args.align_out}: give --predict or --eval")
    if args.five and args.align != "five":
        parser.error(f"--five {args.five}: --align {args.align} looks at no points of a detector")
    if args.align_out and Path(args.align_out).resolve() == Path(args.output).resolve():
        parser.error(f"--align-out {args.align_out} is --output too: both write NAME.pts there")
    return args


def empty_folder(path: str) -> str:
    """A flag's type: a folder that is empty or does not exist yet, or none."""
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise argparse.ArgumentTypeError(f"{path} is not an empty folder: name another")
    return path


# ---- Network: Sec. 4 -----------------------------------------------------------------------------

class Deconvolution(nn.Sequential):
    """D: (B, cin, h, w) -> (B, filters, 2h, 2w).   Source: Sec. 4.1; Xiao et al., "Simple Baselines
    for Human Pose Estimation and Tracking", ECCV 2018."""

    def __init__(self, cin: int, filters: int):
        super().__init__(nn.ConvTranspose2d(cin, filters, 4, 2, 1, bias=False),
                         nn.BatchNorm2d(filters), nn.ReLU(inplace=True))
        nn.init.kaiming_normal_(self[0].weight, mode="fan_out", nonlinearity="relu")


class PixelShuffle(nn.Sequential):
    """S: (B, cin, h, w) -> (B, filters / 4, 2h, 2w); 2 x 2 px come from 4 channels of one place.
    Source: Sec. 2.3; Shi et al., "Real-Time Single Image and Video Super-Resolution", CVPR 2016."""

    def __init__(self, cin: int, filters: int):
        super().__init__(conv(cin, filters, 3), nn.BatchNorm2d(filters), nn.ReLU(inplace=True),
                         nn.PixelShuffle(2))
        init_weights(self)


def check_strategy(strategy: str):
    """Raises UserError for an upsampling strategy that cannot be built on a map of stride 32."""
    if not re.fullmatch("[SD]{1,5}", strategy):
        raise UserError(f"--strategy {strategy}: expected one to five letters, S (pixel shuffle) "
                        "or D (deconvolution); a sixth would make heatmaps larger than the input")


class HeatmapNet(nn.Module):
    """Sec. 4.1: image (B, 3, H, W), normalised -> heatmaps (B, P, H / stride, W / stride).
    H and W are multiples of 32.

    Args: backbone, "mobilenetv2_1.0" (any width), "resnet18" or "resnet50"; strategy, letters S and
        D, the first one for the smallest map; points, P; filters of each block, a multiple of 4.
    Attributes: stride, 32 / 2^letters: input px of a heatmap px; points.
    Raises: UserError for a backbone or strategy that cannot be built.
    """

    def __init__(self, backbone: str = "mobilenetv2_1.0", strategy: str = "SDD", points: int = 106,
                 filters: int = 128):
        super().__init__()
        check_strategy(strategy)
        self.stride = 32 // 2 ** len(strategy)
        self.points = points
        self.backbone = backbone_of(backbone)()
        self.project = conv(self.backbone.channels, 256, 1)
        cin = 256
        blocks = []
        for letter in strategy:
            if letter == "D":
                blocks.append(Deconvolution(cin, filters))
                cin = filters
            else:
                blocks.append(PixelShuffle(cin, filters))
                cin = filters // 4
        self.upsample = nn.Sequential(*blocks)
        self.head = nn.Conv2d(cin, points, 1, bias=False)
        nn.init.kaiming_normal_(self.project.weight, mode="fan_in", nonlinearity="linear")
        nn.init.normal_(self.head.weight, std=1e-3)  # GluonCV: training starts from empty maps

    def forward(self, image):
        features = self.upsample(self.project(self.backbone(image)))
        # float32: near the peak bfloat16 has steps of 0.004, so that px tie and Eq. (3) fits steps
        with torch.autocast(image.device.type, enabled=False):
            heatmaps = self.head(features.float())
        return heatmaps.contiguous()  # map after map, as loss and decoders go through them


# ---- Heatmaps and back: Sec. 2.2 -----------------------------------------------------------------

def to_heatmap(points, stride: float):
    """Crop px -> heatmap px: a heatmap px covers `stride` px; both count pixel centres from 0."""
    return (points + 0.5) / stride - 0.5


def to_crop(points, stride: float):
    """Heatmap px -> crop px, the inverse of `to_heatmap`. p * stride would not follow a mirror."""
    return (points + 0.5) * stride - 0.5


def gaussian_heatmaps(points: torch.Tensor, size: int | tuple[int, int], stride: float,
                      sigma: float) -> torch.Tensor:
    """Target heatmaps: a Gaussian of height 1 about each landmark, whose centre is not rounded.

    Args: points (B, P, 2) px of the crop; size of the heatmaps, a side or (height, width) px;
        stride, crop px in a heatmap px; sigma in heatmap px.
    Returns: (B, P, height, width), the type of `points`, float32 at least.
    """
    height, width = (size, size) if isinstance(size, int) else size
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    mu = to_heatmap(points, stride)
    x = torch.arange(width, device=points.device)
    y = torch.arange(height, device=points.device)
    # Eq. (3)'s numerator with Sigma = sigma^2 I: the product of a Gaussian in x and one in y
    row = (-((x - mu[..., :1]) ** 2) / (2 * sigma**2)).exp()  # (B, P, width)
    column = (-((y - mu[..., 1:]) ** 2) / (2 * sigma**2)).exp()  # (B, P, height)
    return column[..., :, None] * row[..., None, :]


def landmark_weights(points: torch.Tensor, size: int | tuple[int, int], stride: float,
                     sigma: float) -> torch.Tensor:
    """(B, P) float32: 1 for each landmark whose 3-sigma box touches its heatmap, else 0.
    Args as of `gaussian_heatmaps`.   Source: DARK's code, without its rounding."""
    height, width = (size, size) if isinstance(size, int) else size
    x, y = to_heatmap(points, stride).unbind(-1)
    reach = 3 * sigma
    touches_x = (x >= -reach) & (x <= width - 1 + reach)
    touches_y = (y >= -reach) & (y <= height - 1 + reach)
    return (touches_x & touches_y).float()


def pixels(heatmaps: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Values of maps (B, P, h, w) at x, y (B, P, ...) px, which broadcast: (B, P, ...)."""
    B, P, h, w = heatmaps.shape
    ones = (1,) * (y.dim() - 2)
    first = torch.arange(B * P, device=y.device).view(B, P, *ones) * (h * w)
    index = (first + y * w) + x  # one flat index: several times as fast as four
    return heatmaps.reshape(-1).index_select(0, index.reshape(-1)).view(index.shape)


def find_peaks(heatmaps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest px of each map (B, P, h, w), the first in reading order, and its value.

    Returns: (B, P, 2) long, (B, P). A map without a positive value has its peak at 0, 0; the value
        of one with nan or inf is not finite.
    Raises: ValueError for another shape or type.
    """
    if heatmaps.dim() != 4 or not heatmaps.is_floating_point() or not heatmaps.numel():
        raise ValueError(f"heatmaps {heatmaps.dtype} {tuple(heatmaps.shape)}: expected float "
                         "(B, P, h, w)")
    # Rows first: on a CPU amax is several times as fast as an argmax over the whole map.
    height, y = heatmaps.amax(3).max(2)  # (B, P) each
    columns = torch.arange(heatmaps.shape[3], device=y.device)
    x = pixels(heatmaps, columns, y[..., None]).argmax(2)
    peak = torch.stack([x, y], 2)  # Eq. (1): (x, y) = argmax H
    return peak * (height > 0)[..., None], height


def with_confidence(points: torch.Tensor,
                    height: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a decoder returns: float points and confidences, nan and 0 where a map is not finite."""
    dtype = torch.promote_types(height.dtype, torch.float32)
    good = height.isfinite() & points.isfinite().all(-1)
    return points.to(dtype).where(good[..., None], torch.nan), height.to(dtype).where(good, 0)


def decode_argmax(heatmaps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (1): the highest px of each map, exact to half a px.
    (B, P, h, w) -> points (B, P, 2) in heatmap px, and the peaks' heights (B, P), a confidence.
    The first of equal px counts; a map without a positive value gives 0, 0; one that holds nan or
    inf gives nan, with confidence 0."""
    peak, height = find_peaks(heatmaps)
    return with_confidence(peak, height)


def decode_shift(heatmaps: torch.Tensor, c: float = 0.25) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (2): from the highest px `c` px towards the larger neighbour in x and in y. A peak whose
    x is not in 2 ... w - 2, or y not in 2 ... h - 2, stays. Shapes and bad maps as in
    `decode_argmax`.   Source: Xiao et al., ECCV 2018, code, also of these borders, which a mirror
    image does not share."""
    peak, height = find_peaks(heatmaps)
    h, w = heatmaps.shape[2:]
    x, y = peak.unbind(-1)
    inside = (1 < x) & (x < w - 1) & (1 < y) & (y < h - 1)
    right = pixels(heatmaps, (x + 1).clamp(max=w - 1), y)
    left = pixels(heatmaps, (x - 1).clamp(min=0), y)
    below = pixels(heatmaps, x, (y + 1).clamp(max=h - 1))
    above = pixels(heatmaps, x, (y - 1).clamp(min=0))
    gradient = torch.stack([right - left, below - above], -1)
    # Eq. (2), with the sign of the gradient as in Xiao et al.: argmax H + c sign(dH/dx, dH/dy)
    return with_confidence(peak + c * gradient.sign() * inside[..., None], height)


def decode_dark(heatmaps: torch.Tensor, kernel: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (3): the centre of the Gaussian that each map is, between the px.
    Shapes and bad maps as in `decode_argmax`; kernel, the side of the blur in px, is odd.

    The paper says only that Eq. (3) is fitted to the map. For a Gaussian the fit has a closed form:
    its logarithm is a parabola, whose top is one Newton step away from any px. From the highest px
    m, mu = m - hessian^-1 gradient, both of log G. Real maps are rough and are blurred first. Noise
    asks for large steps: they end at 1 px in x and in y. As in DARK, a saddle is not excluded; this
    bound limits the harm. A peak less than 2 px from the outermost px stays where it is.
    Source: Zhang et al., "Distribution-Aware Coordinate Representation", CVPR 2020, and its code,
    ilovepose/DarkPose lib/core/inference.py, to rounding; there a loop over whole maps.
    Raises: ValueError for an even kernel.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel {kernel}: expected an odd number of px")
    peak, height = find_peaks(heatmaps)
    h, w = heatmaps.shape[2:]
    x, y = peak.unbind(-1)
    inside = (1 < x) & (x < w - 2) & (1 < y) & (y < h - 2) & height.isfinite()  # (B, P)
    blurred = blurred_about(heatmaps, peak, kernel)  # (B, P, 5, 5), rows are y
    # DARK rescales a blurred map to its old height. log(a G) = log a + log G has the same
    # derivatives, so we skip it except for maps that reach the floor of 1e-10.
    low = inside & (blurred <= 1e-10).flatten(2).any(2)
    if low.any():
        factor = height[low].double() / blurred_peaks(heatmaps, low, kernel)
        blurred[low] *= factor[:, None, None]
    log_G = blurred.clamp(min=1e-10).log()
    dx = (log_G[..., 2, 3] - log_G[..., 2, 1]) / 2
    dy = (log_G[..., 3, 2] - log_G[..., 1, 2]) / 2
    dxx = (log_G[..., 2, 4] - 2 * log_G[..., 2, 2] + log_G[..., 2, 0]) / 4
    dyy = (log_G[..., 4, 2] - 2 * log_G[..., 2, 2] + log_G[..., 0, 2]) / 4
    dxy = (log_G[..., 3, 3] - log_G[..., 1, 3] - log_G[..., 3, 1] + log_G[..., 1, 1]) / 4
    # Eq. (3): log G has gradient -Sigma^-1 (m - mu), hessian -Sigma^-1: step = -hessian^-1 gradient
    determinant = dxx * dyy - dxy**2
    step = torch.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], -1) / determinant[..., None]
    good = inside & step.isfinite().all(-1)
    step = step.clamp(-1, 1).where(good[..., None], 0)
    return with_confidence(peak + step, height)


def blur_matrix(length: int, kernel: int, device: torch.device) -> torch.Tensor:
    """A Gaussian blur of zero-padded rows as a matrix: (length, length + kernel - 1) float64.
    The weights are OpenCV's: sigma 0.3 ((kernel - 1) / 2 - 1) + 0.8 from 9 px on, a table below."""
    weights = torch.from_numpy(cv2.getGaussianKernel(kernel, 0)[:, 0])
    matrix = torch.zeros(length, length + kernel - 1, dtype=torch.float64)
    for i in range(length):
        matrix[i, i:i + kernel] = weights
    return matrix.to(device)


def blurred_about(heatmaps: torch.Tensor, peak: torch.Tensor, kernel: int) -> torch.Tensor:
    """The 5 x 5 px about each peak (B, P, 2) of the blurred maps: (B, P, 5, 5) float64. Only the px
    that these need are read and blurred: n = kernel + 4 a side, zero off the map."""
    h, w = heatmaps.shape[2:]
    offset = torch.arange(kernel + 4, device=heatmaps.device) - kernel // 2 - 2
    x = (peak[..., :1] + offset)[..., None, :]  # (B, P, 1, n)
    y = (peak[..., 1:] + offset)[..., :, None]  # (B, P, n, 1)
    patch = pixels(heatmaps, x.clamp(0, w - 1), y.clamp(0, h - 1))  # (B, P, n, n)
    patch *= (y >= 0) & (y < h) & (x >= 0) & (x < w)
    blur = blur_matrix(5, kernel, heatmaps.device)
    # Rows and columns at once: one product of matrices, not B P small ones
    blurred = patch.flatten(2).double() @ torch.kron(blur, blur).T
    return blurred.unflatten(2, (5, 5))


def blurred_peaks(heatmaps: torch.Tensor, chosen: torch.Tensor, kernel: int) -> torch.Tensor:
    """The highest value after the blur of the K maps `chosen`, (B, P) bool: (K,) float64."""
    highest = []
    for part in chosen.nonzero().split(16):  # 16 maps at a time, for memory
        maps = heatmaps[part[:, 0], part[:, 1]].float().cpu()
        maps = F.pad(maps, (0, 0, 0, kernel // 2))  # zeros below each: they are blurred as one
        blurred = cv2.GaussianBlur(maps.flatten(0, 1).numpy(), (kernel, kernel), 0,
                                   borderType=cv2.BORDER_CONSTANT)
        blurred = torch.from_numpy(blurred).view(maps.shape)[:, :heatmaps.shape[2]]
        highest.append(blurred.amax((1, 2)))
    return torch.cat(highest).double().to(heatmaps.device)


DECODERS = {"argmax": decode_argmax, "shift": decode_shift, "dark": decode_dark}


# ---- Loss ----------------------------------------------------------------------------------------

def heatmap_loss(heatmaps: torch.Tensor, points: torch.Tensor, stride: float,
                 sigma: float) -> torch.Tensor:
    """Squared error of heatmaps (B, P, h, w) against Gaussians about points (B, P, 2) px of the
    crop: summed over a map, divided by pi sigma^2, the sum of a whole Gaussian's squares, and
    averaged over the landmarks that have a weight. Empty maps have 1 (less at the border), perfect
    ones 0. A scalar."""
    size = tuple(heatmaps.shape[2:])
    target = gaussian_heatmaps(points, size, stride, sigma)
    error = (heatmaps - target).square().sum((2, 3)) / (math.pi * sigma**2)  # (B, P)
    weight = landmark_weights(points, size, stride, sigma)
    return (error * weight).sum() / weight.sum().clamp(min=1)


# ---- Data: alignment of Sec. 3.1, augmentation of Sec. 3.3 and 5.1 -------------------------------

# Eye centres, nose tip and mouth corners in a 192 px crop: LaPa's mean face, made symmetric, 122 px
# wide. In 3,462 faces of videos it left 0.1 % of 68 points outside the crop.
REFERENCE_5 = torch.tensor([[69.1, 56.6], [121.9, 56.6], [95.5, 87.6], [72.0, 114.5],
                            [119.0, 114.5]], dtype=torch.float64)
MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1] over ImageNet
STD = (0.229, 0.224, 0.225)
GREY = (0.299, 0.587, 0.114)
# Columns: ImageNet's principal components of RGB in 0..255, each times its eigenvalue [AlexNet].
PCA = ((-0.5675 * 55.46, 0.7192 * 4.794, 0.4009 * 1.148),
       (-0.5808 * 55.46, -0.0045 * 4.794, -0.8140 * 1.148),
       (-0.5836 * 55.46, -0.6948 * 4.794, 0.4203 * 1.148))


@functools.cache
def device_tensor(values: tuple, device: torch.device) -> torch.Tensor:
    """A float32 tensor, kept: copying from the CPU in every step would make the CPU wait for the
    GPU."""
    with torch.inference_mode(False):  # a tensor created in this mode cannot be used in training
        return torch.tensor(values, device=device)


def align_five(points5, size: int = 192) -> torch.Tensor:
    """The similarity that brings five landmarks to REFERENCE_5: the alignment of Sec. 3.1.

    Args: points5 (..., 5, 2) px of the image, array or tensor: eye, eye, nose tip, mouth corner,
        mouth corner, the image-left one first; size of the crop in px.
    Returns: (..., 2, 3) float64, image px -> crop px; `warp.invert` gives the way back.
    Raises: ValueError for another shape, or five points that coincide or are not finite.
    """
    points5 = torch.as_tensor(points5).double()
    if points5.shape[-2:] != (5, 2):
        raise ValueError(f"points5 {tuple(points5.shape)}: expected (..., 5, 2)")
    warp.check_points(points5, "similarity")
    reference = (REFERENCE_5 + 0.5) * (size / 192) - 0.5  # of a 192 px crop -> of a size px crop
    return warp.fit_similarity(points5, reference.expand_as(points5))


def five_of(points):
    """The five points (..., 5, 2) in landmarks (..., P, 2) of a known scheme, array or tensor.
    Raises: UserError for a number of landmarks that is no scheme's."""
    count = points.shape[-2]
    if count not in datasets.SCHEMES:
        known = ", ".join(map(str, datasets.SCHEMES))
        raise UserError(f"{count} landmarks are no known scheme ({known}): eyes, nose and mouth "
                        "cannot be found among them; take --align box")
    return datasets.group_means(points, datasets.SCHEMES[count].five)


def rough_five(args, faces: list) -> np.ndarray:
    """Five points (M, 5, 2) px as of a detector: those of --five, else the true ones with noise.
    The noise is one draw for each face of a set."""
    true = five_of(np.stack([face.points for face in faces]).astype(np.float64))
    across = true[:, 1] - true[:, 0]
    down = true[:, :2].mean(1) - true[:, 3:].mean(1)
    scale = np.linalg.norm([across, down], axis=2).max(0)  # (M,): in profile the eyes coincide
    noise = [np.random.default_rng((NOISE_SEED, i)).normal(size=(5, 2)) for i in range(len(faces))]
    rough = true + args.five_noise * scale[:, None, None] * np.stack(noise)
    if args.five:
        found = detected_five(args, faces, true, scale)
        rough = np.where(np.isfinite(found), found, rough)
    return rough


def first_crops(args, faces: list, align: str) -> np.ndarray:
    """Maps image px -> crop px of the crops that a network sees first: (M, 2, 3) float64."""
    if align == "box":
        return datasets.square_crops(datasets.face_boxes(faces, args.box), args.size, args.margin)
    five = rough_five(args, faces)
    flat = np.flatnonzero(~(np.ptp(five, axis=1).max(1) > 0))
    if flat.size:
        face = faces[flat[0]]
        raise UserError(f"{face.where or face.image}: its eyes, nose tip and mouth corners "
                        "coincide, which aligns nothing; correct or leave out that face")
    return align_five(five, args.size).numpy()


def augment(rng: np.random.Generator, size: int, rotate=0.0, scale=0.0, shift=0.0, lighting=0.0,
            jitter=0.0, erase=0.0):
    """Draws the tricks of one face; each is always drawn, so that none changes the others' draws.
    Returns: matrix (2, 3) crop px -> crop px, about the crop's middle; False, not mirrored;
        {"colour": (9,) three PCA weights, the factors of brightness, contrast and saturation, their
        order; "erase": (4,) x0 y0 x1 y1 px}."""
    angle = math.radians(rng.uniform(-rotate, rotate))
    zoom = rng.uniform(1 - scale, 1 + scale)
    move = rng.uniform(-shift, shift, 2) * size / 192
    c = zoom * math.cos(angle)
    s = zoom * math.sin(angle)
    middle = (size - 1) / 2
    matrix = np.array([[c, s, middle - (c + s) * middle + move[0]],
                       [-s, c, middle - (c - s) * middle + move[1]]])
    colour = np.concatenate([rng.normal(0, lighting, 3), rng.uniform(1 - jitter, 1 + jitter, 3),
                             rng.permutation(3)])
    chance = rng.random()
    area = rng.uniform(0.02, 0.15)
    aspect = math.exp(rng.uniform(-1.2, 1.2))
    w = size * math.sqrt(area * aspect)
    h = size * math.sqrt(area / aspect)
    x = rng.uniform(0, size - w)
    y = rng.uniform(0, size - h)
    hidden = np.array([x, y, x + w, y + h]) if chance < erase else np.full(4, -1.0)
    return matrix, False, {"colour": colour, "erase": hidden}


def colour_map(draws: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour jitter and PCA shift as one affine map of RGB in 0..255 for each image: x -> M x + t.

    Brightness, contrast and saturation all send a colour x to f x + (1 - f) a, with a black, the
    image's mean grey, or the grey of x: an affine map, and so is one after another in any order.
    Args: draws (B, 9) of `augment`; mean (B, 3), the image's mean colour.
    Returns: M (B, 3, 3), t (B, 3).
    """
    weights, factors, order = draws.split(3, 1)
    grey = device_tensor(GREY, draws.device)
    one = torch.eye(3, device=draws.device)
    M = one.expand(len(draws), 3, 3)
    t = torch.zeros_like(mean)
    for kind in order.long().unbind(1):  # (B,) 0 brightness, 1 contrast, 2 saturation
        f = factors.gather(1, kind[:, None])  # (B, 1)
        to_grey = ((1 - f) * (kind == 2)[:, None])[..., None] * grey  # (B, 1, 3)
        A = f[..., None] * one + to_grey  # (B, 3, 3)
        mean_grey = ((M @ mean[..., None])[..., 0] + t) @ grey  # (B,)
        contrast = (1 - f) * (mean_grey * (kind == 1))[:, None]  # (B, 1)
        M = A @ M
        t = (A @ t[..., None])[..., 0] + contrast
    return M, t + weights @ device_tensor(PCA, draws.device).T


def prepare(batch: dict, device: torch.device, erase: bool = False) -> torch.Tensor:
    """Network input (B, 3, H, W), normalised, from a batch: with the colour of its draws if it has
    any and, if `erase`, its erased boxes."""
    image = batch["image"].to(device, non_blocking=True)
    if image.dtype == torch.uint8:  # (B, H, W, 3) of the loader; permuted, it is channels_last.
        image = image.permute(0, 3, 1, 2).float()  # --cache device gives (B, 3, H, W) float32
    mean = 255 * device_tensor(MEAN, device)
    std = 255 * device_tensor(STD, device)
    if "colour" in batch:
        M, t = colour_map(batch["colour"].to(device, non_blocking=True), image.mean((2, 3)))
        flat = image.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, 3)
        # (M x + t - mean) / std of all px x
        flat = torch.baddbmm(((t - mean) / std)[:, None], flat, (M / std[:, None]).mT)
        image = flat.mT.unflatten(2, image.shape[2:])
    else:
        image = (image - mean[:, None, None]) / std[:, None, None]
    if erase:
        box = batch["erase"].to(device, non_blocking=True)
        x0, y0, x1, y1 = box[..., None].unbind(1)  # (B, 1) each
        y = torch.arange(image.shape[2], device=device)
        x = torch.arange(image.shape[3], device=device)
        columns = (x >= x0) & (x < x1)  # (B, W)
        rows = (y >= y0) & (y < y1)  # (B, H)
        hidden = columns[:, None, None] & rows[:, None, :, None]
        image = image.masked_fill(hidden, 0)  # the mean colour
    return image.contiguous(memory_format=torch.channels_last)


def read_faces(args, split: str) -> list[datasets.Face]:
    """The faces of args.data: drawn ones, or those of a set on disk whose files have been looked
    at."""
    if args.data == "faces":
        count = min(args.limit or DRAWN["train"], DRAWN[split])
        return synthetic.read_faces(split, count, args.size, args.points)  # whatever --seed is
    faces = datasets.read(args.data, args.data_root, split)[:args.limit or None]
    datasets.check_images(faces, args.upright)
    return faces


def make_dataset(args, faces: list, augmented: bool) -> datasets.CropDataset:
    """Faces as crops, as --align says; augmented by the tricks, or as they are.
    A network for two passes is trained on each face twice, as it stands in its box and aligned, and
    moved as far as a first pass is wrong."""
    if not augmented:
        matrices = first_crops(args, faces, "five" if args.align == "five" else "box")
        return datasets.CropDataset(faces, matrices, args.size)
    if args.align == "two-pass":
        moves = {name: max(getattr(args, name), least) for name, least in SECOND_LOOK.items()}
        args = argparse.Namespace(**vars(args) | moves | dict(five_noise=0.0))
    aligns = ["five", "box"] if args.align == "two-pass" else [args.align]
    matrices = np.concatenate([first_crops(args, faces, align) for align in aligns])
    faces = faces * len(aligns)
    # How far beyond the crop its own corners can come to lie: rotated, shifted, zoomed out.
    turn = min(math.radians(args.rotate), math.pi / 4)
    reach = (math.cos(turn) + math.sin(turn)) * (1 + 2 * args.shift / 192) / (1 - args.scale)
    draw = partial(augment, rotate=args.rotate, scale=args.scale, shift=args.shift,
                   lighting=args.lighting, jitter=args.jitter, erase=args.erase)
    flip = datasets.SCHEMES[len(faces[0].points)].flip if args.flip_copies else None
    data = datasets.CropDataset(faces, matrices, args.size, draw, reach, 1 + args.scale, flip,
                                args.seed)
    if args.flip_copies:  # the set, then its mirror image
        data.rows = np.concatenate([data.rows, data.rows + [0, 1]])
    return data


def without_copies(train: list, test: list) -> list:
    """Sec. 3.2: the training faces whose image is no copy, byte for byte, of a test image
    (JD-landmark-2 has JD-landmark's test images in it)."""
    def digest(face):
        return hashlib.sha1(Path(face.image).read_bytes()).digest()

    tested = {digest(face) for face in test}
    return [face for face in train if digest(face) not in tested]


def check_scheme(args, points: int):
    """Raises UserError where the flags need to know what the landmarks mean, and nobody does."""
    if points in datasets.SCHEMES:
        return
    needed = {"add --no-flip-copies": args.flip_copies,
              "add --flip-test none": args.flip_test != "none",
              "add --align box": args.align != "box",
              "leave out --align-out": args.align_out}
    cures = [cure for cure, needs in needed.items() if needs]
    if cures:
        known = ", ".join(map(str, datasets.SCHEMES))
        raise UserError(f"{points} landmarks are no known scheme ({known}), so they cannot be "
                        f"mirrored or aligned: {', '.join(cures)}")


def load_sets(args, say: Callable) -> tuple[datasets.CropDataset, datasets.CropDataset]:
    """The training set, augmented, and the test set; what can be wrong with them is found here.
    Args: say, a function that prints."""
    train_faces = read_faces(args, "train")
    test_faces = read_faces(args, "test")
    points = len(train_faces[0].points)
    if len(test_faces[0].points) != points:
        raise UserError(f"training faces have {points} landmarks, test faces "
                        f"{len(test_faces[0].points)}")
    check_scheme(args, points)
    if args.data == "jd106":
        count = len(train_faces)
        train_faces = without_copies(train_faces, test_faces)
        if len(train_faces) < count:
            say(f"left out {count - len(train_faces)} training images that are test images too")
    train_set = make_dataset(args, train_faces, augmented=True)
    test_set = make_dataset(args, test_faces, augmented=False)
    test_set.divisors(args.norm)  # what is wrong with them is said now, not after an epoch
    say(f"{len(train_set.faces)} training faces ({len(train_set)} an epoch), {len(test_set)} test "
        f"faces, {points} landmarks")
    return train_set, test_set


# ---- Training: Sec. 3.3 --------------------------------------------------------------------------

def learning_rate(step: int, steps: int, base: float) -> float:
    """A tenth after half of the run and again after three quarters (epochs 20 and 30 of 40)."""
    if step < steps / 2:
        return base
    return base / 10 if step < 3 * steps / 4 else base / 100


def build(args, points: int, device: torch.device) -> HeatmapNet:
    """The network that the flags describe."""
    net = HeatmapNet(args.backbone, args.strategy, points, args.filters)
    return net.to(device, memory_format=torch.channels_last)


def train(args) -> dict:
    """Trains, evaluates or predicts, as the flags say; returns the last evaluation's numbers."""
    if args.eval:
        return evaluate_checkpoint(args)
    if args.predict:
        return predict(args)
    job = run.Job(args, ["five"])
    train_set, test_set = load_sets(args, job.say)
    points = train_set.points.shape[1]
    net = build(args, points, job.device)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay,
                                 fused=True)
    job.say(f"{args.backbone} + {args.strategy}, heatmaps of {args.size // net.stride} px")
    job.restore(net, optimizer, [len(train_set), points], net.backbone)
    model = job.wrap(net)
    job.begin(train_set)
    if job.rank == 0:
        test_batches = datasets.in_order(len(test_set), 64)
        test_loader = run.make_loader(args, test_set, test_batches, job.device)
    results = None
    for epoch in job.epochs():
        net.train()
        erase = epoch >= args.erase_from * args.epochs
        for step, batch in job.steps_of(epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.epochs * job.steps, args.lr)
            image = prepare(batch, job.device, erase)
            target = batch["points"].to(job.device, non_blocking=True)
            with run.precision(args, job.device):
                heatmaps = model(image)
            loss = heatmap_loss(heatmaps, target, net.stride, args.sigma)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            job.note(step, loss=loss)
        if job.rank == 0 and job.due(epoch):
            results = evaluate(net, test_loader, args)
        job.save(epoch, results[0] if results and job.due(epoch) else {})
    if job.rank > 0:
        return {}
    results = results or evaluate(net, test_loader, args)
    print_table(results[0], args, net)
    write_pictures(job.folder, net, args, *results[1:])
    return results[0]


# ---- Evaluation: Sec. 3.2 ------------------------------------------------------------------------

@torch.inference_mode()
def predict_points(net: HeatmapNet, image: torch.Tensor, decode: str = "dark", kernel: int = 11,
                   flip_test: str = "none", flip=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Landmarks of prepared crops (B, 3, H, W): (B, P, 2) px of the crop and confidences (B, P).

    flip_test: "coordinates", the mean of the points for the image and its mirror image (Sec. 5.1);
    "heatmaps", the points of the mean heatmaps. `flip` (P,) is then the scheme's permutation.
    """
    decoder = partial(decode_dark, kernel=kernel) if decode == "dark" else DECODERS[decode]
    if flip_test == "none":
        heatmaps = net(image)
    else:
        flip = device_tensor(tuple(flip), image.device).long()
        heatmaps, mirrored = net(torch.cat([image, image.flip(3)])).chunk(2)
        mirrored = mirrored.flip(3)[:, flip]  # mirrored back, each landmark in its map
    if flip_test == "heatmaps":
        heatmaps = (heatmaps + mirrored) / 2
    points, confidence = decoder(heatmaps)
    if flip_test == "coordinates":
        others, heights = decoder(mirrored)
        points = (points + others) / 2
        confidence = ((confidence + heights) / 2).where(points.isfinite().all(-1), 0)
    return to_crop(points, net.stride), confidence


def predict_batches(net: HeatmapNet, batches, crop_matrices: torch.Tensor,
                    args) -> tuple[torch.Tensor, torch.Tensor]:
    """Landmarks (M, P, 2) px of the images, float64, and confidences (M, P) of the faces of all
    batches, whose crops are by `crop_matrices` (M, 2, 3)."""
    net.eval()
    device = net.head.weight.device
    flip = None if args.flip_test == "none" else datasets.SCHEMES[net.points].flip
    points, confidence = [], []
    for batch in batches:
        image = prepare(batch, device)
        with run.precision(args, device):
            found = predict_points(net, image, args.decode, args.kernel, args.flip_test, flip)
        points.append(found[0].cpu().double())
        confidence.append(found[1].cpu())
    points = warp.apply_affine(warp.invert(crop_matrices), torch.cat(points))
    return points, torch.cat(confidence)


def predict_set(net: HeatmapNet, loader, args):
    """Landmarks (M, P, 2) px of a set's images; the crops that they were predicted in, a
    CropDataset; and the landmarks of the first pass, others with --align two-pass."""
    data = loader.dataset
    first, _ = predict_batches(net, loader, data.crop_matrices, args)
    points = first
    if args.align == "two-pass":
        points, data = second_pass(net, data, first, args)
    return points, data, first


def evaluate(net: HeatmapNet, loader, args):
    """NME, FR and AUC in the pixels of the images, over the test set and its subsets.

    Args: loader, in order, of a CropDataset without augmentation.
    Returns: fractions "nme", "fr", "auc", "nme/pose", ...; to compare with, "nme/perfect argmax",
        that of the argmax of perfect heatmaps of this size, "nme/mean face", that of the test
        faces' own mean in every crop, "nme/first pass" with --align two-pass, and "spread", a
        landmark's rms distance from its mean over the crop's side; the NME of each face (M,);
        predictions (M, P, 2) px of the images; the crops, a CropDataset: with --align two-pass not
        those of the loader.
    """
    points, data, first = predict_set(net, loader, args)
    divisors = data.divisors(args.norm)
    errors = metrics.nme(points, data.points, divisors)  # Eq. (4)
    scores = metrics.landmark_scores(errors, datasets.subsets(data.faces), args.threshold)
    truth = warp.apply_affine(data.crop_matrices, data.points)  # (M, P, 2) crop px
    to_image = warp.invert(data.crop_matrices)
    cells = to_heatmap(truth, net.stride).round().clamp(0, args.size // net.stride - 1)
    argmax = warp.apply_affine(to_image, to_crop(cells, net.stride))
    scores["nme/perfect argmax"] = float(metrics.nme(argmax, data.points, divisors).mean())
    mean_face = warp.apply_affine(to_image, truth.mean(0).expand_as(truth))
    scores["nme/mean face"] = float(metrics.nme(mean_face, data.points, divisors).mean())
    if args.align == "two-pass":
        scores["nme/first pass"] = float(metrics.nme(first, data.points, divisors).mean())
    variance = (truth - truth.mean(0)).square().sum(2).mean(0)  # (P,) px^2
    scores["spread"] = float(variance.sqrt().mean()) / args.size
    return scores, errors, points, data


def how_aligned(args) -> str:
    """What the crops of a set were made from, in words."""
    if args.align == "five":
        noisy = f"true five points with {args.five_noise:.0%} noise"
        return f"five points of {args.five}" if args.five else noisy
    box = f"the {args.box} box x {args.margin}"
    return box if args.align == "box" else f"{box}, then five points of the prediction"


def print_table(scores: dict, args, net: HeatmapNet):
    """The columns of Table 5 as rows, with a column for the full set and each subset."""
    print(f"{args.data}: NME by {datasets.norm_kind(args.norm, net.points)}, FR and AUC at "
          f"{args.threshold:.2f}, aligned by {how_aligned(args)}, decoded by {args.decode}, flip "
          f"test: {args.flip_test}")
    print(metrics.landmark_table(scores, {"NME (%)": "nme", "FR (%)": "fr", "AUC (%)": "auc"}))
    side = args.size // net.stride
    print(f"NME of the argmax of perfect {side} x {side} heatmaps: "
          f"{100 * scores['nme/perfect argmax']:.2f} %")
    if "nme/first pass" in scores:
        print(f"NME of the first pass: {100 * scores['nme/first pass']:.2f} %")
    print(f"NME of the test faces' own mean: {100 * scores['nme/mean face']:.2f} %; a landmark is "
          f"{192 * scores['spread']:.1f} px (rms, of 192) from its mean")


def open_checkpoint(args, path: str) -> HeatmapNet:
    """A checkpoint's network, in evaluation mode; `args` takes its flags over."""
    state, device = run.open_checkpoint(args, path, ["five"])
    if "head.weight" not in state["model"]:
        raise UserError(f"{path}: its weights have no head.weight; the file was changed")
    points = len(state["model"]["head.weight"])
    check_scheme(args, points)
    net = build(args, points, device)
    run.load_weights(net, state["model"], path)
    return net.eval()


def evaluate_checkpoint(args) -> dict:
    """--eval: the numbers of a checkpoint on the test set of --data; with --output, pictures too;
    with --align-out, both splits as recognition crops."""
    net = open_checkpoint(args, args.eval)
    folder = run.find_run(args)
    data = make_dataset(args, read_faces(args, "test"), augmented=False)
    if data.points.shape[1] != net.points:
        raise UserError(f"--eval {args.eval}: the model has {net.points} landmarks, the faces of "
                        f"--data {args.data} have {data.points.shape[1]}")
    batches = datasets.in_order(len(data), args.batch_size)
    loader = run.make_loader(args, data, batches, net.head.weight.device)
    scores, *results = evaluate(net, loader, args)
    print_table(scores, args, net)
    if folder:
        write_pictures(run.make_run(args, folder), net, args, *results)
    if args.align_out:
        align_set(net, args, Path(args.align_out), "train")
        align_set(net, args, Path(args.align_out), "test")
    return scores


# ---- Not in the paper: points of a file, crops by a box, what is no face -------------------------

def detected_five(args, faces: list, true: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The points of --five (M, 5, 2) px, nan for a face that has none there: of several faces of an
    image the nearest to the `true` five (M, 5, 2), but none further away than `scale` (M,) px."""
    table = datasets.read_points_csv(args.five)
    found = np.full(true.shape, np.nan)
    missed = []
    for i, face in enumerate(faces):
        name = f"face {i}"
        if isinstance(face.image, str):
            name = os.path.relpath(face.image, args.data_root or ".")
        if name in table:
            rows = five_of(table[name])  # (K, 5, 2)
            distance = np.linalg.norm(rows - true[i], axis=2).mean(1)
            if distance.min() < scale[i]:
                found[i] = rows[distance.argmin()]
        if np.isnan(found[i]).any():
            missed.append(name)
    if len(missed) == len(faces):
        raise UserError(f"--five {args.five}: none of its images ({', '.join(list(table)[:3])}, "
                        f"...) is one of the set's ({', '.join(missed[:3])}, ...), as paths below "
                        "--data-root")
    if missed:
        warnings.warn(f"--five {args.five} has no points for {len(missed)} of {len(faces)} faces, "
                      f"the first is {missed[0]}: the true ones with noise are taken", stacklevel=3)
    return found


def is_face(five: torch.Tensor) -> torch.Tensor:
    """Which five points (M, 5, 2) px could be a face's: (M,) bool; none that are not finite or that
    coincide. A similarity cannot mirror, so mirrored points are fitted best by a scale near 0,
    which would ask for an enormous crop."""
    five = five.double()
    fitted = warp.apply_affine(warp.fit_similarity(five, REFERENCE_5.expand_as(five)), five)
    size = (fitted - fitted.mean(1, keepdim=True)).norm(dim=(1, 2))
    return size > (REFERENCE_5 - REFERENCE_5.mean(0)).norm() / 4  # a face about keeps its size


def are_faces(args, points: torch.Tensor) -> torch.Tensor:
    """Which predictions (M, P, 2) px of the image could be faces: (M,) bool. Where no five points
    are needed, all that are not one place."""
    extent = (points.amax(1) - points.amin(1)).amax(1)  # nan if a point is not finite
    good = (extent > 1) & extent.isfinite()
    if args.align != "box" or args.align_out:
        good &= is_face(five_of(points))
    return good


def next_crops(args, points: torch.Tensor, crop_matrices: torch.Tensor) -> torch.Tensor:
    """Maps (M, 2, 3) of the crops of a second pass: by the five points in the first predictions
    (M, P, 2) px of the image or, with --align box, by their box. Where these are no face, the crop
    stays as it is."""
    good = are_faces(args, points)
    matrices = crop_matrices.clone()
    if args.align == "box":
        boxes = datasets.landmark_boxes(points[good].numpy())
        squares = datasets.square_crops(boxes, args.size, args.margin)
        matrices[good] = torch.from_numpy(squares)
    else:
        matrices[good] = align_five(five_of(points[good]), args.size)
    return matrices


def second_pass(net: HeatmapNet, data: datasets.CropDataset, points: torch.Tensor,
                args) -> tuple[torch.Tensor, datasets.CropDataset]:
    """Landmarks (M, P, 2) px, predicted in crops by the `points` (M, P, 2) px of a first pass, and
    these crops."""
    data = datasets.CropDataset(data.faces, next_crops(args, points, data.crop_matrices), args.size)
    uncached = argparse.Namespace(**vars(args) | {"cache": ""})  # these crops are not seen again
    batches = datasets.in_order(len(data), 64)
    loader = run.make_loader(uncached, data, batches, net.head.weight.device)
    return predict_batches(net, loader, data.crop_matrices, args)[0], data


def find_crops(args, image: np.ndarray, detector) -> tuple[torch.Tensor, int]:
    """Crops of an image's faces, (M, 2, 3) image px -> crop px, and how many passes they need: five
    points of a detector align at once, a box is a first guess, and the whole image a rough one. A
    network that was trained on the set's own boxes has never seen the box of a prediction."""
    if detector is not None and args.align != "box":
        five = torch.from_numpy(photos.detect(detector, image)[:, 4:14].reshape(-1, 5, 2))
        return align_five(five[is_face(five)], args.size), 1
    boxes = photos.find_boxes(args, image, detector)
    whole = detector is None and args.box in args.boxes  # an image that has its margin in it
    matrices = datasets.square_crops(boxes, args.size, 1.0 if whole else args.margin)
    passes = 3 if whole else 2
    if args.align == "box" and args.trained_box == "face":
        passes = 1
    return torch.from_numpy(matrices), passes


# ---- Your own photographs ------------------------------------------------------------------------

def find_points(net: HeatmapNet, image: np.ndarray, matrix: torch.Tensor, passes: int,
                args) -> tuple[torch.Tensor, torch.Tensor]:
    """Landmarks (P, 2) px and confidences (P,) of the face in the crop by `matrix` (2, 3); after
    each pass but the last, the crop is aligned by the prediction."""
    matrix = matrix[None]
    for _ in range(passes):
        data = datasets.CropDataset([datasets.Face(image)], matrix, args.size)
        points, confidence = predict_batches(net, [data.__getitems__([(0, 0)])], matrix, args)
        matrix = next_crops(args, points, matrix)
    return points[0], confidence[0]


def predict(args) -> dict:
    """--predict: for each face its landmarks as NAME.pts, for each image NAME.png with them drawn,
    those of a confidence below 0.2 in orange; with --align-out recognition crops."""
    net = open_checkpoint(args, args.weights)
    photos.fold_batch_norms(net, args.size)
    detector = photos.open_detector(args.detector) if args.detector else None
    if args.align == "five" and detector is None:
        print("note: this network has seen no faces but those aligned by five points, and misses "
              "others: give --detector, or train with --align two-pass")
    for photo in photos.photos(args, (".pts", ".png")):
        picture = photo.image.copy()
        matrices, passes = find_crops(args, photo.image, detector)
        for matrix in matrices:
            points, confidence = find_points(net, photo.image, matrix, passes, args)
            if not are_faces(args, points[None]):
                continue
            target = photo.target()
            datasets.write_pts(f"{target}.pts", points)
            if args.align_out:
                name = os.path.relpath(target, args.output)
                write_aligned(Path(args.align_out), name, datasets.Face(photo.image), points)
            radius = max(1.0, np.ptp(points.numpy(), 0).max() / 120)
            photos.draw_points(picture, points[confidence >= 0.2], photos.GREEN, radius)
            photos.draw_points(picture, points[confidence < 0.2], (255, 150, 0), radius)
        datasets.write_image(f"{photo.stem}.png", picture)
    return {}


# ---- Recognition crops: Sec. 5.4 -----------------------------------------------------------------

def write_aligned(folder: Path, name: str, face: datasets.Face, points: torch.Tensor):
    """The 112 px crop for recognition, NAME.png, of the face with landmarks (P, 2) px of its image,
    and NAME.pts, these landmarks in the crop."""
    matrix = warp.fit_similarity(five_of(points), torch.from_numpy(datasets.ARCFACE_5).to(points))
    data = datasets.CropDataset([face], matrix[None], 112)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    datasets.write_image(folder / f"{name}.png", data.__getitems__([(0, 0)])["image"][0].numpy())
    datasets.write_pts(folder / f"{name}.pts", warp.apply_affine(matrix, points))


def align_set(net: HeatmapNet, args, folder: Path, split: str):
    """Crops of a whole split, as a set for --data folder: SPLIT/IDENTITY/NAME.png."""
    data = make_dataset(args, read_faces(args, split), augmented=False)
    batches = datasets.in_order(len(data), args.batch_size)
    loader = run.make_loader(args, data, batches, net.head.weight.device)
    points, *_ = predict_set(net, loader, args)
    good = are_faces(args, points)
    written = set()
    for i in tqdm(good.nonzero()[:, 0].tolist(), f"aligned {split}"):
        image = data.faces[i].image
        stem = f"{i:06d}"
        if isinstance(image, (str, os.PathLike)):
            stem = os.path.splitext(os.path.relpath(image, args.data_root))[0]
            stem = stem.removeprefix(split + os.sep)
        if data.faces[i].identity:  # --data folder takes a folder for a person
            stem = f"{data.faces[i].identity}/{Path(stem).name}"
        name = stem
        number = 1
        while name in written:  # an image may hold several faces
            number += 1
            name = f"{stem}.face{number}"
        written.add(name)
        write_aligned(folder / split, name, data.faces[i], points[i])
    print(f"{len(written)} aligned faces in {folder / split}; left out {len(good) - len(written)} "
          f"without a face in the prediction; they were aligned by {how_aligned(args)}")


# ---- Figures -------------------------------------------------------------------------------------

def draw_alignment(data: datasets.CropDataset, side: int = 192) -> np.ndarray:
    """Fig. 1: 12 test images, each beside its crop, with the true landmarks."""
    tiles = []
    for i in photos.spread(len(data), 12):
        face = data.faces[i]
        height, width = datasets.load_image(face.image, face.upright).shape[:2]
        box = np.array([[-0.5, -0.5, width - 0.5, height - 0.5]])
        matrix = datasets.square_crops(box, side, 1.0)
        image = datasets.CropDataset([face], matrix, side)
        layer = (data.points[i], photos.GREEN)
        tiles.append(np.concatenate([photos.draw_crop(image, 0, side, layer),
                                     photos.draw_crop(data, i, side, layer)], 1))
    return photos.tile(tiles, 3)


@torch.inference_mode()
def draw_heatmaps(net: HeatmapNet, data: datasets.CropDataset, args, side: int = 256) -> np.ndarray:
    """8 test faces under the highest of all their heatmaps, and below with the landmarks."""
    tiles = []
    for i in photos.spread(len(data), 8):
        batch = data.__getitems__([(0, i)])
        heatmaps = net(prepare(batch, net.head.weight.device))
        heat = heatmaps[0].amax(0).clamp(0, 1).cpu().numpy()
        heat = cv2.resize(heat, (side, side), interpolation=cv2.INTER_NEAREST)[..., None]
        warm = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
        over = photos.draw_crop(data, i, side) * (1 - 0.8 * heat) + warm * 0.8 * heat
        points, _ = predict_batches(net, [batch], data.crop_matrices[i:i + 1], args)
        below = photos.draw_crop(data, i, side, (points[0], photos.RED))
        tiles.append(np.concatenate([over.astype(np.uint8), below]))
    return photos.tile(tiles, 4)


def write_pictures(folder: Path, net: HeatmapNet, args, errors, points, data):
    """From what `evaluate` returned: Fig. 1 (alignment.png), heatmaps.png, predictions.png and the
    cumulative errors (ced.png)."""
    datasets.write_image(folder / "alignment.png", draw_alignment(data))
    datasets.write_image(folder / "heatmaps.png", draw_heatmaps(net, data, args))
    datasets.write_image(folder / "predictions.png", photos.draw_predictions(data, points))
    subsets = datasets.subsets(data.faces)
    curves = {name or "full": errors[chosen] for name, chosen in subsets.items()}
    datasets.write_image(folder / "ced.png", metrics.ced_plot(curves, args.threshold))


# ---- Backbones: as published, nothing of this paper ----------------------------------------------

# Image (B, 3, H, W) -> (B, channels, H/32, W/32), H and W multiples of 32. Parameters are named as
# in torchvision's checkpoints, which load by name. The paper trains from scratch.


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
            # Variance 2 / fan_out keeps the gradient's variance from layer to layer. torch counts a
            # depthwise convolution's fan over all groups, too many; the batch norm behind it undoes
            # any scale.
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
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


class ResNet(nn.Module):
    """7x7 stem and four stages of `depths` blocks: (B, 3, H, W) -> (B, 512 expansion, H/32, W/32).
    Source: He et al., CVPR 2016, Table 1."""

    def __init__(self, block: type[nn.Module], depths: Sequence[int]):
        super().__init__()
        self.channels = 512 * block.expansion
        self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.layer1 = self.stage(block, 64, 64, depths[0], 1)  # after a max-pool, which strides
        self.layer2 = self.stage(block, 64 * block.expansion, 128, depths[1], 2)
        self.layer3 = self.stage(block, 128 * block.expansion, 256, depths[2], 2)
        self.layer4 = self.stage(block, 256 * block.expansion, 512, depths[3], 2)
        init_weights(self)

    @staticmethod
    def stage(block, cin, planes, depth, stride):
        rest = (block(planes * block.expansion, planes) for _ in range(depth - 1))
        return nn.Sequential(block(cin, planes, stride), *rest)

    def forward(self, image):
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)    # (B, 64, H/2, W/2)
        x = self.layer1(F.max_pool2d(x, 3, 2, 1))                # (B, 64 expansion, H/4, W/4)
        return self.layer4(self.layer3(self.layer2(x)))          # (B, 512 expansion, H/32, W/32)


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
    """Sandler et al., CVPR 2018, Table 2, with the last 1x1 convolution, to 1280 channels at least:
    (B, 3, H, W) -> (B, channels, H/32, W/32). As in GluonCV, `width` times the table's channels are
    cut, not rounded to multiples of 8."""

    def __init__(self, width: float):
        super().__init__()
        cin = int(32 * width)
        layers = [conv_bn(3, cin, 3, 2, act=nn.ReLU6)]
        table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
                 (6, 160, 3, 2), (6, 320, 1, 1))  # expand, channels, blocks, stride of the first
        for expand, cout, depth, stride in table:
            for i in range(depth):
                layers.append(InvertedResidual(cin, int(cout * width), 1 if i else stride, expand))
                cin = int(cout * width)
        self.channels = int(1280 * max(width, 1.0))
        self.features = nn.Sequential(*layers, conv_bn(cin, self.channels, 1, act=nn.ReLU6))
        init_weights(self)

    def forward(self, image):
        return self.features(image)


def backbone_of(name: str) -> Callable[[], nn.Module]:
    """What builds mobilenetv2_WIDTH, resnet18 or resnet50.   Raises: UserError for another name."""
    if name == "resnet18":
        return partial(ResNet, BasicBlock, (2, 2, 2, 2))
    if name == "resnet50":
        return partial(ResNet, Bottleneck, (3, 4, 6, 3))
    width = re.fullmatch(r"mobilenetv2_(\d+(?:\.\d+)?)", name)
    if width and 0.1 <= float(width[1]) <= 4:  # below 0.1 the first block would have no channel
        return partial(MobileNetV2, float(width[1]))
    raise UserError(f"--backbone {name}: expected resnet18, resnet50 or mobilenetv2_WIDTH with a "
                    "width of 0.1 to 4, as mobilenetv2_0.25")


if __name__ == "__main__":
    run.main(train, parse_args())
