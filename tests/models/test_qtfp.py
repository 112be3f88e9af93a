"""QTFP: losses against loops, what gradients reach, prototypes, the signal-to-noise trap, the synthetic study."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from solution.config import (
    AdapterConfig,
    ClipArch,
    ConfigError,
    Dinov2Arch,
    MemberConfig,
    QtfpConfig,
    TowerConfig,
    ViewConfig,
    from_dict,
    override,
    to_dict,
)
from solution.evaluation import metrics
from solution.models import qtfp
from solution.models.adapters import adapter_state, add_adapter
from solution.models.towers import build_tower, load_state, patch_attention
from solution.presets import preset
from solution.records import Batch
from solution.studies import planted_world, qtfp_tokens, step_cost

SIDE = 42  # 3 x 3 patches
DINOV2 = TowerConfig(
    "tiny-dinov2",
    "dinov2",
    Dinov2Arch(width=32, layers=2, heads=2, mlp_ratio=2, swiglu=False, image_side=SIDE),
)
CLIP = TowerConfig(
    "tiny-clip",
    "clip",
    ClipArch(width=32, layers=2, heads=2, image_side=SIDE, embed_dim=16, text_layers=0),
    statistics="clip",
)
EFFORT = AdapterConfig("effort", rank=1, dropout=0.0)
LORA = AdapterConfig("lora", rank=2, alpha=4.0, dropout=0.0)
towers = pytest.mark.parametrize("tower", [DINOV2, CLIP], ids=lambda t: t.kind)
adapters = pytest.mark.parametrize("adapter", [EFFORT, LORA], ids=lambda a: a.kind)


LIVE = {"heads": 2, "key_width": 16, "query_std": 0.2, "weight_scope": "picture"}

forms = pytest.mark.parametrize("form", [{}, LIVE | {"readout": "each", "diversity": 0.1}], ids=["plain", "live"])


def make(tower=DINOV2, adapter=EFFORT, seed=0, **options):
    """A tiny member with its adapter, moved off its starting point so that the adapter does something."""
    torch.manual_seed(seed)
    config = MemberConfig(
        "qtfp",
        ViewConfig("image", SIDE, SIDE),
        tower,
        adapter,
        qtfp=QtfpConfig(**options),
    )
    built = build_tower(tower)
    add_adapter(built, "qtfp", adapter)
    member = qtfp.Qtfp(config, built)
    with torch.no_grad():
        for parameter in adapter_state(built, "qtfp").values():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return member


def make_batch(labels=(0, 1, 0, 1), seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(labels), 3, SIDE, SIDE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Batch(images, torch.tensor(labels))


def with_prototypes(member):
    """`member` after one other batch, so that FLCL takes part."""
    batch = make_batch(seed=9)
    member.after_step(member(batch.images), batch)
    return member


def random_tokens(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


# ---------------------------------------------------------------------------------------------- by hand, with loops
def test_queries_follow_the_formula():
    tokens = random_tokens(2, 5, 4)
    pool = qtfp.QueryPool(4, 3, heads=1, std=1.0).double()
    gathered, attention = pool(tokens)
    for b in range(2):
        mean = torch.zeros(4, dtype=torch.float64)
        for k in range(3):
            e = [math.exp((pool.queries[k] @ tokens[b, p]).item() / math.sqrt(4)) for p in range(5)]
            for p in range(5):
                assert attention[b, k, p].item() == pytest.approx(e[p] / sum(e), abs=1e-6)
                mean += e[p] / sum(e) * tokens[b, p] / 3
        torch.testing.assert_close(gathered[b].mean(0), mean, atol=1e-6, rtol=0)


def test_heads_attend_to_their_own_channels():
    tokens = random_tokens(2, 5, 6)
    pool = qtfp.QueryPool(6, 3, heads=2, std=1.0).double()
    gathered, attention = pool(tokens)
    maps = []
    for half in (slice(0, 3), slice(3, 6)):
        single = qtfp.QueryPool(3, 3, heads=1, std=1.0).double()
        single.queries.data = pool.queries.data[:, half]
        part, one_map = single(tokens[..., half])
        torch.testing.assert_close(gathered[..., half], part)
        maps.append(one_map)
    torch.testing.assert_close(attention, (maps[0] + maps[1]) / 2)


def test_projected_queries_follow_their_formula():
    tokens = random_tokens(2, 5, 6)
    pool = qtfp.QueryPool(6, 2, heads=2, std=0.3, key_width=3).double()
    pool.log_scale.data.copy_(random_tokens(2, 2, seed=3))
    gathered, attention = pool(tokens)
    for b in range(2):
        centred = tokens[b] - tokens[b].mean(0)
        centred = centred / centred.square().mean().sqrt()
        for k in range(2):
            maps = []
            for h in range(2):
                query = pool.queries[h, k] / pool.queries[h, k].norm()
                query = query * pool.log_scale[h, k].exp() * math.sqrt(3)
                keys = centred @ pool.keys[3 * h : 3 * h + 3].T
                maps.append((keys @ query / math.sqrt(3)).softmax(0))
                part = slice(3 * h, 3 * h + 3)
                expected = maps[-1] @ tokens[b][:, part]
                torch.testing.assert_close(gathered[b, k, part], expected, atol=1e-6, rtol=0)
            mean = (maps[0] + maps[1]) / 2
            torch.testing.assert_close(attention[b, k], mean, atol=1e-6, rtol=0)


def test_projected_queries_start_distinct_and_far_from_uniform():
    """Whatever the tower's scale and whatever its tokens have in common; the plain ones start as one."""
    torch.manual_seed(0)
    tokens = 0.1 * random_tokens(8, 64, 256) + 3 * random_tokens(256, seed=1)
    for scale in (1.0, 1e-3):
        pool = qtfp.QueryPool(256, 4, heads=2, std=0.2, key_width=64)
        scores = pool._scores(scale * tokens)
        assert scores.std(-1).mean().item() == pytest.approx(1.0, abs=0.1)
        attention = pool(scale * tokens)[1]
        entropy = -(attention * attention.log()).sum(-1).mean().item()
        assert entropy < math.log(64) - 0.15
        assert qtfp.overlap(attention).abs().max() < 0.3
    plain = qtfp.QueryPool(256, 4, heads=1, std=0.02)(tokens.float())[1]
    entropy = -(plain * plain.log()).sum(-1).mean().item()
    assert entropy > math.log(64) - 0.001


@pytest.mark.parametrize("options", [{}, LIVE, LIVE | {"readout": "each"}])
def test_interventions(options):
    member, batch = make(**options).eval(), make_batch()
    output = member(batch.images)
    own = member(batch.images, attention=output.query_attention)
    uniform = torch.full((1, 1, 9), 1 / 9)
    flat = member(batch.images, attention=uniform)
    assert flat.query_attention.shape == (4, 4, 9)
    mean = output.patch_tokens.mean(1)
    torch.testing.assert_close(flat.features.unflatten(-1, (-1, 32)).sum(1), mean, atol=1e-5, rtol=1e-5)
    if not options:  # of a single head, the attention is all there is to a gathering
        torch.testing.assert_close(own.logit, output.logit)
    everyone = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(member(batch.images, keep=everyone).logit, output.logit)
    each = [member(batch.images, keep=everyone & (torch.arange(4) == k)) for k in range(4)]
    together = torch.stack([one.features for one in each]).mean(0)
    torch.testing.assert_close(together, output.features)
    by_picture = torch.eye(4, dtype=torch.bool)
    mixed = member(batch.images, keep=by_picture).logit
    diagonal = torch.stack([each[k].logit[k] for k in range(4)])
    torch.testing.assert_close(mixed, diagonal)


def test_interventions_need_queries():
    member, batch = make(pool="cls"), make_batch()
    for option in (
        {"attention": torch.full((1, 1, 9), 1 / 9)},
        {"keep": torch.ones(4)},
    ):
        with pytest.raises(ValueError, match="has no queries"):
            member(batch.images, **option)


def test_weights_within_a_picture_do_not_say_which_picture():
    tokens = random_tokens(6, 9, 8) + 3 * random_tokens(6, 1, 8, seed=1)
    labels, prototypes = torch.tensor([0, 1] * 3), random_tokens(2, 8, seed=2)
    inside = qtfp.fake_likelihood_weights(tokens, prototypes)
    across = qtfp.fake_likelihood_weights(tokens, prototypes, labels=labels)
    assert inside.mean(1).std() < across.mean(1).std() / 3
    assert inside.std(1).mean() > 0.1
    torch.testing.assert_close(inside.argsort(1), across.argsort(1))
    same = torch.ones(1, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(
        qtfp.fake_likelihood_weights(same, prototypes),
        torch.full((1, 4), 0.5, dtype=torch.float64),
    )


def test_diversity_counts_what_queries_share_beyond_the_margin():
    one = random_tokens(1, 1, 9).softmax(-1)
    other = random_tokens(1, 1, 9, seed=1).softmax(-1)
    uniform = torch.full((1, 1, 9), 1 / 9, dtype=torch.float64)
    same = torch.cat([one, one, uniform], dim=1)
    found = qtfp.pair_correlations(same)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64))
    assert qtfp.overlap(same).item() == pytest.approx(1 / 3)
    assert qtfp.diversity_loss(same).item() == pytest.approx((1 - qtfp.SHARED_LOOK) / 3)
    by_numpy = torch.corrcoef(torch.cat([one[0], other[0]]))[0, 1]
    pair = torch.cat([one, other], dim=1)
    torch.testing.assert_close(qtfp.pair_correlations(pair)[0, 0], by_numpy)


def spread(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def flcl_by_hand(tokens, labels, prototypes, tau, tau_w, scope="batch"):
    """FLCL as the specification writes it, one patch and one pair at a time."""
    z = [[tokens[b, p] / tokens[b, p].norm() for p in range(tokens.shape[1])] for b in range(len(tokens))]
    patches = [(b, p) for b in range(len(z)) for p in range(len(z[0]))]
    delta = {(b, p): (z[b][p] @ (prototypes[1] - prototypes[0])).item() for b, p in patches}
    real = [delta[i] for i in patches if labels[i[0]] == 0]
    terms = []
    for i in patches:
        if labels[i[0]] == 0:
            continue
        own = [delta[j] for j in patches if j[0] == i[0]]
        mean, std = spread(own if scope == "picture" else real)
        weight = 1 / (1 + math.exp(-(delta[i] - mean) / (tau_w * std)))
        positive, every = 0.0, 0.0
        for j in patches:
            if j == i:
                continue
            e = torch.exp(z[i[0]][i[1]] @ z[j[0]][j[1]] / tau)
            every = every + e
            if labels[j[0]] == 1:
                positive = positive + e
        terms.append(-weight * torch.log(positive / every))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("scope", ["picture", "batch"])
@pytest.mark.parametrize("chunk", [0, 1, 4, 100])
def test_flcl_and_its_gradient_agree_with_loops(chunk, scope):
    labels = torch.tensor([1, 0, 1, 0, 0])
    prototypes = random_tokens(2, 4, seed=3)
    one = random_tokens(5, 3, 4).requires_grad_()
    two = one.detach().clone().requires_grad_()
    expected = flcl_by_hand(one, labels.tolist(), prototypes, 0.1, 0.7, scope)
    found = qtfp.fake_likelihood_loss(
        two,
        labels,
        prototypes,
        temperature=0.1,
        weight_temperature=0.7,
        weight_scope=scope,
        chunk=chunk,
    )
    assert found.item() == pytest.approx(expected.item(), abs=1e-9)
    expected.backward()
    (3 * found).backward()
    torch.testing.assert_close(two.grad, 3 * one.grad, atol=1e-9, rtol=1e-9)


def test_flcl_gradient_stops_at_weights_and_prototypes():
    prototypes = random_tokens(2, 4).requires_grad_()
    tokens = random_tokens(2, 3, 4, seed=1).requires_grad_()
    labels = torch.tensor([0, 1])
    options = {"temperature": 0.1, "weight_temperature": 1.0}
    qtfp.fake_likelihood_loss(tokens, labels, prototypes, **options).backward()
    assert prototypes.grad is None and tokens.grad.abs().sum() > 0
    assert not qtfp.fake_likelihood_weights(tokens, prototypes).requires_grad


def test_flcl_is_scale_free_and_wants_both_classes():
    tokens, prototypes = random_tokens(3, 4, 5), random_tokens(2, 5, seed=2)
    labels = torch.tensor([0, 1, 1])
    options = {"temperature": 0.1, "weight_temperature": 1.0}
    plain = qtfp.fake_likelihood_loss(tokens, labels, prototypes, **options)
    scaled = qtfp.fake_likelihood_loss(5 * tokens, labels, prototypes, **options)
    assert plain.item() == pytest.approx(scaled.item(), abs=1e-12)
    for one_class in (labels * 0, labels * 0 + 1):
        with pytest.raises(ValueError, match="found .* fake and .* real"):
            qtfp.fake_likelihood_loss(tokens, one_class, prototypes, **options)


def test_flcl_in_bf16_is_close():
    tokens, prototypes = random_tokens(8, 16, 32).float(), random_tokens(2, 32).float()
    labels = torch.tensor([0, 1] * 4)
    values, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = tokens.clone().requires_grad_()
        loss = qtfp.fake_likelihood_loss(
            leaf,
            labels,
            prototypes,
            temperature=0.1,
            weight_temperature=1.0,
            dtype=dtype,
        )
        loss.backward()
        values.append(loss.item())
        gradients.append(leaf.grad.flatten())
    assert loss.dtype == torch.float32 and leaf.grad.dtype == torch.float32
    assert values[1] == pytest.approx(values[0], rel=0.01)
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


class Census(TorchDispatchMode):
    """Counts storages of at least `threshold` elements that live at one time."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold, self.live, self.most = threshold, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.threshold:
                self.live.append(weakref.ref(tensor))
        alive = [t for ref in self.live if (t := ref()) is not None]
        self.most = max(self.most, len({t.data_ptr() for t in alive}))
        return result


@pytest.mark.parametrize("chunk", [0, 8])
def test_flcl_holds_one_chunk_of_one_matrix(chunk):
    tokens = random_tokens(4, 32, 2).requires_grad_()
    labels = torch.tensor([0, 1, 0, 1])
    matrix = (chunk or 64) * 128
    with Census(matrix) as whole, Census(matrix + 1) as larger:
        qtfp.fake_likelihood_loss(
            tokens,
            labels,
            random_tokens(2, 2, seed=1),
            temperature=0.1,
            weight_temperature=1.0,
            chunk=chunk,
        ).backward()
    assert (whole.most, larger.most) == (1, 0)


def test_raal_agrees_with_loops():
    attention = random_tokens(2, 3, 5).softmax(-1)
    reference = random_tokens(2, 5, seed=1).softmax(-1)
    expected = 0.0
    for b in range(2):
        for k in range(3):
            for p in range(5):
                a, r = float(attention[b, k, p]), float(reference[b, p])
                expected += a * math.log(a / r) / 6
    found = qtfp.attention_alignment_loss(attention, reference)
    assert found.item() == pytest.approx(expected, abs=1e-9)
    assert qtfp.attention_alignment_loss(reference[:, None], reference).item() == 0


def test_raal_survives_attention_that_underflows():
    attention = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    reference = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = qtfp.attention_alignment_loss(attention, reference)
    loss.backward()
    assert loss.isfinite() and attention.grad.isfinite().all()
    assert reference.grad is None


# ---------------------------------------------------------------------------------------------- the member
@towers
@adapters
def test_output_and_evidence(tower, adapter):
    member, batch = make(tower, adapter, queries=3, heads=2).eval(), make_batch()
    output = member(batch.images)
    assert output.logit.shape == (4,) and output.features.shape == (4, 32)
    maps = output.evidence["query_attention"]
    assert maps.shape == (4, 3, 3, 3)
    torch.testing.assert_close(maps.sum((-1, -2)), torch.ones(4, 3))
    logits = member.head(output.features)
    torch.testing.assert_close(output.logit.sigmoid(), logits.softmax(1)[:, 1], atol=1e-6, rtol=0)


@towers
def test_member_loss_is_the_sum_of_its_parts(tower):
    member, batch = with_prototypes(make(tower)), make_batch()
    output = member(batch.images)
    loss, parts = member.loss(output, batch)
    p_fake = output.logit.sigmoid()
    right = torch.where(batch.labels == 1, p_fake, 1 - p_fake)
    tokens = output.patch_tokens.double()
    flcl = flcl_by_hand(tokens, batch.labels.tolist(), member.prototypes.mean.double(), 0.1, 1.0)
    real = batch.labels == 0
    heads = member.tower.cls_attention(output.last_input[real], adapter="qtfp")
    reference = patch_attention(heads)[:, None]
    queries = output.query_attention[real]
    raal = (queries * (queries / reference).log()).sum(-1).mean()
    assert parts["ce"] == pytest.approx(-right.log().mean().item(), abs=1e-6)
    assert parts["flcl"] == pytest.approx(flcl.item(), abs=1e-5)
    assert parts["raal"] == pytest.approx(raal.item(), abs=1e-6)
    total = parts["ce"] + 0.14 * parts["flcl"] + 1.0 * parts["raal"]
    assert loss.item() == pytest.approx(float(total), abs=1e-6)
    assert set(parts) == {"ce", "flcl", "raal"}


@towers
@adapters
@forms
@pytest.mark.parametrize("reference", ["adapted", "pretrained"])
def test_gradients_reach_queries_head_and_adapter_and_nothing_else(tower, adapter, reference, form):
    made = make(tower, adapter, raal_reference=reference, **form)
    member = with_prototypes(made.train())
    batch = make_batch()
    member.loss(member(batch.images), batch)[0].backward()
    reached = {n for n, p in member.named_parameters() if p.grad is not None}
    trained = {id(p) for p in adapter_state(member.tower, "qtfp").values()}
    trained |= {id(p) for p in member.head_parameters()}
    frozen = ("u0", "s0", "v0")
    expected = {n for n, p in member.named_parameters() if id(p) in trained and not n.endswith(frozen)}
    assert reached == expected
    assert {"pool.queries", "head.weight", "head.bias"} <= reached
    for name, parameter in member.named_parameters():
        if name in reached:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("only", "skips"),
    [
        ({}, {"ce"}),
        ({"flcl": 0.14}, {"ce", "flcl"}),
        ({"raal": 1.0}, {"ce", "raal"}),
    ],
)
def test_each_loss_can_be_switched_off(only, skips):
    member = with_prototypes(make(**({"flcl": 0.0, "raal": 0.0} | only)))
    batch = make_batch()
    _, parts = member.loss(member(batch.images), batch)
    assert set(parts) == skips


def test_raal_reaches_real_pictures_only_and_flcl_leaves_the_queries_alone():
    member, batch = with_prototypes(make()), make_batch()
    output = member(batch.images)
    attention = output.query_attention.detach().requires_grad_()
    tokens = output.patch_tokens.detach().requires_grad_()
    output = replace(output, query_attention=attention, patch_tokens=tokens)
    (member._raal(output, batch) + member._flcl(output, batch)).backward()
    moved = attention.grad.abs().sum((1, 2)) > 0
    assert moved.tolist() == (batch.labels == 0).tolist()
    assert (tokens.grad.abs().sum((1, 2)) > 0).all()


def test_diversity_reaches_fake_pictures_only():
    member, batch = with_prototypes(make(**LIVE, diversity=0.1, raal=0.0)), make_batch()
    output = member(batch.images)
    attention = output.query_attention[:, :1].detach().expand(-1, 4, -1)
    attention = (attention + 0.01 * torch.rand_like(attention)).requires_grad_()
    _, parts = member.loss(replace(output, query_attention=attention), batch)
    assert set(parts) == {"ce", "flcl", "diversity"} and parts["diversity"] > 0
    member._diversity(replace(output, query_attention=attention), batch).backward()
    moved = attention.grad.abs().sum((1, 2)) > 0
    assert moved.tolist() == (batch.labels == 1).tolist()


def test_raal_comes_late():
    member, batch = make(**LIVE, raal=0.5, raal_warmup=2, flcl=0.0), make_batch()
    weights = []
    for _ in range(6):
        output = member(batch.images)
        loss, parts = member.loss(output, batch)
        extra = loss.item() - parts["ce"]
        weights.append(extra / parts["raal"] if "raal" in parts else 0.0)
        member.after_step(output, batch)
    assert weights == pytest.approx([0, 0, 0, 0.25, 0.5, 0.5], rel=1e-3)


def test_configurations_saved_without_the_new_fields_mean_the_plain_form():
    saved = to_dict(QtfpConfig())
    new = ("key_width", "readout", "weight_scope", "diversity", "raal_warmup")
    for name in new:
        del saved[name]
    config = from_dict(QtfpConfig, saved)
    assert config == QtfpConfig()
    assert (config.key_width, config.readout, config.weight_scope) == (
        0,
        "mean",
        "batch",
    )
    for name in ("giant", "compact"):
        assert preset(name, "qtfp").qtfp.key_width > 0


@pytest.mark.parametrize(
    ("labels", "skipped"),
    [
        ((0, 0), "flcl: no fake picture"),
        ((1, 1), "flcl: no real picture; raal: no real picture"),
    ],
)
def test_a_batch_of_one_class_skips_and_says_so(labels, skipped):
    member, batch = with_prototypes(make()), make_batch(labels)
    before = member.prototypes.mean.clone()
    output = member(batch.images)
    loss, parts = member.loss(output, batch)
    assert parts["skipped"] == skipped and parts["flcl"] == 0
    assert loss.item() == pytest.approx(float(parts["ce"] + parts["raal"]), abs=1e-6)
    assert member.after_step(output, batch) == {}
    moved = (member.prototypes.mean != before).any(1).tolist()
    assert moved == [labels[0] == 0, labels[0] == 1]


def test_the_first_step_has_no_prototypes():
    member, batch = make(), make_batch()
    output = member(batch.images)
    assert member.loss(output, batch)[1]["skipped"] == "flcl: no prototypes yet"
    assert set(member.after_step(output, batch)) == {"snr_batch"}
    numbers = member.after_step(output, batch)
    assert set(numbers) == {"snr_batch", "snr_ema", "snr_held_out"}


def test_cls_base_of_the_ablation():
    member, batch = with_prototypes(make(pool="cls")), make_batch()
    output = member(batch.images)
    tokens = member.tower(batch.images, adapter="qtfp")
    torch.testing.assert_close(output.features, tokens.cls_token)
    assert output.evidence == {}
    assert set(member.own_parameters()) == {"head.weight", "head.bias"}
    loss, parts = member.loss(output, batch)
    assert parts["skipped"] == "raal: no queries" and parts["flcl"] > 0
    loss.backward()


def test_ablation_switches_of_the_preset():
    config = override(
        preset("compact", "qtfp"),
        ["qtfp.flcl=0", "qtfp.raal=0", "qtfp.queries=1", "qtfp.key_width=8"],
    )
    config = replace(config, tower=DINOV2, view=ViewConfig("image", SIDE, SIDE))
    tower = build_tower(DINOV2)
    add_adapter(tower, "qtfp", config.adapter)
    member, batch = qtfp.Qtfp(config, tower), make_batch()
    output = member(batch.images)
    assert output.evidence["query_attention"].shape[1] == 1
    assert set(member.loss(output, batch)[1]) == {"ce"}


@adapters
def test_pretrained_reference_is_the_plain_tower(adapter):
    member = make(adapter=adapter, raal_reference="pretrained")
    torch.manual_seed(0)
    plain = build_tower(DINOV2)  # the tower `make` started from
    batch = make_batch()
    found = member._cls_attention(member(batch.images).last_input, batch.images)
    expected = patch_attention(plain.cls_attention(plain(batch.images).last_input))
    torch.testing.assert_close(found, expected)
    adapted = make(adapter=adapter)
    other = adapted._cls_attention(adapted(batch.images).last_input, batch.images)
    assert (found - other).abs().max() > 1e-5


@adapters
def test_pretrained_reference_leaves_checkpointed_gradients_right(adapter):
    gradients = []
    for checkpointing in (False, True):
        member = with_prototypes(make(adapter=adapter, raal_reference="pretrained"))
        member.tower.checkpointing = checkpointing
        batch = make_batch()
        member.train().loss(member(batch.images), batch)[0].backward()
        gradients.append([p.grad for p in member.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two)


def test_refusals():
    for options, message in (
        ({"heads": 3}, "must divide"),
        ({"temperature": 0.01}, "at least"),
        ({"heads": 4, "key_width": 16}, "may not exceed"),
        (
            {"raal_reference": "pretrained", "adapter": AdapterConfig("full")},
            "untouched tower",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**options)


@towers
@forms
def test_score_alone_equals_score_in_a_batch(tower, form):
    member, batch = make(tower, **form).eval(), make_batch()
    with torch.no_grad():
        together = member(batch.images).logit
        alone = torch.cat([member(image[None]).logit for image in batch.images])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@forms
def test_autocast_trains(form):
    member, batch = with_prototypes(make(**form)), make_batch()
    expected = member.loss(member(batch.images), batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = member.loss(member(batch.images), batch)
    loss.backward()
    assert loss.dtype == torch.float32 and parts["flcl"] > 0
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)


def test_effort_trains_196704_parameters_on_vit_large():
    config = preset("giant", "qtfp")
    tower = build_tower(config.tower, device="meta")
    add_adapter(tower, "qtfp", config.adapter)
    state = adapter_state(tower, "qtfp")
    assert len(state) == 24 * 4 * 6  # u, s, v and their starting values
    assert sum(p.numel() for p in state.values() if p.requires_grad) == 196_704
    with torch.device("meta"):
        member = qtfp.Qtfp(config, tower)
    trained = sum(p.numel() for p in member.parameters() if p.requires_grad)
    # Two heads of four queries and their scales, the key projection to 2 x 64, the head.
    assert trained == 196_704 + 2 * 4 * (64 + 1) + 2 * 64 * 1024 + 2 * 1024 + 2


# ---------------------------------------------------------------------------------------------- a planted forgery
PLANTED_SIDE, PLANTED_GRID = 70, 5
PLANTED_TOWER = replace(DINOV2, arch=replace(DINOV2.arch, image_side=PLANTED_SIDE))


def planted(count, generator):
    """Smooth noisy pictures; in every second one a patch, elsewhere each time, is striped: a batch and masks (B, P)."""

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    side, grid = PLANTED_SIDE, PLANTED_GRID
    smooth = F.interpolate(normal(count, 3, 4, 4), size=(side, side), mode="bilinear")
    images = 0.5 + 0.15 * smooth + 0.1 * normal(count, 3, side, side)
    labels = torch.arange(count) % 2
    order = torch.rand((count, grid * grid), generator=generator).argsort(1)
    forged = (order < 1) & (labels[:, None] == 1)
    where = forged.view(count, 1, grid, grid).float()
    where = F.interpolate(where, size=(side, side), mode="nearest")
    stripes = 0.08 * (torch.arange(side) // 2 % 2 * 2 - 1)
    images = (images + where * stripes).clamp(0, 1) * 255
    return Batch(images.round().to(torch.uint8), labels), forged


def train_on_planted(steps, seed=0, **options):
    """A whole tiny tower trained through its queries, and 300 unseen pictures of the same kind with their masks."""
    torch.manual_seed(seed)
    adapter, view = AdapterConfig("full"), ViewConfig("image", *[PLANTED_SIDE] * 2)
    config = MemberConfig("qtfp", view, PLANTED_TOWER, adapter, qtfp=QtfpConfig(**options))
    tower = build_tower(PLANTED_TOWER)
    add_adapter(tower, "qtfp", adapter)
    member = qtfp.Qtfp(config, tower).train()
    trained = [p for p in member.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch, _ = planted(16, generator)
        output = member(batch.images)
        optimizer.zero_grad()
        member.loss(output, batch)[0].backward()
        optimizer.step()
        member.after_step(output, batch)
    return member.eval(), *planted(300, generator)


@torch.no_grad()
def what_queries_do(member, batch, forged):
    output = member(batch.images)
    uniform = torch.full((1, 1, PLANTED_GRID**2), 1 / PLANTED_GRID**2)
    flat = member(batch.images, attention=uniform)
    foreign = member(batch.images, attention=output.query_attention.roll(1, 0))
    looked = output.query_attention
    return {
        "auc": metrics.auc(batch.labels.numpy(), output.logit.numpy()),
        "uniform": metrics.auc(batch.labels.numpy(), flat.logit.numpy()),
        "foreign": metrics.auc(batch.labels.numpy(), foreign.logit.numpy()),
        "attention": planted_world.auc_inside(looked.mean(1), forged),
        "alike": qtfp.overlap(looked).mean().item(),
        "alike_fakes": qtfp.overlap(looked[batch.labels == 1]).mean().item(),
    }


def test_queries_find_a_forged_patch_wherever_it_is():
    options = LIVE | {"readout": "each", "diversity": 0.1, "raal_warmup": 75}
    found = what_queries_do(*train_on_planted(250, **options))
    assert found["auc"] > 0.9, found
    assert found["uniform"] < found["auc"] - 0.03, found
    assert found["foreign"] < found["auc"] - 0.03, found
    assert found["attention"] > 0.8, found
    assert found["alike"] < 0.9 and found["alike_fakes"] < 0.9, found


def test_plain_queries_are_one_and_do_nothing_after_as_many_steps():
    found = what_queries_do(*train_on_planted(250))
    assert abs(found["uniform"] - found["auc"]) < 0.01, found
    assert found["attention"] < 0.8, found


# ---------------------------------------------------------------------------------------------- prototypes
def test_prototypes_average_evenly_and_then_forget():
    prototypes = qtfp.Prototypes(4, decay=0.75)
    expected = None
    for step in range(8):
        tokens = random_tokens(2, 3, 4, seed=step).float()
        prototypes.observe(tokens, torch.tensor([0, 1]))
        mean = F.normalize(tokens, dim=-1).mean(1)
        keep = min(0.75, step / (step + 1))
        expected = mean if step == 0 else keep * expected + (1 - keep) * mean
        if step == 2:  # the even mean of three batches
            batches = [random_tokens(2, 3, 4, seed=s).float() for s in range(3)]
            even = torch.stack([F.normalize(b, dim=-1).mean(1) for b in batches])
            torch.testing.assert_close(prototypes.mean, even.mean(0))
    torch.testing.assert_close(prototypes.mean, expected)
    assert prototypes.updates.tolist() == [8, 8]


def test_prototypes_are_stored_and_restored():
    member, other = with_prototypes(make()), make(seed=5)
    stored = {name: t.detach().clone() for name, t in member.stored_state().items()}
    assert stored["own.prototypes.updates"].tolist() == [1, 1]
    assert "own.pool.queries" in stored and not other.prototypes.ready
    load_state(other.stored_state(), stored, "test")
    torch.testing.assert_close(other.prototypes.mean, member.prototypes.mean)
    assert other.prototypes.ready
    assert not any(name.startswith("tower.") for name in stored)


def _observe_on_rank(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        tokens = random_tokens(4, 3, 8, seed=0).float()
        labels = torch.tensor([0, 1, 1, 1])
        mine = slice(0, 1) if rank == 0 else slice(1, 4)  # rank 0 sees no fake
        prototypes = qtfp.Prototypes(8, decay=0.99)
        numbers = prototypes.observe(tokens[mine], labels[mine])
        torch.save((prototypes.state_dict(), numbers), f"{results}.{rank}")
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_keep_the_same_prototypes(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    paths = str(tmp_path / "meeting"), str(tmp_path / "result")
    process = context.Process(target=_observe_on_rank, args=(1, *paths))
    process.start()
    _observe_on_rank(0, *paths)
    process.join(60)
    assert process.exitcode == 0
    single = qtfp.Prototypes(8, decay=0.99)
    expected = single.observe(random_tokens(4, 3, 8, seed=0).float(), torch.tensor([0, 1, 1, 1]))
    for rank in (0, 1):
        state, numbers = torch.load(f"{paths[1]}.{rank}", weights_only=True)
        torch.testing.assert_close(state["mean"], single.mean)
        assert state["updates"].tolist() == [1, 1]
        assert numbers == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------- signal to noise
def test_signal_to_noise_by_hand():
    tokens, labels = random_tokens(4, 6, 5), torch.tensor([0, 1, 0, 1])
    unit = qtfp.unit_tokens(tokens)
    prototypes = random_tokens(2, 5, seed=4)
    numbers = qtfp.signal_to_noise(qtfp.class_sums(unit, labels, prototypes), prototypes)
    real, fake = unit[labels == 0].flatten(0, 1), unit[labels == 1].flatten(0, 1)
    squares = sum(((c - c.mean(0)) ** 2).sum() for c in (real, fake))
    sigma = (squares / (24 * 5)).sqrt()
    direction = prototypes[1] - prototypes[0]
    apart = (fake @ direction).mean() - (real @ direction).mean()
    expected = {
        "snr_batch": (real.mean(0) - fake.mean(0)).norm() / sigma,
        "snr_ema": direction.norm() / sigma,
        "snr_held_out": apart / (real @ direction).std(correction=0),
    }
    assert numbers == pytest.approx({n: v.item() for n, v in expected.items()})


def test_in_batch_prototypes_invent_a_signal():
    assert planted_world.snr_trap(0.0, seed=0) == pytest.approx(1.0, abs=0.1)
    assert planted_world.snr_trap(0.1, seed=0) == pytest.approx(5.2, abs=0.4)


def test_held_out_ratio_is_the_planted_one_whatever_the_forged_share():
    for fraction, tolerance in ((0.1, 0.5), (0.25, 0.35), (0.5, 0.35)):
        numbers = planted_world.study_snr(planted_world.Planted(), fraction, seed=0)
        assert numbers["patch"] == pytest.approx(3.0, abs=tolerance)
        assert numbers["snr_held_out"] == pytest.approx(3.0 * fraction, abs=0.15)
    silent = planted_world.study_snr(planted_world.Planted(snr=0.0), 0.25, seed=0)
    assert abs(silent["patch"]) < 0.1 and abs(silent["snr_held_out"]) < 0.1
    assert silent["snr_batch"] > 1.2


# ---------------------------------------------------------------------------------------------- entries
def test_study_separates_queries_from_mean_pooling():
    planted = planted_world.Planted(steps=60)
    names = ("mean pooling", "plain queries", "queries, everything")
    found = {name: planted_world.study_run(planted, planted_world.VARIANTS[name], 0.1, seed=0) for name in names}
    pooled, everything = found["mean pooling"]["auc"], found["queries, everything"]
    assert found["plain queries"]["auc"] > pooled + 0.05
    assert everything["auc"] > pooled + 0.05
    assert everything["auc"] > everything["uniform"] + 0.05
    assert everything["attention"] > 0.8 and everything["w"] > 0.8
    again = planted_world.study_run(planted, planted_world.VARIANTS[names[-1]], 0.1, seed=0)
    assert again == everything


def test_auc_inside_by_hand():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 9.0], [0.0, 1.0, 2.0]])
    forged = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1]]).bool()
    assert planted_world.auc_inside(scores, forged) == pytest.approx((1.0 + 0.5) / 2)
    with pytest.raises(ValueError, match="no picture"):
        planted_world.auc_inside(scores[1:2], forged[1:2])


def test_steps_are_measured():
    costs = list(step_cost.measure_steps(make(), (2, 4), device="cpu", repeats=1))
    assert [cost.batch for cost in costs] == [2, 4]
    assert all(0 < cost.seconds < math.inf and cost.peak > 0 for cost in costs)


def test_usage(capsys):
    for arguments in ([], ["--study", "--memory"], ["--study", "--seeds", "0"]):
        with pytest.raises(SystemExit) as stop:
            qtfp_tokens.main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()


def test_study_report(capsys, monkeypatch):
    numbers = ("auc", "uniform", "attention", "w", "correlation", "correlation_real")
    run = dict.fromkeys(numbers, 0.5) | {"entropy": 0.25}
    monkeypatch.setattr(planted_world, "study_run", lambda *_: run)
    monkeypatch.setattr(planted_world, "study_snr", lambda *_: dict.fromkeys(SNR_NAMES, 1.5))
    assert qtfp_tokens.main(["--study", "--seeds", "2"]) == 0
    printed = capsys.readouterr().out
    looked = sum(v.pool == "queries" for v in planted_world.VARIANTS.values())
    aucs = len(planted_world.VARIANTS) * len(planted_world.FRACTIONS)
    assert printed.count("0.500 +- 0.000") == aucs + 5 * looked
    assert printed.count("0.250 +- 0.000") == looked
    assert printed.count("1.500 +- 0.000") == 4 * (len(planted_world.FRACTIONS) + 1)


SNR_NAMES = ("patch", "snr_held_out", "snr_ema", "snr_batch")
