"""Records what a run does, what it is trained on and what it leaves out: pictures and the ends of long texts.

RUN/log.jsonl         one JSON object per line for each event; optionally sent to an experiment tracker, too
RUN/trained_on.txt    a digest of each training picture, so that an evaluation can detect pictures that were trained on,
                      also copies under another name. A run on shards has no such file: RUN/shards.json names the
                      shards, and it is not known whether a picture is in them
RUN/skipped.jsonl     one line for each sample that cannot be used, and for each text that is cut or unknown
RUN/skipped-3.jsonl   the same for process 3 during training
"""

import hashlib
import importlib
import json
import os
import sys
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
from openblip2.errors import UserError, number_of, one_line
from openblip2.progress import Progress
from openblip2.runs import write_text

TRAINED_ON = "trained_on.txt"
_HEAD = 64 * 2**10  # bytes of an image that are read; together with its size they identify it
SHOWN = 20  # lines that are shown; after these, only every thousandth line is shown


class Log:
    """A log to which rows are appended during a run. A resumed run removes the rows after its checkpoint's step.

    Args:
        keep_steps: Keep the existing rows up to this step; None = start a new log.
        writes: False for processes that only read the log, because one process of a run writes it.
        track: Called with each row that is written.
    """

    def __init__(
        self,
        path: Path,
        keep_steps: int | None = None,
        writes: bool = True,
        track: Callable[[Mapping[str, Any]], object] = lambda row: None,
    ) -> None:
        self.path, self.writes, self.track = path, writes, track
        self.torn = 0  # number of dropped lines that were not JSON; a process that is killed may leave half a line
        rows = []
        if keep_steps is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                row = _row(line)
                # Steps after the checkpoint are repeated, so their old rows would be duplicates.
                if row is None:
                    self.torn += 1
                elif row.get("step", 0) <= keep_steps:
                    rows.append(row)
        self.validated = {row["step"] for row in rows if "validation" in row}  # steps
        # Rewritten even if no row is dropped, because an incomplete last line would corrupt the next row.
        if writes:
            write_text("".join(json.dumps(row) + "\n" for row in rows), path)

    def write(self, row: dict[str, Any]) -> None:
        # Opened for each row, so that another program can read all rows at any time.
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.track(row)

    def rows(self) -> list[dict[str, Any]]:
        """All rows that are in the file now."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, which must have a step. The run may be training, so an incomplete last line is ignored."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give a run that has begun") from error
    rows: list[dict[str, Any]] = []
    for n, line in enumerate(lines):
        row = _row(line)
        if row and isinstance(row.get("step"), int):
            rows.append(row)
        elif n < len(lines) - 1:  # the last line may be incomplete
            raise UserError(f"{path}: line {n + 1} is not a row of a log: give a run that `openblip2 train` wrote")
    if not rows:
        raise UserError(f"{path}: has no step yet: try again later")
    return rows


def _row(line: str) -> dict[str, Any] | None:
    """A line as a JSON object; None if it is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def open_tracker(kind: str, run: Path, settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    """Returns a function that sends a row of the log to an experiment tracker.

    Args:
        kind: A value of `train.track`; "" = none.
        settings: The settings of the run, for trackers that display them.

    Raises:
        UserError: The tracker is not installed, or it cannot start, for example because nobody is logged in.
    """
    if not kind:
        return lambda row: None
    terminal = sys.stdin
    try:
        sys.stdin = open(os.devnull)  # noqa: SIM115  (wandb asks for a key where there is a terminal; jobs would wait)
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run / "tensorboard"))

            def write(row: Mapping[str, Any]) -> None:
                for name, value in numbers(row).items():
                    writer.add_scalar(name, value, row["step"])
                writer.flush()  # so that a killed run keeps its curves

            return write
        module = importlib.import_module(kind)
        # With the same id, a resumed run continues in the same chart; trackio goes by the name.
        only_wandb = {"dir": str(run), "id": run.name} if kind == "wandb" else {}
        module.init(project="openblip2", name=run.name, resume="allow", config=dict(settings), **only_wandb)
    except ImportError as error:
        raise UserError(f"train.track={kind}: pip install {kind} ({error.name} is missing)") from error
    except Exception as error:  # each tracker raises errors of its own types
        help_ = "run `wandb login`, or set WANDB_MODE=offline" if kind == "wandb" else "choose another train.track"
        raise UserError(f"train.track={kind}: {kind} does not start ({one_line(error)}): {help_}") from error
    finally:
        sys.stdin.close()
        sys.stdin = terminal
    return lambda row: module.log(numbers(row), step=row["step"])


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by name: "training/itc", "held out/tr@1"."""
    held_out = row.get("validation", {})
    return {f"training/{name}": value for name, value in row.items() if _is_number(value) and name != "step"} | {
        f"held out/{name}": value for name, value in held_out.items() if _is_number(value)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)  # in Python, True is an int


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
    """Called with a line for each thing that is left out. The first process writes while all read the same data."""

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
