"""Digits: idx files, the canvas to train on, affine versions, and the keypoints of both."""
import gzip
import struct

import numpy as np
import pytest

from common import UserError, digits
from tests.trees import put_mnist


def drawn(count=6):
    """28 px images with a bar and a dot, in the 20 px box of MNIST."""
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 4:24, 10:13], images[:, 6:8, 20:24] = 255, 200
    return images


def test_idx(tmp_path):
    images, labels = drawn(), np.arange(6, dtype=np.uint8)
    for name, array in (("images", images), ("labels", labels)):
        head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        data = head + array.tobytes()
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
        for path in (name, f"{name}.gz"):
            np.testing.assert_array_equal(digits.read_idx(str(tmp_path / path)), array)
    (tmp_path / "short").write_bytes(data[:-1])
    (tmp_path / "page").write_text("<html>")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(data)[:-6])
    (tmp_path / "huge").write_bytes(bytes([0, 0, 8, 200]))
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(data + bytes(10_000_000)))
    for name, message in {"short": "short: found .* 5 bytes", "page": "page: found",
                          "cut.gz": "damaged",
                          "huge": "damaged", "bomb.gz": "shape .6,., then 7 bytes"}.items():
        with pytest.raises(ValueError, match=message):
            digits.read_idx(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no .*none"):
        digits.read_idx(str(tmp_path / "none"))


def test_mnist_canvas_moves_digits_and_their_points():
    images, points = digits.mnist_canvas(drawn(200), seed=3)
    assert images.shape == (200, 40, 40) and (images.sum((1, 2)) == drawn(1).sum()).all()
    move = points[:, 0] - [10 + 6, 4 + 6]
    assert move.min() == -6 and move.max() == 6 and len(np.unique(move, axis=0)) > 60
    np.testing.assert_array_equal(points[:, 4] - points[:, 0], [[6.5, 9.5]] * 200)
    np.testing.assert_array_equal(points[:, 3] - points[:, 0], [[13, 19]] * 200)
    np.testing.assert_array_equal(points[0, 1] - points[0, 2], [13, -19])
    with pytest.raises(ValueError, match="leave the canvas of 30 px"):
        digits.mnist_canvas(drawn(), 0, canvas=30)


def test_affnist_keeps_digits_whole_and_reaches_everywhere():
    images, points, source = digits.affnist(drawn(40), seed=1, count_per_image=5)
    assert images.shape == (200, 40, 40) and source.tolist() == np.repeat(np.arange(40), 5).tolist()
    # What is kept: the light of the digit times the area, 0.64 to 1.44, none beyond the border.
    light = images.sum((1, 2)) / drawn(1).sum()
    assert light.min() > 0.6 and light.max() < 1.5
    wide = digits.affnist(np.pad(drawn(40), ((0, 0), (3, 3), (3, 3))), 1, 5)[0]   # the same digits
    np.testing.assert_allclose(images.sum((1, 2)), wide.sum((1, 2)), rtol=0.02)
    assert points.min() <= 2 and points.max() >= 37 and (points[:, 3] >= points[:, 0]).all()
    again = digits.affnist(drawn(40), 1, 5)
    assert all((a == b).all() for a, b in zip(again, (images, points, source)))
    for i in (0, 77):
        lit = np.argwhere(images[i] > 30)[:, ::-1]
        np.testing.assert_array_equal(points[i, [0, 3]], [lit.min(0), lit.max(0)])


def test_affnist_on_what_does_not_work():
    blank = drawn(3)
    blank[1] = 0
    with pytest.raises(ValueError, match="image 1 has no pixel above 30, nor have 0 others"):
        digits.affnist(blank, 0)
    with pytest.raises(ValueError, match="image 0 does not fit a canvas of 16 px"):
        digits.affnist(drawn(1), 0, canvas=16)


def test_batches_of_mnist(tmp_path):
    put_mnist(tmp_path)
    images, labels = digits.read_mnist(str(tmp_path), "train")
    assert len(digits.read_mnist(str(tmp_path), "train", 5)[0]) == 5
    data = digits.Digits(images, labels, 40, seed=3)
    first, again, later = (data.__getitems__([(epoch, i) for i in range(12)])
                           for epoch in (0, 0, 1))
    assert first["image"].shape == (12, 40, 40, 1) and data.labels.tolist() == [*range(10), 0, 1]
    assert np.array_equal(first["image"], again["image"])
    assert not np.array_equal(first["image"], later["image"])
    one = data.__getitems__([(0, 7)])  # whatever else is in the batch
    assert np.array_equal(one["image"][0], first["image"][7])
    for image, (left, top) in zip(first["image"][..., 0], first["points"][:, 0].round().int()):
        assert image[top, left] > 30 and image[:top].max() == 0 and image[:, :left].max() == 0
    still = digits.Digits(first["image"].numpy()[..., 0], labels, 40, first["points"].numpy())
    assert np.array_equal(still.__getitems__([(5, 2)])["image"][0], first["image"][2])
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 1]))
    with pytest.raises(UserError, match=r"images \(12, 28, 28\) and labels \(2,\)"):
        digits.read_mnist(str(tmp_path), "test")
