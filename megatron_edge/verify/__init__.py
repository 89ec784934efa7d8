"""Verify: proof that an artifact is the model that was trained, and that a device can run it.

In: an artifact, what training said about its own model (`reference/`), a device's budget; out: a `VerifyReport` and
`verify.json`. Called by the verify job, without megatron-core and without modelopt: what is proven here is what ships.
`parity.py` compares bytes, `quality.py` runs the artifact, `behaviour.py` compares what it answers, `runtimes.py` lets
other software read the targets, `report.py` strings them together.
"""
