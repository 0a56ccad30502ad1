"""stn_align.py: maps and their inverses, losses against loops, gradients, a joint training, whole runs."""
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stn_align as sa
from common import datasets, metrics, recognition, synthetic, warp
from tests import trees

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.* faces are frontal")
LEARNING = [method for method in sa.METHODS if method not in ("none", *sa.BY_LANDMARKS)]
ALIGNING = sa.METHODS[1:]


def same(a, b, tolerance=1e-6):
    a = torch.as_tensor(a)
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand(a.shape), rtol=0, atol=tolerance)


def template(points=68):
    """A drawn face, (points, 2) px of a 112 px crop: a quarter of the crop is free on each side."""
    shape = torch.from_numpy(synthetic.read_faces("train", 1, size=112, points=points)[0].points).double()
    low, high = shape.amin(0), shape.amax(0)
    return (28 + 56 * (shape - low) / (high - low).max()).float()


def landmarks(count=3, points=68, seed=0):
    """Faces about the template: turned, enlarged, moved, and none like another."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, 3, generator=generator) * torch.tensor([0.06, 0.06, 3.0])
    middle, shape = torch.tensor([55.5, 55.5]), template(points)
    moved = warp.apply_affine(torch.eye(2, 3) + noise, shape - middle) + middle
    return moved + 0.5 * torch.randn(count, points, 2, generator=generator)


def network(method="tps8", align_at="fmap", size=32, seed=0, points=68, **options):
    torch.manual_seed(seed)
    options = dict(depth=10, width=4, dropout=0.0, template=template(points) if points else None) | options
    return sa.AlignedRecognizer(method, align_at, size=size, **options).eval()


def moves(method, amount=5.0):
    """Outputs of LocNet: a smooth turn and wave of the lattice, up to some px; eight numbers of Proj."""
    if method == "proj":
        return torch.tensor([0.1, -0.07, 0.12, 0.05, -0.08, -0.06, 0.12, -0.08]) * 10 * amount
    axis = torch.linspace(-1, 1, int(method[3:]))
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    wave = torch.stack([torch.sin(2 * y) + 0.5 * x, torch.cos(1.5 * x) - 0.4 * y], -1)
    return amount * wave.flatten()


def set_moves(net, amount=5.0, spread=0.0):
    """Makes LocNet say `moves`, and for each image a little else."""
    with torch.no_grad():
        net.locnet.fc.bias.copy_(moves(net.method, amount))
        net.locnet.fc.weight.normal_(std=spread) if spread else None
    return net


def images(count=3, size=32, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def centres(size):
    """Pixels of a crop of `size` x `size`, (size^2, 2) px of a 112 px crop."""
    return sa.to_frame(warp.pixel_centres((size, size)), size)


def aligning(method, size=32, **options):
    """A network that moves faces, its input and landmarks (None where it needs none)."""
    net = network(method, size=size, **options)
    if net.locnet is not None:
        set_moves(net)
    return net, images(size=size), landmarks() if method in sa.BY_LANDMARKS else None


# ---- Networks ------------------------------------------------------------------------------------

def count(module, trained=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def test_published_sizes():
    with torch.device("meta"):
        small, large, loc = sa.IRNet(), sa.IRNet(100), sa.LocNet(128)
    assert (count(small), count(small, True)) == (34_139_328, 34_138_816)
    assert count(large) == 65_156_160 and count(loc) == 727_112
    assert not small.features.weight.requires_grad and small.features.bias.requires_grad
    assert sa.LocNet(128)(torch.zeros(1, 3, 112, 112)).shape == (1, 128)
    assert network(size=112)(torch.zeros(1, 3, 112, 112)).shape == (1, 512)


def test_names_of_the_recognition_network_are_those_of_insightface():
    with torch.device("meta"):
        names = {name for name in sa.IRNet(18).state_dict() if "running" not in name and "num" not in name}
    norm = lambda name: {f"{name}.weight", f"{name}.bias"}
    wanted = {"conv1.weight", "prelu.weight", "fc.weight", "fc.bias"} | norm("bn1") | norm("bn2") | \
        norm("features")
    for stage in range(1, 5):
        for block in range(2):
            base = f"layer{stage}.{block}."
            wanted |= {base + "conv1.weight", base + "conv2.weight", base + "prelu.weight"}
            wanted |= norm(base + "bn1") | norm(base + "bn2") | norm(base + "bn3")
        wanted |= {f"layer{stage}.0.downsample.0.weight"} | norm(f"layer{stage}.0.downsample.1")
    assert names == wanted


def test_stages_shrink_by_two_and_the_first_keeps_its_resolution():
    net = sa.IRNet(34, width=4, size=32).eval()
    x, shapes = net.stem(images()), []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        shapes.append((len(stage), *x.shape[1:]))
    assert shapes == [(3, 4, 16, 16), (4, 8, 8, 8), (6, 16, 4, 4), (3, 32, 2, 2)]
    block = net.layer1[0]  # the improved residual unit, spelt out
    x = net.stem(images())
    y = block.bn3(block.conv2(block.prelu(block.bn2(block.conv1(block.bn1(x))))))
    assert block.conv1.stride == (1, 1) and block.conv2.stride == (2, 2)
    same(block(x), y + block.downsample(x[:, :, ::2, ::2]), 1e-6)


@pytest.mark.parametrize("make", [lambda: sa.IRNet(10, 4, 32), lambda: sa.LocNet(8, 32), network])
def test_no_strided_1x1_convolution_is_reachable(make):
    """oneDNN writes past its buffer in the backward of one on a channels_last map of few channels."""
    for module in make().modules():
        if isinstance(module, nn.Conv2d):
            assert module.kernel_size != (1, 1) or module.stride == (1, 1)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_any_layout_trains(layout):
    learner = sa.Learner(network().train(), 2, 3.0).to(memory_format=layout)
    batch = {"image": torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8), "points": landmarks(2) / 3.5}
    image, points = sa.prepare(batch, CPU)
    assert image.is_contiguous(memory_format=torch.channels_last) and image.min() >= -1 and image.max() <= 1
    learner(image.contiguous(memory_format=layout), torch.tensor([0, 1]), points)[0].backward()
    assert all(p.grad.isfinite().all() for p in learner.parameters() if p.requires_grad)


# ---- Maps: the contract of every method ----------------------------------------------------------

@pytest.mark.parametrize("size", [112, 64, 48])
@pytest.mark.parametrize("method", [*LEARNING, "none"])
def test_the_start_is_the_identity(method, size):
    net, image = network(method, size=size), images(2, size)
    w = net.fit(image)
    still = warp.to_norm(warp.pixel_centres((size, size)), (size, size)).view(size, size, 2)
    same(net.grid(image), still, 1e-6)
    same(net.align(image, w), image, 5e-5)
    points = landmarks(2)
    for to in ("input", "aligned"):
        moved, converged = net.map_points(points, image, to)
        same(moved, points, 1e-4)
        assert converged.all() and converged.shape == (2, 68)


@pytest.mark.parametrize("method", LEARNING)
def test_image_and_feature_map_are_the_same_place_at_the_identity(method):
    nets = [network(method, at) for at in ("input", "fmap")]
    nets[1].load_state_dict(nets[0].state_dict())
    one, two = (net(images()) for net in nets)
    same(one, two, 1e-4)
    set_moves(nets[0])
    nets[1].load_state_dict(nets[0].state_dict())
    assert (nets[0](images()) - nets[1](images())).abs().max() > 1e-2  # and only there


@pytest.mark.parametrize("method", ALIGNING)
def test_input_and_aligned_are_inverse(method):
    net, image, own = aligning(method)
    points = landmarks(seed=1) if method != "fullalign" else template() + torch.randn(3, 68, 2) * 0.01
    for first, second in (("input", "aligned"), ("aligned", "input")):
        if method == "fullalign" and first == "aligned":
            points = own  # where it folds, no other point has one inverse
        there, converged = net.map_points(points, image, first, own)
        assert converged.all() and (there - points).norm(dim=-1).mean() > 1
        back, converged = net.map_points(there, image, second, own)
        assert converged.all()
        same(back, points, 2e-3 if method != "fullalign" else 0.1)


@pytest.mark.parametrize("size", [112, 48])
@pytest.mark.parametrize("method", ALIGNING)
def test_an_image_of_its_own_coordinates_becomes_the_map(method, size):
    """Finds a mistake in the order of x and y, or half a pixel."""
    net, image, own = aligning(method, size)
    places = centres(size)
    ramp = places.T.reshape(1, 2, size, size).expand(3, -1, -1, -1)
    w = net.fit(image, own)
    seen = net.align(ramp, w).flatten(2).mT                                             # (3, size^2, 2)
    mapped, _ = net.map_points(places, image, "input", own)
    low, high = places.min(), places.max()
    inside = ((mapped > low) & (mapped < high)).all(-1)
    assert inside.float().mean() > 0.5
    same(seen[inside], mapped[inside], 1e-4 if size == 112 else 2e-4)
    same(net.grid(image, own), warp.to_norm(mapped, (112, 112)).view(3, size, size, 2), 1e-5)


@pytest.mark.parametrize("method", ALIGNING)
def test_a_blob_at_a_landmark_goes_where_the_point_goes(method):
    net, _, own = aligning(method, 112)
    if method == "fullalign":  # a smooth family: noise bends the spline within a blob's width
        own = warp.apply_affine(torch.tensor([[[1.1, 0.1, -8], [-0.1, 0.9, 9]]]), template())
        own = (own + 2 * torch.sin(own.flip(-1) / 15)).expand(3, -1, -1)
    places = own[0] if own is not None else landmarks(1)[0]
    x, y = centres(112).T.reshape(2, 112, 112)
    for place in places[[0, 16, 30, 48]]:
        blob = (-((x - place[0])**2 + (y - place[1])**2) / 8).exp()[None, None]
        w = net.fit(torch.zeros(1, 3, 112, 112), own[:1] if own is not None else None)
        weight = net.align(blob, w)[0, 0]
        weight = (weight - 0.1 * weight.max()).clamp_min(0)
        centre = torch.stack([(weight * x).sum(), (weight * y).sum()]) / weight.sum()
        mapped, converged = net.move(place[None], w, 1, "aligned")
        assert converged.all() and (mapped[0, 0] - place).norm() > 0.5
        assert (centre - mapped[0, 0]).norm() < 0.1


@pytest.mark.parametrize("method", ALIGNING)
def test_autocast_leaves_the_map_alone(method):
    net, image, own = aligning(method)
    with torch.autocast("cpu", torch.bfloat16):
        w, grid = net.fit(image, own), net.grid(image, own)
        there = net.map_points(template(), image, "input", own)[0]
        warped = net.align(image.bfloat16(), w)
    same(w, net.fit(image, own), 1e-3 if method == "fullalign" else 3e-5)
    same(grid, net.grid(image, own), 1e-4)
    same(there, net.map_points(template(), image, "input", own)[0], 1e-2 if net.locnet else 1e-4)
    assert warped.dtype == torch.bfloat16
    if method.startswith("tps"):  # W(c) = p, of what LocNet said
        c = warp.to_px(net.maps.spline.targets, (112, 112)).float()
        with torch.autocast("cpu", torch.bfloat16):
            same(net.maps.to_input(w, c), c + moves(method).view(-1, 2), 56e-4)


def test_splines_pass_through_lattice_and_landmarks():
    net, image, _ = aligning("tps8")
    assert net.maps.outputs == 128 and network("tps2").maps.outputs == 8 == network("proj").maps.outputs
    c = warp.to_px(net.maps.spline.targets, (112, 112)).float()
    same(c[[0, 7, 8, 63]], [[-0.5, -0.5], [111.5, -0.5], [-0.5, 15.5], [111.5, 111.5]], 1e-4)  # x runs first
    set_moves(net, spread=0.02)
    numbers = net.locnet(image)
    assert (numbers[0] - numbers[1]).abs().max() > 0.1
    same(net.map_points(c, image)[0], c + numbers.view(3, 64, 2), 1e-3)
    full, own = network("fullalign"), landmarks()
    same(full.map_points(full.template, image, "input", own)[0], own, 1e-3)


def test_gradients_are_finite_where_the_template_sits_on_the_lattice():
    net, image, _ = aligning("tps8")
    c = warp.to_px(net.maps.spline.targets, (112, 112)).float().requires_grad_()
    (net.map_points(c, image)[0] - landmarks()[:, :64]).norm(dim=-1).mean().backward()
    assert c.grad.isfinite().all() and c.grad.abs().max() > 0
    assert net.locnet.fc.bias.grad.isfinite().all()


def test_full_alignment_brings_every_landmark_to_the_template():
    net, own = network("fullalign"), landmarks(8)
    aligned, converged = net.map_points(own, images(8), "aligned", own)
    assert converged.all()
    same(aligned, net.template, 1e-3)
    assert anme(aligned) < 1e-4


def anme(points):
    pupils = datasets.group_means(points.double(), datasets.SCHEMES[points.shape[1]].pupils)
    return metrics.anme(points.double(), (pupils[:, 0] - pupils[:, 1]).norm(dim=1))


@pytest.mark.parametrize("points", [68, 98, 5])
def test_affine2d_is_least_squares_of_five_points(points):
    net, own = network("affine2d", points=points), landmarks(4, points)
    five = datasets.group_means(own, datasets.SCHEMES[points].five).double()
    goal = datasets.group_means(template(points), datasets.SCHEMES[points].five).double()
    aligned, converged = net.map_points(own, images(4), "aligned", own)
    assert converged.all()
    for i in range(4):
        rows = torch.cat([five[i], torch.ones(5, 1)], 1)
        m = torch.linalg.lstsq(rows, goal).solution                                               # (3, 2)
        same(aligned[i].double(), torch.cat([own[i].double(), torch.ones(points, 1)], 1) @ m, 1e-3)


def test_the_homography_by_its_eight_numbers():
    net = network("proj")
    numbers = moves("proj")[None].repeat(3, 1)
    points = landmarks()
    x, y = warp.to_norm(points, (112, 112)).unbind(-1)
    h = (numbers[0] / 56).tolist()
    h7, h8 = (0.45 * math.tanh(value / 0.45) for value in h[6:])
    divisor = h7 * x + h8 * y + 1
    wanted = torch.stack([((1 + h[0]) * x + h[1] * y + h[2]) / divisor,
                          (h[3] * x + (1 + h[4]) * y + h[5]) / divisor], -1)
    same(net.maps.to_input(net.maps.fit(numbers), points), warp.to_px(wanted, (112, 112)), 1e-3)
    wild = net.maps.fit(torch.tensor([[0.0] * 6 + [1e4, -1e4]]))
    assert net.maps.grid(wild, 32).isfinite().all()  # the divisor stays positive all over the crop
    corners = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]])
    assert (wild[0, 2] @ corners.T).min() > 0.09


def test_an_affine_family_is_aligned_perfectly():
    """Landmarks that are affine maps of T: with the same maps of the lattice W(T) = x, y = T, ANME = 0."""
    net, generator = network("tps8"), torch.Generator().manual_seed(0)
    m = torch.eye(2, 3) + torch.randn(6, 2, 3, generator=generator) * torch.tensor([0.1, 0.1, 4])
    own = warp.apply_affine(m, net.template.detach())
    c = warp.to_px(net.maps.spline.targets, (112, 112)).float()
    w = net.maps.fit((warp.apply_affine(m, c) - c).flatten(1))
    same(w[:, :64], 0.0, 1e-5)  # no bend
    l_lmk, _ = sa.alignment_loss(net.maps.to_input(w, net.template), own, torch.ones(68))
    assert l_lmk < 1e-4 and anme(own) > 0.01
    aligned, converged = net.move(own, w, 6, "aligned")
    same(aligned, net.template, 1e-3)
    assert converged.all() and anme(aligned) < 1e-5


def test_frames_of_other_sizes():
    points = landmarks()
    same(sa.from_frame(sa.to_frame(points, 64), 64), points, 1e-4)
    same(sa.to_frame(torch.tensor([[-0.5, 63.5]]), 64), [[-0.5, 111.5]])  # edges are edges
    for method in ALIGNING:  # what LocNet says is px of a 112 px crop, whatever the network's size is
        small, large = (aligning(method, size) for size in (64, 112))
        for to in ("input", "aligned"):
            one, two = (net.map_points(landmarks(), image, to, own)[0] for net, image, own in (small, large))
            same(one, two, 1e-4)


def test_a_fold_is_counted():
    net, image, _ = aligning("tps8")
    assert sa.folded(net.grid(image)).tolist() == [False] * 3
    numbers = moves("tps8")[None].repeat(3, 1).view(3, 64, 2)
    numbers[1, 27, 0] += 60  # over its neighbour
    grid = net.maps.grid(net.maps.fit(numbers.flatten(1)), 32)
    assert sa.folded(grid).tolist() == [False, True, False]
    assert sa.folded(grid.flip(2)).tolist() == [True] * 3  # a mirror turns over everywhere
    seen = {"folded": sa.folded(grid)}
    assert sa.alignment_scores(seen, net)["folded"] == pytest.approx(1 / 3)


def test_points_that_do_not_converge_are_told():
    net, image, _ = aligning("tps8")
    far = torch.full((3, 68, 2), 3e5)
    moved, converged = net.map_points(far, image, "aligned")
    assert moved.isfinite().all() and not converged.all()
    back = net.map_points(moved, image)[0]
    assert torch.equal(converged, (back - far).norm(dim=-1) < 0.05)


def test_a_nan_of_locnet_is_named_before_it_is_sampled():
    net, image, _ = aligning("tps8")
    image[1, 0, 3, 3] = math.nan
    for call in (net, net.grid, lambda image: net.map_points(template(), image)):
        with pytest.raises(FloatingPointError, match="LocNet gives nan or inf for image 1 of a batch"):
            call(image)
    with pytest.raises(FloatingPointError, match="LocNet gives nan or inf.*a lower --lr"):
        sa.Learner(net.train(), 2, 3.0)(image, torch.tensor([0, 1, 0]), landmarks())


@pytest.mark.parametrize("call, message", [
    (lambda: network("tps9"), "method 'tps9', align_at 'fmap': expected one of"),
    (lambda: network(align_at="stem"), "align_at 'stem'"),
    (lambda: network("affine2d", points=0), "--method affine2d needs landmarks.*see --landmarks"),
    (lambda: network("fullalign", points=0), "--method fullalign needs landmarks"),
    (lambda: network("fullalign")(images()), "method fullalign needs the 68 landmarks of every image"),
    (lambda: network("affine2d").map_points(template(), images()), "method affine2d needs the 68 landmarks"),
    (lambda: network("fullalign")(images(), landmarks(points=5)), "68 landmarks.*found 5"),
    (lambda: network("affine2d", template=template()[:12]), "affine2d takes five points of a scheme.*12"),
    (lambda: network("fullalign", template=template()[[0, 1, 2, 2, 30]]), "both at"),
    (lambda: network().map_points(template(), images(), "output"), "to='output': expected 'input' or"),
    (lambda: sa.AMSoftmax(512, 1), "1 identities: recognition is learned from two or more")])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_affine2d_names_landmarks_of_another_number():
    """As --eval AFFINE2D --points 29 has them."""
    with pytest.raises(ValueError, match="68"):
        network("affine2d")(images(), landmarks(points=29))


# ---- Losses --------------------------------------------------------------------------------------

def test_alignment_loss_is_equations_3_and_4():
    warped, own = landmarks(4, 29), landmarks(4, 29, seed=1)
    alpha = torch.rand(29, generator=torch.Generator().manual_seed(0))
    l_lmk, l_reg = sa.alignment_loss(warped, own, alpha)
    total = sum(float(alpha[s]) * math.hypot(*(warped[i, s] - own[i, s]).tolist())
                for i in range(4) for s in range(29))
    assert l_lmk.item() == pytest.approx(total / (4 * 29), rel=1e-5)
    assert l_reg.item() == pytest.approx(sum((1 - float(a))**2 for a in alpha), rel=1e-5)  # a sum, no mean
    assert sa.alignment_loss(own, own, torch.ones(29)) == (0, 0)


def test_alignment_loss_has_a_finite_gradient_where_both_agree():
    own = landmarks().requires_grad_()
    sum(sa.alignment_loss(own, own.detach().clone(), torch.full((68,), 0.5))).backward()
    assert own.grad.isfinite().all()


def test_the_best_weight_is_that_of_the_closed_form():
    """With distances D frozen, alpha goes to 1 - D / (2 |S|)."""
    D = torch.linspace(0.5, 40, 68)
    own = landmarks(2)
    logit = torch.zeros(68, requires_grad=True)
    optimizer = torch.optim.SGD([logit], 20.0)
    for _ in range(600):
        optimizer.zero_grad()
        sum(sa.alignment_loss(own + torch.stack([0.6 * D, 0.8 * D], 1), own, logit.sigmoid())).backward()
        optimizer.step()
    same(logit.sigmoid().detach(), 1 - D / (2 * 68), 0.01)


@pytest.mark.parametrize("m, s", [(0.35, 64.0), (0.0, 1.0)])
def test_am_softmax_against_a_loop(m, s):
    torch.manual_seed(0)
    head = sa.AMSoftmax(16, 7, m, s)
    x, labels, total = torch.randn(5, 16), torch.tensor([0, 6, 3, 3, 1]), 0.0
    for f, y in zip(x.double(), labels.tolist()):
        cosines = [float(f @ w / f.norm() / w.norm()) for w in head.weight.detach().double()]
        logits = [s * (c - m * (k == y)) for k, c in enumerate(cosines)]
        total += math.log(sum(math.exp(z - logits[y]) for z in logits))
    assert head(x, labels).item() == pytest.approx(total / 5, rel=1e-5)
    assert head(9 * x, labels).item() == pytest.approx(total / 5, rel=1e-5)  # lengths do not count
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x, labels).item() == pytest.approx(total / 5, rel=1e-5)
    assert (sa.AMSoftmax(512, 9).m, sa.AMSoftmax(512, 9).s) == (0.35, 64)


def learner(method="tps8", lam=3.0, seed=0, **options):
    net = network(method, seed=seed, **options)
    return sa.Learner(net, 3, lam).train()


@pytest.mark.parametrize("lam", [0.0, 0.5, 3.0])
def test_loss_is_equations_2_and_5(lam):
    model = learner(lam=lam).eval()
    set_moves(model.net, spread=0.01)
    with torch.no_grad():
        model.net.alpha_logit.copy_(torch.linspace(-2, 2, 68))
    own, labels = landmarks(), torch.tensor([0, 1, 2])
    loss, l_fr, l_lmk, l_reg = model(images(), labels, own).tolist()
    assert l_fr == pytest.approx(model.head(model.net(images()), labels).item(), rel=1e-5)
    assert loss == pytest.approx(l_fr + lam * (l_lmk + l_reg), rel=1e-5)
    with torch.no_grad():
        warped = model.net.map_points(model.net.template, images())[0]
        terms = sa.alignment_loss(warped, own, model.net.alpha())
    assert (l_lmk, l_reg) == pytest.approx([float(term) for term in terms] if lam else (0, 0), rel=1e-4)


def gradients(model):
    model.zero_grad()
    model(images(), torch.tensor([0, 1, 2]), landmarks())[0].backward()
    return {name: 0.0 if p.grad is None else p.grad.abs().max().item()
            for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", LEARNING)
@pytest.mark.parametrize("lam", [0.0, 3.0])
def test_the_first_step_moves_the_last_layer_of_locnet_and_the_second_its_trunk(method, lam):
    model = learner(method, lam)
    grads = gradients(model)
    trunk = [name for name in grads if name.startswith("net.locnet.") and ".fc." not in name]
    assert trunk and all(grads[name] == 0 for name in trunk)
    assert grads["net.locnet.fc.weight"] > 0 and grads["net.locnet.fc.bias"] > 0
    torch.optim.SGD(model.parameters(), 1e-3).step()
    grads = gradients(model)
    assert all(grads[name] > 0 for name in trunk)


@pytest.mark.parametrize("align_at", ["input", "fmap"])
@pytest.mark.parametrize("method", sa.METHODS)
@pytest.mark.parametrize("lam", [0.0, 3.0])
def test_every_trained_parameter_has_a_gradient_and_no_other(method, align_at, lam):
    """DistributedDataParallel waits for the gradients of all that is trained; L_fr alone reaches no T."""
    lam = lam if method in LEARNING else 0.0
    learns = lam > 0
    model = learner(method, lam, align_at=align_at, learn_template=learns, learn_alpha=learns)
    if model.net.locnet is not None:
        set_moves(model.net, spread=0.01)
    grads = gradients(model)
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None), name
        # The bias in front of the last batch norm is the one whose gradient is only rounding.
        assert not p.requires_grad or name == "net.net.fc.bias" or grads[name] > 0, name
    assert model.net.template.requires_grad == model.net.alpha_logit.requires_grad == learns


def test_fixed_template_and_weights():
    net = network(learn_template=False, learn_alpha=False)
    assert not net.template.requires_grad and torch.equal(net.alpha(), torch.ones(68))
    assert torch.equal(network().alpha(), torch.full((68,), 0.5)) and network().template.requires_grad
    fixed = learner(learn_alpha=False)
    assert fixed(images(), torch.tensor([0, 1, 2]), landmarks())[3] == 0  # L_reg
    for method in ("none", *sa.BY_LANDMARKS):  # nothing reaches T there
        assert not network(method).template.requires_grad
    bare = network(points=0)
    assert bare.template is None and bare(images()).shape == (3, 512)
    moved, converged = set_moves(bare).map_points(landmarks(1)[0], images(), "aligned")
    assert converged.all() and moved.shape == (3, 68, 2)


# ---- Training ------------------------------------------------------------------------------------

SLIM = ["--data", "faces", "--size", "32", "--width", "4", "--depth", "10", "--device", "cpu"]
SHORT = [*SLIM, "--limit", "40", "--batch-size", "20", "--epochs", "1", "--warmup", "0", "--lr", "0.02"]


def drawn_args(*flags):
    return sa.parse_args([*SHORT, *flags])


def start(args, rank=1):
    """Training set, learner and optimizer of a run that begins."""
    train_images, data = sa.load_sets(args, rank)
    return train_images, data, *sa.make_learner(args, data, train_images, None, CPU, rank)


def test_learning_rates_of_the_paper():
    args, rates = sa.parse_args(["--data", "vggface2"]), {}
    for per_epoch in (7, 12300):
        for epoch in (1, 12, 13, 17, 18, 22, 23, 24):
            for step in ((epoch - 1) * per_epoch, epoch * per_epoch - 1):
                rates.setdefault(epoch, set()).add(round(sa.learning_rate(
                    step, 24 * per_epoch, args.lr, 0, sa.listed(args.drop_at)), 9))
    assert rates == {1: {0.2}, 12: {0.2}, 13: {0.02}, 17: {0.02}, 18: {0.002}, 22: {0.002}, 23: {0.0002},
                     24: {0.0002}}
    rise = [sa.learning_rate(step, 10**6, 0.2, 500, []) for step in (0, 249, 499, 500, 9999)]
    assert rise == pytest.approx([0.0004, 0.1, 0.2, 0.2, 0.2])


def test_template_and_weights_are_outside_weight_decay_and_locnet_has_its_own_rate():
    args = drawn_args("--loc-lr", "0.25", "--weight-decay", "0.01")
    *_, model, optimizer, _ = start(args)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [({names[id(p)] for p in group["params"]}, group["weight_decay"], group["scale"])
              for group in optimizer.param_groups]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set.union(*(group[0] for group in groups)) == trained
    assert sum(len(group[0]) for group in groups) == len(trained)
    for found, decay, scale in groups:
        own, loc = found & {"net.template", "net.alpha_logit"}, {n for n in found if n[:11] == "net.locnet."}
        assert own in (set(), found) and loc in (set(), found)
        assert (decay, scale) == ((0, 1) if own else (0.01, 0.25) if loc else (0.01, 1))
    assert "head.weight" in trained and optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("flags, template_learns, alpha_learns", [
    ("", True, True), ("--lam 0", False, False), ("--template fixed", False, True),
    ("--alpha fixed", True, False), ("--method proj --lam 0.1", True, True),
    ("--method affine2d", False, False)])
def test_flags_say_what_is_learned(flags, template_learns, alpha_learns):
    net = sa.build(drawn_args(*flags.split()), template(), CPU)
    assert (net.template.requires_grad, net.alpha_logit.requires_grad) == (template_learns, alpha_learns)


@pytest.fixture(scope="module")
def joint():
    """100 steps of the joint training on drawn faces: lambda -> distances of W(T) on the way, scores."""
    def go(lam, steps=100, scale=1.0):
        args = drawn_args("--lam", str(lam), "--limit", "120", "--loc-lr", "0.1", "--lr", "0.1")
        train_images, data, model, optimizer, _ = start(args)
        model.net.locnet.register_forward_hook(lambda _, inputs, output: scale * output)
        data.regions.keep("device", verbose=False)
        labels, generator, distances = torch.as_tensor(train_images.labels), np.random.default_rng(0), []
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * sa.learning_rate(step, steps, args.lr, 20, [])
            chosen = generator.integers(0, len(data), 12).tolist()
            image, points = sa.prepare(data.__getitems__([(step, i) for i in chosen]), CPU)
            loss = model(image, labels[chosen], points)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                if step % 10 == 9:
                    moved = model.net.map_points(model.net.template, image)[0]
                    distances.append((moved - points).norm(dim=-1).mean().item())
        args.limit = 60
        scores = sa.evaluate(model.net, sa.test_sets(args, CPU), args) if steps == 100 else {}
        return distances, scores
    return go(0), go(3), go(0, 10, 56.0)


def test_a_joint_training_in_px_stays_bounded_and_lambda_aligns(joint):
    (free, free_scores), (drawn, drawn_scores), (normalised, _) = joint
    assert max(free + drawn) < 30
    assert sum(drawn[5:]) < 0.85 * sum(free[5:])
    assert drawn_scores["distance"] < 0.9 * free_scores["distance"]
    share = lambda scores: scores["anme"] / scores["anme/crops"]  # of the faces that could be mapped
    assert share(drawn_scores) < 0.9 < share(free_scores)
    assert normalised[-1] > 1000  # where LocNet speaks of normalised coordinates, in as many px
    # The weights go to 1 - D / (2 |S|), so they stay near 1 (Fig. 8(b) has 0.1 to 0.6).
    assert 0.9 < drawn_scores["alpha/min"] < drawn_scores["alpha/max"] < 1


# ---- Data ----------------------------------------------------------------------------------------

def test_the_template_is_the_mean_of_frontal_faces():
    frontal = template() + torch.randn(12, 68, 2, generator=torch.Generator().manual_seed(0))
    turned = template().repeat(30, 1, 1)
    turned[:, 30, 0] += 15.0  # the nose near an eye
    both = torch.cat([turned, frontal])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(sa.mean_frontal_template(both), frontal.mean(0), 1e-4)
        for share, counts in ((0.39, True), (0.61, True), (0.37, False), (0.63, False)):
            faces = frontal[:1].repeat(20, 1, 1)
            five = datasets.group_means(faces[0], datasets.SCHEMES[68].five)[:, 0]
            faces[10:, 30, 0] = five[0] + share * (five[1] - five[0])
            faces[:10, 30, 0] = five[0] + 0.5 * (five[1] - five[0])
            same(sa.mean_frontal_template(faces), faces.mean(0) if counts else faces[0], 1e-3)
    with pytest.warns(UserWarning, match="9 of 39 faces are frontal: T is the mean of all"):
        same(sa.mean_frontal_template(both[:39]), both[:39].mean(0), 1e-4)
    with pytest.raises(ValueError, match=r"84 landmarks are no known scheme.*--template-file, or.*--lam 0"):
        sa.mean_frontal_template(torch.rand(20, 84, 2))


def test_augmentation_stays_within_what_it_says():
    rng, still = np.random.default_rng(0), 0
    for _ in range(200):
        matrix, mirror, extras = sa.augment(rng, 64, 20, 0.1, 7)
        zoom = math.sqrt(np.linalg.det(matrix[:, :2]))
        angle = math.degrees(math.atan2(matrix[0, 1], matrix[0, 0]))
        middle = matrix[:, :2] @ [31.5, 31.5] + matrix[:, 2] - 31.5
        assert abs(angle) <= 20 and 0.9 <= zoom <= 1.1 and np.abs(middle).max() <= 4 and extras == {}
        still += mirror
    assert 70 < still < 130
    same(sa.augment(rng, 64)[0], np.eye(2, 3))


def people(root, count=9, points=True, side=48):
    """Drawn faces of three people as PERSON/NAME.png, and .pts beside; returns their landmarks by name."""
    found = {}
    for i, face in enumerate(synthetic.read_faces("train", count, size=side, points=68)):
        name = f"n{i % 3}/{i}"
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), datasets.load_image(face.image)[..., ::-1])
        found[name] = face.points
        if points:
            datasets.write_pts(str(path.with_suffix(".pts")), face.points)
    return found


def put_landmarks(found, folder, skip=()):
    """Landmarks as a folder of .pts and as a CSV; returns their paths."""
    lines = []
    for name, points in found.items():
        if name not in skip:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            datasets.write_pts(str(folder / f"{name}.pts"), points)
            lines.append(",".join([f"{name}.png", *(f"{v:.6f}" for v in points.flatten().tolist())]))
    table = folder.with_suffix(".csv")
    header = ",".join(["image", *(f"{axis}{i}" for i in range(68) for axis in "xy")])
    table.write_text("\n".join([header, *lines]) + "\n")
    return str(folder), str(table)


def folder_args(root, *flags, data="folder"):
    return sa.parse_args(["--data", data, "--data-root", str(root), *SLIM[2:], *flags])


def test_folders_with_and_without_points(tmp_path):
    found = people(tmp_path / "with" / "train")
    split = sa.read_set(folder_args(tmp_path / "with"), "train")
    assert split.points.shape == (9, 68, 2) and split.images.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    same(torch.from_numpy(split.points[0]).float(), found["n0/0"], 1e-3)
    assert sa.read_set(folder_args(tmp_path / "with"), "test") is None
    assert len(sa.read_set(folder_args(tmp_path / "with", "--limit", "4"), "train").images) == 4
    people(tmp_path / "bare" / "train", points=False)
    for flags, message in (("", "lam 3"), ("--method fullalign", "method fullalign"),
                           ("--lam 0", "box landmarks"), ("--method none", "box landmarks")):
        with pytest.raises(ValueError, match=f"n0.0.png has no landmarks, which --{message} needs"):
            sa.read_set(folder_args(tmp_path / "bare", *flags.split()), "train")
    for flags in ("--lam 0", "--method none"):
        split = sa.read_set(folder_args(tmp_path / "bare", "--box", "image", "--cache", "", *flags.split()),
                            "train")
        assert split.points is None and len(split.faces) == 9
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sa.read_set(folder_args(tmp_path / "nowhere"), "train")
    (tmp_path / "with/train/n0/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="0.png"):
        sa.read_set(folder_args(tmp_path / "with"), "train")


def test_vggface2_with_landmarks_of_their_own(tmp_path):
    found = people(tmp_path / "set" / "train", points=False)
    found = {f"train/{name}": points for name, points in found.items()}
    for path in put_landmarks(found, tmp_path / "points"):
        split = sa.read_set(folder_args(tmp_path / "set", "--landmarks", path, data="vggface2"), "train")
        order = [f"train/n{i // 3}/{i // 3 + 3 * (i % 3)}" for i in range(9)]
        same(torch.from_numpy(split.points).float(), np.stack([found[name] for name in order]), 1e-3)
    with pytest.raises(ValueError, match="has no landmarks, which --lam 3 needs"):
        sa.read_set(folder_args(tmp_path / "set", data="vggface2"), "train")
    for path in put_landmarks(found, tmp_path / "fewer", ["train/n1/4"]):
        with pytest.raises(ValueError, match="4.png has no landmarks.*1 of 9 images"):
            sa.read_set(folder_args(tmp_path / "set", "--landmarks", path, data="vggface2"), "train")


def encoded(face):
    return cv2.imencode(".png", datasets.load_image(face.image)[..., ::-1])[1].tobytes()


def put_records(root, count=9):
    """train.rec and train.idx of drawn faces of three people; returns their landmarks by key."""
    faces = synthetic.read_faces("train", count, size=32, points=68)
    trees.put_records(root, [trees.payload(key % 3, encoded(face)) for key, face in enumerate(faces)])
    return {str(key): face.points for key, face in enumerate(faces)}


def test_records(tmp_path):
    found = put_records(tmp_path / "ms1m")
    args = folder_args(tmp_path / "ms1m", data="ms1m")
    with pytest.raises(ValueError, match="--lam 3 needs landmarks, and records have none: --landmarks"):
        sa.read_set(args, "train")
    args = folder_args(tmp_path / "ms1m", "--lam", "0", data="ms1m")
    assert sa.read_set(args, "train").points is None and sa.read_set(args, "test") is None
    for path in put_landmarks(found, tmp_path / "points"):
        args = folder_args(tmp_path / "ms1m", "--landmarks", path, data="ms1m")
        split = sa.read_set(args, "train")
        same(torch.from_numpy(split.points), np.stack(list(found.values())), 1e-3)
        batch = sa.make_dataset(args, split, False).__getitems__([(0, 4)])
        np.testing.assert_array_equal(batch["image"][0].numpy(), split.images[4])
        assert sa.first_template(args, sa.make_dataset(args, split, False)).shape == (68, 2)


@pytest.mark.parametrize("box", ["landmarks", "face"])
def test_records_have_no_boxes(tmp_path, box):
    points = put_landmarks(put_records(tmp_path), tmp_path / "points")[0]
    with pytest.raises((ValueError, SystemExit)):
        args = folder_args(tmp_path, "--landmarks", points, "--box", box, data="ms1m")
        sa.make_dataset(args, sa.read_set(args, "train"), False)


def test_landmarks_are_px_of_a_112_px_crop_in_batches_and_templates(tmp_path):
    args = drawn_args("--box", "landmarks")
    _, data = sa.load_sets(args, 1)
    plain = sa.make_dataset(args, sa.read_set(args, "train"), False)
    _, points = sa.prepare(plain.__getitems__([(0, i) for i in range(40)]), CPU)
    same(sa.frame_points(plain), points, 1e-3)
    assert 60 < (points.amax(1) - points.amin(1)).amax() < 112
    same(sa.first_template(args, data), sa.mean_frontal_template(points), 1e-3)
    people(tmp_path / "train")
    args = folder_args(tmp_path, "--box", "image", "--cache", "")
    whole = sa.make_dataset(args, sa.read_set(args, "train"), False)
    _, points = sa.prepare(whole.__getitems__([(0, i) for i in range(9)]), CPU)
    same(sa.frame_points(whole), points, 1e-3)
    same((points[0] + 0.5) * 48 / 112 - 0.5, whole.points[0], 1e-3)  # a whole image is the crop


def test_templates_that_cannot_serve_are_named(tmp_path):
    _, data = sa.load_sets(drawn_args(), 1)
    path = str(tmp_path / "t.pts")
    datasets.write_pts(path, template(29))
    with pytest.raises(ValueError, match=r"--template-file .*t.pts has 29 points, the landmarks .* are 68"):
        sa.first_template(drawn_args("--template-file", path), data)
    twice = template()
    twice[41] = twice[40]
    datasets.write_pts(path, twice)
    for method in ("tps8", "fullalign"):
        with pytest.raises(ValueError, match=r"template .*t.pts: .*40 and 41 are both at.*leave one out"):
            sa.first_template(drawn_args("--method", method, "--template-file", path), data)


def test_how_far_the_weights_are_from_their_optimum():
    net, D = network(), torch.linspace(1, 30, 68)
    with torch.no_grad():
        net.alpha_logit.copy_((1 - D / 136).logit())
        net.alpha_logit[3] = 0.0
    seen = {"distance": torch.stack([0.5 * D, 1.5 * D])}
    scores = sa.alignment_scores(seen, net)
    assert scores["alpha/gap"] == pytest.approx(1 - D[3].item() / 136 - 0.5, abs=1e-5)
    assert scores["distance"] == pytest.approx(15.5) and scores["alpha/min"] == pytest.approx(0.5)
    assert "alpha/gap" not in sa.alignment_scores(seen, network(learn_alpha=False))


# ---- Flags ---------------------------------------------------------------------------------------

def test_presets_are_flags_and_flags_beat_presets():
    for name, preset in sa.PRESETS.items():
        args = sa.parse_args(["--data", name])
        for key, value in preset.items():
            assert getattr(args, key) == value
        assert args.given == ["data"]
    args = sa.parse_args(["--data", "vggface2", "--epochs", "7", "--no-amp"])
    assert args.given == ["amp", "data", "epochs"] and args.epochs == 7
    assert (args.batch_size, args.lr, args.weight_decay, args.lam, args.depth, args.size, args.width) == \
        (256, 0.2, 5e-4, 3, 34, 112, 64)
    assert (args.method, args.align_at, args.template, args.alpha) == ("tps8", "fmap", "learned", "learned")
    assert sa.parse_args(["--data", "ms1m"]).depth == 100 and sa.parse_args([]).data == "faces"


def test_bad_flags_are_named(capsys):
    least = {"epochs": 1, "batch-size": 2, "gpus": 1, "limit": 0, "seed": 0, "eval-every": 1, "width": 1,
             "warmup": 0, "weight-decay": 0, "workers": -1, "rotate": 0, "shift": 0}
    cases = [(f"--{name} {value - 1}", f"expected at least {value}") for name, value in least.items()]
    for name in ("lr", "loc-lr", "margin"):
        cases += [(f"--{name} {value}", f"--{name} {value}: expected more than 0")
                  for value in ("0.0", "nan", "inf")]
    for flags, message in [
            *cases, ("--size 100", "--size 100: expected a multiple of 16"), ("--size 0", "a multiple of 16"),
            ("--lam -1", "--lam -1.0: expected at least 0"), ("--lam nan", "expected at least 0"),
            ("--scale 1", "--scale 1.0: expected 0 to 1"), ("--dropout 1", "--dropout 1.0: expected 0 to 1"),
            ("--points 84", "--points 84: expected one of"), ("--drop-at 2", "--drop-at 2: expected parts"),
            ("--also-lam x", "--also-lam x: expected numbers"),
            ("--also-lam=-1", "--also-lam -1: expected numbers"),
            ("--drop-at 1/0", "--drop-at 1/0: expected parts"), ("--method tps9", "invalid choice"),
            ("--method none --lam 1", "--lam goes with a method that learns to align, not none"),
            ("--method fullalign --also-lam 1", "--also-lam goes with"),
            ("--method affine2d --template fixed", "--template goes with"),
            ("--method none --alpha fixed", "--alpha goes with"), ("--depth 20", "invalid choice"),
            ("--gpus 2 --batch-size 7", "--batch-size 7 does not divide over --gpus 2"),
            ("--gpus 4 --batch-size 4", "--batch-size 4: batch norms want two faces or more"),
            ("--box head", "--box head: expected image, landmarks or face"),
            ("--box 1,2,3,4", "with --predict x0,y0,x1,y1"),
            ("--predict a.png --weights b.pt --box 3,2,1,4", "--box 3,2,1,4: expected"),
            ("--predict a.png --weights b.pt --box 1,2,3,nan", "--box 1,2,3,nan: expected"),
            ("--cache device --box image", "--cache goes with --box landmarks or face"),
            ("--template-file no.pts", "--template-file: no file no.pts"),
            ("--detector no.onnx", "--detector: no file no.onnx"), ("--predict a.png", "belong together"),
            ("--weights a.pt", "belong together"), ("--eval a.pt --resume", "--eval goes neither"),
            ("--eval a.pt --predict a.png --weights a.pt", "--eval goes neither"),
            (f"--detector {__file__}", "--detector belongs to --predict"), ("--dat faces", "unrecognized")]:
        with pytest.raises(SystemExit):
            sa.parse_args(flags.split())
        assert message in capsys.readouterr().err, flags
    assert sa.listed("0,1/2,3") == [0, 0.5, 3] and sa.listed("") == []
    assert sa.parse_box("-1,2,3.5,4") == [-1, 2, 3.5, 4] and sa.parse_box("1,2,3") is None


def test_the_cache_of_a_preset_is_none_for_whole_images_and_lam_may_be_left_empty():
    args = sa.parse_args(["--data", "faces", "--box", "image"])
    assert args.box == "image" and args.cache == "" and sa.parse_args(["--data", "faces"]).cache == "device"
    assert sa.parse_args(["--method", "none", "--also-lam", ""]).also_lam == ""


# ---- Evaluation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["none", "affine2d", "tps8", "fullalign"])
def test_a_face_and_its_mirror_image_have_the_same_features(method):
    net, args, flip = aligning(method)[0], drawn_args(), datasets.SCHEMES[68].flip
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    batch = {"image": pixels, "points": landmarks() * 32 / 112}
    mirror = {"image": batch["image"].flip(2), "points": batch["points"][:, flip] * torch.tensor([-1, 1.0])}
    mirror["points"] += torch.tensor([31.0, 0])
    one, two = (sa.look(net, [data], args) for data in (batch, mirror))
    same(one["features"], two["features"], 1e-3)
    image, points = sa.prepare(batch, CPU)
    own = net(image, points if method in sa.BY_LANDMARKS else None)
    assert (one["features"] - 2 * own).abs().max() > 0.01
    same(one["crops"], points, 1e-4)
    same(one["aligned"], net.map_points(points, image, "aligned", points)[0], 1e-4)
    assert ("folded" in one) == (method != "none")


def test_scores_are_of_the_faces_that_could_be_mapped():
    own = landmarks(5).double()
    seen = {"crops": own, "aligned": own * 0.5 + 20, "converged": torch.ones(5, 68, dtype=torch.bool)}
    scores = sa.alignment_scores(seen, network("none"))
    assert scores["anme"] == pytest.approx(scores["anme/crops"]) == anme(own)  # no scale counts
    seen["converged"][2, 7] = False
    seen["aligned"][2] = 1e6
    scores = sa.alignment_scores(seen, network("none"))
    rest = own[[0, 1, 3, 4]]
    assert scores["converged"] == 0.8 and scores["anme"] == pytest.approx(anme(rest))
    assert scores["anme/crops"] == pytest.approx(anme(rest))


def test_predict_embeds_a_whole_image_as_evaluation_does():
    net = network("none", points=0)
    args = drawn_args("--box", "image")
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), (0, 0), 1.5)
    box = sa.find_boxes(args, image, None)[0]
    aligned, _, feature = sa.recognise(net, image, box, [1.0], None, args)
    data = recognition.WholeImages([image], 32)
    seen = sa.look(net, [data.__getitems__([(0, 0)])], args)
    np.testing.assert_array_equal(aligned, image)
    same(feature, F.normalize(seen["features"])[0], 1e-5)


# ---- Whole runs ----------------------------------------------------------------------------------

TINY = [*SLIM, "--limit", "40", "--batch-size", "20", "--epochs", "3", "--warmup", "2", "--lr", "0.05",
        "--loc-lr", "0.1", "--also-lam", "0", "--eval-every", "2"]


def trained(folder, *flags):
    return sa.main(sa.parse_args([*flags, "--output", str(folder)]))


def evaluated(folder, *flags):
    return sa.main(sa.parse_args(["--eval", str(folder / "last.pt"), "--device", "cpu", *flags]))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, in process: its folder and numbers."""
    folder = tmp_path_factory.mktemp("run") / "a"
    return folder, trained(folder, *TINY)


def test_a_run_leaves_its_log_checkpoint_and_pictures(finished):
    folder, result = finished
    for place in (folder, folder / "lam0"):
        rows = rows_of(place)
        assert [row["epoch"] for row in rows] == [1, 2, 3]
        assert ["anme" in row for row in rows] == [False, True, True]
        assert all(math.isfinite(row[key]) for row in rows for key in ("loss", "fr", "lmk", "reg"))
        for row in rows:
            lam = 3 if place == folder else 0
            assert row["loss"] == pytest.approx(row["fr"] + lam * (row["lmk"] + row["reg"]), rel=1e-4)
        assert rows[-1]["lr"] == pytest.approx(0.05 / 100)  # step 6 of 6
        assert cv2.imread(str(place / "alignment.png")).shape == (4 * 224, 4 * 224, 3)
        assert (place / "template.png").exists() == (place == folder)  # nothing is learned at lambda 0
        state = sa.load(place / "last.pt", "stn_align")
        same(datasets.read_pts(str(place / "template.pts")), state["model"]["template"], 1e-3)
        assert state["epoch"] == 3 and state["classes"] == [4, 40] and state["args"]["lam"] == lam
        assert state["model"]["net.bn1.num_batches_tracked"] == 3 * 2 and state["head"].shape == (4, 512)
        moved = (state["model"]["template"] - state["start"]).abs().max()
        assert (moved > 1e-4) == (lam > 0) == (state["model"]["alpha_logit"].abs().max() > 0).item()
        assert not list(place.glob("*.part"))
    row = rows_of(folder)[-1]
    for key in ("accuracy", "rank1", "rank5", "anme", "anme/crops", "distance", "converged", "folded",
                "alpha/min", "alpha/max"):
        assert row[key] == result[key] and key + "@lam0" in result


def test_eval_repeats_the_numbers(finished, tmp_path, capsys):
    folder, result = finished
    again = evaluated(folder, "--output", str(tmp_path / "new"))
    assert set(again) == {key for key in result if "@" not in key}
    for key, value in again.items():
        assert value == pytest.approx(result[key], rel=1e-4, abs=1e-6), key
    text = capsys.readouterr().out
    assert "faces: tps8 at fmap, crop landmarks x 1.4" in text and "lambda 3" in text
    assert "verified (%)" in text and "ANME aligned" in text
    assert (tmp_path / "new/alignment.png").exists()
    evaluated(folder, "--limit", "20", "--box", "face", "--margin", "1.2")
    assert "crop face x 1.2" in capsys.readouterr().out
    other = evaluated(folder, "--points", "98", "--limit", "20")  # no W(T) of these, but their scatter
    assert "distance" not in other and other["anme"] > 0


def put_tests(folder):
    """A .bin of twelve pairs and a table of roles, of drawn faces; the landmarks of the first."""
    faces = synthetic.read_faces("test", 40, size=40, points=68)
    files = [encoded(face) for face in faces]
    pairs = [i for a in range(0, 36, 6) for i in (a, a + 1, a, (a + 15) % 40)]
    same_person = [faces[a].identity == faces[b].identity for a, b in zip(pairs[::2], pairs[1::2])]
    with open(folder / "few.bin", "wb") as file:
        pickle.dump(([files[i] for i in pairs], same_person), file)
    rows = ["path,id,role,group"]
    for i in range(0, 40, 5):
        (folder / f"{i}.png").write_bytes(files[i])
        role = "gallery" if i % 10 == 0 else "probe"
        rows.append(f"{i}.png,{i // 10},{role if i < 30 else 'distractor'},{'' if i % 10 == 0 else 15 + i}")
    (folder / "roles.csv").write_text("\n".join(rows) + "\n")
    return [faces[i].points for i in pairs]


def test_sets_of_test_are_verified_and_searched(finished, tmp_path, capsys):
    points = put_tests(tmp_path)
    tests = [str(tmp_path / "few.bin"), str(tmp_path / "roles.csv")]
    scores = evaluated(finished[0], "--limit", "20", "--test", *tests)
    name = next(key for key in scores if key.startswith("rank1@")).split("@")[1]
    assert {"accuracy@few", f"rank1@{name}", f"rank1/20@{name}", "folded@few", "accuracy"} <= set(scores)
    assert "anme@few" not in scores and f"rank1@{name}" in capsys.readouterr().out
    header = ",".join(["image", *(f"{axis}{i}" for i in range(68) for axis in "xy")])
    lines = [",".join([str(i), *map(str, own.flatten().tolist())]) for i, own in enumerate(points)]
    (tmp_path / "few.bin.landmarks.csv").write_text("\n".join([header, *lines]) + "\n")
    again = evaluated(finished[0], "--limit", "20", "--test", tests[0])  # crops about them, as in training
    assert again["anme@few"] > 0 and 0 < again["distance@few"] < 30 and "accuracy@few" in again


def test_eval_of_a_set_alone_reads_whole_images(tmp_path, capsys):
    """As the docstring has it: a network for whole images, `--eval` with the preset of another set."""
    people(tmp_path / "set" / "train")
    people(tmp_path / "set" / "test")
    put_tests(tmp_path)
    flags = [*SLIM[2:], "--data", "vggface2", "--data-root", str(tmp_path / "set"), "--epochs", "1",
             "--batch-size", "4", "--warmup", "0", "--lr", "0.01"]
    result = trained(tmp_path / "run", *flags)
    assert result["rank1"] >= 0 and "crop image" in capsys.readouterr().out
    again = evaluated(tmp_path / "run", "--test", str(tmp_path / "few.bin"))
    assert again["anme"] == pytest.approx(result["anme"], rel=1e-4) and "accuracy@few" in again
    other = evaluated(tmp_path / "run", "--data", "folder", "--data-root", str(tmp_path / "set"))
    assert other["anme"] == pytest.approx(result["anme"], rel=1e-4)


def test_a_run_on_whole_drawn_images_is_evaluated_and_resumed(tmp_path):
    """The flags of the command have a cache by default, the run's have none."""
    result = trained(tmp_path, *SHORT, "--limit", "20", "--box", "image", "--also-lam", "")
    assert evaluated(tmp_path)["anme"] == pytest.approx(result["anme"], rel=1e-4)
    again = trained(tmp_path, "--resume", "--device", "cpu", "--also-lam", "")
    assert again["anme"] == pytest.approx(result["anme"], rel=1e-4)


def test_eval_of_a_network_that_learned_to_align_needs_no_landmarks(tmp_path):
    people(tmp_path / "train")
    people(tmp_path / "test", points=False)
    args = folder_args(tmp_path, data="vggface2")
    assert sa.read_set(args, "train").points is not None
    split = sa.read_set(args, "test")
    assert split.points is None and len(split.faces) == 9


@pytest.mark.parametrize("flags", [
    "--method none", "--method affine2d --align-at input", "--method proj --lam 1", "--method fullalign",
    "--method tps2 --lam 0 --points 5"])
def test_other_methods_run(tmp_path, flags, capsys):
    method = flags.split()[1]
    result, folder = sa.train(drawn_args(*flags.split(), "--output", str(tmp_path)))
    assert math.isfinite(result["accuracy"]) and ("folded" in result) == (method != "none")
    if method == "fullalign":
        assert result["anme"] < 1e-3 and result["distance"] < 1e-2
    if method in ("none", "affine2d"):
        assert (result["anme"] < 0.9 * result["anme/crops"]) == (method == "affine2d")
    assert ("alpha/min" in result) == (method in LEARNING)
    assert cv2.imread(str(folder / "alignment.png")) is not None
    again = evaluated(tmp_path)
    assert again["anme"] == pytest.approx(result["anme"], rel=1e-3, abs=1e-5)
    assert again["accuracy"] == pytest.approx(result["accuracy"], abs=0.02)
    text = capsys.readouterr().out
    assert f"faces: {method} at" in text and ("lambda" in text.splitlines()[-1]) == (method in LEARNING)


def test_a_method_that_learns_nothing_is_trained_once(tmp_path):
    result = sa.main(sa.parse_args([*TINY[:-4], "--epochs", "1", "--method", "none", "--output",
                                    str(tmp_path)]))
    assert not (tmp_path / "lam0").exists() and not any("@lam" in key for key in result)


def test_full_alignment_to_landmarks_of_no_known_scheme(tmp_path):
    """The paper has 84; T comes from a file then, and images are not mirrored."""
    own = [0, 4, 8, 12, 16, 30, 36, 45, 48, 54, 57, 62]
    datasets.write_pts(str(tmp_path / "t.pts"), template()[own])
    for split in ("train", "test"):
        for name, points in people(tmp_path / split).items():
            datasets.write_pts(str(tmp_path / split / f"{name}.pts"), points[own])
    for method in ("tps8", "fullalign"):
        args = folder_args(tmp_path, "--epochs", "1", "--batch-size", "4", "--warmup", "0",
                           "--method", method, "--template-file", str(tmp_path / "t.pts"), "--output",
                           str(tmp_path / method))
        result, _ = sa.train(args)
        assert result["distance"] >= 0 and "anme" not in result  # no pupils are known


def test_a_template_is_learned_kept_and_fixed(finished, tmp_path):
    path = str(finished[0] / "template.pts")
    trained(tmp_path, *SHORT, "--template", "fixed", "--template-file", path, "--also-lam", "")
    before, after = datasets.read_pts(path), datasets.read_pts(str(tmp_path / "template.pts"))
    np.testing.assert_allclose(after, before, atol=1e-3)
    state = sa.load(tmp_path / "last.pt", "stn_align")
    assert torch.equal(state["start"], state["model"]["template"])
    same(state["start"], before, 1e-3)


def photos(folder, count=2):
    """Photos in a tree, with .pts beside; returns their names."""
    for i, face in enumerate(synthetic.read_faces("test", count, size=128, points=68)):
        path = folder / ("sub/b" if i else "one two")
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path) + ".png", datasets.load_image(face.image)[..., ::-1])
        datasets.write_pts(str(path) + ".pts", face.points)
    return ["one two", "sub/b"][:count]


def test_predict_writes_crop_points_and_embedding(finished, tmp_path, capsys):
    names = photos(tmp_path / "in")
    flags = ["--predict", str(tmp_path / "in"), "--weights", str(finished[0] / "last.pt"), "--device", "cpu"]
    for out, more in (("whole", ""), ("box", "--box=9,9,99,110")):
        sa.main(sa.parse_args([*flags, "--output", str(tmp_path / out), *more.split()]))
        for name in names:
            points = datasets.read_pts(str(tmp_path / out / f"{name}.pts"))
            assert points.shape == (68, 2) and -64 < points.min() and points.max() < 192
            assert cv2.imread(str(tmp_path / out / f"{name}.png")).shape == (32, 32, 3)
            feature = np.load(tmp_path / out / f"{name}.npy")
            assert feature.shape == (512,) and np.linalg.norm(feature) == pytest.approx(1, abs=1e-5)
    assert "2 faces of 2 images in" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="one two.png exists already; name another folder"):
        sa.main(sa.parse_args([*flags, "--output", str(tmp_path / "box")]))
    with pytest.raises(ValueError, match="--box 200,100,300,200 lies outside an image of 128 x 128"):
        sa.main(sa.parse_args([*flags, "--output", str(tmp_path / "y"), "--box", "200,100,300,200"]))


class Detector:
    """Stands for YuNet: two faces in each image."""

    def setInputSize(self, size):
        assert size == (128, 128)

    def detect(self, image):
        return None, np.array([[10, 10, 60, 70, *[0] * 11], [20, 30, 80, 90, *[0] * 11]], np.float32)


def test_predict_finds_several_faces_and_looks_twice(finished, tmp_path, monkeypatch):
    photos(tmp_path / "in", 1)
    boxes, original = [], datasets.square_frames
    monkeypatch.setattr(sa, "open_detector", lambda path: Detector())
    monkeypatch.setattr(datasets, "square_frames",
                        lambda box, *rest: boxes.append(box[0]) or original(box, *rest))
    out = tmp_path / "out"
    sa.main(sa.parse_args(["--predict", str(tmp_path / "in"), "--weights", str(finished[0] / "last.pt"),
                           "--device", "cpu", "--detector", __file__, "--output", str(out)]))
    for name in ("one two", "one two.face2"):
        assert all((out / f"{name}{end}").exists() for end in (".png", ".pts", ".npy"))
    np.testing.assert_allclose(boxes[0], [10, 10, 70, 80])
    np.testing.assert_allclose(boxes[2], [20, 30, 100, 120])
    for i in (1, 3):  # the second look is about W(T), which starts at the mean face in the first
        assert boxes[i].shape == (4,) and np.abs(boxes[i] - boxes[i - 1]).max() < 40


@pytest.mark.parametrize("method", ["none", "affine2d", "fullalign"])
def test_predict_by_methods_that_learn_no_alignment(tmp_path, method):
    sa.train(drawn_args("--method", method, "--output", str(tmp_path / "run"), "--limit", "20"))
    photos(tmp_path / "in", 1)
    flags = ["--predict", str(tmp_path / "in"), "--weights", str(tmp_path / "run/last.pt"), "--device", "cpu"]
    sa.main(sa.parse_args([*flags, "--output", str(tmp_path / "out")]))
    assert np.load(tmp_path / "out/one two.npy").shape == (512,)
    assert (tmp_path / "out/one two.pts").exists() == (method != "none")
    own = datasets.read_pts(str(tmp_path / "in/one two.pts"))
    if method == "fullalign":
        np.testing.assert_allclose(datasets.read_pts(str(tmp_path / "out/one two.pts")), own, atol=0.05)
    if method == "affine2d":
        found, groups = datasets.read_pts(str(tmp_path / "out/one two.pts")), datasets.SCHEMES[68].five
        assert np.abs(datasets.group_means(found, groups) - datasets.group_means(own, groups)).mean() < 5
    if method != "none":
        datasets.write_pts(str(tmp_path / "in/one two.pts"), own[:29])
        with pytest.raises(ValueError, match="one two.pts has 29 points, the network's template 68"):
            sa.main(sa.parse_args([*flags, "--output", str(tmp_path / "y")]))
        (tmp_path / "in/one two.pts").unlink()
        with pytest.raises(FileNotFoundError, match="one two.pts"):
            sa.main(sa.parse_args([*flags, "--output", str(tmp_path / "z")]))


def test_training_that_cannot_begin_is_named(tmp_path, capsys):
    people(tmp_path / "one" / "train", 3)
    for name in ("n1", "n2"):
        shutil.rmtree(tmp_path / "one" / "train" / name)
    with pytest.raises(ValueError, match="all 1 images are of one identity, n0"):
        sa.train(folder_args(tmp_path / "one", "--output", str(tmp_path / "x")))
    people(tmp_path / "set" / "train")
    flags = ["--batch-size", "2", "--output", str(tmp_path / "x")]
    with pytest.raises(ValueError, match="1 identities: recognition is learned from two or more"):
        sa.train(folder_args(tmp_path / "set", *flags, "--limit", "3"))
    for i in range(3):  # each once: nobody to be recognised
        face = datasets.load_image(synthetic.read_faces("test", 1, size=48)[0].image)
        (tmp_path / f"set/test/p{i}").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / f"set/test/p{i}/a.png"), face)
        datasets.write_pts(str(tmp_path / f"set/test/p{i}/a.pts"), template() * 48 / 112)
    with pytest.raises(ValueError, match="3 people.*takes two people, and two images of one"):
        sa.train(folder_args(tmp_path / "set", *flags))
    with pytest.raises(FileNotFoundError, match="test: no test found|--test"):
        sa.train(drawn_args("--test", str(tmp_path / "nothing"), "--output", str(tmp_path / "x")))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    calls, original = [], sa.AMSoftmax.forward

    def poisoned(self, *args):
        calls.append(1)
        return original(self, *args) * (math.nan if len(calls) == 4 else 1)  # two steps an epoch

    monkeypatch.setattr(sa.AMSoftmax, "forward", poisoned)
    with pytest.raises(FloatingPointError, match="the loss is nan at epoch 2, step 2"):
        trained(tmp_path, *TINY)
    assert sa.load(tmp_path / "last.pt", "stn_align")["epoch"] == 1


def test_flags_and_data_that_contradict_the_checkpoint_are_named(finished, tmp_path):
    folder, _ = finished
    resume = lambda *flags: trained(folder, "--resume", "--device", "cpu", *flags)
    with pytest.raises(ValueError, match="--lr 0.5: the checkpoint was made with"):
        resume("--lr", "0.5")
    for flags in ("--method proj", "--align-at input", "--lam 1", "--depth 18"):
        with pytest.raises(ValueError, match=f"{flags.split()[0]} .*: the checkpoint was made with"):
            evaluated(folder, *flags.split())
    with pytest.raises(FileExistsError, match="holds a run: continue it by --resume"):
        trained(folder, *TINY)
    with pytest.raises(ValueError, match="last.pt is no checkpoint of sdfl.py, but of stn_align"):
        sa.load(folder / "last.pt", "sdfl")
    args = sa.parse_args(["--resume", "--output", str(folder), "--device", "cpu"])
    state = sa.load(folder / "last.pt", "stn_align")
    sa.restore_args(args, state["args"], sa.MACHINE)
    train_images, data = sa.load_sets(args, 1)
    state["classes"] = [4, 39]
    with pytest.raises(ValueError, match="40 images of 4 identities, the run was started on 39 of 4"):
        sa.make_learner(args, data, train_images, state, CPU, 1)


def test_a_checkpoint_that_was_changed_is_named(finished, tmp_path):
    state = sa.load(finished[0] / "last.pt", "stn_align")
    state["model"]["net.fc.weight"] = torch.zeros(512, 3)
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last.pt: 1 tensors do not fit.*net.fc.weight, is \(512, 3\)"):
        evaluated(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="last.pt is cut short"):
        evaluated(tmp_path)


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_table(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "copy")
    (tmp_path / "copy/alignment.png").unlink()
    again = trained(tmp_path / "copy", "--resume", "--device", "cpu", "--also-lam", "0")
    assert again["anme"] == pytest.approx(finished[1]["anme"]) and (tmp_path / "copy/alignment.png").exists()
    assert again["anme@lam0"] == pytest.approx(finished[1]["anme@lam0"])
    assert "ANME aligned" in capsys.readouterr().out
    assert rows_of(tmp_path / "copy") == rows_of(finished[0])  # nothing stands twice


def test_killed_and_resumed_is_the_same_run_bit_for_bit(finished, tmp_path):
    command = [sys.executable, "stn_align.py", "--output", str(tmp_path), *TINY]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not (tmp_path / "last.pt").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.kill()  # somewhere after the first checkpoint
    out, _ = process.communicate()
    assert (tmp_path / "last.pt").exists(), out
    assert 1 <= sa.load(tmp_path / "last.pt", "stn_align")["epoch"] < 3
    trained(tmp_path, "--resume", "--device", "cpu", "--also-lam", "0")
    for name in (".", "lam0"):
        a, b = (sa.load(folder / name / "last.pt", "stn_align") for folder in (finished[0], tmp_path))
        assert a["epoch"] == b["epoch"] == 3 and a["model"].keys() == b["model"].keys()
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
        assert torch.equal(a["head"], b["head"]) and torch.equal(a["start"], b["start"])
        for i, state in a["optimizer"]["state"].items():
            assert torch.equal(state["momentum_buffer"], b["optimizer"]["state"][i]["momentum_buffer"])
        for one, two in zip(rows_of(finished[0] / name), rows_of(tmp_path / name), strict=True):
            assert all(value == two[key] for key, value in one.items()
                       if key not in ("minutes", "images_per_second"))
