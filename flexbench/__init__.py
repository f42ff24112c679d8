"""Measure, size and compare LLM inference that is spread over machines."""

__version__ = "0.1.0"
