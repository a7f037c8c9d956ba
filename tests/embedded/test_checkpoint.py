"""The shipped checkpoint: small, standard, made by this code, and coherent on prompts it never saw."""

import json
import random
from typing import Any

import pytest

from xllm.embedded import checkpoint_path
from xllm.embedded.dialogue import converse

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
MIB = 1 << 20


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(checkpoint_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32).eval()


def test_the_folder_is_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in checkpoint_path().iterdir()}
    assert set(sizes) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "results.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= 4 * MIB


def test_it_is_a_standard_qwen3_checkpoint(model: Any, tokenizer: Any) -> None:
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.tie_word_embeddings
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == ["<|im_end|>", "<|endoftext|>"]
    assert tokenizer.eos_token == "<|im_end|>"


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in ("Tell me a story.", "Größe 東京 🦊\n\n\tx  y ", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_the_tokenizer_is_what_the_training_script_makes() -> None:
    from xllm.embedded.text import train_tokenizer
    from xllm.embedded.train import SEED, TOKENIZER_CONVERSATIONS, VOCAB

    made = train_tokenizer(SEED, VOCAB, TOKENIZER_CONVERSATIONS)
    assert json.loads(made.to_str()) == json.loads((checkpoint_path() / "tokenizer.json").read_text("utf-8"))


def test_training_sees_what_the_chat_template_writes(tokenizer: Any) -> None:
    from xllm.embedded.text import segments

    rng = random.Random(1)
    for _ in range(20):
        conversation = converse(rng, stories=2)
        parts = list(segments(tokenizer.backend_tokenizer, conversation))
        text = tokenizer.apply_chat_template(conversation.messages(), tokenize=False)
        assert [token for part in parts for token in part.ids] == tokenizer.encode(text, add_special_tokens=False)
    ask = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi!"}], tokenize=False, add_generation_prompt=True
    )
    assert ask == "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"


def test_greedy_answers_to_unseen_prompts_are_coherent(model: Any, tokenizer: Any) -> None:
    from xllm.embedded.evaluate import tallies

    torch.set_num_threads(1)
    kinds = tallies(model, tokenizer.backend_tokenizer, per_kind=10, seed=11)
    for group in ("story", "question", "own story", "chat"):
        chosen = [tally for kind, tally in kinds.items() if kind.split(":")[0] == group]
        asked, wrong = sum(tally.asked for tally in chosen), [text for tally in chosen for text in tally.wrong]
        assert asked >= 10
        assert len(wrong) <= 0.05 * asked, (group, wrong)


def test_the_stated_figures_are_those_of_the_shipped_weights(model: Any, tokenizer: Any) -> None:
    from xllm.embedded.evaluate import held_out_loss

    stated = json.loads((checkpoint_path() / "results.json").read_text("utf-8"))
    assert stated["parameters"] == model.num_parameters()
    measured = held_out_loss(model, tokenizer.backend_tokenizer, conversations=50, seed=2)
    for group, nats in stated["held_out_nats_per_token"].items():
        assert abs(measured[group] - nats) < 0.05
    assert stated["coherent_greedy"]["all stories"] >= 0.95
    assert stated["coherent_greedy"]["all questions"] >= 0.95
