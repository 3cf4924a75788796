"""Every setting of a run: frozen, typed, strict. The defaults are the paper's (sections 3.4 and appendix).

One way to change a setting, in Python or on the command line: `change(config, {"optim.lr": 2e-4})`, which is what
`--set optim.lr=2e-4` does. Modules never see these classes; the builder hands them plain arguments.
"""

import difflib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from openblip2.errors import UserError

# Settings that had another name when a run wrote its config.json: old name -> today's.
RENAMED = {
    "stage1.one_sided": "stage1.detach_gathered",
    "stage1.matching_from": "stage1.itm_start_step",
    "qformer.reads_question": "qformer.question_in_qformer",
    "qformer.lora": "qformer.lora_rank",
    "language.lora": "language.lora_rank",
    "language.weights": "language.dtype",
    "vision.weights": "vision.dtype",
}
# Settings that are gone, with the value that is the same as not having them; None: of the first weights, which a run
# that is read does not draw again.
REMOVED = {
    "qformer.cross_attention_std": None,
    "qformer.self_attention_scale": 1.0,
    "stage1.contrast": "softmax",
}

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Task = Literal["pretraining", "caption", "vqa", "instruct", "retrieval"]
Objective = Literal["itc", "itm", "itg"]
Share = Annotated[float, Field(ge=0, lt=1)]
Form = Annotated[str, Field(pattern=r"\{\}")]  # {} is the question


@dataclass(config=STRICT)
class VisionSettings:
    """The frozen image encoder (paper 3.4: ViT-L/14 of CLIP or ViT-g/14 of EVA-CLIP, second-to-last layer)."""

    name: str = "openai/clip-vit-large-patch14"  # hub name, directory, or wheel:dinov2-small
    layer: int = -2
    image_size: Count = 224
    trained: bool = False  # fine-tuning: the encoder trains too (paper 4.2 to 4.4), and the run holds its weights
    whiten: bool = False  # ours: features whitened by statistics of the training pictures (model/whitening.py)
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # of its weights and its computation; auto: by train.precision
    )


@dataclass(config=STRICT)
class QFormerSettings:
    """The Q-Former (paper 3.1); its sizes and its tokenizer are those of the BERT it starts from."""

    start: str = "google-bert/bert-base-uncased"  # any BERT-family checkpoint: hub name, directory, or wheel
    queries: Count = 32
    cross_every: Count = 2
    dropout: Share = 0.1
    # VQA (paper 4.3, figure 7): the question's tokens share the queries' self-attention, so that the queries can look
    # for what is asked. Instruct: the whole instruction's. The text path comes from stage 1.
    question_in_qformer: bool = False
    image_norm_eps: Positive = 1e-5  # of the LayerNorm on the image features; transformers' checkpoints have 1e-6
    lora_rank: Natural = 0  # ours: rank of adapters, which train instead of its own weights (model/lora.py); 0 = none


@dataclass(config=STRICT)
class ConnectorSettings:
    """The module between image encoder and language model in stage 2: the Q-Former (paper), or another connector."""

    name: str = "qformer"  # a name in CONNECTORS (model/build.py)
    # Of another connector than the Q-Former: parameters of its class, by name.
    options: dict[str, Any] = Field(default_factory=dict)


@dataclass(config=STRICT)
class Stage1Settings:
    """The objectives of stage 1 (paper 3.1)."""

    # The losses to sum: all three (paper), or fewer for an ablation (table 6 of the paper leaves out ITG).
    objectives: tuple[Objective, ...] = ("itc", "itm", "itg")
    shared_width: Count = 256
    temperature: Positive = 0.07
    label_smoothing: Share = 0.1
    detach_gathered: bool = False  # the authors' code: gathered features carry no gradient
    # Ours, 0 = the paper: weight of a fourth loss that keeps an image's queries different (model/objectives.py).
    decorrelation: NonNegative = 0.0
    itm_start_step: Natural = 0  # ours, 0 = the paper: first steps without ITM, which learns only after ITC
    # Ours, None = the paper: from this step on, half of a batch are pictures whose captions are similar to those of the
    # other half (data/samples.py). ITM has to have begun to learn before.
    similar_start_step: Natural | None = None


@dataclass(config=STRICT)
class Stage2Settings:
    """The objective of stage 2 (paper 3.2): language modelling."""

    # Ours, 0 = the paper: the language model joins after this number of steps. The steps before it only train the soft
    # prompt to be the embeddings of the caption's words (`Stage2.alignment`), which goes on as a second loss after it;
    # in the demo they take a ninth of the time of a step with the language model.
    lm_start_step: Natural = 0
    # Ours: each step trains the first n visual tokens, n drawn from 1 to all of them, so that a trained model can use
    # any number of them (Matryoshka Query Transformer, Hu et al., 2024). False = the paper: always all.
    elastic_tokens: bool = False


@dataclass(config=STRICT)
class LanguageSettings:
    """The frozen language model of stage 2 (paper 3.2) and the text around the soft prompt."""

    name: str = "facebook/opt-2.7b"  # hub name, directory, or wheel:smollm2-135m-instruct
    template: str = "{image}{bos}{prompt}"  # or "chat": the tokenizer's own chat template
    end: str | None = None  # what ends a caption; None = the tokenizer's end token
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("",)  # one is drawn for each training caption
    question: Form = "Question: {} Answer:"  # how a question is asked; {} is the question
    questions: tuple[Form, ...] = ()  # instruct: one is drawn for each question in training; () = `question`
    exact_gelu: bool = False  # T5: exact GELU instead of its tanh approximation, as the authors run FlanT5
    # Of its weights and its computation. auto: by train.precision. int8, int4: by bitsandbytes, the rest as with auto.
    dtype: Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"] = "auto"
    lora_rank: Natural = 0  # ours: rank of adapters that train (alpha = 2 x rank, no dropout; model/lora.py); 0 = none


@dataclass(config=STRICT)
class OptimSettings:
    """AdamW with linear warm-up and a cosine per step (paper 3.4)."""

    lr: Positive = 1e-4
    min_lr: NonNegative = 1e-5
    warmup: Natural = 2000  # steps
    betas: tuple[Share, Share] = (0.9, 0.98)
    weight_decay: NonNegative = 0.05
    # For a trained image encoder: its last layer learns at lr x layer_decay, and each layer below at layer_decay times
    # the rate of the layer above it (paper, table 9). 1 = the same rate for all.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip: NonNegative = 0.0  # largest gradient norm; 0 = no clipping, as in the paper


@dataclass(config=STRICT)
class TrainSettings:
    """Length of training, sizes of batches, and how often to validate and save."""

    steps: Count = 250_000
    # Pairs of one batch, over all processes: each of N takes its N-th part. Results do not depend on N.
    batch: Count = 1680
    accumulate: Count = 1  # batches to one step; ITC's negatives stay within one batch
    # Ours: pairs that go through the model at once, in each process; 0 = all. The same losses and gradients in less
    # memory. Unlike with `accumulate`, negatives come from the whole batch (model/fast/gradient_cache.py).
    chunk: Natural = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where it takes less time than fp32
    # Ours, the same results: layers of the Q-Former and of the language model are computed again in the backward pass
    # instead of being stored. Takes less memory, and a quarter to a half more time.
    checkpoint_activations: bool = False
    # Ours: torch.compile for the Q-Former's blocks. Dropout masks differ; otherwise the same up to rounding.
    compile: bool = False
    # For several processes. ddp: each holds a full copy. fsdp2: the layers of the frozen parts are sharded, for
    # language models that do not fit on one GPU (distributed/data_parallel.py).
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    validate_every: Natural = 1000  # steps; 0 = only at the end
    checkpoint_every: Natural = 1000  # steps; 0 = only when asked to stop (docs/resuming.md)
    keep_checkpoints: Count = 2  # the newest ones; older ones are deleted when a new one is complete
    # A tracker to which the rows of log.jsonl are also sent (train/log.py).
    track: Literal["", "tensorboard", "wandb", "trackio"] = ""
    most_bad_steps: Count = 5  # steps in a row with losses or gradients that are not finite, before the run stops


@dataclass(config=STRICT)
class DataSettings:
    """Pictures and captions."""

    source: str = ""  # a folder, .jsonl or .csv, or shards; `--data` sets it
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.02  # share of the images that is kept for validation
    most_held_out: Count = 500  # at most this number of images
    # Number of shards that are read at the same time, one sample from each in turn. If the number of processes divides
    # it, no shard is read by two processes (data/web/shard_order.py).
    open_shards: Count = 16
    augment: bool = True  # random crop and flip (not of texts with left or right); False: features are computed once
    negations: Annotated[float, Field(ge=0, le=1)] = 1.0  # ours, vqa: share of the questions with "not" to keep
    caption_share: Annotated[float, Field(ge=0, le=1)] = 0.5  # ours, instruct: of the samples; the rest are questions
    balance: bool = False  # ours, vqa: show each question as often with yes as with no (data/samples.py)
    features: str = ""  # ours: a cache that `openblip2 features` wrote; `--features` sets it
    max_tokens: Annotated[int, Field(ge=4)] = 32  # of the Q-Former's text; longer captions are cut, counted and named


@dataclass(config=STRICT)
class RunSettings:
    """A whole run.

    `start`: the run to start from. Stage 2 and retrieval start from a stage-1 run (without it, the paper warns,
    stage 2 can collapse), caption, vqa and instruct from a stage-2 run.
    """

    stage: Literal["stage1", "stage2"] = "stage1"
    task: Task = "pretraining"  # the others fine-tune (paper 4.2 to 4.4; instruct: InstructBLIP)
    vision: VisionSettings = VisionSettings()
    qformer: QFormerSettings = QFormerSettings()
    connector: ConnectorSettings = ConnectorSettings()
    stage1: Stage1Settings = Stage1Settings()
    stage2: Stage2Settings = Stage2Settings()
    language: LanguageSettings = LanguageSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    data: DataSettings = DataSettings()
    start: str | None = None
    text_start: str | None = None  # vqa, instruct: the stage-1 run with the text path; None = start's own start
    warm_start: bool = False  # ours: closed-form start before the first step (train/warm_start.py)

    @property
    def reads_text(self) -> bool:
        """Whether the Q-Former reads text, so that the run has its tokenizer."""
        return self.stage == "stage1" or self.qformer.question_in_qformer

    @property
    def reads_prompts(self) -> bool:
        """Whether the Q-Former reads the language model's prompt, as InstructBLIP's does; after VQA, the question."""
        return self.qformer.question_in_qformer and self.task in ("pretraining", "instruct")


def change(config: RunSettings, changes: Mapping[str, Any]) -> RunSettings:
    """The same settings with some changed, by dotted name; text values are read as their field's type.

    Raises:
        UserError: an unknown name (the nearest known one is suggested) or a value its field cannot hold.
    """
    values = asdict(config)
    known = sorted(_names(RunSettings))
    for name, value in changes.items():
        if name in RENAMED:
            raise UserError(f"setting {name!r} is now called {RENAMED[name]!r}")
        if name in REMOVED:
            raise UserError(f"setting {name!r} is gone: docs/decisions.md says why")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"settings are {', '.join(known)}"
            raise UserError(f"unknown setting {name!r}: {hint}")
        *sections, field = name.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[field] = _read(value)
    return from_dict(values)


def from_dict(values: Mapping[str, Any]) -> RunSettings:
    """Settings from plain values, as `dataclasses.asdict` or a run's `config.json` gives them.

    Names of earlier versions are read, too (`RENAMED`, `REMOVED`).

    Raises:
        UserError: a missing, unknown or unfitting value, named.
    """
    for old in (*RENAMED, *REMOVED):
        section, name = old.split(".")
        part = values.get(section) if isinstance(values, Mapping) else None
        if not isinstance(part, Mapping) or name not in part:
            continue
        kept = {other: value for other, value in part.items() if other != name}
        if old in RENAMED:
            kept = {RENAMED[old].split(".")[1]: part[name], **kept}
        elif REMOVED[old] not in (None, part[name]):
            raise UserError(
                f"setting {old}={part[name]!r} is gone: a model with it needs an earlier version of openblip2"
            )
        values = {**values, section: kept}
    # Strict, because "yes" and 1 are no boolean, and true is no number. Only JSON has its lists read as tuples then.
    text = json.dumps(values, ensure_ascii=False, default=str).encode(errors="replace")
    try:
        TypeAdapter(RunSettings).validate_json(text, strict=True)
        return TypeAdapter(RunSettings).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"setting {name}={first['input']!r}: {first['msg'].lower()}") from error


def _names(section: Any, prefix: str = "") -> list[str]:
    names: list[str] = []
    for field in fields(section):
        name = prefix + field.name
        inner = field.default
        names += _names(inner, name + ".") if is_dataclass(inner) else [name]
    return names


def _read(value: Any) -> Any:
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 1e5 steps
