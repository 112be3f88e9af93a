"""The three streams: sizes, losses by hand, gradients where they belong, batches of one."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import make_member

from solution.bundles.members import build_member, random_towers
from solution.config import AdapterConfig
from solution.models.streams import as_two_class, focal_loss, two_class_logit
from solution.presets import preset
from solution.records import Batch


def batch(member, count=4, seed=1):
    side = member.config.view.side
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(count) % 2)


def test_focal_loss_by_hand():
    logits, labels = (
        torch.tensor([[0.2, 1.0], [2.0, -1.0], [0.0, 0.0]]),
        torch.tensor([1, 1, 0]),
    )
    expected = 0.0
    for (real, fake), label in zip(logits.tolist(), labels.tolist()):
        p = math.exp((real, fake)[label]) / (math.exp(real) + math.exp(fake))
        expected += -0.7 * (1 - p) ** 2 * math.log(p) / 3
    assert focal_loss(logits, labels, gamma=2, alpha=0.7).item() == pytest.approx(expected, abs=1e-6)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(focal_loss(logits, labels, gamma=0), plain)


def test_a_logit_is_the_softmax_of_two_classes():
    logits = torch.randn(5, 2)
    torch.testing.assert_close(two_class_logit(logits).sigmoid(), logits.softmax(1)[:, 1])
    torch.testing.assert_close(two_class_logit(as_two_class(logits[:, 0])), logits[:, 0])


@pytest.mark.parametrize("name", ["global", "face", "fusion"])
def test_a_score_alone_equals_the_score_in_a_batch(name):
    member = make_member(name).eval()
    images = batch(member).images
    with torch.no_grad():
        together = member(images).logit
        alone = torch.cat([member(image[None]).logit for image in images])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    assert together.shape == (4,)


@pytest.mark.parametrize("name", ["global", "face", "fusion"])
def test_gradients_reach_what_trains_and_nothing_else(name):
    adapter = AdapterConfig("lora", rank=2, dropout=0.0)
    member = make_member(name, adapter=adapter).train()
    for key, tensor in member.stored_state().items():
        if key.endswith("lora_B"):
            torch.nn.init.normal_(tensor, std=0.1)
    data = batch(member)
    loss, parts = member.loss(member(data.images), data)
    loss.backward()
    assert parts["focal"] == pytest.approx(loss.item())
    trained = {id(t) for t in member.stored_state().values()}
    for key, parameter in member.named_parameters():
        reached = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert reached == (id(parameter) in trained), key


def test_a_whole_tower_trains_when_asked():
    member = make_member("wide")
    still = {n for n, p in member.tower.named_parameters() if not p.requires_grad}
    assert still == {"model.embeddings.mask_token"}  # the one weight no forward uses
    assert len(member.trained_tower_keys()) > 30


def test_fusion_keeps_clip_still():
    member = make_member("fusion").train()
    assert not member.clip.training and member.tower.training
    assert not any(p.requires_grad for p in member.clip.parameters())
    data = batch(member)
    width = 2 * member.tower.width + member.clip.width  # class token and spread, and CLIP's class token
    assert member(data.images).features.shape == (4, width)


def test_the_clip_of_a_fusion_sees_the_view_at_its_own_side():
    config = preset("tiny", "fusion")
    arch = replace(config.clip.arch, image_side=28)
    config = replace(config, clip=replace(config.clip, arch=arch))
    member = build_member(config, random_towers([config])).eval()
    images = batch(member).images
    small = torch.nn.functional.interpolate(images / 255, (28, 28), mode="bilinear", antialias=True)
    with torch.no_grad():
        features = member(images).features
        torch.testing.assert_close(features[:, member.pooled_width :], member.clip(small).cls_token)
        torch.testing.assert_close(member(images / 255).features, features)


def test_a_stream_reads_the_patches_spread_beside_the_class_token():
    member = make_member("face").eval()
    images = batch(member).images
    with torch.no_grad():
        tokens = member.tower(images)
        features = member(images).features
    deviation = tokens.patch_tokens.numpy().std(axis=1)
    torch.testing.assert_close(features[:, member.tower.width :], torch.from_numpy(deviation))
    torch.testing.assert_close(features[:, : member.tower.width], tokens.cls_token)
    plain = replace(member.config, stream=replace(member.config.stream, spread=False))
    assert build_member(plain, random_towers([plain])).pooled_width == member.tower.width


def test_giant_fusion_head_has_the_published_shape():
    config = preset("giant", "fusion")
    member = build_member(config, random_towers([config], device="meta"), decompose=False)
    shapes = [tuple(p.shape) for n, p in member.own_parameters().items() if n.endswith("weight")]
    assert shapes == [(512, 2560), (2, 512)]
