"""Metrics against hand-worked numbers, slow loops and the definitions spelled out in numpy."""
import math
import re

import numpy as np
import pytest
import torch

from common import metrics

NAN = float("nan")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


# ---- landmark errors -----------------------------------------------------------------------------


def test_nme_by_hand_of_any_type():
    target = torch.tensor([[[0.0, 0.0], [10.0, 0.0]], [[5.0, 5.0], [5.0, 25.0]]])
    pred = target + torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, -1.0], [6.0, 8.0]]])
    norm = torch.tensor([10.0, 50.0])
    # (5 + 0) / 2 / 10; (1 + 10) / 2 / 50. A mean of squares or of |dx| + |dy| gives others.
    column_major = pred.transpose(1, 2).contiguous().transpose(1, 2)
    for p, t in ((pred, target), (pred.long(), target.long()), (pred.half(), target.half()),
                 (column_major, target)):
        errors = metrics.nme(p, t, norm)
        assert errors.tolist() == [0.25, 0.11] and errors.dtype == torch.float64


def test_nme_does_not_change_under_a_mirror_or_a_common_scale():
    target, pred = torch.rand(2, 3, 68, 2, generator=generator()).double() * 112
    norm = torch.tensor([40.0, 50.0, 60.0])
    swap = torch.randperm(68, generator=generator())
    mirrored = [(points * f64([-1, 1]) + f64([111, 0]))[:, swap] for points in (pred, target)]
    errors = metrics.nme(pred, target, norm)
    torch.testing.assert_close(metrics.nme(*mirrored, norm), errors)
    torch.testing.assert_close(metrics.nme(3 * pred, 3 * target, 3 * norm), errors)
    torch.testing.assert_close(metrics.nme(pred, target, 2 * norm), errors / 2)


@pytest.mark.parametrize("pred, target, norm", [
    ((2, 5, 2), (2, 6, 2), (2,)), ((2, 5, 3), (2, 5, 3), (2,)), ((5, 2), (5, 2), (5,)),
    ((2, 5, 2), (1, 5, 2), (2,)), ((2, 5, 2), (2, 5, 2), (2, 1)), ((2, 5, 2), (2, 5, 2), ())])
def test_nme_refuses_shapes_that_would_broadcast_and_bad_normalisers(pred, target, norm):
    with pytest.raises(ValueError, match=re.escape(str(pred))):
        metrics.nme(torch.zeros(pred), torch.zeros(target), torch.ones(norm))
    points = torch.zeros(3, 5, 2)
    for bad in (0.0, -3.0, NAN, math.inf):
        with pytest.raises(ValueError, match=rf"image 1 is {bad:g}"):
            metrics.nme(points, points, torch.tensor([1.0, bad, bad]))


def test_failure_is_strictly_above_the_threshold_in_both_precisions():
    for dtype in (torch.float32, torch.float64):
        errors = torch.tensor([0.05, 0.10, 0.10, 0.1001], dtype=dtype)
        assert metrics.failure_rate(errors, 0.10) == 0.25
        assert metrics.failure_rate(errors, 0.05) == 0.75
    five_pixels_of_fifty = metrics.nme(torch.zeros(1, 3, 2), f64([3, 4]).expand(1, 3, 2), f64([50]))
    assert metrics.failure_rate(five_pixels_of_fifty, 0.10) == 0


def test_auc_is_the_integral_of_the_distribution():
    # 0.00 encloses all, 0.05 half, 0.10 and above nothing: (1 + 0.5 + 0 + 0) / 4.
    assert metrics.auc(f64([0.0, 0.05, 0.10, 7.0]), 0.10) == pytest.approx(0.375, abs=1e-15)
    assert metrics.auc(torch.tensor([0, 1]), 0.5) == 0.5                       # integers are cast
    errors = (torch.randn(300, generator=generator(), dtype=torch.float64) / 2 - 3.0).exp()
    for threshold in (0.07, 0.10):
        t = np.linspace(0, threshold, 200_001)
        share = np.searchsorted(np.sort(errors.numpy()), t, side="right") / len(errors)
        integral = np.trapezoid(share, t) / threshold
        assert metrics.auc(errors, threshold) == pytest.approx(integral, abs=1e-5)


def test_auc_steps_is_sdfls_trapezoid_rule():
    errors = (torch.randn(300, generator=generator(), dtype=torch.float64) / 2 - 3.2).exp()
    share = [np.mean(errors.numpy() <= 0.005 * i) for i in range(1, 21)]
    trapezoids = sum(0.005 * (share[i] + share[i + 1]) / 2 for i in range(19)) * 10
    assert metrics.auc_steps(errors) == pytest.approx(trapezoids, abs=1e-12)
    assert abs(metrics.auc_steps(errors) - metrics.auc(errors, 0.1)) < 0.01
    # 0.10 is reached at the last threshold only, 0.05 from the tenth on: half a step, 10.5 steps.
    assert metrics.auc_steps(f64([0.10])) == pytest.approx(10 * 0.005 / 2)
    assert metrics.auc_steps(f64([0.05])) == pytest.approx(10 * 0.005 * 10.5)


def test_nan_is_a_failure_and_stays_in_the_count():
    pred, target = torch.zeros(4, 5, 2), torch.zeros(4, 5, 2)
    pred[2, 3, 1] = NAN
    errors = metrics.nme(pred, target, torch.ones(4))
    assert errors.isnan().tolist() == [False, False, True, False]
    for own, share in ((errors, 0.75), (errors.nan_to_num(), 1)):       # without nan: perfect
        assert metrics.failure_rate(own, 0.1) == 1 - share and metrics.auc(own, 0.1) == share
        assert metrics.auc_steps(own) == pytest.approx(0.95 * share)
    assert metrics.auc(torch.tensor([math.inf, 0.0]), 0.1) == 0.5
    curve = metrics.curve_error(pred, target, {"a": [0, 1, 2], "b": [3, 4]}, torch.ones(4))
    assert not curve["a"].isnan().any() and curve["b"].isnan().tolist() == errors.isnan().tolist()
    assert metrics.failure_rate(curve["overall"], 0.1) == 0.25


def test_metrics_work_inside_autocast_and_on_tensors_with_a_gradient():
    pred, target = torch.rand(2, 6, 68, 2, generator=generator()) * 100
    data, ks = identification_set(), tuple(range(1, 30))
    curves = metrics.ced_plot({"run": metrics.nme(pred, target, torch.full((6,), 600.0))})
    rates = metrics.rank_k(data[0].float(), data[1], data[2].float(), data[3], ks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = metrics.nme(pred.requires_grad_(), target, torch.full((6,), 600.0))
        probe, gallery = data[0].float().requires_grad_(), data[2].float()
        assert metrics.rank_k(probe, data[1], gallery, data[3], ks) == rates
    assert (metrics.ced_plot({"run": errors}) == curves).all()
    assert type(metrics.failure_rate(errors, 0.1)) is type(metrics.auc(errors, 0.1)) is float


@pytest.mark.parametrize("function", [metrics.failure_rate, metrics.auc])
@pytest.mark.parametrize("shape, threshold", [((0,), 0.1), ((3, 2), 0.1), ((3,), 0.0)])
def test_rates_refuse_an_empty_set_and_a_meaningless_threshold(function, shape, threshold):
    with pytest.raises(ValueError, match="threshold"):
        function(torch.zeros(shape), threshold)


def test_scores_of_subsets_as_a_table():
    subsets = {"": torch.tensor([True] * 3), "pose": torch.tensor([True, False, True])}
    scores = metrics.landmark_scores(f64([0.05, 0.0, 0.2]), subsets, 0.1)
    assert scores == pytest.approx({"nme": 0.25 / 3, "fr": 1 / 3, "auc": 0.5, "nme/pose": 0.125,
                                    "fr/pose": 0.5, "auc/pose": 0.25})
    table = metrics.landmark_table(scores, {"NME (%)": "nme", "AUC": "auc"}).split("\n")
    assert [line.split() for line in table] == [
        ["full", "pose"], ["NME", "(%)", "8.33", "12.50"], ["AUC", "0.5000", "0.2500"]]


# ---- curve error ---------------------------------------------------------------------------------


def loop_curve_error(pred, target, parts, norm, pred_parts=None):
    result = {}
    for name, indices in parts.items():
        result[name], own = [], (pred_parts or parts)[name]
        for p, t, d in zip(pred[:, own].numpy(), target[:, indices].numpy(), norm.tolist()):
            distances = [min(np.hypot(*(a - b)) for b in t) for a in p]
            distances += [min(np.hypot(*(a - b)) for a in p) for b in t]
            result[name].append(sum(distances) / len(distances) / d)
    result["overall"] = [sum(v) / len(v) for v in zip(*result.values())]
    return result


def test_curve_error_by_hand():
    target = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [9.0, 0.0], [50.0, 50.0]]])
    pred = torch.tensor([[[0.0, 3.0], [0.0, 4.0], [9.0, 4.0], [50.0, 60.0]]])
    # Part a: to the target 3, 4, 4; back from the target 3, sqrt(1 + 9), 4. Part b: 10 both ways.
    errors = metrics.curve_error(pred, target, {"a": [0, 1, 2], "b": [3]}, torch.tensor([20.0]))
    assert errors["a"].item() == pytest.approx((3 + 4 + 4 + 3 + math.sqrt(10) + 4) / 6 / 20)
    assert errors["b"].item() == 0.5
    # Parts weigh alike, whatever their number of points.
    assert errors["overall"].item() == pytest.approx((errors["a"].item() + 0.5) / 2)
    # The numbering within a part does not count, that across parts does.
    parts = {"a": [0, 1], "b": [2, 3]}
    within = metrics.curve_error(target[:, [1, 0, 3, 2]], target, parts, torch.ones(1))
    assert within["overall"].item() == 0
    across = metrics.curve_error(target[:, [2, 3, 0, 1]], target, parts, torch.ones(1))
    assert across["overall"].item() > 0


@pytest.mark.parametrize("points", [12, 9])                         # of the prediction
def test_curve_error_equals_a_loop(points):
    target = torch.rand(3, 12, 2, generator=generator(1)).double() * 30
    pred = torch.rand(3, points, 2, generator=generator(2)).double() * 30
    parts = {"contour": range(7), "mouth": [7, 9, 8, 10, 11]}
    own = parts if points == 12 else {"mouth": [0, 1], "contour": [8, 7, 2, 3]}
    given = None if points == 12 else own
    norm = torch.tensor([9.0, 10.0, 11.0])
    errors = metrics.curve_error(pred, target, parts, norm, pred_parts=given)
    expected = loop_curve_error(pred, target, parts, norm, own)
    assert list(errors) == ["contour", "mouth", "overall"]
    for name in errors:
        np.testing.assert_allclose(errors[name].numpy(), expected[name], rtol=1e-12)
    same = metrics.curve_error(pred, pred, own, norm, pred_parts=own)
    assert all(error.tolist() == [0, 0, 0] for error in same.values())
    with pytest.raises(ValueError, match="image 1 is 0"):
        metrics.curve_error(pred, target, parts, torch.tensor([1.0, 0.0, 1.0]), pred_parts=given)


# ---- alignment strength --------------------------------------------------------------------------


def test_anme_by_hand():
    # Landmark 0 lies 5 px from its mean (0, 0) in both faces, landmark 1 never moves.
    points = torch.tensor([[[3.0, 4.0], [7.0, 7.0]], [[-3.0, -4.0], [7.0, 7.0]]])
    assert metrics.anme(points, 20.0) == 0.125
    assert metrics.anme(points, torch.tensor([10.0, 30.0])) == 0.125     # d is their mean
    assert metrics.anme(points[:1].expand(5, 2, 2), 20.0) == 0
    with pytest.raises(ValueError, match="image 1 is 0"):
        metrics.anme(points, torch.tensor([3.0, 0.0]))
    with pytest.raises(ValueError, match="B, P, 2"):
        metrics.anme(points[0], 3.0)


def test_anme_of_gaussian_scatter_and_its_invariance():
    points = 50 + 2 * torch.randn(4000, 5, 2, generator=generator(), dtype=torch.float64)
    # E|y - ybar| of a 2-D Gaussian about its sample mean: sigma sqrt(pi / 2) sqrt(1 - 1 / N).
    assert metrics.anme(points, 1.0) == pytest.approx(2 * math.sqrt(math.pi / 2), rel=0.01)
    c, s = math.cos(0.5), math.sin(0.5)
    rotated = points @ f64([[c, s], [-s, c]]) + f64([9.0, -4.0])
    expected = pytest.approx(metrics.anme(points, 40.0), rel=1e-9)
    assert metrics.anme(3 * rotated, 3 * 40.0) == expected


# ---- verification --------------------------------------------------------------------------------


def unit_pairs(squared_distances):
    """Unit vectors of the plane at the given squared distances: |a - b|^2 = 2 - 2 cos."""
    angle = torch.acos(1 - torch.as_tensor(squared_distances, dtype=torch.float64) / 2)
    first = f64([1, 0]).expand(len(angle), 2)
    return first, torch.stack([angle.cos(), angle.sin()], 1)


def loop_verification(a, b, same, folds):
    """Each threshold between training distances and outside is tried on every training pair."""
    a, b = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (a, b))
    distance = ((a - b) ** 2).sum(1).tolist()
    accuracies = []
    for test in np.array_split(np.arange(len(same)), folds):
        train = [i for i in range(len(same)) if i not in set(test.tolist())]
        ordered = sorted({distance[i] for i in train})
        candidates = [-1.0] + [(x + y) / 2 for x, y in zip(ordered, ordered[1:])] + [9.0]
        right = [sum((distance[i] < t) == bool(same[i]) for i in train) for t in candidates]
        threshold = candidates[right.index(max(right))]
        accuracies.append(np.mean([(distance[i] < threshold) == bool(same[i]) for i in test]))
    return np.mean(accuracies), np.std(accuracies)


@pytest.mark.parametrize("pairs, folds", [(60, 10), (47, 10), (30, 3)])
def test_verification_equals_brute_force(pairs, folds):
    g = generator(pairs)
    same = torch.rand(pairs, generator=g) < 0.5
    a = torch.randn(pairs, 4, generator=g).double()
    b = torch.where(same[:, None], a, 0 * a) + torch.randn(pairs, 4, generator=g) * 0.9
    mean, std = metrics.verification_accuracy(a, b, same, folds)
    expected_mean, expected_std = loop_verification(a, b, same, folds)
    assert 0.6 < mean < 0.95                                            # neither trivial nor chance
    assert mean == pytest.approx(expected_mean, abs=1e-12)
    assert std == pytest.approx(expected_std, abs=1e-12)


def test_verification_with_tied_distances_equals_brute_force():
    g = generator(9)
    same = torch.rand(60, generator=g) < 0.5
    level = torch.randint(0, 5, (60,), generator=g) + 2 * (~same)
    a, b = torch.eye(7)[[0] * 60].double(), torch.eye(7)[[0] * 60].double()
    b[:, 1] += level                                 # equal entries give distances equal to the bit
    result = metrics.verification_accuracy(a, b, same)
    assert result == pytest.approx(loop_verification(a, b, same, 10), abs=1e-12)
    # All distances equal: no threshold accepts the same-pairs alone, though they come first.
    same = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 0, 0])
    a, b = a[:1].expand(10, 7), b[:1].expand(10, 7)
    assert metrics.verification_accuracy(a, b, same, 2) == (0.6, 0.0)


def test_verification_by_hand_over_two_consecutive_folds():
    # Fold 0 alone asks for a threshold between 0.2 and 1.0, fold 1 for one between 1.2 and 1.6.
    # Judged with 1.4, fold 0 accepts its pair at 1.0 wrongly (3 of 4); with 0.6, fold 1 refuses its
    # pair at 1.2 (3 of 4). If pairs are dealt alternately, each fold sees both kinds of threshold.
    a, b = unit_pairs([0.1, 1.0, 0.2, 1.8, 0.3, 1.2, 1.6, 1.9])
    same = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0])
    assert metrics.verification_accuracy(a, b, same, folds=2) == (0.75, 0.0)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert metrics.verification_accuracy(a[order], b[order], same[order], folds=2) != (0.75, 0.0)


def test_verification_of_separable_and_of_constant_embeddings():
    same = torch.arange(200) % 2 == 0
    for scale in (1.0, 1e-3):           # 1e-3: all distances below the first step of a grid of 0.01
        a, b = unit_pairs(torch.where(same, 0.2, 1.8) * scale)
        assert metrics.verification_accuracy(5 * a, 0.1 * b, same) == (1.0, 0.0)
    constant = torch.ones(100, 8)
    blocks = torch.tensor([True] * 5 + [False] * 5).repeat(10)
    assert metrics.verification_accuracy(constant, constant, blocks) == (0.5, 0.0)


def test_verification_refuses_bad_input():
    a = torch.rand(20, 4)
    for bad in ((a, a[:19], torch.ones(20)), (a, a, torch.ones(19)), (a[:9], a[:9], torch.ones(9))):
        with pytest.raises(ValueError, match="folds"):
            metrics.verification_accuracy(*bad)
    a[3, 1] = NAN
    with pytest.raises(ValueError, match="1 of 20 embeddings"):
        metrics.verification_accuracy(a, a, torch.ones(20))


# ---- identification ------------------------------------------------------------------------------


def loop_rank(probe, probe_ids, gallery, gallery_ids, ks):
    places = []
    for x, i in zip(probe.numpy(), probe_ids.tolist()):
        cosine = [float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for y in gallery.numpy()]
        order = sorted(range(len(cosine)), key=lambda j: -cosine[j])
        places.append([gallery_ids[j] == i for j in order].index(True))
    return {k: np.mean([place < k for place in places]) for k in ks}


def identification_set(seed=0):
    g = generator(seed)
    centres = torch.randn(12, 6, generator=g).double()
    mates = torch.randint(0, 12, (18,), generator=g)
    gallery_ids = torch.cat([torch.arange(12), mates, torch.full((70,), -100)])
    gallery = torch.randn(100, 6, generator=g).double()
    gallery[:30] += 1.2 * centres[gallery_ids[:30]]
    probe_ids = torch.randint(0, 12, (40,), generator=g)
    probe = 1.2 * centres[probe_ids] + torch.randn(40, 6, generator=g)
    shuffle = torch.randperm(100, generator=g)
    return probe, probe_ids, gallery[shuffle] * 3, gallery_ids[shuffle]


def test_rank_k_equals_sorting_the_gallery_in_blocks_of_any_size():
    data = identification_set()
    rates = metrics.rank_k(*data, ks=(1, 2, 5, 20))
    assert rates == pytest.approx(loop_rank(*data, (1, 2, 5, 20)))
    assert 0.1 < rates[1] < rates[5] < rates[20] < 1
    for chunk in (1, 7, 40, 99):
        assert metrics.rank_k(*data, ks=(1, 2, 5, 20), chunk=chunk) == rates


def test_rank_k_never_holds_more_than_a_block(monkeypatch):
    largest = []
    beaten_by = metrics._beaten_by

    def spy(probe, best, gallery, dtype):
        largest.append(len(probe) * len(gallery))
        return beaten_by(probe, best, gallery, dtype)

    monkeypatch.setattr(metrics, "_beaten_by", spy)
    metrics.rank_k(*identification_set(), chunk=16)
    assert len(largest) > 9 and max(largest) == 16 * 16


def test_rank_k_by_hand_with_several_mates_and_ties():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    ids = torch.tensor([7, 8, 7, -100])
    # Probe 0 of id 7 is nearest to its second mate; probe 1 of id 8 has one stranger ahead.
    probe = torch.tensor([[0.6, 0.8], [0.6, 0.8]])
    assert metrics.rank_k(probe, torch.tensor([7, 8]), gallery, ids, ks=(1, 2)) == {1: 0.5, 2: 1.0}
    # A non-mate that ties counts first, also when it is longer and in another block.
    tied = torch.tensor([[0.3, 0.1, 0.7], [3.0, 1.0, 7.0]])
    for chunk in (1, 2):
        rates = metrics.rank_k(tied[:1], [1], tied, [1, 2], ks=(1, 2), chunk=chunk)
        assert rates == {1: 0.0, 2: 1.0}
    constant, ids = torch.ones(10, 64), torch.arange(10)
    assert metrics.rank_k(constant, ids, constant, ids, ks=(1, 9, 10)) == {1: 0, 9: 0, 10: 1}


def test_rank_k_tells_apart_what_float32_cannot():
    """Strangers ahead of or behind the mate at all scales of a gap, down to 1e-10."""
    g = generator(4)
    probe = torch.nn.functional.normalize(torch.randn(30, 16, generator=g).double())
    mate = probe + 0.1 * torch.randn(30, 16, generator=g)
    gap = torch.logspace(-10, -3, 30).double()[:, None]
    gap[::3] *= -1
    gallery = torch.cat([mate, mate + gap * probe, torch.randn(70, 16, generator=g)])
    ids = torch.cat([torch.arange(30), torch.full((100,), -1)])
    data = probe, torch.arange(30), gallery, ids, (1, 2, 30, 100)
    rates = metrics.rank_k(*data)
    assert rates == pytest.approx(loop_rank(*data)) and 0 < rates[1] < 1


def test_rank_k_refuses_probes_without_a_mate_and_nan():
    x = torch.rand(4, 3)
    with pytest.raises(ValueError, match="2 of 4 queries have no mate.*first id 5"):
        metrics.rank_k(x, torch.tensor([0, 5, 1, 6]), x, torch.tensor([0, 1, 2, -100]))
    with pytest.raises(ValueError, match="one each"):
        metrics.rank_k(x, torch.zeros(5), x, torch.zeros(4))
    gallery = x.clone()
    gallery[3, 0] = NAN                      # a stranger that is nan must not vanish from the count
    with pytest.raises(ValueError, match="nan"):
        metrics.rank_k(x, torch.zeros(4), gallery, torch.tensor([0, 0, 0, 1]))


# ---- TAR at FAR ----------------------------------------------------------------------------------


def loop_tar(scores, same, far):
    """Every score, and one above all, is tried as a threshold: score >= threshold is accepted."""
    genuine = [s for s, x in zip(scores, same) if x]
    impostor = [s for s, x in zip(scores, same) if not x]
    best = 0.0
    for threshold in [*scores, max(scores) + 1]:
        if sum(s >= threshold for s in impostor) <= far * len(impostor) + 1e-9:
            best = max(best, sum(s >= threshold for s in genuine) / len(genuine))
    return best


def test_tar_at_far_equals_trying_every_threshold_with_ties():
    for seed in range(5):
        g = generator(seed)
        same = torch.rand(150, generator=g) < 0.4
        scores = torch.randint(0, 12, (150,), generator=g) + 4 * same          # integers: many ties
        fars = (0.0, 0.001, 0.01, 0.05, 0.1, 0.29, 0.5, 1.0)
        rates = metrics.tar_at_far(scores, same, fars)
        assert rates == {far: pytest.approx(loop_tar(scores.tolist(), same.tolist(), far))
                         for far in fars}
        assert rates[0.0] < rates[0.29] < rates[1.0] == 1


def test_tar_at_far_by_hand():
    impostor = torch.arange(100).double() / 100                                  # 0.00 ... 0.99
    genuine = f64([0.705, 0.985, 0.99, 1.5])
    scores, same = torch.cat([genuine, impostor]), torch.arange(104) < 4
    # FAR 0: above 0.99. FAR 0.01: 0.99 may pass, 0.98 not. FAR 0.29: 29 pass, 0.70 not.
    assert metrics.tar_at_far(scores, same, (0.0, 0.008, 0.01, 0.28, 0.29)) == {
        0.0: 0.25, 0.008: 0.25, 0.01: 0.75, 0.28: 0.75, 0.29: 1.0}
    # Two impostors at the top: at FAR 0.01 neither may pass, although one could.
    scores[4 + 98] = 0.99
    assert metrics.tar_at_far(scores, same, (0.01, 0.02)) == {0.01: 0.25, 0.02: 0.75}
    # With too few impostors it is read above them all; constant scores give nothing.
    assert metrics.tar_at_far([0.9, 0.4, 0.5], [True, True, False], (1e-4,)) == {1e-4: 0.5}
    rates = metrics.tar_at_far(torch.ones(50), torch.arange(50) % 2 == 0, (1e-4, 0.5))
    assert rates == {1e-4: 0.0, 0.5: 0.0}


@pytest.mark.parametrize("scores, same", [
    ([1.0, NAN], [1, 0]), ([1.0, 2.0], [1, 1]), ([1.0, 2.0], [0, 0]), ([1.0, 2.0, 3.0], [0, 1]),
    ([[1.0, 2.0]], [[0, 1]])])
def test_tar_refuses_nan_one_kind_and_unequal_lengths(scores, same):
    with pytest.raises(ValueError, match="both kinds"):
        metrics.tar_at_far(scores, same)


# ---- retrieval -----------------------------------------------------------------------------------


def loop_retrieval(distance, query_ids, gallery_ids):
    precision, penalty, first = [], [], []
    for row, i in zip(distance.tolist(), query_ids.tolist()):
        order = sorted(range(len(row)), key=lambda j: (row[j], gallery_ids[j] == i))
        places = [n for n, j in enumerate(order, 1) if gallery_ids[j] == i]
        precision.append(np.mean([(m + 1) / n for m, n in enumerate(places)]))
        penalty.append(len(places) / places[-1])
        first.append(places[0])
    scores = {f"rank{k}": np.mean([place <= k for place in first]) for k in (1, 5, 10)}
    return scores | {"map": np.mean(precision), "minp": np.mean(penalty)}


def test_retrieval_by_hand():
    # Query 0 has mates at places 1 and 3, query 1 its only one at place 4.
    distance = torch.tensor([[0.1, 0.3, 0.4, 0.2], [1.0, 2.0, 3.0, 4.0]])
    ids = torch.tensor([1, 2]), torch.tensor([1, 1, 3, 2])
    assert metrics.retrieval(distance, *ids, ks=(1, 3, 4)) == pytest.approx({
        "rank1": 0.5, "rank3": 0.5, "rank4": 1.0, "map": ((1 + 2 / 3) / 2 + 1 / 4) / 2,
        "minp": (2 / 3 + 1 / 4) / 2})
    ids = torch.tensor([0, 0, 1, 1])
    perfect = metrics.retrieval((ids[:2, None] != ids).float(), ids[:2], ids)
    assert set(perfect.values()) == {1.0}
    tied = metrics.retrieval(torch.zeros(2, 4), ids[:2], ids)           # mates at places 3 and 4
    assert tied == pytest.approx({"rank1": 0, "rank5": 1, "rank10": 1, "map": 5 / 12, "minp": 0.5})


@pytest.mark.parametrize("levels", [4, 10 ** 6])                      # with many ties and with none
def test_retrieval_equals_loops(levels):
    g = generator(levels)
    ids = torch.arange(6).repeat(5), torch.cat([torch.arange(6),
                                                torch.randint(0, 9, (40,), generator=g)])
    distance = torch.randint(0, levels, (30, 46), generator=g).float()
    assert metrics.retrieval(distance, *ids) == pytest.approx(loop_retrieval(distance, *ids))


@pytest.mark.parametrize("distance, queries, gallery, message", [
    ([[0.0] * 3] * 2, [0, 5], [0, 1, 2], "1 of 2 queries have no mate"),
    ([[0.0, NAN]], [0], [0, 1], "1 distances are nan"),
    ([[0.0] * 3] * 2, [0, 0], [0, 1], "one each")])
def test_retrieval_refuses(distance, queries, gallery, message):
    with pytest.raises(ValueError, match=message):
        metrics.retrieval(torch.tensor(distance), queries, gallery)


# ---- picture -------------------------------------------------------------------------------------


def test_ced_plot_draws_each_curve_where_it_belongs():
    image = metrics.ced_plot({"half": torch.full((7,), 0.05),
                              "quarter": torch.tensor([0.02, 1.0, 1.0, NAN])})
    assert image.shape == (600, 1200, 3) and image.dtype == np.uint8
    axes = image[:, :880]  # the legend is beside them
    first, second = (np.all(axes == colour, axis=2) for colour in metrics.CURVE_COLOURS[:2])
    # The axes span x 70 to 870 and y 50 (all images) to 530 (none). Errors 0.05: a step half way.
    assert first[200:400, 468:473].any(1).all() and not first[200:400, 100:465].any()
    assert first[49:52, 500:860].any(0).all()
    # One image of four at 0.02: a step at a fifth of the width, up to a quarter of the height.
    assert second[408:412, 240:540].any(0).all() and second[430:520, 228:233].any(1).all()
    assert not second[50:400].any()
    axes = metrics.ced_plot({"perfect": torch.zeros(3)})[:, :880]
    perfect = np.all(axes == metrics.CURVE_COLOURS[0], axis=2)
    assert perfect[49:52, 70:870].any(0).all() and not perfect[60:480].any()     # no step at 0


def test_ced_plot_legend_and_grid_do_not_depend_on_the_curves_colours():
    many = {f"method {i}": torch.rand(20, generator=generator(i)) * 0.1 for i in range(8)}
    image = metrics.ced_plot(many, threshold=0.08)
    for colour in metrics.CURVE_COLOURS:
        assert np.all(image == colour, axis=2).sum() > 200
    assert (image[:40] < 100).any() and (image[545:] < 100).any()     # titles of the axes are there
    with pytest.raises(ValueError, match="errors"):
        metrics.ced_plot({"empty": torch.zeros(0)})
