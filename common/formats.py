"""Files and folders: images, landmarks of one image (`.pts`) and of many, MATLAB's arrays.

Points are (P, 2) x y in pixels; pixel centres are whole numbers from 0, so that a `.pts`, which
counts from 1, loses 1 here. An error names the file, and the line where it is one.
"""
import os
import re
import struct
import warnings
import zlib
from typing import Callable, Iterator, Sequence

import cv2
import numpy as np
import torch

from common import UserError

# ---- Images --------------------------------------------------------------------------------------


# In the Exif part of a JPEG the tag 0x112, orientation: one short, in either order of bytes.
_ORIENTATION = re.compile(rb"Exif\0\0.*?(?:\x12\x01\x03\0\x01\0\0\0(.)\0|"
                          rb"\x01\x12\0\x03\0\0\0\x01\0(.))", re.DOTALL)


def is_tagged(begin: bytes) -> bool:
    """Whether the first bytes of an image file are of a JPEG that is to be turned by its tag."""
    found = begin.startswith(b"\xff\xd8") and _ORIENTATION.search(begin)
    return bool(found) and (found[1] or found[2]) not in b"\0\x01"


def is_jpeg(path: str) -> bool:
    """Whether a file begins as a JPEG does, whatever its name."""
    with open(path, "rb") as file:
        return file.read(2) == b"\xff\xd8"


def load_image(image: str | np.ndarray | Callable[[], np.ndarray], upright=False,
               half=False) -> np.ndarray:
    """Pixels of a path, an array, or a function making one: RGB uint8 (H, W, 3), C-contiguous.

    Args: upright, to obey the orientation tag of a photograph (the points of every public set were
        marked on the pixels as they are stored); half, to decode a JPEG at half its size, rounded
        up: pixel i is then the mean of pixels 2i and 2i + 1.
    Raises: FileNotFoundError; UserError naming the file if it is empty, damaged or no image;
    ValueError for an array that is no image."""
    if isinstance(image, (str, os.PathLike)):
        flags = cv2.IMREAD_REDUCED_COLOR_2 if half else cv2.IMREAD_COLOR
        if not upright:
            flags |= cv2.IMREAD_IGNORE_ORIENTATION
        with open(image, "rb") as file:  # not imread, to which some names of files are fatal
            data = np.frombuffer(file.read(), np.uint8)
        try:
            pixels = cv2.imdecode(data, flags)
        except cv2.error:  # no bytes at all, or more pixels than cv2 allows
            pixels = None
        if pixels is None:
            raise UserError(f"{image} cannot be decoded as an image: empty, damaged, too large or "
                            "another kind of file")
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    pixels = np.asarray(image() if callable(image) else image)
    colour = pixels.ndim == 3 and pixels.shape[2] == 3
    if pixels.dtype != np.uint8 or not pixels.size or not (colour or pixels.ndim == 2):
        raise ValueError(f"found an array {pixels.dtype} {pixels.shape}, "
                         "wanted uint8 (H, W, 3) or (H, W)")
    return np.ascontiguousarray(pixels) if colour else np.stack([pixels] * 3, -1)


def write_image(path: str, image: np.ndarray) -> None:
    """Writes RGB uint8 (H, W, 3) as the kind of file that the suffix names.
    Raises: UserError for a suffix that cv2 does not know; OSError."""
    try:
        _, data = cv2.imencode(os.path.splitext(path)[1], cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    except cv2.error:
        raise UserError(f"{path}: wanted a name that ends as images do, as .png or .jpg") from None
    with open(path, "wb") as file:
        file.write(data.tobytes())


# ---- Folders -------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def below(folder: str, name: str, where: str) -> str:
    """The path of a file that a list names.   Raises: UserError, if it would leave the folder."""
    if os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
        raise UserError(f"{where}: {name!r} leads out of {folder or '.'}; wanted a path below it")
    return os.path.join(folder, name)


def walk(root: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES, tell=False) -> list[str]:
    """Sorted paths of all files below root whose names end in one of the suffixes, in either case;
    a warning, with `tell`, counts the others.

    Links are followed. Hidden files and folders (.ipynb_checkpoints, ._x.jpg, __MACOSX) are passed
    over.   Raises: UserError naming a link to a folder above; OSError for one that is not
    readable."""
    found, others = [], []

    def enter(folder: str, above: frozenset) -> None:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise UserError(f"{folder} is a link to a folder that holds it, so that its files "
                            "would never end: remove the link")
        for entry in os.scandir(folder):
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                enter(entry.path, above | {here})
            elif entry.name.lower().endswith(suffixes):
                found.append(entry.path)
            elif not entry.name.lower().endswith(".pts"):  # these are read beside their images
                others.append(entry.path)

    enter(root, frozenset())
    if tell and others:
        warnings.warn(f"{root}: {len(others)} files of other kinds are left out, as {min(others)}",
                      stacklevel=3)
    return sorted(found)


def beside(root: str) -> list[tuple[str, str]]:
    """(image, .pts) paths of all files below root; "" where one of the two is not there.
    Raises: UserError, as `walk`, and for two images that one .pts would belong to."""
    pairs: dict[str, list[str]] = {}
    for path in walk(root, (*IMAGE_SUFFIXES, ".pts"), tell=True):
        stem, suffix = os.path.splitext(path)
        pair = pairs.setdefault(stem, ["", ""])
        place = 1 if suffix.lower() == ".pts" else 0
        if pair[place]:
            raise UserError(f"{pair[place]} and {path} differ only in their endings: keep one")
        pair[place] = path
    return [(image, pts) for image, pts in pairs.values()]


def image_paths(paths: Sequence[str]) -> dict[str, str]:
    """Images of files and folders (with all below them), by name without suffix, relative to its
    folder.   Raises: FileNotFoundError for a path without any; UserError for two of one name."""
    found = {}
    for root in paths:
        if os.path.isfile(root):
            base, files = os.path.dirname(root) or ".", [root]
        else:
            base, files = root, walk(root, tell=True) if os.path.isdir(root) else []
        if not files:
            raise FileNotFoundError(f"{root}: no image, and no folder with images")
        for path in files:
            name = os.path.splitext(os.path.relpath(path, base))[0]
            if name in found:
                raise UserError(f"{found[name]} and {path} would both be written as {name}: "
                                "give one only")
            found[name] = path
    return found


# ---- Points --------------------------------------------------------------------------------------


def text_lines(path: str) -> list[tuple[str, str]]:
    """("path:number", line) of the lines of a text file that are not blank."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        numbered = [(f"{path}:{number}", line.strip()) for number, line in enumerate(file, 1)]
    return [(where, line) for where, line in numbered if line]


def numbers(fields: Sequence[str], wanted: int, where: str) -> np.ndarray:
    """(wanted,) float64; the UserError begins with `where`, file:line."""
    if len(fields) != wanted:
        raise UserError(f"{where}: found {len(fields)} numbers, wanted {wanted}")
    try:
        values = np.array(fields, np.float64)
    except ValueError as error:
        raise UserError(f"{where}: {error}, wanted a number") from None
    if not np.isfinite(values).all():
        raise UserError(f"{where}: found {values[~np.isfinite(values)][0]}, wanted a finite number")
    return values


def point_rows(path: str, rows: list[tuple[str, str]], wanted: int) -> np.ndarray:
    """(wanted, 2) float64 from rows "x y" or "x , y" of `text_lines`."""
    if len(rows) != wanted:
        raise UserError(f"{path}: found {len(rows)} points, wanted {wanted}")
    pairs = [line.replace(",", " ").split() for _, line in rows]
    try:                                  # all rows at once, for speed,
        points = np.array(pairs, np.float64)
        if points.shape == (wanted, 2) and np.isfinite(points).all():
            return points
    except ValueError:                    # then row by row, to name the bad line
        pass
    for pair, (where, line) in zip(pairs, rows):
        if len(pair) > 2 and re.search(r"\d,\d", line):
            raise UserError(f"{where}: found {line!r}, with decimal commas; wanted 12.5 34.0")
    return np.stack([numbers(pair, 2, where) for pair, (where, _) in zip(pairs, rows)])


def read_pts(path: str) -> np.ndarray:
    """(P, 2) float32 px, 0-based, of a `.pts`: `version: 1`, `n_points: P`, `{`, P rows "x y" from
    1, `}`. The three lines before the rows may be missing, as in some public copies.
    Raises: FileNotFoundError; UserError naming the file, and the line where it is one, if it is cut
    short, n_points is not the number of rows, or a number is not finite."""
    lines = text_lines(path)
    marks = [line for _, line in lines]
    if "}" in marks:
        lines = lines[:marks.index("}")]
    elif "{" in marks:
        raise UserError(f"{path}: found no line }}: it is cut short")
    start = marks.index("{") + 1 if "{" in marks else 0
    rows = [row for row in lines[start:] if not re.match(r"(version|n_points)\s*:", row[1])]
    counts = re.findall(r"^n_points\s*:\s*(\d+)$", "\n".join(marks), re.M)
    points = point_rows(path, rows, max(1, int(counts[0]) if counts else len(rows)))
    return (points - 1).astype(np.float32)


def write_pts(path: str, points) -> None:
    """Writes (P, 2) px, 0-based, array or tensor, as a `.pts`, which counts from 1."""
    points = torch.as_tensor(points).detach().double().cpu().numpy()
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"{path}: found points {points.shape}, wanted (P, 2), all finite")
    rows = "".join(f"{x:.4f} {y:.4f}\n" for x, y in points + 1)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(f"version: 1\nn_points: {len(points)}\n{{\n{rows}}}\n")


def read_points_csv(path: str) -> dict[str, np.ndarray]:
    """Landmarks of many images, as a detector's: rows image,x0,y0,x1,y1,... px from 0; a header is
    skipped.
    Returns: {image: (n, P, 2) float32}, n faces in it.   Raises: UserError naming the line."""
    found: dict[str, list[np.ndarray]] = {}
    count = 0
    for number, (where, line) in enumerate(text_lines(path)):
        name, *fields = [field.strip() for field in line.split(",")]
        first = fields[0].lower() if fields else ""
        if number == 0 and first[:1].isalpha() and first not in ("nan", "inf"):
            continue
        count = count or len(fields) // 2
        if not count:
            raise UserError(f"{where}: found {line[:40]!r}, wanted image,x0,y0,x1,y1,...")
        points = numbers(fields, 2 * count, where).reshape(-1, 2).astype(np.float32)
        found.setdefault(os.path.normpath(name), []).append(points)
    if not found:
        raise UserError(f"{path} has no row image,x0,y0,x1,y1,...")
    return {name: np.stack(rows) for name, rows in found.items()}


# ---- MATLAB --------------------------------------------------------------------------------------

_MAT_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8",
                12: "i8", 13: "u8", 16: "u1", 17: "u2"}
_MAT_MATRIX = 14
_MAT_COMPRESSED = 15


def _mat_elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type, bytes) of the data elements that follow one another, compressed ones unpacked."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        at += 8
        if kind >> 16:  # small: type and size share a word, 4 bytes of data
            yield kind & 0xFFFF, data[at - 4:at - 4 + (kind >> 16)]
            continue
        content = data[at:at + size]
        if len(content) < size:
            raise ValueError("the file ends inside an element")
        at += size
        if kind == _MAT_COMPRESSED:
            yield from _mat_elements(memoryview(zlib.decompress(content)))
        else:
            at += -size % 8  # of padding
            yield kind, content


def _mat_array(data: memoryview) -> tuple[str, np.ndarray | str | None]:
    """Name and value of a matrix element: float64 array, str, object array (cell), None of other
    classes."""
    if not len(data):
        return "", None
    (_, flags), (_, shape), (_, name), *rest = _mat_elements(data)
    kind = flags[0]
    value = None
    if kind == 1:                        # cell
        value = np.empty(len(rest), object)
        value[:] = [_mat_array(content)[1] for _, content in rest]
    elif kind == 4 or 6 <= kind <= 15:   # char, double ... uint64, stored in any type that fits
        value = np.frombuffer(rest[0][1], _MAT_NUMBERS[rest[0][0]])
        value = "".join(map(chr, value)) if kind == 4 else value.astype(np.float64)
    if isinstance(value, np.ndarray):
        value = value.reshape(np.frombuffer(shape, "i4"), order="F")
    return bytes(name).decode("ascii"), value


def read_mat(path: str) -> dict[str, np.ndarray | str]:
    """Variables of a MATLAB 5 to 7 `.mat` file: float64 arrays, strings, cells as object arrays; no
    structs.   Raises: UserError if it is damaged or of another kind."""
    with open(path, "rb") as file:
        data = file.read()
    if data[126:128] != b"IM" or data.startswith(b"MATLAB 7.3"):  # 7.3 files are HDF5
        raise UserError(f"{path} begins {data[:10]!r}, wanted a MATLAB 5 to 7 file (save -v7)")
    try:
        elements = _mat_elements(memoryview(data)[128:])
        variables = dict(_mat_array(data) for kind, data in elements if kind == _MAT_MATRIX)
    except (ValueError, KeyError, IndexError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is a damaged MATLAB file: {error!r}") from error
    return {name: value for name, value in variables.items() if value is not None}


def open_h5(path: str):
    """A MATLAB 7.3 file opened by h5py, which only COFW needs and which is not required."""
    os.stat(path)  # a file that is not there needs no package
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path} is an HDF5 file: pip install h5py, or export COFW as images "
                          "with train.tsv and test.tsv to --data-root; --data faces needs no "
                          "download") from error
    return h5py.File(path, "r")
