"""Face aligner and template fusion of kprpe.py against slow loops, closed forms and finite differences."""
import json
import math
import os
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import kprpe
from common import datasets, metrics, synthetic

torch.set_num_threads(1)
cv2.setNumThreads(1)

CANONICAL = (torch.as_tensor(datasets.ARCFACE_5) + 0.5) / 112


# ---- Face aligner --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return kprpe.DFA().eval()


def slow_priors(size):
    rows = []
    for stride, sides in ((8, (64, 80)), (16, (96, 112)), (32, (128, 144))):
        for row in range(size // stride):
            for column in range(size // stride):
                for side in sides:
                    rows.append([(column + 0.5) * stride, (row + 0.5) * stride, side, side])
    return torch.tensor(rows) / size


def test_anchors_are_their_formula():
    assert kprpe.prior_boxes(160).shape == (1050, 4)
    for size in (32, 96, 160):
        torch.testing.assert_close(kprpe.prior_boxes(size), slow_priors(size))
    for size in (0, 100):
        with pytest.raises(ValueError, match=f"anchors of an image of {size} px: expected a multiple of 32"):
            kprpe.DFA(size)


def test_the_code_of_boxes_and_points_is_its_formula_and_goes_back():
    torch.manual_seed(0)
    priors = kprpe.prior_boxes()[::97]
    boxes = torch.cat([torch.rand(len(priors), 2) * 0.4, 0.5 + torch.rand(len(priors), 2) * 0.6], 1)
    points = torch.rand(len(priors), 5, 2) * 1.4 - 0.2
    encoded_boxes, encoded_points = kprpe.encode_boxes(boxes, priors), kprpe.encode_points(points, priors)
    for i, (cx, cy, w, h) in enumerate(priors.tolist()):
        x0, y0, x1, y1 = boxes[i].tolist()
        row = [((x0 + x1) / 2 - cx) / (0.1 * w), ((y0 + y1) / 2 - cy) / (0.1 * h),
               math.log((x1 - x0) / w) / 0.2, math.log((y1 - y0) / h) / 0.2]
        torch.testing.assert_close(encoded_boxes[i], torch.tensor(row), rtol=1e-4, atol=1e-5)
        row = [v for x, y in points[i].tolist() for v in ((x - cx) / (0.1 * w), (y - cy) / (0.1 * h))]
        torch.testing.assert_close(encoded_points[i], torch.tensor(row), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kprpe.decode_boxes(encoded_boxes, priors), boxes)
    torch.testing.assert_close(kprpe.decode_points(encoded_points, priors), points)


def test_size_and_operations_are_those_of_table_9(net):
    """0.49 M parameters and 0.14 GFLOP: two for each product, two for each output of a batch norm, five of a
    layer norm, one of an activation and of a convolution's bias."""
    assert sum(p.numel() for p in net.parameters()) == 486_775
    for name, size in dict(body=213_072, fpn=103_040, ssh1=34_752, aggregation=60_167).items():
        assert sum(p.numel() for p in getattr(net, name).parameters()) == size
    each, total = {nn.BatchNorm2d: 2, nn.LayerNorm: 5, nn.LeakyReLU: 1, nn.GELU: 1}, [0]

    def count(module, _, out):
        if isinstance(module, nn.Conv2d):
            total[0] += out.numel() * (2 * module.weight[0].numel() + (module.bias is not None))
        elif isinstance(module, nn.Linear):
            total[0] += out.numel() * 2 * module.in_features
        elif type(module) in each or isinstance(module, kprpe.SSH):           # SSH ends in a ReLU
            total[0] += out.numel() * each.get(type(module), 1)

    hooks = [module.register_forward_hook(count) for module in net.modules()]
    with torch.inference_mode():
        net(torch.zeros(1, 3, 160, 160))
    for hook in hooks:
        hook.remove()
    assert total[0] / 1e9 == pytest.approx(0.1402, abs=5e-5)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def slow_mixer(blocks, last, x):
    """Mixer blocks on the anchors x (N, 16) of one image, a row or column at a time."""
    def mlp(layers, v):
        return layers[2].weight @ gelu(layers[0].weight @ v + layers[0].bias) + layers[2].bias

    def norm(layer, x):
        centred = x - x.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias

    for block in blocks:
        mixed = norm(block.norm1, x)
        x = x + torch.stack([mlp(block.across, mixed[:, c]) for c in range(16)], 1)
        mixed = norm(block.norm2, x)
        x = x + torch.stack([mlp(block.within, row) for row in mixed])
    return torch.stack([last.weight[0] @ row + last.bias[0] for row in x])


@torch.no_grad()
def test_the_aggregation_is_its_formulas(net):
    torch.manual_seed(1)
    found, priors = net(torch.rand(2, 3, 160, 160) * 2 - 1), slow_priors(160)
    for b in range(2):
        rows = []
        for n, (cx, cy, w, h) in enumerate(priors.tolist()):
            tx, ty, tw, th = found.boxes[b, n].tolist()
            x, y = cx + 0.1 * tx * w, cy + 0.1 * ty * h
            w2, h2 = w * math.exp(0.2 * tw) / 2, h * math.exp(0.2 * th) / 2
            ldmk = [(cx, cy)[i % 2] + 0.1 * t * w for i, t in enumerate(found.points[b, n].tolist())]
            rows.append([x - w2, y - h2, x + w2, y + h2, *found.logits[b, n].tolist(), *ldmk])
        O = torch.tensor(rows)
        weights = slow_mixer(net.aggregation[:3], net.aggregation[3], O).softmax(0)
        torch.testing.assert_close(found.weights[b], weights, rtol=1e-3, atol=1e-6)
        fused = sum(w * row for w, row in zip(weights, O))
        torch.testing.assert_close(found.fused[b], fused, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.landmarks[b], fused[6:].view(5, 2), rtol=1e-4, atol=1e-4)
        assert found.score[b] == pytest.approx(1 / (1 + math.exp(fused[4] - fused[5])), abs=1e-5)
        top = max(range(1050), key=lambda n: (found.logits[b, n, 1] - found.logits[b, n, 0]).item())
        torch.testing.assert_close(found.best[b].flatten(), O[top, 6:])


@torch.no_grad()
def test_rows_of_the_heads_belong_to_their_anchors(net):
    maps = {}
    lists = dict(logits=net.ClassHead, boxes=net.BboxHead, points=net.LandmarkHead)
    hooks = [head.register_forward_hook(lambda m, i, out, key=(kind, level): maps.update({key: out}))
             for kind, heads in lists.items() for level, head in enumerate(heads)]
    found = net(torch.rand(1, 3, 160, 160))
    for hook in hooks:
        hook.remove()
    for kind, width in (("logits", 2), ("boxes", 4), ("points", 10)):
        for level, start, cells in ((0, 0, 20), (1, 800, 10), (2, 1000, 5)):
            for y, x, a in ((0, 1, 0), (3, 2, 1), (4, 4, 0)):
                row = getattr(found, kind)[0, start + 2 * (y * cells + x) + a]
                torch.testing.assert_close(row, maps[kind, level][0, a * width:(a + 1) * width, y, x])


@torch.no_grad()
def test_images_of_other_sizes_are_resized(net):
    # A blob stays at its place, in units of the image, through every size.
    seen, hook = [], net.body.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for side in (320, 90, 112, 160):
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        dot = torch.exp(-((x - 0.3 * side) ** 2 + (y - 0.6 * side) ** 2) / (0.05 * side) ** 2)
        image = 2 * dot.expand(1, 3, -1, -1) - 1
        found = net(image)
        assert seen[-1].shape == (1, 3, 160, 160)
        mass = (seen[-1][0, 0] + 1) / (seen[-1][0, 0] + 1).sum()
        centre = torch.stack([(mass.sum(i) * (torch.arange(160) + 0.5)).sum() for i in (0, 1)]) / 160
        expected = torch.tensor([0.3, 0.6]) + 0.5 / side
        torch.testing.assert_close(centre, expected, rtol=0, atol=1e-4)
    hook.remove()
    assert torch.equal(seen[-1], image) and found.landmarks.shape == (1, 5, 2)
    for shape in ((1, 1, 160, 160), (1, 3, 160, 117)):
        with pytest.raises(ValueError, match=rf"shape \({', '.join(map(str, shape))}\): expected"):
            net(torch.zeros(shape))


def test_under_autocast_places_stay_float32(net):
    image = torch.rand(2, 3, 160, 160) * 2 - 1
    with torch.inference_mode():
        plain = net(image)
        with torch.autocast("cpu", torch.bfloat16):
            found = net(image)
    assert {field.dtype for field in found} == {torch.float32}
    torch.testing.assert_close(found.landmarks, plain.landmarks, rtol=0, atol=0.02)


# ---- Its loss ------------------------------------------------------------------------------------

def slow_overlap(box, prior):
    cx, cy, w, h = prior
    ends = [(cx - w / 2, cx + w / 2), (cy - h / 2, cy + h / 2)]
    both = math.prod(max(0, min(box[i + 2], ends[i][1]) - max(box[i], ends[i][0])) for i in (0, 1))
    return both / ((box[2] - box[0]) * (box[3] - box[1]) + w * h - both)


def slow_match(box, priors):
    overlaps = [slow_overlap(box, prior) for prior in priors]
    top = max(range(len(priors)), key=overlaps.__getitem__)
    return [o >= 0.35 or (i == top and o >= 0.2) for i, o in enumerate(overlaps)]


def draw_case():
    """Four faces: two with landmarks, one without, one that only a single anchor meets."""
    torch.manual_seed(3)
    priors = kprpe.prior_boxes()
    box = torch.tensor([[0.1, 0.08, 0.93, 0.9], [0.3, 0.2, 0.8, 0.75], [0.2, 0.25, 0.7, 0.8],
                        [0.4, 0.4, 0.6, 0.63]])
    target = kprpe.Target(box, torch.rand(4, 5, 2), torch.tensor([True, True, False, True]))
    target.landmarks[2] = torch.nan
    raw = [torch.randn(4, 1050, width).requires_grad_() for width in (4, 2, 10)]
    fused = torch.randn(4, 16).requires_grad_()
    return priors, target, kprpe.Found(None, None, None, None, fused, *raw)


def test_anchors_are_matched_by_the_rule():
    priors, target, _ = draw_case()
    found = kprpe.match(target.box, priors)
    for row, box in zip(found.tolist(), target.box.tolist()):
        assert row == slow_match(box, priors.tolist())
    assert found[3].sum() == 1 and found[0].sum() > 10                        # the small one's best anchor
    tiny = torch.tensor([[0.5, 0.5, 0.51, 0.51]])
    assert not kprpe.match(tiny, priors).any()


def slow_smooth_l1(a, b):
    return sum(0.5 * (x - y) ** 2 if abs(x - y) < 1 else abs(x - y) - 0.5 for x, y in zip(a, b))


def slow_multibox(found, target, priors):
    sums, counts = [0.0, 0.0, 0.0], [0, 0, 0]
    for b, marked in enumerate(target.marked.tolist()):
        positive = slow_match(target.box[b].tolist(), priors.tolist())
        entropy = [math.log(math.exp(x) + math.exp(y)) - (y if p else x)
                   for (x, y), p in zip(found.logits[b].tolist(), positive)]
        worst = sorted((i for i, p in enumerate(positive) if not p), key=lambda i: -entropy[i])
        worst = worst[:7 * sum(positive)]
        sums[0] += sum(e for e, p in zip(entropy, positive) if p) + sum(entropy[i] for i in worst)
        for i in (i for i, p in enumerate(positive) if p):
            box = kprpe.encode_boxes(target.box[b], priors[i])
            sums[1] += slow_smooth_l1(found.boxes[b, i].tolist(), box.tolist())
            if marked:
                points = kprpe.encode_points(target.landmarks[b], priors[i])
                sums[2] += slow_smooth_l1(found.points[b, i].tolist(), points.tolist())
        counts = [n + m for n, m in zip(counts, (sum(positive), sum(positive), sum(positive) * marked))]
    return [s / n for s, n in zip(sums, counts)]


def test_losses_are_their_formulas():
    priors, target, found = draw_case()
    multibox = kprpe.multibox_loss(found, target, priors)
    expected = slow_multibox(found, target, priors)
    torch.testing.assert_close(multibox, torch.tensor(expected), rtol=1e-4, atol=1e-4)

    box, logits, points = (part.tolist() for part in found.fused.split((4, 2, 10), 1))
    expected = [sum(math.log(math.exp(x) + math.exp(y)) - y for x, y in logits) / 4,
                sum(slow_smooth_l1(box[b], target.box[b].tolist()) for b in range(4)) / 4,
                sum(slow_smooth_l1(points[b], target.landmarks[b].flatten().tolist()) for b in (0, 1, 3)) / 3]
    fused = kprpe.aggregation_loss(found, target)
    torch.testing.assert_close(fused, torch.tensor(expected), rtol=1e-4, atol=1e-4)

    total = kprpe.dfa_loss(found, target, priors)
    expected = multibox @ torch.tensor([1.0, 2, 1]) + fused @ torch.tensor([1.0, 60, 30])
    torch.testing.assert_close(total, expected)
    total.backward()                                        # nan landmarks: no nan comes through
    for tensor in (found.fused, found.boxes, found.logits, found.points):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0
    assert not found.points.grad[2].any()


def test_targets_follow_crop_and_mirror():
    faces = [datasets.Face(np.zeros((90, 100, 3), np.uint8), 20 + 40 * np.random.default_rng(i).random(
        (5, 2)).astype(np.float32), (10.0, 15.0, 60.0, 75.0)) for i in range(2)]
    faces[1].points[:] = np.nan  # as WIDER FACE has it
    data = kprpe.dfa_dataset(faces)
    points = data.__getitems__([(0, 0), (0, 1)])["points"]
    mirror = replace(kprpe.AUGMENTATIONS["mirror"], flip=1.0)
    _, moved = kprpe.augment(torch.zeros(2, 3, 160, 160), points, mirror, kprpe.FLIP_9)
    first, second = kprpe.targets(points, 160), kprpe.targets(moved, 160)
    # The square about the box is 1.2 times its longer side.
    scale = 160 / (1.2 * 60)
    torch.testing.assert_close((first.box[0, 2:] - first.box[0, :2]) * 160, torch.tensor([50.0, 60]) * scale)
    expected = torch.tensor((faces[0].points - [35, 45]) * scale + 80) / 160
    torch.testing.assert_close(first.landmarks[0], expected.float(), rtol=0, atol=1e-5)
    mirrored = (first.landmarks[0] * torch.tensor([-1, 1]) + torch.tensor([1, 0]))[[1, 0, 2, 4, 3]]
    torch.testing.assert_close(second.landmarks[0], mirrored, rtol=0, atol=1e-5)
    torch.testing.assert_close(second.box[0], first.box[0], rtol=0, atol=1e-5)  # in the middle of its crop
    assert first.marked.tolist() == second.marked.tolist() == [True, False]
    assert first.landmarks.isfinite().all()
    _, moved = kprpe.augment(torch.zeros(2, 3, 160, 160), points, kprpe.AUGMENTATIONS["full"], kprpe.FLIP_9)
    found = kprpe.targets(moved, 160)
    assert found.marked.tolist() == [True, False] and found.box.isfinite().all()
    torch.testing.assert_close(kprpe.mean_face(data), first.landmarks[0])
    with pytest.raises(ValueError, match="none of the 1 training faces has landmarks"):
        kprpe.mean_face(kprpe.dfa_dataset(faces[1:]))
    for points in (None, np.zeros((7, 2), np.float32)):
        with pytest.raises(ValueError, match="the aligner learns from "):
            kprpe.dfa_dataset([replace(faces[0], points=points)])
    with pytest.raises(ValueError, match="--box face finds a box of 0 px"):
        kprpe.dfa_dataset([replace(faces[0], box=None)])


def test_it_learns_a_few_drawn_faces():
    torch.manual_seed(0)
    data = kprpe.dfa_dataset(synthetic.read_faces("train", 4, 64, 5), 64)
    batch = data.__getitems__(datasets.in_order(4, 4)[0])
    image, target = batch["image"].permute(0, 3, 1, 2) / 127.5 - 1, kprpe.targets(batch["points"], 64)
    net = kprpe.DFA(64)
    optimizer, losses = torch.optim.AdamW(net.parameters()), []
    for step in range(40):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 40)
        losses.append(kprpe.dfa_loss(found := net(image), target, net.priors))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 10
    assert kprpe.nme(found.landmarks, target).max() < 0.08 and kprpe.nme(found.best, target).max() < 0.08
    assert found.score.min() > 0.9
    # NME: mean distance over sqrt(w h) of the box
    box, five = target.box[0].tolist(), zip(found.landmarks[0].tolist(), target.landmarks[0].tolist())
    expected = sum(math.dist(p, q) for p, q in five) / 5 / math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    assert kprpe.nme(found.landmarks, target)[0].item() == pytest.approx(expected, rel=1e-5)


# ---- Alignment -----------------------------------------------------------------------------------

def slow_similarity(src, dst):
    """[a -b; b a] p + t = q by least squares over all coordinates."""
    rows, right = [], []
    for (x, y), (u, v) in zip(src, dst):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        right += [u, v]
    a, b, tx, ty = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0]
    return np.array([[a, -b, tx], [b, a, ty]])


def test_alignment_is_the_least_squares_similarity_and_one_warp():
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.uniform(-1, 1, (140, 160, 3)).astype(np.float32), (0, 0), 2)
    points = (CANONICAL.numpy() * [100, 110] + 20 + rng.normal(0, 3, (5, 2)))
    m = slow_similarity(points, datasets.ARCFACE_5)
    expected = cv2.warpAffine(image, m, (112, 112), flags=cv2.INTER_LINEAR, borderValue=(-1, -1, -1))
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    landmarks = torch.from_numpy((points + 0.5) / [160, 140])[None].float()
    aligned = kprpe.align_112(batch, landmarks)
    assert aligned.shape == (1, 3, 112, 112) and aligned.dtype == torch.float32
    assert np.abs(aligned[0].permute(1, 2, 0).numpy() - expected).mean() < 2e-3   # cv2 rounds to 1/32 px


def test_an_aligned_image_stays_as_it_is():
    image = torch.rand(2, 3, 112, 112)
    aligned = kprpe.align_112(image, CANONICAL.float().expand(2, 5, 2))
    torch.testing.assert_close(aligned, image, rtol=0, atol=1e-4)
    for bad, message in ((torch.rand(1, 5, 2), "shape .1, 5, 2. for 2 images"),
                         (torch.ones(2, 5, 2), "5 points, 1 of them distinct")):
        with pytest.raises(ValueError, match=message):
            kprpe.align_112(image, bad)


def test_the_aligned_image_has_a_gradient_to_the_landmarks_and_the_image(net):
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(1, 3, 9, 9, generator=generator, dtype=torch.float64)
    image = F.interpolate(coarse, (120, 130), mode="bicubic")
    weight = torch.rand(1, 3, 112, 112, generator=generator, dtype=torch.float64)
    landmarks = (CANONICAL * 0.8 + 0.1)[None].clone().requires_grad_()
    loss = lambda points: (kprpe.align_112(image, points) * weight).sum()
    loss(landmarks).backward()
    assert landmarks.grad.isfinite().all() and (landmarks.grad.abs().amax(-1) > 1).all()
    for point, axis in ((0, 0), (2, 1), (4, 0)):                              # finite differences
        step = torch.zeros_like(landmarks)
        step[0, point, axis] = 1e-5
        slope = (loss(landmarks + step) - loss(landmarks - step)) / 2e-5
        assert slope.item() == pytest.approx(landmarks.grad[0, point, axis].item(), rel=0.02, abs=2)
    face = synthetic.read_faces("train", 1, 200, 5)[0].image()
    image = (torch.from_numpy(face).permute(2, 0, 1)[None] / 127.5 - 1).requires_grad_()
    kprpe.align_112(image.detach(), net(image).landmarks).sum().backward()    # through the aligner itself
    assert image.grad.isfinite().all() and image.grad.abs().sum() > 0


# ---- Template fusion -----------------------------------------------------------------------------

def slow_fusion(features, template, rule, landmarks, score):
    out = []
    for t in range(max(template) + 1):
        total, count = 0, 0
        for i in (i for i, other in enumerate(template) if other == t):
            norm = math.sqrt(sum(v * v for v in features[i]))
            distance = sum(math.dist(p, q) for p, q in zip(landmarks[i], CANONICAL.tolist())) / 5
            d = (0.2 - min(distance, 0.2)) / 0.2
            weight = {"average": 1, "norm": norm, "landmark": max(d * score[i], 1e-6)}[rule]
            total, count = total + weight * np.array(features[i]) / norm, count + 1
        out.append(total / count)
    return torch.tensor(np.array(out))


@pytest.mark.parametrize("rule", kprpe.FUSIONS)
def test_fusion_is_its_formula(rule):
    generator = torch.Generator().manual_seed(5)
    features = 5 * torch.randn(9, 6, generator=generator, dtype=torch.float64)
    template, score = [0, 2, 1, 0, 0, 2, 1, 3, 3], torch.rand(9, generator=generator)
    landmarks = CANONICAL + 0.1 * torch.randn(9, 5, 2, generator=generator)
    landmarks[7:] += 0.5                                                      # a template of bad images alone
    fused = kprpe.fuse(features, template, rule, landmarks, score)
    expected = slow_fusion(features.tolist(), template, rule, landmarks.tolist(), score.tolist())
    torch.testing.assert_close(fused, F.normalize(expected))
    if rule == "landmark":
        torch.testing.assert_close(fused[3], kprpe.fuse(features, template)[3])
        with pytest.raises(ValueError, match="'landmark': expected one of average, norm, landmark, and"):
            kprpe.fuse(features, template, rule)


def test_own_templates_are_videos(tmp_path):
    face = lambda path, person: datasets.Face(str(tmp_path / path), None, None, person)
    flat = [face(f"{who}/{video}{frame}.jpg", who) for who, videos in dict(B="10", A="3", C="124").items()
            for video in videos for frame in "01"]
    found = kprpe.own_templates(flat)
    assert found.template.tolist() == [2, 2, 1, 1, 0, 0, 3, 3, 4, 4, 5, 5]
    assert found.identity.tolist() == [0, 1, 1, 2, 2, 2]
    assert found.gallery.tolist() == [True, True, False, True, False, False]
    deep = [face(f"{p}/v{v}/{f:03d}.jpg", p) for p in "AB" for v in (10, 2) for f in (8, 12)]
    assert kprpe.own_templates(deep).template.tolist() == [1, 1, 0, 0, 3, 3, 2, 2]   # v2 before v10
    deep = [face(f"{p}/v{v}/{p}_{f:03d}.jpg", p) for p in "AB" for v in (1, 2) for f in (8, 12)]
    assert kprpe.own_templates(deep).template.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]   # named after the person
    named = [face(f"X_Y_{v}{f}.jpg", "X_Y") for v in "01" for f in "01"] + [face("Z_00.jpg", "Z")]
    assert kprpe.own_templates(named).template.tolist() == [0, 0, 1, 1, 2]
    drawn = synthetic.read_faces("test", 20, 64, 5)
    assert kprpe.own_templates(drawn).template.tolist() == [i // 5 for i in range(20)]
    with pytest.raises(ValueError, match="found 2 templates of 2 people: expected two people or more"):
        kprpe.own_templates(flat[2:4] + flat[4:6])

    pooled = torch.eye(6)[[0, 1, 1, 2, 1, 2]]                                # C's second video looks like B
    ranks = kprpe.identify_templates(pooled, found, (1, 2, 3))
    assert ranks == {k: pytest.approx(v) for k, v in metrics.rank_k(
        pooled[[2, 4, 5]], [1, 2, 2], pooled[[0, 1, 3]], [0, 1, 2], (1, 2, 3)).items()}
    assert ranks[1] == pytest.approx(2 / 3)


# ---- Keypoints of crops and images ---------------------------------------------------------------

class Still(torch.nn.Module):
    """An aligner that finds the same places in every crop, and remembers what it was shown."""
    size, priors = 64, torch.zeros(1)
    five = CANONICAL.float() * 0.5 + 0.25
    box = torch.tensor([0.3, 0.25, 0.7, 0.75])

    def forward(self, image):
        self.seen = image
        fused = torch.cat([self.box, torch.zeros(2), self.five.flatten()]).expand(len(image), -1)
        return kprpe.Found(self.five.expand(len(image), 5, 2), None, None, None, fused, None, None, None)


def test_a_face_is_found_in_its_box_and_in_a_whole_image():
    y, x = np.mgrid[:180, :240]
    image = np.stack([x, y, 0 * x], -1).astype(np.uint8)                     # red tells x, green y
    net, five, centre = Still(), Still.five.numpy(), np.array([110, 90])
    points = kprpe.find_face(net, image, np.array([70, 60, 150, 120.0]))
    np.testing.assert_allclose(points, centre + (five - 0.5) * 1.2 * 80, atol=1e-3)
    for x, y in ((32, 20), (8, 40)):                                         # what is where in its crop
        expected = (np.array([x, y]) - 31.5) * 1.2 * 80 / 64 + centre
        np.testing.assert_allclose((net.seen[0, :2, y, x] + 1) * 127.5, expected, atol=1)
    # The whole image is a square of its longer side; the box in it, then the five points about that.
    points = kprpe.find_face(net, image, None)
    low, high = (Still.box.view(2, 2).numpy() - 0.5) * 240 + [119.5, 89.5]
    np.testing.assert_allclose(points, (low + high) / 2 + (five - 0.5) * 1.2 * (high - low).max(), atol=1e-2)
    assert net.seen.shape == (1, 3, 64, 64) and net.seen.abs().max() <= 1


SMALL = ["--device", "cpu", "--workers", "0", "--limit", "40", "--size", "32", "--dim", "16", "--depth", "2",
         "--heads", "2", "--epochs", "1", "--batch-size", "8", "--also-rpe", "", "--align-steps", "0"]


class Seen(nn.Module):
    """An "embedding" that is what the network is given."""

    def forward(self, image, points):
        return torch.cat([image.flatten(1), points.flatten(1)], 1)


@pytest.mark.parametrize("draw", [False, True])
def test_keypoints_of_a_crop_and_of_its_mirror_image_are_found(monkeypatch, draw):
    args = kprpe.parse_args([*SMALL, "--dfa", "x", *["--draw-keypoints"] * draw])
    shown, generator = [], torch.Generator().manual_seed(0)
    found = [torch.rand(2, 5, 2, generator=generator) * 31 for _ in range(2)]

    def detect(path, image):
        assert path == "x"
        shown.append(image)
        return found[len(shown) - 1], torch.tensor([0.25, 0.5])

    monkeypatch.setattr(kprpe, "detect", detect)
    batch = {"image": torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8), "index": torch.arange(2)}
    for noise in (0.0, 0.1):
        shown.clear()
        out = kprpe.embed(Seen(), kprpe.Arm(range(2), [batch], [], noise=noise), args, torch.device("cpu"))
        image = batch["image"].permute(0, 3, 1, 2).float()
        assert torch.equal(shown[0], image) and torch.equal(shown[1], image.flip(3))   # before dots are drawn
        views = [kprpe.inputs(pixels, points, draw) for pixels, points in zip(shown, found)]
        views = [(pixels, kprpe.disturb(points, batch["index"], noise)) for pixels, points in views]
        torch.testing.assert_close(out.features, sum(Seen()(*view) for view in views))
        torch.testing.assert_close(out.keypoints, views[0][1])
        assert out.score.tolist() == [0.25, 0.5]


# ---- Whole runs ----------------------------------------------------------------------------------

DFA = ["--task", "dfa", "--device", "cpu", "--workers", "0", "--limit", "10", "--size", "64", "--epochs", "2",
       "--batch-size", "4", "--eval-every", "1"]


def go(*flags):
    return kprpe.main(kprpe.parse_args([str(flag) for flag in flags]))


def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the aligner: its folder and its scores."""
    folder = tmp_path_factory.mktemp("dfa") / "run"
    return folder, go(*DFA, "--output", folder)


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_of_the_aligner_is_evaluated_continued_and_used(run, tmp_path, monkeypatch, capsys):
    folder, scores = run
    assert {"aligned.png", "ced.png", "last.pt", "log.jsonl"} <= {path.name for path in folder.iterdir()}
    assert scores == {key: logged(folder)[-1][key] for key in kprpe.ERRORS}
    flags = ["--task", "dfa", "--device", "cpu"]
    again = go(*flags, "--eval", folder / "last.pt", "--output", tmp_path / "eval")
    assert again == {key: pytest.approx(value, abs=1e-6) for key, value in scores.items()}
    assert (tmp_path / "eval" / "aligned.png").exists()
    assert f"NME by the box: {scores['nme']:.4f}" in capsys.readouterr().out

    original = kprpe.save                                                    # killed, and taken up again

    def dies(path, **state):
        original(path, **state)
        raise KeyboardInterrupt

    monkeypatch.setattr(kprpe, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        go(*DFA, "--output", tmp_path / "cut")
    monkeypatch.setattr(kprpe, "save", original)
    go(*flags, "--resume", "--output", tmp_path / "cut")
    whole, cut = state_of(folder), state_of(tmp_path / "cut")
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())
    moments = [[value for part in state["optimizer"]["state"].values() for value in part.values()]
               for state in (whole, cut)]
    assert all(map(torch.equal, *moments)) and len(moments[0]) == len(moments[1]) > 300
    timed = ("minutes", "images_per_second")
    drop = lambda row: {key: value for key, value in row.items() if key not in timed}
    assert list(map(drop, logged(folder))) == list(map(drop, logged(tmp_path / "cut")))

    photo = synthetic.read_faces("test", 1, 90, 5)[0].image()
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), photo[..., ::-1])
    go(*flags, "--weights", folder / "last.pt", "--predict", tmp_path / "in", "--box", "20,20,70,80",
       "--output", tmp_path / "out")
    points = kprpe.find_face(kprpe.open_dfa(str(folder / "last.pt"), torch.device("cpu"))[0], photo,
                             np.array([20, 20, 70, 80.0]))
    np.testing.assert_allclose(datasets.read_pts(tmp_path / "out" / "a.pts"), points, atol=1e-3)
    aligned = cv2.imread(str(tmp_path / "out" / "a.png"))[..., ::-1]
    expected = kprpe.align_112(torch.tensor(photo).permute(2, 0, 1)[None].float(),
                               torch.tensor((points + 0.5) / 90)[None], 127.0)[0].permute(1, 2, 0)
    assert aligned.shape == (112, 112, 3) and np.abs(aligned - expected.numpy()).mean() < 2


def test_faces_without_landmarks_are_trained_on(tmp_path):
    """A tree of WIDER FACE, a third of whose faces have none."""
    (tmp_path / "train" / "images").mkdir(parents=True)
    text = ""
    for i, face in enumerate(synthetic.read_faces("train", 24, 48, 5)):
        cv2.imwrite(str(tmp_path / "train" / "images" / f"face{i}.jpg"), face.image()[..., ::-1])
        x0, y0, x1, y1 = face.box
        points = "".join(f" {x} {y} 0" for x, y in face.points.tolist()) if i % 3 else 5 * " -1 -1 -1"
        text += f"# face{i}.jpg\n{x0} {y0} {x1 - x0} {y1 - y0}{points} 0.5\n"
    (tmp_path / "train" / "label.txt").write_text(text)
    scores = go(*DFA, "--data", "widerface", "--data-root", tmp_path, "--epochs", "1", "--limit", "20",
                "--output", tmp_path / "run")
    assert all(np.isfinite(value) for value in scores.values())


def one_of_two(rank, folder):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2")                       # as torchrun sets them
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    go(*DFA, "--epochs", "1", "--output", f"{folder}/run")
    os._exit(0)  # the exit of a Python that has had gloo's threads aborts now and then on a busy machine


def test_the_aligner_learns_in_two_processes(tmp_path):
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    assert state_of(tmp_path / "run")["world"] == 2
    row = logged(tmp_path / "run")[0]
    scores = go("--task", "dfa", "--device", "cpu", "--eval", tmp_path / "run" / "last.pt")
    assert scores == {key: pytest.approx(row[key], abs=1e-6) for key in kprpe.ERRORS}


def test_a_network_learns_with_found_keypoints_and_templates_are_fused(run, tmp_path, monkeypatch):
    path, original, seen = str(run[0] / "last.pt"), kprpe.detect, []
    monkeypatch.setattr(kprpe, "detect", lambda path, image: (seen.append(len(image)),
                                                                original(path, image))[1])
    scores = go(*SMALL, "--dfa", path, "--fusion", "average,norm,landmark", "--keypoint-noise", "0.1",
                "--output", tmp_path / "run", "--align-steps", "2")
    assert {f"rank{k}{arm}@{rule}" for k in (1, 5) for arm in ("", "@unaligned", "@noise0.1")
            for rule in kprpe.FUSIONS} <= scores.keys()
    assert seen[:5] == 5 * [8] and seen[5] == 40                             # five steps, then the test set
    state = state_of(tmp_path / "run")
    assert state["args"]["dfa"] == path and not any("priors" in name for name in state["model"])
    # Annotated keypoints for the same network; a fusion that is not asked for is not made.
    again = go("--device", "cpu", "--eval", tmp_path / "run" / "last.pt", "--align-steps", "2")
    assert again == {key: scores[key] for key in again} and "rank1@average" not in again
    count = len(seen)
    go("--device", "cpu", "--eval", tmp_path / "run" / "last.pt", "--dfa=", "--fusion", "landmark",
       "--align-steps", "0")
    assert len(seen) == count

    photo = synthetic.read_faces("test", 1, 64, 5)[0].image()
    cv2.imwrite(str(tmp_path / "photo.png"), photo[..., ::-1])               # no .pts beside it
    go("--device", "cpu", "--weights", tmp_path / "run" / "last.pt", "--predict", tmp_path / "photo.png",
       "--output", tmp_path / "out")
    points = kprpe.find_face(kprpe.open_dfa(path, torch.device("cpu"))[0], photo, None)
    np.testing.assert_allclose(datasets.read_pts(tmp_path / "out" / "photo.pts"), points, atol=1e-3)

    for folder in ("train", "test"):                                         # people without landmarks
        for i in range(8):
            place = tmp_path / "set" / folder / f"p{i // 4}"
            place.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(place / f"{i // 2}{i % 2}.png"), photo)
    scores = go(*SMALL, "--data", "folder", "--data-root", tmp_path / "set", "--dfa", path, "--fusion",
                "landmark", "--output", tmp_path / "bare")
    assert "rank1@landmark" in scores
    # The templates of another folder, by the network of the drawn faces
    scores = go("--device", "cpu", "--eval", tmp_path / "run" / "last.pt", "--data", "folder", "--data-root",
                tmp_path / "set", "--fusion", "average,norm,landmark", "--align-steps", "0")
    assert {f"rank1@{rule}" for rule in kprpe.FUSIONS} <= scores.keys()


def test_checkpoints_that_are_no_aligner(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint none.pt of a face aligner: give --dfa"):
        go(*SMALL, "--dfa", "none.pt", "--output", tmp_path / "no")
    go(*SMALL, "--output", tmp_path / "face")
    with pytest.raises(ValueError, match="last.pt is a checkpoint of --task face, not dfa"):
        go(*SMALL, "--dfa", tmp_path / "face" / "last.pt", "--output", tmp_path / "no")
    with pytest.raises(FileNotFoundError, match="no checkpoint none.pt of a face aligner"):
        go("--device", "cpu", "--weights", tmp_path / "face" / "last.pt", "--predict", tmp_path, "--dfa",
           "none.pt", "--output", tmp_path / "no")
    with pytest.raises(ValueError, match="last.pt is a checkpoint of --task dfa, not face"):
        go("--device", "cpu", "--eval", run[0] / "last.pt")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("flags, message", [
    ("--task dfa --rpe none", "--rpe does not belong to --task dfa"),
    ("--task dfa --dfa x", "--dfa does not belong to --task dfa"),
    ("--task dfa --size 80", "--size 80: expected a multiple of 32"),
    ("--task dfa --data affnist", "invalid choice: 'affnist'"),
    ("--fusion average,best", "--fusion average,best: expected some of average, norm, landmark"),
    ("--data affnist --data-root x --dfa x", "--dfa is for faces, not for --data affnist"),
])
def test_flags_that_cannot_be_meant(flags, message, capsys):
    with pytest.raises(SystemExit):
        kprpe.parse_args(flags.split())
    assert message in capsys.readouterr().err


def test_presets_are_the_supplements():
    args = kprpe.parse_args(["--task", "dfa", "--data", "widerface", "--data-root", "x"])
    assert (args.size, args.batch_size, args.epochs, args.box) == (160, 320, 750, "face")
