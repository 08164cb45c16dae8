# SPDX-License-Identifier: Apache-2.0
"""The plan of a call of `linear`: which kernels run, in how many custom calls, and why.

`plan` is a pure function and its result a value: `cuda` carries it out, the bench reads it, and
`explain` gives it to the user.
"""

import dataclasses
import math

from jax_nvfp4.activations import GeGLU, SwiGLU
from jax_nvfp4.config import REFERENCE, Gate, GemmConfig, GemmProblem, OutFormat, Scaling
from jax_nvfp4.config.gemm.select import rule_for
from jax_nvfp4.config.limits import Limits
from jax_nvfp4.layout.orders import order
from jax_nvfp4.ops.linear.spec import LinearSpec
from jax_nvfp4.ops.quantize.plan import QuantizePlan
from jax_nvfp4.ops.quantize.plan import plan as plan_quantize

ONE_CALL_ELEMENTS = 1 << 19
"""Elements of x up to which one custom call quantizes and multiplies.

One call saves about 0.7 us, since its second kernel starts while the first runs. Two can save the
first: XLA merges equal calls, so that layers that share x, as those of q, k and v do, quantize it
once. Up to here a quantization takes 2.5 us or less, and for the layers of a transformer, seven
with four different x, one call is worth more than or about as much as two. The result is the same
bit for bit.
"""

_SCALINGS = {
    Scaling.NONE: "16-bit x",
    Scaling.TOKEN: "x quantized per token",
    Scaling.TENSOR: "x quantized per tensor",
    Scaling.STATIC: "x quantized with a static scale",
    Scaling.AMAX: "x quantized with an amax that is given",
}


@dataclasses.dataclass(frozen=True)
class LinearPlan:
    """The kernels that a call of `linear` runs, and why; its `str` is for people.

    Attributes:
        spec: what is static in the call.
        m: rows of x, all its leading axes together.
        x_dtype: name of x's dtype.
        arch: whose kernels run; "reference": XLA runs the pure-JAX implementation.
        num_sms: multiprocessors that it is planned for.
        gemm: the GEMM kernel; None where XLA multiplies.
        split_k: in how many parts the kernel splits K.
        quantize: the kernel that quantizes x, if one does.
        one_call: both kernels are one custom call.
        reason: why, in sentences.
    """

    spec: LinearSpec
    m: int
    x_dtype: str
    arch: str
    num_sms: int
    reason: str
    gemm: GemmConfig | None = None
    split_k: int = 1
    quantize: QuantizePlan | None = None
    one_call: bool = False

    @property
    def calls(self) -> int:
        """The number of custom calls."""
        if self.gemm is None:
            return 0
        return 1 if self.quantize is None or self.one_call else 2

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the kernels, in the order in which they run."""
        quantize = () if self.quantize is None else (self.quantize.config.name,)
        return quantize if self.gemm is None else (*quantize, self.gemm.name)

    @property
    def gate(self) -> Gate | None:
        """The activation in the GEMM's epilogue, if it is there."""
        if self.gemm is None or self.gemm.epilogue != "gated":
            return None
        if isinstance(self.spec.activation, GeGLU):
            # (1 + tanh(z)) / 2 = sigmoid(2 * z)
            alpha = 2 * math.sqrt(2 / math.pi)
            return Gate(alpha=alpha, cubic=alpha * 0.044715)
        assert isinstance(self.spec.activation, SwiGLU)
        of = self.spec.activation
        return Gate(math.inf if of.limit is None else of.limit, of.alpha, 0.0, of.beta)

    @property
    def gemm_n(self) -> int:
        """The rows of the weight as the GEMM counts them.

        To a kernel without the activation, a gated weight is a plain one with its padding.
        """
        return self.spec.n if self.gate is not None else _rows(self.spec, self.arch)

    @property
    def gemm_out_dtype(self) -> str:
        """The dtype in which the GEMM leaves its result: float32 for the activation."""
        return "float32" if self.activation_by_xla else self.spec.out_dtype

    @property
    def activation_by_xla(self) -> bool:
        """XLA applies the activation, if there is one, to the GEMM's float32 result."""
        return self.spec.activation is not None and self.gate is None

    @property
    def gemm_x_dtype(self) -> str:
        """The element type of the x that the GEMM kernel reads."""
        return operand_dtype(self.spec, self.x_dtype, self.arch)

    def __str__(self) -> str:
        spec = self.spec
        lines = [
            f"linear of x ({self.m}, {spec.k}) {self.x_dtype} and a weight ({spec.n}, {spec.k}), "
            f"{_SCALINGS[spec.scaling]}{', batch-invariant' if spec.batch_invariant else ''}"
        ]
        if spec.activation is not None:
            lines[0] += f", {spec.activation}"
        if self.gemm is None:
            lines.append("runs as XLA's own operations, without custom calls")
        else:
            count = "1 custom call" if self.calls == 1 else f"{self.calls} custom calls"
            lines.append(f"runs on {self.arch} in {count}: {' and '.join(self.kernels)}")
            lines.append(f"K is split in {self.split_k}" if self.split_k > 1 else "K is not split")
        return "\n".join((*lines, f"why: {self.reason}"))


def _rows(spec: LinearSpec, arch: str) -> int:
    return order(arch).gated.rows(spec.n) if spec.gated else spec.n


def operand_dtype(spec: LinearSpec, x_dtype: str, arch: str) -> str:
    """The element type of x that the GEMM of `arch` reads."""
    if spec.scaling == Scaling.NONE:
        return "float16" if x_dtype == "float16" else "bfloat16"
    return order(arch).x_dtype


def plan(
    spec: LinearSpec,
    m: int,
    x_dtype: str,
    *,
    arch: str,
    limits: Limits,
    per_row: bool = False,
    groups: int = 0,
) -> LinearPlan:
    """Decides what a call runs.

    Args:
        spec: what is static in the call.
        m: rows of x.
        x_dtype: name of x's dtype.
        arch: whose kernels there are: a name of `ARCHES`, or "reference" where there are none.
        limits: of the device.
        per_row: the scale or amax of x that is given, if any, is one for each row.
        groups: into how many groups the rows of x are divided, each with a weight of its own; 0:
            they are not.

    Returns:
        The plan. It is for the reference where no kernel serves the call.
    """

    def by_xla(reason: str) -> LinearPlan:
        return LinearPlan(spec, m, x_dtype, REFERENCE, limits.num_sms, reason)

    if arch == REFERENCE:
        return by_xla("There are no kernels for this device.")
    if 0 in (m, spec.n, spec.k):
        return by_xla("There is nothing to multiply.")
    gemm_dtype = operand_dtype(spec, x_dtype, arch)
    padded_k = order(arch).padded_k(spec.k)
    n = _rows(spec, arch)
    plain = GemmProblem(m, n, padded_k, arch, gemm_dtype, spec.batch_invariant, groups=groups)
    problem, rule = plain, None
    if spec.gated and spec.activation is not None:
        problem = dataclasses.replace(plain, epilogue="gated")
        rule = rule_for(problem, limits.num_sms, limits.unusable)
    if rule is None:
        problem, rule = plain, rule_for(plain, limits.num_sms, limits.unusable)
    if rule is None and groups:
        return by_xla(f"There is no kernel for groups of rows on {arch}.")
    if rule is None:
        return by_xla(
            f"No kernel for {gemm_dtype} x of {m} rows is ahead of XLA's dot of the dequantized "
            f"weight on {arch}, whose tensor cores multiply 4-bit by 4-bit operands."
        )
    why_gemm = _sentence(rule.reason)
    if spec.activation is not None and rule.config.epilogue == "gated":
        why_gemm += " The activation is in the kernel's epilogue."
    elif spec.activation is not None:
        why_gemm += (
            " The kernel leaves its sums in float32 and XLA applies the activation: no kernel for "
            "this call has it in its epilogue."
        )
    chosen = LinearPlan(
        spec,
        m,
        x_dtype,
        arch,
        limits.num_sms,
        why_gemm,
        gemm=rule.config,
        split_k=rule.split_k(problem, limits.num_sms),
    )
    if spec.scaling == Scaling.NONE:
        return chosen
    quantize = plan_quantize(
        spec.scaling,
        (m, spec.k),
        x_dtype,
        per_row=per_row,
        arch=arch,
        limits=limits,
        out_format=OutFormat.for_gemm(gemm_dtype),
    )
    one_call = m * spec.k <= ONE_CALL_ELEMENTS
    why = (
        "One call quantizes and multiplies: the second kernel starts while the first runs."
        if one_call
        else f"Of more than {ONE_CALL_ELEMENTS} elements, x is quantized by a call of its own, "
        f"which layers with the same x share."
    )
    return dataclasses.replace(
        chosen, quantize=quantize, one_call=one_call, reason=f"{why_gemm} {why}"
    )


def _sentence(reason: str) -> str:
    return f"{reason[0].upper()}{reason[1:].removesuffix('.')}."
