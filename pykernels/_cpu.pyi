_Shape = tuple[int, ...]
_Sequences = tuple[int, int, int]

def capabilities() -> list[str]: ...
def capability() -> str: ...
def set_capability(name: str) -> None: ...
def has_openmp() -> bool: ...
def causal_conv1d_forward(
    is_double: bool,
    x_shape: _Shape,
    weight_shape: _Shape,
    dilation: int,
    groups: int,
    sequences: _Sequences,
    x: int,
    x_strides: _Shape,
    weight: int,
    bias: int,
    residual: int,
    residual_strides: _Shape,
    state: int,
    state_strides: _Shape,
    y: int,
    saved: int,
    pool: tuple[int, int, int],
    activation: int,
    negative_slope: float,
    residual_before_activation: bool,
    threads: int,
    /,
) -> None: ...
def causal_conv1d_backward(
    is_double: bool,
    x_shape: _Shape,
    weight_shape: _Shape,
    dilation: int,
    groups: int,
    sequences: _Sequences,
    grad_y: int,
    grad_y_strides: _Shape,
    saved: int,
    saved_strides: _Shape,
    x: int,
    x_strides: _Shape,
    weight: int,
    addend: int,
    addend_strides: _Shape,
    grad_x: int,
    grad_weight: int,
    grad_bias: int,
    activation: int,
    negative_slope: float,
    threads: int,
    /,
) -> None: ...
def causal_conv1d_backward_at(
    is_double: bool,
    x_shape: _Shape,
    weight_shape: _Shape,
    dilation: int,
    sequences: _Sequences,
    dz: int,
    time: int,
    x: int,
    x_strides: _Shape,
    weight: int,
    grad_x: int,
    grad_weight: int,
    threads: int,
    /,
) -> None: ...

_ConvRecord = tuple[tuple[int, int, int, int, int], tuple[int, int, int], int, float, bool]

def causal_conv1d_step(
    is_double: bool,
    record: _ConvRecord,
    batch: int,
    time: int,
    x: int,
    x_stride: int,
    residual: int,
    residual_stride: int,
    y: int,
    threads: int,
    /,
) -> None: ...

class StreamFloat:
    def __init__(self, layers: list[tuple[_ConvRecord, int, int, int]], head: _ConvRecord, batch: int, /) -> None: ...
    def run(
        self, time: int, steps: int, x: int, strides: _Shape, maximum: int, features: int, threads: int, /
    ) -> None: ...

class StreamDouble(StreamFloat): ...

def weight_norm_forward(is_double: bool, records: list[tuple[int, int, int, int, int]], threads: int, /) -> None: ...
def weight_norm_backward(
    is_double: bool, records: list[tuple[int, int, int, int, int, int, int]], threads: int, /
) -> None: ...
def ode_combine(
    is_double: bool, n: int, y: int, k: list[int], coefficients: list[float], out: int, threads: int, /
) -> None: ...
def ode_combine_backward(
    is_double: bool, n: int, grad: int, coefficients: list[float], grad_k: list[int], threads: int, /
) -> None: ...
def flow_penalties_float(
    batch: int,
    sizes: _Shape,
    flow: int,
    xy: bool,
    coefficients: tuple[float, float, float],
    values: int,
    threads: int,
    /,
) -> None: ...
def flow_penalties_backward_float(
    batch: int,
    sizes: _Shape,
    flow: int,
    xy: bool,
    coefficients: tuple[float, float, float],
    grads: int,
    grad_flow: int,
    threads: int,
    /,
) -> None: ...

flow_penalties_double = flow_penalties_float
flow_penalties_backward_double = flow_penalties_backward_float

def gaussian_warp_forward_float(
    sizes: list[int],
    strides: list[int],
    arrays: tuple[int, int, int, int, int],
    value: float,
    scale: list[float],
    varies: bool,
    /,
) -> None: ...
def gaussian_warp_backward_float(
    sizes: list[int],
    strides: list[int],
    arrays: tuple[int, int, int, int, int],
    value: float,
    scale: list[float],
    varies: bool,
    gradients: tuple[int, int, int, int],
    /,
) -> None: ...

gaussian_warp_forward_double = gaussian_warp_forward_float
gaussian_warp_backward_double = gaussian_warp_backward_float

class NtkNetwork:
    def __init__(
        self,
        counts: list[int],
        codes: list[int],
        constants: list[float],
        offsets: list[float],
        weight_std: list[float],
        bias_std: list[float],
        /,
    ) -> None: ...

_NtkSizes = tuple[int, int, int, int, int, int, int]
_NtkPoints = tuple[int, int, int, int, int, int]

def ntk_gram_float(network: NtkNetwork, sizes: _NtkSizes, points: _NtkPoints, result: int, /) -> None: ...
def ntk_matvec_float(
    network: NtkNetwork, sizes: _NtkSizes, points: _NtkPoints, v: int, columns: int, product: int, /
) -> None: ...
def ntk_witness_float(
    network: NtkNetwork,
    sizes: _NtkSizes,
    points: _NtkPoints,
    columns: int,
    dense_stride: tuple[int, ...],
    arrays: list[int],
    /,
) -> None: ...

ntk_gram_double = ntk_gram_float
ntk_matvec_double = ntk_matvec_float
ntk_witness_double = ntk_witness_float
