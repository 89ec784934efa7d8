"""The artifact's own answers on one set of windows, once for each recipe that a runtime is compared under.

In: the artifact's reader and windows; out: `Run`s. Several runtimes compute the same thing (weights alone quantised,
fp32): what the model says of it is calculated once. Called by report.py, llama_cpp.py, onnxruntime.py, runtimes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.verify.behaviour import Run, run_artifact
from megatron_edge.verify.quality import Windows, load_model

Rounding = Callable[[ArtifactReader, Any], None]


class References:
    """`windows`, and what the artifact says of them, with logits of the first `keep_logits`."""

    def __init__(self, reader: ArtifactReader, windows: Windows, keep_logits: int = 1) -> None:
        self.reader, self.windows, self.keep_logits = reader, windows, min(keep_logits, len(windows))
        self._runs: dict[tuple[Any, ...], Run] = {}

    def run(
        self,
        dtype: torch.dtype,
        device: str = "cpu",
        activations: bool = True,
        cache: bool = True,
        tables: torch.dtype = torch.float32,
        rounding: Rounding | None = None,
        with_noise: bool = True,
    ) -> Run:
        """As `load_model` takes them; `rounding` gives the model what else a runtime rounds. `with_noise` False is for
        recipes without any rounding, whose noise is far below what is asked of a runtime."""
        manifest = self.reader.manifest
        quantised_inputs = activations and any(x.activation != "none" for x in manifest.linears.values())
        quantised_cache = cache and manifest.kv.get("format", "none") != "none"
        kept_tables = tables if manifest.tables else None
        key = (dtype, device, quantised_inputs, quantised_cache, kept_tables, rounding)
        if key not in self._runs or (with_noise and not self._runs[key].noise):
            model = load_model(self.reader, dtype, device, activations=activations, cache=cache, tables=tables)
            if rounding is not None:
                rounding(self.reader, model)
            self._runs[key] = run_artifact(model, self.windows, self.keep_logits, with_noise)
        return self._runs[key]
