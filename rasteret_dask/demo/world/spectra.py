# SPDX-License-Identifier: Apache-2.0
"""What each ground cover reflects on each day of the year."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ["BANDS", "PHASES", "Cover", "bare", "spectra_on"]

BANDS = ("blue", "green", "red", "nir", "swir16")
"""Order of the band axis of every spectrum here."""
PHASES = 16
"""Number of phenological phases: 0 is ten days late, 15 ten days early."""

Spectrum = tuple[float, float, float, float, float]


class Cover(IntEnum):
    """What the ground is covered with."""

    WATER = 0
    LAKE = 1
    BROADLEAF = 2
    CONIFER = 3
    MEADOW = 4
    WINTER_CEREAL = 5
    RAPESEED = 6
    MAIZE = 7
    BEET = 8
    FALLOW = 9
    GARDEN = 10
    RED_ROOF = 11
    GREY_ROOF = 12
    HALL = 13
    ASPHALT = 14
    TRACK = 15


_BARE: Spectrum = (0.055, 0.080, 0.112, 0.190, 0.265)
_GREEN: Spectrum = (0.022, 0.060, 0.029, 0.460, 0.195)
_STRAW: Spectrum = (0.062, 0.108, 0.132, 0.330, 0.310)

_CALENDAR: Mapping[Cover, tuple[tuple[int, Spectrum], ...]] = {
    Cover.WATER: ((1, (0.036, 0.050, 0.034, 0.022, 0.010)),),
    Cover.LAKE: ((1, (0.026, 0.036, 0.019, 0.009, 0.005)),),
    Cover.BROADLEAF: (
        (90, (0.030, 0.042, 0.052, 0.190, 0.165)),
        (108, (0.028, 0.050, 0.046, 0.260, 0.165)),
        (128, (0.020, 0.052, 0.025, 0.440, 0.175)),
        (150, (0.016, 0.042, 0.020, 0.450, 0.165)),
        (200, (0.016, 0.040, 0.021, 0.420, 0.165)),
    ),
    Cover.CONIFER: ((1, (0.014, 0.026, 0.018, 0.225, 0.085)), (150, (0.014, 0.027, 0.017, 0.245, 0.085))),
    Cover.MEADOW: (
        (85, (0.040, 0.064, 0.066, 0.240, 0.230)),
        (112, (0.030, 0.068, 0.045, 0.360, 0.210)),
        (140, (0.024, 0.068, 0.034, 0.440, 0.200)),
        (158, (0.034, 0.074, 0.056, 0.370, 0.240)),
        (185, (0.030, 0.072, 0.046, 0.400, 0.225)),
    ),
    Cover.WINTER_CEREAL: (
        (80, (0.042, 0.070, 0.070, 0.290, 0.230)),
        (105, (0.028, 0.064, 0.040, 0.410, 0.205)),
        (130, _GREEN),
        (155, (0.026, 0.062, 0.038, 0.430, 0.205)),
        (172, (0.040, 0.084, 0.076, 0.370, 0.245)),
        (190, _STRAW),
    ),
    Cover.RAPESEED: (
        (80, (0.032, 0.066, 0.048, 0.360, 0.215)),
        (104, (0.027, 0.078, 0.045, 0.450, 0.200)),
        (118, (0.036, 0.134, 0.112, 0.500, 0.210)),
        (132, (0.033, 0.115, 0.088, 0.490, 0.205)),
        (146, (0.026, 0.076, 0.044, 0.480, 0.195)),
        (170, (0.032, 0.074, 0.050, 0.420, 0.205)),
        (190, (0.052, 0.092, 0.096, 0.350, 0.265)),
    ),
    Cover.MAIZE: (
        (135, _BARE),
        (155, (0.044, 0.074, 0.082, 0.270, 0.245)),
        (172, (0.031, 0.066, 0.048, 0.390, 0.215)),
        (195, _GREEN),
    ),
    Cover.BEET: (
        (120, (0.050, 0.074, 0.102, 0.175, 0.250)),
        (145, (0.042, 0.074, 0.074, 0.310, 0.235)),
        (165, (0.027, 0.070, 0.036, 0.470, 0.200)),
        (200, (0.024, 0.070, 0.030, 0.520, 0.190)),
    ),
    Cover.FALLOW: ((90, _BARE), (140, (0.046, 0.078, 0.086, 0.260, 0.255)), (190, _STRAW)),
    Cover.GARDEN: (
        (90, (0.036, 0.054, 0.056, 0.220, 0.180)),
        (130, (0.030, 0.058, 0.042, 0.340, 0.175)),
        (200, (0.029, 0.056, 0.041, 0.350, 0.175)),
    ),
    Cover.RED_ROOF: ((1, (0.070, 0.096, 0.158, 0.235, 0.255)),),
    Cover.GREY_ROOF: ((1, (0.112, 0.122, 0.132, 0.180, 0.190)),),
    Cover.HALL: ((1, (0.290, 0.305, 0.315, 0.345, 0.310)),),
    Cover.ASPHALT: ((1, (0.080, 0.090, 0.097, 0.140, 0.150)),),
    Cover.TRACK: ((90, (0.062, 0.088, 0.108, 0.210, 0.255)), (140, (0.056, 0.088, 0.096, 0.270, 0.250))),
}
"""Surface reflectance of the full-grown cover at knots of the day of year, straight lines between them.

Levels follow published spectra of temperate farmland in blue, green, red, near and short-wave infrared; they
are made up to look right, not measured.
"""

_VARIES = (Cover.BROADLEAF, Cover.MEADOW, Cover.WINTER_CEREAL, Cover.RAPESEED, Cover.MAIZE, Cover.BEET)


def spectra_on(day_of_year: int) -> NDArray[np.float32]:
    """Return the reflectance of every cover and phase on one day.

    Returns
    -------
    Shape (cover x PHASES, band), at row ``cover * PHASES + phase``. Surface reflectance, 0..1.
    """
    shift = np.linspace(-10, 10, PHASES)
    table = np.empty((len(Cover), PHASES, len(BANDS)), np.float32)
    for cover in Cover:
        days = day_of_year + (shift if cover in _VARIES else np.zeros(PHASES))
        knots = [day for day, _ in _CALENDAR[cover]]
        for band in range(len(BANDS)):
            table[cover, :, band] = np.interp(days, knots, [s[band] for _, s in _CALENDAR[cover]])
    return table.reshape(-1, len(BANDS))


def bare(spectra: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what shows where the cover is thin: soil under plants, and anything else unchanged.

    Parameters
    ----------
    spectra
        A table of :func:`spectra_on`, whose shape the result has.
    """
    cover = np.arange(len(spectra))[:, None] // PHASES
    planted = (cover >= Cover.BROADLEAF) & (cover <= Cover.FALLOW)
    return np.where(planted, np.asarray(_BARE, np.float32), spectra)
