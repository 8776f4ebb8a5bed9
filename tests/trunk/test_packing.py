"""Packed sequences: the states and the adapters' gradients of padded ones, to the last digits."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import logging
import pickle

import peft
import pytest
import torch
from accelerate.utils import send_to_device
from naive import batched_in_small_steps
from tiny_models import batches_continuously, tiny_base
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qadapter import QAdapterError
from qadapter.trunk import packed_attention
from qadapter.trunk import packing as packing_module
from qadapter.trunk.gathering import Gathering
from qadapter.trunk.lm_head import trunk
from qadapter.trunk.loading import shell_of
from qadapter.trunk.packing import Packing, can_pack, hidden_rows, hidden_states

TOLERANCES = {"mixtral": 1e-6}
"""Where other than 1e-10: a router works in float32."""
WINDOWED = {"sliding_window": 5}
BASES = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "num_hidden_layers": 4, **WINDOWED,
                               "sliding_window_pattern": 2}),
    "mistral": ("mistral", WINDOWED),
    "phi": ("phi", {}),
    "mixtral": ("mixtral", WINDOWED),
}
TEXTS = {
    "pairs": ["abcdefgh_ijkl", "abcdefgh_mn", "xyz_abcdefg", "xyz_b"],
    "system message": ["sysone_abc", "sysone_abd", "systwo_abcdefghi", "systwo_x", "other"],
    "alike": ["abcdefgh", "abcdefgh", "abcdefgh", "xyz"],
    "one in another": ["abc", "abcdefghijkl", "a", "abcdefgh"],
    "single tokens": ["a", "b", "a", "c"],
    "one": ["abcdefghijk"],
    "long and short": ["abcdefghijklmnopqrstuvwxyz", "abc", "z", "zyxwvutsrqponmlkjihgfedcba"],
}


def ids_of(texts) -> list[torch.Tensor]:
    return [torch.tensor([ord(c) - ord("_") + 1 for c in text]) for text in texts]


def trained(name: str, **changes) -> torch.nn.Module:
    """A tiny base in float64 with a LoRA that does something."""
    architecture, settings = BASES[name]
    base = tiny_base(architecture, **settings | changes).requires_grad_(False)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for parameter in adapters(base):
        torch.nn.init.normal_(parameter, std=0.2)
    base.double().eval()
    if architecture == "mixtral":
        base.set_experts_implementation("eager")  # the grouped product has no float64
    for path, module in list(base.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            scale = module.weight + 1.0 if architecture.startswith("gemma") else module.weight
            eps = getattr(module, "variance_epsilon", None) or module.eps
            base.set_submodule(path, WideNorm(scale.detach(), eps))
    return base


class WideNorm(torch.nn.Module):
    """transformers' norms round to float32; this one does not."""

    def __init__(self, scale, eps):
        super().__init__()
        self.register_buffer("scale", scale)
        self.eps = eps

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.scale, self.eps)


def adapters(base) -> list[torch.nn.Parameter]:
    return [p for p in base.parameters() if p.requires_grad]


def padded(base, texts) -> list[torch.Tensor]:
    """Each text's states, [T, D], from one batch padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    states = trunk(base)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return [x[:length] for x, length in zip(states, lengths, strict=True)]


def in_a_row(base, texts, **options) -> list[torch.Tensor]:
    packing = Packing.of(texts, **options)
    states = hidden_states(base, packing, packed=True)
    return [states[line] for line in packing.lines]


def loss_of(states: list[torch.Tensor]) -> torch.Tensor:
    """Another weight for every state of every text, so that no sum hides a gradient."""
    torch.manual_seed(3)
    return sum((x * torch.randn_like(x)).sum() for x in states)


@pytest.fixture(params=["blocks", "varlen", "flex"])
def kernel(request, monkeypatch):
    """Kernels of a GPU in place of the CPU's: their index arithmetic around plain definitions of
    what they call."""
    if request.param != "blocks":
        attends = functools.partial(packed_attention.by_lines, attend=variable_lengths)
        monkeypatch.setitem(packed_attention.KERNELS, "varlen", attends)
        monkeypatch.setattr(packed_attention, "flex_attention", masked)
        monkeypatch.setattr(packing_module, "kernels_for", lambda *args: [request.param])
        monkeypatch.setattr(Gathering, "total", Gathering.folded)
    return request.param


def variable_lengths(
    query, key, value, query_offsets, key_offsets, most_queries, most_keys, *, scale, window_size,
    enable_gqa=False,
):
    """Attention of segments [from offset to offset, H, d], causal from the bottom right."""
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    back, ahead = window_size
    assert ahead == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    segments = [itertools.pairwise(x.tolist()) for x in (query_offsets, key_offsets)]
    for (start, stop), (first, last) in zip(*segments, strict=True):
        queries, keys = stop - start, last - first
        assert 0 < queries <= most_queries and keys <= most_keys
        places = torch.arange(queries)[:, None] + keys - queries
        seen = torch.arange(keys) <= places
        if back >= 0:
            seen &= torch.arange(keys) >= places - back
        parts = query[start:stop], key[first:last], value[first:last]
        outputs.append(dense(*(x.transpose(0, 1) for x in parts), seen, scale).transpose(0, 1))
    return torch.cat(outputs)


def masked(query, key, value, *, score_mod, block_mask, scale, enable_gqa, kernel_options):
    """FlexAttention's definition: each pair of tokens asked for."""
    tokens = query.shape[2]
    assert tokens % 128 == 0 and block_mask.shape[-2:] == (tokens, tokens)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    seen = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), i, j)
    return dense(query[0], key[0], value[0], seen, scale, score_mod)[None]


def dense(query, key, value, seen, scale, score_mod=None):
    groups = query.shape[0] // key.shape[0]
    key, value = (x.repeat_interleave(groups, 0) for x in (key, value))
    scores = scale * query @ key.transpose(1, 2)
    if score_mod is not None:
        scores = score_mod(scores, None, None, None, None)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_states_and_gradients_are_the_padded_ones(name, checkpointed, kernel):
    base = trained(name)
    assert can_pack(base, 40, gradients=True) is None
    assert all(p.grad is None for p in base.parameters())
    if checkpointed:
        base.gradient_checkpointing_enable()
        base.train()
    tolerance, attended = TOLERANCES.get(name, 1e-10), []
    trunk(base).layers[0].self_attn.register_forward_hook(lambda *args: attended.append(1))
    for texts in map(ids_of, TEXTS.values()):
        expected = padded(base, texts)
        gradients = torch.autograd.grad(loss_of(expected), adapters(base))
        # Some are 0 but for rounding: of single tokens, a query's.
        scale = max(g.abs().max().item() for g in gradients)
        assert scale > 0.1
        for share in (True, False):
            states = in_a_row(base, texts, share=share)
            for ours, theirs in zip(states, expected, strict=True):
                assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
            loss, before = loss_of(states), len(attended)
            for ours, theirs in zip(
                torch.autograd.grad(loss, adapters(base)), gradients, strict=True
            ):
                assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)
            assert len(attended) - before == checkpointed


def test_unpacked_blocks_are_the_padded_batch_too():
    base, texts = trained("mistral"), ids_of(TEXTS["pairs"])
    packing = Packing.of(texts)
    states = hidden_states(base, packing, packed=False)
    gradients = torch.autograd.grad(loss_of([states[x] for x in packing.lines]), adapters(base))
    expected = padded(base, texts)
    theirs = torch.autograd.grad(loss_of(expected), adapters(base))
    for line, other in zip(packing.lines, expected, strict=True):
        assert_close(states[line], other, rtol=1e-10, atol=1e-10)
    for one, other in zip(gradients, theirs, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [True, False])
def test_states_may_enter_instead_of_tokens(packed):
    base = trained("gemma3")
    packing = Packing.of(ids_of(TEXTS["pairs"]))
    entering_ND = base.get_input_embeddings()(packing.ids_N)
    assert_close(
        hidden_states(base, packing, packed=packed, trunk=trunk(base), entering_ND=entering_ND),
        hidden_states(base, packing, packed=packed), rtol=1e-10, atol=1e-10,
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_no_mask_of_the_whole_row_is_made(name, monkeypatch):
    def made(**kwargs):
        raise AssertionError(f"a mask of {kwargs['q_length']} tokens")

    base, packing = trained(name), Packing.of(ids_of(TEXTS["pairs"]))
    expected = hidden_states(base, packing, packed=True)  # checked by now
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", made)
    assert torch.equal(hidden_states(base, packing, packed=True), expected)
    with pytest.raises(AssertionError, match="a mask of 13 tokens"):
        padded(base, ids_of(TEXTS["pairs"]))


def test_rows_of_a_padded_batch_come_back_in_place():
    base, texts = trained("llama"), ids_of(TEXTS["pairs"])
    longest = max(map(len, texts))
    ids, mask = torch.zeros(2, len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):  # on the left, in turn with the right
        place = slice(0, len(text)) if row % 2 else slice(longest - len(text), longest)
        ids[row, place], mask[row, place] = text, 1
    (rows,) = hidden_rows(lambda x: [hidden_states(base, x, packed=True)], ids, mask)
    for row, states in enumerate(padded(base, texts)):
        assert_close(rows[row][mask[row].bool()], states, rtol=1e-10, atol=1e-10)
        assert not rows[row][~mask[row].bool()].any()


# --- the layout -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_every_beginning_runs_once(name):
    texts = ids_of(TEXTS[name])
    packing = Packing.of(texts)
    beginnings = {tuple(ids[:end].tolist()) for ids in texts for end in range(1, len(ids) + 1)}
    assert len(packing.ids_N) == len(beginnings)
    check_layout(packing, texts)


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_is_shared_where_it_should_not_be(name):
    texts = ids_of(TEXTS[name])
    packing = Packing.of(texts, share=False)
    assert len(packing.ids_N) == sum(map(len, texts))
    assert torch.equal(packing.ids_N, torch.cat(texts))
    check_layout(packing, texts)


def check_layout(packing, texts):
    assert packing.longest == max(map(len, texts))
    for text, line in zip(texts, packing.lines, strict=True):
        assert torch.equal(packing.ids_N[line], text)
        assert torch.equal(packing.positions_N[line], torch.arange(len(text)))
    blocks = [packing.ids_N[block] for block in packing.blocks]
    assert torch.equal(packing.gather(blocks), packing.ids_N)
    for places in (packing.block_places, packing.key_places):
        assert torch.equal(places.rows_M[places.first_N], torch.arange(len(packing.ids_N)))


def test_a_layout_moves_whole():
    packing = Packing.of(ids_of(TEXTS["pairs"]))
    assert packing.to("cpu") is packing
    moved = packing.to("meta")
    tensors = [moved.ids_N, moved.positions_N, moved.ends_N, *moved.blocks, moved.query_offsets,
               moved.key_offsets, moved.block_places.rows_M, moved.key_places.folds[0][0]]
    assert all(x.is_meta for x in tensors)
    assert not any(line.is_meta for line in moved.lines)


def test_a_layout_reaches_the_trunk_through_workers_and_accelerate():
    packing = Packing.of(ids_of(TEXTS["pairs"]))
    batch = send_to_device({"packing": packing}, torch.device("meta"), non_blocking=True)
    assert batch["packing"].ids_N.is_meta
    again = pickle.loads(pickle.dumps(packing))
    check_layout(again, ids_of(TEXTS["pairs"]))


def test_what_is_gathered_several_times_is_summed():
    torch.manual_seed(0)
    rows = torch.randint(9, (60,))
    rows[-9:] = torch.arange(9)
    used = torch.cat([torch.randperm(51)[:40], torch.arange(51, 60)])
    gathering = Gathering.of(rows.numpy(), used.numpy(), 9)
    gradient = torch.zeros(60, 2, 3, dtype=torch.float64)
    gradient[used] = torch.randn(len(used), 2, 3, dtype=torch.float64)
    expected = torch.zeros(9, 2, 3, dtype=torch.float64).index_add(0, rows, gradient)
    assert_close(gathering.folded(gradient), expected)
    assert_close(gathering.total(gradient), expected)
    half = gathering.folded(gradient.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close(half.double(), expected, rtol=2**-7, atol=2**-6)


# --- elsewhere it is sdpa -------------------------------------------------------------------


@pytest.fixture
def before_and_after():
    """A call without and with the attention that takes packings."""
    def compare(call):
        AttentionInterface.register("sdpa", sdpa_attention_forward)
        before = call()
        packed_attention.install("sdpa")
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
        return before, call()

    return compare


GENERATION = {
    "greedy": {}, "beams": {"num_beams": 3}, "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_generation_is_what_it_was_bit_for_bit(before_and_after, name, mode):
    architecture, settings = BASES[name]
    base = tiny_base(architecture, **settings)
    ids = torch.tensor([[0, 0, 5, 9, 11], [3, 20, 7, 8, 2]])
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}

    def generate():
        outputs = base.generate(
            ids, attention_mask=(ids != 0).long(), do_sample=False, **options, **GENERATION[mode]
        )
        return outputs.sequences, torch.stack(outputs.logits)

    for before, after in zip(*before_and_after(generate), strict=True):
        assert torch.equal(before, after)


@batches_continuously
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_continuous_batching_is_what_it_was(before_and_after, name):
    architecture, settings = BASES[name]
    base = tiny_base(architecture, **settings)
    prompts = [[5, 9, 11], [3, 20, 7, 8, 2, 30, 31]]
    before, after = before_and_after(lambda: batched_in_small_steps(base, prompts, 6))
    assert before == after and all(len(tokens) == 6 for tokens in before)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BASES)
def test_padded_batches_and_their_gradients_are_what_they_were(before_and_after, name, side):
    base = trained(name)
    ids = torch.tensor([[5, 9, 11, 3, 7, 8, 30, 31], [3, 20, 7, 0, 0, 0, 0, 0]])
    if side == "left":
        ids[1] = ids[1].roll(5)
    mask = (ids != 0).long()

    def run():
        states = trunk(base)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        kept = states[mask.bool()]
        return [kept, *torch.autograd.grad(kept.sin().sum(), adapters(base))]

    for before, after in zip(*before_and_after(run), strict=True):
        assert torch.equal(before, after)


def test_it_compiles_whole(before_and_after):
    base = tiny_base("llama")
    ids = torch.tensor([[5, 9, 11, 3]])

    def run():
        torch.compiler.reset()
        compiled = torch.compile(trunk(base), backend="eager", fullgraph=True)
        with torch.no_grad():
            return compiled(input_ids=ids, use_cache=False).last_hidden_state

    assert torch.equal(*before_and_after(run))


def test_a_base_says_nothing_of_it(tmp_path):
    base = tiny_base("llama")
    base.save_pretrained(tmp_path / "before")
    assert can_pack(base, 8) is None
    assert base.config._attn_implementation == "sdpa"
    base.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / x / "config.json").read_text() for x in ("before", "after"))
    assert before == after


@pytest.mark.parametrize("copied", [copy.deepcopy, shell_of])
def test_copies_pack_too(copied):
    base, packing = trained("llama"), Packing.of(ids_of(TEXTS["pairs"]))
    expected = hidden_states(base, packing, packed=True)
    assert torch.equal(hidden_states(copied(base), packing, packed=True), expected)


def test_another_attention_of_that_name_is_kept_and_packs_still():
    """Someone registers their own sdpa after us: it serves what has no packing."""
    base, packing = trained("llama"), Packing.of(ids_of(TEXTS["pairs"]))
    expected = hidden_states(base, packing, packed=True)
    calls = []

    def theirs(*args, **kwargs):
        calls.append(1)
        assert "packing" not in kwargs
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("sdpa", theirs)
    assert torch.equal(hidden_states(base, packing, packed=True), expected)
    padded(base, ids_of(TEXTS["pairs"]))
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert calls


# --- what can't be packed -------------------------------------------------------------------


def test_what_mixes_tokens_outside_attention_is_refused():
    base = trained("llama")
    handle = trunk(base).layers[0].register_forward_hook(
        lambda module, args, output: output + 0.1 * output.roll(1, dims=1)
    )
    assert "packed states are not its padded ones" in can_pack(base, 8)
    with torch.no_grad(), pytest.raises(QAdapterError, match="can't run packed: its packed states"):
        hidden_states(base, Packing.of(ids_of(["ab"])), packed=True)
    handle.remove()


HYBRIDS = {
    "mamba": {"state_size": 4, "expand": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                  "head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_state_space_and_convolution_models_are_refused(architecture):
    base = tiny_base(architecture, **HYBRIDS[architecture])
    reason = can_pack(base, 8)
    assert reason is not None and "\n" not in reason
    assert can_pack(base, 8) == reason


def test_capped_attention_is_refused_by_name():
    base = tiny_base("gemma2")  # an older transformers loads it with sdpa, newer ones don't
    assert "caps its logits, which sdpa can't" in can_pack(base, 8)
    base.set_attn_implementation("eager")
    assert "(eager) caps its logits, which sdpa can't" in can_pack(base, 8)


def test_eager_attention_is_refused_with_the_way_out():
    base = tiny_base("llama")
    base.set_attn_implementation("eager")
    assert can_pack(base, 8) == (
        "its attention is 'eager': load it with attn_implementation=\"sdpa\""
    )
    base.set_attn_implementation("sdpa")
    assert can_pack(base, 8) is None


def test_a_window_that_attention_is_not_told_of_is_refused():
    base = tiny_base("llama")
    base.config.sliding_window = 8
    assert can_pack(base, 8) is None
    assert "of their window (8 tokens)" in can_pack(base, 9)


def test_layers_that_drop_keyword_arguments_are_refused():
    reason = "its layers hand its attention no keyword arguments"
    assert can_pack(tiny_base("stablelm"), 8) == reason


def test_what_sdpa_cannot_do_is_no_advice():
    base = tiny_base("bloom")
    assert can_pack(base, 8) == (
        "its attention is 'eager': transformers has no sdpa attention for BloomForCausalLM"
    )


def test_a_kernel_that_fails_is_followed_by_the_next(monkeypatch, caplog):
    base = trained("llama")
    monkeypatch.setattr(packing_module, "kernels_for", lambda *args: ["varlen", "blocks"])
    broken = functools.partial(packed_attention.by_lines, attend=None)
    monkeypatch.setitem(packed_attention.KERNELS, "varlen", broken)
    with caplog.at_level(logging.WARNING):
        assert can_pack(base, 8) is None
    (record,) = caplog.records
    assert "packed by blocks, not by varlen: this torch has no" in record.message


def test_kernels_by_what_a_gpu_can_do():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert packed_attention.kernels_for(cpu, torch.bfloat16, False) == ["blocks"]
    assert packed_attention.kernels_for(cuda, torch.bfloat16, False) == ["varlen", "flex", "blocks"]
    assert packed_attention.kernels_for(cuda, torch.float32, False) == ["blocks"]
    assert packed_attention.kernels_for(cuda, torch.bfloat16, True) == ["flex"]


def test_capped_attention_of_flex(monkeypatch):
    """Gemma 2 with FlexAttention: its caps and windows, against its own eager attention."""
    monkeypatch.setattr(packed_attention, "flex_attention", masked)
    base = tiny_base("gemma2", attn_logit_softcapping=1.5, sliding_window=5).double()
    base.set_attn_implementation("eager")
    texts = ids_of(TEXTS["pairs"])
    expected = [padded(base, [text])[0] for text in texts]
    packed_attention.install("flex_attention")
    base.config._attn_implementation = "flex_attention"
    packing = Packing.of(texts)
    states = packing_module._in_a_row(
        base, trunk(base), dataclasses.replace(packing, kernel="flex")
    )
    for line, theirs in zip(packing.lines, expected, strict=True):
        assert_close(states[line], theirs, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_not_the_padded_one_is_refused(monkeypatch):
    base = trained("llama")
    monkeypatch.setattr(
        packing_module, "_outcome", _halved_in_a_row(packing_module._outcome)
    )
    assert can_pack(base, 8) is None
    assert "packed gradients are not its padded ones" in can_pack(base, 8, gradients=True)


def _halved_in_a_row(outcome):
    calls = itertools.count()

    def changed(hidden, parameters):
        states, gradients = outcome(hidden, parameters)
        return states, gradients * (0.5 if next(calls) % 2 == 0 else 1.0)

    return changed


def test_copies_are_checked_on_their_own_and_nothing_holds_a_base():
    base = trained("llama")
    assert can_pack(base, 8) is None
    held = len(packing_module._verdicts)
    other = copy.deepcopy(base)
    assert can_pack(other, 8) is None
    assert len(packing_module._verdicts) == held + 1
    del other
    assert len(packing_module._verdicts) == held
