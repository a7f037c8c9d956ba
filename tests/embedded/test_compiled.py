"""The embedded model through the product: compiled, run by the native engine, greedy, its answers checked."""

import random
from pathlib import Path

import xllm
from xllm.compiler import compile_checkpoint
from xllm.embedded import checkpoint_path
from xllm.embedded.dialogue import QUESTION_KINDS, SPLIT_TOPICS, check_story, give_story, tell

PER_KIND = 6


def test_compiled_answers_to_unseen_prompts_are_coherent(tmp_path: Path) -> None:
    compile_checkpoint(checkpoint_path(), tmp_path / "story.xllm")
    rng = random.Random("compiled/unseen")
    stories = [tell(rng, topic, unseen=True)[0] for topic in SPLIT_TOPICS for _ in range(PER_KIND)]
    questions = [give_story(rng, kind, unseen=True)[0] for kind in QUESTION_KINDS for _ in range(PER_KIND)]
    prompts = [f"<|im_start|>user\n{turn.user}<|im_end|>\n<|im_start|>assistant\n" for turn in (*stories, *questions)]
    with xllm.LLM(tmp_path / "story.xllm", memory_bytes=512 << 20) as llm:
        replies = [done.text for done in llm.generate(prompts, temperature=0, max_tokens=128)]
    told, answers = replies[: len(stories)], replies[len(stories) :]
    wrong_stories = [text for turn, text in zip(stories, told, strict=True) if check_story(text, turn.user)]
    wrong_answers = [text for turn, text in zip(questions, answers, strict=True) if text != turn.assistant]
    assert len(wrong_stories) <= 0.05 * len(stories), wrong_stories
    assert len(wrong_answers) <= 0.05 * len(questions), wrong_answers
