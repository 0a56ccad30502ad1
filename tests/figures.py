"""README's pictures, all of drawn faces.

    python -m tests.figures

writes .github/figures. A paper's figure is that of its script's default run, whose checkpoint lies
in --runs; a run that is missing there is made first, in minutes on a CPU. schemes.png needs none.
"""
import argparse
import subprocess
import sys
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
FONT = cv2.FONT_HERSHEY_SIMPLEX
BLACK, GREY, WHITE, YELLOW = (0, 0, 0), (190, 190, 190), (255, 255, 255), (250, 230, 120)
LAUGHING, OCCLUDED, SIDEWAYS, TILTED, TURNED, STRAIGHT = 47, 83, 37, 57, 8, 861  # test faces


def write(picture: np.ndarray, scale: float, text: str, x: float, y: float, colour=BLACK):
    """Text on RGB uint8 (H, W, 3), in place; x, y px is its lower left corner."""
    cv2.putText(picture, text, (round(x), round(y)), FONT, scale, colour, 1, cv2.LINE_AA)


# ---- A figure a paper ----------------------------------------------------------------------------

def row(panels: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Pictures of one size beside each other, each above its caption."""
    framed = []
    for caption, panel in panels:
        cv2.rectangle(panel, (0, 0), (len(panel) - 1, len(panel) - 1), GREY)
        panel = cv2.copyMakeBorder(panel, 4, 30, 4, 4, cv2.BORDER_CONSTANT, value=WHITE)
        write(panel, 0.5, caption, 6, len(panel) - 10)
        framed.append(panel)
    return np.concatenate(framed, 1)


def read_test(script, args):
    """The test faces in crops of --size."""
    if script is kprpe:
        split = kprpe.face_split(args, kprpe.identity_faces(args, "test"))
        return kprpe.make_crops(args, split, 0.0)  # not aligned
    if script is heatmap_landmarks:
        return script.make_dataset(args, script.read_faces(args, "test"), augmented=False)
    if script is stn_align:
        return script.make_dataset(args, script.read_set(args, "test"), augmented=False)
    return script.make_dataset(args, "test")


def load(script, checkpoint: str, side: int) -> tuple:
    """A script's flags, its network, and some test faces in crops twice: as the network wants them,
    and of `side` px to look at."""
    args = script.parse_args(["--eval", checkpoint, "--device", "cpu"])
    net = script.open_checkpoint(args, checkpoint)
    args.limit = 96
    shown = read_test(script, argparse.Namespace(**vars(args) | dict(size=side)))
    return args, net[0] if isinstance(net, tuple) else net, read_test(script, args), shown


def draw_found(shown, i: int, points: torch.Tensor, size: int, colour) -> np.ndarray:
    """Crop i with points (P, 2) that were found in a crop of `size` px."""
    points = (points.numpy() + 0.5) * shown.size / size - 0.5
    return photos.draw_points(photos.draw_crop(shown, i, shown.size), points, colour, 2)


def draw_sdfl(checkpoint: str, side: int = 232) -> np.ndarray:
    """Figs. 7 and 4: predictions, and the graph."""
    _, net, small, shown = load(sdfl, checkpoint, side)
    faces = {"laughing": LAUGHING, "tilted": TILTED, "occluded": OCCLUDED, "strong pose": SIDEWAYS}
    panels = []
    for caption, i in faces.items():
        image = sdfl.prepare(small.__getitems__([(0, i)]), net.mask.device)
        points = sdfl.predict_points(net, image)[0]
        panels.append((caption, draw_found(shown, i, points, small.size, photos.RED)))
    graph = sdfl.draw_graph(net.mask, net.mean_face, 2 * side)[:, 2 * side:]
    graph = cv2.resize(graph, (side, side), interpolation=cv2.INTER_AREA)
    return row([*panels, ("graph on the mean face", graph)])


@torch.inference_mode()
def draw_heatmaps(checkpoint: str, side: int = 292) -> np.ndarray:
    """Fig. 1, and the way from heatmaps to landmarks."""
    args, net, small, shown = load(heatmap_landmarks, checkpoint, side)
    photo = shown.faces[TILTED].image()
    five = heatmap_landmarks.rough_five(args, shown.faces[:TILTED + 1])[TILTED]
    crop = photos.draw_crop(shown, TILTED, side)
    image = heatmap_landmarks.prepare(small.__getitems__([(0, TILTED)]), torch.device("cpu"))
    heat = net(image)[0].amax(0).clamp(0, 1).numpy()
    heat = cv2.resize(heat, (side, side))[..., None]
    warm = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    over = crop * (1 - 0.85 * heat) + warm * 0.85 * heat
    points = heatmap_landmarks.predict_points(net, image, args.decode, args.kernel)[0][0]
    found = draw_found(shown, TILTED, points, small.size, photos.RED)
    return row([("image, five rough points", photos.draw_points(photo, five, photos.GREEN, 4)),
                ("aligned crop", crop), ("heatmaps", over.astype(np.uint8)),
                (f"{len(points)} landmarks", found)])


def draw_flow(checkpoint: str, side: int = 392) -> np.ndarray:
    """Fig. 2: the flow, and the landmarks of two annotations."""
    args, net, small, shown = load(lddmm_face, checkpoint, side)
    i = 70
    one = datasets.CropDataset(small.faces[i:i + 1], small.crop_matrices[i:i + 1], small.size)
    bent = lddmm_face.draw_flow(net, one, side)[:, :side]
    panels = [("momenta: green; trajectories, true points: blue", bent)]
    image = lddmm_face.prepare(small.__getitems__([(0, i)]), torch.device("cpu"))
    args.limit = 0  # the mean face of another annotation is that of all training faces
    for caption, count in (("68 landmarks, learned", 68), ("194 landmarks, predicted", 194)):
        args.points = count
        extra = lddmm_face.extra_to_predict(net, args, count)
        points = lddmm_face.predict_points(net, image, extra, args)[0][0]
        panels.append((caption, draw_found(shown, i, points, small.size, photos.GREEN)))
    return row(panels)


@torch.inference_mode()
def draw_alignment(checkpoint: str, side: int = 292) -> np.ndarray:
    """Fig. 5: the lattice on the face, and the aligned face with T."""
    _, net, small, shown = load(stn_align, checkpoint, side)
    T = stn_align.from_112(net.template.numpy(), side)
    panels = []
    for i in (TILTED, 29):
        w = net.find_map(stn_align.prepare(small.__getitems__([(0, i)]), net.device)[0])
        lattice = net.maps.to_input(w, net.maps.lattice)[0].numpy()
        lattice = stn_align.from_112(lattice, side).reshape(8, 8, 2)
        lines = np.concatenate([lattice, lattice.transpose(1, 0, 2)])
        crop = stn_align.draw_lines(photos.draw_crop(shown, i, side), lines, YELLOW)
        crop = photos.draw_points(crop, lattice.reshape(64, 2), YELLOW, 2.5)
        image = stn_align.prepare(shown.__getitems__([(0, i)]), net.device)[0]
        image = stn_align.to_picture(warp.sample(image, net.maps.grid(w, side))[0]).copy()
        aligned = photos.draw_points(image, T, photos.RED, 2)
        panels += [("lattice, moved", crop), ("aligned face, T in red", aligned)]
    return row(panels)


def draw_offsets(checkpoint: str, side: int = 232) -> np.ndarray:
    """Fig. 12: what KP-RPE adds to the attention of one patch, the star, to all; higher is darker."""
    _, net, _, shown = load(kprpe, checkpoint, side)
    image, keypoints = kprpe.picture(shown, TURNED, side, "")
    maps = kprpe.offsets(net, torch.from_numpy(keypoints)[None])[:, 0].numpy()  # (depth, N, N)
    width = round(maps.shape[1] ** 0.5)
    points = keypoints * side - 0.5
    panels = [("turned face, keypoints", photos.draw_points(image, points, photos.GREEN, 4))]
    for query, point in (("eye", keypoints[0]), ("mouth", keypoints[3])):
        x, y = (width * point).astype(int)
        for layer in (0, len(maps) - 1):
            values = maps[layer, y * width + x].reshape(width, width)
            tile = kprpe.draw_offset(values, (y, x), keypoints, side)
            panels.append((f"{query}: layer {layer + 1}", tile[4:-4, 4:-4].copy()))  # no frame
    return row(panels)


# ---- The point order of every scheme -------------------------------------------------------------

SETS = {5: "5", 19: "19: AFLW", 29: "29: COFW", 68: "68: 300-W", 98: "98: WFLW", 106: "106: LaPa",
        194: "194: HELEN"}
PAIRS = ((200, 0, 0), (0, 90, 210), (0, 120, 0), (150, 0, 170), (160, 80, 0), (0, 120, 130),
         (210, 0, 110), (80, 70, 200))  # colours of mirrored pairs


def draw_schemes() -> np.ndarray:
    """All schemes on one face: RGB uint8 (2400, 1200, 3)."""
    legend = np.full((300, 300, 3), 255, np.uint8)
    for line, text in enumerate(("Numbers count from 0.", "Mirrored points have one colour",
                                 "and a line between them;", "black ones are on the midline.")):
        write(legend, 0.45, text, 20, 100 + 30 * line)
    small = photos.tile([*(draw_scheme(count, 300) for count in (5, 19, 29)), legend], 2)
    large = photos.tile([small, *(draw_scheme(count, 600) for count in (68, 98, 106))], 2)
    return np.concatenate([large, draw_scheme(194, 1200)]) // 15 * 15  # few colours: a small file


def draw_scheme(count: int, side: int) -> np.ndarray:
    """A scheme's points with numbers and mirrored pairs on a pale face: (side, side, 3)."""
    faces = [synthetic.read_faces("test", STRAIGHT + 1, side, n)[STRAIGHT] for n in (98, count)]
    box = datasets.face_boxes(faces[:1], "landmarks")  # one crop for all schemes
    data = datasets.CropDataset(faces[1:], datasets.square_crops(box, side, 1.16), side,
                                reflect=True)
    pale = cv2.cvtColor(photos.draw_crop(data, 0, side), cv2.COLOR_RGB2GRAY)
    pale = 195 + cv2.equalizeHist(cv2.medianBlur(pale, side // 100 * 2 + 1)) // 52 * 15
    picture = np.repeat(pale[..., None], 3, 2)
    points = data.crop_points()[0].numpy()
    flip = datasets.SCHEMES[count].flip
    colours = [BLACK] * count
    for rank, i in enumerate(np.flatnonzero(np.arange(count) < flip)):
        colours[i] = colours[flip[i]] = PAIRS[rank % len(PAIRS)]
        ends = np.round(16 * points[[i, flip[i]]]).astype(int).tolist()
        cv2.line(picture, *ends, tuple(190 + c // 4 for c in colours[i]), 1, cv2.LINE_AA, 4)
    scale = 0.42 if count < 194 else 0.38
    for i, place in enumerate(place_numbers(points, side, scale)):
        photos.draw_points(picture, points[i:i + 1], colours[i], 2.2)
        write(picture, scale, str(i), *place, colours[i])
    write(picture, 0.5, SETS[count], 10, 22)
    return cv2.rectangle(picture, (0, 0), (side - 1, side - 1), GREY)


def place_numbers(points: np.ndarray, side: int, scale: float) -> list[tuple[int, int]]:
    """Lower left corners x, y px of the points' numbers, each where it hides least."""
    used = np.zeros((side, side), int)
    for x, y in points.round().astype(int):
        used[y - 2:y + 3, x - 2:x + 3] = 1
    corners = []
    for i, point in enumerate(points):
        width, height = cv2.getTextSize(str(i), FONT, scale, 1)[0]
        choices = []
        for away in (4, 7, 10, 14, 18):
            for angle in np.arange(16) * np.pi / 8:
                reach = np.array([width, height]) / 2 + away
                middle = point + reach * (np.cos(angle), np.sin(angle))
                x, y = np.round(middle - (width / 2, height / 2)).astype(int).tolist()
                hidden = used[y - 1:y + height + 1, x - 1:x + width + 1].sum()
                choices.append((hidden + away, len(choices), x, y))
        _, _, x, y = min(choices)
        used[y - 1:y + height + 1, x - 1:x + width + 1] = 1
        corners.append((x, y + height))
    return corners


# ---- All figures ---------------------------------------------------------------------------------

FIGURES = {"sdfl.jpg": draw_sdfl, "heatmap_landmarks.jpg": draw_heatmaps,
           "lddmm_face.jpg": draw_flow, "stn_align.jpg": draw_alignment,
           "kprpe.jpg": draw_offsets, "schemes.png": draw_schemes}


def main(argv=None):
    parser = argparse.ArgumentParser("tests.figures", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where default runs are")
    parser.add_argument("--only", nargs="+", default=FIGURES, choices=FIGURES, metavar="NAME",
                        help=", ".join(FIGURES))
    args = parser.parse_args(argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        script = Path(name).stem
        data = "faces-geometry" if script == "stn_align" else "faces"  # the default of --data
        folder = args.runs / f"{script}-{data}"
        if script == "schemes":
            picture = draw_schemes()
        else:
            if not (folder / "last.pt").exists():
                command = [sys.executable, ROOT / f"{script}.py", "--output", folder]
                subprocess.run(command, check=True)
            picture = FIGURES[name](str(folder / "last.pt"))
        quality = [cv2.IMWRITE_PNG_COMPRESSION, 9]
        if name.endswith(".jpg"):
            quality = [cv2.IMWRITE_JPEG_QUALITY, 90]
        cv2.imwrite(str(FOLDER / name), picture[..., ::-1], quality)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
