"""The user's own photographs: the loop of --predict, where faces are looked for in them, and
drawing.

A face is found by a detector (--detector), given as --box, or fills the image. What is found of it
is written beside --output's NAME, that of its image: NAME.pts, and NAME.face2.pts for the second
face of an image.
"""
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from tqdm import tqdm

from common import UserError, datasets, run, warp

GREEN = (60, 220, 60)
RED = (240, 50, 50)

# ---- Faces ---------------------------------------------------------------------------------------

def open_detector(path: str):
    """cv2's detector from a YuNet model file.   Raises: UserError for another kind of file."""
    log = cv2.utils.logging
    log.setLogLevel(log.LOG_LEVEL_ERROR)  # cv2 5 warns that its new engine has no targets to choose
    with open(path, "rb") as file:  # not cv2, to which some names of files are fatal
        model = np.frombuffer(file.read(), np.uint8)
    try:
        return cv2.FaceDetectorYN.create("onnx", model, np.empty(0, np.uint8), (320, 320),
                                         score_threshold=0.8)
    except cv2.error as error:
        raise UserError(f"--detector {path}: no YuNet model that OpenCV reads") from error


def detect(detector, image: np.ndarray) -> np.ndarray:
    """Faces (M, 15) of RGB uint8 (H, W, 3), px: x y w h, five points x y (image-left eye first),
    score.

    YuNet finds faces of about 10 to 400 px. So it looks twice, at the image shrunk to 640 px and to
    1,280 px on its long side (none is enlarged), and of boxes that overlap the one of the higher
    score is kept.
    """
    found = [np.zeros((0, 15))]
    long_side = max(image.shape[:2])
    for side in sorted({min(long_side, 640), min(long_side, 1280)}):
        scale = side / long_side
        width, height = (max(round(scale * n), 1) for n in image.shape[1::-1])
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        detector.setInputSize((width, height))
        faces = detector.detect(np.ascontiguousarray(small[..., ::-1]))[1]
        if faces is not None:
            faces = faces.astype(np.float64)
            ratio = np.tile([image.shape[1] / width, image.shape[0] / height], 7)
            faces[:, :14] = faces[:, :14] * ratio
            faces[:, [0, 1, *range(4, 14)]] += np.tile(ratio[:2] - 1, 6) / 2  # pixel centres
            found.append(faces)
    found = np.concatenate(found)
    found = found[(found[:, 2:4] > 0).all(1)]
    found = found[np.argsort(-found[:, 14], kind="stable")]
    kept = []
    for face in found:
        if not any(overlap(face[:4], other[:4]) > 0.3 for other in kept):
            kept.append(face)
    return np.array(kept).reshape(-1, 15)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over the smaller area of two boxes (4,) x y w h: a face inside a larger box is
    the same."""
    low = np.maximum(a[:2], b[:2])
    high = np.minimum(a[:2] + a[2:], b[:2] + b[2:])
    return float(np.clip(high - low, 0, None).prod() / min(a[2:].prod(), b[2:].prod()))


def find_boxes(args, image: np.ndarray, detector) -> np.ndarray:
    """Boxes (M, 4) x0 y0 x1 y1 px of an image's faces: by the detector, from --box, or the whole
    image. YuNet's own boxes reach to the hair and are 1.3 times as large as those of landmarks; a
    network that was trained on these gets boxes about its five points."""
    height, width = image.shape[:2]
    if detector is not None:
        found = detect(detector, image)
        if args.box == "landmarks":
            return datasets.landmark_boxes(found[:, 4:14].reshape(-1, 5, 2))
        return np.concatenate([found[:, :2], found[:, :2] + found[:, 2:4]], 1)
    if args.box in args.boxes:
        return np.array([[-0.5, -0.5, width - 0.5, height - 0.5]])
    box = run.parse_box(args.box)
    if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
        raise UserError(f"--box {args.box} lies outside an image of {width} x {height}")
    return np.array([box])


# ---- The loop of --predict -----------------------------------------------------------------------

@torch.no_grad()
def fold_batch_norms(net: nn.Module, size: int):
    """Makes each batch norm of a network in evaluation mode part of the convolution that it
    follows, in place: less to do for the same output, but for rounding.
    Args: size, px of the image (1, 3, size, size) that is passed through to see what follows what.
    """
    names = {module: name for name, module in net.named_modules()}
    made = {}  # id of a convolution's output: both, so that no other tensor gets its id

    def look(module, inputs, output):
        if not isinstance(module, nn.BatchNorm2d):
            made[id(output)] = module, output
        elif id(inputs[0]) in made:
            conv, _ = made[id(inputs[0])]
            folded = fuse_conv_bn_eval(conv, module, isinstance(conv, nn.ConvTranspose2d))
            conv.weight, conv.bias = folded.weight, folded.bias
            net.set_submodule(names[module], nn.Identity())

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)
    hooks = [module.register_forward_hook(look) for module in names if isinstance(module, kinds)]
    net(torch.zeros(1, 3, size, size, device=next(net.parameters()).device))
    for hook in hooks:
        hook.remove()


class Photo:
    """An image of --predict: `path`, `image` RGB uint8 (H, W, 3), `stem`, the path of its results
    without ending."""

    def __init__(self, path: str, stem: Path):
        self.path = path
        self.stem = stem
        self.image = datasets.load_image(path, upright=True)
        self.faces = 0

    def target(self) -> str:
        """The path, without ending, of what is found of a further face: NAME, NAME.face2, ..."""
        self.faces += 1
        return str(self.stem) + (f".face{self.faces}" if self.faces > 1 else "")


def photos(args, endings: Sequence[str]) -> Iterator[Photo]:
    """The images of --predict, one at a time; one that cannot be read is reported, and the others
    go on.

    Args: endings, of the files that will be written of each.
    Raises: UserError before anything is written where a result would replace a file, or two images
        have one name; and at the end if an image could not be read.
    """
    found = datasets.image_paths(args.predict)  # {name: path}
    for name in found:
        first = re.sub(r"\.face\d+$", "", name)
        if first != name and first in found:
            raise UserError(f"{found[name]} is named as another face of {found[first]}: rename it")
    args.data = "predict"
    folder = run.find_run(args)
    for name in found if folder else ():
        for old in (folder / f"{name}{ending}" for ending in endings):
            if old.exists():
                raise UserError(f"--output {folder}: {old} exists already; name another folder")
    folder = run.make_run(args, folder)
    faceless, unread = [], []
    for name, path in tqdm(found.items(), "predict"):
        try:
            photo = Photo(path, folder / name)
        except (UserError, OSError) as error:
            tqdm.write(str(error))
            unread.append(path)
            continue
        photo.stem.parent.mkdir(parents=True, exist_ok=True)
        yield photo
        if not photo.faces:
            faceless.append(path)
    done = len(found) - len(faceless) - len(unread)
    print(f"{done} of {len(found)} images have results in {folder}")
    if faceless:
        print(f"no face found in {len(faceless)}, as {faceless[0]}: try --box or --detector")
    if unread:
        raise UserError(f"{len(unread)} images could not be read, the first is {unread[0]}")


def find_margins(args, looks: int) -> list[float]:
    """The margin of each look at a face, the first about a box of `find_boxes`."""
    margins = [args.margin] * looks
    if not args.detector and args.box in args.boxes:
        print("note: each picture is taken for one face that fills it; give --detector or --box")
        margins[0] = 1.0  # the whole image has its margin in it
    return margins


def predict_landmarks(args, answer: Callable, passes: int = 2):
    """--predict of a network that finds landmarks in the crop about a box: NAME.pts for each face,
    and NAME.png, the image with the points drawn.

    Args: answer(batch, last) -> points (1, P, 2) px of the crop; passes: 2 for a network that was
        trained on crops about landmarks, which then looks again, in the box of its first answer;
        `last` says whether the answer is the last.
    """
    detector = open_detector(args.detector) if args.detector else None
    margins = find_margins(args, passes)
    for photo in photos(args, (".pts", ".png")):
        picture = photo.image.copy()
        for box in find_boxes(args, photo.image, detector):
            points = find_points(args, photo.image, box, margins, answer)
            if points is not None:
                datasets.write_pts(photo.target() + ".pts", points)
                draw_points(picture, points, GREEN, max(1.0, np.ptp(points, 0).max() / 120))
        datasets.write_image(f"{photo.stem}.png", picture)


def find_points(args, image: np.ndarray, box: np.ndarray, margins: Sequence[float],
                answer: Callable) -> np.ndarray | None:
    """Landmarks (P, 2) px of the face in `box` (4,), or None; each further margin is about those
    found before."""
    for look, margin in enumerate(margins, 1):
        matrix = torch.from_numpy(datasets.square_crops(box[None], args.size, margin))
        data = datasets.CropDataset([datasets.Face(image)], matrix, args.size)
        points = answer(data.__getitems__([(0, 0)]), look == len(margins)).double()
        points = warp.apply_affine(warp.invert(matrix), points)[0].numpy()
        box = datasets.landmark_boxes(points)
        if not np.ptp(points, 0).max() > 1:  # one place, or not finite
            return None
    return points


# ---- Drawing -------------------------------------------------------------------------------------

def draw_points(image: np.ndarray, points, colour, radius: float) -> np.ndarray:
    """Draws points (N, 2) px on RGB uint8 (H, W, 3), in place, at sub-pixel places."""
    sixteenths = np.round(16 * np.asarray(points, np.float64)).astype(int)
    for x, y in sixteenths.tolist():
        cv2.circle(image, (x, y), max(round(16 * radius), 8), colour, -1, cv2.LINE_AA, 4)
    return image


def tile(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of one size in rows of `columns`, white where one is missing."""
    tiles = [*tiles, *[np.full_like(tiles[0], 255)] * (-len(tiles) % columns)]
    rows = [np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices of `count` things, evenly over all of them."""
    return np.linspace(0, count - 1, min(wanted, count)).astype(int).tolist()


def draw_crop(data: datasets.CropDataset, i: int, side: int, *layers) -> np.ndarray:
    """Crop i at `side` px with layers drawn: (points (P, 2) image px, colour) each."""
    picture = cv2.resize(data.__getitems__([(0, i)])["image"][0].numpy(), (side, side))
    for points, colour in layers:
        points = warp.apply_affine(data.crop_matrices[i], torch.as_tensor(points).double())
        draw_points(picture, (points + 0.5) * side / data.size - 0.5, colour, side / 160)
    return picture


def draw_predictions(data: datasets.CropDataset, points: torch.Tensor, side=192) -> np.ndarray:
    """24 crops over the whole set, the truth in green, predictions (M, P, 2) image px in red."""
    return tile([draw_crop(data, i, side, (data.points[i], GREEN), (points[i], RED))
                 for i in spread(len(data), 24)], 6)
