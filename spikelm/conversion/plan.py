"""What a conversion changes: the mixer of every layer, which activations spike, and how."""

from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeGuard

from huggingface_hub.errors import StrictDataclassError

from spikelm.configuration import SpikeLMConfig
from spikelm.conversion.checkpoints import reason
from spikelm.validation import CODES, READ_SITES, THRESHOLDS

ALLOCATIONS = ("gradient", "uniform")
DEFAULT_WINDOW = 4096
LONGEST_MEMORY = 2048  # half-life, in tokens, at which the slowest new gates begin
SHORT_WINDOW = 64  # of window_linear, whose past is not lost outside of it


@dataclass(frozen=True)
class ConversionPlan:
    """The choices of a conversion, checked when they are made.

    Attributes:
        mixers: `keep` (every layer keeps its own), one mixer for all layers (`attention`, `swa`, `window_linear`,
            `gla`, `retention`, `delta`, or one of the last three beside one of the first two, as `gla+swa`),
            `uniform:N` (every Nth layer keeps its own, the others become `target`), `auto` (`keep` layers keep their
            own, those whose replacement is measured to cost most), or a list with one entry per layer, `keep` among the
            possible ones.
        target: the mixer of the layers that `uniform:N` and `auto` change.
        keep: for `auto`: how many layers keep their own mixer; below 1: which share of all.
        window: width, in tokens, of the windows in layers that the plan names; default: the source's own; else for
            `swa` 4096, or the model's longest text if that is shorter, and for `window_linear` 64, as in LoLCATs.
        sinks: first tokens of a text that sliding windows which the source does not have keep seeing.
        sites: `all`, `none`, or a list of `qkv`, `o`, `gate_up`, `down`.
        code: `bitwise`, `ternary` or `twos_complement`; `binary` has no sign and cannot code these activations.
        k: spike counts per mean magnitude; None: 3 as published, or 4 with a silent share, where the dead zones
            silence what a finer k no longer does. With the `gradient` allocation a mean: every site gets its own.
        dead_zone: |x| below this share of the mean magnitude is silent, at every site alike.
        threshold: `token` (each token's own mean magnitude), or `calibrated`, `learned`: a mean stored per site.
        silent_share: calibrate the dead zones so that this share of the inputs of all sites, each weighted by the
            weights that it would read, is zero; in (0, 1). None: `dead_zone` as it is.
        allocation: how a silent share is spread: `gradient` (dead zones per channel and k per site where they cost
            least), or `uniform` (one dead zone for all sites).
        max_count: counts are clipped to this magnitude; None: never. Small ones need `rotate`, for outliers' sake.
        rotate: spread outliers over all channels by rotations folded into the weights (`rotation.rotate`). It takes
            away zeros, so it excludes a silent share. The input of `down` keeps its outliers: leave that site out.

    Raises:
        ValueError: a choice that is unknown, or that contradicts another.
    """

    mixers: str | list[str] = "keep"
    target: str = "gla"
    keep: int | float = 0.25
    window: int | None = None
    sinks: int = 4
    sites: str | list[str] = "all"
    code: str = "bitwise"
    k: float | None = None
    dead_zone: float = 0.0
    threshold: str = "token"
    silent_share: float | None = None
    allocation: str = "gradient"
    max_count: int | None = None
    rotate: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.mixers, str):
            if self._period() is None:
                _mixer("mixers", self.mixers, "keep", "auto", "uniform:N")
        else:
            for name in self.mixers:
                _mixer("mixers", name, "keep")
        _mixer("target", self.target)
        if not _is_number(self.keep) or self.keep <= 0 or (self.keep > 1 and self.keep != int(self.keep)):
            raise ValueError(f"keep must be a number of layers, or a share of them below 1; got {self.keep!r}.")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f"window must be a whole number of tokens, at least 1; got {self.window!r}.")
        if not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"sinks must be a whole number of tokens, at least 0; got {self.sinks!r}.")
        self._check_spikes()

    def _check_spikes(self) -> None:
        if self.sites not in ("all", "none"):
            chosen = [self.sites] if isinstance(self.sites, str) else list(self.sites)
            if unknown := [site for site in chosen if site not in READ_SITES]:
                raise ValueError(
                    f"sites must be 'all', 'none' or a list of {', '.join(READ_SITES)}; got "
                    f"{', '.join(map(str, unknown))}."
                )
        if self.code == "binary":
            raise ValueError(
                "code 'binary' has no negative spikes, but the activations of the converted layers have both signs; "
                "use bitwise, ternary or twos_complement."
            )
        _one_of("code", self.code, CODES)
        _one_of("threshold", self.threshold, THRESHOLDS)
        _one_of("allocation", self.allocation, ALLOCATIONS)
        if self.k is None:
            object.__setattr__(self, "k", 3.0 if self.silent_share is None else 4.0)
        elif not _is_number(self.k) or self.k <= 0:
            raise ValueError(f"k must be a positive number of counts per mean magnitude; got {self.k!r}.")
        if not _is_number(self.dead_zone) or self.dead_zone < 0:
            raise ValueError(f"dead_zone must be a number of mean magnitudes, at least 0; got {self.dead_zone!r}.")
        if self.max_count is not None and (not isinstance(self.max_count, int) or self.max_count < 1):
            raise ValueError(f"max_count must be a whole number of spikes, at least 1; got {self.max_count!r}.")
        if self.silent_share is None:
            return
        if self.rotate:
            raise ValueError(
                "Give rotate or silent_share, not both: a rotation makes every channel a mixture of all, and few of "
                "them are near zero, so that dead zones cost far more. Rotate for small counts, silence for events."
            )
        if not _is_number(self.silent_share) or not 0 < self.silent_share < 1:
            raise ValueError(f"silent_share must lie between 0 and 1; got {self.silent_share!r}.")
        if self.dead_zone:
            raise ValueError("Give dead_zone or silent_share, not both: a silent share decides the dead zones.")
        if not self.site_names:
            raise ValueError("silent_share needs spike sites, but sites is 'none'; choose sites or leave it out.")

    @classmethod
    def of(cls, **choices: Any) -> "ConversionPlan":
        """A plan from keyword choices. Raises ValueError for an unknown one, naming those that exist."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(choices) - set(known)):
            raise ValueError(f"Unknown choice {', '.join(unknown)}; a plan has {', '.join(known)}.")
        return cls(**choices)

    @property
    def site_names(self) -> list[str]:
        """The sites as a list, in the order of the computation."""
        if isinstance(self.sites, str) and self.sites in ("all", "none"):
            return list(READ_SITES) if self.sites == "all" else []
        chosen = [self.sites] if isinstance(self.sites, str) else self.sites
        return [site for site in READ_SITES if site in chosen]

    @property
    def needs_text(self) -> bool:
        """Whether something is to be measured on a calibration text."""
        return bool(self.site_names) and (self.silent_share is not None or self.threshold != "token")

    @property
    def is_measured(self) -> bool:
        """Whether the mixers follow from a measurement, so that the plan has to be `decided` before it is applied."""
        return self.mixers == "auto"

    def everywhere(self) -> "ConversionPlan":
        """The plan that replaces every layer, without spikes: what `auto` measures on."""
        return replace(self, mixers=self.target, sites="none", silent_share=None)

    def kept_of(self, layers: int) -> int:
        """How many of so many layers the budget of `auto` keeps. Raises ValueError if none would be replaced."""
        kept = max(round(self.keep * layers), 1) if self.keep < 1 else int(self.keep)
        if kept >= layers:
            raise ValueError(
                f"keep is {self.keep:g}, but only {layers} layers would change: keep fewer, or choose 'keep'."
            )
        return kept

    def decided(self, kept: list[int], layers: int) -> "ConversionPlan":
        """The plan of a model with so many layers, of which `kept` keep their own mixer."""
        return replace(self, mixers=["keep" if i in kept else self.target for i in range(layers)])

    def apply(self, source: dict[str, Any]) -> SpikeLMConfig:
        """The configuration of the converted model, from the fields that a family's table gives for the source.

        Raises:
            ValueError: a list of mixers with another length than the model has layers, a window without a use.
        """
        layers = source["num_hidden_layers"]
        own = source["mixers"] if isinstance(source["mixers"], list) else [source["mixers"]] * layers
        widths = source.get("attention_window") or [None] * layers
        entries = self._entries(layers)
        mixers = [old if entry == "keep" else entry for entry, old in zip(entries, own, strict=True)]
        windowed = [not WINDOWED.isdisjoint(mixer.split("+")) for mixer in mixers]
        # A window of the source stays as it is, unless the plan names the layer and gives another width.
        new = [
            has and entry != "keep" and (width is None or self.window is not None)
            for has, entry, width in zip(windowed, entries, widths, strict=True)
        ]
        if self.window is not None and not any(new):
            raise ValueError(f"window is {self.window}, but the plan gives no layer a window; leave it out.")
        longest = source["max_position_embeddings"]
        windows = [
            self._width(mixer, longest) if n else width if has else None
            for n, has, width, mixer in zip(new, windowed, widths, mixers, strict=True)
        ]
        sinks = [self.sinks if n and mixer != "window_linear" else 0 for n, mixer in zip(new, mixers, strict=True)]
        changes = {
            "mixers": mixers,
            "attention_window": windows if any(windows) else None,
            "attention_sinks": sinks if any(sinks) else 0,
            "parallel_norms": "linear",
            "gla_longest_memory": LONGEST_MEMORY,
            "delta_longest_memory": LONGEST_MEMORY,
            "spike_sites": self.site_names or None,
            "spike_code": self.code,
            "spike_k": self.k,
            "spike_dead_zone": self.dead_zone,
            "spike_dead_zone_per_channel": self.silent_share is not None and self.allocation == "gradient",
            "spike_threshold": self.threshold,
            "spike_max_count": self.max_count,
        }
        try:
            return SpikeLMConfig(**source | changes)
        except StrictDataclassError as error:
            raise ValueError(
                f"The plan and the source do not make a model: {reason(error.__cause__ or error)}"
            ) from error

    def _width(self, mixer: str, longest: int) -> int:
        """Of a window that the source does not have."""
        return self.window or min(SHORT_WINDOW if mixer == "window_linear" else DEFAULT_WINDOW, longest)

    def _entries(self, layers: int) -> list[str]:
        """What the plan says of every layer: a mixer, or `keep`."""
        if isinstance(self.mixers, str):
            if period := self._period():
                return ["keep" if (i + 1) % period == 0 else self.target for i in range(layers)]
            return [self.mixers] * layers
        if len(self.mixers) != layers:
            raise ValueError(
                f"mixers lists {len(self.mixers)} layers, but the source has {layers}; give one entry per layer."
            )
        return list(self.mixers)

    def _period(self) -> int | None:
        if not isinstance(self.mixers, str) or not self.mixers.startswith("uniform:"):
            return None
        number = self.mixers.removeprefix("uniform:")
        if not number.isdecimal() or int(number) < 2:
            raise ValueError(f"mixers 'uniform:N' needs a whole number N of at least 2; got {self.mixers!r}.")
        return int(number)

    def describe(self, config: SpikeLMConfig, source: str) -> str:
        """The plan for one model as a table of a few lines."""
        counts = Counter(config.mixers)
        layers = ", ".join(f"{n} x {name}" for name, n in counts.items())
        windows = config.attention_window if isinstance(config.attention_window, list) else [config.attention_window]
        widths = sorted({w for w in windows if w})
        rows = [("source", source), ("layers", f"{layers} ({self._origin()})")]
        if widths:
            rows.append(("windows", f"{', '.join(map(str, widths))} tokens"))
        if self.site_names:
            rows.append(("spike sites", f"{', '.join(self.site_names)} in every layer"))
            rows.append(("spike code", f"{self.code}, k = {self.k:g}, threshold per {_PER[self.threshold]}"))
            if self.rotate:
                rows.append(("rotation", "residual stream and values, folded into the weights"))
            if self.max_count is not None:
                rows.append(("counts", f"at most {self.max_count}"))
            if self.silent_share is None:
                rows.append(("dead zone", f"{self.dead_zone:g} of the mean magnitude, everywhere"))
            else:
                rows.append(("silent share", f"{self.silent_share:g} of the reads, {self.allocation} allocation"))
        else:
            rows.append(("spike sites", "none"))
        return "\n".join(["Conversion plan", *(f"  {name:<13}{value}" for name, value in rows)])

    def _origin(self) -> str:
        if self.mixers == "keep":
            return "as in the source"
        if self.is_measured:
            return f"keeping {self.keep:g}, measured"
        if self._period():
            return f"{self.mixers}, others {self.target}"
        return "as the plan says"

    def as_dict(self) -> dict[str, Any]:
        """All choices, for a record."""
        return asdict(self)


# Mixers that a layer of a source can become; one that forgets and one that attends may stand side by side.
FORGETTING, ATTENDING = ("gla", "retention", "delta"), ("attention", "swa")
TARGETS = (*ATTENDING, "window_linear", *FORGETTING)
WINDOWED = frozenset({"swa", "window_linear"})
_PER = {"token": "token", "calibrated": "layer and site, calibrated", "learned": "layer and site, learned"}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(allowed)}; got {value!r}.")


def _mixer(field: str, name: Any, *others: str) -> None:
    first, _, second = str(name).partition("+")
    pairs = (FORGETTING, ATTENDING), (ATTENDING, FORGETTING)
    if name not in (*others, *TARGETS) and not any(first in a and second in b for a, b in pairs):
        raise ValueError(
            f"{field} must be one of {', '.join((*others, *TARGETS))}, or one of {', '.join(FORGETTING)} beside one of "
            f"{', '.join(ATTENDING)}, as gla+swa; got {name!r}."
        )
