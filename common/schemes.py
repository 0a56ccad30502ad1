"""What the points of a face mean: the landmark schemes of the public sets, by number of points; and
what follows: mirrors, named places, curves, and the lengths that errors are divided by.

"left" is image-left, the smaller x.
"""
from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch

from common import UserError


@dataclass(frozen=True, eq=False)
class Scheme:
    """What the P points of a scheme mean: indices, image-left first. A group is for its mean."""
    points: int
    flip: np.ndarray                   # (P,) after x -> W-1-x, points[flip] is in order again
    eyes: tuple[int, int]              # outer eye corners; of 5 points, the eye centres
    pupils: tuple[tuple[int, ...], ...]     # two groups: pupils, or eye centres without any
    five: tuple[tuple[int, ...], ...]       # groups: eye, eye, nose tip, mouth corner, corner
    curves: dict[str, list[int]]       # open curves, in LDDMM-Face's order for 68, 98, 194
    parts: dict[str, list[int]]        # contour, brows, nose, eyes, mouth
    anchors: dict[str, tuple[int, ...]]     # groups: a name is the same place in all schemes


# Flip tables. "s: i j-k": the mirror of each of these i is s - i; "+s: i j-k": it is i + s, and
# back. Points not named are on the midline.
_FLIPS = {
    5: "1: 0 1; 7: 3 4",
    19: "5: 0-5; 17: 6-11; 26: 12 14; 32: 15 17",
    29: "+1: 0 2 8 10 16 18 22; +2: 4 5 12 13",
    68: "16: 0-16; 43: 17-26; 66: 31-35; 81: 36-39 42-45; 87: 40 41 46 47; 102: 48-54; 114: 55-59;"
        "124: 60-64; 132: 65-67",
    98: "32: 0-32; 79: 33-37 42-46; 88: 38-41 47-50; 114: 55-59; 132: 60-64 68-72; 158: 76-82;"
        "140: 65-67 73-75; 170: 83-87; 180: 88-92; 188: 93-95; +1: 96",
    106: "32: 0-32; 79: 33-37 42-46; 88: 38-41 47-50; 120: 55-65; 145: 66-70 75-79; 157: 74 83;"
         "153: 71-73 80-82; 174: 84-90; 186: 91-95; 196: 96-100; 204: 101-103; +1: 104",
    194: "40: 0-40; 98: 41-57; 129: 58-71; 157: 72-85; 186: 86-100; 214: 101-113;"
         "+20: 114-133 154-173"}

# 19 is AFLW without its ear points, 29 COFW, 68 300-W, 98 WFLW (published curves leave out its
# pupils), 106 LaPa (74, 83 eye centres and 104, 105 pupils, in the same places), 194 HELEN in the
# order of its files. There the inner lips are one loop with corners 86 and 100; published curves
# cut it before 100. Published tables call 114-133 and 154-173 the right eye and brow: they are
# image-right. Each of these four loops starts at the inner corner.
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
mouth_center      .    16    25,26  62,66  90,94  98,102  93,107
lip_top           .    .     24     51     79     87      64,65
lip_bottom        .    .     27     57     85     93      78,79
lip_inner*        .    .     .      60     88     96      86
lip_inner_top     .    .     25     62     90     98      93
lip_inner_bottom  .    .     26     66     94     102     107"""
_PARTS = {"contour": ("contour", "chin"), "brows": ("brow",), "nose": ("nose",),
          "eyes": ("eye", "pupil"), "mouth": ("lip", "mouth")}


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
    for entry in _FLIPS[points].split(";"):
        rule, text = entry.split(":")
        ids = np.array(_ids(text))
        mirror = ids + int(rule) if "+" in rule else int(rule) - ids
        flip[ids] = mirror
        flip[mirror] = ids
    anchors = {}
    for name, ids in _column(_ANCHORS, points).items():
        if name.endswith("*"):
            anchors[name[:-1] + "_left"] = tuple(ids)
            anchors[name[:-1] + "_right"] = tuple(flip[ids].tolist())
        else:
            anchors[name] = tuple(ids)
    pupils = (anchors["pupil_left"], anchors["pupil_right"])
    corners = (anchors.get("eye_outer_left", pupils[0]), anchors.get("eye_outer_right", pupils[1]))
    eyes = (corners[0][0], corners[1][0])
    # HELEN's nose is a U without a tip: the middle between the wings is nearest to it.
    nose = anchors.get("nose_tip", (45, 53))
    five = (*pupils, nose, anchors["mouth_left"], anchors["mouth_right"])
    curves = dict(sorted(_column(_CURVES, points).items(), key=lambda curve: min(curve[1])))
    parts = {}
    for part, starts in _PARTS.items():
        parts[part] = sorted(i for name in curves if name.startswith(starts) for i in curves[name])
    return Scheme(points, flip, eyes, pupils, five, curves, parts, anchors)


SCHEMES: dict[int, Scheme] = {points: _scheme(points) for points in _FLIPS}
"""Schemes by number of points. 106 is LaPa's order. Other orders of 106 points exist (SDFL's,
2d106det) and no file says which it has: none is guessed, but `flip_residual` shows a wrong one."""


# Five points in a 112 px crop, to which recognition networks align faces.
# Source: insightface's face_align.
ARCFACE_5 = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366],
                      [41.5493, 92.3655], [70.7299, 92.2041]])


def group_means(points, groups: Sequence[Sequence[int]]):
    """Mean of each group of points, as of `Scheme.five`: (..., P, 2) -> (..., G, 2)."""
    stack = torch.stack if isinstance(points, torch.Tensor) else np.stack
    return stack([points[..., list(group), :].mean(-2) for group in groups], -2)


def flip_residual(points: np.ndarray, flip: np.ndarray) -> float:
    """Largest distance of a point from its mirror in the mean face of (M, P, 2), as a fraction of
    the face box. The right flip (P,) gives below 0.1 on a set that looks both ways, a wrong one 0.6
    or more."""
    points = np.asarray(points, np.float64)
    low = points.min(1, keepdims=True)
    high = points.max(1, keepdims=True)
    mean = ((points - low) / (high - low)).mean(0)  # (P, 2) in the unit box
    return float(np.linalg.norm((mean * [-1, 1] + [1, 0])[flip] - mean, axis=1).max())


def normaliser(points: torch.Tensor, kind: str, boxes: torch.Tensor | None = None) -> torch.Tensor:
    """The length that the error of each face is divided by: (M, P, 2) ground truth px -> (M,) px.

    kind: "io" inter-ocular, of `Scheme.eyes`; "io-published" LDDMM-Face's for 194
        points, beside the corners, 1.5 % shorter; "ip" inter-pupil, of `Scheme.pupils`; "box"
        sqrt(w h) of the box of the points; "face" sqrt(w h) of `boxes`, the set's own (M, 4) x0 y0
        x1 y1 px. io is about 1.4 times ip: errors under different kinds must not be compared.
    Raises: UserError if the scheme has no such length (5 points have no "io"), or one is not > 0.
    """
    points = torch.as_tensor(points)
    scheme = SCHEMES.get(points.shape[-2])
    pairs = {}
    if scheme:
        pairs["ip"] = scheme.pupils
        if "eye_outer_left" in scheme.anchors:
            pairs["io"] = [[index] for index in scheme.eyes]
        if scheme.points == 194:
            pairs["io-published"] = [[145], [125]]
    if kind in pairs:
        ends = group_means(points, pairs[kind])  # (M, 2, 2)
        length = (ends[:, 0] - ends[:, 1]).norm(dim=-1)
    elif kind == "box":
        length = (points.amax(1) - points.amin(1)).prod(-1).sqrt()
    elif kind == "face" and boxes is not None:
        boxes = torch.as_tensor(boxes).to(points)
        length = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1).sqrt()
    else:
        works = ", ".join([*pairs, "box", "face (with the set's boxes)"])
        raise UserError(f"no normaliser {kind!r} for {points.shape[-2]} points; "
                        f"what works: {works}")
    bad = (~(length > 0)).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"normaliser {kind!r} is {length[bad[0]]:g} px for face {bad[0]}, wanted "
                        f"more than 0; so for {len(bad)} of {len(length)} faces")
    return length


def norm_kind(kind: str, points: int, boxed: bool = True) -> str:
    """What "auto" means for so many points: the papers' normaliser of the set that has them; "box"
    without a scheme, or for AFLW's 19 (profiles have hardly any eye distance) without boxes."""
    if kind != "auto":
        return kind
    if points == 19 and boxed:
        return "face"
    if points == 19 or points not in SCHEMES:
        return "box"
    return "ip" if points == 5 else "io"
