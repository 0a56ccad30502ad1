"""Recognition tests, on small trees in the true formats."""
import os
import pickle
import struct
import warnings

import cv2
import numpy as np
import pytest
import torch

from common import UserError, identities, metrics, recognition, synthetic
from common.datasets import Face, load_image
from common.recognition import read_test
from tests import trees

RNG = np.random.default_rng(0)


def picture():
    return RNG.integers(0, 256, (20, 16, 3), np.uint8)


def put(root, *names):
    for name in names:
        trees.put_image(root / name, picture())


def put_text(path, text):
    trees.put_text(path, text)
    return path


# ---- Verification --------------------------------------------------------------------------------

BIN = [cv2.imencode(".png", picture())[1].tobytes() for _ in range(8)]
SAME = [True, False, True, False]


def as_bin(path, content, protocol=4):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return str(path)


def python2(images, same):
    """What Python 2's cPickle, protocol 2, writes for ([str, ...], [bool, ...])."""
    strings = b"".join(b"T" + struct.pack("<i", len(image)) + image for image in images)
    truth = b"".join(b"\x88" if value else b"\x89" for value in same)
    return b"\x80\x02](" + strings + b"e](" + truth + b"e\x86."


ARRAYS = [np.frombuffer(image, np.uint8) for image in BIN]


@pytest.mark.parametrize("content", [
    python2(BIN, SAME), *(pickle.dumps((BIN, SAME), protocol) for protocol in range(6)),
    pickle.dumps((BIN, np.array(SAME)), 4), pickle.dumps((BIN, np.array(SAME)), 5),
    pickle.dumps((BIN, [np.True_, np.False_] * 2), 2), pickle.dumps((ARRAYS, [1, 0, 1, 0]), 2),
    pickle.dumps((ARRAYS, [1, 0, 1, 0]), 5), pickle.dumps((np.array(BIN, object), SAME), 4),
    pickle.dumps(([bytearray(image) for image in BIN], tuple(SAME)), 5)])
def test_bin_of_every_make(tmp_path, content):
    test = read_test(as_bin(tmp_path / "lfw.bin", content))
    assert test.name == "lfw" and test.same.tolist() == SAME and test.folds == 2
    assert test.pairs.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert test.names.tolist() == [str(i) for i in range(8)]
    assert test.template.tolist() == [*range(8)]
    for i, image in enumerate(BIN):
        np.testing.assert_array_equal(test.images[i], identities.decode(image, ""))


class Bomb:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("call, args, name", [
    (os.system, ("touch {}",), "posix.system"), (eval, ("open('{}', 'w')",), "_*builtins?_*.eval"),
    (np.load, ("{}",), "numpy.load|numpy.lib.*"), (getattr, ("a", "b"), "_*builtins?_*.getattr"),
    (pickle.loads, (b"{}",), "_?pickle.loads")])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_bin_that_carries_code_is_refused_and_never_runs(tmp_path, call, args, name, protocol):
    trace = str(tmp_path / "trace")
    bomb = Bomb(call, *(arg.format(trace) if isinstance(arg, str) else arg for arg in args))
    words = f"evil.bin is no verification .bin: it asks for ({name}), .* refu"
    with pytest.raises(UserError, match=words):
        read_test(as_bin(tmp_path / "evil.bin", ([bomb], [True]), protocol))
    assert not os.path.exists(trace)


DEEP = b")" + b"\x85" * 200_000                                            # a very deep tuple


BIN_4 = pickle.dumps((BIN, SAME), 4)
P2 = b"\x80\x02"


@pytest.mark.parametrize("content, message", [
    # what would end the process, or reach further
    (P2 + DEEP + b".", "expected 2, got 1"),
    (P2 + DEEP + b"]\x88a\x86.", "found 1 images|like object"),
    (P2 + b"}" + DEEP + b"Ns.", "dictionary or a set"),
    (P2 + b"c_codecs\nencode\nX\x01\x00\x00\x00a" + DEEP + b"\x86R.", "another encoding"),
    (P2 + b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.", "another encoding"),
    (P2 + b"cnumpy\ndtype\n" + DEEP + b"\x85R.", "is no verification .bin"),
    (P2 + b"Nr\x00\x00\x00\x10.", "it numbers 268435456 objects in 9 bytes"),
    (pickle.dumps((np.array([1.5]), [True]), 2), "holds an array of 'f8'"),
    # what is damaged
    (BIN_4[:-50], "no verification .bin"), (b"", "no verification .bin"),
    (pickle.dumps([1, 2, 3]), "no verification"), (b"<html>", "no verification"),
    (pickle.dumps((BIN[:7], SAME)), "found 7 images and 4 pairs"),
    (pickle.dumps(([1], [True])), "no verification .bin: memoryview"),
    (pickle.dumps((BIN, [True] * 4)), "found 0 folds, 4 pairs of one person and 0 of two")])
def test_bin_that_is_wrong(tmp_path, content, message):
    with pytest.raises(UserError, match=f"a.bin.*({message})"):
        read_test(as_bin(tmp_path / "a.bin", content))


def test_bin_whose_folds_would_be_one_sided(tmp_path):
    words = "a.bin: consecutive .* each of 2 folds gets as many of both"
    with pytest.warns(UserWarning, match=words):
        test = read_test(as_bin(tmp_path / "a.bin", (BIN, [True, True, False, False])))
    assert test.same.tolist() == [True, False] * 2
    assert test.pairs.tolist() == [[0, 1], [4, 5], [2, 3], [6, 7]]


def test_both_kinds_are_spread_over_the_folds():
    for same, different, folds in ((3000, 3000, 10), (47, 13, 10), (5, 31, 5), (2, 2, 2)):
        with pytest.warns(UserWarning):
            kinds = np.arange(same + different) < same
            order, found = recognition._in_folds(kinds, "x")
        shares = [block.sum() for block in np.array_split(kinds[order], found)]
        assert found == folds and sorted(order) == [*range(same + different)]
        assert max(shares) - min(shares) <= 1 + (same != different)
        ranks = [np.flatnonzero(kinds[order] == kind) for kind in (True, False)]
        assert all((np.diff(order[places]) > 0).all() for places in ranks)
    assert recognition._in_folds(np.arange(6000) % 2 == 0, "x")[0].tolist() == [*range(6000)]


def test_bin_with_a_bad_image(tmp_path):
    test = read_test(as_bin(tmp_path / "a.bin", ([BIN[0], b"xyz", *BIN[2:]], SAME)))
    with pytest.raises(UserError, match="a.bin, image 1: 3 bytes that cannot be decoded"):
        test.images[1]
    with pytest.raises(FileNotFoundError, match="none.bin; it comes inside the insightface"):
        read_test(tmp_path / "none.bin")


def test_landmarks_of_a_test_must_cover_it(tmp_path):
    test = read_test(as_bin(tmp_path / "a.bin", (BIN, SAME)))
    rows = [f"{i},1,2,3,4\n" for i in range(8)]
    found = recognition.with_landmarks(test, put_text(tmp_path / "p.csv", "".join(rows)))
    assert found.points.shape == (8, 2, 2) and test.points is None
    assert found.images.sources == test.images.sources
    few = put_text(tmp_path / "q.csv", "".join(rows[:2]))
    words = "2 has no landmarks, which --landmarks .*q.csv needs; .* 6 of 8"
    with pytest.raises(UserError, match=words):
        recognition.with_landmarks(test, few)


def test_photographs_of_a_test(tmp_path):
    """With landmarks or without, they are as stored, with a warning, or on demand upright."""
    for name in "abcd":
        trees.put_photo(tmp_path / f"{name}.jpg", np.zeros((16, 24, 3), np.uint8), 6)
    rows = ["a.jpg,b.jpg,1", "c.jpg,d.jpg,1", "a.jpg,c.jpg,0", "b.jpg,d.jpg,0"]
    table = put_text(tmp_path / "t.csv", "\n".join(["image_a,image_b,same", *rows]))
    for points in (None, 3):
        if points:  # beside the table
            put_text(tmp_path / "t.csv.landmarks.csv",
                     "".join(f"{name}.jpg,2,3,9,4,5,9\n" for name in "abcd"))
        with pytest.warns(UserWarning, match="orientation tag; .* --upright; so for 4 of 4 images"):
            stored, = recognition.read_tests(table)
        upright, = recognition.read_tests(table, upright=True)
        assert stored.images[0].shape == (16, 24, 3) and upright.images[0].shape == (24, 16, 3)
        assert (upright.points is None) == (points is None)
    put_text(tmp_path / "d.jpg", "<html>")
    with pytest.raises(UserError, match="d.jpg"):  # before a run, not in its first evaluation
        recognition.read_tests(table)


def lfw(root, people=3, suffix=".jpg"):
    """Two folds of one pair of each kind."""
    for person in "ABC"[:people]:
        put(root / "lfw" / person, f"{person}_0001{suffix}", f"{person}_0002{suffix}")
    return put_text(root / "pairs.txt", "2\t1\nA\t1\t2\nA\t1\tB\t2\nB\t1\t2\nB\t2\tC\t1\n")


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_lfw(tmp_path, suffix):
    lfw(tmp_path, suffix=suffix)
    for test in (read_test(tmp_path), read_test(tmp_path / "lfw")):        # the list may lie beside
        assert test.folds == 2 and test.same.tolist() == [True, False, True, False]
        names = test.names[test.pairs]
        assert names[0].tolist() == [f"A/A_0001{suffix}", f"A/A_0002{suffix}"]
        assert names[0, 0] == names[1, 0]
        assert names[3].tolist() == [f"B/B_0002{suffix}", f"C/C_0001{suffix}"]
        np.testing.assert_array_equal(test.images[test.pairs[1, 1]],
                                      load_image(str(tmp_path / f"lfw/B/B_0002{suffix}")))


LFW_PAIRS = "2\t1\nA\t1\t2\nA\t1\tB\t2\nB\t1\t2\nB\t2\tC{}\n"


@pytest.mark.parametrize("text, error, message", [
    (LFW_PAIRS.format("\t1"), FileNotFoundError, "pairs.txt names C/C_0001.jpg, which .* 1 of 5"),
    (LFW_PAIRS.format(""), UserError, "pairs.txt:5: found .*, wanted NAME n1 n2"),
    (LFW_PAIRS.format("\t\u00b2"), UserError, "pairs.txt:5: found .*, wanted NAME n1 n2"),
    ("2\t1\nA\t1\t2\n", UserError, "pairs.txt:1: found .* and 1 pairs"),
    ("1\nA\t1\t2\n", UserError, "pairs.txt:1: found .* and 1 pairs"),
    ("pairs\nA\t1\t2\n", UserError, "pairs.txt:1: found .* and 1 pairs")])
def test_lfw_that_is_wrong(tmp_path, text, error, message):
    put_text(lfw(tmp_path, people=2), text)
    with pytest.raises(error, match=message):
        read_test(tmp_path)


def test_lfw_without_its_list(tmp_path):
    words = "below --test (.*\n)*Tree: pairs.txt (.*\n)*Source: Labeled"
    with pytest.raises(FileNotFoundError, match=words):
        recognition.read_lfw(str(tmp_path))


YTF_HEADER = "split number, pair number in split, first name, second name, is same:\n"


def ytf(root, folder="aligned_images_DB", header=YTF_HEADER, pair=True):
    """Two folds of a pair of each kind, in the order different, same; same, different."""
    for video in ("A/0", "A/1", "B/0"):
        put(root / folder / video, "0.2.jpg", "0.10.jpg", "0.1.jpg", "0.3.jpg")
    rows = (("2", "1", "A/0", "B/0", "0"), ("2", "2", "A/1", "A/0", "1"),
            ("1", "1", "A/0", "A/1", "1"), ("1", "2", "A/1", "B/0", "0"))
    rows = [", ".join(row if pair else (row[0], *row[2:])) + "\n" for row in rows]
    return put_text(root / "splits.txt", header + "".join(rows))


@pytest.mark.parametrize("header", [YTF_HEADER, ""])
@pytest.mark.parametrize("pair", [True, False])
def test_ytf(tmp_path, header, pair):
    ytf(tmp_path, header=header, pair=pair)
    test = read_test(tmp_path)
    assert test.folds == 2 and test.same.tolist() == [True, False, False, True]
    videos = [test.names[test.template == i][0].rpartition("/")[0] for i in range(3)]
    pairs = [" ".join(videos[i] for i in row) for row in test.pairs]
    assert pairs == ["A/0 A/1", "A/1 B/0", "A/0 B/0", "A/1 A/0"]
    assert test.template.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert test.names[:4].tolist() == ["A/0/0.1.jpg", "A/0/0.2.jpg", "A/0/0.3.jpg", "A/0/0.10.jpg"]
    features = recognition.template_features(torch.eye(12), test.template, np.arange(12))
    np.testing.assert_allclose(features[0], [0.5] * 4 + [0] * 8)


@pytest.mark.parametrize("text, error, message", [
    ("1, A/0, A/7, 1\n1, A/0, B/0, 0\n2, A/0, A/1, 1\n2, A/0, B/0, 0\n", FileNotFoundError, "A/7"),
    ("header\n1, A/0, A/1\n", ValueError, "splits.txt:2: found '1, A/0, A/1'"),
    ("1, 1, 1, A/0, A/1, 1\n", ValueError, "splits.txt:1: found '1, 1, 1,"),
    ("1, A/0, A/1, 1\n" * 3 + "2, A/0, B/0, 0\n", ValueError, "found 2 folds of 1 to 3 pairs"),
    ("1, A/0, A/1, 1\n2, A/0, B/0, 0\n", ValueError,
     "found 2 folds, 1 pairs of one .* with both kinds"),
    ("header\n", ValueError, "splits.txt has no pair")])
def test_ytf_that_is_wrong(tmp_path, text, error, message):
    ytf(tmp_path)
    put_text(tmp_path / "splits.txt", text)
    with pytest.raises(error, match=message):
        read_test(tmp_path)


def test_cfp(tmp_path):
    tmp_path = tmp_path / "cfp"
    for view, letter in (("frontal", "F"), ("profile", "P")):
        put(tmp_path / f"Data/Images/001/{view}", "01.jpg", "02.jpg")
        put_text(tmp_path / f"Protocol/Pair_list_{letter}.txt",
                 "".join(f"{n} ../Data/Images/001/{view}/0{n}.jpg\n" for n in (1, 2)))
    for fold in range(1, 11):
        for kind in ("FP", "FF"):
            put_text(tmp_path / f"Protocol/Split/{kind}/{fold:02d}/same.txt", "1,2\n")
            put_text(tmp_path / f"Protocol/Split/{kind}/{fold:02d}/diff.txt", "2,1\n")
    test = read_test(tmp_path)
    assert test.folds == 10 and test.same.tolist() == [True, False] * 10 and test.name == "CFP-FP"
    assert test.names[test.pairs[0]].tolist() == [f"Data/Images/001/{name}.jpg"
                                                  for name in ("frontal/01", "profile/02")]
    assert test.images[3].shape == (20, 16, 3)
    points = [f"Data/Images/001/{view}/0{n}.jpg,{n},2,3,4\n" for view in ("frontal", "profile")
              for n in (1, 2)]
    put_text(tmp_path.with_name("cfp.landmarks.csv"), "".join(points))
    frontal_profile, frontal = recognition.read_tests(str(tmp_path))
    assert frontal_profile.name == "CFP-FP" and frontal_profile.points.shape == (4, 2, 2)
    assert frontal.name == "CFP-FF" and len(frontal.images) == 2
    assert frontal.points[:, 0, 0].tolist() == [1, 2]
    put_text(tmp_path / "Protocol/Split/FP/03/diff.txt", "2,3\n")
    with pytest.raises(UserError, match="FP/03/diff.txt: found '2,3', wanted numbers of Pair"):
        read_test(tmp_path)


@pytest.mark.parametrize("name, folder",
                         [("CALFW", "images"), ("CPLFW", "aligned images"), ("CPLFW", ".")])
def test_calfw_and_cplfw(tmp_path, name, folder):
    put(tmp_path / folder, "A_1.jpg", "A_2.jpg", "B_1.jpg")
    put_text(tmp_path / f"pairs_{name}.txt",
             "A_1.jpg 3\nA_2.jpg 3\n" * 20 + "A_1.jpg 0\nB_1.jpg 0\n" * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test = read_test(tmp_path)
    assert test.name == name and test.folds == 10 and len(test.same) == 40
    for block in np.array_split(np.arange(40), 10):                       # two of both in each fold
        assert sorted(test.same[block]) == [False, False, True, True]
    assert test.names[test.pairs[:2]].tolist() == [["A_1.jpg", "A_2.jpg"], ["A_1.jpg", "B_1.jpg"]]
    for text, count in (("A_1.jpg 3\nA_2.jpg 3\nA_1.jpg 0\n", 3), ("", 0),
                        ("A_1.jpg 3\nA_2.jpg 0\n", 2)):
        put_text(tmp_path / f"pairs_{name}.txt", text)
        with pytest.raises(UserError, match=f"_{name}.txt: {count} lines that are not pairs"):
            read_test(tmp_path)


def test_pairs_of_your_own(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png")
    path = tmp_path / "pairs.csv"
    put_text(path, "image_a,image_b,same,fold\na.png,b.png,1,x\n./a.png,c.png,0,y\n"
                   "b.png,c.png,0,x\nb.png,b.png,1,y\nc.png,b.png,0,y\n")
    test = read_test(path)                                             # the larger fold comes first
    pairs = ["".join(name[0] for name in pair) for pair in test.names[test.pairs]]
    assert pairs == ["ac", "bb", "cb", "ab", "bc"] and test.folds == 2
    assert test.same.tolist() == [False, True, False, True, False]
    same, other, head = "a.png,b.png,1\n", "a.png,c.png,0\n", "image_a,image_b,same\n"
    assert read_test(put_text(path, head + (same + other) * 3)).folds == 3
    put_text(path, head + same * 3 + other * 3)
    with pytest.warns(UserWarning, match="each of 3 folds gets as many of both"):
        test = read_test(path)
    assert test.same.tolist() == [True, False] * 3 and test.folds == 3


@pytest.mark.parametrize("text, words", [
    ("image_a,image_b,same\na.png,b.png,maybe\n", "pairs.csv:2: found"),
    ("image_a,image_b\n", "found columns"), ("image_a,image_b,same\n", "has no row"),
    ("a,b\n", "columns .* wanted image_a,image_b,same or path,id,role"),
    ("image_a,image_b,same,fold\n" + "a.png,b.png,1,x\n" * 2 + "a.png,c.png,0,y\n" * 2,
     "found 2 folds, 2 pairs of one person and 2 of two; wanted .* with both kinds"),
    ("image_a,image_b,same,fold\n" + "a.png,b.png,1,x\n" * 3 + "a.png,c.png,0,y\n",
     "found 2 folds of 1 to 3 pairs"),
    ("image_a,image_b,same\n" + "a.png,b.png,1\n" * 20, "20 pairs of one person and 0 of two"),
    ("image_a,image_b,same\n" + "x" * 140000, "pairs.csv is no table in UTF-8"),
    ("image_a,image_b,same\nä.png,b.png,1\n", "pairs.csv is no table in UTF-8: 'utf-8' codec"),
    ("image_a,image_b,same\n" + "a.png,d.png,1\na.png,b.png,0\n" * 2, "names d.png, which is not")])
def test_pairs_of_your_own_that_are_wrong(tmp_path, text, words):
    put(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "pairs.csv").write_bytes(text.encode("latin1"))
    with pytest.raises((UserError, FileNotFoundError), match=words):
        read_test(tmp_path / "pairs.csv")


# ---- Identification and templates ----------------------------------------------------------------

def test_identification_table(tmp_path):
    put(tmp_path / "i", *(f"{name}.png" for name in "abcde"))
    path, head = tmp_path / "test.csv", "path,id,role,group\n"
    rows = ["a.png,Ann,gallery,", "b.png,Ann,probe,30", "c.png,Ann,distractor,", "d.png,Bob,skip,",
            "e.png,Bob,gallery,"]
    test = read_test(put_text(path, head + "".join(f"i/{row}\n" for row in rows)))
    assert test.role.tolist() == [0, 1, 2, 0] and test.group.tolist() == ["", "30", "", ""]
    assert test.identity.tolist() == [0, 0, -1, 1] and test.names.tolist()[3] == "i/e.png"
    e, probe = torch.eye(4), test.role == 1
    e[1, 0] = 2.0
    rank = metrics.rank_k(e[probe], test.identity[probe], e[~probe], test.identity[~probe], (1,))
    assert rank == {1: 1.0} and test.images[0].shape == (20, 16, 3)
    lost = "i/a.png,Ann,gallery,\ni/b.png,Bob,probe,\n"
    for text, message in {head + lost: "probe i/b.png has no mate .* 0 others", head: "has no row",
                          head + "i/a.png,Ann,boss,\n": "test.csv:2: found role 'boss'",
                          head + "i/a.png,Ann,gallery,\n": "there is no probe",
                          "path,role\n": "found columns"}.items():
        with pytest.raises(UserError, match=message):
            read_test(put_text(path, text))
    plain = read_test(put_text(path, "path,id,role\ni/a.png,1,gallery\ni/b.png,1,probe\n"))
    assert plain.group.tolist() == ["", ""]


def test_tinyface(tmp_path):
    put(tmp_path / "Testing_Set", "Probe/7_2.jpg", "Probe/._7_2.jpg", "Gallery_Match/7_1.jpg",
        "Gallery_Match/12_1.jpg", "Gallery_Distractor/x.jpg")
    test = read_test(tmp_path)
    assert test.identity.tolist() == [7, 12, 7, -1] and test.role.tolist() == [0, 0, 1, 2]
    assert test.names[2] == "Testing_Set/Probe/7_2.jpg" and len(test.images) == 4
    put(tmp_path, "Testing_Set/Probe/who.jpg")
    with pytest.raises(UserError, match="who.jpg: wanted a name ID_N.jpg"):
        read_test(tmp_path)


def ijb(root):
    put(root / "loose_crop", "1.jpg", "2.jpg", "3.jpg")
    put_text(root / "meta/ijbc_face_tid_mid.txt", "1.jpg 10 5\n2.jpg 10 6\n3.jpg 44 6\n")
    put_text(root / "meta/ijbc_template_pair_label.txt", "10 44 0\n44 44 1\n")
    put_text(root / "meta/ijbc_name_5pts_score.txt",
             "".join(f"{n}.jpg {' '.join(map(str, range(10)))} 0.{n}\n" for n in (1, 2, 3)))


def test_ijb(tmp_path):
    ijb(tmp_path / "IJBC")
    for root in (tmp_path, tmp_path / "IJBC"):
        test = read_test(root)
        assert test.name == "IJB-C" and test.template.tolist() == [0, 0, 1]
        assert test.media.tolist() == [5, 6, 6]
        assert test.pairs.tolist() == [[0, 1], [1, 1]] and test.same.tolist() == [False, True]
        np.testing.assert_allclose(test.faceness, [0.1, 0.2, 0.3])
        assert test.points.shape == (3, 5, 2) and test.points[1, 2].tolist() == [4, 5]
        assert len(test.images) == 3
    assert (tmp_path / "IJBC/meta/ijbc_template_pair_label.txt.npy").exists()
    for text, message in {"10 44 0\n10 45 1\n": "label.txt:2: found .10, 45, 1.",
                          "10 44\n": "rows of 3", "10 44 2\n": "label.txt:1: found",
                          "10 x 0\n": "could not convert", "10 44 1\n": "one kind only"}.items():
        put_text(tmp_path / "IJBC/meta/ijbc_template_pair_label.txt", text)
        with pytest.raises(UserError, match=message):
            read_test(tmp_path)
    put_text(tmp_path / "IJBC/meta/ijbc_face_tid_mid.txt", "1.jpg 10 5\n")
    with pytest.raises(UserError, match="has 1 images, .* 3; wanted the same in order"):
        read_test(tmp_path)
    words = "no test found. Looked for a .bin .* with one of pairs.txt"
    with pytest.raises(FileNotFoundError, match=words):
        read_test(tmp_path / "nowhere")


def test_template_features_against_the_formula():
    rng = np.random.default_rng(1)
    e, weights = rng.normal(size=(40, 6)), rng.random(40)
    template, media = rng.integers(0, 4, 40), rng.integers(0, 3, 40)
    found = recognition.template_features(e, template, media, weights)
    for t in range(4):
        total = sum((e * weights[:, None])[(template == t) & (media == m)].mean(0)
                    for m in np.unique(media[template == t]))
        np.testing.assert_allclose(found[t], total / np.linalg.norm(total))
    assert recognition.template_features(torch.randn(40, 6).half(), template,
                                         media).dtype == torch.float32
    with pytest.raises(ValueError, match="nan or inf"):
        recognition.template_features(e * np.nan, template, media)


# ---- Tests of one's own --------------------------------------------------------------------------

def crowd(counts):
    return [Face(f"{person}/{i}.png", identity=f"p{person}")
            for person, n in enumerate(counts) for i in range(n)]


def test_own_pairs():
    faces = crowd([4, 3, 1, 2] * 5)
    test = recognition.own_pairs(faces)
    identity = np.array([face.identity for face in faces])[test.pairs]
    assert ((identity[:, 0] == identity[:, 1]) == test.same).all() and test.folds == 10
    assert test.same.tolist() == [True, False] * (len(test.same) // 2)
    assert test.pairs[test.same][:6].tolist() == [[0, 2], [0, 3], [1, 3], [4, 5], [4, 6], [5, 6]]
    assert set(identity[~test.same, 0]) == {face.identity for face in faces}
    # both kinds in the people's order
    place = [recognition.natural(name) for name in identity[:, 0]]
    assert place[::2] == sorted(place[::2]) and place[1::2] == sorted(place[1::2])
    again, other = recognition.own_pairs(faces), recognition.own_pairs(faces, seed=1)
    assert (again.pairs == test.pairs).all() and (other.pairs != test.pairs).any()
    assert test.points is None
    e = torch.nn.functional.one_hot(torch.from_numpy(test.images.labels)).double()
    a, b = e[test.pairs].unbind(1)
    assert metrics.verification_accuracy(a, b, test.same, test.folds)[0] == 1
    assert recognition.own_pairs(crowd([2, 2, 1, 1])).folds == 2
    with pytest.raises(UserError, match="one pair of images of one person"):
        recognition.own_pairs(crowd([2, 1, 1, 1]))
    for counts, message in {(1, 1): "found 2 images of 2 people, 1 at most",
                            (5,): "of 1 people"}.items():
        with pytest.raises(UserError, match=message):
            recognition.own_pairs(crowd(counts))
        with pytest.raises(UserError, match=message):
            recognition.own_identification(crowd(counts))


def test_own_tests_of_drawn_faces_keep_their_points():
    faces = synthetic.read_faces("test", 20, 64, 5, per_identity=5)
    test = recognition.own_pairs(faces)
    np.testing.assert_array_equal(test.points, [face.points for face in faces])
    np.testing.assert_array_equal(test.images[3], load_image(faces[3].image))
    test = recognition.own_identification(faces)
    assert test.role.tolist() == [0, 3, 1, 1, 1] * 4  # the first; one unused; from n // 2 on
    assert test.identity.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    np.testing.assert_array_equal(test.points[4], faces[4].points)


def test_score_of_pairs_of_probes_and_of_templates():
    faces = synthetic.read_faces("test", 20, 32, 5, per_identity=5)
    person = torch.eye(4, 8).repeat_interleave(5, 0)
    scores = recognition.score(recognition.own_pairs(faces), person)
    assert scores == {"accuracy": 1.0, "accuracy/std": 0.0}
    test = recognition.own_identification(faces)
    assert recognition.score(test, person) == {"rank1": 1.0, "rank5": 1.0}
    wrong = person.clone()
    wrong[2] = person[5]  # one probe of twelve looks like the second person
    assert recognition.score(test, wrong)["rank1"] == pytest.approx(11 / 12)
    test.group = np.repeat(["left", "right"], 10)
    assert recognition.score(test, wrong)["rank1/left"] == pytest.approx(5 / 6)
    assert recognition.score(test, wrong)["rank1/right"] == 1.0
    names = np.arange(20).astype(str)
    video = np.repeat(np.arange(4), 5)
    same = np.array([False, True])
    pairs = np.array([[0, 1], [2, 2]])
    pairs = recognition.VerificationSet("videos", None, video, pairs, same, names, folds=2)
    assert recognition.score(pairs, 7 * person)["accuracy"] == 1.0
    ijb = recognition.TemplateSet("IJB", None, None, np.ones(20, np.float32), video, np.arange(20),
                                  np.array([[0, 1], [2, 2]], np.int32), same, names)
    assert recognition.score(ijb, person)["tar/0.001"] == 1.0


def test_pixels_know_a_copy_from_another_image():
    torch.manual_seed(0)
    image = torch.rand(2, 3, 48, 48)
    features = recognition.Pixels()(torch.cat([image, 0.5 * image + 0.2]))
    assert features.shape == (4, 192)
    unit = torch.nn.functional.normalize(features)
    cosines = unit[:2] @ unit[2:].T
    assert (cosines.diag() > 0.999).all() and cosines[0, 1].abs() < 0.5
