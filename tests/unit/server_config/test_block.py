"""Our own decoder block computes what BLOOM's and OPT's blocks compute."""

from __future__ import annotations

import math

import pytest

from flexbench.models.families import decoder_spec
from flexbench.models.published import published_spec

torch = pytest.importorskip("torch", reason="the block is made of torch's layers")

from flexbench.server_config.block import DecoderBlock, alibi_slopes  # noqa: E402


def small_spec(family: str, *, hidden_size: int = 48, heads: int = 6, **values):
    sizes = {"hidden_size": hidden_size, "num_attention_heads": heads, "num_hidden_layers": 2}
    return decoder_spec("small", {"model_type": family, **sizes, **values})


def seeded_block(spec) -> DecoderBlock:
    torch.manual_seed(0)
    return DecoderBlock(spec).requires_grad_(False)


@pytest.mark.parametrize(
    "spec",
    [
        published_spec("bloom-560m"),
        published_spec("opt-125m"),
        small_spec("opt", ffn_dim=100),
    ],
    ids=["bloom-560m", "opt-125m", "opt with a narrow MLP"],
)
def test_it_has_exactly_the_parameters_of_the_model(spec):
    block = DecoderBlock(spec)
    assert sum(parameter.numel() for parameter in block.parameters()) == spec.block_parameters


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_step_by_step_with_the_cache_is_one_causal_pass(family):
    block = seeded_block(small_spec(family))
    hidden = torch.randn(2, 9, 48)
    whole, cache = block(hidden, None)

    steps, grown = [], None
    for span in (slice(0, 4), *(slice(n, n + 1) for n in range(4, 9))):
        out, grown = block(hidden[:, span], grown)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    for kept, expected in zip(grown, cache, strict=True):
        torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_no_token_sees_what_follows(family):
    block = seeded_block(small_spec(family))
    hidden = torch.randn(1, 6, 48)
    changed = hidden.clone()
    changed[:, 4:] += 1
    before, after = block(hidden, None)[0], block(changed, None)[0]
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])


def test_the_slopes_of_alibi_are_those_of_the_paper():
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("heads", [8, 6])
def test_it_computes_what_the_block_of_transformers_computes(heads):
    bloom = pytest.importorskip(
        "transformers.models.bloom.modeling_bloom", reason="to compare with transformers' block"
    )
    from transformers import BloomConfig

    if not hasattr(bloom.BloomModel, "_prepare_attn_mask"):
        pytest.skip("a transformers whose block takes other arguments than the one of Petals")
    theirs = bloom.BloomBlock(BloomConfig(hidden_size=48, n_head=heads, n_layer=1)).eval()
    ours = seeded_block(small_spec("bloom", heads=heads))
    # Both declare their layers in the order in which they are used, with weight before bias.
    for target, source in zip(theirs.parameters(), ours.parameters(), strict=True):
        target.data.copy_(source)
    hidden = torch.randn(1, 7, 48)
    ones = torch.ones(1, 7)
    is_future = torch.ones(7, 7, dtype=torch.bool).triu(1)[None, None]
    alibi = bloom.build_alibi_tensor(ones, num_heads=heads, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(hidden, alibi=alibi, attention_mask=is_future)[0]
        torch.testing.assert_close(ours(hidden, None)[0], expected)


def test_the_first_token_of_opt_attends_to_itself_alone():
    """Its attention is its value, so the block can be computed by hand."""
    block = seeded_block(small_spec("opt"))
    hidden = torch.randn(1, 1, 48)
    _, _, value = block.query_key_value(block.attention_norm(hidden)).view(1, 1, 6, 3, 8).unbind(3)
    attended = hidden + block.dense(value.flatten(2))
    expected = attended + block.down(torch.relu(block.up(block.mlp_norm(attended))))
    torch.testing.assert_close(block(hidden, None)[0], expected)
    assert math.isfinite(expected.sum())
