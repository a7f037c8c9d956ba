"""Conversations about stories: what people ask for, what the model answers, and which prompts training never sees.

The split is by combination: a hash decides for every pair (kind of the main character, something else) whether
training may ever put the two together. Held-out prompts are built on pairs that it never does, so they are unseen by
construction.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection
from dataclasses import dataclass

from xllm.embedded.grammar import (
    QUESTIONS,
    Cast,
    Story,
    Violation,
    answer,
    compile_form,
    read_story,
    write_story,
)
from xllm.embedded.lexicon import (
    COLOURS,
    KIND_ROLES,
    KINDS,
    NAME_ROLES,
    PLACE_ROLES,
    THING_ROLES,
    at_place,
    with_article,
)

# What a request names, and how. The key is also the kind of prompt that results are reported for.
TOPICS: dict[str, tuple[str, ...]] = {
    "anything": (),
    "kind": ("{K}",),
    "kind and thing": ("{K} and {O}",),
    "kind and place": ("{K} {p}",),
    "kind and kind": ("{K} and {L}",),
    "kind and name": ("{K} called {N}", "{K} named {N}"),
}
SPLIT_TOPICS = tuple(topic for topic in TOPICS if topic not in ("anything", "kind"))
_REQUESTS = (
    "Tell me a story about {x}.",
    "Please tell me a story about {x}.",
    "Tell me a short story about {x}.",
    "Can you tell me a story about {x}?",
    "Write a story about {x}.",
    "I want a story about {x}.",
    "tell me a story about {x}",
)
_OPEN_REQUESTS = (
    "Tell me a story.",
    "Please tell me a story.",
    "Can you tell me a story?",
    "Tell me another story.",
    "Another story, please.",
    "tell me a story",
)
_STORY_PROMPTS = ("{story} {question}", "Here is a story. {story} {question}", "{story}\n\n{question}")

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a friendly storyteller.",
    "You tell short stories.",
    "You are a small language model.",
    "Be kind and brief.",
    "Answer the questions about the story.",
)
_CAN = "I can tell short stories and answer questions about them."
CHAT: dict[str, tuple[str, ...]] = {
    "Hello! Ask me for a story.": ("Hello!", "Hello", "Hi!", "hi", "Hey there!", "Good morning!", "Good evening!"),
    "I am well, thank you. Would you like a story?": ("How are you?", "How do you do?", "how are you"),
    f"I am the small model inside xllm. {_CAN}": ("Who are you?", "What are you?", "What is your name?", "who are you"),
    f"{_CAN} Try: Tell me a story about a fox and a lantern.": (
        "What can you do?",
        "Help!",
        "Can you help me?",
        "What do you know?",
        "what can you do",
    ),
    "You are welcome. Would you like another story?": ("Thank you!", "Thanks!", "That was a nice story.", "thanks"),
    "Goodbye!": ("Goodbye!", "Bye!", "See you later!", "Good night!", "bye"),
    "I only know short stories. Ask me for one, or ask about one.": (
        "What is the capital of France?",
        "What is two plus two?",
        "Write a poem about the sea.",
        "What time is it?",
        "Can you write a program?",
        "Who won the game?",
        "Translate this into German.",
        "Explain how a computer works.",
        "Tell me a joke.",
        "What is the meaning of life?",
    ),
}
_GREETINGS = ("Hello!", "Hi!", "Hey!", "Good morning!", "Please:", "One more thing.", "Well,", "Okay.")


@dataclass(frozen=True)
class Turn:
    user: str
    assistant: str
    kind: str  # a topic, a kind of question, or "chat"


@dataclass(frozen=True)
class Conversation:
    system: str | None
    turns: tuple[Turn, ...]

    def messages(self) -> list[dict[str, str]]:
        """Roles and contents, as chat templates take them."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            said += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.assistant}]
        return said


def held_out(first: str, second: str) -> bool:
    """Whether training never puts the two together (about one pair in ten)."""
    return hashlib.sha256(f"{first}/{second}".encode()).digest()[0] < 26


def _draw_cast(rng: random.Random, unseen: str | None, avoid: Collection[str]) -> Cast:
    """Words not in `avoid`, all of whose pairs with the main character's kind are
    open to training; with `unseen` (a topic), the pair that topic names is one training never sees."""

    def draw(roles: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
        return tuple(rng.choice([word for word in words if word not in avoid]) for words in roles)

    while True:
        kinds, names, things, places = draw(KIND_ROLES), draw(NAME_ROLES), draw(THING_ROLES), draw(PLACE_ROLES)
        named = {
            "kind and thing": things[0],
            "kind and place": places[0],
            "kind and kind": kinds[1],
            "kind and name": names[0],
        }
        closed = [word for word in (*kinds[1:], *names, *things, *places) if held_out(kinds[0], word)]
        if closed == ([named[unseen]] if unseen else []):
            return Cast(names, kinds, tuple((thing, rng.choice(COLOURS)) for thing in things), places)


def ask_for_story(rng: random.Random, topic: str, cast: Cast) -> str:
    """A request for a story with this cast that names what the topic says."""
    if topic == "anything":
        return rng.choice(_OPEN_REQUESTS)
    words = {
        "K": with_article(cast.kinds[0]),
        "L": with_article(cast.kinds[1]),
        "O": with_article(cast.things[0][0]),
        "p": at_place(cast.places[0]),
        "N": cast.names[0],
    }
    return rng.choice(_REQUESTS).format(x=rng.choice(TOPICS[topic]).format_map(words))


_TOPIC_PATTERNS = [
    compile_form(request.format(x=form)) for request in _REQUESTS for forms in TOPICS.values() for form in forms
]


def check_story(text: str, request: str) -> list[str]:
    """What is wrong with `text` as the answer to this request: language, world, missing wishes. Empty if it is right.

    `ValueError` if the request is none of the language.
    """
    found = next((match for pattern in _TOPIC_PATTERNS if (match := pattern.fullmatch(request))), None)
    if found is None and request not in _OPEN_REQUESTS:
        raise ValueError(f"no request of the language: '{request}'")
    try:
        world = read_story(text)
    except Violation as violation:
        return [str(violation)]
    wishes = {slot: words.split(" ")[-1] for slot, words in found.groupdict().items()} if found else {}
    names = {person.kind: person.name for person in world.characters.values()}
    missing = [f"no {wishes[slot]}" for slot in ("K", "L") if slot in wishes and wishes[slot] not in names]
    if "O" in wishes and wishes["O"] not in world.colours:
        missing.append(f"no {wishes['O']}")
    if "p" in wishes and wishes["p"] not in world.visited:
        missing.append(f"nobody comes to the {wishes['p']}")
    if "N" in wishes and names.get(wishes["K"]) != wishes["N"]:
        missing.append(f"the {wishes['K']} is not called {wishes['N']}")
    return missing


def ask_about(rng: random.Random, story: Story, kind: str) -> Turn:
    """A question of this kind about the story, with its answer."""
    world = story.world
    people = list(world.characters.values())
    if kind == "feeling":
        people = [person for person in people if person.feeling] or people
    person = rng.choice(people)
    words = {"B": person.name, "k": person.kind, "o": rng.choice(list(world.colours))}
    question = rng.choice(QUESTIONS[kind][0]).format_map(words)
    if rng.random() < 0.1:  # as people type
        question = question[0].lower() + question[1:].rstrip("?")
    return Turn(question, answer(world, question), kind)


QUESTION_KINDS = tuple(QUESTIONS)
_TOPIC_WEIGHTS = dict(zip(TOPICS, (1, 2, 4, 4, 10, 3), strict=True))


def chat(rng: random.Random, unseen: bool = False) -> Turn:
    """Small talk. Unseen ones put an opening before a known sentence that training never puts there."""
    while True:
        reply = rng.choice(list(CHAT))
        said, opening = rng.choice(CHAT[reply]), rng.choice(_GREETINGS)
        if held_out(opening, said):
            if unseen:
                return Turn(f"{opening} {said}", reply, "chat")
        elif not unseen:
            return Turn(said if rng.random() < 0.5 else f"{opening} {said}", reply, "chat")


def tell(rng: random.Random, topic: str, unseen: bool = False, avoid: Collection[str] = ()) -> tuple[Turn, Story]:
    """A request with this topic and a story that answers it. Its words are none of `avoid`."""
    cast = _draw_cast(rng, topic if unseen else None, avoid)
    story = write_story(rng, cast, characters=2 if topic == "kind and kind" else 1)
    return Turn(ask_for_story(rng, topic, cast), story.text, topic), story


def give_story(rng: random.Random, kind: str, unseen: bool = False, avoid: Collection[str] = ()) -> tuple[Turn, Story]:
    """The user tells a story and asks a question of this kind about it."""
    story = write_story(rng, _draw_cast(rng, "kind and thing" if unseen else None, avoid))
    asked = ask_about(rng, story, kind)
    prompt = rng.choice(_STORY_PROMPTS).format(story=story.text, question=asked.user)
    return Turn(prompt, asked.assistant, kind), story


def converse(rng: random.Random, stories: int, unseen: bool = False) -> Conversation:
    """A conversation around `stories` stories, each followed by two questions about it or more.

    unseen: build every story and every request on held-out pairs; otherwise on none.
    """
    turns: list[Turn] = []
    recent: list[set[str]] = []  # words of the last stories: a question must not be about two stories at once
    for _ in range(stories):
        if rng.random() < 0.15:
            turns.append(chat(rng, unseen))
        # Held-out pairs are few: avoiding kinds as well could leave a topic without any.
        avoid = {word for words in recent[-3:] for word in words if not (unseen and word in KINDS)}
        if rng.random() < 0.45:
            topics = SPLIT_TOPICS if unseen else tuple(TOPICS)
            turn, story = tell(rng, rng.choices(topics, [_TOPIC_WEIGHTS[topic] for topic in topics])[0], unseen, avoid)
        else:
            kind = rng.choice(QUESTION_KINDS)
            turn, story = give_story(rng, kind, unseen, avoid)
        turns.append(turn)
        for kind in rng.sample(QUESTION_KINDS, rng.randint(2, len(QUESTION_KINDS))):
            turns.append(ask_about(rng, story, kind))
        recent.append(story.world.words())
    return Conversation(rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.25 else None, tuple(turns))
