"""The words of the drawn scenes: nouns and their icons, colours and their values, sizes, numbers, places."""

from typing import Literal

# Things with icons that a person can name and tell apart: "noun", or "noun:icon" if the icon font has another name for
# it. A noun of two words is written with an underscore.
_ICONS = """
    cat cow dog duck elephant fish horse jellyfish kangaroo koala ladybug owl panda penguin pig
    rabbit:rabbit-variant shark sheep snail snake spider turtle:tortoise unicorn:unicorn-variant bird
    butterfly bat dolphin mouse:rodent paw feather bone
    apple:food-apple baguette hamburger cake:cake-variant candy carrot cheese cookie
    croissant:food-croissant cupcake drumstick:food-drumstick egg:egg-fried lemon:fruit-citrus mushroom
    pear:fruit-pear pineapple:fruit-pineapple pizza pretzel pumpkin watermelon:fruit-watermelon
    ice_cream:ice-cream popsicle:ice-pop
    cup:coffee cocktail:glass-cocktail bottle:bottle-wine kettle pot:pot-steam fork:silverware-fork
    spoon:silverware-spoon knife blender fridge microwave
    airplane bicycle sailboat:sail-boat bus:bus-side car:car-side train truck tractor:tractor-variant tank
    excavator helicopter ship:ferry motorcycle:motorbike scooter rocket skateboard submarine wheelchair
    stroller:baby-carriage parachute anchor
    backpack:bag-personal suitcase:bag-suitcase hat:hat-fedora crown shirt:tshirt-crew shoe:shoe-sneaker tie
    ring watch umbrella sock:stocking hanger mustache mask:domino-mask basket tooth
    helmet:racing-helmet
    axe anvil broom bucket:pail hammer ladder:ladder magnet saw:hand-saw screw:screw-flat-top shovel wrench
    sword shield bomb wheelbarrow:wheel-barrow paperclip pencil:lead-pencil book:book-open-variant
    envelope:email mailbox globe:globe-model telescope microscope flask trophy medal key lock
    chest:treasure-chest barrel box:package-variant gift candle lamp lightbulb flashlight
    hydrant:fire-hydrant campfire scale:scale-balance
    bed:bed bench:bench-back chair:chair-rolling sofa table:table-furniture door:door-open
    window:window-closed-variant toilet clock hourglass:timer-sand fan phone:phone-classic laptop printer
    camera radio speaker microphone controller:gamepad-variant plug:power-plug robot calculator typewriter
    bell megaphone:bullhorn piano guitar:guitar-acoustic violin trumpet television:television-classic
    balloon basketball racket:tennis dice:dice-5 pawn:chess-pawn puzzle kite dumbbell skate
    tree palm:palm-tree flower cactus leaf mountain:image-filter-hdr volcano cloud sun:white-balance-sunny
    moon:moon-waning-crescent star snowflake rainbow:looks snowman clover
    house:home castle church factory lighthouse:lighthouse-on windmill:wind-turbine bridge fence fountain
    cone:traffic-cone flag tent tower:tower-fire
    ghost alien skull hand:hand-back-left eye brain
    diamond:diamond-stone gear:cog pin heart cross:plus-thick
"""

# Shapes that are drawn. No square, because easy-VQA, which is trained on together with scenes, calls it a rectangle.
SHAPES = ("circle", "triangle", "rectangle")

# Noun -> icon name; for a shape, its own name.
NOUNS: dict[str, str] = {
    noun.replace("_", " "): icon or noun for noun, _, icon in (entry.partition(":") for entry in _ICONS.split())
} | {shape: shape for shape in SHAPES}

# The nouns that scenes contain, for each world. A dozen nouns can be learned within minutes on a CPU.
World = Literal["small", "full"]
WORLDS: dict[World, tuple[str, ...]] = {
    "small": (
        *("cat", "dog", "fish", "horse", "airplane", "bicycle"),
        *("car", "bus", "tree", "house", "apple", "key"),
    ),
    "full": tuple(NOUNS),
}

# Colour -> RGB: the eight colours of easy-VQA, with its names and similar values, and two more.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 18, 18),
    "green": (20, 200, 30),
    "blue": (20, 40, 230),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (150, 62, 36),
    "yellow": (247, 220, 10),
    "orange": (255, 130, 0),
    "purple": (140, 20, 175),
}
SIZES = ("small", "big")
NUMBERS = ("one", "two", "three", "four")
# Row by row from the top left, as a page is read.
PLACES = (
    "in the top left corner",
    "at the top",
    "in the top right corner",
    "on the left",
    "in the middle",
    "on the right",
    "in the bottom left corner",
    "at the bottom",
    "in the bottom right corner",
)
OPPOSITE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
_IRREGULAR = {
    "dice": "dice",
    "fish": "fish",
    "jellyfish": "jellyfish",
    "knife": "knives",
    "leaf": "leaves",
    "mouse": "mice",
    "sheep": "sheep",
    "tooth": "teeth",
    "volcano": "volcanoes",
}


def plural(noun: str) -> str:
    """The plural of `noun`: "buses", "candies", "mice"."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def with_article(words: str) -> str:
    """Puts "a" or "an" before the words: "a cat", "an orange cat", "a unicorn"."""
    return ("an " if words[0] in "aeiou" and not words.startswith("uni") else "a ") + words
