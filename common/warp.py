"""Maps that align faces: similarity, affine, projective, thin-plate; of points and of images.

Points are (..., K, 2), x before y, pixel centres at whole numbers; a size is (height, width). A 2x3
matrix m sends a point p to m[:, :2] p + m[:, 2]. Normalised coordinates are grid_sample's with
align_corners=False: -1 and 1 are the edges of the image, half a pixel beyond its outer centres.

Maps are computed in float64 and returned in their input's type, float32 at least. A spline's terms
cancel: at 112 px its grid is tens of pixels off in bfloat16, some thousandths in float32. Autocast
and TF32 leave float64 alone, and it costs no time here, as the matrix products are small.
"""
import functools

import torch
import torch.nn.functional as F

from common import UserError


def _result_type(*tensors):
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors], torch.float32)


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def _in_float64(function):
    """Decorator: tensors go in as float64, the result has their widest type, float32 at least."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        given = (*args, *kwargs.values())
        dtype = _result_type(*(value for value in given if isinstance(value, torch.Tensor)))
        kwargs = {name: _double(value) for name, value in kwargs.items()}
        return function(*map(_double, args), **kwargs).to(dtype)
    return wrapper


def to_norm(points_px, size):
    """Pixels (..., 2) of an image of `size` to normalised coordinates, x_norm = (2x + 1)/W - 1."""
    x, y = points_px.unbind(-1)
    height, width = size
    return torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)


def to_px(points_norm, size):
    """Normalised coordinates (..., 2) to pixels, x = ((x_norm + 1) W - 1)/2."""
    x, y = points_norm.unbind(-1)
    height, width = size
    return torch.stack([((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2], -1)


def pixel_centres(size, device=None):
    """The pixels of an image of `size`, row after row: (height * width, 2) px, float32."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in size)).flip(-1).float()


def _rank(points):
    """What points (..., K, 2) span, up to float32 rounding: 0 a point (or nan), 1 a line, or 2."""
    mean = points.mean(-2, keepdim=True)
    x, y = (points - mean).unbind(-1)
    xx = (x * x).sum(-1)
    xy = (x * y).sum(-1)
    yy = (y * y).sum(-1)
    differ = xx + yy > 1e-12 * x.shape[-1] * mean.square().sum((-2, -1))
    return differ * (1 + (xx * yy - xy * xy > 1e-10 * (xx + yy) ** 2).int())


def check_points(points, kind):
    """Check that points determine a map: two that differ for a similarity, three not on one line
    for an affine map or a spline, no two at one place for a spline. It waits for the device.
    Args: points (..., K, 2), tensor or array, any unit; kind "similarity", "affine" or "spline".
    Raises: UserError that names the first set of points that fails, and what is wrong with it."""
    points = torch.as_tensor(points).detach().double()
    if points.ndim < 2 or points.shape[-1] != 2 or points.shape[-2] == 0:
        raise ValueError(f"points {tuple(points.shape)}; give (..., K, 2) with K > 0")
    need, want = (1, "two that differ") if kind == "similarity" else (2, "three not on one line")
    lost = (_rank(points) < need).nonzero().tolist()
    if lost:
        count = len(points[tuple(lost[0])].unique(dim=0))
        raise UserError(f"points{lost[0] or ''}: {points.shape[-2]} points, {count} of them "
                        f"distinct, do not determine a map ({kind}); give finite numbers, {want}")
    if kind == "spline":
        distance = (points[..., :, None, :] - points[..., None, :, :]).norm(dim=-1)
        largest = distance.amax((-2, -1), keepdim=True)
        close = (distance < 1e-4 * largest).triu(1).nonzero().tolist()
        if close:
            *index, i, j = close[0]
            place = points[(*index, i)].tolist()
            raise UserError(f"points{index or ''}: {i} and {j} are both at {place}; a spline "
                            "cannot send them to two places: leave one out")


def _centred_pairs(src, dst):
    if src.shape[-1] != 2 or src.shape[-2:] != dst.shape[-2:]:
        raise ValueError(f"src {tuple(src.shape)}, dst {tuple(dst.shape)}; give (..., K, 2), the "
                         "same K")
    src_mean = src.mean(-2, keepdim=True)
    dst_mean = dst.mean(-2, keepdim=True)
    return src_mean, src - src_mean, dst_mean, dst - dst_mean


@_in_float64
def fit_similarity(src, dst):
    """Least-squares similarity (rotation, one scale, shift; no reflection) from src to dst: two
    (..., K, 2), whose leading dimensions broadcast, to (..., 2, 3). If all src points coincide, all
    goes to the mean of dst. Of complex numbers about their means, z src = dst gives
    z = src* dst / |src|^2."""
    src_mean, s, dst_mean, d = _centred_pairs(src, dst)
    real = (s * d).sum((-2, -1))
    imaginary = (s[..., 0] * d[..., 1] - s[..., 1] * d[..., 0]).sum(-1)
    power = torch.where(_rank(src) > 0, s.square().sum((-2, -1)), torch.inf)[..., None]
    linear = (torch.stack([real, -imaginary, imaginary, real], -1) / power).unflatten(-1, (2, 2))
    return torch.cat([linear, dst_mean.mT - linear @ src_mean.mT], -1)


@_in_float64
def fit_affine(src, dst):
    """Least-squares affine map from src to dst, as `fit_similarity`. If the src points are on one
    line, all goes to the mean of dst."""
    src_mean, s, dst_mean, d = _centred_pairs(src, dst)
    adjugate, determinant = _adjugate(s.mT @ s)
    determinant = torch.where((_rank(src) > 1)[..., None, None], determinant, torch.inf)
    linear = d.mT @ s @ adjugate / determinant
    return torch.cat([linear, dst_mean.mT - linear @ src_mean.mT], -1)


def _adjugate(matrix):
    """Adjugate (..., 2, 2) and determinant (..., 1, 1); their quotient is the inverse."""
    a, b, c, d = matrix.flatten(-2).unbind(-1)
    return torch.stack([d, -b, -c, a], -1).unflatten(-1, (2, 2)), (a * d - b * c)[..., None, None]


@_in_float64
def apply_affine(m, points):
    """Points (..., K, 2) through m (..., 2, 3): (..., K, 2); leading dimensions broadcast."""
    return points @ m[..., :2].mT + m[..., None, :, 2]


@_in_float64
def apply_projective(h, points):
    """Points (..., K, 2) through h (..., 3, 3): (..., K, 2); not finite where the divisor is 0."""
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
    """Image (B, C, H, W) at normalised points, grid (B, h, w, 2), bilinear: (B, C, h, w), float32
    at least. Beyond the outer pixel centres it fades within a pixel into the number `border`."""
    dtype = _result_type(image, grid)
    image = image.to(dtype) - border if border else image.to(dtype)
    sampled = F.grid_sample(image, grid.to(dtype), "bilinear", "zeros", align_corners=False)
    return sampled + border if border else sampled


def warp_affine(image, m, size, border=0.0):
    """Image moved by the maps m: what is at p comes to m p, as by cv2.warpAffine.
    Args: image (B, C, H, W); m (B, 2, 3), px to px, not singular; size (height, width) of the
        result; border, the number outside the image.
    Returns: (B, C, height, width), float32 at least."""
    back = invert(m)[:, None, None]                                                # (B, 1, 1, 2, 3)
    y, x = (torch.arange(n, device=back.device, dtype=back.dtype)[:, None] for n in size)
    # Columns (B, 1, w, 2) and rows (B, h, 1, 2): half the time of a matrix product over all pixels.
    grid_px = back[..., 0] * x + (back[..., 1] * y[:, None] + back[..., 2])
    return sample(image, to_norm(grid_px, image.shape[-2:]), border)


class ThinPlateSpline(torch.nn.Module):
    """The smoothest map W that sends K fixed points c_k (targets) to K given ones (sources):

        W(q) = sum_k w_k U(|q - c_k|) + a + A q,  U(r) = r^2 log r,  sum_k w_k = 0,
        sum_k w_k c_k^T = 0

    It leads from the targets' frame to the sources': with targets in the aligned face and sources
    in the image its grid is what `sample` wants. Coordinates are normalised: the system is
    ill-conditioned in px. Coefficients (B, K + 3, 2) hold w_1 to w_K, a and the columns of A. The
    buffers follow from the targets and are not saved.
    Source: Bookstein, "Principal Warps", IEEE PAMI 1989.
    Args: targets (K, 2), normalised.   Raises: UserError if two coincide or all are on one line.
    """

    def __init__(self, targets):
        super().__init__()
        targets = torch.as_tensor(targets).detach().double()
        if targets.ndim != 2:
            raise ValueError(f"targets {tuple(targets.shape)}; give (K, 2)")
        check_points(targets, "spline")
        self.register_buffer("targets", targets, persistent=False)
        basis = self._basis(targets)
        # [U P; P^T 0] [w; a; A] = [sources; 0]
        system = torch.cat([basis, F.pad(basis[:, -3:].mT, (0, 3))])
        inverse = torch.linalg.inv(system)[:, :-3]                                      # (K + 3, K)
        self.register_buffer("inverse", inverse, persistent=False)
        self._pixel_basis = {}

    def _basis(self, points):
        """[U(|q - c_1|), ..., U(|q - c_K|), 1, q] of points q (..., M, 2): (..., M, K + 3)."""
        dx = points[..., :1] - self.targets[:, 0]
        dy = points[..., 1:] - self.targets[:, 1]
        square = dx * dx + dy * dy
        # Clamped so that U and its gradient are 0 at r = 0, where xlogy and torch.where give nan.
        kernel = 0.5 * square * square.clamp_min(1e-300).log()
        return torch.cat([kernel, torch.ones_like(points[..., :1]), points], -1)

    @_in_float64
    def fit(self, sources):
        """Coefficients (B, K + 3, 2) of the splines that send the targets to sources (B, K, 2)."""
        if sources.shape[-2:] != self.targets.shape:
            raise ValueError(f"sources {tuple(sources.shape)}; give (B, K, 2), "
                             f"K = {len(self.targets)}")
        return self.inverse @ sources

    @_in_float64
    def transform(self, coefficients, points):
        """Points (M, 2) or (B, M, 2) of the targets' frame, in the sources' frame: (B, M, 2)."""
        return self._basis(points) @ coefficients

    @_in_float64
    def grid(self, coefficients, size):
        """Where the pixels of an image of `size` in the targets' frame lie in the sources':
        (B, height, width, 2). One matrix product with their basis, which is kept."""
        # Not as a buffer: DistributedDataParallel wants the same on all ranks.
        key = (*size, self.targets.device)
        if key not in self._pixel_basis:
            with torch.inference_mode(False):    # what inference mode makes, training could not use
                centres = pixel_centres(size, self.targets.device).double()
                self._pixel_basis[key] = self._basis(to_norm(centres, size)).mT.contiguous()
        # (2B, K + 3) @ (K + 3, h * w): much faster than B products with two columns.
        flat = coefficients.mT.flatten(0, 1) @ self._pixel_basis[key]
        return flat.view(-1, 2, *size).permute(0, 2, 3, 1)

    @torch.no_grad()
    def invert_points(self, coefficients, points, start=None):
        """Points of the sources' frame, in the targets' frame, by Newton's method from `start`, and
        where that does not converge also from the target whose source is nearest. Without folds all
        points converge; where the spline folds a point has several inverses, and `start` chooses.
        Args: coefficients (B, K + 3, 2); points (M, 2) or (B, M, 2); start, a guess, or None.
        Returns: points (B, M, 2), without gradient. Where Newton's method does not converge, the
        closest on the way: `transform` then misses by more than 1e-4 (0.006 px at 112 px)."""
        dtype = _result_type(coefficients, points)
        coefficients = coefficients.double()
        points = points.double().expand(len(coefficients), -1, -1)
        sources = self.transform(coefficients, self.targets)
        nearest = (points[..., None, :] - sources[:, None]).square().sum(-1).argmin(-1)
        near = self.targets[nearest]                                                    # (B, M, 2)
        start = near if start is None else start.double().expand_as(points)
        # Flat from here on, so that points which have converged can be left out.
        spline = torch.arange(len(points), device=points.device).repeat_interleave(points.shape[1])
        flat = points.reshape(-1, 2)                                                    # (B M, 2)
        found, miss = self._newton(coefficients, spline, flat, start.reshape(-1, 2))
        lost = (~(miss < 1e-4)).nonzero()[:, 0]
        if start is not near and len(lost):
            again, off = self._newton(coefficients, spline[lost], flat[lost],
                                      near.reshape(-1, 2)[lost])
            found[lost] = torch.where((off <= miss[lost])[:, None], again, found[lost])
        return found.view_as(points).to(dtype)

    def _newton(self, coefficients, spline, points, guess):
        """At most 15 steps from guess (N, 2) towards points (N, 2), each of spline number `spline`
        (N,): the closest on the way (N, 2), and by how much it misses (N,)."""
        best = guess.clone()
        best_miss = torch.full_like(best[:, 0], torch.inf)
        active = torch.arange(len(best), device=best.device)    # those that have not converged
        for _ in range(16):
            value, slope = self._value_and_slope(coefficients[spline[active]], guess)
            error = points[active] - value
            miss = error.norm(dim=-1)
            better = miss < best_miss[active]
            best[active[better]] = guess[better]
            best_miss[active[better]] = miss[better]
            adjugate, determinant = _adjugate(slope)
            step = (adjugate / determinant @ error[..., None])[..., 0]
            # Of the caps 0.1 to 0.5, this one loses the fewest points where a spline folds.
            step = step * (0.3 / step.norm(dim=-1, keepdim=True).clamp_min(0.3))
            on = ~(miss < 1e-12)
            active = active[on]
            guess = (guess + step)[on]
            if not len(active):
                break
        return best, best_miss

    def _value_and_slope(self, coefficients, points):
        """W (N, 2) and its derivative (N, 2, 2), by x and by y in the columns, at points (N, 2),
        each of the spline of its own coefficients (N, K + 3, 2)."""
        dx = points[:, :1] - self.targets[:, 0]                                             # (N, K)
        dy = points[:, 1:] - self.targets[:, 1]
        square = dx * dx + dy * dy
        log = square.clamp_min(1e-300).log()
        # grad U(|q - c|) = (q - c) (log |q - c|^2 + 1)
        kernel = torch.stack([0.5 * square * log, dx * (log + 1), dy * (log + 1)], 1)    # (N, 3, K)
        bent = kernel @ coefficients[:, :-3]                                             # (N, 3, 2)
        value = bent[:, 0] + coefficients[:, -3] + (points[:, None] @ coefficients[:, -2:])[:, 0]
        return value, (bent[:, 1:] + coefficients[:, -2:]).mT
