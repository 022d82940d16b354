"""Continuous delivery for a Mixture-of-LoRAs (Feng et al. 2024, arXiv 2403.03432)."""

__version__ = "0.1.0"
