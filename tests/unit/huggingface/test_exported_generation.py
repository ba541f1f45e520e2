"""`generate` with transformers' caches: what it says, what the cache keeps, what is refused."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DataCollatorWithFlattening,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from tests.unit.huggingface.exports import IDS, MOE, Run, assert_logits, load, saved_run
from tests.unit.single_process import default_group

pytestmark = pytest.mark.usefixtures("seed")

WINDOW, BLOCK = 5, 4
NEW = 14
"""Tokens to generate: over borders of blocks and of the window."""


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, session_seed: int
) -> Iterator[tuple[Run, PreTrainedModel]]:
    """A run of a model with all kinds of layers and experts, and what transformers loads of it."""
    torch.manual_seed(session_seed)
    folder = tmp_path_factory.mktemp("generation")
    with default_group(), saved_run(folder / "run", "model.layout=F S W S F S", *MOE) as run:
        yield run, load(run.export(folder / "exported"))


def greedy(model: PreTrainedModel, tokens: Tensor, **options: object) -> Tensor:
    # Without a mask transformers would take the padding token among random ones for padding.
    options.setdefault("attention_mask", torch.ones_like(tokens))
    return model.generate(tokens, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **options)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 11])
def test_greedy_tokens_are_those_of_full_passes(
    exported: tuple[Run, PreTrainedModel], length: int
) -> None:
    run, model = exported
    for _ in range(20):
        prompt = torch.randint(0, IDS, (2, length))
        tokens, closest = prompt, float("inf")
        for _ in range(NEW):
            logits = run.logits(tokens)[:, -1]
            best = logits[:, :IDS].topk(2, dim=-1)
            closest = min(closest, float((best.values[:, 0] - best.values[:, 1]).min()))
            tokens = torch.cat([tokens, best.indices[:, :1]], dim=1)
        if closest > 1e-4:  # else rounding may choose another token
            break
    else:
        raise AssertionError("no prompt without near-ties in 20 tries")
    assert torch.equal(greedy(model, prompt), tokens)


def test_prefill_in_chunks(exported: tuple[Run, PreTrainedModel]) -> None:
    run, model = exported
    tokens = run.clear_tokens(batch=2, length=23)
    with torch.no_grad():
        for sizes in ([1] * 23, [7, 1, 8, 7], [BLOCK, 19], [22, 1]):
            cache = DynamicCache(config=model.config)
            parts = [model(part, cache=cache).logits for part in tokens.split(sizes, dim=1)]
            assert_logits(torch.cat(parts, dim=1), model, tokens)


def test_what_a_cache_keeps(exported: tuple[Run, PreTrainedModel]) -> None:
    _, model = exported
    prompt = torch.randint(0, IDS, (2, 11))
    output = greedy(model, prompt, return_dict_in_generate=True)
    kept = [layer.keys.shape[2] for layer in output.cache.layers]
    # The last token was not read; a window's own token is never in the cache when it is needed.
    total = prompt.shape[1] + NEW - 1
    assert kept == [total if kind == "F" else WINDOW - 1 for kind in model.config.layout]


def test_prompts_of_different_lengths(exported: tuple[Run, PreTrainedModel]) -> None:
    """Padded on the left each prompt is continued as alone: its blocks count from its start."""
    run, model = exported
    tokenizer = AutoTokenizer.from_pretrained(run.path.parent / "exported", trust_remote_code=True)
    texts = ["Sparse", "a somewhat longer one", "x"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert tokenizer.padding_side == "left"
    assert batch.input_ids.shape == (3, len(texts[1]))
    found = greedy(model, batch.input_ids, attention_mask=batch.attention_mask)
    for row, text in enumerate(texts):
        alone = greedy(model, torch.tensor([list(text.encode())]))
        assert torch.equal(found[row, -NEW:], alone[0, -NEW:]), text


def test_padding_changes_no_logit_and_no_gradient(exported: tuple[Run, PreTrainedModel]) -> None:
    run, model = exported
    tokens = run.clear_tokens(batch=1, length=17)
    left, right = 6, 3
    padded = torch.nn.functional.pad(tokens, (left, right), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (left, right))
    # As always with transformers, the token after padding would be predicted from it.
    labels = torch.nn.functional.pad(tokens[:, 1:], (left + 1, right), value=-100)
    model.zero_grad()
    found = model(padded, attention_mask=mask, labels=labels)
    found.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    alone = model(tokens, labels=tokens)
    alone.loss.backward()
    assert_logits(found.logits[:, left : left + 17], model, tokens)
    torch.testing.assert_close(found.loss, alone.loss, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-4, atol=1e-4 * scale, msg=name
        )
    model.zero_grad(set_to_none=True)


def test_beams_and_samples_run(exported: tuple[Run, PreTrainedModel]) -> None:
    _, model = exported
    prompt = torch.randint(0, IDS, (2, 9))
    beams = model.generate(prompt, max_new_tokens=6, num_beams=3, do_sample=False)
    assert beams.shape[0] == 2
    assert int(beams.max()) < IDS  # ids that fill up the embedding are never generated
    samples = model.generate(
        prompt, max_new_tokens=6, do_sample=True, top_p=0.9, num_return_sequences=2
    )
    assert samples.shape[0] == 4
    assert int(samples.max()) < IDS


def test_what_is_not_supported_is_said(exported: tuple[Run, PreTrainedModel]) -> None:
    _, model = exported
    tokens = torch.randint(0, IDS, (1, 6))
    with pytest.raises(ValueError, match="padding between tokens"):
        model(tokens, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="one entry per token so far"):
        model(tokens, attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="packed"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="DynamicCache"):
        model(tokens, cache=StaticCache(config=model.config, max_cache_len=20))
    for name in ("static", "sliding_window"):
        with pytest.raises(ValueError, match="generate without cache_implementation"):
            greedy(model, tokens, cache_implementation=name)
    with pytest.raises(ValueError, match="exactly one"):
        model()


@pytest.mark.parametrize(
    "mark", ["return_position_ids", "return_flash_attn_kwargs", "return_seq_idx"]
)
def test_packed_documents_are_refused_however_they_are_marked(
    exported: tuple[Run, PreTrainedModel], mark: str
) -> None:
    _, model = exported
    collator = DataCollatorWithFlattening(**{"return_position_ids": False, mark: True})
    rows = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6, 7]}]
    for part in (model, model.model):
        with pytest.raises(ValueError, match="several documents packed into a row"):
            part(**collator(rows))
        part(**collator(rows[:1]))


def test_what_a_configuration_asks_for_counts(
    exported: tuple[Run, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = exported
    tokens = torch.randint(0, IDS, (1, 6))
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "output_hidden_states", True)
        assert len(model(tokens).hidden_states) == len(model.config.layout) + 1
        assert model(tokens, output_hidden_states=False).hidden_states is None
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "return_dict", False)
        assert isinstance(model(tokens), tuple)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "output_attentions", True)
        for part in (model, model.model):
            with pytest.raises(ValueError, match="output_attentions"):
                part(tokens)


def test_tuples_hold_what_objects_do(exported: tuple[Run, PreTrainedModel]) -> None:
    _, model = exported
    tokens = torch.randint(0, IDS, (1, 6))
    for part in (model, model.model):
        found = part(tokens, return_dict=False)
        assert isinstance(found, tuple)
        assert torch.equal(found[0], part(tokens)[0])
