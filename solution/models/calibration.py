"""Fit and apply a member's calibrator: raw logits (N,), positive = fake, to P(fake) (N,) float64 in [0, 1].

A `Calibrator` is a few numbers with the text of what it was fitted on; it travels in the bundle as JSON. Temperature
and Platt scaling rise strictly with the logit, so they never change a member's AUC; isotonic calibration is made of
straight lines that rise between its knots and is flat beyond the first and the last one, so it can tie pictures there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from solution import config

KINDS = ("identity", "temperature", "platt", "isotonic")  # from simple to flexible
LEAST_SLOPE = 1e-3  # of Platt scaling: keeps the order even where the logits rank backwards
LARGEST_LOG_TEMPERATURE = 7.0  # temperatures within e**-7..e**7


@dataclass(frozen=True)
class Calibrator:
    """One member's map from logit to P(fake).

    kind, parameters: `identity` (): sigmoid(x). `temperature` (T,): sigmoid(x / T). `platt` (a, b): sigmoid(a x + b).
        `isotonic` (): straight lines through `knots`, pairs (logit, P(fake)) rising in both.
    fitted_on: short text of the pictures; n_real, n_fake: how many scores of each class. considered: cross-validated
        log-loss in nats of every kind that was tried.
    """

    kind: str = "identity"
    parameters: tuple[float, ...] = ()
    knots: tuple[tuple[float, ...], ...] = ()
    fitted_on: str = "nothing"
    n_real: int = 0
    n_fake: int = 0
    considered: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require = config.require
        require(
            self.kind in KINDS,
            f"calibrator.kind is {self.kind!r}; allowed: {', '.join(KINDS)}",
        )
        wanted = {"temperature": 1, "platt": 2}.get(self.kind, 0)
        require(
            len(self.parameters) == wanted and np.isfinite(self.parameters).all(),
            f"calibrator.parameters is {self.parameters}; {self.kind} has {wanted} finite numbers",
        )
        require(
            not self.parameters or self.parameters[0] > 0,
            f"calibrator.parameters is {self.parameters}; the first must be positive, or it would reverse the order",
        )
        if self.kind != "isotonic":
            require(not self.knots, "calibrator.knots belong to isotonic alone")
            return
        require(
            len(self.knots) >= 2 and all(len(k) == 2 for k in self.knots),
            "calibrator.knots: isotonic needs at least two pairs (logit, P(fake))",
        )
        x, y = np.array(self.knots).T
        require(
            bool((np.diff(x) > 0).all() and (np.diff(y) >= 0).all()),
            "calibrator.knots must rise",
        )
        require(
            bool(0 <= y[0] and y[-1] <= 1 and np.isfinite(x).all()),
            "calibrator.knots: finite logits and probabilities in [0, 1]",
        )

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """P(fake) of each logit, same shape, float64; a logit that is not a number is a `ValueError`."""
        x = np.asarray(logits, dtype=np.float64)
        if np.isnan(x).any():
            raise ValueError(f"{int(np.isnan(x).sum())} of {x.size} logits are NaN")
        if self.kind == "isotonic":
            return np.interp(x, *np.array(self.knots).T)
        if self.kind == "temperature":
            x = x / self.parameters[0]
        elif self.kind == "platt":
            x = self.parameters[0] * x + self.parameters[1]
        return sigmoid(x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in float64, without overflow and accurate in the lower tail."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, dtype=np.float64)))


def to_dict(calibrator: Calibrator) -> dict[str, Any]:
    """The calibrator as plain JSON values."""
    return config.to_dict(calibrator)


def from_dict(values: dict[str, Any], where: str = "calibrator") -> Calibrator:
    """The calibrator from JSON values; an unknown field or a wrong type is a `ConfigError` that names it."""
    return config.from_dict(Calibrator, values, where)


def fit(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    kinds: Sequence[str] = KINDS,
    groups: np.ndarray | None = None,
    parts: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
) -> Calibrator:
    """The calibrator with the lowest cross-validated log-loss, refitted on everything.

    A more flexible kind replaces a simpler one only if its log-loss is lower by more than one standard error of their
    difference over the groups. Rows of one group (N,) stay in one fold: pass the picture's index where the logits hold
    several versions of a picture (clean and degraded). Without groups, every row is its own. parts: of `split`, where
    several members are fitted on the same rows.

    Raises:
        ValueError: one class only, a NaN, fewer groups of a class than folds, or an unknown kind.
    """
    logits, labels = _checked(logits, labels)
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f"kinds is {tuple(kinds)}; allowed: {', '.join(KINDS)}")
    ordered = [kind for kind in KINDS if kind in kinds]
    losses = {kind: np.empty(len(labels)) for kind in ordered}
    for train, held in parts or split(labels, groups):
        for kind in ordered:
            fitted = fit_kind(kind, logits[train], labels[train])
            losses[kind][held] = _losses(fitted.apply(logits[held]), labels[held])
    chosen = ordered[0]
    for kind in ordered[1:]:
        gain, error = _mean_and_error(losses[chosen] - losses[kind], groups)
        chosen = kind if gain > error else chosen
    fitted = fit_kind(chosen, logits, labels)
    return Calibrator(
        fitted.kind,
        fitted.parameters,
        fitted.knots,
        fitted_on=f"{len(np.unique(groups))} pictures",
        n_real=int(np.sum(labels == 0)),
        n_fake=int(np.sum(labels == 1)),
        considered={kind: float(losses[kind].mean()) for kind in ordered},
    )


def split(
    labels: np.ndarray, groups: np.ndarray, *, folds: int = 5, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train rows, held-out rows) per fold, stratified by label, a group never on both sides."""
    from sklearn.model_selection import StratifiedGroupKFold  # a second to import

    rarest = min(len(np.unique(groups[labels == c])) for c in (0, 1))
    if rarest < folds:
        raise ValueError(
            f"{rarest} pictures of the rarer class cannot make {folds} folds; give more pictures or fewer folds"
        )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(labels)), labels, groups))


def fit_kind(kind: str, logits: np.ndarray, labels: np.ndarray) -> Calibrator:
    """The calibrator of one kind with the lowest log-loss on these rows (N,).

    Temperature and Platt scaling fit the softened targets of Platt (1999), (n + 1) / (n + 2) and 1 / (n + 2), so that
    separable scores do not drive them to infinity.
    """
    logits, labels = _checked(logits, labels)
    if kind == "identity":
        return Calibrator()
    if kind == "temperature":
        return Calibrator(kind, (_fit_temperature(logits, _soft_targets(labels)),))
    if kind == "platt":
        return Calibrator(kind, _fit_platt(logits, _soft_targets(labels)))
    if kind == "isotonic":
        return Calibrator(kind, knots=_fit_isotonic(logits, labels))
    raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}")


# ------------------------------------------------------------------------------------------------ inside
def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if logits.ndim != 1 or logits.shape != labels.shape:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} must be (N,) and equally long")
    if not np.isfinite(logits).all():
        wrong = int((~np.isfinite(logits)).sum())
        raise ValueError(f"{wrong} of {len(logits)} logits are not finite")
    if sorted(np.unique(labels)) != [0, 1]:
        raise ValueError(f"labels are {np.unique(labels)[:5]}; calibration needs both 0 (real) and 1 (fake)")
    return logits, labels.astype(np.int64)


def _losses(p: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(N,) negative log-likelihoods in nats, p kept off 0 and 1."""
    p = np.clip(p, 1e-15, 1 - 1e-15)
    return -(targets * np.log(p) + (1 - targets) * np.log1p(-p))


def _mean_and_error(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """The mean of `values` over the rows, and its standard error with whole groups as the independent units."""
    _, which = np.unique(groups, return_inverse=True)
    deviations = np.bincount(which, weights=values - values.mean())
    count = len(deviations)
    variance = np.sum(deviations**2) * count / (count - 1) / len(values) ** 2
    return float(values.mean()), float(np.sqrt(variance))


def _soft_targets(labels: np.ndarray) -> np.ndarray:
    fake, real = np.sum(labels == 1), np.sum(labels == 0)
    return np.where(labels == 1, (fake + 1) / (fake + 2), 1 / (real + 2))


def _fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """T of least cross-entropy; the loss is convex in 1 / T, hence has one valley in log T."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        x = logits / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0, x) - targets * x))

    bound = LARGEST_LOG_TEMPERATURE
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-8})
    return float(np.exp(found.x))


def _fit_platt(logits: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """(a, b) of least cross-entropy; a stays positive."""
    from sklearn.linear_model import LogisticRegression

    centre, scale = logits.mean(), logits.std()
    prior = targets.mean()
    flat = LEAST_SLOPE, float(np.log(prior / (1 - prior)) - LEAST_SLOPE * centre)
    if scale == 0:
        return flat
    # A target t in (0, 1) is a row of class 1 with weight t and a row of class 0 with weight 1 - t.
    column = np.tile((logits - centre) / scale, 2)[:, None]
    classes = np.repeat([1, 0], len(logits))
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
    model.fit(column, classes, np.concatenate([targets, 1 - targets]))
    slope = float(model.coef_[0, 0] / scale)
    if slope < LEAST_SLOPE:
        return flat
    return slope, float(model.intercept_[0] - slope * centre)


def _fit_isotonic(logits: np.ndarray, labels: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Knots at the centres of isotonic regression's blocks, so that P(fake) rises between them instead of stepping.

    Block values are kept within [1 / (n + 2), 1 - 1 / (n + 2)], Laplace's estimate of what n pictures cannot rule out,
    and the curve ends half as far from 0 and 1 at the smallest and the largest logit.
    """
    from sklearn.isotonic import IsotonicRegression

    if logits.min() == logits.max():
        raise ValueError(f"every logit is {logits[0]:g}: isotonic calibration needs two different ones")
    values = IsotonicRegression().fit(logits, labels).predict(logits)
    heights, block = np.unique(values, return_inverse=True)
    centres = np.bincount(block, weights=logits) / np.bincount(block)
    least = 1 / (len(labels) + 2)
    x = [logits.min(), *centres, logits.max()]
    y = [least / 2, *np.clip(heights, least, 1 - least), 1 - least / 2]
    # A block of one logit value at either end has its centre on the end point, which gives way to it.
    inner = slice(int(x[1] <= x[0]), len(x) - int(x[-1] <= x[-2]))
    return tuple((float(a), float(b)) for a, b in zip(x[inner], y[inner]))
