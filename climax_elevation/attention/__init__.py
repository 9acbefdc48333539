"""Attention with a terrain bias: engines, and the choice between them."""

from climax_elevation.attention.choice import ENGINES, biased_attention, check_engine, choose_engine

__all__ = ["ENGINES", "biased_attention", "check_engine", "choose_engine"]
