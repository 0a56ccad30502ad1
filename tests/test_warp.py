"""common/warp.py against cv2, numpy's solvers, slow loops and closed cases."""
import cv2
import numpy as np
import pytest
import torch

from common import warp

SIZES = [(31, 44), (48, 37)]        # (height, width): odd sides, neither square


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=rng(seed), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def similarity(angle, scale, x, y):
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    return torch.tensor([[c, -s, x], [s, c, y]], dtype=torch.float64)


def affine_batch(*lead):
    """Random maps (*lead, 2, 3), far from singular."""
    noise = normal(*lead, 2, 3, seed=3)
    return torch.eye(2, 3).double() + noise * torch.tensor([0.2, 0.2, 9.0]).double()


def smooth_image(height, width, channels=2):
    """A float image without edges: sums of long waves, (1, channels, height, width)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin(x / (7 + k) + k) * torch.cos(y / (9 - k)) + 0.02 * x
             for k in range(channels)]
    return torch.stack(waves)[None]


def blob(height, width, centre, sigma=2.0):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * sigma ** 2))[None, None]


def centroid(image):
    """Centre of mass (x, y) of the part of (1, 1, H, W) above a tenth of its maximum."""
    weight = (image[0, 0] - 0.1 * image.max()).clamp_min(0).double()
    y, x = torch.meshgrid(torch.arange(weight.shape[0]), torch.arange(weight.shape[1]),
                          indexing="ij")
    return torch.stack([(weight * x).sum(), (weight * y).sum()]) / weight.sum()


def lattice(side):
    ticks = torch.linspace(-1, 1, side, dtype=torch.float64)
    return torch.tensor([[x, y] for y in ticks for x in ticks], dtype=torch.float64)


def bent(targets, batch=3, amount=0.06):
    """Smooth sources without folds, (batch, K, 2): each turned, scaled, shifted and waved."""
    sources = []
    for i in range(batch):
        m = similarity(0.2 * i - 0.3, 0.9 + 0.1 * i, 0.1 * i, -0.05)
        wave = torch.stack([torch.sin(2 * targets[:, 1] + i), torch.cos(3 * targets[:, 0] - i)], -1)
        sources.append(warp.apply_affine(m, targets) + amount * wave)
    return torch.stack(sources)


def numpy_spline(targets, sources, points):
    """One thin-plate spline by a dense solve and a loop over pairs, kernel r^2 log r: (M, 2)."""
    def kernel(p, q):
        r = np.hypot(*(p - q))
        return r * r * np.log(r) if r > 0 else 0.0
    count = len(targets)
    system, right = np.zeros((count + 3, count + 3)), np.zeros((count + 3, 2))
    for i in range(count):
        for j in range(count):
            system[i, j] = kernel(targets[i], targets[j])
        system[i, count:] = system[count:, i] = [1, *targets[i]]
    right[:count] = sources
    solution = np.linalg.solve(system, right)
    rows = np.array([[kernel(p, c) for c in targets] + [1, *p] for p in points])
    return rows @ solution, solution


# ---- Coordinates ---------------------------------------------------------------------------------

def test_normalised_coordinates_of_corners():
    # A 4 x 2 image: its edges are at -0.5 and 3.5; a pixel is half a unit wide, one unit high.
    px = torch.tensor([[0.0, 0.0], [3.0, 1.0], [-0.5, -0.5], [3.5, 1.5], [1.5, 0.5]])
    norm = torch.tensor([[-0.75, -0.5], [0.75, 0.5], [-1, -1], [1, 1], [0, 0]])
    torch.testing.assert_close(warp.to_norm(px, (2, 4)), norm)
    torch.testing.assert_close(warp.to_px(norm, (2, 4)), px)
    rows = [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert warp.pixel_centres((2, 3)).tolist() == rows


@pytest.mark.parametrize("size", SIZES)
def test_normalised_coordinates_round_trip_and_agree_with_grid_sample(size):
    points = normal(2, 3, 5, 2) * 50
    torch.testing.assert_close(warp.to_px(warp.to_norm(points, size), size), points)
    image = smooth_image(*size)
    at = torch.tensor([[3, 4], [0, 0], [size[1] - 1, size[0] - 1], [20, 7]])
    values = warp.sample(image, warp.to_norm(at.float(), size)[None, None])[0, :, 0]
    torch.testing.assert_close(values, image[0][:, at[:, 1], at[:, 0]], atol=1e-5, rtol=0)


# ---- Fits ----------------------------------------------------------------------------------------

def umeyama(src, dst):
    """Least-squares similarity by SVD, numpy (K, 2) each. Source: Umeyama, IEEE PAMI 1991, Eqs.
    (38)-(43)."""
    s, d = src - src.mean(0), dst - dst.mean(0)
    u, singular, vt = np.linalg.svd(d.T @ s / len(src))
    sign = np.array([1, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    linear = u @ np.diag(sign) @ vt * (singular * sign).sum() / s.var(0).sum()
    return np.column_stack([linear, dst.mean(0) - linear @ src.mean(0)])


@pytest.mark.parametrize("count", [2, 3, 5, 68])
@pytest.mark.parametrize("mirrored", [False, True])
def test_similarity_is_umeyamas(count, mirrored):
    src, noise = 30 * normal(2, 40, count, 2, seed=count)
    dst = warp.apply_affine(similarity(2.1, 0.7, 12, -5), src + 90) + 0.3 * noise
    if mirrored:
        dst = dst * torch.tensor([-1.0, 1.0])
    got = warp.fit_similarity(src, dst)
    for m, s, d in zip(got.numpy(), src.numpy(), dst.numpy()):
        np.testing.assert_allclose(m, umeyama(s, d), atol=1e-9)
    assert (torch.linalg.det(got[..., :2]) > 0).all()
    assert torch.equal(got[..., 0, 0], got[..., 1, 1])
    assert torch.equal(got[..., 0, 1], -got[..., 1, 0])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_similarity_finds_an_exact_one_far_from_the_origin(dtype, tolerance):
    truth = similarity(-0.8, 1.3, 40, 25)
    src = uniform(5, 2) * 60 + torch.tensor([900.0, 700.0])
    m = warp.fit_similarity(src.to(dtype), warp.apply_affine(truth, src).to(dtype))
    assert m.dtype == dtype
    torch.testing.assert_close(warp.apply_affine(m.double(), src), warp.apply_affine(truth, src),
                               atol=tolerance, rtol=0)
    # (1, 0) -> (0, 2), (0, 0) -> (0, 0): twice as large, turned from x to y
    pairs = torch.tensor([[[0, 0], [1, 0]], [[0, 0], [0, 2]]], dtype=dtype)
    m = warp.fit_similarity(*pairs).float()
    torch.testing.assert_close(m, torch.tensor([[0.0, -2.0, 0.0], [2.0, 0.0, 0.0]]))


@pytest.mark.parametrize("count", [3, 5, 20])
def test_affine_is_lstsq(count):
    src = uniform(2, 3, count, 2, seed=count) * 100 + 500
    dst = warp.apply_affine(affine_batch(2, 3), src) + torch.randn(2, 3, count, 2, generator=rng(9))
    got = warp.fit_affine(src, dst)
    assert got.shape == (2, 3, 2, 3)
    for i in range(2):
        for j in range(3):
            rows = np.column_stack([src[i, j], np.ones(count)])
            want = np.linalg.lstsq(rows, dst[i, j].numpy(), rcond=None)[0].T
            np.testing.assert_allclose(warp.apply_affine(got[i, j], src[i, j]), rows @ want.T,
                                       atol=1e-8)
            np.testing.assert_allclose(got[i, j], want, atol=1e-6)


@pytest.mark.parametrize("fit", [warp.fit_similarity, warp.fit_affine])
def test_fits_broadcast_leading_dimensions(fit):
    points = uniform(2, 3, 6, 2) * 100
    template = uniform(6, 2, seed=1) * 100
    forward, backward = fit(points, template), fit(src=template, dst=points)
    assert forward.shape == backward.shape == (2, 3, 2, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(forward[i, j], fit(points[i, j], template))
            torch.testing.assert_close(backward[i, j], fit(template, points[i, j]))


@pytest.mark.parametrize("fit, src", [
    (warp.fit_similarity, torch.full((5, 2), 33.3)),
    (warp.fit_similarity, torch.tensor([[900.1, 7.3], [900.1001, 7.3], [900.1, 7.3]])),
    (warp.fit_similarity, torch.full((1, 2), 7.0)),
    (warp.fit_affine, torch.full((5, 2), 33.3)),
    (warp.fit_affine, torch.tensor([[0.1, 700.3], [7.1, 707.3], [11.1, 711.3], [1.7, 701.9]])),
    (warp.fit_affine, torch.tensor([[0.1, 700.3], [7.1, 707.3]]))])
def test_undetermined_fit_is_constant_with_finite_gradient(fit, src):
    src = torch.stack([src, torch.rand(src.shape, generator=rng())]).requires_grad_()
    dst = torch.rand(2, *src.shape[-2:], generator=rng(1)).requires_grad_()
    m = fit(src, dst)
    mean = dst[0].detach().mean(0)
    torch.testing.assert_close(m[0].detach(), torch.cat([torch.zeros(2, 2), mean[:, None]], 1))
    m.square().sum().backward()
    assert src.grad.isfinite().all() and dst.grad.isfinite().all()


def test_check_points_accepts_what_determines_a_map():
    warp.check_points(np.array([[3.0, 4.0], [3.0, 4.5]], np.float32), "similarity")
    warp.check_points(torch.tensor([[1e-7, 0.0], [2e-7, 0.0]]), "similarity")
    warp.check_points(torch.tensor([[0.0, 0.0], [100.0, 0.0], [50.0, 0.1]]), "affine")
    warp.check_points(torch.rand(2, 3, 4, 2, generator=rng()) * 1000, "spline")
    warp.check_points(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), "affine")


@pytest.mark.parametrize("points, kind, message", [
    ([[900.1, 7.3]] * 3, "similarity",
     r"points\[1\]: 3 points, 1 of them distinct.*two that differ"),
    ([[900.1, 7.3], [900.1001, 7.3]], "similarity",
     r"points\[1\]: 2 points, 2 of .*two that differ"),
    ([[900.1, 7.3], [900.1, 7.3], [5.0, 6.0]], "affine",
     r"points\[1\]: 3 points, 2 of .*not on one line"),
    ([[0.1, 700.3], [7.1, 707.3], [11.1, 711.3]], "spline",
     r"points\[1\]: 3 points, 3 of .*not on one line"),
    ([[0.0, 0.0], [float("nan"), 1.0], [1.0, 1.0]], "affine", r"points\[1\]: .*finite"),
    ([[0.0, 0.0], [float("inf"), 1.0], [1.0, 1.0]], "similarity", r"points\[1\]: .*finite"),
    ([[2.0, 5.0]], "similarity", r"points\[0\]: 1 points, 1 of")])
def test_check_points_names_the_set_that_fails(points, kind, message):
    points = torch.tensor(points)
    sets = torch.stack([torch.rand(points.shape, generator=rng()), points])
    with pytest.raises(ValueError, match=message):
        warp.check_points(sets, kind)


def test_check_points_refuses_coincident_spline_points_and_shapes():
    square = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    with pytest.raises(ValueError, match=r"points\[0\]: 1 and 4 are both at \[1.0, 0.0\]"):
        warp.check_points(torch.tensor([square + [[1.0, 0.0]], square + [[0.5, 0.2]]]), "spline")
    for shape in [(5,), (5, 3), (2, 0, 2)]:
        with pytest.raises(ValueError, match="K > 0"):
            warp.check_points(torch.zeros(shape), "affine")
    for src, dst in (((5, 2), (1, 2)), ((5, 3), (5, 3))):
        for fit in (warp.fit_affine, warp.fit_similarity):
            with pytest.raises(ValueError, match="same K"):
                fit(torch.zeros(src), torch.zeros(dst))


# ---- Maps of points ------------------------------------------------------------------------------

def test_apply_affine_is_the_loop_and_broadcasts():
    m = affine_batch(2, 3)
    points = normal(2, 3, 4, 2) * 30
    got, shared = warp.apply_affine(m, points), warp.apply_affine(m, points[0, 0])
    for i in range(2):
        for j in range(3):
            for k in range(4):
                a, (x, y) = m[i, j], points[i, j, k]
                want = torch.stack([a[0, 0] * x + a[0, 1] * y + a[0, 2],
                                    a[1, 0] * x + a[1, 1] * y + a[1, 2]])
                torch.testing.assert_close(got[i, j, k], want)
            torch.testing.assert_close(shared[i, j], warp.apply_affine(m[i, j], points[0, 0]))


def test_compose_and_invert_are_those_of_matrices():
    a, b = affine_batch(2, 3), affine_batch(2, 3).flip(0, 1)
    bottom = torch.tensor([0.0, 0, 1], dtype=torch.float64).expand(2, 3, 1, 3)
    full_a, full_b = torch.cat([a, bottom], -2), torch.cat([b, bottom], -2)
    torch.testing.assert_close(warp.compose(a, b), (full_a @ full_b)[..., :2, :])
    torch.testing.assert_close(warp.invert(a), torch.linalg.inv(full_a)[..., :2, :])
    shift, double = torch.tensor([[1.0, 0, 5], [0, 1, 0]]), torch.tensor([[2.0, 0, 0], [0, 2, 0]])
    torch.testing.assert_close(warp.compose(double, shift), torch.tensor([[2.0, 0, 10], [0, 2, 0]]))
    torch.testing.assert_close(warp.compose(shift, double), torch.tensor([[2.0, 0, 5], [0, 2, 0]]))


def test_apply_projective_is_cv2s():
    h = torch.tensor([[1.1, 0.1, 3], [-0.2, 0.9, 5], [0.001, -0.002, 1]], dtype=torch.float64)
    points = uniform(3, 7, 2) * 100
    want = cv2.perspectiveTransform(points.numpy(), h.numpy())
    np.testing.assert_allclose(warp.apply_projective(h.expand(3, 3, 3), points), want, atol=1e-10)
    np.testing.assert_allclose(warp.apply_projective(h, points), want, atol=1e-10)


# ---- Images --------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", SIZES)
def test_identity_and_whole_pixel_shifts(size):
    image = torch.rand(2, 3, *size, generator=rng())
    eye = torch.eye(2, 3).expand(2, 2, 3)
    torch.testing.assert_close(warp.warp_affine(image, eye, size), image, atol=2e-5, rtol=0)
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        flat = torch.full((2, 1, *size), 200, dtype=dtype)
        warped = warp.warp_affine(flat, eye, size, border=0.5)
        assert warped.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (warped - 200).abs().max() < 0.01
    # one to the right, two down: the second image two to the left
    m = torch.tensor([[[1.0, 0, 1], [0, 1, 2]], [[1.0, 0, -2], [0, 1, 0]]])
    moved = warp.warp_affine(image, m, size, border=0.25)
    torch.testing.assert_close(moved[0, :, 2:, 1:], image[0, :, :-2, :-1], atol=2e-5, rtol=0)
    torch.testing.assert_close(moved[1, :, :, :-2], image[1, :, :, 2:], atol=2e-5, rtol=0)
    for uncovered in (moved[0, :, :2], moved[0, :, :, :1], moved[1, :, :, -2:]):
        torch.testing.assert_close(uncovered, torch.full_like(uncovered, 0.25), atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("border", [0.0, 0.7])
@pytest.mark.parametrize("m", [
    similarity(0, 1, 3.25, -2.5), similarity(0.4, 1, 4, -6), similarity(-1.2, 0.8, 2, 30),
    similarity(0.1, 1.7, -20, -10), affine_batch(1)[0]])
def test_warp_affine_is_cv2s(size, border, m):
    image = smooth_image(53, 40)
    pixels = image[0].permute(1, 2, 0).contiguous().numpy()
    want = cv2.warpAffine(pixels, m.numpy(), size[::-1], flags=cv2.INTER_LINEAR,
                          borderMode=cv2.BORDER_CONSTANT, borderValue=(border, border))
    got = warp.warp_affine(image, m[None], size, border=border)[0].permute(1, 2, 0)
    assert got.shape == want.shape
    # cv2 rounds coordinates to 1/32 px: an error of up to 1/64 of the slope, which is steep at the
    # border.
    np.testing.assert_allclose(got, want, atol=0.04)
    inside = warp.warp_affine(torch.ones(1, 1, 53, 40), m[None], size)[0, 0] > 0.999
    np.testing.assert_allclose(got[inside], want[inside], atol=0.004)


@pytest.mark.parametrize("m",
                         [similarity(0.5, 1.0, 12.3, -7.1), similarity(-0.9, 1.4, -10.0, 30.4)])
def test_points_follow_the_image(m):
    p = torch.tensor([[25.3, 22.6]], dtype=torch.float64)
    image = blob(50, 45, p[0])
    moved = warp.warp_affine(image, m[None].float(), (64, 72))
    torch.testing.assert_close(centroid(moved), warp.apply_affine(m, p)[0], atol=0.05, rtol=0)


# ---- Thin-plate spline ---------------------------------------------------------------------------

@pytest.mark.parametrize("targets",
                         [lattice(2), lattice(4), torch.rand(30, 2, generator=rng(5)) * 2 - 1])
def test_spline_is_the_dense_solution(targets):
    targets = targets.double()
    spline = warp.ThinPlateSpline(targets)
    sources = bent(targets) + 0.1 * torch.randn(3, len(targets), 2, generator=rng())
    points = uniform(20, 2, seed=1) * 3 - 1.5
    coefficients = spline.fit(sources)
    moved, own = spline.transform(coefficients, points), spline.transform(coefficients, targets)
    for i in range(3):
        want, solution = numpy_spline(targets.numpy(), sources[i].numpy(), points.numpy())
        np.testing.assert_allclose(moved[i], want, atol=1e-9)
        np.testing.assert_allclose(coefficients[i], solution, atol=1e-8)
    torch.testing.assert_close(own, sources, atol=1e-10, rtol=0)
    batched = torch.stack([points, points.flip(0), points + 0.1])
    torch.testing.assert_close(spline.transform(coefficients, batched)[1], moved[1].flip(0))


def test_spline_of_an_affine_map_has_no_bend():
    targets, m = lattice(5), affine_batch(4) * torch.tensor([1, 1, 0.02])
    spline = warp.ThinPlateSpline(targets)
    coefficients = spline.fit(warp.apply_affine(m, targets))
    assert coefficients[:, :25].abs().max() < 1e-12
    torch.testing.assert_close(coefficients[:, 25:], m.mT[:, [2, 0, 1]])        # a, A's columns
    points = normal(9, 2)
    torch.testing.assert_close(spline.transform(coefficients, points), warp.apply_affine(m, points))


@pytest.mark.parametrize("size", SIZES)
def test_spline_grid_is_the_transform_of_pixel_centres(size):
    targets = lattice(4)
    spline = warp.ThinPlateSpline(targets)
    coefficients = spline.fit(bent(targets))
    centres = torch.tensor([[x, y] for y in range(size[0]) for x in range(size[1])],
                           dtype=torch.float64)
    want = spline.transform(coefficients, warp.to_norm(centres, size)).view(3, *size, 2)
    for _ in range(2):                                               # made, then found in the cache
        torch.testing.assert_close(spline.grid(coefficients, size), want)
    single = spline.grid(coefficients.float(), size)
    assert single.dtype == torch.float32 and spline.grid(coefficients, (7, 5)).shape == (3, 7, 5, 2)
    torch.testing.assert_close(single.double(), want, atol=2e-6, rtol=0)
    unmoved = spline.grid(spline.fit(targets[None].float()), size)[0].reshape(-1, 2)
    torch.testing.assert_close(unmoved, warp.to_norm(centres, size).float(), atol=1e-6, rtol=0)


def test_spline_grid_moves_images_as_its_transform_moves_points():
    targets = lattice(8)
    spline = warp.ThinPlateSpline(targets)
    coefficients = spline.fit(bent(targets, 1, 0.04))
    aligned = torch.tensor([[40.7, 30.2]], dtype=torch.float64)
    source = warp.to_px(spline.transform(coefficients, warp.to_norm(aligned, (70, 80))), (90, 100))
    moved = warp.sample(blob(90, 100, source[0, 0]), spline.grid(coefficients, (70, 80)))
    torch.testing.assert_close(centroid(moved), aligned[0], atol=0.1, rtol=0)


@pytest.mark.parametrize("start", [None, "near", "far"])
def test_spline_inverse_round_trip(start):
    targets = lattice(8)
    spline = warp.ThinPlateSpline(targets)
    coefficients = spline.fit(bent(targets, 4, amount=0.15))
    points = uniform(4, 50, 2) * 2.4 - 1.2
    guess = {None: None, "near": points + 0.1, "far": torch.full((50, 2), 40.0)}[start]
    back = spline.invert_points(coefficients, spline.transform(coefficients, points), guess)
    assert back.shape == (4, 50, 2) and not back.requires_grad
    torch.testing.assert_close(back, points, atol=1e-12, rtol=0)
    single = spline.invert_points(coefficients.float(), points[0].float())      # (M, 2) for all
    assert single.dtype == torch.float32 and single.shape == (4, 50, 2)


def test_spline_inverse_on_a_fold_follows_the_start():
    # The middle column of targets is drawn beyond the right one: x goes up, then down again.
    targets = lattice(3)
    spline = warp.ThinPlateSpline(targets)
    coefficients = spline.fit((targets
                               + torch.tensor([[0.0, 0], [1.6, 0], [0, 0]]).repeat(3, 1))[None])
    line = torch.stack([torch.linspace(-1, 1, 201), torch.zeros(201)], -1).double()
    x = spline.transform(coefficients, line)[0, :, 0]
    top = int(x.argmax())
    branches = line[[top - 40, top + int((x[top:] - x[top - 40]).abs().argmin())]]
    assert branches[1, 0] - branches[0, 0] > 0.5
    for branch in branches:
        point = spline.transform(coefficients, branch[None])
        back = spline.invert_points(coefficients, point, branch[None] + 0.02)
        torch.testing.assert_close(back[0, 0], branch, atol=1e-9, rtol=0)


def test_spline_inverse_where_there_is_none_stays_finite_and_shows_it():
    targets = lattice(3)
    spline = warp.ThinPlateSpline(targets)
    # The second spline sends everything to the origin: only that has an inverse, any point.
    coefficients = spline.fit(torch.stack([targets, 0 * targets]))
    points = torch.tensor([[0.5, 0.0], [0.0, 0.0]], dtype=torch.float64)
    for start in (None, points):
        back = spline.invert_points(coefficients, points, start)
        miss = (spline.transform(coefficients, back) - points).norm(dim=-1)
        assert (miss < 1e-4).tolist() == [[True, True], [False, True]]
        assert back.isfinite().all()


SPLINE = warp.ThinPlateSpline(lattice(2))
SIMILARITIES = torch.stack([similarity(0.3, 1.1, 0.4, 0.3), similarity(-0.2, 0.9, 0.21, -0.37)])
IMAGES = uniform(2, 1, 5, 6, seed=1)


@pytest.mark.parametrize("function, inputs", [
    (warp.fit_similarity, (uniform(2, 4, 2), uniform(2, 4, 2, seed=1))),
    (warp.fit_affine, (uniform(2, 4, 2), uniform(2, 4, 2, seed=1))),
    (lambda m, p: warp.apply_affine(warp.compose(warp.invert(m), m[0]), p),
     (affine_batch(2), uniform(2, 4, 2))),
    (warp.apply_projective, (torch.eye(3).double() + 0.1 * uniform(3, 3, seed=2),
                             uniform(2, 4, 2))),
    (lambda image, m: warp.warp_affine(image, m, (4, 5), border=0.3), (IMAGES, SIMILARITIES)),
    (lambda s, p: SPLINE.transform(SPLINE.fit(s), p), (bent(lattice(2), 2, 0.2), uniform(3, 2))),
    (lambda image, s: warp.sample(image, SPLINE.grid(SPLINE.fit(s), (4, 3))),
     (IMAGES, bent(lattice(2), 2, 0.2)))])
def test_gradients(function, inputs):
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in inputs])


def test_spline_gradient_at_its_own_targets():
    """At r = 0 the kernel's gradient is 0, so W's is what differences on either side give."""
    targets = lattice(3)
    spline = warp.ThinPlateSpline(targets)
    coefficients = spline.fit(bent(targets, 1))
    points = targets.clone().requires_grad_()
    spline.transform(coefficients, points)[..., 0].sum().backward()
    step = torch.tensor([1e-5, 0.0], dtype=torch.float64)
    both = spline.transform(coefficients, torch.cat([targets + step, targets - step]))[0, :, 0]
    torch.testing.assert_close(points.grad[:, 0], (both[:9] - both[9:]) / 2e-5, atol=1e-3, rtol=0)
    assert points.grad.isfinite().all()


def test_everything_keeps_its_precision_under_autocast():
    points = torch.rand(3, 64, 2, generator=rng()) * 100
    m = affine_batch(3).float()
    spline = warp.ThinPlateSpline(lattice(8))
    sources = (lattice(8) + 0.05 * torch.randn(3, 64, 2, generator=rng())).float()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            fitted = warp.fit_affine(points, warp.apply_affine(m, points))
            image = warp.warp_affine(smooth_image(20, 30).expand(3, 2, 20, 30), fitted, (20, 20))
            w = spline.fit(sources)
            results.append([fitted, warp.compose(m, fitted), warp.invert(m), image, w,
                            spline.transform(w, lattice(8).float()), spline.grid(w, (9, 9)),
                            spline.invert_points(w, sources, lattice(8).float())])
    for plain, autocast in zip(*results):
        assert autocast.dtype == torch.float32 and torch.equal(plain, autocast)
    torch.testing.assert_close(results[1][5], sources, atol=1e-5, rtol=0)
    torch.testing.assert_close(results[1][7], lattice(8).float().expand(3, 64, 2), atol=1e-4,
                               rtol=0)
    assert warp.apply_affine(m.bfloat16(), points.bfloat16()).dtype == torch.float32


def test_spline_grid_made_in_inference_serves_training_and_nothing_is_saved():
    spline = warp.ThinPlateSpline(lattice(3))
    sources = bent(lattice(3)).requires_grad_()
    with torch.inference_mode():
        spline.grid(spline.fit(sources), (6, 7))
    spline.grid(spline.fit(sources), (6, 7)).square().sum().backward()
    assert sources.grad.abs().sum() > 0
    assert not spline.state_dict()


def test_spline_grid_keeps_little_for_the_way_back():
    spline, kept = warp.ThinPlateSpline(lattice(8)), {}
    sources = bent(lattice(8), 32).float().requires_grad_()

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        spline.grid(spline.fit(sources), (112, 112))
    assert sum(kept.values()) < 10e6


@pytest.mark.parametrize("targets, message", [
    (lattice(2)[[0, 1, 2, 3, 1]], "1 and 4 are both at"),
    (torch.tensor([[-1.0, -1], [0, 0], [0.5, 0.5], [1, 1]]), "not on one line"),
    (torch.tensor([[0.0, 0], [1, 0]]), "2 points, 2 of them distinct.*not on one line"),
    (lattice(2)[None], "give .K, 2.")])
def test_spline_refuses_targets_that_determine_none(targets, message):
    with pytest.raises(ValueError, match=message):
        warp.ThinPlateSpline(targets)
    with pytest.raises(ValueError, match="K = 9"):
        warp.ThinPlateSpline(lattice(3)).fit(torch.zeros(2, 8, 2))
