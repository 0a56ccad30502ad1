"""stn_align.py: maps and their inverses, losses against loops, gradients, joint training, runs."""
import json
import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stn_align as sa
from common import UserError, datasets, metrics, photos, run, synthetic, warp

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
CROP = (112, 112)
pytestmark = pytest.mark.filterwarnings("ignore:.* faces are frontal")
ALIGNING = sa.METHODS[1:]


def same(a, b, tolerance=1e-6):
    a = torch.as_tensor(a)
    b = torch.as_tensor(b, dtype=a.dtype).expand(a.shape)
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def template(points=68):
    """A drawn face, (points, 2) px of a 112 px crop: a quarter of the crop is free on each side."""
    face = synthetic.read_faces("train", 1, size=112, points=points)[0]
    shape = torch.from_numpy(face.points).double()
    low = shape.amin(0)
    high = shape.amax(0)
    return (28 + 56 * (shape - low) / (high - low).max()).float()


def landmarks(count=3, points=68, seed=0):
    """Faces about the template: turned, enlarged, moved, and none like another."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, 3, generator=generator) * torch.tensor([0.06, 0.06, 3.0])
    middle = torch.tensor([55.5, 55.5])
    moved = warp.apply_affine(torch.eye(2, 3) + noise, template(points) - middle) + middle
    return moved + 0.5 * torch.randn(count, points, 2, generator=generator)


def network(method="tps8", align_at="fmap", size=32, seed=0, points=68, **options):
    torch.manual_seed(seed)
    shape = template(points) if points else None
    options = dict(depth=10, width=4, dropout=0.0, template=shape) | options
    return sa.AlignedRecognizer(method, align_at, size=size, **options).eval()


def moves(method, amount=5.0):
    """Outputs of LocNet: a smooth turn and wave of the lattice, up to some px; numbers of Proj."""
    if method == "proj":
        return torch.tensor([0.1, -0.07, 0.12, 0.05, -0.08, -0.06, 0.12, -0.08]) * 10 * amount
    axis = torch.linspace(-1, 1, int(method[3:]))
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    wave = torch.stack([torch.sin(2 * y) + 0.5 * x, torch.cos(1.5 * x) - 0.4 * y], -1)
    return amount * wave.flatten()


def set_moves(net, amount=5.0, spread=0.0):
    """Makes LocNet say `moves`, and for each image a little else."""
    with torch.no_grad():
        net.locnet.fc.bias.copy_(moves(net.method, amount) / net.maps.gain)
        if spread:
            net.locnet.fc.weight.normal_(std=spread)
    return net


def images(count=3, size=32, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def centres(size):
    """Pixels of a crop of `size` x `size`, (size^2, 2) px of a 112 px crop."""
    return sa.to_112(warp.pixel_centres((size, size)), size)


def aligning(method, size=32, **options):
    """A network that moves faces, the maps of three, and their landmarks if it needs them."""
    net = network(method, size=size, **options)
    if net.locnet is not None:
        set_moves(net)
    own = landmarks() if method in sa.BY_LANDMARKS else None
    return net, net.find_map(images(size=size), own), own


def anme(points):
    pupils = datasets.group_means(points.double(), datasets.SCHEMES[points.shape[1]].pupils)
    return metrics.anme(points.double(), (pupils[:, 0] - pupils[:, 1]).norm(dim=1))


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
    assert network(size=112)(torch.zeros(1, 3, 112, 112))[0].shape == (1, 512)


def test_names_of_the_recognition_network_are_those_of_insightface():
    with torch.device("meta"):
        names = {name for name in sa.IRNet(18).state_dict()
                 if "running" not in name and "num" not in name}

    def norm(name):
        return {f"{name}.weight", f"{name}.bias"}

    wanted = {"conv1.weight", "prelu.weight", "fc.weight", "fc.bias"}
    wanted |= norm("bn1") | norm("bn2") | norm("features")
    for stage in range(1, 5):
        for block in range(2):
            base = f"layer{stage}.{block}."
            wanted |= {base + "conv1.weight", base + "conv2.weight", base + "prelu.weight"}
            wanted |= norm(base + "bn1") | norm(base + "bn2") | norm(base + "bn3")
        wanted |= {f"layer{stage}.0.downsample.0.weight"} | norm(f"layer{stage}.0.downsample.1")
    assert names == wanted


def test_stages_shrink_by_two_and_the_first_keeps_its_resolution():
    net = sa.IRNet(34, width=4, size=32).eval()
    x = net.stem(images())
    shapes = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        shapes.append((len(stage), *x.shape[1:]))
    assert shapes == [(3, 4, 16, 16), (4, 8, 8, 8), (6, 16, 4, 4), (3, 32, 2, 2)]
    block = net.layer1[0]  # the improved residual unit, spelt out
    x = net.stem(images())
    y = block.bn3(block.conv2(block.prelu(block.bn2(block.conv1(block.bn1(x))))))
    short = block.downsample[1](block.downsample[0](x[:, :, ::2, ::2]))
    assert block.conv1.stride == (1, 1) and block.conv2.stride == (2, 2)
    same(block(x), y + short)


@pytest.mark.parametrize("make", [lambda: sa.IRNet(10, 4, 32), lambda: sa.LocNet(8, 32), network])
def test_no_strided_1x1_convolution_is_reachable(make):
    """The backward of one, on a channels_last map of few channels, crashes in oneDNN."""
    for module in make().modules():
        if isinstance(module, nn.Conv2d):
            assert module.kernel_size != (1, 1) or module.stride == (1, 1)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_any_layout_trains(layout):
    model = sa.Learner(network().train(), 2, 3.0).to(memory_format=layout)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    image, points = sa.prepare({"image": pixels, "points": landmarks(2) / 3.5}, CPU)
    assert image.is_contiguous(memory_format=torch.channels_last)
    same(image.permute(0, 2, 3, 1), pixels / 127.5 - 1)
    model(image.contiguous(memory_format=layout), torch.tensor([0, 1]), points)[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---- Maps: the contract of every method ----------------------------------------------------------

@pytest.mark.parametrize("size", [112, 48])
@pytest.mark.parametrize("method", [*sa.BY_LOCNET, "none"])
def test_the_start_is_the_identity(method, size):
    net, image = network(method, size=size), images(2, size)
    w = net.find_map(image)
    still = warp.to_norm(warp.pixel_centres((size, size)), (size, size)).view(size, size, 2)
    same(net.maps.grid(w, size), still)
    same(net.align(image, w), image, 1e-4)
    points = landmarks(2)
    same(net.maps.to_input(w, points), points, 1e-4)
    aligned, converged = net.to_aligned(w, points)
    same(aligned, points, 1e-4)
    assert converged.all() and converged.shape == (2, 68)


@pytest.mark.parametrize("method", sa.BY_LOCNET)
def test_image_and_feature_map_are_the_same_place_at_the_identity(method):
    nets = [network(method, at) for at in ("input", "fmap")]
    nets[1].load_state_dict(nets[0].state_dict())
    one, two = (net(images())[0] for net in nets)
    same(one, two, 1e-4)
    set_moves(nets[0])
    nets[1].load_state_dict(nets[0].state_dict())
    one, two = (net(images())[0] for net in nets)
    assert (one - two).abs().max() > 1e-2  # and only there


@pytest.mark.parametrize("align_at", ["input", "fmap"])
def test_the_network_is_figure_5(align_at):
    net, w, _ = aligning("tps8", align_at=align_at)
    grid = net.maps.grid(w, 32)
    x = images()
    if align_at == "input":
        x = F.grid_sample(x, grid, align_corners=False)
    x = net.backbone.stem(x)
    if align_at == "fmap":
        x = F.grid_sample(x, grid, align_corners=False)
    embedding, found = net(images())
    same(found, w)
    same(embedding, net.backbone.body(x), 1e-4)


@pytest.mark.parametrize("method", ALIGNING)
def test_to_input_and_to_aligned_are_inverse(method):
    net, w, own = aligning(method)
    points = landmarks(seed=1)
    if method == "fullalign":  # where it folds, no other point has one inverse
        points = template() + torch.randn(3, 68, 2) * 0.01
    there = net.maps.to_input(w, points)
    assert (there - points).norm(dim=-1).mean() > 1
    back, converged = net.to_aligned(w, there)
    assert converged.all()
    same(back, points, 2e-3 if method != "fullalign" else 0.1)
    points = own if method == "fullalign" else points
    back, converged = net.to_aligned(w, points)
    assert converged.all()
    same(net.maps.to_input(w, back), points, 2e-3 if method != "fullalign" else 0.1)


@pytest.mark.parametrize("size", [112, 48])
@pytest.mark.parametrize("method", ALIGNING)
def test_an_image_of_its_own_coordinates_becomes_the_map(method, size):
    """Finds a mistake in the order of x and y, or half a pixel."""
    net, w, _ = aligning(method, size)
    places = centres(size)
    ramp = places.T.reshape(1, 2, size, size).expand(3, -1, -1, -1)
    seen = net.align(ramp, w).flatten(2).mT  # (3, size^2, 2)
    mapped = net.maps.to_input(w, places)
    inside = ((mapped > places.min()) & (mapped < places.max())).all(-1)
    assert inside.float().mean() > 0.5
    same(seen[inside], mapped[inside], 1e-4 if size == 112 else 2e-4)
    same(net.maps.grid(w, size), warp.to_norm(mapped, CROP).view(3, size, size, 2), 1e-5)


@pytest.mark.parametrize("method", ALIGNING)
def test_autocast_leaves_the_map_alone(method):
    net, w, own = aligning(method)
    plain = net.maps.to_input(w, template())
    grid = net.maps.grid(w, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = net.find_map(images(), own)
        same(net.maps.grid(found, 32), grid, 1e-4)
        same(net.maps.to_input(found, template()), plain, 1e-2 if net.locnet else 1e-4)
        assert net.align(images().bfloat16(), found).dtype == torch.bfloat16
        if method.startswith("tps"):  # W(c) = p, of what LocNet said
            wanted = net.maps.lattice + moves(method).view(-1, 2)
            found = net.maps.fit(moves(method)[None])
            same(net.maps.to_input(found, net.maps.lattice), wanted, 56e-4)


def test_splines_pass_through_lattice_and_landmarks():
    net = aligning("tps8")[0]
    assert net.maps.outputs == 128
    assert network("tps2").maps.outputs == 8 == network("proj").maps.outputs
    c = net.maps.lattice  # x runs first
    same(c[[0, 7, 8, 63]], [[-0.5, -0.5], [111.5, -0.5], [-0.5, 15.5], [111.5, 111.5]])
    set_moves(net, spread=0.02)
    numbers = net.locnet(images())
    assert (numbers[0] - numbers[1]).abs().max() > 0.1
    same(net.maps.to_input(net.find_map(images()), c), c + numbers.view(3, 64, 2), 1e-3)
    full = network("fullalign")
    own = landmarks(8)
    w = full.find_map(None, own)
    same(full.maps.to_input(w, full.template), own, 1e-3)
    aligned, converged = full.to_aligned(w, own)  # every landmark comes to the template
    assert converged.all() and anme(aligned) < 1e-4
    same(aligned, full.template, 1e-3)


def test_gradients_are_finite_where_the_template_sits_on_the_lattice():
    net, w, _ = aligning("tps8")
    c = net.maps.lattice.clone().requires_grad_()
    (net.maps.to_input(w, c) - landmarks()[:, :64]).norm(dim=-1).mean().backward()
    assert c.grad.isfinite().all() and c.grad.abs().max() > 0
    assert net.locnet.fc.bias.grad.isfinite().all()


@pytest.mark.parametrize("points", [68, 98, 5])
def test_affine2d_is_least_squares_of_five_points(points):
    net = network("affine2d", points=points)
    own = landmarks(4, points)
    groups = datasets.SCHEMES[points].five
    five = datasets.group_means(own, groups).double()
    goal = datasets.group_means(template(points), groups).double()
    aligned, converged = net.to_aligned(net.find_map(None, own), own)
    assert converged.all()
    for i in range(4):
        rows = torch.cat([five[i], torch.ones(5, 1)], 1)
        m = torch.linalg.lstsq(rows, goal).solution  # (3, 2)
        wanted = torch.cat([own[i].double(), torch.ones(points, 1)], 1) @ m
        same(aligned[i].double(), wanted, 1e-3)


def test_the_homography_by_its_eight_numbers():
    maps = network("proj").maps
    numbers = moves("proj")[None].repeat(3, 1)
    points = landmarks()
    x, y = warp.to_norm(points, CROP).unbind(-1)
    h = (numbers[0] / 56).tolist()
    h7, h8 = (0.45 * math.tanh(value / 0.45) for value in h[6:])
    divisor = h7 * x + h8 * y + 1
    wanted = torch.stack([((1 + h[0]) * x + h[1] * y + h[2]) / divisor,
                          (h[3] * x + (1 + h[4]) * y + h[5]) / divisor], -1)
    same(maps.to_input(maps.fit(numbers), points), warp.to_px(wanted, CROP), 1e-3)
    wild = maps.fit(torch.tensor([[0.0] * 6 + [1e4, -1e4]]))
    assert maps.grid(wild, 32).isfinite().all()  # the divisor stays positive all over the crop
    corners = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]])
    assert (wild[0, 2] @ corners.T).min() > 0.09


def test_a_step_of_gradient_descent_shifts_the_face_alike_by_every_map():
    """A gradient that asks all px of the face for one shift, and how far a step moves them."""
    points = sa.to_112(warp.pixel_centres((16, 16)), 16)
    shifts = {}
    for method in sa.BY_LOCNET:
        maps = network(method).maps
        outputs = torch.zeros(1, maps.outputs, requires_grad=True)
        x = maps.to_input(maps.fit(maps.gain * outputs), points)[0, :, 0]
        x.mean().backward()
        moved = maps.to_input(maps.fit(maps.gain * outputs.grad), points)[0, :, 0] - points[:, 0]
        shifts[method] = moved.mean().item()
    assert shifts["tps8"] == pytest.approx(0.019, abs=1e-3)
    for shift in shifts.values():
        assert 0.7 < shift / shifts["tps8"] < 1.5


def test_an_affine_family_is_aligned_perfectly():
    """Landmarks and lattice by one affine map of each face: W(T) = x, y = T, ANME = 0."""
    net, generator = network("tps8"), torch.Generator().manual_seed(0)
    noise = torch.randn(6, 2, 3, generator=generator) * torch.tensor([0.1, 0.1, 4])
    m = torch.eye(2, 3) + noise
    own = warp.apply_affine(m, net.template.detach())
    c = net.maps.lattice
    w = net.maps.fit((warp.apply_affine(m, c) - c).flatten(1))
    same(w[:, :64], 0.0, 1e-5)  # no bend
    l_lmk, _ = sa.alignment_loss(net.maps.to_input(w, net.template), own, torch.ones(68))
    assert l_lmk < 1e-4 and anme(own) > 0.01
    aligned, converged = net.to_aligned(w, own)
    same(aligned, net.template, 1e-3)
    assert converged.all() and anme(aligned) < 1e-5


def test_a_fold_is_counted():
    net, w, _ = aligning("tps8")
    assert sa.folded(net.maps.grid(w, 32)).tolist() == [False] * 3
    numbers = moves("tps8")[None].repeat(3, 1).view(3, 64, 2)
    numbers[1, 27, 0] += 60  # over its neighbour
    grid = net.maps.grid(net.maps.fit(numbers.flatten(1)), 32)
    assert sa.folded(grid).tolist() == [False, True, False]
    assert sa.folded(grid.flip(2)).tolist() == [True] * 3  # a mirror turns over everywhere
    scores = sa.alignment_scores({"folded": sa.folded(grid)}, net)
    assert scores["folded"] == pytest.approx(1 / 3)


def test_points_that_do_not_converge_are_told():
    net, w, _ = aligning("tps8")
    far = torch.full((3, 68, 2), 3e5)
    moved, converged = net.to_aligned(w, far)
    assert moved.isfinite().all() and not converged.all()
    assert torch.equal(converged, (net.maps.to_input(w, moved) - far).norm(dim=-1) < 0.05)


@pytest.mark.parametrize("call, message", [
    (lambda: network("affine2d", points=0), "--method affine2d needs landmarks.*see --landmarks"),
    (lambda: network("fullalign", points=0), "--method fullalign needs landmarks"),
    (lambda: network("fullalign")(images()), "fullalign needs the 68 landmarks of every image"),
    (lambda: network("affine2d")(images(), landmarks(points=29)), "68 landmarks.*found 29"),
    (lambda: network("affine2d", template=template()[:12]), "five points of a scheme.*12"),
    (lambda: sa.AMSoftmax(512, 1), "1 identities: recognition is learned from two or more")])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


# ---- Losses --------------------------------------------------------------------------------------

def test_alignment_loss_is_equations_3_and_4():
    warped, own = landmarks(4, 29), landmarks(4, 29, seed=1)
    alpha = torch.rand(29, generator=torch.Generator().manual_seed(0))
    l_lmk, l_reg = sa.alignment_loss(warped, own, alpha)
    total = 0.0
    for i in range(4):
        for s in range(29):
            total += float(alpha[s]) * math.hypot(*(warped[i, s] - own[i, s]).tolist())
    assert l_lmk.item() == pytest.approx(total / (4 * 29), rel=1e-5)
    assert l_reg.item() == pytest.approx(sum((1 - float(a))**2 for a in alpha), rel=1e-5)  # no mean
    assert sa.alignment_loss(own, own, torch.ones(29)) == (0, 0)
    own = own.requires_grad_()
    sum(sa.alignment_loss(own, own.detach().clone(), alpha)).backward()
    assert own.grad.isfinite().all()  # also where both agree


def test_the_best_weight_is_that_of_the_closed_form():
    """With distances D frozen, alpha goes to 1 - D / (2 |S|)."""
    D = torch.linspace(0.5, 40, 68)
    own = landmarks(2)
    warped = own + torch.stack([0.6 * D, 0.8 * D], 1)
    logit = torch.zeros(68, requires_grad=True)
    optimizer = torch.optim.SGD([logit], 20.0)
    for _ in range(600):
        optimizer.zero_grad()
        sum(sa.alignment_loss(warped, own, logit.sigmoid())).backward()
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


LABELS = torch.tensor([0, 1, 2])


def learner(method="tps8", lam=3.0, seed=0, **options):
    return sa.Learner(network(method, seed=seed, **options), 3, lam).train()


@pytest.mark.parametrize("lam", [0.0, 0.5, 3.0])
def test_loss_is_equations_2_and_5(lam):
    model = learner(lam=lam).eval()
    set_moves(model.net, spread=0.01)
    with torch.no_grad():
        model.net.alpha_logit.copy_(torch.linspace(-2, 2, 68))
    own = landmarks()
    loss, l_fr, l_lmk, l_reg = (term.item() for term in model(images(), LABELS, own))
    embeddings, w = model.net(images())
    assert l_fr == pytest.approx(model.head(embeddings, LABELS).item(), rel=1e-5)
    assert loss == pytest.approx(l_fr + lam * (l_lmk + l_reg), rel=1e-5)
    warped = model.net.maps.to_input(w, model.net.template)
    terms = [term.item() for term in sa.alignment_loss(warped, own, model.net.alpha())]
    assert [l_lmk, l_reg] == pytest.approx(terms if lam else [0, 0], rel=1e-4)


def gradients(model):
    model.zero_grad()
    model(images(), LABELS, landmarks())[0].backward()
    return {name: 0.0 if p.grad is None else p.grad.abs().max().item()
            for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", sa.BY_LOCNET)
@pytest.mark.parametrize("lam", [0.0, 3.0])
def test_the_first_step_moves_locnets_last_layer_and_the_second_its_trunk(method, lam):
    model = learner(method, lam)
    grads = gradients(model)
    trunk = [name for name in grads if name.startswith("net.locnet.") and ".fc." not in name]
    assert trunk and all(grads[name] == 0 for name in trunk)
    assert grads["net.locnet.fc.weight"] > 0 and grads["net.locnet.fc.bias"] > 0
    torch.optim.SGD(model.parameters(), 1e-3).step()
    grads = gradients(model)
    assert all(grads[name] > 0 for name in trunk)


def drawn_args(*flags):
    return sa.parse_args([*SHORT, *flags])


@pytest.mark.parametrize("align_at", ["input", "fmap"])
@pytest.mark.parametrize("method", sa.METHODS)
@pytest.mark.parametrize("lam", [0.0, 3.0])
def test_every_trained_parameter_has_a_gradient_and_no_other(method, align_at, lam):
    """DistributedDataParallel waits for the gradients of all that is trained. L_fr reaches no T."""
    args = drawn_args("--method", method, "--align-at", align_at, "--lam", str(lam))
    model = sa.Learner(sa.build(args, template(), CPU), 3, lam).train()
    learns = lam > 0 and method in sa.BY_LOCNET
    if model.net.locnet is not None:
        set_moves(model.net, spread=0.01)
    grads = gradients(model)
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None), name
        # The bias in front of the last batch norm is the one whose gradient is only rounding.
        assert not p.requires_grad or name == "net.backbone.fc.bias" or grads[name] > 0, name
    assert model.net.template.requires_grad == model.net.alpha_logit.requires_grad == learns


@pytest.mark.parametrize("method", ["affine2d", "tps8"])
def test_a_step_is_one_graph(method):
    """Constants of the splines are there before it is traced: the second step finds it compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    model = sa.Learner(sa.build(drawn_args("--method", method), template(), CPU), 3, 3.0).train()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        compiled(images(), LABELS, landmarks())[0].backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("flags, template_learns, alpha_learns", [
    ("", True, True), ("--lam 0", False, False), ("--template fixed", False, True),
    ("--alpha fixed", True, False), ("--method affine2d", False, False)])
def test_what_is_learned(flags, template_learns, alpha_learns):
    net = sa.build(drawn_args(*flags.split()), template(), CPU)
    learns = (net.template.requires_grad, net.alpha_logit.requires_grad)
    assert learns == (template_learns, alpha_learns)
    net.requires_grad_(False)  # freezing a network does not change its weights
    same(net.alpha().detach(), 0.5 if alpha_learns else 1.0)


# ---- Training ------------------------------------------------------------------------------------

SLIM = ["--data", "faces", "--size", "32", "--width", "4", "--depth", "10", "--device", "cpu"]
SHORT = [*SLIM, "--limit", "40", "--batch-size", "20", "--epochs", "1", "--warmup", "0",
         "--lr", "0.02"]


def test_learning_rates_of_the_paper():
    args = sa.parse_args(["--data", "vggface2"])
    assert (args.batch_size, args.lr, args.weight_decay, args.lam, args.depth, args.size) == \
        (256, 0.2, 5e-4, 3, 34, 112)
    assert sa.parse_args(["--data", "ms1m"]).depth == 100
    assert sa.parse_args(["--drop-at", "12/24,17/24,22/24"]).drop_at == args.drop_at
    rates = {}
    for per_epoch in (7, 12300):
        for epoch in (1, 12, 13, 17, 18, 22, 23, 24):
            for step in ((epoch - 1) * per_epoch, epoch * per_epoch - 1):
                rate = sa.learning_rate(step, 24 * per_epoch, args.lr, 0, args.drop_at)
                rates.setdefault(epoch, set()).add(round(rate, 9))
    assert rates == {1: {0.2}, 12: {0.2}, 13: {0.02}, 17: {0.02}, 18: {0.002}, 22: {0.002},
                     23: {0.0002}, 24: {0.0002}}
    rise = [sa.learning_rate(step, 10**6, 0.2, 500, []) for step in (0, 249, 499, 500, 9999)]
    assert rise == pytest.approx([0.0004, 0.1, 0.2, 0.2, 0.2])


def test_rates_and_decays_of_the_parts():
    args = drawn_args("--loc-lr", "0.25", "--weight-decay", "0.01")
    model = sa.Learner(sa.build(args, template(), CPU), 3, 3.0)
    optimizer = sa.make_optimizer(args, model)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            found[names[id(p)]] = (group["weight_decay"], group["scale"])
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, rates in found.items():
        wanted = (0.01, 1.0)
        if name in ("net.template", "net.alpha_logit"):
            wanted = (0.0, 1.0)
        elif name.startswith("net.locnet."):
            wanted = (0.01, 0.25)
        assert rates == wanted, name
    assert "head.weight" in found and optimizer.param_groups[0]["momentum"] == 0.9


@pytest.fixture(scope="module")
def joint():
    """100 steps of the joint training on drawn faces: distances of W(T) on the way, and scores."""
    def go(lam, steps=100, scale=1.0):
        args = drawn_args("--lam", str(lam), "--limit", "120", "--loc-lr", "0.1", "--lr", "0.1")
        split = sa.read_set(args, "train")
        data = sa.make_dataset(args, split, True)
        data.regions.keep("device", verbose=False)
        labels = torch.as_tensor(split.images.labels)
        run.seed_all(0)
        model = sa.Learner(sa.build(args, sa.first_template(args, data), CPU), 12, lam).train()
        optimizer = sa.make_optimizer(args, model)
        model.net.locnet.register_forward_hook(lambda _, inputs, output: scale * output)
        generator = np.random.default_rng(0)
        distances = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * sa.learning_rate(step, steps, args.lr, 20, [])
            chosen = generator.integers(0, len(data), 12).tolist()
            image, points = sa.prepare(data.__getitems__([(step, i) for i in chosen]), CPU)
            loss = model(image, labels[chosen], points)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 9:
                with torch.no_grad():
                    moved = model.net.maps.to_input(model.net.find_map(image), model.net.template)
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
    shares = [scores["anme"] / scores["anme/crops"] for scores in (drawn_scores, free_scores)]
    assert shares[0] < 0.9 < shares[1]
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
    with pytest.warns(UserWarning, match="9 of 39 faces are frontal and upright: T is"):
        same(sa.mean_frontal_template(both[:39]), both[:39].mean(0), 1e-4)
    with pytest.raises(UserError, match="84 landmarks are no known scheme.*--template-file"):
        sa.mean_frontal_template(torch.rand(20, 84, 2))


def people(root, count=9, points=True, side=48):
    """Drawn faces of three people as PERSON/NAME.png, .pts beside; their landmarks by name."""
    found = {}
    for i, face in enumerate(synthetic.read_faces("train", count, size=side, points=68)):
        name = f"n{i % 3}/{i}"
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.write_image(path, datasets.load_image(face.image))
        found[name] = face.points
        if points:
            datasets.write_pts(str(path.with_suffix(".pts")), face.points)
    return found


def test_weights_that_would_die_are_told():
    """Of D_s px and |S| landmarks the best weight is 1 - D_s / (2 |S|)."""
    images = [np.zeros((112, 112, 3), np.uint8)] * 4
    for points, distance, told in ((5, 6, True), (5, 4, False), (68, 6, False)):
        t = torch.rand(points, 2, generator=torch.Generator().manual_seed(0)) * 60 + 20
        moved = (t + torch.tensor([0.6, 0.8]) * distance).expand(4, -1, -1).numpy()
        faces = [datasets.Face(*both) for both in zip(images, moved)]
        data = datasets.CropDataset(faces, np.stack([np.eye(2, 3)] * 4), 112)
        assert sa.far_from_template(t, data) == told
    assert not sa.far_from_template(None, None)


def folder_args(root, *flags, data="folder"):
    return sa.parse_args(["--data", data, "--data-root", str(root), *SLIM[2:], *flags])


def test_folders_with_and_without_points(tmp_path):
    found = people(tmp_path / "with" / "train")
    split = sa.read_set(folder_args(tmp_path / "with"), "train")
    assert split.images.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    same(torch.from_numpy(split.points[0]).float(), found["n0/0"], 1e-3)
    assert sa.read_set(folder_args(tmp_path / "with"), "test") is None
    assert len(sa.read_set(folder_args(tmp_path / "with", "--limit", "4"), "train").images) == 4
    people(tmp_path / "bare" / "train", points=False)
    for flags, message in (("", "lam 3"), ("--method fullalign", "method fullalign"),
                           ("--lam 0", "box landmarks"), ("--method none", "box landmarks")):
        args = folder_args(tmp_path / "bare", *flags.split())
        with pytest.raises(UserError, match=f"0.png has no landmarks, which --{message} needs"):
            sa.read_set(args, "train")
    split = sa.read_set(folder_args(tmp_path / "bare", "--box", "image", "--lam", "0"), "train")
    assert split.points is None and len(split.faces) == 9


@pytest.mark.parametrize("flags, message", [
    ([], "--lam 3 needs landmarks, and records have none: --landmarks"),
    (["--box", "face"], "--box face: records have no boxes")])
def test_what_records_do_not_have_is_named(flags, message):
    with pytest.raises(UserError, match=message):
        sa.read_set(folder_args("ms1m", *flags, data="ms1m"), "train")


def test_landmarks_are_px_of_a_112_px_crop_in_batches_and_templates(tmp_path):
    same(sa.to_112(torch.tensor([[-0.5, 63.5]]), 64), [[-0.5, 111.5]])  # edges are edges
    same(sa.from_112(sa.to_112(landmarks(), 64), 64), landmarks(), 1e-4)
    args = drawn_args("--box", "landmarks")
    plain = sa.make_dataset(args, sa.read_set(args, "train"), False)
    _, points = sa.prepare(plain.__getitems__([(0, i) for i in range(40)]), CPU)
    same(sa.landmarks_of(plain), points, 1e-3)
    assert 60 < (points.amax(1) - points.amin(1)).amax() < 112
    moved = sa.make_dataset(args, sa.read_set(args, "train"), True)
    same(sa.first_template(args, moved), sa.mean_frontal_template(points), 1e-3)
    people(tmp_path / "train")
    args = folder_args(tmp_path, "--box", "image")
    whole = sa.make_dataset(args, sa.read_set(args, "train"), False)
    _, points = sa.prepare(whole.__getitems__([(0, i) for i in range(9)]), CPU)
    same(sa.landmarks_of(whole), points, 1e-3)
    same((points[0] + 0.5) * 48 / 112 - 0.5, whole.points[0], 1e-3)  # a whole image is the crop


def test_half_of_the_training_crops_are_mirrored():
    rng = np.random.default_rng(0)
    drawn = [sa.augment(rng, 64) for _ in range(200)]
    assert 70 < sum(mirror for _, mirror, _ in drawn) < 130
    same(drawn[0][0], np.eye(2, 3))
    points = landmarks()
    found = sa.mirrored(points)
    same(found[:, 36, 0], 111 - points[:, 45, 0], 1e-4)  # outer corners of the eyes
    same(found[:, 36, 1], points[:, 45, 1], 1e-4)


def test_templates_that_cannot_serve_are_named(tmp_path):
    data = sa.make_dataset(drawn_args(), sa.read_set(drawn_args(), "train"), True)
    path = str(tmp_path / "t.pts")
    datasets.write_pts(path, template(29))
    with pytest.raises(UserError, match="t.pts has 29 points, the landmarks .* are 68"):
        sa.first_template(drawn_args("--template-file", path), data)
    twice = template()
    twice[41] = twice[40]
    datasets.write_pts(path, twice)
    with pytest.raises(UserError, match="template .*t.pts: .*40 and 41 are both at"):
        sa.first_template(drawn_args("--template-file", path), data)


# ---- Evaluation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["none", "affine2d", "tps8", "fullalign"])
def test_a_face_and_its_mirror_image_have_the_same_features(method):
    net, args, flip = aligning(method)[0], drawn_args(), datasets.SCHEMES[68].flip
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    batch = {"image": pixels, "points": landmarks() * 32 / 112}
    mirror = {"image": pixels.flip(2), "points": batch["points"][:, flip]}
    mirror["points"] = mirror["points"] * torch.tensor([-1, 1.0]) + torch.tensor([31.0, 0])
    one, two = (sa.look(net, [data], args) for data in (batch, mirror))
    same(one["features"], two["features"], 1e-3)
    image, points = sa.prepare(batch, CPU)
    own, w = net(image, points)
    assert (one["features"] - 2 * own).abs().max() > 0.01
    same(one["crops"], points, 1e-4)
    same(one["aligned"], net.to_aligned(w, points)[0], 1e-4)
    same(one["distance"], (net.maps.to_input(w, net.template) - points).norm(dim=-1), 1e-3)


def test_scores_are_of_the_faces_that_could_be_mapped():
    own = landmarks(5).double()
    seen = {"crops": own, "aligned": own * 0.5 + 20, "folded": torch.zeros(5, dtype=torch.bool),
            "converged": torch.ones(5, 68, dtype=torch.bool)}
    scores = sa.alignment_scores(seen, network("none"))
    assert scores["anme"] == pytest.approx(scores["anme/crops"]) == anme(own)  # no scale counts
    seen["converged"][2, 7] = False
    seen["aligned"][2] = 1e6
    scores = sa.alignment_scores(seen, network("none"))
    rest = own[[0, 1, 3, 4]]
    assert scores["converged"] == 0.8 and scores["anme"] == pytest.approx(anme(rest))
    assert scores["anme/crops"] == pytest.approx(anme(rest))


# ---- Whole runs ----------------------------------------------------------------------------------

TINY = [*SLIM, "--limit", "40", "--batch-size", "20", "--epochs", "3", "--warmup", "2",
        "--lr", "0.05", "--loc-lr", "0.1", "--eval-every", "2"]


def trained(folder, *flags):
    return sa.train(sa.parse_args([*flags, "--output", str(folder)]))


def evaluated(folder, *flags):
    return sa.train(sa.parse_args(["--eval", str(folder / "last.pt"), "--device", "cpu", *flags]))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, in process: its folder and numbers."""
    folder = tmp_path_factory.mktemp("run") / "a"
    return folder, trained(folder, *TINY)


def test_a_run_leaves_its_log_checkpoint_and_pictures(finished):
    folder, result = finished
    rows = rows_of(folder)
    assert ["anme" in row for row in rows] == [False, True, True]
    for row in rows:
        assert row["loss"] == pytest.approx(row["fr"] + 3 * (row["lmk"] + row["reg"]), rel=1e-4)
    assert rows[-1]["lr"] == pytest.approx(0.05 / 1000)  # three drops
    for key in ("accuracy", "accuracy/pixels", "rank1", "rank1/pixels", "rank5", "anme", "anme/crops",
                "distance", "converged", "folded", "alpha/min", "alpha/max"):
        assert rows[-1][key] == result[key]
    assert cv2.imread(str(folder / "alignment.png")).shape == (4 * 224, 4 * 224, 3)
    assert cv2.imread(str(folder / "template.png")).shape == (520, 3 * 480, 3)
    state = state_of(folder)
    last = state["model"]["net.template"]
    same(datasets.read_pts(str(folder / "template.pts")), last, 1e-3)
    assert state["epoch"] == 3 and state["data"] == [40, 4] and state["args"]["lam"] == 3
    assert (last - state["start"]).abs().max() > 1e-4
    assert state["model"]["net.alpha_logit"].abs().max() > 0


def test_two_epochs_and_one_more_are_three_bit_for_bit(finished, tmp_path, monkeypatch):
    save = run.Job.save

    def stop(job, epoch, *scores, **more):
        save(job, epoch, *scores, **more)
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Job, "save", stop)
        trained(tmp_path, *TINY)
    assert trained(tmp_path, "--resume", "--device", "cpu") == finished[1]
    one, two = state_of(finished[0]), state_of(tmp_path)
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    for i, state in one["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"],
                           two["optimizer"]["state"][i]["momentum_buffer"])


def test_two_processes_train(tmp_path):
    command = [sys.executable, "stn_align.py", *TINY, "--gpus", "2", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "processes: 2" in done.stdout, done.stderr[-2000:]
    assert state_of(tmp_path)["world"] == 2 and len(rows_of(tmp_path)) == 3


def test_eval_repeats_the_numbers(finished, tmp_path, capsys):
    folder, result = finished
    again = evaluated(folder, "--output", str(tmp_path / "new"))
    assert again == pytest.approx(result, rel=1e-4, abs=1e-6)
    text = capsys.readouterr().out
    assert "faces: tps8 at fmap, crop landmarks x 1.4" in text and "lambda 3" in text
    assert "verified (%)" in text and "ANME aligned" in text
    assert (tmp_path / "new/alignment.png").exists()
    evaluated(folder, "--limit", "20", "--box", "face", "--margin", "1.2")
    assert "crop face x 1.2" in capsys.readouterr().out
    other = evaluated(folder, "--points", "98", "--limit", "20")  # no W(T), but their scatter
    assert "distance" not in other and other["anme"] > 0


def put_tests(folder):
    """A .bin of twelve pairs and a table of roles, of drawn faces; the landmarks of the first."""
    faces = synthetic.read_faces("test", 40, size=40, points=68)
    files = [cv2.imencode(".png", datasets.load_image(face.image)[..., ::-1])[1].tobytes()
             for face in faces]
    pairs = [i for a in range(0, 36, 6) for i in (a, a + 1, a, (a + 15) % 40)]
    people = [faces[i].identity for i in pairs]
    genuine = [a == b for a, b in zip(people[::2], people[1::2])]
    with open(folder / "few.bin", "wb") as file:
        pickle.dump(([files[i] for i in pairs], genuine), file)
    rows = ["path,id,role,group"]
    for i in range(0, 40, 5):
        (folder / f"{i}.png").write_bytes(files[i])
        role = "gallery" if i % 10 == 0 else "probe"
        role = role if i < 30 else "distractor"
        rows.append(f"{i}.png,{i // 10},{role},{'' if i % 10 == 0 else 15 + i}")
    (folder / "roles.csv").write_text("\n".join(rows) + "\n")
    return [faces[i].points for i in pairs]


def test_sets_of_test_are_verified_and_searched(finished, tmp_path, capsys):
    points = put_tests(tmp_path)
    tests = [str(tmp_path / "few.bin"), str(tmp_path / "roles.csv")]
    scores = evaluated(finished[0], "--limit", "20", "--test", *tests)
    name = next(key for key in scores if key.startswith("rank1@")).split("@")[1]
    assert {"accuracy@few", f"rank1@{name}", f"rank1/20@{name}", "folded@few"} <= scores.keys()
    assert "anme@few" not in scores and f"rank1@{name}" in capsys.readouterr().out
    header = ",".join(["image", *(f"{axis}{i}" for i in range(68) for axis in "xy")])
    lines = [",".join([str(i), *map(str, own.flatten().tolist())]) for i, own in enumerate(points)]
    (tmp_path / "few.bin.landmarks.csv").write_text("\n".join([header, *lines]) + "\n")
    again = evaluated(finished[0], "--limit", "20", "--test", tests[0])  # crops about them
    assert again["anme@few"] > 0 and 0 < again["distance@few"] < 30


def test_a_network_for_whole_images_is_evaluated_on_another_set(tmp_path, capsys):
    """As the docstring has it: `--eval` with the preset of another set."""
    people(tmp_path / "set" / "train")
    people(tmp_path / "set" / "test")
    put_tests(tmp_path)
    data = ["--data-root", str(tmp_path / "set")]
    result = trained(tmp_path / "run", *SLIM[2:], "--data", "vggface2", *data, "--epochs", "1",
                     "--batch-size", "4", "--warmup", "0", "--lr", "0.01")
    assert "crop image" in capsys.readouterr().out
    again = evaluated(tmp_path / "run", "--test", str(tmp_path / "few.bin"))
    assert again["anme"] == pytest.approx(result["anme"], rel=1e-4) and "accuracy@few" in again
    other = evaluated(tmp_path / "run", "--data", "folder", *data)
    assert other["anme"] == pytest.approx(result["anme"], rel=1e-4)


def test_whole_images_have_no_cache(tmp_path):
    """The preset has one."""
    result = trained(tmp_path, *SHORT, "--limit", "20", "--box", "image")
    assert evaluated(tmp_path)["anme"] == pytest.approx(result["anme"], rel=1e-4)
    again = trained(tmp_path, "--resume", "--device", "cpu")
    assert again["anme"] == pytest.approx(result["anme"], rel=1e-4)


@pytest.mark.parametrize("flags", [
    "--method none", "--method affine2d --align-at input", "--method proj --lam 1",
    "--method fullalign", "--method tps2 --lam 0 --points 5"])
def test_other_methods_run(tmp_path, flags, capsys):
    method = flags.split()[1]
    result = trained(tmp_path, *SHORT, *flags.split())
    assert math.isfinite(result["accuracy"]) and result["folded"] <= (method != "none")
    if method == "fullalign":
        assert result["anme"] < 1e-3 and result["distance"] < 1e-2
    if method in ("none", "affine2d"):
        assert (result["anme"] < 0.9 * result["anme/crops"]) == (method == "affine2d")
    assert ("alpha/min" in result) == (method == "proj")
    assert cv2.imread(str(tmp_path / "alignment.png")) is not None
    assert (tmp_path / "template.png").exists() == (method == "proj")
    again = evaluated(tmp_path)
    assert again["anme"] == pytest.approx(result["anme"], rel=1e-3, abs=1e-5)
    text = capsys.readouterr().out
    assert f"faces: {method} at" in text
    assert ("lambda" in text.splitlines()[-1]) == (method in sa.BY_LOCNET)


def test_landmarks_of_no_known_scheme(tmp_path):
    """The paper has 84; T comes from a file then, and images are not mirrored."""
    own = [0, 4, 8, 12, 16, 30, 36, 45, 48, 54, 57, 62]
    datasets.write_pts(str(tmp_path / "t.pts"), template()[own])
    for split in ("train", "test"):
        for name, points in people(tmp_path / split).items():
            datasets.write_pts(str(tmp_path / split / f"{name}.pts"), points[own])
    for method in ("tps8", "fullalign"):
        args = folder_args(tmp_path, "--epochs", "1", "--batch-size", "4", "--warmup", "0",
                           "--method", method, "--template-file", str(tmp_path / "t.pts"),
                           "--output", str(tmp_path / method))
        result = sa.train(args)
        assert result["distance"] >= 0 and "anme" not in result  # no pupils are known


def test_a_template_is_learned_kept_and_fixed(finished, tmp_path):
    path = str(finished[0] / "template.pts")
    trained(tmp_path, *SHORT, "--template", "fixed", "--template-file", path)
    before, after = datasets.read_pts(path), datasets.read_pts(str(tmp_path / "template.pts"))
    np.testing.assert_allclose(after, before, atol=1e-3)
    state = state_of(tmp_path)
    assert torch.equal(state["start"], state["model"]["net.template"])


def put_photos(folder, count=2):
    """Photos in a tree, with .pts beside; returns their names."""
    names = ["one two", "sub/b"][:count]
    for name, face in zip(names, synthetic.read_faces("test", count, size=128, points=68)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.write_image(folder / f"{name}.png", datasets.load_image(face.image))
        datasets.write_pts(str(folder / f"{name}.pts"), face.points)
    return names


def predict(folder, images, out, *flags):
    sa.train(sa.parse_args(["--predict", str(images), "--weights", str(folder / "last.pt"),
                            "--device", "cpu", "--output", str(out), *flags]))


def test_predict_writes_crop_points_and_embedding(finished, tmp_path):
    names = put_photos(tmp_path / "in")
    for out, flags in (("whole", []), ("box", ["--box=9,9,99,110"])):
        predict(finished[0], tmp_path / "in", tmp_path / out, *flags)
        for name in names:
            points = datasets.read_pts(str(tmp_path / out / f"{name}.pts"))
            assert points.shape == (68, 2) and -64 < points.min() and points.max() < 192
            assert cv2.imread(str(tmp_path / out / f"{name}.png")).shape == (32, 32, 3)
            feature = np.load(tmp_path / out / f"{name}.npy")
            assert feature.shape == (512,)
            assert np.linalg.norm(feature) == pytest.approx(1, abs=1e-5)


def test_predict_looks_at_each_face_twice(finished, tmp_path, monkeypatch):
    put_photos(tmp_path / "in", 1)
    boxes, original = [], datasets.square_crops
    five = np.array([[30, 40], [50, 40], [40, 50], [32, 60], [48, 60]], float)
    faces = np.array([[0, 0, 70, 90, *(five + move).ravel(), 1] for move in (0, 20)])
    monkeypatch.setattr(photos, "open_detector", lambda path: "YuNet")
    monkeypatch.setattr(photos, "detect", lambda detector, image: faces)
    monkeypatch.setattr(datasets, "square_crops",
                        lambda box, *rest: boxes.append(box[0]) or original(box, *rest))
    predict(finished[0], tmp_path / "in", tmp_path / "out", "--detector", __file__)
    for name in ("one two", "one two.face2"):
        assert all((tmp_path / "out" / f"{name}{end}").exists() for end in (".png", ".pts", ".npy"))
    np.testing.assert_allclose(boxes[0], [20, 33, 60, 73])
    np.testing.assert_allclose(boxes[2], [40, 53, 80, 93])
    for i in (1, 3):  # the second look is about W(T), which starts at the mean face in the first
        assert boxes[i].shape == (4,) and np.abs(boxes[i] - boxes[i - 1]).max() < 40


@pytest.mark.parametrize("method", ["none", "affine2d", "fullalign"])
def test_predict_by_methods_that_learn_no_alignment(tmp_path, method):
    trained(tmp_path / "run", *SHORT, "--method", method, "--limit", "20")
    put_photos(tmp_path / "in", 1)
    predict(tmp_path / "run", tmp_path / "in", tmp_path / "out")
    assert np.load(tmp_path / "out/one two.npy").shape == (512,)
    assert (tmp_path / "out/one two.pts").exists() == (method != "none")
    if method == "none":
        return
    own = datasets.read_pts(str(tmp_path / "in/one two.pts"))
    found = datasets.read_pts(str(tmp_path / "out/one two.pts"))
    if method == "fullalign":
        np.testing.assert_allclose(found, own, atol=0.05)
    else:
        groups = datasets.SCHEMES[68].five
        distance = datasets.group_means(found, groups) - datasets.group_means(own, groups)
        assert np.abs(distance).mean() < 5
    datasets.write_pts(str(tmp_path / "in/one two.pts"), own[:29])
    with pytest.raises(UserError, match="two.pts has 29 points, the network's template 68"):
        predict(tmp_path / "run", tmp_path / "in", tmp_path / "y")


def test_training_that_cannot_begin_is_named(tmp_path):
    people(tmp_path / "set" / "train")
    flags = ["--batch-size", "2", "--output", str(tmp_path / "x")]
    with pytest.raises(UserError, match="1 identities: recognition is learned from two or more"):
        sa.train(folder_args(tmp_path / "set", *flags, "--limit", "3"))
    with pytest.raises(FileNotFoundError, match="no test found"):
        sa.train(drawn_args("--test", str(tmp_path / "nothing"), *flags))
    with pytest.raises(SystemExit):
        sa.parse_args(["--batch-size", "1"])
    assert not (tmp_path / "x").exists()
