"""common/run.py, checkpoint.py, photos.py: what a user meets around a training, tried on sdfl.py."""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import heatmap_landmarks
import lddmm_face
import sdfl
from common import UserError, checkpoint, datasets, photos, run

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--size", "32", "--limit", "32", "--batch-size", "8", "--epochs", "3", "--device", "cpu",
        "--points", "29"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("run") / "a"
    sdfl.train(sdfl.parse_args([*TINY, "--output", str(folder)]))
    return folder


def call(*flags):
    return sdfl.train(sdfl.parse_args([*flags, "--device", "cpu"]))


# ---- Flags ---------------------------------------------------------------------------------------

def test_presets_are_flags_and_flags_beat_presets():
    for name, preset in sdfl.PRESETS.items():
        args = sdfl.parse_args(["--data", name])
        for key, value in (sdfl.PAPER | preset).items():
            assert getattr(args, key) == value
    args = sdfl.parse_args(["--data", "wflw", "--epochs", "7", "--no-amp"])
    assert args.epochs == 7 and args.batch_size == 64 and args.given == ["amp", "data", "epochs"]
    assert sdfl.parse_args([]).data == "faces"  # the preset that needs no data


@pytest.mark.parametrize("flags, message", [
    ("--backbone alexnet", "invalid choice"), ("--device tpu", "invalid choice"),
    ("--dat faces", "unrecognized"), ("--gpus 0", "at least 1"), ("--limit -5", "at least 0"),
    ("--size 100", "expected a multiple of 32"), ("--batch-size 0", "at least 1"),
    ("--size 8192", "at most 4,096"), ("--epochs 1000000", "at most 100,000"),
    ("--threshold 0", "expected a number"), ("--lr nan", "expected a number"),
    ("--lr x", "invalid number value: 'x'"),
    ("--gpus 2 --batch-size 7", "--batch-size 7 does not divide over --gpus 2"),
    ("--init no.pt", "no file no.pt"), ("--predict a.jpg", "belong together"),
    ("--weights a.pt", "belong together"), ("--detector a.onnx", "no file a.onnx"),
    ("--eval a.pt --resume", "only one of"), ("--box head", "expected landmarks, face"),
    ("--box 1,2,3,4", "with --predict, without --detector, x0,y0,x1,y1")])
def test_bad_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        sdfl.parse_args(flags.split())
    assert message in capsys.readouterr().err


def test_a_box_and_a_detector_are_one_too_many(capsys):
    with pytest.raises(SystemExit):
        sdfl.parse_args(["--predict", "a.jpg", "--weights", "a.pt", "--box", "1,2,3,4",
                         "--detector", __file__])
    assert "--box 1,2,3,4: expected landmarks, face; with --predict, without" in capsys.readouterr().err


def test_types():
    for box in ("1,2,3", "1,2,x,4", "5,5,5,9", "0,0,inf,4", "0.1,0.1,0.9,0.9"):
        assert run.parse_box(box) is None
    assert run.parse_box("-1e1,2,30,40.5") == [-10, 2, 30, 40.5]
    assert run.listed(float)("0.5,1") == [0.5, 1] and run.listed(int)("") == []
    with pytest.raises(argparse.ArgumentTypeError, match="-1: expected a number of at least 0"):
        run.listed(run.fraction)("0.5,-1")


# ---- Folders and checkpoints ---------------------------------------------------------------------

def test_a_run_is_never_written_over(finished, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds a run: --resume it, or name another"):
        call(*TINY, "--output", str(finished))
    monkeypatch.chdir(tmp_path)
    args = sdfl.parse_args(TINY)
    assert run.find_run(args) is None and not Path("runs").exists()
    names = [run.make_run(args, None).name for _ in range(3)]
    assert names == ["sdfl-faces", "sdfl-faces-2", "sdfl-faces-3"]
    Path("runs/sdfl-faces-of-mine").mkdir()
    args.resume = True
    args.output = ""
    with pytest.raises(UserError, match="--resume: no run on --data faces in runs/"):
        run.find_run(args)
    for age, name in ((50, "sdfl-faces-3"), (10, "sdfl-faces-2"), (1, "sdfl-faces-of-mine")):
        Path("runs", name, "last.pt").touch()
        os.utime(Path("runs", name, "last.pt"), (time.time() - age,) * 2)
    assert run.find_run(args).name == "sdfl-faces-2"  # the newest, not the highest number
    args.output = "runs/sdfl-faces"
    with pytest.raises(UserError, match="--resume: no checkpoint runs/sdfl-faces/last.pt"):
        run.find_run(args)


def test_one_folder_is_trained_in_by_one_process(finished):
    held = run.lock(finished)
    with pytest.raises(UserError, match="another process trains here"):
        call("--resume", "--output", str(finished), "--epochs", "4")
    held.close()
    assert run.load(finished / "last.pt", "sdfl")["epoch"] == 3


def test_two_epochs_and_one_more_are_three(finished, tmp_path):
    call(*TINY, "--epochs", "2", "--schedule", "steps", "--drops", "0", "--output", str(tmp_path / "a"))
    call("--resume", "--epochs", "3", "--output", str(tmp_path / "a"))
    call(*TINY, "--schedule", "steps", "--drops", "0", "--output", str(tmp_path / "b"))
    one, other = (run.load(tmp_path / name / "last.pt", "sdfl") for name in "ab")
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def test_flags_are_what_was_typed_else_what_the_run_had(finished, tmp_path):
    args = sdfl.parse_args(["--eval", "x.pt", "--data", "wflw", "--data-root", "here", "--margin", "2"])
    saved = dict(run.load(finished / "last.pt", "sdfl")["args"], backbone="vgg16", lr=0.5, output="/old")
    run.restore_args(args, saved, "x.pt")
    assert (args.margin, args.data_root, args.data) == (2, "here", "wflw")  # typed
    assert (args.backbone, args.lr, args.size) == ("vgg16", 0.5, 32)  # the run's
    assert args.norm == sdfl.PAPER["norm"] and args.limit == 0 and args.output == ""  # of other data
    with pytest.raises(UserError, match="x.pt: --lr is 'high': the file was changed"):
        run.restore_args(sdfl.parse_args([]), dict(saved, lr="high"), "x.pt")


@pytest.mark.parametrize("change, message", [
    (lambda s: s["model"].pop("mean_face"), r"1 tensors do not fit .* mean_face, is missing, expected \("),
    (lambda s: s["model"].update(mean_face=torch.zeros(3, 7)), r"is \(3, 7\), expected \(29, 2\)"),
    (lambda s: s["model"].update(more=torch.zeros(2)), r"first, more, is \(2,\), expected none"),
    (lambda s: s["model"].pop("mask"), "its weights have no mask of neighbours"),
    (lambda s: s["model"]["mean_face"].fill_(math.nan), "mean_face and 0 more tensors are not finite"),
    (lambda s: s.update(epoch="3"), "its epoch is str, expected int"),
    (lambda s: s.update(script="kprpe"), "is no checkpoint of sdfl.py, but of kprpe")])
def test_a_checkpoint_that_was_changed_is_refused(change, message, finished, tmp_path):
    state = run.load(finished / "last.pt", "sdfl")
    change(state)
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(UserError, match=message):
        call("--eval", str(tmp_path / "last.pt"))


def test_an_optimizer_of_other_shapes_is_refused(finished, tmp_path):
    state = run.load(finished / "last.pt", "sdfl")
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"the optimizer's exp_avg is \(2, 2\) for a parameter"):
        call("--resume", "--output", str(tmp_path), "--epochs", "4")


def test_a_damaged_checkpoint_is_refused_by_name(finished, tmp_path):
    whole = (finished / "last.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", whole[:100], whole[:len(whole) // 2], whole[:-1], bytes(flipped)):
        (tmp_path / "cut.pt").write_bytes(content)
        with pytest.raises(UserError, match="cut.pt is damaged"):
            run.load(tmp_path / "cut.pt", "sdfl")
    with pytest.raises(UserError, match="no checkpoint .*, but a folder: name the last.pt in it"):
        run.load(finished, "sdfl")


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    run.save(tmp_path / "a.pt", x=1)
    monkeypatch.setattr(checkpoint.torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(UserError, match="a.pt could not be written, after 0 bytes: .*No space"):
        run.save(tmp_path / "a.pt", x=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert checkpoint.read_tensors(tmp_path / "a.pt") == {"x": 1}


def test_resume_on_other_data_is_refused_and_the_log_kept(finished, tmp_path):
    state = run.load(finished / "last.pt", "sdfl")
    torch.save(dict(state, data=[31, 29]), tmp_path / "last.pt")
    (tmp_path / "log.jsonl").write_text('{"epoch": 7}\n')
    with pytest.raises(UserError, match=r"the training data are \[32, 29\], those of the run were \[31"):
        call("--resume", "--output", str(tmp_path), "--epochs", "4")
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 7}\n'


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_table_and_a_clean_log(finished, capsys):
    (finished / "ced.png").unlink()
    with open(finished / "log.jsonl", "a") as log:
        log.write('{"epoch": 4}\n{"epoch": 5, "lo')  # written after the checkpoint, the second cut short
    call("--resume", "--output", str(finished))
    assert (finished / "ced.png").exists() and "NME (%)" in capsys.readouterr().out
    rows = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    original = sdfl.sdfl_loss
    calls = []

    def poisoned(*args):
        calls.append(1)
        return original(*args) * (math.nan if len(calls) == 7 else 1)  # four steps an epoch

    monkeypatch.setattr(sdfl, "sdfl_loss", poisoned)
    with pytest.raises(FloatingPointError, match="epoch 2 left a loss or weights that are not"):
        call(*TINY, "--output", str(tmp_path / "run"))
    assert run.load(tmp_path / "run" / "last.pt", "sdfl")["epoch"] == 1


def test_init_leaves_out_a_head_for_other_landmarks(tmp_path):
    source, target = lddmm_face.HRNetHeatmaps(98), lddmm_face.HRNetHeatmaps(68)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    before = target.state_dict()["head.3.bias"].clone()
    report = run.init_backbone(target, str(tmp_path / "a.pth"))
    assert "left as they were: head.3.weight, head.3.bias" in report
    own = target.state_dict()
    assert torch.equal(own["head.3.bias"], before)
    assert torch.equal(own["head.0.weight"], source.state_dict()["head.0.weight"])


def test_init_takes_what_matches_by_name(tmp_path):
    source, target = sdfl.BACKBONES["resnet18"](), sdfl.BACKBONES["resnet18"]()
    state = {"module." + name: value + 1 for name, value in source.state_dict().items()}
    del state["module.bn1.weight"]
    torch.save({"state_dict": state | {"fc.weight": torch.zeros(3)}}, tmp_path / "a.pth")
    before = target.state_dict()["bn1.weight"].clone()
    report = run.init_backbone(target, str(tmp_path / "a.pth"))
    own = target.state_dict()
    assert f"{len(own) - 1} of {len(own)}" in report and "bn1.weight" in report and "fc.weight" in report
    name = "layer3.1.conv2.weight"
    assert torch.equal(own[name], source.state_dict()[name] + 1)
    assert torch.equal(own["bn1.weight"], before)
    for state, message in [({"a.weight": torch.zeros(3)}, "none of its 1 names"),
                           ({"conv1.weight": torch.zeros(3)}, r"conv1.weight is \(3,\), the backbone's is"),
                           ({"a": 3}, "expected tensors by name")]:
        torch.save(state, tmp_path / "b.pth")
        with pytest.raises(UserError, match=message):
            run.init_backbone(target, str(tmp_path / "b.pth"))


# ---- The user's own photographs ------------------------------------------------------------------

class Detector:
    """Finds the faces it is made with, px of an image of 2,000 x 1,000, at the scales it is asked for."""

    def __init__(self, faces):
        self.faces = faces  # (x, y, w, h, score, long side of the image at which it is found)

    def setInputSize(self, size):
        self.size = size

    def detect(self, image):
        assert image.shape[1::-1] == self.size
        scale = max(self.size) / 2000
        found = [[x * scale, y * scale, w * scale, h * scale, *[x * scale] * 10, score]
                 for x, y, w, h, score, side in self.faces if side == max(self.size)]
        return 1, np.array(found, np.float32) if found else None


def test_faces_are_looked_for_at_two_scales_and_the_better_of_two_boxes_is_kept():
    detector = Detector([(100, 100, 900, 900, 0.9, 640), (200, 150, 800, 800, 0.7, 1280),
                         (1500, 100, 40, 40, 0.8, 1280)])
    found = photos.detect(detector, np.zeros((1000, 2000, 3), np.uint8))
    np.testing.assert_allclose(found[:, 2:4], [[900, 900], [40, 40]], rtol=1e-3)
    np.testing.assert_allclose(found[:, 0], [101, 1500], atol=1.5)  # pixel centres are whole numbers
    np.testing.assert_allclose(found[:, 14], [0.9, 0.8], rtol=1e-6)
    assert photos.detect(Detector([]), np.zeros((90, 80, 3), np.uint8)).shape == (0, 15)
    args = argparse.Namespace(box="face")
    boxes = photos.find_boxes(args, np.zeros((1000, 2000, 3), np.uint8), detector)
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], [[900, 900], [40, 40]], rtol=1e-3)


def test_a_network_trained_on_boxes_of_landmarks_gets_such_boxes_of_a_detector(monkeypatch):
    five = np.array([[30, 40], [50, 40], [40, 50], [32, 60], [48, 60]], float)
    found = np.array([[10, 5, 60, 80, *five.ravel(), 0.9]])
    monkeypatch.setattr(photos, "detect", lambda detector, image: found)
    image = np.zeros((90, 90, 3), np.uint8)
    for kind, box in (("landmarks", [20, 33, 60, 73]), ("face", [10, 5, 70, 85]),
                      ("image", [10, 5, 70, 85])):
        boxes = photos.find_boxes(argparse.Namespace(box=kind), image, "YuNet")
        np.testing.assert_allclose(boxes, [box])
    found = np.zeros((0, 15))
    for kind in ("landmarks", "face"):
        boxes = photos.find_boxes(argparse.Namespace(box=kind), image, "YuNet")
        assert boxes.shape == (0, 4)


def test_another_kind_of_file_is_no_detector(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match="a.onnx: no YuNet model"):
        photos.open_detector(str(tmp_path / "a.onnx"))


FOLDED = [
    *sdfl.BACKBONES.values(),
    *(lambda name=name: lddmm_face.BACKBONES[name](29, 64) for name in ("hrnet_w18", "hourglass")),
    lambda: lddmm_face.HRNetHeatmaps(29),
    lambda: lddmm_face.DANStage(3, 64),
    lambda: heatmap_landmarks.HeatmapNet("mobilenetv2_0.25", "SD", 29),
]


@pytest.mark.parametrize("build", FOLDED)
def test_folded_batch_norms_leave_the_output_as_it_is(build):
    net = build().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                values.uniform_(0.5, 1.5)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        wanted = net(image)
        photos.fold_batch_norms(net, 64)
        error = net(image) - wanted
    left = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    hourglass = isinstance(net, lddmm_face.Hourglass)  # its blocks begin with a batch norm
    assert error.norm() < 1e-4 * wanted.norm() and left == (115 if hourglass else 0)


def test_predict_reports_a_bad_image_goes_on_and_writes_over_nothing(finished, tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    face = datasets.load_image(sdfl.synthetic.read_faces("test", 1, size=64, points=29)[0].image)
    datasets.write_image(own / "a.png", face)
    (own / "b.jpg").write_text("no image")
    datasets.write_image(own / "c.png", face)
    flags = ["--predict", str(own), "--weights", str(finished / "last.pt"), "--output"]
    with pytest.raises(UserError, match="1 images could not be read, the first is .*b.jpg"):
        call(*flags, str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a.png", "a.pts", "c.png", "c.pts"}
    with pytest.raises(UserError, match="a.pts exists already; name another folder"):
        call(*flags, str(tmp_path / "out"))
    with pytest.raises(UserError, match="--box 100,100,200,200 lies outside an image of 64 x 64"):
        call(*flags, str(tmp_path / "x"), "--box", "100,100,200,200")
    datasets.write_image(own / "a.face2.png", face)
    with pytest.raises(UserError, match="a.face2.png is named as another face of .*a.png: rename it"):
        call(*flags, str(tmp_path / "y"))


# ---- Processes -----------------------------------------------------------------------------------

def test_a_user_sees_the_message_alone(capsys):
    args = argparse.Namespace(script="sdfl", gpus=1)

    def fails(error):
        def function(args):
            raise error
        return function

    for error, message in [(UserError("no such thing"), "sdfl.py: no such thing"),
                           (FileNotFoundError(2, "No such file", "x.txt"), "x.txt"),
                           (FloatingPointError("the loss is nan"), "the loss is nan"),
                           (KeyboardInterrupt(), "stopped; if the run has a last.pt, --resume goes on")]:
        with pytest.raises(SystemExit, match=message):
            run.main(fails(error), args)
    for bug in (ValueError("operands could not be broadcast"), OSError(12, "out of memory")):
        with pytest.raises(type(bug)):  # a bug keeps its traceback
            run.main(fails(bug), args)


def start(folder, *flags):
    command = [sys.executable, "sdfl.py", *TINY, "--epochs", "6", "--output", str(folder), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_an_error_of_two_processes_is_one_message(tmp_path):
    process = start(tmp_path / "x", "--gpus", "2", "--data", "wflw", "--data-root", str(tmp_path / "none"))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and out.count("sdfl.py: read_wflw: no folder") == 1
    assert "Traceback" not in out and not (tmp_path / "x").exists()


def alive(folder):
    """Processes that train in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd"):
        try:
            links = [os.readlink(link) for link in entry.iterdir()]
        except OSError:  # it has ended, or is another user's
            continue
        if str(folder / "lock") in links:
            found.append(entry.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the processes of a run in /proc")
@pytest.mark.parametrize("gpus", ["1", "2"])
def test_killed_and_resumed_is_the_same_run_bit_for_bit(tmp_path, gpus):
    folders = {name: tmp_path / name for name in ("whole", "broken")}
    killed = start(folders["broken"], "--gpus", gpus)
    deadline = time.time() + 120
    while not (folders["broken"] / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)  # somewhere after the first checkpoint
    killed.communicate()
    while alive(folders["broken"]) and time.time() < deadline:  # the others end with the first
        time.sleep(0.005)
    assert 1 <= run.load(folders["broken"] / "last.pt", "sdfl")["epoch"] < 6
    processes = [start(folders["whole"], "--gpus", gpus),
                 start(folders["broken"], "--gpus", gpus, "--resume")]
    for process in processes:
        out, _ = process.communicate(timeout=180)
        assert process.returncode == 0, out
    whole, broken = (run.load(folder / "last.pt", "sdfl") for folder in folders.values())
    assert whole["epoch"] == broken["epoch"] == 6
    assert all(torch.equal(whole["model"][name], broken["model"][name]) for name in whole["model"])
    for i, moment in whole["optimizer"]["state"].items():
        other = broken["optimizer"]["state"][i]
        assert all(torch.equal(moment[name], other[name]) for name in ("exp_avg", "exp_avg_sq"))
    logs = [list(map(json.loads, open(folder / "log.jsonl"))) for folder in folders.values()]
    assert len(logs[0]) == len(logs[1]) == 6
    assert all(a.get(key) == b.get(key) for a, b in zip(*logs) for key in ("epoch", "loss", "nme"))
