"""Loading, saving and publishing of trained models: `from_pretrained`, `save_pretrained`, `push_to_hub`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from openblip2 import hardware
from openblip2.config import RunSettings, change
from openblip2.data.images import Picture
from openblip2.data.text import BertTokens
from openblip2.errors import UserError, one_line
from openblip2.evaluate.validation import effective_rank
from openblip2.hardware import computing
from openblip2.inference.inputs import clean_questions, each_readable, features_of, stacked
from openblip2.model.language import LanguageModel
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.train.parameters import saved_parameters
from openblip2.weights.assemble import assemble, find_tokenizer, read_checkpoint
from openblip2.weights.checkpoint import Checkpoint, Parts, carried
from openblip2.weights.run import fresh_folder, write_card, write_run

# Takes features `[<= GROUP, P, V]` and the numbers of their pictures, and returns a row for each picture.
Compute = Callable[[Tensor, Sequence[int]], Tensor]
K = TypeVar("K", bound="Pretrained")


class QueryFeatures(NamedTuple):
    """Query outputs for N pictures: see `Matcher.features` and `Captioner.features`."""

    queries: Tensor
    projected: Tensor
    joint: Tensor | None = None


def read_trained(
    kinds: Sequence[type[K]],
    source: str | Path,
    device: str | None,
    precision: str | None = None,
    revision: str | None = None,
    language_dtype: str | None = None,
    visual_tokens: int | None = None,
    **parts: Any,
) -> K:
    """Loads a model of one of these classes from any source, as `inference.load`; `parts` are the fields of `Parts`."""
    checkpoint = read_checkpoint(source, Parts(**parts), revision)
    if language_dtype is not None:
        if checkpoint.settings.stage == "stage1" or isinstance(checkpoint.parts.language, LanguageModel):
            raise UserError("language_dtype has no effect, because no language model is loaded here: leave it out")
        settings = change(checkpoint.settings, {"language.dtype": language_dtype})
        checkpoint = replace(checkpoint, settings=settings)
    where = torch.device(device) if device else hardware.device()
    model, settings = assemble(checkpoint, where, precision or checkpoint.settings.train.precision)
    if visual_tokens is not None:
        if not isinstance(model, Stage2):
            raise UserError("visual_tokens is for a captioner, but this is a matcher: leave it out")
        if not 1 <= visual_tokens <= model.connector.tokens:
            raise UserError(f"visual_tokens {visual_tokens}: for this model, give 1 to {model.connector.tokens}")
        model.first = visual_tokens
    most = settings.data.max_tokens, model.connector.sizes.get("positions")
    tokens = BertTokens(find_tokenizer(checkpoint), *most) if settings.reads_text else None
    for kind in kinds:
        if isinstance(model, kind.model_class):
            return kind(model, settings, carried(checkpoint), checkpoint.measured, tokens)
    found = "Captioner" if isinstance(model, Stage2) else "Matcher"
    raise UserError(f"{source} is a {found}, not a {kinds[0].__name__}: use openblip2.load, which accepts both")


class Pretrained(ABC):
    """Base class of `Captioner` and `Matcher`: loading, saving, publishing, and the effective rank.

    Args:
        carries: frozen parts ("vision", "language") that cannot be loaded by name, so saving must include them.
        measured: results of the last validation, for the model card.
        tokens: the connector's tokenizer, if the connector reads text: in stage 1, or in stage 2 if it reads questions
            (fine-tuned for VQA) or prompts (InstructBLIP).
    """

    model_class: ClassVar[type[Stage1 | Stage2]]

    def __init__(
        self,
        model: Stage1 | Stage2,
        settings: RunSettings,
        carries: frozenset[str] = frozenset(),
        measured: Mapping[str, Any] | None = None,
        tokens: BertTokens | None = None,
    ) -> None:
        self.model, self.settings, self.carries, self.measured = model, settings, carries, measured or {}
        self.tokens = tokens

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | None = None, **options: Any) -> Self:
        """Loads a model of this class. The arguments are those of `openblip2.load`.

        Raises:
            UserError: as for `load`; or the source is the other kind of model.
        """
        return read_trained((cls,), source, device, **options)

    def effective_rank(self, images: Sequence[Picture], questions: Sequence[str] | None = None) -> float:
        """The effective number of directions that a picture's query outputs span, 1 to `min(Q, D)`; mean over pictures.

        Near 1, all queries of a picture have almost the same output. See `evaluate.validation.effective_rank`.

        Args:
            images: at least two. More are better, because each query's mean over them is subtracted first.
            questions: one for each picture, if the connector reads questions.

        Raises:
            UserError: there are fewer than two pictures, one cannot be opened, or the questions do not fit.
        """
        if len(images) < 2:
            raise UserError(f"effective rank compares pictures: give at least two, not {len(images)}")
        asked = None if questions is None else clean_questions(questions, self.settings.reads_prompts)
        return effective_rank(self._computed(images, range(len(images)), self._query_output(len(images), asked)))

    @abstractmethod
    def _query_output(self, count: int, questions: Sequence[str] | None) -> Compute:
        """Computes the query outputs of `count` pictures, `[<= GROUP, Q, D]`."""

    def _computed(self, images: Sequence[Picture], numbers: Sequence[int], compute: Compute) -> Tensor:
        """The rows of all pictures, on the CPU; `numbers` are those of the pictures, for `compute`."""
        found, done = [], 0
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            for part in features_of(self.model, images):
                found.append(compute(part, list(numbers[done : done + len(part)])).float().cpu())
                done += len(part)
        return torch.cat(found)

    def _rows(self, images: Sequence[Picture], compute: Compute, *shape: int) -> Tensor:
        """A row of `shape` for each picture, on the CPU; NaN, with a warning, for a picture that cannot be opened."""
        return stacked(each_readable(images, lambda some, numbers: self._computed(some, numbers, compute)), *shape)

    def save_pretrained(self, folder: str | Path, merge: bool = False) -> None:
        """Writes an openblip2 run with a model card: the trained parts, and the names of the frozen parts.

        Args:
            folder: a folder that does not exist yet.
            merge: also write the frozen parts. They are written in the precision in which they were loaded; `convert`
                copies them unchanged from their files.

        Raises:
            UserError: the folder already exists, or a quantised language model would have to be written.
        """
        self._save(Path(folder), Path(folder).name, {"vision", "language"} if merge else set())

    def push_to_hub(self, repo: str, private: bool = False, token: str | None = None, merge: bool = False) -> str:
        """Publishes the output of `save_pretrained` as a repository on the Hugging Face Hub; returns its address.

        Frozen parts that were loaded from a local folder are included.

        Raises:
            UserError: as for `save_pretrained`; or the upload fails.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        parts = {"vision", "language"}
        here = {part for part in parts if merge or Path(getattr(self.settings, part).name).exists()}
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            self._save(folder, repo, here)
            try:
                hub = HfApi(token=token)
                address = str(hub.create_repo(repo, private=private, exist_ok=True))
                hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="openblip2 run")
            except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
                raise UserError(f"{repo} cannot be published: {one_line(error)}") from error
        return address

    def _save(self, folder: Path, name: str, parts: set[str]) -> None:
        """Writes a run with its card, which names it `name`; it contains these frozen `parts`, too."""
        model, settings = self.model, self.settings
        language = model.language if isinstance(model, Stage2) else None
        carries = (self.carries | parts) - ({"language"} if language is None else set())
        if "language" in carries and settings.language.dtype in ("int8", "int4"):
            raise UserError(
                f"a language model in {settings.language.dtype} cannot be written: load with language.dtype=auto"
            )
        assert model.vision is not None
        trained, whitening = saved_parameters(model), model.vision.whitening
        checkpoint = Checkpoint(
            name, settings, model.connector.sizes, trained, whitening=whitening, carries=carries, measured=self.measured
        )
        with fresh_folder(folder) as draft:
            tokenizer = None if self.tokens is None else self.tokens.tokenizer
            write_run(checkpoint, draft, model.vision, language, tokenizer)
            write_card(checkpoint, name, draft)
