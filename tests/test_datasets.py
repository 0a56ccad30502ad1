"""Records, landmark schemes, file formats and readers, on small trees in the true formats."""

import itertools
import os
import struct
import sys
import warnings
import zlib

import cv2
import numpy as np
import pytest
import torch

from common import UserError, datasets, formats, synthetic, warp

from common.datasets import SCHEMES, Face, load_image, normaliser, read, read_mat, read_pts, write_pts

pytestmark = pytest.mark.filterwarnings("ignore:.*in the official one")
RNG = np.random.default_rng(0)


def draw_points(count, low=-3.0, high=90.0):
    """(count, 2) with two decimals, some outside an image of 64 x 48."""
    return np.round(RNG.uniform(low, high, (count, 2)), 2)


def put_image(path, value=100, shape=(48, 64, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full(shape, value, np.uint8))


def put_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def put_pts(path, points, end="\n", tail=""):
    """A `.pts` as 300-W has it: counted from 1."""
    rows = end.join(f"{x + 1:.6f} {y + 1:.6f}" for x, y in points)
    put_text(path, f"version: 1{end}n_points:  {len(points)}{end}{{{end}{rows}{end}}}{end}{tail}")


def flat(points):
    return [f"{value:g}" for value in np.ravel(points)]


# ---- Records -----------------------------------------------------------------------------------------------


def test_load_image_gives_rgb_from_every_kind_of_file(tmp_path):
    bgr = RNG.integers(0, 256, (5, 7, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "colour.png"), bgr)
    cv2.imwrite(str(tmp_path / "gray.png"), bgr[..., 0])
    cv2.imwrite(str(tmp_path / "alpha.jpg.png"), np.dstack([bgr, np.full((5, 7), 9, np.uint8)]))
    (tmp_path / "alpha.jpg.png").rename(tmp_path / "alpha.jpg")         # PNG data, with alpha, named .jpg
    np.testing.assert_array_equal(load_image(str(tmp_path / "colour.png")), bgr[..., ::-1])
    np.testing.assert_array_equal(load_image(tmp_path / "alpha.jpg"), bgr[..., ::-1])
    np.testing.assert_array_equal(load_image(str(tmp_path / "gray.png")), bgr[..., :1].repeat(3, 2))
    for image in (bgr[..., 0], lambda: bgr[..., 0]):
        np.testing.assert_array_equal(load_image(image), bgr[..., :1].repeat(3, 2))
    turned = load_image(bgr[:, ::-1])
    assert turned.flags.c_contiguous and (turned == bgr[:, ::-1]).all()


def test_load_image_ignores_the_orientation_tag(tmp_path):
    """A JPEG whose EXIF says "turn by 90 degrees": points belong to the stored pixels."""
    jpeg = cv2.imencode(".jpg", np.zeros((16, 40, 3), np.uint8))[1].tobytes()
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
    exif = b"Exif\0\0" + tiff
    exif = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (tmp_path / "a.jpg").write_bytes(jpeg[:2] + exif + jpeg[2:])
    assert cv2.imread(str(tmp_path / "a.jpg")).shape == (40, 16, 3)     # the tag is there, cv2 would obey it
    assert load_image(str(tmp_path / "a.jpg")).shape == (16, 40, 3)


def test_load_image_names_what_is_wrong(tmp_path):
    put_text(tmp_path / "page.jpg", "<html>")
    with pytest.raises(FileNotFoundError, match="nowhere.jpg"):
        load_image(str(tmp_path / "nowhere.jpg"))
    with pytest.raises(ValueError, match="page.jpg cannot be decoded"):
        load_image(str(tmp_path / "page.jpg"))
    for shape, dtype in (((4, 4, 3), float), ((4, 4, 4), np.uint8), ((4,), np.uint8), ((0, 4), np.uint8)):
        with pytest.raises(ValueError, match="wanted uint8"):
            load_image(np.zeros(shape, dtype))


def test_check_images_names_the_first_and_counts_all(tmp_path):
    put_image(tmp_path / "good.png")
    put_text(tmp_path / "bad.png", "no image")
    good, bad, gone = (Face(str(tmp_path / name)) for name in ("good.png", "bad.png", "gone.png"))
    datasets.check_images([good, good, Face(np.zeros((2, 2, 3), np.uint8)), Face(lambda: None)])
    with pytest.raises(ValueError, match="bad.png is no image .* 2 images, missing 0, undecodable 1"):
        datasets.check_images([good, bad, bad])
    with pytest.raises(FileNotFoundError, match="bad.png is no image .* 3 images, missing 1, undecodable 1"):
        datasets.check_images([good, bad, gone])
    with pytest.raises(FileNotFoundError, match="gone.png does not exist; of 2 images, missing 1, undecod"):
        datasets.check_images([gone, bad, gone])
    listed = Face(gone.image, where="list.txt:7")
    with pytest.raises(FileNotFoundError, match=r"gone.png does not exist \(listed in list.txt:7\); of 2"):
        datasets.check_images([good, listed])


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_check_images_warns_of_files_that_are_cut_short(tmp_path, name, recwarn):
    path = tmp_path / name
    put_image(path)
    datasets.check_images([Face(str(path))])
    assert not recwarn
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=f"{name} and 0 other images seem to be cut short"):
        datasets.check_images([Face(str(path))])


# ---- Schemes -----------------------------------------------------------------------------------------------

# Pairs that mirror each other, as they are listed in published code; all else is on the midline.
PAIRS = {
    5: "0-1 3-4",
    19: "0-5 1-4 2-3 6-11 7-10 8-9 12-14 15-17",
    29: "0-1 2-3 4-6 5-7 8-9 10-11 12-14 13-15 16-17 18-19 22-23",
    68: "0-16 1-15 2-14 3-13 4-12 5-11 6-10 7-9 17-26 18-25 19-24 20-23 21-22 31-35 32-34 36-45 37-44 38-43 "
        "39-42 40-47 41-46 48-54 49-53 50-52 55-59 56-58 60-64 61-63 65-67",
    98: "0-32 1-31 2-30 3-29 4-28 5-27 6-26 7-25 8-24 9-23 10-22 11-21 12-20 13-19 14-18 15-17 33-46 34-45 "
        "35-44 36-43 37-42 38-50 39-49 40-48 41-47 55-59 56-58 60-72 61-71 62-70 63-69 64-68 65-75 66-74 "
        "67-73 76-82 77-81 78-80 83-87 84-86 88-92 89-91 93-95 96-97",
}
MIDLINES = {5: [2], 19: [13, 16, 18], 29: [20, 21, *range(24, 29)], 194: [20, 49, 93, 107],
            68: [8, 27, 28, 29, 30, 33, 51, 57, 62, 66], 98: [16, 51, 52, 53, 54, 57, 79, 85, 90, 94],
            106: [16, 51, 52, 53, 54, 60, 87, 93, 98, 102]}
# The whole permutations of LaPa and HELEN, blocks read backwards or in place of each other.
LAPA = [*range(32, -1, -1), 46, 45, 44, 43, 42, 50, 49, 48, 47, 37, 36, 35, 34, 33, 41, 40, 39, 38,
        51, 52, 53, 54, *range(65, 54, -1), 79, 78, 77, 76, 75, 82, 81, 80, 83, 70, 69, 68, 67, 66, 73, 72,
        71, 74, *range(90, 83, -1), *range(95, 90, -1), *range(100, 95, -1), 103, 102, 101, 105, 104]
HELEN = [*range(40, -1, -1), *range(57, 40, -1), *range(71, 57, -1), *range(85, 71, -1), *range(100, 85, -1),
         *range(113, 100, -1), *range(134, 154), *range(114, 134), *range(174, 194), *range(154, 174)]


def test_flips_are_the_published_ones():
    assert sorted(SCHEMES) == [5, 19, 29, 68, 98, 106, 194]
    for points, scheme in SCHEMES.items():
        assert scheme.points == points and scheme.flip.shape == (points,) and scheme.flip.dtype == np.int64
        assert (scheme.flip[scheme.flip] == np.arange(points)).all()
        assert np.flatnonzero(scheme.flip == np.arange(points)).tolist() == MIDLINES[points]
        for a, b in (map(int, pair.split("-")) for pair in PAIRS.get(points, "").split()):
            assert scheme.flip[a] == b and scheme.flip[b] == a
    assert len(PAIRS[98].split()) == 44 and len(PAIRS[68].split()) == 29
    assert SCHEMES[106].flip.tolist() == LAPA and SCHEMES[194].flip.tolist() == HELEN


def test_named_groups_mirror_each_other():
    for scheme in SCHEMES.values():
        flip = scheme.flip
        assert (flip[list(scheme.eyes)] == scheme.eyes[::-1]).all()
        assert sorted(flip[list(scheme.pupils[0])]) == sorted(scheme.pupils[1])
        for left, right in ((0, 1), (2, 2), (3, 4)):
            assert sorted(flip[list(scheme.five[left])]) == sorted(scheme.five[right])
        curves = {name: ids for name, ids in scheme.curves.items() if not name.startswith("contour")}
        if scheme.points == 194:  # the published curves cut the loop of the inner lips before its corner, 100
            curves["lip_inner_upper"] = range(86, 101)
            curves["lip_inner_lower"] = range(101, 114)
        for groups in (scheme.anchors, curves):
            for name, ids in groups.items():
                sides = ("_left", "_right") if "_left" in name else ("_right", "_left")
                other = name.replace(*sides)
                assert sorted(flip[list(ids)]) == sorted(groups[other]), (scheme.points, name)


def test_curves_cover_the_points_in_the_published_order():
    names = ("contour_left contour_right brow_left brow_right nose_bridge nose_base eye_left eye_right "
             "lip_outer_upper lip_outer_lower lip_inner_upper lip_inner_lower").split()
    helen = [*names[:2], "nose", *names[8:], "eye_right", "eye_left", "brow_right", "brow_left"]
    tables = {68: (names, (0, 9, 17, 22, 27, 31, 36, 42, 48, 55, 60, 65, 68)),
              98: (names, (0, 17, 33, 42, 51, 55, 60, 68, 76, 83, 88, 93, 96)),
              194: (helen, (0, 21, 41, 58, 72, 86, 100, 114, 134, 154, 174, 194))}
    for points, (wanted, bounds) in tables.items():
        spans = zip(wanted, itertools.pairwise(bounds), strict=True)
        assert list(SCHEMES[points].curves.items()) == [(name, list(range(a, b))) for name, (a, b) in spans]
    for points, scheme in SCHEMES.items():
        covered = sorted(sum(scheme.curves.values(), []))
        assert covered == list(range(96 if points == 98 else points))
        assert sorted(sum(scheme.parts.values(), [])) == covered
        assert list(scheme.parts) == ["contour", "brows", "nose", "eyes", "mouth"]
    assert SCHEMES[68].parts["eyes"] == list(range(36, 48))
    assert SCHEMES[194].parts["mouth"] == list(range(58, 114))
    assert SCHEMES[29].curves["eye_left"] == [8, 12, 10, 13] and SCHEMES[19].parts["contour"] == [18]


def test_anchors_and_special_points():
    assert {points: scheme.eyes for points, scheme in SCHEMES.items()} == {
        5: (0, 1), 19: (6, 11), 29: (8, 9), 68: (36, 45), 98: (60, 72), 106: (66, 79), 194: (144, 124)}
    assert SCHEMES[194].eyes_published == (145, 125) and SCHEMES[68].eyes_published is None
    assert SCHEMES[98].five == ((96,), (97,), (54,), (76,), (82,))
    assert SCHEMES[106].five == ((104,), (105,), (54,), (84,), (90,))
    assert SCHEMES[29].five == ((16,), (17,), (20,), (22,), (23,))
    assert SCHEMES[5].five == ((0,), (1,), (2,), (3,), (4,))
    eyes = [list(range(36, 42)), list(range(42, 48))]
    assert [sorted(group) for group in SCHEMES[68].five] == [*eyes, [30], [48], [54]]
    table = {"chin": (8, 16, 20), "eye_outer_left": (36, 60, 144), "eye_inner_left": (39, 64, 134),
             "eye_inner_right": (42, 68, 114), "eye_outer_right": (45, 72, 124), "nose_base": (33, 57, 49),
             "mouth_left": (48, 76, 58), "mouth_right": (54, 82, 71), "lip_inner_left": (60, 88, 86),
             "lip_inner_right": (64, 92, 100), "lip_inner_top": (62, 90, 93), "lip_inner_bottom": (66, 94, 107),
              "brow_outer_left": (17, 33, 184),
             "brow_outer_right": (26, 46, 164)}
    for name, ids in table.items():
        assert tuple(SCHEMES[points].anchors[name] for points in (68, 98, 194)) == tuple((i,) for i in ids)


def test_recognition_points_are_arcfaces_template():
    left, right, nose, *mouth = datasets.ARCFACE_5
    assert datasets.ARCFACE_5.shape == (5, 2)
    assert datasets.ARCFACE_5.sum(0) == pytest.approx([280.1308, 359.5039])  # no digit is lost
    assert left[0] < nose[0] < right[0] and mouth[0][0] < nose[0] < mouth[1][0]  # image-left first
    assert max(left[1], right[1]) < nose[1] < min(mouth[0][1], mouth[1][1]) < 112
    assert datasets.flip_residual(datasets.ARCFACE_5[None], SCHEMES[5].flip) < 0.02


def test_group_means_are_the_same_in_numpy_and_torch():
    points = RNG.normal(size=(3, 68, 2))
    five = datasets.group_means(points, SCHEMES[68].five)
    np.testing.assert_allclose(five[1, 1], points[1, 42:48].mean(0))
    np.testing.assert_allclose(five[2, 4], points[2, 54])
    np.testing.assert_allclose(datasets.group_means(torch.from_numpy(points), SCHEMES[68].five).numpy(), five)


def symmetric(scheme, count=1):
    """(count, P, 2) random shapes, each its own mirror image about x = 50."""
    points = RNG.uniform(0, 100, (count, scheme.points, 2))
    return (points + np.stack([100 - points[..., 0], points[..., 1]], -1)[:, scheme.flip]) / 2


def test_flip_residual():
    for scheme in SCHEMES.values():
        assert datasets.flip_residual(symmetric(scheme, 3), scheme.flip) < 1e-12
    square = np.array([[[0, 0], [10, 0], [2, 5], [0, 20], [10, 20]]], float)  # nose at 0.2 of the width
    assert datasets.flip_residual(square, SCHEMES[5].flip) == pytest.approx(0.6)
    assert datasets.flip_residual(square, np.arange(5)) == pytest.approx(1)  # each corner is 1 off
    both = np.concatenate([square, square * [-1, 1]])
    both[1] = both[1][SCHEMES[5].flip] * 7 + 3  # seen from the other side, larger, elsewhere
    assert datasets.flip_residual(both, SCHEMES[5].flip) < 1e-12


def test_drawn_faces_agree_with_the_schemes():
    """All schemes are read off the same heads, so a name is one place in all of them, whatever the pose."""
    drawn = {points: synthetic.read_faces("test", 200, size=256, points=points) for points in SCHEMES}
    drawn = {points: np.stack([face.points for face in faces]) for points, faces in drawn.items()}
    side = np.sqrt(np.ptp(drawn[98], axis=1).prod(-1))                          # (M,) px
    for points, scheme in SCHEMES.items():
        assert datasets.flip_residual(drawn[points], scheme.flip) < 0.08
        assert datasets.flip_residual(drawn[points], np.arange(points)) > 0.6
        for name in scheme.anchors:
            others = [p for p in SCHEMES if name in SCHEMES[p].anchors]
            here, there = (datasets.group_means(drawn[p], [SCHEMES[p].anchors[name]])[:, 0]
                           for p in (points, others[0]))
            assert (np.linalg.norm(here - there, axis=-1) / side).mean() < 0.025, (name, points, others[0])
        five = datasets.group_means(drawn[points], scheme.five)
        assert (five[:, 0, 0] < five[:, 1, 0]).all() and (five[:, 3, 0] < five[:, 4, 0]).all()
        gap = np.linalg.norm(five - drawn[5], axis=-1) / side[:, None]
        assert (gap.mean(0) < [0.02, 0.02, 0.1 if points == 194 else 0.02, 0.02, 0.02]).all()


def test_normaliser():
    points = torch.zeros(2, 68, 2, dtype=torch.float64)
    points[:, :, 0] = torch.arange(68)
    points[0, 36], points[0, 45] = torch.tensor([10.0, 20.0]), torch.tensor([13.0, 24.0])
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
    with pytest.raises(ValueError, match="no normaliser 'io' for 5 points; what works: ip, box, face"):
        normaliser(torch.rand(2, 5, 2), "io")
    with pytest.raises(ValueError, match="'ip' for 7 points; what works: box, face"):
        normaliser(torch.rand(2, 7, 2), "ip")
    with pytest.raises(ValueError, match="no normaliser 'face' for 98 points; what works: ip, io, box"):
        normaliser(torch.rand(2, 98, 2), "face")
    with pytest.raises(ValueError, match="'io-published' for 98"):
        normaliser(torch.rand(2, 98, 2), "io-published")
    points = torch.rand(3, 68, 2)
    points[1, 36] = points[1, 45]
    with pytest.raises(ValueError, match="'io' is 0 px for face 1, wanted more than 0; so for 1 of 3 faces"):
        normaliser(points, "io")
    with pytest.raises(ValueError, match="for face 0"):
        normaliser(torch.full((1, 68, 2), float("nan")), "box")


# ---- File formats ------------------------------------------------------------------------------------------


def test_pts_counts_from_one_and_takes_any_white_space(tmp_path):
    points = draw_points(7)
    path = tmp_path / "a b.pts"
    for end, tail in (("\n", ""), ("\r\n", ""), ("\n", "\n \n\n"), ("\r\n", "\r\n\r\n")):
        put_pts(path, points, end, tail)
        np.testing.assert_allclose(read_pts(str(path)), points, atol=1e-5)
    assert read_pts(str(path)).dtype == np.float32
    put_text(path, "\ufeff  n_points :3\n{\n\n 1 1\n2.5\t0 \n-3 4e1\n\n}")
    assert read_pts(str(path)).tolist() == [[0, 0], [1.5, -1], [-4, 39]]
    for text in ("\ufeff12.5 20\r\n  30 40.25 \r\n}\r\n", "12.5 20\n30 40.25", "version: 1\n{\n12.5 20\n30 40.25\n}"):
        put_text(path, text)  # without the lines before the points, as some public copies of AFW and HELEN
        assert read_pts(str(path)).tolist() == [[11.5, 19], [29, 39.25]]


def test_pts_written_are_the_same_when_read(tmp_path):
    path = str(tmp_path / "a.pts")
    points = torch.tensor([[0.0, 9.5], [-2.25, 100.125]], requires_grad=True)
    write_pts(path, points)
    text = (tmp_path / "a.pts").read_text()
    assert text == "version: 1\nn_points: 2\n{\n1.0000 10.5000\n-1.2500 101.1250\n}\n"
    np.testing.assert_array_equal(read_pts(path), points.detach().numpy())
    for bad in (np.zeros((0, 2)), np.zeros(4), np.zeros((2, 3)), np.full((2, 2), np.inf)):
        with pytest.raises(ValueError, match="a.pts: found points .* wanted"):
            write_pts(path, bad)


@pytest.mark.parametrize("text, message", [
    ("version: 1\nn_points: 2\n{\n1 2\n3 nan\n}\n", r"a.pts:5: found nan, wanted a finite"),
    ("version: 1\nn_points: 2\n{\n1 2\n\n3 4 5\n}\n", r"a.pts:6: found 3 numbers, wanted 2"),
    ("version: 1\nn_points: 2\n{\n1 2\n3 x4\n}\n", r"a.pts:5: .*x4.* wanted a number"),
    ("version: 1\nn_points: 3\n{\n1 2\n3 4\n}\n", r"a.pts: found 2 points, wanted 3"),
    ("version: 1\nn_points: 2\n{\n1 2 3\n4\n}\n", r"a.pts:4: found 3 numbers, wanted 2"),
    ("version: 1\nn_points: 0\n{\n}\n", r"a.pts: found 0 points, wanted 1"),
    ("", r"a.pts: found 0 points, wanted 1"),
    ("version: 1\nn_points: 2\n{\n1 2\n3 4\n", r"a.pts: found no line }: it is cut short"),
    ("version: 1\nn_points: 2\n{\n12,5 2\n3 4,25\n}\n", r"a.pts:4: found '12,5 2', with decimal commas"),
])
def test_pts_errors_name_file_and_line(tmp_path, text, message):
    put_text(tmp_path / "a.pts", text)
    with pytest.raises(ValueError, match=message):
        read_pts(str(tmp_path / "a.pts"))


def test_points_of_a_detector_by_image(tmp_path):
    first, second, third = (draw_points(5) for _ in range(3))
    rows = [",".join([name, *flat(points)]) for name, points in
            (("a/one.jpg", first), ("./b c.png", second), ("a//one.jpg", third))]
    for header in ("", "image,x0,y0,x1,y1\n", "\ufefffile, left_x\r\n"):
        put_text(tmp_path / "five.csv", header + "\n\n".join(rows) + "\n")
        found = datasets.read_points_csv(str(tmp_path / "five.csv"))
        assert list(found) == ["a/one.jpg", "b c.png"] and found["b c.png"].shape == (1, 5, 2)
        np.testing.assert_allclose(found["a/one.jpg"], np.stack([first, third]), atol=1e-5)
        assert found["a/one.jpg"].dtype == np.float32
    put_text(tmp_path / "five.csv", "a.jpg, -1.5, .5,+2 ,3e1\n")
    assert datasets.read_points_csv(str(tmp_path / "five.csv"))["a.jpg"].tolist() == [[[-1.5, 0.5], [2, 30]]]


@pytest.mark.parametrize("text, message", [
    ("image,x0,y0\na.jpg,1,2,3,4\nb.jpg,1,2,3\n", r"five.csv:3: found 3 numbers, wanted 4"),
    ("a.jpg,1,2,3\n", r"five.csv:1: found 3 numbers, wanted 2"),
    ("a.jpg,1,2\n\nb.jpg,1,x\n", r"five.csv:3: .*'x'.* wanted a number"),
    ("a.jpg,1,2\nb.jpg,inf,2\n", r"five.csv:2: found inf, wanted a finite number"),
    ("a.jpg,nan,2\nb.jpg,1,2\n", r"five.csv:1: found nan, wanted a finite number"),
    ("a.jpg\n", r"five.csv:1: found 'a.jpg', wanted image,x0,y0,x1,y1"),
    ("image,x0,y0\n", r"five.csv has no row image,x0,y0"), ("", r"five.csv has no row"),
])
def test_points_of_a_detector_name_the_bad_line(tmp_path, text, message):
    put_text(tmp_path / "five.csv", text)
    with pytest.raises(ValueError, match=message):
        datasets.read_points_csv(str(tmp_path / "five.csv"))


class Mat:
    """MATLAB 5 bytes by hand: tags, padding to 8, small elements for up to 4 bytes."""

    def __init__(self, order="<", small=True):
        self.order, self.small = order, small

    def element(self, kind, data):
        if self.small and 0 < len(data) <= 4:
            return struct.pack(self.order + "I", len(data) << 16 | kind) + data.ljust(4, b"\0")
        return struct.pack(self.order + "II", kind, len(data)) + data + b"\0" * (-len(data) % 8)

    def matrix(self, name, shape, array_class, *content):
        flags = self.element(6, struct.pack(self.order + "II", array_class, 0))
        dims = self.element(5, struct.pack(f"{self.order}{len(shape)}i", *shape))
        return self.element(14, flags + dims + self.element(1, name.encode()) + b"".join(content))

    def numbers(self, name, array, kind=9, array_class=6):
        data = np.asarray(array).astype(self.order + formats._MAT_NUMBERS[kind]).tobytes("F")
        return self.matrix(name, np.shape(array), array_class, self.element(kind, data))

    def text(self, name, text, kind=4):
        data = text.encode({"<": "utf-16-le", ">": "utf-16-be"}[self.order] if kind in (4, 17) else "utf-8")
        return self.matrix(name, (1, len(text)), 4, self.element(kind, data))

    def file(self, path, *variables, compressed=False):
        if compressed:
            packed = [zlib.compress(variable) for variable in variables]
            variables = [struct.pack(self.order + "II", 15, len(data)) + data for data in packed]
        path.parent.mkdir(parents=True, exist_ok=True)
        header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(self.order + "H", 0x0100)
        path.write_bytes(header + {"<": b"IM", ">": b"MI"}[self.order] + b"".join(variables))


@pytest.mark.parametrize("order, small, compressed", [*itertools.product("<>", (True, False), (True, False))])
def test_read_mat(tmp_path, order, small, compressed):
    mat, array = Mat(order, small), RNG.normal(size=(3, 2))
    cell = mat.matrix("names", (2, 1), 1, mat.text("", "0/image 1.jpg"), mat.text("", "b.jpg", 16))
    record = mat.matrix("other", (1, 1), 2, mat.element(5, struct.pack(order + "i", 8)),
                        mat.element(1, b"f".ljust(8, b"\0")), mat.numbers("", [[1.0]]))  # a struct: left out
    flags = mat.numbers("flags", [[1, 0, 1]], 2, 9)
    mat.file(tmp_path / "a.mat", mat.numbers("Points", array), flags, record, cell,
             mat.numbers("n", [[-2, 300]], 3), mat.text("hi", "abc"), compressed=compressed)
    found = read_mat(str(tmp_path / "a.mat"))
    assert list(found) == ["Points", "flags", "names", "n", "hi"]
    np.testing.assert_array_equal(found["Points"], array)
    assert found["flags"].tolist() == [[1, 0, 1]] and found["n"].tolist() == [[-2, 300]]
    assert found["hi"] == "abc"
    assert found["names"].shape == (2, 1) and found["names"].ravel().tolist() == ["0/image 1.jpg", "b.jpg"]


def test_read_mat_names_the_damaged_file(tmp_path):
    path, mat = tmp_path / "a.mat", Mat()
    for data in (b"", b"MATLAB 7.3 MAT-file".ljust(126) + b"IM", b"\x89HDF".ljust(200, b"\0")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="a.mat begins .* wanted a MATLAB 5 to 7 file"):
            read_mat(str(path))
    for compressed in (False, True):
        mat.file(path, mat.numbers("x", np.ones((9, 9))), compressed=compressed)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match="a.mat is a damaged MATLAB file"):
            read_mat(str(path))


# ---- Readers -----------------------------------------------------------------------------------------------


def wflw_row(points, box, flags, name):
    return " ".join([*flat(points), *map(str, box), *map(str, flags), name])


def test_wflw(tmp_path):
    first, second = draw_points(98), draw_points(98)
    folder = tmp_path / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
    put_text(folder / "list_98pt_rect_attr_test.txt", "\r\n".join([
        wflw_row(first, (3, 4, 50, 60), (1, 0, 0, 1, 0, 0), "0--Parade/a.jpg"),
        wflw_row(second, (5, 6, 7, 8), (0, 1, 1, 0, 1, 1), "0--Parade/a.jpg"), "", ""]))
    put_image(tmp_path / "WFLW_images" / "0--Parade" / "a.jpg")
    with pytest.warns(UserWarning, match="2 faces in the test split of .*, 2500 in the official one"):
        faces = read("wflw", str(tmp_path), "test", 98)
    assert len(faces) == 2 and faces[0].image == faces[1].image         # an image may hold several faces
    np.testing.assert_allclose(faces[0].points, first, atol=1e-5)
    np.testing.assert_allclose(faces[1].points, second, atol=1e-5)
    assert faces[0].points.dtype == np.float32 and (first < 0).any()
    assert faces[0].box == (3, 4, 50, 60) and faces[0].tags == ("pose", "makeup")
    assert faces[1].tags == ("expression", "illumination", "occlusion", "blur") and faces[1].identity is None
    datasets.check_images(faces)

    rows = [wflw_row(first, box, (0,) * 6, "a.jpg") for box in ((3, 4, 50, 60), (3, 4, 5))]
    put_text(folder / "list_98pt_rect_attr_train.txt", "\n".join(rows))
    with pytest.raises(ValueError, match=r"list_98pt_rect_attr_train.txt:2: found 205 numbers, wanted 206"):
        datasets.read_wflw(str(tmp_path), "train")


def test_a_missing_set_is_one_message_with_tree_and_source(tmp_path):
    for name, reader in datasets.READERS.items():
        with pytest.raises(FileNotFoundError) as error:                 # an empty root
            read(name, str(tmp_path), "train" if name != "cofw68" else "test")
        text = str(error.value)
        assert str(tmp_path) in text and "Tree: " in text and "Source: " in text and "--data-root" in text
        assert "--data faces needs no download" in text and 5 <= len(text.splitlines()) <= 9, text
        with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
            read(name, str(tmp_path / "nowhere"), "train")
        with pytest.raises(FileNotFoundError, match="no folder"):
            read(name, "", "train")
        with pytest.raises(ValueError, match="no split 'valid'"):
            read(name, str(tmp_path), "valid")
    with pytest.raises(ValueError, match="no set 'lfw', there are wflw, 300w, cofw, cofw68"):
        read("lfw", str(tmp_path), "train")


@pytest.fixture
def tree_300w(tmp_path):
    """The official folders with one or two faces each, and path below the root -> points."""
    root, faces = tmp_path / "300w", {}
    for stem in ("afw/1_1.jpg", "lfpw/trainset/image_0001.png", "helen/trainset/1_1.jpg",
                 "ibug/image_003_1.jpg", "lfpw/testset/image_0002.png", "helen/testset/2_1.jpg",
                 "ibug/image_092 _01.jpg"):
        faces[stem] = draw_points(68)
        put_image(root / stem, shape=(48, 64) if "png" in stem else (48, 64, 3))
        put_pts((root / stem).with_suffix(".pts"), faces[stem], "\r\n" if "afw" in stem else "\n", "\n")
    for suffix in ("jpg", "pts"):
        put_text(root / "afw" / f"1_1_mirror.{suffix}", "a repack's copy")
    put_text(root / "afw" / "Thumbs.db", "")
    return root, faces


def test_300w(tree_300w):
    root, wanted = tree_300w
    for split, tags in (("train", {"afw": (), "lfpw": (), "helen": ()}),
                        ("test", {"lfpw": ("common",), "helen": ("common",), "ibug": ("challenging",)})):
        faces = read("300w", str(root), split)
        assert len(faces) == (3 if split == "train" else 4)
        for face in faces:
            stem = face.image[len(str(root)) + 1:]
            np.testing.assert_allclose(face.points, wanted[stem], atol=1e-5)
            assert face.tags == tags[stem.split("/")[0]] and face.box is None
        datasets.check_images(faces)

    put_pts(root / "ibug" / "image_003_1.pts", draw_points(67))
    with pytest.raises(ValueError, match=r"image_003_1.pts: found 67 points, wanted 68"):
        datasets.read_300w(str(root), "test")
    (root / "ibug" / "image_092 _01.jpg").unlink()
    put_pts(root / "ibug" / "image_003_1.pts", draw_points(68))
    with pytest.raises(FileNotFoundError, match=r"no image beside .*image_092 _01.pts"):
        datasets.read_300w(str(root), "test")


def test_cofw_exported(tmp_path):
    points = draw_points(29)
    row = ["test/1.png", ",".join(flat(points[:5])), ",".join(flat(points)), "0.5", "40", "30.5"]
    rows = ["image five points scale center_w center_h".split(), row, ["2.png", *row[1:], "tag"], [], []]
    put_text(tmp_path / "test.tsv", "\r\n".join(map("\t".join, rows)))
    for name in ("1.png", "2.png"):
        put_image(tmp_path / "test" / name, 7, (8, 9))
    faces = read("cofw", str(tmp_path), "test")
    np.testing.assert_allclose(faces[1].points, points, atol=1e-5)      # as they stand
    assert faces[0].box == (-10, -19.5, 90, 80.5)
    np.testing.assert_array_equal(load_image(faces[1].image), np.full((8, 9, 3), 7))
    datasets.check_images(faces)
    rows = [row, row, [*row[:2], "1,2,3", *row[3:]]]
    put_text(tmp_path / "test.tsv", "\n".join(map("\t".join, rows)))
    with pytest.raises(ValueError, match="test.tsv:3: found 3 numbers, wanted 58"):
        datasets.read_cofw(str(tmp_path), "test")
    put_text(tmp_path / "test.tsv", "image\n1.png 3 4\n")
    with pytest.raises(ValueError, match="test.tsv:2"):
        datasets.read_cofw(str(tmp_path), "test")


def test_cofw_without_h5py_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    put_text(tmp_path / "COFW_test_color.mat", "MATLAB 7.3 MAT-file")
    with pytest.raises(ImportError, match="COFW_test_color.mat is an HDF5 file: pip install h5py, or export"):
        read("cofw", str(tmp_path), "test")


def test_cofw_matlab(tmp_path):
    """As h5py shows a MATLAB 7.3 file: axes reversed, a cell as references."""
    h5py = pytest.importorskip("h5py")
    phis, boxes = RNG.uniform(1, 60, (3, 87)), RNG.uniform(1, 40, (3, 4))
    images = [RNG.integers(0, 256, shape, np.uint8) for shape in ((6, 9, 3), (7, 5), (4, 8, 3))]
    for split, end in (("train", "Tr"), ("test", "T")):
        with h5py.File(tmp_path / f"COFW_{split}_color.mat", "w", userblock_size=512) as file:
            file["phis" + end], file["bboxes" + end] = phis.T, boxes.T
            cells = file.create_dataset("Is" + end, (1, 3), h5py.ref_dtype)
            for index, image in enumerate(images):
                file[f"#refs#/{index}"] = image.T
                cells[0, index] = file[f"#refs#/{index}"].ref
        faces = read("cofw", str(tmp_path), split)
        for face, phi, (x, y, w, h), image in zip(faces, phis, boxes, images, strict=True):
            np.testing.assert_allclose(face.points, np.stack([phi[:29], phi[29:58]], 1) - 1, rtol=1e-6)
            np.testing.assert_allclose(face.box, (x - 1, y - 1, x + w - 1, y + h - 1))
            np.testing.assert_array_equal(load_image(face.image), np.dstack([image] * 3)[..., :3])
    with h5py.File(tmp_path / "COFW_test_color.mat", "a") as file:
        del file["phisT"]
    with pytest.raises(ValueError, match="COFW_test_color.mat: found arrays .* wanted"):
        datasets.read_cofw(str(tmp_path), "test")


def test_cofw68(tmp_path, tree_300w):
    row = ",".join(["0"] * 10) + "\t" + ",".join(["1"] * 58) + "\t1\t20\t20"
    put_text(tmp_path / "cofw" / "test.tsv", f"header\ntest/a.jpg\t{row}\ntest/b.jpg\t{row}\n")
    wanted, mat = [draw_points(68), draw_points(68)], Mat()
    folder = tmp_path / "cofw68" / "test_annotations"
    for number, points in enumerate(wanted, 1):                     # MATLAB: files and pixels count from 1
        mat.file(folder / f"{number}_points.mat", mat.numbers("Points", points + 1),
                 mat.numbers("Occ", np.zeros((1, 68)), 2, 9), compressed=number == 2)
    faces = read("cofw68", str(tmp_path), "test", 68)
    assert [face.image[-6:] for face in faces] == ["/a.jpg", "/b.jpg"] and faces[0].box is None
    for face, points in zip(faces, wanted, strict=True):
        np.testing.assert_allclose(face.points, points, atol=1e-5)
    assert len(read("cofw68", str(tmp_path), "train")) == 3             # of tmp_path/300w
    mat.file(folder / "2_points.mat", mat.numbers("Points", wanted[0][:29]))
    with pytest.raises(ValueError, match=r"2_points.mat: found Points \(29, 2\), wanted finite \(68, 2\)"):
        datasets.read_cofw68(str(tmp_path), "test")
    (folder / "2_points.mat").unlink()
    with pytest.raises(FileNotFoundError, match="no .*2_points.mat"):
        datasets.read_cofw68(str(tmp_path), "test")


def test_helen(tmp_path):
    wanted = {name: draw_points(194) for name in ("100032540_1", "a_1", "b_1")}
    for number, (name, points) in enumerate(wanted.items(), 1):
        rows = "\r\n".join(f"{x:.2f} , {y:.2f}" for x, y in points)
        put_text(tmp_path / "annotation" / f"{number}.txt", f"{name}\r\n{rows}\r\n\r\n")
        put_image(tmp_path / ("test" if name == "a_1" else "train_1") / f"{name}.jpg")
    put_text(tmp_path / "trainnames.txt", "b_1\n100032540_1\n")         # not in the order of the files
    put_text(tmp_path / "testnames.txt", "a_1\n\n")
    train, test = read("helen", str(tmp_path), "train"), read("helen", str(tmp_path), "test", 194)
    assert [face.image.rpartition("train_1/")[2] for face in train] == ["b_1.jpg", "100032540_1.jpg"]
    np.testing.assert_allclose(train[0].points, wanted["b_1"], atol=1e-4)
    np.testing.assert_allclose(test[0].points, wanted["a_1"], atol=1e-4)
    datasets.check_images(train + test)
    put_text(tmp_path / "annotation" / "2.txt", "a_1\n1 , 2\n3 , ?\n" + "5 , 6\n" * 192)
    with pytest.raises(UserError, match=r"2.txt:3: .*wanted a number"):
        datasets.read_helen(str(tmp_path), "test")
    put_text(tmp_path / "trainnames.txt", "b_1\nzz\n100032540_1\nyy\n")  # a part of the images, as some have
    with pytest.warns(UserWarning, match=r"no image of zz \(.*trainnames.txt:2\), nor of 1 others: left out"):
        assert len(read("helen", str(tmp_path), "train")) == 2
    put_text(tmp_path / "trainnames.txt", "zz\n")
    with pytest.raises(FileNotFoundError, match=r"no image of zz \(.*trainnames.txt:1\)"):
        datasets.read_helen(str(tmp_path), "train")
    put_image(tmp_path / "train_2" / "b_1.jpg")
    put_text(tmp_path / "trainnames.txt", "b_1\n")
    with pytest.raises(UserError, match=r"train_1/b_1.jpg and .*train_2/b_1.jpg are both b_1: keep one"):
        datasets.read_helen(str(tmp_path), "train")


def test_aflw(tmp_path):
    count, mat = 20002, Mat()
    data, boxes = np.tile(np.arange(38.0), (count, 1)), np.tile([1.0, 2.0, 30.0, 40.0], (count, 1))
    data[7], boxes[7] = np.arange(38) - 5, (10, 90, 20, 60)             # xmin xmax ymin ymax
    seen = np.ones((count, 19))
    order = np.roll(np.arange(1, count + 1), 12)
    order = np.concatenate([order[order != 8], [8]])                    # from 1; face 7 comes last
    seen[order[-2] - 1, 3] = 0
    names = [mat.text("", f"{index % 4}/image{index:05d}.jpg") for index in range(count)]
    variables = [mat.matrix("nameList", (count, 1), 1, *names), mat.numbers("ra", order[None], 5),
                 mat.numbers("bbox", boxes), mat.numbers("data", data), mat.numbers("mask_new", seen, 2)]
    mat.file(tmp_path / "AFLWinfo_release.mat", *variables, compressed=True)
    (tmp_path / "flickr").mkdir()
    test, train = read("aflw", str(tmp_path), "test", 19), datasets.read_aflw(str(tmp_path), "train")
    assert len(train) == 20000 and len(test) == 2
    assert train[0].image == str(tmp_path / "flickr" / f"{(order[0] - 1) % 4}/image{order[0] - 1:05d}.jpg")
    assert test[1].image == str(tmp_path / "flickr" / "3/image00007.jpg") and test[1].tags == ("frontal",)
    assert test[1].points.tolist() == [[x - 5, x + 14] for x in range(19)] and test[1].box == (10, 20, 90, 60)
    assert test[0].tags == () and not any(face.tags for face in train)
    mat.file(tmp_path / "AFLWinfo_release.mat", *variables[:4])
    with pytest.raises(ValueError, match="AFLWinfo_release.mat: found nameList, ra, data"):
        datasets.read_aflw(str(tmp_path), "test")


def test_lapa_and_jd_landmark(tmp_path):
    points = draw_points(106)
    rows = "\n".join(" ".join(flat(row)) for row in points)
    for split in ("train", "val", "test"):
        put_text(tmp_path / "lapa" / split / "landmarks" / "12_0.txt", f"106\n{rows}\n\n")
        put_image(tmp_path / "lapa" / split / "images" / "12_0.jpg")
        face, = read("lapa", str(tmp_path / "lapa"), split)
        np.testing.assert_allclose(face.points, points, atol=1e-4)      # counted from 0
        assert face.image == str(tmp_path / "lapa" / split / "images" / "12_0.jpg") and face.box is None
    jd = tmp_path / "jd"
    for folder in ("Train", "Test_data1"):
        put_text(jd / folder / "landmark" / "AFW 1.jpg.txt", f"106\r\n{rows}")
        put_image(jd / folder / "picture" / "AFW 1.jpg")
    put_text(jd / "Test_data1" / "rect" / "AFW 1.jpg.rect", "3 4\n5 6\n")
    train, test = read("jd106", str(jd), "train") + read("jd106", str(jd), "test")
    assert train.box is None and test.box == (3, 4, 5, 6)
    np.testing.assert_allclose(test.points, points, atol=1e-4)
    datasets.check_images([face, train, test])
    put_text(jd / "Train" / "landmark" / "AFW 2.jpg.txt", "68\n" + "1 2\n" * 68)
    with pytest.raises(ValueError, match="AFW 2.jpg.txt:1: found '68', wanted the number of points, 106"):
        datasets.read_jd106(str(jd), "train")
    put_text(jd / "Train" / "landmark" / "AFW 2.jpg.txt", "106\n" + "1 2\n" * 107)
    with pytest.raises(ValueError, match="AFW 2.jpg.txt: found 107 points, wanted 106"):
        datasets.read_jd106(str(jd), "train")
    with pytest.raises(FileNotFoundError, match="Wanted below .*/jd, which has Test_data1, Train:\nTree"):
        read("jd106", str(jd), "val")
    other = tmp_path / "2019"
    for place in ("AFW", "HELEN", "LFPW"):
        put_text(other / "Training_data" / place / "landmark" / f"{place}_1.jpg.txt", f"106\n{rows}")
        put_image(other / "Training_data" / place / "picture" / f"{place}_1.jpg")
    faces = read("jd106", str(other), "train")
    assert [face.image.rpartition("/")[2] for face in faces] == ["AFW_1.jpg", "HELEN_1.jpg", "LFPW_1.jpg"]
    datasets.check_images(faces)


def test_csv(tmp_path):
    points = draw_points(19)
    header = ["center_w", "center_h", *(f"original_{i}_{axis}" for i in range(19) for axis in "xy")]
    rows = [["image_name", "scale", "box_size", *header],
            ["0/a.jpg", "0.5", "80", "50", "60", *flat(points)], []]
    put_text(tmp_path / "face_landmarks_aflw_train.csv", "\r\n".join(map(",".join, rows)))
    put_text(tmp_path / "face_landmarks_aflw_test_frontal.csv", "")     # not a test split
    rows = [["image_name", "scale", *header], ["0/b.jpg", "0.5", "50", "60", *flat(points)], []]
    put_text(tmp_path / "test.csv", "\n".join(map(",".join, rows)))
    put_image(tmp_path / "0" / "b.jpg")
    train, = read("csv", str(tmp_path), "train", 19)
    test, = read("csv", str(tmp_path), "test")
    assert train.box == (10, 20, 90, 100) and test.box == (0, 10, 100, 110)
    assert test.image == str(tmp_path / "0" / "b.jpg")
    np.testing.assert_allclose(train.points, points, atol=1e-5)
    np.testing.assert_allclose(test.points, points, atol=1e-5)
    (tmp_path / "images").mkdir()
    assert read("csv", str(tmp_path), "test")[0].image == str(tmp_path / "images" / "0" / "b.jpg")
    with pytest.raises(ValueError, match="--data csv has 19 points in .*, wanted 98"):
        read("csv", str(tmp_path), "test", 98)
    put_text(tmp_path / "test.csv", ",".join(["image_name", "scale", *header]) + "\nb.jpg,1,2,3,4\n")
    with pytest.raises(ValueError, match="test.csv:2: found 4 numbers, wanted 41"):
        datasets.read_csv(str(tmp_path), "test")
    put_text(tmp_path / "test.csv", "name,scale,center_w,center_h,x,y\n")
    with pytest.raises(ValueError, match="test.csv:1: found 6 columns .* wanted image_name,scale,center_w"):
        datasets.read_csv(str(tmp_path), "test")
    put_text(tmp_path / "other_train.csv", "")
    with pytest.raises(FileNotFoundError, match="found 2 tables"):
        datasets.read_csv(str(tmp_path), "train")


def test_youtube_is_split_by_person(tmp_path):
    names = [f"First_{person}_{frame}.jpg" for person in "ABCDEFGHIJKL" for frame in ("00", "01", "10", "11")]
    points = {name: draw_points(68) for name in names}
    rows = [",".join([name, *flat(points[name])]) for name in names]
    table = tmp_path / "data" / "training_frames_keypoints.csv"
    put_text(table, ",".join(["", *map(str, range(136))]) + "\n" + "\n".join(rows) + "\n")
    (tmp_path / "data" / "training").mkdir()
    put_text(tmp_path / "data" / "test_frames_keypoints.csv", "which repeats training frames")
    train, test = (read("youtube", str(tmp_path), split) for split in ("train", "test"))
    people = [{face.identity for face in faces} for faces in (train, test)]
    assert len(people[1]) == 2 and len(people[0]) == 10 and not people[0] & people[1]
    assert len(train) == 40 and len(test) == 8 and "First_A" in people[0] | people[1]
    for face in train + test:
        np.testing.assert_allclose(face.points, points[face.image.rpartition("/")[2]], atol=1e-4)
    put_text(table, "header\n" + "\n".join(rows[::-1]) + "\n")          # in any order of the rows
    assert {face.identity for face in read("youtube", str(tmp_path), "test")} == people[1]
    put_text(table, "header\n" + rows[0] + "\n" + rows[1] + ",5\n")
    with pytest.raises(ValueError, match="training_frames_keypoints.csv:3: found 137 numbers, wanted 136"):
        datasets.read_youtube(str(tmp_path), "train")


def test_widerface(tmp_path):
    points = np.round(RNG.uniform(0, 60, (5, 2)), 3)
    row = lambda box, points, v=0.0: " ".join(str(number) for number in (
        *box, *(c for x, y in points for c in (x, y, v)), 0.4))
    lost = np.full((5, 2), -1.0)
    text, label = "", tmp_path / "train" / "label.txt"
    for i in range(40):
        rows = row((3, 4, 50.5, 60), points + i, 1.0), row((1, 2, 9, 9), lost, -1.0)
        text += "\n".join([f"# 0--Parade/0 {i}.jpg", *rows, ""])
    text += f"# 1--Riot/none.jpg\n{row((5, 5, 0, 9), points)}\n"
    put_text(label, text)
    with pytest.raises(FileNotFoundError, match="no .*images"):
        read("widerface", str(tmp_path), "train")
    (tmp_path / "train" / "images").mkdir()
    train, test = (read("widerface", str(tmp_path), split, points=5) for split in ("train", "test"))
    names = [{face.image.partition("images/")[2] for face in faces} for faces in (train, test)]
    assert names[0] | names[1] == {f"0--Parade/0 {i}.jpg" for i in range(40)} and not names[0] & names[1]
    assert len(train) == 2 * len(names[0]) and len(test) == len(names[1]) > 0   # test: only faces with points
    for face in test + train[::2]:
        i = int(face.image.rpartition(" ")[2][:-4])
        np.testing.assert_allclose(face.points, points + i, atol=1e-4)
        assert face.box == (3, 4, 53.5, 64) and face.where == f"{label}:{3 * i + 2}"
    assert all(np.isnan(face.points).all() and face.points.dtype == np.float32 for face in train[1::2])
    put_text(label, row((3, 4, 50, 60), points))
    with pytest.raises(ValueError, match="label.txt:1: found .*, wanted a line '# IMAGE' before the first"):
        datasets.read_widerface(str(tmp_path), "train")
    put_text(label, "# 0--Parade/a.jpg\n3 4 50 60\n")
    with pytest.raises(ValueError, match="label.txt:2: found 4 numbers, wanted 20"):
        datasets.read_widerface(str(tmp_path), "train" if zlib.crc32(b"0--Parade/a.jpg") % 10 else "test")


def test_folder(tmp_path):
    wanted = {}
    for name in ("Ann Lee/1.jpg", "Ann Lee/2.JPEG", "b/c/3.png", "4.jpg", "../test/Z/5.png"):
        path = (tmp_path / "train" / name).resolve()
        put_image(path, shape=(48, 64) if "3" in name else (48, 64, 3))
        wanted[str(path)] = draw_points(11)
        put_pts(path.with_suffix(".pts"), wanted[str(path)], tail="\n\n")
    put_text(tmp_path / "train" / "notes.txt", "")
    faces = read("folder", str(tmp_path), "train", 11)
    assert [face.identity for face in faces] == [None, "Ann Lee", "Ann Lee", "b/c"]
    for face in faces:
        np.testing.assert_allclose(face.points, wanted[face.image], atol=1e-5)
        assert load_image(face.image).shape == (48, 64, 3)
    assert [face.identity for face in read("folder", str(tmp_path), "test")] == ["Z"]
    put_pts(tmp_path / "train" / "b" / "c" / "3.pts", draw_points(12))
    with pytest.raises(ValueError, match=r"c/3.pts has 12 points, .*train/4.pts 11; wanted as many in all"):
        datasets.read_folder(str(tmp_path), "train")
    put_image(tmp_path / "train" / "0.png")
    with pytest.raises(FileNotFoundError, match=r"no .pts beside .*train/0.png"):
        datasets.read_folder(str(tmp_path), "train")


def test_read_warns_of_another_order_of_the_points(tmp_path):
    """Faces symmetric under LaPa's flip pass; in another order, or with sides exchanged, they do not."""
    faces = symmetric(SCHEMES[106]) + RNG.normal(0, 2, (60, 106, 2))
    eyes = [104, 105]
    faces[:, eyes, 0] = 30, 70
    shuffled = np.concatenate([RNG.permutation(104), eyes])
    for orders, wrong in ((np.arange(106), False), (shuffled, True), (SCHEMES[106].flip, True)):
        for index, points in enumerate(faces):
            rows = "\n".join(" ".join(flat(row)) for row in points[orders])
            put_text(tmp_path / "test" / "landmarks" / f"{index}.txt", f"106\n{rows}\n")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read("lapa", str(tmp_path), "test")
        assert ["hardly in the order of SCHEMES" in str(w.message) for w in caught] == [True] * wrong


@pytest.mark.parametrize("table, name, base", [
    ("face_landmarks_300w_train.csv", "afw/1.jpg", 1), ("train.csv", "helen/trainset/1_1.jpg", 1),
    ("face_landmarks_wflw_train.csv", "37--Soccer/a.jpg", 0), ("train.csv", "37--Soccer/a.jpg", 0),
    ("face_landmarks_aflw_train.csv", "0/a.jpg", 0), ("train.csv", "mine/a.jpg", None)])
def test_csv_counts_from_where_its_set_does(tmp_path, table, name, base):
    put_text(tmp_path / table, "image_name,scale,center_w,center_h,original_0_x,original_0_y,original_1_x,"
             f"original_1_y\n{name},0.5,60,70,20,30,40.5,50\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        face, = read("csv", str(tmp_path), "train")
    said = ["nothing says whether" in str(w.message) and table in str(w.message) for w in caught]
    assert said == [True] * (base is None)
    base = base or 0
    assert face.points.tolist() == [[20 - base, 30 - base], [40.5 - base, 50 - base]]
    assert face.box == (10 - base, 20 - base, 110 - base, 120 - base)


def test_csv_of_300w(tmp_path):
    """HRNet's face_landmarks_300w_valid.csv is the full set; ..._test.csv is the private one."""
    header = "image_name,scale,center_w,center_h,original_0_x,original_0_y\n"
    put_text(tmp_path / "face_landmarks_300w_test.csv", header + "Test/01_Indoor/indoor_001.png,1,60,70,20,30\n")
    with pytest.warns(UserWarning, match="300w_test.csv is the private set of 600 images; the full set .*valid"):
        face, = read("csv", str(tmp_path), "test")
    assert face.points.tolist() == [[19, 29]] and face.tags == ()
    put_text(tmp_path / "face_landmarks_300w_valid.csv",
             header + "lfpw/testset/image_1.png,1,60,70,20,30\nibug/image_2.jpg,1,60,70,21,30\n")
    for extra in ("challenge", "common"):
        put_text(tmp_path / f"face_landmarks_300w_valid_{extra}.csv", header)
    faces = read("csv", str(tmp_path), "test")
    assert [(face.points.tolist(), face.tags) for face in faces] == [
        ([[19, 29]], ("common",)), ([[20, 29]], ("challenging",))]


def test_norm_auto_is_the_papers_normaliser():
    wanted = {5: "ip", 11: "box", 19: "face", 29: "io", 68: "io", 194: "io"}
    assert {points: datasets.norm_kind("auto", points) for points in wanted} == wanted
    assert datasets.norm_kind("auto", 19, boxed=False) == "box" and datasets.norm_kind("ip", 68) == "ip"
    face = Face("a.jpg", RNG.uniform(0, 9, (19, 2)).astype(np.float32), (0, 0, 20, 5))
    matrix = np.eye(2, 3)[None]
    assert datasets.CropDataset([face], matrix, 8).divisors("auto").tolist() == [10]


def test_every_point_of_a_drawn_mean_face_is_near_its_mirror():
    """Mirrored, renamed by the flip and fitted back by a similarity: no point is 2 % of the face off."""
    for points, scheme in SCHEMES.items():
        faces = synthetic.read_faces("train", 400, size=256, points=points)
        shapes = torch.from_numpy(np.stack([face.points for face in faces])).double()
        mean = shapes[0]
        for _ in range(3):
            mean = warp.apply_affine(warp.fit_similarity(shapes, mean.expand_as(shapes)), shapes).mean(0)
        mirror = mean[scheme.flip] * mean.new_tensor([-1, 1])
        off = (warp.apply_affine(warp.fit_similarity(mirror, mean), mirror) - mean).norm(dim=1)
        assert off.max() < 0.02 * (mean.amax(0) - mean.amin(0)).prod().sqrt(), points


# ---- Folders and points that cannot be right ---------------------------------------------------------------


def test_walk_follows_links_and_passes_over_what_is_hidden(tmp_path):
    for name in ("b/2.JPG", "a.png", ".cache/3.jpg", "._a.png", "__MACOSX/a.png", "b/.x/4.jpg", "b/note.txt"):
        put_text(tmp_path / "set" / name, "")
    put_text(tmp_path / "elsewhere" / "5.bmp", "")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    found = [os.path.relpath(path, tmp_path / "set") for path in datasets.walk(str(tmp_path / "set"))]
    assert found == ["a.png", "b/2.JPG", "link/5.bmp"]
    assert len(datasets.walk(str(tmp_path / "set"), (".txt",))) == 1
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "set")
    with pytest.raises(UserError, match="link/up is a link to a folder that holds it"):
        datasets.walk(str(tmp_path / "set"))


def test_walk_names_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def scandir(folder):
        raise PermissionError(13, "Permission denied", folder)
    monkeypatch.setattr(formats.os, "scandir", scandir)  # root may read anything
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read: Permission denied"):
        datasets.walk(str(tmp_path))


def test_one_pts_belongs_to_one_image(tmp_path):
    for name in ("300w/afw/1.jpg", "set/train/1.jpg"):
        put_image(tmp_path / name)
        put_image((tmp_path / name).with_suffix(".png"))
        put_pts((tmp_path / name).with_suffix(".pts"), draw_points(68))
    for data, root in (("300w", "300w"), ("folder", "set")):
        with pytest.raises(UserError, match=r"1.jpg and .*1.png differ only in their endings: keep one"):
            read(data, str(tmp_path / root), "train")


def own_set(root, faces):
    for i, points in enumerate(faces):
        put_image(root / "train" / f"{i}.png")
        put_pts(root / "train" / f"{i}.pts", points)


def test_points_that_cannot_be_right(tmp_path):
    points = draw_points(11)
    own_set(tmp_path / "fractions", [points / 100 - 1, points / 90 - 1])  # put_pts adds 1
    with pytest.raises(UserError, match="fractions: all points lie within .* fractions of the image"):
        read("folder", str(tmp_path / "fractions"), "train")
    own_set(tmp_path / "one", [points, np.full((11, 2), 7.0)])
    with pytest.raises(UserError, match="1.pts: all points are at one place"):
        read("folder", str(tmp_path / "one"), "train")
    lost = points.copy()
    lost[[2, 5]] = -1  # 0 0 in the file
    own_set(tmp_path / "lost", [points, lost])
    with pytest.warns(UserWarning, match="1.pts has several points exactly at 0 0 or -1 -1.* for 1 of 2 faces"):
        read("folder", str(tmp_path / "lost"), "train")
