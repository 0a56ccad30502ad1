"""Identity sets to train face recognition on, and the protocols that measure it, as they lie on disk.

Training images are a sequence with `.labels`: `images[i]` is RGB uint8 (H, W, 3), decoded when asked for. A
test is a record of index arrays over such images: `VerificationSet` (pairs), `IdentificationSet` (gallery and
probes) or `TemplateSet` (pairs of templates), whose numbers common/metrics.py computes; `read_test` tells by
what lies at a path which it is. Landmarks may come from a file or folder of their own (`read_landmarks`).
Nothing is downloaded: the sets have owners and licences.

Points are px of the stored image, pixel centres at whole numbers from 0, as in common/datasets.py.
"""
import collections
import contextlib
import csv
import dataclasses
import functools
import glob
import io
import os
import pickle
import re
import struct
import warnings
from dataclasses import dataclass
from typing import Callable, Sequence

import cv2
import numpy as np
import torch

from common import datasets, metrics, warp
from common.datasets import BORDER, Face, load_image, read_pts

SUFFIXES = (".jpg", ".jpeg", ".png")


def natural(name: str) -> tuple:
    """Sorting key by which n2 comes before n10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


def _stem(name: str) -> str:
    """Normalised path without the suffix of an image: where the landmarks of that image are looked for."""
    path = os.path.normpath(name)
    return os.path.splitext(path)[0] if path.lower().endswith(SUFFIXES) else path


def _first_line(path: str) -> str:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.readline()


def _table(path: str, dtype, width: int, **options) -> np.ndarray:
    """(rows, width) numbers of a text file.   Raises: ValueError naming the file, and the row."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                         # of an empty file
            table = np.loadtxt(path, dtype, comments=None, ndmin=2, **options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if table.shape[1] != width or not len(table) or not np.isfinite(table).all():
        raise ValueError(f"{path}: found a table {table.shape}, wanted rows of {width} finite numbers")
    return table


def _cached(make: Callable[[], np.ndarray], *sources: str) -> np.ndarray:
    """make(), kept beside the first of its source files as NAME.npy where that can be written. It is valid
    while it bears the time stamp of the newest source; written aside and renamed, so never read when half."""
    kept, stamp = sources[0] + ".npy", max(os.stat(path).st_mtime_ns for path in sources)
    with contextlib.suppress(OSError, ValueError):
        if os.stat(kept).st_mtime_ns == stamp:
            return np.load(kept, allow_pickle=False)
    array, part = make(), f"{kept}.{os.getpid()}.part"
    with contextlib.suppress(OSError):                                              # a read-only or full disk
        try:
            with open(part, "wb") as file:
                np.save(file, array)
            os.utime(part, ns=(stamp, stamp))
            os.replace(part, kept)
        finally:
            if os.path.exists(part):
                os.remove(part)
    return array


# ---- Images by index ---------------------------------------------------------------------------------------

def decode(data, where: str) -> np.ndarray:
    """RGB uint8 (H, W, 3) of the bytes of a JPEG or PNG.   Raises: ValueError that begins with `where`."""
    data = np.frombuffer(data, np.uint8)
    pixels = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION) if len(data) else None
    if pixels is None:
        raise ValueError(f"{where}: {len(data)} bytes that cannot be decoded as an image")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)


class Images:
    """Images by index: [i] -> RGB uint8 (H, W, 3). Sources: paths, encoded bytes, arrays, or functions."""

    def __init__(self, sources: Sequence, name: str = ""):
        self.sources, self.name = sources, name

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, i: int) -> np.ndarray:
        source = self.sources[i]
        return decode(source, f"{self.name}, image {i}") if isinstance(source, bytes) else load_image(source)


class FolderImages(Images):
    """Images of `Face`s that have an identity. As `Records` has them: .labels (N,) int64, 0..C-1 in the
    natural order of the identities; .ids (C,) their names; .keys (N,), the place of a face."""

    def __init__(self, faces: Sequence[Face]):
        super().__init__([face.image for face in faces])
        nobody = [i for i, face in enumerate(faces) if face.identity is None]
        if nobody:
            raise ValueError(f"{_names(faces, '')[nobody[0]]} has no identity, nor have {len(nobody) - 1} "
                             "other images; recognition needs a folder for each person")
        people = sorted({face.identity for face in faces}, key=natural)
        number = {identity: label for label, identity in enumerate(people)}
        self.labels = np.array([number[face.identity] for face in faces], np.int64)
        self.ids, self.keys = np.array(people), np.arange(len(faces))


class Records:
    """The record folder of insightface (MXNet RecordIO): [i] -> RGB uint8 (H, W, 3), any number of processes.

    .labels (N,) int64, 0..C-1 in the order of the original ids; .ids (C,) int64, the original ids; .keys (N,)
    int64, record keys in rising order. A header record and records without image are left out. The first call
    visits the head of every record, and keeps what it finds as train.rec.npy where the folder can be written.

    Tree: train.rec, train.idx; root is their folder, or the path of another .rec with an .idx beside it
    Format: .idx: lines key TAB offset. A record: uint32 0xced7230a; uint32 with 3 bits c and 29 bits length;
          payload; zeros up to a multiple of 4. c = 0: whole; 1, 2, 3: first, middle, last part of a payload
          that was cut at, and lost, that magic number. Payload: uint32 flag, float32 label, uint64 id, id2;
          `flag` float32 labels that stand for the label if flag > 0; JPEG or PNG.
    Source: insightface's training sets (MS1MV2, MS1MV3, Glint360K, CASIA); CVLface's have no header record.
    Raises: FileNotFoundError; ValueError if one of the files is cut short or they do not belong together, or
        if there are not two identities.
    """
    MAGIC = 0xced7230a

    def __init__(self, root: str):
        self.path = os.path.join(root, "train.rec") if os.path.isdir(root) else os.fspath(root)
        index = os.path.splitext(self.path)[0] + ".idx"
        for path in (self.path, index):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"no {path}; wanted a folder with train.rec and train.idx, or a .rec "
                                        "with its .idx beside it")
        self._file = None
        table = _cached(lambda: self._scan(index), self.path, index)
        self.keys, self._offsets, self._lengths, ids = table.T.copy()
        self.ids, self.labels = np.unique(ids, return_inverse=True)
        if len(self.ids) < 2:
            raise ValueError(f"{self.path} has {len(self.keys)} images of {len(self.ids)} identities, wanted "
                             "two identities or more")

    def __getstate__(self):
        return self.__dict__ | {"_file": None}                            # each process opens its own

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i: int) -> np.ndarray:
        payload = self._payload(int(self._offsets[i]), int(self._lengths[i]))
        flag = int.from_bytes(payload[:4], "little")
        return decode(payload[24 + 4 * flag:], f"{self.path}, record {self.keys[i]}")

    def _payload(self, offset: int, length: int):
        """Payload of the record at `offset`, whose first part has `length` bytes."""
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)
        parts, more = [], True
        while more:
            part = memoryview(os.pread(self._file.fileno(), 8 + length, offset))    # no seek: forks share it
            magic, word = struct.unpack_from("<II", part) if len(part) >= 8 else (0, 0)
            if magic != self.MAGIC or word & 0x1FFFFFFF != length or len(part) != 8 + length:
                raise ValueError(f"{self.path}: no whole record at byte {offset}: it is cut short, or was "
                                 "changed while in use")
            parts.append(part[8:])
            more = word >> 29 in (1, 2)
            if more:
                offset += 8 + length + -length % 4
                word = os.pread(self._file.fileno(), 8, offset)[4:]
                length = int.from_bytes(word, "little") & 0x1FFFFFFF
        return parts[0] if len(parts) == 1 else struct.pack("<I", self.MAGIC).join(parts)

    def _scan(self, index: str) -> np.ndarray:
        """(N, 4) int64 of the images: key, offset, length of the first part, original id."""
        entries, size = _table(index, np.int64, 2), os.path.getsize(self.path)
        entries = entries[entries[:, 0].argsort(kind="stable")]
        blame = (f"{self.path} ({size} bytes) is cut short, or {index} ({len(entries)} records) belongs to "
                 "another")
        outside = (entries[:, 1] < 0) | (entries[:, 1] > size - 32)
        if outside.any():
            key, offset = entries[outside][0]
            raise ValueError(f"{blame}: record {key} would be at byte {offset}")
        data, found, promised = np.memmap(self.path, np.uint8, "r"), [], None
        for some in np.array_split(entries, -(-len(entries) // 65536)):
            head = data[np.minimum(some[:, 1:] + np.arange(36), size - 1)]                       # (n, 36)
            words, reals = head.view("<u4"), head.view("<f4")
            cut, length, flag = words[:, 1] >> 29, (words[:, 1] & 0x1FFFFFFF).astype(np.int64), words[:, 2]
            bad = (words[:, 0] != self.MAGIC) | (cut > 1) | (some[:, 1] + 8 + length > size)
            if bad.any():
                key, offset = some[bad][0]
                raise ValueError(f"{blame}: no whole record {key} at byte {offset}")
            label = np.where(flag > 0, reals[:, 8], reals[:, 3])
            image = length > 24 + 4 * flag.astype(np.int64)     # headers, identity records: labels only
            for i in np.flatnonzero(cut):                        # the cut may lie in what has just been read
                payload = self._payload(int(some[i, 1]), int(length[i]))
                flag[i], = struct.unpack_from("<I", payload)
                label[i], = struct.unpack_from("<f", payload, 24 if flag[i] else 4)
                image[i] = len(payload) > 24 + 4 * int(flag[i])
            if some[0, 0] == 0 and not image[0] and flag[0]:
                promised = int(label[0]) - 1
            found.append(np.column_stack([some, length, label.round()]).astype(np.int64)[image])
        found = np.concatenate(found)
        if promised is not None and promised < 2**24 and promised != len(found):   # float32 is exact below
            raise ValueError(f"{blame}: its header counts {promised} images, the index finds {len(found)}")
        return found


# ---- Identity folders and landmarks ------------------------------------------------------------------------

def read_identities(root: str) -> list[Face]:
    """Folders of people, as VGGFace2, CASIA or your own: identity, the first folder below root; points, those
    of the .pts beside an image (None without one), as many in all.

    Tree: PERSON/NAME.jpg or PERSON/.../NAME.jpg, at any depth; .jpg, .jpeg or .png; NAME.pts beside, if any
          (VGGFace2: n000002/0001_01.jpg in train/ and test/: name the one that you want)
    Source: you. VGGFace2 and MS-Celeb-1M are no longer distributed by their authors.
    Raises: FileNotFoundError without images; ValueError for an image in no folder, or fewer than two people.
    """
    if not os.path.isdir(root):
        raise datasets._missing(read_identities, root, f"no folder {root}")
    faces, first = [], None
    for folder, _, _ in os.walk(root, followlinks=True):
        person = os.path.relpath(folder, root).split(os.sep)[0]
        for image, pts in datasets._beside(folder):
            if image and person == ".":
                raise ValueError(f"{image} lies in no person's folder; wanted {root}/PERSON/NAME.jpg")
            if image:
                faces.append(Face(image, read_pts(pts) if pts else None, identity=person))
                first = first or pts and (pts, len(faces[-1].points))
                if pts and len(faces[-1].points) != first[1]:
                    raise ValueError(f"{pts} has {len(faces[-1].points)} points, {first[0]} {first[1]}; "
                                     "wanted as many in all")
    if not faces:
        raise datasets._missing(read_identities, root, f"no image in {root}")
    faces.sort(key=lambda face: (natural(face.identity), natural(face.image)))
    if faces[0].identity == faces[-1].identity:
        raise ValueError(f"{root}: all {len(faces)} images are of one identity, {faces[0].identity}; wanted "
                         "two folders of people or more")
    return faces


def _names(faces: Sequence[Face], root: str) -> list[str]:
    """Paths of the images relative to root, as they stand without one; of images without path, the place."""
    return [str(i) if not isinstance(face.image, (str, os.PathLike)) else
            os.path.relpath(face.image, root) if root else os.path.normpath(face.image)
            for i, face in enumerate(faces)]


def read_landmarks(names: Sequence[str], path: str, size: int = 112) -> np.ndarray:
    """Landmarks of images from a file or folder beside them: (N, P, 2) float32 px, nan where there are none.

    Args: names, of the N images, relative to their folder, as "Ann/1.jpg" (of `Records`: the keys as text);
        path: rows image,x0,y0,x1,y1,... in px (`datasets.read_points_csv`; with or without suffix);
            or a folder of .pts that mirrors the images', which `--predict --output` of the landmark scripts
            writes (NAME.pts; the further faces of an image, NAME.face2.pts, are left aside);
            or CVLface's ldmk_5points.csv, header idx,ldmk_0,...,ldmk_9: place of an image (its record's
            place, not key), then x y as fractions of an image `size` px wide and high.
    Raises: FileNotFoundError; ValueError if it covers none of the images, has several rows for one, numbers
        of points that differ, fractions where px are due or px where fractions are."""
    fractions = os.path.isfile(path) and _first_line(path).startswith("idx,ldmk_0")
    if os.path.isdir(path):
        files = [os.path.join(path, _stem(name) + ".pts") for name in names]
        found = [i for i, file in enumerate(files) if os.path.isfile(file)]
        points = [read_pts(files[i]) for i in found]
        other = next(glob.iglob(os.path.join(glob.escape(path), "**", "*.pts"), recursive=True), "no .pts")
    elif not os.path.isfile(path):
        raise FileNotFoundError(f"--landmarks {path}: no such file or folder")
    elif fractions:
        rows = _table(path, np.float64, 11, delimiter=",", skiprows=1)
        found, points = rows[:, 0].astype(np.int64), rows[:, 1:].reshape(-1, 5, 2) * size - 0.5
        if len(np.unique(found)) < len(found):
            raise ValueError(f"{path}: {len(found)} rows of {len(np.unique(found))} images, wanted one each")
        if np.median(np.abs(rows[:, 1:])) > 1.5:
            raise ValueError(f"{path}: found {rows[0, 1]:g} and the like, wanted fractions of the image (0 "
                             "to 1); px go into rows image,x0,y0,... with another header")
        other = f"image {found.max()}"
        if found.min() < 0 or found.max() >= len(names):
            found = []
    else:
        table = datasets.read_points_csv(path)
        rows = {_stem(name): rows[0] for name, rows in table.items()}
        if len(rows) < sum(map(len, table.values())):
            stems = [_stem(name) for name, rows in table.items() for _ in rows]
            twice = collections.Counter(stems).most_common(1)[0][0]
            raise ValueError(f"{path}: several rows of image {twice}, wanted one; keep that of its person")
        other, found = next(iter(table)), [i for i, name in enumerate(names) if _stem(name) in rows]
        points = [rows[_stem(names[i])] for i in found]
    if not len(found):
        raise ValueError(f"--landmarks {path} covers other images: it has {other}, of {len(names)} wanted "
                         f"images the first is {names[0]}")
    for i, own in zip(found, points):
        if len(own) != len(points[0]):
            raise ValueError(f"{path}: {len(own)} points for {names[i]}, {len(points[0])} for "
                             f"{names[found[0]]}; wanted as many in all")
    if not fractions and np.abs(points).max() <= 1.5:
        raise ValueError(f"{path}: found {points[0][0].tolist()} for {names[found[0]]} and nothing larger: "
                         "these are fractions of an image, wanted px")
    result = np.full((len(names), *np.shape(points)[1:]), np.nan, np.float32)
    result[found] = points
    return result


def attach_points(faces: Sequence[Face], path: str, root: str = "", size: int = 112) -> list[Face]:
    """The faces with the landmarks of a file or folder, as `read_landmarks`, which names images relative to
    `root`. Faces without landmarks there keep what they have.   Raises: as `read_landmarks`."""
    points = read_landmarks(_names(faces, root), path, size)
    for face in faces:
        if face.points is not None and len(face.points) != points.shape[1]:
            raise ValueError(f"{path} has {points.shape[1]} points, the .pts of {face.image} "
                             f"{len(face.points)}; wanted as many in all")
    return [dataclasses.replace(face, points=own) if np.isfinite(own).all() else face
            for face, own in zip(faces, points)]


def _refuse(names: Sequence[str], missing: Sequence[int], needed_for: str) -> None:
    if len(missing):
        raise ValueError(f"{names[missing[0]]} has no landmarks, which {needed_for} needs; so for "
                         f"{len(missing)} of {len(names)} images. Put .pts beside them, or give --landmarks")


def check_points(faces: Sequence[Face], needed_for: str) -> None:
    """Raises: ValueError naming the first image without points, how many there are, and what needs them."""
    _refuse(_names(faces, ""), [i for i, face in enumerate(faces) if face.points is None], needed_for)


# ---- Whole images as batches -------------------------------------------------------------------------------

class WholeImages(torch.utils.data.Dataset):
    """Whole images as size x size crops, one warp per image, in batches, as `datasets.CropDataset` has them.

    The longer side is fitted to `size` and the image centred; what lies outside it is grey. A larger image is
    shrunk by area first, so that nothing aliases. One of that size that nothing moves is copied untouched.
    Args: images, a sequence [i] -> RGB uint8 (H, W, 3); points (N, P, 2) px of the images, or None; augment,
        flip, seed: as for `CropDataset`, but without points mirroring needs no flip; align, a template (P, 2)
        in px of the crop and t in [0, 1]: crops are by the matrix that is 1 - t of that of the whole image
        and t of the similarity that fits the points to the template.
    A key is (epoch, index). A batch: image (B, size, size, 3) uint8; points (B, P, 2) float32 crop px, if
    given; matrix (B, 2, 3) float32, image px -> crop px; index (B,); and the augmentation's extras.
    Raises: ValueError for points that are not one finite (P, 2) for each image."""

    def __init__(self, images, size: int, points=None, augment=None, flip=None, seed=0, align=None):
        self.images, self.size, self.augment, self.seed, self.align = images, size, augment, seed, align
        self.flip = None if flip is None else torch.tensor(flip)
        self.points = None if points is None else torch.as_tensor(points)
        if points is not None:
            if self.points.ndim != 3 or len(self.points) != len(images):
                raise ValueError(f"points {tuple(self.points.shape)} for {len(images)} images, not (N, P, 2)")
            bad = (~self.points.isfinite().all(-1).all(-1)).nonzero().flatten().tolist()
            _refuse([f"image {i}" for i in range(len(images) if bad else 0)], bad, "this run")

    def __len__(self):
        return len(self.images)

    def __getitems__(self, keys) -> dict:  # the name by which a DataLoader asks for a whole batch
        images = [self.images[i] for _, i in keys]
        corners = np.array([(-0.5, -0.5, image.shape[1] - 0.5, image.shape[0] - 0.5) for image in images])
        may_mirror = self.points is None or self.flip is not None
        moved, mirror, extras = datasets.draw_moves(keys, self.augment, self.size, self.seed, may_mirror)
        index = torch.tensor([i for _, i in keys])
        frames = torch.from_numpy(datasets.square_frames(corners, self.size, 1.0))
        if self.align is not None:
            template, t = self.align
            frames = frames.lerp(warp.fit_similarity(self.points[index].double(), template.double()), t)
        matrix = warp.compose(moved, frames)
        batch = {"index": index, "matrix": matrix.float(), **extras}
        if self.points is not None:
            points = warp.apply_affine(matrix, self.points[index].double())
            if self.flip is not None:
                points = torch.where(mirror[:, None, None], points[:, self.flip], points)
            batch["points"] = points.float()
        # What a crop can use of a larger image is `size` px, or more if the augmentation enlarges it.
        zoom = torch.linalg.det(matrix[:, :, :2]).abs().sqrt().numpy()
        shape = np.array([image.shape[1::-1] for image in images])                              # (B, 2) W, H
        ratio = np.minimum(np.maximum(zoom, self.size / shape.max(1)), 1)[:, None]
        side = np.maximum(np.round(shape * ratio), 1).astype(int)
        back = np.zeros((len(keys), 2, 3))                                      # px as shrunk -> image px
        back[:, [0, 1], [0, 1]] = shape / side
        back[:, :, 2] = (shape / side - 1) / 2
        matrix = warp.compose(matrix, torch.from_numpy(back)).numpy()
        out = np.empty((len(keys), self.size, self.size, 3), np.uint8)
        square, still = (self.size, self.size), np.abs(matrix - np.eye(2, 3)).max((1, 2)) < 1e-9
        for canvas, image, m, still, whole, (width, height) in zip(out, images, matrix, still, shape, side):
            if (width, height) != tuple(whole):
                image = cv2.resize(image, (int(width), int(height)), interpolation=cv2.INTER_AREA)
            if still and image.shape[:2] == square:
                canvas[:] = image
            else:
                cv2.warpAffine(image, m, square, dst=canvas, flags=cv2.INTER_LINEAR,
                               borderMode=cv2.BORDER_CONSTANT, borderValue=(BORDER,) * 3)
        return batch | {"image": torch.from_numpy(out)}


# ---- Verification: pairs of templates ----------------------------------------------------------------------

@dataclass(eq=False)
class VerificationSet:
    """Pairs: are they the same person? A template is one image, or the frames of one video."""
    name: str
    images: Sequence                                # [i] -> RGB uint8 (H, W, 3)
    template: np.ndarray                            # (N,) int64, of each image
    pairs: np.ndarray                               # (M, 2) int64, of templates
    same: np.ndarray                                # (M,) bool
    names: np.ndarray                               # (N,) str, of the images, for `read_landmarks`
    points: np.ndarray | None = None                # (N, P, 2) float32 px
    folds: int = 10                                 # consecutive blocks of pairs


def with_landmarks(test, path: str, size: int = 112):
    """The test with the points of a file or folder, as `read_landmarks`, which must cover all its images."""
    points = read_landmarks(test.names, path, size)
    _refuse(test.names, np.flatnonzero(~np.isfinite(points).all((1, 2))), f"--landmarks {path}")
    return dataclasses.replace(test, points=points)


def _need(reader: Callable, root: str, *parts: str) -> str:
    return datasets._below(reader, root, *parts, flag="--test")


def _listing(folder: str) -> list[str]:
    """Names of the images directly in a folder, in natural order; ._x are macOS's."""
    names = [n for n in os.listdir(folder) if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    return sorted(names, key=natural)


def _check_listed(names: Sequence[str], base: str, listed: str) -> None:
    missing = [name for name in names if not os.path.isfile(os.path.join(base, name))]
    if missing:
        raise FileNotFoundError(f"{listed} names {missing[0]}, which is not in {base}; so for {len(missing)} "
                                f"of {len(names)} images")


def _distinct(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The different names in order, and for each name its place among them."""
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return list(place), np.array([place[name] for name in names], np.int64)


def _image_pairs(name, base, listed, first, second, same, folds=10) -> VerificationSet:
    """The test of pairs of image files, given by paths relative to `base`."""
    names, place = _distinct([*first, *second])
    _check_listed(names, base, listed)
    return VerificationSet(name, Images([os.path.join(base, n) for n in names]), np.arange(len(names)),
                           place.reshape(2, -1).T.copy(), np.array(same, bool), np.array(names), folds=folds)


def _by_fold(fold: Sequence, where: str) -> tuple[np.ndarray, int]:
    """Order that makes folds consecutive blocks, as the metric cuts them, and their number."""
    values, index, counts = np.unique(np.asarray(fold), return_inverse=True, return_counts=True)
    if len(values) < 2 or np.ptp(counts) > 1:
        raise ValueError(f"{where}: found {len(values)} folds of {counts.min()} to {counts.max()} pairs, "
                         "wanted two or more of the same size")
    return np.lexsort((index, -counts[index])), len(values)                # one pair larger: these come first


class _Array:
    """Stands for numpy.ndarray in a pickle: its dtype is of an allow-list, its shape that of its bytes."""
    value: np.ndarray | list = []

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, dtype, by_columns, raw = state
        self.value = list(raw) if isinstance(raw, list) else dtype.read(raw, shape, "CF"[bool(by_columns)])


class _DType:
    """Stands for numpy.dtype: numbers of the allowed kinds, or the list of objects."""
    order = "|"

    def __init__(self, kinds, code, *_):
        self.kinds, self.code = kinds, code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, state):
        self.order = state[1].decode() if isinstance(state[1], bytes) else state[1]

    def read(self, raw, shape=(-1,), order="C"):
        if self.code not in self.kinds:
            raise pickle.UnpicklingError(f"it holds an array of {self.code!r}, wanted "
                                         f"{' or '.join(self.kinds)}")
        raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        return np.frombuffer(raw, {">": ">"}.get(self.order, "<") + self.code).reshape(shape, order=order)


def _latin1(text, encoding):
    return text.encode({"latin1": "latin1", b"latin1": "latin1"}[encoding])


class _Unpickler(pickle.Unpickler):
    """Bytes, lists, tuples, numbers and arrays. The globals that these ask for get harmless stand-ins; any
    other is refused, before anything of it is imported or called."""
    ALLOWED = {("_codecs", "encode"): _latin1, ("numpy", "ndarray"): _Array}
    for package in ("numpy.core", "numpy._core"):
        ALLOWED[f"{package}.multiarray", "_reconstruct"] = _Array
        ALLOWED[f"{package}.multiarray", "scalar"] = lambda dtype, raw: dtype.read(raw)[0]
        ALLOWED[f"{package}.numeric", "_frombuffer"] = lambda raw, dtype, *form: dtype.read(raw, *form)

    def __init__(self, file, kinds: Sequence[str]):
        super().__init__(file, encoding="bytes")
        self.allowed = self.ALLOWED | {("numpy", "dtype"): functools.partial(_DType, kinds)}

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such a file does not need. "
                                         "This may be an attack: refused, and nothing was run")
        return self.allowed[module, name]


def unpickle(path: str, what: str, kinds: Sequence[str] = ("u1", "b1")):
    """What a pickle holds, an array or plain values, without ever running code from it.
    Args: what, a name for such files; kinds, codes of the numbers that its arrays may hold, as "u1", "f8".
    Raises: ValueError "PATH is no WHAT: ..." that names a global that is refused, or says what is wrong."""
    with open(path, "rb") as file:
        content = file.read()
    try:
        value = _Unpickler(io.BytesIO(content), kinds).load()
    except Exception as error:                                          # a damaged pickle raises anything
        raise ValueError(f"{path} is no {what}: {error}") from None
    return value.value if isinstance(value, _Array) else value


def read_bin(path: str) -> VerificationSet:
    """The .bin of insightface: a pickle of (2N encoded images, N truth values); pair i is images 2i, 2i + 1.
    Files of Python 2 and 3 are read, without ever running code from them. Images are decoded when asked for;
    they are aligned already. names: "0", "1", ...

    Tree: lfw.bin, cfp_fp.bin, cfp_ff.bin, agedb_30.bin, calfw.bin, cplfw.bin or vgg2_fp.bin
    Source: inside the archives of insightface's training sets.
    Raises: FileNotFoundError; ValueError that names a global that is refused, or says what is wrong."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no {path}; it comes inside the insightface training archives")
    content = unpickle(path, "verification .bin")
    try:
        images, same = (list(v.value if isinstance(v, _Array) else v) for v in content)
        images = [v.value if isinstance(v, _Array) else v for v in images]
        images = [v if isinstance(v, bytes) else bytes(memoryview(v)) for v in images]
        same = np.array([bool(v) for v in same])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no verification .bin: {error}") from None
    if len(images) != 2 * len(same) or not len(same):
        raise ValueError(f"{path}: found {len(images)} images and {len(same)} pairs, wanted two a pair")
    return VerificationSet(os.path.splitext(os.path.basename(path))[0], Images(images, path),
                           np.arange(len(images)), np.arange(len(images)).reshape(-1, 2), same,
                           np.arange(len(images)).astype(str))


def read_lfw(root: str) -> VerificationSet:
    """LFW, view 2: 6,000 pairs in 10 folds, each 300 of the same person, then 300 of different ones.

    Tree: pairs.txt (here, or beside this folder): 10 TAB 300, then lines NAME n1 n2 or NAME1 n1 NAME2 n2
          lfw/NAME/NAME_0001.jpg (or .png; or without the folder lfw/)
    Source: Labeled Faces in the Wild, University of Massachusetts.
    """
    beside = os.path.join(os.path.dirname(os.path.abspath(root)), "pairs.txt")
    here = not os.path.exists(os.path.join(root, "pairs.txt")) and os.path.exists(beside)
    listed = beside if here else _need(read_lfw, root, "pairs.txt")
    base = os.path.join(root, "lfw") if os.path.isdir(os.path.join(root, "lfw")) else root
    (where, head), *rows = datasets._lines(listed) or [(listed, "")]
    folds, half = map(int, head.split()) if re.fullmatch(r"\d+\s+\d+", head) else (0, 0)
    if len(rows) != 2 * folds * half or not rows:
        raise ValueError(f"{where}: found {head!r} and {len(rows)} pairs, wanted the number of folds, that "
                         "of pairs of one kind in a fold, and as many pairs")
    first, second, same = [], [], []
    for where, line in rows:
        fields = line.split()
        if len(fields) == 3:
            fields.insert(2, fields[0])
        if len(fields) != 4 or not (fields[1].isdigit() and fields[3].isdigit()):
            raise ValueError(f"{where}: found {line!r}, wanted NAME n1 n2 or NAME1 n1 NAME2 n2")
        a, i, b, j = fields
        first.append(f"{a}/{a}_{int(i):04d}")
        second.append(f"{b}/{b}_{int(j):04d}")
        same.append(a == b)
    suffix = next((s for s in SUFFIXES if os.path.isfile(os.path.join(base, first[0] + s))), ".jpg")
    return _image_pairs("LFW", base, listed, [n + suffix for n in first], [n + suffix for n in second], same,
                        folds)


def read_ytf(root: str, frames: int | None = None) -> VerificationSet:
    """YouTube Faces: 5,000 pairs of videos in 10 folds; a template is a video. frames: at most so many of
    each, evenly spaced; None takes all.

    Tree: splits.txt: a header, then lines split, NAME/VIDEO, NAME/VIDEO, 1 or 0
          aligned_images_DB/NAME/VIDEO/*.jpg or frame_images_DB/NAME/VIDEO/*.jpg (the whole frames)
    Source: https://www.cs.tau.ac.il/~wolf/ytfaces.
    """
    listed, rows = _need(read_ytf, root, "splits.txt"), []
    base = os.path.join(root, "frame_images_DB")
    base = base if os.path.isdir(base) else _need(read_ytf, root, "aligned_images_DB")
    for where, line in datasets._lines(listed)[1:]:
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 4 or not fields[0].isdigit() or fields[3] not in ("0", "1"):
            raise ValueError(f"{where}: found {line!r}, wanted split, NAME/VIDEO, NAME/VIDEO, 1 or 0")
        rows.append(fields)
    order, folds = _by_fold([int(row[0]) for row in rows], listed)
    _, first, second, same = zip(*(rows[i] for i in order))
    videos, place = _distinct([*first, *second])
    names, template = [], []
    for number, video in enumerate(videos):
        found = _listing(_need(read_ytf, base, video))
        if not found:
            raise datasets._missing(read_ytf, root, f"no image in {os.path.join(base, video)}", "--test")
        if frames is not None and frames < len(found):
            found = [found[i] for i in np.linspace(0, len(found) - 1, frames).round().astype(int)]
        names += [f"{video}/{name}" for name in found]
        template += [number] * len(found)
    return VerificationSet("YTF", Images([os.path.join(base, n) for n in names]), np.array(template),
                           place.reshape(2, -1).T.copy(), np.array(same) == "1", np.array(names), folds=folds)


def read_cfp(root: str, kind: str = "FP") -> VerificationSet:
    """CFP: 7,000 pairs in 10 folds, of a frontal and a profile image (kind "FP") or two frontal ones ("FF").

    Tree: Protocol/Pair_list_F.txt, Protocol/Pair_list_P.txt: lines number, path relative to Protocol/
          Protocol/Split/FP/01 ... 10/same.txt and diff.txt (and Split/FF): lines i,j, numbers of those lists
          Data/Images/001/frontal/01.jpg, Data/Images/001/profile/01.jpg, ...
    Source: http://www.cfpw.io, Celebrities in Frontal-Profile.
    """
    lists = {}
    for letter in "FP":
        rows = datasets._lines(_need(read_cfp, root, "Protocol", f"Pair_list_{letter}.txt"))
        lists[letter] = {number: os.path.normpath(os.path.join("Protocol", name.strip()))
                         for number, _, name in (line.partition(" ") for _, line in rows)}
    first, second, same, fold = [], [], [], []
    for number in range(1, 11):
        for name in ("same", "diff"):
            listed = _need(read_cfp, root, "Protocol", "Split", kind, f"{number:02d}", f"{name}.txt")
            for where, line in datasets._lines(listed):
                i, _, j = line.replace(" ", "").partition(",")
                if i not in lists[kind[0]] or j not in lists[kind[1]]:
                    raise ValueError(f"{where}: found {line!r}, wanted i,j, numbers of those lists")
                first.append(lists[kind[0]][i])
                second.append(lists[kind[1]][j])
                same.append(name == "same")
                fold.append(number)
    order, folds = _by_fold(fold, os.path.join(root, "Protocol"))
    first, second, same = ([column[i] for i in order] for column in (first, second, same))
    return _image_pairs(f"CFP-{kind}", root, os.path.join(root, "Protocol"), first, second, same, folds)


def read_calfw(root: str, name: str = "CALFW") -> VerificationSet:
    """CALFW (LFW across age) or CPLFW (across pose): 6,000 pairs, 10 folds in the order of the file.

    Tree: pairs_CALFW.txt, pairs_CPLFW.txt: two lines FILE LABEL a pair, label 0 if they are different people
          images/*.jpg or aligned images/*.jpg, or the images beside the list
    Source: http://whdeng.cn/CALFW and CPLFW.
    """
    listed, pairs = _need(read_calfw, root, f"pairs_{name}.txt"), []
    for where, line in datasets._lines(listed):
        file, _, label = line.rpartition(" ")
        if not file or not label.lstrip("-").isdigit():
            raise ValueError(f"{where}: found {line!r}, wanted FILE LABEL")
        pairs.append((file.strip(), int(label) != 0))
    (first, same), (second, again) = ([*zip(*pairs[i::2])] or [(), i] for i in (0, 1))
    if same != again:
        raise ValueError(f"{listed}: {len(pairs)} lines that are not pairs of one label, wanted two and two")
    folders = [os.path.join(root, folder) for folder in ("images", "aligned images", "")]
    base = next((base for base in folders if os.path.isfile(os.path.join(base, first[0]))), folders[0])
    return _image_pairs(name, base, listed, first, second, same)


def read_cplfw(root: str) -> VerificationSet:
    """CPLFW, as `read_calfw`."""
    return read_calfw(root, "CPLFW")


def _csv_rows(path: str, columns: str) -> list[tuple[str, dict]]:
    """("path:number", row) of a table whose header has these columns, and maybe others."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, skipinitialspace=True, restval="")
        if not set(columns.split(",")) <= set(table.fieldnames or ()):
            raise ValueError(f"{path}:1: found columns {table.fieldnames}, wanted {columns}")
        rows = [(f"{path}:{table.line_num}", row) for row in table]
    if not rows:
        raise ValueError(f"{path} has no row {columns}")
    return rows


def read_pairs_csv(path: str) -> VerificationSet:
    """Pairs of your own, as a table.

    Tree: NAME.csv: header image_a,image_b,same,fold; paths relative to it; same 1 or 0; fold (may be left
          out: ten blocks in the order of the file): anything, as many pairs in each
    Source: you.
    """
    rows = _csv_rows(path, "image_a,image_b,same")
    for where, row in rows:
        if row["same"] not in ("0", "1") or not row["image_a"] or not row["image_b"]:
            raise ValueError(f"{where}: found {list(row.values())}, wanted image_a,image_b,same, same 1 or 0")
    rows, folds = [row for _, row in rows], min(10, len(rows))
    if "fold" in rows[0]:
        order, folds = _by_fold([row["fold"] for row in rows], path)
        rows = [rows[i] for i in order]
    first, second = ([os.path.normpath(row[key]) for row in rows] for key in ("image_a", "image_b"))
    return _image_pairs(path, os.path.dirname(path), path, first, second,
                        [row["same"] == "1" for row in rows], folds)


# ---- Identification: gallery and probes --------------------------------------------------------------------

ROLES = ("gallery", "probe", "distractor", "unused")


@dataclass(eq=False)
class IdentificationSet:
    """Whose picture is each probe? Gallery and distractors are searched, unused images take no part. Results
    by group of probes."""
    name: str
    images: Sequence                                # [i] -> RGB uint8 (H, W, 3)
    identity: np.ndarray                            # (N,) int64; -1 for distractors
    role: np.ndarray                                # (N,) uint8, of `ROLES`
    group: np.ndarray                               # (N,) str, as the yaw angle; "" for none
    names: np.ndarray                               # (N,) str, of the images, for `read_landmarks`
    points: np.ndarray | None = None                # (N, P, 2) float32 px


def _identification(name, images, names, identity, role, group=None) -> IdentificationSet:
    """The record, after an error for a probe that no system could find."""
    identity, role = np.where(np.array(role) == 2, -1, identity), np.array(role, np.uint8)
    lost = np.flatnonzero((role == 1) & ~np.isin(identity, identity[role == 0]))
    if lost.size or not (role == 1).any():
        what = f"probe {names[lost[0]]} has no mate in the gallery, nor have {lost.size - 1} others" \
            if lost.size else "there is no probe"
        raise ValueError(f"{name}: {what}; each probe's person needs an image in the gallery")
    group = np.full(len(names), "") if group is None else np.array(group)
    return IdentificationSet(name, images, identity.astype(np.int64), role, group, np.array(names))


def read_identification(path: str) -> IdentificationSet:
    """A test of your own, or Multi-PIE, or MegaFace with its noise lists (role skip leaves an image out), as
    a table. A distractor has no mate: its id does not count.

    Tree: NAME.csv: header path,id,role,group; paths relative to it; role gallery, probe, distractor or skip;
          group (may be left out): results are told for each, as |yaw| for Multi-PIE
    Source: you. Multi-PIE is sold by CMU; MegaFace is no longer distributed.
    """
    rows = _csv_rows(path, "path,id,role")
    for where, row in rows:
        if row["role"] not in (*ROLES[:3], "skip") or not row["path"]:
            raise ValueError(f"{where}: found role {row['role']!r} for {row['path']!r}, wanted "
                             f"path,id,role with a role of {', '.join(ROLES[:3])}, skip")
    rows = [row for _, row in rows if row["role"] != "skip"]
    names, base = [os.path.normpath(row["path"]) for row in rows], os.path.dirname(path)
    _check_listed(names, base, path)
    _, identity = _distinct([row["id"] for row in rows])
    return _identification(path, Images([os.path.join(base, name) for name in names]), names, identity,
                           [ROLES.index(row["role"]) for row in rows],
                           [row.get("group", "") for row in rows])


def read_tinyface(root: str) -> IdentificationSet:
    """TinyFace: 3,728 probes in a gallery of 4,443 and 153,428 distractors, small and not aligned. The id of
    a face is the number that its file name begins with.

    Tree: Testing_Set/Probe/ID_N.jpg, Testing_Set/Gallery_Match/ID_N.jpg, Testing_Set/Gallery_Distractor/*.jpg
    Source: https://qmul-tinyface.github.io, for research.
    """
    names, identity, role = [], [], []
    for number, folder in enumerate(("Gallery_Match", "Probe", "Gallery_Distractor")):
        found = _listing(_need(read_tinyface, root, "Testing_Set", folder))
        for name in found:
            person = name.partition("_")[0]
            if number < 2 and not person.isdigit():
                raise ValueError(f"{os.path.join(root, 'Testing_Set', folder, name)}: wanted a name ID_N.jpg")
            identity.append(int(person) if number < 2 else -1)
        names += [f"Testing_Set/{folder}/{name}" for name in found]
        role += [number] * len(found)
    images = Images([os.path.join(root, name) for name in names])
    return _identification("TinyFace", images, names, identity, role)


# ---- Templates: IJB ----------------------------------------------------------------------------------------

@dataclass(eq=False)
class TemplateSet:
    """Pairs of templates; a template is images of a person, those of one medium (a video) counting once."""
    name: str
    images: Sequence                                # [i] -> RGB uint8 (H, W, 3)
    points: np.ndarray                              # (N, 5, 2) float32 px
    faceness: np.ndarray                            # (N,) float32, a detector's score
    template: np.ndarray                            # (N,) int64, 0..T-1
    media: np.ndarray                               # (N,) int64
    pairs: np.ndarray                               # (M, 2) int32, of templates
    same: np.ndarray                                # (M,) bool
    names: np.ndarray                               # (N,) str, of the images


def read_ijb(root: str, kind: str) -> TemplateSet:
    """IJB-B or IJB-C (kind "B", "C"), 1:1 verification, as insightface packs it. Points as they stand. The
    pair file is parsed once, and kept beside itself as .npy where the folder can be written.

    Tree: (IJBC/)loose_crop/1.jpg ...   and in (IJBC/)meta/, or ijbb for ijbc, without headers:
          ijbc_face_tid_mid.txt: NAME.jpg template medium; ijbc_template_pair_label.txt: template template 1|0
          ijbc_name_5pts_score.txt: NAME.jpg x1 y1 ... x5 y5 faceness, the same images in the same order
    Source: NIST, on application; insightface's IJB_release.
    """
    base = os.path.join(root, f"IJB{kind}")
    base = base if os.path.isdir(base) else root
    faces, marks, listed = (_need(read_ijb, base, "meta", f"ijb{kind.lower()}_{name}.txt")
                            for name in ("face_tid_mid", "name_5pts_score", "template_pair_label"))
    names, again = ([line.split(None, 1)[0] for _, line in datasets._lines(path)] for path in (faces, marks))
    if names != again:
        raise ValueError(f"{faces} has {len(names)} images, {marks} {len(again)}; wanted the same in order")
    ids, media = _table(faces, np.int64, 2, usecols=(1, 2)).T
    numbers = _table(marks, np.float32, 11, usecols=range(1, 12))
    rows = _cached(lambda: _table(listed, np.int64, 3).astype(np.int32), listed)
    templates, template = np.unique(ids, return_inverse=True)
    pairs = np.searchsorted(templates, rows[:, :2]).clip(max=len(templates) - 1)
    bad = np.flatnonzero((templates[pairs] != rows[:, :2]).any(1) | (rows[:, 2] >> 1 != 0))
    if bad.size:
        raise ValueError(f"{listed}:{bad[0] + 1}: found {rows[bad[0]].tolist()}, wanted two templates of "
                         f"{faces} and 1 or 0")
    crops = _need(read_ijb, base, "loose_crop")
    _check_listed(names, crops, faces)
    return TemplateSet(f"IJB-{kind}", Images([os.path.join(crops, name) for name in names]),
                       numbers[:, :10].reshape(-1, 5, 2), numbers[:, 10], template, media,
                       pairs.astype(np.int32), rows[:, 2] == 1, np.array(names))


def template_features(embeddings, template, media, weights=None) -> torch.Tensor:
    """Unit features of templates: the mean within each medium, the sum over the media, L2. (N, D) -> (T, D).
    Args: embeddings (N, D), norms kept; template (N,) 0..T-1; media (N,) integers; weights (N,), as faceness.
    Raises: ValueError for embeddings or weights that are not finite.   Source: insightface's IJB protocol."""
    embeddings = torch.as_tensor(embeddings)
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    template, media = (torch.as_tensor(ids).to(embeddings.device) for ids in (template, media))
    _, group, count = torch.stack([template, media]).unique(dim=1, return_inverse=True, return_counts=True)
    share = 1 / count[group].to(embeddings)
    share = share if weights is None else share * torch.as_tensor(weights).to(embeddings)
    features = embeddings.new_zeros(int(template.max()) + 1, embeddings.shape[1])
    features.index_add_(0, template, embeddings * share[:, None])
    if not features.isfinite().all():
        raise ValueError("embeddings or weights hold nan or inf; all must be finite")
    return torch.nn.functional.normalize(features, dim=1)


# ---- Any test, and tests of one's own ----------------------------------------------------------------------

# What tells the folder of a public test, and its reader.
FOLDERS: dict[str, Callable] = {
    "pairs.txt": read_lfw, "splits.txt": read_ytf, "Protocol": read_cfp, "pairs_CALFW.txt": read_calfw,
    "pairs_CPLFW.txt": read_cplfw, "Testing_Set": read_tinyface,
    **{f"{base}meta/ijb{kind.lower()}_face_tid_mid.txt": functools.partial(read_ijb, kind=kind)
       for kind in "BC" for base in ("", f"IJB{kind}/")},
    "../pairs.txt": read_lfw}


def read_test(path: str) -> VerificationSet | IdentificationSet | TemplateSet:
    """What `--test PATH` names, told by what lies there: a .bin, a .csv or the folder of a public test.
    Raises: ValueError or FileNotFoundError that lists what was looked for, or what is wrong with it."""
    path = os.fspath(path)
    if path.endswith(".bin"):
        return read_bin(path)
    if path.endswith(".csv") and os.path.isfile(path):
        columns = [column.strip() for column in _first_line(path).split(",")]
        if "image_a" in columns or "role" in columns:
            return read_pairs_csv(path) if "image_a" in columns else read_identification(path)
        raise ValueError(f"{path}:1: found columns {columns}, wanted image_a,image_b,same or path,id,role")
    for mark, reader in FOLDERS.items():
        if os.path.exists(os.path.join(path, mark)):
            return reader(path)
    raise FileNotFoundError(f"--test {path}: no test found. Looked for a .bin of insightface, a .csv with "
                            "the header image_a,image_b,same or path,id,role,group, and a folder with one of "
                            f"{', '.join(FOLDERS)}")


def _people(faces: Sequence[Face]) -> tuple[FolderImages, list[np.ndarray]]:
    """The images, and the faces of each person in their order."""
    images = FolderImages(faces)
    people = np.split(np.argsort(images.labels, kind="stable"), np.bincount(images.labels).cumsum()[:-1])
    counts = [len(person) for person in people]
    if len(people) < 2 or max(counts) < 2:
        raise ValueError(f"found {len(images)} images of {len(people)} people, {max(counts)} at most of one; "
                         "to test recognition takes two people, and two images of one of them")
    return images, people


def _stacked(faces: Sequence[Face]) -> np.ndarray | None:
    return None if any(face.points is None for face in faces) else np.stack([face.points for face in faces])


def own_pairs(faces: Sequence[Face], seed: int = 0, most: int = 6000) -> VerificationSet:
    """Pairs of a set that has no official ones. Of a person's n images in order all pairs n // 2 or more
    apart (neighbours are often frames of one video), `most` at most, evenly spaced; and as many pairs of
    different people at random, each person in turn being the first. Both in the order of the people and by
    turns: folds hold both kinds, and share as few people as can be.
    Raises: ValueError if there are not two people, or no two images of one."""
    images, people = _people(faces)
    genuine = np.concatenate([person[np.stack(np.triu_indices(len(person), max(len(person) // 2, 1)), 1)]
                              for person in people])                                               # (G, 2)
    genuine = genuine[np.linspace(0, len(genuine) - 1, min(most, len(genuine))).astype(int)]
    rng, count = np.random.default_rng(seed), np.array([len(person) for person in people])
    first = np.sort(np.arange(len(genuine)) % len(people))
    second = (first + rng.integers(1, len(people), len(first))) % len(people)
    flat, start = np.concatenate(people), count.cumsum() - count
    impostor = np.stack([flat[start[who] + rng.integers(0, count[who])] for who in (first, second)], 1)
    pairs = np.stack([genuine, impostor], 1).reshape(-1, 2)
    return VerificationSet("pairs", images, np.arange(len(images)), pairs,
                           np.tile([True, False], len(genuine)), np.array(_names(faces, "")), _stacked(faces),
                           max(2, min(10, len(people), len(genuine))))


def own_identification(faces: Sequence[Face]) -> IdentificationSet:
    """Gallery and probes of a set that has no official ones: each person's first image, and of n images those
    from n // 2 on (but the first); the ones between are unused.
    Raises: ValueError if there are not two people, or no two images of one."""
    images, people = _people(faces)
    role = np.full(len(images), 3)
    role[[person[0] for person in people]] = 0
    role[np.concatenate([person[max(len(person) // 2, 1):] for person in people])] = 1
    test = _identification("identification", images, _names(faces, ""), images.labels, role)
    return dataclasses.replace(test, points=_stacked(faces))


def score(test, features: torch.Tensor) -> dict[str, float]:
    """What a test says of features (N, D) of its images: "accuracy" and "accuracy/std" over the folds, of
    pairs; "rank1" and "rank5", then "rank1/GROUP", ..., of probes; "tar/0.0001", ..., true accept rates at
    false accept rates, of pairs of templates. A video's feature is the mean of its frames' unit features."""
    if isinstance(test, TemplateSet):
        pooled = template_features(features, test.template, test.media, test.faceness)
        first, second = torch.from_numpy(test.pairs.astype(np.int64)).T
        cosine = torch.cat([(pooled[a] * pooled[b]).sum(1) for a, b in zip(first.split(2**18),
                                                                          second.split(2**18))])
        rates = metrics.tar_at_far(cosine, test.same, (1e-6, 1e-5, 1e-4, 1e-3))
        return {f"tar/{far:g}": rate for far, rate in rates.items()}
    if isinstance(test, VerificationSet):
        template = torch.from_numpy(test.template)
        unit = torch.nn.functional.normalize(features.double())
        pooled = unit.new_zeros(int(template.max()) + 1, unit.shape[1]).index_add(0, template, unit)
        first, second = torch.from_numpy(test.pairs).T
        mean, spread = metrics.verification_accuracy(pooled[first], pooled[second], test.same, test.folds)
        return {"accuracy": mean, "accuracy/std": spread}
    identity = torch.from_numpy(test.identity)
    searched = torch.from_numpy((test.role == 0) | (test.role == 2))
    scores = {}
    for group in ("", *sorted(set(test.group[test.role == 1]) - {""}, key=natural)):
        probe = torch.from_numpy((test.role == 1) & ((test.group == group) | (group == "")))
        ranks = metrics.rank_k(features[probe], identity[probe], features[searched], identity[searched])
        scores |= {f"rank{k}" + (f"/{group}" if group else ""): rate for k, rate in ranks.items()}
    return scores
