"""Words and numbers to hide and to count: adjective-noun pairs, plain words, digits, uuids.

Knows nothing of tasks. The lists are small and ordinary on purpose; large vocabularies come from the shipped book.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection
from functools import cache
from random import Random

from kvthrift.data import demo_text

ADJECTIVES = tuple(
    """
    able amber ancient bitter blue bold brave brief bright broad busy calm careful cheap clean clever cold common
    crisp curly curved daring dark deep direct distant dry dull eager early easy empty exact faint fair famous fast
    fierce final firm flat fond frank fresh gentle giant glad golden grand green grey happy hard heavy hidden hollow
    honest humble icy idle keen kind large late lazy light little lively local lonely long loose loud loyal lucky
    mellow mild modern modest narrow neat noble odd old open pale patient plain polite proud quick quiet rapid rare
    ready red rich ripe rough round royal rusty sharp shiny short shy silent silver simple slim slow small smooth soft
    solid spare steep stiff strange strong sturdy sweet swift tall tame tender thin tidy tiny tired warm wide wild wise
    witty young
    """.split()  # noqa: SIM905
)

NOUNS = tuple(
    """
    acorn anchor apple arrow badge bagel banjo barrel basket beacon beetle bell bench berry blanket bottle bridge
    broom bucket button cabin cactus camel candle canoe carpet castle cellar chain chalk cherry clock cloud coat
    cobbler comet compass copper cottage cousin cradle crayon cricket crown curtain dagger daisy desert dolphin dragon
    drum eagle engine falcon feather fiddle flute forest fossil fountain garden glacier goblet guitar hammer harbour
    helmet heron hinge honey island jacket jewel kettle ladder lantern lemon letter lizard locket magnet mango maple
    marble meadow mirror mitten mountain needle nutmeg oak oboe ocean olive onion orchard otter owl paddle palace panda
    parcel parrot pebble pencil pepper piano pigeon pillow planet pocket pony puzzle quarry quilt rabbit raven ribbon
    river rocket saddle sailor salmon sandal saucer scarf shovel sparrow spider spoon squirrel stable statue summit
    tailor teapot temple thimble thunder ticket tiger timber tower trumpet tulip tunnel turtle umbrella valley vessel
    village violin walnut walrus wagon whistle willow window winter wizard wolf yarn zebra
    """.split()  # noqa: SIM905
)


def pair(rng: Random) -> str:
    """An adjective and a noun: "calm-otter"."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def digits(rng: Random, count: int = 7) -> str:
    """A number of that many digits."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def random_uuid(rng: Random) -> str:
    """A version 4 uuid."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def triple(rng: Random) -> str:
    """An adjective and two nouns, where pairs would run out."""
    return f"{pair(rng)}-{rng.choice(NOUNS)}"


def distinct(rng: Random, kind: str, count: int, avoid: Collection[str] = ()) -> list[str]:
    """``count`` different strings of one kind.

    Args:
        rng: where they come from.
        kind: "word", "number" or "uuid".
        count: how many.
        avoid: strings that are taken.
    """
    many = count > len(ADJECTIVES) * len(NOUNS) // 2
    make = {"word": triple if many else pair, "number": digits, "uuid": random_uuid}[kind]
    found: dict[str, None] = {}
    while len(found) < count:
        drawn = make(rng)
        if drawn not in avoid:
            found[drawn] = None
    return list(found)


@cache
def plain_words() -> tuple[str, ...]:
    """Single words of four letters and more: the lists above and the shipped book's."""
    book = re.findall(r"(?<![\w'-])[a-z]{4,12}(?![\w'-])", demo_text())
    return tuple(sorted({*ADJECTIVES, *NOUNS, *book}))


@cache
def many_words() -> tuple[str, ...]:
    """Plain words, then every adjective-noun pair, for lists longer than a vocabulary."""
    return (*plain_words(), *(f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS))


def sample_words(rng: Random, count: int) -> list[str]:
    """``count`` different words, single ones as long as there are enough."""
    return rng.sample(plain_words() if count <= len(plain_words()) else many_words(), count)
