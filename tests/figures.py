"""README's pictures, from drawn faces.

    python -m tests.figures

writes .github/figures. All but schemes.png are of the scripts' default runs: their checkpoints are
those of --runs, and a run that is missing there is made first, on a CPU in minutes.
"""
import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

import heatmap_landmarks
import kprpe
import lddmm_face
import sdfl
import stn_align
from common import datasets, photos, synthetic, warp

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".github" / "figures"
WHITE = (255, 255, 255)
GREY = (90, 90, 90)
FONT = cv2.FONT_HERSHEY_SIMPLEX


def write(picture: np.ndarray, scale: float, text: str, x: float, y: float, colour=GREY):
    """Text on RGB uint8 (H, W, 3), in place; x, y px is its lower left corner."""
    cv2.putText(picture, text, (round(x), round(y)), FONT, scale, colour, 1, cv2.LINE_AA)


# ---- The point order of every scheme -------------------------------------------------------------

FRONTAL = 861  # a test face that looks straight ahead, eyes and mouth wide open
PAIRS = ((200, 0, 0), (0, 90, 210), (0, 120, 0), (150, 0, 170), (160, 80, 0), (0, 120, 130),
         (210, 0, 110), (80, 70, 200))  # colours, all dark enough to be read
SETS = {5: "5", 19: "19: AFLW", 29: "29: COFW", 68: "68: 300-W", 98: "98: WFLW", 106: "106: LaPa",
        194: "194: HELEN"}


def draw_schemes() -> np.ndarray:
    """All schemes on one face: RGB uint8 (2400, 1200, 3)."""
    legend = np.full((300, 300, 3), 255, np.uint8)
    for line, text in enumerate(("Numbers count from 0.", "Mirrored points have one colour",
                                 "and a line between them;", "black ones are on the midline.")):
        write(legend, 0.45, text, 20, 100 + 30 * line)
    small = photos.tile([draw_scheme(5, 300), draw_scheme(19, 300), draw_scheme(29, 300), legend], 2)
    rows = [small, draw_scheme(68, 600), draw_scheme(98, 600), draw_scheme(106, 600)]
    picture = np.concatenate([photos.tile(rows, 2), draw_scheme(194, 1200)])
    return picture // 15 * 15  # few colours make a small file


def draw_scheme(count: int, side: int) -> np.ndarray:
    """A scheme's points with their numbers and mirrored pairs on a pale face, (side, side, 3)."""
    box = synthetic.read_faces("test", FRONTAL + 1, side, 98)[FRONTAL].points
    box = np.concatenate([box.min(0), box.max(0)])[None]
    face = synthetic.read_faces("test", FRONTAL + 1, side, count)[FRONTAL]
    crop = datasets.CropDataset([face], datasets.square_crops(box, side, 1.16), side,
                                reflect=True)
    grey = cv2.cvtColor(photos.draw_crop(crop, 0, side), cv2.COLOR_RGB2GRAY)
    grey = cv2.equalizeHist(cv2.medianBlur(grey, side // 100 * 2 + 1))
    picture = np.repeat(195 + grey[..., None] // 52 * 15, 3, 2)  # five pale greys
    points = crop.crop_points()[0].numpy()
    flip = datasets.SCHEMES[count].flip
    colours = [(0, 0, 0)] * count
    for rank, i in enumerate(np.flatnonzero(np.arange(count) < flip)):
        colours[i] = colours[flip[i]] = PAIRS[rank % len(PAIRS)]
    for i, j in enumerate(flip):
        if i < j:
            pale = tuple(190 + c // 4 for c in colours[i])
            ends = np.round(16 * points[[i, j]]).astype(int).tolist()
            cv2.line(picture, *ends, pale, 1, cv2.LINE_AA, 4)
    scale = 0.42 if count < 194 else 0.38
    places = place_numbers(points, side, scale)
    for i, place in enumerate(places):
        photos.draw_points(picture, points[i:i + 1], colours[i], 2.2)
        write(picture, scale, str(i), *place, colours[i])
    write(picture, 0.5, SETS[count], 10, 22, (0, 0, 0))
    return cv2.rectangle(picture, (0, 0), (side - 1, side - 1), (190, 190, 190))


def place_numbers(points: np.ndarray, side: int, scale: float) -> np.ndarray:
    """Lower left corners (P, 2) px of the points' numbers, each where it hides least."""
    used = np.zeros((side, side))  # what a pixel costs
    for x, y in points.round().astype(int):
        used[max(y - 2, 0):y + 3, max(x - 2, 0):x + 3] = 1
    angles = np.arange(16) * np.pi / 8
    around = np.stack([np.cos(angles), np.sin(angles)], 1)
    corners = []
    for i, point in enumerate(points):
        (width, height), _ = cv2.getTextSize(str(i), FONT, scale, 1)
        half = np.array([width, height]) / 2
        best = np.inf
        for away in (4, 7, 10, 14, 18):
            for direction in around:
                middle = point + direction * (away + half)
                x, y = np.round(middle - half).astype(int).clip(0, side - 20)
                cost = used[y - 1:y + height + 1, x - 1:x + width + 1].sum() + away
                if cost < best:
                    best = cost
                    corner = x, y
        x, y = corner
        used[y - 1:y + height + 1, x - 1:x + width + 1] = 1
        corners.append((x, y + height))
    return np.array(corners)


# ---- A figure a paper ----------------------------------------------------------------------------

def row(*panels: np.ndarray, captions: tuple[str, ...]) -> np.ndarray:
    """Panels of one size beside each other, each above its caption."""
    framed = []
    for panel, caption in zip(panels, captions):
        panel = cv2.copyMakeBorder(panel, 4, 30, 4, 4, cv2.BORDER_CONSTANT, value=WHITE)
        write(panel, 0.5, caption, 6, len(panel) - 10)
        framed.append(panel)
    return np.concatenate(framed, 1)


def enlarge(points, size: int, side: int) -> np.ndarray:
    """Points px of a crop of `size` px, as px of a crop of `side` px."""
    return (np.asarray(points) + 0.5) * side / size - 0.5


def crops(args, make: Callable, side: int) -> tuple:
    """Crops of the first 96 test faces for the network, and the same of `side` px for the eye."""
    args.limit = 96
    small = make(args)
    sharp = make(argparse.Namespace(**vars(args) | dict(size=side)))
    return small, sharp


def draw_sdfl(checkpoint: str, side: int = 232) -> np.ndarray:
    """Figs. 7 and 4."""
    args = sdfl.parse_args(["--eval", checkpoint, "--device", "cpu"])
    net, _ = sdfl.open_checkpoint(args, checkpoint)
    small, sharp = crops(args, lambda args: sdfl.make_dataset(args, "test"), side)
    panels = []
    for i in (47, 57, 83, 37):
        image = sdfl.prepare(small.__getitems__([(0, i)]), net.mask.device)
        points = enlarge(sdfl.predict_points(net, image)[0], small.size, side)
        panels.append(photos.draw_points(photos.draw_crop(sharp, i, side), points, photos.RED, 1.8))
    graph = sdfl.draw_graph(net.mask, net.mean_face, side)[:, side:]
    return row(*panels, graph, captions=("laughing", "turned", "occluded", "strong pose",
                                         "graph on the mean face"))


def draw_heatmaps(checkpoint: str, side: int = 292) -> np.ndarray:
    """From an image to its landmarks."""
    args = heatmap_landmarks.parse_args(["--eval", checkpoint, "--device", "cpu"])
    net = heatmap_landmarks.open_checkpoint(args, checkpoint)

    def make(args):
        faces = heatmap_landmarks.read_faces(args, "test")
        return heatmap_landmarks.make_dataset(args, faces, augmented=False)

    small, sharp = crops(args, make, side)
    i = 57
    image = heatmap_landmarks.prepare(small.__getitems__([(0, i)]), net.head.weight.device)
    with torch.inference_mode():
        heat = net(image)[0].amax(0).clamp(0, 1).numpy()
    heat = cv2.resize(heat, (side, side), interpolation=cv2.INTER_LINEAR)[..., None]
    warm = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    crop = photos.draw_crop(sharp, i, side)
    over = (crop * (1 - 0.85 * heat) + warm * 0.85 * heat).astype(np.uint8)
    points, _ = heatmap_landmarks.predict_points(net, image, args.decode, args.kernel)
    found = enlarge(points[0], small.size, side)
    found = photos.draw_points(crop.copy(), found, photos.RED, 2)
    photo = sharp.faces[i].image()
    five = heatmap_landmarks.rough_five(args, sharp.faces[:i + 1])[i]
    photos.draw_points(photo, five, photos.GREEN, 4)
    return row(photo, crop, over, found, captions=("image, five rough points", "aligned crop",
                                                   "heatmaps", "landmarks"))


def draw_flow(checkpoint: str, side: int = 392) -> np.ndarray:
    """Fig. 2: the flow, and landmarks of two annotations that it carries."""
    args = lddmm_face.parse_args(["--eval", checkpoint, "--device", "cpu"])
    net = lddmm_face.open_checkpoint(args, checkpoint)
    i = 47
    small, sharp = crops(args, lambda args: lddmm_face.make_dataset(args, "test"), side)
    one = datasets.CropDataset(small.faces[i:i + 1], small.crop_matrices[i:i + 1], small.size)
    panels = [lddmm_face.draw_flow(net, one, side)[:, :side]]
    image = lddmm_face.prepare(small.__getitems__([(0, i)]), net.mean.device)
    for count, colour in ((net.scheme, photos.GREEN), (194, photos.RED)):
        args.points = count
        args.limit = 0  # the mean face of another annotation is that of all training faces
        extra = lddmm_face.find_extra(net, args, count)
        points = lddmm_face.predict_points(net, image, extra, args)[0][0]
        crop = photos.draw_crop(sharp, i, side)
        panels.append(photos.draw_points(crop, enlarge(points, small.size, side), colour, 2))
    return row(*panels, captions=("flow from the mean face (red) to the face (green)",
                                  f"{net.scheme} landmarks, as trained on",
                                  "194 landmarks, carried by the same flow"))


@torch.inference_mode()
def draw_alignment(checkpoint: str, side: int = 292) -> np.ndarray:
    """Fig. 5: the lattice on the face, and the aligned face with T."""
    args = stn_align.parse_args(["--eval", checkpoint, "--device", "cpu"])
    net, _ = stn_align.open_checkpoint(args, checkpoint)

    def make(args):
        return stn_align.make_dataset(args, stn_align.read_set(args, "test"), augmented=False)

    small, sharp = crops(args, make, side)
    across = torch.linspace(-0.5, stn_align.SIDE - 0.5, 8)
    along = torch.linspace(-0.5, stn_align.SIDE - 0.5, 57)
    columns = torch.cartesian_prod(across, along)
    lattice = torch.cat([columns, columns.flip(1)])  # 16 lines of 57 points
    T = stn_align.from_112(net.template.numpy(), side)
    panels = []
    for i in (57, 29):
        image, _ = stn_align.prepare(small.__getitems__([(0, i)]), net.device)
        w = net.find_map(image)
        lines = stn_align.from_112(net.maps.to_input(w, lattice)[0].numpy(), side)
        crop = photos.draw_crop(sharp, i, side)
        panels.append(stn_align.draw_lines(crop, lines.reshape(16, 57, 2), (250, 230, 120)))
        image, _ = stn_align.prepare(sharp.__getitems__([(0, i)]), net.device)
        aligned = stn_align.to_picture(warp.sample(image, net.maps.grid(w, side))[0])
        panels.append(photos.draw_points(np.ascontiguousarray(aligned), T, photos.RED, 2))
    return row(*panels, captions=("moved lattice", "aligned face, template T (red)") * 2)


def draw_offsets(checkpoint: str, side: int = 232) -> np.ndarray:
    """Figs. 12 and 13: what KP-RPE adds to attention."""
    args = kprpe.parse_args(["--eval", checkpoint, "--device", "cpu"])
    net, _, device = kprpe.open_checkpoint(args, checkpoint)

    def make(args):
        split = kprpe.face_split(args, kprpe.identity_faces(args, "test"))
        return kprpe.make_crops(args, split, 0.0)

    _, sharp = crops(args, make, side)
    image, keypoints = kprpe.picture(sharp, 57, side, "")
    maps = kprpe.offsets(net, torch.from_numpy(keypoints)[None])[:, 0].numpy()  # (depth, N, N)
    cells = round(maps.shape[1] ** 0.5)
    panels = [photos.draw_points(image, keypoints * side - 0.5, photos.GREEN, 4)]
    for row_, column in ((2, 2), (4, 3)):
        for layer in (0, 3):
            values = maps[layer, row_ * cells + column].reshape(cells, cells)
            panels.append(kprpe.draw_offset(values, (row_, column), keypoints, side)[4:-4, 4:-4])
    return row(*panels, captions=("keypoints", "layer 1, query *", "layer 4", "layer 1", "layer 4"))


# ---- All figures ---------------------------------------------------------------------------------

FIGURES = {"sdfl.jpg": draw_sdfl, "heatmap_landmarks.jpg": draw_heatmaps,
           "lddmm_face.jpg": draw_flow, "stn_align.jpg": draw_alignment,
           "kprpe.jpg": draw_offsets, "schemes.png": draw_schemes}


def find_run(runs: Path, script: str) -> str:
    """The checkpoint of a script's default run, which is made if it is missing."""
    folder = runs / f"{script}-faces"
    if not (folder / "last.pt").exists():
        subprocess.run([sys.executable, ROOT / f"{script}.py", "--output", folder], check=True)
    return str(folder / "last.pt")


def main(argv=None):
    parser = argparse.ArgumentParser(description="README's pictures")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the default runs")
    parser.add_argument("--only", nargs="+", default=list(FIGURES), choices=FIGURES, metavar="NAME",
                        help="figures to make, of " + ", ".join(FIGURES))
    args = parser.parse_args(argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        script = Path(name).stem
        inputs = [] if script == "schemes" else [find_run(args.runs, script)]
        picture = FIGURES[name](*inputs)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_PNG_COMPRESSION, 9]
        cv2.imwrite(str(FOLDER / name), picture[..., ::-1], quality)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
