"""Gait: the files of Gait3D, drawn walkers, clips, batches of people, and the scores."""
import os
import pickle

import numpy as np
import pytest
import torch

from common import UserError, gait
from common.datasets import in_order, make_loader
from tests import trees


NAMES = [(i, f"camid{c}_videoid{v}", "seq0") for i in ("0001", "0002", "0007")
         for c, v in ((3, 1), (10, 2))]


@pytest.fixture
def tree(tmp_path):
    """Gait3D with four frames a sequence. (root, {name: [(silhouette, joints)]})"""
    people = {"TRAIN_SET": ["0001"], "TEST_SET": ["0002", "0007"]}
    probes = ["0002-camid3_videoid1-seq0", "0007-camid10_videoid2-seq0"]
    return tmp_path, trees.put_gait3d(tmp_path, people, probes)


def pack(root, parts, images, joints):
    """Puts the packed files of OpenGait in the place of single ones."""
    for kind, array in (("2D_Silhouettes", images), ("2D_Poses", joints)):
        if array is not None:
            folder = root.joinpath(kind, *parts)
            for path in folder.iterdir():
                path.unlink()
            data = array if isinstance(array, bytes) else pickle.dumps(array)
            (folder / "seq0.pkl").write_bytes(data)


def everything(total):
    return np.arange(total)


def first(root):
    """The frames of the sequence NAMES[0], which stands second: camid10 comes before camid3."""
    return gait.read_gait3d(str(root), "train")[1].load(everything)


def test_gait3d_single_images(tree):
    root, made = tree
    train, test = (gait.read_gait3d(str(root), split) for split in ("train", "test"))
    assert [s.name for s in train] == ["0001-camid10_videoid2-seq0", "0001-camid3_videoid1-seq0"]
    assert [s.identity for s in test] == ["0002", "0002", "0007", "0007"]
    assert [s.probe for s in test] == [False, True, True, False]
    for sequence in train + test:
        crops, joints = sequence.load(everything)
        assert crops.shape == (4, 64, 44) and crops.dtype == np.uint8
        assert joints.shape == (4, 17, 2) and joints.dtype == np.float32
        for crop, place, (image, raw) in zip(crops, joints, made[sequence.name]):
            assert crop[[0, -1]].any(1).all()
            y, x = place.round().astype(int)[5:].T[::-1]         # the head is wider than its joints
            assert (crop[y, x] > 127).all()
            rows = np.flatnonzero(image.any(1))
            scale = 64 / (rows[-1] + 1 - rows[0])
            np.testing.assert_allclose(place[:, 1], (raw[:, 1] - rows[0] + 0.5) * scale - 0.5,
                                       atol=1e-4)
            np.testing.assert_allclose(np.diff(place[:, 0]), np.diff(raw[:, 0]) * scale, rtol=0.02,
                                       atol=1e-4)
    kept = root / "2D_Silhouettes/0001/camid3_videoid1/seq0.npy"
    assert kept.exists() and len(np.load(kept)) == 4
    again = gait.read_gait3d(str(root), "train")[0].load(lambda total: np.array([2, 2, 0]))
    whole = train[0].load(everything)
    assert all((a == b[[2, 2, 0]]).all() for a, b in zip(again, whole))


def test_normalise_is_opengaits():
    """Against the steps one by one, on a median near the middle and near both edges."""
    for x in (3, 30, 44, 80, 97):
        image = np.zeros((80, 100), np.uint8)
        image[7:71, x - 3:x + 3], image[20:40, max(x - 20, 0):x] = 255, 200
        crop, (scale, offset) = gait.normalise(image)
        cut = image[7:71]                                           # 64 rows already: no resampling
        padded = np.pad(cut, ((0, 0), (64, 64)))
        mass = np.cumsum(cut.sum(0, dtype=int))
        centre = 64 + next(i for i, m in enumerate(mass) if m > cut.sum(dtype=int) / 2)
        np.testing.assert_array_equal(crop, padded[:, centre - 32:centre + 32][:, 10:-10])
        np.testing.assert_allclose(scale, 1)
        np.testing.assert_allclose(offset, [64 + 22 - centre, -7])
    assert gait.normalise(np.zeros((9, 9), np.uint8)) is None
    faint = np.zeros((9, 9), np.uint8)
    faint[2:8, 2:8] = 255
    assert gait.normalise(faint) is None                            # 36 * 255 <= 10000
    assert gait.normalise(np.full((3000, 1), 255, np.uint8))[0].shape == (64, 44)


@pytest.mark.parametrize("width", [64, 44])
def test_gait3d_packed(tree, width):
    root, made = tree
    single = {s.name: s.load(everything) for s in gait.read_gait3d(str(root), "train")}
    for parts in NAMES[:2]:
        crops = single["-".join(parts)][0]
        # px of the video's frame
        joints = np.stack([j for _, j in made["-".join(parts)]]) + [300, 200, 0]
        pack(root, parts, np.pad(crops, ((0, 0), (0, 0), ((width - 44) // 2,) * 2)), joints)
    for s in gait.read_gait3d(str(root), "train"):
        crops, joints = s.load(everything)
        np.testing.assert_array_equal(crops, single[s.name][0])
        assert np.abs(joints - single[s.name][1]).max() < 3         # px: what `fit_joints` assumes
        assert joints[..., 1].min(1) == pytest.approx(4)
        assert joints[..., 1].max(1) == pytest.approx(60)
        np.testing.assert_allclose(joints[:, [5, 6, 11, 12], 0].mean(1), 21.5, atol=1e-4)


def test_texts_of_packed_silhouettes_are_read_once(tree):
    root, _ = tree
    pack(root, NAMES[0], np.pad(first(root)[0], ((0, 0), (0, 0), (10, 10))), None)
    found = first(root)
    folder, poses = (root.joinpath(kind, *NAMES[0]) for kind in ("2D_Silhouettes", "2D_Poses"))
    assert len(np.load(folder / "seq0.pkl.npy")) == 4
    for a, b in zip(found, first(root)):
        np.testing.assert_array_equal(a, b)
    text = poses / "human_crop_f171.txt"
    values = text.read_text().split(",")
    text.write_text(",".join([*values[:29], "0", *values[30:]]))        # in place: x of the left wrist
    assert (first(root)[1] != found[1]).any()
    text.unlink()                                           # the folder is newer than what was kept
    os.utime(poses)
    with pytest.raises(UserError, match="has 4 frames, .* 3, 0 of them"):
        first(root)


def test_gait3d_joints_of_the_video_are_fitted_and_missing_texts_filled(tree):
    root, made = tree
    poses, images = (root.joinpath(kind, *NAMES[0]) for kind in ("2D_Poses", "2D_Silhouettes"))
    right = first(root)
    (poses / "human_crop_f171.txt").unlink()
    empty = np.zeros((50, 40), np.uint8)                                            # is left out
    trees.put_image(images / "human_crop_f173.png", empty)
    os.utime(images)
    crops, joints = first(root)
    np.testing.assert_array_equal(crops, right[0][:3])
    np.testing.assert_array_equal(joints, right[1][[0, 0, 2]])
    for t, path in enumerate(sorted(poses.iterdir())):
        raw = made["-".join(NAMES[0])][t][1] + [900, 0, 0]
        path.write_text(",".join(map(str, [1, 2, *raw.ravel()])))
    os.utime(poses)
    joints = first(root)[1]
    assert joints[..., 1].min() == pytest.approx(4)
    assert 0 < joints[..., 0].min() < joints[..., 0].max() < 44


def test_gait3d_files_that_are_missing(tree):
    root, _ = tree
    def read(words, split="train", root=root, error=FileNotFoundError):
        with pytest.raises(error, match=words):
            gait.read_gait3d(str(root), split)

    read("(?s)no .*nowhere/Gait3D.json.*Tree.*--data walkers nee", root=root / "nowhere")
    (root / "2D_Poses/0001/camid3_videoid1/seq0").rename(root / "elsewhere")
    read(r"no \*.txt and no seq0.pkl in .*2D_Poses/0001/camid3_video")
    (root / "2D_Silhouettes/0007/camid10_videoid2").rename(root / "elsewhere2")
    read("no sequence of 0007-camid10_videoid2-seq0, the first of 1", "test")
    (root / "2D_Silhouettes/0002").rename(root / "elsewhere3")
    read("no sequence of 0002, the first of 1", "test")
    for text in ("{", "[]", '{"TRAIN_SET": ["0001"]}', '{"TRAIN_SET": 5, "PROBE_SET": []}'):
        (root / "Gait3D.json").write_text(text)
        read("Gait3D.json: .*; wanted lists TRAIN_SET, TEST_SET", error=UserError)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch trace",)


CROPS = np.ones((4, 64, 64), np.uint8)
MARKS = np.ones((4, 17, 3))


@pytest.mark.parametrize("images, joints, message", [
    (pickle.dumps(Bomb()), MARKS, "seq0.pkl is no packed sequence: it asks for posix.system.*"),
    (CROPS, pickle.dumps(Bomb()), "2D_Poses.*posix.system.*refused"),
    (1.0 * CROPS, MARKS, "holds an array of 'f8', wanted u1"),
    (CROPS[:, :32, :32], MARKS, r"found \(4, 32, 32\), wanted frames of \(64, "),
    (CROPS, np.ones((4, 18, 3)), r"found \(4, 18, 3\), wanted frames of \(17, "),
    (CROPS[:0], MARKS, r"found \(0, 64, 64\), wanted"), ([1, 2], MARKS, "found list, wanted"),
    (b"<html>", MARKS, "seq0.pkl is no packed sequence"),
    (CROPS, np.ones((5, 17, 3)), "has 4 frames, .* 5, 0 of them with nan"),
    (CROPS, np.nan * MARKS, "4 of them with nan")])
def test_gait3d_packed_files_that_are_bad(tree, monkeypatch, images, joints, message):
    root, _ = tree
    monkeypatch.chdir(root)
    pack(root, NAMES[0], images, joints)
    with pytest.raises(UserError, match=message):
        first(root)
    assert not (root / "trace").exists()


def test_gait3d_single_files_that_are_bad(tree):
    root, _ = tree
    text = root.joinpath("2D_Poses", *NAMES[0], "human_crop_f170.txt")
    text.write_text("1,2,3")
    with pytest.raises(UserError, match="f170.txt, after the first two: found 1 numbers, wanted"):
        first(root)
    text.unlink()
    folder = root.joinpath("2D_Silhouettes", *NAMES[0])
    (folder / "human_crop_f170.png").write_text("<html>")
    with pytest.raises(UserError, match="f170.png cannot be decoded as an image"):
        first(root)
    for path in folder.iterdir():
        trees.put_image(path, np.zeros((40, 30), np.uint8))
    with pytest.raises(UserError, match="all 4 silhouettes are empty"):
        first(root)


def test_missing_joints_stand_where_they_were_seen():
    joints = np.random.default_rng(0).normal(size=(5, 17, 3))
    joints[..., 2] = 1
    joints[[0, 2, 3], 4, 2], joints[:, 9, 2] = 0, 0
    filled = gait.fill_missing(joints)
    assert filled.shape == (5, 17, 2) and filled.dtype == np.float32
    expected = joints[..., :2].copy()
    expected[:, 4], expected[:, 9] = joints[[1, 1, 1, 1, 4], 4, :2], (21.5, 31.5)
    np.testing.assert_allclose(filled, expected, rtol=1e-6)
    fitted = gait.fit_joints(np.concatenate([joints, np.zeros((1, 17, 3))]) * [10, 20, 1])
    assert (fitted[5, :, 2] == 0).all() and np.isfinite(fitted).all()       # a frame without joints
    one = np.zeros((1, 17, 3))
    one[0, 3] = 7, 9, 1
    assert (gait.fit_joints(one)[..., 2] == 0).all()                        # no height: not seen


# ---- Drawn walkers -------------------------------------------------------------------------------

def test_walkers():
    train, test = (gait.walkers(split, 3, sequences=2, frames=20) for split in ("train", "test"))
    assert [s.name for s in train[:3]] == ["train-00000-seq0", "train-00000-seq1",
                                           "train-00001-seq0"]
    assert [s.probe for s in test] == [True, False] * 3 and not any(s.probe for s in train)
    assert not {s.identity for s in train} & {s.identity for s in test}
    crops, joints = test[0].load(everything)
    assert crops.shape == (20, 64, 44) and crops.dtype == np.uint8
    assert joints.shape == (20, 17, 2) and joints.dtype == np.float32
    again = gait.walkers("test", 1, sequences=1, frames=20)[0].load(lambda total: np.array([3, 11]))
    for a, b in zip(again, (crops, joints)):                    # whatever else is drawn
        np.testing.assert_array_equal(a, b[[3, 11]])
    others = [train[0], test[1], test[2], gait.walkers("test", 1, seed=1, frames=20)[0]]
    assert all((s.load(everything)[0] != crops).any() for s in others)
    pickle.dumps(test[0])                                       # for loader processes
    for arguments in (("val", 3), ("test", 0)):
        with pytest.raises(ValueError, match="wanted train or test, and 1 or more"):
            gait.walkers(*arguments)


def test_walkers_have_their_joints_on_bright_pixels():
    lit, rows = [], []
    for sequence in gait.walkers("train", 8, sequences=2, frames=15):
        crops, joints = sequence.load(everything)
        x, y = joints.round().astype(int)[:, 5:].transpose(2, 0, 1)
        inside = (x >= 0) & (x < 44)
        lit.append((crops[np.arange(15)[:, None], y, x.clip(0, 43)] > 127)[inside])
        rows.append((crops[:, 0].any(1) & crops[:, -1].any(1)).mean())
        median = (crops.sum(1).cumsum(1) * 2 > crops.sum((1, 2))[:, None]).argmax(1)
        assert np.abs(median - 22).max() <= 2                   # what is cut off can move it
        box = gait.fit_joints(np.concatenate([5 * joints + 70, np.ones((15, 17, 1))], 2))[..., :2]
        assert np.abs(box - joints).mean() < 2                  # px: what `fit_joints` assumes
    assert np.concatenate(lit).mean() > 0.985 and np.mean(rows) == 1


def test_walkers_walk():
    """Feet go back and forth by turns, arms against legs; a stride takes about 14 frames."""
    phase = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    mean = {name: m for name, (m, _) in gait.PERSON.items()}
    points = gait._body(mean, phase)
    assert points.shape == (40, 21, 3)
    forward, left, up = points.transpose(2, 1, 0)
    against, along = (np.corrcoef(forward[a], forward[16])[0, 1] for a in (15, 9))
    assert against < -0.7 and along > 0.7
    assert (left[[5, 7, 11, 13, 15]] > 0.03).all() and (left[[6, 8, 12, 14, 16]] < -0.03).all()
    swing = np.gradient(forward[15]) > 0.01           # the foot that goes forward is the higher one
    assert (up[15] - up[16])[swing].mean() > 0.02
    thigh, shin = mean["leg"] * mean["thigh"], mean["leg"] * (0.93 - mean["thigh"])
    for a, b, length in ((11, 13, thigh), (13, 15, shin), (5, 6, 2 * mean["shoulder"]),
                         (11, 12, 2 * mean["hip"])):
        np.testing.assert_allclose(np.linalg.norm(points[:, a] - points[:, b], axis=1), length,
                                   atol=1e-6)


def test_spoiled_walkers_move_with_their_joints():
    clean = gait.walkers("test", 2, sequences=3, frames=6)
    bad = gait.spoil(clean, shift=5, zoom=0.2)
    assert [s[:2] + s[3:] for s in bad] == [s[:2] + s[3:] for s in clean]
    seen = []
    for a, b in zip(clean, bad):
        (crops, joints), (moved, places) = a.load(everything), b.load(everything)
        scale = np.ptp(places[0, :, 1]) / np.ptp(joints[0, :, 1])
        middle = np.array([21.5, 31.5])
        shift = (places - middle - scale * (joints - middle)).mean((0, 1))
        seen.append([scale, *shift])
        np.testing.assert_allclose(places, scale * (joints - middle) + middle + shift, atol=1e-3)
        x, y = places.round().astype(int)[:, 5:].transpose(2, 0, 1)
        inside = (x >= 0) & (x < 44) & (y >= 0) & (y < 64)
        lit = moved[np.arange(6)[:, None], y.clip(0, 63), x.clip(0, 43)][inside] > 127
        assert lit.mean() > 0.95 and moved.shape == crops.shape and moved.dtype == np.uint8
    seen = np.array(seen)
    assert (np.abs(seen[:, 0] - 1) <= 0.2).all() and (np.abs(seen[:, 1:]) <= 5).all()
    assert seen.std(0).min() > 0.05
    np.testing.assert_array_equal(gait.spoil(clean, 5, 0.2)[1].load(everything)[0],
                                  bad[1].load(everything)[0])


def test_mean_silhouettes_tell_walkers_apart_but_not_well():
    """The gait energy image: nearest neighbours are far above chance (0.04)."""
    sequences = gait.walkers("test", 25, sequences=4, frames=14)
    energy = torch.from_numpy(np.stack([s.load(everything)[0].mean(0).ravel() for s in sequences]))
    probe = np.array([s.probe for s in sequences])
    labels = gait.GaitDataset(sequences, None).labels
    scores = gait.identify(torch.cdist(energy[probe], energy[~probe]), labels, probe)
    assert 0.12 < scores["rank1"] < 0.7 and scores["rank1"] < scores["rank5"] <= scores["rank10"]


# ---- Training and scores -------------------------------------------------------------------------

def test_clips_are_ordered():
    rng = np.random.default_rng(0)
    seen = np.zeros(50, bool)
    for _ in range(300):
        clip = gait.ordered(50, 12, rng)
        assert clip.shape == (12,) and (np.diff(clip) > 0).all() and clip[-1] - clip[0] < 16
        seen[clip] = True
    assert seen.all()
    for total in (1, 2, 5, 11):
        clip = gait.ordered(total, 12, rng)
        assert clip.shape == (12,) and clip.min() >= 0 and clip.max() < total
        assert len(np.unique(clip)) >= total * 0.5


def test_dataset_is_what_the_loader_wants():
    sequences = gait.walkers("train", 4, sequences=3, frames=18)
    data = gait.GaitDataset(sequences, 10, seed=3)
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == np.repeat(np.arange(4), 3).tolist()
    assert data.ids.tolist() == [f"train-0000{i}" for i in range(4)] and len(data) == 12
    batches = gait.PeopleBatches(data.labels, 2, 2, seed=3)
    loaded = list(make_loader(data, batches, 0, torch.device("cpu")))
    assert len(loaded) == len(batches) == 2
    for batch in loaded:
        assert batch["image"].shape == (4, 10, 64, 44) and batch["image"].dtype == torch.uint8
        assert batch["points"].shape == (4, 10, 17, 2) and batch["points"].dtype == torch.float32
        again = data.__getitems__([(0, i) for i in batch["index"].tolist()])
        assert all((batch[name] == again[name]).all() for name in ("image", "points", "index"))
        later = data.__getitems__([(1, i) for i in batch["index"].tolist()])
        assert (batch["image"] != later["image"]).any()
        assert 0.3 < batch["points"].mean() < 0.7
    whole = gait.GaitDataset(sequences, None)
    batch = next(iter(make_loader(whole, in_order(12, 1), 0, torch.device("cpu"))))
    crops, joints = sequences[0].load(everything)
    np.testing.assert_array_equal(batch["image"][0], crops)
    np.testing.assert_allclose(batch["points"][0], (joints + 0.5) / [44, 64], rtol=1e-6)
    long = gait.Sequence("a", "a", lambda pick: (np.zeros((len(pick(800)), 64, 44), np.uint8),
                                                 np.zeros((len(pick(800)), 17, 2), np.float32)))
    assert gait.GaitDataset([long], None).__getitems__([(0, 0)])["image"].shape[1] == 720


def test_mirrored_clips_have_their_joints_mirrored_and_renamed():
    sequences = gait.walkers("train", 3, sequences=2, frames=12)
    plain, mixed = (gait.GaitDataset(sequences, 8, 0, augment) for augment in (False, True))
    keys, mirrored = [(epoch, i) for epoch in range(4) for i in range(6)], 0
    a, b = plain.__getitems__(keys), mixed.__getitems__(keys)
    for image, points, image_b, points_b in zip(a["image"], a["points"], b["image"], b["points"]):
        if (image == image_b).all():
            assert (points == points_b).all()
        else:
            mirrored += 1
            assert (image.flip(-1) == image_b).all()
            expected = points[:, gait.FLIP_17] * torch.tensor([-1.0, 1]) + torch.tensor([1.0, 0])
            np.testing.assert_allclose(points_b, expected, atol=1e-6)
    assert 6 < mirrored < 18
    assert (gait.FLIP_17[gait.FLIP_17] == np.arange(17)).all()
    assert gait.FLIP_17[:5].tolist() == [0, 2, 1, 4, 3] and gait.FLIP_17[15:].tolist() == [16, 15]


def test_batches_of_people():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), [5, 1, 4, 3, 6, 4, 2]))
    whole = gait.PeopleBatches(labels, 2, 4, seed=1)
    shares = [gait.PeopleBatches(labels, 2, 4, seed=1, rank=rank, world=2) for rank in (0, 1)]
    assert len(whole) == 3
    drawn = []
    for epoch in range(2):
        for batches in (whole, *shares):
            batches.epoch = epoch
        people = []
        for batch, *mine in zip(whole, *shares):
            assert batch == mine[0] + mine[1] and len(batch) == 8
            assert {key[0] for key in batch} == {epoch}
            index = np.array([i for _, i in batch]).reshape(2, 4)
            for row in index:
                assert len(set(labels[row])) == 1
                assert len(set(row)) == min(4, (labels == labels[row[0]]).sum())
            people += labels[index[:, 0]].tolist()
        assert len(set(people)) == 6                           # each at most once, one is left over
        drawn.append(list(whole))
    assert drawn[0] != drawn[1] and drawn[1] == list(whole)
    few = list(gait.PeopleBatches(labels, 16, 2))
    assert len(few) == 1 and len(few[0]) == 32 and len({labels[i] for _, i in few[0]}) == 7
    with pytest.raises(ValueError, match="3 does not divide over 2 processes"):
        gait.PeopleBatches(labels, 3, 4, world=2)


def test_scores_by_hand():
    labels = np.array([0, 1, 2, 0, 1, 0, 1, 1, 0])                  # probes 0, 1, 2; 2 has no mate
    probe = np.arange(9) < 3
    distance = np.array([[1, 2, 3, 4, 5, 6], [2, 3, 1, 5, 6, 4.0], [0, 0, 0, 0, 0, 0]])
    scores = gait.identify(distance, labels, probe)
    # Probe 0: mates 1st, 3rd, 6th. Probe 1: mates at distance 3, 5, 6: 3rd, 5th, 6th.
    assert scores["rank1"] == 0.5 and scores["rank5"] == scores["rank10"] == 1
    precision = [(1 + 2 / 3 + 3 / 6) / 3, (1 / 3 + 2 / 5 + 3 / 6) / 3]
    assert scores["map"] == pytest.approx(np.mean(precision))
    assert scores["minp"] == pytest.approx((3 / 6 + 3 / 6) / 2)
    tied = gait.identify(np.zeros((3, 6)), labels, probe)
    assert tied["rank1"] == 0
    with pytest.raises(ValueError, match="none of 1 probes has a mate among 8 others"):
        gait.identify(np.zeros((1, 8)), labels, np.arange(9) == 2)
