"""Faces on disk as plain records: landmark schemes and one reader for each public set.

A reader is `read_<name>(root, split) -> list[Face]`, reached by name through `read`. It opens annotation
files, never pixels, and checks them. Its docstring shows the files that it wants and where the set comes
from, and is part of its error message. Nothing is downloaded: the sets have owners and licences.

Points are (P, 2) float32 x y in pixels of the stored image. Pixel centres are whole numbers from 0, so files
that count from 1 (`.pts`, MATLAB arrays) lose 1 here, once. "left" is image-left, the smaller x. Points
outside the image are legal. None is missing: hidden ones stand where the annotators put them, unmarked; but
WIDER FACE has faces without any, whose points are nan.
"""

import functools
import glob
import hashlib
import math
import os
import re
import shutil
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Callable, Iterator, Sequence

import cv2
import numpy as np
import torch
from tqdm import tqdm

from common import UserError, warp

# ---- Records -----------------------------------------------------------------------------------------------

@dataclass
class Face:
    """One annotated face. An image is RGB (H, W, 3) or gray (H, W) uint8."""
    image: str | np.ndarray | Callable[[], np.ndarray]          # path, array, or function making an array
    points: np.ndarray | None = None                            # (P, 2) float32 px of that image, 0-based
    box: tuple[float, float, float, float] | None = None        # x0 y0 x1 y1 px, the set's own face box
    identity: str | None = None                                 # the person
    tags: tuple[str, ...] = ()                                  # subsets of its split, as ("pose", "blur")
    where: str = ""                                             # file:line of the list that names it


def load_image(image: str | np.ndarray | Callable[[], np.ndarray]) -> np.ndarray:
    """Pixels of a `Face.image`: RGB uint8 (H, W, 3), C-contiguous.
    The orientation tag of a JPEG is ignored, as the points of every set were marked on the stored pixels.
    Raises: FileNotFoundError if the path is no file; ValueError if it is undecodable or no image array."""
    if isinstance(image, (str, os.PathLike)):
        pixels = cv2.imread(os.fspath(image), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            if not os.path.isfile(image):
                raise FileNotFoundError(f"no image file {image}")
            raise ValueError(f"{image} cannot be decoded as an image: damaged, empty or another file type")
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    pixels = np.asarray(image() if callable(image) else image)
    if pixels.dtype != np.uint8 or not pixels.size or (pixels.ndim != 2 and pixels.shape[2:] != (3,)):
        raise ValueError(f"found an array {pixels.dtype} {pixels.shape}, wanted uint8 (H, W, 3) or (H, W)")
    return np.ascontiguousarray(pixels) if pixels.ndim == 3 else np.stack([pixels] * 3, -1)


def _cut_short(path) -> bool:
    """Whether a JPEG or PNG lacks its end."""
    with open(path, "rb") as file:
        end = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(file.read(2), b"")
        file.seek(max(os.path.getsize(path) - 4096, 0))
        return end not in file.read()


def check_images(faces: Sequence[Face]) -> None:
    """Before a long run: every path exists and begins like an image that cv2 can decode.
    Raises: FileNotFoundError (ValueError if none is missing) that names the first bad file and counts all."""
    paths = {face.image: face.where for face in faces if isinstance(face.image, (str, os.PathLike))}
    missing = {path for path in paths if not os.path.isfile(path)}
    bad = [path for path in paths if path in missing or not cv2.haveImageReader(os.fspath(path))]
    if not bad and (cut := [path for path in paths if _cut_short(path)]):
        warnings.warn(f"{cut[0]} and {len(cut) - 1} other images seem to be cut short", stacklevel=2)
    if bad:
        what = "does not exist" if bad[0] in missing else "is no image that cv2 can decode"
        what += paths[bad[0]] and f" (listed in {paths[bad[0]]})"
        raise (FileNotFoundError if missing else ValueError)(
            f"{bad[0]} {what}; of {len(paths)} images, missing {len(missing)}, "
            f"undecodable {len(bad) - len(missing)}")


# ---- Landmark schemes --------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Scheme:
    """What the P points of a scheme mean: indices, image-left first. A group stands for its mean."""
    points: int
    flip: np.ndarray                                # (P,) after x -> W-1-x, points[flip] is in order again
    eyes: tuple[int, int]                           # outer eye corners; of 5 points, the eye centres
    eyes_published: tuple[int, int] | None          # 194: LDDMM-Face's, one past the corners (1.5 % shorter)
    pupils: tuple[tuple[int, ...], ...]             # two groups: pupils, or eye centres where none are marked
    five: tuple[tuple[int, ...], ...]               # groups: eye, eye, nose tip, mouth corner, mouth corner
    curves: dict[str, list[int]]                    # open curves, in LDDMM-Face's order for 68, 98, 194
    parts: dict[str, list[int]]                     # contour, brows, nose, eyes, mouth
    anchors: dict[str, tuple[int, ...]]             # groups: a name is the same place in all schemes


# Flip tables. "s: i j-k": the mirror of each of these i is s - i; "+s: i j-k": it is i + s, and back. Points
# not named are on the midline.
_FLIPS = {
    5: "1: 0 1; 7: 3 4",
    19: "5: 0-5; 17: 6-11; 26: 12 14; 32: 15 17",
    29: "+1: 0 2 8 10 16 18 22; +2: 4 5 12 13",
    68: "16: 0-16; 43: 17-26; 66: 31-35; 81: 36-39 42-45; 87: 40 41 46 47; 102: 48-54; 114: 55-59;"
        "124: 60-64; 132: 65-67",
    98: "32: 0-32; 79: 33-37 42-46; 88: 38-41 47-50; 114: 55-59; 132: 60-64 68-72; 140: 65-67 73-75;"
        "158: 76-82; 170: 83-87; 180: 88-92; 188: 93-95; +1: 96",
    106: "32: 0-32; 79: 33-37 42-46; 88: 38-41 47-50; 120: 55-65; 145: 66-70 75-79; 153: 71-73 80-82;"
         "157: 74 83; 174: 84-90; 186: 91-95; 196: 96-100; 204: 101-103; +1: 104",
    194: "40: 0-40; 98: 41-57; 129: 58-71; 157: 72-85; 185: 86-99; 213: 100-113; +20: 114-133 154-173"}

# 19 is AFLW without its ear points, 29 COFW, 68 300-W, 98 WFLW (published curves leave out its pupils), 106
# LaPa (74, 83 eye centres and 104, 105 pupils, in the same places), 194 HELEN in the order of its files.
# Published tables call HELEN's 114-133 and 154-173 the right eye and brow, not saying whose right. Here it is
# image-right, as the contour starts image-left; the flip holds either way, and `read` warns if the faces show
# otherwise. These loops start at the inner corner, maybe over the top, maybe not: no anchor needs to know.
_CURVES = """
points           5    19     29           68     98     106      194
contour_left     .    .      .            0-8    0-16   0-16     0-20
contour_right    .    .      .            9-16   17-32  17-32    21-40
brow_left        .    0-2    0,4,2,5      17-21  33-41  33-41    174-193
brow_right       .    3-5    1,6,3,7      22-26  42-50  42-50    154-173
nose             .    .      .            .      .      .        41-57
nose_bridge      .    .      .            27-30  51-54  51-54    .
nose_tip         2    .      20           .      .      .        .
nose_base        .    12-14  18,21,19     31-35  55-59  55-65    .
eye_left         0    6-8    8,12,10,13   36-41  60-67  66-73    134-153
eye_right        1    9-11   9,14,11,15   42-47  68-75  75-82    114-133
eye_center_left  .    .      .            .      .      74       .
eye_center_right .    .      .            .      .      83       .
pupil_left       .    .      16           .      .      104      .
pupil_right      .    .      17           .      .      105      .
mouth            3,4  15-17  .            .      .      .        .
lip_outer        .    .      22,24,23,27  .      .      .        .
lip_outer_upper  .    .      .            48-54  76-82  84-90    58-71
lip_outer_lower  .    .      .            55-59  83-87  91-95    72-85
lip_inner_upper  .    .      25           60-64  88-92  96-100   86-99
lip_inner_lower  .    .      26           65-67  93-95  101-103  100-113
chin             .    18     28           .      .      .        ."""

# A name with * is the image-left one of a pair; the flip gives the right one.
_ANCHORS = """
points            5    19    29     68     98     106     194
chin              .    18    28     8      16     16      20
contour_end*      .    .     .      0      0      0       .
brow_outer*       .    0     0      17     33     33      184
brow_middle*      .    1     4,5    19     35,40  35,40   179,189
brow_inner*       .    2     2      21     37,38  37,38   174
eye_outer*        .    6     8      36     60     66      144
eye_inner*        .    8     10     39     64     70      134
eye_top*          .    .     12     37,38  62     68      .
eye_bottom*       .    .     13     40,41  66     72      .
pupil*            0    7     16     36-41  96     104     134-153
nose_top          .    .     .      27     51     51      .
nose_tip          2    13    20     30     54     54      .
nose_base         .    .     21     33     57     60      49
nose_wing*        .    12    18     .      .      .       .
nostril*          .    .     .      31     55     .       .
mouth*            3    15    22     48     76     84      58
mouth_center      .    16    25,26  62,66  90,94  98,102  92,93,106,107
lip_top           .    .     24     51     79     87      64,65
lip_bottom        .    .     27     57     85     93      78,79
lip_inner*        .    .     .      60     88     96      86
lip_inner_top     .    .     25     62     90     98      92,93
lip_inner_bottom  .    .     26     66     94     102     106,107"""
_PARTS = {"contour": ("contour", "chin"), "brows": ("brow",), "nose": ("nose",), "eyes": ("eye", "pupil"),
          "mouth": ("lip", "mouth")}


def _ids(text: str) -> list[int]:
    """[36, 37, 38, 42] from "36-38 42" or "36-38,42"."""
    spans = [[int(end) for end in word.split("-")] for word in text.replace(",", " ").split()]
    return [index for span in spans for index in range(span[0], span[-1] + 1)]


def _column(table: str, points: int) -> dict[str, list[int]]:
    """Name -> indices of one scheme in `_CURVES` or `_ANCHORS`."""
    header, *rows = (line.split() for line in table.strip().split("\n"))
    column = header.index(str(points))
    return {row[0]: _ids(row[column]) for row in rows if row[column] != "."}


def _scheme(points: int) -> Scheme:
    flip = np.arange(points)
    for rule, text in (entry.split(":") for entry in _FLIPS[points].split(";")):
        ids = np.array(_ids(text))
        mirror = ids + int(rule) if "+" in rule else int(rule) - ids
        flip[ids], flip[mirror] = mirror, ids
    anchors = {}
    for name, ids in _column(_ANCHORS, points).items():
        stem, pair, _ = name.partition("*")
        anchors[stem + "_left" * len(pair)] = tuple(ids)
        if pair:
            anchors[stem + "_right"] = tuple(flip[ids].tolist())
    pupils, corners = ((anchors[name + "_left"], anchors[name + "_right"]) for name in ("pupil", "mouth"))
    eyes = tuple(anchors.get("eye_outer_" + side, pupil)[0] for side, pupil in zip(("left", "right"), pupils))
    # HELEN's nose is a U without a tip: the middle between the wings is nearest to it.
    five = (*pupils, anchors.get("nose_tip", (45, 53)), *corners)
    curves = dict(sorted(_column(_CURVES, points).items(), key=lambda curve: min(curve[1])))
    parts = {part: sorted(index for name, ids in curves.items() if name.startswith(starts) for index in ids)
             for part, starts in _PARTS.items()}
    published = (145, 125) if points == 194 else None
    return Scheme(points, flip, eyes, published, pupils, five, curves, parts, anchors)


SCHEMES: dict[int, Scheme] = {points: _scheme(points) for points in _FLIPS}
"""Schemes by number of points. 106 is LaPa's order. Other orders of 106 points exist (SDFL's, 2d106det) and
no file says which it has: none is guessed, but `flip_residual` shows a wrong one."""


# Five points in a 112 px crop, to which recognition networks align faces.   Source: insightface's face_align.
ARCFACE_5 = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
                      [70.7299, 92.2041]])


def group_means(points, groups: Sequence[Sequence[int]]):
    """Mean of each group of points, as of `Scheme.five`: (..., P, 2) -> (..., G, 2), numpy or torch."""
    stack = torch.stack if isinstance(points, torch.Tensor) else np.stack
    return stack([points[..., list(group), :].mean(-2) for group in groups], -2)


def flip_residual(points: np.ndarray, flip: np.ndarray) -> float:
    """Largest distance of a point from its mirror in the mean face of (M, P, 2): a fraction of the face box.
    The right flip (P,) gives below 0.1 on a set that looks both ways, a wrong one 0.6 or more."""
    points = np.asarray(points, np.float64)
    low, high = points.min(1, keepdims=True), points.max(1, keepdims=True)
    mean = ((points - low) / (high - low)).mean(0)                                    # (P, 2) in the unit box
    return float(np.linalg.norm((mean * [-1, 1] + [1, 0])[flip] - mean, axis=1).max())


def normaliser(points: torch.Tensor, kind: str, boxes: torch.Tensor | None = None) -> torch.Tensor:
    """The length that the error of each face is divided by: (M, P, 2) ground truth px -> (M,) px.

    kind: "io" inter-ocular, of `Scheme.eyes`; "io-published" of `Scheme.eyes_published`; "ip" inter-pupil, of
        `Scheme.pupils`; "box" sqrt(w h) of the box of the points; "face" sqrt(w h) of `boxes`, the set's own
        (M, 4) x0 y0 x1 y1 px. io is about 1.4 times ip: errors under different kinds must not be compared.
    Raises: ValueError if the scheme has no such length (5 points have no "io"), or a length is not positive.
    """
    points = torch.as_tensor(points)
    scheme, pairs = SCHEMES.get(points.shape[-2]), {}
    if scheme:
        corners = scheme.eyes if "eye_outer_left" in scheme.anchors else None
        pairs = {"ip": scheme.pupils, "io": corners and [[index] for index in corners],
                 "io-published": scheme.eyes_published and [[index] for index in scheme.eyes_published]}
    if pairs.get(kind):
        ends = group_means(points, pairs[kind])                                                  # (M, 2, 2)
        length = (ends[:, 0] - ends[:, 1]).norm(dim=-1)
    elif kind == "box":
        length = (points.amax(1) - points.amin(1)).prod(-1).sqrt()
    elif kind == "face" and boxes is not None:
        boxes = torch.as_tensor(boxes).to(points)
        length = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1).sqrt()
    else:
        works = ", ".join([*filter(pairs.get, pairs), "box", "face (with the set's boxes)"])
        raise ValueError(f"no normaliser {kind!r} for {points.shape[-2]} points; what works: {works}")
    bad = (~(length > 0)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"normaliser {kind!r} is {length[bad[0]]:g} px for face {bad[0]}, wanted more "
                         f"than 0; so for {len(bad)} of {len(length)} faces")
    return length


def norm_kind(kind: str, points: int) -> str:
    """What "auto" means as a normaliser of so many points: "io", for 5 "ip", without a scheme "box"."""
    return kind if kind != "auto" else "box" if points not in SCHEMES else "ip" if points == 5 else "io"


def subsets(faces: Sequence[Face]) -> dict[str, np.ndarray]:
    """The whole set under "" and each subset under its tag, in the order of the papers' tables: (M,) bool."""
    tags = {tag for face in faces for tag in face.tags}
    order = [tag for tag in (*WFLW_TAGS, "common", "challenging") if tag in tags]
    order += sorted(tags - set(order))
    return {"": np.ones(len(faces), bool)} | {tag: np.array([tag in f.tags for f in faces]) for tag in order}


# ---- Folders -----------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def walk(root: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """Sorted paths of all files below root whose names end in one of the suffixes, in either case.

    Links are followed. Hidden files and folders (.ipynb_checkpoints, ._x.jpg, __MACOSX) are passed over.
    Raises: UserError that names a folder which cannot be read, or which a link below it leads back to."""
    found = []

    def enter(folder: str, above: frozenset) -> None:
        try:
            status = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error.strerror}") from None
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise UserError(f"{folder} is a link to a folder that holds it: its files would never end; "
                            "remove the link")
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                enter(entry.path, above | {here})
            elif entry.name.lower().endswith(suffixes):
                found.append(entry.path)

    enter(root, frozenset())
    return sorted(found)


# ---- File formats ------------------------------------------------------------------------------------------

def _lines(path: str) -> list[tuple[str, str]]:
    """("path:number", line) of the lines of a text file that are not blank."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return [(f"{path}:{number}", line.strip()) for number, line in enumerate(file, 1) if line.strip()]


def _numbers(fields: Sequence[str], wanted: int, where: str) -> np.ndarray:
    """(wanted,) float64; the ValueError begins with `where`, file:line."""
    if len(fields) != wanted:
        raise ValueError(f"{where}: found {len(fields)} numbers, wanted {wanted}")
    try:
        values = np.array(fields, np.float64)
    except ValueError as error:
        raise ValueError(f"{where}: {error}, wanted a number") from None
    if not np.isfinite(values).all():
        raise ValueError(f"{where}: found {values[~np.isfinite(values)][0]}, wanted a finite number")
    return values


def _point_rows(path: str, rows: list[tuple[str, str]], wanted: int) -> np.ndarray:
    """(wanted, 2) float64 from rows "x y" or "x , y" of `_lines`."""
    if len(rows) != wanted:
        raise ValueError(f"{path}: found {len(rows)} points, wanted {wanted}")
    pairs = [line.replace(",", " ").split() for _, line in rows]
    try:                                                        # all rows at once, for speed,
        points = np.array(pairs, np.float64)
        if points.shape == (wanted, 2) and np.isfinite(points).all():
            return points
    except ValueError:                                          # then row by row, to name the bad line
        pass
    return np.stack([_numbers(pair, 2, where) for pair, (where, _) in zip(pairs, rows)])


def read_pts(path: str) -> np.ndarray:
    """(P, 2) float32 px, 0-based, of a `.pts`: `version: 1`, `n_points: P`, `{`, P rows "x y" from 1, `}`.
    Raises: FileNotFoundError; ValueError naming the file, and the line where it is one, if a part is missing,
    n_points is not the number of rows, or a number is not finite."""
    lines = _lines(path)
    marks = [line for _, line in lines]
    counts = [re.fullmatch(r"n_points\s*:\s*(\d+)", mark) for mark in marks]
    if "{" not in marks or "}" not in marks or not any(counts):
        raise ValueError(f"{path}: found {marks[:3]}, wanted lines n_points: P, {{, the points, }}")
    rows = lines[marks.index("{") + 1:marks.index("}")]
    points = _point_rows(path, rows, max(1, int(next(filter(None, counts))[1])))
    return (points - 1).astype(np.float32)


def write_pts(path: str, points) -> None:
    """Write (P, 2) px, 0-based, array or tensor, as a `.pts`, which counts from 1.   Raises: ValueError."""
    points = torch.as_tensor(points).detach().double().cpu().numpy()
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"{path}: found points {points.shape}, wanted (P, 2), all finite")
    rows = "".join(f"{x:.4f} {y:.4f}\n" for x, y in points + 1)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(f"version: 1\nn_points: {len(points)}\n{{\n{rows}}}\n")


def read_points_csv(path: str) -> dict[str, np.ndarray]:
    """Landmarks of many images, as a detector's: rows image,x0,y0,x1,y1,... px from 0; a header is skipped.
    Returns: {image: (n, P, 2) float32}, n faces in it.   Raises: ValueError naming the line."""
    found: dict[str, list[np.ndarray]] = {}
    for number, (where, line) in enumerate(_lines(path)):
        name, *fields = [field.strip() for field in line.split(",")]
        if number == 0 and fields and fields[0][:1].isalpha() and fields[0].lower() not in ("nan", "inf"):
            continue
        count = len(next(iter(found.values()))[0]) if found else len(fields) // 2
        if not count:
            raise ValueError(f"{where}: found {line[:40]!r}, wanted image,x0,y0,x1,y1,...")
        points = _numbers(fields, 2 * count, where).reshape(-1, 2).astype(np.float32)
        found.setdefault(os.path.normpath(name), []).append(points)
    if not found:
        raise ValueError(f"{path} has no row image,x0,y0,x1,y1,...")
    return {name: np.stack(rows) for name, rows in found.items()}


_MAT_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
                16: "u1", 17: "u2"}
_MAT_MATRIX, _MAT_COMPRESSED = 14, 15


def _mat_elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, bytes) of the data elements that follow one another, compressed ones unpacked."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        if kind >> 16:                                   # small: type and size share a word, 4 bytes of data
            start, kind, size, step = at + 4, kind & 0xFFFF, kind >> 16, 8
        else:                                            # only compressed elements are not padded to 8 bytes
            start, step = at + 8, 8 + size + (0 if kind == _MAT_COMPRESSED else -size % 8)
        if start + size > len(data):
            raise ValueError("the file ends inside an element")
        content, at = data[start:start + size], at + step
        if kind == _MAT_COMPRESSED:
            yield from _mat_elements(memoryview(zlib.decompress(content)), order)
        else:
            yield kind, content


def _mat_array(data: memoryview, order: str) -> tuple[str, np.ndarray | str | None]:
    """Name and value of a matrix element: float64 array, str, object array (cell), None of other classes."""
    if not len(data):
        return "", None
    (_, flags), (_, shape), (_, name), *rest = _mat_elements(data, order)
    kind, value = struct.unpack_from(order + "I", flags)[0] & 0xFF, None
    if kind == 1:                                                               # cell
        value = np.empty(len(rest), object)
        value[:] = [_mat_array(content, order)[1] for _, content in rest]
    elif kind == 4 or 6 <= kind <= 15:                                          # char, double ... uint64
        value = np.frombuffer(rest[0][1], order + _MAT_NUMBERS[rest[0][0]])     # stored in any type that fits
        value = "".join(map(chr, value)) if kind == 4 else value.astype(np.float64)
    if isinstance(value, np.ndarray):
        value = value.reshape(np.frombuffer(shape, order + "i4"), order="F")
    return bytes(name).decode("ascii"), value


def read_mat(path: str) -> dict[str, np.ndarray | str]:
    """Variables of a MATLAB 5 to 7 `.mat` file: float64 arrays, strings, cells as object arrays; no structs.
    Raises: ValueError naming the file if it is damaged or of another kind (MATLAB 7.3 files are HDF5)."""
    with open(path, "rb") as file:
        data = file.read()
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None or data.startswith(b"MATLAB 7.3"):
        raise ValueError(f"{path} begins {data[:10]!r}, wanted a MATLAB 5 to 7 file (save -v7)")
    try:
        elements = _mat_elements(memoryview(data)[128:], order)
        variables = dict(_mat_array(content, order) for kind, content in elements if kind == _MAT_MATRIX)
    except (ValueError, KeyError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is a damaged MATLAB file: {error!r}") from error
    return {name: value for name, value in variables.items() if value is not None}


def _h5(path: str):
    """A MATLAB 7.3 file opened by h5py, which only COFW needs and which is therefore not required."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path} is an HDF5 file: pip install h5py, or export COFW as images with "
                          "train.tsv and test.tsv to --data-root; --data faces needs no download") from error
    return h5py.File(path, "r")


# ---- Readers -----------------------------------------------------------------------------------------------

def _missing(reader: Callable, root: str, what: str, flag="--data-root", drawn="faces") -> FileNotFoundError:
    """The message of a set that is not there: what was looked for, then the reader's account of its files."""
    account = reader.__doc__[reader.__doc__.index("Tree:"):].rstrip().replace("\n    ", "\n")
    there = sorted(os.listdir(root))[:6] if os.path.isdir(root) else []
    return FileNotFoundError(f"{reader.__name__}: {what}\nWanted below {flag} {root or '(not given)'}, "
                             f"which has {', '.join(there) or 'nothing'}:\n{account}\n"
                             f"Its licence is yours to accept. --data {drawn} needs no download.")


def _below(reader: Callable, root: str, *parts: str, flag="--data-root") -> str:
    """Path of a file or folder below root, which must exist."""
    path = os.path.join(root, *parts)
    if not os.path.exists(path):
        raise _missing(reader, root, f"no {path}", flag)
    return path


def _counted(reader: Callable, root: str, split: str, faces: list[Face], **official: int) -> list[Face]:
    """`faces`, after an error if there are none, and a warning if not as many as in the official split."""
    if not faces:
        raise _missing(reader, root, f"no face in the {split} split of {root}")
    if len(faces) != official.get(split, len(faces)):
        warnings.warn(f"{reader.__name__}: {len(faces)} faces in the {split} split of {root}, "
                      f"{official[split]} in the official one", stacklevel=3)
    return faces


def _square(center: np.ndarray, side: float) -> tuple[float, float, float, float]:
    return (*(center - side / 2).tolist(), *(center + side / 2).tolist())


def _beside(folder: str) -> list[tuple[str, str]]:
    """(image, .pts) paths of a folder by stem; "" where one of the two is not there."""
    pairs: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in (".jpg", ".jpeg", ".png", ".pts") and not name.startswith("."):  # ._x: macOS
            pairs.setdefault(stem, ["", ""])[suffix.lower() == ".pts"] = os.path.join(folder, name)
    return [(image, pts) for image, pts in pairs.values()]


WFLW_TAGS = ("pose", "expression", "illumination", "makeup", "occlusion", "blur")


def read_wflw(root: str, split: str) -> list[Face]:
    """WFLW: 98 points, taken as 0-based; box: the face rectangle (not tight); tags: `WFLW_TAGS`.
    A row is 196 coordinates, x_min y_min x_max y_max, six flags and the image, which may hold several faces.

    Tree: WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_{train,test}.txt
          WFLW_images/0--Parade/*.jpg, WFLW_images/1--Handshaking/*.jpg, ...
    Source: https://wywu.github.io/projects/LAB/WFLW.html, for research.
    """
    table = _below(read_wflw, root, "WFLW_annotations", "list_98pt_rect_attr_train_test",
                   f"list_98pt_rect_attr_{split}.txt")
    images, faces = _below(read_wflw, root, "WFLW_images"), []
    for where, line in _lines(table):
        *fields, name = line.split()
        values = _numbers(fields, 206, where)
        tags = tuple(tag for tag, flag in zip(WFLW_TAGS, values[200:]) if flag)
        faces.append(Face(os.path.join(images, name), values[:196].reshape(98, 2).astype(np.float32),
                          tuple(values[196:200].tolist()), tags=tags, where=where))
    return _counted(read_wflw, root, split, faces, train=7500, test=2500)


def read_300w(root: str, split: str) -> list[Face]:
    """300-W: 68 points, no box. train: afw and the training folders of lfpw and helen. test: their test
    folders, tagged "common", and ibug, "challenging". Mirrored copies (*_mirror*) of repacks are left out.

    Tree: afw/  helen/trainset/  helen/testset/  lfpw/trainset/  lfpw/testset/  ibug/
          in each NAME.jpg or NAME.png with NAME.pts
    Source: https://ibug.doc.ic.ac.uk/resources/300-W, for non-commercial research.
    """
    folders = {"afw": "", "lfpw/trainset": "", "helen/trainset": ""} if split == "train" else {
        "lfpw/testset": "common", "helen/testset": "common", "ibug": "challenging"}
    faces = []
    for name, tag in folders.items():
        for image, pts in _beside(_below(read_300w, root, *name.split("/"))):
            if pts and "_mirror" not in os.path.basename(pts):
                if not image:
                    raise _missing(read_300w, root, f"no image beside {pts}")
                faces.append(Face(image, read_pts(pts), tags=(tag,) if tag else ()))
                if len(faces[-1].points) != 68:
                    raise ValueError(f"{pts}: found {len(faces[-1].points)} points, wanted 68")
    return _counted(read_300w, root, split, faces, train=3148, test=689)


def _cofw_image(path: str, key: str, index: int) -> np.ndarray:
    """Image `index` of a COFW file, gray (H, W) or RGB (H, W, 3); HDF5 has the axes of MATLAB reversed."""
    with _h5(path) as file:
        return np.ascontiguousarray(file[file[key][()].ravel()[index]][()].T)


def read_cofw(root: str, split: str) -> list[Face]:
    """COFW: 29 points, box. The exported table where there is one (points as they stand; box: the square of
    200 scale about the center), else the `.mat`, by h5py: points and boxes lose MATLAB's 1, and an image is a
    function that reads it when it is needed.   Raises also: ImportError without h5py.

    Tree: COFW_train_color.mat, COFW_test_color.mat
          or, exported: train.tsv, test.tsv, train/*.jpg, test/*.jpg; a table is a header and rows, with tabs:
          image, 5 points x0,y0,..., 29 points x0,y0,..., scale, center_w, center_h
    Source: https://data.caltech.edu, Caltech Occluded Faces in the Wild, COFW_color.zip.
    """
    faces, table = [], os.path.join(root, f"{split}.tsv")
    if os.path.exists(table):
        for where, line in _lines(table)[1:]:
            name, _, points, *place = (line.split("\t") + [""] * 6)[:6]
            points = _numbers(points.split(","), 58, where).reshape(29, 2).astype(np.float32)
            place = _numbers(place, 3, where)
            path = os.path.join(root, name if "/" in name else f"{split}/{name}")
            faces.append(Face(path, points, _square(place[1:], 200 * place[0]), where=where))
        return _counted(read_cofw, root, split, faces, train=1345, test=507)
    path = _below(read_cofw, root, f"COFW_{split}_color.mat")
    with _h5(path) as file:
        keys = [stem + ("Tr" if split == "train" else "T") for stem in ("phis", "bboxes", "Is")]
        arrays = [file[key][()].T for key in keys if key in file]
    shapes = [array.shape for array in arrays]
    if len(shapes) != 3 or shapes[:2] != [(arrays[2].size, 87), (arrays[2].size, 4)]:
        raise ValueError(f"{path}: found arrays {shapes}, wanted {keys} of (N, 87), (N, 4) and N images")
    phis, boxes, images = arrays              # 29 x, 29 y, 29 flags of occlusion; x y width height
    points = (np.stack([phis[:, :29], phis[:, 29:58]], -1) - 1).astype(np.float32)
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1) - 1
    faces = [Face(functools.partial(_cofw_image, path, keys[2], i), points[i], tuple(boxes[i].tolist()))
             for i in range(images.size)]
    return _counted(read_cofw, root, split, faces, train=1345, test=507)


def read_cofw68(root: str, split: str) -> list[Face]:
    """COFW-68: the test images of COFW with 68 points, no box. train is that of 300-W, as in the benchmark.

    Tree: cofw68/test_annotations/1_points.mat ... 507_points.mat
          cofw/COFW_test_color.mat, or exported: cofw/test.tsv and cofw/test/*.jpg
          300w/afw/, 300w/helen/trainset/, 300w/lfpw/trainset/ (for train)
    Source: https://github.com/golnazghiasi/cofw68-benchmark.
    """
    if split == "train":
        return read_300w(_below(read_cofw68, root, "300w"), "train")
    faces = read_cofw(_below(read_cofw68, root, "cofw"), "test")
    for number, face in enumerate(faces, 1):
        path = _below(read_cofw68, root, "cofw68", "test_annotations", f"{number}_points.mat")
        points = read_mat(path).get("Points")
        if getattr(points, "shape", None) != (68, 2) or not np.isfinite(points).all():
            raise ValueError(f"{path}: found Points {getattr(points, 'shape', None)}, wanted finite (68, 2)")
        face.points, face.box = (points - 1).astype(np.float32), None              # MATLAB counts from 1
    return faces


def read_helen(root: str, split: str) -> list[Face]:
    """HELEN: 194 points, taken as 0-based, no box. The first line of an annotation file names its image.

    Tree: annotation/1.txt ... 2330.txt, trainnames.txt, testnames.txt
          NAME.jpg in any folders, as train_1/ ... train_4/ and test/
    Source: http://www.ifp.illinois.edu/~vuongle2/helen.
    """
    annotations, images, faces = {}, {}, []
    listing = _below(read_helen, root, f"{split}names.txt")
    for path in glob.glob(os.path.join(glob.escape(_below(read_helen, root, "annotation")), "*.txt")):
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            annotations[file.readline().strip()] = path
    for folder, _, names in os.walk(root):
        images |= {name[:-4]: os.path.join(folder, name) for name in names if name.endswith((".jpg", ".png"))}
    for where, name in _lines(listing):
        for kind, known in (("annotation", annotations), ("image", images)):
            if name not in known:
                raise _missing(read_helen, root, f"no {kind} of {name}, which is listed at {where}")
        points = _point_rows(annotations[name], _lines(annotations[name])[1:], 194)
        faces.append(Face(images[name], points.astype(np.float32)))
    return _counted(read_helen, root, split, faces, train=2000, test=330)


def read_aflw(root: str, split: str) -> list[Face]:
    """AFLW: 19 points, as they stand; box: the face rectangle, whose size is the normaliser "face"; test
    faces with all points visible are tagged "frontal". HRNet's tables of AFLW are read by --data csv.

    Tree: AFLWinfo_release.mat
          flickr/0/*.jpg, flickr/2/*.jpg, flickr/3/*.jpg
    Source: TU Graz, by agreement; the .mat: Zhu et al., Unconstrained Face Alignment (CCL), CVPR 2016.
    """
    path, images = _below(read_aflw, root, "AFLWinfo_release.mat"), _below(read_aflw, root, "flickr")
    arrays = list(map(read_mat(path).get, ("nameList", "ra", "data", "bbox", "mask_new")))
    shapes, count = [np.shape(array) for array in arrays], np.size(arrays[0])
    if np.size(arrays[1]) != count or shapes[2:] != [(count, 38), (count, 4), (count, 19)]:
        raise ValueError(f"{path}: found nameList, ra, data, bbox, mask_new of {shapes}, wanted N, N, "
                         "(N, 38), (N, 4), (N, 19)")
    names, order, data, boxes, seen = arrays
    points = np.stack([data[:, :19], data[:, 19:]], -1).astype(np.float32)      # 19 x, 19 y
    names, boxes = names.ravel(), boxes[:, [0, 2, 1, 3]]                      # stored as xmin xmax ymin ymax
    order = order.ravel().astype(int) - 1                       # from 1; the first 20,000 are for training
    faces = [Face(os.path.join(images, names[i]), points[i], tuple(boxes[i].tolist()),
                  tags=("frontal",) if split == "test" and seen[i].all() else ())
             for i in (order[:20000] if split == "train" else order[20000:])]
    return _counted(read_aflw, root, split, faces, train=20000, test=4386)


def read_jd106(root: str, split: str) -> list[Face]:
    """LaPa (also "val") or JD-landmark: 106 points in LaPa's order, see `SCHEMES`; box: of rect/, if any.

    Tree: {train,val,test}/images/NAME.jpg and {train,val,test}/landmarks/NAME.txt (LaPa)
          or {Train,Test_data1}/picture/NAME.jpg, landmark/NAME.jpg.txt, rect/NAME.jpg.rect (JD-landmark)
          in a .txt the number of points, 106, then rows "x y" from 0; in a .rect "x1 y1 x2 y2"
    Source: https://github.com/JDAI-CV/lapa-dataset; JD-landmark on application.
    """
    base, pictures, marks = {"train": "Train", "test": "Test_data1"}.get(split, split), "picture", "landmark"
    if not os.path.isdir(os.path.join(root, base, marks)):
        base, pictures, marks = split, "images", "landmarks"
    folder, faces = _below(read_jd106, root, base, marks), []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.txt"))):
        image = os.path.basename(path).removesuffix(".txt").removesuffix(".jpg") + ".jpg"
        (where, count), *rows = _lines(path) or [(f"{path}:1", "")]
        if count != "106":
            raise ValueError(f"{where}: found {count!r}, wanted the number of points, 106")
        points, box = _point_rows(path, rows, 106).astype(np.float32), None
        rect = os.path.join(root, base, "rect", f"{image}.rect")
        if os.path.exists(rect):
            box = tuple(_numbers(" ".join(line for _, line in _lines(rect)).split(), 4, rect).tolist())
        faces.append(Face(os.path.join(root, base, pictures, image), points, box))
    return _counted(read_jd106, root, split, faces)


def read_csv(root: str, split: str) -> list[Face]:
    """Tables as HRNet writes them, of any number of points: 0-based, as its loader takes them; box: the
    square about the center of box_size, where given (of AFLW, whose normaliser it is), else of 200 scale.

    Tree: train.csv, test.csv (or one NAME_train.csv, one NAME_test.csv); images/ (or beside the tables)
          header: image_name,scale,[box_size,]center_w,center_h,original_0_x,original_0_y,...
    Source: https://github.com/HRNet/HRNet-Facial-Landmark-Detection, or your own.
    """
    tables = glob.glob(os.path.join(glob.escape(root), f"{split}.csv"))
    tables = tables or glob.glob(os.path.join(glob.escape(root), f"*_{split}.csv"))
    if len(tables) != 1:
        raise _missing(read_csv, root, f"found {len(tables)} tables {split}.csv or *_{split}.csv, wanted one")
    images = os.path.join(root, "images") if os.path.isdir(os.path.join(root, "images")) else root
    (where, header), *rows = _lines(tables[0]) or [(f"{tables[0]}:1", "")]
    columns, faces = header.replace(" ", "").split(","), []
    wanted = ["image_name", "scale", *["box_size"] * ("box_size" in columns), "center_w", "center_h"]
    start = len(wanted)
    if columns[:start] != wanted or len(columns) == start or (len(columns) - start) % 2:
        raise ValueError(f"{where}: found {len(columns)} columns {','.join(columns[:6])}..., wanted "
                         f"{','.join(wanted)} and pairs original_0_x,original_0_y,...")
    for where, line in rows:
        name, *fields = line.split(",")
        values = _numbers(fields, len(columns) - 1, where)
        box = _square(values[start - 3:start - 1], values[1] if "box_size" in columns else 200 * values[0])
        points = values[start - 1:].reshape(-1, 2).astype(np.float32)
        faces.append(Face(os.path.join(images, name), points, box, where=where))
    return _counted(read_csv, root, split, faces)


def read_youtube(root: str, split: str) -> list[Face]:
    """Frames of YouTube Faces: 68 points, 0-based; identity: the person; no box. The published test list
    repeats training frames, so the other table is split: a sixth of its people, by hash of name, is test.

    Tree: data/training_frames_keypoints.csv, data/training/First_Last_VF.jpg
    Source: git clone https://github.com/udacity/P1_Facial_Keypoints
    """
    table = _below(read_youtube, root, "data", "training_frames_keypoints.csv")
    images, faces = _below(read_youtube, root, "data", "training"), []
    for where, line in _lines(table)[1:]:
        name, *fields = line.split(",")
        points = _numbers(fields, 136, where).reshape(68, 2).astype(np.float32)
        image, person = os.path.join(images, name), name.rpartition("_")[0]
        faces.append(Face(image, points, identity=person, where=where))
    people = sorted({f.identity for f in faces}, key=lambda name: hashlib.sha256(name.encode()).digest())
    test = set(people[:round(len(people) / 6)])
    faces = [face for face in faces if (face.identity in test) == (split == "test")]
    return _counted(read_youtube, root, split, faces)


def read_folder(root: str, split: str) -> list[Face]:
    """A folder of your own: any number of points, the same in all; no box; identity: the folder that holds
    the image, as a path below the split (None for an image directly in it).

    Tree: train/PERSON/NAME.jpg and train/PERSON/NAME.pts, test/PERSON/...; at any depth; .jpg, .jpeg or .png
    Source: you. A .pts counts from 1: lines "version: 1", "n_points: P", "{", P of "x y", "}".
    """
    base, faces, first = _below(read_folder, root, split), [], ""
    for folder in sorted(folder for folder, _, _ in os.walk(base, followlinks=True)):
        person = os.path.relpath(folder, base)
        for image, pts in _beside(folder):
            if not image or not pts:
                raise _missing(read_folder, root, f"no {'image' if pts else '.pts'} beside {pts or image}")
            faces.append(Face(image, read_pts(pts), identity=None if person == "." else person))
            first = first or pts
            if len(faces[-1].points) != len(faces[0].points):
                raise ValueError(f"{pts} has {len(faces[-1].points)} points, {first} {len(faces[0].points)}; "
                                 "wanted as many in all")
    return _counted(read_folder, root, split, faces)


def read_widerface(root: str, split: str) -> list[Face]:
    """WIDER FACE with RetinaFace's 5 points, 0-based; box: the face's. Faces without points have points nan.
    The label file of val has boxes only, so the test split is a tenth of the training images, by hash of
    name, of which only faces with points. A row is x y w h, 5 times x y v (v -1: no point), blur.

    Tree: train/label.txt: lines "# 0--Parade/NAME.jpg", each followed by one row for each face
          train/images/0--Parade/*.jpg, ...
    Source: http://shuoyang1213.me/WIDERFACE; label.txt: insightface, detection/retinaface.
    """
    table, faces, name = _below(read_widerface, root, "train", "label.txt"), [], ""
    images = _below(read_widerface, root, "train", "images")
    for where, line in _lines(table):
        if line.startswith("#"):
            name = line[1:].strip()
            continue
        if not name:
            raise ValueError(f"{where}: found {line[:40]!r}, wanted a line '# IMAGE' before the first face")
        if (zlib.crc32(name.encode()) % 10 == 0) != (split == "test"):
            continue
        values = _numbers(line.split(), 20, where)
        (x, y, w, h), points = values[:4], values[4:19].reshape(5, 3)
        if (points[:, 2] < 0).any():
            points = np.full((5, 3), np.nan)
        if w > 0 and h > 0 and not (split == "test" and np.isnan(points).any()):
            faces.append(Face(os.path.join(images, name), points[:, :2].astype(np.float32),
                              (x.item(), y.item(), (x + w).item(), (y + h).item()), where=where))
    return _counted(read_widerface, root, split, faces)


READERS: dict[str, Callable[[str, str], list[Face]]] = {
    "wflw": read_wflw, "300w": read_300w, "cofw": read_cofw, "cofw68": read_cofw68, "helen": read_helen,
    "aflw": read_aflw, "jd106": read_jd106, "lapa": read_jd106, "csv": read_csv, "youtube": read_youtube,
    "widerface": read_widerface, "folder": read_folder}


def read(data: str, root: str, split: str, points: int | None = None) -> list[Face]:
    """Faces of the set `data`, a key of `READERS`, below `root`; split "train" or "test" (LaPa also "val").

    points: the number of points wanted, or None for any. Warns if the points cannot be in the order of
    `SCHEMES`: a large `flip_residual`, or the left eye on the right.
    Raises: ValueError for an unknown set or split, another number of points, a bad file; FileNotFoundError.
    """
    if data not in READERS:
        raise ValueError(f"no set {data!r}, there are {', '.join(READERS)}")
    if not root or not os.path.isdir(root):
        raise _missing(READERS[data], root, f"no folder {root}")
    if split not in ("train", "test", "val")[:3 if READERS[data] is read_jd106 else 2]:
        raise ValueError(f"--data {data} has no split {split!r}")
    faces = READERS[data](root, split)
    found = len(faces[0].points)
    if found != (points or found):
        raise ValueError(f"--data {data} has {found} points in {root}, wanted {points}")
    shapes = [face.points for face in faces if np.isfinite(face.points).all()]
    if found in SCHEMES and len(shapes) >= 50:                       # fewer may all look to one side
        shapes = np.stack(shapes)
        residual = flip_residual(shapes, SCHEMES[found].flip)
        left, right = group_means(shapes.mean(0), SCHEMES[found].pupils)[:, 0]
        if residual > 0.2 or left > right:
            warnings.warn(f"{root}: these {found} points are hardly in the order of SCHEMES[{found}]. The "
                          f"mirrored mean face is off by {residual:.2f} of its box (wanted below 0.2), with "
                          f"eyes at x = {left:.0f}, {right:.0f} px (wanted the left one first)", stacklevel=2)
    return faces


# ---- Crops -------------------------------------------------------------------------------------------------

BORDER = 127  # grey level outside the image


def face_boxes(faces: list[Face], kind: str) -> np.ndarray:
    """Boxes to crop, (M, 4) float64 x0 y0 x1 y1 px: of the true "landmarks", or the set's own "face" box."""
    if kind not in ("landmarks", "face"):
        raise ValueError(f"--box {kind}: expected 'landmarks' or 'face'")
    boxes = np.array([np.concatenate([face.points.min(0), face.points.max(0)]) if kind == "landmarks" else
                      face.box or (0, 0, 0, 0) for face in faces], np.float64)
    extent = (boxes[:, 2:] - boxes[:, :2]).max(1)
    for i in np.flatnonzero(~((extent > 0) & (extent < 20_000)))[:1]:  # a wild point makes a wild crop
        image = faces[i].image if isinstance(faces[i].image, (str, os.PathLike)) else f"face {i}"
        raise ValueError(f"{image}: --box {kind} finds a box of {extent[i]:g} px there, wanted 1 to 20,000; "
                         "correct or leave out that face")
    return boxes


def square_frames(boxes: np.ndarray, size: int, margin: float) -> np.ndarray:
    """Maps image px -> px of a size x size crop: the square about each box, `margin` times its longer side.
    Args: boxes (M, 4) x0 y0 x1 y1 px.   Returns: (M, 2, 3) float64.   Raises: ValueError for an empty box."""
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, margin * (boxes[:, 2:] - boxes[:, :2]).max(1)
    flat = np.flatnonzero(~(side > 0))
    if flat.size:
        raise ValueError(f"face {flat[0]}: box {boxes[flat[0]].tolist()} has no extent (one of {flat.size})")
    frames = np.zeros((len(boxes), 2, 3))
    frames[:, 0, 0] = frames[:, 1, 1] = size / side
    frames[:, :, 2] = (size - 1) / 2 - centre * (size / side)[:, None]
    return frames


class Regions:
    """The part of each image that its crops can need, at the resolution that they can use.

    `frames` (M, 2, 3) map image px to crop px; an augmentation may look `reach` times as wide as the crop and
    enlarge it `zoom` times. What lies outside the image is grey. A region comes from its image every time or,
    after `keep`, from one memory map or from memory: the same pixels either way, because shrinking (by area,
    so that nothing aliases) happens here and only the final warp interpolates.
    Indexing gives RGB uint8 (n, n, 3); `.matrix` (M, 2, 3) maps image px to region px, `.side` (M,) is n.
    """

    def __init__(self, faces: list[Face], frames: np.ndarray, size: int, reach=1.0, zoom=1.0):
        frames = torch.as_tensor(frames, dtype=torch.float64)
        corners = frames.new_tensor([[-1, -1], [1, -1], [-1, 1], [1, 1]]) * reach * size / 2 + (size - 1) / 2
        around = warp.apply_affine(warp.invert(frames), corners.expand(len(frames), 4, 2)).numpy()
        low, high = around.min(1), around.max(1)
        self.images = [face.image for face in faces]
        self.first = np.floor(low).astype(np.int64) - 1  # (M, 2) image px of the region's top left pixel
        self.extent = (np.ceil(high).astype(np.int64) + 2 - self.first).max(1)  # (M,) image px
        scale = zoom * torch.linalg.det(frames[:, :, :2]).abs().sqrt().numpy()
        self.side = np.maximum(np.ceil(self.extent * np.minimum(scale, 1)), 2).astype(np.int64)
        ratio = (self.side / self.extent)[:, None]
        self.matrix = np.zeros((len(frames), 2, 3))
        self.matrix[:, 0, 0] = self.matrix[:, 1, 1] = ratio[:, 0]
        self.matrix[:, :, 2] = (0.5 - self.first) * ratio - 0.5  # pixel centres are integers on both sides
        self.start = np.concatenate([[0], np.cumsum(3 * self.side**2)])
        self.store: np.ndarray | None = None  # (bytes,) uint8 once kept

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i: int) -> np.ndarray:
        if self.store is not None:
            return self.store[self.start[i]:self.start[i + 1]].reshape(self.side[i], self.side[i], 3)
        image, (x, y), n = load_image(self.images[i]), self.first[i], int(self.extent[i])
        height, width = image.shape[:2]
        inside = image[min(max(y, 0), height):max(y + n, 0), min(max(x, 0), width):max(x + n, 0)]
        region = np.full((n, n, 3), BORDER, np.uint8)
        if inside.size:
            top, left = max(-y, 0), max(-x, 0)
            region[top:top + inside.shape[0], left:left + inside.shape[1]] = inside
        side = int(self.side[i])
        return region if side == n else cv2.resize(region, (side, side), interpolation=cv2.INTER_AREA)

    def keep(self, cache: str, verbose: bool = True) -> None:
        """Decodes every region once: into one file of the folder `cache`, or into memory if it is "device".
        The file's name is a digest of what it holds: other images, boxes or sizes make another file.
        Raises: OSError when disk or memory has less room than that takes, before anything is written."""
        total = int(self.start[-1])
        if cache == "device":
            room, path = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "memory"
        else:
            os.makedirs(cache, exist_ok=True)
            digest = hashlib.sha1(repr([_source(image) for image in self.images]).encode())
            for array in (self.first, self.extent, self.side):
                digest.update(array.tobytes())
            path = os.path.join(cache, digest.hexdigest()[:20] + ".crops")
            if os.path.exists(path):
                if os.path.getsize(path) != total:
                    raise ValueError(f"--cache: {path} has not {total} bytes, as it should: delete it")
                self.store = np.memmap(path, np.uint8, "r", shape=(total,))
                return
            for part in glob.glob(glob.escape(path) + ".*.part"):
                if time.time() - os.path.getmtime(part) > 3600:  # of a run that was killed
                    os.remove(part)
            room = shutil.disk_usage(cache).free
        if verbose:
            print(f"cache: {len(self)} faces, {total / 1e6:,.0f} MB, to {path} of {room / 1e6:,.0f} MB")
        if total > 0.9 * room:
            raise OSError(f"--cache {cache}: needs {total / 1e6:,.0f} MB, there are {room / 1e6:,.0f} MB; "
                          f"name a folder with more room, or leave out --cache")
        if cache == "device":
            self.store = self._fill(np.empty(total, np.uint8), verbose)
        else:  # renamed when whole: a half cache is never opened
            part = f"{path}.{os.getpid()}.part"
            self._fill(np.memmap(part, np.uint8, "w+", shape=(total,)), verbose).flush()
            os.replace(part, path)
            self.store = np.memmap(path, np.uint8, "r", shape=(total,))

    def _fill(self, store: np.ndarray, verbose: bool) -> np.ndarray:
        def one(i):
            store[self.start[i]:self.start[i + 1]] = self[i].reshape(-1)

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter's lock
            list(tqdm(pool.map(one, range(len(self))), "cache", len(self), disable=not verbose, leave=False))
        return store


def _source(image) -> tuple:
    """What identifies an image: a file's path, size and time; an array's digest; a drawing's arguments."""
    if isinstance(image, np.ndarray):
        return image.shape, hashlib.sha1(image.tobytes()).hexdigest()
    if isinstance(image, functools.partial):
        return image.func.__qualname__, image.args, sorted(image.keywords.items())
    status = os.stat(image)
    return os.path.abspath(image), status.st_size, status.st_mtime_ns


def draw_moves(keys, augment, size: int, seed: int, may_mirror: bool, mirror=None):
    """What `augment` draws for each key, as `CropDataset` says, then the mirror: maps of crop px (B, 2, 3)
    float64, mirrored or not (B,) bool (`mirror` to begin with), and the extras of the batch."""
    mirror = torch.zeros(len(keys), dtype=torch.bool) if mirror is None else mirror
    moved, extras = torch.eye(2, 3, dtype=torch.float64).repeat(len(keys), 1, 1), {}
    if augment is not None:
        drawn = [augment(np.random.default_rng((seed, *key)), size) for key in keys]
        moved = torch.from_numpy(np.stack([matrix for matrix, _, _ in drawn]))
        if may_mirror:
            mirror = mirror ^ torch.tensor([m for _, m, _ in drawn])
        extras = {name: torch.from_numpy(np.stack([extra[name] for _, _, extra in drawn])).float()
                  for name in drawn[0][2]}
    mirrored = moved * moved.new_tensor([[-1], [1]])
    mirrored[:, 0, 2] += size - 1  # x -> W - 1 - x
    return torch.where(mirror[:, None, None], mirrored, moved), mirror, extras


class CropDataset(torch.utils.data.Dataset):
    """Faces as size x size crops, one warp per image, in batches.

    A key is (epoch, index). With `augment(rng, size) -> (matrix (2, 3), mirror, extras)`, where matrix moves
    crop px and extras is a dict of small arrays for the batch, a crop is a pure function of (seed, epoch,
    index), whatever the workers, the ranks or what was drawn before. Mirroring swaps the points by `flip`;
    without one (a landmark count of no scheme) nothing is mirrored. The attribute `rows` (L, 2) says what
    each index is: a face and 0, or a face and 1 for its mirror image; by default, every face once.
    A batch is a dict: image (B, size, size, 3) uint8; points (B, P, 2) float32 crop px, if faces have any;
    matrix (B, 2, 3) float32, image px -> crop px; index (B,) of the face; and the extras.
    """

    def __init__(self, faces, frames, size, augment=None, reach=1.0, zoom=1.0, flip=None, seed=0,
                 rows=None):
        self.faces, self.frames, self.size = faces, torch.as_tensor(frames), size
        self.augment, self.seed = augment, seed
        self.regions = Regions(faces, frames, size, reach, zoom)
        if rows is None:
            rows = [(i, 0) for i in range(len(faces))]
        self.rows = np.array(rows)
        self.flip = None if flip is None else torch.tensor(flip)
        self.to_frame = warp.compose(self.frames, warp.invert(torch.from_numpy(self.regions.matrix)))
        has_points = all(face.points is not None for face in faces)
        self.points = torch.from_numpy(np.stack([f.points for f in faces])).double() if has_points else None

    def __len__(self):
        return len(self.rows)

    def crop_points(self) -> torch.Tensor:
        """Points of every face in its crop without augmentation, (M, P, 2) float32 px."""
        return warp.apply_affine(self.frames, self.points).float()

    def divisors(self, kind: str) -> torch.Tensor:
        """What errors are divided by, (M,) px of the image, as `normaliser` or "auto"."""
        boxes = None if any(face.box is None for face in self.faces) else \
            torch.tensor([face.box for face in self.faces])
        return normaliser(self.points, norm_kind(kind, self.points.shape[1]), boxes)

    def geometry(self, keys) -> tuple[dict, torch.Tensor]:
        """The batch of `keys` without its pixels, and the maps region px -> crop px, (B, 2, 3) float64."""
        index, mirror = torch.from_numpy(self.rows[[i for _, i in keys]]).unbind(1)
        moved, mirror, batch = draw_moves(keys, self.augment, self.size, self.seed, self.flip is not None,
                                          mirror.bool())
        matrix = warp.compose(moved, self.frames[index])
        if self.points is not None:
            points = warp.apply_affine(matrix, self.points[index])
            if self.flip is not None:
                points = torch.where(mirror[:, None, None], points[:, self.flip], points)
            batch["points"] = points.float()
        return batch | {"index": index, "matrix": matrix.float()}, warp.compose(moved, self.to_frame[index])

    def __getitems__(self, keys) -> dict:  # the name by which a DataLoader asks for a whole batch
        batch, matrix = self.geometry(keys)
        image = np.empty((len(keys), self.size, self.size, 3), np.uint8)
        for out, i, m in zip(image, batch["index"].tolist(), matrix.numpy()):
            cv2.warpAffine(self.regions[i], m, (self.size, self.size), dst=out, flags=cv2.INTER_LINEAR,
                           borderMode=cv2.BORDER_CONSTANT, borderValue=(BORDER,) * 3)
        return batch | {"image": torch.from_numpy(image)}


class EpochBatches:
    """Batches of (epoch, index): a permutation for each (seed, epoch), each batch cut evenly over the ranks.
    `batch` is over all ranks; an incomplete last batch is dropped, a set below one batch repeated to fill it.
    Raises: ValueError when the batch does not divide by the number of processes."""

    def __init__(self, count: int, batch: int, seed: int = 0, rank: int = 0, world: int = 1):
        if batch < 1 or batch % world:
            raise ValueError(f"--batch-size {batch} does not divide over {world} processes; take a multiple")
        self.count, self.batch, self.seed = count, batch, seed
        self.rank, self.world, self.epoch = rank, world, 0

    def __len__(self):
        return max(self.count // self.batch, 1)

    def order(self) -> np.ndarray:
        """The epoch's indices, (count,)."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.count)

    def __iter__(self):
        order = np.resize(self.order(), len(self) * self.batch).reshape(len(self), self.world, -1)
        for mine in order[:, self.rank]:
            yield [(self.epoch, i) for i in mine.tolist()]


class DeviceLoader:
    """Batches of a CropDataset whose regions lie on the device: the warp runs there, and nothing is decoded.
    As a DataLoader over the same batches, but image is (B, 3, size, size) float32 in 0..255 on the device."""

    def __init__(self, dataset: CropDataset, batches, device):
        self.dataset, self.batches, self.device = dataset, batches, device
        count, side = len(dataset.regions), int(dataset.regions.side.max())  # all as large as the largest
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        if 3 * count * side**2 > 0.8 * free:
            raise ValueError(f"--cache device: {count} crops take {3 * count * side**2 / 1e9:,.1f} GB, the "
                             f"GPU has {free / 1e9:,.1f} GB free; name a folder instead, or a smaller --size")
        self.canvas = torch.full((count, 3, side, side), BORDER, dtype=torch.uint8, device=device)
        for i, n in enumerate(dataset.regions.side):
            self.canvas[i, :, :n, :n] = torch.from_numpy(dataset.regions[i].copy()).permute(2, 0, 1)
        dataset.regions.store = None  # the host's copy

    def __iter__(self):
        for keys in self.batches:
            batch, matrix = self.dataset.geometry(keys)
            # non_blocking, or each copy would wait for the training step that the GPU is at
            region = self.canvas[batch["index"].to(self.device, non_blocking=True)].float()
            matrix = matrix.float().to(self.device, non_blocking=True)
            batch["image"] = warp.warp_affine(region, matrix, (self.dataset.size,) * 2, border=BORDER)
            yield batch


def make_loader(dataset: CropDataset, batches, workers: int, device, on_device: bool = False):
    """Loader over `batches` (lists of keys): a DataLoader, or a DeviceLoader if the regions lie on a GPU."""
    if on_device and device.type == "cuda":
        return DeviceLoader(dataset, batches, device)
    if workers:  # they are the parallelism; and a fork that finds OpenCV's threads running can hang
        cv2.setNumThreads(1)
    # A generator of its own: by default, the first pass takes the seed of its workers from the run's, so that
    # the dropout of a resumed run would differ.
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=dict,
                                       persistent_workers=workers > 0, pin_memory=device.type == "cuda",
                                       generator=torch.Generator())


def in_order(count: int, batch: int) -> list[list[tuple[int, int]]]:
    """The keys of a whole set once, in order, for evaluation."""
    return [[(0, i) for i in range(start, min(start + batch, count))] for start in range(0, count, batch)]


def image_paths(paths: Sequence[str]) -> dict[str, str]:
    """Images of files and folders (with all below them), by name without extension, relative to its folder.
    Raises: FileNotFoundError for a path that holds none; ValueError for two images of one name."""
    found = {}
    for root in paths:
        files = [root] if os.path.isfile(root) else sorted(
            path for path in glob.glob(os.path.join(glob.escape(root), "**", "*"), recursive=True)
            if path.lower().endswith((".jpg", ".jpeg", ".png", ".bmp", ".webp")))
        if not files:
            raise FileNotFoundError(f"{root}: no image, and no folder with images")
        for path in files:
            name = os.path.splitext(os.path.relpath(path, root if os.path.isdir(root) else
                                                    os.path.dirname(root) or "."))[0]
            if name in found:
                raise ValueError(f"{found[name]} and {path} would both be written as {name}: give one only")
            found[name] = path
    return found
