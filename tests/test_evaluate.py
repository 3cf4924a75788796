"""`openblip2 evaluate`: scores and their protocol, computed by the code that a user runs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny
import tiny_runs
from openblip2.data.records import Record, read_records
from openblip2.data.sources import read_source
from openblip2.errors import UserError
from openblip2.evaluate.ranking import best_images, best_texts, match_candidates, recalls, rerank
from openblip2.evaluate.result import Options, Result, compare, mean_interval
from openblip2.evaluate.run import evaluate, overlap, weights_digest
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.model.objectives import similarity
from openblip2.model.stage1 import Stage1
from openblip2.progress import Progress
from openblip2.train.bookkeeping import picture_digest, pictures_trained_on, write_trained_on
from openblip2.train.encode import write_features
from openblip2.train.recipes import train_stage
from test_fine_tuning import recipe, tuning


def quiet() -> Progress:
    return Progress(quiet=True)


def test_rankings_are_those_of_the_whole_matrix() -> None:
    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(150, 3, 5), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(170, 5), dim=-1)
    scores = similarity(images, texts)
    for ranking, whole in ((best_texts(images, texts, 7), scores), (best_images(images, texts, 9), scores.T)):
        top = whole.topk(ranking.indices.shape[1], dim=1)
        assert torch.equal(ranking.indices, top.indices)
        assert torch.allclose(ranking.scores, top.values)
    again = best_texts(images, texts, 7)
    turned = again.by(-again.scores)
    assert torch.equal(turned.indices, again.indices.flip(1))


def stage1() -> Stage1:
    torch.manual_seed(1)
    return tiny.redraw(Stage1(tiny.qformer(), None, tiny.E)).eval()


def test_candidates_have_the_scores_of_their_pairs_and_each_picture_is_asked_once() -> None:
    model = stage1()
    features = torch.randn(4, tiny.P, tiny.V)
    tokens = torch.randint(1, tiny.WORDS, (6, 5))
    valid = torch.ones(6, 5, dtype=torch.bool)
    valid[2, 3:] = valid[4, 2:] = False
    with torch.no_grad():
        scores = torch.rand(4, 6)
        by_image = best_texts(torch.eye(4)[:, None], scores.T, 2)
        by_text = best_images(torch.eye(4)[:, None], scores.T, 3)
        assert torch.equal(by_image.indices, scores.topk(2, dim=1).indices)
        asked: list[int] = []

        def look(n: int) -> Tensor:
            asked.append(n)
            return features[n : n + 1]

        of_images, of_texts = match_candidates(model, look, tokens, valid, by_image, by_text)
        assert asked == [0, 1, 2, 3]
        for n in range(4):
            for m in range(6):
                length = int(valid[m].sum())
                memory = model.qformer.encode_image(features[n : n + 1])
                alone = model.match(memory, tokens[m : m + 1, :length], valid[m : m + 1, :length])[0]
                for place in (by_image.indices[n] == m).nonzero().flatten().tolist():
                    assert torch.allclose(of_images[n, place], alone, atol=1e-5)
                for place in (by_text.indices[m] == n).nonzero().flatten().tolist():
                    assert torch.allclose(of_texts[m, place], alone, atol=1e-5)
        # The recall equals that of the dense computation.
        dense_image, dense_text = rerank(model, features, tokens, valid, scores, 2)
        correct = torch.zeros(4, 6, dtype=torch.bool)
        correct[torch.tensor([0, 1, 2, 3, 0, 1]), torch.arange(6)] = True
        found = recalls(dense_image, dense_text, correct, ks=(1,))
        few = best_images(torch.eye(4)[:, None], scores.T, 2)
        of_images, of_texts = match_candidates(model, look, tokens, valid, by_image, few)
        for ranking, logits, is_right, name in (
            (by_image, of_images, lambda n, m: bool(correct[n, m]), "tr@1"),
            (few, of_texts, lambda m, n: bool(correct[n, m]), "ir@1"),
        ):
            ranks = ranking.by(logits[..., 1] - logits[..., 0]).first_right(is_right)
            assert np.mean([rank == 1 for rank in ranks]) == pytest.approx(found[name])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, pictures with captions and questions, runs of both stages and of all three tasks."""
    root = tmp_path_factory.mktemp("evaluation")
    tiny_runs.home(root, count=24)
    rows = [json.loads(line) for line in (root / "data" / "records.jsonl").read_text().splitlines()]
    for row in rows:
        colour = row["caption"].split()[1]
        row["questions"] = [
            {"text": "what colour is it?", "answer": colour, "kind": "open"},
            {"text": "is it a dog?", "answer": "no", "kind": "yes/no"},
        ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "data" / "records.jsonl").write_text(text)
    (root / "data" / "some.jsonl").write_text("".join(text.splitlines(keepends=True)[:10]))
    records, _ = read_records(root / "data")
    train_stage(recipe(root, "stage1", warm_start="false"), records[:12], root / "one", quiet())
    two = recipe(root, "stage2", start=str(root / "one"), warm_start="false")
    train_stage(two, records[:12], root / "two", quiet())
    train_stage(tuning(root, "vqa", "two"), records[:12], root / "vqa", quiet())
    return root


def scored(
    home: Path, task: str, run: str, tmp_path: Path, **options: Any
) -> tuple[dict[str, Any], list[dict], Result]:
    source = read_source(str(home / "data"), "questions" if task == "vqa" else "captions")
    result = evaluate(task, str(home / run), source, tmp_path / "out" / "found.json", Options(**options), quiet())
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    samples = [json.loads(line) for line in (tmp_path / "out" / found["samples"]).read_text().splitlines()]
    return found, samples, result


def test_answers_and_their_protocol(home: Path, tmp_path: Path) -> None:
    found, samples, _ = scored(home, "vqa", "vqa", tmp_path, beams=1)
    assert len(samples) == 48
    scores = [row["score"] for row in samples]
    assert found["scores"]["accuracy"]["score"] == pytest.approx(np.mean(scores))
    assert found["scores"]["accuracy"]["low"] <= found["scores"]["accuracy"]["score"]
    kinds = [row["score"] for row in samples if row["kind"] == "yes/no"]
    assert found["scores"]["accuracy, yes/no"]["score"] == pytest.approx(np.mean(kinds))
    assert {row["given"][0] for row in samples if row["score"] == 1} <= {row["answer"] for row in samples}
    protocol = found["protocol"]
    assert (protocol["beams"], protocol["question_in_qformer"], protocol["zero_shot"]) == (1, True, False)
    assert protocol["prompt"] == read_prompt(home)
    assert len(protocol["checkpoint_sha256"]) == 64
    assert protocol["versions"]["torch"] == torch.__version__
    assert (protocol["most_new_tokens"], protocol["metric"].split()[0]) == (10, "exact")
    assert "not used" in protocol["generation_config"]
    again, _, _ = scored(home, "vqa", "vqa", tmp_path / "again", beams=1, seed=3)
    assert again["scores"]["accuracy"]["score"] == found["scores"]["accuracy"]["score"]
    assert again["protocol"]["seed"] == 3
    seeded = mean_interval(np.array(scores), [row["image"] for row in samples], seed=3)
    assert again["scores"]["accuracy"] == asdict(seeded)
    few, samples, _ = scored(home, "vqa", "two", tmp_path / "few", limit=3, beams=1)
    assert (few["pictures"], len(samples), few["protocol"]["zero_shot"]) == (3, 6, True)
    assert few["protocol"]["checkpoint_sha256"] != protocol["checkpoint_sha256"]


def read_prompt(home: Path) -> str:
    return json.loads((home / "vqa" / "config.json").read_text())["settings"]["language"]["question"]


def test_two_results_are_compared_sample_by_sample(home: Path, tmp_path: Path) -> None:
    pairs = [("vqa", "vqa", {"beams": 1}), ("retrieval", "one", {"rerank": 4})]
    for task, run, options in pairs:
        scored(home, task, run, tmp_path / task, **options)
        path = tmp_path / task / "out" / "found.json"
        assert {found.score for found in compare(path, path).values()} == {0.0}
    scored(home, "vqa", "two", tmp_path / "other", beams=1)
    one, other = tmp_path / "vqa" / "out", tmp_path / "other" / "out"
    scores = [json.loads((folder / "found.json").read_text())["scores"]["accuracy"]["score"] for folder in (one, other)]
    found = compare(one / "found.json", other / "found.json")
    assert found["accuracy"].score == pytest.approx(scores[0] - scores[1])
    assert set(found) == {"accuracy", "accuracy, open", "accuracy, yes/no"}
    with pytest.raises(UserError, match="of the same task"):
        compare(one / "found.json", tmp_path / "retrieval" / "out" / "found.json")
    rows = (other / "found.samples.jsonl").read_text().splitlines(keepends=True)
    (other / "found.samples.jsonl").write_text("".join(rows[1:]))
    with pytest.raises(UserError, match="have different samples"):
        compare(one / "found.json", other / "found.json")
    (other / "found.samples.jsonl").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        compare(one / "found.json", other / "found.json")


def test_two_pointing_results_are_compared_text_by_text(tmp_path: Path) -> None:
    for name, hits in (("one", (True, True, False)), ("other", (True, False, False))):
        result = Result("pointing", 2)
        asked = (("a", "a red cat"), ("a", "a blue dog"), ("b", "a red cat"))
        result.samples += [{"image": i, "text": t, "hit": hit} for (i, t), hit in zip(asked, hits, strict=True)]
        result.write(tmp_path / f"{name}.json")
    found = compare(tmp_path / "one.json", tmp_path / "other.json")
    assert {name: one.score for name, one in found.items()} == {"pointing": pytest.approx(1 / 3)}
    result.samples = [{"image": "a"}]
    result.write(tmp_path / "one.json")
    result.write(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"one.json and .*other.json have no score .* in common"):
        compare(tmp_path / "one.json", tmp_path / "other.json")


def test_pictures_of_the_training_are_warned_of(home: Path, tmp_path: Path) -> None:
    """The run got 12 of 24 pictures and held some of them out. A copy under another name is the same picture."""
    trained = (home / "two" / "trained_on.txt").read_text().split()
    found, _, result = scored(home, "vqa", "vqa", tmp_path, beams=1)
    assert found["protocol"]["pictures_of_training"] == len(trained)
    assert f"{len(trained)} of 24 pictures are among those" in result.warnings[0]
    records, _ = read_records(home / "data")
    copy = tmp_path / "copy.png"
    copy.write_bytes(next(r.image for r in records if picture_digest(r.image) in trained).read_bytes())
    other = tmp_path / "other.png"
    Image.new("RGB", (5, 5)).save(other)
    both = [Record("copy", copy, ("a",)), Record("other", other, ("b",))]
    assert overlap(both, str(home / "vqa")) == ["copy"]  # also known from the run that it started from
    assert overlap(both, "somewhere/else") is None
    write_trained_on(both, tmp_path)
    assert pictures_trained_on(both, [tmp_path]) == both


def test_captions_and_their_protocol(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    found, samples, result = scored(home, "caption", "two", tmp_path, beams=1)
    assert len(samples) == 24
    assert {"BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D"} <= found["scores"].keys()
    mean = np.mean([row["CIDEr-D"] for row in samples])
    assert found["scores"]["CIDEr-D"]["score"] == pytest.approx(mean)
    assert set(found["protocol"]["not_measured"]) == {"METEOR", "SPICE"}
    assert "PTBTokenizer" in found["protocol"]["tokeniser"]
    assert found["protocol"]["pictures_at_once"] == (32 if found["protocol"]["precision"] == "float32" else 1)
    assert any(line.startswith("CIDEr-D") for line in result.in_words())
    with pytest.raises(UserError, match="Q-Former reads"):
        scored(home, "caption", "vqa", tmp_path)


@pytest.mark.parametrize("strict", [False, True])
def test_retrieval_and_its_protocol(home: Path, tmp_path: Path, strict: bool) -> None:
    found, samples, _ = scored(home, "retrieval", "one", tmp_path, rerank=6, strict=strict)
    assert len(samples) == 48  # 24 pictures, 24 captions
    for way, rows in (("tr", samples[:24]), ("ir", samples[24:])):
        for score in ("itc", "itm", "itm+itc", "itm+itc, the authors'"):
            ranks = [row[f"{score} first right"] for row in rows]
            for at in (1, 5, 10) if score == "itc" else (1, 5):
                hits = np.mean([rank is not None and rank <= at for rank in ranks])
                assert found["scores"][f"{score} {way}@{at}"]["score"] == pytest.approx(hits)
    assert "itm tr@10" not in found["scores"]
    if strict:  # four pictures share each caption: all of them count as right unless `strict`
        loose, _, _ = scored(home, "retrieval", "one", tmp_path / "loose", rerank=0)
        for name in ("itc tr@10", "itc ir@10"):
            assert loose["scores"][name]["score"] > found["scores"][name]["score"]
    assert ("same one" in found["protocol"]["right"]) != strict
    alone, _, _ = scored(home, "retrieval", "one", tmp_path / "alone", rerank=0, strict=strict)
    assert alone["scores"]["itc tr@1"] == found["scores"]["itc tr@1"]
    assert not any(name.startswith("itm") for name in alone["scores"])


def test_a_kept_cache_gives_the_same_ranks(home: Path, tmp_path: Path) -> None:
    matcher = load(str(home / "one"))
    assert isinstance(matcher, Matcher)
    assert matcher.model.vision is not None
    records, _ = read_records(home / "data")
    with torch.inference_mode(False):
        write_features(matcher.model.vision, records, matcher.settings, tmp_path / "cache", "fp16", 1, quiet())
    found, samples, _ = scored(home, "retrieval", "one", tmp_path, rerank=6, features=tmp_path / "cache")
    fresh, again, _ = scored(home, "retrieval", "one", tmp_path / "fresh", rerank=6)
    assert samples == again
    assert str(tmp_path / "cache") in found["protocol"]["features"]
    assert fresh["protocol"]["features"] == "fp16"


def test_bad_pictures_and_entries_are_named_and_cost_their_own_score(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    tiny_runs.pictures(data, count=4)
    (data / "1.png").write_bytes(b"broken")
    with (data / "records.jsonl").open("a") as file:
        file.write('{"image": "none.png", "caption": "a cat"}\n')
    source = read_source(str(data))
    out = tmp_path / "found.json"
    result = evaluate("retrieval", str(home / "one"), source, out, Options(rerank=0), quiet())
    assert result.pictures == 3
    assert len(result.skipped) == 2
    assert any("none.png" in line for line in result.skipped)
    assert any("1.png" in line for line in result.skipped)
    assert "2 samples were left out" in result.warnings[-1]


@pytest.mark.parametrize(
    ("task", "run", "options", "message"),
    [
        ("caption", "one", {}, "needs a stage-2 run"),
        ("retrieval", "two", {}, "needs a stage-1 run"),
        ("speak", "two", {}, "must be one of caption, vqa, retrieval"),
        ("vqa", "two", {"rerank": 3}, "is for retrieval, not for vqa"),
        ("retrieval", "one", {"beams": 2}, "is for caption and vqa"),
        ("vqa", "two", {"metric": "bleu"}, "unknown metric 'bleu'"),
        ("vqa", "two", {"metric": "vqa", "beams": 1}, "has only one answer"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    home: Path, tmp_path: Path, task: str, run: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        scored(home, task, run, tmp_path, **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "found.json").exists()


def test_a_table_at_an_address_is_not_taken_for_shards() -> None:
    for address in ("https://example.org/train.csv", "https://example.org/a.jsonl?raw=1"):
        with pytest.raises(UserError, match=r"only shards \(\.tar\) are read from a URL; download") as error:
            read_source(address, shards=True)
        assert str(error.value).startswith(address)


def test_sources_are_told_apart(home: Path, tmp_path: Path) -> None:
    assert read_source(str(home / "data")).kind == "own"
    for data, split, message in (
        (str(home / "data"), "train", "--split is only for an official"),
        (str(tmp_path / "x.json"), None, "give --images"),
    ):
        with pytest.raises(UserError, match=message):
            read_source(data, "captions", split=split)


def test_of_a_withheld_split_predictions_are_made(home: Path, tmp_path: Path) -> None:
    pictures = home / "data"
    asked = {
        "data_subtype": "test-dev2015",
        "questions": [{"image_id": 3, "question_id": 9, "question": "what is it?"}],
    }
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "COCO_test2015_000000000003.jpg").write_bytes((pictures / "3.png").read_bytes())
    given = str(tmp_path / "questions.json"), "questions", tmp_path / "images"
    with pytest.raises(UserError, match="contains no questions"):
        read_source(*given)
    source = read_source(*given, withheld=True)
    result = evaluate("vqa", str(home / "vqa"), source, tmp_path / "found.json", Options(beams=1), quiet())
    assert not result.scores
    assert "no public reference answers" in " ".join(result.warnings)
    assert [(row["question_id"], row["image"]) for row in result.samples] == [("9", "3")]


def test_the_digest_is_of_the_weights_alone(home: Path) -> None:
    assert weights_digest(load(str(home / "one"))) == weights_digest(load(str(home / "one"), precision="fp32"))
