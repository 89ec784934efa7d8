"""Quantizers in the model: which tensors (policy), insertion and calibration (apply), AWQ (awq), their state (state)."""
