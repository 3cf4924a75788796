"""What a run is trained on and what it leaves out, counted and named: pictures, ends of texts, and steps.

RUN/trained_on.txt    a digest of each training picture, so that a score on it is not mistaken for one on an unseen
                      picture; a copy under another name is recognised. A run on shards has none: RUN/shards.json
                      names the shards, and whether a picture is in them is not known
RUN/skipped.jsonl     one line for each sample that cannot be used, and for each text that is cut or unknown
RUN/skipped-3.jsonl   the same of process 3, in training
RUN/bad_batch.json    the samples of the last step, where too many steps in a row were not finite
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from openblip2.data.batches import PairBatch
from openblip2.data.records import Record
from openblip2.data.text import MAX_CHARACTERS, MAX_WORDS, BertTokens, clean_caption, clean_question, only_unknown
from openblip2.data.web.mixture import FILE as SHARDS
from openblip2.distributed.collectives import is_first, rank
from openblip2.errors import UserError, number_of
from openblip2.progress import Progress
from openblip2.runs import write_json, write_text
from openblip2.train.log import Log
from openblip2.train.resume import Done

TRAINED_ON = "trained_on.txt"
_HEAD = 64 * 2**10  # bytes that are read; together with the size they identify an image
SHOWN = 20  # lines that are shown; of the later ones every thousandth


def picture_digest(image: Path) -> str | None:
    """16 hexadecimal digits from an image's size and first 64 KiB; None if it cannot be read."""
    try:
        with image.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return hashlib.blake2b(b"%d " % size + file.read(_HEAD), digest_size=8).hexdigest()
    except OSError:
        return None  # which training has reported


def data_digest(*parts: Sequence[Record]) -> str:
    """The number of images that a run is trained and validated on, and a digest of their ids and texts, in order.

    Held-out images and batches are drawn by number, so one image more or less changes all of them.
    """
    rows = [[(r.id, r.captions, [(q.text, q.given) for q in r.questions]) for r in records] for records in parts]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return f"{sum(map(len, parts)):,} pictures, digest {digest[:16]}"


def write_trained_on(records: Sequence[Record] | None, run: Path) -> None:
    """Writes `RUN/trained_on.txt` in one step, or deletes it for a run on shards (None)."""
    if records is None:
        (run / TRAINED_ON).unlink(missing_ok=True)
        return
    (run / SHARDS).unlink(missing_ok=True)
    digests = sorted({digest for record in records if (digest := picture_digest(record.image))})
    write_text("".join(digest + "\n" for digest in digests), run / TRAINED_ON)


def pictures_trained_on(records: Sequence[Record], runs: Sequence[Path]) -> list[Record] | None:
    """The records with images that one of the runs was trained on.

    None if this is not known: no run has a list, or no image is in a list and a run was trained on shards.
    """
    files = [run / TRAINED_ON for run in runs if (run / TRAINED_ON).is_file()]
    if not files:
        return None
    known = {line for file in files for line in file.read_text(encoding="ascii").split()}
    found = [record for record in records if picture_digest(record.image) in known]
    return found or (None if any((run / SHARDS).is_file() for run in runs) else found)


class Skipped:
    """Called with a line for each thing left out, while all processes read the same: the first one writes.

    Attributes:
        count: Lines so far.
    """

    def __init__(self, run: Path, progress: Progress) -> None:
        self.run, self.progress, self.count = run, progress, 0
        run.mkdir(parents=True, exist_ok=True)
        self._log = Log(run / "skipped.jsonl", writes=is_first())
        # An earlier start may have had more processes than this one.
        for older in run.glob("skipped-*.jsonl") if is_first() else ():
            older.unlink()

    def __call__(self, *lines: str) -> None:
        for line in lines:
            self.count += 1
            self._log.write({"skipped": line})
            if self.count <= SHOWN or self.count % 1000 == 0:
                self.progress.say(f"skipped ({self.count} so far): {line}")

    def in_training(self, line: str) -> None:
        """The same, where each process reads what no other does: process 3 writes `RUN/skipped-3.jsonl`."""
        # Two processes that append to one file would mix their lines on a network disk.
        if not self._log.writes:
            self._log = Log(self.run / f"skipped-{rank()}.jsonl")
        self(line)


def name_unknown_texts(tokenizer: Any, texts: Sequence[tuple[str, str]], run: Path, progress: Progress) -> None:
    """Counts and names the texts of which a tokenizer leaves nothing; (id of a picture, text)."""
    unknown = [texts[n] for n in only_unknown(tokenizer, [text for _, text in texts])]
    share = f"of {len(texts):,} ({100 * len(unknown) / max(1, len(texts)):.1f} %) became only {tokenizer.unk_token}"
    _name("unknown", unknown, f"{share}, because the tokenizer knows none of the words", run, progress)


def name_long_texts(tokens: BertTokens, texts: Sequence[tuple[str, str]], run: Path, progress: Progress) -> None:
    """Counts and names the texts that are cut at the token limit, as the paper cuts them, and the unknown ones."""
    long = [texts[n] for n in tokens.too_long([text for _, text in texts])]
    _name("cut", long, f"had to be cut at {tokens.longest} tokens (data.max_tokens)", run, progress)
    name_unknown_texts(tokens.tokenizer, texts, run, progress)


def name_wordy_texts(records: Sequence[Record], run: Path, progress: Progress) -> None:
    """Counts and names the texts of which `prepare.cleaned` leaves the beginning."""
    # Cleaned without a limit, because cleaning changes how many words there are.
    texts = [(r.id, clean_caption(text, len(text)), text) for r in records for text in r.captions]
    texts += [(r.id, clean_question(q.text, len(q.text)), q.text) for r in records for q in r.questions]
    long = [(picture, text) for picture, whole, text in texts if clean_caption(whole) != whole]
    what = f"had to be cut at {MAX_WORDS} words or {MAX_CHARACTERS:,} characters"
    _name("cut", long, what, run, progress)


def _name(key: str, texts: Sequence[tuple[str, str]], what: str, run: Path, progress: Progress) -> None:
    if not texts or not is_first():
        return
    with (run / "skipped.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({key: f"{picture}: {text}"}) + "\n" for picture, text in texts)
    what = f"{number_of(len(texts), 'text')} {what}"
    progress.say(f"{what}; the first is of {texts[0][0]}; all are in {run / 'skipped.jsonl'}")


# Steps whose losses or gradients are not finite are left out and counted. One bad batch (a picture of one colour, a
# caption of one letter, an overflow) must not cost a run of days: without its step the weights stay good. Many bad
# steps in a row mean that the weights or the data are bad, and end the run.


class RecordingBatches:
    """`batches(number)`, with the names of what was in the last `count` of them, for the case that they are bad."""

    def __init__(self, batches: Callable[[int], PairBatch], count: int) -> None:
        self.batches = batches
        self.last: deque[tuple[int, PairBatch]] = deque(maxlen=count)

    def __call__(self, number: int) -> PairBatch:
        batch = self.batches(number)
        # Without the tensors, which would keep the memory of whole batches.
        self.last.append((number, replace(batch, features=None, images=None)))
        return batch

    def samples(self) -> list[dict[str, Any]]:
        """Of each sample of the last batches: the number of its batch, its id, its caption."""
        return [
            {"batch": number, "process": rank(), "sample": name, "caption": caption}
            for number, batch in self.last
            for name, caption in zip(batch.names or [None] * len(batch.captions), batch.captions, strict=True)
        ]


def not_finite(values: Mapping[str, float]) -> dict[str, str]:
    """Those of the values that are NaN or infinite, in words: `{"itm": "itm = nan"}`."""
    return {name: f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)}


def count_step(done: Done, batches: int, bad: bool) -> Done:
    """How far a run is after one more step, of so many batches."""
    in_a_row = done.bad_in_a_row + 1 if bad else 0
    counts = {"step": done.step + 1, "batches": done.batches + batches, "bad_steps": done.bad_steps + bad}
    return replace(done, **counts, bad_in_a_row=in_a_row)


def give_up(run: Path, done: Done, broken: Mapping[str, str], samples: list[dict[str, Any]]) -> None:
    """Ends a run after its last bad step.

    Raises:
        UserError: Always; the last step's samples, of all processes, are then in `RUN/bad_batch.json`.
    """
    if is_first():
        row = {"step": done.step, "bad": list(broken.values()), "bad_in_a_row": done.bad_in_a_row, "samples": samples}
        write_json(row, run / "bad_batch.json")
    raise UserError(
        f"step {done.step}: {', '.join(broken.values())}; such steps change "
        f"nothing, but this is number {done.bad_in_a_row} in a row (train.most_bad_steps): look at the samples in "
        f"{run / 'bad_batch.json'}, or try a smaller optim.lr, optim.clip=1.0 or train.precision=fp32"
    )
