"""formats against ml_dtypes, gguf and plain loops, and what holds for any input (modelopt: test_formats_modelopt)."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from format_cases import DTYPES, GROUP, amax_of, equal_bits, weight_of_every_kind
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_edge.artifact import formats, rounding
from megatron_edge.contracts import InputError

# ---------------------------------------------------------------- ml_dtypes, gguf and plain loops


def around(points: list[float]) -> np.ndarray:
    """Each point with its two fp32 neighbours, and their negatives."""
    x = np.array(points, dtype=np.float32)
    x = np.concatenate([np.nextafter(x, np.float32(-np.inf)), x, np.nextafter(x, np.float32(np.inf))])
    return np.concatenate([x, -x])


@pytest.mark.parametrize(
    "fmt, kind, rounded",
    [("fp8", ml_dtypes.float8_e4m3fn, rounding.round_e4m3), ("nvfp4", ml_dtypes.float4_e2m1fn, rounding.round_e2m1)],
)
def test_rounding_equals_ml_dtypes_on_every_value_and_boundary(fmt, kind, rounded):
    largest = float(ml_dtypes.finfo(kind).max)
    codes = 1 << (7 if fmt == "fp8" else 3)
    values = [float(v) for v in np.arange(codes, dtype=np.uint8).view(kind).astype(np.float32) if math.isfinite(v)]
    assert values == sorted(values) and values[-1] == largest
    middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    random = np.random.default_rng(0).normal(0, largest / 4, 20_000).astype(np.float32)
    x = np.concatenate([around(values), around(middles), random, [1e-45, -1e-45, 0.0, -0.0, 1e38]]).astype(np.float32)
    expected = np.array([kind(np.clip(v, -largest, largest)) for v in x]).astype(np.float32)
    assert np.array_equal(rounded(torch.from_numpy(x.copy())).numpy(), expected)


def e4m3(x: float) -> np.float32:
    return np.float32(ml_dtypes.float8_e4m3fn(np.clip(np.float32(x), -448, 448)))


def e2m1(x: float) -> np.float32:
    return np.float32(ml_dtypes.float4_e2m1fn(np.clip(np.float32(x), -6, 6)))


def plain_loop(fmt: str, weight: np.ndarray, amax: np.ndarray) -> np.ndarray:
    """The definition at the head of formats.py, one element at a time."""
    f = np.float32
    out = np.empty_like(weight)
    block = GROUP[fmt] or weight.shape[1]
    for row, start in itertools.product(range(weight.shape[0]), range(0, weight.shape[1], block)):
        x = weight[row, start : start + block]
        if fmt == "fp8":
            value = [e4m3(v * (f(448) / amax)) * (amax / f(448)) for v in x]
        elif fmt == "int4":
            scale = f(np.float16(max(amax[row, start // block] / f(7), f(2.0**-24))))
            inverse = f(1) / scale if amax[row, start // block] > 2.0**-24 else f(0)
            value = [f(max(-8, min(7, round(float(v * inverse))))) * scale for v in x]
        elif fmt == "int8":
            scale = f(np.float16(max(amax[row, 0] / f(127), f(2.0**-24))))
            inverse = f(1) / scale if amax[row, 0] > 2.0**-24 else f(0)
            value = [f(max(-127, min(127, round(float(v * inverse))))) * scale for v in x]
        else:
            g = amax / f(2688)
            scale = f(np.abs(x).max()) / (f(6) * g)
            step = e4m3(max(scale if scale > 0 else f(1), f(2.0**-9))) * g
            value = [e2m1(v / step) * step for v in x]
        out[row, start : start + block] = value
    return out


@pytest.mark.parametrize("fmt", formats.WEIGHT_FORMATS)
@pytest.mark.parametrize("snapped", [True, False])
def test_values_equal_a_plain_loop(fmt, snapped):
    weight = weight_of_every_kind(torch.float32)[:24]
    amax = formats.weight_amax(fmt, weight, GROUP[fmt])
    amax = formats.snap_amax(fmt, amax) if snapped else amax
    ours = formats.decode(formats.encode(fmt, weight, amax, GROUP[fmt]), torch.float32)
    assert np.array_equal(ours.numpy(), plain_loop(fmt, weight.numpy(), amax.numpy()))


def test_kv_int8_equals_gguf_q8_0():
    """gguf multiplies by 1 / (amax / 127) and rounds halves away from zero: it may differ on a boundary only."""
    x = weight_of_every_kind(torch.float32).view(-1, 32)
    blocks = quants.quantize(x.numpy(), GGMLQuantizationType.Q8_0)
    theirs = quants.dequantize(blocks, GGMLQuantizationType.Q8_0)
    ours = formats.fake_quantize_kv("int8", x).numpy()
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        position = 127 * x.numpy().astype(np.float64) / np.abs(x.numpy()).max(1, keepdims=True).astype(np.float64)
    differing = ours != theirs
    assert np.abs(np.abs(position[differing]) % 1 - 0.5).max(initial=0) < 1e-5
    assert differing.sum() <= 5
    assert np.array_equal(np.where(differing, ours + np.sign(x.numpy()) * scale, ours), theirs)


def test_int8_weights_are_q8_0_blocks_that_repeat_the_rows_scale():
    weight = weight_of_every_kind(torch.bfloat16)
    encoded = formats.encode("int8", weight, amax_of("int8", weight))
    assert encoded.codes.min() >= -127 and encoded.scale.shape == (96, 1) and encoded.scale.dtype == torch.float16
    codes = encoded.codes.numpy().reshape(-1, 32).view(np.uint8)
    scale = encoded.scale.numpy().repeat(256 // 32, axis=1).reshape(-1, 1).view(np.uint8)
    blocks = np.concatenate([scale, codes], axis=1)
    values = quants.dequantize(blocks, GGMLQuantizationType.Q8_0).reshape(96, 256)
    assert np.array_equal(values, formats.decode(encoded, torch.float32).numpy())


def test_int8_inputs_equal_a_plain_loop_and_saturate_where_runtimes_do():
    x = weight_of_every_kind(torch.float32)[16:24]
    amax = formats.snap_tensor_amax("int8", x.abs().max() * 0.6)
    f = np.float32
    scale, multiplier = f(amax) / f(127), f(127) / f(amax)
    expected = [f(max(-128, min(127, round(float(v * multiplier))))) * scale for v in x.numpy().reshape(-1)]
    ours = formats.fake_quantize_input("int8", x, amax)
    assert np.array_equal(ours.numpy().reshape(-1), np.array(expected))
    assert torch.equal(formats.tensor_scale("int8", amax), torch.tensor(scale))
    below = formats.fake_quantize_input("int8", torch.tensor([[-9.0, 9.0]]), torch.tensor(127 / 128))
    assert below.tolist() == [[-1.0, 127 / 128]]


@pytest.mark.parametrize("fmt", formats.ACTIVATION_FORMATS)
def test_inputs_beyond_their_maximum_keep_the_order_and_quantise_once(fmt):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).sort()[0]
    amax = formats.snap_tensor_amax(fmt, x.abs().max() / 2)
    once = formats.fake_quantize_input(fmt, x, amax)
    if fmt != "nvfp4":  # its blocks have scales of their own
        assert (once.diff() >= 0).all() and torch.equal(formats.fake_quantize_input(fmt, once, amax), once)
    assert once.abs().max() <= amax * (128 / 127) and formats.fake_quantize_input(fmt, x * 0, amax).eq(0).all()


def test_kv_nvfp4_is_the_weights_arithmetic_along_head_dim():
    keys = weight_of_every_kind(torch.float32)[:24].view(2, 3, 4, 256)[..., :64].contiguous()
    amax = formats.snap_tensor_amax("nvfp4", keys.abs().max())
    expected = plain_loop("nvfp4", keys.view(-1, 64).numpy(), amax.numpy()).reshape(keys.shape)
    assert np.array_equal(formats.fake_quantize_kv("nvfp4", keys, amax).numpy(), expected)


def test_nvfp4_weights_are_what_gguf_reads():
    weight = weight_of_every_kind(torch.float32)
    encoded = formats.encode("nvfp4", weight, amax_of("nvfp4", weight), 16)
    codes = formats.unpacked_codes(encoded).numpy().reshape(-1, 4, 16)
    packed = codes[..., :8] | (codes[..., 8:] << 4)
    scales = encoded.scale.view(torch.uint8).numpy().reshape(-1, 4)
    blocks = np.concatenate([scales, packed.reshape(-1, 32)], axis=1)
    values = quants.dequantize(blocks, GGMLQuantizationType.NVFP4).reshape(weight.shape)
    assert np.array_equal(values * encoded.global_scale.numpy(), formats.decode(encoded, torch.float32).numpy())


# ---------------------------------------------------------------- what must hold for any input

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)
# Whole tensors of like size, then a few elements of any size: both blocks of zeros and of subnormals occur.
WEIGHTS = st.tuples(
    st.integers(0, 2**31), st.integers(-70, 20), st.lists(st.tuples(st.integers(0, 255), FINITE), max_size=6)
)
ANY_FORMAT = st.sampled_from(formats.WEIGHT_FORMATS)


def drawn(recipe, dtype=torch.float32) -> torch.Tensor:
    seed, exponent, spikes = recipe
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight[seed % 4] = 0.0
    for place, value in spikes:
        weight[place // 64, place % 64] = value
    return weight.to(dtype)


@settings(max_examples=150, deadline=None)
@given(ANY_FORMAT, WEIGHTS, st.sampled_from([*DTYPES, torch.float16]), st.sampled_from([1.0, 0.3]), st.booleans())
def test_fake_quantize_is_decode_of_encode(fmt, recipe, dtype, clip, snapped):
    weight = drawn(recipe, dtype)
    if not weight.isfinite().all():
        return
    amax = formats.weight_amax(fmt, weight, GROUP[fmt]) * clip
    amax = formats.snap_amax(fmt, amax) if snapped else amax
    encoded = formats.encode(fmt, weight, amax, GROUP[fmt])
    fake = formats.fake_quantize(fmt, weight, amax, GROUP[fmt])
    assert equal_bits(fake, formats.decode(encoded, dtype))
    assert encoded.scale.float().isfinite().all() and (encoded.scale.float() > 0).all()
    if dtype != torch.float16:  # a value beyond fp16 is rightly infinite there
        assert fake.isfinite().all()


@settings(max_examples=150, deadline=None)
@given(ANY_FORMAT, WEIGHTS)
def test_quantising_twice_changes_nothing(fmt, recipe):
    weight = drawn(recipe)
    amax = amax_of(fmt, weight)
    encoded = formats.encode(fmt, weight, amax, GROUP[fmt])
    once = formats.decode(encoded, torch.float32)
    twice = formats.fake_quantize(fmt, once, amax, GROUP[fmt])
    if fmt == "nvfp4":  # dynamic scales: e4m3's subnormals are too coarse for a block's maximum to come back as code 6
        kept = encoded.scale.float().repeat_interleave(16, dim=1) >= 2.0**-6
        once, twice = once[kept], twice[kept]
    assert torch.equal(once, twice)


@settings(max_examples=100, deadline=None)
@given(ANY_FORMAT, st.lists(FINITE, min_size=64, max_size=64))
def test_rounding_keeps_the_order_within_a_block(fmt, numbers):
    x = torch.tensor(sorted(numbers)).view(-1, GROUP[fmt] or 64)[:1].contiguous()
    values = formats.fake_quantize(fmt, x, amax_of(fmt, x), GROUP[fmt])
    assert (values.diff() >= 0).all()


@settings(max_examples=200, deadline=None)
@given(ANY_FORMAT, st.floats(width=32, min_value=0, allow_nan=False, allow_infinity=False))
def test_a_snapped_amax_stays_where_it_is(fmt, number):
    amax = torch.tensor(number)
    snapped = formats.snap_amax(fmt, amax)
    assert torch.equal(formats.snap_amax(fmt, snapped), snapped)
    if fmt in formats.ACTIVATION_FORMATS:
        snapped = formats.snap_tensor_amax(fmt, amax)
        assert torch.equal(formats.snap_tensor_amax(fmt, snapped), snapped)
        scale = formats.tensor_scale(fmt, snapped)
        assert 0 < scale < math.inf and torch.equal(formats.amax_of_scale(fmt, scale), snapped)


@pytest.mark.parametrize("fmt", formats.WEIGHT_FORMATS)
def test_every_snapped_scale_is_lossless(fmt):
    """All mantissas that a scale can have. The limits are those that `snap_amax` states."""
    per_scale = {"fp8": 448.0, "int4": 7.0, "int8": 127.0, "nvfp4": 2688.0}[fmt]
    if fmt in ("int4", "int8"):
        scale = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    else:
        scale = ((torch.arange(1 << 12, dtype=torch.int32) << 11) | (120 << 23)).view(torch.float32)
    amax = formats.snap_amax(fmt, scale * per_scale)
    ratio = amax / (scale * per_scale)
    normal = scale >= 2.0**-14
    assert ratio.max() == 1 and ratio[normal].min() >= 1 - 0.007 and ratio.min() >= 0.8
    stored = amax / per_scale
    inverse = 1 / stored
    assert torch.equal(stored * per_scale, amax) and torch.equal(stored.double() * per_scale, amax.double())
    if fmt in ("fp8", "int4"):  # modelopt's two ways
        assert torch.equal(per_scale / amax, torch.full_like(amax, per_scale) / amax)
    for code in range(1, {"int4": 9, "int8": 129}.get(fmt, 16)):
        exact = stored.double() * code
        assert torch.equal((stored * code).double(), exact)
        if fmt == "int8":
            continue
        if fmt == "int4":
            assert torch.equal(torch.full_like(inverse, code) / inverse, stored * code)
        else:
            assert torch.equal((1 / inverse) * code, stored * code)


# ---------------------------------------------------------------- zeros, infinities, sizes, refusals


@pytest.mark.parametrize("fmt", formats.WEIGHT_FORMATS)
@pytest.mark.parametrize("number", [0.0, 1e-42, 1.0, -5.0])
def test_zero_amax_makes_zeros(fmt, number):
    weight = torch.full((2, 64), number)
    amax = torch.zeros((2, 1) if fmt in ("int4", "int8") else ())
    encoded = formats.encode(fmt, weight, amax, GROUP[fmt])
    assert (encoded.scale.float() > 0).all() and encoded.scale.float().isfinite().all()
    assert equal_bits(formats.decode(encoded, torch.float32), torch.zeros(2, 64))
    assert equal_bits(formats.fake_quantize(fmt, weight, amax, GROUP[fmt]), torch.zeros(2, 64))
    assert formats.snap_amax(fmt, amax).eq(0).all()


@pytest.mark.parametrize("fmt", formats.WEIGHT_FORMATS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused(fmt, bad):
    weight = torch.ones(2, 64)
    amax = formats.weight_amax(fmt, weight, GROUP[fmt])
    weight[1, 5] = bad
    with pytest.raises(InputError, match=r"weight .* infinities or NaN"):
        formats.encode(fmt, weight, amax, GROUP[fmt])
    with pytest.raises(InputError, match=r"amax .* infinities or NaN"):
        formats.encode(fmt, torch.ones(2, 64), formats.snap_amax(fmt, amax.new_full(amax.shape, bad)), GROUP[fmt])


def test_kv_blocks_of_zeros_subnormals_and_giants_stay_finite():
    x = torch.zeros(6, 64, dtype=torch.bfloat16)
    x[1], x[2], x[3], x[4] = 1e-42, 1e-30, 3e38, -0.0
    assert formats.fake_quantize_kv("int8", x).isfinite().all()
    for fmt in formats.STATIC_KV_FORMATS:
        assert formats.fake_quantize_kv(fmt, x, torch.tensor(0.0)).eq(0).all()
        assert formats.fake_quantize_kv(fmt, x, torch.tensor(2.0)).isfinite().all()
        with pytest.raises(InputError, match=f"kv.format={fmt} needs a calibrated amax"):
            formats.fake_quantize_kv(fmt, x)


@pytest.mark.parametrize("fmt", formats.WEIGHT_FORMATS)
def test_storage_bytes_counts_what_encode_makes(fmt):
    weight = weight_of_every_kind(torch.bfloat16)
    encoded = formats.encode(fmt, weight, amax_of(fmt, weight), GROUP[fmt])
    parts = [part for part in (encoded.codes, encoded.scale, encoded.global_scale) if part is not None]
    assert formats.storage_bytes(fmt, tuple(weight.shape), GROUP[fmt]) == sum(part.nbytes for part in parts)


def test_storage_bytes_of_other_tensors():
    assert formats.storage_bytes("bf16", (3, 5)) == 30 and formats.storage_bytes("fp32", ()) == 4
    assert formats.storage_bytes("int8", (6, 64)) == 6 * 64 + 6 * 2
    assert formats.kv_storage_bytes("int8", (2, 3, 64)) == 6 * 2 * 34  # llama.cpp's block_q8_0 has 34 bytes
    assert formats.kv_storage_bytes("nvfp4", (2, 3, 64)) == 6 * (32 + 4)
    assert formats.kv_storage_bytes("fp8", (2, 3, 64)) == 384 and formats.kv_storage_bytes("none", (2, 3, 64)) == 768
    with pytest.raises(InputError, match="int3"):
        formats.storage_bytes("int3", (2, 64))


@pytest.mark.parametrize("in_features, wanted, size", [(1536, 128, 128), (576, 128, 64), (96, 128, 32), (64, 64, 64)])
def test_group_size_is_halved_until_it_divides(in_features, wanted, size):
    assert formats.effective_group_size(in_features, wanted) == size


@pytest.mark.parametrize("in_features, wanted", [(48, 128), (64, 0), (64, 16), (100, 100 // 3), (64, -128)])
def test_group_size_that_cannot_be(in_features, wanted):
    with pytest.raises(InputError, match=f"group_size={wanted}.*in_features={in_features}"):
        formats.effective_group_size(in_features, wanted)


def test_nibbles_come_back_low_first():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 1)
    packed = formats.pack_nibbles(codes)
    assert packed[0, 0] == 0x10 and torch.equal(formats.unpack_nibbles(packed), codes)


def test_leading_dims_flattened_amax_empty_and_noncontiguous_input():
    x = weight_of_every_kind(torch.bfloat16)
    amax = amax_of("int4", x)
    flat = formats.fake_quantize("int4", x.view(-1, 64), amax.view(-1, 1), 64).view_as(x)
    assert equal_bits(flat, formats.fake_quantize("int4", x.view(2, 48, 256), amax.view(2, 48, 4), 64).view_as(x))
    assert formats.fake_quantize("nvfp4", x[:0], torch.tensor(1.0), 16).shape == (0, 256)
    for fmt in formats.WEIGHT_FORMATS:
        strided = x.t().contiguous().t()
        ours = formats.fake_quantize(fmt, strided, amax_of(fmt, x), GROUP[fmt])
        assert torch.equal(ours, formats.fake_quantize(fmt, x, amax_of(fmt, x), GROUP[fmt]))


def test_input_is_not_written_to_and_parts_agree_with_the_whole(monkeypatch):
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(3))
    for fmt in formats.WEIGHT_FORMATS:
        amax, copy = amax_of(fmt, x), x.clone()
        in_parts = formats.fake_quantize(fmt, x, amax, GROUP[fmt])
        assert torch.equal(x, copy)
        monkeypatch.setattr(rounding, "_CPU_PART_ELEMENTS", 1 << 30)
        assert equal_bits(formats.fake_quantize(fmt, x, amax, GROUP[fmt]), in_parts)
        monkeypatch.undo()


@pytest.mark.parametrize(
    "arguments",
    [
        ("int5", torch.ones(2, 64), torch.ones(()), 0),
        ("int4", torch.ones(2, 64), torch.ones(2, 1), 48),
        ("int4", torch.ones(2, 64), torch.ones(3, 1), 64),
        ("int4", torch.ones(2, 64), torch.ones(2, 1), 0),
        ("nvfp4", torch.ones(2, 24), torch.ones(()), 16),
        ("nvfp4", torch.ones(2, 64), torch.ones(()), 32),
        ("nvfp4", torch.ones(2, 64), torch.ones(2), 16),
        ("fp8", torch.ones(2, 64), torch.ones(2), 0),
        ("int8", torch.ones(2, 64), torch.ones(()), 0),
        ("int8", torch.ones(2, 64), torch.ones(4, 1), 0),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments):
    for function in (formats.encode, formats.fake_quantize):
        with pytest.raises(InputError):
            function(*arguments)
