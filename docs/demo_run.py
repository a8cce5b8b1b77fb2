"""The run and the unseen section that pages of the guide show; trained once for all of them."""

import logging
import warnings
from pathlib import Path

import ipar_sparse as ipar
from ipar_sparse.data.simulation import simulate

FOLDER = Path(__file__).parent / "_build" / "run"
SHORT = {
    "encoder.steps": 150,
    "train.gate_steps": 60,
    "train.minisets": 30,
    "train.val_minisets": 8,
    "train.epochs": 3,
    "train.ramp_epochs": 1,
    "selection.mode": "none",
}


def trained():
    """A short training on two simulated sections, and a section that it never saw.

    Returns:
        The Predictor, the Slide, and its Prediction.
    """
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    *sections, unseen = simulate("cortex", slides=4, spots=400, genes=300)
    if not (FOLDER / "config.json").is_file():
        config = ipar.load_config(overrides=[f"{key}={value}" for key, value in SHORT.items()])
        ipar.fit(sections[:2], sections[2:], config, FOLDER)
    predictor = ipar.Predictor.load(FOLDER)
    return predictor, unseen, predictor.predict(unseen, noise_samples=4)
