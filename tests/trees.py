"""Tiny data sets in the true layout of the public ones, of drawn faces."""
import json
import pickle
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np

from common import datasets, formats, synthetic

TRAIN = 12  # faces of a training split, of three people
TEST = 8    # faces of a test split, of two people
SIZE = 96   # px, side of a drawn image

# ---- Files ---------------------------------------------------------------------------------------


def put_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def put_image(path, pixels):
    """Writes RGB (H, W, 3) or gray (H, W) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)


def put_photo(path, pixels, orientation):
    """A JPEG with the orientation tag that a telephone writes."""
    tag = struct.pack(">HHIHH", 0x112, 3, 1, orientation, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + tag + bytes(4)
    data = cv2.imencode(".jpg", pixels[..., ::-1])[1].tobytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])


def put_pts(path, points):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.write_pts(path, points)


def joined(points, separator):
    return separator.join(f"{value:.3f}" for value in np.ravel(points))


class Mat:
    """MATLAB 5 bytes by hand: tags, padding to 8, small elements for up to 4 bytes."""

    def __init__(self, small=True):
        self.small = small

    def element(self, kind, data):
        if self.small and 0 < len(data) <= 4:
            return struct.pack("<I", len(data) << 16 | kind) + data.ljust(4, b"\0")
        return struct.pack("<II", kind, len(data)) + data + b"\0" * (-len(data) % 8)

    def matrix(self, name, shape, array_class, *content):
        flags = self.element(6, struct.pack("<II", array_class, 0))
        dims = self.element(5, struct.pack(f"<{len(shape)}i", *shape))
        return self.element(14, flags + dims + self.element(1, name.encode()) + b"".join(content))

    def numbers(self, name, array, kind=9, array_class=6):
        data = np.asarray(array).astype(formats._MAT_NUMBERS[kind]).tobytes("F")
        return self.matrix(name, np.shape(array), array_class, self.element(kind, data))

    def text(self, name, text, kind=4):
        data = text.encode("utf-16-le" if kind in (4, 17) else "utf-8")
        return self.matrix(name, (1, len(text)), 4, self.element(kind, data))

    def file(self, path, *variables, compressed=False):
        if compressed:
            packed = [zlib.compress(variable) for variable in variables]
            variables = [struct.pack("<II", 15, len(data)) + data for data in packed]
        path.parent.mkdir(parents=True, exist_ok=True)
        header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
        path.write_bytes(header + b"".join(variables))


MAGIC = struct.pack("<I", 0xced7230a)


def record(payload):
    """A payload as RecordIO has it: cut where the magic number stands at a multiple of 4."""
    cuts = [i for i in range(0, len(payload) - 3, 4) if payload[i:i + 4] == MAGIC]
    starts = [0, *(i + 4 for i in cuts)]
    ends = [*cuts, len(payload)]
    out = b""
    for n, (start, end) in enumerate(zip(starts, ends)):
        cflag = 0 if not cuts else 1 if n == 0 else 3 if n == len(cuts) else 2
        out += MAGIC + struct.pack("<I", cflag << 29 | end - start) + payload[start:end]
        out += b"\0" * (-(end - start) % 4)
    return out


def payload(label, data=b""):
    """What a record holds: label is one number, or the numbers of a header record."""
    labels = [label] if np.isscalar(label) else label
    flag = 0 if np.isscalar(label) else len(label)
    return struct.pack("<IfQQ", flag, labels[0] if not flag else 0, 7, 0) + \
        struct.pack(f"<{flag}f", *(labels if flag else ())) + data


def put_records(root, payloads, first_key=0):
    """train.rec and train.idx; returns the folder."""
    root.mkdir(parents=True, exist_ok=True)
    data, lines = b"", ""
    for key, content in enumerate(payloads, first_key):
        lines += f"{key}\t{len(data)}\n"
        data += record(content)
    (root / "train.rec").write_bytes(data)
    (root / "train.idx").write_text(lines)
    return str(root)


def put_mnist(root, count=12):
    """The four idx files of MNIST: boxes whose width tells the label."""
    root.mkdir(exist_ok=True)
    labels = np.arange(count, dtype=np.uint8) % 10
    images = np.zeros((count, 28, 28), np.uint8)
    for image, label in zip(images, labels):
        image[4:24, 5:6 + 2 * label] = 255
    for split in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (root / f"{split}-{kind}-ubyte").write_bytes(head + array.tobytes())
    return root


def walker(height=90, at=(40, 10), size=(120, 100)):
    """A raw silhouette with head, trunk and legs, and 17 joints (x, y, score) px on its limbs."""
    image, joints = np.zeros(size, np.uint8), np.ones((17, 3), np.float32)
    x, y = at
    h = height / 90
    joints[:5, :2] = x, y + 6 * h
    for k, (dx, dy) in enumerate(((10, 20), (12, 35), (12, 48), (6, 48), (8, 66), (10, 86))):
        joints[5 + 2 * k, :2] = x + dx * h, y + dy * h
        joints[6 + 2 * k, :2] = x - dx * h, y + dy * h
    wide = max(round(8 * h), 2)
    for chain in ((0, 0), (5, 7, 9), (6, 8, 10), (11, 13, 15), (12, 14, 16), (5, 11, 12, 6, 5)):
        cv2.polylines(image, [joints[list(chain), :2].round().astype(int)], False, 255, wide)
    cv2.fillPoly(image, [joints[[5, 6, 12, 11], :2].round().astype(int)], 255)
    return image, joints


def put_gait3d(root, people, probes):
    """Gait3D with four frames a sequence, single images and texts.
    people: {"TRAIN_SET": [...], "TEST_SET": [...]}, each with two sequences.
    Returns: {name: [(silhouette, joints)]}."""
    put_text(root / "Gait3D.json", json.dumps(people | {"PROBE_SET": probes}))
    made = {}
    for person in sorted({*people["TRAIN_SET"], *people["TEST_SET"]}):
        for place in ("camid3_videoid1", "camid10_videoid2"):
            parts = (person, place, "seq0")
            frames = [walker(60 + 8 * t + len(made), (40 + t, 8), (130, 90 + t)) for t in range(4)]
            for t, (image, joints) in enumerate(frames):
                stem = f"human_crop_f{170 + t}"
                put_image(root.joinpath("2D_Silhouettes", *parts, stem + ".png"), image)
                put_text(root.joinpath("2D_Poses", *parts, stem + ".txt"),
                         ",".join(["x", "y", *map(repr, joints.ravel().tolist())]) + "\n")
            made["-".join(parts)] = frames
    return made


# ---- Sets ----------------------------------------------------------------------------------------


def drawn(split, points, size=SIZE):
    """The drawn faces of a split, four of each person: (pixels, landmarks, box, person) each."""
    count = TRAIN if split == "train" else TEST
    faces = synthetic.read_faces(split, count, size, points, per_identity=4)
    return [(face.image(), face.points, face.box, face.identity) for face in faces]


def wflw(root):
    for split in ("train", "test"):
        rows = []
        for i, (pixels, points, box, _) in enumerate(drawn(split, 98)):
            name = f"{i % 2}--Event/{split}_{i}.jpg"
            put_image(root / "WFLW_images" / name, pixels)
            flags = np.arange(6) == i % 6
            rows.append(" ".join([joined(points, " "), *(f"{v:.0f}" for v in box),
                                  *map(str, flags.astype(int)), name]))
        put_text(root / "WFLW_annotations" / "list_98pt_rect_attr_train_test" /
                 f"list_98pt_rect_attr_{split}.txt", "\n".join(rows) + "\n")


def ibug_300w(root):
    places = {"train": ("afw", "helen/trainset", "lfpw/trainset"),
              "test": ("helen/testset", "lfpw/testset", "ibug")}
    for split, folders in places.items():
        for i, (pixels, points, _, _) in enumerate(drawn(split, 68)):
            folder = folders[i % 3]
            stem = root / folder / f"image_{i:03d} _1"  # some names of ibug have a blank
            put_image(stem.with_suffix(".png" if "lfpw" in folder else ".jpg"), pixels)
            put_pts(stem.with_suffix(".pts"), points)


def cofw(root):
    """The exported form, which needs no package to be read."""
    for split in ("train", "test"):
        rows = ["image\tpoints5\tpoints\tscale\tcenter_w\tcenter_h"]
        for i, (pixels, points, box, _) in enumerate(drawn(split, 29)):
            put_image(root / split / f"{i}.jpg", pixels)
            centre = (np.array(box[:2]) + box[2:]) / 2
            five = datasets.group_means(points, datasets.SCHEMES[29].five)
            scale = (box[3] - box[1]) / 200
            place = joined([scale, *centre], "\t")
            rows.append("\t".join([f"{i}.jpg", joined(five, ","), joined(points, ","), place]))
        put_text(root / f"{split}.tsv", "\n".join(rows) + "\n")


def cofw68(root):
    ibug_300w(root / "300w")
    cofw(root / "cofw")
    for number, (_, points, _, _) in enumerate(drawn("test", 68), 1):
        Mat().file(root / "cofw68" / "test_annotations" / f"{number}_points.mat",
                   Mat().numbers("Points", points + 1), compressed=True)


def helen(root):
    number = 0
    for split, folder in (("train", "train_1"), ("test", "test")):
        names = []
        for i, (pixels, points, _, _) in enumerate(drawn(split, 194)):
            number += 1
            names.append(f"{100 + number}_1")
            put_image(root / folder / f"{names[-1]}.jpg", pixels)
            rows = [f"{x:.3f} , {y:.3f}" for x, y in points]
            put_text(root / "annotation" / f"{number}.txt", "\n".join([names[-1], *rows]) + "\n")
        put_text(root / f"{split}names.txt", "\n".join(names) + "\n")


def aflw(root):
    """20,000 rows of the training split, the first with images, then those of the test split."""
    count = 20000 + TEST
    names = [f"0/image{i:05d}.jpg" for i in range(count)]
    data = np.empty((count, 38), np.float32)
    boxes = np.empty((count, 4), np.float32)
    for first, split in ((0, "train"), (20000, "test")):
        for i, (pixels, points, box, _) in enumerate(drawn(split, 19), first):
            put_image(root / "flickr" / names[i], pixels)
            data[i::TRAIN] = points.T.ravel()  # 19 x, 19 y
            boxes[i::TRAIN] = np.array(box)[[0, 2, 1, 3]]
    mat = Mat()
    mat.file(root / "AFLWinfo_release.mat",
             mat.matrix("nameList", (count, 1), 1, *(mat.text("", name, 16) for name in names)),
             mat.numbers("ra", np.arange(1, count + 1)[None], 5), mat.numbers("data", data, 7, 7),
             mat.numbers("bbox", boxes, 7, 7), mat.numbers("mask_new", np.ones((count, 19)), 2))


def jd106(root):
    sources = ("AFW", "HELEN", "IBUG", "LFPW")
    for split in ("train", "test"):
        for i, (pixels, points, box, _) in enumerate(drawn(split, 106)):
            source = sources[i % 4]
            folder = root / ("Test_data1" if split == "test" else f"Training_data/{source}")
            name = f"{source}_{split}_{i}.jpg"
            put_image(folder / "picture" / name, pixels)
            rows = "\n".join(joined(point, " ") for point in points)
            put_text(folder / "landmark" / f"{name}.txt", f"106\n{rows}\n")
            put_text(folder / "rect" / f"{name}.rect", joined(box, " "))


def lapa(root):
    for split in ("train", "test"):
        for i, (pixels, points, _, _) in enumerate(drawn(split, 106)):
            put_image(root / split / "images" / f"{i}_0.jpg", pixels)
            rows = "\n".join(joined(point, " ") for point in points)
            put_text(root / split / "landmarks" / f"{i}_0.txt", f"106\n{rows}\n")


def csv(root):
    """HRNet's tables of 300-W."""
    header = ["image_name", "scale", "center_w", "center_h"]
    header += [f"original_{i}_{axis}" for i in range(68) for axis in "xy"]
    for split, name in (("train", "train"), ("test", "test")):
        rows = [",".join(header)]
        for i, (pixels, points, box, _) in enumerate(drawn(split, 68)):
            put_image(root / "images" / "afw" / f"{split}_{i}.jpg", pixels)
            centre = (np.array(box[:2]) + box[2:]) / 2
            rows.append(",".join([f"afw/{split}_{i}.jpg", f"{(box[3] - box[1]) / 200:.4f}",
                                  joined(centre, ","), joined(points + 1, ",")]))
        put_text(root / f"face_landmarks_300w_{name}.csv", "\n".join(rows) + "\n")


def youtube(root):
    """Twelve people with two frames each: a sixth of the people is the test split."""
    rows = ["," + ",".join(map(str, range(136)))]
    faces = synthetic.read_faces("train", 24, SIZE, 68, per_identity=2)
    for i, face in enumerate(faces):
        name = f"Person_{i // 2:02d}_{i % 2}{i % 3}.jpg"
        put_image(root / "data" / "training" / name, face.image())
        rows.append(f"{name},{joined(face.points, ',')}")
    put_text(root / "data" / "training_frames_keypoints.csv", "\n".join(rows) + "\n")


def folder(root):
    for split in ("train", "test"):
        for i, (pixels, points, _, person) in enumerate(drawn(split, 68)):
            put_image(root / split / person / f"{i}.jpg", pixels)
            put_pts(root / split / person / f"{i}.pts", points)


def vggface2(root):
    """Folders of people, and a table of five points beside them for --landmarks."""
    rows = ["image," + ",".join(f"{axis}{i}" for i in range(5) for axis in "xy")]
    for split in ("train", "test"):
        for i, (pixels, points, _, person) in enumerate(drawn(split, 5)):
            name = f"{split}/n{int(person.rpartition('-')[2]):06d}/{i:04d}_01.jpg"
            put_image(root / name, pixels)
            rows.append(f"{name},{joined(points, ',')}")
    put_text(root / "landmarks.csv", "\n".join(rows) + "\n")


def records(root):
    """insightface's folder, with lfw.bin for --test, and CVLface's five points for --landmarks."""
    rows = ["idx," + ",".join(f"ldmk_{i}" for i in range(10))]
    images = []
    pictures = []
    for i, (pixels, points, _, person) in enumerate(drawn("train", 5, 112)):
        encoded = cv2.imencode(".jpg", pixels[..., ::-1])[1].tobytes()
        images.append(payload(int(person.rpartition("-")[2]), encoded))
        pictures.append(encoded)
        rows.append(f"{i},{joined(points / 112, ',')}")
    put_records(root, [payload((TRAIN + 1, TRAIN + 1)), *images])
    put_text(root / "ldmk_5points.csv", "\n".join(rows) + "\n")
    listed = []  # ten folds: a pair of one person's images (there are four), a pair of two people's
    for fold in range(10):
        i = fold % TRAIN
        listed += [pictures[j] for j in (i, i ^ 1, i, (i + 4) % TRAIN)]
    (root / "lfw.bin").write_bytes(pickle.dumps((listed, 10 * [True, False]), 2))


def widerface(root):
    """Training faces and, by hash of the name, the tenth of them that is the test split."""
    rows = []
    names = {"train": [], "test": []}
    for number in range(200):
        name = f"0--Parade/{number}.jpg"
        names["train" if zlib.crc32(name.encode()) % 10 else "test"].append(name)
    for split in ("train", "test"):
        for name, (pixels, points, (x0, y0, x1, y1), _) in zip(names[split], drawn(split, 5)):
            put_image(root / "train" / "images" / name, pixels)
            box = f"{x0:.0f} {y0:.0f} {x1 - x0:.0f} {y1 - y0:.0f}"
            marks = " ".join(f"{x:.3f} {y:.3f} 0.0" for x, y in points)
            rows.append(f"# {name}\n{box} {marks} 0.8")
    put_text(root / "train" / "label.txt", "\n".join(rows) + "\n")


def gait3d(root):
    put_gait3d(root, {"TRAIN_SET": ["0001", "0003"], "TEST_SET": ["0002", "0007"]},
               ["0002-camid3_videoid1-seq0", "0007-camid10_videoid2-seq0"])


WRITERS = {"wflw": wflw, "300w": ibug_300w, "cofw": cofw, "cofw68": cofw68, "helen": helen,
           "aflw": aflw, "jd106": jd106, "lapa": lapa, "csv": csv, "youtube": youtube,
           "folder": folder, "vggface2": vggface2, "ms1m": records, "ms1m-small": records,
           "webface-base": records,
           "widerface": widerface, "affnist": put_mnist, "gait3d": gait3d}


def make(name, root):
    """Writes the set `name`, a --data of any script, below the new folder `root`.
    Returns: the folder as text, "" for drawn sets, which need no files."""
    if name in ("faces", "faces-geometry", "walkers"):
        return ""
    root = Path(root)
    root.mkdir(parents=True)
    WRITERS[name](root)
    return str(root)
