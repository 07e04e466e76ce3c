"""What each number and each label means, in the words that every page prints.

Knows words only.
"""

from __future__ import annotations

NONE = "–"

# Label -> (name in words, what it claims). The order is from the strongest claim to the weakest.
LABELS = {
    "bound": (
        "guarantee, before the run",
        "Holds for the mechanism before it runs, whatever happens in the run: the sensitivities "
        "were constants, enforced caps or budgets.",
    ),
    "expectation_bound": (
        "guarantee over the randomness of training",
        "Bounds the divergence between training with and without the instance, as an expectation "
        "over independent trainings; the number is its upper confidence value.",
    ),
    "output_specific": (
        "statement about this run only",
        "Exact or capped sensitivities summed along the run that happened. It describes this model "
        "and was not a promise before the run.",
    ),
    "estimate": (
        "estimate, no guarantee",
        "Computed from stale or partial measurements. Use it for ranking and planning only: it can "
        "be smaller than the true privacy loss.",
    ),
}

# Term -> what it means.
TERMS = {
    "ε and δ": "A training is (ε, δ)-private for an instance if what can be seen of it is about "
    "equally likely with and without that instance: the probabilities differ by a factor of at "
    "most e to the power ε, up to a probability δ. Smaller is more private. ε is a natural "
    "logarithm and is rounded up here. A dash (–) means that there is no such number; it never "
    "means 0.",
    "Best guess": "ε in other words. One of two models is shown, by the toss of a coin: how often "
    "the best guesser says rightly which it was, whatever else is known to them. A coin is right "
    "in 50 %.",
    "N": "The number of private training instances. N is treated as public, like the sample rate, "
    "the noise, the clipping bound and the number of training steps.",
    "Neighbouring data sets": "Two data sets are neighbours if one instance is added or removed. "
    "All public constants stay the same in both.",
    "Rényi and PRV": "Per-instance privacy loss is added up as Rényi divergence at a fixed list of "
    "orders (numbers above 1), and turned into ε for the given δ at the order that gives the "
    "smallest value. PRV, Opacus's own default, follows the whole distribution of the privacy loss "
    "and is tighter: compare Rényi values with Rényi values only.",
    "Worst case and per instance": "The worst case is one ε that holds for every possible "
    "instance. The per-instance ε uses how much the model actually learned from each one. Whether "
    "it is a guarantee depends on its label.",
    "Norm": "The length of an instance's gradient before clipping, when it was last seen. It tells "
    "apart instances that are all clipped and so share their ε.",
    "Upper and lower": "An upper number says that no more was given away; a lower bound says, with "
    "its confidence, that no less was. A lower bound of 0 says only that this test saw nothing.",
    "Certified, predicted, no claim": "An unlearning result is certified only if every assumption "
    "of its certificate was met. Predicted means that steps were chosen without a guarantee. "
    "Without a certificate no ε exists for the result, however close to retraining it looks.",
    "Fingerprint": "A hash of the training data as they were when training began. Equal "
    "fingerprints mean equal contents as far as they were read.",
}
