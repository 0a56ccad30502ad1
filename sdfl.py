"""SDFL: Structure-Coherent Deep Feature Learning for Robust Face Alignment.

Chunze Lin, Beier Zhu, Quan Wang, Renjie Liao, Chen Qian, Jiwen Lu, Jie Zhou; IEEE Transactions on
Image Processing 30, 2021. https://arxiv.org/abs/1912.04530

The method. A backbone turns a 256 px face into an 8 x 8 feature map. Two convolutions give every
landmark four channels of it, which become the features of one graph node (map-to-node). The graph
joins each landmark to the k landmarks whose coordinates correlate most with its own over the
training set; a small network weighs these edges anew for every image, so that an occluded landmark
can be muted. One graph convolution, four residual blocks of two, and a last one pass features along
the edges and end in the coordinates. The loss is a soft wing on the coordinates and, by the graph's
Laplacian, on each landmark's place among its neighbours.

Train on WFLW on four GPUs (the paper: NME 4.35 %; not run here, see README):
  python sdfl.py --data wflw --data-root WFLW --gpus 4 --amp --cache device
Without any data, on drawn faces, under four minutes on two CPU cores:
  python sdfl.py
Continue, evaluate, use:
  python sdfl.py --data wflw --gpus 4 --resume
  python sdfl.py --data wflw --data-root WFLW --eval runs/sdfl-wflw/last.pt
  python sdfl.py --predict photo.jpg --weights runs/sdfl-wflw/last.pt

Where each equation and box is:
  Eq. (1), (2)  correlation, neighbourhood M     neighbour_mask
  Eq. (3), (4)  graph convolution                GraphConv, GraphLayer
  Eq. (5)       graph residual block             GraphBlock
  Eq. (6), (7)  Laplacian                        laplacian
  Eq. (8)       Delta = L P                      sdfl_loss
  Eq. (9)       soft wing                        soft_wing
  Eq. (10)      loss                             sdfl_loss
  Eq. (11)      wing                             wing
  Eq. (12)      NME                              common.metrics.nme
  Fig. 3        node embedding                   MapToNode
                dynamic adjacency weighting      DynamicAdjacency
                graph relational layers (Fig. 5) GraphHead: first, blocks, last
  Table I       L-GRL, FC                        GraphHead, FCHead

Where the paper is silent, or the authors' code (BeierZhu/Sturcture-Coherency-Face-Alignment at
97513e9) differs from it:
  - sigma in Eq. (4) is a softmax over the edges of a node: if the zeros of A entered it, each would
    get the weight e^0, and every pair of landmarks would be joined. The code takes it over the
    edges too; its dynamic layer then transposes A, so that columns sum to 1.
  - We have one W a graph layer, k + 1 entries in each row of M, and edge weights from the image, as
    the paper does. The code has two W (for the node and for its neighbours), makes M symmetric, and
    its released model learns fixed edge weights. With one W, landmarks that share a row of M (of 68
    with k = 3 ten pairs, as 36 and 41 of an eye) differ by their edges' weights alone, and not at
    all with --adjacency binary; a second W gained nothing on 1,207 photographs.
  - We average the loss over the coordinates, as the code does; Eq. (10) sums, which is 2N times
    larger and does not train at lr 0.01. Both terms use one l(.), as in the paper; the code's
    second term is always a soft wing.
  - The loss sees coordinates in px of a 256 px crop whatever --size is, for which the constants of
    Eq. (9) are made.
  - The head's output is added to the mean training face; paper and code start at (0, 0). The last
    layer is the same for all nodes, so it cannot hold a mean place for each landmark; the network
    would need tens of epochs to learn one elsewhere. The FC head is treated alike.
  - Eq. (1) is computed from the coordinates in the crops: in the images' own pixels, every landmark
    correlates with every other. An epoch of the balanced set is longer than the training set; how
    much is printed at the start.
  - A crop is the square about the true landmarks, 1.25 times as wide, cut from the image by one
    warp, grey outside; in the test, too, so that place and size of a face are known. The paper says
    "center-cropped"; the code reads files that were cropped beforehand.
  - From the code, as the paper is silent: z-score of each image and channel; 256 channels in
    map-to-node; 2N hidden units and a batch norm in the weighting network; an occluder of one
    random colour in half of the images, 20 % of the area, its centre anywhere; even bins of the
    absolute pose value.
  - Pose balancing aligns the shapes before it takes the principal component, as the paper's [2]
    does; the code does not align them.
  - Images are RGB and a mirrored x is W - 1 - x; in the code BGR and W - x.
  - We report the last epoch; the code the best of all epochs on the test set.
  - With --gpus N each process normalises its own share of the batch, as is usual for batch norms.
  - Small sets and short runs (faces, folder, youtube) are ours: Adam, a cosine, and epsilon 5. With
    the paper's 0.5 an error of 2 px pulls 12 times as hard as one of 30 px, with 5 five times; a
    short run has few errors of 2 px.
  - Table V's 5.165 GFLOPs counts a multi-scale node embedding that the paper does not describe;
    with the one that it does, ResNet34 has 4.918 G multiply-adds in its convolutions.
"""
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, datasets, metrics, photos, run, synthetic, warp

# ---- Settings ------------------------------------------------------------------------------------

# Sec. IV-B. The paper names no backbone for its best rows; HRNetW18C has their 4.35 % in Table I.
PAPER = dict(size=256, epochs=500, batch_size=64, lr=0.01, weight_decay=5e-4, backbone="hrnet_w18",
             k=3, lam=1.0, pdb=9, drops=4, norm="io", threshold=0.10, margin=1.25, eval_every=10)
SMALL = dict(size=128, epochs=30, batch_size=16, pdb=0, optimizer="adam", lr=5e-3, weight_decay=0.0,
             schedule="cosine", epsilon=5.0, backbone="mobilenetv2", norm="auto", cache="device",
             eval_every=1)
PRESETS = {
    "wflw": {},  # Table II
    "300w": {},  # Table IV
    "cofw": {},  # Table III, left
    "cofw68": {},  # Table III, right: trained on 300-W; --data-root is the folder of both sets
    "helen": {},
    "aflw": dict(norm="face"),
    "jd106": dict(norm="box", threshold=0.08),  # the challenge's own measure
    "csv": dict(norm="auto"),  # HRNet's tables of any set
    "youtube": SMALL,
    "folder": SMALL,
    "faces": dict(SMALL, size=96, epochs=6, eval_every=2, rotate=20.0, shift=4.0, occlude=0.25),
}
DRAWN = {"train": 3200, "test": 400}  # faces of --data faces


def parse_args(argv=None):
    """The flags of all scripts and this paper's, with the defaults of --data's preset."""
    parser = run.make_parser("sdfl", "Structure-coherent face alignment", PAPER, PRESETS, argv)
    run.add_landmark_flags(parser)
    add = parser.add_argument_group("SDFL").add_argument
    add("--backbone", default="hrnet_w18", choices=BACKBONES, help="Table I's network")
    add("--head", default="graph", choices=["graph", "fc"], help="graph, or Table I's baseline")
    add("--loss", default="softwing", choices=LOSSES, help="l(.) of Eq. (10), for both terms")
    add("--epsilon", type=run.above_zero, default=0.5, help="curvature of the wings (Table VII)")
    add("--lam", type=run.nonnegative, default=1.0, help="lambda of Eq. (10), weight of the "
        "relative location loss")
    add("--k", type=run.natural, default=3, help="neighbours of a landmark (Fig. 8)")
    add("--adjacency", default="dynamic", choices=["dynamic", "binary"], help="edge weights from "
        "the image, or equal ones (Table VI)")
    add("--pdb", type=run.natural, default=9, help="bins of pose-based data balancing, 0: none; an "
        "epoch gets longer")
    add("--schedule", default="steps", choices=["steps", "cosine"], help="the rate is divided by 5 "
        "--drops times, as in the paper; or rises for 8 %% of the run and falls as a cosine")
    add("--drops", type=run.natural, default=4, help="of --schedule steps, evenly over the run")
    add("--optimizer", default="sgd", choices=["sgd", "adam"], help="the paper's SGD with momentum "
        "0.9, or Adam, which learns faster in a short run")
    add("--rotate", type=run.within(float, 0, 180), default=40.0, help="largest rotation, degrees")
    add("--shift", type=run.within(float, 0, 128), default=30.0, help="largest shift, px of 256")
    add("--occlude", type=run.fraction, default=0.5, help="share of images with an occluder")
    add("--flip-test", action="store_true", help="average with the mirrored image's prediction")
    return run.parse(parser, argv)


# ---- Network: Sec. III-A to III-C, Fig. 3 and 5 --------------------------------------------------

EXPANSION = 4  # n of Sec. III-A: channels of the feature map that become one node


def neighbour_mask(landmarks: torch.Tensor, k: int) -> torch.Tensor:
    """The neighbourhood M of Eq. (2): each landmark's k most correlated others, and itself.

    Args: landmarks (images, N, 2) of the training set in a common frame, px of the crops before
        augmentation; k: 0 <= k < N.
    Returns: (N, N) bool, True on the diagonal, k + 1 True in each row; in general not symmetric.
    Raises: UserError for fewer than 2 images, k out of range, or a landmark that moves in neither x
        nor y. One that moves in x or y only (a crop's box can pin the other) is uncorrelated there,
        with a warning.
    """
    count, points = landmarks.shape[:2]
    if count < 2:
        raise UserError(f"neighbours are mined from at least 2 training images, found {count}")
    if not 0 <= k < points:
        raise UserError(f"--k {k}: expected 0 to {points - 1}, less than the {points} landmarks")
    xy = landmarks.permute(2, 0, 1).contiguous().double()  # (2, M, N)
    xy -= xy.mean(1, keepdim=True)
    # (2, N, N); NumPy computes half of a symmetric product, and mirrors it
    products = torch.from_numpy(xy.mT.numpy() @ xy.numpy())
    scale = products.diagonal(0, 1, 2).sqrt()  # (2, N)
    if not scale.isfinite().all():
        raise UserError("the training landmarks hold values that are not finite")
    still = scale <= 1e-9 * landmarks.abs().amax().clamp(min=1) * math.sqrt(count)
    if still.all(0).any():
        first = int(still.all(0).nonzero()[0])
        raise UserError(f"landmark {first} has the same place in all {count} training images, so "
                        "it has no neighbours; check the annotation, or train on more images")
    if still.any():
        first = int(still.any(0).nonzero()[0])
        warnings.warn(f"landmark {first} is constant in one coordinate over the training set: "
                      "taken as correlation 0 there", stacklevel=2)
    scale = scale.masked_fill(still, math.inf)
    # Pearson's C_x and C_y, (2, N, N)
    correlation = products / (scale[:, :, None] * scale[:, None])
    correlation = correlation.abs().mean(0)  # Eq. (1): C = (abs(C_x) + abs(C_y)) / 2
    # Eq. (2): the k + 1 largest of each row. A landmark is its own first, so that ties cannot
    # displace it.
    correlation.fill_diagonal_(math.inf)
    nearest = correlation.argsort(dim=1, descending=True, stable=True)[:, :k + 1]
    mask = torch.zeros(points, points, dtype=torch.bool, device=landmarks.device)
    return mask.scatter_(1, nearest, True)


class MapToNode(nn.Module):
    """Sec. III-A: feature map -> node features, by two blocks of convolution, batch norm and ReLU.
    (B, C, h, w) -> (B, 4N, h, w); node i owns channels 4i to 4i + 3, so `.reshape(B, N, -1)` is
    H^0."""

    def __init__(self, in_channels: int, points: int):
        super().__init__()
        self.blocks = nn.Sequential(conv_bn(in_channels, 256, 3, act=nn.ReLU),
                                    conv_bn(256, EXPANSION * points, 3, act=nn.ReLU))  # 256: code

    def forward(self, features):
        return self.blocks(features)


class DynamicAdjacency(nn.Module):
    """Sec. III-B: a weight for each edge of M from the image: global average pooling and two linear
    layers. (B, 4N, h, w) -> sigma(A) (B, N, N), the softmax over a row's edges: rows sum to 1, the
    rest is 0.   Raises: UserError for one image in training."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.points = len(mask)
        nodes = EXPANSION * len(mask)
        self.register_buffer("edges", mask.flatten().nonzero()[:, 0])  # row by row
        # Hidden width and batch norm: code. Without the norm nearly all hidden units die within a
        # hundred steps, as all inputs are positive, and the weights are the same for every image;
        # with it, behind the ReLU as in the code, a third to a half stay alive.
        self.mlp = nn.Sequential(nn.Linear(nodes, nodes // 2), nn.ReLU(inplace=True),
                                 nn.BatchNorm1d(nodes // 2),
                                 nn.Linear(nodes // 2, len(self.edges)))

    def forward(self, maps):
        if self.training and len(maps) < 2:
            raise UserError("a training batch of 1 image: batch norm needs two; raise --batch-size")
        a = self.mlp(maps.mean((2, 3)))  # (B, edges)
        A = a.new_full((len(a), self.points**2), -math.inf)
        A = A.index_copy(1, self.edges, a).view(-1, self.points, self.points)
        return A.softmax(dim=2)


class GraphConv(nn.Module):
    """sigma(A) H W of Eq. (4): (B, N, in), (B, N, N) -> (B, N, out); all nodes share `.weight` (in,
    out)."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(in_features, out_features)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, nodes, sigma_A):
        nodes = sigma_A @ (nodes @ self.weight)  # H W first: cheaper at 256 px, where 4hw > 128
        return nodes if self.bias is None else nodes + self.bias


class GraphLayer(nn.Module):
    """Eq. (3): H^(l+1) = f(H^l, A), a graph convolution, then batch norm over images and nodes,
    then ReLU."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.conv = GraphConv(in_features, out_features, bias=False)
        self.norm = nn.BatchNorm1d(out_features)

    def forward(self, nodes, sigma_A):
        # Eq. (4): H^(l+1) = psi(sigma(A) H^l W^l), psi = batch norm and ReLU
        nodes = self.conv(nodes, sigma_A)                                  # (B, N, out)
        return F.relu(self.norm(nodes.flatten(0, 1))).view(nodes.shape)


class GraphBlock(nn.Module):
    """Eq. (5): two graph layers and the identity; nothing after the addition."""

    def __init__(self, features: int):
        super().__init__()
        self.first = GraphLayer(features, features)
        self.second = GraphLayer(features, features)

    def forward(self, nodes, sigma_A):
        # Eq. (5): H^(l+1) = f(H^l, A);  H^(l+2) = f(H^(l+1), A) + H^l
        return self.second(self.first(nodes, sigma_A), sigma_A) + nodes


class GraphHead(nn.Module):
    """Fig. 3 right of the backbone, and Fig. 5: node embedding, a graph layer, four blocks, a graph
    convolution. Feature map (B, C, h, w), of h w = `cells` -> offsets from the mean face (B, N, 2)
    in px of a 256 px crop. sigma(A) is computed once and used by all layers."""

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
        with torch.autocast(maps.device.type, enabled=False):  # in bfloat16 32 px has steps of 0.25
            maps = maps.float()
            if self.adjacency:
                sigma_A = self.adjacency(maps)  # (B, N, N)
            else:
                sigma_A = self.uniform.expand(len(maps), -1, -1)
            nodes = maps.reshape(len(maps), sigma_A.shape[1], -1)  # (B, N, 4hw)
            nodes = self.first(nodes, sigma_A)  # (B, N, 128)
            for block in self.blocks:
                nodes = block(nodes, sigma_A)
            return self.last(nodes, sigma_A)  # (B, N, 2)


class FCHead(nn.Module):
    """Table I's baseline: feature map (B, C, h, w) -> 256 units with ReLU -> (B, N, 2) px, like
    GraphHead."""

    def __init__(self, in_channels: int, points: int, cells: int):
        super().__init__()
        self.hidden = nn.Linear(in_channels * cells, 256)
        self.last = nn.Linear(256, 2 * points)

    def forward(self, features):
        hidden = F.relu(self.hidden(features.flatten(1)))
        with torch.autocast(hidden.device.type, enabled=False):  # float32, as in GraphHead
            return self.last(hidden.float()).unflatten(1, (-1, 2))


class SDFL(nn.Module):
    """Fig. 3: image (B, 3, size, size), normalised -> landmarks (B, N, 2) in px of the crop.

    Args: backbone, a name of BACKBONES; mask (N, N) bool, a buffer, so that a checkpoint brings its
        graph along; size, the crop's side in px; head, "graph" or "fc"; dynamic, edge weights by
        image or equal.
    Buffer: mean_face (N, 2) px of a 256 px crop, to which the head adds; until it is set, the
        crop's middle.
    Raises: ValueError for a backbone or head that does not exist.
    """

    def __init__(self, backbone: str, mask: torch.Tensor, size: int = 256, head: str = "graph",
                 dynamic: bool = True):
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone {backbone!r}: expected one of {', '.join(BACKBONES)}")
        if head not in ("graph", "fc"):
            raise ValueError(f"head {head!r}: expected 'graph' or 'fc'")
        self.size = size
        cells = (size // 32) ** 2  # of the feature map
        self.register_buffer("mask", mask)
        self.register_buffer("mean_face", torch.full((len(mask), 2), 127.5))
        self.backbone = BACKBONES[backbone]()
        if head == "graph":
            self.head = GraphHead(self.backbone.channels, mask, cells, dynamic)
        else:
            self.head = FCHead(self.backbone.channels, len(mask), cells)

    def forward(self, image):
        return (self.mean_face + self.head(self.backbone(image))) * (self.size / 256)


# ---- Loss: Sec. III-D ----------------------------------------------------------------------------

def laplacian(mask: torch.Tensor) -> torch.Tensor:
    """Uniform Laplacian L of Eq. (7) for M (N, N): (N, N) float32. Rows sum to 0, to 1 without
    neighbours."""
    neighbours = mask.float()
    neighbours.fill_diagonal_(0)  # N_i holds the others only: k of them
    omega = neighbours / neighbours.sum(1, keepdim=True).clamp(min=1)  # omega_ij = 1 / |N_i|
    # Eq. (7), and row i of L P is Eq. (6): delta_i = p_i - sum_j omega_ij p_j
    return torch.eye(len(mask), device=mask.device) - omega


def soft_wing(x: torch.Tensor, omega1=2.0, omega2=20.0, eps=0.5) -> torch.Tensor:
    """Soft wing loss of each element of x, px of a 256 px crop: linear below omega1, a logarithm
    above."""
    x = x.abs()
    B = omega1 - omega2 * math.log(1 + omega1 / eps)
    return torch.where(x < omega1, x, omega2 * torch.log1p(x / eps) + B)  # Eq. (9)


def wing(x: torch.Tensor, omega=20.0, eps=0.5) -> torch.Tensor:
    """Wing loss [2] of every element of x, in px of a 256 px crop; omega as in Fig. 6."""
    x = x.abs()
    C = omega - omega * math.log(1 + omega / eps)
    return torch.where(x < omega, omega * torch.log1p(x / eps), x - C)  # Eq. (11)


LOSSES = {"softwing": soft_wing, "wing": wing, "l1": lambda x, eps=None: x.abs()}


def sdfl_loss(pred: torch.Tensor, target: torch.Tensor, L: torch.Tensor, lam: float,
              l: Callable) -> torch.Tensor:
    """The overall loss, a scalar: the mean over images and coordinates of both terms.

    Args: pred, target (B, N, 2) px of a 256 px crop; L (N, N) of `laplacian`; lam, the weight
        lambda; l, a loss of each element, (B, N, 2) -> (B, N, 2), as `soft_wing`.
    """
    error = pred - target
    relative = L @ error  # Eq. (8): Delta = L P, and hence L P^ - L P = L (P^ - P)
    return l(error).mean() + lam * l(relative).mean()  # Eq. (10)


# ---- Data: augmentation and pose balancing of Sec. IV-B ------------------------------------------

ZOOM = 0.10  # sizes 0.9 to 1.1
OCCLUDER = 0.20  # of the crop's area


def reach(rotate: float, shift: float) -> float:
    """Side of the region that augmentation can bring into the crop, over the crop's side; shift, px
    of a 256 px crop."""
    turned = math.sqrt(2) * math.cos(math.radians(max(45 - rotate, 0)))
    return turned * (1 + 2 * shift / 256) / (1 - ZOOM)


def augment(rng: np.random.Generator, size: int, rotate: float = 40.0, shift: float = 30.0,
            occlude: float = 0.5):
    """Draws rotation, scale, shift, mirror and an occluding rectangle for one face.
    Args: rotate, degrees; shift, px of a 256 px crop; occlude, the share of faces.
    Returns: matrix (2, 3) crop px -> crop px; whether to mirror; {"occluder": (7,) x0 y0 x1 y1 px r
        g b}."""
    angle = math.radians(rng.uniform(-rotate, rotate))
    zoom = rng.uniform(1 - ZOOM, 1 + ZOOM)
    c = zoom * math.cos(angle)
    s = zoom * math.sin(angle)
    middle = (size - 1) / 2
    dx, dy = rng.uniform(-shift, shift, 2) * size / 256
    matrix = np.array([[c, s, middle - (c + s) * middle + dx],
                       [-s, c, middle - (c - s) * middle + dy]])
    mirror = rng.random() < 0.5
    hide = rng.random() < occlude
    aspect = rng.uniform(0.4, 2.5)
    x, y = rng.uniform(0, size, 2)
    w = size * math.sqrt(OCCLUDER * aspect) / 2
    h = size * math.sqrt(OCCLUDER / aspect) / 2
    colour = rng.integers(0, 256, 3)
    occluder = np.array([x - w, y - h, x + w, y + h, *colour]) if hide else np.full(7, -1.0)
    return matrix, mirror, {"occluder": occluder}


def prepare(batch: dict, device: torch.device) -> torch.Tensor:
    """Network input (B, 3, H, W) from a batch: occluded if it says so, each image and channel
    z-scored."""
    image = batch["image"].to(device, non_blocking=True)
    if image.dtype == torch.uint8:  # (B, H, W, 3) of the loader; permuted, it is channels_last
        image = image.permute(0, 3, 1, 2).float()
    if "occluder" in batch:
        image = occlude(image, batch["occluder"].to(device, non_blocking=True))
    std, mean = torch.std_mean(image, (2, 3), correction=0, keepdim=True)
    return ((image - mean) / std.clamp(min=1e-6)).contiguous(memory_format=torch.channels_last)


def occlude(image: torch.Tensor, occluder: torch.Tensor) -> torch.Tensor:
    """Fills the rectangles (B, 7) x0 y0 x1 y1 r g b of images (B, 3, H, W) in 0..255."""
    y = torch.arange(image.shape[2], device=image.device, dtype=torch.float32)
    x = torch.arange(image.shape[3], device=image.device, dtype=torch.float32)
    x0, y0, x1, y1 = occluder[:, :4, None].unbind(1)  # (B, 1) each
    columns = (x >= x0) & (x < x1)  # (B, W)
    rows = (y >= y0) & (y < y1)  # (B, H)
    inside = columns[:, None, None] & rows[:, None, :, None]  # (B, 1, H, W)
    return torch.where(inside, occluder[:, 4:, None, None], image)


def pose_bins(landmarks: torch.Tensor, bins: int) -> torch.Tensor:
    """Pose bins of the pose-based data balancing [2]: (M, N, 2) -> (M,) long in 0..bins - 1.

    Shapes are aligned to their mean by similarities (Procrustes), projected on the first principal
    component, for faces the yaw, and binned evenly by its absolute value: its sign means nothing,
    and a mirror flips it.
    """
    shapes = landmarks.double()
    shapes = shapes - shapes.mean(1, keepdim=True)
    mean = shapes[0]
    for _ in range(5):  # the mean shape settles within two or three rounds
        aligned = warp.apply_affine(warp.fit_similarity(shapes, mean.expand_as(shapes)), shapes)
        mean = aligned.mean(0)
        mean = (mean - mean.mean(0)) / mean.norm() * shapes[0].norm()  # or it would shrink
    flat = (aligned - aligned.mean(0)).flatten(1)  # (M, 2N)
    component = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -1]
    score = (flat @ component).abs()
    edges = torch.linspace(float(score.min()), float(score.max()), bins + 1, dtype=score.dtype)
    return torch.bucketize(score, edges[1:-1], right=True)


def balanced(landmarks: torch.Tensor, bins: int) -> np.ndarray:
    """Index (L,) repeating faces of rare poses until each bin is about as full as the fullest,
    after [2]."""
    bin_of = pose_bins(landmarks, bins).numpy()
    size = np.bincount(bin_of, minlength=bins)
    copies = np.round(size.max() / np.maximum(size, 1)).astype(int)[bin_of]
    return np.repeat(np.arange(len(bin_of)), copies)


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
    """A split as crops by --box, --margin and --size; the training split augmented and balanced."""
    faces = read_faces(args, split)
    boxes = datasets.face_boxes(faces, args.box)
    crops = datasets.square_crops(boxes, args.size, args.margin)
    if split == "test":
        data = datasets.CropDataset(faces, crops, args.size)
        data.divisors(args.norm)  # what is wrong with them is said now, not after an epoch
        return data
    scheme = datasets.SCHEMES.get(len(faces[0].points))
    flip = scheme.flip if scheme else None
    draw = partial(augment, rotate=args.rotate, shift=args.shift, occlude=args.occlude)
    data = datasets.CropDataset(faces, crops, args.size, draw, reach(args.rotate, args.shift),
                                1 + ZOOM, flip, args.seed)
    if args.pdb:
        index = balanced(data.crop_points(), args.pdb)
        data.rows = np.stack([index, np.zeros_like(index)], 1)  # none of them mirrored
    return data


# ---- Training: Sec. IV-B -------------------------------------------------------------------------

def learning_rate(step: int, steps: int, base: float, drops: int = 4,
                  schedule: str = "steps") -> float:
    """The rate of a step: divided by 5, `drops` times, evenly over the run (with 4: every 100
    epochs of 500); or risen in a line over 8 % of the run, times half a cosine from 1 to 0."""
    if schedule == "steps":
        return base * 0.2 ** ((drops + 1) * step // steps)
    rise = min((step + 1) / (0.08 * steps), 1)
    return base * rise * (1 + math.cos(math.pi * step / steps)) / 2


def build(args, mask: torch.Tensor, device: torch.device) -> SDFL:
    """The network that the flags describe, with the graph of `mask`."""
    net = SDFL(args.backbone, mask, args.size, args.head, args.adjacency == "dynamic")
    return net.to(device, memory_format=torch.channels_last)


def train(args) -> dict:
    """Trains, evaluates or predicts, as the flags say; returns the numbers of the last
    evaluation."""
    if args.eval:
        return evaluate_checkpoint(args)
    if args.predict:
        return predict(args)
    job = run.Job(args)
    # Data
    train_set = make_dataset(args, "train")
    test_set = make_dataset(args, "test")
    landmarks = train_set.crop_points()
    points = landmarks.shape[1]
    if test_set.points.shape[1] != points:
        raise UserError(f"training faces have {points} landmarks, test faces "
                        f"{test_set.points.shape[1]}")
    job.say(f"{len(train_set.faces)} training faces ({len(train_set)} an epoch), {len(test_set)} "
            f"test faces, {points} landmarks")
    if points not in datasets.SCHEMES:
        job.say(f"{points} landmarks are no known scheme: no mirroring, errors over their box")
    between = args.epochs / (args.drops + 1)  # epochs from one drop of the rate to the next
    if args.schedule == "steps" and args.drops > 1 and between < 4:
        job.say(f"note: --drops {args.drops} leaves {between:.1f} of {args.epochs} epochs at the "
                "full rate; in a short run fewer drops learn more")
    # Network and optimizer
    mask = job.state["model"]["mask"] if job.state else neighbour_mask(landmarks, args.k)
    net = build(args, mask, job.device)
    net.mean_face.copy_(landmarks.mean(0) * (256 / args.size))
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9,
                                    weight_decay=args.weight_decay, fused=True)
    else:
        optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay,
                                     fused=True)
    job.restore(net, optimizer, [len(train_set), points], net.backbone)
    model = job.wrap(net)
    L = laplacian(net.mask)
    loss_function = partial(LOSSES[args.loss], eps=args.epsilon)
    scale = 256 / args.size
    job.begin(train_set)
    if job.rank == 0:
        test_batches = datasets.in_order(len(test_set), 64)
        test_loader = run.make_loader(args, test_set, test_batches, job.device)
    results = None
    for epoch in job.epochs():
        net.train()
        for step, batch in job.steps_of(epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.epochs * job.steps, args.lr, args.drops,
                                            args.schedule)
            image = prepare(batch, job.device)
            target = batch["points"].to(job.device, non_blocking=True)
            with run.precision(args, job.device):
                pred = model(image)
            loss = sdfl_loss(pred * scale, target * scale, L, args.lam, loss_function)
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
    return scores


# ---- Evaluation: Sec. IV-A -----------------------------------------------------------------------

@torch.inference_mode()
def predict_points(net: SDFL, image: torch.Tensor, flip=None) -> torch.Tensor:
    """Points (B, N, 2) px of prepared crops; with `flip` (N,), averaged with the mirrored
    crop's."""
    pred = net(image).float()
    if flip is not None:
        mirrored = net(image.flip(3)).float()
        mirrored[..., 0] = net.size - 1 - mirrored[..., 0]
        pred = (pred + mirrored[:, torch.as_tensor(flip, device=pred.device)]) / 2
    return pred


def flip_of(args, points: int):
    """The permutation for --flip-test, or None without the flag or without a known scheme."""
    return datasets.SCHEMES[points].flip if args.flip_test and points in datasets.SCHEMES else None


def evaluate(net: SDFL, loader, args) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """NME, FR and AUC in the pixels of the images, over the test set and its subsets.

    Args: loader, in order, of a CropDataset without augmentation.
    Returns: fractions "nme", "fr", "auc", "auc20" (the authors' 20 steps), "nme/pose", ... and
        "nme/mean face" (a constant answer); the NME of each face (M,); predictions (M, N, 2) image
        px.
    """
    net.eval()
    data = loader.dataset
    flip = flip_of(args, len(net.mask))
    pred = []
    with run.precision(args, net.mask.device):
        for batch in loader:
            pred.append(predict_points(net, prepare(batch, net.mask.device), flip).cpu())
    to_image = warp.invert(data.crop_matrices)  # crop px -> image px
    points = warp.apply_affine(to_image, torch.cat(pred).double())
    divisors = data.divisors(args.norm)
    errors = metrics.nme(points, data.points, divisors)  # Eq. (12)
    scores = metrics.landmark_scores(errors, datasets.subsets(data.faces), args.threshold)
    for subset, chosen in datasets.subsets(data.faces).items():
        name = f"auc20/{subset}" if subset else "auc20"
        scores[name] = metrics.auc_steps(errors[chosen])
    constant = (net.mean_face.cpu().double() * (net.size / 256)).expand_as(data.points)
    constant = warp.apply_affine(to_image, constant)
    scores["nme/mean face"] = float(metrics.nme(constant, data.points, divisors).mean())
    return scores, errors, points


def print_table(scores: dict, args, points: int):
    """The rows of Tables II to IV, a column for the full set and each subset."""
    flip = ", flip test" if args.flip_test else ""
    print(f"{args.data}: NME by {datasets.norm_kind(args.norm, points)}, FR and AUC at "
          f"{args.threshold:.2f}, crop {args.box} x {args.margin}{flip}")
    rows = {"NME (%)": "nme", "FR (%)": "fr", "AUC": "auc"}
    if args.data == "wflw":
        rows["AUC as Table II"] = "auc20"
    print(metrics.landmark_table(scores, rows))
    mean = scores["nme/mean face"]
    print(f"NME of predicting the mean training face for every image: {100 * mean:.2f} %")


def open_checkpoint(args, path: str) -> tuple[SDFL, dict]:
    """A checkpoint's network, in evaluation mode, and its flags, which `args` takes over."""
    state, device = run.open_checkpoint(args, path)
    if "mask" not in state["model"]:
        raise UserError(f"{path}: its weights have no mask of neighbours; the file was changed")
    net = build(args, state["model"]["mask"], device)
    run.load_weights(net, state["model"], path)
    return net.eval(), state["args"]


def evaluate_checkpoint(args) -> dict:
    """--eval: the numbers of a checkpoint on the test set of --data; with --output, pictures
    too."""
    net, _ = open_checkpoint(args, args.eval)
    folder = run.find_run(args)
    data = make_dataset(args, "test")
    points = data.points.shape[1]
    if points != len(net.mask):
        raise UserError(f"--eval {args.eval}: the model has {len(net.mask)} landmarks, the faces "
                        f"of --data {args.data} have {points}")
    batches = datasets.in_order(len(data), args.batch_size)
    loader = run.make_loader(args, data, batches, net.mask.device)
    scores, errors, found = evaluate(net, loader, args)
    print_table(scores, args, points)
    if folder:
        write_pictures(run.make_run(args, folder), net, data, errors, found, args.threshold)
    return scores


def predict(args) -> dict:
    """--predict: each face's landmarks as NAME.pts, and each image as NAME.png with them drawn."""
    net, trained = open_checkpoint(args, args.weights)
    photos.fold_batch_norms(net, args.size)
    flip = flip_of(args, len(net.mask))

    def answer(crop: dict, last: bool) -> torch.Tensor:
        with run.precision(args, net.mask.device):
            return predict_points(net, prepare(crop, net.mask.device), flip).cpu()

    photos.predict_landmarks(args, answer, passes=2 if trained["box"] == "landmarks" else 1)
    return {}


# ---- Figures -------------------------------------------------------------------------------------

def draw_graph(mask: torch.Tensor, mean_face: torch.Tensor, side: int = 640) -> np.ndarray:
    """Fig. 4: the adjacency matrix, and its edges on the mean face (N, 2) px of a 256 px crop."""
    cells = np.repeat(255 - 255 * mask.cpu().numpy().astype(np.uint8)[..., None], 3, 2)
    matrix = cv2.resize(cells, (side, side), interpolation=cv2.INTER_NEAREST)
    cv2.rectangle(matrix, (0, 0), (side - 1, side - 1), (160, 160, 160))
    face = np.full((side, side, 3), 255, np.uint8)
    places = (mean_face.cpu().numpy() + 0.5) * side / 256 - 0.5
    corners = np.round(16 * places).astype(int).tolist()  # cv2 takes 4 bits after the point
    for i, j in mask.cpu().nonzero().tolist():
        cv2.line(face, corners[i], corners[j], (90, 140, 220), 1, cv2.LINE_AA, 4)
    return np.concatenate([matrix, photos.draw_points(face, places, (200, 40, 40), 3)], 1)


def write_pictures(folder: Path, net: SDFL, data, errors, points, threshold: float):
    """What the paper's figures show, from this run: graph.png, predictions.png (Fig. 7),
    ced.png."""
    datasets.write_image(folder / "graph.png", draw_graph(net.mask, net.mean_face))
    datasets.write_image(folder / "predictions.png", photos.draw_predictions(data, points))
    subsets = datasets.subsets(data.faces)
    curves = {name or "full": errors[chosen] for name, chosen in subsets.items()}
    datasets.write_image(folder / "ced.png", metrics.ced_plot(curves, threshold))


# ---- Backbones: as published, nothing of this paper ----------------------------------------------

# Table I's eight networks, each up to its last map: image (B, 3, H, W) -> (B, channels, H/32,
# W/32), H and W multiples of 32. Parameters are named as in the usual checkpoints (torchvision's;
# timm's for Res2Net; its authors' for HRNet), which load by name once the layers behind that map
# are dropped. Paper: from scratch.


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
            if m.bias is not None:  # VGG's; squeeze-excitation's, whose gates start half open
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


class Bottle2neck(nn.Module):
    """Bottleneck whose 3x3 is one on each of 4 splits: (B, cin, H, W) -> (B, 4 planes, H/stride,
    W/stride). Splits 2 and 3 first add the output of the split before; split 4 passes as it is. The
    first block of a stage, where outputs are smaller than splits if it strides, adds nothing and
    average-pools split 4.
    Source: Gao et al., "Res2Net", TPAMI 2021, Fig. 2b. 26w_4s: 4 splits of 26 channels at planes =
    64."""
    expansion = 4

    def __init__(self, cin: int, planes: int, stride: int = 1):
        super().__init__()
        width = planes * 26 // 64
        self.stride = stride
        self.first = stride > 1 or cin != 4 * planes
        self.conv1, self.bn1 = conv(cin, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.convs = nn.ModuleList(conv(width, width, 3, stride) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.conv3, self.bn3 = conv(4 * width, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.downsample = conv_bn(cin, 4 * planes, 1, stride) if self.first else nn.Identity()

    def forward(self, x):
        maps = F.relu(self.bn1(self.conv1(x)), inplace=True)
        *splits, last = maps.chunk(4, dim=1)                          # 4 of (B, width, H, W)
        outs = []
        for split, conv3x3, bn in zip(splits, self.convs, self.bns):
            split = split if self.first or not outs else split + outs[-1]
            outs.append(F.relu(bn(conv3x3(split)), inplace=True))     # (B, width, H/s, W/s)
        outs.append(F.avg_pool2d(last, 3, self.stride, 1) if self.first else last)
        out = self.bn3(self.conv3(torch.cat(outs, dim=1)))
        return F.relu(out + self.downsample(x), inplace=True)


class ResNet(nn.Module):
    """7x7 stem and four stages of `depths` blocks: (B, 3, H, W) -> (B, 512 expansion, H/32, W/32).
    Source: He et al., CVPR 2016, Table 1. Code: batch-norm momentum 0.01 in stem and shortcuts;
    here 0.1."""

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


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate in (0, 1) made of the means of all: (B, C, H, W) -> the same.
    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018; SiLU for ReLU as in
    EfficientNet."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        hidden = F.silu(self.fc1(x.mean((2, 3), keepdim=True)), inplace=True)  # (B, squeezed, 1, 1)
        return x * self.fc2(hidden).sigmoid()


class MBConv(nn.Module):
    """Inverted residual with squeeze-excitation: (B, cin, H, W) -> (B, cout, H/stride, W/stride).
    In training an image skips a residual block with chance `drop` (stochastic depth: Huang et al.,
    ECCV 2016).
    Source: Tan & Le, "EfficientNet", ICML 2019, Sec. 4 and the authors' code."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, expand: int, drop: float):
        super().__init__()
        hidden = cin * expand
        self.drop = drop
        self.residual = stride == 1 and cin == cout
        widen = [conv_bn(cin, hidden, 1, act=nn.SiLU)] if expand > 1 else []
        depthwise = conv_bn(hidden, hidden, kernel, stride, groups=hidden, act=nn.SiLU)
        squeeze = SqueezeExcitation(hidden, cin // 4)  # a quarter of the input width
        self.block = nn.Sequential(*widen, depthwise, squeeze, conv_bn(hidden, cout, 1))

    def forward(self, x):
        out = self.block(x)
        if self.training and self.residual and self.drop > 0:
            keep = 1 - self.drop  # divided out, so that evaluation has the same expectation
            out = out * out.new_empty(len(out), 1, 1, 1).bernoulli_(keep).div_(keep)
        return x + out if self.residual else out


class Features(nn.Module):
    """A chain of layers under the name `features`: (B, 3, H, W) -> (B, channels, H/32, W/32)."""

    def __init__(self, layers: Sequence[nn.Module], channels: int):
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.channels = channels
        init_weights(self)

    def forward(self, image):
        return self.features(image)


def mobilenetv2() -> Features:
    """Sandler et al., CVPR 2018, Table 2, without the last 1x1 convolution, to 1280 channels (as
    code)."""
    cin = 32
    layers = [conv_bn(3, cin, 3, 2, act=nn.ReLU6)]
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
             (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, cout, depth, stride in table:
        for i in range(depth):
            layers.append(InvertedResidual(cin, cout, 1 if i else stride, expand))
            cin = cout
    return Features(layers, 320)


def efficientnet(depths: Sequence[int]) -> Features:
    """Tan & Le, ICML 2019, Table 1, `depths` blocks in the 7 stages; with the last 1x1 convolution
    (1280). Padding is symmetric; code: TensorFlow's, with a strided layer's odd row and column
    below and right."""
    cin = 32
    done = 0
    layers = [conv_bn(3, cin, 3, 2, act=nn.SiLU)]
    table = ((1, 3, 16, 1), (6, 3, 24, 2), (6, 5, 40, 2), (6, 3, 80, 2), (6, 5, 112, 1),
             (6, 5, 192, 2), (6, 3, 320, 1))
    for (expand, kernel, cout, stride), depth in zip(table, depths):
        blocks = []
        for i in range(depth):
            drop = 0.2 * done / sum(depths)  # rises: all later blocks build on an early one
            blocks.append(MBConv(cin, cout, kernel, 1 if i else stride, expand, drop))
            cin = cout
            done += 1
        layers.append(nn.Sequential(*blocks))
    return Features([*layers, conv_bn(320, 1280, 1, act=nn.SiLU)], 1280)


def vgg16() -> Features:
    """Simonyan & Zisserman, ICLR 2015, Table 1 column D, all five max-pools; with batch norm (as
    code)."""
    cin = 3
    layers = []
    for cout, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):  # the bias, useless before a batch norm, is in the checkpoints
            layers += [nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout)]
            layers.append(nn.ReLU(inplace=True))
            cin = cout
        layers.append(nn.MaxPool2d(2))
    return Features(layers, 512)


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
            # HRNet's code enlarges bilinearly for landmarks and segmentation, by nearest pixel
            # elsewhere.
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
    """HRNetV2-W18: (B, 3, H, W) -> (B, 270, H/32, W/32), branches of 18 to 144 channels at strides
    4 to 32. All are brought to stride 32 (Sec. IV-B): bilinearly, without a filter against aliasing
    (code).
    Source: Wang et al., TPAMI 2021. HRNet's code: batch-norm momentum 0.01; here 0.1."""

    def __init__(self, widths: Sequence[int] = (18, 36, 72, 144)):
        super().__init__()
        self.channels = sum(widths)
        self.conv1, self.bn1 = conv(3, 64, 3, 2), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = conv(64, 64, 3, 2), nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Bottleneck(64, 64), *(Bottleneck(256, 64) for _ in range(3)))
        # A transition grows a branch out of the lowest resolution so far. Older ones pass
        # unchanged, but for layer1's 256 channels. The outer Sequential is a level that the
        # checkpoints' names have.
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
        size = xs[-1].shape[-2:]  # (H/32, W/32)
        xs[:-1] = [F.interpolate(x, size, mode="bilinear") for x in xs[:-1]]
        return torch.cat(xs, dim=1)                                        # (B, 270, H/32, W/32)


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "mobilenetv2": mobilenetv2,
    "efficientnet_b0": lambda: efficientnet((1, 2, 2, 3, 3, 4, 1)),
    "efficientnet_b1": lambda: efficientnet((2, 3, 3, 4, 4, 5, 2)),  # 1.1 times as deep
    "vgg16": vgg16,
    "resnet18": lambda: ResNet(BasicBlock, (2, 2, 2, 2)),
    "resnet34": lambda: ResNet(BasicBlock, (3, 4, 6, 3)),
    "res2net50": lambda: ResNet(Bottle2neck, (3, 4, 6, 3)),
    "hrnet_w18": HRNet,
}


if __name__ == "__main__":
    run.main(train, parse_args())
