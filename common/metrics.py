"""One definition of every number that the scripts report.

Errors and rates are fractions, points pixels; per-image errors come back as float64 tensors, rates
as floats. Arithmetic is float64: cheap here, and autocast and TF32, which round cosines to three
digits, leave it alone. nan is never dropped: as a prediction it fails, as an embedding or score it
raises. Ties count as misses.
"""
import cv2
import numpy as np
import torch

from common import UserError


def _positive(norm):
    norm = torch.as_tensor(norm).double()
    bad = ~((norm > 0) & norm.isfinite())
    if bad.any():
        image = int(bad.flatten().nonzero()[0])
        raise UserError(f"normaliser of image {image} is {norm[bad][0]:g}; it must be finite and "
                        "above 0: check the points that it is measured between")
    return norm


def _checked(pred, target, norm):
    pred = torch.as_tensor(pred).double()
    target = torch.as_tensor(target).double()
    norm = _positive(norm)
    fits = pred.dim() == 3 and pred.shape == target.shape and norm.shape == pred.shape[:1]
    if not fits or pred.shape[-1] != 2:
        raise ValueError(f"points {tuple(pred.shape)} and {tuple(target.shape)}, norm "
                         f"{tuple(norm.shape)}; give two (B, P, 2) of one shape and (B,)")
    return pred, target.to(pred.device), norm.to(pred.device)


def nme(pred, target, norm):
    """Normalised mean error of each image: pred, target (B, P, 2) px, norm (B,) px -> (B,). `norm`
    is the distance in the ground truth that the set prescribes, or UserError if not positive."""
    pred, target, norm = _checked(pred, target, norm)
    # Eq. (12) [SDFL], Eq. (4) [Sub-pixel landmarks]: NME = 1/N sum_i ||p_i - p^_i||_2 / d
    return (pred - target).norm(dim=-1).mean(-1) / norm


def _errors(nme, threshold):
    """Checked (B,) errors, in float32 if they are: 0.10 must equal 0.10 of its own precision."""
    nme = torch.as_tensor(nme)
    if nme.dim() != 1 or not len(nme) or not threshold > 0:
        raise ValueError(f"errors {tuple(nme.shape)}, threshold {threshold}; give (B,), B > 0, and "
                         "one above 0")
    return nme if nme.dtype == torch.float32 else nme.double()


def failure_rate(nme, threshold):
    """Share of images whose NME (B,) is above `threshold`, strictly; nan fails."""
    return (~(_errors(nme, threshold) <= threshold)).double().mean().item()


def auc(nme, threshold):
    """Area under the cumulative error distribution up to `threshold`, over `threshold`: 1 is
    perfect, nan adds 0. Exact: a step for each image, which encloses threshold - NME_i."""
    share = 1 - _errors(nme, threshold).double() / threshold
    return share.clamp(min=0).nan_to_num(0).mean().item()


def auc_steps(nme):
    """AUC at 0.10 as in SDFL's tables, to compare with those only: their code's trapezoids at
    0.005, 0.010, ..., 0.100 leave out 0 to 0.005. A perfect predictor gets 0.95."""
    nme = _errors(nme, 0.1)
    thresholds = torch.arange(1, 21).to(nme) * 0.005
    return 10 * torch.trapezoid((nme[:, None] <= thresholds).double().mean(0), dx=0.005).item()


def curve_error(pred, target, parts, norm, pred_parts=None):
    """Curve error NME_c of LDDMM-Face: the distance between point sets, whatever the numbering
    within a part.
    Args: pred, target (B, P, 2) px; parts {name: indices}; norm (B,) px; pred_parts {name:
        indices}: those of a `pred` with other points.
    Returns: {name: (B,), ..., "overall": (B,)}, overall being the plain mean of the parts.
    Source: Sec. 4, "Error Metrics". paper: "ICP error", code (CRazorback/LDDMM-Face, cb45e96):
        distances to the nearest points as they lie; we follow the code."""
    if pred_parts is None:
        pred_parts = parts
        _checked(pred, target, norm)
    pred = torch.as_tensor(pred).double()
    target = torch.as_tensor(target).double()
    norm = _positive(norm).to(pred.device)
    errors = {}
    for name, indices in parts.items():
        p = pred[:, list(pred_parts[name]), None]                                  # (B, K, 1, 2)
        t = target[:, None, list(indices)].to(pred.device)                         # (B, 1, L, 2)
        distance = (p - t).norm(dim=-1)                                            # (B, K, L)
        both_ways = torch.cat([distance.amin(2), distance.amin(1)], dim=1)
        errors[name] = both_ways.mean(1) / norm
    return errors | {"overall": torch.stack(list(errors.values())).mean(0)}


def anme(points, d):
    """Alignment normalised mean error, the scatter of aligned landmarks about their mean: 0 if all
    coincide.
    Args: points (N, S, 2) px of the deformed faces, in one frame; d: their inter-pupil distances
        (N,) px, or the mean of these."""
    points = torch.as_tensor(points).double()
    d = _positive(d).mean()
    mean = points.mean(0, keepdim=True).expand_as(points)
    # Eq. (1) [Balanced Alignment]: ANME = 1/(N|S|) sum_s sum_i ||y_i^s - ybar^s||_2 / d
    return nme(points, mean, d.expand(len(points))).mean().item()


# Colours of Okabe and Ito, RGB, that the colour-blind can tell apart.
CURVE_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233),
                 (230, 159, 0), (40, 40, 40), (140, 80, 30))


def ced_plot(errors, threshold=0.1):
    """Cumulative error distributions {name: NME (B,)}: share of images (y) with at most the NME (x)
    up to `threshold`; the legend adds AUC and failure rate. (600, 1200, 3) uint8 RGB."""
    left, top, width, height = 70, 50, 800, 480
    image = np.full((600, 1200, 3), 255, np.uint8)
    grey = (222, 222, 222)
    font = (cv2.FONT_HERSHEY_SIMPLEX, 0.5)

    def text(string, x, y, anchor=0.0):                    # anchor: the share of the text left of x
        x = round(x - anchor * cv2.getTextSize(string, *font, 1)[0][0])
        cv2.putText(image, string, (x, y), *font, (40, 40, 40), 1, cv2.LINE_AA)

    for i in range(6):
        x = left + width * i // 5
        y = top + height - height * i // 5
        cv2.line(image, (x, top), (x, top + height + 5), grey)
        cv2.line(image, (left - 5, y), (left + width, y), grey)
        text(f"{20 * threshold * i:.3g}", x, top + height + 24, 0.5)
        text(f"{20 * i}", left - 12, y + 5, 1.0)
    text("NME (%)", left + width / 2, top + height + 50, 0.5)
    text("images with at most this NME (%)", left, top - 18)

    steps = torch.arange(width + 1).double()
    for i, (name, error) in enumerate(errors.items()):
        colour = CURVE_COLOURS[i % len(CURVE_COLOURS)]
        ordered = _errors(error, threshold).double().cpu().nan_to_num(torch.inf, torch.inf)
        ordered = ordered.sort().values
        share = torch.searchsorted(ordered, steps * threshold / width, right=True) / len(ordered)
        curve = torch.stack([left + steps, top + height * (1 - share)], dim=1) * 16     # 1/16 px
        cv2.polylines(image, [curve.round().int().numpy()], False, colour, 2, cv2.LINE_AA, shift=4)
        x = left + width + 22                               # beside the axes, where no curve runs
        y = top + 24 * i + 8
        rates = f"AUC {auc(error, threshold):.3f}   FR {failure_rate(error, threshold):.1%}"
        cv2.line(image, (x, y), (x + 28, y), colour, 3)
        text(f"{name}   {rates}", x + 40, y + 5)
    return image


def _unit(embeddings, dtype=torch.float64):
    """Embeddings (..., D) of length 1, in either precision.   Raises: ValueError for nan or inf."""
    embeddings = torch.as_tensor(embeddings).detach().to(dtype)
    norm = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True, dtype=torch.float64)
    bad = int((~norm.isfinite()).sum())
    if bad:
        raise ValueError(f"{bad} of {len(embeddings)} embeddings hold nan or inf; all entries must "
                         "be finite")
    return embeddings / norm.clamp_min(1e-12).to(dtype)


def verification_accuracy(a, b, same, folds=10):
    """Mean and standard deviation over folds of the accuracy of "same person?": a, b (M, D), same
    (M,) bool. The LFW protocol: folds are consecutive blocks of pairs, each judged with the
    threshold on the squared distance of unit embeddings that is best on the others: the lowest of
    the best midpoints. The usual grid, 0 to 4 by 0.01, is too coarse for a young network."""
    a = _unit(a).cpu()
    b = _unit(b).cpu()
    same = torch.as_tensor(same).bool().cpu()
    fits = a.dim() == 2 and a.shape == b.shape and same.shape == a.shape[:1]
    if not fits or not 2 <= folds <= len(same):
        raise ValueError(f"embeddings {tuple(a.shape)}, {tuple(b.shape)}, same "
                         f"{tuple(same.shape)}, {folds} folds; give two (M, D), one (M,) and 2 <= "
                         "folds <= M")
    distance = (a - b).square().sum(1)
    accuracy = []
    for test in torch.arange(len(same)).tensor_split(folds):
        train = torch.ones_like(same).index_fill(0, test, False)
        ordered, order = distance[train].sort()
        # Accepting the n nearest pairs gains those that are the same person, and loses the others.
        gain = torch.nn.functional.pad((2.0 * same[train][order] - 1).cumsum(0), (1, 0))
        edges = torch.cat([ordered[:1] - 1, ordered, ordered[-1:] + 1])
        gain[edges[1:] == edges[:-1]] = -torch.inf          # no threshold parts equal distances
        threshold = ((edges[1:] + edges[:-1]) / 2)[gain.argmax()]
        accuracy.append(((distance[test] < threshold) == same[test]).double().mean())
    accuracy = torch.stack(accuracy)
    return accuracy.mean().item(), accuracy.std(correction=0).item()


def _checked_ids(query_ids, gallery_ids, shape, device):
    query_ids = torch.as_tensor(query_ids).to(device)
    gallery_ids = torch.as_tensor(gallery_ids).to(device)
    if (*query_ids.shape, *gallery_ids.shape) != tuple(shape):
        raise ValueError(f"ids {tuple(query_ids.shape)}, {tuple(gallery_ids.shape)} for "
                         f"{tuple(shape)} rows; give one each")
    lost = query_ids[~torch.isin(query_ids, gallery_ids)]
    if len(lost):
        raise ValueError(f"{len(lost)} of {len(query_ids)} queries have no mate in the gallery, "
                         f"first id {int(lost[0])}; keep only those of torch.isin(query_ids, "
                         "gallery_ids)")
    return query_ids, gallery_ids


def _best_mates(probe, probe_ids, gallery, gallery_ids):
    """(Q,) float64: the highest cosine of each probe, of unit rows (Q, D), with a mate."""
    order = gallery_ids.argsort()
    first = torch.searchsorted(gallery_ids[order], probe_ids)
    count = torch.searchsorted(gallery_ids[order], probe_ids, right=True) - first
    best = probe.new_full((len(probe),), -torch.inf)
    for n in range(int(count.max())):                       # the n-th mate of those that have one
        rows = (count > n).nonzero()[:, 0]
        mates = gallery[order[first[rows] + n].to(gallery.device)].to(probe.device)
        best[rows] = best[rows].maximum((probe[rows] * _unit(mates)).sum(1))
    return best


def _beaten_by(probe, best, gallery, dtype):
    """Pairs (i, j) in which row j of gallery (G, D) has no lower cosine with probe i (Q, D) than
    best (Q,). float32 settles nearly all, and what it cannot tell is settled in float64."""
    with torch.autocast(probe.device.type, enabled=False):
        cosine = probe.to(dtype) @ _unit(gallery, dtype).T
    best = best - 1e-12             # equal embeddings tie, although other sums round differently
    if dtype == torch.float64:
        return (cosine >= best[:, None]).nonzero(as_tuple=True)
    margin = (probe.shape[1] + 8) * torch.finfo(dtype).eps              # more than rounding can do
    i, j = (cosine >= (best - margin)[:, None].float()).nonzero(as_tuple=True)
    close = cosine[i, j] <= best[i] + margin
    if close.sum() > cosine.numel() // 100:                             # of a collapsed network
        return _beaten_by(probe, best, gallery, torch.float64)
    exact = (probe[i[close]] * _unit(gallery[j[close]])).sum(1)
    beaten = torch.ones_like(close)
    beaten[close] = exact >= best[i[close]]
    return i[beaten], j[beaten]


def rank_k(probe, probe_ids, gallery, gallery_ids, ks=(1, 5), chunk=2048):
    """Closed-set identification, {k: share of probes with a mate among the k rows of highest
    cosine}. Exact without sorting: the non-mates that score no less than a probe's best mate are
    counted, in blocks of chunk x chunk.
    Args: probe (Q, D), gallery (G, D); probe_ids (Q,), gallery_ids (G,) integers. Distractors:
        gallery rows whose id no probe has, as -100. The gallery may stay on the CPU.
    Raises: ValueError if a probe has no mate, as no system could find it."""
    probe = _unit(probe)
    gallery = torch.as_tensor(gallery)
    shape = (len(probe), len(gallery))
    probe_ids, gallery_ids = _checked_ids(probe_ids, gallery_ids, shape, probe.device)
    plain = probe.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    dtype = torch.float32 if plain else torch.float64       # float32 may stand for TF32 elsewhere
    ahead = torch.zeros_like(probe_ids, dtype=torch.long)
    for rows in torch.arange(len(probe), device=probe.device).split(chunk):
        best = _best_mates(probe[rows], probe_ids[rows], gallery, gallery_ids)
        for g in range(0, len(gallery), chunk):
            block = gallery[g:g + chunk].to(probe.device)
            i, j = _beaten_by(probe[rows], best, block, dtype)
            stranger = probe_ids[rows[i]] != gallery_ids[g + j]
            ahead.index_add_(0, rows[i], stranger.long())
    return {k: (ahead < k).double().mean().item() for k in ks}


def tar_at_far(scores, same, fars=(1e-5, 1e-4, 1e-3)):
    """True accept rate at false accept rates, {far: rate}: the most that any threshold gives at
    FAR <= far.
    Args: scores (M,), higher is more alike; same (M,) bool, with both kinds present. With fewer
        impostors than 1 / far the threshold lies above them all, and the rate is a lower bound."""
    scores = torch.as_tensor(scores).detach().cpu()
    scores = (scores if scores.dtype == torch.float32 else scores.double()).numpy()
    same = torch.as_tensor(same).bool().cpu().numpy()
    nan = np.isnan(scores.max(initial=-np.inf))
    if scores.ndim != 1 or scores.shape != same.shape or same.all() or not same.any() or nan:
        raise ValueError(f"scores {scores.shape}, largest {scores.max(initial=-np.inf)}, same "
                         f"{same.shape} with {int(same.sum())} True; give two (M,), no nan, and "
                         "pairs of both kinds")
    genuine = scores[same]
    impostor = scores[~same]
    count = len(impostor)
    allowed = {far: int(far * count + 1e-9) for far in fars}    # 0.29 * 100 is 28.999999999999996
    # Whoever beats impostor n (from 0) is let in with n of them at most, however many tie.
    places = {count - 1 - n for n in allowed.values() if n < count}
    impostor.partition(sorted(places))
    rates = {}
    for far, n in allowed.items():
        rates[far] = 1.0                                    # FAR 1 lets in all
        if n < count:
            rates[far] = float(np.count_nonzero(genuine > impostor[count - 1 - n]) / len(genuine))
    return rates


def retrieval(distance, query_ids, gallery_ids, ks=(1, 5, 10)):
    """Scores of a search by distance: "rank1", ..., share of queries with a mate among the k
    nearest; "map", precision at the place of each mate, averaged over a query's mates, then over
    queries; "minp", a query's number of mates over the place of its last one, averaged.
    Args: distance (Q, G), smaller is nearer; query_ids (Q,), gallery_ids (G,). No row is left out
        by camera.   Raises: ValueError if a query has no mate, or for nan."""
    distance = torch.as_tensor(distance)
    query_ids, gallery_ids = _checked_ids(query_ids, gallery_ids, distance.shape, distance.device)
    if distance.isnan().any():
        raise ValueError(f"{int(distance.isnan().sum())} distances are nan; all must be numbers")
    mate = (query_ids[:, None] == gallery_ids).byte()
    order = mate.argsort(dim=1, stable=True)            # non-mates first: in a tie they stay first
    order = order.gather(1, distance.gather(1, order).argsort(dim=1, stable=True))
    mate = mate.gather(1, order).double()               # (Q, G): 1 where the n-th nearest is one
    place = torch.arange(1, mate.shape[1] + 1, device=mate.device)
    first = place[mate.argmax(1)]
    scores = {f"rank{k}": (first <= k).double().mean().item() for k in ks}
    precision = mate.cumsum(1) / place
    scores["map"] = ((precision * mate).sum(1) / mate.sum(1)).mean().item()
    scores["minp"] = (mate.sum(1) / (mate * place).amax(1)).mean().item()
    return scores


def landmark_scores(errors, subsets, threshold):
    """"nme", "fr" and "auc" of the NME of each image (B,), as fractions; of a subset as "nme/NAME".
    Args: subsets {name: (B,) bool}, "" for all images; threshold, above which an image fails."""
    scores = {}
    for name, chosen in subsets.items():
        end = f"/{name}" if name else ""
        scores[f"nme{end}"] = float(errors[chosen].mean())
        scores[f"fr{end}"] = failure_rate(errors[chosen], threshold)
        scores[f"auc{end}"] = auc(errors[chosen], threshold)
    return scores


def landmark_table(scores, rows):
    """Scores as text: a row for each {title: name of a score}, in % if the title says so, a column
    for each subset."""
    columns = [key[2:] for key in scores if key == "fr" or key.startswith("fr/")]
    lines = [" " * 16 + "".join(f"{column[1:] or 'full':>14}" for column in columns)]
    for title, name in rows.items():
        line = f"{title:16}"
        for column in columns:
            score = scores[name + column]
            line += f"{100 * score:>14.2f}" if title.endswith("(%)") else f"{score:>14.4f}"
        lines.append(line)
    return "\n".join(lines)
