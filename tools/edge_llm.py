"""Let TensorRT Edge-LLM's own export parse an artifact, and compare what it understood.

    make runtimes
    python tools/edge_llm.py runs/.../artifact/canonical

ARTIFACT is canonical; its target `modelopt` is taken from beside it, or made for the occasion. What is shown was
parsed, never run: engines need NVIDIA's GPUs. Exit code 0 where all of it is the artifact's, 3 where something is
not, 2 where the artifact is outside of what Edge-LLM documents.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_edge.artifact.store import ArtifactReader
from megatron_edge.contracts import InputError
from megatron_edge.export.targets import convert
from megatron_edge.verify import edge_llm
from megatron_edge.verify.runtimes import find_targets

PROGRAM = Path(__file__).resolve().parents[1] / ".venv-edgellm" / "bin" / "tensorrt-edgellm-export"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, help="directory of the canonical artifact")
    parser.add_argument("--program", type=Path, default=PROGRAM, help="tensorrt-edgellm-export of its own environment")
    parser.add_argument("--output", type=Path, help="keep its ONNX there")
    parser.add_argument("--beyond-limits", action="store_true", help="parse what Edge-LLM does not run, too")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            reader = ArtifactReader(arguments.artifact)
            directory = find_targets(arguments.artifact).get("modelopt")
            if directory is None:
                directory = Path(folder) / "modelopt"
                convert("modelopt", reader, directory)
            output = arguments.output or Path(folder) / "onnx"
            checks = edge_llm.parse(reader, directory, arguments.program, output, arguments.beyond_limits)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for check in checks:
        print(f"{'ok' if check.ok else 'FAILED':6} {check.name}: {check.metric}: {check.value}  {check.detail}")
    return 0 if all(check.ok for check in checks) else 3


if __name__ == "__main__":
    sys.exit(main())
