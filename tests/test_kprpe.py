"""kprpe.py: encodings, losses and augmentation against slow loops, published sizes, data, whole runs."""
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kprpe
from common import datasets, metrics, recognition, warp
from tests.test_recognition import encoded
from tests.trees import payload, put_mnist, put_records

torch.set_num_threads(1)
cv2.setNumThreads(1)
ROOT = Path(kprpe.__file__).resolve().parent
GRID = (5, 3)  # height, width: not square, so that a swapped axis shows
TINY = dict(dim=16, depth=2, heads=2, mlp_ratio=2, patch=4, image_size=(20, 12))
BIASES = [*kprpe.STATIC, *kprpe.KEYPOINT]


def same(a, b, tolerance=1e-9):
    a = torch.as_tensor(a)
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=tolerance)


def randomise(module, scale=0.3, seed=0):
    """All parameters drawn anew, those that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def encoding(variant, grid=GRID, depth=2, heads=3, points=5, dtype=torch.float64):
    return randomise(kprpe.KPRPE(points, grid, depth, heads, variant).to(dtype))


def tiny(rpe, **flags):
    torch.manual_seed(0)
    return kprpe.ViT(TINY, rpe, **{"features": 6, **flags})


def batch(count=3, points=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda make, *shape: make(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return draw(torch.randn, count, 3, 20, 12), draw(torch.rand, count, points, 2)


# ---- Distances -----------------------------------------------------------------------------------

def slow_g(x):
    """iRPE's piecewise index of one number, at alpha, beta, gamma = 1.9, 3.8, 15.2."""
    if abs(x) <= 1.9:
        return round(x)
    far = round(1.9 + math.log(abs(x) / 1.9) / math.log(15.2 / 1.9) * 1.9)
    return int(math.copysign(min(far, 3.8), x))


def slow_ids(grid, method):
    """d(i, j) of Sec. 3.1 as nested lists; of "cross" a pair of them."""
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
    assert torch.equal(kprpe.bucket_ids(*grid, "cross"), slow_ids(grid, "cross").movedim(-1, 0))


def test_product_ids_of_the_published_grid():
    ids = kprpe.bucket_ids(14, 14, "product")
    assert ids.unique().tolist() == list(range(49))
    assert ids[7 * 14 + 7, [0, 195, 7 * 14 + 7]].tolist() == [48, 0, 24] and (ids.diag() == 24).all()
    assert torch.equal(ids.T, 48 - ids)  # the query's place minus the key's: exchanged, all signs turn
    # down by one is the row's affair: the query in row 1, the key in row 0, 7 * (1 + 3) + 3
    assert ids[14, 0] == 31 and ids[1, 0] == 25
    assert kprpe.bucket_ids(14, 14, "euclidean").unique().tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("grid, method", [((14, 14), "quant"), ((0, 3), "product"), ((3, -1), "euclidean")])
def test_bucket_ids_refuse(grid, method):
    with pytest.raises(ValueError, match=f"{method}.*{grid[0]} x {grid[1]}"):
        kprpe.bucket_ids(*grid, method)


# ---- Eqs. (7) to (11) ----------------------------------------------------------------------------

def slow_table(net, points, layer, head, variant):
    """f(P) of one image as the equations read, [N][K]; W_L's rows are ordered layer, head, bucket."""
    first = (layer * net.heads + head) * 49 if variant == "multihead" else 0
    W, b = net.keypoint_linear.weight.tolist(), net.keypoint_linear.bias.tolist()
    height, width = GRID
    rows = []
    for y, x in itertools.product(range(height), range(width)):
        M = ((x + 0.5) / width, (y + 0.5) / height)
        D = [M[axis] - p[axis] for p in points for axis in (0, 1)]
        if variant == "absolute":
            D = [p[axis] for p in points for axis in (0, 1)]
        rows.append([sum(w * d for w, d in zip(W[first + k], D)) + b[first + k] for k in range(49)])
    return rows


@pytest.mark.parametrize("variant", ["absolute", "relative", "multihead"])
def test_tables_and_bias_are_those_of_a_slow_loop(variant):
    net, points = encoding(variant), batch(2, dtype=torch.float64)[1]
    tables = net.tables(points)
    assert tables.shape == (2, 2, 3, 15, 49)  # depth, B, H, N, K
    keypoint, static = net.split(points)
    ids, to_pairs = slow_ids(GRID, "product").tolist(), kprpe.PairBias(GRID, "product").double()
    for layer, image, head in itertools.product(range(2), range(2), range(3)):
        slow = slow_table(net, points[image].tolist(), layer, head, variant)
        same(tables[layer, image, head], slow)
        # Eq. (11): B_ij = f(P)[i, d(i, j)]
        bias = to_pairs(keypoint[layer], static[layer], torch.float64)
        same(bias[image, head], [[slow[i][ids[i][j]] for j in range(15)] for i in range(15)])


def test_keypoints_are_x_then_y_like_the_grid():
    """A keypoint near the right edge, weights on its x alone: tables fall along x, and along x only."""
    net = kprpe.KPRPE(1, GRID, 1, 1, "relative")
    with torch.no_grad():
        net.keypoint_linear.weight[:, 0] = 1
    table = net.tables(torch.tensor([[[0.9, 0.2]]]))[0, 0, 0, :, 0].view(GRID)
    same(table, torch.tensor([1 / 6, 3 / 6, 5 / 6]).expand(5, 3) - 0.9, 1e-6)


def test_a_mirror_is_one_minus_x():
    """Mirrored keypoints and a mirrored grid give mirrored differences: the patch centres are symmetric."""
    net, points = encoding("multihead"), batch(1, dtype=torch.float64)[1]
    turned = encoding("multihead")
    with torch.no_grad():
        turned.keypoint_linear.weight[:, 0::2] *= -1
    mirrored = torch.stack([1 - points[..., 0], points[..., 1]], -1)
    columns = net.tables(points).unflatten(-2, GRID)
    same(turned.tables(mirrored).unflatten(-2, GRID).flip(-2), columns)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("variant", ["absolute", "relative", "multihead"])
def test_the_split_equals_the_tables_and_so_do_its_gradients(variant, dtype, tolerance):
    net, points = encoding(variant, dtype=dtype), batch(2, dtype=dtype)[1].requires_grad_()
    keypoint, static = net.split(points)
    assert keypoint.shape == (2, 2, 3, 49) and static.shape == (2, 3, 15, 49)
    reference = net.tables(points)
    same(keypoint[:, :, :, None] + static[:, None], reference, tolerance)
    weights = torch.randn(reference.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    leaves = [points, *net.parameters()]
    fast = torch.autograd.grad(((keypoint[:, :, :, None] + static[:, None]) * weights).sum(), leaves)
    slow = torch.autograd.grad((reference * weights).sum(), leaves)
    for a, b in zip(fast, slow):
        same(a, b, tolerance * max(1, float(b.abs().max())))
        assert b.abs().max() > 0


def test_images_differ_by_what_is_the_same_for_all_queries():
    tables = encoding("multihead").tables(batch(2, dtype=torch.float64)[1])
    difference = tables[:, 0] - tables[:, 1]                                  # (depth, H, N, K)
    same(difference, difference[:, :, :1].expand_as(difference), 1e-12)
    assert difference.abs().max() > 0.1 and tables.std(3).max() > 0.1


def test_a_joint_shift_of_grid_and_keypoints_changes_nothing():
    points = batch(2, dtype=torch.float64)[1]
    for variant, moves in (("relative", False), ("multihead", False), ("absolute", True)):
        net = encoding(variant)
        before = net.tables(points)
        net.grid += torch.tensor([0.3, -0.1])
        after = net.tables(points + torch.tensor([0.3, -0.1]))
        assert torch.allclose(before, after, atol=1e-9) != moves


@pytest.mark.parametrize("method", list(kprpe.DISTANCES))
def test_gather_and_product_agree_and_so_do_their_gradients(method):
    to_pairs, K = kprpe.PairBias(GRID, method).double(), kprpe.DISTANCES[method]
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    keypoint, static, weights = draw(2, 3, K), draw(3, 15, K), draw(2, 3, 15, 15)
    outs = [way(keypoint, static, torch.float64) for way in (to_pairs.gather, to_pairs.product)]
    same(*outs, 1e-12)
    grads = [torch.autograd.grad((out * weights).sum(), (keypoint, static)) for out in outs]
    for a, b in zip(*grads):
        same(a, b, 1e-12)
    assert outs[1].stride() == (3 * 15 * 16, 15 * 16, 16, 1)  # rows of 16 for the GPU's attention
    same(to_pairs.gather(keypoint, 0, torch.float64), to_pairs.product(keypoint, 0, torch.float64), 1e-12)


# ---- Attention -----------------------------------------------------------------------------------

def slow_attention(net, x, bias):
    """Eqs. (1), (2) and (5) for one image and one head after the other; bias[b][h][i][j], undivided."""
    B, N, dim = x.shape
    d = dim // net.heads
    Q, K, V = (x @ W.T for W in net.qkv.weight.chunk(3))
    out = torch.zeros_like(x)
    for b, h, i in itertools.product(range(B), range(net.heads), range(N)):
        own = slice(h * d, (h + 1) * d)
        e = [float(Q[b, i, own] @ K[b, j, own] + bias[b][h][i][j]) / math.sqrt(d) for j in range(N)]
        a = [math.exp(value) / sum(map(math.exp, e)) for value in e]
        out[b, i, own] = sum(a[j] * V[b, j, own] for j in range(N))
    return out @ net.proj.weight.T + net.proj.bias


@pytest.mark.parametrize("rpe", ["none", *BIASES])
def test_attention_is_that_of_a_slow_loop(rpe):
    method = rpe if rpe in kprpe.STATIC else "product"
    net = randomise(kprpe.Attention(6, 3, rpe, kprpe.DISTANCES[method]).double())
    x = torch.randn(2, 15, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, parts = slow_ids(GRID, method), None
    bias = torch.zeros(2, 3, 15, 15, dtype=torch.float64)
    if rpe in kprpe.KEYPOINT:
        whole, points = encoding(rpe), batch(2, dtype=torch.float64)[1]
        parts = next(zip(*whole.split(points)))
        bias = whole.tables(points)[0].gather(-1, ids.expand(2, 3, -1, -1))
    elif rpe != "none":
        # Eq. (6): B_ij = W[d(i, j)]; of "cross" the sum of a row's value and a column's
        own = net.table[:, ids] if rpe != "cross" else net.table[:, ids].sum(-1)
        bias = own.expand(2, -1, -1, -1)
    with torch.no_grad():
        out = net(x, None if rpe == "none" else kprpe.PairBias(GRID, method).double(), parts)
        same(out, slow_attention(net, x, bias.tolist()))


def test_contextual_rpe_is_that_of_a_slow_loop():
    net, d, N = randomise(kprpe.ContextualRPE(4, 49).double(), 0.7), 4, 15
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, N, d, generator=generator, dtype=torch.float64)
    ids, out = kprpe.bucket_ids(*GRID, "product"), torch.zeros(2, 2, N, d, dtype=torch.float64)
    with torch.no_grad():
        for b, h, i in itertools.product(range(2), range(2), range(N)):
            e = torch.stack([q[b, h, i] @ (k[b, h, j] + net.k[ids[i, j]]) + net.q[ids[j, i]] @ k[b, h, j]
                             for j in range(N)]) / math.sqrt(d)
            out[b, h, i] = sum(a * (v[b, h, j] + net.v[ids[i, j]]) for j, a in enumerate(e.softmax(0)))
        same(net(q, k, v, ids[None]), out)


# ---- ViT -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("rpe", kprpe.RPES)
def test_at_the_start_every_encoding_is_the_plain_vit(rpe):
    plain, net, (image, points) = tiny("none").eval(), tiny(rpe).eval(), batch()
    own = [p for name, p in net.named_parameters() if name not in plain.state_dict()]
    assert all((p == 0).all() for p in own) and bool(own) == (rpe != "none")
    missing = net.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    with torch.no_grad():
        same(net(image, points), plain(image), 1e-6)
        same(net(image, points.flip(0)), plain(image), 1e-6)
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
def test_keypoints_change_the_answer(rpe):
    """Also the paper's absolute form, whose code cancels in the softmax."""
    net, plain, (image, points) = randomise(tiny(rpe)).eval(), tiny("none").eval(), batch()
    plain.load_state_dict({name: value for name, value in net.state_dict().items() if "rpe." not in name})
    with torch.no_grad():
        answers = [plain(image), net(image, points), net(image, 1 - points)]
    assert min((a - b).abs().max() for a, b in itertools.combinations(answers, 2)) > 1e-3


@pytest.mark.parametrize("rpe", kprpe.KEYPOINT)
def test_the_network_and_its_gradients_are_those_of_the_tables(rpe):
    """The fast path of a whole network beside attention on `KPRPE.tables`, by plain formulas."""
    net, (image, points) = randomise(tiny(rpe, drop_path=0)).double(), batch(3, dtype=torch.float64)
    x = net.patch_embed(image).flatten(2).mT + net.pos_embed
    ids = kprpe.bucket_ids(*GRID, "product").expand(3, 2, -1, -1)
    for block, table in zip(net.blocks, net.rpe.tables(points)):
        q, k, v = block.attn.qkv(block.norm1(x)).view(3, 15, 3, 2, 8).permute(2, 0, 3, 1, 4)
        a = ((q @ k.mT + table.gather(-1, ids)) / math.sqrt(8)).softmax(-1)
        x = x + block.attn.proj((a @ v).transpose(1, 2).reshape(3, 15, 16))
        x = x + block.mlp.fc2(F.relu6(block.mlp.fc1(block.norm2(x))))
    slow = net.feature(net.norm(x).flatten(1))
    fast = net(image, points)
    same(fast, slow)
    grads = [torch.autograd.grad(out.pow(3).sum(), list(net.parameters())) for out in (fast, slow)]
    for a, b in zip(*grads):
        same(a, b, 1e-9 * max(1, float(b.abs().max())))


def test_fewer_keypoints_are_the_first_ones():
    image, points = batch()
    for count in range(1, 5):
        net = randomise(tiny("kp-multihead", num_keypoints=count)).eval()
        with torch.no_grad():
            same(net(image, points), net(image, points[:, :count]))
    plain = tiny("kp-multihead", num_keypoints=0)
    assert plain.state_dict().keys() == tiny("none").state_dict().keys()
    assert plain(image).shape == (3, 6)


def test_digits_and_other_settings():
    net = kprpe.ViT(dict(dim=16, depth=1, heads=2, mlp_ratio=2, patch=4, image_size=40), "kp-multihead",
                 channels=1, features=10)
    assert net(torch.randn(2, 1, 40, 40), torch.rand(2, 5, 2)).shape == (2, 10)
    assert net.pos_embed.shape == (1, 100, 16)


def test_stochastic_depth_keeps_the_mean():
    block = kprpe.Block(4, 1, 4, 0.25, "none", 49)
    x = torch.ones(4000, 2, 4)
    torch.manual_seed(0)
    out = block.skip(x)
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert torch.equal(out, out[:, :1, :1].expand_as(out)) and abs(float(out.mean()) - 1) < 0.05
    assert block.eval().skip(x) is x
    drops = [block.drop for block in kprpe.ViT(TINY | dict(depth=3)).blocks]
    assert drops == pytest.approx([0, 0.05, 0.1])


def test_bfloat16_follows_float32():
    net, (image, points) = tiny("kp-multihead").eval(), batch()
    randomise(net.rpe, 0.5)
    with torch.no_grad():
        exact = net(image, points)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(image, points)
    assert rounded.dtype == torch.float32
    same(rounded, exact, 0.05 * float(exact.abs().max()))


@pytest.mark.parametrize("way, dtype", [("gather", torch.float32), ("product", torch.float32),
                                        ("product", torch.bfloat16)])
def test_the_encoding_keeps_little_for_the_backward_pass(way, dtype):
    """Under 0.2 MB for each image of the base network, beside attention's own bias; and the constants once,
    but for a product in float32, whose layers cast them."""
    net = encoding("multihead", (14, 14), 24, 16, dtype=torch.float32)
    to_pairs = kprpe.PairBias((14, 14), "product")

    def kept(count):
        seen = {}
        hook = lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t) is None or t
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
            for keypoint, static in zip(*net.split(torch.rand(count, 5, 2))):
                getattr(to_pairs, way)(keypoint, static, dtype)
        return sum(t.untyped_storage().nbytes() for t in seen.values())
    assert kept(3) - kept(1) < 2 * 0.2e6
    assert kept(1) < 4.1e6 or (way, dtype) == ("product", torch.float32)


def test_weights_are_named_as_published():
    names = set(tiny("kp-multihead").state_dict())
    assert {"pos_embed", "patch_embed.proj.weight", "blocks.1.norm1.weight", "blocks.0.attn.qkv.weight",
            "blocks.0.attn.proj.bias", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias", "norm.bias",
            "feature.0.weight", "feature.1.running_mean", "feature.2.weight", "feature.3.weight",
            "rpe.keypoint_linear.weight", "rpe.keypoint_linear.bias"} <= names
    assert "blocks.0.attn.qkv.bias" not in names and "feature.0.bias" not in names
    assert not [name for name in names if "pairs" in name or "grid" in name]
    names = set(kprpe.IResNet(50, 32).state_dict())
    assert {"input_layer.2.weight", "body.0.res_layer.4.weight", "body.3.shortcut_layer.1.running_var",
            "output_layer.3.bias", "output_layer.4.running_mean"} <= names
    assert "output_layer.4.weight" not in names and "body.1.shortcut_layer.0.weight" not in names


# ---- Table 3 -------------------------------------------------------------------------------------

PARAMETERS = {("small", "none"): 95_952_384, ("base", "none"): 114_869_760,
              ("small", "irpe"): 95_952_384 + 112_896, ("base", "irpe"): 114_869_760 + 112_896,
              ("small", "kp-multihead"): 95_952_384 + 51_744,
              ("base", "kp-multihead"): 114_869_760 + 206_976,
              ("small", "kp-relative"): 95_952_384 + 539, ("small", "kp-absolute"): 95_952_384 + 539,
              ("small", "product"): 95_952_384 + 12 * 8 * 49}


def on_meta(make, *args):
    with torch.device("meta"):
        return make(*args)


@pytest.mark.parametrize("size, rpe", PARAMETERS)
def test_parameters_of_table_3(size, rpe):
    assert sum(p.numel() for p in on_meta(kprpe.ViT, size, rpe).parameters()) == PARAMETERS[size, rpe]


@pytest.mark.parametrize("depth, count", [(50, 43_585_600), (101, 65_150_912)])
def test_parameters_of_the_iresnets(depth, count):
    assert sum(p.numel() for p in on_meta(kprpe.IResNet, depth).parameters()) == count


def gflops(net):
    """As Table 3 counts: 2 a multiplication of convolutions and linear layers, 5 a value of layer norms, 2 of
    batch norms, the convolution's bias; neither Q K^T nor A V, but all of iRPE's products. The code looks R^V
    up for each of N keys; ours, with the sums by bucket first, has a product by K of them."""
    (_, N, dim), depth, heads = net.pos_embed.shape, len(net.blocks), net.blocks[0].attn.heads
    total = 2 * N * net.patch_embed.proj.weight.numel() + N * dim + 5 * N * dim * (2 * depth + 1)
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            rows = 1 if name.startswith("feature") else N
            total += 2 * rows * module.weight.numel()
        elif isinstance(module, nn.BatchNorm1d):
            total += 2 * module.num_features
        elif isinstance(module, kprpe.ContextualRPE):
            total += 2 * N * heads * (module.q.numel() + module.k.numel() + N * module.v.shape[1])
    return total / 1e9


@pytest.mark.parametrize("size, rpe, published", [
    ("small", "none", 17.42), ("small", "irpe", 18.13), ("small", "kp-multihead", 17.44),
    ("base", "none", 24.83), ("base", "irpe", 26.25), ("base", "kp-multihead", 24.90)])
def test_gflops_of_table_3(size, rpe, published):
    assert gflops(on_meta(kprpe.ViT, size, rpe)) == pytest.approx(published, abs=0.005)


def test_iresnet_runs_and_learns_everywhere():
    net = kprpe.IResNet(50, 32, features=8)
    out = net(torch.randn(2, 3, 32, 32), torch.rand(2, 5, 2))
    assert out.shape == (2, 8)
    (out * torch.randn(2, 8)).sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]


# ---- Bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("points, message", [
    (torch.rand(3, 4, 2), r"\(3, 4, 2\): expected \(B, 5, 2\)"),
    (torch.rand(3, 68, 2), r"\(3, 68, 2\): expected \(B, 5, 2\)"),
    (torch.rand(3, 10), r"\(3, 10\)"),
    (100 * torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0)), "divide those in pixels"),
    (torch.full((3, 5, 2), float("nan")), "keypoints from nan"),
    (None, "kp-multihead needs keypoints")])
def test_bad_keypoints(points, message):
    net = tiny("kp-multihead").eval()
    with pytest.raises(ValueError, match=message):
        net(batch()[0], points)
    if points is not None:
        for method in (net.rpe.tables, net.rpe.split):
            with pytest.raises(ValueError, match=message):
                method(points)


def test_keypoints_outside_the_image_are_fine():
    tiny("kp-multihead")(batch()[0], torch.tensor([-0.4, 1.7]).expand(3, 5, 2))


@pytest.mark.parametrize("make, message", [
    (lambda: kprpe.ViT("large"), "'large'.*small, base or a dict"),
    (lambda: kprpe.ViT(dict(width=3)), "'width'.*image_size"),
    (lambda: kprpe.ViT("small", "kprpe"), "'kprpe'.*kp-multihead"),
    (lambda: kprpe.ViT("small", "kp-multihead", num_keypoints=-1), "-1 keypoints"),
    (lambda: kprpe.ViT(TINY | dict(heads=3)), "dim 16 by 3 heads"),
    (lambda: kprpe.ViT(TINY | dict(image_size=30)), "30 x 30 px by patches of 4"),
    (lambda: kprpe.KPRPE(5, GRID, 1, 1, "per-head"), "'per-head'"),
    (lambda: kprpe.KPRPE(0, GRID, 1, 1, "relative"), "0 keypoints"),
    (lambda: kprpe.IResNet(18), "IResNet18.*50 or 101"),
    (lambda: kprpe.IResNet(50, 100), "100 px.*multiple of 16")])
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape, message", [((3, 1, 20, 12), r"\(3, 1, 20, 12\).*3, 20, 12"),
                                            ((3, 3, 12, 20), "expected"), ((3, 20, 12), "expected"),
                                            ((1, 3, 20, 12), "batch of 1 image")])
def test_bad_images(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny("none")(torch.zeros(shape))
    assert tiny("none").eval()(torch.zeros(1, 3, 20, 12)).shape == (1, 6)


# ---- Losses --------------------------------------------------------------------------------------

FLIP = datasets.SCHEMES[5].flip
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
    torch.testing.assert_close(loss(cosines, norms, labels), expected, rtol=0, atol=1e-6)  # float32 buffers
    assert torch.equal(cosines, given)


@pytest.mark.parametrize("margin", MARGINS)
def test_gradients_of_losses_are_true_and_finite_at_the_ends(margin):
    generator = torch.Generator().manual_seed(1)
    cosines = (1.8 * torch.rand(4, 5, generator=generator, dtype=torch.float64) - 0.9).requires_grad_()
    norms, labels = torch.tensor([5.0, 60, 120, 20], dtype=torch.float64), torch.tensor([0, 4, 2, -1])
    loss = margin().eval()
    assert torch.autograd.gradcheck(lambda c: loss(c, norms, labels), cosines)
    ends = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 1, -1]], requires_grad=True)
    F.cross_entropy(loss(ends, torch.tensor([0.0, 20, 100]), torch.arange(3)), torch.arange(3)).backward()
    assert ends.grad.isfinite().all() and ends.grad[2, 0] != 0


def test_adaface_keeps_its_statistics():
    loss, mean, std = kprpe.AdaFace(), 20.0, 100.0
    for step in range(3):
        norms = 10 + 5 * torch.rand(8, generator=torch.Generator().manual_seed(step))
        cosines, labels = torch.linspace(-0.9, 0.9, 8)[:, None].repeat(1, 3), torch.arange(8) % 3
        logits = loss(cosines, norms, labels)
        mean, std = 0.01 * norms.mean().item() + 0.99 * mean, 0.01 * norms.std().item() + 0.99 * std
        expected = slow_logits("AdaFace", cosines, norms, labels, mean, std)  # updated, then used
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert loss.batch_mean.item() == pytest.approx(mean) and loss.batch_std.item() == pytest.approx(std)
    assert set(loss.state_dict()) == {"batch_mean", "batch_std"}
    loss.eval()(cosines, norms + 50, labels)
    assert loss.batch_mean.item() == pytest.approx(mean)
    loss.train()(cosines[:1], norms[:1], labels[:1])  # a batch of one
    assert loss.batch_std.item() == pytest.approx(std) and loss.batch_mean.item() != pytest.approx(mean, 1e-9)


def test_adaface_asks_more_of_easy_images_with_larger_norms():
    loss = kprpe.AdaFace().eval()
    norms, labels = torch.tensor([1.0, 10, 20, 40, 90]), torch.zeros(5, dtype=torch.long)
    easy = loss(torch.full((5, 2), 0.9), norms, labels)[:, 0]
    assert (easy.diff() < 0).all()


# ---- PartialFC -----------------------------------------------------------------------------------

def embedded(count=6, features=8, classes=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = 4 * torch.randn(count, features, generator=generator)
    return embeddings.requires_grad_(), torch.randint(classes, (count,), generator=generator)


def plain_loss(margin, weight, embeddings, labels):
    norms = embeddings.norm(dim=1)
    cosines = F.normalize(embeddings) @ F.normalize(weight).T
    return F.cross_entropy(margin(cosines, norms, labels), labels)


@pytest.mark.parametrize("margin", MARGINS)
def test_partial_fc_in_one_process_is_the_plain_softmax_loss(margin, monkeypatch):
    monkeypatch.setattr(kprpe, "ROWS", 4)  # so that 11 classes take three rounds
    fc, (embeddings, labels) = kprpe.PartialFC(8, 11, margin()), embedded()
    loss = fc(embeddings, labels)
    grads = torch.autograd.grad(loss, [embeddings, fc.weight])
    expected = plain_loss(margin(), fc.weight, embeddings, labels)
    torch.testing.assert_close(loss, expected)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, [embeddings, fc.weight])):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fc(embeddings, labels), fc.eval()(embeddings, labels), rtol=1e-2, atol=0)


def test_partial_fc_samples_the_labels_and_some_others():
    torch.manual_seed(0)
    fc, (embeddings, labels) = kprpe.PartialFC(8, 100, kprpe.CosFace(), 0.3), embedded(classes=100)
    seen = []
    for _ in range(20):
        index = fc.sample(labels)
        assert len(index) == 30 and (index.diff() > 0).all() and set(labels.tolist()) <= set(index.tolist())
        seen += index.tolist()
    assert set(seen) == set(range(100))
    torch.manual_seed(1)
    index = fc.sample(labels)
    torch.manual_seed(1)
    loss = fc(embeddings, labels)
    grads = torch.autograd.grad(loss, [embeddings, fc.weight])
    local = torch.searchsorted(index, labels)
    expected = plain_loss(kprpe.CosFace(), fc.weight[index], embeddings, local)
    torch.testing.assert_close(loss, expected)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, [embeddings, fc.weight])):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)
    others = torch.ones(100, dtype=torch.bool).index_fill_(0, index, False)
    assert (grads[1][others] == 0).all()
    many = torch.arange(40)
    assert set(many.tolist()) <= set(fc.sample(many).tolist()) and len(fc.sample(many)) == 40
    assert fc.sample(torch.full((50,), -1)).shape == (50,)  # no label in this shard, a batch above the share


def test_adamw_decays_classes_that_were_not_sampled_and_leaves_their_cosines():
    torch.manual_seed(0)
    fc, (embeddings, labels) = kprpe.PartialFC(8, 1000, kprpe.AdaFace(), 0.1), embedded(classes=1000)
    before = fc.weight.detach().clone()
    fc(embeddings, labels).backward()
    others = (fc.weight.grad == 0).all(1)
    torch.optim.AdamW([fc.weight], lr=0.1, weight_decay=0.5, fused=True).step()
    assert others.sum() == 900
    torch.testing.assert_close(fc.weight.detach()[others], 0.95 * before[others])
    assert not torch.isclose(fc.weight.detach()[labels], 0.95 * before[labels]).all(1).any()


def test_partial_fc_takes_bad_input():
    fc, (embeddings, labels) = kprpe.PartialFC(8, 11, kprpe.AdaFace()), embedded()
    with torch.no_grad():
        embeddings[0] = 0
    fc(embeddings, labels).backward()
    assert (embeddings.grad[0] == 0).all() and embeddings.grad[1:].abs().min() > 0
    assert embeddings.grad.isfinite().all() and fc.weight.grad.isfinite().all()
    assert fc(embeddings[:1], labels[:1]).isfinite() and fc.margin.batch_std.isfinite()
    for wrong in (-1, 11):
        with pytest.raises(ValueError, match="expected 0 to 10"):
            fc(embeddings, torch.full((6,), wrong))
    with pytest.raises(ValueError, match="1 classes on 1 processes"):
        kprpe.PartialFC(8, 1, kprpe.AdaFace())
    with pytest.raises(ValueError, match="sample rate 0"):
        kprpe.PartialFC(8, 11, kprpe.AdaFace(), 0)
    with pytest.raises(ValueError, match=r"\(11, 8\), expected \(12, 8\)"):
        kprpe.PartialFC(8, 12, kprpe.AdaFace()).load_shards(fc.gather_state())
    fc = kprpe.PartialFC(8, 11, kprpe.CosFace())
    far = -100 * F.normalize(fc.weight.detach()[:1])
    assert fc(far, torch.tensor([0])) > 80  # below a probability of 1e-30


class Peak(TorchDispatchMode):
    """Counts the bytes of storages that live, of those made inside; backward on a CPU runs in this thread."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.alive = set()

    def gone(self, key, size):
        self.bytes -= size
        self.alive.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
                self.peak = max(self.peak, self.bytes)
        return out


@pytest.mark.parametrize("rate", [1.0, 0.6])
def test_memory_is_four_shards_and_the_sampled_logits(rate):
    classes, features, count = 50_000, 64, 32
    fc = kprpe.PartialFC(features, classes, kprpe.AdaFace(), rate)
    embeddings, labels = embedded(count, features, classes)
    shard, logits = 4 * classes * features, 4 * count * int(rate * classes)
    optimizer = torch.optim.AdamW([fc.weight], fused=True)
    with Peak() as plain:
        plain_loss(fc.margin, fc.weight, embeddings, labels).backward()
    fc.weight.grad = None
    peaks = []
    for _ in range(2):  # the second step has the optimizer's moments from the beginning
        with Peak() as peak:
            fc(embeddings, labels).backward()
            optimizer.step()
        optimizer.zero_grad()
        peaks.append(peak.peak)
    rounds = 4 * 4 * kprpe.ROWS * features  # what a round of ROWS classes needs
    assert shard + peaks[1] <= 4 * shard + logits  # the module: weights, gradient, all that lies between
    moments = 3 * shard + peaks[1]
    assert moments <= max(4 * shard + logits + rounds, 3 * shard + 2.3 * logits + rounds)
    assert plain.peak > 3 * shard  # beside the weights; that count sees what it should


def test_initial_weights_do_not_depend_on_the_number_of_processes():
    torch.manual_seed(3)
    weight = kprpe.PartialFC(8, 11, kprpe.AdaFace()).weight.detach()
    assert weight.shape == (11, 8) and weight.std() == pytest.approx(0.01, rel=0.3)


def test_class_weights_may_share_the_networks_optimizer():
    def make():
        net, fc = torch.nn.Linear(3, 8), kprpe.PartialFC(8, 11, kprpe.AdaFace())
        return net, fc, torch.optim.AdamW([{"params": net.parameters()}, {"params": [fc.weight]}])

    def step(net, fc, optimizer, labels):
        optimizer.zero_grad()
        fc(net(torch.arange(18.0).view(6, 3) % 7), labels).backward()
        optimizer.step()
        return fc.weight.detach()

    _, labels = embedded()
    (net, fc, optimizer), (other, shards, resumed) = make(), make()
    step(net, fc, optimizer, labels)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    shards.load_shards(fc.gather_state(optimizer), resumed)
    assert torch.equal(step(net, fc, optimizer, labels), step(other, shards, resumed, labels))


def one_step(fc, optimizer, seed, parts=1, part=0):
    """A step on a part of the batch: the loss, and the gradient of that part's embeddings."""
    embeddings, labels = embedded(seed=seed)
    embeddings = embeddings.detach().chunk(parts)[part].requires_grad_()
    loss = fc(embeddings, labels.chunk(parts)[part])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), embeddings.grad


def adamw(fc):
    return torch.optim.AdamW([fc.weight], lr=1e-3, fused=True)


def two_ranks(rank, folder):
    """What one of two processes does in the test below: start, loss and gradients, save, load, sample."""
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
    _, labels = embedded(classes=60)
    local = labels - sampled.start
    local = torch.where((local >= 0) & (local < 30), local, -1)
    results["index"], results["start"] = sampled.sample(local), sampled.start
    results["sampled"] = sampled(embedded()[0].detach().chunk(2)[rank], labels.chunk(2)[rank]).detach()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # the exit of a Python that has had gloo's threads aborts now and then on a busy machine


def test_two_ranks_equal_one_process_and_checkpoints_move_between_them(tmp_path):
    torch.manual_seed(3)
    one = kprpe.PartialFC(8, 11, kprpe.AdaFace())
    optimizer, initial = adamw(one), one.weight.detach().clone()
    one_step(one, optimizer, 0)
    torch.save(one.gather_state(optimizer), tmp_path / "one.pt")
    mp.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
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
    # 1 -> 2 -> 1 processes: what was loaded is what was saved, and training goes on as in one process
    saved, loaded = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two-loaded.pt"))
    assert torch.equal(saved["weight"], loaded["weight"]) and saved["optimizer"].keys() == {
        "step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(value, loaded["optimizer"][key]) for key, value in saved["optimizer"].items())
    again = kprpe.PartialFC(8, 11, kprpe.AdaFace())
    resumed = adamw(again)
    again.load_shards(torch.load(tmp_path / "two.pt", weights_only=True), resumed)
    torch.testing.assert_close(one_step(again, resumed, 2)[0], one_step(one, optimizer, 2)[0])
    torch.testing.assert_close(again.weight, one.weight)
    # Sampled: the labels of both ranks' images are there, and the loss is the same in both
    sampled = torch.cat([r["index"] + r["start"] for r in ranks])
    assert len(sampled) == 2 * 12 and set(embedded(classes=60)[1].tolist()) <= set(sampled.tolist())
    assert torch.equal(ranks[0]["sampled"], ranks[1]["sampled"])


# ---- Augmentation --------------------------------------------------------------------------------

NONE = kprpe.Augmentation(flip=0, scale=0, shift=0, rotate=0, cutout=0, blur=0, ops=0)


def pictures(count=8, size=56, seed=0):
    """Smooth random pictures in 0..255."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255


def test_geometry_is_the_chain_of_its_parts():
    torch.manual_seed(0)
    strength = kprpe.Augmentation()
    matrix, mirror = kprpe.draw_geometry(4000, 112, strength)
    assert matrix.shape == (4000, 2, 3) and mirror.dtype == torch.bool
    linear = matrix[:, :, :2].double()
    sign = torch.where(mirror, -1.0, 1.0).double()
    determinant = torch.linalg.det(linear)
    assert torch.equal(determinant.sign(), sign)
    zoom = determinant.abs().sqrt()
    rotation = linear / zoom[:, None, None] * torch.stack([sign, torch.ones_like(sign)], 1)[..., None]
    angle = torch.atan2(rotation[:, 0, 1], rotation[:, 0, 0]).rad2deg()
    one = torch.eye(2).double().expand(4000, 2, 2)
    torch.testing.assert_close(rotation @ rotation.mT, one, atol=1e-5, rtol=0)
    assert 0.8 <= zoom.min() < 0.81 and 1.19 < zoom.max() <= 1.2 + 1e-6
    assert angle.abs().max() <= 20.001 and 0.17 < (angle.abs() > 1e-3).double().mean() < 0.23
    assert 0.47 < mirror.double().mean() < 0.53
    # The point t = U(-1, 1) (56 / scale - 56 + 56 e), e in U(0, 0.1), from the middle ends in the middle.
    middle = torch.full((1, 1, 2), 55.5).double()
    source = warp.apply_affine(warp.invert(matrix.double()), middle)[:, 0] - middle[0]
    shift = (rotation @ source[..., None])[..., 0].abs()
    low, high = ((56 / zoom - 56 + 56 * e)[:, None] for e in (0, 0.1))
    assert (shift <= torch.maximum(low.abs(), high.abs()) + 1e-4).all() and shift.max() > 16
    # From the drawn numbers, one image by homogeneous matrices: code's order, about (W - 1) / 2
    still, _ = kprpe.draw_geometry(3, 112, NONE)
    torch.testing.assert_close(still, torch.eye(2, 3).expand(3, 2, 3), atol=1e-5, rtol=0)


def test_geometry_one_by_one(monkeypatch):
    """The matrix against a product of 3x3 matrices, with numbers drawn by hand."""
    drawn = iter([torch.tensor([0.9]), torch.tensor([0.0]), torch.tensor([0.3]), torch.tensor([0.0]),
                  torch.tensor([0.05]), torch.tensor([[0.7, -0.4]])])
    monkeypatch.setattr(kprpe, "uniform", lambda *args, device: next(drawn))
    matrix, mirror = kprpe.draw_geometry(1, 112, kprpe.Augmentation())
    c, s, m = math.cos(0.3), math.sin(0.3), 55.5
    t = [u * (56 / 0.9 - 56 + 56 * 0.05) for u in (0.7, -0.4)]

    def shift(x, y):
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])

    chain = [shift(m, m), np.diag([-1, 1, 1]), np.diag([0.9, 0.9, 1]), shift(-t[0], -t[1]),
             np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]), shift(-m, -m)]
    np.testing.assert_allclose(matrix[0], np.linalg.multi_dot(chain)[:2], atol=1e-5)
    assert mirror.item()


def test_points_follow_a_drawn_dot():
    torch.manual_seed(1)
    points = torch.tensor([[40.0, 48], [70, 50], [55, 66], [44, 80], [68, 78]])
    order, found = torch.arange(5), 0
    y, x = torch.meshgrid(torch.arange(112.0), torch.arange(112.0), indexing="ij")
    dots = [255 * (-((x - px) ** 2 + (y - py) ** 2) / 8).exp() for px, py in points]
    strength = kprpe.Augmentation(cutout=0, blur=0, ops=0, rotate=1)
    for i, dot in enumerate(dots):
        image, moved = kprpe.augment(dot.expand(16, 3, 112, 112), points.expand(16, 5, 2), strength, FLIP)
        for picture, five in zip(image[:, 0], moved):
            place = torch.stack([(x * picture).sum(), (y * picture).sum()]) / picture.sum()
            nearest = (five - place).norm(dim=1).argmin()
            inside = (five.min() > 8) & (five.max() < 103)
            mirrored = five[0, 0] - five[2, 0] > 0  # never: mirrored faces have their eyes swapped
            assert not mirrored
            if inside:
                assert nearest in (order[i], FLIP[i]) and (five[nearest] - place).norm() < 1
                found += 1
    assert found > 40


def test_mirroring_twice_changes_nothing():
    image, points = pictures(), torch.rand(8, 5, 2) * 55
    strength = kprpe.Augmentation(flip=1, scale=0, shift=0, rotate=0, cutout=0, blur=0, ops=0)
    once = kprpe.augment(image, points, strength, FLIP)
    torch.testing.assert_close(once[0], image.flip(3), atol=1e-2, rtol=0)
    expected = points[:, FLIP] * torch.tensor([-1.0, 1]) + torch.tensor([55.0, 0])
    torch.testing.assert_close(once[1], expected, atol=1e-4, rtol=0)
    twice = kprpe.augment(*once, strength, FLIP)
    torch.testing.assert_close(twice[0], image, atol=2e-2, rtol=0)
    torch.testing.assert_close(twice[1], points, atol=1e-4, rtol=0)


def test_cutout_leaves_a_box_or_makes_holes():
    torch.manual_seed(0)
    boxes = kprpe.draw_cutout(500, 112, holes=0)
    areas = []
    for box in boxes:
        rows, columns = box.any(1).nonzero()[:, 0], box.any(0).nonzero()[:, 0]
        h, w = len(rows), len(columns)
        assert box.sum() == h * w and rows[-1] - rows[0] == h - 1 and columns[-1] - columns[0] == w - 1
        assert 0.73 < w / h < 1.36
        areas.append(h * w / 112 ** 2)
    assert 0.19 < min(areas) < 0.25 and max(areas) > 0.93
    assert boxes[:, 0].any() and boxes[:, -1].any() and boxes[..., 0].any() and boxes[..., -1].any()
    hidden = (~kprpe.draw_cutout(200, 112, holes=1)).float().mean((1, 2))
    assert 0 < hidden.min() and hidden.max() < 20 * 256 / 112 ** 2 and 0.05 < hidden.mean() < 0.11
    share = (kprpe.draw_cutout(2000, 28, holes=0.05)[:, [0, -1]].float().mean((1, 2)) > 0).float().mean()
    assert 0 < share < 1
    kept = kprpe.augment(torch.full((2000, 3, 28, 28), 9.0), None, kprpe.Augmentation(
        flip=0, scale=0, shift=0, rotate=0, cutout=0.2, blur=0, ops=0))[0]
    torch.testing.assert_close(kept, torch.where(kept < 4, 0.0, 9.0), atol=1e-3, rtol=0)
    assert 0.16 < (kept < 4).any(3).any(2).any(1).float().mean() < 0.24


CV2 = dict(nearest=cv2.INTER_NEAREST, linear=cv2.INTER_LINEAR, cubic=cv2.INTER_CUBIC,
           lanczos=cv2.INTER_LANCZOS4, area=cv2.INTER_AREA)


@pytest.mark.parametrize("method", kprpe.METHODS)
def test_resizing_is_cv2s(method):
    sizes = torch.tensor([22, 37, 40, 56, 84, 111, 112])
    image = pictures(1, 112)[0, 0].numpy()
    number, full = torch.full((7,), kprpe.METHODS.index(method)), torch.full((7,), 112)
    for size, down, up in zip(sizes.tolist(), kprpe.resize_matrix(112, full, sizes, number),
                              kprpe.resize_matrix(112, sizes, full, number)):
        small = cv2.resize(image, (size, size), interpolation=CV2[method])
        np.testing.assert_allclose((down @ torch.tensor(image) @ down.T)[:size, :size], small, atol=0.1)
        padded = F.pad(torch.tensor(small), (0, 112 - size, 0, 112 - size), value=torch.nan).nan_to_num(1e6)
        large = cv2.resize(small, (112, 112), interpolation=CV2[method])
        np.testing.assert_allclose(up @ padded @ up.T, large, atol=0.1)


def test_filters_are_cv2s():
    image = pictures(1)[0, 0].numpy()
    offset = torch.arange(-12, 13)
    for k in range(1, 10):
        box = ((offset >= -(k // 2)) & (offset < k - k // 2)).float()[None] / k
        matrix = kprpe.filter_matrix(56, box)[0]
        expected = cv2.blur(image, (k, k))
        np.testing.assert_allclose(matrix @ torch.tensor(image) @ matrix.T, expected, atol=1e-2)
    for sigma in (0.5, 1.7, 4.0):
        gaussian = (-0.5 * (offset / sigma) ** 2).exp()[None]
        matrix = kprpe.filter_matrix(56, gaussian / gaussian.sum())[0]
        expected = cv2.GaussianBlur(image, (25, 25), sigma)
        np.testing.assert_allclose(matrix @ torch.tensor(image) @ matrix.T, expected, atol=1e-2)


def test_blur_touches_its_share_and_keeps_flat_images():
    torch.manual_seed(0)
    image = torch.cat([pictures(400), torch.full((100, 3, 56, 56), 77.0)])
    result = kprpe.blur(image, kprpe.Augmentation())
    changed = (result != image).flatten(1).any(1)
    assert 0.15 < changed[:400].float().mean() < 0.25
    torch.testing.assert_close(result[400:], image[400:], atol=1e-3, rtol=0)
    all_kinds = kprpe.blur(image[:50], kprpe.Augmentation(blur=1))
    assert all_kinds.min() >= 0 and all_kinds.max() <= 255
    fewer = all_kinds.diff(dim=3).abs().mean() / image[:50].diff(dim=3).abs().mean()
    assert 0.3 < fewer < 1


def slow_op(name, image, factor):
    """One PIL operation on one image, (3, H, W) uint8, by loops and whole numbers."""
    image = image.astype(int)
    grey = (19595 * image[0] + 38470 * image[1] + 7471 * image[2] + 0x8000) >> 16
    if name == "identity":
        return image
    if name == "grayscale":
        return np.stack([grey] * 3)
    if name == "equalize":
        out = np.empty_like(image)
        for c, channel in enumerate(image):
            counts = [int((channel == level).sum()) for level in range(256)]
            nonzero = [count for count in counts if count]
            step = (sum(nonzero) - nonzero[-1]) // 255
            n, table = step // 2, []
            for level in range(256):
                table.append(min(255, n // step) if step else level)
                n += counts[level]
            out[c] = np.array(table)[channel]
        return out
    smooth = image.copy()
    for y in range(1, image.shape[1] - 1):
        for x in range(1, image.shape[2] - 1):
            window = image[:, y - 1:y + 2, x - 1:x + 2]
            smooth[:, y, x] = np.round((window.sum((1, 2)) + 4 * image[:, y, x]) / 13)
    base = {"brightness": np.zeros_like(image), "saturation": np.stack([grey] * 3), "sharpness": smooth,
            "contrast": np.full_like(image, int(grey.mean() + 0.5))}[name]
    return np.clip(base + factor * (image - base), 0, 255)


@pytest.mark.parametrize("name", kprpe.OPS)
def test_colour_operations_are_pils(name):
    image = pictures(3, 24).round()
    image[1] = image[1] * 0.3 + 60
    image[2, 0] = 90  # one level in a channel
    image = image.round()
    for factor in (0.34, 0.85, 1.0, 1.15, 1.66):
        op = torch.full((3,), kprpe.OPS.index(name))
        result = kprpe.recolour(image, op, torch.full((3,), factor))
        for out, picture in zip(result, image):
            expected = slow_op(name, picture.numpy().astype(np.uint8), factor)
            # Grey and smoothed levels are whole in PIL: half a level times |1 - factor|, of the mean a whole.
            bound = 1.0 if name == "contrast" else 0.52 if name != "equalize" else 0
            np.testing.assert_allclose(out, expected, atol=bound)


def test_operations_are_drawn_as_often_as_they_should(monkeypatch):
    torch.manual_seed(0)
    drawn = []
    monkeypatch.setattr(kprpe, "recolour", lambda image, op, factor: drawn.append((op, factor)) or image)
    kprpe.colour(torch.zeros(70_000, 1, 1, 1), kprpe.Augmentation())
    op, factor = (torch.cat(values) for values in zip(*drawn))
    assert len(drawn) == 2
    rare = (op >= 5).float().mean()
    assert rare == pytest.approx((2 / 7) ** 3, rel=0.1)
    assert op.bincount()[:5].float() / len(op) == pytest.approx([(1 - rare.item()) / 5] * 5, rel=0.03)
    change = (factor - 1).abs()
    assert change.min() == pytest.approx(0.15, abs=1e-5) and change.max() == pytest.approx(0.66, abs=1e-5)
    assert (factor > 1).float().mean() == pytest.approx(0.5, abs=0.01)
    assert len(change.mul(1e4).round().unique()) == 18
    drawn.clear()
    kprpe.colour(torch.zeros(20_000, 1, 1, 1), kprpe.PLAIN)
    ops, factors = (torch.stack(values) for values in zip(*drawn))
    assert torch.equal(ops.sort(0).values, torch.tensor([[1], [2], [3]]).expand(3, 20_000))
    assert (factors != 1).any(0).float().mean() == pytest.approx(0.2, abs=0.01)
    assert 0.5 <= factors.min() and factors.max() <= 1.5


@pytest.mark.parametrize("strength", [kprpe.Augmentation(), kprpe.PLAIN])
def test_augment_follows_the_seed_and_keeps_the_range(strength):
    image, points = pictures(64, 40), torch.rand(64, 5, 2) * 40
    given = image.clone()
    torch.manual_seed(7)
    first = kprpe.augment(image, points, strength, FLIP)
    torch.manual_seed(7)
    second = kprpe.augment(image, points, strength, FLIP)
    third = kprpe.augment(image, None, strength)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and torch.equal(image, given)
    assert third[1] is None and not torch.equal(third[0], first[0])
    assert first[0].min() >= 0 and first[0].max() <= 255 and first[0].dtype == torch.float32
    with pytest.raises(ValueError, match="5 points of unknown meaning"):
        kprpe.augment(image, points, strength)
    still = kprpe.augment(image, points, NONE)
    torch.testing.assert_close(still[0], image, atol=1e-2, rtol=0)
    torch.testing.assert_close(still[1], points, atol=1e-4, rtol=0)


class NoWaiting(TorchDispatchMode):
    """Fails on operations for whose answer the host has to wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert not any(bad in name for bad in ("_local_scalar_dense", "nonzero", "masked_select")), name
        if name == "aten::index.Tensor":
            assert not any(index is not None and index.dtype == torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_a_gpu():
    image, points = pictures(), torch.rand(8, 5, 2) * 55
    fc, (embeddings, labels) = kprpe.PartialFC(8, 50, kprpe.AdaFace(), 0.5), embedded(classes=50)
    kprpe.augment(image, points, kprpe.Augmentation(), FLIP)  # constants are copied once
    with NoWaiting():
        for strength in (kprpe.Augmentation(), kprpe.PLAIN):
            kprpe.augment(image, points, strength, FLIP)
        fc.sample(labels)
        fc.margin(torch.zeros(6, 50), torch.ones(6), labels)


def test_repeated_augmentation_repeats_identities():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 40, 20_000) * 3  # gaps in the labels are allowed
    order = rng.permutation(20_000)
    for p in (0.0, 0.1, 0.5, 1.0):
        given = order.copy()
        result = kprpe.repeated(order, labels, p, np.random.default_rng(1))
        assert np.array_equal(order, given) and result.shape == order.shape and result[0] == order[0]
        changed = np.flatnonzero(result != order)
        assert (np.diff(changed) > 1).all()
        assert len(changed) / len(order) == pytest.approx(p / (1 + p), abs=0.012)
        assert (labels[result[changed]] == labels[result[changed - 1]]).all()
    # every image of an identity can come, and one that has a single image repeats it
    drawn = kprpe.repeated(np.zeros(4000, int), np.array([5, 5, 5, 1]), 1.0, rng)
    assert set(drawn.tolist()) == {0, 1, 2}
    assert kprpe.repeated(np.array([3, 0]), np.array([5, 5, 5, 1]), 1.0, rng).tolist() == [3, 3]
    assert len(kprpe.repeated(np.zeros(0, int), labels, 0.5, rng)) == 0


# ---- Optimisation --------------------------------------------------------------------------------

class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = torch.nn.Conv2d(3, 4, 2)
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 4, 4))
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, 4))
        self.norm = torch.nn.LayerNorm(4)
        self.keypoint_linear = torch.nn.Linear(10, 49)
        self.table_k = torch.nn.Parameter(torch.zeros(1, 4, 49))
        self.frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_parameter_groups_decay_matrices_but_not_the_position_embedding():
    net = Named()
    decayed, rest, *encodings = kprpe.parameter_groups(net, 0.05)
    assert not any(group["params"] for group in encodings)
    names = {id(weight): name for name, weight in net.named_parameters()}
    assert decayed["weight_decay"] == 0.05 and rest["weight_decay"] == 0
    assert {names[id(w)] for w in decayed["params"]} == {
        "patch_embed.weight", "keypoint_linear.weight", "table_k"}
    assert {names[id(w)] for w in rest["params"]} == {
        "patch_embed.bias", "pos_embed", "mask_token", "norm.weight", "norm.bias", "keypoint_linear.bias"}
    fc = kprpe.PartialFC(8, 11, kprpe.AdaFace())
    assert kprpe.parameter_groups(fc, 0.05)[0]["params"][0] is fc.weight
    assert kprpe.parameter_groups(fc, 0.05)[1]["params"] == []


@pytest.mark.parametrize("rpe", ["product", "irpe", "kp-multihead"])
def test_encodings_learn_at_their_own_rate(rpe):
    """A bias over c in the network, its rate times c and its decay over c: as one that is not divided."""
    net = tiny(rpe)
    groups = kprpe.parameter_groups(net, 0.05, 4.0)
    assert [group["scale"] for group in groups] == [1, 1, 4, 4]
    assert [group["weight_decay"] for group in groups] == [0.05, 0, 0.0125, 0]
    own = {id(weight) for group in groups[2:] for weight in group["params"]}
    names = {name for name, weight in net.named_parameters() if id(weight) in own}
    assert names == {"product": {"blocks.0.attn.table", "blocks.1.attn.table"},
                     "irpe": {f"blocks.{i}.attn.contextual.{part}" for i in range(2) for part in "qkv"},
                     "kp-multihead": {"rpe.keypoint_linear.weight", "rpe.keypoint_linear.bias"}}[rpe]
    assert len(own) + sum(len(group["params"]) for group in groups[:2]) == len(list(net.parameters()))


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    rate = [kprpe.learning_rate(step, 340, 30, 1e-3) for step in range(341)]
    assert rate[0] == 0 and rate[15] == pytest.approx(5e-4) and rate[30] == pytest.approx(1e-3)
    assert rate[185] == pytest.approx(5e-4) and rate[340] == pytest.approx(0, abs=1e-12)
    assert max(rate) == rate[30] and (np.diff(rate[30:]) < 0).all()
    assert kprpe.learning_rate(0, 10, 0, 1.0) == 1 and kprpe.learning_rate(3, 3, 3, 1.0) == 1


# ---- Data: aligned, unaligned, digits ------------------------------------------------------------

def arguments(*flags, root="", **own):
    """Flags of a run of a few seconds; `own` for what is no flag."""
    args = kprpe.parse_args([*SMALL_RUN, *(["--data-root", str(root)] if root else []), *flags])
    vars(args).update(own)
    return args


SMALL_RUN = ["--device", "cpu", "--workers", "0", "--limit", "40", "--size", "32", "--dim", "16",
             "--depth", "2", "--heads", "2", "--epochs", "2", "--batch-size", "8", "--warmup", "0.5",
             "--also-rpe", "", "--align-steps", "0", "--eval-every", "2"]


def write_people(root, people=3, each=4, size=48, marked=True):
    """A folder of noise faces of `people`, with five points that vary, as .pts beside them."""
    rng = np.random.default_rng(0)
    for person in range(people):
        folder = root / f"person{person}"
        folder.mkdir(parents=True)
        for i in range(each):
            cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 256, (size, size, 3), np.uint8))
            if marked:
                points = size / 112 * datasets.ARCFACE_5 + rng.uniform(0, 3, 2)
                datasets.write_pts(folder / f"{i}.pts", points)
    return root


def test_aligned_crops_bring_the_keypoints_to_the_template():
    args = arguments()
    split = kprpe.read_set(args, "test")
    data = kprpe.make_dataset(args, split, 1.0)
    points = data.__getitems__([(0, i) for i in range(8)])["points"]
    fitted = warp.fit_similarity(points.double(), torch.from_numpy(kprpe.template(32)))
    same(fitted, torch.eye(2, 3).double().expand(8, 2, 3), 1e-4)  # what no similarity can better
    assert not torch.allclose(points, torch.from_numpy(kprpe.template(32)).float(), atol=0.3)  # poses differ
    same(kprpe.template(112), datasets.ARCFACE_5)
    same(kprpe.template(32)[0], (datasets.ARCFACE_5[0] + 0.5) * 32 / 112 - 0.5)


def test_unaligned_crops_are_the_box_and_the_steps_lie_between():
    args = arguments()
    split = kprpe.read_set(args, "test")
    loose, half, aligned = (kprpe.make_dataset(args, split, t).frames for t in (0.0, 0.5, 1.0))
    same(loose, datasets.square_frames(split.boxes, 32, args.margin))
    same(half, (loose + aligned) / 2)
    assert (loose[:, 0, 1] == 0).all() and aligned[:, 0, 1].abs().max() > 0.05  # turned upright


def test_whole_images_are_aligned_the_same_way(tmp_path):
    args = arguments("--data", "folder", "--box", "image", root=write_people(tmp_path / "test").parent)
    split = kprpe.read_set(args, "test")
    assert split.boxes is None and split.points.shape == (12, 5, 2)
    keys = [(0, i) for i in range(12)]
    aligned = kprpe.make_dataset(args, split, 1.0).__getitems__(keys)
    same(aligned["points"], torch.from_numpy(kprpe.template(32)).float().expand(12, 5, 2), 1e-3)
    whole = kprpe.make_dataset(args, split, 0.0).__getitems__(keys)
    same(whole["matrix"][:, 0, 0], torch.full((12,), 32 / 48), 1e-6)
    half = kprpe.make_dataset(args, split, 0.5).__getitems__(keys)
    same(half["matrix"], (whole["matrix"] + aligned["matrix"]) / 2, 1e-5)


def test_images_without_landmarks_are_taken_as_aligned(tmp_path):
    args = arguments("--data", "folder", root=write_people(tmp_path / "train", marked=False).parent)
    images, data = kprpe.training_set(args)
    batch = data.__getitems__([(0, 3)])
    assert "points" not in batch and len(images.ids) == 3
    image, points = kprpe.prepare(batch, torch.device("cpu"))
    assert image.shape == (1, 3, 32, 32) and image.max() <= 255
    same(points[0], kprpe.template(32), 1e-5)
    image, keypoints = kprpe.inputs(image, points)
    assert image.min() >= -1 and image.max() <= 1
    same(keypoints[0, 0], (datasets.ARCFACE_5[0] + 0.5) / 112, 1e-6)


def test_keypoints_are_drawn_where_they_are():
    image = torch.zeros(2, 3, 32, 32)
    points = torch.tensor([[[4.0, 9], [20, 11], [7, 30], [1, 1], [25, 25]]] * 2)
    drawn, keypoints = kprpe.inputs(image, points, True)
    same(keypoints, (points + 0.5) / 32)
    assert (drawn[:, :, 9, 4] == 1).all() and (drawn[:, :, 11, 20] == 1).all()  # white, at row y, column x
    assert (drawn[:, :, 4, 9] < -0.99).all() and torch.equal(kprpe.inputs(image, points)[0], image - 1)


def test_five_points_of_any_scheme():
    points = np.random.default_rng(0).uniform(0, 9, (3, 68, 2)).astype(np.float32)
    five = kprpe.five_points(points)
    np.testing.assert_allclose(five[:, 2], points[:, 30])  # the nose tip
    np.testing.assert_allclose(five[:, 0], points[:, 36:42].mean(1), rtol=1e-5)
    with pytest.raises(ValueError, match="7 landmarks are no known scheme"):
        kprpe.five_points(points[:, :7])


def test_some_images_without_landmarks_are_an_error(tmp_path):
    root = write_people(tmp_path / "train").parent
    (root / "train" / "person1" / "2.pts").unlink()
    with pytest.raises(ValueError, match="person1/2.png has no landmarks"):
        kprpe.training_set(arguments("--data", "folder", root=root))


def test_landmarks_of_records_beside_them(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(6)]
    put_records(tmp_path, [payload([key % 3], encoded(image)) for key, image in enumerate(images)], 1)
    points = kprpe.template(32)
    lines = [",".join([str(key), *(f"{v:.3f}" for v in (points + key / 10).flatten())])
             for key in range(1, 7)]
    (tmp_path / "points.csv").write_text("\n".join(lines))
    args = arguments("--data", "ms1m-small", "--model", "own", "--landmarks", str(tmp_path / "points.csv"),
                     root=tmp_path)
    images, data = kprpe.training_set(args)
    batch = data.__getitems__([(0, 4)])
    same(batch["points"][0], points + 0.5, 1e-3)  # as they are: records are aligned already
    assert np.array_equal(batch["image"][0].numpy(), images[4])
    assert kprpe.read_set(args, "test") is None


def test_digits_move_anew_in_each_epoch(tmp_path):
    args = arguments("--data", "affnist", "--size", "40", root=put_mnist(tmp_path))
    images, data = kprpe.training_set(args)
    first, again, later = (data.__getitems__([(epoch, i) for i in range(12)]) for epoch in (0, 0, 1))
    assert first["image"].shape == (12, 40, 40, 1) and images.labels.tolist() == [*range(10), 0, 1]
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], later["image"])
    image, points = kprpe.prepare(first, torch.device("cpu"))
    assert image.shape == (12, 1, 40, 40)
    for own, (left, top) in zip(image[:, 0], points[:, 0].round().int().tolist()):
        assert own[top, left] > 30 and own[:top].max() == 0 and own[:, :left].max() == 0
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 1]))
    with pytest.raises(ValueError, match=r"images \(12, 28, 28\) and labels \(2,\)"):
        kprpe.read_digits(args, "test")
    with pytest.raises(FileNotFoundError, match="train-images-idx3"):
        kprpe.read_digits(arguments("--data", "affnist", "--size", "40", root=tmp_path / "no"), "train")


def test_shares_cover_a_set_once_and_are_as_long_in_each_process():
    for count, world in ((10, 1), (10, 3), (2, 4), (9, 3)):
        parts = [[i for keys in kprpe.shares(count, 2, rank, world) for _, i in keys]
                 for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        merged = torch.tensor(parts).T.flatten()[:count]  # as `embed` puts them together
        assert merged.tolist() == list(range(count))


def test_subject_batches_repeat_people_and_are_the_same_for_all_ranks():
    labels = np.repeat(np.arange(5), 8)
    plain = kprpe.SubjectBatches(labels, 8, 0.0, 3, 0, 1)
    assert sorted(i for keys in plain for _, i in keys) == list(range(40))
    whole = [[i for _, i in keys] for keys in kprpe.SubjectBatches(labels, 8, 0.6, 3, 0, 1)]
    halves = [[[i for _, i in keys] for keys in kprpe.SubjectBatches(labels, 8, 0.6, 3, rank, 2)]
              for rank in range(2)]
    assert whole == [a + b for a, b in zip(*halves)] and len(set(sum(whole, []))) < 40


def test_noise_is_normal_and_the_same_each_time():
    points, index = torch.rand(300, 5, 2), torch.arange(300)
    noise = kprpe.disturb(points, index, 0.1) - points
    assert noise.std() == pytest.approx(0.1, rel=0.05) and noise.mean().abs() < 0.01
    # What the supplement reports for alpha = 0.1: an NME of 0.12, over the side of the box.
    assert noise.norm(dim=-1).mean() == pytest.approx(0.12, abs=0.01)
    some = kprpe.disturb(points[[7, 2]], index[[7, 2]], 0.1)
    same(some, (points + noise)[[7, 2]], 1e-6)
    assert kprpe.disturb(points, index, 0.0) is points


# ---- Evaluation and clipping ---------------------------------------------------------------------

class Corner(nn.Module):
    """An "embedding" that tells what it was given: the mean of the image's left half, and the keypoints."""

    def forward(self, image, points):
        return torch.cat([image[..., :image.shape[3] // 2].mean((1, 2, 3))[:, None], points.flatten(1)], 1)


def test_embeddings_are_sums_over_the_image_and_its_mirror():
    args = arguments()
    data = kprpe.make_dataset(args, kprpe.read_set(args, "test"), 0.0)
    keys = [[(0, 0), (0, 1)], [(0, 2)]]
    found = kprpe.embed(Corner(), kprpe.Arm(range(3), [data.__getitems__(k) for k in keys], []), args,
                        torch.device("cpu")).features
    image, points = kprpe.inputs(*kprpe.prepare(data.__getitems__(sum(keys, [])), torch.device("cpu")))
    same(found[:, 0], 2 * image.mean((1, 2, 3)), 1e-5)
    mirrored = points.clone()
    mirrored[..., 0] = 1 - mirrored[..., 0]
    same(found[:, 1:], (points + mirrored[:, [1, 0, 2, 4, 3]]).flatten(1), 1e-6)


def test_the_workers_of_an_evaluation_end_with_it():
    args = arguments("--workers", "1")
    arm = kprpe.test_arms(args, torch.device("cpu"))[0]
    found = kprpe.embed(Corner(), arm, args, torch.device("cpu"))
    assert len(found.features) == len(arm.data) and arm.loader.persistent_workers
    assert not torch.multiprocessing.active_children()


def test_arms_are_built_once_and_the_late_ones_are_not_kept():
    args = arguments("--align-steps", "3", "--keypoint-noise", "0.1", "--cache", "device")
    arms = kprpe.test_arms(args, torch.device("cpu"))
    late = {arm.suffix: arm.late for arm in arms}
    assert len(late) == len(arms) and late == {
        "": False, "@noise0.1": True, "@unaligned": False, "@step1": True, "@step2": True}
    kept = {arm.suffix: arm.data.regions.store is not None for arm in arms if not arm.noise}
    assert kept == {"": True, "@unaligned": True, "@step1": False, "@step2": False}
    args.unaligned = False
    assert [arm.late for arm in kprpe.test_arms(args, torch.device("cpu"))][2]  # @unaligned, for the curve


def test_templates_are_of_unit_features_times_faceness(monkeypatch):
    test = recognition.TemplateSet("IJB-B", range(3), np.zeros((3, 5, 2)), np.array([0.5, 1, 1], np.float32),
                                   np.arange(3), np.arange(3), np.array([[0, 1]]), np.array([True]),
                                   np.arange(3).astype(str))
    monkeypatch.setattr(kprpe, "embed", lambda *_: (torch.tensor([[3.0, 4], [0, 2], [5, 0]]), None,
                                                    None))
    monkeypatch.setattr(recognition, "score", lambda test, features: {"seen": features})
    found = kprpe.evaluate(Corner(), None, [kprpe.Arm(None, [], [test], "@IJB-B")], None, None)
    same(found["seen@IJB-B"], [[0.6, 0.8], [0, 1], [1, 0]], 1e-6)


def test_an_epoch_line_has_percent_and_the_rates_of_templates():
    row = {"epoch": 1, "loss": 2.5, "accuracy": 0.5, "accuracy/std": 0.1, "rank1@a/b.csv": 0.25,
           "rank1/30@x": 1.0, "tar/0.0001@IJB-C": 0.75, "accuracy@step1": 0.5}
    assert kprpe.summary(row) == ("epoch 1, loss 2.5, accuracy 50.00 %, rank1@a/b.csv 25.00 %, "
                                  "tar/0.0001@IJB-C 75.00 %")


def test_sets_that_need_landmarks_name_the_file(tmp_path, capsys):
    write_people(tmp_path / "test")
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("path,id,role\n" + "".join(
            f"test/person{p}/{i}.png,{p},{('gallery', 'probe')[i]}\n" for p in range(3) for i in range(2)))
    path = str(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="needs the keypoints of its images: no .*a.csv.land"):
        kprpe.test_arms(arguments("--test", path), torch.device("cpu"))
    capsys.readouterr()
    assert len(kprpe.test_arms(arguments("--rpe", "none", "--test", path), torch.device("cpu"))) == 3
    assert "a.csv.landmarks.csv; images are taken as they stand" in capsys.readouterr().out
    with pytest.raises(ValueError, match="evaluate them apart"):
        kprpe.test_arms(arguments("--rpe", "none", "--test", path, path), torch.device("cpu"))
    # The box of their landmarks, if --box says so
    five = kprpe.template(24) + 6
    (tmp_path / "a.csv.landmarks.csv").write_text("".join(
        f"test/person{p}/{i}.png," + ",".join(f"{v:.2f}" for v in five.flatten()) + "\n"
        for p in range(3) for i in range(2)))
    arms = kprpe.test_arms(arguments("--test", path), torch.device("cpu"))
    assert "unaligned is the box of 5 landmarks x 1.4" in capsys.readouterr().out
    side = 1.4 * np.ptp(five, axis=0).max()
    same(arms[-1].data.frames[0, 0, 0], 32 / side, 1e-2)
    root = write_people(tmp_path / "own" / "test", marked=False).parent
    kprpe.test_arms(arguments("--data", "folder", root=root), torch.device("cpu"))
    assert "no landmarks; test images are aligned as they stand" in capsys.readouterr().out


def test_the_gradients_are_scaled_together():
    net, fc = nn.Linear(4, 3), kprpe.PartialFC(3, 5, kprpe.CosFace())
    loss = fc(net(torch.randn(6, 4, generator=torch.Generator().manual_seed(0))), torch.arange(6) % 5)
    loss.backward()
    grads = [p.grad.clone() for p in (*net.parameters(), fc.weight)]
    norm = torch.cat([g.flatten() for g in grads]).norm().item()
    kprpe.clip_gradients(net, fc, norm / 4)
    for p, grad in zip((*net.parameters(), fc.weight), grads):
        same(p.grad, grad / 4, 1e-4)
    kprpe.clip_gradients(net, fc, norm)
    same(net.weight.grad, grads[0] / 4, 1e-4)  # a small one stays


def test_offsets_are_what_attention_adds():
    for rpe in ("euclidean", "cross", "kp-relative", "kp-multihead"):
        net = randomise(tiny(rpe)).eval()
        points = batch(2)[1]
        maps = kprpe.offsets(net, points)
        assert maps.shape == (2, 2, 15, 15)
        block, q = net.blocks[1], torch.zeros(2, 15, 16)
        seen = []
        original, F.scaled_dot_product_attention = F.scaled_dot_product_attention, \
            lambda q, k, v, bias: seen.append(bias) or q
        try:
            block.attn(q, net.pairs, list(net.parts(points))[1])
        finally:
            F.scaled_dot_product_attention = original
        same(maps[1], seen[0][:, 0].expand(2, -1, -1), 1e-6)


def test_a_curve_goes_from_unaligned_to_aligned():
    scores = {"accuracy": 0.9, "accuracy@unaligned": 0.6, "accuracy@step1": 0.7, "accuracy@step2": 0.8}
    assert kprpe.curve(scores, 3) == [(0, 0.6), (1 / 3, 0.7), (2 / 3, 0.8), (1, 0.9)]
    image = kprpe.draw_curves({"kp": kprpe.curve(scores, 3), "none": kprpe.curve(scores, 3)})
    assert image.shape == (600, 1200, 3) and count(image, 0) < count(image, 1)  # the second covers the first


def count(image, i):
    """Pixels of the colour of the i-th curve."""
    return (image == metrics.CURVE_COLOURS[i]).all(-1).sum()


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


def go(*flags, root="", **own):
    return kprpe.main(arguments(*flags, root=root, **own))


def call(*flags):
    """The command with just these flags."""
    return kprpe.main(kprpe.parse_args(["--device", "cpu", *map(str, flags)]))


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_should(tmp_path, capsys):
    scores = go("--output", str(tmp_path / "run"), "--also-rpe", "none", "--align-steps", "2",
                "--keypoint-noise", "0.05,0.1", "--repeat", "0.5", "--limit", "30")
    rows = logged(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [1, 2] and "accuracy" not in rows[0]
    for key in ("accuracy", "rank1", "accuracy@unaligned", "accuracy@step1", "accuracy@noise0.05",
                "accuracy@noise0.1"):
        assert 0 <= rows[1][key] <= 1 and scores[key] == rows[1][key]
        assert f"{key}@none" in scores
    printed = capsys.readouterr().out
    assert "kp-multihead: accuracy from unaligned to aligned" in printed
    assert "unaligned (%)" in printed and "kp-multihead" in printed and "accuracy@noise0.1" in printed
    for name in ("faces.png", "offsets.png", "alignment.png", "none/faces.png", "none/last.pt"):
        assert (tmp_path / "run" / name).exists()
    assert not (tmp_path / "run" / "none" / "offsets.png").exists()
    state = state_of(tmp_path / "run")
    assert state["head"]["weight"].shape == (3, 512) and state["script"] == "kprpe"
    assert state["head"]["optimizer"]["exp_avg"].shape == (3, 512)
    with pytest.raises(FileExistsError, match="holds a run"):
        go("--output", str(tmp_path / "run"))
    # A network without keypoints takes a box; landmarks beside an image are of a known scheme.
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), photo)
    predict = ["--weights", tmp_path / "run" / "none" / "last.pt", "--predict", tmp_path / "photo.png"]
    call(*predict, "--box", "4.5,3.5,36.5,35.5", "--margin", "1", "--output", tmp_path / "out")
    assert np.array_equal(cv2.imread(str(tmp_path / "out" / "photo.png")), photo[4:36, 5:37])
    (tmp_path / "photo.pts").write_text("version: 1\nn_points: 2\n{\n1 1\n9 9\n}\n")
    with pytest.raises(ValueError, match="photo.pts: 2 landmarks are no known scheme"):
        call(*predict, "--output", tmp_path / "no")


def test_each_further_encoding_is_trained_once_with_what_was_typed(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(kprpe, "train", lambda args: (seen.append(args), ({}, tmp_path))[1])
    call("--rpe", "product", "--also-rpe", "none,product,none,irpe", "--keypoint-noise", "0.1")
    assert [args.rpe for args in seen] == ["product", "none", "irpe"]
    assert seen[1].given == ["also_rpe", "keypoint_noise"] and not seen[1].also_rpe
    assert kprpe.parse_args(["--model", "iresnet50", "--rpe", "none"]).also_rpe == ""  # not the preset's


def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(tmp_path, monkeypatch):
    flags = ["--loss", "arcface", "--sample-rate", "0.5", "--augment", "plain", "--epochs", "3", "--limit",
             "24"]
    go(*flags, "--output", str(tmp_path / "whole"))
    original = kprpe.save

    def dies(path, **state):
        original(path, **state)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(kprpe, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        go(*flags, "--output", str(tmp_path / "cut"))
    monkeypatch.setattr(kprpe, "save", original)
    call("--resume", "--output", tmp_path / "cut")
    whole, cut = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    for key in ("model", "head", "optimizer", "epoch", "classes"):
        assert equal(whole[key], cut[key]), key
    drop = {"minutes", "images_per_second"}
    for a, b in zip(logged(tmp_path / "whole"), logged(tmp_path / "cut"), strict=True):
        assert {k: v for k, v in a.items() if k not in drop} == {k: v for k, v in b.items() if k not in drop}
    with pytest.raises(ValueError, match="--loss adaface: the checkpoint was made with arcface"):
        call("--resume", "--loss", "adaface", "--output", tmp_path / "cut")


def test_two_processes_train_and_one_goes_on(tmp_path, capsys):
    """The same classes on two processes as on one; evaluation cut into shares; the checkpoint is whole."""
    run = ["--output", str(tmp_path / "run"), "--gpus", "2", "--epochs", "1"]
    done = subprocess.run([sys.executable, str(ROOT / "kprpe.py"), *SMALL_RUN, *run], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    state, row = state_of(tmp_path / "run"), logged(tmp_path / "run")[-1]
    assert state["world"] == 2 and state["head"]["weight"].shape == (4, 512)
    scores = call("--eval", tmp_path / "run" / "last.pt", "--unaligned")
    for key in ("accuracy", "rank1", "accuracy@unaligned"):
        assert scores[key] == pytest.approx(row[key], abs=0.03)
    state["epoch"], state["args"]["epochs"] = 1, 2
    torch.save(state, tmp_path / "run" / "last.pt")
    capsys.readouterr()
    call("--resume", "--output", tmp_path / "run")
    assert "the run had 2 processes" in capsys.readouterr().out
    assert state_of(tmp_path / "run")["epoch"] == 2 and state_of(tmp_path / "run")["world"] == 1


def test_a_folder_is_trained_on_evaluated_on_other_sets_and_used(tmp_path, capsys):
    root = write_people(tmp_path / "train").parent
    write_people(tmp_path / "test")
    flags = ["--data", "folder", "--rpe", "kp-relative", "--num-keypoints", "3", "--output",
             str(tmp_path / "run"), "--epochs", "1", "--batch-size", "6"]
    scores = go(*flags, root=root)
    images = [cv2.imencode(".png", picture)[1].tobytes() for picture in
              np.random.default_rng(1).integers(0, 256, (20, 32, 32, 3), np.uint8)]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, [True, False] * 5)))
    (tmp_path / "ids.csv").write_text("path,id,role\n" + "".join(
        f"test/person{p}/{i}.png,{p},{('gallery', 'probe')[i]}\n" for p in range(3) for i in range(2)))
    (tmp_path / "ids.csv.landmarks.csv").write_text("".join(
        f"test/person{p}/{i}.png," + ",".join(f"{v:.2f}" for v in kprpe.template(48).flatten()) + "\n"
        for p in range(3) for i in range(2)))
    path = str(tmp_path / "run" / "last.pt")
    capsys.readouterr()
    again = call("--eval", path, "--unaligned", "--align-steps", "2", "--output", tmp_path / "eval", "--test",
                 tmp_path / "lfw.bin", tmp_path / "ids.csv")
    assert {key: again[key] for key in scores} == scores
    name = f"rank1@{tmp_path / 'ids.csv'}"
    assert {"accuracy@lfw", name, f"{name}@unaligned", f"{name}@step1", "accuracy@step1"} <= again.keys()
    assert "accuracy@lfw@unaligned" not in again and "accuracy@lfw" in capsys.readouterr().out
    assert (tmp_path / "eval" / "alignment.png").exists()
    face = tmp_path / "test" / "person0" / "1"
    predict = ["--device", "cpu", "--weights", path, "--predict"]
    call(*predict, str(face) + ".png", "--output", tmp_path / "out")
    crop = cv2.imread(str(tmp_path / "out" / "1.png"))[..., ::-1]
    feature = np.load(tmp_path / "out" / "1.npy")
    assert crop.shape == (32, 32, 3) and np.linalg.norm(feature) == pytest.approx(1, abs=1e-5)
    points = datasets.read_pts(str(face) + ".pts")
    np.testing.assert_allclose(datasets.read_pts(tmp_path / "out" / "1.pts"), points, atol=1e-3)
    # The same face as the evaluation sees it: aligned by its keypoints.
    args = arguments("--data", "folder", "--rpe", "kp-relative", "--num-keypoints", "3", root=root)
    split = kprpe.read_set(args, "test")
    assert np.array_equal(kprpe.make_dataset(args, split, 1.0).__getitems__([(0, 1)])["image"][0], crop)
    call(*predict, str(face) + ".png", "--no-align", "--output", tmp_path / "loose")
    assert not np.array_equal(cv2.imread(str(tmp_path / "loose" / "1.png")), crop[..., ::-1])
    with pytest.raises(FileExistsError, match="1.png exists"):
        call(*predict, str(face) + ".png", "--output", tmp_path / "out")
    cv2.imwrite(str(tmp_path / "alone.png"), crop)
    with pytest.raises(ValueError, match="alone.png: the network needs keypoints"):
        call(*predict, tmp_path / "alone.png", "--output", tmp_path / "no")


def test_detected_faces_are_predicted(tmp_path, monkeypatch):
    """YuNet's rows: box, five points from the person's right eye on, score."""
    checked = []
    monkeypatch.setattr(kprpe, "check_weights", lambda net, epoch: checked.append(type(net)))
    go("--output", str(tmp_path / "run"), "--epochs", "1", "--limit", "20")
    assert checked == [kprpe.ViT, kprpe.PartialFC]
    image = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), image)
    five = [kprpe.template(40) + [10 + 50 * i, 12] for i in range(2)]
    rows = np.stack([np.concatenate([[8 + 50 * i, 9, 40, 50], five[i].flatten(), [0.9]])
                     for i in range(2)]).astype(np.float32)

    class Detector:
        def setInputSize(self, size):
            assert size == (120, 100)

        def detect(self, bgr):
            assert np.array_equal(bgr, image)
            return 1, rows

    monkeypatch.setattr(kprpe, "open_detector", lambda path: Detector())
    (tmp_path / "yunet.onnx").write_bytes(b"")
    call("--weights", tmp_path / "run" / "last.pt", "--predict", tmp_path / "photo.png", "--detector",
         tmp_path / "yunet.onnx", "--output", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"photo{face}.{kind}" for face in ("", ".face2") for kind in ("png", "npy", "pts")}
    found = datasets.read_pts(tmp_path / "out" / "photo.face2.pts")
    np.testing.assert_allclose(found, five[1], atol=1e-3)


def test_digits_are_classified(tmp_path):
    root = put_mnist(tmp_path / "mnist", 40)
    flags = ["--data", "affnist", "--size", "40", "--patch", "8", "--epochs", "12", "--lr", "0.001", "--rpe",
             "kp-multihead", "--output", str(tmp_path / "run")]
    scores = go(*flags, root=root)
    rows = logged(tmp_path / "run")
    assert rows[-1]["loss"] < 0.85 * rows[0]["loss"]
    assert ["accuracy" in row for row in rows] == 6 * [False, True]
    assert (tmp_path / "run" / "offsets.png").exists() and (tmp_path / "run" / "faces.png").exists()
    again = call("--eval", tmp_path / "run" / "last.pt", "--keypoint-noise", "0.05")
    assert again["accuracy"] == scores["accuracy"] and "accuracy@affine@noise0.05" in again
    with pytest.raises(ValueError, match="--data faces: .* is of a run on affnist"):
        call("--weights", tmp_path / "run" / "last.pt", "--predict", tmp_path)
    with pytest.raises(ValueError, match="is of a run on affnist"):
        call("--data", "faces", "--eval", tmp_path / "run" / "last.pt")


def test_records_are_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    put_records(tmp_path, [payload([key % 2], encoded(rng.integers(0, 256, (16, 16, 3), np.uint8)))
                           for key in range(8)], 1)
    scores = go("--data", "ms1m-small", "--model", "own", "--size", "16", "--epochs", "1", "--batch-size",
                "4", "--output", str(tmp_path / "run"), root=tmp_path)
    assert scores == {} and state_of(tmp_path / "run")["head"]["weight"].shape == (2, 512)
    with pytest.raises(ValueError, match="has no test split"):
        call("--eval", tmp_path / "run" / "last.pt")


def test_checkpoints_that_do_not_fit(tmp_path):
    go("--output", str(tmp_path / "run"), "--epochs", "1", "--limit", "20")
    state = state_of(tmp_path / "run")
    state["model"]["pos_embed"] = torch.zeros(1, 4, 16)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="1 tensors do not fit .* pos_embed"):
        call("--eval", tmp_path / "bad.pt")
    state["args"]["epochs"] = 2
    state["classes"] = [9, 90]
    torch.save(state, tmp_path / "run" / "last.pt")
    with pytest.raises(ValueError, match="20 images of 2 identities, the run was started on 90 of 9"):
        call("--resume", "--output", tmp_path / "run")


@pytest.mark.parametrize("flags, message", [
    ("--size 60 --patch 8", "--size 60: expected a multiple of 8"),
    ("--dim 30 --heads 4", "--dim 30: expected a multiple of --heads 4"),
    ("--num-keypoints 6", "0 to 5"),
    ("--sample-rate 0", "--sample-rate 0.0: expected above 0"),
    ("--keypoint-noise 0.1,x", "--keypoint-noise 0.1,x: expected numbers"),
    ("--also-rpe none,big", "--also-rpe none,big: expected some of none"),
    ("--model iresnet50", "give --rpe none"),
    ("--model iresnet50 --rpe none --also-rpe= --size 40", "--size 40: expected a multiple of 16"),
    ("--batch-size 9 --gpus 2", "does not divide"),
    ("--box 1,2,3", "--box 1,2,3: expected image"),
    ("--data folder --box image --cache device", "--cache goes with"),
    ("--data affnist --margin 2", "--margin is for faces"),
    ("--data affnist --unaligned", "--unaligned is for faces"),
    ("--data affnist --points 5", "--points is for faces"),
    ("--data affnist --size 48", "expected --size 40 --augment none"),
    ("--data affnist --augment mirror", "expected --size 40 --augment none"),
    ("--data affnist", "--data affnist: give --data-root"),
    ("--data ms1m-small", "--data ms1m-small: give --data-root"),
    ("--heads 0", "--heads 0: expected at least 1"),
    ("--patch 0", "--patch 0: expected at least 1"),
    ("--keypoint-noise 0.1,0.4", "--keypoint-noise 0.1,0.4: expected numbers above 0, at most 0.3"),
    ("--landmarks a.csv", "--landmarks: the images of --data faces have their own"),
    ("--model small --depth 3", "--depth belongs to --model own, not small"),
    ("--eval a --also-rpe none", "--also-rpe belongs to training"),
    ("--rpe none --also-rpe irpe --num-keypoints 3", "--num-keypoints belongs to --rpe kp-absolute"),
    ("--detector none.onnx", "no file none.onnx"),
    ("--predict a.png", "belong together"),
    ("--eval a --resume", "--eval goes neither"),
    ("--lr nan", "--lr nan: expected more than 0"),
    ("--repeat 1", "--repeat 1.0: expected 0 to 1"),
    ("--points 7", "--points 7: expected one of"),
])
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
    args = kprpe.parse_args("--data ms1m-small --data-root x --model iresnet50 --rpe none".split())
    net = on_meta(lambda: kprpe.build(args, torch.device("meta")))
    assert sum(p.numel() for p in net.parameters()) == 43_585_600
