"""Side-by-side timings: ours and the plain form in one run, no assertions.

    python -m tests.bench                  everything, on one thread (the CPU) and on the GPU if there is one
    python -m tests.bench loader graph     only these
    python -m tests.bench step --threads 2

Each line gives the median of several runs.
"""
import argparse
import copy
import functools
import statistics
import struct
import tempfile
import time

import cv2
import numpy as np
import torch

import heatmap_landmarks
import kprpe
import lddmm_face
import sdfl
import stn_align
from common import datasets, metrics, recognition, synthetic, warp


def median_ms(function, repeats: int = 7) -> float:
    """Median time of one call in ms, after one call to warm up; waits for the GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for i in range(repeats + 1):
        wait()
        began = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[1:])


def bench_faces():
    """Drawn faces a second at 128 px."""
    faces = synthetic.read_faces("train", 200, size=128)
    ms = median_ms(lambda: [face.image() for face in faces], 3)
    print(f"faces     drawn at 128 px: {200 / ms * 1e3:,.0f} a second")


def bench_loader():
    """Loader samples a second at 256 px: kept crops (decode none, warp one) beside decoding every time."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        faces = []
        for i in range(64):  # photographs of 1000 px with a face of 300 px, as they come
            image = cv2.resize(rng.integers(0, 256, (60, 60, 3), np.uint8), (1000, 1000),
                               interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(f"{folder}/{i}.jpg", image)
            faces.append(datasets.Face(f"{folder}/{i}.jpg",
                                       rng.uniform(350, 650, (98, 2)).astype(np.float32)))
        frames = datasets.square_crops(datasets.face_boxes(faces, "landmarks"), 256, 1.25)
        make = lambda: datasets.CropDataset(faces, frames, 256, sdfl.augment, sdfl.REACH, 1 + sdfl.ZOOM,
                                            datasets.SCHEMES[98].flip)
        plain, kept = make(), make()
        kept.regions.keep(folder, verbose=False)
        for name, data in (("decoding each time", plain), ("kept crops", kept)):
            ms = median_ms(lambda: data.__getitems__([(0, i) for i in range(64)]), 5)
            print(f"loader    256 px, 98 points, {name}: {64 / ms * 1e3:,.0f} samples a second and core")


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
        return torch.relu(module.norm(convolve(module.conv, nodes).flatten(0, 1))).view(*nodes.shape[:2], -1)

    nodes = layer(head.first, nodes)
    for block in head.blocks:
        nodes = layer(block.second, layer(block.first, nodes)) + nodes
    return convolve(head.last, nodes)


def bench_graph():
    """Graph layers forward and backward, 98 nodes, batch 32, beside a loop over nodes; mining neighbours."""
    landmarks = torch.randn(7500, 98, 2)
    print(f"graph     neighbour_mask of 7,500 x 98 landmarks: "
          f"{median_ms(lambda: sdfl.neighbour_mask(landmarks, 3), 3):.0f} ms")
    head = sdfl.GraphHead(512, sdfl.neighbour_mask(landmarks, 3), cells=64)
    nodes, maps = torch.randn(32, 98, 256), torch.randn(32, 392, 8, 8)
    A = head.adjacency(maps).detach()

    def ours():
        x = head.first(nodes, A)
        for block in head.blocks:
            x = block(x, A)
        head.last(x, A).sum().backward()

    fast, slow = median_ms(ours), median_ms(lambda: plain_graph(head, nodes, A).sum().backward(), 2)
    print(f"graph     98 nodes, batch 32, forward and backward: {fast:.1f} ms; loop over nodes "
          f"{slow:.1f} ms: {slow / fast:.0f} x")


def saved_bytes(function) -> int:
    """Bytes of the tensors that autograd keeps for the backward of function(), each storage once."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()  # alive until the end: no address is used twice
    return sum(kept.values()) if result is not None else 0


def plain_tps(targets, sources, pixels):
    """Grids (B, pixels, 2) by a solve for each image and a kernel at each of its pixels."""
    def basis(points):
        square = (points[..., None, :] - targets).square().sum(-1)
        kernel = 0.5 * square * square.clamp(min=1e-12).log()
        return torch.cat([kernel, torch.ones_like(points[..., :1]), points], -1)
    rows = basis(targets)
    system = torch.cat([rows, torch.nn.functional.pad(rows[:, -3:].T, (0, 3))]).expand(len(sources), -1, -1)
    w = torch.linalg.solve(system, torch.nn.functional.pad(sources, (0, 0, 0, 3)))
    return basis(pixels.expand(len(sources), -1, -1)) @ w


def bench_tps():
    """The thin-plate grid of 32 images at 112 px, 64 points, beside a solve and a kernel for each image: the
    grid, the images by it, both ways, and what is kept for the way back."""
    maps = stn_align.TPSGrid(8)
    numbers = (2 * torch.randn(32, 128)).requires_grad_()
    image = torch.randn(32, 3, 112, 112)
    targets = maps.spline.targets.float()
    pixels = warp.to_norm(warp.pixel_centres((112, 112)), (112, 112))

    def ours():
        return maps.grid(maps.fit(numbers), 112)

    def plain():
        sources = targets + numbers.unflatten(1, (64, 2)) / 56
        return plain_tps(targets, sources, pixels).unflatten(1, (112, 112))

    def forward(grid):
        with torch.no_grad():
            return warp.sample(image, grid())

    back = lambda grid: warp.sample(image, grid()).square().sum().backward()
    for name, call in (("grid", torch.no_grad()(lambda grid: grid())), ("grid and images, forward", forward),
                       ("grid and images, forward and backward", back)):
        fast, slow = median_ms(lambda: call(ours)), median_ms(lambda: call(plain), 3)
        print(f"tps       {name}, 32 x 112 px, 64 points: {fast:.1f} ms; solved and evaluated for each image "
              f"{slow:.0f} ms: {slow / fast:.0f} x")
    few, many = saved_bytes(ours), saved_bytes(plain)
    print(f"tps       kept for the backward of the grid: {few / 1e6:.1f} MB; for each image "
          f"{many / 1e6:.0f} MB: {many / few:.0f} x")


def bench_rank():
    """Rank-1 of 1,000 probes over 150,000 distractors."""
    gallery, probe = torch.randn(150_000, 128), torch.randn(1000, 128)
    ids = torch.cat([torch.arange(1000), torch.full((149_000,), -100)])
    ms = median_ms(lambda: metrics.rank_k(probe, torch.arange(1000), gallery, ids), 1)
    print(f"rank      1,000 probes x 150,000 gallery rows of 128: {ms / 1e3:.2f} s")


def bench_step():
    """Images a second of a training step: MobileNetV2 at 128 px on the CPU, ResNet34 at 256 px on a GPU."""
    mask = sdfl.neighbour_mask(torch.randn(100, 98, 2), 3)
    cuda = torch.cuda.is_available()
    settings = [("eager float32", False, False, False), ("channels_last", False, False, True)]
    if cuda:
        settings += [("bf16, channels_last", True, False, True),
                     ("bf16, channels_last, compiled", True, True, True)]
    name, size, count = ("resnet34", 256, 64) if cuda else ("mobilenetv2", 128, 32)
    device = torch.device("cuda" if cuda else "cpu")
    for label, amp, compiled, last in settings:
        layout = torch.channels_last if last else torch.contiguous_format
        net = sdfl.SDFL(name, mask, size).to(device, memory_format=layout)
        model = torch.compile(net) if compiled else net
        L = sdfl.laplacian(net.mask)
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
        image = torch.randn(count, 3, size, size, device=device).contiguous(memory_format=layout)
        target = torch.full((count, 98, 2), 128.0, device=device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                pred = model(image)
            optimizer.zero_grad(set_to_none=True)
            sdfl.sdfl_loss(pred, target, L, 1.0, sdfl.soft_wing).backward()
            optimizer.step()

        ms = median_ms(step, 30 if cuda else 3)
        memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else ""
        print(f"step      {name}, {size} px, batch {count}, {label}: {count / ms * 1e3:,.0f} images a second"
              f"{memory}")


def plain_dark(maps: np.ndarray, kernel: int = 11) -> np.ndarray:
    """DARK as published, pass after pass over all maps, each a loop: (B, P, h, w) float64 -> (B, P, 2) px."""
    border, (B, P, height, width) = (kernel - 1) // 2, maps.shape
    flat = maps.reshape(B, P, -1)
    peaks, heights = flat.argmax(2), flat.max(2)
    out = np.stack([peaks % width, peaks // width], 2) * (heights > 0)[..., None].astype(np.float64)
    blurred = np.empty_like(maps)
    for b, p in np.ndindex(B, P):
        padded = np.zeros((height + 2 * border, width + 2 * border))
        padded[border:-border, border:-border] = maps[b, p]
        blurred[b, p] = cv2.GaussianBlur(padded, (kernel, kernel), 0)[border:-border, border:-border]
        blurred[b, p] *= heights[b, p] / blurred[b, p].max()
    logs = np.log(np.maximum(blurred, 1e-10))
    for b, p in np.ndindex(B, P):
        L, (x, y) = logs[b, p], out[b, p].astype(int)
        if 1 < x < width - 2 and 1 < y < height - 2:
            dx, dy = (L[y, x + 1] - L[y, x - 1]) / 2, (L[y + 1, x] - L[y - 1, x]) / 2
            dxx = (L[y, x + 2] - 2 * L[y, x] + L[y, x - 2]) / 4
            dyy = (L[y + 2, x] - 2 * L[y, x] + L[y - 2, x]) / 4
            dxy = (L[y + 1, x + 1] - L[y - 1, x + 1] - L[y + 1, x - 1] + L[y - 1, x - 1]) / 4
            hessian = np.array([[dxx, dxy], [dxy, dyy]])
            if np.linalg.det(hessian) != 0:
                out[b, p] -= np.linalg.inv(hessian) @ [dx, dy]
    return out


def bench_dark():
    """Decoding (16, 106, 96, 96) heatmaps beside the published loop over maps; other inputs and devices."""
    torch.manual_seed(0)
    points = 10 + 170 * torch.rand(16, 106, 2)
    clean = heatmap_landmarks.gaussian_heatmaps(points, 96, 2, 2.0)
    noise = torch.randn(clean.shape)
    for name, maps in (("Gaussians", clean), ("with noise of 0.03", clean + 0.03 * noise), ("noise", noise)):
        slow = median_ms(lambda: plain_dark(maps.numpy().astype(np.float64)), 1)
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            there = maps.to(device)
            fast = median_ms(lambda: heatmap_landmarks.decode_dark(there))
            print(f"dark      16 x 106 maps of 96 px, {name}, {device}: {fast:.1f} ms; loop over maps "
                  f"{slow:.0f} ms: {slow / fast:.1f} x")
    for name, read in heatmap_landmarks.DECODERS.items():
        print(f"dark      {name}, cpu: {median_ms(lambda: read(clean)):.1f} ms; one face at 48 px: "
              f"{median_ms(lambda: read(clean[:1, :, :48, :48])):.2f} ms")


def folded(net: torch.nn.Module) -> torch.nn.Module:
    """A copy of a HeatmapNet for inference, its batch norms folded into the convolutions before them."""
    net = copy.deepcopy(net).eval()
    fuse = torch.nn.utils.fusion.fuse_conv_bn_eval
    for module in list(net.modules()):
        if isinstance(module, torch.nn.Sequential):
            for i in range(len(module) - 1):
                if isinstance(module[i + 1], torch.nn.BatchNorm2d):
                    transposed = isinstance(module[i], torch.nn.ConvTranspose2d)
                    module[i] = fuse(module[i], module[i + 1], transposed)
                    module[i + 1] = torch.nn.Identity()
        for n in (1, 2, 3):  # ResNet's blocks name them
            if isinstance(getattr(module, f"bn{n}", None), torch.nn.BatchNorm2d):
                setattr(module, f"conv{n}", fuse(getattr(module, f"conv{n}"), getattr(module, f"bn{n}")))
                setattr(module, f"bn{n}", torch.nn.Identity())
    return net


def bench_latency():
    """One 192 px face, network and DARK: the paper's 65.7, 131.5 and 241.5 ms were on one core, by TVM."""
    last = dict(memory_format=torch.channels_last)
    for backbone in ("mobilenetv2_1.0", "resnet18", "resnet50"):
        torch.manual_seed(0)
        net = heatmap_landmarks.HeatmapNet(backbone)
        image = torch.randn(4, 3, 192, 192)
        net(image)  # statistics for the batch norms
        forms = {"eager": net.eval(), "channels_last": copy.deepcopy(net).to(**last),
                 "folded": folded(net), "folded, channels_last": folded(net).to(**last)}
        if backbone == "mobilenetv2_1.0":
            forms["channels_last, compiled"] = torch.compile(copy.deepcopy(net).to(**last))
        with torch.inference_mode():
            for name, form in forms.items():
                one = image[:1].to(**last) if "last" in name else image[:1]
                ms = median_ms(lambda: heatmap_landmarks.decode_dark(form(one)), 20)
                print(f"latency   {backbone} SDD, one face, {name}: {ms:.1f} ms")


def bench_heatmap_step():
    """Images a second of a training step of MNetV2-1.0 SDD, 106 points, 192 px."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    settings = [(64, False, False), (64, True, False), (512, False, False), (512, True, False),
                (512, True, True)]
    for count, amp, compiled in settings if cuda else [(16, False, False)]:
        net = heatmap_landmarks.HeatmapNet().to(device, memory_format=torch.channels_last)
        model = torch.compile(net) if compiled else net
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        image = torch.randn(count, 3, 192, 192, device=device).contiguous(memory_format=torch.channels_last)
        points = 192 * torch.rand(count, 106, 2, device=device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                heatmaps = model(image)
            optimizer.zero_grad(set_to_none=True)
            heatmap_landmarks.heatmap_loss(heatmaps, points, net.stride, 2.0).backward()
            optimizer.step()

        ms = median_ms(step, 20 if cuda else 3)
        memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else ""
        print(f"heatmaps  training step, batch {count}, {'bf16' if amp else 'float32'}"
              f"{', compiled' * compiled}: {count / ms * 1e3:,.0f} images a second{memory}")


def plain_flow(mean, momenta, curves, sigma, steps=2):
    """Eq. (7) as it reads: curve after curve, with the kernel of all N x N points."""
    ends = torch.zeros_like(momenta)
    for ids, width in zip(curves.values(), sigma.tolist()):
        own = momenta.new_zeros(momenta.shape[-2], 1)
        own[ids] = 1
        x = mean.expand_as(momenta)
        for _ in range(steps):
            k = (-(x[:, :, None] - x[:, None]).square().sum(-1) / width**2).exp()           # (B, N, N)
            x = x + k @ (momenta * own) / steps
        ends = ends + x * own
    return ends


def bench_flow():
    """The deformation layer, forward and backward, batch 32, beside a loop over curves with N x N kernels."""
    for scheme in (98, 194):
        curves = lddmm_face.carriers(scheme).curves
        count = sum(map(len, curves.values()))
        torch.manual_seed(0)
        mean, momenta = 256 * torch.rand(count, 2), torch.randn(32, count, 2).requires_grad_()
        sigma, layout = lddmm_face.curve_scale(mean, curves), lddmm_face.Layout(curves)
        target, d = mean + torch.randn(32, count, 2), torch.full((32,), 60.0)
        ours = lambda: lddmm_face.deform(mean[None], momenta, layout, sigma)[:, -1]
        fast = median_ms(lambda: ours().square().sum().backward(), 15)
        both = median_ms(lambda: lddmm_face.lddmm_loss(ours(), target, layout, sigma, d).backward(), 15)
        slow = median_ms(lambda: plain_flow(mean, momenta, curves, sigma).square().sum().backward(), 3)
        print(f"flow      {scheme} points, batch 32, forward and backward: {fast:.1f} ms (with the loss "
              f"{both:.1f}); loop over curves, N x N kernel {slow:.0f} ms: {slow / fast:.0f} x")


def bench_lddmm_step():
    """Table 6: samples a second and memory of a training step, HRNet-W18, 256 px, batch 32; GPU only."""
    if not torch.cuda.is_available():
        print("lddmm     training step of Table 6: not run without a GPU")
        return
    device = torch.device("cuda")
    for scheme, points in ((68, 50), (98, 100), (194, 100)):
        for method in ("heatmap", "coord", "lddmm"):
            args = lddmm_face.parse_args(["--method", method])
            mean = 256 * torch.rand(scheme, 2)
            net = lddmm_face.LDDMMFace("hrnet_w18", scheme, mean, points, method=method)
            net = net.to(device, memory_format=torch.channels_last)
            optimizer = torch.optim.Adam(net.parameters(), 1e-4)
            image = torch.randn(32, 3, 256, 256, device=device).contiguous(memory_format=torch.channels_last)
            target = 256 * torch.rand(32, scheme, 2, device=device)
            torch.cuda.reset_peak_memory_stats()

            def step():
                loss = lddmm_face.loss_of(net, net(image), target, args)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

            ms = median_ms(step, 20)
            print(f"lddmm     {scheme} points, {len(net.carriers.ids)} carriers, {method}: "
                  f"{32 / ms * 1e3:,.0f} samples/s, {torch.cuda.max_memory_allocated() / 1e6:,.0f} MB")


def bench_stn_step():
    """A training step of the ResNet34 at 112 px with LocNet, grid, warp and alignment loss, beside one that
    aligns nothing: batch 256 in bf16 on a GPU, 8 on the CPU."""
    cuda = torch.cuda.is_available()
    device, count = torch.device("cuda" if cuda else "cpu"), 256 if cuda else 8
    image = torch.randn(count, 3, 112, 112, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(count, device=device) % 8631
    template = 28 + 56 * torch.rand(68, 2)
    points = template.to(device) + torch.randn(count, 68, 2, device=device)
    plain = None
    for method, align_at in (("none", "input"), ("tps8", "input"), ("tps8", "fmap")):
        net = stn_align.AlignedRecognizer(method, align_at, 34, template)
        learner = stn_align.Learner(net, 8631, 3.0).to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], 1e-4, momentum=0.9)
        if cuda:
            torch.cuda.reset_peak_memory_stats()

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                loss = learner(image, labels, points)[0]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        ms = median_ms(step, 20 if cuda else 3)
        plain = plain or ms
        memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else ""
        print(f"stn       training step, batch {count}, {'bf16' if cuda else 'float32'}, "
              f"{'no alignment' if method == 'none' else f'{method} at {align_at}'}: "
              f"{count / ms * 1e3:,.1f} images a second, {100 * (ms / plain - 1):+.1f} %{memory}")


def naive_bias(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Eq. (11) by an index into a flattened table: (B, H, N, K), (N, N) -> (B, H, N, N)."""
    count, buckets = table.shape[2:]
    flat = torch.arange(count, device=ids.device)[:, None] * buckets + ids
    return table.flatten(2)[:, :, flat.flatten()].unflatten(-1, ids.shape)


def bench_bias():
    """One layer's KP-RPE bias, B = H = 8, 14 x 14 patches, forward and backward, and what it keeps."""
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        torch.manual_seed(0)
        to_pairs = kprpe.PairBias((14, 14), "product").to(device)
        draw = lambda *shape: torch.randn(shape, device=device)
        keypoint, static, grad = draw(8, 8, 49), draw(8, 196, 49), draw(8, 8, 196, 196)
        parts = keypoint.requires_grad_(), static.requires_grad_()
        table = (keypoint[:, :, None] + static).detach().requires_grad_()
        ways = {"flattened index": (lambda: naive_bias(table, to_pairs.ids[0]), (table,)),
                "split, gather": (lambda: to_pairs.gather(*parts, torch.float32), parts),
                "split, product": (lambda: to_pairs.product(*parts, torch.float32), parts)}
        times = {}
        for name, (make, leaves) in ways.items():
            with torch.no_grad():
                forward = median_ms(make, 15)
            times[name] = median_ms(lambda: torch.autograd.grad(make(), leaves, grad), 15)
            print(f"bias      {device}, {name}: {forward:.1f} ms, with the backward pass {times[name]:.1f} "
                  f"ms: {times['flattened index'] / times[name]:.1f} x")


def flex_forward(attn, flex, x, pairs, parts):
    """`kprpe.Attention.forward` of kp-* by FlexAttention: a pair's bias is read from the two parts inside the
    kernel, and never lies in memory."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
    (keypoint, static), ids = (part * attn.scale for part in parts), pairs.ids[0]

    def bias(score, b, h, i, j):
        bucket = ids[i, j]
        return score + keypoint[b, h, bucket] + static[h, i, bucket]

    return attn.proj(flex(q, k, v, score_mod=bias).transpose(1, 2).flatten(2))


def use_path(net, path: str):
    """Makes a KP-RPE network take one path to its bias: PairBias's "gather" or "product", or "flex"."""
    if path != "flex":
        net.pairs.forward = getattr(net.pairs, path)
        return
    from torch.nn.attention.flex_attention import flex_attention
    flex = torch.compile(flex_attention)
    for block in net.blocks:
        block.attn.forward = functools.partial(flex_forward, block.attn, flex)


def bench_vit_step():
    """Images a second and memory of a training step: ViT-S and ViT-B at batch 256, bf16, on a GPU; a small
    one at batch 32 on the CPU. KP-RPE by each path; FlexAttention has a backward pass on a GPU only."""
    cuda = torch.cuda.is_available()
    device, count = torch.device("cuda" if cuda else "cpu"), 256 if cuda else 32
    paths = ("gather", "product", *(["flex"] if cuda else []))
    for size in ("small", "base") if cuda else (dict(dim=192, depth=6, heads=6, mlp_ratio=3),):
        plain = None
        for rpe, path in (("none", ""), ("product", ""), ("irpe", ""), *(("kp-multihead", p) for p in paths)):
            net = kprpe.ViT(size, rpe).to(device)
            optimizer = torch.optim.AdamW(net.parameters(), 1e-3, fused=True)
            image, points = torch.randn(count, 3, 112, 112).to(device), torch.rand(count, 5, 2).to(device)
            if cuda:
                torch.cuda.reset_peak_memory_stats()

            def step():
                with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                    loss = net(image, points).square().mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

            name = f"{size if cuda else 'dim 192, depth 6'}, {rpe}{path and f' by {path}'}, batch {count}"
            try:
                if path:
                    use_path(net, path)
                ms = median_ms(step, 20 if cuda else 3)
            except Exception as error:  # FlexAttention's compiler raises anything
                if path != "flex":
                    raise
                print(f"vit       {name}: does not work here, {str(error).splitlines()[0]}")
                continue
            plain = plain or ms
            memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else ""
            print(f"vit       {name}: {count / ms * 1e3:,.0f} images a second "
                  f"({100 * (plain / ms - 1):+.1f} %){memory}")


def bench_dfa():
    """Faces a second of the face aligner, batches of 32 at 160 px, alone and with the alignment to 112 px."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    net, image = kprpe.DFA().eval().to(device), torch.rand(32, 3, 160, 160, device=device) * 2 - 1
    for count in (1, 2) if device.type == "cpu" else (threads,):
        torch.set_num_threads(count)
        with torch.inference_mode():
            alone = median_ms(lambda: net(image))
            both = median_ms(lambda: kprpe.align_112(image, net(image).landmarks))
        what = f"{count} threads" if device.type == "cpu" else "GPU"
        print(f"dfa       {what}: {32e3 / alone:,.0f} faces a second, {32e3 / both:,.0f} with the alignment")
    torch.set_num_threads(threads)


def bench_records():
    """Images a second out of a record file, 112 px JPEGs, beside decoding the same bytes."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        noise = rng.integers(0, 256, (256, 112, 112, 3), np.uint8)
        smooth = [cv2.convertScaleAbs(cv2.GaussianBlur(p, (0, 0), 3), alpha=4, beta=-380) for p in noise]
        coded = [cv2.imencode(".jpg", p)[1].tobytes() for p in smooth]
        with open(f"{folder}/train.rec", "wb") as data, open(f"{folder}/train.idx", "w") as index:
            for key, image in enumerate(coded):
                index.write(f"{key}\t{data.tell()}\n")
                length = 24 + len(image)
                data.write(struct.pack("<IIIfQQ", 0xced7230a, length, 0, key % 2, key, 0) + image +
                           b"\0" * (-length % 4))
        records = recognition.Records(folder)
        bare = median_ms(lambda: [cv2.imdecode(np.frombuffer(c, np.uint8), cv2.IMREAD_COLOR) for c in coded])
        ours = median_ms(lambda: [records[i] for i in range(256)])
        print(f"records   112 px JPEGs of {sum(map(len, coded)) / 256:,.0f} bytes: {256 / ours * 1e3:,.0f} "
              f"images a second; cv2.imdecode alone {256 / bare * 1e3:,.0f}")


def main(argv=None):
    """Runs the timings that are named, or all."""
    benches = {name[6:]: function for name, function in globals().items() if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(benches))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in benches]
    if unknown:
        parser.error(f"{unknown[0]}: expected some of {', '.join(benches)}")
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    for name in args.names or benches:
        benches[name]()


if __name__ == "__main__":
    main()
