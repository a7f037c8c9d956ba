"""The words of the story language: who, what, where, colours, weather, feelings.

Every other module takes its words from here, so generator, checker and tests agree on the vocabulary. Tuples keep their
order: the generator draws from them by index, so reordering changes the corpus.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Words come in roles: main character, first and second companion; first and second thing; where a story opens and where
# people go. Roles don't share words, so that a story never needs to know which words it has used up.
NAME_ROLES = (_words("Milo Nora Otto Lena Finn Ada"), _words("Hugo Ella Leo Ruby Mia"), _words("Max Ida Sam Lucy Theo"))
KIND_ROLES = (
    _words("fox bear owl cat dog mouse dragon robot wizard knight"),
    _words("rabbit duck frog hedgehog otter"),
    _words("wolf pirate baker sailor doctor"),
)
THING_ROLES = (
    _words("lantern kite bell key drum hat map book ball umbrella"),
    _words("ring flute cup basket coin apple"),
)
PLACE_ROLES = (_words("forest garden village hill harbour cave bridge"), _words("river market lake mill tower"))

NAMES: tuple[str, ...] = sum(NAME_ROLES, ())
KINDS: tuple[str, ...] = sum(KIND_ROLES, ())
OBJECTS: tuple[str, ...] = sum(THING_ROLES, ())
PLACES: tuple[str, ...] = sum(PLACE_ROLES, ())
PRONOUNS: dict[str, str] = {
    **dict.fromkeys(_words("Milo Otto Finn Hugo Leo Max Sam Theo"), "he"),
    **dict.fromkeys(_words("Nora Lena Ada Ella Ruby Mia Ida Lucy"), "she"),
}
COLOURS: tuple[str, ...] = _words("red blue green yellow white black")
PLACE_PREPOSITIONS: dict[str, str] = {
    "forest": "in", "river": "by", "market": "at", "hill": "on", "garden": "in", "village": "in", "lake": "by",
    "bridge": "on", "mill": "at", "harbour": "at", "tower": "in", "cave": "in",
}  # fmt: skip
WEATHER: tuple[str, ...] = _words("sunny rainy windy snowy warm cold")
TIMES: tuple[str, ...] = ("morning", "afternoon", "evening", "day")

# What a character may feel, by the last thing that happened to them.
FEELINGS_BY_CAUSE: dict[str, tuple[str, ...]] = {
    "alone": ("calm", "lonely", "curious"),
    "met": ("cheerful", "shy"),
    "found": ("lucky", "excited"),
    "received": ("happy", "thankful"),
    "gave": ("proud", "content"),
    "lost": ("sad", "worried"),
}
FEELINGS: tuple[str, ...] = tuple(feeling for group in FEELINGS_BY_CAUSE.values() for feeling in group)


def at_place(place: str) -> str:
    """ "forest" -> "in the forest"."""
    return f"{PLACE_PREPOSITIONS[place]} the {place}"


def with_article(noun: str) -> str:
    """ "owl" -> "an owl"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(items: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
