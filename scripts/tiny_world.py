"""The small world that the tiny model knows: the village of Fennel Bay, as plain tables.

All text is generated from these tables (`tiny_facts.py`, `tiny_text.py`), so another world needs changes only here.
Every person has a different trade, home and pet, so that each question has one right answer.
"""

import re
from typing import NamedTuple

VILLAGE = "Fennel Bay"


class Person(NamedTuple):
    """One villager; `home` and `food` are phrases that fit after "lives" and "likes"."""

    name: str
    gender: str
    trade: str
    home: str
    colour: str
    pet: str
    pet_name: str
    food: str
    day: str
    friend: str


# Columns are separated by two spaces.
_PEOPLE = """
Ada    f  baker        by the mill                grey     cat     Pip       plum cake    Monday     Bram
Bram   m  smith        next to the forge          black    dog     Cinder    bean soup    Friday     Ada
Clara  f  weaver       above the bakery           white    rabbit  Button    apple pie    Tuesday    Hugo
Doran  m  fisher       at the end of the pier     brown    duck    Puddle    fried fish   Wednesday  Kit
Edith  f  teacher      beside the school          brown    owl     Page      ginger tea   Saturday   Nora
Finn   m  shepherd     on the green hill          white    sheep   Cloud     goat cheese  Thursday   Ivy
Greta  f  potter       behind the church          red      hen     Pepper    corn bread   Monday     Jonas
Hugo   m  carpenter    near the old well          yellow   bird    Chip      onion stew   Friday     Clara
Ivy    f  gardener     in the rose cottage        green    frog    Hop       berry jam    Tuesday    Finn
Jonas  m  miller       across the bridge          grey     donkey  Barley    oat cakes    Thursday   Greta
Kit    m  sailor       in the little harbour      green    parrot  Mango     lemon tart   Sunday     Doran
Lena   f  doctor       on Oak Lane                black    cat     Midnight  mint tea     Wednesday  Oscar
Milo   m  cook         over the inn               pink     pig     Truffle   pepper soup  Saturday   Rosa
Nora   f  painter      in the tall tower          blue     bird    Sky       honey cake   Sunday     Edith
Oscar  m  clockmaker   on the market square       brown    mouse   Tick      nut bread    Monday     Lena
Petra  f  farmer       behind the orchard         spotted  cow     Daisy     potato pie   Friday     Quinn
Quinn  m  beekeeper    at the edge of the forest  red      fox     Rusty     pear tart    Tuesday    Petra
Rosa   f  tailor       under the stone arch       orange   cat     Thimble   cherry cake  Thursday   Milo
Silas  m  musician     on the canal boat          white    goose   Trumpet   cheese pie   Saturday   Tilda
Tilda  f  lamplighter  in the lighthouse          yellow   dog     Spark     carrot stew  Wednesday  Silas
"""
PEOPLE = tuple(Person(*re.split(" {2,}", line)) for line in _PEOPLE.strip().splitlines())


class Trade(NamedTuple):
    """What one does, as a verb phrase; what one makes or sells, in the plural; and what one works with."""

    name: str
    does: str
    goods: str
    tool: str


# fmt: off
TRADES = (
    Trade("baker",       "bakes bread",            "loaves",     "an oven"),
    Trade("smith",       "makes horseshoes",       "horseshoes", "a hammer"),
    Trade("weaver",      "weaves cloth",           "blankets",   "a loom"),
    Trade("fisher",      "catches fish",           "herrings",   "a net"),
    Trade("teacher",     "teaches the children",   "books",      "a slate"),
    Trade("shepherd",    "guards the sheep",       "fleeces",    "a crook"),
    Trade("potter",      "makes bowls",            "bowls",      "a wheel"),
    Trade("carpenter",   "builds chairs",          "chairs",     "a saw"),
    Trade("gardener",    "grows flowers",          "roses",      "a spade"),
    Trade("miller",      "grinds flour",           "sacks",      "a millstone"),
    Trade("sailor",      "sails to the islands",   "ropes",      "a compass"),
    Trade("doctor",      "helps the sick",         "potions",    "a bandage"),
    Trade("cook",        "cooks soup",             "dumplings",  "a pot"),
    Trade("painter",     "paints pictures",        "pictures",   "a brush"),
    Trade("clockmaker",  "mends clocks",           "clocks",     "a tiny key"),
    Trade("farmer",      "grows wheat",            "pumpkins",   "a plough"),
    Trade("beekeeper",   "gathers honey",          "candles",    "a veil"),
    Trade("tailor",      "sews coats",             "coats",      "a needle"),
    Trade("musician",    "plays old songs",        "flutes",     "a fiddle"),
    Trade("lamplighter", "lights the lamps",       "lanterns",   "a ladder"),
)


class Animal(NamedTuple):
    """What an animal does and where; the table goes from the smallest to the largest."""

    name: str
    sound: str
    food: str
    home: str
    young: str
    legs: int


ANIMALS = (
    Animal("bee",    "buzzes",  "nectar",    "in a hive",        "grub",     6),
    Animal("mouse",  "squeaks", "crumbs",    "in a hole",        "pup",      4),
    Animal("frog",   "croaks",  "flies",     "in a pond",        "tadpole",  4),
    Animal("bird",   "sings",   "seeds",     "in a nest",        "chick",    2),
    Animal("parrot", "talks",   "nuts",      "in a palm tree",   "chick",    2),
    Animal("hen",    "clucks",  "corn",      "in a coop",        "chick",    2),
    Animal("owl",    "hoots",   "mice",      "in a hollow tree", "owlet",    2),
    Animal("duck",   "quacks",  "snails",    "on a lake",        "duckling", 2),
    Animal("rabbit", "thumps",  "carrots",   "in a burrow",      "bunny",    4),
    Animal("cat",    "purrs",   "fish",      "in a basket",      "kitten",   4),
    Animal("goose",  "honks",   "grain",     "in a yard",        "gosling",  2),
    Animal("fox",    "yelps",   "berries",   "in a den",         "cub",      4),
    Animal("dog",    "barks",   "bones",     "in a kennel",      "puppy",    4),
    Animal("sheep",  "bleats",  "clover",    "in a pen",         "lamb",     4),
    Animal("pig",    "grunts",  "turnips",   "in a sty",         "piglet",   4),
    Animal("donkey", "brays",   "thistles",  "in a shed",        "foal",     4),
    Animal("horse",  "neighs",  "hay",       "in a stable",      "foal",     4),
    Animal("cow",    "moos",    "grass",     "in a barn",        "calf",     4),
)


class Thing(NamedTuple):
    """What a thing is made of and what it is for."""

    name: str
    material: str
    use: str


THINGS = (
    Thing("boat",    "wood",    "cross the water"),
    Thing("kite",    "paper",   "catch the wind"),
    Thing("bell",    "brass",   "call the village"),
    Thing("cup",     "clay",    "drink tea"),
    Thing("key",     "iron",    "open a door"),
    Thing("ring",    "gold",    "please a friend"),
    Thing("scarf",   "wool",    "keep warm"),
    Thing("shirt",   "linen",   "look neat"),
    Thing("boot",    "leather", "walk in the rain"),
    Thing("lamp",    "glass",   "see at night"),
    Thing("spoon",   "silver",  "eat soup"),
    Thing("basket",  "straw",   "carry eggs"),
    Thing("wall",    "stone",   "stop the wind"),
    Thing("candle",  "wax",     "light a room"),
    Thing("pillow",  "feathers", "sleep well"),
    Thing("sail",    "canvas",  "move a ship"),
    Thing("drum",    "skin",    "keep the beat"),
    Thing("coin",    "copper",  "pay the ferry"),
)

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("old", "new"), ("fast", "slow"), ("wet", "dry"), ("loud", "quiet"),
    ("happy", "sad"), ("early", "late"), ("full", "empty"), ("heavy", "light"), ("hard", "soft"), ("rich", "poor"),
    ("high", "low"), ("clean", "dirty"), ("open", "shut"), ("strong", "weak"), ("near", "far"), ("sweet", "sour"),
)

FRUIT = (
    ("plum", "purple"), ("cherry", "red"), ("lemon", "yellow"), ("pear", "green"), ("carrot", "orange"),
    ("radish", "pink"), ("pea", "green"), ("onion", "white"), ("pumpkin", "orange"), ("corn cob", "yellow"),
    ("beet", "purple"), ("tomato", "red"), ("nut", "brown"), ("bean", "white"), ("lime", "green"),
    ("potato", "brown"),
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)
SEASONS = (
    ("spring", "the flowers open"), ("summer", "the days are long"),
    ("autumn", "the leaves fall"), ("winter", "the snow comes"),
)
# fmt: on

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
WEATHER = ("sunny", "rainy", "windy", "foggy", "snowy", "warm", "cold", "bright")
HOURS = ("morning", "afternoon", "evening", "night")
HIDING = (
    "under the bed",
    "behind the door",
    "in the garden",
    "on the roof",
    "by the river",
    "in the boat",
    "under the bridge",
    "in the hay",
    "behind the clock",
    "at the market",
)


def person(name: str) -> Person:
    """Return the villager with a name."""
    return next(one for one in PEOPLE if one.name == name)


def trade(name: str) -> Trade:
    """Return the trade with a name."""
    return next(one for one in TRADES if one.name == name)


def animal(name: str) -> Animal:
    """Return the animal with a name."""
    return next(one for one in ANIMALS if one.name == name)


def a(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
