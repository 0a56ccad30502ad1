"""heatmap_landmarks.py: equations against loops and published code, published sizes, a run."""
import json
import math
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import heatmap_landmarks as hl
from common import UserError, datasets, run, synthetic, warp
from tests import trees

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Sizes: Tables 1 to 6 ------------------------------------------------------------------------

def count(module):
    return sum(p.numel() for p in module.parameters())


def macs(module, shape):
    """The shape of the result, and the multiply-adds of the convolutions; nothing is computed."""
    total = []

    def add(layer, given, out):  # a deconvolution multiplies each px of its input by its kernel
        pixels = given[0] if isinstance(layer, nn.ConvTranspose2d) else out
        total.append(pixels[0].numel() * layer.weight[0].numel())

    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.register_forward_hook(add)
    return module(torch.empty(shape)).shape, sum(total)


# Filters (256 in Tables 1 to 3, 128 in 4 to 6), heatmap side, 10^9 multiply-adds, parameters
MODELS = [
    ("mobilenetv2_0.25", "SSSS", 256, 96, 0.5623, 1_605_016),
    ("mobilenetv2_0.25", "DSSS", 256, 96, 0.6425, 2_506_136),
    ("mobilenetv2_0.25", "DDSS", 256, 96, 0.9634, 3_407_256),
    ("mobilenetv2_0.25", "DSSD", 256, 96, 1.0943, 2_641_176),
    ("mobilenetv2_0.25", "DSDS", 256, 96, 1.7278, 3_063_192),
    ("mobilenetv2_0.25", "DDDS", 256, 96, 2.2469, 4_308_376),
    ("mobilenetv2_0.25", "SSSD", 256, 96, 1.0141, 1_740_056),
    ("mobilenetv2_0.25", "SDSD", 256, 96, 1.2854, 2_297_112),
    ("mobilenetv2_0.25", "SSDD", 256, 96, 2.8921, 2_641_176),
    ("mobilenetv2_0.25", "SDDD", 256, 96, 3.3616, 3_542_296),
    ("mobilenetv2_0.25", "DDDD", 256, 96, 3.4914, 4_787_480),
    ("mobilenetv2_0.25", "DDDD", 128, 96, 0.9693, 1_889_304),
    ("mobilenetv2_1.0", "SSD", 128, 48, 0.3168, 2_963_200),
    ("mobilenetv2_1.0", "SDD", 128, 48, 0.4341, 3_188_480),
    ("mobilenetv2_1.0", "SSSD", 128, 96, 0.5450, 3_000_320),
    ("mobilenetv2_1.0", "SDSD", 128, 96, 0.6129, 3_139_584),
    ("resnet18", "SDD", 128, 48, 1.5394, 11_944_512),
    ("resnet50", "SDD", 128, 48, 3.2240, 24_669_248)]


@pytest.mark.parametrize("backbone, strategy, filters, side, billions, parameters", MODELS)
def test_models_have_the_published_sizes(backbone, strategy, filters, side, billions, parameters):
    with FakeTensorMode():  # shapes only
        net = hl.HeatmapNet(backbone, strategy, 106, filters).eval()
        shape, total = macs(net, (1, 3, 192, 192))
    assert (shape, count(net), net.stride) == ((1, 106, side, side), parameters, 192 // side)
    assert round(total / 1e9, 4) == billions


@pytest.mark.parametrize("name, channels, parameters, millions", [
    ("mobilenetv2_0.25", 1280, 236_312, 20.9), ("mobilenetv2_1.0", 1280, 2_223_872, 220.0),
    ("resnet18", 512, 11_176_512, 1332.4), ("resnet50", 2048, 23_508_032, 3002.8)])
def test_backbone_sizes(name, channels, parameters, millions):
    with FakeTensorMode():
        backbone = hl.backbone_of(name)().eval()
        shape, total = macs(backbone, (1, 3, 192, 192))
        assert backbone(torch.empty(2, 3, 64, 96)).shape == (2, channels, 2, 3)
    assert (count(backbone), backbone.channels) == (parameters, channels)
    assert shape == (1, channels, 6, 6) and total / 1e6 == pytest.approx(millions, abs=0.05)


def test_widths_are_cut_and_not_rounded_to_multiples_of_eight():
    with torch.device("meta"):
        features = hl.MobileNetV2(0.25).features
    assert features[0][0].out_channels == 8
    stages = [block.conv[-1].num_features for block in list(features)[1:-1]]
    assert sorted(set(stages)) == [4, 6, 8, 16, 24, 40, 80] and stages == sorted(stages)
    first, second = features[1].conv, features[2].conv
    assert len(first) == 3 and len(second) == 4  # the first block does not widen
    with torch.device("meta"):
        assert [hl.MobileNetV2(width).channels for width in (0.1, 0.5, 2)] == [1280, 1280, 2560]


# ---- Pixel centres, target heatmaps and loss -----------------------------------------------------

@pytest.mark.parametrize("stride", [2, 4, 3.5])
def test_crop_and_heatmap_coordinates_are_inverse_and_commute_with_mirroring(stride):
    points = 192 * torch.rand(50, 2, generator=seeded(), dtype=torch.float64)
    heat = hl.to_heatmap(points, stride)
    torch.testing.assert_close(hl.to_crop(heat, stride), points, atol=1e-12, rtol=0)
    mirrored = hl.to_heatmap(191 - points, stride)
    torch.testing.assert_close(mirrored, 192 / stride - 1 - heat, atol=1e-12, rtol=0)
    assert hl.to_heatmap(-0.5, stride) == -0.5  # the edges of crop and heatmap coincide
    assert hl.to_heatmap(4 * stride - 0.5, stride) == pytest.approx(3.5)


@pytest.mark.parametrize("size, stride, sigma", [(12, 4, 2.0), ((7, 12), 2, 1.5)])
def test_target_heatmaps_are_the_numerator_of_equation_3(size, stride, sigma):
    points = 40 * torch.rand(2, 3, 2, generator=seeded(), dtype=torch.float64) - 5
    maps = hl.gaussian_heatmaps(points, size, stride, sigma)
    height, width = (size, size) if isinstance(size, int) else size
    assert maps.shape == (2, 3, height, width) and maps.dtype == torch.float64
    inverse = np.linalg.inv(sigma**2 * np.eye(2))
    for b in range(2):
        for p in range(3):
            mu = (points[b, p].numpy() + 0.5) / stride - 0.5
            for y in range(height):
                for x in range(width):
                    away = np.array([x, y]) - mu
                    wanted = math.exp(-away @ inverse @ away / 2)
                    assert float(maps[b, p, y, x]) == pytest.approx(wanted)
    half = hl.gaussian_heatmaps(points.half(), size, stride, sigma)
    assert half.dtype == torch.float32  # in half precision the centre would be off by up to 0.06 px
    wanted = hl.gaussian_heatmaps(points.half().float(), size, stride, sigma)
    torch.testing.assert_close(half, wanted)


def test_only_landmarks_whose_box_touches_the_map_have_a_weight():
    generator, size, stride, sigma = seeded(), (10, 16), 4, 2.0
    points = 120 * torch.rand(1, 400, 2, generator=generator) - 30
    weight = hl.landmark_weights(points, size, stride, sigma)
    assert weight.dtype == torch.float32
    for (x, y), w in zip(points[0].tolist(), weight[0].tolist()):
        x, y = (x + 0.5) / 4 - 0.5, (y + 0.5) / 4 - 0.5
        misses = x - 6 > 15 or x + 6 < 0 or y - 6 > 9 or y + 6 < 0
        assert w == (0 if misses else 1)
    assert 0.2 < weight.mean() < 0.8


def test_loss_is_one_for_empty_maps_and_zero_for_perfect_ones():
    points = 60 + 70 * torch.rand(3, 4, 2, generator=seeded())
    perfect = hl.gaussian_heatmaps(points, 48, 4, 2.0)
    assert hl.heatmap_loss(0 * perfect, points, 4, 2.0).item() == pytest.approx(1, abs=1e-4)
    assert hl.heatmap_loss(perfect, points, 4, 2.0).item() == 0
    assert hl.heatmap_loss(perfect.bfloat16(), points, 4, 2.0).dtype == torch.float32


def test_loss_is_the_mean_over_the_landmarks_with_a_weight():
    points = torch.tensor([80.0, 48]) * torch.rand(2, 5, 2, generator=seeded())
    points[0, 1], points[1, 4] = torch.tensor([200.0, 10]), torch.tensor([10.0, -90])
    maps = torch.randn(2, 5, 12, 20, generator=seeded(1), requires_grad=True)
    loss = hl.heatmap_loss(maps, points, 4, 1.5)
    target = hl.gaussian_heatmaps(points, (12, 20), 4, 1.5)
    weight = hl.landmark_weights(points, (12, 20), 4, 1.5)
    total = 0.0
    for b in range(2):
        for p in range(5):
            error = sum((float(maps[b, p, y, x].detach()) - float(target[b, p, y, x]))**2
                        for y in range(12) for x in range(20))
            total += error / (math.pi * 1.5**2) * float(weight[b, p])
    assert weight.sum() == 8 and loss.item() == pytest.approx(total / 8, rel=1e-5)
    loss.backward()
    assert torch.equal(maps.grad.abs().sum((2, 3)) > 0, weight > 0)
    outside = torch.full((1, 2, 2), 900.0)  # nothing to learn is no error
    assert hl.heatmap_loss(torch.ones(1, 2, 8, 8), outside, 4, 2.0).item() == 0


# ---- Eq. (1) to (3) ------------------------------------------------------------------------------

def clean_maps(count=400, size=(48, 48), sigma=2.0, border=8, seed=0):
    """Gaussians at random places `border` px inside: centres (M, 1, 2), maps (M, 1, h, w)."""
    span = torch.tensor([size[1] - 1.0, size[0] - 1.0]) - 2 * border
    centres = border + span * torch.rand(count, 1, 2, generator=seeded(seed))
    return centres, hl.gaussian_heatmaps(centres, size, 1, sigma)


def maps_of(kind, size, count=60):
    generator, border = seeded(), min(2, min(size) // 2)
    noise = torch.randn(count, 1, *size, generator=generator)
    clean = clean_maps(count, size, min(2.0, min(size) / 4), border)[1]
    return {"clean": clean, "noisy": clean + 0.05 * noise, "noise": noise,
            "weak": 0.15 * clean + 0.1 * noise, "mostly negative": noise - 2,
            "uniform": torch.rand(count, 1, *size, generator=generator),
            "flat": torch.full_like(clean, 0.3)}[kind]


def test_argmax_is_equation_1():
    maps = torch.randn(4, 5, 9, 13, generator=seeded()).round(decimals=1)  # so that maxima tie
    maps[0, 0], maps[0, 1] = maps[0, 0].clamp(max=0.5), maps[0, 1].clamp(max=0.1)
    points, confidence = hl.decode_argmax(maps)
    for b in range(4):
        for p in range(5):
            best = (-math.inf, 0, 0)
            for y in range(9):
                for x in range(13):
                    if float(maps[b, p, y, x]) > best[0]:  # not a later px of the same value
                        best = (float(maps[b, p, y, x]), x, y)
            assert (float(confidence[b, p]), *points[b, p].tolist()) == best


def test_shift_is_equation_2_as_its_source_computes_it():
    for size in ((9, 13), (6, 5)):
        maps = torch.randn(40, 2, *size, generator=seeded()).round(decimals=1)
        points, (h, w) = hl.decode_shift(maps)[0].view(-1, 2), size
        for heatmap, found in zip(maps.view(-1, h, w).numpy(), points.tolist()):
            py, px = divmod(int(heatmap.argmax()), w)
            expected = [px, py]
            if 1 < px < w - 1 and 1 < py < h - 1:
                expected[0] += 0.25 * np.sign(heatmap[py, px + 1] - heatmap[py, px - 1])
                expected[1] += 0.25 * np.sign(heatmap[py + 1, px] - heatmap[py - 1, px])
            assert found == expected
    torch.testing.assert_close(hl.decode_shift(maps, 0.0)[0], hl.decode_argmax(maps)[0])


def dark_of(heatmap, kernel):
    """Peak and Newton step of one map (h, w) float64, as DARK's code has them: nothing bounds the
    step. It is inf where the blur leaves nothing positive: there the code's rescaling turns the map
    upside down."""
    h, w = heatmap.shape
    py, px = divmod(int(heatmap.argmax()), w)
    if heatmap.max() <= 0:
        return np.zeros(2), np.zeros(2)
    border = (kernel - 1) // 2
    blurred = cv2.GaussianBlur(np.pad(heatmap, border), (kernel, kernel), 0)
    blurred = blurred[border:border + h, border:border + w]
    if blurred.max() <= 0:
        return np.array([px, py]), np.full(2, np.inf)
    L, step = np.log(np.maximum(blurred * (heatmap.max() / blurred.max()), 1e-10)), np.zeros(2)
    if 1 < px < w - 2 and 1 < py < h - 2:
        gradient = np.array([L[py, px + 1] - L[py, px - 1], L[py + 1, px] - L[py - 1, px]]) / 2
        xx = (L[py, px + 2] - 2 * L[py, px] + L[py, px - 2]) / 4
        yy = (L[py + 2, px] - 2 * L[py, px] + L[py - 2, px]) / 4
        xy = (L[py + 1, px + 1] - L[py - 1, px + 1] - L[py + 1, px - 1] + L[py - 1, px - 1]) / 4
        if xx * yy - xy**2 != 0:
            step = -np.linalg.inv([[xx, xy], [xy, yy]]) @ gradient
    return np.array([px, py]), step


@pytest.mark.parametrize("size", [(48, 48), (20, 31), (9, 6)])  # one smaller than most kernels
@pytest.mark.parametrize("kernel", [3, 7, 11, 17])
@pytest.mark.parametrize("kind", ["clean", "noisy", "noise", "weak", "uniform", "flat",
                                  "mostly negative"])
def test_dark_is_its_published_code_with_a_bounded_step(kind, kernel, size):
    maps = maps_of(kind, size)
    found, confidence = hl.decode_dark(maps, kernel)
    assert torch.equal(confidence, maps.amax((2, 3)))
    compared = 0
    for heatmap, answer in zip(maps[:, 0].double().numpy(), found[:, 0].double().numpy()):
        peak, step = dark_of(heatmap, kernel)
        assert np.abs(answer - peak).max() <= 1 + 1e-6
        if np.abs(step).max() <= 1:
            compared += 1
            assert np.abs(answer - peak - step).max() < 1e-4
    assert compared >= {"clean": 60, "noisy": 55, "flat": 60, "mostly negative": 0}.get(kind, 10)


@pytest.mark.parametrize("size", [48, 96])
def test_each_decoder_is_as_exact_as_its_equation_allows(size):
    centres, maps = clean_maps(size=(size, size))
    error = {name: (decode(maps)[0] - centres).norm(dim=2) for name, decode in hl.DECODERS.items()}
    assert error["argmax"].mean() == pytest.approx(0.3826, abs=0.03)  # a random point's in its px
    assert error["shift"].mean() == pytest.approx(0.191, abs=0.02)
    assert error["dark"].mean() < 5e-4 and error["dark"].max() < 1e-3


@pytest.mark.parametrize("sigma", [1.5, 2.0])
@pytest.mark.parametrize("stride, size", [(2, (96, 96)), (4, (48, 48)), (4, (40, 64))])
def test_what_is_encoded_is_decoded(stride, size, sigma):
    centres, _ = clean_maps(size=size, border=5, seed=1)
    points = hl.to_crop(centres, stride)
    decoded, confidence = hl.decode_dark(hl.gaussian_heatmaps(points, size, stride, sigma))
    assert (hl.to_crop(decoded, stride) - points).abs().max() < 1e-2
    assert confidence.min() > math.exp(-0.25 / sigma**2) - 1e-6  # half a px away in x and in y


ALL = pytest.mark.parametrize("decode", hl.DECODERS.values(), ids=hl.DECODERS)


@ALL
@pytest.mark.parametrize("place", [(0, 0), (11, 10), (19, 23)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_map_that_is_not_finite_says_so_and_leaves_its_neighbours_alone(decode, value, place):
    _, maps = clean_maps(6, (20, 24), border=6)
    maps = maps.view(2, 3, 20, 24)
    good, confidence = decode(maps)
    bad = maps.clone()
    bad[1, 1, place[0], place[1]] = value
    points, height = decode(bad)
    assert points[1, 1].isnan().all() and height[1, 1] == 0
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[1, 1] = False
    assert torch.equal(points[keep], good[keep]) and torch.equal(height[keep], confidence[keep])


@ALL
def test_maps_without_a_gaussian_have_a_finite_answer(decode):
    maps = torch.zeros(1, 5, 16, 20)
    maps[0, 1], maps[0, 2], maps[0, 3, 7, 9] = 0.5, -0.5, 1  # all zero, constant, negative, one px
    maps[0, 4], maps[0, 4, 7, 9] = -1, 0.1  # negative but for one px
    points, confidence = decode(maps)
    assert points[0].tolist() == [[0, 0], [0, 0], [0, 0], [9, 7], [9, 7]]
    torch.testing.assert_close(confidence, torch.tensor([[0, 0.5, -0.5, 1, 0.1]]))


@ALL
def test_decoders_take_any_float_and_any_layout_and_change_nothing(decode):
    _, maps = clean_maps(6, (20, 24), border=4)
    maps = (maps + 0.02 * torch.randn(maps.shape, generator=seeded())).view(2, 3, 20, 24)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        given = maps.to(dtype)
        before = given.clone()
        points, confidence = decode(given)
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        assert points.dtype == confidence.dtype == wanted and torch.equal(given, before)
        exact, height = decode(given.double())
        torch.testing.assert_close(points.double(), exact, atol=1e-5, rtol=0)
        assert torch.equal(confidence.double(), height)
        for other in (given.to(memory_format=torch.channels_last), given.mT.contiguous().mT,
                      torch.stack([given, given], -1)[..., 1], given.detach().requires_grad_()):
            assert torch.equal(decode(other)[0], points)
    with torch.inference_mode():
        assert torch.equal(decode(maps)[0], decode(maps.clone())[0])
    assert torch.equal(decode(maps[:1].expand(3, -1, -1, -1))[0][2], decode(maps)[0][0])


@ALL
def test_decoders_follow_a_mirrored_map(decode):
    _, maps = clean_maps(60, (21, 26), border=4)
    maps = maps + 0.02 * torch.randn(maps.shape, generator=seeded())
    points, mirrored = decode(maps)[0], decode(maps.flip(3))[0]
    torch.testing.assert_close(mirrored[..., 0], 25 - points[..., 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(mirrored[..., 1], points[..., 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(decode(maps.mT)[0], points.flip(2), atol=1e-5, rtol=0)


@ALL
def test_decoders_refuse_what_is_no_heatmap(decode):
    for bad in (torch.zeros(3, 8, 8), torch.zeros(1, 2, 8, 8).long(), torch.zeros(1, 0, 8, 8)):
        with pytest.raises(ValueError, match=r"expected float \(B, P, h, w\)"):
            decode(bad)
    for size in ((1, 1), (2, 2), (1, 7), (3, 3), (4, 5)):
        points, _ = decode(torch.rand(1, 4, *size, generator=seeded()))
        assert points.isfinite().all() and (points >= 0).all()
        assert (points <= torch.tensor([size[1] - 1, size[0] - 1])).all()


@pytest.mark.parametrize("kernel", [0, 4, -3])
def test_dark_refuses_a_kernel_without_a_middle(kernel):
    with pytest.raises(ValueError, match=f"kernel {kernel}: expected an odd number"):
        hl.decode_dark(torch.rand(1, 1, 8, 8), kernel)


@pytest.mark.parametrize("kind", ["clean", "noise", "mostly negative"])
def test_dark_needs_less_memory_than_its_input(tmp_path, kind):
    """A copy of all maps in float64, as a blur of whole maps makes, would be twice the input."""
    maps = maps_of(kind, (96, 96), 4 * 106).view(4, 106, 96, 96)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        hl.decode_dark(maps)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = [event["args"] for event in events if event.get("name") == "[memory]"]
    live = np.cumsum([event["Bytes"] for event in sorted(events, key=lambda e: e["Ev Idx"])])
    assert len(live) > 50 and live[0] > 0 and live.max() < maps.numel() * maps.element_size()


# ---- The network ---------------------------------------------------------------------------------

@pytest.mark.parametrize("backbone, strategy", [("mobilenetv2_0.25", "SSD"), ("resnet18", "DS")])
def test_forward_and_gradients(backbone, strategy):
    torch.manual_seed(0)
    net = hl.HeatmapNet(backbone, strategy, 12, 16)
    heatmaps = net(torch.randn(4, 3, 64, 96))
    side = 2 * 2 ** len(strategy)
    assert heatmaps.shape == (4, 12, side, 3 * side // 2) and heatmaps.is_contiguous()
    points = torch.tensor([96.0, 64]) * torch.rand(4, 12, 2)
    loss = hl.heatmap_loss(heatmaps, points, net.stride, 2.0)
    assert loss.item() < 1.1  # starts from nearly empty maps
    loss.backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 12, side // 2, side // 2)


def test_heatmaps_leave_autocast_in_float32():
    torch.manual_seed(0)
    net = hl.HeatmapNet("mobilenetv2_0.25", "SSD", 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        features = net.upsample(net.project(net.backbone(torch.randn(2, 3, 32, 32))))
        heatmaps = net(torch.randn(2, 3, 32, 32))
    assert features.dtype == torch.bfloat16 and heatmaps.dtype == torch.float32
    assert not torch.equal(heatmaps, heatmaps.bfloat16())  # not rounded before


def test_a_shuffle_hands_on_a_quarter_of_its_filters_and_the_first_letter_sees_the_smallest_map():
    with torch.device("meta"):
        net = hl.HeatmapNet("mobilenetv2_0.25", "SDS", 29, 64)
    S, D = hl.PixelShuffle, hl.Deconvolution
    assert [type(block) for block in net.upsample] == [S, D, S]
    convs = [block[0] for block in net.upsample]
    assert [layer.in_channels for layer in convs] == [256, 16, 64] and net.head.in_channels == 16
    assert all(layer.bias is None for layer in (net.project, *convs, net.head))
    x = torch.empty(1, 256, 3, 5, device="meta")
    for block, channels in zip(net.upsample, (16, 64, 16)):
        (_, _, h, w), x = x.shape, block(x)
        assert x.shape == (1, channels, 2 * h, 2 * w)


@pytest.mark.parametrize("flags, message", [
    (dict(strategy="SDX"), "--strategy SDX: expected"),
    (dict(strategy=""), "--strategy : expected"),
    (dict(strategy="SSSSSS"), "--strategy SSSSSS: expected one to five letters"),
    (dict(backbone="mobilenetv2_0"), "--backbone mobilenetv2_0: expected resnet18"),
    (dict(backbone="mobilenetv2_0.05"), "a width of 0.1 to 4"),
    (dict(backbone="vgg"), "--backbone vgg: expected")])
def test_networks_that_cannot_be_built_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        hl.HeatmapNet(**flags)


def test_the_loss_and_the_optimiser_fit_eight_faces_to_less_than_the_argmax_can():
    args = hl.parse_args(["--size", "64", "--limit", "8", "--points", "29"])
    data = hl.make_dataset(args, hl.read_faces(args, "train"), augmented=False)
    batch = data.__getitems__([(0, i) for i in range(8)])
    image, target = hl.prepare(batch, CPU), batch["points"]
    torch.manual_seed(0)
    net = hl.HeatmapNet("mobilenetv2_0.25", "SSD", 29, 64)
    optimizer = torch.optim.Adam(net.parameters())
    for step in range(90):
        optimizer.param_groups[0]["lr"] = hl.learning_rate(step, 90, 5e-3)
        heatmaps = net(image)
        optimizer.zero_grad()
        hl.heatmap_loss(heatmaps, target, net.stride, 1.5).backward()
        optimizer.step()
    def error_of(found):  # heatmap px
        return (hl.to_crop(found, net.stride) - target).norm(dim=2).mean()

    floor = error_of(hl.to_heatmap(target, net.stride).round())
    error = {name: error_of(decode(heatmaps.detach())[0]) for name, decode in hl.DECODERS.items()}
    assert error["dark"] < 0.65 * floor < 0.95 * floor < error["argmax"]


# ---- Alignment -----------------------------------------------------------------------------------

def similarities(count, seed=0):
    """Maps (count, 2, 3) float64: any rotation, scales 0.3 to 3, shifts of hundreds of px."""
    rng = np.random.default_rng(seed)
    a, s = rng.uniform(-np.pi, np.pi, count), np.exp(rng.uniform(-1.2, 1.2, count))
    c, n, t = s * np.cos(a), s * np.sin(a), rng.uniform(-300, 300, (count, 2))
    return torch.from_numpy(np.stack([c, -n, t[:, 0], n, c, t[:, 1]], 1).reshape(count, 2, 3))


def test_align_five_finds_the_similarity_that_moved_the_face():
    maps = similarities(50)
    five = warp.apply_affine(warp.invert(maps), hl.REFERENCE_5)
    found = hl.align_five(five)
    torch.testing.assert_close(found, maps, atol=1e-9, rtol=0)
    back = warp.apply_affine(warp.invert(found), hl.REFERENCE_5.expand_as(five))
    torch.testing.assert_close(back, five, atol=1e-8, rtol=0)
    identity = torch.eye(2, 3, dtype=torch.float64)
    torch.testing.assert_close(hl.align_five(hl.REFERENCE_5, 192), identity, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [64, 96, 256])
def test_align_five_scales_with_the_crop_about_its_corner(size):
    placed = warp.apply_affine(hl.align_five(hl.REFERENCE_5, size), hl.REFERENCE_5)
    torch.testing.assert_close(placed, (hl.REFERENCE_5 + 0.5) * size / 192 - 0.5)
    middle = hl.align_five(hl.REFERENCE_5, size) @ torch.tensor([95.5, 95.5, 1]).double()
    torch.testing.assert_close(middle, torch.full((2,), (size - 1) / 2).double())


def test_align_five_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match=r"expected \(..., 5, 2\)"):
        hl.align_five(torch.ones(4, 2))
    five = hl.REFERENCE_5.repeat(3, 1, 1)
    five[1] = 7.0
    with pytest.raises(ValueError, match=r"points\[1\]: 5 points, 1 of them distinct"):
        hl.align_five(five)
    with pytest.raises(UserError, match=r"7 landmarks are no known scheme \(5, 19, .*--align box"):
        hl.five_of(torch.zeros(2, 7, 2))


def test_align_five_is_a_least_squares_fit():
    five = 30 * torch.randn(5, 2, generator=seeded(), dtype=torch.float64) + 100
    best = hl.align_five(five)
    left = lambda m: (warp.apply_affine(m, five) - hl.REFERENCE_5).square().sum()
    p, q, x, y = best[0, 0], best[1, 0], best[0, 2], best[1, 2]
    steps = 1e-3 * torch.eye(4, dtype=torch.float64)
    for change in torch.cat([steps, -steps]).tolist():
        a, b, c, d = (value + step for value, step in zip((p, q, x, y), change))
        assert left(torch.stack([torch.stack([a, -b, c]), torch.stack([b, a, d])])) > left(best)


@pytest.mark.parametrize("size", [96, 192])
def test_image_and_landmarks_come_to_the_same_place(size):
    """A soft dot at each of the five points of a turned face is found where the map sends it."""
    turned = torch.tensor([[[1.1, -0.4, 60], [0.4, 1.1, 20]]]).double()
    points = warp.apply_affine(turned, hl.REFERENCE_5)[0] + torch.randn(5, 2, generator=seeded())
    y, x = np.mgrid[:320, :320]
    dots = sum(np.exp(-((x - px) ** 2 + (y - py) ** 2) / 18) for px, py in points.tolist())
    image = np.repeat((255 * np.clip(dots, 0, 1)).astype(np.uint8)[..., None], 3, 2)
    face = datasets.Face(image, points.float().numpy())
    args = hl.parse_args(["--size", str(size), "--points", "5", "--five-noise", "0"])
    data = hl.make_dataset(args, [face], augmented=False)
    crop = data.__getitems__([(0, 0)])["image"][0, ..., 0].double().numpy()
    placed = data.crop_points()[0]
    reference = (hl.REFERENCE_5 + 0.5) * size / 192 - 0.5
    assert 0.1 < (placed - reference).norm(dim=1).max() < 3
    for px, py in placed.tolist():
        x0, y0 = round(px) - size // 16, round(py) - size // 16
        patch = crop[y0:y0 + size // 8 + 1, x0:x0 + size // 8 + 1]
        y, x = np.mgrid[y0:y0 + size // 8 + 1, x0:x0 + size // 8 + 1]
        assert abs((patch * x).sum() / patch.sum() - px) < 0.1
        assert abs((patch * y).sum() / patch.sum() - py) < 0.1


# ---- Five points, first and second crops ---------------------------------------------------------

@pytest.mark.parametrize("count", datasets.SCHEMES)
def test_five_points_are_eyes_nose_and_mouth_of_each_scheme(count):
    points = np.stack([face.points for face in synthetic.read_faces("test", 3, 256, count)])
    truth = np.stack([face.points for face in synthetic.read_faces("test", 3, 256, 5)])
    found = hl.five_of(points)
    assert found.shape == (3, 5, 2) and isinstance(found, np.ndarray)
    assert np.linalg.norm(found - truth, axis=2)[:, [0, 1, 3, 4]].max() < 12  # 194 has no nose tip
    as_tensor = hl.five_of(torch.from_numpy(points)[None])
    np.testing.assert_allclose(as_tensor[0], found, rtol=1e-6)


def drawn_args(*flags):
    return hl.parse_args(["--size", "64", "--points", "29", "--limit", "24", *flags])


def test_rough_points_are_the_same_in_every_run_and_as_noisy_as_the_flag_says():
    faces = synthetic.read_faces("test", 300, 64, 29)
    true = hl.five_of(np.stack([face.points for face in faces]).astype(np.float64))
    lengths = [true[:, 1] - true[:, 0], true[:, :2].mean(1) - true[:, 3:].mean(1)]
    scale = np.linalg.norm(lengths, axis=2).max(0)[:, None, None]
    unit = (hl.rough_five(drawn_args("--five-noise", "1"), faces) - true) / scale
    for level in (0.03, 0.1):
        flags = ["--five-noise", str(level)]
        rough = hl.rough_five(drawn_args(*flags), faces)
        noise = (rough - true) / scale
        assert noise.std() == pytest.approx(level, rel=0.05) and abs(noise.mean()) < 0.1 * level
        assert np.array_equal(rough, hl.rough_five(drawn_args(*flags, "--seed", "3"), faces))
        assert np.array_equal(rough[:20], hl.rough_five(drawn_args(*flags), faces[:20]))
        np.testing.assert_allclose(noise / level, unit, atol=1e-9)  # the same draws
    assert np.array_equal(hl.rough_five(drawn_args("--five-noise", "0"), faces), true)


def test_points_of_a_detector_are_found_by_path_and_by_face(tmp_path):
    drawn = synthetic.read_faces("test", 4, 64, 29)
    names = ["a/one.jpg", "a/two.jpg", "a/two.jpg", "b c.jpg"]  # two faces in one image
    faces = [datasets.Face(str(tmp_path / "set" / name), face.points + 100 * i)
             for i, (name, face) in enumerate(zip(names, drawn))]
    true = hl.five_of(np.stack([face.points for face in faces]))
    rows = [(names[i], true[i] + shift) for i, shift in ((2, 3), (0, 1), (1, 2))]
    lines = [",".join([name, *(f"{v:.3f}" for v in five.ravel())]) for name, five in rows]
    (tmp_path / "five.csv").write_text("image,x0,y0,x1,y1\n" + "\n".join(lines))
    flags = ["--data", "folder", "--data-root", str(tmp_path / "set"),
             "--five", str(tmp_path / "five.csv")]
    args = hl.parse_args([*flags, "--five-noise", "0.1"])
    with pytest.warns(UserWarning, match="no points for 1 of 4 faces, the first is b c.jpg"):
        rough = hl.rough_five(args, faces)
    np.testing.assert_allclose(rough[:3], true[:3] + np.array([1, 2, 3])[:, None, None], atol=1e-3)
    other = hl.rough_five(hl.parse_args([*flags[:4], "--five-noise", "0.1"]), faces)
    assert np.array_equal(rough[3], other[3]) and not np.allclose(other[3], true[3])
    torch.testing.assert_close(torch.from_numpy(hl.first_crops(args, faces[:3], "five")),
                               hl.align_five(rough[:3], args.size))
    with pytest.raises(UserError, match=r"none of its images \(a/two.jpg.*the set's \(b c.jpg"):
        hl.rough_five(args, faces[3:])
    faces[3].image = faces[0].image  # 300 px away: the points of its neighbour are not its own
    with pytest.warns(UserWarning, match="no points for 1 of 2 faces, the first is a/one.jpg"):
        rough = hl.rough_five(args, [faces[0], faces[3]])
    without = hl.parse_args([*flags[:4], "--five-noise", "0.1"])
    assert np.array_equal(rough[1], hl.rough_five(without, faces[2:])[1])
    with pytest.raises(UserError, match="none of its images"):  # drawn faces have no file
        hl.rough_five(drawn_args("--five", str(tmp_path / "five.csv")), drawn)


def test_a_face_whose_five_points_coincide_is_named(tmp_path):
    good, = synthetic.read_faces("test", 1, 64, 29)
    flat = datasets.Face(str(tmp_path / "b.png"), np.full((29, 2), 7, np.float32))
    with pytest.raises(ValueError, match="b.png: its eyes, nose tip and mouth corners coincide"):
        hl.first_crops(drawn_args("--five-noise", "0"), [good, flat], "five")


@pytest.mark.parametrize("align", ["two-pass", "box"])
def test_the_second_crop_follows_a_good_answer_and_keeps_the_first_crop_after_a_bad_one(align):
    args = drawn_args("--align", align)
    faces = synthetic.read_faces("test", 4, 64, 29)
    points = torch.from_numpy(np.stack([face.points for face in faces])).double()
    matrices = torch.from_numpy(hl.first_crops(args, faces, "box")) + 0.01
    answer = points.clone()
    answer[1] = torch.tensor([30.0, 40.0])  # one place
    answer[2, 16] = math.nan  # an eye
    found = hl.next_crops(args, answer, matrices)
    good = torch.from_numpy(hl.first_crops(args, faces, "box"))  # by the box of true landmarks
    if align == "two-pass":
        good = hl.align_five(hl.five_of(points), 64)
    torch.testing.assert_close(found[[0, 3]], good[[0, 3]])
    assert torch.equal(found[[1, 2]], matrices[[1, 2]])


@pytest.mark.parametrize("off", [0.0, 0.01])
def test_an_answer_seen_in_a_mirror_keeps_the_first_crop(off):
    """No rotation brings it to the reference: the best scale is about 0, the crop endless."""
    middle = hl.REFERENCE_5.mean(0)
    centred = hl.REFERENCE_5 - middle
    wide, high = centred.square().sum(0)
    five = middle + centred * torch.tensor([-float(high / wide), 1]) + off * torch.eye(5, 2)
    assert not hl.is_face(five[None]) and hl.is_face(hl.REFERENCE_5[None])
    matrices = torch.tensor([[[1.0, 0, 5], [0, 1, 6]]]).double()
    args = hl.parse_args(["--size", "64", "--points", "5", "--align", "two-pass"])
    assert torch.equal(hl.next_crops(args, five[None], matrices), matrices)


# ---- The bag of tricks ---------------------------------------------------------------------------

TRICKS = dict(rotate=15.0, scale=0.1, shift=20.0, lighting=0.05, jitter=0.4, erase=0.5)


def drawn_tricks(seed, size=192, **tricks):
    """What `augment` draws, by trick: degrees, factor, px, PCA weights, factors, order, box."""
    matrix, mirror, extras = hl.augment(np.random.default_rng(seed), size, **tricks)
    assert not mirror and matrix.shape == (2, 3) and set(extras) == {"colour", "erase"}
    angle = math.degrees(math.atan2(matrix[0, 1], matrix[0, 0]))
    middle = np.full(2, (size - 1) / 2)
    return {"rotate": angle, "scale": math.sqrt(np.linalg.det(matrix[:, :2])),
            "shift": matrix @ [*middle, 1] - middle, "lighting": extras["colour"][:3],
            "jitter": extras["colour"][3:6], "order": extras["colour"][6:],
            "erase": extras["erase"]}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_trick_leaves_the_draws_of_the_others_alone(trick):
    hidden = 0
    for seed in range(20):
        every, none, alone = drawn_tricks(seed, **TRICKS), drawn_tricks(seed), \
            drawn_tricks(seed, **{trick: TRICKS[trick]})
        for name in every:
            wanted = every if name == trick else none
            np.testing.assert_allclose(alone[name], wanted[name], atol=1e-9)
        assert np.array_equal(every["order"], none["order"])
        hidden += every["erase"][0] >= 0
    assert 4 < hidden < 16


@pytest.mark.parametrize("size", [192, 96])
def test_tricks_stay_within_what_the_flags_say(size):
    drawn = [drawn_tricks(seed, size, **TRICKS) for seed in range(300)]
    angles, scales = (np.array([d[name] for d in drawn]) for name in ("rotate", "scale"))
    shifts = np.array([d["shift"] for d in drawn]) * 192 / size
    assert 14 < np.abs(angles).max() <= 15 and abs(angles.mean()) < 2
    assert 0.9 <= scales.min() < 0.91 and 1.09 < scales.max() <= 1.1
    assert 19 < np.abs(shifts).max() <= 20
    factors = np.array([d["jitter"] for d in drawn])
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
    assert np.array([d["lighting"] for d in drawn]).std() == pytest.approx(0.05, rel=0.1)
    assert len({tuple(d["order"]) for d in drawn}) == 6
    boxes = np.array([d["erase"] for d in drawn if d["erase"][0] >= 0])
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    assert 110 < len(boxes) < 190 and boxes.min() >= 0 and boxes.max() <= size
    assert 0.02 <= (w * h / size**2).min() < 0.03 and 0.14 < (w * h / size**2).max() <= 0.15 + 1e-9
    assert np.abs(np.log(w / h)).max() <= 1.2 + 1e-9


@pytest.mark.parametrize("tricks", ["--rotate 15", "--rotate 90",
                                    "--rotate 20 --scale 0.2 --shift 30"])
def test_the_source_of_a_crop_holds_all_that_the_tricks_can_look_at(tricks):
    args = drawn_args("--limit", "40", *tricks.split())
    data = hl.make_dataset(args, hl.read_faces(args, "train"), augmented=True)
    keys = [(epoch, i) for epoch in range(5) for i in range(40)]
    batch, maps = data.geometry(keys)
    corners = torch.tensor([[-0.5, -0.5], [63.5, -0.5], [-0.5, 63.5], [63.5, 63.5]]).double()
    seen = warp.apply_affine(warp.invert(maps), corners.expand(len(keys), 4, 2))
    side = torch.from_numpy(data.regions.side)[batch["index"]]
    assert seen.min() >= -0.5 and (seen.amax((1, 2)) <= side - 0.5).all()


def test_flip_copies_are_the_set_and_then_its_mirror_image():
    args = drawn_args("--flip-copies", "--rotate", "0", "--limit", "12")
    faces = hl.read_faces(args, "train")
    data = hl.make_dataset(args, faces, augmented=True)
    assert len(data) == 24 and len(hl.make_dataset(args, faces, augmented=False)) == 12
    assert len(hl.make_dataset(drawn_args("--no-flip-copies"), faces, augmented=True)) == 12
    first, second = (data.__getitems__([(3, i + start) for i in range(12)]) for start in (0, 12))
    assert torch.equal(first["index"], torch.arange(12))
    assert torch.equal(second["index"], torch.arange(12))
    plain = hl.make_dataset(args, faces, augmented=False)  # which half is the mirror image
    torch.testing.assert_close(first["points"], plain.crop_points(), atol=1e-3, rtol=0)
    difference = first["image"].flip(2).float() - second["image"].float()
    assert difference.abs().mean() < 0.5 and difference.abs().max() <= 8  # cv2 rounds to 1/32 px
    flip = list(datasets.SCHEMES[29].flip)
    mirrored = first["points"][:, flip]
    mirrored[..., 0] = 63 - mirrored[..., 0]
    torch.testing.assert_close(second["points"], mirrored, atol=1e-3, rtol=0)
    for batch in (first, second):
        five = hl.five_of(batch["points"])
        assert (five[:, 0, 0] < five[:, 1, 0]).all() and (five[:, 3, 0] < five[:, 4, 0]).all()
    again = hl.make_dataset(args, faces, augmented=True).__getitems__([(3, 23), (3, 0)])
    assert torch.equal(again["image"][0], second["image"][11]) and torch.equal(again["colour"][1],
                                                                              first["colour"][0])
    assert not torch.equal(first["colour"], second["colour"])  # a copy has tricks of its own


def coloured(pixels, draws):
    """The tricks one by one on an image (H, W, 3) float64, as GluonCV and AlexNet have them."""
    grey = np.array([0.299, 0.587, 0.114])
    for kind in draws[6:].astype(int):
        f = draws[3 + kind]
        other = [0, (pixels @ grey).mean(), (pixels @ grey)[..., None]][kind]
        pixels = f * pixels + (1 - f) * other
    values = np.array([55.46, 4.794, 1.148])
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140],
                        [-0.5836, -0.6948, 0.4203]])
    return pixels + vectors @ (draws[:3] * values)


def colour_draws(count, **tricks):
    tricks = dict(lighting=0.5, jitter=0.4) | tricks
    drawn = (hl.augment(np.random.default_rng(seed), 64, **tricks)[2] for seed in range(count))
    return np.stack([extras["colour"] for extras in drawn])


def test_the_colour_map_is_the_tricks_one_after_another():
    draws = colour_draws(12)
    images = np.random.default_rng(0).integers(0, 256, (12, 9, 7, 3)).astype(float)
    M, t = hl.colour_map(torch.from_numpy(draws).float(),
                         torch.from_numpy(images.mean((1, 2))).float())
    assert len({tuple(order) for order in draws[:, 6:]}) >= 4
    for b in range(12):
        found = images[b] @ M[b].numpy().T + t[b].numpy()
        np.testing.assert_allclose(found, coloured(images[b], draws[b]), atol=1e-3)


def test_prepare_normalises_and_colours():
    image = torch.randint(0, 256, (6, 10, 12, 3), dtype=torch.uint8, generator=seeded())
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    plain = hl.prepare({"image": image}, CPU)
    assert plain.dtype == torch.float32 and plain.shape == (6, 3, 10, 12)
    assert plain.is_contiguous(memory_format=torch.channels_last)
    wanted = (image.numpy() / 255 - mean) / std
    np.testing.assert_allclose(plain.permute(0, 2, 3, 1), wanted, atol=1e-5)
    nothing = torch.from_numpy(colour_draws(6, lighting=0, jitter=0)).float()
    same = hl.prepare({"image": image, "colour": nothing}, CPU)
    torch.testing.assert_close(same, plain, atol=1e-5, rtol=0)
    draws = colour_draws(6)
    batch = {"image": image, "colour": torch.from_numpy(draws).float()}
    out = hl.prepare(batch, CPU)
    for b in range(6):  # nothing is clipped in between
        wanted = (coloured(image[b].double().numpy(), draws[b]) / 255 - mean) / std
        np.testing.assert_allclose(out[b].permute(1, 2, 0), wanted, atol=2e-5)
    on_device = batch | {"image": image.permute(0, 3, 1, 2).float()}  # as of the DeviceLoader
    torch.testing.assert_close(hl.prepare(on_device, CPU), out, atol=1e-6, rtol=0)


def test_erasing_hides_a_box_when_asked_and_moves_no_landmark():
    image = torch.randint(0, 256, (2, 10, 12, 3), dtype=torch.uint8, generator=seeded())
    batch = {"image": image, "erase": torch.tensor([[2.5, 3, 6, 7.5], [-1] * 4]),
             "points": torch.rand(2, 5, 2, generator=seeded())}
    points, plain = batch["points"].clone(), hl.prepare({"image": image}, CPU)
    out = hl.prepare(batch, CPU, erase=True)
    for y in range(10):
        for x in range(12):
            hidden = 2.5 <= x < 6 and 3 <= y < 7.5
            assert torch.equal(out[0, :, y, x], torch.zeros(3) if hidden else plain[0, :, y, x])
    assert torch.equal(out[1], plain[1]) and torch.equal(hl.prepare(batch, CPU), plain)
    assert torch.equal(batch["points"], points)


# ---- Flip test -----------------------------------------------------------------------------------

class Mirror(nn.Module):
    """A network that mirrors with its input: one map is the left half of the image's first channel,
    one its right half, and one the second channel."""
    stride, points = 1, 3

    def forward(self, image):
        left = torch.arange(image.shape[3]) < image.shape[3] / 2
        return torch.stack([image[:, 0] * left, image[:, 0] * ~left, image[:, 1]], 1)


class Still(nn.Module):
    """Answers the image and its mirror image with fixed maps."""
    stride, points = 2, 3

    def __init__(self, first, second):
        super().__init__()
        self.maps = torch.cat([hl.gaussian_heatmaps(p, 32, 2, 2.0) for p in (first, second)])

    def forward(self, image):
        return self.maps[:len(image)]


def test_a_flip_test_changes_nothing_for_a_network_that_mirrors_with_its_input():
    points = torch.tensor([[[9.3, 20], [40.2, 23]], [[12.1, 30], [35, 12]]])
    channel = hl.gaussian_heatmaps(points, 48, 1, 2.0).amax(1)
    third = hl.gaussian_heatmaps(points[:, :1] + 5, 48, 1, 2.0)[:, 0]
    image = torch.stack([channel, third, channel], 1)
    plain, confidence = hl.predict_points(Mirror(), image)
    for kind in ("coordinates", "heatmaps"):
        found, height = hl.predict_points(Mirror(), image, flip_test=kind, flip=(1, 0, 2))
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=0)
        torch.testing.assert_close(height, confidence)
    assert (plain[:, :2] - points).abs().max() < 0.05


def test_the_flip_test_of_coordinates_is_the_mean_of_two_answers():
    first = torch.tensor([[[18.0, 15], [40, 16], [20, 30]]])
    second = torch.tensor([[[20.0, 17], [42, 12], [29, 32]]])
    net, image = Still(first, second), torch.zeros(1, 3, 64, 64)
    found, confidence = hl.predict_points(net, image, flip_test="coordinates", flip=(1, 0, 2))
    back = torch.stack([63 - second[..., 0], second[..., 1]], -1)[:, [1, 0, 2]]
    torch.testing.assert_close(found, (first + back) / 2, atol=1e-2, rtol=0)
    heights = net.maps.amax((2, 3))
    torch.testing.assert_close(confidence, (heights[:1] + heights[1:, [1, 0, 2]]) / 2)
    torch.testing.assert_close(hl.predict_points(net, image)[0], first, atol=1e-2, rtol=0)
    of_maps, _ = hl.predict_points(net, image, flip_test="heatmaps", flip=(1, 0, 2))
    mean = (net.maps[:1] + net.maps[1:].flip(3)[:, [1, 0, 2]]) / 2
    torch.testing.assert_close(of_maps, hl.to_crop(hl.decode_dark(mean)[0], 2))
    assert (of_maps - found).abs().max() > 3  # where the two differ, one of them wins
    for decode in hl.DECODERS:
        exact = hl.to_crop(hl.DECODERS[decode](net.maps[:1])[0], 2)
        torch.testing.assert_close(hl.predict_points(net, image, decode)[0], exact)


# ---- Evaluation ----------------------------------------------------------------------------------

class Oracle(nn.Module):
    """Answers the faces of a set, asked in order, with perfect heatmaps, moved by `shift` px."""

    def __init__(self, data=None, stride=2, sigma=2.0, shift=0.0):
        super().__init__()
        self.stride, self.sigma, self.shift, self.head = stride, sigma, shift, nn.Conv2d(1, 1, 1)
        self.watch(data)

    def watch(self, data):
        if data is not None:
            self.truth, self.size, self.calls = data.crop_points(), data.size, 0
            self.points = self.truth.shape[1]

    def forward(self, image):
        half = len(image) // 2
        mirrored = len(image) % 2 == 0 and torch.equal(image[:half].flip(3), image[half:])
        count = half if mirrored else len(image)  # of a flip test, or not
        rows = torch.arange(self.calls, self.calls + count) % len(self.truth)
        self.calls += count
        maps = hl.gaussian_heatmaps(self.truth[rows] + torch.tensor([self.shift, 0.0]),
                                    self.size // self.stride, self.stride, self.sigma)
        if mirrored:
            maps = torch.cat([maps, maps.flip(3)[:, datasets.SCHEMES[self.points].flip]])
        return maps


def oracle_of(*flags, **options):
    """An oracle for drawn test faces, the loader of these, and the flags."""
    args = drawn_args("--size", "96", "--kernel", "7", "--batch-size", "7", *flags)
    data = hl.make_dataset(args, hl.read_faces(args, "test"), augmented=False)
    loader = datasets.make_loader(data, datasets.in_order(24, 7), 0, CPU)
    return Oracle(data, **options), loader, args


def test_evaluate_is_equation_4_in_image_pixels_and_by_subset():
    net, loader, args = oracle_of("--norm", "box", "--threshold", "0.08")
    perfect, _, points, _ = hl.evaluate(net, loader, args)
    data = loader.dataset
    torch.testing.assert_close(points, data.points, atol=0.2, rtol=0)  # the blur feels the border
    assert perfect["nme"] < 5e-4 and perfect["fr"] == 0 and perfect["auc"] > 0.993
    moved, errors = hl.evaluate(Oracle(data, shift=2.0), loader, args)[:2]
    for i, face in enumerate(data.faces):
        x, y = face.points.T.astype(np.float64)
        d = np.sqrt(np.ptp(x) * np.ptp(y))
        scale = float(torch.linalg.det(data.crop_matrices[i, :, :2])) ** 0.5
        assert float(errors[i]) == pytest.approx(2 / scale / d, abs=2e-3)
    for tag in {tag for face in data.faces for tag in face.tags}:
        chosen = errors[[tag in face.tags for face in data.faces]]
        assert moved[f"nme/{tag}"] == pytest.approx(float(chosen.mean()))
    assert moved["fr"] == 0 and moved["auc"] + moved["nme"] / 0.08 == pytest.approx(1)
    args.threshold = 0.02
    strict = hl.evaluate(Oracle(data, shift=2.0), loader, args)[0]
    assert strict["fr"] == pytest.approx(float((errors > 0.02).double().mean()))
    assert strict["auc"] == pytest.approx(float((1 - errors / 0.02).clamp(min=0).mean()))


@pytest.mark.parametrize("stride, flags", [(2, ""), (4, ""), (2, "--align box --margin 0.9")])
def test_the_floor_is_what_the_argmax_of_perfect_heatmaps_scores(stride, flags):
    net, loader, args = oracle_of("--decode", "argmax", *flags.split(), stride=stride)
    scores = hl.evaluate(net, loader, args)[0]
    outside = (net.truth < -0.5) | (net.truth > 95.5)
    assert outside.any() == bool(flags)  # such a landmark is sought at the map's edge
    assert scores["nme"] == pytest.approx(scores["nme/perfect argmax"], rel=1e-6)
    assert 0.005 < scores["nme/perfect argmax"] < 0.1


def test_the_mean_crop_and_the_spread_are_of_the_crops():
    net, loader, args = oracle_of()
    scores = hl.evaluate(net, loader, args)[0]
    data = loader.dataset
    crops = np.stack([face.points @ matrix[:, :2].T + matrix[:, 2]
                      for face, matrix in zip(data.faces, data.crop_matrices.numpy())])
    mean = crops.mean(0)
    spread = np.sqrt(((crops - mean) ** 2).sum(2).mean(0)).mean()
    assert scores["spread"] == pytest.approx(spread / 96, rel=1e-5)
    scale = np.sqrt(np.linalg.det(data.crop_matrices[:, :, :2].numpy()))
    d = datasets.normaliser(data.points, "box").numpy()
    error = np.linalg.norm(crops - mean, axis=2).mean(1) / scale / d
    assert scores["nme/mean face"] == pytest.approx(error.mean(), rel=1e-4)


def test_the_flip_test_of_a_whole_set_permutes_the_landmarks_back():
    net, loader, args = oracle_of("--flip-test", "coordinates")
    scores = hl.evaluate(net, loader, args)[0]  # a wrong permutation or side would cost far more
    assert scores["nme"] < 5e-4


def watch(monkeypatch, see):
    """Shows every dataset that is made from now on to `see`."""
    original = datasets.CropDataset.__init__

    def made(self, *given, **named):
        original(self, *given, **named)
        see(self)

    monkeypatch.setattr(datasets.CropDataset, "__init__", made)


def answering(monkeypatch, answers=None):
    """Any network answers the crops of the dataset made last, asked in order, with (M, P, 2) px of
    their images, or else with the true points; returns the datasets."""
    seen, asked = [], []
    watch(monkeypatch, lambda data: (seen.append(data), asked.clear()))

    def answer(net, image, *given, **named):
        points = seen[-1].points if answers is None else answers
        rows = (len(asked) + torch.arange(len(image))) % len(points)
        asked.extend(rows.tolist())
        crop = warp.apply_affine(seen[-1].crop_matrices, points)[rows].float()
        return crop, torch.ones(crop.shape[:2])

    monkeypatch.setattr(hl, "predict_points", answer)
    return seen


def test_after_a_good_first_look_two_passes_see_what_five_points_see(monkeypatch):
    _, aligned, args_of_five = oracle_of("--five-noise", "0")
    net, loader, args = oracle_of("--align", "two-pass", sigma=1.5)
    assert (loader.dataset.crop_matrices - aligned.dataset.crop_matrices).abs().max() > 0.05
    made = []
    watch(monkeypatch, lambda data: made.append(data) or net.watch(data))
    scores, _, points, used = hl.evaluate(net, loader, args)
    second, = made
    assert used is second  # the pictures show what was evaluated
    wanted = aligned.dataset.crop_points()
    torch.testing.assert_close(second.crop_points(), wanted, atol=0.05, rtol=0)
    torch.testing.assert_close(points, aligned.dataset.points, atol=0.2, rtol=0)
    assert scores["nme"] < 1e-3 and scores["nme/first pass"] < 1e-2 and scores["spread"] == pytest.approx(
        hl.evaluate(Oracle(aligned.dataset), aligned, args_of_five)[0]["spread"], rel=1e-2)
    images = [data.__getitems__([(0, i) for i in range(24)])["image"].float() for data in
              (second, aligned.dataset)]
    assert (images[0] - images[1]).abs().mean() < 1


def test_a_network_for_two_passes_learns_both_crops():
    args = drawn_args("--align", "two-pass", "--no-flip-copies")
    faces = hl.read_faces(args, "train")
    both = hl.make_dataset(args, faces, augmented=True)
    args.five_noise = 0.0
    alone = [torch.from_numpy(hl.first_crops(args, faces, align)) for align in ("five", "box")]
    assert torch.equal(both.crop_matrices, torch.cat(alone)) and len(both) == 48
    keywords = both.augment.keywords
    assert (keywords["rotate"], keywords["scale"], keywords["shift"]) == (10, 0.1, 6)
    args.rotate = 20.0  # what is more, stays
    assert hl.make_dataset(args, faces, augmented=True).augment.keywords["rotate"] == 20


# ---- Train, evaluate, use ------------------------------------------------------------------------

TINY = ["--size", "64", "--backbone", "mobilenetv2_0.25", "--strategy", "SSD", "--filters", "16",
        "--sigma", "1.5", "--lr", "0.01", "--limit", "16", "--batch-size", "8", "--epochs", "3",
        "--device", "cpu", "--points", "29", "--eval-every", "2"]


def test_the_papers_settings():
    """Sec. 3.3, 5.1 and Table 5."""
    args = hl.parse_args(["--data", "jd106"])
    assert (args.size, args.epochs, args.batch_size, args.lr) == (192, 40, 16, 1e-3)
    assert (args.backbone, args.strategy, args.filters) == ("mobilenetv2_1.0", "SDD", 128)
    assert (args.lighting, args.jitter, args.scale, args.shift) == (0.05, 0.4, 0, 0)
    assert args.flip_copies and args.flip_test == "coordinates" and args.decode == "dark"
    assert (args.norm, args.threshold, args.align) == ("box", 0.08, "five")
    assert (args.sigma, args.kernel) == (2, 11)


@pytest.mark.parametrize("flags, kernel", [("--sigma 1", 5), ("--sigma 1.5", 7), ("--sigma 2", 11),
                                           ("--sigma 0.1", 1), ("--sigma 90", 33),
                                           ("--sigma 2 --kernel 7", 7)])
def test_the_blur_is_about_five_sigma_wide_and_odd(flags, kernel):
    assert hl.parse_args(flags.split()).kernel == kernel


def test_learning_rate_falls_tenfold_after_half_and_after_three_quarters():
    rates = [hl.learning_rate(step, 400, 0.001) for step in (0, 199, 200, 299, 300, 399)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


@pytest.mark.parametrize("flags, message", [
    ("--strategy SDX", "--strategy SDX: expected one to five letters"),
    ("--backbone alexnet", "--backbone alexnet: expected resnet18"),
    ("--filters 6", "6: expected a multiple of 4"), ("--kernel 4", "invalid choice"),
    ("--erase 2", "expected a number"), ("--rotate 190", "expected a number"),
    ("--align-out tests", "tests is not an empty folder"),
    ("--align-out new", "--align-out new: give --predict or --eval"),
    ("--five README.md --align box", "--five README.md: --align box looks at no points of"),
    ("--align-out new --output new --eval x.pt", "--align-out new is --output too")])
def test_flags_that_cannot_be_meant_are_named(flags, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        hl.parse_args(flags.split())
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, in process: its folder and numbers."""
    folder = tmp_path_factory.mktemp("run") / "a"
    return folder, hl.train(hl.parse_args([*TINY, "--output", str(folder)]))


def evaluated(folder, *flags):
    return hl.train(hl.parse_args(["--eval", str(folder / "last.pt"), "--device", "cpu", *flags]))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_log_checkpoint_and_pictures(finished):
    folder, result = finished
    rows = log_of(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([1e-2, 1e-3, 1e-4])
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"] < 1.1 and result["nme"] < 0.4
    assert rows[-1]["nme"] == result["nme"] and "nme" in rows[1] and "nme" not in rows[0]
    for name in ("alignment.png", "heatmaps.png", "predictions.png", "ced.png"):
        assert cv2.imread(str(folder / name)) is not None
    tracked = run.load(folder / "last.pt", "heatmap_landmarks")["model"][
        "backbone.features.0.1.num_batches_tracked"]
    assert tracked == 3 * 32 // 8  # an evaluation is followed by training; mirrored copies count


def test_eval_repeats_the_numbers_and_asks_the_network_as_the_flags_say(finished, capsys):
    folder, result = finished
    again = evaluated(folder)
    for key in ("nme", "auc", "nme/perfect argmax", "nme/mean face", "spread"):
        assert again[key] == pytest.approx(result[key], rel=1e-6)
    text = capsys.readouterr().out
    assert "NME (%)" in text and "true five points" in text and "16 x 16 heatmaps" in text
    other = evaluated(folder, "--decode", "argmax", "--flip-test", "heatmaps", "--limit", "8")
    assert other["nme"] != result["nme"]
    assert "decoded by argmax, flip test: heatmaps" in capsys.readouterr().out
    assert evaluated(folder, "--align", "box")["spread"] > 1.5 * result["spread"]
    assert math.isfinite(evaluated(folder, "--align", "two-pass", "--box", "face")["nme"])
    assert "landmarks box x 1.6" in (text := capsys.readouterr().out) and "then five points" in text
    face = synthetic.read_faces("test", 1, size=64, points=68)[0]
    for split in ("train", "test"):
        written(datasets.load_image(face.image), folder / "68" / split / "a.png")
        datasets.write_pts(folder / "68" / split / "a.pts", face.points)
    with pytest.raises(UserError, match="has 29 landmarks, the faces of --data folder have 68"):
        evaluated(folder, "--data", "folder", "--data-root", str(folder / "68"))


def test_two_epochs_and_one_more_are_three_bit_for_bit(finished, tmp_path):
    shorter = [*TINY, "--output", str(tmp_path)]
    args = hl.parse_args(shorter)
    with pytest.MonkeyPatch.context() as patch:  # stopped after its second checkpoint
        due = run.Job.due
        patch.setattr(run.Job, "due", lambda job, epoch: due(job, epoch) if epoch < 2 else stop())
        with pytest.raises(KeyboardInterrupt):
            hl.train(args)
    assert run.load(tmp_path / "last.pt", "heatmap_landmarks")["epoch"] == 2
    hl.train(hl.parse_args(["--resume", "--output", str(tmp_path), "--device", "cpu"]))
    whole, broken = (run.load(folder / "last.pt", "heatmap_landmarks")
                     for folder in (finished[0], tmp_path))
    assert all(torch.equal(whole["model"][name], broken["model"][name]) for name in whole["model"])
    for i, moments in whole["optimizer"]["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[name], broken["optimizer"]["state"][i][name])
    for a, b in zip(log_of(finished[0]), log_of(tmp_path), strict=True):
        assert all(a.get(key) == b.get(key) for key in ("epoch", "loss", "lr", "nme"))
    (tmp_path / "ced.png").unlink()  # killed after its last checkpoint, a run still gets its table
    again = hl.train(hl.parse_args(["--resume", "--output", str(tmp_path), "--device", "cpu"]))
    assert again["nme"] == pytest.approx(finished[1]["nme"]) and (tmp_path / "ced.png").exists()


def stop():
    raise KeyboardInterrupt


def test_erasing_begins_late(tmp_path, monkeypatch):
    asked = []
    prepare = hl.prepare

    def watched(batch, device, erase=False):
        asked.append(("erase" in batch, erase))
        return prepare(batch, device, erase)

    monkeypatch.setattr(hl, "prepare", watched)
    hl.train(hl.parse_args([*TINY, "--limit", "8", "--no-flip-copies", "--output", str(tmp_path),
                            "--erase", "0.5", "--erase-from", "0.5"]))
    assert [erase for trained, erase in asked if trained] == [False, False, True]
    assert not any(erase for trained, erase in asked if not trained)  # test faces are never hidden


def test_landmarks_of_no_scheme_train_on_box_crops(tmp_path):
    """A set of --data folder with seven of the drawn landmarks, an order that nobody knows."""
    for split in ("train", "test"):
        for i, face in enumerate(synthetic.read_faces(split, 8, 64, 29)):
            written(datasets.load_image(face.image), tmp_path / "set" / split / f"{i}.png")
            few = face.points[[16, 17, 20, 22, 23, 28, 0]]
            datasets.write_pts(tmp_path / "set" / split / f"{i}.pts", few)
    flags = ["--data", "folder", "--data-root", str(tmp_path / "set"), *TINY, "--epochs", "1",
             "--output", str(tmp_path / "run")]
    added = ["--no-flip-copies", "--flip-test", "none", "--align", "box"]
    with pytest.raises(UserError, match="7 landmarks are no known scheme") as error:
        hl.train(hl.parse_args(flags))
    assert all(f"add {cure}" in str(error.value) for cure in (
        "--align box", "--no-flip-copies", "--flip-test none"))
    assert not (tmp_path / "run").exists()
    result = hl.train(hl.parse_args([*flags, *added]))
    assert evaluated(tmp_path / "run")["nme"] == pytest.approx(result["nme"])
    for flag, value in (("--align", "five"), ("--flip-test", "heatmaps"), ("--align-out", "c")):
        with pytest.raises(UserError, match=f"7 landmarks are no known scheme .*{flag}"):
            evaluated(tmp_path / "run", flag, value)


def test_the_challenges_training_set_loses_the_test_images_that_it_holds(tmp_path):
    for folder, indices in (("Train", (0, 1, 2)), ("Test_data1", (1,))):
        for i in indices:
            face = synthetic.read_faces("train", 3, 64, 106)[i]
            image = tmp_path / folder / "picture" / f"{i}{folder}.jpg"
            written(datasets.load_image(face.image), image)
            (tmp_path / folder / "landmark").mkdir(exist_ok=True)
            rows = "\n".join(f"{x} {y}" for x, y in face.points.tolist())
            (tmp_path / folder / "landmark" / f"{image.name}.txt").write_text(f"106\n{rows}\n")
    said = []
    args = hl.parse_args(["--data", "jd106", "--data-root", str(tmp_path)])
    train, test = hl.load_sets(args, said.append)
    assert [Path(face.image).name for face in train.faces] == ["0Train.jpg", "2Train.jpg"]
    assert len(test) == 1 and "left out 1 training images that are test images too" in said


# ---- Photographs and recognition crops -----------------------------------------------------------

def written(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.write_image(path, image)


def predicted(folder, images, *flags):
    return hl.train(hl.parse_args(["--predict", str(images), "--weights", str(folder / "last.pt"),
                                   "--device", "cpu", *map(str, flags)]))


def test_predict_writes_points_and_pictures(finished, tmp_path):
    face = synthetic.read_faces("test", 1, size=128, points=29)[0]
    for name in ("one two.png", "sub/b.jpg"):
        written(datasets.load_image(face.image), tmp_path / "in" / name)
    for box in ((), ("--box", "20,10,110,120")):
        out = tmp_path / f"out{len(box)}"
        predicted(finished[0], tmp_path / "in", "--output", out, *box)
        for name in ("one two", "sub/b"):
            points = datasets.read_pts(out / f"{name}.pts")
            assert points.shape == (29, 2) and points.min() > -128 and points.max() < 256
            assert cv2.imread(str(out / f"{name}.png")).shape == (128, 128, 3)


def test_a_recognition_crop_has_the_five_points_in_their_places(finished, tmp_path, monkeypatch):
    face = synthetic.read_faces("test", 1, size=256, points=29)[0]
    image = datasets.load_image(face.image)
    written(image, tmp_path / "in/sub/a.png")
    truth = torch.from_numpy(face.points).double()
    monkeypatch.setattr(hl, "find_points", lambda *_: (truth, torch.ones(29)))
    predicted(finished[0], tmp_path / "in", "--output", tmp_path / "out", "--align-out",
              tmp_path / "crops")
    found = datasets.read_pts(tmp_path / "out/sub/a.pts")
    np.testing.assert_allclose(found, face.points, atol=1e-3)
    placed = datasets.read_pts(tmp_path / "crops/sub/a.pts")
    five = hl.five_of(placed)
    assert np.linalg.norm(five - datasets.ARCFACE_5, axis=1).max() < 8  # a face is no template
    matrix = warp.fit_similarity(hl.five_of(truth), torch.from_numpy(datasets.ARCFACE_5)).numpy()
    wanted = cv2.warpAffine(image, matrix, (112, 112), borderValue=(127,) * 3)
    crop = cv2.imread(str(tmp_path / "crops/sub/a.png"))[..., ::-1]
    difference = cv2.blur(crop, (5, 5)).astype(float) - cv2.blur(wanted, (5, 5))
    assert np.abs(difference).mean() < 6


def test_a_prediction_that_is_no_face_gets_no_points(finished, tmp_path, monkeypatch, capsys):
    written(np.zeros((40, 50, 3), np.uint8), tmp_path / "in/a.png")
    nowhere = torch.full((29, 2), math.nan, dtype=torch.float64), torch.zeros(29)
    monkeypatch.setattr(hl, "find_points", lambda *_: nowhere)
    predicted(finished[0], tmp_path / "in", "--output", tmp_path / "out")
    assert "no face found in 1" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.pts"))


class Detector:
    """Two faces at each call, as YuNet reports them: x y w h, five points, a score."""

    def __init__(self, faces):
        self.faces = faces

    def setInputSize(self, size):
        pass

    def detect(self, image):
        return 1, self.faces


def test_faces_of_a_detector_are_aligned_at_once():
    image = np.zeros((90, 120, 3), np.uint8)
    five = (hl.REFERENCE_5 / 3 + torch.tensor([[[5.0, 2]], [[40, 10]]])).float().numpy()
    boxes = np.float32([[10, 20, 30, 40], [50, 60, 20, 10]])
    scores = np.float32([[0.95], [0.9]])
    detector = Detector(np.concatenate([boxes, five.reshape(2, 10), scores], 1))
    args = hl.parse_args(["--size", "64"])
    matrices, passes = hl.find_crops(args, image, detector)
    torch.testing.assert_close(matrices, hl.align_five(five.astype(np.float64), 64))
    assert passes == 1 and hl.find_crops(args, image, Detector(None))[0].shape == (0, 2, 3)
    args.align = "box"
    matrices, passes = hl.find_crops(args, image, detector)
    ends = datasets.landmark_boxes(five.astype(np.float64))
    np.testing.assert_allclose(matrices, datasets.square_crops(ends, 64, args.margin))
    assert passes == 2
    args.trained_box = "face"  # it has never seen a crop by the landmarks' box
    assert hl.find_crops(args, image, detector)[1] == hl.find_crops(args, image, None)[1] == 1


def test_predict_looks_again_at_the_face_aligned_by_its_prediction(monkeypatch):
    face = synthetic.read_faces("test", 1, size=128, points=29)[0]
    image = datasets.load_image(face.image)
    truth = torch.from_numpy(face.points).double()
    args = hl.parse_args(["--size", "64", "--flip-test", "none"])
    made = answering(monkeypatch, truth[None])
    for box, wanted in (("landmarks", 3), ("20,10,110,120", 2)):
        args.box = box
        matrices, passes = hl.find_crops(args, image, None)
        made.clear()
        points, _ = hl.find_points(Oracle(), image, matrices[0], passes, args)
        torch.testing.assert_close(points, truth, atol=1e-3, rtol=0)
        assert len(made) == passes == wanted and torch.equal(made[0].crop_matrices, matrices)
        aligned = hl.align_five(hl.five_of(truth[None]), 64)
        for later in made[1:]:
            torch.testing.assert_close(later.crop_matrices, aligned, atol=1e-3, rtol=1e-3)


def test_a_whole_set_is_cut_for_recognition_and_read_back(finished, tmp_path, monkeypatch):
    answering(monkeypatch)
    evaluated(finished[0], "--limit", "12", "--align-out", str(tmp_path / "set"))
    for split in ("train", "test"):
        faces = datasets.read("folder", str(tmp_path / "set"), split)
        drawn = synthetic.read_faces(split, 12, 64, 29)
        assert [face.identity for face in faces] == [face.identity for face in drawn]
        for face, source in zip(faces, drawn, strict=True):
            wanted = placed_for_recognition(source.points)
            np.testing.assert_allclose(face.points, wanted, atol=1e-2)
            assert datasets.load_image(face.image).shape == (112, 112, 3)


def placed_for_recognition(points):
    """Points (P, 2) of an image in its 112 px crop."""
    points = torch.from_numpy(points)
    matrix = warp.fit_similarity(hl.five_of(points), torch.from_numpy(datasets.ARCFACE_5))
    return warp.apply_affine(matrix, points).numpy()


def cut(monkeypatch, faces, root, folder, answers=None):
    """--align-out of some faces of a set below `root`, read back by name below the split."""
    monkeypatch.setattr(hl, "read_faces", lambda args, split: faces)
    answering(monkeypatch, answers)
    args = hl.parse_args([*TINY, "--data-root", str(root), "--five-noise", "0"])
    net = Oracle(datasets.CropDataset(faces, np.tile(np.eye(2, 3), (len(faces), 1, 1)), 64))
    hl.align_set(net, args, folder, "test")
    return {os.path.relpath(face.image, folder / "test"): face
            for face in datasets.read("folder", str(folder), "test")}


def test_faces_of_one_image_and_images_of_one_name_become_crops_of_their_own(tmp_path, monkeypatch):
    pair = synthetic.read_faces("test", 2, size=64, points=29)
    both = np.concatenate([datasets.load_image(face.image) for face in pair], 1)
    pair[1].points[:, 0] += 64
    places = (("a.b.png", 0), ("a.b.png", 1), ("x/a.b.png", 0), ("x/a.b.png", 1),
              ("x/a.b.face2.jpg", 0))
    faces = []
    for name, i in places:
        written(both, tmp_path / "set" / name)
        faces.append(datasets.Face(str(tmp_path / "set" / name), pair[i].points))
    found = cut(monkeypatch, faces, tmp_path / "set", tmp_path / "out")
    assert len(found) == 5
    for face, times in zip(pair, (3, 2)):
        placed = placed_for_recognition(face.points)
        assert sum(np.abs(crop.points - placed).max() < 1e-2 for crop in found.values()) == times


def test_recognition_crops_lie_in_the_folder_of_their_person(tmp_path, monkeypatch):
    faces = []
    for i, face in enumerate(synthetic.read_faces("test", 4, size=64, points=29)):
        person = (None, "Ann", "Bob", "Bob")[i]
        path = tmp_path / f"set/data/{person}_{i}.jpg"
        written(datasets.load_image(face.image), path)
        faces.append(datasets.Face(str(path), face.points, identity=person))
    found = cut(monkeypatch, faces, tmp_path / "set", tmp_path / "out")
    assert sorted(found) == ["Ann/Ann_1.png", "Bob/Bob_2.png", "Bob/Bob_3.png", "data/None_0.png"]


def test_photographs_that_are_turned_are_cut_and_drawn_so(tmp_path, monkeypatch):
    face, = synthetic.read_faces("test", 1, size=64, points=29)
    upright = np.pad(datasets.load_image(face.image), ((0, 32), (0, 0), (0, 0)))
    path = tmp_path / "set/a.jpg"
    path.parent.mkdir()
    trees.put_photo(path, np.rot90(upright), 6)
    photo = datasets.Face(str(path), face.points, upright=True)
    plain = datasets.Face(datasets.load_image(photo.image, upright=True), face.points)
    assert plain.image.shape == (96, 64, 3)
    found = cut(monkeypatch, [photo], tmp_path / "set", tmp_path / "out")
    wanted = cut(monkeypatch, [plain], tmp_path / "set", tmp_path / "plain")
    crop, other = (datasets.load_image(next(iter(each.values())).image) for each in (found, wanted))
    assert np.array_equal(crop, other)
    drawn = [hl.draw_alignment(datasets.CropDataset([each], np.eye(2, 3)[None], 64))
             for each in (photo, plain)]
    assert np.array_equal(*drawn)


def test_a_prediction_that_is_no_face_gets_no_recognition_crop(tmp_path, monkeypatch, capsys):
    face, = synthetic.read_faces("test", 1, size=64, points=29)
    written(datasets.load_image(face.image), tmp_path / "set/a.png")
    faces = [datasets.Face(str(tmp_path / "set/a.png"), face.points)] * 4
    answers = torch.from_numpy(np.stack([face.points] * 4)).double()
    answers[0] = torch.tensor([30.0, 20])
    answers[1] = math.nan
    template = hl.REFERENCE_5 - hl.REFERENCE_5.mean(0)
    wide, high = template.square().sum(0)
    mirrored = template * torch.tensor([-float(high / wide), 1])  # the best scale is about 0
    for group, place in zip(datasets.SCHEMES[29].five, 30 + mirrored):
        answers[2, list(group)] = place
    found = cut(monkeypatch, faces, tmp_path / "set", tmp_path / "out", answers)
    assert len(found) == 1 and "left out 3" in capsys.readouterr().out
