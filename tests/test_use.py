"""Use of a trained run: folders of pictures, several captions, answers from a list, features and speed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import openblip2
from openblip2 import Captioner, Decoding, Matcher, UserError
from openblip2.inference.captioner import SAMPLED
from test_cli import Home, call, home, python  # noqa: F401

SHORT = Decoding(max_new_tokens=5)


@pytest.fixture(scope="module")
def captioner(home: Home) -> Captioner:  # noqa: F811
    model = openblip2.load(home.stage2)
    assert isinstance(model, Captioner)
    return model


@pytest.fixture
def folder(home: Home, tmp_path: Path) -> Path:  # noqa: F811
    """Three pictures, one of them in a subfolder with a tab in its name; also a broken one and a hidden one."""
    folder = tmp_path / "photos"
    for name in ("b.png", "a.PNG", "in/c\td.png", ".hidden/e.png"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(home.picture(len(name) % 4), folder / name)
    (folder / "bad.jpg").write_bytes(b"not a picture")
    (folder / "notes.md").write_text("no picture")
    return folder


# --- a folder to caption


def test_caption_of_a_folder_is_that_of_its_pictures_and_names_the_bad_one(home: Home, folder: Path) -> None:  # noqa: F811
    pictures = [folder / name for name in ("a.PNG", "b.png", "in/c\td.png")]
    said = call("caption", home.stage2, folder, "--tokens", 4)
    assert said.code == 2
    assert said.out == call("caption", home.stage2, *pictures, "--tokens", 4).out
    assert [line.split("\t")[0] for line in said.out.splitlines()] == [str(p).replace("\t", "\\t") for p in pictures]
    assert (
        said.err.splitlines()[-1] == f"openblip2: 1 of 4 pictures cannot be read and have no result: {folder}/bad.jpg"
    )


def test_beside_writes_what_train_reads_and_continues(home: Home, folder: Path) -> None:  # noqa: F811
    (folder / "b.txt").write_text("by hand")
    said = call("caption", home.stage2, folder, "--beside", "--tokens", 4)
    assert said.code == 2
    assert "1 of 4 pictures have a text and are skipped" in said.err
    assert (folder / "b.txt").read_text() == "by hand"
    written = dict(line.split("\t") for line in said.out.splitlines())
    assert (folder / "a.txt").read_text() == written[str(folder / "a.PNG")] + "\n"
    texts = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".txt", ".new"))
    assert texts == ["a.txt", "b.txt", "in/c\td.txt"]
    assert not list(folder.rglob(".lock"))
    again = call("caption", home.stage2, folder, "--beside")
    assert (again.code, again.out) == (2, "")  # the bad picture is tried again
    (folder / "bad.jpg").unlink()
    assert call("caption", home.root / "no run", folder, "--beside").code == 0  # nothing is left to do
    records, skipped = openblip2.read_records(folder)
    assert (len(records), skipped) == (3, [])


def test_pictures_that_would_share_a_text_are_refused_before_anything_is_written(home: Home, folder: Path) -> None:  # noqa: F811
    shutil.copy(folder / "b.png", folder / "a.jpg")
    said = call("caption", home.stage2, folder, "--beside")
    assert said.code == 2
    assert f"{folder}/a.PNG and {folder}/a.jpg would have the same a.txt: rename one of them" in said.err
    assert not list(folder.rglob("*.txt"))


def test_a_folder_without_pictures_is_one_line(home: Home, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "a.txt").write_text("a")
    said = call("caption", home.stage2, tmp_path)
    assert said.code == 2
    assert f"{tmp_path}: no pictures in this folder (.apng, .avif, " in said.err


# --- decoding


def test_captions_differ_and_depend_on_seed_and_picture_alone(home: Home, captioner: Captioner) -> None:  # noqa: F811
    how = Decoding(max_new_tokens=5, beams=1, sample=True, seed=3)
    pictures = [home.picture(n) for n in range(5)]
    together = captioner.captions(pictures, 3, decoding=how)
    assert all(own is not None and len({text for text, _ in own}) == 3 for own in together)
    for picture, own in zip(pictures, together, strict=True):
        (alone,) = captioner.captions([picture], 2, decoding=how)
        assert alone is not None
        assert own is not None
        assert [one.text for one in alone] == [one.text for one in own[:2]]
        first = captioner.caption([picture, pictures[0]], decoding=how)[0]
        assert first == own[0].text
    texts = [str(captioner.captions(pictures, 2, decoding=Decoding(5, beams=1, sample=True, seed=s))) for s in (3, 4)]
    assert texts[0] != texts[1]


def test_a_picture_with_few_captions_has_fewer_and_a_bad_one_none(
    home: Home,  # noqa: F811
    captioner: Captioner,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cold = Decoding(max_new_tokens=3, beams=1, sample=True, temperature=0.001, seed=0)
    own, none = captioner.captions([home.picture(), home.root / "gone.png"], 3, decoding=cold)
    assert own is not None
    assert len(own) == 1
    assert none is None
    assert "1 of 2 pictures have fewer than 3 different captions in 15 draws" in caplog.text
    with pytest.raises(UserError, match="3 captions of a picture need sampling: use Decoding"):
        captioner.captions([home.picture()], 3, decoding=SHORT)


def test_options_of_the_command_line_are_those_of_decoding(home: Home, captioner: Captioner) -> None:  # noqa: F811
    def lines(*options: object) -> list[dict[str, Any]]:
        said = call("caption", home.stage2, home.picture(), *options, "--json")
        assert said.code == 0, said.err
        return [json.loads(line) for line in said.out.splitlines()]

    (row,) = lines("--captions", 3, "--tokens", 5, "--seed", 3)
    how = Decoding(max_new_tokens=5, beams=1, sample=True, seed=3)
    (expected,) = captioner.captions([home.picture()], 3, decoding=how, score=True)
    assert [tuple(one.values()) for one in row["captions"]] == expected
    (first,) = lines("--sample", "--tokens", 5, "--seed", 3)
    assert first == {"path": row["path"], **row["captions"][0]}
    (row,) = lines("--tokens", 6, "--repetition-penalty", 50)
    words = row["caption"].split()
    assert len(words) == len(set(words)) <= 6
    said = call("caption", home.stage2, home.picture(), "--captions", 3, "--tokens", 5, "--seed", 3)
    assert [line.split("\t")[1] for line in said.out.splitlines()] == [one.text for one in expected or ()]
    for options, says in (
        (("--sample", "--beams", 3), "leave out --beams"),
        (("--captions", 2, "--beams", 3), "leave out --beams"),
        (("--seed", 3), "--seed 3 is for --sample and --captions: add one of them, or leave it out"),
        (("--repetition-penalty", 0), "repetition_penalty=0.0: give a number above 0"),
        (("--tokens", 5000), "ask for fewer new tokens"),
    ):
        said = call("caption", home.stage2, home.picture(), *options)
        assert (said.code, says in said.err) == (2, True), said.err


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sample": True}, "sampling uses no beams: set beams=1"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan"),
        ({"temperature": 0.0}, "temperature=0.0: give a number above 0"),
        ({"top_p": 1.5}, "top_p=1.5: give a number above 0 and at most 1"),
    ],
)
def test_decoding_refuses_values_that_cannot_be_used(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Decoding(**values)


# --- likelihoods


def test_choose_compares_whole_answers(home: Home, captioner: Captioner, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    answers, question = ["red", "a blue dog", "blue"], "what colour is it?"
    given = [home.picture(0), home.root / "gone.png", home.picture(1)]
    chances = captioner.choose(given, [question] * 3, answers)
    assert chances[1].isnan().all()
    assert "gone.png: does not exist" in caplog.text
    (prompt,), _ = captioner.read_questions([question])
    logs = [captioner.log_likelihood([home.picture(1)], [answer], prompt)[0] for answer in answers]
    torch.testing.assert_close(chances[2], torch.stack(logs).softmax(0))
    for wrong in (["red"], ["red", "red"], ["red", " "]):
        with pytest.raises(UserError, match="give two or more different ones"):
            captioner.choose(given[:1], [question], wrong)
    said = call("answer", home.stage2, given[2], question, "--among", "red,a blue dog, blue")
    best = sorted(zip(chances[2].tolist(), answers, strict=True), reverse=True)
    assert said.out.splitlines() == [f"{chance:.3f}\t{answer}" for chance, answer in best]
    row = json.loads(call("answer", home.stage2, given[2], question, "--among", "red,a blue dog,blue", "--json").out)
    assert row["answer"] == best[0][1]
    assert list(row["probabilities"]) == [answer for _, answer in best]
    assert sum(row["probabilities"].values()) == pytest.approx(1)
    assert "leave out --beams" in call("answer", home.stage2, given[2], question, "--among", "a,b", "--tokens", 3).err


def test_logprob_of_a_caption_is_that_of_its_own_text(home: Home, captioner: Captioner) -> None:  # noqa: F811
    pictures = [home.picture(n) for n in range(3)]
    said = call("caption", home.stage2, *pictures, "--tokens", 4, "--json")
    rows = [json.loads(line) for line in said.out.splitlines()]
    scores = captioner.log_likelihood(pictures, [row["caption"] for row in rows])
    assert [row["logprob"] for row in rows] == pytest.approx(scores.tolist(), abs=1e-4)
    assert captioner.log_likelihood([home.root / "gone.png", pictures[0]], ["a dog"] * 2).isnan().tolist() == [
        True,
        False,
    ]


# --- features


def test_features_of_a_stage_1_run(home: Home, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    matcher = openblip2.load(home.stage1)
    assert isinstance(matcher, Matcher)
    pictures, texts = [home.picture(0), home.root / "gone.png", home.picture(1)], ["a red dog", "a cat", "a"]
    found = matcher.features(pictures, texts)
    assert [list(one.shape) for one in found if one is not None] == [[3, 5, 30], [3, 5, 9], [3, 5, 30]]
    assert all(one[1].isnan().all() for one in found if one is not None)
    assert "gone.png: does not exist" in caplog.text
    alone = matcher.features(pictures[2:], texts[2:])
    for one, other in zip(found, alone, strict=True):
        assert one is not None
        torch.testing.assert_close(one[2:], other)  # features do not depend on other rows of the batch
    assert matcher.features(pictures[:1]).joint is None
    # Similarity is the largest cosine over the queries; the match score is the ITM head applied to the joint output.
    vectors = torch.tensor([matcher.embed_text(text) for text in texts])
    torch.testing.assert_close((found.projected @ vectors.T).amax(1)[::2], matcher.similarity(pictures, texts)[::2])
    assert found.joint is not None
    with torch.no_grad():
        match = matcher.model.itm_head(found.joint).mean(1).softmax(1)[:, 1]
    torch.testing.assert_close(match[::2], matcher.match(pictures, texts)[::2])
    with pytest.raises(UserError, match="give as many texts as pictures"):
        matcher.features(pictures, texts[:2])


def test_features_of_a_stage_2_run(home: Home, captioner: Captioner) -> None:  # noqa: F811
    pictures = [home.root / "gone.png", home.picture(0), home.picture(1)]
    found = captioner.features(pictures)
    assert [list(one.shape) for one in found if one is not None] == [[3, 5, 30], [3, 5, 20]]
    assert found.queries[0].isnan().all()
    torch.testing.assert_close(found.projected[1:], captioner.soft_prompt(pictures[1:]))
    with pytest.raises(UserError, match="cannot read questions"):
        captioner.features(pictures, ["what"] * 3)


# --- alone and in a batch


def different(captioner: Captioner, folder: Path, count: int, sizes: tuple[int, ...], how: Decoding) -> int:
    """Returns the number of pictures whose caption depends on the batch size."""
    pictures = []
    for n in range(count):
        noise = torch.randint(256, (16, 20, 3), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{n}.png")
        pictures.append(folder / f"{n}.png")
    texts = [captioner.generate(pictures, [""] * count, how, at_once=size) for size in sizes]
    assert len(set(texts[0])) > count // 20, "the captions are too much alike to tell anything"
    return sum(len(set(own)) > 1 for own in zip(*texts, strict=True))


@pytest.mark.parametrize("how", [Decoding(max_new_tokens=8), Decoding(8, beams=1, sample=True, seed=0)])
def test_captions_alone_are_captions_in_a_batch(captioner: Captioner, tmp_path: Path, how: Decoding) -> None:
    assert different(captioner, tmp_path, 40, (1, 7, 32), how) == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", [Decoding(), SAMPLED])
def test_500_captions_alone_are_captions_in_a_batch(captioner: Captioner, tmp_path: Path, how: Decoding) -> None:
    assert different(captioner, tmp_path, 500, (1, 8, 32), how) == 0


def test_a_score_to_explain_needs_a_text_and_a_stage_1_run(home: Home, tmp_path: Path) -> None:  # noqa: F811
    for run, more in ((home.stage1, ()), (home.stage2, ("--text", "a dog"))):
        said = call("attend", run, home.picture(), "--by", "itm", "--out", tmp_path / "maps", *more)
        assert said == (2, "", "openblip2: --by itm needs a stage-1 run and --text: leave it out\n")
        assert not (tmp_path / "maps").exists()
