"""README's pictures: all there, all named, small; and the numbers of a scheme hide none of it."""
import re

import cv2
import numpy as np

from tests import figures

README = (figures.ROOT / "README.md").read_text()


def test_readme_names_no_missing_file():
    for path in re.findall(r"""(?:\]\(|src=["'])([\w./-]+)""", README):
        assert (figures.ROOT / path).exists(), path


def test_every_figure_is_named_by_readme_and_has_its_function():
    named = set(re.findall(r"\.github/figures/([\w.]+)", README))
    assert named in (set(), set(figures.FIGURES))  # all or none
    files = {path.name: path.stat().st_size for path in figures.FOLDER.iterdir()}
    assert named <= files.keys() <= figures.FIGURES.keys()
    assert max(files.values()) < 300_000 and sum(files.values()) < 1_500_000


def test_numbers_hide_neither_points_nor_each_other():
    points = np.array([[60.0, 60.0], [72.0, 60.0], [66.0, 66.0], [60.0, 72.0]])
    seen = np.zeros((120, 120), int)
    for i, (x, y) in enumerate(figures.place_numbers(points, 120, 0.42)):
        width, height = cv2.getTextSize(str(i), figures.FONT, 0.42, 1)[0]
        seen[y - height:y, x:x + width] += 1
    for x, y in points.astype(int):
        seen[y, x] += 1
    assert seen.max() == 1


def test_a_schemes_picture_has_its_colours_in_pairs():
    picture = figures.draw_scheme(5, 160)
    assert picture.shape == (160, 160, 3)
    for colour in (figures.PAIRS[0], figures.PAIRS[1], figures.BLACK):  # eyes, mouth, nose
        assert (picture == colour).all(2).any()
