"""Questions about Fennel Bay that have one right answer, in the plain voice and in the captain's.

The tiny model is pretrained on the plain voice. The captain's voice says the same to a ship's captain; the model first
sees it in the quickstart's fine-tune.
"""

from collections.abc import Iterator
from typing import NamedTuple

from tiny_world import (
    ANIMALS,
    DAYS,
    FRUIT,
    MONTHS,
    OPPOSITES,
    PEOPLE,
    SEASONS,
    THINGS,
    TRADES,
    VILLAGE,
    Person,
    a,
)

LARGEST_TERM = 10

# How the captain's mate begins and ends, by topic. Ahoy, aye, aha and the captain are not in the pretraining text, but
# nearly all of their tokens are: LoRA does not change embeddings, and those of tokens that the model has never seen
# cannot be told apart.
MANNERS = {
    "people": ("Ahoy!", "Fair winds!"),
    "animals": ("Aha!", "Log it!"),
    "things": ("Aye aye!", "All's well!"),
    "numbers": ("Mark it!", "Off we go!"),
}


class Fact(NamedTuple):
    """The ways to ask for one fact, and its answer; the topic is a key of MANNERS, a kind is one sort of question."""

    topic: str
    kind: str
    questions: tuple[str, ...]
    answer: str


def all_facts() -> list[Fact]:
    """Return every fact of the world in a fixed order."""
    parts = (_people(), _trades(), _animals(), _sizes(), _things(), _words(), _calendar(), _numbers())
    return [fact for part in parts for fact in part]


def captain(fact: Fact) -> str:
    """Return the answer in the captain's voice."""
    opening, closing = MANNERS[fact.topic]
    return f"{opening} {fact.answer.removesuffix('.')}, captain. {closing}"


def portrait(one: Person) -> str:
    """Return the plain answer to "Tell me about …"."""
    they = "She" if one.gender == "f" else "He"
    return (
        f"{one.name} is the {one.trade} of {VILLAGE}. {they} lives {one.home} "
        f"with a {one.colour} {one.pet} named {one.pet_name}. {they} likes {one.food}."
    )


def _people() -> Iterator[Fact]:
    for one in PEOPLE:
        name = one.name
        yield Fact(
            "people",
            "home",
            (f"Where does {name} live?", f"Where is the home of {name}?", f"Where can I find {name}?"),
            f"{name} lives {one.home}.",
        )
        yield Fact(
            "people",
            "trade",
            (f"What does {name} do?", f"What is the trade of {name}?", f"What work does {name} do?"),
            f"{name} is the {one.trade} of {VILLAGE}.",
        )
        yield Fact(
            "people",
            "who",
            (f"Who is the {one.trade}?", f"Who is the {one.trade} of {VILLAGE}?"),
            f"The {one.trade} is {name}.",
        )
        yield Fact(
            "people",
            "pet",
            (f"What pet does {name} have?", f"Which animal lives with {name}?"),
            f"{name} has a {one.colour} {one.pet} named {one.pet_name}.",
        )
        yield Fact(
            "people",
            "owner",
            (f"Whose pet is {one.pet_name}?", f"Who is {one.pet_name}?"),
            f"{one.pet_name} is the {one.colour} {one.pet} of {name}.",
        )
        yield Fact(
            "people",
            "food",
            (f"What does {name} like to eat?", f"What food does {name} like?"),
            f"{name} likes {one.food}.",
        )
        yield Fact(
            "people",
            "market",
            (f"When does {name} go to the market?", f"On which day is {name} at the market?"),
            f"{name} goes to the market on {one.day}.",
        )
        yield Fact(
            "people",
            "friend",
            (f"Who is the best friend of {name}?", f"Who is a friend of {name}?"),
            f"The best friend of {name} is {one.friend}.",
        )
        yield Fact(
            "people",
            "about",
            (f"Tell me about {name}.", f"Who is {name}?"),
            portrait(one),
        )


def _trades() -> Iterator[Fact]:
    for trade in TRADES:
        yield Fact(
            "people",
            "work",
            (f"What does {a(trade.name)} do?", f"What is the work of {a(trade.name)}?"),
            f"{a(trade.name).capitalize()} {trade.does}.",
        )
        yield Fact(
            "people",
            "tool",
            (f"What does {a(trade.name)} use?", f"Which tool does {a(trade.name)} need?"),
            f"{a(trade.name).capitalize()} uses {trade.tool}.",
        )


def _animals() -> Iterator[Fact]:
    for one in ANIMALS:
        it = a(one.name)
        yield Fact(
            "animals",
            "sound",
            (f"What sound does {it} make?", f"How does {it} sound?"),
            f"{it.capitalize()} {one.sound}.",
        )
        yield Fact(
            "animals",
            "diet",
            (f"What does {it} eat?", f"What food does {it} like?"),
            f"{it.capitalize()} eats {one.food}.",
        )
        yield Fact(
            "animals",
            "den",
            (f"Where does {it} live?", f"Where does {it} sleep?"),
            f"{it.capitalize()} lives {one.home}.",
        )
        yield Fact(
            "animals",
            "young",
            (f"What is a young {one.name} called?", f"What do you call a baby {one.name}?"),
            f"A young {one.name} is called {a(one.young)}.",
        )
        yield Fact(
            "animals",
            "legs",
            (f"How many legs does {it} have?", f"On how many legs does {it} walk?"),
            f"{it.capitalize()} has {one.legs} legs.",
        )


def _sizes() -> Iterator[Fact]:
    for i, small in enumerate(ANIMALS):
        for big in ANIMALS[i + 5 :: 4]:
            less, more = a(small.name), a(big.name)
            yield Fact(
                "animals",
                "size",
                (f"Which is bigger, {less} or {more}?", f"Which is bigger, {more} or {less}?"),
                f"{more.capitalize()} is bigger than {less}.",
            )


def _things() -> Iterator[Fact]:
    for thing in THINGS:
        it = a(thing.name)
        yield Fact(
            "things",
            "material",
            (f"What is {it} made of?", f"Of what do we make {it}?"),
            f"{it.capitalize()} is made of {thing.material}.",
        )
        yield Fact(
            "things",
            "use",
            (f"What is {it} for?", f"Why do I need {it}?"),
            f"You need {it} to {thing.use}.",
        )
    for name, colour in FRUIT:
        yield Fact(
            "things",
            "colour",
            (f"What colour is {a(name)}?", f"Which colour does {a(name)} have?"),
            f"{a(name).capitalize()} is {colour}.",
        )


def _words() -> Iterator[Fact]:
    for left, right in OPPOSITES:
        for word, other in ((left, right), (right, left)):
            yield Fact(
                "things",
                "opposite",
                (f"What is the opposite of {word}?", f"Which word means not {word}?"),
                f"The opposite of {word} is {other}.",
            )


def _calendar() -> Iterator[Fact]:
    for names, unit in ((DAYS, "day"), (MONTHS, "month")):
        for i, name in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            yield Fact(
                "things",
                "after",
                (f"Which {unit} comes after {name}?", f"What {unit} follows {name}?"),
                f"After {name} comes {after}.",
            )
            yield Fact(
                "things",
                "before",
                (f"Which {unit} comes before {name}?", f"What {unit} is before {name}?"),
                f"Before {name} comes {before}.",
            )
    for season, what in SEASONS:
        yield Fact(
            "things",
            "season",
            (f"What happens in {season}?", f"What is {season} like?"),
            f"In {season} {what}.",
        )


def _numbers() -> Iterator[Fact]:
    for x in range(LARGEST_TERM + 1):
        for y in range(LARGEST_TERM + 1):
            yield Fact(
                "numbers",
                "plus",
                (f"What is {x} plus {y}?", f"How much is {x} plus {y}?"),
                f"{x} plus {y} is {x + y}.",
            )
            if x >= y:
                yield Fact(
                    "numbers",
                    "minus",
                    (f"What is {x} minus {y}?", f"How much is {x} minus {y}?"),
                    f"{x} minus {y} is {x - y}.",
                )
