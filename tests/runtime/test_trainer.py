"""The training loop: values by hand, exact resume, choice, signals, and what goes wrong."""

import json
import math
import os
import signal

import pytest
import torch
from torch import nn

from furnace.command_line import entry_point
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.files import UserError
from furnace.runtime.optim import cosine_schedule
from furnace.runtime.train_state import TrainState
from furnace.runtime.trainer import FitOptions, Stopped, fit, train_mode
from toy_training import ToyLoader, digest, toy_evaluate, toy_fit, toy_model, toy_run, toy_step

PLAN = BatchPlan(micro=4, accumulation=2, world_size=1, steps_per_epoch=5)

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(epochs: int, plan: BatchPlan) -> tuple[nn.Module, list[float], list[float]]:
    """The same training without the loop: AdamW on the mean over each update's rows; model, losses, norms."""
    model, losses, norms = toy_model(dropout=0.0), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    rates = cosine_schedule(0.05, 0.001, updates=epochs * plan.steps_per_epoch, warmup=2)
    decays = cosine_schedule(0.1, 0.2, updates=epochs * plan.steps_per_epoch)
    for epoch in range(epochs):
        loader = ToyLoader(plan)
        loader.sampler.set_position(epoch, 0)
        rows = [pair for batch in loader for pair in zip(*batch, strict=True)]
        for update in range(plan.steps_per_epoch):
            part = rows[update * plan.per_update:(update + 1) * plan.per_update]
            inputs, wanted = torch.stack([x for x, _ in part]), torch.stack([y for _, y in part])
            loss = (model(inputs) - wanted).square().mean()
            at = epoch * plan.steps_per_epoch + update
            optimizer.param_groups[0].update(lr=rates[at], weight_decay=decays[at])
            optimizer.zero_grad()
            loss.backward()
            norms.append(math.hypot(*(float(p.grad.norm()) for p in model.parameters())))
            optimizer.step()
            losses.append(float(loss.detach()))
    return model, losses, norms


def test_weights_and_losses_by_hand() -> None:
    """Accumulation is one update of all rows; the log has the mean loss and the values of the last update."""
    state, best = toy_fit(model=toy_model(dropout=0.0), ema=False)
    model, losses, norms = by_hand(3, PLAN)
    assert torch.allclose(state.model[1].weight, model[1].weight, atol=1e-6)
    for epoch, entry in enumerate(state.history):
        assert entry["train_loss"] == pytest.approx(sum(losses[5 * epoch:5 * epoch + 5]) / 5, rel=1e-5)
        assert entry["train_grad_norm"] == pytest.approx(sum(norms[5 * epoch:5 * epoch + 5]) / 5, rel=1e-5)
        assert entry["train_rows"] == 4 and entry["update"] == 5 * (epoch + 1)
    assert state.history[-1]["lr"] == pytest.approx(cosine_schedule(0.05, 0.001, updates=15, warmup=2)[-1])
    assert torch.equal(best["model"]["1.weight"], state.model[1].weight)  # the last epoch is the nearest


def test_accumulation_does_not_matter() -> None:
    """8 x 1, 4 x 2, 2 x 4."""
    weights = [toy_fit(plan=BatchPlan(8 // n, n, 1, 5), model=toy_model(0.0), ema=False)[0].model[1].weight
               for n in (1, 2, 4)]
    assert torch.allclose(weights[0], weights[1], atol=1e-6) and torch.allclose(weights[0], weights[2], atol=1e-6)


def test_uneven_weights_count_by_their_size() -> None:
    """A step that weighs its second micro-batch three times gives the weighted mean's gradient."""
    seen = []

    def step(model, batch, values):
        loss, rows, logs = toy_step(model, batch, values)
        seen.append(1 if len(seen) % 2 == 0 else 3)
        return loss * seen[-1], rows * seen[-1], logs

    plan = BatchPlan(micro=2, accumulation=2, world_size=1, steps_per_epoch=1)
    model = toy_model(0.0)
    state, _ = toy_fit(plan=plan, epochs=3, model=model, step=step, ema=False)
    hand = toy_model(0.0)
    optimizer = torch.optim.AdamW(hand.parameters(), lr=0.0)
    for epoch in range(3):
        loader = ToyLoader(plan)
        loader.sampler.set_position(epoch, 0)
        (x1, y1), (x2, y2) = list(loader)
        loss = ((hand(x1) - y1).square().sum() + 3 * (hand(x2) - y2).square().sum()) / (2 + 6)
        rate = cosine_schedule(0.05, 0.001, updates=3, warmup=2)[epoch]
        optimizer.param_groups[0].update(lr=rate, weight_decay=cosine_schedule(0.1, 0.2, updates=3)[epoch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(state.model[1].weight, hand[1].weight, atol=1e-6)


def test_average_of_the_weights() -> None:
    """ema <- d ema + (1 - d) weights after each update; it is what is evaluated and kept."""
    followed, evaluated = [], []

    def step(model, batch, values):
        followed.append((float(model[1].weight[0, 0].detach()), values["ema"]))
        return toy_step(model, batch, values)

    def evaluate(model):
        evaluated.append(float(model[1].weight[0, 0].detach()))
        return toy_evaluate(model)

    state, best = toy_fit(plan=BatchPlan(8, 1, 1, 5), epochs=2, step=step, evaluate=evaluate)
    after = [value for value, _ in followed[1:]] + [float(state.model[1].weight[0, 0].detach())]
    average = followed[0][0]
    for value, (_, decay) in zip(after, followed, strict=True):
        average = decay * average + (1 - decay) * value
    assert evaluated[-1] == pytest.approx(average, abs=1e-6)
    assert float(state.ema.module[1].weight[0, 0].detach()) == evaluated[-1] != after[-1]
    assert float(best["model"]["1.weight"][0, 0]) in evaluated


def test_clipping() -> None:
    """The logged norm is the one before; a small limit makes SGD's first step lr x limit long."""
    model = toy_model(0.0)
    before = model[1].weight.detach().clone(), model[1].bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    plan = BatchPlan(8, 1, 1, 1)
    state = TrainState(model, optimizer)
    fit(state, toy_step, None, ToyLoader(plan), plan, {"lr": [0.5]}, options=FitOptions(
        epochs=1, seed=0, device=torch.device("cpu"), clip=0.1))
    moved = math.hypot(float((model[1].weight - before[0]).norm()), float((model[1].bias - before[1]).norm()))
    assert moved == pytest.approx(0.05, rel=1e-4) and state.history[0]["train_grad_norm"] > 0.1


@pytest.mark.parametrize("stop_at", [1, 4, 5, 6, 11, 14])
def test_resume_is_exact(tmp_path, stop_at: int) -> None:
    """Killed after any update, with its checkpoint there: the same weights, average, optimiser, generators, log."""
    whole, best = toy_fit(toy_run(tmp_path / "whole"), save_every_steps=1)

    class Killed(Exception):
        pass

    count = []

    def step(model, batch, values):
        count.append(1)
        if len(count) > 2 * stop_at:
            raise Killed
        return toy_step(model, batch, values)

    with pytest.raises(Killed):
        toy_fit(toy_run(tmp_path / "killed"), step=step, save_every_steps=1)
    torch.manual_seed(99)  # another process
    resumed, best_resumed = toy_fit(toy_run(tmp_path / "killed"), save_every_steps=1)
    assert digest(resumed) == digest(whole)
    assert all(torch.equal(best["model"][key], value) for key, value in best_resumed["model"].items())
    lines = [[{k: v for k, v in json.loads(line).items() if k != "seconds"}
              for line in (tmp_path / name / "log.txt").read_text().splitlines()] for name in ("whole", "killed")]
    assert lines[0] == lines[1] and len(lines[0]) == 3


def test_dropout_differs_from_step_to_step_and_repeats(tmp_path) -> None:
    """Seeded by seed and step: another seed is another training, the same one repeats."""
    first, again, other = (digest(toy_fit(seed=seed)[0]) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("where", ["update", "evaluation"])
def test_sigterm_saves_and_goes_on(tmp_path, where: str) -> None:
    """In an update when it is done, in the evaluation at once; then the same end as undisturbed."""
    whole, _ = toy_fit(toy_run(tmp_path / "whole"))
    count = []

    def step(model, batch, values):
        count.append(1)
        if where == "update" and len(count) == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy_step(model, batch, values)

    def evaluate(model):
        if where == "evaluation" and len(count) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy_evaluate(model)

    with pytest.raises(Stopped) as stopped:
        toy_fit(toy_run(tmp_path / "stopped"), step=step, evaluate=evaluate)
    assert stopped.value.code == 143
    assert len(count) == (16 if where == "update" else 20)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    count.extend([0] * 100)
    assert digest(toy_fit(toy_run(tmp_path / "stopped"))[0]) == digest(whole)


def test_a_stopped_script_ends_with_its_code(capsys) -> None:
    """143 after SIGTERM, as other programs do."""
    @entry_point
    def main(argv):
        raise Stopped(143)

    assert main([]) == 143 and "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("lower,values,wanted", [(False, [0.2, 0.5, 0.5, 0.4], 1), (True, [0.9, 0.3, 0.3, 0.2], 3),
                                                 (False, [float("nan"), 0.1, float("nan"), 0.1], 1)])
def test_choice(tmp_path, lower: bool, values: list[float], wanted: int) -> None:
    """Strictly better only; NaN never."""
    given, weights = iter(values), []

    def evaluate(model):
        weights.append(model[1].weight.detach().clone())
        return {"m": next(given)}

    state, best = toy_fit(toy_run(tmp_path / "r"), epochs=4, evaluate=evaluate, monitor="m", lower_is_better=lower)
    assert state.best_epoch == best["epoch"] == wanted
    assert torch.equal(best["model"]["1.weight"], weights[wanted])
    stored = torch.load(tmp_path / "r" / "checkpoint-best.pth", weights_only=True)
    assert stored["epoch"] == wanted and torch.equal(stored["model"]["1.weight"], weights[wanted])


def test_a_monitor_that_is_never_defined(tmp_path, caplog) -> None:
    """The last epoch, said so, and the file is there."""
    state, best = toy_fit(toy_run(tmp_path / "r"), epochs=2, evaluate=lambda model: {"m": float("nan")}, monitor="m")
    assert best["epoch"] == 1 and "not defined in any epoch" in caplog.text
    assert (tmp_path / "r" / "checkpoint-best.pth").exists() and state.history[0]["val_m"] is None


def test_early_stop() -> None:
    """Two epochs without a better value after the best."""
    values = iter([0.1, 0.5, 0.4, 0.3, 0.9, 1.0])
    state, best = toy_fit(epochs=6, evaluate=lambda model: {"m": next(values)}, monitor="m", lower_is_better=False,
                          early_stop=2)
    assert state.epoch == 4 and best["epoch"] == 1


def test_without_evaluation_the_last_epoch_counts(tmp_path) -> None:
    """And without checkpoints nothing but log.txt is written."""
    state, best = toy_fit(toy_run(tmp_path / "r"), evaluate=None, save=False)
    assert best["epoch"] == 2 and torch.equal(best["model"]["1.weight"], state.ema.module[1].weight)
    assert not list((tmp_path / "r").glob("*.pth")) and (tmp_path / "r" / "log.txt").exists()


def test_without_a_run_directory_nothing_is_written(tmp_path, monkeypatch) -> None:
    """No file, no signal handler: a federated client."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def step(model, batch, values):
        seen.append(signal.getsignal(signal.SIGTERM))
        return toy_step(model, batch, values)

    toy_fit(step=step)
    assert not list(tmp_path.iterdir()) and set(seen) == {signal.SIG_DFL}


def test_a_loss_that_is_not_finite(tmp_path) -> None:
    """The run stops with advice; the last good checkpoint stays and is continued from."""
    count = []

    def step(model, batch, values):
        count.append(1)
        loss, rows, logs = toy_step(model, batch, values)
        return loss * float("nan") if len(count) == 13 else loss, rows, logs

    with pytest.raises(UserError, match=r"the loss is nan at update 7; the last checkpoint.*--lr"):
        toy_fit(toy_run(tmp_path / "r"), step=step)
    stored = torch.load(tmp_path / "r" / "checkpoint-last.pth", weights_only=True)
    assert stored["update"] == 5 and all(value.isfinite().all() for value in stored["model"].values())
    assert digest(toy_fit(toy_run(tmp_path / "r"))[0]) == digest(toy_fit(toy_run(tmp_path / "whole"))[0])


def test_gradients_that_are_not_finite(tmp_path) -> None:
    """The weights are not touched: what is saved, even after every update, stays good."""
    count = []

    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    def step(model, batch, values):
        count.append(1)
        loss, rows, logs = toy_step(model, batch, values)
        return Break.apply(loss) if len(count) == 13 else loss, rows, logs

    with pytest.raises(UserError, match="the norm of the gradients is (inf|nan) at update 7"):
        toy_fit(toy_run(tmp_path / "r"), step=step, save_every_steps=1)
    stored = torch.load(tmp_path / "r" / "checkpoint-last.pth", weights_only=True)
    assert stored["update"] == 6 and all(value.isfinite().all() for value in stored["model"].values())
    assert digest(toy_fit(toy_run(tmp_path / "r"), save_every_steps=1)[0]) == digest(toy_fit()[0])


def test_fp16_scales_skips_and_resumes(tmp_path) -> None:
    """An update whose scaled gradients overflow is skipped, the average with it; the scale is in the checkpoint."""
    scales = []

    def step(model, batch, values):
        loss, rows, logs = toy_step(model, batch, values)
        scales.append(1e36 if len(scales) in (6, 7) else 1.0)
        return loss * scales[-1] / scales[-1] if scales[-1] == 1.0 else loss * scales[-1], rows, logs

    state, _ = toy_fit(toy_run(tmp_path / "r"), step=step, amp_dtype="fp16", epochs=1, evaluate=None)
    assert state.scaler.get_scale() < 65536 and state.update == 5
    assert state.history[0]["train_grad_norm"] < 1e6
    assert all(value.isfinite().all() for value in state.ema.module.state_dict().values())
    whole = digest(toy_fit(toy_run(tmp_path / "w"), amp_dtype="fp16")[0])

    class Killed(Exception):
        pass

    count = []

    def killing(model, batch, values):
        count.append(1)
        if len(count) == 15:
            raise Killed
        return toy_step(model, batch, values)

    with pytest.raises(Killed):
        toy_fit(toy_run(tmp_path / "k"), step=killing, amp_dtype="fp16", save_every_steps=1)
    assert digest(toy_fit(toy_run(tmp_path / "k"), amp_dtype="fp16", save_every_steps=1)[0]) == whole


def test_a_signal_between_updates_and_at_the_end_is_answered(tmp_path) -> None:
    """While a checkpoint is written: after it; in the last epoch's tracking: before the test begins."""
    def late(entry):
        if entry["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        toy_fit(toy_run(tmp_path / "r"), track=late)
    state, _ = toy_fit(toy_run(tmp_path / "r"))
    assert state.epoch == 3 and digest(state) == digest(toy_fit()[0])


def test_parts_that_stay_in_eval_mode() -> None:
    """A module without weights of a frozen trunk, named by models/tuning.py."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    model.stay_eval = ("0",)
    train_mode(model, model)
    assert [m.training for m in model.modules()] == [True, False, True]


def test_frozen_parts_keep_eval_mode() -> None:
    """A frozen norm or block uses no batch statistics and no dropout; trained ones do."""
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)), nn.Dropout(0.5),
                          nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    model[0].requires_grad_(False)
    model.eval()
    train_mode(model, model)
    assert [m.training for m in model.modules()] == [True, False, False, False, False, True, True, True, True]


def test_every_epoch_is_tracked() -> None:
    """wandb and TensorBoard get the entries of the log."""
    entries = []
    state, _ = toy_fit(track=entries.append)
    assert entries == state.history and len(entries) == 3
