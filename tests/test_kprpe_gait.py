"""kprpe.py, gait: SwinGait-2D and its losses against slow loops, published sizes, whole runs."""
import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import kprpe
from common import UserError, gait

torch.set_num_threads(1)
RPES = kprpe.SWIN


def same(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, torch.as_tensor(b).to(a), rtol=0, atol=tolerance)


def randomise(module, scale=0.3):
    """All parameters drawn anew, those that start at zero too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def size(*parts):
    return sum(weight.numel() for part in parts for weight in part.parameters())


def tiny(rpe, **flags):
    torch.manual_seed(0)
    return kprpe.SwinGait(**dict(dim=8, heads=2, rpe=rpe, joints=3) | flags)


def clips(batch=2, frames=3, joints=3):
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(batch, frames, 64, 44, generator=generator),
            torch.rand(batch, frames, joints, 2, generator=generator))


# ---- Network -------------------------------------------------------------------------------------

def test_parameters_are_those_of_swingait():
    """Counts of OpenGait's network with 2-D blocks, windows of 1 x 3 x 5, without its 16th part."""
    net = kprpe.SwinGait()
    first, block, *others = (size(part) for part in net.stem)
    assert (first, block, sum(others)) == (704, 73_984, 1_116_416)
    assert first + block + sum(others) == 1_191_104
    assert size(net.patch_embed, net.patch_norm, net.blocks, net.widen, net.norm) == 9_734_016
    assert net.blocks[0].attn.table.numel() == 45 * 16
    assert net.blocks[5].attn.table.numel() == 45 * 32
    assert net.project.numel() == 1_966_080 == 15 * 512 * 256
    assert size(kprpe.GaitLoss(256, 3000)) == 15 * (256 * 3000 + 2 * 256)
    tables = 45 * (4 * 16 + 2 * 32)
    keypoint = kprpe.SwinGait(rpe="kp-multihead")
    assert size(keypoint.rpe) == (2 * 17 + 1) * 49 * (4 * 16 + 2 * 32)
    assert size(keypoint) - size(keypoint.rpe) == size(net) - tables
    assert [block.drop for block in net.blocks] == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1])


def slow_windows(shift):
    """Tokens (row, column) of each window."""
    windows = []
    for top, left in itertools.product(range(0, 15, 3), range(0, 10, 5)):
        windows.append([((top + y + shift[0]) % 15, (left + x + shift[1]) % 10)
                        for y, x in itertools.product(range(3), range(5))])
    return windows


def sides(window, shift):
    """For each token of a window whether it came in over the frame's end: below, on the right."""
    below = any(row >= 12 for row, _ in window) and shift[0] > 0
    right = any(column >= 5 for _, column in window) and shift[1] > 0
    return [(below and row < shift[0], right and column < shift[1]) for row, column in window]


def slow_attention(net, x, bias):
    """One frame's tokens (150, dim) as nested sums; bias (H, 15, 15)."""
    dim = x.shape[1]
    d, out = dim // net.heads, torch.zeros_like(x)
    W, b = net.qkv.weight, net.qkv.bias
    for window in slow_windows(net.shift):
        side = sides(window, net.shift)
        tokens = torch.stack([x[10 * row + column] for row, column in window])
        q, k, v = (tokens @ W[n * dim:(n + 1) * dim].T + b[n * dim:(n + 1) * dim] for n in range(3))
        for i, (row, column) in enumerate(window):
            y = []
            for head in range(net.heads):
                own = slice(head * d, (head + 1) * d)
                logits = x.new_full((15,), -math.inf)
                for j in range(15):
                    if side[i] == side[j]:
                        logits[j] = q[i, own] @ k[j, own] / math.sqrt(d) + bias[head, i, j]
                y.append(logits.softmax(0) @ v[:, own])
            out[10 * row + column] = net.proj.weight @ torch.cat(y) + net.proj.bias
    return out


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("kind", ["none", "table", "bias"])
def test_attention_is_that_of_a_slow_loop(kind, shifted):
    dim, heads, frames = 6, 2, 2
    net = randomise(kprpe.WindowAttention(dim, heads, kind == "table", shifted).double())
    assert net.shift == ((1, 2) if shifted else (0, 0))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(frames, 150, dim, generator=generator, dtype=torch.float64)
    bias = torch.zeros(frames, heads, 15, 15, dtype=torch.float64)
    if kind == "bias":
        bias = torch.randn(bias.shape, generator=generator, dtype=torch.float64)
    if kind == "table":  # rows of 9 column offsets, query - key
        places = list(itertools.product(range(3), range(5)))
        for (i, p), (j, q) in itertools.product(enumerate(places), repeat=2):
            bias[:, :, i, j] = net.table[:, 9 * (p[0] - q[0] + 2) + p[1] - q[1] + 4]
    found = net(x, bias if kind == "bias" else None)
    for frame in range(frames):
        same(found[frame], slow_attention(net, x[frame], bias[frame]))


def test_windows_meet_the_fused_kernels_of_attention(monkeypatch):
    """They take four axes, and a bias of the queries' type."""
    seen = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *given: (seen.append(given), original(*given))[1])
    image, joints = clips()
    for rpe in RPES:
        with torch.autocast("cpu", torch.bfloat16):
            tiny(rpe)(image, joints)
    for q, k, v, bias in seen:
        assert q.ndim == k.ndim == v.ndim == bias.ndim == 4
        assert q.dtype == bias.dtype == torch.bfloat16
        assert bias.expand(60, q.shape[1], 15, 15).shape[:2] == q.shape[:2]


def test_the_bias_of_a_frame_is_eq_11_over_the_grid_of_a_window():
    net, (_, joints) = tiny("kp-multihead"), clips(1)
    randomise(net.rpe)
    ids = kprpe.bucket_ids(*kprpe.WINDOW, "product")
    for n, bias in enumerate(net.biases(joints[0])):
        stage, layer = divmod(n, 4)
        rpe = net.rpe[stage]
        heads = 2 * (stage + 1)
        assert bias.shape == (3, heads, 15, 15)
        W = rpe.keypoint_linear.weight.view(-1, heads, 49, 3, 2)[layer]
        b = rpe.keypoint_linear.bias.view(-1, heads, 49)[layer]
        for frame, head, i, j in ((0, 0, 0, 0), (1, 1, 2, 13), (2, heads - 1, 14, 5)):
            M = torch.tensor([(i % 5 + 0.5) / 5, (i // 5 + 0.5) / 3])
            f = ((M - joints[0, frame]) * W[head, ids[i, j]]).sum() + b[head, ids[i, j]]
            same(bias[frame, head, i, j], f / math.sqrt(4), 1e-5)


@pytest.mark.parametrize("rpe", RPES)
def test_an_encoding_starts_as_none_then_counts(rpe):
    (image, joints), plain, net = clips(), tiny("none").eval(), tiny(rpe).eval()
    start = plain(image)
    assert start.shape == (2, 15, 8) and torch.allclose(start, net(image, joints), atol=1e-6)
    for name, weight in net.named_parameters():
        if ".table" in name or name.startswith("rpe."):
            nn.init.normal_(weight)
    moved = net(image, joints)
    assert torch.allclose(moved, start, atol=1e-4) == (rpe == "none")
    assert torch.equal(net(image, joints + 0.2), moved) == (rpe not in kprpe.KEYPOINT)


def test_frames_and_strips_are_pooled_as_in_a_slow_loop():
    net, (image, joints) = tiny("kp-multihead").eval(), clips()
    tokens = {}
    net.norm.register_forward_hook(lambda module, args, out: tokens.update(x=out))
    strips = net(image, joints)
    x = tokens["x"].view(2, 3, 15, 10, 16)  # walk, frame, row, column, channel
    for walk, strip in itertools.product(range(2), range(15)):
        columns = [x[walk, :, strip, column].max(0).values for column in range(10)]
        columns = torch.stack(columns)
        expected = (columns.mean(0) + columns.max(0).values) @ net.project[strip]
        same(strips[walk, strip], expected, 1e-5)
    # The order of the frames does not count, but joints belong to their frame.
    torch.testing.assert_close(net(image.flip(1), joints.flip(1)), strips)
    randomise(net.rpe, 1.0)
    assert not torch.allclose(net(image, joints.flip(1)), net(image, joints))


def test_gradients_reach_all_parameters_and_the_joints():
    for rpe in RPES:
        net, (image, joints) = tiny(rpe), clips()
        if net.rpe is not None:
            randomise(net.rpe)
        net(image, joints.requires_grad_()).square().sum().backward()
        for name, weight in net.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all(), name
            assert weight.grad.any(), name
        assert (joints.grad is not None) == (rpe in kprpe.KEYPOINT)


def test_what_does_not_fit_is_refused():
    for flags in (dict(rpe="irpe"), dict(rpe="swin", dim=10), dict(rpe="swin", heads=3)):
        with pytest.raises(UserError, match="expected a multiple of 4 and of the heads, and"):
            tiny(**flags)
    image, joints = clips()
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 43\).*64, 44"):
        tiny("swin")(image[..., :43])
    with pytest.raises(ValueError, match="needs joints"):
        tiny("kp-multihead")(image)
    with pytest.raises(ValueError, match=r"\(6, 2, 2\)"):
        tiny("kp-multihead")(image, joints[:, :, :2])


# ---- Losses --------------------------------------------------------------------------------------

def embedded(batch=6, strips=3, dim=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, strips, dim, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 0, 1, 1, 2, 0])


def slow_triplets(strips, labels, margin):
    means = []
    for x in strips.unbind(1):
        found = []
        for a, p, n in itertools.product(range(len(x)), repeat=3):
            if a != p and labels[a] == labels[p] and labels[a] != labels[n]:
                found.append(margin + (x[a] - x[p]).norm() - (x[a] - x[n]).norm())
        found = [loss for loss in found if loss > 0]
        means.append(sum(found) / max(len(found), 1))
    return sum(means) / len(means)


def test_triplet_loss_is_that_of_a_triple_loop():
    strips, labels = embedded()
    for margin in (0.2, 1.5):
        expected = slow_triplets(strips, labels, margin)
        same(kprpe.triplet_loss(strips, labels, margin), expected)
    apart = F.one_hot(labels)[:, None].double() * 10
    assert kprpe.triplet_loss(apart, labels) == 0  # no triplet is left
    equal = torch.zeros(4, 1, 2, requires_grad=True)
    kprpe.triplet_loss(equal, torch.tensor([0, 0, 1, 1])).backward()
    assert equal.grad.isfinite().all()  # also at a distance of 0


def test_cross_entropy_is_that_of_the_plain_form():
    (strips, labels), people = embedded(), 4
    net = randomise(kprpe.GaitLoss(4, people, strips=3).double())
    total = 0
    for strip, x in enumerate(strips.unbind(1)):
        own = slice(4 * strip, 4 * strip + 4)
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
        x = x * net.norm.weight[own] + net.norm.bias[own]
        for i, label in enumerate(labels.tolist()):
            cosines = [x[i] @ c / x[i].norm() / c.norm() for c in net.centres[strip]]
            log_p = (16 * torch.stack(cosines)).log_softmax(0)
            total = total - 0.9 * log_p[label] - 0.1 * log_p.mean()
    same(net(strips, labels), total / 18 + slow_triplets(strips, labels, 0.2), 1e-8)


def one_step(rank=0, world=1, wrap=lambda module: module):
    """The loss of a linear network, and gradients of it and of the loss's own parameters."""
    torch.manual_seed(0)
    linear, loss_of = nn.Linear(5, 12), kprpe.GaitLoss(4, 3, strips=3)
    x, labels = torch.randn(8, 5), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    model, whole = wrap(linear), wrap(loss_of)
    strips = model(x.chunk(world)[rank]).unflatten(1, (3, 4))
    loss = whole(strips, labels.chunk(world)[rank])
    loss.backward()
    weights = [*linear.parameters(), *loss_of.parameters()]
    return [loss.detach(), *(weight.grad for weight in weights), loss_of.norm.running_var]


def two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def wrap(module):
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)

    torch.save(one_step(rank, 2, wrap), f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_learn_as_one(tmp_path):
    mp.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for one, two in zip(one_step(), found):
            torch.testing.assert_close(two, one)


def test_what_decays_and_what_learns_faster():
    args = kprpe.parse_args(["--task", "gait", "--data", "gait3d", "--dim", "8", "--heads", "2"])
    for rpe, scale in (("swin", 1), ("kp-multihead", 2)):  # d = 4
        args.rpe, net, head = rpe, tiny(rpe), kprpe.GaitLoss(8, 4)
        names = {weight: name for name, weight in net.named_parameters()}
        names |= {weight: f"head.{name}" for name, weight in head.named_parameters()}
        found = {names[weight]: (group["weight_decay"], group["scale"])
                 for group in kprpe.gait_groups(args, net, head) for weight in group["params"]}
        assert found.keys() == set(names.values())
        for name, (decay, own) in found.items():
            encoding = name.startswith("rpe.") or "table" in name
            free = any(word in name for word in ("patch_", "norm", "bias", "table", "bn", ".0.1.",
                                                 "downsample.1", "widen.0"))
            assert own == (scale if encoding else 1), name
            assert decay == (0 if free else 0.02 / own), name


# ---- Data and runs -------------------------------------------------------------------------------

@pytest.fixture
def walk(tmp_path, monkeypatch):
    """Runs `--task gait` on a few walkers in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kprpe, "DRAWN_WALKERS", {
        "train": dict(people=4, sequences=4, frames=3),
        "test": dict(people=3, sequences=2, frames=3)})

    def run(*flags):
        return kprpe.main(kprpe.parse_args(["--task", "gait", "--device", "cpu", *flags]))

    return run


SHORT = "--dim 8 --heads 2 --frames 2 --batch-size 8".split()


def test_drawn_walkers_are_drawn_once(walk, monkeypatch):
    args = kprpe.parse_args(["--task", "gait", "--frames", "2", "--limit", "2"])
    plain = gait.walkers("train", **kprpe.DRAWN_WALKERS["train"])[:8]
    expected = gait.GaitDataset(plain, 2, 0, True).__getitems__([(3, 0), (3, 7)])
    data = kprpe.gait_set(args, "train")
    assert len(data) == 8
    monkeypatch.setattr(gait, "_walk", None)
    found = pickle.loads(pickle.dumps(data)).__getitems__([(3, 0), (3, 7)])  # as a worker has it
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_train_resume_and_evaluate(walk, tmp_path, monkeypatch, capsys):
    scores = walk(*SHORT, "--epochs", "3", "--output", "a")
    printed = capsys.readouterr().out
    names = {"rank1", "rank5", "rank10", "map", "minp", "rank1@gei"}
    names |= {"rank1@unaligned@gei", "map@unaligned"}
    assert names <= scores.keys() and len(scores) == 12
    for row in ("kp-multihead   ", "kp-multihead, unaligned", "gait energy image, unaligned"):
        assert row in printed
    rows = [json.loads(line) for line in open("a/log.jsonl")]
    assert ["map" in row for row in rows] == [False, False, True]  # evaluated at the end only
    assert (tmp_path / "a" / "gait.png").exists()

    save = kprpe.run.Job.save

    def dies(job, epoch, *given, **more):  # killed after the second epoch, and taken up again
        save(job, epoch, *given, **more)
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kprpe.run.Job, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            walk(*SHORT, "--epochs", "3", "--output", "b")
    assert walk("--resume", "--output", "b") == scores
    one, two = (torch.load(f"{folder}/last.pt", weights_only=True) for folder in "ab")
    for part in ("model", "head"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())

    assert walk("--eval", "a/last.pt", "--output", "c") == scores
    assert (tmp_path / "c" / "gait.png").exists()
    aligned = walk("--eval", "a/last.pt", "--no-unaligned")
    assert aligned == {key: scores[key] for key in aligned} and "map@unaligned" not in aligned
    with pytest.raises(UserError, match="is no checkpoint of kprpe.py, but of kprpe.py --task gait"):
        kprpe.main(kprpe.parse_args(["--eval", "a/last.pt", "--device", "cpu"]))
    with pytest.raises(UserError, match="--batch-size 6: expected a multiple of 4 walks"):
        walk(*SHORT, "--batch-size", "6")


def test_a_test_split_in_which_nobody_can_be_found_is_refused(walk, tmp_path):
    kprpe.DRAWN_WALKERS["test"]["sequences"] = 1
    with pytest.raises(ValueError, match="none of 3 probes has a mate among 0 others"):
        walk(*SHORT, "--output", "b")
    assert not (tmp_path / "b").exists()


def test_evaluation_against_a_plain_form(walk):
    args = kprpe.parse_args(["--task", "gait", "--no-unaligned", "--device", "cpu"])
    net = tiny("swin", joints=17).eval()
    tests = kprpe.gait_tests(args)
    data = tests[""]
    assert len(data.ids) == 3 and len(data) == 6
    scores = kprpe.evaluate_gait(net, tests, args)
    batches = [data.__getitems__([(0, i)]) for i in range(6)]
    with torch.no_grad():
        strips = [net(*kprpe.gait_inputs(batch, torch.device("cpu")))[0] for batch in batches]
    energy = [batch["image"].float().mean(1).view(1, -1) for batch in batches]
    probes = np.flatnonzero(data.probe)
    gallery = np.flatnonzero(~data.probe)
    for name, x in (("rank1", strips), ("rank1@gei", energy)):
        hits = []
        for i in probes:
            distance = [(x[i] - x[j]).norm(dim=1).mean().item() for j in gallery]
            hits.append(data.labels[gallery[np.argmin(distance)]] == data.labels[i])
        assert scores[name] == pytest.approx(np.mean(hits))


def test_joints_lie_on_the_silhouettes():
    """What the network gets of a batch: bright pixels under most joints."""
    data = gait.GaitDataset(gait.walkers("train", 2, sequences=1, frames=3), None)
    image, joints = kprpe.gait_inputs(data.__getitems__([(0, 1)]), torch.device("cpu"))
    assert image.shape == (1, 3, 64, 44) and 0.99 < image.max() <= 1
    under = F.grid_sample(image[0][:, None], 2 * joints[0][:, :, None] - 1, align_corners=False)
    assert (under > 0.5).double().mean() > 0.8
