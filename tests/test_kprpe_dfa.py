"""Face aligner and template fusion of kprpe.py against slow loops, closed forms and differences."""
import itertools
import json
import math
import zlib
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kprpe
from common import UserError, datasets, metrics, synthetic

torch.set_num_threads(1)
cv2.setNumThreads(1)

CANONICAL = (torch.as_tensor(datasets.ARCFACE_5) + 0.5) / 112


# ---- Network -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return kprpe.DFA().eval()


def slow_priors(size):
    rows = []
    for stride, sides in ((8, (64, 80)), (16, (96, 112)), (32, (128, 144))):
        cells = range(size // stride)
        for row, column, side in itertools.product(cells, cells, sides):
            rows.append([(column + 0.5) * stride, (row + 0.5) * stride, side, side])
    return torch.tensor(rows) / size


def test_anchors_are_their_formula():
    assert kprpe.prior_boxes(160).shape == (1050, 4)
    for size in (32, 96, 160):
        torch.testing.assert_close(kprpe.prior_boxes(size), slow_priors(size))
    for size in (0, 100):
        with pytest.raises(ValueError, match=f"image of {size} px: expected a multiple of 32"):
            kprpe.DFA(size)


def test_the_code_of_boxes_and_points_is_its_formula_and_goes_back():
    torch.manual_seed(0)
    priors = kprpe.prior_boxes()[::97]
    low, size = torch.rand(len(priors), 2) * 0.4, torch.rand(len(priors), 2) * 0.6 + 0.1
    boxes = torch.cat([low, low + size], 1)
    points = torch.rand(len(priors), 5, 2) * 1.4 - 0.2
    encoded_boxes = kprpe.encode_boxes(boxes, priors)
    encoded_points = kprpe.encode_points(points, priors)
    for i, (cx, cy, w, h) in enumerate(priors.tolist()):
        x0, y0, x1, y1 = boxes[i].tolist()
        row = [((x0 + x1) / 2 - cx) / (0.1 * w), ((y0 + y1) / 2 - cy) / (0.1 * h),
               math.log((x1 - x0) / w) / 0.2, math.log((y1 - y0) / h) / 0.2]
        torch.testing.assert_close(encoded_boxes[i], torch.tensor(row), rtol=1e-4, atol=1e-5)
        row = [[(x - cx) / (0.1 * w), (y - cy) / (0.1 * h)] for x, y in points[i].tolist()]
        row = torch.tensor(row).flatten()
        torch.testing.assert_close(encoded_points[i], row, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kprpe.decode_boxes(encoded_boxes, priors), boxes)
    torch.testing.assert_close(kprpe.decode_points(encoded_points, priors), points)


def test_size_and_operations_are_those_of_table_9(net):
    """0.49 M parameters and 0.14 GFLOP: two for each product, two for each output of a batch norm,
    five of a layer norm, one of an activation and of a convolution's bias."""
    assert sum(p.numel() for p in net.parameters()) == 486_775
    for name, size in dict(body=213_072, fpn=103_040, ssh1=34_752, aggregation=60_167).items():
        assert sum(p.numel() for p in getattr(net, name).parameters()) == size
    each = {nn.BatchNorm2d: 2, nn.LayerNorm: 5, nn.LeakyReLU: 1, nn.GELU: 1, kprpe.SSH: 1}
    counts = []

    def count(module, _, out):
        if isinstance(module, nn.Conv2d):
            bias = module.bias is not None
            counts.append(out.numel() * (2 * module.weight[0].numel() + bias))
        elif isinstance(module, nn.Linear):
            counts.append(out.numel() * 2 * module.in_features)
        elif type(module) in each:
            counts.append(out.numel() * each[type(module)])

    hooks = [module.register_forward_hook(count) for module in net.modules()]
    with torch.inference_mode():
        net(torch.zeros(1, 3, 160, 160))
    for hook in hooks:
        hook.remove()
    assert sum(counts) / 1e9 == pytest.approx(0.1402, abs=5e-5)


def slow_mixer(blocks, last, x):
    """Mixer blocks on the anchors x (N, 16) of one image, a row or column at a time."""
    def mlp(layers, v):
        hidden = layers[0].weight @ v + layers[0].bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return layers[2].weight @ hidden + layers[2].bias

    def norm(layer, x):
        centred = x - x.mean(1, keepdim=True)
        spread = (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return centred / spread * layer.weight + layer.bias

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
            points = [(cx, cy)[i % 2] + 0.1 * t * w
                      for i, t in enumerate(found.points[b, n].tolist())]
            rows.append([x - w2, y - h2, x + w2, y + h2, *found.logits[b, n].tolist(), *points])
        O = torch.tensor(rows)  # Eq. (13)
        weights = slow_mixer(net.aggregation[:3], net.aggregation[3], O).softmax(0)  # Eq. (14)
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
    hooks = []
    heads = dict(logits=net.ClassHead, boxes=net.BboxHead, points=net.LandmarkHead)
    for kind, level in itertools.product(heads, range(3)):
        hooks.append(heads[kind][level].conv1x1.register_forward_hook(
            lambda module, given, out, key=(kind, level): maps.update({key: out})))
    found = net(torch.rand(1, 3, 160, 160))
    for hook in hooks:
        hook.remove()
    for kind, width in (("logits", 2), ("boxes", 4), ("points", 10)):
        for level, start, cells in ((0, 0, 20), (1, 800, 10), (2, 1000, 5)):
            for y, x, a in ((0, 1, 0), (3, 2, 1), (4, 4, 0)):
                row = getattr(found, kind)[0, start + 2 * (y * cells + x) + a]
                own = maps[kind, level][0, a * width:(a + 1) * width, y, x]
                torch.testing.assert_close(row, own)


@torch.no_grad()
def test_images_of_other_sizes_are_resized(net):
    """A blob stays at its place, in units of the image, through every size."""
    seen = []
    hook = net.body.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    for side in (320, 90, 112, 160):
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        dot = torch.exp(-((x - 0.3 * side) ** 2 + (y - 0.6 * side) ** 2) / (0.05 * side) ** 2)
        image = 2 * dot.expand(1, 3, -1, -1) - 1
        net(image)
        assert seen[-1].shape == (1, 3, 160, 160)
        mass = (seen[-1][0, 0] + 1) / (seen[-1][0, 0] + 1).sum()
        place = (torch.arange(160) + 0.5) / 160
        centre = torch.stack([mass.sum(0) @ place, mass.sum(1) @ place])
        expected = torch.tensor([0.3, 0.6]) + 0.5 / side
        torch.testing.assert_close(centre, expected, rtol=0, atol=1e-4)
    hook.remove()
    assert torch.equal(seen[-1], image)
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


# ---- Loss ----------------------------------------------------------------------------------------

def slow_overlap(box, prior):
    cx, cy, w, h = prior
    both = 1
    for i, (low, high) in enumerate([(cx - w / 2, cx + w / 2), (cy - h / 2, cy + h / 2)]):
        both *= max(0, min(box[i + 2], high) - max(box[i], low))
    return both / ((box[2] - box[0]) * (box[3] - box[1]) + w * h - both)


def slow_match(box, priors):
    overlaps = [slow_overlap(box, prior) for prior in priors]
    top = max(range(len(priors)), key=overlaps.__getitem__)
    return [o >= 0.35 or (i == top and o >= 0.2) for i, o in enumerate(overlaps)]


def draw_case():
    """Four faces: two with landmarks, one without, one that only a single anchor meets."""
    torch.manual_seed(3)
    box = torch.tensor([[0.1, 0.08, 0.93, 0.9], [0.3, 0.2, 0.8, 0.75], [0.2, 0.25, 0.7, 0.8],
                        [0.4, 0.4, 0.6, 0.63]])
    landmarks = torch.rand(4, 5, 2)
    landmarks[2] = torch.nan
    raw = [torch.randn(4, 1050, width).requires_grad_() for width in (4, 2, 10)]
    fused = torch.randn(4, 16).requires_grad_()
    found = kprpe.Found(None, fused[:, 0], None, None, fused, *raw)
    return kprpe.prior_boxes(), box, landmarks, found


def test_anchors_are_matched_by_the_rule():
    priors, box, _, _ = draw_case()
    found = kprpe.match(box, priors)
    for row, own in zip(found.tolist(), box.tolist()):
        assert row == slow_match(own, priors.tolist())
    assert found[3].sum() == 1 and found[0].sum() > 10  # the small one's best anchor
    assert not kprpe.match(torch.tensor([[0.5, 0.5, 0.51, 0.51]]), priors).any()


def slow_smooth_l1(a, b):
    total = 0
    for x, y in zip(a.flatten().tolist(), b.flatten().tolist()):
        total += 0.5 * (x - y) ** 2 if abs(x - y) < 1 else abs(x - y) - 0.5
    return total


def slow_multibox(found, boxes, landmarks, priors):
    face, box, points, count, known = 0, 0, 0, 0, 0
    for b in range(len(boxes)):
        positive = slow_match(boxes[b].tolist(), priors.tolist())
        entropy = []
        for (x, y), p in zip(found.logits[b].tolist(), positive):
            entropy.append(math.log(math.exp(x) + math.exp(y)) - (y if p else x))
        negative = sorted((e for e, p in zip(entropy, positive) if not p), reverse=True)
        face += sum(e for e, p in zip(entropy, positive) if p) + sum(negative[:7 * sum(positive)])
        for i in np.flatnonzero(positive):
            count += 1
            box += slow_smooth_l1(found.boxes[b, i], kprpe.encode_boxes(boxes[b], priors[i]))
            if landmarks[b].isfinite().all():
                known += 1
                own = kprpe.encode_points(landmarks[b], priors[i])
                points += slow_smooth_l1(found.points[b, i], own)
    return face / count, box / count, points / known


def test_losses_are_their_formulas():
    priors, box, landmarks, found = draw_case()
    multibox = kprpe.multibox_loss(found, box, landmarks, priors)
    assert [x.item() for x in multibox] == pytest.approx(
        slow_multibox(found, box, landmarks, priors), rel=1e-4)
    entropy, places, points = 0, 0, 0
    for b in range(4):
        x, y = found.fused[b, 4:6].tolist()
        entropy += (math.log(math.exp(x) + math.exp(y)) - y) / 4
        places += slow_smooth_l1(found.fused[b, :4], box[b]) / 4
        if b != 2:
            points += slow_smooth_l1(found.fused[b, 6:], landmarks[b]) / 3
    fused = kprpe.aggregation_loss(found, box, landmarks)
    assert [x.item() for x in fused] == pytest.approx([entropy, places, points], rel=1e-4)

    total = kprpe.dfa_loss(found, box, landmarks, priors)
    parts = zip((1, 2, 1, 1, 60, 30), (*multibox, *fused))
    torch.testing.assert_close(total, sum(weight * part for weight, part in parts))
    total.backward()  # nan landmarks: no nan comes through
    for tensor in (found.fused, found.boxes, found.logits, found.points):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0
    assert not found.points.grad[2].any()


def test_targets_follow_crop_and_mirror():
    faces = []
    for i in range(2):
        points = 20 + 40 * np.random.default_rng(i).random((5, 2)).astype(np.float32)
        image = np.zeros((90, 100, 3), np.uint8)
        faces.append(datasets.Face(image, points, (10.0, 15.0, 60.0, 75.0)))
    faces[1].points[:] = np.nan  # as WIDER FACE has it
    plain = kprpe.dfa_dataset(faces)
    mirror = kprpe.dfa_dataset(faces, augment=lambda rng, size: (np.eye(2, 3), True, {}))
    keys = [(0, 0), (0, 1)]
    box, landmarks = kprpe.targets(plain.__getitems__(keys)["points"], 160)
    mirrored_box, mirrored = kprpe.targets(mirror.__getitems__(keys)["points"], 160)
    # The square about the box is 1.2 times its longer side.
    scale = 160 / (1.2 * 60)
    torch.testing.assert_close((box[0, 2:] - box[0, :2]) * 160, torch.tensor([50.0, 60]) * scale)
    expected = torch.tensor((faces[0].points - [35, 45]) * scale + 80) / 160
    torch.testing.assert_close(landmarks[0], expected.float(), rtol=0, atol=1e-5)
    expected = (landmarks[0] * torch.tensor([-1, 1]) + torch.tensor([1, 0]))[[1, 0, 2, 4, 3]]
    torch.testing.assert_close(mirrored[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(mirrored_box, box, rtol=0, atol=1e-5)  # in the middle of its crop
    assert landmarks[1].isnan().all() and mirrored[1].isnan().all()
    for points in (None, np.zeros((7, 2), np.float32)):
        with pytest.raises(UserError, match="the aligner learns from "):
            kprpe.dfa_dataset([replace(faces[0], points=points)])
    with pytest.raises(UserError, match="--box face finds a box of 0 px"):
        kprpe.dfa_dataset([replace(faces[0], box=None)])


def test_it_learns_a_few_drawn_faces():
    torch.manual_seed(0)
    data = kprpe.dfa_dataset(synthetic.read_faces("train", 4, 64, 5), 64)
    batch = data.__getitems__(datasets.in_order(4, 4)[0])
    image = batch["image"].permute(0, 3, 1, 2) / 127.5 - 1
    box, landmarks = kprpe.targets(batch["points"], 64)
    net = kprpe.DFA(64)
    optimizer = torch.optim.AdamW(net.parameters())
    losses = []
    for step in range(40):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 40)
        found = net(image)
        losses.append(kprpe.dfa_loss(found, box, landmarks, net.priors))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 10 and found.score.min() > 0.9
    side = (box[:, 2:] - box[:, :2]).prod(1).sqrt()
    assert metrics.nme(found.landmarks, landmarks, side).max() < 0.08
    assert metrics.nme(found.best, landmarks, side).max() < 0.08


def test_errors_are_over_the_root_of_the_boxes_area():
    """`evaluate_dfa` of an aligner that always finds one place, and the constant answer."""
    faces = synthetic.read_faces("test", 3, 64, 5)
    data = kprpe.dfa_dataset(faces, 64)
    mean = torch.rand(5, 2)
    args = kprpe.parse_args(["--task", "dfa", "--device", "cpu", "--size", "64"])
    net = Still()
    batches = [data.__getitems__([(0, i)]) for i in range(3)]
    scores, errors = kprpe.evaluate_dfa(net, mean, batches, args)
    for name, answer in (("nme", net.five), ("nme@best", net.five + 0.1), ("nme@mean", mean)):
        for i, face in enumerate(faces):
            matrix = data.crop_matrices[i]
            points = face.points.astype(float) @ matrix[:, :2].T.numpy() + matrix[:, 2].numpy()
            places = (torch.from_numpy(points) + 0.5) / 64
            x0, y0, x1, y1 = face.box
            side = math.sqrt((x1 - x0) * (y1 - y0)) * matrix[0, 0] / 64
            expected = (places - answer).norm(dim=1).mean() / side
            assert errors[name][i].item() == pytest.approx(expected.item(), rel=1e-4)
        assert scores[name] == pytest.approx(errors[name].mean().item())


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
    image = rng.uniform(-1, 1, (140, 160, 3)).astype(np.float32)
    image = cv2.GaussianBlur(image, (0, 0), 2)
    points = CANONICAL.numpy() * [100, 110] + 20 + rng.normal(0, 3, (5, 2))
    expected = cv2.warpAffine(image, slow_similarity(points, datasets.ARCFACE_5), (112, 112),
                              flags=cv2.INTER_LINEAR, borderValue=(-1, -1, -1))
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    landmarks = torch.from_numpy((points + 0.5) / [160, 140])[None].float()
    aligned = kprpe.align_112(batch, landmarks)
    assert aligned.shape == (1, 3, 112, 112) and aligned.dtype == torch.float32
    error = np.abs(aligned[0].permute(1, 2, 0).numpy() - expected).mean()
    assert error < 2e-3  # cv2 rounds to 1/32 px


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

    def loss(points):
        return (kprpe.align_112(image, points) * weight).sum()

    loss(landmarks).backward()
    assert landmarks.grad.isfinite().all() and (landmarks.grad.abs().amax(-1) > 1).all()
    for point, axis in ((0, 0), (2, 1), (4, 0)):  # finite differences
        step = torch.zeros_like(landmarks)
        step[0, point, axis] = 1e-5
        slope = (loss(landmarks + step) - loss(landmarks - step)).item() / 2e-5
        assert slope == pytest.approx(landmarks.grad[0, point, axis].item(), rel=0.02, abs=2)
    face = synthetic.read_faces("train", 1, 200, 5)[0].image()
    image = (torch.from_numpy(face).permute(2, 0, 1)[None] / 127.5 - 1).requires_grad_()
    kprpe.align_112(image.detach(), net(image).landmarks).sum().backward()  # through the aligner
    assert image.grad.isfinite().all() and image.grad.abs().sum() > 0


# ---- Template fusion -----------------------------------------------------------------------------

def slow_fusion(features, template, rule, landmarks, score):
    out = []
    for t in range(max(template) + 1):
        total, count = 0, 0
        for i in np.flatnonzero(np.array(template) == t):
            norm = math.sqrt(sum(v * v for v in features[i]))
            distances = [math.dist(p, q) for p, q in zip(landmarks[i], CANONICAL.tolist())]
            d = (0.2 - min(sum(distances) / 5, 0.2)) / 0.2
            weight = {"average": 1, "norm": norm, "landmark": max(d * score[i], 1e-6)}[rule]
            total = total + weight * np.array(features[i]) / norm
            count += 1
        out.append(total / count)
    return torch.tensor(np.array(out))


@pytest.mark.parametrize("rule", kprpe.FUSIONS)
def test_fusion_is_its_formula(rule):
    generator = torch.Generator().manual_seed(5)
    features = 5 * torch.randn(9, 6, generator=generator, dtype=torch.float64)
    template, score = [0, 2, 1, 0, 0, 2, 1, 3, 3], torch.rand(9, generator=generator)
    landmarks = CANONICAL + 0.1 * torch.randn(9, 5, 2, generator=generator)
    landmarks[7:] += 0.5  # a template of bad images alone
    fused = kprpe.fuse(features, template, rule, landmarks, score)
    expected = slow_fusion(features.tolist(), template, rule, landmarks.tolist(), score.tolist())
    torch.testing.assert_close(fused, F.normalize(expected))
    if rule == "landmark":
        torch.testing.assert_close(fused[3], kprpe.fuse(features, template)[3])
        with pytest.raises(ValueError, match="'landmark': expected one of average, norm, landmark"):
            kprpe.fuse(features, template, rule)


@pytest.mark.parametrize("names, expected", [
    (["B/10", "B/11", "B/00", "A/31", "C/11", "C/20", "C/21"], [2, 2, 1, 0, 3, 4, 4]),
    (["A/v10/8", "A/v2/8", "A/v2/12", "B/v1/0"], [1, 0, 0, 2]),  # v2 before v10
    (["A/v1/A_08", "A/v1/A_12", "A/v2/A_08", "B/v1/B_1"], [0, 0, 1, 2]),
    (["X_Y_00", "X_Y_01", "X_Y_10", "Z_00"], [0, 0, 1, 2])])
def test_own_templates_are_videos(tmp_path, names, expected):
    people = [name.split("/")[0] if "/" in name else name.rsplit("_", 1)[0] for name in names]
    faces = [datasets.Face(str(tmp_path / f"{name}.jpg"), None, None, person)
             for name, person in zip(names, people)]
    found = kprpe.own_templates(faces)
    assert found.template.tolist() == expected
    assert [sorted(set(people))[found.identity[t]] for t in expected] == people
    first = [True] + (np.diff(found.identity) > 0).tolist()
    assert found.gallery.tolist() == first


def test_templates_of_drawn_faces_are_identified():
    drawn = synthetic.read_faces("test", 20, 64, 5)
    found = kprpe.own_templates(drawn)
    assert found.template.tolist() == [i // 5 for i in range(20)]
    assert found.identity.tolist() == [0, 0, 1, 1] and found.gallery.tolist() == [1, 0, 1, 0]
    pooled = torch.eye(4)[[0, 0, 1, 0]]  # the second one's other video looks like the first one
    assert kprpe.identify_templates(pooled, found, (1, 2)) == {1: 0.5, 2: 1.0}
    with pytest.raises(UserError, match="found 2 templates of 1 people: expected two people"):
        kprpe.own_templates(drawn[:10])


# ---- Faces of images -----------------------------------------------------------------------------

class Still(nn.Module):
    """An aligner that finds the same places in every crop, and remembers what it was shown."""
    size = 64
    published = False
    priors = torch.zeros(1)
    five = CANONICAL.float() * 0.5 + 0.25
    box = torch.tensor([0.3, 0.25, 0.7, 0.75])

    def forward(self, image):
        self.seen = image
        fused = torch.cat([self.box, torch.zeros(2), self.five.flatten()]).expand(len(image), -1)
        five = self.five.expand(len(image), 5, 2)
        return kprpe.Found(five, None, five + 0.1, None, fused, None, None, None)


def test_a_face_is_found_in_its_box_and_in_a_whole_image():
    y, x = np.mgrid[:180, :240]
    image = np.stack([x, y, 0 * x], -1).astype(np.uint8)  # red tells x, green y
    net, five, centre = Still(), Still.five.numpy(), np.array([110, 90])
    points = kprpe.find_face(net, image, np.array([70, 60, 150, 120.0]))
    np.testing.assert_allclose(points, centre + (five - 0.5) * 1.2 * 80, atol=1e-3)
    for x, y in ((32, 20), (8, 40)):  # what is where in its crop
        expected = (np.array([x, y]) - 31.5) * 1.2 * 80 / 64 + centre
        np.testing.assert_allclose((net.seen[0, :2, y, x] + 1) * 127.5, expected, atol=1)
    # The whole image is a square of its longer side; the box in it, then the five points in that.
    points = kprpe.find_face(net, image, None)
    low, high = (Still.box.view(2, 2).numpy() - 0.5) * 240 + [119.5, 89.5]
    expected = (low + high) / 2 + (five - 0.5) * 1.2 * (high - low).max()
    np.testing.assert_allclose(points, expected, atol=1e-2)
    assert net.seen.shape == (1, 3, 64, 64) and net.seen.abs().max() <= 1


# ---- Whole runs ----------------------------------------------------------------------------------

DFA = ["--task", "dfa", "--device", "cpu"]
TINY = [*DFA, "--limit", "10", "--size", "64", "--epochs", "2", "--batch-size", "4"]


def go(*flags):
    return kprpe.main(kprpe.parse_args([str(flag) for flag in flags]))


def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def aligner(tmp_path_factory):
    """A run of the aligner: its folder and its scores."""
    folder = tmp_path_factory.mktemp("dfa") / "run"
    return folder, go(*TINY, "--output", folder)


def test_a_run_is_evaluated_continued_and_used(aligner, tmp_path, monkeypatch, capsys):
    folder, scores = aligner
    files = {path.name for path in folder.iterdir()}
    assert {"aligned.png", "ced.png", "last.pt", "log.jsonl"} <= files
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert scores == {key: last[key] for key in ("nme", "nme@best", "nme@mean")}
    again = go(*DFA, "--eval", folder / "last.pt", "--output", tmp_path / "eval")
    assert again == pytest.approx(scores, abs=1e-6)
    assert (tmp_path / "eval" / "aligned.png").exists()
    assert f"NME by the box: {scores['nme']:.4f}" in capsys.readouterr().out

    save = kprpe.run.Job.save

    def dies(job, *given, **more):  # killed after the first epoch, and taken up again
        save(job, *given, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kprpe.run.Job, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            go(*TINY, "--output", tmp_path / "cut")
    go(*DFA, "--resume", "--output", tmp_path / "cut")
    whole, cut = state_of(folder), state_of(tmp_path / "cut")
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())

    photo = synthetic.read_faces("test", 1, 90, 5)[0].image()
    cv2.imwrite(str(tmp_path / "a.png"), photo[..., ::-1])
    go(*DFA, "--weights", folder / "last.pt", "--predict", tmp_path / "a.png", "--box",
       "20,20,70,80", "--output", tmp_path / "out")
    net = kprpe.open_dfa(str(folder / "last.pt"), torch.device("cpu"))
    points = kprpe.find_face(net, photo, np.array([20, 20, 70, 80.0]))
    np.testing.assert_allclose(datasets.read_pts(tmp_path / "out" / "a.pts"), points, atol=1e-3)
    aligned = cv2.imread(str(tmp_path / "out" / "a.png"))[..., ::-1]
    expected = kprpe.align_112(torch.tensor(photo).permute(2, 0, 1)[None].float(),
                               torch.tensor((points + 0.5) / 90)[None], 127.0)
    expected = expected[0].permute(1, 2, 0).numpy()
    assert aligned.shape == (112, 112, 3) and np.abs(aligned - expected).mean() < 2


def test_faces_without_landmarks_are_trained_on(tmp_path):
    """A tree of WIDER FACE, a third of whose faces have none; then only these."""
    (tmp_path / "train" / "images").mkdir(parents=True)
    rows = []
    for i, face in enumerate(synthetic.read_faces("train", 24, 48, 5)):
        path = str(tmp_path / "train" / "images" / f"face{i}.jpg")
        cv2.imwrite(path, face.image()[..., ::-1])
        x0, y0, x1, y1 = face.box
        points = "".join(f" {x} {y} 0" for x, y in face.points.tolist())
        if i % 3 == 0:
            points = 5 * " -1 -1 -1"
        rows.append(f"# face{i}.jpg\n{x0} {y0} {x1 - x0} {y1 - y0}{points} 0.5\n")
    table = tmp_path / "train" / "label.txt"
    table.write_text("".join(rows))
    flags = [*TINY, "--data", "widerface", "--data-root", tmp_path, "--epochs", "1"]
    scores = go(*flags, "--output", tmp_path / "run")
    assert all(np.isfinite(value) for value in scores.values())
    tested = [i for i in range(24) if zlib.crc32(f"face{i}.jpg".encode()) % 10 == 0]
    table.write_text("".join(rows[i] for i in range(24) if i in tested or i % 3 == 0))
    with pytest.raises(UserError, match="none of the . training faces has landmarks to learn from"):
        go(*flags, "--output", tmp_path / "none")


def test_presets_are_the_supplements():
    args = kprpe.parse_args(["--task", "dfa", "--data", "widerface", "--data-root", "x"])
    assert (args.size, args.batch_size, args.epochs, args.box) == (160, 320, 750, "face")
