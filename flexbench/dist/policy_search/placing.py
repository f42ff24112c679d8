"""Policies that differ in where things are."""

from __future__ import annotations

from dataclasses import replace

from flexbench.dist.policy import Policy


def placed(policy: Policy, home: str, percent: float) -> Policy:
    """`policy` with so much of the weights at a home, the rest on the gpu; all else at the home."""
    elsewhere = home != "gpu"
    return replace(
        policy,
        w_gpu_percent=100 - percent if elsewhere else 100,
        w_cpu_percent=percent if home == "cpu" else 0,
        cache_gpu_percent=0 if elsewhere else 100,
        cache_cpu_percent=100 if home == "cpu" else 0,
        act_gpu_percent=0 if elsewhere else 100,
        act_cpu_percent=100 if home == "cpu" else 0,
    )
