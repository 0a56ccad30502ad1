"""Images and folders, `.pts`, tables of points and MATLAB's files, in the forms that exist."""
import os
import struct

import cv2
import numpy as np
import pytest
import torch

from common import UserError, formats
from common.formats import load_image, read_mat, read_pts, write_image, write_pts
from tests.trees import Mat, put_text

RNG = np.random.default_rng(0)


# ---- Images and folders ----------------------------------------------------------------------


def test_images_under_any_name_and_of_every_kind_are_rgb(tmp_path):
    image = RNG.integers(0, 256, (5, 7, 3), np.uint8)
    for name in (os.fsdecode(b"\xff\xfe.png"), "Æsop 夢.png", "%d.png", "a\nb.PNG"):
        path = os.path.join(tmp_path, name)
        write_image(path, image)
        np.testing.assert_array_equal(load_image(path), image)
    alpha = cv2.imencode(".png", np.dstack([image[..., ::-1], np.full((5, 7), 9, np.uint8)]))[1]
    (tmp_path / "alpha.jpg").write_bytes(alpha.tobytes())  # PNG data, with alpha, named .jpg
    np.testing.assert_array_equal(load_image(tmp_path / "alpha.jpg"), image)
    cv2.imwrite(str(tmp_path / "gray.png"), image[..., 0])
    for gray in (str(tmp_path / "gray.png"), image[..., 0], lambda: image[..., 0]):
        np.testing.assert_array_equal(load_image(gray), image[..., :1].repeat(3, 2))
    turned = load_image(image[:, ::-1])
    assert turned.flags.c_contiguous and (turned == image[:, ::-1]).all()
    for name in ("a.txt", "a"):
        with pytest.raises(UserError, match="wanted a name that ends as images do"):
            write_image(str(tmp_path / name), image)


def test_a_jpeg_at_half_its_size_is_the_mean_of_two_by_two(tmp_path):
    y, x = np.mgrid[:23, :36]
    image = np.stack([6 * x, 8 * y, 2 * x + 3 * y], -1).astype(np.uint8)
    write_image(str(tmp_path / "a.jpg"), image)
    half = load_image(str(tmp_path / "a.jpg"), half=True)
    assert half.shape == (12, 18, 3) and formats.is_jpeg(str(tmp_path / "a.jpg"))
    mean = image[:22].reshape(11, 2, 18, 2, 3).mean((1, 3))
    assert np.abs(half[:11] - mean).mean() < 2


def test_load_image_obeys_the_orientation_tag_only_if_asked(tmp_path):
    """A JPEG whose EXIF says "turn by 90 degrees": points belong to the stored pixels."""
    jpeg = cv2.imencode(".jpg", np.zeros((16, 40, 3), np.uint8))[1].tobytes()
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
    exif = b"Exif\0\0" + tiff
    exif = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (tmp_path / "a.jpg").write_bytes(jpeg[:2] + exif + jpeg[2:])
    assert load_image(str(tmp_path / "a.jpg")).shape == (16, 40, 3)
    assert load_image(str(tmp_path / "a.jpg"), upright=True).shape == (40, 16, 3)


def test_load_image_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jpg"):
        load_image(str(tmp_path / "nowhere.jpg"))
    big = cv2.imencode(".png", np.zeros((1, 1), np.uint8))[1].tobytes()
    big = big[:16] + struct.pack(">II", 60_000, 60_000) + big[24:]
    for content in (b"", b"<html>", b"\xff\xd8", big):
        (tmp_path / "page.jpg").write_bytes(content)
        with pytest.raises(UserError, match="page.jpg cannot be decoded as an image"):
            load_image(str(tmp_path / "page.jpg"))
    for shape, kind in (((4, 4, 3), float), ((4, 4, 4), "u1"), ((4,), "u1"), ((0, 4), "u1")):
        with pytest.raises(ValueError, match="wanted uint8"):
            load_image(np.zeros(shape, kind))


def test_walk_follows_links_and_passes_over_what_is_hidden(tmp_path):
    root = tmp_path / "set"
    for name in ("b/2.JPG", "a.png", ".cache/3.jpg", "._a.png", "__MACOSX/a.png", "b/.x/4.jpg",
                 "b/note.txt"):
        put_text(root / name, "")
    put_text(tmp_path / "elsewhere" / "5.bmp", "")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    found = [os.path.relpath(path, root) for path in formats.walk(str(root))]
    assert found == ["a.png", "b/2.JPG", "link/5.bmp"]
    assert len(formats.walk(str(root), (".txt",))) == 1
    (tmp_path / "elsewhere" / "up").symlink_to(root)
    with pytest.raises(UserError, match="link/up is a link to a folder that holds it"):
        formats.walk(str(root))


def test_image_paths(tmp_path):
    for name in ("a b.jpg", "sub/c.PNG", "sub/c.pts", "sub/note.txt", ".x/d.png"):
        put_text(tmp_path / name, "")
    with pytest.warns(UserWarning, match=": 1 files of other kinds are left out, as .*note.txt"):
        assert set(formats.image_paths([str(tmp_path)])) == {"a b", "sub/c"}
    assert set(formats.image_paths([str(tmp_path / "sub/c.PNG")])) == {"c"}
    with pytest.raises(FileNotFoundError, match="no image"):
        formats.image_paths([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="would both be written as c"):
        formats.image_paths([str(tmp_path / "sub/c.PNG"), str(tmp_path / "sub/c.PNG")])


# ---- Points ----------------------------------------------------------------------------------


def test_pts_in_the_forms_that_exist(tmp_path):
    path = tmp_path / "a b.pts"
    head = "version: 1\nn_points:  2\n{\n"
    for text in (head + "12.5 20\n30 40.25\n}\n",
                 head + "12.500000 20\n\n 30\t4.025e1 \n}\n \n\n",
                 "  n_points :2\n{\n12.5 20\n30 40.25\n}", "12.5 20\n  30 40.25 \n}\n",
                 "12.5 20\n30 40.25", "version: 1\n{\n12.5 20\n30 40.25\n}"):
        for form in (text, "\ufeff" + text, text.replace("\n", "\r\n")):
            put_text(path, form)
            assert read_pts(str(path)).tolist() == [[11.5, 19], [29, 39.25]]
    assert read_pts(str(path)).dtype == np.float32


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
    ("n_points: 2\n{\n1 2\n3 4\n", r"a.pts: found no line }: it is cut short"),
    ("n_points: 2\n{\n12,5 2\n3 4,25\n}\n", r"a.pts:3: found '12,5 2', with decimal commas"),
])
def test_pts_errors_name_file_and_line(tmp_path, text, message):
    put_text(tmp_path / "a.pts", text)
    with pytest.raises(UserError, match=message):
        read_pts(str(tmp_path / "a.pts"))


def test_points_of_a_detector_by_image(tmp_path):
    path = tmp_path / "five.csv"
    first, second, third = np.round(RNG.uniform(-3, 90, (3, 5, 2)), 2)
    rows = [",".join([name, *(f"{value:g}" for value in points.ravel())]) for name, points in
            (("a/one.jpg", first), ("./b c.png", second), ("a//one.jpg", third))]
    for header in ("", "image,x0,y0,x1,y1\n", "\ufefffile, left_x\r\n"):
        put_text(path, header + "\n\n".join(rows) + "\n")
        found = formats.read_points_csv(str(path))
        assert list(found) == ["a/one.jpg", "b c.png"] and found["b c.png"].shape == (1, 5, 2)
        np.testing.assert_allclose(found["a/one.jpg"], np.stack([first, third]), atol=1e-5)
        assert found["a/one.jpg"].dtype == np.float32
    put_text(path, "a.jpg, -1.5, .5,+2 ,3e1\n")
    assert formats.read_points_csv(str(path))["a.jpg"].tolist() == [[[-1.5, 0.5], [2, 30]]]


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
    with pytest.raises(UserError, match=message):
        formats.read_points_csv(str(tmp_path / "five.csv"))


# ---- MATLAB ----------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("compressed", [True, False])
def test_read_mat(tmp_path, small, compressed):
    mat, array = Mat(small), RNG.normal(size=(3, 2))
    cell = mat.matrix("names", (2, 1), 1, mat.text("", "0/image 1.jpg"), mat.text("", "b.jpg", 16))
    record = mat.matrix("other", (1, 1), 2, mat.element(5, struct.pack("<i", 8)),
                        mat.element(1, b"f".ljust(8, b"\0")), mat.numbers("", [[1.0]]))  # a struct
    flags = mat.numbers("flags", [[1, 0, 1]], 2, 9)
    mat.file(tmp_path / "a.mat", mat.numbers("Points", array), flags, record, cell,
             mat.numbers("n", [[-2, 300]], 3), mat.text("hi", "abc"), compressed=compressed)
    found = read_mat(str(tmp_path / "a.mat"))
    assert list(found) == ["Points", "flags", "names", "n", "hi"]  # the struct is left out
    np.testing.assert_array_equal(found["Points"], array)
    assert found["flags"].tolist() == [[1, 0, 1]] and found["n"].tolist() == [[-2, 300]]
    assert found["hi"] == "abc" and found["names"].shape == (2, 1)
    assert found["names"].ravel().tolist() == ["0/image 1.jpg", "b.jpg"]


def test_read_mat_names_the_damaged_file(tmp_path):
    path, mat = tmp_path / "a.mat", Mat()
    for data in (b"", b"MATLAB 7.3 MAT-file".ljust(126) + b"IM", b"\x89HDF".ljust(200, b"\0")):
        path.write_bytes(data)
        with pytest.raises(UserError, match="a.mat begins .* wanted a MATLAB 5 to 7 file"):
            read_mat(str(path))
    for compressed in (False, True):
        mat.file(path, mat.numbers("x", np.ones((9, 9))), compressed=compressed)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(UserError, match="a.mat is a damaged MATLAB file"):
            read_mat(str(path))
