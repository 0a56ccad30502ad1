"""What the points of a face mean: published flips and curves, mirrors, and lengths to divide by."""
import itertools

import numpy as np
import pytest
import torch

from common import UserError, schemes, synthetic, warp
from common.schemes import SCHEMES, flip_residual, group_means, norm_kind, normaliser

RNG = np.random.default_rng(0)

# Pairs that mirror each other, as they are listed in published code; all else is on the midline.
PAIRS = {
    5: "0-1 3-4",
    19: "0-5 1-4 2-3 6-11 7-10 8-9 12-14 15-17",
    29: "0-1 2-3 4-6 5-7 8-9 10-11 12-14 13-15 16-17 18-19 22-23",
    68: "0-16 1-15 2-14 3-13 4-12 5-11 6-10 7-9 17-26 18-25 19-24 20-23 21-22 31-35 32-34 36-45 "
        "37-44 38-43 39-42 40-47 41-46 48-54 49-53 50-52 55-59 56-58 60-64 61-63 65-67",
    98: "0-32 1-31 2-30 3-29 4-28 5-27 6-26 7-25 8-24 9-23 10-22 11-21 12-20 13-19 14-18 15-17 "
        "33-46 34-45 35-44 36-43 37-42 38-50 39-49 40-48 41-47 55-59 56-58 60-72 61-71 62-70 "
        "63-69 64-68 65-75 66-74 67-73 76-82 77-81 78-80 83-87 84-86 88-92 89-91 93-95 96-97"}
MIDLINES = {5: [2], 19: [13, 16, 18], 29: [20, 21, *range(24, 29)],
            68: [8, 27, 28, 29, 30, 33, 51, 57, 62, 66],
            98: [16, 51, 52, 53, 54, 57, 79, 85, 90, 94],
            106: [16, 51, 52, 53, 54, 60, 87, 93, 98, 102], 194: [20, 49, 93, 107]}
# The whole permutations of LaPa and HELEN, blocks read backwards or in place of each other.
LAPA = [*range(32, -1, -1), 46, 45, 44, 43, 42, 50, 49, 48, 47, 37, 36, 35, 34, 33, 41, 40, 39, 38,
        51, 52, 53, 54, *range(65, 54, -1), 79, 78, 77, 76, 75, 82, 81, 80, 83, 70, 69, 68, 67, 66,
        73, 72, 71, 74, *range(90, 83, -1), *range(95, 90, -1), *range(100, 95, -1), 103, 102, 101,
        105, 104]
HELEN = [*range(40, -1, -1), *range(57, 40, -1), *range(71, 57, -1), *range(85, 71, -1),
         *range(100, 85, -1), *range(113, 100, -1), *range(134, 154), *range(114, 134),
         *range(174, 194), *range(154, 174)]


def test_flips_are_the_published_ones():
    assert sorted(SCHEMES) == [5, 19, 29, 68, 98, 106, 194]
    for points, scheme in SCHEMES.items():
        flip = scheme.flip
        assert scheme.points == points and flip.shape == (points,) and flip.dtype == np.int64
        assert (flip[flip] == np.arange(points)).all()
        assert np.flatnonzero(flip == np.arange(points)).tolist() == MIDLINES[points]
        for pair in PAIRS.get(points, "").split():
            a, b = map(int, pair.split("-"))
            assert flip[a] == b and flip[b] == a
    assert len(PAIRS[98].split()) == 44 and len(PAIRS[68].split()) == 29
    assert SCHEMES[106].flip.tolist() == LAPA and SCHEMES[194].flip.tolist() == HELEN


def test_named_groups_mirror_each_other():
    for scheme in SCHEMES.values():
        flip = scheme.flip
        assert (flip[list(scheme.eyes)] == scheme.eyes[::-1]).all()
        assert sorted(flip[list(scheme.pupils[0])]) == sorted(scheme.pupils[1])
        for left, right in ((0, 1), (2, 2), (3, 4)):
            assert sorted(flip[list(scheme.five[left])]) == sorted(scheme.five[right])
        curves = {name: ids for name, ids in scheme.curves.items() if "contour" not in name}
        if scheme.points == 194:  # the published curves cut the inner lips before their corner, 100
            curves["lip_inner_upper"] = range(86, 101)
            curves["lip_inner_lower"] = range(101, 114)
        for groups in (scheme.anchors, curves):
            for name, ids in groups.items():
                sides = ("_left", "_right") if "_left" in name else ("_right", "_left")
                other = name.replace(*sides)
                assert sorted(flip[list(ids)]) == sorted(groups[other]), (scheme.points, name)


def test_curves_cover_the_points_in_the_published_order():
    names = ("contour_left contour_right brow_left brow_right nose_bridge nose_base eye_left "
             "eye_right lip_outer_upper lip_outer_lower lip_inner_upper lip_inner_lower").split()
    helen = [*names[:2], "nose", *names[8:], "eye_right", "eye_left", "brow_right", "brow_left"]
    tables = {68: (names, (0, 9, 17, 22, 27, 31, 36, 42, 48, 55, 60, 65, 68)),
              98: (names, (0, 17, 33, 42, 51, 55, 60, 68, 76, 83, 88, 93, 96)),
              194: (helen, (0, 21, 41, 58, 72, 86, 100, 114, 134, 154, 174, 194))}
    for points, (wanted, bounds) in tables.items():
        spans = zip(wanted, itertools.pairwise(bounds), strict=True)
        assert list(SCHEMES[points].curves.items()) == [
            (name, list(range(a, b))) for name, (a, b) in spans]
    for points, scheme in SCHEMES.items():
        covered = sorted(sum(scheme.curves.values(), []))
        assert covered == list(range(96 if points == 98 else points))
        assert sorted(sum(scheme.parts.values(), [])) == covered
        assert list(scheme.parts) == ["contour", "brows", "nose", "eyes", "mouth"]
    assert SCHEMES[68].parts["eyes"] == list(range(36, 48))
    assert SCHEMES[194].parts["mouth"] == list(range(58, 114))
    assert SCHEMES[29].curves["eye_left"] == [8, 12, 10, 13]
    assert SCHEMES[19].parts["contour"] == [18]


def test_anchors_and_special_points():
    assert {points: scheme.eyes for points, scheme in SCHEMES.items()} == {
        5: (0, 1), 19: (6, 11), 29: (8, 9), 68: (36, 45), 98: (60, 72), 106: (66, 79),
        194: (144, 124)}
    assert SCHEMES[98].five == ((96,), (97,), (54,), (76,), (82,))
    assert SCHEMES[106].five == ((104,), (105,), (54,), (84,), (90,))
    assert SCHEMES[29].five == ((16,), (17,), (20,), (22,), (23,))
    assert SCHEMES[5].five == ((0,), (1,), (2,), (3,), (4,))
    eyes = [list(range(36, 42)), list(range(42, 48))]
    assert [sorted(group) for group in SCHEMES[68].five] == [*eyes, [30], [48], [54]]
    table = {"chin": (8, 16, 20), "eye_outer_left": (36, 60, 144), "eye_inner_left": (39, 64, 134),
             "eye_inner_right": (42, 68, 114), "eye_outer_right": (45, 72, 124),
             "nose_base": (33, 57, 49), "mouth_left": (48, 76, 58), "mouth_right": (54, 82, 71),
             "lip_inner_left": (60, 88, 86), "lip_inner_right": (64, 92, 100),
             "lip_inner_top": (62, 90, 93), "lip_inner_bottom": (66, 94, 107),
             "brow_outer_left": (17, 33, 184), "brow_outer_right": (26, 46, 164)}
    for name, ids in table.items():
        assert [SCHEMES[points].anchors[name] for points in (68, 98, 194)] == [(i,) for i in ids]


def test_recognition_points_are_arcfaces_template():
    left, right, nose, *mouth = schemes.ARCFACE_5
    assert schemes.ARCFACE_5.shape == (5, 2)
    assert schemes.ARCFACE_5.sum(0) == pytest.approx([280.1308, 359.5039])  # no digit is lost
    assert left[0] < nose[0] < right[0] and mouth[0][0] < nose[0] < mouth[1][0]
    assert max(left[1], right[1]) < nose[1] < min(mouth[0][1], mouth[1][1]) < 112
    assert flip_residual(schemes.ARCFACE_5[None], SCHEMES[5].flip) < 0.02


def test_group_means_are_the_same_in_numpy_and_torch():
    points = RNG.normal(size=(3, 68, 2))
    five = group_means(points, SCHEMES[68].five)
    np.testing.assert_allclose(five[1, 1], points[1, 42:48].mean(0))
    np.testing.assert_allclose(five[2, 4], points[2, 54])
    same = group_means(torch.from_numpy(points), SCHEMES[68].five)
    np.testing.assert_allclose(same.numpy(), five)


def test_flip_residual():
    for scheme in SCHEMES.values():  # random shapes, each its own mirror image about x = 50
        points = RNG.uniform(0, 100, (3, scheme.points, 2))
        mirror = np.stack([100 - points[..., 0], points[..., 1]], -1)[:, scheme.flip]
        assert flip_residual((points + mirror) / 2, scheme.flip) < 1e-12
    # nose at 0.2 of the width
    square = np.array([[[0, 0], [10, 0], [2, 5], [0, 20], [10, 20]]], float)
    assert flip_residual(square, SCHEMES[5].flip) == pytest.approx(0.6)
    assert flip_residual(square, np.arange(5)) == pytest.approx(1)  # each corner is 1 off
    both = np.concatenate([square, square * [-1, 1]])
    both[1] = both[1][SCHEMES[5].flip] * 7 + 3  # seen from the other side, larger, elsewhere
    assert flip_residual(both, SCHEMES[5].flip) < 1e-12


def test_drawn_faces_agree_with_the_schemes():
    """All schemes are read off the same heads: a name is one place in all, whatever the pose."""
    drawn = {points: synthetic.read_faces("test", 200, size=256, points=points)
             for points in SCHEMES}
    drawn = {points: np.stack([face.points for face in faces]) for points, faces in drawn.items()}
    side = np.sqrt(np.ptp(drawn[98], axis=1).prod(-1))  # (M,) px
    for points, scheme in SCHEMES.items():
        assert flip_residual(drawn[points], scheme.flip) < 0.08
        assert flip_residual(drawn[points], np.arange(points)) > 0.6
        for name in scheme.anchors:
            first = next(p for p in SCHEMES if name in SCHEMES[p].anchors)
            here, there = (group_means(drawn[p], [SCHEMES[p].anchors[name]])[:, 0]
                           for p in (points, first))
            gap = np.linalg.norm(here - there, axis=-1) / side
            assert gap.mean() < 0.025, (name, points, first)
        five = group_means(drawn[points], scheme.five)
        assert (five[:, 0, 0] < five[:, 1, 0]).all() and (five[:, 3, 0] < five[:, 4, 0]).all()
        gap = np.linalg.norm(five - drawn[5], axis=-1) / side[:, None]
        assert (gap.mean(0) < [0.02, 0.02, 0.1 if points == 194 else 0.02, 0.02, 0.02]).all()


def test_every_point_of_a_drawn_mean_face_is_near_its_mirror():
    """Mirrored, renamed by the flip, fitted back by a similarity: no point is 2 % of a face off."""
    for points, scheme in SCHEMES.items():
        faces = synthetic.read_faces("train", 200, size=256, points=points)
        shapes = torch.from_numpy(np.stack([face.points for face in faces])).double()
        mean = shapes[0]
        for _ in range(3):
            fit = warp.fit_similarity(shapes, mean.expand_as(shapes))
            mean = warp.apply_affine(fit, shapes).mean(0)
        mirror = mean[scheme.flip] * mean.new_tensor([-1, 1])
        back = warp.apply_affine(warp.fit_similarity(mirror, mean), mirror)
        side = (mean.amax(0) - mean.amin(0)).prod().sqrt()
        assert (back - mean).norm(dim=1).max() < 0.02 * side, points


def test_normaliser():
    points = torch.zeros(2, 68, 2, dtype=torch.float64)
    points[:, :, 0] = torch.arange(68)
    points[0, 36] = torch.tensor([10.0, 20.0])
    points[0, 45] = torch.tensor([13.0, 24.0])
    points[1, 3, 1] = 25
    assert normaliser(points, "io").tolist() == [5, 9]
    assert normaliser(points, "ip")[1] == 6  # mean of 42-47 minus mean of 36-41
    assert normaliser(points, "box")[1] == pytest.approx((67 * 25) ** 0.5)
    boxes = torch.tensor([[0, 0, 4, 9], [1, 2, 11, 42]])
    assert normaliser(points, "face", boxes).tolist() == [6, 20]
    helen = torch.arange(194.0).view(1, -1, 1).repeat(1, 1, 2) * torch.tensor([1.0, 0])
    helen[:, 124, 0] += 100
    assert normaliser(helen, "io").item() == 80 and normaliser(helen, "io-published").item() == 20
    assert normaliser(np.ones((1, 7, 2)) * np.arange(7)[:, None], "box").item() == 6


def test_normaliser_says_what_works():
    for points, kind, message in (
            (5, "io", "no normaliser 'io' for 5 points; what works: ip, box, face"),
            (7, "ip", "'ip' for 7 points; what works: box, face"),
            (98, "face", "no normaliser 'face' for 98 points; what works: ip, io, box"),
            (98, "io-published", "'io-published' for 98")):
        with pytest.raises(UserError, match=message):
            normaliser(torch.rand(2, points, 2), kind)
    points = torch.rand(3, 68, 2)
    points[1, 36] = points[1, 45]
    with pytest.raises(UserError, match="'io' is 0 px for face 1, wanted .* so for 1 of 3 faces"):
        normaliser(points, "io")
    with pytest.raises(UserError, match="for face 0"):
        normaliser(torch.full((1, 68, 2), float("nan")), "box")


def test_norm_auto_is_the_papers_normaliser():
    wanted = {5: "ip", 11: "box", 19: "face", 29: "io", 68: "io", 194: "io"}
    assert {points: norm_kind("auto", points) for points in wanted} == wanted
    assert norm_kind("auto", 19, boxed=False) == "box" and norm_kind("ip", 68) == "ip"
