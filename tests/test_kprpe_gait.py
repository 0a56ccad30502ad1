"""kprpe.py, gait: SwinGait-2D and its losses against slow loops, published sizes, whole runs."""
import itertools
import json
import math
import os
import pickle
import socket
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
from common import gait
from tests.test_kprpe import randomise, same, slow_ids

torch.set_num_threads(1)
cv2.setNumThreads(1)
RPES = kprpe.SWIN
KEYPOINT = [rpe for rpe in RPES if rpe.startswith("kp-")]


def size(*parts):
    return sum(weight.numel() for part in parts for weight in part.parameters())


def tiny(rpe, **flags):
    torch.manual_seed(0)
    return kprpe.SwinGait(**dict(dim=8, heads=2, rpe=rpe, joints=3) | flags)


def clips(batch=2, frames=3, joints=3, dtype=torch.float32, seed=0):
    draw = lambda *shape: torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return draw(batch, frames, 64, 44), draw(batch, frames, joints, 2)


# ---- Network -------------------------------------------------------------------------------------

def test_parameters_are_those_of_swingait():
    """Counts of OpenGait's network with 2-D blocks, windows of 1 x 3 x 5, and without its 16th part."""
    net = kprpe.SwinGait()
    first, block, *others = (size(part) for part in net.stem)
    assert (first, block, sum(others)) == (704, 73_984, 1_116_416)
    swin = (net.patch_embed, net.patch_norm, net.blocks, net.widen, net.norm)
    assert size(*swin) == 9_734_016
    assert net.blocks[0].attn.table.numel() == 45 * 16 and net.blocks[5].attn.table.numel() == 45 * 32
    assert net.project.numel() == 15 * 512 * 256 and 16 * net.project.numel() // 15 == 2_097_152
    assert size(kprpe.GaitLoss(256, 3000)) == 15 * (256 * 3000 + 2 * 256)
    without = size(*swin) - 45 * (4 * 16 + 2 * 32)
    keypoint = kprpe.SwinGait(rpe="kp-multihead")
    assert size(keypoint.patch_embed, keypoint.patch_norm, keypoint.blocks, keypoint.widen,
                keypoint.norm) == without
    assert size(keypoint.rpe) == (2 * 17 + 1) * 49 * (4 * 16 + 2 * 32)
    assert kprpe.BasicBlock.expansion == 1 and [block.drop for block in net.blocks] == pytest.approx(
        [0, 0.02, 0.04, 0.06, 0.08, 0.1])


def slow_windows(shift):
    """Tokens (row, column) by window; None of a pair of tokens if they may not see each other."""
    found = []
    for top, left in itertools.product(range(0, 15, 3), range(0, 10, 5)):
        found.append([((top + y + shift[0]) % 15, (left + x + shift[1]) % 10)
                      for y, x in itertools.product(range(3), range(5))])
    return found


def torn(window, shift):
    """For each token of a window, which side of the frame's edges it lies on, if the window lies on both."""
    wrapped = lambda place, own, step: step > 0 and place < step
    return [(wrapped(row, 15, shift[0]) and any(r >= 12 for r, _ in window),
             wrapped(column, 10, shift[1]) and any(c >= 5 for _, c in window)) for row, column in window]


@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_windows_and_mask_are_those_of_a_slow_loop(shift):
    slow, attention = slow_windows(shift), kprpe.WindowAttention(8, 2, "none", shift != (0, 0))
    assert attention.shift == shift
    order = kprpe.window_order(shift)
    assert order.tolist() == [[10 * row + column for row, column in own] for own in slow]
    assert attention.order.tolist() == order.flatten().tolist()
    assert attention.order[attention.back].tolist() == list(range(150))
    for own, mask in zip(slow, attention.mask[:, 0]):
        sides = torn(own, shift)
        assert [[value == 0 for value in row] for row in mask.tolist()] == [
            [i == j for j in sides] for i in sides]


def slow_attention(net, x, shift, bias):
    """One frame's tokens (150, dim) as nested sums; bias(head, i, j) of tokens i, j of a window."""
    dim = x.shape[1]
    d, out = dim // net.heads, torch.zeros_like(x)
    W, b = net.qkv.weight, net.qkv.bias
    for window in slow_windows(shift):
        sides, tokens = torn(window, shift), torch.stack([x[10 * row + column] for row, column in window])
        q, k, v = (tokens @ W[n * dim:(n + 1) * dim].T + b[n * dim:(n + 1) * dim] for n in range(3))
        for i, (row, column) in enumerate(window):
            y = []
            for head in range(net.heads):
                own = slice(head * d, (head + 1) * d)
                logits = torch.stack([q[i, own] @ k[j, own] / math.sqrt(d) + bias(head, i, j) if
                                      sides[i] == sides[j] else x.new_tensor(-math.inf) for j in range(15)])
                y.append(logits.softmax(0) @ v[:, own])
            out[10 * row + column] = net.proj.weight @ torch.cat(y) + net.proj.bias
    return out


@pytest.mark.parametrize("rpe, shifted", list(itertools.product(RPES, [False, True])))
def test_attention_is_that_of_a_slow_loop(rpe, shifted):
    dim, heads, frames = 6, 2, 2
    net = randomise(kprpe.WindowAttention(dim, heads, rpe, shifted).double())
    x = torch.randn(frames, 150, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs, parts, tables = None, None, None
    if rpe in KEYPOINT:
        points = clips(frames, 1, dtype=torch.float64)[1][:, 0]
        encoding = randomise(kprpe.KPRPE(3, kprpe.WINDOW, 1, heads, rpe).double())
        pairs = kprpe.PairBias(kprpe.WINDOW, "product").double()
        parts = [part[0] for part in encoding.split(points)]
        tables, ids = encoding.tables(points)[0], slow_ids(kprpe.WINDOW, "product")        # (F, H, N, K)
    found = net(x, pairs, parts)
    places = list(itertools.product(range(3), range(5)))
    for frame in range(frames):
        def bias(head, i, j):
            if rpe == "swin":  # rows of 9 column offsets, query - key
                rows, columns = places[i][0] - places[j][0], places[i][1] - places[j][1]
                return net.table[head, 9 * (rows + 2) + columns + 4]
            # Eq. (5), Eq. (11): the same in all windows of the frame
            return 0 if tables is None else tables[frame, head, i, ids[i, j]] / math.sqrt(dim / heads)

        same(found[frame], slow_attention(net, x[frame], net.shift, bias))


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
    assert torch.equal(net(image, joints + 0.2), moved) == (rpe not in KEYPOINT)


def test_frames_and_strips_are_pooled_as_in_a_slow_loop():
    net, (image, joints) = tiny("kp-multihead").eval(), clips()
    tokens = {}
    net.norm.register_forward_hook(lambda module, args, out: tokens.update(x=out))
    parts = net(image, joints)
    x = tokens["x"].view(2, 3, 15, 10, 16)  # walk, frame, row, column, channel
    for walk, strip in itertools.product(range(2), range(15)):
        pixels = torch.stack([x[walk, :, strip, column].max(0).values for column in range(10)])
        same(parts[walk, strip], (pixels.mean(0) + pixels.max(0).values) @ net.project[strip], 1e-5)
    # The order of the frames does not count, but joints belong to their frame.
    torch.testing.assert_close(net(image.flip(1), joints.flip(1)), parts)
    randomise(net.rpe, 1.0)
    assert not torch.allclose(net(image, joints.flip(1)), net(image, joints))


def test_gradients_reach_all_parameters_and_the_joints():
    for rpe in RPES:
        net, (image, joints) = tiny(rpe), clips()
        if net.rpe is not None:
            randomise(net.rpe)
        net(image, joints.requires_grad_()).square().sum().backward()
        for name, weight in net.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), name
        assert (joints.grad is not None and bool(joints.grad.any())) == (rpe in KEYPOINT)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="irpe.*swin"):
        tiny("irpe")
    with pytest.raises(ValueError, match="dim 10"):
        tiny("swin", dim=10)
    image, joints = clips()
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 43\).*64, 44"):
        tiny("swin")(image[..., :43])
    with pytest.raises(ValueError, match="needs joints"):
        tiny("kp-multihead")(image)
    with pytest.raises(ValueError, match=r"\(6, 2, 2\)"):
        tiny("kp-multihead")(image, joints[:, :, :2])
    with pytest.raises(ValueError, match="keypoints from"):
        tiny("kp-multihead")(image, 44 * joints)


# ---- Losses --------------------------------------------------------------------------------------

def embedded(batch=6, strips=3, dim=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, strips, dim, generator=generator, dtype=dtype), torch.tensor([0, 0, 1, 1, 2, 0])


def slow_triplets(parts, labels, margin):
    means = []
    for strip in range(parts.shape[1]):
        x, found = parts[:, strip], []
        for a, p, n in itertools.product(range(len(x)), repeat=3):
            if a != p and labels[a] == labels[p] and labels[a] != labels[n]:
                found.append(margin + (x[a] - x[p]).norm() - (x[a] - x[n]).norm())
        found = [loss for loss in found if loss > 0]
        means.append(sum(found) / max(len(found), 1))
    return sum(means) / len(means)


def test_triplet_loss_is_that_of_a_triple_loop():
    parts, labels = embedded()
    for margin in (0.2, 1.5):
        same(kprpe.triplet_loss(parts, labels, margin), slow_triplets(parts, labels, margin))
    apart = torch.nn.functional.one_hot(labels)[:, None].double() * 10
    assert kprpe.triplet_loss(apart, labels) == 0  # no triplet is left
    equal = torch.zeros(4, 1, 2, requires_grad=True)
    kprpe.triplet_loss(equal, torch.tensor([0, 0, 1, 1])).backward()
    assert equal.grad.isfinite().all()  # also at a distance of 0


def test_cross_entropy_is_that_of_the_plain_form():
    (parts, labels), people = embedded(), 4
    net = randomise(kprpe.GaitLoss(4, people, strips=3, margin=0.2).double())
    total = 0
    for strip in range(3):
        own = slice(4 * strip, 4 * strip + 4)
        x = parts[:, strip]
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
        x = x * net.norm.weight[own] + net.norm.bias[own]
        for i, label in enumerate(labels.tolist()):
            cosines = [x[i] @ centre / x[i].norm() / centre.norm() for centre in net.centres[strip]]
            log_p = (16 * torch.stack(cosines)).log_softmax(0)
            total = total - 0.9 * log_p[label] - 0.1 * log_p.mean()
    same(net(parts, labels), total / 18 + slow_triplets(parts, labels, 0.2), 1e-8)


def one_step(rank=0, world=1, wrap=lambda module: module):
    """Gradients of a linear network and of the loss's own parameters, and the loss."""
    torch.manual_seed(0)
    linear, loss_of = nn.Linear(5, 12), kprpe.GaitLoss(4, 3, strips=3)
    x, labels = torch.randn(8, 5), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    model, whole = wrap(linear), wrap(loss_of)
    loss = whole(model(x.chunk(world)[rank]).unflatten(1, (3, 4)), labels.chunk(world)[rank])
    loss.backward()
    return [loss.detach()] + [weight.grad for part in (linear, loss_of) for weight in part.parameters()] + [
        loss_of.norm.running_var]


def two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    wrap = lambda module: nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)
    torch.save(one_step(rank, 2, wrap), f"{folder}/rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # the exit of a Python that has had gloo's threads aborts now and then on a busy machine


def test_two_processes_learn_as_one(tmp_path):
    mp.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for one, two in zip(one_step(), torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)):
            torch.testing.assert_close(two, one)


def test_a_tiny_set_is_learned():
    image, joints = clips(8, 1, seed=3)
    labels, net = torch.arange(8) // 2, tiny("kp-multihead", drop_path=0.0)
    loss_of = kprpe.GaitLoss(8, 4)
    args = kprpe.parse_args(["--task", "gait"])
    optimizer, losses = torch.optim.AdamW(kprpe.gait_groups(args, net, loss_of), 3e-3), []
    for _ in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * group["scale"]
        loss = loss_of(net(image, joints), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert (loss_of.cosines(net(image, joints)).mean(1).argmax(1) == labels).all()


def test_what_decays_and_what_learns_faster():
    args = kprpe.parse_args(["--task", "gait", "--data", "gait3d"])
    for rpe, scale in (("swin", 1), ("kp-multihead", 2)):  # d = 4
        args.rpe, net, loss_of = rpe, tiny(rpe), kprpe.GaitLoss(8, 4)
        groups = kprpe.gait_groups(args, net, loss_of)
        names = {weight: name for part in (net, nn.ModuleDict(dict(loss=loss_of)))
                 for name, weight in part.named_parameters()}
        found = {names[weight]: (group["weight_decay"], group["scale"])
                 for group in groups for weight in group["params"]}
        assert len(found) == len(names)
        for name, (decay, own) in found.items():
            encoding = name.startswith("rpe.") or "table" in name
            free = any(word in name for word in ("patch_", "norm", "bias", "table", "bn", ".0.1.",
                                                 "downsample.1", "widen.0"))
            assert own == (scale if encoding else 1), name
            assert decay == (0 if free else 0.02 / own), name


# ---- Runs ----------------------------------------------------------------------------------------

@pytest.fixture
def walk(tmp_path, monkeypatch):
    """Runs `--task gait` on a few walkers in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kprpe, "DRAWN_WALKERS", {
        "train": dict(people=4, sequences=4, frames=3), "test": dict(people=3, sequences=2, frames=3)})

    def run(*flags):
        return kprpe.main(kprpe.parse_args(["--task", "gait", *flags]))

    return run


SHORT = "--dim 8 --heads 2 --frames 2 --batch-size 8 --eval-every 1 --device cpu".split()


def test_train_resume_and_evaluate(walk, tmp_path, capsys):
    scores = walk(*SHORT, "--epochs", "2", "--also-rpe", "swin", "--output", "a")
    printed = capsys.readouterr().out
    assert {"rank1", "rank5", "rank10", "map", "minp", "rank1@gei", "rank1@unaligned", "minp@unaligned",
            "rank1@unaligned@gei", "map@swin"} <= scores.keys()
    for row in ("kp-multihead   ", "kp-multihead, unaligned", "swin   ", "gait energy image, unaligned"):
        assert row in printed
    files = {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file()}
    own = {"gait.png", "last.pt", "log.jsonl"}
    assert files == own | {"offsets.png"} | {f"swin/{name}" for name in own}
    rows = [json.loads(line) for line in open("a/log.jsonl")]
    assert [row["epoch"] for row in rows] == [1, 2] and all("map@unaligned" in row for row in rows)
    # One epoch, then its second, as if the run had been killed
    args = kprpe.parse_args(["--task", "gait", *SHORT, "--epochs", "2", "--also-rpe", "", "--output", "b"])
    with pytest.MonkeyPatch.context() as patch:
        epoch = kprpe.one_pass
        patch.setattr(kprpe, "one_pass", lambda args, n, *rest: 1 / 0 if n else epoch(args, n, *rest))
        with pytest.raises(ZeroDivisionError):
            kprpe.main(args)
    again = walk("--resume", "--output", "b", "--also-rpe", "", "--device", "cpu")
    assert again == {key: value for key, value in scores.items() if not key.endswith("@swin")}
    one, two = (kprpe.load(f"{folder}/last.pt", "kprpe") for folder in "ab")
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    assert all(torch.equal(value, two["head"][name]) for name, value in one["head"].items())
    # A checkpoint by itself, and one of another task
    assert walk("--eval", "a/last.pt", "--output", "c") == again and (tmp_path / "c/offsets.png").exists()
    aligned = walk("--eval", "a/swin/last.pt", "--no-unaligned")
    assert aligned["map"] == scores["map@swin"] and "map@unaligned" not in aligned
    with pytest.raises(ValueError, match="--task gait, not face"):
        kprpe.main(kprpe.parse_args(["--eval", "a/last.pt"]))


def whole_run(rank, port, people, flags):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    kprpe.DRAWN_WALKERS = people
    kprpe.main(kprpe.parse_args(flags))


def test_a_run_of_two_processes(walk, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--task", "gait", *SHORT, "--epochs", "1", "--output", "a"]
    mp.spawn(whole_run, (port, kprpe.DRAWN_WALKERS, flags), nprocs=2)
    for folder in ("a", "a/swin"):
        row = json.loads(open(f"{folder}/log.jsonl").read())
        assert kprpe.load(f"{folder}/last.pt", "kprpe")["world"] == 2
        again = walk("--eval", f"{folder}/last.pt", "--device", "cpu")
        assert again == {key: pytest.approx(row[key], abs=1e-6) for key in again}


def test_gait3d_is_trained_on_resumed_and_evaluated(walk, tmp_path, capsys):
    """Single images with texts, packed ones, joints far out; then a set in which nobody can be found."""
    rng, people = np.random.default_rng(0), ["0000", "0001", "0002", "0003"]
    sets = dict(TRAIN_SET=people[:2], TEST_SET=people[2:],
                PROBE_SET=[f"{person}-camid0_v0-seq0" for person in people[2:]])
    for person, video in itertools.product(people, range(3)):
        walker = gait.walkers("train", 4, sequences=3, frames=4)[3 * int(person) + video]
        crops, joints = walker.load(np.arange)
        folders = [tmp_path.joinpath("g3d", kind, person, f"camid{video}_v{video}", "seq0")
                   for kind in ("2D_Silhouettes", "2D_Poses")]
        for folder in folders:
            folder.mkdir(parents=True)
        joints[0, 9] += (4000, 0)
        if video:
            for t, (crop, own) in enumerate(zip(crops, joints)):
                cv2.imwrite(str(folders[0] / f"{t:04d}.png"), crop)
                values = np.column_stack([own, rng.random(17)]).ravel()
                (folders[1] / f"{t:04d}.txt").write_text(",".join(map(str, [0, 0, *values])) + "\n")
        else:
            packed = np.column_stack([joints.reshape(-1, 2), np.ones(68)]).reshape(4, 17, 3)
            for folder, array in zip(folders, (np.pad(crops, ((0, 0), (0, 0), (10, 10))), packed)):
                (folder / "seq0.pkl").write_bytes(pickle.dumps(array))
    listed = tmp_path / "g3d" / "Gait3D.json"
    listed.write_text(json.dumps(sets))
    flags = [*SHORT, "--data", "gait3d", "--data-root", "g3d", "--warmup", "0"]
    scores = walk(*flags, "--epochs", "1", "--output", "a")
    assert {"rank1", "rank5", "rank10", "map", "minp", "rank1@gei"} == scores.keys()
    state = kprpe.load("a/last.pt", "kprpe")
    assert state["classes"] == [2, 6]
    state["args"]["epochs"] = 2
    torch.save(state, "a/last.pt")
    again = walk("--data", "gait3d", "--resume", "--output", "a", "--device", "cpu")
    assert walk("--eval", "a/last.pt", "--no-unaligned", "--device", "cpu") == again
    assert "gait energy" in capsys.readouterr().out
    assert walk("--eval", "a/last.pt", "--data", "walkers", "--device", "cpu").keys() > scores.keys()
    listed.write_text(json.dumps(sets | dict(PROBE_SET=[])))
    with pytest.raises(ValueError, match="none of 0 probes has a mate among 6 others"):
        walk(*flags, "--output", "b")
    assert not Path("b").exists()


def test_evaluation_against_a_plain_form(walk):
    args = kprpe.parse_args(["--task", "gait", "--no-unaligned", "--device", "cpu"])
    net, device = tiny("swin", joints=17).eval(), torch.device("cpu")
    arms = kprpe.gait_arms(args, device)
    data = arms[0].data
    assert len(data.ids) == 3 and len(data) == 6
    scores = kprpe.evaluate_gait(net, arms, args, device)
    batches = [data.__getitems__([(0, i)]) for i in range(6)]
    with torch.no_grad():
        parts = [net(*kprpe.gait_inputs(batch, device))[0] for batch in batches]
    probes = [i for i, own in enumerate(data.sequences) if own.probe]
    gallery = [i for i in range(6) if i not in probes]
    means = [batch["image"].float().mean(1).view(1, -1) for batch in batches]
    for name, x in (("rank1", parts), ("rank1@gei", means)):
        hits = []
        for i in probes:
            distance = [(x[i] - x[j]).norm(dim=1).mean().item() for j in gallery]
            hits.append(data.labels[gallery[distance.index(min(distance))]] == data.labels[i])
        assert scores[name] == pytest.approx(sum(hits) / len(probes))


@pytest.mark.parametrize("flags, message", [
    ("--rpe irpe", "--rpe irpe: expected one of none, swin"), ("--also-rpe cross", "--also-rpe cross"),
    ("--batch-size 6", "--batch-size 6: expected a multiple of 4"), ("--frames 0", "--frames 0"),
    ("--margin 2", "--margin does not belong to --task gait")])
def test_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        kprpe.parse_args(["--task", "gait", *flags.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--rpe swin", "--frames 4"])
def test_faces_have_no_swin_and_no_frames(flags, capsys):
    with pytest.raises(SystemExit):
        kprpe.parse_args(flags.split())
    assert "--task face" in capsys.readouterr().err


def test_joints_lie_on_the_silhouettes():
    """What the network gets of a batch: bright pixels under most joints."""
    data = gait.GaitDataset(gait.walkers("train", 2, sequences=1, frames=3), None)
    image, joints = kprpe.gait_inputs(data.__getitems__([(0, 1)]), torch.device("cpu"))
    assert image.shape == (1, 3, 64, 44) and 0.99 < image.max() <= 1
    under = F.grid_sample(image[0][:, None], 2 * joints[0][:, :, None] - 1, align_corners=False)
    assert (under > 0.5).double().mean() > 0.8
