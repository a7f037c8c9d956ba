"""The story language: sentence forms, the world they change, a story writer, and the checker that reads stories back.

Writer and checker share one table of sentence forms and one `apply`, which refuses an event the world doesn't allow, so
what the writer can say and what the checker accepts can't drift apart. Questions have exactly one right answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from xllm.embedded.lexicon import (
    COLOURS,
    FEELINGS,
    FEELINGS_BY_CAUSE,
    KINDS,
    NAMES,
    OBJECTS,
    PLACES,
    PRONOUNS,
    TIMES,
    WEATHER,
    at_place,
    listed,
    with_article,
)

# Slots: S subject (name or pronoun), s pronoun inside a sentence, N a new character's name, k kind, B another
# character, o thing, c colour, p place with preposition, q place, w weather, t time of day, f feeling;
# in requests also K, L a kind and O a thing, each with its article.
FORMS: dict[str, tuple[str, ...]] = {
    "open": (
        "One {t}, {N} the {k} was {p}.",
        "One {t}, {N} the {k} sat {p}.",
        "One quiet {t}, {N} the {k} was {p}.",
    ),
    "weather": ("The weather was {w}.",),
    "have": ("{S} had a {c} {o}.", "{S} carried a {c} {o}."),
    "find": ("{S} found a {c} {o}.", "{S} saw a {c} {o} and took it."),
    "go": ("{S} went to the {q}.", "{S} walked to the {q}."),
    "meet": ("{S} met {N} the {k}.", "There {s} met {N} the {k}."),
    "come": ("Then {N} the {k} came along.", "Soon {N} the {k} came by."),
    "give": ("{S} gave the {o} to {B}.", "{S} gave {B} the {o}.", "{S} gave the {c} {o} to {B}."),
    "lose": ("{S} lost the {o}.", "But {s} lost the {o}.", "{S} lost the {c} {o}."),
    "pick": ("{S} found the {o}.", "{S} picked up the {o}.", "{S} found the {c} {o}."),
    "still": ("It was still {w}.",),
    "rest": ("{S} rested {p}.", "{S} was still {p}."),
    "thank": ("{S} thanked {B}.", "{S} said thank you to {B}."),
    "feel": ("{S} was {f}.", "{S} felt {f}."),
    "together": ("Together they went to the {q}.", "They walked to the {q} together."),
    "friends": ("They became good friends.", "They were friends from that day."),
}

# Story shapes. `have1a` = character 1 has object a; a trailing ? = told or left out at random, legal either way.
ARCS: tuple[str, ...] = (
    "open1 weather still? have1a rest1? go1? rest1? meet12 give1a2 thank21? feel2",
    "open1 weather feel1? find1a go1 rest1? meet12 give1a2 feel1? feel2?",
    "open1 weather have1a still? go1? lose1a feel1",
    "open1 weather rest1? have1a lose1a feel1? come2 pick2a give2a1 thank12? feel1?",
    "open1 weather still? have1a come2 have2b give1a2 feel2",
    "open1 weather have1a meet12 have2b give2b1 thank12? go1? rest1?",
    "open1 weather meet12 have2a feel1? give2a1 feel1 go2? rest2?",
    "open1 weather still? find1a feel1 go1? rest1?",
    "open1 weather come2 find2a feel2? together rest2? friends?",
    "open1 weather rest1? have1a meet12 feel2? together friends",
    "open1 weather have1a come2 give1a2 go2 meet23 give2a3? feel3",
    "open1 weather have1a still? come2 lose1a feel1 pick2a go2?",
)
_STEP = re.compile(r"(?P<event>[a-z]+?)(?P<actor>\d)?(?P<object>[ab])?(?P<other>\d)?(?P<optional>\?)?")


@dataclass
class Character:
    name: str
    kind: str
    place: str
    cause: str = "alone"  # what last happened to them; decides what they may feel
    feeling: str | None = None


@dataclass
class World:
    """State of a story after some sentences. Objects have exactly one of a holder (name) and a place (lost)."""

    weather: str = ""
    characters: dict[str, Character] = field(default_factory=dict)
    colours: dict[str, str] = field(default_factory=dict)
    holders: dict[str, str | None] = field(default_factory=dict)
    lost_at: dict[str, str] = field(default_factory=dict)
    visited: list[str] = field(default_factory=list)
    subject: str | None = None  # subject of the last sentence, if a pronoun may mean it
    gift: tuple[str, str] | None = None  # (giver, receiver) if the last sentence was a gift

    def words(self) -> set[str]:
        """Names, kinds and things of the story."""
        return {*self.characters, *self.colours, *(person.kind for person in self.characters.values())}

    def things_of(self, name: str) -> list[str]:
        return [thing for thing, holder in self.holders.items() if holder == name]


class Violation(ValueError):
    """A sentence says something the world doesn't allow."""


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise Violation(complaint)


def apply(world: World, event: str, slots: dict[str, str]) -> None:
    """Change `world` as the sentence `event` with these slots says; `Violation` if that can't happen there."""
    people = world.characters
    _require(bool(people) != (event == "open"), "the story opens once, and first")
    subject = _subject(world, slots)
    if event in ("give", "lose", "pick") and "c" in slots:
        _require(world.colours.get(slots["o"]) == slots["c"], f"the {slots['o']} is not {slots['c']}")
    gift, world.gift, world.subject = world.gift, None, subject
    who = people[subject] if subject else None
    match event, who:
        case "open", _:
            place = slots["p"].rsplit(" ", 1)[-1]
            _require(slots["p"] == at_place(place), f"wrong preposition in '{slots['p']}'")
            _introduce(world, slots, place)
        case "come", _:
            others = {person.place for person in people.values()}
            _require(len(others) == 1, "comes along, but the others are in different places")
            _introduce(world, slots, others.pop())
        case (("have" | "find"), Character()):
            _require(slots["o"] not in world.colours, f"the {slots['o']} is already in the story")
            world.colours[slots["o"]] = slots["c"]
            world.holders[slots["o"]] = who.name
            who.cause = "found" if event == "find" else who.cause
        case "go", Character():
            _move(world, [who], slots["q"])
        case "meet", Character():
            _introduce(world, slots, who.place)
            who.cause, world.subject = "met", None
        case "weather", _:
            _require(not world.weather, "the weather is told twice")
            world.weather = slots["w"]
        case "still", _:
            _require(slots["w"] == world.weather, f"still {slots['w']}, but it was {world.weather}")
        case "rest", Character():
            _require(slots["p"] == at_place(who.place), f"{who.name} rests {slots['p']}, but is {at_place(who.place)}")
        case "give", Character():
            other = _other(world, slots, who)
            _require(world.holders.get(slots["o"]) == who.name, f"{who.name} gives a {slots['o']} without having it")
            world.holders[slots["o"]] = other.name
            who.cause, other.cause, world.subject, world.gift = "gave", "received", None, (who.name, other.name)
        case "lose", Character():
            _require(world.holders.get(slots["o"]) == who.name, f"{who.name} loses a {slots['o']} without having it")
            world.holders[slots["o"]] = None
            world.lost_at[slots["o"]] = who.place
            who.cause = "lost"
        case "pick", Character():
            _require(world.lost_at.get(slots["o"]) == who.place, f"no lost {slots['o']} where {who.name} is")
            del world.lost_at[slots["o"]]
            world.holders[slots["o"]] = who.name
            who.cause = "found"
        case "thank", Character():
            other = _other(world, slots, who)
            _require(gift == (other.name, who.name), f"{who.name} thanks {other.name} for nothing")
            world.subject = None
        case "feel", Character():
            _require(slots["f"] in FEELINGS_BY_CAUSE[who.cause], f"{who.name} can't feel {slots['f']} ({who.cause})")
            who.feeling = slots["f"]
        case "together", _:
            _require(len({person.place for person in people.values()}) == 1, "together, but in different places")
            _require(len(people) > 1, "together, but alone")
            _move(world, list(people.values()), slots["q"])
        case _:
            _require(event == "friends" and len(people) > 1, "friends, but alone")


def _subject(world: World, slots: dict[str, str]) -> str | None:
    word = slots.get("S") or slots.get("s")
    if word is None:
        return None
    if word.lower() in ("he", "she"):
        _require(world.subject is not None, f"unclear who '{word}' is")
        assert world.subject is not None
        _require(PRONOUNS[world.subject] == word.lower(), f"'{word}' for {world.subject}")
        return world.subject
    _require(word in world.characters, f"{word} was never introduced")
    return word


def _introduce(world: World, slots: dict[str, str], place: str) -> None:
    name, kind = slots["N"], slots["k"]
    _require(name not in world.characters, f"{name} is introduced twice")
    _require(kind not in (person.kind for person in world.characters.values()), f"a second {kind}")
    first = not world.characters
    world.characters[name] = Character(name, kind, place, "alone" if first else "met")
    world.visited += [place] if first else []
    world.subject = name


def _other(world: World, slots: dict[str, str], who: Character) -> Character:
    other = world.characters.get(slots["B"])
    _require(other is not None, f"{slots['B']} was never introduced")
    assert other is not None
    _require(other is not who and other.place == who.place, f"{other.name} is not with {who.name}")
    return other


def _move(world: World, movers: list[Character], place: str) -> None:
    _require(all(person.place != place for person in movers), f"goes to the {place}, but is there already")
    for person in movers:
        person.place = place
    world.visited.append(place)


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about; a story uses as much of it as its arc needs.

    names, kinds: 3 each; things: 2 (thing, colour); places: 2, the first is where the story opens.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    things: tuple[tuple[str, str], ...]
    places: tuple[str, ...]


@dataclass(frozen=True)
class Story:
    text: str
    world: World


def write_story(rng: random.Random, cast: Cast, characters: int = 1) -> Story:
    """A random story with this cast in which at least `characters` people (1 or 2) and `cast.things[0]` take part."""
    arcs = [arc for arc in ARCS if characters == 1 or "2" in arc]
    world, sentences, places = World(), [], list(cast.places[1:])
    for step in rng.choice(arcs).split():
        plan = _STEP.fullmatch(step)
        assert plan is not None
        if plan["optional"] and rng.random() < 0.5:
            continue
        newcomer = {"open": plan["actor"], "come": plan["actor"], "meet": plan["other"]}.get(plan["event"])
        slots = {"w": world.weather or rng.choice(WEATHER), "t": rng.choice(TIMES), "p": at_place(cast.places[0])}
        if newcomer:
            slots |= {"N": cast.names[int(newcomer) - 1], "k": cast.kinds[int(newcomer) - 1]}
        if plan["object"]:
            slots["o"], slots["c"] = cast.things["ab".index(plan["object"])]
        if plan["other"] and not newcomer:
            slots["B"] = cast.names[int(plan["other"]) - 1]
        if plan["event"] in ("go", "together"):
            slots["q"] = places.pop(0)
        actor = cast.names[int(plan["actor"]) - 1] if plan["actor"] else None
        if plan["event"] == "rest" and actor:
            slots["p"] = at_place(world.characters[actor].place)
        if plan["event"] == "feel" and actor:
            slots["f"] = rng.choice(FEELINGS_BY_CAUSE[world.characters[actor].cause])
        sentences.append(_tell(rng, world, plan["event"], actor, slots))
    return Story(" ".join(sentences), world)


def _tell(rng: random.Random, world: World, event: str, actor: str | None, slots: dict[str, str]) -> str:
    """One sentence for the event, applied to the world. A pronoun is used only where it is clear who is meant."""
    clear = actor is not None and actor == world.subject
    form = rng.choice([form for form in FORMS[event] if clear or "{s}" not in form])
    if actor:
        pronoun = PRONOUNS[actor]
        slots["S"] = pronoun.capitalize() if clear and rng.random() < 0.7 else actor
        slots["s"] = pronoun
    used = {slot: slots[slot] for slot in re.findall(r"{(\w)}", form)}
    apply(world, event, used)
    return form.format_map(used)


_WORDS: dict[str, tuple[str, ...]] = {
    "S": ("He", "She", *NAMES), "s": ("he", "she"), "N": NAMES, "B": NAMES, "k": KINDS, "o": OBJECTS, "c": COLOURS,
    "p": tuple(at_place(place) for place in PLACES), "q": PLACES, "w": WEATHER, "t": TIMES, "f": FEELINGS,
    "K": tuple(map(with_article, KINDS)), "L": tuple(map(with_article, KINDS)), "O": tuple(map(with_article, OBJECTS)),
}  # fmt: skip


def compile_form(form: str) -> re.Pattern[str]:
    """A sentence form as a pattern with one named group per slot."""
    parts = re.split(r"{(\w)}", form)
    for i, part in enumerate(parts):
        parts[i] = f"(?P<{part}>{'|'.join(_WORDS[part])})" if i % 2 else re.escape(part)
    return re.compile("".join(parts))


_PATTERNS = [(event, compile_form(form)) for event, forms in FORMS.items() for form in forms]


def read_story(text: str) -> World:
    """The world after this story. `Violation` names the first sentence that isn't of the language or can't be true."""
    world = World()
    sentences = re.split(r"(?<=\.) ", text)
    for sentence in sentences:
        event, found = next(((e, m) for e, p in _PATTERNS if (m := p.fullmatch(sentence))), ("", None))
        if found is None:
            raise Violation(f"no such sentence form: '{sentence}'")
        try:
            apply(world, event, found.groupdict())
        except Violation as error:
            raise Violation(f"{error}: '{sentence}'") from None
    _require(len(sentences) >= 3, "fewer than three sentences")
    _require(bool(world.colours), "a story needs a thing")
    _require(bool(world.weather), "a story needs weather")
    return world


def _who_has(world: World, slots: dict[str, str]) -> str:
    return f"{world.holders[slots['o']] or 'Nobody'} has the {slots['o']}."


def _where_is_thing(world: World, slots: dict[str, str]) -> str:
    thing = slots["o"]
    holder = world.holders[thing]
    return f"The {thing} is with {holder}." if holder else f"The {thing} is {at_place(world.lost_at[thing])}."


def _how_feels(world: World, slots: dict[str, str]) -> str:
    feeling = world.characters[slots["B"]].feeling
    return f"{slots['B']} feels {feeling}." if feeling else f"The story does not say how {slots['B']} feels."


def _how_many_things(world: World, slots: dict[str, str]) -> str:
    things = [f"the {thing}" for thing in world.things_of(slots["B"])]
    count = ("nothing", "one thing: ", "two things: ")[len(things)]
    return f"{slots['B']} has {count}{listed(things) if things else ''}."


def _how_many_characters(world: World, slots: dict[str, str]) -> str:
    names = list(world.characters)
    count = ("is one character", "are two characters", "are three characters")[len(names) - 1]
    return f"There {count}: {listed(names)}."


def _called(world: World, slots: dict[str, str]) -> str:
    name = next(person.name for person in world.characters.values() if person.kind == slots["k"])
    return f"The {slots['k']} is called {name}."


Answer = Callable[[World, dict[str, str]], str]
QUESTIONS: dict[str, tuple[tuple[str, ...], Answer]] = {
    "who has": (("Who has the {o}?", "Who has the {o} now?"), _who_has),
    "where is thing": (("Where is the {o}?", "Where is the {o} now?"), _where_is_thing),
    "where is character": (
        ("Where is {B}?", "Where is {B} now?"),
        lambda w, s: f"{s['B']} is {at_place(w.characters[s['B']].place)}.",
    ),
    "colour": (
        ("What colour is the {o}?", "What color is the {o}?"),
        lambda w, s: f"The {s['o']} is {w.colours[s['o']]}.",
    ),
    "feeling": (("How does {B} feel?", "How is {B} feeling?"), _how_feels),
    "who is": (
        ("Who is {B}?", "And who is {B}?"),
        lambda w, s: f"{s['B']} is the {w.characters[s['B']].kind}.",
    ),
    "name": (("What is the name of the {k}?", "What is the {k} called?"), _called),
    "how many characters": (
        ("How many characters are in the story?", "How many are in the story?"),
        _how_many_characters,
    ),
    "how many things": (("How many things does {B} have?", "What does {B} have?"), _how_many_things),
}
_QUESTION_PATTERNS = [(kind, compile_form(form)) for kind, (forms, _) in QUESTIONS.items() for form in forms]


def answer(world: World, question: str) -> str:
    """The one right answer; a small first letter and a missing question mark are forgiven.

    `ValueError` for what is no question of the language, or asks about what isn't in the story.
    """
    question = question[:1].upper() + question[1:].rstrip("?") + "?"
    kind, found = next(((k, m) for k, p in _QUESTION_PATTERNS if (m := p.fullmatch(question))), ("", None))
    if found is None:
        raise ValueError(f"no question of the language: '{question}'")
    slots = found.groupdict()
    missing = next((word for word in slots.values() if word not in world.words()), None)
    if missing:
        raise ValueError(f"there is no {missing} in the story")
    return QUESTIONS[kind][1](world, slots)


def check_answer(story: str, question: str, text: str) -> list[str]:
    """What is wrong with `text` as the answer to this question about this story; empty if it is right."""
    expected = answer(read_story(story), question)
    return [] if text == expected else [f"'{question}' has the answer '{expected}', not '{text}'"]
