"""All settings of a run as frozen, typed dataclasses. The defaults are the paper's (section 3.4 and appendix).

Settings are changed with `change(config, {"optim.lr": 2e-4})` in Python, or with `--set optim.lr=2e-4` on the command
line, which calls it. PyTorch modules do not use these classes; the builder passes plain arguments to them.
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

# Settings with another name in the config.json of earlier versions: old name -> current name.
RENAMED = {
    "stage1.one_sided": "stage1.detach_gathered",
    "stage1.matching_from": "stage1.itm_start_step",
    "qformer.reads_question": "qformer.question_in_qformer",
    "qformer.lora": "qformer.lora_rank",
    "language.lora": "language.lora_rank",
    "language.weights": "language.dtype",
    "vision.weights": "vision.dtype",
}
# Removed settings, each with the value that has no effect. None: any value is accepted, because the setting only
# affected the initial weights, which are not drawn again when a run is loaded.
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
    trained: bool = False  # fine-tuning: also train the encoder (paper 4.2 to 4.4); the run then has its weights
    whiten: bool = False  # ours: whiten the features with statistics of the training images (model/vision.py)
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of weights and computation; auto: as train.precision


@dataclass(config=STRICT)
class QFormerSettings:
    """The Q-Former (paper 3.1); its sizes and its tokenizer are those of the BERT that it is initialized from."""

    start: str = "google-bert/bert-base-uncased"  # any BERT-family checkpoint: hub name, directory, or wheel
    queries: Count = 32
    cross_every: Count = 2
    dropout: Share = 0.1
    # VQA (paper 4.3, figure 7): queries and question tokens attend to each other in self-attention, so that the queries
    # extract what the question needs. Instruct: the same with the whole instruction. Text weights come from stage 1.
    question_in_qformer: bool = False
    image_norm_eps: Positive = 1e-5  # for the LayerNorm on the image features; 1e-6 in transformers' checkpoints
    lora_rank: Natural = 0  # ours: rank of adapters that are trained instead of its weights (model/lora.py); 0 = none


@dataclass(config=STRICT)
class ConnectorSettings:
    """The module between image encoder and language model in stage 2: the Q-Former (paper), or another connector."""

    name: str = "qformer"  # a name in CONNECTORS (model/build.py)
    # Parameters of the connector's class by name, for connectors other than the Q-Former.
    options: dict[str, Any] = Field(default_factory=dict)


@dataclass(config=STRICT)
class Stage1Settings:
    """The objectives of stage 1 (paper 3.1)."""

    # The losses to sum: all three (paper), or fewer for an ablation (table 6 of the paper leaves out ITG).
    objectives: tuple[Objective, ...] = ("itc", "itm", "itg")
    shared_width: Count = 256
    temperature: Positive = 0.07
    label_smoothing: Share = 0.1
    detach_gathered: bool = False  # True: gathered features have no gradient (authors' code)
    # Ours, 0 = the paper: weight of a fourth loss that keeps the queries of an image different (model/objectives.py).
    decorrelation: NonNegative = 0.0
    # Ours, 0 = the paper: temperature of a smooth maximum over the queries in ITC's loss (model/objectives.py).
    smooth_maximum: NonNegative = 0.0
    itm_start_step: Natural = 0  # ours, 0 = the paper: first steps without ITM, because ITM learns only after ITC
    # Ours, None = the paper: from this step on, half of each batch consists of images whose captions are similar to
    # those of the other half (data/samples.py). Set it to a step at which ITM has already started to learn.
    similar_start_step: Natural | None = None


@dataclass(config=STRICT)
class Stage2Settings:
    """The objective of stage 2 (paper 3.2): language modelling."""

    # Ours, 0 = the paper: number of first steps without the language model. They only train the soft prompt to match
    # the embeddings of the caption's words (`Stage2.alignment`); later steps keep this as a second loss. In the demo, a
    # step without the language model takes a ninth of the time of a step with it.
    lm_start_step: Natural = 0
    # Ours: each step trains only the first n visual tokens, with n drawn from 1 to all, so that a trained model can use
    # any number of them (Matryoshka Query Transformer, Hu et al., 2024). False = the paper: always all.
    elastic_tokens: bool = False


@dataclass(config=STRICT)
class LanguageSettings:
    """The frozen language model of stage 2 (paper 3.2) and the text around the soft prompt."""

    name: str = "facebook/opt-2.7b"  # hub name, directory, or wheel:smollm2-135m-instruct
    template: str = "{image}{bos}{prompt}"  # or "chat": the tokenizer's own chat template
    end: str | None = None  # text at the end of a caption; None = the tokenizer's end token
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("",)  # one is drawn for each training caption
    question: Form = "Question: {} Answer:"  # prompt for a question; {} is the question
    questions: tuple[Form, ...] = ()  # instruct: one is drawn for each question in training; () = `question`
    exact_gelu: bool = False  # T5: exact GELU instead of its tanh approximation, as the authors run FlanT5
    # Of its weights and computation. auto: follows train.precision. int8, int4: with bitsandbytes, the rest as auto.
    dtype: Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"] = "auto"
    lora_rank: Natural = 0  # ours: rank of trained adapters (alpha = 2 x rank, no dropout; model/lora.py); 0 = none


@dataclass(config=STRICT)
class OptimSettings:
    """AdamW with linear warm-up and a cosine decay that is updated at each step (paper 3.4)."""

    lr: Positive = 1e-4
    min_lr: NonNegative = 1e-5
    warmup: Natural = 2000  # steps
    betas: tuple[Share, Share] = (0.9, 0.98)
    weight_decay: NonNegative = 0.05
    # For a trained image encoder: the learning rate is lr x layer_decay in its last layer, and in each layer below it
    # layer_decay times the rate of the layer above (paper, table 9). 1 = the same rate for all.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip: NonNegative = 0.0  # maximum gradient norm; 0 = no clipping, as in the paper


@dataclass(config=STRICT)
class TrainSettings:
    """Length of training, sizes of batches, and how often to validate and save."""

    steps: Count = 250_000
    # Pairs in one batch over all processes; each of N processes gets 1/N of them. Results do not depend on N.
    batch: Count = 1680
    accumulate: Count = 1  # batches per optimizer step; ITC's negatives come from one batch only
    # Ours: number of pairs that each process computes at once; 0 = all. Losses and gradients are the same, with less
    # memory. Unlike with `accumulate`, negatives come from the whole batch (model/fast/gradient_cache.py).
    chunk: Natural = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where it is faster than fp32
    # Ours: activations in the Q-Former and the language model are computed again in the backward pass instead of being
    # stored. The results are the same, with less memory and a quarter to a half more time.
    checkpoint_activations: bool = False
    # Ours: torch.compile for the Q-Former's blocks. Dropout masks differ; other results are the same up to rounding.
    compile: bool = False
    # For several processes. ddp: each has a full copy. fsdp2: the layers of the frozen parts are sharded, for
    # language models that do not fit on one GPU (distributed/data_parallel.py).
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    validate_every: Natural = 1000  # steps; 0 = only at the end
    checkpoint_every: Natural = 1000  # steps; 0 = only when the run is told to stop (docs/resuming.md)
    keep_checkpoints: Count = 2  # the newest ones; older ones are deleted when a new one is complete
    # A tracker to which the rows of log.jsonl are also sent (train/bookkeeping.py).
    track: Literal["", "tensorboard", "wandb", "trackio"] = ""
    most_bad_steps: Count = 5  # the run stops after so many consecutive steps with non-finite losses or gradients


@dataclass(config=STRICT)
class DataSettings:
    """Images and texts."""

    source: str = ""  # a folder, .jsonl or .csv, or shards; `--data` sets it
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.02  # share of the images that is kept for validation
    most_held_out: Count = 500  # at most this number of images
    # Number of shards that are read at the same time, one sample from each in turn. If the number of processes divides
    # it, no shard is read by two processes (data/web/shard_order.py).
    open_shards: Count = 16
    augment: bool = True  # random crop and flip (no flip if texts say left or right); False: compute features once
    negations: Annotated[float, Field(ge=0, le=1)] = 1.0  # ours, vqa: share of the questions with "not" to keep
    caption_share: Annotated[float, Field(ge=0, le=1)] = 0.5  # ours, instruct: share of captions; others are questions
    balance: bool = False  # ours, vqa: show each question as often with yes as with no (data/samples.py)
    features: str = ""  # ours: a cache that `openblip2 features` wrote; `--features` sets it
    max_tokens: Annotated[int, Field(ge=4)] = 32  # of the Q-Former's text; longer captions are cut, counted, reported


@dataclass(config=STRICT)
class RunSettings:
    """All settings of a run.

    `start`: the run to start from. Stage 2 and retrieval start from a stage-1 run (according to the paper, stage 2 can
    collapse without it); caption, vqa and instruct start from a stage-2 run.
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
    text_start: str | None = None  # vqa, instruct: stage-1 run with the text weights; None = the `start` of `start`
    warm_start: bool = False  # ours: closed-form initialization before the first step (train/warm_start.py)

    @property
    def reads_text(self) -> bool:
        """Whether the Q-Former takes text as input; the run then has its tokenizer."""
        return self.stage == "stage1" or self.qformer.question_in_qformer

    @property
    def reads_prompts(self) -> bool:
        """Whether the Q-Former's text is the language model's prompt, as in InstructBLIP; in VQA it is the question."""
        return self.qformer.question_in_qformer and self.task in ("pretraining", "instruct")


def change(config: RunSettings, changes: Mapping[str, Any]) -> RunSettings:
    """The settings with some of them changed, by dotted name; values given as text get their field's type.

    Raises:
        UserError: a name is unknown (the most similar known name is suggested), or a value is invalid for its field.
    """
    values = asdict(config)
    known = sorted(_names(RunSettings))
    for name, value in changes.items():
        if name in RENAMED:
            raise UserError(f"setting {name!r} is now called {RENAMED[name]!r}")
        if name in REMOVED:
            raise UserError(f"setting {name!r} was removed: see docs/decisions.md")
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
    """Settings from plain values, as in the result of `dataclasses.asdict` or in a run's `config.json`.

    Names from earlier versions are accepted, too (`RENAMED`, `REMOVED`).

    Raises:
        UserError: a value is missing, unknown or invalid; the message names it.
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
                f"setting {old}={part[name]!r} was removed: load this model with an earlier version of openblip2"
            )
        values = {**values, section: kept}
    # Strict: "yes" and 1 are not booleans, and true is not a number. In strict mode, only JSON lists become tuples.
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
