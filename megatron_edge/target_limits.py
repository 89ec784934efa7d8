"""What each export target cannot carry, by the names of the configuration.

In: the formats of a recipe; out: what a target lacks. Called by config.py to choose the default targets and by
checks.py to refuse before anything is spent. The conversions of export/targets refuse the same things of an artifact.
"""

from __future__ import annotations

from collections.abc import Collection

STATIC_KV = ("fp8", "nvfp4")  # KV formats with calibrated scales, which an artifact stores

# Targets that hold int4 codes and nothing else that is quantised.
INT4_ALONE = ("gptq", "onnx")
# Targets without a form for int4 weights under quantised inputs.
NO_W4A8 = ("gptq", "onnx", "modelopt")
# Targets whose every decoder linear must be quantised.
NO_PLAIN_LINEARS = ("onnx",)


def lacking(
    target: str, recipes: Collection[tuple[str, str]], kv: str, tables: Collection[str], excludes: bool = False
) -> list[str]:
    """Leaves of the configuration, with their values, that `target` cannot carry beyond its weight formats.

    `recipes` are the (weight, activation) pairs of the base recipe and its overrides, `tables` the formats of the
    embedding and the output layer; `excludes`: some linears stay unquantised.
    """
    found = []
    if target in NO_W4A8 and ("int4", "fp8") in recipes:
        found.append("quant.activation=fp8 (over int4 weights)")
    if target in INT4_ALONE:
        found += [f"quant.embedding or quant.head={table}" for table in sorted(set(tables) - {"bf16"})]
        found += [f"kv.format={kv}"] if kv in STATIC_KV else []
    if target in NO_PLAIN_LINEARS and (excludes or ("none", "none") in recipes):
        found.append("linear layers left unquantised (quant.exclude, quant.overrides)")
    return found
