"""Other heads, losses on features, several looks: `layers`, `topk`, `features.*`, `inference.*`; the two presets' sizes."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import TIMM, timm_tower
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from solution.bundles.members import build_member, load_member, random_towers, save_member
from solution.config import AdapterConfig, ConfigError, FeatureLossConfig, InferenceConfig, override
from solution.models.feature_losses import alignment, feature_losses, supervised_contrast, uniformity
from solution.models.flops import at_side, member_flops, scoring_flops
from solution.models.streams import as_two_class, focal_loss
from solution.models.towers import count_parameters
from solution.presets import preset
from solution.records import Batch

ROOT = Path(__file__).resolve().parents[2]
LABELS = torch.tensor([0, 1, 0, 1])


def pictures(side=32, count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def on_timm(kind, family="dinov3", *settings, **changes):
    base = preset("tiny", kind)
    view = replace(base.view, resize=32, side=32)
    config = replace(base, view=view, tower=timm_tower(family), adapter=AdapterConfig("none"), **changes)
    return override(config, settings)


def member_of(config, seed=0):
    torch.manual_seed(seed)
    return build_member(config, random_towers([config])).eval()


# ------------------------------------------------------------------------------------------------ losses on features
def test_losses_on_features_by_hand():
    unit = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    # Squared distances: 2, 4, 2.
    mean = (2 * math.exp(-4) + math.exp(-8)) / 3
    assert uniformity(unit).item() == pytest.approx(math.log(mean), rel=1e-5)
    assert alignment(unit, labels).item() == pytest.approx(2.0)
    # The first sees 0 (its own class) and -1, the second 0 and 0; the third has no other of its class.
    first = -math.log(1 / (1 + math.exp(-1 / 0.5)))
    second = -math.log(1 / 2)
    assert supervised_contrast(unit, labels, 0.5).item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_without_a_pair_they_are_nothing_and_have_a_gradient():
    features = torch.randn(1, 4, requires_grad=True)
    config = FeatureLossConfig(uniformity=1.0, alignment=1.0, contrast=1.0)
    loss, parts = feature_losses(config, features, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 0 and parts == {"uniformity": 0.0, "alignment": 0.0, "contrast": 0.0}
    assert feature_losses(FeatureLossConfig(), features, torch.tensor([1])) == (None, {})


@pytest.mark.parametrize("kind", ["global", "fusion", "qtfp", "layers", "topk"])
def test_any_member_takes_them(kind):
    config = override(preset("tiny", kind), ["features.uniformity=0.5", "features.contrast=2"])
    member, images = member_of(config), pictures(config.view.side)
    batch = Batch(images, LABELS)
    output = member(images)
    plain, parts = member.loss(output, batch)
    total, more = member.training_loss(output, batch)
    expected = plain + 0.5 * more["uniformity"] + 2 * more["contrast"]
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert set(more) == set(parts) | {"uniformity", "contrast"}


def test_features_at_length_one_are_what_the_head_reads():
    member = member_of(override(preset("tiny", "global"), ["stream.normalize=true"]))
    output = member(pictures(56))
    torch.testing.assert_close(output.features.norm(dim=1), torch.ones(4))
    logits = member.head(output.features)
    torch.testing.assert_close(output.logit, logits[:, 1] - logits[:, 0])


# ------------------------------------------------------------------------------------------------ layers
@pytest.mark.parametrize("family", TIMM)
def test_layers_reads_prefix_and_mean_patch_of_the_last_blocks(family):
    member, images = member_of(on_timm("layers", family)), pictures()
    tower = member.tower
    count, prefix = tower.config.arch.layers, tower.prefix
    with torch.no_grad():
        output = member(images)
        hidden = tower(images, keep=(count - 1, count)).hidden
        for place, number in enumerate((count - 1, count)):
            tokens = tower.last_norm(hidden[number])
            read = [tokens[:, prefix:].mean(1), *(tokens[:, i] for i in range(prefix))]
            expected = member.heads[place](torch.cat(read, dim=1))
            torch.testing.assert_close(output.logits[:, place], expected)
        torch.testing.assert_close(output.logit, output.logits[:, -1, 1] - output.logits[:, -1, 0])


def test_layers_is_supervised_at_every_head():
    member = member_of(on_timm("layers", "dinov3", "layers.deep=0.25"))
    batch = Batch(pictures(), LABELS)
    output = member(batch.images)
    loss, _ = member.loss(output, batch)
    each = [F.cross_entropy(output.logits[:, i], LABELS) for i in range(2)]
    torch.testing.assert_close(loss, each[1] + each[0] / 4)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in member.heads.parameters())
    with pytest.raises(ConfigError, match=r"layers.last is 9; the tower has 3"):
        on_timm("layers", "dinov3", "layers.last=9")


# ------------------------------------------------------------------------------------------------ topk
def test_topk_is_the_mean_of_the_highest_patches():
    member = member_of(on_timm("topk", "siglip2", "topk.share=0.25"))
    with torch.no_grad():
        output = member(pictures())
    logits = output.evidence["patch_logits"].flatten(1)
    assert logits.shape == (4, 16)
    torch.testing.assert_close(output.logit, logits.sort(dim=1, descending=True).values[:, :4].mean(1))
    all_of_them = member_of(on_timm("topk", "siglip2", "topk.share=1"))
    with torch.no_grad():
        torch.testing.assert_close(all_of_them(pictures()).logit, logits.mean(1))


@pytest.mark.parametrize("kind", ["global", "fusion", "topk"])
def test_the_focal_loss_is_the_configured_one(kind):
    settings = ["stream.focal_gamma=3", "stream.focal_alpha=0.25"]
    member = member_of(override(preset("tiny", kind), settings))
    batch = Batch(pictures(member.config.view.side), LABELS)
    output = member(batch.images)
    loss, _ = member.loss(output, batch)
    torch.testing.assert_close(loss, focal_loss(as_two_class(output.logit), LABELS, gamma=3.0, alpha=0.25))


@pytest.mark.parametrize("kind", ["layers", "topk"])
def test_flops_of_the_new_kinds_are_those_of_the_forward(kind):
    member = member_of(preset("tiny", kind))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        member(pictures(member.config.view.side, count=1))
    assert counter.get_total_flops() == member_flops(member.config)


@pytest.mark.parametrize("kind", ["layers", "topk"])
def test_the_new_kinds_are_stored_and_loaded(kind, tmp_path):
    config = override(preset("tiny", kind), ["adapter.kind=lora"])
    member = member_of(config)
    save_member(member, tmp_path / kind, dtype=torch.float32)
    again = load_member(tmp_path / kind, {config.tower.name: member.tower})
    images = pictures(config.view.side)
    with torch.no_grad():
        torch.testing.assert_close(again.judge(images), member.judge(images), atol=0, rtol=0)


# ------------------------------------------------------------------------------------------------ several looks
def test_looks_at_several_sides_and_mirrored_are_averaged():
    config = on_timm("global", "pe", inference=InferenceConfig(sides=(32, 48), mirrored=True))
    member, images = member_of(config), pictures(48)
    assert (config.seen.side, config.seen.resize, config.inference.looks) == (48, 48, 4)
    with torch.no_grad():
        large = images.float() / 255
        small = F.interpolate(large, (32, 32), mode="bilinear", antialias=True, align_corners=False)
        views = [view for x in (small, large) for view in (x, x.flip(-1))]
        expected = torch.stack([member(view).logit for view in views]).mean(0)
        torch.testing.assert_close(member.judge(images), expected)
        assert (member.judge(images) - member(images).logit).abs().max() > 1e-4
    small, large = (member_flops(at_side(config, side)) for side in (32, 48))
    assert scoring_flops(config) == 2 * (small + large)


def test_one_look_is_the_members_own():
    member, images = member_of(on_timm("global")), pictures()
    with torch.no_grad():
        torch.testing.assert_close(member.judge(images), member(images).logit, atol=0, rtol=0)


@pytest.mark.parametrize(
    "kind, settings, why",
    [
        ("vlaforge", ["inference.sides=128"], "takes pictures of one side"),
        ("fusion", ["inference.sides=112"], "takes pictures of one side"),
        ("global", ["inference.sides=100"], "no multiple of the patch 14"),
        ("global", ["inference.sides=112,112"], "stands twice"),
    ],
)
def test_sides_that_cannot_be_are_refused(kind, settings, why):
    with pytest.raises(ConfigError, match=why):
        override(preset("tiny", kind), settings)


# ------------------------------------------------------------------------------------------------ published sizes
def test_dinov3_has_the_published_sizes():
    config = preset("dinov3", "dinov3")
    member = build_member(config, random_towers([config], device="meta")).to("meta")
    trainable, total = count_parameters(member)
    lora = 24 * 32 * (1024 + 3 * 1024)  # on timm's packed qkv
    heads = 4 * (6144 * 1024 + 1024 + 1024 * 2 + 2)
    assert trainable == lora + heads == 28_323_848
    assert total == 303_079_424 + trainable == 331_403_272
    assert config.seen.side == 656


def test_gend_has_the_published_sizes():
    config = preset("gend", "gend")
    member = build_member(config, random_towers([config], device="meta")).to("meta")
    trainable, total = count_parameters(member)
    norms = (24 * 2 + 3) * 2 * 1024  # of the blocks, before and after them, and in the pooling
    assert trainable == norms + 1024 * 2 + 2 == 106_498
    assert total == 316_102_656 + 2050 == 316_104_706
    assert round(100 * trainable / total, 2) == 0.03


def kept_bytes(config):
    """What autograd keeps of a forward of one picture, its weights aside; computed without computing."""
    member = build_member(config, random_towers([config], device="meta")).to("meta").train()
    kept, weights = {}, {p.untyped_storage()._cdata for p in member.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = member(torch.zeros(1, 3, config.view.side, config.view.side, device="meta"))
    assert output.logit.requires_grad
    return sum(size for key, size in kept.items() if key not in weights)


@pytest.mark.parametrize("name", ["dinov3", "gend"])
def test_the_table_of_other_entries_says_what_they_cost(name):
    text = (ROOT / "solution/README.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    *_, trains, flops, _, _ = row.split("|")
    config = preset(name, name)
    assert re.findall(r"[\d,]+", flops)[0] == f"{member_flops(config, adapters=False) / 1e9:,.0f}"
    if config.inference.sides:
        assert f"{config.seen.side} px {scoring_flops(config) / 1e9:,.0f}" in flops
    member = build_member(config, random_towers([config], device="meta")).to("meta")
    assert trains.strip() == "{:,} of {:,}".format(*count_parameters(member))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov3", "gend"])
def test_the_table_of_other_entries_says_what_they_keep(name):
    text = (ROOT / "solution/README.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    config = preset(name, name)
    assert f"{kept_bytes(config) / 1e9:.2f} GB a picture" in row


STEP = """
import resource, torch
from solution.bundles.members import build_member, random_towers
from solution.models.optimization import make_optimizer, phases
from solution.presets import preset
from solution.records import Batch
config = preset("gend", "gend")
member = build_member(config, random_towers([config])).train()
optimizer = make_optimizer(member, phases(config)[0])
batch = Batch(torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8), torch.tensor([0, 1]))
loss, _ = member.training_loss(member(batch.images), batch)
loss.backward()
optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_step_of_gend_at_its_size_takes_the_memory_stated():
    done = subprocess.run([sys.executable, "-c", STEP], cwd=ROOT, check=True, capture_output=True, text=True)
    # Weights 1.26 GB, two pictures 0.67 GB, and the libraries; building the blocks holds one block twice.
    assert int(done.stdout) * 1024 < 3.5e9
