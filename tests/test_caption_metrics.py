"""Caption scores are compared with pycocoevalcap's scorers and with the formulas, and tokens with those of the jar.

The jar's answers are in tests/data/ptb_reference.json, so that most of these tests run without Java.
"""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openblip2.data.records import Record
from openblip2.errors import UserError
from openblip2.evaluate.caption import (
    BLEU,
    FAST,
    METRICS,
    Tokenised,
    add_domains,
    bleu,
    bleu_counts,
    caption_scores,
    score_captions,
    tokenise_all,
)
from openblip2.evaluate.ptb import JAR, PORT, port, tokenise, why_no_jar
from openblip2.evaluate.result import Result, interval, mean_interval

REFERENCE = json.loads((Path(__file__).parent / "data" / "ptb_reference.json").read_text())["captions"]
CAPTIONS = [
    "A man riding a wave on top of a surfboard.",
    "Two dogs can't share a (small) frisbee!",
    "",
    "...",
    "a red bus",
    "A cat sleeps on the couch, next to a remote.",
    "the the the the",
]
REFERENCES = [
    ["A surfer rides a large wave.", "A man on a surfboard riding a wave", "surfing"],
    ["two dogs fight over a frisbee", "Dogs playing"],
    ["nobody knows", "an empty caption"],
    ["", "dots"],
    ["a red bus", "a red double-decker bus on the street", ""],
    ["A cat is sleeping on a couch next to a remote control."] * 2,
    ["the man and the dog in the park"],
]
needs_java = pytest.mark.skipif(why_no_jar() is not None, reason=str(why_no_jar()))


@pytest.fixture
def scorers() -> None:
    pytest.importorskip("pycocoevalcap")


def tokens() -> Tokenised:
    return tokenise_all(CAPTIONS, REFERENCES, jar=False)


def test_the_port_cuts_as_the_jar_did() -> None:
    captions, expected = zip(*REFERENCE, strict=True)
    assert len(captions) >= 500
    wrong = [pair for pair in zip(captions, port(captions), expected, strict=True) if pair[1] != pair[2]]
    assert not wrong


@needs_java
def test_the_jar_cuts_as_it_did() -> None:
    captions, expected = zip(*REFERENCE, strict=True)
    assert tokenise(captions) == (list(expected), JAR)


@needs_java
def test_the_jar_is_called_as_the_reference_calls_it() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = ["A man's (old) hat", "", "no. 5", "U.S. flag, £5", "", "the end", ""]
    theirs = PTBTokenizer().tokenize({n: [{"caption": caption}] for n, caption in enumerate(captions)})
    assert tokenise(captions)[0] == [theirs[n][0] for n in range(len(captions))]


@pytest.mark.parametrize(
    ("caption", "cut_up"),
    [
        ("A man can't (really) fly.", "a man ca n't -lrb- really -rrb- fly"),
        ("It costs $5.00, e.g. at the U.S. store...", "it costs $ 5.00 e.g. at the u.s. store"),
        ("1 1/2 cups and/or 50%", "1\u00a01/2 cups and/or 50 %"),
        ("wow!! what? yes!", "wow !! what yes"),
        ("see http://a.bc/d?e=f", "see http://a.bc/d?e=f"),
        ("\u201cna\u00efve\u201d \u2014 caf\u00e9 \U0001f600", "na\u00efve caf\u00e9"),
        ("black-and-white rock'n'roll", "black-and-white rock 'n' roll"),
        ("\r\nfirst\u2028second\n", "first second"),
        (" \t", ""),
    ],
)
def test_tokens_of_a_caption(caption: str, cut_up: str) -> None:
    assert tokenise([caption, "next"], jar=False)[0] == [cut_up, "next"]


def test_a_caption_can_hang_on_the_next_as_in_the_jar() -> None:
    assert port(["the letter b.", "a dog", "the letter b.", "A dog"]) == [
        "the letter b.",
        "a dog",
        "the letter b",
        "a dog",
    ]


@settings(deadline=None)
@given(st.lists(st.text(max_size=40) | st.text(alphabet="ab1'\".-/(&@: \n", max_size=20), max_size=4))
def test_any_text_gives_one_line_of_clean_tokens(captions: list[str]) -> None:
    found, by = tokenise(captions, jar=False)
    assert len(found) == len(captions)
    assert by == PORT
    for line in found:
        assert line == " ".join(line.split(" ")).strip(" ")
        assert not {".", ",", "'", "''", "``", "--", "\n"} & set(line.split(" "))


def test_without_java_the_port_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert tokenise(["a cat."]) == (["a cat"], PORT)


@needs_java
def test_a_java_that_fails_is_a_user_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text(f"#!{shutil.which('sh')}\necho 'no such option' >&2\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="failed in Java: no such option"):
        tokenise(["a cat."])


@pytest.mark.usefixtures("scorers")
def test_scores_are_the_reference_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    found = caption_scores(tokens(), FAST)
    assert capsys.readouterr().out == ""
    ours = {n: [caption] for n, caption in enumerate(tokens().captions)}
    theirs = {n: list(given) for n, given in enumerate(tokens().references)}
    for name, scorer in (("ROUGE-L", Rouge()), ("CIDEr-D", Cider())):
        whole, each = scorer.compute_score(theirs, ours)
        assert found.corpus[name] == pytest.approx(whole, abs=1e-12)
        np.testing.assert_allclose(found.samples[name], each, atol=1e-12)
    whole, each = Bleu(4).compute_score(theirs, ours)
    for name, score, scores in zip(BLEU, whole, each, strict=True):
        assert found.corpus[name] == pytest.approx(score, abs=1e-12)
        np.testing.assert_allclose(found.samples[name], scores, atol=1e-12)
    assert (tokens().by, found.missing) == (PORT, {})


def grams(line: str, n: int) -> Counter[tuple[str, ...]]:
    words = line.split()
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def cider_d(tokens: Tokenised) -> list[float]:
    """The formula (Vedantam 2015, section 5): tf-idf cosines of 1- to 4-grams, clipped, with the Gaussian factor."""
    pictures = len(tokens.captions)
    frequency = Counter(
        gram
        for given in tokens.references
        for gram in {g for line in given for n in range(1, 5) for g in grams(line, n)}
    )

    def vector(line: str, n: int) -> dict[tuple[str, ...], float]:
        return {g: count * math.log(pictures / max(1, frequency[g])) for g, count in grams(line, n).items()}

    def one(caption: str, reference: str, n: int) -> float:
        ours, theirs = vector(caption, n), vector(reference, n)
        norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        # the reference measures length in pairs of words, not in words
        apart = max(0, len(caption.split()) - 1) - max(0, len(reference.split()) - 1)
        dot = sum(min(ours[g], theirs[g]) * theirs[g] for g in ours.keys() & theirs.keys())
        return math.exp(-(apart**2) / (2 * 6**2)) * dot / norms if norms else 0.0

    pairs = zip(tokens.captions, tokens.references, strict=True)
    return [10 * float(np.mean([one(ours, r, n) for r in given for n in range(1, 5)])) for ours, given in pairs]


@pytest.mark.usefixtures("scorers")
def test_cider_d_is_the_papers_formula() -> None:
    np.testing.assert_allclose(caption_scores(tokens(), ["CIDEr-D"]).samples["CIDEr-D"], cider_d(tokens()), atol=1e-9)


@pytest.mark.usefixtures("scorers")
def test_a_caption_that_is_its_reference_scores_all_there_is() -> None:
    lines = ["a red bus on a street", "two dogs share one frisbee", "the cat sleeps on the couch"]
    found = caption_scores(tokenise_all(lines, [[line] for line in lines], jar=False), FAST)
    assert found.corpus == pytest.approx({**dict.fromkeys(BLEU, 1), "ROUGE-L": 1, "CIDEr-D": 10}, abs=1e-6)


@pytest.mark.usefixtures("scorers")
@pytest.mark.parametrize(
    ("captions", "references"),
    [([""], [["a dog"]]), (["a dog"], [[""]]), (["", "."], [["", "!"], ["?"]]), (["a dog"], [["a dog", ""]])],
)
def test_nothing_said_scores_nothing_and_breaks_nothing(captions: list[str], references: list[list[str]]) -> None:
    found = caption_scores(tokenise_all(captions, references, jar=False), FAST)
    for scores in found.samples.values():
        assert scores.shape == (len(captions),)
        assert np.isfinite(scores).all()
    assert found.corpus["CIDEr-D"] == 0  # as for any single picture, whose idf is 0


@pytest.mark.usefixtures("scorers")
def test_a_domains_cider_has_the_idf_of_the_entire_set() -> None:
    domains = ["in-domain", "near-domain", "in-domain", "out-domain", "out-domain", "in-domain", "near-domain"]
    records = [Record(str(n), Path(), (), facts={"domain": domain}) for n, domain in enumerate(domains)]
    entire, result = caption_scores(tokens(), FAST), Result("caption", len(records))
    add_domains(result, records, entire.samples)
    assert list(result.scores) == ["CIDEr-D, in-domain", "CIDEr-D, near-domain", "CIDEr-D, out-domain"]
    weighted = sum(found.n * found.score for found in result.scores.values()) / len(domains)
    assert weighted == pytest.approx(entire.corpus["CIDEr-D"])
    part, places = result.scores["CIDEr-D, in-domain"], [0, 2, 5]
    alone = caption_scores(
        tokenise_all([CAPTIONS[n] for n in places], [REFERENCES[n] for n in places], jar=False), FAST
    )
    assert part.n == 3
    assert part.score == pytest.approx(entire.samples["CIDEr-D"][places].mean())
    assert part.score != pytest.approx(alone.corpus["CIDEr-D"])
    without = Result("caption", 1)
    add_domains(without, [Record("0", Path(), ())], {"CIDEr-D": np.ones(1)})
    assert without.scores == {}


@pytest.mark.usefixtures("scorers")
def test_bleu_of_sums_is_the_corpus_bleu_and_can_be_drawn() -> None:
    counts, found = bleu_counts(tokens()), caption_scores(tokens(), FAST)
    assert counts.shape == (len(CAPTIONS), 10)
    for order, name in enumerate(BLEU, start=1):
        assert bleu(counts.sum(axis=0, keepdims=True), order)[0] == pytest.approx(found.corpus[name], rel=1e-9)
    drawn = interval(counts, bleu)
    assert drawn.low <= drawn.score <= drawn.high
    assert drawn.score == pytest.approx(found.corpus["BLEU-4"], rel=1e-9)
    cider = mean_interval(found.samples["CIDEr-D"])
    assert cider.score == pytest.approx(found.corpus["CIDEr-D"])


@pytest.mark.usefixtures("scorers")
def test_what_needs_java_is_named_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = caption_scores(tokens(), METRICS)
    assert set(found.missing) == {"METEOR", "SPICE"}
    assert "java" in found.missing["METEOR"]
    assert "METEOR" not in found.corpus


@needs_java
def test_a_java_that_fails_costs_its_own_metric_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text(f"#!{shutil.which('sh')}\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = caption_scores(tokens(), ["ROUGE-L", "METEOR"])
    assert found.missing["METEOR"].startswith("METEOR failed in Java")
    assert list(found.corpus) == ["ROUGE-L"]


@needs_java
@pytest.mark.slow
def test_meteor_of_a_caption_that_is_its_reference_is_1() -> None:
    assert caption_scores(tokens(), ["METEOR"]).samples["METEOR"].shape == (len(CAPTIONS),)
    same = caption_scores(tokenise_all(["a red bus"], [["a red bus"]], jar=False), ["METEOR"])
    assert same.corpus["METEOR"] == pytest.approx(1, abs=1e-3)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is raised before a caption is generated, so the test needs no model and no pictures."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    nothing: Any = None
    with pytest.raises(UserError, match=r"needs pycocoevalcap: pip install 'openblip2\[eval\]'"):
        score_captions(nothing, [], nothing, nothing, nothing)
