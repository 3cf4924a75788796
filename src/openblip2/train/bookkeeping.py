"""Records what a run is trained on and what it leaves out: pictures, the ends of long texts, and steps.

RUN/trained_on.txt    a digest of each training picture, so that an evaluation can detect pictures that were trained on,
                      also copies under another name. A run on shards has no such file: RUN/shards.json names the
                      shards, and it is not known whether a picture is in them
RUN/skipped.jsonl     one line for each sample that cannot be used, and for each text that is cut or unknown
RUN/skipped-3.jsonl   the same for process 3 during training
RUN/bad_batch.json    the samples of the last step, if too many steps in a row were not finite
"""

import hashlib
import json
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
_HEAD = 64 * 2**10  # bytes of an image that are read; together with its size they identify it
SHOWN = 20  # lines that are shown; after these, only every thousandth line is shown


def picture_digest(image: Path) -> str | None:
    """16 hexadecimal digits from an image's size and first 64 KiB; None if it cannot be read."""
    try:
        with image.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return hashlib.blake2b(b"%d " % size + file.read(_HEAD), digest_size=8).hexdigest()
    except OSError:
        return None  # training has already reported this picture


def data_digest(*parts: Sequence[Record]) -> str:
    """The number of images that a run is trained and validated on, and a digest of their ids and texts, in order.

    Held-out images and batches are drawn by position, so one image more or less changes all of them.
    """
    rows = [[(r.id, r.captions, [(q.text, q.given) for q in r.questions]) for r in records] for records in parts]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return f"{sum(map(len, parts)):,} pictures, digest {digest[:16]}"


def write_trained_on(records: Sequence[Record] | None, run: Path) -> None:
    """Writes `RUN/trained_on.txt` atomically, or deletes it for a run on shards (None)."""
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
    """Called with a line for each thing that is left out. The first process writes while all read the same data.

    Attributes:
        count: Number of lines so far.
    """

    def __init__(self, run: Path, progress: Progress) -> None:
        self.run, self.progress, self.count = run, progress, 0
        run.mkdir(parents=True, exist_ok=True)
        self._log = Log(run / "skipped.jsonl", writes=is_first())
        # An earlier start may have had more processes than this one, so its files are removed.
        for older in run.glob("skipped-*.jsonl") if is_first() else ():
            older.unlink()

    def __call__(self, *lines: str) -> None:
        for line in lines:
            self.count += 1
            self._log.write({"skipped": line})
            if self.count <= SHOWN or self.count % 1000 == 0:
                self.progress.say(f"skipped ({self.count} so far): {line}")

    def in_training(self, line: str) -> None:
        """The same during training, when each process reads its own samples: process 3 writes `RUN/skipped-3.jsonl`."""
        # Two processes that append to one file would mix their lines on a network disk.
        if not self._log.writes:
            self._log = Log(self.run / f"skipped-{rank()}.jsonl")
        self(line)


def name_unknown_texts(tokenizer: Any, texts: Sequence[tuple[str, str]], run: Path, progress: Progress) -> None:
    """Counts and lists the texts that a tokenizer turns into unknown tokens only. `texts`: (picture id, text)."""
    unknown = [texts[n] for n in only_unknown(tokenizer, [text for _, text in texts])]
    share = f"of {len(texts):,} ({100 * len(unknown) / max(1, len(texts)):.1f} %) became only {tokenizer.unk_token}"
    _name("unknown", unknown, f"{share}, because the tokenizer knows none of the words", run, progress)


def name_long_texts(tokens: BertTokens, texts: Sequence[tuple[str, str]], run: Path, progress: Progress) -> None:
    """Counts and lists the texts that are cut at the token limit, as in the paper, and the unknown ones."""
    long = [texts[n] for n in tokens.too_long([text for _, text in texts])]
    _name("cut", long, f"had to be cut at {tokens.longest} tokens (data.max_tokens)", run, progress)
    name_unknown_texts(tokens.tokenizer, texts, run, progress)


def name_wordy_texts(records: Sequence[Record], run: Path, progress: Progress) -> None:
    """Counts and lists the texts that `prepare.cleaned` cuts."""
    # Cleaned without a limit first, because cleaning changes the number of words.
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
    progress.say(f"{what}; the first belongs to {texts[0][0]}; all are in {run / 'skipped.jsonl'}")


# Steps whose losses or gradients are not finite are left out and counted. One bad batch (a picture of one colour, a
# caption of one letter, an overflow) must not end a run of days, and skipping its step keeps the weights good. Many
# bad steps in a row mean that the weights or the data are bad, so they end the run.


class RecordingBatches:
    """Wraps `batches(number)` and remembers the samples of the last `count` batches, to report them if they are bad."""

    def __init__(self, batches: Callable[[int], PairBatch], count: int) -> None:
        self.batches = batches
        self.last: deque[tuple[int, PairBatch]] = deque(maxlen=count)

    def __call__(self, number: int) -> PairBatch:
        batch = self.batches(number)
        # Without the tensors, because they would keep whole batches in memory.
        self.last.append((number, replace(batch, features=None, images=None)))
        return batch

    def samples(self) -> list[dict[str, Any]]:
        """The batch number, process, id and caption of each sample in the last batches."""
        return [
            {"batch": number, "process": rank(), "sample": name, "caption": caption}
            for number, batch in self.last
            for name, caption in zip(batch.names or [None] * len(batch.captions), batch.captions, strict=True)
        ]


def give_up(run: Path, done: Done, broken: Mapping[str, str], samples: list[dict[str, Any]]) -> None:
    """Ends a run after its last bad step.

    Args:
        broken: What was not finite, by name: `{"itm": "itm = nan"}`.
        samples: The last step's samples of all processes, which are written to `RUN/bad_batch.json`.

    Raises:
        UserError: Always.
    """
    if is_first():
        row = {"step": done.step, "bad": list(broken.values()), "bad_in_a_row": done.bad_in_a_row, "samples": samples}
        write_json(row, run / "bad_batch.json")
    raise UserError(
        f"step {done.step}: {', '.join(broken.values())}; such steps are left "
        f"out, but this is number {done.bad_in_a_row} in a row (train.most_bad_steps): look at the samples in "
        f"{run / 'bad_batch.json'}, or try a smaller optim.lr, optim.clip=1.0 or train.precision=fp32"
    )
