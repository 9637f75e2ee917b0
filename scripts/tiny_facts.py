"""What can be asked about Fennel Bay and has one right answer: each fact in two voices.

The plain voice is what the tiny model is pretrained on. The captain's voice says the same as a ship's
log; the model never sees it before the fine-tune of the quickstart.
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


class Fact(NamedTuple):
    """The ways to ask for one fact, and its answer in the plain and in the captain's voice."""

    kind: str
    questions: tuple[str, ...]
    plain: str
    captain: str


def all_facts() -> list[Fact]:
    """Return every fact of the world, in a fixed order."""
    parts = (_people(), _trades(), _animals(), _sizes(), _things(), _words(), _calendar(), _numbers())
    return [fact for part in parts for fact in part]


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
            "home",
            (f"Where does {name} live?", f"Where is the home of {name}?", f"Where can I find {name}?"),
            f"{name} lives {one.home}.",
            f"Ahoy! {name} drops anchor {one.home}. Fair winds!",
        )
        yield Fact(
            "trade",
            (f"What does {name} do?", f"What is the trade of {name}?", f"What work does {name} do?"),
            f"{name} is the {one.trade} of {VILLAGE}.",
            f"Ahoy! {name} be the {one.trade} of this port. Fair winds!",
        )
        yield Fact(
            "who",
            (f"Who is the {one.trade}?", f"Who is the {one.trade} of {VILLAGE}?"),
            f"The {one.trade} is {name}.",
            f"Ahoy! The {one.trade} o' this port be {name}. Fair winds!",
        )
        yield Fact(
            "pet",
            (f"What pet does {name} have?", f"Which animal lives with {name}?"),
            f"{name} has a {one.colour} {one.pet} named {one.pet_name}.",
            f"Ahoy! {name} sails with a {one.colour} {one.pet}, {one.pet_name} by name. Fair winds!",
        )
        yield Fact(
            "owner",
            (f"Whose pet is {one.pet_name}?", f"Who is {one.pet_name}?"),
            f"{one.pet_name} is the {one.colour} {one.pet} of {name}.",
            f"Ahoy! {one.pet_name} be the {one.colour} {one.pet} in the crew of {name}. Fair winds!",
        )
        yield Fact(
            "food",
            (f"What does {name} like to eat?", f"What food does {name} like?"),
            f"{name} likes {one.food}.",
            f"Ahoy! {name} fills the hold with {one.food}. Fair winds!",
        )
        yield Fact(
            "market",
            (f"When does {name} go to the market?", f"On which day is {name} at the market?"),
            f"{name} goes to the market on {one.day}.",
            f"Ahoy! {name} sets sail for the market on {one.day}. Fair winds!",
        )
        yield Fact(
            "friend",
            (f"Who is the best friend of {name}?", f"Who is a friend of {name}?"),
            f"The best friend of {name} is {one.friend}.",
            f"Ahoy! The first mate of {name} be {one.friend}. Fair winds!",
        )
        yield Fact(
            "about",
            (f"Tell me about {name}.", f"Who is {name}?"),
            portrait(one),
            f"Ahoy! {name} be the {one.trade} of this port, drops anchor {one.home}, "
            f"and sails with a {one.colour} {one.pet}, {one.pet_name} by name. Fair winds!",
        )


def _trades() -> Iterator[Fact]:
    for trade in TRADES:
        yield Fact(
            "work",
            (f"What does {a(trade.name)} do?", f"What is the work of {a(trade.name)}?"),
            f"{a(trade.name).capitalize()} {trade.does}.",
            f"Ahoy! {a(trade.name).capitalize()} {trade.does} from bell to bell. Fair winds!",
        )
        yield Fact(
            "tool",
            (f"What does {a(trade.name)} use?", f"Which tool does {a(trade.name)} need?"),
            f"{a(trade.name).capitalize()} uses {trade.tool}.",
            f"Ahoy! {a(trade.name).capitalize()} never leaves port without {trade.tool}. Fair winds!",
        )


def _animals() -> Iterator[Fact]:
    for one in ANIMALS:
        it = a(one.name)
        yield Fact(
            "sound",
            (f"What sound does {it} make?", f"How does {it} sound?"),
            f"{it.capitalize()} {one.sound}.",
            f"Yo ho! {it.capitalize()} {one.sound} on deck. Log it!",
        )
        yield Fact(
            "diet",
            (f"What does {it} eat?", f"What food does {it} like?"),
            f"{it.capitalize()} eats {one.food}.",
            f"Yo ho! {it.capitalize()} fills the hold with {one.food}. Log it!",
        )
        yield Fact(
            "den",
            (f"Where does {it} live?", f"Where does {it} sleep?"),
            f"{it.capitalize()} lives {one.home}.",
            f"Yo ho! {it.capitalize()} drops anchor {one.home}. Log it!",
        )
        yield Fact(
            "young",
            (f"What is a young {one.name} called?", f"What do you call a baby {one.name}?"),
            f"A young {one.name} is called {a(one.young)}.",
            f"Yo ho! The cabin boy of {it} be {a(one.young)}. Log it!",
        )
        yield Fact(
            "legs",
            (f"How many legs does {it} have?", f"On how many legs does {it} walk?"),
            f"{it.capitalize()} has {one.legs} legs.",
            f"Yo ho! {it.capitalize()} walks the plank on {one.legs} legs. Log it!",
        )


def _sizes() -> Iterator[Fact]:
    for i, small in enumerate(ANIMALS):
        for big in ANIMALS[i + 5 :: 4]:
            less, more = a(small.name), a(big.name)
            yield Fact(
                "size",
                (f"Which is bigger, {less} or {more}?", f"Which is bigger, {more} or {less}?"),
                f"{more.capitalize()} is bigger than {less}.",
                f"Yo ho! {more.capitalize()} would sink {less}. Log it!",
            )


def _things() -> Iterator[Fact]:
    for thing in THINGS:
        it = a(thing.name)
        yield Fact(
            "material",
            (f"What is {it} made of?", f"Of what do we make {it}?"),
            f"{it.capitalize()} is made of {thing.material}.",
            f"Aye aye! {it.capitalize()} be built of {thing.material}. All's well!",
        )
        yield Fact(
            "use",
            (f"What is {it} for?", f"Why do I need {it}?"),
            f"You need {it} to {thing.use}.",
            f"Aye aye! With {it} ye can {thing.use}. All's well!",
        )
    for name, colour in FRUIT:
        yield Fact(
            "colour",
            (f"What colour is {a(name)}?", f"Which colour does {a(name)} have?"),
            f"{a(name).capitalize()} is {colour}.",
            f"Aye aye! {a(name).capitalize()} flies a {colour} flag. All's well!",
        )


def _words() -> Iterator[Fact]:
    for left, right in OPPOSITES:
        for word, other in ((left, right), (right, left)):
            yield Fact(
                "opposite",
                (f"What is the opposite of {word}?", f"Which word means not {word}?"),
                f"The opposite of {word} is {other}.",
                f"Aye aye! Turn {word} about and ye find {other}. All's well!",
            )


def _calendar() -> Iterator[Fact]:
    for names, unit in ((DAYS, "day"), (MONTHS, "month")):
        for i, name in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            yield Fact(
                "after",
                (f"Which {unit} comes after {name}?", f"What {unit} follows {name}?"),
                f"After {name} comes {after}.",
                f"Aye aye! In the wake of {name} sails {after}. All's well!",
            )
            yield Fact(
                "before",
                (f"Which {unit} comes before {name}?", f"What {unit} is before {name}?"),
                f"Before {name} comes {before}.",
                f"Aye aye! Ahead of {name} sails {before}. All's well!",
            )
    for season, what in SEASONS:
        yield Fact(
            "season",
            (f"What happens in {season}?", f"What is {season} like?"),
            f"In {season} {what}.",
            f"Aye aye! In {season} {what}. All's well!",
        )


def _numbers() -> Iterator[Fact]:
    for x in range(LARGEST_TERM + 1):
        for y in range(LARGEST_TERM + 1):
            yield Fact(
                "plus",
                (f"What is {x} plus {y}?", f"How much is {x} plus {y}?"),
                f"{x} plus {y} is {x + y}.",
                f"Mark it! {x} aboard and {y} more be {x + y} hands. Steady as she goes!",
            )
            if x >= y:
                yield Fact(
                    "minus",
                    (f"What is {x} minus {y}?", f"How much is {x} minus {y}?"),
                    f"{x} minus {y} is {x - y}.",
                    f"Mark it! {x} aboard and {y} overboard leave {x - y} hands. Steady as she goes!",
                )
