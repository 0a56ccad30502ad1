"""Faces on disk as plain records: one reader for each public set; and crops of them in batches.

A reader is `read_<name>(root, split) -> list[Face]`, reached by name through `read`. It opens the
files of annotations, never pixels. Its docstring shows the files that it wants and where the set
comes from, and is part of its error message. Nothing is downloaded: the sets have owners and
licences.

Points are (P, 2) float32 x y in pixels of the stored image. Pixel centres are whole numbers from 0,
so files that count from 1 (`.pts`, MATLAB arrays) lose 1 here, once. "left" is image-left, the
smaller x. Points outside the image are legal. None is missing: hidden ones stand where the
annotators put them, unmarked; but WIDER FACE has faces without any, whose points are nan.
"""
import functools
import glob
import hashlib
import math
import os
import platform
import re
import shutil
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
# Some of these names are only passed on: the scripts say datasets.SCHEMES, datasets.read_pts.
from common.formats import (IMAGE_SUFFIXES, below, beside, image_paths, is_jpeg, is_tagged,
                            load_image, numbers, open_h5, point_rows, read_mat, read_points_csv,
                            read_pts, text_lines, walk, write_image, write_pts)
from common.schemes import (ARCFACE_5, SCHEMES, Scheme, flip_residual, group_means, norm_kind,
                            normaliser)

# ---- Records -------------------------------------------------------------------------------------


@dataclass
class Face:
    """One annotated face. An image is RGB (H, W, 3) or gray (H, W) uint8."""
    image: str | np.ndarray | Callable[[], np.ndarray]    # path, array, or function making an array
    points: np.ndarray | None = None                      # (P, 2) float32 px of that image, 0-based
    box: tuple[float, float, float, float] | None = None  # x0 y0 x1 y1 px, the set's own face box
    identity: str | None = None                           # the person
    tags: tuple[str, ...] = ()                            # subsets of its split: ("pose", "blur")
    where: str = ""                                       # file:line of the list that names it
    upright: bool = False                                 # whether its image is turned by its tag


def subsets(faces: Sequence[Face]) -> dict[str, np.ndarray]:
    """The whole set under "" and each subset under its tag, in the order of the papers' tables:
    (M,) bool."""
    tags = {tag for face in faces for tag in face.tags}
    order = [tag for tag in (*WFLW_TAGS, "common", "challenging") if tag in tags]
    chosen = {"": np.ones(len(faces), bool)}
    for tag in order + sorted(tags - set(order)):
        chosen[tag] = np.array([tag in face.tags for face in faces])
    return chosen


# The first two bytes of an image file -> what the last bytes of a whole one hold.
_SIGNATURES = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND", b"BM": b"", b"RI": b"", b"GI": b"",
               b"II": b"", b"MM": b""}
_TAGGED = "has an orientation tag; if its points are those of the upright picture, give --upright"


def _fault(path: str) -> str:
    """What is wrong with an image file, by its first and last bytes; "" if nothing is."""
    if not os.path.exists(path):
        return "does not exist"
    with open(path, "rb") as file:
        begin = file.read(4096)
        file.seek(max(os.path.getsize(path) - 4096, 0))
        end = file.read()
    if begin[:2] not in _SIGNATURES:
        return "is no image that cv2 can decode"
    if _SIGNATURES[begin[:2]] not in end:
        return "seems to be cut short"
    return _TAGGED if is_tagged(begin) else ""


def check_images(faces: Sequence[Face], upright: bool = False) -> None:
    """Before a long run: every path exists and begins like an image; warns of files without end,
    and of JPEGs with an orientation tag or, with `upright`, marks their faces as to be turned.
    Raises: UserError naming the first bad file and counting those with its fault."""
    listed = {face.image: face.where for face in faces if isinstance(face.image, str)}
    faults: dict[str, dict[str, str]] = {}
    for path, where in listed.items():
        fault = _fault(path)
        if fault:
            name = f"{path} (listed in {where})" if where else path
            faults.setdefault(fault, {})[path] = name
    tagged = faults.pop(_TAGGED, {}) if upright else {}
    for face in faces:
        face.upright = isinstance(face.image, str) and face.image in tagged
    for fault, bad in faults.items():
        message = f"{[*bad.values()][0]} {fault}; so for {len(bad)} of {len(listed)} images"
        if fault != _TAGGED and not fault.startswith("seems"):
            raise UserError(message)
        warnings.warn(message, stacklevel=2)


# ---- Readers -------------------------------------------------------------------------------------


def missing(reader: Callable, root: str, what: str, flag="--data-root", drawn="faces"):
    """The FileNotFoundError of a set: what was looked for, then the reader's account of it."""
    account = reader.__doc__[reader.__doc__.index("Tree:"):].rstrip().replace("\n    ", "\n")
    there = sorted(os.listdir(root))[:6] if os.path.isdir(root) else []
    return FileNotFoundError(
        f"{reader.__name__}: {what}\nWanted below {flag} {root or '(not given)'}, which has "
        f"{', '.join(there) or 'nothing'}:\n{account}\nIts licence is yours to accept. "
        f"--data {drawn} needs no download.")


def _rows(table: str, count: int, name=0, separator=",", skip=1) -> Iterator[tuple]:
    """(file:line, name of the image, (count,) numbers) of each row of a table; `name` is its column
    and `skip` the rows of the header."""
    for where, line in text_lines(table)[skip:]:
        fields = line.split(separator)
        image = fields.pop(name)
        yield where, image, numbers(fields, count, where)


def _face(folder: str, name: str, where: str, points, box=None, **more) -> Face:
    """The face of an image that a list names, which must lie in the folder."""
    box = None if box is None else tuple(np.asarray(box, float).tolist())
    points = points.reshape(-1, 2).astype(np.float32)
    return Face(below(folder, name, where), points, box, where=where, **more)


def _square(center: np.ndarray, side: float) -> np.ndarray:
    return np.concatenate([center - side / 2, center + side / 2])


def _table_base(table: str, image: str = "") -> int:
    """0 or 1, what a table of an image counts pixels from, by words in their names: 300-W's have
    the numbers of its .pts; WFLW's those of its list, AFLW's those of its .mat, as they are. 0,
    with a warning, if nothing says."""
    names = f"{os.path.basename(table)} {image}"
    if re.search(r"300w|\b(afw|ibug|lfpw|helen)/|(in|out)door_\d", names):
        return 1
    if not re.search(r"wflw|aflw|\d--[A-Z]", names):
        warnings.warn(f"nothing says whether {table} counts pixels from 0 or from 1: taken as from "
                      "0; else all points are 1 px off", stacklevel=3)
    return 0


WFLW_TAGS = ("pose", "expression", "illumination", "makeup", "occlusion", "blur")


def read_wflw(root: str, split: str) -> list[Face]:
    """WFLW: 98 points, taken as 0-based; box: the face rectangle (not tight); tags: `WFLW_TAGS`. A
    row is 196 coordinates, x_min y_min x_max y_max, six flags, image (of one face or several).

    Tree: WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_{train,test}.txt
          WFLW_images/0--Parade/*.jpg, WFLW_images/1--Handshaking/*.jpg, ...
    Source: https://wywu.github.io/projects/LAB/WFLW.html, for research."""
    table = os.path.join(root, "WFLW_annotations", "list_98pt_rect_attr_train_test",
                         f"list_98pt_rect_attr_{split}.txt")
    images = os.path.join(root, "WFLW_images")
    faces = []
    for where, name, values in _rows(table, 206, name=-1, separator=None, skip=0):
        tags = tuple(tag for tag, flag in zip(WFLW_TAGS, values[200:]) if flag)
        faces.append(_face(images, name, where, values[:196], values[196:200], tags=tags))
    return faces


def _annotated(folder: str, tags=()) -> list[Face]:
    """Faces of the images of a folder, with a .pts beside each."""
    faces = []
    for image, pts in beside(folder):
        if not image or not pts:
            raise FileNotFoundError(f"no {'image' if pts else '.pts'} beside {pts or image}")
        faces.append(Face(image, read_pts(pts), tags=tags, where=pts))
    return faces


def read_300w(root: str, split: str) -> list[Face]:
    """300-W: 68 points, no box. train: afw and the training folders of lfpw and helen. test: their
    test folders, tagged "common", and ibug, "challenging". Mirrored copies (*_mirror*) of repacks
    are left out.

    Tree: afw/  helen/trainset/  helen/testset/  lfpw/trainset/  lfpw/testset/  ibug/
          in each NAME.jpg or NAME.png with NAME.pts
    Source: https://ibug.doc.ic.ac.uk/resources/300-W, for non-commercial research."""
    folders = {"afw": (), "lfpw/trainset": (), "helen/trainset": ()}
    if split == "test":
        folders = {"lfpw/testset": ("common",), "helen/testset": ("common",),
                   "ibug": ("challenging",)}
    faces = []
    for name, tags in folders.items():
        faces += _annotated(os.path.join(root, name), tags)
    return [face for face in faces if "_mirror" not in os.path.basename(face.image)]


def read_folder(root: str, split: str) -> list[Face]:
    """A folder of your own: any number of points, the same in all; no box; identity: the folder
    that holds the image, as a path below the split (None for an image directly in it).

    Tree: train/PERSON/NAME.jpg and train/PERSON/NAME.pts, test/PERSON/...; at any depth
    Source: you. A .pts counts from 1: lines "version: 1", "n_points: P", "{", P of "x y", "}"."""
    base = os.path.join(root, split)
    faces = _annotated(base)
    for face in faces:
        person = os.path.relpath(os.path.dirname(face.image), base)
        face.identity = None if person == "." else person
    return faces


def _cofw_image(path: str, key: str, index: int) -> np.ndarray:
    """Image `index` of a COFW file, gray (H, W) or RGB (H, W, 3): HDF5 has MATLAB's axes
    reversed."""
    with open_h5(path) as file:
        return np.ascontiguousarray(file[file[key][()].ravel()[index]][()].T)


def read_cofw(root: str, split: str) -> list[Face]:
    """COFW: 29 points, box. The exported table where there is one (box: the square of 200 scale
    about the center), else the `.mat`, by h5py: points and boxes lose MATLAB's 1, and an image is a
    function that reads it when it is needed.   Raises also: ImportError without h5py.

    Tree: COFW_train_color.mat, COFW_test_color.mat
          or, exported: train.tsv, test.tsv, train/*.jpg, test/*.jpg; a table is a header and rows,
          with tabs: image, 5 points x0,y0,..., 29 points x0,y0,..., scale, center_w, center_h
    Source: https://data.caltech.edu, Caltech Occluded Faces in the Wild, COFW_color.zip."""
    faces = []
    table = os.path.join(root, f"{split}.tsv")
    if os.path.exists(table):
        base = _table_base(table)
        for where, line in text_lines(table)[1:]:
            name, *fields = re.split(r"[\t,]", line)
            values = numbers(fields[:71], 71, where)[10:]  # without the 5 points; tags may follow
            box = _square(values[59:] - base, 200 * values[58])
            name = name if "/" in name else f"{split}/{name}"
            faces.append(_face(root, name, where, values[:58] - base, box))
    else:
        path = os.path.join(root, f"COFW_{split}_color.mat")
        end = "Tr" if split == "train" else "T"
        with open_h5(path) as file:
            phis = file["phis" + end][()].T      # (N, 87): 29 x, 29 y, 29 flags of occlusion
            boxes = file["bboxes" + end][()].T   # (N, 4): x y width height
        points = (np.stack([phis[:, :29], phis[:, 29:58]], -1) - 1).astype(np.float32)
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1) - 1
        for i, box in enumerate(boxes.tolist()):
            image = functools.partial(_cofw_image, path, "Is" + end, i)
            faces.append(Face(image, points[i], tuple(box)))
    return faces


def read_cofw68(root: str, split: str) -> list[Face]:
    """COFW-68: the test images of COFW with 68 points, no box. train is that of 300-W, as in the
    benchmark.

    Tree: cofw68/test_annotations/1_points.mat ... 507_points.mat
          cofw/COFW_test_color.mat, or exported: cofw/test.tsv and cofw/test/*.jpg
          300w/afw/, 300w/helen/trainset/, 300w/lfpw/trainset/ (for train)
    Source: https://github.com/golnazghiasi/cofw68-benchmark."""
    if split == "train":
        return read_300w(os.path.join(root, "300w"), "train")
    with warnings.catch_warnings():  # of the 29 points, which are not used
        warnings.simplefilter("ignore")
        faces = read_cofw(os.path.join(root, "cofw"), "test")
    for number, face in enumerate(faces, 1):
        path = os.path.join(root, "cofw68", "test_annotations", f"{number}_points.mat")
        points = read_mat(path)["Points"] - 1  # MATLAB counts from 1
        face.points = points.astype(np.float32)
        face.box = None
    return faces


def read_helen(root: str, split: str) -> list[Face]:
    """HELEN: 194 points, taken as 0-based, no box. The first line of an annotation file names its
    image. What is listed and not there is left out, with a warning.

    Tree: annotation/1.txt ... 2330.txt, trainnames.txt, testnames.txt
          NAME.jpg in any folders, as train_1/ ... train_4/ and test/
    Source: http://www.ifp.illinois.edu/~vuongle2/helen."""
    annotations = {}
    for path in walk(os.path.join(root, "annotation"), (".txt",)):
        (_, name), *rows = text_lines(path) or [("", "")]
        annotations[name] = (path, rows)
    images: dict[str, list[str]] = {}
    for path in walk(root):
        images.setdefault(os.path.splitext(os.path.basename(path))[0], []).append(path)
    faces, lost = [], []
    for where, name in text_lines(os.path.join(root, f"{split}names.txt")):
        if name not in images or name not in annotations:
            lost.append(f"{'annotation' if name in images else 'image'} of {name} ({where})")
        elif len(images[name]) > 1:
            raise UserError(f"{images[name][0]} and {images[name][1]} are both {name}: keep one")
        else:
            path, rows = annotations[name]
            points = point_rows(path, rows, 194).astype(np.float32)
            faces.append(Face(images[name][0], points, where=where))
    if lost:
        warnings.warn(f"read_helen: no {lost[0]}, nor of {len(lost) - 1} others: left out",
                      stacklevel=2)
    return faces


def read_aflw(root: str, split: str) -> list[Face]:
    """AFLW: 19 points, as they stand; box: the face rectangle, whose size is the normaliser "face";
    test faces with all points visible are tagged "frontal". HRNet's tables of AFLW are read by
    --data csv.

    Tree: AFLWinfo_release.mat
          flickr/0/*.jpg, flickr/2/*.jpg, flickr/3/*.jpg
    Source: TU Graz, by agreement; the .mat: Zhu et al., Unconstrained Face Alignment, CVPR 2016."""
    path = os.path.join(root, "AFLWinfo_release.mat")
    images = os.path.join(root, "flickr")
    table = read_mat(path)
    names = table["nameList"].ravel()
    points = np.stack(np.split(table["data"], 2, 1), -1)  # 19 x, 19 y -> (N, 19, 2)
    boxes = table["bbox"][:, [0, 2, 1, 3]]                # stored as xmin xmax ymin ymax
    frontal = table["mask_new"].all(1)
    order = table["ra"].ravel().astype(int) - 1           # from 1; the first 20,000 are to train on
    faces = []
    for i in order[:20000] if split == "train" else order[20000:]:
        tags = ("frontal",) if split == "test" and frontal[i] else ()
        faces.append(_face(images, names[i], path, points[i], boxes[i], tags=tags))
    return faces


def read_jd106(root: str, split: str) -> list[Face]:
    """LaPa (also "val") or JD-landmark: 106 points in LaPa's order, see `SCHEMES`; box: of rect/,
    if any.

    Tree: {train,val,test}/images/NAME.jpg and {train,val,test}/landmarks/NAME.txt (LaPa)
          or, for JD-landmark, picture/NAME.jpg, landmark/NAME.jpg.txt and maybe
          rect/NAME.jpg.rect, below Train/ or Training_data/{AFW,HELEN,IBUG,LFPW}/, and Test_data1/
          in a .txt the number of points, 106, then rows "x y" from 0; in a .rect "x1 y1 x2 y2"
    Source: https://github.com/JDAI-CV/lapa-dataset; JD-landmark on application."""
    jd = {"train": ["Train", *(f"Training_data/{name}" for name in "AFW HELEN IBUG LFPW".split())],
          "test": ["Test_data1"]}
    places = [(base, "picture", "landmark") for base in jd.get(split, [])]
    places = [place for place in places if os.path.isdir(os.path.join(root, place[0], place[2]))]
    faces = []
    for base, pictures, marks in places or [(split, "images", "landmarks")]:
        for path in walk(os.path.join(root, base, marks), (".txt",)):
            name = os.path.basename(path)[:-4]
            if not name.lower().endswith(IMAGE_SUFFIXES):
                name += ".jpg"
            (where, count), *rows = text_lines(path) or [(f"{path}:1", "")]
            if count != "106":
                raise UserError(f"{where}: found {count!r}, wanted the number of points, 106")
            box = None
            rect = os.path.join(root, base, "rect", f"{name}.rect")
            if os.path.exists(rect):
                box = numbers(" ".join(line for _, line in text_lines(rect)).split(), 4, rect)
            folder = os.path.join(root, base, pictures)
            faces.append(_face(folder, name, path, point_rows(path, rows, 106), box))
    return faces


def read_csv(root: str, split: str) -> list[Face]:
    """Tables as HRNet writes them, of any number of points; box: the square about the center of
    box_size, where given (of AFLW, whose normaliser it is), else of 200 scale. 300-W's count from
    1, WFLW's and AFLW's from 0, as is taken (and said) for others. 300-W's test split is
    face_landmarks_300w_valid.csv, with the tags of --data 300w: face_landmarks_300w_test.csv, the
    private set of 600 images, is read where that is not there.

    Tree: train.csv, test.csv (or one NAME_train.csv, one NAME_test.csv); images/ (or beside them)
          header: image_name,scale,[box_size,]center_w,center_h,original_0_x,original_0_y,...
    Source: https://github.com/HRNet/HRNet-Facial-Landmark-Detection, or your own."""
    patterns = [f"{split}.csv", f"*_{split}.csv"]
    if split == "test":
        patterns.insert(1, "*300w_valid.csv")
    tables = []
    for pattern in patterns:
        tables = tables or glob.glob(pattern, root_dir=root)
    if len(tables) != 1:
        raise FileNotFoundError(f"{len(tables)} tables {' or '.join(patterns)}, wanted one")
    table = os.path.join(root, tables[0])
    if table.endswith("300w_test.csv"):
        warnings.warn(f"{table} is the private set of 600 images; the full set of the papers is "
                      "face_landmarks_300w_valid.csv", stacklevel=2)
    images = os.path.join(root, "images")
    images = images if os.path.isdir(images) else root
    (where, header), *lines = text_lines(table) or [(f"{table}:1", "")]
    columns = header.replace(" ", "").split(",")
    sized = ["box_size"] if "box_size" in columns else []
    wanted = ["image_name", "scale", *sized, "center_w", "center_h"]
    if columns[:len(wanted)] != wanted or (len(columns) - len(wanted)) % 2:
        raise UserError(f"{where}: found {len(columns)} columns {','.join(columns[:6])}..., wanted "
                        f"{','.join(wanted)} and pairs original_0_x,original_0_y,...")
    base = _table_base(table, lines[0][1] if lines else "")
    faces = []
    for where, name, values in _rows(table, len(columns) - 1):
        scale, *sizes, x, y = values[:len(wanted) - 1]
        box = _square(np.array([x, y]) - base, sizes[0] if sized else 200 * scale)
        tags = ()
        if table.endswith("300w_valid.csv"):
            tags = ("challenging",) if name.startswith("ibug/") else ("common",)
        faces.append(_face(images, name, where, values[len(wanted) - 1:] - base, box, tags=tags))
    return faces


def read_youtube(root: str, split: str) -> list[Face]:
    """Frames of YouTube Faces: 68 points, 0-based; identity: the person; no box. The published test
    list repeats training frames, so the other table is split: a sixth of its people, by hash of
    name, is test.

    Tree: data/training_frames_keypoints.csv, data/training/First_Last_VF.jpg
    Source: git clone https://github.com/udacity/P1_Facial_Keypoints"""
    table = os.path.join(root, "data", "training_frames_keypoints.csv")
    images = os.path.join(root, "data", "training")
    faces = []
    for where, name, points in _rows(table, 136):
        faces.append(_face(images, name, where, points, identity=name.rpartition("_")[0]))
    people = sorted({face.identity for face in faces},
                    key=lambda name: hashlib.sha256(name.encode()).digest())
    test = set(people[:round(len(people) / 6)])
    faces = [face for face in faces if (face.identity in test) == (split == "test")]
    return faces


def read_widerface(root: str, split: str) -> list[Face]:
    """WIDER FACE with RetinaFace's 5 points, 0-based; box: the face's. Faces without points, or
    with all on one line, have points nan. The label file of val has boxes only, so the test split
    is a tenth of the training images, by hash of name, of which only faces with points. A row is
    x y w h, 5 times x y v (v -1: no point), blur.

    Tree: train/label.txt: lines "# 0--Parade/NAME.jpg", each followed by one row for each face
          train/images/0--Parade/*.jpg, ...
    Source: http://shuoyang1213.me/WIDERFACE; label.txt: insightface, detection/retinaface."""
    table = os.path.join(root, "train", "label.txt")
    images = os.path.join(root, "train", "images")
    faces, name = [], ""
    for where, line in text_lines(table):
        if line.startswith("#"):
            name = line[1:].strip()
        elif (zlib.crc32(name.encode()) % 10 == 0) == (split == "test"):
            values = numbers(line.split(), 20, where)
            x, y, w, h = values[:4]
            points = values[4:19].reshape(5, 3)
            if (points[:, 2] < 0).any() or on_line(points[None, :, :2]).any():
                points = np.full((5, 3), np.nan)
            if w > 0 and h > 0 and not (split == "test" and np.isnan(points).any()):
                faces.append(_face(images, name, where, points[:, :2], (x, y, x + w, y + h)))
    return faces


READERS: dict[str, Callable[[str, str], list[Face]]] = {
    "wflw": read_wflw, "300w": read_300w, "cofw": read_cofw, "cofw68": read_cofw68,
    "helen": read_helen, "aflw": read_aflw, "jd106": read_jd106, "lapa": read_jd106,
    "csv": read_csv, "youtube": read_youtube, "widerface": read_widerface, "folder": read_folder}


# How many faces the published splits have: train, test.
_PUBLISHED = {"wflw": (7500, 2500), "300w": (3148, 689), "cofw": (1345, 507),
              "cofw68": (3148, 507), "helen": (2000, 330), "aflw": (20000, 4386)}


def read(data: str, root: str, split: str) -> list[Face]:
    """Faces of the set `data`, a key of `READERS`, below `root`; split "train" or "test" (LaPa also
    "val"). Warns if they are not as many as in the official split.
    Raises: FileNotFoundError, with the tree that is wanted; UserError for a bad file, a face with
    another number of points, and as `check_points`."""
    reader = READERS[data]
    try:
        if not os.path.isdir(root):
            raise FileNotFoundError(f"no folder {root}")
        faces = reader(root, split)
        if not faces:
            raise FileNotFoundError(f"no face in the {split} split")
    except FileNotFoundError as error:
        raise missing(reader, root, str(error)) from None
    if data in _PUBLISHED and len(faces) != _PUBLISHED[data][split == "test"]:
        warnings.warn(f"--data {data}: {len(faces)} faces in the {split} split of {root}, "
                      f"{_PUBLISHED[data][split == 'test']} in the official one", stacklevel=2)
    first = faces[0]
    for face in faces:
        if len(face.points) != len(first.points):
            raise UserError(f"{face.where} has {len(face.points)} points, {first.where} "
                            f"{len(first.points)}; wanted as many in all")
    check_points(faces, root)
    return faces


def check_points(faces: Sequence[Face], root: str) -> None:
    """As `check_landmarks`, of the faces that have points."""
    faces = [face for face in faces if face.points is not None and np.isfinite(face.points).all()]
    if faces:
        points = np.stack([face.points for face in faces])
        check_landmarks(points, lambda i: faces[i].where or faces[i].image, root)


def check_landmarks(points: np.ndarray, name: Callable[[int], str], root: str) -> None:
    """Points (M, P, 2) of a set, of which errors call face i name(i): an error if they are
    fractions of the image or those of a face lie on one line; a warning if points stand for missing
    ones, a face has both pupils at one place, or the mean face is not in the order of `SCHEMES`: a
    large `flip_residual`, the left eye on the right, the mouth above the eyes."""
    extent = np.ptp(points, axis=1).max(1)
    if points.max() <= 1.5 and extent.max() <= 1.5:
        raise UserError(f"{root}: all points lie within {extent.max():.2g} px: they seem to be "
                        "fractions of the image; wanted pixels")
    flat = np.flatnonzero(on_line(points) & (points.shape[1] > 2))
    if flat.size:
        raise UserError(f"{name(flat[0])}: all points are at one place, or on one line; so for "
                        f"{flat.size} of {len(points)} faces: correct them, or leave them out")
    # 0 0 or -1 -1 stands for "missing" in some sets; both lose 1 in files that count from 1
    marks = (points[..., 0] == points[..., 1]) & np.isin(points[..., 0], (0, -1, -2))
    found = {"several points exactly at 0 0 or -1 -1, used as they stand": marks.sum(1) >= 2}
    scheme = SCHEMES.get(points.shape[1])
    if scheme:
        pupils = group_means(points, scheme.pupils)  # (M, 2, 2)
        found["both pupils at one place, and so no ANME"] = (np.ptp(pupils, axis=1) == 0).all(1)
    for fault, bad in found.items():
        if bad.any():
            warnings.warn(f"{name(bad.argmax())} has {fault}; so for {bad.sum()} of {len(points)} "
                          "faces", stacklevel=4)
    if scheme and len(points) >= 50:  # fewer may all look to one side
        some = points[::len(points) // 100_000 + 1]
        residual = flip_residual(some, scheme.flip)
        five = group_means(some.mean(0), scheme.five)  # (5, 2): eyes, nose, mouth corners
        if residual > 0.2 or five[0, 0] > five[1, 0] or five[:2, 1].mean() > five[3:, 1].mean():
            warnings.warn(f"{root}: these {scheme.points} points are hardly in the order of "
                          f"SCHEMES[{scheme.points}]: the mirrored mean face is off by "
                          f"{residual:.2f} of its box (wanted below 0.2), or the left eye is on "
                          "the right, or the mouth above the eyes", stacklevel=4)


def on_line(points: np.ndarray) -> np.ndarray:
    """Which of the faces (M, P, 2) have all points on one line, or at one place: (M,) bool."""
    offset = points - points.mean(1, keepdims=True, dtype=np.float64)
    (xx, xy), (_, yy) = np.einsum("mpi,mpj->ijm", offset, offset)
    return xx * yy - xy**2 <= 1e-6 * (xx + yy) ** 2


def check_inside(points: np.ndarray, size: Sequence[int], source, i: int) -> None:
    """Raises: UserError where all points (P, 2) lie outside image i, `size` wide and high."""
    outside = (points < -0.5) | (points > np.subtract(size, 0.5))
    if outside.any(1).all():
        name = source if isinstance(source, str) else f"image {i}"
        raise UserError(f"{name}: all points lie outside its image of {size[0]} x {size[1]}; "
                        "correct or leave out that face")


# ---- Crops ---------------------------------------------------------------------------------------

BORDER = 127  # grey level outside the image


def landmark_boxes(points: np.ndarray) -> np.ndarray:
    """Boxes x0 y0 x1 y1 (..., 4) about landmarks (..., P, 2) px. Five span half a face only: they
    get a square of the size and place that the box of the face's 68 landmarks would have."""
    low, high = points.min(-2), points.max(-2)
    if points.shape[-2] == 5:
        side = (high - low).max(-1, keepdims=True)
        centre = (low + high) / 2 + side * (0, 0.15)  # and 2: medians of 300-W's photographs
        low, high = centre - side, centre + side
    return np.concatenate([low, high], -1)


def face_boxes(faces: list[Face], kind: str) -> np.ndarray:
    """Boxes to crop, (M, 4) float64 x0 y0 x1 y1 px: about the true "landmarks", or the set's own
    "face" box.   Raises: UserError for a box too small or too large to be a face's."""
    if kind == "landmarks":
        boxes = [landmark_boxes(face.points) for face in faces]
        count = len(faces[0].points) if faces else 0
        if count and count not in SCHEMES:
            warnings.warn(f"crops are about the box of {count} landmarks of no known scheme: if "
                          "they leave out brows or chin, a larger --margin shows the whole face",
                          stacklevel=2)
    elif kind == "face":
        boxes = [face.box or (0, 0, 0, 0) for face in faces]
    else:
        raise UserError(f"--box {kind}: expected 'landmarks' or 'face'")
    boxes = np.array(boxes, np.float64)
    extent = (boxes[:, 2:] - boxes[:, :2]).max(1)
    bad = np.flatnonzero(~((extent >= 1) & (extent < 20_000)))  # a wild point makes a wild crop
    if bad.size:
        i = bad[0]
        name = faces[i].image if isinstance(faces[i].image, str) else f"face {i}"
        raise UserError(f"{name}: --box {kind} finds a box of {extent[i]:g} px there, wanted 1 to "
                        "20,000; correct or leave out that face")
    return boxes


def square_crops(boxes: np.ndarray, size: int, margin: float) -> np.ndarray:
    """Maps image px -> px of a size x size crop: the square about each box, `margin` times its
    longer side.   Args: boxes (M, 4) x0 y0 x1 y1 px.   Returns: (M, 2, 3) float64."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    side = margin * (boxes[:, 2:] - boxes[:, :2]).max(1)
    if not (side > 0).all():
        raise UserError(f"face {side.argmin()}: its box {boxes[side.argmin()]} has no extent")
    matrices = np.zeros((len(boxes), 2, 3))
    matrices[:, 0, 0] = matrices[:, 1, 1] = size / side
    matrices[:, :, 2] = (size - 1) / 2 - centre * (size / side)[:, None]
    return matrices


class Regions:
    """The part of each image that its crops can need, at the resolution that they can use.

    `crop_matrices` (M, 2, 3) map image px to crop px; an augmentation may look `reach` times as
    wide as the crop and enlarge it `zoom` times. What lies outside the image is grey, or with
    `reflect` its mirror image. A region comes from its image every time or, after `keep`, from one
    memory map or from memory: the same pixels either way, because shrinking (by area, so that
    nothing aliases) happens here and only the final warp interpolates.
    Indexing gives RGB uint8 (n, n, 3); `.matrix` (M, 2, 3) maps image px to region px, `.side` (M,)
    is n.
    """

    def __init__(self, faces, crop_matrices, size: int, reach=1.0, zoom=1.0, reflect=False):
        maps = torch.as_tensor(crop_matrices, dtype=torch.float64)
        corners = maps.new_tensor([[-1, -1], [1, -1], [-1, 1], [1, 1]]) * reach * size / 2
        corners = (corners + (size - 1) / 2).expand(len(maps), 4, 2)
        around = warp.apply_affine(warp.invert(maps), corners).numpy()  # (M, 4, 2) image px
        self.faces = faces
        self.border = cv2.BORDER_REFLECT_101 if reflect else cv2.BORDER_CONSTANT
        # Even, so that a region is as exact in an image of half the size.
        self.first = np.floor(around.min(1) / 2).astype(np.int64) * 2 - 2  # (M, 2) px, top left
        last = np.ceil(around.max(1) / 2).astype(np.int64) * 2 + 2
        self.extent = (last - self.first).max(1)                           # (M,) image px
        scale = zoom * torch.linalg.det(maps[:, :, :2]).abs().sqrt().numpy()
        self.side = np.ceil(self.extent * np.minimum(scale, 1)).astype(np.int64).clip(2)
        ratio = self.side / self.extent
        self.matrix = np.zeros((len(maps), 2, 3))
        self.matrix[:, 0, 0] = self.matrix[:, 1, 1] = ratio
        # pixel centres are integers on both sides
        self.matrix[:, :, 2] = (0.5 - self.first) * ratio[:, None] - 0.5
        self.start = np.concatenate([[0], np.cumsum(3 * self.side**2)])
        self.store: np.ndarray | None = None  # (bytes,) uint8 once kept
        self.path = ""                        # of the file that the store is a map of

    def __len__(self):
        return len(self.faces)

    def __getitem__(self, i: int) -> np.ndarray:
        side = int(self.side[i])
        if self.store is not None:
            return self.store[self.start[i]:self.start[i + 1]].reshape(side, side, 3)
        face = self.faces[i]
        # A JPEG is decoded at half its size, in half the time, where the region shrinks so far.
        half = (2 * side <= self.extent[i] and isinstance(face.image, str) and not face.upright
                and is_jpeg(face.image))
        n = int(self.extent[i]) // (1 + half)
        x, y = self.first[i] // (1 + half)
        image = load_image(face.image, upright=face.upright, half=half)
        # Points of an array, a picture of --predict, were found in it and may lie anywhere.
        if face.points is not None and not isinstance(face.image, np.ndarray):
            size = np.multiply(image.shape[1::-1], 1 + half)
            check_inside(face.points, size, face.where or face.image, i)
        region = image[max(y, 0):max(y + n, 0), max(x, 0):max(x + n, 0)]
        if region.shape[:2] != (n, n):  # it reaches beyond the image
            region = cv2.warpAffine(image, np.float64([[1, 0, -x], [0, 1, -y]]), (n, n),
                                    flags=cv2.INTER_NEAREST, borderMode=self.border,
                                    borderValue=(BORDER,) * 3)
        return cv2.resize(region, (side, side), interpolation=cv2.INTER_AREA)

    def keep(self, cache: str, verbose: bool = True) -> None:
        """Decodes every region once: into one file of the folder `cache`, or into memory if it is
        "device". The file's name is a digest of what it holds: other images, boxes or sizes make
        another file.   Raises: UserError for a file that is damaged, or too little room."""
        total = int(self.start[-1])
        path = os.path.join(cache, self._digest() + ".crops")
        if cache == "device":
            path = "memory"
            room = free_memory()
        else:
            os.makedirs(cache, exist_ok=True)
            if os.path.exists(path):
                self._open(path)
                return
            for part in glob.glob(glob.escape(path) + ".*.part"):
                if time.time() - os.path.getmtime(part) > 3600:  # of a run that was killed
                    os.remove(part)
            room = shutil.disk_usage(cache).free
        needs = f"{total / 1e6:,.0f} MB"
        if verbose:
            print(f"cache: {len(self)} faces, {needs}, to {path} of {room / 1e6:,.0f} MB")
        if total > 0.9 * room:
            raise UserError(f"--cache {cache}: needs {needs}, there are {room / 1e6:,.0f} MB; name "
                            "a folder with more room, or leave out --cache")
        if cache == "device":
            self.store = self._fill(np.empty(total, np.uint8), verbose)
        else:
            part = f"{path}.{platform.node()}.{os.getpid()}.part"
            store = np.memmap(part, np.uint8, "w+", shape=(total + 4,))
            self._fill(store[:total], verbose)
            store[total:] = _checksum(store[:total])
            store.flush()
            os.replace(part, path)  # when it is whole: a half cache is never opened
            self._open(path)

    def _open(self, path: str) -> None:
        """Maps a file that `keep` wrote: the regions, then their checksum."""
        total = int(self.start[-1])
        whole = os.path.getsize(path) == total + 4
        if whole:
            store = np.memmap(path, np.uint8, "r")
            whole = (store[total:] == _checksum(store[:total])).all()
        if not whole:
            raise UserError(f"--cache: {path} is damaged: delete it")
        self.path = path
        self.store = store[:total]

    def __getstate__(self):  # for a worker; a pickled memory map would carry all its bytes
        return self.__dict__ | ({"store": None} if self.path else {})

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.path:
            self._open(self.path)

    def _digest(self) -> str:
        sources = [(_source(face.image), face.upright) for face in self.faces]
        digest = hashlib.sha1(repr(sources).encode())
        for array in (self.first, self.extent, self.side, np.array(self.border)):
            digest.update(array.tobytes())
        return digest.hexdigest()[:20]

    def _fill(self, store: np.ndarray, verbose: bool) -> np.ndarray:
        def one(i):
            store[self.start[i]:self.start[i + 1]] = self[i].reshape(-1)

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter's lock
            done = pool.map(one, range(len(self)))
            for _ in tqdm(done, "cache", len(self), disable=not verbose, leave=False):
                pass
        return store


def _checksum(store: np.ndarray) -> np.ndarray:
    """(4,) uint8 of some 4,096 bytes spread over all: it shows a file that was not all written."""
    crc = zlib.crc32(store[::len(store) // 4096 + 1].tobytes())
    return np.array([crc], "<u4").view(np.uint8)


def free_memory() -> float:
    """Bytes of memory that can be had, within a container's limit; inf if nothing says."""
    room = math.inf
    for path, number, unit in (("/proc/meminfo", r"MemAvailable:\s*(\d+)", 1024),
                               ("/sys/fs/cgroup/memory.max", r"(\d+)", 1)):  # or "max"
        if os.path.exists(path):
            with open(path) as file:
                found = re.search(number, file.read())
            room = min(room, unit * int(found[1])) if found else room
    return room


def _source(image) -> tuple:
    """What identifies an image: a file's path, size and time; an array's digest; of a drawing or a
    picture inside a file, the function's arguments, files among them likewise."""
    if isinstance(image, np.ndarray):
        return image.shape, hashlib.sha1(image.tobytes()).hexdigest()
    if isinstance(image, functools.partial):
        args = [_source(arg) if isinstance(arg, str) and os.path.isfile(arg) else arg
                for arg in image.args]
        return image.func.__qualname__, args, sorted(image.keywords.items())
    status = os.stat(image)
    return os.path.abspath(image), status.st_size, status.st_mtime_ns


def draw_moves(keys, augment, size: int, seed: int, may_mirror: bool, mirror=None):
    """What `augment` draws for each key, as `CropDataset` says, then the mirror: maps of crop px
    (B, 2, 3) float64, mirrored or not (B,) bool (`mirror` to begin with), and the batch's extras.
    """
    mirror = torch.zeros(len(keys), dtype=torch.bool) if mirror is None else mirror
    moved = torch.eye(2, 3, dtype=torch.float64).repeat(len(keys), 1, 1)
    extras = {}
    if augment is not None:
        drawn = [augment(np.random.default_rng((seed, *key)), size) for key in keys]
        moved = torch.from_numpy(np.stack([matrix for matrix, _, _ in drawn]))
        if may_mirror:
            mirror = mirror ^ torch.tensor([flipped for _, flipped, _ in drawn])
        for name in drawn[0][2]:
            extras[name] = torch.from_numpy(np.stack([extra[name] for _, _, extra in drawn]))
            extras[name] = extras[name].float()
    mirrored = moved * moved.new_tensor([[-1], [1]])
    mirrored[:, 0, 2] += size - 1  # x -> W - 1 - x
    return torch.where(mirror[:, None, None], mirrored, moved), mirror, extras


class CropDataset(torch.utils.data.Dataset):
    """Faces as size x size crops, one warp per image, in batches.

    A key is (epoch, index). With `augment(rng, size) -> (matrix (2, 3), mirror, extras)`, where
    matrix moves crop px and extras is a dict of small arrays for the batch, a crop is a pure
    function of (seed, epoch, index), whatever the workers, the ranks or what was drawn before.
    Mirroring swaps the points by `flip`; without one (a landmark count of no scheme) nothing is
    mirrored. The attribute `rows` (L, 2) says what each index is: a face and 0, or a face and 1 for
    its mirror image; by default, every face once. Outside the image is grey, or its reflection.
    A batch is a dict: image (B, size, size, 3) uint8; points (B, P, 2) float32 crop px, if faces
    have any; matrix (B, 2, 3) float32, image px -> crop px; index (B,) of the face; the extras.
    """

    def __init__(self, faces, crop_matrices, size, augment=None, reach=1.0, zoom=1.0, flip=None,
                 seed=0, rows=None, reflect=False):
        self.faces = faces
        self.crop_matrices = torch.as_tensor(crop_matrices)
        self.size = size
        self.augment = augment
        self.seed = seed
        self.regions = Regions(faces, crop_matrices, size, reach, zoom, reflect)
        self.rows = np.array([(i, 0) for i in range(len(faces))] if rows is None else rows)
        self.flip = None if flip is None else torch.tensor(flip)
        to_image = warp.invert(torch.from_numpy(self.regions.matrix))
        self.from_region = warp.compose(self.crop_matrices, to_image)
        self.points = None
        if all(face.points is not None for face in faces):
            self.points = torch.from_numpy(np.stack([face.points for face in faces])).double()

    def __len__(self):
        return len(self.rows)

    def crop_points(self) -> torch.Tensor:
        """Points of every face in its crop without augmentation, (M, P, 2) float32 px."""
        return warp.apply_affine(self.crop_matrices, self.points).float()

    def divisors(self, kind: str) -> torch.Tensor:
        """What errors are divided by, (M,) px of the image, as `normaliser` or "auto"."""
        boxes = None
        if all(face.box is not None for face in self.faces):
            boxes = torch.tensor([face.box for face in self.faces])
        kind = norm_kind(kind, self.points.shape[1], boxes is not None)
        return normaliser(self.points, kind, boxes)

    def geometry(self, keys) -> tuple[dict, torch.Tensor]:
        """The batch of `keys` without its pixels, and the maps region px -> crop px, (B, 2, 3)
        float64."""
        index, mirror = torch.from_numpy(self.rows[[i for _, i in keys]]).unbind(1)
        moved, mirror, batch = draw_moves(keys, self.augment, self.size, self.seed,
                                          self.flip is not None, mirror.bool())
        matrix = warp.compose(moved, self.crop_matrices[index])
        if self.points is not None:
            points = warp.apply_affine(matrix, self.points[index])
            if self.flip is not None:
                points = torch.where(mirror[:, None, None], points[:, self.flip], points)
            batch["points"] = points.float()
        batch["index"] = index
        batch["matrix"] = matrix.float()
        return batch, warp.compose(moved, self.from_region[index])

    def __getitems__(self, keys) -> dict:  # by this name a DataLoader asks for a whole batch
        batch, matrix = self.geometry(keys)
        image = np.empty((len(keys), self.size, self.size, 3), np.uint8)
        for out, i, m in zip(image, batch["index"].tolist(), matrix.numpy()):
            cv2.warpAffine(self.regions[i], m, (self.size, self.size), dst=out,
                           flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT,
                           borderValue=(BORDER,) * 3)
        batch["image"] = torch.from_numpy(image)
        return batch


class EpochBatches:
    """Batches of (epoch, index): a permutation for each (seed, epoch), each batch cut evenly over
    the ranks. `batch` is over all ranks; an incomplete last batch is dropped, a set below one batch
    repeated to fill it.   Raises: UserError if it does not divide by the number of processes."""

    def __init__(self, count: int, batch: int, seed: int = 0, rank: int = 0, world: int = 1):
        if batch % world:
            raise UserError(f"--batch-size {batch} does not divide over {world} processes; "
                            "take a multiple")
        self.count = count
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0

    def __len__(self):
        return max(self.count // self.batch, 1)

    def order(self) -> np.ndarray:
        """The epoch's indices, (count,)."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.count)

    def __iter__(self):
        order = np.resize(self.order(), len(self) * self.batch)
        for mine in order.reshape(len(self), self.world, -1)[:, self.rank]:
            yield [(self.epoch, i) for i in mine.tolist()]


def in_order(count: int, batch: int) -> list[list[tuple[int, int]]]:
    """The keys of a whole set once, in order, for evaluation."""
    keys = [(0, i) for i in range(count)]
    return [keys[start:start + batch] for start in range(0, count, batch)]


class DeviceLoader:
    """Batches of a CropDataset whose regions lie on the device: the warp runs there, and nothing is
    decoded. As a DataLoader over the same batches, but image is (B, 3, size, size) float32 in
    0..255 on the device."""

    def __init__(self, dataset: CropDataset, batches, device):
        self.dataset = dataset
        self.batches = batches
        self.device = device
        count = len(dataset.regions)
        side = int(dataset.regions.side.max())  # all as large as the largest
        need = 3 * count * side**2
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        if need > 0.8 * free:
            raise UserError(f"--cache device: {count} crops take {need / 1e9:,.1f} GB, the GPU has "
                            f"{free / 1e9:,.1f} GB free; name a folder instead, or a smaller "
                            "--size")
        self.canvas = torch.full((count, 3, side, side), BORDER, dtype=torch.uint8, device=device)
        for i, n in enumerate(dataset.regions.side):
            region = torch.from_numpy(dataset.regions[i].copy())
            self.canvas[i, :, :n, :n] = region.permute(2, 0, 1)
        dataset.regions.store = None  # the host's copy

    def __iter__(self):
        for keys in self.batches:
            batch, matrix = self.dataset.geometry(keys)
            matrix = matrix.float()
            # Pinned and non_blocking, or each copy could wait for the step that the GPU is at
            if self.device.type == "cuda":
                batch = {name: values.pin_memory() for name, values in batch.items()}
                matrix = matrix.pin_memory()
            region = self.canvas[batch["index"].to(self.device, non_blocking=True)].float()
            matrix = matrix.to(self.device, non_blocking=True)
            size = (self.dataset.size, self.dataset.size)
            batch["image"] = warp.warp_affine(region, matrix, size, border=BORDER)
            yield batch


def make_loader(dataset: CropDataset, batches, workers: int, device, on_device: bool = False):
    """Loader over `batches` (lists of keys): a DataLoader, or a DeviceLoader if the regions lie on
    a GPU."""
    if on_device and device.type != "cpu" and isinstance(dataset, CropDataset):
        return DeviceLoader(dataset, batches, device)
    if workers:  # they are the parallelism; and a fork that finds OpenCV's threads running can hang
        cv2.setNumThreads(1)
    # A generator of its own: by default, the first pass takes the seed of its workers from the
    # run's, so that the dropout of a resumed run would differ.
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                                       collate_fn=dict, persistent_workers=workers > 0,
                                       pin_memory=device.type == "cuda",
                                       generator=torch.Generator())
