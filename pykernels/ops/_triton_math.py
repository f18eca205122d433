"""Functions of numbers that kernels of several families need, in Triton: accurate, and the same in its interpreter.

``tl.exp`` and arithmetic are all they are made of: the interpreter has no ``log1p`` or ``tanh``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(z):
    """Within a few ulp of float32 and float64; odd, at most 1, NaN for NaN."""
    a = tl.abs(z)
    e = tl.exp(-2.0 * a)
    # 1 - e cancels for small a; there, the continued fraction with six levels, good to 5e-17.
    s = tl.where(a < 0.25, a * a, 0.0)
    small = a * (10395.0 + s * (1260.0 + s * 21.0)) / (10395.0 + s * (4725.0 + s * (210.0 + s)))
    h = tl.where(a < 0.25, small, (1.0 - e) / (1.0 + e))
    return tl.where(z < 0, -h, h)


@triton.jit
def sigmoid(z):
    e = tl.exp(-tl.abs(z))  # never overflows
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def softplus(z):
    """log(1 + exp(z)), small values with all their digits."""
    e = tl.exp(-tl.abs(z))
    # log(1 + e) = 2 artanh(s), s = e / (2 + e) at most 1/3: the series to 2e-17, since log itself loses digits at 1.
    s = e / (2.0 + e)
    square = s * s
    series = square * (1.0 / 33.0)
    for n in tl.static_range(15):
        series = square * (series + 1.0 / (31.0 - 2.0 * n))
    return tl.where(z > 0, z, 0.0) + 2.0 * (s + s * series)


@triton.jit
def expm1_of_negative(z):
    """exp(z) - 1 for z <= 0, and 0 for z > 0."""
    t = tanh(0.5 * tl.where(z > 0, 0.0, z))
    return 2.0 * t / (1.0 - t)


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr):
    """The coefficients begin with the constant one."""
    LAST: tl.constexpr = len(COEFFICIENTS) - 1
    total = x * COEFFICIENTS[LAST] + COEFFICIENTS[LAST - 1]
    for i in tl.static_range(2, LAST + 1):
        total = total * x + COEFFICIENTS[LAST - i]
    return total


@triton.jit
def exp_of_negative_square(z):
    """exp(-z^2) for z from 0 to 28; in float32 without the digits that rounding z^2, or exp of large numbers, loses."""
    if z.dtype == tl.float64:
        return tl.exp(-z * z)
    else:
        high = (z.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)  # whose square is exact
        square = high * high
        n = tl.floor(square * 1.4426950408889634 + 0.5)
        # The first part of log(2) has few enough bits that the product is exact.
        rest = square - n * 0.693145751953125 - n * 1.42860682030941723e-06
        power = tl.where(n < 160.0, tl.exp2(-n), 0.0)
        return power * tl.exp(-(rest + (z - high) * (z + high)))


@triton.jit
def error_functions(z):
    """erf(z), erfc(z) and exp(-z^2) of z >= 0: each within 1e-13 of itself in float64, within few ulp in float32."""
    z = tl.minimum(z, 28.0)  # where erfc and exp have vanished
    power = exp_of_negative_square(z)
    # erf(z) / z is a polynomial in z^2 for z up to 1/2, from there on (z + 3) exp(z^2) erfc(z) one in 7 / (z + 3) - 1,
    # which falls from 1 at 1/2 to -1 at infinity; both found by interpolation at Chebyshev's points.
    small = z < 0.5
    near = tl.where(small, z, 0.0)
    inverse = 1.0 / (z + 3.0)
    t = tl.where(small, 0.0, 7.0 * inverse - 1.0)
    if z.dtype == tl.float64:
        erf = near * polynomial(
            near * near,
            (
                1.1283791670955126,
                -0.37612638903183751,
                0.1128379167095487,
                -0.026866170645000074,
                0.0052239776220242243,
                -0.00085483265115665676,
                0.00012055286259121393,
                -1.4923005626894848e-5,
                1.6371282597755976e-6,
                -1.4621341491012843e-7,
            ),
        )
        erfc = (
            power
            * inverse
            * polynomial(
                t,
                (
                    0.95899620337542978,
                    0.62779559528062145,
                    0.34605620908993541,
                    0.15596654978029199,
                    0.054131908250087856,
                    0.012338549339293858,
                    0.00057527989540951857,
                    -0.00076311435584698234,
                    -0.00023152720673862883,
                    2.5286293582074387e-5,
                    2.7642505634051082e-5,
                    6.8580627297648468e-7,
                    -3.1782266914692842e-6,
                    -2.7801976897937259e-7,
                    4.0691743778082094e-7,
                    3.993646283757348e-8,
                    -5.7566969751046071e-8,
                    -3.5659347723728053e-9,
                    7.7497272992664353e-9,
                    3.9000546264087206e-11,
                    -6.7176347446842445e-10,
                    2.9767140469642612e-11,
                ),
            )
        )
    else:
        erf = near * polynomial(
            near * near,
            (
                1.1283791670825098,
                -0.37612638527652272,
                0.11283774077124103,
                -0.026863150185586266,
                0.0052004463963733758,
                -0.00076950566722176343,
            ),
        )
        erfc = (
            power
            * inverse
            * polynomial(
                t,
                (
                    0.95899620443078052,
                    0.62779559588607777,
                    0.34605613229120749,
                    0.15596653324573647,
                    0.054132817819018768,
                    0.012338680388840688,
                    0.00057130951094672422,
                    -0.0007635674504107655,
                    -0.00022356986351182632,
                    2.606852292559086e-5,
                    2.0000920041968416e-5,
                ),
            )
        )
    return tl.where(small, erf, 1.0 - erfc), tl.where(small, 1.0 - erf, erfc), power


@triton.jit
def arc_of(h):
    """theta / (2 sqrt(h)) for h = sin(theta / 2)^2 from 0 to 1/2, by interpolation at Chebyshev's points."""
    if h.dtype == tl.float64:
        return polynomial(
            h,
            (
                0.99999999999999993,
                0.16666666666676199,
                0.07499999997954958,
                0.044642858876352924,
                0.030381867203474289,
                0.022374245713577248,
                0.017315599544316181,
                0.014425198539078434,
                0.0074446285203378357,
                0.036758418154366294,
                -0.12408231204352452,
                0.49500658782191681,
                -1.3361380175788322,
                2.7333279687155094,
                -3.9742320066255512,
                3.9651660247789385,
                -2.4213345116985455,
                0.70527350732446059,
            ),
        )
    else:
        return polynomial(
            h,
            (
                1.000000002,
                0.1666661424,
                0.07502757316,
                0.04409161673,
                0.03581423928,
                -0.007020579152,
                0.1074000213,
                -0.1359162712,
                0.1239134949,
            ),
        )


@triton.jit
def excess_of(h):
    """(sin theta - theta cos theta) / (2 h sqrt(h)) likewise, without the cancellation of its terms."""
    if h.dtype == tl.float64:
        return polynomial(
            h,
            (
                1.3333333333333333,
                0.13333333333334071,
                0.042857142855561053,
                0.01984126997538724,
                0.011047973819713819,
                0.0068839028410148274,
                0.0046245240124302041,
                0.0033215467566209025,
                0.0021131214880823335,
                0.0039576533068629277,
                -0.0088523677593582965,
                0.039200197377767068,
                -0.10397122300928494,
                0.21454873761093943,
                -0.31229446643630443,
                0.31349899006843279,
                -0.19244609536278637,
                0.056830662962230181,
            ),
        )
    else:
        return polynomial(
            h,
            (
                1.333333331,
                0.1333338185,
                0.0428370909,
                0.02015223075,
                0.008727805972,
                0.0159874239,
                -0.01399879421,
                0.02030760938,
            ),
        )


@triton.jit
def asin(x, complement):
    """The arcsine of x from -1 to 1, ``complement`` being 1 - x^2 with all its digits."""
    inner = x * x <= 0.5
    h = tl.where(inner, x * x, tl.where(complement > 0, complement, 0.0))
    arc = arc_of(h)
    outer = 1.5707963267948966 - tl.sqrt(h) * arc
    return tl.where(inner, x * arc, tl.where(x < 0, -outer, outer))
