"""Drawn faces: points mean what the schemes say, pixels are under the points, and face i is always
face i."""
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from common import synthetic
from common.datasets import SCHEMES, Face
from common.synthetic import SHAPE, TAGS, draw_face, read_faces

ROOT = Path(__file__).resolve().parents[1]
NEUTRAL = dict(yaw=0, pitch=0, roll=0, open=0, smile=0, lids=1, brows=0, frown=0, skew=0, gaze_x=0,
               gaze_y=0, at_x=0.5, at_y=0.5, fill=0.5)
CLEAR = dict(occlusion=False, blur=False, illumination=False, makeup=False, specs=1, soft=0,
             noise=0, jpeg=1, style=0.25, beard=0)


def parameters(index=0, **fields):
    """Parameters of one face, some of them replaced, by several values for as many faces."""
    q = synthetic._parameters(0, "train", [index], 10)
    for name, value in fields.items():
        setattr(q, name, np.reshape(value, (-1, 1)))
    q.jaw = q.chin + 0.3 * q.open
    return q


def mean_face(**fields):
    return parameters(**{**{name: mean for name, (mean, _) in SHAPE.items()}, **NEUTRAL, **fields})


def unit_points(q, points):
    return synthetic._unit_points(q, points)[0]


def picture(q, size):
    """The face of some parameters without nuisances, as float: equal for equal parameters."""
    for name, value in CLEAR.items():
        setattr(q, name, np.full((1, 1), value))
    return synthetic._Painter(q, size, np.random.default_rng(7)).draw().astype(float)


def sample(image, points):
    """Bilinear samples of (H, W) at (P, 2) px."""
    x, y = np.float32(points).T
    return cv2.remap(np.float32(image), x[None], y[None], cv2.INTER_LINEAR)[0]


# ---- schemes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", SCHEMES)
def test_mean_face_is_its_mirror_image(points):
    p = unit_points(mean_face(), points)
    assert p.shape == (points, 2)
    np.testing.assert_allclose((p * [-1, 1] + [1, 0])[SCHEMES[points].flip], p, atol=1e-12)


@pytest.mark.parametrize("points", SCHEMES)
def test_turning_the_other_way_gives_the_mirror_image(points):
    turned = dict(yaw=0.8, roll=0.3, gaze_x=0.02, skew=0.1)
    p = unit_points(mean_face(pitch=0.2, smile=0.5, open=0.4, **turned), points)
    q = unit_points(mean_face(pitch=0.2, smile=0.5, open=0.4, **{k: -v for k, v in turned.items()}),
                    points)
    np.testing.assert_allclose((q * [-1, 1] + [1, 0])[SCHEMES[points].flip], p, atol=1e-12)
    assert np.abs(p - q).max() > 0.1


def test_order_in_an_upright_face():
    q = mean_face(open=0.5)
    p = {points: unit_points(q, points) for points in SCHEMES}
    for points, scheme in SCHEMES.items():
        left, right, nose, *mouth = (p[points][list(group)].mean(0) for group in scheme.five)
        assert left[0] < nose[0] < right[0] and mouth[0][0] < nose[0] < mouth[1][0]
        assert max(left[1], right[1]) < nose[1] < min(mouth[0][1], mouth[1][1])
        if "chin" in scheme.anchors:
            assert p[points][:, 1].argmax() == scheme.anchors["chin"][0]

    def run(values, first, last, sign):
        """Whether points first to last go on in one direction."""
        return (sign * np.diff(values[first:last + 1]) > 0).all()

    x, y = p[98].T
    assert run(x, 0, 32, 1) and run(y, 0, 16, 1)
    for first in (33, 42):                                      # brow: over the top and back
        assert run(x, first, first + 4, 1) and run(x, first + 5, first + 8, -1)
    assert (y[[41, 40, 39, 38]] > y[[34, 35, 36, 37]]).all()
    assert (y[[50, 49, 48, 47]] > y[[42, 43, 44, 45]]).all()
    assert run(y, 51, 54, 1) and run(x, 55, 59, 1)
    for first in (60, 68):                                      # eye: over the top and back
        assert run(x, first, first + 4, 1) and run(x, first + 4, first + 7, -1)
        assert y[first + 2] < min(y[first], y[first + 4])
        assert y[first + 6] > max(y[first], y[first + 4])
    for first, half in ((76, 6), (88, 4)):
        assert run(x, first, first + half, 1) and run(x, first + half, first + 2 * half - 1, -1)
    assert y[79] < y[90] < y[94] < y[85]
    x, y = p[194].T
    assert run(x, 0, 40, 1) and p[98][51, 1] < y[0] < p[98][57, 1]     # from the height of the nose
    assert run(y, 41, 45, 1) and run(x, 45, 53, 1) and run(y, 53, 57, -1)
    assert run(x, 58, 71, 1) and run(x, 72, 85, -1) and (y[59:71] < y[84:72:-1]).all()
    for first, out in ((114, 1), (134, -1), (154, 1), (174, -1)):      # from the inner end and back
        assert run(x, first, first + 10, out) and run(x, first + 10, first + 19, -out)
        assert (y[first + 1:first + 10] < y[first + 19:first + 10:-1]).all()


EQUAL = {  # pairs of schemes: indices that are the same place of the head
    (68, 98): [*((i, 2 * i) for i in range(17)), (17, 33), (26, 46),
               *zip(range(27, 36), range(51, 60)),
               (36, 60), (39, 64), (42, 68), (45, 72), *zip(range(48, 68), range(76, 96))],
    (106, 98): [*zip(range(55), range(55)), *zip(range(58, 63), range(55, 60)),
                *zip(range(66, 74), range(60, 68)), *zip(range(75, 83), range(68, 76)),
                *zip(range(84, 104), range(76, 96)), (104, 96), (105, 97)],
    (5, 98): [(0, 96), (1, 97), (2, 54), (3, 76), (4, 82)],
    (29, 98): [(0, 33), (1, 46), (4, 35), (5, 40), (6, 44), (7, 48), (8, 60), (9, 72), (10, 64),
               (11, 68), (12, 62), (13, 66), (14, 70), (15, 74), (16, 96), (17, 97), (20, 54),
               (21, 57), (22, 76), (23, 82), (24, 79), (25, 90), (26, 94), (27, 85), (28, 16)],
    (29, 68): [(2, 21), (3, 22)],
    (19, 68): [(0, 17), (1, 19), (2, 21), (3, 22), (4, 24), (5, 26), (6, 36), (8, 39), (9, 42),
               (11, 45), (13, 30), (15, 48), (17, 54), (18, 8)],
    (19, 106): [(7, 74), (10, 83)],
    (19, 29): [(12, 18), (14, 19)],
    (194, 98): [(20, 16), (49, 57), (58, 76), (71, 82), (86, 88), (93, 90), (100, 92), (107, 94),
                (114, 68), (124, 72), (134, 64), (144, 60), (154, 42), (164, 46), (173, 50),
                (174, 37), (184, 33), (193, 38)],
    (194, 29): [(45, 18), (53, 19), (119, 14), (129, 15), (139, 12), (149, 13)]}


def drawn_sets(split, count, size):
    return {points: np.stack([face.points
                              for face in read_faces(split, count, size=size, points=points)])
            for points in SCHEMES}


def test_schemes_are_read_off_the_same_head():
    sets = drawn_sets("test", 100, 256)
    for (a, b), pairs in EQUAL.items():
        i, j = np.array(pairs).T
        np.testing.assert_allclose(sets[a][:, i], sets[b][:, j], atol=1e-3, err_msg=f"{a} {b}")


def test_98_points_interpolated_to_68_are_near():
    """PIPNet's table: what it does not copy is between a brow's edges or points of a lid."""
    sets = drawn_sets("test", 100, 256)
    p98, p68 = sets[98], sets[68]
    eye = np.linalg.norm(p68[:, 36] - p68[:, 39], axis=-1)
    for i, j, k in ((18, 34, 41), (19, 35, 40), (20, 36, 39), (21, 37, 38), (22, 42, 50),
                    (23, 43, 49), (24, 44, 48), (25, 45, 47)):
        assert np.linalg.norm(p68[:, i] - (p98[:, j] + p98[:, k]) / 2, axis=-1).max() < 0.6
    for i, j, k in ((37, 61, 62), (38, 63, 62), (40, 65, 66), (41, 67, 66), (43, 69, 70),
                    (44, 71, 70), (46, 73, 74), (47, 75, 74)):
        assert np.linalg.norm(p68[:, i] - (2 * p98[:, j] + p98[:, k]) / 3, axis=-1).max() < 1.5
    assert np.median(np.linalg.norm(p68[:, 36:42].mean(1) - sets[5][:, 0], axis=-1) / eye) < 0.15


# ---- head and camera -----------------------------------------------------------------------------


def test_projection_is_a_rotation_by_yaw_pitch_roll_and_a_scale():
    q = parameters(yaw=0.5, pitch=-0.2, roll=0.3)
    xyz = np.random.default_rng(0).normal(size=(3, 20))
    q.scale, q.shift_x, q.shift_y = 0.3, 0.4, 0.6
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (0.5, -0.2, 0.3))
    yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])                 # the nose to image-right
    pitch = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])            # clockwise, as y points down
    expected = 0.3 * (roll @ pitch @ yaw @ (xyz + [[0], [0], [0.3]]))[:2].T + [0.4, 0.6]
    np.testing.assert_allclose(synthetic._project(q, *xyz)[0], expected, atol=1e-12)


def test_points_out_of_sight_stand_on_the_visible_outline():
    """Against a search along each section, the relief (which is not part of the outline's rule)
    left out."""
    for yaw in (-1.0, -0.5, 0.0, 0.6, 1.0):
        q = synthetic._parameters(0, "train", [3], 10)
        q.yaw, q.pitch = np.full((1, 1), yaw), np.zeros((1, 1))
        x, y = synthetic._curve(q, "contour", 0, 0, np.linspace(0, 1, 33))
        angles = np.linspace(-np.pi / 2, np.pi / 2, 20001)[:, None]
        width, depth, back = synthetic._section(q, y)
        shift, _, _ = synthetic._camera(q, width * np.sin(angles), y, back + depth * np.cos(angles))
        extreme = np.where(x < 0, shift.argmin(0), shift.argmax(0))              # (1, 33)
        expected = synthetic._project(q, *synthetic._surface(q, angles[extreme, 0], y))
        found = synthetic._points(q, synthetic._plan("contour 0 32 32"))
        np.testing.assert_allclose(found, expected, atol=2e-4)
        near = slice(17, None) if yaw < 0 else slice(0, 16)               # here the jaw line itself
        assert (np.abs(angles[extreme, 0][0, near]) > np.pi / 2 - 1e-3).all()


def test_points_move_smoothly_with_yaw():
    for points in SCHEMES:
        p = synthetic._unit_points(mean_face(yaw=np.radians(np.arange(-60, 60.5, 0.5))), points)
        assert np.abs(np.diff(p, axis=0)).max() < 0.01
        assert np.abs(np.diff(p, 2, axis=0)).max() < 0.003


# ---- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("yaw, near", [(0, [0, 1]), (0.6, [0]), (-0.6, [1])])
@pytest.mark.parametrize("size", [128, 300])
def test_iris_is_at_the_pupil_point(yaw, near, size):
    fields = dict(lids=2.2, gaze_x=0.02, gaze_y=-0.06, yaw=yaw, pitch=yaw / 6, roll=yaw / 2)
    # The lids are wide open: none covers the iris.
    dark, bright = (picture(mean_face(iris=iris, **fields), size) for iris in (0.0, 0.999))
    change, (x, y) = np.abs(dark - bright).sum(-1), np.meshgrid(np.arange(size), np.arange(size))
    for pupil in size * unit_points(mean_face(**fields), 5)[near] - 0.5:
        around = change * (np.hypot(x - pupil[0], y - pupil[1]) < 0.06 * size)
        disc = cv2.convexHull(np.argwhere(around > 0.15 * around.max())[:, ::-1].astype(np.int32))
        iris = cv2.fillConvexPoly(np.zeros((size, size), np.uint8), disc, 1) > 0
        assert np.abs([x[iris].mean() - pupil[0], y[iris].mean() - pupil[1]]).max() < 0.4


EDGES = [("lips", 0.0, 0.999, [77, 78, 79, 80, 81], [87, 86, 85, 84, 83]),
         ("hair", 0.0, 0.6, [34, 35, 36, 43, 44, 45], [41, 40, 39, 49, 48, 47]),
         ("light_x", -1.0, 1.0, [], [12, 13, 14, 15, 16, 17, 18, 19, 20])]


@pytest.mark.parametrize("name, first, second, upper, lower", EDGES)
@pytest.mark.parametrize("size", [128, 320])
def test_edges_of_drawn_features_are_at_the_points(name, first, second, upper, lower, size):
    """Where one colour (or light) decides, its change is 0 outside, full inside, half there."""
    fields = dict(light_x=0, lip_upper=0.13, lip_lower=0.16, brow_thick=0.12)
    one, other = (picture(mean_face(**{**fields, name: value}), size) for value in (first, second))
    change, points = np.abs(one - other).sum(-1), size * unit_points(mean_face(**fields), 98) - 0.5
    for rows, outward in ((upper, -1), (lower, 1)):
        if rows:
            along = np.roll(points, -1, 0)[rows] - np.roll(points, 1, 0)[rows]
            normal = along[:, ::-1] * [-1, 1] / np.linalg.norm(along, axis=1, keepdims=True)
            normal *= outward * np.sign(normal[:, 1:])
            outside, edge, inside = (sample(change, points[rows] + step * normal)
                                     for step in (1.5, 0, -1.5))
            assert (outside < 0.1 * inside).all() and (inside > 5).all()
            assert 0.3 < (edge / inside).mean() < 0.7
            assert (edge > 0.1 * inside).all() and (edge < 0.95 * inside).all()


@pytest.mark.parametrize("yaw, pitch", [(0.4, 0.2), (0.4, -0.2), (-0.4, 0.2), (-0.4, -0.2)])
def test_light_falls_on_the_side_that_it_comes_from(yaw, pitch):
    points = 128 * unit_points(mean_face(yaw=yaw, pitch=pitch), 98) - 0.5
    cheeks = [points[[6, 55]].mean(0), points[[26, 59]].mean(0)]
    left, right = (sample(picture(mean_face(yaw=yaw, pitch=pitch, light_x=x), 128).mean(-1), cheeks)
                   for x in (-3, 3))
    assert left[0] > 1.1 * right[0] and right[1] > 1.1 * left[1]


def test_conditions_show():
    faces = read_faces("train", 400, size=64)
    sharp = {tag: [] for tag in (*TAGS, "plain")}
    light = {tag: [] for tag in sharp}
    for face in faces:
        if len(face.tags) < 2:
            gray = cv2.cvtColor(face.image(), cv2.COLOR_RGB2GRAY)
            box = gray[20:44, 20:44]
            key = face.tags[0] if face.tags else "plain"
            sharp[key].append(cv2.Laplacian(box, cv2.CV_64F).std())
            light[key].append(box.mean())
    assert np.median(sharp["blur"]) < 0.7 * np.median(sharp["plain"])
    assert np.std(light["illumination"]) > 1.1 * np.std(light["plain"])


def test_occluder_hides_part_of_the_face_only_with_the_tag():
    for cover in (0.1, 0.4, 0.6, 0.9):                                   # hand, glasses, scarf, box
        q, hidden = mean_face(cover=cover), mean_face(cover=cover)
        plain = picture(q, 96)
        for name, value in CLEAR.items():
            setattr(hidden, name, np.full((1, 1), value))
        hidden.occlusion = np.full((1, 1), True)
        drawn = synthetic._Painter(hidden, 96, np.random.default_rng(7)).draw()
        part = (np.abs(drawn - plain).sum(-1) > 40).mean()
        assert 0.01 < part < 0.4


# ---- the set -------------------------------------------------------------------------------------


def test_records():
    faces = read_faces("test", 60, size=96, points=29, seed=4, per_identity=7)
    assert len(faces) == 60 and all(isinstance(face, Face) for face in faces)
    for i in (0, 13, 59):
        face, image = faces[i], faces[i].image()
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
        np.testing.assert_array_equal(image, draw_face(4, "test", i, 96, 7))
        np.testing.assert_array_equal(copy.deepcopy(face).image(), image)
        assert pickle.dumps(face)  # for loader processes
        assert face.points.dtype == np.float32
        assert face.identity == f"test-{i // 7:05d}" and set(face.tags) <= set(TAGS)


def test_face_is_a_function_of_its_index():
    few, many = read_faces("train", 5, points=98), read_faces("train", 50, points=98)
    alone = draw_face(0, "train", 4)
    for a, b in zip(few, many):
        np.testing.assert_array_equal(a.points, b.points)
        assert (a.box, a.identity, a.tags) == (b.box, b.identity, b.tags)
    np.random.seed(1)
    [face.image() for face in many[:6]]
    np.testing.assert_array_equal(many[4].image(), alone)
    images = [alone,
              *(draw_face(*which) for which in ((1, "train", 4), (0, "test", 4), (0, "train", 3)))]
    assert min(np.abs(a - b.astype(float)).mean() for i, a in enumerate(images)
               for b in images[:i]) > 5


def test_another_process_draws_the_same():
    code = """if True:
        import hashlib
        from common import synthetic
        faces = synthetic.read_faces("test", 12, seed=2)
        made = [faces[i].image().tobytes() + faces[i].points.tobytes() for i in (11, 3)]
        print(hashlib.sha256(b"".join(made)).hexdigest())"""
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                           check=True)
    lines = []
    exec(code, {"print": lines.append})
    assert there.stdout.strip() == lines[0]


def test_identity_is_shared_by_its_faces_and_not_by_the_splits():
    shapes = {}
    for split in ("train", "test"):
        q = synthetic._parameters(0, split, range(200), 10)
        look = np.hstack([getattr(q, name) for name in (*SHAPE, *synthetic.LOOK)
                          if name != "hairline"])
        shapes[split] = look.reshape(20, 10, -1)
        assert (shapes[split] == shapes[split][:, :1]).all()
        assert len(np.unique(q.yaw)) > 190                              # each face has its own pose
    everybody = np.concatenate([shapes[split][:, 0] for split in shapes])
    assert len(np.unique(everybody, axis=0)) == 40
    faces = read_faces("train", 30, per_identity=10)
    assert [face.identity for face in faces[::10]] == ["train-00000", "train-00001", "train-00002"]
    other = synthetic._parameters(1, "train", range(10), 10)
    assert (other.chin != synthetic._parameters(0, "train", range(10), 10).chin).all()


@pytest.mark.parametrize("points", SCHEMES)
def test_geometry_scales_with_size(points):
    sets = [read_faces("train", 20, size=size, points=points) for size in (96, 128, 256)]
    for small, middle, large in zip(*sets):
        for face, size in ((small, 96), (large, 256)):                 # pixel 0 is from -0.5 to 0.5
            for one, other in ((face.points, middle.points),
                               (np.array(face.box), np.array(middle.box))):
                np.testing.assert_allclose((one + 0.5) / size, (other + 0.5) / 128, atol=1e-6)


def test_pixels_scale_with_size():
    for index in range(4):
        q = [parameters(index) for _ in range(2)]
        small, large = picture(q[0], 96), picture(q[1], 192)
        shrunk = cv2.resize(large, (96, 96), interpolation=cv2.INTER_AREA)
        assert np.abs(shrunk - small)[32:64, 32:64].mean() < 6


def test_placement():
    faces, size = read_faces("test", 500, size=200, points=98), 200
    points = np.stack([face.points for face in faces])
    assert points.min() > 0 and points.max() < size - 1
    width = np.ptp(points[:, :33, 0], axis=1) / size
    assert 0.35 < width.min() and width.max() < 0.85 and 0.55 < np.median(width) < 0.72
    middle, extent = (points.max(1) + points.min(1)) / 2, np.ptp(points, axis=1).max(1)
    assert (middle.std(0) > 3).all() and np.abs(middle - (size - 1) / 2).max() < 0.12 * size
    box = np.array([face.box for face in faces])
    side = box[:, 2:] - box[:, :2]
    np.testing.assert_allclose(side[:, 0], side[:, 1], rtol=1e-9)          # square, loose, jittered
    assert (side[:, 0] > 1.05 * extent).all() and (side[:, 0] < 1.5 * extent).all()
    off = np.abs((box[:, 2:] + box[:, :2]) / 2 - middle).max(1) / extent
    assert off.max() < 0.1 and np.median(off) > 0.01


def test_tags_come_at_their_rates_and_mean_something():
    faces = read_faces("train", 2000)
    for tag, rate in TAGS.items():
        share = np.mean([tag in face.tags for face in faces])
        assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / 2000), tag
    assert 0.2 < np.mean([not face.tags for face in faces]) < 0.4
    q = synthetic._parameters(0, "train", range(2000), 10)
    yaw = np.degrees(np.abs(q.yaw[:, 0]))
    posed = np.array(["pose" in face.tags for face in faces])
    assert yaw[posed].min() >= 30 and 55 < yaw.max() <= 60 and yaw[~posed].max() < 30
    assert 0.4 < (q.yaw[posed] > 0).mean() < 0.6 and np.degrees(np.abs(q.roll)).max() < 26
    strong = (q.open > 0.2) | (q.smile > 0.6) | (q.lids < 0.6) | (q.frown > 0.5)
    strong = strong[:, 0]
    tagged = np.array(["expression" in face.tags for face in faces])
    assert strong[tagged].mean() > 0.95 and strong[~tagged].mean() < 0.2


@pytest.mark.parametrize("arguments, message", [
    (dict(split="val", count=1), "split is 'val'"), (dict(split="train", count=0), "count is 0"),
    (dict(split="train", count=1, points=69), "69 points"),
    (dict(split="train", count=1, per_identity=0), "per_identity is 0")])
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        read_faces(**arguments)


def test_faces_that_differ_in_geometry_have_one_look_and_no_tags():
    faces = synthetic.read_faces("train", 20, 64, geometry=True)
    assert not any(face.tags for face in faces)
    q = synthetic._parameters(0, "train", range(20), 10, geometry=True)
    plain = synthetic._parameters(0, "train", range(20), 10)
    assert all(len(np.unique(getattr(q, name))) == 1 for name in ("skin", "iris", "beard", "red"))
    assert np.array_equal(q.cheek, plain.cheek)  # the shapes of heads are those of the other faces
    assert q.roll.std() > 1.5 * plain.roll.std() and q.yaw.std() < 0.5 * plain.yaw.std()
    assert np.array_equal(faces[3].image(), synthetic.draw_face(0, "train", 3, 64, geometry=True))
