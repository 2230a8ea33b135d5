"""lambda_t for a model and a sampler, and the weights of a correction: from norms, by trials of any score, or by a gradient.

    match_norms     lambda_i = ||eps_sampling|| / ||eps_training|| at step i, the norm gap
    fit             that, or a measured norm gap, as a polynomial in i, with its R^2
    search          b, or (k, b) of lambda_i = k*i + b, downhill over a score; cached, so that it can stop and go on
    search_weights  the same for the weights of a correction, one after the other
    learn           both, by the gradient of a loss of the samples, through the whole sampler

Each gives an EpsilonScaling, or a Correction. arXiv 2308.15321 fits the norm gap by a quadratic and takes a linear lambda; the
last is its practice, trials by FID. It publishes neither as a program.
"""

from .gradient import Learned, learn
from .norms import FITS, Fit, Matched, fit, match_norms, steps_of
from .trials import Found, downhill, search, search_weights

__all__ = [
    "FITS", "Fit", "Found", "Learned", "Matched", "downhill", "fit", "learn", "match_norms", "search", "search_weights",
    "steps_of",
]  # fmt: skip
