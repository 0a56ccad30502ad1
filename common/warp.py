"""Maps of the plane that align faces: similarity, affine, projective, thin-plate; on points and on images.

Points are (..., K, 2), x before y, pixel centres at whole numbers; a size is (height, width). A 2x3 matrix m
sends a point p to m[:, :2] p + m[:, 2]. Normalised coordinates are grid_sample's with align_corners=False: -1
and 1 are the edges of the image, half a pixel beyond its outer pixel centres.

Maps are computed in float64 and returned in their input's type, float32 at least. A spline's terms cancel:
at 112 px its grid is tens of pixels off in bfloat16, some thousandths in float32. Autocast and TF32 leave
float64 alone, and it costs no time here, as the matrix products are small.
"""
import functools

import torch
import torch.nn.functional as F


def _result_type(*tensors):
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def _in_float64(function):
    """Decorator: tensors go in as float64, the result comes back in their widest type, float32 at least."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        given = [*args, *kwargs.values()]
        dtype = _result_type(*(value for value in given if isinstance(value, torch.Tensor)))
        given = [value.double() if isinstance(value, torch.Tensor) else value for value in given]
        return function(*given[:len(args)], **dict(zip(kwargs, given[len(args):]))).to(dtype)
    return wrapper


def to_norm(points_px, size):
    """Pixels (..., 2) to normalised coordinates, x_norm = (2x + 1)/W - 1; `size` is (height, width)."""
    (x, y), (height, width) = points_px.unbind(-1), size
    return torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)


def to_px(points_norm, size):
    """Normalised coordinates (..., 2) to pixels, x = ((x_norm + 1) W - 1)/2; `size` is (height, width)."""
    (x, y), (height, width) = points_norm.unbind(-1), size
    return torch.stack([((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2], -1)


def pixel_centres(size, device=None):
    """The pixels of an image of `size` (height, width), row after row: (height * width, 2) px, float32."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in size)).flip(-1).float()


def _rank(points):
    """What points (..., K, 2) span, up to rounding in float32: 0 a point (or nan), 1 a line, 2 the plane."""
    mean = points.mean(-2, keepdim=True)
    x, y = (points - mean).unbind(-1)
    xx, xy, yy = (x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1)
    differ = xx + yy > 1e-12 * x.shape[-1] * mean.square().sum((-2, -1))
    return differ * (1 + (xx * yy - xy * xy > 1e-10 * (xx + yy) ** 2).int())


def check_points(points, kind):
    """Check that points determine a map: two that differ for a similarity, three not on one line for an
    affine map or a spline, no two at one place for a spline. It waits for the device: not for training steps.
    Args: points (..., K, 2), tensor or array, any unit; kind "similarity", "affine" or "spline".
    Raises: ValueError that names the first set of points that fails, and what is wrong with it."""
    points = torch.as_tensor(points).detach().double()
    if points.ndim < 2 or points.shape[-1] != 2 or points.shape[-2] == 0:
        raise ValueError(f"points have the shape {tuple(points.shape)}; give (..., K, 2) with K > 0")
    line = "three that are not on one line"
    need, want = {"similarity": (1, "two that differ"), "affine": (2, line), "spline": (2, line)}[kind]
    for index in (_rank(points) < need).nonzero()[:1].tolist():
        count = len(points[tuple(index)].unique(dim=0))
        raise ValueError(f"points{index or ''}: {points.shape[-2]} points, {count} of them distinct, do not "
                         f"determine a map ({kind}); give finite numbers, and at least {want}")
    if kind == "spline":
        distance = (points[..., :, None, :] - points[..., None, :, :]).norm(dim=-1)
        close = (distance < 1e-4 * distance.amax((-2, -1), keepdim=True)).triu(1)
        for *index, i, j in close.nonzero()[:1].tolist():
            raise ValueError(f"points{index or ''}: {i} and {j} are both at {points[(*index, i)].tolist()}; "
                             "a spline cannot send them to two places: leave one out")


def _centred_pairs(src, dst):
    if src.shape[-1] != 2 or src.shape[-2:] != dst.shape[-2:]:
        raise ValueError(f"src {tuple(src.shape)}, dst {tuple(dst.shape)}; give (..., K, 2), both the same K")
    src_mean, dst_mean = src.mean(-2, keepdim=True), dst.mean(-2, keepdim=True)
    return src_mean, src - src_mean, dst_mean, dst - dst_mean


@_in_float64
def fit_similarity(src, dst):
    """Least-squares similarity (rotation, one scale, shift; no reflection) from src to dst, (..., K, 2) each:
    (..., 2, 3). Leading dimensions broadcast. If all src points coincide, all goes to the mean of dst.
    Source: as complex numbers about their means, z src = dst has the solution z = src* dst / |src|^2."""
    src_mean, s, dst_mean, d = _centred_pairs(src, dst)
    real, imaginary = (s * d).sum((-2, -1)), (s[..., 0] * d[..., 1] - s[..., 1] * d[..., 0]).sum(-1)
    power = torch.where(_rank(src) > 0, s.square().sum((-2, -1)), torch.inf)[..., None]
    linear = (torch.stack([real, -imaginary, imaginary, real], -1) / power).unflatten(-1, (2, 2))
    return torch.cat([linear, dst_mean.mT - linear @ src_mean.mT], -1)


@_in_float64
def fit_affine(src, dst):
    """Least-squares affine map from src to dst, (..., K, 2) each: (..., 2, 3). Leading dimensions broadcast.
    If the src points are on one line, all goes to the mean of dst."""
    src_mean, s, dst_mean, d = _centred_pairs(src, dst)
    adjugate, determinant = _adjugate(s.mT @ s)
    determinant = torch.where((_rank(src) > 1)[..., None, None], determinant, torch.inf)
    linear = d.mT @ s @ adjugate / determinant
    return torch.cat([linear, dst_mean.mT - linear @ src_mean.mT], -1)


def _adjugate(matrix):
    """Of (..., 2, 2): adjugate (..., 2, 2) and determinant (..., 1, 1), whose quotient is the inverse."""
    a, b, c, d = matrix.flatten(-2).unbind(-1)
    return torch.stack([d, -b, -c, a], -1).unflatten(-1, (2, 2)), (a * d - b * c)[..., None, None]


@_in_float64
def apply_affine(m, points):
    """Points (..., K, 2) through the maps m (..., 2, 3): (..., K, 2); leading dimensions broadcast."""
    return points @ m[..., :2].mT + m[..., None, :, 2]


@_in_float64
def apply_projective(h, points):
    """Points (..., K, 2) through the maps h (..., 3, 3): (..., K, 2); not finite where the divisor is 0."""
    mapped = points @ h[..., :2].mT + h[..., None, :, 2]
    return mapped[..., :2] / mapped[..., 2:]


@_in_float64
def compose(a, b):
    """The map that applies b first, then a: (..., 2, 3) each; leading dimensions broadcast."""
    return a[..., :2] @ b + F.pad(a[..., 2:], (2, 0))


@_in_float64
def invert(m):
    """The inverse of the maps m (..., 2, 3); not finite where m is singular."""
    adjugate, determinant = _adjugate(m[..., :2])
    linear = adjugate / determinant
    return torch.cat([linear, -linear @ m[..., 2:]], -1)


def sample(image, grid, border=0.0):
    """Image (B, C, H, W) at normalised points, grid (B, h, w, 2), bilinear: (B, C, h, w), float32 at least.
    Beyond the outer pixel centres it fades within a pixel into the number `border`, cv2's BORDER_CONSTANT."""
    dtype = _result_type(image, grid)
    image = image.to(dtype) - border if border else image.to(dtype)
    sampled = F.grid_sample(image, grid.to(dtype), "bilinear", padding_mode="zeros", align_corners=False)
    return sampled + border if border else sampled


def warp_affine(image, m, size, border=0.0):
    """Image moved by the maps m: what is at p comes to m p, as by cv2.warpAffine without WARP_INVERSE_MAP.
    Args: image (B, C, H, W); m (B, 2, 3), px to px, not singular; size (height, width) of the result; border,
    the number outside the image. Returns: (B, C, height, width), float32 at least."""
    back = invert(m)[:, None, None]                                                   # (B, 1, 1, 2, 3)
    y, x = (torch.arange(n, device=back.device, dtype=back.dtype)[:, None] for n in size)
    # A sum of columns (B, 1, w, 2) and rows (B, h, 1, 2): half the time of a matrix product over all pixels.
    grid_px = back[..., 0] * x + (back[..., 1] * y[:, None] + back[..., 2])
    return sample(image, to_norm(grid_px, image.shape[-2:]), border)


class ThinPlateSpline(torch.nn.Module):
    """The smoothest map W that sends K fixed points c_k (targets) to K given ones (sources):

        W(q) = sum_k w_k U(|q - c_k|) + a + A q,   U(r) = r^2 log r,   sum_k w_k = 0,   sum_k w_k c_k^T = 0

    It leads from the targets' frame to the sources': with targets in the aligned face and sources in the
    image its grid is what `sample` wants. Coordinates are normalised: the system is ill-conditioned in px.
    Coefficients (B, K + 3, 2) hold w_1 to w_K, a and the columns of A. The buffers follow from the targets
    and are not saved. Source: Bookstein, "Principal Warps", IEEE PAMI 1989.
    Args: targets (K, 2), normalised. Raises: ValueError if two coincide or all are on one line.
    """

    def __init__(self, targets):
        super().__init__()
        targets = torch.as_tensor(targets).detach().double()
        if targets.ndim != 2:
            raise ValueError(f"targets have the shape {tuple(targets.shape)}; give (K, 2)")
        check_points(targets, "spline")
        self.register_buffer("targets", targets, persistent=False)
        basis = self._basis(targets)
        system = torch.cat([basis, F.pad(basis[:, -3:].mT, (0, 3))])  # [U P; P^T 0] [w; a; A] = [sources; 0]
        self.register_buffer("inverse", torch.linalg.inv(system)[:, :-3], persistent=False)   # (K + 3, K)
        self._pixel_basis = {}

    def _basis(self, points):
        """[U(|q - c_1|), ..., U(|q - c_K|), 1, q] of points q (..., M, 2): (..., M, K + 3)."""
        square = (points[..., None, :] - self.targets).square().sum(-1)
        # Clamped so that U and its gradient are 0 at r = 0, where xlogy and torch.where give a nan gradient.
        kernel = 0.5 * square * square.clamp_min(1e-300).log()
        return torch.cat([kernel, torch.ones_like(points[..., :1]), points], -1)

    @_in_float64
    def fit(self, sources):
        """Coefficients (B, K + 3, 2) of the splines that send the targets to sources (B, K, 2)."""
        if sources.shape[-2:] != self.targets.shape:
            raise ValueError(f"sources are {tuple(sources.shape)}; give (B, K, 2), K = {len(self.targets)}")
        return self.inverse @ sources

    @_in_float64
    def transform(self, coefficients, points):
        """Points (M, 2) or (B, M, 2) of the targets' frame, in the sources' frame: (B, M, 2)."""
        return self._basis(points) @ coefficients

    @_in_float64
    def grid(self, coefficients, size):
        """Where the pixels of an image of `size` (height, width) in the targets' frame lie in the sources':
        (B, height, width, 2). One matrix product with their basis, which is kept per size and device."""
        # Not as a buffer: DistributedDataParallel wants the same on all ranks, and rank 0 may evaluate first.
        key = (*size, self.targets.device)
        if key not in self._pixel_basis:
            with torch.inference_mode(False):           # what inference mode makes, training could not use
                centres = pixel_centres(size, self.targets.device).double()
                self._pixel_basis[key] = self._basis(to_norm(centres, size)).mT.contiguous()  # (K + 3, h * w)
        # (2B, K + 3) @ (K + 3, h * w): much faster than B products with two columns.
        flat = coefficients.mT.flatten(0, 1) @ self._pixel_basis[key]
        return flat.view(-1, 2, *size).permute(0, 2, 3, 1)

    @torch.no_grad()
    def invert_points(self, coefficients, points, start=None):
        """Points of the sources' frame, in the targets' frame: 15 steps of Newton's method from `start` and
        from the target whose source is nearest; the first counts if it converges, else the closer. Without
        folds all points converge; where the spline folds a point has several inverses, and `start` chooses.
        Args: coefficients (B, K + 3, 2); points (M, 2) or (B, M, 2); start, a guess, likewise, or None.
        Returns: points (B, M, 2), without gradient. Where Newton's method does not converge, the closest on
        the way: `transform` then misses the point by more than 1e-4 (0.006 px at 112 px).
        """
        dtype, coefficients = _result_type(coefficients, points), coefficients.double()
        points = points.double().expand(len(coefficients), -1, -1)
        sources = self.transform(coefficients, self.targets)
        guess = self.targets[(points[..., None, :] - sources[:, None]).square().sum(-1).argmin(-1)][None]
        if start is not None:
            guess = torch.cat([start.double().expand(guess.shape), guess])                # (2, B, M, 2)
        best, best_miss = guess, torch.full_like(guess[..., 0], torch.inf)
        for _ in range(16):
            error = points - self.transform(coefficients, guess)
            miss = error.norm(dim=-1)
            best = torch.where((miss < best_miss)[..., None], guess, best)
            best_miss = best_miss.fmin(miss)
            # grad U(|q - c|) = (q - c) (log |q - c|^2 + 1)
            slope = guess[..., None, :] - self.targets
            slope = slope * (slope.square().sum(-1, keepdim=True).clamp_min(1e-300).log() + 1)
            columns = [slope[..., i] @ coefficients[:, :-3] + coefficients[:, i - 2, None] for i in range(2)]
            adjugate, determinant = _adjugate(torch.stack(columns, -1))
            step = (adjugate / determinant @ error[..., None])[..., 0]
            # Of the caps 0.1 to 0.5, this one loses the fewest points where a spline folds.
            guess = guess + step * (0.3 / step.norm(dim=-1, keepdim=True).clamp_min(0.3))
        first = best_miss[0] < best_miss[-1].clamp_min(1e-4)
        return torch.where(first[..., None], best[0], best[-1]).to(dtype)
