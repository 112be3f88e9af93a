"""Attention of a block: plain products in bfloat16 on a CPU, torch's fused one everywhere else."""

import pytest
import torch
import torch.nn.functional as F

from solution.models import blocks
from solution.models.blocks import attend


def heads(seed=0, *, common=0.0, n=50, m=60):
    """Queries (2, 3, n, 16), keys and values (2, 3, m, 16), the keys with a part that all of them share."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, count, 16, generator=g) for count in (n, m, m))
    return q, k + common * torch.randn(2, 3, 1, 16, generator=g), v


def error(given, truth):
    return (given.float() - truth).square().mean().sqrt().item()


@pytest.mark.parametrize("common", [0.0, 8.0])
def test_plain_attention_departs_no_further_than_the_fused_one(common):
    narrow = [x.bfloat16() for x in heads(common=common)]
    truth = F.scaled_dot_product_attention(*(x.float() for x in narrow))
    with torch.inference_mode():
        found, fused = attend(*narrow), F.scaled_dot_product_attention(*narrow)
    assert found.shape == truth.shape and found.dtype == torch.bfloat16
    assert error(found, truth) < 1.5 * error(fused, truth) + 1e-3
    assert error(found, truth) < 0.01


def test_what_keys_share_would_cost_digits():
    q, k, v = (x.bfloat16() for x in heads(common=8.0))
    truth = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    as_it_is = (q * 0.25 @ k.transpose(-1, -2)).softmax(dim=-1) @ v
    with torch.inference_mode():
        assert error(as_it_is, truth) > 2 * error(attend(q, k, v), truth)


def test_everything_else_is_the_fused_one(monkeypatch):
    q, k, v = heads()
    narrow = [x.bfloat16() for x in (q, k, v)]
    with torch.inference_mode():
        assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
        few = attend(*narrow)
        monkeypatch.setattr(blocks, "MOST_KEYS", 59)
        many = attend(*narrow)
    assert torch.equal(many, F.scaled_dot_product_attention(*narrow)) and not torch.equal(few, many)
    monkeypatch.undo()
    assert torch.equal(attend(*narrow), many)  # with gradients
