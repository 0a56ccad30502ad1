"""Published weights: networks in the form of the authors' files, read back; hostile files."""
import json
import re
import sys
import types

import numpy as np
import pytest
import torch

import kprpe
import lddmm_face
from common import UserError, datasets
from common.checkpoint import LIGHTNING, read_tensors

torch.set_num_threads(1)


def randomise(net, seed=0):
    """All weights and statistics drawn anew: none is left at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    state = net.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            scale = 0.5 if value.ndim < 2 or "rpe" in name else 2 / value[0].numel() ** 0.5
            state[name] = 0.5 + noise if "var" in name else scale * (noise - 0.5)
    net.load_state_dict(state)
    return net.eval()


def faces(count=2, side=112):
    generator = torch.Generator().manual_seed(1)
    image = 2 * torch.rand(count, 3, side, side, generator=generator) - 1
    return image, torch.rand(count, 5, 2, generator=generator)


def write_safetensors(path, state):
    """A .safetensors file as the library writes it, its names in another order."""
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name in sorted(state):
        value = state[name].contiguous()
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}[value.dtype]
        raw = value.numpy().tobytes()
        header[name] = dict(dtype=dtype, shape=list(value.shape),
                            data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def same(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


# ---- Recognisers ---------------------------------------------------------------------------------

def vit(rpe, **size):
    size = dict(dim=32, depth=2, heads=8, mlp_ratio=2, patch=28, image_size=112) | size
    torch.manual_seed(0)
    return randomise(kprpe.ViT(size, rpe, features=6))


def authors_kprpe(net):
    """KP-RPE's state dict by the authors' names, for keypoints x / W and a B that is not divided
    by sqrt(d)."""
    state = dict(net.state_dict())
    weight = state.pop("rpe.keypoint_linear.weight") * net.rpe.scale
    bias = state.pop("rpe.keypoint_linear.bias") * net.rpe.scale
    # W (M - p - 0.5 / 112) + b, p = x / 112, is W (M - p) + (b - 0.5 / 112 sum W)
    state["keypoint_linear.weight"] = weight
    state["keypoint_linear.bias"] = bias - 0.5 / 112 * weight.sum(1)
    return state


@torch.no_grad()
def test_kprpe_from_safetensors(tmp_path):
    net = vit("kp-multihead", heads=4)
    image, keypoints = faces()
    path = write_safetensors(tmp_path / "model.safetensors",
                             prefixed(authors_kprpe(net), "model.net."))
    found, info = kprpe.load_published(path)
    assert info == dict(kind="KP-RPE", colour="RGB", size=112, source="CVLface, model.safetensors")
    assert not found.training and found.blocks[0].attn.heads == 4
    same(found(image, keypoints), net(image, keypoints))


@torch.no_grad()
def test_the_authors_bias_is_ours(tmp_path):
    """Before the softmax: theirs W (M - x / W) + b, times 1; ours divided by sqrt(d)."""
    net = vit("kp-multihead", heads=4)
    state = authors_kprpe(net)
    px = 112 * faces()[1] - 0.5
    grid = (torch.arange(4) + 0.5) / 4
    M = torch.cartesian_prod(grid, grid).flip(1)
    offsets = (M[:, None] - px[:, None] / 112).flatten(2)                     # (B, N, 2L)
    f = offsets @ state["keypoint_linear.weight"].T + state["keypoint_linear.bias"]
    f = f.unflatten(2, (2, 4, 49))                                            # B N layer head K
    ids = kprpe.bucket_ids(4, 4, "product")
    for layer, bias in enumerate(net.biases((px + 0.5) / 112)):
        theirs = f[:, :, layer].transpose(1, 2).gather(3, ids.expand(2, 4, -1, -1))
        same(bias, theirs)


@torch.no_grad()
@pytest.mark.parametrize("rpe", ["none", "irpe"])
def test_plain_vit_and_irpe(tmp_path, rpe):
    net = vit(rpe, heads=8)
    state = {}
    for name, value in net.state_dict().items():
        table = re.fullmatch(r"(.+)\.contextual\.([qkv])", name)
        if table:
            value = value[None] if table[2] == "v" else value.T[None]
            name = f"{table[1]}.rpe_{table[2]}.lookup_table_weight"
        state[name] = value
    torch.save(prefixed(state, "net."), tmp_path / "model.pt")
    found, info = kprpe.load_published(tmp_path / "model.pt")
    assert info["kind"] == {"none": "ViT", "irpe": "iRPE"}[rpe]
    same(found(faces()[0]), net(faces()[0]))


@torch.no_grad()
def test_insightfaces_vit_sees_108_of_112_px(tmp_path):
    net = vit("none", patch=9, image_size=108)
    state = net.state_dict() | {"mask_token": torch.zeros(1, 1, 32)}
    torch.save(state, tmp_path / "backbone.pth")
    found, info = kprpe.load_published(tmp_path / "backbone.pth")
    assert info["source"] == "insightface, backbone.pth"
    image = faces()[0]
    same(found(image), net(image[:, :, :108, :108]))


@torch.no_grad()
def test_adaface_takes_bgr(tmp_path, monkeypatch):
    net = randomise(kprpe.IResNet(18, 112, 6))
    state = prefixed(net.state_dict(), "model.") | {"head.kernel": torch.ones(6, 9)}
    # Lightning names the states of callbacks by their class, which is not installed where we read.
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", LIGHTNING.rpartition(".")[0]):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    callbacks = {module.ModelCheckpoint: {"best_model_score": torch.ones(())}}
    torch.save({"state_dict": state, "callbacks": callbacks}, tmp_path / "adaface.ckpt")
    monkeypatch.undo()
    found, info = kprpe.load_published(tmp_path / "adaface.ckpt")
    assert info == dict(kind="IR-18", colour="BGR", size=112, source="AdaFace, .ckpt")
    same(found(faces()[0]), net(faces()[0].flip(1)))


@torch.no_grad()
@pytest.mark.parametrize("colour", ["RGB", "BGR"])
def test_the_yaml_beside_tells_the_colour(tmp_path, colour):
    net = vit("none")
    path = write_safetensors(tmp_path / "model.safetensors",
                             prefixed(net.state_dict(), "model.net."))
    (tmp_path / "pretrained_model").mkdir()
    (tmp_path / "pretrained_model" / "model.yaml").write_text(f"name: vit\ncolor_space: {colour}\n")
    found, info = kprpe.load_published(path)
    image = faces()[0]
    assert info["colour"] == colour
    same(found(image), net(image if colour == "RGB" else image.flip(1)))


@torch.no_grad()
def test_insightfaces_iresnet(tmp_path):
    """Other names, a convolution as first shortcut, and a last batch norm with a shift."""
    net = randomise(kprpe.IResNet(18, 112, 6, arcface=True))
    outer = {"input_layer.0": "conv1", "input_layer.1": "bn1", "input_layer.2": "prelu",
             "output_layer.0": "bn2", "output_layer.3": "fc", "output_layer.4": "features"}
    inner = ("bn1", "conv1", "bn2", "prelu", "conv2", "bn3")
    state = {}
    for name, value in net.state_dict().items():
        block = re.fullmatch(r"body\.(\d+)\.(res_layer\.(\d)|shortcut_layer)\.(.+)", name)
        if block:
            layer, unit = divmod(int(block[1]), 2)
            part = inner[int(block[3])] if block[3] else "downsample"
            name = f"layer{layer + 1}.{unit}.{part}.{block[4]}"
        else:
            part, rest = re.fullmatch(r"(\w+\.\d)\.(.+)", name).groups()
            name = f"{outer[part]}.{rest}"
        state[name] = value
    shift = torch.linspace(-1, 1, 6)
    state |= {"features.weight": torch.ones(6), "features.bias": shift}
    torch.save(state, tmp_path / "backbone.pth")
    found, info = kprpe.load_published(tmp_path / "backbone.pth")
    assert info["kind"] == "IR-18" and info["colour"] == "RGB"
    same(found(faces()[0]), net(faces()[0]) + shift)
    path = write_safetensors(tmp_path / "model.safetensors", prefixed(state, "model.net."))
    same(kprpe.load_published(path)[0](faces()[0]), net(faces()[0]) + shift)


# ---- Face aligner --------------------------------------------------------------------------------

def aligner_file(path):
    """A network, and its weights by the authors' names, for BGR."""
    torch.manual_seed(0)
    net = kprpe.DFA().eval()
    state = {}
    for name, value in net.state_dict().items():
        name = re.sub(r"(across|within)\.([02])", lambda m: f"{m[1]}.fc{int(m[2]) // 2 + 1}", name)
        name = name.replace("across", "mlp_tokens").replace("within", "mlp_channels")
        state["net." + name.replace("aggregation", "aggregator")] = value
    state["net.body.stage1.0.0.weight"] = state["net.body.stage1.0.0.weight"].flip(1)
    torch.save(state, path)
    return net


@torch.no_grad()
@pytest.mark.parametrize("side", [160, 112])
def test_the_published_aligner(tmp_path, side):
    """Its resize is corner on corner, its places are x / S."""
    net = aligner_file(tmp_path / "model.pt")
    found, info = kprpe.load_published(tmp_path / "model.pt")
    assert info["kind"] == "DFA" and found.published and not found.training
    image = faces(side=side)[0]
    resized = torch.nn.functional.interpolate(image, (160, 160), mode="bilinear",
                                              align_corners=True)
    own, theirs = net(resized), found(image)
    same(theirs.landmarks, own.landmarks + 0.5 / side)
    same(theirs.best, own.best + 0.5 / side)
    same(theirs.fused[:, :4], own.fused[:, :4] + 0.5 / side)
    same(theirs.score, own.score)


@torch.no_grad()
def test_the_published_aligner_sees_black_outside_a_photograph(tmp_path):
    aligner_file(tmp_path / "model.pt")
    net = kprpe.open_dfa(str(tmp_path / "model.pt"), torch.device("cpu"))
    photo = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    seen = []
    net.register_forward_pre_hook(lambda _, images: seen.append(images[0]))
    points = kprpe.find_face(net, photo, None)
    assert seen[0].shape == (1, 3, 90, 90) and points.shape == (5, 2)
    square = torch.full((90, 90, 3), -1.0)
    square[15:75] = torch.from_numpy(photo) / 127.5 - 1
    same(seen[0][0].permute(1, 2, 0), square, 1e-6)


# ---- The command line ----------------------------------------------------------------------------

def parsed(*flags):
    return kprpe.parse_args([*map(str, flags), "--device", "cpu"])


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "model.safetensors"
    torch.manual_seed(0)
    size = dict(dim=16, depth=2, heads=4, mlp_ratio=2, patch=28, image_size=112)
    net = randomise(kprpe.ViT(size, "kp-multihead"))
    write_safetensors(path, prefixed(authors_kprpe(net), "model.net."))
    return path, net


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A table of pairs of images of three people, and their landmarks beside it."""
    folder = tmp_path_factory.mktemp("sets") / "lfw"
    rng = np.random.default_rng(0)
    rows = []
    for person in "abc":
        for number in (1, 2):
            name = f"{person}/{person}_{number}.png"
            (folder / person).mkdir(parents=True, exist_ok=True)
            datasets.write_image(folder / name, rng.integers(0, 255, (112, 112, 3), np.uint8))
            five = datasets.ARCFACE_5 + rng.normal(0, 2, (5, 2))
            rows.append(",".join([f"lfw/{name}", *map(str, five.flatten())]))
    pairs = ["image_a,image_b,same"]
    for one, other, kind in (("a_1", "a_2", 1), ("b_1", "b_2", 1), ("a_1", "b_1", 0),
                             ("b_2", "c_1", 0)):
        pairs.append(f"lfw/{one[0]}/{one}.png,lfw/{other[0]}/{other}.png,{kind}")
    table = folder.parent / "pairs.csv"
    table.write_text("\n".join(pairs) + "\n")
    (folder.parent / "pairs.csv.landmarks.csv").write_text("\n".join(rows) + "\n")
    return table


def test_published_weights_are_tested_without_a_set_of_their_own(recogniser, people, capsys):
    scores = kprpe.main(parsed("--test", people, "--weights", recogniser[0]))
    assert list(scores) == [f"accuracy@{people}", f"accuracy/std@{people}"]
    assert "kp-multihead, 112 px" in capsys.readouterr().out


def test_published_weights_predict(recogniser, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8)
    datasets.write_image(tmp_path / "a.png", image)
    datasets.write_pts(tmp_path / "a.pts", datasets.ARCFACE_5)
    kprpe.main(parsed("--predict", tmp_path / "a.png", "--weights", recogniser[0], "--output",
                      tmp_path / "out"))
    found = np.load(tmp_path / "out" / "a.npy")
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    points = torch.tensor((datasets.ARCFACE_5 + 0.5) / 112).float()[None]
    mirrored = torch.stack([1 - points[..., 0], points[..., 1]], -1)[:, [1, 0, 2, 4, 3]]
    with torch.no_grad():
        expected = recogniser[1](pixels, points) + recogniser[1](pixels.flip(3), mirrored)
    same(torch.from_numpy(found), torch.nn.functional.normalize(expected)[0], 1e-3)


def test_init_takes_the_network_with_its_flags(recogniser, tmp_path):
    args = parsed("--init", recogniser[0])
    state = kprpe.take_initial(args)
    assert (args.dim, args.depth, args.heads, args.rpe, args.size, args.data) == (
        16, 2, 4, "kp-multihead", 112, "faces")
    net = kprpe.build(args, torch.device("cpu")).eval()
    net.load_state_dict(state["model"])
    with torch.no_grad():
        same(net(*faces()), recogniser[1](*faces()))


def test_a_run_starts_from_published_weights(recogniser, tmp_path):
    out = tmp_path / "run"
    kprpe.main(parsed("--init", recogniser[0], "--limit", 12, "--epochs", 1, "--batch-size", 6,
                      "--lr", 1e-9, "--no-unaligned", "--output", out))
    weights = torch.load(out / "last.pt", weights_only=True)["model"]
    same(weights["blocks.1.mlp.fc1.weight"], recogniser[1].blocks[1].mlp.fc1.weight.detach(), 1e-4)
    kprpe.main(parsed("--eval", out / "last.pt"))  # its flags are the network's


def test_another_kind_of_network(recogniser, tmp_path):
    aligner_file(tmp_path / "model.pt")
    with pytest.raises(UserError, match="holds DFA, expected a recogniser"):
        kprpe.main(parsed("--test", "x", "--weights", tmp_path / "model.pt"))
    with pytest.raises(UserError, match="holds KP-RPE, expected a face aligner"):
        kprpe.open_dfa(str(recogniser[0]), torch.device("cpu"))
    with pytest.raises(SystemExit):
        parsed("--weights", recogniser[0])


# ---- HRNet ---------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("points, prefix", [(98, ""), (68, "module.")])
def test_hrnet_has_a_map_for_each_landmark(tmp_path, points, prefix):
    torch.manual_seed(0)
    theirs = lddmm_face.HRNetHeatmaps(points).eval()
    torch.save(prefixed(theirs.state_dict(), prefix), tmp_path / "HR18.pth")
    net = lddmm_face.load_published(tmp_path / "HR18.pth")
    assert sorted(net.landmarks) == list(range(points))
    image = faces(1, 64)[0]
    maps = theirs(image)
    found = net(image).heatmaps
    same(found, maps[:, net.landmarks])
    net.size = 64
    args = lddmm_face.parse_args(["--device", "cpu"])
    placed = lddmm_face.predict_points(net, image, lddmm_face.sparse_to_dense(net), args)[0]
    # Peaks in the order of the annotation, 1 px of 256 further right and down.
    same(placed, 4 * (lddmm_face.peaks(maps) + 0.5) - 0.5 + 0.25, 1e-5)


def test_hrnet_is_evaluated(tmp_path, capsys):
    theirs = lddmm_face.HRNetHeatmaps(68)
    torch.save(theirs.state_dict(), tmp_path / "HR18-300W.pth")
    args = lddmm_face.parse_args(["--eval", str(tmp_path / "HR18-300W.pth"), "--limit", "2",
                                  "--size", "64", "--device", "cpu"])
    scores = lddmm_face.train(args)
    assert args.method == "heatmap" and 0 < scores["nme"] and "nme/mean face" not in scores


def test_hrnets_of_other_annotations_are_refused(tmp_path):
    torch.save({"head.3.weight": torch.zeros(29, 270, 1, 1), "head.3.bias": torch.zeros(29)},
               tmp_path / "HR18-COFW.pth")
    with pytest.raises(UserError, match="HRNet's weights for 68 or 98 landmarks"):
        lddmm_face.load_published(tmp_path / "HR18-COFW.pth")


# ---- Hostile files -------------------------------------------------------------------------------

def safetensors(header, data=bytes(16), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"a": dict(dtype=dtype, shape=shape, data_offsets=offsets)}


def test_safetensors_are_read(tmp_path):
    state = {"b": torch.arange(3), "a": torch.randn(2, 3), "c": torch.tensor(2.5),
             "h": torch.randn(5).half()}
    read = read_tensors(write_safetensors(tmp_path / "a.safetensors", state))
    assert read.keys() == state.keys()
    for name, value in state.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value)


@pytest.mark.parametrize("data", [
    b"", b"1234567", safetensors(b"{"), safetensors(b"[]"), safetensors(b"\xff\xfe"),
    safetensors(entry(), length=2**63), safetensors(entry(), length=3),
    safetensors(entry(), data=bytes(15)), safetensors(entry(offsets=(4, 20))),
    safetensors(entry(offsets=(-4, 12))), safetensors(entry(offsets=(16, 0))),
    safetensors(entry(offsets=(0,))), safetensors(entry(shape=(5,))),
    safetensors(entry(shape=(-2, -2))), safetensors(entry(shape=(2.0, 2))),
    safetensors(entry(shape=(10**30,))), safetensors(entry(shape="4")),
    safetensors(entry(dtype="F128")), safetensors(entry(dtype="F64")), safetensors({"a": 1}),
    safetensors({"a": {}}), b"\x80\x04cos\nsystem\n(S'true'\ntR."])
def test_hostile_safetensors(tmp_path, data):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="a.safetensors is damaged, or holds more than tensors"):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("state, message", [
    ({}, "no published network"),
    ({"weight": torch.zeros(2)}, "its names, as weight, are those of no checkpoint"),
    ({"weight": [1, 2]}, "expected tensors by name"),
    ({"patch_embed.proj.weight": torch.zeros(4, 3, 8, 8)}, "not the tensors of a published"),
    ({"input_layer.0.weight": torch.zeros(4, 3, 3, 3)}, "not the tensors of a published"),
    ({"conv1.weight": torch.zeros(4, 3, 3, 3)}, "not the tensors of a published"),
    ({"conv1.weight": torch.zeros(())}, "not the tensors of a published"),
    ({"patch_embed.proj.weight": torch.zeros(()), "blocks.0.attn.proj.weight": torch.zeros(())},
     "not the tensors of a published"),
    ({"net.body.stage1.0.0.weight": torch.zeros(8, 3, 3, 3)}, "tensors do not fit")])
def test_files_of_other_networks(tmp_path, state, message):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        kprpe.load_published(tmp_path / "a.pt")
