"""Forks under random use: every span reads as its text, whoever it came from; pages are counted once; none is lost."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.runtime.fakes import FakeMemory, state_of
from xllm.runtime import KVSpec
from xllm.runtime.kv import KvPool
from xllm.runtime.pages import PageState, PoolPlan
from xllm.runtime.prefix import extend_chain
from xllm.runtime.store import PageStore

PAGE, PAGES, SPANS = 4096, 16, 6
TEXTS = [[at % 7 for at in range(300)], [at % 5 for at in range(300)]]


@dataclass
class Family:
    """Slots that came from one, with what is written to each; at most `width` at a time."""

    root: int
    width: int
    prompt: int
    promised: int = 0
    texts: dict[int, list[int]] = field(default_factory=dict)


class ForkMachine(RuleBasedStateMachine):
    """Any order of starts, growth, forks and ends, with and without the prefix cache, within what is promised."""

    kv = KVSpec(1500)

    def __init__(self):
        super().__init__()
        self.memory = FakeMemory(PAGE)
        self.store = PageStore(self.memory, PAGES)
        self.pool = KvPool(PoolPlan(self.kv, PAGE, PAGES, 8, SPANS), self.store)
        self.families: list[Family] = []

    @precondition(lambda self: sum(family.width for family in self.families) < SPANS)
    @rule(data=st.data(), tokens=st.integers(1, 80), cached=st.booleans())
    def start(self, data, tokens, cached):
        width = data.draw(st.integers(1, SPANS - sum(family.width for family in self.families)))
        text = data.draw(st.sampled_from(TEXTS))[:tokens]
        family = Family(-1, width, tokens)
        if self.pages_of(family, tokens) > self.pool.free_pages:
            return
        chain = self.chain(text)[: (tokens - 1) // 16] if cached and not self.kv.fixed_bytes else []
        found = self.pool.match(chain)
        family.root = self.pool.start(tokens, chain[:found])
        family.texts[family.root] = text[: 16 * found]
        self.families.append(family)
        self.append(family, family.root, text[16 * found :])

    @precondition(lambda self: self.families)
    @rule(data=st.data(), count=st.integers(1, 40))
    def grow(self, data, count):
        family = data.draw(st.sampled_from(self.families))
        slot = data.draw(st.sampled_from(sorted(family.texts)))
        self.append(family, slot, [data.draw(st.integers(0, 3))] * count)

    @precondition(lambda self: self.families)
    @rule(data=st.data())
    def fork(self, data):
        family = data.draw(st.sampled_from(self.families))
        source = data.draw(st.sampled_from(sorted(family.texts)))
        targets = sorted(set(family.texts) - {source})
        if len(family.texts) < family.width:
            targets.append(self.pool.start(0))
        if targets:
            target = targets[-1] if len(targets) > len(family.texts) - 1 else data.draw(st.sampled_from(targets))
            self.pool.fork(source, target, len(family.texts[source]))
            family.texts[target] = list(family.texts[source])

    @precondition(lambda self: self.families and not self.kv.fixed_bytes)
    @rule(data=st.data())
    def offer(self, data):
        family = data.draw(st.sampled_from(self.families))
        slot = data.draw(st.sampled_from(sorted(family.texts)))
        self.pool.offer(slot, self.chain(family.texts[slot]))

    @precondition(lambda self: self.families)
    @rule(data=st.data(), cached=st.booleans())
    def finish(self, data, cached):
        """As a group does that ends, or gives its pages up."""
        family = data.draw(st.sampled_from(self.families))
        for slot in data.draw(st.permutations(sorted(family.texts))):
            chain = self.chain(family.texts[slot]) if cached and not self.kv.fixed_bytes else []
            self.pool.finish(slot, chain)
        self.families.remove(family)

    @precondition(lambda self: self.families)
    @rule(data=st.data())
    def hand_on(self, data):
        family = data.draw(st.sampled_from(self.families))
        before, family.root = family.root, data.draw(st.sampled_from(sorted(family.texts)))
        self.pool.promises.hand_on(before, family.root)

    @rule()
    def premap(self):
        self.pool.premap()

    @invariant()
    def holds(self):
        self.pool.check()
        promised = {family.root: family.promised for family in self.families}
        assert {slot: self.pool.promises.of(slot) for slot in range(SPANS)} == dict.fromkeys(range(SPANS), 0) | promised
        assert sum(self.pool.figures().states.values()) == PAGES - self.elsewhere()[0]
        assert self.pool.figures().states[PageState.ALLOCATED] == 0
        assert self.pool.free_pages == self.free()
        for family in self.families:
            for slot, text in family.texts.items():
                assert [self.memory.read(self.address(slot, at)) for at in range(len(text))] == text
                if self.kv.fixed_bytes:
                    for place in (0, self.kv.fixed_bytes - 4):
                        assert self.memory.read(self.pool.base(slot) + place) == state_of(text)

    def teardown(self):
        for family in self.families:
            for slot in family.texts:
                self.pool.finish(slot)
        self.families.clear()
        self.pool.check()
        assert self.pool.free_pages == self.free() and not self.pool.spans.forked

    def free(self) -> int:
        return PAGES - self.elsewhere()[1] - sum(family.promised for family in self.families)

    def elsewhere(self) -> tuple[int, int]:
        """Pages that another pool has, and those that are promised to it or kept for it."""
        return 0, 0

    def append(self, family: Family, slot: int, more: list[int]) -> None:
        text = family.texts[slot]
        tokens = len(text) + len(more)
        pages = max(self.pages_of(family, tokens), family.promised)
        if tokens > self.pool.plan.tokens_for(8) or pages - family.promised > self.pool.free_pages:
            return
        self.pool.grow(family.root, tokens if slot == family.root else 0, pages)
        self.pool.grow(slot, tokens, pages if slot == family.root else 0)
        family.promised = pages
        for at, token in enumerate(more, len(text)):
            self.memory.write(self.address(slot, at), token)
        text += more
        if self.kv.fixed_bytes:
            for place in (0, self.kv.fixed_bytes - 4):
                self.memory.write(self.pool.base(slot) + place, state_of(text))

    def pages_of(self, family: Family, tokens: int) -> int:
        stem, pages = len(self.pool.plan.complete(family.prompt)), self.pool.plan.pages_for(tokens)
        return stem + family.width * (pages - stem)

    def address(self, slot: int, at: int) -> int:
        group, lane = divmod(at, 16)
        size = self.kv.group_bytes
        return self.pool.base(slot) + self.kv.fixed_bytes + group * size + lane * size // 16

    def chain(self, text: list[int]) -> list[bytes]:
        made: list[bytes] = []
        extend_chain(made, text, 16, "")
        return made


class FixedForkMachine(ForkMachine):
    """Of sequences with state that changes with every token, in more than one page."""

    kv = KVSpec(1500, fixed_bytes=5056)


class WideForkMachine(ForkMachine):
    """Of groups that are longer than a page."""

    kv = KVSpec(5000)


class SharedForkMachine(ForkMachine):
    """Beside a pool of another model, which takes what is not promised here, and gives what is not used there."""

    def __init__(self):
        super().__init__()
        self.other = KvPool(PoolPlan(KVSpec(PAGE), PAGE, PAGES, 3, 6), self.store)
        self.written: dict[int, int] = {}  # slot -> pages

    @precondition(lambda self: len(self.written) < 6)
    @rule(pages=st.integers(1, 3), ahead=st.booleans())
    def other_starts(self, pages, ahead):
        if pages > self.other.free_pages:
            return
        slot = self.other.start(16 * 3 if ahead else 0)
        self.other.grow(slot, 16 * pages)
        self.written[slot] = pages
        for page in range(pages):
            self.memory.write(self.other.base(slot) + page * PAGE, 100 + slot)

    @precondition(lambda self: self.written)
    @rule(data=st.data(), text=st.sampled_from([b"", b"one", b"two"]))
    def other_ends(self, data, text):
        slot = data.draw(st.sampled_from(sorted(self.written)))
        del self.written[slot]
        self.other.finish(slot, [text] if text else [])

    @rule()
    def other_premaps(self):
        self.other.premap()

    @invariant()
    def other_holds(self):
        self.other.check()
        for slot, pages in self.written.items():
            assert {self.memory.read(self.other.base(slot) + page * PAGE) for page in range(pages)} == {100 + slot}

    def elsewhere(self) -> tuple[int, int]:
        return len(self.other.held_pages), max(self.other.promises.total, self.other.promises.share)

    def teardown(self):
        super().teardown()
        self.pool.close()
        self.other.check()
        assert len(self.other.held_pages) + len(self.store.free) == PAGES


SETTINGS = settings(max_examples=60, stateful_step_count=60, deadline=None, derandomize=True)
for machine in (ForkMachine, FixedForkMachine, WideForkMachine, SharedForkMachine):
    machine.TestCase.settings = SETTINGS
TestForks = ForkMachine.TestCase
TestFixedForks = FixedForkMachine.TestCase
TestWideForks = WideForkMachine.TestCase
TestSharedForks = SharedForkMachine.TestCase


def test_a_fork_drops_shared_pages_behind_the_text_it_takes_over():
    memory = FakeMemory(PAGE)
    pool = KvPool(PoolPlan(KVSpec(PAGE), PAGE, PAGES, 8, SPANS), PageStore(memory, PAGES))
    first, longer, short = pool.start(48), pool.start(0), pool.start(0)
    pool.grow(first, 48, 9)
    pool.fork(first, longer, 48)
    pool.fork(first, short, 16)
    pool.fork(short, longer, 16)
    pool.grow(longer, 32, 0)
    memory.write(pool.base(longer) + PAGE, 1)
    pool.check()
