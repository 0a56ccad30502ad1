"""sdfl.py: equations against slow or closed forms, published sizes, the command line as a user meets it."""
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import sdfl
from common import UserError, datasets, run, synthetic


def landmarks(count=40, points=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = 60 * torch.randn(1, points, 2, generator=generator)
    return (128 + base * (1 + 0.2 * torch.randn(count, 1, 2, generator=generator))
            + 6 * torch.randn(count, points, 2, generator=generator))


def small_mask(points=12, k=3):
    return sdfl.neighbour_mask(landmarks(points=points), k)


# ---- Eq. (1), (2) --------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [0, 1, 3, 11])
def test_neighbour_mask_is_equations_1_and_2(k):
    points = landmarks()
    mask = sdfl.neighbour_mask(points, k)
    C = 0.5 * (np.abs(np.corrcoef(points[..., 0].numpy().T)) + np.abs(np.corrcoef(points[..., 1].numpy().T)))
    for i in range(12):
        best = sorted(range(12), key=lambda j: -C[i, j])[:k + 1]
        assert set(mask[i].nonzero()[:, 0].tolist()) == set(best)
    assert mask.dtype == torch.bool and mask.diagonal().all() and (mask.sum(1) == k + 1).all()


def test_neighbour_mask_follows_a_permutation_and_ignores_scale_and_sign():
    points, order = landmarks(), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    mask = sdfl.neighbour_mask(points, 3)
    assert torch.equal(sdfl.neighbour_mask(points[:, order], 3), mask[order][:, order])
    assert torch.equal(sdfl.neighbour_mask(points * torch.tensor([-3.0, 0.5]) + 7, 3), mask)


def test_neighbour_mask_keeps_the_diagonal_among_equal_points():
    points = landmarks()
    points[:, 5:9] = points[:, 4:5]  # five landmarks that always coincide
    mask = sdfl.neighbour_mask(points, 2)
    assert mask.diagonal().all() and (mask.sum(1) == 3).all()


def test_neighbour_mask_refuses_what_has_no_answer():
    points = landmarks()
    with pytest.raises(ValueError, match="--k 12: expected 0 to 11"):
        sdfl.neighbour_mask(points, 12)
    with pytest.raises(ValueError, match="at least 2 training images, found 1"):
        sdfl.neighbour_mask(points[:1], 3)
    still = points.clone()
    still[:, 7] = torch.tensor([3.0, 4.0])
    with pytest.raises(ValueError, match="landmark 7 has the same place in all 40"):
        sdfl.neighbour_mask(still, 3)
    with pytest.raises(ValueError, match="not finite"):
        sdfl.neighbour_mask(points * torch.nan, 3)


def test_a_coordinate_that_is_constant_counts_as_uncorrelated():
    points = landmarks()
    points[:, 7, 0] = 3.0
    with pytest.warns(UserWarning, match="landmark 7 is constant in one coordinate"):
        mask = sdfl.neighbour_mask(points, 3)
    C = np.abs(np.corrcoef(points[..., 1].numpy().T))[7]  # only y is left, for every candidate
    assert set(mask[7].nonzero()[:, 0].tolist()) == set(np.argsort(-C)[:4].tolist())


# ---- Eq. (3) to (5) ------------------------------------------------------------------------------

def test_map_to_node_gives_each_node_four_channels():
    torch.manual_seed(0)
    module = sdfl.MapToNode(16, 5).eval()
    maps = module(torch.randn(2, 16, 3, 4))
    assert maps.shape == (2, 20, 3, 4) and (maps >= 0).all()
    nodes = maps.view(2, 5, -1)
    for i in range(5):
        assert torch.equal(nodes[1, i], maps[1, 4 * i:4 * i + 4].reshape(-1))


def test_dynamic_adjacency_is_a_softmax_over_the_edges_alone():
    torch.manual_seed(0)
    mask = small_mask()
    module = sdfl.DynamicAdjacency(mask)
    maps = torch.randn(3, 48, 4, 4, requires_grad=True)
    A = module(maps)
    a = module.mlp(maps.mean((2, 3))).tolist()
    for b in range(3):
        edge = 0
        for i in range(12):
            columns = [j for j in range(12) if mask[i, j]]
            weights = torch.tensor([math.exp(a[b][edge + n]) for n in range(len(columns))])
            edge += len(columns)
            torch.testing.assert_close(A[b, i, columns], weights / weights.sum())
    assert (A[:, ~mask] == 0).all()
    torch.testing.assert_close(A.sum(2), torch.ones(3, 12))
    A[:, mask].square().sum().backward()
    assert maps.grad.isfinite().all() and all(p.grad.abs().sum() > 0 for p in module.parameters())


def test_edge_weights_stay_those_of_an_image_when_all_images_ask_for_one_change():
    """All pooled features are positive: without a batch norm a common gradient moves all hidden
    units together, most die, and every image gets the same weights."""
    torch.manual_seed(0)
    mask, maps = small_mask(), torch.randn(64, 48, 3, 3).relu()
    module = sdfl.DynamicAdjacency(mask)
    wanted = torch.rand(12, 12)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        (wanted * module(maps)).sum((1, 2)).mean().backward()
        optimizer.step()
    hidden = module.eval().mlp[:2](maps.mean((2, 3)))
    assert (hidden.amax(0) <= 0).float().mean() < 0.4


def test_edge_weights_are_trained_on_two_images_or_more():
    module, maps = sdfl.DynamicAdjacency(small_mask()), torch.randn(1, 48, 3, 3)
    with pytest.raises(UserError, match="batch norm needs two"):
        module(maps)
    assert module.eval()(maps).shape == (1, 12, 12)


def test_graph_convolution_is_equation_4():
    torch.manual_seed(0)
    conv, A, H = sdfl.GraphConv(5, 7, bias=True), torch.rand(2, 6, 6), torch.randn(2, 6, 5)
    with torch.no_grad():
        conv.bias.normal_()
    expected = torch.zeros(2, 6, 7)
    for b in range(2):
        for i in range(6):
            for j in range(6):
                expected[b, i] += A[b, i, j] * (H[b, j] @ conv.weight)
    torch.testing.assert_close(conv(H, A), expected + conv.bias)
    assert conv.weight.shape == (5, 7) and sdfl.GraphConv(5, 7, bias=False).bias is None


def test_graph_layer_normalises_features_over_images_and_nodes():
    torch.manual_seed(0)
    layer, A, H = sdfl.GraphLayer(5, 7), torch.rand(4, 6, 6).softmax(2), torch.randn(4, 6, 5)
    X = torch.einsum("bij,bjc,cd->bid", A, H, layer.conv.weight)
    mean, var = X.mean((0, 1)), X.var((0, 1), correction=0)
    torch.testing.assert_close(layer(H, A), ((X - mean) / (var + 1e-5).sqrt()).relu())


def test_graph_block_is_equation_5():
    torch.manual_seed(0)
    block, A, H = sdfl.GraphBlock(5).eval(), torch.rand(2, 6, 6), torch.randn(2, 6, 5)
    torch.testing.assert_close(block(H, A), block.second(block.first(H, A), A) + H)
    assert (block(H, A) < 0).any()  # no ReLU after the addition


def head_of(mask, dynamic=False):
    torch.manual_seed(0)
    head = sdfl.GraphHead(8, mask, cells=4, dynamic=dynamic).eval()
    for module in head.modules():  # batch norms that do something
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    return head


def graph_only(head, nodes):
    A = head.uniform.expand(len(nodes), -1, -1)
    nodes = head.first(nodes, A)
    for block in head.blocks:
        nodes = block(nodes, A)
    return head.last(nodes, A)


def test_a_node_reaches_only_what_ten_steps_along_the_edges_reach():
    ring = torch.zeros(40, 40, dtype=torch.bool)
    for i in range(40):
        ring[i, i] = ring[i, (i + 1) % 40] = True  # node i listens to i + 1
    head, nodes = head_of(ring), torch.randn(1, 40, 16)
    changed = nodes.clone()
    changed[0, 20] += 1
    moved = (graph_only(head, nodes) - graph_only(head, changed)).abs().sum((0, 2)) > 0
    assert set(moved.nonzero()[:, 0].tolist()) == set(range(10, 21))


def test_the_graph_follows_a_permutation_of_its_nodes():
    mask, order = small_mask(), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    nodes = torch.randn(2, 12, 16)
    plain = graph_only(head_of(mask), nodes)
    torch.testing.assert_close(graph_only(head_of(mask[order][:, order]), nodes[:, order]), plain[:, order])


def test_binary_adjacency_weighs_all_edges_alike():
    mask = small_mask()
    head = head_of(mask)
    assert head.adjacency is None and torch.equal(head.uniform, mask.float() / 4)


# ---- Eq. (6) to (11) -----------------------------------------------------------------------------

def test_laplacian_is_equations_6_to_8():
    mask, P = small_mask(), torch.randn(12, 2)
    L = sdfl.laplacian(mask)
    for i in range(12):
        others = [j for j in range(12) if mask[i, j] and j != i]
        assert len(others) == 3
        delta = sum((P[i] - P[j]) / len(others) for j in others)
        torch.testing.assert_close((L @ P)[i], delta)
    torch.testing.assert_close(L @ torch.ones(12, 2), torch.zeros(12, 2))
    assert torch.equal(sdfl.laplacian(torch.eye(4, dtype=torch.bool)), torch.eye(4))


def slope(function, x):
    x = torch.tensor(float(x), dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(function(x), x)[0].item()


def test_soft_wing_is_equation_9():
    x = torch.tensor([0.0, 1.0, -1.999, 2.0, 5.0, -128.0], dtype=torch.float64)
    B = 2 - 20 * math.log(1 + 2 / 0.5)
    expected = [0, 1, 1.999, 2, 20 * math.log(11) + B, 20 * math.log(257) + B]
    torch.testing.assert_close(sdfl.soft_wing(x), torch.tensor(expected, dtype=torch.float64))
    assert B == pytest.approx(-30.1888, abs=1e-4) and expected[-1] == pytest.approx(80.79, abs=5e-3)
    assert slope(sdfl.soft_wing, 1.5) == 1 and slope(sdfl.soft_wing, -1.5) == -1
    assert slope(sdfl.soft_wing, 2 + 1e-9) == pytest.approx(8, rel=1e-6)
    assert slope(sdfl.soft_wing, 19.5) == pytest.approx(1)
    assert sdfl.soft_wing(torch.tensor(3.0), omega1=1, omega2=5, eps=2).item() == \
        pytest.approx(5 * math.log(2.5) + 1 - 5 * math.log(1.5))


def test_wing_is_equation_11():
    x = torch.tensor([0.0, 3.0, -19.999999, 20.0, 50.0], dtype=torch.float64)
    C = 20 - 20 * math.log(41)
    expected = [0, 20 * math.log(7), 20 * math.log(1 + 19.999999 / 0.5), 20 - C, 50 - C]
    torch.testing.assert_close(sdfl.wing(x), torch.tensor(expected, dtype=torch.float64))
    assert slope(sdfl.wing, 30) == 1 and slope(sdfl.wing, 1e-9) == pytest.approx(40, rel=1e-6)
    assert sdfl.LOSSES["l1"](torch.tensor([-2.5]), eps=3).item() == 2.5


@pytest.mark.parametrize("name", sdfl.LOSSES)
def test_loss_is_equation_10(name):
    torch.manual_seed(0)
    mask, loss = small_mask(), sdfl.LOSSES[name]
    pred, target = 128 + 20 * torch.randn(3, 12, 2), 128 + 20 * torch.randn(3, 12, 2)
    L = sdfl.laplacian(mask)
    total = 0.0
    for b in range(3):
        for i in range(12):
            delta = [sum(p[b, i] - p[b, j] for j in range(12) if mask[i, j] and j != i) / 3
                     for p in (pred, target)]
            total += float(loss(pred[b, i] - target[b, i]).sum() + 0.7 * loss(delta[0] - delta[1]).sum())
    assert sdfl.sdfl_loss(pred, target, L, 0.7, loss).item() == pytest.approx(total / (3 * 12 * 2), rel=1e-5)
    moved = sdfl.sdfl_loss(target + 3, target, L, 100.0, loss)  # the relative term does not see a translation
    assert moved.item() == pytest.approx(float(loss(torch.tensor(3.0))), rel=1e-3)


# ---- Sizes ---------------------------------------------------------------------------------------

def count(module):
    return sum(p.numel() for p in module.parameters())


def conv_macs(build, *inputs):
    """Multiply-adds of convolutions and linear layers, counted where nothing is computed."""
    total = []
    with torch.device("meta"):
        module = build().eval()
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(lambda m, i, o: total.append(o[0].numel() * m.weight[0].numel()))
        module(*(torch.empty(shape) for shape in inputs))
    return sum(total)


BACKBONES = [  # parameters, multiply-adds of the convolutions at 256 px, channels
    ("mobilenetv2", 1_811_712, 364_961_792, 320), ("efficientnet_b0", 4_007_548, 502_057_472, 1280),
    ("efficientnet_b1", 6_513_184, 742_023_680, 1280), ("vgg16", 14_723_136, 20_044_578_816, 512),
    ("resnet18", 11_176_512, 2_368_733_184, 512), ("resnet34", 21_284_672, 4_784_652_288, 512),
    ("res2net50", 23_650_120, 5_555_093_504, 2048), ("hrnet_w18", 9_562_260, 4_286_671_872, 270)]


@pytest.mark.parametrize("name, parameters, macs, channels", BACKBONES)
def test_backbone_sizes(name, parameters, macs, channels):
    with torch.device("meta"):
        backbone = sdfl.BACKBONES[name]().eval()
        assert backbone(torch.empty(2, 3, 256, 256)).shape == (2, channels, 8, 8)
        assert backbone(torch.empty(1, 3, 128, 128)).shape == (1, channels, 4, 4)
    assert (count(backbone), backbone.channels) == (parameters, channels)
    assert conv_macs(sdfl.BACKBONES[name], (1, 3, 256, 256)) == macs


def wflw_sized_mask(k=3):
    return torch.eye(98, dtype=torch.bool) | sum(torch.eye(98).roll(n, 1) for n in range(1, k + 1)).bool()


def test_head_sizes_for_98_landmarks():
    mask = wflw_sized_mask()
    head = sdfl.GraphHead(512, mask, cells=64)
    assert count(head) == 2_405_158
    assert count(head.map_to_node) == 1_180_160 + 903_952 and count(head.adjacency) == 154_252 + 392
    assert conv_macs(lambda: sdfl.MapToNode(512, 98), (1, 512, 8, 8)) == 133_300_224
    assert count(sdfl.FCHead(512, 98, cells=64)) == 8_439_236
    assert count(head) + 21_284_672 == 23_689_830


def test_the_papers_flops_by_its_own_formula():
    N, I, F, O, k = 98, 256, 128, 2, 3
    paper = 2 * N * (k + 1 + F) * I + 14 * N * (k + 1 + F) * F + 2 * N * (k + 1 + O) * F
    assert paper == 29_955_072  # 29.95 M; 14 = 2 x 7 hidden convolutions
    layers = [m for m in sdfl.GraphHead(512, wflw_sized_mask(), cells=64).modules()
              if isinstance(m, sdfl.GraphConv)]
    ours = sum(2 * N * (k + 1 + m.weight.shape[1]) * m.weight.shape[0] for m in layers)
    assert len(layers) == 10 and ours == paper + 2 * N * (k + 1 + F) * F == 33_266_688  # 4 blocks of 2 are 8


# ---- The network ---------------------------------------------------------------------------------

@pytest.mark.parametrize("head", ["graph", "fc"])
def test_forward_and_gradients(head):
    torch.manual_seed(0)
    net = sdfl.SDFL("mobilenetv2", small_mask(), size=64, head=head)
    pred = net(torch.randn(4, 3, 64, 64))
    assert pred.shape == (4, 12, 2) and (pred - 32).abs().max() < 16  # starts about the middle of the crop
    sdfl.sdfl_loss(4 * pred, torch.full_like(pred, 80), sdfl.laplacian(net.mask), 1.0,
                   sdfl.soft_wing).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert net.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 12, 2)
    assert torch.equal(net.state_dict()["mask"], small_mask())


def test_the_loss_and_the_optimiser_fit_eight_faces_to_two_pixels():
    args = sdfl.parse_args(["--size", "64", "--limit", "8"])
    data = sdfl.make_dataset(args, "test")  # eight faces, without augmentation
    batch = data.__getitems__([(0, i) for i in range(8)])
    image, target = sdfl.prepare(batch, torch.device("cpu")), 4 * batch["points"]  # px of a 256 px crop
    torch.manual_seed(0)
    net = sdfl.SDFL("mobilenetv2", sdfl.neighbour_mask(data.crop_points(), 3), size=64)
    net.mean_face.copy_(target.mean(0))
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    L = sdfl.laplacian(net.mask)
    for step in range(110):
        optimizer.param_groups[0]["lr"] = 0.01 if step < 80 else 0.002
        error = 4 * net(image) - target
        optimizer.zero_grad()
        sdfl.sdfl_loss(error, 0 * error, L, 1.0, sdfl.soft_wing).backward()
        optimizer.step()
    assert error.norm(dim=2).mean() < 2  # from 23


def test_coordinates_stay_float32_under_autocast():
    net = sdfl.SDFL("mobilenetv2", small_mask(), size=64).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 3, 64, 64)).dtype == torch.float32


def test_unknown_names():
    with pytest.raises(ValueError, match="backbone 'alexnet': expected one of mobilenetv2"):
        sdfl.SDFL("alexnet", small_mask())
    with pytest.raises(ValueError, match="head 'mlp'"):
        sdfl.SDFL("resnet18", small_mask(), head="mlp")


# ---- Data ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("rotate, furthest", [(40, 30), (20, 8)])
def test_augmentation_stays_within_what_it_says(rotate, furthest):
    mirrors, hidden = 0, 0
    for seed in range(400):
        matrix, mirror, extras = sdfl.augment(np.random.default_rng(seed), 200, rotate, furthest)
        mirrors, hidden = mirrors + mirror, hidden + (extras["occluder"][0] != -1)
        zoom = math.sqrt(np.linalg.det(matrix[:, :2]))
        angle = math.degrees(math.atan2(matrix[0, 1], matrix[0, 0]))
        shift = matrix @ [99.5, 99.5, 1] - 99.5
        assert 0.9 <= zoom <= 1.1 and abs(angle) <= rotate
        assert np.abs(shift).max() <= 200 * furthest / 256
        corners = np.array([[-0.5, -0.5], [199.5, -0.5], [-0.5, 199.5], [199.5, 199.5]])
        source = (corners - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T  # what the crop looks at
        assert np.abs(source - 99.5).max() <= sdfl.reach(rotate, furthest) * 100
        if extras["occluder"][0] != -1:
            x0, y0, x1, y1 = extras["occluder"][:4]
            assert (x1 - x0) * (y1 - y0) == pytest.approx(0.2 * 200 * 200)
            assert 0.4 <= (x1 - x0) / (y1 - y0) <= 2.5
    assert 160 < mirrors < 240 and 160 < hidden < 240


def test_prepare_occludes_and_z_scores():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (2, 10, 12, 3), dtype=torch.uint8)
    occluder = torch.tensor([[2.5, 3, 6, 7.5, 10, 20, 30], [-1] * 7]).float()
    out = sdfl.prepare({"image": image, "occluder": occluder}, torch.device("cpu"))
    for b in range(2):
        pixels = image[b].double().numpy().copy()
        for y in range(10):
            for x in range(12):
                if occluder[b, 0] <= x < occluder[b, 2] and occluder[b, 1] <= y < occluder[b, 3]:
                    pixels[y, x] = occluder[b, 4:].numpy()
        z = (pixels - pixels.mean((0, 1))) / pixels.std((0, 1))
        np.testing.assert_allclose(out[b].permute(1, 2, 0), z, atol=1e-5)
    flat = sdfl.prepare({"image": torch.full((1, 4, 4, 3), 7, dtype=torch.uint8)}, torch.device("cpu"))
    assert (flat == 0).all()


def turned_heads(yaw):
    """Orthographic views of fixed 3-D points, symmetric in x, turned by yaw, at random places and sizes."""
    generator = torch.Generator().manual_seed(0)
    half = torch.rand(8, 3, generator=generator, dtype=torch.float64)
    shape = torch.cat([half * torch.tensor([-1.0, 1, 1]), half])
    x = shape[:, 0] * yaw.cos()[:, None] + shape[:, 2] * yaw.sin()[:, None]
    views = torch.stack([x, shape[:, 1].expand_as(x)], -1)
    size = 50 + 100 * torch.rand(len(yaw), 1, 1, generator=generator, dtype=torch.float64)
    return views * size + 30 * torch.rand(len(yaw), 1, 2, generator=generator, dtype=torch.float64)


def test_pose_bins_follow_the_yaw_and_not_its_sign():
    yaw = torch.linspace(-0.9, 0.9, 181, dtype=torch.float64)
    bins = sdfl.pose_bins(turned_heads(yaw), 9)
    assert bins.dtype == torch.long and bins.min() == 0 and bins.max() == 8
    assert (bins - bins.flip(0)).abs().max() <= 1  # left and right alike
    right = bins[90:]
    assert (right.diff() >= 0).all() and len(right.unique()) == 9


def test_balancing_repeats_rare_poses():
    torch.manual_seed(0)
    faces = turned_heads(0.25 * torch.randn(300, dtype=torch.float64).clamp(-3, 3))
    index, bins = sdfl.balanced(faces, 9), sdfl.pose_bins(faces, 9)
    before, after = np.bincount(bins, minlength=9), np.bincount(bins[index], minlength=9)
    assert set(index) == set(range(300))
    for b in range(9):
        assert after[b] == before[b] * round(before.max() / max(before[b], 1))


# ---- Evaluation ----------------------------------------------------------------------------------

class Oracle(nn.Module):
    """Answers with the truth, moved by `shift` px of the crop."""

    def __init__(self, data, shift=0.0):
        super().__init__()
        self.points, self.shift, self.size, self.calls = data.crop_points(), shift, data.size, 0
        self.register_buffer("mask", torch.eye(data.points.shape[1], dtype=torch.bool))
        self.register_buffer("mean_face", data.crop_points().mean(0) * (256 / data.size))

    def forward(self, image):
        out = self.points[self.calls:self.calls + len(image)] + torch.tensor([self.shift, 0.0])
        self.calls += len(image)
        return out


def test_evaluate_measures_in_image_pixels_and_by_subset():
    args = sdfl.parse_args(["--size", "64", "--limit", "24"])
    data = sdfl.make_dataset(args, "test")
    loader = datasets.make_loader(data, datasets.in_order(24, 7), 0, torch.device("cpu"))
    perfect, _, points = sdfl.evaluate(Oracle(data), loader, args)
    torch.testing.assert_close(points, data.points, atol=1e-4, rtol=0)
    assert perfect["nme"] < 1e-6 and perfect["fr"] == 0 and perfect["auc"] == pytest.approx(1, abs=1e-5)
    assert perfect["nme/mean face"] > 0.05
    moved, errors, _ = sdfl.evaluate(Oracle(data, 1.0), loader, args)
    eyes = torch.from_numpy(np.stack([f.points[[36, 45]] for f in data.faces])).double()
    px = 1 / data.crop_matrices[:, 0, 0]  # one crop px in image px
    expected = px / (eyes[:, 0] - eyes[:, 1]).norm(dim=1)
    torch.testing.assert_close(errors, expected, atol=1e-5, rtol=1e-4)
    for tag in {tag for face in data.faces for tag in face.tags}:
        chosen = expected[[tag in face.tags for face in data.faces]]
        assert moved[f"nme/{tag}"] == pytest.approx(float(chosen.mean()), rel=1e-3)


def test_flip_test_maps_the_mirrored_answer_back():
    class Still(nn.Module):  # answers with fixed points: an average with its own mirror image must come out
        size = 64

        def forward(self, image):
            return torch.tensor([[[10.0, 5.0], [40.0, 6.0], [20.0, 30.0]]])

    pred = sdfl.predict_points(Still(), torch.zeros(1, 3, 64, 64), flip=(1, 0, 2))
    torch.testing.assert_close(
        pred[0], torch.tensor([[(10 + 63 - 40) / 2, 5.5], [(40 + 63 - 10) / 2, 5.5], [(20 + 43) / 2, 30]]))


# ---- The command line ----------------------------------------------------------------------------

TINY = ["--size", "64", "--limit", "32", "--batch-size", "8", "--epochs", "3", "--device", "cpu",
        "--points", "29"]


def test_learning_rate_falls_by_five_after_each_fifth():
    rates = [sdfl.learning_rate(step, 500, 0.01) for step in (0, 99, 100, 250, 499)]
    assert rates == pytest.approx([0.01, 0.01, 0.002, 0.0004, 0.000016])


def test_learning_rate_rises_and_falls_as_a_cosine():
    rates = [sdfl.learning_rate(step, 500, 0.01, schedule="cosine") for step in range(501)]
    assert rates[0] == pytest.approx(0.01 / 40) and rates[19] == pytest.approx(0.005, rel=0.01)
    assert 39 <= rates.index(max(rates)) <= 40 and max(rates) > 0.0098
    assert rates[250] == pytest.approx(0.005) and rates[500] == pytest.approx(0, abs=1e-12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, in process: its folder and numbers."""
    folder = tmp_path_factory.mktemp("run") / "a"
    return folder, sdfl.train(sdfl.parse_args([*TINY, "--output", str(folder)]))


def test_a_run_leaves_its_log_checkpoint_and_pictures(finished):
    folder, scores = finished
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    last = sdfl.learning_rate(11, 12, sdfl.parse_args(TINY).lr, schedule="cosine")
    assert rows[-1]["lr"] == pytest.approx(last)
    assert rows[-1]["nme"] == scores["nme"] and "nme/mean face" in rows[-1]
    assert {path.name for path in folder.iterdir()} == {
        "log.jsonl", "last.pt", "lock", "graph.png", "predictions.png", "ced.png"}
    state = run.load(folder / "last.pt", "sdfl")
    assert state["epoch"] == 3 and state["model"]["mask"].sum() == 29 * 4


def test_eval_repeats_the_numbers_and_keeps_the_crop(finished, tmp_path, capsys):
    checkpoint = ["--eval", str(finished[0] / "last.pt"), "--device", "cpu"]
    again = sdfl.train(sdfl.parse_args(checkpoint))
    assert again["nme"] == pytest.approx(finished[1]["nme"], rel=1e-6)
    assert "NME by io" in capsys.readouterr().out
    sdfl.train(sdfl.parse_args([*checkpoint, "--margin", "1.3", "--box", "face", "--limit", "8",
                                f"--output={tmp_path}/new", "--flip-test"]))
    assert "crop face x 1.3, flip test" in capsys.readouterr().out
    assert (tmp_path / "new/predictions.png").exists()
    with pytest.raises(UserError, match="the model has 29 landmarks, the faces of .* have 98"):
        sdfl.train(sdfl.parse_args([*checkpoint, "--points", "98"]))


def test_predict_writes_points_and_pictures(finished, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    face = synthetic.read_faces("test", 1, size=128, points=29)[0]
    for name in ("one two.png", "sub/b.jpg"):
        datasets.write_image(tmp_path / "in" / name, datasets.load_image(face.image))
    sdfl.train(sdfl.parse_args(["--predict", str(tmp_path / "in"), "--device", "cpu", "--output",
                                str(tmp_path / "out"), "--weights", str(finished[0] / "last.pt")]))
    for name in ("one two", "sub/b"):
        assert datasets.read_pts(tmp_path / "out" / f"{name}.pts").shape == (29, 2)
        assert datasets.load_image(tmp_path / "out" / f"{name}.png").shape == (128, 128, 3)


def test_the_checkpoint_brings_its_graph():
    def net(step):
        ring = torch.eye(12).bool() | torch.eye(12).roll(step, 1).bool()
        return sdfl.SDFL("mobilenetv2", ring, 64).eval()

    one = net(1)
    other = net(5)
    other.load_state_dict(one.state_dict())
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(one(image), other(image))


def test_what_cannot_be_trained_on_is_said_before_the_run_begins(tmp_path):
    for flags, message in [
            (["--data", "wflw", "--data-root", str(tmp_path / "nowhere")], "--data-root"),
            (["--k", "29"], "--k 29: expected 0 to 28"),
            (["--limit", "1"], "at least 2 training images, found 1"),
            (["--points", "5", "--norm", "io"], "no normaliser 'io' for 5 points")]:
        with pytest.raises((UserError, FileNotFoundError), match=message):
            sdfl.train(sdfl.parse_args([*TINY, "--output", str(tmp_path / "x"), *flags]))
    assert not (tmp_path / "x").exists()


def test_a_short_run_is_told_that_its_drops_are_many(tmp_path, capsys):
    sdfl.train(sdfl.parse_args([*TINY, "--epochs", "1", "--schedule", "steps",
                                "--output", str(tmp_path / "x")]))
    assert "note: --drops 4 leaves 0.2 of 1 epochs at the full rate" in capsys.readouterr().out
