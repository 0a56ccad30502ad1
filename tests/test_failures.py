"""What goes wrong on a user's machine ends in one line that names the file, flag or value."""
import argparse
import gzip
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import kprpe
import stn_align
from common import checkpoint, datasets, digits, formats, gait, message_of, photos, recognition, run

ROOT = Path(__file__).resolve().parents[1]
NOT_UTF8 = os.fsdecode(b"a\xff")


def put(path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def png(width: int, height: int) -> bytes:
    """The head of a picture, without its pixels."""
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(data))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + crc + bytes(40) + b"IEND"


def load(image, points=None):
    """One batch of one face, by a process of the loader."""
    data = datasets.CropDataset([datasets.Face(image, points)], torch.eye(2, 3).double()[None], 8)
    next(iter(datasets.make_loader(data, [[(0, 0)]], 1, torch.device("cpu"))))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def gait3d(root, content: bytes):
    for name in ("2D_Silhouettes", "2D_Poses"):
        (root / name).mkdir()
    put(root / "Gait3D.json", content)
    gait.read_gait3d(str(root), "train")


def picture(path, width: int, height: int) -> str:
    datasets.write_image(path, np.zeros((height, width, 3), np.uint8))
    return str(path)


def landmarks(root, *shapes):
    """Reads a table of the landmarks of images 0.jpg, 1.jpg, ..."""
    rows = [",".join([f"{i}.jpg", *map(str, np.ravel(shape))]) for i, shape in enumerate(shapes)]
    table = put(root / "x.csv", "\n".join(rows).encode())
    recognition.read_landmarks([f"{i}.jpg" for i in range(len(shapes))], table)


def person(root, points):
    """Reads an identity folder with a .pts."""
    put(root / "A" / "0.jpg", b"")
    formats.write_pts(root / "A" / "0.pts", points)
    recognition.read_identities(str(root))


def full(root, name: str) -> Path:
    """A path that is written to a full disk."""
    if not os.path.exists("/dev/full"):
        pytest.skip("Linux only")
    os.symlink("/dev/full", root / name)
    return root / name


def of_another_task(root):
    checkpoint.save(root / "x.pt", script="sdfl")
    kprpe.main(kprpe.parse_args(["--task", "dfa", "--device", "cpu", "--eval", str(root / "x.pt")]))


def setup(gpus=1, batch_size=6):
    run.setup(argparse.Namespace(device="cpu", gpus=gpus, batch_size=batch_size))


def without_compiler():
    from torch._inductor.exc import InvalidCxxCompiler, InductorError
    raise InductorError(InvalidCxxCompiler(), None)


LONG_IDX = gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 10) + bytes(10**6))
FACE = np.float32([[10, 10], [30, 10], [20, 20], [12, 30], [28, 30]])
LINE = np.float32([[5, 5], [9, 13], [7, 9], [6, 7], [8, 11]])
OUTSIDE = "a,b,1\na,c,1\na,d,0\na/../../b.jpg,d,0"
PAIRS = "image_a,image_b,same\n"

# What goes wrong: what makes it in a folder, and the words that must be in the one line.
FAULTS = {
    "a bad picture met by a worker": (
        lambda root: load(put(root / "x.png", b"\x89PNG IEND")), "x.png cannot be decoded"),
    "points outside their picture met by a worker": (
        lambda root: load(picture(root / "x.png", 8, 6), FACE), "x.png: all points lie outside .* 8 x 6"),
    "a missing picture met by a worker": (lambda root: load(str(root / "y.png")), "No such file.*y.png"),
    "a worker that is killed": (lambda root: load(die), "DataLoader worker .*fewer --workers"),
    "60,000 x 60,000 pixels": (
        lambda root: formats.load_image(put(root / "x.png", png(60_000, 60_000))), "x.png .*too large"),
    "no byte at all": (lambda root: formats.load_image(put(root / "x.png", b"")), "x.png .*empty"),
    "a tuple 300,000 deep": (
        lambda root: recognition.read_bin(put(root / "x.bin", b"\x80\x02N" + b"\x85" * 300_000 + b".")),
        "x.bin is no verification .bin"),
    "memory for 2^28 objects": (
        lambda root: recognition.read_bin(put(root / "x.bin", b"\x80\x02Nr\0\0\0\x10.")),
        "it numbers 268435456 objects in 9 bytes"),
    "an idx file longer than it says": (
        lambda root: digits.read_idx(put(root / "x.gz", LONG_IDX)), "x.gz: .* then 11 bytes or more"),
    "a field of 200,000 letters": (
        lambda root: recognition.read_test(put(root / "x.csv", (PAIRS + "x" * 200_000).encode())),
        "x.csv .*field larger"),
    "a table in Latin-1": (
        lambda root: recognition.read_test(put(root / "x.csv", (PAIRS + "é,b,1").encode("latin1"))),
        "x.csv is no table in UTF-8"),
    "a digit that is none": (
        lambda root: recognition.read_test(
            os.path.dirname(put(root / "pairs.txt", "1 1\nA ² 3\nA 1 B 2".encode()))),
        "pairs.txt:2: found 'A ² 3'"),
    "pairs outside the folder of their list": (
        lambda root: recognition.read_test(put(root / "x.csv", (PAIRS + OUTSIDE).encode())),
        r"x.csv: '../b.jpg' leads out of"),
    "a gallery outside the folder of its list": (
        lambda root: recognition.read_test(put(root / "x.csv", b"path,id,role\n/etc/b.jpg,1,gallery")),
        "x.csv: '/etc/b.jpg' leads out of"),
    "landmarks on a line": (lambda root: landmarks(root, FACE, LINE), "x.csv, image 1.jpg: .* on one line"),
    "landmarks at one place": (
        lambda root: landmarks(root, FACE, FACE, 0 * FACE + 7), "x.csv, image 2.jpg: .* so for 1 of 3 faces"),
    "landmarks in fractions": (lambda root: landmarks(root, FACE / 40, FACE / 50), "x.csv: .* fractions"),
    "a person's landmarks on a line": (lambda root: person(root, LINE), "A/0.pts: .* on one line"),
    "a person's landmarks in fractions": (lambda root: person(root, FACE / 40), "fractions of the image"),
    "a full disk, of a checkpoint": (
        lambda root: checkpoint.save(full(root, "x.pt.part").with_suffix(""), a=torch.zeros(9)),
        "x.pt could not be written, after 0 bytes"),
    "a full disk, of a picture": (
        lambda root: formats.write_image(full(root, "x.png"), np.zeros((8, 8, 3), np.uint8)),
        "No space left on device"),
    "a checkpoint of another task": (of_another_task, "no checkpoint of kprpe.py --task dfa, but of sdfl.py"),
    "deep JSON": (lambda root: gait3d(root, b"[" * 100_000), "Gait3D.json: RecursionError"),
    "a detector whose name is not UTF-8": (
        lambda root: photos.open_detector(put(root / f"{NOT_UTF8}.onnx", b"x")), "no YuNet model"),
    "a run below a file": (
        lambda root: run.make_run(argparse.Namespace(), Path(put(root / "x", b""), "run")), "x/run"),
    "--compile without a compiler": (lambda root: without_compiler(), "--compile: .*leave out --compile"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line(name, tmp_path):
    make, words = FAULTS[name]
    with pytest.raises(Exception) as caught:
        make(tmp_path)
    message = message_of(caught.value)
    assert message and "\n" not in message
    assert re.search(words, message), message


WHOLE = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")


@pytest.mark.parametrize("left, gpus, words", [
    (dict(RANK="0"), 1, "has {'RANK': '0'}, expected MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE, .*left"),
    (dict(WORLD_SIZE="4"), 1, "has {'WORLD_SIZE': '4'}, .*unset RANK and WORLD_SIZE"),
    (WHOLE | dict(RANK="one"), 2, "'RANK': 'one'.* numbers but the first"),
    (WHOLE, 3, "--gpus 3, but the environment is that of 2 processes"),
    (WHOLE, 1, "--gpus 1, but the environment is that of 2 processes: .* or start all by torchrun")])
def test_what_another_job_left_in_the_environment(left, gpus, words, monkeypatch):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        setup(gpus)


def test_a_picture_may_have_any_name(tmp_path):
    picture = np.full((4, 4, 3), 7, np.uint8)
    datasets.write_image(tmp_path / f"{NOT_UTF8}.png", picture)
    (path,) = datasets.walk(str(tmp_path))
    assert (datasets.load_image(path) == picture).all()


def test_a_profile_whose_pupils_coincide_is_left_out_and_counted():
    points = torch.from_numpy(datasets.ARCFACE_5).repeat(4, 1, 1)
    points[0, 1] = points[0, 0]
    seen = dict(folded=torch.zeros(4), crops=points, aligned=points, converged=torch.ones(4, 5).bool())
    scores = stn_align.alignment_scores(seen, argparse.Namespace(learn_alpha=False))
    assert scores["converged"] == 0.75 and scores["anme"] == scores["anme/crops"] < 1e-9


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_two_processes_stop_with_one_sentence(tmp_path):
    flags = f"--size 32 --limit 16 --batch-size 8 --points 29 --device cpu --gpus 2 --output {tmp_path}/a"
    process = subprocess.Popen([sys.executable, "sdfl.py", "--epochs", "999", *flags.split()], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "processes: 2" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and out.count("sdfl.py: stopped; if the run has a last.pt") == 1
    assert "Traceback" not in out and "leaked" not in out
