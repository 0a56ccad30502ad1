"""lddmm_face.py: equations against slow loops, an ODE solver and autograd, published sizes, whole runs."""
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lddmm_face as lf
import sdfl
from common import datasets, metrics, synthetic, warp

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SIGMA = 30.0


def curve(n=7, lead=(), seed=0, size=100.0, dtype=torch.float64):
    """Points (*lead, n, 2) of an open curve about `size` px wide, and momenta that move them by some px."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, size, n, dtype=dtype)
    points = torch.stack([x, 0.4 * size * (x / size * 4).sin()], -1).expand(*lead, n, 2)
    noise = torch.randn(2, *lead, n, 2, generator=generator, dtype=torch.float64).to(dtype)
    return points + 3 * noise[0], 5 * noise[1]


def face(scheme=68, count=3, seed=0, dtype=torch.float64):
    """Mean face (N, 2) in px with curves drawn at random, momenta (count, N, 2), curve table."""
    chosen = lf.carriers(scheme)
    table, mean = chosen.curves, torch.empty(len(chosen.ids), 2, dtype=dtype)
    for seed, ids in enumerate(table.values(), seed):
        mean[ids] = curve(len(ids), seed=seed, size=60, dtype=dtype)[0] + 20 * seed
    return mean, curve(len(mean), (count,), seed, dtype=dtype)[1], table


def slow_kernel(a, b, sigma):
    return math.exp(-((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / sigma ** 2)


def slow_flow(points, momenta, sigma, steps, extra=()):
    """Eq. (7) as it reads, with Euler steps: lists of the path of the points and of the extras."""
    x = [list(map(float, p)) for p in [*points, *extra]]
    path = [np.array(x)]
    for _ in range(steps):
        velocity = [[sum(slow_kernel(x[j], p, sigma) * float(momenta[j][axis]) for j in range(len(points)))
                     for axis in (0, 1)] for p in x]
        x = [[p[axis] + v[axis] / steps for axis in (0, 1)] for p, v in zip(x, velocity)]
        path.append(np.array(x))
    return np.stack(path)


def ode(points, momenta, sigma, steps=64):
    """The end of the flow by the classical Runge-Kutta method, in numpy: an error of 1e-10 px at 64 steps."""
    x, a, h = points.numpy(), momenta.numpy(), 1 / steps

    def v(x):
        return np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / sigma ** 2) @ a
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


def dense_of(chosen, carried, extra):
    """Carriers (..., K, 2) and the points of their extras to the whole scheme, as predictions are made."""
    return torch.cat([carried, *(extra[name] for name in chosen.extras)], -2)[..., chosen.place, :]


# ---- Carriers and layout -------------------------------------------------------------------------

@pytest.mark.parametrize("scheme, percent, sizes, unique", [
    (68, 50, [5, 4, 3, 3, 4, 3, 6, 6, 5, 5, 3, 3], 46), (98, 50, [9, 8, 5, 5, 4, 3, 4, 4, 4, 3, 3, 2], 54),
    (194, 50, [11, 10, 9, 7, 7, 7, 7, 10, 10, 10, 10], 98), (194, 33, [8, 7, 7, 6, 6, 6, 6, 8, 8, 8, 8], 78)])
def test_published_subsets(scheme, percent, sizes, unique):
    chosen, table = lf.carriers(scheme, percent), datasets.SCHEMES[scheme].curves
    assert [len(ids) for ids in chosen.curves.values()] == sizes and list(chosen.curves) == list(table)
    assert len(set(chosen.ids)) == unique
    corners = {48, 54, 60, 64} if scheme == 68 else set()
    for (name, own), ids in zip(table.items(), lf.SUBSETS[scheme][percent]):
        assert set(ids) - set(own) <= corners, name
        assert {own[0], own[-1]} & set(ids) or name.startswith("lip")


@pytest.mark.parametrize("scheme, points", [
    *itertools.product(lf.ANNOTATIONS, [100]), (68, 50), (98, 50), (194, 50), (194, 33), (98, range(96)),
    (29, [0, 4, 1, 8, 9, 16, 17, 18, 20, 27, 22, 25, 26, 28])])
def test_every_landmark_is_a_carrier_or_an_extra_of_its_own_curve(scheme, points):
    chosen, table = lf.carriers(scheme, points), datasets.SCHEMES[scheme].curves
    places = [k for ids in chosen.curves.values() for k in ids]
    assert sorted(places) == list(range(len(chosen.ids)))
    extras = [index for ids in chosen.extras.values() for index in ids]
    assert sorted({*chosen.ids, *extras}) == list(range(scheme)) and not set(chosen.ids) & set(extras)
    for name, ids in chosen.extras.items():
        assert set(ids) <= {*table[name], *({96, 97} if name.startswith("eye") and scheme == 98 else ())}
    # Nothing moves: the dense face comes back. 68: a corner that stands twice is the later one.
    dense = torch.arange(2.0 * scheme).view(scheme, 2)
    extra = {name: dense[ids] for name, ids in chosen.extras.items()}
    assert torch.equal(dense_of(chosen, dense[chosen.ids], extra), dense)
    last = {index: k for k, index in enumerate(chosen.ids)}
    assert all(chosen.place[index] == k for index, k in last.items())


def test_a_users_carriers_go_along_the_curve():
    points = [27, 2, 5, 0, 1, 8, 9, 16, 17, 18, 20, 22, 25, 26, 28]
    chosen = lf.carriers(29, points)
    assert [chosen.ids[k] for k in chosen.curves["brow_left"]] == [0, 2, 5]  # the table says 0, 4, 2, 5
    assert [chosen.ids[k] for k in chosen.curves["lip_outer"]] == [22, 27]
    assert chosen.extras["brow_left"] == [4] and chosen.extras["brow_right"] == [6, 3, 7]
    pupils = lf.carriers(98)
    assert pupils.extras == {"eye_left": [96], "eye_right": [97]} and len(set(pupils.ids)) == 96


@pytest.mark.parametrize("scheme, points, message", [
    (21, 100, "no curve table for 21 points, only for 19, 29"),
    (68, 33, r"no table of 33 % of 68 points; wanted one of \[100, 50\]"),
    (68, [0, 68, -1], r"landmarks \[-1, 68\] are outside the scheme; wanted 0 to 67"),
    (68, [0, 3, 0], r"landmarks \[0\] are given more than once"),
    (98, [0, 96], r"landmarks \[96\] are on no curve"),
    (68, [0, 9], "no carrier on brow_left, brow_right")])
def test_carriers_reject(scheme, points, message):
    with pytest.raises(ValueError, match=message):
        lf.carriers(scheme, points)


@pytest.mark.parametrize("curves, points, message", [
    ({"a": [0, 1], "b": [1, 2]}, None, r"points \[1\] are on two curves"),
    ({"a": [0], "b": []}, None, r"'b': \[\]}: wanted one point"), ({}, 0, "curves {}: wanted one point"),
    ({"a": [0, 1]}, 4, r"points \[2, 3\] are on no curve; give them as extra"),
    ({"a": [0, 5]}, 2, r"points \[5\] are outside 0 to 1; points \[1\] are on no curve")])
def test_layout_rejects(curves, points, message):
    with pytest.raises(ValueError, match=message):
        lf.Layout(curves, points)


@pytest.mark.parametrize("scheme", lf.ANNOTATIONS)
def test_layout_gathers_and_scatters(scheme):
    mean, momenta, table = face(scheme)
    layout = lf.Layout(table)
    padded = layout.gather(momenta)
    assert torch.equal(layout.scatter(padded), momenta) and not list(layout.state_dict())
    for number, ids in enumerate(table.values()):
        assert torch.equal(padded[:, number, :len(ids)], momenta[:, ids])
        assert (padded[:, number, len(ids):] == momenta[:, ids[-1:]]).all()
    scale = lf.curve_scale(mean, table)
    boxes = torch.stack([(mean[ids].amax(0) - mean[ids].amin(0)).mean() for ids in table.values()])
    alone = torch.tensor([len(ids) == 1 for ids in table.values()])
    same(scale[~alone], boxes[~alone])
    same(scale[alone], boxes[~alone].mean().expand(int(alone.sum())))
    assert lf.curve_scale(mean[:1], {"a": [0]}).tolist() == [1]


# ---- Eq. (6), (7) --------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 2, 5])
def test_flow_is_equation_7(steps):
    points, momenta = curve(5, (2, 3))
    extra, sigma = curve(4, (2, 3), seed=1)[0], torch.tensor([20.0, 30.0, 40.0], dtype=torch.float64)
    paths, carried = lf.flow(points, momenta, sigma, steps, extra)
    assert paths.shape == (2, 3, steps + 1, 5, 2) and carried.shape == (2, 3, steps + 1, 4, 2)
    for b, c in itertools.product(range(2), range(3)):
        slow = slow_flow(points[b, c], momenta[b, c], sigma[c].item(), steps, extra[b, c])
        same(paths[b, c], slow[:, :5])
        same(carried[b, c], slow[:, 5:])
    same(lf.flow(points, momenta, sigma, steps), paths)  # the extras move no carrier


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_momentum_gives_the_input_back(dtype):
    points = curve(9, (4,), dtype=dtype)[0]
    path, carried = lf.flow(points, torch.zeros_like(points), 7.3, 5, points + 1)
    assert path.dtype == dtype and torch.equal(path, points[:, None].expand_as(path))
    assert torch.equal(carried, (points + 1)[:, None].expand_as(carried))


def test_one_point_moves_by_its_momentum_and_a_wide_kernel_adds_all():
    points, momenta = curve(1, (6,))
    for steps, sigma in itertools.product((1, 2, 7), (0.1, 1e3)):
        same(lf.flow(points, momenta, sigma, steps)[:, -1], points + momenta, 1e-12)
    points, momenta = curve()
    off = [(lf.flow(points, momenta, s)[-1] - points - momenta.sum(0)).abs().max() for s in (1e4, 1e5)]
    assert off[0] < 1 and abs(off[0] / off[1] - 100) < 1  # as sigma^-2


def test_euler_converges_with_first_order_to_the_ode():
    points, momenta = curve(12)
    exact = ode(points, momenta, SIGMA)
    same(exact, ode(points, momenta, SIGMA, 128), 1e-9)
    end = lambda steps: lf.flow(points, momenta, SIGMA, steps)[-1]
    error = [(end(steps) - exact).norm().item() for steps in (32, 64, 1024)]
    assert abs(error[0] / error[1] - 2) < 0.1 and abs(error[1] / error[2] - 16) < 0.5 and error[2] < 0.05


def test_the_flow_of_minus_momenta_returns_to_the_start():
    points, momenta = curve(12)
    same(ode(ode(points, momenta, SIGMA), -momenta, SIGMA), points, 1e-9)
    error = []
    for steps in (8, 64, 512):
        end = lf.flow(points, momenta, SIGMA, steps)[-1]
        error.append((lf.flow(end, -momenta, SIGMA, steps)[-1] - points).norm().item())
    assert abs(error[1] / error[2] - 8) < 0.8 and error[2] < 0.05 * (end - points).norm()
    sets = torch.stack([momenta, -2 * momenta, 0.5 * momenta]).repeat_interleave(400, 0)  # one set a step
    end = lf.flow(points, sets, SIGMA, 1200)[-1]
    same(lf.flow(end, -sets.flip(0), SIGMA, 1200)[-1], points, 0.2)
    assert (end - points).norm() > 4


def test_momenta_per_step():
    points, momenta = curve(6, (2, 3))
    constant = lf.flow(points, momenta, SIGMA, 4)
    same_sets = momenta[..., None, :, :].expand(-1, -1, 4, -1, -1)
    assert torch.equal(lf.flow(points, same_sets, SIGMA, 4), constant)
    sets = torch.stack([momenta, -momenta, 2 * momenta], -3)                  # (2, 3, steps, 6, 2)
    x = points
    for step in range(3):
        x = lf.flow(x, sets[..., step, :, :] / 3, SIGMA, 1)[..., -1, :, :]
    same(lf.flow(points, sets, SIGMA, 3)[..., -1, :, :], x)
    half = lf.flow(points, momenta / 2, SIGMA, 2)[..., -1, :, :]  # four steps are two steps twice
    same(lf.flow(half, momenta / 2, SIGMA, 2)[..., -1, :, :], constant[..., -1, :, :])


def test_flow_is_equivariant():
    points, momenta = curve(8)
    end = lf.flow(points, momenta, SIGMA, 3)[-1]
    turn = 1.7 * torch.tensor([[math.cos(0.6), -math.sin(0.6)], [math.sin(0.6), math.cos(0.6)]]).double()
    moved = lf.flow(points @ turn.T + 40, momenta @ turn.T, 1.7 * SIGMA, 3)[-1]
    same(moved, end @ turn.T + 40, 1e-5)  # the matrix was made in float32
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    same(lf.flow(points[order], momenta[order], SIGMA, 3)[-1], end[order])


def test_an_extra_point_on_a_carrier_follows_it():
    points, momenta = curve(8, (2,))
    path, carried = lf.flow(points, momenta, SIGMA, 6, points[:, [3, 0, 3]])
    assert torch.equal(carried, path[..., [3, 0, 3], :])


def test_leading_dimensions_broadcast_and_padding_is_silent():
    points, momenta = curve(6)
    many, sigma = curve(6, (5, 1))[1], torch.tensor([20.0, 30.0])
    path, carried = lf.flow(points[None, None], many, sigma, 2, points[None, :3] + 1)
    assert path.shape == (5, 2, 3, 6, 2) and carried.shape == (5, 2, 3, 3, 2)
    same(path[4, 1], lf.flow(points, many[4, 0], 30.0))
    more = torch.cat([points, points[-1:], points[:1] + 5])
    padded = lf.flow(more, torch.cat([momenta, torch.zeros(2, 2)]), SIGMA)
    same(padded[:, :6], lf.flow(points, momenta, SIGMA), 1e-12)


def test_shapes_on_the_meta_device():
    mean, momenta, table = (value.to("meta") if torch.is_tensor(value) else value for value in face(68))
    sigma, d = torch.ones(12, device="meta"), torch.ones(3, device="meta")
    pred = lf.deform(mean[None], momenta, lf.Layout(table).to("meta"), sigma)[:, -1]
    assert pred.shape == (3, 68, 2) and lf.lddmm_loss(pred, momenta, table, sigma, d).shape == ()


def test_half_precision_and_autocast_are_left_out():
    points, momenta = curve(8, dtype=torch.float32)
    path, at, y = lf.flow(points, momenta, SIGMA), points + 4, points + momenta
    D, loss = lf.jacobian(points, momenta, SIGMA, 2, at), lf.curve_discrepancy(points, y, SIGMA)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lf.flow(points, momenta, SIGMA), path)
        assert torch.equal(lf.jacobian(points, momenta, SIGMA, 2, at), D)
        assert torch.equal(lf.curve_discrepancy(points, y, SIGMA), loss)
    half = lf.flow(points, momenta.bfloat16(), SIGMA)
    assert half.dtype == torch.float32
    assert torch.equal(half, lf.flow(points, momenta.bfloat16().float(), SIGMA))


def test_gradients():
    points, momenta, extra = (value.requires_grad_() for value in (*curve(4, (2,)), curve(3, (2,), 1)[0]))
    sigma = torch.tensor([20.0, 30.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: lf.flow(*args[:3], 2, args[3]),
                                    (points, momenta, sigma, extra))
    assert torch.autograd.gradcheck(lambda *args: lf.jacobian(*args, 2, extra), (points, momenta, sigma))
    sets = momenta.detach().unsqueeze(1).repeat(1, 3, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: lf.flow(points, a, sigma, 3), (sets,))
    for squared in (False, True):
        assert torch.autograd.gradcheck(lambda a, b, s: lf.curve_discrepancy(a, b, s, squared),
                                        (points, points.detach() + momenta, sigma))


@pytest.mark.parametrize("change, message", [
    (dict(steps=0), "steps is 0, wanted a whole number of at least 1"), (dict(steps=2.0), "steps is 2.0"),
    (dict(sigma=0.0), "sigma is 0, wanted more than 0"),
    (dict(sigma=torch.tensor([3.0, -1.0])), "sigma is -1"),
    (dict(sigma=math.nan), "sigma is nan"),
    (dict(points=torch.zeros(4, 3)), r"found points \(4, 3\), .*; wanted points \(..., n, 2\)"),
    (dict(points=torch.zeros(2), momenta=torch.zeros(2)), r"found points \(2,\), momenta \(2,\)"),
    (dict(momenta=torch.zeros(5, 2)), r"points \(4, 2\), momenta \(5, 2\), .* momenta \(..., n, 2\) or"),
    (dict(momenta=torch.zeros(3, 4, 2)), r"one dimension more .*, one set per step \(..., 2, n, 2"),
    (dict(momenta=torch.zeros(1, 1, 4, 2)), r"momenta \(1, 1, 4, 2\)"),
    (dict(extra=torch.zeros(2)), r"extra \(2,\); wanted .* extra \(..., m, 2\)"),
    (dict(sigma=torch.ones(3), extra=torch.zeros(2, 1, 2)), r"sigma \(3,\), extra \(2, 1, 2\)"),
    (dict(points=torch.zeros(3, 4, 2), momenta=torch.zeros(5, 4, 2)), r"points \(3, 4, 2\), momenta \(5, ")])
def test_flow_rejects(change, message):
    given = dict(points=torch.zeros(4, 2), momenta=torch.zeros(4, 2), sigma=1.0, steps=2) | change
    with pytest.raises(ValueError, match=message):
        lf.flow(**given)


# ---- Whole faces ---------------------------------------------------------------------------------

@pytest.mark.parametrize("scheme", [29, 68, 98, 194])
def test_deform_flows_each_curve_by_itself(scheme):
    mean, momenta, table = face(scheme)
    sigma = lf.curve_scale(mean, table)
    path = lf.deform(mean[None], momenta, table, sigma, 3)
    assert path.shape == (3, 4, len(mean), 2)
    for number, ids in enumerate(table.values()):
        same(path[..., ids, :], lf.flow(mean[None, ids], momenta[:, ids], sigma[number].item(), 3))
    changed, ids = momenta.clone(), table["brow_left"]
    changed[1, ids] += 3
    moved = (lf.deform(mean[None], changed, table, sigma, 3) != path).any(-1).any(1)  # (3, N)
    assert set(moved.nonzero()[:, 1].tolist()) == set(ids) and moved.any(1).tolist() == [False, True, False]
    assert torch.equal(lf.deform(mean[None], momenta, lf.Layout(table), sigma, 3), path)
    sets = torch.stack([momenta, 2 * momenta], 1)                             # (3, steps, N, 2)
    stepped = lf.deform(mean[None], sets, table, sigma)
    for number, ids in enumerate(table.values()):
        same(stepped[..., ids, :], lf.flow(mean[None, ids], sets[..., ids, :], sigma[number].item()))


@pytest.mark.parametrize("steps", [2, 4])
def test_deform_carries_extra_points(steps):
    mean, momenta, table = face(29)
    sigma = lf.curve_scale(mean, table)
    extra = {"eye_right": mean[[9, 14]] + 1, "chin": mean[[28, 28, 28]], "brow_left": mean[None, :0]}
    path, carried = lf.deform(mean[None], momenta, table, sigma, steps, extra)
    same(path, lf.deform(mean[None], momenta, table, sigma, steps), 1e-12)
    assert list(carried) == list(extra) and carried["brow_left"].shape == (3, steps + 1, 0, 2)
    for name in ("eye_right", "chin"):
        number, ids = list(table).index(name), table[name]
        same(carried[name], lf.flow(mean[None, ids], momenta[:, ids], sigma[number].item(), steps,
                                       extra[name][None])[1])
    same(carried["chin"][:, -1], extra["chin"] + momenta[:, [28]])  # a curve of one point: a translation
    assert lf.deform(mean[None], momenta, table, sigma, steps, {})[1] == {}


def test_sparse_to_dense_moves_the_whole_face():
    mean, _, table = face(98)
    chosen = lf.carriers(98, 50)
    dense = torch.cat([mean, mean[[60, 68]] + 5])                             # (98, 2) with pupils
    extra = {name: dense[ids] for name, ids in chosen.extras.items()}
    shift = torch.tensor([3.0, -2.0], dtype=torch.float64)
    alpha = torch.zeros(len(chosen.ids), 2, dtype=torch.float64)
    for ids in chosen.curves.values():
        alpha[ids[0]] = shift  # with a very wide kernel one momentum moves all
    moved, carried = lf.deform(dense[chosen.ids], alpha, chosen.curves, 1e7, 2, extra)
    ends = {name: path[-1] for name, path in carried.items()}
    same(dense_of(chosen, moved[-1], ends), dense + shift, 1e-6)


def test_deform_rejects():
    mean, momenta, table = face(68)
    with pytest.raises(ValueError, match=r"points \[68, 69\] are on no curve; give them as extra"):
        lf.deform(torch.zeros(70, 2), torch.zeros(70, 2), table, SIGMA)
    with pytest.raises(ValueError, match="found 70 points, wanted the 68 that are on the curves"):
        lf.deform(torch.zeros(70, 2), torch.zeros(70, 2), lf.Layout(table), SIGMA)
    with pytest.raises(ValueError, match=r"points \[0\] are on two curves"):
        lf.deform(mean, mean, table | {"more": [0]}, SIGMA)
    with pytest.raises(ValueError, match="extra points of ear: no such curve; wanted one of contour_left, "):
        lf.deform(mean, mean, table, SIGMA, extra={"ear": mean[:1]})
    with pytest.raises(ValueError, match=r"found points \(12, 9, 2\), .* sigma \(3,\)"):
        lf.deform(mean, mean, table, torch.ones(3))
    with pytest.raises(ValueError, match=r"momenta have the shape \(67, 2\), wanted \(..., 68, 2\)"):
        lf.deform(mean, momenta[0, :67], table, SIGMA)
    with pytest.raises(ValueError, match="with one dimension more than the points, one set per step"):
        lf.deform(mean, momenta, table, SIGMA)
    with pytest.raises(ValueError, match="sigma is 0"):
        lf.deform(mean[None], momenta, table, torch.arange(12.0))


# ---- DetJ ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("sets", [False, True])
def test_jacobian_is_the_derivative_of_the_flow(sets):
    points, momenta = curve(6, (2,))
    at, sigma = curve(5, (2,), 1)[0], torch.tensor([25.0, 40.0], dtype=torch.float64)
    momenta = torch.stack([momenta, -momenta, 3 * momenta], 1) if sets else momenta
    end = lambda at: lf.flow(points, momenta, sigma, 3, at)[1][:, -1]
    D = lf.jacobian(points, momenta, sigma, 3, at)
    full = torch.autograd.functional.jacobian(end, at)                        # (2, 5, 2, 2, 5, 2)
    for b, m in itertools.product(range(2), range(5)):
        same(D[b, m], full[b, m, :, b, m], 1e-12)
    for axis in range(2):
        h = 1e-4 * torch.eye(2, dtype=torch.float64)[axis]
        same(D[..., axis], (end(at + h) - end(at - h)) / 2e-4, 1e-7)
    same(lf.jacobian(points, 0 * momenta, sigma, 3, at), torch.eye(2).double().expand(2, 5, 2, 2))


def test_two_steps_can_fold_where_the_flow_cannot():
    points = torch.tensor([[0.0, 0.0], [20.0, 0.0], [40.0, 0.0]], dtype=torch.float64)
    grid = torch.cartesian_prod(*[torch.linspace(-30, 70, 41, dtype=torch.float64)] * 2)
    momenta = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 1.0]], dtype=torch.float64)
    lowest = lambda scale, steps: torch.linalg.det(
        lf.jacobian(points, scale * momenta, 20.0, steps, grid)).min().item()
    assert lowest(60, 2) < 0 < lowest(60, 256)
    assert lowest(1.1658 * 2 * 20 / 3, 2) > 0  # the bound of `flow`: sum |alpha| < 1.1658 sigma steps


# ---- Eq. (1) to (5), (8) -------------------------------------------------------------------------

def slow_inner(a, b, sigma):
    """Eq. (1) for two curves, lists of (x, y)."""
    total = 0
    for i, j in itertools.product(range(len(a) - 1), range(len(b) - 1)):
        c_a, c_b = (a[i] + a[i + 1]) / 2, (b[j] + b[j + 1]) / 2
        total += slow_kernel(c_a, c_b, sigma) * float((a[i + 1] - a[i]) @ (b[j + 1] - b[j]))
    return total


def slow_square(a, b, sigma):
    """The square of Eq. (4)."""
    return slow_inner(a, a, sigma) - 2 * slow_inner(a, b, sigma) + slow_inner(b, b, sigma)


def slow_loss(pred, target, table, sigma, d, beta, squared):
    """Eq. (8), or the published code's form."""
    total = 0
    for z, y, length in zip(pred.numpy(), target.numpy(), d.tolist()):
        face = np.linalg.norm(z - y, axis=1).mean() if squared else 0
        for ids, width in zip(table.values(), sigma.tolist()):
            square = max(slow_square(z[ids], y[ids], width / 2), 0)
            if squared:
                face += beta * square / len(z)
            else:
                face += beta * math.sqrt(square) + sum(np.linalg.norm(z[i] - y[i]) for i in ids) / len(ids)
        total += face / length
    return total / len(pred)


def test_discrepancies_are_equations_1_4_and_5():
    a, b = curve(6, (2, 3))
    b = a + b
    sigma = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    square, norm = (lf.curve_discrepancy(a, b, sigma, squared) for squared in (True, False))
    landmarks = lf.landmark_discrepancy(a, b)
    assert square.shape == norm.shape == landmarks.shape == (2, 3)
    for i, c in itertools.product(range(2), range(3)):
        slow = slow_square(a[i, c].numpy(), b[i, c].numpy(), sigma[c].item())
        same(square[i, c], slow)
        eps = 1e-4 * sigma[c].item()
        assert math.sqrt(slow) - eps <= norm[i, c] <= math.sqrt(slow)
        same(lf.inner(a[i, c], b[i, c], 15.0), slow_inner(a[i, c].numpy(), b[i, c].numpy(), 15.0))
        same(landmarks[i, c], sum(math.dist(p, q) for p, q in zip(a[i, c].tolist(), b[i, c].tolist())) / 6)


def test_curve_discrepancy_has_the_properties_of_a_distance_of_curves():
    z, y = (curve(9, seed=seed)[0] for seed in (0, 1))
    D = lambda a, b, sigma=SIGMA, squared=False: lf.curve_discrepancy(a, b, sigma, squared).item()
    value, square, power = D(z, y), D(z, y, squared=True), lf.inner(z, z, SIGMA).item()
    assert D(y, z) == pytest.approx(value, abs=1e-9) and value > 1
    assert D(z, z) == 0 and D(z.float(), z.float()) == 0
    assert D(z.flip(0), y.flip(0)) == pytest.approx(value, abs=1e-9)
    assert D(z, z.flip(0), squared=True) == pytest.approx(4 * power)
    shift = torch.tensor([100.0, -40.0], dtype=torch.float64)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    assert D(z @ turn.T + shift, y @ turn.T + shift) == pytest.approx(value)
    assert D(3 * z, 3 * y, 3 * SIGMA) == pytest.approx(3 * value)
    fine = lambda x: torch.nn.functional.interpolate(x.T[None], 65, mode="linear", align_corners=True)[0].T
    assert abs(D(fine(z), fine(y), squared=True) - square) < 0.05 * power
    ends = (z[-1] - z[0]) - (y[-1] - y[0])
    assert D(z, y, 1e7, True) == pytest.approx((ends @ ends).item(), rel=1e-6)
    apart = sum((x.diff(dim=0) ** 2).sum().item() for x in (z, y))
    assert D(z, y, 1e-3, True) == pytest.approx(apart)
    a, b = z[:2], y[:2]
    t, u = a[1] - a[0], b[1] - b[0]
    k = slow_kernel(a.mean(0).tolist(), b.mean(0).tolist(), SIGMA)
    assert D(a, b, squared=True) == pytest.approx((t @ t + u @ u - 2 * k * t @ u).item())
    assert D(z[:1], y[:1]) == 0 and D(z[:1], y[:1], squared=True) == 0
    repeated = lambda x: torch.cat([x, x[-1:].expand(4, 2)])
    assert D(repeated(z), repeated(y)) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_prediction_and_target_agree(dtype):
    mean, _, table = face(29, dtype=dtype)
    pred, sigma = mean[None].clone().requires_grad_(), lf.curve_scale(mean, table)
    d = torch.full((1,), 50.0)
    for squared in (False, True):
        loss = lf.lddmm_loss(pred, mean[None], table, sigma, d, squared=squared)
        gradient, = torch.autograd.grad(loss, pred)
        assert loss == 0 and gradient.isfinite().all() and gradient.abs().max() < 1e-2
    near = (mean[None] + 1e-3).requires_grad_()
    gradient, = torch.autograd.grad(lf.lddmm_loss(near, mean[None], table, sigma, d), near)
    assert gradient.isfinite().all() and gradient.abs().max() < 0.1


@pytest.mark.parametrize("scheme, points", [(29, 100), (68, 100), (68, 50)])
@pytest.mark.parametrize("squared, beta", [(False, 0.1), (True, 0.1), (False, 0.0), (False, 1.0)])
def test_loss_is_equation_8(scheme, points, squared, beta):
    mean, noise, _ = face(scheme)
    chosen = lf.carriers(scheme, points)
    ids, table = chosen.ids, chosen.curves  # 68 at 50 %: a corner twice, as two carriers
    target, pred = mean[ids].expand(3, -1, 2), mean[ids] + noise[:, :len(ids)]
    d = torch.tensor([40.0, 50.0, 60.0])
    sigma = lf.curve_scale(mean[ids], table)
    loss = lf.lddmm_loss(pred, target, table, sigma, d.double(), beta, squared)
    assert loss.shape == () and loss.dtype == torch.float64
    eps = 0 if squared else beta * 1e-4 * sigma.sum().item() / 80
    slow = slow_loss(pred, target, table, sigma, d, beta, squared)
    assert slow - 2 * eps - 1e-6 <= loss.item() <= slow + 1e-6
    if not beta:
        parts = [lf.landmark_discrepancy(pred[:, own], target[:, own]) / d for own in table.values()]
        same(loss, torch.stack(parts).sum(0).mean(), 1e-6)


def test_loss_does_not_depend_on_the_frame():
    mean, noise, table = face(68)
    sigma, d = lf.curve_scale(mean, table), torch.full((3,), 50.0).double()
    loss = lambda c, squared: lf.lddmm_loss(c * (mean + noise), c * mean.expand(3, -1, 2), table,
                                               c * sigma, c * d, squared=squared).item()
    assert loss(2, False) == pytest.approx(loss(1, False)) and loss(2, True) > 1.02 * loss(1, True)


def test_loss_rejects():
    mean, noise, table = face(29)
    good = dict(pred=noise, target=noise, curves=table, sigma=torch.ones(len(table)), d=torch.ones(3))
    for change, message in [(dict(pred=noise[:2]), r"shapes \(2, 29, 2\), \(3, 29, 2\) and \(3,\)"),
                            (dict(d=torch.ones(3, 1)), r"wanted \(B, N, 2\), \(B, N, 2\) and \(B,\)"),
                            (dict(sigma=torch.ones(4)), r"sigma has the shape \(4,\), wanted "),
                            (dict(sigma=torch.zeros(len(table))), "sigma is 0"),
                            (dict(curves={"a": [0]}), "are on no curve")]:
        with pytest.raises(ValueError, match=message):
            lf.lddmm_loss(**good | change)
    with pytest.raises(ValueError, match=r"curves have the shapes \(3, 2\) and \(4, 2\)"):
        lf.curve_discrepancy(torch.zeros(3, 2), torch.zeros(4, 2), 1.0)


def test_gathered_curves_give_what_each_curve_gives_alone():
    mean, noise, table = face(98)
    layout, sigma, pred = lf.Layout(table), lf.curve_scale(mean, table), mean + noise
    padded = lf.curve_discrepancy(layout.gather(pred), layout.gather(mean), sigma)
    for number, ids in enumerate(table.values()):
        same(padded[:, number], lf.curve_discrepancy(pred[:, ids], mean[ids], sigma[number].item()), 1e-9)


def test_momenta_can_be_learned():
    """Gradient descent on the momenta alone brings one face onto another."""
    mean, _, table = face(68, dtype=torch.float32)
    layout, sigma = lf.Layout(table), lf.curve_scale(mean, table)
    target, momenta = (mean * 1.1 - 5)[None], torch.zeros(1, 68, 2, requires_grad=True)
    optimizer, losses = torch.optim.Adam([momenta], 0.3), []
    for _ in range(150):
        pred = lf.deform(mean[None], momenta, layout, sigma)[:, -1]
        losses.append(lf.lddmm_loss(pred, target, layout, sigma, torch.full((1,), 50.0)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.15 * losses[0]


# ---- Backbones ----------------------------------------------------------------------------------

def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def multiply_adds(module, *inputs):
    """Of all convolutions and linear layers that `module(*inputs)` runs, biases not counted."""
    total = []
    sums = lambda m, args, out: total.append(out.numel() * m.weight[0].numel())
    hooks = [m.register_forward_hook(sums) for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    module.eval()(*inputs)
    for hook in hooks:
        hook.remove()
    return sum(total)


@functools.cache
def on_meta(name):
    """A network without numbers, of 68 points at 256 px, for sizes and names."""
    with torch.device("meta"):
        return lf.HRNetHeatmaps(68) if name == "hrnet_heatmaps" else lf.BACKBONES[name](68)


def faces(batch=2, points=7, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = size * (0.3 + 0.4 * torch.rand(points, 2, generator=generator))
    return mean, mean + size / 40 * torch.randn(batch, points, 2, generator=generator)


@pytest.fixture(scope="module")
def connection():
    torch.manual_seed(0)
    return lf.DANConnection()


@pytest.mark.parametrize("name", ["conv", "conv_bn", "BasicBlock", "Bottleneck", "Fuse", "HRModule"])
def test_blocks_are_those_of_sdfl(name):
    assert inspect.getsource(getattr(lf, name)) == inspect.getsource(getattr(sdfl, name))


# Parameters by landmarks, and multiply-adds (10^9) of 68 at 256 px: counted on the published modules.
SIZES = [
    ("hrnet_heatmaps", {68: 9_654_398}, 4.660),
    ("hrnet_w18", {68: 19_528_668, 96: 19_643_412, 98: 19_651_608}, 5.592),
    ("hourglass", {68: 26_124_688}, 29.13)]


@pytest.mark.parametrize("name, parameters, billions", SIZES)
def test_published_sizes(name, parameters, billions):
    net = on_meta(name)
    head = (lambda n: 2049 * 2 * n) if name in lf.BACKBONES else lambda n: 0  # features -> momenta
    for points, number in parameters.items():
        assert count(net) + head(points) == number
    total = multiply_adds(net, torch.empty(1, 3, 256, 256, device="meta")) + head(68)
    if name == "hourglass":  # published: the last heatmaps are computed; and the stacks alone
        total += 256 * 68 * 64 ** 2
        assert count(net) - count(net.final_layer) == 24_791_304
    assert abs(total / 1e9 - billions) <= 0.0051


def test_published_size_of_dan():
    with torch.device("meta"):
        stages = nn.ModuleList([lf.DANStage(3), lf.DANStage(5)])
        connection, heads = lf.DANConnection(), [nn.Linear(2048, 136), nn.Linear(2048, 136)]
        assert count(stages, connection, *heads) == 161_988_880
        features = stages[0](torch.empty(1, 3, 256, 256))
        total = [multiply_adds(stage, torch.empty(1, c, 256, 256)) for stage, c in zip(stages, (3, 5))]
        total += [multiply_adds(connection.fc, features)] + [multiply_adds(head, features) for head in heads]
    assert features.shape == (1, 2048) and abs(sum(total) / 1e9 - 29.44) <= 0.0051


def test_hrnet_trunk_is_that_of_sdfl_by_name_shape_and_value():
    torch.manual_seed(0)
    ours, other = lf.HRNet(), sdfl.HRNet()
    shapes = lambda net: {name: value.shape for name, value in net.state_dict().items()}
    assert shapes(ours) == shapes(other)
    ours.load_state_dict(other.state_dict())
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        xs = ours.eval()(image)
        assert [x.shape[1:] for x in xs] == [(18, 16, 24), (36, 8, 12), (72, 4, 6), (144, 2, 3)]
        pooled = torch.cat([F.interpolate(x, xs[-1].shape[-2:], mode="bilinear") for x in xs], 1)
        assert torch.equal(pooled, other.eval()(image))


def test_names_of_the_heads_are_those_of_hrnets_checkpoints():
    features, heatmaps = on_meta("hrnet_w18"), on_meta("hrnet_heatmaps")
    trunk = set(features.state_dict()) & set(heatmaps.state_dict())
    names = {name: tuple(value.shape) for name, value in features.state_dict().items() if name not in trunk}
    assert {name.split(".")[0] for name in trunk} == {
        "conv1", "bn1", "conv2", "bn2", "layer1", *(f"transition{n}" for n in (1, 2, 3)), "stage2", "stage3",
        "stage4"}
    assert {name.split(".")[0] for name in names} == {"incre_modules", "downsamp_modules", "final_layer"}
    assert names["incre_modules.3.0.conv3.weight"] == (1024, 256, 1, 1)
    assert names["incre_modules.0.0.downsample.0.weight"] == (128, 18, 1, 1)
    assert names["downsamp_modules.2.0.weight"] == (1024, 512, 3, 3) and "downsamp_modules.0.0.bias" in names
    assert names["final_layer.0.weight"] == (2048, 1024, 1, 1) and names["final_layer.1.weight"] == (2048,)
    assert {name for name in heatmaps.state_dict() if name not in trunk and "num" not in name} == {
        "head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias", "head.1.running_mean",
        "head.1.running_var", "head.3.weight", "head.3.bias"}


def test_hrnet_heads_spelt_out():
    torch.manual_seed(0)
    features, heatmaps = lf.HRNetFeatures().eval(), lf.HRNetHeatmaps(5).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        b = lf.HRNet.forward(features, image)
        y = features.incre_modules[0](b[0])
        for i in range(3):
            y = features.incre_modules[i + 1](b[i + 1]) + features.downsamp_modules[i](y)
        assert y.shape == (2, 1024, 2, 2)
        assert torch.allclose(features(image), F.adaptive_avg_pool2d(features.final_layer(y), 1).flatten(1))
        b = lf.HRNet.forward(heatmaps, image)
        stacked = torch.cat([F.interpolate(x, (16, 16), mode="bilinear") for x in b], 1)
        assert stacked.shape[1] == 270 and torch.equal(heatmaps(image), heatmaps.head(stacked))
        assert heatmaps(image).shape == (2, 5, 16, 16)


NETS = {
    "hrnet_w18": lambda: lf.HRNetFeatures(), "hrnet_heatmaps": lambda: lf.HRNetHeatmaps(4),
    "hourglass": lambda: lf.Hourglass(4), "dan": lambda: lf.DANStage(3, 64),
}


def test_convolutions_start_as_he_et_al_say():
    torch.manual_seed(0)
    for name, make in NETS.items():
        for key, m in make().named_modules():
            if isinstance(m, nn.Conv2d) and (name != "hourglass" or key.startswith("final_layer")):
                fan_out = m.weight[:, 0].numel()
                assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.2), (name, key)
            elif isinstance(m, nn.BatchNorm2d):
                assert (m.weight == 1).all() and (m.bias == 0).all()
            elif isinstance(m, nn.Linear):
                assert m.weight.abs().max() <= m.in_features**-0.5


@pytest.mark.parametrize("name", ["hourglass", "mobilenetv2"])
def test_no_batch_norm_starts_below_its_eps(name):
    torch.manual_seed(0)
    net, variances = lf.BACKBONES[name](4, 64).train(), []
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(lambda m, x, y: variances.append(x[0].var((0, 2, 3)).median().item()))
    with torch.no_grad():
        net(torch.randn(4, 3, 64, 64))
    assert len(variances) > 40 and min(variances) > 1e-4


def test_other_sizes_of_image():
    image = lambda height, width: torch.empty(2, 3, height, width, device="meta")
    with torch.device("meta"):
        assert on_meta("hrnet_w18").eval()(image(32, 160)).shape == (2, 2048)
        assert on_meta("hourglass").eval()(image(64, 192)).shape == (2, 2048)
        assert lf.DANStage(5, 96).eval()(torch.empty(2, 5, 96, 96)).shape == (2, 2048)


@pytest.mark.parametrize("shape", [(1, 3, 64, 96), (1, 1, 64, 64), (3, 64, 64), (1, 3, 128, 128)])
def test_images_of_another_size_are_named(shape):
    message = f"{shape}: expected (B, 3, 64, 64)"
    with pytest.raises(ValueError, match=re.escape(message)):
        network(29)(torch.empty(shape))


# ---- DAN's connection ----------------------------------------------------------------------------

def test_landmark_image_against_loops():
    points = torch.tensor([[[10.2, 7.7], [12.0, 9.0], [0.3, 31.4], [-2.2, 4.0], [40.0, 5.0]],
                           [[31.0, 31.0], [31.0, 31.0], [15.5, 16.5], [1e9, 0.0], [-1e30, 3.0]]])
    image = lf.landmark_image(points, 32)
    expected = torch.zeros(2, 1, 32, 32)
    for b in range(2):
        for px, py in points[b].tolist():
            for y in range(32):
                for x in range(32):
                    if abs(x - round(px)) <= 3 and abs(y - round(py)) <= 3:
                        value = 1 / (1 + np.hypot(x - px, y - py))
                        expected[b, 0, y, x] = max(expected[b, 0, y, x], value)
    assert torch.allclose(image, expected, atol=1e-6)
    assert image[0, 0, 9, 12] == 1 and image[1, 0, 31, 31] == 1 and image[0, 0, 4, 1] > 0


def test_landmark_image_has_a_finite_and_right_gradient():
    points = torch.tensor([[[8.2, 9.3], [9.9, 10.1], [4.0, 4.0]]], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (lf.landmark_image(points, 16) * weight).sum().backward()
    assert points.grad.isfinite().all()  # also of the landmark that is exactly on a pixel
    off = points.detach()[:, :2].requires_grad_()
    assert torch.autograd.gradcheck(lambda p: lf.landmark_image(p, 16), off)


def test_connection_moves_the_image_so_that_landmarks_lie_on_the_mean(connection):
    mean, _ = faces()
    m = torch.tensor([[[0.9, 0.2, -3.0], [-0.2, 0.9, 6.0]], [[1.2, -0.3, 4.0], [0.3, 1.2, -17.0]]])
    points = warp.apply_affine(m, mean)  # similarities of the mean face: the fit is exact
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = torch.stack([x, y, 0 * x + 1]).expand(2, 3, 64, 64)  # shows its own coordinates
    with torch.no_grad():
        out, theta, start = connection(image, points, torch.randn(2, 2048), mean)
    assert out.shape == (2, 5, 64, 64) and start.shape == points.shape
    assert torch.allclose(start, mean.expand(2, -1, -1), atol=1e-4)
    assert torch.allclose(warp.apply_affine(warp.invert(theta), start), points, atol=1e-4)
    seen = warp.sample(out[:, :3], warp.to_norm(start, (64, 64))[:, None])[:, :, 0]    # (2, 3, 7)
    inside = ((points > 2) & (points < 61) & (start > 1) & (start < 62)).all(-1)
    assert inside.sum() > 8 and torch.allclose(seen[:, :2].mT[inside], points[inside], atol=1e-3)
    for i in range(2):  # every pixel has bilinear weights of its own; cv2 rounds its to 1/32 px
        source = image[i].permute(1, 2, 0).numpy().copy()
        cv = cv2.warpAffine(source, theta[i].numpy().astype(float), (64, 64))
        difference = np.abs(cv.transpose(2, 0, 1) - out[i, :3].numpy())[:, out[i, 2].numpy() > 0.999]
        assert difference.max() < 0.05


@pytest.mark.parametrize("size", [64, 128, 256])
def test_connection_draws_the_landmarks_where_they_are(connection, size):
    mean = size * torch.tensor([[0.3, 0.35], [0.7, 0.35], [0.5, 0.7]])
    out, _, start = connection(torch.zeros(1, 3, size, size), mean[None] + 2.0, torch.randn(1, 2048), mean)
    drawn = out[0, 3]
    assert torch.allclose(start[0], mean, atol=1e-3)
    for x, y in mean.tolist():
        half = size // 10
        x0, y0 = round(x) - half, round(y) - half
        peak = drawn[y0:y0 + 2 * half + 1, x0:x0 + 2 * half + 1]
        py, px = divmod(peak.argmax().item(), 2 * half + 1)
        assert np.hypot(px + x0 - x, py + y0 - y) <= size / 64 and peak.max() > 0.4
    small = F.relu(connection.fc.bias.new_tensor(0) + out[0, 4])  # the features' image, enlarged: no negative
    assert torch.equal(small, out[0, 4]) and small.std() > 0


def test_connection_passes_gradients_and_keeps_float32_geometry(connection):
    mean, points = faces()
    points, features = points.requires_grad_(), torch.randn(2, 2048, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, theta, start = connection(torch.randn(2, 3, 64, 64), points, features, mean)
    assert out.dtype == theta.dtype == start.dtype == torch.float32
    out.square().sum().backward()
    for x in (points, features, connection.fc.weight):
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    exact = warp.fit_similarity(points.detach().double(), mean.double())
    assert torch.allclose(theta.double(), exact, atol=1e-5)


# ---- Network -------------------------------------------------------------------------------------

def drawn_args(*flags):
    return lf.parse_args(["--size", "64", "--limit", "24", "--device", "cpu", "--also", "", *flags])


@functools.cache
def drawn(*flags, split="test"):
    """Drawn faces of 64 px as crops without augmentation."""
    args = drawn_args(*flags)
    return lf.make_dataset(args, lf.read_faces(args, split), augmented=False)


@functools.cache
def mean_of(scheme):
    """Mean face of drawn faces in their own crops, (P, 2) px of a 256 px crop."""
    flags = "--limit", "200", "--points", str(scheme)
    return lf.mean_face(drawn_args(*flags), drawn(*flags, split="train"))


def network(scheme=68, points=100, still=True, backbone="mobilenetv2", seed=0, **options):
    """A network whose estimators give zeros, or (not `still`) for every image momenta drawn once."""
    torch.manual_seed(seed)
    net = lf.LDDMMFace(backbone, scheme, mean_of(scheme), points, size=64, **options).eval()
    for estimator in net.estimators:
        nn.init.zeros_(estimator.weight)
        nn.init.normal_(estimator.bias, std=0 if still else 3)
    return net


@torch.no_grad()
def answers(net, extra=None):
    return net(torch.randn(2, 3, 64, 64), extra)


@pytest.mark.parametrize("px", [64, 128, 256])
def test_the_frame_is_the_same_crop_at_256_px(px):
    points = torch.tensor([[-0.5, px - 0.5], [(px - 1) / 2, 0.0]])  # pixels are areas: edges go to edges
    framed = lf.to_frame(points, px)
    assert framed[0].tolist() == [-0.5, 255.5] and framed[1, 0] == 127.5
    same(lf.from_frame(framed, px), points)
    np.testing.assert_allclose(lf.from_frame(lf.to_frame(points.numpy(), px), px), points)


@pytest.mark.parametrize("name", ["hrnet_w18", "hourglass", "mobilenetv2", "dan"])
def test_gradients_batch_layout_and_bfloat16(name):
    torch.manual_seed(0)
    net, images = lf.LDDMMFace(name, 29, mean_of(29), size=64).train(), torch.randn(8, 3, 64, 64)
    for m in net.modules():  # running statistics of one batch; the hourglass has 8 values at its bottom
        if isinstance(m, nn.BatchNorm2d) and name != "hourglass":
            m.momentum = None
    points = lf.from_frame(net.mean + 5 * torch.randn(8, 29, 2), 64)
    lf.loss_of(net, net(images), points, drawn_args("--points", "29")).backward()
    for key, p in net.named_parameters():  # a bias before a batch norm has no effect: gradient 0
        assert not p.requires_grad or p.grad.isfinite().all() and (p.ndim == 1 or p.grad.any()), key
    frozen = [key for key, p in net.named_parameters() if not p.requires_grad]
    assert frozen == ([f"backbone.0.heads.1.{w}" for w in ("weight", "bias")] if name == "hourglass" else [])
    backbone, image = net.backbone[0].eval(), images[:3]
    with torch.no_grad():
        out = backbone(image)
        assert out.shape == (3, backbone.channels) and out.isfinite().all()
        assert out.std(0).norm() > 0.02 * out.norm()  # it tells images apart
        assert (backbone(image[1:2]) - out[1:2]).norm() < 5e-3 * out[1].norm()
        with torch.autocast("cpu", torch.bfloat16):
            low, answer = backbone(image).float(), net.eval()(image)
        assert (low - out).norm() < 0.5 * out.norm()  # random weights, 2 x 2 px at the end: rounding adds up
        assert answer.stages[-1].dtype == answer.momenta.dtype == torch.float32
        last = backbone.to(memory_format=torch.channels_last)
        assert (last(image.to(memory_format=torch.channels_last)) - out).norm() < 5e-3 * out.norm()


@pytest.mark.parametrize("scheme, points, options", [
    (68, 100, {}), (98, 50, {}), (194, 33, dict(per_step=True, steps=3)), (29, 100, dict(method="coord"))])
def test_no_momenta_give_the_mean_face_exactly(scheme, points, options):
    net = network(scheme, points, **options)
    answer = answers(net)
    assert torch.equal(answer.stages[-1], net.mean[net.carriers.ids].expand(2, -1, -1))
    assert torch.equal(answer.start, net.start) if net.method == "lddmm" else answer.momenta is None
    found, carried, _ = lf.predict_points(net, torch.randn(2, 3, 64, 64), lf.make_template(net))
    same(found, lf.from_frame(net.mean, 64).expand(2, -1, -1), 1e-4)
    assert torch.equal(carried, lf.from_frame(answer.stages[-1], 64))
    same(net.sigma, lf.curve_scale(net.mean[net.carriers.ids], net.layout))
    assert {"mean", "sigma"} < set(net.state_dict()) and "between" not in net.state_dict()


def test_the_flow_of_the_network_is_deform():
    net = network(98, 50, still=False, sigma_factor=0.5, steps=3)
    extra = {"eye_left": net.mean[[96, 60]] + 2, "nose_bridge": net.mean[:1]}
    answer, ids = answers(net, extra), net.carriers.ids
    momenta = net.estimators[0].bias.view(1, -1, 2)
    sigma = 0.5 * lf.curve_scale(mean_of(98)[ids], net.carriers.curves)
    path, carried = lf.deform(mean_of(98)[None, ids], momenta, net.carriers.curves, sigma, 3,
                              {name: own[None] for name, own in extra.items()})
    same(answer.stages[0], path[:, -1].expand(2, -1, -1), 1e-4)
    assert torch.equal(answer.momenta, momenta.expand(2, -1, -1)) and list(answer.extra) == list(extra)
    for name in extra:
        same(answer.extra[name], carried[name][:, -1].expand(2, -1, -1), 1e-4)
    stepped = network(98, 50, sigma_factor=0.5, steps=3, per_step=True)
    stepped.estimators[0].bias.data = net.estimators[0].bias.data.repeat(3)  # the same set in every step
    other = answers(stepped, extra)
    assert other.momenta.shape == (2, 3, len(ids), 2)
    same(other.stages[0], answer.stages[0], 1e-4)
    stepped.estimators[0].bias.data[:2 * len(ids)] = 0  # nothing in the first step
    assert (answers(stepped).stages[0] - answer.stages[0]).abs().max() > 0.5


def test_the_baseline_of_coordinates_has_no_flow():
    net = network(68, still=False, method="coord", steps=3, per_step=True)
    answer = answers(net, {"nose_bridge": net.mean[:3]})
    same(answer.stages[0], (net.mean + net.estimators[0].bias.view(68, 2)).expand(2, -1, -1), 1e-4)
    assert torch.equal(answer.extra["nose_bridge"][0], net.mean[:3])


def test_dan_from_end_to_end():
    net = network(68, 50, backbone="dan")
    extra = {name: net.mean[ids] for name, ids in net.carriers.extras.items()} | {"eye_left": net.mean[:2]}
    first, second = (estimator.bias.data for estimator in net.estimators)
    one = network(68, 50, still=False)
    path = answers(one, extra)  # the same momenta without a second stage
    for drawn in ((), (second,), (first,)):
        for bias in (first, second):
            bias.copy_(one.estimators[0].bias if any(bias is own for own in drawn) else torch.zeros(()))
        answer, moved = answers(net, extra), bool(drawn)
        start = path.stages[0] if any(own is first for own in drawn) else net.start
        same(answer.stages[0], start.expand(2, -1, -1), 1e-3)
        same(answer.stages[1], path.stages[0] if moved else net.start.expand(2, -1, -1), 2e-3)
        for name, own in extra.items():
            same(answer.extra[name], path.extra[name] if moved else own.expand(2, -1, -1), 2e-3)
    theta = warp.fit_similarity(path.stages[0][0], net.start[0])  # stage 2 starts about the mean face
    same(answer.start[0], warp.apply_affine(theta, path.stages[0][0]), 1e-3)


def test_a_network_for_heatmaps():
    net = lf.LDDMMFace("hrnet_w18", 68, mean_of(68), 50, method="heatmap", size=64).eval()
    answer = answers(net)
    assert answer.heatmaps.shape == (2, 50, 16, 16) and answer.stages == [] and answer.momenta is None
    found, carried, _ = lf.predict_points(net, torch.randn(2, 3, 64, 64), lf.make_template(net))
    assert found.shape == (2, 68, 2) and carried.shape == (2, 50, 2)


def test_networks_that_cannot_be_built_are_named():
    for change, message in [(dict(backbone="vgg"), "backbone 'vgg': expected one of hrnet_w18, hourglass, "),
                            (dict(method="mean"), r"method 'mean', mean face \(68, 2\): expected one of "),
                            (dict(mean=torch.zeros(67, 2)), r"mean face \(67, 2\): .*, and \(68, 2\)"),
                            (dict(points=33), "no table of 33 % of 68 points"),
                            (dict(backbone="dan", size=100), "size 100: expected a multiple of 32"),
                            (dict(size=0), "size 0: expected a multiple of 32"),
                            (dict(backbone="hourglass", size=96), "size 96: expected a multiple of 64")]:
        with pytest.raises(ValueError, match=message):
            lf.LDDMMFace(**dict(backbone="mobilenetv2", scheme=68, mean=mean_of(68)) | change)


# ---- Interpolation, templates --------------------------------------------------------------------

SPARSE = [(29, [0, 4, 1, 8, 9, 16, 17, 18, 20, 27, 22, 25, 26, 28]), (68, 50), (98, 50), (194, 50), (194, 33)]


def along_curves(chosen):
    """(curve, table, {carrier's place: position along the curve}): a mouth corner of the upper lip is one
    before the lower lip's first landmark, or one behind its last."""
    for name, places in chosen.curves.items():
        table = datasets.SCHEMES[chosen.scheme].curves[name]
        at = {}
        for order, place in enumerate(places):
            index = chosen.ids[place]
            beyond = -1 if order == 0 else len(table)
            at[place] = table.index(index) if index in table else beyond
        yield name, table, at


@pytest.mark.parametrize("scheme, points", [*itertools.product((29, 106, 194), [100]), *SPARSE])
def test_interpolation_weighs_the_carriers_of_the_same_curve(scheme, points):
    chosen = lf.carriers(scheme, points)
    weights = lf.interpolation(chosen)
    assert weights.shape == (scheme, len(chosen.ids)) and (weights >= 0).all()
    same(weights.sum(1), torch.ones(scheme), 1e-6)
    for index in set(chosen.ids):
        assert weights[index, chosen.place[index]] == 1
    for name, table, _ in along_curves(chosen):
        own = [index for index in chosen.extras.get(name, ())]
        other = [k for k in range(len(chosen.ids)) if k not in chosen.curves[name]]
        assert (weights[own][:, other] == 0).all()
        for pupil in set(own) - set(table):
            same(weights[pupil, chosen.curves[name]], torch.full_like(weights[pupil, chosen.curves[name]],
                                                                         1 / len(chosen.curves[name])), 1e-6)


@pytest.mark.parametrize("scheme, points", SPARSE)
def test_interpolation_is_exact_where_displacements_are_linear_along_a_curve(scheme, points):
    chosen = lf.carriers(scheme, points)
    weights = lf.interpolation(chosen).double()
    for name, table, at in along_curves(chosen):
        displacement = torch.zeros(len(chosen.ids), dtype=torch.float64)
        for place, position in at.items():
            displacement[place] = 3 + 7 * position
        for position, index in enumerate(table):
            if index in chosen.extras.get(name, ()):
                within = min(max(position, min(at.values())), max(at.values()))  # held beyond the outermost
                assert float(weights[index] @ displacement) == pytest.approx(3 + 7 * within), (name, index)


def test_a_pupil_is_interpolated_as_the_mean_of_its_eye():
    chosen = lf.carriers(98, 50)
    weights = lf.interpolation(chosen)
    assert {chosen.ids[k] for k in weights[96].nonzero()[:, 0].tolist()} == {60, 62, 64, 66}
    same(weights[97, chosen.curves["eye_right"]], torch.full((4,), 0.25))


@pytest.mark.parametrize("here, there", [
    (68, 194), (68, 98), (98, 68), (68, 29), (68, 106), (29, 68), (194, 106), (98, 19)])
def test_another_annotation_is_carried_by_the_curves_of_the_network(here, there):
    net, other = network(here), datasets.SCHEMES[there]
    template, count = lf.make_template(net, mean_of(there)), len(net.carriers.ids)
    assert sorted(template.place) == list(range(count, count + there))  # every landmark once, no carrier
    owner = [name for name, own in template.points.items() for _ in own]
    owner = [owner[place - count] for place in template.place]
    assert set(owner) <= set(net.layout.names)
    part_of = {name: part for name, ids in net.carriers.curves.items()
               for part, own in datasets.SCHEMES[here].parts.items() if net.carriers.ids[ids[0]] in own}
    for name, ids in other.curves.items():
        if name in net.layout.names:
            assert {owner[index] for index in ids} == {name}
    for part, ids in other.parts.items():
        assert {part_of[owner[index]] for index in ids} <= {part}
    for side, ids in zip(("left", "right"), other.pupils):
        assert {owner[index] for index in ids} == {"eye_" + side}
    placed = torch.cat([*template.points.values()])[[place - count for place in template.place]]
    found = lf.predict_points(net, torch.randn(1, 3, 64, 64), template)[0]  # nothing flows
    assert torch.equal(lf.from_frame(placed, 64), found[0])
    flags = "--limit", "200", "--points"
    seen = warp.apply_affine(drawn(*flags, str(here), split="train").frames,
                             drawn(*flags, str(there), split="train").points).mean(0)
    eyes = datasets.group_means(net.mean, datasets.SCHEMES[here].pupils)
    error = (placed - lf.to_frame(seen, 64)).norm(dim=1) / (eyes[0] - eyes[1]).norm()
    assert error.mean() < 0.05 and error.max() < 0.15, (error.mean(), error.max())


def test_an_annotation_in_another_frame_is_brought_onto_the_networks():
    net, turn = network(68), torch.tensor([[0.5, 0.1, 3.0], [-0.1, 0.4, 60.0]])
    plain, moved = (lf.make_template(net, mean)
                    for mean in (mean_of(98), warp.apply_affine(turn, mean_of(98))))
    assert plain.place == moved.place
    for name in plain.points:
        same(moved.points[name], plain.points[name], 0.02)
    same_one = lf.make_template(net, net.mean)  # its own, as if it were another's
    assert all(torch.allclose(own, net.mean[net.carriers.curves[name]], atol=1e-3)
               for name, own in same_one.points.items())


def test_annotations_that_cannot_be_carried_are_named(monkeypatch):
    net = network(68)
    with pytest.raises(ValueError, match="--method coord knows its own 68 points alone"):
        lf.make_template(network(68, method="coord"), mean_of(29))
    with pytest.raises(ValueError, match="21 points are no annotation with curves"):
        lf.make_template(net, torch.zeros(21, 2))
    few = dataclasses.replace(datasets.SCHEMES[29], anchors={"chin": (28,), "nose_tip": (20,)})
    monkeypatch.setitem(datasets.SCHEMES, 29, few)
    with pytest.raises(ValueError, match="29 and 68 points share 2 anchors, wanted 3"):
        lf.make_template(net, torch.zeros(29, 2))


@pytest.mark.parametrize("backbone", ["mobilenetv2", "dan"])
def test_a_sparse_networks_own_landmarks_are_where_its_flow_leaves_them(backbone):
    net = network(68, 50, still=False, backbone=backbone)
    found, carried, answer = lf.predict_points(net, torch.randn(1, 3, 64, 64), lf.make_template(net))
    extra = {name: lf.from_frame(own, 64) for name, own in answer.extra.items()}
    assert torch.equal(found, dense_of(net.carriers, carried, extra))
    assert len(answer.extra) == len(net.carriers.extras)
    assert (found - lf.from_frame(net.mean, 64)).norm(dim=2).min() > 0


# ---- Loss, peaks, data ---------------------------------------------------------------------------

@functools.cache
def moving_network(**options):
    return network(68, still=False, **options)


def loss_case(*flags, **options):
    args, net = drawn_args(*flags), moving_network(**options)
    generator = torch.Generator().manual_seed(0)
    return args, net, lf.from_frame(mean_of(68) + 6 * torch.randn(3, 68, 2, generator=generator), 64)


@pytest.mark.parametrize("flags, method", [("", "lddmm"), ("--beta 1", "lddmm"), ("--squared", "lddmm"),
                                           ("--method coord", "coord")])
@pytest.mark.parametrize("points, backbone", [(100, "mobilenetv2"), (50, "dan")])
def test_loss_of_stages_is_in_px_of_a_256_px_crop(flags, method, points, backbone):
    args, net, points = loss_case(*flags.split(), method=method, points=points, backbone=backbone)
    with torch.no_grad():
        answer = net(torch.randn(3, 3, 64, 64))
    target, ids = lf.to_frame(points, 64), net.carriers.ids
    d = (target[:, 36:42].mean(1) - target[:, 42:48].mean(1)).norm(dim=1)
    parts = []
    for pred in answer.stages:
        if method == "coord":
            parts.append(((pred - target[:, ids]).norm(dim=2).mean(1) / d).mean())
        else:
            parts.append(lf.lddmm_loss(pred, target[:, ids], net.carriers.curves, net.sigma, d, args.beta,
                                       args.squared))
    expected = parts[0] if backbone != "dan" else 0.3 * parts[0] + 0.7 * parts[1]
    assert len(parts) == 1 + (backbone == "dan")
    same(lf.loss_of(net, answer, points, args), expected, 1e-5)


def test_loss_of_heatmaps_is_the_squared_error_against_gaussians():
    net = lf.LDDMMFace("hrnet_w18", 68, mean_of(68), 50, method="heatmap", size=64)
    maps = torch.rand(2, 50, 16, 16)
    points = lf.from_frame(mean_of(68) + 6 * torch.randn(2, 68, 2), 64)
    total = 0.0
    for b, k in itertools.product(range(2), range(50)):
        cx, cy = ((points[b, net.carriers.ids[k]] + 0.5) / 4 - 0.5).tolist()
        y, x = np.mgrid[:16, :16]
        total += ((maps[b, k].numpy() - np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 2)) ** 2).mean()
    loss = lf.loss_of(net, lf.Answer([], None, None, {}, maps), points, drawn_args())
    assert float(loss) == pytest.approx(total / 100, rel=1e-5)


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
        assert extras == {} and np.abs(matrix @ [99.5, 99.5, 1] - 99.5).max() < 1e-9  # about the middle
        square = (1 + zooms[-1]) ** 2 * np.eye(2)
        np.testing.assert_allclose(matrix[:, :2] @ matrix[:, :2].T, square, atol=1e-9)
        corners = np.array([[-0.5, -0.5], [199.5, -0.5], [-0.5, 199.5], [199.5, 199.5]])
        source = (corners - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T  # what the crop looks at
        assert np.abs(source - 99.5).max() <= lf.REACH * 100 + 1e-9
    assert 450 < mirrors < 550
    for values, limit in ((angles, 20), (zooms, 0.25)):  # normal, of half that spread, cut at two deviations
        values = np.abs(values) / limit
        assert values.max() == pytest.approx(1) and 0.02 < (values > 0.9999).mean() < 0.08
        assert 0.63 < (values < 0.5).mean() < 0.73


@pytest.mark.parametrize("kind", ["loader", "device"])
def test_prepare_hides_and_normalises(kind):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (2, 10, 12, 3), dtype=torch.uint8)
    hidden = torch.tensor([[2.5, 3, 6, 7.5], [-5, -5, -1, 20]])
    given = image if kind == "loader" else image.permute(0, 3, 1, 2).float()
    out = lf.prepare({"image": given, "hidden": hidden}, CPU)
    for b in range(2):
        pixels = image[b].double().numpy().copy()
        for y, x in itertools.product(range(10), range(12)):
            if hidden[b, 0] <= x < hidden[b, 2] and hidden[b, 1] <= y < hidden[b, 3]:
                pixels[y, x] = datasets.BORDER
        z = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(out[b].permute(1, 2, 0), z, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(lf.prepare({"image": given}, CPU)[1], out[1])


# ---- Evaluation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("scheme, points, options", [
    (68, 100, {}), (98, 50, {}), (68, 50, dict(per_step=True, steps=3))])
def test_determinants_are_those_of_the_networks_map(scheme, points, options):
    """A landmark's derivative, by autograd through the network that carries it along as an extra point."""
    dtype = torch.float64
    net = network(scheme, points, still=False, **options).to(dtype)
    net.mean += 0.01 * torch.randn(scheme, 2, generator=torch.Generator().manual_seed(0))
    whole = {name: list(dict.fromkeys([*(net.carriers.ids[k] for k in places),
                                       *net.carriers.extras.get(name, ())]))
             for name, places in net.carriers.curves.items()}
    extra = {name: net.mean[ids].clone().requires_grad_() for name, ids in whole.items()}
    answer = net(torch.randn(1, 3, 64, 64, dtype=dtype), extra)
    found = torch.linalg.det(lf.derivatives(net, answer, lf.make_template(net)))[0].detach()  # (P,)
    for name, own in extra.items():
        rows = [torch.autograd.grad(answer.extra[name][0, :, axis].sum(), own, retain_graph=True)[0]
                for axis in (0, 1)]
        det = torch.linalg.det(torch.stack(rows, 1))
        for index, value in zip(whole[name], det.tolist()):
            if net.carriers.place[index] in net.carriers.curves[name] or index not in net.carriers.ids:
                assert float(found[index]) == pytest.approx(value, rel=2e-3), (name, index)
    assert (found - 1).abs().max() > 0.05


class Oracle(lf.LDDMMFace):
    """Answers the faces of a set, asked in order, moved by `shift` px of the crop, whatever the image."""

    def __init__(self, data, points=100, shift=0.0, method="lddmm"):
        scheme = data.points.shape[1]
        mean = lf.mean_face(drawn_args(), data)
        super().__init__("mobilenetv2", scheme, mean, points, method=method, size=64)
        self.truth = lf.to_frame(data.crop_points() + torch.tensor([shift, 0.0]), 64)
        self.calls, self.seen = 0, []

    def forward(self, image, extra=None):
        points = self.truth[torch.arange(self.calls, self.calls + len(image)) % len(self.truth)]
        self.calls += len(image)
        self.seen.append(image)
        extra = {name: points[:, ids] for name, ids in self.carriers.extras.items()}
        start = self.start.expand(len(image), -1, -1)
        return lf.Answer([points[:, self.carriers.ids]], torch.zeros_like(start), start, extra, None)


def loader_of(data):
    return datasets.make_loader(data, datasets.in_order(len(data), 7), 0, CPU)


@pytest.mark.parametrize("flags, points", [("", 100), ("--points 98", 50), ("--points 29", 100)])
def test_evaluate_measures_in_image_pixels_and_by_subset(flags, points):
    args, data = drawn_args("--threshold", "0.05", *flags.split()), drawn(*flags.split())
    perfect, _, found = lf.evaluate(Oracle(data, points), loader_of(data), args)
    same(found, data.points, 1e-4)
    assert perfect["nme"] < 1e-6 and perfect["fr"] == 0 and perfect["auc"] > 0.9999
    assert perfect["curves"] < 1e-6 and perfect["curves/eyes"] < 1e-6 and perfect["nme/mean face"] > 0.02
    assert perfect["detja"] == perfect["detjam"] == 1 and perfect["detjn"] == 0
    assert perfect["nme@interpolated"] < 1e-6 or points == 50
    moved, errors, found = lf.evaluate(Oracle(data, points, 2.0), loader_of(data), args)
    corners = datasets.SCHEMES[data.points.shape[1]].eyes
    eyes = torch.from_numpy(np.stack([f.points[list(corners)] for f in data.faces])).double()
    expected = 2 / data.frames[:, 0, 0] / (eyes[:, 0] - eyes[:, 1]).norm(dim=1)  # 2 px of the crop
    same(errors, expected, 1e-5)
    for tag in {tag for face in data.faces for tag in face.tags}:
        chosen = expected[[tag in face.tags for face in data.faces]]
        assert moved[f"nme/{tag}"] == pytest.approx(float(chosen.mean()), rel=1e-3)
        assert moved[f"fr/{tag}"] == pytest.approx(float((chosen > 0.05).double().mean()))
    assert moved["auc"] == pytest.approx(float((1 - expected / 0.05).clamp(min=0).mean()), abs=1e-4)
    parts = datasets.SCHEMES[data.points.shape[1]].parts
    curves = metrics.curve_error(found, data.points, parts, data.divisors("io"))
    assert moved["curves"] == pytest.approx(float(curves["overall"].mean()))
    assert moved["curves/mouth"] == pytest.approx(float(curves["mouth"].mean()))


def test_the_interpolated_and_the_mean_face_are_scored_in_the_images():
    args, data = drawn_args("--norm", "box"), drawn()
    net = Oracle(data, 50)
    scores, _, _ = lf.evaluate(net, loader_of(data), args)
    mean, weights = data.crop_points().mean(0).double(), lf.interpolation(net.carriers).double()
    d, ids = data.divisors("box"), net.carriers.ids
    px = 1 / data.frames[:, 0, 0]
    crop = warp.apply_affine(data.frames, data.points)
    between = mean + weights @ (crop[:, ids] - mean[ids])
    for name, guess in (("nme@interpolated", between), ("nme/mean face", mean)):
        error = (guess - crop).norm(dim=2).mean(1) * px / d
        assert scores[name] == pytest.approx(float(error.mean()), rel=1e-4)
    error = metrics.curve_error(between, crop, datasets.SCHEMES[68].parts, d / px)["overall"].mean()
    assert scores["curves@interpolated"] == pytest.approx(float(error), rel=1e-4)
    assert 0 < scores["nme@interpolated"] < scores["nme/mean face"] / 2


def test_a_sparse_baseline_is_compared_by_its_own_points():
    args, data = drawn_args(), drawn()
    net = Oracle(data, 50, method="coord")
    scores, _, found = lf.evaluate(net, loader_of(data), args)
    d, parts, ids = data.divisors("io"), datasets.SCHEMES[68].parts, net.carriers.ids
    own = {part: [ids.index(i) for i in chosen if i in ids] for part, chosen in parts.items()}  # each once
    few = metrics.curve_error(data.points[:, ids], data.points, parts, d, pred_parts=own)
    assert scores["curves"] == pytest.approx(float(few["overall"].mean()), rel=1e-4)
    assert scores["curves"] > 0.003  # however good the points are, between them nothing is
    all_points = metrics.curve_error(found, data.points, parts, d)
    assert abs(float(all_points["overall"].mean()) - scores["curves"]) > 1e-3
    assert scores["nme"] == pytest.approx(scores["nme@interpolated"], rel=1e-4) and "detja" not in scores
    whole = lf.evaluate(Oracle(data, 100, method="coord"), loader_of(data), args)[0]
    assert whole["curves"] < 1e-6


def test_a_baseline_on_another_annotation_has_curves_and_no_landmarks():
    data, args = drawn(), drawn_args("--points", "98")
    net, loader = Oracle(data, 50, method="coord"), loader_of(drawn("--points", "98"))
    scores, errors, found = lf.evaluate(net, loader, args)
    assert errors.isnan().all() and scores["fr"] == 1 and found.shape == (24, 68, 2)
    assert 0 < scores["curves"] < 0.5 and math.isfinite(scores["curves/mouth"]) and "detja" not in scores


def test_hidden_crops_are_seen_hidden_and_scored_beside_the_others():
    args, data = drawn_args(), drawn()
    net = Oracle(data, shift=1.0)
    scores, _, _ = lf.evaluate(net, loader_of(data), args, occlude=True)
    assert scores["nme@hidden"] == pytest.approx(scores["nme"], rel=1e-5)
    assert scores["fr@hidden"] == scores["fr"]
    grey = lf.prepare({"image": torch.full((1, 1, 1, 3), datasets.BORDER, dtype=torch.uint8)}, CPU)
    plain, hidden = (torch.cat(net.seen[4 * i:4 * i + 4]) for i in (0, 1))
    changed = (hidden != plain).any(1)                                                       # (M, 64, 64)
    assert ((hidden == grey).all(1) | ~changed).all()
    share = (hidden == grey).all(1).float().mean((1, 2))
    assert share.min() > 0.17 and changed.float().mean((1, 2)).max() < 0.23  # a fifth, whole within the crop
    half = math.sqrt(0.2) * 32
    for i, points in enumerate(data.crop_points()):
        middle = points[(7 * i) % 68].clamp(half - 0.5, 63.5 - half).flip(0)  # y x
        assert (changed[i].nonzero() - middle).abs().max() <= half
    assert set(lf.evaluate(net, loader_of(data), args)[0]) == set(scores) - {"nme@hidden", "fr@hidden"}


def test_faces_of_another_annotation_are_scored_by_their_own():
    net, data, args = network(68), drawn("--points", "29"), drawn_args("--points", "29")
    template = lf.make_template(net, mean_of(29))
    scores, errors, points = lf.evaluate(net, loader_of(data), args, template)
    placed = torch.cat([*template.points.values()])[[place - 68 for place in template.place]]
    same(points, warp.apply_affine(warp.invert(data.frames), lf.from_frame(placed, 64).double()
                                   .expand(24, -1, -1)), 1e-3)
    same(errors, metrics.nme(points, data.points, data.divisors("io")))
    parts = datasets.SCHEMES[29].parts
    curves = metrics.curve_error(points, data.points, parts, data.divisors("io"))["overall"].mean()
    assert scores["curves"] == pytest.approx(float(curves))
    assert not {"detja", "nme@interpolated", "nme/mean face"} & set(scores)


def test_the_loss_and_the_optimiser_fit_eight_faces():
    args, data = drawn_args("--limit", "8"), drawn("--limit", "8")
    batch = data.__getitems__([(0, i) for i in range(8)])
    torch.manual_seed(0)
    net = lf.LDDMMFace("mobilenetv2", 68, lf.mean_face(args, data), size=64).train()
    optimizer, image = torch.optim.Adam(net.parameters(), 2e-3), lf.prepare(batch, CPU)
    for step in range(25):
        answer = net(image)
        loss = lf.loss_of(net, answer, batch["points"], args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        off = answer.stages[0].detach() - lf.to_frame(batch["points"], 64)
        error = float(off.norm(dim=2).mean())
        first = error if step == 0 else first
    assert first > 10 and error < 0.5 * first, (first, error)


# ---- The command line ----------------------------------------------------------------------------

TINY = ["--size", "64", "--limit", "16", "--batch-size", "8", "--backbone", "mobilenetv2", "--points", "68",
        "--also", "29,98", "--epochs", "3", "--eval-every", "2", "--device", "cpu"]
SHORT = [*TINY, "--epochs", "1", "--also", ""]


def trained(folder, *flags):
    return lf.train(lf.parse_args([*flags, "--output", str(folder)]))


def evaluated(folder, *flags):
    return lf.train(lf.parse_args(["--eval", str(folder / "last.pt"), "--device", "cpu", *flags]))


def test_presets_are_flags_and_flags_beat_presets():
    for name, preset in lf.PRESETS.items():
        args = lf.parse_args(["--data", name])
        for key, value in preset.items():
            assert getattr(args, key) == value
        assert args.given == ["data"]
    args = lf.parse_args(["--data", "wflw", "--epochs", "7", "--no-amp"])
    assert args.epochs == 7 and args.batch_size == 32 and args.given == ["amp", "data", "epochs"]
    assert (args.lr, args.steps, args.beta, args.size, args.margin) == (3e-4, 2, 0.1, 256, 1.25)


def test_learning_rate_is_halved_after_each_part():
    rates = [lf.learning_rate(step, 400, 3e-4, [0.25, 0.5, 0.75]) for step in (0, 99, 100, 250, 300, 399)]
    assert rates == pytest.approx([3e-4, 3e-4, 1.5e-4, 7.5e-5, 3.75e-5, 3.75e-5])
    assert lf.learning_rate(5, 10, 1.0, []) == 1


def test_bad_flags_are_named(tmp_path, capsys):
    for flags, message in [
            ("--backbone alexnet", "invalid choice"), ("--method flow", "invalid choice"),
            ("--dat faces", "unrecognized"), ("--gpus 0", "--gpus 0: expected at least 1"),
            ("--size 100", "--size 100: expected a multiple of 32"), ("--limit -5", "expected at least 0"),
            ("--size 96 --backbone hourglass", "--size 96: expected a multiple of 64"),
            ("--steps 0", "--steps 0: expected"), ("--sigma-factor 0", "--sigma-factor 0.0: expected more"),
            ("--beta -1", "--beta -1.0: expected"), ("--beta inf", "--beta inf: expected"),
            ("--lr nan", "--lr nan: expected"), ("--threshold 0", "--threshold 0.0: expected"),
            ("--drop-at a,b", "--drop-at a,b: expected"), ("--also x", "--also x: expected"),
            ("--train-points half", "--train-points half: expected"),
            ("--train-points=", "--train-points : expected"),
            ("--as-points 21", "--as-points 21: expected one of"), ("--as-points 29", "belongs to --predict"),
            ("--method heatmap --backbone dan", "--method heatmap goes with --backbone hrnet_w18, not dan"),
            ("--data wflw --also 29", "--also belongs to --data faces"), ("--box head", "expected landmarks"),
            ("--gpus 2 --batch-size 7", "--batch-size 7 does not divide over --gpus 2"),
            ("--box 1,2,3,4", "with --predict x0,y0,x1,y1"), ("--init no.pt", "no.pt: expected a file"),
            ("--predict a.jpg", "belong together"), ("--weights a.pt", "belong together"),
            ("--detector a.onnx", "a.onnx: expected a file"), ("--eval a.pt --resume", "--eval goes neither"),
            (f"--detector {__file__}", "--detector belongs to --predict"),
            *((f"--method {method} {flag}", f"{flag.split()[0]}: only --method lddmm has a flow")
              for method in ("coord", "heatmap") for flag in (
                  "--beta 0.1", "--squared", "--sigma-factor 2", "--steps 2", "--per-step-momenta"))]:
        with pytest.raises(SystemExit):
            lf.parse_args(flags.split())
        assert message in capsys.readouterr().err, flags
    run = lambda *flags: trained(tmp_path / "x", *SHORT, *flags)
    with pytest.raises(FileNotFoundError, match="--data-root"):
        run("--data", "wflw", "--data-root", str(tmp_path / "nowhere"))
    for flags, message in [("--train-points 33", "no table of 33 % of 68 points"),
                           ("--train-points 0,9", "no carrier on brow_left, brow_right"),
                           ("--points 5", "no curve table for 5 points, only for 19, 29"),
                           ("--points 21", "no scheme of 21 points is drawn")]:
        with pytest.raises(ValueError, match=message):
            run(*flags.split())
    assert not (tmp_path / "x").exists()  # all before the first step


@pytest.mark.parametrize("values", ["7", "-1", "0.5,nan"])
def test_parts_of_the_run_are_from_0_to_1(values, capsys):
    with pytest.raises(SystemExit):
        lf.parse_args([f"--drop-at={values}"])
    assert f"--drop-at {values}: expected" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--also 21", "--also 5", "--norm io-published --points 194 --also 68"])
def test_annotations_that_cannot_be_evaluated_are_named_before_the_first_step(tmp_path, flags, monkeypatch):
    monkeypatch.setattr(lf, "prepare", lambda *args: pytest.fail("training has begun"))
    with pytest.raises((ValueError, SystemExit)):
        trained(tmp_path / "x", *SHORT, *flags.split())
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, in process: its folder and numbers."""
    folder = tmp_path_factory.mktemp("run") / "a"
    return folder, trained(folder, *TINY, "--occluder-test")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_log_checkpoint_and_pictures(finished):
    folder, result = finished
    rows = rows_of(folder)
    epochs = [row for row in rows if "loss" in row]
    assert [row["epoch"] for row in epochs] == [1, 2, 3] and rows[-1]["epoch"] == 3
    assert ["nme" in row for row in epochs] == [False, True, True]
    assert epochs[-1]["lr"] == pytest.approx(1e-3 / 8) and all(math.isfinite(row["loss"]) for row in epochs)
    assert epochs[-1]["nme"] == result["nme"] and {"nme@hidden", "nme/mean face"} <= set(epochs[-1])
    assert {"nme@29", "curves@98", "curves/eyes@29", "detja", "nme@interpolated"} <= set(rows[-1])
    for name in ("dense", "flow", "ced", "dense-29", "dense-98", "ced-29"):
        assert cv2.imread(str(folder / f"{name}.png")) is not None
    state = lf.load(folder / "last.pt", "lddmm_face")
    assert state["epoch"] == 3 and state["faces"] == [16, 68] and state["args"]["data"] == "faces"
    assert state["model"]["backbone.0.features.0.1.num_batches_tracked"] == 3 * 2
    crops = drawn("--limit", "16", split="train")
    same(state["model"]["mean"], lf.to_frame(crops.crop_points().mean(0), 64))
    assert not list(folder.glob("*.part"))


def test_eval_repeats_the_numbers(finished, tmp_path, capsys):
    folder, result = finished
    again = evaluated(folder, "--output", str(tmp_path / "new"))
    assert set(again) == {key for key in result if not key.endswith(("@29", "@98"))}
    for key, value in again.items():
        assert value == pytest.approx(result[key], rel=1e-4, abs=1e-6), key
    text = capsys.readouterr().out
    assert "faces: 68 points, NME by io, FR and AUC at 0.10, crop landmarks x 1.25" in text
    assert "NME_c (%)" in text and "DetJA" in text and "hidden" in text
    assert (tmp_path / "new/dense.png").exists() and (tmp_path / "new/flow.png").exists()
    evaluated(folder, "--limit", "8", "--box", "face", "--margin", "1.5", "--norm", "ip")
    assert "68 points, NME by ip, FR and AUC at 0.10, crop face x 1.5" in capsys.readouterr().out


@pytest.mark.parametrize("points", [29, 98])
def test_eval_on_another_annotation(finished, tmp_path, points, capsys):
    folder, _ = finished
    scores = evaluated(folder, "--points", str(points), "--output", str(tmp_path / "new"))
    row = rows_of(folder)[-1]
    for key in ("nme", "fr", "auc", "curves", "curves/mouth"):
        assert scores[key] == pytest.approx(row[f"{key}@{points}"], rel=1e-4)
    assert "detja" not in scores and f"faces: {points} points" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "new/dense.png")) is not None


@pytest.mark.parametrize("flags, carried, scored", [
    ("--train-points 50", 50, True),
    ("--points 29 --train-points 0,4,1,8,9,16,17,18,20,27,22,25,26,28 --per-step-momenta", 14, True),
    ("--method coord --train-points 50 --also 29", 50, False),
    ("--method heatmap --backbone hrnet_w18 --size 32 --limit 8", 68, False),
    ("--squared --backbone dan --size 32 --limit 8 --points 29", 29, False)])
def test_other_kinds_of_run(tmp_path, flags, carried, scored, capsys, monkeypatch):
    monkeypatch.setattr(lf.DANStage, "channels", 64)  # of 2048: DAN's checkpoint is small
    result = trained(tmp_path, *SHORT, *flags.split())
    assert math.isfinite(result["nme"]) and ("detja" in result) == scored
    net = lf.open_checkpoint(lf.parse_args(["--device", "cpu"]), tmp_path / "last.pt", set())
    assert len(net.carriers.ids) == carried
    assert (tmp_path / "flow.png").exists() == scored
    again = evaluated(tmp_path)
    assert again["nme"] == pytest.approx(result["nme"], rel=1e-4)
    assert again["curves"] == pytest.approx(result["curves"], rel=1e-4)
    if "--method" in flags:
        other = evaluated(tmp_path, "--points", "29")
        assert math.isnan(other["nme"]) and math.isfinite(other["curves"])
        assert "also" not in flags or result["curves@29"] == pytest.approx(other["curves"], rel=1e-4)


def test_predict_writes_points_of_any_annotation_and_pictures(finished, tmp_path, capsys):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    face = synthetic.read_faces("test", 1, size=128, points=29)[0]
    for name in ("one two.png", "sub/b.jpg"):
        cv2.imwrite(str(tmp_path / "in" / name), datasets.load_image(face.image)[..., ::-1])
    flags = ["--predict", str(tmp_path / "in"), "--weights", str(finished[0] / "last.pt"), "--device", "cpu"]
    for points, more in ((68, ""), (194, "--as-points 194"), (29, "--as-points 29 --box=9,9,99,110")):
        out = tmp_path / str(points)
        lf.train(lf.parse_args([*flags, "--output", str(out), *more.split()]))
        for name in ("one two", "sub/b"):
            assert datasets.read_pts(out / f"{name}.pts").shape == (points, 2)
            assert cv2.imread(str(out / f"{name}.png")).shape == (128, 128, 3)
    assert "2 images with landmarks" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="one two.pts exists already; name another folder"):
        lf.train(lf.parse_args([*flags, "--output", str(tmp_path / "68")]))
    with pytest.raises(ValueError, match="--box 200,100,300,200 lies outside an image of 128 x 128"):
        lf.train(lf.parse_args([*flags, "--output", str(tmp_path / "y"), "--box", "200,100,300,200"]))


def test_the_second_look_is_about_the_first_answer(monkeypatch):
    net, args, looks = network(68), drawn_args(), []
    original = datasets.square_frames
    monkeypatch.setattr(datasets, "square_frames",
                        lambda box, *rest: looks.append(box) or original(box, *rest))
    image, box = np.zeros((200, 200, 3), np.uint8), np.array([20.0, 30, 120, 130])
    own, other = lf.make_template(net), lf.make_template(net, mean_of(98))
    once = lf.find_points(net, image, box, [1.25], args, own)
    twice = lf.find_points(net, image, box, [1.25, 1.25], args, other)
    assert once.shape == (68, 2) and twice.shape == (98, 2)
    np.testing.assert_allclose(looks[2][0], [*once.min(0), *once.max(0)])
    frames = torch.from_numpy(original(box[None], 64, 1.25))  # nothing flows: the mean face about the box
    same(warp.apply_affine(frames, torch.from_numpy(once)[None])[0], lf.from_frame(net.mean, 64), 1e-3)
    net.mean[:] = 100.0
    assert lf.find_points(net, image, box, [1.25], args, own) is None  # one place: no face


def test_resume_on_other_data_is_refused(finished):
    args = lf.parse_args(["--resume", "--output", str(finished[0]), "--device", "cpu"])
    state = lf.load(finished[0] / "last.pt", "lddmm_face")
    state["faces"] = [15, 68]
    lf.restore_args(args, state["args"], lf.MACHINE)
    with pytest.raises(ValueError, match="16 training faces of 68 landmarks, the run was started on 15"):
        lf.make_model(args, lf.load_sets(args, 1)[0], state, CPU, 1)


def test_splits_of_different_landmarks_are_refused(monkeypatch):
    monkeypatch.setattr(lf, "read_faces", lambda args, split: synthetic.read_faces(
        split, 2, 64, 29 if split == "test" else 68))
    with pytest.raises(ValueError, match="training faces have 68 landmarks, test faces 29"):
        lf.load_sets(drawn_args(), 1)


def test_weights_that_do_not_fit_the_network_are_named(finished, tmp_path):
    state = lf.load(finished[0] / "last.pt", "lddmm_face")
    weights, lost = state["model"], "estimators.0.weight"
    few = {name: value for name, value in weights.items() if name != lost}
    for model, message in [(few, rf"last.pt: 1 tensors do not fit .* {lost}, is missing, expected \("),
                           (weights | {lost: torch.zeros(3, 7)}, r"is \(3, 7\), expected \("),
                           (weights | {"more": torch.zeros(2)}, r"first, more, is \(2,\), expected none"),
                           ({}, "last.pt: its weights have no mean face")]:
        torch.save(state | {"model": model}, tmp_path / "last.pt")
        with pytest.raises(ValueError, match=message):
            lf.train(lf.parse_args(["--eval", str(tmp_path / "last.pt"), "--device", "cpu"]))
    torch.save(state | {"model": few}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="last.pt: 1 tensors do not fit"):
        lf.train(lf.parse_args(["--resume", "--output", str(tmp_path), "--device", "cpu"]))


def test_flags_that_contradict_the_checkpoint_are_named(finished):
    folder, _ = finished
    with pytest.raises(ValueError, match="--lr 0.5: the checkpoint was made with"):
        lf.train(lf.parse_args(["--resume", "--output", str(folder), "--lr", "0.5", "--device", "cpu"]))
    for flags, message in (("--steps 5", "--steps 5"), ("--train-points 50", "--train-points 50")):
        with pytest.raises(ValueError, match=f"{message}: the checkpoint was made with"):
            evaluated(folder, *flags.split())
    with pytest.raises(FileExistsError, match="holds a run: continue it by --resume"):
        trained(folder, *TINY)
    with pytest.raises(ValueError, match="last.pt is no checkpoint of sdfl.py, but of lddmm_face"):
        lf.load(folder / "last.pt", "sdfl")


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_table(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    (folder / "ced.png").unlink()
    again = lf.train(lf.parse_args(["--resume", "--output", str(folder), "--device", "cpu"]))
    assert again["nme"] == pytest.approx(finished[1]["nme"]) and (folder / "ced.png").exists()
    assert again["nme@29"] == pytest.approx(finished[1]["nme@29"])
    assert "NME (%)" in capsys.readouterr().out
    assert len(rows_of(folder)) == len(rows_of(finished[0]))  # nothing stands twice


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    calls, original = [], lf.loss_of

    def poisoned(*args):
        calls.append(1)
        return original(*args) * (math.nan if len(calls) == 4 else 1)  # two steps an epoch: epoch 2, step 2

    monkeypatch.setattr(lf, "loss_of", poisoned)
    with pytest.raises(FloatingPointError, match="the loss is nan at epoch 2, step 2"):
        trained(tmp_path, *TINY, "--also", "")
    assert lf.load(tmp_path / "last.pt", "lddmm_face")["epoch"] == 1


def test_init_takes_what_matches_by_name(tmp_path):
    source, target = (network(29, seed=seed).backbone[0] for seed in (0, 1))
    state = {"module.backbone." + name: value + 1 for name, value in source.state_dict().items()}
    torch.save({"state_dict": state | {"fc.weight": torch.zeros(3)}}, tmp_path / "a.pth")
    report, own = lf.init_backbone(target, str(tmp_path / "a.pth")), target.state_dict()
    assert f"{len(own)} of {len(own)}" in report and "in the file only: fc.weight" in report
    assert all(torch.equal(own[name], value + 1) for name, value in source.state_dict().items())
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="none of its 1 names"):
        lf.init_backbone(target, str(tmp_path / "b.pth"))


def test_a_run_starts_from_given_weights(tmp_path, capsys):
    state = network(29, seed=3).backbone[0].features.state_dict(prefix="features.")  # torchvision's names
    torch.save(state, tmp_path / "a.pth")
    trained(tmp_path / "run", *SHORT, "--points", "29", "--init", str(tmp_path / "a.pth"))
    assert f"--init: {len(state)} of {len(state) + 2} backbone tensors" in capsys.readouterr().out


def test_killed_and_resumed_is_the_same_run_bit_for_bit(finished, tmp_path):
    command = [sys.executable, "lddmm_face.py", "--output", str(tmp_path), *TINY, "--occluder-test"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not (tmp_path / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.005)
    process.kill()  # somewhere after the first checkpoint
    out, _ = process.communicate()
    assert (tmp_path / "last.pt").exists(), out
    assert 1 <= lf.load(tmp_path / "last.pt", "lddmm_face")["epoch"] < 3
    lf.train(lf.parse_args(["--resume", "--output", str(tmp_path), "--device", "cpu"]))
    a, b = (lf.load(folder / "last.pt", "lddmm_face") for folder in (finished[0], tmp_path))
    assert a["epoch"] == b["epoch"] == 3 and a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for i, moments in a["optimizer"]["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[name], b["optimizer"]["state"][i][name])
    for one, two in zip(rows_of(finished[0]), rows_of(tmp_path), strict=True):
        assert all(value == two[key] for key, value in one.items()
                   if key not in ("minutes", "images_per_second"))
