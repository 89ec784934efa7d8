"""Quantizers in the model: what is quantised (policy), insertion and calibration (apply), AWQ (awq), state."""
