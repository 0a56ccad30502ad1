"""Crops of common/datasets.py: one warp, points that follow, the same pixels from any cache."""
import os
import pickle
import warnings
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from common import UserError, datasets, recognition, synthetic, warp
from common.datasets import Face
from tests.trees import put_photo

FLIP = [1, 0, 2, 3, 5, 4]  # of the six dots


def dotted_face(size=300, seed=0):
    """An image with a soft white dot at each of six points, and the points."""
    rng = np.random.default_rng(seed)
    points = np.mgrid[100:201:100, 100:201:50].reshape(2, 6).T + rng.uniform(-8, 8, (6, 2))
    points = (points * size / 300).astype(np.float32)
    y, x = np.mgrid[:size, :size]
    dots = sum(np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2e-4 * size**2)) for px, py in points)
    pixels = (255 * np.clip(dots, 0, 1)).astype(np.uint8)
    return datasets.Face(np.repeat(pixels[..., None], 3, 2), points)


def dot_at(image, point, radius):
    """Centroid of the brightness within `radius` px of a point at least so far inside."""
    x0, y0 = np.round(point).astype(int) - radius
    patch = image[y0:y0 + 2 * radius + 1, x0:x0 + 2 * radius + 1, 0].astype(float)
    y, x = np.mgrid[y0:y0 + patch.shape[0], x0:x0 + patch.shape[1]]
    return np.array([(patch * x).sum(), (patch * y).sum()]) / patch.sum()


def turn(rng, size):
    """An augmentation: rotation, scale, shift and mirror, and the rng's next number."""
    a, s = rng.uniform(-0.5, 0.5), rng.uniform(0.9, 1.1)
    linear = s * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    middle = np.full(2, (size - 1) / 2)
    shift = middle - linear @ middle + rng.uniform(-5, 5, 2)
    matrix = np.concatenate([linear, shift[:, None]], 1)
    return matrix, rng.random() < 0.5, {"extra": rng.random(3)}


def crops(count=4, size=96, augment=None, **options):
    faces = [dotted_face(seed=seed) for seed in range(count)]
    matrices = datasets.square_crops(datasets.face_boxes(faces, "landmarks"), size, 1.5)
    return datasets.CropDataset(faces, matrices, size, augment, reach=1.8, zoom=1.1, flip=FLIP,
                                **options)


MIRRORED_COPIES = [(i % 4, i // 4) for i in range(8)]  # the set and then its mirror image


def keep(cache, **options):
    data = crops(**options)
    data.regions.keep(str(cache), verbose=False)
    return data


# ---- Geometry ------------------------------------------------------------------------------------


def test_square_crops_put_the_box_in_the_middle():
    matrix = datasets.square_crops(np.array([[10.0, 20, 50, 100]]), 64, 1.25)[0]
    np.testing.assert_allclose(matrix @ [30, 60, 1], [31.5, 31.5])  # the centres
    np.testing.assert_allclose(matrix @ [30, 60 - 50, 1], [31.5, -0.5])  # to the edge
    with pytest.raises(UserError, match="face 1: its box .* has no extent"):
        datasets.square_crops(np.array([[0, 0, 1, 1], [5.0, 5, 5, 5]]), 64, 1.25)


def test_five_points_stand_for_the_box_of_a_whole_face():
    five = np.array([[[10, 20], [30, 20], [20, 30], [12, 44], [28, 44.0]]])  # 20 x 24 px
    np.testing.assert_allclose(datasets.landmark_boxes(five), [[-4, 11.6, 44, 59.6]])
    faces = synthetic.read_faces("test", 60, 64, 68)
    points = np.stack([face.points for face in faces]).astype(np.float64)
    whole = datasets.landmark_boxes(points)
    np.testing.assert_allclose(whole[3], [*points[3].min(0), *points[3].max(0)])
    five = datasets.landmark_boxes(datasets.group_means(points, datasets.SCHEMES[68].five))
    side = (whole[:, 2:] - whole[:, :2]).max(1)
    assert abs(np.median((five[:, 2] - five[:, 0]) / side) - 1) < 0.15
    middle = (five - whole).reshape(-1, 2, 2).mean(1) / side[:, None]
    assert np.abs(np.median(middle, 0)).max() < 0.08


def test_a_box_about_landmarks_of_no_scheme_may_be_half_a_face_and_says_so():
    face = datasets.Face("a.png", np.random.default_rng(0).uniform(0, 90, (7, 2)))
    with pytest.warns(UserWarning, match="box of 7 landmarks of no known scheme.*larger --margin"):
        datasets.face_boxes([face], "landmarks")


def test_face_boxes():
    face = dotted_face()
    np.testing.assert_allclose(datasets.face_boxes([face], "landmarks")[0],
                               [*face.points.min(0), *face.points.max(0)], rtol=1e-6)
    with pytest.raises(UserError, match="face 0: --box face finds a box of 0 px there"):
        datasets.face_boxes([face], "face")
    for points in (np.ones((5, 2)), np.linspace(0, 0.4, 10).reshape(5, 2)):
        with pytest.raises(UserError, match="a.jpg: --box landmarks finds a box of 0.* wanted 1"):
            datasets.face_boxes([face, datasets.Face("a.jpg", points)], "landmarks")
    face.box = (1, 2, 3, 4)
    assert datasets.face_boxes([face], "face").tolist() == [[1, 2, 3, 4]]
    with pytest.raises(UserError, match="--box head"):
        datasets.face_boxes([face], "head")


@pytest.mark.parametrize("size", [48, 96, 256])  # shrunk, about as it is, enlarged
def test_points_follow_the_image(size):
    data = crops(size=size, augment=turn, rows=MIRRORED_COPIES)
    keys = [(epoch, i) for epoch in range(2) for i in range(8)]
    batch = data.__getitems__(keys)
    for b, key in enumerate(keys):
        image, points = batch["image"][b].numpy(), batch["points"][b].numpy()
        determinant = float(torch.linalg.det(batch["matrix"][b, :, :2]))
        drawn = turn(np.random.default_rng((0, *key)), size)[1]
        mirror = drawn != (key[1] >= 4)  # a mirrored copy drawn mirrored is as it was
        assert (determinant < 0) == mirror
        face = data.faces[key[1] % 4]
        placed = warp.apply_affine(batch["matrix"][b], torch.from_numpy(face.points))
        np.testing.assert_allclose(points, placed[FLIP] if mirror else placed, atol=1e-3)
        radius = int(np.ceil(13 * abs(determinant) ** 0.5))  # the dots have sigma 3
        inside = points[((points > radius) & (points < size - 1 - radius)).all(1)]
        assert len(inside) >= 2
        for point in inside:
            assert np.abs(dot_at(image, point, radius) - point).max() < 0.06


def test_a_crop_is_a_function_of_seed_epoch_and_index():
    data, again = crops(augment=turn), crops(augment=turn)
    one = data.__getitems__([(0, 0), (0, 1), (0, 2)])
    other = again.__getitems__([(1, 2), (0, 2), (0, 1)])
    for key in ("image", "points", "matrix", "extra"):
        assert torch.equal(one[key][2], other[key][1]) and torch.equal(one[key][1], other[key][2])
        assert not torch.equal(one[key][2], other[key][0])
    reseeded = crops(augment=turn, seed=1).__getitems__([(0, 1)])
    assert not torch.equal(reseeded["points"][0], one["points"][1])
    copies = crops(augment=turn, rows=[(2, 0), (2, 0)]).__getitems__([(0, 0), (0, 1)])
    assert copies["index"].tolist() == [2, 2]
    assert not torch.equal(copies["points"][0], copies["points"][1])


def test_mirrored_copies_are_the_crop_seen_in_a_mirror():
    batch = crops(rows=MIRRORED_COPIES).__getitems__([(0, i) for i in range(8)])
    assert batch["index"].tolist() == [0, 1, 2, 3] * 2
    points, mirrored = batch["points"].chunk(2)
    mirror = points[:, FLIP] * torch.tensor([-1.0, 1]) + torch.tensor([95.0, 0])
    torch.testing.assert_close(mirrored, mirror, atol=1e-4, rtol=0)
    image, copy = batch["image"].float().chunk(2)
    assert (image.flip(2) - copy).abs().mean() < 0.5 and (image - copy).abs().mean() > 4


def test_divisors():
    face = datasets.Face("a.jpg", np.mgrid[:19, :2][0].T.reshape(19, 2), (0, 0, 20, 5))
    matrix = np.eye(2, 3)[None]
    assert datasets.CropDataset([face], matrix, 8).divisors("auto").tolist() == [10]  # of AFLW
    face.box = None
    box = np.ptp(face.points, axis=0).prod() ** 0.5
    assert datasets.CropDataset([face], matrix, 8).divisors("auto").tolist() == [box]


# ---- Pixels --------------------------------------------------------------------------------------


def crop(pixels, box, size, **options):
    """The crop of a face that has no points."""
    matrices = datasets.square_crops(np.array([box], float), size, 1.0)
    data = datasets.CropDataset([datasets.Face(pixels)], matrices, size, **options)
    batch = data.__getitems__([(0, 0)])
    assert "points" not in batch
    return batch["image"][0]


def test_outside_the_image_is_grey_or_its_reflection():
    white = np.full((20, 30, 3), 255, np.uint8)
    for box in ([-60, -60, -30, -30], [60, 60, 90, 90], [-35, 0, -5, 30]):
        assert (crop(white, box, 32) == datasets.BORDER).all()
    image = crop(white, [-15, -15, 15, 15], 60)
    assert (image[:26, :26] == datasets.BORDER).all() and (image[34:, 34:] == 255).all()
    ramp = np.repeat(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], 20, 0).repeat(3, 2)
    image = crop(ramp, [-10.5, -10.5, 9.5, 9.5], 20, reflect=True)  # its px 10 is px 0
    assert image[0, :, 0].tolist() == [8 * abs(x) for x in range(-10, 10)]


def test_shrinking_does_not_alias():
    y, x = np.mgrid[:512, :512]
    stripes = np.repeat((255 * ((x // 2 + y // 2) % 2)).astype(np.uint8)[..., None], 3, 2)
    image = crop(stripes, [96, 96, 416, 416], 37).float()
    assert (image - 127.5).abs().max() < 40  # a bilinear look at single pixels would give 0 to 255


@pytest.mark.parametrize("size", [601, 602])
def test_points_follow_a_jpeg_that_is_decoded_at_half_its_size(size, tmp_path, monkeypatch):
    face = dotted_face(size)
    path = str(tmp_path / "a.jpg")
    cv2.imwrite(path, face.image)
    halves = []
    load = datasets.load_image
    monkeypatch.setattr(datasets, "load_image",
                        lambda image, half, upright: halves.append(half) or load(image, half=half))
    matrix = datasets.square_crops(datasets.face_boxes([face], "landmarks"), 96, 1.5)
    for image, half in ((path, True), (face.image, False)):
        face.image = image
        batch = datasets.CropDataset([face], matrix, 96).__getitems__([(0, 0)])
        for point in batch["points"][0].numpy():
            found = dot_at(batch["image"][0].numpy(), point, 10)
            assert np.abs(found - point).max() < 0.05
        assert halves.pop() == half


def test_points_outside_their_image_are_found_when_it_is_decoded(tmp_path):
    """In a JPEG that is decoded at half its size, too; one point inside is enough."""
    path = str(tmp_path / "a.jpg")
    cv2.imwrite(path, np.zeros((60, 80, 3), np.uint8))
    face = np.array([[0, 0], [50, 0], [20, 50]])
    for shift, inside in (([70, 50], True), ([-45, 5], True), ([80, 0], False), ([0, -60], False)):
        points = (face + shift).astype(np.float32)
        data = datasets.CropDataset([Face(path, points)], np.eye(2, 3)[None] / 4, 8)
        whole = recognition.WholeImages(recognition.Images([path]), 8, points[None])
        for crops in (data, whole):
            if inside:
                crops.__getitems__([(0, 0)])
                continue
            with pytest.raises(UserError, match="a.jpg: all points lie outside its image of 80 x 60"):
                crops.__getitems__([(0, 0)])


def test_points_that_are_found_may_lie_outside_their_image(tmp_path):
    """In a picture of --predict, or by an aligner in place of those that a set has."""
    path = str(tmp_path / "a.jpg")
    image = np.zeros((60, 80, 3), np.uint8)
    cv2.imwrite(path, image)
    outside = np.float32([[[90, 0], [99, 0], [95, 50]]])
    replaced = recognition.WholeImages(recognition.Images([path]), 8, outside - 50)
    replaced.points = torch.from_numpy(outside)
    for crops in (datasets.CropDataset([Face(image, outside[0])], np.eye(2, 3)[None] / 4, 8),
                  recognition.WholeImages([image], 8, outside), replaced):
        crops.__getitems__([(0, 0)])


def test_a_photograph_is_turned_by_its_tag_only_where_that_is_asked_for(tmp_path):
    image = np.repeat(np.arange(0, 240, 10, np.uint8).reshape(1, 24, 1), 16, 0).repeat(3, 2)
    path = tmp_path / "a.jpg"
    put_photo(path, image, 6)  # is to be turned by 90 degrees, clockwise
    points = np.array([[1, 2], [12, 3], [7, 20]], np.float32)
    face = Face(str(path), points, identity="A")
    with pytest.warns(UserWarning, match="a.jpg has an orientation tag.*--upright; so for 1 of 1"):
        datasets.check_images([face])
    stored = datasets.CropDataset([face], np.eye(2, 3)[None], 16).regions
    digest = stored._digest()
    region = stored[0]
    assert recognition.FolderImages([face])[0].shape == (16, 24, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        datasets.check_images([face], upright=True)
    turned = datasets.CropDataset([face], np.eye(2, 3)[None], 16).regions
    assert digest != turned._digest()
    assert recognition.FolderImages([face])[0].shape == (24, 16, 3)
    x, y = 2 - turned.first[0]  # where pixel 2 2 lies in the region
    assert np.abs(region[y + 8, x].astype(int) - image[10, 2]).max() < 5
    assert np.abs(turned[0][y + 8, x].astype(int) - image[2, 10]).max() < 5


# ---- Kept crops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [48, 256])
def test_kept_regions_give_the_same_crops(tmp_path, size):
    keys = [(1, i) for i in range(4)]
    wanted = crops(size=size, augment=turn)
    on_disk = keep(tmp_path, size=size, augment=turn)
    assert on_disk.regions.__getstate__()["store"] is None  # a worker opens the file by its path
    on_disk.regions = pickle.loads(pickle.dumps(on_disk.regions))
    for data in (on_disk, keep("device", size=size, augment=turn)):
        assert data.regions.store is not None
        assert torch.equal(data.__getitems__(keys)["image"], wanted.__getitems__(keys)["image"])
    side = wanted.regions.side
    assert (side <= np.ceil(1.8 * 1.1 * size) + 8).all()  # no larger than the augmentation can use
    assert (side <= wanted.regions.extent).all()  # nor than the source
    assert len(list(tmp_path.iterdir())) == 1  # and no half-written one


def test_a_second_run_opens_the_cache_and_another_set_does_not(tmp_path, monkeypatch):
    keep(tmp_path)
    monkeypatch.setattr(datasets.Regions, "_fill", lambda *_: pytest.fail("decoded again"))
    keep(tmp_path)
    for options in ({"count": 3}, {"reflect": True}, {"size": 95}):
        with pytest.raises(pytest.fail.Exception):
            keep(tmp_path, **options)


def test_a_damaged_cache_is_named_and_what_a_killed_run_left_is_removed(tmp_path):
    keep(tmp_path)
    file, = tmp_path.iterdir()
    data = file.read_bytes()
    half = len(data) // 2
    for damaged in (data[:-1], data + b"0", data[:half] + bytes(len(data) - half), b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{file.name} is damaged: delete it"):
            keep(tmp_path)
    file.unlink()
    old, new = tmp_path / f"{file.name}.host.1.part", tmp_path / f"{file.name}.host.2.part"
    for part in (old, new):
        part.touch()
    os.utime(old, (0, 0))
    keep(tmp_path)
    assert set(tmp_path.iterdir()) == {file, new}  # the new one may be another run's, at work


def test_a_cache_that_does_not_fit_is_refused_with_its_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"--cache .* needs 1 MB, there are 0 MB; name a folder"):
        crops(count=8).regions.keep(str(tmp_path))
    assert "cache: 8 faces, 1 MB" in capsys.readouterr().out and not list(tmp_path.iterdir())
    monkeypatch.setattr(datasets, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"--cache device: needs 1 MB, there are 0 MB"):
        keep("device", count=8)


# ---- Batches -------------------------------------------------------------------------------------


def test_batches_are_a_permutation_cut_over_the_ranks():
    ranks = [datasets.EpochBatches(23, 6, seed=5, rank=rank, world=2) for rank in range(2)]
    alone = datasets.EpochBatches(23, 6, seed=5)
    for epoch in (0, 7):
        for batches in (*ranks, alone):
            batches.epoch = epoch
        both = [first + second for first, second in zip(*ranks)]
        assert both == list(alone) and len(both) == 3 == len(alone)
        indices = [i for batch in both for _, i in batch]
        assert len(set(indices)) == 18 and all(e == epoch for batch in both for e, _ in batch)
    alone.epoch = 8
    assert [i for batch in alone for _, i in batch] != indices
    few = datasets.EpochBatches(2, 6)
    assert len(few) == 1 and sorted(i for _, i in next(iter(few))) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UserError, match="--batch-size 7 does not divide over 2 processes"):
        datasets.EpochBatches(23, 7, world=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_every_face_once_in_order(workers):
    data = crops(count=5)
    loader = datasets.make_loader(data, datasets.in_order(5, 2), workers, torch.device("cpu"))
    assert torch.cat([batch["index"] for batch in loader]).tolist() == [0, 1, 2, 3, 4]


def test_the_device_loader_gives_the_same_crops():
    data, keys = crops(augment=turn, rows=MIRRORED_COPIES), [(2, 3), (2, 0), (2, 6)]
    loaded = list(datasets.DeviceLoader(data, [keys], torch.device("cpu")))[0]
    made = data.__getitems__(keys)
    assert torch.equal(loaded["points"], made["points"])
    difference = loaded["image"].permute(0, 2, 3, 1) - made["image"].float()
    # cv2 rounds to 1/32 px and to whole grey levels
    assert difference.abs().mean() < 0.5 and difference.abs().max() < 12
