"""Recorded steps beside launched ones where ranks exchange inside of the step; one GPU: test_graph_cuda.py.

torchrun --nproc-per-node 2 tests/gpu/graph_of_layouts.py CP2 [TP2SP ...]

Steps with one document in a window and with several, QAT and QAD, with and without recomputation. Exit 0 where losses,
norms and weights agree on every rank; a rank that hangs in a layout says where after two minutes.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from pathlib import Path

from test_graph_cuda import compare

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CASES = (
    ("none", "none", "qat", "none"), ("nvfp4", "fp8", "qat", "full"), ("w4a8_awq", "none", "qat", "selective"),
    ("fp8", "int8", "qad", "none"),
)  # fmt: skip


def main(layouts: list[str]) -> None:
    from torch.distributed import PrefixStore, rendezvous

    from megatron_edge.runtime.session import open_session
    from tools.layout_parity import layout_plan

    store, rank, _ = next(iter(rendezvous("env://")))
    for layout in layouts:
        faulthandler.dump_traceback_later(120, exit=True)
        place = {"rank": rank, "local_rank": int(os.environ["LOCAL_RANK"]), "store": PrefixStore(layout, store)}
        with open_session(layout_plan(layout), **place, timeout_seconds=100, seed=1) as session:
            for quant, kv, mode, recompute in CASES:
                print(f"{layout}, rank {rank}: {quant} {kv} {mode}, recompute={recompute}", flush=True)
                try:
                    compare(session, quant, kv, mode, recompute)
                except BaseException:  # noqa: BLE001 - to close the session would be to wait for the other rank
                    traceback.print_exc()
                    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
