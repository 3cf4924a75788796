"""The README shows what the demo prints: pictures, references and the number of correct captions are checked."""

import re
from pathlib import Path

from openblip2.apps.demo.plan import announcement, plan_for
from openblip2.apps.scenes.draw import draw_scenes
from openblip2.apps.scenes.grammar import judge
from openblip2.data.text import clean_caption

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SHOWN = re.compile(r"^(runs/demo/\S+)\n  caption:   (.+)\n  reference: (.+)$", re.MULTILINE)


def test_the_demo_begins_with_what_the_readme_shows() -> None:
    assert announcement(plan_for(), Path("runs/demo")) in README


def test_the_captions_are_of_the_first_test_pictures_and_counted_rightly(tmp_path: Path) -> None:
    shown = SHOWN.findall(README)
    scenes = draw_scenes(tmp_path, len(shown), "test", 0, world="small")
    right = 0
    for (image, caption, reference), scene in zip(shown, scenes, strict=True):
        assert image == f"runs/demo/data/test/images/{Path(scene.image).name}"
        assert reference == clean_caption(scene.captions[0])
        found = judge(caption, scene.facts)  # pyright: ignore[reportArgumentType]
        right += found.objects and found.attributes and found.relation is not False
    assert len(shown) == 5
    assert f"{right} of these 5 captions are right" in README


def test_the_first_commands_show_right_answers(tmp_path: Path) -> None:
    scene = draw_scenes(tmp_path, 4, "test", 0, world="small")[3]
    (caption,) = re.findall(r"^runs/demo/data/test/images/00003.png\t(.+)$", README, re.MULTILINE)
    assert judge(caption, scene.facts).attributes  # pyright: ignore[reportArgumentType]
    ((question, answer),) = re.findall(r'^\$ openblip2 answer \S+ \S+/00003.png "(.+)"\n(.+)$', README, re.MULTILINE)
    assert (question, answer) in {(one.text, one.answer) for one in scene.questions}
    text, first = re.findall(r'^\$ openblip2 rank \S+ "(.+)" \S+\n\S+\t(\S+)$', README, re.MULTILINE)[0]
    assert (text, Path(first).name) == (clean_caption(scene.captions[0]), "00003.png")
