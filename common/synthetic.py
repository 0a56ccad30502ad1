"""Drawn faces: landmarks and identities without a download, with exact ground truth in every
scheme.

A head is a stack of elliptic sections with a relief (nose, sockets, lips, chin) on its front, and
features are smooth curves on it. A weak-perspective camera sees it turned by yaw, pitch and roll. A
point that has turned out of sight stands on the visible outline at its height, where the annotators
of 300-W and WFLW put it. The pixels are painted from the same curves. Unusual conditions are tagged
with the names of WFLW's subsets.

Face i of a split is a function of (seed, split, i) alone: the same points on every machine, the
same pixels on one installation. Faces with the same i // per_identity share shape and look; the
splits share nobody. Head frame: x to image-right, y down from the eyes, z to the camera; unit: half
the width of a mean face.
"""

import functools
from types import SimpleNamespace
from typing import Sequence

import cv2
import numpy as np

from common import UserError
from common.datasets import Face

SPLITS = {"train": 0, "test": 1}
TAGS = {"pose": .18, "expression": .16, "illumination": .2, "makeup": .1, "occlusion": .26,
        "blur": .22}
# Identity: mean and standard deviation of each shape number, cut at two deviations (jaw_p and jaw_q
# are the exponents of the jaw's curve); LOOK, uniform numbers.
SHAPE = {"cheek": (1, .045), "chin": (1.66, .09), "crown": (1.42, .06), "depth": (.68, .05),
         "jaw_p": (2.3, .25), "jaw_q": (2, .2), "hairline": (-.93, .06), "eye_x": (.43, .018),
         "eye_w": (.195, .012), "eye_h": (.095, .012), "slant": (.02, .018), "brow_y": (-.31, .035),
         "brow_arch": (.075, .03), "brow_thick": (.085, .02), "nose_y": (.56, .045),
         "nose_w": (.225, .022), "nose_z": (.48, .055), "bridge_z": (.17, .03),
         "mouth_y": (1.03, .035), "mouth_w": (.37, .035), "lip_upper": (.1, .022),
         "lip_lower": (.125, .025)}
LOOK = "skin red hair iris style beard lips specs volume".split()
# One face: normal numbers; uniform numbers.
NORMAL = "open smile lids brows frown skew gaze_x gaze_y yaw pitch roll light_x light_y".split()
UNIFORM = [*TAGS, "turn", "act", "much", "lit", "hue", "cover", "soft", "noise", "jpeg", "fill",
           "tone", "at_x", "at_y", "box_x", "box_y", "box_size"]
# Of faces that differ in geometry: these draws are weaker or stronger, the others halved.
GEOMETRY = {"yaw": 0.3, "pitch": 0.3, "roll": 3.0}
# Strong expressions (shout, laugh, eyes shut, scowl) in the first five of NORMAL.
ACTS = np.array([(.8, -.2, 1.25, .05, .1), (.35, .9, .65, .03, 0),
                 (.05, .2, .06, -.02, .2), (0, -.5, .7, -.06, .9)])
SKIN = np.array([(250, 220, 202), (236, 194, 164), (212, 164, 130), (160, 114, 84), (98, 66, 50)])
HAIR = np.array([(26, 22, 22), (60, 42, 32), (110, 76, 50), (200, 164, 106), (146, 70, 40),
                 (150, 148, 145)])
IRIS = np.array([(52, 32, 22), (84, 52, 30), (112, 84, 44), (96, 116, 70), (84, 124, 160),
                 (120, 130, 140)])


# ---- Curves and landmark schemes -----------------------------------------------------------------

def _plan(text: str) -> list[tuple]:
    """[(curve, side, edge, s)] from "curve,curve first last n; ..." with s = first/n, ..., last/n.

    A curve ending in - (image-left, side -1) or + (image-right) is one of a pair and runs from its
    outer end in; others run from image-left to image-right or from top to bottom. _upper (edge -1),
    _lower: its edges.
    """
    plan = []
    for entry in text.split(";"):
        names, first, last, n = entry.split()
        first, last = int(first), int(last)
        s = np.linspace(first, last, abs(last - first) + 1) / int(n)
        for name in names.split(","):
            side = {"-": -1, "+": 1}.get(name[-1], 0)
            edge = ("_lower" in name) - ("_upper" in name)
            plan.append((name.split("_")[0].rstrip("-+"), side, edge, s))
    return plan


_PUPILS = "pupil-,pupil+ 0 0 1"
_BROWS = "brow_upper- 0 4 4; brow_lower- 4 1 4; brow_upper+ 4 0 4; brow_lower+ 1 4 4"
_LEFT_EYE = "eye_upper- 0 4 4; eye_lower- 3 1 4"
_RIGHT_EYE = "eye_upper+ 4 0 4; eye_lower+ 1 3 4"
_MOUTH = "lip_upper 0 6 6; lip_lower 5 1 6; inner_upper 0 4 4; inner_lower 3 1 4"
# 106 in LaPa's order; 194 as in HELEN's files: eyes and brows from the inner end over the top.
_PLANS = {
    5: f"{_PUPILS}; bridge 1 1 1; lip 0 1 1",
    19: "brow- 0 2 2; brow+ 2 0 2; eye- 0 2 2; eye+ 2 0 2; nose 1 1 4; bridge 1 1 1; nose 3 3 4;"
        "lip 0 2 2; contour 1 1 2",
    29: "brow-,brow+ 0 0 1; brow-,brow+ 1 1 1;"
        "brow_upper-,brow_lower-,brow_upper+,brow_lower+ 1 1 2; eye-,eye+ 0 0 1; eye-,eye+ 1 1 1;"
        f"eye_upper-,eye_lower-,eye_upper+,eye_lower+ 1 1 2; {_PUPILS}; nose 1 1 4; nose 3 3 4;"
        "bridge 1 1 1; nose 1 1 2; lip 0 1 1;"
        "lip_upper,inner_upper,inner_lower,lip_lower,contour 1 1 2",
    68: "contour 0 16 16; brow- 0 4 4; brow+ 4 0 4; bridge 0 3 3; nose 3 7 10; eye_upper- 0 3 3;"
        f"eye_lower- 2 1 3; eye_upper+ 3 0 3; eye_lower+ 1 2 3; {_MOUTH}",
    98: f"contour 0 32 32; {_BROWS}; bridge 0 3 3; nose 3 7 10; {_LEFT_EYE}; {_RIGHT_EYE};"
        f"{_MOUTH}; {_PUPILS}",
    106: f"contour 0 32 32; {_BROWS}; bridge 0 3 3; nose 0 10 10; {_LEFT_EYE}; eye- 1 1 2;"
         f"{_RIGHT_EYE}; eye+ 1 1 2; {_MOUTH}; {_PUPILS}",
    194: "contour 5 45 50; nose 0 16 16; lip_upper 0 13 13; lip_lower 14 1 15;"
         "inner_upper 0 13 14; inner_lower 14 1 14;"
         "eye_upper+ 10 0 10; eye_lower+ 1 9 10; eye_upper- 10 0 10; eye_lower- 1 9 10;"
         "brow_upper+ 10 0 10; brow_lower+ 1 9 9; brow_upper- 10 0 10; brow_lower- 1 9 9"}
SCHEMES = {points: _plan(text) for points, text in _PLANS.items()}
# The nose's outline: an odd and an even polynomial of c through x / width and y - tip at c = 0,
# 0.2, ..., 1, from the middle of the base out to the wing and up beside the bridge.
_ODD = np.arange(1, 10, 2)
_EVEN = np.arange(0, 12, 2)
_AT = np.linspace(0, 1, 6)[:, None]
_NOSE_X = np.linalg.solve(_AT[1:] ** _ODD, [.52, .95, 1, .62, .5])
_NOSE_Y = np.linalg.solve(_AT ** _EVEN, [.125, .115, .07, -.05, -.27, -.48]) / 0.56
EAR = -0.05                                                       # where the contour starts, y
NASION = 0.02                                                     # where the nose does


def _curve(q, curve: str, side: int, edge: int, s: np.ndarray):
    """Head x, y of points of a curve: (P,), or (N, P) where the fields of q are (N, 1).

    edge: -1 upper, 1 lower, 0 between; the line between the lips ends in their outer corners.
    """
    c = 2 * s - 1                                                 # from -1 to 1
    turn = np.pi * (s - 0.5)                                      # from -pi/2 to pi/2
    if curve == "contour":
        x = q.cheek * np.sign(c) * np.abs(np.sin(turn)) ** (2 / q.jaw_q)
        return x, EAR + (q.jaw - EAR) * np.cos(turn) ** (2 / q.jaw_p)
    if curve == "hairline":
        y = q.hairline + (EAR - q.hairline) * c ** 4
        return _section(q, y)[0] * np.sin(turn), y
    if curve == "bridge":
        return 0 * s * q.nose_y, NASION + (q.nose_y - NASION) * s
    if curve == "nose":
        x = q.nose_w * (c[:, None] ** _ODD @ _NOSE_X)
        return x, q.nose_y * (1 + c[:, None] ** _EVEN @ _NOSE_Y)
    if curve in ("lip", "inner"):
        y = q.mouth_y + 0.08 * q.open - 0.12 * (q.smile + q.skew * c) * c * c
        y = y + q.open * (0.12 + 0.22 * edge) * (1 - c * c) ** 0.7
        if curve == "lip" and edge:
            bow = 1.1 - 0.22 * np.exp(-(c / 0.2) ** 2)                   # Cupid's
            if edge > 0:
                y = y + q.lip_lower * np.cos(turn) ** 0.85
            else:
                y = y - q.lip_upper * bow * np.cos(turn)
        width = q.mouth_w + 0.08 * q.smile - 0.05 * q.open
        return c * width * (0.88 if curve == "inner" else 1), y
    if curve == "brow":
        y = q.brow_y - q.brow_arch * np.sin(np.pi * s ** 0.7) - q.brows * (1 + 2 * q.skew * side)
        y = y + q.slant * c - 0.03 * s + 0.09 * q.frown * (s - 0.4)
        y = y + edge * q.brow_thick / 2 * np.sqrt(s) * (1.15 - 0.35 * s)
        return side * (q.eye_x + 0.02 - 0.03 * q.frown - (0.31 + 0.02 * q.frown) * c), y
    if curve == "pupil":
        return side * q.eye_x + q.gaze_x + 0 * s, q.gaze_y - 0.15 * q.eye_h + 0 * s
    low = q.eye_h * (0.5 - 0.2 * np.clip(q.smile, 0, 1)) * np.sin(np.pi * s ** 0.9) ** 0.85    # eye
    opening = (low + q.eye_h * np.sin(np.pi * s ** 1.12) ** 0.8) * q.lids * (1 + q.skew * side)
    y = 0.012 * s ** 6 + q.slant * c + low - opening * (1 - edge) / 2
    return side * (q.eye_x - q.eye_w * c), y


# ---- Head and camera -----------------------------------------------------------------------------

def _bump(x, y, radius_x, radius_y):
    """A smooth hill: 1 at the origin, 0 outside the ellipse."""
    return np.maximum(1 - (x / radius_x) ** 2 - (y / radius_y) ** 2, 0) ** 2


def _section(q, y):
    """Half width, half depth and z of the centre of the section at height y."""
    below = np.clip((y - EAR) / (q.jaw - EAR), 0, 1)                     # ears 0, chin 1
    dome = np.sqrt(1 - np.clip((EAR - y) / (EAR + q.crown), 0, 1) ** 2.6)
    back = -q.depth + (q.depth + 0.06) * below ** 1.6
    width = q.cheek * (1 - below ** q.jaw_p) ** (1 / q.jaw_q) * dome
    return width, (0.1 - 0.04 * below - back) * dome, back


def _surface(q, angle, y):
    """x, y, z of the skin at an angle of its section (0 in front, +-pi/2 at the jaw line) and y."""
    width, depth, back = _section(q, y)
    x = width * np.sin(angle)
    side = np.abs(x)
    along = np.clip((y - NASION) / (q.nose_y - NASION), 0, 1)                      # nasion 0, tip 1
    ridge = q.bridge_z + (q.nose_z - q.bridge_z) * along ** 1.4
    ridge = ridge * np.clip((y - NASION + 0.4) / 0.4, 0, 1)
    ridge = ridge * np.maximum(1 - (np.maximum(y - q.nose_y, 0) / 0.155) ** 2, 0)
    half = 0.17 + (1.35 * q.nose_w - 0.17) * along ** 2
    relief = (ridge * np.maximum(1 - (x / half) ** 2, 0) ** 2
              + 0.10 * _bump(side - 0.62 * q.nose_w, y - q.nose_y - 0.02, 0.14, 0.15)  # wings
              - 0.10 * _bump(side - q.eye_x, y, 0.34, 0.24)  # sockets
              + 0.05 * _bump(x, y - q.brow_y + 0.03, 0.85, 0.17)
              + 0.05 * _bump(side - 0.55, y - 0.5, 0.36, 0.36)  # cheeks
              + 0.09 * _bump(x, y - q.mouth_y - 0.1 * q.open, 0.5, 0.32 + 0.2 * q.open)  # lips
              + 0.09 * _bump(x, y - q.jaw + 0.2, 0.36, 0.26))
    return x, y, back + depth * np.cos(angle) + relief


def _camera(q, x, y, z):
    """x, y, z of the camera before roll: the head turned by yaw, then pitch, about its inside."""
    z = z + 0.3
    x, z = x * np.cos(q.yaw) + z * np.sin(q.yaw), z * np.cos(q.yaw) - x * np.sin(q.yaw)
    return x, y * np.cos(q.pitch) - z * np.sin(q.pitch), z * np.cos(q.pitch) + y * np.sin(q.pitch)


def _project(q, x, y, z) -> np.ndarray:
    """Head frame to (..., 2) of the unit image, from 0 to 1; the pixel is size * unit - 0.5."""
    x, y, _ = _camera(q, x, y, z)
    cos = q.scale * np.cos(q.roll)
    sin = q.scale * np.sin(q.roll)
    return np.stack([cos * x - sin * y + q.shift_x, sin * x + cos * y + q.shift_y], -1)


def _points(q, plan) -> np.ndarray:
    """(..., P, 2) in the unit image, in the plan's order; what is hidden is on the outline."""
    x, y = (np.concatenate(v, -1) for v in zip(*(_curve(q, *row) for row in plan)))
    width, depth, _ = _section(q, y)
    # The camera's x, width sin(a) cos(yaw) + depth cos(a) sin(yaw), is extreme at a = edge and at
    # a = edge - pi.
    edge = np.arctan2(width * np.cos(q.yaw), depth * np.sin(q.yaw))
    angle = np.arcsin(np.clip(x / np.maximum(width, 1e-9), -1, 1))
    return _project(q, *_surface(q, np.clip(angle, edge - np.pi, edge), y))


# ---- Parameters ----------------------------------------------------------------------------------

def _draws(seed, split, kind, number, normals, uniforms):
    rng = np.random.default_rng([seed, SPLITS[split], kind, number])
    return np.concatenate([rng.standard_normal(len(normals)), rng.random(len(uniforms))])


def _parameters(seed: int, split: str, indices: Sequence[int], per_identity: int,
                geometry: bool = False) -> SimpleNamespace:
    """All that defines some faces but their placement, each field (N, 1); angles in radians."""
    if split not in SPLITS:
        raise UserError(f"split is {split!r}, wanted 'train' or 'test'")
    if per_identity < 1:
        raise UserError(f"per_identity is {per_identity}, wanted 1 or more faces")
    numbers = [i // per_identity for i in indices]
    people = {number: _draws(seed, split, 0, number, SHAPE, LOOK) for number in set(numbers)}
    draws = np.stack([np.r_[people[number], _draws(seed, split, 1, i, NORMAL, UNIFORM)]
                      for number, i in zip(numbers, indices)])
    if geometry:
        look = len(SHAPE)
        normal = look + len(LOOK)
        draws[:, look:normal] = 0.37
        draws[:, normal:normal + len(NORMAL)] *= [GEOMETRY.get(name, 0.5) for name in NORMAL]
        draws[:, normal + len(NORMAL):][:, :len(TAGS)] = 1  # no face has a tag
    mean, deviation = np.array([*SHAPE.values()]).T
    draws[:, :len(SHAPE)] = mean + deviation * draws[:, :len(SHAPE)].clip(-2, 2)
    q = SimpleNamespace(**dict(zip([*SHAPE, *LOOK, *NORMAL, *UNIFORM], draws.T[..., None])))
    for tag, rate in TAGS.items():
        setattr(q, tag, getattr(q, tag) < rate)
    far = 2 * q.turn - 1                                 # strong pose: 30 to 60 degrees to a side
    q.yaw = np.radians(np.where(q.pose, 30 * far + 30 * np.sign(far), 12 * q.yaw.clip(-2.3, 2.3)))
    q.pitch = np.radians(7 * q.pitch.clip(-3, 3))
    q.roll = np.radians(9 * q.roll.clip(-2.8, 2.8))
    mild = np.hstack([0.09 * np.maximum(q.open - 0.3, 0), (0.2 + 0.3 * q.smile).clip(-0.3, 0.8),
                      1 + 0.13 * q.lids.clip(-2, 2), 0.025 * q.brows.clip(-2, 2),
                      0.15 * np.abs(q.frown)])
    strong = ACTS[(4 * q.act[:, 0]).astype(int)] * (0.75 + 0.5 * q.much)
    q.open, q.smile, q.lids, q.brows, q.frown = np.where(q.expression, strong, mild).T[..., None]
    q.skew = 0.08 * q.skew
    q.gaze_x = 0.03 * q.gaze_x.clip(-2, 2)
    q.gaze_y = 0.012 * q.gaze_y.clip(-2, 2)
    q.jaw = q.chin + 0.3 * q.open                                        # where the chin is
    q.hairline = q.hairline + 0.36 * ((6 * q.style).astype(int) == 3)    # a fringe
    q.scale = np.ones((1, 1))
    q.shift_x = np.zeros((1, 1))
    q.shift_y = np.zeros((1, 1))
    return q


OUTLINE = _plan("contour 0 16 16; brow_upper- 0 5 5; brow_upper+ 0 5 5")


def _place(q, outline) -> None:
    """Set scale, shift and box (a loose one, as a detector's) from OUTLINE's points (..., P, 2)
    without them. The face is 0.55 to 0.75 of the image wide, less where that does not fit: from
    brows to chin it is inside."""
    low = outline.min(-2)                                               # (..., 2)
    high = outline.max(-2)
    extent = (high - low).max(-1, keepdims=True)
    q.scale = np.minimum(0.275 + 0.1 * q.fill, 0.92 / extent)
    room = np.minimum(0.48 - q.scale * (high - low) / 2, 0.1)
    middle = 0.5 + room * (2 * np.hstack([q.at_x, q.at_y]) - 1)
    q.shift_x, q.shift_y = np.split(middle - q.scale * (high + low) / 2, 2, -1)
    centre = middle + q.scale * extent * 0.12 * (np.hstack([q.box_x, q.box_y]) - 0.5)
    half = q.scale * extent * (0.55 + 0.15 * q.box_size)
    q.box = np.concatenate([centre - half, centre + half], -1)          # (..., 4) in the unit image


# ---- Painting ------------------------------------------------------------------------------------

# Lines to draw and into how many parts; the first three hold the points of OUTLINE.
LINES = {"contour": 48, "brow_upper-": 10, "brow_upper+": 10, "brow_lower-": 10, "brow_lower+": 10,
         "eye_upper-": 14, "eye_upper+": 14, "eye_lower-": 14, "eye_lower+": 14, "pupil-": 0,
         "pupil+": 0, "bridge": 6, "nose": 32, "hairline": 24, "lip_upper": 24, "lip_lower": 24,
         "inner_upper": 24, "inner_lower": 24}
DRAWN = _plan(";".join(f"{name} 0 {parts} {parts or 1}" for name, parts in LINES.items()))
_ENDS = np.cumsum([parts + 1 for parts in LINES.values()])[:-1]
_CIRCLE = np.stack([np.cos(np.arange(32) * np.pi / 16), np.sin(np.arange(32) * np.pi / 16)])
_DOWN = np.linspace(0, 1, 58, dtype=np.float32)
_ANGLE = np.linspace(-np.pi / 2, np.pi / 2, 56, dtype=np.float32)[:, None]
_MAP, _PER_UNIT, _LEFT, _TOP = (76, 58), 16, -1.8, -2.2     # the map of light, in the camera's x, y


def _pick(table, at):
    i, rest = divmod(at * (len(table) - 1), 1)
    return table[int(i)] * (1 - rest) + table[int(i) + 1] * rest


def _between(line, other):
    """The polygon between two lines of the same direction."""
    return np.concatenate([line, other[::-1]])


def _draw(canvas, lines, colour, width=None):
    """Lines of a width in px or, without one, polygons; cv2 draws them half a pixel too far out."""
    lines = [np.rint(line * 16).astype(np.int32) for line in lines]
    colour = tuple(map(float, colour))
    if width is None:
        cv2.fillPoly(canvas, lines, colour, cv2.LINE_AA, 4)
    else:
        cv2.polylines(canvas, lines, False, colour, max(1, round(width)), cv2.LINE_AA, 4)


def _flat(shape, colour):
    return cv2.merge([np.full(shape[:2], min(max(v, 0), 255), np.uint8) for v in colour])


def _paint(canvas, polygons, paint, alpha=1.0, soft=0.0):
    """Lay `paint`, a colour or a picture of the canvas' size, inside polygons. Coverage is counted
    at 4 x 4 places of a pixel, so that an edge is where its polygon is. Where that is of no
    importance, `soft` px blur the edge (up to 0.5, it is cv2's plain one)."""
    x, y, width, height = cv2.boundingRect(np.concatenate(polygons).astype(np.float32))
    pad = 1 + int(2.5 * soft)
    fine = 1 if soft else 4
    x0 = max(x - pad, 0)
    y0 = max(y - pad, 0)
    area = canvas[y0:max(y + height + pad, 0), x0:max(x + width + pad, 0)]
    if not area.size:
        return
    rows, columns, _ = area.shape
    cover = np.zeros((fine * rows, fine * columns), np.uint8)
    shifted = [(line - (x0 - 0.5, y0 - 0.5)) * (16 * fine) - 8 for line in polygons]
    corners = [np.rint(line).astype(np.int32) for line in shifted]
    cv2.fillPoly(cover, corners, 255, cv2.LINE_AA if soft else cv2.LINE_8, 4)
    if soft > 0.5:
        cover = cv2.GaussianBlur(cover, (0, 0), soft)
    elif not soft:
        cover = cv2.resize(cover, (columns, rows), interpolation=cv2.INTER_AREA)
    if np.ndim(paint) == 3:
        layer = paint[y0:y0 + rows, x0:x0 + columns]
    else:
        layer = _flat(area.shape, paint)
    cover = cover * np.float32(alpha / 255)
    cv2.blendLinear(layer, area, cover, 1 - cover, area)


class _Painter:
    """Paints one face. Lengths times `unit` are in head units; colours are RGB to 255."""

    def __init__(self, q, size: int, rng):
        """q: one face of `_parameters`, not yet placed."""
        # Python's numbers, not numpy's, leave float32 arrays float32.
        q = SimpleNamespace(**{name: value.item() for name, value in vars(q).items()})
        points = _points(q, DRAWN)
        _place(q, points[np.r_[0:49:3, 49:60:2, 60:71:2]])
        q.scale, q.shift_x, q.shift_y = q.scale.item(), q.shift_x.item(), q.shift_y.item()
        points = size * (q.scale * points + (q.shift_x, q.shift_y)) - 0.5
        self.lines = dict(zip(LINES, np.split(points, _ENDS)))
        self.q = q
        self.size = size
        self.rng = rng
        self.unit = size * q.scale
        cos, sin = self.unit * np.cos(q.roll), self.unit * np.sin(q.roll)
        self.turn = np.array([[cos, -sin], [sin, cos]])
        self.down = np.array([-sin, cos])

        self.skin = _pick(SKIN, q.skin) * (1, 0.97 + 0.05 * q.red, 0.95 + 0.09 * q.red)
        self.hair = _pick(HAIR, q.hair)
        self.makeup = 0.6 + 0.4 * q.much if q.makeup else 0.0
        azimuth = 0.5 * q.light_x
        height = 0.3 * q.light_y - 0.5
        self.ambient = 0.5
        self.key = 0.62
        self.gain = np.full(3, 0.85 + 0.25 * q.tone)
        if q.illumination:
            if q.lit < 0.5:                                             # from one side
                azimuth = 1.3 if q.hue < 0.5 else -1.3
                self.ambient = 0.2
                self.key = 1.0
            elif q.lit < 0.7:                                           # dark, bright, warm or cold
                self.gain *= 0.35
            elif q.lit < 0.85:
                self.gain *= 1.6
            else:
                self.gain *= (0.5, 0.7, 1.2) if q.hue < 0.5 else (1.2, 0.7, 0.45)
        flat = np.cos(height)
        self.light = np.array([np.sin(azimuth) * flat, np.sin(height), np.cos(azimuth) * flat])
        self.flat = self.ambient + 0.4 * self.key                        # on what is not shaded

    def shade(self, face) -> np.ndarray:
        """Light and blush on the unlit picture of a face, (size, size, 3) uint8, also beyond its
        edge: a grid on the head is lit, scattered into a coarse map with far cells first, and the
        gaps are filled."""
        q = self.q
        blush = np.float32([[0], [-0.28], [-0.3]])
        turn_x = -1 if q.yaw > 0 else 1
        turn_y = -1 if q.pitch > 0 else 1
        x, y, z = _surface(q, _ANGLE[::turn_x], -q.crown + (q.jaw + q.crown) * _DOWN[::turn_y])
        cheeks = (0.25 + 0.35 * self.makeup) * _bump(np.abs(x) - 0.54, y - 0.5, 0.36, 0.32)
        nose = 0.2 * _bump(x, y - q.nose_y, 0.3, 0.25)
        tint = 1 + blush * (cheeks + nose)[:-1, :-1].ravel()
        camera = [np.float32(v) for v in _camera(q, x, y, z)]
        x, y, z = camera
        down = [v[:-1, 1:] - v[:-1, :-1] for v in camera]
        across = [v[1:, :-1] - v[:-1, :-1] for v in camera]
        nx, ny, nz = (across[i - 2] * down[i - 1] - across[i - 1] * down[i - 2] for i in range(3))
        length = turn_x * turn_y * np.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9
        lx, ly, lz = self.light.tolist()
        half = (2 + 2 * lz) ** 0.5                                       # length of light + view
        facing = (lx * nx + ly * ny + lz * nz) / length
        lit = self.ambient + self.key / 1.25 * np.maximum(facing + 0.25, 0)
        shine = np.maximum((lx * nx + ly * ny + (lz + 1) * nz) / (half * length), 0) ** 4
        light = tint * lit.ravel() + 0.1 * (shine * shine * shine * shine).ravel()      # (3, cells)

        column, row = (((v[:-1, :-1].ravel() - start) * _PER_UNIT).astype(int)
                       for v, start in ((x, _LEFT), (y, _TOP)))
        sums = np.zeros((*_MAP, 4), np.float32)                          # light, weight
        sums[row, column] = np.vstack([light, np.ones_like(light[:1])]).T
        sums = (cv2.blur(sums, (3, 3)) + 0.02 * cv2.blur(sums, (13, 13))).transpose(2, 0, 1).copy()
        coarse = 128 * (sums[:3] + 1e-4 * self.flat) / (sums[3] + 1e-4)
        coarse = coarse.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()
        shift = self.turn @ (_LEFT + 0.5 / _PER_UNIT, _TOP + 0.5 / _PER_UNIT) - 0.5
        shift += self.size * q.shift_x, self.size * q.shift_y
        light = cv2.warpAffine(coarse, np.c_[self.turn / _PER_UNIT, shift], (self.size, self.size))
        return cv2.multiply(face, light, scale=1 / 128)

    def px(self, x, y, z):
        """Head frame to pixels."""
        return self.size * _project(self.q, *map(np.asarray, (x, y, z))) - 0.5

    def ellipsoid(self, *shape):
        """Outline of an ellipsoid of the head, from its centre and half axes."""
        centre, radii = np.reshape(shape, (2, 3))
        middle, *axes = self.px(*(centre + np.vstack([np.zeros(3), np.diag(radii)])).T)
        along = _CIRCLE.T @ ((axes - middle).T @ (axes - middle))
        return middle + along / np.sqrt((along * _CIRCLE.T).sum(1, keepdims=True))

    def body(self, face) -> np.ndarray:
        """Background, hair, neck, shoulders and ears, and `face` in the face's outline."""
        q, rng, size, skin = self.q, self.rng, self.size, self.skin
        coarse = rng.uniform(40, 215, (5, 5, 1)) + rng.normal(0, 20, (5, 5, 3))
        canvas = cv2.resize(coarse.clip(0, 255).astype(np.uint8), (size, size),
                            interpolation=cv2.INTER_CUBIC)
        corners = rng.random((7, 1, 2))
        corners = corners + rng.uniform(0.05, 0.35, (7, 1, 1)) * rng.uniform(-1, 1, (7, 5, 2))
        for polygon in size * corners.astype(np.float32):
            colour = rng.uniform(20, 230) + rng.normal(0, 25, 3)
            _draw(canvas, [cv2.convexHull(polygon)[:, 0]], colour)
        width = 1 + int(rng.integers(0, 5)) * size // 128
        canvas = cv2.blur(canvas, (width, width))
        style = int(6 * q.style)                            # 0 bald, 3 fringe, 4 and 5 long

        hair = rng.uniform(90, 256, (4, 40, 1)) * (self.hair * (self.flat / 190))
        hair = cv2.resize(hair.clip(0, 255).astype(np.uint8), (size, size))
        if style > 3:
            _paint(canvas, [self.ellipsoid(0, 0.55, -0.75, 1.25, 1.7, 0.75)], hair, soft=0.3)
        neck = self.px((-.62, -.6, -.7, .7, .6, .62), (.7, 1.6, 2.5, 2.5, 1.6, .7), -0.7)
        layer = canvas.copy()
        _draw(layer, [neck], skin * (self.flat - 0.08))
        _draw(layer, [self.lines["contour"][6:43] + 0.15 * self.down], skin * (self.flat - 0.17))
        _paint(canvas, [neck], layer, soft=0.3)
        shoulders = self.ellipsoid(0, 3.5, -0.9, 2.3, 1.45, 1.0)
        _draw(canvas, [shoulders], rng.uniform(20, 235, 3) * self.flat)
        full = 1.05 + 0.09 * q.volume if style else 1.02
        skull = self.ellipsoid(0, -0.42, -0.62, full, full, full + 0.03)
        _paint(canvas, [skull], hair if style else face, soft=0.3)
        for side in (-1, 1):
            if style < 4 and side * q.yaw < 0.7:
                cos, sin = _CIRCLE
                ear = self.px(side * (q.cheek + 0.05 + 0.07 * cos), 0.2 + 0.3 * sin,
                              -0.8 - 0.16 * cos)
                _draw(canvas, [ear], skin * (self.flat - 0.04))
                _draw(canvas, [0.4 * ear.mean(0) + 0.6 * ear], skin * (self.flat - 0.15))
        strands = rng.uniform(-0.05, 0.05, (25, 1)) * (style in (1, 3)) * self.down
        _paint(canvas, [_between(self.lines["contour"], self.lines["hairline"] + strands)], face)
        return canvas

    def eyes(self, face):
        q, unit, down = self.q, self.unit, self.down
        iris = _pick(IRIS, q.iris)
        names = ("eye_upper", "eye_lower", "brow_upper", "brow_lower", "pupil")
        uppers, lowers, brows, edges, pupils = (
            [self.lines[name + side] for side in "-+"] for name in names)
        shadow = ((86, 60, 130), (50, 84, 128), (120, 62, 58), (40, 34, 40))[int(4 * q.act)]
        above = [upper - (0.08 + 0.1 * self.makeup) * down for upper in uppers]
        shadow = shadow if q.makeup else self.skin * (0.74, 0.66, 0.64)
        _paint(face, [*map(_between, above, lowers)], shadow, 0.6, soft=0.035 * unit)
        layer = face.copy()
        disc = self.px(*(0.09 * _CIRCLE), 0)
        disc -= disc.mean(0)
        glint = (0.03 * unit * np.sign(self.light[0]), 0) - 0.035 * down
        rings = [*map(_between, uppers, lowers)]
        _draw(layer, [1.4 * ring - 0.4 * ring.mean(0) for ring in rings], (238, 231, 228))
        for radius, at, colour in ((1, 0, iris / 2), (.8, 0, iris), (.4, 0, [9] * 3),
                                   (.2, glint, [255] * 3)):
            _draw(layer, [pupil + radius * disc + at for pupil in pupils], colour)
        _draw(layer, uppers, (107, 104, 103), 0.04 * unit)               # shadow of the lid
        _paint(face, rings, layer)
        creases = [line[1:-2] - 0.055 * down for line in uppers]
        _draw(face, lowers + creases, self.skin * 0.64, 0.012 * unit)
        _draw(face, uppers, np.full(3, 40 - 28 * self.makeup), 0.028 * unit * (1 + self.makeup))
        _paint(face, [*map(_between, brows, edges)], 0.72 * self.hair + 0.12 * self.skin, 0.88)

    def nose(self, face):
        nose, unit = self.lines["nose"], self.unit
        tip = self.lines["bridge"][-1]
        inward = (nose[16] - tip) / (np.hypot(*(nose[16] - tip)) + 1e-6)
        ball = tip + 0.06 * unit * (inward + _CIRCLE.T)                 # round, and through the tip
        front = np.concatenate([self.lines["bridge"][:-1], nose[5:-5], ball])
        self.front = cv2.convexHull(front.astype(np.float32))[:, 0]
        if abs(self.q.yaw) > 0.3:                                # it stands in front of the far eye
            _draw(face, [self.front], self.skin)
        wings = [_between(wing, wing + 0.03 * self.down) for wing in (nose[5:12], nose[21:28])]
        _paint(face, wings, self.skin * (0.6, 0.5, 0.48), 0.8, 0.022 * unit)
        holes = [_between(side, side - 0.045 * self.down) for side in (nose[11:16], nose[17:22])]
        _paint(face, holes, self.skin * 0.25, 0.85, 0.02 * unit)

    def mouth(self, face):
        q, unit, skin = self.q, self.unit, self.skin
        upper, lower, high, low = [*self.lines.values()][-4:]            # the last of LINES
        if q.beard > 0.7 and not q.makeup:
            beard = self.lines["contour"][10:39] + 0.06 * self.down
            _paint(face, [beard], 0.6 * self.hair, 2.4 * q.beard - 1.6, 0.1 * unit)
        lips = skin * (0.84 + 0.08 * q.lips, 0.64, 0.63)
        stick = np.array((200, 20 + 60 * q.hue, 40 + 60 * q.hue))
        lips = lips + 0.75 * self.makeup * (stick - lips)
        _paint(face, [_between(upper, high)], lips * 0.88)
        _paint(face, [_between(lower, low)], lips)
        _paint(face, [0.5 * (lower + low)[7:-7]], lips * 1.25, soft=0.03 * unit)
        if q.open > 0:                                                   # dark, teeth, tongue
            layer = face.copy()
            for a, b, colour in ((0, 1, (58, 18, 20)), (0, .34, (238, 232, 220)),
                                 (.68, 1, (176, 80, 80))):
                _draw(layer, [_between(high + a * (low - high), high + b * (low - high))], colour)
            _paint(face, [_between(high, low)], layer)
        _draw(face, [high], skin * (0.42, 0.26, 0.26), 0.016 * unit)

    def glasses(self, canvas, colour, alpha, frame):
        x, y = np.sign(_CIRCLE) * np.abs(_CIRCLE) ** 0.6 * ((0.27,), (0.2,))  # a rounded rectangle
        sides = (-1, 1)
        eye = self.q.eye_x + 0.02
        lenses = [self.px(side * eye + x, y + 0.03, 0.2 - 0.45 * side * x) for side in sides]
        temples = [self.px((side * 0.72, side * 1.02), (-.03, .05), (.06, -.7)) for side in sides
                   if side * self.q.yaw < 0.15]
        _paint(canvas, lenses, (colour,) * 3, alpha)
        rims = [lens[np.r_[:32, 0]] for lens in lenses] + [np.stack([lenses[0][0], lenses[1][16]])]
        _draw(canvas, rims + temples, frame, 0.035 * self.unit)

    def occlude(self, canvas):
        """Spectacles, where the person wears them; for the tag a hand, sunglasses, scarf or box."""
        q, rng, unit, flat = self.q, self.rng, self.unit, self.flat
        contour, bridge = self.lines["contour"], self.lines["bridge"]
        if q.specs < 0.12:
            self.glasses(canvas, 255, 0.07, rng.uniform(10, 120, 3) * flat)
        if not q.occlusion:
            return
        at = 0.45 * contour[rng.integers(4, 45)] + 0.55 * bridge[-1] + unit * rng.normal(0, 0.15, 2)
        along = bridge[3] - at + unit * rng.normal(0, 0.3, 2)          # to the bridge of the nose
        along = unit / np.hypot(*along) * along
        colour = rng.uniform(10, 240, 3)
        axes = np.array([(-along[1], along[0]), along])
        if q.cover < 0.35:                                     # hand: forearm, fingers, thumb, palm
            skin = self.skin * flat
            _draw(canvas, [at + np.array(((0, -1), (0, -4))) @ axes], skin * 0.95, 0.5 * unit)
            for root, *tip in ((-.3, -.4, .1), (-.1, -.1, .2), (.1, .1, .2), (.3, .4, 0),
                               (.1, .8, -.5)):
                line = at + np.array(((root, -.8), tip)) @ axes
                _draw(canvas, [line], skin * 0.68, 0.24 * unit)
                _draw(canvas, [line], skin, 0.2 * unit)
            _draw(canvas, [at + np.array(((0, -.85), (0, -1))) @ axes], skin, 0.75 * unit)
        elif q.cover < 0.52:
            self.glasses(canvas, 24, 0.93, (20, 20, 20))
        elif q.cover < 0.7:                                    # scarf, from below the nose downward
            stripes = (colour * rng.uniform(0.6, 1.1, (rng.integers(1, 14), 3, 1))).clip(0, 255)
            scarf = 1.08 * contour[6:43] - 0.08 * contour[6:43].mean(0)
            _paint(canvas, [scarf], cv2.resize(stripes.astype(np.uint8), (self.size, self.size)))
        else:                                                            # box
            square = np.array(((-1, -1), (1, -1), (1, 1), (-1, 1)))
            corners = rng.uniform(0.3, 0.8, 2) * square @ axes
            _draw(canvas, [at + corners], colour)
            _draw(canvas, [at + 0.8 * corners - 0.1 * along], 255 - colour)

    def finish(self, canvas) -> np.ndarray:
        """Exposure, blur, noise and compression."""
        q = self.q
        canvas = cv2.multiply(canvas, (*self.gain.tolist(), 0.0))
        sigma = self.size / 128 * (1.2 + 1.6 * q.soft if q.blur else 0.5 * q.soft)
        canvas = cv2.GaussianBlur(canvas, (0, 0), sigma) if sigma > 0.25 else canvas
        amount = 0.02 + 0.12 * q.noise ** 4
        noise = np.frombuffer(self.rng.bytes(canvas.size), np.uint8)
        canvas = cv2.addWeighted(canvas, 1, noise.reshape(canvas.shape), amount, -127.5 * amount)
        if q.jpeg < 0.4:
            quality = [cv2.IMWRITE_JPEG_QUALITY, int(30 + 150 * q.jpeg)]
            code = cv2.imencode(".jpg", canvas, quality)[1]
            canvas = cv2.imdecode(code, cv2.IMREAD_COLOR)
        return canvas

    def draw(self) -> np.ndarray:
        """RGB uint8 (size, size, 3)."""
        face = _flat((self.size, self.size), self.skin)
        for feature in (self.eyes, self.nose, self.mouth):
            feature(face)
        face = self.shade(face)
        canvas = self.body(face)
        if abs(self.q.yaw) > 0.3:                               # it stands out beyond the far cheek
            _paint(canvas, [self.front], face, soft=0.3)
        self.occlude(canvas)
        return self.finish(canvas)


# ---- The set -------------------------------------------------------------------------------------

def _unit_points(q, points: int) -> np.ndarray:
    """Places the faces; their (N, P, 2) points in the unit image."""
    if points not in SCHEMES:
        raise UserError(f"no scheme of {points} points is drawn, there are "
                         f"{', '.join(map(str, SCHEMES))}")
    _place(q, _points(q, OUTLINE))
    return _points(q, SCHEMES[points])


def draw_face(seed: int, split: str, index: int, size: int = 128, per_identity: int = 10,
              geometry: bool = False) -> np.ndarray:
    """Pixels of face `index` of a split: RGB uint8 (size, size, 3). Arguments: `read_faces`."""
    q = _parameters(seed, split, [index], per_identity, geometry)
    return _Painter(q, size, np.random.default_rng([seed, SPLITS[split], 2, index])).draw()


def read_faces(split: str, count: int, size: int = 128, points: int = 68, seed: int = 0,
               per_identity: int = 10, geometry: bool = False) -> list[Face]:
    """The first `count` faces of a split, "train" or "test". Images are drawn when they are asked
    for.

    size: height and width of the images, px; geometry scales with it.   points: a key of `SCHEMES`.
    per_identity: faces that share an identity.   geometry: all people have one look, and differ in
        the shape of their faces alone; faces of a person differ most in roll.
    Raises: UserError for an unknown split or number of points, or a count or per_identity below 1.
    """
    if count < 1:
        raise UserError(f"count is {count}, wanted 1 or more faces")
    q = _parameters(seed, split, range(count), per_identity, geometry)
    found = (size * _unit_points(q, points) - 0.5).astype(np.float32)
    boxes = (size * q.box - 0.5).tolist()
    faces = []
    for i in range(count):
        image = functools.partial(draw_face, seed, split, i, size, per_identity, geometry)
        tags = tuple(tag for tag in TAGS if getattr(q, tag)[i, 0])
        person = f"{split}-{i // per_identity:05d}"
        faces.append(Face(image, found[i], tuple(boxes[i]), person, tags))
    return faces
