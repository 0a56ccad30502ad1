"""Tests of face recognition, as the public sets lie on disk.

A test is a record of index arrays over images ([i] -> RGB uint8 (H, W, 3), common/identities.py):
`VerificationSet` (pairs), `IdentificationSet` (gallery and probes) or `TemplateSet` (pairs of
templates), whose numbers common/metrics.py computes. `read_test` tells by what lies at a path which
it is. Nothing is downloaded: the sets have owners and licences.
"""
import csv
import dataclasses
import functools
import io
import os
import pickle
import pickletools
import re
import warnings
from dataclasses import dataclass
from typing import Callable, Sequence

import numpy as np
import torch

from common import UserError, datasets, metrics
from common.datasets import Face
from common.formats import IMAGE_SUFFIXES, below, text_lines, walk
# Some of these names are only passed on: the scripts say recognition.Records.
from common.identities import (FolderImages, Images, Records, WholeImages, attach_points, cached,
                               check_points, decode, first_line, image_names, natural,
                               read_identities, read_landmarks, refuse_missing,
                               refuse_second_landmarks, sources_of, table)

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


def with_landmarks(test, path: str):
    """The test with the points of a file or folder, which must cover it."""
    points = read_landmarks(test.names, path)
    missing = np.flatnonzero(~np.isfinite(points).all((1, 2)))
    refuse_missing(test.names, missing, f"--landmarks {path}")
    return dataclasses.replace(test, points=points)


def with_checked_images(test, upright: bool = False):
    """The test after `check_images`; with `upright`, JPEGs are turned by their orientation tag."""
    faces = [Face(source) for source in test.images.sources]
    datasets.check_images(faces, upright)
    return dataclasses.replace(test, images=Images(sources_of(faces)))


def _need(reader: Callable, root: str, *parts: str) -> str:
    path = os.path.join(root, *parts)
    if not os.path.exists(path):
        raise datasets.missing(reader, root, f"no {path}", "--test")
    return path


def _rows(lines: list[tuple[str, str]], pattern: str, wanted: str) -> list[tuple]:
    """What the groups of the pattern match in each of `text_lines`; UserError names the line."""
    rows = []
    for where, line in lines:
        match = re.fullmatch(pattern, line)
        if not match:
            raise UserError(f"{where}: found {line!r}, wanted {wanted}")
        rows.append(match.groups())
    return rows


def _listing(folder: str) -> list[str]:
    """Names of the images below a folder, in natural order."""
    names = [os.path.relpath(path, folder) for path in walk(folder)]
    return sorted(names, key=natural)


def _listed_images(names: Sequence[str], base: str, listed: str) -> Images:
    """Images below `base`, after an error that names the first that is not there, or not below."""
    paths = [below(base, name, listed) for name in names]
    missing = [name for name, path in zip(names, paths) if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(f"{listed} names {missing[0]}, which is not in {base}; so for "
                                f"{len(missing)} of {len(names)} images")
    return Images(paths)


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


def _pair_set(name, base, listed, pairs, fold=None, frames=None) -> VerificationSet:
    """The test of pairs (path, path, same), relative to `base`; fold as for `_in_folds`; frames, a
    function from a path to those of its images, where a path is no image but a video."""
    first, second, same = zip(*pairs)
    same = np.array(same)
    order, folds = _in_folds(same, listed, fold)
    templates, place = _distinct([*first, *second])
    images = [frames(path) for path in templates] if frames else [[path] for path in templates]
    names = [name for own in images for name in own]
    template = np.repeat(np.arange(len(templates)), [len(own) for own in images])
    return VerificationSet(name, _listed_images(names, base, listed), template,
                           place.reshape(2, -1).T[order], same[order], np.array(names), folds=folds)


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
    return _plain(value)


def _plain(value):
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
        images, same = (list(_plain(part)) for part in content)
        images = [bytes(memoryview(_plain(image))) for image in images]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is no verification .bin: {error}") from None
    if len(images) != 2 * len(same):
        raise UserError(f"{path}: found {len(images)} images and {len(same)} pairs, wanted two a "
                        "pair")
    same = np.array([bool(value) for value in same], bool)
    order, folds = _in_folds(same, path)
    name = os.path.splitext(os.path.basename(path))[0]
    place = np.arange(len(images))
    images = Images([functools.partial(decode, image, f"{path}, image {i}")
                     for i, image in enumerate(images)])
    return VerificationSet(name, images, place, place.reshape(-1, 2)[order], same[order],
                           place.astype(str), folds=folds)


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
    (where, head), *lines = text_lines(listed) or [(listed, "")]
    folds, half = map(int, head.split()) if re.fullmatch(r"\d+\s+\d+", head) else (0, 0)
    if len(lines) != 2 * folds * half or not lines:
        raise UserError(f"{where}: found {head!r} and {len(lines)} pairs, wanted the number of "
                        "folds, that of pairs of one kind in a fold, and as many pairs")
    pairs = []
    for a, i, b, j in _rows(lines, r"(\S+)\s+(\d+)\s+(?:(\S+)\s+)?(\d+)",
                            "NAME n1 n2 or NAME1 n1 NAME2 n2"):
        b = b or a
        pairs.append((f"{a}/{a}_{int(i):04d}", f"{b}/{b}_{int(j):04d}", a == b))
    suffixes = [s for s in IMAGE_SUFFIXES if os.path.isfile(os.path.join(base, pairs[0][0] + s))]
    suffix = suffixes[0] if suffixes else ".jpg"
    pairs = [(a + suffix, b + suffix, same) for a, b, same in pairs]
    return _pair_set("LFW", base, listed, pairs, np.arange(len(pairs)) // (2 * half))


def read_ytf(root: str) -> VerificationSet:
    """YouTube Faces: 5,000 pairs of videos in 10 folds; a template is a video.

    Tree: splits.txt: lines split, pair, NAME/VIDEO, NAME/VIDEO, 1 or 0; with header, pair or not
          aligned_images_DB/NAME/VIDEO/*.jpg or frame_images_DB/NAME/VIDEO/*.jpg (the whole frames)
    Source: https://www.cs.tau.ac.il/~wolf/ytfaces.
    """
    listed = _need(read_ytf, root, "splits.txt")
    base = os.path.join(root, "frame_images_DB")
    if not os.path.isdir(base):
        base = _need(read_ytf, root, "aligned_images_DB")
    lines = text_lines(listed)
    if lines and not lines[0][1][0].isdecimal():                    # the header
        lines = lines[1:]
    if not lines:
        raise UserError(f"{listed} has no pair")
    comma = r"\s*,\s*"
    rows = _rows(lines, rf"(\d+){comma}(?:\d+{comma})?([^,]+?){comma}([^,]+?){comma}([01])",
                 "split, pair, NAME/VIDEO, NAME/VIDEO, 1 or 0, maybe without pair")

    def frames(place):
        found = _listing(_need(read_ytf, base, place))
        if not found:
            raise datasets.missing(read_ytf, root, f"no image in {os.path.join(base, place)}",
                                   "--test")
        return [f"{place}/{name}" for name in found]

    pairs = [(first, second, same == "1") for _, first, second, same in rows]
    return _pair_set("YTF", base, listed, pairs, [int(row[0]) for row in rows], frames)


def read_cfp(root: str, kind: str = "FP") -> VerificationSet:
    """CFP: 7,000 pairs in 10 folds, of a frontal and a profile image ("FP") or two frontal ones
    ("FF").

    Tree: Protocol/Pair_list_F.txt, Protocol/Pair_list_P.txt: lines number, path below Protocol/
          Protocol/Split/FP/01 ... 10/same.txt and diff.txt (and Split/FF): lines i,j of those lists
          Data/Images/001/frontal/01.jpg, Data/Images/001/profile/01.jpg, ...
    Source: http://www.cfpw.io, Celebrities in Frontal-Profile.
    """
    lists = {}
    for letter in "FP":
        listed = _need(read_cfp, root, "Protocol", f"Pair_list_{letter}.txt")
        rows = _rows(text_lines(listed), r"(\d+)\s+(.+)", "a number and a path")
        lists[letter] = {number: os.path.normpath(f"Protocol/{path}") for number, path in rows}
    pairs = []
    fold = []
    for number in range(1, 11):
        for name in ("same", "diff"):
            split = os.path.join("Split", kind, f"{number:02d}", f"{name}.txt")
            listed = _need(read_cfp, root, "Protocol", split)
            for i, j in _rows(text_lines(listed), r"(\d+)\s*,\s*(\d+)", "i,j"):
                if i not in lists[kind[0]] or j not in lists[kind[1]]:
                    raise UserError(f"{listed}: found '{i},{j}', wanted numbers of "
                                    f"Pair_list_{kind[0]}.txt and Pair_list_{kind[1]}.txt")
                pairs.append((lists[kind[0]][i], lists[kind[1]][j], name == "same"))
                fold.append(number)
    return _pair_set(f"CFP-{kind}", root, os.path.join(root, "Protocol"), pairs, fold)


def read_calfw(root: str, name: str = "CALFW") -> VerificationSet:
    """CALFW (LFW across age) or CPLFW (across pose): 3,000 pairs of the same person, then 3,000 of
    different ones, listed by image. Pair i of either kind belongs to fold i // 300.

    Tree: pairs_CALFW.txt, pairs_CPLFW.txt: two lines FILE LABEL a pair; label 0: different people
          images/*.jpg or aligned images/*.jpg, or the images beside the list
    Source: http://whdeng.cn/CALFW and CPLFW.
    """
    listed = _need(read_calfw, root, f"pairs_{name}.txt")
    rows = _rows(text_lines(listed), r"(.+?)\s+(-?\d+)", "FILE LABEL")
    rows = [(file, int(label) != 0) for file, label in rows]
    same, different = ([(a, b, kind) for (a, kind), (b, other) in zip(rows[::2], rows[1::2])
                        if kind == other == wanted] for wanted in (True, False))
    if not rows or len(same) != len(different) or 4 * len(same) != len(rows):
        raise UserError(f"{listed}: {len(rows)} lines that are not pairs of one label, as many of "
                        "both kinds; wanted two lines a pair")
    pairs = [pair for both in zip(same, different) for pair in both]
    folders = [os.path.join(root, folder) for folder in ("images", "aligned images", "")]
    there = [folder for folder in folders if os.path.isfile(os.path.join(folder, rows[0][0]))]
    return _pair_set(name, there[0] if there else folders[0], listed, pairs)


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
    return _pair_set(path, os.path.dirname(path), path, pairs, None if fold[0] is None else fold)


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

    def __post_init__(self):
        probes = self.role == 1
        mates = self.identity[self.role == 0]
        lost = np.flatnonzero(probes & ~np.isin(self.identity, mates))
        if lost.size:
            raise UserError(f"{self.name}: probe {self.names[lost[0]]} has no mate in the gallery, "
                            f"nor have {lost.size - 1} others; each probe's person needs an image "
                            "there")
        if not probes.any():
            raise UserError(f"{self.name}: there is no probe")


def read_identification(path: str) -> IdentificationSet:
    """A test of your own, or Multi-PIE, as a table. Role skip leaves an image out; a distractor has
    no mate: its id does not count. All gallery images of a person are searched at once (MegaFace
    takes one at a time among its distractors, and the mean over all).

    Tree: NAME.csv: header path,id,role,group; paths relative to it; role gallery, probe, distractor
          or skip; group (may be left out): results are told for each, as |yaw| for Multi-PIE
    Source: you. Multi-PIE is sold by CMU.
    """
    rows = []
    for where, row in _csv_rows(path, "path,id,role"):
        if row["role"] not in (*ROLES[:3], "skip") or not row["path"]:
            raise UserError(f"{where}: found role {row['role']!r} for {row['path']!r}, wanted "
                            f"path,id,role with a role of {', '.join(ROLES[:3])}, skip")
        if row["role"] != "skip":
            rows.append(row)
    names = [os.path.normpath(row["path"]) for row in rows]
    images = _listed_images(names, os.path.dirname(path), path)
    role = np.array([ROLES.index(row["role"]) for row in rows])
    _, identity = _distinct([row["id"] for row in rows])
    identity[role == 2] = -1
    group = np.array([row.get("group", "") for row in rows])
    return IdentificationSet(path, images, identity, role, group, np.array(names))


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
    images = _listed_images(names, root, root)
    return IdentificationSet("TinyFace", images, np.array(identity), np.array(role),
                             np.full(len(names), ""), np.array(names))


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
    ids, media = table(faces, np.int64, 2, usecols=(1, 2)).T
    numbers = table(marks, np.float32, 11, usecols=range(1, 12))
    rows = cached(lambda: table(listed, np.int64, 3).astype(np.int32), listed)
    templates, template = np.unique(ids, return_inverse=True)
    pairs = np.searchsorted(templates, rows[:, :2]).clip(max=len(templates) - 1)
    bad = np.flatnonzero((templates[pairs] != rows[:, :2]).any(1) | (rows[:, 2] >> 1 != 0))
    if bad.size:
        raise UserError(f"{listed}:{bad[0] + 1}: found {rows[bad[0]].tolist()}, wanted two "
                        f"templates of {faces} and 1 or 0")
    if rows[:, 2].all() or not rows[:, 2].any():
        raise UserError(f"{listed} has pairs of one kind only, {rows[0, 2]}; wanted both, 1 and 0")
    crops = _need(read_ijb, base, "loose_crop")
    images = _listed_images(names, crops, faces)
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
    "pairs_CALFW.txt": read_calfw, "Testing_Set": read_tinyface,
    "pairs_CPLFW.txt": functools.partial(read_calfw, name="CPLFW"),
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
        columns = [column.strip() for column in first_line(path).split(",")]
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


def landmarks_beside(path: str) -> str:
    """Where the landmarks of the test at `path` lie, if it has none of its own."""
    return os.path.normpath(path) + ".landmarks.csv"


def read_tests(path: str, upright: bool = False) -> list:
    """The tests that `--test PATH` names, one or, of CFP, frontal-profile and frontal-frontal;
    their images checked, with the points of `landmarks_beside` where there are any."""
    tests = [read_test(path)]
    if os.path.isdir(os.path.join(path, "Protocol", "Split", "FF")):
        tests.append(read_cfp(path, "FF"))
    tests = [with_checked_images(test, upright) for test in tests]
    beside = landmarks_beside(path)
    if os.path.exists(beside):
        tests = [with_landmarks(test, beside) for test in tests]
    return tests


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
                           np.tile([True, False], len(genuine)), np.array(image_names(faces)),
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
    return IdentificationSet("identification", images, images.labels, role,
                             np.full(len(images), ""), np.array(image_names(faces)),
                             _stacked(faces))


# ---- Scores --------------------------------------------------------------------------------------

class Pixels(torch.nn.Module):
    """What needs no learning, to compare a network with: images (B, C, H, W) -> means of their
    pixels in 8 x 8 fields, less the image's own mean, (B, 64 C)."""

    def forward(self, image, *_):
        fields = torch.nn.functional.adaptive_avg_pool2d(image.float(), 8).flatten(1)
        return fields - fields.mean(1, keepdim=True)


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
