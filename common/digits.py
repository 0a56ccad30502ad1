"""MNIST's digits, upright on a canvas and under affine maps (affNIST), with five keypoints each.

Points are px of the canvas, pixel centres at whole numbers from 0, as in common/datasets.py.
"""
import gzip
import math
import os
import struct
import zlib

import cv2
import numpy as np
import torch

from common import UserError


def read_idx(path: str) -> np.ndarray:
    """Array uint8 of an MNIST idx file, .gz or not: images (N, 28, 28) or labels (N,).
    Format: big-endian uint32: 0x0800 + number of dimensions, then each dimension; then the bytes.
    Raises: FileNotFoundError; UserError if it is no such file, or not as long as it says."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no {path}; wanted an idx file of MNIST, as "
                                "train-images-idx3-ubyte.gz")
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            head = file.read(4)
            axes = head[-1] if head.startswith(b"\0\0\x08") else 0
            shape = struct.unpack(f">{axes}I", file.read(4 * axes))
            data = file.read(math.prod(shape) + 1)              # one byte too many would show
    except (OSError, EOFError, MemoryError, OverflowError, zlib.error, struct.error) as error:
        raise UserError(f"{path} is a damaged idx file: {error}") from None
    if not axes or len(data) != math.prod(shape):
        raise UserError(f"{path}: found {head!r}, shape {shape}, then {len(data)} bytes or more; "
                        "wanted an idx file")
    return np.frombuffer(data, np.uint8).reshape(shape).copy()


def read_mnist(root: str, split: str, limit: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) uint8 of MNIST's "train" or "test": idx files, .gz or not.
    Args: limit, at most so many; 0: all.   Raises: UserError where they do not belong together."""
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        name = {"train": "train", "test": "t10k"}[split]
        path = os.path.join(root, f"{name}-{kind}-ubyte")
        array = read_idx(path if os.path.isfile(path) else path + ".gz")
        arrays.append(array[:limit or None])
    images, labels = arrays
    if len(images) != len(labels) or images.ndim != 3 or labels.max() > 9:
        raise UserError(f"{root}: {split} has images {images.shape} and labels {labels.shape}, "
                        "expected as many of both, and labels from 0 to 9")
    return images, labels


def digit_points(images: np.ndarray) -> np.ndarray:
    """Corners and centre of the box of each digit: images (N, H, W) uint8 -> (N, 5, 2) float32 px.
    Order: top left, top right, bottom left, bottom right, centre. Upright, not the smallest turned
    box, which would tell the rotation; of the pixels above 30, as the faint edge of a warp is no
    digit.
    Raises: UserError for a blank image."""
    dark = np.flatnonzero(images.max((1, 2)) <= 30)
    if dark.size:
        raise UserError(f"image {dark[0]} has no pixel above 30, nor have {dark.size - 1} others: "
                         "no digits")
    columns = (images > 30).any(1)                                                      # (N, W)
    rows = (images > 30).any(2)                                                         # (N, H)
    left = columns.argmax(1)
    right = columns.shape[1] - 1 - columns[:, ::-1].argmax(1)
    top = rows.argmax(1)
    bottom = rows.shape[1] - 1 - rows[:, ::-1].argmax(1)
    x = np.stack([left, right, left, right, (left + right) / 2], 1)
    y = np.stack([top, top, bottom, bottom, (top + bottom) / 2], 1)
    return np.stack([x, y], -1).astype(np.float32)


def affnist(images: np.ndarray, seed, count_per_image: int = 1, canvas: int = 40):
    """Digits under random affine maps, as affNIST: rotation to 20 degrees, shear along x to 0.2,
    each axis scaled by 0.8 to 1.2, then shifted to anywhere inside the canvas. All uniform.
    Assumed: these are the set's ranges, from its description; KP-RPE's paper gives none.
    Args: images (N, H, W) uint8.
    Returns: (M, canvas, canvas) uint8; points (M, 5, 2) px as `digit_points`; (M,) int64, the image
        of each.
    Raises: UserError for a blank image, or one that does not fit."""
    digit_points(images)                                                             # none is blank
    source = np.repeat(np.arange(len(images)), count_per_image)
    rng = np.random.default_rng(seed)
    turn = np.deg2rad(rng.uniform(-20, 20, len(source)))
    shear = rng.uniform(-0.2, 0.2, len(source))
    scale = rng.uniform(0.8, 1.2, (len(source), 1, 2))
    place = rng.random((len(source), 2))
    cos, sin = np.cos(turn), np.sin(turn)
    # rotation, then of what is right of it, shear: [[c, -s], [s, c]] [[1, k], [0, 1]] diag(scale)
    linear = np.stack([cos, cos * shear - sin, sin, sin * shear + cos], -1)
    linear = linear.reshape(-1, 2, 2) * scale
    out = np.empty((len(source), canvas, canvas), np.uint8)
    for n, i in enumerate(source):
        y, x = images[i].nonzero()
        moved = linear[n] @ np.stack([x, y])                                                # (2, K)
        reach = np.abs(linear[n]).sum(1)              # interpolation spreads a pixel so far at most
        low = reach - 1 - moved.min(1)
        high = canvas - reach - moved.max(1)
        if (low > high).any():
            raise UserError(f"image {i} does not fit a canvas of {canvas} px under every map; give "
                            "a larger one")
        matrix = np.column_stack([linear[n], low + place[n] * (high - low)])
        cv2.warpAffine(images[i], matrix, (canvas, canvas), dst=out[n], flags=cv2.INTER_LINEAR)
    return out, digit_points(out), source


def mnist_canvas(images: np.ndarray, seed, shift: int = 6, canvas: int = 40):
    """Digits to train on, for tests with `affnist`: in the middle of a black canvas, moved by up to
    `shift` whole px each way, uniform. An assumption: the protocol of Sabour et al. 2017, whom
    KP-RPE's paper cites.
    Returns: (N, canvas, canvas) uint8 and points (N, 5, 2) px as `digit_points`."""
    count, height, width = images.shape
    if max(height, width) + 2 * shift > canvas:
        raise UserError(f"images of {height} x {width} px moved by {shift} leave the canvas of "
                         f"{canvas} px")
    corner = (canvas - np.array([height, width])) // 2
    corner = corner + np.random.default_rng(seed).integers(-shift, shift + 1, (count, 2))
    out = np.zeros((count, canvas, canvas), np.uint8)
    y, x = (corner[:, axis, None] + np.arange(side) for axis, side in enumerate((height, width)))
    out[np.arange(count)[:, None, None], y[:, :, None], x[:, None]] = images
    return out, digit_points(out)


class Digits(torch.utils.data.Dataset):
    """Digits in batches, as `datasets.CropDataset` has faces, but gray: image (B, size, size, 1).
    Args: images (N, 28, 28) uint8, put on a canvas anew in each epoch, a function of (seed, epoch,
        index); or canvases (N, size, size) with their points (N, 5, 2), which stay; labels (N,)."""

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
        if self.points is not None:
            image, points = self.images[index], self.points[index]
        else:
            drawn = [mnist_canvas(self.images[i:i + 1], (self.seed, epoch, i), canvas=self.size)
                     for epoch, i in keys]
            image, points = (np.concatenate(arrays) for arrays in zip(*drawn))
        return {"image": torch.from_numpy(image)[..., None], "points": torch.from_numpy(points),
                "index": torch.from_numpy(index)}
