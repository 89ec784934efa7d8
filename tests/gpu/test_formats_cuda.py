"""formats on CUDA: bit for bit what it gives on CPU, and against each of modelopt's CUDA paths.

Run by pytest (marked gpu), or as a program that prints a table of everything it finds and ends with 1 on a surprise:

    python tests/gpu/test_formats_cuda.py

No comparison has a loose tolerance. Where a path of modelopt departs from formats by design, a model of that departure
predicts which elements differ and to what, and what remains must be elements that sit on a rounding boundary within a
few units in the last place of fp32 (Triton and --use_fast_math divide approximately). Anything else is a surprise.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_edge.artifact import formats, rounding

NO_CUDA = "" if torch.cuda.is_available() else "torch.cuda.is_available() is False: these tests compare CUDA kernels"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_CUDA), reason=NO_CUDA)]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP = {"fp8": 0, "int4": 128, "int8": 0, "nvfp4": 16}
E2M1_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
# Relative width of a rounding boundary: two approximate fp32 divisions, 2 units in the last place each, and roundings.
BOUNDARY = 2.0**-20


class Absent(Exception):
    """A path of modelopt that this machine cannot run; the message is the reason."""


@dataclass
class Row:
    """One comparison. `causes` counts the differing elements by cause; the rest are surprises."""

    name: str
    elements: int
    differing: int = 0
    causes: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    @property
    def surprises(self) -> int:
        return self.differing - sum(self.causes.values())

    def __str__(self) -> str:
        causes = ", ".join(f"{count} {cause}" for cause, count in self.causes.items() if count) or "-"
        verdict = "ok" if self.surprises == 0 else f"SURPRISE {self.surprises}: {'; '.join(self.examples)}"
        return f"{self.name:58s} {self.elements:8d} {self.differing:8d}  {causes:60s} {verdict}"


def compare(name: str, ours: Tensor, theirs: Tensor, causes: dict[str, Tensor] | None = None) -> Row:
    """By value (so -0 equals +0). An element counts under the first of `causes` (masks) that holds for it."""
    wrong = (ours != theirs) | (ours.isnan() != theirs.isnan())
    row = Row(name, ours.numel(), int(wrong.sum()))
    for cause, mask in (causes or {}).items():
        row.causes[cause] = int((wrong & mask).sum())
        wrong = wrong & ~mask
    for place in wrong.nonzero()[:3].tolist():
        row.examples.append(f"{place}: ours {float(ours[tuple(place)])!r}, theirs {float(theirs[tuple(place)])!r}")
    return row


def compare_bits(name: str, ours: Tensor, theirs: Tensor) -> Row:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        what = f"{ours.dtype} {tuple(ours.shape)} against {theirs.dtype} {tuple(theirs.shape)}"
        return Row(name, ours.numel(), ours.numel(), {}, [what])
    ours, theirs = (x.cpu().contiguous().reshape(-1).view(torch.uint8).int() for x in (ours, theirs))
    return compare(name, ours, theirs)


# ---------------------------------------------------------------- inputs


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """[256, 1024] on CPU: ordinary; rows from 2^0 down to 2^-31 and rows of zeros; blocks with one spike; ties."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(256, 1024, generator=generator) * 0.02
    yield "normal", normal.to(dtype)
    tiny = normal * torch.pow(2.0, -(torch.arange(256) % 32).float())[:, None]
    tiny[::16] = 0.0
    tiny[1] = -0.0
    tiny[3, :128] = 1e-42
    yield "tiny", tiny.to(dtype)
    spiked = normal * 2.0**-8
    spiked[:, 5::16] = 0.3
    yield "spiked", spiked.to(dtype)
    # Exact: the snapped global scale is a power of two, and so is each block's.
    ties = torch.tensor((*E2M1_MIDDLES, 0.5, 5.5)).repeat(256 * 1024 // 9 + 1)[: 256 * 1024].view(256, 1024)
    ties = ties * (torch.randint(0, 2, ties.shape, generator=generator) * 2 - 1)
    ties[:, ::16] = 6.0
    ties *= torch.pow(2.0, -7.0 - (torch.arange(256) % 12).float())[:, None]
    ties[0, 0] = 2688 * 2.0**-15
    yield "ties", ties.to(dtype)


def amaxes(fmt: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Calibrated to the maximum, and to an eighth of it, so that most blocks saturate; snapped."""
    for name, clip in (("", 1.0), (" saturated", 0.125)):
        yield name, formats.snap_amax(fmt, formats.weight_amax(fmt, x, GROUP[fmt]) * clip)


def inputs(fmt: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(label, x, amax), both on the GPU."""
    for dtype in dtypes:
        for case, x in cases(dtype):
            for clipped, amax in amaxes(fmt, x):
                yield f"{str(dtype).removeprefix('torch.')} {case}{clipped}", x.cuda(), amax.cuda()


def modelopt() -> SimpleNamespace:
    try:
        from modelopt.torch.kernels.quantization import gemm
        from modelopt.torch.quantization import extensions, tensor_quant
        from modelopt.torch.quantization.qtensor import FP8QTensor, INT4QTensor, NVFP4QTensor
    except ImportError as error:
        raise Absent(f"modelopt cannot be imported: {error}") from error
    return SimpleNamespace(
        gemm=gemm, extensions=extensions, quant=tensor_quant, fp8=FP8QTensor, int4=INT4QTensor, nvfp4=NVFP4QTensor
    )


# ---------------------------------------------------------------- CPU against CUDA


def cuda_equals_cpu() -> Iterator[Row]:
    for fmt in formats.WEIGHT_FORMATS:
        for label, x, snapped in inputs(fmt):
            raw = formats.weight_amax(fmt, x, GROUP[fmt])
            yield compare_bits(f"{fmt} {label} weight_amax", formats.weight_amax(fmt, x.cpu(), GROUP[fmt]), raw)
            yield compare_bits(
                f"{fmt} {label} snap_amax", formats.snap_amax(fmt, raw.cpu()), formats.snap_amax(fmt, raw)
            )
            for kind, amax in (("", snapped), (" not snapped", raw)):
                ours = formats.encode(fmt, x.cpu(), amax.cpu(), GROUP[fmt])
                theirs = formats.encode(fmt, x, amax, GROUP[fmt])
                name = f"{fmt} {label}{kind}"
                for part in ("codes", "scale", "global_scale"):
                    if getattr(ours, part) is not None:
                        yield compare_bits(f"{name} {part}", getattr(ours, part), getattr(theirs, part))
                values = formats.decode(ours, x.dtype)
                yield compare_bits(f"{name} decode", values, formats.decode(theirs, x.dtype))
                yield compare_bits(f"{name} fake", values, formats.fake_quantize(fmt, x, amax, GROUP[fmt]))


def cuda_equals_cpu_kv() -> Iterator[Row]:
    for dtype in DTYPES:
        for case, x in cases(dtype):
            label = f"{str(dtype).removeprefix('torch.')} {case}"
            x = x.view(256, 16, 64)
            on_gpu = formats.fake_quantize_kv("int8", x.cuda())
            yield compare_bits(f"kv int8 {label}", formats.fake_quantize_kv("int8", x), on_gpu)
            for fmt in formats.STATIC_KV_FORMATS:
                amax = formats.snap_tensor_amax(fmt, x.abs().amax().float() / 2)
                on_gpu = formats.fake_quantize_kv(fmt, x.cuda(), amax.cuda())
                yield compare_bits(f"kv {fmt} {label}", formats.fake_quantize_kv(fmt, x, amax), on_gpu)


# ---------------------------------------------------------------- modelopt: int4 and fp8


def int4_fake_quantiser() -> Iterator[Row]:
    """FakeTensorQuantFunction: the CUDA extension where it builds, else modelopt's plain torch on the GPU."""
    paths = modelopt()
    kind = "extension" if paths.extensions.get_cuda_ext() is not None else "eager: extension did not build"
    for label, x, amax in inputs("int4"):
        theirs = paths.quant.fake_tensor_quant(x.view(-1, 128), amax.view(-1, 1), None, 4, False, False).view_as(x)
        yield compare(f"int4 ({kind}) {label}", formats.fake_quantize("int4", x, amax, 128), theirs)


def int4_packed_tensor() -> Iterator[Row]:
    """INT4QTensor, whose scale is the group's own maximum. Its kernel rounds x + 8 half away from zero."""
    paths = modelopt()
    for case, x in cases(torch.float32):
        x = x.clone()
        x[:, ::128] = formats.snap_amax("int4", formats.weight_amax("int4", x, 128) * 1.02)
        amax = formats.weight_amax("int4", x, 128)
        kept = ((amax > 0) & (amax == formats.snap_amax("int4", amax))).all(1)  # it knows no zero groups
        x, amax = x[kept].cuda(), amax[kept].cuda()
        encoded = formats.encode("int4", x, amax, 128)
        theirs, _ = paths.int4.quantize(x, 128)
        codes = formats.unpack_nibbles(theirs._quantized_data.reshape(x.shape[0], -1))
        codes = codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        exact = (x.double().view(-1, 128) / encoded.scale.double().view(-1, 1)).view_as(x)
        tie = ((exact - exact.floor() - 0.5).abs() < 2.0**-19) & (exact.abs() < 8)
        ours = formats.unpacked_codes(encoded)
        yield compare(f"INT4QTensor codes {case}", ours.int(), codes.int(), {"halves, rounded up by x + 8": tie})


def fp8_fake_quantiser() -> Iterator[Row]:
    """scaled_e4m3: the CUDA extension where it builds, else fp8_eager on the GPU; and fp8_eager itself."""
    paths = modelopt()
    kind = "extension" if paths.extensions.get_cuda_ext_fp8() is not None else "eager: extension did not build"
    for label, x, amax in inputs("fp8"):
        ours = formats.fake_quantize("fp8", x, amax)
        yield compare(f"fp8 ({kind}) {label}", ours, paths.quant.scaled_e4m3(x, amax, None, 4, 3))
        yield compare(f"fp8_eager {label}", ours, paths.quant.fp8_eager(x, amax))
    x = next(cases(torch.float32))[1].cuda()
    theirs = paths.quant.scaled_e4m3(x, x.new_zeros(()), None, 4, 3)
    yield compare("fp8 zero amax: modelopt takes 1.0", formats.fake_quantize("fp8", x, x.new_ones(())), theirs)


def fp8_packed_tensor() -> Iterator[Row]:
    """FP8QTensor divides by the scale; formats, as the fake quantisers, multiplies by 448 / amax."""
    paths = modelopt()
    for label, x, amax in inputs("fp8"):
        scale = formats.tensor_scale("fp8", amax)
        if float(amax) == 0:
            continue
        inside = x.float().clamp(-amax, amax)  # it does not saturate: beyond the range is its NaN
        theirs, _ = paths.fp8.quantize(inside, scales=scale)
        ours, theirs = formats.encode("fp8", inside, amax).codes.double(), theirs._quantized_data.double()
        middle = (ours + theirs) / 2
        tie = (inside.double() / scale.double() / middle - 1).abs() < BOUNDARY
        yield compare(f"FP8QTensor codes {label}", ours, theirs, {"on a boundary": tie})


# ---------------------------------------------------------------- modelopt: nvfp4


def nvfp4_packed_tensor() -> Iterator[Row]:
    paths = modelopt()
    for label, x, amax in inputs("nvfp4"):
        encoded = formats.encode("nvfp4", x, amax, 16)
        double_scale = amax / (6.0 * 448.0)  # modelopt's expression; on CUDA a product with 1 / 2688
        theirs, scale, _ = paths.nvfp4.quantize(x, 16, None, double_scale)
        yield compare_bits(f"NVFP4QTensor {label} global_scale", encoded.global_scale, double_scale)
        yield compare_bits(f"NVFP4QTensor {label} scale", encoded.scale, scale)
        yield compare_bits(f"NVFP4QTensor {label} codes", encoded.codes, theirs._quantized_data)
        values = theirs.dequantize(x.dtype, scale=scale, double_scale=double_scale, block_sizes={-1: 16})
        yield compare(f"NVFP4QTensor {label} values", formats.decode(encoded, x.dtype), values)


@dataclass
class Nvfp4Blocks:
    """The arithmetic of one case in fp32 and fp64, per element. `ratio` is block amax / (6 g), before any rounding."""

    global_scale: Tensor
    ratio: Tensor
    on_element_boundary: Tensor
    on_scale_boundary: Tensor

    @classmethod
    def of(cls, x: Tensor, amax: Tensor) -> Nvfp4Blocks:
        encoded = formats.encode("nvfp4", x, amax, 16)
        g = encoded.global_scale
        assert g is not None
        step = (encoded.scale.float() * g).repeat_interleave(16, dim=1)
        block_amax = x.float().abs().view(-1, 16).amax(-1, keepdim=True)
        ratio = (block_amax / (g * 6.0)).expand(-1, 16).reshape(x.shape)
        exact = (x.double() / step.double()).abs().unsqueeze(-1)
        middles = torch.tensor(E2M1_MIDDLES, dtype=torch.float64, device=x.device)
        on_element = ((exact / middles - 1).abs() < BOUNDARY).any(-1)
        magnitudes = torch.arange(0x7F, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn).double()
        position = torch.searchsorted(magnitudes, ratio.double().clamp(max=448.0).contiguous()).clamp(1, 0x7E)
        middle = (magnitudes[position] + magnitudes[position - 1]) / 2
        on_scale = (ratio.double() / middle - 1).abs() < BOUNDARY
        return cls(g, ratio, on_element, on_scale)

    def scale_without_floor(self) -> Tensor:
        """e4m3 of the ratio, saturated but not held at 2^-9 from below: it may be 0."""
        return rounding.round_e4m3(self.ratio.clamp(max=448.0).clone())


def nvfp4_triton() -> Iterator[Row]:
    """fp4_fake_quant_block, what training on Hopper runs. It departs from NVFP4QTensor for small blocks:

    no floor of 2^-9 under the block scale, and a step (scale * g) below 1e-5 is replaced by 1.0, so that such a block,
    whatever it holds relative to the tensor, becomes zero unless |x| > 0.25.
    """
    paths = modelopt()
    if not hasattr(paths.gemm, "fp4_fake_quant_block"):
        raise Absent("modelopt offers no fp4_fake_quant_block here (needs triton and compute capability >= 8.9)")
    for label, x, amax in inputs("nvfp4"):
        if float(amax) == 0:
            continue
        blocks = Nvfp4Blocks.of(x, amax)
        step = blocks.scale_without_floor() * blocks.global_scale
        small = step < 1e-5
        step = step.masked_fill(small, 1.0)
        predicted = rounding.round_e2m1(x.float() / step).mul_(step).to(x.dtype)
        theirs = paths.gemm.fp4_fake_quant_block(x, amax)
        boundaries = {
            "block scale on a boundary": blocks.on_scale_boundary,
            "element on a boundary": blocks.on_element_boundary & ~small,
        }
        yield compare(f"triton {label}: its rule for small steps", predicted, theirs, boundaries)
        ours = formats.fake_quantize("nvfp4", x, amax, 16)
        yield compare(f"triton {label}: formats", ours, theirs, {"step below 1e-5": small, **boundaries})


def nvfp4_mx_extension() -> Iterator[Row]:
    """cuda_ext_mx.fused_amax_convert, the path without Triton, compiled with --use_fast_math.

    No floor under the block scale either: where e4m3 rounds the ratio to 0 the block becomes zero. Its g is
    1 / (448 * (6 / amax)) and its step a float of a double quotient: fp32 values are a few units in the last place off.
    """
    paths = modelopt()
    extension = paths.extensions.get_cuda_ext_mx(raise_if_failed=False)
    if extension is None:
        raise Absent("modelopt's MX extension did not build")
    types = extension.Types
    for label, x, amax in inputs("nvfp4"):
        if float(amax) == 0:
            continue
        blocks = Nvfp4Blocks.of(x, amax)
        scale = blocks.scale_without_floor()
        lost = scale == 0
        step = (scale * blocks.global_scale).masked_fill(lost, 1.0)
        predicted = (rounding.round_e2m1(x.float() / step) * step).masked_fill(lost, 0.0).to(x.dtype)
        theirs = extension.fused_amax_convert(x, 16, types.E2M1, types.E4M3, amax.reshape(1))
        ours = formats.fake_quantize("nvfp4", x, amax, 16)
        for name, reference, lost_here in (("its rule for lost scales", predicted, None), ("formats", ours, lost)):
            limits = torch.finfo(x.dtype)
            unit = 4 * limits.eps if x.dtype == torch.float32 else limits.eps
            slack = unit * reference.double().abs() + limits.smallest_normal * limits.eps
            near = (theirs.double() - reference.double()).abs() <= slack
            causes = {} if lost_here is None else {"scale rounds to 0": lost_here}
            causes |= {"last place of the value": near, "block scale on a boundary": blocks.on_scale_boundary}
            causes["element on a boundary"] = blocks.on_element_boundary
            yield compare(f"mx {label}: {name}", reference, theirs, causes)


COMPARISONS: tuple[Callable[[], Iterator[Row]], ...] = (
    cuda_equals_cpu,
    cuda_equals_cpu_kv,
    int4_fake_quantiser,
    int4_packed_tensor,
    fp8_fake_quantiser,
    fp8_packed_tensor,
    nvfp4_packed_tensor,
    nvfp4_triton,
    nvfp4_mx_extension,
)


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda function: function.__name__)
def test_cuda(comparison: Callable[[], Iterator[Row]]) -> None:
    """Where modelopt or one of its extensions is missing, the test is skipped with the reason."""
    try:
        rows = list(comparison())
    except Absent as reason:
        pytest.skip(str(reason))
    print(*rows, sep="\n")
    wrong = [str(row) for row in rows if row.surprises]
    assert rows and not wrong, "\n".join(wrong)


# ---------------------------------------------------------------- as a program


def speeds() -> Iterator[str]:
    """fake_quantize on the GPU, plain torch; the timer waits for the device."""
    x = (torch.randn(4096, 4096, device="cuda") * 0.02).to(torch.bfloat16)
    for fmt in formats.WEIGHT_FORMATS:
        arguments = (fmt, x, formats.snap_amax(fmt, formats.weight_amax(fmt, x, GROUP[fmt])), GROUP[fmt])
        timer = Timer("fake_quantize(*arguments)", globals={**vars(formats), "arguments": arguments})
        seconds = timer.blocked_autorange(min_run_time=0.5).median
        yield f"fake_quantize {fmt} bf16 [4096, 4096]: {x.numel() / seconds / 1e9:.1f} G elements/s"


def main() -> int:
    if NO_CUDA:
        print(f"skipped: {NO_CUDA}")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    surprises = 0
    for comparison in COMPARISONS:
        print(f"\n{comparison.__name__}: comparison, elements, differing, causes, verdict")
        rows = 0
        try:
            for row in comparison():
                surprises, rows = surprises + bool(row.surprises), rows + 1
                if row.differing or "normal" in row.name or rows == 1:  # equal rows of the same kind are only counted
                    print(row, flush=True)
            print(f"{rows} rows compared")
        except Absent as reason:
            print(f"absent: {reason}")
        except Exception:  # noqa: BLE001 - a kernel that does not build or launch must not hide the other rows
            surprises += 1
            traceback.print_exc(file=sys.stdout)
    print("", *speeds(), f"\n{surprises} surprises", sep="\n")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
