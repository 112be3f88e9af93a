"""The vision-language member: CLIP untouched, one pass enough, sentences, losses by hand, gradients where they belong."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import CLIP as ARCH
from tiny import VLAFORGE as SETTINGS
from torch import nn

from solution.config import (
    DINOV2_IN_CLIP,
    AdapterConfig,
    ClipArch,
    MemberConfig,
    TowerConfig,
    ViewConfig,
    VlaforgeConfig,
    from_dict,
    to_dict,
)
from solution.evaluation.metrics import auc
from solution.models import vlaforge as room
from solution.models.flops import member_flops
from solution.models.towers import build_tower, count_parameters, tower_state
from solution.models.vlaforge import (
    ClipPass,
    Vlaforge,
    adapted_pass,
    clip_pass,
    mix_scores,
    run_copies,
)
from solution.presets import preset
from solution.records import Batch


def tiny(seed: int = 0, arch: ClipArch = ARCH, settings: VlaforgeConfig = SETTINGS) -> Vlaforge:
    torch.manual_seed(seed)
    tower = TowerConfig("tiny-clip", "clip", arch, statistics="clip")
    config = MemberConfig(
        "vlaforge",
        ViewConfig("image", settings.input_side, settings.input_side),
        tower,
        AdapterConfig("none"),
        vlaforge=settings,
    )
    member = Vlaforge(config, build_tower(tower))
    for layer in member.tower.layers:  # torch starts them at 0, and 0 hides mistakes
        for role in "qkvo":
            nn.init.normal_(getattr(layer.attn, role).bias, std=0.2)
    return member


def pictures(count: int, seed: int = 1, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def batch_of(count: int, known: list[bool] | None = None) -> Batch:
    """Real and fake in turn; the fakes are forged in their upper left quarter and a soft edge."""
    labels = torch.arange(count) % 2
    masks = torch.zeros(count, 64, 64)
    masks[labels == 1, :32, :32] = 1.0
    masks[labels == 1, 32:40, :32] = 0.3
    known_mask = torch.tensor(known) if known else torch.ones(count, dtype=torch.bool)
    return Batch(pictures(count), labels, masks, known_mask)


# ------------------------------------------------------------------------------------------------ CLIP untouched
def plain_open_clip(member: Vlaforge) -> nn.Module:
    """open_clip's own model with its packed attention again, holding the tower's weights."""
    model = copy.deepcopy(member.tower.model)
    for layer in model.visual.transformer.resblocks:
        split, width = layer.attn, member.tower.width
        packed = nn.MultiheadAttention(width, member.tower.heads, batch_first=True)
        with torch.no_grad():
            packed.in_proj_weight.copy_(torch.cat([split.q.weight, split.k.weight, split.v.weight]))
            packed.in_proj_bias.copy_(torch.cat([split.q.bias, split.k.bias, split.v.bias]))
            packed.out_proj.load_state_dict(split.o.state_dict())
        layer.attn = packed
    return model.eval()


def joint_mask(bias: torch.Tensor) -> torch.Tensor:
    """bias (B, heads, Q, N) -> the additive mask (B * heads, L, L) of the sequence copies, class token, patches."""
    count, heads, queries, patches = bias.shape
    mask = torch.zeros(count, heads, queries + 1 + patches, queries + 1 + patches)
    mask[..., :queries] = -math.inf  # nobody attends to the copies ...
    mask[..., range(queries), range(queries)] = 0.0  # ... but each to itself
    mask[:, :, :queries, queries] = -math.inf  # and no copy to the class token
    mask[:, :, :queries, queries + 1 :] = bias
    return mask.flatten(0, 1)


@pytest.mark.parametrize(
    "arch",
    [ARCH, replace(ARCH, **DINOV2_IN_CLIP)],
    ids=["openai", "compact"],
)
def test_under_any_bias_clip_stays_open_clip_and_copies_match_the_joint_pass(arch):
    member = tiny(arch=arch)
    if arch.layer_scale:
        for layer in member.tower.layers:
            nn.init.normal_(layer.ls_1.gamma), nn.init.normal_(layer.ls_2.gamma)
    model, tower = plain_open_clip(member), member.tower
    images = torch.rand(2, 3, 56, 56)
    bias = 3 * torch.randn(2, 4, 8, 16)
    with torch.no_grad():
        x, _ = tower.embed(images)
        model.visual.output_tokens = True
        pooled, patches = model.visual(tower.normalize(images))
        joint = torch.cat([x[:, :1].expand(-1, 8, -1), x], dim=1)
        for layer in model.visual.transformer.resblocks:
            joint = layer(joint, attn_mask=joint_mask(bias))
        joint = model.visual.ln_post(joint)
    seen = clip_pass(tower, images, (2,))
    copies = run_copies(tower, seen, bias)
    torch.testing.assert_close(joint[:, 9:], patches, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.patch_tokens, patches, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.cls_token @ model.visual.proj, pooled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(joint[:, 8], seen.cls_token, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(joint[:, :8], copies, atol=1e-5, rtol=1e-4)
    assert (copies - seen.cls_token[:, None]).abs().max() > 0.01  # the bias does act


@pytest.mark.parametrize("depth", [0, 2])
def test_one_pass_gives_the_scores_of_the_straightforward_three(depth):
    from solution.benchmark import three_passes

    member = tiny(settings=replace(SETTINGS, depth=depth, fusion_after=(1, 2), fusion_layers=(1, 2))).eval()
    plain = three_passes(member)
    with torch.no_grad():
        quick, straight = member(pictures(3)), plain(pictures(3))
    torch.testing.assert_close(quick.logit, straight.logit, atol=1e-4, rtol=0)
    for name, found in quick.evidence.items():
        torch.testing.assert_close(found, straight.evidence[name], atol=1e-4, rtol=0)
    assert "look" not in vars(member)  # the reference left the member as it was


def test_clip_pass_agrees_with_the_tower_and_keeps_the_layers_asked_for():
    member = tiny()
    images = torch.rand(2, 3, 56, 56)
    seen, plain = (
        clip_pass(member.tower, images, (1, 3)),
        member.tower(images, keep=(1, 3)),
    )
    torch.testing.assert_close(seen.cls_token, plain.cls_token)
    torch.testing.assert_close(seen.patch_tokens, plain.patch_tokens)
    assert set(seen.hidden) == {1, 3} and len(seen.keys) == len(seen.values) == 3
    for number, tokens in seen.hidden.items():
        torch.testing.assert_close(tokens, plain.hidden[number][:, 1:])


def test_what_stands_behind_the_depth_is_not_read():
    """A member of depth two scores as one on the tower's first two blocks, and no change of the third reaches it."""
    short = tiny(
        arch=replace(ARCH, layers=2), settings=replace(SETTINGS, fusion_after=(1, 2), fusion_layers=(1, 2))
    ).eval()
    member = tiny(settings=replace(SETTINGS, depth=2, fusion_after=(1, 2), fusion_layers=(1, 2))).eval()
    left = {k: v for k, v in member.state_dict().items() if "resblocks.2." not in k}
    short.load_state_dict(left)
    images = pictures(3)
    with torch.no_grad():
        deep, expected = member(images), short(images)
        torch.testing.assert_close(deep.logit, expected.logit)
        for parameter in member.tower.layers[-1].parameters():
            parameter.normal_()
        torch.testing.assert_close(member(images).logit, expected.logit)
    assert member_flops(member.config) == member_flops(short.config)
    with pytest.raises(ValueError, match=r"vlaforge.depth is 4; the tower has 3 blocks"):
        tiny(settings=replace(SETTINGS, depth=4))
    with pytest.raises(ValueError, match=r"vlaforge.fusion_layers .*: 1..2"):
        tiny(settings=replace(SETTINGS, depth=2, fusion_after=(1, 2), fusion_layers=(1, 3)))


def test_a_copy_without_bias_is_the_class_token():
    member = tiny()
    seen = clip_pass(member.tower, torch.rand(2, 3, 56, 56), ())
    copies = run_copies(member.tower, seen, torch.zeros(2, 4, 3, 16))
    torch.testing.assert_close(copies, seen.cls_token[:, None].expand(-1, 3, -1), atol=1e-5, rtol=1e-4)


def test_a_bias_that_forbids_all_but_one_patch_makes_copies_of_two_keys():
    """With every patch but one at -1e4, a copy's attention in one head is a two-way softmax: patch against itself."""
    member = tiny()
    seen = clip_pass(member.tower, torch.rand(1, 3, 56, 56), ())
    bias = torch.full((1, 4, 1, 16), -1e4)
    bias[..., 5] = 0.7
    block = next(iter(member.tower.blocks()))
    x = seen.start
    with torch.no_grad():
        found = room._copy_block(block, x, seen.keys[0], seen.values[0], bias, 4)
        h = block.norm1(x)[0, 0]
        q, k, v = (p(h).view(4, 8) for p in (block.q, block.k, block.v))
        heads = []
        for head in range(4):
            key, value = seen.keys[0][0, head, 5], seen.values[0][0, head, 5]
            p = torch.sigmoid(q[head] @ (key - k[head]) / math.sqrt(8) + 0.7)
            heads.append(p * value + (1 - p) * v[head])
        y = x + block.o(torch.cat(heads))
        expected = y + block.mlp(block.norm2(y))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_adapter_changes_later_blocks_copies_and_patches_and_nothing_before_it():
    """The joint sequence under a mask, its patches changed after the second block, against the stored keys' way."""
    member = tiny(settings=replace(SETTINGS, adapter=True, adapter_share=2.0))
    tower, adapter = member.tower, member.adapter_of_patches
    images, bias = torch.rand(2, 3, 56, 56), 3 * torch.randn(2, 4, 8, 16)
    with torch.no_grad():
        model = plain_open_clip(member)
        x, _ = tower.embed(images)
        joint = torch.cat([x[:, :1].expand(-1, 8, -1), x], dim=1)
        for number, layer in enumerate(model.visual.transformer.resblocks, start=1):
            joint = layer(joint, attn_mask=joint_mask(bias))
            if number == 2:
                inner = F.relu(F.linear(joint[:, 9:], *adapter.down.parameters()))
                change = F.linear(inner, *adapter.up.parameters())
                joint = torch.cat([joint[:, :9], joint[:, 9:] + 2 * change], dim=1)
        joint = model.visual.ln_post(joint)
        plain = clip_pass(tower, images, (1, 3), branch=2)
        seen = adapted_pass(tower, plain, adapter, 2)
        copies = run_copies(tower, seen, bias)
    torch.testing.assert_close(seen.adapted, inner, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(joint[:, 9:], seen.patch_tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(joint[:, :8], copies, atol=1e-5, rtol=1e-4)
    assert (seen.patch_tokens - plain.patch_tokens).abs().max() > 0.1
    assert seen.cls_token is plain.cls_token and seen.hidden is plain.hidden


def test_the_copies_of_a_new_member_are_directed_and_differ():
    """The attention bias has the size of attention scores at the start, differs by query, and shows in the copies."""
    member = tiny().eval()
    with torch.no_grad():
        output, seen = member(pictures(4)), member.look(pictures(4).float() / 255)
        bias = output.bias.flatten(3)
        copies = member.directed_classes(seen, bias)  # (B, Q, E)
        plain = member.project(seen.cls_token)[:, None]
    assert 0.5 < bias.std(dim=-1).mean() < 4
    centred = F.normalize(bias - bias.mean(dim=-1, keepdim=True), dim=-1)
    assert (centred @ centred.transpose(-1, -2)).mean() < 0.8
    assert (copies - plain).norm(dim=-1).mean() > 0.01
    assert copies.std(dim=1).mean() > 1e-3


# ------------------------------------------------------------------------------------------------ the sentences
def test_the_placeholder_is_token_seven_of_clips_tokenizer():
    import open_clip

    sentences, place, vocab = room.prompt_tokens()
    rows = open_clip.get_tokenizer("ViT-L-14")(list(room.PROMPTS))
    assert place == 7 and vocab == 49408
    for sentence, row in zip(sentences, rows):
        assert list(sentence) == row[: len(sentence)].tolist()
        assert not row[len(sentence) :].any()
        assert open_clip.tokenizer.SimpleTokenizer().decode([sentence[place]]).strip() == "id"
    assert [i for i, pair in enumerate(zip(*sentences)) if pair[0] != pair[1]] == [4]


def test_replacing_the_placeholder_changes_that_embedding_alone():
    member = tiny()
    words = member.tower.model.token_embedding(member.tokens)
    identity = torch.randn(3, 16)
    found = room.prompt_embeddings(member.tower, member.tokens, member.place, identity)
    assert found.shape == (3, 2, words.shape[1], 16)
    for b in range(3):
        for s in range(2):
            for t in range(words.shape[1]):
                expected = identity[b] if t == 7 else words[s, t]
                assert torch.equal(found[b, s, t], expected)


def test_two_b_sentences_in_one_call_equal_two_b_calls_of_open_clip():
    """One padded sentence at a time through open_clip's own `encode_text`, its placeholder embedding replaced."""
    import open_clip

    member = tiny()
    model = member.tower.model.eval()
    classes = F.normalize(torch.randn(3, 24), dim=-1)
    with torch.no_grad():
        together = member.sentences(classes)  # (3, 2, 24)
        identity = member.to_words(classes)
        rows = open_clip.get_tokenizer("ViT-L-14")(list(room.PROMPTS))
        for b in range(3):

            def put(module, args, words, b=b):
                words = words.clone()
                words[:, 7] = identity[b]
                return words

            hook = model.token_embedding.register_forward_hook(put)
            for s in range(2):
                alone = model.encode_text(rows[s : s + 1], normalize=True)[0]
                torch.testing.assert_close(together[b, s], alone, atol=1e-5, rtol=1e-4)
            hook.remove()


def test_the_causal_mask_is_on():
    """What stands after the placeholder cannot change the states before it: only later tokens feel an identity."""
    member = tiny()
    states = []
    hook = member.tower.model.transformer.register_forward_hook(lambda module, args, out: states.append(out))
    with torch.no_grad():
        member.sentences(torch.randn(1, 24)), member.sentences(torch.randn(1, 24))
    hook.remove()
    difference = (states[0] - states[1]).abs().amax(dim=(0, 2))  # (L,)
    assert (difference[:7] == 0).all() and (difference[7:] > 0).all()


def test_the_text_tower_is_called_once_with_two_rows_a_picture():
    member = tiny().eval()
    shapes = []
    hook = member.tower.model.transformer.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    with torch.no_grad():
        member(pictures(5))
    hook.remove()
    assert [tuple(s) for s in shapes] == [(10, len(member.tokens[0]), 16)]


def test_a_small_learned_vocabulary_keeps_the_sentences_words_apart():
    arch = replace(ARCH, vocab=12, context=11)
    member = tiny(arch=arch, settings=replace(SETTINGS, train_text=True))
    full = tiny(settings=replace(SETTINGS, train_text=True))
    pairs = set(zip(full.tokens.flatten().tolist(), member.tokens.flatten().tolist()))
    assert len(pairs) == 12 == len({new for _, new in pairs})
    assert member.tokens.argmax(dim=1).tolist() == full.tokens.argmax(dim=1).tolist()  # the end token stays the largest


# ------------------------------------------------------------------------------------------------ the member
def test_a_score_alone_equals_the_score_in_a_batch_of_any_dtype():
    member = tiny().eval()
    images = pictures(4)
    with torch.no_grad():
        together = member(images)
        alone = torch.cat([member(images[i : i + 1]).logit for i in range(4)])
        as_float = member(images.float() / 255).logit
    torch.testing.assert_close(together.logit, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.logit, as_float, atol=1e-5, rtol=1e-4)
    assert together.features.shape == (4, 24) and together.logit.shape == (4,)
    for name in ("localization", "vla"):
        found = together.evidence[name]
        assert found.shape == (4, 1, 4, 4) and ((found >= 0) & (found <= 1)).all()


def test_weights_of_half_the_width_score_nearly_the_same():
    member = tiny().train()
    member(pictures(4))  # statistics other than the first
    member.eval()
    with torch.no_grad():
        exact = member(pictures(4)).logit
        for parameter in member.parameters():  # as a bundle loads them: not the buffers
            parameter.data = parameter.data.to(torch.bfloat16)
        found = member(pictures(4))
    assert found.logit.dtype == found.features.dtype == torch.float32
    torch.testing.assert_close(found.logit, exact, atol=0.03, rtol=0)


def test_batch_norm_in_eval_mode_is_torchs():
    member = tiny().train()
    member(pictures(4))
    ours = member.localize[1].eval()
    theirs = nn.BatchNorm2d(4).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.equal(ours.running_mean, torch.zeros(4))


@pytest.mark.parametrize("losses", ["paper", "code"])
@pytest.mark.parametrize("train_text", [False, True])
def test_gradients_reach_what_trains_and_nothing_else(losses, train_text):
    from solution.config import VLAFORGE_LOSSES

    settings = replace(SETTINGS, train_text=train_text, **VLAFORGE_LOSSES[losses])
    member = tiny(settings=settings).train()
    batch = batch_of(4)
    loss, parts = member.loss(member(batch.images), batch)
    loss.backward()
    assert len(parts) == (5 if losses == "paper" else 8)
    # A constant added to every score of a group, or to a layer that a BatchNorm centres, changes nothing.
    no_effect = {"global_head.pool.0.bias", "global_head.pool.3.bias"}
    no_effect |= {"localize.0.bias", "localize.3.bias", "to_joint.bias"}
    for name, parameter in member.own_parameters().items():
        assert parameter.requires_grad and parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name in no_effect, name
    trained = set(member.trained_tower_keys())
    for key, parameter in tower_state(member.tower).items():
        assert parameter.requires_grad == (key in trained), key
        assert (parameter.grad is not None) == (key in trained), key
        assert key not in trained or parameter.grad.abs().sum() > 0, key
    assert bool(trained) == train_text
    assert all(k.startswith("text.") or k == "proj" for k in trained)


def test_a_learned_text_tower_is_stored_and_a_public_one_is_not():
    learned = tiny(settings=replace(SETTINGS, train_text=True)).stored_state()
    frozen = tiny().stored_state()
    assert {"tower.proj", "tower.text.token", "tower.text.proj"} <= set(learned)
    assert not any(k.startswith("tower.blocks") for k in learned)
    assert not any(k.startswith("tower.") for k in frozen)
    assert "own.perceiver.fusions.0.1.weight" in frozen
    assert "own.tokens" not in frozen  # made from the sentences, never loaded


def test_a_batch_of_one_trains_and_batch_norm_alone_has_a_mode():
    member = tiny().train()
    assert not member.tower.training and member.global_head.training
    for labels in ([0], [1]):
        batch = batch_of(2)
        keep = batch.labels == labels[0]
        one = Batch(
            batch.images[keep],
            batch.labels[keep],
            batch.masks[keep],
            batch.mask_known[keep],
        )
        loss, _ = member.loss(member(one.images), one)
        loss.backward()
        assert loss.isfinite()


def test_an_optimizer_step_leaves_the_image_tower_as_it_was():
    member = tiny(settings=replace(SETTINGS, train_text=True)).train()
    before = {k: t.detach().clone() for k, t in tower_state(member.tower).items()}
    trained = [p for p in member.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    batch = batch_of(4)
    member.loss(member(batch.images), batch)[0].backward()
    optimizer.step()
    keys = set(member.trained_tower_keys())
    for key, tensor in tower_state(member.tower).items():
        assert torch.equal(tensor, before[key]) == (key not in keys), key


def test_checkpointed_copies_have_the_same_gradients():
    member = tiny()
    seen = clip_pass(member.tower, torch.rand(1, 3, 56, 56), ())
    gradients = []
    for member.tower.checkpointing in (False, True):
        bias = torch.ones(1, 4, 2, 16, requires_grad=True)
        run_copies(member.tower, seen, bias * torch.arange(16)).square().sum().backward()
        gradients.append(bias.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_giant_trains_as_many_parameters_as_published():
    config = preset("giant", "vlaforge")
    member = Vlaforge(config, build_tower(config.tower, device="meta"))
    trainable, total = count_parameters(member)
    # Published: 3.3 to 6.4 M. The released code's fusions were no parameters; registered, they add 0.6 M.
    fusions = sum(p.numel() for p in member.perceiver.fusions.parameters())
    assert trainable == 6_638_216 and fusions == 3 * (2 * 1024 + 1025 * 192)
    assert 3.3e6 < trainable - fusions < 6.4e6
    assert total - trainable == 427_616_513  # CLIP ViT-L/14 with its logit scale
    perceiver = sum(p.numel() for p in member.perceiver.blocks.parameters())
    assert perceiver == 8 * 444_864  # timm's vit_tiny_patch16 blocks
    assert isinstance(member.to_words, nn.Identity)  # 768 = 768


def test_misfits_are_named():
    cases = [
        (ARCH, replace(SETTINGS, input_side=80), "patch grid"),
        (replace(ARCH, vocab=12), SETTINGS, "vocab"),
        (
            replace(ARCH, vocab=11),
            replace(SETTINGS, train_text=True),
            "from 12 on",
        ),
        (replace(ARCH, context=10), SETTINGS, "11 tokens"),
        (ARCH, replace(SETTINGS, fusion_layers=(1, 2, 4)), "fusion_layers"),
        (replace(ARCH, text_layers=0), SETTINGS, "text tower"),
        (ARCH, replace(SETTINGS, adapter=True, adapter_after=3), "some must follow"),
    ]
    for arch, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            tiny(arch=arch, settings=settings)
    member = tiny()
    with pytest.raises(ValueError, match="64x64"):
        member(pictures(1, side=56))
    output = member.eval()(pictures(2))
    with pytest.raises(ValueError, match="dice, localization"):
        member.loss(output, Batch(pictures(2), torch.tensor([0, 1])))


def test_without_losses_on_masks_no_masks_are_needed():
    member = tiny(settings=replace(SETTINGS, w_localization=0.0, w_dice=0.0)).eval()
    batch = Batch(pictures(2), torch.tensor([0, 1]))
    loss, parts = member.loss(member(batch.images), batch)
    assert set(parts) == {"global", "local", "orthogonality"}
    assert loss.item() == pytest.approx(float(sum(parts.values())), rel=1e-6)


def test_a_file_from_before_the_raw_channel_scores_as_it_did():
    """Saved without the fields of the raw channel: a softmaxed channel and a scale of 100, whatever a preset says."""
    config = tiny().config
    saved = to_dict(config)
    for name in (
        "vla_channel",
        "vla_scale",
        "vla_norm",
        "bias_scale",
        "copy_gain",
        "adapter",
        "adapter_after",
    ):
        del saved["vlaforge"][name]
    old = from_dict(MemberConfig, saved).vlaforge
    assert (old.vla_channel, old.vla_scale) == ("softmax", 100.0)
    assert not (old.vla_norm or old.adapter) and old.copy_gain == 1
    assert from_dict(MemberConfig, to_dict(config)) == config
    new = tiny(settings=replace(SETTINGS, vla_norm=False)).eval()
    legacy = tiny(settings=old).eval()
    assert list(new.state_dict()) == list(legacy.state_dict())
    legacy.load_state_dict(new.state_dict())
    with torch.no_grad():
        found, output = legacy(pictures(3)), new(pictures(3))
        maps = new._as_map(torch.randn(3, 8, 16))
        torch.testing.assert_close(found.vla_logits, 10 * output.vla_logits)
        mixed = new.local_mix(maps * found.vla_logits.softmax(dim=1)[:, 1:])
        expected = new.local_head(mixed.mean(dim=(2, 3)))
        score = legacy.local_score(maps, found.vla_logits)
        torch.testing.assert_close(score, expected)
        raw = new.local_head(new.local_mix(maps * output.vla_logits[:, 1:]).mean((2, 3)))
        torch.testing.assert_close(new.local_score(maps, output.vla_logits), raw)


# ------------------------------------------------------------------------------------------------ scores and losses
def test_the_logit_is_the_papers_mixture_of_probabilities():
    torch.manual_seed(0)
    g, v = torch.randn(50, 2) * 4, torch.randn(50, 2) * 4
    for alpha in (0.0, 0.3, 0.5, 1.0):
        p = alpha * g.softmax(1)[:, 1] + (1 - alpha) * v.softmax(1)[:, 1]
        torch.testing.assert_close(mix_scores(g, v, alpha).sigmoid(), p)
    far = torch.tensor([[0.0, 60.0], [0.0, 80.0], [0.0, -80.0]])
    logit = mix_scores(far, far, 0.5)
    torch.testing.assert_close(logit, far[:, 1])  # where the probability rounds to 1
    far.requires_grad_(True)
    mix_scores(far, far, 1.0).sum().backward()
    assert far.grad.isfinite().all()


def test_losses_on_masks_by_hand_weigh_real_and_forged_alike_and_leave_unknown_masks_out():
    torch.manual_seed(1)
    p, m = torch.rand(4, 4, 4), torch.rand(4, 4, 4)
    m[0] = m[3] = 0
    logits = torch.randn(4, 2, 4, 4)
    labels, known = torch.tensor([0, 1, 1, 0]), torch.tensor([True, False, True, True])
    each = {0: 0.25, 2: 0.5, 3: 0.25}
    found = room.mask_weights(labels, known)
    assert found.tolist() == [0.25, 0.0, 0.5, 0.25]
    expected = [0.0, 0.0, 0.0]
    for b, weight in each.items():
        s, inter, size, f = 0.0, 0.0, 0.0, 0.0
        for y in range(4):
            for x in range(4):
                a, c = p[b, y, x].item(), m[b, y, x].item()
                s, inter, size = s + (a - c) ** 2, inter + a * c, size + a + c
                real, fake = logits[b, :, y, x].tolist()
                pt = 1 / (1 + math.exp(real - fake))
                pt = pt if c > 0.5 else 1 - pt
                f += -((1 - pt) ** 2) * math.log(pt)
        expected[0] += weight * s / 16
        expected[1] += weight * (1 - (2 * inter + 5) / (size + 5))
        expected[2] += weight * f / 16
    losses = [
        room.localization_loss(p, m, found),
        room.dice_loss(p, m, found, 5.0),
        room.focal_map_loss(logits, m, found),
    ]
    assert [v.item() for v in losses] == pytest.approx(expected, rel=1e-5)
    nobody = room.mask_weights(labels, torch.zeros(4, dtype=torch.bool))
    assert room.dice_loss(p, m, nobody, 5.0) == 0


def test_orthogonality_by_hand():
    torch.manual_seed(2)
    bias = torch.randn(2, 3, 5, 2, 2)
    terms = []
    for b in range(2):
        for h in range(3):
            f = [bias[b, h, q].flatten() / bias[b, h, q].norm() for q in range(5)]
            for i in range(5):
                for j in range(5):
                    if i != j:
                        terms.append(abs(torch.dot(f[i], f[j]).item()))
    found = room.orthogonality_loss(bias).item()
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    same = torch.ones(1, 1, 4, 2, 2)
    assert room.orthogonality_loss(same).item() == pytest.approx(1.0)
    apart = torch.eye(4).view(1, 1, 4, 2, 2)
    assert room.orthogonality_loss(apart).item() == pytest.approx(0.0)


def test_contrast_by_hand_leaves_pairs_out_instead_of_zeroing_them():
    torch.manual_seed(3)
    e, real = torch.randn(2, 4, 3), torch.randn(3, 4, 3)
    forged = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)

    def pair(a, b):
        return math.exp(F.cosine_similarity(a, b, dim=0).item() / 0.5)

    pos_fake = pos_real = mixed = across = within = 0.0
    for b in range(2):
        for i in range(4):
            for j in range(4):
                value = pair(e[b, i], e[b, j])
                if forged[b, i] and forged[b, j]:
                    pos_fake += value
                elif not forged[b, i] and not forged[b, j]:
                    pos_real += value
                elif forged[b, i]:
                    mixed += value
                within += pair(real[b, i], real[b, j])
                across += pair(real[b, i], e[b, j]) if forged[b, j] else 0.0
    expected = -math.log(pos_fake / (pos_fake + mixed))
    expected -= math.log(pos_real / (pos_real + mixed))
    assert room.patch_contrast(e, forged, 0.5).item() == pytest.approx(expected, rel=1e-5)
    expected = -math.log(within / (within + across))
    found = room.picture_contrast(real, e, forged, 0.5).item()
    assert found == pytest.approx(expected, rel=1e-5)
    empty = torch.zeros(0, 4, 3)
    nothing = torch.zeros(0, 4, dtype=torch.bool)
    assert room.patch_contrast(empty, nothing, 0.5) == 0
    assert room.picture_contrast(real, empty, nothing, 0.5) == 0
    whole = torch.ones(1, 4, dtype=torch.bool)
    assert room.patch_contrast(e[:1], whole, 0.5) == 0


def test_the_loss_is_the_weighted_sum_of_its_parts_and_skips_unknown_masks():
    from solution.config import VLAFORGE_LOSSES

    settings = replace(SETTINGS, **VLAFORGE_LOSSES["code"])
    member = tiny(settings=settings).eval()
    batch = batch_of(4, known=[True, False, True, True])
    with torch.no_grad():
        output = member(batch.images)
        loss, parts = member.loss(output, batch)
        other = batch.masks.clone()
        other[1] = 1 - other[1]
        changed, _ = member.loss(output, replace(batch, masks=other))
    weights = {name: getattr(settings, f"w_{name}") for name in parts}
    total = sum(weights[name] * value for name, value in parts.items())
    assert loss.item() == pytest.approx(float(total), rel=1e-5)
    assert changed.item() == loss.item()


def test_a_patch_is_forged_above_a_tenth_of_its_mask():
    """One patch at 9 % and one at 11 % of forged pixels: only the second enters the contrast as forged."""
    settings = replace(SETTINGS, w_clip=1.0, w_localization=0.0, w_dice=0.0, w_orthogonality=0.0)
    member = tiny(settings=replace(settings, w_global=0.0, w_local=0.0)).eval()
    masks = torch.zeros(1, 64, 64)
    masks[0, 0, :16] = masks[0, 1, :7] = 1.0  # 23 px: 9 %
    masks[0, 16, :16] = masks[0, 17, :12] = 1.0  # 28 px: 11 %
    batch = Batch(pictures(1), torch.tensor([1]), masks, torch.tensor([True]))
    with torch.no_grad():
        output = member(batch.images)
        loss, _ = member.loss(output, batch)
    forged = torch.zeros(1, 16, dtype=torch.bool)
    forged[0, 4] = True  # second row, first column
    expected = room.patch_contrast(output.patch_embeddings, forged, 0.5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


# ------------------------------------------------------------------------------------------------ mechanisms act
LIVELY = replace(SETTINGS, w_focal=1.0, bias_scale=4.0, copy_gain=4.0)
TRAP = replace(SETTINGS, vla_channel="softmax", vla_scale=100.0, vla_norm=False)


def planted(count: int, generator: torch.Generator, visible: bool = True) -> Batch:
    """Grainy pictures of one colour; in every second one, a fake, one patch somewhere is forged: red, if `visible`."""
    labels = torch.arange(count) % 2
    shade = torch.rand(count, 3, 1, 1, generator=generator) * 120 + 60
    place = torch.randint(0, 16, (count,), generator=generator)
    masks = F.one_hot(place, 16).float() * labels[:, None]
    masks = masks.view(count, 4, 4).repeat_interleave(16, 1).repeat_interleave(16, 2)
    red = torch.tensor([240.0, 20.0, 30.0])[:, None, None]
    images = torch.where(masks[:, None] > 0, red, shade) if visible else shade
    images = images + torch.randn(count, 3, 64, 64, generator=generator) * 10
    known = torch.ones(count, dtype=torch.bool)
    return Batch(images.clamp(0, 255).to(torch.uint8), labels, masks, known)


def fit(member: Vlaforge, batches, rate: float) -> Vlaforge:
    """The member after one step of AdamW on each of the batches, its rate rising and falling once."""
    batches = list(batches)
    trained = [p for p in member.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        member.loss(member(batch.images), batch)[0].backward()
        optimizer.step()
        schedule.step()
    return member.eval()


@pytest.fixture(scope="module")
def spotter():
    """A member after 200 steps on the planted task, and new pictures of it (80 do on some processors, 120 on most)."""
    generator = torch.Generator().manual_seed(1)
    batches = (planted(16, generator) for _ in range(200))
    member = fit(tiny(settings=LIVELY), batches, 5e-3)
    return member, planted(64, torch.Generator().manual_seed(9))


def p_fake(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(dim=1)[:, 1]


@torch.no_grad()
def scores(member, batch, monkeypatch, **changes):
    """AUC of local and global score and P, with methods of the member replaced for this call."""
    with monkeypatch.context() as patch:
        for name, change in changes.items():
            patch.setattr(member, name, change(getattr(member, name)), raising=True)
        output = member(batch.images)
    labels = batch.labels.numpy()
    both = (output.local_logits, output.global_logits)
    return *(auc(labels, p_fake(x).numpy()) for x in both), output.logit.sigmoid()


def test_a_forged_patch_whose_place_varies_is_found_by_both_branches_through_their_maps(spotter, monkeypatch):
    """Both scores find it; without its own bias, VLA map or perceiver maps each score loses it, and P moves."""
    member, batch = spotter
    local, whole, p = scores(member, batch, monkeypatch)
    assert local > 0.95 and whole > 0.95
    swaps = {
        "bias zeroed": {"directed_classes": lambda f: lambda s, b: f(s, b * 0)},
        "bias of another": {"directed_classes": lambda f: lambda s, b: f(s, b.roll(1, 0))},
        "map of another": {"local_score": lambda f: lambda m, v: f(m, v.roll(1, 0))},
        "maps of another": {"local_score": lambda f: lambda m, v: f(m.roll(1, 0), v)},
    }
    for name, change in swaps.items():
        found = scores(member, batch, monkeypatch, **change)
        hurt = found[1] if name.startswith("bias") else found[0]
        assert hurt < 0.85, (name, hurt)
        assert (found[2] - p).abs().mean() > 0.05, name
    with torch.no_grad():
        output = member(batch.images)
    assert p_fake(output.local_logits).std() > 0.2
    forged = F.avg_pool2d(batch.masks[:, None], 16)[:, 0] > 0.5
    fake = batch.labels == 1
    for name in ("vla", "localization"):
        found = output.evidence[name][fake, 0]
        assert auc(forged[fake].flatten().numpy(), found.flatten().numpy()) > 0.9, name


def test_an_artefact_that_depends_on_the_identity_is_told_by_the_identity_vector_alone():
    """Two people, two patterns of patches: one is the mark of a fake on the first, the other on the second.

    Neither person nor pattern says anything alone. The text tower is frozen and the maps are constant, so only the
    sentences carry the person; another's identity turns every answer round, and none leaves chance.
    """
    member = tiny().train()
    generator = torch.Generator().manual_seed(3)
    people = torch.randn(2, 32, generator=generator)
    patterns = torch.randn(2, 16, 32, generator=generator)
    maps = torch.ones(64, 8, 4, 4)

    def draw():
        who, what = torch.randint(0, 2, (2, 64), generator=generator)
        person = people[who] + 0.1 * torch.randn(64, 32, generator=generator)
        patches = patterns[what] + 0.3 * torch.randn(64, 16, 32, generator=generator)
        seen = ClipPass(person, patches, person[:, None], {}, [], [])
        return seen, people[1 - who], (who != what).long()

    trained = [p for p in member.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(40):
        seen, _, labels = draw()
        score = member.local_score(maps, member.read(seen)[1])
        optimizer.zero_grad()
        F.cross_entropy(score, labels).backward()
        optimizer.step()
    member.eval()
    seen, other, labels = draw()
    found = []
    for identity in (seen.cls_token, other, torch.zeros_like(other)):
        with torch.no_grad():
            vla = member.read(seen._replace(cls_token=identity))[1]
            score = p_fake(member.local_score(maps, vla))
        found.append(auc(labels.numpy(), score.numpy()))
    assert found[0] > 0.95 and found[1] < 0.05 and 0.25 < found[2] < 0.75


def test_masks_mostly_empty_for_fifty_steps_leave_the_local_score_alive():
    """Nothing of the forgery can be seen and most masks are empty: what a softmaxed channel at scale 100 dies of."""
    found = {}
    for name, settings in (("raw", SETTINGS), ("trap", TRAP)):
        generator = torch.Generator().manual_seed(1)
        batches = [planted(16, generator, visible=False) for _ in range(50)]
        # One forged picture of eight has a known mask.
        known = (torch.arange(16) % 2 == 0) | (torch.arange(16) < 2)
        batches = [replace(batch, mask_known=known) for batch in batches]
        member = tiny(settings=replace(settings, train_text=True))
        member = fit(member, batches, 5e-3)
        with torch.no_grad():
            output = member(batches[-1].images)
        difference = (output.vla_logits[:, 1] - output.vla_logits[:, 0]).mean()
        found[name] = difference.item(), p_fake(output.local_logits).std().item()
    assert abs(found["raw"][0]) < 10 and found["raw"][1] > 5e-3, found
    assert found["trap"][0] < -10 and found["trap"][1] < 1e-3, found
