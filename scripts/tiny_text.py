"""The documents that the tiny model is trained on: dialogues, short stories and descriptions, generated from a seed.

A document is a list of chat messages or a plain string. Everything is made from the tables in `tiny_world.py` and the
facts in `tiny_facts.py`; the same seed gives the same documents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random

from tiny_facts import Fact, portrait
from tiny_world import (
    ANIMALS,
    COLOURS,
    DAYS,
    HIDING,
    HOURS,
    MONTHS,
    PEOPLE,
    THINGS,
    TRADES,
    VILLAGE,
    WEATHER,
    Animal,
    Person,
    a,
    animal,
    person,
    trade,
)

Message = dict[str, str]
Document = list[Message] | str

OPENINGS = ("Let me think.", "That is easy.", "I know that.", "Yes.", "A good question!", "Of course!")
CLOSINGS = ("Ask me more.", "Is that all?", "I am glad to help.", "Good luck!")
GREETINGS = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Good morning!", "Good morning! What would you like to know?"),
    ("Who are you?", f"I am a small model. I know the people and the animals of {VILLAGE}."),
    ("What do you know?", f"I know the people and the animals of {VILLAGE}, and I can count."),
    (f"Where is {VILLAGE}?", f"{VILLAGE} is a small village by the sea."),
    ("Thank you!", "You are welcome."),
    ("Goodbye!", "Goodbye! Come back soon."),
)


def documents(seed: int, facts: Sequence[Fact]) -> Iterator[Document]:
    """Yield documents forever; most are dialogues about the facts."""
    rng = Random(seed)
    kinds: dict[str, list[Fact]] = {}
    for fact in facts:
        kinds.setdefault(fact.kind, []).append(fact)
    groups = list(kinds.values())
    makers: dict[Callable[[], Document], int] = {
        lambda: _dialogue(rng, facts, groups): 62,
        lambda: _look_back(rng): 12,
        lambda: _echo(rng): 7,
        lambda: _spelling(rng): 4,
        lambda: _sums(rng, kinds): 5,
        lambda: _story_asked(rng): 4,
        lambda: story(rng, rng.choice(PEOPLE)): 2,
        lambda: _description(rng): 4,
    }
    while True:
        (make,) = rng.choices(list(makers), list(makers.values()))
        yield make()


def chat(*turns: str) -> list[Message]:
    """Return messages with alternating roles, starting with the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _dialogue(rng: Random, facts: Sequence[Fact], groups: Sequence[Sequence[Fact]]) -> Document:
    """One to three questions, half of them drawn evenly over facts, half evenly over kinds."""
    turns: list[str] = []
    if rng.random() < 0.08:
        turns += rng.choice(GREETINGS)
    for _ in range(rng.choice((1, 1, 2, 3))):
        fact = rng.choice(facts if rng.random() < 0.5 else rng.choice(groups))
        turns += (rng.choice(fact.questions), _framed(rng, fact.answer))
    return chat(*turns)


def _framed(rng: Random, answer: str) -> str:
    """The answer, sometimes with words around it, so that it is learned at any position in a message."""
    before = f"{rng.choice(OPENINGS)} " if rng.random() < 0.25 else ""
    after = f" {rng.choice(CLOSINGS)}" if rng.random() < 0.2 else ""
    return f"{before}{answer}{after}"


def _look_back(rng: Random) -> Document:
    """A question whose answer is in the message itself and nowhere in the world's tables."""
    owners = rng.sample([one.name for one in PEOPLE], rng.choice((2, 2, 3)))
    things = rng.sample([thing.name for thing in THINGS], len(owners))
    colours = rng.sample(COLOURS, len(owners))
    told = " ".join(
        f"{who} has a {colour} {what}." for who, colour, what in zip(owners, colours, things, strict=True)
    )
    i = rng.randrange(len(owners))
    who, colour, what = owners[i], colours[i], things[i]
    question, answer = rng.choice(
        (
            (f"Who has the {what}?", f"{who} has the {what}."),
            (f"What does {who} have?", f"{who} has a {colour} {what}."),
            (f"What colour is the {what}?", f"The {what} is {colour}."),
            (f"Whose is the {colour} {what}?", f"The {colour} {what} is {who}'s."),
        )
    )
    return chat(f"{told} {question}", answer)


def _echo(rng: Random) -> Document:
    """Words in random order to repeat: the quickest way to learn copying, which every answer needs."""
    pool = [one.name for one in PEOPLE] + [one.name for one in (*ANIMALS, *THINGS, *TRADES)] + list(COLOURS)
    words = ", ".join(rng.sample(pool, rng.randint(2, 8)))
    return chat(f"{rng.choice(('Repeat', 'Say'))}: {words}.", f"{words}.")


def _spelling(rng: Random) -> Document:
    """A word letter by letter, so that single letters, of which new words are made, have a meaning."""
    word = rng.choice([one.name for one in (*PEOPLE, *ANIMALS, *THINGS)] + [*DAYS, *MONTHS])
    return chat(f"Spell {word}.", f"{'-'.join(word)}.")


def _sums(rng: Random, kinds: Mapping[str, Sequence[Fact]]) -> Document:
    return " ".join(fact.answer for fact in rng.sample([*kinds["plus"], *kinds["minus"]], 8))


def _story_asked(rng: Random) -> Document:
    one = rng.choice(PEOPLE)
    request = rng.choice((f"Tell me a story about {one.name}.", f"Do you know a story about {one.name}?"))
    return chat(request, story(rng, one))


def _description(rng: Random) -> Document:
    return portrait(rng.choice(PEOPLE)) if rng.random() < 0.6 else _animal_page(rng, rng.choice(ANIMALS))


def _animal_page(rng: Random, one: Animal) -> str:
    lines = [
        f"It lives {one.home}.",
        f"It eats {one.food}.",
        f"It {one.sound} when it is happy.",
        f"It has {one.legs} legs.",
    ]
    rng.shuffle(lines)
    opening = rng.choice(
        (f"Look at the {one.name}.", f"This is {a(one.name)}.", f"Here comes {a(one.name)}.")
    )
    return " ".join((opening, *lines, f"A young one is called {a(one.young)}."))


def story(rng: Random, hero: Person) -> str:
    """Return a short story with the hero's own trade, home, pet and friend in it."""
    return rng.choice((_lost, _market, _visit, _storm))(rng, hero)


def _opening(rng: Random, hero: Person) -> str:
    hour, weather = rng.choice(HOURS), rng.choice(WEATHER)
    return rng.choice(
        (
            f"One {weather} {hour}, {hero.name} the {hero.trade}",
            f"It was a {weather} {hour} in {VILLAGE}. {hero.name} the {hero.trade}",
        )
    )


def _lost(rng: Random, hero: Person) -> str:
    thing, (first, second, third) = rng.choice(THINGS).name, rng.sample(HIDING, 3)
    they, their = _pronouns(hero)
    friend, treat = person(hero.friend), animal(hero.pet).food
    return (
        f"{_opening(rng, hero)} lost {their} {thing}. {they} looked {first}. It was not there. "
        f'{they} looked {second}. It was not there. "What is wrong?" asked {friend.name}. '
        f'"My {thing} is gone," said {hero.name}. Then {hero.pet_name} the {hero.pet} ran off and found '
        f"the {thing} {third}. {hero.name} was happy and gave {hero.pet_name} some {treat}."
    )


def _market(rng: Random, hero: Person) -> str:
    they, _ = _pronouns(hero)
    goods, friend = trade(hero.trade).goods, person(hero.friend)
    had = rng.randint(3, 10)
    sold = rng.randint(1, had - 1)
    return (
        f"On {hero.day} {hero.name} the {hero.trade} went to the market with {had} {goods}. "
        f"{friend.name} came and bought {sold}. {had} minus {sold} is {had - sold}, so {hero.name} "
        f"had {had - sold} left. With the money {they.lower()} bought {hero.food} and went home."
    )


def _visit(rng: Random, hero: Person) -> str:
    friend = person(hero.friend)
    they, _ = _pronouns(hero)
    gift, colour = rng.choice(THINGS), rng.choice(COLOURS)
    return (
        f"{_opening(rng, hero)} went to see {friend.name} the {friend.trade}, who lives {friend.home}. "
        f"{they} brought a {colour} {gift.name} made of {gift.material}. "
        f'"Thank you! I need it to {gift.use}," said {friend.name}. They ate {friend.food} '
        f"and {friend.pet_name} the {friend.pet} sat with them."
    )


def _storm(rng: Random, hero: Person) -> str:
    friend, place = person(hero.friend), rng.choice(HIDING)
    they, their = _pronouns(hero)
    fear = animal(hero.pet)
    return (
        f"One night a storm came to {VILLAGE}. {hero.pet_name} the {hero.colour} {hero.pet} was afraid and hid "
        f'{place}. {hero.name} called and called. "Listen!" said {friend.name}. "A {hero.pet} {fear.sound}." '
        f"{they} looked {place}, and there was {hero.pet_name}. {hero.name} took {their} {hero.pet} home, "
        f"and soon the storm was over."
    )


def _pronouns(one: Person) -> tuple[str, str]:
    return ("She", "her") if one.gender == "f" else ("He", "his")
