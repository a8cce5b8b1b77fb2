"""Named variants of the model and its training, and named defaults of what a run selects."""

from typing import Any

_LEARNED_BETAS = {"shared": False, "recycles": 3, "learned_betas": (2.0, 2.0, 2.0)}

PRESETS: dict[str, dict[str, Any]] = {
    "v1": {},
    "spec": {
        "data": {"target_sum": 1e4},
        "encoder": {
            "steps": 1000,
            "skip": False,
            "knn_smoothing": 0,
            "scale_power": 0.0,
            "morans_i_power": 0.0,
            "component_weight": 0.0,
            "component_kind": "principal",
            "dropout": 0.1,
            "infonce_weight": 1.0,
            "distance_weight": 0.0,
            "invariance_weight": 25.0,
            "variance_weight": 50.0,
            "covariance_weight": 1.0,
            "gene_dropout": 0.2,
            "noise": 0.1,
            "gene_log_std": 0.0,
        },
        "graph": {"candidate_pool": 0},
        "model": {"init": "mlp", "recycling": True},
        "train": {
            "lambda_gram": 0.0,
            "epochs": 15,
            "minisets": 1000,
            "gate_steps": 500,
            "ramp_epochs": 6,
        },
        "refine": {"distance_correction_steps": 0, "steps": 0},
        "selection": {"mode": "none"},
    },
    "v1-rbf": {"model": {"terms": ["rbf"]}},
    "v1-mono": {"model": {"terms": ["mono"]}},
    "v1-point-ipa": {"model": {"terms": ["point_ipa"]}},
    "v1-pair": {"model": {"terms": ["pair"]}},
    "v1-head-gate": {"model": {"gate_heads": 4}},
    "v1-qk-norm": {"model": {"qk_norm": True}},
    "v1-qk-norm-geo": {"model": {"qk_norm": True, "terms": ["mono_clamped"]}},
    "v2-3r": {"model": _LEARNED_BETAS},
    "v2-3r-geo-last": {"model": {**_LEARNED_BETAS, "terms": ["mono"], "geo_schedule": "last"}},
    "v2-5r": {"model": {"shared": False, "recycles": 5, "learned_betas": (2.0,) * 5}},
    "ipa-r": {
        "model": {
            "shared": False,
            "recycles": 3,
            "qk_norm": True,
            "qk_range": (1.0, 10.0),
            "learned_betas": (0.5, 1.5, 2.0),
            "terms": ["pair", "point_ipa"],
            "pair_hidden": [64],
            "geo_schedule": "last",
            "init_step_size": 0.2,
        }
    },
    "gate-t2": {"train": {"gate_target_weights": [0.0, 1.0]}},
    "gate-mix": {"train": {"gate_target_weights": [0.5, 0.5]}},
    "no-gate": {"model": {"beta": 0.0}},
    "no-qk": {"model": {"qk": False}},
    "target-edges": {"model": {"beta": 0.0}, "train": {"attention_graph": "target"}},
    "knn-static": {"model": {"beta": 0.0}, "graph": {"k": 50}},
    "spec-later": {
        "graph": {"metric": "cosine"},
        "model": {"qk_norm": True, "terms": ["mono_clamped"]},
        "train": {
            "gate_noise": True,
            "vary_augmentation": True,
            "k_fraction_range": (0.12, 0.18),
            "mutual_prob": 0.2,
        },
    },
}
"""Name of a variant to the values in which it differs from the defaults, by section.

The unshared ones learn one gate weight per recycle. Parameter counts published for them hold one
number per recycle more than the blocks do, and do not name it; ``model.learned_betas=none`` is
without.
"""

DEFAULT_SELECTION: dict[str, Any] = {
    "model.init": "atlas",
    "model.recycling": True,
    "encoder.component_kind": "principal",
    "refine.distance_correction_steps": 200,
    "refine.steps": 400,
    "refine.anchor_weight": 5.0,
    "refine.rca_power": 0.5,
    "uncertainty.error_intercept": 0.1,
    "uncertainty.error_slide_slope": 0.0,
    "uncertainty.error_slope": 1.1,
    "uncertainty.disc_radius": 1.25,
    "uncertainty.calibrated": False,
}
"""Values of settings that a request leaves open, where nothing is cross-validated."""
