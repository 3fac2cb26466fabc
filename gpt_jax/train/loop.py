"""The training run: everything is built from the configuration, then one loop that reads top-down."""

import json
import signal
import sys
from typing import Any

import jax

from gpt_jax import hosts, runtime
from gpt_jax.config import Config, config_to_dict
from gpt_jax.environments.environment import ProblemError
from gpt_jax.model import lora
from gpt_jax.model.backend import resolve_for, resolved_to
from gpt_jax.model.flops import FLOPS_FORMULA, flops_per_token
from gpt_jax.model.forward import init_params
from gpt_jax.model.gpt import GPT
from gpt_jax.placement import Placement, choose_placement
from gpt_jax.run.checkpoint import Checkpoints
from gpt_jax.run.folder import RunFolder, run_folder
from gpt_jax.run.load import fingerprint_of, open_source
from gpt_jax.system import command_line
from gpt_jax.train.metrics import Recorder
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.profile import Trace
from gpt_jax.train.state import first_state, load_pretrained_params, restore
from gpt_jax.train.step import make_train_step
from gpt_jax.train.stop import StopSignals
from gpt_jax.train.tasks import Source, make_task
from gpt_jax.train.tasks.task import Task


class Interrupted(BaseException):
    """The run has saved its state and stopped, as a signal asked it to. Not an error, like KeyboardInterrupt."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def train(config: Config, data: Source, resume: bool = False, profile: bool = False) -> None:
    """Trains the model that `config` describes on what `set_up` opened for it, in the folder `config.out_dir`.

    The runtime must be set up, and the configuration must have a vocabulary size. With several hosts, all of them call
    this; each writes its shards of the checkpoints, and the first one writes all other files.

    Raises UserError for errors that the user can fix, and Interrupted after SIGINT or SIGTERM, with the state saved;
    before the first step is done, these signals do what they did before.
    """
    run, seed = run_folder(config.out_dir), config.train.seed
    placement = choose_placement(config.parallel, config.model, runtime.choose_devices(config.parallel))
    model = GPT(resolve_for(config.model, placement.devices[0], placement.context))
    task = make_task(config, data, model, placement)
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    step_fn = make_train_step(task.objective, model, optimizer, schedule, seed, placement.axis_name)
    train_step = placement.jit(step_fn, donate=True)

    hosts.on_first(lambda: run.check_usable(resume))
    peak = runtime.peak_flops(placement.devices[0].device_kind)
    full_peak = peak and peak * placement.n_devices
    describe_run(config, task, model, placement, peak)
    meta: dict[str, Any] = {"config": config_to_dict(config), **task.facts}
    shards = json.dumps([meta["data"], meta["splits"], *(folder.settings for folder in data.metas)])
    hosts.check_alike(data=shards, tokenizer=meta["tokenizer"], configuration=json.dumps(meta["config"]))

    with (
        run.locked(),
        StopSignals() as stop,
        Checkpoints(run.checkpoints, config.train.keep_checkpoints) as checkpoints,
    ):
        pretrained = load_pretrained_params(config, model, placement, bool(resume and checkpoints.steps()))
        if pretrained and (model.config.lora.rank or config.objective.name != "next_token"):
            meta["base"] = fingerprint_of(open_source(config.init_from), pretrained)
        found = restore(checkpoints, model, optimizer, placement, meta, pretrained) if resume else None
        state = found or first_state(model, optimizer, seed, placement, pretrained)
        del found, pretrained  # The state holds these arrays, and the first step donates them.
        steps = range(int(state.step), config.train.steps)
        if steps:  # What trains nothing leaves the run as it is.
            hosts.on_first(lambda: run.write(config, data.tokenizer))
            task.begin(state, meta)

        with (
            Recorder(
                run, config, steps.start, full_peak, hosts.is_first(), task.epochs, task.tokens_per_step
            ) as recorder,
            Trace(run.profile if profile and hosts.is_first() else None, steps) as trace,
            task.feed(steps) as feed,
        ):
            last_save = steps.start

            def save(step: int, ends: bool) -> None:
                nonlocal last_save
                if step == last_save:
                    return
                last_save = step
                recorder.sync()
                params, opt_state = placement.to_checkpoint((state.params, state.opt_state))
                checkpoints.save(step, params, opt_state, meta, recorder.val_loss(step))
                recorder.plot(always=ends)

            try:
                for step in range(steps.start + 1, steps.stop + 1):  # `step` counts the steps, this one included.
                    batch, facts = feed(step - 1, state)
                    state, metrics = train_step(state, batch)
                    recorder.submit(step, metrics, facts)
                    if placement.must_wait:
                        jax.block_until_ready(state)
                        recorder.settle()
                    trace.after(step, state)

                    stopping = stop.after(step)
                    evaluates, samples, saves = events(config, step)
                    if step % task.steps_a_batch or not (evaluates or samples or saves or stopping):
                        continue
                    recorder.settle()  # Raises when the loss is not finite, so that no such state is saved.
                    with recorder.off_the_clock():
                        if evaluates:
                            recorder.add_evaluation(**task.evaluate(state.all_params(), step))
                        if saves or stopping:
                            save(step, ends=stopping > 0 or step == steps.stop)
                        if samples:
                            recorder.say(task.sample(state.all_params(), step))
                    if stopping:
                        raise Interrupted(stopping)
            except ProblemError:  # Through no fault of the state, which is worth saving.
                recorder.settle()
                save(int(state.step), ends=True)
                raise
            if not steps:
                recorder.say(f"{run} has already been trained for {steps.start} steps; raise train.steps to go on")
    conclude(run, recorder)


def events(config: Config, step: int) -> tuple[bool, bool, bool]:
    """Three flags: evaluate, sample and save after `step` steps."""

    def every(interval: int) -> bool:
        return interval > 0 and step % interval == 0

    last = step == config.train.steps
    evaluates = last or every(config.train.eval_every)
    saves = last or every(config.train.checkpoint_every or config.train.eval_every)
    return evaluates, every(config.train.sample_every), saves


def describe_run(config: Config, task: Task, model: GPT, placement: Placement, peak: float | None) -> None:
    """Prints a table before training: data, model, compute type, devices, and the formula of MFU."""
    c, n, device = model.config, placement.n_devices, placement.devices[0]
    rows = {
        **task.describe(),
        "model": f"{c.n_layer} layers, {c.n_head} heads, width {c.d_model}, context {c.context_length}, "
        f"vocabulary {c.vocab_size:,}: {c.n_params / 1e6:,.2f} M parameters",
        "compute": f"{resolved_to(c, runtime.hardware(device), placement.context)}, "
        f"layers {'unrolled' if c.unroll else 'scanned'}, rematerialised: {c.remat}",
        "devices": f"{n} x {device.device_kind} by {placement}, each {task.n_micro} x "
        f"{config.data.batch_size // placement.n_shares // task.n_micro} {task.unit}{placement.part_of_each} a step",
        "run": config.out_dir,
    }
    if c.lora.rank:
        adapters = jax.eval_shape(lambda: lora.split(init_params(model, jax.random.key(0)))[0])
        n_trained = sum(x.size for x in jax.tree.leaves(adapters))
        rows["adapters"] = f"rank {c.lora.rank} on {', '.join(c.lora.targets)}: {n_trained / 1e6:,.2f} M parameters"
    if peak:
        rows["mfu"] = f"tokens/s x {flops_per_token(c):.3g} FLOPs / ({n} x {peak:.3g} FLOP/s); {FLOPS_FORMULA}"
    for name, text in rows.items():
        print(f"{name:8} {text}")
    sys.stdout.flush()


def conclude(run: RunFolder, recorder: Recorder) -> None:
    """Prints the validation loss, where the run is, and how to sample from it."""
    evaluated = [record for record in recorder.records if "val_loss" in record]
    if evaluated:
        best = min(evaluated, key=lambda record: record["val_loss"])
        print(f"validation loss {evaluated[-1]['val_loss']:.4f}, best {best['val_loss']:.4f} at step {best['step']}")
    curve = f"; its loss curve is {run.place / run.loss_curve.name}" if run.loss_curve.exists() else ""
    print(f"the run is in {run}{curve}; read what it writes: {command_line('sample', '--run', run)}")
