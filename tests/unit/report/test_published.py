"""Figures that others published."""

from __future__ import annotations

import pytest

from flexbench.report.published import published_figures


def of(*models) -> dict[tuple[str, str], float]:
    return {(one.model, one.system): one.tokens_per_s_per_gpu for one in published_figures(models)}


def test_all_of_them():
    figures = of()
    assert len(figures) == 15
    assert figures["facebook/opt-6.7b", "FlexGen"] == 25.26
    assert figures["facebook/opt-30b", "FlexGen with compression"] == 8.38
    assert figures["facebook/opt-175b", "DeepSpeed ZeRO-Inference"] == 0.01
    assert figures["facebook/opt-175b", "Petals"] == 0.08


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("facebook/opt-6.7b", "facebook/opt-6.7b"),
        ("OPT-30B", "facebook/opt-30b"),
        ("someone/opt-175b-int8", "facebook/opt-175b"),
    ],
)
def test_models_of_the_same_size(name, expected):
    assert {model for model, _ in of(name, "facebook/opt-125m")} == {expected}


@pytest.mark.parametrize(
    "name", ["facebook/opt-125m", "facebook/opt-30b5", "robopt-30b", "opt-6.7b.1", "bloom", None]
)
def test_other_models_have_none_of_their_own(name):
    assert len(of(name)) == 15
    assert {model for model, _ in of(name, "facebook/opt-30b")} == {"facebook/opt-30b"}
