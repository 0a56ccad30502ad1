"""Timings, side by side in one run: ours, and a peer from PyPI or, where there is none, the plain
form. Nothing is asserted.

    python -m tests.bench                  all of it, on one thread, and on the GPU if there is one
    python -m tests.bench loader graph     only these
    python -m tests.bench --smoke          each once, tiny: does it run?
    python -m tests.bench --report         tests/BENCH.md, too

Times are medians of several calls. Peers are compared with where they are installed:
pip install kornia albumentations scikit-learn
"""
import argparse
import copy
import importlib
import platform
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import heatmap_landmarks
import kprpe
import lddmm_face
import sdfl
import stn_align
from common import datasets, metrics, photos, recognition, synthetic, warp

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CHANNELS_LAST = dict(memory_format=torch.channels_last)
OPTIONS = argparse.Namespace(smoke=False)
LINES = []  # what was printed, for --report


# ---- Tools ---------------------------------------------------------------------------------------

def say(section: str, text: str):
    """Prints a line of results."""
    LINES.append(f"{section:10}{text}")
    print(LINES[-1], flush=True)


def sized(full, tiny):
    """A size of a benchmark, or that of --smoke."""
    return tiny if OPTIONS.smoke else full


def median_ms(function: Callable, repeats: int = 7) -> float:
    """Median time of one call in ms, after one call to warm up; waits for the GPU."""
    times = []
    for _ in range(1 + sized(repeats, 1)):
        began = time.perf_counter()
        function()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[1:])


def peer(section: str, name: str):
    """A peer's module and its package's version; None, with a word, if it is not installed."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name), f"{package} {importlib.import_module(package).__version__}"
    except ImportError as error:
        say(section, f"not compared with {name}: {error}")
        return None, ""


def compare(section: str, title: str, ours: float, other: str, theirs: float, digits: int = 1):
    """A line with two times in ms."""
    say(section, f"{title}: {ours:.{digits}f} ms; {other} {theirs:.{digits}f} ms: "
                 f"{theirs / ours:.1f} x")


def images(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, device=DEVICE).contiguous(**CHANNELS_LAST)


def time_steps(section: str, title: str, net, optimizer, loss_of: Callable, count: int,
               amp: bool = CUDA) -> float:
    """Times training steps on `count` images and says how many a second; returns ms.
    Args: loss_of(net), the forward pass and the loss."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp):
            loss = loss_of(net)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    ms = median_ms(step, 20 if CUDA else 3)
    memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if CUDA else ""
    say(section, f"{title}, batch {count}, {'bf16' if amp else 'float32'}: "
                 f"{count / ms * 1e3:,.1f} images a second{memory}")
    return ms


# ---- Data ----------------------------------------------------------------------------------------

def bench_faces():
    """Drawn faces a second at 128 px."""
    count = sized(200, 4)
    faces = synthetic.read_faces("train", count, size=128)
    ms = median_ms(lambda: [face.image() for face in faces], 3)
    say("faces", f"drawn at 128 px: {count / ms * 1e3:,.0f} a second")


def bench_loader():
    """Samples a second and core at 256 px: kept crops, decoding each time, albumentations."""
    count = sized(64, 4)
    rng = np.random.default_rng(0)
    keys = [(0, i) for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        faces = []
        for i in range(count):  # photographs of 1000 px with a face of 300 px, as they come
            small = rng.integers(0, 256, (60, 60, 3), np.uint8)
            path = f"{folder}/{i}.jpg"
            cv2.imwrite(path, cv2.resize(small, (1000, 1000), interpolation=cv2.INTER_CUBIC))
            points = rng.uniform(350, 650, (98, 2)).astype(np.float32)
            faces.append(datasets.Face(path, points))
        boxes = datasets.face_boxes(faces, "landmarks")
        crops = datasets.square_crops(boxes, 256, 1.25)
        data = datasets.CropDataset(faces, crops, 256, sdfl.augment, sdfl.reach(40, 30), 1 + sdfl.ZOOM,
                                    datasets.SCHEMES[98].flip)
        kept = copy.deepcopy(data)
        kept.regions.keep(folder, verbose=False)
        ways = {"decoding each time": lambda: data.__getitems__(keys),
                "kept crops": lambda: kept.__getitems__(keys)}
        albumentations, named = peer("loader", "albumentations")
        if albumentations:
            draw = albumentations.Compose(
                [albumentations.CropAndPad(px=-300), albumentations.Resize(256, 256),
                 albumentations.HorizontalFlip(), albumentations.Affine(rotate=(-40, 40))],
                keypoint_params=albumentations.KeypointParams("xy", remove_invisible=False))

            def theirs():
                for face in faces:
                    image = cv2.imread(face.image, cv2.IMREAD_COLOR_RGB)
                    draw(image=image, keypoints=face.points)

            ways[named] = theirs
        rates = {name: count / median_ms(call, 5) * 1e3 for name, call in ways.items()}
        for name, rate in rates.items():
            like = named and name == "decoding each time"  # as the peer does
            factor = f", {rate / rates[named]:.1f} x {named}" if like else ""
            say("loader", f"256 px, 98 points, {name}: {rate:,.0f} samples a second and core{factor}")


def bench_records():
    """Images a second out of a record file, 112 px JPEGs, beside decoding the same bytes."""
    count = sized(256, 8)
    rng = np.random.default_rng(0)
    coded = []
    for noise in rng.integers(0, 256, (count, 112, 112, 3), np.uint8):
        smooth = cv2.convertScaleAbs(cv2.GaussianBlur(noise, (0, 0), 3), alpha=4, beta=-380)
        coded.append(cv2.imencode(".jpg", smooth)[1].tobytes())
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/train.rec", "wb") as data, open(f"{folder}/train.idx", "w") as index:
            for key, image in enumerate(coded):
                index.write(f"{key}\t{data.tell()}\n")
                length = 24 + len(image)
                data.write(struct.pack("<IIIfQQ", 0xced7230a, length, 0, key % 2, key, 0))
                data.write(image + b"\0" * (-length % 4))
        records = recognition.Records(folder)
        arrays = [np.frombuffer(code, np.uint8) for code in coded]
        bare = median_ms(lambda: [cv2.imdecode(code, cv2.IMREAD_COLOR) for code in arrays])
        ours = median_ms(lambda: [records[i] for i in range(count)])
    size = sum(map(len, coded)) / count
    say("records", f"112 px JPEGs of {size:,.0f} bytes: {count / ours * 1e3:,.0f} images a second; "
                   f"cv2.imdecode alone {count / bare * 1e3:,.0f}")


# ---- Metrics -------------------------------------------------------------------------------------

def bench_metrics():
    """Rank-1 of 1,000 probes over 150,000 rows, and true accept rates of 10^7 pairs."""
    probes = sized(1000, 10)
    rows = sized(150_000, 200)
    gallery = F.normalize(torch.randn(rows, 128))
    probe = F.normalize(gallery[:probes] + 0.1 * torch.randn(probes, 128))  # cosines of 0.66
    ids = torch.cat([torch.arange(probes), torch.full((rows - probes,), -100)])
    ours = median_ms(lambda: metrics.rank_k(probe, torch.arange(probes), gallery, ids), 1)
    plain = median_ms(lambda: (probe @ gallery.T).topk(5), 1)
    compare("metrics", f"rank-1 and rank-5, {probes:,} probes x {rows:,} rows of 128", ours,
            "top-k of one float32 product", plain)
    pairs = sized(10_000_000, 1000)
    scores = torch.randn(pairs)
    same = torch.arange(pairs) < pairs // 100
    learn, named = peer("metrics", "sklearn.metrics")
    ours = median_ms(lambda: metrics.tar_at_far(scores, same, (1e-4, 1e-3)), 1)
    if learn:
        theirs = median_ms(lambda: learn.roc_curve(same.numpy(), scores.numpy()), 1)
        compare("metrics", f"TAR at FAR, {pairs:,} pairs", ours, f"roc_curve of {named}", theirs)


# ---- SDFL ----------------------------------------------------------------------------------------

def plain_graph(head, nodes, A):
    """The graph layers of Fig. 5 as a loop over nodes and their neighbours."""
    def convolve(conv, nodes):
        rows = []
        for i in range(nodes.shape[1]):
            total = 0
            for j in A[0, i].nonzero()[:, 0].tolist():
                total = total + A[:, i, j, None] * (nodes[:, j] @ conv.weight)
            rows.append(total if conv.bias is None else total + conv.bias)
        return torch.stack(rows, 1)

    def layer(module, nodes):
        convolved = module.norm(convolve(module.conv, nodes).flatten(0, 1))
        return torch.relu(convolved).view(*nodes.shape[:2], -1)

    nodes = layer(head.first, nodes)
    for block in head.blocks:
        nodes = layer(block.second, layer(block.first, nodes)) + nodes
    return convolve(head.last, nodes)


def bench_graph():
    """Mining neighbours; graph layers forward and backward beside a loop over nodes."""
    faces = sized(7500, 200)
    points = sized(98, 19)
    count = sized(32, 2)
    landmarks = torch.randn(faces, points, 2)
    x, y = landmarks.numpy().transpose(2, 1, 0)
    ours = median_ms(lambda: sdfl.neighbour_mask(landmarks, 3), 3)
    theirs = median_ms(lambda: np.abs(np.corrcoef(x)) + np.abs(np.corrcoef(y)), 3)
    compare("graph", f"neighbour_mask of {faces:,} x {points} landmarks", ours,
            "numpy.corrcoef alone", theirs)
    head = sdfl.GraphHead(512, sdfl.neighbour_mask(landmarks, 3), cells=64)
    nodes = torch.randn(count, points, 256)
    A = head.adjacency(torch.randn(count, 4 * points, 8, 8)).detach()

    def graph():
        x = head.first(nodes, A)
        for block in head.blocks:
            x = block(x, A)
        return head.last(x, A)

    ours = median_ms(lambda: graph().sum().backward())
    plain = median_ms(lambda: plain_graph(head, nodes, A).sum().backward(), 2)
    compare("graph", f"{points} nodes, batch {count}, forward and backward", ours,
            "loop over nodes", plain)


def bench_sdfl_step():
    """A training step of SDFL: eager, bf16 and compiled on a GPU."""
    points = sized(98, 19)
    name, size, count = ("resnet34", 256, 64) if CUDA else ("mobilenetv2", 128, 32)
    size = sized(size, 64)
    count = sized(count, 2)
    mask = sdfl.neighbour_mask(torch.randn(100, points, 2), 3)
    image = images(count, size)
    target = torch.full((count, points, 2), 128.0, device=DEVICE)
    settings = [(False, False), (True, False), (True, True)]
    for amp, compiled in settings if CUDA else settings[:1]:
        net = sdfl.SDFL(name, mask, size).to(DEVICE, **CHANNELS_LAST)
        L = sdfl.laplacian(net.mask)
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, fused=True)
        model = torch.compile(net, mode="reduce-overhead") if compiled else net
        time_steps("sdfl", f"{name}, {size} px" + ", compiled" * compiled, model, optimizer,
                   lambda net: sdfl.sdfl_loss(net(image), target, L, 1.0, sdfl.soft_wing), count,
                   amp)


# ---- Heatmap landmarks ---------------------------------------------------------------------------

def plain_dark(maps: np.ndarray, kernel: int = 11) -> np.ndarray:
    """DARK as published, pass after pass, each a loop over maps: (B, P, h, w) float64 -> (B, P, 2)
    px."""
    border = (kernel - 1) // 2
    B, P, height, width = maps.shape
    flat = maps.reshape(B, P, -1)
    peaks = flat.argmax(2)
    heights = flat.max(2)
    out = np.stack([peaks % width, peaks // width], 2) * (heights > 0)[..., None].astype(float)
    blurred = np.empty_like(maps)
    for b, p in np.ndindex(B, P):
        padded = np.pad(maps[b, p], border)
        inside = slice(border, -border)
        blurred[b, p] = cv2.GaussianBlur(padded, (kernel, kernel), 0)[inside, inside]
        blurred[b, p] *= heights[b, p] / blurred[b, p].max()
    logs = np.log(np.maximum(blurred, 1e-10))
    for b, p in np.ndindex(B, P):
        L = logs[b, p]
        x, y = out[b, p].astype(int)
        if 1 < x < width - 2 and 1 < y < height - 2:
            dx = (L[y, x + 1] - L[y, x - 1]) / 2
            dy = (L[y + 1, x] - L[y - 1, x]) / 2
            dxx = (L[y, x + 2] - 2 * L[y, x] + L[y, x - 2]) / 4
            dyy = (L[y + 2, x] - 2 * L[y, x] + L[y - 2, x]) / 4
            dxy = (L[y + 1, x + 1] - L[y - 1, x + 1] - L[y + 1, x - 1] + L[y - 1, x - 1]) / 4
            hessian = np.array([[dxx, dxy], [dxy, dyy]])
            if np.linalg.det(hessian) != 0:
                out[b, p] -= np.linalg.inv(hessian) @ [dx, dy]
    return out


def bench_dark():
    """Decoding (16, 106, 96, 96) heatmaps beside the published loop over maps."""
    torch.manual_seed(0)
    shape = sized((16, 106, 96), (1, 3, 48))
    clean = heatmap_landmarks.gaussian_heatmaps(10 + 170 * torch.rand(*shape[:2], 2), shape[2], 2,
                                                2.0)
    noise = torch.randn(clean.shape)
    kinds = {"Gaussians": clean, "with noise of 0.03": clean + 0.03 * noise, "noise": noise}
    for name, maps in kinds.items():
        there = maps.to(DEVICE)
        plain = median_ms(lambda: plain_dark(maps.double().numpy()), 1)
        ours = median_ms(lambda: heatmap_landmarks.decode_dark(there))
        compare("dark", f"{tuple(maps.shape)}, {name}", ours, "loop over maps", plain)
    for name, read in heatmap_landmarks.DECODERS.items():
        say("dark", f"{name}: {median_ms(lambda: read(clean)):.1f} ms; one face at 48 px: "
                    f"{median_ms(lambda: read(clean[:1, :, :48, :48])):.2f} ms")


def bench_latency():
    """One 192 px face on the CPU, network and DARK: the paper's 65.7, 131.5 and 241.5 ms were on
    one core, by TVM."""
    image = torch.randn(4, 3, sized(192, 64), sized(192, 64))
    for backbone in sized(("mobilenetv2_1.0", "resnet18", "resnet50"), ("mobilenetv2_0.25",)):
        net = heatmap_landmarks.HeatmapNet(backbone)
        net(image)  # statistics for the batch norms
        net.eval().to(**CHANNELS_LAST)
        one = image[:1].contiguous(**CHANNELS_LAST)
        with torch.inference_mode():
            trained = median_ms(lambda: heatmap_landmarks.decode_dark(net(one)), 20)
            photos.fold_batch_norms(net, image.shape[-1])
            folded = median_ms(lambda: heatmap_landmarks.decode_dark(net(one)), 20)
        compare("latency", f"{backbone} SDD, one face, batch norms folded as by --predict", folded,
                "as trained", trained)


def bench_face():
    """One 96 px face of 68 points on the CPU, crop to points, by MobileNetV2 in the three scripts:
    the networks of --small in tests/claims.py, that of heatmaps with the others' backbone."""
    image = torch.randn(4, 3, 96, 96)
    mask = sdfl.neighbour_mask(torch.randn(100, 68, 2), 3)
    args = lddmm_face.parse_args(["--data", "faces"])
    nets = [(sdfl.SDFL("mobilenetv2", mask, 96), lambda points: points),
            (heatmap_landmarks.HeatmapNet("mobilenetv2_1.0", "SSD", 68, filters=64),
             heatmap_landmarks.decode_dark),
            (lddmm_face.build(args, 256 * torch.rand(68, 2), torch.device("cpu")),
             lambda points: points)]
    for net, decode in nets:
        net(image)  # statistics for the batch norms
        net.eval().to(**CHANNELS_LAST)
        photos.fold_batch_norms(net, 96)
        one = image[:1].contiguous(**CHANNELS_LAST)
        with torch.inference_mode():
            ms = median_ms(lambda: decode(net(one)), 40)
        say("face", f"{type(net).__name__}, MobileNetV2, 96 px, one face: {ms:.1f} ms")


def bench_heatmap_step():
    """A training step of MNetV2-1.0 SDD, 106 points, 192 px."""
    size = sized(192, 64)
    counts = [64, 512] if CUDA else [sized(16, 2)]
    for count in counts:
        net = heatmap_landmarks.HeatmapNet().to(DEVICE, **CHANNELS_LAST)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
        image = images(count, size)
        points = size * torch.rand(count, 106, 2, device=DEVICE)
        time_steps("heatmaps", f"MNetV2-1.0 SDD, {size} px", net, optimizer, lambda net:
                   heatmap_landmarks.heatmap_loss(net(image), points, net.stride, 2.0), count)


# ---- LDDMM-Face ----------------------------------------------------------------------------------

def plain_flow(mean, momenta, lines, sigma, steps=2):
    """Eq. (7) as it reads: curve after curve, with the kernel of all N x N points."""
    ends = torch.zeros_like(momenta)
    for ids, width in zip(lines, sigma.tolist()):
        own = momenta.new_zeros(momenta.shape[-2], 1)
        own[ids] = 1
        x = mean.expand_as(momenta)
        for _ in range(steps):
            k = (-(x[:, :, None] - x[:, None]).square().sum(-1) / width**2).exp()  # (B, N, N)
            x = x + k @ (momenta * own) / steps
        ends = ends + x * own
    return ends


def bench_flow():
    """The deformation layer, forward and backward, beside a loop over curves."""
    count = sized(32, 2)
    for scheme in sized((98, 194), (68,)):
        torch.manual_seed(0)
        table = lddmm_face.positions_by_curve(lddmm_face.training_landmarks(scheme)).values()
        curves = lddmm_face.Curves(table)
        N = sum(map(len, table))
        mean = 256 * torch.rand(N, 2)
        sigma = lddmm_face.curve_scale(mean, curves)
        momenta = torch.randn(count, N, 2).requires_grad_()
        target = mean + torch.randn(count, N, 2)
        d = torch.full((count,), 60.0)

        def flow():
            return lddmm_face.deform(mean[None], momenta, curves, sigma)[:, -1]

        def loss():
            return lddmm_face.lddmm_loss(flow(), target, curves, sigma, d)

        ours = median_ms(lambda: flow().sum().backward(), 15)
        plain = median_ms(lambda: plain_flow(mean, momenta, table, sigma).sum().backward(), 3)
        compare("flow", f"{scheme} points, batch {count}, forward and backward", ours,
                "loop over curves", plain)
        say("flow", f"{scheme} points, with the loss: {median_ms(lambda: loss().backward()):.1f} "
                    "ms")


def bench_lddmm_step():
    """Table 6: a training step of HRNet-W18, 256 px, batch 32; MobileNetV2 at 96 px without a
    GPU."""
    backbone, size, count = ("hrnet_w18", 256, 32) if CUDA else ("mobilenetv2", 96, 16)
    size = sized(size, 64)
    count = sized(count, 2)
    image = images(count, size)
    for scheme, points in sized([(68, 50), (98, 100), (194, 100)], [(68, 50)]):
        for method in ("heatmap", "coord", "lddmm"):
            args = lddmm_face.parse_args(["--method", method, "--backbone", backbone,
                                          "--train-points", str(points), "--size", str(size)])
            net = lddmm_face.build(args, 256 * torch.rand(scheme, 2), DEVICE)
            optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)
            target = size * torch.rand(count, scheme, 2, device=DEVICE)
            name = "hrnet_w18" if method == "heatmap" else backbone
            title = f"{name}, {size} px, {scheme} points, {points} % of them, {method}"
            time_steps("lddmm", title, net, optimizer,
                       lambda net: lddmm_face.loss_of(net, net(image), target, args), count, False)


# ---- Balanced alignment --------------------------------------------------------------------------

def bench_tps():
    """Images by the thin-plate grid of 64 points, alone, forward, and with the way back, beside
    kornia's."""
    count = sized(32, 2)
    size = sized(112, 16)
    maps = stn_align.TPSGrid(8)
    numbers = (2 * torch.randn(count, 128)).requires_grad_()
    image = torch.randn(count, 3, size, size)
    kornia, named = peer("tps", "kornia.geometry.transform")

    def ours():
        return warp.sample(image, maps.grid(maps.fit(numbers), size))

    def theirs():
        centres = maps.spline.targets.float().expand(count, -1, -1)
        moved = centres + numbers.unflatten(1, (64, 2)) / 56
        weights = kornia.get_tps_transform(centres, moved)
        return kornia.warp_image_tps(image, centres, *weights)

    for title, call in (("forward", torch.no_grad()(lambda warped: warped())),
                        ("forward and backward", lambda warped: warped().sum().backward())):
        title = f"{count} x {size} px, 64 points, {title}"
        fast = median_ms(lambda: call(ours))
        if kornia:
            compare("tps", title, fast, named, median_ms(lambda: call(theirs), 3))
        else:
            say("tps", f"{title}: {fast:.1f} ms")


def bench_stn_step():
    """A training step of the ResNet34 with LocNet, grid, warp and alignment loss, beside one that
    aligns nothing."""
    count = 256 if CUDA else sized(8, 2)
    depth = sized(34, 10)
    size = sized(112, 48)
    image = images(count, size)
    labels = torch.arange(count, device=DEVICE)
    template = 28 + 56 * torch.rand(68, 2)
    points = template.to(DEVICE) + torch.randn(count, 68, 2, device=DEVICE)
    times = []
    for method, align_at in (("none", "input"), ("tps8", "input"), ("tps8", "fmap")):
        net = stn_align.AlignedRecognizer(method, align_at, depth, template, size=size)
        learner = stn_align.Learner(net, sized(8631, 10), 3.0).to(DEVICE, **CHANNELS_LAST)
        trained = [p for p in learner.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 1e-4, momentum=0.9)
        title = "no alignment" if method == "none" else f"{method} at {align_at}"
        times.append(time_steps("stn", title, learner, optimizer,
                                lambda net: net(image, labels, points)[0], count))
    say("stn", f"tps8 takes {times[1] / times[0] - 1:+.1%} at the input, "
               f"{times[2] / times[0] - 1:+.1%} at the feature map")


# ---- KP-RPE --------------------------------------------------------------------------------------

def indexed_bias(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Eq. (11) by an index into a flattened table: (B, H, N, K), (N, N) -> (B, H, N, N)."""
    count, buckets = table.shape[2:]
    flat = torch.arange(count, device=ids.device)[:, None] * buckets + ids
    return table.flatten(2)[:, :, flat.flatten()].unflatten(-1, ids.shape)


def bench_bias():
    """One layer's KP-RPE bias, B = H = 8, 14 x 14 patches, forward and backward."""
    side = sized(14, 4)
    N = side**2
    pair_bias = kprpe.PairBias((side, side), "product").to(DEVICE)
    ids = kprpe.bucket_ids(side, side, "product").to(DEVICE).view(N, N)
    of_image = torch.randn(8, 8, 49, device=DEVICE).requires_grad_()
    of_query = torch.randn(8, N, 49, device=DEVICE).requires_grad_()
    grad = torch.randn(8, 8, N, N, device=DEVICE)
    parts = (of_image, of_query)

    def plain():
        return indexed_bias(of_image[:, :, None] + of_query, ids)

    ours = median_ms(lambda: torch.autograd.grad(pair_bias(*parts), parts, grad), 15)
    slow = median_ms(lambda: torch.autograd.grad(plain(), parts, grad), 15)
    compare("bias", f"{side} x {side} patches, forward and backward", ours, "index into the table",
            slow)


def bench_vit_step():
    """A training step of the ViT with each encoding, beside the one without: ViT-S and ViT-B on a
    GPU, a small one on the CPU."""
    count = 256 if CUDA else sized(32, 2)
    own = sized(dict(dim=192, depth=6, heads=6, mlp_ratio=3), dict(dim=16, depth=2, heads=2))
    for size in ("small", "base") if CUDA else (own,):
        image = images(count, 112)
        points = torch.rand(count, 5, 2, device=DEVICE)
        times = {}
        for rpe in ("none", "product", "irpe", "kp-multihead"):
            net = kprpe.ViT(size, rpe).to(DEVICE)
            optimizer = torch.optim.AdamW(net.parameters(), 1e-3, fused=True)
            title = f"{size if CUDA else 'a small ViT'}, {rpe}"
            times[rpe] = time_steps("vit", title, net, optimizer,
                                    lambda net: net(image, points).square().mean(), count)
        lost = [f"{rpe} {1 - times['none'] / ms:.1%}" for rpe, ms in times.items()]
        say("vit", f"throughput lost: {', '.join(lost[1:])}")


def bench_dfa():
    """Faces a second of the face aligner at 160 px, alone and with the alignment to 112 px."""
    count = sized(32, 2)
    net = kprpe.DFA().eval().to(DEVICE)
    image = torch.rand(count, 3, 160, 160, device=DEVICE) * 2 - 1
    with torch.inference_mode():
        alone = median_ms(lambda: net(image))
        both = median_ms(lambda: kprpe.align_112(image, net(image).landmarks))
    say("dfa", f"{count / alone * 1e3:,.0f} faces a second, {count / both * 1e3:,.0f} with the "
               "alignment")


# ---- Cost of the presets -------------------------------------------------------------------------

def saved_bytes(net, *inputs) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights left out."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        net(*inputs)
    return sum(kept.values())


def bench_cost():
    """What the paper's presets take, from a forward pass of two images on the CPU: an estimate."""
    cpu = torch.device("cpu")

    def parse(script, data: str):
        return script.parse_args(["--data", data, "--data-root", ".", "--device", "cpu"])

    pairs = torch.eye(98, dtype=torch.bool)
    rows = [  # images of an epoch, of the papers: WFLW 7,500, LaPa 18,168 and their mirror images
        (sdfl, "wflw", 7_500, lambda args: sdfl.build(args, pairs | pairs.roll(1, 0), cpu)),
        (heatmap_landmarks, "lapa", 36_336, lambda args: heatmap_landmarks.build(args, 106, cpu)),
        (lddmm_face, "300w", 3_148,
         lambda args: lddmm_face.build(args, 256 * torch.rand(68, 2), cpu)),
        (stn_align, "vggface2", 3_141_890,
         lambda args: stn_align.build(args, 112 * torch.rand(68, 2), cpu)),
        (kprpe, "ms1m-small", 5_822_653, lambda args: kprpe.build(args, cpu)),
        (kprpe, "webface-base", 4_235_242, lambda args: kprpe.build(args, cpu))]
    for script, data, count, build in rows[:sized(len(rows), 2)]:
        args = parse(script, data)
        net = build(args)
        image = torch.randn(2, 3, args.size, args.size)
        more = (torch.rand(2, 5, 2),) if script is kprpe else ()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(image, *more)
        giga = counter.get_total_flops() / 4e9  # multiply-adds of an image
        total = 6e9 * giga * count * args.epochs  # a backward pass takes twice the forward one
        memory = saved_bytes(net, image, *more) / 2 * args.batch_size
        steps = args.epochs * count // args.batch_size
        say("cost", f"{script.__name__}.py --data {data}: {giga:.2f} G multiply-adds forward, "
                    f"{args.epochs} epochs of {count:,} images, {steps:,} steps: "
                    f"{total / 1e15:,.0f} PFLOP, {total / 3.6e17:.1f} hours at 100 TFLOP/s; a batch "
                    f"of {args.batch_size} keeps {memory / 1e9:.0f} GB in float32")


# ---- Command -------------------------------------------------------------------------------------

def main(argv=None):
    """Runs the timings that are named, or all."""
    benches = {name[6:]: function for name, function in globals().items()
               if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=", ".join(benches))
    add("--threads", type=int, default=1)
    add("--smoke", action="store_true", help="each once, at a tiny size, on the CPU or GPU")
    add("--report", action="store_true", help="write --output")
    add("--output", type=Path, default=Path(__file__).with_name("BENCH.md"), help="of --report")
    args = parser.parse_args(argv, OPTIONS)
    unknown = [name for name in args.names if name not in benches]
    if unknown:
        parser.error(f"{unknown[0]}: expected some of {', '.join(benches)}")
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    for name in args.names or benches:
        benches[name]()
    if args.report:
        machine = torch.cuda.get_device_name() if CUDA else platform.processor() or "a CPU"
        text = ["# Timings", "", f"Written by `python -m tests.bench --report`; {machine}, "
                f"{args.threads} threads, torch {torch.__version__}.", "", "```", *LINES, "```"]
        args.output.write_text("\n".join(text) + "\n")
        print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
