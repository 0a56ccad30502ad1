"""Images of people to train recognition on: identity folders, insightface's records, landmarks that
lie beside either, and whole images as batches.

Images are a sequence with `.labels`: `images[i]` is RGB uint8 (H, W, 3), decoded when asked for.
Points are px of the stored image, pixel centres at whole numbers from 0.
"""
import collections
import contextlib
import dataclasses
import functools
import hashlib
import os
import platform
import re
import struct
import warnings
from typing import Callable, Sequence

import cv2
import numpy as np
import torch

from common import UserError, datasets, warp
from common.datasets import BORDER, Face
from common.formats import (IMAGE_SUFFIXES, beside, load_image, read_points_csv, read_pts,
                            walk)


def natural(name: str) -> tuple:
    """Sorting key by which n2 comes before n10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


def first_line(path: str) -> str:
    """The first line of a text file, with its end."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.readline()


def table(path: str, dtype, width: int, **options) -> np.ndarray:
    """(rows, width) numbers of a text file.   Raises: UserError naming the file, and the row."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # of an empty file
            rows = np.loadtxt(path, dtype, comments=None, ndmin=2, **options)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if rows.shape[1] != width or not len(rows) or not np.isfinite(rows).all():
        raise UserError(f"{path}: found a table {rows.shape}, wanted rows of {width} finite "
                        "numbers")
    return rows


def cached(make: Callable[[], np.ndarray], *sources: str) -> np.ndarray:
    """make(), kept beside the first of its source files as NAME.npy where that can be written, with
    a digest of it and of the sizes and times of the sources; written aside, then renamed."""
    kept = sources[0] + ".npy"
    found = map(os.stat, sources)
    stamp = repr([(one.st_size, one.st_mtime_ns) for one in found]).encode()
    with contextlib.suppress(OSError, ValueError, EOFError):        # absent, damaged or empty
        with open(kept, "rb") as file:
            array = np.load(file, allow_pickle=False)
            if file.read() == hashlib.sha1(array.tobytes() + stamp).digest():
                return array
    array = make()
    part = f"{kept}.{platform.node()}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            np.save(file, array)
            file.write(hashlib.sha1(array.tobytes() + stamp).digest())
        os.replace(part, kept)
    except OSError:                                                 # a read-only or full disk
        with contextlib.suppress(OSError):
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
    """Images by index: [i] -> RGB uint8 (H, W, 3), of paths, arrays or functions making one."""

    def __init__(self, sources: Sequence):
        self.sources = sources

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, i: int) -> np.ndarray:
        return load_image(self.sources[i])


def sources_of(faces: Sequence[Face]) -> list:
    """What `Images` takes of faces: those to be turned are functions."""
    return [functools.partial(load_image, face.image, True) if face.upright else face.image
            for face in faces]


class FolderImages(Images):
    """Images of `Face`s that have an identity. As `Records` has them: .labels (N,) int64, 0..C-1 in
    the natural order of the identities; .ids (C,) their names."""

    def __init__(self, faces: Sequence[Face]):
        super().__init__(sources_of(faces))
        nobody = [i for i, face in enumerate(faces) if face.identity is None]
        if nobody:
            raise UserError(f"{image_names(faces)[nobody[0]]} has no identity, nor have "
                            f"{len(nobody) - 1} other images; recognition needs a folder for each "
                            "person")
        people = sorted({face.identity for face in faces}, key=natural)
        number = {identity: label for label, identity in enumerate(people)}
        self.labels = np.array([number[face.identity] for face in faces], np.int64)
        self.ids = np.array(people)


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
        self.index = os.path.splitext(self.path)[0] + ".idx"
        for path in (self.path, self.index):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"no {path}; wanted a folder with train.rec and train.idx, "
                                        "or a .rec with its .idx beside it")
        self._file = None
        found = cached(self._scan, self.path, self.index)
        self.keys, self._offsets, self._lengths, ids = found.T.copy()
        self.ids, self.labels = np.unique(ids, return_inverse=True)
        if len(self.ids) < 2:
            raise UserError(f"{self.path} has {len(self.keys)} images of {len(self.ids)} "
                            "identities, wanted two identities or more")

    def __getstate__(self):
        return self.__dict__ | {"_file": None}                      # each process opens its own

    def keep(self, count: int):
        """Leaves out all but the first `count` images."""
        self.keys = self.keys[:count]
        self._offsets = self._offsets[:count]
        self._lengths = self._lengths[:count]
        ids = self.ids[self.labels[:count]]
        self.ids, self.labels = np.unique(ids, return_inverse=True)

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

    def _scan(self) -> np.ndarray:
        """(N, 4) int64 of the images: key, offset, length of the first part, original id."""
        entries = table(self.index, np.int64, 2)
        entries = entries[entries[:, 0].argsort(kind="stable")]
        size = os.path.getsize(self.path)
        blame = (f"{self.path} ({size} bytes) is cut short, or {self.index} ({len(entries)} "
                 "records) belongs to another")
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
            rows = np.column_stack([some, length, label])[image]
            bad = ~((rows[:, 3] >= 0) & (rows[:, 3] < 2 ** 31) & (rows[:, 3] % 1 == 0))
            if bad.any():
                key, label = rows[bad][0, [0, 3]]
                raise UserError(f"{self.path}, record {key:.0f}: found the label {label:g}, wanted "
                                "the number of an identity, from 0")
            found.append(rows.astype(np.int64))
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
        words = head.view("<u4")
        reals = head.view("<f4")
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
    if not faces:
        raise datasets.missing(read_identities, root, f"no image in {root}")
    marked = [face for face in faces if face.points is not None]
    for face in marked:
        if len(face.points) != len(marked[0].points):
            raise UserError(f"{face.where} has {len(face.points)} points, {marked[0].where} "
                            f"{len(marked[0].points)}; wanted as many in all")
    datasets.check_points(marked, root)
    faces.sort(key=lambda face: (natural(face.identity), natural(face.image)))
    if faces[0].identity == faces[-1].identity:
        raise UserError(f"{root}: all {len(faces)} images are of one identity, "
                        f"{faces[0].identity}; wanted two folders of people or more")
    return faces


def image_names(faces: Sequence[Face], root: str = "") -> list[str]:
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


def read_landmarks(names: Sequence[str], path: str) -> np.ndarray:
    """Landmarks of images from a file or folder beside them: (N, P, 2) float32 px, nan where there
    are none.

    Args: names, of the N images, relative to their folder, as "Ann/1.jpg" (of `Records`: the keys);
        path: rows image,x0,y0,x1,y1,... in px (`read_points_csv`; with or without suffix);
            or a folder of .pts that mirrors the images', which `--predict --output` of the landmark
            scripts writes (NAME.pts; the further faces of an image, NAME.face2.pts, are left
            aside); or CVLface's ldmk_5points.csv, header idx,ldmk_0,...,ldmk_9: place of an image
            (its record's place, not key), then x y over 112, the side of its images in px.
    Raises: FileNotFoundError; UserError if it covers none of the images, has several rows for one,
        numbers of points that differ, fractions where px are due or px where fractions are."""
    if os.path.isdir(path):
        found, points, other = _pts_points(names, path)
    elif not os.path.isfile(path):
        raise FileNotFoundError(f"--landmarks {path}: no such file or folder")
    elif first_line(path).startswith("idx,ldmk_0"):
        found, points, other = _cvlface_points(len(names), path)
    else:
        found, points, other = _csv_points(names, path)
    if not len(found):
        raise UserError(f"--landmarks {path} covers other images: it has {other}, of {len(names)} "
                        f"wanted images the first is {names[0]}")
    for i, own in zip(found, points):
        if len(own) != len(points[0]):
            raise UserError(f"{path}: {len(own)} points for {names[i]}, {len(points[0])} for "
                            f"{names[found[0]]}; wanted as many in all")
    datasets.check_landmarks(np.asarray(points), lambda i: f"{path}, image {names[found[i]]}", path)
    result = np.full((len(names), *np.shape(points)[1:]), np.nan, np.float32)
    result[found] = points
    return result


def refuse_second_landmarks(args):
    """Raises: UserError for --landmarks with a set that has its own."""
    if args.landmarks and args.data in ("faces", "faces-geometry", "youtube"):
        raise UserError(f"--landmarks {args.landmarks}: --data {args.data} has landmarks of its "
                        "own")


def _stem(name: str) -> str:
    """Normalised path without the suffix of an image: there lie the landmarks of that image."""
    path = os.path.normpath(name)
    return os.path.splitext(path)[0] if path.lower().endswith(IMAGE_SUFFIXES) else path


# Each of the three gives the places of the images that it found, their points (P, 2) px, and what
# it has for the error when there is none.

def _pts_points(names, folder):
    files = [os.path.join(folder, _stem(name) + ".pts") for name in names]
    found = [i for i, file in enumerate(files) if os.path.isfile(file)]
    if not found:
        return [], [], next(iter(walk(folder, (".pts",))), "no .pts")
    return found, [read_pts(files[i]) for i in found], ""


def _cvlface_points(count, path):
    rows = table(path, np.float64, 11, delimiter=",", skiprows=1)
    found = rows[:, 0].astype(np.int64)
    if len(np.unique(found)) < len(found):
        raise UserError(f"{path}: {len(found)} rows of {len(np.unique(found))} images, wanted one "
                        "each")
    if np.median(np.abs(rows[:, 1:])) > 1.5:
        raise UserError(f"{path}: found {rows[0, 1]:g} and the like, wanted fractions of the image "
                        "(0 to 1); px go into rows image,x0,y0,... with another header")
    if found.min() < 0 or found.max() >= count:
        return [], [], f"image {found.max()}"
    return found, rows[:, 1:].reshape(-1, 5, 2) * 112, ""  # no half px, as in the code


def _csv_points(names, path):
    rows = collections.defaultdict(list)
    for name, faces in read_points_csv(path).items():
        rows[_stem(name)] += list(faces)
    twice = [name for name, faces in rows.items() if len(faces) > 1]
    if twice:
        raise UserError(f"{path}: several rows of image {twice[0]}, wanted one; keep that of its "
                        "person")
    found = [i for i, name in enumerate(names) if _stem(name) in rows]
    return found, [rows[_stem(names[i])][0] for i in found], next(iter(rows))


def attach_points(faces: Sequence[Face], path: str, root: str = "") -> list[Face]:
    """The faces with the landmarks of a file or folder, as `read_landmarks`, which names images
    relative to `root`. Faces without landmarks there keep what they have."""
    points = read_landmarks(image_names(faces, root), path)
    attached = []
    for face, own in zip(faces, points):
        if face.points is not None and len(face.points) != len(own):
            raise UserError(f"{path} has {len(own)} points, the .pts of {face.image} "
                            f"{len(face.points)}; wanted as many in all")
        attached.append(dataclasses.replace(face, points=own) if np.isfinite(own).all() else face)
    return attached


def refuse_missing(names: Sequence[str], missing: Sequence[int], needed_for: str) -> None:
    """A UserError if any image is missing landmarks."""
    if len(missing):
        raise UserError(f"{names[missing[0]]} has no landmarks, which {needed_for} needs; so for "
                        f"{len(missing)} of {len(names)} images. Put .pts beside them, or give "
                        "--landmarks")


def check_points(faces: Sequence[Face], needed_for: str) -> None:
    """A UserError for faces without points names the first, how many there are, what needs them."""
    missing = [i for i, face in enumerate(faces) if face.points is None]
    refuse_missing(image_names(faces), missing, needed_for)


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
        self.points = None
        if points is not None:
            self.points = torch.as_tensor(points)
            if self.points.ndim != 3 or len(self.points) != len(images):
                raise ValueError(f"points {tuple(self.points.shape)} for {len(images)} images, "
                                 "not (N, P, 2)")
            bad = (~self.points.isfinite().all(-1).all(-1)).nonzero().flatten().tolist()
            refuse_missing([f"image {i}" for i in range(len(images))], bad, "this run")
        # Of a set; what an aligner finds, in a picture or in place of .points, may lie anywhere.
        self.given = self.points if isinstance(images, (Images, Records)) else None

    def __len__(self):
        return len(self.images)

    def __getitems__(self, keys) -> dict:  # the name by which a DataLoader asks for a whole batch
        images = [self.images[i] for _, i in keys]
        index = torch.tensor([i for _, i in keys])
        may_mirror = self.points is None or self.flip is not None
        moved, mirror, extras = datasets.draw_moves(keys, self.augment, self.size, self.seed,
                                                    may_mirror)
        edges = np.array([(0, 0, *image.shape[1::-1]) for image in images]) - 0.5
        matrix = torch.from_numpy(datasets.square_crops(edges, self.size, 1.0))
        if self.align is not None:
            template, t = self.align
            aligned = warp.fit_similarity(self.points[index].double(), template.double())
            matrix = matrix.lerp(aligned, t)
        matrix = warp.compose(moved, matrix)
        batch = {"index": index, "matrix": matrix.float(), **extras}
        if self.points is not None:
            points = warp.apply_affine(matrix, self.points[index].double())
            if self.flip is not None:
                points = torch.where(mirror[:, None, None], points[:, self.flip], points)
            batch["points"] = points.float()
        if self.given is not None:
            for (_, i), image in zip(keys, images):
                source = self.images.sources[i] if isinstance(self.images, Images) else None
                datasets.check_inside(self.given[i].numpy(), image.shape[1::-1], source, i)
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
