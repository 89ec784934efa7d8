"""Launchers and a sweeper for Hydra's multirun (python launch/....py -m ...). Hydra finds this package by itself."""
