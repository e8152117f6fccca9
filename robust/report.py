"""Reports: what was asked, one row per example as it was decided, and the rates that follow.

On disk a report is a JSON-lines file: the first line is {"header": {...}}, every other line is a row. A report refuses
to hold an example that is certified and attacked at once, because one of the two must then be wrong.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certify.verdict import SoundnessError, Status
from robust.files import encode, read_json_lines, write_whole
from robust.wilson import wilson_interval

# From the best outcome to the worst, the order of tables and pictures.
STATUSES: tuple[Status, ...] = ("certified", "unknown", "falsified", "misclassified")

NO_CLASS = -1

ROWS_FILE = "rows.jsonl"


class ReportError(ValueError):
    """A file or a set of rows that is no report; the message is one line."""


@dataclass(frozen=True)
class Row:
    """Outcome for one example.

    Attributes:
        index: position in the data set's split.
        label, predicted: classes; `predicted`, of the clean image, differs from `label` exactly where misclassified;
            NO_CLASS where a logit was not finite.
        status: verdict.
        method: stage that decided, as text.
        margin_lb: proved lower bound of the smallest margin over the ball, None where nothing finite was proved.
        attacked: whether the attack or the verifier found a witness, a point of the ball with another prediction.
        attack_margin: margin at the witness, else at the point that the attack proposed; None where no attack ran.
        seconds: time spent on the example, its share where a batch was decided together.
        linf, l2: distance of the witness, in pixel units.
        precision: arithmetic of the verdict, such as "float32".
        domains: subproblems that branch and bound bounded; 0 where nothing branched.
        attempts: whether each attack that was tried found a witness, by name, in the order in which they ran.
    """

    index: int
    label: int
    predicted: int
    status: Status
    method: str
    margin_lb: float | None = None
    attacked: bool = False
    attack_margin: float | None = None
    seconds: float = 0.0
    linf: float | None = None
    l2: float | None = None
    precision: str = ""
    domains: int = 0
    attempts: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ReportError(f"example {self.index}: no status {self.status!r}; known: {', '.join(STATUSES)}")
        if self.status == "certified" and self.attacked:
            raise SoundnessError(
                f"example {self.index} is certified by {self.method!r} and attacked with a witness: "
                "one of the two is wrong, and no number of this report can be trusted"
            )
        if (self.status == "misclassified") != (self.label != self.predicted):
            raise ReportError(
                f"example {self.index}: status {self.status} with label {self.label} and prediction {self.predicted}"
            )
        if (self.status == "falsified") != self.attacked:
            raise ReportError(f"example {self.index}: status {self.status} with attacked={self.attacked}")


@dataclass(frozen=True)
class Rate:
    """`count` of `total` examples."""

    count: int
    total: int

    @property
    def fraction(self) -> float:
        """count / total, NaN where there are no examples."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the fraction."""
        return wilson_interval(self.count, self.total)

    def facts(self) -> dict[str, Any]:
        """JSON form."""
        low, high = self.interval
        return {"count": self.count, "total": self.total, "fraction": self.fraction, "low": low, "high": high}


@dataclass(frozen=True)
class Rates:
    """Accuracies over a set of examples; certified.count <= under_attack.count <= clean.count.

    Attributes:
        clean: right without perturbation.
        under_attack: right, and no witness was found.
        certified: proved robust.
    """

    clean: Rate
    under_attack: Rate
    certified: Rate

    def facts(self) -> dict[str, Any]:
        """JSON form."""
        return {item.name: getattr(self, item.name).facts() for item in dataclasses.fields(self)}


@dataclass(frozen=True)
class Stage:
    """What one method decided: examples by status, the time they took and the domains visited for them."""

    certified: int
    unknown: int
    falsified: int
    seconds: float
    domains: int = 0


@dataclass(frozen=True)
class Attempts:
    """What one attack achieved: examples it was tried on, and those for which it found a witness."""

    tried: int
    fooled: int


@dataclass(frozen=True)
class Summary:
    """Rates of a report, over everything, per class and per deciding method; and what each attack achieved."""

    examples: int
    rates: Rates
    statuses: dict[Status, int]
    seconds: float
    classes: dict[int, Rates]
    stages: dict[str, Stage]
    attacks: dict[str, Attempts]

    def worst_class(self, rate: str) -> int:
        """Label of the class where the rate of this name is least (the first of several); ValueError without rows."""
        return min(self.classes, key=lambda label: getattr(self.classes[label], rate).fraction)

    def facts(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "examples": self.examples,
            **self.rates.facts(),
            "statuses": self.statuses,
            "seconds": self.seconds,
            "classes": {str(label): rates.facts() for label, rates in self.classes.items()},
            "stages": {method: dataclasses.asdict(stage) for method, stage in self.stages.items()},
            "attacks": {name: dataclasses.asdict(attempts) for name, attempts in self.attacks.items()},
        }

    def csv(self) -> str:
        """CSV text with one line per rate: of everything first (class "all"), then of each class."""
        lines = [
            {"class": scope, "rate": name, **facts}
            for scope, rates in (("all", self.rates), *self.classes.items())
            for name, facts in rates.facts().items()
        ]
        return _csv(("class", "rate", "count", "total", "fraction", "low", "high"), lines)


@dataclass(frozen=True)
class Report:
    """Header and rows of one evaluation.

    Attributes:
        header: JSON values: model, checkpoint, data, ball, verifier, attack, versions, device, precision, started ...
        rows: one per example, no index twice.

    Raises:
        SoundnessError: an example is certified and attacked.
        ReportError: an index stands twice.
    """

    header: dict[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        seen: set[int] = set()
        for row in self.rows:
            if row.index in seen:
                raise ReportError(f"example {row.index} has two rows")
            seen.add(row.index)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Report in a JSON-lines file, or in the file rows.jsonl of a folder; a torn last line is left out.

        Raises:
            ReportError: no such file, or no report. SoundnessError: its rows contradict each other.
        """
        path = rows_path(path)
        try:
            records = read_json_lines(path)
        except FileNotFoundError:
            raise ReportError(f"{path}: no such report; `robust certify` and `robust attack` write one") from None
        except ValueError as error:
            raise ReportError(str(error)) from None
        return cls.from_records(records, path)

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], source: Path) -> Report:
        """Report from the objects of the JSON-lines file `source`."""
        first, *rest = list(records) or [{}]
        try:
            if set(first) != {"header"}:
                raise ReportError("its first line is no header, so it is no report")
            return cls(first["header"], tuple(read_row(record) for record in rest))
        except (SoundnessError, ReportError) as error:
            raise type(error)(f"{source}: {error}") from None

    def save(self, path: Path) -> None:
        """Write header and rows as JSON lines, whole or not at all."""
        records = [header_record(self.header), *map(dataclasses.asdict, self.rows)]
        write_whole(rows_path(path), "".join(encode(record) + "\n" for record in records))

    @property
    def verified(self) -> bool:
        """Whether a verifier ran; without one, nothing is certified because nobody tried."""
        return self.header.get("verifier", "") is not None

    @property
    def searched(self) -> bool:
        """Whether anything looked for adversarial points: an attack, or a verifier that falsifies."""
        return bool(self.header.get("searched", True))

    def measured(self) -> list[str]:
        """Names of the rates that this evaluation measured, least first."""
        names = {"certified": self.verified, "under_attack": self.searched, "clean": True}
        return [name for name, known in names.items() if known]

    def summary(self) -> Summary:
        """Rates with counts and intervals; defined for an empty report, too."""
        labels = sorted({row.label for row in self.rows})
        methods = sorted({row.method for row in self.rows if row.status != "misclassified"})
        return Summary(
            examples=len(self.rows),
            rates=rates(self.rows),
            statuses={status: sum(row.status == status for row in self.rows) for status in STATUSES},
            seconds=math.fsum(row.seconds for row in self.rows),
            classes={label: rates([row for row in self.rows if row.label == label]) for label in labels},
            stages={method: _stage([row for row in self.rows if row.method == method]) for method in methods},
            attacks=_attacks(self.rows),
        )

    def undecided(self) -> list[Row]:
        """The unknown rows, those whose bound is nearest to zero first and those without a bound last."""
        rows = [row for row in self.rows if row.status == "unknown"]
        return sorted(rows, key=lambda row: math.inf if row.margin_lb is None else abs(row.margin_lb))

    def csv(self) -> str:
        """The rows as CSV text with a line of names; None is an empty cell."""
        names = [item.name for item in dataclasses.fields(Row)]
        return _csv(names, [dataclasses.asdict(row) for row in self.rows])


def rates(rows: Iterable[Row]) -> Rates:
    """Clean, attacked and certified accuracy of some rows."""
    rows = list(rows)
    clean = [row for row in rows if row.status != "misclassified"]
    return Rates(
        clean=Rate(len(clean), len(rows)),
        under_attack=Rate(sum(not row.attacked for row in clean), len(rows)),
        certified=Rate(sum(row.status == "certified" for row in rows), len(rows)),
    )


def rows_path(path: Path) -> Path:
    """The JSON-lines file that `path` means: itself, or rows.jsonl where it is a folder or has no suffix."""
    path = Path(path)
    return path / ROWS_FILE if path.is_dir() or (not path.suffix and not path.is_file()) else path


def header_record(header: Mapping[str, Any]) -> dict[str, Any]:
    """First object of a report's file."""
    return {"header": dict(header)}


def read_row(record: Mapping[str, Any]) -> Row:
    """Row from its JSON form; ReportError names fields that are unknown or lacking."""
    fields = {item.name: item for item in dataclasses.fields(Row)}
    unknown = sorted(set(record) - set(fields))
    lacking = [
        name for name, item in fields.items() if item.default is dataclasses.MISSING and record.get(name) is None
    ]
    if unknown or lacking:
        raise ReportError(f"a row with unknown fields {unknown} and without {lacking}")
    return Row(**record)


def _attacks(rows: Iterable[Row]) -> dict[str, Attempts]:
    tried, fooled = Counter[str](), Counter[str]()
    for row in rows:
        tried.update(list(row.attempts))
        fooled.update(name for name, found in row.attempts.items() if found)
    return {name: Attempts(count, fooled[name]) for name, count in tried.items()}


def _stage(rows: list[Row]) -> Stage:
    count = {status: sum(row.status == status for row in rows) for status in STATUSES}
    seconds, domains = math.fsum(row.seconds for row in rows), sum(row.domains for row in rows)
    return Stage(count["certified"], count["unknown"], count["falsified"], seconds, domains)


def _csv(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
