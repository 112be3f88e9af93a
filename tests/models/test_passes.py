"""One pass where several members look at the same pictures through the same weights."""

from dataclasses import replace

import pytest
import torch

from solution.bundles.bundle import write_bundle
from solution.bundles.members import build_member, random_towers, save_member
from solution.config import AdapterConfig, VoteConfig
from solution.models.passes import one_pass_each
from solution.models.towers import Tower
from solution.presets import preset
from solution.scoring.ensemble import load_ensemble

SIDE = 56


def configs():
    """`fusion`, `qtfp` and `vlaforge` on the frozen tower of `global`, one view for all."""
    whole, frozen = preset("tiny", "global"), AdapterConfig("none")
    fusion = replace(preset("tiny", "fusion"), tower=whole.tower, adapter=frozen, view=whole.view)
    qtfp = replace(preset("tiny", "qtfp"), tower=whole.tower, adapter=frozen, view=whole.view)
    vlaforge = preset("tiny", "vlaforge")
    vlaforge = replace(
        vlaforge,
        view=whole.view,
        tower=replace(vlaforge.tower, source=f"bundle:{whole.tower.name}"),
        vlaforge=replace(vlaforge.vlaforge, input_side=SIDE, patch=14),
    )
    return [whole, fusion, qtfp, vlaforge]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    torch.manual_seed(0)
    for config in [preset("tiny", "semantic"), *configs()]:
        member = build_member(config, random_towers([config]))
        with torch.no_grad():
            for key, value in member.stored_state().items():
                if key.startswith("own.") and value.is_floating_point():
                    value.mul_(3)
        save_member(member, folder / config.name)
    names = [config.name for config in configs()]
    return write_bundle(folder, names, VoteConfig(dict.fromkeys(names, 1)), {})


@pytest.fixture
def passes(monkeypatch):
    """What is computed from here on: the stored name of the tower of every walk through the blocks."""
    made = []
    embed = Tower.place

    def counted(self, images):
        made.append(self.config.stored_name)
        return embed(self, images)

    monkeypatch.setattr(Tower, "place", counted)
    return made


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_four_members_on_one_tower_make_one_pass_and_say_what_each_says_alone(bundle, passes):
    together, views = load_ensemble(bundle, "cpu", exact=True), pictures(3)
    assert len(together.views) == 1
    passes.clear()
    logits = together.launch([views])
    shared = preset("tiny", "global").tower.name
    assert passes.count(shared) == 1
    assert len(passes) == 2  # and fusion's second tower
    for row, name in enumerate(together.members):
        passes.clear()
        alone = load_ensemble(bundle, "cpu", exact=True, members=[name]).launch([views])
        torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=1e-5)
        assert passes.count(shared) == 1
    assert logits.std(dim=1).min() > 1e-4  # they do say something


def test_nothing_is_kept_and_other_pictures_get_their_own_pass(bundle):
    ensemble = load_ensemble(bundle, "cpu", exact=True)
    first, second = pictures(4)[:2], pictures(4)[2:]
    both = torch.cat([ensemble.launch([first.contiguous()]), ensemble.launch([second.contiguous()])], dim=1)
    torch.testing.assert_close(both, ensemble.launch([pictures(4)]), atol=1e-5, rtol=1e-5)
    assert all(tower.passes is None for member in ensemble.members.values() for tower in member.towers())


def test_a_pass_without_patches_serves_no_one_who_reads_them(bundle, passes):
    members = load_ensemble(bundle, "cpu", exact=True).members
    views = pictures(2)
    passes.clear()
    with torch.inference_mode(), one_pass_each(members.values()):
        class_alone = members["fusion"].judge(views)
        whole = members["qtfp"].judge(views)
        again = members["fusion"].judge(views)
    assert passes.count(preset("tiny", "global").tower.name) == 2
    torch.testing.assert_close(class_alone, again, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(whole).all()


def test_adapters_and_towers_of_one_member_share_nothing():
    whole = preset("tiny", "global")
    adapted = replace(preset("tiny", "face"), tower=whole.tower, adapter=AdapterConfig("lora", rank=4), view=whole.view)
    towers = random_towers([whole])
    members = [build_member(whole, towers), build_member(adapted, towers)]
    views = pictures(2)
    with torch.no_grad():
        for key, value in members[1].stored_state().items():
            if key.endswith("lora_B"):
                value.normal_(std=0.5)
        members[1].tower.use(members[1].adapter)
        expected = members[1].eval().judge(views)
        with one_pass_each(members):
            members[0].tower.use(None)
            members[0].eval().judge(views)
            members[1].tower.use(members[1].adapter)
            torch.testing.assert_close(members[1].judge(views), expected)
        with one_pass_each(members[:1]):
            assert members[0].tower.passes is None
