"""The story language: what is written can be read back, and what is corrupted is refused."""

import random

import pytest

from xllm.embedded.dialogue import SPLIT_TOPICS, TOPICS, ask_about, check_story, tell
from xllm.embedded.grammar import QUESTIONS, Violation, answer, check_answer, read_story
from xllm.embedded.lexicon import NAMES, OBJECTS

STORY = (
    "One morning, Milo the fox was in the forest. The weather was rainy. Milo had a red lantern. "
    "He went to the market. There he met Nora the owl. Milo gave the lantern to Nora. Nora felt happy."
)


@pytest.mark.parametrize("topic", TOPICS)
def test_written_stories_are_accepted(topic: str) -> None:
    rng = random.Random(topic)
    for unseen in (False, True) if topic in SPLIT_TOPICS else (False,):
        for _ in range(50):
            turn, story = tell(rng, topic, unseen)
            assert check_story(turn.assistant, turn.user) == []
            assert read_story(story.text) == story.world
            assert 3 <= turn.assistant.count(".") <= 11


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("rainy", "purple", "no such sentence form"),
        ("Nora felt happy.", "Nora felt happy", "no such sentence form"),
        ("Nora felt happy.", "Nora felt sad.", "can't feel sad"),
        ("Nora felt happy.", "Milo felt happy.", "can't feel happy"),
        ("Nora felt happy.", "Otto felt happy.", "Otto was never introduced"),
        ("Nora felt happy.", "She felt happy.", "unclear who 'She' is"),
        ("He went", "She went", "'She' for Milo"),
        ("He went", "Nora went", "Nora was never introduced"),
        ("in the forest", "on the forest", "no such sentence form"),
        ("Nora the owl", "Milo the owl", "introduced twice"),
        ("Nora the owl", "Nora the fox", "a second fox"),
        ("to the market", "to the forest", "there already"),
        ("gave the lantern", "gave the kite", "without having it"),
        ("Milo gave the lantern to Nora", "Nora gave the lantern to Milo", "without having it"),
        ("lantern to Nora", "lantern to Milo", "not with Milo"),
        ("Nora felt happy.", "Milo thanked Nora.", "for nothing"),
        ("There he met Nora the owl. ", "", "Nora was never introduced"),
        ("One morning, Milo the fox was in the forest. ", "", "the story opens once, and first"),
        ("Milo had a red lantern. ", "Milo had a red lantern. Milo had a blue lantern. ", "already in the story"),
        ("Nora felt happy.", "Nora found the lantern.", "no lost lantern"),
        ("Nora felt happy.", "The weather was sunny.", "told twice"),
        ("gave the lantern", "gave the blue lantern", "the lantern is not blue"),
        ("Nora felt happy.", "It was still sunny.", "still sunny, but it was rainy"),
        ("Nora felt happy.", "Nora rested in the forest.", "rests in the forest, but is at the market"),
        ("Nora felt happy.", "Nora went to the hill. They walked to the mill together.", "different places"),
    ],
)
def test_corrupted_stories_are_refused(old: str, new: str, complaint: str) -> None:
    assert check_story(STORY, "Tell me a story about a fox and a lantern.") == []
    assert old in STORY
    with pytest.raises(Violation, match=complaint):
        read_story(STORY.replace(old, new))


def test_a_story_may_not_be_too_short_or_about_nothing() -> None:
    opening = "One morning, Milo the fox was in the forest."
    with pytest.raises(Violation, match="fewer than three"):
        read_story(f"{opening} He had a red lantern.")
    with pytest.raises(Violation, match="needs a thing"):
        read_story(f"{opening} He felt calm. He went to the hill.")
    with pytest.raises(Violation, match="needs weather"):
        read_story(f"{opening} He had a red lantern. He went to the hill.")


@pytest.mark.parametrize(
    ("request_text", "complaint"),
    [
        ("Tell me a story about a bear.", "no bear"),
        ("Tell me a story about a fox and a kite.", "no kite"),
        ("I want a story about a fox on the hill.", "nobody comes to the hill"),
        ("tell me a story about a fox and a bear", "no bear"),
        ("Tell me a story about a fox called Otto.", "the fox is not called Otto"),
    ],
)
def test_missing_wishes_are_named(request_text: str, complaint: str) -> None:
    assert check_story(STORY, request_text) == [complaint]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Who has the lantern?", "Nora has the lantern."),
        ("who has the lantern now", "Nora has the lantern."),
        ("Where is the lantern?", "The lantern is with Nora."),
        ("Where is Milo?", "Milo is at the market."),
        ("What color is the lantern?", "The lantern is red."),
        ("How does Nora feel?", "Nora feels happy."),
        ("How does Milo feel?", "The story does not say how Milo feels."),
        ("Who is Nora?", "Nora is the owl."),
        ("What is the fox called?", "The fox is called Milo."),
        ("How many characters are in the story?", "There are two characters: Milo and Nora."),
        ("How many things does Nora have?", "Nora has one thing: the lantern."),
        ("What does Milo have?", "Milo has nothing."),
    ],
)
def test_questions_have_the_one_right_answer(question: str, expected: str) -> None:
    assert check_answer(STORY, question, expected) == []
    assert check_answer(STORY, question, expected.removesuffix(".")) != []


def test_a_lost_thing_lies_where_it_was_lost() -> None:
    opening = "One day, Ada the cat sat on the hill. The weather was cold."
    story = f"{opening} Ada had a red key. Ada lost the key. Ada went to the mill."
    world = read_story(story)
    assert answer(world, "Who has the key?") == "Nobody has the key."
    assert answer(world, "Where is the key?") == "The key is on the hill."


@pytest.mark.parametrize("kind", QUESTIONS)
def test_any_other_word_makes_an_answer_wrong(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(20):
        _, story = tell(rng, "kind")
        turn = ask_about(rng, story, kind)
        assert check_answer(story.text, turn.user, turn.assistant) == []
        for word in (*NAMES, *OBJECTS):
            if word in turn.assistant:
                other = rng.choice([w for w in NAMES + OBJECTS if w != word])
                assert check_answer(story.text, turn.user, turn.assistant.replace(word, other)) != []


def test_what_is_no_question_or_request_is_an_error() -> None:
    with pytest.raises(ValueError, match="no question of the language"):
        check_answer(STORY, "Why?", "Because.")
    with pytest.raises(ValueError, match="there is no kite in the story"):
        check_answer(STORY, "Who has the kite?", "Nora has the kite.")
    with pytest.raises(ValueError, match="no request of the language"):
        check_story(STORY, "Sing a song.")
