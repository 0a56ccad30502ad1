"""Gait: silhouettes of people who walk, with 17 joints each: Gait3D's files, and drawn walkers.

A `Sequence` says where the frames of one walk come from; a silhouette is uint8 (64, 44), 255 where
the person is, as tall as the person and centred at the median of its mass; its joints are px of
that crop, pixel centres at whole numbers from 0, as in common/datasets.py. Joints outside the crop
are legal. A joint that is not seen in a frame stands where it was seen last (`fill_missing`).
"""
import functools
import glob
import json
import os
from typing import Callable, NamedTuple

import cv2
import numpy as np
import torch

from common import UserError, datasets, identities, metrics, recognition

JOINTS = 17
"""COCO's order: nose, then left and right (of the person) of eye, ear, shoulder, elbow, wrist, hip,
knee, ankle."""
FLIP_17 = np.array([0, *(i + 1 if i % 2 else i - 1 for i in range(1, JOINTS))])
SIDES = (64, 44)
"""Height and width of a silhouette, px. Of Gait3D's, packed as 64 x 64, 10 columns are cut at each
side."""
MOST = 720                                               # frames of a test sequence, as in OpenGait


class Sequence(NamedTuple):
    """One walk. `load(pick)` gives (n, 64, 44) uint8 and joints (n, 17, 2) float32 px of the frames
    that pick(their total number) names, an index array."""
    identity: str
    name: str                                                   # as "0002-camid33_videoid2-seq0"
    load: Callable[[Callable[[int], np.ndarray]], tuple[np.ndarray, np.ndarray]]
    probe: bool = False                                  # searched with; the others are the gallery


# ---- Gait3D --------------------------------------------------------------------------------------

def normalise(image: np.ndarray):
    """A silhouette as OpenGait packs them: cut at its first and last row, scaled to 64 rows,
    centred at the column that holds the median of its mass; here also cut to 44 columns.
    Args: image (H, W) uint8.   Returns: (64, 44) uint8; float64 (2, 2), scale and offset: x y of
    the crop = scale * x y of the image + offset. None for a pixel sum of 10000 or less."""
    if cv2.sumElems(image)[0] <= 10000:
        return None
    height, width = SIDES
    rows = np.flatnonzero(image.any(1))
    top = rows[0]
    tall = rows[-1] + 1 - top
    wide = image.shape[1]
    columns = max(int(height * wide / tall), 1)
    image = cv2.resize(image[top:top + tall], (columns, height), interpolation=cv2.INTER_CUBIC)
    mass = image.sum(0, dtype=np.int64).cumsum()
    centre = int((mass > mass[-1] / 2).argmax())
    image = cv2.copyMakeBorder(image, 0, 0, width // 2, width // 2, cv2.BORDER_CONSTANT, value=0)
    scale = np.array([columns / wide, height / tall])  # centres: s (x + 1/2) - 1/2, less the corner
    offset = scale / 2 - 0.5 - [centre - width // 2, scale[1] * top]
    return image[:, centre:centre + width], np.stack([scale, offset])


def fit_joints(joints: np.ndarray) -> np.ndarray:
    """Joints (T, 17, 3), x y score, in px of a frame that is not at hand -> px of the crop.
    Assumed, as neither paper nor code says how: the highest joint seen (an eye or ear) belongs to
    row 4, the lowest (an ankle) to row 60, the mean of shoulders and hips to the middle column. A
    frame where fewer than two heights are seen gets score 0."""
    xy = joints[..., :2].astype(np.float64)
    seen = joints[..., 2] > 0
    top = np.where(seen, xy[..., 1], np.inf).min(1)
    bottom = np.where(seen, xy[..., 1], -np.inf).max(1)
    known = bottom > top
    weight = seen * np.where(np.isin(np.arange(JOINTS), (5, 6, 11, 12)), 1, 1e-6)          # (T, 17)
    middle = (weight * xy[..., 0]).sum(1) / np.maximum(weight.sum(1), 1e-9)
    scale = 56 / np.where(known, bottom - top, 1)
    corner = np.stack([middle, np.where(known, top, 0)], 1)                                 # (T, 2)
    xy = (xy - corner[:, None]) * scale[:, None, None] + [SIDES[1] / 2 - 0.5, 4]
    return np.concatenate([xy, joints[..., 2:] * known[:, None, None]], -1)


def fill_missing(joints: np.ndarray) -> np.ndarray:
    """Joints (T, 17, 3) px of the crop -> (T, 17, 2) float32. A joint of score 0 stands where it
    was seen last, before that where it is first seen; one that is never seen, at the middle."""
    seen = joints[..., 2] > 0
    time = np.arange(len(joints))[:, None]
    last = np.maximum.accumulate(np.where(seen, time, -1))                                 # (T, 17)
    last = np.where(last < 0, seen.argmax(0), last)
    filled = np.take_along_axis(joints[..., :2], last[..., None], 0)
    middle = np.array(SIDES[::-1]) / 2 - 0.5
    return np.where(seen.any(0)[:, None], filled, middle).astype(np.float32)


def _files(folder: str, suffix: str) -> dict[str, str]:
    """Name -> path of the frames in a sequence's folder, in order; {"": path} of its .pkl."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = {name[:-4]: os.path.join(folder, name) for name in names
             if name.lower().endswith(suffix) and not name.startswith(".")}             # ._x: macOS
    packed = os.path.join(folder, os.path.basename(folder) + ".pkl")
    return found or ({"": packed} if os.path.isfile(packed) else {})


def _packed(path: str, kinds: tuple, *shapes: tuple) -> np.ndarray:
    """The array of a .pkl, (T, *one of `shapes`)."""
    array = recognition.unpickle(path, "packed sequence", kinds)
    if not isinstance(array, np.ndarray) or not len(array) or array.shape[1:] not in shapes:
        found = getattr(array, "shape", type(array).__name__)
        raise UserError(f"{path}: found {found}, wanted frames of {shapes[0]}, one or more")
    return array


def _texts(marks: dict[str, str]) -> dict[str, np.ndarray]:
    """Name -> (17, 3) x y score of the frames' texts."""
    joints = {}
    for name, path in marks.items():
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            fields = file.read().split(",")
        values = datasets.numbers(fields[2:], 3 * JOINTS, f"{path}, after the first two")
        joints[name] = values.reshape(JOINTS, 3)
    return joints


def _frames(silhouettes: str, poses: str) -> np.ndarray:
    """One sequence of Gait3D: (T, 64 * 44 + 17 * 2 * 4) uint8, silhouettes and joints (float32)."""
    images = _files(silhouettes, ".png")
    marks = _files(poses, ".txt")
    if "" in images:
        crops = _packed(images[""], ("u1",), (64, 64), SIDES)
    else:
        crops = [datasets.load_image(path)[..., 0] for path in images.values()]
    if "" in marks:
        joints = _packed(marks[""], ("f8", "f4"), (JOINTS, 3))
    else:
        texts = _texts(marks)
        if set(images) & set(texts):                    # a frame without text has no joints
            joints = np.stack([texts.get(name, np.zeros((JOINTS, 3))) for name in images])
        else:
            joints = np.stack(list(texts.values()))
    bad = int((~np.isfinite(joints)).any((1, 2)).sum())
    if len(joints) != len(crops) or bad:
        raise UserError(f"{silhouettes} has {len(crops)} frames, {poses} {len(joints)}, {bad} of "
                        "them with nan or inf; wanted as many of both. Packing drops frames: .png "
                        "and .txt have all")
    if "" in images:
        cut = (crops.shape[2] - SIDES[1]) // 2
        crops = crops[:, :, cut:cut + SIDES[1]]
        joints = fit_joints(joints)
    else:
        crops, joints = _normalised(crops, joints, silhouettes)
    joints = fill_missing(joints).reshape(len(crops), -1).astype("<f4").view(np.uint8)
    return np.concatenate([crops.reshape(len(crops), -1), joints], 1)


def _normalised(images: list[np.ndarray], joints: np.ndarray, where: str):
    """Single images as `normalise` crops them, less the empty ones, and their joints, likewise px
    of the crop; joints that mostly lie outside the images are px of the video's frame."""
    size = np.array([image.shape[1::-1] for image in images])[:, None]
    seen = joints[..., 2] > 0
    inside = ((joints[..., :2] >= 0) & (joints[..., :2] < size)).all(-1)[seen]
    done = [normalise(image) for image in images]
    kept = [i for i, crop in enumerate(done) if crop is not None]
    if not kept:
        raise UserError(f"{where}: all {len(images)} silhouettes are empty")
    crops = np.stack([done[i][0] for i in kept])
    maps = np.stack([done[i][1] for i in kept])                                          # (n, 2, 2)
    joints = joints[kept]
    if 2 * inside.sum() < inside.size:
        return crops, fit_joints(joints)
    joints[..., :2] = joints[..., :2] * maps[:, :1] + maps[:, 1:]
    return crops, joints


def _load(silhouettes: str, poses: str, pick: Callable) -> tuple[np.ndarray, np.ndarray]:
    """`Sequence.load` of Gait3D. What is made of many files is kept beside the silhouettes."""
    make = functools.partial(_frames, silhouettes, poses)
    images = _files(silhouettes, ".png")
    texts = _files(poses, ".txt")
    sources = images.get("", silhouettes), *images.values(), *texts.values()
    rows = make() if "" in images and "" in texts else identities.cached(make, *sources)
    rows = rows[pick(len(rows))]
    cut = SIDES[0] * SIDES[1]
    joints = rows[:, cut:].copy().view("<f4").reshape(-1, JOINTS, 2)
    return rows[:, :cut].reshape(-1, *SIDES), joints


def read_gait3d(root: str, split: str) -> list[Sequence]:
    """The sequences of "train" or "test". Of "test", those of PROBE_SET are probes, the others the
    gallery.

    The joints of single images are px of their image and go through the same map as it; if most
    lie outside it they are px of the video's frame, and then, as with packed silhouettes,
    `fit_joints` places them. What is made of many files is kept as 2D_Silhouettes/.../SEQ.npy or
    SEQ/SEQ.pkl.npy, where the folder can be written.

    Tree: Gait3D.json, OpenGait's split: TRAIN_SET, TEST_SET: people; PROBE_SET: ID-CAM_VIDEO-SEQ
          2D_Silhouettes/0000/camid0_videoid2/seq0/*.png; or in it seq0.pkl, as OpenGait packs
              them, pickled uint8 (T, 64, 64)
          2D_Poses/0000/camid0_videoid2/seq0/*.txt of the names of the images (of packed
              silhouettes: as many, in their order): a line of two values, not used, then 17 times
              x, y, score, separated by commas; or in it seq0.pkl, pickled float (T, 17, 3)
    Source: Gait3D, gait3d.github.io, by a signed agreement; Gait3D.json from OpenGait.
    Raises: FileNotFoundError; UserError, also when a sequence is loaded.
    """
    need = functools.partial(datasets.missing, read_gait3d, root, drawn="walkers")
    listed = os.path.join(root, "Gait3D.json")
    bases = [os.path.join(root, name) for name in ("2D_Silhouettes", "2D_Poses")]
    for path in (listed, *bases):
        if not os.path.exists(path):
            raise need(f"no {path}")
    try:
        with open(listed, encoding="utf-8-sig") as file:
            sets = json.load(file)
        people = set(map(str, sets[f"{split}_SET".upper()]))
        probes = set(map(str, sets["PROBE_SET"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{listed}: {error!r}; wanted lists TRAIN_SET, TEST_SET and "
                        "PROBE_SET") from None
    places = glob.glob(os.path.join("*", "*", "*", ""), root_dir=bases[0])
    sequences = []
    for place in sorted(os.path.normpath(place) for place in places):
        if place.split(os.sep)[0] not in people:
            continue
        folders = [os.path.join(base, place) for base in bases]
        for folder, suffix in zip(folders, (".png", ".txt")):
            if not _files(folder, suffix):
                raise need(f"no *{suffix} and no {os.path.basename(folder)}.pkl in {folder}")
        name = place.replace(os.sep, "-")
        load = functools.partial(_load, *folders)
        sequences.append(Sequence(place.split(os.sep)[0], name, load, name in probes))
    lost = people - {sequence.identity for sequence in sequences}
    if split == "test" and not lost:
        lost = probes - {sequence.name for sequence in sequences}
    if lost or not sequences:
        raise need(f"no sequence of {min(lost, default=split)}, the first of {len(lost)} that "
                   f"{listed} names")
    return sequences


# ---- Drawn walkers -------------------------------------------------------------------------------

# Body height 1, angles in radians. Identity: mean and deviation of each number, cut at two.
PERSON = {
    "leg": (.52, .02), "thigh": (.52, .015), "torso": (.3, .015), "neck": (.115, .01),
    "head": (.066, .005), "shoulder": (.115, .012), "hip": (.07, .008), "arm": (.33, .015),
    "upper": (.53, .015), "build": (1, .12), "step": (.42, .06), "knee": (.95, .15),
    "bend": (.12, .05), "cadence": (.072, .006), "swing": (.42, .13), "elbow": (.3, .15),
    "spread": (.1, .05), "stoop": (.06, .06), "nod": (.15, .12), "twist": (.12, .06),
    "lag": (0, .25), "limp": (0, .12), "sway": (.012, .008)}
# Bones by thickness (body heights): pairs of the points of `_body`.
BONES = ((.085, ((11, 13), (12, 14))), (.06, ((13, 15), (14, 16))), (.04, ((15, 17), (16, 18))),
         (.05, ((5, 7), (6, 8))), (.042, ((7, 9), (8, 10))), (.05, ((19, 20),)))
TALL, CANVAS = 104, 128                                   # px of a body, and of what it is drawn on


def _body(p: dict, phase: np.ndarray) -> np.ndarray:
    """Points of a walker `p` at phases (T,) of the stride: (T, 21, 3), forward, to the left, up.
    Joints, left and right toe, middle of the shoulders, middle of the head."""
    side = np.array([1, -1])
    leg = np.stack([phase, phase + np.pi], 1)                                               # (T, 2)

    def along(length, angle):                                   # from hanging down, forward
        return length * np.stack([np.sin(angle), 0 * angle, -np.cos(angle)], -1)

    def across(half, turn):                                 # left and right end of a bar that turns
        turn = np.broadcast_to(turn[:, None], leg.shape)
        return half * side[:, None] * np.stack([-np.sin(turn), np.cos(turn), 0 * turn], -1)

    height = p["leg"] + 0.012 * np.cos(2 * phase)
    pelvis = np.stack([0 * phase, p["sway"] * np.sin(phase), height], -1)
    hips = pelvis[:, None] + across(p["hip"], -0.5 * p["twist"] * np.cos(phase))         # (T, 2, 3)
    lean = np.array([np.sin(p["stoop"]), 0, np.cos(p["stoop"])])
    chest = pelvis + p["torso"] * lean
    shoulders = chest[:, None] + across(p["shoulder"], p["twist"] * np.cos(phase))
    thigh = (p["step"] + 0.5 * p["limp"] * side) * np.cos(leg) + 0.08
    shin = thigh - p["bend"] - p["knee"] * ((1 - np.sin(leg + 0.3)) / 2) ** 3
    knees = hips + along(p["leg"] * p["thigh"], thigh)
    ankles = knees + along(p["leg"] * (0.93 - p["thigh"]), shin)
    toes = ankles + along(0.11, shin * 0.7 + 1.4)
    arm = -p["swing"] * np.cos(leg + p["lag"]) + 0.05 + p["stoop"]
    elbows = shoulders + along(p["arm"] * p["upper"], arm)
    elbows[..., 1] += side * p["arm"] * np.sin(p["spread"])
    fore = arm + p["elbow"] * (1 + 0.5 * np.sin(arm))
    wrists = elbows + along(p["arm"] * (1 - p["upper"]), fore)
    nod = p["stoop"] + p["nod"]
    head = chest + p["neck"] * np.array([np.sin(nod), 0, np.cos(nod)]) + [0, 0, 0.3 * p["head"]]
    face = p["head"] * np.array([(.95, 0, -.1), (.8, .35, .15), (.8, -.35, .15), (0, .9, 0),
                                 (0, -.9, 0)])
    return np.concatenate([head[:, None] + face, shoulders, elbows, wrists, hips, knees, ankles,
                           toes, chest[:, None], head[:, None]], 1)


def _draw(points: np.ndarray, p: dict, cloth: float) -> np.ndarray:
    """Silhouette of points (21, 2) px: (128, 128) uint8."""
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    fixed = np.rint(16 * points).astype(np.int32)               # cv2's shift=4: sixteenths of a px
    trunk = fixed[[5, 6, 12, 11]]
    px = TALL * p["build"] * cloth                              # of a thickness in body heights
    cv2.fillConvexPoly(canvas, cv2.convexHull(trunk), 255, cv2.LINE_AA, 4)
    cv2.polylines(canvas, [trunk], True, 255, round(0.1 * px), cv2.LINE_AA, 4)
    for thick, pairs in BONES:
        bones = list(fixed[np.array(pairs)])
        cv2.polylines(canvas, bones, False, 255, round(thick * px), cv2.LINE_AA, 4)
    size = 16 * TALL * p["head"]
    axes = round(0.95 * size), round(1.2 * size)
    cv2.ellipse(canvas, fixed[20].tolist(), axes, 0, 0, 360, 255, -1, cv2.LINE_AA, 4)
    return canvas


def _walk(split: str, seed: int, person: int, number: int, frames: int, pick: Callable):
    """`Sequence.load` of a drawn walker."""
    key = (seed, ("train", "test").index(split), person)
    normal = np.random.default_rng((*key, 0)).standard_normal(len(PERSON)).clip(-2, 2)
    p = {name: mean + spread * x for (name, (mean, spread)), x in zip(PERSON.items(), normal)}
    rng = np.random.default_rng((*key, number + 1))
    time = pick(frames)
    phase, yaw, pitch, cloth, rough = rng.uniform((0, -0.6, 0, 0.85, 10),
                                                  (2 * np.pi, 0.6, 0.3, 1.25, 50))
    pace, turn = rng.normal((1, 0), 0.05).clip((0.9, -0.1), (1.1, 0.1))
    p["step"] *= pace
    yaw = yaw + turn * np.linspace(-1, 1, frames)[time]         # the walk bends a little
    forward, left, up = _body(p, phase + 2 * np.pi * p["cadence"] * pace * time).transpose(2, 1, 0)
    right = forward * np.cos(yaw) + left * np.sin(yaw)
    near = forward * np.sin(yaw) - left * np.cos(yaw)
    up = up * np.cos(pitch) - near * np.sin(pitch)             # a camera that looks down by `pitch`
    points = np.stack([CANVAS / 2 + TALL * right, 0.9 * CANVAS - TALL * up], -1).transpose(1, 0, 2)
    noise = rough * rng.standard_normal((frames, 12, 12), np.float32).clip(-2, 2)[time]
    crops = []
    maps = []
    for place, edge in zip(points, noise):
        soft = cv2.GaussianBlur(_draw(place, p, cloth), (5, 5), 0).astype(np.float32)
        mask = soft + cv2.resize(edge, (CANVAS, CANVAS), interpolation=cv2.INTER_CUBIC) > 127
        crop, to_crop = normalise(mask.astype(np.uint8) * 255)
        crops.append(crop)
        maps.append(to_crop)
    maps = np.stack(maps)                                                                # (n, 2, 2)
    return np.stack(crops), (points[:, :JOINTS] * maps[:, :1] + maps[:, 1:]).astype(np.float32)


def walkers(split: str, people: int, seed: int = 0, sequences: int = 6,
            frames: int = 40) -> list[Sequence]:
    """Drawn walkers, the set without a download: a body of 17 joints in 3-D that walks, seen from
    the side, up to 35 degrees off.

    Identity is in the lengths of limbs and trunk, build, step, cadence, arm swing, stoop, limp ...;
    phase, view, pace, clothes and the rough edge of the silhouette change with the sequence. Joints
    are exact. A sequence is a function of (seed, split, person, number) alone; the splits share
    nobody. The first of each person's is the probe of "test". `spoil` gives the same, badly
    aligned. Of 60 probes among 300 sequences the nearest mean silhouette finds 69 % (65 to 75 over
    three seeds), spoiled by 4 px and 0.15 7 %.
    Args: split "train" or "test"; people, sequences of each, frames of each: 14 or so make a
        stride.
    Raises: UserError for another split, or a number below 1."""
    if split not in ("train", "test") or min(people, sequences, frames) < 1:
        raise UserError(f"split {split!r}, {people} people, {sequences} sequences, {frames} "
                         "frames; wanted train or test, and 1 or more of each")
    walks = []
    for i in range(people):
        person = f"{split}-{i:05d}"
        for n in range(sequences):
            load = functools.partial(_walk, split, seed, i, n, frames)
            walks.append(Sequence(person, f"{person}-seq{n}", load, split == "test" and n == 0))
    return walks


def _spoiled(load: Callable, matrix: np.ndarray, pick: Callable):
    crops, joints = load(pick)
    crops = [cv2.warpAffine(crop, matrix, SIDES[::-1], flags=cv2.INTER_LINEAR) for crop in crops]
    return np.stack(crops), (joints @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32)


def spoil(sequences: list[Sequence], shift: float, zoom: float, seed: int = 0) -> list[Sequence]:
    """The sequences as a bad alignment leaves them: each one, silhouettes and joints alike, scaled
    about the middle by 1 - zoom to 1 + zoom, and moved by up to `shift` px each way; uniform."""
    drawn = np.random.default_rng(seed).uniform(-1, 1, (len(sequences), 3))
    middle = np.array(SIDES[::-1]) / 2 - 0.5
    out = []
    for sequence, (z, *move) in zip(sequences, drawn):
        scale = 1 + zoom * z
        offset = middle - scale * middle + shift * np.array(move)
        matrix = np.column_stack([scale * np.eye(2), offset])
        out.append(sequence._replace(load=functools.partial(_spoiled, sequence.load, matrix)))
    return out


# ---- Training and scores -------------------------------------------------------------------------

def ordered(total: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Indices (frames,) of a training clip, OpenGait's "fixed ordered": of a stretch of consecutive
    frames somewhere in the sequence, some that are left in their order. The stretch is longer than
    the clip by a third (assumed; OpenGait sets it by data set). Too short a sequence repeats."""
    stretch = frames + frames // 3
    whole = np.tile(np.arange(total), -(-stretch // total))
    start = rng.integers(len(whole) - stretch + 1)
    return whole[start + np.sort(rng.permutation(stretch)[:frames])]


class GaitDataset(torch.utils.data.Dataset):
    """Clips as batches, for `datasets.make_loader`: keys (epoch, i); a clip is a pure function of
    (seed, epoch, i). .labels (S,) int64, 0..C-1 in the order of .ids (C,); .probe (S,) bool.

    Args: sequences; frames of a clip, or None: the whole sequence, 720 frames at most, one in a
        batch; augment: half of the clips are mirrored, with left and right joints swapped.
    A batch: image (B, T, 64, 44) uint8; points (B, T, 17, 2) float32, (x + 0.5) / 44 and
    (y + 0.5) / 64, so that [0, 1] is the crop, cut at [-2, 3]; index (B,)."""

    def __init__(self, sequences: list[Sequence], frames: int | None, seed: int = 0,
                 augment: bool = False):
        self.sequences = sequences
        self.frames = frames
        self.seed = seed
        self.augment = augment
        self.ids, self.labels = np.unique([s.identity for s in sequences], return_inverse=True)
        self.probe = np.array([s.probe for s in sequences])

    def __len__(self):
        return len(self.sequences)

    def __getitems__(self, keys) -> dict:
        images = []
        points = []
        for epoch, i in keys:
            rng = np.random.default_rng((self.seed, epoch, i))
            image, joints = self.sequences[i].load(functools.partial(self._pick, rng=rng))
            # The joints of a sliver of a person lie far out.
            joints = ((joints + 0.5) / SIDES[::-1]).clip(-2, 3)
            if self.augment and rng.random() < 0.5:
                image = image[:, :, ::-1]
                joints = joints[:, FLIP_17] * [-1, 1] + [1, 0]
            images.append(image)
            points.append(joints.astype(np.float32))
        return {"image": torch.from_numpy(np.stack(images)),
                "points": torch.from_numpy(np.stack(points)),
                "index": torch.tensor([i for _, i in keys])}

    def _pick(self, total: int, rng: np.random.Generator) -> np.ndarray:
        if self.frames is None:
            return np.arange(min(total, MOST))
        return ordered(total, self.frames, rng)


class PeopleBatches(datasets.EpochBatches):
    """Batches of `people` people with `each` sequences, for a triplet loss: everybody once an
    epoch, with sequences drawn without repetition while there are enough. A rank has its share of
    the people.
    Args: labels (S,) 0..C-1; people over all ranks. Of less than `people`, some are taken more than
        once.
    Raises: UserError when the people do not divide by the number of processes."""

    def __init__(self, labels: np.ndarray, people: int, each: int, seed: int = 0, rank: int = 0,
                 world: int = 1):
        super().__init__(int(labels.max()) + 1, people, seed, rank, world)
        self.labels = labels
        self.each = each

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch, 1))
        mixed = np.lexsort((rng.random(len(self.labels)), self.labels))  # by person, in a new order
        count = np.bincount(self.labels)
        for keys in super().__iter__():
            who = np.array([person for _, person in keys])[:, None]
            place = (count.cumsum() - count)[who] + np.arange(self.each) % count[who]       # (P, K)
            yield [(self.epoch, i) for i in mixed[place].ravel().tolist()]


def mated(labels: np.ndarray, probe: np.ndarray) -> np.ndarray:
    """Which probes (Q,) have a mate, of labels (S,) and probe (S,) bool; UserError if none has."""
    found = np.isin(labels[probe], labels[~probe])
    if not found.any():
        raise UserError(f"none of {probe.sum()} probes has a mate among {(~probe).sum()} others")
    return found


def identify(distance, labels: np.ndarray, probe: np.ndarray) -> dict[str, float]:
    """rank1, rank5, rank10 (share of probes with a mate among the k nearest), map and minp. No row
    is left out by camera; probes without a mate are skipped.
    Args: distance (Q, G), from each of the Q probes to each of the G others, both in the order of
        the sequences; labels (Q + G,) integers and probe (Q + G,) bool, of all sequences.
    Raises: UserError if no probe has a mate."""
    found = mated(labels, probe)
    distance = torch.as_tensor(distance)
    distance = distance[torch.from_numpy(found).to(distance.device)]
    return metrics.retrieval(distance, labels[probe][found], labels[~probe])
