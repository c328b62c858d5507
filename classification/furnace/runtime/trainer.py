"""The one training loop: updates, checkpoints, exact resume, choice of the model.

An engine gives two plain functions. ``step(model, batch, values)`` calls the model once and returns (sum of the losses,
its weight: the number of images or tokens, {name: number} for the log). ``evaluate(model)`` returns {name: number}; all
processes call it and get the same.

What makes a resumed training equal the uninterrupted one: pictures are drawn and augmented by (seed, epoch, place in
the epoch), a step's random numbers by (seed, forward pass, process), and the rest is in the checkpoint.
"""

import contextlib
import copy
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.checkpoints import Checkpoints
from furnace.runtime.files import UserError
from furnace.runtime.fit_options import FitOptions as FitOptions
from furnace.runtime.optim import Schedules, set_values
from furnace.runtime.precision import autocast
from furnace.runtime.progress import progress
from furnace.runtime.run_directory import RunDirectory
from furnace.runtime.seeding import seed_all
from furnace.runtime.train_state import TrainState

logger = logging.getLogger(__name__)

Step = Callable[[nn.Module, Any, dict[str, float]], tuple[torch.Tensor, float, dict[str, float]]]
Evaluate = Callable[[nn.Module], dict[str, float]]


class Stopped(Exception):  # noqa: N818 - not an error
    """The training was asked to end (SIGTERM, Ctrl-C) and has saved itself; ``code`` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped by signal {code - 128}")
        self.code = code


def fit(state: TrainState, step: Step, evaluate: Evaluate | None, loader: DataLoader, plan: BatchPlan,
        schedules: Schedules, run_directory: RunDirectory | None = None, *, options: FitOptions) -> dict[str, Any]:
    """Train from where ``state`` (or the run directory's checkpoint) is to the last epoch.

    Args:
        state: model on the device, optimiser, and the rest.
        step: see the module's docstring.
        evaluate: likewise; None when nothing is to be chosen.
        loader: yields this process's micro-batches, from where ``loader.sampler.set_position(epoch, update)`` says.
        plan: how many they are.
        schedules: a value per update of the whole training; ``lr`` at least. ``ema`` is the average's decay.
        run_directory: where checkpoints and log.txt go. Without one no file is written and no signal is caught.
        options: the rest.

    Returns:
        The best model: ``{"model": state dict on the CPU, "epoch", "meta"}``, as checkpoint-best.pth holds it; of a
        training that pauses (``max_updates``) the model as it is.

    Raises:
        UserError: the loss is not finite; the last good checkpoint stays.
        Stopped: after SIGTERM or Ctrl-C; the same command goes on from there.
    """
    return _Fit(state, step, evaluate, loader, plan, schedules, run_directory, options).run()


class _Fit:
    """The parts of one call of ``fit``."""

    def __init__(self, state: TrainState, step: Step, evaluate: Evaluate | None, loader: DataLoader, plan: BatchPlan,
                 schedules: Schedules, run: RunDirectory | None, options: FitOptions) -> None:
        self.state, self.step, self.evaluate, self.loader, self.plan = state, step, evaluate, loader, plan
        self.schedules, self.options = schedules, options
        self.run_directory = run
        self.files = None if run is None or not options.save else Checkpoints(
            run, meta=options.meta, keep_every_epochs=options.keep_every_epochs)
        self.best: dict[str, Any] | None = None  # in memory only where no file holds it
        self.asked = 0  # exit code, once a signal came to this process
        self.pid = os.getpid()
        self.busy = False  # the state is in the middle of a change, or being written
        if state.scaler is None and options.amp_dtype == "fp16":
            state.scaler = torch.amp.GradScaler(options.device.type)
        for module in (state.model, *([] if state.ema is None else [state.ema.module])):
            torch.nn.utils.convert_conv2d_weight_memory_format(module, torch.channels_last)
        self.parallel = state.model
        if distributed.world_size() > 1:
            cuda = options.device.type == "cuda"
            self.parallel = DistributedDataParallel(state.model, device_ids=[options.device.index] if cuda else None)
        self.runner = torch.compile(self.parallel) if options.compile else self.parallel
        self.params: dict[str, list[nn.Parameter]] = {}
        for group in state.optimizer.param_groups:
            self.params.setdefault(group.get("clip_group", ""), []).extend(group["params"])

    def run(self) -> dict[str, Any]:
        """All epochs that are left."""
        with self._signals(), contextlib.nullcontext() if self.files is None else self.files.locked():
            if self.files is not None:
                self.busy = True
                self.files.resume(self.state, self.options.resume)
                self._rest()
            while self.state.epoch < self.options.epochs and not self._stopped_early() and not self._paused():
                self._epoch()
            if self._paused() and self.state.epoch < self.options.epochs:
                return self._exported(self.state.epoch)
        if self.best is None and self.files is not None and self.state.best_epoch is not None:
            return self.files.read_best()
        if self.best is None:
            if self.options.monitor and self.state.best is None:
                logger.warning("--monitor %s was not defined in any epoch: taking the last", self.options.monitor)
            self.best = self._exported(max(0, self.state.epoch - 1))
            if self.files is not None:
                self.files.save_best(self.best)
        return self.best

    def _paused(self) -> bool:
        """Whether the training has come as far as this process should take it."""
        return 0 < self.options.max_updates <= self.state.update

    def _stopped_early(self) -> bool:
        patience, best = self.options.early_stop, self.state.best_epoch
        if not patience or best is None or self.state.epoch - 1 - best < patience:
            return False
        logger.info("stopped early: no better %s in %d epochs", self.options.monitor, patience)
        return True

    # ------------------------------------------------------------------------------------------------------- epochs

    def _epoch(self) -> None:
        """The updates of an epoch that are left, its evaluation, its checkpoint."""
        state, plan, every = self.state, self.plan, self.options.save_every_steps
        first = state.update - state.epoch * plan.steps_per_epoch
        self.loader.sampler.set_position(state.epoch, first)
        train_mode(self.runner, state.model)
        began = time.perf_counter()
        with progress(total=plan.draws_per_epoch, initial=first * plan.per_update, unit="image",
                      desc=f"epoch {state.epoch + 1}/{self.options.epochs}", disable=not distributed.is_main()) as bar:
            batches = iter(self.loader) if first < plan.steps_per_epoch else iter(())
            for number in range(first + 1, plan.steps_per_epoch + 1):
                self.busy = True
                mean, stop = self._update(batches)
                pause = self._paused() and number < plan.steps_per_epoch
                if self.files is not None and (stop or pause or every and number % every == 0):
                    self.files.save_last(state)
                if stop:
                    raise Stopped(stop)
                self._rest()
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                bar.update(plan.per_update)
                if pause:
                    return
        self._finish_epoch(time.perf_counter() - began)

    def _finish_epoch(self, seconds: float) -> None:
        """Evaluate, choose, write; the counters change together, so that a signal finds one state or the other."""
        state, metrics = self.state, {}
        if self.evaluate is not None:
            model = state.evaluated()
            if next(model.parameters()).device != self.options.device:  # an average kept in the CPU's memory
                model = copy.deepcopy(model).to(self.options.device)
            distributed.share_buffers(model)
            metrics = self.evaluate(model)
        self.busy = True
        means = {name: total / count for name, (total, count) in state.sums.items()}
        entry = {"epoch": state.epoch, "update": state.update,
                 **{f"train_{name}": value for name, value in means.items()},
                 **{f"val_{name}": None if math.isnan(value) else value for name, value in metrics.items()},
                 **{name: float(values[state.update - 1]) for name, values in self.schedules.items()},
                 "seconds": round(seconds, 1)}
        state.history.append(entry)
        better = self._choose(metrics)
        best = self._exported(state.epoch) if better else None
        state.sums = {}
        state.epoch += 1
        if self.files is None:
            self.best = best or self.best
        else:
            self.files.save_epoch(state, best)
        if self.run_directory is not None and distributed.is_main():
            self.run_directory.write_log_lines(state.history)
        if self.options.track is not None and distributed.is_main():
            self.options.track(entry)
        stop = self._agree(torch.zeros(2, dtype=torch.float64))[1]
        self._say(means, metrics, better)
        if stop:
            raise Stopped(stop)
        self._rest()

    def _say(self, means: dict[str, float], metrics: dict[str, float], better: bool) -> None:
        """A line for the eye."""
        monitor = self.options.monitor
        values = [("train loss", means.get("loss", math.nan))]
        values += [(f"val {name}", metrics[name]) for name in dict.fromkeys(["loss", monitor, "bacc", "auroc"])
                   if name in metrics]
        logger.info("epoch %d/%d: %s%s", self.state.epoch, self.options.epochs,
                    ", ".join(f"{name} {value:.4f}" for name, value in values),
                    " (best so far)" if better and monitor else "")

    def _choose(self, metrics: dict[str, float]) -> bool:
        """Whether this epoch is the best so far; a metric that is not defined never is."""
        state, name = self.state, self.options.monitor
        if self.evaluate is None or name is None:
            state.best_epoch = state.epoch
            return True
        value = metrics[name]
        if math.isnan(value) or (state.best is not None and
                                 (value >= state.best if self.options.lower_is_better else value <= state.best)):
            return False
        state.best, state.best_epoch = value, state.epoch
        return True

    def _exported(self, epoch: int) -> dict[str, Any]:
        weights = {key: value.detach().to("cpu", copy=True)
                   for key, value in self.options.export(self.state.evaluated()).items()}
        return {"model": weights, "epoch": epoch, "meta": self.options.meta}

    # ------------------------------------------------------------------------------------------------------ updates

    def _update(self, batches: Iterator[Any]) -> tuple[float, int]:
        """One update of the weights by plan.accumulation forward passes.

        Returns:
            The mean loss over all processes, and the exit code when one of them was asked to stop (else 0).
        """
        state, plan, options = self.state, self.plan, self.options
        values = {name: float(array[state.update]) for name, array in self.schedules.items()}
        set_values(state.optimizer, values)
        nominal = plan.micro * plan.accumulation
        totals, logs = torch.zeros(2, dtype=torch.float64), {}  # loss, weight
        for part in range(plan.accumulation):
            batch = next(batches)
            seed_all(options.seed, "step", state.update * plan.accumulation + part, distributed.rank())
            wait = part < plan.accumulation - 1 and self.parallel is not state.model
            with self.parallel.no_sync() if wait else contextlib.nullcontext():
                with autocast(options.device, options.amp_dtype):
                    loss, weight, log = self.step(self.runner, batch, values)
                scaled = loss / nominal
                (scaled if state.scaler is None else state.scaler.scale(scaled)).backward()
            totals += torch.tensor([float(loss.detach()), weight], dtype=torch.float64)
            logs = {name: logs.get(name, 0.0) + value / plan.accumulation for name, value in log.items()}
        totals, stop = self._agree(totals)
        mean = float(totals[0] / totals[1])
        if not math.isfinite(mean):
            raise UserError(self._not_finite("loss", mean))
        norm = self._apply(nominal * plan.world_size / float(totals[1]))
        if state.ema is not None and math.isfinite(norm):  # fp16 skips an update whose gradients are not finite
            state.ema.decay = values["ema"]
            state.ema.update(state.model)
        state.update += 1
        for name, value in {"loss": mean, "grad_norm": norm, **logs}.items():
            if math.isfinite(value):
                total, count = state.sums.get(name, (0.0, 0))
                state.sums[name] = (total + value, count + 1)
        return mean, stop

    def _agree(self, totals: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Sums over the processes; and the exit code when any of them was asked to stop, so that all do."""
        if distributed.world_size() == 1:
            return totals, self.asked
        mine = torch.zeros(distributed.world_size(), dtype=torch.float64)
        mine[distributed.rank()] = self.asked
        both = torch.cat([totals, mine])
        dist.all_reduce(both)
        return both[:2], int(both[2:].max())

    def _apply(self, factor: float) -> float:
        """Gradients of the mean over the whole update, clipped, applied; returns their norm before clipping."""
        state, norms = self.state, []
        if state.scaler is not None:
            state.scaler.unscale_(state.optimizer)
        for params in self.params.values():
            gradients = [p.grad for p in params if p.grad is not None]
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            limit = math.inf if self.options.clip is None else self.options.clip
            norms.append(float(torch.nn.utils.clip_grad_norm_(params, limit)))
        if state.scaler is None:
            if not math.isfinite(sum(norms)):
                raise UserError(self._not_finite("norm of the gradients", sum(norms)))
            state.optimizer.step()
        else:
            state.scaler.step(state.optimizer)
            state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        return math.hypot(*norms)

    def _not_finite(self, what: str, value: float) -> str:
        kept = "nothing was saved" if self.files is None else self.files.kept()
        return (f"the {what} is {value} at update {self.state.update + 1}; {kept}. Take a lower --lr, --clip_grad 1.0, "
                "a longer warm-up, or --amp_dtype fp32, with --overwrite")

    # ------------------------------------------------------------------------------------------------------ signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Where checkpoints are written, SIGTERM and Ctrl-C save the state and end the training."""
        if self.files is None:
            yield
            return
        before = {number: signal.signal(number, self._asked_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _rest(self) -> None:
        """The state is whole again; answer a signal that came meanwhile."""
        self.busy = False
        if self.asked and self.files is not None and distributed.world_size() == 1:
            self.busy = True
            self.files.save_last(self.state)
            raise Stopped(self.asked)

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        """In the middle of an update, when it is done; otherwise (evaluation) at once, if there is one process."""
        if os.getpid() != self.pid:  # a forked loader worker has this handler, too
            return
        again, self.asked = self.asked, 128 + number
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.busy:
            self._rest()


def train_mode(runner: nn.Module, model: nn.Module) -> None:
    """Train mode for what is trained; frozen parts keep eval mode (no dropout, no drop path, no batch statistics).

    Args:
        runner: the model with its wrappers.
        model: the model itself.
    """
    runner.train()

    kept = getattr(model, "stay_eval", ())  # of models/tuning.py: parts without weights of a frozen trunk

    def settle(name: str, module: nn.Module, inherited: bool) -> None:
        own = list(module.parameters())
        module.training = (any(p.requires_grad for p in own) if own else inherited) and name not in kept
        for child_name, child in module.named_children():
            settle(f"{name}.{child_name}".lstrip("."), child, module.training)

    settle("", model, True)
