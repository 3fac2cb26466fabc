"""The training run: everything is built from the configuration, then one loop that reads top-down."""

import functools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt_jax import hosts, runtime
from gpt_jax.config import Config, config_from_dict, config_to_dict
from gpt_jax.data.loader import Prefetch, TrainBatches, eval_batches
from gpt_jax.data.shards import Dataset
from gpt_jax.errors import UserError
from gpt_jax.model import lora
from gpt_jax.model.backend import resolve
from gpt_jax.model.flops import FLOPS_FORMULA, flops_per_token
from gpt_jax.model.gpt import GPT, Params, init_params
from gpt_jax.placement import Placement, choose_placement
from gpt_jax.run.checkpoint import Checkpoints, DamagedCheckpointError, tree_fingerprint
from gpt_jax.run.folder import RunFolder
from gpt_jax.run.load import open_source
from gpt_jax.sample.generate import Settings, encode_prompt, generate
from gpt_jax.train.metrics import Recorder
from gpt_jax.train.objectives.next_token import next_token
from gpt_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.train.profile import Trace
from gpt_jax.train.step import TrainState, init_state, make_eval_step, make_train_step
from gpt_jax.train.stop import stop_signals


class Interrupted(BaseException):
    """The run was asked to stop, saved its state and did. Like KeyboardInterrupt, it is no error."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def train(config: Config, data: Dataset, resume: bool = False, profile: bool = False) -> None:
    """Trains the model that `config` describes on `data`, in the folder `config.out_dir`.

    The runtime is set up already, and the configuration has a vocabulary size. Of several hosts, which all call this,
    the first one writes what is written once.

    Raises UserError for what the user can mend, and Interrupted after SIGINT or SIGTERM, when the state is saved.
    """
    run, seed = RunFolder(Path(config.out_dir)), config.train.seed
    placement = choose_placement(config.parallel, config.model, runtime.choose_devices(config))
    n_micro = placement.microbatches(config.data.batch_size, config.data.microbatch_size)
    rows = placement.rows(config.data.batch_size, n_micro)  # This host's.
    batches = TrainBatches(data.train, config.model.context_length, config.data.batch_size, seed)

    model = GPT(resolve(config.model, runtime.platform_name(placement.devices[0]), placement.context))
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    step_fn = make_train_step(next_token, model, optimizer, schedule, seed, placement.axis_name)
    train_step = placement.jit(step_fn, donate=True)
    evaluate = make_evaluate(model, placement, data, config)

    hosts.on_first(lambda: run.check_usable(resume))
    peak = runtime.peak_flops(placement.devices[0].device_kind)
    describe_run(config, data, model, placement, n_micro, peak)
    meta: dict[str, Any] = {
        "config": config_to_dict(config),
        "tokenizer": data.meta.tokenizer_fingerprint,
        "data": data.meta.source_fingerprint,
    }
    shards = json.dumps([meta["data"], len(data.train), len(data.val), data.meta.settings])
    hosts.check_alike(data=shards, tokenizer=meta["tokenizer"], configuration=json.dumps(meta["config"]))
    encode_prompt(config.train.sample_prompt, data.tokenizer, config.model.context_length)  # Fails now, or never.

    with (
        run.locked(),
        stop_signals() as stop,
        Checkpoints(run.checkpoints, config.train.keep_checkpoints) as checkpoints,
    ):
        pretrained = load_pretrained_params(config, model, placement, bool(resume and checkpoints.steps()))
        if model.config.lora.rank:
            meta["base"] = tree_fingerprint(pretrained)
        state = restore(checkpoints, model, optimizer, placement, meta, pretrained) if resume else None
        if state is None:
            state = first_state(model, optimizer, seed, placement, pretrained)
        del pretrained  # The state has it by now, and lets its memory be used for another.
        hosts.on_first(lambda: run.write(config, data.tokenizer))
        steps = range(int(state.step), config.train.steps)

        with (
            Recorder(run, config, steps.start, peak and peak * placement.n_devices, hosts.is_first()) as recorder,
            Trace(run.profile if profile and hosts.is_first() else None, steps) as trace,
            Prefetch(lambda step: placement.split(batches(step, rows), n_micro), steps) as prefetched,
        ):
            for step, batch in enumerate(prefetched, steps.start + 1):  # `step` counts the steps, this one included.
                state, metrics = train_step(state, batch)
                recorder.submit(step, metrics)
                if placement.must_wait:
                    jax.block_until_ready(state)
                    recorder.settle()
                trace.after(step, state)

                stopping = stop.after(step)
                evaluates, samples, saves = events(config, step)
                if not (evaluates or samples or saves or stopping):
                    continue
                recorder.settle()  # Raises when the loss is not finite: no such state is to be saved.
                with recorder.off_the_clock():
                    if evaluates:
                        recorder.add_evaluation(**evaluate(state.all_params()))
                    if saves or stopping:
                        recorder.sync()
                        params, opt_state = placement.to_checkpoint((state.params, state.opt_state))
                        checkpoints.save(step, params, opt_state, meta, recorder.val_loss(step))
                        del params, opt_state  # The next step gives their memory away.
                        recorder.plot()
                    if samples:
                        recorder.say(write_sample(model, placement, state.all_params(), data, config))
                if stopping:
                    raise Interrupted(stopping)
            if not steps:
                recorder.say(f"{run} has already been trained for {steps.start} steps; raise train.steps to go on")
    conclude(run, recorder)


def events(config: Config, step: int) -> tuple[bool, bool, bool]:
    """Whether to evaluate, to sample and to save after `step` steps."""

    def every(interval: int) -> bool:
        return interval > 0 and step % interval == 0

    last = step == config.train.steps
    evaluates = last or every(config.train.eval_every)
    saves = last or every(config.train.checkpoint_every or config.train.eval_every)
    return evaluates, every(config.train.sample_every), saves


def describe_run(
    config: Config, data: Dataset, model: GPT, placement: Placement, n_micro: int, peak: float | None
) -> None:
    """Prints what is about to be trained, on what, and how speed is counted."""
    c, n, device = model.config, placement.n_devices, placement.devices[0]
    rows = {
        "data": f"{config.data.dir}: {len(data.train):,} training and {len(data.val):,} validation tokens",
        "model": f"{c.n_layer} layers, {c.n_head} heads, width {c.d_model}, context {c.context_length}, "
        f"vocabulary {c.vocab_size:,}: {c.n_params / 1e6:,.2f} M parameters",
        "compute": f"{c.dtype}, attention {c.attention}, "
        f"layers {'unrolled' if c.unroll else 'scanned'}, rematerialised: {c.remat}",
        "devices": f"{n} x {device.device_kind} by {placement}, each {n_micro} x "
        f"{config.data.batch_size // placement.n_shares // n_micro} sequences{placement.part_of_each} a step",
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


def first_state(
    model: GPT,
    optimizer: optax.GradientTransformation,
    seed: int,
    placement: Placement,
    pretrained: Params | None,
) -> TrainState:
    """The state before the first step: random, or pretrained parameters, or random adapters beside these."""
    if pretrained is None or model.config.lora.rank:
        state = placement.make(lambda: init_state(model, optimizer, seed))
        return state._replace(frozen=pretrained or {})
    opt_state = placement.make(optimizer.init, pretrained)
    return TrainState(placement.make(lambda: jnp.int32(0)), pretrained, opt_state, {})


def restore(
    checkpoints: Checkpoints,
    model: GPT,
    optimizer: optax.GradientTransformation,
    placement: Placement,
    meta: dict[str, Any],
    pretrained: Params | None,
) -> TrainState | None:
    """The state of the newest whole checkpoint, on this run's devices; None when there is no checkpoint yet.

    pretrained: the parameters that are not in the checkpoint, where adapters are trained.

    Damaged ones are named and passed over. Raises UserError when one does not fit the configuration or the tokenizer,
    or all are damaged.
    """
    target = placement.abstract(jax.eval_shape(lambda: init_state(model, optimizer, seed=0)))
    damaged = []
    for step in reversed(checkpoints.steps()):
        try:
            check_fits(checkpoints.folder / str(step), checkpoints.meta(step), meta)
            params = placement.from_checkpoint(checkpoints.restore(step, "params", target.params))
            opt_state = placement.from_checkpoint(checkpoints.restore(step, "opt_state", target.opt_state))
        except DamagedCheckpointError as e:
            print(f"{e}; going back to the one before", file=sys.stderr)
            damaged.append(step)
            continue
        for later in damaged:
            hosts.on_first(functools.partial(checkpoints.set_aside, later))
            checkpoints.reload()
        print(f"resuming after step {step}")
        frozen = (pretrained or {}) if model.config.lora.rank else {}
        return TrainState(placement.make(jnp.int32, step), params, opt_state, frozen)
    if damaged:
        raise UserError(f"no checkpoint in {checkpoints.folder} is whole; train anew in another --out-dir")
    print("no checkpoint yet: starting from the first step")
    return None


def load_pretrained_params(config: Config, model: GPT, placement: Placement, resumes: bool) -> Params | None:
    """The parameters of the model in `config.init_from`, on this run's devices; None where none are needed: where there
    is no such model, or a checkpoint has all parameters."""
    if not config.init_from or (resumes and not model.config.lora.rank):
        return None
    return open_source(config.init_from).load_params(model.config, placement)


DECIDE_THE_DATA_ORDER = ("data.batch_size", "train.seed")


def check_fits(where: Path, saved: dict[str, Any], meta: dict[str, Any]) -> None:
    """Raises UserError naming what differs between a checkpoint's facts and this run's, if it must not; prints the
    rest of what differs."""
    for name in ("tokenizer", "data"):
        if saved[name] != meta[name]:
            raise UserError(f"checkpoint {where} was trained with another {name} than that of the data folder")
    if saved.get("base") != meta.get("base"):
        raise UserError(f"the adapters in checkpoint {where} were trained on another model than init_from now is")
    deciding = [config_from_dict(facts["config"], str(where)).model.deciding() for facts in (saved, meta)]
    for (name, before), value in zip(deciding[0].items(), deciding[1].values(), strict=True):
        if before != value:
            raise UserError(
                f"checkpoint {where} does not fit the configuration: model.{name} is {before} there and {value} here"
            )
    if saved["config"].get("init_from", "") != meta["config"]["init_from"]:
        raise UserError(
            f"init_from is {saved['config'].get('init_from')!r} in checkpoint {where} and "
            f"{meta['config']['init_from']!r} here; a run that goes on cannot begin with another model"
        )
    for section, now in meta["config"].items():
        then = saved["config"].get(section)
        for name, value in now.items() if isinstance(now, dict) else []:
            full_name, before = f"{section}.{name}", then.get(name, value)
            if before == value:
                continue
            if full_name in DECIDE_THE_DATA_ORDER:
                raise UserError(
                    f"{full_name} is {before} in checkpoint {where} and {value} here: another order of the data"
                )
            print(f"changed since step {where.name}: {full_name} from {before} to {value}")


def make_evaluate(
    model: GPT, placement: Placement, data: Dataset, config: Config
) -> Callable[[Params], dict[str, float]]:
    """A function of the parameters: loss in nats a token and bits a byte of text, over the whole validation set.

    Raises UserError when that is less than two tokens, or the batch does not divide over the devices.
    """
    if len(data.val) < 2:
        raise UserError(
            f"the validation split of {config.data.dir} has {len(data.val)} tokens; prepare it with more text"
        )
    default = config.data.microbatch_size * placement.n_shares or config.data.batch_size
    batch_size = config.train.eval_batch_size or default
    if batch_size % placement.n_shares:
        raise UserError(
            f"train.eval_batch_size = {batch_size} does not divide over {placement.n_shares} {placement.told_shares}"
        )
    rows = placement.rows(batch_size)
    eval_step = placement.jit(make_eval_step(next_token, model, placement.axis_name), donate=False)
    tokens_per_byte = len(data.val) / data.val.n_bytes

    def evaluate(params: Params) -> dict[str, float]:
        sums = []
        for batch in eval_batches(data.val, config.model.context_length, batch_size):
            sums.append(eval_step(params, placement.split(jax.tree.map(lambda x: x[rows], batch)))[:2])
            if placement.must_wait:
                jax.block_until_ready(sums[-1])
        total, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0).tolist()
        loss = total / count
        return {"val_loss": loss, "val_bits_per_byte": loss * tokens_per_byte / float(np.log(2))}

    return evaluate


def write_sample(model: GPT, placement: Placement, params: Params, data: Dataset, config: Config) -> str:
    """What the model writes after the configured prompt, as text between two rules; on the first host alone."""
    on_one_device = placement.on_one_device(params)
    if not hosts.is_first():
        return ""
    settings = Settings(max_new_tokens=config.train.sample_tokens, seed=config.train.seed)
    [result] = generate(model, on_one_device, data.tokenizer, [config.train.sample_prompt], settings)
    return f"--- sample\n{config.train.sample_prompt}{result.text}\n---"


def conclude(run: RunFolder, recorder: Recorder) -> None:
    """Prints how the run came out, and what to do next."""
    evaluated = [record for record in recorder.records if "val_loss" in record]
    if evaluated:
        best = min(evaluated, key=lambda record: record["val_loss"])
        print(f"validation loss {evaluated[-1]['val_loss']:.4f}, best {best['val_loss']:.4f} at step {best['step']}")
    curve = f"; its loss curve is {run.loss_curve}" if run.loss_curve.exists() else ""
    print(f"the run is in {run}{curve}; read what it writes: python sample.py --run {run}")
