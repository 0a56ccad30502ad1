"""Records and the reader of each public set, on small trees in the set's true form."""
import sys
import warnings
import zlib

import numpy as np
import pytest

from common import UserError, datasets
from common.datasets import SCHEMES, Face, load_image, read
from tests import trees
from tests.trees import Mat, put_image, put_pts, put_text

pytestmark = pytest.mark.filterwarnings("ignore:.*in the official one", "ignore:nothing says")
RNG = np.random.default_rng(0)
GREY = np.full((48, 64, 3), 100, np.uint8)


def draw_points(count):
    """(count, 2) with two decimals, some outside an image of 64 x 48."""
    return np.round(RNG.uniform(-3, 90, (count, 2)), 2)


def flat(points):
    return [f"{value:g}" for value in np.ravel(points)]


def same(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-4)


# ---- All sets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data, count", [
    ("wflw", 98), ("300w", 68), ("cofw", 29), ("cofw68", 68), ("helen", 194), ("jd106", 106),
    ("lapa", 106), ("csv", 68), ("folder", 68), ("widerface", 5)])
def test_a_reader_finds_the_faces_that_were_written(data, count, tmp_path):
    root = trees.make(data, tmp_path / data)
    for split in ("train", "test"):
        drawn = trees.drawn(split, count)
        faces = read(data, root, split)
        assert len(faces) == len(drawn)
        datasets.check_images(faces)
        left = list(range(len(drawn)))
        for face in faces:
            gaps = [np.abs(drawn[i][1] - face.points).max() for i in left]
            assert min(gaps) < 2e-3 and face.points.dtype == np.float32
            pixels, _, box, person = drawn[left.pop(int(np.argmin(gaps)))]
            assert np.abs(load_image(face.image).astype(int) - pixels).mean() < 8  # as JPEG
            assert face.identity == (person if data == "folder" else None)
            assert (face.box is None) == (data in ("300w", "cofw68", "helen", "lapa", "folder"))
            if face.box is not None:
                middle = np.add(face.box[:2], face.box[2:]) / 2
                assert np.abs(middle - np.add(box[:2], box[2:]) / 2).max() < 1.5


def test_a_missing_set_is_one_message_with_tree_and_source(tmp_path):
    for data in datasets.READERS:
        for root, message in ((str(tmp_path), str(tmp_path)), ("", r"no folder \n.*not given"),
                              (str(tmp_path / "nowhere"), "no folder .*nowhere")):
            with pytest.raises(FileNotFoundError, match=message) as error:
                read(data, root, "train" if data != "cofw68" else "test")
            text = str(error.value)
            for part in ("Tree: ", "Source: ", "--data-root", "--data faces needs no download"):
                assert part in text
            assert 5 <= len(text.splitlines()) <= 10, text


@pytest.mark.parametrize("name", ["../a.jpg", "x/../../a.jpg", "/a.jpg", "..\\\\a.jpg"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    put_text(tmp_path / "train.csv", f"{HEADER}{name},0.5,60,70,20,30,40.5,50\n")
    with pytest.raises(UserError, match=r"train.csv:2: '.*a.jpg' leads out of .*; wanted a path"):
        read("csv", str(tmp_path), "train")


# ---- Images and points ---------------------------------------------------------------------------


def test_check_images_names_the_first_and_counts_all(tmp_path):
    put_image(tmp_path / "good.png", GREY)
    put_text(tmp_path / "bad.png", "no image")
    put_text(tmp_path / "empty.png", "")
    good, bad, empty, gone = (Face(str(tmp_path / f"{name}.png"))
                              for name in ("good", "bad", "empty", "gone"))
    datasets.check_images([good, good, Face(np.zeros((2, 2, 3), np.uint8)), Face(lambda: None)])
    listed = Face(gone.image, where="list.txt:7")
    for faces, message in (
            ([good, bad, bad], "bad.png is no image that cv2 can decode; so for 1 of 2 images"),
            ([good, empty, bad], "empty.png is no image that cv2 can decode; so for 2 of 3"),
            ([good, listed], r"gone.png \(listed in list.txt:7\) does not exist; so for 1 of 2")):
        with pytest.raises(UserError, match=message):
            datasets.check_images(faces)
    for name in ("a.png", "a.jpg"):
        path = tmp_path / name
        put_image(path, GREY)
        datasets.check_images([Face(str(path))])
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.warns(UserWarning, match=f"{name} seems to be cut short; so for 1 of 1"):
            datasets.check_images([Face(str(path))])


def test_points_that_cannot_be_right(tmp_path):
    points = draw_points(11)
    lost = points.copy()
    lost[[2, 5]] = -1  # 0 0 in the file
    sets = {"fractions": [points / 100, points / 90], "one": [points, np.full((11, 2), 7.0)],
            "line": [points, points[:, :1] * [1, 2] + [0, 3]],
            "other": [points, draw_points(12)], "lost": [points, lost]}
    for name, shapes in sets.items():
        for i, shape in enumerate(shapes):
            put_image(tmp_path / name / "train" / f"{i}.png", GREY)
            put_pts(tmp_path / name / "train" / f"{i}.pts", shape)
    for name, message in (("fractions", "all points lie within .* fractions of the image"),
                          ("one", "1.pts: all points are at one place, .* 1 of 2 faces"),
                          ("line", "1.pts: all points are at one place, or on one line; so for 1"),
                          ("other", "1.pts has 12 points, .*0.pts 11; wanted as many in all")):
        with pytest.raises(UserError, match=message):
            read("folder", str(tmp_path / name), "train")
    with pytest.warns(UserWarning, match="1.pts has several points exactly at 0 0 .* 1 of 2 faces"):
        read("folder", str(tmp_path / "lost"), "train")


def test_a_warning_for_faces_without_eye_distance():
    points = np.stack([draw_points(5), draw_points(5)])
    points[1, 1] = points[1, 0]
    with pytest.warns(UserWarning, match="^b has both pupils at one place, .* so for 1 of 2 faces"):
        datasets.check_landmarks(points, "ab".__getitem__, "root")


def test_a_warning_for_another_order_of_the_points():
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
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            datasets.check_points([Face("a.jpg", points) for points in shown], "root")
        found = ["hardly in the order of SCHEMES[106]" in str(w.message) for w in caught]
        assert found == [True] * wrong


def test_subsets_are_in_the_order_of_the_papers():
    faces = [Face("a.jpg", tags=tags) for tags in (("blur", "pose"), (), ("z", "pose"))]
    chosen = datasets.subsets(faces)
    assert {tag: mask.tolist() for tag, mask in chosen.items()} == {
        "": [True] * 3, "pose": [True, False, True], "blur": [True, False, False],
        "z": [False, False, True]}
    assert list(chosen) == ["", "pose", "blur", "z"]


# ---- What is peculiar to each --------------------------------------------------------------------


def test_wflw(tmp_path):
    points = draw_points(98)
    folder = tmp_path / "WFLW_annotations" / "list_98pt_rect_attr_train_test"

    def row(box, flags):
        return " ".join([*flat(points), *map(str, box), *map(str, flags), "0--Parade/a.jpg"])

    rows = [row((3, 4, 50, 60), (1, 0, 0, 1, 0, 0)), row((5, 6, 7, 8), (0, 1, 1, 0, 1, 1))]
    put_text(folder / "list_98pt_rect_attr_test.txt", "\r\n".join([*rows, "", ""]))
    with pytest.warns(UserWarning, match="2 faces in the test split of .*, 2500 in the official"):
        faces = read("wflw", str(tmp_path), "test")
    assert faces[0].image == faces[1].image  # an image may hold several faces
    same(faces[0].points, points)
    assert faces[0].box == (3, 4, 50, 60) and faces[0].tags == ("pose", "makeup")
    assert faces[1].tags == ("expression", "illumination", "occlusion", "blur")
    put_text(folder / "list_98pt_rect_attr_train.txt", rows[0] + "\n" + row((3, 4, 5), (0,) * 6))
    with pytest.raises(UserError, match="attr_train.txt:2: found 205 numbers, wanted 206"):
        read("wflw", str(tmp_path), "train")


def test_300w(tmp_path):
    root = trees.make("300w", tmp_path / "300w")
    for suffix in ("jpg", "pts"):  # a repack's copy
        copy = (tmp_path / "300w" / "afw" / f"image_000 _1.{suffix}").read_bytes()
        (tmp_path / "300w" / "afw" / f"image_000 _1_mirror.{suffix}").write_bytes(copy)
    put_text(tmp_path / "300w" / "afw" / "._1_1.pts", "")
    assert len(read("300w", root, "train")) == trees.TRAIN
    for face in read("300w", root, "test"):
        assert face.tags == (("challenging",) if "/ibug/" in face.image else ("common",))
    put_pts(tmp_path / "300w" / "ibug" / "z.pts", draw_points(68))
    with pytest.raises(FileNotFoundError, match=r"no image beside .*ibug/z.pts"):
        read("300w", root, "test")
    put_image(tmp_path / "300w" / "ibug" / "z.png", GREY)
    put_image(tmp_path / "300w" / "ibug" / "z.jpg", GREY)
    with pytest.raises(UserError, match=r"z.jpg and .*z.png differ only in their endings: keep"):
        read("300w", root, "test")


def test_folder_names_people_by_their_folders(tmp_path):
    for name in ("Ann Lee/1.jpg", "b/c/3.png", "4.JPEG"):
        put_image(tmp_path / "train" / name, GREY)
        put_pts((tmp_path / "train" / name).with_suffix(".pts"), draw_points(11))
    faces = read("folder", str(tmp_path), "train")
    assert [face.identity for face in faces] == [None, "Ann Lee", "b/c"]
    put_image(tmp_path / "train" / "0.png", GREY)
    with pytest.raises(FileNotFoundError, match=r"no .pts beside .*train/0.png"):
        read("folder", str(tmp_path), "train")


def test_cofw_exported(tmp_path):
    points = draw_points(29)
    row = ["test/1.png", ",".join(flat(points[:5])), ",".join(flat(points)), "0.5", "40", "30.5"]
    head = "image five points scale center_w center_h".split()
    table = tmp_path / "test.tsv"
    put_text(table, "\r\n".join(map("\t".join, [head, row, ["2.png", *row[1:], "tag"], [], []])))
    with pytest.warns(UserWarning, match="nothing says whether .*test.tsv counts pixels from 0"):
        faces = read("cofw", str(tmp_path), "test")
    same(faces[1].points, points)  # as they stand
    assert faces[0].box == (-10, -19.5, 90, 80.5)
    assert [face.image for face in faces] == [str(tmp_path / f"test/{i}.png") for i in (1, 2)]
    put_text(table, "\n".join(map("\t".join, [head, row, [*row[:2], "1,2,3", *row[3:]]])))
    with pytest.raises(UserError, match="test.tsv:3: found 16 numbers, wanted 71"):
        read("cofw", str(tmp_path), "test")


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


def test_cofw68(tmp_path):
    root = trees.make("cofw68", tmp_path / "cofw68")
    with warnings.catch_warnings(record=True) as caught:  # none of them of COFW's 29 points
        warnings.simplefilter("always")
        read("cofw68", root, "test")
    assert ["--data cofw68: 8 faces" in str(w.message) for w in caught] == [True]
    (tmp_path / "cofw68" / "cofw68" / "test_annotations" / "2_points.mat").unlink()
    with pytest.raises(FileNotFoundError, match="2_points.mat"):
        read("cofw68", root, "test")


def test_helen(tmp_path):
    root = trees.make("helen", tmp_path / "set")
    (tmp_path / "set" / "train_1").rename(tmp_path / "elsewhere")
    (tmp_path / "set" / "train_1").symlink_to(tmp_path / "elsewhere")
    names = tmp_path / "set" / "trainnames.txt"
    put_text(names, "102_1\n101_1\n")  # not in the order of the files
    faces = read("helen", root, "train")
    assert [face.image[-9:-4] for face in faces] == ["102_1", "101_1"]
    put_text(names, "102_1\nzz\n101_1\nyy\n")  # a part of the images
    with pytest.warns(UserWarning, match=r"no image of zz \(.*names.txt:2\), nor of 1 others"):
        assert len(read("helen", root, "train")) == 2
    put_image(tmp_path / "set" / "train_2" / "102_1.jpg", GREY)
    with pytest.raises(UserError, match=r"_1/102_1.jpg and .*_2/102_1.jpg are both 102_1: keep"):
        read("helen", root, "train")
    put_text(tmp_path / "set" / "annotation" / "1.txt", "101_1\n1 , 2\n3 , ?\n" + "5 , 6\n" * 192)
    put_text(names, "101_1\n")
    with pytest.raises(UserError, match=r"1.txt:3: .*wanted a number"):
        read("helen", root, "train")


def test_aflw(tmp_path):
    count, mat = 20002, Mat()
    data = np.tile(np.arange(38.0), (count, 1))
    boxes = np.tile([1.0, 2.0, 30.0, 40.0], (count, 1))
    data[7] = np.arange(38) - 5
    data[:, -1] += 9  # else they lie on a line
    boxes[7] = 10, 90, 20, 60  # xmin xmax ymin ymax
    order = np.roll(np.arange(1, count + 1), 12)
    order = np.concatenate([order[order != 8], [8]])  # from 1; face 7 comes last
    seen = np.ones((count, 19))
    seen[order[-2] - 1, 3] = 0
    names = [mat.text("", f"{index % 4}/image{index:05d}.jpg") for index in range(count)]
    mat.file(tmp_path / "AFLWinfo_release.mat", mat.matrix("nameList", (count, 1), 1, *names),
             mat.numbers("ra", order[None], 5), mat.numbers("bbox", boxes),
             mat.numbers("data", data), mat.numbers("mask_new", seen, 2), compressed=True)
    train = datasets.read_aflw(str(tmp_path), "train")
    test = read("aflw", str(tmp_path), "test")
    assert len(train) == 20000 and len(test) == 2
    first = order[0] - 1
    assert train[0].image == str(tmp_path / "flickr" / f"{first % 4}/image{first:05d}.jpg")
    assert test[1].image == str(tmp_path / "flickr" / "3/image00007.jpg")
    assert test[1].points.tolist() == [[x - 5, x + 14] for x in range(18)] + [[13, 41]]
    assert test[1].box == (10, 20, 90, 60) and test[1].tags == ("frontal",)
    assert test[0].tags == () and not any(face.tags for face in train)


def test_lapa_and_jd_landmark(tmp_path):
    points = draw_points(106)
    rows = "\n".join(" ".join(flat(row)) for row in points)
    put_text(tmp_path / "lapa" / "val" / "landmarks" / "12_0.txt", f"106\n{rows}\n\n")
    face, = read("lapa", str(tmp_path / "lapa"), "val")
    same(face.points, points)  # counted from 0
    assert face.image == str(tmp_path / "lapa" / "val" / "images" / "12_0.jpg")
    jd = tmp_path / "jd"
    for folder in ("Train", "Test_data1"):
        put_text(jd / folder / "landmark" / "AFW 1.jpg.txt", f"106\r\n{rows}")
    put_text(jd / "Test_data1" / "rect" / "AFW 1.jpg.rect", "3 4\n5 6\n")
    train, test = read("jd106", str(jd), "train") + read("jd106", str(jd), "test")
    assert train.box is None and test.box == (3, 4, 5, 6)
    assert train.image == str(jd / "Train" / "picture" / "AFW 1.jpg")
    for text, message in (("68\n" + "1 2\n" * 68, "txt:1: found '68', wanted the number of p"),
                          ("106\n" + "1 2\n" * 107, "txt: found 107 points, wanted 106")):
        put_text(jd / "Train" / "landmark" / "AFW 2.jpg.txt", text)
        with pytest.raises(UserError, match=f"AFW 2.jpg.{message}"):
            read("jd106", str(jd), "train")
    with pytest.raises(FileNotFoundError, match="below .*/jd, which has Test_data1, Train:\nTree"):
        read("jd106", str(jd), "val")


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


def test_csv_of_aflw_has_box_sizes(tmp_path):
    header = HEADER.replace("scale,", "scale, box_size,")
    put_text(tmp_path / "face_landmarks_aflw_train.csv", f"{header}0/a.jpg,1,80,50,60,1,2,3,4\n")
    put_text(tmp_path / "face_landmarks_aflw_test_frontal.csv", "")  # not a test split
    face, = read("csv", str(tmp_path), "train")
    assert face.box == (10, 20, 90, 100) and face.image == str(tmp_path / "0" / "a.jpg")
    (tmp_path / "images").mkdir()
    face, = read("csv", str(tmp_path), "train")
    assert face.image == str(tmp_path / "images" / "0" / "a.jpg")
    with pytest.raises(FileNotFoundError, match="0 tables test.csv or"):
        read("csv", str(tmp_path), "test")
    put_text(tmp_path / "other_train.csv", "")
    with pytest.raises(FileNotFoundError, match="2 tables"):
        read("csv", str(tmp_path), "train")
    for text, message in ((HEADER + "b.jpg,1,2,3,4\n", "2: found 4 numbers, wanted 7"),
                          ("name,scale,center_w,center_h,x,y\n", "1: found 6 columns .* wanted")):
        put_text(tmp_path / "test.csv", text)
        with pytest.raises(UserError, match=f"test.csv:{message}"):
            read("csv", str(tmp_path), "test")


def test_csv_of_300w(tmp_path):
    """HRNet's face_landmarks_300w_valid.csv is the full set; ..._test.csv is the private one."""
    row = "1,60,70,20,30,40,50\n"
    stem = str(tmp_path / "face_landmarks_300w")
    put_text(tmp_path / f"{stem}_test.csv", f"{HEADER}Test/01_Indoor/i_1.png,{row}")
    with pytest.warns(UserWarning, match="300w_test.csv is the private set of 600 .*_valid.csv"):
        face, = read("csv", str(tmp_path), "test")
    assert face.points.tolist() == [[19, 29], [39, 49]] and face.tags == ()
    for end in ("valid", "valid_challenge", "valid_common"):
        put_text(tmp_path / f"{stem}_{end}.csv",
                 f"{HEADER}lfpw/testset/image_1.png,{row}ibug/image_2.jpg,{row}")
    faces = read("csv", str(tmp_path), "test")
    assert [face.tags for face in faces] == [("common",), ("challenging",)]
    assert faces[1].points.tolist() == [[19, 29], [39, 49]]


def test_youtube_is_split_by_person(tmp_path):
    root = trees.make("youtube", tmp_path / "set")
    train, test = (read("youtube", root, split) for split in ("train", "test"))
    people = [{face.identity for face in faces} for faces in (train, test)]
    assert len(people[0]) == 10 and len(people[1]) == 2 and not people[0] & people[1]
    assert len(train) == 20 and len(test) == 4 and "Person_00" in people[0] | people[1]
    datasets.check_images(train + test)
    table = tmp_path / "set" / "data" / "training_frames_keypoints.csv"
    head, *rows = table.read_text().splitlines()
    put_text(table, "\n".join([head, *rows[::-1]]))  # in any order of the rows
    assert {face.identity for face in read("youtube", root, "test")} == people[1]
    put_text(table, "\n".join([head, rows[0], rows[1] + ",5"]))
    with pytest.raises(UserError, match="frames_keypoints.csv:3: found 137 numbers, wanted 136"):
        read("youtube", root, "train")


def test_widerface(tmp_path):
    def row(box, points, v=0.0):
        marks = [number for x, y in points for number in (x, y, v)]
        return " ".join(map(str, (*box, *marks, 0.4)))

    points = np.round(RNG.uniform(0, 60, (5, 2)), 3)
    label = tmp_path / "train" / "label.txt"
    text = ""
    for i in range(40):
        rows = row((3, 4, 50.5, 60), points + i, 1.0), row((1, 2, 9, 9), points * 0 - 1, -1.0)
        text += "\n".join([f"# 0--Parade/0 {i}.jpg", *rows, ""])
    put_text(label, text + f"# 1--Riot/none.jpg\n{row((5, 5, 0, 9), points)}\n")
    train, test = (read("widerface", str(tmp_path), split) for split in ("train", "test"))
    names = [{face.image.partition("images/")[2] for face in faces} for faces in (train, test)]
    assert names[0] | names[1] == {f"0--Parade/0 {i}.jpg" for i in range(40)}
    assert not names[0] & names[1]
    assert len(train) == 2 * len(names[0])
    assert len(test) == len(names[1]) > 0  # only faces with points
    for face in test + train[::2]:
        i = int(face.image.rpartition(" ")[2][:-4])
        same(face.points, points + i)
        assert face.box == (3, 4, 53.5, 64) and face.where == f"{label}:{3 * i + 2}"
    assert all(np.isnan(face.points).all() for face in train[1::2])
    put_text(label, "# 0--Parade/a.jpg\n3 4 50 60\n")
    split = "train" if zlib.crc32(b"0--Parade/a.jpg") % 10 else "test"
    with pytest.raises(UserError, match="label.txt:2: found 4 numbers, wanted 20"):
        read("widerface", str(tmp_path), split)
