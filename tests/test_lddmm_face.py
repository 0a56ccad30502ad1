"""lddmm_face.py: equations against slow loops, an ODE and autograd, published sizes, whole runs."""
import functools
import itertools
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lddmm_face as lf
import sdfl
from common import UserError, datasets, metrics, run, synthetic, warp

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SIGMA = 30.0


def curve(n=7, lead=(), seed=0, size=100.0, dtype=torch.float64):
    """Points (*lead, n, 2) of an open curve of about `size` px, and momenta that move them some
    px."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, size, n, dtype=dtype)
    points = torch.stack([x, 0.4 * size * (x / size * 4).sin()], -1).expand(*lead, n, 2)
    noise = torch.randn(2, *lead, n, 2, generator=generator, dtype=torch.float64).to(dtype)
    return points + 3 * noise[0], 5 * noise[1]


def face(scheme=68, points=100, count=3, dtype=torch.float64):
    """Mean face (N, 2) px of curves drawn at random, momenta (count, N, 2), table of the curves."""
    table = list(lf.positions_by_curve(lf.training_landmarks(scheme, points)).values())
    parts = []
    for i, line in enumerate(table):
        parts.append(curve(len(line), seed=i, size=60, dtype=dtype)[0] + 20 * i)
    mean = torch.cat(parts)
    return mean, curve(len(mean), (count,), dtype=dtype)[1], table


def slow_kernel(a, b, sigma):
    return math.exp(-((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / sigma ** 2)


def slow_flow(points, momenta, sigma, steps, extra=()):
    """Eq. (7) as it reads, with Euler steps: the path of the points, and behind them the extras."""
    x = [list(map(float, p)) for p in [*points, *extra]]
    path = [np.array(x)]
    for _ in range(steps):
        moved = []
        for p in x:
            v = [0.0, 0.0]
            for j, alpha in enumerate(momenta):
                k = slow_kernel(x[j], p, sigma)
                v = [v[0] + k * float(alpha[0]), v[1] + k * float(alpha[1])]
            moved.append([p[0] + v[0] / steps, p[1] + v[1] / steps])
        x = moved
        path.append(np.array(x))
    return np.stack(path)


def ode(points, momenta, sigma, steps=64):
    """The flow's end by the classical Runge-Kutta method: an error of 1e-10 px at 64 steps."""
    x = points.numpy()
    h = 1 / steps

    def v(x):
        return np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / sigma ** 2) @ momenta.numpy()

    for _ in range(steps):
        k1 = v(x)
        k2 = v(x + h / 2 * k1)
        k3 = v(x + h / 2 * k2)
        k4 = v(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return torch.from_numpy(x)


def same(a, b, tolerance=1e-9):
    a = torch.as_tensor(a)
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=tolerance)


# ---- Curves and training landmarks ---------------------------------------------------------------

SPARSE_29 = [27, 0, 4, 1, 8, 9, 16, 17, 18, 20, 22, 25, 26, 28]
SUBSETS = [
    (68, 50, [5, 4, 3, 3, 4, 3, 6, 6, 5, 5, 3, 3], 46),
    (98, 50, [9, 8, 5, 5, 4, 3, 4, 4, 4, 3, 3, 2], 54),
    (194, 50, [11, 10, 9, 7, 7, 7, 7, 10, 10, 10, 10], 98),
    (194, 33, [8, 7, 7, 6, 6, 6, 6, 8, 8, 8, 8], 78)]


@pytest.mark.parametrize("scheme, percent, sizes, unique", SUBSETS)
def test_published_subsets(scheme, percent, sizes, unique):
    chosen = lf.training_landmarks(scheme, percent)
    table = datasets.SCHEMES[scheme].curves
    assert list(chosen) == list(table) and [len(line) for line in chosen.values()] == sizes
    assert len(set(sum(chosen.values(), []))) == unique
    corners = {48, 54, 60, 64} if scheme == 68 else set()
    for name, line in table.items():
        assert set(chosen[name]) - set(line) <= corners


@pytest.mark.parametrize("scheme", lf.ANNOTATIONS)
def test_all_landmarks_on_curves_are_trained_on_by_default(scheme):
    chosen = sum(lf.training_landmarks(scheme).values(), [])
    pupils = {96, 97} if scheme == 98 else set()
    assert sorted(chosen) == [i for i in range(scheme) if i not in pupils]
    with_pupils = lf.curves_and_pupils(scheme)
    assert sorted(sum(with_pupils.values(), [])) == list(range(scheme))
    if scheme == 98:
        assert with_pupils["eye_left"][-1] == 96 and with_pupils["eye_right"][-1] == 97


@pytest.mark.parametrize("scheme, points, message", [
    (68, 33, "33 % of 68 landmarks; expected 100, 50"), (68, [0, 68], "landmark 68 lies on no"),
    (68, [0, 3, 0], "landmark 0 is given more than once"), (98, [0, 96], "landmark 96 lies on no"),
    (68, [0, 9], "none lies on brow_left")])
def test_training_landmarks_that_cannot_be(scheme, points, message):
    with pytest.raises(UserError, match=message):
        lf.training_landmarks(scheme, points)


def test_a_users_landmarks_go_along_the_curve():
    chosen = lf.training_landmarks(29, SPARSE_29 + [2, 5])
    assert chosen["brow_left"] == [0, 4, 2, 5] and chosen["lip_outer"] == [22, 27]


@pytest.mark.parametrize("scheme", lf.ANNOTATIONS)
def test_curves_split_and_join(scheme):
    mean, momenta, table = face(scheme)
    order = torch.randperm(len(mean), generator=torch.Generator().manual_seed(0)).tolist()
    table = [[order[i] for i in line] for line in table]  # any numbering of the points
    curves = lf.Curves(table)
    split = curves.split(momenta)
    assert torch.equal(curves.join(split), momenta) and not list(curves.state_dict())
    scale = lf.curve_scale(mean, curves)
    boxes = torch.stack([(mean[line].amax(0) - mean[line].amin(0)).mean() for line in table])
    alone = torch.tensor([len(line) == 1 for line in table])
    same(scale, torch.where(alone, boxes[~alone].mean(), boxes))
    for number, line in enumerate(table):
        assert torch.equal(split[:, number, :len(line)], momenta[:, line])
        assert (split[:, number, len(line):] == momenta[:, line[-1:]]).all()
        assert curves.real[number].sum() == len(line)
    assert lf.curve_scale(mean[:1], lf.Curves([[0]])).tolist() == [1]


# ---- Eq. (6), (7) --------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 2, 5])
def test_flow_is_equation_7(steps):
    points, momenta = curve(5, (2, 3))
    extra = curve(4, (2, 3), seed=1)[0]
    sigma = torch.tensor([20.0, 30.0, 40.0], dtype=torch.float64)
    paths, carried = lf.flow(points, momenta, sigma, steps, extra)
    assert paths.shape == (2, 3, steps + 1, 5, 2) and carried.shape == (2, 3, steps + 1, 4, 2)
    for b, c in itertools.product(range(2), range(3)):
        slow = slow_flow(points[b, c], momenta[b, c], sigma[c].item(), steps, extra[b, c])
        same(paths[b, c], slow[:, :5])
        same(carried[b, c], slow[:, 5:])
    same(lf.flow(points, momenta, sigma, steps), paths)  # the extras move no other


def test_one_point_moves_by_its_momentum_and_a_wide_kernel_adds_all():
    points, momenta = curve(1, (6,))
    for steps, sigma in itertools.product((1, 2, 7), (0.1, 1e3)):
        same(lf.flow(points, momenta, sigma, steps)[:, -1], points + momenta, 1e-12)
    points, momenta = curve()
    total = points + momenta.sum(0)
    off = [(lf.flow(points, momenta, sigma)[-1] - total).abs().max() for sigma in (1e4, 1e5)]
    assert off[0] < 1 and abs(off[0] / off[1] - 100) < 1  # as sigma^-2


def test_euler_converges_with_first_order_to_the_ode_and_back():
    points, momenta = curve(12)
    exact = ode(points, momenta, SIGMA)
    same(exact, ode(points, momenta, SIGMA, 128), 1e-9)
    same(ode(exact, -momenta, SIGMA), points, 1e-9)
    error = []
    back = []
    for steps in (8, 64, 512):
        end = lf.flow(points, momenta, SIGMA, steps)[-1]
        error.append((end - exact).norm().item())
        back.append((lf.flow(end, -momenta, SIGMA, steps)[-1] - points).norm().item())
    assert abs(error[1] / error[2] - 8) < 0.5 and error[2] < 0.1
    assert abs(back[1] / back[2] - 8) < 0.8 and back[2] < 0.05 * (exact - points).norm()


def test_flow_is_equivariant():
    points, momenta = curve(8)
    end = lf.flow(points, momenta, SIGMA, 3)[-1]
    c, s = 1.7 * math.cos(0.6), 1.7 * math.sin(0.6)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    moved = lf.flow(points @ turn.T + 40, momenta @ turn.T, 1.7 * SIGMA, 3)[-1]
    same(moved, end @ turn.T + 40)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    same(lf.flow(points[order], momenta[order], SIGMA, 3)[-1], end[order])
    path, carried = lf.flow(points, momenta, SIGMA, 6, points[[3, 0, 3]])
    same(carried, path[:, [3, 0, 3]], 1e-12)  # an extra point on another follows it


def test_gradients():
    points, momenta = curve(4, (2,))
    extra = curve(3, (2,), 1)[0]
    sigma = torch.tensor([20.0, 30.0], dtype=torch.float64)
    inputs = [value.requires_grad_() for value in (points, momenta, sigma, extra)]
    assert torch.autograd.gradcheck(lambda x, a, s, e: lf.flow(x, a, s, 2, e), inputs)
    assert torch.autograd.gradcheck(lambda x, a, s, e: lf.jacobian(x, a, s, 2, e), inputs)
    start = points.detach().clone()
    for squared in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, a, s: lf.curve_discrepancy(x, start + a, s, squared), inputs[:3])


@pytest.mark.parametrize("scheme, points", [(29, 100), (68, 50), (98, 100), (194, 33)])
def test_deform_flows_each_curve_by_itself(scheme, points):
    mean, momenta, table = face(scheme, points)
    curves = lf.Curves(table)
    sigma = lf.curve_scale(mean, curves)
    path = lf.deform(mean[None], momenta, curves, sigma, 3)
    assert path.shape == (3, 4, len(mean), 2)
    for number, line in enumerate(table):
        alone = lf.flow(mean[None, line], momenta[:, line], sigma[number].item(), 3)
        same(path[..., line, :], alone)
    changed = momenta.clone()
    changed[1, table[2]] += 3
    moved = (lf.deform(mean[None], changed, curves, sigma, 3) != path).any(-1).any(1)  # (3, N)
    assert moved[1].nonzero()[:, 0].tolist() == table[2] and not moved[[0, 2]].any()


def test_jacobian_is_the_derivative_of_the_flow():
    points, momenta = curve(6, (2,))
    at = curve(5, (2,), 1)[0]
    sigma = torch.tensor([25.0, 40.0], dtype=torch.float64)
    D = lf.jacobian(points, momenta, sigma, 3, at)
    full = torch.autograd.functional.jacobian(
        lambda at: lf.flow(points, momenta, sigma, 3, at)[1][:, -1], at)  # (2, 5, 2, 2, 5, 2)
    for b, m in itertools.product(range(2), range(5)):
        same(D[b, m], full[b, m, :, b, m], 1e-12)


def test_two_steps_can_fold_where_the_flow_cannot():
    points = torch.tensor([[0.0, 0.0], [20.0, 0.0], [40.0, 0.0]], dtype=torch.float64)
    momenta = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 1.0]], dtype=torch.float64)
    grid = torch.cartesian_prod(*[torch.linspace(-30, 70, 41, dtype=torch.float64)] * 2)

    def lowest(scale, steps):
        return torch.linalg.det(lf.jacobian(points, scale * momenta, 20.0, steps, grid)).min()

    assert lowest(60, 2) < 0 < lowest(60, 256)
    assert lowest(1.1658 * 2 * 20 / 3, 2) > 0  # the bound that `flow` names


# ---- Eq. (1) to (5), (8) -------------------------------------------------------------------------

def slow_inner(a, b, sigma):
    """Eq. (1) for two curves of (x, y)."""
    total = 0
    for i, j in itertools.product(range(len(a) - 1), range(len(b) - 1)):
        k = slow_kernel((a[i] + a[i + 1]) / 2, (b[j] + b[j + 1]) / 2, sigma)
        total += k * float((a[i + 1] - a[i]) @ (b[j + 1] - b[j]))
    return total


def slow_square(a, b, sigma):
    """The square of Eq. (4)."""
    return slow_inner(a, a, sigma) - 2 * slow_inner(a, b, sigma) + slow_inner(b, b, sigma)


def slow_loss(pred, target, table, sigma, d, beta, squared):
    """Eq. (8), or the form of the authors' code."""
    total = 0
    for z, y, length in zip(pred.numpy(), target.numpy(), d.tolist()):
        value = np.linalg.norm(z - y, axis=1).mean() if squared else 0
        for line, width in zip(table, sigma.tolist()):
            square = max(slow_square(z[line], y[line], width / 2), 0)
            if squared:
                value += beta * square / len(z)
            else:
                value += beta * math.sqrt(square)
                value += np.linalg.norm(z[line] - y[line], axis=1).mean()
        total += value / length
    return total / len(pred)


def test_discrepancies_are_equations_1_4_and_5():
    a, b = curve(6, (2, 3))
    b = a + b
    sigma = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    square = lf.curve_discrepancy(a, b, sigma, squared=True)
    norm = lf.curve_discrepancy(a, b, sigma)
    landmarks = lf.landmark_discrepancy(a, b)
    for i, c in itertools.product(range(2), range(3)):
        slow = slow_square(a[i, c].numpy(), b[i, c].numpy(), sigma[c].item())
        same(square[i, c], slow)
        same(norm[i, c], math.sqrt(slow))
        same(lf.inner(a[i, c], b[i, c], 15.0), slow_inner(a[i, c].numpy(), b[i, c].numpy(), 15.0))
        distances = [math.dist(p, q) for p, q in zip(a[i, c].tolist(), b[i, c].tolist())]
        same(landmarks[i, c], sum(distances) / 6)
    real = torch.tensor([True, True, False, True, False, False])
    some = lf.landmark_discrepancy(a[..., real, :], b[..., real, :])
    same(lf.landmark_discrepancy(a, b, real), some)


def test_curve_discrepancy_has_the_properties_of_a_distance_of_curves():
    z = curve(9)[0]
    y = curve(9, seed=1)[0]

    def D(a, b, sigma=SIGMA, squared=False):
        return lf.curve_discrepancy(a, b, sigma, squared).item()

    def finer(x):
        return F.interpolate(x.T[None], 65, mode="linear", align_corners=True)[0].T

    value, power = D(z, y), lf.inner(z, z, SIGMA).item()
    assert D(y, z) == pytest.approx(value) and value > 1
    assert D(z, z) <= 1e-6 * SIGMA + 1e-12 and D(z, z, squared=True) == 0
    assert D(z.flip(0), y.flip(0)) == pytest.approx(value)
    assert D(z, z.flip(0), squared=True) == pytest.approx(4 * power)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    assert D(z @ turn.T + 100, y @ turn.T + 100) == pytest.approx(value)
    assert D(3 * z, 3 * y, 3 * SIGMA) == pytest.approx(3 * value)
    assert abs(D(finer(z), finer(y), squared=True) - value**2) < 0.05 * power
    ends = (z[-1] - z[0]) - (y[-1] - y[0])
    assert D(z, y, 1e7, True) == pytest.approx((ends @ ends).item(), rel=1e-6)
    assert D(z[:1], y[:1], squared=True) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("squared", [False, True])
def test_gradients_are_finite_where_prediction_and_target_agree(dtype, squared):
    mean, _, table = face(29, dtype=dtype)
    curves = lf.Curves(table)
    sigma = lf.curve_scale(mean, curves)
    d = torch.full((1,), 50.0)
    pred = mean[None].clone().requires_grad_()
    loss = lf.lddmm_loss(pred, mean[None], curves, sigma, d, squared=squared)
    assert loss < 1e-5 and torch.autograd.grad(loss, pred)[0].abs().max() < 1e-2
    near = (mean[None] + 1e-3).requires_grad_()
    loss = lf.lddmm_loss(near, mean[None], curves, sigma, d, squared=squared)
    gradient, = torch.autograd.grad(loss, near)
    assert gradient.isfinite().all() and gradient.abs().max() < 0.1


@pytest.mark.parametrize("scheme, points", [(29, 100), (68, 50)])
@pytest.mark.parametrize("squared, beta", [(False, 0.1), (True, 0.1), (False, 0.0), (False, 1.0)])
def test_loss_is_equation_8(scheme, points, squared, beta):
    mean, noise, table = face(scheme, points)  # 68 at 50 %: mouth corners stand twice
    curves = lf.Curves(table)
    sigma = lf.curve_scale(mean, curves)
    d = torch.tensor([40.0, 50.0, 60.0], dtype=torch.float64)
    target = mean.expand(3, -1, 2)
    loss = lf.lddmm_loss(mean + noise, target, curves, sigma, d, beta, squared)
    assert loss.shape == ()  # a curve of one point has D_c = 1e-6 sigma, not 0
    same(loss, slow_loss(mean + noise, target, table, sigma, d, beta, squared), 1e-5)


# ---- Backbones -----------------------------------------------------------------------------------

def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def multiply_adds(module, *inputs):
    """Of all convolutions and linear layers that `module(*inputs)` runs, biases not counted."""
    total = []
    hooks = []
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            hooks.append(m.register_forward_hook(
                lambda m, args, out: total.append(out.numel() * m.weight[0].numel())))
    module.eval()(*inputs)
    for hook in hooks:
        hook.remove()
    return sum(total)


@functools.cache
def on_meta(name):
    """A network without numbers, of 68 landmarks at 256 px, for sizes and names."""
    with torch.device("meta"):
        return lf.HRNetHeatmaps(68) if name == "hrnet_heatmaps" else lf.BACKBONES[name](68)


# Parameters by landmarks, and multiply-adds (10^9) of 68 at 256 px: of the published modules.
@pytest.mark.parametrize("name, parameters, billions", [
    ("hrnet_heatmaps", {68: 9_654_398}, 4.660),
    ("hrnet_w18", {68: 19_528_668, 96: 19_643_412, 98: 19_651_608}, 5.592),
    ("hourglass", {68: 26_124_688}, 29.13)])
def test_published_sizes(name, parameters, billions):
    net = on_meta(name)
    head = 2049 * 2 if name in lf.BACKBONES else 0  # features -> momenta, a landmark
    for points, number in parameters.items():
        assert count(net) + head * points == number
    total = multiply_adds(net, torch.empty(1, 3, 256, 256, device="meta")) + head * 68
    if name == "hourglass":  # published: the last heatmaps are computed; and the stacks alone
        total += 256 * 68 * 64**2
        assert count(net) - count(net.final_layer) == 24_791_304
    assert abs(total / 1e9 - billions) <= 0.0051


def test_published_size_of_dan():
    with torch.device("meta"):
        stages = nn.ModuleList([lf.DANStage(3), lf.DANStage(5)])
        connection = lf.DANConnection()
        heads = [nn.Linear(2048, 136), nn.Linear(2048, 136)]
        features = stages[0](torch.empty(1, 3, 256, 256))
        total = multiply_adds(connection.fc, features)
        for stage, channels, head in zip(stages, (3, 5), heads):
            total += multiply_adds(stage, torch.empty(1, channels, 256, 256))
            total += multiply_adds(head, features)
    assert count(stages, connection, *heads) == 161_988_880
    assert features.shape == (1, 2048) and abs(total / 1e9 - 29.44) <= 0.0051


def test_hrnet_trunk_is_that_of_sdfl_by_name_shape_and_value():
    torch.manual_seed(0)
    ours, other = lf.HRNet(), sdfl.HRNet()
    ours.load_state_dict(other.state_dict())
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        xs = ours.eval()(image)
        pooled = [F.interpolate(x, xs[-1].shape[-2:], mode="bilinear") for x in xs]
        assert torch.equal(torch.cat(pooled, 1), other.eval()(image))
    assert [x.shape[1:] for x in xs] == [(18, 16, 24), (36, 8, 12), (72, 4, 6), (144, 2, 3)]


def test_names_of_the_heads_are_those_of_hrnets_checkpoints():
    features = {name: tuple(v.shape) for name, v in on_meta("hrnet_w18").state_dict().items()}
    heatmaps = on_meta("hrnet_heatmaps").state_dict()
    trunk = lf.HRNet().state_dict()
    assert {name.split(".")[0] for name in features if name not in trunk} == {
        "incre_modules", "downsamp_modules", "final_layer"}
    assert features["incre_modules.3.0.conv3.weight"] == (1024, 256, 1, 1)
    assert features["incre_modules.0.0.downsample.0.weight"] == (128, 18, 1, 1)
    assert features["downsamp_modules.2.0.weight"] == (1024, 512, 3, 3)
    assert features["final_layer.0.weight"] == (2048, 1024, 1, 1)
    assert {"head.0.weight", "head.1.running_mean", "head.3.bias"} < set(heatmaps) - set(trunk)


@pytest.mark.parametrize("name", ["hourglass", "mobilenetv2"])
def test_no_batch_norm_starts_below_its_eps(name):
    torch.manual_seed(0)
    net = lf.BACKBONES[name](4, 64).train()
    variances = []
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(
                lambda m, x, y: variances.append(x[0].var((0, 2, 3)).median().item()))
    with torch.no_grad():
        net(torch.randn(4, 3, 64, 64))
    assert len(variances) > 40 and min(variances) > 1e-4


# ---- DAN's connection ----------------------------------------------------------------------------

def test_landmark_image_against_loops():
    points = torch.tensor([
        [[10.2, 7.7], [12.0, 9.0], [0.3, 31.4], [-2.2, 4.0], [40.0, 5.0]],
        [[31.0, 31.0], [31.0, 31.0], [15.5, 16.5], [1e9, 0.0], [-1e30, 3.0]]])
    image = lf.landmark_image(points, 32)
    expected = torch.zeros(2, 1, 32, 32)
    for b, y, x in itertools.product(range(2), range(32), range(32)):
        for px, py in points[b].tolist():
            if abs(x - round(px)) <= 3 and abs(y - round(py)) <= 3:
                value = 1 / (1 + math.hypot(x - px, y - py))
                expected[b, 0, y, x] = max(expected[b, 0, y, x], value)
    assert torch.allclose(image, expected, atol=1e-6)
    off = torch.tensor([[[8.2, 9.3], [9.9, 10.1]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: lf.landmark_image(p, 16), off)


@pytest.mark.parametrize("size", [64, 128])
def test_connection_moves_image_and_landmarks_onto_the_mean(size):
    torch.manual_seed(0)
    connection = lf.DANConnection()
    mean = 256 * (0.3 + 0.4 * torch.rand(7, 2))
    m = torch.tensor([[[0.9, 0.2, -12.0], [-0.2, 0.9, 24.0]],
                      [[1.2, -0.3, 16.0], [0.3, 1.2, -68.0]]])
    points = warp.apply_affine(m, mean).requires_grad_()  # similarities: the fit is exact
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = torch.stack([x, y, 0 * x + 1]).float().expand(2, 3, size, size)  # shows its own places
    features = torch.randn(2, 2048, requires_grad=True)
    out, theta = connection(image, points, features, mean)
    assert out.shape == (2, 5, size, size)
    same(warp.apply_affine(theta, points), mean.expand(2, -1, -1), 1e-3)
    at = lf.from_frame(mean, size).expand(2, -1, -1)  # what the moved image shows at the mean face
    seen = warp.sample(out[:, :3], warp.to_norm(at, (size, size))[:, None])[:, :, 0].mT  # (2, 7, 3)
    source = lf.from_frame(points, size)
    inside = (seen[..., 2] > 0.999) & ((source > 1) & (source < size - 2)).all(-1)
    assert inside.sum() > 8
    assert torch.allclose(seen[inside][:, :2], source[inside], atol=2e-2)
    for px, py in at[0].tolist():  # drawn at 64 px, enlarged
        near = out[0, 3, int(py) - 2:int(py) + 4, int(px) - 2:int(px) + 4]
        assert near.max() > 0.4
    assert out[0, 4].min() >= 0 and out[0, 4].std() > 0
    out.square().sum().backward()
    for value in (points, features, connection.fc.weight):
        assert value.grad.isfinite().all() and value.grad.any()


# ---- Network -------------------------------------------------------------------------------------

def drawn_args(*flags):
    return lf.parse_args(["--size", "64", "--limit", "24", "--device", "cpu", *flags])


@functools.cache
def drawn(*flags, split="test"):
    """Drawn faces of 64 px as crops."""
    return lf.make_dataset(drawn_args(*flags), split)


@functools.cache
def mean_of(scheme):
    """Mean face of drawn faces in their own crops, (P, 2) px of a 256 px crop."""
    return lf.mean_face(drawn("--limit", "200", "--points", str(scheme), split="train"))


def network(scheme=68, points=100, still=True, backbone="mobilenetv2", seed=0, **options):
    """A network whose estimators give zeros, or (not `still`) the same momenta for every image."""
    torch.manual_seed(seed)
    net = lf.LDDMMFace(backbone, scheme, mean_of(scheme), points, size=64, **options).eval()
    for estimator in net.estimators:
        nn.init.zeros_(estimator.weight)
        nn.init.normal_(estimator.bias, std=0 if still else 3)
    return net


@torch.no_grad()
def predictions(net, extra=None):
    return net(torch.randn(2, 3, 64, 64), extra)


def found_by(net, extra=None, count=2):
    """Landmarks of the annotation, those that were trained on, the prediction; px of 64 px
    crops."""
    image = torch.randn(count, 3, 64, 64)
    return lf.predict_points(net, image, extra or lf.sparse_to_dense(net), drawn_args())


@pytest.mark.parametrize("px", [64, 256])
def test_the_frame_is_the_same_crop_at_256_px(px):
    points = torch.tensor([[-0.5, px - 0.5], [(px - 1) / 2, 0.0]])  # edges go to edges
    framed = lf.to_frame(points, px)
    assert framed[0].tolist() == [-0.5, 255.5] and framed[1, 0] == 127.5
    same(lf.from_frame(framed, px), points)


@pytest.mark.parametrize("name", ["hrnet_w18", "hourglass", "mobilenetv2", "dan"])
def test_gradients_batch_layout_and_bfloat16(name):
    torch.manual_seed(0)
    net = lf.LDDMMFace(name, 29, mean_of(29), size=64).train()
    images = torch.randn(8, 3, 64, 64)
    for m in net.modules():  # running statistics of one batch; the hourglass has few values inside
        if isinstance(m, nn.BatchNorm2d) and name != "hourglass":
            m.momentum = None
    points = lf.from_frame(net.mean + 5 * torch.randn(8, 29, 2), 64)
    lf.loss_of(net, net(images), points, drawn_args("--points", "29")).backward()
    for key, p in net.named_parameters():  # a bias before a batch norm has no effect: gradient 0
        assert not p.requires_grad or p.grad.isfinite().all() and (p.ndim == 1 or p.grad.any()), key
    frozen = [key for key, p in net.named_parameters() if not p.requires_grad]
    unused = ["backbone.0.heads.1.weight", "backbone.0.heads.1.bias"]
    assert frozen == (unused if name == "hourglass" else [])
    backbone = net.backbone[0].eval()
    image = images[:3]
    with torch.no_grad():
        out = backbone(image)
        assert out.shape == (3, backbone.channels) and out.isfinite().all()
        assert out.std(0).norm() > 0.02 * out.norm()  # it tells images apart
        assert (backbone(image[1:2]) - out[1:2]).norm() < 5e-3 * out[1].norm()
        with torch.autocast("cpu", torch.bfloat16):
            prediction = net.eval()(image)
        assert prediction.stages[-1].dtype == prediction.momenta.dtype == torch.float32
        last = backbone.to(memory_format=torch.channels_last)
        image = image.to(memory_format=torch.channels_last)
        assert (last(image) - out).norm() < 5e-3 * out.norm()


@pytest.mark.parametrize("scheme, points, options", [
    (68, 100, {}), (98, 50, {}), (194, 33, dict(steps=3)), (29, 100, dict(method="coord"))])
def test_no_momenta_give_the_mean_face_exactly(scheme, points, options):
    net = network(scheme, points, **options)
    prediction = predictions(net)
    assert torch.equal(prediction.stages[-1], net.start.expand(2, -1, -1))
    found, trained, _ = found_by(net)
    same(found, lf.from_frame(net.mean, 64).expand(2, -1, -1), 1e-4)
    assert torch.equal(trained, lf.from_frame(prediction.stages[-1], 64))
    same(net.sigma, lf.curve_scale(net.start, net.curves))
    assert {"mean", "sigma"} < set(net.state_dict()) and "interpolate" not in net.state_dict()


def test_the_flow_of_the_network_is_deform_and_carries_the_extra_points():
    net = network(98, 50, still=False, sigma_factor=0.5, steps=3)
    names = ["eye_left", "eye_left", "nose_bridge"]
    extra = lf.extra_landmarks(net, net.mean[[96, 60, 51]] + 2, names, [0])
    prediction = predictions(net, extra)
    momenta = net.estimators[0].bias.detach().view(-1, 2)
    sigma = 0.5 * lf.curve_scale(net.start, net.curves)
    path = lf.deform(net.start[None], momenta[None], net.curves, sigma, 3)
    count = len(net.ids)
    same(prediction.stages[0][:, :count], path[:, -1].expand(2, -1, -1), 1e-4)
    same(predictions(net).stages[0], path[:, -1].expand(2, -1, -1), 1e-4)
    assert torch.equal(prediction.momenta[:, :count], momenta.expand(2, -1, -1))
    assert not prediction.momenta[:, count:].any()
    first = 0
    carried = {}
    for c, (name, line) in enumerate(net.subset.items()):
        own = slice(first, first + len(line))
        carried[name] = lf.flow(net.start[own], momenta[own], sigma[c], 3, extra.points)[1][-1]
        first += len(line)
    same(prediction.stages[0][0, count:count + 2], carried["eye_left"][:2], 1e-4)
    same(prediction.stages[0][0, count + 2], carried["nose_bridge"][2], 1e-4)


def test_the_baselines_have_no_flow():
    net = network(68, still=False, method="coord", steps=3)
    expected = net.mean + net.estimators[0].bias.detach().view(68, 2)
    same(predictions(net).stages[0], expected.expand(2, -1, -1), 1e-4)
    net = lf.LDDMMFace("hrnet_w18", 68, mean_of(68), 50, method="heatmap", size=64).eval()
    prediction = predictions(net)
    assert prediction.heatmaps.shape == (2, 50, 16, 16) and prediction.stages == []
    found, trained, prediction = found_by(net)
    same(trained, 4 * lf.peaks(prediction.heatmaps) + 1.5, 1e-3)  # px of the crop
    moved = trained - lf.from_frame(net.start, 64)
    same(found, lf.from_frame(net.mean, 64) + net.interpolate @ moved, 1e-3)


def test_dan_from_end_to_end():
    net = network(68, 50, backbone="dan")
    extra = lf.sparse_to_dense(net)
    one = network(68, 50, still=False)
    path = predictions(one, extra)  # the same momenta without a second stage
    bias = one.estimators[0].bias.data
    start = torch.cat([net.start, extra.points]).expand(2, -1, -1)
    for first, second in ((False, False), (False, True), (True, False)):
        net.estimators[0].bias.data.copy_(bias * first)
        net.estimators[1].bias.data.copy_(bias * second)
        prediction = predictions(net, extra)
        same(prediction.stages[0], path.stages[0] if first else start, 1e-3)
        same(prediction.stages[1], path.stages[0] if first or second else start, 2e-3)
    count = len(net.ids)
    theta = warp.fit_similarity(path.stages[0][0, :count], net.start)
    same(prediction.start[0], warp.apply_affine(theta, path.stages[0][0]), 1e-3)


# ---- The landmarks that are not trained on -------------------------------------------------------

SPARSE = [(29, SPARSE_29), (68, 50), (98, 50), (194, 50), (194, 33)]


@pytest.mark.parametrize("backbone", ["mobilenetv2", "dan"])
@pytest.mark.parametrize("scheme, points", [(68, 50), (98, 100)])
def test_own_landmarks_are_where_the_flow_leaves_them(scheme, points, backbone):
    net = network(scheme, points, still=False, backbone=backbone)
    extra = lf.sparse_to_dense(net)
    found, trained, prediction = found_by(net, extra, 1)
    ends = lf.from_frame(prediction.stages[-1], 64)[0]
    last = {index: k for k, index in enumerate(net.landmarks)}  # of two, the later
    others = [i for i in range(scheme) if i not in last]
    assert len(extra.points) == len(others)
    for index, k in last.items():
        assert torch.equal(found[0, index], ends[k])
    start = torch.cat([net.start, extra.points])[extra.order]
    assert torch.equal(start, net.mean)  # each landmark is that of its own number
    assert (found - lf.from_frame(net.mean, 64)).norm(dim=2).min() > 0
    owner = {i: c for c, line in enumerate(extra.curves.padded.tolist()) for i in line}
    for c, line in enumerate(lf.curves_and_pupils(scheme).values()):
        assert {owner[int(extra.order[i])] for i in line if i in others} <= {c}


@pytest.mark.parametrize("here, there", [
    (68, 194), (68, 98), (98, 68), (68, 29), (68, 106), (29, 68), (194, 106), (98, 19)])
def test_another_annotation_is_carried_by_the_curves_of_the_network(here, there):
    net = network(here)
    own, other = datasets.SCHEMES[here], datasets.SCHEMES[there]
    extra = lf.cross_annotation(net, mean_of(there))
    count = len(net.ids)
    assert extra.order.tolist() == list(range(count, count + there))
    names = list(net.subset)
    owner = {i: names[c] for c, line in enumerate(extra.curves.padded.tolist()) for i in line}
    owner = [owner[count + i] for i in range(there)]
    for name, line in other.curves.items():
        if name in net.subset:
            assert {owner[i] for i in line} == {name}
    part_of = {name: part for name, line in own.curves.items()
               for part, ids in own.parts.items() if line[0] in ids}
    for part, ids in other.parts.items():
        assert {part_of[owner[i]] for i in ids} <= {part}
    for side, ids in zip(("left", "right"), other.pupils):
        assert {owner[i] for i in ids} == {"eye_" + side}
    found = found_by(net, extra)[0]  # nothing flows
    assert torch.equal(lf.from_frame(extra.points, 64), found[0])
    flags = "--limit", "200", "--points"
    crops = drawn(*flags, str(here), split="train").crop_matrices
    faces = drawn(*flags, str(there), split="train").points
    seen = lf.to_frame(warp.apply_affine(crops, faces).mean(0), 64)
    eyes = datasets.group_means(net.mean, own.pupils)
    error = (extra.points - seen).norm(dim=1) / (eyes[0] - eyes[1]).norm()
    assert error.mean() < 0.05 and error.max() < 0.15, (error.mean(), error.max())


def test_an_annotation_in_another_frame_is_brought_onto_the_networks():
    net = network(68)
    turn = torch.tensor([[0.5, 0.1, 3.0], [-0.1, 0.4, 60.0]])
    plain = lf.cross_annotation(net, mean_of(98))
    moved = lf.cross_annotation(net, warp.apply_affine(turn, mean_of(98)))
    same(moved.points, plain.points, 0.02)
    same(lf.cross_annotation(net, net.mean).points, net.mean, 1e-3)  # its own, as if another's


@pytest.mark.parametrize("scheme, points", [(106, 100), *SPARSE])
def test_interpolation_is_exact_where_displacements_are_linear_along_a_curve(scheme, points):
    subset = lf.training_landmarks(scheme, points)
    curves = datasets.SCHEMES[scheme].curves
    ids = sum(subset.values(), [])
    weights = lf.interpolation(scheme, subset).double()
    same(weights.sum(1), torch.ones(scheme), 1e-6)
    assert (weights >= 0).all()
    first = 0
    for name, line in lf.curves_and_pupils(scheme).items():
        own = range(first, first + len(subset[name]))
        displacement = torch.full((len(ids),), 1e6, dtype=torch.float64)  # of other curves
        places = {}
        for k, index in zip(own, subset[name]):  # a corner of the other lip is one before or behind
            outside = -1 if k == first else len(curves[name])
            places[k] = curves[name].index(index) if index in curves[name] else outside
            displacement[k] = 3 + 7 * places[k]
        for position, index in enumerate(line):
            if index in ids:  # of two, the later training landmark
                last = len(ids) - 1 - ids[::-1].index(index)
                assert weights[index, last] == 1
            elif index in curves[name]:  # held beyond the outermost
                within = min(max(position, min(places.values())), max(places.values()))
                assert float(weights[index] @ displacement) == pytest.approx(3 + 7 * within)
            else:  # a pupil
                same(weights[index, own], torch.full((len(own),), 1 / len(own)), 1e-6)
        first += len(own)


# ---- Loss, peaks, data ---------------------------------------------------------------------------

@functools.cache
def moving_network(**options):
    return network(68, still=False, **options)


@pytest.mark.parametrize("flags, method", [
    ("", "lddmm"), ("--beta 1", "lddmm"), ("--squared", "lddmm"), ("", "coord")])
@pytest.mark.parametrize("points, backbone", [(100, "mobilenetv2"), (50, "dan")])
def test_loss_of_stages_is_in_px_of_a_256_px_crop(flags, method, points, backbone):
    args = drawn_args(*flags.split())
    net = moving_network(method=method, points=points, backbone=backbone)
    generator = torch.Generator().manual_seed(0)
    points = lf.from_frame(mean_of(68) + 6 * torch.randn(3, 68, 2, generator=generator), 64)
    with torch.no_grad():
        prediction = net(torch.randn(3, 3, 64, 64))
    target = lf.to_frame(points, 64)
    d = (target[:, 36:42].mean(1) - target[:, 42:48].mean(1)).norm(dim=1)
    target = target[:, net.landmarks]
    parts = []
    for pred in prediction.stages:
        if method == "coord":
            parts.append(((pred - target).norm(dim=2).mean(1) / d).mean())
        else:
            parts.append(lf.lddmm_loss(pred, target, net.curves, net.sigma, d, args.beta,
                                       args.squared))
    expected = parts[0]
    if backbone == "dan":
        expected = 0.3 * parts[0] + 0.7 * parts[1]
    same(lf.loss_of(net, prediction, points, args), expected, 1e-5)


def test_loss_of_heatmaps_is_the_squared_error_against_gaussians():
    torch.manual_seed(0)
    maps = torch.rand(2, 50, 16, 16)
    points = 64 * torch.rand(2, 50, 2)
    total = 0.0
    y, x = np.mgrid[:16, :16]
    for b, k in itertools.product(range(2), range(50)):
        cx, cy = ((points[b, k] + 0.5) / 4 - 0.5).tolist()
        gaussian = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 2)
        total += ((maps[b, k].numpy() - gaussian) ** 2).mean()
    assert float(lf.heatmap_loss(maps, points, 64)) == pytest.approx(total / 100, rel=1e-5)


def test_peaks_shift_a_quarter_towards_the_larger_neighbour():
    torch.manual_seed(0)
    maps = torch.rand(3, 8, 6, 9)
    maps[0, 0] = 0
    maps[0, 0, 2, 3] = 1  # neighbours alike: no shift
    maps[0, 1, 0, 0] = maps[0, 2, 5, 8] = 2  # at the border the outside counts as 0
    found = lf.peaks(maps)
    for b, k in itertools.product(range(3), range(8)):
        y, x = np.unravel_index(int(maps[b, k].argmax()), (6, 9))
        padded = np.pad(maps[b, k].numpy(), 1)
        right = np.sign(padded[y + 1, x + 2] - padded[y + 1, x])
        down = np.sign(padded[y + 2, x + 1] - padded[y, x + 1])
        assert found[b, k].tolist() == [x + right / 4, y + down / 4]
    assert found[0, 0].tolist() == [3, 2]


def test_augmentation_stays_within_what_it_says():
    angles, zooms, mirrors = [], [], 0
    for seed in range(1000):
        matrix, mirror, extras = lf.augment(np.random.default_rng(seed), 200)
        mirrors += mirror
        zooms.append(math.sqrt(np.linalg.det(matrix[:, :2])) - 1)
        angles.append(math.degrees(math.atan2(matrix[0, 1], matrix[0, 0])))
        assert extras == {} and np.abs(matrix @ [99.5, 99.5, 1] - 99.5).max() < 1e-9  # the middle
        corners = np.array([[-0.5, -0.5], [199.5, -0.5], [-0.5, 199.5], [199.5, 199.5]])
        source = (corners - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T  # what the crop looks at
        assert np.abs(source - 99.5).max() <= lf.REACH * 100 + 1e-9
    assert 450 < mirrors < 550
    for values, limit in ((angles, 20), (zooms, 0.25)):  # normal, cut at two deviations
        values = np.abs(values) / limit
        assert values.max() == pytest.approx(1) and 0.02 < (values > 0.9999).mean() < 0.08
        assert 0.63 < (values < 0.5).mean() < 0.73


def test_prepare_normalises_by_imagenet():
    image = torch.randint(0, 256, (2, 10, 12, 3), dtype=torch.uint8)
    expected = (image.double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225])
    for given in (image, image.permute(0, 3, 1, 2).float()):  # of the loader, of the device's cache
        same(lf.prepare({"image": given}, CPU).permute(0, 2, 3, 1), expected, 1e-5)


# ---- Evaluation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("scheme, points", [(68, 100), (98, 50)])
def test_determinants_are_those_of_the_networks_map(scheme, points):
    """A landmark's derivative, by autograd through the network that carries it as extra."""
    net = network(scheme, points, still=False)
    own = lf.sparse_to_dense(net)
    image = torch.randn(1, 3, 64, 64)
    found = torch.linalg.det(lf.jacobians(net, net(image, own), own))[0].detach()  # (P,)
    names, ids = [], []
    for name, line in lf.curves_and_pupils(scheme).items():
        names += [name] * len(line)
        ids += line
    points = net.mean[ids].clone().requires_grad_()
    extra = lf.extra_landmarks(net, points, names, range(len(ids)))
    ends = net(image, extra).stages[-1][0, len(net.ids):]
    rows = [torch.autograd.grad(total, points, retain_graph=True)[0] for total in ends.sum(0)]
    same(found[ids], torch.linalg.det(torch.stack(rows, 1)), 1e-3)
    assert (found - 1).abs().max() > 0.05


class Oracle(lf.LDDMMFace):
    """Answers the faces of a set, asked in order, moved by `shift` px of the crop."""

    def __init__(self, data, points=100, shift=0.0, method="lddmm"):
        scheme = data.points.shape[1]
        super().__init__("mobilenetv2", scheme, lf.mean_face(data), points, method=method, size=64)
        self.truth = lf.to_frame(data.crop_points() + torch.tensor([shift, 0.0]), 64)
        self.calls = 0

    def forward(self, image, extra=None):
        points = self.truth[torch.arange(self.calls, self.calls + len(image)) % len(self.truth)]
        self.calls += len(image)
        found = points[:, self.landmarks]
        if extra is not None:
            own = torch.zeros(len(image), len(self.landmarks) + len(extra.points), 2)
            own[:, extra.order] = points
            own[:, :len(self.landmarks)] = found
            found = own
        return lf.Prediction([found], found, torch.zeros_like(found))


def loader_of(data):
    return datasets.make_loader(data, datasets.in_order(len(data), 7), 0, CPU)


@pytest.mark.parametrize("flags, points", [("", 100), ("--points 98", 50), ("--points 29", 100)])
def test_evaluate_measures_in_image_pixels_and_by_subset(flags, points):
    args = drawn_args("--threshold", "0.05", *flags.split())
    data = drawn(*flags.split())
    perfect, _, found = lf.evaluate(Oracle(data, points), loader_of(data), args)
    same(found, data.points, 1e-4)
    assert perfect["nme"] < 1e-6 and perfect["fr"] == 0 and perfect["auc"] > 0.9999
    assert perfect["curves"] < 1e-6 and perfect["curves@eyes"] < 1e-6
    assert perfect["detja"] == perfect["detjam"] == 1 and perfect["detjn"] == 0
    assert perfect["nme/mean face"] > 0.02
    moved, errors, found = lf.evaluate(Oracle(data, points, 2.0), loader_of(data), args)
    corners = list(datasets.SCHEMES[data.points.shape[1]].eyes)
    eyes = data.points[:, corners]
    px = 2 / data.crop_matrices[:, 0, 0]  # 2 px of the crop
    same(errors, px / (eyes[:, 0] - eyes[:, 1]).norm(dim=1), 1e-5)
    parts = datasets.SCHEMES[data.points.shape[1]].parts
    curves = metrics.curve_error(found, data.points, parts, data.divisors("io"))
    for tag in {tag for face in data.faces for tag in face.tags}:
        chosen = [tag in face.tags for face in data.faces]
        assert moved[f"nme/{tag}"] == pytest.approx(float(errors[chosen].mean()))
        for name, part in (("curves", "overall"), ("curves@mouth", "mouth")):
            assert moved[f"{name}/{tag}"] == pytest.approx(float(curves[part][chosen].mean()))
    assert moved["curves"] == pytest.approx(float(curves["overall"].mean()))
    assert moved["curves@mouth"] == pytest.approx(float(curves["mouth"].mean()))


def test_what_a_flow_has_to_beat_is_scored_in_the_images():
    data = drawn()
    net = Oracle(data, 50)
    scores = lf.evaluate(net, loader_of(data), drawn_args("--norm", "box"))[0]
    mean = data.crop_points().mean(0).double()
    weights = lf.interpolation(68, net.subset).double()
    crop = warp.apply_affine(data.crop_matrices, data.points)
    between = mean + weights @ (crop[:, net.landmarks] - mean[net.landmarks])
    d = data.divisors("box") * data.crop_matrices[:, 0, 0]  # px of the crop
    for name, guess in (("nme@interpolated", between), ("nme/mean face", mean)):
        error = (guess - crop).norm(dim=2).mean(1) / d
        assert scores[name] == pytest.approx(float(error.mean()), rel=1e-4)
    error = metrics.curve_error(between, crop, datasets.SCHEMES[68].parts, d)["overall"].mean()
    assert scores["curves@interpolated"] == pytest.approx(float(error), rel=1e-4)
    assert 0 < scores["nme@interpolated"] < scores["nme/mean face"] / 2


def test_a_sparse_baseline_is_compared_by_its_own_landmarks():
    data = drawn()
    net = Oracle(data, 50, method="coord")
    scores = lf.evaluate(net, loader_of(data), drawn_args())[0]
    ids = net.landmarks
    own = {part: [ids.index(i) for i in chosen if i in ids]  # each once
           for part, chosen in datasets.SCHEMES[68].parts.items()}
    few = metrics.curve_error(data.points[:, ids], data.points, datasets.SCHEMES[68].parts,
                              data.divisors("io"), pred_parts=own)
    assert scores["curves"] == pytest.approx(float(few["overall"].mean()), rel=1e-4)
    assert scores["curves"] > 0.003  # however good they are, between them nothing is
    assert scores["nme"] == pytest.approx(scores["nme@interpolated"], rel=1e-4)
    assert "detja" not in scores
    args = drawn_args("--points", "98")
    scores, errors, found = lf.evaluate(net, loader_of(drawn("--points", "98")), args)
    assert errors.isnan().all() and scores["fr"] == 1 and found.shape == (24, 68, 2)
    assert math.isfinite(scores["curves@mouth"]) and "nme@interpolated" not in scores


def test_faces_of_another_annotation_are_scored_by_their_own():
    net = network(68)
    data = drawn("--points", "29")
    extra = lf.cross_annotation(net, mean_of(29))
    scores, errors, points = lf.evaluate(net, loader_of(data), drawn_args("--points", "29"), extra)
    placed = lf.from_frame(extra.points, 64).double().expand(24, -1, -1)
    same(points, warp.apply_affine(warp.invert(data.crop_matrices), placed), 1e-3)
    same(errors, metrics.nme(points, data.points, data.divisors("io")))
    assert not {"detja", "nme@interpolated", "nme/mean face"} & set(scores)


# ---- Runs ----------------------------------------------------------------------------------------

TINY = ["--size", "64", "--limit", "16", "--batch-size", "8", "--backbone", "mobilenetv2",
        "--points", "68", "--eval-every", "2", "--device", "cpu"]


def trained(folder, *flags):
    return lf.train(lf.parse_args([*TINY, *flags, "--output", str(folder)]))


def evaluated(folder, *flags):
    return lf.train(lf.parse_args(["--eval", str(folder / "last.pt"), "--device", "cpu", *flags]))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, in process: its folder and numbers."""
    folder = tmp_path_factory.mktemp("run") / "a"
    return folder, trained(folder, "--epochs", "3")


def test_flags(capsys):
    args = lf.parse_args(["--data", "wflw", "--epochs", "7"])
    assert args.drop_at == [0.25, 0.5, 0.75] and args.given == ["data", "epochs"]
    assert (args.batch_size, args.lr, args.steps, args.beta, args.size) == (32, 3e-4, 2, 0.1, 256)
    lf.parse_args("--size 96 --backbone hourglass --method heatmap".split())  # has HRNet
    for flags, message in [
            ("--size 96 --backbone hourglass", "--size 96: expected a multiple of 64"),
            ("--steps 0", "at least 1"), ("--sigma-factor 0", "--sigma-factor"),
            ("--drop-at 0.5,7", "--drop-at"), ("--train-points half", "--train-points"),
            ("--as-points 21", "invalid choice")]:
        with pytest.raises(SystemExit):
            lf.parse_args(flags.split())
        assert message in capsys.readouterr().err, flags


def test_learning_rate_is_halved_after_each_part():
    steps = (0, 99, 100, 250, 300, 399)
    rates = [lf.learning_rate(step, 400, 3e-4, [0.25, 0.5, 0.75]) for step in steps]
    assert rates == pytest.approx([3e-4, 3e-4, 1.5e-4, 7.5e-5, 3.75e-5, 3.75e-5])


def test_a_run_leaves_its_log_checkpoint_and_pictures(finished):
    folder, result = finished
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert ["nme" in row for row in rows] == [False, True, True]
    assert rows[-1]["lr"] == pytest.approx(1e-3 / 8) and rows[-1]["nme"] == result["nme"]
    assert {"detja", "curves@eyes", "nme@interpolated"} < set(result)
    for name in ("dense", "flow", "ced", "dense-194", "ced-194"):
        assert cv2.imread(str(folder / f"{name}.png")) is not None
    state = run.load(folder / "last.pt", "lddmm_face")
    assert state["epoch"] == 3 and state["data"] == [16, 68]
    crops = drawn("--limit", "16", split="train")
    same(state["model"]["mean"], lf.to_frame(crops.crop_points().mean(0), 64))


def test_resumed_is_the_same_run_bit_for_bit(finished, tmp_path, monkeypatch):
    original = run.Job.save

    def killed(job, epoch, scores, **more):
        original(job, epoch, scores, **more)
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Job, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, "--epochs", "3")
    monkeypatch.undo()
    result = lf.train(lf.parse_args(["--resume", "--output", str(tmp_path), "--device", "cpu"]))
    a, b = (run.load(folder / "last.pt", "lddmm_face") for folder in (finished[0], tmp_path))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for i, moments in a["optimizer"]["state"].items():
        assert torch.equal(moments["exp_avg_sq"], b["optimizer"]["state"][i]["exp_avg_sq"])
    assert result == finished[1]


def test_eval_repeats_the_numbers_also_of_another_annotation(finished, tmp_path, capsys):
    folder, result = finished
    again = evaluated(folder, "--output", str(tmp_path / "new"))
    for key, value in result.items():
        assert again[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    text = capsys.readouterr().out
    assert "faces: 68 landmarks, NME by io, FR and AUC at 0.10, crop landmarks x 1.25" in text
    assert "NME_c (%) " in text and "DetJA" in text
    assert (tmp_path / "new/dense.png").exists() and (tmp_path / "new/flow.png").exists()
    scores = evaluated(folder, "--points", "29")
    assert "detja" not in scores and math.isfinite(scores["nme"])
    assert "faces: 29 landmarks" in capsys.readouterr().out
    with pytest.raises(UserError, match="faces of 5 landmarks, which have no table of curves"):
        evaluated(folder, "--points", "5")


@pytest.mark.parametrize("flags, count, flows", [
    ("--train-points 50", 50, True),
    ("--points 29 --train-points 0,4,1,8,9,16,17,18,20,27,22,25,26,28", 14, True),
    ("--method coord --train-points 50", 50, False),
    ("--method heatmap --size 32 --limit 8", 68, False),
    ("--squared --backbone dan --size 32 --limit 8 --points 29", 29, False)])
def test_other_kinds_of_run(tmp_path, flags, count, flows, monkeypatch):
    monkeypatch.setattr(lf.DANStage, "channels", 64)  # of 2048: DAN's checkpoint is small
    result = trained(tmp_path, "--epochs", "1", *flags.split())
    assert math.isfinite(result["nme"]) and ("detja" in result) == flows
    net, _ = lf.open_checkpoint(lf.parse_args(["--device", "cpu"]), tmp_path / "last.pt")
    assert len(net.ids) == count and (tmp_path / "flow.png").exists() == flows
    again = evaluated(tmp_path)
    assert again["curves"] == pytest.approx(result["curves"], rel=1e-4)
    if "--method" in flags:
        other = evaluated(tmp_path, "--points", "29")
        assert math.isnan(other["nme"]) and math.isfinite(other["curves"])


def test_predict_writes_landmarks_of_any_annotation(finished, tmp_path):
    drawn_face = synthetic.read_faces("test", 1, size=128, points=29)[0]
    image = datasets.load_image(drawn_face.image)
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1])
    flags = ["--predict", str(tmp_path / "a.png"), "--weights", str(finished[0] / "last.pt"),
             "--device", "cpu"]
    boxed = "--as-points 29 --box=9,9,99,110"
    for points, more in ((68, ""), (194, "--as-points 194"), (29, boxed)):
        out = tmp_path / str(points)
        lf.train(lf.parse_args([*flags, "--output", str(out), *more.split()]))
        assert datasets.read_pts(out / "a.pts").shape == (points, 2)
        assert cv2.imread(str(out / "a.png")).shape == (128, 128, 3)


@pytest.mark.parametrize("box, passes", [("landmarks", 2), ("face", 1)])
def test_predict_looks_again_after_a_training_on_boxes_of_landmarks(finished, tmp_path, monkeypatch,
                                                                    box, passes):
    state = run.load(finished[0] / "last.pt", "lddmm_face")
    state["args"]["box"] = box
    torch.save(state, tmp_path / "a.pt")
    asked = []
    monkeypatch.setattr(lf.photos, "predict_landmarks",
                        lambda args, answer, passes: asked.append(passes))
    lf.train(lf.parse_args(["--predict", "x.png", "--weights", str(tmp_path / "a.pt"),
                            "--box", "1,2,30,40", "--device", "cpu"]))
    assert asked == [passes]


def test_splits_of_different_landmarks_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(lf, "read_faces", lambda args, split: synthetic.read_faces(
        split, 2, 64, 29 if split == "test" else 68))
    with pytest.raises(UserError, match="training faces have 68 landmarks, test faces 29"):
        trained(tmp_path / "x")
