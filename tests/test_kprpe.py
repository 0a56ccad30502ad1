"""kprpe.py, faces: encodings and losses against slow loops, published sizes, data, whole runs."""
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import kprpe
from common import UserError, datasets, photos, recognition, run, warp
from tests.test_identities import encoded
from tests.trees import payload, put_mnist, put_records

torch.set_num_threads(1)
cv2.setNumThreads(1)
ROOT = Path(kprpe.__file__).resolve().parent
GRID = (5, 3)  # height, width: not square, so that a swapped axis shows
N = 15
TINY = dict(dim=16, depth=2, heads=2, mlp_ratio=2, patch=4, image_size=(20, 12))
CPU = torch.device("cpu")


def same(a, b, tolerance=1e-9):
    a = torch.as_tensor(a)
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=tolerance)


def randomise(module, scale=0.3, seed=0):
    """All parameters drawn anew, those that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def encoding(variant, scale=1.0):
    return randomise(kprpe.KPRPE(5, GRID, 2, 3, variant, scale).double())


def tiny(rpe, **flags):
    torch.manual_seed(0)
    return kprpe.ViT(TINY, rpe, **{"features": 6, **flags})


def batch(count=3, points=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, 20, 12, generator=generator, dtype=torch.float64)
    keypoints = torch.rand(count, points, 2, generator=generator, dtype=torch.float64)
    return image.to(dtype), keypoints.to(dtype)


# ---- Distances -----------------------------------------------------------------------------------

def slow_g(x):
    """iRPE's piecewise index of one number, at alpha, beta, gamma = 1.9, 3.8, 15.2."""
    if abs(x) <= 1.9:
        return round(x)
    far = round(1.9 + math.log(abs(x) / 1.9) / math.log(15.2 / 1.9) * 1.9)
    return int(math.copysign(min(far, 3.8), x))


def slow_ids(grid, method):
    """d(i, j) of Sec. 3.1; of "cross" a pair of them."""
    places = list(itertools.product(range(grid[0]), range(grid[1])))

    def d(i, j):
        rows, columns = i[0] - j[0], i[1] - j[1]
        if method == "euclidean":
            return slow_g(round(math.hypot(rows, columns))) + 3
        if method == "product":
            return 7 * (slow_g(rows) + 3) + slow_g(columns) + 3
        return slow_g(rows) + 3, 7 + slow_g(columns) + 3

    return torch.tensor([[d(i, j) for j in places] for i in places])


@pytest.mark.parametrize("grid", [(14, 14), (6, 6), GRID, (1, 4), (1, 1)])
def test_bucket_ids_are_those_of_a_slow_loop(grid):
    for method in ("euclidean", "product"):
        ids = kprpe.bucket_ids(*grid, method)
        assert ids.dtype == torch.long and torch.equal(ids, slow_ids(grid, method))
    cross = slow_ids(grid, "cross").movedim(-1, 0)
    assert torch.equal(kprpe.bucket_ids(*grid, "cross"), cross)


def test_product_ids_of_the_published_grid():
    ids = kprpe.bucket_ids(14, 14, "product")
    assert ids.unique().tolist() == list(range(49)) and (ids.diag() == 24).all()
    assert ids[7 * 14 + 7, [0, 195]].tolist() == [48, 0]
    assert torch.equal(ids.T, 48 - ids)  # the query's place minus the key's
    assert ids[14, 0] == 31 and ids[1, 0] == 25  # down by one is the row's affair: 7 * (1 + 3) + 3
    assert kprpe.bucket_ids(14, 14, "euclidean").unique().tolist() == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="'quant' on a grid of 14 x 14"):
        kprpe.bucket_ids(14, 14, "quant")


# ---- Eqs. (6) to (11) ----------------------------------------------------------------------------

def slow_table(net, points, layer, head):
    """f(P) of one image as the equations read, [N][K]; W_L's rows go by layer, head, bucket."""
    first = (layer * net.heads + head) * 49 if net.variant == "kp-multihead" else 0
    W, b = net.keypoint_linear.weight.tolist(), net.keypoint_linear.bias.tolist()
    height, width = GRID
    rows = []
    for y, x in itertools.product(range(height), range(width)):
        M = ((x + 0.5) / width, (y + 0.5) / height)
        D = [M[axis] - p[axis] for p in points for axis in (0, 1)]
        if net.variant == "kp-absolute":
            D = [p[axis] for p in points for axis in (0, 1)]
        rows.append([sum(w * d for w, d in zip(W[first + k], D)) + b[first + k] for k in range(49)])
    return rows


@pytest.mark.parametrize("variant", kprpe.KEYPOINT)
def test_the_bias_is_that_of_a_slow_loop(variant):
    net, points = encoding(variant, 0.25), batch(2, dtype=torch.float64)[1]
    biases = list(net(points))
    assert len(biases) == 2 and biases[0].shape == (2, 3, N, N)
    ids = slow_ids(GRID, "product").tolist()
    for layer, image, head in itertools.product(range(2), range(2), range(3)):
        f = slow_table(net, points[image].tolist(), layer, head)
        B = [[f[i][ids[i][j]] for j in range(N)] for i in range(N)]
        same(biases[layer][image, head], 0.25 * torch.tensor(B, dtype=torch.float64), 1e-7)


@pytest.mark.parametrize("variant", kprpe.KEYPOINT)
def test_gradients_are_those_of_the_tables_written_out(variant):
    """Eqs. (7) to (11) by plain operations: the difference M - P of every pair, and a gather."""
    net, points = encoding(variant), batch(2, dtype=torch.float64)[1].requires_grad_()
    D = net.grid[:, None] - points[:, None]                                   # (B, N, L, 2)
    if variant == "kp-absolute":
        D = points[:, None].expand(-1, N, -1, -1)
    f = net.keypoint_linear(D.flatten(2)).unflatten(-1, (*net.table_counts, 49)).permute(2, 0, 3, 1, 4)
    ids = kprpe.bucket_ids(*GRID, "product").expand(2, 2, 3, -1, -1)
    slow = f.expand(2, -1, 3, -1, -1).gather(-1, ids)                         # (depth, B, H, N, N)
    fast = torch.stack(list(net(points)))
    same(fast, slow, 1e-12)
    leaves = [points, *net.parameters()]
    for a, b in zip(*(torch.autograd.grad(out.pow(3).sum(), leaves) for out in (fast, slow))):
        same(a, b, 1e-11 * float(b.abs().max()))
        assert b.abs().max() > 0


@pytest.mark.parametrize("method", kprpe.DISTANCES)
def test_static_biases_are_read_from_their_table(method):
    net = randomise(kprpe.StaticRPE(GRID, 2, 3, method, 0.5).double())
    ids = slow_ids(GRID, method)
    for bias, table in zip(net(), net.table):
        own = table[:, ids].sum(-1) if method == "cross" else table[:, ids]
        same(bias[0], 0.5 * own, 1e-12)
    assert bias.stride()[-2] == 16  # rows of 16 for the GPU's attention


def test_a_joint_shift_of_grid_and_keypoints_changes_nothing():
    points, shift = batch(2, dtype=torch.float64)[1], torch.tensor([0.3, -0.1])
    for variant in kprpe.KEYPOINT:
        net = encoding(variant)
        before = torch.stack(list(net(points)))
        net.grid += shift
        moves = not torch.allclose(before, torch.stack(list(net(points + shift))), atol=1e-9)
        assert moves == (variant == "kp-absolute")


# ---- Attention and ViT ---------------------------------------------------------------------------

def slow_attention(net, x, bias):
    """Eqs. (1), (2) and (5), one image and head after the other; bias[b][h][i][j], undivided."""
    d = x.shape[2] // net.heads
    Q, K, V = (x @ W.T for W in net.qkv.weight.chunk(3))
    out = torch.zeros_like(x)
    for b, h, i in itertools.product(range(len(x)), range(net.heads), range(N)):
        own = slice(h * d, (h + 1) * d)
        e = [float(Q[b, i, own] @ K[b, j, own] + bias[b][h][i][j]) / math.sqrt(d) for j in range(N)]
        a = [math.exp(value) / sum(map(math.exp, e)) for value in e]
        out[b, i, own] = sum(a[j] * V[b, j, own] for j in range(N))
    return out @ net.proj.weight.T + net.proj.bias


def test_attention_is_that_of_a_slow_loop():
    net = randomise(kprpe.Attention(6, 3).double())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, N, 6, generator=generator, dtype=torch.float64)
    B = torch.randn(2, 3, N, N, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        same(net(x), slow_attention(net, x, (0 * B).tolist()))
        same(net(x, B / math.sqrt(2)), slow_attention(net, x, B.tolist()))


def test_contextual_rpe_is_that_of_a_slow_loop():
    net, d = randomise(kprpe.ContextualRPE(4, GRID).double(), 0.7), 4
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, N, d, generator=generator, dtype=torch.float64)
    ids, out = kprpe.bucket_ids(*GRID, "product"), torch.zeros(2, 2, N, d, dtype=torch.float64)
    with torch.no_grad():
        for b, h, i in itertools.product(range(2), range(2), range(N)):
            e = [q[b, h, i] @ (k[b, h, j] + net.k[ids[i, j]]) + net.q[ids[j, i]] @ k[b, h, j]
                 for j in range(N)]
            a = (torch.stack(e) / math.sqrt(d)).softmax(0)
            out[b, h, i] = sum(a[j] * (v[b, h, j] + net.v[ids[i, j]]) for j in range(N))
        same(net(q, k, v), out)


@pytest.mark.parametrize("rpe", kprpe.RPES)
def test_at_the_start_every_encoding_is_the_plain_vit(rpe):
    plain, net, (image, points) = tiny("none").eval(), tiny(rpe).eval(), batch()
    own = [p for name, p in net.named_parameters() if name not in plain.state_dict()]
    assert all((p == 0).all() for p in own) and bool(own) == (rpe != "none")
    assert not net.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    with torch.no_grad():
        same(net(image, points), plain(image), 1e-6)
        assert net(image, points).shape == (3, 6)


@pytest.mark.parametrize("rpe", kprpe.RPES)
def test_gradients_reach_every_parameter_and_the_keypoints(rpe):
    net, (image, points) = randomise(tiny(rpe)), batch(4)
    points.requires_grad_()
    net(image, points).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    assert (points.grad is not None and bool(points.grad.any())) == (rpe in kprpe.KEYPOINT)


@pytest.mark.parametrize("rpe", kprpe.KEYPOINT)
def test_the_network_is_its_equations(rpe):
    net = randomise(tiny(rpe, drop_path=0)).double()
    image, points = batch(3, dtype=torch.float64)
    x = net.patch_embed(image).flatten(2).mT + net.pos_embed
    for layer, block in enumerate(net.blocks):
        B = [[[[f[i][j] for j in slow_ids(GRID, "product")[i].tolist()] for i in range(N)]
              for f in [slow_table(net.rpe, five.tolist(), layer, head) for head in range(2)]]
             for five in points]
        q, k, v = block.attn.qkv(block.norm1(x)).view(3, N, 3, 2, 8).permute(2, 0, 3, 1, 4)
        a = ((q @ k.mT + torch.tensor(B, dtype=torch.float64)) / math.sqrt(8)).softmax(-1)
        x = x + block.attn.proj((a @ v).transpose(1, 2).reshape(3, N, 16))
        x = x + block.mlp.fc2(F.relu6(block.mlp.fc1(block.norm2(x))))
    same(net(image, points), net.feature(net.norm(x).flatten(1)), 1e-7)


def test_fewer_keypoints_are_the_first_ones_and_none_the_plain_vit():
    image, points = batch()
    net = randomise(tiny("kp-multihead", num_keypoints=2)).eval()
    with torch.no_grad():
        same(net(image, points), net(image, points[:, :2]))
    plain = tiny("kp-multihead", num_keypoints=0)
    assert plain.state_dict().keys() == tiny("none").state_dict().keys()


def test_stochastic_depth_keeps_the_mean():
    torch.manual_seed(0)
    out = kprpe.drop_path(torch.ones(4000, 2, 4), 0.25, True)
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert torch.equal(out, out[:, :1, :1].expand_as(out)) and abs(float(out.mean()) - 1) < 0.05
    assert kprpe.drop_path(out, 0.25, False) is out
    drops = [block.drop for block in kprpe.ViT(TINY | dict(depth=3)).blocks]
    assert drops == pytest.approx([0, 0.05, 0.1])


def test_bfloat16_and_the_graph_of_a_compiler_follow():
    net, (image, points) = tiny("kp-multihead").eval(), batch()
    randomise(net.rpe, 0.5)
    with torch.no_grad():
        exact = net(image, points)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(image, points)
        compiled = torch.compile(net, backend="eager", fullgraph=True)(image, points)
    assert rounded.dtype == torch.float32
    same(rounded, exact, 0.05 * float(exact.abs().max()))
    same(compiled, exact, 1e-6)


def test_weights_are_named_as_published():
    names = set(tiny("kp-multihead").state_dict())
    assert {"pos_embed", "patch_embed.proj.weight", "blocks.1.norm1.weight", "norm.bias",
            "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.bias", "blocks.0.mlp.fc1.weight",
            "blocks.0.mlp.fc2.bias", "feature.0.weight", "feature.1.running_mean",
            "feature.2.weight", "feature.3.weight", "rpe.keypoint_linear.weight",
            "rpe.keypoint_linear.bias"} <= names
    assert not names & {"blocks.0.attn.qkv.bias", "feature.0.bias", "rpe.grid"}
    names = set(kprpe.IResNet(50, 32).state_dict())
    assert {"input_layer.2.weight", "body.0.res_layer.4.weight", "output_layer.3.bias",
            "body.3.shortcut_layer.1.running_var", "output_layer.4.running_mean"} <= names
    assert not names & {"output_layer.4.weight", "body.1.shortcut_layer.0.weight"}


@pytest.mark.parametrize("points, message", [
    (torch.rand(3, 4, 2), r"\(3, 4, 2\), not \(B, 5, 2\)"),
    (torch.rand(3, 10), r"\(3, 10\)"),
    (50 + torch.rand(3, 5, 2), "divide those in pixels"),
    (torch.full((3, 5, 2), float("nan")), "keypoints from nan"),
    (None, "kp-multihead needs keypoints")])
def test_bad_keypoints(points, message):
    with pytest.raises(ValueError, match=message):
        tiny("kp-multihead").eval()(batch()[0], points)
    outside = torch.tensor([-0.4, 1.7]).expand(3, 5, 2)
    assert tiny("kp-multihead")(batch()[0], outside).isfinite().all()  # outside the image is fine


@pytest.mark.parametrize("make, message", [
    (lambda: kprpe.ViT("large"), "'large'.*small, base or a dict"),
    (lambda: kprpe.ViT(dict(width=3)), "'width'.*image_size"),
    (lambda: kprpe.ViT("small", "kprpe"), "'kprpe'.*kp-multihead"),
    (lambda: kprpe.ViT(TINY | dict(heads=3)), "dim 16 by 3 heads"),
    (lambda: kprpe.ViT(TINY | dict(image_size=30)), "30 x 30 px by patches of 4"),
    (lambda: kprpe.KPRPE(0, GRID, 1, 1, "kp-relative"), "0 keypoints"),
    (lambda: kprpe.IResNet(50, 100), "100 px.*multiple of 16"),
    (lambda: tiny("none")(torch.zeros(3, 1, 20, 12)), r"\(3, 1, 20, 12\).*3, 20, 12"),
    (lambda: tiny("none")(torch.zeros(1, 3, 20, 12)), "batch of 1 image")])
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- Table 3 -------------------------------------------------------------------------------------

PARAMETERS = {("small", "none"): 95_952_384, ("base", "none"): 114_869_760,
              ("small", "irpe"): 95_952_384 + 112_896, ("base", "irpe"): 114_869_760 + 112_896,
              ("small", "kp-multihead"): 95_952_384 + 51_744,
              ("base", "kp-multihead"): 114_869_760 + 206_976,
              ("small", "kp-relative"): 95_952_384 + 539,
              ("small", "kp-absolute"): 95_952_384 + 539,
              ("small", "product"): 95_952_384 + 12 * 8 * 49}


def on_meta(make, *args):
    with torch.device("meta"):
        return make(*args)


@pytest.mark.parametrize("size, rpe", PARAMETERS)
def test_parameters_of_table_3(size, rpe):
    net = on_meta(kprpe.ViT, size, rpe)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[size, rpe]


@pytest.mark.parametrize("depth, count", [(50, 43_585_600), (101, 65_150_912)])
def test_parameters_of_the_iresnets(depth, count):
    net = on_meta(kprpe.IResNet, depth)
    assert sum(p.numel() for p in net.parameters()) == count


def gflops(net):
    """As Table 3 counts: 2 a multiplication of convolutions and linear layers, 5 a value of layer
    norms, 2 of batch norms, the convolution's bias; neither Q K^T nor A V, but all of iRPE's
    products. The code looks R^V up for each of N keys; ours, with the sums by bucket first, has a
    product by K of them."""
    (_, tokens, dim), depth = net.pos_embed.shape, len(net.blocks)
    total = 2 * tokens * net.patch_embed.proj.weight.numel() + tokens * dim
    total += 5 * tokens * dim * (2 * depth + 1)
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            rows = 1 if name.startswith("feature") else tokens
            total += 2 * rows * module.weight.numel()
        elif isinstance(module, nn.BatchNorm1d):
            total += 2 * module.num_features
        elif isinstance(module, kprpe.ContextualRPE):
            products = module.q.numel() + module.k.numel() + tokens * module.v.shape[1]
            total += 2 * tokens * net.blocks[0].attn.heads * products
    return total / 1e9


@pytest.mark.parametrize("size, rpe, published", [
    ("small", "none", 17.42), ("small", "irpe", 18.13), ("small", "kp-multihead", 17.44),
    ("base", "none", 24.83), ("base", "irpe", 26.25), ("base", "kp-multihead", 24.90)])
def test_gflops_of_table_3(size, rpe, published):
    assert gflops(on_meta(kprpe.ViT, size, rpe)) == pytest.approx(published, abs=0.005)


def test_iresnet_runs_and_learns_everywhere():
    net = kprpe.IResNet(50, 32, features=8)
    out = net(torch.randn(2, 3, 32, 32), torch.rand(2, 5, 2))
    (out * torch.randn(2, 8)).sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]


# ---- Losses --------------------------------------------------------------------------------------

MARGINS = [kprpe.AdaFace, kprpe.ArcFace, kprpe.CosFace]


def slow_logits(name, cosines, norms, labels, mean=20.0, std=100.0):
    eps = 1e-3 if name == "AdaFace" else 1e-4
    rows = []
    for b, row in enumerate(cosines.tolist()):
        row = [max(-1 + eps, min(1 - eps, cosine)) for cosine in row]
        if labels[b] >= 0:
            angle, cut = {"ArcFace": (0.5, 0), "CosFace": (0, 0.4)}.get(name, (0, 0))
            if name == "AdaFace":
                z = 0.333 * (max(0.001, min(100, norms[b].item())) - mean) / (std + 1e-3)
                z = max(-1, min(1, z))
                angle, cut = -0.4 * z, 0.4 * z + 0.4
            theta = math.acos(row[labels[b]]) + angle
            row[labels[b]] = math.cos(max(eps, min(math.pi - eps, theta))) - cut
        rows.append([64 * cosine for cosine in row])
    return torch.tensor(rows, dtype=cosines.dtype)


@pytest.mark.parametrize("margin", MARGINS)
def test_losses_are_their_formulas(margin):
    generator = torch.Generator().manual_seed(0)
    cosines = 2 * torch.rand(12, 7, generator=generator, dtype=torch.float64) - 1
    cosines[0], cosines[1, 2], cosines[2, :] = -0.97, 1, -1
    norms = torch.tensor([0, 1e-9, 1, 5, 20, 40, 60, 90, 100, 400, 3e3, 25], dtype=torch.float64)
    labels = torch.tensor([0, 2, 3, -1, 6, 5, 4, 3, 2, 1, 0, -1])
    loss, given = margin().eval(), cosines.clone()
    expected = slow_logits(margin.__name__, cosines, norms, labels)
    same(loss(cosines, norms, labels), expected, 1e-6)  # its buffers are float32
    assert torch.equal(cosines, given)


@pytest.mark.parametrize("margin", MARGINS)
def test_gradients_of_losses_are_true_and_finite_at_the_ends(margin):
    generator = torch.Generator().manual_seed(1)
    cosines = 1.8 * torch.rand(4, 5, generator=generator, dtype=torch.float64) - 0.9
    norms = torch.tensor([5.0, 60, 120, 20], dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, -1])
    loss = margin().eval()
    assert torch.autograd.gradcheck(lambda c: loss(c, norms, labels), cosines.requires_grad_())
    ends = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 1, -1]], requires_grad=True)
    logits = loss(ends, torch.tensor([0.0, 20, 100]), torch.arange(3))
    F.cross_entropy(logits, torch.arange(3)).backward()
    assert ends.grad.isfinite().all() and ends.grad[2, 0] != 0


def test_adaface_keeps_its_statistics():
    loss, mean, std = kprpe.AdaFace(), 20.0, 100.0
    cosines, labels = torch.linspace(-0.9, 0.9, 8)[:, None].repeat(1, 3), torch.arange(8) % 3
    for step in range(3):
        norms = 10 + 5 * torch.rand(8, generator=torch.Generator().manual_seed(step))
        logits = loss(cosines, norms, labels)
        mean = 0.01 * norms.mean().item() + 0.99 * mean
        std = 0.01 * norms.std().item() + 0.99 * std
        same(logits, slow_logits("AdaFace", cosines, norms, labels, mean, std), 1e-4)
    assert loss.batch_mean.item() == pytest.approx(mean)
    assert set(loss.state_dict()) == {"batch_mean", "batch_std"}
    loss.eval()(cosines, norms + 50, labels)
    assert loss.batch_mean.item() == pytest.approx(mean)
    loss.train()(cosines[:1], norms[:1], labels[:1])  # a batch of one has no spread
    assert loss.batch_std.item() == pytest.approx(std)
    easy = loss.eval()(torch.full((5, 2), 0.9), torch.tensor([1.0, 10, 20, 40, 90]), 0 * labels[:5])
    assert (easy[:, 0].diff() < 0).all()  # more is asked of easy images with larger norms


# ---- PartialFC -----------------------------------------------------------------------------------

def embedded(count=6, features=8, classes=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = 4 * torch.randn(count, features, generator=generator)
    return embeddings.requires_grad_(), torch.randint(classes, (count,), generator=generator)


def plain_loss(margin, weight, embeddings, labels):
    cosines = F.normalize(embeddings) @ F.normalize(weight).T
    return F.cross_entropy(margin(cosines, embeddings.norm(dim=1), labels), labels)


def alike(loss, expected, leaves):
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value, leaves) for value in (loss, expected)]
    for grad, wanted in zip(*grads):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)
    return grads[0]


@pytest.mark.parametrize("margin", MARGINS)
def test_partial_fc_in_one_process_is_the_plain_softmax_loss(margin):
    fc, (embeddings, labels) = kprpe.PartialFC(8, 11, margin()), embedded()
    expected = plain_loss(margin(), fc.weight, embeddings, labels)
    alike(fc(embeddings, labels), expected, [embeddings, fc.weight])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = fc(embeddings, labels)
    torch.testing.assert_close(rounded, fc.eval()(embeddings, labels), rtol=1e-2, atol=0)


def test_partial_fc_samples_the_labels_and_some_others():
    torch.manual_seed(0)
    fc = kprpe.PartialFC(8, 100, kprpe.CosFace(), 0.3)
    embeddings, labels = embedded(classes=100)
    seen = set()
    for _ in range(20):
        index = fc.sample(labels)
        assert len(index) == 30 and (index.diff() > 0).all()
        assert set(labels.tolist()) <= set(index.tolist())
        seen |= set(index.tolist())
    assert seen == set(range(100))
    torch.manual_seed(1)
    index = fc.sample(labels)
    torch.manual_seed(1)
    local = torch.searchsorted(index, labels)
    expected = plain_loss(kprpe.CosFace(), fc.weight[index], embeddings, local)
    grads = alike(fc(embeddings, labels), expected, [embeddings, fc.weight])
    others = torch.ones(100, dtype=torch.bool).index_fill_(0, index, False)
    assert (grads[1][others] == 0).all()
    many = torch.arange(40)
    assert set(many.tolist()) <= set(fc.sample(many).tolist()) and len(fc.sample(many)) == 40
    assert fc.sample(torch.full((50,), -1)).shape == (50,)  # no label here, a batch above the share


def test_partial_fc_takes_bad_input():
    fc, (embeddings, labels) = kprpe.PartialFC(8, 11, kprpe.AdaFace()), embedded()
    with torch.no_grad():
        embeddings[0] = 0
    fc(embeddings, labels).backward()
    assert (embeddings.grad[0] == 0).all() and embeddings.grad[1:].abs().min() > 0
    assert embeddings.grad.isfinite().all() and fc.weight.grad.isfinite().all()
    with pytest.raises(ValueError, match="expected 0 to 10"):
        fc(embeddings, torch.full((6,), 11))
    with pytest.raises(UserError, match="1 classes on 1 processes"):
        kprpe.PartialFC(8, 1, kprpe.AdaFace())
    with pytest.raises(UserError, match=r"\(11, 8\), expected \(12, 8\)"):
        other = kprpe.PartialFC(8, 12, kprpe.AdaFace())
        other.load_shards(fc.gather_state(adamw(fc)), adamw(other))
    far = -100 * F.normalize(kprpe.PartialFC(8, 11, kprpe.CosFace()).weight.detach()[:1])
    assert fc(far, torch.tensor([0])) > 0
    assert fc.weight.std().item() == pytest.approx(0.01, rel=0.3)


def adamw(fc):
    return torch.optim.AdamW([fc.weight], lr=1e-3, fused=True)


def one_step(fc, optimizer, seed, parts=1, part=0):
    """A step on a part of the batch: the loss, and the gradient of that part's embeddings."""
    embeddings, labels = embedded(seed=seed)
    embeddings = embeddings.detach().chunk(parts)[part].requires_grad_()
    loss = fc(embeddings, labels.chunk(parts)[part])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), embeddings.grad


def two_ranks(rank, folder):
    """What one of two processes does in the test below: start, load, a step, save, sample."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(3)
    fc = kprpe.PartialFC(8, 11, kprpe.AdaFace())
    results = dict(initial=fc.weight.detach().clone())
    optimizer = adamw(fc)
    fc.load_shards(torch.load(f"{folder}/one.pt", weights_only=True), optimizer)
    loaded = fc.gather_state(optimizer)
    results["loss"], results["embeddings"] = one_step(fc, optimizer, 1, 2, rank)
    results["weight"], results["mean"] = fc.weight.grad, fc.margin.batch_mean
    state = fc.gather_state(optimizer)
    if rank == 0:
        torch.save(loaded, f"{folder}/two-loaded.pt")
        torch.save(state, f"{folder}/two.pt")
    sampled = kprpe.PartialFC(8, 60, kprpe.ArcFace(), 0.4)
    embeddings, labels = embedded(classes=60)
    local = labels - sampled.start
    local = torch.where((local >= 0) & (local < 30), local, -1)
    results["index"] = sampled.sample(local) + sampled.start
    loss = sampled(embeddings.detach().chunk(2)[rank], labels.chunk(2)[rank])
    results["sampled"] = loss.detach()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # a Python that has had gloo's threads now and then aborts at its exit


def test_two_ranks_equal_one_process_and_checkpoints_move_between_them(tmp_path):
    torch.manual_seed(3)
    one = kprpe.PartialFC(8, 11, kprpe.AdaFace())
    optimizer, initial = adamw(one), one.weight.detach().clone()
    one_step(one, optimizer, 0)
    torch.save(one.gather_state(optimizer), tmp_path / "one.pt")
    mp.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    read = lambda name: torch.load(tmp_path / name, weights_only=True)
    ranks = [read(f"rank{rank}.pt") for rank in range(2)]
    # Loss, gradients and statistics of the second step
    loss, grad = one_step(one, optimizer, 1)
    assert [len(r["weight"]) for r in ranks] == [5, 6]  # 11 classes
    assert torch.equal(torch.cat([r["initial"] for r in ranks]), initial)
    for r in ranks:
        torch.testing.assert_close(r["loss"], loss)
        torch.testing.assert_close(r["mean"], one.margin.batch_mean)
    torch.testing.assert_close(torch.cat([r["weight"] for r in ranks]), one.weight.grad)
    # Times the two ranks, as DistributedDataParallel takes the mean over them
    torch.testing.assert_close(torch.cat([r["embeddings"] for r in ranks]), 2 * grad)
    # 1 -> 2 -> 1 processes: what was loaded is what was saved, and training goes on as in one
    saved, loaded = read("one.pt"), read("two-loaded.pt")
    assert torch.equal(saved["weight"], loaded["weight"])
    assert saved["optimizer"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert equal(saved["optimizer"], loaded["optimizer"])
    again = kprpe.PartialFC(8, 11, kprpe.AdaFace())
    resumed = adamw(again)
    again.load_shards(read("two.pt"), resumed)
    assert one_step(again, resumed, 2)[0] == pytest.approx(one_step(one, optimizer, 2)[0].item())
    torch.testing.assert_close(again.weight, one.weight)
    # Sampled: the labels of both ranks' images are there, and the loss is the same in both
    sampled = torch.cat([r["index"] for r in ranks])
    assert len(sampled) == 2 * 12
    assert set(embedded(classes=60)[1].tolist()) <= set(sampled.tolist())
    assert torch.equal(ranks[0]["sampled"], ranks[1]["sampled"])


# ---- Augmentation --------------------------------------------------------------------------------

def noise(count=1, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def test_geometry_is_the_chain_of_its_parts():
    c, s, m, zoom, t = math.cos(0.3), math.sin(0.3), 55.5, 0.9, (7.0, -4.0)

    def shift(x, y):
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])

    chain = [shift(m, m), np.diag([zoom, zoom, 1]), shift(-t[0], -t[1]),
             np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]), shift(-m, -m)]
    same(kprpe.zoom_turn_shift(112, zoom, 0.3, np.array(t)), np.linalg.multi_dot(chain)[:2])


@pytest.mark.parametrize("kind, turned", [("full", 0.2), ("wide", 1.0)])
def test_moves_keep_their_bounds(kind, turned):
    draws = [kprpe.MOVES[kind](np.random.default_rng(i), 112) for i in range(3000)]
    matrix = torch.from_numpy(np.stack([matrix for matrix, _, _ in draws]))
    zoom = torch.linalg.det(matrix[:, :, :2]).sqrt()
    angle = torch.atan2(matrix[:, 0, 1], matrix[:, 0, 0]).rad2deg()
    assert 0.8 <= zoom.min() < 0.81 and 1.19 < zoom.max() <= 1.2
    assert 19 < angle.abs().max() <= 20
    assert (angle.abs() > 1e-3).double().mean() == pytest.approx(turned, abs=0.03)
    assert np.mean([mirror for _, mirror, _ in draws]) == pytest.approx(0.5, abs=0.03)
    # Before the zoom the middle moves by t = U(-1, 1) (h / zoom - h + h e), e in U(0, shift)
    middle = torch.full((1, 1, 2), 55.5).double()
    moved = (warp.apply_affine(matrix, middle)[:, 0] - 55.5).abs() / zoom[:, None]
    e = kprpe.SHIFTS[kind]
    most = torch.maximum((56 / zoom - 56).abs(), (56 / zoom - 56 + 56 * e).abs())
    assert (moved <= most[:, None] + 1e-9).all() and moved.max() > 0.8 * (14 + 56 * e)
    # No crop looks further than its region reaches
    corners = torch.tensor([[-0.5, -0.5], [111.5, -0.5], [-0.5, 111.5], [111.5, 111.5]]).double()
    seen = (warp.apply_affine(warp.invert(matrix), corners.expand(3000, 4, 2)) - 55.5).abs().max()
    assert 0.8 * kprpe.reach_of(e) < seen / 56 <= kprpe.reach_of(e)


def test_a_training_crop_is_one_warp_of_its_image():
    """The composed matrix on the source, with reflected borders, as cv2 does it in one call."""
    args = arguments("--augment", "wide")
    split = kprpe.face_split(args, kprpe.identity_faces(args, "train"))
    data = kprpe.make_crops(args, split, 1.0, "wide")
    found = data.__getitems__([(3, i) for i in range(8)])
    for i, (image, matrix) in enumerate(zip(found["image"].numpy(), found["matrix"].numpy())):
        whole = cv2.warpAffine(split.images[i], matrix, (32, 32), flags=cv2.INTER_LINEAR,
                               borderMode=cv2.BORDER_REFLECT_101)
        assert np.abs(image.astype(int) - whole).mean() < 6  # but for the shrinking before the warp
    again = data.__getitems__([(3, 5)])
    assert torch.equal(again["image"][0], found["image"][5])
    assert not torch.equal(data.__getitems__([(4, 5)])["image"], again["image"])


def test_points_follow_the_crop_and_eyes_change_sides():
    dots = np.zeros((64, 64, 3), np.uint8)
    points = np.array([[20.0, 24], [44, 25], [33, 34], [24, 46], [42, 45]], np.float32)
    for i, (x, y) in enumerate(points):
        cv2.circle(dots, (int(x), int(y)), 1, (60 * i % 256, 250, 40 * i + 20), -1)
    args = arguments("--size", "64", "--patch", "8")
    data = kprpe.make_crops(args, kprpe.Split(recognition.Images([dots]), points[None]), 1.0, "wide")
    for epoch in range(12):
        found = data.__getitems__([(epoch, 0)])
        five = found["points"][0]
        assert five[0, 0] < five[1, 0]  # the image-left eye comes first in a mirrored face, too
        for x, y in five.round().int().tolist():
            if 2 < x < 61 and 2 < y < 61:
                assert found["image"][0, y - 1:y + 2, x - 1:x + 2].max() > 100


def test_distorted_crops_are_a_function_of_seed_epoch_and_index():
    class Still:
        def __getitems__(self, keys):
            return {"image": torch.from_numpy(noise(5)[[i for _, i in keys]].copy())}

        def __len__(self):
            return 5

    data = kprpe.PhotometricAugmentation(Still(), 7)
    one = data.__getitems__([(2, 0), (2, 3), (2, 1)])["image"]
    other = data.__getitems__([(2, 1), (2, 3)])["image"]
    assert torch.equal(one[2], other[0]) and torch.equal(one[1], other[1])
    changed = [not np.array_equal(data.__getitems__([(epoch, 0)])["image"][0], noise()[0])
               for epoch in range(200)]
    assert 0.9 < np.mean(changed) <= 1
    other = kprpe.PhotometricAugmentation(Still(), 8).__getitems__([(2, 0)])
    assert not torch.equal(other["image"][0], one[0])


def test_cutout_leaves_a_box_and_blur_keeps_flat_images():
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(300):
        kept = kprpe.keep_box(np.full((112, 112, 3), 9, np.uint8), rng)[..., 0] > 0
        height, width = kept.any(1).sum(), kept.any(0).sum()
        assert kept.sum() == height * width and 0.73 < width / height < 1.36
        areas.append(kept.mean())
    assert 0.19 < min(areas) < 0.25 and max(areas) > 0.9
    flat = np.full((48, 48, 3), 77, np.uint8)
    rough = noise(1, 48)[0]
    spread = []
    for _ in range(60):
        assert np.array_equal(kprpe.blur(flat, rng), flat)
        spread.append(kprpe.blur(rough, rng).std())
    assert np.mean(spread) < 0.8 * rough.std()


def slow_op(name, image, factor):
    """One PIL operation on one image (H, W, 3), by whole numbers; float."""
    image = image.astype(int)
    grey = (image @ [19595, 38470, 7471] + 0x8000) >> 16
    if name == "identity":
        return image
    smooth = image.copy()
    for y, x in itertools.product(range(1, len(image) - 1), repeat=2):
        window = image[y - 1:y + 2, x - 1:x + 2].sum((0, 1))
        smooth[y, x] = np.round((window + 4 * image[y, x]) / 13)
    base = {"brightness": np.zeros_like(image), "saturation": grey[..., None] + 0 * image,
            "grayscale": grey[..., None] + 0 * image, "sharpness": smooth,
            "contrast": np.full_like(image, int(grey.mean() + 0.5))}[name]
    return np.clip(base + (0 if name == "grayscale" else factor) * (image - base), 0, 255)


@pytest.mark.parametrize("name", [op for op in kprpe.OPS if op != "equalize"])
def test_colour_operations_are_pils(name):
    image = (noise(1, 24, 1)[0] * 0.6 + 30).astype(np.uint8)
    inner = slice(1, -1)  # PIL keeps the border when it smooths
    for factor in (0.34, 0.85, 1.15, 1.66):
        found = kprpe.recolour(image, name, factor)[inner, inner]
        expected = slow_op(name, image, factor)[inner, inner]
        np.testing.assert_allclose(found.astype(int), expected, atol=1.6)


def test_equalized_levels_are_spread_evenly():
    dark = (noise(1, 64)[0] * 0.3 + 20).astype(np.uint8)
    found = kprpe.recolour(dark, "equalize", 1.0)
    assert found.min() == 0 and found.max() == 255
    assert np.median(found) == pytest.approx(127, abs=6)


def test_operations_are_drawn_as_often_as_they_should():
    rng = np.random.default_rng(0)
    ops, factors = zip(*(kprpe.draw_colour(rng) for _ in range(30_000)))
    share = np.array([ops.count(op) for op in kprpe.OPS]) / len(ops)
    rare = (2 / 7) ** 3
    assert share[5:].sum() == pytest.approx(rare, rel=0.15)
    assert share[:5] == pytest.approx([(1 - rare) / 5] * 5, rel=0.05)
    change = np.abs(np.array(factors) - 1)
    assert change.min() == pytest.approx(0.15) and change.max() == pytest.approx(0.66)
    assert np.mean(np.array(factors) > 1) == pytest.approx(0.5, abs=0.02)


def test_repeated_augmentation_repeats_identities():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 40, 20_000) * 3  # gaps in the labels are allowed
    order = rng.permutation(20_000)
    for p in (0.0, 0.1, 0.5, 1.0):
        given = order.copy()
        result = kprpe.repeated(order, labels, p, np.random.default_rng(1))
        assert np.array_equal(order, given) and result[0] == order[0]
        changed = np.flatnonzero(result != order)
        assert (np.diff(changed) > 1).all()
        assert len(changed) / len(order) == pytest.approx(p / (1 + p), abs=0.012)
        assert (labels[result[changed]] == labels[result[changed - 1]]).all()
    # every image of an identity can come, and one that has a single image repeats it
    drawn = kprpe.repeated(np.zeros(4000, int), np.array([5, 5, 5, 1]), 1.0, rng)
    assert set(drawn.tolist()) == {0, 1, 2}
    assert kprpe.repeated(np.array([3, 0]), np.array([5, 5, 5, 1]), 1.0, rng).tolist() == [3, 3]


def test_subject_batches_are_the_same_for_all_ranks():
    labels = np.repeat(np.arange(5), 8)
    plain = kprpe.SubjectBatches(labels, 0.0, 8, 3, 0, 1)
    assert sorted(i for keys in plain for _, i in keys) == list(range(40))

    def order(rank, world):
        batches = kprpe.SubjectBatches(labels, 0.6, 8, 3, rank, world)
        return [[i for _, i in keys] for keys in batches]

    whole, halves = order(0, 1), (order(0, 2), order(1, 2))
    assert whole == [a + b for a, b in zip(*halves)] and len(set(sum(whole, []))) < 40


def test_an_image_that_is_drawn_twice_is_augmented_anew():
    """Keys of an epoch differ, are a function of (epoch, place), and are not those of another."""
    def keys(epoch, rank=0, world=1):
        batches = kprpe.SubjectBatches(np.zeros(5, int), 1.0, 4, 3, rank, world)
        batches.epoch = epoch
        return list(batches)

    drawn = [key for epoch in range(4) for batch in keys(epoch) for key in batch]
    assert [place for place, _ in drawn] == list(range(16))
    assert len({i for _, i in drawn[:4]}) < 4  # an image of the epoch came twice
    assert keys(2) == keys(2)
    assert keys(2) == [a + b for a, b in zip(keys(2, 0, 2), keys(2, 1, 2))]


# ---- Optimisation --------------------------------------------------------------------------------

@pytest.mark.parametrize("rpe, own", [
    ("product", {"rpe.table"}),
    ("irpe", {f"blocks.{i}.attn.contextual.{part}" for i in range(2) for part in "qkv"}),
    ("kp-multihead", {"rpe.keypoint_linear.weight", "rpe.keypoint_linear.bias"})])
def test_matrices_decay_and_encodings_learn_at_their_own_rate(rpe, own):
    """A bias over c in the network: its rate times c, its decay over c, as if it were not."""
    net = tiny(rpe)
    groups = kprpe.parameter_groups(net, 0.05, 4.0)
    assert [group["scale"] for group in groups] == [1, 1, 4, 4]
    assert [group["weight_decay"] for group in groups] == [0.05, 0, 0.0125, 0]
    names = {id(weight): name for name, weight in net.named_parameters()}
    decayed, rest, *encodings = ({names[id(w)] for w in group["params"]} for group in groups)
    assert set.union(*encodings) == own and len(set.union(decayed, rest, own)) == len(names)
    assert {"patch_embed.proj.weight", "feature.0.weight", "blocks.0.mlp.fc1.weight"} <= decayed
    assert {"pos_embed", "patch_embed.proj.bias", "norm.weight", "feature.1.weight"} <= rest


def test_the_mean_over_the_patches_forgets_their_order():
    net = tiny("none", pool="mean").double().eval()
    nn.init.zeros_(net.pos_embed)
    image, _ = batch(dtype=torch.float64)
    same(net(image), net(torch.cat([image[:, :, 4:], image[:, :, :4]], 2)))  # rows of patches
    assert net.feature[0].in_features == net.pos_embed.shape[-1]


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    rate = [kprpe.learning_rate(step, 340, 30, 1e-3) for step in range(341)]
    assert rate[0] == 0 and rate[15] == pytest.approx(5e-4) and rate[30] == pytest.approx(1e-3)
    assert rate[185] == pytest.approx(5e-4) and rate[340] == pytest.approx(0, abs=1e-12)
    assert max(rate) == rate[30] and (np.diff(rate[30:]) < 0).all()
    assert kprpe.learning_rate(0, 10, 0, 1.0) == 1 and kprpe.learning_rate(3, 3, 3, 1.0) == 1


def test_the_gradients_are_scaled_together():
    torch.manual_seed(0)
    net, fc = nn.Linear(4, 3), kprpe.PartialFC(3, 5, kprpe.CosFace())
    image = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    fc(net(image), torch.arange(6) % 5).backward()
    weights = (*net.parameters(), fc.weight)
    grads = [p.grad.clone() for p in weights]
    norm = torch.cat([g.flatten() for g in grads]).norm().item()
    kprpe.clip_gradients(net, fc, norm / 4)
    for p, grad in zip(weights, grads):
        same(p.grad, grad / 4, 1e-4)
    kprpe.clip_gradients(net, fc, norm)
    same(net.weight.grad, grads[0] / 4, 1e-4)  # a small one stays


# ---- Data ----------------------------------------------------------------------------------------

SMALL_RUN = ["--device", "cpu", "--limit", "40", "--size", "32", "--dim", "16", "--depth", "2",
             "--heads", "2", "--epochs", "2", "--batch-size", "8", "--warmup", "0.5",
             "--eval-every", "2"]


def arguments(*flags, root=""):
    """Flags of a run of a few seconds."""
    return kprpe.parse_args([*SMALL_RUN, *(["--data-root", str(root)] if root else []), *flags])


def write_people(root, people=3, each=4, size=48, marked=True):
    """A folder of noise faces of `people`, with five points that vary, as .pts beside them."""
    rng = np.random.default_rng(0)
    for person in range(people):
        folder = root / f"person{person}"
        folder.mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
            cv2.imwrite(str(folder / f"{i}.png"), pixels)
            if marked:
                points = size / 112 * datasets.ARCFACE_5 + rng.uniform(0, 3, 2)
                datasets.write_pts(folder / f"{i}.pts", points)
    return root


def write_probes(path, points=None):
    """A set of --test of `write_people`'s images, PATH.csv, and its landmarks beside it."""
    names = [f"test/person{p}/{i}.png" for p in range(3) for i in range(2)]
    rows = [f"{name},{name[11]},{('gallery', 'probe')[int(name[13])]}\n" for name in names]
    path.write_text("path,id,role\n" + "".join(rows))
    if points is not None:
        five = ",".join(f"{v:.2f}" for v in points.flatten().tolist())
        beside = path.with_name(path.name + ".landmarks.csv")
        beside.write_text("".join(f"{name},{five}\n" for name in names))
    return path


def test_aligned_crops_bring_the_keypoints_to_the_template():
    args = arguments()
    data = kprpe.make_crops(args, kprpe.face_split(args, kprpe.identity_faces(args, "test")), 1.0)
    points = data.__getitems__([(0, i) for i in range(8)])["points"]
    fitted = warp.fit_similarity(points.double(), kprpe.template(32))
    same(fitted, torch.eye(2, 3).double().expand(8, 2, 3), 1e-4)  # what no similarity can better
    assert not torch.allclose(points, kprpe.template(32).float(), atol=0.3)  # poses differ
    same(kprpe.template(112), datasets.ARCFACE_5)
    same(kprpe.template(32)[0], (datasets.ARCFACE_5[0] + 0.5) * 32 / 112 - 0.5)


def test_kept_crops_are_those_of_the_files_as_they_are(tmp_path):
    root = write_people(tmp_path / "test").parent
    args = arguments("--data", "folder", root=root)

    def key():
        split = kprpe.face_split(args, kprpe.identity_faces(args, "test"))
        return kprpe.make_crops(args, split, 1.0).regions._digest()

    first = key()
    assert first == key()
    os.utime(next((tmp_path / "test").glob("*/*.png")), ns=(1, 1))
    assert first != key()


def test_unaligned_crops_differ_by_image_and_stay():
    args = arguments()
    split = kprpe.face_split(args, kprpe.identity_faces(args, "test"))
    loose, half, aligned = (kprpe.make_crops(args, split, t).crop_matrices for t in (0.0, 0.5, 1.0))
    same(half, (loose + aligned) / 2)
    same(loose, kprpe.unaligned(split.boxes, 32, args.margin))
    box = torch.from_numpy(datasets.square_crops(split.boxes, 32, args.margin))
    move = warp.compose(loose, warp.invert(box))
    zoom = torch.linalg.det(move[:, :, :2]).sqrt()
    angle = torch.atan2(move[:, 0, 1], move[:, 0, 0]).rad2deg()
    assert 0.8 <= zoom.min() < 0.9 and 1.1 < zoom.max() <= 1.2 and zoom.std() > 0.05
    assert 12 < angle.abs().max() <= 20 and angle.std() > 5
    few = kprpe.unaligned(split.boxes[:4], 32, args.margin)
    same(few, loose[:4])  # by the index alone


def test_whole_images_are_aligned_the_same_way(tmp_path):
    root = write_people(tmp_path / "test").parent
    args = arguments("--data", "folder", "--box", "image", root=root)
    split = kprpe.face_split(args, kprpe.identity_faces(args, "test"))
    assert split.boxes is None and split.points.shape == (12, 5, 2)
    keys = [(0, i) for i in range(12)]
    whole, half, aligned = (kprpe.make_crops(args, split, t).__getitems__(keys)
                            for t in (0.0, 0.5, 1.0))
    same(aligned["points"], kprpe.template(32).float().expand(12, 5, 2), 1e-3)
    same(whole["matrix"][:, 0, 0], torch.full((12,), 32 / 48), 1e-6)
    same(half["matrix"], (whole["matrix"] + aligned["matrix"]) / 2, 1e-5)


def test_keypoints_that_are_missing(tmp_path):
    root = write_people(tmp_path / "train", marked=False).parent
    with pytest.raises(UserError, match="--data folder: the network needs the keypoints of its"):
        kprpe.training_set(arguments("--data", "folder", root=root), CPU)
    plain = arguments("--data", "folder", "--rpe", "none", root=root)
    images, data = kprpe.training_set(plain, CPU)
    found = data.__getitems__([(0, 3)])
    assert "points" not in found and len(images.ids) == 3
    image, keypoints = kprpe.inputs(*kprpe.to_device(found, CPU))
    assert image.shape == (1, 3, 32, 32) and image.min() >= -1 and image.max() <= 1
    same(keypoints[0, 0], (datasets.ARCFACE_5[0] + 0.5) / 112, 1e-6)
    write_people(tmp_path / "b" / "train")
    (tmp_path / "b" / "train" / "person1" / "2.pts").unlink()
    with pytest.raises(UserError, match="person1/2.png has no landmarks"):
        kprpe.training_set(arguments("--data", "folder", root=tmp_path / "b"), CPU)
    with pytest.raises(UserError, match="7 landmarks are no known scheme"):
        kprpe.five_points(np.zeros((3, 7, 2)), "here")


def test_records_need_landmarks_beside_them(tmp_path):
    images = noise(6)
    payloads = [payload([key % 3], encoded(image)) for key, image in enumerate(images)]
    put_records(tmp_path, payloads, 1)
    flags = ["--data", "ms1m-small", "--model", "own", "--augment", "none"]
    with pytest.raises(UserError, match="--data ms1m-small: the network needs the keypoints"):
        kprpe.training_set(arguments(*flags, root=tmp_path), CPU)
    points = kprpe.template(32).numpy()
    lines = [",".join([str(key), *(f"{v:.3f}" for v in (points + key / 10).flatten())])
             for key in range(1, 7)]
    (tmp_path / "points.csv").write_text("\n".join(lines))
    args = arguments(*flags, "--landmarks", str(tmp_path / "points.csv"), root=tmp_path)
    images, data = kprpe.training_set(args, CPU)
    found = data.__getitems__([(0, 4)])
    same(found["points"][0], points + 0.5, 1e-3)  # as they are: records are aligned already
    assert np.array_equal(found["image"][0].numpy(), images[4])
    args.limit = 2  # of the first two identities
    images, data = kprpe.training_set(args, CPU)
    assert len(images) == len(data) == len(data.points) == 2 and images.ids.tolist() == [0, 1]


def test_keypoints_of_an_aligner_are_found_once_in_still_crops(tmp_path, monkeypatch):
    (tmp_path / "dfa.pt").write_bytes(b"")
    args = arguments("--dfa", str(tmp_path / "dfa.pt"), "--augment", "wide")

    def detect(path, image):
        assert path == args.dfa and image.shape[1:] == (3, 32, 32)
        return kprpe.template(32).float().expand(len(image), -1, -1), torch.ones(len(image))

    monkeypatch.setattr(kprpe, "detect", detect, raising=False)
    _, data = kprpe.training_set(args, CPU)
    assert data.points.shape == (40, 5, 2) and data.augment is not None
    data.augment = None
    same(data.__getitems__([(0, 7)])["points"][0], kprpe.template(32).float(), 1e-3)


def test_keypoints_are_drawn_where_they_are():
    image = torch.zeros(2, 3, 32, 32)
    points = torch.tensor([[[4.0, 9], [20, 11], [7, 30], [1, 1], [25, 25]]] * 2)
    drawn, keypoints = kprpe.inputs(image, points, True)
    same(keypoints, (points + 0.5) / 32)
    assert (drawn[:, :, 9, 4] == 1).all() and (drawn[:, :, 11, 20] == 1).all()  # row y, column x
    assert (drawn[:, :, 4, 9] < -0.99).all()
    assert torch.equal(kprpe.inputs(image, points)[0], image - 1)


# ---- Evaluation ----------------------------------------------------------------------------------

def test_shards_cover_a_set_once_and_are_as_long_in_each_process():
    for count, world in ((10, 1), (10, 3), (2, 4), (9, 3)):
        parts = [[i for keys in kprpe.shard_keys(count, 2, rank, world) for _, i in keys]
                 for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        merged = torch.tensor(parts).T.flatten()[:count]  # as `gather_shards` puts them together
        assert merged.tolist() == list(range(count))


def test_noise_is_normal_and_the_same_each_time():
    points, index = torch.rand(300, 5, 2), torch.arange(300)
    moved = kprpe.add_keypoint_noise(points, index, 0.1)
    drawn = moved - points
    assert drawn.std() == pytest.approx(0.1, rel=0.05) and drawn.mean().abs() < 0.01
    # What the supplement reports for alpha = 0.1: an NME of 0.12, over the side of the box.
    assert drawn.norm(dim=-1).mean() == pytest.approx(0.12, abs=0.01)
    some = kprpe.add_keypoint_noise(points[[7, 2]], index[[7, 2]], 0.1)
    same(some, moved[[7, 2]], 1e-6)
    assert kprpe.add_keypoint_noise(points, index, 0.0) is points


class Corner(nn.Module):
    """An "embedding" that tells what it was given: the mean of the image's left half, keypoints."""

    def forward(self, image, points):
        left = image[..., :image.shape[3] // 2].mean((1, 2, 3))
        return torch.cat([left[:, None], points.flatten(1)], 1)


def test_embeddings_are_sums_over_the_image_and_its_mirror():
    args = arguments()
    data = kprpe.make_crops(args, kprpe.face_split(args, kprpe.identity_faces(args, "test")), 0.0)
    keys = [[(0, 0), (0, 1)], [(0, 2)]]
    condition = kprpe.TestCondition(range(3), [data.__getitems__(k) for k in keys], [])
    found = kprpe.embed(Corner(), condition, args, CPU)
    image, points = kprpe.inputs(*kprpe.to_device(data.__getitems__(sum(keys, [])), CPU))
    same(found.features[:, 0], 2 * image.mean((1, 2, 3)), 1e-5)
    mirrored = torch.stack([1 - points[..., 0], points[..., 1]], -1)[:, [1, 0, 2, 4, 3]]
    same(found.features[:, 1:], (points + mirrored).flatten(1), 1e-6)
    same(found.keypoints, points, 1e-6)
    noisy = kprpe.embed(Corner(), condition._replace(noise=0.1), args, CPU).features
    assert 0.05 < (noisy - found.features)[:, 1:].std() < 0.3


def test_conditions_cover_crops_and_noise_and_workers_end(tmp_path):
    args = arguments("--keypoint-noise", "0.1", "--cache", "device", "--workers", "1")
    conditions = kprpe.test_conditions(args, CPU)
    assert {c.suffix: c.late for c in conditions} == {
        "": False, "@noise0.1": True, "@unaligned": False, "@unaligned@noise0.1": True}
    assert all(c.data.regions.store is not None for c in conditions)
    found = kprpe.embed(Corner(), conditions[0], args, CPU)
    assert len(found.features) == len(conditions[0].data)
    assert not torch.multiprocessing.active_children()


def test_templates_are_of_unit_features_times_faceness_and_come_last(monkeypatch):
    test = recognition.TemplateSet("IJB-B", range(3), np.zeros((3, 5, 2)),
                                   np.array([0.5, 1, 1], np.float32), np.arange(3), np.arange(3),
                                   np.array([[0, 1]]), np.array([True]), np.arange(3).astype(str))
    features = torch.tensor([[3.0, 4], [0, 2], [5, 0]])
    monkeypatch.setattr(kprpe, "embed", lambda *_: kprpe.Embedded(features, None, None))
    monkeypatch.setattr(recognition, "score", lambda test, features: {"seen": features})
    condition = kprpe.TestCondition(None, [], [test], "@IJB-B")
    found = kprpe.evaluate(Corner(), None, [condition], None, None)
    same(found["seen@IJB-B"], [[0.6, 0.8], [0, 1], [1, 0]], 1e-6)
    monkeypatch.setattr(kprpe, "read_tests", lambda args: {
        "@IJB-B": (kprpe.Split(noise(3), None), [test])})
    assert kprpe.test_conditions(arguments(), CPU)[0].late


def test_a_bin_without_an_aligner_has_keypoints_that_are_no_images_own(tmp_path, capsys):
    pairs = ([encoded(image) for image in noise(8)], [True, False, True, False])
    (tmp_path / "a.bin").write_bytes(pickle.dumps(pairs))
    kprpe.read_tests(arguments("--rpe", "none", "--test", str(tmp_path / "a.bin")))
    assert "ArcFace's" not in capsys.readouterr().out
    kprpe.read_tests(arguments("--test", str(tmp_path / "a.bin")))
    assert "ArcFace's five points; --dfa finds their own" in capsys.readouterr().out


def test_landmarks_for_a_set_that_has_its_own_are_refused():
    with pytest.raises(UserError, match="--landmarks a.csv: --data faces has landmarks of its own"):
        kprpe.training_set(arguments("--data", "faces", "--landmarks", "a.csv"), CPU)


def test_sets_that_need_landmarks_name_the_file(tmp_path, capsys):
    write_people(tmp_path / "test")
    path = str(write_probes(tmp_path / "a.csv"))
    with pytest.raises(UserError, match="a.csv: the network needs the keypoints of its images"):
        kprpe.test_conditions(arguments("--test", path), CPU)
    plain = arguments("--rpe", "none", "--test", path)
    assert len(kprpe.test_conditions(plain, CPU)) == 3
    assert "a.csv.landmarks.csv: its images are taken as aligned" in capsys.readouterr().out
    with pytest.raises(UserError, match="evaluate them apart"):
        kprpe.test_conditions(arguments("--rpe", "none", "--test", path, path), CPU)
    with pytest.raises(UserError, match="--fusion: --data folder has no test split"):
        kprpe.test_conditions(arguments("--data", "folder", "--fusion", "norm", root="none"), CPU)
    # The box of their landmarks, if --box says so
    write_probes(tmp_path / "a.csv", kprpe.template(24) + 6)
    conditions = kprpe.test_conditions(arguments("--test", path), CPU)
    assert "unaligned are crops about the box of 5 landmarks x 1.4" in capsys.readouterr().out
    suffixes = [condition.suffix.replace(path, "") for condition in conditions]
    assert suffixes == ["", "@unaligned", "@", "@@unaligned"]


def test_offsets_are_what_attention_adds():
    for rpe in ("euclidean", "cross", "kp-relative", "kp-multihead"):
        net, points = randomise(tiny(rpe)).eval(), batch(2)[1]
        maps = kprpe.offsets(net, points)
        assert maps.shape == (2, 2, N, N)
        same(maps[1], list(net.biases(points))[1][:, 0].expand(2, -1, -1), 1e-6)


# ---- Whole runs ----------------------------------------------------------------------------------

def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def go(*flags, root=""):
    return kprpe.main(arguments(*map(str, flags), root=root))


def call(*flags):
    """The command with just these flags."""
    return kprpe.main(kprpe.parse_args(["--device", "cpu", *map(str, flags)]))


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_should(tmp_path, capsys):
    scores = go("--output", tmp_path / "run", "--keypoint-noise", "0.05,0.1", "--repeat", "0.5",
                "--limit", "30")
    rows = logged(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [1, 2] and "accuracy" not in rows[0]
    for key in ("accuracy", "rank1", "accuracy@unaligned", "accuracy@noise0.05",
                "rank1@unaligned@noise0.1"):
        assert 0 <= rows[1][key] <= 1 and scores[key] == rows[1][key]
    assert {"accuracy@pixels", "rank1@pixels unaligned"} <= scores.keys()
    assert not any("pixels" in key and "noise" in key for key in scores)
    printed = capsys.readouterr().out
    assert "  unaligned            accuracy" in printed and "kp-multihead" in printed
    assert "  pixels unaligned     accuracy" in printed
    assert (tmp_path / "run" / "offsets.png").exists()
    state = state_of(tmp_path / "run")
    assert state["script"] == "kprpe" and state["data"] == [30, 3]
    assert state["head"]["weight"].shape == (3, 512)
    assert state["head"]["optimizer"]["exp_avg"].shape == (3, 512)


def test_two_epochs_and_one_more_are_three_bit_for_bit(tmp_path):
    flags = ["--loss", "adaface", "--sample-rate", "0.5", "--augment", "full", "--repeat", "0.5",
             "--limit", "24", "--epochs", "3"]
    go(*flags, "--output", tmp_path / "whole")
    original = run.save

    def dies(path, **state):
        original(path, **state)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            go(*flags, "--output", tmp_path / "cut")
    call("--resume", "--output", tmp_path / "cut")
    whole, cut = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    for key in ("model", "head", "optimizer", "epoch", "data"):
        assert equal(whole[key], cut[key]), key
    drop = {"minutes", "images_per_second"}
    for a, b in zip(logged(tmp_path / "whole"), logged(tmp_path / "cut"), strict=True):
        assert {k: a[k] for k in a.keys() - drop} == {k: b[k] for k in b.keys() - drop}


def test_two_processes_train_and_one_goes_on(tmp_path, capsys):
    """The classes of both processes in one checkpoint; evaluation cut into shards."""
    flags = ["--output", "run", "--gpus", "2", "--epochs", "1"]
    done = subprocess.run([sys.executable, str(ROOT / "kprpe.py"), *SMALL_RUN, *flags],
                          capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    state, row = state_of(tmp_path / "run"), logged(tmp_path / "run")[-1]
    assert state["world"] == 2 and state["head"]["weight"].shape == (4, 512)
    scores = call("--eval", tmp_path / "run" / "last.pt")
    for key in ("accuracy", "rank1", "accuracy@unaligned"):
        assert scores[key] == pytest.approx(row[key], abs=0.03)
    capsys.readouterr()
    call("--resume", "--epochs", "2", "--output", tmp_path / "run")
    assert "the run had 2 processes" in capsys.readouterr().out
    assert state_of(tmp_path / "run")["epoch"] == 2 and state_of(tmp_path / "run")["world"] == 1


def test_a_folder_is_trained_on_evaluated_on_other_sets_and_used(tmp_path, capsys):
    root = write_people(tmp_path / "train").parent
    write_people(tmp_path / "test")
    flags = ["--data", "folder", "--rpe", "kp-relative", "--num-keypoints", "3"]
    scores = go(*flags, "--output", tmp_path / "run", "--epochs", "1", "--batch-size", "6",
                root=root)
    images = [cv2.imencode(".png", picture)[1].tobytes() for picture in noise(20)]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, [True, False] * 5)))
    probes = write_probes(tmp_path / "ids.csv", kprpe.template(48))
    path = tmp_path / "run" / "last.pt"
    again = call("--eval", path, "--output", tmp_path / "eval", "--test", tmp_path / "lfw.bin",
                 probes)
    assert {key: again[key] for key in scores} == scores
    assert {"accuracy@lfw", f"rank1@{probes}", f"rank1@{probes}@unaligned"} <= again.keys()
    assert "accuracy@lfw@unaligned" not in again
    assert (tmp_path / "eval" / "offsets.png").exists()
    face = tmp_path / "test" / "person0" / "1"
    call("--weights", path, "--predict", f"{face}.png", "--output", tmp_path / "out")
    crop = cv2.imread(str(tmp_path / "out" / "1.png"))[..., ::-1]
    feature = np.load(tmp_path / "out" / "1.npy")
    assert crop.shape == (32, 32, 3) and np.linalg.norm(feature) == pytest.approx(1, abs=1e-5)
    points = datasets.read_pts(f"{face}.pts")
    np.testing.assert_allclose(datasets.read_pts(tmp_path / "out" / "1.pts"), points, atol=1e-3)
    # The same face as the evaluation sees it: aligned by its keypoints.
    args = arguments(*flags, root=root)
    split = kprpe.face_split(args, kprpe.identity_faces(args, "test"))
    seen = kprpe.make_crops(args, split, 1.0).__getitems__([(0, 1)])["image"][0]
    assert np.array_equal(seen, crop)
    cv2.imwrite(str(tmp_path / "alone.png"), crop)
    with pytest.raises(UserError, match="alone.png: the network needs keypoints"):
        call("--weights", path, "--predict", tmp_path / "alone.png", "--output", tmp_path / "no")


def test_detected_faces_and_boxes_are_predicted(tmp_path, monkeypatch):
    go("--output", tmp_path / "run", "--epochs", "1", "--limit", "20")
    image = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), image)
    five = [kprpe.template(40).numpy() + [10 + 50 * i, 12] for i in range(2)]
    rows = np.stack([np.concatenate([[8 + 50 * i, 9, 40, 50], five[i].flatten(), [0.9]])
                     for i in range(2)])  # YuNet's: box, points from the image-left eye on, score
    monkeypatch.setattr(photos, "open_detector", lambda path: path)
    monkeypatch.setattr(photos, "detect", lambda detector, pixels: rows)
    (tmp_path / "yunet.onnx").write_bytes(b"")
    photo = ["--predict", tmp_path / "photo.png", "--output"]
    call("--weights", tmp_path / "run" / "last.pt", *photo, tmp_path / "out", "--detector",
         tmp_path / "yunet.onnx")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"photo{face}.{kind}" for face in ("", ".face2") for kind in ("png", "npy", "pts")}
    found = datasets.read_pts(tmp_path / "out" / "photo.face2.pts")
    np.testing.assert_allclose(found, five[1], atol=1e-3)
    # A network without keypoints takes a box; landmarks beside an image are of a known scheme.
    go("--output", tmp_path / "none", "--rpe", "none", "--epochs", "1", "--limit", "20")
    weights = ["--weights", tmp_path / "none" / "last.pt"]
    call(*weights, *photo, tmp_path / "box", "--box", "4.5,3.5,36.5,35.5", "--margin", "1")
    crop = cv2.imread(str(tmp_path / "box" / "photo.png"))
    assert np.array_equal(crop, image[4:36, 5:37])
    (tmp_path / "photo.pts").write_text("version: 1\nn_points: 2\n{\n1 1\n9 9\n}\n")
    with pytest.raises(UserError, match="photo.pts: 2 landmarks are no known scheme"):
        call(*weights, *photo, tmp_path / "no")
    points = "\n".join(5 * ["9 9"])
    (tmp_path / "photo.pts").write_text(f"version: 1\nn_points: 5\n{{\n{points}\n}}\n")
    with pytest.raises(UserError, match="photo.pts: its eyes, .* coincide"):
        call(*weights, *photo, tmp_path / "no")


def test_digits_are_classified(tmp_path):
    root = put_mnist(tmp_path / "mnist", 40)
    scores = go("--data", "affnist", "--size", "40", "--patch", "8", "--epochs", "12", "--lr",
                "0.001", "--output", tmp_path / "run", root=root)
    rows = logged(tmp_path / "run")
    assert rows[-1]["loss"] < 0.85 * rows[0]["loss"]
    assert (tmp_path / "run" / "offsets.png").exists()
    again = call("--eval", tmp_path / "run" / "last.pt", "--keypoint-noise", "0.05")
    assert again["accuracy"] == scores["accuracy"] and "accuracy@affine@noise0.05" in again
    for flags in (["--weights", tmp_path / "run" / "last.pt", "--predict", tmp_path],
                  ["--data", "faces", "--eval", tmp_path / "run" / "last.pt"]):
        with pytest.raises(UserError, match="is of a run on affnist"):
            call(*flags)
    for flags in (["--data-root", root], ["--eval", tmp_path / "run" / "last.pt"]):
        with pytest.raises(UserError, match="--test: --data affnist has digits, no faces"):
            call("--data", "affnist", *flags, "--test", "lfw", "--output", tmp_path / "no")


def test_records_are_trained_on_and_what_is_missing_is_said(tmp_path, capsys):
    payloads = [payload([key % 2], encoded(image)) for key, image in enumerate(noise(8))]
    put_records(tmp_path, payloads, 1)
    scores = go("--data", "ms1m-small", "--model", "own", "--rpe", "none", "--epochs", "1",
                "--batch-size", "4", "--output", tmp_path / "run", root=tmp_path)
    assert scores == {} and state_of(tmp_path / "run")["head"]["weight"].shape == (2, 512)
    assert "has no test split: without --test nothing is measured" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no test split"):
        call("--eval", tmp_path / "run" / "last.pt")


@pytest.mark.parametrize("flags, message", [
    ("--size 60 --patch 8", "--size 60: expected a multiple of 8"),
    ("--dim 30 --heads 4", "--dim 30: expected a multiple of --heads 4"),
    ("--num-keypoints 6", "at most 5"),
    ("--fusion norm,best", "--fusion"),
    ("--model iresnet50", "give --rpe none"),
    ("--model iresnet50 --rpe none --size 40", "--size 40: expected a multiple of 16"),
    ("--data affnist", "--data affnist: give --data-root"),
    ("--data ms1m-small", "--data ms1m-small: give --data-root"),
    ("--keypoint-noise 0.1,x", "--keypoint-noise"),
    ("--task gait --augment full", "unrecognized arguments: --augment")])
def test_flags_that_cannot_be_meant(flags, message, capsys):
    with pytest.raises(SystemExit):
        kprpe.parse_args(flags.split())
    assert message in capsys.readouterr().err


def test_presets_are_table_6():
    args = kprpe.parse_args(["--data", "ms1m-small", "--data-root", "x"])
    assert (args.model, args.lr, args.batch_size, args.epochs, args.weight_decay, args.warmup,
            args.repeat) == ("small", 1e-3, 512, 34, 0.05, 3, 0.5)
    args = kprpe.parse_args(["--data", "webface-base", "--data-root", "x", "--lr", "0.5"])
    assert (args.model, args.lr, args.batch_size, args.epochs, args.sample_rate, args.repeat) == (
        "base", 0.5, 1024, 36, 0.6, 0.1)
    net = on_meta(lambda: kprpe.build(args, torch.device("meta")))
    assert sum(p.numel() for p in net.parameters()) == 114_869_760 + 206_976
