"""Steps that a GPU replays: the same numbers as plain calls; elsewhere they are plain calls."""

import pytest
import torch

from ipar_sparse.ops import recording
from ipar_sparse.ops.recording import Recorder


def test_without_a_gpu_every_call_computes():
    calls = []
    record = Recorder(torch.device("cpu"))
    assert [record("a", lambda: calls.append(1) or len(calls)) for _ in range(4)] == [1, 2, 3, 4]


@pytest.mark.gpu
def test_replays_draw_as_plain_calls_do():
    x = torch.zeros(1000, device="cuda")

    def steps(enabled):
        generator = torch.Generator("cuda")
        record = Recorder(x.device, generator, enabled=enabled)

        def step():
            return x + torch.empty_like(x).normal_(generator=generator) + torch.rand_like(x)

        found = []
        for number in range(5):
            generator.manual_seed(number)
            torch.manual_seed(number)
            found.append(record("step", step).clone())
        return found

    plain, replayed = steps(False), steps(True)
    assert all(map(torch.equal, plain, replayed))
    assert not torch.equal(replayed[3], replayed[4])


@pytest.mark.gpu
def test_a_training_is_the_same_recorded_and_plain(tmp_path, monkeypatch):
    pytest.importorskip("anndata")
    from safetensors.torch import load_file

    from ipar_sparse.config import load_config
    from ipar_sparse.data.simulation import simulate
    from ipar_sparse.inference.run_folder import LAST
    from ipar_sparse.train import encoder, model
    from ipar_sparse.train.fit import fit

    config = load_config(
        None,
        [
            "encoder.steps=12",
            "encoder.hidden=[24]",
            "train.epochs=4",
            "train.minisets=3",
            "train.warmup_epochs=1",
            "train.ramp_epochs=2",
            "train.gate_steps=2",
            "train.val_minisets=1",
            "data.max_genes=60",
            "selection.mode=none",
            "train.device=cuda",
        ],
    )
    slides = simulate("cortex", slides=2, spots=700, genes=80, seed=3)
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph)
    )
    runs = []
    for enabled in (True, False):
        if not enabled:
            plain = lambda *given, **_: recording.Recorder(*given, enabled=False)  # noqa: E731
            monkeypatch.setattr(encoder, "Recorder", plain)
            monkeypatch.setattr(model, "Recorder", plain)
        fit(slides[:1], slides[1:], config, tmp_path / str(enabled))
        runs.append(load_file(tmp_path / str(enabled) / LAST))
        if enabled:
            assert len(replays) >= 10 + 6  # of the encoder and of the model
    for name, value in runs[0].items():
        if name.startswith(("encoder.", "gate.", "model.")):
            spread = float(value.double().std()) if value.numel() > 1 else 1.0
            gap = float((value.double() - runs[1][name].double()).abs().max())
            assert gap <= 1e-3 * max(spread, 1e-3), name
