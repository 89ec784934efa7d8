"""The jobs that launch/ calls: stages strung together, meeting on disk in the run directory.

preflight: what rank 0 checks before anything is spent. training: import, calibrate, train, reference.
delivery: export, verify. evaluation: loss and accuracy, against a baseline.
"""

from __future__ import annotations
