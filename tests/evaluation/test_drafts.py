"""What the whole model accepts of a draft: by hand, and of models whose next token is known."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import CharTokenizer, make_transformer, random_windows, zero_layer
from transformers import LlamaConfig, LlamaForCausalLM

from llama import Llama
from short_gpt import ShortGPTError, ShortHFModel, ShortLlama
from short_gpt.data import Window
from short_gpt.evaluation import Agreement, draft_agreement
from short_gpt.evaluation.drafts import LENGTHS, check_same_tokens

VOCAB = 96
YES, NO = True, False


def counts(agreed: list[bool], length: int) -> tuple[int, int, int]:
    found = Agreement((tuple(agreed),), (None,)).at(length)
    assert found.written == len(agreed)
    return found.accepted, found.drafted, found.passes


def test_known_answers():
    """Drafts of 2: [yes no] then one by the whole model, so the next begins at the third."""
    text = [YES, NO, YES, YES, NO, YES, YES]
    assert counts(text, 1) == (3, 4, 4)  # yes | yes | no | yes: one in two is the whole model's
    assert counts(text, 2) == (5, 6, 3)  # yes no | yes yes | yes yes
    assert counts(text, 3) == (5, 8, 3)  # yes no yes | yes yes no | yes yes
    assert counts([YES] * 9, 2) == (6, 6, 3)
    assert counts([YES] * 9, 8) == (8, 8, 1)
    assert counts([NO] * 3, 4) == (0, 6, 3)  # 3 are left, then 2, then 1


def test_the_first_disagreement_ends_a_draft():
    assert counts([NO, YES, YES, YES], 4) == (3, 7, 2)
    assert counts([NO, YES, YES, NO], 4) == (2, 7, 2)
    assert counts([YES, YES, NO], 3) == (2, 3, 1)


def test_the_error_is_that_of_a_share_over_prompts_or_their_texts():
    each = ((YES, NO, YES), (NO, NO, NO), (YES, YES, YES))  # length 1: 2 of 2, 0 of 3, 2 of 2
    found = Agreement(each, (None, None, None)).at(1)
    assert found.share == 4 / 7 and found.tokens_per_pass == 9 / 7
    squares = sum((share - 4 / 7) ** 2 for share in (2 / 5, 4 / 4, 2 / 5))  # without one prompt
    assert found.error.standard_error == pytest.approx(math.sqrt(2 / 3 * squares))
    assert 1.5 < found.error.degrees < 2
    content = found.to_dict()
    assert content["standard_error"] == found.error.standard_error
    assert content["reach_95"] == found.error.reach() > 0
    two = Agreement(each, (0, 0, 1)).at(1)  # texts, which tell too little of others
    assert two.error.degrees == pytest.approx(1)
    assert two.to_dict()["standard_error"] > 0 and two.to_dict()["reach_95"] is None
    alone = Agreement(each[:1], (0,)).at(1).to_dict()
    assert alone["standard_error"] is None and alone["reach_95"] is None


def counting(step: dict[int, int] | None = None) -> ShortLlama:
    """A model of layers that do nothing, which writes i + 1 behind i, but for some tokens."""
    model = make_transformer()
    for layer in range(5):
        zero_layer(model, layer)
    following = [{**dict.fromkeys(range(VOCAB), 1), **(step or {})}[i] + i for i in range(VOCAB)]
    with torch.no_grad():
        rows = torch.nn.functional.normalize(model.tok_embeddings.weight, dim=-1)
        model.tok_embeddings.weight.copy_(rows)
        model.norm.weight.fill_(1)
        model.output.weight.zero_()
        for token, after in enumerate(following):
            model.output.weight[after % VOCAB] += rows[token]
    llama = Llama(model, CharTokenizer())
    llama.tokenizer.stop_tokens = frozenset({90})
    return ShortLlama(llama)


def test_a_pair_of_models_of_known_acceptance():
    """The draft writes what the whole model does, but behind 14 and 17."""
    whole, draft = counting(), counting({14: 5, 17: 5})
    assert whole.greedy([7, 10], 3) == [11, 12, 13] and draft.greedy([14], 2) == [19, 20]
    found = draft_agreement(whole, draft, [[10]], tokens=8)
    assert found.agreed == ((YES, YES, YES, YES, NO, YES, YES, NO),)  # 11 to 18; 15 and 18 are not
    assert found.at(4).share == 6 / 7 and found.at(8).passes == 2
    again = draft_agreement(draft, whole, [[10], [20]], tokens=5)
    assert again.agreed == ((YES,) * 4 + (NO,), (YES,) * 5)


def test_a_text_ends_where_the_whole_model_ends_it():
    found = draft_agreement(counting(), counting({88: 2}), [Window([87], 4)], tokens=8)
    assert found.agreed == ((YES, NO, YES),)  # 88, 89 and 90, which ends it
    assert found.texts == (4,)


@pytest.mark.filterwarnings("default")
def test_a_model_agrees_with_itself_in_any_format():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 96}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    hf = ShortHFModel(LlamaForCausalLM(config))
    meta = ShortLlama(Llama(make_transformer(), CharTokenizer()))
    for short in (meta, hf):
        found = draft_agreement(short, short, random_windows(2, 9), tokens=20)
        for length in LENGTHS:
            assert found.at(length).share == 1
        assert found.at(4).tokens_per_pass == found.at(4).written / found.at(4).passes


@pytest.mark.parametrize("shorter", ["whole", "draft"])
def test_the_text_must_fit_the_model_that_takes_less(shorter):
    models = {"whole": counting(), "draft": counting()}
    models[shorter].llama.model.params.max_seq_len = 20
    assert draft_agreement(**models, prompts=[[1] * 15], tokens=5).agreed
    with pytest.raises(ShortGPTError, match="16 tokens and `tokens` 5 are more than .* takes, 20"):
        draft_agreement(**models, prompts=[[1] * 16], tokens=5)


def test_what_cannot_be_compared_is_refused():
    whole = counting()
    for prompts in ([], [[]]):
        with pytest.raises(ShortGPTError, match="expected prompts of at least one token"):
            draft_agreement(whole, whole, prompts)
    with pytest.raises(ShortGPTError, match="60 tokens and `tokens` 5 are more than .* takes, 64"):
        draft_agreement(whole, whole, [[1] * 60], tokens=5)
    with pytest.raises(ShortGPTError, match="tokens = 0: expected a whole number of at least 1"):
        draft_agreement(whole, whole, [[1]], tokens=0)
    small = ShortLlama(Llama(make_transformer(vocab_size=80), CharTokenizer()))
    with pytest.raises(ShortGPTError, match="b cannot draft for a: .* 80 tokens instead of 96"):
        check_same_tokens(whole, small, ("a", "b"))

    class Other(CharTokenizer):
        def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
            return super().encode(s.replace("12", "a"), bos, eos)

    other = ShortLlama(Llama(make_transformer(), Other()))
    with pytest.raises(ShortGPTError, match="b cannot draft for a: .* splits texts otherwise"):
        check_same_tokens(whole, other, ("a", "b"))
    check_same_tokens(whole, counting(), ("a", "b"))
