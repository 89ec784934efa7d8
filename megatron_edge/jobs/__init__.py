"""The jobs that launch/ calls: stages strung together, meeting on disk in the run directory.

preflight: what rank 0 checks before anything is spent. training: import, calibrate, train, reference.
delivery: export, verify, evaluate.
"""

from __future__ import annotations
