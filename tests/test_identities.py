"""Identity folders, records, the landmarks beside them, and whole images as batches."""
import os
import pickle
import struct

import cv2
import numpy as np
import pytest
import torch

from common import UserError, datasets, identities, synthetic, warp
from common.datasets import Face, load_image
from tests.trees import MAGIC, payload, put_image, put_pts, put_records, put_text, record

RNG = np.random.default_rng(0)


def picture(size=(20, 16)):
    return RNG.integers(0, 256, (*size, 3), np.uint8)


def encoded(image, suffix=".png"):
    return cv2.imencode(suffix, image[..., ::-1])[1].tobytes()


# ---- Identity folders ----------------------------------------------------------------------------

def people(root, points=5):
    """Persons n10 and n2 with images 2 and 10, 10 in a folder of its own; a .pts beside each."""
    for person in ("n10", "n2"):
        for stem in ("10/10", "2"):
            put_image(root / person / f"{stem}.jpg", picture())
            put_pts(root / person / f"{stem}.pts", RNG.uniform(0, 20, (points, 2)))
    return root


def test_identities_are_the_first_folders_in_natural_order(tmp_path):
    names = ["10", "2", "a", "a1", "a02", "a2", "1b", "b", ""]
    ordered = ["", "1b", "2", "10", "a", "a1", "a02", "a2", "b"]
    assert sorted(names, key=identities.natural) == ordered
    faces = identities.read_identities(str(people(tmp_path)))
    assert [face.identity for face in faces] == ["n2", "n2", "n10", "n10"]
    found = [os.path.relpath(face.image, tmp_path) for face in faces[:2]]
    assert found == ["n2/2.jpg", "n2/10/10.jpg"]
    images = identities.FolderImages(faces)
    assert images.labels.tolist() == [0, 0, 1, 1] and images.ids.tolist() == ["n2", "n10"]
    np.testing.assert_array_equal(images[3], load_image(faces[3].image))
    identities.check_points(faces, "TPS")
    (tmp_path / "n2" / "2.pts").unlink()
    faces = identities.read_identities(str(tmp_path))
    words = "n2/2.jpg has no landmarks, which TPS needs; so for 1 of 4.*--land"
    with pytest.raises(UserError, match=words):
        identities.check_points(faces, "TPS")
    put_pts(tmp_path / "n2" / "2.pts", np.ones((6, 2)))
    with pytest.raises(UserError, match="has [56] points, .*.pts [56]; wanted as many in all"):
        identities.read_identities(str(tmp_path))


def test_identities_that_are_none(tmp_path):
    read = identities.read_identities
    with pytest.raises(FileNotFoundError, match="no folder .*\n(.*\n)*Tree: PERSON/NAME.jpg"):
        read(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no image"):
        read(str(tmp_path))
    put_image(tmp_path / "Ann" / "1.jpg", picture())
    with pytest.raises(UserError, match="all 1 images are of one identity, Ann; wanted two"):
        read(str(tmp_path))
    put_image(tmp_path / "stray.png", picture())
    with pytest.raises(UserError, match="stray.png lies in no person's folder"):
        read(str(tmp_path))
    with pytest.raises(UserError, match="stray.png has no identity, nor have 0 other"):
        identities.FolderImages([Face(str(tmp_path / "stray.png"))])


def test_identities_follow_links_and_pass_over_hidden_files(tmp_path):
    people(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for person in ("n2", "n10"):
        (tmp_path / "b" / person).symlink_to(tmp_path / "a" / person)
    for hidden in ("a/n2/.ipynb_checkpoints/2.jpg", "a/n2/._2.jpg", "b/__MACOSX/2.jpg"):
        put_image(tmp_path / hidden, picture())
    faces = identities.read_identities(str(tmp_path / "b"))
    assert [face.identity for face in faces] == ["n2", "n2", "n10", "n10"]
    (tmp_path / "a" / "n10" / "up").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="n10/up.* is a link to a folder that holds it"):
        identities.read_identities(str(tmp_path / "a"))


# ---- Landmarks ----------------------------------------------------------------------------------

def test_points_of_a_folder_that_mirrors_the_images(tmp_path):
    root = str(people(tmp_path / "a"))
    faces = identities.read_identities(root)
    bare = [Face(face.image) for face in faces]
    found = identities.attach_points(bare, root, root)
    np.testing.assert_array_equal([face.points for face in found], [face.points for face in faces])
    (tmp_path / "a/n2/2.pts").unlink()
    found = identities.attach_points(bare, root, root)
    assert [face.points is None for face in found] == [True, False, False, False]
    found = identities.attach_points(faces, root, root)                         # keeps what it has
    np.testing.assert_array_equal(found[0].points, faces[0].points)
    put_pts(tmp_path / "a/n2/2.pts", np.ones((6, 2)))
    with pytest.raises(UserError, match="5 points for n2/10/10.jpg, 6 for n2/2.jpg"):
        identities.attach_points(bare, root, root)
    put_pts(tmp_path / "b" / "x.pts", np.ones((5, 2)))
    words = "covers other images: it has .*x.pts, of 4 wanted images the .* n2"
    with pytest.raises(UserError, match=words):
        identities.attach_points(bare, str(tmp_path / "b"), root)
    put_text(tmp_path / "p.csv", "n2/2.jpg,1,2,3,4\n")
    with pytest.raises(UserError, match="has 2 points, the .pts of .*n2/2.jpg 5; wanted as many"):
        identities.attach_points(faces, str(tmp_path / "p.csv"), root)


def test_points_of_tables(tmp_path):
    path = tmp_path / "points.csv"
    put_text(path, "image,x0,y0,x1,y1\nn2/2.jpg,1,2,30,4\n7,5,6,7,8\n")
    found = identities.read_landmarks(["n2/1.jpg", "n2/2.jpg", "7"], str(path))
    wanted = [[[np.nan] * 2] * 2, [[1, 2], [30, 4]], [[5, 6], [7, 8]]]
    np.testing.assert_array_equal(found, wanted)
    values = RNG.uniform(-0.1, 1.1, (2, 10))                        # CVLface's: places, fractions
    rows = [",".join(map(str, [place, *row])) for place, row in zip((2, 0), values)]
    put_text(path, "\n".join([CVLFACE, *rows]))
    found = identities.read_landmarks("abc", str(path))
    np.testing.assert_allclose(found[[2, 0]], values.reshape(2, 5, 2) * 112, atol=1e-4)
    assert np.isnan(found[1]).all()
    line = ",".join(map(str, [0, *(datasets.ARCFACE_5 / 112).flatten()]))  # of an aligned image
    put_text(path, f"{CVLFACE}\n{line}\n")
    found = identities.read_landmarks("a", str(path))[0]
    np.testing.assert_allclose(found, datasets.ARCFACE_5, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="--landmarks .*none.csv: no such"):
        identities.read_landmarks("abc", str(tmp_path / "none.csv"))


CVLFACE = "idx," + ",".join(f"ldmk_{i}" for i in range(10))


@pytest.mark.parametrize("text, message", [
    ("b,1,2,3,4\nb.jpg,1,2,3,4\n", "several rows of image b"),
    ("b,1,2,3,4\nb,1,2,3,4\n", "several rows of image b"),
    ("x.jpg,1,2,3,4\n", "it has x, of 3 wanted images the first is a"),
    ("b,.1,.2,1.1,.4\n", "points.csv: all points lie within .* fractions of the image"),
    (f"{CVLFACE}\n5,{'0.5,' * 9}1\n", "it has image 5, of 3 wanted images the first is a"),
    (f"{CVLFACE}\n" + f"1,{'0.5,' * 9}1\n" * 2, "2 rows of 1 images, wanted one each"),
    (f"{CVLFACE}\n1,{'50,' * 9}1\n", "found 50 and the like, wanted fractions"),
    (f"{CVLFACE}\n1,{'0.5,' * 9}x\n", "points.csv: could not convert"),
    (f"{CVLFACE}\n1,2\n", "wanted rows of 11"), (f"{CVLFACE}\n", "wanted rows of 11")])
def test_points_of_tables_that_are_wrong(tmp_path, text, message):
    put_text(tmp_path / "points.csv", text)
    with pytest.raises(UserError, match=message):
        identities.read_landmarks("abc", str(tmp_path / "points.csv"))


# ---- Records -------------------------------------------------------------------------------------

def test_records_with_a_header(tmp_path):
    """As insightface writes them: a header, images, then a record for each identity."""
    images = [picture() for _ in range(4)]
    contents = [payload(label, encoded(image)) for label, image in zip((90, 90, 5, 90), images)]
    contents = [payload((5, 7)), *contents, payload((1, 3)), payload((3, 5))]
    records = identities.Records(put_records(tmp_path, contents))
    assert len(records) == 4 and records.keys.tolist() == [1, 2, 3, 4]
    assert records.labels.tolist() == [1, 1, 0, 1] and records.ids.tolist() == [5, 90]
    copy = pickle.loads(pickle.dumps(records))
    for found in (records, identities.Records(str(tmp_path / "train.rec")), copy):
        for i, image in enumerate(images):
            np.testing.assert_array_equal(found[i], image)
    assert not list(tmp_path.glob("*.part")) and (tmp_path / "train.rec.npy").exists()
    assert records._file is not None and pickle.loads(pickle.dumps(records))._file is None
    batch = identities.WholeImages(records, 20).__getitems__([(0, 2), (0, 0)])
    np.testing.assert_array_equal(batch["image"][1, :, 2:18], images[0])
    with pytest.raises(IndexError):
        records[4]


def test_records_without_a_header(tmp_path):
    """As CVLface writes them: key 0 is an image. Of a label array the first counts."""
    contents = [payload(3, encoded(picture())), payload((2, 9), encoded(picture()))]
    records = identities.Records(put_records(tmp_path, contents))
    assert records.labels.tolist() == [1, 0] and records.keys.tolist() == [0, 1]


def test_a_record_that_was_cut_at_the_magic_number(tmp_path):
    jpeg = encoded(picture(), ".jpg")
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 42) + b"xx" + MAGIC * 2 + b"y" * 28 + MAGIC
    jpeg = jpeg[:2] + comment + jpeg[2:]
    contents = [payload(0, jpeg), payload(1, encoded(picture()))]
    assert record(contents[0]).count(MAGIC) == 4                           # itself, and three parts
    records = identities.Records(put_records(tmp_path, contents))
    np.testing.assert_array_equal(records[0], identities.decode(jpeg, ""))
    assert records._payload(0, int(records._lengths[0])) == contents[0]
    header = struct.pack("<IfQQ", 0, 1.0, 0xced7230a, 0)              # the image's id is the number
    records = identities.Records(put_records(tmp_path, [header + jpeg, contents[0]]))
    assert records.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(records[0], identities.decode(jpeg, ""))


def test_records_that_are_damaged(tmp_path):
    root = put_records(tmp_path, [payload(label, encoded(picture())) for label in (0, 1, 2)])
    rec, idx = tmp_path / "train.rec", tmp_path / "train.idx"
    data, lines = rec.read_bytes(), idx.read_text()
    cut = r"train.rec \({} bytes\) is cut short, or .*train.idx \(3 records\) belongs to another: "
    for content, text, words in (
            (data[:-20], lines, cut.format(len(data) - 20) + "no whole record 2 at byte"),
            (data[:-1200], lines, cut.format(len(data) - 1200) + "record 2 would be at byte"),
            (data, lines.replace("\t0", "\t4"), "to another: no whole record 0 at byte 4"),
            (data, lines + "3\t99999999\n", "record 3 would be at byte 99999999"),
            (data, "one two\n", "train.idx: could not convert")):
        rec.write_bytes(content)
        idx.write_text(text)
        with pytest.raises(UserError, match=words):
            identities.Records(root)
    idx.write_text(lines)
    records = identities.Records(root)
    rec.write_bytes(b"\0" * len(data))
    with pytest.raises(UserError, match="no whole record at byte 0: it is cut short, or was chang"):
        records[0]
    idx.unlink()
    with pytest.raises(FileNotFoundError, match="no .*train.idx; wanted a folder with train.rec"):
        identities.Records(root)


IMAGE = encoded(picture())


@pytest.mark.parametrize("contents, words", [
    ([payload((9, 12)), payload(0, b"x"), payload(1, b"x")], "header counts 8 .* index finds 2"),
    ([payload(4, IMAGE)] * 2, "2 images of 1 identities, wanted two"),
    *(([payload(value, IMAGE) for value in (0, 1, label, 2)],
       f"train.rec, record 2: found the label {shown}, wanted the number")
      for label, shown in ((np.nan, "nan"), (1e30, "1e.30"), (-7, "-7"), (2.5, "2.5")))])
def test_records_of_the_wrong_content(tmp_path, contents, words):
    with pytest.raises(UserError, match=words):
        identities.Records(put_records(tmp_path, contents))


def test_records_whose_image_cannot_be_decoded(tmp_path):
    records = identities.Records(put_records(tmp_path, [payload(i, b"no image") for i in (0, 1)]))
    with pytest.raises(UserError, match="train.rec, record 1: 8 bytes that cannot be decoded"):
        records[1]
    huge = IMAGE[:16] + struct.pack(">II", 60000, 60000) + IMAGE[24:]           # width and height
    with pytest.raises(UserError, match="^x: .* bytes that cannot be decoded"):
        identities.decode(huge, "x")


def test_what_is_kept_is_used_while_the_sources_stay_and_never_if_damaged(tmp_path):
    calls, source, kept = [], tmp_path / "a.txt", tmp_path / "a.txt.npy"

    def found():
        def make():
            calls.append(1)
            return np.arange(len(calls))
        return len(identities.cached(make, str(source)))

    source.write_text("x")
    assert [found(), found()] == [1, 1]
    os.utime(source, ns=(1, 1))                                        # another file, even if older
    assert found() == 2
    source.write_text("xy")
    os.utime(source, ns=(1, 1))                                        # of another size
    assert found() == 3
    whole = kept.read_bytes()
    flipped = bytes([*whole[:130], whole[130] ^ 1, *whole[131:]])
    for number, damaged in enumerate((b"\x93NUM", b"", flipped, whole[:-1]), 4):
        kept.write_bytes(damaged)
        assert [found(), found()] == [number, number]
    kept.unlink()
    kept.mkdir()                                                        # cannot be written
    assert found() == 8 and not list(tmp_path.glob("*.part"))


# ---- Whole images --------------------------------------------------------------------------------

def test_whole_images_of_the_size_are_copied_and_others_fitted():
    images = [picture((24, 24)), np.full((10, 5, 3), 200, np.uint8),
              np.full((60, 120, 3), 50, np.uint8)]
    points = np.array([[[3.0, 4]], [[4.5, 9.5]], [[-0.5, -0.5]]])
    batch = identities.WholeImages(images, 24, points).__getitems__([(0, 0), (0, 1), (0, 2)])
    np.testing.assert_array_equal(batch["image"][0], images[0])
    np.testing.assert_allclose(batch["points"][:, 0], [[3, 4], [17.5, 23.5], [-0.5, 5.5]],
                               atol=1e-5)
    np.testing.assert_allclose(batch["matrix"][1], [[2.4, 0, 6.7], [0, 2.4, 0.7]], atol=1e-5)
    assert (batch["image"][1, 2:-2, 7:17] == 200).all() and (batch["image"][1, :, :5] == 127).all()
    assert (batch["image"][2, 6:18] == 50).all() and (batch["image"][2, :6] == 127).all()
    assert batch["image"].dtype == torch.uint8 and batch["index"].tolist() == [0, 1, 2]
    # shrinking does not alias
    stripes = np.tile(np.array([0, 255], np.uint8)[:, None, None], (60, 120, 3))
    shrunk = identities.WholeImages([stripes], 30).__getitems__([(0, 0)])["image"]
    assert np.ptp(shrunk.numpy().astype(int)) <= 2 and abs(float(shrunk.float().mean()) - 127.5) < 1


def turn(rng, size):
    matrix = np.array([[0.9, 0.1, rng.uniform(-2, 2)], [-0.1, 0.9, 3]])
    return matrix, rng.random() < 0.5, {"extra": rng.random(2)}


def test_whole_images_follow_the_augmentation_as_crops_do():
    """The same crops as CropDataset's, for images that both need not resize."""
    box = (-0.5, -0.5, 31.5, 31.5)
    faces = [Face(picture((32, 32)), RNG.uniform(0, 31, (5, 2)).astype(np.float32), box)
             for _ in range(3)]
    flip, keys = datasets.SCHEMES[5].flip, [(epoch, i) for epoch in range(3) for i in range(3)]
    frames = datasets.square_crops(datasets.face_boxes(faces, "face"), 32, 1.0)
    crops = datasets.CropDataset(faces, frames, 32, turn, reach=1.0, flip=flip,
                                 seed=4).__getitems__(keys)
    points = np.stack([face.points for face in faces])
    whole = identities.WholeImages([face.image for face in faces], 32, points, turn, flip, 4)
    whole = whole.__getitems__(keys)
    assert whole.keys() == crops.keys()
    for name in crops:
        if name != "image":
            np.testing.assert_allclose(whole[name], crops[name], atol=1e-4)
    assert (whole["image"].int() - crops["image"].int()).abs().float().mean() < 0.5
    assert len(np.unique(whole["extra"][:, 0])) == 9


def test_whole_images_mirror_without_points_and_by_a_flip_only():
    images, still = [picture((16, 16))], np.eye(2, 3)
    plain = identities.WholeImages(images, 16, augment=lambda rng, size: (still, True, {}))
    np.testing.assert_array_equal(plain.__getitems__([(0, 0)])["image"][0], images[0][:, ::-1])
    kept = identities.WholeImages(images, 16, np.zeros((1, 3, 2)),
                                   lambda rng, size: (still, True, {}))
    np.testing.assert_array_equal(kept.__getitems__([(0, 0)])["image"][0], images[0])
    with pytest.raises(UserError,
                       match="image 0 has no landmarks, which this run needs; so for 1 of 1"):
        identities.WholeImages(images, 16, np.full((1, 3, 2), np.nan))
    with pytest.raises(ValueError, match=r"points \(2, 3, 2\) for 1 images"):
        identities.WholeImages(images, 16, np.zeros((2, 3, 2)))


def test_whole_images_between_whole_and_aligned():
    """Points come to the template at t = 1; the matrix is a mean of the two on the way."""
    template = torch.tensor([[8.0, 10], [22, 10], [15, 24]])
    turned = torch.tensor([[[10.0, 30], [30, 40], [12, 52]]] * 2)
    images = [picture((60, 80)), picture((64, 64))]
    matrices = []
    for t in (0.0, 0.5, 1.0):
        data = identities.WholeImages(images, 32, turned, align=(template, t))
        batch = data.__getitems__([(0, 0), (0, 1)])
        matrices.append(batch["matrix"])
        moved = warp.apply_affine(batch["matrix"], turned)
        torch.testing.assert_close(batch["points"], moved, atol=1e-3, rtol=0)
    whole = identities.WholeImages(images, 32).__getitems__([(0, 0), (0, 1)])
    assert torch.equal(matrices[0], whole["matrix"])
    torch.testing.assert_close(matrices[2],
                               warp.fit_similarity(turned, template.expand(2, -1, -1)).float())
    torch.testing.assert_close(matrices[1], (matrices[0] + matrices[2]) / 2, atol=1e-5, rtol=0)


def test_whole_images_in_a_loader(tmp_path):
    faces = synthetic.read_faces("train", 6, 32, 5)
    points, flip = np.stack([f.points for f in faces]), datasets.SCHEMES[5].flip
    data = identities.WholeImages(identities.FolderImages(faces), 32, points, turn, flip)
    batches = datasets.EpochBatches(6, 3)
    alone, shared = (list(datasets.make_loader(data, batches, workers, torch.device("cpu")))
                     for workers in (0, 1))
    assert len(alone) == 2
    assert all(torch.equal(a[name], b[name]) for a, b in zip(alone, shared) for name in a)
    (tmp_path / "broken.png").write_text("<html>")
    broken = identities.Images([str(tmp_path / "broken.png")])
    with pytest.raises(UserError, match="broken.png cannot be decoded"):
        identities.WholeImages(broken, 32).__getitems__([(0, 0)])
