"""What tests/claims.py needs beyond a run's own numbers, measured from its checkpoint.

    python -m tests.measures sdfl runs/sdfl-faces/last.pt       # the scores, as a line of JSON
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

import heatmap_landmarks
import kprpe
import lddmm_face
import sdfl
from common import datasets, metrics, run, warp


def ordered_loader(args, data, device: torch.device):
    """A loader of a test set, in order."""
    return run.make_loader(args, data, datasets.in_order(len(data), 64), device)


def hide(batch: dict, share: float, size: int) -> tuple[dict, torch.Tensor]:
    """A batch with a grey square over `share` of each crop's area, about one of the face's
    landmarks, for every network the same; and which landmarks it leaves visible, (B, P) bool."""
    image = batch["image"]
    if image.dtype == torch.uint8:
        image = image.permute(0, 3, 1, 2).float()
    points = batch["points"].to(image.device)
    index = batch["index"]
    centre = points[torch.arange(len(index)), (7 * index) % points.shape[1]]
    half = math.sqrt(share) * size / 2
    grey = centre.new_full((len(centre), 3), 127)
    image = sdfl.occlude(image, torch.cat([centre - half, centre + half, grey], 1))
    return batch | {"image": image}, (points - centre[:, None]).abs().amax(2) > half


def occluder_test(net, loader, args, shares=(0.05, 0.1, 0.2, 0.3, 0.4)) -> dict:
    """SDFL's Fig. 2: how far predictions of visible points move when `shares` of a crop are hidden.
    Returns: {"moved@0.2": ..., ...}, means over visible points, as fractions of d in Eq. (12)."""
    net.eval()
    device = net.mask.device
    divisors = loader.dataset.divisors(args.norm)
    moved = dict.fromkeys(shares, 0.0)
    count = dict.fromkeys(shares, 0.0)
    for batch in loader:
        zoom = batch["matrix"][:, 0, :2].norm(dim=1)
        d = (zoom * divisors[batch["index"]].float())[:, None]  # in px of the crop
        clean = sdfl.predict_points(net, sdfl.prepare(batch, device)).cpu()
        for share in shares:
            hidden, visible = hide(batch, share, args.size)
            found = sdfl.predict_points(net, sdfl.prepare(hidden, device)).cpu()
            visible = visible.cpu()
            moved[share] += float(((found - clean).norm(dim=2) / d)[visible].sum())
            count[share] += int(visible.sum())
    return {f"moved@{share}": moved[share] / max(count[share], 1) for share in shares}


def measure_sdfl(path: str, also) -> dict:
    """Fig. 2, of a checkpoint."""
    args = sdfl.parse_args(["--eval", path])
    net, _ = sdfl.open_checkpoint(args, path)
    data = sdfl.make_dataset(args, "test")
    return occluder_test(net, ordered_loader(args, data, net.mask.device), args)


def rough_boxes(data: datasets.CropDataset) -> datasets.CropDataset:
    """The crops as by a rough detector: turned by up to 10 degrees, zoomed by 10 %, shifted by 5 %
    of the side; always the same for an image's place."""
    ranges = dict(rotate=10, scale=0.1, shift=0.05 * 192)
    moves = [heatmap_landmarks.augment(np.random.default_rng((9, i)), data.size, **ranges)[0]
             for i in range(len(data))]
    matrices = warp.compose(torch.from_numpy(np.stack(moves)), data.crop_matrices)
    return datasets.CropDataset(data.faces, matrices, data.size)


def measure_heatmaps(path: str, also) -> dict:
    """NME and AUC of each decoder, "nme@dark", ..., and of each flip test, "auc@flip none", ...; of
    networks that know a box, the NME from rough boxes, "nme@rough", after the first of two passes
    "nme@rough@first"."""
    args = heatmap_landmarks.parse_args(["--eval", path])
    net = heatmap_landmarks.open_checkpoint(args, path)
    faces = heatmap_landmarks.read_faces(args, "test")
    data = heatmap_landmarks.make_dataset(args, faces, augmented=False)
    loader = ordered_loader(args, data, net.head.weight.device)
    ways = {name: dict(decode=name) for name in heatmap_landmarks.DECODERS}
    if net.points in datasets.SCHEMES:
        for kind in ("none", "coordinates", "heatmaps"):
            ways[f"flip {kind}"] = dict(flip_test=kind)
    scores = {}
    for name, flags in ways.items():
        way = argparse.Namespace(**vars(args) | flags)
        found = heatmap_landmarks.evaluate(net, loader, way)[0]
        scores[f"nme@{name}"] = found["nme"]
        scores[f"auc@{name}"] = found["auc"]
    if args.align != "five":
        loader = ordered_loader(args, rough_boxes(data), net.head.weight.device)
        found = heatmap_landmarks.evaluate(net, loader, args)[0]
        scores["nme@rough"] = found["nme"]
        scores["nme@rough@first"] = found.get("nme/first pass", found["nme"])
    return scores


class Hidden:
    """A loader whose crops have a fifth of their area hidden."""

    def __init__(self, loader):
        self.loader = loader
        self.dataset = loader.dataset

    def __iter__(self):
        for batch in self.loader:
            yield hide(batch, 0.2, self.dataset.size)[0]


def by_spline(net, trained: torch.Tensor, data) -> torch.Tensor:
    """All landmarks (M, P, 2) px of the images: the mean face, moved by the one thin-plate spline
    that moves its training landmarks to where they were found, `trained` (M, K, 2)."""
    once = [net.landmarks.index(i) for i in sorted(set(net.landmarks))]  # lips share their corners
    side = (data.size, data.size)
    mean = warp.to_norm(lddmm_face.from_frame(net.mean.cpu().double(), data.size), side)
    spline = warp.ThinPlateSpline(mean[[net.landmarks[k] for k in once]])
    found = warp.apply_affine(data.crop_matrices, trained[:, once])
    moved = spline.transform(spline.fit(warp.to_norm(found, side)), mean)
    return warp.apply_affine(warp.invert(data.crop_matrices), warp.to_px(moved, side))


def mean_curve_error(pred: torch.Tensor, data, args, pred_parts: dict | None = None) -> float:
    """NME_c of points (M, P, 2) px of a set's images, of parts of their own if they have some."""
    parts = datasets.SCHEMES[data.points.shape[1]].parts
    divisors = data.divisors(args.norm)
    errors = metrics.curve_error(pred, data.points, parts, divisors, pred_parts=pred_parts)
    return errors["overall"].mean().item()


def same_faces(own: list, others: list) -> list[int]:
    """Of each of `others` the row in `own` of its photograph, by the file's name; [] if one has
    none."""
    rows = {Path(str(face.image)).stem: row for row, face in enumerate(own)}  # a drawing has no path
    stems = [Path(str(face.image)).stem for face in others]
    return [rows[stem] for stem in stems] if rows.keys() >= set(stems) else []


def measure_lddmm(path: str, also) -> dict:
    """Of a checkpoint: "fr@hidden" with a fifth of each crop hidden; "nme@spline"; of the landmarks
    that were not learned "nme@unseen", "nme@unseen@interpolated" and "nme@unseen@spline";
    "curves@floor", of true training landmarks alone; and in other annotations, of the drawn faces
    or of the sets `also` [(data, root)], "curves@194", ..., with "curves@floor@194", of the same
    true landmarks, where the faces are drawn, or photographs of the same names."""
    args = lddmm_face.parse_args(["--eval", path])
    net, _ = lddmm_face.open_checkpoint(args, path)
    data = lddmm_face.make_dataset(args, "test")
    loader = ordered_loader(args, data, net.mean.device)
    hidden = lddmm_face.evaluate(net, Hidden(loader), args)[0]
    extra = lddmm_face.sparse_to_dense(net)
    flowed, trained, _ = lddmm_face.predict_set(net, loader, args, extra)
    splined = by_spline(net, trained, data)
    true = data.points[:, net.landmarks]
    true_parts = {part: [net.landmarks.index(i) for i in ids if i in net.landmarks]
                  for part, ids in datasets.SCHEMES[net.scheme].parts.items()}
    errors = metrics.nme(splined, data.points, data.divisors(args.norm))
    scores = {"nme@hidden": hidden["nme"], "fr@hidden": hidden["fr"],
              "nme@spline": errors.mean().item(),
              "curves@spline": mean_curve_error(splined, data, args),
              "curves@floor": mean_curve_error(true, data, args, true_parts)}
    unseen = sorted({*range(data.points.shape[1])} - {*net.landmarks})
    ways = {"nme@unseen": flowed, "nme@unseen@spline": splined,
            "nme@unseen@interpolated": lddmm_face.interpolated(net, trained, data)}
    for name, points in ways.items() if unseen else ():
        errors = metrics.nme(points[:, unseen], data.points[:, unseen], data.divisors(args.norm))
        scores[name] = errors.mean().item()
    others = [dict(data=name, data_root=root) for name, root in also]
    if args.data == "faces":  # the same faces, annotated otherwise
        others += [dict(points=points) for points in (68, 98, 194) if points != net.scheme]
    for flags in others:
        other = argparse.Namespace(**vars(args) | flags)
        theirs = lddmm_face.make_dataset(other, "test")
        points = theirs.points.shape[1]
        loader = ordered_loader(other, theirs, net.mean.device)
        extra = lddmm_face.extra_to_predict(net, other, points)
        found = lddmm_face.evaluate(net, loader, other, extra)[0]
        scores |= {f"{name}@{points}": value for name, value in found.items()}
        rows = same_faces(data.faces, theirs.faces) if "data" in flags else [*range(len(true))]
        if rows:
            scores[f"curves@floor@{points}"] = mean_curve_error(true[rows], theirs, other,
                                                                true_parts)
    return scores


def measure_kprpe(path: str, also) -> dict:
    """KP-RPE's Fig. 5: "accuracy@t0.25", ..., crops a quarter, half and three quarters aligned."""
    args = kprpe.parse_args(["--eval", path])
    net, head, device = kprpe.open_checkpoint(args, path)
    tests = kprpe.read_tests(args)
    if "" not in tests:
        return {}
    split, protocols = tests[""]
    scores = {}
    for t in (0.25, 0.5, 0.75):
        data = kprpe.make_crops(args, split, t)
        loader = kprpe.crop_loader(args, data, kprpe.shard_keys(len(data), 64), device, kept=False)
        condition = kprpe.TestCondition(data, loader, protocols, f"@t{t:g}")
        scores |= kprpe.evaluate(net, head["weight"], [condition], args, device)
    return scores


MEASURES = {"sdfl": measure_sdfl, "heatmap_landmarks": measure_heatmaps,
            "lddmm_face": measure_lddmm, "kprpe": measure_kprpe}


def hold_keypoints():
    """A control for kprpe.py: from now on every image has ArcFace's five points as its keypoints.
    Of f(P) the part of the query remains, nothing of the image."""
    own = kprpe.inputs

    def inputs(image, points, draw=False):
        points = kprpe.template(image.shape[-1]).to(points).expand_as(points)
        return own(image, points, draw)

    kprpe.inputs = inputs


def train_with_constant_keypoints():
    """kprpe.py by the flags of the command, with `hold_keypoints`, in one process."""
    hold_keypoints()
    run.main(kprpe.main, kprpe.parse_args())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("script", choices=MEASURES)
    parser.add_argument("checkpoint")
    parser.add_argument("--also", nargs=2, action="append", default=[], metavar=("DATA", "ROOT"),
                        help="lddmm_face: a set of another annotation")
    parser.add_argument("--constant-keypoints", action="store_true", help="kprpe: as in training")
    args = parser.parse_args(argv)
    if args.constant_keypoints:
        hold_keypoints()
    print(json.dumps(MEASURES[args.script](args.checkpoint, args.also)))


if __name__ == "__main__":
    main()
