from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from rayalign.config.sections import ModelConfig
from rayalign.ops.attention import (
    attention_mask,
    bidirectional_blocks,
    block_mask,
    can_pack,
    decoder_mask,
    layer_windows,
    packed,
    response_mask,
    runs_of,
    unpacked,
)
from rayalign.ops.rows import CHOSEN, PAD, PROMPT, REJECTED, RowLengths
from rayalign.policy.compat import shared_prefix_kernel
from rayalign.policy.tuner_checks import check_attention
from tests.tiny_models import encode_pair, make_batch, make_policy
from tests.watching import LargestTensor

# The row `[prompt | chosen | rejected | padding]` that the truth tables below are written for.
SEGMENTS = torch.tensor([[PROMPT, PROMPT, CHOSEN, REJECTED, REJECTED, PAD, PAD]])
POSITIONS = torch.tensor([[0, 1, 2, 2, 3, 0, 0]])

# float64 sums of the same terms in another order.
FLOAT64 = 1e-12


def rows_of(*counts: tuple[int, int, int]) -> tuple[Tensor, Tensor, RowLengths]:
    """Segments, places and lengths of rows with so many tokens of prompt, chosen and rejected response."""
    longest = max(map(sum, counts))
    segments, places = [], []
    for prompt, chosen, rejected in counts:
        padding = longest - prompt - chosen - rejected
        segments.append([PROMPT] * prompt + [CHOSEN] * chosen + [REJECTED] * rejected + [PAD] * padding)
        places.append([*range(prompt), *range(prompt, prompt + chosen), *range(prompt, prompt + rejected), *([0] * padding)])
    return torch.tensor(segments), torch.tensor(places), tuple((count[0], sum(count)) for count in counts)


# One row has no rejected response, one has one-token responses, one neither; each but the first is padded.
ROWS = ((6, 5, 4), (3, 2, 0), (4, 1, 1), (5, 0, 0))


def test_a_response_sees_the_prompt_and_itself_but_never_the_other_response() -> None:
    mask = attention_mask(SEGMENTS, POSITIONS)
    assert mask.shape == (1, 1, 7, 7)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],  # prompt
        [1, 1, 0, 0, 0, 0, 0],  # prompt
        [1, 1, 1, 0, 0, 0, 0],  # chosen
        [1, 1, 0, 1, 0, 0, 0],  # rejected: not the chosen token
        [1, 1, 0, 1, 1, 0, 0],  # rejected
        [1, 1, 0, 0, 0, 1, 0],  # padding: nobody reads it
        [1, 1, 0, 0, 0, 0, 1],  # padding: not even other padding
    ]


def test_the_sliding_window_counts_positions_not_places_in_the_row() -> None:
    mask = attention_mask(SEGMENTS, POSITIONS, sliding_window=2)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],  # position 0
        [1, 1, 0, 0, 0, 0, 0],  # position 1
        [0, 1, 1, 0, 0, 0, 0],  # chosen, position 2: the prompt's position 1 is one back
        [0, 1, 0, 1, 0, 0, 0],  # rejected, position 2: so it is here, though two places back
        [0, 0, 0, 1, 1, 0, 0],  # rejected, position 3
        [1, 1, 0, 0, 0, 1, 0],  # padding
        [1, 1, 0, 0, 0, 0, 1],  # padding
    ]


@pytest.mark.parametrize("sliding_window", [None, 1, 3])
def test_no_query_is_without_a_key_and_no_token_reads_padding(sliding_window: int | None) -> None:
    segments, places, _ = rows_of((6, 5, 4), (1, 1, 2))
    mask = attention_mask(segments, places, sliding_window=sliding_window)
    assert mask.any(dim=-1).all()
    real, padding = segments[1] != PAD, segments[1] == PAD
    assert not mask[1, 0][real][:, padding].any()


def test_the_mask_of_the_responses_is_that_of_whole_rows_from_the_first_response_token_on() -> None:
    segments, places, lengths = rows_of(*ROWS)
    whole, responses = attention_mask(segments, places), response_mask(segments, lengths)
    assert responses.shape == (4, 1, 9, 15)
    for b, (prompt, tokens) in enumerate(lengths):
        assert torch.equal(responses[b, 0, : tokens - prompt], whole[b, 0, prompt:tokens])


def heads(kv_heads: int, length: int) -> list[Tensor]:
    """Query, key and value of four rows: eight heads for queries."""
    return [torch.randn(4, n, length, 4, dtype=torch.float64, requires_grad=True) for n in (8, kv_heads, kv_heads)]


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_attention_in_two_parts_is_that_with_the_whole_mask_and_so_are_its_gradients(kv_heads: int) -> None:
    segments, places, lengths = rows_of(*ROWS)
    inputs = heads(kv_heads, segments.shape[1])
    module: Any = SimpleNamespace(num_key_value_groups=8 // kv_heads, is_causal=True)
    kept = segments != PAD
    grad_output = torch.randn(int(kept.sum()), 8, 4, dtype=torch.float64)
    in_a_line = (states.transpose(1, 2)[kept].transpose(0, 1)[None] for states in inputs)
    found = shared_prefix_kernel(module, *in_a_line, response_mask(segments, lengths), lengths)[0][0]
    mask = attention_mask(segments, places)
    plain = scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True).transpose(1, 2)[kept]
    torch.testing.assert_close(found, plain, atol=FLOAT64, rtol=0)
    gradients = [torch.autograd.grad(output, inputs, grad_output) for output in (found, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=FLOAT64, rtol=0)


def test_rows_come_out_of_a_line_as_they_were_put_in() -> None:
    segments, _, lengths = rows_of(*ROWS)
    ids = torch.arange(3 * segments.numel()).view(3, *segments.shape)
    line = packed(ids, lengths)
    assert line.shape == (3, 1, int((segments != PAD).sum()))
    assert line.tolist() == [[axis[segments != PAD].tolist()] for axis in ids]
    assert torch.equal(
        unpacked(line.permute(1, 2, 0), lengths, segments.shape[1]), ids.permute(1, 2, 0) * (segments != PAD)[:, :, None]
    )


def test_no_tensor_has_the_square_of_a_rows_length(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llava_next")
    sizes = {}
    kernels: tuple[Literal["sdpa", "eager"], ...] = ("sdpa", "eager")
    for attention in kernels:
        policy = make_policy(folder, model=ModelConfig(attn_implementation=attention, gradient_checkpointing=False))
        batch = make_batch(folder, [encode_pair(folder, "a", "Which digit is it? " * 60, "two", "a cat")])
        with LargestTensor() as largest:
            policy.logps(batch, ()).chosen.total.sum().backward()
        sizes[attention] = largest.numel
    square = batch.input_ids.numel() ** 2
    assert sizes["sdpa"] < square / 2
    assert sizes["eager"] >= square


@pytest.mark.parametrize(("attention", "padded"), [("sdpa", False), ("eager", True)])
def test_the_language_model_runs_over_no_padding(
    model_folder: Callable[..., Path], attention: Literal["sdpa", "eager"], padded: bool
) -> None:
    folder = model_folder("llava_next")
    policy = make_policy(folder, model=ModelConfig(attn_implementation=attention))
    pairs = [encode_pair(folder, "a", "Which digit is it?", "two", "a cat"), encode_pair(folder, "b", "?" * 40, "no", "yes")]
    batch = make_batch(folder, pairs)
    longest, tokens = batch.input_ids.shape[1], sum(pair.num_tokens for pair in pairs)
    assert tokens < 2 * longest
    seen = []
    decoder = policy.base.get_decoder()
    decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True)
    policy.logps(batch, ())
    assert seen == [(2, longest) if padded else (1, tokens)]
    assert policy.num_tokens_with_padding(batch) == (2 * longest if padded else tokens)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # compiled, it has no float64 on CPUs
@pytest.mark.parametrize(("sliding_window", "with_blocks"), [(None, False), (3, False), (None, True), (2, True)])
def test_flex_attention_sees_what_the_mask_says(sliding_window: int | None, with_blocks: bool) -> None:
    segments, places, _ = rows_of(*ROWS)
    blocks = runs_of((segments == PROMPT) & (places > 0)) if with_blocks else None
    options: dict[str, Any] = {"sliding_window": sliding_window, "blocks": blocks}
    mask, of_blocks = (make(segments, places, **options) for make in (attention_mask, block_mask))
    query, key, value = (tensor.detach() for tensor in heads(8, segments.shape[1]))
    found = flex_attention(query, key, value, block_mask=of_blocks)
    torch.testing.assert_close(found, scaled_dot_product_attention(query, key, value, attn_mask=mask), atol=FLOAT64, rtol=0)


def test_rows_are_packed_by_their_own_kernel_and_within_every_window() -> None:
    assert can_pack("shared_prefix", {"full_attention": None}, 1000)
    assert not can_pack("sdpa", {"full_attention": None}, 1000)
    windows = {"full_attention": None, "sliding_attention": 8}
    assert can_pack("shared_prefix", windows, 8)
    assert not can_pack("shared_prefix", windows, 9)


def test_each_kernel_gets_the_mask_in_its_own_form() -> None:
    made = {
        kernel: decoder_mask(
            SEGMENTS, POSITIONS, kernel=kernel, windows={"full_attention": None}, blocks=None, dtype=torch.bfloat16
        )
        for kernel in ("sdpa", "eager", "flex_attention")
    }
    allowed = attention_mask(SEGMENTS, POSITIONS)
    assert torch.equal(made["sdpa"], allowed)
    assert made["eager"].dtype == torch.bfloat16
    assert torch.equal(made["eager"] == 0, allowed)
    assert set(made["eager"][~allowed].tolist()) == {torch.finfo(torch.bfloat16).min}
    assert isinstance(made["flex_attention"], BlockMask)


def test_layers_with_a_window_have_masks_of_their_own() -> None:
    windows = layer_windows({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 2})
    assert windows == {"full_attention": None, "sliding_attention": 2}
    masks = decoder_mask(SEGMENTS, POSITIONS, kernel="sdpa", windows=windows, blocks=None, dtype=torch.float32)
    assert torch.equal(masks["full_attention"], attention_mask(SEGMENTS, POSITIONS))
    assert torch.equal(masks["sliding_attention"], attention_mask(SEGMENTS, POSITIONS, sliding_window=2))
    # Where all layers are of one kind, the decoder takes the mask itself.
    assert layer_windows({"sliding_window": 7}) == {"full_attention": 7}
    assert layer_windows({}) == {"full_attention": None}


def test_runs_are_numbered_in_each_row() -> None:
    marked = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 1]]).bool()
    assert runs_of(marked).tolist() == [[0, 0, -1, 1, -1], [-1, 0, -1, -1, 1]]


def test_an_images_tokens_or_the_prompts_see_each_other_where_a_family_says_so() -> None:
    is_image = torch.tensor([[True, False, True, True, False, False, False]])
    assert bidirectional_blocks("none", SEGMENTS, None) is None
    images, prompt = (bidirectional_blocks(kind, SEGMENTS, is_image) for kind in ("image", "prompt"))
    assert images is not None
    assert prompt is not None
    assert images.tolist() == [[0, -1, 1, 1, -1, -1, -1]]
    assert prompt.tolist() == [[0, 0, -1, -1, -1, -1, -1]]


def test_flex_attention_is_refused_where_it_could_not_train(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        make_policy(tmp_path, model=ModelConfig(attn_implementation="flex_attention"))
    assert str(caught.value) == (
        "--attn_implementation flex_attention on workers without a GPU: there it has no backward pass. Use sdpa, or give each "
        "worker a GPU."
    )
    check_attention(ModelConfig(attn_implementation="flex_attention"), on_gpu=True)
