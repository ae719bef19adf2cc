"""What ``describe()`` returns: one row per param group, printable as a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What the decay does to one param group.

    Attributes:
        group: Its index, with that of the optimizer before it where there are several.
        coefficient: The ``wd`` in force: of the last step, or at progress 0 before the first.
        scale: The ``scale_by`` that goes with it.
        lr_max: The peak learning rate; None where it is not known.
        decaying: Number of tensors and of parameters that decay when they have a gradient.
        spared: Number of tensors and of parameters that do not.
        shrink: What a step takes from the weights at the current learning rate; None where only the
            device knows.
        steps_per_epoch: Steps of an epoch; None where they are not known.
        due: What was due so far, of parameters with a gradient at every step; a fraction.
        applied: What of it has been applied, mean over the tensors; None where only the device
            knows.
    """

    group: str
    coefficient: float
    scale: str
    lr_max: float | None
    decaying: tuple[int, int]
    spared: tuple[int, int]
    shrink: float | None
    steps_per_epoch: float | None
    due: float
    applied: float | None

    @property
    def timescale(self) -> float | None:
        """``1 / shrink``: over how many steps weights forget where they came from."""
        return 1 / self.shrink if self.shrink else None

    def cells(self) -> dict[str, str]:
        """The row as it is printed, by column."""
        epochs = None
        if self.timescale is not None and self.steps_per_epoch is not None:
            epochs = self.timescale / self.steps_per_epoch
        return {
            "group": self.group,
            "wd": _number(self.coefficient),
            "scale_by": self.scale,
            "lr_max": _number(self.lr_max),
            "decaying": "{:,} ({:,})".format(*self.decaying),
            "not": "{:,} ({:,})".format(*self.spared),
            "1 / shrink, steps": _number(self.timescale),
            "epochs": _number(epochs),
            "due": f"{self.due:.3%}",
            "applied": "on the device" if self.applied is None else f"{self.applied:.3%}",
        }


class Description(tuple[Row, ...]):
    """The rows of a table; ``print`` shows it.

    ``decaying`` and ``not`` give the number of tensors and, in parentheses, of parameters.

    Example:
        >>> rows = [Row("0", 0.1, "lr", None, (2, 20), (0, 0), 1e-4, 50, 0.01, 0.01)]
        >>> print(Description(rows))
        group   wd  scale_by  lr_max  decaying    not  1 / shrink, steps  epochs     due  applied
            0  0.1        lr       -    2 (20)  0 (0)              1e+04     200  1.000%   1.000%
    """

    def __str__(self) -> str:
        rows = [row.cells() for row in self]
        lines = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else [["no groups"]]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
