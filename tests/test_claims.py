"""tests/claims.py and tests/measures.py: flags, one claim from end to end, and what is measured."""
import json
import re

import pytest
import torch
from torch import nn

import heatmap_landmarks
import kprpe
import lddmm_face
import sdfl
import stn_align
from common import datasets, warp
from tests import bench, claims, first_gpu, measures

MODULES = {module.__name__: module
           for module in (sdfl, heatmap_landmarks, lddmm_face, stn_align, kprpe)}
TINY = ["--device", "cpu", "--size", "32", "--limit", "4", "--batch-size", "2", "--epochs", "1"]


@pytest.mark.parametrize("script", claims.CLAIMS)
def test_flags_of_all_claims_exist(script):
    module = MODULES[script.partition("-")[0]]
    for small in ([], ["--small"]):
        args = claims.parse_args([script, "--data-root", "x", *small])
        base = claims.base_of(script, args).split()
        for claim in claims.CLAIMS[script]:
            for label, flags in claim.variants.items():
                words = re.sub(r"@[\w-]+/\S+", __file__, flags).split()
                module.parse_args([*base, *(word for word in words if word != claims.CONSTANT)])
                assert claim.metric_of(label)
            assert set(claims.needs_of(" ".join(claim.variants.values()))) <= set(claims.CLAIMS)


def test_names_are_unique_and_an_unknown_one_is_refused(capsys):
    for listed in claims.CLAIMS.values():
        assert len({claim.name for claim in listed}) == len(listed)
    with pytest.raises(SystemExit):
        claims.parse_args(["sdfl", "--only", "heads"])
    assert "sdfl has the claims head, " in capsys.readouterr().err


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Commands run here, not in processes of their own, and are listed."""
    commands = []

    def call(words, threads):
        commands.append(words)
        if words[:2] == ["-m", "tests.measures"]:
            capsys.readouterr()
            measures.main(words[2:])
            return capsys.readouterr().out
        if words[0] == "-c":
            assert words[1].endswith("; measures.train_with_constant_keypoints()")
            measures.hold_keypoints()
            kprpe.main(kprpe.parse_args(words[2:]))
            return ""
        module = MODULES[re.search(r"(\w+)\.py$", words[0])[1]]
        start = kprpe.main if module is kprpe else module.train
        start(module.parse_args(words[1:]))
        return ""

    monkeypatch.setattr(claims, "call", call)
    monkeypatch.setattr(kprpe, "inputs", kprpe.inputs)  # undone after `hold_keypoints`
    return commands


def run_claims(tmp_path, *words):
    claims.main([words[0], "--results", str(tmp_path / "claims.jsonl"), "--seeds", "1",
                 *words[1:]])
    return [json.loads(line) for line in (tmp_path / "claims.jsonl").read_text().splitlines()]


def test_a_claim_from_end_to_end(tmp_path, in_process, capsys):
    flags = ["--only", "68 to 194", "--", *TINY, "--backbone", "mobilenetv2"]
    rows = run_claims(tmp_path, "lddmm_face", *flags)
    assert len(rows) == 1 and len(in_process) == 2  # both variants are one run, and one measure
    result = rows[0]["result"]
    assert result["epoch"] == 1 and 0 < result["curves@floor@194"] < result["curves@194"]
    assert result["curves@floor"] == 0 and result["nme@spline"] == pytest.approx(result["nme"])
    assert result["nme@hidden"] > 0 and result["curves@alone@194"] > 0
    shown = capsys.readouterr().out
    assert re.search(r"194 predicted [\d.]+ \(1 seed\); 68 alone [\d.]+ \(1 seed\); "
                     r"\[true 68 alone [\d.]+ \(1 seed\)\] \| [01] of 1 \|", shown)
    run_claims(tmp_path, "lddmm_face", *flags)
    assert len(in_process) == 2  # nothing new
    output = tmp_path / "CLAIMS.md"
    claims.main(["--report", "--results", str(tmp_path / "claims.jsonl"), "--output", str(output),
                 "--hardware", "one core"])
    text = output.read_text()
    assert "Hardware: one core." in text and "## lddmm_face" in text
    assert "`python -m tests.claims lddmm_face --data faces -- --device cpu" in text
    assert "| 68 to 194 |" in text and "\n\nNot run: sparse to dense; " in text


def test_landmarks_that_were_not_learned_are_measured_apart(tmp_path, in_process):
    flags = ["--only", "sparse to dense, honest", "--", *TINY, "--backbone", "mobilenetv2"]
    result = run_claims(tmp_path, "lddmm_face", *flags)[0]["result"]
    learned = 46  # of 68, the published half
    for end in ("", "@interpolated", "@spline"):
        unseen = result[f"nme@unseen{end}"]
        assert 0 < unseen * (68 - learned) / 68 < result[f"nme{end}"]
    assert result["nme@unseen"] != result["nme@unseen@spline"]


def test_a_run_that_needs_another_waits_for_it(tmp_path, monkeypatch):
    order = []

    def call(words, threads):
        folder = claims.Path(words[words.index("--output") + 1])
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text('{"accuracy": 0.5}\n')
        order.append(words)
        return ""

    monkeypatch.setattr(claims, "call", call)
    rows = run_claims(tmp_path, "stn_align", "--only", "template", "--jobs", "3")
    own = next(words for words in order if "--template-file" in words)
    first = next(words for words in order if "--template" not in words)
    file = own[own.index("--template-file") + 1]
    assert file == first[first.index("--output") + 1] + "/template.pts"
    assert order.index(first) < order.index(own) and len(rows) == 3


@pytest.mark.parametrize("script", claims.CLAIMS)
def test_an_order_is_asked_of_two_variants_that_the_paper_has(script):
    for claim in claims.CLAIMS[script]:
        assert set(claim.own) < set(claim.variants) and len(claim.variants) - len(claim.own) >= 2
        assert next(iter(claim.variants)) not in claim.own


PAPERS = [  # what a paper's own numbers say of a claim's order: {label: number}
    ("stn_align", "template", {"re-used": 90.37, "learned": 90.20, "fixed": 89.60}),
    ("stn_align", "ladder, rank-1", {"tps8": 89.71, "none": 84.21, "fullalign": 0}),
    ("stn_align", "joint, own pairs", {"lambda 3": 90.20, "lambda 0": 89.71, "none": 84.21}),
    ("sdfl", "loss", {"soft wing": 4.65, "wing": 4.76, "L1": 4.76}),
    ("sdfl", "epsilon", {"0.5": 4.65, "2": 4.72}),
    ("sdfl", "head", {"graph": 4.70, "fc": 4.86}),
    ("kprpe", "unaligned", {"KP-RPE": 93.56, "iRPE": 77.91, "ViT": 72.81}),
    ("kprpe", "aligned", {"iRPE": 97.01, "KP-RPE": 96.60, "ViT": 96.11}),
    ("kprpe", "f(P)", {"multihead": 93.56, "relative": 89.70, "absolute": 68.09}),
    ("kprpe", "losses", {"AdaFace": 75.80, "ArcFace": 75.62, "CosFace": 75.48}),
    ("lddmm_face", "beta", {"0.1": 3.67, "1": 7.02, "0.01": 5.78})]


@pytest.mark.parametrize("script, name, numbers", PAPERS)
def test_a_papers_own_numbers_hold_its_claim(script, name, numbers):
    claim = next(claim for claim in claims.CLAIMS[script] if claim.name == name)
    assert set(numbers) == set(claim.variants) - set(claim.own)
    values = {label: {0: numbers[label]} for label in claim.variants if label in numbers}
    assert claims.order_held(claim, values) == "1 of 1"


def rows_of(**results):
    return {f"sdfl {flags} --seed {seed}": dict(result=dict(nme=value))
            for flags, values in results.items() for seed, value in enumerate(values)}


def test_table_gives_mean_spread_and_order():
    claim = claims.Claim("c", "p", {"one": "a", "two": "b", "three": "c"})
    done = rows_of(a=[0.1, 0.3], b=[0.2, 0.2], c=[0.4, 0.1])
    line = claims.table("sdfl", [claim], "", 2, done).splitlines()[-1]
    assert line == ("| c | p | one 20.00 ± 14.14 (2 seeds); two 20.00 ± 0.00 (2 seeds); "
                    "three 25.00 ± 21.21 (2 seeds) | 1 of 2 |")
    chain = claims.Claim("c", "p", claim.variants, lower_is_better=False, chain=True)
    assert claims.table("sdfl", [chain], "", 2, done).endswith("| 1 of 2 |")
    own = claims.Claim("c", "p", claim.variants, own=("three",))  # shown, not ranked
    line = claims.table("sdfl", [own], "", 2, done).splitlines()[-1]
    assert "; three† 25.00 ± 21.21 (2 seeds) | 1 of 2 |" in line
    done = rows_of(a=[0.1, 0.3], b=[0.2, 0.4], c=[0.4, 0.1])
    assert claims.table("sdfl", [claim], "", 2, done).endswith("| 1 of 2 |")
    assert claims.table("sdfl", [own], "", 2, done).endswith("| 2 of 2 |")
    assert claims.table("sdfl", [claim], "", 2, rows_of(a=[0.1], c=[0.3])).endswith(
        "one 10.00 (1 seed); two not run; three 30.00 (1 seed) | not run |")
    assert claims.table("sdfl", [claim], "", 2, rows_of(a=[0.1])).endswith("\n\nNot run: c.")


# ---- What is measured ----------------------------------------------------------------------------

def drawn_loader(count=6):
    args = sdfl.parse_args(["--size", "64", "--limit", str(count), "--device", "cpu"])
    data = sdfl.make_dataset(args, "test")
    return args, measures.ordered_loader(args, data, torch.device("cpu"))


def test_occluder_test_sees_only_visible_points():
    args, loader = drawn_loader()

    class Mean(nn.Module):  # all points are where the image's brightest value says
        size = 64
        mask = torch.eye(68, dtype=torch.bool)

        def forward(self, image):
            return image.amax((1, 2, 3))[:, None, None].expand(-1, 68, 2)

    result = measures.occluder_test(Mean(), loader, args)
    assert list(result) == [f"moved@{share}" for share in (0.05, 0.1, 0.2, 0.3, 0.4)]
    assert all(value > 0 for value in result.values())

    class Fixed(Mean):
        def forward(self, image):
            return torch.zeros(len(image), 68, 2)

    assert not any(measures.occluder_test(Fixed(), loader, args).values())


def test_a_hidden_crop_is_grey_about_a_landmark():
    _, loader = drawn_loader()
    batch = next(iter(loader))
    hidden, visible = measures.hide(batch, 0.2, 64)
    before = batch["image"].permute(0, 3, 1, 2).float()
    changed = (hidden["image"] != before).any(1).float().mean((1, 2))
    assert changed.max() <= 0.22 and changed.max() > 0.15  # less where it leaves the crop
    assert not visible[torch.arange(6), 7 * batch["index"] % 68].any() and visible.any(1).all()


def test_decoders_are_measured_as_a_run_measures_its_own(tmp_path, in_process):
    flags = ["--only", "flip test", "--", *TINY, "--backbone", "mobilenetv2_0.25"]
    result = run_claims(tmp_path, "heatmap_landmarks", *flags)[0]["result"]
    assert result["nme@dark"] == result["nme@flip none"] == pytest.approx(result["nme"])
    assert {"auc@shift", "auc@argmax", "auc@flip coordinates", "auc@flip heatmaps"} <= set(result)


def test_rough_boxes_are_looked_at_twice(tmp_path, in_process):
    flags = ["--only", "rough boxes", "--", *TINY, "--backbone", "mobilenetv2_0.25"]
    twice, once = (row["result"] for row in run_claims(tmp_path, "heatmap_landmarks", *flags))
    assert twice["nme@rough"] != twice["nme@rough@first"] != twice["nme/first pass"]
    assert once["nme@rough"] == once["nme@rough@first"] != once["nme"]
    data = measures.rough_boxes(drawn_loader()[1].dataset)
    still = drawn_loader()[1].dataset
    moved = warp.apply_affine(data.crop_matrices, data.points) - still.crop_points()
    assert 2 < moved.norm(dim=2).mean() < 8  # px of 64


def test_constant_keypoints_are_those_of_all_images(tmp_path, in_process):
    own = kprpe.inputs
    args = claims.parse_args(["kprpe", "--results", str(tmp_path / "claims.jsonl"), "--", *TINY,
                              "--dim", "16", "--depth", "1", "--limit", "40"])
    flags = claims.join(claims.base_of("kprpe", args), claims.CONSTANT)
    result = claims.make(args, "kprpe", flags, 0, 1, [])["result"]
    assert {"accuracy@unaligned", "accuracy@t0.25", "accuracy@t0.75"} <= set(result)
    assert kprpe.inputs is not own and claims.CONSTANT in in_process[1]
    image = torch.zeros(3, 3, 32, 32)
    points = kprpe.inputs(image, torch.randn(3, 5, 2))[1]  # still held
    expected = (torch.tensor(datasets.ARCFACE_5) + 0.5) / 112
    torch.testing.assert_close(points, expected.expand(3, 5, 2).float())


def test_bench_knows_its_sections(capsys):
    with pytest.raises(SystemExit):
        bench.main(["nothing"])
    assert "expected some of faces, loader" in capsys.readouterr().err


def test_photographs_of_two_sets_are_matched_by_name():
    own, others = ([datasets.Face(name, torch.zeros(2, 2).numpy()) for name in names]
                   for names in (["a/1.jpg", "a/2.jpg", "b/3.jpg"], ["x/3.png", "x/1.jpg"]))
    assert measures.same_faces(own, others) == [2, 0]
    assert measures.same_faces(others, own) == []
    drawn = datasets.Face(lambda: torch.zeros(8, 8, 3).numpy())
    assert measures.same_faces([drawn], others) == []


@pytest.mark.parametrize("case", first_gpu.CASES)
def test_first_gpu_has_flags_and_timings_that_exist(case):
    for tiny in (True, False):
        script, *flags = first_gpu.flags_of(case, tiny)
        MODULES[script.removesuffix(".py")].parse_args([*flags, *first_gpu.FAST.split()])
    assert all(hasattr(bench, f"bench_{name}") for name in first_gpu.BENCHES)


def test_first_gpu_tells_scores_that_differ():
    seen = dict(nme=0.5, accuracy=0.9, loss=3.0)
    assert not first_gpu.agree(seen, dict(nme=0.509, accuracy=0.915, loss=9.0))
    assert first_gpu.agree(seen, dict(nme=0.53, accuracy=0.9)) == ["nme 0.5000, on a CPU 0.5300"]
