"""Identity sets to train face recognition on, and the protocols that measure it, as they lie on
disk.

Training images are a sequence with `.labels`: `images[i]` is RGB uint8 (H, W, 3), decoded when
asked for. A test is a record of index arrays over such images: `VerificationSet` (pairs),
`IdentificationSet` (gallery and probes) or `TemplateSet` (pairs of templates), whose numbers
common/metrics.py computes; `read_test` tells by what lies at a path which it is. Landmarks may come
from a file or folder of their own (`read_landmarks`). Nothing is downloaded: the sets have owners
and licences. Points are px of the stored image, pixel centres at whole numbers from 0.
"""
import collections
import contextlib
import csv
import dataclasses
import functools
import io
import os
import pickle
import pickletools
import re
import struct
import warnings
from dataclasses import dataclass
from typing import Callable, Sequence

import cv2
import numpy as np
import torch

from common import UserError, datasets, metrics, warp
from common.datasets import BORDER, Face
from common.formats import (IMAGE_SUFFIXES, beside, load_image, read_points_csv, read_pts,
                            text_lines, walk)


def natural(name: str) -> tuple:
    """Sorting key by which n2 comes before n10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


def _stem(name: str) -> str:
    """Normalised path without the suffix of an image: there lie the landmarks of that image."""
    path = os.path.normpath(name)
    return os.path.splitext(path)[0] if path.lower().endswith(IMAGE_SUFFIXES) else path


def _first_line(path: str) -> str:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.readline()


def _table(path: str, dtype, width: int, **options) -> np.ndarray:
    """(rows, width) numbers of a text file.   Raises: UserError naming the file, and the row."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # of an empty file
            table = np.loadtxt(path, dtype, comments=None, ndmin=2, **options)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if table.shape[1] != width or not len(table) or not np.isfinite(table).all():
        raise UserError(f"{path}: found a table {table.shape}, wanted rows of {width} finite "
                        "numbers")
    return table


def _cached(make: Callable[[], np.ndarray], *sources: str) -> np.ndarray:
    """make(), kept beside the first of its source files as NAME.npy where that can be written. It
    is valid while it bears the time stamp of the newest source; written aside, then renamed."""
    kept = sources[0] + ".npy"
    stamp = max(os.stat(path).st_mtime_ns for path in sources)
    with contextlib.suppress(OSError, ValueError):
        if os.stat(kept).st_mtime_ns == stamp:
            return np.load(kept, allow_pickle=False)
    array = make()
    part = f"{kept}.{os.getpid()}.part"
    with contextlib.suppress(OSError):                              # a read-only or full disk
        try:
            with open(part, "wb") as file:
                np.save(file, array)
            os.utime(part, ns=(stamp, stamp))
            os.replace(part, kept)
        finally:
            if os.path.exists(part):
                os.remove(part)
    return array


# ---- Images by index -----------------------------------------------------------------------------

def decode(data, where: str) -> np.ndarray:
    """RGB uint8 (H, W, 3) of the bytes of a JPEG or PNG, or UserError that begins with `where`."""
    data = np.frombuffer(data, np.uint8)
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:                           # no bytes at all, or more pixels than cv2 allows
        pixels = None
    if pixels is None:
        raise UserError(f"{where}: {len(data)} bytes that cannot be decoded as an image")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)


class Images:
    """Images by index: [i] -> RGB uint8 (H, W, 3), of paths, encoded bytes, arrays or functions."""

    def __init__(self, sources: Sequence, name: str = ""):
        self.sources = sources
        self.name = name

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, i: int) -> np.ndarray:
        source = self.sources[i]
        if isinstance(source, bytes):
            return decode(source, f"{self.name}, image {i}")
        return load_image(source)


class FolderImages(Images):
    """Images of `Face`s that have an identity. As `Records` has them: .labels (N,) int64, 0..C-1 in
    the natural order of the identities; .ids (C,) their names; .keys (N,), the place of a face."""

    def __init__(self, faces: Sequence[Face]):
        super().__init__([face.image for face in faces])
        nobody = [i for i, face in enumerate(faces) if face.identity is None]
        if nobody:
            raise UserError(f"{_names(faces, '')[nobody[0]]} has no identity, nor have "
                            f"{len(nobody) - 1} other images; recognition needs a folder for each "
                            "person")
        people = sorted({face.identity for face in faces}, key=natural)
        number = {identity: label for label, identity in enumerate(people)}
        self.labels = np.array([number[face.identity] for face in faces], np.int64)
        self.ids = np.array(people)
        self.keys = np.arange(len(faces))


class Records:
    """The record folder of insightface (MXNet RecordIO): [i] -> RGB uint8 (H, W, 3), in any number
    of processes.

    .labels (N,) int64, 0..C-1 in the order of the original ids; .ids (C,) int64, the original ids;
    .keys (N,) int64, record keys in rising order. A header record and records without image are
    left out. The first call visits the head of every record, and keeps what it finds as
    train.rec.npy where the folder can be written.

    Tree: train.rec, train.idx; root is their folder, or the path of another .rec with its .idx
    Format: .idx: lines key TAB offset. A record: uint32 0xced7230a; uint32 with 3 bits c and 29
          bits length; payload; zeros up to a multiple of 4. c = 0: whole; 1, 2, 3: first, middle,
          last part of a payload that was cut at, and lost, that magic number. Payload: uint32
          flag, float32 label, uint64 id, id2; `flag` float32 labels, which stand for the label;
          JPEG or PNG.
    Source: insightface's sets (MS1MV2, MS1MV3, Glint360K, CASIA); CVLface's have no header record.
    Raises: FileNotFoundError; UserError if a file is cut short, they do not belong together, a
        label is no identity, or there are not two identities.
    """
    MAGIC = 0xced7230a

    def __init__(self, root: str):
        self.path = os.path.join(root, "train.rec") if os.path.isdir(root) else os.fspath(root)
        index = os.path.splitext(self.path)[0] + ".idx"
        for path in (self.path, index):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"no {path}; wanted a folder with train.rec and train.idx, "
                                        "or a .rec with its .idx beside it")
        self._file = None
        table = _cached(lambda: self._scan(index), self.path, index)
        self.keys, self._offsets, self._lengths, ids = table.T.copy()
        self.ids, self.labels = np.unique(ids, return_inverse=True)
        if len(self.ids) < 2:
            raise UserError(f"{self.path} has {len(self.keys)} images of {len(self.ids)} "
                            "identities, wanted two identities or more")

    def __getstate__(self):
        return self.__dict__ | {"_file": None}                      # each process opens its own

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i: int) -> np.ndarray:
        payload = self._payload(int(self._offsets[i]), int(self._lengths[i]))
        flag = int.from_bytes(payload[:4], "little")
        return decode(payload[24 + 4 * flag:], f"{self.path}, record {self.keys[i]}")

    def _read(self, count: int, offset: int) -> bytes:
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)
        if hasattr(os, "pread"):                                # no seek: forked processes share it
            return os.pread(self._file.fileno(), count, offset)
        self._file.seek(offset)                                     # Windows, which does not fork
        return self._file.read(count)

    def _payload(self, offset: int, length: int):
        """Payload of the record at `offset`, whose first part has `length` bytes."""
        parts = []
        more = True
        while more:
            part = memoryview(self._read(8 + length, offset))
            magic, word = struct.unpack_from("<II", part) if len(part) >= 8 else (0, 0)
            if magic != self.MAGIC or word & 0x1FFFFFFF != length or len(part) != 8 + length:
                raise UserError(f"{self.path}: no whole record at byte {offset}: it is cut short, "
                                "or was changed while in use")
            parts.append(part[8:])
            more = word >> 29 in (1, 2)
            if more:
                offset += 8 + length + -length % 4
                length = int.from_bytes(self._read(8, offset)[4:], "little") & 0x1FFFFFFF
        return parts[0] if len(parts) == 1 else struct.pack("<I", self.MAGIC).join(parts)

    def _scan(self, index: str) -> np.ndarray:
        """(N, 4) int64 of the images: key, offset, length of the first part, original id."""
        entries = _table(index, np.int64, 2)
        entries = entries[entries[:, 0].argsort(kind="stable")]
        size = os.path.getsize(self.path)
        blame = (f"{self.path} ({size} bytes) is cut short, or {index} ({len(entries)} records) "
                 "belongs to another")
        outside = (entries[:, 1] < 0) | (entries[:, 1] > size - 32)
        if outside.any():
            key, offset = entries[outside][0]
            raise UserError(f"{blame}: record {key} would be at byte {offset}")
        data = np.memmap(self.path, np.uint8, "r")
        found = []
        promised = None
        for some in np.array_split(entries, -(-len(entries) // 65536)):
            length, flag, label, image = self._heads(data, some, blame)
            if some[0, 0] == 0 and not image[0] and flag[0]:
                promised = int(label[0]) - 1
            table = np.column_stack([some, length, label])[image]
            bad = ~((table[:, 3] >= 0) & (table[:, 3] < 2 ** 31) & (table[:, 3] % 1 == 0))
            if bad.any():
                key, label = table[bad][0, [0, 3]]
                raise UserError(f"{self.path}, record {key:.0f}: found the label {label:g}, wanted "
                                "the number of an identity, from 0")
            found.append(table.astype(np.int64))
        found = np.concatenate(found)
        if promised is not None and promised < 2**24 and promised != len(found):  # exact in float32
            raise UserError(f"{blame}: its header counts {promised} images, the index finds "
                            f"{len(found)}")
        return found

    def _heads(self, data: np.ndarray, entries: np.ndarray, blame: str) -> tuple[np.ndarray, ...]:
        """Of entries (n, 2), key and offset: length of the first part, flag, label and whether
        there is an image, (n,) each. The label and identity records of insightface have none."""
        offsets = entries[:, 1]
        head = data[np.minimum(offsets[:, None] + np.arange(36), len(data) - 1)]           # (n, 36)
        words, reals = head.view("<u4"), head.view("<f4")
        cut = words[:, 1] >> 29
        length = (words[:, 1] & 0x1FFFFFFF).astype(np.int64)
        flag = words[:, 2].astype(np.int64)
        bad = (words[:, 0] != self.MAGIC) | (cut > 1) | (offsets + 8 + length > len(data))
        if bad.any():
            key, offset = entries[bad][0]
            raise UserError(f"{blame}: no whole record {key} at byte {offset}")
        label = np.where(flag > 0, reals[:, 8], reals[:, 3]).astype(np.float64)
        image = length > 24 + 4 * flag
        for i in np.flatnonzero(cut):                   # the cut may lie in what has just been read
            payload = self._payload(int(offsets[i]), int(length[i]))
            flag[i], = struct.unpack_from("<I", payload)
            label[i], = struct.unpack_from("<f", payload, 24 if flag[i] else 4)
            image[i] = len(payload) > 24 + 4 * flag[i]
        return length, flag, label, image


# ---- Identity folders and landmarks --------------------------------------------------------------

def read_identities(root: str) -> list[Face]:
    """Folders of people, as VGGFace2, CASIA or your own: identity, the first folder below root;
    points, those of the .pts beside an image (None without one), as many in all.

    Tree: PERSON/NAME.jpg or PERSON/.../NAME.jpg, at any depth, or .png ...; NAME.pts beside or not
          (VGGFace2: n000002/0001_01.jpg in train/ and test/: name the one that you want)
    Source: you. VGGFace2 and MS-Celeb-1M are no longer distributed by their authors.
    Raises: FileNotFoundError without images; UserError for an image in no folder, two images of one
        name, or fewer than two people.
    """
    if not os.path.isdir(root):
        raise datasets.missing(read_identities, root, f"no folder {root}")
    faces = []
    for image, pts in beside(root):
        if not image:
            continue
        person, *below = os.path.relpath(image, root).split(os.sep)
        if not below:
            raise UserError(f"{image} lies in no person's folder; wanted {root}/PERSON/NAME.jpg")
        faces.append(Face(image, read_pts(pts) if pts else None, identity=person, where=pts))
    marked = [face for face in faces if face.points is not None]
    for face in marked:
        if len(face.points) != len(marked[0].points):
            raise UserError(f"{face.where} has {len(face.points)} points, {marked[0].where} "
                            f"{len(marked[0].points)}; wanted as many in all")
    if not faces:
        raise datasets.missing(read_identities, root, f"no image in {root}")
    faces.sort(key=lambda face: (natural(face.identity), natural(face.image)))
    if faces[0].identity == faces[-1].identity:
        raise UserError(f"{root}: all {len(faces)} images are of one identity, "
                        f"{faces[0].identity}; wanted two folders of people or more")
    return faces


def _names(faces: Sequence[Face], root: str) -> list[str]:
    """Paths of the images, relative to root if there is one; of images without path, the place."""
    names = []
    for i, face in enumerate(faces):
        if not isinstance(face.image, (str, os.PathLike)):
            names.append(str(i))
        elif root:
            names.append(os.path.relpath(face.image, root))
        else:
            names.append(os.path.normpath(face.image))
    return names


def read_landmarks(names: Sequence[str], path: str, size: int = 112) -> np.ndarray:
    """Landmarks of images from a file or folder beside them: (N, P, 2) float32 px, nan where there
    are none.

    Args: names, of the N images, relative to their folder, as "Ann/1.jpg" (of `Records`: the keys);
        path: rows image,x0,y0,x1,y1,... in px (`read_points_csv`; with or without suffix);
            or a folder of .pts that mirrors the images', which `--predict --output` of the landmark
            scripts writes (NAME.pts; the further faces of an image, NAME.face2.pts, are left
            aside); or CVLface's ldmk_5points.csv, header idx,ldmk_0,...,ldmk_9: place of an image
            (its record's place, not key), then x y as fractions of an image `size` px wide and
            high.
    Raises: FileNotFoundError; UserError if it covers none of the images, has several rows for one,
        numbers of points that differ, fractions where px are due or px where fractions are."""
    if os.path.isdir(path):
        found, points, other = _pts_points(names, path)
    elif not os.path.isfile(path):
        raise FileNotFoundError(f"--landmarks {path}: no such file or folder")
    elif _first_line(path).startswith("idx,ldmk_0"):
        found, points, other = _cvlface_points(len(names), path, size)
    else:
        found, points, other = _csv_points(names, path)
    if not len(found):
        raise UserError(f"--landmarks {path} covers other images: it has {other}, of {len(names)} "
                        f"wanted images the first is {names[0]}")
    for i, own in zip(found, points):
        if len(own) != len(points[0]):
            raise UserError(f"{path}: {len(own)} points for {names[i]}, {len(points[0])} for "
                            f"{names[found[0]]}; wanted as many in all")
    if np.abs(points).max() <= 1.5:
        raise UserError(f"{path}: found {points[0][0].tolist()} for {names[found[0]]} and nothing "
                        "larger: these are fractions of an image, wanted px")
    result = np.full((len(names), *np.shape(points)[1:]), np.nan, np.float32)
    result[found] = points
    return result


# Each of the three gives the places of the images that it found, their points (P, 2) px, and what
# it has for the error when there is none.

def _pts_points(names, folder):
    files = [os.path.join(folder, _stem(name) + ".pts") for name in names]
    found = [i for i, file in enumerate(files) if os.path.isfile(file)]
    other = "no .pts"
    if not found:
        other = next(iter(walk(folder, (".pts",))), other)
    return found, [read_pts(files[i]) for i in found], other


def _cvlface_points(count, path, size):
    rows = _table(path, np.float64, 11, delimiter=",", skiprows=1)
    found = rows[:, 0].astype(np.int64)
    if len(np.unique(found)) < len(found):
        raise UserError(f"{path}: {len(found)} rows of {len(np.unique(found))} images, wanted one "
                        "each")
    if np.median(np.abs(rows[:, 1:])) > 1.5:
        raise UserError(f"{path}: found {rows[0, 1]:g} and the like, wanted fractions of the image "
                        "(0 to 1); px go into rows image,x0,y0,... with another header")
    if found.min() < 0 or found.max() >= count:
        return [], [], f"image {found.max()}"
    return found, rows[:, 1:].reshape(-1, 5, 2) * size - 0.5, ""


def _csv_points(names, path):
    table = read_points_csv(path)
    counts = collections.Counter()
    for name, rows in table.items():
        counts[_stem(name)] += len(rows)
    twice, most = counts.most_common(1)[0]
    if most > 1:
        raise UserError(f"{path}: several rows of image {twice}, wanted one; keep that of its "
                        "person")
    points = {_stem(name): rows[0] for name, rows in table.items()}
    found = [i for i, name in enumerate(names) if _stem(name) in points]
    return found, [points[_stem(names[i])] for i in found], next(iter(table))


def attach_points(faces: Sequence[Face], path: str, root: str = "", size: int = 112) -> list[Face]:
    """The faces with the landmarks of a file or folder, as `read_landmarks`, which names images
    relative to `root`. Faces without landmarks there keep what they have."""
    points = read_landmarks(_names(faces, root), path, size)
    attached = []
    for face, own in zip(faces, points):
        if face.points is not None and len(face.points) != len(own):
            raise UserError(f"{path} has {len(own)} points, the .pts of {face.image} "
                            f"{len(face.points)}; wanted as many in all")
        attached.append(dataclasses.replace(face, points=own) if np.isfinite(own).all() else face)
    return attached


def _refuse(names: Sequence[str], missing: Sequence[int], needed_for: str) -> None:
    if len(missing):
        raise UserError(f"{names[missing[0]]} has no landmarks, which {needed_for} needs; so for "
                        f"{len(missing)} of {len(names)} images. Put .pts beside them, or give "
                        "--landmarks")


def check_points(faces: Sequence[Face], needed_for: str) -> None:
    """A UserError for faces without points names the first, how many there are, what needs them."""
    missing = [i for i, face in enumerate(faces) if face.points is None]
    _refuse(_names(faces, ""), missing, needed_for)


# ---- Whole images as batches ---------------------------------------------------------------------

class WholeImages(torch.utils.data.Dataset):
    """Whole images as size x size crops, one warp per image, in batches, as `datasets.CropDataset`.

    The longer side is fitted to `size` and the image centred; what lies outside it is grey, or with
    `reflect` its mirror image. A larger image is shrunk by area first, so that nothing aliases. One
    of that size that nothing moves is copied untouched.
    Args: images, a sequence [i] -> RGB uint8 (H, W, 3); points (N, P, 2) px of the images, or None;
        augment, flip, seed: as for `CropDataset`, but without points mirroring needs no flip;
        align, a template (P, 2) in px of the crop and t in [0, 1]: crops are by the matrix that is
        1 - t of that of the whole image and t of the similarity that fits the points to it.
    A key is (epoch, index). A batch: image (B, size, size, 3) uint8; points (B, P, 2) float32 crop
    px, if given; matrix (B, 2, 3) float32, image px -> crop px; index (B,); the augmentation's
    extras.
    Raises: ValueError for points that are not one finite (P, 2) for each image."""

    def __init__(self, images, size: int, points=None, augment=None, flip=None, seed=0, align=None,
                 reflect=False):
        self.images = images
        self.size = size
        self.augment = augment
        self.seed = seed
        self.align = align
        self.border = cv2.BORDER_REFLECT_101 if reflect else cv2.BORDER_CONSTANT
        self.flip = None if flip is None else torch.tensor(flip)
        self.points = None if points is None else torch.as_tensor(points)
        if points is not None:
            if self.points.ndim != 3 or len(self.points) != len(images):
                raise ValueError(f"points {tuple(self.points.shape)} for {len(images)} images, "
                                 "not (N, P, 2)")
            bad = (~self.points.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            if bad:
                _refuse([f"image {i}" for i in range(len(images))], bad, "this run")

    def __len__(self):
        return len(self.images)

    def __getitems__(self, keys) -> dict:  # the name by which a DataLoader asks for a whole batch
        images = [self.images[i] for _, i in keys]
        corners = np.array([(0, 0, *image.shape[1::-1]) for image in images]) - 0.5
        may_mirror = self.points is None or self.flip is not None
        moved, mirror, extras = datasets.draw_moves(keys, self.augment, self.size, self.seed,
                                                    may_mirror)
        index = torch.tensor([i for _, i in keys])
        crop_matrices = torch.from_numpy(datasets.square_crops(corners, self.size, 1.0))
        if self.align is not None:
            template, t = self.align
            aligned = warp.fit_similarity(self.points[index].double(), template.double())
            crop_matrices = crop_matrices.lerp(aligned, t)
        matrix = warp.compose(moved, crop_matrices)
        batch = {"index": index, "matrix": matrix.float(), **extras}
        if self.points is not None:
            points = warp.apply_affine(matrix, self.points[index].double())
            if self.flip is not None:
                points = torch.where(mirror[:, None, None], points[:, self.flip], points)
            batch["points"] = points.float()
        crops = [self._crop(image, own) for image, own in zip(images, matrix.numpy())]
        return batch | {"image": torch.from_numpy(np.stack(crops))}

    def _crop(self, image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """One image by its matrix (2, 3), image px -> crop px."""
        shape = np.array(image.shape[1::-1])                                        # width, height
        # What a crop can use of an image is `size` px, or more if the augmentation enlarges it.
        ratio = max(abs(np.linalg.det(matrix[:, :2])) ** 0.5, self.size / shape.max())
        if ratio < 1:
            side = np.maximum(np.round(shape * ratio), 1).astype(int)
            image = cv2.resize(image, side.tolist(), interpolation=cv2.INTER_AREA)
            scale = shape / side                  # px as shrunk p -> image px scale (p + 1/2) - 1/2
            offset = matrix[:, :2] @ (scale - 1) / 2 + matrix[:, 2]
            matrix = np.column_stack([matrix[:, :2] * scale, offset])
        square = (self.size, self.size)
        if image.shape[:2] == square and np.abs(matrix - np.eye(2, 3)).max() < 1e-9:
            return image
        return cv2.warpAffine(image, matrix, square, flags=cv2.INTER_LINEAR,
                              borderMode=self.border, borderValue=(BORDER,) * 3)


# ---- Verification: pairs of templates ------------------------------------------------------------

@dataclass(eq=False)
class VerificationSet:
    """Pairs: are they the same person? A template is one image, or the frames of one video."""
    name: str
    images: Sequence                            # [i] -> RGB uint8 (H, W, 3)
    template: np.ndarray                        # (N,) int64, of each image
    pairs: np.ndarray                           # (M, 2) int64, of templates
    same: np.ndarray                            # (M,) bool
    names: np.ndarray                           # (N,) str, of the images, for `read_landmarks`
    points: np.ndarray | None = None            # (N, P, 2) float32 px
    folds: int = 10                             # consecutive blocks of pairs, each with both kinds


def with_landmarks(test, path: str, size: int = 112):
    """The test with the points of a file or folder, as `read_landmarks`, which must cover it."""
    points = read_landmarks(test.names, path, size)
    missing = np.flatnonzero(~np.isfinite(points).all((1, 2)))
    _refuse(test.names, missing, f"--landmarks {path}")
    return dataclasses.replace(test, points=points)


def _need(reader: Callable, root: str, *parts: str) -> str:
    path = os.path.join(root, *parts)
    if not os.path.exists(path):
        raise datasets.missing(reader, root, f"no {path}", "--test")
    return path


def _listing(folder: str) -> list[str]:
    """Names of the images below a folder, in natural order."""
    names = [os.path.relpath(path, folder) for path in walk(folder)]
    return sorted(names, key=natural)


def _check_listed(names: Sequence[str], base: str, listed: str) -> None:
    missing = [name for name in names if not os.path.isfile(os.path.join(base, name))]
    if missing:
        raise FileNotFoundError(f"{listed} names {missing[0]}, which is not in {base}; so for "
                                f"{len(missing)} of {len(names)} images")


def _distinct(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The different names in order, and for each name its place among them."""
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return list(place), np.array([place[name] for name in names], np.int64)


def _one_sided(same: np.ndarray, folds: int) -> bool:
    """Whether one of so many consecutive blocks has pairs of one kind only."""
    return any(block.all() or not block.any() for block in np.array_split(same, folds))


def _in_folds(same: np.ndarray, where: str, fold: Sequence | None = None) -> tuple[np.ndarray, int]:
    """Order that makes folds consecutive blocks, as the metric cuts them, and their number.

    `fold` tells the fold of each pair. Without it there are ten, blocks of the list; if that made
    folds of one kind only, both kinds are spread evenly over the list, and a warning says so.
    Raises: UserError unless there are two folds or more, of one size, with pairs of both kinds."""
    kinds = int(same.sum()), int((~same).sum())
    order = np.arange(len(same))
    if fold is None:
        folds = min(10, *kinds)
        if folds > 1 and _one_sided(same, folds):
            warnings.warn(f"{where}: consecutive blocks of its pairs would have one kind only; "
                          f"each of {folds} folds gets as many of both", stacklevel=3)
            rank = np.where(same, same.cumsum(), (~same).cumsum())
            order = ((rank - 0.5) / np.where(same, *kinds)).argsort(kind="stable")
    else:
        values, fold, counts = np.unique(fold, return_inverse=True, return_counts=True)
        folds = len(values)
        if np.ptp(counts) > 1:
            raise UserError(f"{where}: found {folds} folds of {counts.min()} to {counts.max()} "
                            "pairs, wanted folds of one size")
        order = np.lexsort((fold, -counts[fold]))               # one pair larger: these come first
    if folds < 2 or _one_sided(same[order], folds):
        raise UserError(f"{where}: found {folds} folds, {kinds[0]} pairs of one person and "
                        f"{kinds[1]} of two; wanted two folds or more, each with both kinds")
    return order, folds


def _image_pairs(name, base, listed, pairs, fold=None) -> VerificationSet:
    """The test of pairs (path, path, same), relative to `base`; fold as for `_in_folds`."""
    first, second, same = zip(*pairs)
    order, folds = _in_folds(np.array(same), listed, fold)
    names, place = _distinct([*first, *second])
    _check_listed(names, base, listed)
    images = Images([os.path.join(base, name) for name in names])
    return VerificationSet(name, images, np.arange(len(names)), place.reshape(2, -1).T[order],
                           np.array(same)[order], np.array(names), folds=folds)


class _Array:
    """Stands for numpy.ndarray in a pickle: its dtype is allowed, its shape that of its bytes."""
    value: np.ndarray | list = []

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, dtype, by_columns, raw = state
        self.value = raw
        if not isinstance(raw, list):
            self.value = dtype.read(raw, shape, "F" if by_columns else "C")


class _DType:
    """Stands for numpy.dtype: numbers of the allowed kinds, or the list of objects."""
    order = "|"

    def __init__(self, kinds, code, *_):
        self.kinds = kinds
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, state):
        self.order = state[1]

    def read(self, raw, shape=(-1,), order="C"):
        if not isinstance(self.code, str) or self.code not in self.kinds:
            raise pickle.UnpicklingError(f"it holds an array of {str(self.code)[:20]!r}, wanted "
                                         f"{' or '.join(self.kinds)}")
        raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        ends = ">" if self.order in (">", b">") else "<"
        return np.frombuffer(raw, ends + self.code).reshape(shape, order=order)


def _latin1(text, encoding):
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("it asks for another encoding than latin1")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Bytes, lists, tuples, numbers and arrays. The globals that these ask for get harmless
    stand-ins; any other is refused, before anything of it is imported or called."""
    ALLOWED = {("_codecs", "encode"): _latin1, ("numpy", "ndarray"): _Array}
    for package in ("numpy.core", "numpy._core"):
        ALLOWED[f"{package}.multiarray", "_reconstruct"] = _Array
        ALLOWED[f"{package}.multiarray", "scalar"] = lambda dtype, raw: dtype.read(raw)[0]
        ALLOWED[f"{package}.numeric", "_frombuffer"] = lambda raw, dtype, *at: dtype.read(raw, *at)
    # These would hash what they hold, and a tuple a million deep ends the process.
    REFUSED = {"DICT", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET"}

    def __init__(self, content: bytes, kinds: Sequence[str]):
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in self.REFUSED:
                raise pickle.UnpicklingError("it holds a dictionary or a set, which it does not "
                                             "need")
            if opcode.name.endswith("PUT") and argument > len(content):     # memory for as many
                raise pickle.UnpicklingError(f"it numbers {argument} objects in {len(content)} "
                                             "bytes")
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.allowed = self.ALLOWED | {("numpy", "dtype"): functools.partial(_DType, kinds)}

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such a file does not "
                                         "need. This may be an attack: refused, and nothing was run"
                                         "")
        return self.allowed[module, name]


def unpickle(path: str, what: str, kinds: Sequence[str] = ("u1", "b1")):
    """What a pickle holds, an array or plain values, without ever running code from it.
    Args: what, a name for such files; kinds, codes of the numbers in its arrays, as "u1", "f8".
    Raises: UserError "PATH is no WHAT: ..." that names what is wrong, or refused."""
    with open(path, "rb") as file:
        content = file.read()
    try:
        value = _Unpickler(content, kinds).load()
    except Exception as error:                              # a damaged pickle raises anything
        raise UserError(f"{path} is no {what}: {error}") from None
    return value.value if isinstance(value, _Array) else value


def read_bin(path: str) -> VerificationSet:
    """The .bin of insightface: a pickle of (2N encoded images, N truth values); pair i is images
    2i, 2i + 1. Files of Python 2 and 3 are read, without ever running code from them. Images are
    decoded when asked for; they are aligned already. names: "0", "1", ...

    Tree: lfw.bin, cfp_fp.bin, cfp_ff.bin, agedb_30.bin, calfw.bin, cplfw.bin or vgg2_fp.bin
    Source: inside the archives of insightface's training sets.
    Raises: FileNotFoundError; UserError that names a global that is refused, or what is wrong.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no {path}; it comes inside the insightface training archives")
    content = unpickle(path, "verification .bin")
    try:
        images, same = (list(v.value if isinstance(v, _Array) else v) for v in content)
        images = [v.value if isinstance(v, _Array) else v for v in images]
        images = [v if isinstance(v, bytes) else bytes(memoryview(v)) for v in images]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is no verification .bin: {error}") from None
    if len(images) != 2 * len(same):
        raise UserError(f"{path}: found {len(images)} images and {len(same)} pairs, wanted two a "
                        "pair")
    same = np.array([bool(v) for v in same], bool)
    order, folds = _in_folds(same, path)
    name = os.path.splitext(os.path.basename(path))[0]
    place = np.arange(len(images))
    return VerificationSet(name, Images(images, path), place, place.reshape(-1, 2)[order],
                           same[order], place.astype(str), folds=folds)


def read_lfw(root: str) -> VerificationSet:
    """LFW, view 2: 6,000 pairs in 10 folds, each 300 of the same person, then 300 of different
    ones.

    Tree: pairs.txt (here, or beside this folder): 10 TAB 300, then lines NAME n1 n2 or
              NAME1 n1 NAME2 n2
          lfw/NAME/NAME_0001.jpg (or .png; or without the folder lfw/)
    Source: Labeled Faces in the Wild, University of Massachusetts.
    """
    listed = os.path.join(os.path.dirname(os.path.abspath(root)), "pairs.txt")
    if os.path.exists(os.path.join(root, "pairs.txt")) or not os.path.exists(listed):
        listed = _need(read_lfw, root, "pairs.txt")
    base = os.path.join(root, "lfw") if os.path.isdir(os.path.join(root, "lfw")) else root
    (where, head), *rows = text_lines(listed) or [(listed, "")]
    folds, half = map(int, head.split()) if re.fullmatch(r"\d+\s+\d+", head) else (0, 0)
    if len(rows) != 2 * folds * half or not rows:
        raise UserError(f"{where}: found {head!r} and {len(rows)} pairs, wanted the number of "
                        "folds, that of pairs of one kind in a fold, and as many pairs")
    pairs = []
    for where, line in rows:
        fields = line.split()
        if len(fields) == 3:
            fields.insert(2, fields[0])
        if len(fields) != 4 or not (fields[1].isdecimal() and fields[3].isdecimal()):
            raise UserError(f"{where}: found {line!r}, wanted NAME n1 n2 or NAME1 n1 NAME2 n2")
        a, i, b, j = fields
        pairs.append((f"{a}/{a}_{int(i):04d}", f"{b}/{b}_{int(j):04d}", a == b))
    suffixes = [s for s in IMAGE_SUFFIXES if os.path.isfile(os.path.join(base, pairs[0][0] + s))]
    suffix = suffixes[0] if suffixes else ".jpg"
    pairs = [(a + suffix, b + suffix, same) for a, b, same in pairs]
    return _image_pairs("LFW", base, listed, pairs, np.arange(len(pairs)) // (2 * half))


def read_ytf(root: str, frames: int | None = None) -> VerificationSet:
    """YouTube Faces: 5,000 pairs of videos in 10 folds; a template is a video. frames: at most so
    many of each, evenly spaced; None takes all.

    Tree: splits.txt: lines split, pair, NAME/VIDEO, NAME/VIDEO, 1 or 0; with header, pair or not
          aligned_images_DB/NAME/VIDEO/*.jpg or frame_images_DB/NAME/VIDEO/*.jpg (the whole frames)
    Source: https://www.cs.tau.ac.il/~wolf/ytfaces.
    """
    listed = _need(read_ytf, root, "splits.txt")
    base = os.path.join(root, "frame_images_DB")
    if not os.path.isdir(base):
        base = _need(read_ytf, root, "aligned_images_DB")
    rows = []
    for number, (where, line) in enumerate(text_lines(listed)):
        fields = [field.strip() for field in line.split(",")]
        if number == 0 and not fields[0].isdecimal():               # the header
            continue
        if len(fields) not in (4, 5) or not fields[0].isdecimal() or fields[-1] not in ("0", "1"):
            raise UserError(f"{where}: found {line!r}, wanted split, pair, NAME/VIDEO, NAME/VIDEO, "
                            "1 or 0, maybe without pair")
        rows.append((int(fields[0]), *fields[-3:]))
    if not rows:
        raise UserError(f"{listed} has no pair")
    fold, first, second, same = zip(*rows)
    same = np.array(same) == "1"
    order, folds = _in_folds(same, listed, fold)
    videos, place = _distinct([*first, *second])
    names = []
    template = []
    for number, video in enumerate(videos):
        found = _listing(_need(read_ytf, base, video))
        if not found:
            folder = os.path.join(base, video)
            raise datasets.missing(read_ytf, root, f"no image in {folder}", "--test")
        if frames is not None and frames < len(found):
            found = [found[i] for i in np.linspace(0, len(found) - 1, frames).round().astype(int)]
        names += [f"{video}/{name}" for name in found]
        template += [number] * len(found)
    images = Images([os.path.join(base, name) for name in names])
    return VerificationSet("YTF", images, np.array(template), place.reshape(2, -1).T[order],
                           same[order], np.array(names), folds=folds)


def read_cfp(root: str, kind: str = "FP") -> VerificationSet:
    """CFP: 7,000 pairs in 10 folds, of a frontal and a profile image ("FP") or two frontal ones
    ("FF").

    Tree: Protocol/Pair_list_F.txt, Protocol/Pair_list_P.txt: lines number, path below Protocol/
          Protocol/Split/FP/01 ... 10/same.txt and diff.txt (and Split/FF): lines i,j of those lists
          Data/Images/001/frontal/01.jpg, Data/Images/001/profile/01.jpg, ...
    Source: http://www.cfpw.io, Celebrities in Frontal-Profile.
    """
    protocol = os.path.join(root, "Protocol")
    lists = {}
    for letter in "FP":
        lists[letter] = {}
        listed = _need(read_cfp, root, "Protocol", f"Pair_list_{letter}.txt")
        for _, line in text_lines(listed):
            number, _, name = line.partition(" ")
            lists[letter][number] = os.path.normpath(os.path.join("Protocol", name.strip()))
    pairs = []
    fold = []
    for number in range(1, 11):
        for name in ("same", "diff"):
            split = f"Protocol/Split/{kind}/{number:02d}/{name}.txt"
            listed = _need(read_cfp, root, *split.split("/"))
            for where, line in text_lines(listed):
                i, _, j = line.replace(" ", "").partition(",")
                if i not in lists[kind[0]] or j not in lists[kind[1]]:
                    raise UserError(f"{where}: found {line!r}, wanted i,j, numbers of those lists")
                pairs.append((lists[kind[0]][i], lists[kind[1]][j], name == "same"))
                fold.append(number)
    return _image_pairs(f"CFP-{kind}", root, protocol, pairs, fold)


def read_calfw(root: str, name: str = "CALFW") -> VerificationSet:
    """CALFW (LFW across age) or CPLFW (across pose): 3,000 pairs of the same person, then 3,000 of
    different ones, listed by image. Pair i of either kind belongs to fold i // 300.

    Tree: pairs_CALFW.txt, pairs_CPLFW.txt: two lines FILE LABEL a pair; label 0: different people
          images/*.jpg or aligned images/*.jpg, or the images beside the list
    Source: http://whdeng.cn/CALFW and CPLFW.
    """
    listed = _need(read_calfw, root, f"pairs_{name}.txt")
    rows = []
    for where, line in text_lines(listed):
        file, _, label = line.rpartition(" ")
        if not file or not label.lstrip("-").isdecimal():
            raise UserError(f"{where}: found {line!r}, wanted FILE LABEL")
        rows.append((file.strip(), int(label) != 0))
    pairs = [(a, b, same) for (a, same), (b, _) in zip(rows[::2], rows[1::2])]
    kinds = {kind: [pair for pair in pairs if pair[2] == kind] for kind in (True, False)}
    if [same for _, same in rows[::2]] != [same for _, same in rows[1::2]] or not pairs \
            or len(kinds[True]) != len(kinds[False]):
        raise UserError(f"{listed}: {len(rows)} lines that are not pairs of one label, as many of "
                        "both kinds; wanted two lines a pair")
    pairs = [pair for both in zip(kinds[True], kinds[False]) for pair in both]
    folders = [os.path.join(root, folder) for folder in ("images", "aligned images", "")]
    there = [folder for folder in folders if os.path.isfile(os.path.join(folder, rows[0][0]))]
    return _image_pairs(name, there[0] if there else folders[0], listed, pairs)


def read_cplfw(root: str) -> VerificationSet:
    """CPLFW, as `read_calfw`."""
    return read_calfw(root, "CPLFW")


def _csv_rows(path: str, columns: str) -> list[tuple[str, dict]]:
    """("path:number", row) of a table whose header has these columns, and maybe others."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, skipinitialspace=True, restval="")
            if not set(columns.split(",")) <= set(table.fieldnames or ()):
                raise UserError(f"{path}:1: found columns {table.fieldnames}, wanted {columns}")
            rows = [(f"{path}:{table.line_num}", row) for row in table]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no table in UTF-8: {error}") from None
    if not rows:
        raise UserError(f"{path} has no row {columns}")
    return rows


def read_pairs_csv(path: str) -> VerificationSet:
    """Pairs of your own, as a table.

    Tree: NAME.csv: header image_a,image_b,same,fold; paths relative to it; same 1 or 0; fold (may
          be left out: ten blocks in the order of the file): anything, as many pairs in each
    Source: you.
    """
    pairs = []
    fold = []
    for where, row in _csv_rows(path, "image_a,image_b,same"):
        if row["same"] not in ("0", "1") or not row["image_a"] or not row["image_b"]:
            raise UserError(f"{where}: found {list(row.values())}, wanted image_a,image_b,same "
                            "with a same of 1 or 0")
        first, second = (os.path.normpath(row[key]) for key in ("image_a", "image_b"))
        pairs.append((first, second, row["same"] == "1"))
        fold.append(row.get("fold"))
    return _image_pairs(path, os.path.dirname(path), path, pairs, None if fold[0] is None else fold)


# ---- Identification: gallery and probes ----------------------------------------------------------

ROLES = ("gallery", "probe", "distractor", "unused")


@dataclass(eq=False)
class IdentificationSet:
    """Whose picture is each probe? Gallery and distractors are searched, unused images take no
    part. Results by group of probes."""
    name: str
    images: Sequence                            # [i] -> RGB uint8 (H, W, 3)
    identity: np.ndarray                        # (N,) int64; -1 for distractors
    role: np.ndarray                            # (N,) uint8, of `ROLES`
    group: np.ndarray                           # (N,) str, as the yaw angle; "" for none
    names: np.ndarray                           # (N,) str, of the images, for `read_landmarks`
    points: np.ndarray | None = None            # (N, P, 2) float32 px


def _identification(name, images, names, identity, role, group=None) -> IdentificationSet:
    """The record, after an error for a probe that no system could find."""
    role = np.array(role, np.uint8)
    identity = np.where(role == 2, -1, identity).astype(np.int64)
    lost = np.flatnonzero((role == 1) & ~np.isin(identity, identity[role == 0]))
    if lost.size:
        raise UserError(f"{name}: probe {names[lost[0]]} has no mate in the gallery, nor have "
                        f"{lost.size - 1} others; each probe's person needs an image there")
    if not (role == 1).any():
        raise UserError(f"{name}: there is no probe")
    group = np.full(len(names), "") if group is None else np.array(group)
    return IdentificationSet(name, images, identity, role, group, np.array(names))


def read_identification(path: str) -> IdentificationSet:
    """A test of your own, or Multi-PIE, or MegaFace with its noise lists (role skip leaves an image
    out), as a table. A distractor has no mate: its id does not count.

    Tree: NAME.csv: header path,id,role,group; paths relative to it; role gallery, probe, distractor
          or skip; group (may be left out): results are told for each, as |yaw| for Multi-PIE
    Source: you. Multi-PIE is sold by CMU; MegaFace is no longer distributed.
    """
    rows = []
    for where, row in _csv_rows(path, "path,id,role"):
        if row["role"] not in (*ROLES[:3], "skip") or not row["path"]:
            raise UserError(f"{where}: found role {row['role']!r} for {row['path']!r}, wanted "
                            f"path,id,role with a role of {', '.join(ROLES[:3])}, skip")
        if row["role"] != "skip":
            rows.append(row)
    names = [os.path.normpath(row["path"]) for row in rows]
    base = os.path.dirname(path)
    _check_listed(names, base, path)
    _, identity = _distinct([row["id"] for row in rows])
    role = [ROLES.index(row["role"]) for row in rows]
    group = [row.get("group", "") for row in rows]
    images = Images([os.path.join(base, name) for name in names])
    return _identification(path, images, names, identity, role, group)


def read_tinyface(root: str) -> IdentificationSet:
    """TinyFace: 3,728 probes in a gallery of 4,443 and 153,428 distractors, small and not aligned.
    The id of a face is the number that its file name begins with.

    Tree: Testing_Set/Probe/ID_N.jpg, Testing_Set/Gallery_Match/ID_N.jpg
          Testing_Set/Gallery_Distractor/*.jpg
    Source: https://qmul-tinyface.github.io, for research.
    """
    names = []
    identity = []
    role = []
    for number, folder in enumerate(("Gallery_Match", "Probe", "Gallery_Distractor")):
        for name in _listing(_need(read_tinyface, root, "Testing_Set", folder)):
            person = name.partition("_")[0] if number < 2 else "-1"
            names.append(f"Testing_Set/{folder}/{name}")
            role.append(number)
            if number < 2 and not person.isdecimal():
                raise UserError(f"{os.path.join(root, names[-1])}: wanted a name ID_N.jpg")
            identity.append(int(person))
    images = Images([os.path.join(root, name) for name in names])
    return _identification("TinyFace", images, names, identity, role)


# ---- Templates: IJB ------------------------------------------------------------------------------

@dataclass(eq=False)
class TemplateSet:
    """Pairs of templates: images of a person, of which those of one medium (a video) count once."""
    name: str
    images: Sequence                            # [i] -> RGB uint8 (H, W, 3)
    points: np.ndarray                          # (N, 5, 2) float32 px
    faceness: np.ndarray                        # (N,) float32, a detector's score
    template: np.ndarray                        # (N,) int64, 0..T-1
    media: np.ndarray                           # (N,) int64
    pairs: np.ndarray                           # (M, 2) int32, of templates
    same: np.ndarray                            # (M,) bool
    names: np.ndarray                           # (N,) str, of the images


def read_ijb(root: str, kind: str) -> TemplateSet:
    """IJB-B or IJB-C (kind "B", "C"), 1:1 verification, as insightface packs it. Points as they
    stand. The pair file is parsed once, and kept beside itself as .npy where the folder can be
    written.

    Tree: (IJBC/)loose_crop/1.jpg ...   and in (IJBC/)meta/, or ijbb for ijbc, without headers:
          ijbc_face_tid_mid.txt: NAME.jpg template medium
          ijbc_template_pair_label.txt: template template 1|0
          ijbc_name_5pts_score.txt: NAME.jpg x1 y1 ... x5 y5 faceness, the same images in that order
    Source: NIST, on application; insightface's IJB_release.
    """
    base = os.path.join(root, f"IJB{kind}")
    if not os.path.isdir(base):
        base = root
    faces, marks, listed = (_need(read_ijb, base, "meta", f"ijb{kind.lower()}_{name}.txt")
                            for name in ("face_tid_mid", "name_5pts_score", "template_pair_label"))
    names = [line.split(None, 1)[0] for _, line in text_lines(faces)]
    again = [line.split(None, 1)[0] for _, line in text_lines(marks)]
    if names != again:
        raise UserError(f"{faces} has {len(names)} images, {marks} {len(again)}; wanted the same "
                        "in order")
    ids, media = _table(faces, np.int64, 2, usecols=(1, 2)).T
    numbers = _table(marks, np.float32, 11, usecols=range(1, 12))
    rows = _cached(lambda: _table(listed, np.int64, 3).astype(np.int32), listed)
    templates, template = np.unique(ids, return_inverse=True)
    pairs = np.searchsorted(templates, rows[:, :2]).clip(max=len(templates) - 1)
    bad = np.flatnonzero((templates[pairs] != rows[:, :2]).any(1) | (rows[:, 2] >> 1 != 0))
    if bad.size:
        raise UserError(f"{listed}:{bad[0] + 1}: found {rows[bad[0]].tolist()}, wanted two "
                        f"templates of {faces} and 1 or 0")
    if rows[:, 2].all() or not rows[:, 2].any():
        raise UserError(f"{listed} has pairs of one kind only, {rows[0, 2]}; wanted both, 1 and 0")
    crops = _need(read_ijb, base, "loose_crop")
    _check_listed(names, crops, faces)
    images = Images([os.path.join(crops, name) for name in names])
    return TemplateSet(f"IJB-{kind}", images, numbers[:, :10].reshape(-1, 5, 2), numbers[:, 10],
                       template, media, pairs.astype(np.int32), rows[:, 2] == 1, np.array(names))


def template_features(embeddings, template, media, weights=None) -> torch.Tensor:
    """Unit features of templates: the mean within each medium, the sum over the media, L2.
    Args: embeddings (N, D), norms kept; template (N,) 0..T-1; media (N,) integers; weights (N,), as
        faceness.   Returns: (T, D).
    Raises: ValueError for embeddings or weights that are not finite.
    Source: insightface's IJB protocol."""
    embeddings = torch.as_tensor(embeddings)
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    ids = torch.stack([torch.as_tensor(template), torch.as_tensor(media)]).to(embeddings.device)
    _, group, count = ids.unique(dim=1, return_inverse=True, return_counts=True)
    share = 1 / count[group].to(embeddings)
    if weights is not None:
        share = share * torch.as_tensor(weights).to(embeddings)
    features = embeddings.new_zeros(int(ids[0].max()) + 1, embeddings.shape[1])
    features.index_add_(0, ids[0], embeddings * share[:, None])
    if not features.isfinite().all():
        raise ValueError("embeddings or weights hold nan or inf; all must be finite")
    return torch.nn.functional.normalize(features, dim=1)


# ---- Any test, and tests of one's own ------------------------------------------------------------

# What tells the folder of a public test, and its reader.
FOLDERS: dict[str, Callable] = {
    "pairs.txt": read_lfw, "splits.txt": read_ytf, "Protocol": read_cfp,
    "pairs_CALFW.txt": read_calfw, "pairs_CPLFW.txt": read_cplfw, "Testing_Set": read_tinyface,
    "meta/ijbb_face_tid_mid.txt": functools.partial(read_ijb, kind="B"),
    "IJBB/meta/ijbb_face_tid_mid.txt": functools.partial(read_ijb, kind="B"),
    "meta/ijbc_face_tid_mid.txt": functools.partial(read_ijb, kind="C"),
    "IJBC/meta/ijbc_face_tid_mid.txt": functools.partial(read_ijb, kind="C"),
    "../pairs.txt": read_lfw}


def read_test(path: str) -> VerificationSet | IdentificationSet | TemplateSet:
    """What `--test PATH` names, told by what lies there: a .bin, a .csv or a public test's folder.
    Raises: UserError or FileNotFoundError: what was looked for, or what is wrong."""
    path = os.fspath(path)
    if path.endswith(".bin"):
        return read_bin(path)
    if path.endswith(".csv") and os.path.isfile(path):
        columns = [column.strip() for column in _first_line(path).split(",")]
        if "image_a" in columns:
            return read_pairs_csv(path)
        if "role" in columns:
            return read_identification(path)
        raise UserError(f"{path}:1: found columns {columns}, wanted image_a,image_b,same or "
                        "path,id,role")
    for mark, reader in FOLDERS.items():
        if os.path.exists(os.path.join(path, mark)):
            return reader(path)
    raise FileNotFoundError(f"--test {path}: no test found. Looked for a .bin of insightface, a "
                            ".csv with the header image_a,image_b,same or path,id,role,group, and "
                            f"a folder with one of {', '.join(FOLDERS)}")


def _people(faces: Sequence[Face]) -> tuple[FolderImages, list[np.ndarray]]:
    """The images, and the faces of each person in their order."""
    images = FolderImages(faces)
    order = np.argsort(images.labels, kind="stable")
    people = np.split(order, np.bincount(images.labels).cumsum()[:-1])
    most = max(map(len, people))
    if len(people) < 2 or most < 2:
        raise UserError(f"found {len(images)} images of {len(people)} people, {most} at most of "
                        "one; to test recognition takes two people, and two images of one of them")
    return images, people


def _stacked(faces: Sequence[Face]) -> np.ndarray | None:
    if any(face.points is None for face in faces):
        return None
    return np.stack([face.points for face in faces])


def own_pairs(faces: Sequence[Face], seed: int = 0, most: int = 6000) -> VerificationSet:
    """Pairs of a set that has no official ones. Of a person's n images in order all pairs n // 2 or
    more apart (neighbours are often frames of one video), `most` at most, evenly spaced; and as
    many pairs of different people at random, each person in turn being the first. Both in the order
    of the people and by turns: folds hold both kinds, and share as few people as can be.
    Raises: UserError if there are not two people, or not two such pairs."""
    images, people = _people(faces)
    genuine = []
    for person in people:
        apart = np.triu_indices(len(person), max(len(person) // 2, 1))
        genuine.append(person[np.stack(apart, 1)])
    genuine = np.concatenate(genuine)                                                       # (G, 2)
    genuine = genuine[np.linspace(0, len(genuine) - 1, min(most, len(genuine))).astype(int)]
    if len(genuine) < 2:
        raise UserError("found one pair of images of one person; two folds take two such pairs")
    rng = np.random.default_rng(seed)
    count = np.array([len(person) for person in people])
    first = np.sort(np.arange(len(genuine)) % len(people))
    second = (first + rng.integers(1, len(people), len(first))) % len(people)
    flat = np.concatenate(people)
    start = count.cumsum() - count
    impostor = [flat[start[who] + rng.integers(0, count[who])] for who in (first, second)]
    pairs = np.stack([genuine, np.stack(impostor, 1)], 1).reshape(-1, 2)
    return VerificationSet("pairs", images, np.arange(len(images)), pairs,
                           np.tile([True, False], len(genuine)), np.array(_names(faces, "")),
                           _stacked(faces), min(10, len(people), len(genuine)))


def own_identification(faces: Sequence[Face]) -> IdentificationSet:
    """Gallery and probes of a set that has no official ones: each person's first image, and of n
    images those from n // 2 on (but the first); the ones between are unused.
    Raises: UserError if there are not two people, or no two images of one."""
    images, people = _people(faces)
    role = np.full(len(images), 3)
    for person in people:
        role[person[0]] = 0
        role[person[max(len(person) // 2, 1):]] = 1
    test = _identification("identification", images, _names(faces, ""), images.labels, role)
    return dataclasses.replace(test, points=_stacked(faces))


# ---- Scores --------------------------------------------------------------------------------------

def score(test, features: torch.Tensor) -> dict[str, float]:
    """What a test says of features (N, D) of its images: "accuracy" and "accuracy/std" over the
    folds, of pairs; "rank1" and "rank5", then "rank1/GROUP", ..., of probes; "tar/0.0001", ...,
    true accept rates at false accept rates, of pairs of templates. A video's feature is the mean of
    its frames' unit features."""
    if isinstance(test, VerificationSet):
        return _score_pairs(test, features)
    if isinstance(test, IdentificationSet):
        return _score_probes(test, features)
    pooled = template_features(features, test.template, test.media, test.faceness)
    cosine = []
    for pairs in torch.from_numpy(test.pairs.astype(np.int64)).split(2**18):
        cosine.append((pooled[pairs[:, 0]] * pooled[pairs[:, 1]]).sum(1))
    rates = metrics.tar_at_far(torch.cat(cosine), test.same, (1e-6, 1e-5, 1e-4, 1e-3))
    return {f"tar/{far:g}": rate for far, rate in rates.items()}


def _score_pairs(test: VerificationSet, features: torch.Tensor) -> dict[str, float]:
    template = torch.from_numpy(test.template)
    unit = torch.nn.functional.normalize(features.double())
    pooled = unit.new_zeros(int(template.max()) + 1, unit.shape[1]).index_add(0, template, unit)
    first, second = torch.from_numpy(test.pairs).T
    mean, spread = metrics.verification_accuracy(pooled[first], pooled[second], test.same,
                                                 test.folds)
    return {"accuracy": mean, "accuracy/std": spread}


def _score_probes(test: IdentificationSet, features: torch.Tensor) -> dict[str, float]:
    identity = torch.from_numpy(test.identity)
    searched = torch.from_numpy((test.role == 0) | (test.role == 2))
    scores = {}
    for group in ("", *sorted(set(test.group[test.role == 1]) - {""}, key=natural)):
        probe = torch.from_numpy((test.role == 1) & ((test.group == group) | (group == "")))
        ranks = metrics.rank_k(features[probe], identity[probe], features[searched],
                               identity[searched])
        for k, rate in ranks.items():
            scores[f"rank{k}/{group}" if group else f"rank{k}"] = rate
    return scores
