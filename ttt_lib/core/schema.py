"""The sections of an experiment's configuration: every key with its type, its range and its default.

`config.py` puts them together and reads them from files. Long: every key there is, one section after the other.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from ttt_lib.core.files import absolute
from ttt_lib.core.registry import DATASETS, MODELS, SHIFTS, Registry

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Severity = Annotated[int, Field(ge=0, le=5)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]  # more is a slip, and would fill the memory
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Signal = Literal["consistency", "votes", "ensemble", "reprojection", "edges", "drift", "loss", "camera"]
Side = Annotated[int, Field(ge=16, le=16384)]  # pixels that a network can make something of
RESERVED = ("summary", "superseded", "failed", "scored")  # folders of a folder of runs that are no experiment's


def complaint(place: tuple, said: str, value: Any) -> ValidationError:
    """An error at a place below the one that is validated."""
    kind = PydanticCustomError("setting", "{said}", {"said": said})
    return ValidationError.from_exception_data("settings", [InitErrorDetails(type=kind, loc=place, input=value)])


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    def keys(cls, given: dict[str, Any]) -> Iterable[str]:
        """Those that this section takes, beside others that are given."""
        return {*cls.model_fields, *(field.alias for field in cls.model_fields.values() if field.alias)}

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_key(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if key not in (taken := cls.keys(given)):
                raise complaint((str(key),), f"unknown key; allowed here: {', '.join(sorted(taken))}", given[key])
        return given


def _known(registry: Registry, what: str) -> AfterValidator:
    def check(name: str) -> str:
        if not registry.knows(name):
            raise ValueError(f"there is no such {what}; there are {', '.join(registry.all_names())}")
        return name

    return AfterValidator(check)


def absolute_name(name: str) -> str:
    """The name of a model for a process in another folder: a path that exists becomes absolute, also `FAMILY:PATH`.

    Example:
        >>> absolute_name("tiny")
        'tiny'
    """
    family, added, rest = name.partition(":")
    if added and MODELS.knows(family):
        written_as_path = os.path.basename(rest) != rest or os.path.splitext(rest)[1]  # `small:7` is a number
        return f"{family}:{absolute(rest)}" if written_as_path and os.path.exists(absolute(rest)) else name
    return absolute(name) if name != "tiny" and os.path.exists(absolute(name)) else name


class ModelConfig(Section):
    """Which network, on which device.

    `name`: `tiny` (bundled), a hub name such as `Ruicheng/moge-2-vits-normal`, the path of a `.pt` file or of a folder
    (which becomes absolute, `~` your home), or `FAMILY:REST`.
    `num_tokens`: base tokens of a forward pass; None takes the model's own default.
    `autocast`: `bfloat16` runs the network's training passes (not losses, alignment and predictions) in mixed precision.
    `fov_x`: horizontal field of view in degrees, where it is known (None: as the model predicts it, else 60, and said).
    `canonical_focal`: in pixels of the network's input, of the camera that a metric model is for; its depth is rescaled.
    `checkpointing`: keep fewer activations and compute them again in the backward pass: less memory, more time.
    """

    name: Annotated[str, AfterValidator(absolute_name)] = "tiny"
    num_tokens: Annotated[int, Field(ge=16, le=10000)] | None = None
    device: str = "auto"
    autocast: Literal["none", "bfloat16"] = "none"
    fov_x: Annotated[float, Field(ge=1.0, lt=180.0)] | None = None
    canonical_focal: Positive | None = None
    checkpointing: bool = False


class OptimizerConfig(Section):
    """AdamW or SGD, else with PyTorch's defaults. `learning_rate: 0` is allowed: it is the control of the evaluation."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: NonNegative = 5e-4
    weight_decay: NonNegative = 0.01


class TeacherConfig(Section):
    """The slow copy whose prediction is the target.

    After every `refresh_every` optimizer steps the teacher moves, `teacher = ema_decay * teacher + (1 - ema_decay) *
    student`, and predicts a new target. `refresh_every: 0` keeps the target of the original model.
    `choose_from`: so many times the views are drawn, and those on which the student agrees best are learned from (TPT).
    `certainty`: a pixel's weight is exp(-certainty * spread of `ensemble.members` / median spread); 0: all count alike.
    """

    ema_decay: Probability = 0.999
    refresh_every: Annotated[int, Field(ge=0)] = 3
    choose_from: Count = 1
    certainty: NonNegative = 0.0


class TrainConfig(Section):
    """The loop. One pass is one forward and backward over `batch_size` views; `accumulation` passes make one step.

    `method`: `none` predicts only, `tta` averages the predictions over the views, `ttt` trains.
    `parts`: any of `encoder`, `neck`, `heads`, `norms`, or patterns over parameter names (`encoder.*.bias`).
    `accumulation_mode`: `sum` adds the gradients of the passes (as published for SGD), `mean` averages them.
    `micro_batch`: views in the network at a time, same result but for rounding, halved whenever memory runs out. None:
    those of one pass; more than `batch_size`: several passes of a step together, in fewer and larger operations that
    take more memory; `auto`: as many of them as the free memory of the GPU takes (on a CPU, which gains nothing: None).
    `bidirectional`: weight of the reverse supervision, the clean prediction after the views' (Robust-Depth).
    `lora_rank`: train low-rank updates of the chosen matrices instead of these; 0: the parameters themselves.
    `prompt_tokens`: so many more tokens of a ViT, which `parts: ["*.register_tokens"]` trains alone (VPT).
    `l2_sp`: weight of the squared distance to the original weights. `restore_probability`: chance of each number to
    return to its original after a step (CoTTA). `sharpness_radius`: gradients at a worst point so far away (SAM, SAR).
    `reset`: where training starts: each image from the original weights, or where the last one ended (`never`; N: original
    again at every N-th image), for one camera's sequences. All but `per_image` depend on the order of a shard's samples.
    `random_change`: a control: instead of the trained change a random one, of its norm or of its effect (one photograph).
    `profiled`: whether a profile's factors on rates and counts apply; a row whose rates suit every model says no.
    """

    method: Literal["none", "tta", "ttt"] = "ttt"
    parts: list[str] = ["encoder", "neck", "heads"]
    passes: Annotated[int, Field(ge=0, le=1_000_000)] = 512
    batch_size: Count = 2
    accumulation: Count = 32
    accumulation_mode: Literal["mean", "sum"] = "mean"
    optimizer: OptimizerConfig = OptimizerConfig()
    gradient_clip: NonNegative = 0.0
    predict_with: Literal["student", "teacher"] = "student"
    micro_batch: Count | Literal["auto"] | None = None
    bidirectional: NonNegative = 0.0
    lora_rank: Annotated[int, Field(ge=0, le=4096)] = 0
    prompt_tokens: Annotated[int, Field(ge=0, le=1024)] = 0
    l2_sp: NonNegative = 0.0
    restore_probability: Probability = 0.0
    sharpness_radius: NonNegative = 0.0
    reset: Literal["per_image", "never"] | Count = "per_image"
    random_change: Literal["weights", "prediction"] | None = None
    profiled: bool = True

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if self.lora_rank and self.reset != "per_image":
            raise ValueError("lora_rank starts from the original weights at each image; leave reset at per_image")
        return self


class CropConfig(Section):
    """Random crops. `scale`: side of the crop relative to the image. `recentred` turns the camera, `plain` does not."""

    kind: Literal["recentred", "plain"] = "recentred"
    probability: Probability = 1.0
    scale: tuple[Positive, Positive] = (0.6, 1.0)

    @model_validator(mode="after")
    def _ordered(self) -> CropConfig:
        if not 0.05 <= self.scale[0] <= self.scale[1] <= 1.0:
            raise ValueError("scale must be two numbers low <= high, both in [0.05, 1]")
        return self


class NovelViewConfig(Section):
    """Views from another camera. A view with less than `minimum_known` known pixels is drawn again, `tries` times."""

    probability: Probability = 0.0
    severity: Severity = 2
    minimum_known: Probability = 0.5
    tries: Count = 5
    backend: Literal["auto", "pyrender", "torch"] = "auto"


class PhotometricConfig(Section):
    """Colour changes: strength from 0 (none) to 5; `blur` is the chance of a Gaussian blur on top."""

    probability: Probability = 1.0
    severity: Severity = 3
    blur: Probability = 0.0


class ShiftConfig(Section):
    """Bad weather, light and sensors in views (DepthAnything-AC), one of `names` at a time; see `shifts.py`.

    A set of `shifted` scenes has the very same changes: what is trained on them knows that set's kinds of shift.
    """

    names: list[Annotated[str, _known(SHIFTS, "shift")]] = []
    probability: Probability = 0.5
    severity: Severity = 2


class ViewConfig(Section):
    """What the student sees.

    `longest_side`: images are shrunk to this before views are made (the final prediction is at full size).
    `cutmix`: chance that a rectangle of a view shows another view of the batch (which must hold two at least).
    """

    longest_side: Side | None = None
    mirror: Probability = 0.5
    cutmix: Probability = 0.0
    crop: CropConfig = CropConfig()
    novel_view: NovelViewConfig = NovelViewConfig()
    photometric: PhotometricConfig = PhotometricConfig()
    shift: ShiftConfig = ShiftConfig()


class EnsembleConfig(Section):
    """Further predictions of the same image whose mean (of log depth, after the median ratio) is more reliable.

    `members`, beside the plain one: `mirror`, `finer` and `coarser` (4/3 and 3/4 of the tokens), `finer_mirror` and
    `coarser_mirror` (both).
    `target`: the teacher's target is the mean. `final`: the adapted prediction is the mean.
    """

    members: list[Literal["mirror", "finer", "finer_mirror", "coarser", "coarser_mirror"]] = []
    target: bool = True
    final: bool = True


class GateConfig(Section):
    """What becomes of the adapted prediction, decided without truth. See `gate.py`.

    `mode`: `off` keeps it; `measure` too, but stores the signals; `decide` accepts, blends or rejects by the thresholds
    of `calibration` (a JSON file; None: the bundled one). `views`: held-back views, never trained on. `severity`: of
    their colours and cameras. `signals`: those that are computed.
    """

    # YAML reads `off` as False
    mode: Annotated[Literal["off", "measure", "decide"], BeforeValidator(lambda v: "off" if v is False else v)] = "off"
    calibration: Annotated[str, AfterValidator(absolute)] | None = None
    views: Annotated[int, Field(ge=1, le=64)] = 4
    severity: Severity = 2
    signals: list[Signal] = list(get_args(Signal))


class LossConfig(Section):
    """One term of the loss. A term with settings of its own registers a class derived from this one."""

    weight: NonNegative = 1.0


class ReleasedConfig(Section):
    """Behaviour of the authors' public release, each switch on its own; all off unless `as_released` turns them on."""

    mirror_keeps_x: bool = False
    first_sample_only: bool = False
    mask_positive_and_negative: bool = False
    reload_model: bool = False
    write_files: bool = False
    full_cost_alignment: bool = False
    all_heads: bool = False
    published_layers: bool = False


class DataConfig(Section):
    """One set of samples; the keys of MoGe's `configs/eval/*.json` plus `kind` and `name`. See `data.open_dataset`.

    `kind`: one of `data.list_datasets()`; one that you have registered takes options of its own beside these. `path`
    becomes absolute, `~` your home. `names`: only these samples. `draw`: above 0 they are seen again (`data/again.py`).
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: Annotated[str, _known(DATASETS, "kind of data")] = "moge"
    name: str | None = None
    path: Annotated[str, AfterValidator(absolute)] | None = None
    split: str = ".index.txt"
    width: Side | None = None
    height: Side | None = None
    depth_unit: Positive | None = None
    has_sharp_boundary: bool = False
    include_segmentation: bool = False
    subset: Count | None = None
    count: Count | None = None
    names: list[str] | None = None
    draw: Annotated[int, Field(ge=0)] = 0
    seed: Seed = 0
    shifts: list[str] | None = None
    severities: list[Severity] | None = None
    views: list[Annotated[int, Field(ge=1, le=1000)]] | None = None
    baselines: list[Annotated[float, Field(gt=0.0, le=1.0)]] | None = None

    @classmethod
    def keys(cls, given: dict[str, Any]) -> Iterable[str]:
        """Also the options of the kind of data."""
        kind = str(given.get("kind", "moge"))
        opener = DATASETS[kind] if DATASETS.knows(kind) else DataConfig
        taken = inspect.signature(opener).parameters.values()
        more = given if any(each.kind is each.VAR_KEYWORD for each in taken) else ()
        return {*cls.model_fields, *(each.name for each in taken), *map(str, more)}

    def options(self) -> dict[str, Any]:
        """What differs from the defaults, as keyword arguments for `data.open_dataset`."""
        return self.model_dump(exclude_defaults=True, exclude={"kind"})
