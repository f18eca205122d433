"""Kernels of infinitely wide networks in plain PyTorch: the definition, in a form that does not cancel.

C_0 = w_0^2 <x, y> / n + b_0^2,  C_l = w_l^2 K_phi(C_{l-1}) + b_l^2,  Theta_0 = C_0,
Theta_l = C_l + w_l^2 Theta_{l-1} K_phi'(C_{l-1}),  where K_phi(A)(x, y) = E[phi(f(x)) phi(f(y))], f ~ GP(0, A).

Instead of C(x, y) = sqrt(q r) cos(theta), with q = C(x, x) and r = C(y, y), a pair carries e = sin(theta / 2)^2 and
f = cos(theta / 2)^2: small angles, and angles close to pi, keep their digits. A layer is then a triangle on a sphere: a
point's feature vector of unit length consists of one part for each branch of the activation, of length
c = w sqrt(K_phi(q)) / sqrt(q'), and of the bias, s = b / sqrt(q'), and by the haversine formula

    e' = sum over branches of [c_x c_y e_phi + (c_x - c_y)^2 / 4] + (s_x - s_y)^2 / 4,

e_phi = (1 - K_phi(x, y) / sqrt(K_phi(x, x) K_phi(y, y))) / 2. The tangent kernel is carried as T = Theta / sqrt(q r):

    T' = 1 - 2 e' + T sum over branches of c_x c_y d_phi,   d_phi = d e_phi / d e.

c and s, the *row parameters*, belong to a point; pairs are elementwise functions of them and of e.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pykernels.ops._autograd import transforming
from pykernels.ops.ntk_gram.activations import ERF, GELU, IDENTITY, LEAKY_RELU, RBF, RELU, SIN, Branch, Options

#: Variances below this are taken for it; so is no bias of the first layer, which gives zero vectors a direction,
#: that of the bias, and gradients.
LEAST_VARIANCE = 1e-36
#: Pairs whose e or f is smaller have it from the difference or the sum of their vectors.
NEAR = 0.02
#: Of the last layers, so many may lose digits of small angles where they are smooth: more would add their losses up.
LAST = 3
_CHUNK = 1 << 22  # elements of a temporary


class BranchRows(NamedTuple):
    """Of the points, for a branch of a layer: the length of its part, and what it depends on of their variance q.

    ``first`` and ``second`` are 1 / (1 + 2 b^2 q) and sqrt(2 b^2 q / (1 + 2 b^2 q)) of erf; exp(-b^2 q) of sin and 1 /
    (1 + q) of gelu, twice.
    """

    c: Tensor
    q: Tensor
    root: Tensor  # sqrt(q)
    norm: Tensor  # sqrt(E[phi(z)^2])
    first: Tensor
    second: Tensor


class LayerRows(NamedTuple):
    branches: list[BranchRows]
    s: Tensor


class Rows(NamedTuple):
    """What the kernel depends on, of each point, but for its direction; all of the shape of the points."""

    layers: list[LayerRows]
    scale: Tensor  # sqrt(C_L(x, x))


def augment(x: Tensor, weight_std: Tensor, bias_std: Tensor) -> Tensor:
    """(w_0 x / sqrt(n), b_0): (..., N, d + 1) in float64. Their inner products are C_0."""
    x = x.double()
    bias = bias_std[0].abs().clamp_min(math.sqrt(LEAST_VARIANCE)).expand(x.shape[:-1]).unsqueeze(-1)
    return torch.cat((x * (weight_std[0] / math.sqrt(max(x.shape[-1], 1))), bias.to(x.device)), -1)


def normalized(augmented: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and squared norms."""
    largest = augmented.detach().abs().amax(-1, keepdim=True).clamp_max(1e150)  # against overflow
    q = (augmented / largest).square().sum(-1, keepdim=True) * largest * largest
    return augmented / q.sqrt(), q.squeeze(-1)


def rounded(unit: Tensor, precision: str) -> Tensor:
    """Unit vectors as the inner products are to take them."""
    if precision == "float32" or unit.dtype != torch.float32:
        return unit
    exact = unit.detach()
    if precision == "bf16":
        found = exact.bfloat16().float()
    else:
        bits = exact.view(torch.int32)  # tf32 keeps 10 bits of the mantissa; to nearest, ties to even
        found = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    return unit + (found - exact)  # with the derivatives of the exact ones


def activation_norm(branch: Branch, q: Tensor) -> Tensor:
    """sqrt(E[phi(z)^2]), z ~ N(0, q), without the offset."""
    a, b, third = branch.constants
    amplitude = abs(a)
    if branch.homogeneous:
        return amplitude * math.sqrt((1 + b * b) / 2) * q.sqrt()
    if branch.code == ERF:
        z = 2 * b * b * q
        square = 2 / math.pi * _arcsine(z / (1 + z), (1 + 2 * z) / (1 + z).square())
    elif branch.code == SIN:
        square = (1 - third) / 2 - third / 2 * torch.expm1(-2 * b * b * q)
    elif branch.code == GELU:
        square = _gelu_square(q)
    else:
        square = torch.ones_like(q)
    return amplitude * square.clamp_min(LEAST_VARIANCE).sqrt()


def _numbers(branch: Branch, q: Tensor) -> tuple[Tensor, Tensor]:
    """``first`` and ``second`` of :class:`BranchRows`."""
    b = branch.constants[1] ** 2
    if branch.code == ERF:
        z = 2 * b * q
        return 1 / (1 + z), (z / (1 + z)).sqrt()
    number = torch.exp(-b * q) if branch.code == SIN else 1 / (1 + q)
    return number, number


def rows(q: Tensor, weight_std: Tensor, bias_std: Tensor, options: Options) -> Rows:
    """From the variances q = C_0(x, x) in float64."""
    found = []
    for i, layer in enumerate(options.layers(), start=1):
        weight, bias, offset = weight_std[i].to(q.device), bias_std[i].to(q.device), options.offsets[i - 1]
        norms = [activation_norm(branch, q) for branch in layer]
        if offset > 0:
            bias = (bias * bias + weight * weight * offset).sqrt()
        following = (bias * bias + sum(weight * weight * n * n for n in norms)).clamp_min(LEAST_VARIANCE)
        root = following.sqrt()
        branches = [
            BranchRows(weight * n / root, q, q.sqrt(), n, *_numbers(branch, q))
            for branch, n in zip(layer, norms, strict=True)
        ]
        found.append(LayerRows(branches, bias / root))
        q = following
    return Rows(found, q.sqrt())


def primary(rows: Rows, options: Options) -> Tensor:
    """The row parameters that derivatives are taken of, (..., P).

    Of each layer: of each branch c and, where it is not homogeneous, log q; and s. Then the logarithm of the scale.
    """
    columns = []
    for layer, branches in zip(rows.layers, options.layers(), strict=True):
        for own, branch in zip(layer.branches, branches, strict=True):
            columns += [own.c] if branch.homogeneous else [own.c, own.q.log()]
        columns.append(layer.s)
    return torch.stack((*columns, rows.scale.log()), -1)


def map_rows(rows: Rows, function: Callable[[Tensor], Tensor]) -> Rows:
    layers = [
        LayerRows([BranchRows(*map(function, branch)) for branch in layer.branches], function(layer.s))
        for layer in rows.layers
    ]
    return Rows(layers, function(rows.scale))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, which torch.autocast would round."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def half_angles(ux: Tensor, uy: Tensor, direct: bool, exact: bool) -> tuple[Tensor, Tensor]:
    """e and f of all pairs of unit vectors (..., N, k) and (..., M, k).

    ``direct``: all from differences and sums, with a temporary (..., N, M, k); else those that need it. Not ``exact``:
    the others from inner products in any case, since the vectors are rounded.
    """
    if direct:
        difference, total = ux.unsqueeze(-2) - uy.unsqueeze(-3), ux.unsqueeze(-2) + uy.unsqueeze(-3)
        e, f = difference.square().sum(-1) / 4, total.square().sum(-1) / 4
        if not exact:
            product = (1 - _product(ux, uy.mT)) / 2
            near_e, near_f = product < NEAR, 1 - product < NEAR
            return (
                torch.where(near_e, e, torch.where(near_f, 1 - f, product)),
                torch.where(near_f, f, torch.where(near_e, 1 - e, 1 - product)),
            )
        return torch.where(e <= f, e, 1 - f), torch.where(e <= f, 1 - e, f)
    e = (1 - _product(ux, uy.mT)) / 2
    f = 1 - e
    for near, sign in ((e < NEAR, -1), (f < NEAR, 1)):
        index = near.nonzero(as_tuple=True)
        first, second = (*index[:-2], index[-2]), (*index[:-2], index[-1])
        value = (ux[first] + sign * uy[second]).square().sum(-1) / 4
        e = e.index_put(index, value if sign < 0 else 1 - value)
        f = f.index_put(index, value if sign > 0 else 1 - value)
    return e, f


def keeps_small_angles(layers: Sequence[Sequence[Branch]], i: int) -> bool:
    """Whether layer i has to: a later one has a cusp there, or many amplify what is lost, as slopes may exceed 1."""
    cusp = any(branch.code in (RELU, LEAKY_RELU) for layer in layers[i + 1 :] for branch in layer)
    return cusp or len(layers) - i > LAST


def cells(e: Tensor, f: Tensor, x: Rows, y: Rows, options: Options) -> tuple[Tensor, Tensor]:
    """Cosines C_L / sqrt(q r) and T of pairs, elementwise."""
    tangent = f - e
    rho = tangent
    layers = options.layers()
    for i, layer in enumerate(layers):
        stable = keeps_small_angles(layers, i)
        bias_difference = (x.layers[i].s - y.layers[i].s).square() / 4
        bias_total = (x.layers[i].s + y.layers[i].s).square() / 4
        next_e, next_f, slope = bias_difference, bias_total, torch.zeros_like(e)
        keeps_f = False
        for branch, bx, by in zip(layer, x.layers[i].branches, y.layers[i].branches, strict=True):
            e_phi, f_phi, d_phi = _pair(branch, e, f, bx, by, stable)
            cc = bx.c * by.c
            apart = (bx.c - by.c).square() / 4
            next_e = next_e + cc * e_phi + apart
            keeps_f = keeps_f or f_phi is not None
            next_f = next_f + cc * (1 - e_phi if f_phi is None else f_phi) + apart
            slope = slope + cc * d_phi
        if not all(branch.homogeneous for branch in layer):  # it may leave [0, 1] by rounding
            next_e = next_e.clamp(0, 1)
        # Where they differ by rounding, the smaller one is right.
        e, f = next_e, 1 - next_e
        if keeps_f:
            e, f = torch.where(next_f < 0.5, 1 - next_f, e), torch.where(next_f < 0.5, next_f, f)
        rho = f - e
        tangent = rho + tangent * slope
    return rho, tangent


def _pair(
    branch: Branch, e: Tensor, f: Tensor, x: BranchRows, y: BranchRows, stable: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """e_phi, f_phi where it keeps its digits when it is small, and d_phi."""
    if branch.code == IDENTITY:
        return e, f, torch.ones_like(e)
    if branch.homogeneous:
        e_phi, d_phi = _piecewise_linear(branch.constants[1], e, f)
        return e_phi, None, d_phi
    amplitude = branch.constants[0] ** 2
    odd = branch.code == ERF or (branch.code == SIN and branch.constants[2] == 1)
    compute = {ERF: _erf, GELU: _gelu, SIN: _sin, RBF: _rbf}[branch.code]
    e_phi, derivative = compute(branch, e, f, x, y, stable)
    f_phi = None
    if stable and odd:
        f_phi = {ERF: _erf, SIN: _sin}[branch.code](branch, f, e, x, y, stable)[0]
    return e_phi, f_phi, amplitude * derivative * (x.root / x.norm) * (y.root / y.norm)


def _half_angle(h: Tensor) -> tuple[Tensor, Tensor]:
    """theta / 2 and its sine, for h = sin(theta / 2)^2 <= 1/2.

    Points that are closer than the rounding of their unit vectors count as coincident, where the derivative, which is
    infinite, is taken for 0.
    """
    apart = h > (1e-14 if h.dtype == torch.float32 else 1e-30)
    root = torch.where(apart, torch.where(apart, h, 0.25).sqrt(), 0.0)
    return torch.asin(root), root


def _piecewise_linear(slope: float, e: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """max(z, 0) + slope min(z, 0), a mixture of the identity (``part``) and of relu.

    For relu e_phi = e - (sin theta - theta cos theta) / (2 pi), where rounding does no harm: it is of the size of eps
    theta, so of eps in the angle. Its values at theta and pi - theta differ by (e - f) / 2.
    """
    part = 2 * slope / (1 + slope * slope)
    small = e <= f
    h = torch.where(small, e, f)
    half, root = _half_angle(h)
    theta = 2 * half
    relu = h - (2 * root * (1 - h).sqrt() - theta * (1 - 2 * h)) / (2 * math.pi)
    angle = theta / math.pi
    e_phi = torch.where(small, part * h, (1 + part) / 2 - h) + (1 - part) * relu
    return e_phi, part + (1 - part) * torch.where(small, 1 - angle, angle)


def _from_distance(branch: Branch, distance: Tensor, x: BranchRows, y: BranchRows) -> Tensor:
    """e_phi from E[(phi(f(x)) - phi(f(y)))^2] / amplitude^2."""
    return (branch.constants[0] ** 2 * distance / x.norm - (x.norm - y.norm).square() / x.norm) / (4 * y.norm)


def _of_both(from_kernel: Tensor, from_distance: Tensor, x: BranchRows, y: BranchRows) -> Tensor:
    """e_phi from the one that keeps its digits: the distance of near pairs of like norms."""
    alike = (x.norm - y.norm).square() <= x.norm * y.norm
    return torch.where((from_kernel < 0.05) & alike, from_distance, from_kernel)


def _from_kernel(branch: Branch, kernel: Tensor, x: BranchRows, y: BranchRows) -> Tensor:
    """e_phi from E[phi(f(x)) phi(f(y))] / amplitude^2."""
    return (1 - branch.constants[0] ** 2 * kernel / x.norm / y.norm) / 2


def _apart(x: BranchRows, y: BranchRows, e: Tensor) -> Tensor:
    """q + r - 2 c."""
    return (x.root - y.root).square() + 4 * x.root * y.root * e


def _arcsine(x: Tensor, complement: Tensor) -> Tensor:
    """asin(x), from ``complement`` = 1 - x^2 where that is the smaller one."""
    small = x.square() <= 0.5
    near = torch.asin(torch.where(small, x, 0.0))
    far = math.pi / 2 - torch.asin(torch.where(small, 0.5, complement).sqrt())
    return torch.where(small, near, torch.where(x < 0, -far, far))


def _erf(branch: Branch, e: Tensor, f: Tensor, x: BranchRows, y: BranchRows, stable: bool) -> tuple[Tensor, Tensor]:
    """K = 2/pi asin(X), X = 2 c / sqrt((1 + 2q) (1 + 2r)): an angle once more, that of vectors with a part 1."""
    frequency = branch.constants[1] ** 2
    bx, by, lx, ly = x.first, y.first, x.second, y.second  # the squared part of the ones, and the length of the rest
    lengths = lx * ly
    complement = bx + by - bx * by + 4 * lengths * lengths * e * f  # 1 - X^2
    derivative = 4 * frequency / math.pi * (bx * by / complement).sqrt()
    from_kernel = _from_kernel(branch, 2 / math.pi * _arcsine(lengths * (f - e), complement), x, y)
    if not stable:
        return from_kernel, derivative
    # The angles eta = pi/2 - asin(X) of the pair and of each with itself, as differences: h = sin(eta / 2)^2.
    apart = (lx - ly).square() / 4 + lengths * e
    hx, hy = bx / 2, by / 2
    h = (hx + hy) / 2 + apart
    # (hy - hx) / 2; of small variances from the lengths
    own = torch.where(bx + by <= 1, by - bx, (lx - ly) * (lx + ly)) / 4

    def angle(difference: Tensor, own: Tensor) -> Tensor:
        scale = (h * (1 - own)).sqrt() + (own * (1 - h)).sqrt()
        return 2 * torch.asin((difference / scale.clamp_min(1e-30)).clamp(-1, 1))

    distance = 2 / math.pi * (angle(own + apart, hx) + angle(apart - own, hy))
    return _of_both(from_kernel, _from_distance(branch, distance, x, y), x, y), derivative


def _sin(branch: Branch, e: Tensor, f: Tensor, x: BranchRows, y: BranchRows, stable: bool) -> tuple[Tensor, Tensor]:
    """K = (U - cos(2 phase) V) / 2, U = exp(-b^2 D / 2), V = exp(-b^2 S / 2), D = q + r - 2c, S = q + r + 2c."""
    b, even = branch.constants[1] ** 2, branch.constants[2]
    sign: float | Tensor = 1.0
    if even == -1:  # the cosine does not know the sign of its argument
        sign = torch.where(e <= f, 1.0, -1.0)
        e, f = torch.where(e <= f, e, f), torch.where(e <= f, f, e)
    apart = b / 2 * _apart(x, y, e)
    u, v = torch.exp(-apart), torch.exp(-b / 2 * _apart(x, y, f))
    # px^2 + py^2 - 2 V, and V = px py exp(apart), which is exp(-b S / 2) where exp(apart) would overflow
    lost = (x.first - y.first).square() + 2 * v * torch.expm1(-apart)
    if even == 1:  # an odd function of c, of the smaller of U and V, as exp(|c|) may overflow
        c, a = f - e, 2 * b * x.root * y.root
        alike = c >= 0
        kernel = torch.where(alike, -u, v) / 2 * torch.expm1(-a * torch.where(alike, c, -c))
    else:
        kernel = (u - even * v) / 2
    from_distance = _from_distance(branch, -torch.expm1(-apart) - even / 2 * lost, x, y)
    return _of_both(_from_kernel(branch, kernel, x, y), from_distance, x, y), sign * b / 2 * (u + even * v)


def _rbf(branch: Branch, e: Tensor, f: Tensor, x: BranchRows, y: BranchRows, stable: bool) -> tuple[Tensor, Tensor]:
    """K = exp(-gamma D)."""
    gamma = branch.constants[1]
    apart = gamma * _apart(x, y, e)
    return _from_distance(branch, -2 * torch.expm1(-apart), x, y), 2 * gamma * torch.exp(-apart)


def _gelu(branch: Branch, e: Tensor, f: Tensor, x: BranchRows, y: BranchRows, stable: bool) -> tuple[Tensor, Tensor]:
    """With R = (1 + q)(1 + r) - c^2, J = 1 / (2 pi sqrt R), I = 1/4 + asin(c / sqrt((1 + q)(1 + r))) / (2 pi):

    K = c I + J [q r - c^2 + c^2 / (1 + q) + c^2 / (1 + r)], K' = I + J c [1 / (1 + q) + 1 / (1 + r) + 1 / R].
    """
    roots = x.root * y.root
    c, sines = roots * (f - e), 4 * roots * roots * e * f  # q r - c^2
    rest = 1 + x.q + y.q + sines
    j = 1 / (2 * math.pi * rest.sqrt())
    both = x.first * y.first
    i = 0.25 + _arcsine(c * both.sqrt(), rest * both) / (2 * math.pi)
    kernel = c * i + j * (sines + c * c * (x.first + y.first))
    from_kernel, derivative = _from_kernel(branch, kernel, x, y), i + j * c * (x.first + y.first + 1 / rest)
    if not stable:
        return from_kernel, derivative
    # Far pairs are taken for coincident ones: their distance is not used, but nor may its derivatives be infinite.
    e = torch.where(from_kernel < 0.05, e, 0.0)
    return _of_both(from_kernel, _from_distance(branch, _gelu_distance(e, x, y), x, y), x, y), derivative


def _gelu_distance(e: Tensor, x: BranchRows, y: BranchRows) -> Tensor:
    """K(x, x) + K(y, y) - 2 K(x, y) of near pairs, as K(x, x) + K(y, y) - 2 K' + 2 [K' - K(x, y)].

    K' is of the two points turned into one direction, c' = sqrt(q r), and the differences of each part are taken first.
    """
    a, b, both, total = x.root, y.root, x.first * y.first, x.first + y.first
    roots, step = a * b, a - b
    c, sines, lost = roots * (1 - 2 * e), 4 * roots * roots * e * (1 - e), 2 * roots * e  # lost: c' - c
    aligned = 1 + x.q + y.q
    rest, width, long = aligned + sines, (aligned + sines).sqrt(), aligned.sqrt()
    turn = _arcsine_difference(lost * both.sqrt(), roots * both.sqrt(), aligned * both, c * both.sqrt(), rest * both)
    i = math.pi / 2 + _arcsine(roots * both.sqrt(), aligned * both)  # 2 pi I'
    turned = (
        lost * i
        + c * turn
        + (total - 1) * sines / long
        + sines * (sines + c * c * total) / ((width + long) * width * long)
    )
    # In one direction K = a b g(a, b), of which again only differences are taken.

    def less(own: BranchRows, other: BranchRows, step: Tensor) -> Tensor:
        """2 pi [g(a, a) - g(a, b)]"""
        alone = 1 + 2 * own.q
        reach, other_reach = own.root * own.first.sqrt(), other.root * other.first.sqrt()
        angle = _arcsine_difference(
            reach * (reach - other_reach),
            reach * reach,
            alone * own.first.square(),
            reach * other_reach,
            aligned * both,
        )
        scale = alone.sqrt() * long * (alone.sqrt() + long)
        linear = own.root * step * (own.first + (1 - roots) * both) / long
        return angle + linear - 2 * own.q * own.first * step * (a + b) / scale

    in_norm = step.square() * (i + roots * total / long) + x.q * less(x, y, step) + y.q * less(y, x, -step)
    return (in_norm + 2 * turned) / (2 * math.pi)


def _arcsine_difference(difference: Tensor, x: Tensor, x_complement: Tensor, y: Tensor, y_complement: Tensor) -> Tensor:
    """asin(x) - asin(y) of positive numbers, from x - y and the complements 1 - x^2 and 1 - y^2."""
    scale = x * y_complement.sqrt() + y * x_complement.sqrt()
    return torch.asin((difference * (x + y) / scale.clamp_min(1e-30)).clamp(-1, 1))


def _gelu_square(q: Tensor) -> Tensor:
    """K(q, q, q)."""
    whole, rest = 1 + q, 1 + 2 * q
    i = 0.25 + _arcsine(q / whole, rest / (whole * whole)) / (2 * math.pi)
    return q * i + q * q / whole / (math.pi * rest.sqrt())


class Problem(NamedTuple):
    """The tensors of the operators: y is x where None; the scales in float64."""

    x: Tensor
    y: Tensor | None
    weight_std: Tensor
    bias_std: Tensor


def _sides(problem: Problem, options: Options) -> tuple[tuple[Tensor, Rows], tuple[Tensor, Rows]]:
    """Unit vectors, rounded as the precision says, and rows of both sides, in the dtype of x."""
    found = []
    dtype = problem.x.dtype
    for points in problem.x, problem.y:
        if points is not None:
            unit, q = normalized(augment(points, problem.weight_std, problem.bias_std))
            side = rows(q, problem.weight_std, problem.bias_std, options)
            found.append((rounded(unit.to(dtype), options.precision), map_rows(side, lambda t: t.to(dtype))))
    return found[0], found[-1]


def _direct(x: Tensor, y: Tensor) -> bool:
    compiling = torch.compiler.is_compiling()
    return compiling or transforming(x, y) or x.shape[-2] * y.shape[-2] * x.shape[-1] <= _CHUNK


def _kernels(x: tuple[Tensor, Rows], y: tuple[Tensor, Rows], options: Options) -> list[Tensor]:
    """(..., N, M): NNGP, tangent kernel, or both."""
    exact = options.precision == "float32" or x[0].dtype != torch.float32
    e, f = half_angles(x[0], y[0], _direct(x[0], y[0]), exact)
    first = map_rows(x[1], lambda t: t.unsqueeze(-1))
    second = map_rows(y[1], lambda t: t.unsqueeze(-2))
    found = cells(e, f, first, second, options)
    scale = first.scale * second.scale
    return [scale * t for t in (found if options.kind == 2 else found[options.kind : options.kind + 1])]


def gram(problem: Problem, options: Options) -> Tensor:
    """(K, ..., N, M), K = 1 or, for both kernels, 2."""
    x, y = _sides(problem, options)
    return torch.stack(_kernels(x, y, options))


def matvec(problem: Problem, v: Tensor, options: Options) -> Tensor:
    """K(x, y) v for v (..., M, p), some rows at a time: (..., N, p)."""
    (ux, rx), y = _sides(problem, options)
    n = max(1, _CHUNK // max(1, y[0].numel()))
    parts = []
    for start in range(0, max(1, ux.shape[-2]), n):
        some = (ux[..., start : start + n, :], map_rows(rx, lambda t: t[..., start : start + n]))  # noqa: B023
        parts.append(_product(_kernels(some, y, options)[0], v))
    return torch.cat(parts, -2)


def witness(problem: Problem, a: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """sum_j a_j k(x_i, y_j) and its gradient with respect to x: (..., N) and (..., N, d)."""
    other = problem.x if problem.y is None else problem.y

    def values(x: Tensor) -> Tensor:
        return matvec(Problem(x, other, *problem[2:]), a.unsqueeze(-1), options).squeeze(-1)

    value, pull = torch.func.vjp(values, problem.x)[:2]
    return value, pull(torch.ones_like(value))[0]


def diagonal(problem: Problem, options: Options) -> Tensor:
    """k(x_i, x_i): (K, ..., N)."""
    _, side = _sides(problem, options)[0]
    e = torch.zeros_like(side.scale)
    found = cells(e, 1 - e, side, side, options)
    scale = side.scale.square()
    return torch.stack([scale * t for t in (found if options.kind == 2 else found[options.kind : options.kind + 1])])
