"""Records and the reader of each public set, on small trees in the set's true form."""
import sys
import warnings
import zlib

import cv2
import numpy as np
import pytest

from common import UserError, datasets
from common.datasets import SCHEMES, Face, load_image, read
from tests.trees import Mat, put_text

pytestmark = pytest.mark.filterwarnings("ignore:.*in the official one", "ignore:nothing says")
RNG = np.random.default_rng(0)


def draw_points(count):
    """(count, 2) with two decimals, some outside an image of 64 x 48."""
    return np.round(RNG.uniform(-3, 90, (count, 2)), 2)


def put_image(path, value=100, shape=(48, 64, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full(shape, value, np.uint8))


def put_pts(path, points, end="\n"):
    """A `.pts` as 300-W has it: counted from 1."""
    rows = end.join(f"{x + 1:.6f} {y + 1:.6f}" for x, y in points)
    put_text(path, f"version: 1{end}n_points:  {len(points)}{end}{{{end}{rows}{end}}}{end}")


def flat(points):
    return [f"{value:g}" for value in np.ravel(points)]


def same(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-4)


# ---- Records and points ----------------------------------------------------------------------


def test_check_images_names_the_first_and_counts_all(tmp_path):
    put_image(tmp_path / "good.png")
    put_text(tmp_path / "bad.png", "no image")
    put_text(tmp_path / "empty.png", "")
    good, bad, empty, gone = (Face(str(tmp_path / f"{name}.png"))
                              for name in ("good", "bad", "empty", "gone"))
    datasets.check_images([good, good, Face(np.zeros((2, 2, 3), np.uint8)), Face(lambda: None)])
    listed = Face(gone.image, where="list.txt:7")
    for faces, error, message in (
            ([good, bad, bad], UserError, "bad.png is no .* 2 images, missing 0, undecodable 1"),
            ([good, empty], UserError, "empty.png is no image that cv2 can decode; of 2"),
            ([good, bad, gone], FileNotFoundError,
             "gone.png does not exist; of 3 images, missing 1, undecodable 1"),
            ([good, listed], FileNotFoundError, r"not exist \(listed in list.txt:7\); of 2")):
        with pytest.raises(error, match=message):
            datasets.check_images(faces)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_check_images_warns_of_files_that_are_cut_short(tmp_path, name, recwarn):
    path = tmp_path / name
    put_image(path)
    datasets.check_images([Face(str(path))])
    assert not recwarn
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=f"{name} and 0 other images seem to be cut short"):
        datasets.check_images([Face(str(path))])


def put_set(root, faces):
    """A set of one's own."""
    for i, points in enumerate(faces):
        put_image(root / "train" / f"{i}.png")
        put_pts(root / "train" / f"{i}.pts", points)


def test_points_that_cannot_be_right(tmp_path):
    points = draw_points(11)
    put_set(tmp_path / "fractions", [points / 100 - 1, points / 90 - 1])  # put_pts adds 1
    put_set(tmp_path / "one", [points, np.full((11, 2), 7.0)])
    for name, message in (("fractions", "all points lie within .* fractions of the image"),
                          ("one", "1.pts: all points are at one place")):
        with pytest.raises(UserError, match=message):
            read("folder", str(tmp_path / name), "train")
    lost = points.copy()
    lost[[2, 5]] = -1  # 0 0 in the file
    put_set(tmp_path / "lost", [points, lost])
    with pytest.warns(UserWarning, match="1.pts has several points exactly at 0 0 .* 1 of 2 faces"):
        read("folder", str(tmp_path / "lost"), "train")


def test_read_warns_of_another_order_of_the_points(tmp_path):
    """Faces symmetric under LaPa's flip pass; in another order, with sides exchanged or upside
    down, they do not."""
    flip = SCHEMES[106].flip
    half = RNG.uniform(0, 100, (106, 2))
    faces = (half + ([100, 0] + half * [-1, 1])[flip]) / 2 + RNG.normal(0, 2, (60, 106, 2))
    faces[:, [104, 105]] = [30, 20], [70, 20]  # pupils
    faces[:, [84, 90]] = [40, 80], [60, 80]    # corners of the mouth
    shuffled = np.concatenate([RNG.permutation(84), range(84, 106)])
    for shown, wrong in ((faces, False), (faces[:, shuffled], True), (faces[:, flip], True),
                         (faces * [1, -1], True)):
        for index, points in enumerate(shown):
            rows = "\n".join(" ".join(flat(row)) for row in points)
            put_text(tmp_path / "test" / "landmarks" / f"{index}.txt", f"106\n{rows}\n")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read("lapa", str(tmp_path), "test")
        found = ["hardly in the order of SCHEMES" in str(w.message) for w in caught]
        assert found == [True] * wrong


# ---- Readers ---------------------------------------------------------------------------------


def wflw_row(points, box, flags, name):
    return " ".join([*flat(points), *map(str, box), *map(str, flags), name])


def test_wflw(tmp_path):
    first, second = draw_points(98), draw_points(98)
    folder = tmp_path / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
    put_text(folder / "list_98pt_rect_attr_test.txt", "\r\n".join([
        wflw_row(first, (3, 4, 50, 60), (1, 0, 0, 1, 0, 0), "0--Parade/a.jpg"),
        wflw_row(second, (5, 6, 7, 8), (0, 1, 1, 0, 1, 1), "0--Parade/a.jpg"), "", ""]))
    put_image(tmp_path / "WFLW_images" / "0--Parade" / "a.jpg")
    with pytest.warns(UserWarning, match="2 faces in the test split of .*, 2500 in the official"):
        faces = read("wflw", str(tmp_path), "test", 98)
    assert len(faces) == 2 and faces[0].image == faces[1].image  # an image may hold several faces
    same(faces[0].points, first)
    same(faces[1].points, second)
    assert faces[0].points.dtype == np.float32 and (first < 0).any()
    assert faces[0].box == (3, 4, 50, 60) and faces[0].tags == ("pose", "makeup")
    assert faces[1].tags == ("expression", "illumination", "occlusion", "blur")
    assert faces[1].identity is None
    datasets.check_images(faces)
    rows = [wflw_row(first, box, (0,) * 6, "a.jpg") for box in ((3, 4, 50, 60), (3, 4, 5))]
    put_text(folder / "list_98pt_rect_attr_train.txt", "\n".join(rows))
    with pytest.raises(UserError, match="attr_train.txt:2: found 205 numbers, wanted 206"):
        datasets.read_wflw(str(tmp_path), "train")


def test_a_missing_set_is_one_message_with_tree_and_source(tmp_path):
    for name in datasets.READERS:
        with pytest.raises(FileNotFoundError) as error:  # an empty root
            read(name, str(tmp_path), "train" if name != "cofw68" else "test")
        text = str(error.value)
        for part in (str(tmp_path), "Tree: ", "Source: ", "--data-root",
                     "--data faces needs no download"):
            assert part in text
        assert 5 <= len(text.splitlines()) <= 10, text
        for root in (str(tmp_path / "nowhere"), ""):
            with pytest.raises(FileNotFoundError, match=f"no folder {root}"):
                read(name, root, "train")
        with pytest.raises(UserError, match="no split 'valid'"):
            read(name, str(tmp_path), "valid")
    with pytest.raises(UserError, match="no set 'lfw', there are wflw, 300w, cofw, cofw68"):
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
        put_pts((root / stem).with_suffix(".pts"), faces[stem], "\r\n" if "afw" in stem else "\n")
    for suffix in ("jpg", "pts"):
        put_text(root / "afw" / f"1_1_mirror.{suffix}", "a repack's copy")
    put_text(root / "afw" / "Thumbs.db", "")
    put_text(root / "afw" / "._1_1.pts", "")
    return root, faces


def test_300w(tree_300w):
    root, wanted = tree_300w
    tags = {"lfpw/testset": ("common",), "helen/testset": ("common",), "ibug": ("challenging",)}
    for split, count in (("train", 3), ("test", 4)):
        faces = read("300w", str(root), split)
        assert len(faces) == count
        for face in faces:
            stem = face.image[len(str(root)) + 1:]
            same(face.points, wanted[stem])
            assert face.tags == tags.get(stem.rpartition("/")[0], ()) and face.box is None
        datasets.check_images(faces)
    put_pts(root / "ibug" / "image_003_1.pts", draw_points(67))
    with pytest.raises(UserError, match=r"image_003_1.pts: found 67 points, wanted 68"):
        datasets.read_300w(str(root), "test")
    (root / "ibug" / "image_092 _01.jpg").unlink()
    put_pts(root / "ibug" / "image_003_1.pts", draw_points(68))
    with pytest.raises(FileNotFoundError, match=r"no image beside .*image_092 _01.pts"):
        datasets.read_300w(str(root), "test")
    put_image(root / "ibug" / "image_003_1.png")
    with pytest.raises(UserError, match=r"3_1.jpg and .*3_1.png differ only in their endings: kee"):
        datasets.read_300w(str(root), "test")


def test_cofw_exported(tmp_path):
    points = draw_points(29)
    row = ["test/1.png", ",".join(flat(points[:5])), ",".join(flat(points)), "0.5", "40", "30.5"]
    head = "image five points scale center_w center_h".split()
    table = tmp_path / "test.tsv"
    put_text(table, "\r\n".join(map("\t".join, [head, row, ["2.png", *row[1:], "tag"], [], []])))
    for name in ("1.png", "2.png"):
        put_image(tmp_path / "test" / name, 7, (8, 9))
    with pytest.warns(UserWarning, match="nothing says whether .*test.tsv counts pixels from 0"):
        faces = read("cofw", str(tmp_path), "test")
    same(faces[1].points, points)  # as they stand
    assert faces[0].box == (-10, -19.5, 90, 80.5)
    np.testing.assert_array_equal(load_image(faces[1].image), np.full((8, 9, 3), 7))
    datasets.check_images(faces)
    put_text(table, "\n".join(map("\t".join, [row, row, [*row[:2], "1,2,3", *row[3:]]])))
    with pytest.raises(UserError, match="test.tsv:3: found 3 numbers, wanted 58"):
        datasets.read_cofw(str(tmp_path), "test")
    put_text(table, "image\n1.png 3 4\n")
    with pytest.raises(UserError, match="test.tsv:2"):
        datasets.read_cofw(str(tmp_path), "test")


def test_cofw_without_h5py_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    put_text(tmp_path / "COFW_test_color.mat", "MATLAB 7.3 MAT-file")
    with pytest.raises(ImportError, match="_test_color.mat is an HDF5 file: pip install h5py, or"):
        read("cofw", str(tmp_path), "test")


def test_cofw_matlab(tmp_path):
    """As h5py shows a MATLAB 7.3 file: axes reversed, a cell as references."""
    h5py = pytest.importorskip("h5py")
    phis, boxes = RNG.uniform(1, 60, (3, 87)), RNG.uniform(1, 40, (3, 4))
    images = [RNG.integers(0, 256, size, np.uint8) for size in ((6, 9, 3), (7, 5), (4, 8, 3))]
    for split, end in (("train", "Tr"), ("test", "T")):
        with h5py.File(tmp_path / f"COFW_{split}_color.mat", "w", userblock_size=512) as file:
            file["phis" + end], file["bboxes" + end] = phis.T, boxes.T
            cells = file.create_dataset("Is" + end, (1, 3), h5py.ref_dtype)
            for index, image in enumerate(images):
                file[f"#refs#/{index}"] = image.T
                cells[0, index] = file[f"#refs#/{index}"].ref
        faces = read("cofw", str(tmp_path), split)
        for face, phi, (x, y, w, h), image in zip(faces, phis, boxes, images, strict=True):
            same(face.points, np.stack([phi[:29], phi[29:58]], 1) - 1)
            same(face.box, (x - 1, y - 1, x + w - 1, y + h - 1))
            np.testing.assert_array_equal(load_image(face.image), np.dstack([image] * 3)[..., :3])
    with h5py.File(tmp_path / "COFW_test_color.mat", "a") as file:
        del file["phisT"]
    with pytest.raises(UserError, match="COFW_test_color.mat: found arrays .* wanted"):
        datasets.read_cofw(str(tmp_path), "test")


def test_cofw68(tmp_path, tree_300w):
    row = ",".join(["0"] * 10) + "\t" + ",".join(["1"] * 58) + "\t1\t20\t20"
    put_text(tmp_path / "cofw" / "test.tsv", f"header\ntest/a.jpg\t{row}\ntest/b.jpg\t{row}\n")
    wanted, mat = [draw_points(68), draw_points(68)], Mat()
    folder = tmp_path / "cofw68" / "test_annotations"
    for number, points in enumerate(wanted, 1):  # MATLAB: files and pixels count from 1
        mat.file(folder / f"{number}_points.mat", mat.numbers("Points", points + 1),
                 mat.numbers("Occ", np.zeros((1, 68)), 2, 9), compressed=number == 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        faces = read("cofw68", str(tmp_path), "test", 68)
    assert ["read_cofw68: 2 faces" in str(w.message) for w in caught] == [True]
    assert [face.image[-6:] for face in faces] == ["/a.jpg", "/b.jpg"] and faces[0].box is None
    for face, points in zip(faces, wanted, strict=True):
        same(face.points, points)
    assert len(read("cofw68", str(tmp_path), "train")) == 3  # of tmp_path/300w
    mat.file(folder / "2_points.mat", mat.numbers("Points", wanted[0][:29]))
    with pytest.raises(UserError, match=r"2_points.mat: found Points \(29, 2\), wanted finite"):
        datasets.read_cofw68(str(tmp_path), "test")
    (folder / "2_points.mat").unlink()
    with pytest.raises(FileNotFoundError, match="no .*2_points.mat"):
        datasets.read_cofw68(str(tmp_path), "test")


def test_helen(tmp_path):
    wanted = {name: draw_points(194) for name in ("100032540_1", "a_1", "b_1")}
    for number, (name, points) in enumerate(wanted.items(), 1):
        rows = "\r\n".join(f"{x:.2f} , {y:.2f}" for x, y in points)
        put_text(tmp_path / "annotation" / f"{number}.txt", f"{name}\r\n{rows}\r\n\r\n")
        put_image(tmp_path / ("test" if name == "a_1" else "there") / f"{name}.jpg")
    (tmp_path / "there").rename(tmp_path.parent / f"{tmp_path.name}_there")
    (tmp_path / "train_1").symlink_to(tmp_path.parent / f"{tmp_path.name}_there")
    names = tmp_path / "trainnames.txt"
    put_text(names, "b_1\n100032540_1\n")  # not in the order of the files
    put_text(tmp_path / "testnames.txt", "a_1\n\n")
    train = read("helen", str(tmp_path), "train")
    test = read("helen", str(tmp_path), "test", 194)
    assert [face.image.rpartition("train_1/")[2] for face in train] == [
        "b_1.jpg", "100032540_1.jpg"]
    same(train[0].points, wanted["b_1"])
    same(test[0].points, wanted["a_1"])
    datasets.check_images(train + test)
    put_text(tmp_path / "annotation" / "2.txt", "a_1\n1 , 2\n3 , ?\n" + "5 , 6\n" * 192)
    with pytest.raises(UserError, match=r"2.txt:3: .*wanted a number"):
        datasets.read_helen(str(tmp_path), "test")
    put_text(names, "b_1\nzz\n100032540_1\nyy\n")  # a part of the images
    with pytest.warns(UserWarning, match=r"no image of zz \(.*names.txt:2\), nor of 1 others"):
        assert len(read("helen", str(tmp_path), "train")) == 2
    put_text(names, "zz\n")
    with pytest.raises(FileNotFoundError, match=r"no image of zz \(.*trainnames.txt:1\)"):
        datasets.read_helen(str(tmp_path), "train")
    put_image(tmp_path / "train_2" / "b_1.jpg")
    put_text(names, "b_1\n")
    with pytest.raises(UserError, match=r"n_1/b_1.jpg and .*n_2/b_1.jpg are both b_1: keep one"):
        datasets.read_helen(str(tmp_path), "train")


def test_aflw(tmp_path):
    count, mat = 20002, Mat()
    data = np.tile(np.arange(38.0), (count, 1))
    boxes = np.tile([1.0, 2.0, 30.0, 40.0], (count, 1))
    data[7] = np.arange(38) - 5
    boxes[7] = 10, 90, 20, 60  # xmin xmax ymin ymax
    order = np.roll(np.arange(1, count + 1), 12)
    order = np.concatenate([order[order != 8], [8]])  # from 1; face 7 comes last
    seen = np.ones((count, 19))
    seen[order[-2] - 1, 3] = 0
    names = [mat.text("", f"{index % 4}/image{index:05d}.jpg") for index in range(count)]
    variables = [mat.matrix("nameList", (count, 1), 1, *names), mat.numbers("ra", order[None], 5),
                 mat.numbers("bbox", boxes), mat.numbers("data", data),
                 mat.numbers("mask_new", seen, 2)]
    mat.file(tmp_path / "AFLWinfo_release.mat", *variables, compressed=True)
    flickr = tmp_path / "flickr"
    flickr.mkdir()
    test = read("aflw", str(tmp_path), "test", 19)
    train = datasets.read_aflw(str(tmp_path), "train")
    assert len(train) == 20000 and len(test) == 2
    first = order[0] - 1
    assert train[0].image == str(flickr / f"{first % 4}/image{first:05d}.jpg")
    assert test[1].image == str(flickr / "3/image00007.jpg") and test[1].tags == ("frontal",)
    assert test[1].points.tolist() == [[x - 5, x + 14] for x in range(19)]
    assert test[1].box == (10, 20, 90, 60)
    assert test[0].tags == () and not any(face.tags for face in train)
    mat.file(tmp_path / "AFLWinfo_release.mat", *variables[:4])
    with pytest.raises(UserError, match="AFLWinfo_release.mat: found nameList, ra, data"):
        datasets.read_aflw(str(tmp_path), "test")


def test_lapa_and_jd_landmark(tmp_path):
    points = draw_points(106)
    rows = "\n".join(" ".join(flat(row)) for row in points)
    for split in ("train", "val", "test"):
        put_text(tmp_path / "lapa" / split / "landmarks" / "12_0.txt", f"106\n{rows}\n\n")
        put_image(tmp_path / "lapa" / split / "images" / "12_0.jpg")
        face, = read("lapa", str(tmp_path / "lapa"), split)
        same(face.points, points)  # counted from 0
        assert face.image == str(tmp_path / "lapa" / split / "images" / "12_0.jpg")
        assert face.box is None
    jd = tmp_path / "jd"
    for folder in ("Train", "Test_data1"):
        put_text(jd / folder / "landmark" / "AFW 1.jpg.txt", f"106\r\n{rows}")
        put_image(jd / folder / "picture" / "AFW 1.jpg")
    put_text(jd / "Test_data1" / "rect" / "AFW 1.jpg.rect", "3 4\n5 6\n")
    train, test = read("jd106", str(jd), "train") + read("jd106", str(jd), "test")
    assert train.box is None and test.box == (3, 4, 5, 6)
    same(test.points, points)
    datasets.check_images([face, train, test])
    for text, message in (("68\n" + "1 2\n" * 68, "txt:1: found '68', wanted the number of p"),
                          ("106\n" + "1 2\n" * 107, "txt: found 107 points, wanted 106")):
        put_text(jd / "Train" / "landmark" / "AFW 2.jpg.txt", text)
        with pytest.raises(UserError, match=f"AFW 2.jpg.{message}"):
            datasets.read_jd106(str(jd), "train")
    with pytest.raises(FileNotFoundError, match="below .*/jd, which has Test_data1, Train:\nTree"):
        read("jd106", str(jd), "val")


def test_jd_landmark_by_source(tmp_path):
    """The training tree as public codes have it."""
    rows = "\n".join(" ".join(flat(row)) for row in draw_points(106))
    for place in ("AFW", "HELEN", "LFPW"):
        folder = tmp_path / "Training_data" / place
        put_text(folder / "landmark" / f"{place}_1.jpg.txt", f"106\n{rows}")
        put_image(folder / "picture" / f"{place}_1.jpg")
    faces = read("jd106", str(tmp_path), "train")
    assert [face.image.rpartition("/")[2] for face in faces] == [
        "AFW_1.jpg", "HELEN_1.jpg", "LFPW_1.jpg"]
    datasets.check_images(faces)


def test_csv(tmp_path):
    points = draw_points(19)
    header = ["center_w", "center_h", *(f"original_{i}_{axis}" for i in range(19) for axis in "xy")]
    rows = [["image_name", "scale", "box_size", *header],
            ["0/a.jpg", "0.5", "80", "50", "60", *flat(points)], []]
    put_text(tmp_path / "face_landmarks_aflw_train.csv", "\r\n".join(map(",".join, rows)))
    put_text(tmp_path / "face_landmarks_aflw_test_frontal.csv", "")  # not a test split
    rows = [["image_name", "scale", *header], ["0/b.jpg", "0.5", "50", "60", *flat(points)], []]
    put_text(tmp_path / "test.csv", "\n".join(map(",".join, rows)))
    put_image(tmp_path / "0" / "b.jpg")
    train, = read("csv", str(tmp_path), "train", 19)
    test, = read("csv", str(tmp_path), "test")
    assert train.box == (10, 20, 90, 100) and test.box == (0, 10, 100, 110)
    assert test.image == str(tmp_path / "0" / "b.jpg")
    same(train.points, points)
    same(test.points, points)
    (tmp_path / "images").mkdir()
    test, = read("csv", str(tmp_path), "test")
    assert test.image == str(tmp_path / "images" / "0" / "b.jpg")
    with pytest.raises(UserError, match="--data csv has 19 points in .*, wanted 98"):
        read("csv", str(tmp_path), "test", 98)
    for text, message in (
            (",".join(rows[0]) + "\nb.jpg,1,2,3,4\n", "2: found 4 numbers, wanted 41"),
            ("name,scale,center_w,center_h,x,y\n", "1: found 6 columns .* wanted image_name")):
        put_text(tmp_path / "test.csv", text)
        with pytest.raises(UserError, match=f"test.csv:{message}"):
            datasets.read_csv(str(tmp_path), "test")
    put_text(tmp_path / "other_train.csv", "")
    with pytest.raises(FileNotFoundError, match="found 2 tables"):
        datasets.read_csv(str(tmp_path), "train")


HEADER = "image_name,scale,center_w,center_h,original_0_x,original_0_y,original_1_x,original_1_y\n"


@pytest.mark.parametrize("table, name, base", [
    ("face_landmarks_300w_train.csv", "a/1.jpg", 1), ("train.csv", "helen/trainset/1_1.jpg", 1),
    ("face_landmarks_wflw_train.csv", "a.jpg", 0), ("train.csv", "37--Soccer/a.jpg", 0),
    ("face_landmarks_aflw_train.csv", "0/a.jpg", 0), ("train.csv", "mine/a.jpg", None)])
def test_csv_counts_from_where_its_set_does(tmp_path, table, name, base):
    put_text(tmp_path / table, f"{HEADER}{name},0.5,60,70,20,30,40.5,50\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        face, = read("csv", str(tmp_path), "train")
    said = [f"{table} counts pixels from 0 or from 1" in str(w.message) for w in caught]
    assert said == [True] * (base is None)
    base = base or 0
    assert face.points.tolist() == [[20 - base, 30 - base], [40.5 - base, 50 - base]]
    assert face.box == (10 - base, 20 - base, 110 - base, 120 - base)


def test_csv_of_300w(tmp_path):
    """HRNet's face_landmarks_300w_valid.csv is the full set; ..._test.csv is the private one."""
    row = "1,60,70,20,30,40,50\n"
    stem = tmp_path / "face_landmarks_300w"
    put_text(stem.with_name(f"{stem.name}_test.csv"), f"{HEADER}Test/01_Indoor/i_1.png,{row}")
    with pytest.warns(UserWarning, match="300w_test.csv is the private set of 600 .*_valid.csv"):
        face, = read("csv", str(tmp_path), "test")
    assert face.points.tolist() == [[19, 29], [39, 49]] and face.tags == ()
    for end in ("valid", "valid_challenge", "valid_common"):
        put_text(stem.with_name(f"{stem.name}_{end}.csv"),
                 f"{HEADER}lfpw/testset/image_1.png,{row}ibug/image_2.jpg,{row}")
    faces = read("csv", str(tmp_path), "test")
    assert [face.tags for face in faces] == [("common",), ("challenging",)]
    assert faces[1].points.tolist() == [[19, 29], [39, 49]]


@pytest.mark.parametrize("name", ["../a.jpg", "x/../../a.jpg", "/a.jpg", "..\\\\a.jpg"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    put_text(tmp_path / "train.csv", f"{HEADER}{name},0.5,60,70,20,30,40.5,50\n")
    with pytest.raises(UserError, match=r"train.csv:2: '.*a.jpg' leads out of .*; wanted a path"):
        read("csv", str(tmp_path), "train")


def test_youtube_is_split_by_person(tmp_path):
    names = [f"First_{person}_{frame}.jpg" for person in "ABCDEFGHIJKL"
             for frame in ("00", "01", "10", "11")]
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
        same(face.points, points[face.image.rpartition("/")[2]])
    put_text(table, "header\n" + "\n".join(rows[::-1]) + "\n")  # in any order of the rows
    assert {face.identity for face in read("youtube", str(tmp_path), "test")} == people[1]
    put_text(table, "header\n" + rows[0] + "\n" + rows[1] + ",5\n")
    with pytest.raises(UserError, match="frames_keypoints.csv:3: found 137 numbers, wanted 136"):
        datasets.read_youtube(str(tmp_path), "train")


def test_widerface(tmp_path):
    def row(box, points, v=0.0):
        marks = [number for x, y in points for number in (x, y, v)]
        return " ".join(map(str, (*box, *marks, 0.4)))

    points = np.round(RNG.uniform(0, 60, (5, 2)), 3)
    lost = np.full((5, 2), -1.0)
    label = tmp_path / "train" / "label.txt"
    text = ""
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
    assert names[0] | names[1] == {f"0--Parade/0 {i}.jpg" for i in range(40)}
    assert not names[0] & names[1]
    # test: only faces with points
    assert len(train) == 2 * len(names[0]) and len(test) == len(names[1]) > 0
    for face in test + train[::2]:
        i = int(face.image.rpartition(" ")[2][:-4])
        same(face.points, points + i)
        assert face.box == (3, 4, 53.5, 64) and face.where == f"{label}:{3 * i + 2}"
    for face in train[1::2]:
        assert np.isnan(face.points).all() and face.points.dtype == np.float32
    put_text(label, row((3, 4, 50, 60), points))
    with pytest.raises(UserError, match="label.txt:1: found .*, wanted a line '# IMAGE' before"):
        datasets.read_widerface(str(tmp_path), "train")
    put_text(label, "# 0--Parade/a.jpg\n3 4 50 60\n")
    split = "train" if zlib.crc32(b"0--Parade/a.jpg") % 10 else "test"
    with pytest.raises(UserError, match="label.txt:2: found 4 numbers, wanted 20"):
        datasets.read_widerface(str(tmp_path), split)


def test_folder(tmp_path):
    wanted = {}
    for name in ("Ann Lee/1.jpg", "Ann Lee/2.JPEG", "b/c/3.png", "4.jpg", "../test/Z/5.png"):
        path = (tmp_path / "train" / name).resolve()
        put_image(path, shape=(48, 64) if "3" in name else (48, 64, 3))
        wanted[str(path)] = draw_points(11)
        put_pts(path.with_suffix(".pts"), wanted[str(path)])
    put_text(tmp_path / "train" / "notes.txt", "")
    faces = read("folder", str(tmp_path), "train", 11)
    assert [face.identity for face in faces] == [None, "Ann Lee", "Ann Lee", "b/c"]
    for face in faces:
        same(face.points, wanted[face.image])
        assert load_image(face.image).shape == (48, 64, 3)
    assert [face.identity for face in read("folder", str(tmp_path), "test")] == ["Z"]
    put_pts(tmp_path / "train" / "b" / "c" / "3.pts", draw_points(12))
    with pytest.raises(UserError, match=r"c/3.pts has 12 points, .*train/4.pts 11; wanted as many"):
        datasets.read_folder(str(tmp_path), "train")
    put_image(tmp_path / "train" / "0.png")
    with pytest.raises(FileNotFoundError, match=r"no .pts beside .*train/0.png"):
        datasets.read_folder(str(tmp_path), "train")
